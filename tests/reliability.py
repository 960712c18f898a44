"""What this package promises about failures, and by which tests: the tables of docs/reliability.md.

`python -m tests.reliability PART...` (make reliability) runs parts and notes what came of them in build/reliability:
"tests" are the tests below, "vllm" those of them that need vLLM's environment, every other part a target of the
Makefile. Where `make test` or `make test-vllm` has run since anything changed, what it said is taken and nothing is run
again; with --latest, whatever has changed since. Then, or without a part, it writes the tables of docs/reliability.md
from all that was noted.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
NOTES = ROOT / "build" / "reliability"
BEGIN, END = "<!-- written by make reliability -->", "<!-- to here -->"


@dataclass(frozen=True)
class Promise:
    """tests: files in tests/, or file::test."""

    what: str
    how: str
    tests: tuple[str, ...]


PROMISES = [
    Promise(
        "A rewrite happens completely or not at all; where a write began and failed, you are told so",
        "every allocation, thread start, backend call and status on the way fails, one after the other; the cache is "
        "then compared bit for bit",
        (
            "test_fault.py",
            "test_extension.py::test_out_of_memory_is_never_reported_as_nothing_written",
            "test_extension.py::test_nan_in_the_cache_is_refused_before_the_write",
            "test_extension.py::test_an_edit_that_would_overflow_the_cache_is_refused",
        ),
    ),
    Promise(
        "No sequence sees or changes another one's cache",
        "all that a call has no business with is filled with NaN, infinities or huge numbers; results keep their bits",
        ("test_isolation.py", "test_parity.py::test_sequences_do_not_see_each_other"),
    ),
    Promise(
        "An edit that is not finite, too large for its dtype or above your limit is never written",
        "Processors that explode, values at the ends of every dtype, NaN in every input",
        ("test_robustness.py", "test_extension.py::test_what_is_not_finite_is_refused_without_a_report_too"),
    ),
    Promise(
        "Wrong arguments are refused before anything is written",
        "every argument wrong in every way we could think of; shapes, strides, tables and overlaps",
        ("test_extension.py", "test_transformers_refusals.py", "test_capture.py::test_refusals_write_nothing"),
    ),
    Promise(
        "The bits do not depend on threads, forks, interpreters or the host's floating-point mode",
        "any number of threads, of ours and of OpenMP; forked children; several interpreters; flushed subnormals",
        (
            "test_threads.py",
            "test_processes.py",
            "test_extension.py::test_results_do_not_depend_on_threads",
            "test_extension.py::test_results_do_not_depend_on_flushed_subnormals",
            "test_extension.py::test_shared_processor_many_threads",
        ),
    ),
    Promise(
        "Steps end where they should, and queries are those of the positions rewritten, whatever came before",
        "random histories of generations, cancellations and kept caches against a plain model of them",
        ("test_histories.py", "test_transformers_histories.py", "test_boundary.py"),
    ),
    Promise(
        "In vLLM preemption, cancellation and recomputation lose nothing and mix nothing up",
        "random histories with the scheduler's and the worker's half, every block poisoned that is nobody's",
        ("test_vllm_scheduler.py", "test_vllm_worker.py"),
    ),
    Promise(
        "A rank that fails leaves no other waiting, nor with a cache of its own",
        "two processes, one of which fails at every place of a rewrite",
        ("test_vllm_ranks.py",),
    ),
    Promise(
        "A failed rewrite in vLLM ends its own requests, not the server",
        "real engines and a real server, with clients that leave",
        (
            "vllm/test_engine.py::test_a_failed_write_ends_its_requests_alone",
            "vllm/test_engine.py::test_what_cannot_be_written_is_not",
            "vllm/test_server.py::test_streams_and_clients_that_leave",
            "vllm/test_load.py",
        ),
    ),
    Promise(
        "A directory of a stranger runs no code, leads nowhere else and allocates nothing that it does not hold",
        "headers and configurations that lie; pickles, links, kernels and code in the directory; 64 MiB to spare",
        ("test_untrusted.py",),
    ),
    Promise(
        "What is installed to build and test this is what was written down, and so is the wheel",
        "a hash for every file of every dependency; two builds, in two places, compared byte by byte",
        ("test_requirements.py", "test_packaging.py::test_the_wheel_is_the_same_bytes_elsewhere"),
    ),
    Promise(
        "A crash while saving leaves the old checkpoint or the new one",
        "the machine stops after every change of the disk, with half of the next one done or nothing",
        (
            "test_checkpoint.py::test_a_crash_leaves_the_old_checkpoint_or_the_new_one",
            "test_checkpoint.py::test_a_crash_of_the_first_save_leaves_no_checkpoint",
            "test_checkpoint.py::test_a_disk_that_refuses_leaves_the_old_checkpoint",
            "test_checkpoint.py::test_everything_is_on_the_disk_before_it_gets_its_name",
        ),
    ),
    Promise(
        "A training run that was interrupted goes on with the same bits, or says why not",
        "signals, full disks, damaged checkpoints, other data",
        (
            "test_trainer.py::test_a_resumed_run_is_the_uninterrupted_one",
            "test_trainer.py::test_signals_save_first",
            "test_trainer.py::test_a_full_disk_leaves_the_earlier_checkpoint",
            "test_trainer.py::test_another_run_is_not_resumed",
            "test_trainer.py::test_damaged_or_missing_checkpoints_are_named",
        ),
    ),
]

# Targets of the Makefile, and what they look for.
TARGETS = {
    "asan": "memory errors and undefined behaviour in C, with the tests of the extension",
    "tsan": "data races, in C and from Python",
    "valgrind": "every byte that a call reads or writes without being allowed to, and leaks",
    "fuzz": "crashes on inputs that nobody thought of",
    "soak": "memory and descriptors that grow, results that drift",
    "mutants": "whether the tests notice mistakes put into the code on purpose",
}


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo)), "unknown processor")
    return f"{model}, {os.cpu_count()} cores"


def note(part: str, values: dict[str, Any], date: datetime.date | None = None) -> None:
    """date: of the run, where that is not today."""
    NOTES.mkdir(parents=True, exist_ok=True)
    about = {"date": (date or datetime.date.today()).isoformat(), "machine": machine()}
    (NOTES / f"{part}.json").write_text(json.dumps(about | values, indent=1))


def noted(part: str) -> dict[str, Any]:
    file = NOTES / f"{part}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def run_tests(part: str, latest: bool = False) -> None:
    """Notes [cases, failures, skipped] of every test function that a promise names, or of all that `make` has run."""
    report = NOTES / f"{part}.xml"
    if (began := beginning(report)) is not None and (latest or began > last_change()):
        print(f"{part}: what make has run, from {began:%Y-%m-%d %H:%M} on", flush=True)
        note(part, {"results": read_report(report)}, began.date())
        return
    with_vllm = part == "vllm"
    tests = {test for promise in PROMISES for test in promise.tests if test.startswith("vllm/") == with_vllm}
    NOTES.mkdir(parents=True, exist_ok=True)
    python = ROOT / ".venv-vllm" / "bin" / "python" if with_vllm else sys.executable
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={NOTES / 'some.xml'}", "-o", "junit_family=xunit1"]
    command += ["--override-ini", "addopts=-ra --strict-markers"]
    (NOTES / "some.xml").unlink(missing_ok=True)
    if with_vllm:
        subprocess.run(["make", "install-vllm"], cwd=ROOT, check=True)
    subprocess.run([*command, *sorted(f"tests/{test}" for test in tests)], cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""})
    note(part, {"results": read_report(NOTES / "some.xml")})


def beginning(report: Path) -> datetime.datetime | None:
    """When the run began that wrote a junit file; None where there is no such file."""
    if not report.exists():
        return None
    suite = next(ElementTree.parse(report).iter("testsuite"))
    return datetime.datetime.fromisoformat(suite.attrib["timestamp"]).astimezone()


def last_change(root: Path = ROOT) -> datetime.datetime:
    """Of anything that tests could depend on."""
    folders = [root / name for name in ("csrc", "kernels", "bottleneck_ext", "python", "tests", "requirements")]
    sources = (".py", ".pyi", ".c", ".h", ".cu", ".cuh", ".cpp", ".sh", ".txt")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in sources]
    return datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in files)).astimezone()


def read_report(report: Path) -> dict[str, list[int]]:
    """Of a junit file: [cases, failures, skipped] by file::test; a class of tests counts as its own name."""
    results: dict[str, list[int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        parts = case.attrib["classname"].removeprefix("tests.").split(".")
        at = max(i for i, part in enumerate(parts) if part.startswith("test_"))
        name = parts[at + 1] if len(parts) > at + 1 else case.attrib["name"].partition("[")[0]
        counts = results.setdefault(f"{'/'.join(parts[: at + 1])}.py::{name}", [0, 0, 0])
        counts[0] += 1
        counts[1] += case.find("failure") is not None or case.find("error") is not None
        counts[2] += case.find("skipped") is not None
    return results


def run_target(target: str) -> None:
    print(f"make {target}", flush=True)
    done = subprocess.run(["make", target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip() and not line.startswith("make[")]
    summary = [line for line in lines if line.startswith(f"make {target}:")] or lines or ["no output"]
    if done.returncode:
        print(done.stdout[-3000:])
    note(target, {"line": summary[-1], "failed": done.returncode != 0})


def counts_of(promise: Promise) -> list[int]:
    """[cases, failures, skipped] of all its tests; a test that two of them name counts once."""
    total = [0, 0, 0]
    for test, counts in (noted("tests").get("results", {}) | noted("vllm").get("results", {})).items():
        if any(test == wanted or test.startswith(f"{wanted}::") for wanted in promise.tests):
            total = [a + b for a, b in zip(total, counts, strict=True)]
    return total


def tables() -> str:
    rows = ["| promise | how it is tested | cases | failures |", "|---|---|---|---|"]
    for promise in PROMISES:
        cases, failures, skipped = counts_of(promise)
        shown = f"{cases - skipped}" + (f" ({skipped} skipped)" if skipped else "") if cases else "not run"
        rows.append(f"| {promise.what} | {promise.how} | {shown} | {failures if cases else ''} |")
    rows += ["", "| run | looks for | date | machine | what it said |", "|---|---|---|---|---|"]
    for part, looks_for in {"tests": "the table above", "vllm": "its rows about engines", **TARGETS}.items():
        found = noted(part)
        said = found.get("line", "")
        if "results" in found:
            totals = [sum(counts[i] for counts in found["results"].values()) for i in range(3)]
            said = f"{totals[0] - totals[2]} cases, {totals[1]} failed, {totals[2]} skipped"
        name = {"tests": "make test", "vllm": "make test-vllm"}.get(part, f"make {part}")
        said = ("FAILED: " if found.get("failed") else "") + said.replace("|", "/")
        rows.append(
            f"| `{name}` | {looks_for} | {found.get('date', 'not run')} | {found.get('machine', '')} | {said} |"
        )
    return "\n".join(rows)


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    latest, parts = "--latest" in sys.argv, [part for part in sys.argv[1:] if part != "--latest"]
    if unknown := set(parts) - {"tests", "vllm", *TARGETS}:
        sys.exit(f"unknown parts: {', '.join(sorted(unknown))}; there are tests, vllm, {', '.join(TARGETS)}")
    for part in parts:
        if part in TARGETS:
            run_target(part)
        else:
            run_tests(part, latest)
    write_page()


if __name__ == "__main__":
    main()
