"""`bottlenecked eval` and `bottlenecked lm-eval` from files to files, against plain loops over the same items."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
pytest.importorskip("scipy")

import torch

from bottlenecked import CacheProcessor, backbones, cli
from bottlenecked.checkpoint import save_checkpoint
from bottlenecked.evaluation import engines
from bottlenecked.evaluation.engines import System
from bottlenecked.evaluation.records import RecordFile
from bottlenecked.evaluation.run import Settings, evaluate, parse_baseline
from bottlenecked.evaluation.statistics import compare_paired, wilson
from bottlenecked.integrations.transformers import attach
from bottlenecked.module import CacheProcessorModule
from bottlenecked.training import tasks
from bottlenecked.training.data import load_examples
from bottlenecked.training.evaluate import compare
from bottlenecked.training.packed import PackedBackbone
from bottlenecked.training.rollout import rollout, supervised
from bottlenecked.training.tasks import RegisterTask, exact_match, save_backbone, synthesize, tiny_backbone
from tests import tiny

TEMPLATE = "{question} "
TOKENS = 12
COUNT = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, processor/, other/ (a second Processor), model2/ (other weights) and problems.jsonl.

    A problem's reference is the number that the plain model's answer ends with, or that with the Processor's, or 9999.
    """
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = f"w{tiny.EOS}"
    for name, seed in (("base", 0), ("model2", 5)):
        tiny.model(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny.processor().save_pretrained(folder / "processor")
    tiny.processor(random_scale=2.0, top_k=2).save_pretrained(folder / "other")
    rng = np.random.default_rng(0)
    words = [i for i in range(tiny.VOCABULARY - 4) if i not in tiny.NEWLINES]
    questions = [" ".join(f"w{i}" for i in rng.choice(words, 5 + i % 4)) for i in range(COUNT)]
    plain = written(folder, "base", None, questions)
    rewritten = written(folder, "base", "processor", questions)
    assert sum(a != b for a, b in zip(plain, rewritten, strict=True)) > COUNT // 2
    with (folder / "problems.jsonl").open("w") as file:
        for i, question in enumerate(questions):
            number = {0: last_number(plain[i]), 1: last_number(rewritten[i])}.get(i % 3, "9999")
            file.write(json.dumps({"question": question, "answer": "step\n" * (i % 2) + f"#### {number}"}) + "\n")
    (folder / "questions.json").write_text(json.dumps({"questions": questions, "plain": plain, "with": rewritten}))
    return folder


def written(folder: Path, model: str, processor: str | None, questions: list[str]) -> list[str]:
    """What a system writes, one question at a time."""
    lm, tokenizer = backbones.load(folder / model)
    attached: Any = contextlib.nullcontext()
    if processor is not None:
        attached = attach(lm, CacheProcessor.from_pretrained(folder / processor), tokenizer)
    texts = []
    with attached:
        for question in questions:
            ids = tokenizer(TEMPLATE.format(question=question), return_tensors="pt")["input_ids"]
            out = lm.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=tiny.EOS)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def last_number(text: str) -> str:
    """Without any library: words are w0 to w63."""
    return re.findall(r"\d+", text)[-1]


def references(world: Path) -> list[str]:
    lines = (world / "problems.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"].rpartition(" ")[2] for line in lines]


def command(world: Path, output: Path, *more: object) -> list[str]:
    return [
        "eval",
        *("--model", str(world / "base"), "--data", str(world / "problems.jsonl"), "--output", str(output)),
        *("--template", TEMPLATE, "--max-new-tokens", str(TOKENS), "--batch-size", "6", "--device", "cpu"),
        *map(str, more),
    ]


def records(path: Path) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in map(json.loads, path.read_text().splitlines())}


def test_a_processor_against_baselines(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--processor", world / "processor", "--baseline", "plain", "--baseline", world / "other")
    other = ("--baseline", f"tuned={world / 'model2'}")
    assert cli.main(command(world, tmp_path / "out", *more, *other)) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() == table
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = metrics["data"]["problems"]
    assert list(found["systems"]) == ["processor", "plain", "other", "tuned"]

    expected = json.loads((world / "questions.json").read_text())
    right: dict[str, list[bool]] = {}
    for name, texts in (
        ("processor", expected["with"]),
        ("plain", expected["plain"]),
        ("other", written(world, "base", "other", expected["questions"])),
        ("tuned", written(world, "model2", None, expected["questions"])),
    ):
        by_name = records(tmp_path / "out" / "predictions" / f"{name}.problems.jsonl")
        made = [by_name[f"problems.jsonl:{i + 1}"] for i in range(COUNT)]
        assert [r["text"] for r in made] == texts, name
        right[name] = [last_number(text) == reference for text, reference in zip(texts, references(world), strict=True)]
        assert [r["right"] for r in made] == right[name]
        assert [r["number"] for r in made] == [last_number(text) for text in texts]
        system = found["systems"][name]
        assert system["right"] == sum(right[name])
        low, high = wilson(sum(right[name]), COUNT)
        assert system["accuracy"] == {"value": sum(right[name]) / COUNT, "low": low, "high": high}
        assert system["strict_accuracy"]["value"] == 0  # nothing here writes ####
        assert system["tokens"] == sum(r["tokens"] for r in made)
        assert all(r["tokens"] == TOKENS or r["stopped"] for r in made)
        assert system["unfinished"] == sum(not r["stopped"] for r in made)
        assert system["memory"] > 1e6
        assert system["tokens_per_second"] > 0
        # Problems 2, 4, ... have a line of reasoning before ####, the others none.
        assert system["by_steps"]["1"]["accuracy"]["value"] == np.mean(right[name][1::2])
    assert 0 < sum(right["plain"]) < COUNT
    assert right["processor"] != right["plain"]
    for name in ("plain", "other", "tuned"):
        pair = compare_paired(right[name], right["processor"])
        made_pair = found["comparisons"][name]
        assert made_pair["p_value"] == pair.p_value
        assert made_pair["difference"]["value"] == pair.difference.value
        assert (made_pair["first_only"], made_pair["second_only"]) == (pair.first_only, pair.second_only)
        assert f"| problems | {name} | {COUNT} | {sum(right[name]) / COUNT:.3f} [" in table


def test_an_interrupted_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--processor", world / "processor", "--baseline", "plain")
    assert cli.main(command(world, tmp_path / "whole", *more)) == 0
    stock = engines.Transformers.generate
    asked: list[str] = []

    def counted(self: Any, system: System, problems: Any, limit: int, stop_after: int | None = None) -> Any:
        for i, batch in enumerate(stock(self, system, problems, limit)):
            if i == stop_after:
                raise KeyboardInterrupt
            asked.extend(f"{system.name} {answer.problem.name}" for answer in batch.answers)
            yield batch

    output = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(engines.Transformers, "generate", lambda *a: counted(*a, stop_after=1))
        assert cli.main(command(world, output, *more)) == 130
    file = output / "predictions" / "processor.problems.jsonl"
    assert len(records(file)) == len(asked) == 6
    assert not (output / "metrics.json").exists()
    with file.open("a") as damaged:
        damaged.write('{"name": "problems.jsonl:')  # a last line that did not reach the disk
    assert cli.main(command(world, output, *more)) == 1  # not without --resume

    monkeypatch.setattr(engines.Transformers, "generate", counted)
    assert cli.main(command(world, output, *more, "--resume")) == 0
    assert len(asked) == len(set(asked)) == 2 * COUNT

    def figures(folder: Path) -> Any:
        found = json.loads((folder / "metrics.json").read_text())["data"]
        for system in found["problems"]["systems"].values():
            for key in ("seconds", "tokens_per_second", "memory"):
                del system[key]
        return found

    assert figures(output) == figures(tmp_path / "whole")
    # A finished run is done at once, with another baseline too, and with fewer problems.
    asked.clear()
    assert cli.main(command(world, output, *more, "--baseline", world / "other", "--resume")) == 0
    assert {name.partition(" ")[0] for name in asked} == {"other"}
    asked.clear()
    assert cli.main(command(world, output, *more, "--limit", 7, "--resume")) == 0
    assert asked == []
    found = json.loads((output / "metrics.json").read_text())
    assert found["data"]["problems"]["systems"]["plain"]["problems"] == found["limit"] == 7
    assert set(found["run"]["systems"]) == {"processor", "plain", "other"}


def test_another_run_is_not_resumed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(command(world, output, "--resume")) == 1
    assert "holds nothing to resume" in capsys.readouterr().err
    assert cli.main(command(world, output, "--limit", 2)) == 0
    for changed, message in (
        (("--dtype", "bfloat16"), "dtype was 'float32' and is 'bfloat16'"),
        (("--max-new-tokens", 5), "max_new_tokens was 12 and is 5"),
        (("--processor", world / "processor"), "main was 'plain' and is 'processor'"),
    ):
        capsys.readouterr()
        assert cli.main(command(world, output, *changed, "--resume")) == 1
        assert message in capsys.readouterr().err


def test_whole_answers_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `exact_match` says, with what is forced given; and by steps, of a model told two answers of three."""
    model = tiny_backbone(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    save_backbone(model, tmp_path / "tiny")
    lines = list(synthesize(RegisterTask(steps=(1, 3)), 30))
    path = tmp_path / "registers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    system = System("plain", str(tmp_path / "tiny"))
    loaded, tokenizer = backbones.load(tmp_path / "tiny")
    examples = load_examples([path], tokenizer, max_length=256).examples
    prompts = [e.tokens[: e.segments[0][1]] for e in examples]

    evaluate([system], tmp_path / "out", data=[path])
    by_name = records(tmp_path / "out" / "predictions" / "plain.registers.jsonl")
    wanted = exact_match(loaded, examples, batch_size=4)
    assert [by_name[f"registers.jsonl:{i + 1}"]["right"] for i in range(30)] == wanted

    def told(model: Any, asked: Any, *, max_new_tokens: int, end_tokens: Any, given: Any) -> list[list[int]]:
        made = []
        for prompt, environment in zip(asked, given, strict=True):
            i = prompts.index(prompt)
            answer, ours = list(examples[i].tokens[len(prompt) :]), examples[i].loss_mask[len(prompt) :]
            assert list(environment) == [None if m else t for t, m in zip(answer, ours, strict=True)]
            assert len(answer) <= max_new_tokens
            if i % 3 == 0:
                answer[ours.index(True)] += 1
            made.append([*answer, 7, 7][:max_new_tokens])
        return made

    monkeypatch.setattr(tasks, "decode", told)
    found = evaluate([system], tmp_path / "told", data=[path])["data"]["registers"]
    right = [i % 3 != 0 for i in range(30)]
    assert found["kind"] == "exact"
    assert "strict_accuracy" not in found["systems"]["plain"]
    assert found["systems"]["plain"]["right"] == 20
    assert set(found["systems"]["plain"]["by_steps"]) == {"1", "2", "3"}
    for steps, each in found["systems"]["plain"]["by_steps"].items():
        of = [r for line, r in zip(lines, right, strict=True) if line["answer"].count("\n") == int(steps)]
        assert (each["problems"], each["accuracy"]["value"]) == (len(of), np.mean(of))
    # The end of text is forced, so behind it nothing counts.
    assert found["systems"]["plain"]["tokens"] == sum(
        len(e.tokens) - len(p) for e, p in zip(examples, prompts, strict=True)
    )


def test_losses_on_held_back_traces(world: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    words = [i for i in range(tiny.VOCABULARY - 4) if i not in tiny.NEWLINES]

    def text(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.choice(words, count))

    path = tmp_path / "held_back.jsonl"
    with path.open("w") as file:
        for i in range(9):
            answer = " ".join([text(3), "w3\n", text(2 + i % 3), "w10\n", text(2)])
            file.write(json.dumps({"question": text(5), "answer": answer}) + "\n")
    systems = [System("with", str(world / "base"), world / "processor"), System("plain", str(world / "base"))]
    settings = Settings(template=TEMPLATE)
    found = evaluate(systems, tmp_path / "out", traces=[path], settings=settings)["traces"]["held_back"]

    model, tokenizer = backbones.load(world / "base")
    module = CacheProcessorModule.from_pretrained(world / "processor")
    boundary = module.config.boundary
    examples = load_examples([path], tokenizer, template=TEMPLATE, max_length=64, boundary=boundary).examples
    backbone = PackedBackbone(model)
    plain, rewritten = supervised(backbone, list(examples)), rollout(backbone, module, list(examples))
    wanted = compare(plain, rewritten)
    assert found["examples"] == 9
    for kind, expected in wanted.kinds.items():
        assert found["systems"]["plain"]["kinds"][kind]["cross_entropy"] == pytest.approx(expected.identity, rel=1e-5)
        assert found["systems"]["with"]["kinds"][kind]["cross_entropy"] == pytest.approx(expected.processor, rel=1e-5)
        assert found["systems"]["with"]["kinds"][kind]["tokens"] == expected.tokens
        assert found["comparisons"]["plain"]["kinds"][kind]["difference"] == pytest.approx(
            expected.difference, abs=1e-5
        )
    assert set(wanted.kinds) == {"all", "first", "rest"}
    assert abs(wanted.kinds["all"].difference) > 1e-3
    # Resuming computes nothing again.
    before = (tmp_path / "out" / "predictions" / "with.held_back.jsonl").read_bytes()
    again = evaluate(systems, tmp_path / "out", traces=[path], settings=settings, resume=True)
    assert again["traces"]["held_back"] == found
    assert (tmp_path / "out" / "predictions" / "with.held_back.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--max-new-tokens", 0), 1, "max_new_tokens is 0"),
        (("--limit", 0), 1, "limit is 0"),
        (("--dtype", "int8"), 1, "dtype is 'int8'"),
        (("--data", "nothing.jsonl"), 1, r"nothing\.jsonl: No such file"),
        (("--traces", "WORLD/problems.jsonl"), 1, "two files are called 'problems'"),
        (("--baseline", "nothing"), 1, "nothing does not exist"),
        (("--baseline", "plain"), 1, "two systems are called 'plain'"),
        (("--baseline", "a/b=plain"), 1, "'a/b' names one of the systems"),
        (("--processor", "WORLD/base"), 1, "directory of a Processor"),
        (("--processor", "WORLD/foreign"), 1, "made for a backbone with config_hash"),
        (("--baseline", "WORLD/words"), 1, "another tokenizer or chat template"),
        (("--template", "chat"), 1, "no chat template"),
        (("--vllm-options", "[]"), 2, "not a JSON object"),
        (("--vllm-options", '{"seed": 1}'), 1, "the engine is transformers"),
        (("--engine", "vllm", "--traces", "WORLD/problems.jsonl"), 1, "--traces needs --engine transformers"),
        (("--engine", "vllm", "--data", "WORLD/forced.jsonl"), 1, 'forced.jsonl:1 has "forced" ranges'),
        (("--device", "tpu7"), 1, "device is 'tpu7'"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_before_a_model_is_loaded(
    world: Path,
    tmp_path: Path,
    more: tuple[object, ...],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not (world / "foreign").exists():
        made = tiny.config(backbone={"config_hash": "sha256:0"})
        save_checkpoint(world / "foreign", made, tiny.processor().weights)
        forced = {"question": "w5", "answer": "w6 w3\n", "forced": [[0, 2]]}
        (world / "forced.jsonl").write_text(json.dumps(forced) + "\n")
        shutil.copytree(world / "base", world / "words")
        file = world / "words" / "tokenizer.json"
        file.write_text(file.read_text().replace('"w5": 5,', '"w5": 6,').replace('"w6": 6,', '"w6": 5,'))

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(backbones, "load", load)
    arguments = [str(each).replace("WORLD", str(world)) for each in more]
    assert cli.main(command(world, tmp_path / "out", *arguments)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"bottlenecked: [^\n]+\n", captured.err)
    assert re.search(message, captured.err)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_and_a_used_directory(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--model", str(world / "base"), "--output", str(tmp_path / "new")]) == 1
    assert "nothing to evaluate on" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(command(world, tmp_path)) == 1
    assert "is not empty: give another directory, or --resume it" in capsys.readouterr().err


def test_baselines(world: Path) -> None:
    model, processor = str(world / "base"), world / "processor"
    assert parse_baseline("plain", model) == System("plain", model)
    assert parse_baseline(str(processor), model) == System("processor", model, processor)
    assert parse_baseline(f"x={processor}", model) == System("x", model, processor)
    assert parse_baseline(str(world / "model2"), model) == System("model2", str(world / "model2"))
    both = parse_baseline(f"x={world / 'model2'},{processor}", model)
    assert both == System("x", str(world / "model2"), processor)


def test_records_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "records.jsonl"
    with RecordFile(path) as file:
        file.append([{"name": "a", "text": "ä\n"}, {"name": "b"}])
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with RecordFile(path) as file:
            assert list(file.records) == ["a", "b"][: whole[:cut].count(b"\n")]
            file.append([r for r in ({"name": "a", "text": "ä\n"}, {"name": "b"}) if r["name"] not in file.records])
        assert path.read_bytes() == whole
    path.write_bytes(b'{"name": "a"\n{"name": "b"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:1 is damaged"):
        RecordFile(path)


# --- lm-eval ----------------------------------------------------------------------------------------------------


def test_lm_eval_reproduces_eval(world: Path, tmp_path: Path) -> None:
    """The same items, the same texts, the same accuracy, through lm-eval's own loop and command line."""
    assert cli.main(command(world, tmp_path / "ours", "--processor", world / "processor")) == 0
    metadata = json.dumps({"data": str(world / "problems.jsonl"), "template": TEMPLATE})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bottlenecked", "lm-eval"),
            *("--model_args", f"pretrained={world / 'base'},processor={world / 'processor'}"),
            *("--tasks", "bottlenecked_numbers", "--metadata", metadata, "--gen_kwargs", f"max_gen_toks={TOKENS}"),
            *("--device", "cpu", "--batch_size", "6", "--log_samples", "--output_path", str(tmp_path / "theirs")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "bottlenecked_numbers" in done.stdout
    (results,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["bottlenecked_numbers"]
    ours = json.loads((tmp_path / "ours" / "metrics.json").read_text())["data"]["problems"]["systems"]["processor"]
    assert theirs["accuracy,none"] == ours["accuracy"]["value"]
    assert theirs["strict_accuracy,none"] == ours["strict_accuracy"]["value"]
    (samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    texts = {s["doc"]["name"]: s["resps"][0][0] for s in map(json.loads, samples.read_text().splitlines())}
    made = records(tmp_path / "ours" / "predictions" / "processor.problems.jsonl")
    assert texts == {name: record["text"] for name, record in made.items()}
    assert 0 < ours["right"] < COUNT


def test_lm_eval_refuses_what_a_processor_cannot_change(world: Path, tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    from bottlenecked.evaluation import harness

    made = get_model("bottlenecked")(pretrained=str(world / "base"), processor=str(world / "processor"), device="cpu")
    assert isinstance(made, harness.BottleneckedLM)
    with pytest.raises(NotImplementedError, match="no step ends"):
        made.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        made.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="needs a file"):
        harness.numbers()
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a\nb"}) + "\n")
    with pytest.raises(ValueError, match="no numbers"):
        harness.numbers(str(path))
