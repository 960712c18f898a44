"""What `make soak` calls a failure (tests/vllm/soak.py; the traffic itself needs vLLM)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .vllm.soak import MOST_GROWTH, Soak, complaints, judge


def series(per_hour: float, *, warm_up: float = 300.0) -> list[dict[str, float]]:
    """An hour: memory that rises to 1000 MiB while it warms up, then by so much an hour, with noise."""
    noise = random.Random(3)
    return [
        {
            "seconds": second, "threads": 20, "files": 50,
            "mib": 1000 - max(warm_up - second, 0) + per_hour * second / 3600 + noise.uniform(-2, 2),
        }
        for second in range(0, 3600, 5)
    ]  # fmt: skip


def good(**changes: Any) -> dict[str, Any]:
    result = {
        "lost": [], "different": [], "memory": judge(series(0.0)), "near_ties": 2, "compared": 500,
        "metrics": {"num_requests_running": 0, "num_requests_waiting": 0, "num_preemptions_total": 9},
    }  # fmt: skip
    return result | changes


def test_flat_memory_is_flat() -> None:
    judged = judge(series(0.0))
    assert abs(judged["slope_mib_per_hour"]) < 1
    assert abs(judged["growth_mib"]) < 1
    assert complaints(good()) == []


def test_growth_is_measured_after_warming_up() -> None:
    judged = judge(series(80.0))
    assert judged["slope_mib_per_hour"] == pytest.approx(80, abs=2)
    assert judged["growth_mib"] > MOST_GROWTH
    assert complaints(good(memory=judged)) == [f"memory grew by {judged['growth_mib']:.1f} MiB"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lost": ["ReadTimeout"]}, "lost: ReadTimeout"),
        ({"different": ["whole of prompt 3 parts"]}, "differs: whole of prompt 3 parts"),
        ({"near_ties": 40}, "too many near ties"),
        ({"metrics": good()["metrics"] | {"num_preemptions_total": 0}}, "nothing was preempted"),
        ({"metrics": good()["metrics"] | {"num_requests_running": 1}}, "1 requests are left in the server"),
    ],
)
def test_what_is_complained_of(changes: dict[str, Any], told: str) -> None:
    assert complaints(good(**changes)) == [told]


def test_an_answer_that_parts_is_another_unless_the_logits_were_nearly_equal() -> None:
    soak = Soak.__new__(Soak)
    soak.alone, soak.compared, soak.near, soak.different = {(0, False): ([5, 6, 7], [1.0, 1e-4, 1.0])}, 0, 0, []
    soak.compare(0, False, [5, 6], "left")
    soak.compare(0, False, [5, 9, 1], "whole")
    assert (soak.compared, soak.near, soak.different) == (2, 1, [])
    soak.compare(0, False, [4, 6, 7], "whole")
    assert soak.different == ["whole of prompt 0 parts at token 0, margin 1.0e+00"]
