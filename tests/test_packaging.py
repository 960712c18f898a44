"""The package as users get it: sdist and wheel, an empty environment, import time, the C library from plain C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels take minutes to compile; the ordinary build compiles them where there is nvcc.
CPU_ONLY = {**os.environ, "BOTTLENECKED_CUDA_ARCHS": ""}


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the tracked sources, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "bottlenecked"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "*.so", ".*_cache", "demo"),
    )
    run(sys.executable, "-m", "build", "--outdir", out, source, env=CPU_ONLY)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_wheel_is_one_abi3_wheel(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert "-cp311-abi3-" in wheel.name
    run(Path(sys.executable).parent / "abi3audit", "--strict", "--assume-minimum-abi3", "3.11", wheel)
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "bottleneck_ext/_core.abi3.so",
        "bottleneck_ext/_core.pyi",
        "bottleneck_ext/py.typed",
        "bottlenecked/py.typed",
        "bottlenecked/integrations/transformers.py",
    ):
        assert needed in names
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)


def _sdist_names(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


def test_sdist_holds_every_source(distributions: tuple[Path, Path]) -> None:
    names = _sdist_names(distributions[0])
    for pattern in ("csrc/*.[ch]", "kernels/cpu/*.[ch]", "kernels/cuda/*.*", "python/bottlenecked/**/*.py"):
        for path in ROOT.glob(pattern):
            assert str(path.relative_to(ROOT)) in names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_sdist_is_all_there_is(distributions: tuple[Path, Path]) -> None:
    """What is not in it is missing to whoever works from it: pages that are linked, what lint reads."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git knows which files there are")
    tracked = set(run("git", "-C", ROOT, "ls-files").stdout.splitlines())
    assert tracked - _sdist_names(distributions[0]) == set()


@pytest.mark.parametrize(("version", "asked"), [("12.4.131", None), ("12.9.86", None), ("12.4.131", "100f")])
def test_an_old_nvcc_is_asked_for_what_it_knows(tmp_path: Path, version: str, asked: str | None) -> None:
    for name in ("csrc", "kernels", "bottleneck_ext", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release, V{version}" && exit\nexit 7\n')
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    environment.pop("BOTTLENECKED_CUDA_ARCHS", None)
    if asked is not None:
        environment["BOTTLENECKED_CUDA_ARCHS"] = asked
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "with BOTTLENECKED_CUDA_ARCHS= (empty) in the environment it is built without CUDA" in done.stderr
    left_out = version.startswith("12.4") and asked is None
    assert ("without 100f and 120f, which need nvcc 12.9" in done.stderr) == left_out
    assert ("sm_100f" in done.stderr) == (not left_out)


@pytest.fixture(scope="module")
def built_elsewhere(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of the sdist: of the same sources, in another folder, at another time."""
    out = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, distributions[0], env=CPU_ONLY)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_wheel_is_the_same_bytes_elsewhere(distributions: tuple[Path, Path], built_elsewhere: Path) -> None:
    ours, theirs = zipfile.ZipFile(distributions[1]), zipfile.ZipFile(built_elsewhere)
    assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []
    assert distributions[1].read_bytes() == built_elsewhere.read_bytes()


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_installs_into_an_empty_environment(
    distributions: tuple[Path, Path], built_elsewhere: Path, tmp_path: Path, kind: str
) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    wheel = built_elsewhere if kind == "sdist" else distributions[1]
    run(python, "-m", "pip", "install", "--quiet", wheel, env=CPU_ONLY)
    info = json.loads(run(tmp_path / "env" / "bin" / "bottlenecked", "info", "--json", cwd=tmp_path).stdout)
    assert info["cuda"]["compiled"] is False
    assert "cpu:scalar" in info["backends"]
    run(python, "-c", "import bottlenecked as b; b.CacheProcessor; b.BoundaryDetector", cwd=tmp_path)


def test_import_is_light(tmp_path: Path) -> None:
    # How long it takes, benchmarks/cases/importing.py tells; here: that nothing but the standard library comes with it.
    code = (
        "import sys; before = set(sys.modules); import bottlenecked; new = set(sys.modules) - before;"
        "print(*sorted({name.partition('.')[0] for name in new} - sys.stdlib_module_names))"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.split() == ["bottlenecked"]


def test_unknown_attribute() -> None:
    import bottlenecked

    with pytest.raises(AttributeError, match="no attribute 'Procesor'"):
        bottlenecked.Procesor  # noqa: B018
    assert set(bottlenecked.__all__) <= set(dir(bottlenecked))
    for name in bottlenecked.__all__:
        assert getattr(bottlenecked, name) is not None


def test_no_flag_ties_the_build_to_this_machine() -> None:
    text = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
    assert "march=native" not in text
    assert "mtune=native" not in text
    assert "native" not in os.environ.get("CFLAGS", "") + str(sysconfig.get_config_var("CFLAGS"))


def test_core_never_sees_python_torch_or_cuda() -> None:
    """kernels/cuda/cuda.h, which it does see, is plain C that sees btx.h alone."""
    for path in [*ROOT.glob("csrc/*.[ch]"), *ROOT.glob("kernels/cpu/*.[ch]"), ROOT / "kernels" / "cuda" / "cuda.h"]:
        if path.name.startswith("py_"):
            continue
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                seen = line.lower().replace('"../kernels/cuda/cuda.h"', "")
                assert not any(word in seen for word in ("python.h", "torch", "aten", "cuda", "cublas")), (
                    path,
                    line,
                )


def test_c_example(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler is not None, "a C compiler built the extension; it is needed here too"
    run("make", "-C", ROOT / "examples" / "c", f"BUILD={tmp_path}", f"{tmp_path}/rewrite")
    result = run(tmp_path / "rewrite")
    assert "layer 1: recalled" in result.stdout
    assert "refused as it should be: block_table[0, 4] is 6; there are 6 blocks" in result.stdout
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("valgrind is not installed")
    checked = run(valgrind, "--error-exitcode=9", "--leak-check=full", "--quiet", tmp_path / "rewrite")
    assert checked.stderr.strip() == ""
