"""docs/reliability.md says what tests/reliability.py says, and every test that it names is there; mutants too."""

from __future__ import annotations

import ast
import datetime
import re
from pathlib import Path

import pytest

from . import mutants, reliability

TESTS = Path(__file__).parent


@pytest.mark.parametrize("promise", reliability.PROMISES, ids=lambda promise: promise.what)
def test_a_promise_has_its_tests(promise: reliability.Promise) -> None:
    assert promise.tests
    for test in promise.tests:
        file, _, name = test.partition("::")
        functions = {
            node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.targets[0])
            for node in ast.parse((TESTS / file).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.Assign)
        }
        assert name in functions if name else any(function.startswith(("test_", "Test")) for function in functions), (
            test
        )


def test_the_page_is_of_these_promises() -> None:
    text = reliability.PAGE.read_text(encoding="utf-8")
    table = text.split(reliability.BEGIN)[1].split(reliability.END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    promises = [row for row in rows if len(row) == 4][2:]
    assert [row[:2] for row in promises] == [[promise.what, promise.how] for promise in reliability.PROMISES]
    for row in promises:
        assert re.fullmatch(r"[1-9]\d*( \(\d+ skipped\))?|not run", row[2]), f"{row[0]}: {row[2]}"
        assert row[3] == ("" if row[2] == "not run" else "0"), row[0]
    missing = [row[0] for row in promises if row[2] == "not run"]
    assert not missing or len(missing) == len(promises), "make reliability PARTS='tests vllm' fills in the rest"
    runs = [row for row in rows if len(row) == 5][2:]
    assert [row[0] for row in runs[2:]] == [f"`make {target}`" for target in reliability.TARGETS]


def test_targets_are_in_the_makefile() -> None:
    makefile = (reliability.ROOT / "Makefile").read_text()
    for target in reliability.TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_reports_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_b[1]"/>'
        '<testcase classname="tests.test_a" name="test_b[2]"><failure/></testcase>'
        '<testcase classname="tests.vllm.test_c" name="test_d"><skipped/></testcase>'
        '<testcase classname="tests.test_e.TestF" name="runTest"/></testsuite></testsuites>'
    )
    assert reliability.read_report(report) == {
        "test_a.py::test_b": [2, 1, 0],
        "vllm/test_c.py::test_d": [1, 0, 1],
        "test_e.py::TestF": [1, 0, 0],
    }


def report_of(began: datetime.datetime) -> str:
    case = '<testcase classname="tests.test_a" name="test_b"/>'
    return f'<testsuites><testsuite timestamp="{began.isoformat()}">{case}</testsuite></testsuites>'


def test_what_make_has_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless something has changed since that began."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> None:
        calls.append(command)
        (tmp_path / "some.xml").write_text(report_of(datetime.datetime.now()))

    monkeypatch.setattr(reliability, "NOTES", tmp_path)
    monkeypatch.setattr(reliability.subprocess, "run", run)
    changed = reliability.last_change()
    (tmp_path / "tests.xml").write_text(report_of(changed + datetime.timedelta(seconds=1)))
    reliability.run_tests("tests")
    assert calls == []
    assert reliability.noted("tests")["results"] == {"test_a.py::test_b": [1, 0, 0]}
    assert reliability.noted("tests")["date"] == (changed + datetime.timedelta(seconds=1)).date().isoformat()
    (tmp_path / "tests.xml").write_text(report_of(changed - datetime.timedelta(seconds=1)))
    reliability.run_tests("tests", latest=True)
    assert calls == []
    reliability.run_tests("tests")
    assert len(calls) == 1


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_a_mutant_has_its_place(mutant: mutants.Mutant) -> None:
    """What it replaces is still there, once, and so are its tests."""
    assert mutant.applied_to(mutants.ROOT) != (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    files = [word for word in mutant.tests.split() if word.startswith("tests/")]
    assert files
    assert all((mutants.ROOT / file).is_file() for file in files)


def test_there_are_thirty_mutants() -> None:
    assert len(mutants.MUTANTS) == 30
    assert len(set(map(str, mutants.MUTANTS))) == 30
