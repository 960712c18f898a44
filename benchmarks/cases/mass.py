"""Attention mass of every prior position: ours from captured queries, against plain PyTorch and kvpress.

kvpress scores positions by another formula (SnapKV's: it keeps KV heads apart) from the same queries and keys; it is
here because it is what people use to find positions that matter, not because its result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import checks, floors
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting, window_queries


def run(context: Context) -> Iterator[Figure]:
    shapes = ("smollm2", "qwen3-0.6b", "llama-3.2-1b")
    for setting in context.settings(shapes=shapes, processor_dims=(32,), batches=(1, 8), priors=(256, 1024, 4096)):
        if setting.batch * setting.prior > 1 << 13 and not context.options.prior:
            continue  # a batch of long caches takes gigabytes; --prior asks for it
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    bound, mass = inputs.bind(), inputs.empty_mass()

    def ours() -> None:
        inputs.mass(mass, bound)

    ours()
    checks.reference_masses(inputs, mass)
    checks.masses(inputs, "plain PyTorch's mass", plain(inputs.keys, inputs.queries, setting), torch.from_numpy(mass))
    contenders = {OURS: Contender(ours), "torch": Contender(lambda: plain(inputs.keys, inputs.queries, setting))}
    contenders |= context.optional(["kvpress"], lambda _: kvpress(inputs))
    times = context.measure(contenders, threads=setting.threads)
    work = floors.attention_mass(inputs.config, setting.dtype, setting.batch, setting.prior, setting.step)
    keys = setting.describe("d_p", "top_k")
    return with_floor(figure("mass", keys, times), work, context.peaks(setting.threads))


@torch.no_grad()
def plain(keys: Sequence[Tensor], queries: Sequence[Tensor], setting: Setting) -> Tensor:
    """The same in PyTorch, well written: [num_layers, batch, prior]. Heads of a group share their keys, uncopied."""
    future = torch.ones(setting.step, setting.prior + setting.step, dtype=torch.bool).triu(setting.prior + 1)
    result = []
    for k, q in zip(keys, window_queries(queries, setting), strict=True):
        batch, heads, end, dim = k.shape
        # [batch, KV heads, group * step, head_dim]
        rows = q.transpose(1, 2).unflatten(1, (heads, -1)).flatten(2, 3)
        scores = (rows @ k.transpose(2, 3)).view(batch, heads, -1, setting.step, end) * dim**-0.5
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        result.append(weights[..., : setting.prior].mean(dim=(1, 2, 3)))
    return torch.stack(result)


def kvpress(inputs: Inputs) -> Contender:
    from benchmarks.baselines.kvpress import KVPress

    press = KVPress(inputs.config)
    return Contender(lambda: press.score(inputs.keys, inputs.queries, inputs.events))
