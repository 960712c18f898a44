"""A causal language model of transformers, run on batches of unequal length without padding its products.

The tokens of all sequences stand one after the other in a single row, so that every linear layer sees real tokens
only; attention alone is padded, to the longest of them. An attention function under a name of our own, as in
the transformers integration, takes earlier keys and values from a tensor that autograd can follow, hands out the
new ones, and computes attention mass from the very queries (arXiv 2505.16950, section 3) while scaled-dot-product
attention runs unchanged: no attention matrix is kept.

Sizes: B sequences, T packed tokens, m tokens of the longest sequence, S earlier positions, H query heads, H_kv KV
heads of size d, C = 2 * H_kv * d (keys over KV heads, then values over KV heads).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes are rounded up to multiples of these: allocators and kernel caches then see few shapes.
TOKEN_MULTIPLE = 16
POSITION_MULTIPLE = 32
_LENGTH_MULTIPLE = 8

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
        packed = _Pass(self, stretch, prior, keep, mass_window)
        with _attention(self.model):
            logits = self.model(
                input_ids=packed.ids,
                position_ids=packed.positions,
                use_cache=False,
                logits_to_keep=packed.wanted,
                packed=packed,
            ).logits[0]
        kv = torch.stack(packed.kv)[:, : packed.num_tokens] if keep else None
        return Output(logits, kv, torch.stack(packed.mass) if packed.mass else None)


@dataclass
class _Pass:
    """One forward: index tensors that all layers share, and what they leave behind."""

    backbone: PackedBackbone
    stretch: Stretch
    prior: Tensor | None
    keep: bool
    mass_window: int | None
    kv: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokens, begins = self.stretch.tokens, self.stretch.begins
        lengths = [len(t) for t in tokens]
        self.num_tokens = sum(lengths)
        self.batch = len(tokens)
        self.longest = round_up(max(lengths), _LENGTH_MULTIPLE)
        padding = round_up(self.num_tokens, TOKEN_MULTIPLE) - self.num_tokens
        firsts = [sum(lengths[:b]) for b in range(self.batch)]
        ids = [token for of_one in tokens for token in of_one] + [0] * padding
        positions = [b + i for b, n in zip(begins, lengths, strict=True) for i in range(n)] + [0] * padding
        # Packed token -> its place [B, m], and back; what is only padding may stand anywhere.
        places = [b * self.longest + i for b, n in enumerate(lengths) for i in range(n)] + [0] * padding
        slots = [f + min(i, n - 1) for f, n in zip(firsts, lengths, strict=True) for i in range(self.longest)]
        wanted = [f + i for f, of_one in zip(firsts, self.stretch.wanted, strict=True) for i in of_one]
        self.ids, self.positions = self._tensor([ids]), self._tensor([positions])
        self.places, self.slots, self.wanted = self._tensor(places), self._tensor(slots), self._tensor(wanted)

        self.begins, self.lengths = self._tensor(begins), self._tensor(lengths)
        # Positions of all keys, [B, S + m]; those of no token are beyond every query.
        self.num_prior = 0 if self.prior is None else self.prior.shape[2]
        # Together: one by one, each layer's gradient would be padded to the size of all.
        self.priors = () if self.prior is None else self.prior.unbind(0)
        before = torch.arange(self.num_prior, device=self.backbone.device).expand(self.batch, -1)
        inside = torch.arange(self.longest, device=self.backbone.device).expand(self.batch, -1)
        self.queries = self.begins[:, None] + inside
        far = torch.iinfo(torch.long).max
        keys = torch.cat([before.where(before < self.begins[:, None], far), self.queries], 1)
        self.keys = keys
        self.mask = None if self.prior is None else self._mask(self.queries)
        self._window()

    def _window(self) -> None:
        """Which queries count for the attention mass, [B, W], and which positions it is wanted of."""
        self.num_candidates = 0
        if self.mass_window is None:
            return
        counts = self.lengths.clamp(max=self.mass_window)
        window_begins = self.begins + self.lengths - counts
        pairs = zip(self.stretch.begins, self.stretch.tokens, strict=True)
        self.num_candidates = max(begin + max(0, len(t) - self.mass_window) for begin, t in pairs)
        if self.num_candidates == 0:
            return
        size = min(self.mass_window, self.longest)
        index = (self.lengths - counts)[:, None] + torch.arange(size, device=self.backbone.device)
        self.window = index.clamp(max=self.longest - 1)
        inside = torch.arange(size, device=self.backbone.device) < counts[:, None]
        weight = inside / (counts[:, None] * self.backbone.num_query_heads)
        self.window_weight = self._per_group(weight)[..., None]  # [B, 1, G * W, 1]
        self.window_mask = self._mask(self.queries.gather(1, self.window))
        candidates = torch.arange(self.num_candidates, device=self.backbone.device).expand(self.batch, -1)
        behind = self.num_prior + candidates - self.begins[:, None]
        self.columns = candidates.where(candidates < self.begins[:, None], behind)
        self.columns = self.columns.clamp(max=self.keys.shape[1] - 1)
        self.no_candidate = candidates >= window_begins[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, d], key and value [H_kv, T, d], after RoPE -> [1, T, H, d]."""
        if self.keep:
            rows = torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], 1)
            self.kv.append(rows.detach())
        query, key, value = self._pad(query), self._pad(key), self._pad(value)  # [B, m, heads, d]
        if self.prior is not None:
            before = self.priors[layer].view(self.batch, self.num_prior, 2, *key.shape[2:]).unbind(2)
            key, value = torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if self.num_candidates:
            self.mass.append(self._mass(query.detach(), key.detach(), scale))
        if self.mask is None:
            grouped = query.shape[2] != key.shape[1]
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key, value, is_causal=True, scale=scale, enable_gqa=grouped
            ).transpose(1, 2)
        else:
            # The queries of a KV head as one: its keys and values need not be repeated.
            self.mask = self.mask.to(query.dtype)
            out = F.scaled_dot_product_attention(self._group(query), key, value, attn_mask=self.mask, scale=scale)
            out = out.view(self.batch, key.shape[1], -1, self.longest, key.shape[3]).permute(0, 3, 1, 2, 4)
        return out.reshape(self.batch * self.longest, *query.shape[2:]).index_select(0, self.places)[None]

    def _mass(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Attention mass (section 3) of the positions before the window: [B, candidates]."""
        index = self.window[..., None, None].expand(-1, -1, *query.shape[2:])
        scores = self._group(query.gather(1, index)) @ key.transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        weights = (scores + self.window_mask).softmax(-1) * self.window_weight
        return weights.sum((1, 2)).gather(1, self.columns).masked_fill(self.no_candidate, -1.0)

    def _pad(self, x: Tensor) -> Tensor:
        """[heads, T, d] -> [B, m, heads, d]."""
        return x.transpose(0, 1).index_select(0, self.slots).view(self.batch, self.longest, x.shape[0], x.shape[2])

    def _group(self, query: Tensor) -> Tensor:
        """[B, n, H, d] -> [B, H_kv, H / H_kv * n, d]."""
        split = query.view(*query.shape[:2], self.backbone.num_kv_heads, -1, query.shape[3])
        return split.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _per_group(self, x: Tensor) -> Tensor:
        """[B, n, ...] -> [B, 1, H / H_kv * n, ...]: the same for every query head."""
        groups = self.backbone.num_query_heads // self.backbone.num_kv_heads
        return x[:, None].expand(-1, groups, *x.shape[1:]).flatten(1, 2)[:, None]

    def _mask(self, queries: Tensor) -> Tensor:
        """What to add to the scores of queries at these positions [B, n]: 0 up to their own, else -inf."""
        hidden = self.keys[:, None] > queries[..., None]
        return self._per_group(torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.backbone.device, non_blocking=True)


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
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _users:
        AttentionInterface.register(_NAME, _packed_attention)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    _users.append(None)


def _unregister() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    _users.pop()
    if not _users:
        for interface in (AttentionInterface, AttentionMaskInterface):
            # There is a public way in, none out. Left there, the name would do no harm.
            getattr(interface, "_global_mapping", {}).pop(_NAME, None)


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
    return packed.attend(int(module.layer_idx), query[0], key[0], value[0], scaling), None  # type: ignore[arg-type]


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
