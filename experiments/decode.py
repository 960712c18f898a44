"""Greedy generation with whatever a variant is, also with what no checkpoint expresses, in plain PyTorch.

A step that has ended is fed once more, as in training, for the attention mass of its last tokens: so a rewrite sees
what it saw in training, to the rounding. Sequences whose step has ended wait until half of them do, and are rewritten
together: they see nothing of one another. All variants go this way, so that they differ in nothing else.

Whoever is fed or rewritten stands in front of all others in the cache, so that no more of it is read or copied.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bottlenecked.module import CacheProcessorModule
from bottlenecked.training.packed import Cache, PackedBackbone, Stretch
from bottlenecked.training.rollout import METHOD, Variant, rewrite

_ROOM = 64  # positions by which the cache grows


@dataclass
class _Sequence:
    tokens: list[int]
    step_begin: int
    prompt: int
    wanted: list[int] = field(default_factory=list)  # pauses still to be read


@torch.inference_mode()
def decode(
    backbone: PackedBackbone,
    prompts: Sequence[Sequence[int]],
    *,
    line_ends: Collection[int],
    end: int,
    max_new_tokens: int,
    processor: CacheProcessorModule | None = None,
    variant: Variant = METHOD,
    every: int = 0,
    only_prompt: bool = False,
    pause: int | None = None,
    pauses: int = 0,
    autocast: torch.dtype | None = None,
) -> list[list[int]]:
    """The answers' tokens, per prompt: up to `end`, which is left out, or max_new_tokens. Pauses are left out too.

    line_ends: tokens that end a step. every: steps are of so many tokens instead. only_prompt: none but the prompt.
    pauses: so many times the token `pause` is read behind the prompt and every step. autocast: as for `rollout`.
    Of a Processor the timing must be "post" and min_step_length 1.
    """
    rows = [_Sequence(list(prompt), 0, len(prompt)) for prompt in prompts]
    for row in rows:
        row.wanted = [pause] * pauses if pause is not None else []
    store = _Store(backbone, rows, processor, variant, autocast)
    made: list[list[int]] = [[] for _ in rows]
    fresh = {i: row.tokens for i, row in enumerate(rows)}  # tokens to be fed
    waiting: dict[int, tuple[int, int]] = {}  # to be rewritten: their steps
    while fresh or waiting:
        if len(waiting) >= len(fresh):
            store.rewrite(waiting)
            fresh |= {i: [rows[i].tokens[-1]] for i in waiting}
            waiting = {}
        following = store.feed(fresh)
        fresh = {}
        for i, likeliest in following.items():
            row = rows[i]
            last, length = row.tokens[-1], len(row.tokens) - row.step_begin
            ended, at_prompt = None, len(row.tokens) == row.prompt
            if at_prompt or (not only_prompt and (length == every if every else last in line_ends)):
                ended = (row.step_begin, len(row.tokens))
                row.step_begin = len(row.tokens)
                if not at_prompt:
                    row.wanted = [pause] * pauses if pause is not None else []
            if row.wanted:
                token = row.wanted.pop()
            elif likeliest == end or len(made[i]) == max_new_tokens:
                continue
            else:
                token = likeliest
                made[i].append(token)
            row.tokens.append(token)
            if processor is not None and ended is not None:
                waiting[i] = ended
            else:
                fresh[i] = [token]
    return made


class _Store:
    """The sequences' cache, in which they stand in an order that changes."""

    def __init__(
        self,
        backbone: PackedBackbone,
        sequences: Sequence[_Sequence],
        processor: CacheProcessorModule | None,
        variant: Variant,
        autocast: torch.dtype | None,
    ) -> None:
        self.backbone, self.sequences = backbone, sequences
        self.processor, self.variant, self.autocast = processor, variant, autocast
        self._layers = backbone.layers()
        self._cache = Cache(backbone, len(sequences), max(len(s.tokens) for s in sequences) + _ROOM)
        self._order = list(range(len(sequences)))
        self._mass_of_prompts: Tensor | None = None  # [num_layers, B, positions], by sequence

    def feed(self, fresh: dict[int, list[int]]) -> dict[int, int]:
        """Write the new tokens' rows, the last ones of their sequences; the likeliest token behind each of these.

        A prompt is fed whole: the mass that a rewrite at its end needs is kept.
        """
        chosen = self._to_front(fresh)
        longest = max(len(self.sequences[i].tokens) for i in chosen)
        if longest > self._cache.capacity:
            before, self._cache = self._cache.rows, Cache(self.backbone, len(self._order), longest + _ROOM)
            self._cache.rows[:, :, : before.shape[2] - 1] = before[:, :, :-1]
        tokens = [fresh[i] for i in chosen]
        begins = [len(self.sequences[i].tokens) - len(fresh[i]) for i in chosen]
        window = None
        if self.processor is not None and self.processor.config.top_k and begins[0] == 0:
            window = self.processor.config.recent_window
        stretch = Stretch(tokens, begins, [[len(of_one) - 1] for of_one in tokens])
        output = self.backbone.forward(stretch, self._cache, mass_window=window, layers=self._layers)
        if window is not None:
            self._mass_of_prompts = output.mass
        return dict(zip(chosen, output.logits.argmax(1).tolist(), strict=True))

    def rewrite(self, ended: dict[int, tuple[int, int]]) -> None:
        """At the ends of sequences' steps [begin, end): mass, selection, edits, all as in training."""
        assert self.processor is not None
        config = self.processor.config
        chosen = self._to_front([i for i, (begin, _) in ended.items() if config.rewrite_prompt or begin > 0])
        if not chosen:
            return
        steps = [ended[i] for i in chosen]
        mass = None
        if config.top_k and steps[0][0] == 0:
            mass = None if self._mass_of_prompts is None else self._mass_of_prompts[:, chosen]
        elif config.top_k:
            mass = self._mass(steps, chosen, config.recent_window)
        with torch.autocast(self.backbone.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            rewrite(self.processor, self._cache.rows, steps, mass, self.variant)

    def _mass(self, steps: Sequence[tuple[int, int]], chosen: Sequence[int], window: int) -> Tensor | None:
        """Of steps that were fed token by token: fed once more, for it alone."""
        tokens = [self.sequences[i].tokens[begin:end] for i, (begin, end) in zip(chosen, steps, strict=True)]
        stretch = Stretch(tokens, [begin for begin, _ in steps], [[0] for _ in steps])
        first, last = min(begin for begin, _ in steps), max(end for _, end in steps)
        written = self._cache.rows[:, : len(steps), first:last]
        before = written.clone()
        mass = self.backbone.forward(stretch, self._cache, mass_window=window, layers=self._layers).mass
        written.copy_(before)
        return mass

    def _to_front(self, chosen: Collection[int]) -> list[int]:
        """These sequences, in the order in which they now stand in front."""
        count, order = len(chosen), self._order
        leaving = [place for place in range(count) if order[place] not in chosen]
        coming = [place for place in range(count, len(order)) if order[place] in chosen]
        if leaving:
            self._cache.rows[:, leaving + coming] = self._cache.rows[:, coming + leaving]
            for one, other in zip(leaving, coming, strict=True):
                order[one], order[other] = order[other], order[one]
        return order[:count]
