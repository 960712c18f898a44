"""The compiled module. Tensors are anything with ``__dlpack__`` (NumPy, torch, CuPy, JAX); none is copied.

Positions count cache positions of a sequence from 0. A step is ``(sequence, sequence_begin, step_begin, step_end)``, or
those and how many positions it is to recall where these are fewer than the Processor's top_k.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, final, type_check_only

__version__: str

@type_check_only
class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

@type_check_only
class BackendInfo(TypedDict):
    name: str
    backend: str
    variant: str
    device: str
    available: bool

@type_check_only
class CudaInfo(TypedDict):
    compiled: bool
    architectures: list[str]
    available: bool
    device: str | None
    driver: str | None
    cublaslt: str | None

@type_check_only
class BuildInfo(TypedDict):
    version: str
    abi_version: int
    compiler: str
    cuda: CudaInfo

class BottleneckError(Exception):
    """Base of the package's own errors."""

class InvalidArgumentError(BottleneckError, ValueError):
    """The caller's mistake; nothing was written."""

class UnsupportedError(BottleneckError, NotImplementedError):
    """Valid, but not implemented here; nothing was written."""

class DeviceError(BottleneckError, RuntimeError):
    """The device failed; nothing was written."""

class RebuildNeededError(BottleneckError, RuntimeError):
    """The write began and failed: discard these sequences."""

@final
class KVCache:
    """Per layer one key and one value tensor ``[num_blocks, block_size, num_kv_heads, head_dim]``, any strides.

    heads_first: they are ``[num_blocks, num_kv_heads, block_size, head_dim]``.
    """
    def __new__(
        cls, keys: Iterable[SupportsDLPack], values: Iterable[SupportsDLPack], *, heads_first: bool = False
    ) -> KVCache: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...

@final
class QueryCache:
    """Per layer a tensor ``[num_pages, page_size, num_query_heads, head_dim]`` of captured post-RoPE queries."""
    def __new__(cls, queries: Iterable[SupportsDLPack], query_table: SupportsDLPack | None = None) -> QueryCache: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_query_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def capture(
        self,
        layer: int,
        query: SupportsDLPack,
        slots: SupportsDLPack,
        block_to_page: SupportsDLPack,
        *,
        workspace: Workspace,
        stream: int | None = None,
    ) -> None:
        """Copies queries [num_tokens, num_query_heads, head_dim] of tokens just computed to their blocks' pages."""

@final
class Workspace:
    """Staging memory and threads of one caller."""
    def __new__(cls, num_threads: int = 1, backend: str = "cpu", *, reserve: int = 0) -> Workspace: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def skipped_steps(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def synchronize(self) -> None:
        """Waits for everything called with this workspace; tells what a device refused meanwhile."""

@final
class Processor:
    """Immutable packed weights; may be shared between threads."""
    def __new__(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, SupportsDLPack],
        *,
        weight_dtype: str = "float32",
        backend: str = "cpu",
    ) -> Processor: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def workspace_bytes(
        self, num_threads: int, num_sequences: int, max_tokens: int, *, cache_dtype: str = "float32"
    ) -> int:
        """What a workspace grows to by boundaries of so many sequences of up to max_tokens positions."""
    def rewrite(
        self,
        kv_cache: KVCache,
        query_cache: QueryCache,
        steps: Sequence[tuple[int, ...]],
        block_table: SupportsDLPack | None = None,
        *,
        workspace: Workspace,
        softmax_scale: float = 0.0,
        max_relative_edit: float = 0.0,
        recalled: SupportsDLPack | None = None,
        delta_norm: SupportsDLPack | None = None,
        row_norm: SupportsDLPack | None = None,
        skipped: SupportsDLPack | None = None,
        stream: int | None = None,
        wait: bool = True,
    ) -> dict[str, float] | None:
        """Rewrites the steps that just ended, in place; seconds per stage, summed over threads; None without wait."""

@final
class Linear:
    """The product the Processor is made of, alone: packed weights ``[num_layers, out_dim, in_dim]`` and biases."""
    def __new__(
        cls,
        weight: SupportsDLPack,
        bias: SupportsDLPack | None = None,
        *,
        weight_dtype: str = "float32",
        backend: str = "cpu",
    ) -> Linear: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def backend(self) -> str: ...
    def apply(self, x: SupportsDLPack, out: SupportsDLPack, *, accumulate: bool = False, workspace: Workspace) -> None:
        """out [num_layers, rows, out_dim] = x W^T + bias (+ out), from x [num_layers, rows, in_dim]."""

def attention_mass(
    kv_cache: KVCache,
    query_cache: QueryCache,
    steps: Sequence[tuple[int, ...]],
    block_table: SupportsDLPack | None = None,
    *,
    out: SupportsDLPack,
    workspace: Workspace,
    recent_window: int = 256,
    softmax_scale: float = 0.0,
    stream: int | None = None,
) -> None:
    """Exact attention mass of every prior position into out, float32 [num_layers, num_steps, max_prior]."""

def select_top_k(mass: SupportsDLPack, lengths: SupportsDLPack, out: SupportsDLPack, *, backend: str = "cpu") -> None:
    """The largest entries of each row of mass [rows, n] into out, int64 [rows, top_k], ascending, then -1."""

def backends() -> list[BackendInfo]:
    """The backends compiled in, best first."""

def default_backend() -> str:
    """What "cpu" stands for here."""

def build_info() -> BuildInfo:
    """How the extension was built."""
