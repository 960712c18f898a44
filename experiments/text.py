"""Experiments on real words: a language model is fine-tuned, variants go on with it, answers are generated and read."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from bottlenecked import backbones
from bottlenecked.boundary import newline_token_ids
from bottlenecked.training import augment
from bottlenecked.training.config import TrainingConfig
from bottlenecked.training.data import Dataset, Example, load_examples, read_lines, write_lines
from bottlenecked.training.packed import PackedBackbone
from bottlenecked.training.trainer import BackboneTrainer, ProcessorTrainer, Trainer

from . import lab
from .decode import decode
from .plan import HERE, Plan
from .variants import FineTuned, Processor, Variant

_WEIGHTS = "model.safetensors"
_NO_LIMIT = 1 << 30  # tokens: no test problem is left out


def judged(texts: Sequence[str], gold: Sequence[str]) -> list[bool]:
    """Whether the last number of each text is that of the right answer. ImportError without lm-eval and math-verify."""
    from bottlenecked.evaluation.answers import NOTHING, equal, extract

    return [one != NOTHING and equal(right, one) for one, right in zip(extract(texts), extract(gold), strict=True)]


class TextLab(lab.Lab):
    """See `lab.Lab`. Runs on a GPU where there is one.

    `plan.data` holds the files. Of the test file nothing is used but to score variants at the end.
    """

    curriculum = None
    save_seconds = 300.0  # with its optimiser's state a model is large

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.text is not None
        self.text = plan.text
        kept = self._stock / "tokenizer.json"  # weights may be missing yet
        self.tokenizer = backbones.load_tokenizer(self._stock if kept.exists() else self.text.model)
        token = self.text.pause_token
        self.pause_token = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if token is not None and self.pause_token in (None, self.tokenizer.unk_token_id):
            raise ValueError(f"text.pause_token is {token!r}, but it must be a token of {self.text.model}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = 32 if self.device.type == "cpu" else 64

    @functools.cached_property
    def _split(self) -> tuple[Dataset, Dataset]:
        """To train on, and held back; a problem's copies are on its side."""
        source = self.plan.data / self.text.train
        files = [source]
        if self.text.copies:
            files.append(self._copies(source))
        whole = self._examples(files, self.text.max_length)
        return whole.split(self.plan.examples.held_back, seed=0)

    def _copies(self, source: Path) -> Path:
        """Of problems with other numbers; made anew where the source, or the program that draws them, is another."""
        path = self.plan.build / "data" / f"{source.stem}.{self.text.copies}-copies.jsonl"
        note = path.with_suffix(".json")
        made_of = [hashlib.sha256(of.read_bytes()).hexdigest() for of in (source, Path(augment.__file__))]
        if not (path.exists() and note.exists() and json.loads(note.read_text()) == made_of):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may do the same.
            with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
                whole, of_whole = Path(unfinished, path.name), Path(unfinished, note.name)
                write_lines(augment.augment_file(source, copies=self.text.copies, seed=0).lines, whole)
                of_whole.write_text(json.dumps(made_of))
                os.replace(whole, path)
                os.replace(of_whole, note)
        return path

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
        if not (self._stock / _WEIGHTS).exists():
            with backbones.taking_place_of(self._stock) as unfinished:
                backbones.load(self.text.model)[0].save_pretrained(unfinished)
                self.tokenizer.save_pretrained(unfinished)

    @property
    def _stock(self) -> Path:
        """The model in float32, and its tokenizer: a GGUF file is slower to read."""
        return self.plan.build / "stock"

    @functools.cached_property
    def _watched(self) -> Dataset:
        return Dataset(self.held_back.examples[: self.text.watched], digest=self.held_back.digest)

    def train_backbone(self, seed: int, directory: Path) -> None:
        """The model with the adapter, which is trained where it is missing: the same for every seed."""
        if not self._adapter.exists():
            self._train_adapter()
        backbones.merge_adapter(self._stock, self._adapter, directory)

    def _train_adapter(self) -> None:
        """training.json beside it keeps how that went; the held-back curve must have flattened."""
        config = {"seed": self.plan.seeds[0], "dtype": self.plan.dtype, "sft": dict(self.plan.backbone.sft)}
        trainer = BackboneTrainer(
            self.fresh(),
            self.tokenizer,
            self.train,
            self.held_back,
            TrainingConfig.from_dict(config),
            output=self.plan.build / "adapter.training",
        )
        curve_file = self.plan.build / "adapter.curve.json"
        curve = lab.read(curve_file) if curve_file.exists() else {}
        as_trained = FineTuned(self, {})
        for iteration, _ in lab.run(self, trainer, "adapter", parts=8):
            curve[str(iteration)] = -self.watch(as_trained, trainer.model, trainer, some=True)
            lab.write(curve_file, curve)
        about = {
            "cross_entropy": curve,
            "problems": len(self._watched.examples),
            "config": trainer.config.to_dict(),
            "data": self.train.digest,
            "machine": machine.describe(),
        }
        with backbones.taking_place_of(self._adapter) as unfinished:
            trainer.export_adapter(unfinished, backbone=self.text.model)
            lab.write(unfinished / "training.json", about)

    @property
    def _adapter(self) -> Path:
        return HERE.parent / self.text.adapter

    def judge(self, seed: int) -> dict[str, Any]:
        """All pass; the curve tells whether more fine-tuning would have brought more."""
        self.backbone(seed)  # which makes it
        return {"passes": True, "cross_entropy": lab.read(self._adapter / "training.json")["cross_entropy"]}

    def watch(self, variant: Variant, model: Any, trainer: Trainer | None, *, some: bool = False) -> float:
        of = self._watched if some else self.held_back
        return -variant.losses(self._placed(model, trainer), trainer, of).mean

    def finish(self, variant: Variant, name: str, seed: int, model: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Answers generated to the test problems, right where their last number is; the texts are kept.

        Where what judges answers is missing, `complete` does it later, elsewhere.
        """
        found: dict[str, Any] = {"decoding_seconds": 0.0}
        if isinstance(variant, Processor):
            found["edits"] = self._edits(variant, trainer)
        variant.settle(trainer)
        if trainer is not None:
            trainer.optimizer.state.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # training took more, and others train
        began = time.perf_counter()
        first = self.plan.seeds[0]
        if trainer is None and seed != first and (self.plan.results / f"{first}-{name}.json").exists():
            answers = lab.read(self._kept(name, first))["answers"]  # the same backbone
        else:
            model = model.to(self.device, getattr(torch, self.plan.dtype)).eval()  # as it would be served
            answers = self._answers(variant, model, trainer, self._test.examples)
        found["decoding_seconds"] = time.perf_counter() - began
        lab.write(self._kept(name, seed), {"answers": answers})
        return self.complete({**found, "variant": name, "seed": seed}) or found

    def _kept(self, name: str, seed: int) -> Path:
        return self.plan.build / "answers" / f"{seed}-{name}.json"

    def complete(self, outcome: dict[str, Any]) -> dict[str, Any] | None:
        path = self._kept(outcome["variant"], outcome["seed"])
        if not path.exists():
            return None
        try:
            return outcome | {"test": lab.score(judged(lab.read(path)["answers"], self._gold))}
        except ImportError as error:
            lab.say(f"{path}: not judged yet ({error})")
            return None

    def _edits(self, variant: Variant, trainer: Trainer | None) -> dict[str, Any]:
        """How large rewrites are on held-back problems whose right answers are given.

        relative, keys, values: per layer and number of the rewrite (0 for the first of an answer), the norm of the edit
        divided by that of the rows it is added to, mean over problems; problems: how many have a rewrite of a number.
        """
        assert isinstance(trainer, ProcessorTrainer)
        width = trainer.backbone.kv_width // 2
        found: list[torch.Tensor] = []
        counts: list[int] = []

        def keep(module: Any, arguments: Any, edit: torch.Tensor) -> None:
            rows, lengths = arguments[0], torch.tensor(arguments[1])
            sequence = torch.repeat_interleave(lengths).to(edit.device)
            squares = torch.stack([edit.float().square(), rows.float().square()])  # [2, layers, rows, C]
            halves = torch.stack([squares[..., :width].sum(-1), squares[..., width:].sum(-1)])
            sums = halves.new_zeros(*halves.shape[:3], len(lengths)).index_add_(3, sequence, halves)
            sums = torch.cat([sums.sum(0, keepdim=True), sums])  # both; keys; values
            found.append((sums[:, 0] / sums[:, 1]).sqrt().mean(-1).cpu())  # [3, layers]
            counts.append(len(lengths))

        hook = trainer.processor.register_forward_hook(keep)
        examples = self._watched.examples[: self.batch_size]
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                trainer.losses(list(variant.reads(Dataset(examples, digest="some")).examples))
        finally:
            hook.remove()
        table = torch.stack(found, -1)  # [3, layers, rewrites]
        rounded = [[[float(f"{x:.3g}") for x in layer] for layer in part] for part in table.tolist()]
        return dict(zip(("relative", "keys", "values"), rounded, strict=True)) | {"problems": counts}

    def _answers(self, variant: Variant, model: Any, trainer: Trainer | None, examples: Sequence[Example]) -> list[str]:
        """To problems, in their order; those with prompts of like lengths are answered together."""
        order = sorted(range(len(examples)), key=lambda i: examples[i].segments[0][1])
        texts: dict[int, str] = {}
        for begin in range(0, len(order), self.text.decoded):
            some = order[begin : begin + self.text.decoded]
            texts |= dict(zip(some, self._decoded(variant, model, trainer, [examples[i] for i in some]), strict=True))
        return [texts[i] for i in range(len(examples))]

    def _decoded(self, variant: Variant, model: Any, trainer: Trainer | None, examples: Sequence[Example]) -> list[str]:
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
        return backbones.load(self._stock if (self._stock / _WEIGHTS).exists() else self.text.model)[0]

    def clock(self) -> float:
        """Wall clock on a GPU, once it is done; else this process's seconds."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
