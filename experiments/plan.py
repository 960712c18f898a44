"""An experiment as a file: NAME.yaml. Unknown or wrong fields are refused in one sentence, a ValueError."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bottlenecked.training.config import ProcessorConfig, SFTConfig, TrainingConfig
from bottlenecked.training.tasks import ChainTask, RegisterTask, Task

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUILD = HERE.parent / "build" / "experiments"

_TASKS = {"registers": RegisterTask, "chain": ChainTask}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """How many problems there are of each kind.

    train, curriculum, backbone_curriculum: to train on. held_back: to choose hyperparameters by, and for all else that
    is looked at before the end. test, longer: scored once per variant and backbone; longer: of `Plan.longer`. Of a text
    held_back alone counts, and is taken from what there is to train on.
    """

    train: int = 40000
    curriculum: int = 15000
    backbone_curriculum: int = 10000
    held_back: int = 500
    test: int = 1000
    longer: int = 500


@dataclass(frozen=True, kw_only=True)
class Text:
    """Problems in real words, answered by a language model.

    model: as `backbones.load` takes it. adapter: a directory, from the repository's root: the LoRA on it that is the
    backbone of all seeds; where it is missing it is trained, once, and written there. train, test: JSONL files in the
    directory --data. copies: of each problem to train on, with other numbers. max_length: tokens of an example;
    max_new_tokens: of a generated answer. pause_token: one of the tokenizer that no problem uses. decoded: answers
    generated at a time. watched: held-back problems that are looked at while training.
    """

    model: str
    adapter: str
    train: str
    test: str
    copies: int = 0
    max_length: int = 512
    max_new_tokens: int = 320
    pause_token: str | None = None
    decoded: int = 64
    watched: int = 500


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How a backbone comes to be, and what it must be able to do.

    sft: its fine-tuning, of a tiny one from random weights, of a text's model by LoRA: fields of `SFTConfig`.
    curriculum_iterations: how many of a tiny one's iterations come first and see the task's look-ups only.
    least_look_ups: share of these that it must get right afterwards. A tiny backbone that does not, or whose rows do
        not hold what the task's probes ask for, is not used: no Processor can train on it.
    """

    sft: Mapping[str, Any] = field(default_factory=dict)
    curriculum_iterations: int = 0
    least_look_ups: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The compute that every variant gets: what this one takes.

    variant: its name. unit: "seconds", calibrated ones of this machine, or "operations" of products and of attention,
    forwards and backwards, which are the same on all machines. iterations: all of them. curriculum_iterations: how many
    come first and see the warm-up only; the others spend as much of theirs on it.
    """

    variant: str = "processor"
    unit: str = "seconds"
    iterations: int = 1800
    curriculum_iterations: int = 600


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """One row of the table.

    kind: a class of variants.py; options: its own. label: for people.
    learning_rate: candidates; with several, the best on held-back problems of the first backbone is used on all.
    group: "" for the main table; others are tables of their own, "top_k" and "recent_window" plots.
    share: of the compute. base: the variant whose model is gone on with; default: the backbone.
    backbones: how many of the first backbones it is made on; default: all.
    export: whether what was trained on the first backbone is written to `build`/export, for use elsewhere.
    """

    kind: str
    label: str
    learning_rate: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    share: float = 1.0
    base: str | None = None
    backbones: int | None = None
    export: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment on a synthetic task or on a text: exactly one of the two is given.

    name: of the file. title, notes: for the tables. task: trained and tested on. longer: the same with longer answers
        than any that was trained on; None: not tested. text: see there. dtype: as in `TrainingConfig`.
    data: where the files of a text are. build: where what was trained is kept. results: where outcomes are kept; tables
        and plots stand beside that directory.
    seeds: of backbones, tried in this order; backbones: how many that pass are used.
    training: batch_size, warmup, schedule, clip of every training but the backbone's. processor: fields of
        `ProcessorConfig`.
    variants: by name, in the order of running. headline: those that come first, on all backbones; the others follow
        backbone by backbone. Empty: all are. pairs: (one, other): differences that are stated, beside each variant's
        with `baseline`.
    """

    name: str
    title: str
    task: Task | None
    text: Text | None
    longer: Task | None
    seeds: tuple[int, ...]
    backbones: int
    examples: Examples
    backbone: Backbone
    budget: Budget
    training: Mapping[str, Any]
    processor: Mapping[str, Any]
    variants: Mapping[str, VariantPlan]
    baseline: str
    pairs: tuple[tuple[str, str], ...]
    headline: tuple[str, ...] = ()
    notes: str = ""
    dtype: str = "float32"
    build: Path
    results: Path
    data: Path


def load(name: str, *, build: Path = BUILD, results: Path = RESULTS, data: Path = HERE) -> Plan:
    """Read NAME.yaml, or the file at the path that `name` is where it ends in .yaml.

    FileNotFoundError that lists those there are; ValueError, naming the file, for a wrong field.
    """
    import yaml

    path = Path(name) if name.endswith(".yaml") else HERE / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no experiment {name!r}: use {', '.join(names())}")
    try:
        return make(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")), build, results, data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def names() -> list[str]:
    """Of the experiments there are."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def make(name: str, values: Mapping[str, Any], build: Path, results: Path, data: Path = HERE) -> Plan:
    """A plan from the YAML's values, its own directories in these. ValueError for a wrong or unknown field."""
    given = _fields(Plan, values, "")
    if ("task" in values) == ("text" in values):
        raise ValueError("an experiment has a task or a text, one of the two")
    given["task"], given["longer"] = _tasks(values["task"], values.get("longer")) if "task" in values else (None, None)
    given["text"] = Text(**_fields(Text, values["text"], "text.")) if "text" in values else None
    for key, kind in (("examples", Examples), ("backbone", Backbone), ("budget", Budget)):
        given[key] = kind(**_fields(kind, values.get(key, {}), f"{key}."))
    variants = {}
    for variant, entry in values["variants"].items():
        of_one = {"kind": variant, "label": variant.replace("-", " ")} | _fields(
            VariantPlan, entry or {}, f"variants.{variant}."
        )
        rates = of_one.get("learning_rate", [])
        of_one["learning_rate"] = tuple(map(float, rates if isinstance(rates, list) else [rates]))
        variants[variant] = VariantPlan(**of_one)
    given |= {
        "variants": variants,
        "seeds": tuple(values["seeds"]),
        "pairs": tuple(tuple(pair) for pair in values.get("pairs", ())),
        "headline": tuple(values.get("headline", ())),
        "training": values.get("training", {}),
        "processor": values.get("processor", {}),
    }
    where = {"build": build / name, "results": results / name, "data": data}
    made = Plan(name=name, **{"baseline": "sft2"} | given | where)
    for used in (
        made.budget.variant,
        made.baseline,
        *(v for pair in made.pairs for v in pair),
        *made.headline,
        *(v.base for v in variants.values() if v.base),
    ):
        if used not in variants:
            raise ValueError(f"{used!r} is named, but it is none of the variants")
    if not 1 <= made.backbones <= len(made.seeds):
        raise ValueError(f"backbones is {made.backbones}, but it must be 1 to {len(made.seeds)}, the number of seeds")
    if made.budget.unit not in ("seconds", "operations"):
        raise ValueError(f"budget.unit is {made.budget.unit!r}, but it must be seconds or operations")
    # Unknown fields of the training's own configuration are told now.
    if SFTConfig(**dict(made.backbone.sft)).method != "lora" and made.text is not None:
        raise ValueError("backbone.sft.method must be lora for a text: its adapters are what text.adapter keeps")
    TrainingConfig.from_dict({"processor": dict(made.processor) | dict(made.training), "sft": dict(made.training)})
    return made


def processor_settings(plan: Plan, options: Mapping[str, Any], **more: Any) -> ProcessorConfig:
    """The plan's Processor with some fields changed."""
    return TrainingConfig.from_dict({"processor": {**plan.processor, **plan.training, **options, **more}}).processor


def _fields(kind: type, values: Any, prefix: str) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(kind) if f.name not in ("name", "build", "results", "data")]
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the experiment'} is {values!r}, but it must be a mapping")
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key} is no field: use {', '.join(known)}")
    return dict(values)


def _tasks(values: Mapping[str, Any], longer: Mapping[str, Any] | None) -> tuple[Task, Task | None]:
    values = dict(values)
    kind = values.pop("name", None)
    if kind not in _TASKS:
        raise ValueError(f"task.name is {kind!r}, but it must be {' or '.join(_TASKS)}")

    def made(changes: Mapping[str, Any]) -> Task:
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in {**values, **changes}.items()}
        return _TASKS[kind](**fields)  # type: ignore[no-any-return]

    return made({}), None if longer is None else made(longer)
