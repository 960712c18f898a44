"""lm-eval's filters and math-verify, as far as we rely on them, and the files that problems come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
pytest.importorskip("transformers")

from bottlenecked.evaluation.answers import FLEXIBLE, NOTHING, STRICT, equal, extract
from bottlenecked.evaluation.problems import encode_problems, read_problems
from bottlenecked.training.data import load_examples
from bottlenecked.training.tasks import ChainTask, RegisterTask, synthesize, task_tokenizer
from tests import tiny


def test_the_last_number_and_the_one_behind_the_marks() -> None:
    texts = ["6 * 3 = 18\n#### 18", "so 18.5 dollars", "#### -1,234\nThat is 7.", "none", "", "It costs $70,000."]
    assert extract(texts) == ["18", "18.5", "7.", NOTHING, NOTHING, "$70,000."]
    assert extract(texts, STRICT) == ["18", NOTHING, "-1,234", NOTHING, NOTHING, NOTHING]
    assert extract([], FLEXIBLE) == []


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ("18", "18", True),
        ("18", "$18.", True),
        ("18", "18.00", True),
        ("1,234", "1234", True),
        ("-9867630", "-9,867,630", True),
        ("0.5", ".5", True),
        ("18", "81", False),
        ("18", "-18", False),
        ("0.3333333", "0.33", False),
        ("18", NOTHING, False),
        ("18", "..", False),
    ],
)
def test_numbers_are_equal_however_they_are_written(reference: str, answer: str, same: bool) -> None:
    assert equal(reference, answer) is same


def write(path: Path, records: Any) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_gsm8k(tmp_path: Path) -> None:
    question = "w5 w6"
    records = [
        {"question": question, "answer": "First <<2*9=18>>18.\nThen it stays.\n#### 1,018"},
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "#### -3"}]},
    ]
    found = read_problems(write(tmp_path / "gsm8k_test.jsonl", records))
    assert (found.name, found.kind) == ("gsm8k_test", "number")
    assert [(p.name, p.answer, p.steps) for p in found.problems] == [
        ("gsm8k_test.jsonl:1", "1,018", 2),
        ("gsm8k_test.jsonl:2", "-3", 0),
    ]
    encoded = encode_problems(found, tiny.tokenizer(), template="w1 {question} ")
    assert [p.prompt for p in encoded.problems] == [(1, 5, 6)] * 2
    assert encoded.problems[0].given == ()


def test_gsm_hard_and_svamp(tmp_path: Path) -> None:
    hard = read_problems(
        write(tmp_path / "hard.jsonl", [{"question": "a?", "answer": -9867630.0}, {"question": "b?", "answer": 1e-07}])
    )
    assert [p.answer for p in hard.problems] == ["-9867630", "0.0000001"]
    svamp = read_problems(
        write(
            tmp_path / "svamp.json", [{"Body": "Dan had $ 3.", "Question": "How much? ", "Answer": 51.0, "Type": "x"}]
        )
    )
    assert svamp.kind == hard.kind == "number"
    assert svamp.problems[0].messages == ({"role": "user", "content": "Dan had $ 3. How much?"},)
    assert (svamp.problems[0].answer, svamp.problems[0].name) == ("51", "svamp.json:1")
    assert equal(svamp.problems[0].answer, "$51.00")


@pytest.mark.parametrize("task", [ChainTask(), RegisterTask()], ids=["chain", "registers"])
def test_whole_answers(task: Any, tmp_path: Path) -> None:
    records = list(synthesize(task, 5))
    path = write(tmp_path / "task.jsonl", records)
    found = encode_problems(read_problems(path), task_tokenizer())
    examples = load_examples([path], task_tokenizer(), max_length=512).examples
    assert found.kind == "exact"
    for problem, record, example in zip(found.problems, records, examples, strict=True):
        assert problem.prompt + problem.expected[0] == example.tokens
        assert problem.expected[1] == example.loss_mask[len(problem.prompt) :]
        assert problem.steps == len(record["answer"].splitlines()) == example.num_steps - 1
        given = [None if ours else token for token, ours in zip(*problem.expected, strict=True)]
        assert list(problem.given) == (given if "forced" in record else [])
        assert bool(problem.given) == ("forced" in record)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no problems"),
        ("a.jsonl", '{"question": "q"}', r'a\.jsonl:1 has no text "answer"'),
        ("a.jsonl", '{"question": "", "answer": 3}', "empty question"),
        ("a.jsonl", '{"question": "q", "answer": NaN}', r"a\.jsonl:1 has the answer nan"),
        ("a.jsonl", '{"question": "q", "answer": true}', 'no text "answer"'),
        ("a.jsonl", "no", r"a\.jsonl:1 is not JSON"),
        ("a.json", "[1]", r"a\.json:1 must be a JSON object"),
        ("a.json", "[{", r"a\.json is not JSON"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "#### 1"}\n\n{"question": "q", "answer": "so 1"}',
            r"1 of 2 answers have no number behind ####, such as a\.jsonl:3",
        ),
    ],
)
def test_files_that_are_no_problems(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(tmp_path / name)
    assert re.search(re.escape(name), str(caught.value))
