"""Rates of the card, measured in the run that uses them, and how long counted work takes at them at least.

The parts of a boundary follow one another, and the units of a GPU work side by side within each:

    mass        max(exponentials / exp rate, operations / matrix rate, bytes / bandwidth)
    processor   max(weights, read once, / bandwidth, operations / matrix rate)
    rows        keys and values of the selected positions read and written / bandwidth

`floor_s` is their sum. kernels.md adds the Processor's weights and its operations instead of taking the larger;
`floor_added_s` is that. Both are floors of the same boundary, the second a more lenient one.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors
from benchmarks.gpu.timing import Timer
from benchmarks.harness import Figure, say
from benchmarks.inputs import Setting
from bottlenecked.config import CacheProcessorConfig

COPIED = 1 << 30  # elements of 2 bytes
MATRIX = 8192
EXP_BLOCKS = 132 * 64


@dataclass(frozen=True)
class Rates:
    """Per second. bandwidth: bytes read plus bytes written by a copy between two places of the device's memory, or
    bytes read alone where that is more. exps: None where the loop could not be compiled."""

    copy_bandwidth: float
    read_bandwidth: float
    bfloat16_flops: float
    float32_flops: float
    exps: float | None

    @property
    def bandwidth(self) -> float:
        return max(self.copy_bandwidth, self.read_bandwidth)


def measure(timer: Timer) -> Rates:
    """Takes a few seconds and 4 GiB; on a CPU the sizes are tiny and the numbers mean nothing."""
    small = not timer.on_gpu
    count, side = (1 << 20, 256) if small else (COPIED, MATRIX)
    device = timer.device

    def median(call: Callable[[], object]) -> float:
        timer.seconds(call, 3, flush=False)
        return statistics.median(timer.seconds(call, 10, flush=False))

    def copy_and_read() -> tuple[float, float]:
        source = torch.ones(count, dtype=torch.bfloat16, device=device)
        target, wide = torch.empty_like(source), source.view(torch.float32)
        return median(lambda: target.copy_(source)), median(wide.sum)

    def flops(dtype: torch.dtype, side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / median(lambda: torch.mm(a, b, out=out))

    copied, read = copy_and_read()
    rates = Rates(
        copy_bandwidth=4 * count / copied,
        read_bandwidth=2 * count / read,
        bfloat16_flops=flops(torch.bfloat16, side),
        float32_flops=flops(torch.float32, side // 2),
        exps=_exps(timer, median) if timer.on_gpu else 1e9,
    )
    if timer.on_gpu:
        torch.cuda.empty_cache()
    return rates


def _exps(timer: Timer, median: Callable[[Callable[[], object]], float]) -> float | None:
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        say("  no nvcc: the rate of exponentials is not measured")
        return None
    major, minor = torch.cuda.get_device_capability(timer.device)
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "exp_peak.so"
        source = Path(__file__).with_name("exp_peak.cu")
        command = [compiler, "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", str(source)]
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            say(f"  the rate of exponentials is not measured: {done.stderr.strip()[:300]}")
            return None
        loop = ctypes.CDLL(str(library)).exp_peak
    loop.argtypes, loop.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p], ctypes.c_longlong
    out = torch.empty(EXP_BLOCKS * 256, device=timer.device)
    counted = 0

    def call() -> None:
        nonlocal counted
        counted = loop(out.data_ptr(), EXP_BLOCKS, torch.cuda.current_stream().cuda_stream)
        if counted < 0:
            raise SystemExit(f"exp_peak.cu failed with the CUDA error {-counted}")

    seconds = median(call)
    return counted / seconds


def mass_parts(rates: Rates, config: CacheProcessorConfig, setting: Setting) -> dict[str, float]:
    """Seconds that each unit needs for an attention mass of these sizes."""
    work = floors.attention_mass(config, setting.dtype, setting.batch, setting.prior, setting.step)
    return {
        "exps": 0.0 if rates.exps is None else work.exps / rates.exps,
        "flops": work.bfloat16_flops / rates.bfloat16_flops + work.float32_flops / rates.float32_flops,
        "bytes": work.bytes / rates.bandwidth,
    }


def mass_floor(rates: Rates, config: CacheProcessorConfig, setting: Setting) -> Figure:
    """The keys of a figure: floor_s, and under "floor" its parts and what bounds it."""
    parts = mass_parts(rates, config, setting)
    return {"floor_s": max(parts.values()), "floor": {**parts, "bound_by": max(parts, key=parts.__getitem__)}}


def boundary_floor(rates: Rates, config: CacheProcessorConfig, setting: Setting) -> Figure:
    """As mass_floor, and floor_added_s, see above."""
    mass = max(mass_parts(rates, config, setting).values())
    work = floors.processor(config, setting.weight_dtype, setting.batch, setting.rows)
    weights = work.bytes / rates.bandwidth
    products = work.bfloat16_flops / rates.bfloat16_flops + work.float32_flops / rates.float32_flops
    elements = 2 * config.num_layers * setting.batch * setting.rows * config.num_kv_heads * config.head_dim
    rows = 2 * elements * floors.SIZES[setting.dtype] / rates.bandwidth
    parts = {"mass": mass, "weights": weights, "products": products, "rows": rows}
    largest: Any = max(parts, key=parts.__getitem__)
    return {
        "floor_s": mass + max(weights, products) + rows,
        "floor_added_s": mass + weights + products + rows,
        "floor": {**parts, "bound_by": largest},
    }


def with_floor(made: Figure, floor: Figure) -> Figure:
    """The figure with its floor; floor_fraction is floor over median."""
    made = made | floor | {"floor_fraction": floor["floor_s"] / made["median_s"]}
    if "floor_added_s" in floor:
        made["floor_added_fraction"] = floor["floor_added_s"] / made["median_s"]
    return made
