"""The Bottlenecked Transformer (arXiv 2505.16950) in plain PyTorch, the straightforward way.

What the paper describes, with the tools at hand: the backbone runs eager attention, so that its attention weights are
in memory; at a boundary each layer takes the top-k of their mean over heads and window, gathers its rows, runs one
`torch.nn.Module` over them and scatters the result back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.config import CacheProcessorConfig

from .window import Window


class ProcessorLayer(nn.Module):
    """One layer's Cache Processor: rows [batch, n, C] -> gated edits [batch, n, C]."""

    def __init__(self, config: CacheProcessorConfig) -> None:
        super().__init__()
        width, dim, mlp_dim, eps = config.kv_width, config.processor_dim, config.processor_mlp_dim, config.norm_eps
        self.num_heads = config.processor_heads
        self.input_norm = nn.RMSNorm(width, eps)
        self.in_proj = nn.Linear(width, dim)
        self.attn_norm = nn.RMSNorm(dim, eps)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.mlp_norm = nn.RMSNorm(dim, eps)
        self.gate_proj = nn.Linear(dim, mlp_dim, bias=False)
        self.up_proj = nn.Linear(dim, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        u = self.in_proj(self.input_norm(x))
        y = self.attn_norm(u)
        # [batch, n, D] -> [batch, heads, n, D / heads]
        q, k, v = (
            proj(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        u = u + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        z = self.mlp_norm(u)
        u = u + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))
        return torch.sigmoid(self.gate) * self.out_proj(u)


class Processor(nn.Module):
    """The Processors of all layers, by the checkpoint's tensor names.

    weights: the checkpoint's tensors, NumPy or torch. dtype: of weights and activations. device: where they are.
    """

    def __init__(
        self,
        config: CacheProcessorConfig,
        weights: Mapping[str, np.ndarray | Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        with torch.device("meta"):  # nothing is initialised that the weights replace
            self.layers = nn.ModuleList(ProcessorLayer(config) for _ in range(config.num_layers))
        self.load_state_dict({name: torch.as_tensor(weight) for name, weight in weights.items()}, assign=True)
        self.to(device, dtype).requires_grad_(False).eval()


def rewrite_rows(layer: ProcessorLayer, keys: Tensor, values: Tensor, sequences: Tensor, rows: Tensor) -> None:
    """Gather, process, scatter: add one layer's edits to positions `rows` of its caches, in place.

    keys, values: [batch, num_kv_heads, T, head_dim]. sequences: int64 [num_events]. rows: int64 [num_events, n].
    """
    where = (sequences[:, None], rows)  # into [batch, T, num_kv_heads, head_dim]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    x = torch.cat([keys[where], values[where]], dim=2).flatten(2)  # [num_events, n, C]
    new = x + layer(x.to(layer.gate.dtype))
    new_keys, new_values = new.to(x.dtype).unflatten(2, (-1, keys.shape[3])).chunk(2, dim=2)
    keys[where] = new_keys
    values[where] = new_values


def recall(mass: Tensor, top_k: int) -> Tensor:
    """Positions of the top_k largest (or all) of mass [..., prior], ascending: int64 [..., k]."""
    return mass.topk(min(top_k, mass.shape[-1]), sorted=False).indices.sort().values


@dataclass
class Boundary:
    """One rewrite of `Naive.generate`: the window [begin, end), recalled positions [num_layers, k], wall-clock time."""

    begin: int
    end: int
    recalled: Tensor
    seconds: float


@dataclass
class Generation:
    """New token ids, the rewrites, and the time (`time.perf_counter`) at which each token was known.

    capture_seconds: spent on keeping attention weights, all forwards together.
    """

    token_ids: list[int] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    capture_seconds: float = 0.0


class Naive:
    """A Processor whose positions are selected by materialised attention weights.

    weights: the checkpoint's tensors by name. dtype: of the Processor's weights and activations; masses are float32.
    device: of the caches it will be given. compiled: the functions of one layer under `torch.compile`.
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
        self.layer_weights, self.rewrite_layer = self._layer_weights, self._rewrite_layer
        if compiled:
            self.layer_weights, self.rewrite_layer = (
                torch.compile(f, dynamic=False, fullgraph=True) for f in (self._layer_weights, self._rewrite_layer)
            )

    @torch.inference_mode()
    def attention_weights(
        self, keys: Sequence[Tensor], queries: Sequence[Tensor], events: Sequence[BoundaryEvent]
    ) -> list[Tensor]:
        """What eager attention materialises for the window's queries, in its own operations and dtypes.

        Returns per layer [num_events, num_query_heads, window, step_end] in the cache's dtype.
        """
        window = Window.of(events, self.config)
        mask = F.pad(window.future(keys[0].device), (window.begin, 0))
        return [self.layer_weights(of_layer, ring, window, mask) for of_layer, ring in zip(keys, queries, strict=True)]

    def _layer_weights(self, keys: Tensor, ring: Tensor, window: Window, mask: Tensor) -> Tensor:
        """One layer's attention weights."""
        groups = self.config.num_query_heads // self.config.num_kv_heads
        q = window.queries(ring)
        k = window.rows(keys)[:, :, : window.end].repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(2, 3) * self.config.head_dim**-0.5).masked_fill_(mask, float("-inf"))
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)

    @torch.inference_mode()
    def rewrite(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        attention: Sequence[Tensor],
        events: Sequence[BoundaryEvent],
    ) -> Tensor:
        """Rewrite keys and values in place; return the recalled positions.

        attention: per layer what `attention_weights` returned, or its mean over the heads,
            [num_events, heads or 1, window, step_end]; columns from the window on are not read and may be missing.
        """
        window = Window.of(events, self.config)
        sequences = window.batch(keys[0].device)
        inside = window.inside(keys[0].device).expand(len(events), -1)
        layers = zip(self.processor.layers, keys, values, attention, strict=True)
        return torch.stack([self.rewrite_layer(*layer, window.begin, sequences, inside) for layer in layers])

    def _rewrite_layer(
        self,
        layer: ProcessorLayer,
        keys: Tensor,
        values: Tensor,
        weights: Tensor,
        begin: int,
        sequences: Tensor,
        inside: Tensor,
    ) -> Tensor:
        """One layer's rewrite; returns its recalled positions [num_events, k]. inside: the window, by event."""
        mass = weights[..., :begin].mean(dim=(1, 2), dtype=torch.float32)  # [num_events, prior]
        recalled = recall(mass, self.config.top_k)
        rewrite_rows(layer, keys, values, sequences, torch.cat([recalled, inside], dim=1))
        return recalled

    @torch.inference_mode()
    def generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        max_new_tokens: int,
        newline_ids: Collection[int],
        eos_token_ids: Collection[int] = (),
        min_step_length: int = 1,
    ) -> Generation:
        """Greedy decoding of input_ids [1, n], with a rewrite before the token that follows each step.

        Of each forward the attention weights of the current step's last `recent_window` tokens are kept, averaged over
        the heads.

        model: on eager attention (`model.set_attn_implementation("eager")`). The prompt is step 0.
        newline_ids: the tokens that end a step of at least min_step_length tokens.
        """
        newline_ids, eos_token_ids = frozenset(newline_ids), frozenset(eos_token_ids)
        recent_window = self.config.recent_window
        result = Generation()
        cache = DynamicCache(config=model.config)
        captured: list[list[Tensor]] = []  # by forward and layer, [1, 1, tokens, T]
        step_begin = length = token = 0
        while True:
            output: Any = model(
                input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
                logits_to_keep=1,
            )
            start = time.perf_counter()
            captured.append(
                [a[:, :, -recent_window:].mean(dim=1, keepdim=True, dtype=torch.float32) for a in output.attentions]
            )
            captured = captured[-recent_window:]
            result.capture_seconds += time.perf_counter() - start

            prompt = length == 0
            length += input_ids.shape[1]
            if prompt:
                step_ended = self.config.rewrite_prompt
                step_begin = 0 if step_ended else length
            else:
                step_ended = token in newline_ids and length - step_begin >= min_step_length
            input_ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            token = int(input_ids)
            result.token_ids.append(token)
            result.token_times.append(time.perf_counter())
            if token in eos_token_ids or len(result.token_ids) == max_new_tokens:
                return result
            if step_ended:
                start = time.perf_counter()
                event = BoundaryEvent(sequence=0, step_begin=step_begin, step_end=length)
                begin = event.window_begin(recent_window)
                attention = [torch.cat([a[..., :begin] for a in rows], dim=2) for rows in zip(*captured, strict=True)]
                keys = [layer.keys for layer in cache.layers]
                values = [layer.values for layer in cache.layers]
                recalled = self.rewrite(keys, values, attention, [event])[:, 0]
                result.boundaries.append(Boundary(begin, length, recalled, time.perf_counter() - start))
            if step_ended or prompt:
                step_begin = length
                captured = []
