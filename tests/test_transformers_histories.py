"""Random histories of generations under one attachment, against a plain model of them: caches that are begun, fed token
by token and in turns, generated on, cancelled halfway, broken, finished, emptied and dropped, several at a time.

The model stands before the attention of the backbone. There, in every layer of every forward, the keys and values must
be, bit for bit, what that layer cached before, rewritten by a Processor that was bound to copies of it, at the steps
that `steps_of` finds in the text.

A history that fails prints its steps and a line `@reproduce_failure(...)` for TestGenerations.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, LogitsProcessor, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bottleneck_ext import DeviceError, RebuildNeededError
from bottlenecked import BottleneckError, BoundaryEvent, BoundCache
from bottlenecked.integrations.transformers import attach

from . import tiny
from .test_histories import Step, steps_of

LONGEST = 64
OTHERS = tuple(i for i in range(tiny.VOCABULARY - 4) if i not in tiny.NEWLINES)
NUM_LAYERS = tiny.SHAPE["num_hidden_layers"]


class Cancelled(BaseException):
    """As KeyboardInterrupt: nobody may catch it."""


@dataclass(eq=False)
class Generation:
    """cache: transformers' own. padding: by row. ids: all that was fed, [rows, positions]. text: by row, see steps_of.

    rewritten, reported: by row the steps that the model has rewritten, and those that were reported. keys, values: by
    layer what must be cached, [rows, heads, positions, head_dim]. queries: by position what was asked with, [layers,
    rows, heads, head_dim]. ended: rows whose text has ended.
    """

    cache: Any
    padding: list[int]
    ids: torch.Tensor
    text: list[list[Any]]
    rewritten: list[list[Step]]
    reported: list[list[Step]]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def mask(self, length: int) -> torch.Tensor:
        return torch.tensor([[0] * padding + [1] * (length - padding) for padding in self.padding])


def same(found: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


class Forced(LogitsProcessor):
    """Chooses tokens [rows, count], and is cancelled where a choice is wanted that it does not have."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.left = list(tokens.unbind(1))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.left:
            raise Cancelled
        return torch.full_like(scores, -torch.inf).scatter(1, self.left.pop(0)[:, None], 0.0)


class Generations(RuleBasedStateMachine):
    @initialize(
        timing=st.sampled_from(["post", "post", "pre"]),
        min_step_length=st.sampled_from([1, 1, 3]),
        rewrite_prompt=st.booleans(),
        recent_window=st.sampled_from([1, 4, 8]),
        seed=st.integers(0, 1 << 16),
    )
    def begin(self, timing: str, min_step_length: int, rewrite_prompt: bool, recent_window: int, seed: int) -> None:
        self.options = {"timing": timing, "min_step_length": min_step_length, "rewrite_prompt": rewrite_prompt}
        boundary = {"timing": timing, "min_step_length": min_step_length}
        self.processor = tiny.processor(
            random_scale=0.5, boundary=boundary, rewrite_prompt=rewrite_prompt, recent_window=recent_window
        )
        self.random = np.random.default_rng(seed)
        self.alive: list[Generation] = []
        self.coming: list[
            tuple[Generation, torch.Tensor, bool]
        ] = []  # forwards: ids [rows, tokens], of a prompt or not
        self.at: Generation | None = None  # the one whose forward is under way
        self.cancel_at: int | None = None  # a layer
        self.failure: Exception | None = None  # of the attachment's next rewrite
        gc.collect()
        gc.freeze()  # what came before this history takes longer to look through than the history
        self.resources = contextlib.ExitStack()
        self.resources.callback(gc.unfreeze)
        self.resources.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        self.resources.enter_context(torch.no_grad())
        patch = self.resources.enter_context(pytest.MonkeyPatch.context())
        self.attention, self.bound_rewrite = ALL_ATTENTION_FUNCTIONS["sdpa"], BoundCache.rewrite
        patch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", self.attend)
        patch.setattr(BoundCache, "rewrite", lambda bound, *args, **kwargs: self.rewrite(bound, *args, **kwargs))
        self.model = tiny.model()
        self.attach()

    def attach(self) -> None:
        self.reports: list[Any] = []
        self.attachment = attach(self.model, self.processor, on_boundary=self.reports.append)
        self.boundaries = 0

    # ---- the model

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Stands before the backbone's own attention, whose arguments these are: [rows, heads, positions, head_dim]."""
        layer = module.layer_idx
        if layer == 0:
            assert self.coming, "a forward that nobody asked for"
            self.at, new, of_prompt = self.coming.pop(0)
            self.queries: list[torch.Tensor] = []
            try:
                self.take(self.at, new, of_prompt)
            except BottleneckError as error:
                raise AssertionError("a rewrite was not refused") from error
        generation = self.at
        assert generation is not None
        past, length = generation.length - query.shape[2], generation.length
        for views, found in ((generation.keys, key), (generation.values, value)):
            if past == 0:
                views.append(found[:, :, :length].clone())
            else:
                assert same(found[:, :, :past], views[layer]), f"layer {layer} holds something else"
                views[layer] = found[:, :, :length].clone()
        self.queries.append(query.clone())
        if layer == NUM_LAYERS - 1:
            generation.queries += torch.stack(self.queries).unbind(3)
            self.at = None
        if layer == self.cancel_at:
            raise Cancelled
        return self.attention(module, query, key, value, *args, **kwargs)

    def take(self, generation: Generation, new: torch.Tensor, of_prompt: bool) -> None:
        """What happens before a forward of `new`: a rewrite, if that shows that steps have ended."""
        generation.ids = torch.cat([generation.ids, new], dim=1)
        for row, tokens in enumerate(new.tolist()):
            if not of_prompt and tokens == [tiny.EOS]:
                generation.ended.add(row)
            if row not in generation.ended:
                generation.text[row] += ["prompt"] * len(tokens) if of_prompt else tokens
        steps = {
            row: self.steps(generation, row)[len(done) :] for row, done in enumerate(generation.rewritten)
        }  # fmt: skip
        events = [
            BoundaryEvent(row, *step, sequence_begin=generation.padding[row])
            for row, ended in steps.items()
            for step in ended
        ]
        if not events:
            return
        config, known = self.processor.config, len(generation.queries)
        shape = (NUM_LAYERS, len(generation.text), config.recent_window, config.num_query_heads, config.head_dim)
        ring = torch.full(shape, torch.nan)
        for position in range(max(0, known - config.recent_window), known):
            ring[:, :, position % config.recent_window] = generation.queries[position]
        bound = self.processor.bind(
            generation.keys, generation.values, ring.unbind(), workspace=self.processor.workspace(), heads_first=True
        )
        self.bound_rewrite(bound, events)
        for row, ended in steps.items():
            generation.rewritten[row] += ended

    def steps(self, generation: Generation, row: int) -> list[Step]:
        return steps_of(generation.text[row], generation.padding[row], tiny.NEWLINES, **self.options)

    def rewrite(self, bound: BoundCache, *args: Any, **kwargs: Any) -> Any:
        """The attachment's."""
        if self.failure is None:
            return self.bound_rewrite(bound, *args, **kwargs)
        if isinstance(self.failure, RebuildNeededError):
            self.bound_rewrite(bound, *args, **kwargs)
        raise self.failure

    def new_ids(self, generation: Generation, count: int) -> torch.Tensor:
        shape = (len(generation.text), count)
        ends = self.random.random(shape) < 0.35
        return torch.from_numpy(
            np.where(ends, self.random.choice(tiny.NEWLINES, shape), self.random.choice(OTHERS, shape))
        )

    # ---- one call, and what must have come of it

    def expect(self, generation: Generation, forwards: list[tuple[torch.Tensor, bool]], run: Callable[[], Any]) -> bool:
        """Whether `run` makes these forwards; else a rewrite was refused where the model refuses it too, or has failed,
        and the cache is lost."""
        self.coming = [(generation, new, of_prompt) for new, of_prompt in forwards]
        try:
            run()
        except (BottleneckError, MemoryError) as error:
            assert self.at is None
            new, of_prompt = self.coming[0][1:]
            self.coming = []
            self.collect(generation)
            length = generation.length
            if error is not self.failure:
                with pytest.raises(BottleneckError):
                    self.take(generation, new, of_prompt)
                generation.ids = generation.ids[:, :length]
            if not isinstance(error, RebuildNeededError):
                self.check_cache(generation)
            self.lose(generation, "queries were not captured")
            return False
        assert self.coming == []
        self.collect(generation)
        self.check_cache(generation)
        return True

    def lose(self, generation: Generation, told: str) -> None:
        """Whoever goes on with this cache is told, and changes nothing."""
        held = self.cached(generation)
        for _ in range(2):
            with pytest.raises(BottleneckError, match=told):
                self.prepare(generation, self.new_ids(generation, 1))
        assert all(map(same, self.cached(generation), held))
        self.alive.remove(generation)

    def prepare(self, generation: Generation, new: torch.Tensor) -> dict[str, Any]:
        ids = torch.cat([generation.ids, new], dim=1)
        return self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new.shape[1], past_key_values=generation.cache, use_cache=True,
            attention_mask=generation.mask(ids.shape[1]), is_first_iteration=generation.length == 0,
        )  # fmt: skip

    def feed(self, generation: Generation, new: torch.Tensor) -> bool:
        of_prompt = generation.length == 0 or new.shape[1] > 1
        return self.expect(generation, [(new, of_prompt)], lambda: self.model(**self.prepare(generation, new)))

    def generate(
        self, generation: Generation, unfed: int, forced: torch.Tensor, *, cancelled: bool = False, **more: Any
    ) -> bool:
        """`generate` feeds `unfed` new tokens and chooses `forced` [rows, count], of which the last one is not fed."""
        new = self.new_ids(generation, unfed)
        forwards = [(new, unfed > 1)] + [(forced[:, i : i + 1], False) for i in range(forced.shape[1] - 1 + cancelled)]
        ids = torch.cat([generation.ids, new], dim=1)

        def run() -> None:
            with pytest.raises(Cancelled) if cancelled else contextlib.nullcontext():
                self.model.generate(
                    ids, attention_mask=generation.mask(ids.shape[1]), past_key_values=generation.cache,
                    do_sample=False, max_new_tokens=forced.shape[1] + cancelled, logits_processor=[Forced(forced)],
                    **more,
                )  # fmt: skip

        return self.expect(generation, forwards, run)

    def cached(self, generation: Generation) -> list[torch.Tensor]:
        layers = [layer for layer in generation.cache.layers if layer.is_initialized]
        return [tensor.clone() for layer in layers for tensor in (layer.keys, layer.values)]

    def check_cache(self, generation: Generation) -> None:
        length = len(generation.queries)
        for layer, keys, values in zip(generation.cache.layers, generation.keys, generation.values, strict=True):
            assert same(layer.keys[:, :, :length], keys)
            assert same(layer.values[:, :, :length], values)

    def collect(self, generation: Generation) -> None:
        """What was reported since the last time is what the model has rewritten since then."""
        for report in self.reports:
            assert not any(report.skipped)
            self.boundaries += len(report.events)
            for event in report.events:
                assert event.sequence_begin == generation.padding[event.sequence]
                generation.reported[event.sequence].append((event.step_begin, event.step_end))
        self.reports.clear()
        assert generation.reported == generation.rewritten

    # ---- events

    @rule(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), static=st.booleans())
    def arrive(self, lengths: list[int], static: bool) -> None:
        if len(self.alive) < 3:
            config = self.model.config
            cache = StaticCache(config=config, max_cache_len=LONGEST) if static else DynamicCache(config=config)
            self.start(cache, [max(lengths) - length for length in lengths], max(lengths))

    def start(self, cache: Any, padding: list[int], longest: int) -> None:
        nothing = torch.zeros(len(padding), 0, dtype=torch.long)
        generation = Generation(cache, padding, nothing, *([[] for _ in padding] for _ in range(3)))
        self.alive.append(generation)
        new = self.new_ids(generation, longest)
        for row, count in enumerate(padding):
            new[row, :count] = tiny.EOS
        self.feed(generation, new)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), count=st.integers(1, 6))
    def decode(self, which: int, count: int) -> None:
        generation = self.alive[which % len(self.alive)]
        for _ in range(min(count, LONGEST - 1 - generation.length)):
            if not self.feed(generation, self.new_ids(generation, 1)):
                return

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), count=st.integers(2, 5))
    def turn(self, which: int, count: int) -> None:
        """Several tokens at once: another prompt."""
        generation = self.alive[which % len(self.alive)]
        if generation.length < LONGEST - count:
            self.feed(generation, self.new_ids(generation, count))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), unfed=st.integers(1, 3), count=st.integers(1, 5), cancelled=st.booleans())
    def go_on(self, which: int, unfed: int, count: int, cancelled: bool) -> None:
        """`generate` with the kept cache, to its end or until somebody cancels it between two tokens."""
        generation = self.alive[which % len(self.alive)]
        if generation.length < LONGEST - unfed - count - 1:
            self.generate(generation, unfed, self.new_ids(generation, count), cancelled=cancelled)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), row=st.integers(0, 2), at=st.integers(0, 2), count=st.integers(4, 6))
    def finish(self, which: int, row: int, at: int, count: int) -> None:
        """A row ends before the others: it is left as it is, and nobody may go on with the batch."""
        generation = self.alive[which % len(self.alive)]
        rows = len(generation.text)
        if rows > 1 and generation.length < LONGEST - 2 - count:
            forced = self.new_ids(generation, count)
            forced[row % rows, at:] = tiny.EOS
            if self.generate(generation, 1, forced, eos_token_id=tiny.EOS, pad_token_id=tiny.EOS):
                self.lose(generation, "ended before the others")

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), layer=st.integers(0, NUM_LAYERS - 1))
    def cancel_a_forward(self, which: int, layer: int) -> None:
        """Where some layers have cached the token and others have not, nobody may go on."""
        generation = self.alive[which % len(self.alive)]
        if generation.length == LONGEST - 1:
            return

        def run() -> None:
            inputs = self.prepare(generation, new)
            with pytest.raises(Cancelled):
                self.model(**inputs)

        new, self.cancel_at = self.new_ids(generation, 1), layer
        if layer == NUM_LAYERS - 1:
            self.expect(generation, [(new, False)], run)
        else:
            self.coming = [(generation, new, False)]
            with contextlib.suppress(BottleneckError):
                run()
                assert self.coming == []
            self.at, self.coming, self.cancel_at = None, [], None
            self.collect(generation)
            with pytest.raises(BottleneckError, match=r"cancelled|queries were not captured"):
                self.model.generate(
                    torch.cat([generation.ids, new], dim=1), past_key_values=generation.cache, max_new_tokens=1,
                    attention_mask=generation.mask(generation.length + 1),
                )  # fmt: skip
            self.alive.remove(generation)
        self.cancel_at = None

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), layer=st.integers(0, NUM_LAYERS - 1), row=st.integers(0, 2))
    def spoil(self, which: int, layer: int, row: int) -> None:
        """A value is no number any more: a rewrite that sees it is refused, and the cache lost."""
        generation = self.alive[which % len(self.alive)]
        for values in (generation.cache.layers[layer].values, generation.values[layer]):
            values[row % len(generation.text), :, generation.length - 1] = torch.nan

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2), kind=st.sampled_from([RebuildNeededError, DeviceError, MemoryError]))
    def fail(self, which: int, kind: type[Exception]) -> None:
        """The next rewrite fails: before it has written, or with REBUILD_NEEDED after that."""
        generation = self.alive[which % len(self.alive)]
        line = torch.full((len(generation.text), 1), tiny.NEWLINES[0])
        self.failure = kind("nothing is for ever")
        for _ in range(min(5, LONGEST - 1 - generation.length)):
            if not self.feed(generation, line):
                break
        self.failure = None

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2))
    def empty(self, which: int) -> None:
        """A StaticCache is used again, from its beginning."""
        generation = self.alive[which % len(self.alive)]
        if isinstance(generation.cache, StaticCache):
            self.alive.remove(generation)
            generation.cache.reset()
            self.start(generation.cache, generation.padding, max(generation.padding) + 1)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2))
    def drop(self, which: int) -> None:
        """A cache goes when it is dropped, not when garbage is collected."""
        gc.disable()
        cache = weakref.ref(self.alive.pop(which % len(self.alive)).cache)
        gc.enable()
        assert cache() is None

    @rule()
    def attach_again(self) -> None:
        """Caches that another attachment filled are refused, and left alone."""
        self.attachment.detach()
        self.attach()
        for generation in list(self.alive):
            self.lose(generation, "queries were not captured")

    @invariant()
    def states_are_those_of_living_caches(self) -> None:
        if hasattr(self, "alive"):
            gc.collect()
            assert {id(cache) for cache in self.attachment._states} == {id(alive.cache) for alive in self.alive}
            assert self.attachment.stats.boundaries == self.boundaries

    def teardown(self) -> None:
        if hasattr(self, "attachment"):
            self.attachment.detach()
            names = list(type(ALL_ATTENTION_FUNCTIONS)._global_mapping)
            self.resources.close()
            assert not [name for name in names if name.startswith("bottlenecked")]


TestGenerations = Generations.TestCase
TestGenerations.settings = settings(max_examples=20, stateful_step_count=20, deadline=None, print_blob=True)
