"""The definition of the rewrite (arXiv 2505.16950) in NumPy float64: the oracle of every test.

Notation, sizes and positions:
    keys, values   [num_blocks, block_size, num_kv_heads, head_dim], one array per layer
    position p     of a sequence is in block block_table[p // block_size], row p % block_size
    queries        [num_pages, page_size, num_query_heads, head_dim], one array per layer; position p is in
                   page query_table[(p // page_size) % len(query_table)], row p % page_size (a ring)
    window         the last `recent_window` positions of the step [step_begin, step_end)
    prior          [sequence_begin, window_begin): what can be recalled
    rows           the selected positions, recalled and window, ascending
    C              2 * num_kv_heads * head_dim: keys over KV heads, then values over KV heads

Arrays of other dtypes are widened to float64 first. bfloat16 is no NumPy dtype: it enters as float32.
"""

# mypy: disable-error-code="no-any-return"
# (NumPy types arithmetic on arrays of any dtype as Any.)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .boundary import BoundaryEvent
from .config import CacheProcessorConfig

Array = npt.NDArray[Any]
DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Rewrite:
    """What `rewrite` computed, in float64: round `keys` and `values` to the cache's dtype with `round_to`.

    keys, values: per layer, shaped as given; positions that were not selected are equal to the input.
    recalled: per event, int64 [num_layers, min(top_k, prior)], the recalled cache positions, ascending.
    delta: per event, [num_layers, rows, C], the gated edit as it was added to the cache.
    """

    keys: list[Array]
    values: list[Array]
    recalled: list[Array]
    delta: list[Array]


def rewrite(
    config: CacheProcessorConfig,
    weights: Mapping[str, Array],
    keys: Sequence[Array],
    values: Sequence[Array],
    queries: Sequence[Array],
    events: Sequence[BoundaryEvent],
    block_table: Array | None = None,
    query_table: Array | None = None,
    softmax_scale: float | None = None,
    operands: DType | None = None,
) -> Rewrite:
    """One boundary of every event's sequence, layer by layer (section 3): select, process, gated write.

    block_table, query_table: [num_sequences, blocks or pages of each]; default: sequence s has number s.
    softmax_scale: of the backbone's attention, default 1 / sqrt(head_dim). operands: see `processor_block`.
    The inputs are not changed.
    """
    scale = config.head_dim**-0.5 if softmax_scale is None else softmax_scale
    block_table = np.arange(len(keys[0]))[:, None] if block_table is None else block_table
    query_table = np.arange(len(queries[0]))[:, None] if query_table is None else query_table
    new_keys, new_values = ([np.array(layer, np.float64) for layer in cache] for cache in (keys, values))
    result = Rewrite(new_keys, new_values, [], [])
    for event in events:
        blocks, pages = block_table[event.sequence], query_table[event.sequence]
        window = np.arange(event.window_begin(config.recent_window), event.step_end)
        seen = np.arange(event.sequence_begin, event.step_end)
        recalled, delta = [], []
        for layer, (k, v) in enumerate(zip(new_keys, new_values, strict=True)):
            mass = attention_mass(gather(queries[layer], pages, window), gather(k, blocks, seen), scale)
            recalled.append(seen[select_top_k(mass, config.top_k)])
            rows = np.concatenate([recalled[-1], window])

            x = np.stack([gather(k, blocks, rows), gather(v, blocks, rows)], axis=1)
            if config.key_space == "unrotated":
                positions = (rows - event.sequence_begin).astype(np.float32)  # float32, as in the backbone
                angles = np.outer(positions, np.array(config.inv_freq(), np.float32)).astype(np.float64)
                x[:, 0] = rotate(x[:, 0], -angles)
            of_layer = {name: weights[f"layers.{layer}.{name}"] for name in config.layer_shapes()}
            edit = processor_block(config, of_layer, x.reshape(len(rows), -1), operands).reshape(x.shape)
            if config.key_space == "unrotated":
                edit[:, 0] = rotate(edit[:, 0], angles)
            add(k, blocks, rows, edit[:, 0])
            add(v, blocks, rows, edit[:, 1])
            delta.append(edit.reshape(len(rows), -1))
        result.recalled.append(np.array(recalled))
        result.delta.append(np.array(delta))
    return result


def attention_mass(queries: Array, keys: Array, scale: float) -> Array:
    """Attention mass alpha of every prior position (section 3): its mean attention from the window.

    queries [window, num_query_heads, head_dim], of the last positions of keys [seen, num_kv_heads, head_dim].
    Each query's softmax runs over the keys up to its own, as in the backbone. Returns [seen - window].
    """
    window, num_heads, _ = queries.shape
    prior = len(keys) - window
    future = np.arange(len(keys)) > prior + np.arange(window)[:, None]
    mass = np.zeros(prior)
    for head in range(num_heads):
        kv_head = head // (num_heads // keys.shape[1])  # grouped-query attention
        scores = scale * (queries[:, head].astype(np.float64) @ keys[:, kv_head].astype(np.float64).T)
        mass += softmax(np.where(future, -np.inf, scores))[:, :prior].sum(axis=0)
    return mass / (window * num_heads)


def select_top_k(mass: Array, k: int) -> Array:
    """Indices of the k largest masses (or of all), ascending (section 3); of equal ones the smaller wins."""
    return np.sort(np.argsort(-mass, kind="stable")[:k])


def processor_block(
    config: CacheProcessorConfig, weights: Mapping[str, Array], x: Array, operands: DType | None = None
) -> Array:
    """One layer's Processor (section 3): x [rows, C] -> the gated edit sigmoid(gate) * delta [rows, C].

    weights: of this layer, named as in `config.layer_shapes()`. No causal mask: all rows see each other.
    operands: both factors of every product with a weight are first rounded to this dtype; sums stay float64.
    """

    def project(name: str, y: Array) -> Array:
        weight = weights[f"{name}.weight"]
        if operands is not None:
            y, weight = round_to(y, operands), round_to(weight, operands)
        return y.astype(np.float64) @ weight.astype(np.float64).T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, y: Array) -> Array:
        return y / np.sqrt((y * y).mean(axis=1, keepdims=True) + config.norm_eps) * weights[f"{name}.weight"]

    def heads(y: Array) -> Array:
        return y.reshape(len(y), config.processor_heads, -1).swapaxes(0, 1)

    u = project("in_proj", norm("input_norm", x.astype(np.float64)))
    y = norm("attn_norm", u)
    q, k, v = heads(project("q_proj", y)), heads(project("k_proj", y)), heads(project("v_proj", y))
    attention = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])) @ v
    u = u + project("o_proj", attention.swapaxes(0, 1).reshape(u.shape))
    z = norm("mlp_norm", u)
    gate = project("gate_proj", z)
    u = u + project("down_proj", gate * sigmoid(gate) * project("up_proj", z))
    return sigmoid(np.float64(weights["gate"])) * project("out_proj", u)


def softmax(scores: Array) -> Array:
    """Over the last axis; -inf is masked out."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(x: Any) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def rotate(x: Array, angles: Array) -> Array:
    """RoPE of x [rows, heads, head_dim] by angles [rows, head_dim / 2]; i pairs with i + head_dim / 2."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def gather(pages: Array, table: Array, positions: Array) -> Array:
    """Rows of pages [num_pages, page_size, heads, head_dim] at positions: float64 [rows, heads, head_dim]."""
    page, row = np.divmod(positions, pages.shape[1])
    return pages[table[page % len(table)], row].astype(np.float64)


def add(pages: Array, table: Array, positions: Array, edit: Array) -> None:
    """The gated write (section 3), in place. A zero edit leaves the old value, even a -0."""
    page, row = np.divmod(positions, pages.shape[1])
    old = pages[table[page], row]
    pages[table[page], row] = np.where(edit == 0, old, old + edit)


def round_to(x: npt.ArrayLike, dtype: DType) -> Array:
    """Round once to the nearest number of `dtype`, ties to even; a too large one becomes infinity.

    Returns float32, which holds all numbers of the three dtypes (rounding by way of it would round twice).
    """
    # Bits of precision, exponent (frexp's) of the smallest normal number, largest number.
    precision, smallest, largest = {
        "float32": (24, -125, (1 - 2.0**-24) * 2.0**128),
        "float16": (11, -13, (1 - 2.0**-11) * 2.0**16),
        "bfloat16": (8, -125, (1 - 2.0**-8) * 2.0**128),
    }[dtype]
    x = np.asarray(x, np.float64)
    spacing = np.ldexp(1.0, np.maximum(np.frexp(x)[1], smallest) - precision)
    rounded = np.rint(x / spacing) * spacing
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, x), rounded).astype(np.float32)
