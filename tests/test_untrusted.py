"""Files that nobody vouches for: a Processor's directory and a backbone's, of a stranger.

What is read is numbers and settings, all of them checked: nothing runs, nothing is unpickled, no name in a file leads
out of its directory, and no size in a file is allocated before the file is seen to hold it. Each attack here is a
directory that is otherwise right.
"""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bottlenecked import CacheProcessor, CacheProcessorConfig, backbones
from bottlenecked.checkpoint import initial_weights, save_checkpoint

from . import tiny

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "bottlenecked"
SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 4, "num_query_heads": 2}
SMALL = {"processor_dim": 6, "processor_heads": 2, "processor_mlp_dim": 5}
CONFIG = CacheProcessorConfig(**SHAPE, **SMALL)
WEIGHTS = "model.safetensors"


@pytest.fixture
def processor(tmp_path: Path) -> Path:
    directory = tmp_path / "processor"
    save_checkpoint(directory, CONFIG, initial_weights(CONFIG, random_scale=0.1))
    return directory


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def backbone(stock: Path, tmp_path: Path) -> Path:
    """A backbone of one's own, to be spoilt."""
    path = tmp_path / "backbone"
    path.mkdir()
    for file in stock.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def refuse(directory: Path, *words: str) -> str:
    """One sentence of a ValueError that names the file."""
    with pytest.raises(ValueError, match=r"(model\.safetensors|config\.json)") as error:
        CacheProcessor.from_pretrained(directory)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 1000
    return message


# --- model.safetensors

LAST = "layers.1.up_proj.weight"  # of shape [5, 6]
Lie = Callable[[dict[str, Any], int], None]


def entry(**changes: Any) -> Lie:
    def lie(header: dict[str, Any], size: int) -> None:
        header[LAST] |= changes

    return lie


def offsets(begin: Callable[[int, int, int], int], end: Callable[[int, int, int], int]) -> Lie:
    """Of a tensor's begin and end and the size of all data."""

    def lie(header: dict[str, Any], size: int) -> None:
        was = header[LAST]["data_offsets"]
        header[LAST]["data_offsets"] = [begin(*was, size), end(*was, size)]

    return lie


LIES: dict[str, Lie] = {
    "beyond the end": offsets(lambda b, e, size: size, lambda b, e, size: size + e - b),
    "far beyond the end": offsets(lambda b, e, size: 2**62, lambda b, e, size: 2**62 + e - b),
    "more than 64 bits": offsets(lambda b, e, size: 2**64 + b, lambda b, e, size: 2**64 + e),
    "negative": offsets(lambda b, e, size: -8, lambda b, e, size: e - b - 8),
    "backwards": offsets(lambda b, e, size: e, lambda b, e, size: b),
    "of another tensor": offsets(lambda b, e, size: 0, lambda b, e, size: e - b),
    "overlapping": offsets(lambda b, e, size: b - 4, lambda b, e, size: e - 4),
    "too long": offsets(lambda b, e, size: b, lambda b, e, size: e + 4),
    "fractions": entry(data_offsets=[0.5, 120.5]),
    "no offsets": entry(data_offsets=[]),
    "a shape as large as memory": entry(shape=[1 << 20, 1 << 20]),
    "a shape whose product is 0 in 64 bits": entry(shape=[1 << 32, 1 << 32]),
    "a shape whose product fits in 64 bits again": entry(shape=[(1 << 63) + 15, 2]),
    "a negative shape": entry(shape=[-5, -6]),
    "a shape of many dimensions": entry(shape=[5, 6] + [1] * 100_000),
    "a shape of fractions": entry(shape=[5.0, 6.0]),
    "a wider dtype": entry(dtype="F64"),
    "a narrower dtype": entry(dtype="F16"),
    "integers": entry(dtype="I32"),
    "an unknown dtype": entry(dtype="O"),
    "a dtype that is no text": entry(dtype=4),
    "a tensor that is no object": lambda header, size: header.update({LAST: []}),
    "a tensor that is not there": lambda header, size: header.update({"x": header.pop(LAST)}),
    "metadata that is no text": lambda header, size: header.update({"__metadata__": {"a": [1]}}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_header_that_lies(processor: Path, lie: Lie) -> None:
    header, data = header_of(processor / WEIGHTS)
    lie(header, len(data))
    write(processor / WEIGHTS, json.dumps(header).encode(), data)
    refuse(processor)


def test_the_length_of_a_header(processor: Path) -> None:
    header, data = header_of(processor / WEIGHTS)
    text = json.dumps(header).encode()
    for length in (
        0,
        1,
        len(text) - 1,
        len(text) + 1,
        len(text) + len(data),
        2**27,
        2**40,
        2**63,
        2**64 - 1,
        2**64 - 8,
    ):
        write(processor / WEIGHTS, text, data, length)
        refuse(processor, "truncated or damaged")


def test_a_header_that_is_no_header(processor: Path) -> None:
    header, data = header_of(processor / WEIGHTS)
    text = json.dumps(header)
    twice = text[:-1] + ", " + json.dumps({LAST: header[LAST] | {"data_offsets": [0, 120]}})[1:]
    for wrong in ("[" * 50_000, '{"a":' * 50_000, "[]", "null", "0", '"x"', "\0" * 100, text + text, twice):
        write(processor / WEIGHTS, wrong.encode(), data)
        refuse(processor)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_place_is_looked_at(processor: Path, value: float) -> None:
    """A NaN or an infinity in the first element of a tensor, in its last, in every tensor."""
    header, data = header_of(processor / WEIGHTS)
    text = json.dumps(header).encode()
    for name, stated in header.items():
        if name == "__metadata__":
            continue
        begin, end = stated["data_offsets"]
        for at in {begin, end - 4}:
            write(processor / WEIGHTS, text, data[:at] + struct.pack("<f", value) + data[at + 4 :])
            refuse(processor, f"tensor '{name}' holds a NaN or an infinity")


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_the_largest_numbers_stay_numbers(processor: Path, weight_dtype: Any) -> None:
    """The largest float32 would round to an infinity in bfloat16: what a rewrite then does is refused or finite."""
    weights = initial_weights(CONFIG, random_scale=0.1)
    for name in ("layers.0.out_proj.weight", "layers.1.in_proj.weight", "layers.1.mlp_norm.weight", "layers.0.gate"):
        weights[name][...] = np.finfo(np.float32).max
    save_checkpoint(processor, CONFIG, weights)
    try:
        made = CacheProcessor.from_pretrained(processor, weight_dtype=weight_dtype)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    rng = np.random.default_rng(0)
    keys, values = ([rng.standard_normal((1, 8, 1, 4)).astype(np.float32) for _ in range(2)] for _ in range(2))
    queries = [rng.standard_normal((1, CONFIG.recent_window, 2, 4)).astype(np.float32) for _ in range(2)]
    before = [part.copy() for part in (*keys, *values)]
    bound = made.bind(keys, values, queries, workspace=made.workspace())
    from bottleneck_ext import InvalidArgumentError
    from bottlenecked import BoundaryEvent

    with pytest.raises(InvalidArgumentError, match="finite"):
        bound.rewrite([BoundaryEvent(0, 4, 8)])
    assert all(np.array_equal(part, was) for part, was in zip((*keys, *values), before, strict=True))


def test_links(processor: Path, tmp_path: Path) -> None:
    """Followed, since a model hub's cache is made of them, but only to a regular file, which is judged as any other;
    an error tells nothing of its content."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("config.json", WEIGHTS):
        (processor / name).rename(blobs / name)
        (processor / name).symlink_to(f"../blobs/{name}")
    CacheProcessor.from_pretrained(processor)
    secret = tmp_path / "secret"
    secret.write_text("the password is swordfish\n" * 20)
    os.mkfifo(tmp_path / "fifo")
    for name in (WEIGHTS, "config.json"):
        for target in (secret, Path("/dev/zero"), tmp_path / "fifo", tmp_path, tmp_path / "none", processor / name):
            (processor / name).unlink()
            (processor / name).symlink_to(target)
            message = refuse(processor)
            assert "swordfish" not in message
            assert "password" not in message
        (processor / name).unlink()
        (processor / name).symlink_to(f"../blobs/{name}")


# --- config.json


def test_a_configuration_of_wrong_types(processor: Path) -> None:
    """Every value of every other type: refused by the name of its key, or allowed by the schema; nothing else."""
    right = json.loads((processor / "config.json").read_text())
    wrong = [None, True, -1, 0, 2**31, 2**64, 10**4000, 0.5, 1e308, "", "x" * 100_000, [], [[]], {}, {"a": {}}]
    for key in right:
        for value in wrong:
            (processor / "config.json").write_text(json.dumps(right | {key: value}))
            try:
                loaded = CacheProcessorConfig.load(processor)
            except ValueError as error:
                assert "config.json" in str(error)  # noqa: PT017
                assert len(str(error)) < 1000  # noqa: PT017
            else:
                assert CacheProcessorConfig.from_dict(json.loads(loaded.to_json())) == loaded
        for value in wrong:
            (processor / "config.json").write_text(json.dumps(right | {"boundary": right["boundary"] | {key: value}}))
            CacheProcessorConfig.load(processor)  # unknown there, and kept


@pytest.mark.parametrize("depth", [100, 400, 700, 990, 100_000])
@pytest.mark.parametrize("key", ["boundary", "training", "x", "top_k", "rope_parameters"])
def test_a_configuration_nested_deeply(processor: Path, key: str, depth: int) -> None:
    text = (processor / "config.json").read_text().rstrip().removesuffix("}")
    text = text.replace(f'"{key}":', f'"was_{key}":')
    (processor / "config.json").write_text(f'{text}, "{key}": {"[" * depth}{"]" * depth}}}')
    if key == "x" and depth < 1000:  # free-form, and how deep is too deep depends on the caller
        if depth == 100:
            CacheProcessorConfig.load(processor)
        try:
            CacheProcessorConfig.load(processor)
        except ValueError as error:
            assert "nested too deeply" in str(error) or "not valid JSON" in str(error)  # noqa: PT017
    else:
        refuse(processor)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"top_k": 32', '"top_k": 5, "top_k": 32', "'top_k' is there twice"),
        ('"min_step_length": 1', '"min_step_length": 1, "min_step_length": 1', "'min_step_length' is there twice"),
        ('"top_k": 32', f'"top_k": {"9" * 5000}', "config.json"),
        ('"norm_eps": 1e-06', '"norm_eps": 1e999', "larger than any number"),
        ('"training": {}', '"training": {"loss": -1e999}', "larger than any number"),
        ('"training": {}', '"training": {"loss": NaN}', "not a JSON number"),
        ('"training": {}', '"training": {"a": "\\ud800"', "config.json"),
        ('"training": {}', '"training": {}\0', "not valid JSON"),
    ],
)
def test_a_configuration_that_readers_would_take_differently(processor: Path, old: str, new: str, words: str) -> None:
    text = (processor / "config.json").read_text()
    assert text.count(old) == 1
    (processor / "config.json").write_text(text.replace(old, new))
    refuse(processor, words)


# --- sizes, before anything is allocated

BOMBS = """
import json, resource, struct, sys
from pathlib import Path
from bottlenecked import CacheProcessor, backbones, checkpoint
from bottlenecked.config import CacheProcessorConfig
import bottlenecked.processor, safetensors.numpy

used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for directory in sys.argv[1:]:
    kind, path = Path(directory).name.split("-")[0], Path(directory)
    try:
        if kind == "processor":
            CacheProcessor.from_pretrained(path)
        else:
            described = backbones.describe(path)
            CacheProcessorConfig(**described)
            assert "weights_hash" not in described["backbone"]
    except ValueError as error:
        print("refused", str(error)[:200])
    else:
        print("read")
"""


def test_no_size_is_believed(processor: Path, backbone: Path, tmp_path: Path) -> None:
    """With 64 MiB of memory to spare: sizes of gigabytes that a file states but does not hold."""
    made: list[Path] = []

    def bomb(name: str, origin: Path) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in ("config.json", WEIGHTS):
            (path / file).write_bytes((origin / file).read_bytes())
        made.append(path)
        return path

    largest = {"num_layers": 4096, "processor_dim": 65536, "processor_mlp_dim": 65536, "num_kv_heads": 65536}
    largest |= {"num_query_heads": 65536, "head_dim": 65536, "processor_heads": 1}
    edit_json(bomb("processor-config", processor) / "config.json", **largest)
    edit_json(bomb("processor-wide", processor) / "config.json", processor_dim=65536, processor_mlp_dim=65536)
    header, data = header_of(processor / WEIGHTS)
    header[LAST]["shape"] = [1 << 20, 1 << 14]
    write(bomb("processor-shape", processor) / WEIGHTS, json.dumps(header).encode(), data)
    header[LAST]["data_offsets"][1] += 1 << 36
    write(bomb("processor-offsets", processor) / WEIGHTS, json.dumps(header).encode(), data)
    write(bomb("processor-header", processor) / WEIGHTS, b"{}", data, 99_000_000)
    with (bomb("processor-text", processor) / "config.json").open("ab") as file:
        file.truncate(1 << 34)  # a file with a hole, which takes no room
    for name in ("backbone-shape", "backbone-offsets"):
        path = bomb(name, backbone)
        header, data = header_of(path / WEIGHTS)
        for tensor, stated in header.items():
            if tensor != "__metadata__":
                stated["shape"] = [2, 1 << 33]
                if name == "backbone-offsets":
                    stated["data_offsets"][1] = stated["data_offsets"][0] + (1 << 36)
        write(path / WEIGHTS, json.dumps(header).encode(), data)
    path = bomb("backbone-header", backbone)
    write(path / WEIGHTS, b"{}", b"", 99_000_000)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(PACKAGE.parent))),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", BOMBS, *map(str, made)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = [line.split()[0] for line in run.stdout.splitlines()]
    assert found == ["refused" if path.name.startswith("processor") else "read" for path in made], run.stdout


# --- a backbone's directory


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": 7},
        {"architectures": {"a": 1}},
        {"architectures": [["x"]]},
        {"rope_parameters": "default"},
        {"rope_parameters": [1, 2]},
        {"num_hidden_layers": 10**4000},
        {"num_hidden_layers": "3" * 10_000},
        {"head_dim": -1},
        {"hidden_size": 1, "head_dim": None},
        {"text_config": {"num_hidden_layers": []}},
    ],
)
def test_a_backbone_of_wrong_types(backbone: Path, changes: dict[str, Any]) -> None:
    edit_json(backbone / "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json|must be an integer") as error:
        CacheProcessorConfig(**backbones.describe(backbone))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "twice", "deep"])
def test_a_backbone_without_a_configuration(backbone: Path, kind: str) -> None:
    file = backbone / "config.json"
    text = file.read_text()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    else:
        nested = '"hidden_size": 8, "hidden_size": 8' if kind == "twice" else '"x": ' + "[" * 100_000
        file.write_text(f"{{{nested}, {text[1:]}")
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json"):
        backbones.describe(backbone)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json"):
        backbones.load(backbone)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 50_000, b'{"a":' * 50_000, b"[]", b'{"layers.0.self_attn.v_proj.weight": 5}',
        b'{"layers.0.self_attn.v_proj.weight": {}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": [], "shape": [1, 2], "data_offsets": [0, 8]}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": "F32", "shape": ["1", "2"], "data_offsets": [0, 8]}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": "F32", "shape": [1, -2], "data_offsets": [0, 8]}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [-9, 8]}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [9000, 9008]}}',
        b'{"layers.0.self_attn.v_proj.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": "ab"}}',
    ],
)  # fmt: skip
def test_weights_of_a_backbone_that_cannot_be_hashed(backbone: Path, header: bytes) -> None:
    write(backbone / WEIGHTS, header, bytes(64))
    os.mkfifo(backbone / "more.safetensors")
    assert "weights_hash" not in backbones.describe(backbone)["backbone"]


class Attack:
    """What a pickle runs when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig as Stolen, LlamaForCausalLM as StolenModel
from transformers import PreTrainedTokenizerFast as StolenTokenizer
"""


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_no_code_of_a_directory_runs(
    backbone: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where somebody at the terminal would say yes."""
    trace = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (backbone / "stolen.py").write_text(CODE.format(trace=str(trace)))
    (backbone / "custom_generate").mkdir()
    (backbone / "custom_generate" / "generate.py").write_text(CODE.format(trace=str(trace)))
    automatic = {
        "AutoConfig": "stolen.Stolen", "AutoModelForCausalLM": "stolen.StolenModel",
        "AutoTokenizer": [None, "stolen.StolenTokenizer"],
    }  # fmt: skip
    edit_json(backbone / where, auto_map=automatic, model_type="stolen", custom_generate="custom_generate")
    backbones.describe(backbone)
    backbones.tokenizer_newline_ids(backbone)
    for read in (backbones.load_tokenizer, backbones.load):
        try:
            read(backbone)
        except ValueError as error:
            assert "trust_remote_code" in str(error) or "stolen" in str(error)  # noqa: PT017
        assert not trace.exists()


def test_no_pickle_is_read(backbone: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    weights = tiny.model().state_dict()
    (backbone / WEIGHTS).unlink()
    torch.save(weights, backbone / "pytorch_model.bin")  # a harmless one is no exception
    with pytest.raises(OSError, match="safetensors"):
        backbones.load(backbone)
    (backbone / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(trace)))
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin", "vocab.pkl", "tokenizer.pkl"):
        (backbone / name).write_bytes(pickle.dumps(Attack(trace)))
    with pytest.raises(OSError, match="safetensors"):
        backbones.load(backbone)
    backbones.load_tokenizer(backbone)
    assert not trace.exists()
    pickle.loads((backbone / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the attack is none"


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "", "..", "a/b", 5, None])
def test_no_shard_is_elsewhere(backbone: Path, shard: Any) -> None:
    names = header_of(backbone / WEIGHTS)[0]
    other = backbone.parent / "other"
    other.mkdir()
    (backbone / WEIGHTS).rename(other / WEIGHTS)
    index = {"metadata": {}, "weight_map": {name: shard for name in names if name != "__metadata__"}}
    (backbone / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not in its directory"):
        backbones.load(backbone)


def test_shards_are_read(backbone: Path) -> None:
    names = header_of(backbone / WEIGHTS)[0]
    (backbone / WEIGHTS).rename(backbone / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(set(names) - {"__metadata__"}, "model-00001-of-00001.safetensors"),
    }
    (backbone / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    model, _ = backbones.load(backbone)
    assert backbones.model_weights_hash(model) == backbones.describe(backbone)["backbone"]["weights_hash"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@main:f"},
        {"text_config": {"_attn_implementation": {"": "somebody/kernel"}}},
        {"experts_implementation": "somebody/kernel"},
    ],
)
def test_no_kernel_comes_from_a_hub(backbone: Path, changes: dict[str, Any]) -> None:
    edit_json(backbone / "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json: \w+_implementation names code on the model hub"):
        backbones.load(backbone)


# --- the package


def test_the_package_has_no_way_to_run_what_it_reads() -> None:
    """No pickle, no eval, and every call that could run code of a file is told not to."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            if {name.partition(".")[0] for name in names} & {"pickle", "marshal", "shelve", "dill", "joblib", "runpy"}:
                found.append((file.name, node.lineno, "import"))
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if call in ("eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "os.system"):
                found.append((file.name, node.lineno, call))
            if call in ("torch.load", "torch.save"):
                found.append((file.name, node.lineno, call))
            if call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append((file.name, node.lineno, call))
            if "trust_remote_code" in options and options["trust_remote_code"] not in (
                "False",
                "model_config.trust_remote_code",  # vLLM's own setting
            ):
                found.append((file.name, node.lineno, call))
    assert not found


def test_a_training_run_goes_on_from_no_pickle(tmp_path: Path) -> None:
    """Trainer.resume reads safetensors: an archive of torch is refused, with an attack in it or not."""
    from bottlenecked.training import trainer

    trace = tmp_path / "ran"

    class Resumed:
        checkpoint = tmp_path / "processor.checkpoint"
        accelerator = type("Accelerator", (), {"device": torch.device("cpu")})

    for content in ({"format": 1, "state": Attack(trace)}, Attack(trace), {"format": 1}):
        torch.save(content, Resumed.checkpoint)
        with pytest.raises(ValueError, match="cannot be read"):
            trainer.Trainer.resume(Resumed)  # type: ignore[arg-type]
        Resumed.checkpoint.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="cannot be read"):
            trainer.Trainer.resume(Resumed)  # type: ignore[arg-type]
        assert not trace.exists()
