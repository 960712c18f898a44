"""Thirty mistakes of the kind people make, each put into a copy of the tree: the tests must find them.

`python -m tests.mutants [words]` (make mutants) tries those whose file or description holds all words, one after the
other, and prints what became of each. Only what a mutant changes is compiled again, without CUDA, and only the tests
that it names are run. Exit status 1 where fewer than BAR of the thirty are found, or, of a choice, where one is not.

The kernels of the CUDA backend have mutants of their own: tests/emulation/mutants.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "mutants"
COPIED = ("bottleneck_ext", "csrc", "kernels", "python", "tests", "pyproject.toml", "README.md", "setup.py")
BAR = 28
TIMEOUT = 600  # seconds for the tests of one mutant: several make a thread or a process wait for ever


@dataclass(frozen=True)
class Mutant:
    """An edit of one file: new takes the place of old, which occurs once, spaces and line ends apart.

    tests: what must find it, as pytest takes it.
    """

    file: str
    what: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    def applied_to(self, root: Path) -> str:
        """The file's text with the mistake. ValueError where the place is not there, or not the only one."""
        text = (root / self.file).read_text(encoding="utf-8")
        pattern = re.compile(r"\s+".join(re.escape(word) for word in self.old.split()))
        found = len(pattern.findall(text))
        if found != 1:
            raise ValueError(f"{self}: its text is found {found} times; bring tests/mutants.py up")
        return pattern.sub(lambda _: self.new, text)


CORE, EXTENSION = "tests/test_extension.py", "tests/test_extension.py"
SCHEDULER, WORKER = "tests/test_vllm_scheduler.py", "tests/test_vllm_worker.py"
VLLM = "python/bottlenecked/integrations/vllm"

MUTANTS = [
    # ---- the C core
    Mutant(
        "csrc/boundary.c",
        "a step may end one block behind the table",
        "if ((step->step_end - 1) / plan->block_size >= max_blocks)",
        "if ((step->step_end - 1) / plan->block_size > max_blocks)",
        CORE,
    ),
    Mutant(
        "csrc/boundary.c",
        "left padding is recalled",
        "planned->num_prior = planned->window_begin - step->sequence_begin;",
        "planned->num_prior = planned->window_begin;",
        "tests/test_isolation.py tests/test_parity.py -k padding",
    ),
    Mutant(
        "csrc/boundary.c",
        "two sequences may share query pages",
        "for_writing ? owners + num_blocks : NULL};",
        "NULL};",
        CORE,
    ),
    Mutant(
        "csrc/kv_cache.c",
        "two layers may be the same memory",
        "for (int32_t b = 0; b < a; b++) {",
        "for (int32_t b = a / 2 * 2; b < a; b++) {",
        CORE,
    ),
    Mutant(
        "csrc/processor.c",
        "infinite weights are taken",
        'if (!isfinite(value))\n return btx_fail(error, BTX_INVALID_ARGUMENT, "tensor',
        'if (isnan(value))\n return btx_fail(error, BTX_INVALID_ARGUMENT, "tensor',
        CORE,
    ),
    Mutant(
        "csrc/processor.c",
        "the limit of an edit is that of the first layer",
        "i < plan->num_layers * plan->num_steps; i += plan->num_steps) { if (!btx_edit_is_within",
        "i < plan->num_steps; i += plan->num_steps) { if (!btx_edit_is_within",
        "tests/test_robustness.py -k layer",
    ),
    Mutant(
        "csrc/processor.c",
        "shared memory has room for the first user alone",
        "*bytes = other > *bytes ? other : *bytes; return 1;",
        "return 1;",
        "tests/test_parity.py -k wide",
    ),
    # ---- the kernels
    Mutant(
        "kernels/cpu/top_k.c",
        "NaN is the largest mass",
        "if (magnitude == 0 || magnitude > 0x7f800000u)",
        "if (magnitude == 0)",
        "tests/test_extension.py tests/test_simd.py -k top_k",
    ),
    Mutant(
        "kernels/cpu/stage_kv.c",
        "float16 ends at 65536",
        "dtype == BTX_F16 ? 65520.0f",
        "dtype == BTX_F16 ? 65536.0f",
        "tests/test_extension.py -k rounds_to",
    ),
    Mutant(
        "kernels/cpu/stage_kv.c",
        "values may overflow where keys do not",
        "peak = value_peak > peak ? value_peak : peak;",
        "",
        "tests/test_extension.py tests/test_robustness.py -k 'overflow or any_size'",
    ),
    Mutant(
        "kernels/cpu/write_kv.c",
        "what follows a skipped step gets the skipped one's values",
        "values += num_rows * row_bytes; continue;",
        "continue;",
        "tests/test_robustness.py -k limit",
    ),
    Mutant(
        "kernels/cpu/attention.c",
        "a key behind the last one counts",
        "vf_add(total, num_keys - j < BTX_VL ? vf_load_n(scores + j, (int)(num_keys - j)) : value)",
        "vf_add(total, value)",
        "tests/test_parity.py -k 'named and long'",
    ),
    Mutant(
        "kernels/cpu/attention.c",
        "the output of earlier blocks of keys is not scaled",
        "if (!first_block && factor != 1.0f)",
        "if (first_block && factor != 1.0f)",
        "tests/test_parity.py -k 'named and long'",
    ),
    Mutant(
        "kernels/cpu/attention_mass.c",
        "a query sees the token behind it",
        "? (first_key + key) * group_size - block->first_row : lanes;",
        "? (first_key + key - 1) * group_size - block->first_row : lanes;",
        "tests/test_parity.py -k 'mass or long'",
    ),
    Mutant(
        "kernels/cpu/scores.h",
        "the queries of another KV head",
        "kv_head * group_size * queries->stride[2];",
        "kv_head * queries->stride[2];",
        "tests/test_parity.py -k 'mass or long'",
    ),
    Mutant(
        "kernels/cpu/executor.c",
        "threads flush subnormal numbers where their host does",
        "uint64_t seen = 0; fesetenv(FE_DFL_ENV);",
        "uint64_t seen = 0;",
        "tests/test_threads.py -k subnormal",
    ),
    Mutant(
        "kernels/cpu/executor.c",
        "a forked child waits for its parent's threads",
        "if (run->pid != getpid()) { run->pid = getpid();",
        "if (run->pid == 0) { run->pid = getpid();",
        "tests/test_threads.py -k 'fork and inherited'",
    ),
    Mutant(
        "kernels/cpu/capture_queries.c",
        "queries are written before all slots are checked",
        "for (int pass = 0; pass < 2; pass++) {",
        "for (int pass = 1; pass < 2; pass++) {",
        "tests/test_capture.py",
    ),
    # ---- the extension
    Mutant(
        "csrc/py_types.c",
        "strides may change after binding",
        "if (a->shape[d] != b->shape[d] || (a->shape[d] > 1 && a->stride[d] != b->stride[d]))",
        "if (a->shape[d] != b->shape[d])",
        EXTENSION,
    ),
    Mutant(
        "csrc/py_dlpack.c",
        "a copy is taken for the tensor",
        "if ((managed->flags & DL_FLAG_IS_COPIED) != 0)",
        "if ((managed->flags & DL_FLAG_IS_COPIED) != 0 && 0)",
        EXTENSION,
    ),
    # ---- boundaries and checkpoints
    Mutant(
        "python/bottlenecked/boundary.py",
        "a row's first possible boundary is passed over",
        "self._too_short = self._min_step_length - 1 - longest",
        "self._too_short = self._min_step_length - longest",
        "tests/test_boundary.py",
    ),
    Mutant(
        "python/bottlenecked/boundary.py",
        "rows that have ended go on",
        "for row in self._rows.values(): if not row.finished: row.length += self._counted",
        "for row in self._rows.values():\n                row.length += self._counted",
        "tests/test_boundary.py",
    ),
    Mutant(
        "python/bottlenecked/checkpoint.py",
        "a new configuration before its weights",
        "if not new_weights.exists() and new_config.exists():",
        "if new_config.exists():",
        "tests/test_checkpoint.py",
    ),
    # ---- transformers
    Mutant(
        "python/bottlenecked/integrations/transformers.py",
        "a prompt longer than the window leaves its queries in the wrong rows",
        "rows = (slot + torch.arange(tokens - count, tokens, device=query.device)) % window",
        "rows = (slot + torch.arange(count, device=query.device)) % window",
        "tests/test_transformers.py",
    ),
    Mutant(
        "python/bottlenecked/integrations/transformers.py",
        "a cache is used again after a rewrite of it has failed",
        "report = bound.rewrite(events, report=self._on_boundary is not None) except BaseException: "
        "self._forget(cache) raise",
        "report = bound.rewrite(events, report=self._on_boundary is not None)\n"
        "        except BaseException:\n            raise",
        "tests/test_fault.py -k generate",
    ),
    # ---- vLLM
    Mutant(
        f"{VLLM}/scheduler.py",
        "an aborted request keeps its query row",
        "if tracked.row >= 0: self._free_rows.append(tracked.row) tracked.row = -1",
        "tracked.row = -1",
        SCHEDULER,
    ),
    Mutant(
        f"{VLLM}/worker.py",
        "a block that changes hands loses its page",
        "changes = dict.fromkeys(plan.unmap, -1) | dict(plan.map)",
        "changes = dict(plan.map) | dict.fromkeys(plan.unmap, -1)",
        f"{WORKER} -k block",
    ),
    Mutant(
        f"{VLLM}/worker.py",
        "the last block of a preempted request is not saved where it is not full",
        "used = -(-transfer.length // self.keys[0].shape[1])",
        "used = transfer.length // self.keys[0].shape[1]",
        f"{WORKER} -k block",
    ),
    Mutant(
        f"{VLLM}/prompts.py",
        "a block of a prompt is known by its own tokens alone",
        "key = hashlib.blake2b(key + block, digest_size=16).digest()",
        "key = hashlib.blake2b(block, digest_size=16).digest()",
        "tests/test_vllm_prompts.py",
    ),
    # ---- training
    Mutant(
        "python/bottlenecked/training/trainer.py",
        "a resumed run draws other random numbers",
        'torch.set_rng_state(tensors["random"].cpu())',
        "pass",
        "tests/test_trainer.py -k 'is_the_uninterrupted_one and random'",
    ),
]


def compiler() -> list[str]:
    """As in setup.py, with less optimisation: all that is looked at is what the code does."""
    return [
        *shlex.split(os.environ.get("CC", "cc")),
        *("-std=c11", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-c"),
        *("-DPy_LIMITED_API=0x030B0000", "-D_GNU_SOURCE", "-Icsrc", f"-I{sysconfig.get_path('include')}"),
    ]


def build() -> None:
    """The extension in TREE; what depends on no changed file is kept. The variants include all kernels."""
    sources = [path.relative_to(TREE) for path in sorted(TREE.glob("csrc/*.c"))]
    variants = [path.relative_to(TREE) for path in sorted(TREE.glob("kernels/cpu/variant_*.c"))]
    headers = max(path.stat().st_mtime for path in TREE.glob("csrc/*.h"))
    kernels = max(path.stat().st_mtime for path in TREE.glob("kernels/cpu/*"))

    def compile_one(source: Path) -> str:
        target = TREE / "objects" / f"{source.stem}.o"
        newest = max(headers, kernels if source in variants else (TREE / source).stat().st_mtime)
        if not target.exists() or target.stat().st_mtime <= newest:
            subprocess.run([*compiler(), str(source), "-o", str(target)], cwd=TREE, check=True)
        return str(target)

    (TREE / "objects").mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*variants, Path("kernels/cpu/executor.c"), *sources]))
    link = [*shlex.split(os.environ.get("CC", "cc")), "-shared", *objects, "-o", "bottleneck_ext/_core.abi3.so"]
    subprocess.run([*link, "-pthread", "-lm", "-ldl"], cwd=TREE, check=True)


def copy() -> None:
    """A tree of its own, so that the user's stays as it is. What was compiled of the same text is kept."""
    for name in COPIED:
        source, target = ROOT / name, TREE / name
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        for file in files:
            if "__pycache__" not in file.parts and file.suffix != ".so":
                copy_changed(file, target / file.relative_to(source))


def copy_changed(source: Path, target: Path) -> None:
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def run_tests(tests: str) -> str:
    """The name of a test that failed, or how all ended; "" where none failed."""
    environment = {**os.environ, "PYTHONPATH": f"{TREE / 'python'}{os.pathsep}{TREE}", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *shlex.split(tests)]
    process = subprocess.Popen(
        command, cwd=TREE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        said = process.communicate(timeout=TIMEOUT)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "does not end"
    if process.returncode == 0:
        return ""
    failed = [line for line in said.splitlines() if line.startswith(("FAILED tests/", "ERROR tests/"))]
    if process.returncode not in (1, 2) and not failed and process.returncode > 0:
        raise RuntimeError(f"{shlex.join(command)} found no tests:\n{said[-2000:]}")
    return failed[0].partition(" ")[2].partition(" - ")[0] if failed else f"ended with {process.returncode}"


def judge(mutant: Mutant) -> str:
    """How the mutant was found, or "" where it was not."""
    place = TREE / mutant.file
    text, mistaken = place.read_text(encoding="utf-8"), mutant.applied_to(TREE)
    place.write_text(mistaken, encoding="utf-8")
    try:
        if mutant.file.endswith((".c", ".h")):
            build()
        return run_tests(mutant.tests)
    finally:
        place.write_text(text, encoding="utf-8")


def main() -> None:
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if all(word in str(mutant) for word in words)]
    for mutant in chosen:
        mutant.applied_to(ROOT)
    copy()
    build()
    found, without = 0, set()
    for mutant in chosen:
        begin = time.monotonic()
        how = judge(mutant)
        found += bool(how)
        without.add(shlex.quote(how) if "::" in how else mutant.tests if how else "")
        print(f"{mutant}\n    {how or 'NOT FOUND'} ({time.monotonic() - begin:.0f} s)", flush=True)
    build()
    for tests in [
        " ".join(test for test in without if "::" in test),
        *(tests for tests in without if "::" not in tests),
    ]:
        if tests and (how := run_tests(tests)):
            sys.exit(f"make mutants: without any mistake this fails too, and so says nothing: {how}")
    print(f"make mutants: {len(chosen)} mutants, {found} found")
    sys.exit(found < (BAR if len(chosen) == len(MUTANTS) else len(chosen)))


if __name__ == "__main__":
    main()
