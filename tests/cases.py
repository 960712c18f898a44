"""Random boundaries and query captures for parity tests and benchmarks: one description, any layout, any dtype.

The memory around and between the views is filled with NaN (sentinels): reading or writing it shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

import bottleneck_ext
from bottlenecked import BoundaryEvent, CacheProcessor, CacheProcessorConfig
from bottlenecked.checkpoint import initial_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("nhd", "hnd", "packed", "column_major", "strided")


@dataclass(frozen=True)
class Shape:
    """What a case is made of. lengths: per sequence (padding, prior + step tokens, step length)."""

    lengths: tuple[tuple[int, int, int], ...]
    num_layers: int = 2
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    processor_dim: int = 32
    processor_heads: int = 4
    processor_mlp_dim: int = 40
    top_k: int = 4
    recent_window: int = 16
    block_size: int | None = None  # None: a block per sequence
    page_size: int | None = None  # None: a ring of recent_window rows
    layout: str = "nhd"
    dtype: str = "float32"
    key_space: str = "rotated"
    seed: int = 0
    random_scale: float = 0.5


NAMED = {
    "long prior, paged": Shape(
        ((0, 4096, 96),), num_layers=1, head_dim=64, top_k=32, recent_window=96, block_size=16
    ),
    "long prior, contiguous": Shape(
        ((7, 4000, 30), (0, 3000, 256)), num_layers=1, head_dim=64, group=3, top_k=256, recent_window=256, layout="hnd"
    ),
    "k larger than the prior": Shape(((0, 20, 5),), top_k=32),
    "no prior": Shape(((0, 5, 5), (9, 1, 1)), top_k=8),
    "a step of one token": Shape(((0, 50, 1),), block_size=16),
    "longer than R": Shape(((0, 50, 40),), recent_window=8),
    "prompt shorter than R": Shape(((0, 3, 3),), recent_window=96),
    "consolidation only": Shape(((0, 50, 10),), top_k=0),
    "head_dim 128, group 4": Shape(((0, 300, 30),), head_dim=128, group=4, num_kv_heads=2, top_k=32),
    "odd head_dim": Shape(((0, 77, 9),), head_dim=7, num_kv_heads=3),
    "unrotated keys": Shape(
        ((11, 200, 30), (0, 90, 20)), head_dim=64, key_space="unrotated", top_k=32, recent_window=96
    ),
    "the paper's Processor": Shape(
        ((0, 200, 30),), num_layers=1, head_dim=64, num_kv_heads=3, group=3, processor_dim=512, processor_heads=16,
        processor_mlp_dim=2240, top_k=32, recent_window=96,
    ),
    # All that came before is recalled: no tie lets the values go unchecked. 34 keys in the Processor's second block.
    "longer than a block of keys": Shape(((0, 290, 256),), recent_window=256, top_k=48),
    # What the MLP holds is more than all else that a thread keeps: too little memory for it shows.
    "a wide MLP": Shape(((0, 60, 20),), processor_dim=8, processor_heads=2, processor_mlp_dim=8192),
}  # fmt: skip


@dataclass
class Case:
    shape: Shape
    config: CacheProcessorConfig
    weights: dict[str, np.ndarray]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: list[torch.Tensor]
    block_table: np.ndarray
    query_table: np.ndarray
    events: list[BoundaryEvent]
    pools: list[torch.Tensor] = field(default_factory=list)  # the memory behind the views

    def processor(self, backend: str = "cpu", weight_dtype: str = "float32") -> CacheProcessor:
        return CacheProcessor(self.config, self.weights, backend=backend, weight_dtype=weight_dtype)

    def attention_mass(self, backend: str = "cpu", num_threads: int = 2, softmax_scale: float = 0.0) -> np.ndarray:
        """[num_layers, num_events, longest prior], of bottleneck_ext.attention_mass."""
        longest = max(e.window_begin(self.shape.recent_window) - e.sequence_begin for e in self.events)
        out = np.full((self.shape.num_layers, len(self.events), longest), np.nan, np.float32)
        bottleneck_ext.attention_mass(
            bottleneck_ext.KVCache(self.keys, self.values),
            bottleneck_ext.QueryCache(self.queries, self.query_table),
            [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in self.events],
            self.block_table,
            out=out,
            workspace=bottleneck_ext.Workspace(num_threads, backend),
            recent_window=self.shape.recent_window,
            softmax_scale=softmax_scale,
        )
        return out

    def rewrite(self, processor: CacheProcessor, num_threads: int = 1):
        bound = processor.bind(
            self.keys,
            self.values,
            self.queries,
            workspace=processor.workspace(num_threads),
            query_table=self.query_table,
        )
        return bound.rewrite(self.events, self.block_table)

    def snapshot(self) -> list[torch.Tensor]:
        """Every byte behind the caches, sentinels included."""
        return [pool.clone() for pool in self.pools]


def _cache_views(shape: Shape, num_blocks: int, block_size: int, generator: torch.Generator, pools: list):
    """Key and value views [num_blocks, block_size, num_kv_heads, head_dim] of one layer, in a layout."""
    n, b, h, d = num_blocks, block_size, shape.num_kv_heads, shape.head_dim
    dtype = DTYPES[shape.dtype]

    def pool(*size: int) -> torch.Tensor:
        memory = torch.full(size, float("nan"), dtype=dtype)
        pools.append(memory)
        return memory

    if shape.layout == "nhd":
        key, value = pool(n, b, h, d), pool(n, b, h, d)
    elif shape.layout == "hnd":
        key, value = pool(n, h, b, d).transpose(1, 2), pool(n, h, b, d).transpose(1, 2)
    elif shape.layout == "packed":  # rows K | V, a gap behind them
        rows = pool(n, b, h, 2 * d + 3)
        key, value = rows[..., :d], rows[..., d : 2 * d]
    elif shape.layout == "column_major":  # keys [head_dim, block_size], as vLLM's CPU backend keeps them
        both = pool(n, h, 2 * d * b)
        key = both[..., : d * b].unflatten(-1, (d, b)).permute(0, 3, 1, 2)
        value = both[..., d * b :].unflatten(-1, (b, d)).permute(0, 2, 1, 3)
    else:  # every other element, odd gaps
        key = pool(n, b, h + 1, 2 * d + 1)[:, :, :h, 1::2][..., :d]
        value = pool(n + 1, b, h, 2 * d)[1:, :, :, ::2]
    for view in (key, value):
        view.copy_(torch.randn(view.shape, generator=generator))
    return key, value


def make_case(shape: Shape) -> Case:
    generator = torch.Generator().manual_seed(shape.seed)
    rng = np.random.default_rng(shape.seed)
    config = CacheProcessorConfig(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        num_query_heads=shape.num_kv_heads * shape.group,
        head_dim=shape.head_dim,
        processor_dim=shape.processor_dim,
        processor_heads=shape.processor_heads,
        processor_mlp_dim=shape.processor_mlp_dim,
        top_k=shape.top_k,
        recent_window=shape.recent_window,
        key_space=shape.key_space,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    weights = initial_weights(config, random_scale=shape.random_scale, seed=shape.seed)
    for name, weight in weights.items():  # initial biases are 0 and norms 1: they would hide mistakes
        if name.endswith(("bias", "norm.weight")):
            weight += rng.normal(0, 0.1, weight.shape).astype(np.float32)
        elif name.endswith("proj.weight") and "out_proj" not in name:
            weight += rng.normal(0, 0.5 / np.sqrt(weight.shape[1]), weight.shape).astype(np.float32)

    num_sequences = len(shape.lengths) + 1  # the last one takes no part
    ends = [padding + tokens for padding, tokens, _ in shape.lengths]
    if shape.block_size is None:
        block_size = max(ends)
        block_table = np.arange(num_sequences, dtype=np.int32)[:, None]
        num_blocks = num_sequences
    else:
        block_size = shape.block_size
        max_blocks = -(-max(ends) // block_size)
        num_blocks = num_sequences * max_blocks + 3
        order = rng.permutation(num_blocks)[: num_sequences * max_blocks]
        block_table = order.reshape(num_sequences, max_blocks).astype(np.int32)
        for s, end in enumerate(ends):  # entries behind the end are never looked at
            block_table[s, -(-end // block_size) :] = -1
    page_size = shape.page_size or shape.recent_window
    pages = 1 if shape.page_size is None else -(-shape.recent_window // page_size) + 1
    query_table = rng.permutation(num_sequences * pages).reshape(num_sequences, pages).astype(np.int32)

    keys, values, queries, pools = [], [], [], []
    for _ in range(shape.num_layers):
        key, value = _cache_views(shape, num_blocks, block_size, generator, pools)
        keys.append(key)
        values.append(value)
        query = torch.randn(
            num_sequences * pages, page_size, config.num_query_heads, shape.head_dim, generator=generator
        )
        queries.append(query.to(DTYPES[shape.dtype]))
    events = [
        BoundaryEvent(sequence=s, step_begin=end - step, step_end=end, sequence_begin=padding)
        for s, (end, (padding, _, step)) in enumerate(zip(ends, shape.lengths, strict=True))
    ]
    # NaN wherever nothing may be read: padding, positions to come, blocks of nobody, queries before the window.
    cached = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    captured = torch.zeros(num_sequences * pages, page_size, dtype=torch.bool)
    for s, event in enumerate(events):
        seen = np.arange(event.sequence_begin, event.step_end)
        cached.numpy()[block_table[s, seen // block_size], seen % block_size] = True
        window = np.arange(max(event.step_begin, event.step_end - shape.recent_window), event.step_end)
        captured.numpy()[query_table[s, window // page_size % pages], window % page_size] = True
        block_table[s, : event.sequence_begin // block_size] = -1  # padding needs no block
    for view in (*keys, *values):
        view[~cached] = float("nan")
    for view in queries:
        view[~captured] = float("nan")
    return Case(shape, config, weights, keys, values, queries, block_table, query_table, events, pools)


# --- query capture ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptureShape:
    """What a query capture is made of. layout: of the pages, of LAYOUTS; query_layout: "plain", "strided" or "qkv".

    padding: tokens without a slot, behind the others; missing: whether some slots and pages do not exist, which only
    devices skip.
    """

    num_tokens: int
    heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    num_blocks: int = 7
    num_pages: int = 5
    num_layers: int = 2
    padding: int = 0
    layout: str = "nhd"
    query_layout: str = "plain"
    strided_tables: bool = False
    missing: bool = False
    dtype: str = "float32"
    seed: int = 0


@dataclass
class Capture:
    """queries: per layer [num_tokens + padding, heads, head_dim]; pages: per layer [num_pages, page_size, heads,
    head_dim], views into pools; slots int64 [num_tokens], block_to_page int32 [num_blocks]."""

    shape: CaptureShape
    queries: list[torch.Tensor]
    slots: torch.Tensor
    block_to_page: torch.Tensor
    pages: list[torch.Tensor]
    pools: list[torch.Tensor]

    def to(self, device: str) -> Capture:
        """The same bytes in another device's memory, gaps included, at the same strides."""
        pools = [pool.to(device) for pool in self.pools]
        moved = {pool.untyped_storage().data_ptr(): to for pool, to in zip(self.pools, pools, strict=True)}

        def view(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() == 0:
                return tensor.to(device)
            pool = moved[tensor.untyped_storage().data_ptr()]
            return pool.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        queries, pages = [view(q) for q in self.queries], [view(p) for p in self.pages]
        return Capture(self.shape, queries, view(self.slots), view(self.block_to_page), pages, pools)

    def same_bytes(self, other: Capture) -> bool:
        """Wherever the two are, gaps included."""
        pairs = [(a.cpu(), b.cpu()) for a, b in zip(self.pools, other.pools, strict=True) if a.numel() > 0]
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def make_capture(shape: CaptureShape) -> Capture:
    """Tokens in random order to random rows; a fifth of them without a slot, the blocks behind num_pages without a
    page."""
    generator = torch.Generator().manual_seed(shape.seed)
    rng = np.random.default_rng(shape.seed)
    dtype = DTYPES[shape.dtype]
    pools: list[torch.Tensor] = []

    def pool(memory: torch.Tensor) -> torch.Tensor:
        pools.append(memory)
        return memory

    queries, pages = [], []
    for _ in range(shape.num_layers):
        size = (shape.num_tokens + shape.padding, shape.heads, shape.head_dim)
        if shape.query_layout == "qkv":  # a slice of the projections of queries, keys and values together
            width = shape.heads * shape.head_dim
            wide = pool(torch.randn(size[0], width + 2 * shape.head_dim, generator=generator).to(dtype))
            queries.append(wide[:, :width].unflatten(1, size[1:]))
        elif shape.query_layout == "strided":
            queries.append(pool(torch.randn(*size[:2], 2 * size[2] + 1, generator=generator).to(dtype))[..., 1::2])
        else:
            queries.append(pool(torch.randn(size, generator=generator).to(dtype)))
        of_cache = Shape((), num_kv_heads=shape.heads, head_dim=shape.head_dim, layout=shape.layout, dtype=shape.dtype)
        pages.append(_cache_views(of_cache, shape.num_pages, shape.page_size, generator, pools)[0])

    def table(numbers: np.ndarray) -> torch.Tensor:
        if not shape.strided_tables:
            return pool(torch.from_numpy(numbers))
        return pool(torch.from_numpy(np.stack([numbers, np.zeros_like(numbers)], axis=1)))[:, 0]

    rows = shape.num_blocks * shape.page_size
    slots = rng.permutation(rows)[: shape.num_tokens].astype(np.int64)
    skipped = -1 - rng.integers(0, 2 * shape.page_size, len(slots))
    slots = np.where(rng.random(len(slots)) < 0.2, skipped, slots)
    block_to_page = np.full(shape.num_blocks, -1, np.int32)
    with_page = rng.permutation(shape.num_blocks)[: shape.num_pages]
    block_to_page[with_page] = rng.permutation(shape.num_pages)[: len(with_page)]
    if shape.missing:
        behind = rows + rng.integers(0, 1 << 40, len(slots))
        slots = np.where(rng.random(len(slots)) < 0.2, behind, slots)
        block_to_page[(block_to_page < 0) & (rng.random(shape.num_blocks) < 0.5)] = shape.num_pages
    return Capture(shape, queries, table(slots), table(block_to_page), pages, pools)
