"""The only build logic: one abi3 extension in C11, no flag tied to the build machine.

Environment: BOTTLENECKED_WERROR=1 makes warnings errors; BOTTLENECKED_SANITIZE=address,undefined adds sanitizers.
"""

import os
import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

header = Path(__file__).with_name("csrc") / "btx.h"
version = re.search(r'#define BTX_VERSION "([^"]+)"', header.read_text())
assert version is not None, "csrc/btx.h defines BTX_VERSION"

# Instruction sets are chosen at run time: kernels/cpu/variant_*.c raise theirs by pragma.
compile_args = ["-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
link_args = ["-pthread", "-lm", "-ldl"]
if os.environ.get("BOTTLENECKED_WERROR") == "1":
    compile_args.append("-Werror")
if sanitize := os.environ.get("BOTTLENECKED_SANITIZE"):
    compile_args += [
        f"-fsanitize={sanitize}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g",
        "-O1",
    ]
    link_args.append(f"-fsanitize={sanitize}")

setup(
    version=version.group(1),
    ext_modules=[
        Extension(
            "bottleneck_ext._core",
            sources=sorted([*glob("csrc/*.c"), "kernels/cpu/executor.c", *glob("kernels/cpu/variant_*.c")]),
            depends=sorted(glob("csrc/*.h") + glob("kernels/cpu/*.[ch]")),
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
