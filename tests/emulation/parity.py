"""The emulated CUDA backend behind the whole extension: parity with the float64 reference, and what happens when the
device fails. tests/test_emulation.py runs this file with the extension of build/emulated.

Cases are small: every thread of every block is run one after the other.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottleneck_ext import _core
from tests import test_capture as capture
from tests import test_isolation as isolation
from tests import test_parity as cases
from tests import test_robustness as robustness
from tests.cases import LAYOUTS, CaptureShape, Case, Shape, make_case

BACKEND = "cuda"
EXAMPLES = int(os.environ.get("BOTTLENECKED_EMULATION_EXAMPLES", "15"))
EMULATION = ctypes.CDLL(_core.__file__)
EMULATION.btx_emulation_launches.restype = ctypes.c_int64
EMULATION.btx_emulation_launches_on.restype = ctypes.c_int64
EMULATION.btx_emulation_live.restype = ctypes.c_int64
EMULATION.btx_emulation_calls.restype = ctypes.c_int64

SHAPES = {
    "16-bit, paged, group 4": Shape(
        ((0, 150, 20), (5, 90, 33)), head_dim=64, group=4, top_k=32, recent_window=33, block_size=16, dtype="bfloat16"
    ),
    "head_dim 128, ring of pages": Shape(
        ((3, 200, 40),), head_dim=128, group=2, top_k=32, recent_window=33, block_size=3, page_size=7, dtype="float16"
    ),
    "head_dim 96, blocks of one": Shape(
        ((0, 70, 9), (0, 12, 12)), head_dim=96, group=3, num_kv_heads=1, block_size=1, dtype="bfloat16"
    ),
    "more queries than shared memory holds": Shape(
        ((0, 170, 96),), num_layers=1, head_dim=64, group=7, num_kv_heads=1, recent_window=96, dtype="bfloat16"
    ),
    "more than one split": Shape(
        ((2, 700, 5),), num_layers=1, head_dim=64, num_kv_heads=1, top_k=77, block_size=16, dtype="float16"
    ),
    "float32, group 7": Shape(((0, 120, 17), (9, 31, 31)), head_dim=80, group=7, num_kv_heads=1, page_size=16),
    "unrotated, 16-bit": Shape(
        ((11, 140, 30), (0, 40, 20)), head_dim=64, key_space="unrotated", top_k=32, block_size=16, dtype="bfloat16"
    ),
    "unrotated, odd strides": Shape(((4, 60, 9),), head_dim=20, key_space="unrotated", layout="strided"),
    "columns": Shape(((0, 80, 12),), head_dim=64, layout="column_major", block_size=16, dtype="float16"),
    "rows with a gap": Shape(((6, 80, 12),), head_dim=64, layout="packed", block_size=16, dtype="bfloat16"),
    "heads first": Shape(((0, 80, 12),), head_dim=128, group=1, layout="hnd", block_size=16, dtype="bfloat16"),
    "consolidation only": Shape(((0, 50, 10), (2, 30, 7)), top_k=0, head_dim=64, dtype="bfloat16"),
    "top_k of one": Shape(((0, 90, 10),), top_k=1, head_dim=64, dtype="float16"),
    "k larger than the prior": Shape(((0, 20, 5), (1, 60, 50)), top_k=32, dtype="bfloat16"),
    "no prior": Shape(((0, 5, 5), (9, 1, 1)), top_k=8, head_dim=64, dtype="float16"),
    "odd head_dim": Shape(((0, 77, 9),), head_dim=7, num_kv_heads=3),
    "odd head_dim of more than a vector": Shape(((0, 77, 9),), head_dim=9, num_kv_heads=3, dtype="bfloat16"),
    "steps of all lengths": Shape(
        ((0, 100, 1), (8, 150, 60), (0, 16, 16), (1, 40, 3)), head_dim=64, top_k=5, block_size=3, dtype="bfloat16"
    ),
    "a wide Processor": Shape(
        ((0, 90, 30),), num_layers=1, processor_dim=128, processor_heads=4, processor_mlp_dim=200, top_k=32,
        recent_window=33, dtype="bfloat16",
    ),
    "three layers, heads of 64": Shape(
        ((0, 60, 20), (0, 33, 8)), num_layers=3, processor_dim=64, processor_heads=1, processor_mlp_dim=17
    ),
    "head_dim 256": Shape(((0, 40, 9),), head_dim=256, num_kv_heads=1, num_layers=1, dtype="float16"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def sound_device() -> Iterator[None]:
    """No error is left for the next test, and nothing stays allocated."""
    EMULATION.btx_emulation_reset()
    live = EMULATION.btx_emulation_live()
    yield
    EMULATION.btx_emulation_reset()
    gc.collect()  # a raised exception keeps what its frames held
    assert EMULATION.btx_emulation_live() == live


def test_this_is_the_emulation() -> None:
    assert "emulated" in _core.__file__
    assert BACKEND in [b["name"] for b in bottleneck_ext.backends() if b["available"]]


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_parity(name: str, weight_dtype: str) -> None:
    launches = EMULATION.btx_emulation_launches()
    cases.check_parity(replace(SHAPES[name], seed=len(name)), BACKEND, weight_dtype)
    assert EMULATION.btx_emulation_launches() > launches


@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if shape.head_dim in (64, 128) and shape.dtype != "float32"]
)
def test_parity_of_hoppers_mass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """attention_mass_sm90.cu, in place of attention_mass.cu."""
    monkeypatch.setenv("BTX_EMULATE_SM90A", "1")
    cases.check_parity(replace(SHAPES[name], seed=len(name)), BACKEND, "bfloat16")


small_lengths = st.tuples(st.integers(0, 20), st.integers(1, 160), st.integers(1, 60)).map(
    lambda t: (t[0], max(t[1], t[2]), t[2])
)

small_shapes = st.builds(
    Shape,
    lengths=st.lists(small_lengths, min_size=1, max_size=3).map(tuple),
    num_layers=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    head_dim=st.sampled_from([6, 20, 64, 96, 128]),
    processor_dim=st.sampled_from([12, 24, 48, 96]),
    processor_heads=st.sampled_from([1, 3, 4, 12]),
    processor_mlp_dim=st.sampled_from([1, 17, 40, 140]),
    top_k=st.sampled_from([0, 1, 5, 32, 300]),
    recent_window=st.sampled_from([1, 9, 16, 33]),
    block_size=st.sampled_from([None, 1, 3, 16]),
    page_size=st.sampled_from([None, 1, 7, 16]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    key_space=st.sampled_from(["rotated", "unrotated"]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(shape=small_shapes, weight_dtype=st.sampled_from(["float32", "bfloat16"]))
def test_random_parity(shape: Shape, weight_dtype: str) -> None:
    cases.check_parity(shape, BACKEND, weight_dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_identity_keeps_every_bit(dtype: str) -> None:
    cases.test_identity_keeps_every_bit(BACKEND, dtype)


@pytest.mark.parametrize("layout", ["nhd", "strided"])
def test_ties_go_to_the_smaller_position(layout: str) -> None:
    cases.test_ties_go_to_the_smaller_position(BACKEND, layout, 5)


def test_sequences_do_not_see_each_other() -> None:
    cases.test_sequences_do_not_see_each_other(BACKEND)


# cuBLASLt is not told what rows hold, only how many they are: these are as many each time.
POISONED = ["16-bit, paged, group 4", "head_dim 96, blocks of one", "steps of all lengths", "unrotated, 16-bit"]


@pytest.mark.parametrize("kind", sorted(isolation.POISONS))
@pytest.mark.parametrize("name", POISONED)
def test_poison_elsewhere(name: str, kind: str) -> None:
    for sequence in range(len(SHAPES[name].lengths)):
        isolation.check_poison_elsewhere(SHAPES[name], BACKEND, kind, [sequence])


@pytest.mark.parametrize("name", POISONED)
def test_others_that_take_part(name: str) -> None:
    for sequence in range(len(SHAPES[name].lengths)):
        isolation.check_others_that_take_part(SHAPES[name], BACKEND, sequence, 100.0)


@pytest.mark.parametrize("where", ["keys", "values", "queries"])
def test_one_broken_sequence_refuses_all_or_is_left_out(where: str) -> None:
    isolation.test_one_broken_sequence_refuses_all_or_is_left_out(BACKEND, where)


LIMITED = Shape(((3, 60, 12), (0, 40, 9), (6, 12, 12)), num_layers=2, block_size=16, head_dim=16)


@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_edits_above_the_limit_are_skipped(dtype: str, key_space: str) -> None:
    robustness.check_limit(replace(LIMITED, dtype=dtype, key_space=key_space), BACKEND)


@pytest.mark.parametrize("size", [1e5, 1e20, 1e37])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_processor_that_blows_up(dtype: str, size: float) -> None:
    robustness.check_exploding(replace(LIMITED, dtype=dtype), BACKEND, size)


def test_values_whose_squares_are_too_large_are_refused() -> None:
    for size in (1e15, 1e20, 3e38):
        robustness.test_values_of_any_size("float32", size, "rotated", BACKEND)


def test_attention_mass_alone() -> None:
    shape = Shape(((0, 120, 40), (4, 33, 7), (0, 5, 5)), num_layers=2, head_dim=64, group=3, dtype="bfloat16")
    case = make_case(replace(shape, recent_window=32, block_size=16))
    out = case.attention_mass(BACKEND, 1)
    assert out.shape == (2, 3, 88)
    for layer in range(2):
        for i in range(3):
            mass = cases.reference_mass(case, layer, i)
            np.testing.assert_allclose(out[layer, i, : len(mass)], mass, rtol=cases.MASS_TOLERANCE, atol=1e-12)
            assert (out[layer, i, len(mass) :] == 0).all()


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(shape=capture.capture_shapes, missing=st.booleans())
def test_capture(shape: CaptureShape, missing: bool) -> None:
    capture.check_capture(BACKEND, replace(shape, missing=missing))


def test_products_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECKED_CUDA_PRODUCTS", "fast")
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match='PRODUCTS is "fast"'):
        bottleneck_ext.Workspace(1, BACKEND)
    for right in ("", "general"):
        monkeypatch.setenv("BOTTLENECKED_CUDA_PRODUCTS", right)
        bottleneck_ext.Workspace(1, BACKEND)


@pytest.mark.parametrize("what", ["boundary", "capture"])
def test_the_callers_device_stays(what: str) -> None:
    """Of two devices the caller's code has chosen the second; the work is the first one's."""
    EMULATION.btx_emulation_devices(2, 1)
    try:
        if what == "boundary":
            cases.check_parity(SMALL, BACKEND, "bfloat16")
        else:
            capture.check_capture(BACKEND, CaptureShape(9))
        assert EMULATION.btx_emulation_launches_on(0) > 0
        assert EMULATION.btx_emulation_launches_on(1) == 0
        assert EMULATION.btx_emulation_current_device() == 1
    finally:
        EMULATION.btx_emulation_devices(1, 0)


# --- a device that is slow -------------------------------------------------------------------------------------

SMALL = Shape(((0, 60, 9), (2, 21, 5)), head_dim=16, block_size=8, dtype="bfloat16", key_space="unrotated")


def bind(case: Case, workspace: bottleneck_ext.Workspace | None = None) -> Any:
    processor = case.processor(BACKEND, "bfloat16")
    workspace = processor.workspace() if workspace is None else workspace
    return processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table)


def bits(pools: list[torch.Tensor]) -> list[torch.Tensor]:
    return [pool.view(torch.int16) for pool in pools]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(ours), bits(theirs), strict=True))


@pytest.fixture
def deferred() -> Iterator[None]:
    """Work is done no sooner than somebody waits for it."""
    EMULATION.btx_emulation_defer(1)
    yield
    EMULATION.btx_emulation_defer(0)


def test_calls_may_overtake_the_device(deferred: None) -> None:
    """More boundaries than there are slots for plans, none waited for, are as if each had been."""
    one_by_one, together = make_case(SMALL), make_case(SMALL)
    waiting, hurrying = bind(one_by_one), bind(together)
    before = together.snapshot()
    for i in range(7):
        events = one_by_one.events[i % 2 :][:1] if i % 3 else one_by_one.events
        waiting.rewrite(events, one_by_one.block_table)
        hurrying.rewrite(events, together.block_table.copy(), report=False)
        assert i > 0 or same(together.pools, before)  # nothing happened yet
    hurrying.workspace.synchronize()
    assert same(together.pools, one_by_one.pools)


def test_skips_are_counted_when_they_are_known(deferred: None) -> None:
    """Each once, whichever layers found it, also where calls overtake the device and their slots are used again."""
    case = make_case(SMALL)
    case.weights = {n: w * np.float32(1e5) if "out_proj" in n else w for n, w in case.weights.items()}
    processor, before = case.processor(BACKEND, "bfloat16"), case.snapshot()
    workspace = processor.workspace()
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table, max_relative_edit=10.0
    )
    for i in range(7):
        assert bound.rewrite(case.events[i % 2 :], case.block_table, report=False) is None
        assert workspace.skipped_steps <= 2 * i
    assert workspace.skipped_steps < 11
    workspace.synchronize()
    assert workspace.skipped_steps == 11
    assert same(case.pools, before)
    report = bound.rewrite(case.events, case.block_table)
    assert report.skipped == (True, True)
    assert workspace.skipped_steps == 13
    larger = make_case(replace(SMALL, lengths=SMALL.lengths * 40))  # slots grow
    other = processor.bind(
        larger.keys, larger.values, larger.queries, workspace=workspace, query_table=larger.query_table,
        max_relative_edit=10.0,
    )  # fmt: skip
    for _ in range(5):
        other.rewrite(larger.events, larger.block_table, report=False)
    workspace.synchronize()
    assert workspace.skipped_steps == 13 + 5 * 80


def test_the_workspace_of_a_long_generation_seldom_grows() -> None:
    """As on CPUs; planned, which is what a boundary takes (tests/device.c)."""
    processor = make_case(SMALL).processor(BACKEND, "bfloat16").native
    sizes = [processor.workspace_bytes(1, 1, end, cache_dtype="bfloat16") for end in range(500, 33000, 30)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * np.log2(33000 / 500) + 2


def test_reports_are_waited_for(deferred: None) -> None:
    cases.check_parity(SMALL, BACKEND, "bfloat16")


def test_what_the_device_refuses_is_told_by_the_next_call(deferred: None) -> None:
    case = make_case(SMALL)
    bound = bind(case)
    case.queries[1][case.query_table[1, 0], 20 % SMALL.recent_window] = float("nan")
    before = case.snapshot()
    bound.rewrite(case.events, case.block_table, report=False)
    with pytest.raises(bottleneck_ext.InvalidArgumentError, match="sequence 1"):
        bound.workspace.synchronize()
    assert same(case.pools, before)
    bound.workspace.synchronize()  # it is told once
    bound.rewrite(case.events[:1], case.block_table)
    assert not same(case.pools, before)


def told_of_one_refusal(pieces: int) -> tuple[list[str], bool]:
    """Of NaN in a key of the window, which the mass refuses and the edit does again, when so many pieces of the work
    are done; and whether that was not all of it."""
    case = make_case(SMALL)
    bound, told = bind(case), []
    bound.rewrite(case.events, case.block_table)
    for keys in case.keys:
        keys[case.block_table[1, 22 // 8], 22 % 8] = float("nan")
    bound.rewrite(case.events[1:], case.block_table, report=False)
    is_under_way = EMULATION.btx_emulation_advance(pieces) == pieces
    for call in (lambda: bound.rewrite(case.events[:1], case.block_table, report=False), bound.workspace.synchronize):
        try:
            call()
        except bottleneck_ext.InvalidArgumentError as refusal:
            told.append(str(refusal))
    bound.workspace.synchronize()
    return told, is_under_way


def test_a_refusal_is_told_once_however_far_the_device_is(deferred: None) -> None:
    pieces, is_under_way = 0, True
    while is_under_way:
        told, is_under_way = told_of_one_refusal(pieces)
        gc.collect()  # what is freed waits for the device
        assert len(told) == 1, (pieces, told)
        assert "sequence 1" in told[0]
        pieces += 1
    assert pieces > 10


# --- CUDA graphs -------------------------------------------------------------------------------------------------

LONGER = replace(SMALL, lengths=((0, 400, 9), (2, 300, 5)))


def captured(work: Callable[[], object]) -> bool:
    """Whether there is a graph then, or the capture was invalidated."""
    EMULATION.btx_emulation_capture(1)
    try:
        work()
    finally:
        is_valid = EMULATION.btx_emulation_capture(0)
    return bool(is_valid)


def test_a_captured_call_is_done_at_each_replay() -> None:
    case, right = make_case(SMALL), make_case(SMALL)
    bound, uncaptured = bind(case), bind(right)
    bound.rewrite(case.events, case.block_table)
    uncaptured.rewrite(right.events, right.block_table)
    assert captured(lambda: bound.rewrite(case.events, case.block_table, report=False))
    assert same(case.pools, right.pools), "capturing ran it"
    for _ in range(2):
        EMULATION.btx_emulation_replay()
        uncaptured.rewrite(right.events, right.block_table)
        assert same(case.pools, right.pools)


def test_a_refused_call_leaves_the_graph_its_memory() -> None:
    """Nor is anything allocated for it: neither for a call that needs no more memory, nor for one that does."""
    case, right, longer = make_case(SMALL), make_case(SMALL), make_case(LONGER)
    bound, uncaptured = bind(case), bind(right)
    bound.rewrite(case.events, case.block_table)
    uncaptured.rewrite(right.events, right.block_table)
    captured(lambda: bound.rewrite(case.events, case.block_table, report=False))
    of_longer, before = bind(longer, bound.workspace), longer.snapshot()
    nbytes, live = bound.workspace.nbytes, EMULATION.btx_emulation_live()
    for refused, of in ((bound, case), (of_longer, longer)):
        with pytest.raises(bottleneck_ext.InvalidArgumentError, match="belongs to a captured CUDA graph"):
            refused.rewrite(of.events, of.block_table, report=False)
    assert bound.workspace.nbytes == nbytes
    assert EMULATION.btx_emulation_live() == live
    assert same(longer.pools, before)
    EMULATION.btx_emulation_replay()
    uncaptured.rewrite(right.events, right.block_table)
    assert same(case.pools, right.pools)


@pytest.mark.parametrize("warm", [True, False])
def test_a_capture_that_wants_memory_is_refused_and_stays_valid(warm: bool) -> None:
    case, longer = make_case(SMALL), make_case(LONGER)
    bound = bind(case)
    of_longer, before = bind(longer, bound.workspace), longer.snapshot()
    if warm:
        bound.rewrite(case.events, case.block_table)

    def refused() -> None:
        with pytest.raises(bottleneck_ext.InvalidArgumentError, match="make the same call once before"):
            of_longer.rewrite(longer.events, longer.block_table, report=False)

    assert captured(refused)
    assert same(longer.pools, before)
    of_longer.rewrite(longer.events, longer.block_table)
    assert captured(lambda: of_longer.rewrite(longer.events, longer.block_table, report=False))


@pytest.mark.parametrize("what", ["report", "mass"])
@pytest.mark.parametrize("pending", [True, False])
def test_what_is_waited_for_cannot_be_captured(what: str, pending: bool) -> None:
    """Nor is an earlier call waited for, which would end the capture; the workspace stays everybody's."""
    case, right = make_case(SMALL), make_case(SMALL)
    bound, uncaptured = bind(case), bind(right)
    mass = torch.empty(SMALL.num_layers, 2, 51)
    steps = [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events]

    def call() -> object:
        if what == "report":
            return bound.rewrite(case.events, case.block_table)
        return bottleneck_ext.attention_mass(
            bound.kv_cache, bound.query_cache, steps, case.block_table, out=mass, workspace=bound.workspace,
            recent_window=SMALL.recent_window,
        )  # fmt: skip

    def refused() -> None:
        with pytest.raises(bottleneck_ext.InvalidArgumentError, match="waited for"):
            call()

    for _ in range(2):
        bound.rewrite(case.events, case.block_table, report=False)
        uncaptured.rewrite(right.events, right.block_table)
    if not pending:
        bound.workspace.synchronize()
    assert captured(refused)
    assert same(case.pools, right.pools)
    call()  # nothing was captured
    if what == "report":
        uncaptured.rewrite(right.events, right.block_table)
    assert captured(lambda: bound.rewrite(case.events, case.block_table, report=False))
    EMULATION.btx_emulation_replay()
    uncaptured.rewrite(right.events, right.block_table)
    assert same(case.pools, right.pools)


def fail_captured(bound: Any, case: Case, fault: str, stream: int | None = None) -> bool:
    """A captured rewrite in which a call of the device fails; whether there is a graph all the same."""

    def refused() -> None:
        EMULATION.btx_emulation_fail(fault.encode())
        with pytest.raises(bottleneck_ext.BottleneckError):
            bound.rewrite(case.events, case.block_table, report=False, stream=stream)

    is_valid = captured(refused)
    EMULATION.btx_emulation_fail(b"")
    return is_valid


def calls_of_a_rewrite(bound: Any, case: Case, function: str) -> int:
    return count_calls(lambda: bound.rewrite(case.events, case.block_table, report=False))[function]


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "launch"])
def test_a_capture_that_failed_does_not_keep_the_workspace(function: str) -> None:
    case = make_case(SMALL)
    bound = bind(case)
    bound.rewrite(case.events, case.block_table)
    for call in range(1, calls_of_a_rewrite(bound, case, function) + 1):
        assert not fail_captured(bound, case, f"{function}:{call}:901")
        bound.rewrite(case.events, case.block_table)
    assert captured(lambda: bound.rewrite(case.events, case.block_table, report=False))


def test_a_failure_that_leaves_a_graph_leaves_it_the_workspace() -> None:
    """What was captured before it may be run; where nothing was, the workspace is everybody's."""
    case = make_case(SMALL)
    for function in ("cudaMemcpyAsync", "launch"):
        bound = bind(case)
        bound.rewrite(case.events, case.block_table)
        for call in range(1, calls_of_a_rewrite(bound, case, function) + 1):
            assert fail_captured(bound, case, f"{function}:{call}:1")
            if function == "launch":
                with pytest.raises(bottleneck_ext.InvalidArgumentError, match="belongs to a captured CUDA graph"):
                    bound.rewrite(case.events, case.block_table)
                bound = bind(case)
            bound.rewrite(case.events, case.block_table)


def test_a_call_waits_for_the_latest_on_another_stream() -> None:
    """Also where a capture failed, or a call that was not, since that."""
    case = make_case(SMALL)
    bound = bind(case)

    def waits(stream: int) -> int:
        rewrite = bound.rewrite
        return count_calls(
            lambda: rewrite(case.events, case.block_table, report=False, stream=stream) and None
        )["cudaStreamWaitEvent"]  # fmt: skip

    assert waits(16) == 0
    assert [waits(32), waits(32), waits(16)] == [1, 0, 1]
    for function in ("launch", "cudaMemcpyAsync"):
        assert not fail_captured(bound, case, f"{function}:1:901", stream=48)
        assert [waits(48), waits(16), waits(16)] == [1, 1, 0]
        EMULATION.btx_emulation_fail(f"{function}:1:1".encode())
        with pytest.raises(bottleneck_ext.BottleneckError):
            bound.rewrite(case.events, case.block_table, report=False, stream=16)
        EMULATION.btx_emulation_fail(b"")
        assert [waits(48), waits(16)] == [1, 1]
    bound.workspace.synchronize()
    assert waits(32) == 0


def test_a_smaller_call_takes_no_room_from_a_capture() -> None:
    case = make_case(SMALL)
    bound = bind(case)
    bound.rewrite(case.events, case.block_table)
    bound.rewrite(case.events[:1], case.block_table)
    assert captured(lambda: bound.rewrite(case.events, case.block_table, report=False))


def test_calls_beside_a_capture_of_another_stream() -> None:
    """There the runtime does not even say whether the default stream is captured."""
    case, longer = make_case(SMALL), make_case(LONGER)
    bound = bind(case)
    bound.rewrite(case.events, case.block_table)
    of_longer, before = bind(longer, bound.workspace), longer.snapshot()
    for call in (
        lambda: of_longer.rewrite(longer.events, longer.block_table, report=False),
        lambda: of_longer.rewrite(longer.events, longer.block_table),
        lambda: bound.rewrite(case.events, case.block_table, report=False),
    ):
        EMULATION.btx_emulation_fail(b"cudaStreamIsCapturing:1:906")
        with pytest.raises(bottleneck_ext.InvalidArgumentError, match="until that has ended"):
            call()
        EMULATION.btx_emulation_fail(b"")
    assert same(longer.pools, before)
    of_longer.rewrite(longer.events, longer.block_table)
    EMULATION.btx_emulation_fail(b"cudaStreamIsCapturing:1+:906")
    assert bottleneck_ext.Workspace(1, BACKEND, reserve=4096).nbytes == 4096  # for no stream


# --- a device that fails -----------------------------------------------------------------------------------------

FUNCTIONS = (
    "cudaMalloc", "cudaMallocHost", "cudaHostAlloc", "cudaEventCreate", "cudaEventCreateWithFlags", "cudaEventRecord",
    "cudaEventSynchronize", "cudaEventElapsedTime", "cudaMemcpy", "cudaMemcpyAsync", "cudaMemsetAsync",
    "cudaStreamSynchronize", "cudaStreamIsCapturing", "cudaStreamWaitEvent", "cudaFuncSetAttribute", "cudaGetDevice",
    "cudaGetDeviceCount", "cudaDeviceGetAttribute", "launch",
)  # fmt: skip
FAILURES = (bottleneck_ext.BottleneckError, MemoryError)


def rewrite_all(case: Case) -> str:
    """Rewrites twice; returns what had been done when the device failed."""
    done = "nothing"
    try:
        bound = bind(case)
        bound.rewrite(case.events, case.block_table)
        done = "once"
        bound.rewrite(case.events, case.block_table, report=False)
        done = "called twice"
        bound.workspace.synchronize()
        done = "twice"
    except bottleneck_ext.RebuildNeededError:
        done = "rebuild"
    except FAILURES as error:
        done += f", then {error}"
    return done


def count_calls(work: Callable[[], None]) -> dict[str, int]:
    before = {name: EMULATION.btx_emulation_calls(name.encode()) for name in FUNCTIONS}
    work()
    return {name: EMULATION.btx_emulation_calls(name.encode()) - before[name] for name in FUNCTIONS}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_call_may_fail(function: str) -> None:
    """A failure is raised, or does not matter. Only RebuildNeededError leaves anything but the caches as they were."""
    twice, once = make_case(SMALL), make_case(SMALL)
    calls = count_calls(lambda: rewrite_all(twice))[function]
    bind(once).rewrite(once.events, once.block_table)
    before = make_case(SMALL).snapshot()
    for call in range(1, calls + 1):
        case = make_case(SMALL)
        EMULATION.btx_emulation_fail(f"{function}:{call}".encode())
        done = rewrite_all(case)
        EMULATION.btx_emulation_reset()
        if done.startswith("nothing"):
            assert same(case.pools, before), (call, done)
        elif done.startswith("once"):
            assert same(case.pools, once.pools), (call, done)
        elif done == "twice":
            assert same(case.pools, twice.pools), (call, done)


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost", "cudaEventCreate", "cudaEventCreateWithFlags"])
def test_what_failed_may_be_tried_again(function: str) -> None:
    """After a shortage the same objects work."""
    right = make_case(SMALL)
    right_bound = bind(right)
    calls = count_calls(lambda: right_bound.rewrite(right.events, right.block_table))[function]
    for call in range(1, calls + 1):
        case = make_case(SMALL)
        bound = bind(case)
        EMULATION.btx_emulation_fail(f"{function}:{call}".encode())
        told = ""
        try:
            bound.rewrite(case.events, case.block_table)
        except FAILURES as error:
            told = repr(error)
            bound.rewrite(case.events, case.block_table)
        assert same(case.pools, right.pools), (call, told)


def test_a_lost_device_says_so() -> None:
    case = make_case(SMALL)
    bound = bind(case)
    EMULATION.btx_emulation_fail(b"launch:1")
    with pytest.raises(bottleneck_ext.BottleneckError, match="restart"):
        bound.rewrite(case.events, case.block_table)
    with pytest.raises(bottleneck_ext.BottleneckError, match="restart"):
        bound.rewrite(case.events, case.block_table)


def test_an_old_driver_is_no_device() -> None:
    EMULATION.btx_emulation_fail(b"cudaGetDeviceCount:1+:35")
    assert BACKEND not in [b["name"] for b in bottleneck_ext.backends() if b["available"]]
    with pytest.raises(bottleneck_ext.UnsupportedError):
        make_case(SMALL).processor(BACKEND)
