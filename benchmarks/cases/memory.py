"""Memory that boundaries add to a serving process, against what its model and KV cache hold anyway.

Counted: the ring of captured queries, the workspace (its `nbytes` after a boundary), the packed Processor. Measured: in
a fresh process that already holds caches, rings and Processor, how much its resident memory peaks above that during two
boundaries (the workspace, and what the allocator and threads take). The Processor belongs to the model side; "added" is
rings and measured peak over model and cache.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import checks, floors, processes
from benchmarks.harness import Context, Figure
from benchmarks.inputs import Inputs, Setting


def run(context: Context) -> Iterator[Figure]:
    shapes = ("smollm2", "llama-3.2-1b")
    for setting in context.settings(shapes=shapes, processor_dims=(128, 512), dtypes=("bfloat16",), batches=(8,)):
        yield measure(setting)


def measure(setting: Setting) -> Figure:
    done = processes.child("benchmarks.cases.memory", asdict(setting), stderr=subprocess.PIPE)
    if done.returncode:
        checks.refuse(setting, f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    made: Figure = {"case": "memory", **setting.describe(), **json.loads(done.stdout)}
    added = made["query_bytes"] + made["rss_bytes"]
    parameters = setting.backbone.parameters
    if parameters is not None:
        made["model_bytes"] = parameters * floors.SIZES[setting.dtype]
    return made | {"added_fraction": added / (made.get("model_bytes", 0) + made["cache_bytes"])}


def child(setting: Setting) -> dict[str, Any]:
    """In a process of its own: the bytes of everything, and the peak that boundaries add."""
    inputs = Inputs(setting)
    # Pristine copies are the benchmark's; without them two boundaries follow one another.
    inputs.pristine_keys, inputs.pristine_values = [], []
    release_freed()
    before = reset_peak_memory()
    for _ in range(2):
        inputs.rewrite()
    peak = peak_memory()

    def nbytes(tensors: list[Any]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    return {
        "cache_bytes": nbytes(inputs.keys) + nbytes(inputs.values),
        "query_bytes": nbytes(inputs.queries),
        "processor_bytes": inputs.processor.nbytes,
        "workspace_bytes": inputs.workspace.nbytes,
        "rss_bytes": peak - before,
    }


def release_freed() -> None:
    """Gives freed memory back to the system, where the C library can: boundaries would settle in it unnoticed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak_memory() -> int:
    """Resident bytes now, from which on the kernel counts the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak_memory() -> int:
    """The most resident bytes since then."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise SystemExit(f"/proc/self/status has no {key}: resident memory cannot be measured here")


if __name__ == "__main__":
    print(json.dumps(child(Setting(**json.loads(sys.argv[1])))))
