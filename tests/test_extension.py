"""bottleneck_ext: borrowing, refusals, ownership, threads. Numbers are judged in test_parity.py."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import bottleneck_ext
from bottleneck_ext import (
    BottleneckError,
    DeviceError,
    InvalidArgumentError,
    RebuildNeededError,
    UnsupportedError,
)
from bottlenecked import BoundaryEvent, CacheProcessor
from bottlenecked.processor import BoundCache

from .cases import LAYOUTS, Case, Shape, make_case

SHAPE = Shape(lengths=((0, 30, 9), (3, 22, 5)), block_size=8)
AVAILABLE = [b["name"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"]
CUDA = any(b["available"] for b in bottleneck_ext.backends() if b["backend"] == "cuda")


@pytest.fixture
def case() -> Case:
    return make_case(SHAPE)


def refused(case: Case, match: str, error: type[Exception] = InvalidArgumentError, processor=None, **changes):
    """The call raises, the sentence says why, and not one byte behind the caches changed."""
    processor = processor or case.processor()
    arguments = {
        "keys": case.keys,
        "values": case.values,
        "queries": case.queries,
        "query_table": case.query_table,
        "softmax_scale": None,
    }
    events = changes.pop("events", case.events)
    block_table = changes.pop("block_table", case.block_table)
    arguments.update(changes)
    before = case.snapshot()
    with pytest.raises(error, match=match):
        processor.bind(**arguments, workspace=processor.workspace()).rewrite(events, block_table)
    for pool, old in zip(case.pools, before, strict=True):
        assert torch.equal(pool.view(torch.uint8), old.view(torch.uint8))


def test_exceptions_are_the_documented_ones() -> None:
    assert issubclass(InvalidArgumentError, BottleneckError)
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(DeviceError, RuntimeError)
    assert issubclass(RebuildNeededError, RuntimeError)
    assert not issubclass(BottleneckError, ValueError)


@pytest.mark.parametrize("lengths", [((0, 60, 9), (3, 22, 5)), ((0, 300, 5),) * 40])
def test_a_step_may_recall_fewer(lengths: tuple) -> None:
    """top_k of an event: as a Processor of that top_k, bit for bit, also where the steps make many chunks."""
    shape = replace(SHAPE, lengths=lengths, top_k=32)
    for fewer in (0, 1, 3):
        ours, theirs = make_case(shape), make_case(shape)
        ours.events = [replace(event, top_k=fewer) for event in ours.events]
        theirs.config = replace(theirs.config, top_k=fewer)
        report = ours.rewrite(ours.processor())
        assert [r.shape for r in report.recalled] == [(2, fewer)] * len(lengths)
        expected = theirs.rewrite(theirs.processor())
        assert all((a == b).all() for a, b in zip(report.recalled, expected.recalled, strict=True))
        for a, b in zip(ours.pools, theirs.pools, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_step_may_not_recall_more(case: Case) -> None:
    for more in (5, 2**63 - 1):
        refused(case, f"step 1 is to recall {more} positions; its top_k must be 0 to 4",
                events=[case.events[0], replace(case.events[1], top_k=more)])  # fmt: skip
    for negative in (-1, -2, -(2**63)):
        refused(case, f"step 0 is to recall {negative} positions", events=[replace(case.events[0], top_k=negative)])


def test_rewrite_changes_exactly_the_selected_rows(case: Case) -> None:
    before = case.snapshot()
    report = case.rewrite(case.processor())
    assert [r.shape for r in report.recalled] == [(2, 4), (2, 4)]
    assert report.window_begin == (21, 20)
    assert (report.delta_norm > 0).all()
    for layer in range(2):
        touched = torch.zeros(case.keys[0].shape[:2], dtype=torch.bool)
        for i, event in enumerate(case.events):
            for p in [*report.recalled[i][layer], *range(report.window_begin[i], event.step_end)]:
                touched[case.block_table[event.sequence, p // 8], p % 8] = True
        old = make_case(SHAPE)
        for now, then in ((case.keys[layer], old.keys[layer]), (case.values[layer], old.values[layer])):
            assert torch.equal(now[~touched].view(torch.int32), then[~touched].view(torch.int32))
            assert (now[touched] != then[touched]).any(-1).all()
    assert any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


# ---- what is refused -----------------------------------------------------------------------------------


def test_wrong_layer_count(case: Case) -> None:
    refused(case, "1 layers; the Processor was made for 2", keys=case.keys[:1], values=case.values[:1])
    refused(case, "keys have 2 layers, values have 1", values=case.values[:1])
    refused(case, "the query cache has 1 layers", queries=case.queries[:1])
    refused(case, "no layers", keys=[], values=[])


def test_wrong_heads_and_head_size(case: Case) -> None:
    refused(case, "keys of layer 0 have 1 KV heads; expected 2", keys=[k[:, :, :1] for k in case.keys])
    refused(case, "values of layer 0 have head size 8; expected 16", values=[v[..., :8] for v in case.values])
    refused(case, "queries of layer 0 have 3 heads of size 16", queries=[q[:, :, :3] for q in case.queries])


def test_wrong_rank_dtype_device(case: Case) -> None:
    refused(case, "keys of layer 1 have 3 dimensions", keys=[case.keys[0], case.keys[1][0]])
    refused(
        case,
        "values of layer 1 are float16, keys of layer 0 are float32",
        values=[case.values[0], case.values[1].half()],
    )
    refused(case, "queries of layer 0 are bfloat16", queries=[q.bfloat16() for q in case.queries])
    refused(case, r"its dtype \(DLPack code 2, 64 bits\)", keys=[k.double() for k in case.keys])
    refused(case, "keys of layer 0 are int32", keys=[k.int() for k in case.keys])
    refused(case, "cannot be exported through DLPack", keys=[k.to("meta") for k in case.keys])
    refused(case, "no __dlpack__", TypeError, keys=[[1.0]], values=[[1.0]])
    refused(case, "cannot be exported", keys=[k.clone().requires_grad_() for k in case.keys])


def test_blocks_differ_between_layers(case: Case) -> None:
    refused(case, "all layers share one block table", keys=[case.keys[0], case.keys[1][:-1]])
    refused(case, "another number of pages", queries=[case.queries[0], case.queries[1][:-1]])


def test_overlapping_and_zero_strides(case: Case) -> None:
    one = case.keys[0][:1]
    refused(case, "zero or overlapping strides", keys=[case.keys[0], one.expand(case.keys[0].shape)])
    flat = torch.zeros(10000)
    overlapping = flat.as_strided(case.keys[0].shape, (200, 16, 8, 1))
    refused(case, "keys of layer 1 have zero or overlapping", keys=[case.keys[0], overlapping])
    refused(
        case,
        "keys of layer 0 and values of layer 1 are the same memory",
        values=[case.values[0], case.keys[0]],
    )


def test_read_only_arrays_are_refused_where_we_write(case: Case) -> None:
    frozen = [k.numpy().copy() for k in case.keys]
    for array in frozen:
        array.flags.writeable = False
    refused(case, "keys of layer 0 are read-only", keys=frozen)
    processor = case.processor()
    queries = [q.numpy().copy() for q in case.queries]
    for array in queries:
        array.flags.writeable = False
    bound = processor.bind(
        case.keys, case.values, queries, workspace=processor.workspace(), query_table=case.query_table
    )
    bound.rewrite(case.events, case.block_table)  # read only where we read: fine
    out = np.zeros((2, 2), np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="delta_norm is read-only"):
        processor.native.rewrite(
            bound.kv_cache, bound.query_cache, [(0, 0, 21, 30), (1, 3, 20, 25)], case.block_table,
            workspace=bound.workspace, delta_norm=out,
        )  # fmt: skip


@pytest.mark.parametrize("entry", [-1, 1 << 30, 15])
def test_block_table_entries_out_of_range(case: Case, entry: int) -> None:
    assert case.keys[0].shape[0] == 15
    table = case.block_table.copy()
    table[1, 1] = entry
    refused(case, rf"block_table\[1, 1\] is {entry}; there are 15 blocks", block_table=table)


@pytest.mark.parametrize("entry", [-1, 3])
def test_query_table_entries_out_of_range(case: Case, entry: int) -> None:
    table = case.query_table.copy()
    table[0, 0] = entry
    refused(case, rf"query_table\[0, 0\] is {entry}; there are 3 pages", query_table=table)


def test_tables_of_the_wrong_kind(case: Case) -> None:
    refused(case, "block_table is int64; it must be int32", block_table=case.block_table.astype(np.int64))
    refused(case, "block_table has 1 dimensions", block_table=case.block_table[0])
    refused(case, "block_table is empty", block_table=case.block_table[:, :0])
    refused(case, "rows of the block_table have stride", block_table=np.asfortranarray(case.block_table))
    refused(case, "block_table has 3 rows, query_table has 2", query_table=case.query_table[:2])


def test_blocks_and_pages_of_two_sequences(case: Case) -> None:
    table = case.block_table.copy()
    table[1, 0] = table[0, 0]
    refused(case, rf"block {table[0, 0]} belongs to sequences 0 and 1", block_table=table)
    table = case.query_table.copy()
    table[1] = table[0]
    refused(case, "page . belongs to sequences 0 and 1", query_table=table)


def test_a_sequence_listed_twice(case: Case) -> None:
    refused(case, "sequence 0 is listed twice", events=[case.events[0], case.events[0]])


@pytest.mark.parametrize(
    ("event", "match"),
    [
        (
            BoundaryEvent(sequence=3, step_begin=0, step_end=4),
            "step 0 is of sequence 3; the tables have 3 rows",
        ),
        (BoundaryEvent(sequence=-1, step_begin=0, step_end=4), "sequence -1"),
        (BoundaryEvent(sequence=0, step_begin=0, step_end=33), "ends at 33; the block table covers 32"),
        (
            BoundaryEvent(sequence=0, step_begin=0, step_end=1 << 40),
            "ends at 1099511627776; positions are below 2\\^31",
        ),
    ],
)
def test_steps_outside_the_cache(case: Case, event: BoundaryEvent, match: str) -> None:
    refused(case, match, events=[event])


@pytest.mark.parametrize("step", [(0, 0, 4, 4), (0, 5, 4, 9), (0, -1, 4, 9), (0, 0, 9, 4), (0, 0, -3, 4)])
def test_malformed_steps(case: Case, step: tuple[int, int, int, int]) -> None:
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    with pytest.raises(InvalidArgumentError, match=r"spans \["):
        processor.native.rewrite(bound.kv_cache, bound.query_cache, [step], case.block_table, workspace=bound.workspace)


def test_query_ring_shorter_than_the_window() -> None:
    case = make_case(Shape(lengths=((0, 60, 40),), recent_window=16))
    refused(
        case,
        "the window of step 0 has 16 positions; the query cache keeps 8",
        queries=[q[:, :8] for q in case.queries],
    )


# The smallest would be zero in float32, which means the default.
@pytest.mark.parametrize("scale", [-1.0, 1e-31, 1e-44, 1e-46, 1e-60, -1e-60, 5e-324, float("nan"), float("inf")])
def test_softmax_scale(case: Case, scale: float) -> None:
    refused(case, "softmax_scale", softmax_scale=scale)


def test_nan_in_the_cache_is_refused_before_the_write(case: Case) -> None:
    case.values[1][case.block_table[1, 2], 2] = float("nan")  # position 18 or so: inside the second window
    table = case.block_table
    for p in range(20, 25):
        case.values[1][table[1, p // 8], p % 8] = float("nan")
    refused(case, "the edit of sequence 1 in layer 1 is not finite")


@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
@pytest.mark.parametrize(
    ("part", "dtype", "value"),
    # Keys of the other dtypes would be too large for attention before an edit is.
    [
        ("values", "float16", 65504.0),
        ("values", "bfloat16", 3.38e38),
        ("values", "float32", 3.4e38),
        ("keys", "float16", 65504.0),
    ],
)
def test_an_edit_that_would_overflow_the_cache_is_refused(part: str, dtype: str, value: float, key_space: str) -> None:
    """Not the edit but its sum with the old value, rounded, is infinite."""
    case = make_case(Shape(lengths=((0, 30, 9),), dtype=dtype, key_space=key_space))
    for name, weight in case.weights.items():
        if "out_proj" in name:
            weight[...] = 0
        if name.endswith("layers.1.out_proj.bias"):
            weight[-1 if part == "values" else len(weight) // 2 - 1] = value / 16
        if name.endswith("gate"):
            weight[...] = 30  # sigmoid 1
    getattr(case, part)[1][0, 25, 1, 15] = value
    refused(case, "the edit of sequence 0 in layer 1 is not finite")


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 65520.0), ("bfloat16", float.fromhex("0x1.ffp127"))])
def test_what_rounds_to_the_largest_number_is_written_and_what_rounds_to_infinity_is_not(
    part: str, dtype: str, limit: float
) -> None:
    """limit: half a unit in the last place above the dtype's largest number, from where on rounding gives infinity."""

    def with_edit(value: np.float32) -> Case:
        case = make_case(Shape(lengths=((0, 1, 1),), dtype=dtype))  # of several rows, the norm would be infinite
        for name, weight in case.weights.items():
            if "out_proj" in name:
                weight[...] = 0
            if name.endswith("layers.1.out_proj.bias"):
                weight[-1 if part == "values" else len(weight) // 2 - 1] = value
            if name.endswith("gate"):
                weight[...] = 30  # sigmoid 1
        getattr(case, part)[1][:, :, 1, 15] = 0
        return case

    below = with_edit(np.nextafter(np.float32(limit), np.float32(0)))
    below.rewrite(below.processor())
    written = getattr(below, part)[1][below.block_table[0, 0], 0, 1, 15]
    assert float(written) == torch.finfo(written.dtype).max
    refused(with_edit(np.float32(limit)), "the edit of sequence 0 in layer 1 is not finite")


def test_nan_that_only_the_selection_sees_is_refused(case: Case) -> None:
    case.keys[0][case.block_table[0, 1], 2] = float("nan")  # position 10: prior, it need not be selected
    refused(case, "the attention of sequence 0 in layer 0 is not finite")


def test_queries_never_captured_are_refused(case: Case) -> None:
    refused(case, "never captured", queries=[torch.full_like(q, float("nan")) for q in case.queries])


class CopyingProducer:
    """A library that cannot share its memory and exports a copy, as DLPack allows."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.numpy().__dlpack__(**{**options, "copy": True})


def test_copies_are_refused(case: Case) -> None:
    match = "keys of layer 0: its library exported a copy"
    refused(case, match, keys=[CopyingProducer(k) for k in case.keys])
    refused(
        case,
        "block_table: its library exported a copy",
        block_table=CopyingProducer(torch.from_numpy(case.block_table)),
    )


def test_tables_are_copied_before_they_are_checked(case: Case) -> None:
    """A block table in the memory that is rewritten: the call uses what it checked."""
    case = make_case(Shape(lengths=((0, 16, 9),), num_layers=3, top_k=0))
    expected = make_case(case.shape)
    memory = case.values[0][0, 15, 1, 14:16].view(torch.int32)  # in the window: its bits change
    memory[:] = torch.tensor([0, 1])
    expected.values[0].copy_(case.values[0])
    expected.rewrite(expected.processor())
    case.block_table = memory[:, None]
    case.rewrite(case.processor())
    assert memory[0] != 0
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_lengths_are_copied_before_they_are_checked() -> None:
    mass, out = np.ones((400, 8), np.float32), np.zeros((400, 2), np.int64)
    lengths = np.full(400, 8, np.int64)
    done = threading.Event()

    def flip() -> None:
        while not done.is_set():
            lengths[-1] = 1 << 40
            lengths[-1] = 8

    thread = threading.Thread(target=flip)
    thread.start()
    refusals = 0
    for _ in range(3000):
        try:
            bottleneck_ext.select_top_k(mass, lengths, out)
        except InvalidArgumentError:
            refusals += 1
    done.set()
    thread.join()
    assert refusals < 3000


def test_shared_blocks_may_be_read(case: Case) -> None:
    """Prefix-cached blocks: selection alone writes nothing, so two sequences may share them."""
    case = make_case(Shape(lengths=((0, 30, 9), (0, 30, 9)), block_size=8))
    table = np.stack([case.block_table[0]] * 3)
    query_table = np.stack([case.query_table[0]] * 3)
    out = np.zeros((2, 2, 21), np.float32)
    bottleneck_ext.attention_mass(
        bottleneck_ext.KVCache(case.keys, case.values),
        bottleneck_ext.QueryCache(case.queries, query_table),
        [(0, 0, 21, 30), (1, 0, 21, 30)],
        table,
        out=out,
        workspace=bottleneck_ext.Workspace(),
    )
    assert (out[:, 0] == out[:, 1]).all()
    assert (out > 0).all()


def bound_to(case: Case) -> BoundCache:
    processor = case.processor()
    return processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )


def native_rewrite(bound: BoundCache, case: Case, **options: object) -> None:
    """One step, without what Python puts around it."""
    bound.processor.native.rewrite(
        bound.kv_cache, bound.query_cache, [(0, 0, 21, 30)], case.block_table, workspace=bound.workspace, **options
    )


def test_empty_outputs_are_checked(case: Case) -> None:
    bound = bound_to(case)
    for name, match in (("delta_norm", "delta_norm has 1 dimensions"), ("recalled", "recalled is float32")):
        with pytest.raises(InvalidArgumentError, match=match):
            native_rewrite(bound, case, **{name: torch.empty(0)})


@pytest.mark.parametrize("name", ["recalled", "delta_norm", "row_norm", "skipped"])
def test_outputs_without_data_are_refused(case: Case, name: str) -> None:
    bound = bound_to(case)
    before = case.snapshot()
    out = {
        "recalled": torch.zeros(case.config.num_layers, 1, case.config.top_k, dtype=torch.int64),
        "skipped": torch.zeros(1, dtype=torch.int32),
    }.get(name, torch.zeros(case.config.num_layers, 1))
    out.untyped_storage().resize_(0)
    with pytest.raises(InvalidArgumentError, match=f"{name} has no data"):
        native_rewrite(bound, case, **{name: out})
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("what", ["native", "with a report"])
def test_out_of_memory_is_never_reported_as_nothing_written(case: Case, what: str) -> None:
    """Every Python allocation of a call fails once: MemoryError means that the caches are as they were."""
    testcapi = pytest.importorskip("_testcapi")
    bound = bound_to(case)
    events = [BoundaryEvent(0, 21, 30)]

    def rewrite() -> None:
        if what == "native":
            native_rewrite(bound, case)
        else:
            bound.rewrite(events, case.block_table)

    rewrite()
    seen = set()
    for n in range(150 if what == "native" else 400):
        before = case.snapshot()
        error = None
        testcapi.set_nomemory(n, n + 1)
        try:
            rewrite()
        except BaseException as raised:
            error = raised
        testcapi.remove_mem_hooks()
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))
        seen.add(type(error))
        assert same == isinstance(error, MemoryError), (n, error)
    assert {MemoryError, RebuildNeededError} <= seen


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("recent_window", 0, "recent_window is 0; it must be 1 to 256"),
        ("recent_window", 257, "recent_window is 257"),
        ("top_k", -1, "top_k is -1; it must be 0 to 65536"),
        ("top_k", 65537, "top_k is 65537"),
        ("num_layers", 0, "num_layers is 0"),
        ("num_query_heads", 3, "num_query_heads 3 is not a multiple of num_kv_heads 2"),
        ("processor_heads", 5, "processor_dim 32 is not a multiple of processor_heads 5"),
        ("norm_eps", 0.0, "norm_eps is 0"),
        ("norm_eps", float("nan"), "norm_eps is nan"),
        ("rope_inv_freq", [1.0], "rope_inv_freq has 1 entries for head_dim 16; it must have half as many"),
    ],
)
def test_configuration_out_of_range(case: Case, key: str, value: object, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        bottleneck_ext.Processor(native_config(case, **{key: value}), case.weights)


def native_config(case: Case, **changes: object) -> dict[str, object]:
    names = "num_layers num_kv_heads num_query_heads head_dim processor_dim processor_heads processor_mlp_dim"
    names = [*names.split(), "top_k", "recent_window", "norm_eps"]
    return {name: getattr(case.config, name) for name in names} | {"rope_inv_freq": None} | changes


def test_weights_that_are_wrong(case: Case) -> None:
    def refused_weights(match: str, **changes: object) -> None:
        weights = {**case.weights, **changes}
        with pytest.raises(InvalidArgumentError, match=match):
            CacheProcessor(case.config, {k: v for k, v in weights.items() if v is not None})

    refused_weights("tensor layers.1.gate is missing", **{"layers.1.gate": None})
    refused_weights(
        r"layers.0.in_proj.bias has the wrong shape \[31\]; it must be \[32\]",
        **{"layers.0.in_proj.bias": np.zeros(31, np.float32)},
    )
    bad = case.weights["layers.1.o_proj.weight"].copy()
    bad[3, 5] = np.nan
    refused_weights(r"layers.1.o_proj.weight holds nan at \[3, 5\]", **{"layers.1.o_proj.weight": bad})
    bad[3, 5] = -np.inf
    refused_weights("layers.1.o_proj.weight holds -inf", **{"layers.1.o_proj.weight": bad})
    refused_weights(
        "there are 39 tensors; a Processor of 2 layers has 38", **{"layers.2.gate": np.zeros((), np.float32)}
    )
    refused_weights("is int64; it must be float32", **{"layers.0.gate": np.zeros((), np.int64)})


def test_unknown_backend(case: Case) -> None:
    for name in ("cpu:mmx", "cuda:1", "cuda", "", "cp", "cpu:"):
        if name.startswith("cuda") and CUDA:
            continue
        with pytest.raises(UnsupportedError, match=f"backend '{name}' is not available here; there is .*cpu:scalar"):
            case.processor(backend=name)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_names_of_devices(case: Case) -> None:
    for name in ("cuda", "cuda:0"):
        processor = case.processor(backend=name)
        assert (processor.backend, processor.workspace(4).backend) == ("cuda:0", "cuda:0")
        assert processor.workspace(4).num_threads == 1
    for device in ("", "x", "-1", "+1", "1x", "0x1", " 1", "4097", "99999999999999999999"):
        with pytest.raises(InvalidArgumentError, match=rf"'{re.escape(device)}' is no number of a device.*'cuda:0'"):
            case.processor(backend=f"cuda:{device}")
    with pytest.raises(InvalidArgumentError, match="there is no cuda:4096; this process sees"):
        bottleneck_ext.Workspace(1, "cuda:4096")
    mass, lengths, out = np.ones((1, 3), np.float32), np.full(1, 3, np.int64), np.zeros((1, 2), np.int64)
    with pytest.raises(UnsupportedError, match="select_top_k alone runs on CPU backends, not on 'cuda'"):
        bottleneck_ext.select_top_k(mass, lengths, out, backend="cuda")
    with pytest.raises(UnsupportedError, match="single products run on CPU backends"):
        bottleneck_ext.Linear(np.ones((1, 2, 2), np.float32), backend="cuda")


def test_workspace_of_another_backend(case: Case) -> None:
    if len(AVAILABLE) < 2:
        pytest.skip("one instruction set only")
    processor = case.processor(backend=AVAILABLE[0])
    other = bottleneck_ext.Workspace(1, AVAILABLE[1])
    bound = processor.bind(case.keys, case.values, case.queries, workspace=other, query_table=case.query_table)
    with pytest.raises(InvalidArgumentError, match="the workspace is of another backend"):
        bound.rewrite(case.events, case.block_table)


@pytest.mark.parametrize("num_threads", [0, -1, 1025])
def test_thread_count_out_of_range(num_threads: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"num_threads is {num_threads}"):
        bottleneck_ext.Workspace(num_threads)


# ---- not errors ------------------------------------------------------------------------------------------


def test_without_a_report(case: Case) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    before = case.snapshot()
    events = [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events]
    for name in ("recalled", "delta_norm", "row_norm"):
        with pytest.raises(InvalidArgumentError, match=f"{name} is given, which has to be waited for; leave it out"):
            processor.native.rewrite(
                bound.kv_cache,
                bound.query_cache,
                events,
                case.block_table,
                workspace=bound.workspace,
                wait=False,
                **{name: np.zeros((2, 2), np.float32)},
            )
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))
    assert bound.rewrite(case.events, case.block_table, report=False) is None
    assert bound.workspace.synchronize() is None
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_what_is_not_finite_is_refused_without_a_report_too(case: Case) -> None:
    case.values[1][case.block_table[1, 24 // 8], 24 % 8] = torch.nan
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    before = case.snapshot()
    with pytest.raises(InvalidArgumentError, match="the edit of sequence 1 in layer 1 is not finite"):
        bound.rewrite(case.events, case.block_table, report=False)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


def test_no_events_is_a_no_op(case: Case) -> None:
    case.events = []
    before = case.snapshot()
    report = case.rewrite(case.processor())
    assert report.recalled == ()
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(case.pools, before, strict=True))


def test_default_tables_are_one_block_and_page_per_sequence() -> None:
    shape = Shape(lengths=((0, 40, 9),))
    one, two = make_case(shape), make_case(shape)
    one.query_table = two.query_table = np.array([[0], [1]], np.int32)
    for q1, q2 in zip(one.queries, two.queries, strict=True):
        q1.copy_(torch.randn(q1.shape))
        q2.copy_(q1)
    one.rewrite(one.processor())
    processor = two.processor()
    processor.bind(two.keys, two.values, two.queries, workspace=processor.workspace()).rewrite(two.events)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one.pools, two.pools, strict=True))


# ---- DLPack ------------------------------------------------------------------------------------------------


def test_numpy_enters_without_a_copy(case: Case) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    case.keys, case.values = [k.numpy() for k in case.keys], [v.numpy() for v in case.values]
    case.queries = [q.numpy() for q in case.queries]
    case.rewrite(case.processor())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


class OldProducer:
    """A library that speaks DLPack before 1.0: no max_version, an unversioned capsule."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self) -> object:
        return self.tensor.__dlpack__()


def test_old_dlpack_producers(case: Case) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    case.keys = [OldProducer(k) for k in case.keys]
    case.rewrite(case.processor())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_producers_that_misbehave(case: Case) -> None:
    class Producer:
        def __init__(self, result: object) -> None:
            self.result = result

        def __dlpack__(self, **_: object) -> object:
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

    refused(case, "returned no DLPack capsule", TypeError, keys=[Producer(1), case.keys[1]])
    refused(case, "not today", keys=[Producer(BufferError("not today")), case.keys[1]])
    refused(case, "^$", KeyboardInterrupt, keys=[Producer(KeyboardInterrupt()), case.keys[1]])
    refused(case, "^$", MemoryError, keys=[Producer(MemoryError()), case.keys[1]])


# ---- the C exchange API of DLPack -----------------------------------------------------------------------


class ManagedTensor(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class PlainTensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = ManagedTensor._fields_[4:]


class ExchangeAPI(ctypes.Structure):
    """DLPackExchangeAPI, as far as it is used."""

    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("previous", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    ]


class Exchange:
    """Makes types that offer the C exchange API: fast exports count in `exported` and `deleted`, others in `asked`.

    `devices` are those whose stream was asked for.

    fails: the C function raises an exception. changes: of the exported ManagedTensor. views: changes of what is told
    without an export, which counts in `viewed`; None: that is not offered; "fails": it raises an exception.
    """

    def __init__(
        self,
        *,
        versions: tuple[int, ...] = (1,),
        fails: bool = False,
        views: dict[str, object] | Literal["fails"] | None = None,
        **changes: object,
    ) -> None:
        self.exported = self.deleted = self.asked = self.viewed = 0
        self.devices: list[tuple[int, int]] = []
        self.alive: list[object] = []  # what C points to
        changes = {"flags": 0, "device": (1, 0), "version": (1, 3)} | changes

        def describe(array: np.ndarray, tensor: ManagedTensor | PlainTensor, changes: dict[str, object]) -> None:
            shape = (ctypes.c_int64 * array.ndim)(*array.shape)
            strides = (ctypes.c_int64 * array.ndim)(*(stride // 4 for stride in array.strides))
            self.alive += [shape, strides]
            described = {
                "data": array.ctypes.data,
                "device": (1, 0),
                "ndim": array.ndim,
                "dtype": (2, 32, 1, 0),
                "shape": ctypes.addressof(shape),
                "strides": ctypes.addressof(strides),
                "byte_offset": 0,
            }
            for name, value in (described | changes).items():
                setattr(tensor, name, value)

        def from_object(array: Exchange.Array, out: int) -> int:
            managed = ManagedTensor(deleter=ctypes.cast(deleter, ctypes.c_void_p))
            describe(array.array, managed, changes)
            self.alive.append(managed)
            self.exported += 1
            ctypes.c_void_p.from_address(out).value = ctypes.addressof(managed)
            return 0

        def view_object(array: Exchange.Array, out: int) -> int:
            assert isinstance(views, dict)
            describe(array.array, PlainTensor.from_address(out), views)
            self.viewed += 1
            return 0

        def delete(managed: int) -> None:
            self.deleted += 1

        def current_stream(device_type: int, device_id: int, out: int) -> int:
            self.devices.append((device_type, device_id))
            ctypes.c_void_p.from_address(out).value = 7
            return 0

        # A callback of ctypes cannot raise; appending to what is no list does.
        raising = ctypes.pythonapi.PyList_Append
        callback = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
        function = raising if fails else callback(from_object)
        view = raising if views == "fails" else callback(view_object)
        deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(delete)
        stream = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)(current_stream)
        self.alive += [function, view, deleter, stream]
        previous = None
        for version in sorted(versions):
            api = ExchangeAPI((version, 0), previous, None, ctypes.cast(function, ctypes.c_void_p))
            if views is not None:
                api.tensor_from_object = ctypes.cast(view, ctypes.c_void_p)
            api.current_work_stream = ctypes.cast(stream, ctypes.c_void_p)
            self.alive.append(api)
            previous = ctypes.addressof(api)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        capsule = new(previous, b"dlpack_exchange_api", None)

        class Array:
            __dlpack_c_exchange_api__ = capsule

            def __init__(array, values: torch.Tensor) -> None:
                array.array = values.numpy()

            def __dlpack__(array, **options: object) -> object:
                self.asked += 1
                return array.array.__dlpack__(**options)

        self.Array = Array


def test_the_c_exchange_api_is_used_where_it_is_offered(case: Case) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    exchange = Exchange()
    case.keys = [exchange.Array(k) for k in case.keys]
    case.rewrite(case.processor())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))
    assert exchange.asked == 0
    assert exchange.exported == exchange.deleted == 4  # two layers, when bound and when rewritten


@pytest.mark.parametrize(
    ("views", "exported", "viewed"),
    [
        ({}, 2, 2),
        ("fails", 4, 0),
        ({"device": (4, 0)}, 4, 2),  # OpenCL: whatever it is, the export tells
        ({"dtype": (5, 64, 1, 0)}, 4, 2),
    ],
    ids=str,
)
def test_bound_tensors_are_looked_at_without_exporting_them(
    case: Case, views: dict[str, object] | Literal["fails"], exported: int, viewed: int
) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    exchange = Exchange(views=views)
    case.keys = [exchange.Array(k) for k in case.keys]
    case.rewrite(case.processor())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))
    assert (exchange.exported, exchange.deleted, exchange.viewed, exchange.asked) == (exported, exported, viewed, 0)


@pytest.mark.parametrize(
    ("views", "match"),
    [
        ({"data": 64}, "keys of layer 0 moved or changed shape"),
        ({"byte_offset": 4}, "keys of layer 0 moved or changed shape"),
        ({"byte_offset": 1}, "keys of layer 0: its data are not aligned to 4 bytes"),
        ({"device": (2, 0)}, "keys of layer 0 moved or changed shape"),
        ({"ndim": 3}, "keys of layer 0 have 3 dimensions; they must have 4"),
        ({"ndim": 5}, "keys of layer 0: has 5 dimensions; at most 4 are used"),
    ],
    ids=str,
)
def test_a_look_finds_what_moved(case: Case, views: dict[str, object], match: str) -> None:
    exchange = Exchange(views=views)
    refused(case, match, keys=[exchange.Array(k) for k in case.keys])
    assert exchange.exported == exchange.deleted == 2
    assert exchange.viewed > 0


def test_what_was_read_only_stays_so(case: Case) -> None:
    """A look does not tell; the export did, when the cache was bound."""
    exchange = Exchange(views={}, flags=1)
    refused(case, "keys of layer 0 are read-only", keys=[exchange.Array(k) for k in case.keys])
    assert exchange.viewed == 2


@pytest.mark.parametrize(
    ("arguments", "exported"),
    [
        ({"versions": (2, 1)}, 4),  # an older table in the chain
        ({"versions": (2,)}, 0),
        ({"fails": True}, 0),
        ({"device": (4, 0)}, 4),  # OpenCL
        ({"dtype": (5, 64, 1, 0)}, 4),  # complex: so is its conjugate bit
        ({"version": (2, 0)}, 4),
    ],
    ids=lambda value: str(value),
)
def test_what_the_c_exchange_api_cannot_say_is_left_to_dlpack(
    case: Case, arguments: dict[str, object], exported: int
) -> None:
    exchange = Exchange(**arguments)
    case.keys = [exchange.Array(k) for k in case.keys]
    case.rewrite(case.processor())
    assert exchange.exported == exchange.deleted == exported
    assert exchange.asked == (0 if arguments == {"versions": (2, 1)} else 4)


def test_refusals_of_the_c_exchange_api(case: Case) -> None:
    for changes, match in (
        ({"flags": 1}, "keys of layer 0 are read-only"),
        ({"flags": 2}, "keys of layer 0: its library exported a copy"),
        ({"ndim": 5}, "keys of layer 0: has 5 dimensions; at most 4 are used"),
        ({"byte_offset": 1}, "keys of layer 0: its data are not aligned to 4 bytes"),
    ):
        exchange = Exchange(**changes)
        refused(case, match, keys=[exchange.Array(k) for k in case.keys])
        assert exchange.asked == 0
        assert exchange.exported == exchange.deleted > 0


def test_cuda_tensors_need_a_cuda_backend(case: Case) -> None:
    exchange = Exchange(device=(2, 3))
    before = case.snapshot()
    for names, match in (
        (("keys", "values", "queries"), "the KV cache is on cuda:3; it must be on the CPU: move it there"),
        (("keys",), "values of layer 0 are on another device"),
        (("queries",), "queries of layer 0 are on another device than the keys"),
    ):
        tensors = {name: [exchange.Array(t) for t in getattr(case, name)] for name in names}
        refused(case, match, **tensors)
    assert exchange.asked == 0
    assert exchange.exported == exchange.deleted > 0
    assert exchange.devices == [(2, 3)] * 2  # where the keys are there
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


class OnDevice:
    """A tensor that says it is on a device, and records what its __dlpack__ is asked for."""

    def __init__(self, values: torch.Tensor, device: int, asked: list[dict[str, object]]) -> None:
        self.values, self.device, self.asked = values.numpy(), device, asked

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **options: object) -> object:
        self.asked.append(options)
        return self.values.__dlpack__(max_version=options["max_version"])


@pytest.mark.parametrize(("stream", "told"), [(None, None), (0, 1), (1, 1), (2, 2), (1 << 40, 1 << 40)])
def test_only_cuda_tensors_are_told_the_stream(case: Case, stream: int | None, told: int | None) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    asked: dict[int, list[dict[str, object]]] = {1: [], 2: []}
    keys = [OnDevice(k, 2, asked[2]) for k in case.keys]
    values = [OnDevice(v, 1, asked[1]) for v in case.values]
    processor = case.processor()
    bound = processor.bind(keys, values, case.queries, workspace=processor.workspace(), query_table=case.query_table)
    for calls in asked.values():
        assert calls == [{"max_version": (1, 0)}] * 2
        calls.clear()
    bound.rewrite(case.events, case.block_table, stream=stream)
    assert asked[1] == [{"max_version": (1, 0)}] * 2
    assert asked[2] == [{"max_version": (1, 0)} | ({} if told is None else {"stream": told})] * 2
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_a_stream_leaves_the_exchange_api_to_cpu_tensors(case: Case) -> None:
    on_cpu, on_cuda = Exchange(), Exchange(device=(2, 0))
    on_cuda.Array.__dlpack_device__ = lambda self: (2, 0)
    on_cuda.Array.__dlpack__ = lambda self, *, max_version, stream=None: self.array.__dlpack__(max_version=max_version)
    processor = case.processor()
    keys, values = [on_cpu.Array(k) for k in case.keys], [on_cpu.Array(v) for v in case.values]
    bound = processor.bind(keys, values, case.queries, workspace=processor.workspace(), query_table=case.query_table)
    bound.rewrite(case.events, case.block_table, stream=9)
    assert (on_cpu.asked, on_cpu.exported, on_cpu.devices) == (0, 8, [])
    bound = processor.bind(
        case.keys,
        case.values,
        [on_cuda.Array(q) for q in case.queries],
        workspace=processor.workspace(),
        query_table=case.query_table,
    )
    with pytest.raises(InvalidArgumentError, match="queries of layer 0 moved"):  # its __dlpack__ says: to the CPU
        bound.rewrite(case.events, case.block_table, stream=9)
    assert on_cuda.exported == on_cuda.deleted


def test_streams_are_numbers(case: Case) -> None:
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    before = case.snapshot()
    with pytest.raises(TypeError, match="stream is 'x'; it must be None or a cudaStream_t as a number"):
        bound.rewrite(case.events, case.block_table, stream="x")
    with pytest.raises(OverflowError):
        bound.rewrite(case.events, case.block_table, stream=-1)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


def test_a_subclass_is_asked_itself(case: Case) -> None:
    exchange = Exchange()

    class Copying(exchange.Array):
        def __dlpack__(self, **options: object) -> object:
            return self.array.__dlpack__(**{**options, "copy": True})

    refused(case, "its library exported a copy", keys=[Copying(k) for k in case.keys])
    assert exchange.exported == 0


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="a PyTorch without it")
def test_torch_tensors_enter_through_the_c_exchange_api(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    processor = case.processor()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack__", None)
        bound = processor.bind(
            case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
        )
        bound.rewrite(case.events, case.block_table)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_torch_refuses_what_dlpack_cannot_say(case: Case) -> None:
    """In PyTorch's own words, whichever way a tensor enters."""
    refused(case, "keys of layer 0: .* tensors that require gradient", keys=[k.requires_grad_() for k in case.keys])
    case = make_case(SHAPE)
    refused(case, "tensors with the conjugate bit", keys=[k.to(torch.complex64).conj() for k in case.keys])
    refused(case, "other than torch.strided", keys=[k.to_sparse() for k in case.keys])
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    case.values[1].requires_grad_()
    before = case.snapshot()
    with pytest.raises(InvalidArgumentError, match=r"values of layer 1: .* tensors that require gradient"):
        bound.rewrite(case.events, case.block_table)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_first_is_a_transposed_view(layout: str) -> None:
    shape = Shape(lengths=((0, 30, 9), (3, 22, 5)), block_size=8, layout=layout)
    case, expected = make_case(shape), make_case(shape)
    expected.rewrite(expected.processor())
    processor = case.processor()
    keys, values = [k.transpose(1, 2) for k in case.keys], [v.transpose(1, 2) for v in case.values]
    bound = processor.bind(
        keys, values, case.queries, workspace=processor.workspace(), query_table=case.query_table, heads_first=True
    )
    assert (bound.kv_cache.block_size, bound.kv_cache.num_kv_heads, bound.kv_cache.head_dim) == (8, 2, 16)
    bound.rewrite(case.events, case.block_table)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def test_misaligned_data(case: Case) -> None:
    raw = np.zeros(case.keys[0].numel() * 4 + 1, np.uint8)
    misaligned = raw[1:].view(np.float32).reshape(case.keys[0].shape)
    refused(case, "not aligned to 4 bytes", keys=[misaligned, case.keys[1]])


def test_resized_tensors_are_refused(case: Case) -> None:
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    bound.rewrite(case.events, case.block_table)
    case.keys[1].untyped_storage().resize_(0)
    with pytest.raises(InvalidArgumentError, match="keys of layer 1 moved or changed shape"):
        bound.rewrite(case.events, case.block_table)


def test_freed_tensors_stay_alive_while_bound(case: Case) -> None:
    expected = make_case(SHAPE)
    expected.rewrite(expected.processor())
    processor = case.processor()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    pools = case.pools
    case.keys = case.values = case.queries = []
    gc.collect()
    bound.rewrite(case.events, case.block_table)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(pools, expected.pools, strict=True))


def test_messages_quote_odd_names() -> None:
    with pytest.raises(UnsupportedError, match=r"there is .*cpu:scalar"):
        bottleneck_ext.Workspace(1, "x" + "é" * 400)


def test_configuration_of_the_wrong_kind(case: Case) -> None:
    with pytest.raises(TypeError, match=r"top_k is 4.0; it must be an integer"):
        bottleneck_ext.Processor(native_config(case, top_k=4.0), case.weights)
    with pytest.raises(TypeError, match=r"norm_eps is 'small'; it must be a number"):
        bottleneck_ext.Processor(native_config(case, norm_eps="small"), case.weights)
    config = native_config(case)
    for key in list(config):
        with pytest.raises(KeyError, match=f"the configuration lacks {key}"):
            bottleneck_ext.Processor({k: v for k, v in config.items() if k != key}, case.weights)


def test_no_reference_leaks(case: Case) -> None:
    processor = case.processor()

    def use() -> None:
        bound = processor.bind(
            case.keys,
            case.values,
            case.queries,
            workspace=processor.workspace(2),
            query_table=case.query_table,
        )
        bound.rewrite(case.events, case.block_table)
        case.processor()
        for bad in (case.keys[:1], [k.double() for k in case.keys], [1, 2]):
            with pytest.raises((ValueError, TypeError)):
                processor.bind(bad, case.values, case.queries, workspace=bound.workspace).rewrite(case.events)

    watched = [
        *case.keys,
        *case.values,
        *case.queries,
        case.block_table,
        case.query_table,
        *case.weights.values(),
    ]
    use()
    gc.collect()
    references = [sys.getrefcount(o) for o in watched]
    objects = len(gc.get_objects())
    for _ in range(20):
        use()
    gc.collect()
    assert [sys.getrefcount(o) for o in watched] == references
    assert abs(len(gc.get_objects()) - objects) < 20


# ---- threads, processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_results_do_not_depend_on_threads(num_threads: int) -> None:
    shape = Shape(lengths=((0, 90, 20), (5, 50, 17)), num_layers=5, block_size=16, dtype="bfloat16")
    one, many = make_case(shape), make_case(shape)
    a, b = one.rewrite(one.processor()), many.rewrite(many.processor(), num_threads)
    assert all(
        torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(one.pools, many.pools, strict=True)
    )
    assert (a.delta_norm == b.delta_norm).all()


def test_results_do_not_depend_on_flushed_subnormals() -> None:
    """Edits of 1e-39: a host that flushes them to zero, even after our threads started, gets the same bits."""
    shape = Shape(lengths=((0, 40, 20),), num_layers=8, random_scale=1e-39)
    expected = make_case(shape)
    workspace = expected.processor().workspace(3)

    def rewrite(case: Case) -> None:
        for view in (*case.keys, *case.values):
            view[view.isfinite()] = 0.0
        for name, weight in case.weights.items():
            if name.endswith("out_proj.bias"):
                weight[...] = 0
        case.processor().bind(
            case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table
        ).rewrite(case.events, case.block_table)

    rewrite(expected)
    assert any((pool.view(torch.int32) & 0x7FFFFF).any() for pool in expected.pools)
    flushed = [make_case(shape) for _ in range(10)]
    assert torch.set_flush_denormal(True)
    try:
        for case in flushed:
            rewrite(case)
    finally:
        torch.set_flush_denormal(False)
    for case in flushed:
        for a, b in zip(case.pools, expected.pools, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("limit", [1e-39, 1e-60, 5e-324, -1e-60])
def test_a_small_limit_is_a_limit_where_subnormals_are_flushed(limit: float, flush: bool) -> None:
    case = make_case(Shape(lengths=((0, 40, 20),)))
    processor, before, skipped = case.processor(), case.snapshot(), torch.zeros(1, dtype=torch.int32)
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=processor.workspace(), query_table=case.query_table
    )
    negative = pytest.raises(InvalidArgumentError, match="max_relative_edit is -")
    with negative if limit < 0 else contextlib.nullcontext():
        torch.set_flush_denormal(flush)
        try:
            processor.native.rewrite(
                bound.kv_cache,
                bound.query_cache,
                [(0, 0, 20, 40)],
                case.block_table,
                workspace=bound.workspace,
                max_relative_edit=limit,
                skipped=skipped,
            )
        finally:
            torch.set_flush_denormal(False)
    assert skipped.item() == (limit > 0)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, before, strict=True))


def test_shared_processor_many_threads() -> None:
    shape = Shape(lengths=((0, 90, 20),), num_layers=3)
    expected = make_case(shape)
    processor = expected.processor()
    expected.rewrite(processor)
    cases = [make_case(shape) for _ in range(8)]
    threads = [threading.Thread(target=c.rewrite, args=(processor, 2)) for c in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case in cases:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.pools, expected.pools, strict=True))


def big_case() -> Case:
    return make_case(
        Shape(lengths=((0, 2000, 90),), num_layers=8, num_kv_heads=4, group=4, head_dim=64, recent_window=96,
              processor_dim=256, processor_mlp_dim=1024)
    )  # fmt: skip


def test_the_gil_is_released() -> None:
    case = big_case()
    processor = case.processor(backend="cpu:scalar")
    case.rewrite(processor)
    ticks, done = 0, threading.Event()

    def work() -> None:
        case.rewrite(processor)
        done.set()

    thread = threading.Thread(target=work)
    sys.setswitchinterval(5)  # the interpreter itself will not switch: only a released GIL lets us count
    try:
        thread.start()
        while not done.is_set() and ticks < 10_000:
            time.sleep(0.001)
            ticks += 1
    finally:
        sys.setswitchinterval(0.005)
        thread.join()
    assert ticks > 20


def test_workspace_in_use_by_another_thread() -> None:
    case, other = big_case(), big_case()
    processor = case.processor(backend="cpu:scalar")
    workspace = processor.workspace()
    bound = [
        processor.bind(c.keys, c.values, c.queries, workspace=workspace, query_table=c.query_table)
        for c in (case, other)
    ]
    thread = threading.Thread(target=bound[0].rewrite, args=(case.events, case.block_table))
    thread.start()
    seen = None
    while thread.is_alive() and seen is None:
        try:
            bound[1].rewrite([], other.block_table)
        except InvalidArgumentError as error:
            seen = str(error)
        time.sleep(0.001)
    thread.join()
    assert seen is not None
    assert "in use by another thread" in seen
    bound[1].rewrite([], other.block_table)


def _rewrite_in_child(connection: object, bound: object, case: Case) -> None:
    bound.rewrite(case.events, case.block_table)
    connection.send([p.nan_to_num().view(torch.int32).tolist() for p in case.pools])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_fork() -> None:
    shape = Shape(lengths=((0, 90, 20),), num_layers=6)
    case = make_case(shape)
    processor = case.processor()
    workspace = processor.workspace(3)
    bound = processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table)
    bound.rewrite([], case.block_table)
    warm = make_case(shape)
    processor.bind(warm.keys, warm.values, warm.queries, workspace=workspace, query_table=warm.query_table).rewrite(
        warm.events, warm.block_table
    )  # the threads are running when the process forks
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_rewrite_in_child, args=(theirs, bound, case))
    child.start()
    assert ours.poll(60), "the child hangs"
    result = ours.recv()
    child.join()
    assert result == [p.nan_to_num().view(torch.int32).tolist() for p in warm.pools]
    bound.rewrite(case.events, case.block_table)  # and the parent goes on


# ---- memory that can be planned ---------------------------------------------------------------------------------

PLANS = {
    "one sequence": (Shape(()), 1, 1, 200),
    "a batch": (Shape((), top_k=4, recent_window=16), 2, 6, 150),
    "chunks of many short steps": (Shape((), top_k=1, recent_window=5), 2, 40, 60),
    "steps larger than a chunk": (Shape((), top_k=77, recent_window=96), 3, 4, 300),
    "split by heads": (Shape((), num_layers=1, num_kv_heads=4, top_k=9), 8, 5, 250),
    "split while the batch is small": (Shape((), num_layers=3, num_kv_heads=3, top_k=40, recent_window=70), 3, 7, 250),
    "consolidation only": (Shape((), top_k=0, recent_window=33), 2, 5, 100),
    "fewer positions than rows": (Shape((), top_k=32, recent_window=96), 2, 3, 20),
}


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLANS)
def test_a_planned_workspace_never_grows_and_is_no_larger_than_needed(name: str, weight_dtype: str) -> None:
    shape, num_threads, max_sequences, max_tokens = PLANS[name]
    rng = np.random.default_rng(len(name))
    shape = replace(shape, dtype=("float32", "float16", "bfloat16")[len(name) % 3])

    def rewrite(lengths: list[tuple[int, int, int]], planned: bool) -> bottleneck_ext.Workspace:
        case = make_case(replace(shape, lengths=tuple(lengths)))
        processor = case.processor(weight_dtype=weight_dtype)
        workspace = processor.workspace(num_threads)
        if planned:
            workspace = processor.workspace(
                num_threads, max_sequences=max_sequences, max_tokens=max_tokens, cache_dtype=shape.dtype
            )
        before = workspace.nbytes
        processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table).rewrite(
            case.events, case.block_table
        )
        assert not planned or workspace.nbytes == before
        return workspace

    largest = rewrite([(0, max_tokens, min(shape.recent_window, max_tokens))] * max_sequences, planned=False)
    assert rewrite([(0, 1, 1)], planned=True).nbytes == largest.nbytes
    for _ in range(20):
        longest = rng.integers(1, max_tokens + 1)
        window = rng.integers(1, longest + 1)
        lengths = []
        for _ in range(rng.integers(1, max_sequences + 1)):
            tokens = int(rng.integers(max(1, longest // 2), longest + 1))
            lengths.append((int(rng.integers(0, max_tokens - tokens + 1)), tokens, int(min(tokens, window))))
        rewrite(lengths, planned=True)
    rewrite([(0, max_tokens, 1)] * max_sequences, planned=True)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_the_workspace_of_a_long_generation_seldom_grows(weight_dtype: str, num_threads: int) -> None:
    """Four times, at most, until it is twice as long: not at nearly every boundary."""
    case = make_case(Shape(((0, 1500, 8),), recent_window=8, top_k=4))
    processor = case.processor(weight_dtype=weight_dtype)
    workspace = processor.workspace(num_threads)
    bound = processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table)
    sizes = []
    for end in range(50, 1501, 10):
        bound.rewrite([replace(case.events[0], step_begin=end - 8, step_end=end)], case.block_table)
        sizes.append(workspace.nbytes)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * np.log2(1500 / 50) + 2
    assert sizes[-1] == processor.native.workspace_bytes(num_threads, 1, 1500)


def test_limits_of_a_planned_workspace(case: Case) -> None:
    processor = case.processor()
    for arguments, match in (
        ((0, 1, 1), "num_threads is 0; it must be 1 to 1024"),
        ((1, 0, 1), "num_sequences is 0; it must be 1 to 65536"),
        ((1, 65537, 1), "num_sequences is 65537"),
        ((1, 1, 0), "max_tokens is 0; it must be 1 to 2147483647"),
        ((1, 1, 1 << 31), "max_tokens is 2147483648"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            processor.native.workspace_bytes(*arguments)
    with pytest.raises(InvalidArgumentError, match="cache_dtype is 'int32'; it must be 'float32'"):
        processor.native.workspace_bytes(1, 1, 1, cache_dtype="int32")
    with pytest.raises(InvalidArgumentError, match="max_sequences is 3 without max_tokens"):
        processor.workspace(max_sequences=3)
    with pytest.raises(InvalidArgumentError, match="reserve is -1; it must be 0 or more bytes"):
        bottleneck_ext.Workspace(reserve=-1)
    with pytest.raises(MemoryError):
        bottleneck_ext.Workspace(reserve=sys.maxsize)
    assert bottleneck_ext.Workspace(2, reserve=1000).nbytes == 1000
    sizes = [processor.native.workspace_bytes(2, 2, 500, cache_dtype=d) for d in ("bfloat16", "float16", "float32")]
    assert sizes[0] == sizes[1] < sizes[2]


# ---- the rest of the surface ------------------------------------------------------------------------------------


def test_attributes(case: Case) -> None:
    kv_cache = bottleneck_ext.KVCache(case.keys, case.values)
    queries = bottleneck_ext.QueryCache(case.queries, case.query_table)
    assert (kv_cache.num_layers, kv_cache.num_blocks, kv_cache.block_size) == (2, 15, 8)
    assert (kv_cache.num_kv_heads, kv_cache.head_dim, kv_cache.dtype) == (2, 16, "float32")
    assert (queries.num_pages, queries.page_size, queries.num_query_heads, queries.dtype) == (
        3,
        16,
        4,
        "float32",
    )
    processor = case.processor()
    workspace = processor.workspace(2)
    assert (workspace.num_threads, workspace.nbytes, workspace.backend) == (2, 0, processor.backend)
    processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table).rewrite(
        case.events, case.block_table
    )
    assert workspace.nbytes > 0
    assert processor.nbytes >= 4 * case.config.num_parameters()


def test_bfloat16_weights_take_half_the_memory(case: Case) -> None:
    shape = Shape(lengths=((0, 9, 3),), processor_dim=128, processor_mlp_dim=512)
    case = make_case(shape)
    assert case.processor(weight_dtype="bfloat16").nbytes < 0.6 * case.processor().nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_type_are_saved(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: torch.from_numpy(weight).to(dtype) for name, weight in case.weights.items()}
    CacheProcessor(case.config, weights).save_pretrained(tmp_path)
    for name, weight in CacheProcessor.from_pretrained(tmp_path).weights.items():
        assert torch.equal(torch.from_dlpack(weight), weights[name].float())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_auto_is_bfloat16_where_it_is_multiplied(
    backend: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = "bfloat16" if backend == "cpu:avx512_bf16" else "float32"
    named = CacheProcessor(case.config, case.weights, backend=backend)
    assert (named.weight_dtype, named.backend) == (native, backend)
    assert named.nbytes == case.processor(backend, native).nbytes
    monkeypatch.setenv("BOTTLENECKED_CPU_ISA", backend.removeprefix("cpu:"))
    named.save_pretrained(tmp_path)
    assert CacheProcessor.from_pretrained(tmp_path).weight_dtype == native
    for weight_dtype in ("float32", "bfloat16"):
        assert CacheProcessor(case.config, case.weights, weight_dtype=weight_dtype).weight_dtype == weight_dtype


def test_environment_forces_a_lower_instruction_set(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    for name in AVAILABLE:
        monkeypatch.setenv("BOTTLENECKED_CPU_ISA", name.removeprefix("cpu:"))
        assert bottleneck_ext.default_backend() == name
        assert case.processor().backend == name
    monkeypatch.setenv("BOTTLENECKED_CPU_ISA", "mmx")
    with pytest.raises(UnsupportedError, match="'cpu:mmx' is not available"):
        case.processor()
    monkeypatch.delenv("BOTTLENECKED_CPU_ISA")
    assert bottleneck_ext.default_backend() == AVAILABLE[0]


def test_backends_and_build_info() -> None:
    found = bottleneck_ext.backends()
    on_cpu = [b for b in found if b["backend"] == "cpu"]
    assert (on_cpu[-1]["variant"], on_cpu[-1]["available"]) == ("scalar", True)
    assert {b["device"] for b in on_cpu} == {"cpu"}
    info = bottleneck_ext.build_info()
    assert (info["version"], info["abi_version"]) == (bottleneck_ext.__version__, 7)
    cuda = info["cuda"]
    assert set(cuda) == {"compiled", "architectures", "available", "device", "driver", "cublaslt"}
    assert [b["name"] for b in found[len(on_cpu) :]] == ["cuda"] * cuda["compiled"]  # the last
    assert cuda["available"] == CUDA
    assert (cuda["device"] is not None) == CUDA
    if not cuda["compiled"]:
        assert cuda == {**dict.fromkeys(cuda), "compiled": False, "architectures": [], "available": False}


def test_module_survives_a_second_interpreter_dictionary() -> None:
    """Two copies of the module have their own state: exceptions of one are not those of the other."""
    import importlib.util

    spec = importlib.util.find_spec("bottleneck_ext._core")
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    assert second.BottleneckError is not bottleneck_ext.BottleneckError
    with pytest.raises(second.UnsupportedError):
        second.Workspace(1, "nothing")


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "cpu:scalar"])
def test_select_top_k_tells_subnormals_apart(backend: str, flush: bool) -> None:
    mass = torch.tensor([[1e-40, 3e-40, 2e-40, 1e-45]])
    out = torch.empty(1, 2, dtype=torch.int64)
    torch.set_flush_denormal(flush)
    try:
        bottleneck_ext.select_top_k(mass, torch.tensor([4]), out, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert out.tolist() == [[1, 2]]


def test_select_top_k_against_sorting() -> None:
    rng = np.random.default_rng(5)
    for backend in AVAILABLE:
        for n, k in ((1, 1), (7, 3), (100, 0), (257, 257), (1000, 32), (4096, 300)):
            mass = rng.integers(0, 6, (3, n)).astype(np.float32) / 7  # many ties
            mass[0, ::3] = np.nan  # counts as zero
            lengths = np.array([n, n // 2, 0], np.int64)
            out = np.full((3, k), 99, np.int64)
            bottleneck_ext.select_top_k(mass, lengths, out, backend=backend)
            for row in range(3):
                clean = np.nan_to_num(mass[row, : lengths[row]])
                best = np.sort(np.argsort(-clean, kind="stable")[:k])
                assert out[row].tolist() == best.tolist() + [-1] * (k - len(best)), (backend, n, k, row)


def test_selection_among_rows_that_repeat() -> None:
    """A view may have any number of rows where its strides are 0 (fuzzing: 2^61 lengths got 8 bytes)."""
    for rows in (2**61, 2**62):
        mass, lengths = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1, dtype=torch.int32).expand(rows)
        nothing = torch.zeros(1, 0, dtype=torch.int64).expand(rows, 0)
        with pytest.raises(InvalidArgumentError, match="lengths is int32"):
            bottleneck_ext.select_top_k(mass, lengths, nothing)
    mass, lengths = torch.zeros(1, 1).expand(2**61, 1), torch.zeros(1, dtype=torch.int64).expand(2**61)
    with pytest.raises(MemoryError, match="out of memory for 2305843009213693952 lengths"):
        bottleneck_ext.select_top_k(mass, lengths, torch.zeros(1, 0, dtype=torch.int64).expand(2**61, 0))


def test_the_c_api_stays_hidden_in_the_module() -> None:
    """Two libraries that both compile the core into themselves do not meet."""
    library = ctypes.CDLL(bottleneck_ext._core.__file__)
    assert not hasattr(library, "btx_rewrite")
