"""vLLM's OpenAI server with a Processor, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, *, timeout: float = 300, **environment: str) -> Iterator[str]:
    """A server from `command`, to which host and port are added; its address. What it prints goes to `log`."""
    port = free_port()
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "bottlenecked",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **settings, **environment},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + timeout
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()[-4000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve_command(model: str | Path, processor: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "bottlenecked", "serve", str(model), "--processor", str(processor), *flags]


def metrics(address: str) -> dict[str, float]:
    """Sums over labels, by name."""
    totals: dict[str, float] = {}
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals
