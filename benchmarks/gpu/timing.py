"""Times of asynchronous calls on a GPU, and the same interface on a CPU for trying the benchmarks out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness import Contender, rotated

Call = Callable[[], object]

FLUSH_BYTES = 256 << 20  # five times an H100's last-level cache
MOST_CALLS = 10  # of one contender in one repeat
REPEAT_SECONDS = 0.05  # of one contender, about


@dataclass
class Timer:
    """device: "cpu", or a GPU as "cuda:0"."""

    device: str
    _flush: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.int8, device=self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call, calls: int, *, flush: bool = True) -> list[float]:
        """Of each of `calls` calls, one after the other, not waited for in between.

        flush: the last-level cache is overwritten before each. Events bracket the call alone.
        """
        if not self.on_gpu:
            times = []
            for _ in range(calls):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            return times
        events = [(_event(), _event()) for _ in range(calls)]
        self.synchronize()
        for begin_event, end_event in events:
            if flush:
                self._flush.zero_()
            begin_event.record()
            call()
            end_event.record()
        self.synchronize()
        return [begin_event.elapsed_time(end_event) * 1e-3 for begin_event, end_event in events]

    def host_seconds(self, call: Call, calls: int = 10) -> float:
        """The host's time to issue one call to an idle device, which need not be done with it then: the median."""
        times = []
        for _ in range(calls):
            self.synchronize()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        self.synchronize()
        return statistics.median(times)

    @torch.no_grad()
    def measure(
        self, contenders: Mapping[str, Contender], *, repeats: int, flush: bool = True, warm_up: int = 2
    ) -> dict[str, list[float]]:
        """Seconds of one call of every contender, by repeat: its median there. Order rotates; see harness.measure."""
        calls = {}
        for name, contender in contenders.items():
            for _ in range(warm_up):
                contender.prepare()
                contender.call()
            contender.prepare()
            once = min(self.seconds(contender.call, 2, flush=flush))
            calls[name] = max(2, min(MOST_CALLS, int(REPEAT_SECONDS / max(once, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(repeats):
            for name in rotated(list(contenders), repeat):
                contenders[name].prepare()
                times[name].append(statistics.median(self.seconds(contenders[name].call, calls[name], flush=flush)))
        return times


class Graph:
    """call, captured in a CUDA graph after warming up on another stream; without a GPU just called.

    Keeps call and what it returned, and so the memory that the graph works on: a workspace's too.
    """

    def __init__(self, call: Call, *, on_gpu: bool, warm_up: int = 2) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        if not on_gpu:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def replay(self) -> object:
        return self._call() if self._graph is None else self._graph.replay()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
