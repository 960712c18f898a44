"""Language models that think in their KV cache (arXiv 2505.16950).

Importing this package loads nothing else; the names below are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bottleneck_ext import (
        BottleneckError,
        DeviceError,
        InvalidArgumentError,
        RebuildNeededError,
        UnsupportedError,
        __version__,
    )

    from .boundary import BoundaryDetector, BoundaryEvent
    from .config import BoundaryConfig, CacheProcessorConfig
    from .module import CacheProcessorModule
    from .processor import BoundCache, CacheProcessor, RewriteReport

_HOME = {
    "BottleneckError": "bottleneck_ext",
    "DeviceError": "bottleneck_ext",
    "InvalidArgumentError": "bottleneck_ext",
    "RebuildNeededError": "bottleneck_ext",
    "UnsupportedError": "bottleneck_ext",
    "__version__": "bottleneck_ext",
    "BoundaryDetector": "bottlenecked.boundary",
    "BoundaryEvent": "bottlenecked.boundary",
    "BoundaryConfig": "bottlenecked.config",
    "CacheProcessorConfig": "bottlenecked.config",
    "CacheProcessorModule": "bottlenecked.module",
    "BoundCache": "bottlenecked.processor",
    "CacheProcessor": "bottlenecked.processor",
    "RewriteReport": "bottlenecked.processor",
}

__all__ = [
    "BottleneckError",
    "BoundCache",
    "BoundaryConfig",
    "BoundaryDetector",
    "BoundaryEvent",
    "CacheProcessor",
    "CacheProcessorConfig",
    "CacheProcessorModule",
    "DeviceError",
    "InvalidArgumentError",
    "RebuildNeededError",
    "RewriteReport",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
