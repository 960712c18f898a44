"""`import bottlenecked` in a fresh process, beside `import numpy`: seconds within Python, and modules loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import checks
from benchmarks.harness import OURS, Contender, Context, Figure, figure

CODE = """
import json, sys, time
before = len(sys.modules)
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "modules": len(sys.modules) - before, "torch": "torch" in sys.modules}}))
"""


def run(context: Context) -> Iterator[Figure]:
    first = fresh("bottlenecked")
    if first["torch"]:
        checks.refuse("import", "importing bottlenecked imported torch")
    contenders = {
        OURS: Contender(lambda: fresh("bottlenecked")["seconds"]),
        "numpy": Contender(lambda: fresh("numpy")["seconds"]),
    }
    times = context.measure(contenders, threads=1, scrub=False)
    more = {"modules": first["modules"], "baseline_modules": {"numpy": fresh("numpy")["modules"]}}
    yield figure("import", {}, times, **more)


def fresh(module: str) -> dict[str, Any]:
    """What importing a module costs a new interpreter."""
    command = [sys.executable, "-c", CODE.format(module=module)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
