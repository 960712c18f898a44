"""Backbones, equal compute, training, outcomes: whatever an experiment is about. Each outcome is a file, made once.

Equal compute is counted, not timed: what an iteration of each variant costs, relative to the reference's, is measured
once, all of them in turn on the same batches (`costs.json`), in seconds or in operations, and everyone gets as many
iterations as the reference's compute pays for. A machine that is busy later changes nothing.

Hyperparameters are chosen by held-back problems of the training distribution. The test problems of a variant and a
backbone are scored when its outcome is written, and an outcome that is there is never written again.
"""

from __future__ import annotations

import abc
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from bottlenecked import backbones
from bottlenecked.training.data import Dataset
from bottlenecked.training.trainer import Trainer

from . import variants
from .plan import Plan
from .variants import Schedule, Variant

_CURVE = 8  # scores on held-back problems while training
_ROUNDS, _WARMING = 12, 3  # of measuring an iteration, and those that do not count


class OutOfTimeError(Exception):
    """Time was up: what had been trained is saved."""


class Lab(abc.ABC):
    """An experiment's data and backbones. Everything is made when first needed, and kept in `plan.build`.

    tokenizer; train; curriculum, which everybody's training begins with, or None; held_back. pause_token: a token that
    no problem uses, or None. batch_size: examples of a score. until: `time.time()` at which a training saves and ends,
    or None. save_seconds: how often at most a training saves before its end.
    """

    tokenizer: Any
    train: Dataset
    curriculum: Dataset | None
    held_back: Dataset
    pause_token: int | None
    batch_size: int
    until: float | None = None
    save_seconds = 0.0

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make all files that several processes will read."""

    @abc.abstractmethod
    def train_backbone(self, seed: int, directory: Path) -> None:
        """Write a backbone to `directory`."""

    @abc.abstractmethod
    def judge(self, seed: int) -> dict[str, Any]:
        """What a backbone can do: "passes", whether a Processor has a chance on it, and why."""

    @abc.abstractmethod
    def watch(self, variant: Variant, model: Any, trainer: Trainer | None, *, some: bool = False) -> float:
        """A figure of held-back problems, larger if better: hyperparameters are chosen by it.

        some: of a part of them, where all would take long.
        """

    @abc.abstractmethod
    def finish(self, variant: Variant, name: str, seed: int, model: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Outcomes of the end: "test", and others like it, as `score` writes them.

        Without "test" where that can only be told later: see `complete`.
        """

    def complete(self, outcome: dict[str, Any]) -> dict[str, Any] | None:
        """An outcome without "test" with it; None where that is still not possible."""
        return None

    @abc.abstractmethod
    def problems(self) -> dict[str, list[int]]:
        """Steps of the answers of the test sets, by the names of these outcomes."""

    @abc.abstractmethod
    def fresh(self) -> Any:
        """A model of the backbone's shape, to measure costs with."""

    @abc.abstractmethod
    def clock(self) -> float:
        """Seconds of compute that this process has used."""

    def backbone(self, seed: int) -> Any:
        """A fresh copy of a backbone, trained when it is first asked for.

        ValueError where an outcome of this seed was made with other weights: on this machine the same training gave
        other bits.
        """
        directory = backbone_directory(self.plan, seed)
        if not (directory / "config.json").exists():
            self.train_backbone(seed, directory)
        record = self.plan.results / f"backbone-{seed}.json"
        if record.exists() and (known := read(record)["weights_hash"]) != weights_hash(directory):
            raise ValueError(
                f"{record} is of a backbone with the weights {known}, but {directory} holds {weights_hash(directory)}: "
                "their outcomes cannot be paired; copy the first one's build directory here, or remove its results"
            )
        return backbones.load(directory)[0]


def of(plan: Plan) -> Lab:
    """The lab of an experiment."""
    if plan.text is not None:
        from .text import TextLab

        return TextLab(plan)
    from .tasks import TaskLab

    return TaskLab(plan)


# --- backbones --------------------------------------------------------------------------------------------------


def judged(lab: Lab, seed: int) -> dict[str, Any]:
    """What is known of a backbone, which is trained and judged where nothing is."""
    path = lab.plan.results / f"backbone-{seed}.json"
    if not path.exists():
        found = lab.judge(seed)
        digest = weights_hash(backbone_directory(lab.plan, seed))
        write(path, {"seed": seed, **found, "weights_hash": digest, "machine": machine.describe()})
    elif not backbone_directory(lab.plan, seed).exists():
        lab.backbone(seed)
    return read(path)


def backbone_directory(plan: Plan, seed: int) -> Path:
    """Where a backbone is kept."""
    return plan.build / "backbones" / str(seed)


def weights_hash(directory: Path) -> str:
    """Of a backbone."""
    found: str = backbones.describe(directory)["backbone"]["weights_hash"]
    return found


# --- equal compute ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """One iteration of a variant, on the curriculum and after it: seconds on the reference's machine and day, or
    operations, as `Budget.unit` says."""

    curriculum: float
    after: float


def costs(lab: Lab) -> dict[str, Cost]:
    """Of every variant that trains; those that `costs.json` lacks are measured, in turn with the reference."""
    path = lab.plan.results / "costs.json"
    if path.exists():
        known = read(path)
    else:
        known = {"machine": machine.describe(), "data": lab.train.digest, "variants": {}}
    kept, reference = known["variants"], lab.plan.budget.variant
    missing = [name for name, entry in lab.plan.variants.items() if entry.learning_rate and name not in kept]
    if missing:
        measure = _measure if lab.plan.budget.unit == "seconds" else _count
        measured = measure(lab, [*dict.fromkeys([reference, *missing])])
        for phase in ("curriculum", "after"):
            # Measured on another day or machine: what counts is the ratio to the reference's.
            scale = kept[reference][phase] / measured[reference][phase] if reference in kept else 1.0
            for name in missing:
                measured[name][phase] *= scale
        known["variants"] = kept | {name: measured[name] for name in missing}
        write(path, known)
    return {name: Cost(**of_one) for name, of_one in known["variants"].items()}


def _measure(lab: Lab, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Medians over rounds in which each takes one step on the same batch."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for phase, data in (("curriculum", lab.curriculum), ("after", lab.train)):
        if data is None:
            for name in names:
                found[name][phase] = 0.0
            continue
        trainers: dict[str, Trainer] = {}
        for name in names:
            made = variants.make(lab, name).trainer(lab.fresh(), Schedule(1000, 0, 1e-4), 0, data=data)
            assert made is not None
            trainers[name] = made
        rounds: list[dict[str, float]] = []
        for _ in range(_ROUNDS):
            times = {}
            for name, trainer in trainers.items():
                began = lab.clock()
                trainer.step()
                times[name] = lab.clock() - began
            rounds.append(times)
        rounds = rounds[_WARMING:]
        reference = statistics.median(times[names[0]] for times in rounds)
        for name in names:
            # Ratios within a round: whatever slowed the machine then slowed both.
            found[name][phase] = reference * statistics.median(times[name] / times[names[0]] for times in rounds)
    return found


def _count(lab: Lab, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Operations of products and attention, forwards and backwards, of one iteration.

    Counted for short, usual and long examples by themselves: those of an iteration are of like lengths, too, and with
    others a Processor would count padding. In float32, which changes none of them, and is quicker on many CPUs.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for phase, data in (("curriculum", lab.curriculum), ("after", lab.train)):
        for name in names:
            found[name][phase] = 0.0
            if data is None:
                continue
            variant = variants.make(lab, name)
            variant.plan = replace(lab.plan, dtype="float32")
            trainer = variant.trainer(lab.fresh(), Schedule(1000, 0, 1e-4), 0, data=data)
            assert trainer is not None
            examples = trainer.settings.batch_size * trainer.settings.accumulation
            by_length = sorted(data.examples, key=lambda example: len(example.tokens))
            count = -(-examples // 3)
            for sixth in (1, 3, 5):
                begin = max(0, len(by_length) * sixth // 6 - count // 2)
                some = variant.reads(Dataset(by_length[begin : begin + count], digest=data.digest)).examples
                # The plain form of attention: others are not counted on every device.
                with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    trainer.losses(list(some), 1.0)
                found[name][phase] += counter.get_total_flops() / len(some) * examples / 3
    return found


def schedule(plan: Plan, name: str, of: Mapping[str, Cost], learning_rate: float) -> Schedule:
    """As many iterations as the variant's share of the reference's compute pays for, on the curriculum and after it."""
    budget, share, one = plan.budget, plan.variants[name].share, of[name]
    reference = of[budget.variant]
    early = late = 0
    if budget.curriculum_iterations:
        early = round(share * budget.curriculum_iterations * reference.curriculum / one.curriculum)
    late = round(share * (budget.iterations - budget.curriculum_iterations) * reference.after / one.after)
    return Schedule(early + max(1, late), early, learning_rate)


# --- outcomes ---------------------------------------------------------------------------------------------------


def outcome(lab: Lab, seed: int, name: str) -> Path:
    """Train and score one variant on one backbone, unless that was done; returns its file."""
    plan = lab.plan
    path = plan.results / f"{seed}-{name}.json"
    if path.exists():
        return path
    variant = variants.make(lab, name)
    if plan.variants[name].learning_rate:
        model, trainer, record = trained(lab, seed, name, chosen_rate(plan, name))
    else:
        model, trainer, record = lab.backbone(seed), None, {}
    if plan.variants[name].export and trainer is not None and seed == plan.seeds[0]:
        variant.export(trainer, plan.build / "export" / name)
    record |= {
        "experiment": plan.name,
        "variant": name,
        "seed": seed,
        "backbone": read(plan.results / f"backbone-{seed}.json")["weights_hash"],
        "parameters": variant.parameters(trainer),
        "held_back": lab.watch(variant, model, trainer),
        **lab.finish(variant, name, seed, model, trainer),
        "machine": machine.describe(),
    }
    write(path, record)
    return path


def check_data(lab: Lab) -> None:
    """ValueError where outcomes of a text, or its costs, are of other data than a training would be.

    Some do not say of which. A task's files hold more than is trained on, and may change without it.
    """
    if lab.plan.text is None:
        return
    for path in [lab.plan.results / "costs.json", *sorted(lab.plan.results.glob("*-*.json"))]:
        if path.exists() and read(path).get("data", lab.train.digest) != lab.train.digest:
            raise ValueError(
                f"{path} is of other data than there is now: what is trained on these cannot be compared with it; use "
                "the data it was made with, or remove it"
            )


def rates_file(plan: Plan, name: str) -> Path:
    """What each candidate of a variant gave on held-back problems, by its own writing."""
    return plan.results / f"rates-{name}.json"


def rate_score(lab: Lab, seed: int, name: str, rate: float) -> float:
    """What a candidate, trained in full, gives on held-back problems."""
    model, trainer, _ = trained(lab, seed, name, rate)
    return lab.watch(variants.make(lab, name), model, trainer)


def chosen_rate(plan: Plan, name: str) -> float:
    """The candidate that is best on held-back problems, all of them trained in full on the first backbone that passes.

    FileNotFoundError or KeyError where that was not done for all.
    """
    rates = plan.variants[name].learning_rate
    if len(rates) == 1:
        return rates[0]
    found: dict[str, float] = read(rates_file(plan, name))
    return max(rates, key=lambda rate: found[f"{rate:g}"])


def trained(lab: Lab, seed: int, name: str, rate: float) -> tuple[Any, Trainer, dict[str, Any]]:
    """A variant trained to the end, going on with what its checkpoint holds: model, trainer, and how it went.

    Points of its curve are compute, `Lab.watch`, and the wall clock of the iterations.
    """
    of, plan = costs(lab), lab.plan
    check_data(lab)
    output = plan.build / "runs" / f"{seed}-{name}-{rate:g}"
    planned, variant = schedule(plan, name, of, rate), variants.make(lab, name)
    model = _beginning(lab, seed, name)
    trainer = variant.trainer(model, planned, seed, output=output)
    assert trainer is not None
    curve_file = output / "curve.json"
    curve: dict[str, list[float]] = read(curve_file) if curve_file.exists() else {}
    wall = max((spent for _, spent in curve.values()), default=0.0)
    for iteration, seconds in run(lab, trainer, f"{name}, seed {seed}, learning rate {rate:g}", parts=_CURVE):
        wall += seconds
        curve[str(iteration)] = [lab.watch(variant, model, trainer, some=True), wall]
        write(curve_file, curve)

    def compute(iteration: int) -> float:
        early = min(iteration, planned.curriculum_iterations)
        return early * of[name].curriculum + (iteration - early) * of[name].after

    record = {
        "learning_rate": rate,
        "iterations": planned.iterations,
        "curriculum_iterations": planned.curriculum_iterations,
        plan.budget.unit: compute(planned.iterations),
        "wall_seconds": wall,
        "curve": [[compute(int(i)), *of] for i, of in sorted(curve.items(), key=lambda pair: int(pair[0]))],
        "config": trainer.config.to_dict(),
        "data": lab.train.digest,
    }
    return model, trainer, record


def _beginning(lab: Lab, seed: int, name: str) -> Any:
    """The backbone, or what another variant made of it."""
    base = lab.plan.variants[name].base
    return lab.backbone(seed) if base is None else backbones.load(merged(lab, seed, base))[0]


def merged_directory(plan: Plan, seed: int, name: str) -> Path:
    """Where the model is that a variant made of a backbone, for others to go on with."""
    return plan.build / "merged" / f"{seed}-{name}"


def merged(lab: Lab, seed: int, name: str) -> Path:
    """`merged_directory`, trained and written where it is missing."""
    directory = merged_directory(lab.plan, seed, name)
    if not directory.exists():
        trained(lab, seed, name, chosen_rate(lab.plan, name))[1].export(directory)  # all or nothing
    return directory


def run(lab: Lab, trainer: Trainer, what: str, parts: int = 1) -> Iterator[tuple[int, float]]:
    """Train to the end from where the checkpoint is; yields, after each part, the iteration and the seconds that its
    steps have taken, and then saves.

    Between two saves at least `lab.save_seconds` pass. OutOfTimeError at `lab.until`, saved.
    """
    if trainer.checkpoint.exists():
        trainer.resume()
    saved = time.time()
    for goal in sorted({trainer.total * (part + 1) // parts for part in range(parts)}):
        if goal <= trainer.iteration:
            continue
        losses, seconds = [], 0.0
        while trainer.iteration < goal:
            if lab.until is not None and time.time() >= lab.until:
                trainer.save()
                raise OutOfTimeError(what)
            step = trainer.step()
            losses.append(step.loss)
            seconds += step.seconds
        say(
            f"{what}: {trainer.iteration} of {trainer.total} iterations, loss {statistics.mean(losses[-50:]):.4f}, "
            f"{1000 * seconds / len(losses):.0f} ms each"
        )
        yield trainer.iteration, seconds
        # After what was done with it: nothing of that is missing where a run goes on.
        if trainer.iteration == trainer.total or time.time() - saved >= lab.save_seconds:
            trainer.save()
            saved = time.time()


def complete(lab: Lab) -> None:
    """Whatever outcomes lack that can be told now, without any weights."""
    for path in sorted(lab.plan.results.glob("*-*.json")):
        found = read(path)
        if "variant" in found and "test" not in found and (completed := lab.complete(found)) is not None:
            write(path, completed)


def problems(lab: Lab) -> dict[str, list[int]]:
    """`Lab.problems`, kept with the outcomes."""
    path = lab.plan.results / "problems.json"
    if not path.exists():
        write(path, lab.problems(), indent=None)
    found: dict[str, list[int]] = read(path)
    return found


# --- files ------------------------------------------------------------------------------------------------------


def score(right: Sequence[bool]) -> dict[str, Any]:
    """n, share, and which were right: a hexadecimal number whose binary digits are the problems, the first on top."""
    bits = "".join("01"[r] for r in right)
    return {"n": len(right), "share": sum(right) / len(right), "right": f"{int(bits, 2):0{-(-len(bits) // 4)}x}"}


def unpack(packed: Mapping[str, Any]) -> list[bool]:
    """Which problems were right, of what `score` gives."""
    return [bit == "1" for bit in f"{int(packed['right'], 16):0{packed['n']}b}"]


def read(path: Path) -> dict[str, Any]:
    """JSON."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, values: Mapping[str, Any], indent: int | None = 1) -> None:
    """JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def say(text: str) -> None:
    """To whoever watches."""
    print(text, flush=True)
