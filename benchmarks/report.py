"""Results for people: one Markdown table per case, plots where a picture says more, and the files of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import KEYS
from benchmarks.harness import say

Figures = Sequence[Mapping[str, Any]]

# Of a figure without times of its own, or beside them: key, heading, how to write it.
_EXTRA = {
    "boundary_share": ("in boundaries", "{:.2%}"),
    "capture_share": ("capture", "{:+.2%}"),
    "modules": ("modules", "{}"),
    "stage_share": ("stages of ours", "{}"),
    "read_bytes": ("to read MB", "{:.1f}"),
    "read_gb_per_s": ("GB/s of it", "{:.1f}"),
    "model_bytes": ("model MB", "{:.1f}"),
    "cache_bytes": ("cache MB", "{:.1f}"),
    "processor_bytes": ("Processor MB", "{:.1f}"),
    "query_bytes": ("queries MB", "{:.2f}"),
    "workspace_bytes": ("workspace MB", "{:.2f}"),
    "rss_bytes": ("measured MB", "{:.2f}"),
    "measured_bytes": ("measured MB", "{:.1f}"),
    "added_fraction": ("added", "{:.2%}"),
    "added_in_all_fraction": ("with Processor", "{:.2%}"),
    "floor_added_fraction": ("floor (added) / ours", "{:.2f}"),
    "host_s": ("host µs", "{:.0f}"),
    "launches": ("launches", "{:g}"),
    "device_s": ("kernels µs", "{:.0f}"),
    "gaps_s": ("between them µs", "{:.0f}"),
    "step_s": ("stock's step µs", "{:.0f}"),
    "device_step_s": ("on the device µs", "{:.0f}"),
    "extra": ("extra", "{:+.2%}"),
    "extra_reading": ("extra, tokens read again", "{:+.2%}"),
    "added_prepare_s": ("added to prepare µs", "{:.1f}"),
    "added_prepare_reading_s": ("tokens read again µs", "{:.1f}"),
    "added_boundary_s": ("added at a boundary µs", "{:.0f}"),
    "time_ratio": ("time / fine-tuning's", "{:.2f}"),
    "memory_ratio": ("memory / fine-tuning's", "{:.2f}"),
    "peak_bytes": ("peak MB", "{:.0f}"),
    "sft_peak_bytes": ("fine-tuning's MB", "{:.0f}"),
    "changed_tokens": ("changed tokens", "{}"),
    "stock_repeats": ("stock repeats its tokens", "{}"),
}


def sentence(figure: Mapping[str, Any]) -> str:
    """One figure in one line."""
    words = [f"{key} {figure[key]}" for key in KEYS if key != "case" and key in figure]
    text = ", ".join(words) + ": " if words else ""
    if "median_s" in figure:
        text += f"{_time(figure['median_s'])} "
        text += f"({_times(figure['range'])})" if "range" in figure else f"(spread {figure['spread']:.0%})"
    for name in figure.get("ratios", {}):
        text += f", {name} {_ratio(figure, name)}"
    if "floor_fraction" in figure:
        text += f", {figure['floor_fraction']:.0%} of the floor's speed ({figure['floor']['bound_by']})"
    extra = [f"{heading} {_extra(figure, key)}" for key, (heading, _) in _EXTRA.items() if key in figure]
    return text + (", " if "median_s" in figure and extra else "") + ", ".join(extra)


def markdown(lines: Figures) -> str:
    """The machine and a table per case."""
    sections = []
    for case, figures in _by_case(lines).items():
        sections.append(_machine(figures[0]) if case == "machine" else f"## {case}\n\n{_table(figures)}")
    return "\n\n".join(sections)


def write(lines: Figures, directory: Path, name: str) -> list[Path]:
    """NAME.jsonl, NAME.md and a NAME-CASE.png per case that has a plot; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    data, text = directory / f"{name}.jsonl", directory / f"{name}.md"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plots = _plots(lines, directory, name)
    pictures = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    text.write_text(markdown(lines) + "\n" + pictures, encoding="utf-8")
    return [data, text, *plots]


def _by_case(lines: Figures) -> dict[str, list[Mapping[str, Any]]]:
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        cases.setdefault(line["case"], []).append(line)
    return cases


def _machine(line: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if version)
    rates = [
        f"| {threads} | {p['float32_flops'] / 1e9:.0f} | {p['bfloat16_flops'] / 1e9:.0f} | {p['exps'] / 1e9:.2f} | "
        f"{p['read_bandwidth'] / 1e9:.1f} | {p['copy_bandwidth'] / 1e9:.1f} | {p['cached_bandwidth'] / 1e9:.0f} |"
        for threads, p in line["peaks"].items()
    ]
    of_gpu = f"{line['gpu']}; " if line.get("gpu") else ""
    return "\n".join(
        [
            f"{of_gpu}{line['cpu']}, {line['usable_cores']} of {line['cores']} cores, {line['backend']}; {versions}; "
            f"commit {line['commit']}; {line['date']}; load {line['load_average']}.",
            "",
            "| threads | float32 GFLOP/s | bfloat16 GFLOP/s | 1e9 exp/s | read GB/s | copied GB/s | in cache GB/s |",
            "|---|---|---|---|---|---|---|",
            *rates,
        ]
    )


def _table(figures: Figures) -> str:
    """What is the same in every row is said once, above."""
    keys = [key for key in KEYS if key != "case" and any(key in f for f in figures)]
    varying = [key for key in keys if len({f.get(key) for f in figures}) > 1]
    same = ", ".join(f"{key} {figures[0][key]}" for key in keys if key not in varying)
    baselines = list(dict.fromkeys(name for f in figures for name in f.get("ratios", {})))
    extra = [key for key in _EXTRA if any(key in f for f in figures)]
    timed = any("median_s" in f for f in figures)
    floored = any("floor_s" in f for f in figures)

    processes = sorted({f["processes"] for f in figures if "processes" in f})
    if processes:
        same += f"{'. ' if same else ''}In brackets the smallest and the largest of {processes[-1]} processes' medians"
    heads = [
        *varying,
        *["ours (range)" if processes else "ours (min-max)"] * timed,
        *[f"{name} / ours" for name in baselines],
    ]
    heads += ["floor", "floor / ours", "bound by"] * floored + [_EXTRA[key][0] for key in extra]
    rows = []
    for f in figures:
        cells = [str(f.get(key, "-")) for key in varying]
        if timed:
            cells.append(f"{_time(f['median_s'])} ({_times(f.get('range', (f['min_s'], f['max_s'])))})")
        cells += [_ratio(f, name) for name in baselines]
        if floored:
            has = "floor_s" in f
            cells += [_time(f["floor_s"]), f"{f['floor_fraction']:.2f}", f["floor"]["bound_by"]] if has else ["-"] * 3
        cells += [_extra(f, key) for key in extra]
        rows.append(cells)
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (f"{same}.\n\n" if same else "") + table


def _ratio(figure: Mapping[str, Any], name: str) -> str:
    if name not in figure.get("ratios", {}):
        return "-"
    if "ratio_range" in figure:
        low, high = figure["ratio_range"][name]
        return f"{figure['ratios'][name]:.2f} ({low:.2f}-{high:.2f})"
    return f"{figure['ratios'][name]:.2f} ±{figure['ratio_spread'][name] / 2:.0%}"


def _extra(figure: Mapping[str, Any], key: str) -> str:
    if key not in figure:
        return "-"
    value = figure[key]
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.0%}" for name, share in value.items())
    value = (
        value / 1e6
        if key.endswith("_bytes")
        else value * 1e6
        if key.endswith("_s") and not key.endswith("_per_s")
        else value
    )
    return _EXTRA[key][1].format(value)


def _times(low_high: Sequence[float]) -> str:
    return "-".join(map(_time, low_high))


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


# ---- plots ----------------------------------------------------------------------------------------------------


def _plots(lines: Figures, directory: Path, name: str) -> list[Path]:
    drawn = {
        "gemm": _draw_gemm,
        "mass": _draw_ratios,
        "boundary": _draw_ratios,
        "scaling": _draw_scaling,
    }
    wanted = {case: figures for case, figures in _by_case(lines).items() if case in drawn}
    if not wanted:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        say(f"no plots: {error}; pip install matplotlib")
        return []
    paths = []
    for case, figures in wanted.items():
        picture = Figure(figsize=(9, 5), layout="constrained")
        drawn[case](picture.subplots(), figures)
        path = directory / f"{name}-{case}.png"
        picture.savefig(path, dpi=120)
        paths.append(path)
    return paths


def _draw_gemm(axes: Any, figures: Figures) -> None:
    """Achieved over floor by number of rows: the median over products, ours and torch's."""
    for dtype in dict.fromkeys(f["dtype"] for f in figures):
        for who, style in (("ours", "-"), ("torch", "--")):
            points: dict[int, list[float]] = {}
            for f in figures:
                if f["dtype"] == dtype:
                    seconds = f["median_s"] if who == "ours" else f["baselines"]["torch"]
                    points.setdefault(f["rows"], []).append(f["floor_s"] / seconds)
            rows = sorted(points)
            middle = [sorted(points[r])[len(points[r]) // 2] for r in rows]
            axes.plot(rows, middle, style, marker="o", label=f"{who}, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows", ylabel="floor / time", title="Products: median over shapes")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_ratios(axes: Any, figures: Figures) -> None:
    """A group of bars per figure: every baseline's time over ours."""
    baselines = list(dict.fromkeys(name for f in figures for name in f["ratios"]))
    varying = [key for key in KEYS if len({f.get(key) for f in figures}) > 1]
    width = 0.8 / max(len(baselines), 1)
    for i, name in enumerate(baselines):
        at = [(x + i * width, f["ratios"][name]) for x, f in enumerate(figures) if name in f["ratios"]]
        axes.bar([x for x, _ in at], [ratio for _, ratio in at], width, label=name)
    axes.axhline(1.0, color="black", linewidth=1)
    labels = ["\n".join(str(f.get(key, "-")) for key in varying) for f in figures]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(figures))], labels, fontsize=6)
    axes.set(ylabel="time / ours", xlabel=", ".join(varying), title=figures[0]["case"])
    axes.legend()


def _draw_scaling(axes: Any, figures: Figures) -> None:
    """Time and floor by prior length."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for f in figures:
        groups.setdefault((f["shape"], f["d_p"], f["dtype"]), []).append(f)
    for key, of_group in groups.items():
        priors, label = [f["prior"] for f in of_group], ", ".join(map(str, key))
        (line,) = axes.plot(priors, [f["median_s"] * 1e3 for f in of_group], marker="o", label=label)
        axes.plot(priors, [f["floor_s"] * 1e3 for f in of_group], "--", color=line.get_color(), label=f"{label}: floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="prior positions", ylabel="ms per boundary", title="One boundary")
    axes.legend()
