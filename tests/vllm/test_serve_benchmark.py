"""Of `python -m benchmarks.serve`, what is read and made before any server starts."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.serve
from benchmarks.serve import (
    LINE,
    Run,
    figure,
    line_ends,
    make_prompts,
    model_directory,
    read_questions,
    servers,
    standard_error,
    table,
)


def test_prompts() -> None:
    assert len(set(make_prompts(64))) == 64


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": "#### 1"}) + "\n" for i in range(3)))
    assert read_questions(file, 2) == ["0?", "1?"]
    with pytest.raises(ValueError, match=r'must have 4 lines, each of them an object with a text "question"'):
        read_questions(file, 4)
    file.write_text('{"prompt": "0?"}\n')
    with pytest.raises(ValueError, match="must have 1 lines"):
        read_questions(file, 1)


def test_a_random_shape_is_served_with_lines_of_one_length(tmp_path: Path) -> None:
    options = argparse.Namespace(shape="tiny", dtype="bfloat16")
    model = model_directory(tmp_path, options)
    config = json.loads((model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"], config["dtype"]) == (3, 512, "bfloat16")
    assert (model / "tokenizer.json").is_file()
    boundary = line_ends(model, options)
    assert (boundary.rule, boundary.min_step_length, boundary.token_ids) == ("token_ids", LINE, tuple(range(512)))


@pytest.mark.parametrize("control", [False, True])
def test_the_control_is_stock_in_place_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: bool) -> None:
    commands = []

    @contextlib.contextmanager
    def running(command: list[str], log: Path) -> Iterator[str]:
        commands.append(command)
        yield log.stem

    monkeypatch.setattr(benchmarks.serve, "running", running)
    options = argparse.Namespace(dtype="bfloat16", control=control)
    with servers(tmp_path, tmp_path / "model", tmp_path / "processor", options, ["ours", "stock"]) as addresses:
        assert addresses == {"ours": "ours", "stock": "stock"}
    ours, stock = commands
    assert "--processor" not in stock
    assert ours == stock if control else "--processor" in ours


def test_a_ratio_is_taken_within_each_repeat_and_told_for_each_start() -> None:
    options = argparse.Namespace(
        shape="smollm2", processor_dim=128, dtype="bfloat16", starts=2, repeats=2, tokens=64, prompts=None,
        control=False,
    )  # fmt: skip
    runs = [
        Run({"stock": stock, "ours": ours}, {"stock": 10.0, "ours": 11.0}, boundaries=96, rewrite_s=0.5, ours_s=10.0)
        for stock, ours in ((10.0, 9.0), (20.0, 20.0), (10.0, 8.0), (20.0, 14.0))
    ]
    found = figure(8, runs, options)
    assert found["throughput_ratio"] == pytest.approx(0.85)  # not 11.5 / 15
    assert found["throughput_ratios"] == pytest.approx([0.9, 1.0, 0.8, 0.7])
    assert found["throughput_ratio_error"] == pytest.approx(0.06455, rel=1e-3)  # of their mean
    assert found["throughput_ratio_by_start"] == pytest.approx([0.95, 0.75])
    assert found["itl_ratio"] == pytest.approx(1.1)
    assert found["tokens_per_boundary"] == pytest.approx(4 * 16 * 64 / 384)
    assert found["rewrite_share"] == pytest.approx(0.05)
    assert "| 8 | 15.0 | 11.5 | 0.850 (" in table([{"case": "machine"}, found])
    assert " | 0.850 ± 0.065 | 0.950, 0.750 | " in table([{"case": "machine"}, found])
    assert standard_error([0.9]) is None
