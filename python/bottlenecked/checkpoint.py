"""Checkpoints: a directory with `config.json` and `model.safetensors`. NumPy and safetensors only.

Tensor names and shapes are those of `CacheProcessorConfig.tensor_shapes`. Names found in a file are only
compared with these, never used as paths.
"""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import CONFIG_FILE, UNFINISHED_SUFFIX, WEIGHTS_FILE, CacheProcessorConfig

Weights = dict[str, npt.NDArray[np.float32]]

# How safetensors names what we read, and the NumPy dtype of its bits.
_STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def load_weights(directory: str | os.PathLike[str], config: CacheProcessorConfig) -> Weights:
    """Read the weights of the checkpoint in `directory`, all of them checked against `config`.

    Returns every tensor of `config.tensor_shapes()`, in that order, as float32; others are widened.
    Raises ValueError, naming the file and the tensor: a file that is missing, not regular, truncated or
    damaged; a tensor that is missing, unknown, misshapen, not finite or of another dtype.
    """
    path = Path(directory) / WEIGHTS_FILE
    _check_regular_file(path)
    expected = config.tensor_shapes()
    try:
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            _check_names(path, names, expected)
            stored: dict[str, tuple[tuple[int, ...], str]] = {}
            for name in names:
                tensor = file.get_slice(name)
                stored[name] = (tuple(tensor.get_shape()), str(tensor.get_dtype()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; check its permissions") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): copy or save it again") from None
    for name, shape in expected.items():
        _check_shape(path, name, stored[name][0], shape)
        if stored[name][1] not in _STORED:
            raise ValueError(f"{path}: tensor '{name}' is {stored[name][1]}, but it must be F32, F16 or BF16")

    # safetensors cannot hand bfloat16 to NumPy. It has checked that the tensors, in the order of `names`,
    # fill the file to its end without a gap: that is where they are, and no shape asks for more than that.
    read: Weights = {}
    with path.open("rb") as data:
        size = sum(math.prod(shape) * _STORED[dtype].itemsize for shape, dtype in stored.values())
        data.seek(-size, os.SEEK_END)
        for name, (shape, dtype) in stored.items():
            read[name] = _widen(np.fromfile(data, _STORED[dtype], math.prod(shape))).reshape(shape)
            _check_finite(path, name, read[name])
    return {name: read[name] for name in expected}


def check_weights(config: CacheProcessorConfig, weights: Mapping[str, npt.NDArray[Any]]) -> Weights:
    """The weights as float32, in the order of `config.tensor_shapes()`; copied only where they are converted.

    Raises ValueError, naming the tensor, where one is missing, unknown, misshapen, not finite or no
    floating-point array.
    """
    expected = config.tensor_shapes()
    _check_names("weights", weights, expected)
    tensors: Weights = {}
    for name, shape in expected.items():
        tensor = np.asarray(weights[name])
        _check_shape("weights", name, tensor.shape, shape)
        if not np.issubdtype(tensor.dtype, np.floating):
            raise ValueError(f"weights: tensor '{name}' is {tensor.dtype}, but it must be floating-point")
        with np.errstate(over="ignore"):  # an overflow is an infinity, refused below
            tensors[name] = np.ascontiguousarray(tensor, np.float32).reshape(shape)
        _check_finite("weights", name, tensors[name])
    return tensors


def save_checkpoint(
    directory: str | os.PathLike[str],
    config: CacheProcessorConfig,
    weights: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write a checkpoint, as float32, in place of any earlier one. Other files in `directory` are left alone.

    Raises ValueError, naming the tensor, before anything is written if `weights` do not fit `config` or are
    not finite; OSError where the disk refuses, and then the earlier checkpoint is unchanged.

    A crash at any point leaves the earlier checkpoint or the new one, never a mixture. Two files cannot be
    replaced at once, so the rename of the weights decides:

        1. write model.safetensors.new, then config.json.new; flush both    the earlier one is valid
        2. rename model.safetensors.new to model.safetensors                the new one, with config.json.new
        3. rename config.json.new to config.json                            the new one

    `CacheProcessorConfig.load` reads config.json.new if, and only if, there is no model.safetensors.new; the
    next save finishes or removes what a crash left behind. One process at a time may save to a directory.
    """
    tensors = check_weights(config, weights)
    text = config.to_json()

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _settle(directory)
    new_config, new_weights = _unfinished(directory)
    try:
        save_file(tensors, new_weights)
        new_config.write_text(text, encoding="utf-8")
        # safetensors lets nobody else read what it writes; the two files belong together.
        shutil.copymode(new_config, new_weights)
        _flush(new_weights)
        _flush(new_config)
        _flush(directory)
        os.replace(new_weights, directory / WEIGHTS_FILE)
        _flush(directory)
    finally:
        _settle(directory)


def initial_weights(config: CacheProcessorConfig, random_scale: float = 0.0, seed: int = 0) -> Weights:
    """Weights of an untrained Processor, by name as in `config.tensor_shapes()`, float32.

    Matrices are normal with standard deviation 0.02, norms 1, biases 0, gates -2 (a logit: sigmoid is 0.12).
    random_scale: standard deviation of `out_proj.weight`; 0 makes the rewrite exactly the identity, and other
        values change nothing else.
    seed: 0 or more; a layer's weights depend on it and on the layer's number only.

    Raises ValueError for a negative or infinite random_scale or a negative seed.
    """
    if not (math.isfinite(random_scale) and random_scale >= 0):
        raise ValueError(f"random_scale is {random_scale}, but it must be a finite number that is 0 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but it must be 0 or more")
    weights: Weights = {}
    for layer in range(config.num_layers):
        generator = np.random.default_rng([seed, layer])
        for name, shape in config.layer_shapes().items():
            if name == "out_proj.weight" and random_scale == 0:
                value = np.zeros(shape, np.float32)
            elif len(shape) == 2:
                value = generator.standard_normal(shape, np.float32)
                value *= np.float32(random_scale if name == "out_proj.weight" else 0.02)
            else:
                start = {"gate": -2.0, "weight": 1.0, "bias": 0.0}  # the vectors named "weight" are norms
                value = np.full(shape, start[name.rpartition(".")[2]], np.float32)
            weights[f"layers.{layer}.{name}"] = value
    return weights


def _check_regular_file(path: Path) -> None:
    """A symbolic link is followed, since a model hub's cache is made of them."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a Processor's directory") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file: give a Processor's directory")


def _check_names(origin: object, names: Iterable[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    present = set(names)
    for name in expected:
        if name not in present:
            raise ValueError(f"{origin}: tensor '{name}' is missing")
    for name in sorted(present - expected.keys()):
        raise ValueError(f"{origin}: tensor {name[:100]!r} is unknown; remove it, or correct its name")


def _check_shape(origin: object, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        shown = str(list(shape[:8]))
        shown = shown if len(shape) <= 8 else f"{shown.removesuffix(']')}, ...]"
        raise ValueError(f"{origin}: tensor '{name}' has shape {shown}, but its configuration needs {list(expected)}")


def _check_finite(origin: object, name: str, tensor: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(tensor).all():
        raise ValueError(f"{origin}: tensor '{name}' holds a NaN or an infinity")


def _widen(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """To native float32; uint16 is bfloat16, the upper half of a float32."""
    if data.dtype.kind == "u":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32, copy=False)


def _settle(directory: Path) -> None:
    """Finish a save whose weights are in their place; remove what an earlier crash left of any other."""
    new_config, new_weights = _unfinished(directory)
    if not new_weights.exists() and new_config.exists():
        os.replace(new_config, directory / CONFIG_FILE)
    else:
        # The configuration first: without its weights it would look finished.
        new_config.unlink(missing_ok=True)
        _flush(directory)
        new_weights.unlink(missing_ok=True)
    _flush(directory)


def _unfinished(directory: Path) -> tuple[Path, Path]:
    return directory / (CONFIG_FILE + UNFINISHED_SUFFIX), directory / (WEIGHTS_FILE + UNFINISHED_SUFFIX)


def _flush(path: Path) -> None:
    """To the disk: a file's data, or the names in a directory (where the system can do that)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
