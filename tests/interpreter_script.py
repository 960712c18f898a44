"""Run by tests/test_processes.py in interpreters of their own: a rewrite with the standard library alone, since NumPy
is not for several interpreters. Defines `digest`, of all that was rewritten."""

import ctypes
import hashlib
import random

import bottleneck_ext

LAYERS, BLOCKS, HEAD_DIM = 2, 3, 4
CONFIG = {
    "num_layers": LAYERS, "num_kv_heads": 1, "num_query_heads": 2, "head_dim": HEAD_DIM, "processor_dim": 4,
    "processor_heads": 2, "processor_mlp_dim": 6, "top_k": 2, "recent_window": 4, "norm_eps": 1e-6,
    "rope_inv_freq": None,
}  # fmt: skip
C, D, F = 2 * HEAD_DIM, 4, 6
SHAPES = {
    "input_norm.weight": (C,), "in_proj.weight": (D, C), "in_proj.bias": (D,), "attn_norm.weight": (D,),
    **{f"{name}_proj.{what}": (D, D) if what == "weight" else (D,) for name in "qkvo" for what in ("weight", "bias")},
    "mlp_norm.weight": (D,), "gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F),
    "out_proj.weight": (C, D), "out_proj.bias": (C,), "gate": (),
}  # fmt: skip


class DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )  # fmt: skip


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Tensor:
    """float32, row-major."""

    def __init__(self, shape, values):
        self.values = (ctypes.c_float * max(1, len(values)))(*values)
        self.shape = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        self.managed = DLManagedTensor(data=ctypes.addressof(self.values), ndim=len(shape), code=2, bits=32, lanes=1)
        self.managed.device = (1, 0)
        self.managed.shape = ctypes.addressof(self.shape)

    def __dlpack__(self, **options):
        return new_capsule(ctypes.addressof(self.managed), b"dltensor", None)


def make(shape, source):
    count = 1
    for size in shape:
        count *= size
    return Tensor(shape, [source.gauss(0, 1) for _ in range(count)])


def rewrite():
    source = random.Random(3)
    weights = {f"layers.{i}.{name}": make(shape, source) for i in range(LAYERS) for name, shape in SHAPES.items()}
    processor = bottleneck_ext.Processor(CONFIG, weights)
    keys, values = ([make((BLOCKS, 16, 1, HEAD_DIM), source) for _ in range(LAYERS)] for _ in range(2))
    queries = [make((BLOCKS, 4, 2, HEAD_DIM), source) for _ in range(LAYERS)]
    before = [bytes(tensor.values) for tensor in (*keys, *values)]
    cache, query_cache = bottleneck_ext.KVCache(keys, values), bottleneck_ext.QueryCache(queries)
    workspace = bottleneck_ext.Workspace(2)
    processor.rewrite(cache, query_cache, [(0, 0, 9, 14), (2, 1, 5, 16)], workspace=workspace)
    try:
        processor.rewrite(cache, query_cache, [(3, 0, 1, 2)], workspace=workspace)
    except bottleneck_ext.InvalidArgumentError as error:
        told = str(error)
    else:
        told = "nothing"
    assert "sequence 3" in told, told
    after = [bytes(tensor.values) for tensor in (*keys, *values)]
    assert all(a != b for a, b in zip(after, before, strict=True)), "nothing was rewritten"
    return hashlib.sha256(b"".join(after)).hexdigest()


digest = rewrite()
