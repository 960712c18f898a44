"""A training step of stage 2 (a Processor, its backbone frozen) beside one of stage 1 (the backbone, full fine-tuning).

The same batch for both, of the shape of grade-school problems: prompts of 40 to 70 tokens, answers of three to five
lines. A step is everything: batch, forward, backward, clipping, AdamW. Both run as `bottlenecked train` runs them:
without padding in the products, logits only where there is a loss, so the baseline is a strong one.

time_ratio     our seconds over fine-tuning's: the median over pairs of neighbouring steps
memory_ratio   peak memory of two steps over fine-tuning's, each in a process of its own: model, gradients, optimiser,
               activations; what the libraries take before there is a model is left out

First the check: an identity Processor's loss must be that of plain cross-entropy.

Weights do not matter here: shapes without weights at hand are made on the spot. With a GPU both run there.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import checks, models, processes
from benchmarks.cases.memory import peak_memory, release_freed, reset_peak_memory
from benchmarks.harness import OURS, Contender, Context, Figure, figure
from benchmarks.inputs import SEED, Setting
from bottlenecked import backbones
from bottlenecked.training.config import ProcessorConfig, SFTConfig, TrainingConfig
from bottlenecked.training.data import Dataset, Example
from bottlenecked.training.trainer import BackboneTrainer, ProcessorTrainer, Trainer

_NEWLINE, _EOS = 5, 6  # ids without a meaning: nothing is decoded
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def run(context: Context) -> Iterator[Figure]:
    for setting in context.settings(processor_dims=(128,), dtypes=("float32",), batches=(8,)):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    stages: dict[str, Trainer] = {name: make(setting, name) for name in ("sft", OURS)}
    batch = list(stages[OURS].data.examples)
    plain, identity = (stages[name].losses(batch).mean for name in ("sft", OURS))
    if not abs(identity - plain) <= _TOLERANCE[setting.dtype] * plain:
        checks.refuse(setting, f"the identity Processor's loss is {identity}, and plain cross-entropy is {plain}")
    contenders = {name: Contender(functools.partial(step, trainer)) for name, trainer in stages.items()}
    times = context.measure(contenders, threads=setting.threads, scrub=False)
    stages.clear()
    contenders.clear()
    gc.collect()
    if torch.cuda.is_available():  # the processes that measure memory need the device's
        torch.cuda.empty_cache()
    memory = {name: memory_of(setting, name) for name in ("sft", OURS)}
    return figure(
        "training",
        setting.describe("prior", "step", "top_k"),
        times,
        backbone=setting.shape,
        tokens=sum(len(example.tokens) for example in batch),
        time_ratio=statistics.median(o / s for o, s in zip(times[OURS], times["sft"], strict=True)),
        memory_ratio=memory[OURS] / memory["sft"],
        peak_bytes=memory[OURS],
        sft_peak_bytes=memory["sft"],
    )


def step(trainer: Trainer) -> None:
    trainer.step()
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def make(setting: Setting, stage: str) -> Trainer:
    """A trainer whose every batch is the same examples."""
    examples = problems(setting)
    config = TrainingConfig(
        dtype=setting.dtype,
        sft=SFTConfig(batch_size=setting.batch, iterations=10**6),
        processor=ProcessorConfig(
            dim=setting.processor_dim,
            heads=setting.processor_dim // 32,
            mlp_dim=setting.processor_dim * 35 // 8,
            top_k=setting.top_k,
            batch_size=setting.batch,
            iterations=10**6,
        ),
    )
    data = Dataset(examples)
    if stage == "sft":
        return BackboneTrainer(model(setting, torch.float32), _Tokenizer(), data, data, config)
    return ProcessorTrainer(model(setting, getattr(torch, setting.dtype)), _Tokenizer(), data, data, config)


def model(setting: Setting, dtype: torch.dtype) -> PreTrainedModel:
    if setting.shape == "smollm2":
        return backbones.load("smollm2")[0].to(dtype)
    if setting.shape not in models.WIDTHS:
        checks.refuse(setting, f"choose a shape of {', '.join(['smollm2', *models.WIDTHS])}")
    return models.make(setting.shape, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)


def problems(setting: Setting) -> list[Example]:
    rng = np.random.default_rng(SEED)
    made = []
    for i in range(setting.batch):
        tokens = rng.integers(10, 500, rng.integers(40, 71)).tolist()
        segments, mask = [(0, len(tokens))], [False] * len(tokens)
        lines = [*rng.integers(14, 29, rng.integers(2, 5)).tolist(), 6]
        for number, length in enumerate(lines):
            end = _EOS if number == len(lines) - 1 else _NEWLINE
            segments.append((len(tokens), len(tokens) + length))
            tokens += [*rng.integers(10, 500, length - 1).tolist(), end]
            mask += [True] * length
        made.append(Example(tuple(tokens), tuple(segments), tuple(mask), f"made:{i}"))
    return made


def memory_of(setting: Setting, stage: str) -> int:
    """Peak bytes of two steps, in a process of its own."""
    request = {"setting": asdict(setting), "stage": stage}
    done = processes.child("benchmarks.cases.training", request, stderr=subprocess.PIPE)
    if done.returncode:
        checks.refuse(setting, f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def child(setting: Setting, stage: str) -> int:
    torch.set_num_threads(setting.threads)
    libraries = reset_peak_memory()
    trainer = make(setting, stage)
    release_freed()
    on_gpu = trainer.accelerator.device.type == "cuda"
    trainer.step()  # the optimiser's state is made now
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_memory()
    trainer.step()
    return int(torch.cuda.max_memory_allocated()) if on_gpu else peak_memory() - libraries


class _Tokenizer:
    """Tells which token ends a line; nothing else is asked of it."""

    def __len__(self) -> int:
        return _NEWLINE + 1

    def decode(self, ids: list[int]) -> Any:
        return "\n" if ids == [_NEWLINE] else "x"


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(child(Setting(**asked["setting"]), asked["stage"]))
