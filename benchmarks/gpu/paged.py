"""One boundary on caches as vLLM keeps them on a GPU, against the same boundary on transformers' caches.

vLLM's default there: one allocation, physically [layer, block, token, head, key | value], so that a key's neighbours
are its value and the next head; blocks of 16 tokens, in an order that the block table tells; queries in pages of the
same size. Blocks of all sequences are dealt at random, as they are after some hours of serving.

ours         on those caches, by the block table
contiguous   ours on transformers' caches, which hold the same
ours_graph   as in the case `boundary`, on those caches
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import bottleneck_ext
from benchmarks import checks
from benchmarks.gpu import peaks
from benchmarks.gpu.context import MIN_REPEATS, Context, key, over
from benchmarks.gpu.timing import Graph
from benchmarks.harness import OURS, Contender, Figure, figure
from benchmarks.inputs import SEED, Inputs, Setting
from bottlenecked.integrations.vllm.scheduler import pages_per_row
from bottlenecked.processor import BoundCache

BLOCK = 16
GRID = [
    ("llama-3.2-1b", 1, 2048, 32),
    ("llama-3.2-1b", 16, 2048, 32),
    ("llama-3.2-1b", 64, 2048, 32),
    ("llama-3.1-8b", 16, 2048, 32),
    ("qwen3-0.6b", 16, 2048, 32),
    ("llama-3.2-1b", 1, 32768, 32),
]


def run(context: Context) -> Iterator[Figure]:
    yield from over(context, "paged", GRID[:2] if context.quick else GRID, functools.partial(measure, context))


class Pages:
    """The caches of `inputs` once more, in vLLM's layout.

    keys, values: per layer [num_blocks, BLOCK, num_kv_heads, head_dim], views of one allocation. block_table: int32
    [batch, blocks of a sequence].
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, config, setting = inputs, inputs.config, inputs.setting
        device, dtype = inputs.keys[0].device, inputs.keys[0].dtype
        rng = np.random.default_rng(SEED)
        blocks = -(-(setting.prior + setting.step) // BLOCK)
        self.block_table = rng.permutation(setting.batch * blocks).astype(np.int32).reshape(setting.batch, blocks)
        width = 2 * config.head_dim
        size = (config.num_layers, setting.batch * blocks, BLOCK, config.num_kv_heads, width)
        self.pool = torch.zeros(size, dtype=dtype, device=device)
        self.keys = list(self.pool[..., : config.head_dim].unbind())
        self.values = list(self.pool[..., config.head_dim :].unbind())
        self._blocks = torch.from_numpy(self.block_table).long().to(device)
        self.restore()

        pages = pages_per_row(config.recent_window, BLOCK)
        order = rng.permutation(setting.batch * pages).astype(np.int32)
        self.query_table = order.reshape(setting.batch, pages)
        heads = config.num_query_heads
        self.queries = torch.zeros(
            config.num_layers, setting.batch * pages, BLOCK, heads, config.head_dim, dtype=dtype, device=device
        )
        end = setting.prior + setting.step
        window = np.arange(end - setting.step, end)
        table = torch.from_numpy(self.query_table).long().to(device)
        at, row = (torch.from_numpy(x).to(device) for x in (window // BLOCK % pages, window % BLOCK))
        ring = torch.from_numpy(window % config.recent_window).to(device)
        for layer in range(config.num_layers):
            self.queries[layer][table[:, at], row] = inputs.queries[layer][:, ring]

    def restore(self) -> None:
        """The caches as they were before any rewrite."""
        for layer, (keys, values) in enumerate(
            zip(self.inputs.pristine_keys, self.inputs.pristine_values, strict=True)
        ):
            for pool, contiguous in ((self.keys[layer], keys), (self.values[layer], values)):
                tokens = contiguous.transpose(1, 2)
                padding = self._blocks.shape[1] * BLOCK - tokens.shape[1]
                padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, padding))
                pool[self._blocks.flatten()] = padded.reshape(-1, BLOCK, *padded.shape[2:])

    def contiguous(self, layers: list[Tensor]) -> list[Tensor]:
        """Per layer as the inputs' are: [batch, num_kv_heads, tokens, head_dim]."""
        end = self.inputs.setting.prior + self.inputs.setting.step
        return [layer[self._blocks].flatten(1, 2)[:, :end].transpose(1, 2) for layer in layers]

    def bind(self, workspace: bottleneck_ext.Workspace) -> BoundCache:
        """Our Processor on these caches."""
        return self.inputs.processor.bind(
            self.keys, self.values, self.queries.unbind(), workspace=workspace, query_table=self.query_table
        )


def measure(context: Context, setting: Setting) -> Figure:
    inputs = context.inputs(setting)
    pages = Pages(inputs)
    bound, plain = pages.bind(inputs.workspace), inputs.bind()
    check(pages, bound, plain)

    def call(of: BoundCache, table: np.ndarray | None) -> object:
        return of.rewrite(inputs.events, table, report=not context.on_gpu)

    contenders = {
        OURS: Contender(functools.partial(call, bound, pages.block_table), pages.restore),
        "contiguous": Contender(functools.partial(call, plain, None), inputs.restore),
    }
    if context.on_gpu:
        own = pages.bind(inputs.processor.workspace())
        graph = Graph(functools.partial(call, own, pages.block_table), on_gpu=True)
        contenders["ours_graph"] = Contender(graph.replay, pages.restore)
    times = context.timer.measure(contenders, repeats=max(context.repeats, MIN_REPEATS))
    made = figure("paged", setting.describe("threads"), times, key=key("paged", setting))
    made["host_s"] = context.timer.host_seconds(contenders[OURS].call)
    return peaks.with_floor(made, peaks.boundary_floor(context.rates, inputs.config, setting))


def check(pages: Pages, bound: BoundCache, plain: BoundCache) -> None:
    """Both layouts recall the same positions and hold the same afterwards, bit for bit."""
    inputs, setting = pages.inputs, pages.inputs.setting
    recalled = bound.rewrite(inputs.events, pages.block_table).recalled
    expected = plain.rewrite(inputs.events).recalled
    if not np.array_equal(recalled, expected):
        checks.refuse(setting, "on vLLM's layout other positions are recalled than on transformers'")
    for name, got, want in (
        ("keys", pages.contiguous(pages.keys), inputs.keys),
        ("values", pages.contiguous(pages.values), inputs.values),
    ):
        if not all(map(torch.equal, got, want)):
            checks.refuse(setting, f"{name} rewritten in vLLM's layout are not those rewritten in transformers'")
    if all(map(torch.equal, inputs.keys, inputs.pristine_keys)):
        checks.refuse(setting, "nothing was rewritten")
    pages.restore()
    inputs.restore()
