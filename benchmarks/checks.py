"""That implementations compute the same, before any of them is timed. Raises SystemExit naming what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Setting
from bottlenecked import reference

# Relative to the size of what is compared: (masses, edits). Between bfloat16 implementations every product rounds, and
# the edit is read from a cache that rounds it once more.
_TOLERANCES = {"float32": (1e-4, 1e-3), "float16": (1e-2, 3e-2), "bfloat16": (3e-2, 1e-1)}


@dataclass(frozen=True)
class Rewritten:
    """recalled [num_layers, batch, k]; keys and values per layer [batch, num_kv_heads, T, head_dim], afterwards."""

    recalled: np.ndarray
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


def refuse(setting: Setting | str, what: str) -> NoReturn:
    raise SystemExit(f"not measured ({setting}): {what}")


def close(setting: Setting | str, who: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Euclidean norm of the difference over that of `expected`."""
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not error <= tolerance:
        refuse(setting, f"{who} is off by {error:.2g} of its size, more than {tolerance:g}")


def masses(inputs: Inputs, who: str, got: Tensor, expected: Tensor) -> None:
    """Attention masses [num_layers, batch, prior]."""
    close(inputs.setting, who, got, expected, _TOLERANCES[inputs.setting.dtype][0])


def reference_masses(inputs: Inputs, mass: np.ndarray) -> None:
    """Our mass [num_layers, batch, prior] against the float64 definition, first and last layer, first sequence."""
    tolerance = _TOLERANCES[inputs.setting.dtype][0]
    step = inputs.events[0]
    rows = np.arange(step.step_begin, step.step_end) % inputs.config.recent_window
    for layer in {0, inputs.config.num_layers - 1}:
        expected = reference.attention_mass(
            inputs.queries[layer][0, rows].float().cpu().numpy(),
            inputs.pristine_keys[layer][0].transpose(0, 1).float().cpu().numpy(),
            inputs.config.head_dim**-0.5,
        )
        got = torch.from_numpy(mass[layer, 0])
        close(inputs.setting, f"our attention mass of layer {layer}", got, torch.from_numpy(expected), tolerance)


def reference_rewrite(inputs: Inputs, ours: Rewritten, mass: np.ndarray) -> None:
    """Our rewrite against the float64 definition: first and last layer, first sequence; the baselines see the rest."""
    config = inputs.config
    for layer in sorted({0, config.num_layers - 1}):

        def array(tensors: Sequence[Tensor], layer: int = layer) -> np.ndarray:
            return tensors[layer][:1].float().cpu().numpy()

        weights = {f"layers.0.{name}": inputs.weights[f"layers.{layer}.{name}"] for name in config.layer_shapes()}
        expected = reference.rewrite(
            config,
            weights,
            [array(inputs.pristine_keys).swapaxes(1, 2)],
            [array(inputs.pristine_values).swapaxes(1, 2)],
            [array(inputs.queries)],
            inputs.events[:1],
            operands=None if inputs.setting.weight_dtype == "float32" else "bfloat16",
        )
        of_layer = Rewritten(
            expected.recalled[0][:, None],
            [torch.from_numpy(expected.keys[0].swapaxes(1, 2))],
            [torch.from_numpy(expected.values[0].swapaxes(1, 2))],
        )
        _same_layer(inputs, "ours and the reference", layer, ours, layer, of_layer, 0, mass)


def same_rewrite(inputs: Inputs, who: str, ours: Rewritten, other: Rewritten, mass: np.ndarray) -> None:
    """Two rewrites of every layer and sequence. mass [num_layers, batch, prior] of the cache before.

    Recalled positions may differ where their masses agree within rounding; edits are compared over the rows that both
    rewrote.
    """
    if ours.recalled.shape != other.recalled.shape:
        refuse(inputs.setting, f"{who}: recalled positions have shapes {ours.recalled.shape}, {other.recalled.shape}")
    for layer in range(inputs.config.num_layers):
        _same_layer(inputs, who, layer, ours, layer, other, layer, mass)


def _same_layer(
    inputs: Inputs,
    who: str,
    layer: int,
    ours: Rewritten,
    ours_layer: int,
    other: Rewritten,
    other_layer: int,
    mass: np.ndarray,
) -> None:
    """layer: of the backbone. Sequences that `other` has. ours_layer, other_layer: where the two keep it."""
    setting = inputs.setting
    mass_tolerance, edit_tolerance = _TOLERANCES[setting.dtype]
    for sequence in range(other.recalled.shape[1]):
        where = f"layer {layer}, sequence {sequence}"
        a, b = ours.recalled[ours_layer, sequence], other.recalled[other_layer, sequence]
        of = mass[layer, sequence]
        if len(a) != len(b) or (len(a) and abs(of[a].min() - of[b].min()) > mass_tolerance * of[b].min()):
            refuse(setting, f"{who} differ: {where}, recalled {a.tolist()} and {b.tolist()}")
        rows = sorted(set(a.tolist()) & set(b.tolist())) + list(range(setting.prior, setting.prior + setting.step))

        def edit(keys: Tensor, values: Tensor, sequence: int = sequence, rows: list[int] = rows) -> Tensor:
            pairs = (keys, inputs.pristine_keys[layer]), (values, inputs.pristine_values[layer])
            # Of other implementations the caches may be elsewhere.
            of_rows = [(x[sequence][:, rows].cpu(), y[sequence][:, rows].cpu()) for x, y in pairs]
            return torch.cat([x.double() - y.double() for x, y in of_rows])

        close(
            setting,
            f"{who} differ: {where}, the edit",
            edit(other.keys[other_layer], other.values[other_layer]),
            edit(ours.keys[ours_layer], ours.values[ours_layer]),
            edit_tolerance,
        )
