"""Attention mass of every prior position: ours from captured queries, against plain PyTorch and kvpress.

kvpress scores positions by another formula (SnapKV's: it keeps KV heads apart) from the same queries and keys; it is
here because it is what people use to find positions that matter, not because its result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import checks, floors
from benchmarks.baselines.plain import attention_mass
from benchmarks.baselines.window import Window
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting


def run(context: Context) -> Iterator[Figure]:
    for setting in grid(context):
        yield measure(context, setting)


def grid(context: Context) -> Iterator[Setting]:
    """smollm2 at several lengths and in a batch; the larger shapes at one length. The Processor takes no part."""
    given = context.options
    yield from context.settings(processor_dims=(32,), priors=(256, 1024, 4096))
    if not (given.batch or given.quick):
        yield from context.settings(processor_dims=(32,), batches=(8,))
    if not (given.shape or given.quick):
        yield from context.settings(shapes=("qwen3-0.6b", "llama-3.2-1b"), processor_dims=(32,), priors=(4096,))


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    bound, mass = inputs.bind(), inputs.empty_mass()

    def ours() -> None:
        inputs.mass(mass, bound)

    if context.process == 0:
        ours()
        checks.reference_masses(inputs, mass)
        checks.masses(inputs, "plain PyTorch's mass", plain(inputs), torch.from_numpy(mass))
    contenders = {OURS: Contender(ours), "torch": Contender(lambda: plain(inputs))}
    contenders |= context.optional(["kvpress"], lambda _: kvpress(inputs))
    times = context.measure(contenders, threads=setting.threads)
    work = floors.attention_mass(inputs.config, setting.dtype, setting.batch, setting.prior, setting.step)
    keys = setting.describe("d_p", "top_k")
    return with_floor(figure("mass", keys, times), work, context.peaks(setting.threads))


def plain(inputs: Inputs) -> Tensor:
    """The same in PyTorch, well written: [num_layers, batch, prior]."""
    window = Window.of(inputs.events, inputs.config)
    layers = [
        attention_mass(window.queries(ring), keys, window.begin, window.future(keys.device))
        for keys, ring in zip(inputs.keys, inputs.queries, strict=True)
    ]
    return torch.stack(layers) / (inputs.config.num_query_heads * inputs.setting.step)


def kvpress(inputs: Inputs) -> Contender:
    from benchmarks.baselines.kvpress import KVPress

    press = KVPress(inputs.config)
    return Contender(lambda: press.score(inputs.keys, inputs.queries, inputs.events))
