"""Query capture: QueryCache.capture against a loop in Python; emulation/parity.py runs it on the emulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError

from .cases import LAYOUTS, Capture, CaptureShape, make_capture

BACKENDS = [b["name"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"]


def bind_capture(case: Capture, backend: str) -> Callable[..., None]:
    """A function that captures all layers; it takes capture's stream."""
    cache, workspace = bottleneck_ext.QueryCache(case.pages), bottleneck_ext.Workspace(1, backend)

    def capture(**options: Any) -> None:
        for layer, query in enumerate(case.queries):
            cache.capture(layer, query, case.slots, case.block_to_page, workspace=workspace, **options)

    return capture


def capture_in_a_loop(case: Capture) -> Capture:
    """What must become of it, in its own pages."""
    shape = case.shape
    for query, pages in zip(case.queries, case.pages, strict=True):
        for token, slot in enumerate(case.slots.tolist()):
            block = slot // shape.page_size
            page = int(case.block_to_page[block]) if 0 <= block < shape.num_blocks else -1
            if 0 <= page < shape.num_pages:
                pages[page, slot % shape.page_size] = query[token]
    return case


def check_capture(backend: str, shape: CaptureShape, device: str = "cpu") -> None:
    """Exactly the mapped rows are written: every byte is looked at, and nothing is rounded."""
    case, expected = make_capture(shape).to(device), capture_in_a_loop(make_capture(shape))
    bind_capture(case, backend)()
    assert case.same_bytes(expected)


capture_shapes = st.builds(
    CaptureShape,
    num_tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 7, 16, 20, 64, 96]),
    page_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(1, 9),
    num_pages=st.integers(1, 9),
    padding=st.integers(0, 3),
    layout=st.sampled_from(LAYOUTS),
    query_layout=st.sampled_from(["plain", "strided", "qkv"]),
    strided_tables=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(backend=st.sampled_from(BACKENDS), shape=capture_shapes)
def test_capture(backend: str, shape: CaptureShape) -> None:
    check_capture(backend, shape)


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
