"""SmolLM2 in float32 with a random Processor: our generation against a plain PyTorch loop written from the paper.

tests/plain_loop.py shares no code with the package and uses the attention weights the model itself computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bottlenecked import CacheProcessor, CacheProcessorConfig, backbones
from bottlenecked.boundary import newline_token_ids
from bottlenecked.checkpoint import initial_weights
from bottlenecked.config import BoundaryConfig
from bottlenecked.integrations.transformers import attach

from . import plain_loop

pytestmark = pytest.mark.smollm2

QUESTIONS = (
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
)
TOKENS = 72


@pytest.fixture
def eager(smollm2: tuple[Any, Any]) -> Iterator[Any]:
    """The shared model, on eager attention for as long as the oracle runs."""
    model = smollm2[0]
    previous = model.config._attn_implementation
    yield model
    model.set_attn_implementation(previous)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("changes", [{}, {"top_k": 7, "recent_window": 11}, {"key_space": "unrotated"}])
def test_same_text_and_positions_as_the_plain_loop(
    smollm2: tuple[Any, Any], eager: Any, question: str, changes: dict[str, Any]
) -> None:
    model, tokenizer = smollm2
    newlines = newline_token_ids(tokenizer)
    shape = backbones.describe("smollm2")
    config = CacheProcessorConfig(
        **{**shape, **changes},
        processor_dim=64,
        processor_heads=4,
        processor_mlp_dim=96,
        boundary=BoundaryConfig(token_ids=newlines),
    )
    weights = initial_weights(config, random_scale=0.3, seed=3)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = inputs["input_ids"].shape[1]
    stock = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:].tolist()

    reports: list[Any] = []
    processor = CacheProcessor(config, weights, weight_dtype="float32")
    with attach(model, processor, tokenizer, on_boundary=reports.append):
        ours = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:].tolist()

    model.set_attn_implementation("eager")
    theirs, boundaries = plain_loop.generate(
        model,
        config.to_dict(),
        {name: torch.from_numpy(np.asarray(w)) for name, w in weights.items()},
        newlines,
        inputs["input_ids"],
        TOKENS,
        model.generation_config.eos_token_id,
    )
    assert ours == theirs
    assert ours != stock
    assert len(reports) == len(boundaries) > 1
    for report, boundary in zip(reports, boundaries, strict=True):
        assert (report.window_begin[0], report.events[0].step_end) == (boundary["begin"], boundary["end"])
        assert report.recalled[0].tolist() == [list(map(int, layer)) for layer in boundary["recalled"]]
        np.testing.assert_allclose(report.delta_norm[:, 0], boundary["delta_norm"], rtol=1e-3)
