"""`make soak`: mixed traffic at one server for an hour. Does its memory stay flat, is every request answered, and with
what it gets alone?

    python -m tests.vllm.soak --seconds 3600 --output soak.json
    python -m tests.vllm.soak --figure soak.json             draws soak.png, which needs matplotlib alone

A server with a tiny random model, a random Processor and a cache so small that requests are preempted. Before the
traffic begins every prompt of a pool is asked for alone, greedily, with rewrites and without. Then clients, more than
the server runs at once, ask for these and for others: whole answers and streams, streams that are left, several
samples, long prompts and short ones. Afterwards the pool is asked for alone once more.

Every second the resident memory, threads and open files of the server's processes are noted. The last line says what
came of it; exit status 1 where a request was lost, an answer is another than alone (but for choices between logits that
are nearly equal), nothing was preempted, or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

POOL, LENGTHS = 12, (5, 40, 90)  # prompts, and tokens of an answer
CLIENTS = 12
NEAR = 2e-3  # of log-probabilities, as in test_load
MOST_GROWTH = 32.0  # MiB, from the first quarter after warming up to the last
MEASURED = ("seconds", "mib", "threads", "files")
OFF = {"kv_transfer_params": {"bottlenecked_rewrite": False}}
CACHE = 22 * 32 * 4 * 2 * 2 * 32 * 4  # 22 blocks of 32 positions
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "288", "--max-num-seqs", "8", "--block-size", "32"),
    *("--max-num-batched-tokens", "96", "--kv-cache-memory-bytes", str(CACHE), "--disable-uvicorn-access-log"),
)


class Soak:
    """What is asked, what has come back, and what memory there was."""

    def __init__(self, address: str, model: str, seed: int) -> None:
        from .engine import make_prompts

        self.address, self.model, self.random = address, model, random.Random(seed)
        self.pool = make_prompts(POOL, seed=seed, longest=160)
        self.fresh = make_prompts(4096, seed=seed + 1, longest=180)
        self.alone: dict[tuple[int, bool], tuple[list[int], list[float]]] = {}  # tokens, margins
        self.asked: Counter[str] = Counter()
        self.lost: list[str] = []
        self.different: list[str] = []
        self.compared = self.near = self.tokens = 0

    def body(self, prompt: list[int], length: int, **changes: Any) -> dict[str, Any]:
        return {
            "model": self.model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        } | changes  # fmt: skip

    async def ask(self, client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await client.post(f"{self.address}/v1/completions", json=body)
        answer.raise_for_status()
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return choices

    async def ask_alone(self, client: Any, step: int = 1) -> dict[tuple[int, bool], tuple[list[int], list[float]]]:
        """Every step-th prompt; one in three without rewrites too."""
        found = {}
        for index, prompt in list(enumerate(self.pool))[::step]:
            for off in (False, True)[: 2 if index % 3 == 0 else 1]:
                body = self.body(prompt, max(LENGTHS), logprobs=2, **(OFF if off else {}))
                (choice,) = await self.ask(client, body)
                best = [sorted(step.values(), reverse=True)[:2] for step in choice["logprobs"]["top_logprobs"]]
                found[index, off] = (list(choice["token_ids"]), [a - b for a, b in best])
        return found

    def compare(self, index: int, off: bool, tokens: list[int], what: str) -> None:
        """With as many tokens as there are of the answer alone."""
        expected, margins = self.alone[index, off]
        self.compared += 1
        parts = [i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b]
        if not parts:
            return
        if margins[parts[0]] < NEAR:
            self.near += 1
        else:
            self.different.append(f"{what} of prompt {index} parts at token {parts[0]}, margin {margins[parts[0]]:.1e}")

    async def stream(self, client: Any, body: dict[str, Any], leave_after: int | None) -> list[int]:
        tokens: list[int] = []
        request = {**body, "stream": True}
        async with client.stream("POST", f"{self.address}/v1/completions", json=request) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                if leave_after is not None and len(tokens) >= leave_after:
                    break
        return tokens

    async def one_request(self, client: Any) -> None:
        choose = self.random
        kind = choose.choices(
            ("whole", "stream", "left", "without rewrites", "samples", "sampled"), (35, 20, 15, 10, 10, 10)
        )[0]
        self.asked[kind] += 1
        off = kind == "without rewrites"
        index, length = choose.randrange(0, POOL, 3 if off else 1), choose.choice(LENGTHS)
        if kind in ("samples", "sampled"):
            count = 3 if kind == "samples" else 1
            sampled = self.body(
                choose.choice(self.fresh), length, n=count, temperature=choose.choice((0.3, 0.9, 1.5)), top_p=0.95
            )
            choices = await self.ask(client, sampled)
            answers = [list(choice["token_ids"]) for choice in choices]
            if len(answers) != count or any(len(answer) != length for answer in answers):
                self.lost.append(f"{kind}: {[len(answer) for answer in answers]} tokens of {count} times {length}")
            self.tokens += sum(map(len, answers))
            return
        body = self.body(self.pool[index], length, **(OFF if off else {}))
        if kind in ("whole", "without rewrites"):
            (choice,) = await self.ask(client, body)
            tokens = list(choice["token_ids"])
        else:
            tokens = await self.stream(client, body, choose.randrange(1, length + 1) if kind == "left" else None)
        if kind != "left" and len(tokens) != length:
            self.lost.append(f"{kind}: {len(tokens)} tokens of {length}")
        self.tokens += len(tokens)
        self.compare(index, off, tokens, kind)

    async def client(self, end: float) -> None:
        import httpx

        async with httpx.AsyncClient(timeout=300) as client:
            while time.monotonic() < end:
                try:
                    await self.one_request(client)
                except Exception as error:  # whatever it is, the request was not answered
                    self.lost.append(repr(error)[:300])
                    if len(self.lost) > 100:
                        return
                if self.random.random() < 0.05:  # a pause: the server runs empty now and then
                    await asyncio.sleep(self.random.random())

    async def traffic(self, seconds: float, measure: Callable[[], None]) -> None:
        import httpx

        async with httpx.AsyncClient(timeout=300) as client:
            self.alone = await self.ask_alone(client)
        say("the pool is known; traffic begins")
        end = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client(end)) for _ in range(CLIENTS)]
        while not all(client.done() for client in clients):
            measure()
            await asyncio.sleep(1.0)
        await asyncio.gather(*clients)
        say(f"{sum(self.asked.values())} requests, {len(self.lost)} lost; the pool again")
        async with httpx.AsyncClient(timeout=300) as client:
            again = await self.ask_alone(client, 3)
        for (index, off), (tokens, _) in again.items():
            self.compare(index, off, tokens, "the last answer")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure_tree(root: Any) -> dict[str, float]:
    """Of a process and its descendants: resident memory in MiB, threads, open files."""
    import psutil

    memory = threads = files = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory += process.memory_info().rss
            threads += process.num_threads()
            files += process.num_fds()
        except psutil.Error:
            continue
    return {"mib": memory / 2**20, "threads": threads, "files": files}


def judge(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth after warming up, which is the first fifth of the time, at most ten minutes."""
    begin = min(samples[-1]["seconds"] / 5, 600)
    settled = [sample for sample in samples if sample["seconds"] >= begin]
    times, memory = [s["seconds"] for s in settled], [s["mib"] for s in settled]
    quarter = max(len(memory) // 4, 1)
    slope = statistics.linear_regression(times, memory).slope * 3600 if len(settled) > 2 else 0.0
    return {
        "warm_seconds": begin, "mib_first": statistics.median(memory[:quarter]), "mib_max": max(memory),
        "growth_mib": statistics.median(memory[-quarter:]) - statistics.median(memory[:quarter]),
        "slope_mib_per_hour": slope, "threads_max": max(s["threads"] for s in settled),
        "files_growth": settled[-1]["files"] - settled[0]["files"],
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    import psutil

    from . import engine as tools
    from .server import metrics, running, serve_command

    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tools.save_backbone(folder / "backbone")
        tools.save_tokenizer(model)
        processor = tools.save_processor(folder / "processor", model)
        log = folder / "log"
        before = set(psutil.Process().children())
        with running(serve_command(model, processor, *FLAGS), log, VLLM_LOGGING_LEVEL="WARNING") as address:
            (server,) = set(psutil.Process().children()) - before
            say("the server runs")
            soak = Soak(address, str(model), options.seed)

            def measure() -> None:
                begin = samples[0]["time"] if samples else time.monotonic()
                now = time.monotonic()
                samples.append({"time": now, "seconds": now - begin, **measure_tree(server)})

            asyncio.run(soak.traffic(options.seconds, measure))
            counted = metrics(address)
            for _ in range(60):
                if counted["vllm:num_requests_running"] + counted["vllm:num_requests_waiting"] == 0:
                    break
                time.sleep(0.5)
                counted = metrics(address)
        errors = [line for line in log.read_text().splitlines() if "ERROR" in line or "Traceback" in line]
    judged = judge(samples)
    kept = ("num_preemptions_total", "bottlenecked_boundaries_total", "bottlenecked_saved_tokens_total",
            "bottlenecked_restored_tokens_total", "bottlenecked_skipped_total", "num_requests_running",
            "num_requests_waiting")  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"), "seconds": options.seconds, "seed": options.seed, "clients": CLIENTS,
        "requests": sum(soak.asked.values()), "asked": dict(soak.asked), "tokens": soak.tokens,
        "lost": soak.lost, "compared": soak.compared, "near_ties": soak.near, "different": soak.different,
        "errors_logged": errors[:20], "metrics": {name: counted.get(f"vllm:{name}", 0.0) for name in kept},
        "memory": judged,
        "samples": [{key: round(sample[key], 1) for key in MEASURED} for sample in samples[:: 1 + len(samples) // 400]],
    }  # fmt: skip


def complaints(result: dict[str, Any]) -> list[str]:
    """Why the exit status is 1."""
    memory, counted = result["memory"], result["metrics"]
    left = counted["num_requests_running"] + counted["num_requests_waiting"]
    return [
        *(f"lost: {text}" for text in result["lost"][:10]),
        *(f"differs: {text}" for text in result["different"][:10]),
        *([f"memory grew by {memory['growth_mib']:.1f} MiB"] if memory["growth_mib"] > MOST_GROWTH else []),
        *(["nothing was preempted"] if counted["num_preemptions_total"] == 0 else []),
        *([f"{left:.0f} requests are left in the server"] if left else []),
        *(["too many near ties"] if result["near_ties"] > max(2, result["compared"] // 50) else []),
    ]


def draw(file: Path) -> None:
    """The memory over the time, as a PNG beside the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(file.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.plot([s["seconds"] / 60 for s in result["samples"]], [s["mib"] for s in result["samples"]], linewidth=1)
    axes.axvline(result["memory"]["warm_seconds"] / 60, color="0.8", linewidth=1)
    axes.set(
        xlabel="minutes", ylabel="resident memory, MiB", xlim=(0, None), ylim=(0, 1.1 * result["memory"]["mib_max"])
    )
    axes.set_title(
        f"{result['requests']} requests, {result['memory']['slope_mib_per_hour']:+.1f} MiB/h after warming up",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(file.with_suffix(".png"), dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--output", type=Path, help="JSON with every measurement")
    parser.add_argument("--figure", type=Path, metavar="JSON", help="draw what was measured earlier, and nothing else")
    options = parser.parse_args()
    if options.figure:
        draw(options.figure)
        return 0
    result = run(options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result) + "\n")
    wrong, memory = complaints(result), result["memory"]
    print("\n".join([*wrong, *result["errors_logged"], f"seed {options.seed}"]))
    print(
        f"make soak: {options.seconds:.0f} s, {result['requests']} requests, {len(result['lost'])} lost, "
        f"{result['compared']} compared with solo runs, {len(result['different'])} differ, {result['near_ties']} near "
        f"ties, {result['metrics']['num_preemptions_total']:.0f} preemptions, "
        f"{result['metrics']['bottlenecked_boundaries_total']:.0f} rewrites, memory {memory['mib_first']:.0f} MiB, "
        f"{memory['slope_mib_per_hour']:+.1f} MiB/h" + (", FAILED" if wrong else "")
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
