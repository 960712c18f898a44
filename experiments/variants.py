"""Ways to spend the same compute on the same backbone, data and curriculum: what a Processor is held against.

Each is a class: what it reads, what it trains, and how its answers are told right. Answers are scored by one forward
over the right answer: greedy decoding gives the whole of it if, and only if, the likeliest token is right everywhere
the model has to write, since what stands before each is then the same. So a score costs one pass, and every variant can
be scored, also those that no checkpoint expresses.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bottlenecked import backbones
from bottlenecked.boundary import newline_token_ids
from bottlenecked.training.config import ProcessorConfig, TrainingConfig
from bottlenecked.training.data import Dataset, Example
from bottlenecked.training.packed import PackedBackbone, Stretch
from bottlenecked.training.rollout import Losses, rollout, supervised
from bottlenecked.training.trainer import BackboneTrainer, ProcessorTrainer, Trainer, processor_config

from .plan import processor_settings

if TYPE_CHECKING:
    from .lab import Lab


@dataclass(frozen=True)
class Schedule:
    """iterations: all of them; curriculum_iterations: how many come first and see the curriculum."""

    iterations: int
    curriculum_iterations: int
    learning_rate: float


class Variant(abc.ABC):
    """One row of a table.

    lab: the experiment's data. options: this kind's own, as the YAML gives them. ValueError for others.
    """

    known: tuple[str, ...] = ()

    def __init__(self, lab: Lab, options: Mapping[str, Any]) -> None:
        self.lab, self.plan, self.options = lab, lab.plan, dict(options)
        for name in self.options:
            if name not in self.known:
                allowed = ", ".join(self.known) or "none"
                raise ValueError(f"{name} is no option of {type(self).__name__}: use {allowed}")

    @abc.abstractmethod
    def trainer(
        self, model: Any, schedule: Schedule, seed: int, *, output: Path | None = None, data: Dataset | None = None
    ) -> Trainer | None:
        """Ready to step; None where there is nothing to train.

        model: the backbone, which is changed. seed: of new weights and the order of batches. output: for checkpoints.
        data: to train on; default: the lab's, after its curriculum.
        """

    def reads(self, dataset: Dataset) -> Dataset:
        """The examples as this variant sees them."""
        return dataset

    def right(self, model: Any, trainer: Trainer | None, dataset: Dataset) -> list[bool]:
        """Whether greedy decoding would give each example's whole answer; what is forced is given."""
        backbone = PackedBackbone(model) if trainer is None else trainer.backbone
        return _scored(self.lab, self.reads(dataset), lambda batch: _likeliest(backbone, batch))

    def losses(self, model: Any, trainer: Trainer | None, dataset: Dataset) -> Losses:
        """Cross-entropy of each example, in their order."""
        if trainer is None:
            return _losses(self.lab, self.reads(dataset), lambda batch: supervised(PackedBackbone(model), batch))
        return _losses(self.lab, self.reads(dataset), trainer.losses)

    def parameters(self, trainer: Trainer | None) -> int:
        """How many are trained."""
        return 0 if trainer is None else sum(p.numel() for p in trainer.parameters.values())

    def settle(self, trainer: Trainer | None) -> None:  # noqa: B027
        """Training is over: make the model what it would be served as. Most are that already."""

    def export(self, trainer: Trainer, directory: Path) -> None:
        """Write what was trained, in bfloat16, before `settle`. NotImplementedError where that is of no use."""
        raise NotImplementedError(f"{type(self).__name__} is not exported")

    def _training(self, data: Dataset | None) -> tuple[Dataset, Dataset | None]:
        if data is not None:
            return self.reads(data), None
        curriculum = self.lab.curriculum
        return self.reads(self.lab.train), None if curriculum is None else self.reads(curriculum)


class Untouched(Variant):
    """The backbone as it is: no further compute."""

    def trainer(
        self, model: Any, schedule: Schedule, seed: int, *, output: Path | None = None, data: Dataset | None = None
    ) -> Trainer | None:
        return None


class FineTuned(Variant):
    """The whole backbone, trained on: SFT@2.

    pauses: so many tokens that say nothing are read behind every step and the prompt (pause tokens, arXiv 2310.02226).
    The token is the lab's `pause_token`; its embedding is learned from what weights it has.
    """

    known: tuple[str, ...] = ("pauses",)
    method = "full"
    trained: tuple[str, ...] = ("",)

    def __init__(self, lab: Lab, options: Mapping[str, Any]) -> None:
        super().__init__(lab, options)
        self.pauses = int(self.options.get("pauses", 0))
        if self.pauses and lab.pause_token is None:
            raise ValueError("pauses need a token that nothing else uses: fewer names in the task, or text.pause_token")

    def reads(self, dataset: Dataset) -> Dataset:
        token = self.lab.pause_token
        if not self.pauses or token is None:
            return dataset
        return _changed(dataset, lambda e: with_pauses(e, token, self.pauses), f"{self.pauses} pauses")

    def trainer(
        self, model: Any, schedule: Schedule, seed: int, *, output: Path | None = None, data: Dataset | None = None
    ) -> Trainer | None:
        model.float()
        self._prepare(model, seed)
        settings = {**self.plan.training, "method": self.method, **self._more(model), **_fields(schedule)}
        used, curriculum = self._training(data)
        return BackboneTrainer(
            model,
            self.lab.tokenizer,
            used,
            self.lab.held_back,
            TrainingConfig.from_dict({"seed": seed, "dtype": self.plan.dtype, "sft": settings}),
            output=output,
            curriculum=curriculum,
            trained=self.trained,
        )

    def _prepare(self, model: Any, seed: int) -> None:
        """Change the backbone, as it is to be trained."""

    def _more(self, model: Any) -> dict[str, Any]:
        """Further fields of `SFTConfig`."""
        return {}


class LowRank(FineTuned):
    """LoRA in every linear layer but the head.

    rank: default: that with as many parameters as the Processor, within half a rank.
    """

    known = ("rank",)
    method = "lora"

    def _more(self, model: Any) -> dict[str, Any]:
        rank = int(self.options.get("rank", 0)) or lora_rank(model, processor_parameters(self.lab, model))
        return {"lora_rank": rank, "lora_alpha": float(rank)}

    def settle(self, trainer: Trainer | None) -> None:
        """The adapters are merged."""
        assert isinstance(trainer, BackboneTrainer)
        if trainer._adapted is not None:
            trainer._adapted.merge_and_unload()
            trainer._adapted = None

    def export(self, trainer: Trainer, directory: Path) -> None:
        """As peft writes adapters."""
        assert isinstance(trainer, BackboneTrainer)
        trainer.export_adapter(directory)


class AddedLayer(FineTuned):
    """One more layer inside the frozen backbone, an identity at first, with as many parameters as the Processor.

    at: its place among the layers.
    """

    known = ("at",)

    def __init__(self, lab: Lab, options: Mapping[str, Any]) -> None:
        super().__init__(lab, options)
        self.at = int(self.options.get("at", 1))
        self.trained = (f"model.layers.{self.at}.",)

    def _prepare(self, model: Any, seed: int) -> None:
        insert_layer(model, self.at, processor_parameters(self.lab, model), seed=seed)


class Processor(Variant):
    """A Processor. options: fields of `ProcessorConfig`, which replace the experiment's own.

    every: rewrite at the prompt's end and then every so many tokens, wherever lines end.
    """

    known = ("every", *(f.name for f in dataclasses.fields(ProcessorConfig)))

    def __init__(self, lab: Lab, options: Mapping[str, Any]) -> None:
        super().__init__(lab, options)
        self.every = int(self.options.pop("every", 0))
        self.only_prompt = processor_settings(self.plan, self.options).only_prompt

    def reads(self, dataset: Dataset) -> Dataset:
        if self.only_prompt:
            return _changed(dataset, lambda e: recut(e, len(e.tokens)), "one step")
        if self.every:
            return _changed(dataset, lambda e: recut(e, self.every), f"every {self.every} tokens")
        return dataset

    def trainer(
        self, model: Any, schedule: Schedule, seed: int, *, output: Path | None = None, data: Dataset | None = None
    ) -> Trainer | None:
        model.to(getattr(torch, self.plan.dtype))
        fields = {**self.plan.processor, **self.plan.training, **self.options, **_fields(schedule)}
        used, curriculum = self._training(data)
        return ProcessorTrainer(
            model,
            self.lab.tokenizer,
            used,
            self.lab.held_back,
            TrainingConfig.from_dict({"seed": seed, "dtype": self.plan.dtype, "processor": fields}),
            output=output,
            curriculum=curriculum,
        )

    def right(self, model: Any, trainer: Trainer | None, dataset: Dataset) -> list[bool]:
        assert isinstance(trainer, ProcessorTrainer)

        def likeliest(batch: Sequence[Example]) -> list[list[int]]:
            rows: list[tuple[int, int, torch.Tensor]] = []
            rollout(trainer.backbone, trainer.processor, batch, variant=trainer.variant, logits=rows)
            best = torch.stack([row for *_, row in rows]).argmax(1).tolist()
            told: list[dict[int, int]] = [{} for _ in batch]
            for (example, token, _), chosen in zip(rows, best, strict=True):
                told[example][token] = chosen
            return [[of_one[token] for token in sorted(of_one)] for of_one in told]

        with torch.random.fork_rng():
            torch.manual_seed(0)  # of random positions
            return _scored(self.lab, self.reads(dataset), likeliest)

    def export(self, trainer: Trainer, directory: Path) -> None:
        """The Processor's checkpoint and its card."""
        trainer.export(directory)
        _narrow(directory / "model.safetensors")

    def parameters(self, trainer: Trainer | None) -> int:
        assert isinstance(trainer, ProcessorTrainer)
        if trainer.config.processor.constant:
            return sum(p.numel() for name, p in trainer.parameters.items() if name in ("out_proj_bias", "gate"))
        return super().parameters(trainer)


KINDS: dict[str, type[Variant]] = {
    "untouched": Untouched,
    "fine-tuned": FineTuned,
    "lora": LowRank,
    "layer": AddedLayer,
    "processor": Processor,
}


def make(lab: Lab, name: str) -> Variant:
    """The plan's variant of this name. ValueError for an unknown kind or option."""
    entry = lab.plan.variants[name]
    if entry.kind not in KINDS:
        raise ValueError(f"variants.{name}.kind is {entry.kind!r}, but it must be one of {', '.join(KINDS)}")
    return KINDS[entry.kind](lab, entry.options)


# --- examples ---------------------------------------------------------------------------------------------------


def with_pauses(example: Example, token: int, count: int) -> Example:
    """`count` times `token` behind the prompt and every step but the last, none of which the model has to write."""
    tokens: list[int] = []
    mask: list[bool] = []
    segments = []
    for begin, end in example.segments:
        start, pauses = len(tokens), 0 if end == len(example.tokens) else count
        tokens += [*example.tokens[begin:end], *[token] * pauses]
        mask += [*example.loss_mask[begin:end], *[False] * pauses]
        segments.append((start, len(tokens)))
    return Example(tuple(tokens), tuple(segments), tuple(mask), example.name)


def recut(example: Example, length: int) -> Example:
    """The answer cut into steps of `length` tokens, the last one shorter."""
    begin, end = example.segments[0][1], len(example.tokens)
    cuts = [*range(begin, end, length), end]
    return replace(example, segments=(example.segments[0], *itertools.pairwise(cuts)))


def _changed(dataset: Dataset, change: Callable[[Example], Example], what: str) -> Dataset:
    examples = [change(example) for example in dataset.examples]
    return Dataset(examples, dataset.dropped, f"{dataset.digest}, {what}", dataset.sources)


# --- models -----------------------------------------------------------------------------------------------------


def processor_parameters(lab: Lab, model: Any) -> int:
    """How many the experiment's own Processor has, for this backbone."""
    config = TrainingConfig(processor=processor_settings(lab.plan, {}))
    described = backbones.describe(model.config.to_dict())
    return processor_config(config, described, newline_token_ids(lab.tokenizer)).num_parameters()


def lora_rank(model: Any, parameters: int) -> int:
    """The rank whose adapters, in every linear layer but the head, are nearest to so many parameters."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linear)))


def insert_layer(model: Any, at: int, parameters: int, *, seed: int = 0) -> None:
    """Put a decoder layer into a Llama before layer `at`, in place: an identity whose MLP is as wide as makes its
    parameters nearest to so many.

    Weights as in `tiny_backbone`, but those that add to the residual stream are zero. ValueError where attention alone
    has more parameters.
    """
    layers, config = model.model.layers, copy.deepcopy(model.config)
    kind = type(layers[0])
    config.intermediate_size = 1
    smallest = sum(p.numel() for p in kind(config, at).parameters())
    width = 1 + round((parameters - smallest) / (3 * config.hidden_size))
    if width < 1:
        raise ValueError(f"a layer of this backbone has {smallest:,} parameters or more, but {parameters:,} are wanted")
    config.intermediate_size = width
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = kind(config, at)
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(parameter, std=0.0 if adds else parameter.shape[1] ** -0.5)
    layers.insert(at, layer.to(model.device, model.dtype))
    model.config.num_hidden_layers += 1
    for i, each in enumerate(layers):
        each.self_attn.layer_idx = i
        each.self_attn.config = model.config  # where the attention function's name is looked up


# --- scores -----------------------------------------------------------------------------------------------------


def _scored(lab: Lab, dataset: Dataset, likeliest: Callable[[Sequence[Example]], list[list[int]]]) -> list[bool]:
    """likeliest: a batch -> per example, the likeliest tokens where the loss mask is set, in order."""
    examples, right = dataset.examples, list[bool]()
    with torch.inference_mode():
        for begin in range(0, len(examples), lab.batch_size):
            batch = list(examples[begin : begin + lab.batch_size])
            for example, told in zip(batch, likeliest(batch), strict=True):
                right.append(told == [t for t, wanted in zip(example.tokens, example.loss_mask, strict=True) if wanted])
    return right


def _losses(lab: Lab, dataset: Dataset, losses: Callable[[Sequence[Example]], Losses]) -> Losses:
    """In batches of similar length."""
    examples = dataset.examples
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    sums, counts = torch.zeros(len(order), 2, dtype=torch.float64), torch.zeros(len(order), 2, dtype=torch.long)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # of random positions
        for begin in range(0, len(order), lab.batch_size):
            rows = order[begin : begin + lab.batch_size]
            found = losses([examples[i] for i in rows])
            sums[rows], counts[rows] = found.sums, found.counts
    return Losses(sums, counts)


def _likeliest(backbone: PackedBackbone, batch: Sequence[Example]) -> list[list[int]]:
    backbone.model.eval()
    wanted = [[i for i, of in enumerate(e.loss_mask[1:]) if of] for e in batch]
    stretch = Stretch([e.tokens[:-1] for e in batch], [0] * len(batch), wanted)
    best = iter(backbone.forward(stretch).logits.argmax(1).tolist())
    return [[next(best) for _ in of_one] for of_one in wanted]


def _narrow(path: Path) -> None:
    """All tensors of a file to bfloat16."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({name: t.to(torch.bfloat16) for name, t in load_file(path).items()}, path, metadata=about)


def _fields(schedule: Schedule) -> dict[str, Any]:
    """Of a stage's configuration. Examples come as data sets; the file is named for the record."""
    curriculum = {"files": ["curriculum"], "iterations": schedule.curriculum_iterations}
    return {
        "iterations": schedule.iterations,
        "learning_rate": schedule.learning_rate,
        "curriculum": curriculum if schedule.curriculum_iterations else {},
    }
