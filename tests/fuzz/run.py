"""`make fuzz`: every target for its share of the time, from the committed corpus on; the last line says what came of
it.

    python tests/fuzz/run.py --seconds 60            the targets that --targets names, or all
    python tests/fuzz/run.py --replay                the committed inputs, once
    python tests/fuzz/run.py --seconds 3600 --record    and add to record.json how much has been run
    python tests/fuzz/run.py --keep                  make the committed corpus anew of all that was found

An input that fails a target lies in build/fuzz/failures, named after the target; `run.py --targets NAME --input FILE`
runs it again. tests/fuzz/corpus holds an input a line, in hexadecimal digits. Where there are several cores, as many
targets run at once. Needs .venv-fuzz, whose interpreter runs the targets in Python, and what tests/fuzz/Makefile makes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "fuzz"
RECORD = HERE / "record.json"
TARGETS = {
    "rewrite": "C: views, tables, steps and reports of a boundary",
    "operations": "C: configurations, weights, workspaces, capture, selection, products",
    "extension": "Python: every call of the extension",
    "checkpoint": "Python: configuration and weights of a checkpoint",
}
LONGEST = 400  # bytes of an input


def command(name: str) -> tuple[list[str], dict[str, str]]:
    """What runs a target, and the environment that it needs."""
    if not (HERE / f"{name}.py").exists():
        return [str(BUILD / name)], {}
    (preload,) = (ROOT / ".venv-fuzz" / "lib").glob("python3*/site-packages/asan_with_fuzzer.so")
    return [str(ROOT / ".venv-fuzz" / "bin" / "python"), str(HERE / f"{name}.py")], {
        "LD_PRELOAD": str(preload),
        "PYTHONPATH": f"{BUILD}:{ROOT / 'python'}",
        # AddressSanitizer sees each of Python's allocations, where they are lent to the extension.
        "PYTHONMALLOC": "malloc" if name == "extension" else "pymalloc",
        "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=256:detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def unpack(name: str) -> Path:
    """The folder of the target's inputs: those that are committed, and what earlier runs found."""
    folder = BUILD / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    for line in (HERE / "corpus" / f"{name}.txt").read_text().splitlines():
        data = bytes.fromhex(line)
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return folder


def libfuzzer(name: str, *options: str, timeout: float) -> tuple[int, str]:
    """Exit status and what was printed."""
    program, environment = command(name)
    failures = BUILD / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        [*program, f"-artifact_prefix={failures}/{name}-", f"-max_len={LONGEST}", "-rss_limit_mb=4096", *options],
        env={**os.environ, **environment}, cwd=BUILD, capture_output=True, text=True, errors="replace",
        timeout=timeout,
    )  # fmt: skip
    (BUILD / f"{name}.log").write_text(result.stdout + result.stderr)
    return result.returncode, result.stdout + result.stderr


def run(name: str, seconds: float | None) -> dict[str, Any]:
    """seconds None: the committed inputs alone."""
    folder, begin = unpack(name), time.monotonic()
    if seconds is None:
        inputs = [str(folder / hashlib.sha1(bytes.fromhex(line)).hexdigest()) for line in corpus(name)]
        status, output = libfuzzer(name, *inputs, timeout=900)
        runs, places = (len(inputs) if status == 0 else 0), 0
    else:
        options = (f"-max_total_time={max(int(seconds), 1)}", "-print_final_stats=1", "-len_control=0", "-timeout=60")
        status, output = libfuzzer(name, *options, str(folder), timeout=seconds + 900)
        runs = sum(map(int, re.findall(r"stat::number_of_executed_units:\s*(\d+)", output)))
        places = max(map(int, re.findall(r"cov: (\d+)", output)), default=0)
    return {
        "target": name, "runs": runs, "places": places, "inputs": len(list(folder.iterdir())),
        "seconds": round(time.monotonic() - begin), "failures": int(status != 0), "output": output,
    }  # fmt: skip


def corpus(name: str) -> list[str]:
    return (HERE / "corpus" / f"{name}.txt").read_text().splitlines()


def keep(name: str) -> None:
    """The fewest inputs that reach what all reach, and every input that is committed because it once failed."""
    small = BUILD / "merged" / name
    small.mkdir(parents=True, exist_ok=True)
    for old in small.iterdir():
        old.unlink()
    status, output = libfuzzer(name, "-merge=1", str(small), str(unpack(name)), timeout=3600)
    if status != 0:
        raise SystemExit(output[-2000:])
    lines = {path.read_bytes().hex() for path in small.iterdir()}
    (HERE / "corpus" / f"{name}.txt").write_text("\n".join(sorted(lines, key=lambda line: (len(line), line))) + "\n")
    print(f"{name}: {len(lines)} inputs")


def record(results: list[dict[str, Any]]) -> None:
    """Adds to what has been run so far."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {"targets": {}}
    for result in results:
        of = known["targets"].setdefault(result["target"], {"runs": 0, "seconds": 0, "failures": 0, "places": 0})
        for key in ("runs", "seconds", "failures"):
            of[key] += result[key]
        of["places"] = max(of["places"], result["places"])
        of["what"] = TARGETS[result["target"]]
    known["date"], known["machine"] = time.strftime("%Y-%m-%d"), platform.processor() or platform.machine()
    RECORD.write_text(json.dumps(known, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="in all (60)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--replay", action="store_true", help="the committed inputs, once")
    parser.add_argument("--keep", action="store_true", help="make the committed corpus anew")
    parser.add_argument("--record", action="store_true", help="add to record.json")
    parser.add_argument("--input", type=Path, help="run this file alone")
    options = parser.parse_args()
    if options.keep:
        for name in options.targets:
            keep(name)
        return 0
    if options.input:
        status, output = libfuzzer(options.targets[0], str(options.input.resolve()), timeout=900)
        print(output)
        return status
    jobs = min(os.cpu_count() or 1, len(options.targets))
    seconds = None if options.replay else options.seconds * jobs / len(options.targets)
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda name: run(name, seconds), options.targets))
    for result in results:
        output = result.pop("output")
        print("{target}: {runs} runs, {places} places, {inputs} inputs, {failures} failures".format(**result))
        if result["failures"]:
            progress = re.compile(r'#\d+\t|"|==\d+==WARNING: AddressSanitizer failed to allocate')
            lines = [line for line in output.splitlines() if not progress.match(line)]
            print("\n".join(lines[-60:]))
    if options.record:
        record(results)
    total = {key: sum(result[key] for result in results) for key in ("runs", "places", "failures")}
    summary = {"seconds": round(time.monotonic() - begin), **total, "targets": results}
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    recorded = json.loads(RECORD.read_text())["targets"].values() if RECORD.exists() else []
    print(
        f"make fuzz: {len(results)} targets, {total['runs']} runs in {summary['seconds']} s, "
        f"{total['places']} places reached ({sum(of['runs'] for of in recorded)} runs on record), "
        f"{total['failures']} failures"
    )
    return int(total["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
