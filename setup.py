"""The only build logic: one abi3 extension in C11, no flag tied to the build machine.

Environment: BOTTLENECKED_WERROR=1 makes warnings errors; BOTTLENECKED_SANITIZE=address,undefined adds sanitizers.
The CUDA backend is built where there is an nvcc (CUDA_HOME, else the PATH), for the architectures that
BOTTLENECKED_CUDA_ARCHS lists ("90a", "80,86"; empty: without CUDA; unset: all that this nvcc knows). What ptxas said
of a kernel's registers lies beside its object, in build/temp.*/kernels/cuda/*.ptxas.txt, for tests/test_cuda_build.py.
BOTTLENECKED_EMULATE=1 compiles the kernels for the host instead, for tests (tests/emulation/).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if "t" in sys.abiflags:
    sys.exit(
        "bottlenecked is built for CPython's stable ABI, which the free-threaded build does not have: use the build "
        "with the GIL"
    )

header = Path(__file__).with_name("csrc") / "btx.h"
version = re.search(r'#define BTX_VERSION "([^"]+)"', header.read_text())
assert version is not None, "csrc/btx.h defines BTX_VERSION"

# The same sources, compiler and setuptools make the same wheel, wherever and whenever: no date but the first that an
# archive can hold, no path of this machine.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")

emulate = os.environ.get("BOTTLENECKED_EMULATE") == "1"
common_args = ["-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", f"-ffile-prefix-map={Path.cwd()}=."]
if os.environ.get("BOTTLENECKED_WERROR") == "1":
    common_args.append("-Werror")
if sanitize := os.environ.get("BOTTLENECKED_SANITIZE"):
    common_args += [
        f"-fsanitize={sanitize}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g",
        "-O1",
    ]

# Instruction sets are chosen at run time: kernels/cpu/variant_*.c raise theirs by pragma.
sources = [*glob("csrc/*.c"), "kernels/cpu/executor.c", *glob("kernels/cpu/variant_*.c")]
shared_headers = glob("csrc/*.h")
depends = shared_headers + glob("kernels/cpu/*.[ch]")
macros = [("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)]
link_args = ["-pthread", "-lm", "-ldl"]
if sanitize:
    link_args.append(f"-fsanitize={sanitize}")

# What is compiled in when nothing else is asked for: machine code for the devices of today, and PTX, which the driver
# compiles at start, for those to come.
CUDA_ARCHITECTURES = "80,86,89,90a,100f,120f,90-ptx"
FROM_12_9 = ("100f", "120f")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")


def version_of(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return "nvcc " + next(iter(re.findall(r"\bV\d[\d.]*", told)), "of an unknown version")


def is_before_12_9(version: str) -> bool:
    numbers = re.findall(r"V(\d+)\.(\d+)", version)
    return bool(numbers) and tuple(map(int, numbers[0])) < (12, 9)


def find_libraries(nvcc: str) -> list[str]:
    """The linker's options for CUDA's libraries, as nvcc itself would give them: it may be a wrapper from anywhere."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return re.findall(r'"(-L[^"]+)"', next((line for line in plan.splitlines() if "LIBRARIES=" in line), ""))


architectures = os.environ.get("BOTTLENECKED_CUDA_ARCHS", CUDA_ARCHITECTURES).replace(" ", "")
nvcc = None if emulate or sanitize or not architectures else find_nvcc()
nvcc_version = "" if nvcc is None else version_of(nvcc)
if "BOTTLENECKED_CUDA_ARCHS" not in os.environ and is_before_12_9(nvcc_version):
    architectures = ",".join(a for a in CUDA_ARCHITECTURES.split(",") if a not in FROM_12_9)
    print(f"{nvcc_version}: without {' and '.join(FROM_12_9)}, which need nvcc 12.9", file=sys.stderr)
cuda_headers: list[str] = []
if nvcc is not None or emulate:
    sources += glob("kernels/cuda/*.cu")
    cuda_headers += glob("kernels/cuda/*.h") + glob("kernels/cuda/*.cuh")
    macros.append(("BTX_WITH_CUDA", None))
if nvcc is not None:
    link_args += [*find_libraries(nvcc), "-lcudart_static", "-lrt"]
if emulate:
    sources += [f"tests/emulation/{name}.cpp" for name in ("device", "races", "runtime")]
    cuda_headers += glob("tests/emulation/*.h")
    macros.append(("BTX_EMULATE", None))
    link_args.append("-lstdc++")


def generate_code(architecture: str) -> str:
    """nvcc's option for "90a" (machine code) or "90-ptx"."""
    number, _, ptx = architecture.partition("-")
    return f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"


def cuda_command() -> list[str]:
    """Compiles one source in C++ or CUDA, but for the files' names."""
    if nvcc is not None:
        # Without exceptions, type information and guarded statics nothing of the C++ library is needed.
        host_args = "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics"
        return [
            *[nvcc, "-std=c++17", "-O3", "-c", "-Xptxas=-v", "-Icsrc", f"-Xcompiler={host_args}"],
            f'-DBTX_CUDA_ARCHITECTURES="{architectures}"',
            *map(generate_code, architectures.split(",")),
        ]
    return [
        *[os.environ.get("CXX", "g++"), "-x", "c++", "-std=gnu++17", "-c", "-O2", "-g", "-fPIC"],
        *["-fno-strict-aliasing", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"],
        *["-DBTX_EMULATE", "-Icsrc", "-Itests/emulation", "-include", "emulation.h", "-fsanitize=alignment"],
        *common_args,
    ]


# Of what `-Xptxas -v` prints, what is of interest to tests/test_cuda_build.py alone.
ABOUT_KERNELS = re.compile(r"ptxas info\s*:(?! \(C\d+\))|\s+\d+ bytes stack frame,")


class BuildExtension(build_ext):
    """Knows .cu and .cpp files too. Their objects are made side by side, and kept until something they need changes."""

    def build_extension(self, ext: Extension) -> None:
        foreign = [source for source in ext.sources if source.endswith((".cu", ".cpp"))]
        ext.sources = [source for source in ext.sources if source not in foreign]
        # With CUDA and without are two extensions of the same sources.
        options = Path(self.build_temp, "options.txt")
        options.parent.mkdir(parents=True, exist_ok=True)
        if not options.exists() or options.read_text() != repr((macros, link_args)):
            options.write_text(repr((macros, link_args)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += pool.map(self.compile_foreign, foreign)
        ext.depends += [*foreign, *ext.extra_objects, str(options)]
        super().build_extension(ext)

    def compile_foreign(self, source: str) -> str:
        target = Path(self.build_temp, source).with_suffix(".o")
        command = [*cuda_command(), source, "-o", str(target)]
        # Other architectures, or another compiler, make other objects.
        report, head = target.with_suffix(".ptxas.txt"), f"{nvcc_version}: {shlex.join(command)}\n"
        is_same = nvcc is None or (report.exists() and report.read_text().startswith(head))
        newest = max(map(os.path.getmtime, [source, "setup.py", *shared_headers, *cuda_headers]))
        if is_same and target.exists() and target.stat().st_mtime >= newest:
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if nvcc is None:
            self.spawn(command)
            return str(target)
        report.unlink(missing_ok=True)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write("".join(line for line in done.stderr.splitlines(True) if not ABOUT_KERNELS.match(line)))
        if done.returncode != 0:
            raise CompileError(
                f"{shlex.join(command)} failed with exit status {done.returncode}: with BOTTLENECKED_CUDA_ARCHS= "
                "(empty) in the environment it is built without CUDA, with BOTTLENECKED_CUDA_ARCHS=90a for one device"
            )
        report.write_text(head + done.stderr)
        return str(target)


setup(
    version=version.group(1),
    cmdclass={"build_ext": BuildExtension},
    ext_modules=[
        Extension(
            "bottleneck_ext._core",
            sources=sorted(sources),
            depends=sorted([*depends, *cuda_headers]),
            include_dirs=["csrc"],
            define_macros=macros,
            extra_compile_args=["-std=c11", "-O3", *common_args],
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
