"""Device memory beside a model and its cache: the query ring, the Processor's weights, the workspace.

Counted by what is allocated. Measured: how much less memory the device has free after Processor, workspace and two
boundaries, which also sees what the library keeps outside of both ("measured_bytes").
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks import floors
from benchmarks.gpu.context import Context, cache_bytes, key, over
from benchmarks.harness import Figure
from benchmarks.inputs import Inputs, Setting
from bottlenecked.processor import CacheProcessor

GRID = [
    ("llama-3.2-1b", 16, 2048, 96),
    ("llama-3.2-1b", 16, 2048, 32),
    ("llama-3.1-8b", 16, 2048, 96),
    ("qwen3-0.6b", 16, 2048, 96),
]


def run(context: Context) -> Iterator[Figure]:
    yield from over(context, "memory", GRID[:1] if context.quick else GRID, functools.partial(measure, context))


def measure(context: Context, setting: Setting) -> Figure:
    inputs = context.inputs(setting)
    config = inputs.config
    # The ring holds recent_window queries; a Processor made for shorter steps needs no more than they have.
    ring = config.num_layers * setting.batch * setting.step * config.num_query_heads * config.head_dim
    made: Figure = {"case": "memory", **setting.describe("threads"), "key": key("memory", setting)}
    made["model_bytes"] = (setting.backbone.parameters or 0) * floors.SIZES[setting.dtype]
    made["cache_bytes"] = cache_bytes(setting)
    made["query_bytes"] = ring * floors.SIZES[setting.dtype]
    before = _free(context)
    processor = CacheProcessor(config, inputs.weights, weight_dtype=setting.weight_dtype, backend=context.device)
    with_weights = _free(context)
    workspace = processor.workspace()
    _rewrite_twice(context, inputs, processor, workspace)
    after = _free(context)
    made["processor_bytes"], made["workspace_bytes"] = processor.nbytes, workspace.nbytes
    made["measured_bytes"] = before - after
    made["measured_workspace_bytes"] = with_weights - after
    beside = made["model_bytes"] + made["cache_bytes"]
    made["added_fraction"] = (made["query_bytes"] + made["workspace_bytes"]) / beside
    made["added_in_all_fraction"] = made["added_fraction"] + made["processor_bytes"] / beside
    return made


def _rewrite_twice(context: Context, inputs: Inputs, processor: CacheProcessor, workspace: object) -> None:
    bound = processor.bind(
        [k.transpose(1, 2) for k in inputs.keys],
        [v.transpose(1, 2) for v in inputs.values],
        inputs.queries,
        workspace=workspace,  # type: ignore[arg-type]
    )
    for _ in range(2):
        bound.rewrite(inputs.events)
    context.timer.synchronize()


def _free(context: Context) -> int:
    if not context.on_gpu:
        return 0
    torch.cuda.synchronize(context.device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(context.device)[0]
