"""CacheProcessorModule: the Processor (arXiv 2505.16950) in differentiable PyTorch, for training.

It maps KV rows to their gated edits and knows nothing of caches. Its caller selects the rows, undoes RoPE on
their keys and redoes it on the edits where `config.key_space` is "unrotated", and adds the edits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_weights, initial_weights, load_weights, save_checkpoint
from .config import CacheProcessorConfig


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

    def forward(self, x: Tensor, row_lengths: Sequence[int] | None = None, positions: Tensor | None = None) -> Tensor:
        """The gated edits sigmoid(gate) * delta of all layers (section 3).

        x: [num_layers, rows, C], the selected KV rows of one or more sequences, one after the other, each
            ascending by position: keys over KV heads, then values over KV heads. Converted to the parameters'
            dtype (float32 unless the module was converted).
        row_lengths: rows of each sequence, 1 or more, summing to `rows`; default: one sequence. A sequence's
            rows see only each other.
        positions: an ablation that checkpoints cannot express: integers [num_layers, rows]; the block's queries and
            keys are rotated by them (RoPE, base 10000).

        Under `torch.autocast` products are of its dtype, and everything between them stays in the parameters'.
        Returns the edits, [num_layers, rows, C], in the parameters' dtype. ValueError where a shape is wrong.
        """
        return self._edits(x, row_lengths, slice(None), positions)

    def forward_layer(self, layer: int, x: Tensor, row_lengths: Sequence[int] | None = None) -> Tensor:
        """`forward` for one layer: x [rows, C] -> its gated edits [rows, C]."""
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer is {layer}, but it must be from 0 to {self.config.num_layers - 1}")
        return self._edits(x[None], row_lengths, slice(layer, layer + 1))[0]

    def _edits(
        self, x: Tensor, row_lengths: Sequence[int] | None, layers: slice, positions: Tensor | None = None
    ) -> Tensor:
        config, shapes = self.config, self.config.layer_shapes()

        def parameter(name: str) -> Tensor:
            tensor: Tensor = getattr(self, _attribute(name))
            return tensor[layers]

        def norm(name: str, y: Tensor) -> Tensor:
            weight = parameter(f"{name}.weight")[:, None]
            return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.norm_eps) * weight

        def project(name: str, y: Tensor) -> Tensor:
            weight = parameter(f"{name}.weight").transpose(1, 2)
            if f"{name}.bias" in shapes:
                product = torch.baddbmm(parameter(f"{name}.bias")[:, None], y, weight)
            else:
                product = torch.bmm(y, weight)
            return product.to(y.dtype)

        gate = parameter("gate")
        if x.dim() != 3 or x.shape[0] != len(gate) or x.shape[1] < 1 or x.shape[2] != config.kv_width:
            raise ValueError(
                f"x has shape {list(x.shape)}, but it must be [{len(gate)} layers, rows, {config.kv_width}]"
            )
        row_lengths = [x.shape[1]] if row_lengths is None else [int(n) for n in row_lengths]
        if min(row_lengths, default=0) < 1 or sum(row_lengths) != x.shape[1]:
            raise ValueError(f"row_lengths {row_lengths} must be 1 or more each and sum to {x.shape[1]} rows")

        u = project("in_proj", norm("input_norm", x.to(gate.dtype)))
        y = norm("attn_norm", u)
        q, k, v = project("q_proj", y), project("k_proj", y), project("v_proj", y)
        if positions is not None:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        u = u + project("o_proj", self._attend(q, k, v, row_lengths))
        z = norm("mlp_norm", u)
        u = u + project("down_proj", F.silu(project("gate_proj", z)) * project("up_proj", z))
        return torch.sigmoid(gate)[:, None, None] * project("out_proj", u)

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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, row_lengths: Sequence[int]) -> Tensor:
        """Attention without a causal mask within each sequence; everything [layers, rows, d_p]."""
        layers, _, width = q.shape
        heads, sequences, longest = self.config.processor_heads, len(row_lengths), max(row_lengths)
        lengths = torch.tensor(row_lengths, device=q.device)
        ragged = min(row_lengths) < longest
        # Only here are sequences padded to one length; `real` tells the rows from the padding.
        real = (torch.arange(longest, device=q.device) < lengths[:, None]).flatten()
        where = real.nonzero()[:, 0]

        def split(t: Tensor) -> Tensor:
            if ragged:
                t = t.new_zeros(layers, sequences * longest, width).index_copy(1, where, t)
            return t.view(layers * sequences, longest, heads, width // heads).transpose(1, 2)

        mask = real.view(1, sequences, 1, 1, longest).expand(layers, -1, -1, -1, -1).flatten(0, 1)
        out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask if ragged else None)
        out = out.transpose(1, 2).reshape(layers, sequences * longest, width)
        return out.index_select(1, where) if ragged else out

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


def _attribute(name: str) -> str:
    """The module's parameter for a checkpoint tensor: names of parameters cannot hold dots."""
    return name.replace(".", "_")
