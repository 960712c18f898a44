"""The two stages, step by step (arXiv 2505.16950, training): a notebook calls `step`, a program `run`.

    trainer = ProcessorTrainer(model, tokenizer, data, held_back, config, output="run")
    record = trainer.step()            # one optimiser step
    trainer.evaluate().sentence()
    trainer.run()                      # the rest, with progress, logs, evaluations and checkpoints
    trainer.export("run/processor")

On several devices (accelerate launch, torchrun) each process holds a copy and sees its share of every batch. The
gradients are summed once per step, by hand: a roll-out has as many backward passes as the longest answer of its batch
has steps, which differs between devices, so hooks that communicate in each of them would wait for one another.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import model_weights_hash, taking_place_of
from ..boundary import newline_token_ids
from ..config import CacheProcessorConfig
from ..module import CacheProcessorModule
from .config import ProcessorConfig, SFTConfig, TrainingConfig, check_same_run, differences
from .data import Dataset, Example, batches, num_batches
from .evaluate import Evaluation, compare
from .packed import PackedBackbone
from .rollout import METHOD, Losses, Variant, count_targets, rollout, supervised

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHECKPOINT_FORMAT = 2
_OPTIMIZER = "optimizer."  # how its tensors are called in a checkpoint: optimizer.NUMBER OF A PARAMETER.NAME


class NonFiniteLossError(ValueError):
    """A loss or a gradient is no number; the parameters are those of the iteration before."""


@dataclass(frozen=True)
class Record:
    """One optimiser step.

    iteration: 1 for the first. loss: nats per token, of the whole batch on all devices. learning_rate, gradient_norm
    (before clipping). tokens: of prompts and answers. seconds: wall clock.
    """

    iteration: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


class Trainer(abc.ABC):
    """What the stages share.

    data, held_back: of `load_examples`, split. curriculum: replaces `data` in the first iterations; take out of it what
        is held back (`Dataset.without`).
    config: of the run. settings: of this stage.
    output: where checkpoints and logs go, made if need be; None: nowhere, and `save` fails.
    accelerator: accelerate's; default: a new one.

    iteration: steps done; total: steps there will be. Seeds torch's default generators.
    """

    name: str

    def __init__(
        self,
        backbone: PackedBackbone,
        parameters: Mapping[str, torch.nn.Parameter],
        data: Dataset,
        held_back: Dataset,
        config: TrainingConfig,
        settings: SFTConfig | ProcessorConfig,
        output: str | os.PathLike[str] | None,
        accelerator: Accelerator,
        curriculum: Dataset | None = None,
    ) -> None:
        self.backbone, self.data, self.held_back, self.curriculum = backbone, data, held_back, curriculum
        self.config, self.settings, self.accelerator = config, settings, accelerator
        self.output = None if output is None else Path(output)
        self.parameters = dict(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.iteration = 0
        self.total = planned_iterations(settings, data, curriculum, accelerator.num_processes)
        self._stream: Iterator[list[Example]] | None = None
        self._signal: int | None = None
        torch.manual_seed(config.seed + accelerator.process_index)

    # --- what a stage is ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def losses(self, batch: Sequence[Example], denominator: float | None = None) -> Losses:
        """Of a batch on this device; with a denominator, adds the gradients of sum / denominator."""

    @abc.abstractmethod
    def evaluate(self) -> Evaluation:
        """On the held-back examples, by all devices together."""

    @abc.abstractmethod
    def export(self, directory: str | os.PathLike[str], **about: Any) -> None:
        """Write the result for use."""

    # --- a step ---------------------------------------------------------------------------------------------------

    def step(self) -> Record:
        """One optimiser step on the next batch.

        Raises NonFiniteLossError, naming the examples, where a loss or the gradient is not finite; nothing has changed
        then but the gradients.
        """
        began = time.perf_counter()
        if self._stream is None:
            self._stream = self._batches(self.iteration * self.settings.accumulation)
        passes = list(itertools.islice(self._stream, self.settings.accumulation))
        targets = self._sum(float(sum(count_targets(batch) for batch in passes)))
        self.optimizer.zero_grad()
        found = [self.losses(batch, max(targets, 1.0)) for batch in passes]
        tokens = self._sum(float(sum(len(e.tokens) for batch in passes for e in batch)))
        loss = self._sum(float(sum(losses.sums.sum() for losses in found))) / max(targets, 1.0)
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:  # alone it would be copied
                parameter.grad = self.accelerator.reduce(parameter.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip))
        if not math.isfinite(loss + norm):
            self._refuse(passes, found)
        rate = self.settings.rate(self.iteration, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1
        return Record(self.iteration, loss, rate, norm, int(tokens), time.perf_counter() - began)

    def _refuse(self, passes: Sequence[Sequence[Example]], found: Sequence[Losses]) -> None:
        pairs = [(e, s) for batch, of in zip(passes, found, strict=True) for e, s in zip(batch, of.sums, strict=True)]
        guilty = [e.name for e, sums in pairs if not bool(sums.isfinite().all())]
        what = f"the loss of {', '.join(guilty)} is" if guilty else "the gradient is"
        of_batch = "" if guilty else f"; this device's batch was {', '.join(e.name for e, _ in pairs)}"
        raise NonFiniteLossError(
            f"{self.name}: {what} not finite in iteration {self.iteration + 1}{of_batch}; nothing was changed: look at "
            "these examples, or go on from the last checkpoint with a lower learning_rate"
        )

    def _batches(self, skip: int) -> Iterator[list[Example]]:
        """This device's batches of the whole run, without the first `skip`."""
        early = _curriculum_iterations(self.settings, self.curriculum) * self.settings.accumulation
        if self.curriculum is not None and skip < early:
            yield from itertools.islice(self._epochs(self.curriculum, skip), early - skip)
        yield from self._epochs(self.data, max(0, skip - early))

    def _epochs(self, data: Dataset, skip: int) -> Iterator[list[Example]]:
        world = self.accelerator.num_processes
        epoch, start = divmod(skip, num_batches(data, batch_size=self.settings.batch_size, world_size=world))
        for number in itertools.count(epoch):
            yield from batches(
                data,
                batch_size=self.settings.batch_size,
                seed=self.config.seed,
                epoch=number,
                rank=self.accelerator.process_index,
                world_size=world,
                start=start if number == epoch else 0,
                bucket=self.config.data.bucket,
            )

    def _sum(self, value: float) -> float:
        """Over all devices."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor)[0])

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _held_back(self, rewritten: bool) -> Losses:
        """Losses of the held-back examples, in their order. rewritten: as this stage trains, else plain."""
        examples = self.held_back.examples
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
        size, rank, world = self.settings.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        table = torch.zeros(len(examples), 4, dtype=torch.float64)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.config.seed + rank)
            for begin in range(rank * size, len(order), world * size):
                rows = order[begin : begin + size]
                batch = [examples[i] for i in rows]
                found = self.losses(batch) if rewritten else supervised(self.backbone, batch)
                table[rows] = torch.cat([found.sums, found.counts.double()], 1)
        if world > 1:
            table = self.accelerator.reduce(table.to(self.accelerator.device)).cpu()
        return Losses(table[:, :2], table[:, 2:].long())

    # --- a run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `total`, showing progress; log, evaluate and save as configured and at the end.

        SIGTERM and SIGINT (Ctrl-C) save after the step under way and then end the run, behind its last step too: with
        SystemExit(143) and KeyboardInterrupt. Writes NAME.csv (a line per step), NAME.evaluations.jsonl,
        NAME.checkpoint, and events for TensorBoard where that is installed.
        """
        from tqdm import tqdm

        settings, main = self.settings, self.accelerator.is_main_process
        with (
            self._signals(),
            contextlib.closing(_Log(self.output if main else None, self.name, self.iteration)) as log,
            tqdm(total=self.total, initial=self.iteration, desc=self.name, unit="it", disable=not main) as bar,
        ):
            stop = False
            while self.iteration < self.total and not stop:
                record = self.step()
                log.write(record)
                bar.set_postfix_str(
                    f"loss {record.loss:.4f}, {record.tokens / record.seconds:,.0f} tokens/s", refresh=False
                )
                bar.update()
                stop = self._sum(float(self._signal is not None)) > 0
                done = self.iteration == self.total
                if done or self.iteration % settings.evaluate_every == 0:
                    evaluation = self.evaluate()
                    log.write_evaluation(self.iteration, evaluation)
                    if main:
                        bar.write(f"{self.name}, iteration {self.iteration}: {self._describe(evaluation)}")
                if self.output is not None and (done or stop or self.iteration % settings.save_every == 0):
                    self.save()
        # Again, on all devices alike: it may have come in the last evaluation or save.
        if self._sum(float(self._signal is not None)) > 0:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _describe(self, evaluation: Evaluation) -> str:
        return evaluation.sentence()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Remember SIGTERM and SIGINT instead of dying of them. Only the main thread may."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number

        self._signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """Where `save` writes. ValueError without an output directory."""
        if self.output is None:
            raise ValueError("this trainer has no output directory: give it one")
        return self.output / f"{self.name}.checkpoint"

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run goes on: configuration, number of devices, data, its split, backbone."""
        return {
            "config": self.config.to_dict(),
            "num_devices": self.accelerator.num_processes,
            "data": self.data.digest,
            "curriculum": None if self.curriculum is None else self.curriculum.digest,
            "examples": {
                "data": self.data.part,
                "held_back": self.held_back.part,
                "curriculum": None if self.curriculum is None else self.curriculum.part,
            },
            "backbone": self._backbone,
        }

    _backbone: Mapping[str, Any] = {}

    def save(self) -> None:
        """Write the checkpoint: weights, optimiser, data position, random state, configuration and data digest.

        A safetensors file: nothing is pickled. Under a temporary name, flushed and renamed: OSError where the disk
        refuses, and then the earlier one is as it was. Of several devices the first one writes.
        """
        if self.accelerator.is_main_process:
            # Nothing goes on from a finished stage.
            optimizer = self.optimizer.state_dict() if self.iteration < self.total else None
            state = {
                "format": _CHECKPOINT_FORMAT,
                "fingerprint": self.fingerprint(),
                "iteration": self.iteration,
                "groups": None if optimizer is None else optimizer["param_groups"],
            }
            tensors = {f"parameters.{name}": p.detach() for name, p in self.parameters.items()}
            tensors["random"] = torch.get_rng_state()
            for number, of_parameter in ({} if optimizer is None else optimizer["state"]).items():
                tensors |= {f"{_OPTIMIZER}{number}.{name}": tensor for name, tensor in of_parameter.items()}
            _write_atomically(self.checkpoint, tensors, state)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the checkpoint: on one CPU, with the same bits as without the interruption.

        Raises ValueError where there is none, or where it is damaged or of another configuration, number of devices,
        data, split of it or backbone, listing what differs.
        """
        path = self.checkpoint
        if not path.exists():
            raise ValueError(f"{path} does not exist: there is nothing to resume")
        try:
            with safe_open(path, framework="pt", device=str(self.accelerator.device)) as file:
                state = json.loads((file.metadata() or {}).get("state", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}): start again without --resume") from None
        if not isinstance(state, dict) or state.get("format") != _CHECKPOINT_FORMAT:
            raise ValueError(f"{path} is no checkpoint of this version: start again without --resume")
        now = json.loads(json.dumps(self.fingerprint()))
        # What checkpoints of before do not say.
        unsaid = {"num_devices": self.accelerator.num_processes, "examples": now["examples"]}
        check_same_run(path, unsaid | state["fingerprint"], now)
        if "examples" not in state["fingerprint"]:
            self.accelerator.print(
                f"{path} does not say which examples were held back: if the version that wrote it held back others, "
                "evaluations are of some that it trained on"
            )
        for name, parameter in self.parameters.items():
            if (stored := tensors.get(f"parameters.{name}")) is None or stored.shape != parameter.shape:
                raise ValueError(f"{path} lacks the parameter {name} of this shape: start again without --resume")
        self.iteration = state["iteration"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameters.{name}"])
        if state["groups"] is not None:
            of_parameters: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(_OPTIMIZER):
                    number, name = key.removeprefix(_OPTIMIZER).split(".", 1)
                    of_parameters.setdefault(int(number), {})[name] = tensor
            self.optimizer.load_state_dict({"state": of_parameters, "param_groups": state["groups"]})
        if self.accelerator.num_processes == 1:
            torch.set_rng_state(tensors["random"].cpu())
        else:
            torch.manual_seed(self.config.seed + self.accelerator.process_index + 1000 * self.iteration)
        self._stream = None


class BackboneTrainer(Trainer):
    """Stage 1: supervised fine-tuning of `model` on the answers, in place; full, or by LoRA adapters.

    model: of transformers, float32. tokenizer: exported with it. Others as for `Trainer`.
    trained: with method "full", how the names of the parameters begin that are trained; default: all are.
    Raises NotImplementedError for a model that cannot be trained for, ImportError where peft is needed and missing.
    """

    name = "sft"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        held_back: Dataset,
        config: TrainingConfig,
        *,
        output: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        curriculum: Dataset | None = None,
        backbone_name: str | None = None,
        trained: tuple[str, ...] = ("",),
    ) -> None:
        accelerator = make_accelerator() if accelerator is None else accelerator
        self.model, self.tokenizer = model.to(accelerator.device), tokenizer
        self._backbone = backbone_of(model, backbone_name)
        self._adapted: Any = None
        if config.sft.method == "lora":
            self._adapted = _adapt(model, config)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(trained))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        backbone = PackedBackbone(model)
        super().__init__(backbone, parameters, data, held_back, config, config.sft, output, accelerator, curriculum)
        self._before: Losses | None = None

    def losses(self, batch: Sequence[Example], denominator: float | None = None) -> Losses:
        self.model.train(denominator is not None)
        with torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16", cache_enabled=True
        ):
            return supervised(self.backbone, batch, denominator=denominator)

    def evaluate(self) -> Evaluation:
        """The model as it is ("processor") against the first evaluation of this object ("identity")."""
        now = self._held_back(rewritten=True)
        self._before = now if self._before is None else self._before
        return compare(self._before, now, seed=self.config.seed)

    def _describe(self, evaluation: Evaluation) -> str:
        c = evaluation.kinds["all"]
        return f"cross-entropy {c.processor:.4f} (n = {evaluation.examples} examples, {c.tokens:,} tokens)"

    def export(self, directory: str | os.PathLike[str], **about: Any) -> None:
        """Write model (in the run's dtype, adapters merged) and tokenizer as `save_pretrained` does, and README.md.

        Everything is written beside `directory` and then takes its place. about: for the model card.
        """
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted = None
        from .card import backbone_card

        self.model.to(getattr(torch, self.config.dtype))
        self.model.eval().requires_grad_(False)
        with taking_place_of(directory) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            (unfinished / "README.md").write_text(backbone_card(self, **about), encoding="utf-8")

    def export_adapter(self, directory: str | os.PathLike[str], *, backbone: str | None = None) -> None:
        """Write the adapters of `sft.method: lora` alone, as peft does, their matrices in bfloat16.

        Everything is written beside `directory` and then takes its place. backbone: what its configuration calls the
        model, for peft to find it. ValueError for another method.
        """
        if self._adapted is None:
            raise ValueError(f"sft.method is {self.config.sft.method!r}, but only lora has adapters to write")
        self._adapted.peft_config["default"].base_model_name_or_path = backbone
        adapters = {n: t.to(torch.bfloat16) for n, t in self._adapted.state_dict().items() if ".lora_" in n}
        with taking_place_of(directory) as unfinished:
            # With embeddings it would ask the hub about `backbone`.
            self._adapted.save_pretrained(unfinished, state_dict=adapters, save_embedding_layers=False)
            (unfinished / "README.md").unlink(missing_ok=True)  # peft's is an empty form


class ProcessorTrainer(Trainer):
    """Stage 2: a Processor for `model`, which stays frozen.

    model: of transformers, in the run's dtype; its parameters stop requiring gradients.
    tokenizer: tells the line-ending tokens, which the checkpoint will list.
    processor: where to start; default: a new one, whose edits are exactly zero.
    backbone_name: for the checkpoint; default: what the model calls itself.

    Raises NotImplementedError for a model that cannot be trained for, and ValueError where `processor` is for another
    one, or where processor.layers names a layer that there is not.
    """

    name = "processor"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        held_back: Dataset,
        config: TrainingConfig,
        *,
        output: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        curriculum: Dataset | None = None,
        processor: CacheProcessorModule | None = None,
        backbone_name: str | None = None,
    ) -> None:
        accelerator = make_accelerator() if accelerator is None else accelerator
        settings = config.processor
        model.to(accelerator.device).requires_grad_(False).eval()
        backbone = PackedBackbone(model)
        self._backbone = backbone_of(model, backbone_name)
        described = {**backbone.description, "head_dim": backbone.head_dim, "backbone": dict(self._backbone)}
        made = processor_config(config, described, newline_token_ids(tokenizer))
        if processor is None:
            processor = CacheProcessorModule(made)
            _initialize(processor, settings, config.seed)
        elif changed := _unlike(processor.config, made):
            raise ValueError(f"this Processor cannot be trained on here: {'; '.join(changed)}")
        self.processor = processor.to(accelerator.device)
        self.processor.config = made
        self.variant = Variant(
            selection=settings.selection,  # type: ignore[arg-type]
            write=settings.write,  # type: ignore[arg-type]
            positions=settings.positions,
        )
        _silence(self.processor, settings)
        super().__init__(
            backbone,
            dict(self.processor.named_parameters()),
            data,
            held_back,
            config,
            settings,
            output,
            accelerator,
            curriculum,
        )
        self._identity: Losses | None = None

    def losses(self, batch: Sequence[Example], denominator: float | None = None) -> Losses:
        return rollout(
            self.backbone,
            self.processor,
            batch,
            denominator=denominator,
            variant=self.variant,
            autocast=torch.bfloat16 if self.config.dtype == "bfloat16" else None,
        )

    def evaluate(self) -> Evaluation:
        """The Processor against none, which is the identity Processor."""
        if self._identity is None:
            self._identity = self._held_back(rewritten=False)
        return compare(self._identity, self._held_back(rewritten=True), seed=self.config.seed)

    def export(self, directory: str | os.PathLike[str], **about: Any) -> None:
        """Write the Processor's checkpoint and a model card, README.md; see `checkpoint.save_checkpoint`.

        about: for the model card. Raises NotImplementedError where the Processor was trained with something that no
        checkpoint expresses: it would compute something else wherever it is loaded.
        """
        if self.variant != METHOD:
            changed = differences(asdict(METHOD), asdict(self.variant), "processor.")
            raise NotImplementedError(
                f"not exported, since only training knows this ablation ({'; '.join(changed)}): evaluate it here"
            )
        from .card import processor_card, training_record

        self.processor.config = _with_training(self.processor.config, training_record(self, **about))
        self.processor.save_pretrained(directory)
        Path(directory, "README.md").write_text(processor_card(self, **about), encoding="utf-8")


def make_accelerator() -> Accelerator:
    """accelerate's view of the devices; ImportError, saying what to install, without it."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(f"accelerate is missing: install bottlenecked with its extra [training] ({error})") from None
    return Accelerator()


def planned_iterations(
    settings: SFTConfig | ProcessorConfig, data: Dataset, curriculum: Dataset | None = None, num_devices: int = 1
) -> int:
    """How many optimiser steps a stage has. ValueError where the data is too little or the curriculum too long."""
    count = num_batches(data, batch_size=settings.batch_size, world_size=num_devices)
    early = _curriculum_iterations(settings, curriculum)
    if curriculum is not None:
        num_batches(curriculum, batch_size=settings.batch_size, world_size=num_devices)
    if settings.iterations is None:
        return early + max(1, int(settings.epochs * count / settings.accumulation))
    if early >= settings.iterations:
        raise ValueError(
            f"curriculum.iterations is {early}, but it must be less than iterations, which is {settings.iterations}"
        )
    return settings.iterations


def _curriculum_iterations(settings: SFTConfig | ProcessorConfig, curriculum: Dataset | None) -> int:
    return 0 if curriculum is None else settings.curriculum.iterations


def processor_config(
    config: TrainingConfig, described: Mapping[str, Any], token_ids: tuple[int, ...]
) -> CacheProcessorConfig:
    """The checkpoint's configuration. described: as of `backbones.describe`. token_ids: the line-ending ones.

    ValueError where processor.layers names a layer that there is not.
    """
    settings, last = config.processor, described["num_layers"] - 1
    if settings.layers is not None and max(settings.layers) > last:
        raise ValueError(f"processor.layers names layer {max(settings.layers)}, but the backbone's are 0 to {last}")
    return CacheProcessorConfig(
        **described,
        processor_dim=settings.dim,
        processor_heads=settings.heads,
        processor_mlp_dim=settings.mlp_dim,
        top_k=settings.top_k,
        recent_window=settings.recent_window,
        rewrite_prompt=settings.rewrite_prompt,
        key_space=settings.key_space,  # type: ignore[arg-type]
        norm_eps=settings.norm_eps,
        boundary=settings.boundary(token_ids),
    )


def backbone_of(model: PreTrainedModel, name: str | None = None) -> dict[str, Any]:
    """What a checkpoint remembers of its backbone: name, architecture, hashes of its configuration and weights."""
    found = dict(PackedBackbone(model).description["backbone"])
    found["name"] = name or Path(str(model.config.name_or_path or "")).name or None
    digest = model_weights_hash(model)
    return found if digest is None else found | {"weights_hash": digest}


def _adapt(model: PreTrainedModel, config: TrainingConfig) -> Any:
    """Put LoRA adapters into `model`; returns peft's wrapper."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"sft.method lora: install bottlenecked with its extra [training] ({error})") from None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapters = LoraConfig(r=config.sft.lora_rank, lora_alpha=config.sft.lora_alpha, target_modules="all-linear")
        return get_peft_model(model, adapters)


def _initialize(processor: CacheProcessorModule, settings: ProcessorConfig, seed: int) -> None:
    """Matrices with the fan-in's standard deviation, half of it where they add to the residual stream, gates as told.

    So that signals keep their size in narrow Processors too, where the 0.02 of `initial_weights` lets attention start
    from nothing. `out_proj` stays zero: the first edits are exactly zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        processor.get_parameter("gate").fill_(settings.gate)
        for name, parameter in processor.named_parameters():
            if parameter.ndim == 3 and not name.startswith("out_proj"):
                scale = parameter.shape[2] ** -0.5 * (0.5 if name.startswith(("o_proj", "down_proj")) else 1.0)
                parameter.normal_(std=scale, generator=generator)


def _silence(processor: CacheProcessorModule, settings: ProcessorConfig) -> None:
    """Ablations that a checkpoint expresses: rows of `out_proj` that are zero and get no gradient edit nothing."""
    num_layers, width = processor.config.num_layers, processor.config.kv_width
    kept = torch.ones(num_layers, width)
    if settings.layers is not None:
        kept[[i for i in range(num_layers) if i not in settings.layers]] = 0
    if settings.edit == "keys":
        kept[:, width // 2 :] = 0
    elif settings.edit == "values":
        kept[:, : width // 2] = 0
    weights = torch.zeros_like(kept) if settings.constant else kept
    if bool(weights.all()):
        return
    for name, mask in (("out_proj_weight", weights[..., None]), ("out_proj_bias", kept)):
        parameter = processor.get_parameter(name)
        mask = mask.to(parameter)
        with torch.no_grad():
            parameter.mul_(mask)

        def silence(gradient: Tensor, mask: Tensor = mask) -> Tensor:
            return gradient * mask

        parameter.register_hook(silence)  # type: ignore[no-untyped-call]


def _unlike(given: CacheProcessorConfig, wanted: CacheProcessorConfig) -> list[str]:
    """What differs but for what is only described."""
    before, now = given.to_dict(), wanted.to_dict()
    for values in (before, now):
        values.pop("training")
        values["backbone"] = {key: values["backbone"].get(key) for key in ("config_hash", "weights_hash")}
    return differences(before, now)


def _with_training(config: CacheProcessorConfig, record: dict[str, Any]) -> CacheProcessorConfig:
    return CacheProcessorConfig.from_dict(config.to_dict() | {"training": record})


class _Log:
    """NAME.csv, NAME.evaluations.jsonl and TensorBoard's events; what a resumed run does again is cut off first."""

    def __init__(self, output: Path | None, name: str, iteration: int) -> None:
        self.board: Any = None
        self.rows: Any = None
        self.evaluations: Any = None
        if output is None:
            return
        output.mkdir(parents=True, exist_ok=True)
        table, evaluations = output / f"{name}.csv", output / f"{name}.evaluations.jsonl"
        fields = list(Record.__dataclass_fields__)
        kept = [] if not iteration or not table.exists() else list(csv.DictReader(table.read_text().splitlines()))
        self.rows = table.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.rows, fields)
        self.writer.writeheader()
        self.writer.writerows(row for row in kept if int(row["iteration"]) <= iteration)
        lines = evaluations.read_text().splitlines() if iteration and evaluations.exists() else []
        self.evaluations = evaluations.open("w", encoding="utf-8")
        self.evaluations.writelines(f"{x}\n" for x in lines if json.loads(x)["iteration"] <= iteration)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(output / "tensorboard" / name), purge_step=iteration)

    def write(self, record: Record) -> None:
        if self.rows is None:
            return
        self.writer.writerow(asdict(record))
        self.rows.flush()
        if self.board is not None:
            for key in ("loss", "learning_rate", "gradient_norm"):
                self.board.add_scalar(key, getattr(record, key), record.iteration)

    def write_evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        if self.evaluations is None:
            return
        self.evaluations.write(json.dumps({"iteration": iteration, **evaluation.to_dict()}) + "\n")
        self.evaluations.flush()
        if self.board is not None:
            for kind, found in evaluation.kinds.items():
                self.board.add_scalar(f"held_back/{kind}", found.processor, iteration)

    def close(self) -> None:
        for file in (self.rows, self.evaluations, self.board):
            if file is not None:
                file.close()


def _write_atomically(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """A safetensors file; state: JSON values, in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, {"state": json.dumps(state)})
        except SafetensorError as error:
            raise OSError(f"{unfinished} cannot be written: {error}; {path} is as it was") from error
        # safetensors lets nobody else read what it writes: whoever may read the directory may read this.
        unfinished.chmod(path.parent.stat().st_mode & 0o666)
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(unfinished, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


__all__ = [
    "BackboneTrainer",
    "NonFiniteLossError",
    "ProcessorTrainer",
    "Record",
    "Trainer",
    "backbone_of",
    "make_accelerator",
    "planned_iterations",
    "processor_config",
]
