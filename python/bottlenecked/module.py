"""CacheProcessorModule: the Processor (arXiv 2505.16950) in differentiable PyTorch, for training.

It maps KV rows to their gated edits and knows nothing of caches. Its caller selects the rows, undoes RoPE on
their keys and redoes it on the edits where `config.key_space` is "unrotated", and adds the edits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_weights, initial_weights, load_weights, save_checkpoint
from .config import CacheProcessorConfig

_LENGTH_MULTIPLE = 8  # attention's kernels want rows of masks aligned, or copy them


@dataclass(frozen=True)
class RowLayout:
    """Where rows of several sequences stand in attention, which pads those of unequal length to one length.

    lengths: rows of each sequence. size: the padded length. slots: int64 [rows], each row's place in [sequences, size].
    rows: int64 [sequences, size], the row in each place; padding has any. padding: int64 [sequences, size], 1 there.
    The tensors are None where the lengths are equal.
    """

    lengths: Sequence[int]
    size: int
    slots: Tensor | None = None
    rows: Tensor | None = None
    padding: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> RowLayout:
        """For sequences of so many rows, without waiting for the device."""
        size, arrays = cls.arrays(lengths)
        tensors = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
        return cls(lengths, size, *tensors)

    @staticmethod
    def arrays(lengths: Sequence[int]) -> tuple[int, list[npt.NDArray[np.int64]]]:
        """`size`, and the three tensors' values where there are any."""
        longest = max(lengths)
        if min(lengths) == longest:
            return longest, []
        size = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        real = np.arange(size) < np.asarray(lengths)[:, None]
        rows = np.zeros(real.shape, np.int64)
        rows[real] = np.arange(sum(lengths))
        return size, [np.flatnonzero(real), rows, (~real).astype(np.int64)]


class _Pad(torch.autograd.Function):
    """Rows [layers, rows, width] -> [layers, sequences * size, width].

    Padding is masked as keys and values, and what its queries are answered is dropped: its gradients are exactly zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        assert layout.rows is not None
        ctx.slots = layout.slots
        return x.index_select(1, layout.rows.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(1, ctx.slots), None


class CacheProcessorModule(torch.nn.Module):
    """The Processors of all layers, computed at once: they have the same shapes and are not chained.

    Each kind of tensor is one parameter stacked over layers, such as `in_proj_weight` [num_layers, d_p, C].
    `state_dict` and `load_state_dict` use a checkpoint's names, "layers.0.in_proj.weight" and so on.

    config: the shapes.
    weights: by checkpoint name; default `initial_weights(config)`, whose edits are exactly zero. ValueError
        where they do not fit.
    """

    def __init__(self, config: CacheProcessorConfig, weights: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        super().__init__()
        self.config = config
        weights = initial_weights(config) if weights is None else check_weights(config, weights)
        for name in config.layer_shapes():
            stacked = np.stack([weights[f"layers.{i}.{name}"] for i in range(config.num_layers)])
            self.register_parameter(_attribute(name), torch.nn.Parameter(torch.from_numpy(stacked)))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> CacheProcessorModule:
        """Read the checkpoint in `directory`, float32 on the CPU. ValueError as in `load_weights`."""
        config = CacheProcessorConfig.load(directory)
        return cls(config, load_weights(directory, config))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a float32 checkpoint as `save_checkpoint` does; ValueError where a weight is not finite."""
        weights = {name: t.to("cpu", torch.float32).numpy() for name, t in self.state_dict().items()}
        save_checkpoint(directory, self.config, weights)

    def num_parameters(self) -> int:
        """Trainable parameters over all layers."""
        return sum(p.numel() for p in self.parameters())

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What `forward` multiplies by, cast and joined once for several calls.

        dtype: of the products; default: the parameters'. Gradients flow back to the parameters. As none of the
        operations keeps anything for them, several calls may have a backward pass each.
        """
        return self._weights(slice(None), dtype)

    def forward(
        self,
        x: Tensor,
        row_lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        *,
        layout: RowLayout | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The gated edits sigmoid(gate) * delta of all layers (section 3).

        x: [num_layers, rows, C], the selected KV rows of one or more sequences, one after the other, each
            ascending by position: keys over KV heads, then values over KV heads. Converted to the parameters'
            dtype (float32 unless the module was converted).
        row_lengths: rows of each sequence, 1 or more, summing to `rows`; default: one sequence. A sequence's
            rows see only each other.
        positions: an ablation that checkpoints cannot express: integers [num_layers, rows]; the block's queries and
            keys are rotated by them (RoPE, base 10000).
        layout: of row_lengths, where the caller has it; default: made here.
        weights: of `weights`, where the caller has them; default: made here. Their dtype is that of the products.

        Under `torch.autocast` products are of its dtype, and everything between them stays in the parameters'.
        Returns the edits, [num_layers, rows, C], in the parameters' dtype. ValueError where a shape is wrong.
        """
        return self._edits(x, row_lengths, slice(None), positions, layout, weights)

    def forward_layer(self, layer: int, x: Tensor, row_lengths: Sequence[int] | None = None) -> Tensor:
        """`forward` for one layer: x [rows, C] -> its gated edits [rows, C]."""
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer is {layer}, but it must be from 0 to {self.config.num_layers - 1}")
        return self._edits(x[None], row_lengths, slice(layer, layer + 1))[0]

    def _edits(
        self,
        x: Tensor,
        row_lengths: Sequence[int] | None,
        layers: slice,
        positions: Tensor | None = None,
        layout: RowLayout | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        config, device = self.config, x.device.type
        if weights is None:
            autocast = torch.is_autocast_enabled(device)
            weights = self._weights(layers, torch.get_autocast_dtype(device) if autocast else None)
        gate = weights["gate"]
        if x.dim() != 3 or x.shape[0] != len(gate) or x.shape[1] < 1 or x.shape[2] != config.kv_width:
            raise ValueError(
                f"x has shape {list(x.shape)}, but it must be [{len(gate)} layers, rows, {config.kv_width}]"
            )
        row_lengths = [x.shape[1]] if row_lengths is None else [int(n) for n in row_lengths]
        if min(row_lengths, default=0) < 1 or sum(row_lengths) != x.shape[1]:
            raise ValueError(f"row_lengths {row_lengths} must be 1 or more each and sum to {x.shape[1]} rows")
        layout = RowLayout.of(row_lengths, x.device) if layout is None else layout

        # Sums and products of two dtypes are of the wider one, the parameters': no need to say so.
        u = _project(weights, "in_proj", self._norm(weights, "input_norm", x.to(gate.dtype))).to(gate.dtype)
        qkv = _project(weights, "qkv_proj", self._norm(weights, "attn_norm", u))
        if positions is not None:
            q, k, v = qkv.to(gate.dtype).chunk(3, 2)
            qkv = torch.cat([self._rotate(q, positions), self._rotate(k, positions), v], 2)
        u = u + _project(weights, "o_proj", self._attend(qkv, layout))
        z = self._norm(weights, "mlp_norm", u).to(weights["up_proj.weight"].dtype)
        hidden = F.silu(_project(weights, "gate_proj", z).to(gate.dtype)) * _project(weights, "up_proj", z)
        u = u + _project(weights, "down_proj", hidden)
        return torch.sigmoid(gate)[:, None, None] * _project(weights, "out_proj", u)

    def _weights(self, layers: slice, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """By names as in a checkpoint, matrices transposed; queries', keys' and values' projections as one."""

        def parameter(name: str) -> Tensor:
            tensor: Tensor = getattr(self, _attribute(name))
            return tensor if layers == slice(None) else tensor[layers]

        found = {name: parameter(name) for name in self.config.layer_shapes()}
        for kind in ("weight", "bias"):
            found[f"qkv_proj.{kind}"] = torch.cat([found.pop(f"{part}_proj.{kind}") for part in "qkv"], 1)
        for name, tensor in found.items():
            if "_proj." in name:
                tensor = tensor if dtype is None else tensor.to(dtype)
                found[name] = tensor.transpose(1, 2) if name.endswith("weight") else tensor[:, None]
            elif "norm." in name:
                found[name] = tensor[:, None]
        return found

    def _norm(self, weights: Mapping[str, Tensor], name: str, y: Tensor) -> Tensor:
        return F.rms_norm(y, y.shape[2:], eps=self.config.norm_eps) * weights[f"{name}.weight"]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE of each head in x [layers, rows, d_p]; i pairs with i + half. ValueError for heads of odd size."""
        half, odd = divmod(self.config.processor_dim // self.config.processor_heads, 2)
        if odd:
            raise ValueError(f"positions need Processor heads of even size, not {2 * half + 1}")
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angles = (positions[..., None] * 10000.0**-steps).to(x.dtype)[:, :, None]
        first, second = x.view(*x.shape[:2], self.config.processor_heads, -1).chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(2)

    def _attend(self, qkv: Tensor, layout: RowLayout) -> Tensor:
        """Attention without a causal mask within each sequence; [layers, rows, 3 * d_p] -> [layers, rows, d_p]."""
        layers, heads, sequences = len(qkv), self.config.processor_heads, len(layout.lengths)
        width, mask = qkv.shape[2] // 3, None
        if layout.padding is not None:
            # Only here are sequences padded to one length.
            padding = layout.padding.bool().expand(layers, -1, -1).reshape(layers * sequences, 1, 1, -1)
            mask = torch.zeros(padding.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(padding, -torch.inf)
            qkv = _Pad.apply(qkv, layout)  # type: ignore[no-untyped-call]
        split = qkv.view(layers * sequences, layout.size, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.transpose(1, 2).reshape(layers, sequences * layout.size, width)
        return out if layout.slots is None else out.index_select(1, layout.slots)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for i in range(self.config.num_layers):
            for name in self.config.layer_shapes():
                tensor = getattr(self, _attribute(name))
                destination[f"{prefix}layers.{i}.{name}"] = (tensor if keep_vars else tensor.detach())[i]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = {f"{prefix}{name}": shape for name, shape in self.config.tensor_shapes().items()}
        missing_keys += [key for key in expected if key not in state_dict]
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in expected]
        for key, shape in expected.items():
            if key not in state_dict:
                continue
            value = state_dict[key]
            if tuple(value.shape) != shape:
                error_msgs.append(f"{key} has shape {list(value.shape)}, but it must be {list(shape)}")
                continue
            _, layer, name = key.removeprefix(prefix).split(".", 2)
            with torch.no_grad():
                getattr(self, _attribute(name))[int(layer)].copy_(value)


def _project(weights: Mapping[str, Tensor], name: str, y: Tensor) -> Tensor:
    """In the weights' dtype."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = y.to(weight.dtype)
    return torch.bmm(y, weight) if bias is None else torch.baddbmm(bias, y, weight)


def _attribute(name: str) -> str:
    """The module's parameter for a checkpoint tensor: names of parameters cannot hold dots."""
    return name.replace(".", "_")
