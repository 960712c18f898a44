"""Tables and plots of an experiment's outcomes: results/NAME.json, NAME.md, NAME-*.svg. Partial ones too, as such.

Two kinds of intervals, both 95%. Over backbones: Student's t over the backbones' own figures; it says what another
backbone, with another seed of training and other problems, would give. Over problems: a bootstrap over the test
problems with these very backbones. With one backbone there is only the second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bottlenecked.evaluation.statistics import Interval, bootstrap_mean, compare_paired, share

from .lab import unpack
from .plan import Plan, VariantPlan

Outcomes = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> its file


def write(plan: Plan) -> list[Path]:
    """Make the files from what outcomes there are; returns their paths. ValueError where there is none."""
    outcomes = read(plan)
    if not outcomes:
        raise ValueError(f"{plan.results} holds no outcomes yet: run the experiment without --report")
    found = summary(plan, outcomes)
    table = plan.results.parent / f"{plan.name}.json"
    table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = plan.results.parent / f"{plan.name}.md"
    text.write_text(markdown(plan, found), encoding="utf-8")
    from . import plots

    return [table, text, *plots.draw(plan, found, outcomes)]


def read(plan: Plan) -> Outcomes:
    """All outcomes. ValueError where two of one seed are of different backbones: they cannot be paired."""
    found: Outcomes = {}
    for name in plan.variants:
        for seed in plan.seeds:
            path = plan.results / f"{seed}-{name}.json"
            if not path.exists():
                continue
            one = json.loads(path.read_text(encoding="utf-8"))
            if "test" not in one:  # answers are there, and have not been judged
                continue
            for others in found.values():
                if seed in others and others[seed]["backbone"] != one["backbone"]:
                    raise ValueError(f"{path} is of another backbone than the other outcomes of seed {seed}: remove it")
            found.setdefault(name, {})[seed] = one
    return found


def summary(plan: Plan, outcomes: Outcomes) -> dict[str, Any]:
    """What NAME.json holds. Gains and differences are in points, shares are not."""
    reference, baseline = plan.budget.variant, plan.baseline
    gain = difference(outcomes, reference, baseline)
    backbones = [json.loads(p.read_text()) for p in sorted(plan.results.glob("backbone-*.json"))]
    return {
        "experiment": plan.name,
        "title": plan.title,
        "seeds": gain["seeds"] if gain else [],
        "n": next(iter(next(iter(outcomes.values())).values()))["test"]["n"],
        "complete": all(
            len(outcomes.get(name, {})) >= min(plan.backbones, entry.backbones or plan.backbones)
            for name, entry in plan.variants.items()
        ),
        "unit": plan.budget.unit,
        "gain_over_equal_compute_sft": gain,
        "backbones": {
            "passed": [b["seed"] for b in backbones if b["passes"]],
            "failed": {
                str(b["seed"]): {"look_ups": b["look_ups"], "lacking": b["lacking"]}
                for b in backbones
                if not b["passes"]
            },
        },
        "pairs": [
            {"of": one, "over": other, **found}
            for one, other in plan.pairs
            if (found := difference(outcomes, one, other)) is not None
        ],
        "variants": {name: _row(plan, outcomes, name) for name in plan.variants if name in outcomes},
    }


def _row(plan: Plan, outcomes: Outcomes, name: str) -> dict[str, Any]:
    runs = outcomes[name]
    one = next(iter(runs.values()))
    longer = [run["longer"]["share"] for run in runs.values() if "longer" in run]
    return {
        "label": plan.variants[name].label,
        "group": plan.variants[name].group,
        "seeds": list(runs),
        "parameters": one["parameters"],
        "learning_rate": one.get("learning_rate"),
        "iterations": one.get("iterations", 0),
        "compute": one.get(plan.budget.unit, 0.0),
        "wall_seconds": float(np.mean([run.get("wall_seconds", 0.0) for run in runs.values()])),
        "accuracy": _accuracy([run["test"] for run in runs.values()]),
        "longer": _accuracy([run["longer"] for run in runs.values()]) if longer else None,
        "gain": None if name == plan.baseline else difference(outcomes, name, plan.baseline),
    }


def _accuracy(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """mean, low, high over backbones; of one backbone, Wilson's interval over problems."""
    shares = [share(unpack(score)) for score in scores]
    whole = over_backbones([one.value for one in shares]) if len(shares) > 1 else shares[0]
    return {
        "mean": whole.value,
        "low": max(0.0, whole.low),
        "high": min(1.0, whole.high),
        "per_seed": [[one.value, one.low, one.high] for one in shares],
    }


def difference(outcomes: Outcomes, one: str, other: str) -> dict[str, Any] | None:
    """How many points `one` is better than `other`, paired, on the backbones that have both; None where none has.

    low, high: over backbones where there are two or more, else over problems, as "interval" says.
    over_problems: [low, high] with these backbones. per_seed: difference, low, high, and McNemar's p.
    """
    seeds = [seed for seed in outcomes.get(one, {}) if seed in outcomes.get(other, {})]
    if not seeds:
        return None
    pairs = [(unpack(outcomes[other][s]["test"]), unpack(outcomes[one][s]["test"])) for s in seeds]
    paired = [compare_paired(*pair) for pair in pairs]
    per_problem = np.mean([np.asarray(b, float) - np.asarray(a, float) for a, b in pairs], 0)
    problems = bootstrap_mean(per_problem.tolist())
    whole = over_backbones([p.difference.value for p in paired]) if len(seeds) > 1 else problems
    return {
        "mean": 100 * whole.value,
        "low": 100 * whole.low,
        "high": 100 * whole.high,
        "interval": "over backbones" if len(seeds) > 1 else "over problems of one backbone",
        "over_problems": [100 * problems.low, 100 * problems.high],
        "seeds": seeds,
        "per_seed": [
            [100 * p.difference.value, 100 * p.difference.low, 100 * p.difference.high, p.p_value] for p in paired
        ],
    }


def over_backbones(values: Sequence[float]) -> Interval:
    """The mean of two or more backbones' figures, with Student's t interval."""
    x = np.asarray(values, np.float64)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def markdown(plan: Plan, found: Mapping[str, Any]) -> str:
    """NAME.md."""
    rows: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, row in found["variants"].items():
        rows.setdefault(row["group"], []).append((name, row))
    passed, failed = found["backbones"]["passed"], found["backbones"]["failed"]
    partial = "" if found["complete"] else " **Partial: more is to be run; each row says how many backbones it has.**"
    used = f"Backbones: seeds {_list(passed)}"
    if plan.task is not None:
        used += f", which passed the probe; not used, because they did not: {_list(failed) or 'none'}"
    text = [
        f"# {plan.title}",
        "",
        f"`python -m experiments {plan.name}` makes this file from [{plan.name}.yaml](../{plan.name}.yaml).{partial}",
        "",
        f"Whole answers right, of {found['n']:,} problems that nothing was trained or chosen on, greedy. Every variant "
        f"got the compute of `{plan.budget.variant}` beyond the backbone, on the same data and curriculum. {used}.",
        "",
        "Mean over backbones; intervals are 95%, Student's t over backbones, and in brackets a bootstrap over problems "
        "with these backbones. Gains are paired.",
        "",
        *_table(plan, rows.pop("", []), found),
    ]
    if found["pairs"]:
        text += [
            "",
            "| difference, points | | over backbones | [over problems] | each backbone |",
            "|---|---|---|---|---|",
        ]
        text += [
            f"| {_label(plan, p['of'])} over {_label(plan, p['over'])} | {p['mean']:+.1f} | {_over(p)} | "
            f"{_range(p['over_problems'])} | {_each(p)} |"
            for p in found["pairs"]
        ]
    for group, of_group in rows.items():
        text += ["", f"## `{group}`, retrained", "", *_table(plan, of_group, found)]
    if plan.budget.unit == "operations":
        walls = {name: row["wall_seconds"] for name, row in found["variants"].items() if row["wall_seconds"]}
        text += [
            "",
            "Compute is counted in operations of products and of attention, forwards and backwards. Seconds of the "
            "trainings' steps, beside others on the same device: "
            + ", ".join(f"{name} {seconds:.0f}" for name, seconds in walls.items())
            + ".",
        ]
    if plan.notes:
        text += ["", plan.notes.strip()]
    return "\n".join(text) + "\n"


def _table(plan: Plan, rows: Sequence[tuple[str, Mapping[str, Any]]], found: Mapping[str, Any]) -> list[str]:
    longer = "" if plan.longer is None else f"{_steps(plan.longer)} steps |"
    compute = "seconds" if plan.budget.unit == "seconds" else "10^15 operations"
    lines = [
        f"| | trained parameters | iterations | {compute} | backbones | right | over backbones | {longer} "
        f"gain over `{plan.baseline}`, points | over backbones | [over problems] |",
        "|---|---|---|---|---|---|---|" + ("---|" if longer else "") + "---|---|---|",
    ]
    for name, row in rows:
        accuracy, gain = row["accuracy"], row["gain"]
        cells = [
            f"**{row['label']}**" if name == plan.budget.variant else row["label"],
            f"{row['parameters']:,}",
            f"{row['iterations']:,}",
            f"{row['compute']:.0f}" if plan.budget.unit == "seconds" else f"{row['compute'] / 1e15:.2f}",
            str(len(row["seeds"])),
            f"{accuracy['mean']:.3f}",
            "" if len(row["seeds"]) < 2 else f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
        ]
        if longer:
            cells.append(f"{row['longer']['mean']:.3f}")
        cells += ["", "", ""] if gain is None else [f"{gain['mean']:+.1f}", _over(gain), _range(gain["over_problems"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _over(difference: Mapping[str, Any]) -> str:
    several = difference["interval"] == "over backbones"
    return f"{difference['low']:+.1f} to {difference['high']:+.1f}" if several else ""


def _range(pair: Sequence[float]) -> str:
    return f"[{pair[0]:+.1f}, {pair[1]:+.1f}]"


def _each(difference: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:+.1f}" for value, *_ in difference["per_seed"])


def _label(plan: Plan, name: str) -> str:
    variant: VariantPlan = plan.variants[name]
    return variant.label.removeprefix("… ")


def _steps(task: Any) -> str:
    return f"{task.steps[0]} to {task.steps[1]}"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)
