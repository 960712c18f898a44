"""Tensor and pipeline parallel engines, two processes on one machine, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import engine as tools

ROOT = Path(__file__).parent.parent.parent


def run_apart(backbone: Path, processor: Path, prompts: list, options: dict) -> dict:
    """An engine with worker processes, in a process of its own."""
    program = f"""
import json, os
from tests.vllm.engine import engine, generate
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
from pathlib import Path
if __name__ == "__main__":
    prompts, options = json.loads(os.environ["BOTTLENECKED_TEST_CASE"])
    with engine(Path({str(backbone)!r}), Path({str(processor)!r}), **options) as llm:
        tokens = generate(llm, prompts, 60)
        counted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:bottlenecked_boundaries")
    print("RESULT " + json.dumps({{"tokens": tokens, "boundaries": counted}}))
"""
    script = Path(backbone) / "run_apart.py"
    script.write_text(program)
    environment = {**os.environ, "BOTTLENECKED_TEST_CASE": json.dumps([prompts, options]), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-3000:] + result.stderr[-6000:]
    found: dict = json.loads(lines[0].removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_are_one(
    parallel: str, backbone: Path, processor: Path, prompts: list, expected: tools.Reference
) -> None:
    found = run_apart(backbone, processor, prompts, {parallel: 2, "distributed_executor_backend": "mp"})
    assert found["tokens"] == expected.tokens
    assert found["boundaries"] == expected.boundaries
