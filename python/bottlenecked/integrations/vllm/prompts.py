"""Prompts that begin alike are computed once: which blocks of their keys and values the workers keep.

vLLM's own prefix caching shares blocks between requests, which cannot be rewritten. Here every request has its own
blocks, and those of a known beginning are filled with copies of what was computed before any rewrite. A block is known
by its tokens and all that came before them. The last `recent_window` positions of a prompt are computed in any case:
their queries are needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def block_keys(tokens: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """A key per whole block of `tokens`; equal keys: equal tokens from the beginning on. salt: what else must agree."""
    key = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    keys = []
    for begin in range(0, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[begin : begin + block_size]).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class PromptIndex:
    """The blocks that are kept, least recently used first; at most `max_blocks`.

    A block may be kept on trial: until it is known that what it was computed from was right it matches nothing.
    """

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._kept: OrderedDict[bytes, int | None] = OrderedDict()  # whose trial

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks are kept, and not on trial."""
        for count, key in enumerate(keys):
            if self._kept.get(key, -1) is not None:
                return count
        return len(keys)

    def use(self, keys: Iterable[bytes]) -> None:
        """These are read now, so they go last. Later blocks of a prompt go before earlier ones: they help less."""
        for key in reversed(list(keys)):
            if key in self._kept:
                self._kept.move_to_end(key)

    def keep(self, keys: Sequence[bytes], trial: int | None = None) -> tuple[list[int], list[bytes]]:
        """Takes in a computed prompt; returns the indices of its blocks that are new, and what has to go for them.

        trial: a number of 0 or more, of one's own: the new ones are on trial until `settle` is called with it.
        """
        wanted = keys[: self.max_blocks]
        new = [i for i, key in enumerate(wanted) if key not in self._kept]
        self._kept.update((wanted[i], trial) for i in new)
        self.use(wanted)
        gone = [self._kept.popitem(last=False)[0] for _ in range(len(self._kept) - self.max_blocks)]
        return new, gone

    def settle(self, keys: Iterable[bytes], trial: int, *, right: bool) -> list[bytes]:
        """What of these is on this trial is kept for good, or no longer; returns what has to go."""
        on_trial = [key for key in keys if self._kept.get(key) == trial]
        if not right:
            return self.discard(on_trial)
        for key in on_trial:
            self._kept[key] = None
        return []

    def discard(self, keys: Iterable[bytes]) -> list[bytes]:
        """These are kept no longer; returns those that were."""
        gone = [key for key in keys if key in self._kept]
        for key in gone:
            del self._kept[key]
        return gone

    def clear(self) -> list[bytes]:
        """Forgets all; returns what it was."""
        gone = list(self._kept)
        self._kept.clear()
        return gone
