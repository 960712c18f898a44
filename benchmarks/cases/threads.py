"""A boundary of several sequences on one thread and on more: ours alone, interleaved. The ratio is the speed-up."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import boundary
from benchmarks.harness import OURS, Contender, Context, Figure, figure, say, with_floor
from benchmarks.inputs import Inputs, Setting


def run(context: Context) -> Iterator[Figure]:
    threads = max(2, context.options.threads)
    if threads > context.options.threads:
        say(f"  measured on {threads} threads where --threads is {context.options.threads}: mind the cores")
    for setting in context.settings(processor_dims=(128,), batches=(8,), threads=threads):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    one = inputs.processor.workspace(1)
    if context.process == 0:
        boundary.check(inputs, {OURS: inputs.rewrite, "1 thread": lambda: inputs.rewrite(one)})
    contenders = {
        OURS: Contender(inputs.rewrite, inputs.restore),
        "1_thread": Contender(lambda: inputs.rewrite(one), inputs.restore),
    }
    times = context.measure(contenders, threads=setting.threads)
    made = figure("threads", setting.describe(), times)
    return with_floor(made, boundary.work(inputs), context.peaks(setting.threads))
