"""The C core against the float64 reference: selection, values, untouched bits, on every instruction set.

Selection must be identical. The one exception is stated, not hidden: where the reference's own masses around the
k-th place differ by less than float32 can tell (`MASS_TOLERANCE`, relative), either neighbour is right; then the
masses of what was chosen must be within that tolerance of the best.

Values: float32 rounding enters at most a few hundred times on the way through the block, so the edit may be off by
`EDIT_TOLERANCE[weight_dtype]` times the largest edit of its layer and sequence; the cache then rounds once, which
adds half a unit in the last place of its dtype.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottlenecked import reference

from .cases import LAYOUTS, NAMED, Case, Shape, make_case

AVAILABLE = [b["name"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"]
EXAMPLES = int(os.environ.get("BOTTLENECKED_PARITY_EXAMPLES", "120"))

MASS_TOLERANCE = 3e-5
EDIT_TOLERANCE = {"float32": 2.0**-24 * 256, "bfloat16": 2.0**-8}
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {
    "float32": 2.0**-150,
    "float16": 2.0**-25,
    "bfloat16": 2.0**-134,
}  # half of the smallest subnormal


def double(views: list[torch.Tensor]) -> list[np.ndarray]:
    return [view.double().numpy() for view in views]


def reference_mass(case: Case, layer: int, index: int) -> np.ndarray:
    event = case.events[index]
    window = np.arange(event.window_begin(case.shape.recent_window), event.step_end)
    q = reference.gather(double(case.queries)[layer], case.query_table[event.sequence], window)
    seen = np.arange(event.sequence_begin, event.step_end)
    k = reference.gather(double(case.keys)[layer], case.block_table[event.sequence], seen)
    return reference.attention_mass(q, k, case.shape.head_dim**-0.5)


def check_selection(mass: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.tolist() == theirs.tolist():
        return
    assert len(set(ours.tolist())) == len(theirs), (ours, theirs)
    assert (np.diff(ours) > 0).all()
    swapped = np.setdiff1d(ours, theirs)
    missed = np.setdiff1d(theirs, ours)
    assert mass[missed].max() - mass[swapped].min() <= MASS_TOLERANCE * mass[missed].max(), (ours, theirs)


def check_parity(shape: Shape, backend: str, weight_dtype: str = "float32", num_threads: int = 2) -> None:
    case, untouched = make_case(shape), make_case(shape)
    report = case.rewrite(case.processor(backend, weight_dtype), num_threads)
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
            exact = exact and ours.tolist() == theirs.tolist()
            if ours.tolist() != theirs.tolist():
                mass = reference_mass(untouched, layer, i)
                check_selection(mass, ours - event.sequence_begin, theirs - event.sequence_begin)
    if exact:  # with another selection every row differs; test_selection_is_exact keeps count
        check_values(case, untouched, expected, report, weight_dtype)
    check_untouched(case, untouched, report)


def check_values(case: Case, before: Case, expected: reference.Rewrite, report, weight_dtype: str) -> None:
    shape = case.shape
    tolerance = EDIT_TOLERANCE[weight_dtype]
    for layer in range(shape.num_layers):
        for i, event in enumerate(case.events):
            edit = expected.delta[i][layer]
            allowed_edit = tolerance * np.abs(edit).max()
            norm = np.linalg.norm(edit)
            assert abs(report.delta_norm[layer, i] - norm) <= tolerance * norm + 1e-30
            rows = np.concatenate([report.recalled[i][layer], np.arange(report.window_begin[i], event.step_end)])
            for ours, old, want in (
                (case.keys, before.keys, expected.keys),
                (case.values, before.values, expected.values),
            ):
                table = case.block_table[event.sequence]
                got = reference.gather(ours[layer].double().numpy(), table, rows)
                right = reference.gather(want[layer], table, rows)
                start = reference.gather(old[layer].double().numpy(), table, rows)
                # the f32 sum of old and edit rounds too, before the cache's own rounding
                allowed = (
                    allowed_edit
                    + np.abs(right) * HALF_ULP[shape.dtype] * (1 + 2.0**-10)
                    + np.maximum(np.abs(start), np.abs(right)) * 2.0**-24
                    + SMALLEST[shape.dtype]
                )
                assert (np.abs(got - right) <= allowed).all(), (np.abs(got - right) / allowed).max()


def check_untouched(case: Case, before: Case, report) -> None:
    shape = case.shape
    bits = torch.int32 if shape.dtype == "float32" else torch.int16
    for layer in range(shape.num_layers):
        touched = torch.zeros(case.keys[layer].shape[:2], dtype=torch.bool)
        for i, event in enumerate(case.events):
            for p in [*report.recalled[i][layer], *range(report.window_begin[i], event.step_end)]:
                touched[case.block_table[event.sequence, p // touched.shape[1]], p % touched.shape[1]] = True
        for now, then in ((case.keys, before.keys), (case.values, before.values)):
            assert torch.equal(now[layer][~touched].view(bits), then[layer][~touched].view(bits))
            now[layer][touched] = then[layer][touched]  # what is left must be equal, gaps between views included
    for pool, old in zip(case.pools, before.pools, strict=True):
        assert torch.equal(pool.view(bits), old.view(bits))


lengths = st.tuples(
    st.integers(0, 40),
    st.one_of(st.integers(1, 60), st.integers(1, 400)),
    st.one_of(st.integers(1, 40), st.integers(1, 300)),
).map(lambda t: (t[0], max(t[1], t[2]), t[2]))

shapes = st.builds(
    Shape,
    lengths=st.lists(lengths, min_size=1, max_size=4).map(tuple),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    head_dim=st.sampled_from([2, 6, 16, 20, 64, 80, 128]),
    processor_dim=st.sampled_from([12, 24, 48, 96]),
    processor_heads=st.sampled_from([1, 3, 4, 12]),
    processor_mlp_dim=st.sampled_from([1, 17, 40, 140]),
    top_k=st.sampled_from([0, 1, 2, 5, 32, 77, 300]),
    recent_window=st.sampled_from([1, 2, 9, 16, 33, 96, 256]),
    block_size=st.sampled_from([None, 1, 3, 16, 32, 128]),
    page_size=st.sampled_from([None, 1, 7, 16]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    key_space=st.sampled_from(["rotated", "rotated", "unrotated"]),
    seed=st.integers(0, 2**31),
    random_scale=st.sampled_from([0.01, 0.5]),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    shape=shapes,
    backend=st.sampled_from(AVAILABLE),
    weight_dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
)
def test_parity(shape: Shape, backend: str, weight_dtype: str) -> None:
    check_parity(shape, backend, weight_dtype)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMED)
def test_parity_of_named_cases(name: str, dtype: str, backend: str) -> None:
    check_parity(replace(NAMED[name], dtype=dtype, seed=7), backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_selection_is_exact(backend: str) -> None:
    """Over many selections near ties in float32 are rare: nearly all must be identical, not merely close."""
    same = total = 0
    for seed in range(12):
        shape = Shape(((0, 700, 30), (5, 400, 60)), num_layers=4, head_dim=32, top_k=32, recent_window=48, seed=seed)
        case, untouched = make_case(shape), make_case(shape)
        report = case.rewrite(case.processor(backend))
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


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 5])
def test_ties_go_to_the_smaller_position(backend: str, layout: str, block_size: int | None) -> None:
    """Equal keys have bit-equal mass wherever they lie, so that ties are real and the smaller position wins."""
    shape = Shape(((3, 150, 9),), num_layers=1, head_dim=20, top_k=21, layout=layout, block_size=block_size, seed=3)
    case = make_case(shape)
    table = case.block_table[0]

    def key(p: int) -> torch.Tensor:
        size = case.keys[0].shape[1]
        return case.keys[0][table[p // size], p % size]

    for p in range(3, 144):  # three different keys, scattered
        key(p).copy_(key(150 + p * p % 3))
    workspace = bottleneck_ext.Workspace(1, backend)
    mass = np.empty((1, 1, 141), np.float32)
    bottleneck_ext.attention_mass(
        bottleneck_ext.KVCache(case.keys, case.values),
        bottleneck_ext.QueryCache(case.queries, case.query_table),
        [(0, 3, 144, 153)],
        case.block_table,
        out=mass,
        workspace=workspace,
    )
    kinds = np.array([p * p % 3 for p in range(3, 144)])
    assert len({*mass[0, 0].tolist()}) == len({*kinds.tolist()}) == 2
    expected = reference.select_top_k(reference_mass(case, 0, 0), 21) + 3
    best = kinds[mass[0, 0].argmax()]
    assert expected.tolist() == (np.flatnonzero(kinds == best)[:21] + 3).tolist()
    assert case.rewrite(case.processor(backend)).recalled[0][0].tolist() == expected.tolist()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_mass_alone(backend: str, dtype: str) -> None:
    shape = Shape(((0, 500, 96), (4, 33, 7), (0, 5, 5)), num_layers=3, head_dim=48, group=3, block_size=16, dtype=dtype)
    case = make_case(replace(shape, recent_window=32))
    out = case.attention_mass(backend)
    assert out.shape == (3, 3, 468)
    for layer in range(3):
        for i in range(3):
            mass = reference_mass(case, layer, i)
            np.testing.assert_allclose(out[layer, i, : len(mass)], mass, rtol=MASS_TOLERANCE, atol=1e-12)
            assert (out[layer, i, len(mass) :] == 0).all()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_identity_keeps_every_bit(backend: str, dtype: str) -> None:
    """W_out = 0: every edit is exactly zero, and a zero edit keeps even the sign of zero."""
    shape = Shape(((0, 90, 20), (2, 41, 9)), block_size=16, dtype=dtype)
    case = make_case(shape)
    for name, weight in case.weights.items():
        if "out_proj" in name:
            weight[...] = 0
    for view in (*case.keys, *case.values):
        cells = view.isfinite() & (torch.rand(view.shape) < 0.3)
        view[cells] = -0.0
    before = case.snapshot()
    report = case.rewrite(case.processor(backend))
    assert (report.delta_norm == 0).all()
    bits = torch.int32 if dtype == "float32" else torch.int16
    assert all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_sequences_do_not_see_each_other(backend: str) -> None:
    """A row of a ragged batch is bit-identical to the same row alone."""
    shape = Shape(((0, 90, 20), (6, 141, 33), (0, 12, 12)), block_size=16, head_dim=20, dtype="bfloat16")
    together = make_case(shape)
    full = together.rewrite(together.processor(backend))
    for i in range(3):
        alone = make_case(shape)
        alone.events = [alone.events[i]]
        report = alone.rewrite(alone.processor(backend))
        assert (report.recalled[0] == full.recalled[i]).all()
        assert (report.delta_norm[:, 0] == full.delta_norm[:, i]).all()
        blocks = torch.from_numpy(alone.block_table[i][alone.block_table[i] >= 0].astype(np.int64))
        for a, b in zip((*alone.keys, *alone.values), (*together.keys, *together.values), strict=True):
            assert torch.equal(a[blocks].view(torch.int16), b[blocks].view(torch.int16))
