"""Several ranks against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bottlenecked import BoundaryEvent, CacheProcessorConfig
from bottlenecked.integrations.vllm.options import ServerOptions
from bottlenecked.integrations.vllm.worker import processor_of_layers

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


def test_two_ranks_are_one(backbone: Path, processor: Path, prompts: list, expected: tools.Reference) -> None:
    """Tensor parallel: mass summed over ranks, rows gathered from them."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = run_apart(backbone, processor, prompts, options)
    assert found["tokens"] == expected.tokens
    assert found["boundaries"] == expected.boundaries


def test_layers_are_local(processor: Path) -> None:
    """Pipeline parallel: what a worker with layers 1 and 2 does to them is what a worker with all layers does.

    Real engines cannot show it here: vLLM 0.32 on a CPU fails with --pipeline-parallel-size 2 by itself.
    """
    config = CacheProcessorConfig.load(processor)
    options = ServerOptions(processor=str(processor), weight_dtype="float32")
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, config.num_layers, 3, 32, config.num_kv_heads, config.head_dim, generator=generator)
    queries = torch.randn(config.num_layers, 2, 32, config.num_query_heads, config.head_dim, generator=generator)
    event, table = BoundaryEvent(0, 30, 50), np.array([[2, 0]], np.int32)
    results = []
    for layers in (range(config.num_layers), (1, 2)):
        keys, values = (list(cache[list(layers)].clone()) for cache in caches)
        made = processor_of_layers(config, options, "cpu", layers)
        made.bind(
            keys, values, list(queries[list(layers)]), workspace=made.workspace(),
            query_table=np.array([[0, 1]], np.int32),
        ).rewrite([event], table)  # fmt: skip
        results.append((keys, values))
    (all_keys, all_values), (keys, values) = results
    assert not torch.equal(all_keys[1], caches[0, 1])
    for i, layer in enumerate((1, 2)):
        assert torch.equal(keys[i], all_keys[layer])
        assert torch.equal(values[i], all_values[layer])
