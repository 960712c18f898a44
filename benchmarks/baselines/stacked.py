"""Our algorithm with all layers in a few large products: the strongest PyTorch we can write.

The layers' Processors have equal shapes and are not chained, so that one batched product serves them all. What else is
done for speed, each because it was measured to help:

- RMS norm weights are folded into the product behind them, sigmoid(gate) into the last one; q, k and v are one product;
- weights lie [num_layers, in, out], contiguous, and biases and residuals enter through baddbmm;
- large intermediates are written into buffers that are kept between calls (`out=`): memory that is returned to the
  system and asked for again costs as much as a product;
- rows are gathered and written by flat indices, one index_select and one index_copy_ for each cache tensor.

The attention mass goes layer by layer: the caches are separate tensors, and stacking them would copy all their keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.config import CacheProcessorConfig

from .naive import recall
from .window import Window


class Stacked:
    """A Processor as a few large products in PyTorch.

    weights: the checkpoint's tensors by name. dtype: of the Processor's weights and activations; masses are float32.
    device: of the caches it will be given.
    compiled: attention mass (one graph for all layers) and Processor (another) under `torch.compile`, which needs a C++
        compiler; the first call with new shapes compiles, for seconds. Its buffers are then the compiler's business.
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
        self.dtype = dtype
        self.device = device
        self.compiled = compiled
        self.buffers: dict[str, Tensor] = {}
        self.mass, self.edits = self._mass, self._edits
        if compiled:
            self.mass, self.edits = (torch.compile(f, dynamic=False, fullgraph=True) for f in (self._mass, self._edits))

        def stacked(name: str) -> Tensor:
            return torch.stack([torch.as_tensor(weights[f"layers.{i}.{name}"]) for i in range(config.num_layers)])

        def matrix(name: str, norm: str | None = None) -> Tensor:  # [num_layers, in, out]
            transposed = stacked(f"{name}.weight").transpose(1, 2)
            return transposed if norm is None else stacked(f"{norm}.weight")[..., None] * transposed

        def bias(name: str) -> Tensor:  # [num_layers, 1, out]
            return stacked(f"{name}.bias")[:, None]

        def ready(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype).contiguous()

        qkv = ("q_proj", "k_proj", "v_proj")
        gate = torch.sigmoid(stacked("gate"))[:, None, None]
        self.in_proj, self.in_bias = ready(matrix("in_proj", "input_norm")), ready(bias("in_proj"))
        self.qkv_proj = ready(torch.cat([matrix(name, "attn_norm") for name in qkv], dim=2))
        self.qkv_bias = ready(torch.cat([bias(name) for name in qkv], dim=2))
        self.o_proj, self.o_bias = ready(matrix("o_proj")), ready(bias("o_proj"))
        self.gate_proj, self.up_proj = (ready(matrix(name, "mlp_norm")) for name in ("gate_proj", "up_proj"))
        self.down_proj = ready(matrix("down_proj"))
        self.out_proj, self.out_bias = ready(gate * matrix("out_proj")), ready(gate * bias("out_proj"))

    @torch.inference_mode()
    def rewrite(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        queries: Sequence[Tensor],
        events: Sequence[BoundaryEvent],
    ) -> Tensor:
        """Rewrite keys and values in place; return the recalled positions.

        ValueError where a cache is not contiguous: flat indices could not reach it.
        """
        window = Window.of(events, self.config)
        _, num_kv_heads, length, head_dim = keys[0].shape
        if not all(cache.is_contiguous() for cache in (*keys, *values)):
            raise ValueError("a cache is not contiguous: give tensors that are, [batch, num_kv_heads, T, head_dim]")
        future = window.future(keys[0].device)
        mass = torch.stack([self.mass(k, ring, window, future) for k, ring in zip(keys, queries, strict=True)])
        recalled = recall(mass, self.config.top_k)  # [num_layers, num_events, k]

        inside = window.inside(recalled.device).expand(*recalled.shape[:2], -1)
        rows = torch.cat([recalled, inside], dim=2)  # [num_layers, num_events, n]
        # Rows of a cache seen as [batch * num_kv_heads * T, head_dim], in the order of a KV-token's heads.
        kv_heads = torch.arange(num_kv_heads, device=recalled.device)
        heads = window.batch(recalled.device)[:, None] * num_kv_heads + kv_heads
        where = (heads[:, None] * length + rows[..., None]).flatten(1)  # [num_layers, num_events * n * num_kv_heads]
        num_rows, dtype = rows[0].numel(), keys[0].dtype
        x = self._buffer("x", (len(keys), num_rows, 2, num_kv_heads * head_dim), dtype)
        for half, caches in enumerate((keys, values)):
            for cache, of_layer, out in zip(caches, where, x[:, :, half], strict=True):
                out.copy_(cache.view(-1, head_dim).index_select(0, of_layer).view_as(out))
        x = x.flatten(2)  # [num_layers, num_events * n, C]
        edits = self.edits(x.to(self.dtype), len(events))
        new = torch.add(x, edits, out=self._buffer("new", x.shape, torch.promote_types(dtype, self.dtype)))
        for half, caches in zip(new.to(dtype).chunk(2, dim=2), (keys, values), strict=True):
            for cache, of_layer, rewritten in zip(caches, where, half, strict=True):
                cache.view(-1, head_dim).index_copy_(0, of_layer, rewritten.reshape(-1, head_dim))
        return recalled

    def _mass(self, keys: Tensor, ring: Tensor, window: Window, future: Tensor) -> Tensor:
        """Attention mass of one layer's prior positions, summed over the window's queries: [num_events, prior]."""
        queries, keys = window.queries(ring), window.rows(keys)[:, :, : window.end]
        batch, heads, length, head_dim = queries.shape
        # Grouped-query attention: the heads that share a KV head are rows of one product.
        grouped = (queries * head_dim**-0.5).reshape(batch, keys.shape[1], -1, head_dim)
        shape = (*grouped.shape[:3], window.end)
        scores = torch.matmul(grouped, keys.transpose(2, 3), out=self._inner_buffer("scores", shape, keys.dtype))
        scores.view(batch, heads, length, -1)[..., window.begin :].masked_fill_(future, float("-inf"))
        attention = self._inner_buffer("attention", shape, torch.float32)
        attention = torch.softmax(scores, dim=-1, dtype=torch.float32, out=attention)
        return attention[..., : window.begin].sum(dim=(1, 2))

    def _edits(self, x: Tensor, num_events: int) -> Tensor:
        """Every layer's gated edits of its rows x [num_layers, num_events * n, C]."""
        config = self.config
        num_layers, rows, _ = x.shape

        def norm(y: Tensor) -> Tensor:  # its weight is in the product that follows
            return F.rms_norm(y, y.shape[-1:], eps=config.norm_eps)

        def buffer(name: str, width: int) -> Tensor | None:
            return self._inner_buffer(name, (num_layers, rows, width), self.dtype)

        dim, mlp_dim = config.processor_dim, config.processor_mlp_dim
        u = torch.baddbmm(self.in_bias, norm(x), self.in_proj, out=buffer("u", dim))
        qkv = torch.baddbmm(self.qkv_bias, norm(u), self.qkv_proj, out=buffer("qkv", 3 * dim))
        # -> three of [num_layers * num_events, processor_heads, n, dim / processor_heads]
        split = qkv.view(num_layers * num_events, -1, 3, config.processor_heads, dim // config.processor_heads)
        attention = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4).unbind())
        attention = attention.transpose(1, 2).reshape(num_layers, rows, dim)
        u = u.add_(self.o_bias).baddbmm_(attention, self.o_proj)
        z = norm(u)
        gate = torch.bmm(z, self.gate_proj, out=buffer("gate", mlp_dim))
        up = torch.bmm(z, self.up_proj, out=buffer("up", mlp_dim))
        u = u.baddbmm_(F.silu(gate, inplace=True).mul_(up), self.down_proj)
        return torch.baddbmm(self.out_bias, u, self.out_proj, out=buffer("out", config.kv_width))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that the next call gets again where it asks for no more."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size or self.buffers[name].dtype != dtype:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)

    def _inner_buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """`_buffer` where it may be compiled: the compiler plans its memory itself."""
        return None if self.compiled else self._buffer(name, shape, dtype)
