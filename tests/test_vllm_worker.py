"""The worker's half of the vLLM integration, without vLLM: what its caches, query pages, saves and kept prompts hold
after every event of random histories.

`Histories` of test_vllm_scheduler.py makes the history: requests arrive, are decoded, preempted, cancelled, finish, are
computed again. Here its worker is a real one, with real tensors and a real Processor, beside `Shadow`: arrays on which
each of a plan's orders is obeyed in the plainest way, a rewrite in a cache of that sequence alone. All that a running
request has computed must be the same, bit for bit. What belongs to nobody is filled with NaN before every forward, in
caches and query pages alike: whatever is read of it shows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from bottleneck_ext import DeviceError, InvalidArgumentError
from bottlenecked import BoundaryEvent, CacheProcessor, CacheProcessorConfig
from bottlenecked.checkpoint import initial_weights, save_checkpoint
from bottlenecked.integrations.vllm.options import ServerOptions
from bottlenecked.integrations.vllm.scheduler import Plan, Rewrite, Transfer

from .test_vllm_scheduler import Histories, Request, Worker, config

LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM = 2, 2, 4, 8
SHAPE = {
    "num_layers": LAYERS, "num_kv_heads": KV_HEADS, "num_query_heads": QUERY_HEADS, "head_dim": HEAD_DIM,
    "processor_dim": 8, "processor_heads": 2, "processor_mlp_dim": 8, "top_k": 5,
}  # fmt: skip
LONGEST = 64


@contextlib.contextmanager
def vllm_stubs() -> Iterator[None]:
    """The few names of vLLM that the worker imports; vLLM itself where there is one."""
    try:
        import vllm  # noqa: F401
    except ImportError:
        pass
    else:
        yield
        return
    modules = {}
    for name, names in {
        "vllm.distributed.kv_transfer.kv_connector.v1.metrics": {
            "KVConnectorPromMetrics": object, "KVConnectorStats": object,
        },
        "vllm.v1.metrics.utils": {"create_metric_per_engine": None},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda name: int(name.split(".")[1])},
    }.items():  # fmt: skip
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(modules[name]).update(names)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


with vllm_stubs():
    from bottlenecked.integrations.vllm.worker import WorkerHalf
for loaded in ("worker", "metrics"):  # made of stubs: nobody else may find it
    sys.modules.pop(f"bottlenecked.integrations.vllm.{loaded}")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = config(**SHAPE)
    Content.directory = tmp_path_factory.mktemp("processor")
    Content.weights = initial_weights(made, random_scale=0.5, seed=3)
    save_checkpoint(Content.directory, made, Content.weights)


class Content:
    """Keys, values and queries that the model computes for a request: [LONGEST, LAYERS, heads, HEAD_DIM] each."""

    directory: Path
    weights: dict[str, np.ndarray]

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.keys, self.values = rng.standard_normal((2, LONGEST, LAYERS, KV_HEADS, HEAD_DIM), np.float32)
        self.queries = rng.standard_normal((LONGEST, LAYERS, QUERY_HEADS, HEAD_DIM), np.float32)


class Shadow:
    """keys, values: [LAYERS, num_blocks, block_size, KV_HEADS, HEAD_DIM]; rows are addressed by block and offset."""

    def __init__(self, made: CacheProcessorConfig, num_blocks: int, block_size: int, limit: float | None) -> None:
        self.config, self.block_size, self.limit = made, block_size, limit
        shape = (LAYERS, num_blocks, block_size, KV_HEADS, HEAD_DIM)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.saved: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.prompts: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self.processor = CacheProcessor(made, Content.weights, weight_dtype="float32")
        self.refused = self.skipped = self.written = 0

    def rows(self, blocks: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(length)
        return np.asarray(blocks, np.int64)[positions // self.block_size], positions % self.block_size

    def rewrite(self, rewrite: Rewrite, content: Content) -> None:
        """In a cache of this sequence alone."""
        end, window = rewrite.step_end, self.config.recent_window
        at = self.rows(rewrite.blocks, end)
        keys, values = ([np.ascontiguousarray(all_[layer][at])[None] for layer in range(LAYERS)]
                        for all_ in (self.keys, self.values))  # fmt: skip
        ring = np.zeros((LAYERS, 1, window, QUERY_HEADS, HEAD_DIM), np.float32)
        for position in range(max(rewrite.step_begin, end - window), end):
            ring[:, 0, position % window] = content.queries[position]
        bound = self.processor.bind(
            keys, values, list(ring), workspace=self.processor.workspace(), softmax_scale=Impl.scale,
            max_relative_edit=self.limit,
        )  # fmt: skip
        try:
            report = bound.rewrite([BoundaryEvent(0, rewrite.step_begin, end, top_k=rewrite.top_k)])
        except InvalidArgumentError:
            self.refused += 1
            return
        self.skipped += report.skipped == (True,)
        self.written += report.skipped == (False,)
        for layer in range(LAYERS):
            self.keys[layer][at], self.values[layer][at] = keys[layer][0], values[layer][0]


class Impl:
    """An attention implementation of vLLM: it writes the cache and attends, which nobody looks at here."""

    num_heads, scale = QUERY_HEADS, 0.4

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any = None
    ) -> None:
        count = attn_metadata.num_actual_tokens
        slots = attn_metadata.slot_mapping[:count]
        keys, values = kv_cache
        at = slots // keys.shape[1], slots % keys.shape[1]
        keys[at], values[at] = key[:count], value[:count]


class RealWorker(Worker):
    """A WorkerHalf and its shadow beside the cells of `Worker`, which know whose position each is."""

    def __init__(
        self, made: CacheProcessorConfig, num_blocks: int, block_size: int, num_rows: int, limit: float | None
    ) -> None:
        super().__init__(made, block_size)
        self.shadow = Shadow(made, num_blocks, block_size, limit)
        self.contents: dict[int, Content] = {}  # by the id of a request
        self.alive: list[Request] = []  # so that ids stay theirs
        self.padding = Content(1 << 20)
        self.forwards: list[tuple[Request, int, int]] = []  # of the step under way: position, slot
        self.layers = {
            f"layers.{i}.attn": SimpleNamespace(impl=Impl(), attn_type="decoder", sliding_window=None, isa="vec")
            for i in range(LAYERS)
        }
        caches = {name: torch.zeros(num_blocks, KV_HEADS, block_size, 2 * HEAD_DIM) for name in self.layers}
        vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
            cache_config=SimpleNamespace(block_size=block_size),
            scheduler_config=SimpleNamespace(max_num_seqs=num_rows),
            model_config=SimpleNamespace(max_model_len=LONGEST),
        )
        options = ServerOptions(processor=str(Content.directory), weight_dtype="float32", max_relative_edit=limit)
        self.real = WorkerHalf(vllm_config, options, made, SimpleNamespace(world_size=1), reports=True)
        with vllm_stubs():
            self.real.register(caches)

    def content(self, request: Request) -> Content:
        if id(request) not in self.contents:
            self.contents[id(request)] = Content(len(self.contents))
            self.alive.append(request)
        return self.contents[id(request)]

    def apply(self, plan: Plan, requests: dict[str, Request]) -> list[tuple[Request, Rewrite]]:
        self.run_forward()
        shadow = self.shadow
        for request_id in plan.drop:
            del shadow.saved[request_id]
        for transfer in plan.save:
            at = shadow.rows(transfer.blocks, transfer.length)
            shadow.saved[transfer.request_id] = shadow.keys[:, *at].copy(), shadow.values[:, *at].copy()
        for transfer in plan.restore:
            at = shadow.rows(transfer.blocks, transfer.length)
            shadow.keys[:, *at], shadow.values[:, *at] = shadow.saved.pop(transfer.request_id)
        for key, block in plan.fill:
            shadow.keys[:, block], shadow.values[:, block] = shadow.prompts[key]
        for key, block in plan.keep:
            shadow.prompts[key] = shadow.keys[:, block].copy(), shadow.values[:, block].copy()
        for key in plan.forget:
            shadow.prompts.pop(key, None)
        pages = [self.real.block_to_page.tolist()]
        self.real.prepare(plan)
        pages.append(self.real.block_to_page.tolist())
        # `prepare` has saved the queries of these rows, `super().apply` is yet to.
        self.poison(requests, pages, {transfer.row for transfer in plan.save})
        self.real.run(plan)
        done = super().apply(plan, requests)
        for request, rewrite in done:
            shadow.rewrite(rewrite, self.content(request))
        counted = self.real.stats.data
        skips = {"refused": shadow.refused, "relative edit above the limit": shadow.skipped}
        assert counted["skipped"] == {reason: count for reason, count in skips.items() if count}
        assert counted["boundaries"] == len(counted["edits"]) == shadow.written
        self.check(requests)
        assert set(self.real.saved) == set(shadow.saved) == set(self.saved)
        assert set(self.real.prompts) == set(shadow.prompts) == set(self.prompts)
        mapped = {block: page for block, page in enumerate(self.real.block_to_page.tolist()) if page >= 0}
        assert mapped == self.block_to_page
        return done

    def poison(self, requests: dict[str, Request], mapped: list[list[int]], saved: set[int]) -> None:
        """NaN in all that no running request has computed, and in the queries that no window can need.

        mapped: pages of blocks before this step and in it: what is rewritten now was captured under the former. saved:
        rows that this step saves.
        """
        cells = torch.ones(self.real.keys[0].shape[:2], dtype=torch.bool)
        rows = torch.ones(self.real.queries.shape[1:3], dtype=torch.bool)
        for request in requests.values():
            length = request.num_computed_tokens if request.blocks else 0
            at = [torch.from_numpy(index) for index in self.shadow.rows(request.blocks, length)] if length else []
            if length:
                cells[at[0], at[1]] = False
            for position in range(max(0, length - self.config.recent_window), length):
                for pages in mapped:
                    if (page := pages[request.blocks[position // self.block_size]]) >= 0:
                        rows[page, position % self.block_size] = False
        for view in (*self.real.keys, *self.real.values):
            view[cells] = torch.nan
        self.real.queries[:, rows] = torch.nan
        for cell in [cell for cell in self.pages if rows[cell] and cell[0] // self.pages_per_row not in saved]:
            del self.pages[cell]  # a request that loses blocks has a window further back: of other queries than these

    def check(self, requests: dict[str, Request]) -> None:
        """Before a forward: what running requests have computed, and the queries of their last positions."""
        for request in requests.values():
            length = request.num_computed_tokens if request.blocks else 0
            if not length:
                continue
            at = self.shadow.rows(request.blocks, length)
            for layer in range(LAYERS):
                for view, right in ((self.real.keys, self.shadow.keys), (self.real.values, self.shadow.values)):
                    found = view[layer][at[0], at[1]].numpy()
                    assert np.array_equal(found.view(np.int32), right[layer][at].view(np.int32)), (request, layer)
            if not request.is_rewritten:
                continue
            for position in range(max(0, length - self.config.recent_window), length):
                block, offset = self.slot(request.blocks, position)
                page = self.block_to_page.get(block)
                if page is not None and self.pages.get((page, offset)) == (request, position):
                    found = self.real.queries[:, page, offset].numpy()
                    assert np.array_equal(found, self.content(request).queries[position])

    def forward(self, request: Request, length: int, count: int) -> None:
        super().forward(request, length, count)
        content = self.content(request)
        for position in range(length, length + count):
            block, offset = self.slot(request.blocks, position)
            self.forwards.append((request, position, block * self.block_size + offset))
            self.shadow.keys[:, block, offset] = content.keys[position]
            self.shadow.values[:, block, offset] = content.values[position]

    def run_forward(self) -> None:
        """All requests of a step together, and a token of padding behind them."""
        if not self.forwards:
            return
        tokens = [(self.content(request), position) for request, position, _ in self.forwards]
        tokens.append((self.padding, 0))
        slots = torch.tensor([slot for *_, slot in self.forwards] + [0])
        metadata = SimpleNamespace(num_actual_tokens=len(self.forwards), slot_mapping=slots)
        for i, layer in enumerate(self.layers.values()):
            query, key, value = (
                torch.from_numpy(np.stack([getattr(content, name)[position, i] for content, position in tokens]))
                for name in ("queries", "keys", "values")
            )
            layer.impl.forward(layer, query, key, value, (self.real.keys[i], self.real.values[i]), metadata)
        self.forwards = []


class WorkerHistories(Histories):
    @initialize(
        block_size=st.sampled_from([2, 4, 8]),
        recent_window=st.integers(1, 12),
        num_rows=st.integers(1, 4),
        num_blocks=st.integers(14, 40),
        max_saved_tokens=st.sampled_from([0, 25, 10_000]),
        prompt_cache_tokens=st.sampled_from([0, 16, 10_000]),
        asynchronous=st.booleans(),
        rewrite_prompt=st.booleans(),
        min_step_length=st.sampled_from([1, 1, 3]),
        limit=st.sampled_from([None, None, 0.15]),
        seed=st.integers(0, 1000),
    )
    def begin(self, limit: float | None, **drawn: Any) -> None:
        super().begin(**drawn)
        boundary = {"min_step_length": drawn["min_step_length"]}
        changes = {"recent_window": drawn["recent_window"], "rewrite_prompt": drawn["rewrite_prompt"]}
        self.config = config(**SHAPE, **changes, boundary=boundary)
        assert (self.half.config.recent_window, self.half.config.top_k) == (self.config.recent_window, 5)
        self.worker = RealWorker(self.config, drawn["num_blocks"], drawn["block_size"], drawn["num_rows"], limit)

    @precondition(lambda self: any(request.num_computed_tokens for request in self.engine.running))
    @rule(which=st.integers(0, 7), layer=st.integers(0, LAYERS - 1))
    def break_one(self, which: int, layer: int) -> None:
        """A value becomes NaN, in the last position of a request: its steps are refused, the others' are not."""
        self.worker.run_forward()
        running = [request for request in self.engine.running if request.num_computed_tokens]
        request = running[which % len(running)]
        block, offset = self.worker.slot(request.blocks, request.num_computed_tokens - 1)
        self.worker.real.values[layer][block, offset] = torch.nan
        self.worker.shadow.values[layer, block, offset] = np.nan

    def teardown(self) -> None:
        super().teardown()
        if not hasattr(self, "engine"):
            return
        assert self.worker.real.saved == {}
        assert bool((self.worker.real.block_to_page == -1).all())
        assert self.worker.real.failed_blocks == set()


TestWorkerHistories = WorkerHistories.TestCase
TestWorkerHistories.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, print_blob=True)


def half() -> Any:
    """Of blocks of four positions, filled with numbers that say where they are."""
    real = RealWorker(config(**SHAPE, recent_window=6), 10, 4, 2, None).real
    for i, view in enumerate((*real.keys, *real.values)):
        view.copy_(torch.arange(view.numel()).view(view.shape) + 10_000 * i)
    return real


def test_a_block_that_changes_hands_keeps_its_new_page() -> None:
    real = half()
    real.prepare(Plan(map=[(3, 0), (4, 1)]))
    real.prepare(Plan(unmap=[3, 4], map=[(3, 2)]))
    assert real.block_to_page.tolist() == [-1, -1, -1, 2, -1, -1, -1, -1, -1, -1]


def test_a_block_that_is_not_full_is_saved_and_restored() -> None:
    real = half()
    before = [view.clone() for view in (*real.keys, *real.values)]
    real.prepare(Plan(save=[Transfer("r", 0, 5, (2, 7))]))
    for view in (*real.keys, *real.values):
        view.fill_(torch.nan)
    real.run(Plan(restore=[Transfer("r", 1, 5, (6, 1, 4))]))
    for view, then in zip((*real.keys, *real.values), before, strict=True):
        assert torch.equal(view[6], then[2])
        assert torch.equal(view[1, 0], then[7, 0])
        assert view[[0, 2, 3, 4, 5, 7, 8, 9]].isnan().all()


def test_a_prompt_is_kept_and_copied_a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the device for a moment is nobody's budget: no more than one layer's keys or values of the prompt."""
    real, moved = half(), []
    before = [view.clone() for view in (*real.keys, *real.values)]
    for name in ("cpu", "to"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *to, of=method: moved.append(self.numel()) or of(self, *to)
        )
    real.run(Plan(keep=[(b"a", 3), (b"b", 5)]))
    kept = moved.copy()
    real.run(Plan(fill=[(b"b", 7), (b"a", 2)]))
    layer = before[0][:2].numel()
    assert kept == moved[len(kept) :] == [layer] * 2 * LAYERS
    assert {rows.untyped_storage().nbytes() for rows in real.prompts.values()} == {LAYERS * layer * 4}
    for view, then in zip((*real.keys, *real.values), before, strict=True):
        assert torch.equal(view[[7, 2]], then[[5, 3]])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


def failing_at(call: int, error: Exception, function: Any) -> Any:
    """`function`, whose calls fail from that one on."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= call:
            raise error
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_without_memory_a_prompt_is_not_kept(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = half()
    real.run(Plan(keep=[(b"a", 3)]))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", failing_at(3, error, torch.Tensor.cpu))
        real.run(Plan(keep=[(b"b", 4), (b"c", 5)], forget=[b"a"]))
    assert set(real.prompts) == set()
    assert real.take_lost_prompts() == {b"b", b"c"}
    assert real.take_lost_prompts() == set()
    assert "2 blocks of prompts are not kept" in caplog.text
    real.run(Plan(keep=[(b"b", 4)]))
    assert set(real.prompts) == {b"b"}
    assert real.take_failed_blocks() == set()


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_without_memory_blocks_are_not_filled(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their positions were promised: vLLM is told which are not there."""
    real = half()
    real.run(Plan(keep=[(b"a", 3), (b"b", 5)]))
    copied = real.stats.data["prompt_tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", failing_at(3, error, torch.stack))
        real.run(Plan(fill=[(b"a", 7), (b"b", 2)]))
    assert real.take_failed_blocks() == {7, 2}
    assert real.stats.data["prompt_tokens"] == copied
    assert set(real.prompts) == {b"a", b"b"}


def test_a_prompt_that_was_lost_is_not_filled() -> None:
    """Scheduled before the scheduler heard of it, with asynchronous scheduling."""
    real = half()
    then = real.keys[0][3].clone()
    real.run(Plan(keep=[(b"a", 3)]))
    real.run(Plan(fill=[(b"a", 7), (b"b", 2)]))
    assert real.take_failed_blocks() == {2}
    assert torch.equal(real.keys[0][7], then)
    assert real.stats.data["prompt_tokens"] == 4


@pytest.mark.parametrize("plan", [Plan(keep=[(b"b", 4)]), Plan(fill=[(b"a", 4)])])
def test_other_errors_are_not_passed_over(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = half()
    real.run(Plan(keep=[(b"a", 3)]))
    error = RuntimeError("CUDA error: device-side assert triggered")
    for owner, name in ((torch.Tensor, "cpu"), (torch, "stack")):
        monkeypatch.setattr(owner, name, failing_at(1, error, getattr(owner, name)))
    with pytest.raises(RuntimeError, match="device-side assert"):
        real.run(plan)


class SlowDevice:
    """A rewriter, and its workspace, that tells late what it refused: by a later call, one at a time."""

    skipped_steps = 0

    def __init__(self, pending: list[str], failing: int = 0) -> None:
        self.pending, self.failing = pending, failing
        self.written: list[int] = []

    def tell(self) -> None:
        if self.pending:
            raise InvalidArgumentError(self.pending.pop(0))

    synchronize = tell

    def rewrite(self, events: list[BoundaryEvent], block_table: Any, *, report: bool) -> None:
        assert not report
        self.tell()
        if len(events) > 1 and self.failing:
            self.failing -= 1
            raise MemoryError
        self.written += [event.sequence for event in events if event.step_end < 6]
        self.pending += [f"sequence {event.sequence}" for event in events if event.step_end >= 6]


def rewrite_late(device: SlowDevice, ends: list[int]) -> dict[str, int]:
    real = half()
    real.block_to_page = SimpleNamespace(device=torch.device("cuda"))
    real.rewriter = real.workspace = device
    real.run(Plan(rewrite=[Rewrite(row, 0, end, None, (2 * row, 2 * row + 1)) for row, end in enumerate(ends)]))
    return real.stats.data["skipped"]


@pytest.mark.parametrize("ends", [[5], [5, 4]])
@pytest.mark.parametrize("earlier", [0, 1, 2, 4])
def test_refusals_of_earlier_calls_are_not_this_ones(earlier: int, ends: list[int]) -> None:
    """However many the device has not told of yet: all of them are counted, and the steps at hand are rewritten."""
    device = SlowDevice([f"sequence {i}" for i in range(earlier)])
    assert rewrite_late(device, ends) == ({"refused": earlier} if earlier else {})
    assert device.written == list(range(len(ends)))


def test_a_refusal_of_one_step_is_not_the_next_ones() -> None:
    """Where memory is wanting for both at once, they are rewritten one after the other."""
    device = SlowDevice([], failing=2)
    rewrite_late(device, [6, 5])
    assert device.written == [1]


def test_a_lost_device_is_not_asked_for_ever() -> None:
    device = SlowDevice([])

    def lost(*_: Any, **__: Any) -> None:
        raise DeviceError("lost")

    device.synchronize = device.rewrite = lost  # type: ignore[method-assign]
    assert "refused" in rewrite_late(device, [5])
