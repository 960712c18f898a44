"""Intervals and tests against closed forms, tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from bottlenecked.evaluation.statistics import bootstrap_difference, bootstrap_mean, compare_paired, share, wilson


def test_wilson_is_the_closed_form_and_covers() -> None:
    z = 1.959963984540054
    for right, count in [(0, 7), (7, 7), (50, 100), (1, 1319), (640, 1319)]:
        p = right / count
        middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
        scale = 1 + z * z / count
        assert wilson(right, count) == pytest.approx(((middle - spread) / scale, (middle + spread) / scale), abs=1e-12)
    # How often it covers, exactly, on average over true shares.
    intervals = [wilson(k, 60) for k in range(61)]
    coverage = [
        sum(
            math.comb(60, k) * p**k * (1 - p) ** (60 - k) for k, (low, high) in enumerate(intervals) if low <= p <= high
        )
        for p in np.linspace(0.1, 0.9, 81)
    ]
    assert 0.945 < np.mean(coverage) < 0.955


def test_share() -> None:
    found = share([True, False, True, True])
    assert found.value == 0.75
    assert (found.low, found.high) == wilson(3, 4)
    assert str(found) == f"0.750 [{found.low:.3f}, {found.high:.3f}]"


def test_mcnemar_is_the_sign_test_on_what_differs() -> None:
    first = [True] * 30 + [True] * 2 + [False] * 9 + [False] * 9
    second = [True] * 30 + [False] * 2 + [True] * 9 + [False] * 9
    found = compare_paired(first, second)
    assert (found.both, found.first_only, found.second_only, found.neither) == (30, 2, 9, 9)
    # Two-sided: twice the chance of 2 or fewer heads in 11 tosses.
    assert found.p_value == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found.difference.value == pytest.approx(7 / 50)
    assert found.difference.low < 7 / 50 < found.difference.high
    turned = compare_paired(second, first)
    assert turned.difference.value == -found.difference.value
    assert turned.p_value == found.p_value
    alike = compare_paired(first, first)
    assert (alike.p_value, alike.difference.low, alike.difference.high) == (1.0, 0.0, 0.0)


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=400)
    second = first + 0.1 + 0.05 * rng.normal(size=400)
    paired = bootstrap_difference(first.tolist(), second.tolist())
    assert 0.09 < paired.low < paired.value < paired.high < 0.11
    shuffled = bootstrap_difference(first.tolist(), rng.permutation(second).tolist())
    assert shuffled.high - shuffled.low > 10 * (paired.high - paired.low)


def test_bootstrap_is_the_normal_interval_of_many_values_and_repeats() -> None:
    values = np.random.default_rng(2).exponential(size=2000)
    found = bootstrap_mean(values.tolist(), seed=3)
    spread = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(spread, rel=0.1)
    assert found.value - found.low == pytest.approx(spread, rel=0.1)
    assert bootstrap_mean(values.tolist(), seed=3) == found
    assert bootstrap_mean(values.tolist(), seed=4) != found
    alone = bootstrap_mean([0.5])
    assert (alone.value, alone.low, alone.high) == (0.5, -math.inf, math.inf)


def test_what_cannot_be_compared() -> None:
    for refused in (
        lambda: wilson(1, 0),
        lambda: wilson(3, 2),
        lambda: share([]),
        lambda: compare_paired([True], [True, False]),
        lambda: compare_paired([], []),
        lambda: bootstrap_difference([1.0], [1.0, 2.0]),
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, math.nan]),
    ):
        with pytest.raises(ValueError, match=r"no share|cannot be paired|no mean"):
            refused()
