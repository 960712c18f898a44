"""BottleneckedConnector: what vLLM is told to load with --kv-transfer-config.

    {"kv_connector": "BottleneckedConnector", "kv_role": "kv_both",
     "kv_connector_module_path": "bottlenecked.integrations.vllm.connector",
     "kv_connector_extra_config": {"processor": "my-processor"}}

vLLM makes one beside its scheduler and one in each worker; each passes vLLM's calls on to its half. It transfers
nothing: the connector interface is where vLLM lets others read the schedule and write the cache between forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from bottleneck_ext import InvalidArgumentError, UnsupportedError

from ...boundary import newline_token_ids
from ...config import CacheProcessorConfig
from .checks import check_fit, check_server, check_version
from .metrics import RewriteMetrics, RewriteStats
from .options import ServerOptions
from .scheduler import Plan, SchedulerHalf
from .worker import WorkerHalf

__all__ = ["BottleneckedConnector"]


@dataclass
class RewriteMetadata(KVConnectorMetadata):
    """Scheduler to workers, each step."""

    plan: Plan


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Workers to scheduler, each step. number: of the latest plan. lost_prompts: keys of prompts that some worker could
    not keep."""

    number: int
    lost_prompts: set[bytes]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        return WorkerReport(self.number, self.lost_prompts | other.lost_prompts)


class BottleneckedConnector(KVConnectorBase_V1, SupportsHMA):
    """See the interface in vLLM. Raises at start what `checks` refuses."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version()
        super().__init__(vllm_config, role, kv_cache_config)
        options = ServerOptions.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        config = CacheProcessorConfig.load(options.processor)
        check_server(vllm_config, kv_cache_config, config, options.processor)
        check_fit(
            vllm_config.model_config, config,
            check_weights=options.check_weights, download_dir=vllm_config.load_config.download_dir,
        )  # fmt: skip
        if options.top_k is not None and options.top_k > config.top_k:
            raise InvalidArgumentError(
                f"kv_connector_extra_config: top_k is {options.top_k}, but the Processor recalls at most {config.top_k}"
            )
        self._served = True  # whether what has to precede the bound step's forward is done
        if role == KVConnectorRole.SCHEDULER:
            block_size = vllm_config.cache_config.block_size
            capacity = (kv_cache_config.num_blocks if kv_cache_config is not None else 0) * block_size
            self.scheduler = SchedulerHalf(
                config,
                options,
                line_ending_ids=_line_ending_ids(vllm_config.model_config, config),
                block_size=block_size,
                num_rows=vllm_config.scheduler_config.max_num_seqs,
                max_saved_tokens=capacity if options.max_saved_tokens is None else options.max_saved_tokens,
            )
        else:
            from vllm.distributed.parallel_state import get_pp_group, get_tp_group

            group = get_tp_group()
            reports = group.rank_in_group == 0 and get_pp_group().is_first_rank
            self.worker = WorkerHalf(vllm_config, options, config, group, reports=reports)

    # ---- beside the scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def on_new_request(self, request: Any) -> None:
        self.scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        restorable = self.scheduler.restorable(request)
        return (None if restorable is None else max(0, restorable - num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> RewriteMetadata:
        plan = self.scheduler.build(scheduler_output)
        if plan.precedes_forward:
            # vLLM starts loads after the forward unless a step says that it needs them.
            scheduler_output.has_sync_kv_loads = True
        return RewriteMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is None:
            return
        if connector_output.invalid_block_ids:
            self.scheduler.lose(connector_output.invalid_block_ids, report.number)
        self.scheduler.forget_prompts(report.lost_prompts)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.finish(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.finish(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        self.scheduler.reset()
        return True

    # ---- in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        if get_kv_transfer_group() is not self:
            raise UnsupportedError(
                "MultiConnector combines KV connectors, and others would hand out rewritten blocks: name "
                "BottleneckedConnector alone in --kv-transfer-config"
            )
        self.worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: RewriteMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._served = not connector_metadata.plan.precedes_forward

    def handle_preemptions(self, kv_connector_metadata: RewriteMetadata) -> None:
        self.worker.prepare(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan: Plan = self._get_connector_metadata().plan
        self._served = True
        self.worker.run(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if not self._served:
            raise RuntimeError(
                "vLLM began a forward before the rewrite that has to precede it: this version of vLLM is not supported"
            )

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> WorkerReport:
        return WorkerReport(self.worker.number, self.worker.take_lost_prompts())

    # ---- both

    def get_kv_connector_stats(self) -> RewriteStats | None:
        if self.role == KVConnectorRole.WORKER:
            return self.worker.take_stats()
        skipped = self.scheduler.skipped
        if not skipped:
            return None
        stats = RewriteStats.of_skipped(skipped)
        skipped.clear()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> RewriteStats:
        return RewriteStats(data=data) if data else RewriteStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> RewriteMetrics:
        return RewriteMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _line_ending_ids(model_config: Any, config: CacheProcessorConfig) -> tuple[int, ...]:
    if config.boundary.token_ids:
        return config.boundary.token_ids
    if model_config.skip_tokenizer_init:
        raise UnsupportedError(
            "the Processor's config.json lists no boundary.token_ids, and --skip-tokenizer-init leaves no tokenizer to "
            "find them: give the Processor the ids, or leave the option out"
        )
    from transformers import AutoTokenizer

    ids = newline_token_ids(
        AutoTokenizer.from_pretrained(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
    )
    if not ids:
        raise InvalidArgumentError("no token of this tokenizer contains a newline: set boundary.token_ids")
    return ids


def __getattr__(name: str) -> Any:
    """vLLM looks the connector up here by name, and --kv-offloading-size puts another name into the configuration."""
    if name.endswith("Connector"):
        raise UnsupportedError(
            f"--kv-transfer-config names {name} of {__name__}: name BottleneckedConnector, and leave "
            "--kv-offloading-size out, which names a connector of its own"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
