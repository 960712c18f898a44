"""What ptxas made of the CUDA kernels, on every architecture the build has machine code for: no GPU is needed.

A kernel that begins to spill registers, or takes more of them or of shared memory than it did, is slower and still
right: no other test sees it. cuda_build.json holds [registers, bytes of static shared memory, bytes spilled, bytes of
stack] of each kernel; the few that spill are those with a number there, and no other may. `make build` keeps what ptxas
said beside the objects; nothing is compiled here. The numbers depend on the compiler, which the file names. After a
change that is meant, `make build` and `python -m tests.test_cuda_build` write it anew.

Where the extension has no CUDA in it, or not every architecture, there is nothing to look at and the tests say why;
BOTTLENECKED_REQUIRE_CUDA_BUILD=1, as in .ci/run, makes that a failure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

import bottleneck_ext

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "kernels" / "cuda"
BUDGET = Path(__file__).with_name("cuda_build.json")
REMEDY = "find out why, or if it is meant run `make build` and `python -m tests.test_cuda_build`"
MORE_REGISTERS = 2  # are the compiler's whim, not a change


class Resources(NamedTuple):
    registers: int
    shared: int  # bytes, static; what is asked for at launch is in the sources
    spilled: int  # bytes stored and loaded
    stack: int  # bytes; 32 of them are the slow path of sinf and cosf


Kernels = dict[str, dict[str, Resources]]  # by architecture, by name


class Built(NamedTuple):
    compiler: str
    kernels: Kernels
    advice: list[str]


def parse(output: str) -> tuple[Kernels, list[str]]:
    """Of what `-Xptxas -v` prints: the kernels, by their mangled names, and ptxas's warnings and advice."""
    kernels: Kernels = {}
    advice = [line for line in output.splitlines() if re.match(r"ptxas\b.*(\bwarning\b|\(C\d+\))", line)]
    # One part an entry function: its own properties, then perhaps those of functions it calls.
    for part in re.split(r"^ptxas info\s*: Compiling entry function ", output, flags=re.M)[1:]:
        head = re.match(r"'(\w+)' for 'sm_(\w+)'", part)
        used = re.search(r"Used (\d+) registers", part)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert head is not None, part
        assert used is not None, part
        assert frames, part
        shared = re.search(r"(\d+) bytes smem", part)
        of_architecture = kernels.setdefault(head[2], {})
        assert head[1] not in of_architecture, f"two kernels are called {head[1]}"
        of_architecture[head[1]] = Resources(
            registers=int(used[1]),
            shared=int(shared[1]) if shared else 0,
            spilled=sum(int(stores) + int(loads) for _, stores, loads in frames),
            stack=max(int(stack) for stack, _, _ in frames),
        )
    return kernels, advice


def readable(kernels: Kernels) -> Kernels:
    """Under names like `lse_kernel<__half, 64, 1>`."""
    mangled = sorted({name for of_architecture in kernels.values() for name in of_architecture})
    command = ["c++filt", "--no-params", *mangled]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = dict(zip(mangled, plain, strict=True))
    assert len(set(names.values())) == len(names), "two kernels differ in their parameters only"
    return {
        architecture: {names[name]: used for name, used in of_architecture.items()}
        for architecture, of_architecture in kernels.items()
    }


def architectures(listed: str) -> list[str]:
    """Of a list as in BOTTLENECKED_CUDA_ARCHS: those with machine code. PTX is not assembled here."""
    return [architecture for architecture in listed.split(",") if not architecture.endswith("-ptx")]


def read(reports: Path) -> Built:
    """Everything under build/: every source's report, all of one compiler and newer than its source."""
    kernels: Kernels = {}
    advice: list[str] = []
    compilers = set()
    sources = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    for source in sources:
        report = reports / f"{source.stem}.ptxas.txt"
        assert report.is_file(), f"{report} is not there: run `make build`"
        assert report.stat().st_mtime >= source.stat().st_mtime, f"{source} changed since it was built: `make build`"
        head, _, output = report.read_text().partition("\n")
        compilers.add(head.partition(":")[0])
        of_source, advice_of_source = parse(output)
        advice += [f"{source.name}: {line}" for line in advice_of_source]
        for architecture, found in of_source.items():
            both = kernels.setdefault(architecture, {}).keys() & found.keys()
            assert not both, f"{source.name} defines a kernel that another file defines: {both}"
            kernels[architecture] |= found
    assert len(compilers) == 1, f"built by several compilers: {compilers}"
    return Built(compilers.pop(), readable(kernels), advice)


def why_not() -> str | None:
    """Why there is nothing to look at, or None."""
    cuda = bottleneck_ext.build_info()["cuda"]
    if not cuda["compiled"]:
        return "the extension was built without CUDA: no nvcc, or an empty BOTTLENECKED_CUDA_ARCHS"
    if not REPORTS.is_dir() or not Path(bottleneck_ext.__file__).is_relative_to(ROOT):
        return f"the extension was built elsewhere: {REPORTS} holds no reports of ptxas"
    return None


def not_here(reason: str) -> None:
    if os.environ.get("BOTTLENECKED_REQUIRE_CUDA_BUILD") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def complaints(kernel: str, budget: Resources, used: Resources) -> list[str]:
    found = []
    if used.spilled > budget.spilled:
        found.append(f"{kernel} spills {used.spilled} bytes of registers, not {budget.spilled}")
    if used.registers > budget.registers + MORE_REGISTERS:
        found.append(f"{kernel} takes {used.registers} registers, not {budget.registers}")
    if used.shared > budget.shared:
        found.append(f"{kernel} takes {used.shared} bytes of static shared memory, not {budget.shared}")
    if used.stack > budget.stack:
        found.append(f"{kernel} takes {used.stack} bytes of stack, not {budget.stack}")
    return found


@pytest.fixture(scope="module")
def built() -> Built:
    reason = why_not()
    if reason is not None:
        not_here(reason)
    return read(REPORTS)


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Resources]]:
    kernels = json.loads(BUDGET.read_text())["kernels"]
    return {
        architecture: {kernel: Resources(*numbers) for kernel, numbers in of_architecture.items()}
        for architecture, of_architecture in kernels.items()
    }


def default_architectures() -> list[str]:
    listed = re.search(r'^CUDA_ARCHITECTURES = "([^"]+)"', (ROOT / "setup.py").read_text(), re.M)
    assert listed is not None, "setup.py defines CUDA_ARCHITECTURES"
    return architectures(listed[1])


@pytest.mark.parametrize("architecture", default_architectures())
def test_kernels_keep_to_their_budget(
    built: Built, recorded: dict[str, dict[str, Resources]], architecture: str
) -> None:
    compiler = json.loads(BUDGET.read_text())["compiler"]
    if built.compiler != compiler:
        not_here(f"the budget is of another compiler: {compiler}, not {built.compiler}")
    if architecture not in built.kernels:
        not_here(f"the extension was built without sm_{architecture}")
    kernels, budget = built.kernels[architecture], recorded.get(architecture, {})
    found = [f"{kernel} is not in {BUDGET.name}" for kernel in sorted(kernels.keys() - budget.keys())]
    found += [f"{kernel} is in {BUDGET.name} alone" for kernel in sorted(budget.keys() - kernels.keys())]
    for kernel in sorted(kernels.keys() & budget.keys()):
        found += complaints(kernel, budget[kernel], kernels[kernel])
    assert not found, "\n".join([f"on sm_{architecture}:", *found, REMEDY])


def test_the_compiler_advises_nothing(built: Built) -> None:
    """Above all, it found no reason to wait for every wgmma by itself (C7510 and others)."""
    assert not built.advice, "\n".join(built.advice)


def test_the_budget_is_of_every_architecture(recorded: dict[str, dict[str, Resources]]) -> None:
    assert sorted(recorded) == sorted(default_architectures())
    assert len({tuple(sorted(kernels)) for kernels in recorded.values()}) == 1, "every kernel is on every architecture"


SAMPLE = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    40 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 40 bytes cumulative stack size, 4096 bytes smem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_Z1av'
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers, 376 bytes cmem[0]
"""


def test_what_the_compiler_prints_is_understood() -> None:
    kernels, advice = parse(SAMPLE)
    assert kernels == {"90a": {"_Z1av": Resources(168, 4096, 12, 40), "_Z1bv": Resources(16, 0, 0, 0)}}
    assert len(advice) == 1
    assert "C7510" in advice[0]


def test_growth_is_seen() -> None:
    budget = Resources(registers=100, shared=1024, spilled=0, stack=32)
    assert not complaints("k", budget, Resources(102, 1024, 0, 32))
    for grown in (Resources(103, 1024, 0, 32), Resources(100, 1025, 0, 32), Resources(100, 1024, 4, 32)):
        assert len(complaints("k", budget, grown)) == 1


def main() -> None:
    """Writes the budget from the reports of the latest build, or of the folder that is named."""
    built = read(Path(sys.argv[1]) if len(sys.argv) > 1 else REPORTS)
    missing = set(default_architectures()) - built.kernels.keys()
    assert not missing, f"the latest build has no {', '.join(sorted(missing))}: build for all"
    text = json.dumps({"compiler": built.compiler, "kernels": built.kernels}, indent=2, sort_keys=True)
    BUDGET.write_text(re.sub(r"\[[\d\s,]+\]", lambda numbers: json.dumps(json.loads(numbers[0])), text) + "\n")
    spills = [
        f"sm_{architecture}: {name} spills {used.spilled} bytes"
        for architecture, found in built.kernels.items()
        for name, used in sorted(found.items())
        if used.spilled
    ]
    print("\n".join([f"{BUDGET.name}: {sum(map(len, built.kernels.values()))} kernels", *spills, *built.advice]))


if __name__ == "__main__":
    main()
