"""Experiments on real words: a language model is fine-tuned, variants go on with it, answers are generated and read."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bottlenecked import backbones
from bottlenecked.boundary import newline_token_ids
from bottlenecked.training.augment import augment_file
from bottlenecked.training.config import TrainingConfig
from bottlenecked.training.data import Dataset, load_examples, read_lines, write_lines
from bottlenecked.training.packed import PackedBackbone
from bottlenecked.training.trainer import BackboneTrainer, ProcessorTrainer, Trainer

from . import lab
from .decode import decode
from .plan import Plan
from .variants import FineTuned, Processor, Variant

_TOGETHER = 64  # problems decoded at a time
_NO_LIMIT = 1 << 30  # tokens: no test problem is left out


def judged(texts: Sequence[str], gold: Sequence[str]) -> list[bool]:
    """Whether the last number of each text is that of the right answer."""
    from bottlenecked.evaluation.answers import NOTHING, equal, extract

    return [one != NOTHING and equal(right, one) for one, right in zip(extract(texts), extract(gold), strict=True)]


class TextLab(lab.Lab):
    """See `lab.Lab`. Runs on a GPU where there is one.

    `plan.data` holds the files. Of the test file nothing is used but to score variants at the end.
    """

    curriculum = None
    batch_size = 32

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.text is not None
        self.text = plan.text
        self.tokenizer = backbones.load_tokenizer(self.text.model)
        token = self.text.pause_token
        self.pause_token = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if token is not None and self.pause_token in (None, self.tokenizer.unk_token_id):
            raise ValueError(f"text.pause_token is {token!r}, but it must be a token of {self.text.model}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _split(self) -> tuple[Dataset, Dataset]:
        """To train on, and held back; a problem's copies are on its side."""
        source = self.plan.data / self.text.train
        files = [source]
        if self.text.copies:
            files.append(self.plan.build / "data" / f"{source.stem}.{self.text.copies}-copies.jsonl")
            if not files[1].exists():
                files[1].parent.mkdir(parents=True, exist_ok=True)
                write_lines(augment_file(source, copies=self.text.copies, seed=0).lines, files[1])
        whole = self._examples(files, self.text.max_length)
        return whole.split(self.plan.examples.held_back, seed=0)

    def _examples(self, files: list[Path], max_length: int) -> Dataset:
        cache = self.plan.build / "data"
        return load_examples(files, self.tokenizer, max_length=max_length, cache_dir=cache)

    @property
    def train(self) -> Dataset:  # type: ignore[override]
        return self._split[0]

    @property
    def held_back(self) -> Dataset:  # type: ignore[override]
        return self._split[1]

    def prepare(self) -> None:
        for of in (self.train, self.held_back, self._test):
            assert of

    def train_backbone(self, seed: int, directory: Path) -> None:
        """Fine-tune the model; backbone-SEED.json keeps the held-back curve, which must have flattened."""
        trainer = BackboneTrainer(
            self.fresh(),
            self.tokenizer,
            self.train,
            self.held_back,
            TrainingConfig.from_dict({"seed": seed, "dtype": self.plan.dtype, "sft": dict(self.plan.backbone.sft)}),
            output=self.plan.build / "backbones" / f"{seed}.training",
        )
        curve_file = self.plan.build / "backbones" / f"{seed}.curve.json"
        curve = json.loads(curve_file.read_text()) if curve_file.exists() else {}
        for iteration in lab.run(self, trainer, f"backbone {seed}", parts=8):
            curve[str(iteration)] = trainer.evaluate().kinds["all"].processor
            lab.write(curve_file, curve)
        trainer.export(directory)

    def judge(self, seed: int) -> dict[str, Any]:
        self.backbone(seed)  # which trains it
        curve = json.loads((self.plan.build / "backbones" / f"{seed}.curve.json").read_text())
        return {"passes": True, "cross_entropy": curve}

    def watch(self, variant: Variant, model: Any, trainer: Trainer | None) -> float:
        return -variant.losses(self._placed(model, trainer), trainer, self.held_back).mean

    def finish(self, variant: Variant, name: str, seed: int, model: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Answers generated to the test problems, right where their last number is; and where the texts are kept."""
        model = model.to(self.device, getattr(torch, self.plan.dtype)).eval()  # as it would be served
        began = time.perf_counter()
        texts: list[str] = []
        for begin in range(0, len(self._test.examples), _TOGETHER):
            texts += self._answers(variant, model, trainer, self._test.examples[begin : begin + _TOGETHER])
        kept = self.plan.build / "answers" / f"{seed}-{name}.json"
        lab.write(kept, {"answers": texts})
        right = judged(texts, self._gold)
        return {"test": lab.score(right), "decoding_seconds": time.perf_counter() - began}

    def _answers(self, variant: Variant, model: Any, trainer: Trainer | None, examples: Any) -> list[str]:
        options: dict[str, Any] = {}
        if isinstance(variant, Processor):
            assert isinstance(trainer, ProcessorTrainer)
            options = {
                "processor": trainer.processor,
                "autocast": torch.bfloat16 if self.plan.dtype == "bfloat16" else None,
                "variant": trainer.variant,
                "every": variant.every,
                "only_prompt": variant.only_prompt,
            }
        elif isinstance(variant, FineTuned):
            options = {"pause": self.pause_token, "pauses": variant.pauses}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of random positions
            made = decode(
                PackedBackbone(model) if trainer is None else trainer.backbone,
                [example.tokens[: example.segments[0][1]] for example in examples],
                line_ends=newline_token_ids(self.tokenizer),
                end=self.tokenizer.eos_token_id,
                max_new_tokens=self.text.max_new_tokens,
                **options,
            )
        return [self.tokenizer.decode(tokens) for tokens in made]

    def _placed(self, model: Any, trainer: Trainer | None) -> Any:
        """On the device; a trainer has put its own there."""
        return model.to(self.device, getattr(torch, self.plan.dtype)).eval() if trainer is None else model.eval()

    @functools.cached_property
    def _test(self) -> Dataset:
        return self._examples([self.plan.data / self.text.test], _NO_LIMIT)

    @functools.cached_property
    def _gold(self) -> list[str]:
        path = self.plan.data / self.text.test
        lines = {f"{path}:{line}": values["answer"] for line, values in read_lines(path, path.read_bytes())}
        return [lines[example.name] for example in self._test.examples]

    def problems(self) -> dict[str, list[int]]:
        return {"test": self._test.num_steps().tolist()}

    def fresh(self, seed: int = 0) -> Any:
        return backbones.load(self.text.model)[0]

    def clock(self) -> float:
        """Wall clock on a GPU, once it is done; else this process's seconds."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
