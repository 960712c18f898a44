"""The shapes that are measured, and random boundaries of them.

Not made by tests/cases.py, whose `make_case` is for finding mistakes: it fills all that must not be read with NaN in a
Python loop over positions (minutes at the sizes here), adds a sequence that takes no part and permutes the query
pages, which the baselines do not know. Here all sequences of a batch have one length, the layout is transformers'
and the same caches serve every implementation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bottleneck_ext
from bottlenecked.boundary import BoundaryEvent
from bottlenecked.checkpoint import Weights, initial_weights
from bottlenecked.config import CacheProcessorConfig
from bottlenecked.processor import BoundCache, CacheProcessor, WeightDtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEED = 0
PAPER_WINDOW = 96
RANDOM_SCALE = 0.5  # of the Processor's last matrix: edits well above the rounding of a bfloat16 cache


@dataclass(frozen=True)
class Backbone:
    """What of a language model decides the cost of a boundary. parameters: of the whole model; None: no such model."""

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_dim: int
    parameters: int | None = None

    def processor_config(self, processor_dim: int, top_k: int, step: int, **settings: Any) -> CacheProcessorConfig:
        """A Processor of this width with the paper's proportions: heads of 32, an MLP of 35/8 of the width.

        recent_window is the paper's 96, or the step where that is longer.
        """
        return CacheProcessorConfig(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            num_query_heads=self.num_query_heads,
            head_dim=self.head_dim,
            processor_dim=processor_dim,
            processor_heads=processor_dim // 32,
            processor_mlp_dim=processor_dim * 35 // 8,
            top_k=top_k,
            recent_window=max(PAPER_WINDOW, step),
            **settings,
        )


SHAPES = {
    "smollm2": Backbone(30, 3, 9, 64, parameters=134_515_008),
    "qwen3-0.6b": Backbone(28, 8, 16, 128, parameters=596_049_920),
    "llama-3.2-1b": Backbone(16, 8, 32, 64, parameters=1_235_814_400),
    "llama-3.1-8b": Backbone(32, 8, 32, 128, parameters=8_030_261_248),
    "tiny": Backbone(3, 2, 4, 16),  # for tests of the benchmarks
}


@dataclass(frozen=True)
class Setting:
    """One point of a case's grid. prior: positions before the step; step: tokens in it, all in the window."""

    shape: str
    processor_dim: int
    dtype: str
    batch: int
    prior: int
    step: int
    top_k: int
    threads: int

    @property
    def backbone(self) -> Backbone:
        return SHAPES[self.shape]

    @property
    def weight_dtype(self) -> WeightDtype:
        """Of our products: bfloat16 with a bfloat16 cache, as a user would choose, else float32."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def rows(self) -> int:
        """Rewritten positions of a sequence and layer."""
        return min(self.top_k, self.prior) + self.step

    def describe(self, *leave_out: str) -> dict[str, Any]:
        """The keys of a figure, without those that do not apply to its case."""
        keys = {
            "shape": self.shape,
            "d_p": self.processor_dim,
            "dtype": self.dtype,
            "batch": self.batch,
            "prior": self.prior,
            "step": self.step,
            "top_k": self.top_k,
            "threads": self.threads,
        }
        return {key: value for key, value in keys.items() if key not in leave_out}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.describe().items())


class Inputs:
    """Caches, captured queries and a Processor's weights of one setting, and our Processor on them.

    keys, values: per layer [batch, num_kv_heads, prior + step, head_dim], what implementations rewrite; `restore`
        brings back what they were.
    queries: per layer [batch, recent_window, num_query_heads, head_dim]; position p in row p % recent_window.
    events: the same step of every sequence.

    device: of all of it, and our backend. processor: ours, where one was made for this shape, width and top_k before.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        threads: int | None = None,
        device: str = "cpu",
        processor: CacheProcessor | None = None,
    ) -> None:
        self.setting = setting
        window = max(PAPER_WINDOW, setting.step)
        self.config, self.weights = _processor(setting.shape, setting.processor_dim, setting.top_k, window)
        config, end = self.config, setting.prior + setting.step
        generator = torch.Generator(device).manual_seed(SEED)
        dtype = DTYPES[setting.dtype]

        def random(heads: int, rows: int, *, ring: bool = False) -> Tensor:
            size = (setting.batch, rows, heads) if ring else (setting.batch, heads, rows)
            return torch.randn(*size, config.head_dim, generator=generator, device=device).to(dtype)

        layers = range(config.num_layers)
        self.pristine_keys = [random(config.num_kv_heads, end) for _ in layers]
        self.pristine_values = [random(config.num_kv_heads, end) for _ in layers]
        self.queries = [random(config.num_query_heads, config.recent_window, ring=True) for _ in layers]
        self.keys = [k.clone() for k in self.pristine_keys]
        self.values = [v.clone() for v in self.pristine_values]
        self.events = [BoundaryEvent(sequence=s, step_begin=setting.prior, step_end=end) for s in range(setting.batch)]
        self.processor = processor or CacheProcessor(
            config, self.weights, weight_dtype=setting.weight_dtype, backend=device
        )
        self.workspace = self.processor.workspace(threads or setting.threads)

    def restore(self) -> None:
        """The caches as they were before any rewrite."""
        for cache, pristine in ((self.keys, self.pristine_keys), (self.values, self.pristine_values)):
            for layer, before in zip(cache, pristine, strict=True):
                layer.copy_(before)

    def snapshot(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of keys and values as they are now."""
        return [k.clone() for k in self.keys], [v.clone() for v in self.values]

    def bind(self, workspace: bottleneck_ext.Workspace | None = None) -> BoundCache:
        """Our Processor on the caches."""
        return self.processor.bind(
            [k.transpose(1, 2) for k in self.keys],
            [v.transpose(1, 2) for v in self.values],
            self.queries,
            workspace=workspace or self.workspace,
        )

    def rewrite(self, workspace: bottleneck_ext.Workspace | None = None) -> np.ndarray:
        """Our whole boundary, binding included: recalled positions [num_layers, batch, k], ascending."""
        return np.stack(self.bind(workspace).rewrite(self.events).recalled, axis=1)

    def mass(self, out: np.ndarray | Tensor, bound: BoundCache) -> None:
        """Our attention mass into out, float32 [num_layers, batch, prior], on the caches' device."""
        bottleneck_ext.attention_mass(
            bound.kv_cache,
            bound.query_cache,
            [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in self.events],
            out=out,
            workspace=bound.workspace,
            recent_window=self.config.recent_window,
        )

    def empty_mass(self) -> np.ndarray:
        return np.empty((self.config.num_layers, self.setting.batch, self.setting.prior), np.float32)


@functools.lru_cache(maxsize=1)  # hundreds of megabytes, the same for settings that follow one another
def _processor(shape: str, dim: int, top_k: int, step: int) -> tuple[CacheProcessorConfig, Weights]:
    config = SHAPES[shape].processor_config(dim, top_k, step)
    return config, initial_weights(config, random_scale=RANDOM_SCALE, seed=SEED)
