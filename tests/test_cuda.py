"""The CUDA backend on a device: against the float64 reference and the CPU backend, its streams and graphs, and whole
generations.

Everything but the first test needs a device and an extension with CUDA in it. Where one is expected,
BOTTLENECKED_REQUIRE_CUDA=1 makes their absence a failure.

The tolerances are those of docs/processor.md, as in test_parity.py. Cases are made on the CPU; what runs on the device
is copied there, gaps and sentinels included, and copied back to be looked at.

Most of the time goes into float64 on the host: with pytest-xdist installed `pytest -n 8 -m "not alone"` is much faster.
Tests marked `alone` look at what every process on the device does, and run apart. benchmarks/run_gpu.sh does all this.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottlenecked import BoundaryConfig, CacheProcessor, CacheProcessorConfig, UnsupportedError, backbones, reference
from bottlenecked.boundary import newline_token_ids
from bottlenecked.checkpoint import initial_weights

from .cases import LAYOUTS, NAMED, Capture, CaptureShape, Case, Shape, make_capture, make_case
from .test_capture import bind_capture, capture_in_a_loop, capture_shapes, check_capture
from .test_parity import (
    EDIT_TOLERANCE,
    HALF_ULP,
    MASS_TOLERANCE,
    SMALLEST,
    check_selection,
    check_untouched,
    check_values,
    double,
    reference_mass,
    shapes,
)

EXAMPLES = int(os.environ.get("BOTTLENECKED_CUDA_EXAMPLES", "60"))
PARTS = 12  # of the examples, for as many processes
DEVICE = "cuda:0"
BACKEND = "cuda"
BITS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


def compiled_in() -> bool:
    about: Any = bottleneck_ext.build_info()["cuda"]
    return bool(about.get("compiled") if isinstance(about, dict) else about)


def why_not() -> str | None:
    """Why nothing of this can run here, or None where it can."""
    if not compiled_in():
        return "the extension was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


WHY = why_not()
needs_cuda = pytest.mark.skipif(WHY is not None, reason=WHY or "")


def test_where_this_is_skipped_there_is_no_cuda() -> None:
    config = make_case(Shape(((0, 9, 4),), num_layers=1)).config
    weights = initial_weights(config)
    if WHY is None:
        assert CacheProcessor(config, weights, backend=BACKEND).backend.startswith("cuda")
        return
    assert os.environ.get("BOTTLENECKED_REQUIRE_CUDA") != "1", WHY
    assert not compiled_in() or not torch.cuda.is_available()
    with pytest.raises(UnsupportedError):
        CacheProcessor(config, weights, backend=BACKEND)


# --- cases on the device --------------------------------------------------------------------------------------


def on_device(case: Case) -> Case:
    """The same case in device memory: every pool, and views of the same strides into it. Tables stay on the host."""
    pools = [pool.to(DEVICE) for pool in case.pools]
    moved = {pool.untyped_storage().data_ptr(): to for pool, to in zip(case.pools, pools, strict=True)}

    def view(tensor: torch.Tensor) -> torch.Tensor:
        pool = moved[tensor.untyped_storage().data_ptr()]
        return pool.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return replace(
        case,
        keys=[view(k) for k in case.keys],
        values=[view(v) for v in case.values],
        queries=[q.to(DEVICE) for q in case.queries],
        pools=pools,
    )


def bring_back(device: Case, case: Case) -> None:
    torch.cuda.synchronize()
    for pool, host in zip(device.pools, case.pools, strict=True):
        host.copy_(pool)


def rewrite_on_device(case: Case, weight_dtype: str = "float32") -> Any:
    """As case.rewrite, but on the device; the case then holds what became of it."""
    device = on_device(case)
    report = device.rewrite(case.processor(BACKEND, weight_dtype))
    bring_back(device, case)
    return report


def bind(device: Case, processor: CacheProcessor, workspace: Any = None) -> Any:
    return processor.bind(
        device.keys,
        device.values,
        device.queries,
        workspace=processor.workspace() if workspace is None else workspace,
        query_table=device.query_table,
    )


def restore(device: Case | Capture, before: list[torch.Tensor]) -> None:
    for pool, old in zip(device.pools, before, strict=True):
        pool.copy_(old)


def same_bits(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ones, others, strict=True))


def steps(case: Case) -> list[tuple[int, int, int, int]]:
    return [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events]


def device_mass(case: Case) -> torch.Tensor:
    """Attention mass float32 [num_layers, num_steps, largest prior], on the CPU."""
    device = on_device(case)
    window = case.shape.recent_window
    prior = max(e.window_begin(window) - e.sequence_begin for e in case.events)
    out = torch.full((case.shape.num_layers, len(case.events), prior), torch.nan, device=DEVICE)
    bottleneck_ext.attention_mass(
        bottleneck_ext.KVCache(device.keys, device.values),
        bottleneck_ext.QueryCache(device.queries, case.query_table),
        steps(case),
        case.block_table,
        out=out,
        workspace=bottleneck_ext.Workspace(1, BACKEND),
        recent_window=window,
    )
    torch.cuda.synchronize()
    return out.cpu()


# --- parity ---------------------------------------------------------------------------------------------------


def check_parity(shape: Shape, weight_dtype: str = "float32") -> None:
    """Against the float64 reference: what test_parity.py asks of the CPU backends."""
    case, untouched = make_case(shape), make_case(shape)
    report = rewrite_on_device(case, weight_dtype)
    expected = reference.rewrite(
        case.config,
        case.weights,
        double(untouched.keys),
        double(untouched.values),
        double(untouched.queries),
        case.events,
        case.block_table,
        case.query_table,
        operands=None if weight_dtype == "float32" else weight_dtype,
    )
    exact = True
    for i, event in enumerate(case.events):
        for layer in range(shape.num_layers):
            ours, theirs = report.recalled[i][layer], expected.recalled[i][layer]
            if ours.tolist() != theirs.tolist():
                exact = False
                mass = reference_mass(untouched, layer, i)
                check_selection(mass, ours - event.sequence_begin, theirs - event.sequence_begin)
    if exact:
        check_values(case, untouched, expected, report, weight_dtype)
    check_untouched(case, untouched, report)


def check_against_cpu(shape: Shape, weight_dtype: str) -> None:
    """Against the CPU backend, which is as far from the reference as we are: twice the tolerance between the two."""
    ours, theirs, before = make_case(shape), make_case(shape), make_case(shape)
    report = rewrite_on_device(ours, weight_dtype)
    expected = theirs.rewrite(theirs.processor("cpu", weight_dtype), num_threads=min(4, os.cpu_count() or 1))
    for i, event in enumerate(ours.events):
        for layer in range(shape.num_layers):
            a, b = report.recalled[i][layer], expected.recalled[i][layer]
            if a.tolist() != b.tolist():
                mass = reference_mass(before, layer, i)
                check_selection(mass, a - event.sequence_begin, b - event.sequence_begin)
                return  # with another selection every row differs
    for got, right, start in zip(*((*case.keys, *case.values) for case in (ours, theirs, before)), strict=True):
        assert torch.equal(got.isnan(), right.isnan())
        got, right, start = (t.double().nan_to_num() for t in (got, right, start))
        edit = (right - start).abs().max()
        assert edit > 0
        allowed = (
            2 * EDIT_TOLERANCE[weight_dtype] * edit
            + 2 * right.abs() * HALF_ULP[shape.dtype] * (1 + 2.0**-10)
            + 2 * torch.maximum(start.abs(), right.abs()) * 2.0**-24
            + 2 * SMALLEST[shape.dtype]
        )
        assert ((got - right).abs() <= allowed).all(), float(((got - right).abs() / allowed).max())


@needs_cuda
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=max(EXAMPLES // PARTS, 1),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    shape=shapes,
    head_dim=st.sampled_from([None, None, 7, 96, 192, 256]),
    weight_dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
)
def test_parity(part: int, shape: Shape, head_dim: int | None, weight_dtype: str) -> None:
    if head_dim is not None:
        key_space = shape.key_space if head_dim % 2 == 0 else "rotated"
        shape = replace(shape, head_dim=head_dim, key_space=key_space)
    check_parity(shape, weight_dtype)


@needs_cuda
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMED)
def test_parity_of_named_cases(name: str, dtype: str, weight_dtype: str) -> None:
    check_parity(replace(NAMED[name], dtype=dtype, seed=7), weight_dtype)


# Ragged steps of a real model's proportions.
LLAMA = Shape(
    ((0, 2100, 32), (5, 1500, 96), (0, 900, 7), (17, 60, 60)), num_layers=3, num_kv_heads=8, group=4, head_dim=64,
    processor_dim=512, processor_heads=16, processor_mlp_dim=2240, top_k=32, recent_window=96, block_size=16,
    page_size=16, dtype="bfloat16",
)  # fmt: skip


@needs_cuda
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": None, "page_size": None, "layout": "hnd"},
        {"num_layers": 2, "head_dim": 128, "num_kv_heads": 4, "dtype": "float16"},
        {"num_layers": 2, "head_dim": 256, "num_kv_heads": 2, "group": 8},
        {"num_layers": 2, "head_dim": 96, "num_kv_heads": 3, "group": 7, "key_space": "unrotated"},
        {"num_layers": 1, "head_dim": 80, "num_kv_heads": 2, "group": 1, "dtype": "float32", "layout": "strided"},
        {"num_layers": 1, "lengths": ((0, 33000, 96),), "top_k": 300},
        {"num_layers": 1, "top_k": 1, "recent_window": 256, "lengths": ((0, 3000, 256),)},
    ],
    ids=["paged", "contiguous", "128", "256", "96 unrotated", "80 strided", "33k", "R 256"],
)
def test_equals_the_cpu_backend(changes: dict[str, Any], weight_dtype: str) -> None:
    check_against_cpu(replace(LLAMA, **changes), weight_dtype)


@needs_cuda
def test_selection_is_exact() -> None:
    same = total = 0
    for seed in range(12):
        shape = Shape(((0, 700, 30), (5, 400, 60)), num_layers=4, head_dim=32, top_k=32, recent_window=48, seed=seed)
        case, untouched = make_case(shape), make_case(shape)
        report = rewrite_on_device(case)
        for i, event in enumerate(case.events):
            for layer in range(4):
                mass = reference_mass(untouched, layer, i)
                theirs = reference.select_top_k(mass, 32)
                ours = report.recalled[i][layer] - event.sequence_begin
                check_selection(mass, ours, theirs)
                same += ours.tolist() == theirs.tolist()
                total += 1
    assert total == 96
    assert same >= 94, f"{same} of {total} selections identical"


@needs_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [None, 5])
def test_ties_go_to_the_smaller_position(block_size: int | None, dtype: str, layout: str) -> None:
    """Equal keys have bit-equal mass wherever they lie."""
    shape = Shape(
        ((3, 150, 9),), num_layers=1, head_dim=20, top_k=21, layout=layout, block_size=block_size, dtype=dtype, seed=3
    )
    case = make_case(shape)
    table, size = case.block_table[0], case.keys[0].shape[1]
    for p in range(3, 144):  # three different keys, scattered
        q = 150 + p * p % 3
        case.keys[0][table[p // size], p % size] = case.keys[0][table[q // size], q % size]
    kinds = np.array([p * p % 3 for p in range(3, 144)])
    mass = device_mass(case)[0, 0].numpy()
    assert len({*mass.tolist()}) == len({*kinds.tolist()}) == 2
    best = kinds[mass.argmax()]
    report = rewrite_on_device(case)
    assert report.recalled[0][0].tolist() == (np.flatnonzero(kinds == best)[:21] + 3).tolist()


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("head_dim", "group"), [(16, 1), (20, 3), (48, 3), (64, 4), (96, 7), (128, 8), (7, 2), (256, 2)]
)
def test_attention_mass_alone(head_dim: int, group: int, dtype: str) -> None:
    shape = Shape(
        ((0, 1500, 96), (4, 33, 7), (0, 5, 5)), num_layers=3, head_dim=head_dim, group=group, block_size=16,
        dtype=dtype, recent_window=32,
    )  # fmt: skip
    case = make_case(shape)
    out = device_mass(case).numpy()
    for layer in range(3):
        for i in range(3):
            mass = reference_mass(case, layer, i)
            np.testing.assert_allclose(out[layer, i, : len(mass)], mass, rtol=MASS_TOLERANCE, atol=1e-12)
            assert (out[layer, i, len(mass) :] == 0).all()


@needs_cuda
@pytest.mark.parametrize(("prior", "head_dim", "window"), [(2048, 64, 64), (32768, 64, 96), (32768, 128, 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_long_attention_mass(prior: int, head_dim: int, window: int, dtype: str) -> None:
    """Against float64 in PyTorch, on the device."""
    shape = Shape(
        ((0, prior + window, window),), num_layers=1, num_kv_heads=8, group=4, head_dim=head_dim, recent_window=window,
        block_size=16, dtype=dtype,
    )  # fmt: skip
    case = make_case(shape)
    got = device_mass(case)[0, 0].double()
    positions = torch.arange(prior + window)
    table = torch.from_numpy(case.block_table[0].astype(np.int64))
    keys = case.keys[0][table[positions // 16], positions % 16].to(DEVICE).double()  # [prior + window, heads, d]
    rows = torch.arange(prior, prior + window) % window
    queries = case.queries[0][int(case.query_table[0, 0]), rows].to(DEVICE).double()  # [window, 32, d]
    future = torch.ones(window, window, dtype=torch.bool, device=DEVICE).triu(1)
    mass = torch.zeros(prior, dtype=torch.float64, device=DEVICE)
    for head in range(32):
        scores = queries[:, head] @ keys[:, head // 4].T * head_dim**-0.5
        scores[:, prior:].masked_fill_(future, -torch.inf)
        mass += scores.softmax(dim=-1)[:, :prior].sum(dim=0)
    expected = (mass / (32 * window)).cpu()
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=MASS_TOLERANCE, atol=1e-13)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_identity_keeps_every_bit(dtype: str) -> None:
    """W_out = 0: every edit is exactly zero, and a zero edit keeps even the sign of zero."""
    case = make_case(Shape(((0, 90, 20), (2, 41, 9)), block_size=16, dtype=dtype))
    for name, weight in case.weights.items():
        if "out_proj" in name:
            weight[...] = 0
    for view in (*case.keys, *case.values):
        cells = view.isfinite() & (torch.rand(view.shape) < 0.3)
        view[cells] = -0.0
    before = case.snapshot()
    report = rewrite_on_device(case)
    assert (report.delta_norm == 0).all()
    assert all(torch.equal(a.view(BITS[dtype]), b.view(BITS[dtype])) for a, b in zip(case.pools, before, strict=True))


@needs_cuda
def test_sequences_do_not_see_each_other() -> None:
    """A row of a ragged batch is what it is alone, but for the rounding of products of another size."""
    shape = Shape(((0, 90, 20), (6, 141, 33), (0, 12, 12)), block_size=16, head_dim=20)
    together = make_case(shape)
    full = rewrite_on_device(together)
    for i in range(3):
        alone, before = make_case(shape), make_case(shape)
        alone.events = [alone.events[i]]
        report = rewrite_on_device(alone)
        assert (report.recalled[0] == full.recalled[i]).all()
        blocks = torch.from_numpy(alone.block_table[i][alone.block_table[i] >= 0].astype(np.int64))
        for caches in zip(*((*case.keys, *case.values) for case in (alone, together, before)), strict=True):
            a, b, c = (t[blocks].nan_to_num() for t in caches)
            assert ((a - b).abs() <= 2 * EDIT_TOLERANCE["float32"] * (a - c).abs().max() + 2.0**-23 * a.abs()).all()


@needs_cuda
def test_the_same_call_gives_the_same_bits() -> None:
    device = on_device(make_case(LLAMA))
    before = device.snapshot()
    processor = device.processor(BACKEND, "bfloat16")
    bound = bind(device, processor)
    results = []
    for _ in range(3):
        restore(device, before)
        bound.rewrite(device.events, device.block_table)
        results.append(device.snapshot())
    assert not same_bits(results[0], before)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    fresh = on_device(make_case(LLAMA))
    bind(fresh, processor).rewrite(fresh.events, fresh.block_table)  # another workspace, other addresses
    assert same_bits(results[0], fresh.pools)


# --- reports, refusals ----------------------------------------------------------------------------------------


@needs_cuda
def test_a_report_that_is_not_wanted_changes_nothing() -> None:
    reported, silent = on_device(make_case(LLAMA)), on_device(make_case(LLAMA))
    processor = reported.processor(BACKEND)
    report = bind(reported, processor).rewrite(reported.events, reported.block_table)
    assert sum(report.stage_seconds.values()) > 0
    bound = bind(silent, processor)
    assert bound.rewrite(silent.events, silent.block_table, report=False) is None
    bound.workspace.synchronize()
    assert same_bits(reported.pools, silent.pools)


def not_finite(case: Case) -> Case:
    """NaN among the values of the second sequence's window, in the last layer."""
    event, layer = case.events[1], case.shape.num_layers - 1
    size = case.values[layer].shape[1]
    position = event.step_end - 1
    case.values[layer][case.block_table[event.sequence, position // size], position % size] = torch.nan
    return case


SMALL = Shape(((0, 90, 20), (6, 141, 33)), block_size=16, dtype="bfloat16")
REFUSAL = "the edit of sequence 1 in layer 1 is not finite"


@needs_cuda
def test_what_is_not_finite_is_refused_and_nothing_written() -> None:
    device = on_device(not_finite(make_case(SMALL)))
    before = device.snapshot()
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match=REFUSAL):
        bind(device, device.processor(BACKEND)).rewrite(device.events, device.block_table)
    assert same_bits(device.pools, before)


@needs_cuda
@pytest.mark.parametrize("told_by", ["synchronize", "the next call"])
def test_what_is_refused_later_is_told(told_by: str) -> None:
    device = on_device(not_finite(make_case(SMALL)))
    before = device.snapshot()
    bound = bind(device, device.processor(BACKEND))

    def call() -> None:
        bound.rewrite(device.events, device.block_table, report=False)

    call()
    torch.cuda.synchronize()
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match=REFUSAL):
        bound.workspace.synchronize() if told_by == "synchronize" else call()
    assert same_bits(device.pools, before)
    bound.workspace.synchronize()  # it was told
    good = on_device(make_case(SMALL))
    again = bind(good, bound.processor, bound.workspace)
    again.rewrite(good.events, good.block_table, report=False)
    bound.workspace.synchronize()
    assert not same_bits(good.pools, before)


@needs_cuda
def test_keys_that_are_not_finite_are_refused() -> None:
    case = make_case(SMALL)
    size = case.keys[0].shape[1]
    case.keys[0][case.block_table[0, 10 // size], 10 % size] = torch.nan  # prior: it need not be selected
    device = on_device(case)
    before = device.snapshot()
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match="the attention of sequence 0 in layer 0 is not fin"):
        bind(device, device.processor(BACKEND)).rewrite(device.events, device.block_table)
    assert same_bits(device.pools, before)


@needs_cuda
@pytest.mark.parametrize("what", ["cache", "values", "queries", "processor", "workspace", "one layer"])
def test_two_devices_are_refused(what: str) -> None:
    host = make_case(SMALL)
    device = on_device(host)
    before, host_before = device.snapshot(), host.snapshot()
    processor = host.processor("cpu" if what == "processor" else BACKEND)
    other = host.processor("cpu").workspace() if what == "workspace" else processor.workspace()
    keys = host.keys if what == "cache" else device.keys
    keys = [*keys[:-1], host.keys[-1]] if what == "one layer" else keys
    values = host.values if what in ("cache", "values") else device.values
    queries = host.queries if what in ("cache", "queries") else device.queries
    if what == "processor":
        other = processor.workspace()
    with pytest.raises(bottleneck_ext.BottleneckError, match=r"(?i)cpu|cuda|device"):
        processor.bind(keys, values, queries, workspace=other, query_table=host.query_table).rewrite(
            host.events, host.block_table
        )
    assert same_bits(device.pools, before)
    assert same_bits(host.pools, host_before)


@needs_cuda
def test_mass_into_the_other_devices_memory_is_refused() -> None:
    case = make_case(SMALL)
    device = on_device(case)
    with pytest.raises(bottleneck_ext.BottleneckError, match=r"(?i)cpu|cuda|device"):
        bottleneck_ext.attention_mass(
            bottleneck_ext.KVCache(device.keys, device.values),
            bottleneck_ext.QueryCache(device.queries, case.query_table),
            steps(case),
            case.block_table,
            out=np.empty((2, 2, 125), np.float32),
            workspace=bottleneck_ext.Workspace(1, BACKEND),
            recent_window=case.shape.recent_window,
        )


# --- streams, graphs, memory ----------------------------------------------------------------------------------

SLEEP = 400_000_000  # cycles: a fifth of a second, in which a busy host makes any call that does not wait


def rewritten(shape: Shape) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The pools before and after."""
    device = on_device(make_case(shape))
    before = device.snapshot()
    bind(device, device.processor(BACKEND)).rewrite(device.events, device.block_table)
    return before, device.snapshot()


@needs_cuda
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "current"])
def test_the_stream_orders_the_work(explicit: bool) -> None:
    """The cache arrives late on a side stream: the rewrite waits for it there, and what follows for the rewrite."""
    before, after = rewritten(LLAMA)
    device = on_device(make_case(LLAMA))
    bound = bind(device, device.processor(BACKEND))
    bound.rewrite(device.events, device.block_table)  # memory is there
    side = torch.cuda.Stream()
    for pool in device.pools:
        pool.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        restore(device, before)
        if not explicit:
            bound.rewrite(device.events, device.block_table, report=False)
    if explicit:
        bound.rewrite(device.events, device.block_table, stream=side.cuda_stream, report=False)
    with torch.cuda.stream(side):
        got = device.snapshot()
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    bound.workspace.synchronize()
    assert same_bits(got, after)


@needs_cuda
def test_in_a_cuda_graph() -> None:
    """A captured rewrite does its work at each replay, on what the cache then holds."""
    before, after = rewritten(LLAMA)
    device = on_device(make_case(LLAMA))
    processor = device.processor(BACKEND)
    bound = bind(device, processor)
    bound.rewrite(device.events, device.block_table, report=False)  # memory is there
    torch.cuda.synchronize()
    restore(device, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.rewrite(device.events, device.block_table, report=False)
    torch.cuda.synchronize()
    assert same_bits(device.pools, before), "capturing ran it"
    for _ in range(2):
        restore(device, before)
        graph.replay()
        assert same_bits(device.pools, after)
    halves = [(pool / 2).to(pool.dtype) for pool in before]
    restore(device, halves)
    graph.replay()
    got = device.snapshot()
    restore(device, halves)
    bind(device, processor).rewrite(device.events, device.block_table)
    assert same_bits(got, device.pools)


@needs_cuda
def test_two_workspaces_on_two_streams() -> None:
    shapes_ = [LLAMA, replace(LLAMA, seed=1)]
    expected = [rewritten(shape)[1] for shape in shapes_]
    devices = [on_device(make_case(shape)) for shape in shapes_]
    processors = [device.processor(BACKEND) for device in devices]
    befores = [device.snapshot() for device in devices]
    bounds = [bind(device, p) for device, p in zip(devices, processors, strict=True)]
    streams = [torch.cuda.Stream() for _ in devices]
    torch.cuda.synchronize()
    for _ in range(5):
        for device, bound, stream, before in zip(devices, bounds, streams, befores, strict=True):
            with torch.cuda.stream(stream):
                restore(device, before)
                bound.rewrite(device.events, device.block_table, report=False)
    torch.cuda.synchronize()
    for device, bound, after in zip(devices, bounds, expected, strict=True):
        bound.workspace.synchronize()
        assert same_bits(device.pools, after)


@needs_cuda
@pytest.mark.alone
def test_repeated_shapes_allocate_nothing() -> None:
    device = on_device(make_case(LLAMA))
    before = device.snapshot()
    bound = bind(device, device.processor(BACKEND))
    for _ in range(8):
        restore(device, before)
        bound.rewrite(device.events, device.block_table, report=False)
    torch.cuda.synchronize()
    free, nbytes = torch.cuda.mem_get_info()[0], bound.workspace.nbytes
    for _ in range(50):
        restore(device, before)
        bound.rewrite(device.events, device.block_table, report=False)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free
    assert bound.workspace.nbytes == nbytes
    for _ in range(5):
        bound.rewrite(device.events, device.block_table)  # nor with a report, once there was one
    free = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        bound.rewrite(device.events, device.block_table)
    assert torch.cuda.mem_get_info()[0] == free


@needs_cuda
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_general_products(weight_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sanitize_cuda.py runs under initcheck: no product is cuBLASLt's or sm_90a's, and they are as right."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setenv("BOTTLENECKED_CUDA_PRODUCTS", "general")
    check_against_cpu(LLAMA, weight_dtype)
    device = on_device(make_case(LLAMA))
    bound = bind(device, device.processor(BACKEND, weight_dtype))
    bound.rewrite(device.events, device.block_table)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        bound.rewrite(device.events, device.block_table)
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    gated = sum("swiglu_kernel" in name or "swiglu_f32_kernel" in name for name in names)
    assert gated > 0, names
    assert sum("product_kernel" in name for name in names) == 5 * gated, names
    assert not any("sm90" in name and "swiglu" in name for name in names)


@needs_cuda
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_a_boundary_is_few_launches(weight_dtype: str) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    device = on_device(make_case(LLAMA))
    bound = bind(device, device.processor(BACKEND, weight_dtype))
    for _ in range(5):  # every slot for a plan has its memory
        bound.rewrite(device.events, device.block_table, report=False)
    bound.workspace.synchronize()
    torch.cuda.synchronize()
    calls = 3  # fewer than there are slots: none is waited for
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            bound.rewrite(device.events, device.block_table, report=False)
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert kernels, "the profiler saw no kernel"
    assert len(kernels) <= 16 * calls, sorted({(name, kernels.count(name) / calls) for name in kernels})
    assert len(names) - len(kernels) <= 4 * calls, [name for name in names if name not in kernels]
    # What the host asked of the runtime: nothing that waits or allocates, but for the test's own synchronize.
    asked = [event.name for event in profiled.events() if event.device_type == DeviceType.CPU]
    assert any("Launch" in name for name in asked), "the profiler saw no call that launches"
    forbidden = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaStreamSync", "cudaEventSync", "cuMemAlloc")
    assert not [name for name in asked if name.startswith(forbidden)]
    assert asked.count("cudaDeviceSynchronize") < calls


# Staging of this boundary takes 171 GB, more than these devices have: a wide MLP, and many rows in one pass.
VAST = Shape(
    ((0, 4608, 260),) * 150, num_layers=1, num_kv_heads=1, group=1, head_dim=8, processor_dim=4, processor_heads=1,
    processor_mlp_dim=1 << 16, top_k=4096, recent_window=256, dtype="bfloat16",
)  # fmt: skip


@needs_cuda
def test_without_memory_nothing_is_written_and_less_may_be_asked_for() -> None:
    device, alone = on_device(make_case(VAST)), on_device(make_case(VAST))
    before = device.snapshot()
    processor = device.processor(BACKEND)
    needed = processor.native.workspace_bytes(1, len(VAST.lengths), 4608, cache_dtype=VAST.dtype)
    assert needed > torch.cuda.mem_get_info()[1], "this device has more memory: make VAST larger"
    bound = bind(device, processor)
    for report in (True, False):
        with pytest.raises(MemoryError, match="out of device memory"):
            bound.rewrite(device.events, device.block_table, report=report)
        torch.cuda.synchronize()
        assert same_bits(device.pools, before)
    bound.rewrite(device.events[:1], device.block_table)
    bind(alone, processor).rewrite(alone.events[:1], alone.block_table)
    assert not same_bits(device.pools, before)
    assert same_bits(device.pools, alone.pools)
    with pytest.raises(MemoryError, match="out of device memory"):
        bottleneck_ext.Workspace(1, BACKEND, reserve=1 << 46)


@needs_cuda
@pytest.mark.parametrize(("stream", "error"), [("1", TypeError), (1.0, TypeError), (-1, OverflowError)])
def test_what_is_no_stream_is_refused(stream: Any, error: type[Exception]) -> None:
    device = on_device(make_case(SMALL))
    before = device.snapshot()
    with pytest.raises(error):
        bind(device, device.processor(BACKEND)).rewrite(device.events, device.block_table, stream=stream)
    assert same_bits(device.pools, before)


# --- query capture --------------------------------------------------------------------------------------------

# The queries of a prompt's piece of a real model, as vLLM keeps them: whole vectors, more than one per thread.
PREFILL = CaptureShape(
    1500, heads=32, head_dim=128, page_size=16, num_blocks=300, num_pages=130, num_layers=2, padding=36,
    query_layout="qkv", dtype="bfloat16",
)  # fmt: skip


def against_the_cpu(shape: CaptureShape) -> None:
    """Bit for bit, every byte around included."""
    device, host = make_capture(shape).to(DEVICE), make_capture(shape)
    bind_capture(device, BACKEND)()
    bind_capture(host, "cpu")()
    assert device.same_bytes(host)


@needs_cuda
@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(
    shape=capture_shapes,
    heads=st.sampled_from([1, 3, 8, 33]),
    head_dim=st.sampled_from([1, 7, 16, 20, 64, 80, 96, 128, 192, 256]),
    missing=st.booleans(),
)
def test_capture(shape: CaptureShape, heads: int, head_dim: int, missing: bool) -> None:
    """missing: slots and pages that do not exist, which the CPU backend refuses and the device skips."""
    shape = replace(shape, heads=heads, head_dim=head_dim, missing=missing)
    if missing:
        check_capture(BACKEND, shape, DEVICE)
    else:
        against_the_cpu(shape)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 80, "layout": "hnd"}, {"query_layout": "strided"}], ids=str)
def test_capture_of_a_prompt(changes: dict[str, Any], dtype: str) -> None:
    against_the_cpu(replace(PREFILL, dtype=dtype, **changes))


@needs_cuda
def test_capture_in_a_cuda_graph() -> None:
    """As a serving stack holds it: buffers that stay, and other slots, pages and queries in them at each replay."""
    shape = replace(PREFILL, num_tokens=96, num_layers=3, padding=0)
    device = make_capture(shape).to(DEVICE)
    before = [pool.clone() for pool in device.pools]
    capture = bind_capture(device, BACKEND)
    capture()  # the kernels are loaded
    restore(device, before)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        capture()
    torch.cuda.synchronize()
    assert same_bits(device.pools, before), "capturing ran it"
    for seed in range(4):
        other = make_capture(replace(shape, seed=seed, missing=seed == 3))
        other.slots[: 20 * seed] = -1  # a smaller batch, padded
        for buffers, sources in (
            ((device.slots, device.block_to_page), (other.slots, other.block_to_page)),
            (device.queries, other.queries),
            (device.pages, other.pages),
        ):
            for buffer, source in zip(buffers, sources, strict=True):
                buffer.copy_(source)
        graph.replay()
        expected = capture_in_a_loop(other)
        for got, right in zip(device.pages, expected.pages, strict=True):
            assert torch.equal(got.cpu().contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@needs_cuda
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "current"])
def test_capture_on_a_side_stream(explicit: bool) -> None:
    """The queries arrive late there: the copy waits for them, and the host for nobody."""
    device, host = make_capture(PREFILL).to(DEVICE), make_capture(PREFILL)
    bind_capture(host, "cpu")()
    before = [pool.clone() for pool in device.pools]
    capture = bind_capture(device, BACKEND)
    capture()  # the kernels are loaded
    for pool in device.pools:
        pool.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        restore(device, before)
        if not explicit:
            capture()
    if explicit:
        capture(stream=side.cuda_stream)
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    assert device.same_bytes(host)


@needs_cuda
@pytest.mark.parametrize("what", ["queries", "slots", "block_to_page", "pages", "workspace"])
def test_capture_across_two_devices_is_refused(what: str) -> None:
    host = make_capture(CaptureShape(9))
    device = host.to(DEVICE)
    before = [pool.clone() for pool in device.pools]
    pages = host.pages if what == "pages" else device.pages
    workspace = bottleneck_ext.Workspace(1, "cpu" if what == "workspace" else BACKEND)
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match=r"(?i)cpu|cuda"):
        bottleneck_ext.QueryCache(pages).capture(
            0,
            (host if what == "queries" else device).queries[0],
            (host if what == "slots" else device).slots,
            (host if what == "block_to_page" else device).block_to_page,
            workspace=workspace,
        )
    torch.cuda.synchronize()
    assert same_bits(device.pools, before)
    assert host.same_bytes(make_capture(CaptureShape(9)))


# --- whole generations ----------------------------------------------------------------------------------------

EVERY = 7


@pytest.fixture(scope="module")
def smollm2_shape() -> Any:
    """A Llama of SmolLM2-135M's shape with random weights, float32, on the CPU."""
    return random_llama(30)


def random_llama(num_layers: int) -> Any:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def processor_for(model: Any, backend: str, random_scale: float, every: int = EVERY, **changes: Any) -> CacheProcessor:
    """A boundary on every `every`-th token: any token ends a step of that length."""
    boundary = BoundaryConfig(rule="token_ids", token_ids=tuple(range(model.config.vocab_size)), min_step_length=every)
    config = CacheProcessorConfig(
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=3,
        num_query_heads=9,
        head_dim=64,
        processor_dim=128,
        processor_heads=4,
        processor_mlp_dim=560,
        top_k=8,
        recent_window=16,
        boundary=boundary,
        **changes,
    )
    weights = initial_weights(config, random_scale=random_scale, seed=1)
    return CacheProcessor(config, weights, weight_dtype="float32", backend=backend)


def prompts(device: str, lengths: tuple[int, ...] = (40, 23)) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49152, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(model: Any, inputs: dict[str, torch.Tensor], new: int = 32, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options)


def attached(model: Any, processor: CacheProcessor, **options: Any) -> Any:
    from bottlenecked.integrations.transformers import attach

    return attach(model, processor, **options)


@needs_cuda
def test_tokens_are_those_of_the_cpu(smollm2_shape: Any) -> None:
    """float32 on both: a random Processor, the same tokens and the same recalled positions."""
    sequences, recalled = [], []
    gpu_model = copy.deepcopy(smollm2_shape).to(DEVICE)
    stock = generate(gpu_model, prompts(DEVICE)).sequences.cpu()
    for device, backend, model in (("cpu", "cpu", smollm2_shape), (DEVICE, BACKEND, gpu_model)):
        reports: list[Any] = []
        with attached(model, processor_for(model, backend, 5.0), on_boundary=reports.append) as attachment:
            sequences.append(generate(model, prompts(device)).sequences.cpu())
        assert attachment.stats.boundaries == 2 * 5  # the prompt's, and one in seven of 31
        assert attachment.stats.seconds.keys() > {"total"}
        recalled.append([[r.tolist() for r in report.recalled] for report in reports])
    assert torch.equal(sequences[0], sequences[1])
    assert recalled[0] == recalled[1]
    assert not torch.equal(sequences[0], stock)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with attached(gpu_model, processor_for(gpu_model, BACKEND, 5.0)) as attachment:  # nothing waits
            unreported = generate(gpu_model, prompts(DEVICE), **options).sequences.cpu()
        assert torch.equal(unreported, sequences[0])
        assert attachment.stats.boundaries == 2 * 5
        assert attachment.stats.seconds.keys() == {"total"}


QUESTIONS = (
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
)


@needs_cuda
@pytest.mark.smollm2
@pytest.mark.parametrize("question", QUESTIONS)
def test_smollm2_answers_as_on_the_cpu(smollm2: tuple[Any, Any], question: str) -> None:
    """float32 on both, a random Processor at its newlines: the same tokens, which are not stock's."""
    host_model, tokenizer = smollm2
    device_model = copy.deepcopy(host_model).to(DEVICE)
    config = CacheProcessorConfig(
        **backbones.describe({**host_model.config.to_dict(), "architectures": [type(host_model).__name__]}),
        processor_dim=64,
        processor_heads=4,
        processor_mlp_dim=96,
        boundary=BoundaryConfig(token_ids=newline_token_ids(tokenizer)),
    )
    weights = initial_weights(config, random_scale=0.3, seed=3)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 72, "do_sample": False}
    stock = device_model.generate(**inputs.to(DEVICE), **options).cpu()
    sequences, recalled = [], []
    for device, backend, model in (("cpu", "cpu", host_model), (DEVICE, BACKEND, device_model)):
        processor = CacheProcessor(config, weights, weight_dtype="float32", backend=backend)
        reports: list[Any] = []
        with attached(model, processor, tokenizer=tokenizer, on_boundary=reports.append):
            sequences.append(model.generate(**inputs.to(device), **options).cpu())
        recalled.append([tuple(layer) for report in reports for layer in report.recalled[0].tolist()])
    assert torch.equal(sequences[0], sequences[1]), tokenizer.batch_decode([s[0] for s in sequences])
    assert not torch.equal(sequences[0], stock)
    assert len(recalled[0]) == len(recalled[1]) > host_model.config.num_hidden_layers  # of more than one boundary
    others = sum(ours != theirs for ours, theirs in zip(*recalled, strict=True))
    assert others <= 0.02 * len(recalled[0]), f"{others} of {len(recalled[0])} selections are others"  # near ties


@pytest.fixture(params=["random", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def bfloat16_model(request: pytest.FixtureRequest, smollm2_shape: Any) -> Any:
    """A model of SmolLM2's shape on the device: random weights, or its own. No token ends its text."""
    if request.param == "random":
        return copy.deepcopy(smollm2_shape).to(DEVICE, torch.bfloat16)
    model = copy.deepcopy(request.getfixturevalue("smollm2")[0]).to(DEVICE, torch.bfloat16)
    model.set_attn_implementation("sdpa")
    model.generation_config = smollm2_shape.generation_config
    return model


@needs_cuda
def test_identity_in_a_graph_of_ones_own(bfloat16_model: Any) -> None:
    """The forward of a decoded token in a CUDA graph, as benchmarks/gpu/decode.py has it.

    Tokens, the last logits and every bit of the cache are stock's.
    """
    from benchmarks.gpu.decode import Loop

    context: Any = SimpleNamespace(on_gpu=True, timer=torch.cuda)
    ids = prompts(DEVICE, (40,))["input_ids"]

    def run() -> tuple[Loop, list[list[int]]]:
        loop = Loop(context, bfloat16_model, ids, bfloat16_model.prepare_inputs_for_generation, 3 * EVERY)
        return loop, loop.run()[1]

    with torch.no_grad():
        stock, expected = run()
        with attached(bfloat16_model, processor_for(bfloat16_model, BACKEND, 0.0)) as attachment:
            ours, tokens = run()
    assert attachment.stats.boundaries >= 3
    assert tokens == expected
    assert torch.equal(ours.logits, stock.logits)
    for a, b in zip(ours.cache.layers, stock.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@needs_cuda
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(40,), (40, 23, 7)], ids=["single", "padded"])
def test_identity(bfloat16_model: Any, lengths: tuple[int, ...], cache: str) -> None:
    """bfloat16: tokens, logits and every bit of the cache are stock's."""
    model = bfloat16_model
    options = {"cache_implementation": cache} | ({"disable_compile": True} if cache == "static" else {})
    stock = generate(model, prompts(DEVICE, lengths), **options)
    with attached(model, processor_for(model, BACKEND, 0.0)) as attachment:
        ours = generate(model, prompts(DEVICE, lengths), **options)
    assert attachment.stats.boundaries == len(lengths) * 5
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, stock.logits, strict=True))
    for a, b in zip(ours.past_key_values.layers, stock.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def graphs_skipped() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@needs_cuda
def test_compiled_into_cuda_graphs() -> None:
    """`generate` compiles for a StaticCache on a GPU by itself, into CUDA graphs (mode "reduce-overhead").

    The identity has stock's tokens, and every bit of what the same graph gives without boundaries; a random Processor
    in float32 has the tokens it has without compiling. No graph is skipped that stock does not skip.
    """
    model = random_llama(3).to(DEVICE)
    static = {"cache_implementation": "static"}
    inputs = prompts(DEVICE, (40, 23))
    with attached(model, processor_for(model, BACKEND, 5.0)) as attachment:
        expected = generate(model, inputs, **static, disable_compile=True)
        torch.compiler.reset()
        got = generate(model, inputs, **static)
        assert attachment.stats.boundaries == 2 * 2 * 5
    assert torch.equal(got.sequences, expected.sequences)

    model = model.to(torch.bfloat16)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    stock = generate(model, inputs, **static)
    skipped = graphs_skipped()
    torch.compiler.reset()
    outputs = []
    for every in (EVERY, 1 << 16):
        with attached(model, processor_for(model, BACKEND, 0.0, every, rewrite_prompt=every == EVERY)) as attachment:
            outputs.append(generate(model, inputs, **static))
        assert attachment.stats.boundaries == (2 * 5 if every == EVERY else 0)
    ours, never = outputs
    assert graphs_skipped() <= 3 * skipped
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.sequences, never.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, never.logits, strict=True))


@needs_cuda
def test_an_emptied_static_cache_keeps_its_ring() -> None:
    """What a CUDA graph has seen stays where it is, and what it is told is the same."""
    from transformers import StaticCache

    model = random_llama(2).to(DEVICE)
    cache = StaticCache(config=model.config, max_cache_len=80)
    with attached(model, processor_for(model, BACKEND, 5.0)) as attachment:
        sequences, rings = [], []
        for _ in range(2):
            output = generate(model, prompts(DEVICE), past_key_values=cache, disable_compile=True)
            sequences.append(output.sequences)
            (state,) = attachment._states.values()
            rings.append([kept.data_ptr() for kept in (state.ring, state.slot, state.slots)])
            cache.reset()
    assert rings[0] == rings[1]
    assert torch.equal(*sequences)
    assert attachment.stats.boundaries == 2 * 2 * 5


@needs_cuda
def test_kept_caches_go_on() -> None:
    from transformers import DynamicCache, StaticCache

    model = random_llama(2).to(DEVICE)
    made: list[Callable[[], Any]] = [
        lambda: DynamicCache(config=model.config),
        lambda: StaticCache(config=model.config, max_cache_len=80),
    ]
    inputs = prompts(DEVICE)
    for make in made:
        with attached(model, processor_for(model, BACKEND, 5.0)) as attachment:
            at_once = generate(model, inputs, past_key_values=make(), disable_compile=True).sequences
            boundaries = attachment.stats.boundaries
            cache = make()
            first = generate(model, inputs, 12, past_key_values=cache, disable_compile=True).sequences
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
            going_on = {"input_ids": first, "attention_mask": mask}
            second = generate(model, going_on, 20, past_key_values=cache, disable_compile=True).sequences
        assert torch.equal(second, at_once)
        assert attachment.stats.boundaries == 2 * boundaries


@needs_cuda
def test_model_and_processor_on_two_devices_are_refused() -> None:
    model = random_llama(1)
    with pytest.raises(
        UnsupportedError, match=r"on the device cpu and the Processor on cuda:0: .*model.to\('cuda:0'\)"
    ):
        attached(model, processor_for(model, BACKEND, 0.0))
    model = model.to(DEVICE)
    with pytest.raises(UnsupportedError, match=r"on the device cuda:0 and the Processor on the CPU.*backend='cuda:0'"):
        attached(model, processor_for(model, "cpu", 0.0))
