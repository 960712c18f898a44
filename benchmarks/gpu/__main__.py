"""`python -m benchmarks.gpu`: appends a JSON line per figure to a file and prints tables; goes on where it stopped."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import bottleneck_ext
from benchmarks import machine, report
from benchmarks.gpu.context import Context
from benchmarks.harness import say

# In this order, and each one's share of the time; what a case leaves over goes to those behind it.
CASES = {
    "boundary": 35,
    "mass": 15,
    "memory": 5,
    "profile": 5,
    "paged": 8,
    "capture": 5,
    "compiled": 30,
    "decode": 100,  # last, as it takes whatever time is left
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where something was refused or failed, which is said and does not stop the rest."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}, in this order; none: all")
    add("--output", type=Path, metavar="FILE.jsonl", help="lines are appended; what it holds is not measured again")
    add("--device", default="cuda:0", help="cuda:0; with --quick also cpu")
    add("--seconds", type=float, default=240.0, help="after which no further setting begins (240)")
    add("--repeats", type=int, default=7, help="per figure, at least 5 (7)")
    add("--quick", action="store_true", help="tiny shapes: shows that everything runs, measures nothing")
    add("--table", action="store_true", help="measure nothing: print FILE's tables")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {sorted(unknown)[0]!r}: choose from {', '.join(CASES)}")
    before = read(options.output)
    if options.table:
        print(tables(before))
        return 0
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu is there for --quick only")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    context = Context(
        options.device,
        options.quick,
        options.repeats,
        {line["key"] for line in before if "key" in line},
    )
    failures = 0
    lines = list(before)
    for line in run(context, options.cases or list(CASES), time.monotonic() + options.seconds):
        failures += "refused" in line
        lines.append(line)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(tables(lines))
    return 1 if failures else 0


def run(context: Context, cases: Sequence[str], end: float) -> Iterator[dict[str, Any]]:
    """The machine's line, then every figure; a case that fails is a line that says why. end: of time.monotonic."""
    yield about(context)
    for index, name in enumerate(cases):
        say(f"{name}:")
        now = time.monotonic()
        context.deadline = now + (end - now) * CASES[name] / sum(CASES[other] for other in cases[index:])
        began = time.perf_counter()
        case = importlib.import_module(f"benchmarks.gpu.{name}")
        try:
            for figure in case.run(context):
                if "refused" not in figure:
                    say(f"  {report.sentence(figure)}")
                yield figure
        except (Exception, SystemExit) as error:  # time on a device is dear: the other cases still run
            if not isinstance(error, SystemExit):
                say(traceback.format_exc())
            say(f"  {name} stopped: {error}")
            yield {"case": name, "refused": f"{type(error).__name__}: {error}"[:2000]}
        say(f"  {name} took {time.perf_counter() - began:.0f} s")


def about(context: Context) -> dict[str, Any]:
    """What ran, on what, and its rates."""
    found: dict[str, Any] = {
        "case": "machine",
        "device": torch.cuda.get_device_name(context.device) if context.on_gpu else platform.processor(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "build": bottleneck_ext.build_info(),
        "cpu": machine.cpu_model(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {"bottlenecked": bottleneck_ext.__version__}
        | {name: machine.version(name) for name in (*machine.PACKAGES, "triton")},
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": context.quick,
    }
    return found | {"rates": dataclasses.asdict(context.rates)}


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tables(lines: Sequence[dict[str, Any]]) -> str:
    machines = [line for line in lines if line["case"] == "machine"]
    refused = [f"{line['case']} stopped: {line['refused']}" for line in lines if "refused" in line]
    figures = [line for line in lines if line["case"] != "machine" and "refused" not in line]
    about_last = []
    if machines:
        last, rates = machines[-1], machines[-1]["rates"]
        exps = "-" if rates["exps"] is None else f"{rates['exps'] / 1e12:.2f}"
        about_last = [
            f"{last['device']}, driver {last['driver']}, torch {last['versions']['torch']}, transformers "
            f"{last['versions']['transformers']}; commit {last['commit']}; {last['date']}; copied "
            f"{rates['copy_bandwidth'] / 1e12:.2f} TB/s, read {rates['read_bandwidth'] / 1e12:.2f} TB/s, bfloat16 "
            f"{rates['bfloat16_flops'] / 1e12:.0f} TFLOP/s, float32 {rates['float32_flops'] / 1e12:.0f} TFLOP/s, "
            f"{exps}e12 exp/s."
        ]
    return "\n\n".join([*about_last, report.markdown(figures), *refused])


if __name__ == "__main__":
    sys.exit(main())
