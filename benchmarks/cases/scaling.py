"""One boundary as the cache grows: ours and the floor from 1k to 32k prior positions, with the bytes it has to read.

Checked up to CHECKED positions; a longer cache differs in nothing but its length.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import boundary
from benchmarks.harness import OURS, Contender, Context, Figure, figure, with_floor
from benchmarks.inputs import Inputs, Setting

CHECKED = 4096


def run(context: Context) -> Iterator[Figure]:
    priors = (1024, 4096, 8192, 32768)
    for setting in context.settings(processor_dims=(128,), dtypes=("bfloat16",), priors=priors):
        yield measure(context, setting)


def measure(context: Context, setting: Setting) -> Figure:
    inputs = Inputs(setting)
    if setting.prior <= CHECKED and context.process == 0:
        boundary.check(inputs, {OURS: inputs.rewrite})
    times = context.measure({OURS: Contender(inputs.rewrite, inputs.restore)}, threads=setting.threads)
    made = with_floor(
        figure("scaling", setting.describe(), times), boundary.work(inputs), context.peaks(setting.threads)
    )
    # At long caches the keys are nearly all that has to be read.
    read = made["floor"]["bytes"]
    return made | {"read_bytes": read, "read_gb_per_s": read / made["median_s"] / 1e9}
