"""What is counted: vLLM gathers it from workers and scheduler, logs it every interval and serves it at /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

_PREFIX = "vllm:bottlenecked_"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_EDITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass
class RewriteStats(KVConnectorStats):
    """data: boundaries and tokens (rewritten positions of a layer) as counts, seconds (one per rewrite call, wall
    clock) and edits (one per boundary, the norm of its edit relative to that of its rows over all layers) as lists,
    skipped (by reason), saved_tokens and restored_tokens of preempted requests, and prompt_tokens that were copied
    rather than computed, as counts.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {
            "boundaries": 0,
            "tokens": 0,
            "seconds": [],
            "edits": [],
            "skipped": {},
            "saved_tokens": 0,
            "restored_tokens": 0,
            "prompt_tokens": 0,
        }

    @classmethod
    def of_skipped(cls, skipped: Mapping[str, int]) -> RewriteStats:
        stats = cls()
        stats.data["skipped"] = dict(skipped)
        return stats

    def aggregate(self, other: KVConnectorStats) -> RewriteStats:
        for name, value in other.data.items():
            if name == "skipped":
                self.data[name] = dict(Counter(self.data[name]) + Counter(value))
            else:
                self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line of vLLM's log."""
        data = self.data
        result = {
            "boundaries": data["boundaries"],
            "tokens rewritten": data["tokens"],
            "rewrite ms (mean)": round(1e3 * _mean(data["seconds"]), 2),
            "relative edit (mean)": round(_mean(data["edits"]), 4),
        }
        for name in ("saved_tokens", "restored_tokens", "prompt_tokens"):
            if data[name]:
                result[name.replace("_", " ")] = data[name]
        return result | {f"skipped, {reason}": count for reason, count in sorted(data["skipped"].items())}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class RewriteMetrics(KVConnectorPromMetrics):
    """The same for Prometheus, under names that vLLM removes with its own when an engine ends."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)

        def counter(name: str, text: str) -> Any:
            made = self._counter_cls(name=f"{_PREFIX}{name}", documentation=text, labelnames=labelnames)
            return create_metric_per_engine(made, per_engine)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Any:
            made = self._histogram_cls(
                name=f"{_PREFIX}{name}", documentation=text, buckets=buckets, labelnames=labelnames
            )
            return create_metric_per_engine(made, per_engine)

        self._counters = {
            "boundaries": counter("boundaries", "Steps whose KV was rewritten."),
            "tokens": counter("tokens_rewritten", "Positions rewritten in every layer, window and recalled."),
            "saved_tokens": counter("saved_tokens", "Tokens of preempted requests whose KV was saved."),
            "restored_tokens": counter("restored_tokens", "Tokens of resumed requests whose KV was restored."),
            "prompt_tokens": counter("prompt_tokens_copied", "Prompt tokens whose KV was known and copied."),
        }
        self._histograms = {
            "seconds": histogram(
                "rewrite_seconds", "Wall clock of one call, which rewrites all ended steps.", _SECONDS
            ),
            "edits": histogram("relative_edit", "Norm of a boundary's edit relative to that of its rows.", _EDITS),
        }
        self._skipped = self._counter_cls(
            name=f"{_PREFIX}skipped",
            documentation="Requests or steps that were not rewritten, by reason.",
            labelnames=[*labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, metric in self._counters.items():
            if transfer_stats_data.get(name):
                metric[engine_idx].inc(transfer_stats_data[name])
        for name, metric in self._histograms.items():
            for value in transfer_stats_data.get(name, ()):
                metric[engine_idx].observe(value)
        for reason, count in transfer_stats_data.get("skipped", {}).items():
            self._skipped.labels(*self.per_engine_labelvalues[engine_idx], reason).inc(count)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
