"""The k largest masses of every layer and sequence, ascending: ours against torch.topk and a sort, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import bottleneck_ext
from benchmarks import checks, floors
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import SEED, Setting


def run(context: Context) -> Iterator[Figure]:
    for setting in context.settings(dtypes=("float32",), batches=(1, 8), priors=(256, 1024, 4096), threads=1):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    rows, k = setting.backbone.num_layers * setting.batch, min(setting.top_k, setting.prior)
    mass = np.random.default_rng(SEED).random((rows, setting.prior), np.float32)
    lengths = np.full(rows, setting.prior)
    out = np.empty((rows, k), np.int64)
    torch_mass = torch.from_numpy(mass)

    def ours() -> None:
        bottleneck_ext.select_top_k(mass, lengths, out)

    def by_torch() -> torch.Tensor:
        return torch_mass.topk(k, sorted=False).indices.sort().values

    ours()
    expected = by_torch().numpy()
    if not np.array_equal(np.take_along_axis(mass, out, 1), np.take_along_axis(mass, expected, 1)):  # ties may differ
        checks.refuse(setting, f"top_k differs from torch in rows {np.flatnonzero((out != expected).any(1)).tolist()}")
    times = context.measure({OURS: Contender(ours), "torch": Contender(by_torch)}, threads=1)
    keys = setting.describe("d_p", "dtype", "step")
    return with_floor(figure("top_k", keys, times), floors.top_k(rows, setting.prior, k), context.peaks(1))
