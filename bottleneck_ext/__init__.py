"""The compiled core of bottlenecked, re-exported: see ``_core.pyi`` for every signature."""

import sys

# The compiled module is of the stable ABI, which a free-threaded CPython does not have: 3.13t and 3.14t would try to
# load it all the same, and may crash.
if "t" in sys.abiflags:
    raise ImportError(
        f"bottlenecked does not run on a free-threaded CPython ({sys.version.split()[0]}t): use the build with the GIL"
    )

from ._core import (
    BottleneckError,
    DeviceError,
    InvalidArgumentError,
    KVCache,
    Linear,
    Processor,
    QueryCache,
    RebuildNeededError,
    UnsupportedError,
    Workspace,
    __version__,
    attention_mass,
    backends,
    build_info,
    default_backend,
    select_top_k,
)

__all__ = [
    "BottleneckError",
    "DeviceError",
    "InvalidArgumentError",
    "KVCache",
    "Linear",
    "Processor",
    "QueryCache",
    "RebuildNeededError",
    "UnsupportedError",
    "Workspace",
    "__version__",
    "attention_mass",
    "backends",
    "build_info",
    "default_backend",
    "select_top_k",
]
