"""A few small boundaries and query captures on a GPU: `compute-sanitizer python3 -m tests.sanitize_cuda`.

Every kernel and both of its ends: head sizes of the fast and the general paths, paged, contiguous and strided caches,
all dtypes, tails, no prior, more recalled than there is. Each tensor is an allocation of its own (the caller sets
PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a step beyond it is seen. What comes out is compared with the CPU backend,
loosely: test_cuda.py does that well.

memcheck, racecheck and synccheck run all of it as it is. initcheck cannot: run like that, it reports every read of what
a product wrote, since it seems to miss the bulk stores from shared memory with which cuBLASLt's kernels for sm_90, and
our linear_swiglu_sm90.cu, write their results. So initcheck runs with `--no-library`, where products are those of
linear_general.cu and linear_swiglu.cu, with ordinary stores (BOTTLENECKED_CUDA_PRODUCTS=general; test_cuda.py tests
that path too). Then every report is a mistake of ours. Two kinds of kernels are left unjudged, cuBLASLt's and
swiglu_sm90_kernel; that those write all of their results is what test_cuda.py compares.

The case "control" tells whether that is still needed: a product of torch.matmul's, so cuBLAS's, and an elementwise
kernel that reads it, nothing of ours. While initcheck reports it, initcheck does not see what products write. Where it
is clean on a device with sm_90 kernels, `--no-library` has become unnecessary there. It decides nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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

CONTROL = "control"
ALL = (*CAPTURES, *CASES)


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


def run_control(device: str) -> None:
    """A product of the kind the Processor's are, bf16 to float32 [layers, rows, columns], by PyTorch alone."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, rows, 256, generator=generator).bfloat16() for rows in (100, 512))
    if device == "cpu":
        product = x.float() @ weight.float().mT
    else:
        product = torch.bmm(x.to(device), weight.to(device).mT, out_dtype=torch.float32)
    expected = x.float() @ weight.float().mT + 1
    if not torch.allclose((product + 1).cpu(), expected, rtol=1e-3, atol=1e-2):
        raise SystemExit("control: PyTorch's product is wrong")
    print("control: done", flush=True)


def part_of(names: Sequence[str], part: str) -> list[str]:
    """Of "2/4" every fourth name, from the second on: all parts together are all names, each once."""
    index, _, parts = part.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and 1 <= int(index) <= int(parts)):
        raise SystemExit(f"--part {part}: 1/4 to 4/4, or the like")
    return list(names[int(index) - 1 :: int(parts)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all but control, unless named: {', '.join(ALL)}")
    parser.add_argument("--part", metavar="I/N", help="of the cases, every N-th from the I-th on")
    parser.add_argument("--no-library", action="store_true", help="products without cuBLASLt, see above")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, to try this out")
    options = parser.parse_args(arguments)
    names = options.cases or list(ALL)
    if unknown := [name for name in names if name not in (*ALL, CONTROL)]:
        parser.error(f"no such case: {', '.join(unknown)}")
    if options.part is not None:
        names = part_of(names, options.part)
    if options.no_library:
        os.environ["BOTTLENECKED_CUDA_PRODUCTS"] = "general"  # read where a workspace is made
    backend, device = ("cpu", "cpu") if options.cpu else ("cuda", "cuda:0")
    for name in names:
        if name == CONTROL:
            run_control(device)
        elif name in CAPTURES:
            run_capture(name, CAPTURES[name], backend, device)
        else:
            for weight_dtype in ("bfloat16", "float32") if name in ("paged", "wide", "float32") else ("bfloat16",):
                run(name, CASES[name], weight_dtype, backend, device)
    print("all done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
