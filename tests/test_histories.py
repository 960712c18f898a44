"""Random histories against simple models, looked at after every event: the boundary detector and query pages.
(transformers' are in test_transformers_histories.py, vLLM's in test_vllm_scheduler.py and test_vllm_worker.py.)

A history that fails prints its steps and a line `@reproduce_failure(...)` for the machine's TestCase.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from transformers import DynamicCache

import bottleneck_ext
from bottlenecked import BottleneckError, BoundaryConfig, BoundaryDetector, BoundaryEvent
from bottlenecked.integrations.transformers import attach

from . import tiny

Step = tuple[int, int]


def steps_of(
    text: list[Any], padding: int, line_ends: tuple[int, ...], *, timing: str, min_step_length: int,
    rewrite_prompt: bool, asked: frozenset[int] = frozenset(),
) -> list[Step]:  # fmt: skip
    """All steps of a text that are known to have ended, in order.

    text: of every position "prompt" or the decoded token; the first `padding` do not count. A step that ends with the
    last position is known once somebody has `asked` there.
    """
    steps, begin = [], padding
    for end in range(padding + 1, len(text) + 1):
        follows = text[end] if end < len(text) else None
        known = follows is not None or end in asked
        of_prompt = text[end - 1] == "prompt" and known and (follows != "prompt" or end in asked)
        long_enough = end - begin >= min_step_length
        of_line = timing == "post" and text[end - 1] in line_ends and known and long_enough
        if of_prompt or of_line:
            if of_line or rewrite_prompt:
                steps.append((begin, end))
            begin = end
        if timing == "pre" and follows in line_ends and end - begin >= min_step_length:
            steps.append((begin, end))
            begin = end
    return steps


# ---- the boundary detector -------------------------------------------------------------------------------------------

NEWLINES = (7, 8)
TOKENS = st.sampled_from([1, 1, 2, *NEWLINES])


@dataclass
class Row:
    padding: int
    text: list[Any] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    finished: bool = False
    reported: list[Step] = field(default_factory=list)

    @property
    def has_tokens(self) -> bool:
        return len(self.text) > self.padding


class Detections(RuleBasedStateMachine):
    """Sequences that are started, finished and dropped in any order, alone and as rows of a batch."""

    @initialize(
        timing=st.sampled_from(["post", "pre"]), min_step_length=st.integers(1, 4), rewrite_prompt=st.booleans()
    )
    def begin(self, **options: Any) -> None:
        self.options = options
        boundary = BoundaryConfig(
            token_ids=NEWLINES, timing=options["timing"], min_step_length=options["min_step_length"]
        )
        self.detector = BoundaryDetector(boundary, rewrite_prompt=options["rewrite_prompt"])
        self.rows: dict[int, Row] = {}

    def take(self, sequence: int, event: BoundaryEvent | None) -> None:
        if event is not None:
            row = self.rows[sequence]
            assert (event.sequence, event.sequence_begin) == (sequence, row.padding)
            row.reported.append((event.step_begin, event.step_end))

    @rule(sequence=st.integers(0, 3), padding=st.integers(0, 3))
    def start(self, sequence: int, padding: int) -> None:
        self.detector.start(sequence, padding)
        self.rows[sequence] = Row(padding)

    @rule(sequence=st.integers(0, 3), count=st.integers(1, 3))
    def prompt(self, sequence: int, count: int) -> None:
        row = self.rows.get(sequence)
        if row is None or row.finished:
            with pytest.raises(ValueError, match="was not started" if row is None else "finished at position"):
                self.detector.prompt(sequence, count)
            return
        event = self.detector.prompt(sequence, count)
        row.text += ["prompt"] * count
        self.take(sequence, event)

    @rule(sequence=st.integers(0, 3), token=TOKENS)
    def decode(self, sequence: int, token: int) -> None:
        row = self.rows.get(sequence)
        if row is None or not (row.has_tokens or row.finished):
            with pytest.raises(ValueError, match="was not started" if row is None else "empty prompt"):
                self.detector.decode(sequence, token)
            return
        event = self.detector.decode(sequence, token)
        if not row.finished:
            row.text.append(token)
        self.take(sequence, event)

    @rule(tokens=st.lists(TOKENS, min_size=4, max_size=4))
    def decode_rows(self, tokens: list[int]) -> None:
        if not all(row.has_tokens or row.finished for row in self.rows.values()):
            return
        events = self.detector.decode_rows(tokens[: len(self.rows)])
        for (_, row), token in zip(sorted(self.rows.items()), tokens, strict=False):
            if not row.finished:
                row.text.append(token)
        assert [event.sequence for event in events] == sorted({event.sequence for event in events})
        for event in events:
            self.take(event.sequence, event)

    @rule(count=st.integers(1, 3))
    def prompt_rows(self, count: int) -> None:
        if any(row.finished for row in self.rows.values()):
            return
        events = self.detector.prompt_rows(count)
        for row in self.rows.values():
            row.text += ["prompt"] * count
        for event in events:
            self.take(event.sequence, event)

    @rule(sequence=st.integers(0, 3))
    def due(self, sequence: int) -> None:
        row = self.rows.get(sequence)
        if row is None:
            return
        event = self.detector.due(sequence)
        if not row.finished:
            row.asked.add(len(row.text))
        self.take(sequence, event)
        assert self.detector.due(sequence) is None

    @rule(sequence=st.integers(0, 3))
    def finish(self, sequence: int) -> None:
        if sequence in self.rows:
            self.detector.finish(sequence)
            self.rows[sequence].finished = True

    @rule(sequence=st.integers(0, 3))
    def drop(self, sequence: int) -> None:
        if sequence in self.rows:
            self.detector.drop(sequence)
            del self.rows[sequence]

    @invariant()
    def reports_are_those_of_the_text(self) -> None:
        for sequence, row in getattr(self, "rows", {}).items():
            wanted = steps_of(row.text, row.padding, NEWLINES, **self.options, asked=frozenset(row.asked))
            assert row.reported == wanted, (sequence, row)

    @rule(sequence=st.integers(0, 3))
    def lengths(self, sequence: int) -> None:
        """A rule, not an invariant: asking settles what `decode_rows` has only counted."""
        if sequence in self.rows:
            assert self.detector.length(sequence) == len(self.rows[sequence].text)

    def teardown(self) -> None:
        for sequence in list(getattr(self, "rows", ())):
            self.detector.drop(sequence)
        assert getattr(self, "detector", None) is None or self.detector._rows == {}


TestDetections = Detections.TestCase
TestDetections.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, print_blob=True)


# ---- query pages -----------------------------------------------------------------------------------------------------

NUM_BLOCKS, NUM_PAGES, PAGE_SIZE = 6, 4, 3


class QueryPages(RuleBasedStateMachine):
    """Blocks that are given pages and lose them, and tokens that are captured: every byte of all pages, every time."""

    @initialize(layout=st.sampled_from(["rows", "every other"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def begin(self, layout: str, dtype: torch.dtype) -> None:
        wide = torch.full((2, NUM_PAGES, PAGE_SIZE, 2, 16), torch.nan, dtype=dtype)
        self.memory, self.pages = wide, wide[..., ::2] if layout == "every other" else wide[..., :8]
        self.expected = wide.clone()
        self.expected_pages = self.expected[..., ::2] if layout == "every other" else self.expected[..., :8]
        self.cache = bottleneck_ext.QueryCache(self.pages.unbind())
        self.workspace = bottleneck_ext.Workspace()
        self.block_to_page = torch.full((NUM_BLOCKS,), -1, dtype=torch.int32)
        self.owners: dict[int, int] = {}  # of a page: the block
        self.number = 0

    @rule(block=st.integers(0, NUM_BLOCKS - 1), page=st.integers(0, NUM_PAGES - 1))
    def map(self, block: int, page: int) -> None:
        if page in self.owners or block in self.owners.values():
            return
        self.owners[page] = block
        self.block_to_page[block] = page

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def unmap(self, page: int) -> None:
        if page in self.owners:
            self.block_to_page[self.owners.pop(page)] = -1

    @rule(
        slots=st.lists(st.integers(-2, NUM_BLOCKS * PAGE_SIZE - 1), max_size=8).filter(
            lambda slots: len({s for s in slots if s >= 0}) == sum(s >= 0 for s in slots)
        ),
        padding=st.integers(0, 2),
        layer=st.integers(0, 1),
    )
    def capture(self, slots: list[int], padding: int, layer: int) -> None:
        self.number += 1
        query = torch.full((len(slots) + padding, 2, 8), float(self.number), dtype=self.pages.dtype)
        query += torch.arange(len(query))[:, None, None] / 16
        self.cache.capture(
            layer, query, torch.tensor(slots, dtype=torch.long), self.block_to_page, workspace=self.workspace
        )
        pages = {block: page for page, block in self.owners.items()}
        for token, slot in enumerate(slots):
            if slot >= 0 and (page := pages.get(slot // PAGE_SIZE)) is not None:
                self.expected_pages[layer, page, slot % PAGE_SIZE] = query[token]

    @rule(slot=st.integers(NUM_BLOCKS * PAGE_SIZE, 1 << 40))
    def refuse(self, slot: int) -> None:
        slots = torch.tensor([0, slot])
        with pytest.raises(bottleneck_ext.InvalidArgumentError, match=rf"slots\[1\] is {slot}"):
            self.cache.capture(0, self.pages[0, 0, :2].clone(), slots, self.block_to_page, workspace=self.workspace)

    @invariant()
    def every_byte_is_as_expected(self) -> None:
        if hasattr(self, "memory"):
            assert torch.equal(self.memory.view(torch.uint8), self.expected.view(torch.uint8))


TestQueryPages = QueryPages.TestCase
TestQueryPages.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, print_blob=True)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_a_row_that_is_no_number_does_not_stop_the_others() -> None:
    """Not even at the first boundary, where the queries are looked at: was every layer's attention ours?"""
    line = tiny.NEWLINES[0]
    ids = torch.tensor([[1, 2, 4], [5, 6, 8]])
    model, reports = tiny.model(), []
    with attach(model, tiny.processor(rewrite_prompt=False), on_boundary=reports.append), torch.no_grad():
        cache = DynamicCache(config=model.config)

        def feed(new: torch.Tensor, first: bool = False) -> None:
            nonlocal ids
            ids = new if first else torch.cat([ids, new], dim=1)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=new.shape[1], past_key_values=cache, use_cache=True, is_first_iteration=first
            )
            model(**inputs)

        feed(ids, first=True)
        cache.layers[0].values[1, :, 0] = torch.nan
        feed(torch.tensor([[line], [1]]))
        feed(torch.tensor([[1], [2]]))
        assert [event.sequence for event in reports[0].events] == [0]
        assert all(layer.keys[0].isfinite().all() for layer in cache.layers)
        feed(torch.tensor([[2], [line]]))
        with pytest.raises(BottleneckError, match="sequence 1 in layer"):
            feed(torch.tensor([[2], [2]]))
