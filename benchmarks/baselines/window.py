"""The part of the cache that the events of one call rewrite, and its queries: what all baselines begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.config import CacheProcessorConfig


@dataclass(frozen=True)
class Window:
    """The window [begin, end) of cache positions, the same in each of `sequences`, rows of the batch.

    Everything before `begin` is prior.
    """

    sequences: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, events: Sequence[BoundaryEvent], config: CacheProcessorConfig) -> Window:
        """The window of `events`.

        Raises ValueError where there is no event, where two have different windows or the same sequence, where a
        sequence has left padding, and for keys that would have to be rotated back: baselines do none of these.
        """
        if config.key_space != "rotated":
            raise ValueError(f"key_space is {config.key_space!r}: baselines know only 'rotated'")
        if not events:
            raise ValueError("events is empty: give one or more")
        sequences = tuple(e.sequence for e in events)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"events are of sequences {list(sequences)}: give at most one of each sequence")
        if padding := max(e.sequence_begin for e in events):
            raise ValueError(f"a sequence begins at {padding}: baselines take no left padding, begin at 0")
        windows = {(e.window_begin(config.recent_window), e.step_end) for e in events}
        if len(windows) > 1:
            raise ValueError(f"the windows {sorted(windows)} differ: give events of equal lengths in a call")
        return cls(sequences, *windows.pop())

    def rows(self, batch: Tensor) -> Tensor:
        """batch[sequences], without a copy where these are all of them in order."""
        return batch if self.sequences == tuple(range(len(batch))) else batch[list(self.sequences)]

    def queries(self, ring: Tensor) -> Tensor:
        """The window's queries out of a ring [batch, R, num_query_heads, head_dim].

        Returns [num_events, num_query_heads, window, head_dim], a view of a copy.
        """
        return self.rows(ring)[:, self.inside(ring.device) % ring.shape[1]].transpose(1, 2)

    def inside(self, device: torch.device | None = None) -> Tensor:
        """The window's positions: int64 [window]."""
        return torch.arange(self.begin, self.end, device=device)

    def future(self, device: torch.device | None = None) -> Tensor:
        """True where a query of the window must not look: bool [window, window], above the diagonal."""
        length = self.end - self.begin
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)

    def batch(self, device: torch.device | None = None) -> Tensor:
        """The sequences: int64 [num_events]. Those of a whole batch in order are made on the device, not copied."""
        if self.sequences == tuple(range(len(self.sequences))):
            return torch.arange(len(self.sequences), device=device)
        return torch.tensor(self.sequences, device=device)
