"""The figures of an experiment, as SVG files that are the same for the same outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bottlenecked.evaluation.statistics import share

from .lab import read, unpack
from .plan import Plan
from .report import Outcomes, shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAIN = ("sft", "sft2", "processor", "consolidation", "random", "lora", "layer")  # in plots with many lines


def draw(plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> list[Path]:
    """All that the outcomes have figures for; returns their paths."""
    import matplotlib as mpl

    mpl.use("svg")
    made = []
    with mpl.rc_context(
        {"svg.hashsalt": plan.name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, plot in (
            ("accuracy", _accuracy),
            ("steps", _steps),
            ("compute", _progress("compute")),
            ("clock", _progress("clock")),
            ("edits", _edits),
            ("top_k", _sensitivity("top_k", "positions recalled (k)")),
            ("recent_window", _sensitivity("recent_window", "window (R)")),
        ):
            import matplotlib.pyplot as plt

            figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
            if plot(axes, plan, found, outcomes):
                path = plan.results.parent / f"{plan.name}-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                made.append(path)
            plt.close(figure)
    return made


def _accuracy(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Every variant: each backbone a dot with its interval over problems, their mean a line. In the table's blocks."""
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for block in found["blocks"]:
        if len(found["blocks"]) > 1:
            lines.append((f"on {', '.join(map(str, block['seeds']))}:", None))
        lines += [(row["label"], row) for row in block["variants"].values()]
    lines.reverse()
    for y, (_, row) in enumerate(lines):
        if row is None:
            continue
        each = np.array(row["accuracy"]["per_seed"])
        at = y + np.linspace(-0.25, 0.25, len(each)) if len(each) > 1 else np.array([float(y)])
        axes.errorbar(each[:, 0], at, xerr=_arms(each), fmt="o", ms=2.5, lw=0.8, color="C0")
        axes.plot([row["accuracy"]["mean"]] * 2, [y - 0.4, y + 0.4], color="C3")
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    for tick, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontstyle("italic" if row is None else "normal")
    axes.set_xlabel("whole answers right\n(dots: backbones, 95% over problems; line: mean)")
    axes.set_xlim(0, 1)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(6.4, 1 + 0.32 * len(lines))
    return True


def _steps(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Accuracy against the steps that a problem's answer has, all backbones that the variants share together."""
    steps = read(plan.results / "problems.json")
    behind = 0 if plan.task is None else 1  # the end of text, a step of its own behind the last line's end
    several, seeds = _several(outcomes)
    if not seeds:
        return False
    for name in several:
        of_step: dict[int, list[bool]] = {}
        for run in several[name].values():
            for part in steps:
                for right, count in zip(unpack(run[part]), steps[part], strict=True):
                    of_step.setdefault(count - behind, []).append(right)
        counts = sorted(of_step)
        each = [share(of_step[count]) for count in counts]
        bounds = np.array([[one.value, one.low, one.high] for one in each])
        axes.errorbar(counts, bounds[:, 0], yerr=_arms(bounds), fmt=".-", lw=1, label=plan.variants[name].label)
    if plan.longer is not None:
        axes.axvspan(plan.longer.steps[0] - 0.5, plan.longer.steps[1] + 0.5, color="0.93", zorder=0)
    axes.set_xlabel(f"steps of the answer{' (shaded: more than any that was trained on)' if plan.longer else ''}")
    axes.set_ylabel("whole answers right")
    _legend(axes, seeds)
    return True


def _progress(kind: str) -> Any:
    """The held-back figure while training, mean over the backbones that the variants share, against what was spent.

    kind: "compute", as the budget counts it, or "clock", seconds of the training's steps, which say how busy the
    machine was as well. Of the second some outcomes know nothing; there is no plot where the reference's do not.
    """

    def plot(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
        column = {"compute": 0, "clock": 2}[kind]
        several, seeds = _several(outcomes)
        if not seeds:
            return False
        drawn = set()
        for name, runs in several.items():
            curves = [run["curve"] for run in runs.values() if "curve" in run]
            label = plan.variants[name].label
            if not plan.variants[name].learning_rate:
                level = float(np.mean([run["held_back"] for run in runs.values()]))
                axes.axhline(level, color="0.6", lw=1, label=label)
            elif curves and all(len(point) > column for curve in curves for point in curve):
                spent, score = (np.mean([[point[i] for point in curve] for curve in curves], 0) for i in (column, 1))
                axes.plot(spent, score, ".-", lw=1, label=label)
                drawn.add(name)
        axes.set_xlabel(
            f"{plan.budget.unit} of training beyond the backbone, as costs.json counts them"
            if kind == "compute"
            else "seconds of the training's steps by the clock, beside whatever else ran, mean over backbones"
        )
        axes.set_ylabel("held-back answers right" if plan.task else "held-back cross-entropy, negative")
        _legend(axes, seeds)
        return plan.budget.variant in drawn

    return plot


def _edits(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Size of the Processor's edits per layer against the number of the rewrite."""
    runs = [run["edits"]["relative"] for run in outcomes.get(plan.budget.variant, {}).values() if "edits" in run]
    if not runs:
        return False
    length = min(len(layer) for run in runs for layer in run)
    layers = np.mean([[layer[:length] for layer in run] for run in runs], 0)
    for number, layer in enumerate(layers):
        axes.plot(range(1, length + 1), layer, ".-", lw=1, label=f"layer {number}")
    axes.set_xlabel("number of the rewrite within an answer")
    axes.set_ylabel("norm of the edit / norm of the rows")
    axes.set_ylim(bottom=0)
    axes.legend()
    return True


def _sensitivity(group: str, label: str) -> Any:
    """Accuracy against a setting, each point retrained, on the backbones that all have; its own setting among them."""

    def plot(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
        points = {row["value"]: row["accuracy"] for row in found["settings"].get(group, [])}
        if not points:
            return False
        for value, accuracy in sorted(points.items()):
            each = np.array(accuracy["per_seed"])
            axes.errorbar([value] * len(each), each[:, 0], yerr=_arms(each), fmt="o", ms=3, lw=1, color="C0")
        axes.plot(sorted(points), [points[v]["mean"] for v in sorted(points)], color="C3", lw=1)
        axes.set_xlabel(label)
        axes.set_ylabel("whole answers right")
        axes.set_ylim(0, 1)
        return True

    return plot


def _several(outcomes: Outcomes) -> tuple[Outcomes, list[int]]:
    """What plots with many lines show: variants of `_MAIN` on the backbones that all of them have, and these."""
    names = [name for name in _MAIN if name in outcomes]
    seeds = shared(outcomes, names)
    return {name: {seed: outcomes[name][seed] for seed in seeds} for name in names}, seeds


def _legend(axes: Axes, seeds: Sequence[int]) -> None:
    axes.legend(fontsize=7, title=f"backbones {', '.join(map(str, seeds))}", title_fontsize=7)


def _arms(bounds: Any) -> Sequence[Any]:
    """Lengths of error bars, of rows [value, low, high]."""
    return [np.maximum(bounds[:, 0] - bounds[:, 1], 0), np.maximum(bounds[:, 2] - bounds[:, 0], 0)]
