"""Whose threads a workspace computes on, and what a forked child does without them. Each in a process of its own."""

from __future__ import annotations

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
assert rewrite(case, bound) == expected
print(num_threads() - before)
"""
    assert run(script) == "2\n"


@pytest.mark.parametrize("host", ["compute_in_parallel()", "pass"])
@pytest.mark.parametrize("workspace", ["inherited", "new"])
def test_a_forked_child(host: str, workspace: str) -> None:
    """It has none of the threads of either kind, but all of the memory that speaks of them."""
    script = f"""
{host}
used = bind()
assert rewrite(*used) == expected
inherited = bind()
inherited[1].workspace = used[1].workspace
assert in_child(lambda: rewrite(*(inherited if {workspace!r} == "inherited" else bind())) == expected)
assert rewrite(*inherited) == expected
"""
    run(script)
