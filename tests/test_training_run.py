"""`bottlenecked train` from files to files, as one process after another would use it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")

from bottlenecked import CacheProcessor, backbones, cli  # noqa: E402
from bottlenecked.integrations.transformers import attach  # noqa: E402
from bottlenecked.training import trainer as trainers  # noqa: E402
from tests import tiny  # noqa: E402

CONFIG = {
    "data": {"held_back": 4, "max_length": 64, "template": "{question} "},
    "sft": {"iterations": 3, "batch_size": 4, "learning_rate": "1e-3"},
    "processor": {"dim": 32, "heads": 4, "mlp_dim": 48, "iterations": 3, "batch_size": 4, "warmup": 0},
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A backbone, twenty problems and a configuration."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = f"w{tiny.EOS}"
    tiny.model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    words = [i for i in range(tiny.VOCABULARY - 4) if i not in tiny.NEWLINES]

    def text(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.choice(words, count))

    lines = [
        {"question": text(5 + i % 3), "answer": " ".join([text(3), "w3\n", text(4), "w10\n", text(2)])}
        for i in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    return {name: tmp_path / name for name in ("base", "train.jsonl", "train.yaml", "run")}


def command(files: dict[str, Path], *more: str) -> list[str]:
    return [
        "train",
        *("--backbone", str(files["base"]), "--data", str(files["train.jsonl"])),
        *("--output", str(files["run"]), "--config", str(files["train.yaml"]), *more),
    ]


def test_both_stages_and_what_uses_them(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(files)) == 0
    assert "(n = 4 examples" in capsys.readouterr().out
    run = files["run"]
    model, tokenizer = backbones.load(run / "backbone")
    processor = CacheProcessor.from_pretrained(run / "processor")
    ids = tokenizer("w5 w6 w7 ", return_tensors="pt")["input_ids"]
    with attach(model, processor, tokenizer) as attachment:  # refuses weights other than those it was trained on
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert attachment.stats.boundaries == 1
    # The card's command sends the prompts that it was trained with.
    assert "THIS_DIRECTORY --template '{question} ' --prompt" in (run / "processor" / "README.md").read_text()
    assert (run / "backbone" / "README.md").exists()
    assert yaml.safe_load((run / "train.yaml").read_text())["processor"]["dim"] == 32
    assert len((run / "sft.csv").read_text().splitlines()) == 4
    stock = backbones.load(files["base"])[0].state_dict()
    assert any(not torch.equal(tensor, stock[name]) for name, tensor in model.state_dict().items())

    # A second run needs a directory of its own, or --resume; a finished run is done again at once.
    assert cli.main(command(files)) == 1
    assert "is not empty: give another directory, or --resume its run" in capsys.readouterr().err
    weights = (run / "processor" / "model.safetensors").read_bytes()
    assert cli.main(command(files, "--resume")) == 0
    assert (run / "processor" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("stage", ["sft", "processor"])
def test_an_interrupted_run_goes_on(files: dict[str, Path], stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(command(files)) == 0
    expected = (files["run"] / "processor" / "model.safetensors").read_bytes()
    kind: Any = {"sft": trainers.BackboneTrainer, "processor": trainers.ProcessorTrainer}[stage]
    losses = kind.losses

    def interrupted(self: Any, batch: Any, denominator: float | None = None) -> Any:
        if denominator is not None and self.iteration == 1:
            self._signal = signal.SIGTERM
        return losses(self, batch, denominator)

    files["run"] = files["run"].with_name("parts")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "losses", interrupted)
        with pytest.raises(SystemExit) as stopped:
            cli.main(command(files))
    assert stopped.value.code == 143
    assert not (files["run"] / "processor").exists()
    assert cli.main(command(files, "--resume")) == 0
    assert (files["run"] / "processor" / "model.safetensors").read_bytes() == expected


def test_no_first_stage(files: dict[str, Path], tmp_path: Path) -> None:
    data = CONFIG["data"] | {"cache": str(tmp_path / "cache")}
    files["train.yaml"].write_text(yaml.safe_dump({**CONFIG, "data": data, "sft": {"method": "none"}}))
    assert cli.main(command(files)) == 0
    options = ("--backbone", str(files["base"]), "--template", "{question} ", "--max-length", "64")
    before = list((tmp_path / "cache").iterdir())
    assert cli.main(["prepare", str(files["train.jsonl"]), *options, "--output", str(tmp_path / "cache")]) == 0
    assert list((tmp_path / "cache").iterdir()) == before != []
    assert not (files["run"] / "backbone").exists()
    config = json.loads((files["run"] / "processor" / "config.json").read_text())
    assert config["backbone"]["weights_hash"] == backbones.describe(files["base"])["backbone"]["weights_hash"]
    assert config["backbone"]["name"] == "base"


@pytest.mark.parametrize("stage", ["sft", "processor"])
def test_a_curriculum_holds_no_problem_that_is_held_back(
    files: dict[str, Path], stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = {"sft": trainers.BackboneTrainer, "processor": trainers.ProcessorTrainer}[stage]
    losses, seen, held = kind.losses, set(), set()

    def watching(self: Any, batch: Any, denominator: float | None = None) -> Any:
        if denominator is not None:  # training
            seen.update(e.tokens for e in batch)
            held.update(e.tokens for e in self.held_back.examples)
        return losses(self, batch, denominator)

    # The curriculum is the data itself, in another order, without its sources.
    early = files["run"].with_name("early.jsonl")
    early.write_text("".join(reversed(files["train.jsonl"].read_text().splitlines(keepends=True))))
    config = {**CONFIG, "seed": 1}
    config[stage] = CONFIG[stage] | {"curriculum": {"files": [str(early)], "iterations": 2}, "batch_size": 16}
    files["train.yaml"].write_text(yaml.safe_dump(config))
    monkeypatch.setattr(kind, "losses", watching)
    assert cli.main(command(files)) == 0
    assert (len(seen), len(held)) == (16, 4)
    assert not seen & held
    assert f"{early}: 4 examples dropped, of a problem that is held back\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processor": {"k": 1}}, r"train\.yaml: processor\.k is no field"),
        ({**CONFIG, "data": {"held_back": 20}}, "held_back is 20"),
        ({**CONFIG, "processor": {**CONFIG["processor"], "batch_size": 17}}, "batch of 17"),
        ({**CONFIG, "sft": {**CONFIG["sft"], "batch_size": 17}}, "batch of 17"),
        ({**CONFIG, "processor": {**CONFIG["processor"], "layers": [7]}}, "names layer 7"),
        (
            {**CONFIG, "processor": {**CONFIG["processor"], "curriculum": {"files": ["x.jsonl"], "iterations": 1}}},
            "x.js",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_before_anything_runs(
    files: dict[str, Path], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files["train.yaml"].write_text(yaml.safe_dump(change))
    assert cli.main(command(files)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bottlenecked: ")
    assert re.search(message, error)
    assert not files["run"].exists()  # so that the same command, with the mistake corrected, is not refused


def test_another_run_or_none_is_not_resumed(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(files, "--resume")) == 1
    assert "holds no run to resume" in capsys.readouterr().err
    assert cli.main(command(files)) == 0
    files["train.yaml"].write_text(yaml.safe_dump({**CONFIG, "seed": 1}))
    assert cli.main(command(files, "--resume")) == 1
    assert "train.yaml is of another run: seed was 0 and is 1; use the same" in capsys.readouterr().err


@pytest.mark.parametrize("began", ["full", "none"])
def test_a_run_of_other_stages_is_not_resumed(
    files: dict[str, Path], began: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"full": "none", "none": "full"}[began]
    configs = {method: {**CONFIG, "sft": {**CONFIG["sft"], "method": method}} for method in (began, now)}
    kind: Any = {"full": trainers.BackboneTrainer, "none": trainers.ProcessorTrainer}[began]
    losses = kind.losses

    def interrupted(self: Any, batch: Any, denominator: float | None = None) -> Any:
        self._signal = signal.SIGTERM
        return losses(self, batch, denominator)

    def begin(self: Any) -> Any:
        raise AssertionError("a step of another run")

    files["train.yaml"].write_text(yaml.safe_dump(configs[began]))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "losses", interrupted)
        with pytest.raises(SystemExit):
            cli.main(command(files))
    before = {path.name: path.read_bytes() for path in files["run"].iterdir() if path.is_file()}
    assert [name for name in before if name.endswith(".checkpoint")] == [f"{kind.name}.checkpoint"]
    files["train.yaml"].write_text(yaml.safe_dump(configs[now]))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(trainers.Trainer, "step", begin)
        assert cli.main(command(files, "--resume")) == 1
    assert f"sft.method was {began!r} and is {now!r}; use the same" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in files["run"].iterdir() if path.is_file()} == before
    files["train.yaml"].write_text(yaml.safe_dump(configs[began]))
    assert cli.main(command(files, "--resume")) == 0


def test_a_backbone_that_cannot_be_trained_leaves_nothing(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise NotImplementedError("not this one")

    monkeypatch.setattr(trainers, "PackedBackbone", refuse)
    assert cli.main(command(files)) == 1
    assert "not this one" in capsys.readouterr().err
    assert not files["run"].exists()


def test_a_run_without_a_checkpoint_goes_on_as_it_began(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainers.Trainer, "step", die)
        assert cli.main(command(files)) == 1
    began = (files["run"] / "train.yaml").read_text()
    assert not list(files["run"].glob("*.checkpoint"))
    files["train.yaml"].write_text(yaml.safe_dump({**CONFIG, "seed": 7, "sft": {**CONFIG["sft"], "batch_size": 2}}))
    capsys.readouterr()
    assert cli.main(command(files, "--resume")) == 1
    error = capsys.readouterr().err
    assert "train.yaml is of another run: seed was 0 and is 7; sft.batch_size was 4 and is 2; use the same, or" in error
    assert (files["run"] / "train.yaml").read_text() == began
    assert not (files["run"] / "processor").exists()
    files["train.yaml"].write_text(yaml.safe_dump(CONFIG))
    assert cli.main(command(files, "--resume")) == 0
    made = json.loads((files["run"] / "processor" / "config.json").read_text())
    assert made["training"]["config"] == yaml.safe_load((files["run"] / "train.yaml").read_text())
