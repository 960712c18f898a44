"""`python -m experiments NAME`: trains and scores what results/NAME lacks, then writes tables and plots."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. arguments: without the program's name; None: sys.argv."""
    from bottlenecked.cli import quiet_libraries

    quiet_libraries()
    from . import plan, report

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(plan.names())}, or a file of your own, *.yaml")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone; the order is the file's")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="these backbones alone, of those that pass"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--until",
        type=float,
        metavar="SECONDS",
        help="start nothing new after so long, and let trainings under way save and end; the next run goes on",
    )
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of what there is")
    parser.add_argument("--build", type=Path, default=plan.BUILD, help="where what is trained is kept")
    parser.add_argument("--results", type=Path, default=plan.RESULTS, help="where outcomes are kept")
    parser.add_argument("--data", type=Path, default=plan.HERE, help="where the files of an experiment on a text are")
    options = parser.parse_args(arguments)
    try:
        chosen = plan.load(options.name, build=options.build, results=options.results, data=options.data)
        if unknown := set(options.only or ()) - set(chosen.variants):
            raise ValueError(f"{', '.join(sorted(unknown))}: no such variant; use {', '.join(chosen.variants)}")
        failures: list[str] = []
        from . import lab

        if not options.report:
            until = None if options.until is None else time.time() + options.until
            failures = _run(chosen, options.only, options.seeds, options.jobs, until)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        lab.complete(lab.of(chosen))
        for path in report.write(chosen):
            print(f"wrote {path}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failures else 0


def _run(
    chosen: Plan, only: Sequence[str] | None, seeds: Sequence[int] | None, count: int, until: float | None
) -> list[str]:
    """Sentences of what failed."""
    from . import jobs, lab

    # On a GPU an iteration is timed by the clock.
    queue = jobs.Queue(chosen, only, seeds, alone=chosen.text is not None and chosen.budget.unit == "seconds")
    failures = jobs.run(queue, lab.of, count, until)
    if missing := queue.missing():
        print(f"not there yet: {', '.join(f'{job.variant} of seed {job.seed}' for job in missing)}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
