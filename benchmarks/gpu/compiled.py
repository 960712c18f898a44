"""One boundary beside PyTorch under torch.compile: see boundary.py. Compiling takes a minute for each point."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks.gpu import boundary
from benchmarks.gpu.context import Context, over
from benchmarks.harness import Figure

GRID = [("llama-3.2-1b", 1, 2048, 32), ("llama-3.2-1b", 16, 2048, 32)]


def run(context: Context) -> Iterator[Figure]:
    grid = GRID[:1] if context.quick else GRID
    yield from over(context, "compiled", grid, functools.partial(boundary.measure, context, "compiled"))
