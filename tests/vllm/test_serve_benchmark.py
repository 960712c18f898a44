"""Of `python -m benchmarks.serve`, what is read and made before any server starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.serve import LINE, line_ends, make_prompts, model_directory, read_questions


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
