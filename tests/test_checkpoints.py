"""The checkpoints that are kept in the repository do what the committed outcomes of their experiment say."""

from __future__ import annotations

import json
from pathlib import Path

from bottlenecked.evaluation.engines import System
from bottlenecked.evaluation.run import evaluate
from bottlenecked.training.data import write_lines
from bottlenecked.training.tasks import RegisterTask, synthesize
from experiments.lab import unpack

ROOT = Path(__file__).parent.parent
HERE = ROOT / "checkpoints" / "registers"
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
