"""Layers of the Llama kind whose weights are frozen, with a backward pass written by hand.

A roll-out wants no gradient of the backbone's weights, only of the cache: what flows from one layer's attention to the
one before it. Between two attentions that is one function for autograd, in which nothing is kept, added, cast or viewed
that is not needed. Attention itself stays PyTorch's, forward and backward, on whatever device.

Sizes: T tokens, D hidden, H query heads, H_kv KV heads of size d, N = H + 2 * H_kv, M the width of the MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .decoder import Rotation
    from .packed import Pass


class FrozenNorm:
    """RMS norm over the last dimension of [T, D]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self._eps = weight, eps
        self._fused = _has_fused_norm(weight.device, weight.dtype)
        self._wide = at_least_float32(weight.dtype)
        self._eps_tensor = _scalar(eps, self._wide, weight.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normed, and 1 / root mean square [T, 1] for `backward`."""
        if self._fused:
            normed, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[1:], self.weight, self._eps)
            return normed, inverse
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=self._wide)
        inverse = torch.addcmul(self._eps_tensor, size, size, value=1 / x.shape[1]).rsqrt_()
        normed = (x * inverse).mul_(self.weight)
        return normed if normed.dtype == x.dtype else normed.to(x.dtype), inverse

    def backward(self, gradient: Tensor, x: Tensor, inverse: Tensor, beside: Tensor) -> Tensor:
        """The gradient of x. beside: another one of x, added."""
        if self._fused:
            of_x, _ = torch.ops.aten._fused_rms_norm_backward(
                gradient, x, x.shape[1:], inverse, self.weight, [True, False]
            )
            return of_x.add_(beside)  # type: ignore[no-any-return]
        unit = x * inverse
        of_unit = gradient.to(self._wide) * self.weight
        shares = (of_unit * unit).mean(1, keepdim=True)
        return torch.addcmul(beside, of_unit.addcmul_(unit, shares, value=-1), inverse).to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are made in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@functools.cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


@functools.cache
@torch.inference_mode(False)
def _has_fused_norm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has both directions as one operation each, here, and they are what we think they are."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 64, generator=generator).to(device, dtype) for _ in range(2))
    weight, eps = torch.linspace(0.5, 1.5, 64).to(device, dtype), 1e-5
    wide = at_least_float32(dtype)
    asked = x.to(wide).requires_grad_()
    with torch.enable_grad():
        expected = F.rms_norm(asked, (64,), weight.to(wide), eps)
        (expected_gradient,) = torch.autograd.grad(expected, asked, gradient.to(wide))
    try:
        normed, inverse = torch.ops.aten._fused_rms_norm(x, (64,), weight, eps)
        found, _ = torch.ops.aten._fused_rms_norm_backward(gradient, x, (64,), inverse, weight, [True, False])
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 8 * torch.finfo(dtype).eps
    return all(
        bool(((a.to(wide) - b).norm() <= tolerance * b.norm()).item())
        for a, b in ((normed, expected.detach()), (found, expected_gradient))
    )


@dataclass(frozen=True)
class FrozenLayer:
    """One layer's weights, none of which wants a gradient, as `torch.nn.Linear` has them: [outputs, inputs].

    heads: of queries, keys and values together, [N * d, D]. heads_bias: [N * d] or None.
    """

    index: int
    scale: float
    attention_norm: FrozenNorm
    heads: Tensor
    heads_bias: Tensor | None
    output: Tensor
    mlp_norm: FrozenNorm
    gate: Tensor
    up: Tensor
    down: Tensor

    @functools.cached_property
    def transposed(self) -> tuple[Tensor, ...]:
        """heads, output, gate, up and down, made once for all products."""
        return tuple(weight.t() for weight in (self.heads, self.output, self.gate, self.up, self.down))


def run_frozen(layers: Sequence[FrozenLayer], x: Tensor, rotation: Rotation, of: Pass) -> Tensor:
    """x [T, D], the residual stream, behind all layers. Gradients flow into the rewritten rows of `of` alone."""
    tables = rotation.of_rows(of.plan.query_heads + of.plan.kv_heads, of.plan.kv_heads, x.dtype)
    states = _Enter.apply(of.rewritten, x, of, layers[0], tables)  # type: ignore[no-untyped-call]
    for before, after in zip(layers, (*layers[1:], None), strict=True):
        query, key, value = states[-3:]
        attended = of.attention(query, key, value, before.scale)
        states = _Between.apply(x, attended, of, before, after, tables)  # type: ignore[no-untyped-call]
        x = states[0]
    return x


class _Enter(torch.autograd.Function):
    """Up to the first attention: what is asked there is all a constant, but what it reads in the cache is not."""

    @staticmethod
    def forward(
        ctx: Any, rewritten: Tensor | None, x: Tensor, of: Pass, layer: FrozenLayer, tables: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        ctx.of, ctx.layer = of, layer
        return _ask(layer, layer.attention_norm.forward(x)[0], of, tables)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.of.spread_back(ctx.layer.index, *gradients, wanted=False)
        return ctx.of.of_rewritten(), None, None, None, None


class _Between(torch.autograd.Function):
    """x [T, D] before a layer, and what its attention gives -> x behind it; and what the next one's attention needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        of: Pass,
        before: FrozenLayer,
        after: FrozenLayer | None,
        tables: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        _, to_output, to_gate, to_up, to_down = before.transposed
        x = torch.addmm(x, of.collect(attended), to_output)
        z, inverse = before.mlp_norm.forward(x)
        gate, up = torch.mm(z, to_gate), torch.mm(z, to_up)
        active = F.silu(gate)
        kept = [x, inverse, gate, up, active]
        x = torch.addmm(x, active * up, to_down)
        states: tuple[Tensor, ...] = (x,)
        if after is not None:
            y, inverse = after.attention_norm.forward(x)
            # Autograd would detach it when it keeps it, and again when it is asked for it.
            kept += [x.detach(), inverse]
            states = x, *_ask(after, y, of, tables)
        ctx.of, ctx.before, ctx.after, ctx.tables = of, before, after, tables
        ctx.save_for_backward(*kept)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of: Pass = ctx.of
        before: FrozenLayer = ctx.before
        after: FrozenLayer | None = ctx.after
        x, inverse, gate, up, active, *behind = ctx.saved_tensors
        gradient = gradients[0]
        if after is not None:
            cos, _, sin = ctx.tables
            rows = of.spread_back(after.index, *gradients[1:])
            heads = _turn_(rows, cos, sin).view(len(x), -1)
            x_behind, inverse_behind = behind
            of_y = torch.mm(heads, after.heads)
            gradient = after.attention_norm.backward(of_y, x_behind, inverse_behind, gradient)
        hidden = torch.mm(gradient, before.down)
        of_up = hidden * active
        of_gate = torch.ops.aten.silu_backward(hidden.mul_(up), gate)
        # Not in place: addmm_ is no product to torch's FlopCounterMode, with which experiments count compute.
        of_z = torch.addmm(torch.mm(of_up, before.up), of_gate, before.gate)
        gradient = before.mlp_norm.backward(of_z, x, inverse, gradient)
        of_attended = of.collect_back(torch.mm(gradient, before.output))
        return gradient if ctx.needs_input_grad[0] else None, of_attended, None, None, None, None


def _ask(layer: FrozenLayer, y: Tensor, of: Pass, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normed y [T, D], for attention."""
    bias, (cos, sin, _) = layer.heads_bias, tables
    to_heads = layer.transposed[0]
    heads = torch.mm(y, to_heads) if bias is None else torch.addmm(bias, y, to_heads)
    return of.spread(layer.index, heads, _turn_(heads.view(cos.shape), cos, sin))


def _turn_(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rows [T * N, d] in place, by RoPE's tables for them."""
    exchanged = rows.roll(rows.shape[1] // 2, 1)
    return rows.mul_(cos).addcmul_(exchanged, sin)


__all__ = ["FrozenLayer", "FrozenNorm", "at_least_float32", "run_frozen"]
