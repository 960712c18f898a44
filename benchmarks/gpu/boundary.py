"""One boundary: ours against PyTorch, all on the device.

ours                 the bound cache rewritten by one asynchronous call, nothing reported
ours_graph           the same call in a CUDA graph
naive                the paper in eager PyTorch, attention weights materialised for the window's queries
plain                our algorithm in eager PyTorch, a module per layer
..._compiled         under torch.compile; these are a case of their own, `compiled`, as they take minutes
..._compiled_graph   that in a CUDA graph: no launch costs either
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks import checks
from benchmarks.baselines.naive import Naive
from benchmarks.baselines.plain import Plain
from benchmarks.gpu import peaks
from benchmarks.gpu.context import MIN_REPEATS, Context, attention_bytes, key, over
from benchmarks.gpu.timing import Graph
from benchmarks.harness import OURS, Contender, Figure, figure, say
from benchmarks.inputs import DTYPES, Inputs, Setting

Call = Callable[[], object]

CHECKED = 4  # sequences of a batch whose edits are compared, row by row, on the host
# (shape, batch, prior, step), the most telling first: time may run out.
GRID = [
    ("llama-3.2-1b", 1, 2048, 32),
    ("llama-3.2-1b", 16, 2048, 32),
    ("llama-3.2-1b", 64, 2048, 32),
    ("llama-3.2-1b", 1, 32768, 32),
    ("llama-3.2-1b", 16, 32768, 32),
    ("llama-3.2-1b", 1, 2048, 64),
    ("llama-3.2-1b", 1, 2048, 96),
    ("llama-3.2-1b", 16, 2048, 64),
    ("llama-3.2-1b", 16, 2048, 96),
    ("llama-3.2-1b", 64, 2048, 96),
    ("llama-3.2-1b", 1, 32768, 96),
    ("llama-3.1-8b", 1, 2048, 32),
    ("llama-3.1-8b", 16, 2048, 32),
    ("llama-3.1-8b", 1, 32768, 32),
    ("llama-3.1-8b", 16, 2048, 96),
    ("qwen3-0.6b", 1, 2048, 32),
    ("qwen3-0.6b", 16, 2048, 32),
    ("qwen3-0.6b", 1, 32768, 32),
    ("qwen3-0.6b", 16, 2048, 96),
]


def run(context: Context) -> Iterator[Figure]:
    yield from over(
        context, "boundary", GRID[:2] if context.quick else GRID, functools.partial(measure, context, "boundary")
    )


def measure(context: Context, case: str, setting: Setting) -> Figure:
    """case: "boundary", or "compiled", where the baselines are compiled."""
    inputs = context.inputs(setting)
    bound = inputs.bind()

    def ours() -> object:
        return bound.rewrite(inputs.events, report=False) if context.on_gpu else bound.rewrite(inputs.events)

    calls = compiled(context, inputs) if case == "compiled" else baselines(context, inputs)
    checked = check(inputs, calls)
    contenders = {OURS: Contender(ours, inputs.restore)} | {
        name: Contender(call, inputs.restore) for name, call in calls.items()
    }
    contenders |= graphs(context, inputs, calls)
    times = context.timer.measure(contenders, repeats=max(context.repeats, MIN_REPEATS))
    made = figure(case, setting.describe("threads"), times, checked=checked, key=key(case, setting))
    made["host_s"] = context.timer.host_seconds(ours)
    return peaks.with_floor(made, peaks.boundary_floor(context.rates, inputs.config, setting))


def baselines(context: Context, inputs: Inputs) -> dict[str, Call]:
    """Whole boundaries on the inputs' caches, as far as there is memory for them."""
    setting, dtype, calls = inputs.setting, DTYPES[inputs.setting.dtype], {}
    weights = attention_bytes(setting)
    repeated = setting.backbone.num_query_heads * setting.batch * setting.prior * setting.backbone.head_dim * 2
    if context.fits(weights * (2 * setting.backbone.num_layers + 10) + 2 * repeated):
        calls["naive"] = by_naive(inputs, Naive(inputs.config, inputs.weights, dtype, device=context.device))
    else:
        say("  naive is left out: its attention weights do not fit")
    if context.fits(weights * 16):
        calls["plain"] = by_plain(inputs, Plain(inputs.config, inputs.weights, dtype, device=context.device))
    return calls


def compiled(context: Context, inputs: Inputs) -> dict[str, Call]:
    """The same under torch.compile, and plain as it is."""
    config, weights, dtype, device = inputs.config, inputs.weights, DTYPES[inputs.setting.dtype], context.device
    torch.compiler.reset()  # no graph of one setting serves another
    return {
        "plain": by_plain(inputs, Plain(config, weights, dtype, device=device)),
        "naive_compiled": by_naive(inputs, Naive(config, weights, dtype, device=device, compiled=True)),
        "plain_compiled": by_plain(inputs, Plain(config, weights, dtype, device=device, compiled=True)),
    }


def by_naive(inputs: Inputs, naive: Naive) -> Call:
    keys, values, queries, events = inputs.keys, inputs.values, inputs.queries, inputs.events
    return lambda: naive.rewrite(keys, values, naive.attention_weights(keys, queries, events), events)


def by_plain(inputs: Inputs, plain: Plain) -> Call:
    return lambda: plain.rewrite(inputs.keys, inputs.values, inputs.queries, inputs.events)


def graphs(context: Context, inputs: Inputs, calls: dict[str, Call]) -> dict[str, Contender]:
    """CUDA graphs of ours and of the compiled baselines."""
    made: dict[str, Contender] = {}
    if not context.on_gpu:
        return made
    bound = inputs.bind(inputs.processor.workspace())  # it belongs to its graph from then on
    wanted: dict[str, Call] = {"ours_graph": lambda: bound.rewrite(inputs.events, report=False)}
    wanted |= {f"{name}_graph": call for name, call in calls.items() if name.endswith("_compiled")}
    for name, call in wanted.items():
        try:
            made[name] = Contender(Graph(call, on_gpu=True).replay, inputs.restore)
        except Exception as error:  # a graph is an extra
            say(f"  {name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            torch.cuda.synchronize()
    return made


@torch.no_grad()
def check(inputs: Inputs, calls: dict[str, Call]) -> list[str]:
    """Every baseline against ours, the first of a batch also against the reference where that takes no minutes.

    Returns who was compared. Leaves the caches restored.
    """
    inputs.restore()
    setting, bound = inputs.setting, inputs.bind()
    device = inputs.keys[0].device
    out = torch.empty(inputs.config.num_layers, setting.batch, setting.prior, device=device)
    inputs.mass(out if device.type != "cpu" else out.numpy(), bound)
    mass = out.cpu().numpy()
    report = bound.rewrite(inputs.events)
    ours = checks.Rewritten(np.stack(report.recalled, axis=1), *inputs.snapshot())
    compared = []
    if setting.prior <= 4096:
        checks.reference_rewrite(inputs, ours, mass)
        compared.append("reference")
    few = checks.Rewritten(ours.recalled[:, :CHECKED], ours.keys, ours.values)
    for name, call in calls.items():
        inputs.restore()
        recalled = torch.as_tensor(call()).cpu().numpy()  # type: ignore[arg-type]
        other = checks.Rewritten(recalled[:, :CHECKED], inputs.keys, inputs.values)
        checks.same_rewrite(inputs, f"{name} and ours", few, other, mass)
        compared.append(name)
    inputs.restore()
    return compared
