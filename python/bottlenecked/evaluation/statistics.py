"""Intervals and paired tests, all through scipy.stats: 95%, two-sided.

Items are taken as independent draws. Intervals say how much another set of items might differ, not another training
seed: that takes several runs, over whose figures `bootstrap_mean` goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from scipy import stats
except ImportError as error:
    raise ImportError(f"this needs scipy: install bottlenecked with its extra [eval] ({error})") from None

_LEVEL = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """value: what was measured. low, high: its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Paired:
    """Two systems on the same items.

    both, first_only, second_only, neither: how many items were right with whom.
    difference: share right of the second minus that of the first, with its paired bootstrap interval.
    p_value: exact McNemar test, that is the sign test on the items on which they differ; 1 where there is none.
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    difference: Interval
    p_value: float


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The Wilson score interval of a share of independent trials. ValueError for a count of 0, or more successes."""
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} of {count} is no share: it takes a trial, and no more successes than trials")
    interval = stats.binomtest(successes, count).proportion_ci(_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def share(right: Sequence[bool]) -> Interval:
    """The share of True, with its Wilson interval. ValueError for no items."""
    successes = sum(map(bool, right))
    low, high = wilson(successes, len(right))
    return Interval(successes / len(right), low, high)


def compare_paired(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Paired:
    """Whether each item was right with either system, item i of one being item i of the other.

    seed: of the bootstrap. ValueError for no items or unequal numbers of them.
    """
    _check_pairs(first, second)
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    first_only, second_only = int((a & ~b).sum()), int((b & ~a).sum())
    differing = first_only + second_only
    return Paired(
        both=int((a & b).sum()),
        first_only=first_only,
        second_only=second_only,
        neither=int((~a & ~b).sum()),
        difference=bootstrap_difference(a.astype(float).tolist(), b.astype(float).tolist(), seed=seed),
        p_value=float(stats.binomtest(first_only, differing, 0.5).pvalue) if differing else 1.0,
    )


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean, with its bootstrap percentile interval. ValueError for no values or one that is not finite."""
    x = np.asarray(values, np.float64)
    if not x.size or not np.isfinite(x).all():
        raise ValueError("there is no mean of these values: there are none, or one is not a number")
    if len(x) == 1:
        return Interval(float(x[0]), float("-inf"), float("inf"))
    found: Any = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=500,  # of some thousand items in memory at a time
        confidence_level=_LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(float(x.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high))


def bootstrap_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Interval:
    """The second mean minus the first, over the same items, with its paired bootstrap interval. ValueError as above."""
    _check_pairs(first, second)
    return bootstrap_mean((np.asarray(second, np.float64) - np.asarray(first, np.float64)).tolist(), seed=seed)


def _check_pairs(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} items cannot be paired: give the same items to both")


__all__ = ["Interval", "Paired", "bootstrap_difference", "bootstrap_mean", "compare_paired", "share", "wilson"]
