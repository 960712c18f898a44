"""Where a boundary's time goes: the device's time of every kernel, and the host's time to enqueue them all.

Device times are CUPTI's, by torch.profiler, of calls after the second-level cache was flushed. "kernels" are those of
one call, copies among them, in the order of their share; "gaps_s" is what a call takes beyond their sum.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.context import Context, key, over
from benchmarks.harness import OURS, Figure, figure, say
from benchmarks.inputs import Setting

GRID = [("llama-3.2-1b", batch, 2048, 32) for batch in (1, 16, 64)]
CALLS = 5


def run(context: Context) -> Iterator[Figure]:
    yield from over(context, "profile", GRID[:1] if context.quick else GRID, functools.partial(measure, context))


def measure(context: Context, setting: Setting) -> Figure:
    inputs = context.inputs(setting)
    bound = inputs.bind()

    def ours() -> object:
        return bound.rewrite(inputs.events, report=False) if context.on_gpu else bound.rewrite(inputs.events)

    for _ in range(2):
        ours()
    times = context.timer.seconds(ours, CALLS)
    made = figure("profile", setting.describe("threads"), {OURS: times}, key=key("profile", setting))
    inputs.restore()
    made["host_s"] = context.timer.host_seconds(ours)
    if not context.on_gpu:
        return made
    inputs.restore()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        context.timer.seconds(ours, CALLS)
    kernels = _kernels(profiled)
    made["launches"] = sum(count for count, _ in kernels.values())
    made["device_s"] = sum(seconds for _, seconds in kernels.values())
    made["gaps_s"] = made["median_s"] - made["device_s"]
    made["kernels"] = [
        {"kernel": name, "launches": count, "device_s": seconds}
        for name, (count, seconds) in sorted(kernels.items(), key=lambda item: -item[1][1])
    ]
    say(f"  {setting}: {made['launches']:g} launches")
    for kernel in made["kernels"]:
        share = kernel["device_s"] / made["device_s"]
        say(f"  {1e6 * kernel['device_s']:9.1f} us {share:4.0%} {kernel['launches']:6g} x {kernel['kernel']}")
    return made


def _kernels(profiled: profile) -> dict[str, tuple[float, float]]:
    """By name, of one call: launches and seconds. The flush, a fill of its own, is left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events():
        if event.device_type.name == "CUDA" and not _is_flush(event.name):
            found[_short(event.name)].append(event.time_range.elapsed_us() * 1e-6)
    return {name: (len(times) / CALLS, sum(times) / CALLS) for name, times in found.items()}


def _is_flush(name: str) -> bool:
    return "Memset" in name or "FillFunctor" in name


def _short(name: str) -> str:
    """A kernel's name with its template's arguments, without its own and what stands before it."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\((?:int|bool|unsigned int)\)(?=[-\d])", "", name)
    return name.partition("(")[0][:100]
