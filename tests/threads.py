"""Python threads that share a Processor, each with a workspace of its own, as `make tsan` watches them.

`python -m tests.threads [ROUNDS]`. NumPy alone: its own threads do not compute, and torch's are not watched. Everything
that several threads may do at once happens here at once: rewriting different sequences of one cache, reading the same
sequences, capturing queries to different pages, being refused, making and dropping Processors and workspaces.
"""

from __future__ import annotations

import os
import sys
import threading

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError

from .plain_case import make_plain_case

NUM_THREADS = 4


def expected(round_: int) -> bytes:
    case = make_plain_case(NUM_THREADS, seed=round_)
    case.rewrite(case.bind(case.processor()))
    return case.bytes()


def run_round(round_: int) -> None:
    """Every thread rewrites its sequence of a cache they share; then all rewrite caches of their own."""
    shared, right = make_plain_case(NUM_THREADS, seed=round_), expected(round_)
    processor = shared.processor()
    cache = bottleneck_ext.KVCache(shared.keys, shared.values)
    queries = bottleneck_ext.QueryCache(shared.queries)
    steps = [(e.sequence, 0, e.step_begin, e.step_end) for e in shared.events]
    pages = [np.zeros((NUM_THREADS, 4, 2, 8), np.float32)]
    captured = bottleneck_ext.QueryCache(pages)
    start, written = threading.Barrier(NUM_THREADS), threading.Barrier(NUM_THREADS)
    failures: list[str] = []

    def work(index: int) -> None:
        workspace = bottleneck_ext.Workspace(1 + index % 3)
        start.wait()
        # The same sequences, for reading.
        mass = np.empty((3, NUM_THREADS, 48), np.float32)
        prior = max(max(begin, end - shared.config.recent_window) for _, _, begin, end in steps)
        bottleneck_ext.attention_mass(
            cache, queries, steps, shared.block_table, out=mass[:, :, :prior], workspace=workspace, recent_window=16
        )
        query = np.full((4, 2, 8), index + 1, np.float32)
        slots = np.arange(4 * index, 4 * index + 4)
        captured.capture(0, query, slots, np.arange(NUM_THREADS, dtype=np.int32), workspace=workspace)
        written.wait()  # nobody reads any more
        processor.native.rewrite(cache, queries, steps[index : index + 1], shared.block_table, workspace=workspace)
        for again in range(3):
            own = make_plain_case(NUM_THREADS, seed=round_)
            bound = own.bind(own.processor() if again == 2 else processor, 1 + (index + again) % 3)
            wrong = own.block_table.copy()
            wrong[index, 0] = 1 << 20
            try:
                bound.rewrite(own.events, wrong)
                failures.append(f"thread {index}: a wrong block was not refused")
            except InvalidArgumentError as error:
                if f"block_table[{index}, 0] is {1 << 20}" not in str(error):
                    failures.append(f"thread {index}: {error}")
            own.rewrite(bound)
            if own.bytes() != right:
                failures.append(f"thread {index}: its own cache differs")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if shared.bytes() != right:
        failures.append("the shared cache differs")
    if [page[0, 0, 0] for page in pages[0]] != [1, 2, 3, 4]:
        failures.append("captured queries differ")
    if failures:
        raise SystemExit("\n".join(failures))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    for round_ in range(rounds):
        run_round(round_)
    print(f"{rounds} rounds of {NUM_THREADS} Python threads: no difference ({bottleneck_ext._core.__file__})")


if __name__ == "__main__":
    main()
