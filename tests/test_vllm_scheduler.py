"""The scheduler's half of the vLLM integration and its options, without vLLM.

`Engine` is a small vLLM scheduler, synchronous or with a token in flight; `Worker` does what a plan says, in the order
that `Plan` documents, with cells that know which request and position they hold and which steps have rewritten them.
What has to be rewritten is read off the tokens by `steps_of`.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bottleneck_ext import InvalidArgumentError
from bottlenecked import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.vllm.options import RequestOptions, ServerOptions
from bottlenecked.integrations.vllm.scheduler import Plan, Rewrite, SchedulerHalf, Transfer, pages_per_row

NEWLINE = 7
TOP_K = 5
SERVER = ServerOptions(processor="somewhere")


def config(**changes: Any) -> CacheProcessorConfig:
    boundary = BoundaryConfig(rule="token_ids", token_ids=(NEWLINE,), **changes.pop("boundary", {}))
    settings: dict[str, Any] = {
        "num_layers": 1, "num_kv_heads": 1, "head_dim": 4, "num_query_heads": 1, "processor_dim": 4,
        "processor_heads": 1, "processor_mlp_dim": 4, "top_k": TOP_K, "recent_window": 6, "boundary": boundary,
    }  # fmt: skip
    return CacheProcessorConfig(**(settings | changes))


def half(made: CacheProcessorConfig | None = None, options: ServerOptions = SERVER, **changes: Any) -> SchedulerHalf:
    given: dict[str, Any] = {"block_size": 4, "num_rows": 4, "max_saved_tokens": 1000}
    made = config() if made is None else made
    return SchedulerHalf(made, options, line_ending_ids=(NEWLINE,), **(given | changes))


def steps_of(tokens: list[int], prompt_length: int, made: CacheProcessorConfig) -> list[tuple[int, int]]:
    """All steps to rewrite in this text, the last one perhaps still to be written."""
    steps, begin = [], 0
    for end in range(prompt_length, len(tokens) + 1):
        of_prompt = end == prompt_length
        if of_prompt or (tokens[end - 1] == NEWLINE and end - begin >= made.boundary.min_step_length):
            if not of_prompt or made.rewrite_prompt:
                steps.append((begin, end))
            begin = end
    return steps


@dataclass(eq=False)
class Request:
    """The part of vLLM's Request that is read, and what `Engine` and the test know of it."""

    request_id: str
    prompt_token_ids: list[int] | None
    extra_args: dict[str, Any] | None = None
    max_tokens: int = 8
    prompt_embeds: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: tuple[Any, ...] = ()
    # of vLLM
    num_computed_tokens: int = 0
    placeholders: int = 0
    in_flight: int = 0
    stale: int = 0
    drop_stale_output: bool = False
    blocks: list[int] = field(default_factory=list)
    finished: bool = False
    # of the test: step 0's length, and per position the ends of the steps that have rewritten it
    prompt_length: int = 0
    rewritten: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampling_params = SimpleNamespace(extra_args=self.extra_args)
        self.all_token_ids = list(self.prompt_token_ids or [0] * 3)
        self.num_prompt_tokens = self.prompt_length = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def is_rewritten(self) -> bool:
        off = (self.extra_args or {}).get("bottlenecked_rewrite") == 0
        return not (off or self.resumable or self.prompt_embeds is not None or self.prompt_token_ids is None)


def scheduled(
    counts: dict[Request, int], preempted: tuple[Request, ...] = (), blocks: dict[str, list[int]] | None = None
) -> SimpleNamespace:
    """vLLM's SchedulerOutput."""
    tables = {request.request_id: request.blocks for request in counts} if blocks is None else blocks
    return SimpleNamespace(
        num_scheduled_tokens={request.request_id: count for request, count in counts.items()},
        preempted_req_ids={request.request_id for request in preempted} or None,
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda request_id: (tables[request_id],)),
    )


class Engine:
    """vLLM's Scheduler: running and waiting requests, a pool of blocks, preemption of the last when it is empty."""

    def __init__(self, half: SchedulerHalf, num_blocks: int, block_size: int, num_rows: int, asynchronous: bool):
        self.half, self.block_size, self.num_rows, self.asynchronous = half, block_size, num_rows, asynchronous
        self.free = list(range(num_blocks))
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preempted: list[Request] = []
        self.in_flight: deque[list[tuple[Request, int, bool]]] = deque()
        self.started: list[Request] = []  # in this step, or set back before it

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.half.add(request)

    def schedule(self, budget: int) -> tuple[dict[Request, int], list[Request]]:
        counts: dict[Request, int] = {}
        for request in list(self.running):
            if request not in self.running:
                continue
            count = min(budget, request.num_tokens + request.placeholders - request.num_computed_tokens)
            if not count or (request.placeholders and self._reaches_the_end(request)):
                continue
            while not self._allocate(request, request.num_computed_tokens + count):
                self.preempt(self.running[-1])
                if request not in self.running:
                    break
            else:
                counts[request] = count
                budget -= count
        while not self.preempted_now and self.waiting and budget and len(self.running) < self.num_rows:
            request = self.waiting[0]
            if request.stale and not request.drop_stale_output and not request.is_rewritten:
                break
            restorable = self.half.restorable(request)
            if restorable is None or (request.stale and not request.drop_stale_output and not restorable):
                break
            computed = 0 if request.skip_reading_prefix_cache else restorable
            count = min(budget, request.num_tokens - computed)
            assert count > 0
            if not self._allocate(request, computed + count):
                break
            self.running.append(self.waiting.popleft())
            self.started.append(request)
            request.num_computed_tokens = computed
            counts[request] = count
            budget -= count
        preempted, self.preempted = self.preempted, []
        return counts, preempted

    @property
    def preempted_now(self) -> bool:
        """Whether this very `schedule` preempted; those that a reset preempted may be resumed at once."""
        return any(not request.drop_stale_output for request in self.preempted)

    def advance(self, counts: dict[Request, int]) -> None:
        sampled = []
        for request, count in counts.items():
            request.num_computed_tokens += count
            request.in_flight += count
            samples = request.num_computed_tokens >= request.num_tokens + request.placeholders
            if samples and self.asynchronous:
                request.placeholders += 1
            sampled.append((request, count, samples))
        self.in_flight.append(sampled)

    def deliver(self, sample: Any) -> None:
        """What the oldest step in flight sampled."""
        for request, count, samples in self.in_flight.popleft():
            stale = request.stale > 0
            request.in_flight -= count
            request.stale -= count if stale else 0
            if request.finished or not samples or (stale and request.drop_stale_output):
                continue
            request.all_token_ids.append(sample())
            if self.asynchronous and not stale:
                request.placeholders -= 1
            ended = request.num_tokens >= request.num_prompt_tokens + request.max_tokens
            if ended or request.all_token_ids[-1] == 0:
                self.finish(request)

    def finish(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        request.finished = True
        self.half.finish(request.request_id)
        self._release(request)

    def preempt(self, request: Request, *, reset: bool = False) -> None:
        self.running.remove(request)
        self._release(request)
        request.drop_stale_output = reset or (request.drop_stale_output and request.stale > 0)
        request.stale, request.placeholders, request.num_computed_tokens = request.in_flight, 0, 0
        self.waiting.appendleft(request)
        self.preempted.append(request)

    def _allocate(self, request: Request, length: int) -> bool:
        missing = -(-length // self.block_size) - len(request.blocks)
        if missing > len(self.free):
            return False
        request.blocks += [self.free.pop(0) for _ in range(missing)]
        return True

    def _release(self, request: Request) -> None:
        self.free += request.blocks[::-1]
        request.blocks = []

    def _reaches_the_end(self, request: Request) -> bool:
        end = request.num_prompt_tokens + request.max_tokens
        return request.num_computed_tokens + 2 - request.placeholders >= end


Cell = tuple[Request, int, tuple[int, ...]]


class Worker:
    """The cache [block, offset], the query pages [page, offset], saves."""

    def __init__(self, made: CacheProcessorConfig, block_size: int) -> None:
        self.config, self.block_size = made, block_size
        self.pages_per_row = pages_per_row(made.recent_window, block_size)
        self.cache: dict[tuple[int, int], Cell] = {}
        self.block_to_page: dict[int, int] = {}
        self.pages: dict[tuple[int, int], tuple[Request, int]] = {}
        self.saved: dict[str, tuple[list[Cell], dict[tuple[int, int], tuple[Request, int]]]] = {}
        self.prompts: dict[bytes, list[int]] = {}  # all tokens up to the block's end

    def apply(self, plan: Plan, requests: dict[str, Request]) -> list[tuple[Request, Rewrite]]:
        for request_id in plan.drop:
            del self.saved[request_id]  # once, and only what was saved
        for transfer in plan.save:
            assert transfer.request_id not in self.saved
            cells = [self.cell(transfer.blocks, position) for position in range(transfer.length)]
            request = requests[transfer.request_id]
            assert [cell[:2] for cell in cells] == [(request, position) for position in range(transfer.length)]
            self.saved[transfer.request_id] = cells, self.pages_of(transfer.row)
        for block in plan.unmap:
            del self.block_to_page[block]
        for block, page in plan.map:
            assert block not in self.block_to_page or block in plan.unmap
            self.block_to_page[block] = page
        for transfer in plan.restore:
            cells, pages = self.saved.pop(transfer.request_id)
            assert len(cells) == transfer.length
            for cell in cells:
                self.cache[self.slot(transfer.blocks, cell[1])] = cell
            for key in self.pages_of(transfer.row):
                del self.pages[transfer.row * self.pages_per_row + key[0], key[1]]
            for (page, offset), query in pages.items():
                self.pages[transfer.row * self.pages_per_row + page, offset] = query
        owners = {block: (r, i) for r in requests.values() for i, block in enumerate(r.blocks)}
        for key, block in plan.fill:
            request, index = owners[block]
            end = (index + 1) * self.block_size
            assert self.prompts[key] == request.all_token_ids[:end]
            for position in range(end - self.block_size, end):
                self.cache[self.slot(request.blocks, position)] = request, position, ()
        for key, block in plan.keep:
            request, index = owners[block]
            end = (index + 1) * self.block_size
            for position in range(end - self.block_size, end):
                assert self.cell(request.blocks, position) == (request, position, ())  # not rewritten yet
            self.prompts[key] = request.all_token_ids[:end]
        for key in plan.forget:
            self.prompts.pop(key, None)
        return [(self.rewrite(rewrite), rewrite) for rewrite in plan.rewrite]

    def rewrite(self, rewrite: Rewrite) -> Request:
        """All positions below step_end are one request's; so are the queries of the window."""
        request = self.cell(rewrite.blocks, 0)[0]
        assert len(rewrite.blocks) == -(-rewrite.step_end // self.block_size)
        for position in range(rewrite.step_end):
            assert self.cell(rewrite.blocks, position)[:2] == (request, position)
        for position in range(max(rewrite.step_begin, rewrite.step_end - self.config.recent_window), rewrite.step_end):
            block, offset = divmod(position, self.block_size)
            page = rewrite.row * self.pages_per_row + block % self.pages_per_row
            assert self.pages[page, offset] == (request, position)
            slot, (_, _, ends) = self.slot(rewrite.blocks, position), self.cell(rewrite.blocks, position)
            self.cache[slot] = request, position, (*ends, rewrite.step_end)
        return request

    def forward(self, request: Request, length: int, count: int) -> None:
        for position in range(length):
            assert self.cell(request.blocks, position) == (request, position, request.rewritten[position])
        for position in range(length, length + count):
            block, offset = slot = self.slot(request.blocks, position)
            self.cache[slot] = request, position, ()
            if block in self.block_to_page:
                assert request.is_rewritten
                self.pages[self.block_to_page[block], offset] = request, position

    def slot(self, blocks: Any, position: int) -> tuple[int, int]:
        return blocks[position // self.block_size], position % self.block_size

    def cell(self, blocks: Any, position: int) -> Cell:
        return self.cache[self.slot(blocks, position)]

    def pages_of(self, row: int) -> dict[tuple[int, int], tuple[Request, int]]:
        begin = row * self.pages_per_row
        return {(p - begin, o): q for (p, o), q in self.pages.items() if begin <= p < begin + self.pages_per_row}


class Histories(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([2, 4, 8]),
        recent_window=st.integers(1, 12),
        num_rows=st.integers(1, 4),
        num_blocks=st.integers(14, 40),
        max_saved_tokens=st.sampled_from([0, 12, 25, 10_000]),
        prompt_cache_tokens=st.sampled_from([0, 16, 40, 10_000]),
        asynchronous=st.booleans(),
        rewrite_prompt=st.booleans(),
        min_step_length=st.sampled_from([1, 1, 3]),
        seed=st.integers(0, 1000),
    )
    def begin(
        self, block_size: int, recent_window: int, num_rows: int, num_blocks: int, max_saved_tokens: int,
        prompt_cache_tokens: int, asynchronous: bool, rewrite_prompt: bool, min_step_length: int, seed: int,
    ) -> None:  # fmt: skip
        self.config = config(
            recent_window=recent_window, rewrite_prompt=rewrite_prompt, boundary={"min_step_length": min_step_length}
        )
        self.max_saved_tokens = max_saved_tokens
        options = ServerOptions(processor="somewhere", prompt_cache_tokens=prompt_cache_tokens)
        self.half = half(
            self.config, options, block_size=block_size, num_rows=num_rows, max_saved_tokens=max_saved_tokens
        )
        self.engine = Engine(self.half, num_blocks, block_size, num_rows, asynchronous)
        self.worker = Worker(self.config, block_size)
        self.longest = min(40, num_blocks * block_size - 12)
        self.random = random.Random(seed)
        self.texts = [[self.random.choice([NEWLINE, 1, 2]) for _ in range(40)] for _ in range(2)]
        self.known: dict[str, Request] = {}
        self.lost: set[str] = set()  # set back, and not computed again yet
        self.number = 0  # of the latest plan

    def sample(self) -> int:
        return self.random.choices([NEWLINE, 1, 0], [40, 58, 2])[0]  # 0 ends a request

    @rule(
        length=st.integers(1, 40),
        text=st.integers(0, 1),
        own=st.integers(0, 6),
        max_tokens=st.integers(1, 12),
        number=st.integers(0, 7),
        kind=st.sampled_from(["", "", "", "", "off", "top_k", "embeddings", "streaming", "prompt logprobs"]),
    )
    def arrive(self, length: int, text: int, own: int, max_tokens: int, number: int, kind: str) -> None:
        """A prompt is one of two texts up to its `own` last tokens."""
        request_id = f"r{number}"
        if any(request.request_id == request_id for request in self.engine.requests):
            return  # ids of the finished come again
        length = min(length, self.longest)
        prompt = self.texts[text][: max(0, length - own)]
        prompt += [self.random.choice([NEWLINE, 1, 2]) for _ in range(length - len(prompt))]
        extra_args: dict[str, Any] | None = {
            "off": {"bottlenecked_rewrite": 0}, "top_k": {"kv_transfer_params": {"bottlenecked_top_k": 2}},
        }.get(kind)  # fmt: skip
        request = Request(
            request_id, prompt, extra_args, max_tokens, resumable=kind == "streaming",
            prompt_embeds=object() if kind == "embeddings" else None,
            skip_reading_prefix_cache=kind == "prompt logprobs",
        )  # fmt: skip
        self.known[request_id] = request
        self.engine.add(request)

    @rule(budget=st.sampled_from([1, 3, 8, 17, 64]))
    def step(self, budget: int) -> None:
        engine = self.engine
        counts, preempted = engine.schedule(budget)
        lengths = {request: request.num_computed_tokens for request in counts}
        plan = self.half.build(scheduled(counts, tuple(preempted)))
        restored = {transfer.request_id for transfer in plan.restore}
        for request in engine.started:
            if request in counts and request.request_id not in restored:
                if lengths[request] < len(request.rewritten):  # computed again: all that is known is one step now
                    request.prompt_length = request.num_tokens
                request.rewritten = request.rewritten[: lengths[request]]
                request.rewritten += [()] * (lengths[request] - len(request.rewritten))
        engine.started = [request for request in engine.started if request not in counts]

        assert len({rewrite.row for rewrite in plan.rewrite}) == len(plan.rewrite)
        found = {}
        saves = {transfer.request_id for transfer in plan.save}
        for request, rewrite in self.worker.apply(plan, self.known):
            found[request] = rewrite.step_begin, rewrite.step_end
            assert rewrite.top_k == (2 if request.extra_args else None)
            assert list(rewrite.blocks) == request.blocks[: len(rewrite.blocks)]
        expected = {}
        for request, length in lengths.items():
            steps = steps_of(request.all_token_ids, request.prompt_length, self.config) if request.is_rewritten else []
            for begin, end in steps:
                if end == length:
                    expected[request] = begin, end
                    for position in range(max(begin, end - self.config.recent_window), end):
                        request.rewritten[position] += (end,)
        assert found == expected
        assert plan.precedes_forward == bool(found or plan.restore or plan.fill or plan.keep)
        assert sum(len(cells) for cells, _ in self.worker.saved.values()) <= self.max_saved_tokens
        assert len(self.worker.prompts) <= self.half.prompts.max_blocks
        self.number = plan.number
        if self.max_saved_tokens > 1000:
            # With room for all, every preemption is saved but where vLLM wants the cache forgotten, or it was lost.
            wanted = {r.request_id for r in preempted if r.is_rewritten and not r.drop_stale_output}
            assert saves == wanted - self.lost
        self.lost -= {request.request_id for request in counts}
        for request, count in counts.items():
            self.worker.forward(request, lengths[request], count)
            request.rewritten[lengths[request] :] = [()] * count
        engine.advance(counts)
        if len(engine.in_flight) > engine.asynchronous:
            engine.deliver(self.sample)

    @precondition(lambda self: self.engine.requests)
    @rule(which=st.integers(0, 7))
    def cancel(self, which: int) -> None:
        self.engine.finish(self.engine.requests[which % len(self.engine.requests)])

    @rule()
    def reset(self) -> None:
        """`reset_prefix_cache(reset_running_requests=True)`: outputs in flight are dropped, the cache is forgotten."""
        while self.engine.running:
            self.engine.preempt(self.engine.running[-1], reset=True)

    @rule()
    def reset_connector(self) -> None:
        """`reset_prefix_cache(reset_connector=True)`: nothing that was saved or kept is used any more."""
        self.half.reset()
        assert not any(self.half.restorable(request) for request in self.engine.waiting)

    @precondition(lambda self: self.engine.running and not self.engine.asynchronous)
    @rule(which=st.integers(0, 7), blocks=st.integers(0, 3))
    def lose(self, which: int, blocks: int) -> None:
        """kv_load_failure_policy "recompute": positions from some block on are computed again."""
        request = self.engine.running[which % len(self.engine.running)]
        length = blocks * self.engine.block_size
        if length < request.num_computed_tokens:
            saved = {waiting.request_id: self.half.restorable(waiting) for waiting in self.engine.waiting}
            self.half.lose(request.blocks[blocks : blocks + 1], self.number)
            assert {waiting.request_id: self.half.restorable(waiting) for waiting in self.engine.waiting} == saved
            self.lost.add(request.request_id)
            request.num_computed_tokens = length
            self.engine.started.append(request)

    @invariant()
    def mapped_blocks_are_of_running_requests(self) -> None:
        """And no request has more of them than pages; rows are as many as requests that run and are rewritten."""
        if not hasattr(self, "engine"):
            return
        owners = {block: request for request in self.engine.requests for block in request.blocks}
        rows: dict[int, set[str]] = {}
        for block, page in self.worker.block_to_page.items():
            if block in owners:  # else it is unmapped by the next plan, before anybody writes it
                rows.setdefault(page // self.worker.pages_per_row, set()).add(owners[block].request_id)
        assert all(len(owned) == 1 for owned in rows.values()), rows
        pages = list(self.worker.block_to_page.values())
        assert len(set(pages)) == len(pages)

    def teardown(self) -> None:
        """Everybody finishes, and then nothing is held."""
        if not hasattr(self, "engine"):
            return
        for _ in range(600):
            if not self.engine.requests and not self.engine.in_flight:
                break
            self.step(64)
        assert not self.engine.requests, "a request waits for ever"
        assert self.half.is_idle
        self.step(64)
        assert self.worker.saved == {}
        assert self.worker.block_to_page == {}
        assert sorted(self.half._free_rows) == list(range(self.engine.num_rows))
        assert self.half._detector._rows == {}
        assert set(self.worker.prompts) == set(self.half.prompts._kept)
        assert self.half.skipped["several tokens at once"] == 0
        assert self.half.skipped["no query row"] == 0


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, print_blob=True)


def run(target: SchedulerHalf, request: Request, count: int, **options: Any) -> Plan:
    """One step in which this request alone is scheduled."""
    need = -(-(request.num_computed_tokens + count) // target.block_size)
    request.blocks += range(len(request.blocks), need)
    plan = target.build(scheduled({request: count}, **options))
    request.num_computed_tokens += count
    return plan


def test_one_request() -> None:
    """Block 4, window 6: three pages in a row."""
    target, request = half(), Request("r", [1] * 9)
    target.add(request)
    assert run(target, request, 5) == Plan(1, map=[(0, 0), (1, 1)])
    assert run(target, request, 4) == Plan(2, map=[(2, 2)])
    request.all_token_ids += [1, NEWLINE]
    assert run(target, request, 1) == Plan(3, unmap=[0], rewrite=[Rewrite(0, 0, 9, None, (0, 1, 2))])
    assert run(target, request, 1) == Plan(4)
    request.all_token_ids += [1]
    plan = run(target, request, 1)
    assert plan == Plan(5, rewrite=[Rewrite(0, 9, 11, None, (0, 1, 2))])
    assert plan.precedes_forward
    target.finish("r")
    assert target.is_idle
    assert target.build(scheduled({})) == Plan(6, unmap=[1, 2])
    assert target.build(scheduled({})) == Plan(7)


@pytest.mark.parametrize("first", ["lost", "preempted"])
def test_what_was_lost_is_not_saved(first: str) -> None:
    """A rewrite failed while it wrote, or a load; vLLM sets the request back, and preempts it before that is done."""
    target, request = half(), Request("r", [1] * 9)
    target.add(request)
    number = run(target, request, 9).number
    preempted = scheduled({}, preempted=(request,))
    if first == "lost":
        target.lose([2], number)
    request.num_computed_tokens, blocks, request.blocks = 0, request.blocks, []
    plan = target.build(preempted)
    if first == "preempted":
        assert [save.request_id for save in plan.save] == ["r"]
        target.lose([2], number)
        plan = target.build(scheduled({}))
        assert plan.drop == ["r"]
    assert plan.save == []
    assert target.restorable(request) == 0
    request.blocks = blocks
    plan = run(target, request, 9)
    assert plan.restore == []
    assert target.skipped["computed again"] == 1
    target.lose([7], plan.number)  # nobody's
    target.lose([2], number)  # another's at that time
    request.num_computed_tokens = 0
    assert [save.length for save in target.build(preempted).save] == [9]


def test_what_another_loses_later_stays_saved() -> None:
    """Blocks change hands: a save holds what was in them before."""
    target, first, second = half(), Request("a", [1] * 5), Request("b", [1] * 5)
    target.add(first)
    run(target, first, 5)
    first.num_computed_tokens, blocks, first.blocks = 0, first.blocks, []
    assert [save.request_id for save in target.build(scheduled({}, preempted=(first,))).save] == ["a"]
    first.all_token_ids.append(1)
    target.add(second)
    second.blocks = blocks
    target.lose(blocks, run(target, second, 5).number)
    assert target.build(scheduled({})).drop == []
    assert target.restorable(first) == 5


@pytest.mark.parametrize("how", ["fails", "is ended", "is answered"])
def test_a_prompt_that_was_filled_in_is_known_when_that_has_succeeded(how: str) -> None:
    """With a step in flight its further blocks are kept before anybody knows of the load they were computed from."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=16))
    first, second, third = Request("a", [1] * 15), Request("b", [1] * 20), Request("c", [1] * 20)
    target.add(first)
    run(target, first, 15)
    first.all_token_ids.append(1)
    assert len(run(target, first, 1).keep) == 2
    target.add(second)
    assert target.restorable(second) == 8
    second.num_computed_tokens, second.blocks = 8, [10, 11, 12, 13, 14, 15]
    filled = run(target, second, 12)
    assert len(filled.fill) == 2
    keep = run(target, second, 1).keep  # its first token is in flight
    assert [block for _, block in keep] == [12]
    target.add(third)
    assert target.restorable(third) == 8
    if how == "fails":
        target.lose([11], filled.number)
        second.num_computed_tokens = 4
    if how == "is ended":
        target.finish("b")
    if how == "is answered":
        second.all_token_ids.append(1)
        plan = run(target, second, 1)
        assert plan.forget == []
        target.finish("b")
        assert target.restorable(third) == 12
    else:
        plan = target.build(scheduled({}))
        assert plan.forget == [keep[0][0]]
        assert target.restorable(third) == 8
        assert len(target.prompts) == 2


def test_preemption_saves_and_restores() -> None:
    target, request = half(), Request("r", [1] * 5)
    target.add(request)
    run(target, request, 5)
    assert target.restorable(request) == 0
    request.num_computed_tokens = 0
    plan = target.build(scheduled({}, (request,)))
    assert plan == Plan(2, save=[Transfer("r", 0, 5, (0, 1))], unmap=[0, 1])
    assert not plan.precedes_forward
    assert target.restorable(request) is None  # the token of the last position is on its way
    request.all_token_ids.append(NEWLINE)
    assert target.restorable(request) == 5
    request.num_computed_tokens, request.blocks = 5, [7, 8]
    plan = run(target, request, 1)
    assert plan.restore == [Transfer("r", 0, 5, (7, 8))]
    assert plan.rewrite == [Rewrite(0, 0, 5, None, (7, 8))]
    assert target.restorable(request) == 0


def test_what_ends_while_saved_is_dropped_once() -> None:
    target, request = half(), Request("r", [1] * 5)
    target.add(request)
    run(target, request, 5)
    target.build(scheduled({}, (request,)))
    target.finish("r")
    target.finish("r")
    assert target.is_idle
    assert target.build(scheduled({})) == Plan(3, drop=["r"])
    assert target.build(scheduled({})) == Plan(4)


def test_the_limit_of_saves() -> None:
    """Nine tokens fit, and not the five of another; what is not saved is computed again and counted."""
    target = half(max_saved_tokens=9)
    requests = [Request("a", [1] * 5), Request("b", [1] * 9)]
    for i, request in enumerate(requests):
        target.add(request)
        request.blocks = [10 * i + j for j in range(3)]
    target.build(scheduled({requests[0]: 5, requests[1]: 9}))
    plan = target.build(scheduled({}, (requests[1],)))
    assert [save.request_id for save in plan.save] == ["b"]
    assert target.build(scheduled({}, (requests[0],))).save == []
    assert target.restorable(requests[0]) == 0
    requests[0].all_token_ids.append(1)
    assert run(target, requests[0], 6).rewrite == []
    assert target.skipped == {"computed again": 1}
    requests[0].all_token_ids.append(1)
    assert run(target, requests[0], 1).rewrite == [Rewrite(0, 0, 6, None, (0, 1))]  # prompt and token: one step


def test_a_forgotten_cache_is_not_restored() -> None:
    """vLLM drops the output in flight where it wants caches forgotten: a save would be stale, and wait for ever."""
    target, request = half(), Request("r", [1] * 5)
    target.add(request)
    run(target, request, 5)
    request.drop_stale_output = True
    assert target.build(scheduled({}, (request,))) == Plan(2, unmap=[0, 1])
    assert target.restorable(request) == 0


def test_a_save_that_vllm_does_not_ask_for_is_not_restored() -> None:
    """It computes a request with prompt log-probabilities again, also one that was preempted in its first chunk."""
    target, request = half(), Request("r", [1] * 9)
    target.add(request)
    run(target, request, 5)
    request.num_computed_tokens = 0
    assert len(target.build(scheduled({}, (request,))).save) == 1
    plan = run(target, request, 3)
    assert plan.restore == []
    assert plan.drop == ["r"]
    target.finish("r")
    assert target.is_idle


def test_what_ends_in_its_first_chunk_leaves_nothing() -> None:
    target, request = half(), Request("r", [1] * 5)
    target.add(request)
    run(target, request, 3)
    target.finish("r")
    assert target._detector._rows == {}


def test_prompts_that_begin_alike() -> None:
    """Two blocks of 4 precede the last 6 of 16 positions; they are kept before the rewrite, and filled in."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=8))
    first, second = (Request(name, [1] * 12 + [i] * 4) for i, name in enumerate("ab"))
    target.add(first)
    assert target.restorable(first) == 0
    run(target, first, 16)
    first.all_token_ids.append(1)
    plan = run(target, first, 1)
    keys = [key for key, _ in plan.keep]
    assert [block for _, block in plan.keep] == [0, 1]
    assert plan.precedes_forward
    assert len(plan.rewrite) == 1
    target.add(second)
    second.num_computed_tokens, second.blocks = target.restorable(second), [10, 11, 12, 13]
    assert second.num_computed_tokens == 8
    plan = run(target, second, 8)
    assert plan.fill == [(keys[0], 10), (keys[1], 11)]
    second.all_token_ids.append(1)
    assert run(target, second, 1).keep == []


@pytest.mark.parametrize(
    ("first", "second"),
    [(("sql", "/adapters/v1"), ("sql", "/adapters/v2")), (("sql", "/adapters/v1"), ("law", "/adapters/v1"))],
)
def test_a_kept_prompt_is_of_one_adapter(first: tuple[str, str], second: tuple[str, str]) -> None:
    """A name may be given to other weights: vLLM's own prefix caching goes by name and path."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=8))

    def asked(name: str, adapter: tuple[str, str]) -> Request:
        lora_request = SimpleNamespace(lora_name=adapter[0], lora_path=adapter[1])
        return Request(name, [1] * 16, lora_request=lora_request, blocks=[0, 1, 2, 3])

    request = asked("kept", first)
    target.add(request)
    run(target, request, 16)
    assert len(run(target, request, 1).keep) == 2
    for name, adapter, known in (("again", first, 8), ("other", second, 0)):
        target.add(asked(name, adapter))
        assert target.restorable(asked(name, adapter)) == known


def test_a_prompt_that_is_pushed_out_and_comes_back_in_one_step() -> None:
    """Workers keep, then forget: what is back must not be among what is forgotten."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=8))
    texts = {"a": [1] * 16, "b": [2] * 16, "c": [1] * 16}
    kept: set[bytes] = set()
    requests = []
    for i, (name, prompt) in enumerate(texts.items()):
        request = Request(name, prompt, blocks=list(range(8 * i, 8 * i + 5)))
        target.add(request)
        if name == "a":
            target.build(scheduled({request: 16}))
            request.num_computed_tokens = 16
            plan = target.build(scheduled({request: 1}))
            kept = {key for key, _ in plan.keep}
        requests.append(request)
    target.build(scheduled({requests[1]: 16, requests[2]: 16}))
    for request in requests[1:]:
        request.num_computed_tokens = 16
    plan = target.build(scheduled({requests[1]: 1, requests[2]: 1}))
    assert {key for key, _ in plan.keep} >= kept
    assert not kept & set(plan.forget)
    assert len(plan.forget) == 2


def test_a_prompt_that_a_worker_lost() -> None:
    """It is known no longer, other workers forget it, and it may come back, also in the step that tells them."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=16))
    first, second, third = (Request(name, [1] * 12 + [i] * 4) for i, name in enumerate("abc"))
    target.add(first)
    run(target, first, 16)
    kept = [key for key, _ in run(target, first, 1).keep]
    target.add(second)
    assert target.restorable(second) == 8
    target.forget_prompts({kept[1], b"of another time"})
    assert target.restorable(second) == 4
    second.num_computed_tokens = 4
    plan = run(target, second, 12)
    assert plan.forget == [kept[1]]
    assert [key for key, _ in plan.fill] == kept[:1]
    target.forget_prompts({kept[0]})
    second.all_token_ids.append(1)
    plan = run(target, second, 1)
    assert [key for key, _ in plan.keep] == kept
    assert plan.forget == []
    target.add(third)
    assert target.restorable(third) == 8


def test_a_reset_that_raises() -> None:
    """vLLM has preempted all by then, and has not reached us: nothing is saved, kept prompts go on, and so may we."""
    target = half(options=ServerOptions(processor="somewhere", prompt_cache_tokens=8))
    request = Request("r", [1] * 16)
    target.add(request)
    run(target, request, 16)
    kept = [key for key, _ in run(target, request, 1).keep]  # its token is still in flight
    request.drop_stale_output, request.num_computed_tokens, request.blocks = True, 0, []
    plan = target.build(scheduled({}, preempted=(request,)))
    assert (plan.save, plan.drop, plan.forget, plan.rewrite) == ([], [], [], [])
    assert sorted(target._free_rows) == list(range(4))
    assert len(target.prompts) == len(kept) == 2
    assert not target._saved_tokens
    # It is computed again, all of it; then the reset is called again, when nothing runs.
    assert target.restorable(request) == 0
    assert run(target, request, 16).fill == []
    run(target, request, 1)
    target.finish("r")
    target.reset()
    plan = target.build(scheduled({}))
    assert sorted(plan.forget) == sorted(kept)
    assert target.is_idle
    assert len(target.prompts) == 0


def test_rows_that_run_out_do_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    target, requests = half(num_rows=1), [Request("a", [1] * 5), Request("b", [1] * 5)]
    for i, request in enumerate(requests):
        target.add(request)
        request.blocks = [2 * i, 2 * i + 1]
    assert target.build(scheduled(dict.fromkeys(requests, 5))) == Plan(1, map=[(0, 0), (1, 1)])
    assert target.skipped == {"no query row": 1}
    assert "no query row is free for request b" in caplog.text
    for request in requests:
        request.num_computed_tokens = 5
        request.all_token_ids.append(1)
    assert [r.row for r in target.build(scheduled(dict.fromkeys(requests, 1))).rewrite] == [0]
    for request_id in "ab":
        target.finish(request_id)
    assert target.is_idle


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request("r", [1], {"bottlenecked_rewrite": 0}), "off by request"),
        (Request("r", None, prompt_embeds=object()), "prompt embeddings or streaming input"),
        (Request("r", [1], prompt_embeds=object()), "prompt embeddings or streaming input"),
        (Request("r", [1], resumable=True), "prompt embeddings or streaming input"),
    ],
)
def test_what_is_not_rewritten_is_counted(request_: Request, reason: str) -> None:
    target = half()
    target.add(request_)
    assert target.skipped == {reason: 1}
    assert target.restorable(request_) == 0
    assert run(target, request_, 1) == Plan(1)
    assert target.is_idle


def test_pooling_requests_are_left_alone() -> None:
    target = half()
    target.add(SimpleNamespace(request_id="r", sampling_params=None))
    assert target.is_idle
    assert not target.skipped


def test_a_server_that_is_off() -> None:
    target = half(options=ServerOptions(processor="somewhere", rewrite=False))
    target.add(Request("a", [1]))
    assert target.skipped == {"off by default": 1}
    target.add(Request("b", [1], {"kv_transfer_params": {"bottlenecked_rewrite": True}}))
    assert not target.is_idle


def test_an_unusable_option_is_told_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    target = half()
    target.add(Request("r", [1], {"bottlenecked_top_k": TOP_K + 1}))
    assert not target.is_idle
    assert target.skipped == {"unusable request option": 1}
    assert f"request r: bottlenecked_top_k is {TOP_K + 1}, but it must be an integer from 0 to {TOP_K}" in caplog.text


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, (True, 3)),
        ({}, (True, 3)),
        ({"other": 1}, (True, 3)),
        ({"bottlenecked_rewrite": False}, (False, 3)),
        ({"bottlenecked_rewrite": 0}, (False, 3)),
        ({"bottlenecked_rewrite": 1, "bottlenecked_top_k": 0}, (True, 0)),
        ({"kv_transfer_params": {"bottlenecked_rewrite": False, "bottlenecked_top_k": 5}}, (False, 5)),
        ({"kv_transfer_params": None}, (True, 3)),
        ({"kv_transfer_params": {"bottlenecked_top_k": 1}, "bottlenecked_top_k": 2}, (True, 1)),
    ],
)
def test_request_options(extra_args: dict[str, Any] | None, expected: tuple[bool, int]) -> None:
    server = ServerOptions(processor="somewhere", top_k=3)
    assert RequestOptions.of(extra_args, server, 5) == (RequestOptions(*expected), "")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rewrite", "no", "bottlenecked_rewrite is 'no', but it must be true, false, 1 or 0"),
        ("rewrite", 2, "bottlenecked_rewrite is 2, but"),
        ("rewrite", None, "bottlenecked_rewrite is None, but"),
        ("rewrite", [0], r"bottlenecked_rewrite is \[0\], but"),
        ("top_k", 6, "bottlenecked_top_k is 6, but it must be an integer from 0 to 5"),
        ("top_k", -1, "bottlenecked_top_k is -1, but"),
        ("top_k", True, "bottlenecked_top_k is True, but"),
        ("top_k", 2.0, "bottlenecked_top_k is 2.0, but"),
        ("top_k", "2", "bottlenecked_top_k is '2', but"),
    ],
)
def test_a_wrong_request_option_is_left_out(name: str, value: Any, sentence: str) -> None:
    options, wrong = RequestOptions.of({f"bottlenecked_{name}": value}, SERVER, 5)
    assert options == RequestOptions(True, None)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        raise ValueError(wrong)


def test_server_options() -> None:
    assert ServerOptions.from_extra_config({"processor": "p"}) == ServerOptions(processor="p")
    given: dict[str, Any] = {
        "processor": "p", "rewrite": False, "top_k": 0, "weight_dtype": "bfloat16", "max_saved_tokens": 0,
        "check_weights": False, "max_relative_edit": 0.5,
    }  # fmt: skip
    assert ServerOptions.from_extra_config(given) == ServerOptions(**given)
    assert ServerOptions.from_extra_config({"processor": "p", "top_k": None}).top_k is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, 'lacks "processor", the directory of a Processor: `bottlenecked init` makes one'),
        ({"processor": None}, 'lacks "processor"'),
        ({"processor": 3}, 'lacks "processor"'),
        ({"processor": "p", "topk": 3}, "has the key 'topk'; those of bottlenecked are processor, rewrite, top_k"),
        ({"processor": "p", "rewrite": 1}, ": rewrite is 1, but it must be true or false"),
        ({"processor": "p", "check_weights": "no"}, ": check_weights is 'no', but it must be true or false"),
        ({"processor": "p", "top_k": -1}, ": top_k is -1, but it must be null or an integer of 0 or more"),
        ({"processor": "p", "top_k": True}, ": top_k is True, but"),
        ({"processor": "p", "max_saved_tokens": 1.5}, ": max_saved_tokens is 1.5, but it must be null or an integer"),
        ({"processor": "p", "weight_dtype": "int8"}, ": weight_dtype is 'int8', but it must be 'auto' or 'float32'"),
        ({"processor": "p", "weight_dtype": None}, ": weight_dtype is None, but"),
        ({"processor": "p", "max_relative_edit": 0}, ": max_relative_edit is 0, but it must be null or a positive"),
        ({"processor": "p", "max_relative_edit": "1"}, ": max_relative_edit is '1', but"),
    ],
)
def test_wrong_server_options(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        ServerOptions.from_extra_config(values)
    assert str(error.value).startswith("kv_connector_extra_config")
    assert sentence in str(error.value)
