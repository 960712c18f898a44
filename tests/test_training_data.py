"""training/data.py: what a line becomes, what is refused, and the order of batches."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottlenecked.config import BoundaryConfig
from bottlenecked.training import data
from bottlenecked.training.data import Dataset, Example, batches, load_examples, num_batches

from . import tiny
from .test_cli import backbone, fails, run  # noqa: F401 -- backbone is a fixture

EOS = tiny.EOS
# Of tiny's words those in NEWLINES end with a newline: a vocabulary in which newlines merge with other characters.
NL = tiny.NEWLINES[0]


def tokenizer(**options: Any) -> Any:
    made = tiny.tokenizer()
    made.eos_token = f"w{EOS}"
    for name, value in options.items():
        setattr(made, name, value)
    return made


def words(*ids: int) -> str:
    return " ".join(f"w{i}\n" if i in tiny.NEWLINES else f"w{i}" for i in ids)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def qa(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


GOOD = qa(words(1, 2), words(4, NL, 5, 6))


def load(path: Path, **options: Any) -> Dataset:
    return load_examples(
        [path], options.pop("tokenizer", None) or tokenizer(), **{"template": "{question}", "max_length": 64} | options
    )


# --- lines ------------------------------------------------------------------------------------------------------


def test_a_line_becomes_tokens_steps_and_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "\n", qa(words(8), words(NL, NL)))
    first, second = load(path).examples
    assert first == Example(
        tokens=(1, 2, 4, NL, 5, 6, EOS),
        segments=((0, 2), (2, 4), (4, 7)),
        loss_mask=(False, False, True, True, True, True, True),
        name=f"{path}:1",
    )
    assert first.num_steps == 2
    # Blank lines count; an answer that ends with a newline has the end of text as a step of its own.
    assert second.name == f"{path}:3"
    assert second.segments == ((0, 1), (1, 2), (2, 3), (3, 4))


@settings(deadline=None, print_blob=True)
@given(
    prompt=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    answer=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    least=st.integers(1, 4),
)
def test_steps_are_lines(tmp_path_factory: pytest.TempPathFactory, prompt: Any, answer: Any, least: int) -> None:
    """Against a model that looks at the whole text."""
    path = write(tmp_path_factory.mktemp("data") / "data.jsonl", qa(words(*prompt), words(*answer)), GOOD)
    boundary = BoundaryConfig(token_ids=tiny.NEWLINES, min_step_length=least)
    (example, _) = load(path, boundary=boundary).examples
    steps: list[list[int]] = [[]]
    for token in [*answer, EOS]:
        steps[-1].append(token)
        if token in tiny.NEWLINES and len(steps[-1]) >= least:
            steps.append([])
    assert [list(example.tokens[a:b]) for a, b in example.segments] == [prompt, *filter(None, steps)]
    assert list(example.loss_mask) == [False] * len(prompt) + [True] * (len(answer) + 1)


def test_timing_pre_gives_the_newline_to_the_next_step(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD)
    assert load(path, boundary=BoundaryConfig(timing="pre")).examples[0].segments == ((0, 2), (2, 3), (3, 7))


def test_messages_and_the_chat_template(tmp_path: Path) -> None:
    chat = tokenizer(chat_template="{% for m in messages %}{{ m.content + ' ' }}{% endfor %}w9")
    talk = [("system", words(1)), ("user", words(2)), ("assistant", words(NL)), ("user", words(4))]
    messages = [{"role": role, "content": text} for role, text in [*talk, ("assistant", words(5, NL, 6))]]
    path = write(tmp_path / "data.jsonl", {"messages": messages}, GOOD)
    for template in ("chat", "auto"):
        first, second = load(path, tokenizer=chat, template=template).examples
        # Everything before the last answer is the prompt, newlines and all.
        assert first.tokens == (1, 2, NL, 4, 9, 5, NL, 6, EOS)
        assert first.segments == ((0, 5), (5, 7), (7, 9))
        assert second.tokens == (1, 2, 9, 4, NL, 5, 6, EOS)
    with pytest.raises(ValueError, match=r"data.jsonl:1 is a longer conversation"):
        load(path, tokenizer=chat)
    refusing = tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"data.jsonl:1 does not fit the chat template: no system role"):
        load(path, tokenizer=refusing, template="chat")
    plain = write(tmp_path / "plain.jsonl", {"messages": messages[-2:]})
    assert load(plain, template="w7 {question} w8").examples[0].tokens == (7, 4, 8, 5, NL, 6, EOS)


def test_calculator_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", qa("w1", "w4 <<1+2=3>>w3\n w5 << w6\n#### w7"))
    (example,) = load(path, keep_marks=False, tokenizer=characters()).examples
    assert characters().decode(example.tokens[2:-1]) == "w4 w3\n w5 << w6\n#### w7"
    (example,) = load(path, keep_marks=True, tokenizer=characters()).examples
    assert "<<1+2=3>>" in characters().decode(example.tokens)


def characters() -> Any:
    """One token per character; ids are code points."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=chr(0))


def test_forced_ranges(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", qa("q", "ab\ncd\n", forced=[[0, 1], [3, 5], [6, 7]]))
    (example,) = load(path, tokenizer=characters()).examples
    assert example.loss_mask == (False, False, True, True, False, False, True, False)
    # Only the middle of a word: a token that the model and the environment would have to write together.
    path = write(tmp_path / "data.jsonl", qa("w1", words(11, NL, 4), forced=[[0, 1]]))
    with pytest.raises(ValueError, match=r"data.jsonl:1 .*cut the token 'w11' at character 0 in two"):
        load(path)
    path = write(tmp_path / "data.jsonl", qa("w1", words(11, NL, 4), forced=[[0, 3]]))
    assert load(path).examples[0].loss_mask == (False, False, True, True, True)


def test_long_examples_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, qa(words(1), words(*[5] * 9)), GOOD)
    dataset = load(path, max_length=7)
    assert [e.name for e in dataset.examples] == [f"{path}:1", f"{path}:3"]
    assert dataset.dropped == {"longer than 7 tokens": 1}
    with pytest.raises(ValueError, match=r"every example of .*data.jsonl is longer than 6 tokens: raise max_length"):
        load(path, max_length=6)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([GOOD, '{"question": \n'], r"data.jsonl:2 is not JSON: Expecting value"),
        (["[" * 100_000 + "\n"], r"data.jsonl:1 is not JSON"),
        ([GOOD, [1]], r"data.jsonl:2 must be a JSON object, not list"),
        ([{"question": "w1"}], r'data.jsonl:1 has no text "answer": a line needs'),
        ([{"answer": "w1"}], r'data.jsonl:1 has no text "question"'),
        ([qa("w1", 3)], r'data.jsonl:1 has no text "answer"'),  # type: ignore[arg-type]
        ([GOOD, qa("w1", " \n")], r"data.jsonl:2 has an empty answer: remove the line"),
        ([qa("w1", "<<1+1=2>>\n")], r"data.jsonl:1 has an empty answer"),
        ([qa(" ", "w1")], r"data.jsonl:1 has an empty question"),
        ([qa("w1", "\ud800")], r"data.jsonl:1 holds half of a surrogate pair"),
        ([{"messages": "w1"}], r'data.jsonl:1 must have "messages" that are a list'),
        ([{"messages": [{"role": "user", "content": None}]}], r'data.jsonl:1 must have "messages" that are a list'),
        ([{"messages": [{"role": "user", "content": "w1"}] * 2}], r"data.jsonl:1 must have .*the role \"assistant\""),
        ([{"messages": [{"role": "assistant", "content": "w1"}]}], r"data.jsonl:1 must have two or more"),
        ([GOOD | {"forced": 3}], r'data.jsonl:1 has "forced" 3, but'),
        ([GOOD | {"forced": [[2, 2]]}], r'data.jsonl:1 has "forced" \[2, 2\], but'),
        ([GOOD | {"forced": [[0, 2], [1, 3]]}], r'data.jsonl:1 has "forced" \[1, 3\], but'),
        ([GOOD | {"forced": [[0, 999]]}], r"data.jsonl:1 .*up to 999, but the answer ends at 12"),
        ([qa("w1", "<<1=1>>w3\n", forced=[[0, 1]])], r"data.jsonl:1 has calculator marks and"),
        ([GOOD | {"source": 4}], r'data.jsonl:1 has the "source" 4'),
        ([qa("w1", "w2"), qa("w3\n", "w4")], r"no answer in .*data.jsonl holds a newline.*one step of reasoning per"),
        (["\n"], r"data.jsonl holds no examples"),
    ],
)
def test_refused_lines(tmp_path: Path, lines: list[Any], match: str) -> None:
    path = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(ValueError, match=match):
        load(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_refused_bytes_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + json.dumps(GOOD).encode()[:-2] + b"\xff")
    with pytest.raises(ValueError, match=r"data.jsonl:2 is not UTF-8 text"):
        load(path)
    write(path, GOOD)
    for options, match in (
        ({"template": "chat"}, "has no chat template"),
        ({"template": "Q: "}, "template is 'Q: ', but it must be"),
        ({"max_length": 1}, "max_length is 1"),
        ({"tokenizer": tiny.tokenizer()}, "no end-of-text token: set tokenizer.eos_token"),
    ):
        with pytest.raises(ValueError, match=match):
            load(path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no data files"):
        load_examples([], tokenizer(), template="auto", max_length=9)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


# --- the cache --------------------------------------------------------------------------------------------------


def test_the_cache_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "data.jsonl", GOOD, qa(words(8), words(*[7] * 9))), tmp_path / "deep" / "cache"
    made = load(path, cache_dir=cache, max_length=9)
    (file,) = cache.iterdir()
    assert file.name == f"{made.digest}.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(data, "_records", None)  # nothing is tokenized again
        kept = load(path, cache_dir=cache, max_length=9)
    assert list(kept.examples) == list(made.examples) == list(load(path, max_length=9).examples)
    assert (kept.dropped, kept.digest, kept.sources) == (made.dropped, made.digest, made.sources)
    # A damaged file is made again, and an unfinished one is never taken for it.
    file.write_bytes(file.read_bytes()[:-3])
    assert list(load(path, cache_dir=cache, max_length=9).examples) == list(made.examples)
    monkeypatch.setattr(data.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        load(path, cache_dir=cache, max_length=8)
    assert list(cache.iterdir()) == [file]


def test_the_digest_knows_what_matters(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, qa("w1", words(NL)))
    wanted = load(path).digest
    used = tokenizer()
    used([words(1), words(1, 2)], padding=True, truncation=True, max_length=2)
    assert load(path, tokenizer=used).digest == wanted
    assert load(write(tmp_path / "copy.jsonl", path.read_text())).digest == wanted
    changes: list[dict[str, Any]] = [
        {"max_length": 63},
        {"template": "w1 {question}"},
        {"keep_marks": True},
        {"boundary": BoundaryConfig(min_step_length=2)},
        {"boundary": BoundaryConfig(timing="pre")},
        {"boundary": BoundaryConfig(token_ids=tiny.NEWLINES[:2])},
        {"tokenizer": tokenizer(eos_token="w1")},
        {"tokenizer": characters()},
    ]
    digests = [load(path, **change).digest for change in changes]
    digests.append(load(write(tmp_path / "data.jsonl", GOOD)).digest)
    assert len({wanted, *digests}) == len(digests) + 1


# --- batches ----------------------------------------------------------------------------------------------------


def made_of(*shapes: tuple[int, int], sources: tuple[str, ...] = ()) -> Dataset:
    """Examples of (tokens, steps); the first token is the example's number."""
    examples = [
        Example((i, *[0] * (length - 1)), tuple((n, n + 1) for n in range(steps + 1)), (True,) * length, str(i))
        for i, (length, steps) in enumerate(shapes)
    ]
    return Dataset(examples, sources=sources)


SHAPES = st.lists(st.tuples(st.integers(9, 60), st.integers(1, 8)), min_size=8, max_size=120)


@settings(deadline=None, print_blob=True)
@given(shapes=SHAPES, size=st.integers(1, 4), seed=st.integers(0, 99), bucket=st.integers(1, 5), data=st.data())
def test_batches(shapes: Any, size: int, seed: int, bucket: int, data: Any) -> None:
    dataset = made_of(*shapes)

    def rows(**options: Any) -> list[list[int]]:
        settings = {"batch_size": size, "seed": seed, "epoch": 0, "bucket": bucket} | options
        return [[e.tokens[0] for e in batch] for batch in batches(dataset, **settings)]

    whole = rows()
    assert len(whole) == num_batches(dataset, batch_size=size) == len(shapes) // size
    assert all(len(batch) == size for batch in whole)
    assert max(Counter(i for batch in whole for i in batch).values()) == 1
    # Resuming, and sharing the work.
    start = data.draw(st.integers(0, len(whole)))
    assert rows(start=start) == whole[start:]
    joint = rows(batch_size=2 * size)
    ranks = [rows(rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in joint]


@settings(deadline=None, print_blob=True)
@given(counts=st.lists(st.integers(1, 8), min_size=64, max_size=64), seed=st.integers(0, 99), bucket=st.integers(1, 4))
def test_no_batch_of_one_step_count(counts: list[int], seed: int, bucket: int) -> None:
    """Where the length decides the number of steps, sorting by length alone would make nothing else."""
    dataset = made_of(*((10 * n, n) for n in counts))
    rest = len(counts) - max(Counter(counts).values())
    for batch in batches(dataset, batch_size=4, seed=seed, epoch=0, bucket=bucket):
        assert rest < 16 or len({e.num_steps for e in batch}) > 1


def test_batches_are_shuffled_and_of_similar_lengths() -> None:
    dataset = made_of(*((10 + i % 100, 1 + i % 3) for i in range(1600)))

    def lengths(**options: Any) -> list[list[int]]:
        settings = {"batch_size": 8, "seed": 1, "epoch": 0} | options
        return [[len(e.tokens) for e in batch] for batch in batches(dataset, **settings)]

    def padding(rows: list[list[int]]) -> float:
        return 1 - sum(map(sum, rows)) / sum(len(row) * max(row) for row in rows)

    assert lengths() == lengths() != lengths(epoch=1) != lengths(seed=2)
    assert padding(lengths()) < 0.12 < 0.3 < padding(lengths(bucket=200))
    # Neither short nor long ones first.
    means = [sum(row) / len(row) for row in lengths()]
    assert abs(sum(means[:100]) - sum(means[100:])) < 1500


def test_wrong_batches() -> None:
    dataset = made_of(*[(9, 2)] * 10)
    for options, match in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 0}, "world_size 0"),
        ({"batch_size": 11}, "needs more than the 10 examples"),
        ({"batch_size": 6, "world_size": 2}, "one batch of 6 on 2 devices"),
        ({"rank": 1}, "rank is 1, but it must be from 0 to 0"),
        ({"start": 6}, "start is 6"),
        ({"bucket": 0}, "bucket 0"),
    ):
        with pytest.raises(ValueError, match=match):
            next(batches(dataset, **{"batch_size": 2, "seed": 0, "epoch": 0} | options))


def test_a_part_is_told_by_its_examples(tmp_path: Path) -> None:
    lines = [qa(words(i), words(4, NL)) for i in (5, 6, 8)]
    for name in ("data", "moved"):
        (tmp_path / name).mkdir()
    packed = load(write(tmp_path / "data" / "data.jsonl", *lines))
    whole = Dataset(list(packed.examples))
    count, number = whole.part.split(", ")
    assert (count, len(number)) == ("3", 16)
    assert packed.part == load(write(tmp_path / "moved" / "data.jsonl", *lines)).part == whole.part
    parts = [Dataset(packed.examples[a:b]).part for a, b in ((0, 1), (1, 2), (0, 2), (1, 3))]
    assert parts == [Dataset(whole.examples[a:b]).part for a, b in ((0, 1), (1, 2), (0, 2), (1, 3))]
    assert len({whole.part, Dataset(whole.examples[::-1]).part, *parts}) == 6


def test_split_keeps_copies_together(tmp_path: Path) -> None:
    dataset = made_of(*[(9, 2)] * 40, sources=tuple(str(i % 10) for i in range(40)))
    train, held = dataset.split(7, seed=3)
    assert (len(train.examples), len(held.examples)) == (32, 8)
    assert not set(train.sources) & set(held.sources)
    assert {e.tokens[0] for e in (*train.examples, *held.examples)} == set(range(40))
    assert [e.name for e in dataset.split(7, seed=3)[1].examples] == [e.name for e in held.examples]
    assert [e.name for e in dataset.split(7, seed=4)[1].examples] != [e.name for e in held.examples]
    for count in (0, 37):
        with pytest.raises(ValueError, match=f"held_back is {count}"):
            dataset.split(count)
    # As loaded: a copy names the line it was made from.
    copies = [qa(words(i), words(4, NL), source="data.jsonl:1") for i in (8, 9)]
    loaded = load(write(tmp_path / "data.jsonl", GOOD, copies[0], qa(words(5), words(4, NL)), copies[1]))
    for seed in range(8):
        assert sorted(map(len, (p.examples for p in loaded.split(1, seed=seed)))) == [1, 3]


def prompts(dataset: Dataset) -> set[tuple[int, ...]]:
    return {e.tokens[: e.segments[0][1]] for e in dataset.examples}


def test_split_keeps_solutions_of_one_question_together(tmp_path: Path) -> None:
    solutions = [qa(words(8 + i % 10), words(4, NL, 5 + i // 10)) for i in range(40)]
    solutions[0]["source"] = solutions[11]["source"] = "one problem, asked in two ways"
    loaded = load(write(tmp_path / "data.jsonl", *solutions))
    for dataset in (loaded, Dataset(list(loaded.examples), sources=loaded.sources)):
        alike = [dataset.split(7, seed=seed) for seed in range(8)]
        for train, held in alike:
            assert len(held.examples) in (8, 12)
            assert not prompts(train) & prompts(held)
            assert len(prompts(held) & {(8,), (9,)}) != 1
        assert {len(held.examples) for _, held in alike} == {8, 12}
    # Without sources too; and where no prompt stands twice, the split is what sources alone make it.
    assert [len(part.examples) for part in Dataset(list(loaded.examples)).split(7)[::-1]] == [8, 32]
    sources = tuple(str(i % 10) for i in range(40))
    _, held = made_of(*[(9, 2)] * 40, sources=sources).split(7, seed=3)
    order = np.random.default_rng([3, 0]).permutation(10)[:2].tolist()
    assert [e.tokens[0] for e in held.examples] == [i for i in range(40) if i % 10 in order]
    # One that does changes nothing else.
    once = made_of(*[(9, 2)] * 40)
    held = {int(e.name) for e in once.split(7)[1].examples}
    other = min(set(range(40)) - held)
    examples = list(once.examples)
    examples[other] = replace(examples[other], tokens=examples[min(held)].tokens)
    found = {int(e.name) for e in Dataset(examples).split(7)[1].examples}
    assert other in found
    assert len(found) == 7
    assert len(found - held) == 1


@settings(deadline=None, print_blob=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=40), st.integers(0, 9))
def test_a_split_shares_neither_source_nor_prompt(pairs: list[tuple[int, int]], seed: int) -> None:
    """However many steps of one source or one prompt it takes from one example to another."""
    examples = [Example((prompt, 0), ((0, 1), (1, 2)), (False, True), str(i)) for i, (prompt, _) in enumerate(pairs)]
    try:
        train, held = Dataset(examples, sources=tuple(str(source) for _, source in pairs)).split(1, seed=seed)
    except ValueError:  # all of them are one problem
        held = Dataset(examples)
    else:
        assert not prompts(train) & prompts(held)
        assert not set(train.sources) & set(held.sources)
    # No more than is needed: what is held back hangs together.
    rows = [pairs[int(e.name)] for e in held.examples]
    reached = rows[:1]
    while found := [a for a in rows if a not in reached and any(a[0] == b[0] or a[1] == b[1] for b in reached)]:
        reached += found
    assert set(reached) == set(rows)


def test_what_is_held_back_is_taken_out(tmp_path: Path) -> None:
    held = load(write(tmp_path / "data.jsonl", qa(words(8), words(4, NL)), qa(words(9), words(4, NL))))
    early = load(
        write(
            tmp_path / "early.jsonl",
            qa(words(1), words(4, NL, *[5] * 70)),
            qa(words(8), words(6, NL)),
            qa(words(8, 8), words(6, NL)),
            qa(words(1), words(6, NL), source="data.jsonl:2"),
            qa(words(2), words(6, NL), source="data.jsonl:3"),
        )
    )
    for dataset in (early, Dataset(list(early.examples), early.dropped, early.digest, early.sources)):
        left = dataset.without(held)
        assert [e.name for e in left.examples] == [f"{tmp_path / 'early.jsonl'}:{i}" for i in (3, 5)]
        assert left.dropped == {"longer than 64 tokens": 1, "of a problem that is held back": 2}
        assert left.sources == ("early.jsonl:3", "data.jsonl:3")
    # Nothing to take out; of examples without sources the prompt alone tells.
    assert left.without(held) is left
    assert len(Dataset(list(early.examples)).without(held).examples) == 3
    with pytest.raises(ValueError, match="all 2 examples are of problems that are held back"):
        held.without(held)


def test_what_leads_to_a_problem_that_is_held_back_is_taken_out_too(tmp_path: Path) -> None:
    """A copy names the line of the curriculum it was made from, and that line's prompt stands in the training data."""
    held = load(write(tmp_path / "train.jsonl", qa(words(8), words(4, NL))))
    early = write(tmp_path / "early.jsonl", *(qa(words(i), words(4, NL)) for i in (1, 8, 2)))
    copies = write(
        tmp_path / "early.copies.jsonl",
        *(qa(words(i), words(4, NL), source=f"early.jsonl:{line}") for i, line in ((5, 1), (6, 2), (9, 2), (1, 3))),
    )
    loaded = load_examples([early, copies], tokenizer(), template="{question}", max_length=64)
    for dataset in (loaded, Dataset(list(loaded.examples), sources=loaded.sources)):
        left = dataset.without(held)
        assert [Path(e.name).name for e in left.examples] == [
            "early.jsonl:1",
            "early.jsonl:3",
            "early.copies.jsonl:1",
            "early.copies.jsonl:4",
        ]
        assert left.dropped == {"of a problem that is held back": 3}


def test_lines_of_files_of_one_name_are_not_one_problem(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "early").mkdir()
    full, early = (
        write(tmp_path / name / "train.jsonl", *(qa(words(i), words(4, NL)) for i in prompts))
        for name, prompts in (("full", (8, 9, 10)), ("early", (1, 2, 10)))
    )
    copy = qa(words(5), words(4, NL), source="train.jsonl:2")
    copies = write(tmp_path / "copies.jsonl", copy, copy | {"question": words(6), "source": "train.jsonl:7"})

    def names(dataset: Dataset) -> list[str]:
        return [str(Path(e.name).relative_to(tmp_path)) for e in dataset.examples]

    def of(*files: Path) -> list[Dataset]:
        packed = load_examples(files, tokenizer(), template="{question}", max_length=64)
        return [packed, Dataset(list(packed.examples), sources=packed.sources)]

    for held in of(full):
        for curriculum in of(early):  # the third has the prompt, too
            assert names(curriculum.without(held)) == ["early/train.jsonl:1", "early/train.jsonl:2"]
        for curriculum in of(copies):  # whose source is said to be a line of that name
            assert names(curriculum.without(held)) == ["copies.jsonl:2"]
    for held in of(copies):
        for curriculum in of(early):
            assert names(curriculum.without(held)) == ["early/train.jsonl:1", "early/train.jsonl:3"]
    for both in of(full, early):
        assert {len(both.split(1, seed=seed)[1].examples) for seed in range(20)} == {1, 2}
        assert {name for seed in range(20) for name in names(both.split(1, seed=seed)[1])} == set(names(both))


# --- prepare ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ending(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny backbone with an end-of-text token."""
    path = tmp_path_factory.mktemp("ending")
    for file in backbone.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer().save_pretrained(path)
    return path


def test_prepare(capsys: pytest.CaptureFixture[str], ending: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, qa(words(8), words(*[7] * 9)), qa(words(8), words(NL, NL)))
    options = (path, "--backbone", ending, "--output", tmp_path / "cache", "--template", "{question}")
    status, out, err = run(capsys, "prepare", *options, "--max-length", 9, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    dataset = load(path, max_length=9)
    assert found == {
        "examples": 2,
        "dropped": {"longer than 9 tokens": 1},
        "tokens": 11,
        "learned_tokens": 8,
        "length": [4, 4, 4, 7],
        "steps": [2, 2, 2, 3],
        "step_counts": {"2": 1, "3": 1},
        "step_length": [1, 1, 2, 3],
        "steps_longer_than_96": 0.0,
        "digest": dataset.digest,
    }
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [f"{dataset.digest}.safetensors"]
    status, out, err = run(capsys, "prepare", *options, "--max-length", 9)
    assert (status, err) == (0, "")
    assert "dropped, longer than 9 tokens  1\n" in out
    assert f"{path}:1, by steps:\n  'w1w2'\n  'w4w{NL}\\n'\n" in out
    # On a command line, \n is a newline.
    dataset = load(path, max_length=9, template="w1\n{question}")
    out = run(capsys, "prepare", *options[:-1], r"w1\n{question}", "--max-length", 9, "--json")[1]
    assert json.loads(out)["digest"] == dataset.digest


def test_prepare_refuses(capsys: pytest.CaptureFixture[str], ending: Path, backbone: Path, tmp_path: Path) -> None:  # noqa: F811
    path = write(tmp_path / "data.jsonl", GOOD, "{\n")
    fails(capsys, 1, "data.jsonl:2 is not JSON", "prepare", path, "--backbone", ending)
    fails(capsys, 1, "none: No such file", "prepare", tmp_path / "none", "--backbone", ending)
    fails(capsys, 1, "nowhere does not exist", "prepare", path, "--backbone", "nowhere")
    fails(capsys, 1, "no end-of-text token", "prepare", path, "--backbone", backbone)
    fails(capsys, 2, "--backbone", "prepare", path)
    fails(capsys, 2, "[Mm]issing argument", "prepare", "--backbone", ending)


@pytest.mark.smollm2
def test_smollm2_prompts_are_those_of_generate(tmp_path: Path, smollm2: Any) -> None:
    from bottlenecked.cli import _encode

    path = write(tmp_path / "data.jsonl", qa("How many?", "One.\nTwo.\n\n#### 2"))
    for template, raw in (("chat", False), ("{question}", True)):
        (example,) = load(path, tokenizer=smollm2[1], template=template).examples
        begin, end = example.segments[0]
        assert (
            list(example.tokens[begin:end])
            == _encode(smollm2[1], "How many?", raw=raw, template="auto", system=None)["input_ids"][0].tolist()
        )
        steps = [smollm2[1].decode(example.tokens[a:b]) for a, b in example.segments[1:]]
        assert "".join(steps) == "One.\nTwo.\n\n#### 2<|im_end|>"
        assert len(steps) == 4
