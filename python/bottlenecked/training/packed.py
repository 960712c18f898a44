"""A causal language model of transformers, run on batches of unequal length without padding its products.

The tokens of all sequences stand one after the other in a single row, so that every linear layer sees real tokens
only; attention alone is padded, to the longest of them. Our attention takes earlier keys and values from a tensor that
autograd can follow, hands out the new ones, and computes attention mass from the very queries (arXiv 2505.16950,
section 3) while scaled-dot-product attention runs unchanged: no attention matrix is kept.

Models like Llama and Qwen run through decoder.py, where that is found to compute the same; all others through their own
code, with our attention under a name of our own, as in the transformers integration.

Short lines on a GPU take as long as the host needs to issue them. Hence one transfer of all indices, nothing that makes
the host wait for the device, and, per layer, one gather before attention and one behind it, either way.

Sizes: B sequences, T packed tokens, m slots per sequence (tokens of the longest, rounded up), S earlier positions, H
query heads, H_kv KV heads of size d, G = H / H_kv, N = H + 2 * H_kv, C = 2 * H_kv * d (keys over KV heads, then values
over KV heads).
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
    kv: [num_layers, tokens, C], the new cache rows, detached; None unless asked for.
    mass: [num_layers, B, positions], attention mass of every position before its sequence's window, -1 elsewhere;
        None where not asked for or where no sequence has such a position.
    """

    logits: Tensor
    kv: Tensor | None
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
        prior: Tensor | None = None,
        *,
        keep: bool = False,
        mass_window: int | None = None,
    ) -> Output:
        """Feed one stretch.

        prior: the cache, [num_layers, B, S, C], of which sequence b's first begins[b] positions are read; gradients
            flow into it. None where all begin at 0.
        keep: whether the new cache rows are wanted.
        mass_window: compute the attention mass that the last `mass_window` tokens of each sequence's stretch paid.
        """
        indices, num_prior = Indices(), 0 if prior is None else prior.shape[2]
        plan = Plan(self, stretch, indices, num_prior=num_prior, mass_window=mass_window)
        indices.send(self.device)
        return self.run(plan, prior, self.layers(), keep=keep)

    def layers(self) -> list[Layer] | None:
        """For `run`, to be asked for once per batch; None for a model that runs through its own code."""
        decoder = self._decoder
        return None if decoder is None or _is_watched(self.model) else decoder.layers()

    def run(self, plan: Plan, prior: Tensor | None, layers: list[Layer] | None, *, keep: bool = False) -> Output:
        """`forward` of a plan, after its indices were sent."""
        return self._run(plan, prior, layers, self._decoder, keep)

    def shares_kv_heads(self) -> bool:
        """Whether causal attention reads the KV head of several query heads without making attention matrices."""
        device = self.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.model.dtype
        return device != "cuda" or dtype in (torch.float16, torch.bfloat16)

    def _run(
        self, plan: Plan, prior: Tensor | None, layers: list[Layer] | None, decoder: Decoder | None, keep: bool
    ) -> Output:
        under_way, indices = _Pass(plan, prior, keep), plan.indices
        ids, positions, wanted = indices[plan.ids], indices[plan.positions], indices[plan.wanted]
        if layers is not None and decoder is not None:
            logits = decoder.forward(ids, positions, wanted, layers, under_way.attend)
        else:
            with _attention(self.model):
                logits = self.model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    use_cache=False,
                    logits_to_keep=wanted,
                    packed=under_way,
                ).logits[0]
        return Output(logits, under_way.kept(), under_way.mass())

    @functools.cached_property
    def _decoder(self) -> Decoder | None:
        """None unless every layer does to a short text, and to its cache, what the model's own code does."""
        try:
            decoder = Decoder(self.model, self.num_query_heads, self.num_kv_heads)
        except AttributeError:
            return None
        vocabulary, inputs = self.model.get_input_embeddings().num_embeddings, []
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), contextlib.ExitStack() as hooks:
            indices = Indices()
            plan = Plan(self, Stretch([[i % vocabulary for i in range(13)]], [0], [range(13)]), indices)
            indices.send(self.device)
            for module in (*decoder.modules, decoder.norm):
                hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
                hooks.callback(hook.remove)
            theirs = self._run(plan, None, None, None, keep=True)
            under_way = _Pass(plan, None, keep=True)
            rotation = decoder.rotation(inputs[0], indices[plan.positions])
            pairs = [
                (expected, layer.run(given, rotation, under_way.attend))
                for layer, (given, expected) in zip(decoder.layers(), itertools.pairwise(inputs), strict=True)
            ]
            real = [(expected[: plan.num_tokens], got[: plan.num_tokens]) for expected, got in pairs]
            real.append((theirs.logits, decoder.logits(inputs[-1][: plan.num_tokens])))
            kept = under_way.kept()
            assert theirs.kv is not None
            assert kept is not None
            real += zip(theirs.kv, kept, strict=True)
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
        self._sent = [part.view(array.shape) for part, array in zip(parts, self._arrays, strict=True)]

    def __getitem__(self, number: int) -> Tensor:
        """int64, in the shape in which it was added."""
        return self._sent[number]


class Plan:
    """All that one forward needs and the host knows, before the device begins.

    Tokens stand one after the other, T of them with padding at the end. For attention they are spread to slots, m per
    sequence. Each token has a slot and each slot a token: those of padding have each other's, any of them, so that
    one is never without the other. Their gradients are exactly zero, since no loss and no other token sees
    them. So the gradient of spreading is collecting, which needs no sums, and the reverse.
    """

    def __init__(
        self,
        backbone: PackedBackbone,
        stretch: Stretch,
        indices: Indices,
        *,
        num_prior: int = 0,
        mass_window: int | None = None,
    ) -> None:
        """As for `PackedBackbone.forward`; num_prior: S, 0 without a cache."""
        self.indices, self.num_prior = indices, num_prior
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
        # Without a cache plain causal attention will do, unless that would have to make attention matrices.
        self.causal = num_prior == 0 and (self.groups == 1 or backbone.shares_kv_heads())

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
        self._arrange(inside)

        # Positions of queries and keys; those of no token are beyond every query.
        queries = begins[:, None] + np.arange(slots)
        before = np.arange(num_prior)
        keys = np.concatenate([np.where(before < begins[:, None], before, np.iinfo(np.int64).max), queries], 1)
        self.keys = indices.add(keys[:, None, None])
        self.queries = indices.add(np.tile(queries, self.groups)[:, None, :, None])
        self.num_candidates = 0
        if mass_window is not None:
            self._window(mass_window, lengths, begins, queries)

    def _arrange(self, inside: npt.NDArray[np.bool_]) -> None:
        """Which head of which token goes where: rows of d numbers, spread to [B, m * N], queries first."""
        batch, slots, heads, kv, groups = self.batch, self.slots, self.query_heads, self.kv_heads, self.groups
        token = np.full(inside.shape, self.num_tokens)  # of each slot
        token[inside] = np.arange(self.num_tokens)
        some_padding = [] if inside.all() else [int(np.flatnonzero(~inside)[0])]
        slot = np.concatenate([np.flatnonzero(inside), some_padding * (self.size - self.num_tokens)]).astype(np.int64)
        self.real_slots = self.indices.add(slot[: self.num_tokens])
        b, i = slot[:, None] // slots, slot[:, None] % slots
        # Head h = k * groups + g asks KV head k.
        head, kv_row = np.arange(heads), np.arange(2 * kv)

        queries = token[:, None] * self.num_heads + head[:, None]  # [B, H, m]
        keys_values = token[..., None] * self.num_heads + heads + kv_row  # [B, m, 2 * H_kv]
        self.spread = self.indices.add(np.concatenate([queries.reshape(batch, -1), keys_values.reshape(batch, -1)], 1))
        # Attention hands out rows, and takes gradients of queries, as [B, G * m, H_kv] or, if causal, [B, m, H].
        if self.causal:
            of_query, asking = i * heads + head, token[..., None] * heads + head
        else:
            of_query = ((head % groups) * slots + i) * kv + head // groups
            asking = token[:, None, :, None] * heads + np.arange(groups)[:, None, None] + groups * np.arange(kv)
        self.collect = self.indices.add(b * (heads * slots) + of_query)
        self.collect_back = self.indices.add(asking)
        rows = self.num_heads * slots
        of_kv = heads * slots + i * (2 * kv) + kv_row
        self.spread_back = self.indices.add(np.concatenate([b * rows + of_query, b * rows + of_kv], 1))

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
        candidates = np.arange(self.num_candidates)
        behind = self.num_prior + candidates - begins[:, None]
        columns = np.where(candidates < begins[:, None], candidates, behind)
        self.columns = add(np.minimum(columns, self.num_prior + self.slots - 1))
        self.no_candidate = add(candidates >= begin[:, None])
        of_layer = 4 * self.batch * self.query_heads * size * (self.num_prior + self.slots)
        self.layers_at_once = max(1, _MASS_BYTES[self.on_gpu] // of_layer)


class _Pass:
    """One forward under way: what all layers share, and what they leave behind."""

    def __init__(self, plan: Plan, prior: Tensor | None, keep: bool) -> None:
        self.plan, self.keep, indices = plan, keep, plan.indices
        # Together: one by one, each layer's gradient would be padded to the size of all.
        self.priors = () if prior is None else prior.unbind(0)
        self.spread, self.spread_back = indices[plan.spread].flatten(), indices[plan.spread_back].flatten()
        self.collect, self.collect_back = indices[plan.collect].flatten(), indices[plan.collect_back].flatten()
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._kv: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor, float]] = []
        self._mass: list[Tensor] = []
        self._shares: Tensor | None = None  # of a query in the mass

    def attend(self, layer: int, heads: Tensor, rotation: Rotation | None, scale: float) -> Tensor:
        """heads [T, N, d] in any shape, turned in place if there is a rotation -> [T, H * d]."""
        plan = self.plan
        prior = self.priors[layer] if self.priors else None
        query, key, value = _Spread.apply(heads, prior, self, rotation)[-3:]  # type: ignore[no-untyped-call]
        if plan.num_candidates:
            self._weigh(query.detach(), key.detach(), scale)
        if plan.causal:
            shared = plan.groups > 1
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
        else:
            # The queries of a KV head as one: its keys and values need not be repeated.
            mask = self._mask(plan.queries, query.dtype)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        collected: Tensor = _Collect.apply(out, self)  # type: ignore[no-untyped-call]
        return collected

    def keep_rows(self, rows: Tensor) -> None:
        """The new rows of the next layer, [B, m, C]."""
        self._kv.append(rows)

    def kept(self) -> Tensor | None:
        """The new cache rows, [num_layers, tokens, C]; once."""
        if not self.keep:
            return None
        rows, self._kv = torch.stack(self._kv), []
        return rows.flatten(1, 2).index_select(1, self.plan.indices[self.plan.real_slots])

    def mass(self) -> Tensor | None:
        """[num_layers, B, candidates]; None where there are none."""
        plan = self.plan
        if not plan.num_candidates:
            return None
        self._weigh_waiting()
        mass = torch.cat(self._mass)
        columns = plan.indices[plan.columns].expand(len(mass), -1, -1)
        return mass.gather(2, columns).masked_fill(plan.indices[plan.no_candidate].bool(), -1.0)

    def _weigh(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Several layers at once, as long as their attention matrices stay small."""
        plan = self.plan
        query = query.view(plan.batch, plan.query_heads, plan.slots, plan.head_dim)
        if not plan.whole_window:
            query = query.take_along_dim(plan.indices[plan.window], 2)
        if self._waiting and self._waiting[0][2] != scale:
            self._weigh_waiting()
        self._waiting.append((query, key, scale))
        if len(self._waiting) >= plan.layers_at_once:
            self._weigh_waiting()

    def _weigh_waiting(self) -> None:
        """Attention mass (section 3), [layers, B, keys]."""
        if not self._waiting:
            return
        plan, scale = self.plan, self._waiting[0][2]
        keys = torch.stack([key for _, key, _ in self._waiting])
        queries = torch.stack([query for query, _, _ in self._waiting])
        self._waiting = []
        queries = queries.view(*keys.shape[:3], -1, plan.head_dim)  # [layers, B, H_kv, G * W, d]
        scores = queries @ keys.transpose(3, 4)
        mask = self._mask(plan.window_queries, torch.promote_types(scores.dtype, torch.float32))
        weights = torch.add(mask, scores, alpha=scale).softmax(-1).flatten(2, 3)
        if self._shares is None:
            self._shares = (plan.indices[plan.counted] / plan.indices[plan.divisors]).to(weights.dtype)
        self._mass.append((self._shares @ weights)[:, :, 0])

    def _mask(self, queries: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of queries at these positions: 0 up to their own, else -inf; [B, 1, *, S + m]."""
        if (queries, dtype) not in self._masks:
            hidden = self.plan.indices[self.plan.keys] > self.plan.indices[queries]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[queries, dtype] = mask
        return self._masks[queries, dtype]


class _Spread(torch.autograd.Function):
    """Heads of tokens [T, N, d], and a layer's cache [B, S, C] -> queries, keys and values for attention.

    Queries are [B, H_kv, G * m, d], or [B, H, m, d] if causal; keys and values [B, H_kv, S + m, d]. With a rotation
    the heads are turned in place first.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, prior: Tensor | None, of: _Pass, rotation: Rotation | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.of, ctx.rotation, ctx.shape = of, rotation, heads.shape
        plan = of.plan
        by_token = heads.view(plan.size, plan.num_heads, plan.head_dim)
        turned: tuple[Tensor, ...] = ()
        if rotation is not None:
            rotation.turn_(by_token, plan.query_heads + plan.kv_heads)
            ctx.mark_dirty(heads)
            turned = (heads,)
        rows = by_token.flatten(0, 1).index_select(0, of.spread).view(plan.batch, -1, plan.head_dim)
        query, new = rows.split([plan.query_heads * plan.slots, 2 * plan.kv_heads * plan.slots], 1)  # type: ignore[no-untyped-call]
        new = new.view(plan.batch, plan.slots, plan.kv_width)
        if prior is not None:
            both = torch.cat([prior, new], 1)
            new = both[:, plan.num_prior :]
        else:
            # Kept, the rows should not keep the queries alive with them.
            both = new = new.contiguous() if of.keep else new
        if of.keep:
            of.keep_rows(new)
        key, value = both.view(*both.shape[:2], 2, plan.kv_heads, plan.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query = query.view(plan.batch, plan.query_heads if plan.causal else plan.kv_heads, -1, plan.head_dim)
        return *turned, query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of: _Pass = ctx.of
        plan, (query, key, value) = of.plan, gradients[-3:]
        # [B, S + m, 2, H_kv, d]
        both = torch.stack([key.transpose(1, 2), value.transpose(1, 2)], 2)
        of_prior, new = both.flatten(2).split([plan.num_prior, plan.slots], 1)  # type: ignore[no-untyped-call]
        of_heads = None
        if ctx.needs_input_grad[0]:
            asked = query.transpose(1, 2).reshape(plan.batch, -1, plan.head_dim)
            rows = torch.cat([asked, new.view(plan.batch, -1, plan.head_dim)], 1)
            by_token = rows.flatten(0, 1).index_select(0, of.spread_back)
            by_token = by_token.view(plan.size, plan.num_heads, plan.head_dim)
            if ctx.rotation is not None:
                ctx.rotation.turn_(by_token, plan.query_heads + plan.kv_heads, transposed=True)
            of_heads = by_token.view(ctx.shape)
        return of_heads, of_prior if ctx.needs_input_grad[1] else None, None, None


class _Collect(torch.autograd.Function):
    """What attention gives, [B, *, *, d], by token: [T, H * d]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, of: _Pass) -> Tensor:
        ctx.of, ctx.shape = of, out.shape
        # Attention's kernels hand it out with the heads of a slot together: no copy.
        rows = out.transpose(1, 2).reshape(-1, out.shape[3]).index_select(0, of.collect)
        return rows.view(of.plan.size, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        batch, heads, slots, width = ctx.shape
        rows = gradients[0].reshape(-1, width).index_select(0, ctx.of.collect_back)
        return rows.view(batch, slots, heads, width).transpose(1, 2), None


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
    packed: _Pass,
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


__all__ = ["Output", "PackedBackbone", "Stretch", "round_up"]
