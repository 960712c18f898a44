"""The compiled core of bottlenecked, re-exported: see ``_core.pyi`` for every signature."""

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
