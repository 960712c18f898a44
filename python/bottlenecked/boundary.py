"""When a reasoning step ends (arXiv 2505.16950, section 3: the output is split into steps by newline tokens).

All positions are cache positions: left padding occupies [0, sequence_begin), and the first real token is at
sequence_begin. The prompt is step 0; every later step ends with a line-ending token (timing "post") or just
before one (timing "pre"). Standard library only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .config import BoundaryConfig


@dataclass(frozen=True)
class BoundaryEvent:
    """The step [step_begin, step_end) of one sequence has ended and all its KV is written: rewrite now.

    sequence: the row of the batch (or of the block table). Positions before sequence_begin hold padding.
    top_k: recall so many positions, at most the Processor's top_k; None: as many as that.
    A plain record; whoever rewrites checks it against the cache.
    """

    sequence: int
    step_begin: int
    step_end: int
    sequence_begin: int = 0
    top_k: int | None = None

    def window_begin(self, recent_window: int) -> int:
        """First position of the window [window_begin, step_end), the last `recent_window` tokens of the step.

        Everything in [sequence_begin, window_begin) is prior, even where it belongs to the same long step.
        """
        return max(self.step_begin, self.step_end - recent_window)


@dataclass(slots=True)
class _Row:
    sequence_begin: int
    step_begin: int
    length: int = 0
    # What ends at `length` and has not been reported yet.
    pending: Literal["prompt", "line"] | None = None
    finished: bool = False


class BoundaryDetector:
    """Turns the tokens of one or many sequences into boundary events.

    Announce every token before the forward that writes its KV; what comes back must be rewritten before that
    forward. A host calls, per sequence: `start`, `prompt` (once per chunk), then `decode` for every token:

        prompt(0, 5)  -> None                       positions 0-4 are about to be written
        decode(0, t5) -> BoundaryEvent(0, 0, 5)     the prompt is in the cache: rewrite it, then feed t5
        decode(0, nl) -> None                       a newline, at position 6
        decode(0, t7) -> BoundaryEvent(0, 5, 7)     with timing "pre": (0, 5, 6), one call earlier

    A host that must rewrite before it knows the next token calls `due` once the KV of everything announced is
    written. A kept cache goes on with another `prompt`: the tokens since the last boundary and the new ones
    are then one step, reported by the next `decode`.

    config: the rule, min_step_length and timing. The prompt ends at the first `decode`, whatever its length.
    rewrite_prompt: whether prompts are reported; if not, they still end a step.
    token_ids: the line-ending ids, where the rule is "newline" and config.token_ids is empty.

    One object serves one batch and is not thread-safe. Errors are ValueErrors; a call that fails for a
    sequence leaves that sequence as it was.
    """

    def __init__(
        self,
        config: BoundaryConfig,
        *,
        rewrite_prompt: bool = True,
        token_ids: Iterable[int] | None = None,
    ) -> None:
        ids = frozenset(config.token_ids if token_ids is None else map(operator.index, token_ids))
        if not ids:
            raise ValueError("boundary.token_ids is empty: pass token_ids=newline_token_ids(tokenizer)")
        self.line_ending_ids = ids
        self.rewrite_prompt = rewrite_prompt
        self._min_step_length = config.min_step_length
        self._pre = config.timing == "pre"
        self._rows: dict[int, _Row] = {}
        # What `decode_rows` owes: after a call that left nothing pending, a token that ends no line in any row is only
        # counted, until somebody asks for a row.
        self._counting = False
        self._counted = 0
        self._too_short = 0  # so many tokens after that call end no step, whatever they are

    def start(self, sequence: int, sequence_begin: int = 0) -> None:
        """Begin a sequence with an empty cache, in place of any earlier one of this number.

        sequence_begin: how many positions of left padding its prompt begins with.
        """
        if sequence_begin < 0:
            raise ValueError(f"sequence_begin is {sequence_begin}, but it must be 0 or more")
        self._settle()
        self._rows[sequence] = _Row(sequence_begin, sequence_begin)

    def finish(self, sequence: int) -> None:
        """Freeze a sequence that has ended: `decode` and `due` report nothing and its length stands still.

        A step that had ended but was not reported yet stays unreported: nothing resumes after it.
        """
        self._row(sequence).finished = True

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        self._row(sequence)
        del self._rows[sequence]

    def length(self, sequence: int) -> int:
        """How many cache positions of this sequence have been announced, left padding included."""
        return self._row(sequence).length

    def prompt(self, sequence: int, count: int) -> BoundaryEvent | None:
        """The next `count` positions are (a chunk of) the prompt, left padding included.

        Returns an event only on a kept cache whose last written token ended a line.
        """
        row = self._row(sequence)
        if count < 1:
            raise ValueError(f"the prompt of sequence {sequence} has {count} tokens: it needs 1 or more")
        if row.finished:
            raise ValueError(f"sequence {sequence} finished at position {row.length}: start a new cache for it")
        # Another chunk of the same prompt is no boundary.
        event = self.due(sequence) if row.pending == "line" else None
        row.length += count
        row.pending = "prompt"
        return event

    def decode(self, sequence: int, token: int) -> BoundaryEvent | None:
        """The next position is the decoded token `token`. Returns what must be rewritten first."""
        row = self._row(sequence)
        ends_line = operator.index(token) in self.line_ending_ids
        if row.finished:
            return None
        if row.length <= row.sequence_begin:
            raise ValueError(
                f"sequence {sequence} has an empty prompt: its left padding ends at {row.sequence_begin}, "
                f"and {row.length} positions were announced"
            )
        event = self.due(sequence)
        if ends_line and self._pre and row.length - row.step_begin >= self._min_step_length:
            # `due` reported nothing then: a step it reports leaves an empty one behind.
            event = self._end_step(sequence, row)
        row.length += 1
        if ends_line and not self._pre and row.length - row.step_begin >= self._min_step_length:
            row.pending = "line"
        return event

    def due(self, sequence: int) -> BoundaryEvent | None:
        """The step that ended with the last announced token and was not reported yet. Ends the prompt."""
        row = self._row(sequence)
        if row.pending is None or row.finished or row.length <= row.sequence_begin:
            return None
        wanted = row.pending == "line" or self.rewrite_prompt
        row.pending = None
        event = self._end_step(sequence, row)
        return event if wanted else None

    def prompt_rows(self, count: int) -> list[BoundaryEvent]:
        """`prompt` for every started sequence, in ascending order: a batch padded to one length."""
        return [e for sequence in sorted(self._rows) if (e := self.prompt(sequence, count)) is not None]

    def decode_rows(self, tokens: Sequence[int]) -> list[BoundaryEvent]:
        """`decode` for every started sequence, in ascending order, with one token each.

        Costs next to nothing where no step ends and none has ended with the tokens before.
        """
        if len(tokens) != len(self._rows):
            raise ValueError(f"{len(tokens)} tokens were given for {len(self._rows)} started sequences")
        if self._counting and (self._counted < self._too_short or not self._any_ends_line(tokens)):
            self._counted += 1
            return []
        self._settle()
        events = []
        for (sequence, row), token in zip(sorted(self._rows.items()), map(operator.index, tokens), strict=True):
            if row.pending is None and token not in self.line_ending_ids and row.length > row.sequence_begin:
                row.length += not row.finished
            elif (event := self.decode(sequence, token)) is not None:
                events.append(event)
        going_on = [row for row in self._rows.values() if not row.finished]
        self._counting = all(row.pending is None for row in going_on)
        longest = max((row.length - row.step_begin for row in going_on), default=0)
        self._too_short = self._min_step_length - 1 - longest
        return events

    def _any_ends_line(self, tokens: Sequence[int]) -> bool:
        return not self.line_ending_ids.isdisjoint(map(operator.index, tokens))

    def _settle(self) -> None:
        """Add the tokens that were only counted to the rows that go on."""
        if self._counted:
            for row in self._rows.values():
                if not row.finished:
                    row.length += self._counted
        self._counting, self._counted = False, 0

    def _end_step(self, sequence: int, row: _Row) -> BoundaryEvent:
        event = BoundaryEvent(sequence, row.step_begin, row.length, row.sequence_begin)
        row.step_begin = row.length
        return event

    def _row(self, sequence: int) -> _Row:
        if sequence not in self._rows:
            raise ValueError(f"sequence {sequence} was not started: call start({sequence}) first")
        if self._counting:
            self._settle()
        return self._rows[sequence]


def newline_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """All ids, ascending, whose decoded text contains a newline: the rule "newline".

    tokenizer: anything with `len(tokenizer)` and `decode([id]) -> str`. Decodes the whole vocabulary once.
    """
    return tuple(i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i]))
