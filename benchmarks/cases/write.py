"""float32 edits of selected positions into the cache: the stage of a rewrite, on one thread, against PyTorch.

Ours is what the rewrite itself reports of its stage, with the smallest Processor there is: it adds in float32 and
rounds once. PyTorch is given the new rows and only stores them, in the cache's dtype, so its work is the smaller one.
It finds the rows in the caches, as ours does: they are read just before, untimed.

index_copy   per sequence, as one writes it for one
scatter      torch.scatter_ over the whole batch
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import checks, floors
from benchmarks.cases.gather import gathered, selected, spread_out
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting

# cache [batch, num_kv_heads, T, head_dim], positions int64 [batch, n], rows [batch, num_kv_heads, n, head_dim]
Write = Callable[[Tensor, Tensor, Tensor], None]


def run(context: Context) -> Iterator[Figure]:
    for setting in context.settings(processor_dims=(32,), batches=(1, 8), threads=1):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    bound = inputs.bind()
    positions = selected(inputs, check=context.process == 0)
    bound.rewrite(inputs.events)
    new_keys = [gathered(k, p).float() for k, p in zip(inputs.keys, positions, strict=True)]
    new_values = [gathered(v, p).float() for v, p in zip(inputs.values, positions, strict=True)]
    after = inputs.snapshot()
    everything = [
        (cache, p, rows)
        for caches, new in ((inputs.keys, new_keys), (inputs.values, new_values))
        for cache, p, rows in zip(caches, positions, new, strict=True)
    ]

    def ours() -> float:
        return bound.rewrite(inputs.events).stage_seconds["write"]

    def by_torch(write: Write) -> float:
        for cache, p, rows in everything:
            gathered(cache, p).sum()
            rows.sum()
        start = time.perf_counter()
        for cache, p, rows in everything:
            write(cache, p, rows.to(cache.dtype))
        return time.perf_counter() - start

    contenders = {OURS: Contender(ours, inputs.restore)}
    for name, function in {"index_copy": index_copied, "scatter": scattered}.items():
        inputs.restore()
        by_torch(function)
        for (cache, _, _), expected in zip(everything, [*after[0], *after[1]], strict=True):
            if not torch.equal(cache, expected):
                checks.refuse(setting, f"ours wrote other rows than {name}")
        contenders[name] = Contender(functools.partial(by_torch, function), inputs.restore)
    times = context.measure(contenders, threads=1)
    work = floors.write(inputs.config, setting.dtype, setting.batch * setting.rows)
    return with_floor(figure("write", setting.describe("d_p"), times), work, context.peaks(1))


def index_copied(cache: Tensor, positions: Tensor, rows: Tensor) -> None:
    for of, where, new in zip(cache, positions, rows, strict=True):
        of.index_copy_(1, where, new)


def scattered(cache: Tensor, positions: Tensor, rows: Tensor) -> None:
    cache.scatter_(2, spread_out(positions, cache), rows)
