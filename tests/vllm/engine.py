"""A tiny random Llama, a random Processor for it, vLLM engines in this process, and what transformers says to both."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine in this process, nothing asked of a network, none of others' plug-ins.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="bottlenecked",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    HF_HUB_OFFLINE="1",
)
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bottlenecked import CacheProcessor, CacheProcessorConfig
from bottlenecked.backbones import describe
from bottlenecked.checkpoint import initial_weights, save_checkpoint
from bottlenecked.config import BoundaryConfig
from bottlenecked.integrations.transformers import attach

VOCABULARY = 256
NEWLINES = tuple(range(8, 256, 16))  # one token in sixteen ends a step
CONNECTOR = {
    "kv_connector": "BottleneckedConnector",
    "kv_connector_module_path": "bottlenecked.integrations.vllm.connector",
    "kv_role": "kv_both",
}


def save_backbone(directory: Path, *, seed: int = 0, num_kv_heads: int = 2) -> Path:
    """Large initial weights make attention and logits decisive."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=num_kv_heads, head_dim=32, initializer_range=0.15, max_position_embeddings=512,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A character a token: ASCII has its own codes, the rest of the vocabulary stands for some letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {chr(i) if i == 10 or 32 <= i < 127 else chr(0x400 + i): i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(characters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=chr(0x400)).save_pretrained(directory)


def save_processor(directory: Path, backbone: Path, *, random_scale: float = 0.05, **changes: Any) -> Path:
    """Random, with noticeable edits; random_scale 0: the identity."""
    boundary = {"rule": "token_ids", "token_ids": NEWLINES} | changes.pop("boundary", {})
    settings: dict[str, Any] = {
        "processor_dim": 32, "processor_heads": 4, "processor_mlp_dim": 48, "top_k": 8, "recent_window": 24,
    }  # fmt: skip
    config = CacheProcessorConfig(**describe(backbone), boundary=BoundaryConfig(**boundary), **(settings | changes))
    save_checkpoint(directory, config, initial_weights(config, random_scale=random_scale, seed=1))
    return directory


def make_prompts(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 120) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextlib.contextmanager
def _asynchronous(wanted: bool) -> Iterator[None]:
    """On a CPU vLLM turns asynchronous scheduling off, whatever is asked; its scheduler works there all the same."""
    from vllm.platforms import current_platform

    stock = type(current_platform).check_and_update_config

    def and_asynchronous(config: Any) -> None:
        stock(config)
        config.scheduler_config.async_scheduling = True

    if wanted:
        type(current_platform).check_and_update_config = staticmethod(and_asynchronous)
    try:
        yield
    finally:
        type(current_platform).check_and_update_config = stock


@contextlib.contextmanager
def engine(
    backbone: Path, processor: Path | None, extra: dict[str, Any] | None = None, **options: Any
) -> Iterator[Any]:
    """A vLLM engine; processor None: stock vLLM."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
        "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 32,
        "kv_cache_memory_bytes": 16 << 20, "disable_log_stats": False,
    }  # fmt: skip
    if processor is not None:
        settings["kv_transfer_config"] = CONNECTOR | {
            "kv_connector_extra_config": {"processor": str(processor), "weight_dtype": "float32", **(extra or {})}
        }
    with _asynchronous(options.get("async_scheduling", False)):
        llm = LLM(model=str(backbone), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(max_tokens: int, **changes: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        **({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False} | changes)
    )


def generate(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, **changes: Any) -> list[list[int]]:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(inputs, sampling(max_tokens, **changes), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def connector_halves(llm: Any) -> tuple[Any, Any]:
    """The scheduler's half and the worker's half of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler, get_kv_transfer_group().worker


@dataclass
class Reference:
    """Greedy tokens by the transformers integration, one prompt at a time, and the smallest margin of a choice."""

    tokens: list[list[int]]
    boundaries: int
    margin: float


def reference(
    backbone: Path, processor: Path | None, prompts: Sequence[Sequence[int]], max_tokens: int, dtype: str = "float32"
) -> Reference:
    model = LlamaForCausalLM.from_pretrained(backbone, dtype=getattr(torch, dtype)).eval()
    result = Reference([], 0, float("inf"))
    context: Any = contextlib.nullcontext()
    if processor is not None:
        context = attach(model, CacheProcessor.from_pretrained(processor, weight_dtype="float32"))
    with context as attachment:
        for prompt in prompts:
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
            result.tokens.append(output.sequences[0, len(prompt) :].tolist())
            top = torch.stack(output.logits).squeeze(1).topk(2).values
            result.margin = min(result.margin, float((top[:, 0] - top[:, 1]).min()))
        if attachment is not None:
            result.boundaries = attachment.stats.boundaries
    return result
