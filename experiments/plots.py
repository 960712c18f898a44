"""The figures of an experiment, as SVG files that are the same for the same outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bottlenecked.evaluation.statistics import share

from .lab import read, unpack
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import Outcomes

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
            ("compute", _compute),
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
    """Every variant: each backbone a dot with its interval over problems, their mean a line."""
    rows = [row for row in found["variants"].values() if not row["group"]]
    for y, row in enumerate(reversed(rows)):
        each = np.array(row["accuracy"]["per_seed"])
        at = y + np.linspace(-0.2, 0.2, len(each)) if len(each) > 1 else np.array([float(y)])
        axes.errorbar(each[:, 0], at, xerr=_arms(each), fmt="o", ms=3, lw=1, color="C0")
        axes.plot([row["accuracy"]["mean"]] * 2, [y - 0.35, y + 0.35], color="C3")
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    axes.set_xlabel("whole answers right (dots: backbones, 95% over problems; line: mean)")
    axes.set_xlim(0, 1)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(6.4, 1 + 0.32 * len(rows))
    return True


def _steps(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Accuracy against the steps that a problem's answer has, all backbones together."""
    steps = read(plan.results / "problems.json")
    for name in (n for n in _MAIN if n in outcomes):
        of_step: dict[int, list[bool]] = {}
        for run in outcomes[name].values():
            for part in steps:
                for right, count in zip(unpack(run[part]), steps[part], strict=True):
                    of_step.setdefault(count, []).append(right)
        counts = sorted(of_step)
        each = [share(of_step[count]) for count in counts]
        bounds = np.array([[one.value, one.low, one.high] for one in each])
        axes.errorbar(counts, bounds[:, 0], yerr=_arms(bounds), fmt=".-", lw=1, label=plan.variants[name].label)
    if plan.longer is not None:
        axes.axvspan(plan.longer.steps[0] - 0.5, plan.longer.steps[1] + 0.5, color="0.93", zorder=0)
    axes.set_xlabel("steps of the answer (shaded: more than any that was trained on)")
    axes.set_ylabel("whole answers right")
    axes.legend(fontsize=7)
    return True


def _compute(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Accuracy on held-back problems against compute spent, mean over backbones."""
    for name in (n for n in _MAIN if n in outcomes):
        curves = [run["curve"] for run in outcomes[name].values() if "curve" in run]
        if curves:
            seconds = [point[0] for point in curves[0]]
            axes.plot(
                seconds, np.mean([[p[1] for p in c] for c in curves], 0), ".-", lw=1, label=plan.variants[name].label
            )
        else:
            level = float(np.mean([run["held_back"] for run in outcomes[name].values()]))
            axes.axhline(level, color="0.6", lw=1, label=plan.variants[name].label)
    axes.set_xlabel(f"{plan.budget.unit} of training beyond the backbone, as costs.json counts them")
    axes.set_ylabel("held-back answers right" if plan.task else "held-back cross-entropy, negative")
    axes.legend(fontsize=7)
    return True


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
    """Accuracy against a setting, each point retrained; the experiment's own setting among them."""

    def plot(axes: Axes, plan: Plan, found: Mapping[str, Any], outcomes: Outcomes) -> bool:
        points = {float(row["label"]): row["accuracy"] for row in found["variants"].values() if row["group"] == group}
        own = found["variants"].get(plan.budget.variant)
        if not points or own is None:
            return False
        points[float(plan.processor[group])] = own["accuracy"]
        if group == "top_k" and "consolidation" in found["variants"]:
            points[0.0] = found["variants"]["consolidation"]["accuracy"]
        for value, accuracy in sorted(points.items()):
            each = np.array(accuracy["per_seed"])
            axes.errorbar([value] * len(each), each[:, 0], yerr=_arms(each), fmt="o", ms=3, lw=1, color="C0")
        axes.plot(sorted(points), [points[v]["mean"] for v in sorted(points)], color="C3", lw=1)
        axes.set_xlabel(label)
        axes.set_ylabel("whole answers right")
        axes.set_ylim(0, 1)
        return True

    return plot


def _arms(bounds: Any) -> Sequence[Any]:
    """Lengths of error bars, of rows [value, low, high]."""
    return [np.maximum(bounds[:, 0] - bounds[:, 1], 0), np.maximum(bounds[:, 2] - bounds[:, 0], 0)]
