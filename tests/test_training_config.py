"""The configuration of a run: defaults, files, and errors that name the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bottlenecked.training.config import (
    CurriculumConfig,
    DataConfig,
    ProcessorConfig,
    SFTConfig,
    TrainingConfig,
    differences,
)

yaml = pytest.importorskip("yaml")


def test_round_trips(tmp_path: Path) -> None:
    config = TrainingConfig(
        seed=3,
        processor=ProcessorConfig(layers=(0, 2), curriculum=CurriculumConfig(files=("a.jsonl",), iterations=5)),
    )
    assert TrainingConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "train.yaml")
    assert TrainingConfig.load(tmp_path / "train.yaml") == config
    (tmp_path / "empty.yaml").write_text("")
    assert TrainingConfig.load(tmp_path / "empty.yaml") == TrainingConfig()


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("processor: {learning_rate: 3e-4, gate: 0, iterations: null, layers: [1, 2]}\nsft: {epochs: 2}\n")
    config = TrainingConfig.load(file)
    assert config.processor.learning_rate == 3e-4
    assert config.processor.gate == 0.0
    assert config.processor.layers == (1, 2)
    assert config.sft.epochs == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "sed is no field of a training configuration: use seed,"),
        ({"processor": {"k": 3}}, "processor.k is no field"),
        ({"processor": 3}, "processor is 3, but it must be a mapping"),
        ({"seed": -1}, "seed is -1, but it must be an integer of at least 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"dtype": "float16"}, 'dtype is \'float16\', but it must be "float32" or "bfloat16"'),
        ({"license": 3}, "license is 3, but it must be a text"),
        ({"data": {"max_length": 1}}, "data.max_length is 1, but it must be an integer of at least 2"),
        ({"sft": {"learning_rate": "fast"}}, "sft.learning_rate is 'fast', but it must be a number of at least 0"),
        ({"sft": {"learning_rate": float("nan")}}, "sft.learning_rate is nan"),
        ({"sft": {"method": "half"}}, "sft.method is 'half'"),
        (
            {"processor": {"recent_window": 257}},
            "processor.recent_window is 257, but it must be an integer from 1 to 256",
        ),
        ({"processor": {"dim": 12}}, "processor.dim is 12, but it must be a multiple of processor.heads"),
        ({"processor": {"gate": float("inf")}}, "processor.gate is inf, but it must be a finite number"),
        ({"processor": {"rewrite_prompt": 1}}, "processor.rewrite_prompt is 1, but it must be true or false"),
        ({"processor": {"layers": []}}, "processor.layers"),
        ({"processor": {"layers": [-1]}}, "processor.layers"),
        ({"processor": {"only_prompt": True, "rewrite_prompt": False}}, "processor.only_prompt"),
        ({"processor": {"write": "recalled", "top_k": 0}}, "processor.write"),
        ({"processor": {"dim": 48, "heads": 16, "positions": True}}, "processor.dim is 48"),
        ({"processor": {"curriculum": {"files": ["a"]}}}, "curriculum.iterations is 0"),
        ({"processor": {"curriculum": {"iterations": 3}}}, "curriculum.iterations is 3"),
        ({"processor": {"curriculum": {"files": "a", "iterations": 3}}}, "curriculum.files"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is what is tested
        TrainingConfig.from_dict(values)
    assert message in str(error.value)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"train\.yaml: "):
        TrainingConfig.load(tmp_path / "train.yaml")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("seed: [")
    with pytest.raises(ValueError, match=r"train\.yaml is not YAML"):
        TrainingConfig.load(tmp_path / "train.yaml")


def test_learning_rates() -> None:
    constant = SFTConfig(schedule="constant", learning_rate=2.0, warmup=4)
    assert [constant.rate(i, 100) for i in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = SFTConfig(schedule="cosine", learning_rate=2.0)
    assert cosine.rate(0, 100) == 2.0
    assert cosine.rate(50, 100) == pytest.approx(1.0)
    assert 0 < cosine.rate(99, 100) < 0.01
    linear = SFTConfig(schedule="linear", learning_rate=3.0)
    assert linear.rate(69, 100) == 3.0
    assert linear.rate(85, 100) == pytest.approx(1.5)


def test_only_prompt_is_a_boundary_any_host_knows() -> None:
    boundary = ProcessorConfig(only_prompt=True).boundary((3,))
    assert boundary.min_step_length == 65536
    assert ProcessorConfig(timing="pre", min_step_length=2).boundary((3,)).timing == "pre"


def test_differences_are_listed() -> None:
    before = TrainingConfig().to_dict()
    now = TrainingConfig(seed=1, data=DataConfig(max_length=9)).to_dict()
    assert differences(before, now) == ["seed was 0 and is 1", "data.max_length was 512 and is 9"]
    assert differences(before, before) == []


@pytest.mark.parametrize("cls", [TrainingConfig, DataConfig, SFTConfig, ProcessorConfig, CurriculumConfig])
def test_every_field_is_documented(cls: type) -> None:
    text = (cls.__doc__ or "") + "".join(base.__doc__ or "" for base in cls.__mro__)
    for field in dataclasses.fields(cls):
        assert field.name in text.replace("`", ""), field.name
