"""Query capture: QueryCache.capture against a loop in Python; emulation/parity.py runs it on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError

from .cases import DTYPES

BACKENDS = [b["name"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"]


def check_capture(
    backend: str, *, dtype: str, heads: int, head_dim: int, page_size: int, num_tokens: int, padding: int, layout: str,
    seed: int,
) -> None:  # fmt: skip
    """Random slots, some negative, in blocks of which some have no page: exactly the mapped rows are written."""
    rng = np.random.default_rng(seed)
    num_blocks, num_pages, num_layers = 7, 5, 2
    generator = torch.Generator().manual_seed(seed)
    size = (num_tokens + padding, heads, head_dim)
    query = torch.randn(size, generator=generator).to(DTYPES[dtype])
    if layout == "strided":
        wide = torch.randn(size[0], heads, 2 * head_dim + 1, generator=generator).to(DTYPES[dtype])
        query = wide[..., 1::2]
    pages = [torch.full((num_pages, page_size, heads, head_dim), 7.0).to(DTYPES[dtype]) for _ in range(num_layers)]
    if layout == "strided":
        pages = [torch.full((num_pages, heads, head_dim, page_size), 7.0).to(DTYPES[dtype]) for _ in range(num_layers)]
        pages = [page.permute(0, 3, 1, 2) for page in pages]
    slots = rng.permutation(num_blocks * page_size)[: min(num_tokens, num_blocks * page_size)].astype(np.int64)
    slots[rng.random(len(slots)) < 0.2] = -1
    block_to_page = np.full(num_blocks, -1, np.int32)
    block_to_page[rng.permutation(num_blocks)[:num_pages]] = rng.permutation(num_pages)
    wanted = pages[1].clone()
    for token, slot in enumerate(slots):
        if slot >= 0 and block_to_page[slot // page_size] >= 0:
            wanted[block_to_page[slot // page_size], slot % page_size] = query[token]
    untouched = pages[0].clone()

    cache = bottleneck_ext.QueryCache(pages)
    cache.capture(1, query, slots, block_to_page, workspace=bottleneck_ext.Workspace(1, backend))
    assert torch.equal(pages[1], wanted)
    assert torch.equal(pages[0], untouched)


captures = {
    "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
    "heads": st.integers(1, 5),
    "head_dim": st.sampled_from([1, 7, 16, 64, 96]),
    "page_size": st.sampled_from([1, 4, 16]),
    "num_tokens": st.integers(0, 40),
    "padding": st.integers(0, 3),
    "layout": st.sampled_from(["plain", "strided"]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60, deadline=None, print_blob=True)
@given(backend=st.sampled_from(BACKENDS), **captures)
def test_capture(backend: str, **capture) -> None:
    check_capture(backend, **capture)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"slots": np.array([3, 28], np.int64)}, r"slots\[1\] is 28, in block 7; block_to_page has 7"),
        ({"slots": np.arange(9, dtype=np.int64)}, "9 slots for 8 tokens"),
        ({"slots": np.arange(8, dtype=np.int32)}, "slots is int32; it must be int64"),
        ({"block_to_page": np.full(7, 5, np.int32)}, r"block_to_page\[0\] is 5; there are 5 pages"),
        ({"query": torch.zeros(8, 2, 8, dtype=torch.float16)}, "queries is float32|pages is float32"),
        ({"query": torch.zeros(8, 3, 8)}, "dimension 2 of pages is 2; it must be 3"),
        ({"query": torch.zeros(8, 16)}, "query has 2 dimensions"),
        ({"layer": 2}, "layer is 2; there are 2 layers"),
    ],
)
def test_refusals_write_nothing(changes: dict, match: str) -> None:
    pages = [torch.full((5, 4, 2, 8), 7.0) for _ in range(2)]
    arguments = {
        "layer": 0,
        "query": torch.zeros(8, 2, 8),
        "slots": np.arange(8, dtype=np.int64),
        "block_to_page": np.zeros(7, np.int32),
    } | changes
    with pytest.raises(InvalidArgumentError, match=match):
        bottleneck_ext.QueryCache(pages).capture(**arguments, workspace=bottleneck_ext.Workspace())
    assert all((page == 7).all() for page in pages)


def test_a_moved_page_is_refused() -> None:
    page = torch.zeros(2, 4, 1, 8)
    cache = bottleneck_ext.QueryCache([page])
    page.set_(torch.zeros(2, 4, 1, 8))
    with pytest.raises(InvalidArgumentError, match="layer 0 moved"):
        cache.capture(0, torch.zeros(1, 1, 8), np.zeros(1, np.int64), np.zeros(1, np.int32),
                      workspace=bottleneck_ext.Workspace())  # fmt: skip
