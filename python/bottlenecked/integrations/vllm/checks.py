"""What is refused at start, in one sentence that names the setting and the remedy.

`check_server` looks at vLLM's configuration, in scheduler and workers; `check_layers` at the live attention layers, in
workers. Both raise UnsupportedError for what cannot be served and InvalidArgumentError where model and Processor do not
fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bottleneck_ext import InvalidArgumentError, UnsupportedError

from ...backbones import describe, files_weights_hash
from ...config import CacheProcessorConfig
from .capture import check_forward

logger = logging.getLogger(__name__)

# Versions whose interfaces the tests have seen; docs/vllm.md has the table.
OLDEST, NEWEST = (0, 31), (0, 32)

_FIT = {
    "num_layers": "layers",
    "num_kv_heads": "KV heads",
    "head_dim": "elements per head (head_dim)",
    "num_query_heads": "query heads",
}


def check_version() -> None:
    """vLLM's own version, and that its connector interface is the one we implement."""
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched.output import SchedulerOutput

    version = tuple(vllm.__version_tuple__[:2])
    if not OLDEST <= version <= NEWEST:
        tested = ".".join(map(str, OLDEST)) + (f" to {'.'.join(map(str, NEWEST))}" if NEWEST != OLDEST else "")
        raise UnsupportedError(
            f"vLLM {vllm.__version__} was not tested with this version of bottlenecked: install vLLM {tested}"
        )
    fields = getattr(SchedulerOutput, "__dataclass_fields__", {})
    needed = {
        "num_scheduled_tokens", "finished_req_ids", "preempted_req_ids", "has_sync_kv_loads",
        "kv_connector_block_state",
    }  # fmt: skip
    hooks = {
        "build_connector_meta": 2, "get_num_new_matched_tokens": 3, "on_new_request": 2, "handle_preemptions": 2,
        "start_load_kv": 3, "register_kv_caches": 2, "get_block_ids_with_load_errors": 1, "get_kv_connector_stats": 1,
        "build_connector_worker_meta": 1, "update_connector_output": 2,
    }  # fmt: skip
    missing = sorted(needed - set(fields))
    for hook, count in hooks.items():
        function = getattr(base.KVConnectorBase_V1, hook, None)
        if function is None or len(inspect.signature(function).parameters) != count:
            missing.append(hook)
    if missing:
        raise UnsupportedError(
            f"vLLM {vllm.__version__} has another KV connector interface ({', '.join(missing)}): install vLLM "
            f"{'.'.join(map(str, NEWEST))}"
        )


def check_server(vllm_config: Any, kv_cache_config: Any, processor: CacheProcessorConfig, directory: str) -> None:
    """vllm_config, kv_cache_config: vLLM's. processor: the configuration of the checkpoint in `directory`."""
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    transfer, scheduler = vllm_config.kv_transfer_config, vllm_config.scheduler_config
    attention, dtype = vllm_config.attention_config, str(model.dtype).removeprefix("torch.")
    refusals = [
        (
            cache.enable_prefix_caching,
            "prefix caching is on, which would give rewritten blocks to other requests: add "
            "--no-enable-prefix-caching, and perhaps prompt_cache_tokens in kv_connector_extra_config",
        ),
        (
            transfer.kv_role != "kv_both",
            f"kv_role is {transfer.kv_role!r}: set it to 'kv_both' in --kv-transfer-config",
        ),
        (
            getattr(transfer, "kv_load_failure_policy", "fail") != "fail" and scheduler.async_scheduling,
            "with asynchronous scheduling vLLM has sampled from a failed step before it computes it again: leave "
            "kv_load_failure_policy out, or add --no-async-scheduling",
        ),
        (
            vllm_config.device_config.device_type not in ("cpu", "cuda") or torch.version.hip is not None,
            f"the device is {'ROCm' if torch.version.hip else vllm_config.device_config.device_type}: only CPUs and "
            "CUDA devices are supported",
        ),
        (
            scheduler.scheduler_cls is not None,
            "rewrites rely on the order in which vLLM's own scheduler does things: leave --scheduler-cls out",
        ),
        (vllm_config.speculative_config is not None, "speculative decoding is on: leave --speculative-config out"),
        (model.is_encoder_decoder, "the model is an encoder-decoder: only decoder-only models are supported"),
        (model.runner_type != "generate", f"--runner is {model.runner_type}: only generation is supported"),
        (model.use_mla, "the model has multi-head latent attention: its cache holds no keys and values of heads"),
        (
            model.get_sliding_window() is not None,
            "the model has sliding-window attention: choose one with full attention",
        ),
        (
            cache.cache_dtype not in ("auto", dtype),
            f"--kv-cache-dtype is {cache.cache_dtype}: set it to auto, which is the model's {dtype}",
        ),
        (dtype not in ("float32", "float16", "bfloat16"), f"the model is in {dtype}: use --dtype bfloat16"),
        (
            getattr(vllm_config, "diffusion_config", None) is not None or getattr(attention, "use_non_causal", False),
            "the model does not write its text token by token: only causal models are supported",
        ),
        (
            getattr(attention, "hisparse_config", None) is not None,
            "HiSparse keeps the KV cache in host memory: leave hisparse_config out of --attention-config",
        ),
        (
            getattr(vllm_config, "weight_transfer_config", None) is not None,
            "a Processor is for the weights it was trained with: leave --weight-transfer-config out",
        ),
        (
            parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism spreads a sequence's cache over ranks: leave --decode-context-parallel-size out",
        ),
        (
            getattr(parallel, "use_ubatching", parallel.enable_dbo),
            "dual batch overlap runs two batches at once: leave --enable-dbo and --ubatch-size out",
        ),
        (
            getattr(parallel, "enable_elastic_ep", False),
            "elastic expert parallelism replaces workers: leave --enable-elastic-ep out",
        ),
        (getattr(model, "enable_sleep_mode", False), "sleep mode drops the KV cache: leave --enable-sleep-mode out"),
        (
            cache.kv_sharing_fast_prefill,
            "layers that share a cache are not supported: leave --kv-sharing-fast-prefill out",
        ),
        (
            processor.boundary.timing == "pre",
            f"the Processor in {directory} has boundary.timing 'pre', which needs the coming token: vLLM serves 'post'",
        ),
        (
            processor.num_kv_heads % parallel.tensor_parallel_size != 0,
            f"--tensor-parallel-size is {parallel.tensor_parallel_size}, which does not divide the "
            f"{processor.num_kv_heads} KV heads",
        ),
        (
            parallel.tensor_parallel_size > 1 and processor.key_space == "unrotated",
            "the Processor's key_space 'unrotated' is not supported with --tensor-parallel-size above 1",
        ),
    ]  # fmt: skip
    for applies, sentence in refusals:
        if applies:
            raise UnsupportedError(sentence)
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    specs = [group.kv_cache_spec for group in groups]
    names = [type(spec).__name__ for spec in specs]
    if names and names != ["FullAttentionSpec"]:
        raise UnsupportedError(
            f"the model's KV cache has the groups {', '.join(names)}: only models with full attention in every layer "
            "are supported"
        )
    for spec in specs:
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            raise UnsupportedError(
                "the model has layers with sliding-window or chunked attention: choose one with full attention"
            )
        if spec.head_size_v != spec.head_size:
            raise UnsupportedError(
                f"the model's keys have {spec.head_size} elements per head and its values {spec.head_size_v}: only "
                "models in which they are alike are supported"
            )
        # What not all releases have. Such a tensor may have the very shape that layout.py knows.
        packing = {name: getattr(spec, name, None) for name in ("num_head_slots", "state_content_bytes")}
        if any(value is not None for value in packing.values()):
            words = ", ".join(f"{name} {value}" for name, value in packing.items())
            raise UnsupportedError(
                f"the attention backend packs its blocks in a form of its own ({words}): choose another "
                "--attention-backend"
            )
        if getattr(spec, "non_causal", False):
            raise UnsupportedError("the model's attention is not causal: only causal models are supported")


def check_fit(
    model_config: Any, processor: CacheProcessorConfig, *, check_weights: bool, download_dir: str | None = None
) -> None:
    """InvalidArgumentError, naming what differs, unless the Processor was made for this model. download_dir: vLLM's."""
    text = model_config.hf_text_config
    architectures = getattr(model_config.hf_config, "architectures", None) or getattr(text, "architectures", None)
    try:
        actual = describe({**text.to_dict(), "architectures": architectures})
    except ValueError as error:
        raise UnsupportedError(f"{model_config.model}: {error}") from None
    remedy = "use the Processor of this model, or make one with `bottlenecked init`"
    for key, words in _FIT.items():
        if getattr(processor, key) != actual[key]:
            raise InvalidArgumentError(
                f"the Processor is for a backbone with {getattr(processor, key)} {words}, but {model_config.model} has "
                f"{actual[key]}: {remedy}"
            )
    layers = (actual["rope_parameters"] or {}).get("no_rope_layers")
    if processor.key_space == "unrotated" and layers:
        raise UnsupportedError(
            f"{model_config.model} has layers without RoPE (no_rope_layers {layers}), whose keys cannot be turned "
            "back: use a Processor with key_space 'rotated'"
        )
    if processor.key_space == "unrotated":
        _check_rope(model_config, processor, actual["rope_parameters"])
    backbone = actual["backbone"]
    if check_weights and processor.backbone.get("weights_hash"):
        backbone["weights_hash"] = _weights_hash(model_config, actual["num_layers"], download_dir)
        if backbone["weights_hash"] is None:
            logger.warning(
                "no safetensors files of %s are at hand: its weights are not compared with those the Processor "
                "was made for",
                model_config.model,
            )
    for key in ("architecture", "config_hash", "weights_hash"):
        wanted, found = processor.backbone.get(key), backbone.get(key)
        if wanted is not None and found is not None and wanted != found:
            hint = ", or set check_weights to false" if key == "weights_hash" else ""
            raise InvalidArgumentError(
                f"the Processor's backbone has {key} {wanted}, but {model_config.model} has {found}: {remedy}{hint}"
            )


def _weights_hash(model_config: Any, num_layers: int, download_dir: str | None) -> str | None:
    """Of the files in the model's directory, or of those that vLLM has downloaded by now; None where there are none."""
    from huggingface_hub import try_to_load_from_cache

    model = model_config.model
    if Path(model).is_dir():
        return files_weights_hash(model, num_layers)
    # Any file leads to its snapshot; nothing is asked of the hub. Only weights go to --download-dir.
    for cache in dict.fromkeys((download_dir, None)):
        for name in ("model.safetensors", "model.safetensors.index.json", "config.json"):
            try:
                file = try_to_load_from_cache(model, name, cache_dir=cache, revision=model_config.revision)
            except ValueError:
                return None  # a file, or an address of another store
            if isinstance(file, str) and (found := files_weights_hash(Path(file).parent, num_layers)) is not None:
                return found
    return None


def _check_rope(model_config: Any, processor: CacheProcessorConfig, actual: dict[str, Any] | None) -> None:
    """Undoing a rotation needs the very angles and pairing that the model uses. actual: its rope_parameters."""
    try:
        angles = dataclasses.replace(processor, rope_parameters=actual).inv_freq()
    except ValueError:
        angles = []
    # Sections of a head are turned by positions in time, height and width.
    sections = {"mrope_section", "xdrope_section"} & set(actual or {})
    if angles != processor.inv_freq() or sections:
        raise InvalidArgumentError(
            f"rope_parameters of the Processor are {processor.rope_parameters}, but those of {model_config.model} are "
            f"{actual}: use the Processor of this model, or one with key_space 'rotated'"
        )
    # vLLM's layers do not lead to their rotation; transformers' model of the same weights has the same pairs.
    module = type(model_config.hf_text_config).__module__.replace(".configuration_", ".modeling_")
    known = vars(importlib.import_module(module)) if module.startswith("transformers.models.") else {}
    rotate_half = known.get("rotate_half")
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise UnsupportedError(
            f"{model_config.model} is not known to rotate halves of a head as Llama does: use a Processor with "
            "key_space 'rotated'"
        )


def check_layers(layers: Mapping[str, Any], cache_dtypes: Mapping[str, Any]) -> None:
    """layers: attention layers by name; cache_dtypes: of their caches."""
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        check_forward(name, impl)
        if layer.attn_type != "decoder":
            raise UnsupportedError(f"the attention of {name} is of the type {layer.attn_type}: not supported")
        if layer.sliding_window is not None:
            raise UnsupportedError(f"the attention of {name} has a sliding window: not supported")
        for attribute, words in {
            "sinks": "attention sinks",
            "alibi_slopes": "ALiBi",
            "kv_sharing_target_layer_name": "a cache shared with another layer",
        }.items():
            if getattr(impl, attribute, None) is not None:
                raise UnsupportedError(f"the attention of {name} has {words}: not supported")
        if getattr(impl, "logits_soft_cap", None):
            raise UnsupportedError(f"the attention of {name} caps its logits: not supported")
        if cache_dtypes[name] not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedError(
                f"the KV cache of {name} is {cache_dtypes[name]}: use --kv-cache-dtype auto with a model in float32, "
                "float16 or bfloat16"
            )
    if len({float(layer.impl.scale) for layer in layers.values()}) > 1:
        raise UnsupportedError("the model does not scale all its attention layers alike: not supported")
