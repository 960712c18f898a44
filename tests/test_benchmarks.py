"""The benchmarks run, refuse to time what is wrong, and count honestly. What they measure here means nothing."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bottleneck_ext
from benchmarks import compare, floors, harness, models, options, processes, report
from benchmarks.__main__ import main
from benchmarks.cases import CASES, boundary, decode, mass
from benchmarks.inputs import SHAPES, Inputs
from bottlenecked import cli
from bottlenecked.processor import BoundCache

ROOT = Path(__file__).parent.parent
WITH_FLOOR = ("gemm", "mass", "top_k", "gather", "write", "boundary", "paged", "threads", "scaling")


@pytest.fixture(autouse=True, scope="module")
def _peaks_once() -> Any:
    """Measuring the machine takes a second: once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "measure_peaks", functools.cache(floors.measure_peaks))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


def quick(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The lines of a quick run."""
    capsys.readouterr()
    assert main([*arguments, "--quick", "--json", "--threads", "1"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_figures_are_well_formed(capsys: pytest.CaptureFixture[str], case: str) -> None:
    about, *figures = quick(capsys, case)
    assert about["case"] == "machine"
    assert about["versions"]["bottlenecked"] == bottleneck_ext.__version__
    assert about["options"]["cases"] == [case]
    assert all(rate > 0 for rate in about["peaks"]["1"].values())
    assert figures
    for figure in figures:
        assert figure["case"] == case
        if case == "memory":
            for key in ("cache_bytes", "query_bytes", "processor_bytes", "workspace_bytes", "rss_bytes"):
                assert figure[key] > 0
            assert figure["rss_bytes"] >= figure["workspace_bytes"] // 2
            continue
        assert 0 < figure["min_s"] <= figure["median_s"] <= figure["max_s"]
        assert figure["spread"] >= 0
        assert figure["repeats"] == 1  # --quick leaves no seconds for more
        if case != "scaling":
            assert figure["baselines"].keys() == figure["ratios"].keys() == figure["ratio_spread"].keys()
            assert all(value > 0 for value in [*figure["baselines"].values(), *figure["ratios"].values()])
        assert ("floor_s" in figure) == (case in WITH_FLOOR)
        if case in WITH_FLOOR:
            assert figure["floor_s"] > 0
            assert 0 < figure["floor_fraction"] < 1.5
            assert figure["floor_fraction"] == pytest.approx(figure["floor_s"] / figure["median_s"])
            assert figure["floor"]["bound_by"] in ("bytes", "flops", "exps")


def test_boundary_has_every_baseline_and_share(capsys: pytest.CaptureFixture[str]) -> None:
    figure = quick(capsys, "boundary", "--dtype", "bfloat16")[1]
    assert figure["dtype"] == "bfloat16"
    assert set(figure["baselines"]) == {"naive", "naive_free", "plain", "stacked"}
    assert sum(figure["stage_share"].values()) == pytest.approx(1)


def test_gemm_measures_every_product(capsys: pytest.CaptureFixture[str]) -> None:
    figures = quick(capsys, "gemm", "--dtype", "bfloat16")[1:]
    assert [f["product"] for f in figures[::2]] == ["in", "qkv", "o", "gate_up", "down", "out"]
    assert {f["torch_best"] for f in figures} <= {"bmm", "loop"}


# --- sabotage -------------------------------------------------------------------------------------------------


def refused(match: str, case: str) -> None:
    with pytest.raises(SystemExit, match=match) as error:
        main([case, "--quick", "--threads", "1"])
    assert str(error.value.code).startswith("not measured (")


def edit_after(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, edit: Callable[..., None]) -> None:
    """Let `edit`, given the method's own arguments, loose on what the method left behind."""
    original = getattr(owner, method)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        edit(*args, **kwargs)
        return result

    monkeypatch.setattr(owner, method, wrong)


def test_a_wrong_product_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bottleneck_ext.Linear

    class Wrong:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.linear = original(*args, **kwargs)

        def apply(self, x: np.ndarray, out: np.ndarray, **kwargs: Any) -> None:
            self.linear.apply(x, out, **kwargs)
            out[-1, -1, -1] += 1

    monkeypatch.setattr(bottleneck_ext, "Linear", Wrong)
    refused(r"gemm in.*our product beside bmm is off", "gemm")


def test_a_wrong_mass_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale_sequence(inputs: Inputs, out: np.ndarray, bound: object) -> None:
        out[1, 1] *= 1.01  # not what the reference looks at

    edit_after(monkeypatch, Inputs, "mass", scale_sequence)
    refused(r"plain PyTorch's mass is off", "mass")


def test_a_wrong_mass_of_the_first_layer_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale_layer(inputs: Inputs, out: np.ndarray, bound: object) -> None:
        out[0, 0] *= 1.01

    edit_after(monkeypatch, Inputs, "mass", scale_layer)
    refused(r"our attention mass of layer 0 is off", "mass")


def test_wrong_top_k_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(mass: object, lengths: object, out: np.ndarray) -> None:
        out[1, 0] = (out[1, 0] + 1) % 40

    edit_after(monkeypatch, bottleneck_ext, "select_top_k", shift)
    refused(r"top_k differs from torch in rows \[1\]", "top_k")


@pytest.mark.parametrize(
    ("layer", "sequence", "match"),
    [(0, 0, r"ours and the reference differ: layer 0"), (1, 1, r"naive and ours differ: layer 1, sequence 1")],
)
def test_a_wrong_rewrite_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, layer: int, sequence: int, match: str
) -> None:
    def touch_window(inputs: Inputs, workspace: object = None) -> None:
        inputs.values[layer][sequence, :, -1] += 1

    edit_after(monkeypatch, Inputs, "rewrite", touch_window)
    refused(match, "boundary")


def test_wrong_recall_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Inputs.rewrite

    def recalls_others(inputs: Inputs, workspace: Any = None) -> np.ndarray:
        return (original(inputs, workspace) + 1) % inputs.setting.prior

    monkeypatch.setattr(Inputs, "rewrite", recalls_others)
    refused(r"ours and the reference differ: layer 0, sequence 0, recalled", "gather")


def test_a_write_elsewhere_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    recalled: set[int] = set()
    rewrite, snapshot = BoundCache.rewrite, Inputs.snapshot

    def remember(bound: BoundCache, events: Any) -> Any:
        report = rewrite(bound, events)
        recalled.update(report.recalled[0][0].tolist())
        return report

    def touched(inputs: Inputs) -> Any:
        keys, values = snapshot(inputs)
        keys[0][0, 0, min(set(range(40)) - recalled)] += 1
        return keys, values

    monkeypatch.setattr(BoundCache, "rewrite", remember)
    monkeypatch.setattr(Inputs, "snapshot", touched)
    refused(r"ours wrote other rows than index_copy", "write")


@pytest.mark.parametrize("what", ["token_ids", "recalled"])
def test_other_text_is_not_measured(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    original = decode.generate_ours

    def other(*args: Any) -> decode.Run:
        run = original(*args)
        getattr(run, what)[0][0] = -1
        return run

    monkeypatch.setattr(decode, "generate_ours", other)
    refused({"token_ids": "generate other tokens", "recalled": "recall other positions"}[what], "decode")


# --- options and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["bondary"], "no case 'bondary': choose from gemm, mass"),
        (["--shape", "gpt"], "--shape: invalid choice: 'gpt'"),
        (["--processor-dim", "100"], "--processor-dim is 100; it must be a multiple of 32"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--batch", "1", "0"], "--batch is 0; it must be at least 1"),
        (["--prior", "-5"], "--prior"),
        (["--step", "257"], "--step is 257; a window holds at most 256"),
        (["--top-k", "0"], "--top-k is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--seconds", "nan"], "--seconds is nan; it must be at least 0"),
        (["--name", "a/b"], "--name is 'a/b'; it must be a file's name"),
        (["--sped"], "unrecognized arguments: --sped"),
        (["compare", "one.jsonl"], "the following arguments are required: B.jsonl"),
        (["compare", "one.jsonl", "two.jsonl"], "one.jsonl"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], match: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert match in captured.err


def test_the_grid_is_what_options_name() -> None:
    made = harness.Context(options.parse(["mass", "--shape", "llama-3.2-1b", "--batch", "3", "2", "--threads", "1"]))
    settings = list(made.settings(priors=(7, 8), dtypes=("float32",)))
    assert [(s.shape, s.batch, s.prior) for s in settings] == [
        ("llama-3.2-1b", batch, prior) for batch in (3, 2) for prior in (7, 8)
    ]
    assert {s.step for s in settings} == {32}


@pytest.mark.parametrize("case", [boundary, mass])
@pytest.mark.parametrize(
    "given", [[], ["--batch", "2"], ["--shape", "smollm2"], ["--prior", "64"], ["--dtype", "float32"], ["--quick"]]
)
def test_no_grid_holds_a_setting_twice(case: Any, given: list[str]) -> None:
    settings = list(case.grid(harness.Context(options.parse(given))))
    assert len(settings) == len(set(settings)) > 0


def test_output_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = quick(capsys, "mass", "scaling", "--output", str(tmp_path / "new"), "--name", "run")
    data, text = tmp_path / "new" / "run.jsonl", tmp_path / "new" / "run.md"
    assert sorted(p.name for p in data.parent.iterdir()) == ["run.jsonl", "run.md"]
    assert [json.loads(line) for line in data.read_text().splitlines()] == lines
    assert "## mass\n" in text.read_text()
    assert "torch / ours" in text.read_text()
    assert [figure["case"] for figure in compare.read(data).values()] == ["mass", "scaling"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib, of the dev extra")
def test_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick(capsys, "gemm", "mass", "scaling", "--output", str(tmp_path), "--name", "run")
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == ["run-gemm.png", "run-mass.png", "run-scaling.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert "![run-mass](run-mass.png)" in (tmp_path / "run.md").read_text()


def test_a_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write([{"case": "scaling", "prior": 1, "median_s": 1.0, "min_s": 1.0, "max_s": 1.0}], tmp_path, "run")
    assert "no plots" in capsys.readouterr().err


def ratio_file(path: Path, *ranges: tuple[float, float], case: str = "mass") -> str:
    """A run of a figure per range, which is that of its only ratio over five processes."""
    lines: list[dict[str, Any]] = [{"case": "machine"}]
    for prior, ends in enumerate(ranges):
        middle = {"ratios": {"torch": sum(ends) / 2}, "ratio_spread": {"torch": 0.1}}
        lines.append({"case": case, "prior": prior, **middle, "ratio_range": {"torch": list(ends)}, "processes": 5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, far = ratio_file(tmp_path / "one", (2.0, 2.2)), ratio_file(tmp_path / "far", (2.21, 3.0))
    for other in ((2.2, 2.5), (1.9, 2.0), (2.05, 2.1), (1.0, 3.0)):
        assert compare.main([one, ratio_file(tmp_path / "near", other)]) == 0
        assert capsys.readouterr().out.startswith("agree")
    for pair in ([one, far], [far, one]):
        assert compare.main(pair) == 1
        out = capsys.readouterr().out
        assert out.startswith("DIFFER   0.5%")  # 2.2 to 2.21
        assert "0 of 1 ratios agree, 0.0%; 95% must, and chance alone would part 0.8%" in out
    assert compare.main([one, ratio_file(tmp_path / "other", (2.0, 2.2), case="gemm")]) == 1  # nothing in common
    (tmp_path / "bad").write_text("{}\n")
    with pytest.raises(SystemExit):
        compare.main([one, str(tmp_path / "bad")])
    assert "line 1 of" in capsys.readouterr().err


def test_runs_agree_where_enough_of_their_ratios_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, apart = (1.0, 2.0), (3.0, 4.0)
    one = ratio_file(tmp_path / "one", *[same] * 40)
    assert compare.main([one, ratio_file(tmp_path / "two apart", *[apart] * 2, *[same] * 38)]) == 0
    assert compare.main([one, ratio_file(tmp_path / "three apart", *[apart] * 3, *[same] * 37)]) == 1


def test_ratios_without_a_range_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"case": "mass", "prior": 0, "ratios": {"torch": 2.1}, "ratio_spread": {"torch": 0.1}}
    (tmp_path / "single").write_text(json.dumps(figure) + "\n")
    one = ratio_file(tmp_path / "one", (2.0, 2.2))
    assert compare.main([one, str(tmp_path / "single")]) == 1
    assert capsys.readouterr().out == "no ratio has a range in both runs: measure with --processes 2 or more\n"


def test_chance_is_that_of_draws_from_one_distribution() -> None:
    for m, n in ((1, 1), (2, 3), (5, 5)):
        orders = list(itertools.combinations(range(m + n), m))  # ranks of the one run among all
        apart = sum(max(ranks) == m - 1 or min(ranks) == n for ranks in orders)
        assert compare.apart_by_chance(m, n) == pytest.approx(apart / len(orders))


def test_bench_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, far = ratio_file(tmp_path / "one", (2.0, 2.2)), ratio_file(tmp_path / "far", (2.4, 3.0))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "python")]))
    assert cli.main(["bench", "compare", one, far]) == 1
    assert capfd.readouterr().out.startswith("DIFFER")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cli.main(["bench"]) == 1
    assert "run it in a checkout's directory" in capfd.readouterr().err


# --- measuring and counting -----------------------------------------------------------------------------------


def test_measure_rotates_prepares_and_takes_the_seconds_a_call_returns() -> None:
    context = harness.Context(options.parse(["--quick", "--threads", "1", "--seconds", "60"]))
    calls: list[str] = []
    contenders = {
        "ours": harness.Contender(lambda: calls.append("ours") or 2.0, lambda: calls.append("prepare")),
        "other": harness.Contender(lambda: calls.append("other") or 6.0),
    }
    times = context.measure(contenders, threads=1, scrub=False)
    assert times == {"ours": [2.0] * 3, "other": [6.0] * 3}
    assert calls[:6] == ["other", "prepare", "ours", "prepare", "ours", "other"]  # the first round warms up
    context.process = 1
    calls.clear()
    context.measure(contenders, threads=1, scrub=False)
    assert calls[:6] == ["prepare", "ours", "other", "other", "prepare", "ours"]
    calls.clear()
    times = context.measure(contenders, threads=1, scrub=False, warm_up=False)
    assert calls.count("ours") == len(times["ours"]) == 3
    made = harness.figure("case", {"shape": "tiny"}, times, more=1)
    assert made["median_s"] == 2.0
    assert made["ratios"] == {"other": 3.0}
    assert made["spread"] == made["ratio_spread"]["other"] == 0
    assert made["more"] == 1


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert harness.spread([1, 2, 4, 6, 100]) == pytest.approx((6 - 2) / 4)
    assert harness.spread([3.0]) == 0


def test_every_process_measures_all_and_the_figure_states_their_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    how = ("--processes", "2", "--repeats", "2", "--seconds", "60", "--output", str(tmp_path), "--name", "run")
    about, figure, memory_figure = quick(capsys, "mass", "memory", *how)
    assert about["options"]["processes"] == 2
    assert figure["processes"] == 2
    assert figure["repeats"] == 2 * 2
    assert figure["min_s"] <= figure["range"][0] <= figure["median_s"] <= figure["range"][1] <= figure["max_s"]
    assert figure["range"][0] < figure["range"][1]
    assert figure["ratio_range"].keys() == figure["ratios"].keys()
    for name, (low, high) in figure["ratio_range"].items():
        assert 0 < low <= figure["ratios"][name] <= high
    assert figure["floor_fraction"] == pytest.approx(figure["floor_s"] / figure["median_s"])
    assert memory_figure["case"] == "memory"
    assert "processes" not in memory_figure
    assert compare.main([str(tmp_path / "run.jsonl")] * 2) == 0
    table = (tmp_path / "run.md").read_text()
    low, high = figure["ratio_range"]["torch"]
    assert "the smallest and the largest of 2 processes' medians" in table
    assert f"{figure['ratios']['torch']:.2f} ({low:.2f}-{high:.2f})" in table


def test_cases_take_turns_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def child(module: str, request: Any) -> subprocess.CompletedProcess[str]:
        asked.append((request["process"], request["case"]))
        assert options.Options(**request["options"]).repeats == 7
        assert request["peaks"] == []
        figure = {"case": request["case"], "ratios": {"torch": float(request["process"])}}
        return subprocess.CompletedProcess([], 0, json.dumps(figure) + "\n")

    monkeypatch.setattr(processes, "child", child)
    context = harness.Context(options.parse(["--repeats", "7", "--processes", "3", "--output", "somewhere"]))
    monkeypatch.setattr(processes, "AT_MOST", {"memory": 1, "gemm": 2})
    made = list(processes.run(context, ["mass", "memory", "gemm"]))
    assert asked == [(0, "mass"), (0, "memory"), (0, "gemm"), (1, "mass"), (1, "gemm"), (2, "mass")]
    assert [figure["case"] for figure in made] == ["mass", "memory", "gemm"]
    assert made[0]["ratios"] == {"torch": 1.0}
    assert made[0]["ratio_range"] == {"torch": [0.0, 2.0]}


def test_a_process_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 3, "")
    monkeypatch.setattr(processes, "child", lambda *_: failed)
    with pytest.raises(SystemExit) as error:
        list(processes.run(harness.Context(options.parse([])), ["mass"]))
    assert error.value.code == 3


def test_merging_takes_medians_of_processes() -> None:
    def part(ours: list[float], other: list[float], best: str) -> dict[str, Any]:
        made = harness.figure(
            "gemm", {"rows": 4}, {"ours": ours, "torch": other}, torch_best=best, share={"mass": ours[0]}
        )
        return made | {"floor_s": 1.0, "floor_fraction": 1.0 / made["median_s"]}

    parts = [part([2.0, 2.0], [2.0, 4.0], "bmm"), part([4.0], [4.0], "loop"), part([1.0], [7.0], "loop")]
    made = processes.merged(parts)
    assert made["rows"] == 4
    assert made["torch_best"] == "loop"
    assert made["share"] == {"mass": 2.0}
    assert (made["median_s"], made["range"], made["min_s"], made["max_s"]) == (2.0, [1.0, 4.0], 1.0, 4.0)
    assert (made["repeats"], made["processes"]) == (4, 3)
    assert made["baselines"] == {"torch": 4.0}
    assert made["ratios"] == {"torch": 1.5}
    assert made["ratio_range"] == {"torch": [1.0, 7.0]}
    assert made["floor_fraction"] == 0.5


@pytest.mark.parametrize("native", [True, False])
def test_float32_stands_in_where_pytorch_has_no_bfloat16_product(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)

    def dtypes(*arguments: str) -> list[str]:
        return [s.dtype for s in harness.Context(options.parse([*arguments])).settings()]

    assert dtypes() == (["float32", "bfloat16"] if native else ["float32"])
    assert dtypes("--dtype", "bfloat16", "float16") == ["bfloat16", "float16"]


def test_a_floor_is_the_longer_of_moving_and_computing() -> None:
    peaks = floors.Peaks(1, 10.0, 20.0, 5.0, 100.0, 50.0, 200.0)
    moving = floors.Work(bytes=300, cached_bytes=200)  # 3 s and 1 s
    computing = floors.Work(float32_flops=20, bfloat16_flops=20, exps=5)  # 2 s, 1 s and 1 s
    assert moving.floor(peaks)["floor_s"] == 4
    assert computing.floor(peaks)["floor_s"] == 4
    assert (moving + computing).floor(peaks)["floor"]["bound_by"] == "bytes"
    assert (moving + computing + floors.Work(exps=1)).floor(peaks)["floor"]["bound_by"] == "flops"
    assert (moving + floors.Work(exps=100)).floor(peaks)["floor"]["bound_by"] == "exps"


def test_counts_of_the_mass_are_those_of_a_loop() -> None:
    backbone = SHAPES["tiny"]
    config = backbone.processor_config(32, top_k=4, step=6)
    scores = key_elements = 0
    for _ in range(config.num_layers * 2):  # a batch of two
        for _ in range(config.num_kv_heads):
            key_elements += (40 + 6) * config.head_dim
            for _ in range(config.num_query_heads // config.num_kv_heads):
                scores += sum(40 + q + 1 for q in range(6))
    work = floors.attention_mass(config, "bfloat16", batch=2, prior=40, window=6)
    assert work.exps == scores
    assert work.bfloat16_flops == 2 * config.head_dim * scores
    query_elements = config.num_layers * 2 * 6 * config.num_query_heads * config.head_dim
    assert work.bytes == 2 * (key_elements + query_elements) + 4 * config.num_layers * 2 * 40
    assert floors.attention_mass(config, "float16", 2, 40, 6).float32_flops == work.bfloat16_flops


def test_counts_of_the_processor_are_those_of_its_weights() -> None:
    config = SHAPES["tiny"].processor_config(64, top_k=4, step=6)
    matrices = sum(math.prod(shape) for name, shape in config.layer_shapes().items() if len(shape) == 2)
    work = floors.processor(config, "bfloat16", sequences=2, rows=10)
    assert work.bytes == 2 * config.num_layers * matrices
    assert work.bfloat16_flops == 2 * 20 * config.num_layers * matrices
    assert work.float32_flops == 2 * config.num_layers * 2 * (2 * 10 * 10 * 64)
    one = floors.linear(3, rows=5, in_dim=7, out_dim=11, dtype="float32")
    assert one == floors.Work(bytes=3 * (7 * 11 + 5 * 7 + 5 * 11) * 4, float32_flops=2 * 3 * 5 * 7 * 11)


def test_two_threads_are_measured_together() -> None:
    one, two = floors.measure_peaks(1), floors.measure_peaks(2)
    assert two.threads == 2
    # Where there are two cores they do more, and where there is one, not less by much.
    assert two.float32_flops > 0.5 * one.float32_flops


# --- benchmarks.gpu, its quick shapes on the CPU --------------------------------------------------------------


def test_decoding_that_is_not_stocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attached forward that computes something else, where stock repeats its own tokens."""
    from benchmarks.gpu import decode as gpu_decode
    from benchmarks.gpu.context import Context as GpuContext
    from bottlenecked.integrations import transformers as integration

    context = GpuContext("cpu", True, 5, set())
    setting = context.setting("llama-3.2-1b", 2, 40, 30)
    model = models.make("tiny", dtype=torch.bfloat16)
    identity = gpu_decode.processor(context, model, setting, 0.0)
    with torch.no_grad():
        ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
        stock = gpu_decode.Loop(context, model, ids, model.prepare_inputs_for_generation, 13)
        expected = stock.run()[1]
        assert gpu_decode.check(stock, setting, identity, expected) == {"stock_repeats": True}

        gather = integration._gather
        monkeypatch.setattr(integration, "_gather", lambda parts, layer, query: gather(parts, layer, query.neg_()))
        with pytest.raises(SystemExit, match=r"other tokens than stock, from token 0 on.* apart; stock repeats"):
            gpu_decode.check(stock, setting, identity, expected)


def test_pages_hold_what_contiguous_caches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of vLLM's layouts compare bytes before they measure, and refuse what differs."""
    from benchmarks.gpu import capture, paged
    from benchmarks.gpu.context import Context as GpuContext
    from benchmarks.pages import Pages, check

    context = GpuContext("cpu", True, 5, set())
    for case in (paged, capture):
        figures = list(case.run(context))
        assert len(figures) == 2
        assert not [f["refused"] for f in figures if "refused" in f]
    setting = context.setting("llama-3.2-1b", 2, 40)
    for columns in (False, True):
        pages = Pages(context.inputs(setting), 16, columns=columns)
        assert {keys.stride(3) for keys in pages.keys} == {16 if columns else 1}
        check(pages, pages.bind(pages.inputs.workspace), pages.inputs.bind())
        pages.query_table = pages.query_table[::-1].copy()  # queries of the other sequence
        bound, plain = pages.bind(pages.inputs.workspace), pages.inputs.bind()
        with pytest.raises(SystemExit, match=r"on vLLM's layout other positions are recalled|are not those rewritten"):
            check(pages, bound, plain)
