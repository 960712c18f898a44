"""Our algorithm in plain PyTorch: attention mass from captured queries, then one `torch.nn.Module` per layer.

Unlike naive.py it repeats no keys, masks only the window's own columns and never leaves a layer's attention weights
behind. Compiled, one layer's whole rewrite is one graph, which all layers share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.config import CacheProcessorConfig

from .naive import Processor, ProcessorLayer, recall, rewrite_rows
from .window import Window


def attention_mass(queries: Tensor, keys: Tensor, begin: int, future: Tensor) -> Tensor:
    """Attention mass of the prior positions, from the window's queries: float32 [num_events, begin].

    queries: [num_events, num_query_heads, window, head_dim]; keys: [num_events, num_kv_heads, begin + window,
    head_dim]; future: `Window.future`. The mass is summed over queries and heads: the order is that of their mean.
    """
    batch, heads, window, head_dim = queries.shape
    # Grouped-query attention: the heads that share a KV head are rows of one product.
    grouped = (queries * head_dim**-0.5).reshape(batch, keys.shape[1], -1, head_dim)
    scores = (grouped @ keys.transpose(2, 3)).view(batch, heads, window, -1)
    scores[..., begin:].masked_fill_(future, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32)[..., :begin].sum(dim=(1, 2))


class Plain:
    """A Processor in plain PyTorch.

    weights: the checkpoint's tensors by name. dtype: of the Processor's weights and activations; masses are float32.
    device: of the caches it will be given. compiled: under `torch.compile`, which needs a C++ compiler; the first call
    with new shapes compiles, for seconds.
    """

    def __init__(
        self,
        config: CacheProcessorConfig,
        weights: Mapping[str, np.ndarray | Tensor],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.processor = Processor(config, weights, dtype, device)
        self.rewrite_layer = (
            torch.compile(self._rewrite_layer, dynamic=False, fullgraph=True) if compiled else self._rewrite_layer
        )

    @torch.inference_mode()
    def rewrite(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        queries: Sequence[Tensor],
        events: Sequence[BoundaryEvent],
    ) -> Tensor:
        """Rewrite keys and values in place; return the recalled positions."""
        window = Window.of(events, self.config)
        layers = zip(self.processor.layers, keys, values, queries, strict=True)
        return torch.stack([self.rewrite_layer(*layer, window) for layer in layers])

    def _rewrite_layer(
        self, layer: ProcessorLayer, keys: Tensor, values: Tensor, ring: Tensor, window: Window
    ) -> Tensor:
        """One layer's rewrite; returns its recalled positions [num_events, k]."""
        seen = window.rows(keys)[:, :, : window.end]
        mass = attention_mass(window.queries(ring), seen, window.begin, window.future(keys.device))
        recalled = recall(mass, self.config.top_k)
        inside = window.inside(keys.device).expand(len(window.sequences), -1)
        rewrite_rows(layer, keys, values, window.batch(keys.device), torch.cat([recalled, inside], dim=1))
        return recalled
