"""Do two runs agree? `python -m benchmarks compare A.jsonl B.jsonl`

Times differ between machines and days; ratios should not, on one kind of machine. Each run states a ratio's spread: the
range of its processes' medians (processes.py). Two runs agree on a ratio where these ranges overlap. They agree as runs
where they do so on SHARE of their ratios, which was fixed before any two were compared: five processes each miss by
chance in 0.8%, and what hits a machine for a minute hits the ratios measured then together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import PROGRAM, Parser

SHARE = 0.95

# What was measured; everything else of a figure is a result.
KEYS = ("case", "shape", "d_p", "dtype", "batch", "prior", "step", "top_k", "threads", "product", "rows", "tokens")


def main(arguments: Sequence[str]) -> int:
    """Prints a line per ratio that both files hold; 0 where the runs agree, else 1."""
    parser = Parser(prog=f"{PROGRAM} compare", description="Whether the ratios of two runs agree within their spreads.")
    parser.add_argument("a", type=Path, metavar="A.jsonl")
    parser.add_argument("b", type=Path, metavar="B.jsonl")
    options = parser.parse_args(arguments)
    try:
        a, b = read(options.a), read(options.b)
    except (OSError, ValueError) as error:
        parser.error(f"{error}; give files that --output or --json wrote")
    lines, agree = compare(a, b)
    print("\n".join(lines))
    return 0 if agree else 1


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The figures of a file by what they measure. Raises OSError, and ValueError naming the line."""
    figures = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            figure = json.loads(line)
            case = figure["case"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"line {number} of {path} is no figure") from None
        if case != "machine":
            figures[tuple(figure.get(key) for key in KEYS)] = figure
    return figures


def compare(
    a: Mapping[tuple[Any, ...], Mapping[str, Any]], b: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> tuple[list[str], bool]:
    """A line per ratio whose range both state, a summary, and whether the runs agree (on at least one ratio)."""
    lines, agreeing, total, chance = [], 0, 0, 0.0
    for key, one in a.items():
        other = b.get(key, {})
        name = ", ".join(f"{k} {v}" if k != "case" else str(v) for k, v in zip(KEYS, key, strict=True) if v is not None)
        of_one, of_other = one.get("ratio_range", {}), other.get("ratio_range", {})
        for baseline in [each for each in of_one if each in of_other]:
            (low, high), (other_low, other_high) = of_one[baseline], of_other[baseline]
            gap = max(low, other_low) / min(high, other_high) - 1
            verdict = "agree         " if gap <= 0 else f"DIFFER {gap:6.1%} "
            lines.append(f"{verdict} {low:7.3f}-{high:.3f}  {other_low:7.3f}-{other_high:.3f}  {name}: {baseline}")
            agreeing, total = agreeing + (gap <= 0), total + 1
            chance += apart_by_chance(one["processes"], other["processes"])
    only = len(a.keys() ^ b.keys())
    if total == 0:
        return ["no ratio has a range in both runs: measure with --processes 2 or more"], False
    lines.append(
        f"{agreeing} of {total} ratios agree, {agreeing / total:.1%}; {SHARE:.0%} must, and chance alone would part "
        f"{chance / total:.1%}; {only} figures are in one run only"
    )
    return lines, agreeing >= SHARE * total


def apart_by_chance(m: int, n: int) -> float:
    """How often the ranges of m and of n draws from one continuous distribution do not overlap."""
    return 2 / math.comb(m + n, m)
