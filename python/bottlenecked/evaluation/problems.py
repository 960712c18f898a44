"""Problems with answers that can be checked, from files that the user names.

    GSM8K     JSONL, "question" and an "answer" (or "messages") whose last line is "#### 18"
    GSM-Hard  JSONL, "question" and an "answer" that is a number
    SVAMP     a JSON list of objects with "Body", "Question" and "Answer", a number
    others    JSONL as for training, such as the synthetic tasks': the whole answer has to be right, token by token,
              "forced" ranges being given

Which it is follows from the file's content. Prompts are encoded as in training and by `bottlenecked generate`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..training.data import Example, encode_prompts, load_examples, read_conversation, read_lines, resolve_template
from .answers import NOTHING, STRICT, extract

# Longer than any example: none is left out of an evaluation.
_NO_LIMIT = 1 << 30
_SVAMP = ("Body", "Question", "Answer")


@dataclass(frozen=True)
class Problem:
    """One problem.

    name: "file:line". prompt: its token ids. messages: the prompt's.
    answer: the reference: a number as text, or all that has to be written.
    steps: lines of the reference's reasoning; 0 where the file has none.
    example: where the whole answer has to be right, its tokens and which of them the model produces.
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    steps: int
    prompt: tuple[int, ...] = ()
    example: Example | None = None

    @property
    def expected(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Tokens of the whole answer with its end of text, and which of them the model has to produce."""
        assert self.example is not None
        cut = self.example.segments[0][1]
        return self.example.tokens[cut:], self.example.loss_mask[cut:]

    @property
    def given(self) -> tuple[int | None, ...]:
        """Per token of the whole answer, what the environment writes there, or None; empty where it writes nothing."""
        if self.example is None:
            return ()
        tokens, mask = self.expected
        return () if all(mask) else tuple(None if m else t for t, m in zip(tokens, mask, strict=True))


@dataclass(frozen=True)
class ProblemSet:
    """A file's problems.

    name: the file's, without its suffix. kind: what has to be right, the "number" or all of the text ("exact").
    digest: SHA-256 of the file, in hexadecimal.
    """

    name: str
    path: Path
    kind: Literal["number", "exact"]
    problems: tuple[Problem, ...]
    digest: str


def read_problems(path: str | os.PathLike[str]) -> ProblemSet:
    """A file's problems, not yet encoded.

    Raises OSError, and ValueError naming the file and the line, for a file that is none of the above or that has
    numbers in some answers only.
    """
    path = Path(path)
    content = path.read_bytes()
    names, messages, texts, numbers = [], [], [], []
    for line, values in _records(path, content):
        name = f"{path}:{line}"
        number = _number(name, values)
        if number is not None:
            values = _svamp(values) | {"answer": number}
        asked, text = read_conversation(name, values)
        names.append(f"{path.name}:{line}")
        messages.append(tuple(asked))
        texts.append(text)
        numbers.append(number)
    if not names:
        raise ValueError(f"{path} holds no problems")
    behind = iter(extract([text for text, number in zip(texts, numbers, strict=True) if number is None], STRICT))
    references = [next(behind) if number is None else number for number in numbers]
    without = [name for name, reference in zip(names, references, strict=True) if reference == NOTHING]
    if without and len(without) < len(names):
        raise ValueError(
            f"{path}: {len(without)} of {len(names)} answers have no number behind ####, such as {without[0]}: "
            "all answers of a file must have one, or none"
        )
    kind: Literal["number", "exact"] = "exact" if without else "number"
    problems = []
    for name, prompt, text, number, reference in zip(names, messages, texts, numbers, references, strict=True):
        lines = sum(bool(part.strip()) for part in text.split("\n"))
        steps = lines if kind == "exact" else 0 if number is not None else lines - 1
        problems.append(Problem(name, prompt, text if kind == "exact" else reference, steps))
    return ProblemSet(path.stem, path, kind, tuple(problems), hashlib.sha256(content).hexdigest())


def encode_problems(found: ProblemSet, tokenizer: Any, *, template: str = "auto") -> ProblemSet:
    """The same with prompts, and for "exact" ones with answers, as tokens. Raises ValueError as `load_examples`."""
    if found.kind == "exact":
        examples = load_examples([found.path], tokenizer, template=template, max_length=_NO_LIMIT).examples
        encoded = [
            replace(p, prompt=example.tokens[: example.segments[0][1]], example=example)
            for p, example in zip(found.problems, examples, strict=True)
        ]
    else:
        prompts = encode_prompts(found.problems, tokenizer, resolve_template(template, tokenizer))
        encoded = [replace(p, prompt=tuple(prompt)) for p, prompt in zip(found.problems, prompts, strict=True)]
    return replace(found, problems=tuple(encoded))


def _records(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object: of the lines of a JSONL file, or of a JSON list."""
    if content.lstrip()[:1] != b"[":
        yield from read_lines(path, content)
        return
    try:
        listed = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from None
    for number, values in enumerate(listed, 1):
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, not {type(values).__name__}")
        yield number, values


def _number(name: str, values: Mapping[str, Any]) -> str | None:
    """An answer that is a number, written out; None where it is a text (or missing, which others tell)."""
    value = values.get("Answer" if all(key in values for key in _SVAMP) else "answer")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not np.isfinite(value):
        raise ValueError(f"{name} has the answer {value}, but it must be a number")
    return str(value) if isinstance(value, int) else np.format_float_positional(value, trim="-")


def _svamp(values: Mapping[str, Any]) -> dict[str, Any]:
    if not all(key in values for key in _SVAMP):
        return dict(values)
    return {"question": f"{str(values['Body']).strip()} {str(values['Question']).strip()}"}


def check_prompts(sets: Sequence[ProblemSet], others: Sequence[ProblemSet], name: str) -> None:
    """ValueError unless both are the same tokens: systems are paired on the same prompts. name: of the other model."""
    for ours, theirs in zip(sets, others, strict=True):
        for a, b in zip(ours.problems, theirs.problems, strict=True):
            if (a.prompt, a.example) != (b.prompt, b.example):
                raise ValueError(
                    f"{name} has another tokenizer or chat template ({a.name} becomes other tokens), so it cannot be "
                    "paired here: evaluate it by itself, with --template"
                )


__all__ = ["Problem", "ProblemSet", "check_prompts", "encode_problems", "read_problems"]
