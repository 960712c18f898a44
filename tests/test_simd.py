"""The vector vocabulary of the kernels, and whole boundaries in plain C, on every instruction set that can run here.

NEON runs on aarch64 itself, or elsewhere in qemu's user mode emulation, compiled by the cross compiler of `make neon`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import bottleneck_ext

ROOT = Path(__file__).parent.parent
AVAILABLE = {b["variant"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"}
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
INCLUDES = ["-Icsrc", "-Ikernels/cpu"]
FORMS = {
    "scalar": ["-DBTX_VL=1"],
    "neon": ["-DBTX_VL=4"],
    "avx2": ["-DBTX_VL=8", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DBTX_VL=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
CORE = [path for path in ROOT.glob("csrc/*.c") if not path.name.startswith("py_")]
BACKEND = [ROOT / "kernels" / "cpu" / "executor.c", *ROOT.glob("kernels/cpu/variant_*.c")]


@dataclass(frozen=True)
class Machine:
    """How to compile for a machine, and what its programs are run by."""

    compiler: list[str]
    runner: list[str]

    def compile_and_run(self, directory: Path, *arguments: str | Path) -> str:
        """What the program prints. A disagreement is its exit status, a touch of forbidden memory a signal."""
        program = directory / "program"
        self._run(*self.compiler, *FLAGS, *INCLUDES, *arguments, "-o", program, "-pthread", "-lm")
        return self._run(*self.runner, program)

    def _run(self, *command: str | Path) -> str:
        result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout


NATIVE = Machine([os.environ.get("CC", "cc")], [])


def emulated_aarch64() -> Machine:
    qemu = shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("NEON needs an aarch64 machine, or qemu-aarch64 (Debian: qemu-user) on the path")
    return Machine([sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"], [qemu])


@pytest.mark.parametrize("form", FORMS)
def test_functions(form: str, tmp_path: Path) -> None:
    if form != "neon" and form not in AVAILABLE:
        pytest.skip(f"this machine has no {form}")
    machine = NATIVE if form in AVAILABLE else emulated_aarch64()
    assert "lanes: 0 failed" in machine.compile_and_run(tmp_path, *FORMS[form], "tests/simd.c")


def test_every_function_is_checked() -> None:
    """A new function of the vocabulary, or a form that lacks one, shows here."""
    text = (ROOT / "kernels" / "cpu" / "simd.h").read_text()
    checks = (ROOT / "tests" / "simd.c").read_text()
    names = set(re.findall(r"^(?:static inline|BTX_INLINE) .*?\b(vf_\w+)\(|^#define (vf_\w+)\(", text, re.MULTILINE))
    defined = {function or macro for function, macro in names} - {"vf_first"}  # of some forms, for their own use
    assert len(defined) > 30
    assert [name for name in sorted(defined) if f"{name}(" not in checks] == []


def test_boundaries_on_this_machine(tmp_path: Path) -> None:
    if {"scalar"} == AVAILABLE:
        pytest.skip("this machine has no other backend to compare with the scalar one")
    assert ", 0 failed" in NATIVE.compile_and_run(tmp_path, "tests/variants.c", *CORE, *BACKEND)


def test_boundaries_on_a_device(tmp_path: Path) -> None:
    """The core's side of it: the device is the scalar backend, in memory that the host cannot touch."""
    assert "0 failed" in NATIVE.compile_and_run(tmp_path, "tests/device.c", *CORE, *BACKEND).splitlines()


def test_boundaries_on_neon(tmp_path: Path) -> None:
    if "neon" in AVAILABLE:
        pytest.skip("test_boundaries_on_this_machine did this")
    output = emulated_aarch64().compile_and_run(tmp_path, "tests/variants.c", *CORE, *BACKEND)
    assert "neon: head_dim 128" in output
    assert ", 0 failed" in output
