"""Do two runs agree? `python -m benchmarks compare A.jsonl B.jsonl`

Times differ between machines and days; ratios should not, on one kind of machine. Two ratios agree when they are not
further apart than their spreads together, each the interquartile range of the per-repeat ratios.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import PROGRAM, Parser

# What was measured; everything else of a figure is a result.
KEYS = ("case", "shape", "d_p", "dtype", "batch", "prior", "step", "top_k", "threads", "product", "rows", "tokens")


def main(arguments: Sequence[str]) -> int:
    """Prints a line per ratio that both files hold; 0 where all agree, else 1."""
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
    """A line per common ratio, a summary, and whether all of them agree (there must be at least one)."""
    lines, agreeing, total = [], 0, 0
    for key, one in a.items():
        other = b.get(key)
        if other is None:
            continue
        name = ", ".join(f"{k} {v}" if k != "case" else str(v) for k, v in zip(KEYS, key, strict=True) if v is not None)
        for baseline in one.get("ratios", {}).keys() & other.get("ratios", {}).keys():
            x, y = one["ratios"][baseline], other["ratios"][baseline]
            allowed = x * one["ratio_spread"][baseline] + y * other["ratio_spread"][baseline]
            same = abs(x - y) <= allowed
            verdict = "agree" if same else "DIFFER"
            apart = f"apart {abs(x - y):.3f}, allowed {allowed:.3f}"
            lines.append(f"{verdict:6}  {x:7.3f}  {y:7.3f}  {apart}  {name}: {baseline}")
            agreeing, total = agreeing + same, total + 1
    only = len(a.keys() ^ b.keys())
    lines.append(f"{agreeing} of {total} ratios agree; {only} figures are in one run only")
    return lines, total > 0 and agreeing == total
