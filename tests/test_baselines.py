"""The baselines of the benchmarks compute what ours computes: else their times would say nothing.

Selection must be identical. Edits: both sides round on their way through the block, so that they may be apart by
`EDIT_TOLERANCE[dtype]` times the largest edit of their layer, and each then rounds once into the cache. In bfloat16 a
baseline rounds every activation, ours only the operands of products. What is not selected keeps its bits.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.baselines import kvpress
from benchmarks.baselines.naive import Naive, recall
from benchmarks.baselines.plain import Plain
from benchmarks.baselines.stacked import Stacked
from benchmarks.baselines.window import Window
from bottlenecked import BoundaryEvent
from bottlenecked.integrations.transformers import attach

from . import tiny
from .cases import DTYPES, Case, Shape, make_case

EDIT_TOLERANCE = {"float32": 2.0**-24 * 512, "bfloat16": 2.0**-8 * 8}
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

# The longer sequence leaves room behind the others' ends; it takes no part.
BATCH = Shape(((0, 61, 11),) * 3 + ((0, 70, 5),), group=3, layout="hnd", top_k=5)
SHAPES = {
    "one sequence": replace(BATCH, lengths=((0, 61, 11),)),
    "three of five": BATCH,
    "a step longer than R": replace(BATCH, recent_window=7),
    "k larger than the prior": replace(BATCH, lengths=((0, 20, 5),) * 3, top_k=32),
    "no prior": replace(BATCH, lengths=((0, 9, 9),) * 3),
    "consolidation only": replace(BATCH, top_k=0),
    "one head": replace(BATCH, num_kv_heads=1, group=1),
}


class Baselines:
    """A case for ours, in the layout of the baselines: views of the same memory."""

    def __init__(self, shape: Shape, sequences: list[int] | None = None, rows: int | None = None) -> None:
        """sequences: those that take part, default all of the first one's length; rows: of the batch, default all."""
        self.case = make_case(shape)
        same = [s for s, lengths in enumerate(shape.lengths) if lengths == shape.lengths[0]]
        self.case.events = [self.case.events[s] for s in (same if sequences is None else sequences)]
        self.dtype = DTYPES[shape.dtype]
        self.keys, self.values = ([t.transpose(1, 2)[:rows] for t in c] for c in (self.case.keys, self.case.values))
        self.queries = [ring[self.case.query_table[:, 0]][:rows] for ring in self.case.queries]

    def separate(self) -> None:
        """Make the top-k beyond doubt in bfloat16: all queries look for the same thing, top_k keys have it."""
        generator = torch.Generator().manual_seed(1)
        shape = self.case.shape
        for keys, ring in zip(self.keys, self.case.queries, strict=True):
            direction = 2 * torch.randn(shape.head_dim, generator=generator).to(self.dtype)
            ring += direction
            begin = self.case.events[0].window_begin(shape.recent_window)
            keys[:, :, torch.randperm(begin, generator=generator)[: shape.top_k]] += direction
        self.queries = [ring[self.case.query_table[:, 0]][: len(self.keys[0])] for ring in self.case.queries]

    def rewrite(self, name: str) -> Tensor:
        """Recalled positions [num_layers, num_events, k] after a rewrite by a baseline or by "ours"."""
        case = self.case
        if name == "ours":
            weight_dtype = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
            report = case.rewrite(case.processor(weight_dtype=weight_dtype))
            return torch.from_numpy(np.stack(report.recalled, axis=1))
        if name == "naive":
            naive = Naive(case.config, case.weights, self.dtype)
            attention = naive.attention_weights(self.keys, self.queries, case.events)
            return naive.rewrite(self.keys, self.values, attention, case.events)
        kind = Plain if name.startswith("plain") else Stacked
        baseline = kind(case.config, case.weights, self.dtype, compiled=name.endswith("compiled"))
        return baseline.rewrite(self.keys, self.values, self.queries, case.events)


def check(before: Case, ours: Case, baseline: Case, recalled: Tensor) -> None:
    """The baseline's caches against ours, where recalled [num_layers, num_events, k] is what both chose."""
    shape = before.shape
    bits = torch.int32 if shape.dtype == "float32" else torch.int16
    for layer in range(shape.num_layers):
        touched = torch.zeros(before.keys[layer].shape[:2], dtype=torch.bool)
        for event, of_event in zip(before.events, recalled[layer], strict=True):
            touched[event.sequence, of_event] = True
            touched[event.sequence, event.window_begin(shape.recent_window) : event.step_end] = True
        old, right, got = (torch.stack([c.keys[layer], c.values[layer]]) for c in (before, ours, baseline))
        assert torch.equal(got[:, ~touched].view(bits), old[:, ~touched].view(bits))
        old, right, got = (t[:, touched].double() for t in (old, right, got))
        largest = (right - old).abs().max()
        assert largest > 0.05  # the Processor of the case does something
        allowed = EDIT_TOLERANCE[shape.dtype] * largest + 2 * HALF_ULP[shape.dtype] * right.abs()
        assert ((got - right).abs() <= allowed).all(), ((got - right).abs() / allowed).max()


def compare(name: str, shape: Shape, sequences: list[int] | None = None, rows: int | None = None) -> None:
    before, ours, baseline = (Baselines(shape, sequences, rows) for _ in range(3))
    if shape.dtype == "bfloat16":
        for side in (before, ours, baseline):
            side.separate()
    expected, recalled = ours.rewrite("ours"), baseline.rewrite(name)
    assert recalled.dtype == torch.int64
    assert recalled.tolist() == expected.tolist()
    check(before.case, ours.case, baseline.case, recalled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["naive", "plain", "stacked"])
def test_baseline_equals_ours(name: str, shape: str, dtype: str) -> None:
    compare(name, replace(SHAPES[shape], dtype=dtype))


@pytest.mark.parametrize("name", ["naive", "plain", "stacked"])
def test_whole_batch_and_order_of_events(name: str) -> None:
    compare(name, BATCH, sequences=[0, 1, 2], rows=3)  # without a copy of the batch's rows
    compare(name, BATCH, sequences=[2, 0])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("name", "graphs"), [("plain compiled", 1), ("stacked compiled", 2)])
def test_compiled_equals_ours(name: str, graphs: int) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compare(name, replace(BATCH, lengths=((0, 20, 5),), num_layers=3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # one for all layers, no graph break


def test_stacked_keeps_its_buffers_apart() -> None:
    """A second and smaller call gets the memory of the first."""
    large, small = Baselines(BATCH), Baselines(replace(BATCH, lengths=((0, 30, 4),), seed=1))
    stacked = Stacked(large.case.config, small.case.weights, torch.float32)
    stacked.rewrite(large.keys, large.values, large.queries, large.case.events)
    again = stacked.rewrite(small.keys, small.values, small.queries, small.case.events)
    ours = Baselines(small.case.shape)
    assert again.tolist() == ours.rewrite("ours").tolist()
    check(Baselines(small.case.shape).case, ours.case, small.case, again)


def test_stacked_refuses_other_layouts() -> None:
    made = Baselines(replace(BATCH, layout="nhd"))
    with pytest.raises(ValueError, match="a cache is not contiguous: give"):
        made.rewrite("stacked")


@pytest.mark.parametrize("rewrite_prompt", [True, False])
def test_naive_generates_what_ours_generates(rewrite_prompt: bool) -> None:
    processor = tiny.processor(rewrite_prompt=rewrite_prompt)
    model, (ids, mask) = tiny.model(), tiny.prompts((13,))
    reports: list = []
    with attach(model, processor, on_boundary=reports.append):
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[0, 13:].tolist()
    model.set_attn_implementation("eager")
    naive = Naive(processor.config, processor.weights, torch.float32)
    generation = naive.generate(model, ids, 40, tiny.NEWLINES)
    assert generation.token_ids == ours
    assert len(generation.token_times) == 40
    assert [(b.begin, b.end) for b in generation.boundaries] == [
        (r.window_begin[0], r.events[0].step_end) for r in reports
    ]
    assert [b.recalled.tolist() for b in generation.boundaries] == [r.recalled[0].tolist() for r in reports]
    assert len(reports) >= 3  # decoded steps, not only the prompt


@pytest.mark.parametrize(
    ("events", "changes", "sentence"),
    [
        ([], {}, "events is empty"),
        ([BoundaryEvent(0, 4, 9), BoundaryEvent(0, 4, 9)], {}, "sequences [0, 0]: give at most one of each"),
        ([BoundaryEvent(0, 4, 9), BoundaryEvent(1, 5, 9)], {}, "windows [(4, 9), (5, 9)] differ"),
        ([BoundaryEvent(0, 4, 9, sequence_begin=2)], {}, "begins at 2"),
        (
            [BoundaryEvent(0, 4, 9)],
            {"key_space": "unrotated", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "key_space is 'unrotated'",
        ),
    ],
)
def test_window_refuses(events: list[BoundaryEvent], changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Window.of(events, tiny.config(**changes))
    assert sentence in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason=f"needs kvpress: {kvpress.INSTALL}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["one sequence", "three of five", "a step longer than R"])
def test_kvpress_scores_are_attention_mass(shape: str, dtype: str) -> None:
    made = Baselines(replace(SHAPES[shape], dtype=dtype))
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    scores = kvpress.KVPress(made.case.config).score(made.keys, made.queries, made.case.events)
    assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in functions.items())
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping  # which would hide what is registered
    begin = made.case.events[0].window_begin(made.case.shape.recent_window)
    naive = Naive(made.case.config, made.case.weights, made.dtype)
    for of_layer, weights in zip(
        scores, naive.attention_weights(made.keys, made.queries, made.case.events), strict=True
    ):
        assert of_layer.shape == (len(made.case.events), made.case.shape.num_kv_heads, begin)
        mass = weights[..., :begin].mean(dim=(1, 2), dtype=torch.float32)
        # The means over window and group round to the cache's dtype: twice, and once each weight.
        allowed = 4 * HALF_ULP[dtype] * mass.max()
        assert (of_layer.mean(dim=1, dtype=torch.float32) - mass).abs().max() <= allowed
    if dtype == "float32":
        recalled = torch.stack([recall(of_layer.mean(dim=1), made.case.shape.top_k) for of_layer in scores])
        assert recalled.tolist() == made.rewrite("ours").tolist()


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is not None, reason="kvpress is installed")
def test_kvpress_missing_names_the_remedy() -> None:
    with pytest.raises(ImportError, match=r"pip install --no-deps kvpress==0\.5\.5"):
        kvpress.KVPress(tiny.config())
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
