"""The Bottlenecked Transformer (arXiv 2505.16950) in plain PyTorch, the straightforward way.

What the paper describes, with the tools at hand: the backbone runs eager attention with
`output_attentions=True`, so every forward materialises its attention weights; those of the current step's
last `recent_window` tokens are kept, averaged over the heads; at a boundary each layer takes the top-k of
their mean, gathers its rows, runs one `torch.nn.Module` over them and scatters the result back. One sequence
at a time, a `DynamicCache`. Ties in the top-k are broken as `torch.topk` likes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

STAGES = ("selection", "gather", "processor", "write")


class Config(Protocol):
    """What this file reads of a checkpoint's configuration."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    processor_dim: int
    processor_heads: int
    processor_mlp_dim: int
    top_k: int
    recent_window: int
    rewrite_prompt: bool
    key_space: str
    norm_eps: float


class EagerProcessorLayer(nn.Module):
    """One layer's Cache Processor: rows [n, C] -> gated edits [n, C]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = 2 * config.num_kv_heads * config.head_dim
        dim, mlp_dim, eps = config.processor_dim, config.processor_mlp_dim, config.norm_eps
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
        self.gate = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor) -> Tensor:
        u = self.in_proj(self.input_norm(x))
        y = self.attn_norm(u)
        # [n, D] -> [1, heads, n, D / heads]
        q, k, v = (
            proj(y).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        u = u + self.o_proj(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
        z = self.mlp_norm(u)
        u = u + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))
        return torch.sigmoid(self.gate) * self.out_proj(u)


class EagerProcessor(nn.Module):
    """The Processors of all layers, with the checkpoint's tensor names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EagerProcessorLayer(config) for _ in range(config.num_layers))


@dataclass
class EagerBoundary:
    """One rewrite: the window [begin, end), recalled positions [num_layers, k], and seconds by stage."""

    begin: int
    end: int
    recalled: Tensor
    stage_seconds: dict[str, float]


@dataclass
class EagerGeneration:
    """New token ids, the rewrites, and the time (`time.perf_counter`) at which each token was known."""

    token_ids: list[int] = field(default_factory=list)
    boundaries: list[EagerBoundary] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    capture_seconds: float = 0.0


class EagerBottleneck:
    """A backbone on eager attention with its Processor.

    weights: the checkpoint's tensors by name. dtype: of the Processor's weights and activations.
    """

    def __init__(self, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        if config.key_space != "rotated":
            raise ValueError(f"key_space is {config.key_space!r}; this baseline knows only 'rotated'")
        self.config = config
        self.processor = EagerProcessor(config)
        self.processor.load_state_dict(dict(weights))
        self.processor.to(dtype).requires_grad_(False)
        self.dtype = dtype

    def capture(self, attentions: Sequence[Tensor]) -> Tensor:
        """Head-averaged attention weights of the last R tokens: L x [1, H, S, T] -> [L, min(S, R), T]."""
        recent = [a[0, :, -self.config.recent_window :] for a in attentions]
        return torch.stack(recent).mean(dim=1, dtype=torch.float32)

    @torch.no_grad()
    def rewrite(self, cache: DynamicCache, captured: Sequence[Tensor], begin: int, end: int) -> EagerBoundary:
        """Rewrite every layer of `cache` for the window [begin, end).

        captured: what `capture` returned for the window's tokens, in order: [L, some, T >= begin] each,
        together end - begin of them.
        """
        config = self.config
        seconds = dict.fromkeys(STAGES, 0.0)
        t0 = time.perf_counter()
        mass = torch.cat([c[:, :, :begin] for c in captured], dim=1).mean(dim=1)  # [L, begin]
        recalled = mass.topk(min(config.top_k, begin)).indices.sort().values
        window = torch.arange(begin, end).expand(config.num_layers, -1)
        positions = torch.cat([recalled, window], dim=1)  # [L, n]
        t1 = time.perf_counter()
        seconds["selection"] += t1 - t0

        for layer, processor in enumerate(self.processor.layers):
            keys, values = cache.layers[layer].keys[0], cache.layers[layer].values[0]  # [H_kv, T, d]
            rows = positions[layer]
            t0 = time.perf_counter()
            x = torch.cat([keys[:, rows], values[:, rows]]).transpose(0, 1).flatten(1)  # [n, C]
            t1 = time.perf_counter()
            edit = processor(x.to(self.dtype))
            t2 = time.perf_counter()
            # Added in float32, as the paper's arithmetic asks, and rounded once into the cache.
            new = (x.float() + edit.float()).to(x.dtype).unflatten(1, (-1, config.head_dim)).transpose(0, 1)
            new_keys, new_values = new.chunk(2)
            keys[:, rows] = new_keys
            values[:, rows] = new_values
            t3 = time.perf_counter()
            seconds["gather"] += t1 - t0
            seconds["processor"] += t2 - t1
            seconds["write"] += t3 - t2
        return EagerBoundary(begin, end, recalled, seconds)

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        max_new_tokens: int,
        newline_ids: Collection[int],
        eos_token_ids: Collection[int] = (),
        min_step_length: int = 1,
    ) -> EagerGeneration:
        """Greedy decoding of input_ids [1, n], with a rewrite before the token that follows each step.

        model: on eager attention (`model.set_attn_implementation("eager")`). The prompt is step 0.
        newline_ids: the tokens that end a step of at least min_step_length tokens.
        """
        newline_ids, eos_token_ids = frozenset(newline_ids), frozenset(eos_token_ids)
        result = EagerGeneration()
        cache = DynamicCache(config=model.config)
        captured: list[Tensor] = []
        step_begin = length = token = 0
        while True:
            output: Any = model(
                input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
                logits_to_keep=1,
            )
            t0 = time.perf_counter()
            captured.append(self.capture(output.attentions))
            captured = captured[-self.config.recent_window :]
            result.capture_seconds += time.perf_counter() - t0

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
                begin = max(step_begin, length - self.config.recent_window)
                result.boundaries.append(self.rewrite(cache, captured, begin, length))
            if step_ended or prompt:
                step_begin = length
                captured = []
