"""Keeping the queries of one engine step of vLLM: a call a layer, from the slots of its tokens to query pages.

ours    one kernel a layer, all layers of a step in one CUDA graph, as vLLM decodes
torch   the same rows moved by PyTorch: pages looked up, then index_copy_; in a CUDA graph too

batch: tokens of the step, of as many sequences when decoding; the largest is a chunk of a prompt. Queries are slices
of the projection of queries, keys and values together, as vLLM hands them over. floor: their bytes read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

import bottleneck_ext
from benchmarks import checks
from benchmarks.gpu.context import MIN_REPEATS, Context, attempt, key
from benchmarks.gpu.paged import BLOCK
from benchmarks.gpu.timing import Graph
from benchmarks.harness import OURS, Contender, Figure, figure
from benchmarks.inputs import DTYPES, SEED, Setting

GRID = [
    (shape, tokens) for shape in ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b") for tokens in (1, 16, 64, 256, 8192)
]


def run(context: Context) -> Iterator[Figure]:
    for shape, tokens in GRID[:2] if context.quick else GRID:
        setting = context.setting(shape, tokens, 0, 1, dim=32)
        if context.due("capture", setting, 1 << 30):
            yield attempt("capture", setting, functools.partial(measure, context, setting))


@torch.no_grad()
def measure(context: Context, setting: Setting) -> Figure:
    backbone, device, tokens = setting.backbone, context.device, setting.batch
    dtype, heads, dim = DTYPES[setting.dtype], backbone.num_query_heads, backbone.head_dim
    generator = torch.Generator(device).manual_seed(SEED)
    width = (heads + 2 * backbone.num_kv_heads) * dim
    layers = range(backbone.num_layers)
    projected = [torch.randn(tokens, width, generator=generator, device=device).to(dtype) for _ in layers]
    queries = [of_one[:, : heads * dim].unflatten(1, (heads, dim)) for of_one in projected]
    rng = np.random.default_rng(SEED)
    blocks = 2 * -(-tokens // BLOCK) + 1
    slots = torch.from_numpy(rng.permutation(blocks * BLOCK)[:tokens]).to(device)
    block_to_page = torch.from_numpy(rng.permutation(blocks).astype(np.int32)).to(device)
    pages = torch.zeros(len(layers), blocks, BLOCK, heads, dim, dtype=dtype, device=device)
    expected = torch.zeros_like(pages)
    store = bottleneck_ext.QueryCache(pages.unbind(), np.arange(blocks, dtype=np.int32)[None])
    workspace = bottleneck_ext.Workspace(1, "cpu" if device == "cpu" else device)

    def ours() -> None:
        for layer in layers:
            store.capture(layer, queries[layer], slots, block_to_page, workspace=workspace)

    def plain() -> None:
        for layer in layers:
            rows = block_to_page[slots // BLOCK] * BLOCK + slots % BLOCK
            expected[layer].flatten(0, 1).index_copy_(0, rows, queries[layer])

    ours()
    plain()
    context.timer.synchronize()
    if not torch.equal(pages, expected) or not expected.any():
        checks.refuse(setting, "the captured queries are not those that PyTorch moved")
    graphs: dict[str, Callable[[], object]] = {
        name: Graph(call, on_gpu=context.on_gpu).replay for name, call in ((OURS, ours), ("torch", plain))
    }
    contenders = {name: Contender(replay) for name, replay in graphs.items()}
    times = context.timer.measure(contenders, repeats=max(context.repeats, MIN_REPEATS))
    made = figure("capture", setting.describe("d_p", "prior", "step", "top_k", "threads"), times)
    made |= {"key": key("capture", setting), "host_s": context.timer.host_seconds(ours)}
    moved = 2 * len(layers) * tokens * heads * dim * torch.finfo(dtype).bits // 8 / context.rates.bandwidth
    return made | {"floor_s": moved, "floor_fraction": moved / made["median_s"], "floor": {"bound_by": "bytes"}}
