"""The configuration of a Processor: `config.json` of a checkpoint.

Standard library only. Every error is a ValueError of one sentence that names the key, its value and what is
allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

MODEL_TYPE = "bottlenecked_processor"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# A file being saved; see checkpoint.save_checkpoint for the order in which these come and go.
UNFINISHED_SUFFIX = ".new"

MAX_LAYERS = 4096
MAX_DIMENSION = 65536
MAX_TOP_K = 65536
MAX_RECENT_WINDOW = 256

# Of a config.json, which nobody vouches for. Those of model hubs have some kilobytes.
MAX_CONFIG_BYTES = 16 << 20

_SMALLEST_F32, _LARGEST_F32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers


@dataclass(frozen=True, kw_only=True)
class BoundaryConfig:
    """What ends a reasoning step (arXiv 2505.16950: a newline token), and when the cache is rewritten.

    rule: "newline" (any token whose decoded text contains a newline; `token_ids` then holds the ids found in
        the backbone's vocabulary and may be empty) or "token_ids" (exactly `token_ids`).
    min_step_length: tokens; a line-ending token that would end a shorter step does not end it.
    timing: "post" rewrites after the KV of the line-ending token is written; that token then belongs to the
        step it ends. "pre" rewrites just before it is written: it is the first token of the next step.
    extra: unknown keys of the `boundary` object in config.json, kept and written back.

    Raises ValueError for a value that is not allowed.
    """

    rule: Literal["newline", "token_ids"] = "newline"
    token_ids: tuple[int, ...] = ()
    min_step_length: int = 1
    timing: Literal["post", "pre"] = "post"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("boundary.rule", self.rule, ("newline", "token_ids"))
        if not isinstance(self.token_ids, tuple) or not all(_is_int(i) and i >= 0 for i in self.token_ids):
            _refuse(
                "boundary.token_ids",
                self.token_ids,
                "a tuple (in config.json a list) of integers that are 0 or more",
            )
        if self.rule == "token_ids" and not self.token_ids:
            _refuse("boundary.token_ids", self.token_ids, 'at least one id, because boundary.rule is "token_ids"')
        _check_int("boundary.min_step_length", self.min_step_length, 1, MAX_DIMENSION)
        _check_choice("boundary.timing", self.timing, ("post", "pre"))
        _check_extra("boundary.extra", self.extra, _known_keys(BoundaryConfig))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BoundaryConfig:
        """Build from the `boundary` object of config.json; `rule` and `token_ids` are required."""
        return cls(**_arguments(cls, values, "boundary.", required=("rule", "token_ids")))

    def to_dict(self) -> dict[str, Any]:
        """The `boundary` object of config.json."""
        return _dump(self)


@dataclass(frozen=True, kw_only=True)
class CacheProcessorConfig:
    """Shapes and hyperparameters of a Processor (arXiv 2505.16950, section 3 and its hyperparameters).

    num_layers, num_kv_heads, head_dim, num_query_heads: the backbone's; each layer has weights of its own.
    processor_dim, processor_heads, processor_mlp_dim: d_p, heads of its attention, width of its gated MLP.
    top_k: earlier positions recalled per layer (reconsolidation), 0 to 65536; 0 is consolidation only.
    recent_window: at most this many tokens at the end of a step are consolidated, 1 to 256.
    rewrite_prompt: whether the prompt, which is step 0, is rewritten too.
    key_space: "rotated" (keys as cached, after RoPE) or "unrotated" (RoPE undone before and redone after).
    norm_eps: epsilon of the RMS norms.
    rope_parameters: the backbone's, as transformers 5 writes them; required for "unrotated".
    backbone, training: free-form description (JSON values).
    extra: unknown top-level keys of config.json, kept and written back.

    Raises ValueError for a value that is not allowed.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_query_heads: int
    processor_dim: int = 512
    processor_heads: int = 16
    processor_mlp_dim: int = 2240
    top_k: int = 32
    recent_window: int = 96
    rewrite_prompt: bool = True
    key_space: Literal["rotated", "unrotated"] = "rotated"
    norm_eps: float = 1e-6
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    rope_parameters: dict[str, Any] | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_format_version(self.format_version)
        _check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        for name in ("num_kv_heads", "head_dim", "num_query_heads"):
            _check_int(name, getattr(self, name), 1, MAX_DIMENSION)
        for name in ("processor_dim", "processor_heads", "processor_mlp_dim"):
            _check_int(name, getattr(self, name), 1, MAX_DIMENSION)
        if self.num_query_heads % self.num_kv_heads:
            _refuse(
                "num_query_heads",
                self.num_query_heads,
                f"a multiple of num_kv_heads, which is {self.num_kv_heads}",
            )
        if self.processor_dim % self.processor_heads:
            _refuse(
                "processor_dim",
                self.processor_dim,
                f"a multiple of processor_heads, which is {self.processor_heads}",
            )
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        _check_int("recent_window", self.recent_window, 1, MAX_RECENT_WINDOW)
        if not isinstance(self.rewrite_prompt, bool):
            _refuse("rewrite_prompt", self.rewrite_prompt, "true or false")
        _check_choice("key_space", self.key_space, ("rotated", "unrotated"))
        # The arithmetic is float32: an epsilon that rounds to 0 or infinity there would make NaNs.
        if not _is_number(self.norm_eps) or not _SMALLEST_F32 <= self.norm_eps <= _LARGEST_F32:
            _refuse("norm_eps", self.norm_eps, "a positive finite float32 number such as 1e-6")
        if not isinstance(self.boundary, BoundaryConfig):
            _refuse("boundary", self.boundary, "an object with rule and token_ids")
        for name in ("backbone", "training"):
            if not isinstance(getattr(self, name), dict):
                _refuse(name, getattr(self, name), "an object")
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            _refuse("rope_parameters", self.rope_parameters, "an object or null")
        if self.key_space == "unrotated":
            if self.head_dim % 2:
                _refuse("head_dim", self.head_dim, 'even, because key_space is "unrotated"')
            self.inv_freq()
        _check_extra("extra", self.extra, {"model_type", *_known_keys(CacheProcessorConfig)})

    @property
    def kv_width(self) -> int:
        """C = 2 * num_kv_heads * head_dim: one position's keys and values over all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim

    def num_parameters(self) -> int:
        """Number of trainable parameters over all layers; the paper's four totals follow from it."""
        c, d, f = self.kv_width, self.processor_dim, self.processor_mlp_dim
        return self.num_layers * (2 * c * d + 4 * d * d + 3 * d * f + 2 * c + 7 * d + 1)

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name within a layer -> shape, `[out, in]` for matrices, in the order of computation."""
        c, d, f = self.kv_width, self.processor_dim, self.processor_mlp_dim
        shapes: dict[str, tuple[int, ...]] = {"input_norm.weight": (c,)}
        shapes |= {"in_proj.weight": (d, c), "in_proj.bias": (d,)}
        shapes |= {"attn_norm.weight": (d,)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= {f"{name}.weight": (d, d), f"{name}.bias": (d,)}
        shapes |= {"mlp_norm.weight": (d,)}
        shapes |= {"gate_proj.weight": (f, d), "up_proj.weight": (f, d), "down_proj.weight": (d, f)}
        shapes |= {"out_proj.weight": (c, d), "out_proj.bias": (c,)}
        shapes |= {"gate": ()}
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name, such as "layers.0.in_proj.weight" -> shape, for all layers."""
        layer = self.layer_shapes()
        return {f"layers.{i}.{name}": shape for i in range(self.num_layers) for name, shape in layer.items()}

    def inv_freq(self) -> list[float]:
        """RoPE's angle per token position of each of the head_dim / 2 pairs, in radians; float32 numbers.

        Computed in float64 and rounded once: the last bits may differ from the backbone's own float32 table.
        Raises ValueError unless rope_parameters are of rope_type "default", "linear" or "llama3", applied to
        the whole head in every layer.
        """
        rope = self.rope_parameters
        if rope is None:
            _refuse("rope_parameters", rope, 'the backbone\'s, which key_space "unrotated" needs')
        rope_type, part = rope.get("rope_type"), rope.get("partial_rotary_factor", 1)
        _check_choice("rope_parameters.rope_type", rope_type, ("default", "linear", "llama3"))
        if part != 1:
            _refuse("rope_parameters.partial_rotary_factor", part, '1, or key_space must be "rotated"')
        layers = rope.get("no_rope_layers") or []
        if not isinstance(layers, (list, tuple)) or not all(layers):
            _refuse("rope_parameters.no_rope_layers", layers, 'all ones, or key_space must be "rotated"')

        def number(name: str, least: int = 1) -> float:
            value = rope.get(name)
            if not _is_number(value) or not least <= value <= _LARGEST_F32:
                _refuse(f"rope_parameters.{name}", value, f"a number of at least {least}")
            return float(value)

        theta = number("rope_theta")
        frequencies = [theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        if rope_type == "linear":
            factor = number("factor")
            frequencies = [f / factor for f in frequencies]
        elif rope_type == "llama3":
            factor, original_length = number("factor"), number("original_max_position_embeddings")
            low, high = number("low_freq_factor", 0), number("high_freq_factor", 0)
            if low >= high:
                _refuse("rope_parameters.low_freq_factor", low, f"less than high_freq_factor {high}")

            def scaled(f: float) -> float:
                # Turns of this pair over the original context: many are kept, few are slowed by the factor.
                turns = original_length * f / (2 * math.pi)
                kept = min(max((turns - low) / (high - low), 0.0), 1.0)
                return (1 - kept) * f / factor + kept * f

            frequencies = [scaled(f) for f in frequencies]
        return [float(struct.unpack("<f", struct.pack("<f", f))[0]) for f in frequencies]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheProcessorConfig:
        """Build from the object of config.json. Unknown keys go to `extra`.

        Raises ValueError that names a wrong key or a missing one; only rope_parameters may be missing.
        """
        if not isinstance(values, Mapping):
            _refuse("the configuration", values, "a JSON object")
        values = dict(values)
        if "model_type" not in values:
            _missing("model_type")
        model_type = values.pop("model_type")
        if model_type != MODEL_TYPE:
            _refuse("model_type", model_type, f'"{MODEL_TYPE}"; is this the directory of a Processor?')
        # Before all else: another version may have other keys.
        if "format_version" not in values:
            _missing("format_version")
        _check_format_version(values["format_version"])
        required = [name for name in _known_keys(cls) if name != "rope_parameters"]
        arguments = _arguments(cls, values, "", required)
        if not isinstance(arguments["boundary"], Mapping):
            _refuse("boundary", arguments["boundary"], "an object with rule and token_ids")
        arguments["boundary"] = BoundaryConfig.from_dict(arguments["boundary"])
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The object of config.json: `from_dict(c.to_dict()) == c`."""
        values = _dump(self)
        values["boundary"] = self.boundary.to_dict()
        format_version = values.pop("format_version")
        return {"model_type": MODEL_TYPE, "format_version": format_version, **values}

    def to_json(self) -> str:
        """The text of config.json. Raises ValueError where a value is not JSON (a NaN, a path object)."""
        try:
            return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the configuration cannot be written as JSON: {error}") from None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> CacheProcessorConfig:
        """Read the configuration of the checkpoint in `directory`.

        Raises ValueError that names the file and what is wrong with it.
        """
        path = _config_path(Path(directory))
        try:
            values = read_object(path, parse_constant=_refuse_constant, parse_float=_finite)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; give a Processor's directory") from None
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except RecursionError:
            raise ValueError(f"{path}: a value is nested too deeply: remove it") from None


def read_object(path: Path, **options: Any) -> dict[str, Any]:
    """The JSON object in a file that nobody vouches for. options: of json.loads.

    Symbolic links are followed. Raises OSError where there is no such file or it may not be read; ValueError, naming
    the file, for one that is not regular, has more than MAX_CONFIG_BYTES bytes, is not JSON in UTF-8 or no object,
    or has a key twice in one object, of which readers would take the first or the last.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a FIFO: without waiting
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file: give a directory with a config.json")
        content = bytearray()  # piece by piece: memory for what the file holds, not for what it may hold
        while len(content) <= MAX_CONFIG_BYTES and (piece := file.read(1 << 16)):
            content += piece
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has more than {MAX_CONFIG_BYTES >> 20} MiB: this is no configuration")
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_each_key_once, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        _refuse(f"{path}: the configuration", values, "a JSON object")
    return values


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:100]} is larger than any number")
    return value


def _config_path(directory: Path) -> Path:
    """config.json, or its successor where a save was interrupted after the weights had taken their place."""
    unfinished = directory / (CONFIG_FILE + UNFINISHED_SUFFIX)
    if unfinished.exists() and not (directory / (WEIGHTS_FILE + UNFINISHED_SUFFIX)).exists():
        return unfinished
    return directory / CONFIG_FILE


def _known_keys(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name != "extra"]


def _arguments(cls: type[Any], values: Mapping[str, Any], prefix: str, required: Any) -> dict[str, Any]:
    """Keyword arguments of a configuration class from a JSON object; unknown keys become `extra`."""
    for name in required:
        if name not in values:
            _missing(prefix + name)
    known = _known_keys(cls)
    arguments = {name: copy.deepcopy(value) for name, value in values.items() if name in known}
    arguments["extra"] = {name: copy.deepcopy(value) for name, value in values.items() if name not in known}
    if isinstance(arguments.get("token_ids"), list):
        arguments["token_ids"] = tuple(arguments["token_ids"])
    return arguments


def _dump(config: BoundaryConfig | CacheProcessorConfig) -> dict[str, Any]:
    values = {name: copy.deepcopy(getattr(config, name)) for name in _known_keys(type(config))}
    if "token_ids" in values:
        values["token_ids"] = list(values["token_ids"])
    return {**values, **copy.deepcopy(config.extra)}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:
        _refuse(name, value, f"an integer from {low} to {high}")


def _check_format_version(value: object) -> None:
    if not _is_int(value) or value != FORMAT_VERSION:
        _refuse("format_version", value, f"{FORMAT_VERSION}; a newer bottlenecked may read others")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(name, value, " or ".join(f'"{choice}"' for choice in choices))


def _check_extra(name: str, value: object, known: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _refuse(name, value, "a dict with string keys")
    for key in value:
        if key in known:
            raise ValueError(f"{name} holds the key {key!r}, which is a setting of its own: pass it by name")


def _missing(name: str) -> NoReturn:
    raise ValueError(f"{name} is missing; add it")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    text = repr(value)
    shown = text if len(text) <= 100 else text[:97] + "..."
    raise ValueError(f"{name} is {shown}, but it must be {allowed}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
