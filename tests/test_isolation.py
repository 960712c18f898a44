"""No byte of one sequence depends on another: what is poisoned elsewhere changes nothing, bit for bit.

Elsewhere is everything that a step does not own: other sequences of the batch, whether they take part or not, blocks
and pages of nobody, positions to come, padding, whatever a block, a page or the workspace held before. Poison is NaN,
infinity and huge numbers; where another step takes part, whose non-finite values rightly refuse the call, it is other
finite ones. tests/emulation/parity.py runs the same on the emulated device, `make valgrind` forbids the memory itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError

from .cases import DTYPES, Case, Shape, make_case
from .test_parity import AVAILABLE, shapes

POISONS = {"nan": torch.nan, "infinity": torch.inf, "-infinity": -torch.inf, "huge": None, "zero": 0.0}
SHAPE = Shape(((3, 90, 20), (0, 141, 33), (6, 12, 12), (0, 50, 7)), block_size=16, head_dim=20, page_size=7)

ownership = tuple[list[torch.Tensor], list[torch.Tensor]]


def rewrite(case: Case, backend: str, sequences: list[int], workspace: bottleneck_ext.Workspace | None = None):
    processor = case.processor(backend)
    bound = processor.bind(
        case.keys,
        case.values,
        case.queries,
        workspace=processor.workspace(2) if workspace is None else workspace,
        query_table=case.query_table,
    )
    return bound.rewrite([case.events[s] for s in sequences], case.block_table)


def owned(case: Case, sequence: int) -> ownership:
    """Which cells of the caches [num_blocks, block_size] and of the query pages [num_pages, page_size] a step reads."""
    event, shape = case.events[sequence], case.shape
    cells = torch.zeros(case.keys[0].shape[:2], dtype=torch.bool)
    rows = torch.zeros(case.queries[0].shape[:2], dtype=torch.bool)
    block_size, page_size, pages = cells.shape[1], rows.shape[1], case.query_table.shape[1]
    for position in range(event.sequence_begin, event.step_end):
        cells[case.block_table[sequence, position // block_size], position % block_size] = True
    for position in range(event.window_begin(shape.recent_window), event.step_end):
        rows[case.query_table[sequence, position // page_size % pages], position % page_size] = True
    return cells, rows


def poison(views: list[torch.Tensor], cells: torch.Tensor, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        value = POISONS[kind]
        if value is None:
            largest = torch.finfo(view.dtype).max
            signs = torch.randint(0, 2, view.shape, generator=generator) * 2 - 1
            view[cells] = (signs * largest).to(view.dtype)[cells]
        else:
            view[cells] = value


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_alike(one: Case, other: Case, sequence: int) -> None:
    """All that a sequence owns has the same bits."""
    cells, _ = owned(one, sequence)
    for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(bits(a[cells]), bits(b[cells]))


def check_reports(one, other, i: int, j: int) -> None:
    """Event i of one report, event j of another."""
    assert np.array_equal(one.recalled[i], other.recalled[j])
    assert np.array_equal(one.delta_norm[:, i].view(np.int32), other.delta_norm[:, j].view(np.int32))
    assert np.array_equal(one.row_norm[:, i].view(np.int32), other.row_norm[:, j].view(np.int32))


def check_poison_elsewhere(shape: Shape, backend: str, kind: str, sequences: list[int]) -> None:
    """Poison in all that the steps of some sequences do not own: it changes nothing, and stays."""
    clean, poisoned = make_case(shape), make_case(shape)
    cells = torch.stack([owned(clean, s)[0] for s in sequences]).any(0)
    rows = torch.stack([owned(clean, s)[1] for s in sequences]).any(0)
    poison([*poisoned.keys, *poisoned.values], ~cells, kind, shape.seed)
    poison(poisoned.queries, ~rows, kind, shape.seed + 1)
    before = [view.clone() for view in (*poisoned.keys, *poisoned.values, *poisoned.queries)]
    one, other = rewrite(clean, backend, sequences), rewrite(poisoned, backend, sequences)
    for i, sequence in enumerate(sequences):
        check_alike(clean, poisoned, sequence)
        check_reports(one, other, i, i)
    for view, then in zip((*poisoned.keys, *poisoned.values), before, strict=False):
        assert torch.equal(bits(view[~cells]), bits(then[~cells]))
    for view, then in zip(poisoned.queries, before[2 * shape.num_layers :], strict=True):
        assert torch.equal(bits(view), bits(then))


def check_others_that_take_part(shape: Shape, backend: str, sequence: int, scale: float) -> None:
    """The others' values are other ones, scaled: nothing of this sequence changes."""
    one, other = make_case(shape), make_case(shape)
    generator = torch.Generator().manual_seed(shape.seed + 99)
    for s in range(len(shape.lengths)):
        if s == sequence:
            continue
        cells, rows = owned(other, s)
        for views, mine in (((*other.keys, *other.values), cells), (other.queries, rows)):
            for view in views:
                view[mine] = (torch.randn(view.shape, generator=generator) * scale).to(view.dtype)[mine]
    everybody = list(range(len(shape.lengths)))
    full, changed = rewrite(one, backend, everybody), rewrite(other, backend, everybody)
    check_alike(one, other, sequence)
    check_reports(full, changed, sequence, sequence)


@settings(max_examples=40, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(shape=shapes, backend=st.sampled_from(AVAILABLE), kind=st.sampled_from(sorted(POISONS)), data=st.data())
def test_poison_elsewhere(shape: Shape, backend: str, kind: str, data: st.DataObject) -> None:
    everybody = list(range(len(shape.lengths)))
    sequences = data.draw(st.lists(st.sampled_from(everybody), min_size=1, unique=True))
    check_poison_elsewhere(shape, backend, kind, sequences)


@settings(max_examples=30, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes.filter(lambda shape: len(shape.lengths) > 1),
    backend=st.sampled_from(AVAILABLE),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 100.0]),
    data=st.data(),
)
def test_others_that_take_part(shape: Shape, backend: str, scale: float, data: st.DataObject) -> None:
    check_others_that_take_part(shape, backend, data.draw(st.sampled_from(range(len(shape.lengths)))), scale)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kind", sorted(POISONS))
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_poison_of_every_kind(backend: str, kind: str, dtype: str) -> None:
    for sequences in ([1], [3, 0]):
        check_poison_elsewhere(replace(SHAPE, dtype=dtype), backend, kind, sequences)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("where", ["keys", "values", "queries"])
def test_one_broken_sequence_refuses_all_or_is_left_out(backend: str, where: str) -> None:
    """Without a limit of the edit not a byte changes; with one, values that break the edit break their own step's."""
    shape = replace(SHAPE, top_k=0 if where == "keys" else 4)  # keys of a prior position break the selection
    case, expected = make_case(shape), make_case(shape)
    event = case.events[1]
    last = event.step_end - 1
    cell = case.block_table[1, last // 16], last % 16
    if where == "queries":
        case.queries[0][case.query_table[1, last // 7 % case.query_table.shape[1]], last % 7] = torch.nan
    else:
        getattr(case, where)[0][cell] = torch.nan
    before = case.snapshot()
    with pytest.raises(InvalidArgumentError, match="sequence 1 in layer 0 is not finite"):
        rewrite(case, backend, [0, 1, 2, 3])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(case.pools, before, strict=True))
    processor = case.processor(backend)
    workspace = processor.workspace(2)
    bound = processor.bind(
        case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table, max_relative_edit=1e6
    )
    if where == "queries":  # nothing says which positions the step attended to
        with pytest.raises(InvalidArgumentError, match="the attention of sequence 1 in layer 0 is not finite"):
            bound.rewrite(case.events, case.block_table)
        return
    report = bound.rewrite(case.events, case.block_table)
    assert report.skipped == (False, True, False, False)
    assert workspace.skipped_steps == 1
    right = rewrite(expected, backend, [0, 2, 3])
    for i, sequence in enumerate((0, 2, 3)):
        check_alike(case, expected, sequence)
        check_reports(report, right, sequence, i)
    getattr(expected, where)[0][cell] = torch.nan
    check_alike(case, expected, 1)


# ---- what memory held before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kind", sorted(POISONS))
def test_a_workspace_forgets(backend: str, kind: str) -> None:
    """After larger calls on other values, refused ones among them, a call is as with a new workspace."""
    for shape in (SHAPE, replace(SHAPE, num_kv_heads=4, group=1, top_k=40, recent_window=33, dtype="bfloat16")):
        small = replace(shape, lengths=shape.lengths[2:])
        used, fresh, other = make_case(small), make_case(small), make_case(replace(shape, seed=5))
        workspace = used.processor(backend).workspace(2)
        rewrite(other, backend, [0, 1, 2, 3], workspace)
        poison([*other.keys, *other.values], owned(other, 1)[0], kind, 1)
        with contextlib.suppress(InvalidArgumentError):
            rewrite(other, backend, [0, 1, 2, 3], workspace)
        one, two = rewrite(used, backend, [1, 0], workspace), rewrite(fresh, backend, [1, 0])
        for sequence in (0, 1):
            check_alike(used, fresh, sequence)
            check_reports(one, two, sequence, sequence)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 40])
def test_recycled_blocks_and_pages(backend: str, num_tokens: int) -> None:
    """A sequence is given the blocks and pages of one that has ended, and writes what it needs of them."""
    shape = Shape(((0, 100, 30),), block_size=16, page_size=4, head_dim=20, dtype="bfloat16", recent_window=24)
    recycled, new = make_case(shape), make_case(shape)
    rewrite(recycled, backend, [0])  # the ended one, rewritten as it was
    for case in (recycled, new):
        case.events = [replace(case.events[0], step_begin=max(0, num_tokens - 9), step_end=num_tokens)]
    cells, rows = owned(new, 0)
    generator = torch.Generator().manual_seed(7)
    for layer in range(shape.num_layers):
        for name, mine in (("keys", cells), ("values", cells), ("queries", rows)):
            old, fresh = getattr(recycled, name)[layer], getattr(new, name)[layer]
            fresh[:] = torch.nan
            written = torch.randn(fresh.shape, generator=generator).to(fresh.dtype)
            old[mine], fresh[mine] = written[mine], written[mine]
    one, two = rewrite(recycled, backend, [0]), rewrite(new, backend, [0])
    check_alike(recycled, new, 0)
    check_reports(one, two, 0, 0)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_pages_old_queries(backend: str) -> None:
    """A page that now stands for another block: rows that were not captured since are not read."""
    shape = Shape(((0, 60, 10),), block_size=4, page_size=4, recent_window=12, head_dim=16, num_layers=1)
    old, new = make_case(shape), make_case(shape)
    cells, rows = owned(old, 0)
    assert 0 < rows.sum() < rows.numel()
    for kind in sorted(POISONS):
        poison(old.queries, ~rows, kind, 3)
        one, two = rewrite(old, backend, [0]), rewrite(new, backend, [0])
        check_alike(old, new, 0)
        check_reports(one, two, 0, 0)
    assert bool(cells.any())


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("padding", [1, 15, 16, 33])
def test_padding_is_never_read(backend: str, padding: int) -> None:
    """A padded sequence is bit for bit that sequence without padding, whatever the padding holds."""
    lengths = (70, 20)
    for key_space in ("rotated", "unrotated"):
        shape = Shape(((padding, *lengths),), head_dim=16, layout="hnd", key_space=key_space, dtype="bfloat16")
        plain = make_case(replace(shape, lengths=((0, *lengths),)))
        for kind in ("nan", "huge"):
            padded = make_case(shape)
            for name in ("keys", "values"):
                for to, source in zip(getattr(padded, name), getattr(plain, name), strict=True):
                    to[0, padding:] = source[0]
                poison(getattr(padded, name), ~owned(padded, 0)[0], kind, 1)
            window = range(plain.events[0].window_begin(shape.recent_window), plain.events[0].step_end)
            for to, source in zip(padded.queries, plain.queries, strict=True):
                for position in window:
                    to[padded.query_table[0, 0], (position + padding) % shape.recent_window] = source[
                        plain.query_table[0, 0], position % shape.recent_window
                    ]
            untouched = make_case(replace(shape, lengths=((0, *lengths),)))
            report, expected = rewrite(padded, backend, [0]), rewrite(untouched, backend, [0])
            assert np.array_equal(report.recalled[0] - padding, expected.recalled[0])
            for name in ("keys", "values"):
                for ours, theirs in zip(getattr(padded, name), getattr(untouched, name), strict=True):
                    assert torch.equal(bits(ours[0, padding:]), bits(theirs[0]))
