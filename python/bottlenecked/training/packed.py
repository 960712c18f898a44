"""A causal language model of transformers, run on batches of unequal length without padding its products.

The tokens of all sequences stand one after the other in a single row, so that every linear layer sees real tokens
only; attention alone is padded, to the longest of them. Our attention takes earlier keys and values from a tensor that
autograd can follow, hands out the new ones, and computes attention mass from the very queries (arXiv 2505.16950,
section 3) while scaled-dot-product attention runs unchanged: no attention matrix is kept.

Models like Llama and Qwen run through decoder.py, where that is found to compute the same; all others through their own
code, with our attention under a name of our own, as in the transformers integration.

Short lines on a GPU take as long as the host needs to issue them. Hence one transfer of all indices, nothing that makes
the host wait for the device, and, per layer, one gather before attention and one behind it, either way. New rows are
written into the cache where attention reads them, and its gradients are left where they fall until all layers' are
fetched at once. Where all weights are frozen, frozen.py has the backward pass as well.

Sizes: B sequences, T packed tokens, m slots per sequence (tokens of the longest, rounded up), S positions that
attention may see, H query heads, H_kv KV heads of size d, G = H / H_kv, N = H + 2 * H_kv, C = 2 * H_kv * d (keys over
KV heads, then values over KV heads).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones import describe
from .decoder import Decoder, Layer, Rotation
from .frozen import FrozenLayer, at_least_float32, run_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes are rounded up to multiples of these: allocators and kernel caches then see few shapes.
TOKEN_MULTIPLE = 16
POSITION_MULTIPLE = 32
_LENGTH_MULTIPLE = 8

# So large may attention matrices be that are made for the mass, and not kept: on a GPU (True) for several layers at
# once, since there are few operations then; on a CPU they should stay in its caches.
_MASS_BYTES = {True: 2**26, False: 2**22}

_NAME = "bottlenecked_training"
# Keyword arguments with which an attention function computes something else than softmax(scale * q k).
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of each sequence that one forward feeds.

    tokens: per sequence, at least one id each.
    begins: position of the first of them; as many earlier positions are in the cache.
    wanted: per sequence, which of its tokens' logits are wanted, ascending indices into its tokens.
    """

    tokens: Sequence[Sequence[int]]
    begins: Sequence[int]
    wanted: Sequence[Sequence[int]]


@dataclass
class Output:
    """What one forward gives.

    logits: [wanted, vocabulary], in the order of the sequences.
    mass: [num_layers, B, positions], attention mass of every position before its sequence's window, -1 elsewhere;
        None where not asked for or where no sequence has such a position.
    """

    logits: Tensor
    mass: Tensor | None


class PackedBackbone:
    """Runs `model` on stretches of tokens. The model itself stays as it is, on its device, in its dtype and mode.

    num_layers, num_kv_heads, head_dim, num_query_heads: its shape; description: as `backbones.describe` gives it.

    Raises NotImplementedError where the model's attention is not the plain one of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = _attention_modules(model)
        self.model = model
        try:
            self.description = describe({**model.config.to_dict(), "architectures": [type(model).__name__]})
        except ValueError as error:
            raise NotImplementedError(f"{type(model).__name__}: {error}") from None
        self.num_layers = len(modules)
        self.num_kv_heads: int = self.description["num_kv_heads"]
        self.num_query_heads: int = self.description["num_query_heads"]
        self.head_dim = int(getattr(modules[0], "head_dim", self.description["head_dim"]))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def kv_width(self) -> int:
        """C, the width of a cache row."""
        return 2 * self.num_kv_heads * self.head_dim

    def forward(
        self,
        stretch: Stretch,
        cache: Cache | None = None,
        *,
        mass_window: int | None = None,
        layers: list[Layer] | list[FrozenLayer] | None = None,
    ) -> Output:
        """Feed one stretch.

        cache: of these sequences and maybe others behind; of sequence b the first begins[b] positions are read, and the
            new rows are written behind them. None where all begin at 0 and nothing is read later.
        mass_window: compute the attention mass that the last `mass_window` tokens of each sequence's stretch paid. It
            needs a cache.
        layers: what `layers` gives, where it was asked before.
        """
        indices = Indices()
        plan = Plan(self, stretch, indices, cache, mass_window=mass_window)
        indices.send(self.device)
        return self.run(plan, cache, layers or self.layers())

    def layers(self) -> list[Layer] | list[FrozenLayer] | None:
        """For `run`, to be asked for once per batch; None for a model that runs through its own code."""
        decoder = self._decoder
        if decoder is None or _is_watched(self.model):
            return None
        return decoder.frozen_layers() or decoder.layers()

    def run(
        self,
        plan: Plan,
        cache: Cache | None,
        layers: list[Layer] | list[FrozenLayer] | None,
        rewritten: Rewritten | None = None,
    ) -> Output:
        """`forward` of a plan, after its indices were sent.

        cache: of which the plan was made; gets the new rows. rewritten: those of its rows that gradients flow into.
        """
        return self._run(plan, cache, layers, self._decoder, rewritten)

    def shares_kv_heads(self) -> bool:
        """Whether causal attention reads the KV head of several query heads without making attention matrices."""
        device = self.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.model.dtype
        return device != "cuda" or dtype in (torch.float16, torch.bfloat16)

    def _run(
        self,
        plan: Plan,
        cache: Cache | None,
        layers: list[Layer] | list[FrozenLayer] | None,
        decoder: Decoder | None,
        rewritten: Rewritten | None = None,
    ) -> Output:
        under_way, indices = Pass(plan, cache, rewritten), plan.indices
        ids, positions, wanted = indices[plan.ids], indices[plan.positions], indices[plan.wanted]
        if layers is not None and decoder is not None:
            x = decoder.embed(ids)
            rotation = decoder.rotation(x, positions)
            if isinstance(layers[0], FrozenLayer):
                x = run_frozen(layers, x, rotation, under_way)
            else:
                for layer in layers:
                    x = layer.run(x, rotation, under_way.attend)
            logits = decoder.logits(x.index_select(0, wanted))
        else:
            with _attention(self.model):
                logits = self.model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    use_cache=False,
                    logits_to_keep=wanted,
                    packed=under_way,
                ).logits[0]
        return Output(logits, under_way.mass())

    @functools.cached_property
    def _decoder(self) -> Decoder | None:
        """None unless every layer does to a short text, and to its cache, what the model's own code does."""
        try:
            decoder = Decoder(self.model, self.num_query_heads, self.num_kv_heads)
        except AttributeError:
            return None
        vocabulary, inputs = self.model.get_input_embeddings().num_embeddings, []
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), contextlib.ExitStack() as hooks:
            indices, caches = Indices(), [Cache(self, 1, 13) for _ in range(2)]
            plan = Plan(self, Stretch([[i % vocabulary for i in range(13)]], [0], [range(13)]), indices, caches[0])
            indices.send(self.device)
            for module in (*decoder.modules, decoder.norm):
                hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
                hooks.callback(hook.remove)
            theirs = self._run(plan, caches[0], None, None)
            under_way = Pass(plan, caches[1])
            rotation = decoder.rotation(inputs[0], indices[plan.positions])
            pairs = [
                (expected, layer.run(given, rotation, under_way.attend))
                for layer, (given, expected) in zip(decoder.layers(), itertools.pairwise(inputs), strict=True)
            ]
            real = [(expected[: plan.num_tokens], got[: plan.num_tokens]) for expected, got in pairs]
            real.append((theirs.logits, decoder.logits(inputs[-1][: plan.num_tokens])))
            real += zip(*(cache.new_rows(plan) for cache in caches), strict=True)
        # Each of them a few roundings deep; a wrong rotation, norm or factor changes it all.
        eps = torch.finfo(theirs.logits.dtype).eps
        tolerance = (4 if eps > 1e-6 else 100) * eps
        return decoder if all(_distance(expected, got) <= tolerance for expected, got in real) else None


class Indices:
    """Arrays of integers that go to the device together: one copy, for which nobody waits."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.int64]] = []
        self._sent: list[Tensor] = []

    def add(self, values: npt.ArrayLike) -> int:
        """The number under which `values` is to be had after `send`."""
        self._arrays.append(np.asarray(values, dtype=np.int64))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> None:
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in self._arrays]))
        if device.type == "cuda":
            flat = flat.pin_memory()
        parts = flat.to(device, non_blocking=True).split([array.size for array in self._arrays])  # type: ignore[no-untyped-call]
        self._sent = [
            part if array.ndim == 1 else part.view(array.shape) for part, array in zip(parts, self._arrays, strict=True)
        ]

    def __getitem__(self, number: int) -> Tensor:
        """int64, in the shape in which it was added."""
        return self._sent[number]


class Cache:
    """The cache of a batch, constant for autograd: rows [num_layers, B, positions, C] in the backbone's dtype.

    capacity: positions that attention may see, at least `longest` of them. There is one more, for padding tokens.

    Zero where nothing was written: masked rows are multiplied by zero weights, and must be finite for that.
    """

    def __init__(self, backbone: PackedBackbone, batch: int, longest: int) -> None:
        # The gradient of padding is read where no token is (see `Plan`): there must be such a position.
        self.capacity = round_up(longest + 1, POSITION_MULTIPLE)
        shape = (backbone.num_layers, batch, self.capacity + 1, backbone.kv_width)
        self.rows = torch.zeros(shape, dtype=backbone.model.dtype, device=backbone.device)
        # Autograd holds a layer's keys and values until its backward pass, and would take a row written in another
        # layer for one of theirs: `data` does not tell it.
        self.layers = [rows.data for rows in self.rows.flatten(1, 2).unbind(0)]

    def new_rows(self, plan: Plan) -> Tensor:
        """[num_layers, tokens, C], those that the forward of a plan wrote."""
        return self.rows.flatten(1, 2).index_select(1, plan.indices[plan.places][: plan.num_tokens])


@dataclass(frozen=True)
class Rewritten:
    """Rows of the cache that gradients flow into.

    rows: [num_layers * rows, C], equal to what is in the cache. positions: [num_layers, rows], where, in the sequences
    that `Plan.expect_rewritten` was told.
    """

    rows: Tensor
    positions: Tensor


class Plan:
    """All that one forward needs and the host knows, before the device begins.

    Tokens stand one after the other, T of them with padding at the end. For attention they are spread to slots, m per
    sequence. Each token has a slot and each slot a token: those of padding have each other's, any of them, so that
    one is never without the other. Their gradients are exactly zero, since no loss and no other token sees
    them. So the gradient of spreading is collecting, which needs no sums, and the reverse.

    As keys, tokens stand in the cache at their positions; those of padding at none that attention sees. Their gradients
    are read at a position behind the end of a sequence, where they are zero.
    """

    def __init__(
        self,
        backbone: PackedBackbone,
        stretch: Stretch,
        indices: Indices,
        cache: Cache | None = None,
        *,
        mass_window: int | None = None,
    ) -> None:
        """As for `PackedBackbone.forward`. cache: of these sequences and maybe others behind."""
        self.indices = indices
        lengths, begins = np.array([len(t) for t in stretch.tokens]), np.array(stretch.begins)
        self.batch, self.num_tokens = len(lengths), int(lengths.sum())
        size, slots = round_up(self.num_tokens, TOKEN_MULTIPLE), round_up(int(lengths.max()), _LENGTH_MULTIPLE)
        if size > self.num_tokens and self.batch * slots == self.num_tokens:
            slots += _LENGTH_MULTIPLE
        elif size == self.num_tokens and self.batch * slots > self.num_tokens:
            size += TOKEN_MULTIPLE
        self.size, self.slots = size, slots
        inside = np.arange(slots) < lengths[:, None]  # [B, m]
        self.query_heads, self.kv_heads = backbone.num_query_heads, backbone.num_kv_heads
        self.groups = self.query_heads // self.kv_heads
        self.num_heads = self.query_heads + 2 * self.kv_heads  # N
        self.head_dim, self.kv_width = backbone.head_dim, backbone.kv_width
        self.on_gpu = backbone.device.type == "cuda"
        from_start = not begins.any()
        # From the start plain causal attention will do, unless that would have to make attention matrices.
        self.causal = from_start and (self.groups == 1 or backbone.shares_kv_heads())
        ends = begins + lengths
        if size > self.num_tokens:
            ends = ends + (lengths < slots)  # one position behind some sequence that has slots of padding
        self.num_keys = slots if from_start else round_up(int(ends.max()), POSITION_MULTIPLE)
        self.capacity = self.num_keys if cache is None else cache.capacity
        self.num_layers = backbone.num_layers

        def packed(values: Iterable[Sequence[int]], offsets: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
            offsets = [0] * self.batch if offsets is None else offsets
            flat = [value + offset for of, offset in zip(values, offsets, strict=True) for value in of]
            return np.array(flat, dtype=np.int64)

        padding = np.zeros(size - self.num_tokens, dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        self.ids = indices.add(np.concatenate([packed(stretch.tokens), padding]))
        positions = packed([range(n) for n in lengths], stretch.begins)
        self.positions = indices.add(np.concatenate([positions, padding]))
        self.wanted = indices.add(packed(stretch.wanted, firsts.tolist()))
        self._arrange(inside, begins)

        # A query sees the positions up to its own, all of which have tokens.
        queries = begins[:, None] + np.arange(slots)
        self.keys = indices.add(np.arange(self.num_keys))
        self.queries = indices.add(np.tile(queries, self.groups)[:, None, :, None])
        self.num_candidates = 0
        if mass_window is not None:
            self._window(mass_window, lengths, begins, queries)

    def expect_rewritten(self, sequences: npt.NDArray[np.int64]) -> None:
        """Gradients are wanted of rows of the cache, of these sequences [rows]."""
        width = self._gradient_width
        of_layers = np.arange(self.num_layers)[:, None] * self.batch + sequences
        firsts = of_layers * (self.kv_heads * width) + self.groups * self.slots
        self.rewritten_firsts = self.indices.add(firsts[..., None])
        of_heads = np.arange(self.kv_heads) * width
        self.rewritten_heads = self.indices.add(np.concatenate([of_heads, of_heads + self.num_keys]))

    @property
    def _gradient_width(self) -> int:
        """Rows of one KV head, its queries', keys' and values'."""
        return self.groups * self.slots + 2 * self.num_keys

    def _arrange(self, inside: npt.NDArray[np.bool_], begins: npt.NDArray[np.int64]) -> None:
        """Which head of which token goes where: rows of d numbers."""
        slots, heads, kv, groups = self.slots, self.query_heads, self.kv_heads, self.groups
        token = np.full(inside.shape, self.num_tokens)  # of each slot
        token[inside] = np.arange(self.num_tokens)
        some_padding = [] if inside.all() else [int(np.flatnonzero(~inside)[0])]
        slot = np.concatenate([np.flatnonzero(inside), some_padding * (self.size - self.num_tokens)]).astype(np.int64)
        b, i = slot[:, None] // slots, slot[:, None] % slots
        position = begins[b] + i
        places = b * (self.capacity + 1) + position
        places[self.num_tokens :] = self.capacity
        self.places = self.indices.add(places.ravel())
        # Head h = k * groups + g asks KV head k.
        head, kv_head = np.arange(heads), np.arange(kv)

        queries = token[:, None] * self.num_heads + head[:, None]  # [B, H, m]
        self.spread = self.indices.add(queries.ravel())
        # Attention hands out its rows as it got those of queries, [B, H, m], or, on some devices, with the heads of a
        # slot together: [B, G * m, H_kv] or, if causal, [B, m, H]. Its gradients come as what it handed out.
        if self.causal:
            together, asking = i * heads + head, token[..., None] * heads + head
        else:
            together = ((head % groups) * slots + i) * kv + head // groups
            asking = token[:, None, :, None] * heads + np.arange(groups)[:, None, None] + groups * np.arange(kv)
        self.collect = self.indices.add((b * (heads * slots) + head * slots + i).ravel())
        self.collect_together = self.indices.add((b * (heads * slots) + together).ravel())
        self.collect_back = self.indices.add((token[:, None] * heads + head[:, None]).ravel())
        self.collect_back_together = self.indices.add(asking.ravel())
        # Gradients of queries, keys and values stand behind each other per KV head, or, if causal, as heads.
        if self.causal:
            rows = (b * self.num_heads + np.arange(self.num_heads)) * slots + i
        else:
            width = self._gradient_width
            of_key = (b * kv + kv_head) * width + groups * slots + position
            of_query = (b * kv + head // groups) * width + (head % groups) * slots + i
            rows = np.concatenate([of_query, of_key, of_key + self.num_keys], 1)
        self.spread_back = self.indices.add(rows.ravel())

    def _window(
        self,
        window: int,
        lengths: npt.NDArray[np.int64],
        begins: npt.NDArray[np.int64],
        queries: npt.NDArray[np.int64],
    ) -> None:
        """Which queries count for the attention mass, and of which positions it is wanted."""
        counts = np.minimum(lengths, window)
        begin = begins + lengths - counts
        self.num_candidates = int(begin.max())
        if self.num_candidates == 0:
            return
        add, size = self.indices.add, min(window, self.slots)
        self.whole_window = size == self.slots
        index = np.arange(self.slots) if self.whole_window else (lengths - counts)[:, None] + np.arange(size)
        index = np.broadcast_to(index, (self.batch, size))
        counted = (index >= (lengths - counts)[:, None]) & (index < lengths[:, None])
        self.window = add(index[:, None, :, None])
        self.window_queries = add(np.tile(np.take_along_axis(queries, index, 1), self.groups)[:, None, :, None])
        self.counted = add(np.tile(counted, self.query_heads)[:, None])
        self.divisors = add((counts * self.query_heads)[:, None, None])
        self.no_candidate = add(np.arange(self.num_candidates) >= begin[:, None])
        of_layer = 4 * self.batch * self.query_heads * size * self.num_keys
        self.layers_at_once = max(1, _MASS_BYTES[self.on_gpu] // of_layer)


class Pass:
    """One forward under way: what all layers share, and what they leave behind."""

    def __init__(self, plan: Plan, cache: Cache | None, rewritten: Rewritten | None = None) -> None:
        self.plan, self._cache, indices = plan, cache, plan.indices
        self.rewritten = None if rewritten is None else rewritten.rows
        self._positions = None if rewritten is None else rewritten.positions
        self._spread, self._spread_back = indices[plan.spread], indices[plan.spread_back]
        self._places = indices[plan.places]
        self._gradients: Tensor | None = None
        self._gradients_of: list[tuple[Tensor, Tensor]] = []
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._waiting: list[tuple[Tensor, float]] = []
        self._mass: list[Tensor] = []
        self._weighed = 0  # layers
        self._together = False
        self._shares: dict[int, Tensor] = {}  # of a query in the mass; by layers at once
        if cache is not None:
            with torch.no_grad():
                self._keys, self._values = (self._heads(cache.rows, first) for first in (0, plan.kv_width // 2))
                # Taken one by one, and given away: what autograd hangs on them leads back to us, and such a circle
                # nobody would collect.
                self._of_layers = dict(enumerate(zip(self._keys.unbind(0), self._values.unbind(0), strict=True)))

    def _heads(self, rows: Tensor, first: int) -> Tensor:
        """Keys or values in cache rows [*, B, positions, C], from column `first`: [*, B, H_kv, S, d]."""
        plan, (*layers, of_sequence, of_position, of_column) = self.plan, rows.stride()
        return rows.as_strided(
            (*rows.shape[: len(layers)], plan.batch, plan.kv_heads, plan.num_keys, plan.head_dim),
            (*layers, of_sequence, plan.head_dim, of_position, of_column),
            rows.storage_offset() + first,
        )

    def attend(self, layer: int, heads: Tensor, rotation: Rotation | None, scale: float) -> Tensor:
        """heads [T, N, d] in any shape, turned in place if there is a rotation -> [T, H * d]."""
        rewritten = self.rewritten if layer == 0 else None
        query, key, value = _Spread.apply(heads, rewritten, self, layer, rotation)[-3:]  # type: ignore[no-untyped-call]
        collected: Tensor = _Collect.apply(self.attention(query, key, value, scale), self)  # type: ignore[no-untyped-call]
        return collected

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Of the next layer, as `spread` gave them: [B, H_kv, G * m, d], or [B, H, m, d] if causal."""
        plan = self.plan
        if plan.num_candidates:
            self._weigh(query, scale)
        if plan.causal:
            shared = plan.groups > 1
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
        # The queries of a KV head as one: its keys and values need not be repeated.
        mask = self._mask(plan.queries, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def spread(self, layer: int, heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """heads [T, N * d], and the same as rows [T * N, d] -> queries, [B, H_kv, G * m, d], or [B, H, m, d] if causal;
        keys and values [B, H_kv, S, d], of the cache, where the new ones are written.
        """
        plan = self.plan
        query = rows.index_select(0, self._spread)
        query = query.view(plan.batch, plan.query_heads if plan.causal else plan.kv_heads, -1, plan.head_dim)
        new = heads[:, plan.query_heads * plan.head_dim :]
        if self._cache is not None:
            kept = self._cache.layers[layer]
            kept.index_copy_(0, self._places, new if new.dtype == kept.dtype else new.to(kept.dtype))
            return query, *self._of_layers.pop(layer)
        kept = new.new_zeros(plan.batch, plan.capacity + 1, plan.kv_width)
        kept.flatten(0, 1).index_copy_(0, self._places, new)
        return query, self._heads(kept, 0), self._heads(kept, plan.kv_width // 2)

    def spread_back(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, wanted: bool = True) -> Tensor:
        """Of the gradients of what `spread` gave: those of the heads, [T * N, d], if wanted."""
        plan = self.plan
        if self.rewritten is not None and self.rewritten.requires_grad:
            if self._gradients is None:
                shape = (plan.num_layers, *query.shape[:2], query.shape[2] + 2 * key.shape[2], query.shape[3])
                self._gradients = query.new_empty(shape)
                flat = self._gradients.view(plan.num_layers, -1, plan.head_dim)
                self._gradients_of = list(zip(self._gradients.unbind(0), flat.unbind(0), strict=True))
            of_heads, rows = self._gradients_of[layer]
            torch.cat([query, key, value], 2, out=of_heads)
        else:
            rows = torch.cat([query, key, value], 1 if plan.causal else 2).view(-1, plan.head_dim)
        return rows.index_select(0, self._spread_back) if wanted else rows

    def of_rewritten(self) -> Tensor | None:
        """The gradient of the rewritten rows, [num_layers * rows, C], once all layers' are known."""
        if self._gradients is None or self._positions is None:
            return None
        plan, indices = self.plan, self.plan.indices
        rows = self._positions[..., None] + indices[plan.rewritten_firsts] + indices[plan.rewritten_heads]
        gradients, self._gradients, self._gradients_of = self._gradients, None, []
        return gradients.view(-1, plan.head_dim).index_select(0, rows.flatten()).view(-1, plan.kv_width)

    def collect(self, out: Tensor) -> Tensor:
        """What attention gives, [B, *, *, d], by token: [T, H * d]."""
        plan = self.plan
        self._together = not out.is_contiguous()
        if not self._together:
            rows = out.view(-1, plan.head_dim).index_select(0, plan.indices[plan.collect])
        else:
            rows = out.transpose(1, 2).reshape(-1, plan.head_dim)
            rows = rows.index_select(0, plan.indices[plan.collect_together])
        return rows.view(plan.size, -1)

    def collect_back(self, gradient: Tensor) -> Tensor:
        """The gradient of what attention gave."""
        plan, rows = self.plan, gradient.view(-1, self.plan.head_dim)
        heads = plan.query_heads if plan.causal else plan.kv_heads
        if self._together:
            rows = rows.index_select(0, plan.indices[plan.collect_back_together])
            return rows.view(plan.batch, -1, heads, plan.head_dim).transpose(1, 2)
        return rows.index_select(0, plan.indices[plan.collect_back]).view(plan.batch, heads, -1, plan.head_dim)

    def mass(self) -> Tensor | None:
        """[num_layers, B, candidates]; None where there are none."""
        plan = self.plan
        if not plan.num_candidates:
            return None
        self._weigh_waiting()
        mass = torch.cat(self._mass).view(-1, plan.batch, plan.num_keys)[..., : plan.num_candidates]
        return mass.masked_fill(plan.indices[plan.no_candidate].bool(), -1.0)

    def _weigh(self, query: Tensor, scale: float) -> None:
        """Several layers at once, as long as their attention matrices stay small."""
        if self._waiting and self._waiting[0][1] != scale:
            self._weigh_waiting()
        self._waiting.append((query, scale))
        if len(self._waiting) >= self.plan.layers_at_once:
            self._weigh_waiting()

    @torch.no_grad()
    def _weigh_waiting(self) -> None:
        """Attention mass (section 3), [layers * B, 1, S]."""
        if not self._waiting:
            return
        plan, count, scale = self.plan, len(self._waiting), self._waiting[0][1]
        queries = self._waiting[0][0] if count == 1 else torch.stack([query for query, _ in self._waiting])
        self._waiting = []
        if not plan.whole_window:
            queries = queries.view(count, plan.batch, plan.query_heads, plan.slots, plan.head_dim)
            queries = queries.take_along_dim(plan.indices[plan.window][None], 3)
        queries = queries.reshape(count * plan.batch * plan.kv_heads, -1, plan.head_dim)
        keys = self._keys[self._weighed : self._weighed + count].reshape(len(queries), -1, plan.head_dim)
        self._weighed += count
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(count, plan.batch, plan.kv_heads, -1, plan.num_keys)
        mask = self._mask(plan.window_queries, at_least_float32(scores.dtype))
        weights = torch.add(mask, scores, alpha=scale).softmax(-1).view(count * plan.batch, -1, plan.num_keys)
        if count not in self._shares:
            shares = (plan.indices[plan.counted] / plan.indices[plan.divisors]).to(weights.dtype)  # [B, 1, H * W]
            self._shares[count] = shares.repeat(count, 1, 1)
        self._mass.append(torch.bmm(self._shares[count], weights))

    def _mask(self, queries: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of queries at these positions: 0 up to their own, else -inf; [B, 1, *, S]."""
        if (queries, dtype) not in self._masks:
            hidden = self.plan.indices[self.plan.keys] > self.plan.indices[queries]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[queries, dtype] = mask
        return self._masks[queries, dtype]


class _Spread(torch.autograd.Function):
    """`Pass.spread`; with a rotation the heads are turned in place first.

    rewritten: those of the cache, given to the first layer: its gradient is the last to come, and fetches all layers'.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, rewritten: Tensor | None, of: Pass, layer: int, rotation: Rotation | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.of, ctx.layer, ctx.rotation, ctx.shape = of, layer, rotation, heads.shape
        plan = of.plan
        turned: tuple[Tensor, ...] = ()
        if rotation is not None:
            by_token = heads.view(plan.size, plan.num_heads, plan.head_dim)
            rotation.turn_(by_token, plan.query_heads + plan.kv_heads)
            ctx.mark_dirty(heads)
            turned = (heads,)
        return *turned, *of.spread(layer, heads.view(plan.size, -1), heads.view(-1, plan.head_dim))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of: Pass = ctx.of
        plan, of_heads = of.plan, None
        rows = of.spread_back(ctx.layer, *gradients[-3:], wanted=ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            by_token = rows.view(plan.size, plan.num_heads, plan.head_dim)
            if ctx.rotation is not None:
                ctx.rotation.turn_(by_token, plan.query_heads + plan.kv_heads, transposed=True)
            of_heads = by_token.view(ctx.shape)
        return of_heads, of.of_rewritten() if ctx.needs_input_grad[1] else None, None, None, None


class _Collect(torch.autograd.Function):
    """`Pass.collect`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, of: Pass) -> Tensor:
        ctx.of = of
        return of.collect(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.of.collect_back(gradients[0]), None


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@contextlib.contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """Our attention for one forward; transformers' registries are global, and have it no longer than that."""
    config = model.config
    before = config._attn_implementation
    with _registry_lock:
        _register()
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        with _registry_lock:
            _unregister()


_registry_lock = threading.Lock()
_users: list[None] = []  # one entry per forward under way


def _register() -> None:
    from transformers import AttentionInterface

    if not _users:
        # Without a mask function of this name transformers makes no mask, for which it would wait for the device.
        AttentionInterface.register(_NAME, _packed_attention)
    _users.append(None)


def _unregister() -> None:
    from transformers import AttentionInterface

    _users.pop()
    if not _users:
        # There is a public way in, none out. Left there, the name would do no harm.
        getattr(AttentionInterface, "_global_mapping", {}).pop(_NAME, None)


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Pass,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in _OTHER_ATTENTION:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model's attention uses {name}: it cannot be trained for")
    heads = torch.cat([query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)], 1)
    out = packed.attend(int(module.layer_idx), heads, None, scaling)  # type: ignore[arg-type]
    return out.view(1, *heads.shape[:1], *query.shape[1::2]), None


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative; infinite where something is not finite."""
    distance = float((a - b).double().norm() / a.double().norm())
    return distance if math.isfinite(distance) else math.inf


def _is_watched(model: PreTrainedModel) -> bool:
    """Whether something hangs on the model's own code being run."""
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """One per layer, in order."""
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, config = type(model).__name__, model.config
    remedy = "Processors are trained for decoder-only models with plain attention, such as Llama and Qwen"
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    modules.sort(key=lambda module: int(module.layer_idx))
    source = vars(sys.modules[type(modules[0]).__module__]) if modules else {}
    problems = {
        "is an encoder-decoder": config.is_encoder_decoder,
        "is not a plain causal language model": config.get_text_config(decoder=True) is not config,
        "does not have one attention module per layer": [m.layer_idx for m in modules]
        != list(range(config.num_hidden_layers)),
        "brings its own attention": source.get("ALL_ATTENTION_FUNCTIONS") is not ALL_ATTENTION_FUNCTIONS,
        "has layers that do not keep all keys and values": any(
            type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers
        ),
        "has multi-head latent attention": getattr(config, "kv_lora_rank", None) is not None,
        "caps its attention logits": getattr(config, "attn_logit_softcapping", None) is not None,
        "has attention sinks": any(getattr(m, "sinks", None) is not None for m in modules),
    }
    for problem, present in problems.items():
        if present:
            raise NotImplementedError(f"{name} {problem}: {remedy}")
    return modules


__all__ = ["Cache", "Output", "PackedBackbone", "Rewritten", "Stretch", "round_up"]
