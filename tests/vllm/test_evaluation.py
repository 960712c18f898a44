"""`bottlenecked eval`'s engine for vLLM writes what its engine for transformers writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bottlenecked.evaluation.engines import VLLM, EngineSettings, System, Transformers
from bottlenecked.evaluation.problems import Problem

from . import engine as tools

TOKENS = 40
OPTIONS = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 16 << 20}


def test_same_answers_as_transformers(
    backbone: Path, processor: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    shutil.copytree(backbone, tmp_path / "backbone")
    backbone = tmp_path / "backbone"
    tools.save_tokenizer(backbone)
    problems = [Problem(f"p:{i}", (), "", 0, tuple(prompt)) for i, prompt in enumerate(prompts)]
    systems = [System("processor", str(backbone), processor), System("plain", str(backbone))]
    common: Any = {"device": "cpu", "weight_dtype": "float32"}
    vllm = VLLM(EngineSettings(batch_size=2, vllm=OPTIONS, **common), problems, TOKENS)
    plain = Transformers(EngineSettings(batch_size=1, **common))
    made = {}
    try:
        for system in systems:
            for name, each in (("vllm", vllm), ("transformers", plain)):
                batches = list(each.generate(system, problems, TOKENS))
                made[name, system.name] = {a.problem.name: a.tokens for batch in batches for a in batch.answers}
                assert each.memory() > 1e6
                assert sum(batch.seconds for batch in batches) > 0
    finally:
        vllm.close()
        plain.close()
    for system in systems:
        assert made["vllm", system.name] == made["transformers", system.name]
        assert len(made["vllm", system.name]) == len(prompts)
    assert made["vllm", "processor"] != made["vllm", "plain"]
