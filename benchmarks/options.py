"""The command line of `python -m benchmarks`, as one record."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from benchmarks.cases import CASES, ON_REQUEST
from benchmarks.inputs import DTYPES, SHAPES

PROGRAM = "python -m benchmarks"
USUAL = {"processes": 5, "repeats": 6, "seconds": 0.25, "step": 32, "top_k": 32}
QUICK = {"processes": 1, "repeats": 3, "seconds": 0.0, "step": 6, "top_k": 4}


@dataclass(frozen=True)
class Options:
    """An empty list means: what each case finds right for itself (see `Context.settings`)."""

    cases: list[str]
    shape: list[str]
    processor_dim: list[int]
    dtype: list[str]
    batch: list[int]
    prior: list[int]
    step: int
    top_k: int
    threads: int
    processes: int
    repeats: int
    seconds: float
    compile: bool
    quick: bool
    json: bool
    output: Path | None
    name: str


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str]) -> Options:
    """The options; a mistake in them exits with status 2 and one sentence on standard error."""
    parser = Parser(
        prog=PROGRAM,
        description="How fast bottlenecked is, beside its baselines and the machine's floors. "
        f"`{PROGRAM} compare A.jsonl B.jsonl` tells whether two runs agree.",
    )
    add = parser.add_argument
    add(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"of {', '.join(CASES)}, before the options; none: all but {', '.join(ON_REQUEST)}",
    )
    add("--shape", nargs="+", default=[], choices=SHAPES, help="backbones; default: by case, mostly smollm2")
    add("--processor-dim", nargs="+", type=int, default=[], metavar="D", help="widths of the Processor, d_p")
    add("--dtype", nargs="+", default=[], choices=DTYPES, help="of cache and baselines; bfloat16: of our weights too")
    add("--batch", nargs="+", type=int, default=[], metavar="N", help="sequences per boundary")
    add("--prior", nargs="+", type=int, default=[], metavar="N", help="positions before the step")
    add("--step", type=int, metavar="N", help="tokens of the step (32)")
    add("--top-k", type=int, metavar="K", help="recalled positions (32)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of ours and of torch; default: all cores")
    add("--processes", type=int, metavar="N", help="fresh processes per figure (5); 1: in this one, without ranges")
    add("--repeats", type=int, help="per figure and process (6)")
    add("--seconds", type=float, help="time per figure and process after which no further repeat begins (0.25)")
    add("--no-compile", action="store_true", help="leave out the baselines under torch.compile: they take minutes")
    add("--quick", action="store_true", help="a tiny grid, in a minute: shows that everything runs, measures nothing")
    add("--json", action="store_true", help="a JSON line per figure on standard output instead of tables")
    add("--output", type=Path, metavar="DIR", help="writes DIR/NAME.jsonl, NAME.md and a plot NAME-CASE.png per case")
    add("--name", default=datetime.date.today().isoformat(), help="of these files; default: the date")
    given = vars(parser.parse_args(arguments))
    given["compile"] = not (given.pop("no_compile") or given["quick"])
    given |= {key: value for key, value in (QUICK if given["quick"] else USUAL).items() if given[key] is None}
    options = Options(**{f.name: given[f.name] for f in fields(Options)})
    for problem in _problems(options):
        parser.error(problem)
    return options


def _problems(options: Options) -> list[str]:
    known = ", ".join(CASES)
    problems = [f"there is no case {name!r}: choose from {known}" for name in options.cases if name not in CASES]
    least = {"batch": 1, "prior": 1, "step": 1, "top_k": 1, "threads": 1, "processes": 1, "repeats": 1, "seconds": 0}
    for name, minimum in least.items():
        value = getattr(options, name)
        for one in value if isinstance(value, list) else [value]:
            if not one >= minimum:
                problems.append(f"--{name.replace('_', '-')} is {one}; it must be at least {minimum}")
    problems += [
        f"--processor-dim is {dim}; it must be a multiple of 32 (heads of 32)"
        for dim in options.processor_dim
        if dim < 32 or dim % 32
    ]
    if options.step > 256:
        problems.append(f"--step is {options.step}; a window holds at most 256 tokens")
    if Path(options.name).name != options.name:
        problems.append(f"--name is {options.name!r}; it must be a file's name without a directory")
    return problems
