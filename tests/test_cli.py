"""The command line: what it prints where, and with which exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bottlenecked import CacheProcessor, CacheProcessorConfig
from bottlenecked import __version__ as version
from bottlenecked.checkpoint import initial_weights
from bottlenecked.cli import _encode, main
from bottlenecked.evaluation.problems import Problem
from bottlenecked.integrations.transformers import attach
from bottlenecked.training.data import encode_prompts, resolve_template
from bottlenecked.training.tasks import task_tokenizer

from . import tiny

PROMPT = "w1 w2 w5 w6 w8"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one, made by `init`."""
    path = tmp_path_factory.mktemp("processor") / "random"
    size = [
        "--processor-dim",
        "32",
        "--processor-heads",
        "4",
        "--processor-mlp-dim",
        "48",
        "--top-k",
        "3",
        "--recent-window",
        "8",
    ]
    assert main(["init", "--backbone", str(backbone), "--output", str(path), *size, "--random-scale", "5"]) == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], status: int, match: str, *arguments: object) -> None:
    """One sentence on standard error, nothing on standard output."""
    got, out, err = run(capsys, *arguments)
    assert got == status, err
    assert out == ""
    assert re.fullmatch(r"bottlenecked: [^\n]+\n", err), err
    assert re.search(match, err), err


# --- info -----------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "info", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["version"] == version
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"]
    assert f"cpu:{found['instruction_set']}" in found["backends"]
    assert "cpu:scalar" in found["backends"]
    assert set(found["cuda"]) == {"compiled", "architectures", "available", "device", "driver", "cublaslt"}
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    assert f"instruction set  {found['instruction_set']}\n" in out
    assert ("CPU-only build" in out) == (not found["cuda"]["compiled"])


def test_info_about_memory(capsys: pytest.CaptureFixture[str], processor: Path) -> None:
    made = CacheProcessor.from_pretrained(processor)
    options = ["--processor", processor, "--batch", 5, "--tokens", 300, "--threads", 2, "--dtype", "bfloat16"]
    memory = json.loads(run(capsys, "info", "--json", *options)[1])["memory"]
    workspace = made.workspace(2, max_sequences=5, max_tokens=300, cache_dtype="bfloat16")
    assert memory == {
        "processor": str(processor),
        "batch": 5,
        "tokens": 300,
        "threads": 2,
        "dtype": "bfloat16",
        "backend": made.backend,
        "weight_dtype": made.weight_dtype,
        "weights": made.nbytes,
        "query_store_per_sequence": 3 * 8 * 4 * 16 * 2,
        "query_store": 5 * 3 * 8 * 4 * 16 * 2,
        "workspace": workspace.nbytes,
    }
    status, out, err = run(capsys, "info", *options)
    assert (status, err) == (0, "")
    assert f"memory           5 x 300 tokens, bfloat16, 2 threads, {made.backend}\n" in out
    assert "  query store    15.4 kB, 3.1 kB a sequence\n" in out
    memory = json.loads(run(capsys, "info", "--json", "--processor", processor)[1])["memory"]
    assert (memory["batch"], memory["tokens"], memory["threads"], memory["dtype"]) == (1, 4096, 1, "float32")
    assert "memory" not in json.loads(run(capsys, "info", "--json")[1])
    scalar = json.loads(run(capsys, "info", "--json", *options, "--backend", "cpu:scalar")[1])["memory"]
    assert (scalar["backend"], scalar["weight_dtype"]) == ("cpu:scalar", "float32")
    assert scalar["weights"] == CacheProcessor.from_pretrained(processor, backend="cpu:scalar").nbytes
    fails(capsys, 2, "--batch.*give --processor too", "info", "--batch", 2)
    fails(capsys, 2, "--backend.*give --processor too", "info", "--backend", "cpu")
    fails(capsys, 1, "backend 'cpu:sse' is not", "info", "--processor", processor, "--backend", "cpu:sse")
    fails(capsys, 1, "num_sequences is 0; it must be 1 to 65536", "info", "--processor", processor, "--batch", 0)
    fails(capsys, 1, "config.json", "info", "--processor", processor / "nothing")


def test_info_and_init_import_neither_torch_nor_transformers(backbone: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bottlenecked.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 7 * bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    for arguments in (
        ["info", "--json"],
        ["init", "--backbone", backbone, "--output", tmp_path / "p", "--processor-dim", "32"],
    ):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=60)


def test_forced_instruction_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECKED_CPU_ISA", "scalar")
    found = json.loads(run(capsys, "info", "--json")[1])
    assert (found["instruction_set"], found["weight_dtype"]) == ("scalar", "float32")
    monkeypatch.setenv("BOTTLENECKED_CPU_ISA", "mmx")
    fails(capsys, 1, "mmx", "info")


# --- init -----------------------------------------------------------------------------------------------------


def test_init_makes_the_identity(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    status, out, err = run(capsys, "init", "--backbone", backbone, "--output", tmp_path / "p", "--processor-dim", 64)
    assert (status, err) == (0, "")
    made = CacheProcessor.from_pretrained(tmp_path / "p")
    assert f"{made.config.num_parameters():,} parameters" in out
    assert made.config.boundary.rule == "newline"
    assert made.config.boundary.token_ids == tiny.NEWLINES
    assert made.config.backbone["weights_hash"]
    assert made.config.training == {"method": "none", "random_scale": 0.0, "seed": 0}
    assert not any(made.weights[f"layers.{layer}.out_proj.weight"].any() for layer in range(3))
    with attach(tiny.model(), made):
        pass


def test_init_needs_only_config_json(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((backbone / "config.json").read_text())
    small = ("--processor-dim", 32, "--processor-mlp-dim", 48)
    output = tmp_path / "p"
    status, _, err = run(capsys, "init", "--backbone", tmp_path, "--output", output, *small)
    assert status == 0
    assert "--boundary-token-ids" in err
    assert CacheProcessorConfig.load(output).boundary.token_ids == ()
    options = ("--boundary-token-ids", "3, 10", "--min-step-length", 4, "--timing", "pre", "--no-rewrite-prompt")
    status, _, err = run(capsys, "init", "--backbone", tmp_path, "--output", output, *small, *options, "--force")
    assert (status, err) == (0, "")
    config = CacheProcessorConfig.load(output)
    assert (config.boundary.rule, config.boundary.token_ids) == ("token_ids", (3, 10))
    assert (config.boundary.min_step_length, config.boundary.timing) == (4, "pre")
    assert not config.rewrite_prompt


def test_init_random_weights_follow_the_seed(backbone: Path, tmp_path: Path, processor: Path) -> None:
    config = CacheProcessorConfig.load(processor)
    made = CacheProcessor.from_pretrained(processor)
    expected = initial_weights(config, random_scale=5.0, seed=0)
    assert all((made.weights[name] == weight).all() for name, weight in expected.items())


def test_init_unrotated(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    arguments = ("--backbone", backbone, "--processor-dim", 32, "--key-space", "unrotated")
    assert run(capsys, "init", *arguments, "--output", tmp_path / "p")[0] == 0
    config = CacheProcessorConfig.load(tmp_path / "p")
    assert config.key_space == "unrotated"
    with attach(tiny.model(), CacheProcessor.from_pretrained(tmp_path / "p")):
        pass


def test_init_dry_run(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    status, out, _ = run(capsys, "init", "--backbone", backbone, "--output", tmp_path / "p", "--dry-run")
    assert status == 0
    assert f"would write {tmp_path / 'p'}" in out
    assert not (tmp_path / "p").exists()
    assert "not written" in run(capsys, "init", "--backbone", backbone, "--dry-run")[1]


def test_init_overwrites_nothing(
    capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path, tmp_path: Path
) -> None:
    def fails_to(output: Path, match: str, *more: str) -> None:
        fails(capsys, 1, match, "init", "--backbone", backbone, "--output", output, *more)

    before = {file: file.read_bytes() for path in (backbone, processor) for file in path.iterdir()}
    fails_to(processor, "already holds a Processor.*--force")
    fails_to(backbone, "something other than a Processor")
    fails_to(backbone, "something other than a Processor", "--force")
    (tmp_path / "file").write_text("mine")
    fails_to(tmp_path / "file", "is a file: give a directory")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("mine")
    fails_to(tmp_path / "weights", "something other than a Processor")
    assert before == {file: file.read_bytes() for path in (backbone, processor) for file in path.iterdir()}


@pytest.mark.parametrize(
    ("status", "match", "options"),
    [
        (2, "--output", []),
        (2, "Missing option.*--backbone", ["--output", "OUT"]),
        (1, "nowhere does not exist", ["--backbone", "nowhere", "--output", "OUT"]),
        (1, "top_k is -1", ["--backbone", "IN", "--output", "OUT", "--top-k", "-1"]),
        (1, "recent_window is 0", ["--backbone", "IN", "--output", "OUT", "--recent-window", "0"]),
        (1, "recent_window is 257", ["--backbone", "IN", "--output", "OUT", "--recent-window", "257"]),
        (1, "multiple of processor_heads", ["--backbone", "IN", "--output", "OUT", "--processor-heads", "7"]),
        (2, "--random-scale.*-1.0 is negative", ["--backbone", "IN", "--output", "OUT", "--random-scale", "-1"]),
        (2, "--boundary-token-ids.*'a'", ["--backbone", "IN", "--output", "OUT", "--boundary-token-ids", "a"]),
        (2, "negative token id", ["--backbone", "IN", "--output", "OUT", "--boundary-token-ids", "-3"]),
        (2, "--key-space", ["--backbone", "IN", "--output", "OUT", "--key-space", "spherical"]),
        (2, "--seed", ["--backbone", "IN", "--output", "OUT", "--seed", "x"]),
    ],
)
def test_init_refuses(
    capsys: pytest.CaptureFixture[str],
    backbone: Path,
    tmp_path: Path,
    status: int,
    match: str,
    options: list[str],
) -> None:
    places = {"IN": str(backbone), "OUT": str(tmp_path / "p")}
    options = [places.get(option, option) for option in options]
    if options == []:
        options = ["--backbone", str(backbone)]
    fails(capsys, status, match, "init", *options)
    assert not (tmp_path / "p").exists()


# --- generate -------------------------------------------------------------------------------------------------


def generate(backbone: Path, *options: object) -> tuple[object, ...]:
    return ("generate", "--model", backbone, "--prompt", PROMPT, "--max-new-tokens", 40, "--threads", 1, *options)


def through_the_api(
    processor: CacheProcessor | None, text: str = PROMPT + "\n", **settings: Any
) -> tuple[list[int], list[Any]]:
    """text: of a tokenizer without a chat template, training's prompts end with a newline."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    reports: list[Any] = []
    settings = {"max_new_tokens": 40, "do_sample": False} | settings
    if processor is None:
        output = model.generate(inputs.input_ids, **settings)
    else:
        with attach(model, processor, on_boundary=reports.append):
            output = model.generate(inputs.input_ids, **settings)
    return output[0, inputs.input_ids.shape[1] :].tolist(), reports


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_json(capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path, cache: str) -> None:
    status, out, _ = run(capsys, *generate(backbone, "--processor", processor, "--json", "--cache", cache))
    assert status == 0
    answer = json.loads(out)
    assert set(answer) == {"token_ids", "text", "boundaries", "seconds"}
    made = CacheProcessor.from_pretrained(processor)
    token_ids, reports = through_the_api(made, cache_implementation=cache)
    assert answer["token_ids"] == token_ids
    assert answer["text"] == tiny.tokenizer().decode(token_ids, skip_special_tokens=True)
    assert answer["seconds"] > 0
    assert len(answer["boundaries"]) == len(reports) > 3
    for boundary, report in zip(answer["boundaries"], reports, strict=True):
        assert set(boundary) == {"begin", "end", "recalled", "delta_norm"}
        assert (boundary["begin"], boundary["end"]) == (report.window_begin[0], report.events[0].step_end)
        assert boundary["recalled"] == report.recalled[0].tolist()
        assert boundary["delta_norm"] == report.delta_norm[:, 0].tolist()
        assert len(boundary["recalled"]) == len(boundary["delta_norm"]) == 3
    assert answer["boundaries"][0]["begin"] == 0
    assert answer["boundaries"][0]["end"] == len(PROMPT.split())


def test_generate_without_a_processor_is_stock(capsys: pytest.CaptureFixture[str], backbone: Path) -> None:
    answer = json.loads(run(capsys, *generate(backbone, "--json"))[1])
    assert answer["token_ids"] == through_the_api(None)[0]
    assert answer["boundaries"] == []


def test_generate_streams_text_and_marks(capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path) -> None:
    answer = json.loads(run(capsys, *generate(backbone, "--processor", processor, "--json"))[1])
    status, out, err = run(capsys, *generate(backbone, "--processor", processor))
    assert status == 0
    assert re.search(r"^40 tokens in .* \d+ boundaries$", err, re.MULTILINE)
    marks = re.findall(r"^\[step of (\d+), .*\]$", out, re.MULTILINE)
    assert len(marks) == len(answer["boundaries"])
    assert int(marks[0]) == len(PROMPT.split())
    # The text between the marks is the text; each mark stands where its step ends.
    text, ends = "", []
    for line in out.splitlines(keepends=True):
        if line.startswith("[step"):
            ends.append(len(text))
        else:
            text += line
    assert text.rstrip("\n") == answer["text"].rstrip("\n")
    tokenizer, before = tiny.tokenizer(), len(PROMPT.split())
    for boundary, end in zip(answer["boundaries"], ends, strict=True):
        written = answer["token_ids"][: boundary["end"] - before]
        assert end == len(tokenizer.decode(written, skip_special_tokens=True))


def test_marks_tell_recalled_positions_and_sizes(
    capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path
) -> None:
    answer = json.loads(run(capsys, *generate(backbone, "--processor", processor, "--json"))[1])
    marks = re.findall(r"^\[step .*\]$", run(capsys, *generate(backbone, "--processor", processor))[1], re.MULTILINE)
    assert "nothing to recall" in marks[0]
    recalled = {position for layer in answer["boundaries"][1]["recalled"] for position in layer}
    shown = re.search(r"recalled 3 a layer: ([\d\- ]+)", marks[1])
    assert shown is not None
    spans = [part.split("-") for part in shown[1].split()]
    assert recalled == {p for span in spans for p in range(int(span[0]), int(span[-1]) + 1)}
    assert re.search(r"edit \d+\.\d\d% to \d+\.\d\d% by layer \S{3}\]$", marks[1])


def test_sampling_follows_the_seed(capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path) -> None:
    def tokens(*options: object) -> list[int]:
        options = ("--processor", processor, "--json", *options)
        return json.loads(run(capsys, *generate(backbone, *options))[1])["token_ids"]

    hot = ("--temperature", 2.0, "--top-p", 0.95)
    assert tokens(*hot, "--seed", 1) == tokens(*hot, "--seed", 1) != tokens(*hot, "--seed", 2)
    assert tokens(*hot) != tokens() == tokens("--top-p", 1e-9)


def test_prompt_files(
    capsys: pytest.CaptureFixture[str],
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = through_the_api(None)[0]
    (tmp_path / "prompt").write_text(PROMPT)
    arguments = ("generate", "--model", backbone, "--max-new-tokens", 40, "--json", "--prompt-file")
    assert json.loads(run(capsys, *arguments, tmp_path / "prompt")[1])["token_ids"] == expected
    with (tmp_path / "prompt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert json.loads(run(capsys, *arguments, "-")[1])["token_ids"] == expected


def test_chat_template(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}w9"
    tokenizer.save_pretrained(tmp_path)

    def tokens(*options: object) -> list[int]:
        return json.loads(run(capsys, *generate(tmp_path, "--json", *options))[1])["token_ids"]

    def stock(text: str) -> list[int]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        return tiny.model().generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()

    assert tokens("--raw") == through_the_api(None, PROMPT)[0]
    assert tokens() == tokens("--template", "chat") == stock(PROMPT + " w9")
    assert tokens("--system", "w4") == stock("w4 " + PROMPT + " w9")
    assert tokens("--template", "w4 {question} w3\\n") == stock("w4 " + PROMPT + " w3\n")
    fails(capsys, 2, "--system.*--raw", *generate(tmp_path, "--raw", "--system", "w4"))
    fails(capsys, 2, "--system.*no chat template", *generate(backbone, "--system", "w4"))
    text = ("--template", "{question} ")
    fails(capsys, 2, "--system.*--template is a text", *generate(tmp_path, "--system", "w4", *text))
    fails(capsys, 2, "--template.*--raw sends the prompt alone", *generate(tmp_path, "--raw", *text))
    fails(capsys, 1, "template is 'w4', but", *generate(tmp_path, "--template", "w4"))
    fails(capsys, 1, "the tokenizer has no chat template", *generate(backbone, "--template", "chat"))
    tokenizer.chat_template = "{{ raise_exception('no systems') }}"
    tokenizer.save_pretrained(tmp_path)
    fails(capsys, 1, "does not fit the chat template: no systems", *generate(tmp_path, "--system", "w4"))


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_that_of_training_and_evaluation(chat: bool) -> None:
    tokenizer = task_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }};{% endfor %}?" if chat else None
    question = "ab;ba;?a1"
    problem = Problem("x", ({"role": "user", "content": question},), "", 0)
    encoded = _encode(tokenizer, question, raw=False, template="auto", system=None)
    (expected,) = encode_prompts([problem], tokenizer, resolve_template("auto", tokenizer))
    assert encoded["input_ids"].tolist() == [expected]
    assert encoded["attention_mask"].tolist() == [[1] * len(expected)]
    raw = _encode(tokenizer, question, raw=True, template="auto", system=None)
    assert raw["input_ids"].tolist() == [tokenizer(question)["input_ids"]] != [expected]


@pytest.mark.parametrize(
    ("status", "match", "options"),
    [
        (2, "Missing option.*--model", ["--prompt", "x"]),
        (2, "one of --prompt and --prompt-file", ["--model", "IN"]),
        (2, "one of --prompt and --prompt-file", ["--model", "IN", "--prompt", "x", "--prompt-file", "y"]),
        (2, "--prompt: the prompt is empty", ["--model", "IN", "--prompt", " \n"]),
        (2, "--prompt-file: the prompt is empty", ["--model", "IN", "--prompt-file", "EMPTY"]),
        (1, "nowhere.txt: No such file", ["--model", "IN", "--prompt-file", "nowhere.txt"]),
        (1, "binary is not UTF-8 text", ["--model", "IN", "--prompt-file", "BINARY"]),
        (1, "nowhere does not exist", ["--model", "nowhere", "--prompt", "x"]),
        (1, "has no config.json", ["--model", "HERE", "--prompt", "x"]),
        (1, "binary", ["--model", "BINARY", "--prompt", "x"]),
        (1, "nowhere.*config.json cannot be read", ["--model", "IN", "--prompt", "x", "--processor", "nowhere"]),
        (1, "model_type is 'llama'", ["--model", "IN", "--prompt", "x", "--processor", "IN"]),
        (2, "--max-new-tokens: 0 is not positive", ["--model", "IN", "--prompt", "x", "--max-new-tokens", "0"]),
        (2, "--threads: 0 is not positive", ["--model", "IN", "--prompt", "x", "--threads", "0"]),
        (2, "--dtype.*float8", ["--model", "IN", "--prompt", "x", "--dtype", "float8"]),
        (2, "--temperature.*0.0 is not positive", ["--model", "IN", "--prompt", "x", "--temperature", "0"]),
        (2, "--temperature.*nan is not", ["--model", "IN", "--prompt", "x", "--temperature", "nan"]),
        (2, "--top-p.*1.5 is not in", ["--model", "IN", "--prompt", "x", "--top-p", "1.5"]),
        (2, "--cache.*paged", ["--model", "IN", "--prompt", "x", "--cache", "paged"]),
        (2, "No such option", ["--model", "IN", "--promt", "x"]),
    ],
)
def test_generate_refuses(
    capsys: pytest.CaptureFixture[str],
    backbone: Path,
    tmp_path: Path,
    status: int,
    match: str,
    options: list[str],
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places = {
        "IN": backbone,
        "HERE": tmp_path,
        "EMPTY": tmp_path / "empty",
        "BINARY": tmp_path / "binary",
    }
    fails(capsys, status, match, "generate", *(places.get(option, option) for option in options))


def test_processor_of_another_backbone(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> None:
    tiny.model(num_hidden_layers=2).save_pretrained(tmp_path / "other")
    small = ("--boundary-token-ids", 3, "--processor-dim", 32, "--processor-mlp-dim", 48)
    assert main(["init", "--backbone", str(tmp_path / "other"), "--output", str(tmp_path / "p"), *map(str, small)]) == 0
    fails(capsys, 1, "2 layers, but LlamaForCausalLM has 3", *generate(backbone, "--processor", tmp_path / "p"))


def test_broken_model_and_checkpoint(
    capsys: pytest.CaptureFixture[str], backbone: Path, processor: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in backbone.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    fails(capsys, 1, f"--model {broken} cannot be loaded", *generate(broken))
    copy = tmp_path / "processor"
    copy.mkdir()
    for file in processor.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    fails(capsys, 1, "model.safetensors.*truncated", *generate(backbone, "--processor", copy))


# --- the whole --------------------------------------------------------------------------------------------------


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert all(command in out for command in ("info", "init", "generate"))
    fails(capsys, 2, "No such command", "teach")
    assert run(capsys, "generate", "--help")[0] == 0


def test_standard_output_carries_only_the_answer(backbone: Path, processor: Path) -> None:
    """In a process of its own, where libraries could print while they are imported."""
    arguments = map(str, generate(backbone, "--processor", processor, "--json"))
    command = [sys.executable, "-m", "bottlenecked", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["boundaries"]
    assert done.stderr == ""
    # A reader that leaves early is no error worth a traceback.
    shell = f'"{sys.executable}" -m bottlenecked --help | true'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


@pytest.mark.smollm2
def test_smollm2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bottlenecked import backbones

    size = ("--processor-dim", "64", "--processor-heads", "4", "--processor-mlp-dim", "64")
    size += ("--boundary-token-ids", "28,30")  # a comma, a full stop
    assert main(["init", "--backbone", "smollm2", "--output", str(tmp_path / "p"), *size]) == 0
    monkeypatch.setattr(backbones, "load", lambda *arguments, **options: smollm2)
    question = ("--model", "smollm2", "--prompt", "Name two fruits.", "--max-new-tokens", 24)
    ours = json.loads(run(capsys, "generate", *question, "--processor", tmp_path / "p", "--json")[1])
    stock = json.loads(run(capsys, "generate", *question, "--json")[1])
    assert ours["token_ids"] == stock["token_ids"]
    assert len(ours["boundaries"]) > 1
    assert set(ours["boundaries"][0]["delta_norm"]) == {0.0}
