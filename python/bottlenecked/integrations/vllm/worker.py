"""The half in each worker: owns the query pages, saves and restores preempted requests, rewrites.

With tensor parallelism a worker has some of the KV heads. The attention mass is then summed over ranks before the
positions are chosen, and the chosen rows are gathered from all ranks, so that every rank runs the whole Processor on
whole KV-tokens and writes its own heads' part.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import bottleneck_ext
from bottleneck_ext import BottleneckError, DeviceError, InvalidArgumentError, RebuildNeededError

from ...boundary import BoundaryEvent
from ...checkpoint import load_weights
from ...config import CacheProcessorConfig
from ...processor import EDIT_TOO_LARGE, BoundCache, CacheProcessor
from .capture import QueryCapture, hook
from .checks import check_layers
from .layout import key_value_views
from .metrics import RewriteStats
from .options import ServerOptions
from .scheduler import Plan, Rewrite, Transfer, pages_per_row

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class WorkerHalf:
    """vllm_config: vLLM's. group: its tensor-parallel group. reports: whether this worker's counts are the engine's."""

    def __init__(
        self, vllm_config: Any, options: ServerOptions, config: CacheProcessorConfig, group: Any, *, reports: bool
    ) -> None:
        self.vllm_config = vllm_config
        self.options = options
        self.config = config
        self.group = group
        self.reports = reports
        self.stats = RewriteStats()
        self.number = 0  # of the latest plan
        self.failed_blocks: set[int] = set()
        self.lost_prompts: set[bytes] = set()
        self.saved: dict[str, tuple[list[Tensor], list[Tensor], Tensor]] = {}
        self.prompts: dict[bytes, Tensor] = {}  # [2 * num_layers, block_size, num_kv_heads, head_dim], of the host

    def register(self, caches: Mapping[str, Tensor]) -> None:
        """Takes over vLLM's caches: `register_kv_caches`. Allocates query pages, hooks every attention layer."""
        from vllm.model_executor.models.utils import extract_layer_index

        config, vllm_config = self.config, self.vllm_config
        layers = vllm_config.compilation_config.static_forward_context
        names = sorted(caches, key=extract_layer_index)
        check_layers({name: layers[name] for name in names}, {name: caches[name].dtype for name in names})
        block_size = vllm_config.cache_config.block_size
        views = [key_value_views(name, layers[name], caches[name], block_size) for name in names]
        self.keys, self.values = [key for key, _ in views], [value for _, value in views]
        first = self.keys[0]
        device, dtype = first.device, first.dtype
        backend = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"

        self.num_rows = vllm_config.scheduler_config.max_num_seqs
        self.pages_per_row = pages_per_row(config.recent_window, block_size)
        heads = layers[names[0]].impl.num_heads
        shape = (len(names), self.num_rows * self.pages_per_row, block_size, heads, config.head_dim)
        self._check_memory(shape, dtype, device)
        self.queries = torch.zeros(shape, dtype=dtype, device=device)
        self.block_to_page = torch.full((first.shape[0],), -1, dtype=torch.int32, device=device)
        table = np.arange(self.num_rows * self.pages_per_row, dtype=np.int32).reshape(self.num_rows, -1)
        max_blocks = -(-vllm_config.model_config.max_model_len // block_size) + 1
        self.block_table = np.zeros((self.num_rows, max_blocks), np.int32)

        indices = [extract_layer_index(name) for name in names]
        processor = processor_of_layers(config, self.options, backend, indices)
        workspace = processor.workspace(torch.get_num_threads() if device.type == "cpu" else 1)
        scale = float(layers[names[0]].impl.scale)
        if self.group.world_size == 1:
            self.rewriter: BoundCache | ShardedRewriter = processor.bind(
                self.keys, self.values, self.queries.unbind(), workspace=workspace, query_table=table,
                softmax_scale=scale, max_relative_edit=self.options.max_relative_edit,
            )  # fmt: skip
            query_cache = self.rewriter.query_cache
        else:
            query_cache = bottleneck_ext.QueryCache(self.queries.unbind(), table)
            self.rewriter = ShardedRewriter(
                processor, self.keys, self.values, query_cache, workspace, scale, self.group, block_size,
                self.options.max_relative_edit,
            )  # fmt: skip
        self.workspace, self.skipped_steps = workspace, 0  # of the workspace's, those that were counted
        for index, name in enumerate(names):
            hook(layers[name].impl, QueryCapture(query_cache, index, self.block_to_page, workspace))
        logger.info(
            "bottlenecked rewrites %d layers on %s: %.1f MB of weights (%s), %.1f MB of query pages for %d requests",
            len(names), processor.backend, processor.nbytes / 1e6, processor.weight_dtype,
            self.queries.nbytes / 1e6, self.num_rows,
        )  # fmt: skip

    def prepare(self, plan: Plan) -> None:
        """Before blocks change hands: `handle_preemptions`."""
        for request_id in plan.drop:
            self.saved.pop(request_id, None)
        for transfer in plan.save:
            self._save(transfer)
        # A block may be unmapped for one request and mapped for another.
        changes = dict.fromkeys(plan.unmap, -1) | dict(plan.map)
        if changes:
            blocks = torch.tensor(list(changes), device=self.block_to_page.device)
            pages = torch.tensor(list(changes.values()), dtype=torch.int32, device=self.block_to_page.device)
            self.block_to_page[blocks] = pages

    def run(self, plan: Plan) -> None:
        """Before the forward: `start_load_kv`."""
        self.number = plan.number
        for transfer in plan.restore:
            self._restore(transfer)
        if plan.fill:
            self._fill([key for key, _ in plan.fill], [block for _, block in plan.fill])
        if plan.keep:
            self._keep([key for key, _ in plan.keep], [block for _, block in plan.keep])
        for key in plan.forget:
            self.prompts.pop(key, None)
        if not plan.rewrite:
            return
        begin = time.perf_counter()
        self._rewrite(plan.rewrite)
        self.stats.data["seconds"].append(time.perf_counter() - begin)

    def take_stats(self) -> RewriteStats | None:
        """What was counted since the last call; None where there is nothing."""
        if self.stats.is_empty() or not self.reports:
            self.stats.reset()
            return None
        taken, self.stats = self.stats, RewriteStats()
        return taken

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose rewrite began and failed, or that were promised and are not there: vLLM ends their requests with
        an error, or computes them again."""
        taken, self.failed_blocks = self.failed_blocks, set()
        return taken

    def take_lost_prompts(self) -> set[bytes]:
        """Keys that a plan's `keep` named and this worker could not keep: the scheduler must not count on them."""
        taken, self.lost_prompts = self.lost_prompts, set()
        return taken

    def _rewrite(self, rewrites: Sequence[Rewrite], *, again: bool = False) -> None:
        """One call for all. Where it is refused, nothing was written: one after the other shows which it was.

        A GPU is not waited for, so that a call may be told of an earlier one's refusal; it is then made again, once all
        that was refused before it is known.
        """
        if again:
            self._wait_for_refusals()
        events = [self._event(rewrite) for rewrite in rewrites]
        on_cpu = self.block_to_page.device.type == "cpu"
        try:
            report = self.rewriter.rewrite(events, self.block_table, report=on_cpu)
        except RebuildNeededError as error:
            logger.error("a rewrite failed while it wrote, its requests cannot go on: %s", error)
            self.failed_blocks.update(block for rewrite in rewrites for block in rewrite.blocks)
            self._skip("failed", len(rewrites))
            return
        except (BottleneckError, MemoryError) as error:
            if len(rewrites) == 1 or not (on_cpu or again):
                self._refuse(error)
            if not on_cpu and not again:
                self._rewrite(rewrites, again=True)
            elif len(rewrites) > 1:
                for rewrite in rewrites:
                    self._rewrite([rewrite], again=again)
            return
        data = self.stats.data
        skipped: Sequence[bool] = [False] * len(events) if report is None else report.skipped
        self._count_skipped()
        data["boundaries"] += skipped.count(False)
        for event, left in zip(events, skipped, strict=True):
            if left:
                continue
            begin = event.window_begin(self.config.recent_window)
            top_k = self.config.top_k if event.top_k is None else event.top_k
            data["tokens"] += event.step_end - begin + min(top_k, begin)
        if report is not None:
            written = ~np.array(skipped)
            edits, rows = (np.square(norm[:, written]).sum(0) for norm in (report.delta_norm, report.row_norm))
            data["edits"] += np.sqrt(np.divide(edits, rows, out=np.zeros_like(edits), where=rows > 0)).tolist()

    def _wait_for_refusals(self) -> None:
        """Of earlier calls, which are told one at a time: the next one is told of none."""
        while True:
            try:
                self.workspace.synchronize()
            except InvalidArgumentError as refusal:
                self._refuse(refusal)
            except BottleneckError:  # the next call fails likewise, and says so
                return
            else:
                return

    def _refuse(self, error: Exception) -> None:
        logger.warning("a step was not rewritten: %s", error)
        self._skip("refused", 1)

    def _count_skipped(self) -> None:
        """Steps whose edit is known by now to have been too large. A GPU tells it late, and counts them twice."""
        found = self.workspace.skipped_steps
        if found > self.skipped_steps:
            self._skip(EDIT_TOO_LARGE, found - self.skipped_steps)
            self.skipped_steps = found

    def _skip(self, reason: str, count: int) -> None:
        skipped = self.stats.data["skipped"]
        skipped[reason] = skipped.get(reason, 0) + count

    def _event(self, rewrite: Rewrite) -> BoundaryEvent:
        self.block_table[rewrite.row, : len(rewrite.blocks)] = rewrite.blocks
        return BoundaryEvent(rewrite.row, rewrite.step_begin, rewrite.step_end, top_k=rewrite.top_k)

    def _pages(self, row: int) -> slice:
        return slice(row * self.pages_per_row, (row + 1) * self.pages_per_row)

    def _save(self, transfer: Transfer) -> None:
        blocks = self._blocks(transfer)
        self.saved[transfer.request_id] = (
            [view[blocks].cpu() for view in self.keys],
            [view[blocks].cpu() for view in self.values],
            self.queries[:, self._pages(transfer.row)].to("cpu", copy=True),
        )
        self.stats.data["saved_tokens"] += transfer.length

    def _restore(self, transfer: Transfer) -> None:
        keys, values, queries = self.saved.pop(transfer.request_id)
        blocks, device = self._blocks(transfer), self.queries.device
        for views, saved in ((self.keys, keys), (self.values, values)):
            for view, rows in zip(views, saved, strict=True):
                view[blocks] = rows.to(device)
        self.queries[:, self._pages(transfer.row)] = queries.to(device)
        self.stats.data["restored_tokens"] += transfer.length

    def _keep(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Blocks of prompts as they were computed. Layer by layer: nobody has set memory of the device aside for it."""
        views = (*self.keys, *self.values)
        try:
            chosen = torch.tensor(blocks, device=self.queries.device)
            rows = torch.empty((len(keys), len(views), *views[0].shape[1:]), dtype=views[0].dtype)
            for i, view in enumerate(views):
                rows[:, i] = view[chosen].cpu()
            self.prompts |= {key: rows[i].clone() for i, key in enumerate(keys)}
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("%d blocks of prompts are not kept: %s", len(keys), error)
            self.lost_prompts.update(keys)

    def _fill(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Copies of what was kept, layer by layer. vLLM counts on these blocks: it is told of those that fail."""
        there = [(key, block) for key, block in zip(keys, blocks, strict=True) if key in self.prompts]
        filled = [block for _, block in there]
        try:
            chosen, device = torch.tensor(filled, device=self.queries.device), self.queries.device
            for i, view in enumerate((*self.keys, *self.values) if there else ()):
                view[chosen] = torch.stack([self.prompts[key][i] for key, _ in there]).to(device)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.error("blocks of known prompts cannot be filled: %s", error)
            filled = []
        self.failed_blocks.update(set(blocks) - set(filled))
        self.stats.data["prompt_tokens"] += len(filled) * self.keys[0].shape[1]

    def _blocks(self, transfer: Transfer) -> Tensor:
        used = -(-transfer.length // self.keys[0].shape[1])
        return torch.tensor(transfer.blocks[:used], device=self.queries.device)

    def _check_memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        needed = int(np.prod(shape)) * dtype.itemsize
        if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
            raise MemoryError(
                f"the query pages of {self.num_rows} requests take {needed / 1e9:.1f} GB, more than is free: lower "
                "--max-num-seqs or --gpu-memory-utilization"
            )


class ShardedRewriter:
    """`BoundCache.rewrite` where each rank of a group has a part of the KV heads, and the query heads of these.

    processor: of whole KV-tokens. keys, values, query_cache: this rank's heads.
    """

    def __init__(
        self,
        processor: CacheProcessor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        query_cache: bottleneck_ext.QueryCache,
        workspace: bottleneck_ext.Workspace,
        softmax_scale: float,
        group: Any,
        block_size: int,
        max_relative_edit: float | None = None,
    ) -> None:
        self.processor = processor
        self.keys, self.values = keys, values
        self.query_cache = query_cache
        self.workspace = workspace
        self.softmax_scale = softmax_scale
        self.group = group
        self.block_size = block_size
        self.max_relative_edit = max_relative_edit
        self.kv_cache = bottleneck_ext.KVCache(keys, values)

    def rewrite(self, events: Sequence[BoundaryEvent], block_table: Any, *, report: bool) -> Any:
        """As BoundCache.rewrite; every rank calls it with the same events.

        What fails on one rank fails on all of them, at the same place: nobody waits for a rank that has given up, and
        every rank writes its heads or none does. Raises the rank's own error or, where it was another's, DeviceError;
        RebuildNeededError where writing has begun; RuntimeError where another rank raised what is no refusal.
        """
        mass = self._together(lambda: self._mass(events, block_table))
        parts = self.group.all_gather(mass[None], dim=0)
        ours, slots = self._together(lambda: self._chosen(self._select(events, parts), events, block_table))
        rows = self.group.all_gather(ours, dim=4)
        result = self._together(lambda: self._process(rows, slots, events, report))
        self._together(lambda: self._write(rows, slots), writes=True)
        return result

    def _together(self, step: Callable[[], Result], *, writes: bool = False) -> Result:
        """What step() returns, if it succeeds on every rank. The host's group is asked: a device goes on meanwhile."""
        error: Exception | None = None
        try:
            result = step()
        except Exception as raised:
            error = raised
        fatal = error is not None and not isinstance(error, (BottleneckError, MemoryError, torch.OutOfMemoryError))
        worst = torch.tensor(2 if fatal else 0 if error is None else 1)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, group=self.group.cpu_group)
        if not worst:
            return result
        if worst > 1:
            raise error if fatal and error is not None else RuntimeError("another rank failed: its log says why")
        reason = "another rank could not do its part: its log says why" if error is None else str(error)
        if writes:
            raise RebuildNeededError(reason) from error
        # A rebuild is not needed: what the Processor wrote is a copy.
        raise DeviceError(reason) from error

    def _mass(self, events: Sequence[BoundaryEvent], block_table: Any) -> Tensor:
        """This rank's share of the attention mass: float32 [num_layers, events, longest prior]."""
        config = self.processor.config
        begins = [event.window_begin(config.recent_window) for event in events]
        mass = torch.zeros((config.num_layers, len(events), max(begins)), device=self.keys[0].device)
        if max(begins) > 0:
            bottleneck_ext.attention_mass(
                self.kv_cache,
                self.query_cache,
                [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in events],
                block_table,
                out=mass,
                workspace=self.workspace,
                recent_window=config.recent_window,
                softmax_scale=self.softmax_scale,
            )
        return mass

    def _select(self, events: Sequence[BoundaryEvent], parts: Tensor) -> list[Tensor]:
        """Positions to rewrite, ascending, the same on every rank: the recalled ones, then the window.

        parts: the mass of every rank, [ranks, num_layers, events, longest prior]. Returned per event: [num_layers,
        rows].
        """
        config = self.processor.config
        # Summed in the order of the ranks: every rank must choose alike.
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        total = total.cpu().contiguous()
        positions = []
        for i, event in enumerate(events):
            begin = event.window_begin(config.recent_window)
            top_k = min(config.top_k if event.top_k is None else event.top_k, begin)
            chosen = torch.empty((config.num_layers, top_k), dtype=torch.int64)
            if top_k:
                bottleneck_ext.select_top_k(total[:, i], np.full(config.num_layers, begin, np.int64), chosen)
            window = torch.arange(begin, event.step_end).expand(config.num_layers, -1)
            positions.append(torch.cat((chosen, window), dim=1))
        return positions

    def _chosen(
        self, positions: Sequence[Tensor], events: Sequence[BoundaryEvent], block_table: Any
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The rows at `positions`: [num_layers, 2, events, most rows, heads, head_dim]; and, per event, their blocks
        and offsets, [num_layers, rows] each."""
        config, device = self.processor.config, self.keys[0].device
        longest = max(chosen.shape[1] for chosen in positions)
        shape = (config.num_layers, 2, len(events), longest, self.keys[0].shape[2], config.head_dim)
        ours = torch.zeros(shape, dtype=self.keys[0].dtype, device=device)
        slots = []
        for i, (event, chosen) in enumerate(zip(events, positions, strict=True)):
            table = torch.from_numpy(block_table[event.sequence].astype(np.int64))
            slots.append((table[chosen // self.block_size].to(device), (chosen % self.block_size).to(device)))
            length = chosen.shape[1]
            for layer in range(config.num_layers):
                at = (slots[i][0][layer], slots[i][1][layer])
                ours[layer, 0, i, :length] = self.keys[layer][at]
                ours[layer, 1, i, :length] = self.values[layer][at]
        return ours, slots

    def _process(
        self, rows: Tensor, slots: Sequence[tuple[Tensor, Tensor]], events: Sequence[BoundaryEvent], report: bool
    ) -> Any:
        """Rewrites `rows`, of all heads: a cache of the chosen rows alone, a block per event. All its prior positions
        are recalled, whatever their mass, so its queries may be anything."""
        config = self.processor.config
        queries = torch.zeros(
            (len(events), config.recent_window, config.num_query_heads, config.head_dim),
            dtype=rows.dtype,
            device=rows.device,
        )
        bound = self.processor.bind(
            list(rows[:, 0]), list(rows[:, 1]), [queries] * config.num_layers, workspace=self.workspace,
            softmax_scale=self.softmax_scale, max_relative_edit=self.max_relative_edit,
        )  # fmt: skip
        lengths = [blocks.shape[1] for blocks, _ in slots]
        windows = [event.step_end - event.window_begin(config.recent_window) for event in events]
        return bound.rewrite(
            [
                BoundaryEvent(i, length - window, length, top_k=length - window)
                for i, (length, window) in enumerate(zip(lengths, windows, strict=True))
            ],
            report=report,
        )

    def _write(self, rows: Tensor, slots: Sequence[tuple[Tensor, Tensor]]) -> None:
        """This rank's heads of `rows` to their places."""
        heads = self.keys[0].shape[2]
        mine = rows.narrow(4, self.group.rank_in_group * heads, heads)
        for i, (blocks, offsets) in enumerate(slots):
            for layer in range(self.processor.config.num_layers):
                at = (blocks[layer], offsets[layer])
                self.keys[layer][at] = mine[layer, 0, i, : blocks.shape[1]]
                self.values[layer][at] = mine[layer, 1, i, : blocks.shape[1]]


def _is_out_of_memory(error: Exception) -> bool:
    """Of a device or the host, for which PyTorch has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def processor_of_layers(
    config: CacheProcessorConfig, options: ServerOptions, backend: str, layers: Sequence[int]
) -> CacheProcessor:
    """The Processor of a worker's own layers: all of them, but for pipeline parallelism."""
    weights = load_weights(options.processor, config)
    if list(layers) != list(range(config.num_layers)):
        names = config.layer_shapes()
        weights = {
            f"layers.{i}.{name}": weights[f"layers.{layer}.{name}"] for i, layer in enumerate(layers) for name in names
        }
        config = dataclasses.replace(config, num_layers=len(layers))
    try:
        return CacheProcessor(config, weights, weight_dtype=options.weight_dtype, backend=backend)  # type: ignore[arg-type]
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{options.processor}: {error}") from None
