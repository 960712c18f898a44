"""vLLM's cache tensors as views of keys and values [num_blocks, block_size, num_kv_heads, head_dim]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bottleneck_ext import UnsupportedError

# How the CPU attention of vLLM 0.29 to 0.32 stores a block of one head: keys [head_dim, block_size], then values
# [block_size, head_dim], behind a tensor of the shape [num_blocks, num_kv_heads, block_size, 2 * head_dim].
_COLUMN_MAJOR_ISAS = ("vec", "vec16")


def key_value_views(name: str, layer: Any, cache: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, in place.

    name, layer: the attention layer as vLLM calls it. cache: [num_blocks, num_kv_heads, block_size, 2 * head_dim], any
        strides, as `register_kv_caches` hands it over. block_size: of vLLM's block tables.

    Raises UnsupportedError for a layout that was not tested.
    """
    if cache.ndim != 4 or cache.shape[2] != block_size:
        raise UnsupportedError(
            f"the KV cache of {name} has the shape {tuple(cache.shape)}; [num_blocks, num_kv_heads, {block_size}, "
            "2 * head_dim] was expected: choose another attention backend or --block-size"
        )
    if cache.device.type != "cpu":
        head_dim = cache.shape[3] // 2
        tokens_first = cache.transpose(1, 2)
        return tokens_first[..., :head_dim], tokens_first[..., head_dim:]
    isa = getattr(layer, "isa", None)
    blocks, heads, rows, width = cache.shape
    strides = (cache.stride(0), rows * width, width, 1)
    if isa not in _COLUMN_MAJOR_ISAS or cache.stride() != strides or width % 2:
        remedy = "use --dtype float32 or float16" if isa == "amx" else "use an x86 machine without AMX"
        raise UnsupportedError(
            f"the CPU attention of {name} keeps its cache in the form {isa!r} with strides {cache.stride()}, which is "
            f"not known: {remedy}"
        )
    head_dim = width // 2
    begin = cache.storage_offset()
    keys = torch.as_strided(cache, (blocks, rows, heads, head_dim), (strides[0], 1, strides[1], rows), begin)
    values = torch.as_strided(
        cache, (blocks, rows, heads, head_dim), (strides[0], head_dim, strides[1], 1), begin + rows * head_dim
    )
    return keys, values
