"""Experiments on synthetic tasks with tiny backbones, on one thread of a CPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch

from bottlenecked import CacheProcessor, RewriteReport
from bottlenecked.integrations.transformers import attach
from bottlenecked.training.config import TrainingConfig
from bottlenecked.training.data import Dataset, load_examples, write_lines
from bottlenecked.training.probe import lacking, probe
from bottlenecked.training.tasks import (
    RegisterTask,
    Task,
    exact_match,
    save_backbone,
    synthesize,
    task_tokenizer,
    tiny_backbone,
)
from bottlenecked.training.trainer import BackboneTrainer, ProcessorTrainer, Trainer

from . import lab, variants
from .plan import Plan
from .variants import Variant

_EDITS = 100  # problems whose rewrites are measured
_LONGEST = 4096  # tokens
_SETS = ("train", "curriculum", "backbone_curriculum", "look_ups", "held_back", "test", "longer")


def look_ups(task: Task) -> Task:
    """The same task with nothing but what a single look-up can do."""
    return task.look_ups() if isinstance(task, RegisterTask) else dataclasses.replace(task, indirect=0.0)


class TaskLab(lab.Lab):
    """See `lab.Lab`."""

    batch_size = 250

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.task is not None
        self.task, self.tokenizer = plan.task, task_tokenizer()
        # Letters are used from the front of the alphabet.
        self.pause_token = None if self.task.names > 25 else self.tokenizer.convert_tokens_to_ids("z")
        torch.set_num_threads(1)

    @functools.cached_property
    def train(self) -> Dataset:  # type: ignore[override]
        return self._dataset("train", self.task)

    @functools.cached_property
    def curriculum(self) -> Dataset | None:  # type: ignore[override]
        return self._dataset("curriculum", self.task.warm_up())

    @functools.cached_property
    def held_back(self) -> Dataset:  # type: ignore[override]
        return self._dataset("held_back", self.task)

    def file(self, name: str) -> Path:
        """The JSONL of one of the sets."""
        return self.plan.build / "data" / f"{name}.jsonl"

    def _dataset(self, name: str, task: Task) -> Dataset:
        count = self.plan.examples.held_back if name == "look_ups" else getattr(self.plan.examples, name)
        path, seed = self.file(name), _SETS.index(name)
        # The first problem tells a file that another version made.
        asked = [repr(task), count, json.dumps(next(synthesize(task, 1, seed=seed)))]
        note = path.with_suffix(".json")
        if not note.exists() or json.loads(note.read_text()) != asked:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(list(synthesize(task, count, seed=seed)), path)
            note.write_text(json.dumps(asked))
        return load_examples([path], self.tokenizer, max_length=_LONGEST, cache_dir=path.parent)

    def prepare(self) -> None:
        for of in (self.train, self.curriculum, self.held_back, self._look_ups(), *self._tests().values()):
            assert of
        if self.plan.backbone.curriculum_iterations:
            self._early_look_ups()

    def _look_ups(self) -> Dataset:
        return self._dataset("look_ups", look_ups(self.task))

    def _early_look_ups(self) -> Dataset:
        return self._dataset("backbone_curriculum", look_ups(self.task))

    def train_backbone(self, seed: int, directory: Path) -> None:
        early = self.plan.backbone.curriculum_iterations
        curriculum = {"files": ["look_ups"], "iterations": early} if early else {}
        trainer = BackboneTrainer(
            self.fresh(seed),
            self.tokenizer,
            self.train,
            self.held_back,
            TrainingConfig.from_dict({"seed": seed, "sft": {**self.plan.backbone.sft, "curriculum": curriculum}}),
            output=self.plan.build / "backbones" / f"{seed}.training",
            curriculum=self._early_look_ups() if early else None,
        )
        for _ in lab.run(self, trainer, f"backbone {seed}", parts=4):
            pass
        save_backbone(trainer.model.eval(), directory)

    def judge(self, seed: int) -> dict[str, Any]:
        model = self.backbone(seed)
        right = variants.Untouched(self, {}).right(model, None, self._look_ups())
        share = sum(right) / len(right)
        assert self.held_back
        findings = probe(model, self.tokenizer, [self.file("held_back")], max_length=_LONGEST)
        lost = lacking(findings)
        return {
            "passes": share >= self.plan.backbone.least_look_ups and not lost,
            "look_ups": share,
            "lacking": lost,
            "probes": {f.what: {"best": f.layers[f.best].share, "verdict": f.verdict} for f in findings},
        }

    def watch(self, variant: Variant, model: Any, trainer: Trainer | None, *, some: bool = False) -> float:
        right = variant.right(model, trainer, self.held_back)
        return sum(right) / len(right)

    def finish(self, variant: Variant, name: str, seed: int, model: Any, trainer: Trainer | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if name == self.plan.budget.variant:
            found["edits"] = self._edits(variant, model, trainer, self.plan.build / "exported" / f"{seed}-{name}")
        return found | {part: lab.score(variant.right(model, trainer, of)) for part, of in self._tests().items()}

    def _tests(self) -> dict[str, Dataset]:
        found = {"test": self._dataset("test", self.task)}
        return found if self.plan.longer is None else found | {"longer": self._dataset("longer", self.plan.longer)}

    def problems(self) -> dict[str, list[int]]:
        return {part: of.num_steps().tolist() for part, of in self._tests().items()}

    def fresh(self, seed: int = 0) -> Any:
        return tiny_backbone(seed=seed)

    def clock(self) -> float:
        return time.process_time()

    def _edits(self, variant: Variant, model: Any, trainer: Trainer | None, directory: Path) -> dict[str, Any]:
        """How large rewrites are, at inference through transformers, on held-back problems.

        relative: per layer and number of the rewrite (0 for the first of an answer), the norm of the edit divided by
        that of the rows it is added to, mean over problems. right: how many are right by generating, and by the one
        forward that scores everyone; agree: on how many these are of one mind, which is all of them but for rounding.
        directory: where the Processor is written.
        """
        assert isinstance(trainer, ProcessorTrainer)
        trainer.processor.save_pretrained(directory)
        processor = CacheProcessor.from_pretrained(directory, weight_dtype="float32")
        found: dict[int, list[Any]] = {}
        seen: dict[int, int] = {}

        def keep(report: RewriteReport) -> None:
            for column, event in enumerate(report.events):
                number = seen[event.sequence] = seen.get(event.sequence, -1) + 1
                found.setdefault(number, []).append(report.delta_norm[:, column] / report.row_norm[:, column])

        part = Dataset(self.held_back.examples[:_EDITS])
        with attach(model, processor, self.tokenizer, on_boundary=keep):
            generated = exact_match(model, part.examples, batch_size=_EDITS)
        scored = variant.right(model, trainer, part)
        means = [(sum(rows) / len(rows)).tolist() for _, rows in sorted(found.items())]
        return {
            "problems": len(generated),
            "relative": [list(of_layer) for of_layer in zip(*means, strict=True)],
            "right": {"generating": sum(generated), "scoring": sum(scored)},
            "agree": sum(a == b for a, b in zip(generated, scored, strict=True)),
        }
