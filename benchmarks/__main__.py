"""`python -m benchmarks`: runs the cases, prints tables or JSON lines, writes files; `compare` reads two of them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import compare, machine, processes, report
from benchmarks.cases import CASES, ON_REQUEST
from benchmarks.harness import Context, Figure, say
from benchmarks.options import Options, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. arguments: without the program's name; None: sys.argv."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    options = parse(arguments)
    lines: list[dict[str, Any]] = []
    for line in run(options):
        lines.append(line)
        if options.json:
            print(json.dumps(line), flush=True)
    if not options.json:
        print(report.markdown(lines))
    if options.output is not None:
        for path in report.write(lines, options.output, options.name):
            say(f"wrote {path}")
    return 0


def run(options: Options) -> Iterator[dict[str, Any]]:
    """The machine's line, then every figure of the chosen cases."""
    context = Context(options)
    yield about(context)
    for figure in processes.run(context, options.cases or [case for case in CASES if case not in ON_REQUEST]):
        say(f"{figure['case']}: {report.sentence(figure)}")
        yield figure


def about(context: Context) -> Figure:
    """What ran, on what, and how fast that is on one thread and on all that are used."""
    # Where it is written to says nothing of what ran.
    options = {key: value for key, value in dataclasses.asdict(context.options).items() if key != "output"}
    peaks = {str(n): dataclasses.asdict(context.peaks(n)) for n in sorted({1, context.options.threads})}
    return {"case": "machine", **machine.describe(), "options": options, "peaks": peaks}


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; a model's loading bars are noise here
    sys.exit(main())
