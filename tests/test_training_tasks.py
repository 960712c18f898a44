"""training/tasks.py: problems that are right, tokens that are forced, and what is scored."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bottlenecked import backbones
from bottlenecked.integrations.transformers import attach
from bottlenecked.training.data import Dataset, load_examples, write_lines
from bottlenecked.training.tasks import (
    ChainTask,
    RegisterTask,
    decode,
    exact_match,
    synthesize,
    task_tokenizer,
    tiny_backbone,
)

from . import tiny
from .test_cli import fails, run

TASKS: dict[str, Any] = {
    "chain": ChainTask(),
    "chain, warm-up": ChainTask().warm_up(),
    "long chain": ChainTask(steps=(9, 9), modulus=10, names=26, leaves=1, indirect=0.5, distractors=6),
    "registers": RegisterTask(),
    "registers, look-ups": RegisterTask().look_ups(),
    "registers, warm-up": RegisterTask().warm_up(),
    "four registers": RegisterTask(registers=4, classes=3, repeat=0.5, facts=10, steps=(8, 12)),
    "one register": RegisterTask(registers=1, facts=2, names=2, classes=1, advance=1.0, query=0.0),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return task_tokenizer()


def loaded(task: Any, path: Path, tokenizer: Any, count: int = 20, seed: int = 0) -> tuple[list[Any], Dataset]:
    records = list(synthesize(task, count, seed=seed))
    write_lines(records, path / "task.jsonl")
    return records, load_examples([path / "task.jsonl"], tokenizer, template="auto", max_length=200)


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_right_and_tokenized_by_symbol(name: str, tmp_path: Path, tokenizer: Any) -> None:
    task = TASKS[name]
    records, dataset = loaded(task, tmp_path, tokenizer)
    for record, example in zip(records, dataset.examples, strict=True):
        assert task.wrong_step(record["question"], record["answer"]) is None
        lines = record["answer"].splitlines()
        assert task.steps[0] <= len(lines) <= task.steps[1]
        assert example.num_steps == len(lines) + 1  # the end of text
        assert [b - a for a, b in example.segments[1:]] == [4] * len(lines) + [1]
        assert tokenizer.decode(example.tokens) == f"<s>{record['question']}\n{record['answer']}</s>"
        for probes in record["probes"].values():
            assert all(record[place][at] for place, at, _ in probes)
    assert len({json.dumps(r) for r in records}) > 10
    again = list(synthesize(task, 5, seed=0))
    assert again == records[:5] != list(synthesize(task, 5, seed=1))


@settings(deadline=None, print_blob=True, max_examples=200)
@given(name=st.sampled_from(sorted(TASKS)), seed=st.integers(0, 10**6), data=st.data())
def test_any_other_symbol_is_wrong(name: str, seed: int, data: Any) -> None:
    """Change one symbol that the model must produce: the checker finds the line, or an earlier one."""
    task = TASKS[name]
    (record,) = synthesize(task, 1, seed=seed)
    answer, forced = record["answer"], record.get("forced", [])
    free = [i for i in range(len(answer)) if not any(a <= i < b for a, b in forced)]
    at = data.draw(st.sampled_from(free))
    other = data.draw(st.sampled_from([c for c in "abcdefghijklmnopqrst0123456789;" if c != answer[at]]))
    changed = answer[:at] + other + answer[at + 1 :]
    wrong = task.wrong_step(record["question"], changed)
    assert wrong is not None
    assert wrong == answer[:at].count("\n")
    lines = answer.splitlines(keepends=True)
    assert task.wrong_step(record["question"], answer + "x00") == len(lines)
    if isinstance(task, ChainTask):
        assert task.wrong_step(record["question"], "".join(lines[:-1])) == len(lines) - 1


def test_a_chain_by_hand() -> None:
    task = ChainTask()
    assert task.solve("a4;gc5;mfa;fgx;x2;?m1") == "f45\ng20\nc55\n"
    assert task.wrong_step("a4;gc5;mfa;fgx;x2;?m1", "f45\ng20\nc56\n") == 2
    with pytest.raises(ValueError, match="is no question of the chain task: it ends with '\\?z1'"):
        task.solve("a4;?z1")


def test_registers_by_hand() -> None:
    task = RegisterTask()
    question = "cd;ea;ab;bf;dc;fe;"
    answer = "A=a1\nB=d0\nA>b1\n?cd\nB>c1\n"
    assert task.wrong_step(question, answer) is None
    for i, line in enumerate(("A=a0", "B=d1", "A>a1", "?ce", "B>c0")):
        lines = answer.splitlines()
        lines[i] = line
        assert task.wrong_step(question, "\n".join(lines) + "\n") == i
    assert task.wrong_step(question, "B>c0\n") == 0  # B holds nothing yet


def test_what_is_forced_and_what_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    records, dataset = loaded(RegisterTask(), tmp_path, tokenizer)
    ours = {"=": [3, 4], ">": [2, 3, 4], "?": [3, 4]}
    kinds: Counter[str] = Counter()
    for record, example in zip(records, dataset.examples, strict=True):
        for line, (begin, end) in zip(record["answer"].splitlines(), example.segments[1:], strict=False):
            kind = next(k for k in ours if k in line)
            kinds[kind] += 1
            assert [i for i in range(1, 5) if example.loss_mask[begin + i - 1]] == ours[kind]
            assert end - begin == 4
        assert not example.loss_mask[-1]  # when to end is the environment's to say
    assert all(kinds[k] > 10 for k in ours)
    assert all(all(e.loss_mask[e.segments[0][1] :]) for e in loaded(ChainTask(), tmp_path, tokenizer)[1].examples)


def test_shares_of_lines() -> None:
    def share(task: RegisterTask) -> dict[str, float]:
        text = "".join(r["answer"] for r in synthesize(task, 300))
        return {kind: text.count(kind) / text.count("\n") for kind in "=>?"}

    mix = share(RegisterTask(steps=(30, 30)))
    assert abs(mix["?"] - 0.2) < 0.02
    assert abs(mix[">"] - 0.43) < 0.03
    assert share(RegisterTask().look_ups())[">"] == 0
    # Most second lines of the warm-up advance what the first one set.
    seconds = Counter(r["answer"].split("\n")[1][1] for r in synthesize(RegisterTask().warm_up(), 300))
    assert seconds[">"] > 150
    assert all(p[0][2].isalpha() for r in synthesize(ChainTask().warm_up(), 50) for p in [chain_lines(r["question"])])


def chain_lines(question: str) -> list[str]:
    """The definitions that the question follows."""
    lines = {line[0]: line for line in question.split(";")[:-1] if len(line) == 3}
    name, found = question[-2], []
    while name in lines:
        found.append(lines[name])
        name = lines[name][1]
    return found


@pytest.mark.parametrize("name", ["chain", "registers"])
def test_probes_ask_for_name_and_value_of_what_is_looked_up(name: str) -> None:
    asked, subject = 0, {"chain": "an operand", "registers": "a fact"}[name]
    for record in synthesize(TASKS[name], 20):
        question = record["question"]
        starts = [0, *(i + 1 for i, c in enumerate(question) if c == ";")]
        probes = {what.removeprefix(f"{subject}: "): rows for what, rows in record["probes"].items()}
        assert list(probes) == [
            "name, from its value",
            "value, from its value",
            "name, from its end",
            "value, from its end",
        ]
        for rows in zip(*probes.values(), strict=True):
            end = rows[2][1]
            assert [at for _, at, _ in rows] == [end - 1, end - 1, end, end]
            assert [label for *_, label in rows] == [question[end - 2], question[end - 1]] * 2
            assert {place for place, *_ in rows} == {"question"}
            assert question[end] == ";"
            assert end - 2 in starts
            asked += 1
    assert asked == {"chain": 60, "registers": 120}[name]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ChainTask(steps=(3, 2)), "steps is 3:2"),
        (lambda: ChainTask(steps=(0, 2)), "steps is 0:2"),
        (lambda: ChainTask(modulus=11), "modulus is 11, but it must be from 2 to 10"),
        (lambda: ChainTask(indirect=1.5), "indirect is 1.5"),
        (lambda: ChainTask(leaves=0), "leaves is 0"),
        (lambda: ChainTask(steps=(1, 15)), "names is 20, but 22 are needed"),
        (lambda: RegisterTask(registers=9), "registers is 9"),
        (lambda: RegisterTask(facts=11), "facts is 11, but it must be from 2 to 10"),
        (lambda: RegisterTask(names=27), "names is 27"),
        (lambda: RegisterTask(classes=0), "classes is 0"),
        (lambda: RegisterTask(advance=0.9), "advance is 0.9 and query 0.2"),
        (lambda: synthesize(ChainTask(), 0), "count is 0"),
        (lambda: synthesize(ChainTask(), 1, seed=-1), "seed -1"),
        (lambda: tiny_backbone(head_dim=16), "head_dim is 16, but it must be from 32"),
        (lambda: tiny_backbone(heads=3), "heads is 3"),
        (lambda: tiny_backbone(layers=0), "layers is 0"),
    ],
)
def test_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def plain(records: Any) -> list[Any]:
    """As JSON has them."""
    return [json.loads(json.dumps(record)) for record in records]


# --- the tiny backbone ------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Any) -> None:
    model, chain, registers = tmp_path / "tiny", tmp_path / "chain.jsonl", tmp_path / "registers.jsonl"
    status, out, err = run(capsys, "synthesize", "backbone", "--output", model, "--layers", 1, "--seed", 3)
    assert (status, err) == (0, "")
    loaded, read = backbones.load(model)
    made = tiny_backbone(layers=1, seed=3)
    assert out == f"wrote {model}: {made.num_parameters():,} parameters, untrained\n"
    for (name, a), (_, b) in zip(loaded.named_parameters(), made.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(made.lm_head.weight, tiny_backbone(layers=1, seed=4).lm_head.weight)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert backbones.tokenizer_newline_ids(model) == (tokenizer.convert_tokens_to_ids("\n"),)

    status, out, _ = run(capsys, "synthesize", "chain", "--output", chain, "--count", 3, "--steps", "2:4", "--seed", 5)
    assert status == 0
    records = [json.loads(line) for line in chain.read_text().splitlines()]
    assert records == plain(synthesize(ChainTask(steps=(2, 4)), 3, seed=5))
    assert out == f"wrote {chain}: 3 problems, such as\n{records[0]['question']}\n{records[0]['answer']}"
    options = ("--count", 2, "--steps", 6, "--registers", 4)
    assert run(capsys, "synthesize", "registers", "--output", registers, *options)[0] == 0
    records = [json.loads(line) for line in registers.read_text().splitlines()]
    assert records == plain(synthesize(RegisterTask(steps=(6, 6), registers=4), 2))
    for option, task in (("--warm-up", RegisterTask().warm_up()), ("--look-ups", RegisterTask().look_ups())):
        path = tmp_path / f"{option}.jsonl"
        assert run(capsys, "synthesize", "registers", "--output", path, "--count", 4, option)[0] == 0
        assert [json.loads(line) for line in path.read_text().splitlines()] == plain(synthesize(task, 4))

    new = tmp_path / "new"
    fails(capsys, 1, "chain.jsonl exists", "synthesize", "chain", "--output", chain)
    fails(capsys, 1, "tiny exists", "synthesize", "backbone", "--output", model)
    fails(capsys, 2, "'x' is not a number or least:most", "synthesize", "chain", "--output", new, "--steps", "x")
    fails(capsys, 1, "steps is 5:2", "synthesize", "chain", "--output", new, "--steps", "5:2")
    fails(capsys, 1, "count is 0", "synthesize", "chain", "--output", new, "--count", 0)
    both = ("--warm-up", "--look-ups")
    fails(capsys, 2, "one of --look-ups and --warm-up", "synthesize", "registers", "--output", new, *both)
    assert not new.exists()


def test_exact_match_is_of_what_the_model_writes(tmp_path: Path, tokenizer: Any) -> None:
    """A model that continues as one example does, whatever comes: right there, and wrong elsewhere."""
    model = tiny_backbone()
    for task in (ChainTask(steps=(1, 3)), RegisterTask(steps=(1, 3))):
        _, dataset = loaded(task, tmp_path, tokenizer, count=7)
        for right in (2, 5):
            told = recite(model, dataset.examples[right])
            assert exact_match(told, dataset.examples[right : right + 1]) == [True]
            assert exact_match(told, dataset.examples, batch_size=3)[right]
            assert not all(exact_match(told, dataset.examples, batch_size=3))
        spoiled = recite(model, dataset.examples[2], spoil=True)
        assert not exact_match(spoiled, dataset.examples)[2]


class Recital:
    """Stands for a model: generates an example's own tokens, but lets a logits processor overrule them."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self.generation_config, self.device, self.config = model.generation_config, model.device, model.config
        self.tokens = tokens

    def generate(self, ids: Any, *, max_new_tokens: int, logits_processor: Any, **_: Any) -> Any:
        for column in range(max_new_tokens):
            scores = torch.zeros(len(ids), self.config.vocab_size)
            scores[:, self.tokens[column] if column < len(self.tokens) else 0] = 1.0
            ids = torch.cat([ids, logits_processor(ids, scores).argmax(1, keepdim=True)], 1)
        return ids


def recite(model: Any, example: Any, spoil: bool = False) -> Recital:
    cut = example.segments[0][1]
    tokens = list(example.tokens[cut:])
    # What is forced comes from the environment: a reciter that has it wrong is right all the same.
    tokens = [t if m else 0 for t, m in zip(tokens, example.loss_mask[cut:], strict=True)]
    if spoil:
        tokens[[i for i, m in enumerate(example.loss_mask[cut:]) if m][-1]] += 1
    return Recital(model, tokens)


def test_exact_match_decodes_greedily(tmp_path: Path, tokenizer: Any) -> None:
    """Against token by token, without a cache, padding or a batch."""
    model = tiny_backbone(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    _, dataset = loaded(RegisterTask(steps=(2, 3)), tmp_path, tokenizer, count=6)
    wanted, answers = [], []
    for example in dataset.examples:
        cut = example.segments[0][1]
        tokens = list(example.tokens[:cut])
        for token, ours in zip(example.tokens[cut:], example.loss_mask[cut:], strict=True):
            with torch.no_grad():
                best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(best if ours else token)
        wanted.append(tuple(tokens) == example.tokens)
        answers.append(type(example)(tuple(tokens), example.segments, example.loss_mask, example.name))
    assert exact_match(model, dataset.examples) == wanted
    # What it writes itself is an exact match, unless it would end early.
    early = [tokenizer.eos_token_id in a.tokens[:-1] for a in answers]
    assert exact_match(model, answers, batch_size=4) == [not e for e in early]
    assert not all(early)


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize(
    "stated",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 15},
        {"min_length": 25},
        {"suppress_tokens": [16, 17]},
        {"bad_words_ids": [[16], [17]]},
        {"sequence_bias": [[[16], -100.0], [[17], -100.0]]},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"num_beams": 3, "num_return_sequences": 3},
        {"guidance_scale": 3.0},
        {"do_sample": True, "temperature": 9.0, "min_p": 0.01},
        {"prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["w1"], "max_time": 1e-9, "max_length": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_decoding_is_greedy_whatever_the_model_states(stated: dict[str, Any], rewritten: bool) -> None:
    """As where generation_config.json says nothing; it stays as it is."""
    model, end = tiny.model(), 49
    prompts = [row[mask.bool()].tolist() for row, mask in zip(*tiny.prompts((9, 4)), strict=True)]

    def decoded() -> list[list[int]]:
        with attach(model, tiny.processor()) if rewritten else contextlib.nullcontext():
            return decode(model, prompts, max_new_tokens=20, end_tokens=[end])

    expected = decoded()
    assert [len(row) for row in expected] == ([14, 2] if rewritten else [7, 13])
    model.generation_config.update(**stated)
    before = model.generation_config.to_dict()
    assert decoded() == expected
    assert model.generation_config.to_dict() == before
