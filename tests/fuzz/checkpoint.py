"""Fuzz target: reading a configuration and a checkpoint.

    checkpoint.py [libFuzzer's options] CORPUS

An input is the text of config.json, the bytes of model.safetensors, or what is to be changed of a small valid pair of
both. What must hold: every refusal is a ValueError of one sentence; what is accepted is read back the same after it was
saved, and its weights are what the configuration says: of its shapes, float32, finite.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["bottlenecked"]):
    import numpy as np

    from bottlenecked.checkpoint import check_weights, initial_weights, load_weights, save_checkpoint
    from bottlenecked.config import BoundaryConfig, CacheProcessorConfig

VALID = CacheProcessorConfig(
    num_layers=1, num_kv_heads=1, head_dim=4, num_query_heads=2, processor_dim=4, processor_heads=2,
    processor_mlp_dim=3, top_k=2, recent_window=3, boundary=BoundaryConfig(rule="token_ids", token_ids=(7, 9)),
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, extra={"note": [1, {"x": None}]},
)  # fmt: skip
VALID_TEXT = VALID.to_json()
WEIGHTS = initial_weights(VALID, random_scale=0.1, seed=3)
# In memory where there is such a place: an input is a pair of files.
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-checkpoint-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
HUGE = (0, -1, 2**31, 2**53, 2**63, 2**64, -(2**70), 10**400, 4096, 65536, 65537)


class Input:
    def __init__(self, data: bytes) -> None:
        self.provider = atheris.FuzzedDataProvider(data)

    def below(self, limit: int) -> int:
        return self.provider.ConsumeIntInRange(0, limit - 1)

    def value(self, depth: int = 0) -> Any:
        """A JSON value."""
        kind = self.below(12)
        if kind < 3:
            return self.below(12)
        if kind < 5:
            return HUGE[self.below(len(HUGE))]
        if kind == 5:
            return (0.0, -0.5, 1e-6, 1e308, 1e-320, 3.5e38, True, False, None)[self.below(9)]
        if kind < 8 and depth < 3:
            return [self.value(depth + 1) for _ in range(self.below(4))]
        if kind < 10 and depth < 3:
            return {self.text(): self.value(depth + 1) for _ in range(self.below(4))}
        return self.text()

    def text(self) -> str:
        known = ("newline", "token_ids", "pre", "post", "rotated", "unrotated", "linear", "llama3", "rope_theta", "F16")
        return known[self.below(10)] if self.below(2) else self.provider.ConsumeUnicode(self.below(12))

    def change(self, values: dict[str, Any]) -> None:
        name = list(values)[self.below(len(values))] if values and self.below(8) else self.text()
        if isinstance(values.get(name), dict) and self.below(4):
            self.change(values[name])
        elif self.below(8) == 7:
            values.pop(name, None)
        else:
            values[name] = self.value()


def config_text(given: Input) -> bytes:
    if given.below(4) == 3:
        return bytes(given.provider.ConsumeBytes(400))
    values = json.loads(VALID_TEXT)
    for _ in range(given.below(4)):
        given.change(values)
    text = json.dumps(values).encode()
    if given.below(16) == 15:
        at = given.below(len(text))
        text = text[:at] + bytes(given.provider.ConsumeBytes(given.below(8))) + text[at + given.below(8) :]
    return text


def weights_bytes(given: Input) -> bytes:
    """A file of safetensors: length of the header, header, data."""
    if given.below(8) == 7:
        return bytes(given.provider.ConsumeBytes(400))
    header: dict[str, Any] = {}
    data, kind = b"", given.below(8)
    names = list(WEIGHTS)
    if kind == 7:
        names = names[::-1]
    for name in names:
        stored = WEIGHTS[name].tobytes()
        dtype = ("F32", "F32", "F32", "F32", "BF16", "F16", "F32", "F32")[kind]
        if dtype != "F32":
            stored = stored[: len(stored) // 2]
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": dtype, "shape": list(WEIGHTS[name].shape), "data_offsets": offsets}
        data += stored
    for _ in range(given.below(3)):
        given.change(header)
    if given.below(8) == 7:  # a value that is no number
        at = given.below(len(data) // 4) * 4
        data = data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]
    text = json.dumps(header).encode()
    length = len(text) if given.below(8) else HUGE[given.below(4)] % 2**64
    data = data[: len(data) - given.below(3)] if given.below(8) == 7 else data
    return struct.pack("<Q", length) + text + data


def one_sentence(error: ValueError) -> None:
    assert str(error), "no sentence says what is wrong"
    assert len(str(error)) < 1500, "a sentence that nobody reads"


def read_weights(config: CacheProcessorConfig) -> None:
    try:
        weights = load_weights(FOLDER, config)
    except ValueError as error:
        one_sentence(error)
        return
    assert {name: tensor.shape for name, tensor in weights.items()} == config.tensor_shapes()
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in weights.values())
    folder = FOLDER / "again"
    save_checkpoint(folder, config, weights)
    assert CacheProcessorConfig.load(folder) == config
    again = load_weights(folder, CacheProcessorConfig.load(folder))
    assert all(weights[name].tobytes() == again[name].tobytes() for name in weights)
    assert list(check_weights(config, again)) == list(weights)


def test_one_input(data: bytes) -> None:
    given = Input(data)
    kind = given.below(4)
    (FOLDER / "config.json").write_bytes(config_text(given) if kind < 3 else VALID_TEXT.encode())
    config = VALID
    try:
        config = CacheProcessorConfig.load(FOLDER)
    except ValueError as error:
        one_sentence(error)
    else:
        assert CacheProcessorConfig.from_dict(json.loads(config.to_json())) == config
        try:
            config.inv_freq()
        except ValueError as error:
            one_sentence(error)
    if kind >= 2 or config.num_layers > 64:
        (FOLDER / "model.safetensors").write_bytes(weights_bytes(given))
        read_weights(config if config.num_layers <= 64 else VALID)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
