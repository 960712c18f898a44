"""How fast a piece of work could be on this machine: counted bytes and operations over measured rates.

    floor_s = max(bytes / bandwidth + cached_bytes / cached_bandwidth, flops / peak + exps / exp rate)

Both sides are measured in the same run, on as many threads (`measure_peaks`, by the loops of peak.c). What is counted
is what the work cannot do without, not what an implementation does: every operand crosses the memory bus once, every
score is computed once and has one exponential. A floor is a bound from below: nothing that computes the same from
memory is faster, and an implementation that is at the floor has nothing left to gain.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bottleneck_ext
from benchmarks import machine
from bottlenecked.config import CacheProcessorConfig

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
CACHED_FLOATS = 1 << 15  # 128 KiB and its copy fit the second-level cache of any machine with one per core
CHUNK_FLOATS = 1 << 20  # 4 MiB at a time come from memory
ROUNDS_SECONDS = 0.002  # a measurement's length, shorter than a busy system's time slice; the best is the peak


@dataclass(frozen=True)
class Peaks:
    """Measured rates per second, of `threads` threads together.

    float32_flops, bfloat16_flops: operations, two to a multiply-add; bfloat16 operands with float32 sums, which is
        the float32 rate where the machine has no such instruction. exps: of the kernels' own exponential.
    read_bandwidth, copy_bandwidth: bytes from memory; bytes read plus bytes written. cached_bandwidth: the same of a
        copy within the second-level cache.
    """

    threads: int
    float32_flops: float
    bfloat16_flops: float
    exps: float
    read_bandwidth: float
    copy_bandwidth: float
    cached_bandwidth: float

    @property
    def bandwidth(self) -> float:
        """The better of reading and copying: no mix of reads and writes is faster."""
        return max(self.read_bandwidth, self.copy_bandwidth)


@dataclass(frozen=True)
class Work:
    """What has to be done. Works add up.

    bytes: that come from memory or go there. cached_bytes: that were touched a moment before and come from a cache.
    float32_flops, bfloat16_flops: by the dtype of the products' operands. exps: exponentials.
    """

    bytes: int = 0
    cached_bytes: int = 0
    float32_flops: int = 0
    bfloat16_flops: int = 0
    exps: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def floor(self, peaks: Peaks) -> dict[str, Any]:
        """The keys of a figure: floor_s and, under "floor", what was counted and what bounds it.

        bound_by: "bytes", "flops" or "exps", whichever takes longest of the side that is the longer one.
        """
        moving = self.bytes / peaks.bandwidth + self.cached_bytes / peaks.cached_bandwidth
        multiplying = self.float32_flops / peaks.float32_flops + self.bfloat16_flops / peaks.bfloat16_flops
        exponentials = self.exps / peaks.exps
        computing = multiplying + exponentials
        return {
            "floor_s": max(moving, computing),
            "floor": {
                "bytes": self.bytes,
                "cached_bytes": self.cached_bytes,
                "flops": self.float32_flops + self.bfloat16_flops,
                "exps": self.exps,
                "bound_by": "bytes" if moving >= computing else "flops" if multiplying >= exponentials else "exps",
            },
        }


# ---- counts ---------------------------------------------------------------------------------------------------


def linear(num_layers: int, rows: int, in_dim: int, out_dim: int, dtype: str, *, cached: bool = False) -> Work:
    """y [rows, out_dim] = x [rows, in_dim] W^T in every layer.

    Weights once, in their packed dtype; activations in and out once, in float32. cached: the activations are between
    two products of a Processor and never leave the caches; they are then left out.
    """
    weights = num_layers * in_dim * out_dim
    activations = 0 if cached else num_layers * rows * (in_dim + out_dim) * 4
    return Work(bytes=weights * SIZES[dtype] + activations) + _products(dtype, weights * rows)


def attention_mass(config: CacheProcessorConfig, dtype: str, batch: int, prior: int, window: int) -> Work:
    """Attention mass of every prior position, for the window's queries, after and including their softmax.

    Every key of a sequence and KV head once, the window's queries once, one float32 per prior position out. A score
    (2 * head_dim operations) and one exponential per query and key it sees, causal within the window.
    """
    scores = config.num_layers * batch * config.num_query_heads * (window * prior + window * (window + 1) // 2)
    keys = config.num_layers * batch * config.num_kv_heads * (prior + window) * config.head_dim
    queries = config.num_layers * batch * config.num_query_heads * window * config.head_dim
    mass = config.num_layers * batch * prior
    moved = Work(bytes=(keys + queries) * SIZES[dtype] + 4 * mass, exps=scores)
    return moved + _products(dtype, scores * config.head_dim)


def top_k(rows: int, prior: int, k: int) -> Work:
    """float32 masses [rows, prior] read once, int64 positions [rows, k] written."""
    return Work(bytes=rows * (4 * prior + 8 * k))


def gather(config: CacheProcessorConfig, dtype: str, rows: int) -> Work:
    """Keys and values of `rows` positions of every layer to float32 rows.

    Of these only the values come from memory: the mass has just read the keys, and the rows are written to where the
    Processor reads them next.
    """
    half = config.num_layers * rows * config.num_kv_heads * config.head_dim
    return Work(bytes=half * SIZES[dtype], cached_bytes=half * SIZES[dtype] + 2 * half * 4)


def stage(config: CacheProcessorConfig, dtype: str, rows: int) -> Work:
    """float32 edits added to keys and values of `rows` positions of every layer: edits and cache read, sums written.

    All of it was touched by the boundary before; where the caches held it no longer, the true floor is higher.
    """
    elements = 2 * config.num_layers * rows * config.num_kv_heads * config.head_dim
    return Work(cached_bytes=elements * (4 + 2 * SIZES[dtype]))


def write(config: CacheProcessorConfig, dtype: str, rows: int) -> Work:
    """Staged keys and values of `rows` positions of every layer read and written to the cache, none from memory."""
    elements = 2 * config.num_layers * rows * config.num_kv_heads * config.head_dim
    return Work(cached_bytes=elements * 2 * SIZES[dtype])


def products_of(config: CacheProcessorConfig) -> dict[str, tuple[int, int]]:
    """(in_dim, out_dim) of the products of a Processor's layer; those of one input are one product, as in the core."""
    c, d, f = (
        2 * config.num_kv_heads * config.head_dim,
        config.processor_dim,
        config.processor_mlp_dim,
    )
    return {"in": (c, d), "qkv": (d, 3 * d), "o": (d, d), "gate_up": (d, 2 * f), "down": (f, d), "out": (d, c)}


def processor(config: CacheProcessorConfig, weight_dtype: str, sequences: int, rows: int) -> Work:
    """The Processors of all layers over `rows` rows of each of `sequences` sequences: products and attention.

    Weights come from memory; activations stay in the caches. The attention within a sequence is float32.
    """
    total = Work()
    for in_dim, out_dim in products_of(config).values():
        total += linear(config.num_layers, sequences * rows, in_dim, out_dim, weight_dtype, cached=True)
    pairs = config.num_layers * sequences * rows * rows
    attention = Work(float32_flops=4 * pairs * config.processor_dim, exps=pairs * config.processor_heads)
    swiglu = Work(exps=config.num_layers * sequences * rows * config.processor_mlp_dim)
    return total + attention + swiglu


def boundary(config: CacheProcessorConfig, dtype: str, weight_dtype: str, batch: int, prior: int, window: int) -> Work:
    """A whole boundary: mass, gather, Processor and write. top_k reads what the mass has just written."""
    rows = min(config.top_k, prior) + window
    return (
        attention_mass(config, dtype, batch, prior, window)
        + gather(config, dtype, batch * rows)
        + processor(config, weight_dtype, batch, rows)
        + stage(config, dtype, batch * rows)
        + write(config, dtype, batch * rows)
    )


def _products(dtype: str, multiply_adds: int) -> Work:
    """float16 operands are widened: no machine we know multiplies them into float32 sums."""
    if dtype == "bfloat16":
        return Work(bfloat16_flops=2 * multiply_adds)
    return Work(float32_flops=2 * multiply_adds)


# ---- rates ----------------------------------------------------------------------------------------------------


def measure_peaks(threads: int, attempts: int = 40) -> Peaks:
    """The machine's rates on this many threads: the best of `attempts`. Takes about a second.

    Raises SystemExit where peak.c cannot be compiled.
    """
    library = _library()
    # Each thread has memory of its own, together four times the last-level cache, which holds no chunk until its turn.
    chunks = max(2 * machine.last_level_cache() // threads // (4 * CHUNK_FLOATS), 2)
    memory = [np.ones((2, chunks, CHUNK_FLOATS), np.float32) for _ in range(threads)]
    cached = [np.ones((2, CACHED_FLOATS), np.float32) for _ in range(threads)]
    exponents = np.linspace(-16, 0, library.peak_exp_exps(), dtype=np.float32)
    factor, term = ctypes.c_float(0.9999), ctypes.c_float(0.0001)
    turns = [itertools.cycle(range(chunks)) for _ in range(threads)]

    def rate(call: Callable[[int, int], object], count: float) -> float:
        """call(thread, rounds), of which each round counts `count`, on all threads at once: counts per second."""

        def seconds(rounds: int, attempts: int) -> float:
            return min(_seconds(call, threads, rounds) for _ in range(attempts))

        rounds = 1
        while (taken := seconds(rounds, 3)) < ROUNDS_SECONDS:
            rounds = max(2 * rounds, int(rounds * ROUNDS_SECONDS / max(taken, 1e-6)))
        return threads * rounds * count / seconds(rounds, attempts)

    def read(t: int, rounds: int) -> None:
        for chunk in itertools.islice(turns[t], rounds):
            for half in memory[t]:
                library.peak_read(1, _at(half[chunk]), CHUNK_FLOATS)

    def copy(t: int, rounds: int) -> None:
        for chunk in itertools.islice(turns[t], rounds):
            library.peak_copy(1, _at(memory[t][0, chunk]), CHUNK_FLOATS, _at(memory[t][1, chunk]))

    def copy_cached(t: int, rounds: int) -> None:
        library.peak_copy(rounds, _at(cached[t][0]), CACHED_FLOATS, _at(cached[t][1]))

    def multiply_add(name: str) -> float:
        loop, count = getattr(library, f"peak_{name}"), getattr(library, f"peak_{name}_multiply_adds")()
        return rate(lambda t, rounds: loop(rounds, factor, term), 2 * count)

    return Peaks(
        threads=threads,
        float32_flops=multiply_add("f32"),
        bfloat16_flops=multiply_add("bf16"),
        exps=rate(lambda t, rounds: library.peak_exp(rounds, _at(exponents)), len(exponents)),
        read_bandwidth=rate(read, 8 * CHUNK_FLOATS),
        copy_bandwidth=rate(copy, 8 * CHUNK_FLOATS),
        cached_bandwidth=rate(copy_cached, 8 * CACHED_FLOATS),
    )


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _seconds(call: Callable[[int, int], object], threads: int, rounds: int) -> float:
    """Wall clock of call(t, rounds) on threads t = 0, 1, ... at once. ctypes lets go of the interpreter."""
    barrier = threading.Barrier(threads)
    times: list[tuple[float, float]] = []

    def work(t: int) -> None:
        barrier.wait()
        start = time.perf_counter()
        call(t, rounds)
        times.append((start, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(t,)) for t in range(1, threads)]
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    return max(end for _, end in times) - min(start for start, _ in times)


@functools.cache
def _library() -> ctypes.CDLL:
    """peak.c, compiled for the best instruction set of this machine."""
    root = Path(__file__).resolve().parent.parent
    variant = next(b["variant"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu")
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory() as directory:  # a loaded library needs its file no longer
        path = Path(directory) / "peak.so"
        flags = [
            "-std=c11",
            "-O3",
            "-ffp-contract=off",
            "-Werror=implicit-function-declaration",
            "-shared",
            "-fPIC",
            f"-DPEAK_{variant}",
        ]
        include = [f"-I{root / 'csrc'}", f"-I{root / 'kernels' / 'cpu'}"]
        source = str(Path(__file__).with_name("peak.c"))
        try:
            subprocess.run(
                [*compiler, *flags, *include, source, "-o", str(path)], check=True, capture_output=True, text=True
            )
        except OSError as error:
            raise SystemExit(f"{compiler[0]} cannot be run ({error}): set CC to a C compiler") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{compiler[0]} cannot compile benchmarks/peak.c: {error.stderr.strip()}") from None
        library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    signatures: Mapping[str, list[Any]] = {
        "peak_f32": [count, ctypes.c_float, ctypes.c_float],
        "peak_bf16": [count, ctypes.c_float, ctypes.c_float],
        "peak_exp": [count, pointer],
        "peak_read": [count, pointer, count],
        "peak_copy": [count, pointer, count, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_float
    return library
