"""Hugging Face transformers 5: rewrite the KV cache during plain `model.generate(...)`.

    with attach(model, processor, tokenizer) as attachment:
        model.generate(**inputs)
    print(attachment.stats)

How it works. `generate` calls the model's `prepare_inputs_for_generation` before every forward, outside any
compiled graph, when the cache holds the KV of every token but the coming one: that is where steps end and
caches are rewritten (arXiv 2505.16950, section 3). An attention function under a name of our own keeps each token's
post-RoPE query for a ring of the last `recent_window` queries, then calls the attention the model had. Where it writes
them travels as keyword arguments of `forward`, so nothing is stored on modules and a compiled graph sees plain inputs.

A prompt's queries go into the ring layer by layer. Those of a decoded token are gathered and written together by the
last layer, since a launch costs more than the copy. A StaticCache counts its positions on the device, and its counter
says where in the ring they belong: so the forward puts them there, a graph of it too, and the host has nothing to do
with them. A DynamicCache has no such counter: its queries always go to the same place, from which the next call of
`prepare_inputs_for_generation` moves them into the ring. On a GPU, where the device waits for the host between two
tokens, an ordinary token of a StaticCache costs one small copy of the new ids to the host, which runs while inputs are
prepared, and none where the caller tells them; the counter is read only where something may have changed it; rewrites
are enqueued and not waited for; and what a forward reads and writes keeps its address, so that CUDA graphs may hold it.

Every generation's state belongs to its cache object and goes with it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bottleneck_ext import InvalidArgumentError, UnsupportedError

from ..backbones import describe, kv_cache, model_weights_hash, rope_parameters
from ..boundary import BoundaryDetector, BoundaryEvent, newline_token_ids
from ..config import CacheProcessorConfig
from ..processor import EDIT_TOO_LARGE, check_max_relative_edit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    import bottleneck_ext

    from ..processor import BoundCache, CacheProcessor, RewriteReport

__all__ = ["Attachment", "AttachmentStats", "attach"]

_PREFIX = "bottlenecked_"
_REQUEST = "bottlenecked_request"
_TOKENS = "bottlenecked_tokens"  # what loops of one's own may tell, see Attachment._replace
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
# Keyword arguments with which an attention function computes something else than softmax(scale * q k).
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias")

_NO_CACHE = "use_cache=False leaves no KV cache to rewrite: leave use_cache on, or detach first"
_NO_IDS = "inputs_embeds hides the token ids that end a step: pass input_ids, or detach first"
_ABSENT: Any = object()

# How many attached models use each attention name: transformers' registries are global, so is their upkeep.
_registered: Counter[str] = Counter()
_registry_lock = threading.Lock()


@dataclass
class AttachmentStats:
    """Counted since `attach`, over all `generate` calls.

    boundaries: steps whose KV was rewritten.
    rewrites: calls that did it; one serves all rows whose steps end with the same forward.
    sequences: boundaries by row of the batch; on a GPU without on_boundary, those with too large an edit included.
    seconds: by stage as the Processor reports them (summed over threads), and "total", wall clock of the calls. On a
        GPU stages are known only where on_boundary is given; without it "total" is the host's time to enqueue, and the
        device works on after that.
    skipped: steps that ended and were not rewritten, by reason.
    """

    boundaries: int = 0
    rewrites: int = 0
    sequences: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def attach(
    model: PreTrainedModel,
    processor: CacheProcessor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_threads: int | None = None,
    on_boundary: Callable[[RewriteReport], None] | None = None,
    check_weights: bool = True,
    max_relative_edit: float | None = None,
) -> Attachment:
    """Let `processor` rewrite the KV cache of `model` at every step's end (arXiv 2505.16950, section 3).

    From here on `model.generate`, pipelines and streamers work as before: greedy or sampled, left-padded
    batches, DynamicCache or StaticCache, compiled or not, and with a kept cache passed to a later call. Use
    the result as a context manager, or call its `detach()`.

    model: a decoder-only model in float32, float16 or bfloat16, with "sdpa" or "eager" attention in every layer,
        all of it on the device of the Processor's backend.
    processor: made for a backbone of this shape.
    tokenizer: needed where the Processor's rule is "newline" and its checkpoint lists no token ids.
    num_threads: for a rewrite on the CPU; None means torch.get_num_threads() at each generation's start.
    on_boundary: called after each rewrite with its report, before the next forward; positions are cache
        positions, so the first token of a left-padded row is at its event's `sequence_begin`. On a GPU each rewrite
        is then waited for; without it a rewrite that the device refused is raised by a later one, or when `generate`
        ends.
    check_weights: False accepts a Processor made for the same architecture with other weights.
    max_relative_edit: a step whose edit is larger than this, relative to its rows in any layer, or not finite, is left
        as it is and counted in `stats.skipped`; on a GPU without on_boundary it is counted by a later rewrite, or when
        `generate` ends. None: no limit, and an edit that is not finite is an error.

    Raises UnsupportedError for a model that cannot be served, and InvalidArgumentError where model, processor
    and tokenizer do not fit together. `generate` raises the same two, before its first forward, for what it
    cannot do while attached: beams, assisted decoding, `use_cache=False`, `inputs_embeds`, other caches, an
    empty prompt.
    """
    return Attachment(model, processor, tokenizer, num_threads, on_boundary, check_weights, max_relative_edit)


class Attachment:
    """What `attach` returns. `stats` counts; `detach` (or leaving the `with` block) restores the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: CacheProcessor,
        tokenizer: PreTrainedTokenizerBase | None,
        num_threads: int | None,
        on_boundary: Callable[[RewriteReport], None] | None,
        check_weights: bool,
        max_relative_edit: float | None = None,
    ) -> None:
        if num_threads is not None and (isinstance(num_threads, bool) or num_threads < 1):
            raise InvalidArgumentError(f"num_threads is {num_threads!r}, but it must be a positive integer")
        check_max_relative_edit(max_relative_edit)
        self._device = _device_of(processor)
        self._device_type = self._device.type  # asked for at every token
        attention = _check_model(model, self._device)
        _check_fit(model, attention, processor.config, check_weights)
        self.model = model
        self.processor = processor
        self.stats = AttachmentStats()
        self._num_threads = num_threads
        self._on_boundary = on_boundary
        self._max_relative_edit = max_relative_edit
        self._softmax_scale = float(attention[0].scaling)
        self._line_ending_ids = _line_ending_ids(model, processor.config, tokenizer)
        self._states: weakref.WeakKeyDictionary[Cache, _State] = weakref.WeakKeyDictionary()
        # Of stats, and of all but a look-up in _states: streamers run `generate` in threads.
        self._lock = threading.Lock()
        self._name = _register(model, attention[0])
        self._previous = model.config._attn_implementation
        self._replaced: dict[str, Any] = {}
        self._attached = True
        try:
            model.set_attn_implementation(self._name)
            if any(module.config._attn_implementation != self._name for module in attention):
                raise UnsupportedError(f"{type(model).__name__} does not let its attention be replaced")
            self._replace()
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model. Rewritten caches stay rewritten; a second call does nothing."""
        if not self._attached:
            return
        self._attached = False
        for name, value in self._replaced.items():
            self.model.__dict__.pop(name, None)
            if value is not _ABSENT:
                self.model.__dict__[name] = value
        self.model.set_attn_implementation(self._previous)
        _unregister(self._name)
        self._states.clear()

    def _replace(self) -> None:
        """Put our methods before the model's, on the instance only, remembering what was there."""
        model = self.model
        prepare = model.prepare_inputs_for_generation
        generate = model.generate
        on_gpu = self._device.type != "cpu"

        @functools.wraps(prepare)
        def prepare_and_rewrite(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            request, tokens = kwargs.pop(_REQUEST, None), kwargs.pop(_TOKENS, None)
            copying = None
            if on_gpu and tokens is None:
                copying = self._copy_tokens(input_ids, kv_cache(kwargs))
            inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
            self._before_forward(inputs, request, kwargs, tokens, copying)
            return inputs

        # `generate` reads this signature to tell its own arguments from misspelt ones. _TOKENS is not for it.
        signature = inspect.signature(prepare)
        parameters = list(signature.parameters.values())
        extra = inspect.Parameter(_REQUEST, inspect.Parameter.KEYWORD_ONLY, default=None)
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        prepare_and_rewrite.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters[:at], extra, *parameters[at:]]
        )

        @functools.wraps(generate)
        def check_and_generate(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(generate).bind(*args, **kwargs).arguments
            arguments |= arguments.pop("kwargs", {})
            settings = _settings(model, arguments)
            _check_request(arguments, settings, self.processor.config.num_layers)
            request = _Request.of(settings)
            output = generate(*args, **kwargs, **{_REQUEST: request})
            self._finish_request(request)
            return output

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedError(
                "continuous batching (generate_batch) does not work while a Processor is attached: call "
                "generate, or detach first"
            )

        # A compiled forward belongs to the attention it was compiled with.
        for name in ("_compiled_call", "_last_compile_config"):
            self._replaced[name] = model.__dict__.pop(name, _ABSENT)
        for name, function in {
            "prepare_inputs_for_generation": prepare_and_rewrite,
            "generate": check_and_generate,
            **{name: refuse for name in _CONTINUOUS_BATCHING if hasattr(model, name)},
        }.items():
            self._replaced[name] = model.__dict__.get(name, _ABSENT)
            model.__dict__[name] = function

    def _copy_tokens(self, input_ids: Tensor | None, cache: object) -> _State | None:
        """Start copying the latest ids of a GPU to the host, while the inputs are prepared, to this state's `on_host`.

        None where nothing is on its way and `_before_forward` reads them itself.
        """
        if input_ids is None or input_ids.is_cpu or not isinstance(cache, Cache):
            return None
        state = self._states.get(cache)
        if state is None or state.on_host is None or state.copied is None:
            return None
        rows, columns = input_ids.shape
        if rows != state.batch_size:
            return None
        state.on_host.copy_(input_ids if columns == 1 else input_ids[:, -1:], non_blocking=True)
        state.copied.record(torch.cuda.current_stream(self._device.index))
        return state

    def _before_forward(
        self,
        inputs: dict[str, Any],
        request: _Request | None,
        arguments: Mapping[str, Any],
        tokens: Sequence[int] | None,
        copying: _State | None,
    ) -> None:
        """Rewrite what has to be rewritten before this forward, and say where it is to leave its queries.

        inputs: of the coming forward; what the attention writes to is added.
        request: None in a loop of the caller's own.
        arguments: of the call that made the inputs.
        tokens: the latest of every row, where the caller told them; else `copying` says whether they are on their way.
        """
        cache, ids = kv_cache(inputs), inputs.get("input_ids")
        if cache is None:
            raise UnsupportedError(_NO_CACHE)
        if ids is None:
            raise UnsupportedError(_NO_IDS)
        if torch.is_autocast_enabled(self._device_type):
            raise UnsupportedError("torch.autocast changes the dtype of the queries: load the model in that dtype")
        batch_size, count = ids.shape
        counter = cache.get_seq_length()
        known = copying is not None and cache is kv_cache(arguments)
        found = copying if known else self._states.get(cache)
        decoding = count == 1 and not arguments.get("is_first_iteration")
        past, read = _past(counter, found, decoding, request, arguments)
        state = self._start(cache, batch_size) if past == 0 else _going_on(found, batch_size, past)
        if past == 0 or request is not state.request:
            _check_complete(cache, past)
            _check_contents(cache, state)
        if request is not state.request:
            self._begin_request(state, request, arguments.get("attention_mask"), past)
        if state.newest_slot is not None and state.newest_rows is not None:
            state.by_slot[state.newest_slot].copy_(state.newest_rows)
            state.newest_slot = None

        events: list[BoundaryEvent] = []
        # `generate` gives next_sequence_length with every decoded token, but not with the chunks of a prompt.
        in_prompt = past == 0 or (state.settings.chunked and arguments.get("next_sequence_length") is None)
        if not in_prompt:
            if state.detector is None:
                mask = arguments.get("attention_mask")
                state.detector = self._start_detector(state, mask, inputs.get("position_ids"), past, count)
            if count > 1:
                events = state.detector.prompt_rows(count)
                state.prompt_ended = False
            else:
                if tokens is None:
                    tokens = state.tokens() if copying is state else ids[:, -1].tolist()
                elif len(tokens) != batch_size:
                    raise InvalidArgumentError(f"{_TOKENS} has {len(tokens)} tokens for {batch_size} rows")
                self._finish_rows(state, tokens)
                if not state.prompt_ended and not self.processor.config.rewrite_prompt:
                    self._skip("rewrite_prompt is false", batch_size)
                state.prompt_ended = True
                events = state.detector.decode_rows(tokens)
        if events:
            if not read and (held := int(counter)) != past:
                state.counter_step = None
                _going_on(state, batch_size, held)
            if self._device_type == "cpu":  # a GPU's counter would have to be waited for
                _check_complete(cache, past)
            self._rewrite(cache, state, events)
        state.fresh = False
        state.length = past + count
        if count == 1 and state.slots is not None and (last := cache.layers[-1]).is_initialized:
            inputs["query_parts"] = [None] * state.num_layers
            inputs["query_ring"], inputs["query_slots"] = state.ring, state.slots
            inputs["query_length"] = last.cumulative_length
        elif count == 1 and state.newest is not None:
            state.newest_slot = past % state.window
            inputs["query_parts"], inputs["query_newest"] = [None] * state.num_layers, state.newest
        else:
            state.slot.fill_(past % state.window)
            inputs["query_ring"], inputs["query_slot"] = state.ring, state.slot

    def _begin_request(self, state: _State, request: _Request | None, mask: Tensor | None, past: int) -> None:
        """The first forward of a `generate` call, on an empty or on a kept cache."""
        chunked = request is not None and request.chunked
        if past > 0 and chunked:
            raise UnsupportedError("prefill_chunk_size does not work on a cache that holds a prompt: leave it out")
        if state.finished:
            raise InvalidArgumentError(
                f"row {min(state.finished)} of the kept cache ended before the others and was padded since: "
                "continue with a new cache"
            )
        _check_mask(mask, whole_prompt=not chunked)
        if state.detector is not None and (begins := _padding(mask, len(state.begins), past)) != state.begins:
            raise InvalidArgumentError(
                f"attention_mask pads the rows of the kept cache by {begins}, but they were written with "
                f"{state.begins}: pass the mask of the whole sequences"
            )
        state.left = None
        state.request = request
        state.settings = request or _Request.of(_settings(self.model, {}))
        state.fresh = True

    def _start(self, cache: Cache, batch_size: int) -> _State:
        config = self.processor.config
        _check_cache(cache, config.num_layers)
        shape = (config.num_layers, batch_size, config.recent_window, config.num_query_heads, config.head_dim)
        longest = cache.layers[-1].max_cache_len if getattr(cache, "is_compileable", False) else None
        state = self._kept_addresses(shape, longest, self._states.get(cache)) or self._allocate(shape, longest)
        with self._lock:
            self._states[cache] = state
        return state

    def _kept_addresses(self, shape: tuple[int, ...], longest: int | None, before: _State | None) -> _State | None:
        """A new state in the memory of an emptied cache's, on a GPU: graphs may have recorded its addresses."""
        if (
            self._device.type == "cpu"
            or before is None
            or before.ring.shape != shape
            or before.longest != longest
            or before.ring.dtype != self.model.dtype
            or before.ring.is_inference() != torch.is_inference_mode_enabled()
        ):
            return None
        before.ring.fill_(torch.nan)
        if before.newest is not None:
            before.newest.fill_(torch.nan)
        kept = (
            "ring",
            "queries",
            "slot",
            "workspace",
            "slots",
            "newest",
            "newest_rows",
            "by_slot",
            "skipped_steps",
            "bound",
            "bound_to",
            "on_host",
            "on_host_flat",
            "copied",
        )
        return _State(**{name: getattr(before, name) for name in kept})

    def _allocate(self, shape: tuple[int, ...], longest: int | None) -> _State:
        """A ring, filled with NaN, which shows a layer whose attention never saw it, and what belongs to it.

        longest: how many positions a StaticCache holds, None for a DynamicCache. Graphs may be compiled for the former,
            as with the cache's own memory, which use these addresses.
        """
        dtype, device = self.model.dtype, self._device
        layers, batch_size, window, heads, head_dim = shape
        ring = torch.full(shape, torch.nan, dtype=dtype, device=device)
        state = _State(
            ring=ring,
            queries=ring.unbind(0),
            slot=torch.zeros(1, dtype=torch.long, device=device),
            workspace=self.processor.workspace(self._num_threads or torch.get_num_threads()),
        )
        if longest is None:
            state.newest = torch.full((layers * batch_size, heads, 1, head_dim), torch.nan, dtype=dtype, device=device)
            state.newest_rows = state.newest.view(layers, batch_size, heads, head_dim)
            state.by_slot = ring.unbind(2)
        else:
            state.slots = (torch.arange(longest + 1, device=device) - 1) % window
        if device.type != "cpu":
            state.on_host = torch.empty(batch_size, 1, dtype=torch.long, pin_memory=True)
            state.on_host_flat = state.on_host.view(-1)
            state.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            if state.slots is not None:
                for tensor in (ring, state.slot, state.slots):
                    torch._dynamo.mark_static_address(tensor)
        return state

    def _start_detector(
        self, state: _State, mask: Tensor | None, position_ids: Tensor | None, past: int, count: int
    ) -> BoundaryDetector:
        """The first prompt, [0, past), is in the cache: the padding of every row is known now."""
        state.begins = _padding(mask, state.batch_size, past)
        positions = position_ids[:, -1].tolist() if position_ids is not None and position_ids.ndim == 2 else []
        for row, begin in enumerate(state.begins):
            if begin == past:
                raise InvalidArgumentError(f"the prompt of row {row} is empty: give it at least one token")
            if positions:
                position = positions[row % len(positions)]
                if position != past + count - 1 - begin:
                    raise UnsupportedError(
                        f"position_ids numbers position {past + count - 1} of row {row} as {position}: leave "
                        "position_ids out, so that each row counts from its first token"
                    )
        config = self.processor.config
        detector = BoundaryDetector(
            config.boundary, rewrite_prompt=config.rewrite_prompt, token_ids=self._line_ending_ids
        )
        for row, begin in enumerate(state.begins):
            detector.start(row, begin)
            detector.prompt(row, past)
        return detector

    def _finish_rows(self, state: _State, tokens: Sequence[int]) -> None:
        """Freeze the rows that have just ended: nothing of theirs is read again, only padding follows."""
        assert state.detector is not None
        eos_token_ids = state.settings.eos_token_ids
        # A fresh request's is the last token of an earlier call, which this one was asked to go on from.
        if state.fresh or eos_token_ids.isdisjoint(tokens):
            return
        for row, token in enumerate(tokens):
            if token in eos_token_ids and row not in state.finished:
                state.finished.add(row)
                if state.detector.due(row) is not None:
                    self._skip("the sequence had ended", 1)
                state.detector.finish(row)

    def _skip(self, reason: str, count: int) -> None:
        with self._lock:
            self.stats.skipped[reason] += count

    def _rewrite(self, cache: Cache, state: _State, events: list[BoundaryEvent]) -> None:
        if not state.captured:
            newest = state.ring.select(2, (state.length - 1) % state.window)
            if math.isnan(newest.sum()):  # where any is, and seldom else; to ask for each is many launches
                # All of a layer, since what a row holds is that row's own business.
                for layer in newest.isnan().flatten(1).all(dim=1).nonzero()[:1, 0].tolist():
                    self._forget(cache)
                    raise UnsupportedError(
                        f"{type(self.model).__name__} did not pass the queries of layer {layer} on, or they are not "
                        "numbers"
                    )
            state.captured = True
        begin = time.perf_counter()
        report: RewriteReport | None
        try:
            bound = self._bind(cache, state)
            if self._device.type == "cpu":
                report = bound.rewrite(events)
            else:
                report = bound.rewrite(events, report=self._on_boundary is not None)
        except BaseException:
            self._forget(cache)
            raise
        with self._lock:
            stats = self.stats
            stats.boundaries += len(events)
            stats.rewrites += 1
            skipped: Sequence[bool] = [False] * len(events) if report is None else report.skipped
            stats.sequences.update(event.sequence for event, left in zip(events, skipped, strict=True) if not left)
            for stage, seconds in ({} if report is None else report.stage_seconds).items():
                stats.seconds[stage] = stats.seconds.get(stage, 0.0) + seconds
            stats.seconds["total"] = stats.seconds.get("total", 0.0) + time.perf_counter() - begin
        self._count_skipped(state)
        if self._on_boundary is not None and report is not None:
            self._on_boundary(report)

    def _count_skipped(self, state: _State) -> None:
        """Of the steps counted as rewritten, those whose edit is known by now to have been too large."""
        found = state.workspace.skipped_steps
        late, state.skipped_steps = found - state.skipped_steps, found
        if late:
            with self._lock:
                self.stats.boundaries -= late
                self.stats.skipped[EDIT_TOO_LARGE] += late

    def _bind(self, cache: Cache, state: _State) -> BoundCache:
        """The Processor on this cache's tensors and its ring."""
        keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        tensors = keys + values
        if state.bound is not None and all(map(operator.is_, tensors, state.bound_to)):
            return state.bound
        # A DynamicCache has new tensors after every token, so views that nobody needs would cost at each boundary.
        bound = self.processor.bind(
            map(_untracked, keys),
            map(_untracked, values),
            state.queries,
            workspace=state.workspace,
            softmax_scale=self._softmax_scale,
            heads_first=True,
            max_relative_edit=self._max_relative_edit,
        )
        # Those of a StaticCache stay; the host's time counts where a GPU waits for it.
        if all(type(layer) is StaticLayer for layer in cache.layers):
            state.bound, state.bound_to = bound, tensors
        return bound

    def _forget(self, cache: Cache) -> None:
        """After a failed rewrite: the steps of this cache are lost, and whoever goes on with it must be told."""
        with self._lock:
            self._states.pop(cache, None)

    def _finish_request(self, request: _Request) -> None:
        """After a `generate` call: wait for rewrites that nobody has waited for, and raise what became of them.

        What the call leaves in the cache is remembered for the next one.
        """
        waited_for = self._device.type == "cpu" or self._on_boundary is not None
        with self._lock:
            caches = [(cache, state) for cache, state in self._states.items() if state.request is request]
        for cache, state in caches:
            if not waited_for:
                try:
                    state.workspace.synchronize()
                except BaseException:
                    self._forget(cache)
                    raise
                self._count_skipped(state)
            if cache.layers[-1].is_initialized:  # not where a streamer's reader has emptied it already
                state.left = _latest_keys(cache, state.length).clone(memory_format=torch.contiguous_format)


def _untracked(tensor: Tensor) -> Tensor:
    """DLPack refuses what autograd tracks."""
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass(frozen=True, eq=False)
class _Request:
    """What of one `generate` call we need later. Travels with the call as a keyword argument.

    It must not hold the call's arguments: the cache may be among them, and a cache's state refers to its
    request.
    """

    eos_token_ids: frozenset[int] = frozenset()
    chunked: bool = False  # the prompt comes in chunks

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _Request:
        eos = settings.get("eos_token_id")
        eos = eos.tolist() if isinstance(eos, Tensor) else eos
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        return cls(eos_token_ids=frozenset(eos), chunked=settings.get("prefill_chunk_size") is not None)


@dataclass(eq=False)
class _State:
    """Of one cache object."""

    ring: Tensor  # [layers, batch, window, query heads, head_dim]; position p is in row p % window
    queries: tuple[Tensor, ...]  # the ring's layers
    slot: Tensor  # [1], where the queries of a prompt begin
    workspace: bottleneck_ext.Workspace
    skipped_steps: int = 0  # of the workspace's, those that were counted
    # Of a StaticCache: [longest + 1], by how many positions it holds: the row of the ring for the last one's queries.
    slots: Tensor | None = None
    # Of a DynamicCache: [layers * batch, query heads, 1, head_dim], the queries of the latest decoded token.
    newest: Tensor | None = None
    newest_rows: Tensor | None = None  # the same memory as [layers, batch, query heads, head_dim]
    by_slot: tuple[Tensor, ...] = ()  # the ring's rows, each of the same shape
    newest_slot: int | None = None  # where in the ring they belong, as long as they are not there
    bound: BoundCache | None = None  # the Processor on a StaticCache, and the keys and values that is about
    bound_to: list[Tensor] = field(default_factory=list)
    on_host: Tensor | None = None  # of a GPU: [batch, 1], pinned, the latest token of each row
    on_host_flat: Tensor | None = None  # the same memory as [batch]
    copied: torch.cuda.Event | None = None
    request: object = _ABSENT  # the _Request of the latest `generate`, or None
    settings: _Request = field(default_factory=_Request)  # the same, or the model's own
    fresh: bool = False  # no forward of this request has been prepared yet
    length: int = 0  # positions the cache holds once the prepared forward has run
    counter_version: int = -1  # of a StaticCache's counter on a GPU when the latest forward was prepared, see _past
    counter_step: int | None = None
    detector: BoundaryDetector | None = None  # None until the first prompt is complete
    begins: list[int] = field(default_factory=list)  # left padding by row, known with the detector
    prompt_ended: bool = False
    captured: bool = False  # the ring was seen to be written in every layer
    finished: set[int] = field(default_factory=set)  # rows that generated an end-of-text token
    left: Tensor | None = None  # [batch, KV heads, 1, head_dim], `_latest_keys` when the latest `generate` returned

    def __post_init__(self) -> None:
        self.num_layers, self.batch_size, self.window = self.ring.shape[:3]

    @property
    def longest(self) -> int | None:
        """How many positions a StaticCache holds at most; None for a DynamicCache."""
        return None if self.slots is None else len(self.slots) - 1

    def tokens(self) -> list[int]:
        """What `_copy_tokens` has started to copy."""
        assert self.on_host_flat is not None
        assert self.copied is not None
        self.copied.synchronize()
        tokens: list[int] = self.on_host_flat.tolist()
        return tokens


def _going_on(state: _State | None, batch_size: int, past: int) -> _State:
    """The state of a cache that holds `past` positions in so many rows; InvalidArgumentError if it is of another."""
    remedy = "pass only caches that this attached model's generate filled, or an empty one"
    if state is None:
        raise InvalidArgumentError(
            f"the cache already holds {past} positions whose queries were not captured: {remedy}"
        )
    if past != state.length:
        raise InvalidArgumentError(
            f"the cache holds {past} positions, but generate left {state.length} in it: {remedy}"
        )
    if batch_size != state.batch_size:
        raise InvalidArgumentError(f"the cache holds {state.batch_size} rows, but the batch has {batch_size}: {remedy}")
    return state


def _check_complete(cache: Cache, past: int) -> None:
    """InvalidArgumentError where a forward was cancelled halfway: its tokens are in the first layers alone."""
    held = int(cache.get_seq_length(len(cache.layers) - 1)) if cache.layers else 0
    if held != past:
        raise InvalidArgumentError(
            f"the cache holds {past} positions in its first layer and {held} in its last one: a forward was cancelled "
            "halfway, so that nothing can go on from there; begin with a new cache"
        )


def _latest_keys(cache: Cache, length: int) -> Tensor:
    """[batch, KV heads, 1, head_dim], those of the last layer at the last of `length` positions, a view.

    They depend on all tokens of a row, and so tell rows apart.
    """
    keys: Tensor = cache.layers[-1].keys
    return _untracked(keys)[:, :, length - 1 : length]


def _check_contents(cache: Cache, state: _State) -> None:
    """InvalidArgumentError where rows of a kept cache were moved, or others written, since `generate` returned.

    The tensor itself may be another one: the cache may have been on the host meanwhile, or lengthened and cropped.
    """
    if state.left is None:
        return
    held = _latest_keys(cache, state.length).to(state.left.device).contiguous()
    # By their bytes: keys that are not numbers equal nothing, themselves included.
    if held.dtype == state.left.dtype and torch.equal(held.view(torch.uint8), state.left.view(torch.uint8)):
        return
    raise InvalidArgumentError(
        f"the kept cache does not hold the keys that generate left at position {state.length - 1}: its rows were "
        "moved, as by reorder_cache, or written elsewhere, and their queries were not; keep every row where it was, or "
        "begin with a new cache"
    )


def _past(
    counter: int | Tensor,
    state: _State | None,
    decoding: bool,
    request: _Request | None,
    arguments: Mapping[str, Any],
) -> tuple[int, bool]:
    """How many positions a cache holds, and whether that was read: a StaticCache counts on the device.

    Reading it would wait for the device at every token. Where nobody can have changed the cache it holds what the
    forwards that were prepared have put there, which the next boundary verifies before it rewrites: `generate` decodes
    one token after the other, and in other loops the counter's version (torch counts the operations in place that
    the host has called) grew as it did with the forward that was last seen to add one position, by nothing if that was
    a CUDA graph. Emptying or cropping the cache shows there.

    decoding: the coming forward is of one token, and no prompt's first.
    arguments: of the call that prepares it.
    """
    if not isinstance(counter, Tensor):
        return counter, True
    if state is None or not _waits(counter):
        return int(counter), True
    version = -1 if counter.is_inference() else counter._version
    step, state.counter_version = version - state.counter_version, version
    in_generate = request is not None and arguments.get("next_sequence_length") == 1
    if decoding and request is state.request and (in_generate or (version >= 0 and step == state.counter_step)):
        return state.length, False
    past = int(counter)
    state.counter_step = step if past == state.length else None
    return past, True


def _waits(counter: Tensor) -> bool:
    """Whether reading it waits for a device."""
    return not counter.is_cpu


def _settings(model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in force, with the precedence of `generate`: arguments, generation_config, the model's.

    arguments: of `generate`, flat.
    """
    own, given = vars(model.generation_config), arguments.get("generation_config")
    settings = dict(own)
    if given is not None:
        settings |= {key: value for key, value in vars(given).items() if value is not None}
    return settings | {key: value for key, value in arguments.items() if key in own}


def _check_request(arguments: Mapping[str, Any], settings: Mapping[str, Any], num_layers: int) -> None:
    """Refuse, before the first forward, what `generate` cannot do while a Processor is attached."""
    get = settings.get
    detach = "does not work while a Processor is attached: leave it out, or detach first"
    assisted = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "is_assistant")
    if arguments.get("assistant_model") is not None or any(get(name) for name in assisted):
        raise UnsupportedError(f"assisted decoding {detach}")
    if (get("num_beams") or 1) > 1:
        raise UnsupportedError(f"num_beams={get('num_beams')} (beam search) {detach}")
    for name in ("constraints", "force_words_ids", "dola_layers", "penalty_alpha"):
        if get(name):
            raise UnsupportedError(f"{name} {detach}")
    if get("guidance_scale") not in (None, 1):
        raise UnsupportedError(f"guidance_scale={get('guidance_scale')} {detach}")
    if get("use_cache") is False:
        raise UnsupportedError(_NO_CACHE)
    if get("cache_implementation") not in (None, "dynamic", "static"):
        raise UnsupportedError(
            f"cache_implementation={get('cache_implementation')!r} does not work while a Processor is "
            "attached: use 'dynamic' or 'static'"
        )
    if isinstance(cache := kv_cache(arguments), Cache):
        _check_cache(cache, num_layers)
    if arguments.get("custom_generate") is not None:
        raise UnsupportedError(f"custom_generate {detach}")
    if arguments.get("inputs_embeds") is not None:
        raise UnsupportedError(_NO_IDS)
    prompt = arguments.get("inputs")
    prompt = arguments.get("input_ids") if prompt is None else prompt
    if prompt is None or prompt.numel() == 0:
        raise InvalidArgumentError("the prompt is empty: give generate at least one token in input_ids")
    _check_mask(arguments.get("attention_mask"), whole_prompt=True)


def _device_of(processor: CacheProcessor) -> torch.device:
    """Where the Processor's backend works: "cpu:avx512" is on the CPU, "cuda" and "cuda:1" are GPUs."""
    kind, _, index = processor.backend.partition(":")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(index or 0))


def _check_model(model: Any, device: torch.device) -> list[Any]:
    """The attention modules of a model that can be served, in layer order; UnsupportedError for any other."""
    name = type(model).__name__
    if hasattr(model, "peft_config") and type(model).__module__.split(".")[0] == "peft":
        raise UnsupportedError(
            f"{name} is a PEFT wrapper, which calls methods it saved when it was built: attach the model "
            "before wrapping it, or merge the adapter (merge_and_unload)"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{name} is not a transformers model: attach the PreTrainedModel itself, before compiling or wrapping it"
        )
    if (
        "prepare_inputs_for_generation" in vars(model)
        and _REQUEST in inspect.signature(model.prepare_inputs_for_generation).parameters
    ):
        raise InvalidArgumentError(f"this {name} already has a Processor attached: detach that one first")
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder: only decoder-only models are supported")
    if config.get_text_config(decoder=True) is not config or not model.can_generate():
        raise UnsupportedError(f"{name} is not a plain causal language model (AutoModelForCausalLM)")
    for found in {parameter.device for parameter in model.parameters()} - {device}:
        where = "the CPU" if device.type == "cpu" else str(device)
        other = f", or make the Processor with backend='{found}'" if found.type in ("cpu", "cuda") else ""
        raise UnsupportedError(
            f"{name} is on the device {found} and the Processor on {where}: move the model to {where} with "
            f"model.to('{device}'){other}"
        )
    if model.dtype not in _DTYPES:
        raise UnsupportedError(f"{name} has the dtype {model.dtype}: use float32, float16 or bfloat16")

    implementation = config._attn_implementation
    if str(implementation).startswith(_PREFIX):
        raise InvalidArgumentError(
            f"this {name} shares its configuration object with an attached model: give it a copy of its own"
        )
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"{name} uses the attention {implementation!r}: call model.set_attn_implementation('sdpa') first"
        )
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    modules.sort(key=lambda module: int(module.layer_idx))
    if not modules or [m.layer_idx for m in modules] != list(range(config.num_hidden_layers)):
        raise UnsupportedError(
            f"{name} does not have one attention module per layer: only models with standard attention are supported"
        )
    source = vars(sys.modules[type(modules[0]).__module__])
    if len({type(module) for module in modules}) > 1 or source.get("ALL_ATTENTION_FUNCTIONS") is not (
        ALL_ATTENTION_FUNCTIONS
    ):
        raise UnsupportedError(f"{name} brings its own attention: only transformers' attention interface is supported")
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        raise UnsupportedError(f"{name}.forward takes no further keyword arguments, so queries cannot be captured")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedError(f"{name} has multi-head latent attention: its keys and values differ in size")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedError(f"{name} caps its attention logits (attn_logit_softcapping): not supported")
    if any(getattr(module, "sinks", None) is not None for module in modules):
        raise UnsupportedError(f"{name} has attention sinks: not supported")
    scales = {getattr(module, "scaling", None) for module in modules}
    if len(scales) > 1 or not isinstance(next(iter(scales)), (int, float)):
        raise UnsupportedError(f"{name} does not scale all its attention layers alike (scaling: {scales})")
    _check_cache(DynamicCache(config=config), config.num_hidden_layers)
    return modules


def _check_cache(cache: Cache, num_layers: int) -> None:
    """Only layers that hold all keys and values, in place, at their positions."""
    if getattr(cache, "offloading", False):
        raise UnsupportedError("the cache is offloaded: use a plain DynamicCache or StaticCache")
    layers = getattr(cache, "layers", None)
    lazy = [] if layers else [getattr(cache, "layer_class_to_replicate", None)]
    for kind in lazy or [type(layer) for layer in layers or ()]:
        if kind not in (DynamicLayer, StaticLayer):
            raise UnsupportedError(
                f"{type(cache).__name__} has layers of the kind {getattr(kind, '__name__', kind)}: only "
                "DynamicLayer and StaticLayer are supported (no sliding windows, quantised or shared layers)"
            )
    if layers and len(layers) != num_layers:
        raise UnsupportedError(f"the cache has {len(layers)} layers for the {num_layers} layers of the model")


def _check_mask(mask: Tensor | None, *, whole_prompt: bool) -> None:
    """mask: [batch, positions], 1 for tokens; zeros may only come before a row's first token."""
    if mask is None or mask.ndim != 2:
        return
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise UnsupportedError("attention_mask has a 0 after a 1: pad on the left (tokenizer.padding_side = 'left')")
    empty = (mask == 0).all(dim=1).nonzero().flatten().tolist()
    if whole_prompt and empty:
        raise InvalidArgumentError(f"the prompt of row {empty[0]} is empty: give it at least one token")


def _padding(mask: Tensor | None, batch_size: int, past: int) -> list[int]:
    """Positions of left padding by row, among the first `past`. `generate` drops a mask without zeros."""
    if mask is None:
        return [0] * batch_size
    counts: list[int] = (mask[:, :past] == 0).sum(dim=1).tolist()
    return counts


def _check_fit(
    model: PreTrainedModel,
    attention: Sequence[torch.nn.Module],
    config: CacheProcessorConfig,
    check_weights: bool,
) -> None:
    """InvalidArgumentError, naming what differs, unless the Processor was made for this model."""
    try:
        actual = describe({**model.config.to_dict(), "architectures": [type(model).__name__]})
    except ValueError as error:
        raise UnsupportedError(f"{type(model).__name__}: {error}") from None
    actual["head_dim"] = getattr(attention[0], "head_dim", actual["head_dim"])
    remedy = "use the Processor of this model, or make one with `bottlenecked init`"
    for key, words in {
        "num_layers": "layers",
        "num_kv_heads": "KV heads",
        "head_dim": "elements per head (head_dim)",
        "num_query_heads": "query heads",
    }.items():
        if getattr(config, key) != actual[key]:
            raise InvalidArgumentError(
                f"the Processor is for a backbone with {getattr(config, key)} {words}, but "
                f"{type(model).__name__} has {actual[key]}: {remedy}"
            )
    for key in ("architecture", "config_hash"):
        wanted, found = config.backbone.get(key), actual["backbone"][key]
        if wanted is not None and wanted != found:
            raise InvalidArgumentError(
                f"the Processor's backbone has {key} {wanted}, but this {type(model).__name__} has {found}: {remedy}"
            )
    wanted = config.backbone.get("weights_hash")
    if check_weights and wanted is not None and (found := model_weights_hash(model)) not in (None, wanted):
        raise InvalidArgumentError(
            f"the Processor was made for other weights of this architecture (weights_hash {wanted}, here "
            f"{found}): {remedy}, or pass check_weights=False"
        )
    if config.key_space == "unrotated":
        _check_rope(model, attention[0], config)


def _check_rope(model: PreTrainedModel, attention: torch.nn.Module, config: CacheProcessorConfig) -> None:
    """Undoing a rotation needs the very angles and pairing that the model used."""
    wanted = config.rope_parameters or {}
    actual = rope_parameters(model.config.to_dict()) or {}
    if layers := actual.get("no_rope_layers"):
        raise UnsupportedError(
            f"{type(model).__name__} has layers without RoPE (no_rope_layers {layers}), whose keys cannot be turned "
            "back: use a Processor with key_space 'rotated'"
        )
    tables = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    expected = torch.tensor(config.inv_freq())
    if (
        wanted.get("rope_type") != actual.get("rope_type")
        or not tables
        or any(
            table.inv_freq.shape != expected.shape
            or not torch.allclose(table.inv_freq.float().cpu(), expected, rtol=1e-5, atol=0)
            or getattr(table, "attention_scaling", 1.0) != 1.0
            for table in tables
        )
    ):
        raise InvalidArgumentError(
            f"rope_parameters of the Processor are {wanted}, but those of {type(model).__name__} are "
            f"{actual}: use the Processor of this model, or one with key_space 'rotated'"
        )
    rotate_half = vars(sys.modules[type(attention).__module__]).get("rotate_half")
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise UnsupportedError(
            f"{type(model).__name__} does not rotate halves of a head as Llama does: use key_space 'rotated'"
        )


def _line_ending_ids(
    model: PreTrainedModel, config: CacheProcessorConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    ids = config.boundary.token_ids
    if not ids and tokenizer is None:
        raise InvalidArgumentError(
            "the Processor's config.json lists no boundary.token_ids: pass attach the tokenizer, which "
            "tells the tokens with a newline"
        )
    ids = ids or newline_token_ids(tokenizer)
    if not ids:
        raise InvalidArgumentError("no token of this tokenizer contains a newline: set boundary.token_ids")
    if max(ids) >= model.config.vocab_size:
        raise InvalidArgumentError(
            f"boundary token id {max(ids)} is outside the model's vocabulary of {model.config.vocab_size} tokens"
        )
    return ids


def _register(model: PreTrainedModel, attention: torch.nn.Module) -> str:
    """Register the capturing twin of the model's attention and return its name.

    Attention functions are one for all models but "eager", which each modeling file defines for itself.
    """
    base = model.config._attn_implementation
    if base == "eager":
        modeling = type(attention).__module__
        wrapped = vars(sys.modules[modeling]).get("eager_attention_forward")
        name = f"{_PREFIX}eager_{modeling.rpartition('.')[2]}"
    else:
        wrapped = ALL_ATTENTION_FUNCTIONS[base]
        name = _PREFIX + base
    if wrapped is None:
        raise UnsupportedError(f"{type(model).__name__} has no eager attention: set_attn_implementation('sdpa') first")
    with _registry_lock:
        if not _registered[name]:
            AttentionInterface.register(name, _capturing(wrapped))
            # Without this the mask would silently be None and left padding would be attended to.
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        _registered[name] += 1
    return name


def _unregister(name: str) -> None:
    with _registry_lock:
        _registered[name] -= 1
        if not _registered[name]:
            del _registered[name]
            for interface in (AttentionInterface, AttentionMaskInterface):
                # There is a public way in, none out. Left there, the name would do no harm.
                getattr(interface, "_global_mapping", {}).pop(name, None)


def _capturing(
    wrapped: Callable[..., tuple[Tensor, Tensor | None]],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def capturing_attention(
        module: torch.nn.Module,
        query: Tensor,  # [batch, query heads, tokens, head_dim], after RoPE
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        query_ring: Tensor | None = None,
        query_slot: Tensor | None = None,
        query_parts: list[Tensor | None] | None = None,
        query_slots: Tensor | None = None,
        query_length: Tensor | None = None,
        query_newest: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if query_ring is not None or query_newest is not None:
            for name in _OTHER_ATTENTION:
                if kwargs.get(name) is not None:
                    raise UnsupportedError(f"the model's attention uses {name}: not supported")
            # The mass is computed with the module's scaling: it must be that of the queries which are captured.
            if (scaling := kwargs.get("scaling")) != module.scaling:
                raise UnsupportedError(
                    f"{type(module).__name__} has scaling {module.scaling}, but calls its attention function with "
                    f"{scaling}, as if its queries were scaled already: use a model that leaves this to that function"
                )
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            kept = _untracked(query)
            if query_parts is None:
                _capture_prompt(query_ring[layer], query_slot, kept)  # type: ignore[index, arg-type]
            elif (queries := _gather(query_parts, layer, kept)) is None:
                pass  # until the last layer
            elif query_newest is not None:
                _keep_token(query_newest, queries)
            else:
                _capture_token(query_ring, query_slots, query_length, queries)  # type: ignore[arg-type]
        return wrapped(module, query, key, value, attention_mask, **kwargs)

    return capturing_attention


def _capture_prompt(ring: Tensor, slot: Tensor, query: Tensor) -> None:
    """Write the queries of several tokens; only the last fit.

    ring: one layer's, [batch, window, query heads, head_dim]. slot: [1], of the first token.
    query: [batch, query heads, tokens, head_dim].
    """
    tokens, window = query.shape[2], ring.shape[1]
    count = min(tokens, window)
    rows = (slot + torch.arange(tokens - count, tokens, device=query.device)) % window
    ring.index_copy_(1, rows, query[:, :, -count:].transpose(1, 2))


def _gather(parts: list[Tensor | None], layer: int, query: Tensor) -> list[Tensor] | None:
    """Keep the query of one token in `parts`, by layer, until the last one; returns those of all layers then.

    query: [batch, query heads, 1, head_dim].
    """
    parts[layer] = query
    if layer < len(parts) - 1:
        return None
    # A layer may have kept its query to itself: NaN is what the first boundary looks for.
    queries = [torch.full_like(query, torch.nan) if part is None else part for part in parts]
    for index in range(len(parts)):
        parts[index] = None
    return queries


def _capture_token(ring: Tensor, slots: Tensor, length: Tensor, queries: list[Tensor]) -> None:
    """Write the queries of one token where the cache's own counter says, which may be that of a graph's replay.

    ring: [layers, batch, window, query heads, head_dim]. queries: by layer, [batch, query heads, 1, head_dim].
    slots: row of the ring by `length`, the positions that the cache holds, this token's among them: a table, since a
        look-up is one launch and arithmetic two.
    """
    layers, batch_size, _, heads, head_dim = ring.shape
    rows = torch.cat(queries).view(layers, batch_size, 1, heads, head_dim)
    ring.index_copy_(2, slots.index_select(0, length.view(1)), rows)


def _keep_token(newest: Tensor, queries: list[Tensor]) -> None:
    """newest: [layers * batch, query heads, 1, head_dim]. queries: by layer, [batch, query heads, 1, head_dim]."""
    if torch.compiler.is_compiling():
        newest.copy_(torch.cat(queries))
    else:
        torch.cat(queries, out=newest)
