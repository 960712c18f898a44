"""Whole decoding: transformers, sdpa, StaticCache, the model's forward in a CUDA graph; a boundary every 30 tokens.

Both sides run the same loop, which is what serving loops do at least: the token of the last forward is read by the
host (is it the end of the text?), `prepare_inputs_for_generation` is called, the graph is replayed. The graph holds
forward, argmax and the copy of the token to the next input. stock's was captured from the model as it is, ours from
the attached model, so that it also keeps the queries; ours' boundaries happen where they do in `generate`, in
`prepare_inputs_for_generation`. All rows of a batch end their steps together, and the prompt is not rewritten: 121
decoded tokens hold 4 boundaries, one in 30. `torch.compile` is not used on either side: this graph is as tight a loop,
and begins at once.

"ours" hands the tokens that the loop has read to `prepare_inputs_for_generation` (`bottlenecked_tokens`);
"ours_reading" does not, as `generate` does not, and they are read once more.

extra            ours over stock, whole loop, less one: the median over repeats; extra_reading: ours_reading
added_prepare_s  what `prepare_inputs_for_generation` takes longer on the host than stock's, a token: the median, so of
                 one that ends no step; added_prepare_reading_s: of ours_reading
added_boundary_s the same, of a token before which a step is rewritten, tokens handed over: the median. Of it host_s is
                 the rewrite alone, as the attachment counts it, the mean
capture_share    what keeping the queries adds to a step on the device: replays of the two graphs, nothing in between
step_s           stock's step of the loop

Weights are random, of the shape of Llama-3.2-1B. First the check: a Processor that changes nothing must produce stock's
tokens, unless stock itself does not: where another stock loop with a graph of its own, or the same once more, produces
others, "stock_repeats" is false, and "logit_difference" tells how far apart logits are in the first forward whose
tokens differ, of ours and of stock. "changed_tokens" tells how many tokens are others with the random Processor that
is measured.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from benchmarks import checks, models
from benchmarks.gpu.context import MIN_REPEATS, Context, attempt, cache_bytes, key
from benchmarks.gpu.timing import Graph
from benchmarks.harness import OURS, Figure, figure, rotated, say
from benchmarks.inputs import SEED, Setting
from bottlenecked.checkpoint import initial_weights
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.transformers import attach
from bottlenecked.processor import CacheProcessor

EVERY = 30  # tokens of a step
TOKENS = 4 * EVERY + 1  # decoded, after the prompt
PROMPT = 1984
SCALE = 0.05
REPLAYS = 20
READING = "ours_reading"


def run(context: Context) -> Iterator[Figure]:
    model: PreTrainedModel | None = None
    processors: dict[float, CacheProcessor] = {}
    for batch in (1, 2) if context.quick else (1, 16, 64):
        setting = context.setting("llama-3.2-1b", batch, PROMPT, EVERY)
        # A forward over all prompts holds a few activations of the MLP's width.
        activations = 6 * batch * setting.prior * models.WIDTHS[setting.shape][2] * 2
        if context.due("decode", setting, 2 * cache_bytes(setting) + activations + (5 << 30)):
            model = model or models.make(setting.shape, device=context.device, dtype=torch.bfloat16)
            if not processors:
                processors = {scale: processor(context, model, setting, scale) for scale in (0.0, SCALE)}
            yield attempt("decode", setting, functools.partial(measure, context, model, setting, processors))


@dataclass
class Loop:
    """Decoding of one batch: its cache, the token that comes next, and the graph of a step.

    prepare: the model's prepare_inputs_for_generation, stock or attached.
    """

    context: Context
    model: PreTrainedModel
    ids: Tensor  # [batch, prompt]
    prepare: Callable[..., dict[str, Any]]
    tokens: int

    def __post_init__(self) -> None:
        batch, prompt = self.ids.shape
        self.cache = StaticCache(config=self.model.config, max_cache_len=prompt + self.tokens + 1)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.ids.device)
        self.read = torch.zeros(batch, dtype=torch.long, pin_memory=self.context.on_gpu)
        self.step: Callable[[], object] | None = None
        self.logits = torch.empty(0)  # of the latest step, [batch, vocabulary]
        self.preparing: list[float] = []  # seconds of `prepare`, by token, of the latest `decode`
        self.captured: dict[str, Any] = {}  # what the attached model's forward of a token is given for its queries

    def prefill(self) -> None:
        """The prompt into an emptied cache, its first token into `token`; before that, once, the graph."""
        self.feed_prompt()
        if self.step is None:
            self.captured = queries_of(self.prepare_token())
            self.step = Graph(self.forward, on_gpu=self.context.on_gpu).replay
            self.feed_prompt()

    def feed_prompt(self) -> None:
        self.cache.reset()
        inputs = self.prepare(self.ids, past_key_values=self.cache, use_cache=True, is_first_iteration=True)
        logits = self.model(**inputs, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def prepare_token(self, **known: list[int]) -> dict[str, Any]:
        return self.prepare(self.token, next_sequence_length=1, past_key_values=self.cache, use_cache=True, **known)

    def check_addresses(self, inputs: dict[str, Any]) -> None:
        """inputs: of a token. What the graph was captured with must be what a forward of it would be given now."""
        given = queries_of(inputs)
        moved = [name for name in given if name != "query_parts" and given[name] is not self.captured[name]]
        if moved and self.context.on_gpu:
            raise SystemExit(f"{moved} moved when the cache was emptied: the graph still uses the old ones")
        self.captured = given

    def forward(self) -> None:
        output: Any = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, **self.captured)
        self.logits = output.logits[:, -1]  # held, so that the graph does not use its memory again
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def rewind(self) -> None:
        """The cache's counters back to the prompt's end; what lies behind it is written before it is read."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.ids.shape[1])

    def decode(self, tokens: int, *, hand_over: bool = False) -> tuple[float, list[list[int]]]:
        """Seconds of all steps, and the tokens by step and row.

        hand_over: what the host has read is told to `prepare`, of an attached model.
        """
        assert self.step is not None
        self.context.timer.synchronize()
        read = [self.token[:, 0].tolist()]
        self.preparing = []
        begin = time.perf_counter()
        for index in range(tokens):
            known = {"bottlenecked_tokens": read[-1]} if hand_over else {}
            called = time.perf_counter()
            inputs = self.prepare_token(**known)
            self.preparing.append(time.perf_counter() - called)
            if index == 0:
                self.check_addresses(inputs)
            self.step()
            self.read.copy_(self.token[:, 0], non_blocking=True)
            self.context.timer.synchronize()
            read.append(self.read.tolist())
        return time.perf_counter() - begin, read[1:]

    def run(self, *, hand_over: bool = False) -> tuple[float, list[list[int]]]:
        self.prefill()
        return self.decode(self.tokens, hand_over=hand_over)

    def logits_of(self, index: int) -> Tensor:
        """[batch, vocabulary] of the forward that decodes the token of this index."""
        self.prefill()
        self.decode(index + 1)
        return self.logits.float()


@torch.no_grad()
def measure(
    context: Context, model: PreTrainedModel, setting: Setting, processors: Mapping[float, CacheProcessor]
) -> Figure:
    """processors: by the scale of their edits."""
    tokens = 2 * setting.step + 1 if context.quick else TOKENS
    generator = torch.Generator(context.device).manual_seed(SEED)
    vocabulary = model.config.vocab_size
    shape = (setting.batch, setting.prior)
    ids = torch.randint(0, vocabulary, shape, generator=generator, device=context.device)
    stock = Loop(context, model, ids, model.prepare_inputs_for_generation, tokens)
    expected = stock.run()[1]
    repeated = check(stock, setting, processors[0.0], expected)

    with attach(model, processors[SCALE]) as attachment:
        ours = Loop(context, model, ids, model.prepare_inputs_for_generation, tokens)
        rows = zip(ours.run()[1], expected, strict=True)
        changed = sum(a != b for one, other in rows for a, b in zip(one, other, strict=True))
        counted = attachment.stats.boundaries
        if counted != setting.batch * ((tokens - 1) // setting.step):
            checks.refuse(setting, f"{counted} boundaries in {tokens} tokens of {setting.batch} rows")
        contenders = {OURS: (ours, True), READING: (ours, False), "stock": (stock, False)}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        preparing: dict[str, list[float]] = {name: [] for name in contenders}
        boundaries: list[float] = []
        runs = 1
        warm = 0.0, 0
        for repeat in range(-1, max(context.repeats, MIN_REPEATS)):
            if repeat == 0:
                warm = attachment.stats.seconds["total"], attachment.stats.rewrites
            for name in rotated(list(contenders), repeat):
                loop, hand_over = contenders[name]
                seconds = loop.run(hand_over=hand_over)[0]
                runs += loop is ours
                if repeat < 0:
                    continue
                times[name].append(seconds)
                preparing[name].append(statistics.median(loop.preparing))
                if name == OURS:
                    boundaries.append(statistics.median(loop.preparing[setting.step :: setting.step]))
        if attachment.stats.boundaries != runs * counted:
            checks.refuse(setting, f"{attachment.stats.boundaries} boundaries in {runs} runs, {counted} in the first")
        steps = replays(context, {OURS: ours, "stock": stock})
        keys = setting.describe("threads") | {"tokens": tokens}
        made = figure("decode", keys, times, key=key("decode", setting))
        made["boundaries"], made["changed_tokens"] = counted // setting.batch, changed
        # Host's share, see AttachmentStats.
        made["host_s"] = (attachment.stats.seconds["total"] - warm[0]) / max(attachment.stats.rewrites - warm[1], 1)
    for name, suffix in ((OURS, ""), (READING, "_reading")):
        made["extra" + suffix] = statistics.median(o / s - 1 for o, s in zip(times[name], times["stock"], strict=True))
        made[f"added_prepare{suffix}_s"] = statistics.median(
            o - s for o, s in zip(preparing[name], preparing["stock"], strict=True)
        )
    made["added_boundary_s"] = statistics.median(o - s for o, s in zip(boundaries, preparing["stock"], strict=True))
    made["step_s"] = statistics.median(times["stock"]) / tokens
    made["device_step_s"] = statistics.median(steps["stock"])
    made["capture_share"] = statistics.median(o / s - 1 for o, s in zip(steps[OURS], steps["stock"], strict=True))
    return made | repeated


def replays(context: Context, loops: dict[str, Loop]) -> dict[str, list[float]]:
    """Seconds of a step on the device, by round: replays one after the other, nothing in between."""
    steps: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(MIN_REPEATS * 2):
        for name in rotated(list(loops), repeat):
            loop = loops[name]
            assert loop.step is not None
            loop.rewind()

            count = min(REPLAYS, loop.tokens)

            def many(step: Callable[[], object] = loop.step, count: int = count) -> None:
                for _ in range(count):
                    step()

            steps[name] += [seconds / count for seconds in context.timer.seconds(many, 1)]
    return steps


def check(stock: Loop, setting: Setting, identity: CacheProcessor, expected: list[list[int]]) -> Figure:
    """A Processor that changes nothing leaves the tokens of stock, if stock repeats them: a large batch may not.

    Refuses if they differ and stock's do not. Returns what the figure says about that.
    """
    context, model = stock.context, stock.model
    with attach(model, identity) as attachment:
        ours = Loop(context, model, stock.ids, model.prepare_inputs_for_generation, stock.tokens)
        got = ours.run()[1]
        if attachment.stats.boundaries == 0:
            checks.refuse(setting, "no boundary happened")
        at = first_difference(got, expected)
        if at is None:
            return {"stock_repeats": True}
        ours_apart = apart(ours.logits_of(at), stock.logits_of(at))
    # Decisive is a graph that was captured afresh, as ours was; the same graph may repeat what no other does.
    again = Loop(context, model, stock.ids, stock.prepare, stock.tokens)
    differing = [
        (name, differs)
        for name, tokens in (("another stock loop", again.run()[1]), ("stock's loop", stock.run()[1]))
        if (differs := first_difference(tokens, expected)) is not None
    ]
    if not differing:
        checks.refuse(
            setting,
            f"an identity Processor generates other tokens than stock, from token {at} on, where logits are up to "
            f"{ours_apart:.3g} apart; stock repeats its own",
        )
    name, differs = differing[0]
    stock_apart = apart(again.logits_of(differs), stock.logits_of(differs))
    say(
        f"  {setting}: {name} generates other tokens than stock's first from token {differs} on (logits up to "
        f"{stock_apart:.3g} apart), ours from {at} on ({ours_apart:.3g})"
    )
    return {"stock_repeats": False, "logit_difference": {OURS: ours_apart, "stock": stock_apart}}


def queries_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name.startswith("query_")}


def first_difference(tokens: list[list[int]], expected: list[list[int]]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)


def apart(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs().max())


def processor(context: Context, model: PreTrainedModel, setting: Setting, scale: float) -> CacheProcessor:
    """A boundary with every step.step-th token: any token ends a step of that length. The prompt is not rewritten."""
    every_token = tuple(range(model.config.vocab_size))
    boundary = BoundaryConfig(rule="token_ids", token_ids=every_token, min_step_length=setting.step)
    config: CacheProcessorConfig = setting.backbone.processor_config(
        setting.processor_dim, setting.top_k, setting.step, boundary=boundary, rewrite_prompt=False
    )
    weights = initial_weights(config, random_scale=scale, seed=SEED)
    return CacheProcessor(config, weights, weight_dtype=setting.weight_dtype, backend=context.device)
