"""What becomes of the caches, and of memory, when something fails: tests/fault.c, under sanitizers, and the extension.

`tests/emulation/parity.py` does the same with every call of the CUDA runtime, `tests/device.c` with a device of its own
memory.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import bottleneck_ext
from bottleneck_ext import DeviceError, InvalidArgumentError, RebuildNeededError
from bottlenecked import BoundCache
from bottlenecked.integrations.transformers import attach

from . import tiny
from .plain_case import RECENT_WINDOW, PlainCase, make_plain_case
from .test_simd import CORE, ROOT, Machine

EXECUTOR, SCALAR = ROOT / "kernels" / "cpu" / "executor.c", ROOT / "kernels" / "cpu" / "variant_scalar.c"

# All of these that the core calls go through tests/fault.c, wherever they stand.
WRAPPED = ("malloc", "calloc", "realloc", "posix_memalign", "free", "pthread_create")
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-format-truncation"]


def test_whatever_fails_in_the_core(tmp_path: Path) -> None:
    """Every allocation, every thread, and every call of the backend's table with every status."""
    machine = Machine([os.environ.get("CC", "cc")], [])
    wraps = "-Wl," + ",".join(f"--wrap={name}" for name in WRAPPED)
    output = machine.compile_and_run(tmp_path, *SANITIZERS, "tests/fault.c", *CORE, EXECUTOR, SCALAR, "-ldl", wraps)
    assert output.splitlines()[-1] == "0 failed"
    told = re.match(
        r"(\d+) allocations and threads failed, (\d+) calls of the backend did, (\d+) of them while", output
    )
    assert told is not None, output
    allocations, calls, rebuilds = map(int, told.groups())
    assert allocations >= 150
    assert calls >= 2000
    assert 0 < rebuilds < calls / 2


def test_nothing_allocates_by_another_name() -> None:
    """What fault.c cannot make fail, the core must not use."""
    others = re.compile(
        r"\b(strdup|strndup|asprintf|vasprintf|aligned_alloc|memalign|valloc|reallocarray|getline|mmap)\("
    )
    for path in (*CORE, *ROOT.glob("kernels/cpu/*.[ch]"), *ROOT.glob("csrc/*.h")):
        assert others.search(path.read_text()) is None, path


# ---- the extension ---------------------------------------------------------------------------------------------------


def surface(case: PlainCase, native: Any, steps: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """One call of everything that the extension has; each makes what it needs anew, or uses what lasts."""
    ext = bottleneck_ext
    workspace = ext.Workspace()
    cache, queries = ext.KVCache(case.keys, case.values), ext.QueryCache(case.queries)
    layers, sequences, top_k = case.config.num_layers, len(steps), case.config.top_k
    longest = max(step[3] for step in steps)
    mass = np.zeros((layers, sequences, longest), np.float32)
    exact = mass[:, :, : max(s[3] - min(s[3] - s[2], RECENT_WINDOW) for s in steps)]
    outputs: dict[str, Any] = {
        "recalled": np.zeros((layers, sequences, top_k), np.int64),
        "delta_norm": np.zeros((layers, sequences), np.float32),
        "row_norm": np.zeros((layers, sequences), np.float32),
        "skipped": np.zeros(sequences, np.int32),
    }
    names = "num_layers num_kv_heads num_query_heads head_dim processor_dim processor_heads processor_mlp_dim"
    settings = {name: getattr(case.config, name) for name in [*names.split(), "top_k", "recent_window", "norm_eps"]}
    settings["rope_inv_freq"] = [1.0] * (case.config.head_dim // 2)
    weight, bias = np.ones((2, 3, 5), np.float32), np.ones((2, 3), np.float32)
    linear = ext.Linear(weight, bias)
    x, out = np.ones((2, 4, 5), np.float32), np.zeros((2, 4, 3), np.float32)
    lengths, best = np.full(3, 7, np.int64), np.zeros((3, 4), np.int64)
    row = np.ones((3, 9), np.float32)
    token, slots = case.queries[0][0, 2:3].copy(), np.array([2], np.int64)
    pages = np.zeros(1, np.int32)
    return {
        "KVCache": lambda: ext.KVCache(case.keys, case.values).dtype,
        "QueryCache": lambda: ext.QueryCache(case.queries, np.zeros((1, 1), np.int32)).num_pages,
        "capture": lambda: queries.capture(0, token, slots, pages, workspace=workspace),
        "Workspace": lambda: (ext.Workspace(2, "cpu", reserve=4096).backend, workspace.nbytes),
        "synchronize": workspace.synchronize,
        "Processor": lambda: ext.Processor(settings, case.weights).backend,
        "workspace_bytes": lambda: native.workspace_bytes(2, 3, 100, cache_dtype="bfloat16"),
        "rewrite": lambda: native.rewrite(cache, queries, steps, case.block_table, workspace=workspace, **outputs),
        "rewrite without a report": lambda: native.rewrite(
            cache, queries, steps, case.block_table, workspace=workspace, wait=False
        ),
        "attention_mass": lambda: ext.attention_mass(
            cache, queries, steps, case.block_table, out=exact.copy(), workspace=workspace, recent_window=RECENT_WINDOW
        ),
        "select_top_k": lambda: ext.select_top_k(row, lengths, best),
        "Linear": lambda: ext.Linear(weight, bias).nbytes,
        "apply": lambda: linear.apply(x, out, workspace=workspace),
        "backends": ext.backends,
        "default_backend": ext.default_backend,
        "build_info": ext.build_info,
        "what is refused": lambda: refuse(native, cache, queries, workspace),
    }


def refuse(native: Any, cache: Any, queries: Any, workspace: Any) -> None:
    """A message is made of memory, too."""
    try:
        native.rewrite(cache, queries, [(99, 0, 1, 2)], workspace=workspace)
    except InvalidArgumentError:
        return
    raise AssertionError("it was not refused")


def test_every_python_allocation_of_every_call_fails() -> None:
    """MemoryError, or the call succeeded. Never a crash, a write of which nobody knows, or a reference kept."""
    testcapi = pytest.importorskip("_testcapi")
    case = make_plain_case()
    native = case.processor().native
    steps = [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events]
    calls = surface(case, native, steps)
    assert len(calls) >= 17
    kept = [*case.keys, *case.values, *case.queries, case.block_table, *case.weights.values()]
    total = 0
    for name, call in calls.items():
        call()
        references = [sys.getrefcount(thing) for thing in kept]
        seen: set[type[BaseException] | None] = set()
        for n in range(400):
            before, error = case.bytes(), None
            testcapi.set_nomemory(n, n + 1)
            try:
                call()
            except BaseException as raised:
                error = raised.with_traceback(None)
            finally:
                testcapi.remove_mem_hooks()
            written = case.bytes() != before
            kind = None if error is None else type(error)
            seen.add(kind)
            assert kind in (None, MemoryError, RebuildNeededError), (name, n, error)
            assert "rewrite" in name or not written, (name, n)
            assert written or kind is not RebuildNeededError, (name, n)
            assert not (written and kind is MemoryError), (name, n)
            total += kind is not None
            if error is None and n > 150:
                break
        del before, error
        assert None in seen, name
        assert [sys.getrefcount(thing) for thing in kept] == references, name
    assert total > 150


# ---- a write that fails, in transformers (in vLLM: tests/vllm/test_engine.py) ----------------------------------------


@pytest.mark.parametrize("error", [RebuildNeededError, DeviceError, MemoryError])
def test_generate_tells_what_is_lost_and_others_go_on(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that it happened in ends with the error; its cache is of no more use, and all others are."""
    model = tiny.model()
    ids, mask = tiny.prompts((20, 9))
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    calls: list[int] = []
    rewrite = BoundCache.rewrite

    def failing(self: BoundCache, *arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 2 and error is not RebuildNeededError:
            raise error("nothing was written")
        report = rewrite(self, *arguments, **options)
        if len(calls) == 2:
            raise error("it failed while it wrote")
        return report

    with attach(model, tiny.processor()) as attachment:
        expected = model.generate(ids, **settings)
        boundaries = attachment.stats.boundaries
        other = DynamicCache(config=model.config)
        half = model.generate(ids, **{**settings, "max_new_tokens": 8}, past_key_values=other)
        monkeypatch.setattr(BoundCache, "rewrite", failing)
        cache = DynamicCache(config=model.config)
        with pytest.raises(error, match=r"it failed while it wrote|nothing was written"):
            model.generate(ids, **settings, past_key_values=cache)
        assert len(calls) == 2
        longer = torch.cat((ids, ids), dim=1)[:, : cache.get_seq_length() + 1]
        with pytest.raises(InvalidArgumentError, match="whose queries were not captured"):
            model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = torch.cat((mask, mask.new_ones(len(mask), half.shape[1] - mask.shape[1])), dim=1)
        settings |= {"attention_mask": longer, "max_new_tokens": expected.shape[1] - half.shape[1]}
        assert torch.equal(model.generate(half, **settings, past_key_values=other), expected)
        assert attachment.stats.boundaries > boundaries
