"""Does a Processor help? Cross-entropy on held-back examples, paired with what the identity Processor gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .rollout import FIRST, REST, Losses

KINDS = {"all": (FIRST, REST), "first": (FIRST,), "rest": (REST,)}
_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Mean cross-entropy in nats per token, of one kind of tokens.

    tokens: how many. identity, processor: with each. difference: processor - identity, so that less than zero is
    better; low, high: its 95% interval, by a paired bootstrap over examples.
    """

    tokens: int
    identity: float
    processor: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """examples: how many. kinds: "all" tokens, the "first" of every step, and the "rest"; kinds without tokens lack."""

    examples: int
    kinds: dict[str, Comparison]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """The figures of all tokens in one line."""
        c = self.kinds["all"]
        return (
            f"cross-entropy {c.processor:.4f} against {c.identity:.4f} without a Processor: {c.difference:+.4f} "
            f"[{c.low:+.4f}, {c.high:+.4f}] (n = {self.examples} examples, {c.tokens:,} tokens)"
        )


def compare(identity: Losses, processor: Losses, *, seed: int = 0) -> Evaluation:
    """Two evaluations of the same examples, paired. ValueError where they are not the same or have no tokens."""
    if not bool((identity.counts == processor.counts).all()) or not int(identity.counts.sum()):
        raise ValueError(
            "the two evaluations are not of the same tokens, or there are none: evaluate the same examples"
        )
    kinds = {}
    for kind, columns in KINDS.items():
        counts = _columns(identity.counts, columns)
        if not counts.any():
            continue
        before, after = _columns(identity.sums, columns), _columns(processor.sums, columns)
        # How often each example is drawn, in every resample.
        drawn = np.random.default_rng(seed).multinomial(len(counts), [1 / len(counts)] * len(counts), _RESAMPLES)
        tokens = drawn @ counts
        with np.errstate(invalid="ignore"):  # a resample without tokens of this kind says nothing
            differences = drawn @ (after - before) / tokens
        low, high = np.nanquantile(differences, (0.025, 0.975))
        total = counts.sum()
        kinds[kind] = Comparison(
            tokens=int(total),
            identity=float(before.sum() / total),
            processor=float(after.sum() / total),
            difference=float((after - before).sum() / total),
            low=float(low),
            high=float(high),
        )
    return Evaluation(len(identity.counts), kinds)


def _columns(x: Tensor, columns: tuple[int, ...]) -> Any:
    return x[:, list(columns)].sum(1).double().numpy()


__all__ = ["Comparison", "Evaluation", "compare"]
