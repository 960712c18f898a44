"""What a benchmark ran on, so that its figures can be read later."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import bottleneck_ext

PACKAGES = ("numpy", "torch", "transformers")


def describe() -> dict[str, Any]:
    """The processor, its cores, the first GPU that PyTorch sees, our backend and its instruction set, versions, commit
    and date.

    `load_average` (one minute) tells whether the machine was busy; `commit` ends in "+changes" where the
    checkout differs from it and is None outside a git checkout.
    """
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": gpu_model(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "backend": bottleneck_ext.default_backend(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"bottlenecked": bottleneck_ext.__version__, **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_model() -> str | None:
    """The name of the first GPU that PyTorch sees, or None."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()  # such as 32768K
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """BOTTLENECKED_COMMIT where it is set, for copies without git; else the checkout's, or None where there is none."""
    if named := os.environ.get("BOTTLENECKED_COMMIT"):
        return named
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+changes" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
