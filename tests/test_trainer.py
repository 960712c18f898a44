"""Both stages as programs and notebooks use them: steps, checkpoints, interruptions, exports."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import SmolLM3Config, SmolLM3ForCausalLM  # noqa: E402

from bottlenecked import CacheProcessor, CacheProcessorConfig  # noqa: E402
from bottlenecked.backbones import merge_adapter  # noqa: E402
from bottlenecked.checkpoint import load_weights  # noqa: E402
from bottlenecked.integrations.transformers import attach  # noqa: E402
from bottlenecked.module import CacheProcessorModule  # noqa: E402
from bottlenecked.training import trainer as trainer_module  # noqa: E402
from bottlenecked.training.config import CurriculumConfig, ProcessorConfig, SFTConfig, TrainingConfig  # noqa: E402
from bottlenecked.training.data import Dataset, Example  # noqa: E402
from bottlenecked.training.evaluate import compare  # noqa: E402
from bottlenecked.training.rollout import Losses  # noqa: E402
from bottlenecked.training.trainer import BackboneTrainer, NonFiniteLossError, ProcessorTrainer, Trainer  # noqa: E402
from tests import gloo_training, tiny  # noqa: E402
from tests.test_rollout import example  # noqa: E402

SMALL = {"dim": 32, "heads": 4, "mlp_dim": 48, "top_k": 5, "recent_window": 8, "warmup": 0}


def dataset(count: int = 12, seed: int = 0) -> Dataset:
    made = [example(6 + i % 4, [4] * (1 + i % 3), seed + i) for i in range(count)]
    return Dataset(made, digest=f"made:{count}:{seed}")


def configuration(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {**SMALL, "batch_size": 4, "iterations": 6, "evaluate_every": 2, "save_every": 2}
    sft = SFTConfig(batch_size=4, iterations=6, learning_rate=1e-3, evaluate_every=2, save_every=2)
    return TrainingConfig(sft=sft, processor=ProcessorConfig(**(settings | changes)))


def processor_trainer(output: Path | None = None, model: Any = None, **changes: Any) -> ProcessorTrainer:
    model = tiny.model() if model is None else model
    config = configuration(**changes)
    return ProcessorTrainer(model, tiny.tokenizer(), dataset(), dataset(5, 100), config, output=output)


def backbone_trainer(output: Path | None = None, **changes: Any) -> BackboneTrainer:
    config = configuration()
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, **changes))
    return BackboneTrainer(tiny.model(), tiny.tokenizer(), dataset(), dataset(5, 100), config, output=output)


TRAINERS = {"sft": backbone_trainer, "processor": processor_trainer}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINERS)
def test_losses_fall_and_records_say_what_happened(stage: str) -> None:
    trainer = TRAINERS[stage]()
    trainer.total = 40
    before = trainer.evaluate()
    records = [trainer.step() for _ in range(40)]
    assert [r.iteration for r in records] == list(range(1, 41))
    assert all(r.gradient_norm > 0 and r.seconds > 0 and r.tokens > 40 for r in records)
    assert records[0].learning_rate == 1e-3
    assert records[-1].learning_rate < 1e-5
    first, last = (np.mean([r.loss for r in part]) for part in (records[:3], records[-3:]))
    assert last < first - (0.5 if stage == "sft" else 0.01)
    if stage == "processor":
        assert abs(before.kinds["all"].difference) < 1e-5
        assert abs(trainer.evaluate().kinds["all"].difference) > 1e-3


def test_the_backbone_stays_as_it_was() -> None:
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = processor_trainer(model=model)
    trainer.step()
    assert_same(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_accumulated_passes_are_one_batch() -> None:
    whole, parts = processor_trainer(batch_size=12), processor_trainer(batch_size=4, accumulation=3)
    records = whole.step(), parts.step()
    assert records[0].loss == pytest.approx(records[1].loss, rel=1e-5)
    assert records[0].tokens == records[1].tokens
    assert records[0].gradient_norm == pytest.approx(records[1].gradient_norm, rel=1e-4)
    for name, tensor in whole.parameters.items():
        # Gradients that are zero but for rounding are all that AdamW's first step sees of some.
        if name not in ("k_proj_bias",):
            torch.testing.assert_close(tensor.grad, parts.parameters[name].grad, rtol=1e-3, atol=1e-6)


def test_a_curriculum_comes_first() -> None:
    early = Dataset([dataclasses.replace(e, name=f"early:{i}") for i, e in enumerate(dataset(8, 50).examples)])
    config = configuration(curriculum=CurriculumConfig(files=("early.jsonl",), iterations=3), accumulation=2)
    seen: list[list[str]] = []

    class Watching(ProcessorTrainer):
        def losses(self, batch: Any, denominator: float | None = None) -> Losses:
            seen.append([e.name for e in batch])
            return super().losses(batch, denominator)

    def make() -> Watching:
        return Watching(tiny.model(), tiny.tokenizer(), dataset(), dataset(5, 100), config, curriculum=early)

    trainer = make()
    for _ in range(6):
        trainer.step()
    assert all(name.startswith("early") for batch in seen[:6] for name in batch)
    assert not any(name.startswith("early") for batch in seen[6:] for name in batch)
    whole, seen[:] = list(seen), []
    for done in (1, 3, 4):
        again = make()
        again.iteration = done
        again.step()
        assert seen[-2:] == whole[2 * done : 2 * done + 2]
    with pytest.raises(
        ValueError, match=r"curriculum\.iterations is 3, but it must be less than iterations, which is 3"
    ):
        ProcessorTrainer(
            tiny.model(),
            tiny.tokenizer(),
            dataset(),
            dataset(5),
            configuration(curriculum=CurriculumConfig(files=("early.jsonl",), iterations=3), iterations=3),
            curriculum=early,
        )


def test_epochs_count_iterations() -> None:
    assert processor_trainer(iterations=None, epochs=2.0).total == 6
    assert processor_trainer(iterations=None, epochs=2.0, accumulation=2).total == 3
    with pytest.raises(ValueError, match="batch of 64"):
        processor_trainer(batch_size=64)


# --- not finite -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    model = tiny.model()
    data = dataset()
    odd = data.examples[7]
    tokens = (*odd.tokens[:7], 61, *odd.tokens[8:])  # nobody else has the token 61
    poisoned = [*data.examples[:7], dataclasses.replace(odd, tokens=tokens, name="bad.jsonl:8"), *data.examples[8:]]
    with torch.no_grad():
        model.model.embed_tokens.weight[61] = float("nan")
    trainer = ProcessorTrainer(
        model, tiny.tokenizer(), Dataset(poisoned), dataset(5), configuration(batch_size=12, iterations=6)
    )
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match=r"the loss of bad\.jsonl:8 is not finite in iteration 1;"):
        trainer.step()
    assert_same(before, weights(trainer))


def test_a_gradient_that_is_not_finite_names_the_batch() -> None:
    trainer = processor_trainer(batch_size=12)
    trainer.parameters["out_proj_weight"].register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite in iteration 1; this device's batch was"):
        trainer.step()


# --- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("sft", {}), ("sft", {"method": "lora"}), ("processor", {}), ("processor", {"selection": "random"})],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(stage: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if changes.get("method") == "lora":
        pytest.importorskip("peft")
    settings = {"accumulation": 2, "batch_size": 3} | changes
    whole = TRAINERS[stage](tmp_path / "whole", **settings)
    whole_losses = [whole.step().loss for _ in range(6)]
    first = TRAINERS[stage](tmp_path / "parts", **settings)
    losses = [first.step().loss for _ in range(3)]
    first.evaluate()  # must not disturb anything
    first.save()
    torch.manual_seed(77)
    second = TRAINERS[stage](tmp_path / "parts", **settings)
    second.resume()
    assert second.iteration == 3
    losses += [second.step().loss for _ in range(3)]
    assert losses == whole_losses
    assert_same(weights(whole), weights(second))


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["TERM", "INT"]
)
def test_signals_save_first(number: int, raised: type[BaseException], tmp_path: Path) -> None:
    class Interrupted(ProcessorTrainer):
        def losses(self, batch: Any, denominator: float | None = None) -> Losses:
            if denominator is not None and self.iteration == 2:
                os.kill(os.getpid(), number)
            return super().losses(batch, denominator)

    def make(kind: type[ProcessorTrainer]) -> ProcessorTrainer:
        config = configuration(save_every=1000)
        return kind(tiny.model(), tiny.tokenizer(), dataset(), dataset(5, 100), config, output=tmp_path)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(raised) as caught:
        make(Interrupted).run()
    if raised is SystemExit:
        assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    again = make(ProcessorTrainer)
    again.resume()
    assert again.iteration == 3  # the step under way was finished
    again.run()
    straight = make(ProcessorTrainer)
    for _ in range(6):
        straight.step()
    assert_same(weights(straight), weights(again))


@pytest.mark.parametrize("where", ["evaluate", "save"])
def test_a_signal_in_the_last_evaluation_or_save_is_not_lost(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes behind `run`, such as the next stage, must not begin."""
    trainer = processor_trainer(tmp_path, evaluate_every=1000, save_every=1000)
    ours = getattr(trainer, where)

    def interrupted() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return ours()

    monkeypatch.setattr(trainer, where, interrupted)
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 143
    again = processor_trainer(tmp_path, evaluate_every=1000, save_every=1000)
    again.resume()
    assert again.iteration == again.total  # all of it was saved
    again.run()


def test_a_signal_to_another_process_at_the_end_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = processor_trainer(iterations=1)
    told = []
    evaluate = trainer.evaluate

    def evaluated() -> Any:
        told.append(signal.SIGTERM)  # to the other process
        return evaluate()

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    monkeypatch.setattr(trainer, "_sum", lambda value: value + len(told))
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 143


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    trainer = processor_trainer(tmp_path)
    trainer.step()
    trainer.save()
    before = trainer.checkpoint.read_bytes()
    trainer.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|cannot be written"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.checkpoint.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["processor.checkpoint"]
    again = processor_trainer(tmp_path)
    again.resume()
    assert again.iteration == 1


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    trainer = processor_trainer(tmp_path)
    trainer.step()
    trainer.save()
    for other, message in (
        (processor_trainer(tmp_path, learning_rate=1e-4), r"config.processor.learning_rate was 0.001 and is 0.0001;"),
        (processor_trainer(tmp_path, tiny.model(seed=1)), r"backbone.weights_hash was 'sha256:\w+' and is 'sha256"),
        (processor_trainer(tmp_path, top_k=4, gate=0.0), r"top_k was 5 and is 4; config.processor.gate was -2.0"),
    ):
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            other.resume()
        assert_same(before, weights(other))
        assert other.iteration == 0
    other = ProcessorTrainer(
        tiny.model(), tiny.tokenizer(), dataset(13), dataset(5, 100), configuration(), output=tmp_path
    )
    with pytest.raises(ValueError, match="data was 'made:12:0' and is 'made:13:0'"):
        other.resume()


def test_another_split_of_the_same_data_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is held back now would have been trained on."""
    examples = list(dataset(17).examples)

    def make(held_back: list[int], curriculum: range = range(8, 16)) -> ProcessorTrainer:
        def part(rows: Iterable[int]) -> Dataset:
            return Dataset([examples[i] for i in rows], digest="of all")

        config = configuration(curriculum=CurriculumConfig(files=("x",), iterations=1))
        arguments = (tiny.tokenizer(), part(i for i in range(17) if i not in held_back), part(held_back), config)
        return ProcessorTrainer(tiny.model(), *arguments, output=tmp_path, curriculum=part(curriculum))

    trainer = make([0, 1, 2, 3])
    trainer.step()
    trainer.save()
    for other, message in (
        (make([0, 1, 2, 4]), r"run: examples\.data was '13, \w{16}' and is '13, \w{16}'; examples\.held_back was '4, "),
        (make([0, 1, 2]), r"; examples\.held_back was '4, \w{16}' and is '3, \w{16}'; use the same"),
        (make([0, 1, 2, 3], range(8, 15)), r"run: examples\.curriculum was '8, \w{16}' and is '7, \w{16}'; use"),
    ):
        with pytest.raises(ValueError, match=message):
            other.resume()
        assert other.iteration == 0
    again = make([0, 1, 2, 3])
    again.resume()
    assert again.iteration == 1
    assert capsys.readouterr().out == ""
    # A checkpoint of before does not say which they were.
    with safe_open(trainer.checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    del state["fingerprint"]["examples"]
    save_file(tensors, trainer.checkpoint, {"state": json.dumps(state)})
    make([0, 1, 2, 4]).resume()
    assert "processor.checkpoint does not say which examples were held back" in capsys.readouterr().out


def test_another_number_of_devices_is_not_resumed(tmp_path: Path) -> None:
    """With epochs it has another number of iterations: what is left of the run would be cut off."""

    def make(devices: int) -> ProcessorTrainer:
        accelerator = SimpleNamespace(
            num_processes=devices,
            process_index=0,
            is_main_process=True,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
        )
        config = configuration(iterations=None, epochs=4.0, batch_size=2)
        arguments = (tiny.tokenizer(), dataset(), dataset(5, 100), config)
        return ProcessorTrainer(tiny.model(), *arguments, output=tmp_path, accelerator=accelerator)

    one = make(1)
    one.step()
    one.save()
    two = make(2)
    assert (one.total, two.total) == (24, 12)
    with pytest.raises(ValueError, match=r"is of another run: num_devices was 1 and is 2; use the same, or another"):
        two.resume()
    assert two.iteration == 0
    # A checkpoint of before does not say how many there were.
    with safe_open(one.checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    state["fingerprint"].pop("num_devices")
    save_file(tensors, one.checkpoint, {"state": json.dumps(state)})
    two.resume()
    assert two.iteration == 1


def test_damaged_or_missing_checkpoints_are_named(tmp_path: Path) -> None:
    trainer = processor_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"processor\.checkpoint does not exist"):
        trainer.resume()
    trainer.save()
    trainer.checkpoint.write_bytes(trainer.checkpoint.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"processor\.checkpoint cannot be read"):
        trainer.resume()
    save_file({"a": torch.zeros(1)}, trainer.checkpoint)
    with pytest.raises(ValueError, match="no checkpoint of this version"):
        trainer.resume()
    torch.save({"format": 1}, trainer.checkpoint)
    with pytest.raises(ValueError, match="cannot be read"):
        trainer.resume()
    processor_trainer(tmp_path).save()
    with safe_open(trainer.checkpoint, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors.pop(next(name for name in tensors if name.startswith("parameters.")))
    save_file(tensors, trainer.checkpoint, metadata)
    with pytest.raises(ValueError, match="lacks the parameter"):
        trainer.resume()
    with pytest.raises(ValueError, match="no output directory"):
        processor_trainer().save()


def test_a_processor_of_another_backbone_is_refused() -> None:
    config = configuration()
    trained = processor_trainer().processor
    arguments = (tiny.tokenizer(), dataset(), dataset(5), config)
    ProcessorTrainer(tiny.model(), *arguments, processor=trained)
    with pytest.raises(ValueError, match=r"cannot be trained on here: backbone\.weights_hash was"):
        ProcessorTrainer(tiny.model(seed=1), *arguments, processor=trained)
    with pytest.raises(ValueError, match="num_kv_heads was 2 and is 4"):
        ProcessorTrainer(tiny.model(num_key_value_heads=4), *arguments, processor=trained)
    with pytest.raises(ValueError, match=r"processor.layers names layer 3, but the backbone's are 0 to 2"):
        processor_trainer(layers=(0, 3))


# --- devices --------------------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.gloo_training", "4", str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd=root, stderr=subprocess.PIPE
        )
        for rank in "01"
    ]
    one = gloo_training.train(8, tmp_path / "one")
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    two, second = (torch.load(tmp_path / f"result.{rank}.pt") for rank in "01")
    assert_same(two["parameters"], second["parameters"])
    assert (two["losses"], two["evaluation"]) == (second["losses"], second["evaluation"])
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-5)
    assert len(set(one["losses"])) == 3
    for kind, figures in one["evaluation"]["kinds"].items():
        for key, value in figures.items():
            assert two["evaluation"]["kinds"][kind][key] == pytest.approx(value, rel=1e-4, abs=1e-6)
    for name, tensor in one["parameters"].items():
        if name == "k_proj_bias":  # its gradient is zero but for rounding, which is all that AdamW sees
            continue
        # AdamW divides by the gradient's size: where that is tiny, rounding shows. Three steps of at most 1e-3.
        difference = (tensor - two["parameters"][name]).abs()
        assert float(difference.mean()) < 1e-6, name
        assert float(difference.max()) < 1e-3, name


# --- ablations and exports ------------------------------------------------------------------------------------------


def exported(tmp_path: Path, steps: int = 3, **changes: Any) -> tuple[CacheProcessorConfig, dict[str, np.ndarray]]:
    trainer = processor_trainer(**changes)
    for _ in range(steps):
        trainer.step()
    trainer.export(tmp_path / "processor")
    config = CacheProcessorConfig.load(tmp_path / "processor")
    return config, load_weights(tmp_path / "processor", config)


@pytest.mark.parametrize(("edit", "kept"), [("keys", slice(0, 32)), ("values", slice(32, 64))])
def test_keys_or_values_only(edit: str, kept: slice, tmp_path: Path) -> None:
    config, tensors = exported(tmp_path, edit=edit)
    for layer in range(3):
        out, bias = (tensors[f"layers.{layer}.out_proj.{kind}"] for kind in ("weight", "bias"))
        assert out[kept].any(axis=1).all()
        assert bias[kept].all()
        others = np.delete(np.arange(config.kv_width), kept)
        assert not out[others].any()
        assert not bias[others].any()


def test_a_part_of_the_backbone_is_trained() -> None:
    model = tiny.model()
    config = configuration()
    parts = ("model.layers.1.", "lm_head")
    trainer = BackboneTrainer(model, tiny.tokenizer(), dataset(), dataset(5, 100), config, trained=parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith(parts), name


def test_a_constant_edit(tmp_path: Path) -> None:
    """The same for every row, whatever it holds; where it is told to leave the keys alone, it does."""
    config, tensors = exported(tmp_path, constant=True, edit="values")
    half = config.kv_width // 2
    for layer in range(3):
        assert not tensors[f"layers.{layer}.out_proj.weight"].any()
        bias = tensors[f"layers.{layer}.out_proj.bias"]
        assert not bias[:half].any()
        assert bias[half:].all()
    module = CacheProcessorModule.from_pretrained(tmp_path / "processor")
    edits = module(torch.randn(3, 6, config.kv_width))
    assert torch.equal(edits, edits[:, :1].expand_as(edits))
    assert bool(edits.any())


def test_a_subset_of_layers(tmp_path: Path) -> None:
    _, tensors = exported(tmp_path, layers=(1,))
    assert [bool(tensors[f"layers.{i}.out_proj.weight"].any()) for i in range(3)] == [False, True, False]
    model, ids = tiny.model(), torch.tensor([[5, 6, 7, 8, 9, 11, 12, 13]])
    processor = CacheProcessor.from_pretrained(tmp_path / "processor", weight_dtype="float32")
    reports: list[Any] = []
    with attach(model, processor, on_boundary=reports.append):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert reports[0].delta_norm[:, 0].astype(bool).tolist() == [False, True, False]


def test_what_the_checkpoint_says(tmp_path: Path) -> None:
    config, tensors = exported(
        tmp_path,
        steps=0,
        top_k=0,
        recent_window=7,
        rewrite_prompt=False,
        key_space="unrotated",
        gate=0.5,
        timing="pre",
        min_step_length=2,
    )
    assert (config.top_k, config.recent_window, config.rewrite_prompt, config.key_space) == (0, 7, False, "unrotated")
    assert (config.boundary.timing, config.boundary.min_step_length) == ("pre", 2)
    assert config.boundary.token_ids == tiny.NEWLINES
    assert [float(tensors[f"layers.{i}.gate"]) for i in range(3)] == [0.5] * 3


def test_layers_without_rope() -> None:
    model = SmolLM3ForCausalLM(SmolLM3Config(**(tiny.SHAPE | {"num_hidden_layers": 4})))
    processor_trainer(model=model)
    with pytest.raises(ValueError, match=r"no_rope_layers is \[1, 1, 1, 0\], but .* key_space must be \"rotated\""):
        processor_trainer(model=model, key_space="unrotated")


def test_only_the_prompt(tmp_path: Path) -> None:
    exported(tmp_path, only_prompt=True)
    model, text = tiny.model(), [tiny.NEWLINES[0], 5, tiny.NEWLINES[1], 5, 6]
    processor = CacheProcessor.from_pretrained(tmp_path / "processor")
    with attach(model, processor) as attachment:
        model.generate(
            torch.tensor([[5, 6, 8]]), max_new_tokens=5, do_sample=False, logits_processor=[tiny.Script(text)]
        )
    assert attachment.stats.boundaries == 1


def test_signals_keep_their_size_at_the_start() -> None:
    x = torch.randn(3, 200, 64)
    for dim in (32, 128):
        made = processor_trainer(dim=dim, mlp_dim=4 * dim, gate=0.0).processor
        assert not made(x).any()
        with torch.no_grad():
            made.get_parameter("out_proj_weight").normal_(std=dim**-0.5)
        # Half of it is the gate's; of the residual stream's 1 + 0.5^2 * (attention, MLP) little is left to chance.
        assert 0.4 < float(made(x).std()) < 0.7
        assert made.state_dict()["layers.0.gate"] == 0


@pytest.mark.parametrize("changes", [{"write": "recalled"}, {"selection": "random"}, {"positions": True}], ids=str)
def test_what_no_checkpoint_expresses_is_not_exported(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = processor_trainer(**changes)
    trainer.step()
    ((name, value),) = changes.items()
    with pytest.raises(NotImplementedError, match=rf"not exported.*processor\.{name} was .* and is {value!r}"):
        trainer.export(tmp_path / "processor")
    assert not (tmp_path / "processor").exists()
    assert trainer.evaluate().examples == 5


def test_a_whole_run_and_its_export(tmp_path: Path) -> None:
    trainer = processor_trainer(tmp_path / "run")
    trainer.run()
    rows = list(csv.DictReader((tmp_path / "run" / "processor.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "run" / "processor.evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 4, 6]
    found = trainer.evaluate()
    assert json.loads(lines[-1])["kinds"]["all"]["difference"] == found.kinds["all"].difference
    trainer.export(tmp_path / "processor", files=["a.jsonl"], evaluation=found)

    config = CacheProcessorConfig.load(tmp_path / "processor")
    assert config.training["config"] == trainer.config.to_dict()
    assert config.training["data"]["digest"] == "made:12:0"
    assert config.training["evaluation"]["examples"] == 5
    card = (tmp_path / "processor" / "README.md").read_text()
    assert "a.jsonl: 12 examples, 5 more held back" in card
    assert f"{found.kinds['all'].difference:+.4f} [" in card
    again = CacheProcessorModule.from_pretrained(tmp_path / "processor")
    assert_same(dict(again.state_dict()), dict(trainer.processor.state_dict()))
    with pytest.raises(Exception, match="weights_hash"):
        attach(tiny.model(seed=1), CacheProcessor.from_pretrained(tmp_path / "processor"))


def test_logs_of_a_resumed_run_have_each_step_once(tmp_path: Path) -> None:
    trainer = processor_trainer(tmp_path)
    trainer.run()
    first = processor_trainer(tmp_path / "parts")
    for _ in range(3):
        first.step()
    first.save()
    (tmp_path / "parts" / "processor.csv").write_text((tmp_path / "processor.csv").read_text())
    evaluations = tmp_path / "parts" / "processor.evaluations.jsonl"
    evaluations.write_text((tmp_path / "processor.evaluations.jsonl").read_text())
    again = processor_trainer(tmp_path / "parts")
    again.resume()
    again.run()
    rows = list(csv.DictReader((tmp_path / "parts" / "processor.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["iteration"] for line in evaluations.read_text().splitlines()] == [2, 4, 6]


def test_lora_trains_adapters_and_exports_a_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    trainer = backbone_trainer(method="lora", lora_rank=2, learning_rate=1e-2)
    assert all("lora" in name for name in trainer.parameters)
    for _ in range(3):
        trainer.step()
    example_ids = torch.tensor([dataset().examples[2].tokens])
    with torch.no_grad():
        adapted = trainer.model.eval()(input_ids=example_ids).logits
    for name in ("another", "tiny"):  # the second takes the first one's place
        trainer.export_adapter(tmp_path / "adapter", backbone=name)
    trainer.export(tmp_path / "backbone", files=["a.jsonl"], evaluation=trainer.evaluate())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    stock = tiny.model()
    assert plain.state_dict().keys() == stock.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=example_ids).logits, adapted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(stock(input_ids=example_ids).logits, adapted, atol=1e-2)
    assert "fine-tuned" in (tmp_path / "backbone" / "README.md").read_text()
    # The adapters alone, in bfloat16: merged into stock they give the same, to that rounding.
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    stock.save_pretrained(tmp_path / "stock")
    tiny.tokenizer().save_pretrained(tmp_path / "stock")
    merge_adapter(tmp_path / "stock", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        errors = [(model(input_ids=example_ids).logits - adapted).abs().mean() for model in (merged, stock)]
        assert errors[0] < 0.02 * errors[1]
    with pytest.raises(ValueError, match=r"sft\.method is 'full', but only lora has adapters"):
        backbone_trainer().export_adapter(tmp_path / "none")


def test_bfloat16_keeps_float32_weights() -> None:
    config = dataclasses.replace(configuration(), dtype="bfloat16")
    arguments = (tiny.tokenizer(), dataset(), dataset(5), config)
    stage = BackboneTrainer(tiny.model(), *arguments)
    wide = backbone_trainer()
    assert stage.step().loss == pytest.approx(wide.step().loss, rel=2e-2)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in stage.parameters.values())
    second = ProcessorTrainer(tiny.model(torch.bfloat16), *arguments)
    assert second.step().loss == pytest.approx(processor_trainer().step().loss, rel=2e-2)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in second.parameters.values())


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_paired_differences_and_their_interval() -> None:
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(1, 20, (400, 2)))
    before = counts * torch.from_numpy(rng.uniform(0, 5, (400, 1)))  # examples differ by far more than the two do
    per_token = torch.from_numpy(rng.normal(-0.1, 0.2, (400, 1)))
    found = compare(Losses(before, counts), Losses(before + counts * per_token, counts))
    c = found.kinds["all"]
    assert found.examples == 400
    assert c.tokens == int(counts.sum()) == found.kinds["first"].tokens + found.kinds["rest"].tokens
    expected = float((counts * per_token).sum() / counts.sum())
    assert c.difference == pytest.approx(expected)
    assert c.processor - c.identity == pytest.approx(expected)
    assert c.low < expected < c.high
    totals = counts.sum(1).double()
    spread = float((totals * (per_token[:, 0] - expected)).square().sum().sqrt() / totals.sum())
    assert c.high - c.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    with pytest.raises(ValueError, match="not of the same tokens"):
        compare(Losses(before, counts), Losses(before, counts + 1))


def test_training_never_imports_the_extension() -> None:
    package = Path(trainer_module.__file__).parent
    imported = set()
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(f"{'.' * node.level}{node.module or ''}")
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert "..module" in imported
    assert not {name for name in imported if "bottleneck_ext" in name or name.lstrip(".") == "processor"}
    assert not {name for name in imported if "integrations" in name}


def test_interface_of_examples() -> None:
    """What the roll-out relies on."""
    assert [f.name for f in dataclasses.fields(Example)] == ["tokens", "segments", "loss_mask", "name"]
