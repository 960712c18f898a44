"""The rows of selected positions, from the cache to float32: the stage of a rewrite, on one thread, against PyTorch.

Ours is what the rewrite itself reports of its stage, with the smallest Processor there is. There, the mass has just
read a layer's keys, so PyTorch gets them freshly read too, layer by layer, and only its copying is timed.

index_select   per sequence, as one writes it for one
gather         torch.gather over the whole batch
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import checks, floors
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting

# keys or values [batch, num_kv_heads, T, head_dim], positions int64 [batch, n] -> [batch, num_kv_heads, n, head_dim]
Gather = Callable[[Tensor, Tensor], Tensor]


def run(context: Context) -> Iterator[Figure]:
    for setting in context.settings(processor_dims=(32,), batches=(1, 8), threads=1):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    bound = inputs.bind()
    positions = selected(inputs, check=context.process == 0)

    def ours() -> float:
        return bound.rewrite(inputs.events).stage_seconds["gather"]

    def by_torch(gather: Gather) -> float:
        seconds = 0.0
        for keys, values, rows in zip(inputs.keys, inputs.values, positions, strict=True):
            keys.sum()
            start = time.perf_counter()
            gather(keys, rows).float()
            gather(values, rows).float()
            seconds += time.perf_counter() - start
        return seconds

    if not torch.equal(gathered(inputs.keys[0], positions[0]), index_selected(inputs.keys[0], positions[0])):
        checks.refuse(setting, "the two gathers of PyTorch differ")
    contenders = {OURS: Contender(ours, inputs.restore)}
    for name, function in {"index_select": index_selected, "gather": gathered}.items():
        contenders[name] = Contender(functools.partial(by_torch, function), inputs.restore)
    times = context.measure(contenders, threads=1)
    work = floors.gather(inputs.config, setting.dtype, setting.batch * setting.rows)
    return with_floor(figure("gather", setting.describe("d_p"), times), work, context.peaks(1))


def selected(inputs: Inputs, *, check: bool) -> list[Tensor]:
    """Per layer the positions that ours rewrites, int64 [batch, n]. Leaves the caches restored.

    check: against the reference.
    """
    inputs.restore()
    mass = inputs.empty_mass()
    inputs.mass(mass, inputs.bind())
    recalled = inputs.rewrite()
    if check:
        checks.reference_rewrite(inputs, checks.Rewritten(recalled, *inputs.snapshot()), mass)
    inputs.restore()
    setting = inputs.setting
    window = torch.arange(setting.prior, setting.prior + setting.step).expand(setting.batch, -1)
    return [torch.cat([torch.from_numpy(of_layer), window], dim=1) for of_layer in recalled]


def index_selected(cache: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([of.index_select(1, rows) for of, rows in zip(cache, positions, strict=True)])


def gathered(cache: Tensor, positions: Tensor) -> Tensor:
    return cache.gather(2, spread_out(positions, cache))


def spread_out(positions: Tensor, cache: Tensor) -> Tensor:
    """positions [batch, n] as an index of torch.gather and scatter: [batch, num_kv_heads, n, head_dim], no copy."""
    return positions[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
