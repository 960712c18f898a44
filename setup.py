"""The only build logic: one abi3 extension in C11, no flag tied to the build machine.

Environment: BOTTLENECKED_WERROR=1 makes warnings errors; BOTTLENECKED_SANITIZE=address,undefined adds sanitizers.
BOTTLENECKED_EMULATE=1 adds the CUDA backend with its kernels compiled for the host, for tests (tests/emulation/).
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

header = Path(__file__).with_name("csrc") / "btx.h"
version = re.search(r'#define BTX_VERSION "([^"]+)"', header.read_text())
assert version is not None, "csrc/btx.h defines BTX_VERSION"

emulate = os.environ.get("BOTTLENECKED_EMULATE") == "1"
common_args = ["-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
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
depends = glob("csrc/*.h") + glob("kernels/cpu/*.[ch]")
macros = [("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)]
link_args = ["-pthread", "-lm", "-ldl"]
if sanitize:
    link_args.append(f"-fsanitize={sanitize}")
if emulate:
    sources += glob("kernels/cuda/*.cu") + [f"tests/emulation/{name}.cpp" for name in ("device", "races", "runtime")]
    depends += glob("kernels/cuda/*.h") + glob("kernels/cuda/*.cuh") + glob("tests/emulation/*.h")
    macros += [("BTX_WITH_CUDA", None), ("BTX_EMULATE", None)]
    link_args.append("-lstdc++")


def cuda_command() -> list[str]:
    """Compiles one source in C++ or CUDA, but for the files' names."""
    return [
        *[os.environ.get("CXX", "g++"), "-x", "c++", "-std=gnu++17", "-c", "-O2", "-g", "-fPIC"],
        *["-fno-strict-aliasing", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"],
        *["-DBTX_EMULATE", "-Icsrc", "-Itests/emulation", "-include", "emulation.h", *common_args],
    ]


class BuildExtension(build_ext):
    """Knows .cu and .cpp files too. Their objects are made side by side, and kept until something they need changes."""

    def build_extension(self, ext: Extension) -> None:
        foreign = [source for source in ext.sources if source.endswith((".cu", ".cpp"))]
        ext.sources = [source for source in ext.sources if source not in foreign]
        ext.depends += foreign
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += pool.map(self.compile_foreign, foreign)
        super().build_extension(ext)

    def compile_foreign(self, source: str) -> str:
        target = Path(self.build_temp, source).with_suffix(".o")
        if not target.exists() or target.stat().st_mtime < max(map(os.path.getmtime, [source, "setup.py", *depends])):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([*cuda_command(), source, "-o", str(target)])
        return str(target)


setup(
    version=version.group(1),
    cmdclass={"build_ext": BuildExtension},
    ext_modules=[
        Extension(
            "bottleneck_ext._core",
            sources=sorted(sources),
            depends=sorted(depends),
            include_dirs=["csrc"],
            define_macros=macros,
            extra_compile_args=["-std=c11", "-O3", *common_args],
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
