"""The fuzz targets: every committed input once, then others for some seconds (`make fuzz` takes a minute, and any time
that it is given)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUZZ = ROOT / "tests" / "fuzz"
SECONDS = 60

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-fuzz" / "installed").exists(), reason="no .venv-fuzz, which make fuzz makes: libFuzzer"
)


@pytest.fixture(scope="module")
def built() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    made = subprocess.run(
        ["make", "--silent", f"--jobs={os.cpu_count()}", "-C", str(FUZZ)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-4000:]


def run(*options: str) -> tuple[str, dict[str, int]]:
    """What was printed, and runs by target."""
    done = subprocess.run([sys.executable, str(FUZZ / "run.py"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.fullmatch(r"make fuzz: \d+ targets, .*, 0 failures", done.stdout.splitlines()[-1])
    summary = json.loads((ROOT / "build" / "fuzz" / "summary.json").read_text())
    return done.stdout, {target["target"]: target["runs"] for target in summary["targets"]}


def test_committed_inputs(built: None) -> None:
    _, runs = run("--replay")
    for name, count in runs.items():
        assert count == len((FUZZ / "corpus" / f"{name}.txt").read_text().splitlines()) > 50


def test_other_inputs(built: None) -> None:
    told, runs = run("--seconds", str(SECONDS))
    print(told)
    assert min(runs.values()) > 50


# Target, file, line, what stands there instead, what is told.
MISTAKES = [
    (
        "operations", "tensor", "if (magnitude(tensor->stride[smallest]) <= reach)", "if (reach > INT64_MAX)",
        "two indices reach one element",
    ),
    (
        "operations", "processor", "counts = calloc((size_t)mass->shape[0] + 1, sizeof *counts);",
        "counts = malloc(((size_t)mass->shape[0] + 1) * sizeof *counts);", "heap-buffer-overflow",
    ),
    ("rewrite", "boundary", "entry < 0 || entry >= table->num_entries", "entry < 0", "AddressSanitizer"),
    ("rewrite", "processor", "of_step[i] : -1;", "of_step[i] + 1 : -1;", "bytes were written that may not be"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "name", "right", "wrong", "told"), MISTAKES)
def test_the_committed_inputs_find_mistakes(
    built: None, tmp_path: Path, target: str, name: str, right: str, wrong: str, told: str
) -> None:
    """One line of the core is replaced; the inputs that are committed are enough to notice."""
    source = (ROOT / "csrc" / f"{name}.c").read_text()
    assert source.count(right) == 1
    (tmp_path / f"{name}.c").write_text(source.replace(right, wrong))
    build = ROOT / "build" / "fuzz"
    others = {f"{path.stem}.o" for path in (ROOT / "csrc").glob("py_*.c")} | {"rewrite.o", "operations.o", f"{name}.o"}
    objects = [str(path) for path in build.glob("*.o") if path.name not in others]
    (library,) = (ROOT / ".venv-fuzz" / "lib").glob("python3*/site-packages/libclang_rt.fuzzer_no_main.a")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / target
    subprocess.run(
        [
            os.environ.get("CC", "cc"), *flags, f"-I{ROOT / 'csrc'}", str(tmp_path / f"{name}.c"),
            str(build / f"{target}.o"), *objects, str(library), "-Wl,--wrap=__sanitizer_cov_trace_pc", "-lstdc++",
            "-pthread", "-lm", "-ldl", "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for i, line in enumerate((FUZZ / "corpus" / f"{target}.txt").read_text().splitlines()):
        (inputs / f"{i:04}").write_bytes(bytes.fromhex(line))
    command = [str(program), f"-artifact_prefix={tmp_path}/", *map(str, sorted(inputs.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode != 0
    assert told in done.stderr
