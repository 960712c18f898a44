"""Greedy generation with whatever a variant is, also with what no checkpoint expresses, in plain PyTorch.

A step that has ended is fed once more, as in training, for the attention mass of its last tokens: so a rewrite sees
what it saw in training, to the rounding. Sequences whose step has ended wait until half of them do, and are rewritten
together: they see nothing of one another. All variants go this way, so that they differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bottlenecked.module import CacheProcessorModule
from bottlenecked.training.packed import PackedBackbone, Stretch
from bottlenecked.training.rollout import METHOD, Variant, rewrite

_ROOM = 64  # positions by which the cache grows


@dataclass
class _Sequence:
    tokens: list[int]
    step_begin: int
    prompt: int
    wanted: list[int] = field(default_factory=list)  # pauses still to be read
    done: bool = False


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
    longest = max(map(len, prompts)) + _ROOM
    store = torch.zeros(
        (backbone.num_layers, len(rows), longest, backbone.kv_width), dtype=backbone.model.dtype, device=backbone.device
    )
    made: list[list[int]] = [[] for _ in rows]
    fresh = {i: row.tokens for i, row in enumerate(rows)}  # tokens to be fed
    waiting: dict[int, tuple[int, int]] = {}  # to be rewritten: their steps
    while fresh or waiting:
        if len(waiting) >= len(fresh):
            assert processor is not None
            with torch.autocast(backbone.device.type, dtype=autocast, enabled=autocast is not None):
                _rewrite(backbone, processor, store, rows, sorted(waiting.items()), variant)
            fresh |= {i: [rows[i].tokens[-1]] for i in waiting}
            waiting = {}
        longest = max(len(rows[i].tokens) for i in fresh)
        if longest > store.shape[2]:
            store = F.pad(store, (0, 0, 0, longest + _ROOM - store.shape[2]))
        following = _feed(backbone, store, rows, dict(sorted(fresh.items())))
        ended = {}
        fresh = {}
        for i, likeliest in following.items():
            row = rows[i]
            last, length = row.tokens[-1], len(row.tokens) - row.step_begin
            at_prompt = len(row.tokens) == row.prompt
            if at_prompt or (not only_prompt and (length == every if every else last in line_ends)):
                ended[i] = (row.step_begin, len(row.tokens))
                row.step_begin = len(row.tokens)
                if not at_prompt:
                    row.wanted = [pause] * pauses if pause is not None else []
            if row.wanted:
                token = row.wanted.pop()
            elif likeliest == end or len(made[i]) == max_new_tokens:
                row.done = True
                continue
            else:
                token = likeliest
                made[i].append(token)
            row.tokens.append(token)
            if processor is not None and i in ended:
                waiting[i] = ended[i]
            else:
                fresh[i] = [token]
    return made


def _feed(
    backbone: PackedBackbone, store: Tensor, rows: Sequence[_Sequence], fresh: dict[int, list[int]]
) -> dict[int, int]:
    """Write the new tokens' rows; the likeliest token behind each sequence's last."""
    chosen = list(fresh)
    begins = [len(rows[i].tokens) - len(fresh[i]) for i in chosen]
    stretch = Stretch(list(fresh.values()), begins, [[len(tokens) - 1] for tokens in fresh.values()])
    output = backbone.forward(stretch, _prior(store, chosen, begins), keep=True)
    assert output.kv is not None
    sequences = [i for i, tokens in fresh.items() for _ in tokens]
    positions = [begin + j for begin, tokens in zip(begins, fresh.values(), strict=True) for j in range(len(tokens))]
    store[:, sequences, positions] = output.kv
    return dict(zip(chosen, output.logits.argmax(1).tolist(), strict=True))


def _rewrite(
    backbone: PackedBackbone,
    processor: CacheProcessorModule,
    store: Tensor,
    rows: Sequence[_Sequence],
    ended: Sequence[tuple[int, tuple[int, int]]],
    variant: Variant,
) -> None:
    """At the ends of steps [begin, end) of sequences: mass, selection, edits, all as in training."""
    config = processor.config
    ended = [(i, step) for i, step in ended if config.rewrite_prompt or step[0] > 0]
    if not ended:
        return
    chosen, steps = [i for i, _ in ended], [step for _, step in ended]
    begins = [begin for begin, _ in steps]
    mass = None
    if config.top_k:
        tokens = [rows[i].tokens[begin:end] for i, (begin, end) in ended]
        stretch = Stretch(tokens, begins, [[0] for _ in ended])
        prior = _prior(store, chosen, begins)
        with torch.autocast(backbone.device.type, enabled=False):
            mass = backbone.forward(stretch, prior, mass_window=config.recent_window).mass
    longest = max(end for _, end in steps)
    cache = store[:, chosen, :longest].contiguous()
    rewrite(processor, cache, steps, mass, variant)
    store[:, chosen, :longest] = cache


def _prior(store: Tensor, chosen: Sequence[int], begins: Sequence[int]) -> Tensor | None:
    return store[:, list(chosen), : max(begins)] if max(begins) else None
