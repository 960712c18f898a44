"""Every product of a Processor's layer, over all layers: ours against torch.matmul (oneDNN) on as many threads.

PyTorch gets its best: weights and activations in the same dtype beforehand, an output buffer, and the better of one
batched product and a loop over layers. Ours takes float32 activations and, with bfloat16 weights, rounds them itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import torch

import bottleneck_ext
from benchmarks import checks, floors
from benchmarks.harness import OURS, Contender, Context, Figure, figure, say, with_floor
from benchmarks.inputs import DTYPES, SEED, Setting

ROWS = (1, 16, 64, 512)
ONLY_IN_FIRST_SHAPE = ("qkv", "o", "gate_up", "down")  # backbones differ in them by their number of layers only


def run(context: Context) -> Iterator[Figure]:
    seen: set[tuple[str, int, str]] = set()
    shapes = ("smollm2", "qwen3-0.6b", "llama-3.2-1b")
    settings = context.settings(shapes=shapes, processor_dims=(128, 512), batches=(1,), priors=(1,))
    for setting in settings:
        if setting.dtype == "float16":
            say("  float16 is left out: our weights are float32 or bfloat16")
            continue
        config = setting.backbone.processor_config(setting.processor_dim, setting.top_k, setting.step)
        for product, (in_dim, out_dim) in floors.products_of(config).items():
            key = (product, setting.processor_dim, setting.dtype)
            if product in ONLY_IN_FIRST_SHAPE and key in seen:
                continue
            seen.add(key)
            shape = (setting.backbone.num_layers, out_dim, in_dim)
            weight = np.random.default_rng(SEED).standard_normal(shape, np.float32) * np.float32(in_dim**-0.5)
            for rows in (3, 16) if context.options.quick else ROWS:
                yield measure(context, setting, product, weight, rows)


def measure(context: Context, setting: Setting, product: str, weight: np.ndarray, rows: int) -> Figure:
    """weight float32 [num_layers, out_dim, in_dim]."""
    dtype = DTYPES[setting.dtype]
    num_layers, out_dim, in_dim = weight.shape
    x = np.random.default_rng(SEED + 1).standard_normal((num_layers, rows, in_dim), np.float32)
    out = np.empty((num_layers, rows, out_dim), np.float32)
    linear = bottleneck_ext.Linear(weight, weight_dtype=setting.dtype)
    workspace = bottleneck_ext.Workspace(setting.threads)

    torch_weight = torch.from_numpy(weight).to(dtype).transpose(1, 2)
    torch_x = torch.from_numpy(x).to(dtype)
    torch_out = torch.empty(num_layers, rows, out_dim, dtype=dtype)

    def ours() -> None:
        linear.apply(x, out, workspace=workspace)

    def bmm() -> None:
        torch.bmm(torch_x, torch_weight, out=torch_out)

    def loop() -> None:
        for layer in range(num_layers):
            torch.mm(torch_x[layer], torch_weight[layer], out=torch_out[layer])

    if context.process == 0:
        ours()
        first = (torch_x[0].double() @ torch_weight[0].double()).float()
        where = f"gemm {product}, {rows} rows, {setting}"
        tolerance = 1e-5 if setting.dtype == "float32" else 1e-2
        checks.close(where, "our product of the first layer", torch.from_numpy(out[0]), first, tolerance)
        for baseline in (bmm, loop):
            baseline()
            checks.close(where, f"our product beside {baseline.__name__}", torch.from_numpy(out), torch_out, tolerance)

    calls = {OURS: ours, "bmm": bmm, "loop": loop}
    times = context.measure({name: Contender(call) for name, call in calls.items()}, threads=setting.threads)
    best = min(("bmm", "loop"), key=lambda name: statistics.median(times[name]))
    keys = {
        **setting.describe("batch", "prior", "step", "top_k"),
        "product": product,
        "rows": rows,
        "in_dim": in_dim,
        "out_dim": out_dim,
    }
    made = figure("gemm", keys, {OURS: times[OURS], "torch": times[best]}, torch_best=best)
    work = floors.linear(num_layers, rows, in_dim, out_dim, setting.dtype)
    return with_floor(made, work, context.peaks(setting.threads))
