"""The attention mass of every prior position: ours, and plain PyTorch where its attention weights fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks import checks
from benchmarks.cases.mass import plain
from benchmarks.gpu import peaks
from benchmarks.gpu.context import MIN_REPEATS, Context, attempt, attention_bytes, cache_bytes, key
from benchmarks.harness import OURS, Contender, Figure, figure
from benchmarks.inputs import Setting

# (shape, prior, step), the most telling first.
GRID = [
    (shape, prior, step)
    for step in (64, 32)
    for prior in (32768, 131072, 2048)
    for shape in ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b")
]
CHECKED = 4096  # by the float64 reference


def run(context: Context) -> Iterator[Figure]:
    for shape, prior, step in GRID[:2] if context.quick else sorted(GRID, key=lambda point: point[0]):
        setting = context.setting(shape, 1, prior, step, dim=32)
        if context.due("mass", setting, 2 * cache_bytes(setting) + 16 * attention_bytes(setting)):
            yield attempt("mass", setting, functools.partial(measure, context, setting))


@torch.no_grad()
def measure(context: Context, setting: Setting) -> Figure:
    inputs = context.inputs(setting)
    bound = inputs.bind()
    out = torch.empty(inputs.config.num_layers, setting.batch, setting.prior, device=context.device)
    target = out if context.on_gpu else out.numpy()

    def ours() -> None:
        inputs.mass(target, bound)

    ours()
    context.timer.synchronize()
    if setting.prior <= CHECKED:
        checks.reference_masses(inputs, out.cpu().numpy())
    checks.masses(inputs, "plain PyTorch's mass", plain(inputs).cpu(), out.cpu())
    contenders = {OURS: Contender(ours), "torch": Contender(lambda: plain(inputs))}
    times = context.timer.measure(contenders, repeats=max(context.repeats, MIN_REPEATS))
    made = figure("mass", setting.describe("d_p", "top_k", "threads"), times, key=key("mass", setting))
    made["host_s"] = context.timer.host_seconds(ours)
    return peaks.with_floor(made, peaks.mass_floor(context.rates, inputs.config, setting))
