"""What a training run does: `train.yaml`, or the same as a dict. docs/training.md explains the choices.

Every error is a ValueError of one sentence that names the field, its value and what is allowed. Fields that are left
out keep their defaults; unknown ones are refused.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config import MAX_DIMENSION, MAX_RECENT_WINDOW, MAX_TOP_K, BoundaryConfig

T = TypeVar("T")


def _number(default: Any, low: float, high: float = math.inf, *, optional: bool = False) -> Any:
    """A field with a number in [low, high]; an int default makes it an integer field. optional: or null."""
    kind = int if isinstance(default, int) or default is None else float
    return field(default=default, metadata={"kind": kind, "low": low, "high": high, "optional": optional})


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How files become examples; see `data.load_examples`.

    template: "auto", "chat", or a text with "{question}" in it.
    max_length: tokens of prompt and answer together; longer examples are dropped and counted.
    keep_marks: keep calculator marks such as <<48/2=24>>.
    cache: directory where tokens are kept, as by `bottlenecked prepare --output`; null: nowhere.
    held_back: examples that are not trained on, to evaluate with; examples of one source or one prompt stay together.
    bucket: batches drawn from one band of lengths; see `data.batches`.
    """

    template: str = "auto"
    max_length: int = _number(512, 2)
    keep_marks: bool = False
    cache: str | None = None
    held_back: int = _number(256, 1)
    bucket: int = _number(4, 1)

    def __post_init__(self) -> None:
        _check(self, "data.")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Other examples to begin a stage with.

    In stage 2 those in which the first call has work to do: with gradients cut at every step, call n learns from step
    n + 1 alone, and where that step is trivial it learns nothing.

    files: JSONL as for training; what is of a problem that is held back is dropped and counted. iterations: how many,
        at the start, see these examples instead of the others.
    """

    files: tuple[str, ...] = ()
    iterations: int = _number(0, 0)

    def __post_init__(self) -> None:
        _check(self, "curriculum.")
        if not isinstance(self.files, tuple) or not all(isinstance(f, str) for f in self.files):
            _refuse("curriculum.files", self.files, "a list of file names")
        if bool(self.files) != bool(self.iterations):
            _refuse("curriculum.iterations", self.iterations, "more than 0 if, and only if, files are given")


@dataclass(frozen=True, kw_only=True)
class _Optimization:
    """Of either stage: AdamW.

    epochs: passes over the data; not used where `iterations` is given.
    iterations: optimiser steps, or null.
    batch_size: examples per device and backward pass; with `accumulation` passes and n devices a step sees
        batch_size * accumulation * n examples. Its gradient is that of the mean over all their tokens.
    learning_rate: reached after `warmup` iterations, linearly.
    schedule: what it does then: "constant", "cosine" (to zero at the end) or "linear" (to zero over the last 30%).
    weight_decay, beta1, beta2: of AdamW. clip: largest gradient norm; larger ones are scaled down.
    evaluate_every, save_every: iterations between evaluations and between checkpoints; both also happen at the end.
    curriculum: see `CurriculumConfig`.
    """

    epochs: float = _number(1.0, 0)
    iterations: int | None = _number(None, 1, optional=True)
    batch_size: int = _number(32, 1)
    accumulation: int = _number(1, 1)
    learning_rate: float = _number(1e-5, 0)
    warmup: int = _number(0, 0)
    schedule: str = _choice("cosine", "constant", "linear")
    weight_decay: float = _number(0.0, 0)
    beta1: float = _number(0.9, 0, 1)
    beta2: float = _number(0.98, 0, 1)
    clip: float = _number(1.0, 0)
    evaluate_every: int = _number(500, 1)
    save_every: int = _number(500, 1)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)

    def rate(self, iteration: int, total: int) -> float:
        """The learning rate of iteration 0, 1, ... of `total`: a function of these numbers alone."""
        scale = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        done = iteration / total
        if self.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * done))
        elif self.schedule == "linear":
            scale *= min(1.0, (1 - done) / 0.3)
        return self.learning_rate * scale


@dataclass(frozen=True, kw_only=True)
class SFTConfig(_Optimization):
    """Stage 1: supervised fine-tuning of the backbone on the answers.

    method: "full", "lora" (adapters through peft, merged in the end) or "none" (the backbone stays as it is).
    lora_rank, lora_alpha: of the adapters, in every linear layer but the output head.
    """

    method: str = _choice("full", "lora", "none")
    lora_rank: int = _number(16, 1)
    lora_alpha: float = _number(32.0, 0)

    def __post_init__(self) -> None:
        _check(self, "sft.")


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig(_Optimization):
    """Stage 2: the Processor, with the backbone frozen. Sizes as in `CacheProcessorConfig`.

    dim, heads, mlp_dim: d_p, heads of its attention, width of its MLP. top_k, recent_window, key_space, rewrite_prompt,
        norm_eps: as there. gate: initial logit of every layer's gate.
    timing, min_step_length: as in `BoundaryConfig`.

    Ablations that any checkpoint can express, so that its Processor runs everywhere:

    edit: "both", "keys" or "values": the others' rows of `out_proj` stay zero.
    constant: every row gets the same edit, a learned vector per layer: the weights of `out_proj` stay zero, and its
        biases alone say something.
    layers: those that are rewritten, or null for all: the others' `out_proj` stays zero.
    only_prompt: rewrite the prompt and no later step: min_step_length becomes 65536.
    top_k 0 is consolidation only; rewrite_prompt false leaves the prompt alone.

    Ablations of training and evaluation only; such a Processor is not exported:

    write: "all", or "recalled": reconsolidation only; the window's rows are read and not written.
    selection: "mass", or "random": as many random positions.
    positions: rotate the block's queries and keys by token positions.
    """

    dim: int = _number(512, 1, MAX_DIMENSION)
    heads: int = _number(16, 1, MAX_DIMENSION)
    mlp_dim: int = _number(2240, 1, MAX_DIMENSION)
    top_k: int = _number(32, 0, MAX_TOP_K)
    recent_window: int = _number(96, 1, MAX_RECENT_WINDOW)
    key_space: str = _choice("rotated", "unrotated")
    rewrite_prompt: bool = True
    norm_eps: float = _number(1e-6, 0)
    gate: float = _number(-2.0, -math.inf)
    timing: str = _choice("post", "pre")
    min_step_length: int = _number(1, 1, MAX_DIMENSION)
    edit: str = _choice("both", "keys", "values")
    constant: bool = False
    layers: tuple[int, ...] | None = None
    only_prompt: bool = False
    write: str = _choice("all", "recalled")
    selection: str = _choice("mass", "random")
    positions: bool = False
    learning_rate: float = _number(1e-3, 0)
    warmup: int = _number(100, 0)
    evaluate_every: int = _number(250, 1)
    save_every: int = _number(250, 1)

    def __post_init__(self) -> None:
        _check(self, "processor.")
        if self.dim % self.heads:
            _refuse("processor.dim", self.dim, f"a multiple of processor.heads, which is {self.heads}")
        if self.layers is not None and (
            not isinstance(self.layers, tuple)
            or not self.layers
            or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.layers)
        ):
            _refuse("processor.layers", self.layers, "a list of layer numbers, or null for all")
        if self.only_prompt and not self.rewrite_prompt:
            _refuse("processor.only_prompt", True, "false where rewrite_prompt is false: nothing would be rewritten")
        if self.write == "recalled" and self.top_k == 0:
            _refuse("processor.write", self.write, '"all" where top_k is 0: nothing would be rewritten')
        if self.positions and self.dim // self.heads % 2:
            _refuse("processor.dim", self.dim, "such that heads are of even size, because positions is true")

    def boundary(self, token_ids: tuple[int, ...] = ()) -> BoundaryConfig:
        """What ends a step, in training and in the checkpoint. token_ids: those with a newline."""
        return BoundaryConfig(
            token_ids=token_ids,
            min_step_length=MAX_DIMENSION if self.only_prompt else self.min_step_length,
            timing=self.timing,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A run: `data`, then stage 1 (`sft`), then stage 2 (`processor`).

    seed: of everything random. One device, one config and the same data give the same weights, bit for bit, on a CPU.
    dtype: "float32", or "bfloat16": stage 1 multiplies in bfloat16 and keeps float32 weights; the backbone is then
        saved, frozen and run in bfloat16, and the Processor keeps float32 weights and multiplies in bfloat16.
    license: of what is exported, for its model card; null: not stated.
    """

    seed: int = _number(0, 0)
    dtype: str = _choice("float32", "bfloat16")
    license: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)

    def __post_init__(self) -> None:
        _check(self, "")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """From nested dicts. ValueError that names an unknown or wrong field."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> TrainingConfig:
        """From a YAML file (JSON is YAML). OSError where it cannot be read, ValueError, naming the file, as above."""
        import yaml

        path = Path(file)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        try:
            return cls.from_dict({} if values is None else values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `from_dict(c.to_dict()) == c`."""
        return _dump(self)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the whole configuration, defaults included, as YAML."""
        import yaml

        Path(file).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested dicts, one sentence per value: "sft.epochs was 1.0 and is 2.0"."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return found


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError, listing what differs, unless `path`, which says `before`, is of the run that is to go on."""
    if changed := differences(before, now):
        raise ValueError(f"{path} is of another run: {'; '.join(changed)}; use the same, or another output directory")


def _dump(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = _dump(value)
        values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def _build(cls: type[T], values: Any, prefix: str) -> T:
    if not isinstance(values, Mapping):
        _refuse(prefix.rstrip(".") or "the configuration", values, "a mapping of fields to values")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{prefix}{name} is no field of a training configuration: use {', '.join(fields)}")
        default = fields[name].default_factory
        if dataclasses.is_dataclass(default):
            arguments[name] = _build(default, value, f"{prefix}{name}.")
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _check(config: Any, prefix: str) -> None:
    """Numbers, choices, booleans and texts by what their fields say. Integers and texts become numbers."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if "choices" in f.metadata:
            if value not in f.metadata["choices"]:
                _refuse(name, value, " or ".join(f'"{choice}"' for choice in f.metadata["choices"]))
        elif "kind" in f.metadata:
            if value is None and f.metadata["optional"]:
                continue
            object.__setattr__(config, f.name, _checked_number(name, value, f.metadata))
        elif isinstance(f.default, bool):
            if not isinstance(value, bool):
                _refuse(name, value, "true or false")
        elif f.name in ("template", "cache", "license") and not (
            isinstance(value, str) or (value is None and f.default is None)
        ):
            _refuse(name, value, "a text")


def _checked_number(name: str, value: Any, metadata: Mapping[str, Any]) -> int | float:
    kind, low, high = metadata["kind"], metadata["low"], metadata["high"]
    words = f"{'an integer' if kind is int else 'a number'} "
    words += f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    if low == -math.inf:
        words = "a finite number"
    if isinstance(value, str) and kind is float:  # YAML reads 1e-3, without a point, as a text
        try:
            value = float(value)
        except ValueError:
            _refuse(name, value, words)
    allowed = (int,) if kind is int else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, allowed)
        or not low <= value <= high
        or not math.isfinite(value)
    ):
        _refuse(name, value, words)
    return kind(value)  # type: ignore[no-any-return]


def _refuse(name: str, value: object, allowed: str) -> Any:
    raise ValueError(f"{name} is {value!r}, but it must be {allowed}")


__all__ = [
    "CurriculumConfig",
    "DataConfig",
    "ProcessorConfig",
    "SFTConfig",
    "TrainingConfig",
    "check_same_run",
    "differences",
]
