"""A whole run: both stages, from a backbone and JSONL files to a directory that everything else can use.

OUTPUT/train.yaml       the configuration, defaults included
OUTPUT/backbone/        stage 1: the fine-tuned backbone, as `save_pretrained` writes it, with a model card
OUTPUT/processor/       stage 2: the Processor's checkpoint, with a model card
OUTPUT/*.csv, *.evaluations.jsonl, tensorboard/      logs
OUTPUT/*.checkpoint     what --resume goes on from
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import backbones
from ..boundary import newline_token_ids
from .config import TrainingConfig, check_same_run
from .data import HELD_BACK, Dataset, load_examples
from .evaluate import Evaluation
from .trainer import (
    BackboneTrainer,
    ProcessorTrainer,
    Trainer,
    make_accelerator,
    planned_iterations,
    processor_config,
)


def train(
    backbone: str | Path,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: TrainingConfig | None = None,
    *,
    resume: bool = False,
) -> Evaluation:
    """Train both stages and export them; see the module's text. Returns the Processor's final evaluation.

    backbone: a model's directory, a .gguf file, or "smollm2". files: JSONL, never test sets.
    resume: go on with the run in `output`; it must have been made with the same config, number of devices, data and
        backbone.

    Raises ValueError, OSError, ImportError and NotImplementedError, each in one sentence; all that can be checked is
    checked before anything is written. NotImplementedError at the end where the Processor's ablation cannot be
    exported.
    """
    config = TrainingConfig() if config is None else config
    directory = Path(output)
    accelerator = make_accelerator()
    if accelerator.is_main_process and not resume and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"--output {directory} is not empty: give another directory, or --resume its run")
    if resume and not (directory / "train.yaml").exists():
        raise ValueError(f"{directory} holds no run to resume: leave out --resume")
    if resume:  # not left to the checkpoints: other stages have none yet
        path = directory / "train.yaml"
        check_same_run(path, TrainingConfig.load(path).to_dict(), config.to_dict())
    tokenizer = backbones.load_tokenizer(backbone)
    boundary = config.processor.boundary()

    def load(paths: Sequence[str | os.PathLike[str]]) -> Dataset:
        return load_examples(
            paths,
            tokenizer,
            template=config.data.template,
            max_length=config.data.max_length,
            keep_marks=config.data.keep_marks,
            cache_dir=config.data.cache,
            boundary=boundary,
        )

    def load_curriculum(paths: Sequence[str]) -> Dataset:
        kept = load(paths).without(held_back)
        if dropped := kept.dropped.get(HELD_BACK):
            accelerator.print(f"{', '.join(paths)}: {dropped:,} examples dropped, {HELD_BACK}")
        return kept

    data, held_back = load(files).split(config.data.held_back, seed=config.seed)
    curricula = [
        load_curriculum(c.files) if c.files else None for c in (config.sft.curriculum, config.processor.curriculum)
    ]
    name, names = Path(backbone).name, [Path(file).name for file in files]
    if config.sft.method != "none":
        planned_iterations(config.sft, data, curricula[0], accelerator.num_processes)
    # Mistakes about the second stage are told before the first, which takes hours.
    planned_iterations(config.processor, data, curricula[1], accelerator.num_processes)
    processor_config(config, backbones.describe(backbone), newline_token_ids(tokenizer))

    def start(trainer: Trainer) -> None:
        if resume and trainer.checkpoint.exists():
            trainer.resume()
        elif accelerator.is_main_process and not resume:
            # Not before: what a refused start had written would be in the way of the next.
            directory.mkdir(parents=True, exist_ok=True)
            config.save(directory / "train.yaml")

    def finish(trainer: Trainer, target: Path) -> Evaluation:
        trainer.run()
        found = trainer.evaluate()
        if accelerator.is_main_process:
            trainer.export(target, files=names, evaluation=found)
        accelerator.wait_for_everyone()
        return found

    source: str | Path = backbone
    if config.sft.method != "none":
        source = directory / "backbone"
        model, _ = backbones.load(backbone)
        stage = BackboneTrainer(
            model,
            tokenizer,
            data,
            held_back,
            config,
            output=directory,
            accelerator=accelerator,
            curriculum=curricula[0],
            backbone_name=name,
        )
        start(stage)
        if not (stage.iteration == stage.total and source.exists()):
            finish(stage, source)
        del stage, model
    model, tokenizer = backbones.load(source, dtype=config.dtype)  # type: ignore[arg-type]
    processor = ProcessorTrainer(
        model,
        tokenizer,
        data,
        held_back,
        config,
        output=directory,
        accelerator=accelerator,
        curriculum=curricula[1],
        backbone_name=name if config.sft.method == "none" else f"{name}, fine-tuned",
    )
    start(processor)
    return finish(processor, directory / "processor")


__all__ = ["train"]
