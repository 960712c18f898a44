"""What the cases of a run share: the device, its rates, the time left, and Processors, which are slow to make."""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.gpu import peaks
from benchmarks.gpu.timing import Timer
from benchmarks.harness import Figure, say
from benchmarks.inputs import Inputs, Setting
from bottlenecked.processor import CacheProcessor

MIN_REPEATS = 5


@dataclass
class Context:
    """device: "cpu" or "cuda:0". quick: tiny shapes. deadline: of time.monotonic, after which no setting begins.

    measured: the keys of figures that an earlier call has measured, see Context.due.
    """

    device: str
    quick: bool
    repeats: int
    measured: set[str]
    deadline: float = math.inf
    timer: Timer = field(init=False)
    _rates: peaks.Rates | None = None
    _processor: tuple[tuple[object, ...], CacheProcessor] | None = None

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def rates(self) -> peaks.Rates:
        if self._rates is None:
            self._rates = peaks.measure(self.timer)
        return self._rates

    def due(self, case: str, setting: Setting, needed_bytes: int = 0) -> bool:
        """Whether this point should be measured now; says why not. needed_bytes: of device memory, about."""
        if key(case, setting) in self.measured:
            return False
        if time.monotonic() > self.deadline:
            say(f"  left out, no time: {case}, {setting}")
            return False
        if not self.fits(needed_bytes):
            say(f"  left out, {needed_bytes / 2**30:.0f} GiB do not fit: {case}, {setting}")
            return False
        return True

    def fits(self, needed_bytes: int) -> bool:
        if not self.on_gpu:
            return True
        torch.cuda.empty_cache()
        return needed_bytes < 0.9 * torch.cuda.mem_get_info(self.device)[0]

    def inputs(self, setting: Setting) -> Inputs:
        """Random caches of this setting; the Processor is made once for settings that follow one another."""
        shape = (setting.shape, setting.processor_dim, setting.dtype, setting.top_k, max(96, setting.step))
        if self._processor is None or self._processor[0] != shape:
            self._processor = None
            made = Inputs(setting, device=self.device)
            self._processor = shape, made.processor
            return made
        return Inputs(setting, device=self.device, processor=self._processor[1])

    def setting(self, shape: str, batch: int, prior: int, step: int = 32, dim: int = 512) -> Setting:
        """With this, or in a quick run with a tiny shape in its place."""
        if self.quick:
            return Setting("tiny", 32, "bfloat16", min(batch, 2), 40, min(step, 6), 4, 1)
        return Setting(shape, dim, "bfloat16", batch, prior, step, 32, 1)


def attempt(case: str, setting: Setting, measure: Callable[[], Figure]) -> Figure:
    """The figure, or a line that says why there is none: time on a device is dear, and the rest still runs."""
    try:
        return measure()
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit):
            say(traceback.format_exc())
        say(f"  {case}, {setting}: refused: {error}")
        return {"case": case, "refused": f"{setting}: {type(error).__name__}: {error}"[:2000]}


def over(
    context: Context, case: str, grid: Iterable[tuple[str, int, int, int]], measure: Callable[[Setting], Figure]
) -> Iterator[Figure]:
    """A case's figures of whole boundaries. grid: (shape, batch, prior, step)."""
    for shape, batch, prior, step in grid:
        setting = context.setting(shape, batch, prior, step)
        if context.due(case, setting, 2 * cache_bytes(setting) + (2 << 30)):
            yield attempt(case, setting, functools.partial(measure, setting))


def key(case: str, setting: Setting) -> str:
    return f"{case}: {setting}"


def cache_bytes(setting: Setting) -> int:
    """Keys and values, once."""
    backbone = setting.backbone
    tokens = setting.batch * (setting.prior + setting.step)
    return 2 * backbone.num_layers * tokens * backbone.num_kv_heads * backbone.head_dim * 2


def attention_bytes(setting: Setting) -> int:
    """One layer's attention weights for the window, per byte of their dtype."""
    return setting.batch * setting.backbone.num_query_heads * setting.step * (setting.prior + setting.step)
