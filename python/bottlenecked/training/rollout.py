"""The training objective (arXiv 2505.16950, section 3 and its training): next-step cross-entropy through the
rewritten cache, with gradients cut at every step's end.

A sequence is a prompt (step 0) and the steps of an answer. For n = 0, 1, ...:

    call n       rewrites the cache at the end of step n; what is written is a constant, its gradient the call's
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..module import CacheProcessorModule, RowLayout
from .packed import Cache, Indices, PackedBackbone, Plan, Rewritten, Stretch

if TYPE_CHECKING:
    from ..config import CacheProcessorConfig
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
    indices, tally = Indices(), _Tally(batch)
    plan = Plan(backbone, stretch, indices)
    tally.plan(range(len(batch)), stretch, indices)
    indices.send(backbone.device)
    with torch.set_grad_enabled(denominator is not None):
        loss = tally.add(backbone.run(plan, None, backbone.layers()).logits, indices)
        if denominator is not None:
            (loss / denominator).backward()  # type: ignore[no-untyped-call]
    return tally.losses(indices)


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
    # The host says everything that it knows beforehand, in one transfer, and waits for the device in the end only.
    indices, tally = Indices(), _Tally(batch)
    sequences = _order(batch)
    cache = Cache(backbone, len(sequences), max(s.fed[-1][1] for s in sequences))
    lines: list[_Line] = []
    for n in range(max(len(s.fed) for s in sequences)):
        lines.append(_Line(n, sequences, backbone, processor.config, cache, lines[-1] if lines else None, indices))
        tally.plan([s.index for s in lines[n].active], lines[n].stretch, indices)
    indices.send(backbone.device)
    layers, weights = backbone.layers(), processor.weights(autocast)
    inv_freq = _inv_freq(processor.config, backbone.device)

    mass: Tensor | None = None
    for line in lines:
        selection = line.selection
        with torch.set_grad_enabled(selection is not None and denominator is not None):
            rewritten = None
            if selection is not None:
                with torch.autocast(cache.rows.device.type, dtype=autocast, enabled=autocast is not None):
                    rewritten = selection.rewrite(processor, cache.rows, mass, variant, weights, inv_freq)
            output = backbone.run(line.plan, cache, layers, rewritten)
            loss = tally.add(output.logits, indices)
            if denominator is not None and loss.requires_grad:
                (loss / denominator).backward()  # type: ignore[no-untyped-call]
        if logits is not None:
            logits += [(*at, row) for at, row in zip(line.targets(), output.logits.detach(), strict=True)]
        mass = output.mass
    return tally.losses(indices)


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


class _Line:
    """What the host knows of the n-th step of all sequences that still go on, and of the call before it."""

    def __init__(
        self,
        n: int,
        sequences: Sequence[_Sequence],
        backbone: PackedBackbone,
        config: CacheProcessorConfig,
        cache: Cache,
        before: _Line | None,
        indices: Indices,
    ) -> None:
        active = [s for s in sequences if len(s.fed) > n]
        begins = [s.fed[n][0] for s in active]
        self.active = active
        self.stretch = Stretch(
            [s.example.tokens[slice(*s.fed[n])] for s in active],
            begins,
            [[i - s.fed[n][0] for i in range(*s.fed[n]) if s.example.loss_mask[i + 1]] for s in active],
        )
        goes_on = any(len(s.fed) > n + 1 for s in active)
        self.plan = Plan(
            backbone,
            self.stretch,
            indices,
            cache,
            mass_window=config.recent_window if goes_on and config.top_k else None,
        )
        self.selection: Selection | None = None
        if n > 1 or (n == 1 and config.rewrite_prompt):
            assert before is not None
            ended = [s.fed[n - 1] for s in active]
            self.selection = Selection(config, ended, cache.rows.shape, before.plan.num_candidates, indices)
            self.plan.expect_rewritten(self.selection.sequences)

    def targets(self) -> list[tuple[int, int]]:
        """(example, index of the predicted token) of every logit."""
        pairs = zip(self.active, self.stretch.begins, self.stretch.wanted, strict=True)
        return [(s.index, begin + i + 1) for s, begin, of in pairs for i in of]


def rewrite(
    processor: CacheProcessorModule,
    cache: Tensor,
    ended: Sequence[tuple[int, int]],
    mass: Tensor | None,
    variant: Variant,
) -> None:
    """Select, process, gated write (section 3) for all layers and sequences, in place.

    cache: [num_layers, B, S, C], contiguous, a constant for autograd. ended: per sequence, its step [begin, end). mass:
    [num_layers, B, positions], -1 where nothing can be recalled; None: nowhere.
    """
    indices, config = Indices(), processor.config
    selection = Selection(config, ended, cache.shape, 0 if mass is None else mass.shape[2], indices)
    indices.send(cache.device)
    selection.rewrite(processor, cache, mass, variant, None, _inv_freq(config, cache.device))


class Selection:
    """Which rows a call rewrites, as far as the host knows: all but which positions are recalled.

    ended: per sequence, its step [begin, end); the first of those in the cache. shape: of the cache, [num_layers, B, S,
    C]. num_candidates: positions in the attention mass, 0 where there is none.
    """

    def __init__(
        self,
        config: CacheProcessorConfig,
        ended: Sequence[tuple[int, int]],
        shape: Sequence[int],
        num_candidates: int,
        indices: Indices,
    ) -> None:
        self.indices, self.batch, (num_layers, of_layer, self.size, _) = indices, len(ended), shape
        windows = [max(begin, end - config.recent_window) for begin, end in ended]
        counts = [end - window for window, (_, end) in zip(windows, ended, strict=True)]
        self.most = min(config.top_k, num_candidates)
        self.recalled = [min(self.most, window) for window in windows]
        self.lengths = [k + count for k, count in zip(self.recalled, counts, strict=True)]

        # Rows are chosen from `most` recalled positions per sequence and then all windows.
        ends = np.cumsum(counts) + self.batch * self.most
        chosen = [
            (*range(b * self.most, b * self.most + k), *range(end - count, end))
            for b, (k, count, end) in enumerate(zip(self.recalled, counts, ends.tolist(), strict=True))
        ]
        self.chosen = indices.add(np.concatenate(chosen))
        in_windows = [range(window, end) for window, (_, end) in zip(windows, ended, strict=True)]
        self.windows = indices.add(np.concatenate(in_windows))
        self.sequences = np.repeat(np.arange(self.batch), self.lengths)  # of the rows
        self.firsts = indices.add((np.arange(num_layers)[:, None] * of_layer + self.sequences) * self.size)
        self.missing: int | None = None
        if min(self.recalled) < self.most:
            self.missing = indices.add(np.arange(self.most) >= np.array(self.recalled)[:, None])
        self.kept = indices.add([[i < k] for k, n in zip(self.recalled, self.lengths, strict=True) for i in range(n)])
        self.padded, layout = RowLayout.arrays(self.lengths)
        self.layout = [indices.add(array) for array in layout]

    def rewrite(
        self,
        processor: CacheProcessorModule,
        cache: Tensor,
        mass: Tensor | None,
        variant: Variant,
        weights: Mapping[str, Tensor] | None,
        inv_freq: Tensor | None,
    ) -> Rewritten:
        """See the function of this name. mass: of these sequences and maybe others behind. weights: of `processor`.

        inv_freq: of the keys' RoPE, where the Processor sees them without.
        """
        config, indices = processor.config, self.indices
        among = indices[self.windows].expand(config.num_layers, -1)
        if self.most:
            assert mass is not None
            among = torch.cat([self._recall(mass[:, : self.batch], variant).flatten(1), among], 1)
        positions = among.index_select(1, indices[self.chosen])  # [num_layers, rows]
        places = (positions + indices[self.firsts]).flatten()

        dtype = torch.promote_types(cache.dtype, torch.float32)
        flat = cache.view(-1, cache.shape[3])
        rows = flat.index_select(0, places).to(dtype).view(*positions.shape, -1)
        seen, angles = rows, None
        if inv_freq is not None:
            angles = (positions[..., None].float() * inv_freq).to(dtype)  # float32, as in the backbone
            seen = _rotate_keys(rows, -angles, config.num_kv_heads)
        layout = RowLayout(self.lengths, self.padded, *(indices[number] for number in self.layout))
        turned = positions if variant.positions else None
        edit = processor(seen, self.lengths, turned, layout=layout, weights=weights).to(dtype)
        if angles is not None:
            edit = _rotate_keys(edit, angles, config.num_kv_heads)
        if variant.write == "recalled":
            edit = edit * indices[self.kept]
        written = (rows + edit).to(cache.dtype).flatten(0, 1)
        flat.index_copy_(0, places, written.detach())
        return Rewritten(written, positions)

    def _recall(self, mass: Tensor, variant: Variant) -> Tensor:
        """The recalled positions, ascending, [num_layers, B, most]; of equal masses the smaller position wins."""
        if variant.selection == "random":
            mass = torch.rand(mass.shape).to(mass.device).masked_fill(mass < 0, -1.0)
        order = mass.sort(dim=2, descending=True, stable=True).indices[..., : self.most]
        if self.missing is not None:
            order = order.masked_fill(self.indices[self.missing].bool(), self.size - 1)
        return order.sort(dim=2).values


def _inv_freq(config: CacheProcessorConfig, device: torch.device) -> Tensor | None:
    if config.key_space != "unrotated":
        return None
    return torch.tensor(config.inv_freq(), dtype=torch.float32).to(device, non_blocking=True)


def _rotate_keys(rows: Tensor, angles: Tensor, num_heads: int) -> Tensor:
    """RoPE of the keys in rows [num_layers, rows, C] by angles [num_layers, rows, d / 2]; i pairs with i + d / 2."""
    keys, values = rows.chunk(2, -1)
    first, second = keys.view(*keys.shape[:2], num_heads, -1).chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([rotated.flatten(2), values], -1)


class _Tally:
    """Sums up the losses of a batch on its device, without waiting for it."""

    def __init__(self, batch: Sequence[Example]) -> None:
        self.batch = batch
        self.starts = [{begin for begin, _ in example.segments} for example in batch]
        self.counts = [0] * (2 * len(batch))
        self.targets: list[int] = []  # of forwards, in `Indices`
        self.columns: list[int] = []
        self.found: list[Tensor] = []

    def plan(self, examples: Sequence[int], stretch: Stretch, indices: Indices) -> None:
        """What one forward will be asked for. examples: which of the batch the stretch's sequences are."""
        targets, columns = [], []
        for example, begin, wanted in zip(examples, stretch.begins, stretch.wanted, strict=True):
            for i in wanted:
                target = begin + i + 1
                targets.append(self.batch[example].tokens[target])
                columns.append(2 * example + (FIRST if target in self.starts[example] else REST))
                self.counts[columns[-1]] += 1
        self.targets.append(indices.add(targets))
        self.columns.append(indices.add(columns))

    def add(self, logits: Tensor, indices: Indices) -> Tensor:
        """The summed loss of the next forward."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(dtype), indices[self.targets[len(self.found)]], reduction="none")
        self.found.append(losses.detach())
        return losses.sum()

    def losses(self, indices: Indices) -> Losses:
        """Waits for the device."""
        found = torch.cat(self.found).double()
        sums = torch.zeros(2 * len(self.batch), dtype=torch.float64, device=found.device)
        sums.index_add_(0, torch.cat([indices[number] for number in self.columns]), found)
        return Losses(sums.view(-1, 2).cpu(), torch.tensor(self.counts).view(-1, 2))


__all__ = ["FIRST", "METHOD", "REST", "Losses", "Variant", "count_targets", "rewrite", "rollout", "supervised"]
