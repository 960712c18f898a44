"""Of `python -m benchmarks.serve`, what is read before any server starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serve import make_prompts, read_questions


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
