"""Tables and plots of an experiment's outcomes: results/NAME.json, NAME.md, NAME-*.svg. Partial ones too, as such.

Two kinds of intervals, both 95%. Over backbones: Student's t over the backbones' own figures; it says what another
backbone, with another seed of training and other problems, would give. Over problems: a bootstrap over the test
problems with these very backbones. With one backbone there is only the second.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
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
    """All outcomes. ValueError where two cannot be paired: of one seed and different backbones, or, of a text, of
    different data."""
    found: Outcomes = {}
    of_data: tuple[Path, str] | None = None  # that were trained on some
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
            if plan.text is not None and "data" in one:
                of_data = of_data or (path, one["data"])
                if one["data"] != of_data[1]:
                    raise ValueError(f"{path} is of other data than {of_data[0]}: remove one, and all others like it")
            found.setdefault(name, {})[seed] = one
    return found


def summary(plan: Plan, outcomes: Outcomes) -> dict[str, Any]:
    """What NAME.json holds. Gains and differences are in points, shares are not."""
    reference, baseline = plan.budget.variant, plan.baseline
    gain = difference(outcomes, reference, baseline)
    backbones = _backbones(plan)

    @functools.cache
    def row(name: str, seeds: tuple[int, ...]) -> dict[str, Any]:
        return _row(plan, {of: {s: runs[s] for s in seeds if s in runs} for of, runs in outcomes.items()}, name)

    return {
        "experiment": plan.name,
        "title": plan.title,
        "seeds": gain["seeds"] if gain else [],
        "n": next(iter(next(iter(outcomes.values())).values()))["test"]["n"],
        "complete": complete(plan, outcomes),
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
        "variants": {name: row(name, tuple(outcomes[name])) for name in plan.variants if name in outcomes},
        "blocks": [
            {"seeds": seeds, "variants": {name: row(name, tuple(seeds)) for name in names}}
            for seeds, names in blocks(plan, outcomes)
        ],
        "settings": {
            group: [{"value": value, "variant": name, **row(name, tuple(seeds))} for value, name in points]
            for group in ("top_k", "recent_window")
            for seeds, points in [settings(plan, outcomes, group)]
            if seeds
        },
    }


def complete(plan: Plan, outcomes: Outcomes) -> bool:
    """Whether all backbones that are wanted passed, and every variant has an outcome on each of those that it is to be
    made on."""
    passed = [b["seed"] for b in _backbones(plan) if b["passes"]][: plan.backbones]
    return len(passed) == plan.backbones and all(
        seed in outcomes.get(name, {}) for name, entry in plan.variants.items() for seed in passed[: entry.backbones]
    )


def _backbones(plan: Plan) -> list[dict[str, Any]]:
    """What is known of those that were judged, in the order of the plan's seeds."""
    files = (plan.results / f"backbone-{seed}.json" for seed in plan.seeds)
    return [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]


def shared(outcomes: Outcomes, names: Sequence[str]) -> list[int]:
    """The backbones on which there are outcomes of all these variants: what their means can be compared on."""
    return [seed for seed in outcomes[names[0]] if all(seed in outcomes[name] for name in names)] if names else []


def blocks(plan: Plan, outcomes: Outcomes) -> list[tuple[list[int], list[str]]]:
    """The main table's parts: (backbones, the variants that have outcomes on all of them), most backbones first.

    There is a part for each set of backbones that some variant has, so each variant stands beside all others on the
    same backbones, and no mean beside one over others.
    """
    names = [name for name in plan.variants if name in outcomes and not plan.variants[name].group]
    sets = sorted({tuple(outcomes[name]) for name in names}, key=lambda seeds: (-len(seeds), seeds))
    return [(list(seeds), [name for name in names if set(seeds) <= set(outcomes[name])]) for seeds in sets]


def settings(plan: Plan, outcomes: Outcomes, group: str) -> tuple[list[int], list[tuple[float, str]]]:
    """Variants that differ in one setting, the experiment's own among them: the backbones that all have, and
    (value, variant) in the order of values. Empty where nothing was retrained with another value."""
    points = [(float(e.label), n) for n, e in plan.variants.items() if e.group == group and n in outcomes]
    if not points or plan.budget.variant not in outcomes:
        return [], []
    points.append((float(plan.processor[group]), plan.budget.variant))
    if group == "top_k" and "consolidation" in outcomes:
        points.append((0.0, "consolidation"))
    return shared(outcomes, [name for _, name in points]), sorted(points)


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
        "held_back": float(np.mean([run["held_back"] for run in runs.values()])),
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
    passed, failed = found["backbones"]["passed"], found["backbones"]["failed"]
    partial = "" if found["complete"] else " **Partial: more is to be run; each row says how many backbones it has.**"
    if plan.text is not None:
        used = "All seeds go on from one backbone: where it says backbones, read seeds of the training beyond it"
    else:
        used = f"Backbones: seeds {_list(passed)}, which passed the probe; not used, because they did not: "
        used += _list(failed) or "none"
    text = [
        f"# {plan.title}",
        "",
        f"`python -m experiments {plan.name}` makes this file from [{plan.name}.yaml](../{plan.name}.yaml).{partial}",
        "",
        f"Whole answers right, of {found['n']:,} problems that nothing was trained or chosen on, greedy. Every variant "
        f"got the compute of `{plan.budget.variant}` beyond the backbone, on the same data and curriculum. {used}.",
        "",
        "Mean over the backbones that the row's column says; intervals are 95%, Student's t over backbones, and in "
        "brackets a bootstrap over problems with these backbones. Gains and differences are paired, on the backbones "
        "that both have.",
        "",
    ]
    for number, block in enumerate(found["blocks"]):
        if len(found["blocks"]) > 1:
            beside = "" if number == 0 else ": every variant that has them, on these alone"
            text += [*[""] * (number > 0), f"**On {_count(block['seeds'])}{beside}.**", ""]
        text += _table(plan, block["variants"].items())
    if found["pairs"]:
        text += [
            "",
            "| difference, points | backbones | | over backbones | [over problems] | each backbone |",
            "|---|---|---|---|---|---|",
        ]
        text += [
            f"| {_label(plan, p['of'])} over {_label(plan, p['over'])} | {len(p['seeds'])} | {p['mean']:+.1f} | "
            f"{_over(p)} | {_range(p['over_problems'])} | {_each(p)} |"
            for p in found["pairs"]
        ]
    for group, points in found["settings"].items():
        rows = [(row["variant"], {**row, "label": f"{row['value']:g}"}) for row in points]
        text += ["", f"## `{group}`, retrained with each, on {_count(points[0]['seeds'])}", "", *_table(plan, rows)]
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


def _table(plan: Plan, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    longer = "" if plan.longer is None else f"{_steps(plan.longer)} steps |"
    held_back = "" if plan.text is None else "cross-entropy, held back |"
    compute = "seconds" if plan.budget.unit == "seconds" else "10^15 operations"
    lines = [
        f"| | trained parameters | iterations | {compute} | backbones | right | over backbones | {longer}{held_back} "
        f"gain over `{plan.baseline}`, points | over backbones | [over problems] |",
        "|---|---|---|---|---|---|---|" + "---|" * (bool(longer) + bool(held_back)) + "---|---|---|",
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
        if held_back:
            cells.append(f"{-row['held_back']:.4f}")
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


def _count(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} backbone{'s' * (len(seeds) > 1)} (seed{'s' * (len(seeds) > 1)} {_list(seeds)})"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)
