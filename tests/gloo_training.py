"""One process of tests/test_trainer.py's two: trains a few steps and writes what came out.

RANK=0 WORLD_SIZE=2 ... python -m tests.gloo_training BATCH_SIZE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bottlenecked.training.config import ProcessorConfig, TrainingConfig
from bottlenecked.training.data import Dataset
from bottlenecked.training.trainer import ProcessorTrainer
from tests import tiny
from tests.test_rollout import example


def train(batch_size: int, output: Path) -> dict[str, Any]:
    """batch_size: per process. Returns losses, the evaluation and the parameters."""
    # Answers of one to five steps: the devices' numbers of backward passes differ.
    made = [example(5 + i % 3, [4] * (1 + i % 5), i) for i in range(20)]
    config = TrainingConfig(
        processor=ProcessorConfig(
            dim=32, heads=4, mlp_dim=48, top_k=5, recent_window=8, batch_size=batch_size, iterations=3, warmup=0
        )
    )
    data, held_back = Dataset(made[:16], digest="made"), Dataset(made[16:])
    accelerator = Accelerator(cpu=True)
    trainer = ProcessorTrainer(
        tiny.model(), tiny.tokenizer(), data, held_back, config, output=output, accelerator=accelerator
    )
    losses = [trainer.step().loss for _ in range(3)]
    evaluation = trainer.evaluate().to_dict()
    trainer.save()
    return {"losses": losses, "evaluation": evaluation, "parameters": trainer.parameters}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = train(int(sys.argv[1]), Path(sys.argv[2]))
    torch.save(result, Path(sys.argv[2], f"result.{torch.distributed.get_rank()}.pt"))
