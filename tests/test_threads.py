"""Whose threads a workspace computes on, and what a forked child does without them. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMMON = """
import os, sys
import numpy as np
import torch
from tests.cases import Shape, make_case
from tests.forked import in_child

def num_threads():
    return len(os.listdir("/proc/self/task"))

def compute_in_parallel():
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)

def bind(num_threads=2):
    case = make_case(Shape(lengths=((0, 90, 20), (0, 70, 9)), num_layers=6))
    processor = case.processor()
    bound = processor.bind(case.keys, case.values, case.queries, workspace=processor.workspace(num_threads),
                           query_table=case.query_table)
    return case, bound

def rewrite(case, bound):
    bound.rewrite(case.events, case.block_table)
    return [pool.nan_to_num().view(torch.int32).tolist() for pool in case.pools]

expected = rewrite(*bind(num_threads=1))
"""


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + script],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's would be taken for threads of the host's OpenMP
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")


def test_the_hosts_threads_are_used() -> None:
    """torch brings an OpenMP runtime whose threads are there already: no further ones are started."""
    script = """
compute_in_parallel()
case, bound = bind()
before = num_threads()
assert before > 1, "torch has started no threads"
assert rewrite(case, bound) == expected
print(num_threads() - before)
"""
    assert run(script) == "0\n"


def test_threads_of_our_own_where_the_host_has_none_running() -> None:
    script = """
case, bound = bind(num_threads=3)
before = num_threads()
assert before == 1
assert rewrite(case, bound) == expected
print(num_threads() - before)
"""
    assert run(script) == "2\n"


@pytest.mark.parametrize("host", ["compute_in_parallel()", "pass"])
def test_no_thread_flushes_subnormal_numbers(host: str) -> None:
    """Threads take over the floating-point mode of who starts them: here of a host that flushes edits of 1e-39."""
    script = f"""
def bind_tiny(num_threads):
    case = make_case(Shape(lengths=((0, 40, 20),), num_layers=32, random_scale=1e-39))
    for view in (*case.keys, *case.values):
        view[view.isfinite()] = 0.0
    for name, weight in case.weights.items():
        if name.endswith("out_proj.bias"):
            weight[...] = 0
    processor = case.processor()
    return case, processor.bind(case.keys, case.values, case.queries, workspace=processor.workspace(num_threads),
                                query_table=case.query_table)

right = rewrite(*bind_tiny(1))
assert any(0 < abs(bits) < 1 << 23 for pool in right for bits in np.ravel(pool)), "no edit is subnormal"
flushed = [bind_tiny(3) for _ in range(8)]
assert torch.set_flush_denormal(True)
{host}
for case, bound in flushed:
    bound.rewrite(case.events, case.block_table)
torch.set_flush_denormal(False)
assert all([pool.nan_to_num().view(torch.int32).tolist() for pool in case.pools] == right for case, _ in flushed)
"""
    run(script)


@pytest.mark.parametrize("host", ["compute_in_parallel()", "pass"])
@pytest.mark.parametrize("workspace", ["inherited", "new"])
@pytest.mark.parametrize("others", ["another thread", ""])
def test_a_forked_child(host: str, workspace: str, others: str) -> None:
    """It has none of the threads of either kind, but all of the memory that speaks of them; threads of its own tell
    nothing about those."""
    script = f"""
import threading

{host}
used = bind()
assert rewrite(*used) == expected
inherited = bind()
inherited[1].workspace = used[1].workspace

def child():
    if {others!r}:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return rewrite(*(inherited if {workspace!r} == "inherited" else bind())) == expected

assert in_child(child)
assert rewrite(*inherited) == expected
"""
    run(script)
