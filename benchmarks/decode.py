"""Generation speed: stock transformers, ours, the paper in plain eager PyTorch. `python -m benchmarks.decode`

First the check: in float32 and with a random Processor, ours and the eager baseline must produce the same
tokens and recall the same positions. Then two measurements, all implementations interleaved in one run and
their order rotated from repeat to repeat, so that a busy moment of the machine hits all of them:

decode    tokens/s of whole generations after prompts of several lengths. A boundary falls on every N-th token
          (--boundary-every; 0: where the text has a newline) and, as the prompt is step 0, before the first.
          "ratio" is the decode time (first token to last) over that of stock in the same repeat. End-to-end
          times are noisy; "boundaries" is the time inside boundary calls over stock's decode time, steadier.
boundary  one boundary call (selection, Processor, write) on the same random cache and a window of 30 tokens,
          with the processor's caches flushed in between, as the backbone's forward would. The eager baseline
          gets its attention weights, averaged over the heads, for nothing; what those cost from captured
          queries is stated apart ("materialise"). Ours starts from captured queries and binds its tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from benchmarks import machine
from benchmarks.baselines.eager import EagerBottleneck
from bottlenecked import backbones
from bottlenecked.boundary import BoundaryEvent, newline_token_ids
from bottlenecked.checkpoint import initial_weights
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.transformers import attach
from bottlenecked.processor import CacheProcessor, RewriteReport

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WINDOW = 30  # tokens in the window of the boundary measurement
CHECK_PROMPT, CHECK_TOKENS = 128, 64
SCRUB_BYTES = 128 << 20  # more than the last-level cache of the machines we know

# Repeated and cut to the wanted length; its content does not matter, that it is ordinary text does.
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
class Backbone:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    newline_ids: tuple[int, ...]

    def prompt(self, length: int) -> Tensor:
        """Token ids [1, length] of ordinary text."""
        ids: list[int] = self.tokenizer(PROMPT)["input_ids"]
        repeats = -(-length // len(ids))
        return torch.tensor([(ids * repeats)[:length]])


@dataclass
class Run:
    """One generation: token ids, times in seconds, and per rewrite its seconds by stage."""

    token_ids: list[int]
    seconds: float  # the whole call, prefill included
    decode_seconds: float  # from the first token to the last
    boundary_seconds: float = 0.0  # inside boundary calls, wall clock
    boundaries: list[dict[str, float]] = field(default_factory=list)
    recalled: list[list[list[int]]] = field(default_factory=list)  # per rewrite and layer


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


def processor_config(backbone: Mapping[str, Any], dim: int, boundary: BoundaryConfig) -> CacheProcessorConfig:
    """A Processor of width `dim` with the paper's proportions: heads of 32, an MLP of 35/8 of the width."""
    return CacheProcessorConfig(
        **backbone,
        processor_dim=dim,
        processor_heads=dim // 32,
        processor_mlp_dim=dim * 35 // 8,
        boundary=boundary,
    )


def boundary_rule(every: int, backbone: Backbone) -> BoundaryConfig:
    """A boundary on every `every`-th token (any token ends a step of that length), or on newlines for 0."""
    if every == 0:
        return BoundaryConfig(rule="newline", token_ids=backbone.newline_ids)
    vocabulary = tuple(range(backbone.model.config.vocab_size))
    return BoundaryConfig(rule="token_ids", token_ids=vocabulary, min_step_length=every)


def eager_of(config: CacheProcessorConfig, weights: Mapping[str, np.ndarray], dtype: torch.dtype) -> EagerBottleneck:
    return EagerBottleneck(config, {name: torch.from_numpy(w) for name, w in weights.items()}, dtype)


def ours_of(config: CacheProcessorConfig, weights: Mapping[str, np.ndarray], dtype: torch.dtype) -> CacheProcessor:
    weight_dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return CacheProcessor(config, dict(weights), weight_dtype=weight_dtype)


def generate_stock(backbone: Backbone, input_ids: Tensor, tokens: int) -> Run:
    """model.generate, greedy, exactly `tokens` tokens (`main` leaves no end of text to stop at)."""
    clock = TokenClock()
    start = time.perf_counter()
    output = backbone.model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=tokens, streamer=clock
    )
    seconds = time.perf_counter() - start
    return Run(output[0, input_ids.shape[1] :].tolist(), seconds, clock.times[-1] - clock.times[0])


def generate_ours(backbone: Backbone, processor: CacheProcessor, input_ids: Tensor, tokens: int, threads: int) -> Run:
    reports: list[RewriteReport] = []
    with attach(backbone.model, processor, num_threads=threads, on_boundary=reports.append) as attachment:
        run = generate_stock(backbone, input_ids, tokens)
    run.boundary_seconds = attachment.stats.seconds["total"]
    run.boundaries = [per_thread(report.stage_seconds, threads) for report in reports]
    run.recalled = [report.recalled[0].tolist() for report in reports]
    return run


def per_thread(stage_seconds: Mapping[str, float], threads: int) -> dict[str, float]:
    """Our stages are summed over threads; divided by their number they add up to about the wall clock."""
    return {stage: seconds / threads for stage, seconds in stage_seconds.items()}


def generate_eager(backbone: Backbone, eager: EagerBottleneck, input_ids: Tensor, tokens: int) -> Run:
    rule = eager.config.boundary
    backbone.model.set_attn_implementation("eager")
    try:
        start = time.perf_counter()
        out = eager.generate(backbone.model, input_ids, tokens, rule.token_ids, min_step_length=rule.min_step_length)
        seconds = time.perf_counter() - start
    finally:
        backbone.model.set_attn_implementation("sdpa")
    run = Run(out.token_ids, seconds, out.token_times[-1] - out.token_times[0])
    run.boundary_seconds = sum(sum(b.stage_seconds.values()) for b in out.boundaries)
    run.boundaries = [b.stage_seconds for b in out.boundaries]
    run.recalled = [b.recalled.tolist() for b in out.boundaries]
    return run


def check(options: argparse.Namespace, backbone: Backbone, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ours against the eager baseline, float32, a random Processor, newline and fixed-rate boundaries.

    Raises SystemExit where tokens or recalled positions differ.
    """
    results = []
    input_ids = backbone.prompt(CHECK_PROMPT)
    stock = generate_stock(backbone, input_ids, CHECK_TOKENS)
    for dim in options.processor_dim:
        for every in (0, 7):
            config = processor_config(shape, dim, boundary_rule(every, backbone))
            weights = initial_weights(config, random_scale=options.random_scale, seed=options.seed)
            processor = ours_of(config, weights, torch.float32)
            ours = generate_ours(backbone, processor, input_ids, CHECK_TOKENS, options.threads)
            eager = generate_eager(backbone, eager_of(config, weights, torch.float32), input_ids, CHECK_TOKENS)
            if ours.token_ids != eager.token_ids or ours.recalled != eager.recalled:
                what = "tokens" if ours.token_ids != eager.token_ids else "recalled positions"
                raise SystemExit(f"ours and eager differ in {what} (processor_dim {dim}): not measured")
            results.append(
                {
                    "processor_dim": dim,
                    "boundary_every": every,
                    "tokens": CHECK_TOKENS,
                    "rewrites": len(ours.boundaries),
                    "differs_from_stock": ours.token_ids != stock.token_ids,
                }
            )
    return results


def measure_decode(options: argparse.Namespace, backbone: Backbone, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """tokens/s of whole generations: one row per prompt length and implementation."""
    dtype = DTYPES[options.dtype]
    implementations: dict[tuple[str, int], Callable[[Tensor], Run]] = {
        ("stock", 0): lambda ids: generate_stock(backbone, ids, options.tokens)
    }
    for dim in options.processor_dim:
        config = processor_config(shape, dim, boundary_rule(options.boundary_every, backbone))
        weights = initial_weights(config, random_scale=options.random_scale, seed=options.seed)
        ours, eager = ours_of(config, weights, dtype), eager_of(config, weights, dtype)
        implementations["ours", dim] = lambda ids, p=ours: generate_ours(
            backbone, p, ids, options.tokens, options.threads
        )
        implementations["eager", dim] = lambda ids, e=eager: generate_eager(backbone, e, ids, options.tokens)

    rows = []
    for prior in options.prior:
        input_ids = backbone.prompt(prior)
        runs: dict[tuple[str, int], list[Run]] = {key: [] for key in implementations}
        for repeat in range(-1, options.repeats):  # the first one only warms up
            for key in rotated(list(implementations), repeat):
                run = implementations[key](input_ids)
                if repeat >= 0:
                    runs[key].append(run)
        stock = runs["stock", 0]
        stock_seconds = statistics.median(r.decode_seconds for r in stock)
        for (name, dim), of_this in runs.items():
            rows.append(
                {
                    "implementation": name,
                    "processor_dim": dim or None,
                    "prior": prior,
                    "boundaries": len(of_this[0].boundaries),
                    "tokens_per_second": spread([options.tokens / r.seconds for r in of_this]),
                    "decode_tokens_per_second": spread([(options.tokens - 1) / r.decode_seconds for r in of_this]),
                    "ratio": spread([r.decode_seconds / s.decode_seconds for r, s in zip(of_this, stock, strict=True)]),
                    "boundary_share": statistics.median(r.boundary_seconds for r in of_this) / stock_seconds,
                    "boundary_ms": stage_ms([b for r in of_this for b in r.boundaries]),
                }
            )
    return rows


def measure_boundary(options: argparse.Namespace, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One boundary call at several prior lengths: one row per Processor width and prior length."""
    return [boundary_row(options, shape, dim, prior) for dim in options.processor_dim for prior in options.prior]


def boundary_row(options: argparse.Namespace, shape: Mapping[str, Any], dim: int, prior: int) -> dict[str, Any]:
    dtype = DTYPES[options.dtype]
    config = processor_config(shape, dim, BoundaryConfig())
    weights = initial_weights(config, random_scale=options.random_scale, seed=options.seed)
    end = prior + WINDOW
    layers = range(config.num_layers)
    generator = torch.Generator().manual_seed(options.seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    # transformers' layout, [1, H_kv, T, d]; the query of position p is row p % R of its ring [1, R, H_q, d]
    pristine = [random(2, config.num_kv_heads, end, config.head_dim) for _ in layers]
    queries = [random(1, config.recent_window, config.num_query_heads, config.head_dim) for _ in layers]

    processor = ours_of(config, weights, dtype)
    workspace = processor.workspace(num_threads=options.threads)
    event = BoundaryEvent(sequence=0, step_begin=prior, step_end=end)
    eager = eager_of(config, weights, dtype)

    def fresh_cache() -> DynamicCache:
        cache = DynamicCache()
        for layer, kv in enumerate(pristine):
            cache.update(kv[:1].clone(), kv[1:].clone(), layer)
        return cache

    ours_cache, eager_cache = fresh_cache(), fresh_cache()
    scratch = np.zeros(SCRUB_BYTES // 8)

    def restore(cache: DynamicCache) -> None:
        for kv, layer in zip(pristine, cache.layers, strict=True):
            layer.keys.copy_(kv[:1])
            layer.values.copy_(kv[1:])
        np.add(scratch, 1.0, out=scratch)

    def run_ours() -> dict[str, Any]:
        start = time.perf_counter()
        bound = processor.bind(
            [layer.keys.transpose(1, 2) for layer in ours_cache.layers],
            [layer.values.transpose(1, 2) for layer in ours_cache.layers],
            queries,
            workspace=workspace,
        )
        bind_seconds = time.perf_counter() - start
        report = bound.rewrite([event])
        seconds = time.perf_counter() - start
        stages = {"bind": bind_seconds, **per_thread(report.stage_seconds, options.threads)}
        return {"seconds": seconds, "stages": stages, "recalled": report.recalled[0].tolist()}

    attention = materialise(pristine, queries, prior, config)
    captured = [eager.capture(attention)]

    def run_eager() -> dict[str, Any]:
        start = time.perf_counter()
        boundary = eager.rewrite(eager_cache, captured, prior, end)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "stages": boundary.stage_seconds, "recalled": boundary.recalled.tolist()}

    def run_materialise() -> dict[str, Any]:
        start = time.perf_counter()
        eager.capture(materialise(pristine, queries, prior, config))
        return {"seconds": time.perf_counter() - start}

    restore(ours_cache)
    restore(eager_cache)
    mass = captured[0][:, :, :prior].mean(dim=1)
    compare_boundaries(run_ours(), run_eager(), mass, pristine, ours_cache, eager_cache)

    implementations: dict[str, tuple[Callable[[], dict[str, Any]], DynamicCache]] = {
        "ours": (run_ours, ours_cache),
        "eager": (run_eager, eager_cache),
        "materialise": (run_materialise, eager_cache),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in implementations}
    for repeat in range(options.boundary_repeats):
        for name in rotated(list(implementations), repeat):
            call, cache = implementations[name]
            restore(cache)
            results[name].append(call())

    ms = {name: [1e3 * r["seconds"] for r in of_name] for name, of_name in results.items()}
    pairs = list(zip(ms["ours"], ms["eager"], ms["materialise"], strict=True))
    return {
        "processor_dim": dim,
        "prior": prior,
        "window": WINDOW,
        "ours_ms": spread(ms["ours"]),
        "eager_ms": spread(ms["eager"]),
        "materialise_ms": spread(ms["materialise"]),
        "speedup": spread([e / o for o, e, _ in pairs]),
        "speedup_with_materialise": spread([(e + m) / o for o, e, m in pairs]),
        "ours_stages_ms": stage_ms([r["stages"] for r in results["ours"]]),
        "eager_stages_ms": stage_ms([r["stages"] for r in results["eager"]]),
    }


def materialise(
    kv: Sequence[Tensor], queries: Sequence[Tensor], prior: int, config: CacheProcessorConfig
) -> list[Tensor]:
    """Attention weights of the window's queries over the cache, as eager attention computes them.

    kv: per layer keys and values stacked [2, H_kv, T, d]; queries: per layer ring [1, R, H_q, d].
    Returns per layer [1, H_q, T - prior, T].
    """
    end = kv[0].shape[2]
    rows = torch.arange(prior, end) % config.recent_window
    future = torch.ones(end - prior, end, dtype=torch.bool).triu(prior + 1)
    groups = config.num_query_heads // config.num_kv_heads
    weights = []
    for of_layer, ring in zip(kv, queries, strict=True):
        q = ring[:, rows].transpose(1, 2)
        k = of_layer[:1].repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(2, 3) * config.head_dim**-0.5).masked_fill(future, float("-inf"))
        weights.append(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype))
    return weights


def compare_boundaries(
    ours: Mapping[str, Any],
    eager: Mapping[str, Any],
    mass: Tensor,
    pristine: Sequence[Tensor],
    ours_cache: DynamicCache,
    eager_cache: DynamicCache,
) -> None:
    """Raise SystemExit unless one boundary call made the same edits in both implementations.

    Recalled positions may differ where their masses [L, prior] agree within rounding; edits are compared over
    the rows that both rewrote, relative to their size. pristine: per layer the cache before, [2, H_kv, T, d].
    """
    single = pristine[0].dtype == torch.float32
    mass_tolerance, edit_tolerance = (1e-5, 1e-3) if single else (2e-2, 1e-1)
    for layer, (a, b) in enumerate(zip(ours["recalled"], eager["recalled"], strict=True)):
        lowest = mass[layer, a].min(), mass[layer, b].min()
        if len(a) != len(b) or abs(lowest[0] - lowest[1]) > mass_tolerance * lowest[1]:
            raise SystemExit(f"layer {layer}: ours recalls {a}, eager {b}: not measured")
        rows = sorted(set(a) & set(b)) + list(range(mass.shape[1], pristine[layer].shape[2]))
        before = pristine[layer][:, :, rows].float()
        edit, expected = (
            torch.cat([c.layers[layer].keys, c.layers[layer].values])[:, :, rows].float() - before
            for c in (ours_cache, eager_cache)
        )
        error = float((edit - expected).norm() / expected.norm())
        if not error <= edit_tolerance:
            raise SystemExit(f"layer {layer}: edits differ by {error:.2g} of their size: not measured")


def rotated(items: list[T], by: int) -> list[T]:
    by %= len(items)
    return items[by:] + items[:by]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def stage_ms(boundaries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean milliseconds per boundary and stage; empty where there was none."""
    stages = boundaries[0] if boundaries else {}
    return {stage: 1e3 * statistics.fmean(b[stage] for b in boundaries) for stage in stages}


def text_spread(s: Mapping[str, float], digits: int) -> str:
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f}-{s['max']:.{digits}f})"


def text_stages(stages: Mapping[str, float]) -> str:
    total = f"{sum(stages.values()):.1f} = " if stages else "-"
    return total + " + ".join(f"{name} {ms:.1f}" for name, ms in stages.items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns; a last, longer cell of a row flows freely."""
    columns = len(rows[0])
    widths = [max(len(row[c]) for row in rows) for c in range(columns)]
    return "\n".join(
        "  ".join([cell.rjust(width) for cell, width in zip(row, widths, strict=False)] + list(row[columns:]))
        for row in rows
    )


def text_decode(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", "d_p", "prompt", "tokens/s", "decode tokens/s", "ratio to stock", "boundaries"]
    lines = [header]
    for r in rows:
        lines.append(
            [
                r["implementation"],
                str(r["processor_dim"] or "-"),
                str(r["prior"]),
                text_spread(r["tokens_per_second"], 1),
                text_spread(r["decode_tokens_per_second"], 1),
                text_spread(r["ratio"], 3),
                f"{r['boundaries']}: {r['boundary_share']:.1%}",
                text_stages(r["boundary_ms"]),
            ]
        )
    return table(lines) + "\nlast column: mean ms per boundary by stage (ours: summed over threads / threads)"


def text_boundary(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [["d_p", "prior", "ours ms", "eager ms", "eager / ours", "materialise ms", "(eager + it) / ours"]]
    for r in rows:
        lines.append(
            [
                str(r["processor_dim"]),
                str(r["prior"]),
                text_spread(r["ours_ms"], 1),
                text_spread(r["eager_ms"], 1),
                text_spread(r["speedup"], 2),
                text_spread(r["materialise_ms"], 1),
                text_spread(r["speedup_with_materialise"], 2),
            ]
        )
    stages = [
        f"d_p {r['processor_dim']}, prior {r['prior']}, {name}: {text_stages(r[f'{name}_stages_ms'])}"
        for r in rows
        for name in ("ours", "eager")
    ]
    return "\n".join([table(lines), "mean ms by stage (ours: summed over threads / threads):", *stages])


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description="Generation speed: stock, ours, eager PyTorch."
    )
    parser.add_argument("--part", choices=("all", "decode", "boundary"), default="all", help="measure what")
    parser.add_argument("--model", default="smollm2", help='"smollm2", a GGUF file or a directory')
    parser.add_argument("--processor-dim", type=int, nargs="+", default=[128, 512], metavar="D", help="of 32")
    parser.add_argument("--prior", type=int, nargs="+", default=[64, 256, 1024], help="prompt lengths")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per generation, at least 2")
    parser.add_argument("--boundary-every", type=int, default=30, metavar="N", help="tokens; 0: at newlines")
    parser.add_argument("--repeats", type=int, default=5, help="generations per implementation")
    parser.add_argument("--boundary-repeats", type=int, default=20, help="boundary calls per implementation")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone and its cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of ours")
    parser.add_argument("--random-scale", type=float, default=0.05, help="of the Processor's last matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    options = parser.parse_args(arguments)
    least = {"tokens": 2, "boundary_every": 0, "repeats": 1, "boundary_repeats": 1, "threads": 1}
    for name, minimum in least.items():
        if (value := getattr(options, name)) < minimum:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")
    for dim in options.processor_dim:
        if dim < 32 or dim % 32:
            parser.error(f"--processor-dim is {dim}; it must be a multiple of 32 (heads of 32)")
    if min(options.prior) < 1:
        parser.error(f"--prior is {min(options.prior)}; it must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "options": vars(options)}

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    say(f"{about['cpu']}, {about['usable_cores']} cores, {options.threads} threads, {about['backend']}")
    say(f"{about['versions']}, commit {about['commit']}, {about['date']}, {options.dtype}")

    described = backbones.describe(options.model)
    # The Processor's benchmark needs the backbone's shape only, and the weights here are fresh.
    shape = {key: described[key] for key in ("num_layers", "num_kv_heads", "head_dim", "num_query_heads")}

    if options.part in ("all", "decode"):
        model, tokenizer = backbones.load(options.model, dtype="float32")
        model.set_attn_implementation("sdpa")
        # No end of text: every implementation generates the same number of tokens.
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        backbone = Backbone(model, tokenizer, tuple(newline_token_ids(tokenizer)))
        result["check"] = check(options, backbone, shape)
        for row in result["check"]:
            say(f"same as eager: {row}")
        model.to(DTYPES[options.dtype])
        result["decode"] = measure_decode(options, backbone, shape)
        say(f"\ndecode: {options.tokens} tokens, {options.repeats} repeats; median (min-max)")
        say(text_decode(result["decode"]))
    if options.part in ("all", "boundary"):
        result["boundary"] = measure_boundary(options, shape)
        say(f"\nboundary: window {WINDOW}, {options.boundary_repeats} repeats; median (min-max)")
        say(text_boundary(result["boundary"]))
    if options.json:
        print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
