"""The instructions of one boundary, counted by valgrind: a guard against slow code that no noisy clock could be.

Valgrind knows no AVX-512, so the AVX2 variant is counted; what is common to all variants is guarded with it. Counts
depend on the compiler: they are kept for the one named in instructions.json. After a change that is meant,
`python -m tests.test_instructions` counts anew and writes the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import bottleneck_ext

ROOT = Path(__file__).parent.parent
BUDGET = Path(__file__).with_name("instructions.json")
COMPILER = os.environ.get("CC", "cc")
WEIGHT_DTYPES = ("float32", "bfloat16")
TOLERANCE = 0.05


def compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def compile_program(directory: Path) -> Path:
    sources = [ROOT / "tests" / "instructions.c", ROOT / "kernels" / "cpu" / "executor.c"]
    sources += [path for path in sorted(ROOT.glob("csrc/*.c")) if not path.name.startswith("py_")]
    sources += sorted(ROOT.glob("kernels/cpu/variant_*.c"))
    program = directory / "instructions"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-I", ROOT / "csrc"]
    command = [COMPILER, *flags, *sources, "-o", program, "-pthread", "-lm", "-ldl"]
    subprocess.run([str(c) for c in command], check=True)
    return program


def count(program: Path, weight_dtype: str) -> int:
    """Instructions inside btx_rewrite."""
    result = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=btx_rewrite",
            "--callgrind-out-file=/dev/null",
            str(program),
            "cpu:avx2",
            weight_dtype,
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    collected = re.search(r"Collected : (\d+)", result.stderr)
    assert collected is not None, result.stderr
    return int(collected.group(1))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    if not any(b["variant"] == "avx2" and b["available"] for b in bottleneck_ext.backends()):
        pytest.skip("this machine has no AVX2")
    known, here = json.loads(BUDGET.read_text())["compiler"], compiler_version()
    if here != known:
        pytest.skip(f"the counts are of another compiler: {known}, not {here}")
    return compile_program(tmp_path_factory.mktemp("instructions"))


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_a_boundary_takes_no_more_instructions(program: Path, weight_dtype: str) -> None:
    budget = json.loads(BUDGET.read_text())["boundary"][weight_dtype]
    counted = count(program, weight_dtype)
    assert counted <= budget * (1 + TOLERANCE), (
        f"{counted} instructions, {counted / budget - 1:+.1%} of the {budget} in {BUDGET.name}: "
        "find out why, or if it is meant run `python -m tests.test_instructions`"
    )
    assert counted >= budget * (1 - TOLERANCE), (
        f"{counted} instructions, {counted / budget - 1:+.1%} of the {budget} in {BUDGET.name}: "
        "well done; keep it with `python -m tests.test_instructions`"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        built = compile_program(Path(directory))
        counts = {weight_dtype: count(built, weight_dtype) for weight_dtype in WEIGHT_DTYPES}
    BUDGET.write_text(json.dumps({"compiler": compiler_version(), "boundary": counts}, indent=2) + "\n")
    print(BUDGET.read_text())


if __name__ == "__main__":
    main()
