"""The half beside vLLM's scheduler: detects the ends of steps and says what the workers have to do before a forward.

`build` runs when vLLM has scheduled a step and before its counters advance: the KV of every position below a request's
`num_computed_tokens` is written by the forwards before, and their tokens are known, also under asynchronous
scheduling. Each running request that is rewritten owns a *row*: `pages_per_row` pages of every layer's query cache,
into which blocks of the last `recent_window` positions are mapped as they come and go (block j of a sequence has page
j % pages_per_row of its row).

A preempted request loses its blocks. Computing it again would lose its rewrites, so workers save its keys, values and
queries, and put them back into the blocks it is given later; meanwhile it owns no row.

Nothing here may raise: it would stop the engine.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...boundary import BoundaryDetector
from ...config import CacheProcessorConfig
from .options import RequestOptions, ServerOptions
from .prompts import PromptIndex, block_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewrite:
    """The step [step_begin, step_end) of one request has ended: see BoundaryEvent. blocks: its block table."""

    row: int
    step_begin: int
    step_end: int
    top_k: int | None
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Transfer:
    """Save or restore positions [0, length) of a request: keys and values in blocks, queries in the pages of row."""

    request_id: str
    row: int
    length: int
    blocks: tuple[int, ...]


@dataclass
class Plan:
    """What workers do before one forward, in this order.

    number: plans are counted, so that workers can say which one failed. drop: saved requests to forget. save: before
    their blocks are written by others. unmap: blocks that have no query page any more; map: (block, page). restore:
    into the new blocks. fill: blocks of known prompts, and keep: blocks of new ones, as (key, block), see prompts.py;
    forget: keys. rewrite: at most one step a request.
    """

    number: int = 0
    drop: list[str] = field(default_factory=list)
    save: list[Transfer] = field(default_factory=list)
    unmap: list[int] = field(default_factory=list)
    map: list[tuple[int, int]] = field(default_factory=list)
    restore: list[Transfer] = field(default_factory=list)
    fill: list[tuple[bytes, int]] = field(default_factory=list)
    keep: list[tuple[bytes, int]] = field(default_factory=list)
    forget: list[bytes] = field(default_factory=list)
    rewrite: list[Rewrite] = field(default_factory=list)

    @property
    def precedes_forward(self) -> bool:
        """Whether the coming forward reads what this writes into the KV cache."""
        return bool(self.restore or self.fill or self.keep or self.rewrite)


@dataclass
class _Tracked:
    """A request that is rewritten. prompt_length: of step 0. announced: positions the detector knows of. keys: of the
    prompt's blocks that may be known. filled: its first blocks came from workers. on_trial: keys that were kept before
    it was known whether workers had them. lost: not all that is written can be used, and vLLM will compute it again."""

    request: Any
    sequence: int
    top_k: int | None
    prompt_length: int
    keys: list[bytes]
    announced: int = 0
    row: int = -1  # none: not running
    written: int = 0  # positions whose KV is written once the scheduled forwards are done
    blocks: tuple[int, ...] = ()
    since: list[int] = field(default_factory=list)  # by block, the number of the first plan in which it was this one's
    pages: dict[int, int] = field(default_factory=dict)  # of mapped blocks
    saved: bool = False
    saved_by: int = 0  # the number of the plan
    filled: bool = False
    on_trial: list[bytes] = field(default_factory=list)
    lost: bool = False


class SchedulerHalf:
    """State of all unfinished requests that are rewritten.

    config: of the Processor. line_ending_ids: tokens that end a step. block_size: positions in a block. num_rows: how
    many requests run at once. max_saved_tokens: see ServerOptions.
    """

    def __init__(
        self,
        config: CacheProcessorConfig,
        options: ServerOptions,
        *,
        line_ending_ids: Iterable[int],
        block_size: int,
        num_rows: int,
        max_saved_tokens: int,
    ) -> None:
        self.config = config
        self.options = options
        self.block_size = block_size
        self.pages_per_row = pages_per_row(config.recent_window, block_size)
        self.max_saved_tokens = max_saved_tokens
        self.prompts = PromptIndex(options.prompt_cache_tokens // block_size)
        self.skipped: Counter[str] = Counter()
        self._detector = BoundaryDetector(
            config.boundary, rewrite_prompt=config.rewrite_prompt, token_ids=line_ending_ids
        )
        self._tracked: dict[str, _Tracked] = {}
        self._free_rows = list(range(num_rows))[::-1]
        self._saved_tokens = 0
        self._next_sequence = 0
        self._next_plan = Plan(number=1)

    @property
    def is_idle(self) -> bool:
        """Nothing is held for any request."""
        return not self._tracked and not self._saved_tokens

    def add(self, request: Any) -> None:
        """A request has arrived: vLLM's Request."""
        parameters = request.sampling_params
        if parameters is None:
            return  # pooling
        options, wrong = RequestOptions.of(parameters.extra_args, self.options, self.config.top_k)
        if wrong:
            logger.warning("request %s: %s; the server's setting is used", request.request_id, wrong)
            self.skipped["unusable request option"] += 1
        if not options.rewrite:
            self.skipped["off by request" if self.options.rewrite else "off by default"] += 1
            return
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            self.skipped["prompt embeddings or streaming input"] += 1
            return
        keys = self._keys(request) if self.prompts.max_blocks else []
        self._tracked[request.request_id] = _Tracked(
            request, self._next_sequence, options.top_k, request.num_prompt_tokens, keys
        )
        self._next_sequence += 1

    def _keys(self, request: Any) -> list[bytes]:
        """Of the whole blocks before the prompt's last window."""
        if request.mm_features:
            return []
        lora = request.lora_request
        # A name may be given to other weights: by name and path, as vLLM's own prefix caching.
        adapter = (lora.lora_name, lora.lora_path) if lora is not None else None
        tokens = request.prompt_token_ids[: max(0, request.num_prompt_tokens - self.config.recent_window)]
        return block_keys(tokens, self.block_size, repr((request.cache_salt, adapter)))

    def restorable(self, request: Any) -> int | None:
        """Positions of a waiting request that workers can restore: of one that was saved, or a known prompt's.

        None: wait. A token whose KV is written may still be on its way to the scheduler; until it is there, the request
        has no token left to compute.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or (not tracked.saved and tracked.announced):
            return 0
        if not tracked.saved:
            return self.prompts.match(tracked.keys) * self.block_size
        return tracked.written if tracked.written < request.num_tokens else None

    def finish(self, request_id: str) -> None:
        """A request has ended, however: nothing is kept of it here, and after the next step nothing in workers."""
        self._remove(request_id, self._next_plan)

    def forget_prompts(self, keys: Iterable[bytes]) -> None:
        """A worker could not keep these blocks; others did. What is scheduled already is told by the worker."""
        self._next_plan.forget += self.prompts.discard(keys)

    def lose(self, blocks: Collection[int], number: int) -> None:
        """What these blocks hold cannot be used: a rewrite or a load of the plan of this number failed.

        vLLM ends their requests, or sets them back, and may preempt them before they are computed again. One that it
        has preempted meanwhile was saved with them, and what was kept of a prompt meanwhile was computed from them.
        """
        failed = set(blocks)
        for tracked in self._tracked.values():
            pairs = zip(tracked.blocks, tracked.since, strict=False)
            if all(block not in failed or since > number for block, since in pairs):
                continue
            tracked.lost = tracked.row >= 0
            self._settle(tracked, self._next_plan, right=False)
            if tracked.saved_by > number:
                self._forget_saved(tracked, self._next_plan)

    def reset(self) -> None:
        """Weights may have changed: what is saved of preempted requests and kept of prompts is forgotten."""
        for tracked in self._tracked.values():
            self._forget_saved(tracked, self._next_plan)
        self._next_plan.forget += self.prompts.clear()

    def build(self, scheduled: Any) -> Plan:
        """What has to precede the forward of vLLM's SchedulerOutput. Blocks are those the forward will use."""
        plan = self._next_plan
        self._next_plan = Plan(number=plan.number + 1)
        for request_id in scheduled.preempted_req_ids or ():
            if (tracked := self._tracked.get(request_id)) is not None:
                self._preempt(tracked, plan)
        for request_id, count in scheduled.num_scheduled_tokens.items():
            if (tracked := self._tracked.get(request_id)) is not None:
                blocks = scheduled.kv_connector_block_state.get_block_ids(request_id)[0]
                self._advance(tracked, count, tuple(blocks), plan)
        return plan

    def _advance(self, tracked: _Tracked, count: int, blocks: tuple[int, ...], plan: Plan) -> None:
        """The coming forward writes `count` positions of this request."""
        request_id, length = tracked.request.request_id, tracked.request.num_computed_tokens
        if length < tracked.written:
            # Its KV is computed again, without rewrites: all of it is one step then, as if it had come as a prompt.
            self._forget_saved(tracked, plan)
            if tracked.announced:
                self._detector.drop(tracked.sequence)
            tracked.announced, tracked.prompt_length, tracked.lost = 0, tracked.request.num_tokens, False
            self.skipped["computed again"] += 1
        starts = tracked.row < 0
        if starts:
            if not self._free_rows:
                logger.error("no query row is free for request %s: it is served without rewrites", request_id)
                self._remove(request_id, plan)
                self.skipped["no query row"] += 1
                return
            tracked.row = self._free_rows.pop()
            tracked.since = []
        if tracked.saved:
            plan.restore.append(Transfer(request_id, tracked.row, tracked.written, blocks))
            self._saved_tokens -= tracked.written
            tracked.saved = False
        elif starts and tracked.announced == 0:
            known = tracked.keys[: length // self.block_size]
            plan.fill += zip(known, blocks, strict=False)
            self.prompts.use(known)
            tracked.filled = bool(known)
        event = self._announce(tracked, length)
        if event is not None:
            used = blocks[: -(-length // self.block_size)]
            plan.rewrite.append(Rewrite(tracked.row, event.step_begin, event.step_end, tracked.top_k, used))
        # Where the token after the prompt is here, so is what became of the loads before it.
        answered = tracked.request.num_tokens > tracked.prompt_length
        if tracked.on_trial and answered:
            self._settle(tracked, plan, right=True)
        if tracked.keys and length >= tracked.prompt_length:
            trial = tracked.sequence if tracked.filled and not answered else None
            new, gone = self.prompts.keep(tracked.keys, trial)
            plan.keep += [(tracked.keys[i], blocks[i]) for i in new]
            # Workers keep before they forget: what another request of this step pushed out may be back.
            plan.forget = [key for key in plan.forget if key not in self.prompts] + gone
            tracked.on_trial = [tracked.keys[i] for i in new] if trial is not None else []
            tracked.keys = []
        tracked.written = length + count
        tracked.blocks = blocks
        tracked.since += [plan.number] * (len(blocks) - len(tracked.since))
        self._map(tracked, plan)

    def _announce(self, tracked: _Tracked, length: int) -> Any:
        """Tells the detector of all positions below length; returns the step that ends there."""
        if length == 0:
            return None
        if tracked.announced == 0:
            self._detector.start(tracked.sequence)
        in_prompt = min(length, tracked.prompt_length) - tracked.announced
        if in_prompt > 0:
            self._detector.prompt(tracked.sequence, in_prompt)
            tracked.announced += in_prompt
        if tracked.announced < tracked.prompt_length:
            return None
        for position in range(tracked.announced, length):
            if self._detector.decode(tracked.sequence, tracked.request.all_token_ids[position]) is not None:
                self.skipped["several tokens at once"] += 1  # the step ended before the last of them
        tracked.announced = length
        return self._detector.due(tracked.sequence)

    def _map(self, tracked: _Tracked, plan: Plan) -> None:
        """Query pages for the blocks of the last recent_window positions."""
        first = max(0, tracked.written - self.config.recent_window) // self.block_size
        last = (tracked.written - 1) // self.block_size
        begin = tracked.row * self.pages_per_row
        wanted = {tracked.blocks[j]: begin + j % self.pages_per_row for j in range(first, last + 1)}
        plan.unmap += [block for block, page in tracked.pages.items() if wanted.get(block) != page]
        plan.map += [(block, page) for block, page in wanted.items() if tracked.pages.get(block) != page]
        tracked.pages = wanted

    def _settle(self, tracked: _Tracked, plan: Plan, *, right: bool) -> None:
        """Whether what was kept of this prompt on trial was computed from what it should be."""
        plan.forget += self.prompts.settle(tracked.on_trial, tracked.sequence, right=right)
        tracked.on_trial = []

    def _remove(self, request_id: str, plan: Plan) -> None:
        """Nothing of this request is kept but its prompt, and that not where nobody knows yet whether it is right."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return
        self._settle(tracked, plan, right=False)
        self._leave(tracked, plan)
        self._forget_saved(tracked, plan)
        if tracked.announced:
            self._detector.drop(tracked.sequence)

    def _preempt(self, tracked: _Tracked, plan: Plan) -> None:
        if tracked.row < 0:
            return
        # Where vLLM wants the cache forgotten (reset_prefix_cache) it drops what was sampled meanwhile: a save would
        # hold a position whose token never comes.
        forgotten = tracked.lost or getattr(tracked.request, "drop_stale_output", False)
        if not forgotten and self._saved_tokens + tracked.written <= self.max_saved_tokens:
            plan.save.append(Transfer(tracked.request.request_id, tracked.row, tracked.written, tracked.blocks))
            self._saved_tokens += tracked.written
            tracked.saved, tracked.saved_by = True, plan.number
        elif not forgotten:
            logger.warning(
                "request %s is preempted and not saved: %d tokens are saved, and max_saved_tokens is %d",
                tracked.request.request_id,
                self._saved_tokens,
                self.max_saved_tokens,
            )
        self._leave(tracked, plan)

    def _leave(self, tracked: _Tracked, plan: Plan) -> None:
        """Gives row and pages back."""
        plan.unmap += tracked.pages
        tracked.pages = {}
        if tracked.row >= 0:
            self._free_rows.append(tracked.row)
            tracked.row = -1

    def _forget_saved(self, tracked: _Tracked, plan: Plan) -> None:
        if not tracked.saved:
            return
        self._saved_tokens -= tracked.written
        tracked.saved = False
        # What this very step would have saved and dropped is not saved at all.
        kept = [save for save in plan.save if save.request_id != tracked.request.request_id]
        if len(kept) == len(plan.save):
            plan.drop.append(tracked.request.request_id)
        plan.save = kept


def pages_per_row(recent_window: int, block_size: int) -> int:
    """Query pages of a row: blocks that recent_window positions may touch."""
    return -(-recent_window // block_size) + 1
