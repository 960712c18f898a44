"""The same figures from several fresh processes, and how far these are apart: the spread that a figure states.

Repeats within one process share where its memory lies and how its threads began, and PyTorch's times move by up to 30%
with that. So every case runs in `--processes` processes, each measuring ours and every baseline: all cases once, then
all of them again, so that the processes of a case are minutes apart. The slowest take part less often (AT_MOST).

A process's ratio is the median over its repeats. A figure's ratio is the median of these, its stated spread their
range, from the smallest to the largest. The noise within a process is part of it: it is in each median. Two runs agree
on a ratio where their ranges overlap (compare.py). No distribution is assumed: were the processes of two runs alike,
two ranges of five would miss each other by chance in 2 * 5! * 5! / 10! = 0.8% of all ratios.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import floors
from benchmarks.cases import CASES
from benchmarks.harness import Context, Figure, say
from benchmarks.options import Options

AT_MOST = {"memory": 1, "decode": 3}  # processes: memory has no times, and three generations more take minutes


def run(context: Context, cases: Sequence[str]) -> Iterator[Figure]:
    """The figures of these cases. With --processes 1 they are measured in this process, and come without ranges."""
    count = context.options.processes
    if count == 1:
        for name in cases:
            yield from figures(context, name)
        return
    parts: dict[str, list[list[Figure]]] = {name: [] for name in cases}
    for process in range(count):
        for name in cases:
            if process < AT_MOST.get(name, count):
                began = time.perf_counter()
                parts[name].append(fresh(context, name, process))
                say(f"process {process + 1} of {count}, {name}: {time.perf_counter() - began:.0f} s")
    for of_case in parts.values():
        for same in zip(*of_case, strict=True):
            yield merged(same)


def figures(context: Context, case: str) -> Iterator[Figure]:
    """The figures of a case, measured in this process."""
    made: Iterator[Figure] = importlib.import_module(f"benchmarks.cases.{CASES[case]}").run(context)
    return made


def fresh(context: Context, case: str, process: int) -> list[Figure]:
    """The figures of a case, measured in a new process. Raises SystemExit where that fails; it has said why."""
    request = {
        "case": case,
        "process": process,
        "options": dataclasses.asdict(context.options) | {"output": None},
        "peaks": [dataclasses.asdict(peaks) for peaks in context.measured.values()],
    }
    done = child("benchmarks.processes", request)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines()]


def child(module: str, request: object, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE REQUEST`, the request as JSON, wherever this process was started from."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, json.dumps(request)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def answer(request: Mapping[str, Any]) -> None:
    """What the process that `fresh` started does."""
    measured = {peaks["threads"]: floors.Peaks(**peaks) for peaks in request["peaks"]}
    context = Context(Options(**request["options"]), measured, request["process"])
    for figure in figures(context, request["case"]):
        print(json.dumps(figure), flush=True)


def merged(parts: Sequence[Figure]) -> Figure:
    """One figure of what several processes measured; "ratio_range" and "range" are of their medians."""
    made: Figure = middle(parts)
    if "median_s" in made:
        made |= {
            "min_s": min(part["min_s"] for part in parts),
            "max_s": max(part["max_s"] for part in parts),
            "repeats": sum(part["repeats"] for part in parts),
            "processes": len(parts),
            "range": extent(part["median_s"] for part in parts),
        }
    if "ratios" in made:
        made["ratio_range"] = {name: extent(part["ratios"][name] for part in parts) for name in made["ratios"]}
    if "floor_s" in made:
        made["floor_fraction"] = made["floor_s"] / made["median_s"]
    return made


def middle(values: Sequence[Any]) -> Any:
    """The median of numbers with a fraction, of anything else the most frequent; of objects, key by key."""
    if isinstance(values[0], Mapping):
        return {key: middle([value[key] for value in values]) for key in values[0]}
    return statistics.median(values) if isinstance(values[0], float) else statistics.mode(values)


def extent(values: Iterator[float]) -> list[float]:
    every = list(values)
    return [min(every), max(every)]


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
