"""Fuzz target: the extension's whole Python surface, with tensors that no library would make.

    extension.py [libFuzzer's options] CORPUS

An input decides on a small valid call, and then on what of it is replaced: by a tensor of another shape, stride, dtype,
device or DLPack version (its memory is as large as it says), by an object that raises, lies about its length or comes
back into the extension, or by something of another type. What must hold: only documented exceptions, nothing written
where one is raised, and every export released.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any

import atheris

import bottleneck_ext as ext

Documented = (
    ext.InvalidArgumentError, ext.UnsupportedError, TypeError, ValueError, KeyError, OverflowError, MemoryError,
)  # fmt: skip
EDGES = (0, -1, 1, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**61, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**70))
F32, F16, BF16, I32, I64 = (2, 32), (2, 16), (4, 16), (0, 32), (0, 64)
LARGEST = 1 << 14  # elements


class Boom(Exception):
    """Raised by objects that are not what they say."""


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Managed(ctypes.Structure):
    """DLManagedTensorVersioned; without its first four fields moved, DLManagedTensor."""


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Managed._fields_ = [
    ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", Deleter),
    ("flags", ctypes.c_uint64), ("tensor", Tensor),
]  # fmt: skip


class Unversioned(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, Destructor]
exports: dict[int, object] = {}  # by the address of the capsule's content


@Destructor
def released(capsule: int) -> None:
    get_name, get = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
    exports.pop(get(capsule, get_name(capsule)), None)


@Deleter
def ignore(_: int) -> None:
    pass


class Exporter:
    """A tensor of memory that ends where it says. What DLPack is told of it may be changed."""

    def __init__(self, shape: tuple[int, ...], dtype: tuple[int, int], values: bytes = b"") -> None:
        self.shape, self.dtype, self.strides = list(shape), dtype, [1] * len(shape)
        for d in reversed(range(len(shape) - 1)):
            self.strides[d] = self.strides[d + 1] * max(self.shape[d + 1], 1)
        self.values, self.memory, self.before = values, None, b""
        self.lanes, self.device, self.version, self.flags, self.offset = 1, (1, 0), 1, 0, 0
        self.name, self.is_versioned, self.has_strides, self.ndim = b"dltensor_versioned", True, True, len(shape)
        self.reenter: Callable[[], object] | None = None

    def back(self) -> None:
        """Memory for all that the shape and strides reach. What is too large is made small: it would be a lie."""
        if any(not -(2**63) <= n < 2**63 for n in self.shape + self.strides):
            self.shape, self.strides = [1] * len(self.shape), [1] * len(self.shape)
        if not self.has_strides:  # they are those of its shape, whatever that has become
            self.strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        low = high = 0
        is_empty = any(n <= 0 for n in self.shape)
        for d, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            if not is_empty and n > 1 and abs(stride) * (n - 1) > LARGEST:
                self.strides[d] = stride = 0 if self.has_strides else stride
                if not self.has_strides:
                    self.shape[d] = n = 1
            reach = stride * (n - 1) if not is_empty and n > 1 else 0
            low, high = low + min(reach, 0), high + max(reach, 0)
        size = max(self.dtype[1] * self.lanes // 8, 1)
        count = 0 if is_empty else (high - low + 1) * size
        content = (self.values * (count // len(self.values) + 1))[:count] if self.values else bytes(count)
        self.memory = (ctypes.c_char * count).from_buffer_copy(content) if count else None
        self.before, self.start = content, -low * size

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: object) -> object:
        if self.reenter is not None:
            again, self.reenter = self.reenter, None
            again()
        if self.memory is None and self.before == b"":
            self.back()
        dims = max(len(self.shape), 1)
        shape, strides = (ctypes.c_int64 * dims)(*self.shape), (ctypes.c_int64 * dims)(*self.strides)
        managed = Managed() if self.is_versioned else Unversioned()
        tensor = managed.tensor
        address = ctypes.addressof(self.memory) + self.start if self.memory is not None else None
        tensor.data = address - self.offset if address is not None else None
        tensor.byte_offset = self.offset
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim, (tensor.code, tensor.bits), tensor.lanes = self.ndim, self.dtype, self.lanes
        tensor.shape = ctypes.addressof(shape)
        tensor.strides = ctypes.addressof(strides) if self.has_strides else None
        managed.deleter = ignore
        if self.is_versioned:
            managed.major, managed.flags = self.version, self.flags
        address = ctypes.addressof(managed)
        exports[address] = (managed, shape, strides, self, self.name)
        return new_capsule(address, self.name, released)

    def is_unchanged(self) -> bool:
        return self.memory is None or self.memory.raw == self.before


# ---- decisions -------------------------------------------------------------------------------------------------------


class Input:
    def __init__(self, data: bytes) -> None:
        self.provider = atheris.FuzzedDataProvider(data)
        self.made: list[Exporter] = []

    def below(self, limit: int) -> int:
        return self.provider.ConsumeIntInRange(0, limit - 1)

    def accept(self) -> None:
        """A call succeeded: what it wrote is right."""
        for tensor in self.made:
            tensor.before = tensor.memory.raw if tensor.memory is not None else b""

    def number(self) -> int:
        """Small, or at an edge, or any."""
        kind = self.below(8)
        if kind < 5:
            return self.below(40) - 4
        return EDGES[self.below(len(EDGES))] if kind < 7 else self.provider.ConsumeInt(8)

    def tensor(self, shape: tuple[int, ...], dtype: tuple[int, int]) -> Exporter:
        made = Exporter(shape, dtype, b"\x3d\x3c\x3e\xbd\x3e\x3b" if dtype[0] else b"")
        self.made.append(made)
        if self.below(8) == 7:
            made.strides = [stride * 2 for stride in made.strides]
        return made

    def change(self, tensor: Exporter) -> None:
        kind, d = self.below(16), self.below(len(tensor.shape) or 1)
        if kind < 3 and tensor.shape:
            tensor.shape[d] = self.number()
        elif kind < 6 and tensor.strides:
            tensor.strides[d] = self.number()
        elif kind == 6:
            tensor.dtype = (self.below(8), (8, 16, 32, 64)[self.below(4)])
        elif kind == 7:
            tensor.lanes = self.below(4)
        elif kind == 8:
            tensor.device = (self.below(15), self.below(3))
        elif kind == 9:
            tensor.version, tensor.flags = self.below(3), self.below(4)
        elif kind == 10:
            tensor.is_versioned, tensor.name = False, b"dltensor"
        elif kind == 11:
            tensor.name = b"used_dltensor"
        elif kind == 12:
            tensor.has_strides = False
        elif kind == 13:
            tensor.ndim = self.below(2 * len(tensor.shape) + 1) - len(tensor.shape)
            tensor.ndim = -1 if tensor.ndim < 0 else tensor.ndim
        elif kind == 14:
            tensor.offset = self.below(64)
        else:
            tensor.shape = tensor.shape[:d] + tensor.shape[d + 1 :]
            tensor.strides, tensor.ndim = tensor.strides[:d] + tensor.strides[d + 1 :], len(tensor.shape)

    def strange(self) -> Any:
        """No tensor at all."""
        input = self

        class Hostile:
            def __dlpack__(self, **_: object) -> object:
                if input.below(2):
                    raise (Boom, TypeError, BufferError, MemoryError)[input.below(4)]("hostile")
                return (None, 1, object())[input.below(3)]

            def __dlpack_device__(self) -> Any:
                return (None, (2, 0), (), "x", (2**70, 0))[input.below(5)]

            def __iter__(self) -> Any:
                for i in range(input.below(4)):
                    if input.below(4) == 3:
                        raise Boom("iter")
                    yield (i, 0, 0, 1)

            def __len__(self) -> int:
                return input.number()

            def __getitem__(self, key: object) -> Any:
                raise (Boom, KeyError, IndexError)[input.below(3)](key)

            def __index__(self) -> int:
                return input.number()

        things = (
            None,
            0,
            1.5,
            "cpu",
            b"\0",
            (),
            [],
            {},
            Hostile(),
            Hostile,
            float("nan"),
            2**70,
            -1,
            [[1, 2]],
            object(),
        )
        return things[self.below(len(things))]

    def maybe(self, value: Any) -> Any:
        """The value, seldom something else."""
        if self.below(48) != 47:
            if isinstance(value, Exporter) and self.below(16) == 15:
                self.change(value)
            return value
        return self.strange()


# ---- calls -----------------------------------------------------------------------------------------------------------

NAMES = ("cpu", "cpu:scalar", "cpu:avx2", "cuda", "cpu:none", "cpu:", ":", "cuda:99999999999", "\ud800", "a" * 300)
CONFIG: dict[str, Any] = {
    "num_layers": 2, "num_kv_heads": 1, "num_query_heads": 2, "head_dim": 4, "processor_dim": 4, "processor_heads": 2,
    "processor_mlp_dim": 3, "top_k": 2, "recent_window": 3, "norm_eps": 1e-6, "rope_inv_freq": None,
}  # fmt: skip
SHAPES = {
    "input_norm.weight": (8,), "in_proj.weight": (4, 8), "in_proj.bias": (4,), "attn_norm.weight": (4,),
    "q_proj.weight": (4, 4), "q_proj.bias": (4,), "k_proj.weight": (4, 4), "k_proj.bias": (4,),
    "v_proj.weight": (4, 4), "v_proj.bias": (4,), "o_proj.weight": (4, 4), "o_proj.bias": (4,),
    "mlp_norm.weight": (4,), "gate_proj.weight": (3, 4), "up_proj.weight": (3, 4), "down_proj.weight": (4, 3),
    "out_proj.weight": (8, 4), "out_proj.bias": (8,), "gate": (),
}  # fmt: skip


def weights(given: Input | None) -> dict[str, Any]:
    make = given.tensor if given is not None else lambda shape, dtype: Exporter(shape, dtype, b"\x3d\x3c\x3e\xbd")
    return {f"layers.{i}.{name}": make(shape, F32) for i in range(2) for name, shape in SHAPES.items()}


PROCESSOR = ext.Processor(CONFIG, weights(None))
WORKSPACE = ext.Workspace()


def make_processor(given: Input) -> None:
    config, tensors = dict(CONFIG), weights(given)
    for _ in range(given.below(3)):
        name = list(config)[given.below(len(config))]
        config[name] = given.number() if given.below(2) else given.strange()
    for _ in range(given.below(3)):
        name = list(tensors)[given.below(len(tensors))]
        if given.below(4) == 3:
            del tensors[name]
        else:
            tensors[name] = given.maybe(tensors[name])
            if isinstance(tensors[name], Exporter):
                given.change(tensors[name])
    if given.below(2):
        config["rope_inv_freq"] = [1.0, 0.5, given.strange()][: given.below(4)]
    dtype = ("float32", "bfloat16", "float16")[given.below(3)]
    made = ext.Processor(
        given.maybe(config), given.maybe(tensors), weight_dtype=given.maybe(dtype),
        backend=given.maybe(NAMES[given.below(len(NAMES))]),
    )  # fmt: skip
    assert made.nbytes > 0
    assert made.backend.startswith("cpu:")


def boundary(given: Input) -> tuple[Any, Any, list[Any], Any]:
    dtype = (F32, BF16, F16)[given.below(3)]
    blocks, size, pages, rows = given.below(6) + 1, given.below(5) + 1, given.below(4) + 1, given.below(5) + 1
    heads_first = given.below(2) == 1
    shape = (blocks, 1, size, 4) if heads_first else (blocks, size, 1, 4)
    keys, values = ([given.maybe(given.tensor(shape, dtype)) for _ in range(2)] for _ in range(2))
    queries = [given.maybe(given.tensor((pages, rows, 2, 4), dtype)) for _ in range(2)]
    query_table = given.tensor((2, pages), I32) if given.below(2) else None
    block_table = given.tensor((2, blocks), I32) if given.below(2) else None
    for table, entries in ((query_table, pages), (block_table, blocks)):
        if table is not None:
            listed = [(i * 3 + given.below(3)) % (entries + given.below(9) // 8) for i in range(2 * entries)]
            table.values = b"".join(n.to_bytes(4, "little") for n in listed)
    kv_cache = ext.KVCache(given.maybe(keys), given.maybe(values), heads_first=given.maybe(heads_first))
    query_cache = ext.QueryCache(given.maybe(queries), given.maybe(query_table))
    steps: list[Any] = []
    for sequence in range(given.below(3)):
        end = given.below(size * 2) + 1
        begin = given.below(end)
        step = [sequence, given.below(begin + 1), begin, end, *([given.below(4)] if given.below(2) else [])]
        if given.below(8) == 7:
            step[given.below(len(step))] = given.number() if given.below(2) else given.strange()
        steps.append(given.maybe(tuple(step)))
    for cache in (kv_cache, query_cache):
        for name in dir(type(cache)):
            if not name.startswith("_") and name != "capture":
                getattr(cache, name)
    if given.below(8) == 7 and given.made:  # after the cache was bound
        given.change(given.made[given.below(len(given.made))])
    return kv_cache, query_cache, steps, block_table


def rewrite(given: Input) -> None:
    kv_cache, query_cache, steps, block_table = boundary(given)
    count, out = len(steps), {}
    for name, shape, dtype in (
        ("recalled", (2, count, 2), I64), ("delta_norm", (2, count), F32), ("row_norm", (2, count), F32),
        ("skipped", (count,), I32),
    ):  # fmt: skip
        if given.below(4) == 3:
            out[name] = given.maybe(given.tensor(shape, dtype))
    if given.below(16) == 15 and given.made:

        def again() -> None:
            PROCESSOR.rewrite(kv_cache, query_cache, steps, block_table, workspace=WORKSPACE)
            given.accept()

        given.made[given.below(len(given.made))].reenter = again
    if given.below(16) == 15 and given.made:
        given.made[given.below(len(given.made))].reenter = steps.clear
    seconds = PROCESSOR.rewrite(
        given.maybe(kv_cache), given.maybe(query_cache), given.maybe(steps), given.maybe(block_table),
        workspace=given.maybe(WORKSPACE), softmax_scale=given.maybe(0.0),
        max_relative_edit=(0.0, 0.5, 1e-300, float("nan"), -1.0)[given.below(5)], wait=given.maybe(True),
        stream=given.maybe(None), **out,
    )  # fmt: skip
    assert seconds is None or all(value >= 0 for value in seconds.values())
    given.accept()


def attention_mass(given: Input) -> None:
    kv_cache, query_cache, steps, block_table = boundary(given)
    out = given.maybe(given.tensor((2, len(steps), given.below(12)), F32))
    ext.attention_mass(
        given.maybe(kv_cache), given.maybe(query_cache), given.maybe(steps), given.maybe(block_table), out=out,
        workspace=given.maybe(WORKSPACE), recent_window=given.number() if given.below(2) else 3,
        softmax_scale=given.maybe(0.5), stream=given.maybe(None),
    )  # fmt: skip
    if isinstance(out, Exporter) and out.memory is not None:
        out.before = out.memory.raw


def capture(given: Input) -> None:
    pages, rows = given.below(4) + 1, given.below(4) + 1
    cache = ext.QueryCache([given.tensor((pages, rows, 2, 4), F32) for _ in range(2)])
    tokens = given.below(5)
    query, slots = given.tensor((tokens, 2, 4), F32), given.tensor((tokens,), I64)
    mapping = given.tensor((given.below(6),), I32)
    slots.values = b"".join(given.number().to_bytes(12, "little", signed=True)[:8] for _ in range(tokens)) or b"\0"
    mapping.values = b"".join((given.below(pages + 2) - 1).to_bytes(4, "little", signed=True) for _ in range(4))
    layer = given.number()
    cache.capture(
        given.maybe(layer % 3), given.maybe(query), given.maybe(slots), given.maybe(mapping),
        workspace=given.maybe(WORKSPACE), stream=given.maybe(None),
    )  # fmt: skip
    for tensor in given.made[:2]:
        tensor.before = tensor.memory.raw if tensor.memory is not None else b""


def select_top_k(given: Input) -> None:
    rows, n, top_k = given.below(4), given.below(20), given.below(6)
    mass, out = given.tensor((rows, n), F32), given.tensor((rows, top_k), I64)
    lengths = given.tensor((rows,), I64)
    lengths.values = b"".join(given.below(n + 2).to_bytes(8, "little") for _ in range(rows)) or b"\0"
    if given.below(8) == 7:
        huge = given.number()
        for tensor in (mass, lengths, out):
            tensor.shape[0], tensor.strides[0] = huge, 0
        out.shape[1] = 0
    tensors = [given.maybe(tensor) for tensor in (mass, lengths, out)]
    for tensor in tensors:  # a large one that is valid takes its time
        if isinstance(tensor, Exporter) and any(2**16 < n < 2**32 for n in tensor.shape):
            return
    ext.select_top_k(*tensors, backend=given.maybe(NAMES[given.below(3)]))
    out.before = out.memory.raw if out.memory is not None else b""


def linear(given: Input) -> None:
    layers, rows, wide, narrow = given.below(3) + 1, given.below(6), given.below(20) + 1, given.below(20) + 1
    made = ext.Linear(
        given.maybe(given.tensor((layers, wide, narrow), F32)),
        given.maybe(given.tensor((layers, wide), F32)) if given.below(2) else None,
        weight_dtype=given.maybe(("float32", "bfloat16")[given.below(2)]), backend=given.maybe("cpu"),
    )  # fmt: skip
    assert made.nbytes > 0
    assert made.backend
    x, out = given.tensor((layers, rows, narrow), F32), given.tensor((layers, rows, wide), F32)
    made.apply(
        given.maybe(x), given.maybe(x if given.below(16) == 15 else out), accumulate=given.maybe(False),
        workspace=given.maybe(WORKSPACE),
    )  # fmt: skip
    out.before = out.memory.raw if out.memory is not None else b""


def workspace(given: Input) -> None:
    made = ext.Workspace(
        given.maybe(given.number()), given.maybe(NAMES[given.below(len(NAMES))]), reserve=given.number()
    )
    assert made.num_threads >= 1
    assert made.nbytes >= 0
    assert made.skipped_steps == 0
    assert made.backend
    made.synchronize()
    assert PROCESSOR.workspace_bytes(
        given.number(), given.number(), given.maybe(given.number()),
        cache_dtype=("float32", "float16", "bfloat16", "x", "\0")[given.below(5)],
    )  # fmt: skip


def others(given: Input) -> None:
    functions = (ext.backends, ext.default_backend, ext.build_info, PROCESSOR.rewrite, ext.KVCache, ext.attention_mass)
    arguments = [given.strange() for _ in range(given.below(4))]
    functions[given.below(len(functions))](*arguments)


CALLS = (rewrite, rewrite, rewrite, attention_mass, capture, select_top_k, linear, workspace, make_processor, others)


def test_one_input(data: bytes) -> None:
    given = Input(data)
    with contextlib.suppress(*Documented, Boom):
        CALLS[given.below(len(CALLS))](given)
    for tensor in given.made:
        tensor.reenter = None
        assert tensor.is_unchanged(), "bytes were written that may not be"
    assert not exports, f"{len(exports)} exports were not released"


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
