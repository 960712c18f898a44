"""`bottlenecked serve`, a real server process, and real clients: concurrent, streaming, leaving, cancelled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from . import engine as tools
from .server import metrics, running, serve_command

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "64", "--block-size", "32", "--kv-cache-memory-bytes", str(16 << 20)),
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def address(backbone: Path, processor: Path, log: Path) -> Iterator[str]:
    tools.save_tokenizer(backbone)
    with running(serve_command(backbone, processor, *FLAGS), log, VLLM_LOG_STATS_INTERVAL="1") as found:
        yield found


def ask(address: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests at once; the answers in order."""

    async def all_at_once() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=3600) as client:
            answers = await asyncio.gather(*(client.post(f"{address}/v1/completions", json=r) for r in requests))
            return [answer.json() for answer in answers]

    return asyncio.run(all_at_once())


def completion(backbone: Path, prompt: list[int] | str, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(backbone), "prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    } | changes  # fmt: skip


def tokens_of(answer: dict[str, Any]) -> list[int]:
    assert "choices" in answer, answer
    return list(answer["choices"][0]["token_ids"])


def test_concurrent_clients(
    address: str, backbone: Path, prompts: list, expected: tools.Reference, stock: tools.Reference, log: Path
) -> None:
    answers = ask(address, [completion(backbone, prompt) for prompt in prompts])
    assert [tokens_of(answer) for answer in answers] == expected.tokens
    counted = metrics(address)
    assert counted["vllm:bottlenecked_boundaries_total"] == expected.boundaries
    assert counted["vllm:bottlenecked_rewrite_seconds_count"] > 0
    assert counted["vllm:bottlenecked_relative_edit_count"] == expected.boundaries
    for _ in range(60):
        if "boundaries=" in log.read_text():
            break
        time.sleep(0.5)
    assert "rewrite ms (mean)=" in log.read_text()

    off = {"kv_transfer_params": {"bottlenecked_rewrite": False}}
    also_off = {"vllm_xargs": {"bottlenecked_rewrite": 0}}
    mixed = [completion(backbone, p, **[off, also_off, {}][i % 3]) for i, p in enumerate(prompts)]
    for i, answer in enumerate(ask(address, mixed)):
        assert tokens_of(answer) == (expected if i % 3 == 2 else stock).tokens[i]
    assert metrics(address)["vllm:bottlenecked_skipped_total"] == 6


def test_streams_and_clients_that_leave(address: str, backbone: Path, prompts: list, expected: tools.Reference) -> None:
    """One client in two goes away after a few tokens; the others' streams are whole."""

    async def stream(client: httpx.AsyncClient, i: int) -> list[int]:
        tokens: list[int] = []
        body = completion(backbone, prompts[i], stream=True)
        async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                if i % 2 and len(tokens) >= 8:
                    break
        return tokens

    async def all_at_once() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=3600) as client:
            return await asyncio.gather(*(stream(client, i) for i in range(len(prompts))))

    for i, tokens in enumerate(asyncio.run(all_at_once())):
        assert tokens == expected.tokens[i][: len(tokens)]
        assert len(tokens) == 60 or i % 2


def test_other_requests(address: str, backbone: Path, prompts: list, expected: tools.Reference) -> None:
    """Text, stop strings, several answers, log-probabilities, structured output: served, and no trace is left."""
    text = completion(backbone, "two words", stop=["e", "\n"], ignore_eos=False)
    several = completion(backbone, prompts[0], n=3, temperature=0.9)
    logged = completion(backbone, prompts[1], logprobs=2)
    choice = completion(backbone, "yes or no? ", structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    structured = completion(backbone, "json: ", structured_outputs={"json": schema}, ignore_eos=False)
    answers = ask(address, [text, several, logged, choice, structured])
    assert not set("e\n") & set(answers[0]["choices"][0]["text"])
    assert len(answers[1]["choices"]) == 3
    assert tokens_of(answers[2]) == expected.tokens[1]
    assert len(answers[2]["choices"][0]["logprobs"]["top_logprobs"]) == 60
    assert answers[3]["choices"][0]["text"] in ("yes", "no")
    assert answers[4]["choices"][0]["text"].startswith("{")
    assert [tokens_of(a) for a in ask(address, [completion(backbone, p) for p in prompts])] == expected.tokens
    running_now = metrics(address)["vllm:num_requests_running"]
    assert running_now == 0


def test_serve_tells_what_is_wrong(tmp_path: Path, backbone: Path) -> None:
    import subprocess

    command = serve_command(backbone, tmp_path / "nothing")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1
