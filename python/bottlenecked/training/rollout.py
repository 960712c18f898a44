"""The training objective (arXiv 2505.16950, section 3 and its training): next-step cross-entropy through the
rewritten cache, with gradients cut at every step's end.

A sequence is a prompt (step 0) and the steps of an answer. For n = 0, 1, ...:

    call n       rewrites the cache at the end of step n, out of place
    forward      feeds step n + 1 on the rewritten cache; its cross-entropy is the loss of call n
    backward     at once; the rewritten rows and the new ones are then constants for call n + 1

So the one forward of a step is both the loss of the call before it and the roll-out for the call after it: nothing is
computed twice, and activations of a single step are alive at any time. The backbone's weights get no gradient. The
Processors of all layers are one stacked product, since they are not chained across layers. Selection (attention mass,
top-k) has no gradient.

With timing "post" the first token of a step is predicted by the line-ending token before it, which was fed before
that boundary's rewrite: as at inference, so it counts for the call one step earlier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import POSITION_MULTIPLE, Output, PackedBackbone, Stretch, round_up

if TYPE_CHECKING:
    from ..module import CacheProcessorModule
    from .data import Example

FIRST, REST = 0, 1


@dataclass(frozen=True)
class Variant:
    """What the method's critics would change. The defaults are the method; nothing else can be exported.

    selection: "mass" recalls the positions with the largest attention mass, "random" as many random ones.
    write: "all" rewrites every selected row, "recalled" only the recalled ones (the window is read).
    positions: whether the block's queries and keys are rotated (RoPE, base 10000) by their token positions.
    """

    selection: Literal["mass", "random"] = "mass"
    write: Literal["all", "recalled"] = "all"
    positions: bool = False


METHOD = Variant()


@dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats, summed per example of a batch, in its order; FIRST and REST are the columns.

    sums: float64 [batch, 2], over the first tokens of steps and over the rest. counts: int64 [batch, 2].
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Per token; NaN where there is none."""
        return float(self.sums.sum() / self.counts.sum())


def count_targets(batch: Sequence[Example]) -> int:
    """Tokens that the losses of a batch are summed over."""
    return sum(sum(example.loss_mask[1:]) for example in batch)


def supervised(backbone: PackedBackbone, batch: Sequence[Example], *, denominator: float | None = None) -> Losses:
    """Plain next-token cross-entropy without any rewrite: stage 1, and what an identity Processor gives.

    denominator: add the gradients of sum / denominator to those of the backbone's parameters; None: none.

    Logits are computed only where there is a loss.
    """
    stretch = Stretch(
        [example.tokens[:-1] for example in batch],
        [0] * len(batch),
        [[i for i, wanted in enumerate(example.loss_mask[1:]) if wanted] for example in batch],
    )
    tally = _Tally(batch, backbone.device)
    with torch.set_grad_enabled(denominator is not None):
        loss = tally.add(range(len(batch)), stretch, backbone.forward(stretch))
        if denominator is not None:
            (loss / denominator).backward()  # type: ignore[no-untyped-call]
    return tally.losses()


def rollout(
    backbone: PackedBackbone,
    processor: CacheProcessorModule,
    batch: Sequence[Example],
    *,
    denominator: float | None = None,
    variant: Variant = METHOD,
    autocast: torch.dtype | None = None,
    logits: list[tuple[int, int, Tensor]] | None = None,
) -> Losses:
    """Teacher-forced cross-entropy of a batch while `processor` rewrites the cache after every step.

    processor: for this backbone, on its device; its config decides window, top_k, rewrite_prompt and key space. Steps
        and timing are those of the examples' segments.
    denominator: add the gradients of sum / denominator to those of the Processor's parameters, call by call; None:
        none, and no activations are kept.
    autocast: the Processor's products are computed in this dtype; default: in its parameters'.
    logits: gets (example, index of the predicted token, logits [vocabulary]) of every token that counts.

    Activations of one step of all sequences are alive at a time. The random selection of `variant` draws from torch's
    default generator.
    """
    sequences = _order(batch)
    tally = _Tally(batch, backbone.device)
    store = _Store(backbone, [s.fed[-1][1] for s in sequences])
    mass: Tensor | None = None
    for n in range(max(len(s.fed) for s in sequences)):
        active = [s for s in sequences if len(s.fed) > n]
        stretch = Stretch(
            [s.example.tokens[slice(*s.fed[n])] for s in active],
            [s.fed[n][0] for s in active],
            [[i - s.fed[n][0] for i in range(*s.fed[n]) if s.example.loss_mask[i + 1]] for s in active],
        )
        called = n > 1 or (n == 1 and processor.config.rewrite_prompt)
        with torch.set_grad_enabled(called and denominator is not None):
            prior = store.read(len(active), stretch.begins) if n else None
            if prior is not None:
                if called:
                    ended = [s.fed[n - 1] for s in active]
                    mass = None if mass is None else mass[:, : len(active)]
                    with torch.autocast(prior.device.type, dtype=autocast, enabled=autocast is not None):
                        rewrite(processor, prior, ended, mass, variant)
                prior = prior.view(backbone.num_layers, len(active), -1, backbone.kv_width)
            goes_on = any(len(s.fed) > n + 1 for s in active)
            output = backbone.forward(
                stretch,
                prior,
                keep=goes_on,
                mass_window=processor.config.recent_window if goes_on and processor.config.top_k else None,
            )
            loss = tally.add([s.index for s in active], stretch, output)
            if denominator is not None and loss.requires_grad:
                (loss / denominator).backward()  # type: ignore[no-untyped-call]
        if logits is not None:
            targets = [(s.index, s.fed[n][0] + i + 1) for s, of in zip(active, stretch.wanted, strict=True) for i in of]
            logits += [(*at, row) for at, row in zip(targets, output.logits.detach(), strict=True)]
        mass = output.mass
        if goes_on:
            store.write(stretch, prior, output)
    return tally.losses()


@dataclass(frozen=True)
class _Sequence:
    """An example, its place in the batch, and the ranges of tokens that are fed, one per step.

    The last token of all is never fed: nothing follows it.
    """

    index: int
    example: Example
    fed: list[tuple[int, int]]


def _order(batch: Sequence[Example]) -> list[_Sequence]:
    """Most steps first, so that those still going on are the first of the batch."""
    sequences = []
    for index, example in enumerate(batch):
        last = len(example.tokens) - 1
        fed = [(begin, min(end, last)) for begin, end in example.segments if begin < last]
        sequences.append(_Sequence(index, example, fed))
    return sorted(sequences, key=lambda s: -len(s.fed))


class _Store:
    """The cache of a batch, constant for autograd: [num_layers, B, positions, C] in the backbone's dtype.

    Zero where nothing was written: masked rows are multiplied by zero weights, and must be finite for that.
    """

    def __init__(self, backbone: PackedBackbone, lengths: Sequence[int]) -> None:
        self.capacity = round_up(max(lengths), POSITION_MULTIPLE)
        shape = (backbone.num_layers, len(lengths), self.capacity, backbone.kv_width)
        self.rows = torch.zeros(shape, dtype=backbone.model.dtype, device=backbone.device)

    def read(self, batch: int, begins: Sequence[int]) -> Tensor:
        """A copy of the first sequences' rows, up to the longest of `begins`: [num_layers * B * S, C]."""
        count = round_up(max(begins), POSITION_MULTIPLE)
        return self.rows[:, :batch, :count].clone(memory_format=torch.contiguous_format).flatten(0, 2)

    def write(self, stretch: Stretch, prior: Tensor | None, output: Output) -> None:
        """Keep the rewritten rows and the new ones."""
        assert output.kv is not None
        if prior is not None:
            self.rows[:, : prior.shape[1], : prior.shape[2]] = prior.detach()
        starts = [b * self.capacity + begin for b, begin in enumerate(stretch.begins)]
        places = [s + i for s, tokens in zip(starts, stretch.tokens, strict=True) for i in range(len(tokens))]
        index = torch.tensor(places).to(self.rows.device, non_blocking=True)
        self.rows.flatten(1, 2).index_copy_(1, index, output.kv.to(self.rows.dtype))


def rewrite(
    processor: CacheProcessorModule,
    cache: Tensor,
    ended: Sequence[tuple[int, int]],
    mass: Tensor | None,
    variant: Variant,
) -> None:
    """Select, process, gated write (section 3) for all layers and sequences, in place.

    cache: [num_layers * B * S, C], a constant for autograd until now. ended: per sequence, its step [begin, end). mass:
    [num_layers, B, positions], -1 where nothing can be recalled; None: nowhere.
    """
    config = processor.config
    num_layers, batch = config.num_layers, len(ended)
    size = len(cache) // (num_layers * batch)
    windows = [max(begin, end - config.recent_window) for begin, end in ended]
    counts = [end - window for window, (_, end) in zip(windows, ended, strict=True)]
    most, longest = (0 if mass is None else min(config.top_k, mass.shape[2])), max(counts)
    recalled = [min(most, window) for window in windows]

    # Per sequence `most` recalled positions and `longest` of the window; `chosen` are those that there are.
    table = torch.tensor(windows)[:, None] + torch.arange(longest)
    table = table.clamp(max=size - 1).to(cache.device, non_blocking=True).expand(num_layers, -1, -1)
    if mass is not None:
        table = torch.cat([_recall(mass, recalled, most, variant, size), table], 2)
    starts = range(0, batch * (most + longest), most + longest)
    parts = [
        (*range(start, start + k), *range(start + most, start + most + count))
        for start, k, count in zip(starts, recalled, counts, strict=True)
    ]
    chosen = torch.tensor(list(itertools.chain(*parts))).to(cache.device, non_blocking=True)
    positions = table.flatten(1).index_select(1, chosen)  # [num_layers, rows]
    firsts = torch.arange(0, len(cache), size, device=cache.device).view(num_layers, batch, 1)
    places = (table + firsts).flatten(1).index_select(1, chosen).flatten()

    dtype = torch.promote_types(cache.dtype, torch.float32)
    rows = cache.index_select(0, places).to(dtype).view(*positions.shape, -1)
    seen, angles = rows, None
    if config.key_space == "unrotated":
        inv_freq = torch.tensor(config.inv_freq(), dtype=torch.float32, device=cache.device)
        angles = (positions[..., None].float() * inv_freq).to(dtype)  # float32, as in the backbone
        seen = _rotate_keys(rows, -angles, config.num_kv_heads)
    lengths = [k + count for k, count in zip(recalled, counts, strict=True)]
    edit = processor(seen, lengths, positions if variant.positions else None).to(dtype)
    if angles is not None:
        edit = _rotate_keys(edit, angles, config.num_kv_heads)
    if variant.write == "recalled":
        kept = [i < k for k, n in zip(recalled, lengths, strict=True) for i in range(n)]
        edit = edit * torch.tensor(kept, device=cache.device)[:, None]
    cache.index_copy_(0, places, (rows + edit).to(cache.dtype).flatten(0, 1))


def _recall(mass: Tensor, recalled: Sequence[int], most: int, variant: Variant, size: int) -> Tensor:
    """The recalled positions, ascending, [num_layers, B, most]; of equal masses the smaller position wins."""
    if variant.selection == "random":
        mass = torch.rand(mass.shape).to(mass.device).masked_fill(mass < 0, -1.0)
    order = mass.sort(dim=2, descending=True, stable=True).indices[..., :most]
    counts = torch.tensor(recalled)[:, None].to(mass.device, non_blocking=True)
    missing = torch.arange(most, device=mass.device) >= counts
    return order.masked_fill(missing, size - 1).sort(dim=2).values


def _rotate_keys(rows: Tensor, angles: Tensor, num_heads: int) -> Tensor:
    """RoPE of the keys in rows [num_layers, rows, C] by angles [num_layers, rows, d / 2]; i pairs with i + d / 2."""
    keys, values = rows.chunk(2, -1)
    first, second = keys.view(*keys.shape[:2], num_heads, -1).chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([rotated.flatten(2), values], -1)


class _Tally:
    """Sums up the losses of a batch on its device, without waiting for it."""

    def __init__(self, batch: Sequence[Example], device: torch.device) -> None:
        self.batch = batch
        self.starts = [{begin for begin, _ in example.segments} for example in batch]
        self.sums = torch.zeros(2 * len(batch), dtype=torch.float64, device=device)
        self.counts = [0] * (2 * len(batch))

    def add(self, examples: Sequence[int], stretch: Stretch, output: Output) -> Tensor:
        """The summed loss of one forward. examples: which of the batch the stretch's sequences are."""
        targets, columns = [], []
        for example, begin, wanted in zip(examples, stretch.begins, stretch.wanted, strict=True):
            for i in wanted:
                target = begin + i + 1
                targets.append(self.batch[example].tokens[target])
                columns.append(2 * example + (FIRST if target in self.starts[example] else REST))
                self.counts[columns[-1]] += 1
        device = output.logits.device
        of_tokens = torch.tensor(targets, dtype=torch.long).to(device, non_blocking=True)
        dtype = torch.promote_types(output.logits.dtype, torch.float32)
        losses = F.cross_entropy(output.logits.to(dtype), of_tokens, reduction="none")
        index = torch.tensor(columns, dtype=torch.long).to(device, non_blocking=True)
        self.sums.index_add_(0, index, losses.detach().double())
        return losses.sum()

    def losses(self) -> Losses:
        return Losses(self.sums.view(-1, 2).cpu(), torch.tensor(self.counts).view(-1, 2))


__all__ = ["FIRST", "METHOD", "REST", "Losses", "Variant", "count_targets", "rewrite", "rollout", "supervised"]
