"""One rank of tests/test_vllm_ranks.py's two: the worker's half of the vLLM integration under tensor parallelism.

RANK=0 WORLD_SIZE=2 python -m tests.vllm_ranks PROCESSOR OUTPUT

Goes through CASES; in each, something fails on rank 1 while both rewrite two steps of two requests. Writes the caches
and the counts after each case to OUTPUT.RANK.pt. World size 1: the same caches with all heads, nothing fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import bottleneck_ext
from bottlenecked import CacheProcessorConfig
from bottlenecked.integrations.vllm.options import ServerOptions
from bottlenecked.integrations.vllm.scheduler import Rewrite

from .test_vllm_worker import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, Impl, WorkerHalf, vllm_stubs

BLOCKS, BLOCK_SIZE, ROWS, LONGEST = 12, 8, 2, 64
REWRITES = [Rewrite(0, 20, 30, None, (3, 1, 7, 5)), Rewrite(1, 9, 18, 3, (0, 10, 4))]

# What fails on rank 1: the callable's owner and name, the error, how many of its calls fail.
CASES: dict[str, tuple[str, type[BaseException], int]] = {
    "nothing": ("", MemoryError, 0),
    "the mass, once": ("attention_mass", MemoryError, 1),
    "the mass, always": ("attention_mass", bottleneck_ext.InvalidArgumentError, 100),
    "top-k, once": ("select_top_k", MemoryError, 1),
    "the rows, always": ("zeros", torch.OutOfMemoryError, 100),
    "the Processor, once": ("rewrite", bottleneck_ext.RebuildNeededError, 1),
    "the Processor, always": ("rewrite", bottleneck_ext.DeviceError, 100),
    "the write, always": ("write", MemoryError, 100),
    "a mistake": ("attention_mass", TypeError, 1),
}


class Unwritable:
    """A layer's keys that cannot be written."""

    def __init__(self, tensor: torch.Tensor, error: BaseException) -> None:
        self.tensor, self.error = tensor, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, at: Any) -> torch.Tensor:
        return self.tensor[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        raise self.error


@contextmanager
def failing(worker: Any, where: str, error: type[BaseException], count: int) -> Iterator[None]:
    def fail_first(function: Any) -> Any:
        left = [count]

        def function_or_error(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise error("this rank fails")
            return function(*args, **kwargs)

        return function_or_error

    with ExitStack() as stack:
        if where in ("attention_mass", "select_top_k"):
            stack.enter_context(mock.patch.object(bottleneck_ext, where, fail_first(getattr(bottleneck_ext, where))))
        elif where == "zeros":
            stack.enter_context(mock.patch.object(torch, where, fail_first(torch.zeros)))
        elif where == "rewrite":
            from bottlenecked.processor import BoundCache

            stack.enter_context(mock.patch.object(BoundCache, where, fail_first(BoundCache.rewrite)))
        elif where == "write":
            keys = [*worker.keys[:-1], Unwritable(worker.keys[-1], error("this rank fails"))]
            stack.enter_context(mock.patch.object(worker.rewriter, "keys", keys))
        yield


def all_gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """As of vLLM's groups: along `dim`, in the order of the ranks."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def make_worker(processor: str, rank: int, world_size: int) -> Any:
    """Caches and query pages with the heads of `rank`, filled alike whatever the number of ranks."""
    heads, query_heads = KV_HEADS // world_size, QUERY_HEADS // world_size
    layers = {
        f"layers.{i}.attn": SimpleNamespace(impl=Impl(), attn_type="decoder", sliding_window=None, isa="vec")
        for i in range(LAYERS)
    }
    for layer in layers.values():
        layer.impl.num_heads = query_heads
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        cache_config=SimpleNamespace(block_size=BLOCK_SIZE),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        model_config=SimpleNamespace(max_model_len=LONGEST),
    )
    # cpu_group None is torch's default group.
    group = SimpleNamespace(world_size=world_size, rank_in_group=rank, all_gather=all_gather, cpu_group=None)
    config = CacheProcessorConfig.load(processor)
    options = ServerOptions(processor=processor, weight_dtype="float32")
    worker = WorkerHalf(vllm_config, options, config, group, reports=True)
    with vllm_stubs():
        worker.register({name: torch.zeros(BLOCKS, heads, BLOCK_SIZE, 2 * HEAD_DIM) for name in layers})
    generator = torch.Generator().manual_seed(7)
    for views, count in ((worker.keys, KV_HEADS), (worker.values, KV_HEADS)):
        for view in views:
            whole = torch.randn(BLOCKS, BLOCK_SIZE, count, HEAD_DIM, generator=generator)
            view[...] = whole[:, :, rank * heads : (rank + 1) * heads]
    whole = torch.randn(*worker.queries.shape[:3], QUERY_HEADS, HEAD_DIM, generator=generator)
    worker.queries[...] = whole[..., rank * query_heads : (rank + 1) * query_heads, :]
    return worker


def main(processor: str, output: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        meeting = Path(f"{output}.meeting").absolute().as_uri()  # no port, which another process may take meanwhile
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    found = {}
    for name, (where, error, count) in CASES.items():
        if world_size == 1 and where:
            continue
        print("case:", name, flush=True)
        worker = make_worker(processor, rank, world_size)
        raised = ""
        with failing(worker, where if rank == 1 else "", error, count):
            try:
                worker._rewrite(REWRITES)
            except Exception as problem:
                raised = type(problem).__name__
        found[name] = {
            "keys": torch.stack([view.clone() for view in worker.keys]),
            "values": torch.stack([view.clone() for view in worker.values]),
            "raised": raised,
            "boundaries": worker.stats.data["boundaries"],
            "skipped": dict(worker.stats.data["skipped"]),
            "failed_blocks": sorted(worker.failed_blocks),
        }
    torch.save(found, f"{output}.{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
