"""CacheProcessor: a trained Processor bound to a stack's caches. A facade over ``bottleneck_ext``.

processor = CacheProcessor.from_pretrained("my-processor")
workspace = processor.workspace(num_threads=8)
cache = processor.bind(keys, values, queries, workspace=workspace)
report = cache.rewrite([BoundaryEvent(sequence=0, step_begin=40, step_end=63)])
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

import bottleneck_ext

from .boundary import BoundaryEvent
from .checkpoint import load_weights, save_checkpoint
from .config import CacheProcessorConfig

if TYPE_CHECKING:
    from bottleneck_ext._core import SupportsDLPack

WeightDtype = Literal["auto", "float32", "bfloat16"]
CacheDtype = Literal["float32", "float16", "bfloat16"]

_LARGEST_LIMIT = float(np.finfo(np.float32).max)
# What integrations count a step under that max_relative_edit kept from being written.
EDIT_TOO_LARGE = "relative edit above the limit"

# Instruction sets that multiply bfloat16 themselves; elsewhere it costs more than float32.
_BFLOAT16_VARIANTS = ("avx512_bf16",)


def native_weight_dtype(backend: str = "cpu") -> Literal["float32", "bfloat16"]:
    """What weight_dtype "auto" stands for: "bfloat16" where the backend multiplies bfloat16 itself, else "float32".

    backend: "cpu", "cuda", "cuda:1" or one of ``bottleneck_ext.backends()``.
    """
    name = bottleneck_ext.default_backend() if backend == "cpu" else backend
    if name.partition(":")[0] == "cuda":
        return "bfloat16"
    return "bfloat16" if name.partition(":")[2] in _BFLOAT16_VARIANTS else "float32"


@dataclass(frozen=True)
class RewriteReport:
    """What one rewrite did. Positions are cache positions.

    ``window_begin[i]``: first position of event i's rewritten window ``[window_begin, step_end)``.
    ``recalled[i]``: int64 ``[num_layers, k_eff]``, ascending, ``k_eff = min(top_k, prior positions)``, top_k the
    event's own or else the Processor's.
    ``delta_norm``, ``row_norm``: float32 ``[num_layers, num_events]``, Euclidean norms of the gated edit and of the
    selected rows before it.
    ``skipped[i]``: the edit of event i was larger than the cache's max_relative_edit allows, and was not written.
    ``stage_seconds``: seconds of mass, top_k, gather, processor and write, summed over threads; of the device, where
    that is not the CPU.
    """

    events: tuple[BoundaryEvent, ...]
    window_begin: tuple[int, ...]
    recalled: tuple[NDArray[np.int64], ...]
    delta_norm: NDArray[np.float32]
    row_norm: NDArray[np.float32]
    skipped: tuple[bool, ...]
    stage_seconds: dict[str, float]


class CacheProcessor:
    """Immutable: one may serve many caches and threads at once."""

    def __init__(
        self,
        config: CacheProcessorConfig,
        weights: Mapping[str, SupportsDLPack],
        *,
        weight_dtype: WeightDtype = "auto",
        backend: str = "cpu",
    ) -> None:
        """Checks and packs the weights.

        config: shape of backbone and Processor.
        weights: checkpoint names to float32, float16 or bfloat16 tensors on the CPU (NumPy, torch, ...).
        weight_dtype: "bfloat16" rounds both operands of every product with a weight to bfloat16 (float32 sums): half
            the memory, and faster where the machine multiplies bfloat16. "auto" is "bfloat16" there, as on CUDA
            devices, and "float32" elsewhere, so say which where machines must agree; the attribute `weight_dtype` says
            what it became.
        backend: "cpu" (the best instruction set of this machine), "cuda" (its first device), "cuda:1", or one of
            ``bottleneck_ext.backends()``.

        Raises InvalidArgumentError (a ValueError) naming the tensor that is missing, misshapen or not finite, and
        UnsupportedError for a backend this machine does not have.
        """
        self.config = config
        self.weights = dict(weights)
        self.weight_dtype = native_weight_dtype(backend) if weight_dtype == "auto" else weight_dtype
        shape: dict[str, Any] = {
            name: getattr(config, name)
            for name in (
                "num_layers",
                "num_kv_heads",
                "num_query_heads",
                "head_dim",
                "processor_dim",
                "processor_heads",
                "processor_mlp_dim",
                "top_k",
                "recent_window",
                "norm_eps",
            )
        }
        shape["rope_inv_freq"] = config.inv_freq() if config.key_space == "unrotated" else None
        self.native = bottleneck_ext.Processor(shape, self.weights, weight_dtype=self.weight_dtype, backend=backend)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, weight_dtype: WeightDtype = "auto", backend: str = "cpu"
    ) -> CacheProcessor:
        """Loads ``config.json`` and ``model.safetensors``; raises ValueError naming file and tensor or key."""
        config = CacheProcessorConfig.load(directory)
        return cls(config, load_weights(directory, config), weight_dtype=weight_dtype, backend=backend)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the checkpoint as float32, atomically: a crash leaves the old one or the new one."""
        weights = {name: np.from_dlpack(_without_bfloat16(w)) for name, w in self.weights.items()}
        save_checkpoint(directory, self.config, weights)

    @property
    def backend(self) -> str:
        """For instance "cpu:avx512_bf16" or "cuda:0"."""
        return self.native.backend

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return self.native.nbytes

    def workspace(
        self,
        num_threads: int = 1,
        *,
        max_sequences: int | None = None,
        max_tokens: int | None = None,
        cache_dtype: CacheDtype = "float32",
    ) -> bottleneck_ext.Workspace:
        """Scratch memory and threads for one caller at a time; keep it with the sequences it serves.

        num_threads: of the CPU; with a CUDA backend the caller's alone is used.

        It grows with the largest boundary, or is allocated at once, for boundaries of up to max_sequences (None: 1)
        sequences of up to max_tokens cache positions each in a cache of cache_dtype: then `nbytes` says before the
        first boundary what it takes, and never changes within these limits. max_tokens None: it grows.

        Raises InvalidArgumentError for a limit out of range, and MemoryError.
        """
        reserve = 0
        if max_tokens is not None:
            sequences = 1 if max_sequences is None else max_sequences
            reserve = self.native.workspace_bytes(num_threads, sequences, max_tokens, cache_dtype=cache_dtype)
        elif max_sequences is not None:
            raise bottleneck_ext.InvalidArgumentError(
                f"max_sequences is {max_sequences} without max_tokens: give both to allocate the workspace at once"
            )
        return bottleneck_ext.Workspace(num_threads, self.native.backend, reserve=reserve)

    def bind(
        self,
        keys: Iterable[SupportsDLPack],
        values: Iterable[SupportsDLPack],
        queries: Iterable[SupportsDLPack],
        *,
        workspace: bottleneck_ext.Workspace,
        query_table: SupportsDLPack | None = None,
        softmax_scale: float | None = None,
        heads_first: bool = False,
        max_relative_edit: float | None = None,
    ) -> BoundCache:
        """The caches one caller rewrites, borrowed through DLPack without a copy.

        keys, values: per layer ``[num_blocks, block_size, num_kv_heads, head_dim]``, any strides, writable.
        queries: per layer ``[num_pages, page_size, num_query_heads, head_dim]``, after RoPE, the caches' dtype; the
            query of position p of sequence s is in page ``query_table[s, (p // page_size) % pages_per_sequence]``,
            row ``p % page_size``.
        query_table: int32 ``[num_sequences, pages_per_sequence]``; None: page s is sequence s's only one.
        softmax_scale: of the backbone's attention, 1e-30 or more; None: ``head_dim ** -0.5``.
        heads_first: keys and values are ``[num_blocks, num_kv_heads, block_size, head_dim]``; the same as passing
            transposed views, without making them.
        max_relative_edit: an event is skipped, its cache left as it is, where in any layer the norm of its gated edit
            exceeds this many times the norm of its rows, or is not finite. None: no limit; an edit that is not finite
            then refuses the whole call.

        Raises InvalidArgumentError for a max_relative_edit that is not a positive finite number.
        """
        check_max_relative_edit(max_relative_edit)
        return BoundCache(
            self,
            bottleneck_ext.KVCache(keys, values, heads_first=heads_first),
            bottleneck_ext.QueryCache(queries, query_table),
            workspace,
            0.0 if softmax_scale is None else softmax_scale,
            0.0 if max_relative_edit is None else max_relative_edit,
        )


def _without_bfloat16(weight: Any) -> SupportsDLPack:
    """NumPy has no such type; float32 holds all its values."""
    if not str(getattr(weight, "dtype", "")).endswith("bfloat16"):
        return weight  # type: ignore[no-any-return]
    return weight.float() if hasattr(weight, "float") else weight.astype("float32")  # type: ignore[no-any-return]


def check_max_relative_edit(value: object) -> None:
    """Raises InvalidArgumentError unless it is None or a positive finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value <= _LARGEST_LIMIT):  # type: ignore[operator]
        raise bottleneck_ext.InvalidArgumentError(
            f"max_relative_edit is {value!r}, but it must be None or a positive finite number"
        )


class BoundCache:
    """A Processor, one stack's caches, and the workspace to rewrite them with: see CacheProcessor.bind."""

    def __init__(
        self,
        processor: CacheProcessor,
        kv_cache: bottleneck_ext.KVCache,
        query_cache: bottleneck_ext.QueryCache,
        workspace: bottleneck_ext.Workspace,
        softmax_scale: float,
        max_relative_edit: float = 0.0,
    ) -> None:
        self.processor = processor
        self.kv_cache = kv_cache
        self.query_cache = query_cache
        self.workspace = workspace
        self.softmax_scale = softmax_scale
        self.max_relative_edit = max_relative_edit

    @overload
    def rewrite(
        self,
        events: Sequence[BoundaryEvent],
        block_table: SupportsDLPack | None = None,
        *,
        stream: int | None = None,
        report: Literal[True] = True,
    ) -> RewriteReport: ...
    @overload
    def rewrite(
        self,
        events: Sequence[BoundaryEvent],
        block_table: SupportsDLPack | None = None,
        *,
        stream: int | None = None,
        report: bool,
    ) -> RewriteReport | None: ...
    def rewrite(
        self,
        events: Sequence[BoundaryEvent],
        block_table: SupportsDLPack | None = None,
        *,
        stream: int | None = None,
        report: bool = True,
    ) -> RewriteReport | None:
        """Rewrites, in place, the window and the recalled positions of every event (arXiv 2505.16950, section 3.2).

        events: the steps that ended with this engine step, each sequence at most once.
        block_table: int32 ``[num_sequences, max_blocks]`` on the CPU; None: block s is sequence s's only one.
        stream: a cudaStream_t as a number; None: that on which the caches' library works now.
        report: False returns None, and with a CUDA backend returns before the device is done: work that follows on the
            same stream sees the rewritten cache. What the device refuses meanwhile, for instance an edit that is not
            finite, is raised by ``workspace.synchronize()`` or, once it is done, by a later call with this workspace,
            which then does nothing else; what it skips is counted in ``workspace.skipped_steps``. Only such a call can
            be captured in a CUDA graph, after the same one was made before.

        InvalidArgumentError, UnsupportedError, DeviceError and MemoryError leave the caches untouched;
        RebuildNeededError means the write began and failed: discard these sequences.
        """
        steps = [
            (e.sequence, e.sequence_begin, e.step_begin, e.step_end, *(() if e.top_k is None else (e.top_k,)))
            for e in events
        ]
        rewrite = functools.partial(
            self.processor.native.rewrite,
            self.kv_cache,
            self.query_cache,
            steps,
            block_table,
            workspace=self.workspace,
            softmax_scale=self.softmax_scale,
            max_relative_edit=self.max_relative_edit,
            stream=stream,
        )
        if not report:
            rewrite(wait=False)
            return None
        config = self.processor.config
        recalled = np.empty((config.num_layers, len(events), config.top_k), np.int64)
        delta_norm = np.empty((config.num_layers, len(events)), np.float32)
        row_norm = np.empty_like(delta_norm)
        skipped = np.zeros(len(events), np.int32)
        begins = [e.window_begin(config.recent_window) for e in events]
        top_k = [config.top_k if e.top_k is None else e.top_k for e in events]
        # Whatever is made now need not be made once the caches are written.
        counts = [max(0, min(k, b - e.sequence_begin)) for e, b, k in zip(events, begins, top_k, strict=True)]
        made = functools.partial(
            RewriteReport,
            events=tuple(events),
            window_begin=tuple(begins),
            recalled=tuple(recalled[:, i, :count] for i, count in enumerate(counts)),
            delta_norm=delta_norm,
            row_norm=row_norm,
        )
        too_late = bottleneck_ext.RebuildNeededError(
            "out of memory after the caches were rewritten: discard these sequences"
        )
        stage_seconds = rewrite(recalled=recalled, delta_norm=delta_norm, row_norm=row_norm, skipped=skipped)
        assert stage_seconds is not None, "it was waited for"
        try:
            return made(skipped=tuple(map(bool, skipped.tolist())), stage_seconds=stage_seconds)
        except MemoryError:
            raise too_late from None
