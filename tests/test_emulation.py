"""The CUDA kernels without a GPU: compiled for the host and run there (tests/emulation/).

Needs a C++ compiler and make. `tests/emulation/README.md` says what this finds and what it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import sanitize_cuda
from .emulation.mutants import KERNELS, MUTANTS, build_unchanged, judge

ROOT = Path(__file__).parent.parent
EMULATED = ROOT / "build" / "emulated"
CPUS = os.cpu_count() or 1


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout[-12000:] + result.stderr[-12000:]


@pytest.mark.parametrize(
    ("variant", "seeds", "shared", "sm90a"),
    [("plain", "0 30", "227", "0"), ("races", "0 20", "99", "0"), ("races", "30 6", "227", "1")],
)
def test_operations(variant: str, seeds: str, shared: str, sm90a: str) -> None:
    """The emulation itself, then every operation of the backend's table; "races" also sees every access of memory.

    shared: KiB of shared memory, of a large device and of a small one. sm90a: with attention_mass_sm90.cu.
    """
    make = ["make", "-s", f"-j{CPUS}", "-C", "tests/emulation", f"VARIANT={variant}", f"SEEDS={seeds}"]
    run(make, BTX_EMULATE_SHARED_KIB=shared, BTX_EMULATE_SM90A=sm90a)


@pytest.fixture(scope="session")
def emulated() -> Path:
    """A folder with the extension, its CUDA backend compiled for the host, and links to what is not compiled."""
    build = ["build_py", "--build-lib", str(EMULATED), "build_ext", "--build-lib", str(EMULATED)]
    build += ["--build-temp", f"{EMULATED}-temp"]
    run([sys.executable, "setup.py", "--quiet", *build], BOTTLENECKED_EMULATE="1")
    tests = EMULATED / "tests"
    if not tests.is_symlink():
        tests.symlink_to("../../tests")
    return EMULATED


def test_parity(emulated: Path) -> None:
    """The whole way from Python: tests/emulation/parity.py, with this extension in place of the installed one."""
    pytest_options = ["-q", "-p", "no:cacheprovider", "tests/emulation/parity.py"]
    run([sys.executable, "-P", "-m", "pytest", *pytest_options], cwd=emulated, PYTHONPATH=str(emulated))


def test_mutants() -> None:
    """Mistakes put into the kernels are found: every eighth of them, or all with BOTTLENECKED_MUTANTS=all."""
    chosen = MUTANTS if os.environ.get("BOTTLENECKED_MUTANTS") == "all" else MUTANTS[::8]
    build_unchanged()
    with ThreadPoolExecutor(CPUS) as pool:
        missed = [str(mutant) for mutant, found in zip(chosen, pool.map(judge, chosen), strict=True) if not found]
    assert not missed


def test_mutants_are_of_these_kernels() -> None:
    """What they replace is still there."""
    for mutant in MUTANTS:
        mutant.apply(KERNELS, write=False)


def test_parts_to_sanitize_are_every_case_once() -> None:
    """benchmarks/run_gpu.sh has a process for each."""
    parts = [sanitize_cuda.part_of(sanitize_cuda.ALL, f"{i}/4") for i in range(1, 5)]
    assert sorted(name for part in parts for name in part) == sorted(sanitize_cuda.ALL)
    for wrong in ("0/4", "5/4", "4", "a/b", "/"):
        with pytest.raises(SystemExit):
            sanitize_cuda.part_of(sanitize_cuda.ALL, wrong)


def test_what_is_sanitized_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU: a case of every kind."""
    monkeypatch.setenv("BOTTLENECKED_CUDA_PRODUCTS", "")  # is put back
    assert sanitize_cuda.main(["--cpu", "--no-library", "control", "no prior", "capture, columns"]) == 0
    assert os.environ["BOTTLENECKED_CUDA_PRODUCTS"] == "general"
    assert capsys.readouterr().out.splitlines()[-1] == "all done"
    with pytest.raises(SystemExit):
        sanitize_cuda.main(["--cpu", "no such case"])
