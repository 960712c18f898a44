"""experiments/: equal compute, what every variant trains and reads, scores that generation agrees with, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from bottlenecked import CacheProcessor  # noqa: E402
from bottlenecked.backbones import describe  # noqa: E402
from bottlenecked.integrations.transformers import attach  # noqa: E402
from bottlenecked.module import CacheProcessorModule  # noqa: E402
from bottlenecked.training.data import Dataset, Example, load_examples, write_lines  # noqa: E402
from bottlenecked.training.packed import PackedBackbone  # noqa: E402
from bottlenecked.training.rollout import rollout, supervised  # noqa: E402
from bottlenecked.training.tasks import (  # noqa: E402
    RegisterTask,
    exact_match,
    save_backbone,
    synthesize,
    task_tokenizer,
    tiny_backbone,
)
from bottlenecked.training.trainer import ProcessorTrainer  # noqa: E402
from experiments import jobs as jobs_of  # noqa: E402
from experiments import lab as labs  # noqa: E402
from experiments import plan as plans  # noqa: E402
from experiments import plots, report, tasks, variants  # noqa: E402
from experiments import text as text_experiments  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.decode import decode  # noqa: E402
from experiments.jobs import Job, Queue, Result  # noqa: E402
from experiments.tasks import TaskLab  # noqa: E402
from experiments.text import TextLab  # noqa: E402
from experiments.variants import Schedule  # noqa: E402
from tests import tiny  # noqa: E402

SMALL: dict[str, Any] = {
    "title": "A small one",
    "task": {"name": "registers", "registers": 2, "steps": [2, 4]},
    "longer": {"steps": [5, 6]},
    "seeds": [0, 1, 2],
    "backbones": 2,
    "examples": {
        "train": 120,
        "curriculum": 60,
        "backbone_curriculum": 60,
        "held_back": 20,
        "test": 40,
        "longer": 20,
    },
    "backbone": {
        "sft": {"iterations": 10, "batch_size": 8, "learning_rate": 4e-3},
        "curriculum_iterations": 4,
        "least_look_ups": 0.0,
    },
    "budget": {"variant": "processor", "iterations": 8, "curriculum_iterations": 3},
    "training": {"batch_size": 8, "warmup": 2},
    "processor": {"dim": 32, "heads": 2, "mlp_dim": 48, "top_k": 4, "recent_window": 4, "rewrite_prompt": False},
    "pairs": [["processor", "random"]],
    "variants": {
        "sft": {"kind": "untouched"},
        "sft2": {"kind": "fine-tuned", "learning_rate": [1e-3, 3e-3]},
        "pause": {"kind": "fine-tuned", "learning_rate": 1e-3, "options": {"pauses": 2}},
        "processor": {"kind": "processor", "learning_rate": 3e-3},
        "random": {"kind": "processor", "learning_rate": 3e-3, "options": {"selection": "random"}},
        "shift": {"kind": "processor", "learning_rate": 3e-3, "options": {"constant": True}},
        "every": {"kind": "processor", "learning_rate": 3e-3, "options": {"every": 5, "recent_window": 5}},
        "prompt": {
            "kind": "processor",
            "learning_rate": 3e-3,
            "options": {"rewrite_prompt": True, "only_prompt": True, "recent_window": 32},
        },
        "lora": {"kind": "lora", "learning_rate": 1e-3},
        "layer": {"kind": "layer", "learning_rate": 1e-3},
        "k-2": {"kind": "processor", "label": "2", "group": "top_k", "learning_rate": 3e-3, "options": {"top_k": 2}},
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two, which would wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(path: Path, **changes: Any) -> plans.Plan:
    return plans.make("small", SMALL | changes, path / "build", path / "results")


@pytest.fixture
def small(tmp_path: Path) -> plans.Plan:
    return plan(tmp_path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> TaskLab:
    return TaskLab(plan(tmp_path_factory.mktemp("lab")))


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what no two runs have in common."""
    known = record | {"machine": None, "wall_seconds": None}
    return known | {"curve": [point[:2] for point in record["curve"]]} if "curve" in record else known


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("data") / "task.jsonl"
    write_lines(list(synthesize(RegisterTask(registers=2, steps=(2, 5)), 60)), path)
    return load_examples([path], task_tokenizer(), max_length=256)


# --- variants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SMALL["variants"] if n != "sft"])
def test_a_variant_trains_what_it_says_and_nothing_else(lab: TaskLab, examples: Dataset, name: str) -> None:
    variant, model = variants.make(lab, name), tiny_backbone()
    trainer = variant.trainer(model, Schedule(4, 0, 1e-2), 0, data=examples)
    assert trainer is not None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        trainer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if isinstance(trainer, ProcessorTrainer):
        assert not changed
        moved = {n for n, p in trainer.processor.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert moved == {"out_proj_bias", "gate"} if name == "shift" else moved > {"out_proj_weight", "in_proj_weight"}
    elif name == "layer":
        assert changed
        assert all(n.startswith("model.layers.1.") for n in changed)
    elif name == "lora":
        assert changed
        assert all("lora" in n for n in changed)
    else:
        assert {n.split(".")[2] for n in changed if "layers" in n} == {"0", "1"}
    if name in ("lora", "layer"):  # within half a rank, or half a column of the MLP
        wanted = variants.processor_parameters(lab, tiny_backbone())
        assert variant.parameters(trainer) == pytest.approx(wanted, abs=1300 if name == "lora" else 3 * 64)
    if name == "shift":
        assert variant.parameters(trainer) == 2 * (128 + 1)


def test_an_added_layer_is_an_identity_at_first(examples: Dataset) -> None:
    model = tiny_backbone()
    before = supervised(PackedBackbone(model), list(examples.examples)).sums
    variants.insert_layer(model, 1, 40000)
    assert torch.equal(supervised(PackedBackbone(model), list(examples.examples)).sums, before)
    with pytest.raises(ValueError, match=r"24,896 parameters or more, but 20,000"):
        variants.insert_layer(tiny_backbone(), 1, 20000)


def test_pauses_stand_behind_every_step_and_are_not_written(examples: Dataset) -> None:
    one = examples.examples[0]
    paused = variants.with_pauses(one, 61, 3)
    assert [t for t in paused.tokens if t != 61] == list(one.tokens)
    kept = [m for t, m in zip(paused.tokens, paused.loss_mask, strict=True) if t != 61]
    assert kept == list(one.loss_mask)
    for (begin, end), (b, e) in zip(one.segments, paused.segments, strict=True):
        added = () if end == len(one.tokens) else (61,) * 3
        assert paused.tokens[b:e] == one.tokens[begin:end] + added
    assert not any(m for t, m in zip(paused.tokens, paused.loss_mask, strict=True) if t == 61)


def test_steps_can_be_cut_anew(examples: Dataset) -> None:
    for one in examples.examples:
        cut = variants.recut(one, 5)
        assert cut.segments[0] == one.segments[0]
        assert [e - b for b, e in cut.segments[1:-1]] == [5] * (len(cut.segments) - 2)
        assert 1 <= cut.segments[-1][1] - cut.segments[-1][0] <= 5
        assert cut.segments[-1][1] == len(one.tokens)
        assert all(a[1] == b[0] for a, b in zip(cut.segments, cut.segments[1:], strict=False))


def test_data_that_another_version_made_is_made_anew(small: plans.Plan) -> None:
    lab = TaskLab(small)
    made = lab.held_back.digest
    path = lab.file("held_back")
    right, note = path.read_bytes(), path.with_suffix(".json")
    path.write_bytes(right.replace(b"name, from", b"old name, from"))
    assert TaskLab(small).held_back.digest != made  # its note says that it is right
    for old in (json.loads(note.read_text())[:2], [*json.loads(note.read_text())[:2], "another problem"]):
        note.write_text(json.dumps(old))
        path.write_bytes(right.replace(b"name, from", b"old name, from"))
        assert TaskLab(small).held_back.digest == made
        assert path.read_bytes() == right


def test_unknown_kinds_and_options_are_refused(tmp_path: Path) -> None:
    for entry, words in (
        ({"kind": "magic"}, "'magic', but it must be one of untouched"),
        ({"kind": "fine-tuned", "options": {"pause": 3}}, "pause is no option of FineTuned: use pauses"),
        ({"kind": "processor", "options": {"topk": 3}}, "topk is no option of Processor"),
    ):
        lab = TaskLab(plan(tmp_path, variants=SMALL["variants"] | {"wrong": entry}))
        with pytest.raises(ValueError, match=words):
            variants.make(lab, "wrong")
    for changes, words in (
        ({"training": {"batchsize": 3}}, "batchsize is no field"),
        ({"baseline": "nobody"}, "'nobody' is named, but"),
        ({"backbones": 4}, "backbones is 4"),
        ({"text": {}}, "a task or a text, one of the two"),
        ({"task": {"name": "sorting"}}, "task.name is 'sorting', but it must be registers or chain"),
        ({"budget": {"hours": 3}}, "budget.hours is no field: use variant"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(tmp_path, **changes)
    with_all = plan(tmp_path, task=SMALL["task"] | {"names": 26})
    with pytest.raises(ValueError, match="pauses need a token"):
        variants.make(TaskLab(with_all), "pause")


def test_every_experiment_that_is_here_can_be_read(tmp_path: Path) -> None:
    for name in plans.names():
        read = plans.load(name, build=tmp_path, results=tmp_path)
        for variant, entry in read.variants.items():
            assert entry.kind in variants.KINDS, variant
            if read.task is not None:
                variants.make(TaskLab(read), variant)
    with pytest.raises(FileNotFoundError, match=r"no experiment 'nothing': use .*gsm8k, registers"):
        plans.load("nothing")


# --- scores -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_greedy_decoding(lab: TaskLab, examples: Dataset) -> None:
    """Of a model that has learned something: some answers are right and others wrong."""
    few = Dataset([e for e in examples.examples if e.num_steps <= 3], digest="few")
    variant, model = variants.make(lab, "sft2"), tiny_backbone()
    trainer = variant.trainer(model, Schedule(150, 0, 1e-2), 0, data=few)
    assert trainer is not None
    for _ in range(150):
        trainer.step()
    scored = variant.right(model, trainer, examples)
    assert 0 < sum(scored) < len(scored)
    assert scored == exact_match(model.eval(), examples.examples)
    assert labs.unpack(labs.score(scored)) == scored


def test_packed_outcomes_keep_leading_zeros() -> None:
    for right in ([False] * 9, [False, True], [True] + [False] * 8, [True] * 4, [False]):
        assert labs.unpack(labs.score(right)) == right


def test_everyone_gets_the_reference_compute(tmp_path: Path) -> None:
    half = plan(tmp_path, variants=SMALL["variants"] | {"half": {"kind": "lora", "learning_rate": 1, "share": 0.5}})
    of = {
        "processor": labs.Cost(0.1, 0.2),
        "sft2": labs.Cost(0.05, 0.1),
        "random": labs.Cost(0.2, 0.2),
        "half": labs.Cost(0.05, 0.1),
    }
    assert labs.schedule(half, "processor", of, 1.0) == Schedule(8, 3, 1.0)
    assert labs.schedule(half, "sft2", of, 1.0) == Schedule(16, 6, 1.0)
    assert labs.schedule(half, "random", of, 1.0) == Schedule(2 + 5, 2, 1.0)
    assert labs.schedule(half, "half", of, 1.0) == Schedule(8, 3, 1.0)


def test_costs_measured_later_are_in_the_first_ones_seconds(lab: TaskLab, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lab.plan.results / "costs.json"
    seconds = {"curriculum": 2.0, "after": 4.0}
    labs.write(path, {"machine": {}, "variants": {n: seconds for n in SMALL["variants"] if n not in ("sft", "random")}})
    measured = {"processor": {"curriculum": 1.0, "after": 8.0}, "random": {"curriculum": 3.0, "after": 4.0}}
    monkeypatch.setattr(labs, "_measure", lambda lab, names: {name: dict(measured[name]) for name in names})
    assert labs.costs(lab)["random"] == labs.Cost(6.0, 2.0)
    assert labs.costs(lab)["processor"] == labs.Cost(2.0, 4.0)
    path.unlink()


def test_operations_are_counted_alike_on_every_device(tmp_path: Path) -> None:
    """Of whole products: two operations per weight and token, twice that backwards, and attention."""
    made = plan(tmp_path, budget={"unit": "operations", "iterations": 8, "curriculum_iterations": 0}, pairs=[])
    lab = TaskLab(dataclasses.replace(made, variants={n: made.variants[n] for n in ("processor", "sft2", "lora")}))
    found = labs.costs(lab)
    by_length = sorted(lab.train.examples, key=lambda e: len(e.tokens))
    model = tiny_backbone()
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
    expected = 0.0
    for sixth in (1, 3, 5):
        middle = len(by_length) * sixth // 6
        examples = by_length[middle - 1 : middle + 2]
        tokens = sum(len(e.tokens) - 1 for e in examples)
        written = sum(sum(e.loss_mask[1:]) for e in examples)
        padded = -(-tokens // 16) * 16
        longest = -(-max(len(e.tokens) - 1 for e in examples) // 8) * 8
        attention = 2 * 2 * 4 * 32 * len(examples) * longest**2 * 2  # heads, size, layers
        expected += 3 * (2 * (layers * padded + head * written) + attention) / len(examples) * 8 / 3
    assert len(by_length[0].tokens) < len(by_length[-1].tokens)

    assert found["sft2"].after == pytest.approx(expected, rel=0.1)  # padding varies
    assert found["lora"].after < found["sft2"].after
    assert found["sft2"].after / 3 < found["processor"].after < 3 * found["sft2"].after


# --- a whole experiment -----------------------------------------------------------------------------------------


def test_an_experiment_goes_on_where_it_stopped(
    small: plans.Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In parts, with a backbone that fails; then nothing is trained again, and the files say what there is."""
    kept = ("sft", "sft2", "processor", "random", "k-2")  # the others are trained above
    small = dataclasses.replace(small, variants={name: small.variants[name] for name in kept})
    monkeypatch.setattr(plans, "load", lambda name, **where: small)
    monkeypatch.setattr(labs, "_ROUNDS", 4)
    monkeypatch.setattr(labs, "_CURVE", 2)
    monkeypatch.setattr(tasks, "_EDITS", 12)
    monkeypatch.setattr(tasks, "probe", lambda *arguments, **options: [])  # needs more examples
    lost = iter([[], ["a name"], []])
    monkeypatch.setattr(tasks, "lacking", lambda findings: next(lost))
    assert main(["small", "--only", "sft", "sft2", "processor", "--seeds", "0"]) == 0, capsys.readouterr().err
    found = json.loads((small.results.parent / "small.json").read_text())
    assert found["seeds"] == [0]
    assert not found["complete"]
    assert found["gain_over_equal_compute_sft"]["interval"] == "over problems of one backbone"
    assert "**Partial" in (small.results.parent / "small.md").read_text()
    assert main(["small"]) == 0, capsys.readouterr().err
    found = json.loads((small.results.parent / "small.json").read_text())
    assert found["complete"]
    assert found["n"] == 40
    assert found["seeds"] == [0, 2]
    assert found["backbones"]["failed"]["1"]["lacking"] == ["a name"]
    gain = found["gain_over_equal_compute_sft"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert gain["interval"] == "over backbones"
    for name in ("accuracy", "steps", "compute", "clock", "edits", "top_k"):
        assert (small.results.parent / f"small-{name}.svg").stat().st_size > 1000
    text = (small.results.parent / "small.md").read_text()
    assert "Partial" not in text
    assert text.count("\n| ") >= len(kept) + 1 + 1
    outcome = json.loads((small.results / "0-processor.json").read_text())
    assert outcome["edits"]["agree"] == outcome["edits"]["problems"] == 12
    assert np.shape(outcome["edits"]["relative"])[0] == 2  # layers; this model ends lines where it likes
    assert np.all(np.array(outcome["edits"]["relative"]) > 0)

    stamps = {p: p.stat().st_mtime_ns for p in small.results.iterdir()}
    assert main(["small"]) == 0
    assert {p: p.stat().st_mtime_ns for p in small.results.iterdir()} == stamps
    # An outcome of another backbone cannot be paired.
    changed = json.loads((small.results / "0-sft2.json").read_text()) | {"backbone": "another"}
    (small.results / "0-sft2.json").write_text(json.dumps(changed))
    assert main(["small", "--report"]) == 1
    assert "another backbone" in capsys.readouterr().err


def test_a_training_that_was_stopped_goes_on(lab: TaskLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labs, "_CURVE", 4)
    monkeypatch.setattr(labs, "costs", lambda lab: {name: labs.Cost(1.0, 1.0) for name in lab.plan.variants})
    _, whole, record = labs.trained(lab, 0, "processor", 3e-3)
    expected = {n: p.detach().clone() for n, p in whole.parameters.items()}
    whole.checkpoint.unlink()
    steps, step = 0, type(whole).step

    def stopping(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(type(whole), "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        labs.trained(lab, 0, "processor", 3e-3)
    _, again, of_again = labs.trained(lab, 0, "processor", 3e-3)
    assert steps == 6 + 4  # from the checkpoint after four
    assert timeless(of_again) == timeless(record)
    for name, parameter in again.parameters.items():
        assert torch.equal(parameter, expected[name])


def test_a_variant_can_go_on_with_anothers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "half": {"kind": "lora", "learning_rate": 1e-2, "share": 0.5},
        "on-half": {"kind": "processor", "learning_rate": 1e-2, "share": 0.5, "base": "half"},
    }
    lab = TaskLab(plan(tmp_path, variants=SMALL["variants"] | more))
    monkeypatch.setattr(labs, "costs", lambda lab: {name: labs.Cost(1.0, 1.0) for name in lab.plan.variants})
    model, trainer, record = labs.trained(lab, 0, "on-half", 1e-2)
    assert record["iterations"] == 4
    adapted, _, _ = labs.trained(lab, 0, "half", 1e-2)
    held_back = list(lab.held_back.examples)
    merged, apart = (supervised(PackedBackbone(m), held_back).sums for m in (model, adapted))
    assert torch.allclose(merged, apart, rtol=1e-4)
    assert not torch.allclose(merged, supervised(PackedBackbone(lab.backbone(0)), held_back).sums, rtol=1e-4)
    assert isinstance(trainer, ProcessorTrainer)


# --- many at a time ---------------------------------------------------------------------------------------------


BASED: dict[str, Any] = {
    "sft": {"kind": "untouched"},
    "on-half": {"kind": "processor", "learning_rate": [1e-2, 1e-3], "share": 0.5, "base": "half"},
    "half": {"kind": "lora", "learning_rate": [1e-2, 2e-2], "share": 0.5},
    "processor": {"kind": "processor", "learning_rate": 3e-3},
    "sft2": {"kind": "fine-tuned", "learning_rate": 1e-3},
}
FAILS = "RuntimeError: so it is"


def pretend(plan: plans.Plan, queue: Queue, job: Job, failing: Job | None = None, unfit: int = 1) -> None:
    """What a job leaves behind, without its work. unfit: the seed of a backbone that does not pass."""
    if job == failing:
        queue.finish(Result(job, jobs_of.FAILED, FAILS))
        return
    if job.kind == "costs":
        labs.write(plan.results / "costs.json", {"variants": {name: {} for name in plan.variants}})
    elif job.kind == "backbone":
        assert job.seed is not None
        labs.write(plan.results / f"backbone-{job.seed}.json", {"passes": job.seed != unfit})
        labs.write(labs.backbone_directory(plan, job.seed) / "config.json", {})
    elif job.kind == "base":
        assert job.seed is not None
        labs.merged_directory(plan, job.seed, job.variant).mkdir(parents=True)
    elif job.kind == "outcome":
        labs.write(plan.results / f"{job.seed}-{job.variant}.json", {})
    queue.finish(Result(job, jobs_of.DONE, value=0.5))


def pretend_all(queue: Queue, workers: int, failing: Job | None = None) -> list[Job]:
    """In the order of starting; that which was started last ends first."""
    started: list[Job] = []
    running: list[Job] = []
    while True:
        for job in queue.ready()[: workers - len(running)]:
            assert job not in started
            assert all(queue.done(needed) for needed in queue.requirements(job))
            queue.running.add(job)
            started.append(job)
            running.append(job)
        if not running:
            return started
        pretend(queue.plan, queue, running.pop(), failing)


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_jobs_wait_for_what_they_need_and_come_in_the_files_order(tmp_path: Path, workers: int) -> None:
    made = plan(tmp_path, variants=BASED, pairs=[])
    started = pretend_all(Queue(made), workers)
    assert [job for job in started if job.kind == "backbone"] == [Job("backbone", seed) for seed in (0, 1, 2)]
    outcomes = [job for job in started if job.kind == "outcome"]
    assert sorted(map(str, outcomes)) == sorted(str(Job("outcome", s, v)) for s in (0, 2) for v in BASED)
    assert sum(job.kind == "rate" for job in started) == 4
    assert all(job.seed == 0 for job in started if job.kind == "rate")
    assert not Queue(made).ready()  # all is there
    if workers == 1:
        assert outcomes == [Job("outcome", seed, variant) for variant in BASED for seed in (0, 2)]
        # What a variant needs has its place.
        assert started.index(Job("base", 0, "half")) < started.index(Job("outcome", 0, "processor"))
        assert [job.kind for job in started[:2]] == ["prepare", "costs"]
    else:
        assert started.index(Job("backbone", 1)) < started.index(Job("outcome", 0, "sft"))
    # What is told by the clock is measured while nothing else runs.
    alone = Queue(plan(tmp_path / "alone", variants=BASED, pairs=[]), alone=True)
    assert pretend_all(alone, workers)[:2] == [Job("prepare"), Job("costs")]


def test_a_failure_takes_with_it_what_waits_for_it_and_nothing_else(tmp_path: Path) -> None:
    made = plan(tmp_path, variants=BASED, pairs=[])
    queue = Queue(made, ["half", "on-half", "processor"])
    failing = Job("rate", 0, "half", 2e-2)
    started = pretend_all(queue, 2, failing)
    assert queue.failed == {failing: FAILS}
    assert [job for job in started if job.kind == "outcome"] == [Job("outcome", seed, "processor") for seed in (0, 2)]
    missing = [(job.seed, job.variant) for job in queue.missing()]
    assert missing == [(0, "on-half"), (2, "on-half"), (0, "half"), (2, "half")]
    # Of a backbone: there is no other in its place, and the others are used.
    of_two = Queue(plan(tmp_path / "two", variants=BASED, pairs=[]), ["sft"])
    assert pretend_all(of_two, 1, Job("backbone", 0))[-1] == Job("outcome", 2, "sft")


def test_the_headline_comes_first_and_some_variants_are_made_on_few_backbones(tmp_path: Path) -> None:
    variants_of = BASED | {"sft": {"kind": "untouched", "backbones": 1}}
    made = plan(tmp_path, variants=variants_of, pairs=[], headline=["processor", "sft2"])
    outcomes = [(job.variant, job.seed) for job in pretend_all(Queue(made), 1) if job.kind == "outcome"]
    assert outcomes[:4] == [("processor", 0), ("processor", 2), ("sft2", 0), ("sft2", 2)]
    rest = [("sft", 0), ("on-half", 0), ("half", 0), ("on-half", 2), ("half", 2)]
    assert outcomes[4:] == rest


def test_too_little_memory_is_tried_again_when_another_has_ended(tmp_path: Path) -> None:
    queue = Queue(plan(tmp_path, variants=BASED, pairs=[]))
    for job in (Job("prepare"), Job("costs"), Job("backbone", 0)):
        pretend(queue.plan, queue, job)
    short = Result(Job("outcome", 0, "sft"), jobs_of.FAILED, "OutOfMemoryError: CUDA out of memory")
    for _ in range(2):
        assert short.job in queue.ready()
        queue.running |= {short.job, Job("backbone", 1)}
        queue.finish(short)
        assert short.job not in queue.ready()
        queue.finish(Result(Job("backbone", 1), jobs_of.STOPPED))
    assert short.job in queue.ready()
    queue.finish(short)
    assert short.job in queue.failed


def patched(plan: plans.Plan) -> TaskLab:
    """For a process of its own: with so few examples there is nothing to probe."""
    vars(tasks).update(probe=lambda *arguments, **options: [], lacking=lambda findings: [], _EDITS=4)
    vars(labs).update(_CURVE=2)
    return TaskLab(plan)


def dying(plan: plans.Plan) -> TaskLab:
    os._exit(3)


def test_processes_do_together_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a variant that cannot be made, which stops nobody; and the figures are those of one process."""
    monkeypatch.setattr(tasks, "probe", lambda *arguments, **options: [])
    monkeypatch.setattr(tasks, "lacking", lambda findings: [])
    monkeypatch.setattr(tasks, "_EDITS", 4)
    monkeypatch.setattr(labs, "_CURVE", 2)
    entries = {
        "wrong": {"kind": "processor", "learning_rate": 3e-3, "options": {"topk": 3}},
        **{name: SMALL["variants"][name] for name in ("sft", "sft2", "processor")},
    }
    found = []
    for place, count, make in (("one", 1, TaskLab), ("two", 2, patched)):
        made = plan(tmp_path / place, variants=entries, pairs=[])
        costs = {name: {"curriculum": 1.0, "after": 1.0} for name in entries}
        labs.write(made.results / "costs.json", {"machine": {}, "variants": costs})
        failures = jobs_of.run(Queue(made), make, count)
        assert sorted(failures) == [
            f"outcome wrong, seed {seed}: ValueError: topk is no option of Processor: use "
            + ", ".join(variants.Processor.known)
            for seed in (0, 1)
        ]
        outcomes = {p.name: labs.read(p) for p in made.results.iterdir()}
        found.append({name: timeless(of) for name, of in outcomes.items() if name != "costs.json"})
    assert found[0] == found[1]
    assert {"0-processor.json", "1-processor.json", "1-sft2.json", "rates-sft2.json", "problems.json"} < set(found[0])


def test_a_process_that_dies_is_told_and_replaced(small: plans.Plan) -> None:
    queue = Queue(small)
    assert jobs_of.run(queue, dying, 2)[0] == "prepare: its process ended with exit code 3"
    assert not queue.running


def test_when_time_is_up_nothing_starts_and_trainings_save(lab: TaskLab, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(lab.plan)
    assert jobs_of.run(queue, dying, 1, until=time.time() - 1) == []
    assert jobs_of.run(queue, dying, 2, until=time.time() - 1) == []
    monkeypatch.setattr(labs, "_CURVE", 1)
    monkeypatch.setattr(labs, "costs", lambda lab: {name: labs.Cost(1.0, 1.0) for name in lab.plan.variants})
    _, whole, record = labs.trained(lab, 0, "random", 3e-3)
    expected = {n: p.detach().clone() for n, p in whole.parameters.items()}
    whole.checkpoint.unlink()
    step = type(whole).step

    def late(self: Any) -> Any:
        if self.iteration == 4:
            monkeypatch.setattr(lab, "until", time.time())
        return step(self)

    monkeypatch.setattr(type(whole), "step", late)
    assert jobs_of.do(lab, Job("rate", 0, "random", 3e-3)) == Result(Job("rate", 0, "random", 3e-3), jobs_of.STOPPED)
    monkeypatch.setattr(lab, "until", None)
    monkeypatch.setattr(type(whole), "step", step)
    _, again, of_again = labs.trained(lab, 0, "random", 3e-3)
    assert timeless(of_again) == timeless(record)
    for name, parameter in again.parameters.items():
        assert torch.equal(parameter, expected[name])


def test_intervals_over_backbones_are_students() -> None:
    found = report.over_backbones([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


SHARES = {  # of right answers, per variant and seed; seed 1 did not pass
    "sft": {0: 0.2, 2: 0.3, 3: 0.9, 4: 0.9},
    "sft2": {0: 0.4, 2: 0.5, 3: 0.1, 4: 0.1},
    "processor": {0: 0.6, 2: 0.7, 3: 0.2, 4: 0.4},
    "random": {0: 0.3, 2: 0.4},
    "k-2": {0: 0.5, 2: 0.5},
}


@pytest.fixture
def uneven(tmp_path: Path) -> plans.Plan:
    """Outcomes that nobody trained: two variants on the first two backbones, the others on four."""
    few = {name: SMALL["variants"][name] | {"backbones": 2} for name in ("random", "k-2")}
    kept = {name: few.get(name, SMALL["variants"][name]) for name in SHARES}
    made = plan(tmp_path, variants=kept, seeds=[0, 1, 2, 3, 4], backbones=4)
    for seed in made.seeds:
        found = {"seed": seed, "passes": seed != 1, "look_ups": 0.5, "lacking": []}
        labs.write(made.results / f"backbone-{seed}.json", found)
    labs.write(made.results / "problems.json", {"test": [3] * 50, "longer": [6] * 10})  # with the end of text
    for name, shares in SHARES.items():
        for seed, share in shares.items():
            curve = [[1.0, share / 2, 10.0 + seed], [2.0, share, 20.0 + seed]]
            trained = {} if name == "sft" else {"curve": curve, "seconds": 2.0}
            scores = {part: labs.score([i < share * n for i in range(n)]) for part, n in (("test", 50), ("longer", 10))}
            outcome = {"backbone": f"of {seed}", "parameters": 7, "held_back": share, **trained, **scores}
            labs.write(made.results / f"{seed}-{name}.json", outcome)
    return made


def test_variants_are_compared_on_the_backbones_that_both_have(uneven: plans.Plan) -> None:
    report.write(uneven)
    found = json.loads((uneven.results.parent / "small.json").read_text())
    assert found["complete"]
    assert found["seeds"] == [0, 2, 3, 4]
    assert found["gain_over_equal_compute_sft"]["mean"] == pytest.approx(20.0)
    assert found["gain_over_equal_compute_sft"]["seeds"] == [0, 2, 3, 4]
    (pair,) = found["pairs"]
    assert (pair["mean"], pair["seeds"]) == (pytest.approx(30.0), [0, 2])
    assert found["variants"]["random"]["gain"]["mean"] == pytest.approx(-10.0)
    # No mean over two backbones stands beside one over four.
    all_of_them, first_two = found["blocks"]
    assert (all_of_them["seeds"], list(all_of_them["variants"])) == ([0, 2, 3, 4], ["sft", "sft2", "processor"])
    assert (first_two["seeds"], list(first_two["variants"])) == ([0, 2], ["sft", "sft2", "processor", "random"])
    assert all_of_them["variants"]["processor"]["accuracy"]["mean"] == pytest.approx(0.475)
    assert first_two["variants"]["processor"]["accuracy"]["mean"] == pytest.approx(0.65)
    points = {row["value"]: row["accuracy"]["mean"] for row in found["settings"]["top_k"]}
    assert points == {2.0: pytest.approx(0.5), 4.0: pytest.approx(0.65)}
    text = (uneven.results.parent / "small.md").read_text()
    assert "Partial" not in text
    assert text.index("**On 4 backbones (seeds 0, 2, 3, 4).**") < text.index("**On 2 backbones (seeds 0, 2): every")
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [row[5:7] for row in rows if row[1] == "**processor**"] == [["4", "0.475"], ["2", "0.650"]]
    assert [row[5:7] for row in rows if row[1] == "**4**"] == [["2", "0.650"]]
    assert [row[2:4] for row in rows if row[1] == "processor over random"] == [["2", "+30.0"]]


A_TEXT = plans.Text(model="none", adapter="none", train="none", test="none")


def test_outcomes_of_other_data_are_not_compared(uneven: plans.Plan) -> None:
    of_text = dataclasses.replace(uneven, text=A_TEXT)
    paths = [uneven.results / f"{seed}-{name}.json" for name, shares in SHARES.items() for seed in shares]
    for path in paths:
        if not path.name.endswith("-sft.json"):  # nothing was trained
            labs.write(path, labs.read(path) | {"data": "one digest"})
    assert set(report.read(of_text)) == set(SHARES)
    other = uneven.results / "3-processor.json"
    labs.write(other, labs.read(other) | {"data": "another digest"})
    with pytest.raises(ValueError, match=r"3-processor\.json is of other data than .*0-sft2\.json: remove one"):
        report.read(of_text)
    assert set(report.read(uneven)) == set(SHARES)  # a task's files change without what is trained on


def test_nothing_is_trained_on_other_data_than_the_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = TaskLab(plan(tmp_path))
    lab.plan = dataclasses.replace(lab.plan, text=A_TEXT)
    monkeypatch.setattr(labs, "_ROUNDS", 4)
    monkeypatch.setattr(TaskLab, "backbone", lambda *arguments: pytest.fail("a training began"))
    assert labs.costs(lab)
    kept = labs.read(lab.plan.results / "costs.json")
    assert kept["data"] == lab.train.digest
    for name, outcome in (
        ("0-sft2", {"variant": "sft2", "data": "another digest"}),
        ("costs", kept | {"data": "another digest"}),
    ):
        path = lab.plan.results / f"{name}.json"
        labs.write(path, outcome)
        for train in (
            lambda: labs.outcome(lab, 0, "processor"),
            lambda: labs.rate_score(lab, 1, "sft2", 1e-3),
        ):
            with pytest.raises(ValueError, match=rf"{name}\.json is of other data than there is now"):
                train()
        path.unlink()
    # What does not say of which data it is stops nobody, nor does a task's.
    labs.write(lab.plan.results / "costs.json", {key: kept[key] for key in ("machine", "variants")})
    labs.write(lab.plan.results / "0-sft.json", {"variant": "sft"})
    labs.write(lab.plan.results / "0-sft2.json", {"variant": "sft2", "data": lab.train.digest})
    with pytest.raises(pytest.fail.Exception, match="a training began"):
        labs.outcome(lab, 0, "processor")
    labs.write(lab.plan.results / "0-sft2.json", {"variant": "sft2", "data": "another digest"})
    lab.plan = dataclasses.replace(lab.plan, text=None)
    with pytest.raises(pytest.fail.Exception, match="a training began"):
        labs.outcome(lab, 0, "processor")


def test_an_outcome_that_is_missing_makes_a_report_partial(uneven: plans.Plan) -> None:
    def complete() -> bool:
        return report.complete(uneven, report.read(uneven))

    assert complete()
    lost = uneven.results / "2-random.json"
    kept = lost.read_bytes()
    lost.unlink()
    assert not complete()
    (uneven.results / "3-random.json").write_bytes(kept.replace(b"of 2", b"of 3"))  # as many, and not the first two
    assert not complete()
    lost.write_bytes(kept)
    assert complete()
    (uneven.results / "backbone-4.json").unlink()
    assert not complete()


def lines_of(draw: Any, of: plans.Plan) -> dict[str, list[list[float]]] | None:
    """What a plot draws, by its labels: x and y of each line; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    if not draw(axes, of, {}, report.read(of)):
        return None
    return {str(line.get_label()): np.asarray(line.get_data()).tolist() for line in axes.get_lines()}


def test_a_plot_counts_lines_as_the_task_does(uneven: plans.Plan) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert plots._steps(axes, uneven, {}, report.read(uneven))
    assert all(np.asarray(line.get_xdata()).tolist() == [2, 5] for line in axes.get_lines())
    (shaded,) = axes.patches
    assert shaded.get_extents().transformed(axes.transData.inverted()).intervalx.tolist() == pytest.approx([4.5, 6.5])


def test_plots_show_means_over_the_backbones_that_all_lines_share(uneven: plans.Plan) -> None:
    compute = lines_of(plots._progress("compute"), uneven)
    assert compute is not None
    assert compute["processor"] == [[1.0, 2.0], [pytest.approx(0.325), pytest.approx(0.65)]]
    assert compute["sft"][1] == [pytest.approx(0.25)] * 2
    clock = lines_of(plots._progress("clock"), uneven)
    assert clock is not None
    assert clock["random"] == [[11.0, 21.0], [pytest.approx(0.175), pytest.approx(0.35)]]
    # What knows no wall clock is left out, and without the reference there is no plot.
    for name, left in (("random", {"sft", "sft2", "processor"}), ("processor", None)):
        for seed in SHARES[name]:
            path = uneven.results / f"{seed}-{name}.json"
            outcome = labs.read(path)
            labs.write(path, outcome | {"curve": [point[:2] for point in outcome["curve"]]})
        clock = lines_of(plots._progress("clock"), uneven)
        assert (clock if clock is None else set(clock)) == left


# --- generation -------------------------------------------------------------------------------------------------


PROMPTS = [[5, 9, 1], [7, 8, 11, 4, 9, 20, 41, 5, 2], [12]]


def stock(model: Any, **attached: Any) -> list[list[int]]:
    """What transformers generates, each prompt by itself."""
    made = []
    for prompt in PROMPTS:
        with attach(model, attached["processor"]) if attached else contextlib.nullcontext():
            made.append(model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :])
    return [row.tolist() for row in made]


@pytest.mark.parametrize("changes", [{}, {"top_k": 0}, {"rewrite_prompt": False}], ids=str)
def test_decoding_is_that_of_transformers(changes: dict[str, Any]) -> None:
    model = tiny.model()
    options: dict[str, Any] = {"line_ends": tiny.NEWLINES, "end": 10**6, "max_new_tokens": 40}
    assert decode(PackedBackbone(model), PROMPTS, **options) == stock(model)
    processor = tiny.processor(**changes)
    module = CacheProcessorModule(processor.config, {n: np.asarray(w) for n, w in processor.weights.items()})
    rewritten = decode(PackedBackbone(model), PROMPTS, processor=module, **options)
    assert rewritten == stock(model, processor=processor)
    assert rewritten != stock(model)


def test_decoding_ends_reads_pauses_and_cuts_steps_as_told() -> None:
    model = tiny.model()
    backbone = PackedBackbone(model)
    options: dict[str, Any] = {"line_ends": tiny.NEWLINES, "max_new_tokens": 12}
    plain = decode(backbone, PROMPTS, end=10**6, **options)
    end = plain[1][5]
    assert decode(backbone, PROMPTS, end=end, **options)[1] == plain[1][: plain[1].index(end)]
    # A pause is read behind the prompt and every line, and written nowhere.
    paused = decode(backbone, PROMPTS[:1], end=10**6, pause=50, pauses=2, **options)[0]
    context = [*PROMPTS[0], 50, 50]
    for token in paused:
        assert token == int(model(torch.tensor([context])).logits[0, -1].argmax())
        context += [token] + [50, 50] * (token in tiny.NEWLINES)


@pytest.mark.parametrize("options", [{"every": 3}, {"only_prompt": True}, {}], ids=str)
def test_decoding_is_that_of_training(options: dict[str, Any]) -> None:
    """Whatever ends a step: fed the text that was generated, the roll-out finds each of its tokens the likeliest."""
    backbone, processor = PackedBackbone(tiny.model()), tiny.processor(rewrite_prompt=True)
    module = CacheProcessorModule(processor.config, {n: np.asarray(w) for n, w in processor.weights.items()})
    made = decode(backbone, PROMPTS, line_ends=tiny.NEWLINES, end=10**6, max_new_tokens=20, processor=module, **options)
    for prompt, answer_tokens in zip(PROMPTS, made, strict=True):
        tokens, start = [*prompt, *answer_tokens], len(prompt)
        ends = [i + 1 for i in range(start, len(tokens)) if tokens[i] in tiny.NEWLINES and i + 1 < len(tokens)]
        cuts = [start, *ends, len(tokens)]
        of = Example(
            tuple(tokens),
            ((0, start), *itertools.pairwise(cuts)),
            tuple(i >= start for i in range(len(tokens))),
            "made",
        )
        if options:
            of = variants.recut(of, options.get("every", len(tokens)))
        rows: list[Any] = []
        rollout(backbone, module, [of], logits=rows)
        assert [int(row.argmax()) for _, _, row in sorted(rows, key=lambda row: row[1])] == answer_tokens


def test_an_experiment_on_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From files to outcomes, with the tiny model in the place of a real one."""
    task = RegisterTask(registers=2, steps=(2, 4))
    for name, count, seed in (("train", 60, 0), ("test", 10, 1)):
        records = [{key: r[key] for key in ("question", "answer")} for r in synthesize(task, count, seed=seed)]
        write_lines(records, tmp_path / f"{name}.jsonl")
    save_backbone(tiny_backbone(), tmp_path / "model")
    text = {
        "model": str(tmp_path / "model"),
        "adapter": str(tmp_path / "checkpoints/adapter"),
        "train": "train.jsonl",
        "test": "test.jsonl",
        "max_new_tokens": 12,
        "pause_token": "z",
    }
    values = {key: SMALL[key] for key in ("title", "training", "processor", "pairs")} | {
        "text": text,
        "seeds": [0, 1],
        "backbones": 2,
        "examples": {"held_back": 10},
        "backbone": {"sft": {"method": "lora", "iterations": 8, "batch_size": 8, "learning_rate": 3e-3}},
        "budget": {"iterations": 4, "curriculum_iterations": 0},
        "variants": {
            n: SMALL["variants"][n] | ({"export": True} if n == "processor" else {} if n == "sft" else {"backbones": 1})
            for n in ("sft", "sft2", "pause", "processor", "random", "every", "prompt")
        },
    }
    with pytest.raises(ValueError, match=r"backbone\.sft\.method must be lora for a text"):
        plans.make("small", values | {"backbone": {"sft": {"iterations": 8}}}, tmp_path, tmp_path)
    made = plans.make("small", values, tmp_path / "build", tmp_path / "results", tmp_path)
    monkeypatch.setattr(plans, "load", lambda name, **where: made)
    monkeypatch.setattr(labs, "_ROUNDS", 4)
    monkeypatch.setattr(labs, "_CURVE", 2)

    def missing(texts: Any, gold: Any) -> list[bool]:
        raise ImportError("no judge here")

    monkeypatch.setattr(text_experiments, "judged", missing)
    assert main(["small", "--data", str(tmp_path)]) == 1
    assert "no judge here" in capsys.readouterr().out
    # How a number is read is tested where that is done. It needs the answers and no weights.
    shutil.rmtree(tmp_path / "build/small/backbones")
    shutil.rmtree(tmp_path / "build/small/runs")
    monkeypatch.setattr(
        text_experiments, "judged", lambda texts, gold: [a == b for a, b in zip(texts, gold, strict=True)]
    )
    assert main(["small", "--data", str(tmp_path), "--report"]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "results/small.json").read_text())
    assert found["n"] == 10
    assert found["complete"]
    answers = json.loads((tmp_path / "build/small/answers/0-processor.json").read_text())["answers"]
    assert len(answers) == 10
    judged = [json.loads((tmp_path / f"results/small/backbone-{seed}.json").read_text()) for seed in (0, 1)]
    assert list(judged[0]["cross_entropy"]) == [str(i) for i in range(1, 9)]
    stock = describe(tmp_path / "model")["backbone"]["weights_hash"]
    assert judged[0]["weights_hash"] == judged[1]["weights_hash"] != stock
    # The adapter is enough: TextLab.backbone refuses other weights than those of the outcomes.
    assert not (tmp_path / "build/small/backbones").exists()
    assert TextLab(made).backbone(1) is not None
    assert (tmp_path / "build/small/backbones").exists()
    kept = [json.loads((tmp_path / f"build/small/answers/{seed}-sft.json").read_text()) for seed in (0, 1)]
    assert kept[0] == kept[1]
    assert json.loads((tmp_path / "results/small/1-sft.json").read_text())["decoding_seconds"] < 0.1
    first, second = (json.loads((tmp_path / f"results/small/{s}-processor.json").read_text()) for s in (0, 1))
    assert first["backbone"] == second["backbone"]
    assert first["held_back"] != second["held_back"]
    edits = json.loads((tmp_path / "results/small/0-processor.json").read_text())["edits"]
    assert np.shape(edits["relative"]) == np.shape(edits["keys"]) == (2, len(edits["problems"]))
    assert np.all(np.array(edits["relative"])[:, : sum(n > 0 for n in edits["problems"])] > 0)
    exported = CacheProcessor.from_pretrained(tmp_path / "build/small/export/processor")
    assert exported.config.top_k == 4
    assert TextLab(made).pause_token == task_tokenizer().convert_tokens_to_ids("z")


def test_copies_that_another_version_made_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "train.jsonl"
    problem = {"question": "Tom has 4 boxes of 6 eggs. How many?", "answer": "4*6=<<4*6=24>>24 eggs\n#### 24"}
    source.write_text(json.dumps(problem) + "\n")
    made = SimpleNamespace(plan=SimpleNamespace(build=tmp_path / "build"), text=SimpleNamespace(copies=2))
    path = TextLab._copies(made, source)
    right, note = path.read_bytes(), path.with_suffix(".json")
    assert len(right.splitlines()) == 2
    path.write_bytes(b"old\n")
    assert TextLab._copies(made, source).read_bytes() == b"old\n"  # its note says that it is right
    note.write_text(json.dumps(["another source", json.loads(note.read_text())[1]]))
    assert TextLab._copies(made, source).read_bytes() == right
    path.write_bytes(b"old\n")
    note.unlink()
    assert TextLab._copies(made, source).read_bytes() == right


def test_copies_may_be_made_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text("a problem")
    made = SimpleNamespace(plan=SimpleNamespace(build=tmp_path / "build"), text=SimpleNamespace(copies=2))
    begun, others = [], []

    def lines(first: bool) -> Iterator[dict[str, str]]:
        yield {"question": "1"}
        if first:
            others.append(TextLab._copies(made, source))
        yield {"question": "2"}

    def augment_file(*arguments: Any, **options: Any) -> Any:
        begun.append(source)
        return SimpleNamespace(lines=lines(first=len(begun) == 1))

    def write_text(self: Path, *arguments: Any, **options: Any) -> int:
        assert self.parent != tmp_path / "build/data", "read while it is written"
        return original(self, *arguments, **options)

    original = Path.write_text
    monkeypatch.setattr(text_experiments.augment, "augment_file", augment_file)
    monkeypatch.setattr(Path, "write_text", write_text)
    path = TextLab._copies(made, source)
    assert others == [path]
    assert path.read_text() == '{"question": "1"}\n{"question": "2"}\n'
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.2-copies.json", "train.2-copies.jsonl"]
    assert len(json.loads(path.with_suffix(".json").read_text())) == 2
