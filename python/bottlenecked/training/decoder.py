"""A decoder of the Llama kind, in few operations.

Short lines keep a GPU waiting for the host: what a step of training takes is then the number of operations it issues.
transformers' own code spends most of them on norms (six to eight each), on turning queries and keys apart from each
other, and on three products where frozen weights allow one. Here the same layers are written down once more; whether
they are the same is not assumed but tried: see `PackedBackbone`.

Sizes: T tokens, D hidden, H query heads, H_kv KV heads of size d, N = H + 2 * H_kv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen import FrozenLayer, FrozenNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rotation:
    """RoPE that pairs element i of a head with i + d / 2.

    cos, sin: [T, d], as transformers' rotary embeddings give them.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos[:, None], sin[:, None]
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What a head is multiplied by, what its exchanged halves are, and the latter for the transposed; [T, 1, d]."""
        if dtype not in self._tables:
            first, second = self._sin.chunk(2, -1)
            tables = self._cos, torch.cat([-first, second], -1), torch.cat([second, -first], -1)
            self._tables[dtype] = tuple(t.to(dtype) for t in tables)  # type: ignore[assignment]
        return self._tables[dtype]

    def of_rows(self, count: int, others: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`tables` for heads as rows [T * (count + others), d], of which each token's last `others` are not turned."""
        cos, sin, sin_transposed = self.tables(dtype)
        kept = cos.new_ones(len(cos), others, cos.shape[2]), cos.new_zeros(len(cos), others, cos.shape[2])
        parts = (cos, kept[0]), (sin, kept[1]), (sin_transposed, kept[1])
        cos, sin, sin_transposed = (torch.cat([t.expand(-1, count, -1), rest], 1).flatten(0, 1) for t, rest in parts)
        return cos, sin, sin_transposed

    def turn_(self, heads: Tensor, count: int, *, transposed: bool = False) -> None:
        """Turn the first `count` of heads [T, N, d], contiguous, in place. transposed: as gradients are turned."""
        cos, sin, sin_transposed = self.tables(heads.dtype)
        exchanged = heads.roll(heads.shape[2] // 2, 2)[:, :count]
        heads[:, :count].mul_(cos).addcmul_(exchanged, sin_transposed if transposed else sin)


@dataclass(frozen=True)
class Norm:
    """RMS norm over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# (layer, what `Layer.heads` gave and may be overwritten, RoPE, scale) -> [T, H * d]
Attention = Callable[[int, Tensor, Rotation, float], Tensor]


@dataclass(frozen=True)
class Layer:
    """The parts of one layer.

    heads: [T, D] -> [T, N * d] or [T, N, d], queries, keys and values before RoPE, in memory that nobody else needs.
    """

    index: int
    attention_norm: Norm
    heads: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]
    scale: float
    mlp_norm: Norm
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]

    def run(self, x: Tensor, rotation: Rotation, attend: Attention) -> Tensor:
        """x [T, D], the residual stream, behind this layer."""
        x = x + self.output(attend(self.index, self.heads(self.attention_norm(x)), rotation, self.scale))
        z = self.mlp_norm(x)
        return x + self.down(self.activation(self.gate(z)) * self.up(z))


class Decoder:
    """The modules of `model`, which stay its own. AttributeError where it has other parts than a Llama or a Qwen.

    modules: its layers. norm: the one behind them.
    """

    def __init__(self, model: PreTrainedModel, num_query_heads: int, num_kv_heads: int) -> None:
        base: Any = model.base_model
        self._split = (num_query_heads, num_kv_heads, num_kv_heads)
        self._embed, self._rotary, self._head = base.embed_tokens, base.rotary_emb, model.get_output_embeddings()
        self.norm: torch.nn.Module = base.norm
        self.modules: list[Any] = list(base.layers)
        self.layers()

    def layers(self) -> list[Layer]:
        """Read anew for every batch: weights may have been trained or replaced since the last."""
        return [self._layer(i, module) for i, module in enumerate(self.modules)]

    def frozen_layers(self) -> list[FrozenLayer] | None:
        """`layers`, where nothing wants a gradient of anything in them and their parts are plain; else None."""
        if torch.is_autocast_enabled(self._embed.weight.device.type):
            return None
        if any(p.requires_grad for part in (self._embed, *self.modules) for p in part.parameters()):
            return None
        found: list[FrozenLayer] = []
        for index, module in enumerate(self.modules):
            layer = self._frozen_layer(index, module)
            if layer is None:
                return None
            found.append(layer)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """Of tokens [T]: [T, D]."""
        x: Tensor = self._embed(ids)
        return x

    def rotation(self, x: Tensor, positions: Tensor) -> Rotation:
        """RoPE of tokens at positions [T], in the dtype of x."""
        cos, sin = self._rotary(x[None], position_ids=positions[None])
        return Rotation(cos[0], sin[0])

    def logits(self, x: Tensor) -> Tensor:
        """Of what the last layer gave."""
        logits: Tensor = self._head(_norm(self.norm)(x))
        return logits

    def _layer(self, index: int, module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        return Layer(
            index,
            _norm(module.input_layernorm),
            self._heads(attention),
            attention.o_proj,
            float(attention.scaling),
            _norm(module.post_attention_layernorm),
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def _frozen_layer(self, index: int, module: Any) -> FrozenLayer | None:
        attention, mlp = module.self_attn, module.mlp
        norms = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
        rest = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        heads = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        plain = (
            getattr(attention, "q_norm", None) is None
            and all(_is_frozen(part) and part.bias is None for part in rest)
            and isinstance(mlp.act_fn, (torch.nn.SiLU, type(_silu())))
        )
        if not plain or heads is None or any(norm.weight.dtype != heads[0].dtype for norm in norms):
            return None
        first, second = (FrozenNorm(norm.weight, norm.eps) for norm in norms)
        output, gate, up, down = (part.weight for part in rest)
        return FrozenLayer(index, float(attention.scaling), first, *heads, output, second, gate, up, down)

    def _heads(self, attention: Any) -> Callable[[Tensor], Tensor]:
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        joined = _joined(parts)
        if joined is not None:

            def project(x: Tensor) -> Tensor:
                return F.linear(x, *joined)
        else:

            def project(x: Tensor) -> Tensor:
                return torch.cat([part(x) for part in parts], 1)

        if getattr(attention, "q_norm", None) is None:
            return project
        norms = _norm(attention.q_norm), _norm(attention.k_norm)
        if any(norm.weight.shape != (attention.head_dim,) for norm in norms):
            raise AttributeError("norms over several heads")

        def normed(x: Tensor) -> Tensor:
            heads = project(x)
            query, key, value = heads.view(len(x), sum(self._split), -1).split(self._split, 1)  # type: ignore[no-untyped-call]
            return torch.cat([norms[0](query), norms[1](key), value], 1)

        return normed


def _silu() -> Any:
    """transformers' own: a class of its own in some versions."""
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


def _is_frozen(part: Any) -> bool:
    """Whether this is one product with weights that want no gradient."""
    return type(part) is torch.nn.Linear and not any(p.requires_grad for p in part.parameters())


def _joined(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Frozen projections as one: a copy of their weights and biases that lives as long as the batch. Else None."""
    if not all(_is_frozen(part) for part in parts):
        return None
    biases = [part.bias for part in parts]
    bias = None if any(b is None for b in biases) else torch.cat(biases)
    if bias is None and any(b is not None for b in biases):
        raise AttributeError("biases of some projections only")
    return torch.cat([part.weight for part in parts]), bias


def _norm(module: Any) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, float(eps))


__all__ = ["Attention", "Decoder", "Layer", "Norm", "Rotation"]
