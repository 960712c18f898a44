"""One boundary on caches as vLLM keeps them on a GPU, against the same boundary on transformers' caches.

vLLM's default there: one allocation, physically [layer, block, token, head, key | value], so that a key's neighbours
are its value and the next head; blocks of 16 tokens, in an order that the block table tells; queries in pages of the
same size.

ours         on those caches, by the block table
contiguous   ours on transformers' caches, which hold the same
ours_graph   as in the case `boundary`, on those caches
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from benchmarks.gpu import peaks
from benchmarks.gpu.context import MIN_REPEATS, Context, key, over
from benchmarks.gpu.timing import Graph
from benchmarks.harness import OURS, Contender, Figure, figure
from benchmarks.inputs import Setting
from benchmarks.pages import Pages, check
from bottlenecked.processor import BoundCache

BLOCK = 16
GRID = [
    ("llama-3.2-1b", 1, 2048, 32),
    ("llama-3.2-1b", 16, 2048, 32),
    ("llama-3.2-1b", 64, 2048, 32),
    ("llama-3.1-8b", 16, 2048, 32),
    ("qwen3-0.6b", 16, 2048, 32),
    ("llama-3.2-1b", 1, 32768, 32),
]


def run(context: Context) -> Iterator[Figure]:
    yield from over(context, "paged", GRID[:2] if context.quick else GRID, functools.partial(measure, context))


def measure(context: Context, setting: Setting) -> Figure:
    inputs = context.inputs(setting)
    pages = Pages(inputs, BLOCK)
    bound, plain = pages.bind(inputs.workspace), inputs.bind()
    check(pages, bound, plain)

    def call(of: BoundCache, table: np.ndarray | None) -> object:
        return of.rewrite(inputs.events, table, report=not context.on_gpu)

    contenders = {
        OURS: Contender(functools.partial(call, bound, pages.block_table), pages.restore),
        "contiguous": Contender(functools.partial(call, plain, None), inputs.restore),
    }
    if context.on_gpu:
        own = pages.bind(inputs.processor.workspace())
        graph = Graph(functools.partial(call, own, pages.block_table), on_gpu=True)
        contenders["ours_graph"] = Contender(graph.replay, pages.restore)
    times = context.timer.measure(contenders, repeats=max(context.repeats, MIN_REPEATS))
    made = figure("paged", setting.describe("threads"), times, key=key("paged", setting))
    made["host_s"] = context.timer.host_seconds(contenders[OURS].call)
    return peaks.with_floor(made, peaks.boundary_floor(context.rates, inputs.config, setting))
