"""One boundary call: selection, Processor and write, from captured queries to a rewritten cache.

ours              binds the tensors and rewrites, in one call
naive             the paper in eager PyTorch, attention weights materialised for the window's queries
naive_free        the same, given the attention weights for nothing: in an eager backbone they are there anyway
plain             our algorithm in PyTorch, a module per layer
stacked           the same with all layers in a few batched products: the strongest PyTorch we can write
..._compiled      under torch.compile

All start from the same cache, which is restored before each call, and leave the same one.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import checks, floors
from benchmarks.baselines.naive import Naive
from benchmarks.baselines.plain import Plain
from benchmarks.baselines.stacked import Stacked
from benchmarks.harness import OURS, Contender, Context, Figure, figure, say, with_floor
from benchmarks.inputs import DTYPES, Inputs, Setting

Call = Callable[[], npt.ArrayLike]  # a whole boundary: recalled positions [num_layers, batch, k]


def run(context: Context) -> Iterator[Figure]:
    for setting in grid(context):
        yield measure(context, setting)


def grid(context: Context) -> Iterator[Setting]:
    """smollm2 at two widths, dtypes and prior lengths, then in a batch; the larger shapes at one point each."""
    given = context.options
    yield from context.settings(processor_dims=(128, 512), priors=(256, 1024))
    if not (given.batch or given.quick):
        yield from context.settings(processor_dims=(128, 512), batches=(8,))
    if not (given.shape or given.quick):
        yield from context.settings(shapes=("qwen3-0.6b", "llama-3.2-1b"), dtypes=("bfloat16",))


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    calls = {OURS: inputs.rewrite} | baselines(inputs, compiled=compiled(context, setting))
    if context.process == 0:
        check(inputs, calls)
    times = context.measure(
        {name: Contender(call, inputs.restore) for name, call in calls.items()},
        threads=setting.threads,
    )
    stages = inputs.bind().rewrite(inputs.events).stage_seconds
    made = figure("boundary", setting.describe(), times, stage_share=shares(stages))
    return with_floor(made, work(inputs), context.peaks(setting.threads))


def compiled(context: Context, setting: Setting) -> bool:
    """Compiling costs up to a minute for each: one shape, batch and prior length stand for all, unless asked for."""
    if not context.options.compile:
        return False
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        say("  torch.compile is left out: it needs g++, or a C++ compiler named by CXX")
        return False
    asked_for = context.options.prior or context.options.shape
    return bool(asked_for) or (setting.shape, setting.prior, setting.batch) == ("smollm2", 1024, 1)


def baselines(inputs: Inputs, *, compiled: bool) -> dict[str, Call]:
    """Whole boundaries of every baseline, on the inputs' caches."""
    keys, values, queries, events = inputs.keys, inputs.values, inputs.queries, inputs.events
    dtype = DTYPES[inputs.setting.dtype]
    naive = Naive(inputs.config, inputs.weights, dtype)
    attention = naive.attention_weights(keys, queries, events)
    calls: dict[str, Call] = {
        "naive": lambda: naive.rewrite(keys, values, naive.attention_weights(keys, queries, events), events),
        "naive_free": functools.partial(naive.rewrite, keys, values, attention, events),
    }
    for suffix in ("", "_compiled") if compiled else ("",):
        kinds: dict[str, type[Plain | Stacked]] = {"plain": Plain, "stacked": Stacked}
        for name, kind in kinds.items():
            baseline = kind(inputs.config, inputs.weights, dtype, compiled=bool(suffix))
            calls[name + suffix] = functools.partial(baseline.rewrite, keys, values, queries, events)
    return calls


@torch.no_grad()
def check(inputs: Inputs, calls: dict[str, Call]) -> None:
    """Every implementation against ours, ours against the reference, on these inputs. Leaves the caches restored."""
    torch.set_num_threads(inputs.setting.threads)
    inputs.restore()
    mass = inputs.empty_mass()
    inputs.mass(mass, inputs.bind())

    def rewritten(call: Call) -> checks.Rewritten:
        inputs.restore()
        recalled = np.asarray(call())
        return checks.Rewritten(recalled, *inputs.snapshot())

    ours = rewritten(calls[OURS])
    checks.reference_rewrite(inputs, ours, mass)
    for name, call in calls.items():
        if name != OURS:
            if name.endswith("_compiled"):
                say(f"  compiling {name}")
            checks.same_rewrite(inputs, f"{name} and ours", ours, rewritten(call), mass)
    inputs.restore()


def work(inputs: Inputs) -> floors.Work:
    setting = inputs.setting
    return floors.boundary(
        inputs.config, setting.dtype, setting.weight_dtype, setting.batch, setting.prior, setting.step
    )


def shares(stages: dict[str, float]) -> dict[str, float]:
    """Each stage's share of the time in stages."""
    total = sum(stages.values())
    return {name: seconds / total for name, seconds in stages.items()}
