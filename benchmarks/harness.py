"""Measuring: every implementation once per repeat, in an order that rotates, in each of several processes.

A busy moment of the machine then hits all of them, and a ratio is taken within each repeat, where it is steadier than
any of its two times. What a process decides once (where its memory lies, how its threads were started) its repeats do
not show: processes.py measures in several and keeps the range of their medians. Before each call its inputs are
restored and the caches are scrubbed, as the backbone's forward would between two boundaries; the scrubbing also gives
the threads of one implementation time to fall asleep before the next one is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks import floors, machine
from benchmarks.inputs import Setting
from benchmarks.options import Options

T = TypeVar("T")
Figure = dict[str, Any]

OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """An implementation to measure.

    call: does the work. Where it returns a float, these are the seconds that count; else all of the call counts.
    prepare: before each call, not measured.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Context:
    """What a case runs with: options, the machine's rates by number of threads, memory to scrub the caches with.

    process: which of the processes this is, from 0: the order of contenders begins elsewhere in each, and what is
        expensive to check is checked in the first, as all have the same inputs and code.
    """

    options: Options
    measured: dict[int, floors.Peaks] = field(default_factory=dict)
    process: int = 0
    _left_out: set[str] = field(default_factory=set)
    _scratch: np.ndarray = field(default_factory=lambda: np.zeros(2 * machine.last_level_cache() // 8))

    def peaks(self, threads: int) -> floors.Peaks:
        """Measured once per number of threads."""
        if threads not in self.measured:
            self.measured[threads] = floors.measure_peaks(threads)
        return self.measured[threads]

    def settings(
        self,
        *,
        processor_dims: Sequence[int] = (512,),
        dtypes: Sequence[str] = ("float32", "bfloat16"),
        batches: Sequence[int] = (1,),
        priors: Sequence[int] = (1024,),
        shapes: Sequence[str] = ("smollm2",),
        threads: int | None = None,
    ) -> Iterator[Setting]:
        """A case's grid: what the options name, and where they name nothing, the case's own choice.

        Where PyTorch has no bfloat16 product for this processor, its loop takes 10 to 70 times as long as ours and
        nobody would decode with it: float32 takes bfloat16's place, unless asked for.
        """
        options = self.options
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes = list(dict.fromkeys("float32" if dtype == "bfloat16" else dtype for dtype in dtypes))
        if options.quick:
            processor_dims, dtypes, batches, priors, shapes = (32,), ("float32",), (2,), (40,), ("tiny",)
        for shape in options.shape or shapes:
            for dim in options.processor_dim or processor_dims:
                for dtype in options.dtype or dtypes:
                    for batch in options.batch or batches:
                        for prior in options.prior or priors:
                            yield Setting(
                                shape, dim, dtype, batch, prior, options.step, options.top_k, threads or options.threads
                            )

    def scrub(self) -> None:
        """Writes more than the last-level cache holds."""
        np.add(self._scratch, 1.0, out=self._scratch)

    def optional(self, names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
        """make(name) of every baseline whose library is installed; says once which are not."""
        made = {}
        for name in names:
            try:
                made[name] = make(name)
            except ImportError as error:
                if name not in self._left_out:
                    say(f"  {name} is left out: {error}")
                self._left_out.add(name)
        return made

    @torch.no_grad()
    def measure(
        self, contenders: Mapping[str, Contender], *, threads: int, scrub: bool = True, warm_up: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of every contender, by repeat. torch runs on `threads` threads; ours were told theirs.

        warm_up: one round is not counted. Repeats end at --repeats, or after the first that ends beyond --seconds.
        """
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(-1 if warm_up else 0, self.options.repeats):
            if repeat == 0:
                began = time.perf_counter()
            if repeat > 0 and time.perf_counter() - began > self.options.seconds:
                break
            for name in rotated(list(contenders), repeat + self.process):
                contender = contenders[name]
                contender.prepare()
                if scrub:
                    self.scrub()
                start = time.perf_counter()
                counted = contender.call()
                seconds = time.perf_counter() - start
                if repeat >= 0:
                    times[name].append(counted if isinstance(counted, float) else seconds)
        return times


def figure(case: str, keys: Mapping[str, Any], times: Mapping[str, Sequence[float]], **more: Any) -> Figure:
    """One line of a result. times: seconds by repeat, of OURS and of every baseline; more: further keys."""
    ours = times[OURS]
    baselines = {name: seconds for name, seconds in times.items() if name != OURS}
    ratios = {name: [b / o for b, o in zip(s, ours, strict=True)] for name, s in baselines.items()}
    made: Figure = {
        "case": case,
        **keys,
        "median_s": statistics.median(ours),
        "min_s": min(ours),
        "max_s": max(ours),
        "spread": spread(ours),
        "repeats": len(ours),
    }
    if baselines:
        made["baselines"] = {name: statistics.median(seconds) for name, seconds in baselines.items()}
        made["ratios"] = {name: statistics.median(values) for name, values in ratios.items()}
        made["ratio_spread"] = {name: spread(values) for name, values in ratios.items()}
    return made | more


def with_floor(made: Figure, work: floors.Work, peaks: floors.Peaks) -> Figure:
    """The figure with its floor; floor_fraction is floor over median: 1 would be at the floor."""
    floor = work.floor(peaks)
    return made | floor | {"floor_fraction": floor["floor_s"] / made["median_s"]}


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median; of a single value 0."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def rotated(items: list[T], by: int) -> list[T]:
    by %= len(items)
    return items[by:] + items[:by]


def say(text: str) -> None:
    """Progress: to standard error, which leaves standard output to the results."""
    print(text, file=sys.stderr, flush=True)
