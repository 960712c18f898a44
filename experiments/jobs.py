"""What an experiment's outcomes need, and processes that do it: everything that is ready at once, in the file's order.

What is done is told by the files that are there, so a run goes on wherever one stopped. A job waits for others:

    prepare    the data
    costs      what an iteration of each variant costs; before anything else where that is told by the clock
    backbone   of one seed, trained and judged; as many at a time as are still wanted
    rate       a candidate of a variant, on the first backbone that passes
    base       of one seed, the model that another variant goes on with
    outcome    of one seed and variant

A job that fails takes with it those that wait for it, and no other.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from . import lab as labs
from .lab import OutOfTimeError, read, say, write
from .plan import Plan

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext, SpawnProcess

    from .lab import Lab

_TRIES = 2  # again, where a device had too little memory for all

DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class Job:
    """kind: as above; the others as far as they belong to it."""

    kind: str
    seed: int | None = None
    variant: str = ""
    rate: float | None = None

    def __str__(self) -> str:
        parts = (self.kind, self.variant, *(f"{v:g}" for v in (self.rate,) if v is not None))
        of_seed = "" if self.seed is None else f", seed {self.seed}"
        return " ".join(part for part in parts if part) + of_seed


@dataclass(frozen=True)
class Result:
    """Of a job. status: DONE, STOPPED (time was up; what it had done is kept) or FAILED. why: the error. value: a
    candidate's figure."""

    job: Job
    status: str
    why: str = ""
    value: float | None = None


class Queue:
    """Which jobs can be started, best first.

    only, seeds: these variants and backbones alone; None: all. alone: costs are measured before all else.
    """

    def __init__(
        self, plan: Plan, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None, *, alone: bool = False
    ) -> None:
        self.plan, self.seeds, self.alone = plan, seeds, alone
        self.variants = [name for name in plan.variants if only is None or name in only]
        self.running: set[Job] = set()
        self.failed: dict[Job, str] = {}
        self.postponed: set[Job] = set()  # until another ends: beside all these memory was short
        self.tries: dict[Job, int] = {}
        self.prepared = False

    def ready(self) -> list[Job]:
        """Jobs that wait for nothing, that no one does yet and that have not failed, in order."""
        found: dict[Job, None] = {}
        for goal in self.goals():
            for job in self._towards(goal):
                found[job] = None
        waiting = self.postponed if self.running else set()
        return [job for job in found if job not in {*self.running, *self.failed, *waiting}]

    def goals(self) -> Iterator[Job]:
        """What is wanted, in order; outcomes of those backbones that are known to be used."""
        yield Job("costs")
        for seed in self.candidates():
            yield Job("backbone", seed)
        passed = self.passed()
        first = [name for name in self.variants if name in (self.plan.headline or self.variants)]
        rest = [name for name in self.variants if name not in first]
        for seed, name in [(s, n) for n in first for s in passed] + [(s, n) for s in passed for n in rest]:
            limit = self.plan.variants[name].backbones
            if (self.seeds is None or seed in self.seeds) and (limit is None or seed in passed[:limit]):
                yield Job("outcome", seed, name)

    def missing(self) -> list[Job]:
        """Outcomes that are wanted and not there."""
        return [job for job in self.goals() if job.kind == "outcome" and not self.done(job)]

    def passed(self) -> list[int]:
        """Backbones that are used: no more are started than are wanted, so all that pass are."""
        return [seed for seed in self.plan.seeds if self._judged(seed) is True]

    def candidates(self) -> list[int]:
        """Seeds of backbones that have still to be trained or judged, as many as are wanted."""
        unknown = [seed for seed in self.plan.seeds if self._judged(seed) is None]
        return unknown[: self.plan.backbones - len(self.passed())]

    def first(self) -> int:
        """The first seed that passes or, as long as that is open, the first that may."""
        return next(seed for seed in self.plan.seeds if self._judged(seed) is not False)

    def requirements(self, job: Job) -> list[Job]:
        """What must be done before; each of it once."""
        if job.kind == "prepare":
            return []
        if job.kind == "costs":
            return [Job("prepare")]
        if job.kind == "backbone":
            found = [Job("prepare")]
            if self.alone:
                found.append(Job("costs"))
            if self.plan.text is not None and job.seed != self.plan.seeds[0]:
                found.append(Job("backbone", self.plan.seeds[0]))  # which trains it for all
            return found
        entry = self.plan.variants[job.variant]
        found = [Job("prepare"), Job("backbone", job.seed)]
        if entry.learning_rate:
            found.append(Job("costs"))
        if entry.base is not None:
            found.append(Job("base", job.seed, entry.base))
        if job.kind != "rate" and len(entry.learning_rate) > 1:
            found += [Job("rate", self.first(), job.variant, rate) for rate in entry.learning_rate]
        if job.kind == "outcome" and any(self.plan.variants[name].base == job.variant for name in self.variants):
            found.append(Job("base", job.seed, job.variant))  # both would train it
        return found

    def done(self, job: Job) -> bool:
        """Told by its file."""
        plan = self.plan
        match job.kind:
            case "prepare":
                return self.prepared
            case "costs":
                path = plan.results / "costs.json"
                known = read(path)["variants"] if path.exists() else {}
                return all(name in known for name, entry in plan.variants.items() if entry.learning_rate)
            case "backbone":
                assert job.seed is not None
                trained = labs.backbone_directory(plan, job.seed) / "config.json"
                return self._judged(job.seed) is not None and trained.exists()
            case "rate":
                path = labs.rates_file(plan, job.variant)
                return path.exists() and f"{job.rate:g}" in read(path)
            case "base":
                assert job.seed is not None
                return labs.merged_directory(plan, job.seed, job.variant).exists()
        return (plan.results / f"{job.seed}-{job.variant}.json").exists()

    def finish(self, result: Result) -> None:
        """Take note of a job that has ended."""
        job = result.job
        self.running.discard(job)
        self.postponed.clear()
        if result.status == FAILED and result.why.startswith("OutOfMemoryError") and self.tries.get(job, 0) < _TRIES:
            self.tries[job] = self.tries.get(job, 0) + 1
            self.postponed.add(job)
        elif result.status == FAILED:
            self.failed[job] = result.why
        elif result.status == DONE and job.kind == "prepare":
            self.prepared = True
        elif result.status == DONE and job.kind == "rate":
            path = labs.rates_file(self.plan, job.variant)
            write(path, (read(path) if path.exists() else {}) | {f"{job.rate:g}": result.value})

    def _towards(self, job: Job) -> Iterator[Job]:
        if self.done(job):
            return
        missing = [needed for needed in self.requirements(job) if not self.done(needed)]
        for needed in missing:
            yield from self._towards(needed)
        if not missing:
            yield job

    def _judged(self, seed: int) -> bool | None:
        path = self.plan.results / f"backbone-{seed}.json"
        return bool(read(path)["passes"]) if path.exists() else None


def do(lab: Lab, job: Job) -> Result:
    """Do it here and now; whatever it raises is its result, but for an end that the user wants."""
    value = None
    try:
        if job.kind == "prepare":
            lab.prepare()
            labs.problems(lab)
        elif job.kind == "costs":
            labs.costs(lab)
        else:
            assert job.seed is not None
            if job.kind == "backbone":
                labs.judged(lab, job.seed)
            elif job.kind == "rate":
                assert job.rate is not None
                value = labs.rate_score(lab, job.seed, job.variant, job.rate)
            elif job.kind == "base":
                labs.merged(lab, job.seed, job.variant)
            else:
                labs.outcome(lab, job.seed, job.variant)
    except OutOfTimeError:
        return Result(job, STOPPED)
    except Exception as error:  # of one job; the others go on
        traceback.print_exc()
        return Result(job, FAILED, f"{type(error).__name__}: {error}")
    return Result(job, DONE, value=value)


def run(queue: Queue, make_lab: Callable[[Plan], Lab], jobs: int = 1, until: float | None = None) -> list[str]:
    """Do all that can be done; returns a sentence per failure.

    make_lab: of the plan, at the top of a module; called once in every process. jobs: at a time; with one, everything
    happens in this process. until: `time.time()` from which nothing new is started, and at which trainings save
    and end.
    """
    end = _one_by_one if jobs == 1 else _side_by_side
    end(queue, make_lab, jobs, until)
    problems = [f"{job}: {why}" for job, why in queue.failed.items()]
    if not problems and not _over(until) and len(queue.passed()) < queue.plan.backbones:
        plan = queue.plan
        problems.append(
            f"{plan.name}: {len(queue.passed())} of {len(plan.seeds)} backbones pass, but {plan.backbones} are wanted: "
            "give more seeds, or train backbones for longer"
        )
    return problems


def _one_by_one(queue: Queue, make_lab: Callable[[Plan], Lab], jobs: int, until: float | None) -> None:
    lab: Lab | None = None
    while not _over(until) and (ready := queue.ready()):
        if lab is None:
            lab = make_lab(queue.plan)
            lab.until = until
        queue.finish(do(lab, ready[0]))


def _side_by_side(queue: Queue, make_lab: Callable[[Plan], Lab], jobs: int, until: float | None) -> None:
    context = multiprocessing.get_context("spawn")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    workers = [_Worker(context, queue.plan, make_lab, until) for _ in range(jobs)]
    began = time.time()
    try:
        while True:
            idle = [worker for worker in workers if worker.job is None]
            for worker, job in zip(idle, [] if _over(until) else queue.ready(), strict=False):
                queue.running.add(job)
                worker.start(job)
                say(f"[{time.time() - began:.0f} s] {job}: started")
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                result = busy[pipe].result()  # type: ignore[index]
                queue.finish(result)
                say(f"[{time.time() - began:.0f} s] {result.job}: {result.status}")
    finally:
        for worker in workers:
            worker.end()
        signal.signal(signal.SIGTERM, before)


def _over(until: float | None) -> bool:
    return until is not None and time.time() >= until


class _Worker:
    """A process that does one job after the other and keeps its data; one that dies is replaced."""

    def __init__(self, context: SpawnContext, plan: Plan, make_lab: Callable[[Plan], Lab], until: float | None) -> None:
        self.context, self.arguments = context, (plan, make_lab, until)
        self.job: Job | None = None
        self._begin()

    def _begin(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process: SpawnProcess = self.context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, job: Job) -> None:
        if not self.process.is_alive():
            self._begin()
        self.job = job
        self.pipe.send(job)

    def result(self) -> Result:
        assert self.job is not None
        job, self.job = self.job, None
        try:
            found: Result = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self._begin()
            return Result(job, FAILED, f"its process ended with exit code {code}")
        return found

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _work(pipe: Any, plan: Plan, make_lab: Callable[[Plan], Lab], until: float | None) -> None:
    """A worker's whole life."""
    import torch

    from bottlenecked.cli import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us
    lab: Lab | None = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if lab is None:
            try:
                lab = make_lab(plan)
            except Exception as error:
                traceback.print_exc()
                pipe.send(Result(job, FAILED, f"{type(error).__name__}: {error}"))
                continue
            lab.until = until
        pipe.send(do(lab, job))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other processes
