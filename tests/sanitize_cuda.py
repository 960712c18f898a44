"""A few small boundaries and query captures on a GPU: `compute-sanitizer python3 -m tests.sanitize_cuda`.

Every kernel and both of its ends: head sizes of the fast and the general paths, paged, contiguous and strided caches,
all dtypes, tails, no prior, more recalled than there is. Each tensor is an allocation of its own (the caller sets
PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a step beyond it is seen. What comes out is compared with the CPU backend,
loosely: test_cuda.py does that well.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch

import bottleneck_ext

from .cases import Capture, CaptureShape, Case, Shape, make_capture, make_case

BASE = Shape(((0, 150, 30), (5, 70, 9)), num_kv_heads=2, group=4, head_dim=64, top_k=8, recent_window=16)
CASES = {
    "paged": replace(BASE, block_size=16, page_size=16, dtype="bfloat16"),
    "contiguous": replace(BASE, layout="hnd", dtype="float16", head_dim=128, group=2),
    "strided, odd": replace(BASE, layout="strided", head_dim=7, group=3, num_kv_heads=3, processor_dim=24),
    "packed, unrotated": replace(BASE, layout="packed", head_dim=96, key_space="unrotated", dtype="bfloat16"),
    "column major": replace(BASE, layout="column_major", head_dim=20, group=7, block_size=5, dtype="bfloat16"),
    "head_dim 256": replace(BASE, lengths=((0, 70, 17),), head_dim=256, group=1, dtype="bfloat16"),
    "float32": replace(BASE, block_size=3, page_size=7),
    "no prior": replace(BASE, lengths=((0, 5, 5), (9, 1, 1)), dtype="bfloat16"),
    "all recalled": replace(BASE, lengths=((0, 40, 1), (0, 30, 3)), top_k=77, dtype="bfloat16"),
    "long": replace(
        BASE, lengths=((3, 2500, 40),), num_layers=1, top_k=70, recent_window=33, block_size=16, dtype="bfloat16"
    ),
    "wide": replace(
        BASE, lengths=((0, 90, 60),), num_layers=1, processor_dim=256, processor_heads=8, processor_mlp_dim=560,
        top_k=40, recent_window=64, dtype="bfloat16",
    ),
}  # fmt: skip

CAPTURES = {
    "capture, vectors": CaptureShape(40, heads=9, head_dim=64, page_size=16, query_layout="qkv", dtype="bfloat16"),
    "capture, elements": CaptureShape(
        23, heads=3, head_dim=7, layout="strided", query_layout="strided", strided_tables=True, dtype="float32"
    ),
    "capture, columns": CaptureShape(40, heads=5, head_dim=20, layout="column_major", dtype="float16"),
    "capture, no tokens": CaptureShape(0, padding=3, dtype="bfloat16"),
}


def on_device(case: Case, device: str) -> Case:
    """test_cuda.on_device, without what its module imports."""
    pools = [pool.to(device) for pool in case.pools]
    moved = {pool.untyped_storage().data_ptr(): to for pool, to in zip(case.pools, pools, strict=True)}

    def view(tensor: torch.Tensor) -> torch.Tensor:
        pool = moved[tensor.untyped_storage().data_ptr()]
        return pool.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return replace(
        case,
        keys=[view(k) for k in case.keys],
        values=[view(v) for v in case.values],
        queries=[q.to(device) for q in case.queries],
        pools=pools,
    )


def run(name: str, shape: Shape, weight_dtype: str, backend: str, device: str) -> None:
    host = make_case(shape)
    case = on_device(host, device)
    processor = case.processor(backend, weight_dtype)
    workspace = processor.workspace()
    bound = processor.bind(case.keys, case.values, case.queries, workspace=workspace, query_table=case.query_table)
    prior = max(e.window_begin(shape.recent_window) - e.sequence_begin for e in case.events)
    if prior:
        out = torch.zeros(shape.num_layers, len(case.events), prior, device=device)
        bottleneck_ext.attention_mass(
            bound.kv_cache,
            bound.query_cache,
            [(e.sequence, e.sequence_begin, e.step_begin, e.step_end) for e in case.events],
            case.block_table,
            out=out if device != "cpu" else out.numpy(),
            workspace=workspace,
            recent_window=shape.recent_window,
        )
    report = bound.rewrite(case.events, case.block_table)
    expected = host.rewrite(host.processor("cpu", weight_dtype))
    for ours, theirs in zip(case.pools, host.pools, strict=True):
        a, b = ours.cpu().double().nan_to_num().numpy(), theirs.double().nan_to_num().numpy()
        same = np.abs(a - b) <= 0.05 * (1 + np.abs(b))
        if same.mean() < 0.99:  # a near tie selects another row
            raise SystemExit(f"{name}, {weight_dtype}: {(~same).mean():.1%} of the cache differ from the CPU backend's")
    assert len(report.recalled) == len(expected.recalled)
    if device != "cpu":  # once more, without a report
        bound.rewrite(case.events, case.block_table, report=False)
        workspace.synchronize()
    print(f"{name}, {weight_dtype}: done", flush=True)


def captured(shape: CaptureShape, backend: str, device: str) -> Capture:
    case = make_capture(shape).to(device)
    cache, workspace = bottleneck_ext.QueryCache(case.pages), bottleneck_ext.Workspace(1, backend)
    for layer, query in enumerate(case.queries):
        cache.capture(layer, query, case.slots, case.block_to_page, workspace=workspace)
    return case


def run_capture(name: str, shape: CaptureShape, backend: str, device: str) -> None:
    """Also with slots and pages that do not exist, which must do nothing; the CPU backend refuses them."""
    ours, theirs = captured(shape, backend, device), captured(shape, "cpu", "cpu")
    if not ours.same_bytes(theirs):
        raise SystemExit(f"{name}: other bytes than the CPU backend's")
    if device != "cpu":
        captured(replace(shape, missing=True), backend, device)
    print(f"{name}: done", flush=True)


def main(arguments: list[str]) -> int:
    """arguments: names of cases; none: all. "cpu" among them: on the CPU, to try this out."""
    backend, device = ("cpu", "cpu") if "cpu" in arguments else ("cuda", "cuda:0")
    for name in [name for name in arguments if name != "cpu"] or [*CAPTURES, *CASES]:
        if name in CAPTURES:
            run_capture(name, CAPTURES[name], backend, device)
            continue
        for weight_dtype in ("bfloat16", "float32") if name in ("paged", "wide", "float32") else ("bfloat16",):
            run(name, CASES[name], weight_dtype, backend, device)
    print("all done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
