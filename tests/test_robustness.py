"""Extreme numbers: what comes out is as exact as ever, or the call is refused and nothing was written; and the limit
that skips an edit which is too large (max_relative_edit)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError
from bottlenecked import CacheProcessor, reference
from bottlenecked.integrations.transformers import attach

from . import tiny
from .cases import Case, Shape, make_case
from .test_isolation import bits, check_alike, owned
from .test_parity import AVAILABLE, check_selection, check_untouched, check_values, double, reference_mass

Change = Callable[[Case], None]
LARGEST = {"float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}


def check_against_reference(shape: Shape, change: Change, backend: str) -> Any:
    """As test_parity's check_parity, of a case that was changed; returns the report and the reference's masses."""
    case, untouched = make_case(shape), make_case(shape)
    change(case)
    change(untouched)
    report = case.rewrite(case.processor(backend), 2)
    expected = reference.rewrite(
        case.config, case.weights, double(untouched.keys), double(untouched.values), double(untouched.queries),
        case.events, case.block_table, case.query_table,
    )  # fmt: skip
    masses = [
        [reference_mass(untouched, layer, i) for layer in range(shape.num_layers)] for i in range(len(case.events))
    ]
    exact = True
    for i, event in enumerate(case.events):
        for layer in range(shape.num_layers):
            ours, theirs = report.recalled[i][layer], expected.recalled[i][layer]
            exact = exact and ours.tolist() == theirs.tolist()
            check_selection(masses[i][layer], ours - event.sequence_begin, theirs - event.sequence_begin)
    if exact:
        check_values(case, untouched, expected, report, "float32")
    check_untouched(case, untouched, report)
    return report, masses


def fill(views: list[torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces what is not a sentinel."""
    for view in views:
        view.copy_(torch.where(view.isnan(), view, make(view).to(view.dtype)))


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", sorted(LARGEST))
def test_all_logits_are_equal(backend: str, dtype: str) -> None:
    """Queries of zero attend to everything alike: masses are equal to the bit, and the first positions are recalled."""
    shape = Shape(((3, 300, 20), (0, 40, 9)), head_dim=20, top_k=7, recent_window=16, block_size=16, dtype=dtype)

    def change(case: Case) -> None:
        fill(case.queries, torch.zeros_like)

    report, _ = check_against_reference(shape, change, backend)
    for i, begin in enumerate((3, 0)):
        assert report.recalled[i].tolist() == [list(range(begin, begin + 7))] * 2
    case = make_case(shape)
    change(case)
    mass = case.attention_mass(backend)
    prior = 300 - 16
    assert len({*mass[0, 0, :prior].tolist()}) == 1
    wanted = np.mean([1 / (prior + 1 + j) for j in range(16)])
    assert abs(mass[0, 0, 0] - wanted) < 1e-6 * wanted


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_attention_to_one_position(backend: str, scale: float) -> None:
    """All of it, and nothing elsewhere, at positions that differ by KV head; the rest is recalled from the front."""
    shape = Shape(((2, 500, 30),), num_kv_heads=2, group=2, head_dim=16, top_k=4, recent_window=16, num_layers=1)
    chosen = (377, 41)

    def change(case: Case) -> None:
        fill(case.keys, lambda view: torch.zeros_like(view))
        fill(case.queries, lambda view: torch.ones_like(view) * scale)
        for head, position in enumerate(chosen):
            case.keys[0][0, position, head] = scale

    case = make_case(shape)
    change(case)
    mass = case.attention_mass(backend)[0, 0]
    assert {int(p) + 2 for p in np.flatnonzero(mass)} == set(chosen)
    assert mass[chosen[0] - 2] == mass[chosen[1] - 2] == pytest.approx(0.5, rel=2**-22)
    report = case.rewrite(case.processor(backend))
    assert report.recalled[0].tolist() == [sorted([2, 3, *chosen])]
    check_against_reference(shape, change, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_128k_positions(backend: str) -> None:
    shape = Shape(
        ((5, 131072 + 24, 24),), num_layers=1, num_kv_heads=1, group=2, head_dim=16, top_k=32, recent_window=16,
        block_size=32, dtype="bfloat16", seed=4,
    )  # fmt: skip
    report, masses = check_against_reference(shape, lambda case: None, backend)
    assert report.recalled[0].shape == (1, 32)
    assert report.recalled[0].max() > 100_000
    case = make_case(shape)
    mass = case.attention_mass(backend)[0, 0]
    np.testing.assert_allclose(mass, masses[0][0], rtol=3e-5)
    assert abs(mass.sum(dtype=np.float64) - masses[0][0].sum()) < 1e-6


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_beyond_float32_are_refused(backend: str, sign: float) -> None:
    """Also where all are below (found by fuzzing: AVX-512's exponentials of them are zero, not NaN)."""
    case = make_case(Shape(((0, 60, 10),), num_layers=1))
    fill(case.keys, lambda view: torch.full_like(view, 1e25))
    fill(case.queries, lambda view: torch.full_like(view, sign * 1e25))
    before = case.snapshot()
    with pytest.raises(InvalidArgumentError, match="the attention of sequence 0 in layer 0 is not finite"):
        case.rewrite(case.processor(backend))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("size", [1e16, 1e18])
def test_attention_far_below_zero(backend: str, size: float) -> None:
    """Scores near -1e32 and -1e36 are scores: they weigh more than what a row must not see."""
    case = make_case(Shape(((3, 61, 9), (0, 40, 10)), head_dim=16, top_k=5, recent_window=16, num_layers=1))
    fill(case.keys, lambda view: torch.full_like(view, size))
    fill(case.queries, lambda view: torch.full_like(view, -size))
    for sequence, position in ((0, 30), (1, 17)):
        case.keys[0][sequence, position] = size / 2
    mass = case.attention_mass(backend)[0]
    for i, position in ((0, 30 - 3), (1, 17)):
        assert np.flatnonzero(mass[i]).tolist() == [position]
        assert mass[i, position] == pytest.approx(1.0, rel=2**-22)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("scale", [1e-30, 0.88, 1.3, 17.0, 2e38])
def test_what_a_row_must_not_see_at_any_scale(backend: str, scale: float) -> None:
    """Queries of zero weigh all that they may see alike."""
    case = make_case(Shape(((0, 60, 10),), num_layers=1))
    fill(case.queries, torch.zeros_like)
    mass = case.attention_mass(backend, softmax_scale=scale)[0, 0]
    np.testing.assert_allclose(mass, np.mean([1 / (50 + 1 + j) for j in range(10)]), rtol=1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("size", [1e14, 1e16, 1e18])
@pytest.mark.parametrize("step", [12, 4, 7])
def test_processor_attention_far_below_zero(backend: str, step: int, size: float) -> None:
    """Scores near -1e37 are scores in the Processor's own attention too, whole vectors of keys or not."""
    shape = Shape(((0, 60, step),), num_layers=1, head_dim=16, top_k=4)

    def change(case: Case) -> None:
        for name, weight in case.weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight[...] = 0.0
            elif name.endswith(("q_proj.bias", "k_proj.bias")):
                weight[...] = -size if "q_proj" in name else size

    check_against_reference(shape, change, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("num_kv_heads", "num_threads"), [(2, 1), (1, 1), (2, 2)])
def test_attention_mass_is_refused_before_it_is_stored(backend: str, num_kv_heads: int, num_threads: int) -> None:
    """The last of many layers is not finite (found by fuzzing: those before it were written)."""
    case = make_case(Shape(((0, 60, 10), (3, 40, 8)), num_layers=9, num_kv_heads=num_kv_heads))
    fill(case.queries[-1:], lambda view: torch.full_like(view, float("inf")))
    out = np.full((9, 2, 50), 7, np.float32)
    with pytest.raises(InvalidArgumentError, match=r"in layer 8 is not finite.*nothing was written"):
        bottleneck_ext.attention_mass(
            bottleneck_ext.KVCache(case.keys, case.values),
            bottleneck_ext.QueryCache(case.queries, case.query_table),
            [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events],
            case.block_table,
            out=out,
            workspace=bottleneck_ext.Workspace(num_threads, backend),
            recent_window=16,
        )
    assert (out == 7).all()


# ---- the size of what is cached --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", 0.0), ("float32", 1e-45), ("float32", 1e-38), ("float32", 1e-20), ("float32", 1e-4),
        ("float32", 1e10), ("float32", 1e17), ("float32", 1e19), ("float32", 1e20), ("float32", 3e38),
        ("bfloat16", 1e-40), ("bfloat16", 1e-30), ("bfloat16", 1e15), ("bfloat16", 3e19), ("bfloat16", 3.3e38),
        ("float16", 6e-8), ("float16", 6e-5), ("float16", 60000.0),
    ],
)  # fmt: skip
def test_values_of_any_size(dtype: str, size: float, key_space: str, backend: str) -> None:
    """Subnormals to the largest numbers, without a selection: exact, or, beyond 10^17, refused. Never merely wrong."""
    shape = Shape(((1, 40, 12), (0, 9, 9)), top_k=0, head_dim=16, dtype=dtype, key_space=key_space)

    def change(case: Case) -> None:
        for views in (case.keys, case.values):
            fill(views, lambda view: (view.double().clamp(-1, 1) * size).float())

    case = make_case(shape)
    change(case)
    before = case.snapshot()
    try:
        case.rewrite(case.processor(backend))
    except InvalidArgumentError as error:
        told = str(error)
    else:
        check_against_reference(shape, change, backend)
        return
    assert size > 1e17 or (dtype, size) == ("float16", 60000.0), f"{size} was refused: {told}"
    assert "is not finite" in told
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_processor_whose_own_values_explode_is_exact_or_refused(backend: str) -> None:
    """Large numbers arise inside: in u, in q and k, in the gated product, in the edit."""
    shape = Shape(((0, 60, 12),), num_layers=1, head_dim=16, top_k=4)
    seen = set()
    for name in ("in_proj.weight", "q_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight",
                 "down_proj.weight", "out_proj.weight"):  # fmt: skip
        for size in (1e6, 1e12, 1e18, 1e24, 1e36):
            case, untouched = make_case(shape), make_case(shape)
            for made in (case, untouched):
                made.weights = {n: w * np.float32(size) if n.endswith(name) else w for n, w in made.weights.items()}
            before = case.snapshot()
            try:
                report = case.rewrite(case.processor(backend))
            except InvalidArgumentError:
                assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))
                seen.add("refused")
                continue
            expected = reference.rewrite(
                case.config, case.weights, double(untouched.keys), double(untouched.values), double(untouched.queries),
                case.events, case.block_table, case.query_table,
            )  # fmt: skip
            assert report.recalled[0].tolist() == expected.recalled[0].tolist()
            wanted = np.linalg.norm(expected.delta[0][0])
            # A softmax over scores of 10^6 amplifies every rounding: then the size is all that can be compared.
            tolerance = 1e-3 if name != "q_proj.weight" else 1.0
            assert abs(report.delta_norm[0, 0] - wanted) <= tolerance * wanted, (name, size)
            seen.add("exact")
    assert seen == {"refused", "exact"}


# ---- the limit of an edit --------------------------------------------------------------------------------------------

GUARDED = Shape(((3, 90, 20), (0, 141, 33), (6, 12, 12), (0, 50, 7)), num_layers=3, block_size=16, head_dim=20)


def rewrite(case: Case, processor: CacheProcessor, limit: float | None, sequences: Any = None, **options: Any) -> Any:
    """The report and the workspace."""
    workspace = processor.workspace(2)
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table, max_relative_edit=limit
    )
    events = case.events if sequences is None else [case.events[s] for s in sequences]
    return bound.rewrite(events, case.block_table, **options), workspace


def check_limit(shape: Shape, backend: str) -> None:
    """Between two steps' largest relative edits: those above are left as they are, the others do not notice."""
    plain, before = make_case(shape), make_case(shape)
    processor = plain.processor(backend)
    report, workspace = rewrite(plain, processor, None)
    assert report.skipped == (False,) * len(shape.lengths)
    assert workspace.skipped_steps == 0
    largest = (report.delta_norm / report.row_norm).max(0)
    order = np.argsort(largest)
    for kept in range(len(order) + 1):
        above = largest[order[kept]] if kept < len(order) else 2 * largest.max()
        limit = float(above + (largest[order[kept - 1]] if kept else 0)) / 2
        for reports in (True, False):
            case = make_case(shape)
            limited, workspace = rewrite(case, processor, limit, report=reports)
            workspace.synchronize()
            skipped = [s not in order[:kept] for s in range(len(order))]
            assert workspace.skipped_steps == sum(skipped)
            if reports:
                assert limited.skipped == tuple(skipped)
                assert np.array_equal(limited.delta_norm, report.delta_norm)
                assert np.array_equal(limited.row_norm, report.row_norm)
                assert all((a == b).all() for a, b in zip(limited.recalled, report.recalled, strict=True))
            for s, left in enumerate(skipped):
                check_alike(case, before if left else plain, s)
            mine = torch.stack([owned(case, s)[0] for s in range(len(order))]).any(0)
            for view, then in zip((*case.keys, *case.values), (*before.keys, *before.values), strict=True):
                assert torch.equal(bits(view[~mine]), bits(then[~mine]))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", sorted(LARGEST))
@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
def test_edits_above_the_limit_are_skipped(backend: str, dtype: str, key_space: str) -> None:
    check_limit(replace(GUARDED, dtype=dtype, key_space=key_space), backend)


def check_exploding(shape: Shape, backend: str, size: float) -> None:
    """Every layer's edit is huge or not finite: with a limit nothing is written and nothing raised."""
    case = make_case(shape)
    case.weights = {n: w * np.float32(size) if "out_proj" in n else w for n, w in case.weights.items()}
    processor, before = case.processor(backend), case.snapshot()
    for reports in (True, False):
        report, workspace = rewrite(case, processor, 100.0, report=reports)
        workspace.synchronize()
        assert workspace.skipped_steps == len(shape.lengths)
        assert report is None or report.skipped == (True,) * len(shape.lengths)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))
    if size < 1e30:
        return
    # Without a limit what a cache can hold is written, which float32 and bfloat16 may do, and anything else refused.
    refused = ""
    try:
        rewrite(case, processor, None)
    except InvalidArgumentError as error:
        refused = str(error)
    if refused:
        assert "is not finite" in refused
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))
    else:
        assert shape.dtype != "float16"
        assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(case.pools, before, strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("size", [1e5, 1e20, 1e37])
def test_a_processor_that_blows_up(backend: str, size: float) -> None:
    check_exploding(GUARDED, backend, size)
    check_exploding(replace(GUARDED, dtype="float16"), backend, size)


def test_one_layer_is_enough() -> None:
    """A layer's edit is compared with the rows of that layer, not drowned in those of all."""
    case, before = make_case(GUARDED), make_case(GUARDED)
    case.weights["layers.1.out_proj.weight"] *= 300
    processor = case.processor()
    report, _ = rewrite(case, processor, 3.0)
    assert report.skipped == (True,) * 4
    relative = report.delta_norm / report.row_norm
    assert (relative[1] > 3).all()
    assert (relative[[0, 2]] < 3).all()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before.pools, strict=True))


def test_a_limit_that_is_none() -> None:
    case = make_case(GUARDED)
    processor = case.processor()
    for wrong in (0, -1.0, float("nan"), float("inf"), 1e39, True, "1", [1.0]):
        with pytest.raises(
            InvalidArgumentError, match=r"max_relative_edit is .*, but it must be None or a positive finite"
        ):
            processor.bind(
                case.keys, case.values, case.queries, workspace=processor.workspace(), max_relative_edit=wrong
            )
    cache, queries = bottleneck_ext.KVCache(case.keys, case.values), bottleneck_ext.QueryCache(case.queries)
    for wrong in (-1.0, float("nan"), float("inf"), 1e39):
        with pytest.raises(
            InvalidArgumentError, match=r"max_relative_edit is .*; it must be positive and finite, or 0"
        ):
            processor.native.rewrite(cache, queries, [], workspace=processor.workspace(), max_relative_edit=wrong)
    before = case.snapshot()
    report, _ = rewrite(case, processor, 1e-60)  # less than any float32: still a limit
    assert report.skipped == (True,) * 4
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))
    for name, weight in case.weights.items():
        if "out_proj" in name:
            weight[...] = 0
    report, _ = rewrite(case, case.processor(), 1e-60)  # no edit exceeds nothing
    assert report.skipped == (False,) * 4


@pytest.mark.parametrize("out", [np.zeros(3, np.int32), np.zeros(4, np.int64), np.zeros((4, 1), np.int32)])
def test_where_skips_are_told(out: np.ndarray) -> None:
    case = make_case(GUARDED)
    processor, before = case.processor(), case.snapshot()
    cache = bottleneck_ext.KVCache(case.keys, case.values)
    queries = bottleneck_ext.QueryCache(case.queries, case.query_table)
    steps = [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events]
    with pytest.raises(InvalidArgumentError, match="skipped"):
        processor.native.rewrite(cache, queries, steps, case.block_table, workspace=processor.workspace(), skipped=out)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e3, 1e30, 1e37])
def test_generate_goes_on_without_what_is_too_large(size: float) -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    stock = model.generate(ids, **settings)
    processor = tiny.processor()
    weights = {n: w * np.float32(size) if "out_proj.weight" in n else w for n, w in processor.weights.items()}
    exploding = CacheProcessor(processor.config, weights, weight_dtype="float32")
    reports: list[Any] = []
    with attach(model, exploding, on_boundary=reports.append, max_relative_edit=0.5) as attachment:
        assert torch.equal(model.generate(ids, **settings), stock)
    skipped = sum(len(report.events) for report in reports)
    assert skipped > 4
    assert all(all(report.skipped) for report in reports)
    assert attachment.stats.skipped == {"relative edit above the limit": skipped}
    assert (attachment.stats.boundaries, attachment.stats.rewrites) == (0, len(reports))
    assert not attachment.stats.sequences
    if size > 1e35:
        with attach(model, exploding), pytest.raises(InvalidArgumentError, match="is not finite"):
            model.generate(ids, **settings)


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    with attach(model, tiny.processor()) as attachment:
        expected = model.generate(ids, **settings)
    boundaries = attachment.stats.boundaries
    with attach(model, tiny.processor(), max_relative_edit=1e6) as attachment:
        assert torch.equal(model.generate(ids, **settings), expected)
    assert attachment.stats.boundaries == boundaries > 4
    assert not attachment.stats.skipped
    for wrong in (0, -1.0, float("inf"), "much"):
        with pytest.raises(InvalidArgumentError, match="max_relative_edit is"):
            attach(model, tiny.processor(), max_relative_edit=wrong)
