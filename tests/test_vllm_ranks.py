"""Tensor parallelism without vLLM: two processes, each with half of the heads, against one with all of them; and what
happens when one of the two fails: the other one must neither wait for ever nor write what its neighbour did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bottlenecked.checkpoint import initial_weights, save_checkpoint

from . import vllm_ranks
from .test_vllm_scheduler import config
from .test_vllm_worker import SHAPE

TIMEOUT = 120  # seconds: a rank that waits for one that has given up waits for ever
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processor")
    made = config(**SHAPE, recent_window=6)
    save_checkpoint(directory, made, initial_weights(made, random_scale=0.5, seed=3))
    return directory


def run(processor: Path, output: Path, world_size: int) -> list[Found]:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-m", "tests.vllm_ranks", str(processor), str(output)]
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            said = rank.communicate(timeout=TIMEOUT)[0].decode()
            assert rank.returncode == 0, said
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
        pytest.fail("a rank waits for ever:\n" + "\n".join(rank.communicate()[0].decode()[-2000:] for rank in ranks))
    return [torch.load(f"{output}.{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def two(processor: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return run(processor, tmp_path_factory.mktemp("two") / "found", 2)


def whole(two: list[Found], case: str, which: str) -> torch.Tensor:
    """[num_layers, num_blocks, block_size, KV heads, head_dim] of both ranks."""
    return torch.cat([rank[case][which] for rank in two], dim=3)


def test_two_ranks_are_one(processor: Path, two: list[Found], tmp_path: Path) -> None:
    (one,) = run(processor, tmp_path / "found", 1)
    for which in ("keys", "values"):
        # The same positions; the mass is summed in another order, and nothing else differs.
        torch.testing.assert_close(whole(two, "nothing", which), one["nothing"][which], rtol=1e-5, atol=1e-6)
    before = vllm_ranks.make_worker(str(processor), 0, 1)
    assert not torch.equal(whole(two, "nothing", "keys"), torch.stack(before.keys))
    assert [rank["nothing"]["boundaries"] for rank in two] == [2, 2]


@pytest.mark.parametrize("case", [case for case in vllm_ranks.CASES if "once" in case])
def test_a_failure_that_passes_costs_nothing(two: list[Found], case: str) -> None:
    """The two steps are then rewritten one after the other, by both ranks."""
    for which in ("keys", "values"):
        assert torch.equal(whole(two, case, which), whole(two, "nothing", which))
    for rank in two:
        assert (rank[case]["boundaries"], rank[case]["skipped"], rank[case]["failed_blocks"]) == (2, {}, [])


@pytest.mark.parametrize("case", [case for case in vllm_ranks.CASES if "always" in case and "write" not in case])
def test_a_failure_of_one_rank_leaves_all_caches_untouched(processor: Path, two: list[Found], case: str) -> None:
    before = vllm_ranks.make_worker(str(processor), 0, 1)
    for which in ("keys", "values"):
        assert torch.equal(whole(two, case, which), torch.stack(getattr(before, which)))
    for rank in two:
        assert (rank[case]["boundaries"], rank[case]["skipped"]) == (0, {"refused": 2})
        assert rank[case]["failed_blocks"] == []
        assert not rank[case]["raised"]


def test_a_write_that_fails_ends_the_requests_on_all_ranks(two: list[Found]) -> None:
    blocks = sorted(block for rewrite in vllm_ranks.REWRITES for block in rewrite.blocks)
    for rank in two:
        found = rank["the write, always"]
        assert (found["skipped"], found["failed_blocks"], found["raised"]) == ({"failed": 2}, blocks, "")


def test_a_mistake_ends_every_rank(two: list[Found]) -> None:
    """An error that is no refusal ends the engine: its worker by its own error, the others by one that points there."""
    assert [rank["a mistake"]["raised"] for rank in two] == ["RuntimeError", "TypeError"]
