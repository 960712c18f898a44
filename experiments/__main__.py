"""`python -m experiments NAME`: trains and scores what results/NAME lacks, then writes tables and plots."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lab import Lab
    from .plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. arguments: without the program's name; None: sys.argv."""
    from bottlenecked.cli import quiet_libraries

    quiet_libraries()
    from . import plan, report

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(plan.names())}")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone; the order is the file's")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="these backbones alone, of those that pass"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, a backbone each; every one uses one thread")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of what there is")
    parser.add_argument("--build", type=Path, default=plan.BUILD, help="where what is trained is kept")
    parser.add_argument("--results", type=Path, default=plan.RESULTS, help="where outcomes are kept")
    parser.add_argument("--data", type=Path, default=plan.HERE, help="where the files of an experiment on a text are")
    options = parser.parse_args(arguments)
    try:
        chosen = plan.load(options.name, build=options.build, results=options.results, data=options.data)
        if unknown := set(options.only or ()) - set(chosen.variants):
            raise ValueError(f"{', '.join(sorted(unknown))}: no such variant; use {', '.join(chosen.variants)}")
        if not options.report:
            _run(chosen, options.only, options.seeds, options.jobs)
        for path in report.write(chosen):
            print(f"wrote {path}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(chosen: Plan, only: Sequence[str] | None, seeds: Sequence[int] | None, jobs: int) -> None:
    from . import lab

    made = _lab(chosen)
    used = [seed for seed in lab.used_seeds(made) if seeds is None or seed in seeds]
    lab.problems(made)
    lab.costs(made)
    for name in chosen.variants:
        if only is not None and name not in only:
            continue
        if chosen.variants[name].learning_rate:
            lab.chosen_rate(made, name)
        if jobs == 1:
            for seed in used:
                lab.outcome(made, seed, name)
            continue
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_outcome, *zip(*((chosen, seed, name) for seed in used), strict=True)))


def _outcome(chosen: Plan, seed: int, name: str) -> None:
    """In a process of its own."""
    from . import lab

    lab.outcome(_lab(chosen), seed, name)


def _lab(chosen: Plan) -> Lab:
    if chosen.text is not None:
        from .text import TextLab

        return TextLab(chosen)
    from .tasks import TaskLab

    return TaskLab(chosen)


if __name__ == "__main__":
    sys.exit(main())
