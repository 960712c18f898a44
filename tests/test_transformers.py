"""The transformers integration on a tiny model: what it must not change, and what it must.

Every test asserts that rewrites happened: an integration that does nothing passes all comparisons.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CompileConfig,
    DynamicCache,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from bottlenecked import InvalidArgumentError, RewriteReport
from bottlenecked.integrations import transformers as integration
from bottlenecked.integrations.transformers import attach

from . import tiny
from .plain_loop import generate as plain_loop

NEW = 48
OURS = str(Path(integration.__file__).parents[1])
LENGTHS = (20, 3, 11, 20, 7, 1, 16, 9)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Handing work this small to other threads takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Any:
    """Greedy; returns sequences, logits and the cache."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{"max_new_tokens": NEW, "do_sample": False} | settings,
        return_dict_in_generate=True,
        output_logits=True,
    )


def assert_same(one: Any, other: Any) -> None:
    """Tokens, logits and every bit of the cache."""
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    assert_same_cache(one.past_key_values, other.past_key_values)


def assert_same_cache(one: Any, other: Any) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


class Recorder:
    """Collects reports; `steps(row)` are that row's rewritten steps in token positions."""

    def __init__(self) -> None:
        self.reports: list[RewriteReport] = []

    def __call__(self, report: RewriteReport) -> None:
        self.reports.append(report)

    def steps(self, row: int = 0) -> list[tuple[int, int]]:
        return [
            (event.step_begin - event.sequence_begin, event.step_end - event.sequence_begin)
            for report in self.reports
            for event in report.events
            if event.sequence == row
        ]

    def recalled(self, row: int = 0) -> list[list[list[int]]]:
        return [
            (recalled - event.sequence_begin).tolist()
            for report in self.reports
            for event, recalled in zip(report.events, report.recalled, strict=True)
            if event.sequence == row
        ]


# --- identity: W_out = 0 changes no bit ---------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(20,), LENGTHS], ids=["single", "padded"])
@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.float32, "sdpa"),
        (torch.bfloat16, "sdpa"),
        (torch.float16, "sdpa"),
        (torch.float32, "eager"),
        (torch.bfloat16, "eager"),
    ],
)
def test_identity(dtype: torch.dtype, attention: str, lengths: tuple[int, ...], cache: str) -> None:
    model = tiny.model(dtype, attention)
    ids, mask = tiny.prompts(lengths)
    stock = generate(model, ids, mask, cache_implementation=cache)
    with attach(model, tiny.processor(0.0)) as attachment:
        ours = generate(model, ids, mask, cache_implementation=cache)
    assert_same(ours, stock)
    assert all(attachment.stats.sequences[row] > 1 for row in range(len(lengths)))


@pytest.mark.parametrize("timing", ["post", "pre"])
def test_identity_unrotated(timing: str) -> None:
    model = tiny.model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ids, mask = tiny.prompts((20, 9))
    processor = tiny.processor(
        0.0,
        key_space="unrotated",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        boundary={"timing": timing},
    )
    stock = generate(model, ids, mask)
    with attach(model, processor) as attachment:
        assert_same(generate(model, ids, mask), stock)
    assert attachment.stats.boundaries > 4


def test_identity_when_sampling() -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    torch.manual_seed(3)
    stock = generate(model, ids, mask, **settings)
    with attach(model, tiny.processor(0.0)) as attachment:
        torch.manual_seed(3)
        assert_same(generate(model, ids, mask, **settings), stock)
    assert len(attachment.stats.sequences) == 4
    with attach(model, tiny.processor()) as attachment:
        torch.manual_seed(3)
        assert not torch.equal(generate(model, ids, mask, **settings).sequences, stock.sequences)


def test_inference_mode() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    with attach(model, tiny.processor()) as attachment:
        expected = generate(model, ids)
        with torch.inference_mode():
            assert_same(generate(model, ids), expected)
    assert attachment.stats.boundaries > 4


# --- the rewrite itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rewrite_prompt": False},
        {"recent_window": 1, "top_k": 1},
        {"recent_window": 256, "top_k": 200},  # more than there is: all of it
        {"boundary": {"min_step_length": 6}},
        {"key_space": "unrotated", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=["default", "no prompt", "smallest", "largest", "long steps", "unrotated"],
)
@pytest.mark.parametrize("length", [1, 20])
def test_equals_a_plain_loop(changes: dict[str, Any], length: int) -> None:
    """Tokens, windows and recalled positions, against eager attention and nothing shared with the package."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ids, _ = tiny.prompts((length,))
    processor = tiny.processor(**changes)
    recorder = Recorder()
    with attach(tiny.model(**rope), processor, on_boundary=recorder) as attachment:
        ours = generate(attachment.model, ids).sequences[0, length:].tolist()
    tokens, boundaries = plain_loop(
        tiny.model(attention="eager", **rope),
        processor.config.to_dict(),
        {name: torch.as_tensor(weight) for name, weight in processor.weights.items()},
        tiny.NEWLINES,
        ids,
        NEW,
        None,
    )
    assert ours == tokens
    assert len(boundaries) > 2
    assert attachment.stats.boundaries == len(boundaries)
    assert [end for _, end in recorder.steps()] == [b["end"] for b in boundaries]
    assert [r.window_begin[0] for r in recorder.reports] == [b["begin"] for b in boundaries]
    assert recorder.recalled() == [b["recalled"] for b in boundaries]
    norms = torch.tensor([b["delta_norm"] for b in boundaries])
    assert torch.allclose(torch.stack([torch.from_numpy(r.delta_norm[:, 0]) for r in recorder.reports]), norms, 1e-3)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads: int) -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    with attach(model, tiny.processor(), num_threads=1):
        expected = generate(model, ids, mask)
    with attach(model, tiny.processor(), num_threads=threads) as attachment:
        assert_same(generate(model, ids, mask), expected)
    assert attachment.stats.boundaries > 4


ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Granite": (GraniteForCausalLM, GraniteConfig, {"attention_multiplier": 0.5}),
    "Mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "Olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "Phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str) -> None:
    """Each has its own attention module: queries normed or not, other scales, fused projections."""
    make, make_config, changes = ARCHITECTURES[name]
    settings = {key: value for key, value in tiny.model().config.to_dict().items() if key in tiny.SHAPE} | changes
    torch.manual_seed(0)
    model = make(make_config(**settings)).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids, mask = tiny.prompts((20, 9))
    stock = generate(model, ids, mask)
    with attach(model, tiny.processor(0.0)) as attachment:
        assert_same(generate(model, ids, mask), stock)
    assert attachment.stats.boundaries > 2
    processor = tiny.processor()
    with attach(model, processor):
        ours = generate(model, ids[:1]).sequences[0, 20:].tolist()
    weights = {name: torch.as_tensor(weight) for name, weight in processor.weights.items()}
    tokens, boundaries = plain_loop(eager, processor.config.to_dict(), weights, tiny.NEWLINES, ids[:1], NEW, None)
    assert ours == tokens
    assert len(boundaries) > 1


def test_dynamic_equals_static() -> None:
    model = tiny.model()
    ids, mask = tiny.prompts(LENGTHS)
    stock = generate(model, ids, mask)
    with attach(model, tiny.processor()) as attachment:
        dynamic = generate(model, ids, mask)
        static = generate(model, ids, mask, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    assert not torch.equal(dynamic.sequences, stock.sequences)
    assert attachment.stats.boundaries > 2 * len(LENGTHS)


@pytest.mark.parametrize("timing", ["post", "pre"])
def test_padded_row_equals_row_alone(timing: str) -> None:
    """Rows end their steps at different times; tokens, steps and recalled tokens are as by themselves."""
    model = tiny.model()
    ids, mask = tiny.prompts(LENGTHS)
    processor = tiny.processor(boundary={"timing": timing})
    together = Recorder()
    with attach(model, processor, on_boundary=together) as attachment:
        batch = generate(model, ids, mask).sequences
    assert attachment.stats.rewrites == len(together.reports) < attachment.stats.boundaries
    assert any(1 < len(report.events) < len(LENGTHS) for report in together.reports)
    for row, length in enumerate(LENGTHS):
        alone = Recorder()
        with attach(model, processor, on_boundary=alone):
            single = generate(model, ids[row : row + 1, -length:]).sequences
        assert torch.equal(batch[row, -length - NEW :], single[0])
        assert together.steps(row) == alone.steps()
        assert together.recalled(row) == alone.recalled()
        assert attachment.stats.sequences[row] == len(alone.steps()) > 1


def test_timing_says_on_which_side_the_newline_is() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    for timing in ("post", "pre"):
        recorder = Recorder()
        with attach(model, tiny.processor(boundary={"timing": timing}), on_boundary=recorder):
            tokens = generate(model, ids).sequences[0].tolist()
        ends = [end for _, end in recorder.steps()]
        newlines = [p for p in range(20, len(tokens) - 1) if tokens[p] in tiny.NEWLINES]
        assert len(newlines) > 2
        # A "pre" step may be empty (a newline right after another); nothing is rewritten then.
        expected = [p + 1 for p in newlines if p + 1 < len(tokens) - 1] if timing == "post" else newlines
        assert ends == [20, *(end for end in expected if end > 20)]


def test_generating_one_token_rewrites_nothing() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    with attach(model, tiny.processor()) as attachment:
        generate(model, ids, max_new_tokens=1)
        assert attachment.stats.boundaries == 0
        generate(model, ids, max_new_tokens=2)
        assert attachment.stats.boundaries == 1


def test_prompt_not_rewritten_is_counted() -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    with attach(model, tiny.processor(rewrite_prompt=False)) as attachment:
        generate(model, ids, mask)
    assert attachment.stats.skipped == {"rewrite_prompt is false": 2}
    assert attachment.stats.boundaries > 2
    assert set(attachment.stats.seconds) > {"total"}


# --- ends ---------------------------------------------------------------------------------------------------


LINE = tiny.NEWLINES[0]
LONG_ROW = [1, LINE, 2, 4, 5, LINE, 6, 7, LINE, 8, 9]


def test_finished_rows_are_frozen() -> None:
    """The padding token ends lines, so a row that is not frozen would be rewritten at every step."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    outputs = []
    for new in (4, len(LONG_ROW)):
        recorder = Recorder()
        with attach(model, tiny.processor(), on_boundary=recorder) as attachment:
            outputs.append(
                generate(
                    model,
                    ids,
                    mask,
                    max_new_tokens=new,
                    logits_processor=[tiny.Script([1, LINE, 2, 60], LONG_ROW)],
                    eos_token_id=[60, 61],
                    pad_token_id=LINE,
                )
            )
    ended, final = outputs
    assert final.sequences[0, 20:].tolist() == [1, LINE, 2, 60] + [LINE] * 7
    assert final.sequences[1, 20:].tolist() == LONG_ROW
    assert recorder.steps(0) == [(0, 20), (20, 22)]
    assert recorder.steps(1) == [(0, 9), (9, 11), (11, 15), (15, 18)]
    assert attachment.stats.sequences == {0: 2, 1: 4}
    # What the frozen row holds is what it held when it ended.
    for now, then in zip(final.past_key_values.layers, ended.past_key_values.layers, strict=True):
        assert torch.equal(now.keys[0, :, :23], then.keys[0, :, :23])
        assert torch.equal(now.values[0, :, :23], then.values[0, :, :23])


def test_end_of_text_after_a_newline() -> None:
    """The last step has ended, but so has the text: nothing resumes, and nothing is rewritten."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    recorder = Recorder()
    with attach(model, tiny.processor(), on_boundary=recorder) as attachment:
        script = tiny.Script([1, LINE, 60], LONG_ROW)
        generate(model, ids, mask, max_new_tokens=11, logits_processor=[script], eos_token_id=60)
    assert recorder.steps(0) == [(0, 20)]
    assert recorder.steps(1) == [(0, 9), (9, 11), (11, 15), (15, 18)]
    assert attachment.stats.skipped == {"the sequence had ended": 1}


@pytest.mark.parametrize("timing", ["post", "pre"])
def test_end_of_text_that_is_a_newline(timing: str) -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    recorder = Recorder()
    other = tiny.NEWLINES[1]
    with attach(model, tiny.processor(boundary={"timing": timing}), on_boundary=recorder):
        script = tiny.Script([1, 2, other], LONG_ROW)
        generate(model, ids, mask, max_new_tokens=11, logits_processor=[script], eos_token_id=other)
    assert recorder.steps(0) == [(0, 20)]
    assert len(recorder.steps(1)) == 4


def test_newlines_in_a_row() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    for timing, steps in {
        "post": [(0, 20), (20, 21), (21, 22), (22, 23)],
        "pre": [(0, 20), (20, 21), (21, 22), (22, 24)],
    }.items():
        recorder = Recorder()
        with attach(model, tiny.processor(boundary={"timing": timing}), on_boundary=recorder):
            script = tiny.Script([LINE, LINE, LINE, 1, LINE, 2])
            generate(model, ids, max_new_tokens=6, logits_processor=[script])
        assert recorder.steps() == steps


# --- ways to generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "lengths"),
    [
        ("aot_eager", (20,)),
        pytest.param("inductor", (20, 9), marks=pytest.mark.skipif(not which("g++"), reason="inductor needs g++")),
    ],
)
def test_compiled_equals_eager(backend: str, lengths: tuple[int, ...]) -> None:
    """In one graph: fullgraph refuses breaks."""
    model = tiny.model(num_hidden_layers=2)
    processor = tiny.processor(num_layers=2)
    ids, mask = tiny.prompts(lengths)
    compiled = CompileConfig(mode="default", fullgraph=True, backend=backend)
    compiled._compile_all_devices = True
    with attach(model, processor) as attachment:
        expected = generate(model, ids, mask, cache_implementation="static")
        boundaries = attachment.stats.boundaries
        ours = generate(model, ids, mask, cache_implementation="static", compile_config=compiled)
        assert hasattr(model, "_compiled_call")
    assert torch.equal(ours.sequences, expected.sequences)
    assert attachment.stats.boundaries == 2 * boundaries > 4
    assert not hasattr(model, "_compiled_call")


@pytest.mark.parametrize("timing", ["post", "pre"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("split", [1, 20, 27])
def test_kept_cache_goes_on(kind: str, timing: str, split: int) -> None:
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    recorders = Recorder(), Recorder()
    processor = tiny.processor(boundary={"timing": timing})

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=20 + NEW)

    with attach(model, processor, on_boundary=recorders[0]):
        at_once = generate(model, ids, mask, past_key_values=cache())
    with attach(model, processor, on_boundary=recorders[1]):
        kept = cache()
        first = generate(model, ids, mask, past_key_values=kept, max_new_tokens=split)
        whole_mask = torch.cat([mask, mask.new_ones(2, split)], dim=1)
        second = generate(model, first.sequences, whole_mask, past_key_values=kept, max_new_tokens=NEW - split)
    assert torch.equal(second.sequences, at_once.sequences)
    assert_same_cache(kept, at_once.past_key_values)
    for row in range(2):
        assert recorders[0].steps(row) == recorders[1].steps(row)
        assert len(recorders[0].steps(row)) > 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("what", ["clone", "same order", "crop"])
def test_kept_cache_with_the_same_contents(kind: str, what: str) -> None:
    """Other tensors that hold the same, as after a way to the host and back, and candidates tried and cropped."""
    model = tiny.model()
    ids, _ = tiny.prompts((20, 20))
    recorders = Recorder(), Recorder()

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=24 + NEW)

    with attach(model, tiny.processor(), on_boundary=recorders[0]):
        at_once = generate(model, ids, past_key_values=cache())
    with attach(model, tiny.processor(), on_boundary=recorders[1]):
        kept = cache()
        first = generate(model, ids, past_key_values=kept, max_new_tokens=20).sequences
        if what == "crop":
            with torch.no_grad():
                model(first[:, -3:], past_key_values=kept)
            kept.crop(-3)
        elif what == "clone":
            for layer in kept.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        else:
            kept.reorder_cache(torch.tensor([0, 1]))
        second = generate(model, first, past_key_values=kept, max_new_tokens=NEW - 20)
    assert torch.equal(second.sequences, at_once.sequences)
    for row in range(2):
        assert recorders[0].steps(row) == recorders[1].steps(row)


def test_kept_cache_that_holds_no_numbers() -> None:
    """It was not moved; what it holds is for the next rewrite to refuse."""
    model = tiny.model()
    tokens, _ = tiny.prompts((20,))
    cache = DynamicCache(config=model.config)
    with attach(model, tiny.processor(boundary={"min_step_length": 1000})):
        for length in (22, 24, 26):
            tokens = generate(model, tokens, **{tiny.CACHE: cache}, max_new_tokens=2).sequences
            assert tokens.shape[1] == length
            cache.layers[0].values[:, :, 0] = torch.nan
    assert cache.layers[-1].keys[:, :, -1].isnan().all()


def test_kept_cache_with_another_turn() -> None:
    """The new tokens and those since the last boundary are one step, rewritten when the answer begins."""
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    turn, _ = tiny.prompts((6,), seed=5)
    cache = DynamicCache(config=model.config)
    recorder = Recorder()
    with attach(model, tiny.processor(), on_boundary=recorder):
        first = generate(model, ids, **{tiny.CACHE: cache}).sequences
        before = recorder.steps()
        generate(model, torch.cat([first, turn], dim=1), **{tiny.CACHE: cache})
    after = recorder.steps()[len(before) :]
    # The last token of the first answer has no KV yet: it comes with the new turn.
    pending = [] if after[0][1] == 20 + NEW + 6 else after[:1]
    assert all(end == 20 + NEW - 1 for _, end in pending)
    assert after[len(pending)] == ((pending or before)[-1][1], 20 + NEW + 6)
    assert len(after) > len(pending) + 1


@pytest.mark.parametrize("chunk", [1, 4, 19, 64])
def test_chunked_prefill(chunk: int) -> None:
    """The prompt is one step however it is fed; 4 leaves nothing over, 19 a chunk of one token."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    recorders = Recorder(), Recorder()
    outputs = []
    for recorder, size in zip(recorders, (None, chunk), strict=True):
        with attach(model, tiny.processor(), on_boundary=recorder):
            outputs.append(generate(model, ids, mask, prefill_chunk_size=size).sequences)
    assert torch.equal(*outputs)
    for row in range(2):
        assert recorders[0].steps(row) == recorders[1].steps(row)
        assert recorders[0].recalled(row) == recorders[1].recalled(row)
        assert len(recorders[0].steps(row)) > 2


def test_streamer_in_a_thread() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = threading.Event()

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended.set()

    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    with attach(model, tiny.processor()) as attachment:
        expected = generate(model, ids).sequences[0].tolist()
        boundaries = attachment.stats.boundaries
        streamer = Collector()
        thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer})
        thread.start()
        thread.join()
    assert streamer.ended.is_set()
    assert streamer.tokens == expected
    assert attachment.stats.boundaries == 2 * boundaries > 4


def test_generations_at_the_same_time() -> None:
    """State belongs to the cache: threads that share an attached model do not meet."""
    model = tiny.model()
    prompts = [tiny.prompts((length,), seed=length)[0] for length in (20, 11, 5)]
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        results[index] = generate(model, prompts[index]).sequences

    with attach(model, tiny.processor()) as attachment:
        expected = [generate(model, ids).sequences for ids in prompts]
        boundaries = attachment.stats.boundaries
        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(3))
    assert attachment.stats.boundaries == 2 * boundaries > 6


def test_pipeline_and_newlines_of_a_tokenizer() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = [" ".join(f"w{i}" for i in (1, 2, 5, 6, 8)), "w9 w11"]
    settings = {"max_new_tokens": 32, "do_sample": False, "return_tensors": True}
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if hasattr(writer, "generation_config"):  # until transformers 5.23
        writer.generation_config.max_length = None
    stock = writer(texts, batch_size=2, **settings)
    processor = tiny.processor(boundary={"rule": "newline", "token_ids": ()})
    with attach(model, processor, tokenizer) as attachment:
        ours = writer(texts, batch_size=2, **settings)
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        expected = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32, do_sample=False
        )
    with attach(model, tiny.processor(), tokenizer):
        named = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32, do_sample=False
        )
    assert torch.equal(expected, named)
    assert attachment.stats.boundaries > 4
    assert ours != stock
    for one, row in zip(ours, expected, strict=True):
        assert one[0]["generated_token_ids"][-32:] == row[-32:].tolist()


def test_a_loop_of_ones_own() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    with attach(model, tiny.processor()) as attachment, torch.no_grad():
        expected = generate(model, ids).sequences
        boundaries = attachment.stats.boundaries
        cache, tokens = DynamicCache(config=model.config), ids
        for _ in range(NEW):
            unfed = tokens.shape[1] - cache.get_seq_length()
            inputs = model.prepare_inputs_for_generation(
                tokens, next_sequence_length=unfed, use_cache=True, **{tiny.CACHE: cache}
            )
            tokens = torch.cat([tokens, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)
    assert attachment.stats.boundaries == 2 * boundaries > 4


def test_a_loop_tells_the_tokens_it_has_read() -> None:
    """They are taken, right or wrong, and the ids are not read."""
    model = tiny.model()
    ids, _ = tiny.prompts((20, 20))
    told = [[1, LINE], [LINE, 1], [2, 2], [1, 1]]
    recorder = Recorder()
    with attach(model, tiny.processor(), on_boundary=recorder), torch.no_grad():
        cache = DynamicCache(config=model.config)
        prepare = functools.partial(model.prepare_inputs_for_generation, past_key_values=cache, use_cache=True)
        model(**prepare(ids, is_first_iteration=True))
        for tokens in told:
            model(**prepare(ids[:, :1], next_sequence_length=1, bottlenecked_tokens=tokens))
        with pytest.raises(InvalidArgumentError, match="bottlenecked_tokens has 1 tokens for 2 rows"):
            prepare(ids[:, :1], next_sequence_length=1, bottlenecked_tokens=[1])
        with pytest.raises(ValueError, match="bottlenecked_tokens"):
            generate(model, ids, bottlenecked_tokens=[1, 1])
    assert recorder.steps(0) == [(0, 20), (20, 22)]
    assert recorder.steps(1) == [(0, 20), (20, 21)]


class Decoding:
    """A loop of one's own on a StaticCache, one token after the other.

    replays: forwards leave the versions of tensors alone, as those in a CUDA graph do.
    """

    def __init__(self, model: Any, replays: bool) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=99)
        self.replays = replays

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """The next token [1, 1]."""
        inputs = self.model.prepare_inputs_for_generation(ids, past_key_values=self.cache, use_cache=True)
        counters = tuple(layer.cumulative_length for layer in self.cache.layers)
        replayed = torch.autograd._unsafe_preserve_version_counter(counters)
        with replayed if self.replays and self.cache.layers[0].is_initialized else contextlib.nullcontext():
            return self.model(**inputs).logits[:, -1:].argmax(-1)

    def run(self, ids: torch.Tensor, count: int) -> list[int]:
        tokens = [self.feed(ids)]
        for _ in range(count - 1):
            tokens.append(self.feed(tokens[-1]))
        return torch.cat(tokens, dim=1)[0].tolist()

    def move(self, positions: int, *, seen: bool) -> None:
        for layer in self.cache.layers:
            counter = layer.cumulative_length
            with contextlib.nullcontext() if seen else torch.autograd._unsafe_preserve_version_counter(counter):
                counter.add_(positions)


@pytest.mark.parametrize("replays", [False, True])
def test_counters_that_are_slow_to_read(replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a StaticCache on a GPU: read where the cache may have changed, and before a rewrite."""
    reads: list[bool] = []
    past = integration._past

    def counted(*arguments: Any) -> tuple[int, bool]:
        found = past(*arguments)
        reads.append(found[1])
        return found

    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    line = tiny.prompts((1,), seed=4)[0]
    with attach(model, tiny.processor()) as attachment, torch.no_grad():
        expected = [generate(model, prompt).sequences[0, prompt.shape[1] :].tolist() for prompt in (ids, line)]
        boundaries = attachment.stats.boundaries
        monkeypatch.setattr(integration, "_waits", lambda counter: True)
        again = generate(model, ids, cache_implementation="static")
        assert again.sequences[0, 20:].tolist() == expected[0]

        loop = Decoding(model, replays)
        monkeypatch.setattr(integration, "_past", counted)
        assert loop.run(ids, NEW) == expected[0]
        assert all(reads[:2])
        assert not any(reads[4:])
        loop.cache.reset()
        reads.clear()
        assert loop.run(line, NEW) == expected[1]  # a prompt of one token looks like any other
        assert all(reads[:2])
        assert not any(reads[4:])
        assert attachment.stats.boundaries > boundaries

        loop.move(-1, seen=True)
        with pytest.raises(InvalidArgumentError, match=f"holds {NEW - 1} positions, but generate left {NEW}"):
            loop.feed(line)
        loop.cache.reset()
        loop.run(ids, 5)
        loop.move(1, seen=False)
        line_end = torch.tensor([[LINE]])
        loop.feed(line_end)
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match="holds 26 positions, but generate left 25"):
                loop.feed(line_end)


def test_a_static_cache_is_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew where one of its tensors was replaced: the old one must not be rewritten in its place."""
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    processor = tiny.processor()
    bound = []
    bind = processor.bind

    def counted(*arguments: Any, **options: Any) -> Any:
        bound.append(bind(*arguments, **options))
        return bound[-1]

    with attach(model, processor) as attachment, torch.no_grad():
        expected = generate(model, ids).sequences[0, 20:].tolist()
        rewrites = attachment.stats.rewrites
        monkeypatch.setattr(processor, "bind", counted)
        loop = Decoding(model, replays=False)
        tokens = loop.run(ids, NEW // 2)
        assert len(bound) == 1
        loop.cache.layers[1].keys = loop.cache.layers[1].keys.clone()
        tokens += loop.run(torch.tensor([tokens[-1:]]), NEW // 2)
    assert tokens == expected
    assert len(bound) == 2
    assert attachment.stats.rewrites == 2 * rewrites > 4


def test_a_graph_may_hold_what_a_token_is_given() -> None:
    """The first decoded token's, at every later one: the forward itself finds the row of the ring."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 20))
    cache = StaticCache(config=model.config, max_cache_len=20 + NEW)
    with attach(model, tiny.processor()) as attachment, torch.no_grad():
        expected = generate(model, ids, mask).sequences[:, 20:]
        boundaries = attachment.stats.boundaries
        prepare = functools.partial(model.prepare_inputs_for_generation, past_key_values=cache, use_cache=True)
        tokens = [model(**prepare(ids, is_first_iteration=True)).logits[:, -1:].argmax(-1)]
        held: dict[str, Any] = {}
        for _ in range(NEW - 1):
            inputs = prepare(tokens[-1], next_sequence_length=1)
            given = {name: value for name, value in inputs.items() if name.startswith("query_")}
            held = held or given
            assert all(given[name] is held[name] for name in given.keys() - {"query_parts"})
            output = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, **held)
            tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert attachment.stats.boundaries == 2 * boundaries > 8


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, views included, and the calls of our own functions: Python's and C's."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.python: Counter[str] = Counter()
        self.extension: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.torch[str(function)] += 1
        return function(*args, **kwargs or {})

    def __enter__(self) -> Any:
        sys.setprofile(self._profile)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        super().__exit__(*error)

    def _profile(self, frame: Any, event: str, function: Any) -> None:
        if event == "call":
            if frame.f_code.co_filename.startswith(OURS):
                self.python[frame.f_code.co_qualname] += 1
        elif event == "c_call" and "bottleneck_ext" in f"{type(function.__self__).__module__} {function.__module__}":
            self.extension[function.__name__] += 1


IN_FORWARD = {
    "static": {"cat.default": 1, "view.default": 2, "index_select.default": 1, "index_copy_.default": 1},
    "dynamic": {"cat.out": 1},
}


@pytest.mark.parametrize(
    ("rows", "kind", "told", "preparing"),
    [
        (1, "static", True, {}),
        (16, "static", True, {}),
        (1, "static", False, {"select.int": 1}),
        (1, "dynamic", True, {"copy_.default": 1}),
    ],
)
def test_what_an_ordinary_token_costs(
    rows: int, kind: str, told: bool, preparing: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations beyond stock's, counted: on a GPU each of those before the forward makes the device wait.

    told: the loop hands over the tokens that it has read. preparing: operations of PyTorch before the forward.
    """
    monkeypatch.setattr(integration, "_waits", lambda counter: True)  # as on a GPU
    model = tiny.model()
    ids, _ = tiny.prompts((20,) * rows)

    def decode(known: dict[str, Any]) -> list[tuple[Operations, Operations]]:
        """Of the tokens after the first few, before which a StaticCache's counter is read: preparing and forward."""
        dynamic = kind == "dynamic"
        cache = DynamicCache(config=model.config) if dynamic else StaticCache(config=model.config, max_cache_len=40)
        prepare = functools.partial(model.prepare_inputs_for_generation, past_key_values=cache, use_cache=True)
        model(**prepare(ids, is_first_iteration=True))
        counted = []
        for _ in range(9):
            with Operations() as before:
                inputs = prepare(ids[:, :1], next_sequence_length=1, **known)
            with Operations() as during:
                model(**inputs)
            counted.append((before, during))
        return counted[4:]

    with torch.no_grad():
        stock = decode({})
        with attach(model, tiny.processor(boundary={"min_step_length": 99}, rewrite_prompt=False)) as attachment:
            ours = decode({"bottlenecked_tokens": ids[:, 0].tolist()} if told else {})
    assert attachment.stats.rewrites == 0
    for (before, during), (stock_before, stock_during) in zip(ours, stock, strict=True):
        assert before.torch - stock_before.torch == Counter({f"aten.{name}": n for name, n in preparing.items()})
        assert during.torch - stock_during.torch == Counter({f"aten.{name}": n for name, n in IN_FORWARD[kind].items()})
        assert not before.extension.total() + during.extension.total()
        assert before.python.total() <= 10, before.python


# --- attaching and detaching --------------------------------------------------------------------------------


def registered() -> list[str]:
    return [
        name
        for interface in (AttentionInterface, AttentionMaskInterface)
        for name in interface._global_mapping
        if "bottlenecked" in name
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detach_restores_the_model(attention: str) -> None:
    model = tiny.model(attention=attention)
    ids, _ = tiny.prompts((20,))
    stock = generate(model, ids)
    before = dict(vars(model))
    attachment = attach(model, tiny.processor())
    assert not torch.equal(generate(model, ids).sequences, stock.sequences)
    assert attachment.stats.boundaries > 2
    attachment.detach()
    attachment.detach()
    assert vars(model) == before
    assert model.config._attn_implementation == attention
    assert registered() == []
    assert_same(generate(model, ids), stock)


def test_detaches_after_an_error() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    before = dict(vars(model))

    def fail(report: RewriteReport) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), attach(model, tiny.processor(), on_boundary=fail):
        generate(model, ids)
    assert vars(model) == before
    assert model.config._attn_implementation == "sdpa"
    assert registered() == []


def test_methods_replaced_by_others_come_back() -> None:
    model = tiny.model()
    theirs = model.generate
    model.generate = theirs
    with attach(model, tiny.processor()):
        assert model.generate is not theirs
    assert model.generate is theirs


def test_several_models_at_once() -> None:
    ids, _ = tiny.prompts((20,))
    models = tiny.model(seed=1), tiny.model(seed=2), tiny.model(seed=1, attention="eager")
    expected = []
    for model in models:
        with attach(model, tiny.processor()):
            expected.append(generate(model, ids).sequences)
    attachments = [attach(model, tiny.processor()) for model in models]
    assert all(torch.equal(generate(m, ids).sequences, e) for m, e in zip(models, expected, strict=True))
    assert all(attachment.stats.boundaries > 2 for attachment in attachments)
    attachments[0].detach()
    assert torch.equal(generate(models[1], ids).sequences, expected[1])
    for attachment in attachments[1:]:
        attachment.detach()
    assert registered() == []


def test_forward_while_attached_is_stock() -> None:
    """Training steps and loglikelihoods call the model itself; nothing is captured or rewritten there."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    stock = model(ids, attention_mask=mask).logits
    with attach(model, tiny.processor()) as attachment:
        assert torch.equal(model(ids, attention_mask=mask).logits, stock)
    assert attachment.stats.boundaries == 0


def test_state_goes_with_its_cache() -> None:
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    gc.disable()  # no cycle may keep the ring alive
    try:
        with attach(model, tiny.processor()) as attachment:
            cache = DynamicCache(config=model.config)
            output = generate(model, ids, past_key_values=cache)
            (state,) = attachment._states.values()
            ring = weakref.ref(state.ring)
            del state, output, cache
            assert ring() is None
    finally:
        gc.enable()
    assert attachment.stats.boundaries > 2


def test_failed_rewrite_loses_the_cache() -> None:
    """Its steps are no longer known, so going on with it must not look as if nothing had happened."""
    model = tiny.model()
    ids, _ = tiny.prompts((20,))
    processor = tiny.processor()
    with attach(model, processor) as attachment:
        cache = DynamicCache(config=model.config)
        bind = processor.bind
        try:
            processor.bind = None  # type: ignore[method-assign, assignment]
            with pytest.raises(TypeError):
                generate(model, ids, past_key_values=cache)
        finally:
            processor.bind = bind  # type: ignore[method-assign]
        with pytest.raises(InvalidArgumentError, match="20 positions whose queries were not captured"):
            generate(model, torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache)
        generate(model, ids)
    assert attachment.stats.boundaries > 2


# --- a real model -------------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_smollm2(smollm2: Any) -> None:
    """Identity in both dtypes and with both caches; a random Processor changes the text."""
    from bottlenecked import CacheProcessor, CacheProcessorConfig
    from bottlenecked.backbones import describe
    from bottlenecked.checkpoint import initial_weights

    model, tokenizer = smollm2
    described = describe({**model.config.to_dict(), "architectures": [type(model).__name__]})
    config = CacheProcessorConfig(processor_dim=64, processor_heads=4, processor_mlp_dim=64, **described)
    identity = CacheProcessor(config, initial_weights(config))
    other = CacheProcessor(config, initial_weights(config, random_scale=2.0, seed=3))
    questions = ["Count from one to five, a number a line.", "List three fruits."]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    for dtype, cache in ((torch.float32, "dynamic"), (torch.bfloat16, "static")):
        m = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        settings = {"max_new_tokens": 20, "cache_implementation": cache}
        stock = generate(m, batch.input_ids, batch.attention_mask, **settings)
        with attach(m, identity, tokenizer) as attachment:
            assert_same(generate(m, batch.input_ids, batch.attention_mask, **settings), stock)
        assert attachment.stats.boundaries > 2
        with attach(m, other, tokenizer):
            changed = generate(m, batch.input_ids, batch.attention_mask, **settings)
        assert not torch.equal(changed.sequences, stock.sequences)
