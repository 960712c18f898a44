"""training/probe.py: what rows hold is found, what they lack is not, and chance is told from both."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bottlenecked.training import probe as module
from bottlenecked.training.data import Dataset, load_examples, write_lines
from bottlenecked.training.probe import Finding, conclusion, lacking, probe
from bottlenecked.training.tasks import RegisterTask, save_backbone, synthesize, task_tokenizer, tiny_backbone

from .test_cli import fails, run

# Probes of our own, at the newlines of lines that set or advance a register, beside the task's.
HELD, NEXT = "what the register holds", "what comes next"
FACT = [f"a fact: {what}, from its {place}" for place in ("value", "end") for what in ("name", "value")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return task_tokenizer()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "problems.jsonl"
    records = list(synthesize(RegisterTask(steps=(3, 6)), 150))
    for record in records:
        f = {fact[0]: fact[1] for fact in record["question"].split(";") if fact}
        text = record["answer"]
        ends = [i for i, c in enumerate(text) if c == "\n" and text[i - 3] in "=>"]
        record["probes"][HELD] = [("answer", i, text[i - 2]) for i in ends]
        record["probes"][NEXT] = [("answer", i, f[text[i - 2]]) for i in ends]
    write_lines(records, path)
    return path


class Holding:
    """Stands for a backbone of three layers: noise; the token two positions before; the same in the values only."""

    device = torch.device("cpu")
    config = SimpleNamespace(to_dict=dict)  # tells nothing of RoPE

    def __init__(self, noise: float = 0.1) -> None:
        self.noise = noise

    def __call__(self, ids: torch.Tensor, *, attention_mask: torch.Tensor, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(int(ids.sum()))
        known = torch.nn.functional.one_hot(ids.roll(2, 1), 64).float()
        layers = []
        for keys, values in ((0, 0), (1, 1), (0, 1)):
            halves = []
            for holds in (keys, values):
                rows = self.noise * torch.randn(*ids.shape, 64, generator=generator) + holds * known
                halves.append(rows.unflatten(2, (2, 32)).transpose(1, 2))
            layers.append(SimpleNamespace(keys=halves[0], values=halves[1]))
        return SimpleNamespace(past_key_values=SimpleNamespace(layers=layers))


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_what_rows_hold_is_found(problems: Path, tokenizer: Any) -> None:
    """Two positions before the end of a line stands the register's value; the next one it needs stands nowhere."""
    findings = found(probe(Holding(), tokenizer, [problems]))
    held, needed, fact = findings[HELD], findings[NEXT], findings[FACT[0]]
    assert [layer.share > 0.99 for layer in held.layers] == [False, True, True]
    assert held.verdict == "held"
    assert held.required
    assert held.layers[held.best].low <= held.layers[held.best].share <= held.layers[held.best].high
    assert held.low > 0.5
    assert needed.verdict == "not held"
    assert needed.low < 0.05
    assert fact.verdict == "not held"  # one position before, not two
    assert max(layer.share for layer in needed.layers) < 0.3
    assert 0.05 < needed.majority < 0.25
    assert abs(needed.shuffled - needed.majority) < 0.1
    assert (held.classes, held.covered) == (10, 1.0)
    # Where the value stands only in the values, the keys alone do not tell it.
    keys = found(probe(Holding(), tokenizer, [problems], part="keys"))[HELD]
    assert [layer.share > 0.9 for layer in keys.layers] == [False, True, False]


def test_noise_holds_nothing(problems: Path, tokenizer: Any) -> None:
    """The best of three layers is chosen on the rows that judge it; the shuffled labels are, too."""
    false, all_findings = 0, 0
    for seed in range(8):
        findings = probe(Holding(noise=1e6), tokenizer, [problems], seed=seed, max_examples=80)
        false += sum(finding.verdict != "not held" for finding in findings)
        all_findings += len(findings)
    assert all_findings > 50
    assert false / all_findings < 0.06


def test_an_example_is_judged_by_others() -> None:
    """Rows of one example are alike: told from their own kind, any label could be."""
    generator = np.random.default_rng(0)
    groups = np.arange(60).repeat(4)
    labels = generator.integers(0, 3, 60)[groups]
    rows = generator.standard_normal((60, 80))[groups] + 0.01 * generator.standard_normal((240, 80))
    finding = module._finding("x", rows[None].astype(np.float32), labels, groups, 1.0, False, 0)
    assert finding.layers[0].share < 0.55
    assert finding.verdict == "not held"


def test_the_same_seed_gives_the_same_findings(problems: Path, tokenizer: Any) -> None:
    first, again, other = (probe(Holding(1), tokenizer, [problems], seed=s, max_examples=60) for s in (1, 1, 2))
    assert first == again != other


def test_ridge_and_leave_one_out_against_their_definitions() -> None:
    generator = np.random.default_rng(5)
    n, features, classes = 60, 7, 3
    labels = generator.integers(0, classes, (2, n))
    x = generator.standard_normal((n, features)) + 1.2 * np.eye(features)[labels[0]]
    folds = np.arange(n) % 5
    wanted = np.zeros_like(labels)
    for k in range(5):
        train, test = folds != k, folds == k
        middle, scale = x[train].mean(0), x[train].std(0) + 1e-6
        a, b = (np.c_[(x[rows] - middle) / scale, np.ones(rows.sum())] for rows in (train, test))
        for i in range(2):
            y = np.eye(classes)[labels[i][train]]

            def solve(rows: Any, ridge: float, a: Any = a, y: Any = y) -> Any:
                lam = ridge * len(a)  # of the whole training part, also where one row is left out
                return np.linalg.solve(a[rows].T @ a[rows] + lam * np.eye(a.shape[1]), a[rows].T @ y[rows])

            def left_out(ridge: float, a: Any = a, own: Any = labels[i][train], solve: Any = solve) -> float:
                right = 0
                for row in range(len(a)):
                    others = np.arange(len(a)) != row
                    right += (a[row] @ solve(others, ridge)).argmax() == own[row]
                return right / len(a)

            ridge = max(module._RIDGES, key=left_out)  # the first of equals
            wanted[i, test] = (b @ solve(slice(None), ridge)).argmax(1)
    assert (module._cross_validated(x, labels, folds) == wanted).all()


def llama(rope_parameters: dict[str, Any]) -> Any:
    made = tiny_backbone()
    torch.manual_seed(0)
    config = type(made.config)(**{**made.config.to_dict(), "rope_parameters": rope_parameters})
    return type(made)(config).eval()


@pytest.mark.parametrize("rope", ["default", "llama3", "dynamic"])
def test_rows_are_those_of_the_cache(problems: Path, tokenizer: Any, rope: str) -> None:
    """Against one example at a time, without padding; keys as the projection made them, before RoPE."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = llama(parameters)
    dataset = load_examples([problems], tokenizer, max_length=100)
    examples = [dataset.examples[i] for i in range(20)]
    positions = [(i, len(e.tokens) - 1 - i % 3) for i, e in enumerate(examples)]
    rows = module._kv_rows(model, examples, positions, "both", module._inv_freq(model))
    assert rows.shape == (2, 20, 2 * 2 * 32)
    made: list[torch.Tensor] = []
    hooks = [layer.self_attn.k_proj.register_forward_hook(lambda *a: made.append(a[2])) for layer in model.model.layers]
    for i, (example, (_, token)) in enumerate(zip(examples, positions, strict=True)):
        made.clear()
        with torch.no_grad():
            cache = model(torch.tensor([example.tokens])).past_key_values
        for layer in range(2):
            # RoPE of a kind we do not know is left as it is.
            keys = cache.layers[layer].keys[0, :, token].flatten() if rope == "dynamic" else made[layer][0, token]
            alone = torch.cat([keys, cache.layers[layer].values[0, :, token].flatten()])
            torch.testing.assert_close(torch.from_numpy(rows[layer, i]), alone, rtol=1e-4, atol=1e-4)
    for hook in hooks:
        hook.remove()


def test_any_file(tokenizer: Any, tmp_path: Path) -> None:
    """Without probes of its own: the next step's first tokens, here told by the token two before the end of a step."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(120):
        letters = ["abcd"[i] for i in generator.integers(0, 4, 5)]
        answer = "".join(f"{other}{letter}z\n" for other, letter in zip("q" + "".join(letters), letters, strict=False))
        lines.append({"question": "q", "answer": answer})
    write_lines(lines, tmp_path / "lines.jsonl")
    findings = found(probe(Holding(), tokenizer, [tmp_path / "lines.jsonl"]))
    assert all(not finding.required for finding in findings.values())
    # "abz\n": at its newline the rows hold b, with which the next line begins.
    assert findings["end of a step: token 1 of the next step"].verdict in ("held", "partly held")
    assert findings["end of a step: token 2 of the next step"].verdict == "not held"
    assert "tell something of the next one" in conclusion(list(findings.values()))
    nothing = probe(Holding(noise=1e6), tokenizer, [tmp_path / "lines.jsonl"])
    assert "At the end of a step no layer's row tells what comes next" in conclusion(nothing)


def test_conclusions_about_what_a_task_needs(problems: Path, tokenizer: Any) -> None:
    findings = probe(Holding(), tokenizer, [problems])
    told = conclusion(findings)
    assert f"The rows do not hold, or not well: a fact: name and value; {NEXT}. A Processor cannot" in told
    # "ab;": two positions before the end stands the name, one before the value.
    verdicts = {f.what: f.verdict for f in findings if f.what in FACT}
    assert verdicts == dict(zip(FACT, ("not held", "not held", "held", "not held"), strict=True))
    of_name = [f for f in findings if f.what in (HELD, FACT[0], FACT[2])]
    assert conclusion(of_name).startswith("The rows hold what this task needs")
    assert "not well: a fact: name." in conclusion([f for f in of_name if f.what != FACT[2]])


@pytest.mark.parametrize(
    ("verdicts", "lost"),
    [
        ({"x": "held"}, []),
        ({"x": "partly held"}, ["x"]),
        ({"x, from a": "held", "x, from b": "not held"}, []),  # one place is enough
        ({"x: name, from a": "held", "x: value, from a": "held", "x: name, from b": "not held"}, []),
        # The name in one row and the value in another.
        (
            {"x: name, from a": "held", "x: value, from a": "not held", "x: value, from b": "held"},
            ["x: name and value"],
        ),
        ({"x: name, from a": "held", "x: value, from b": "held"}, ["x: name and value"]),
        # Of two subjects each by itself.
        ({"x: name, from a": "held", "y: value, from b": "held", "z: value, from b": "barely held"}, ["z: value"]),
    ],
)
def test_one_place_must_hold_all_of_a_subject(verdicts: dict[str, str], lost: list[str]) -> None:
    findings: Any = [SimpleNamespace(what=what, verdict=v, required=True) for what, v in verdicts.items()]
    ignored: Any = SimpleNamespace(what="w", verdict="not held", required=False)
    assert lacking([*findings, ignored]) == lost


def test_probes_are_found_behind_a_template(tmp_path: Path, tokenizer: Any) -> None:
    """The text of the question also stands in the template; the answer's characters count from the answer."""
    line = {"question": "ab", "answer": "c\nd\n", "probes": {"x": [["question", 1, "B"], ["answer", 2, "D"]]}}
    write_lines([line], tmp_path / "data.jsonl")
    template = "ab;{question}?"
    dataset: Dataset = load_examples([tmp_path / "data.jsonl"], tokenizer, template=template, max_length=99)
    example = dataset.examples[0]
    own = module._own_probes([tmp_path / "data.jsonl"], [example], tokenizer)
    assert [(label, tokenizer.decode([example.tokens[token]])) for _, token, label in own["x"]] == [
        ("B", "b"),
        ("D", "d"),
    ]
    assert own["x"][0][1] == 5


@pytest.mark.parametrize("row", [["question", 99, "x"], ["elsewhere", 0, "x"], ["question", "0", "x"], ["question"], 3])
def test_wrong_probes(row: Any, tmp_path: Path, tokenizer: Any) -> None:
    line = {"question": "ab", "answer": "c\nd\n", "probes": {"x": [row]}}
    write_lines([{"question": "ab", "answer": "c\n"}, line], tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"data.jsonl:2 has the probe .*, which names no character of it"):
        probe(Holding(), tokenizer, [tmp_path / "data.jsonl"])


def test_refused(tmp_path: Path, tokenizer: Any, problems: Path) -> None:
    write_lines([{"question": "ab", "answer": "c\nd\n"}] * 20, tmp_path / "same.jsonl")
    with pytest.raises(ValueError, match="20 examples give no question 60 rows of two or more labels"):
        probe(Holding(), tokenizer, [tmp_path / "same.jsonl"])
    with pytest.raises(ValueError, match="max_examples is 4, but 5"):
        probe(Holding(), tokenizer, [problems], max_examples=4)

    def windowed(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(past_key_values=SimpleNamespace(layers=[SimpleNamespace(conv_states=None)]))

    windowed.device, windowed.config = Holding.device, Holding.config  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="one key and value tensor per layer"):
        probe(windowed, tokenizer, [problems])


def test_the_command(capsys: pytest.CaptureFixture[str], problems: Path, tmp_path: Path) -> None:
    save_backbone(tiny_backbone(), tmp_path / "tiny")
    options = (problems, "--backbone", tmp_path / "tiny", "--examples", 60)
    status, out, err = run(capsys, "probe", *options, "--json")
    assert (status, err) == (0, "")
    printed = json.loads(out)
    assert {f["what"] for f in printed["findings"] if f["required"]} == {NEXT, HELD, *FACT}
    assert all(len(f["layers"]) == 2 for f in printed["findings"])
    status, out, err = run(capsys, "probe", *options)
    assert (status, err) == (0, "")
    assert out.rstrip().endswith(printed["conclusion"])
    finding = printed["findings"][0]
    best = finding["layers"][finding["best"]]
    assert (
        f"{finding['best']}  {best['share']:.3f} [{best['low']:.3f}, {best['high']:.3f}]  {finding['verdict']}" in out
    )
    fails(capsys, 1, "nowhere does not exist", "probe", problems, "--backbone", "nowhere")
    fails(capsys, 2, "--part", "probe", *options, "--part", "queries")
