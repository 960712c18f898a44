"""One boundary on caches as vLLM keeps them on a CPU, against the same boundary on transformers' caches.

There a block of a head has its keys as columns, so that a position's elements lie a block's length apart.

ours         on those caches, by the block table; blocks of 128 tokens, vLLM's default
contiguous   ours on transformers' caches, which hold the same

Both are bound once, as a server would, and recall and write the same, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks.cases import boundary
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting
from benchmarks.pages import Pages, check

BLOCK = 128


def run(context: Context) -> Iterator[Figure]:
    shapes = ("smollm2", "llama-3.2-1b")
    for setting in context.settings(processor_dims=(128,), batches=(1, 8), priors=(100,), shapes=shapes):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    pages = Pages(inputs, BLOCK, columns=True)
    bound, plain = pages.bind(inputs.workspace), inputs.bind()
    if context.process == 0:
        check(pages, bound, plain)
    rewrite = functools.partial(bound.rewrite, inputs.events, pages.block_table)
    times = context.measure(
        {
            OURS: Contender(rewrite, pages.restore),
            "contiguous": Contender(functools.partial(plain.rewrite, inputs.events), inputs.restore),
        },
        threads=setting.threads,
    )
    pages.restore()
    context.scrub()
    stages = rewrite().stage_seconds
    made = figure("paged", setting.describe(), times, stage_share=boundary.shares(stages))
    return with_floor(made, boundary.work(inputs), context.peaks(setting.threads))
