"""A batch of sequences made with NumPy alone: for processes in which torch would be slow to start, or in the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bottlenecked import BoundaryEvent, BoundCache, CacheProcessor, CacheProcessorConfig
from bottlenecked.checkpoint import initial_weights

BLOCK_SIZE, BLOCKS, RECENT_WINDOW = 8, 6, 16


@dataclass
class PlainCase:
    """keys, values: per layer [num_blocks, BLOCK_SIZE, 2, 16]; queries: [num_sequences, RECENT_WINDOW, 4, 16].

    block_table: [num_sequences, BLOCKS], of blocks in random order.
    """

    config: CacheProcessorConfig
    weights: dict[str, np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    queries: list[np.ndarray]
    block_table: np.ndarray
    events: list[BoundaryEvent]

    def processor(self) -> CacheProcessor:
        return CacheProcessor(self.config, self.weights, weight_dtype="float32")

    def bind(self, processor: CacheProcessor, num_threads: int = 1) -> BoundCache:
        workspace = processor.workspace(num_threads)
        return processor.bind(self.keys, self.values, self.queries, workspace=workspace)

    def rewrite(self, bound: BoundCache, sequences: tuple[int, ...] | None = None) -> None:
        chosen = self.events if sequences is None else [self.events[s] for s in sequences]
        bound.rewrite(chosen, self.block_table)

    def bytes(self, sequences: tuple[int, ...] | None = None) -> bytes:
        """Of all blocks, or of some sequences'."""
        blocks = slice(None) if sequences is None else self.block_table[list(sequences)].ravel()
        return b"".join(view[blocks].tobytes() for view in (*self.keys, *self.values))


def make_plain_case(num_sequences: int = 2, num_layers: int = 3, seed: int = 0) -> PlainCase:
    rng = np.random.default_rng(seed)
    config = CacheProcessorConfig(
        num_layers=num_layers, num_kv_heads=2, num_query_heads=4, head_dim=16, processor_dim=32, processor_heads=4,
        processor_mlp_dim=40, top_k=4, recent_window=RECENT_WINDOW,
    )  # fmt: skip
    num_blocks = num_sequences * BLOCKS + 2

    def normal(*shape: int) -> list[np.ndarray]:
        return [rng.standard_normal(shape, np.float32) for _ in range(num_layers)]

    ends = rng.integers(20, BLOCK_SIZE * BLOCKS + 1, num_sequences).tolist()
    return PlainCase(
        config,
        initial_weights(config, random_scale=0.5, seed=seed),
        normal(num_blocks, BLOCK_SIZE, 2, 16),
        normal(num_blocks, BLOCK_SIZE, 2, 16),
        normal(num_sequences, RECENT_WINDOW, 4, 16),
        rng.permutation(num_blocks)[: num_sequences * BLOCKS].reshape(num_sequences, BLOCKS).astype(np.int32),
        [BoundaryEvent(s, step_begin=end - int(rng.integers(1, 20)), step_end=end) for s, end in enumerate(ends)],
    )
