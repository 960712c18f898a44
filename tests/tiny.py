"""A language model of three layers, made on the spot, and Processors for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from bottlenecked import BoundaryConfig, CacheProcessor, CacheProcessorConfig
from bottlenecked.checkpoint import initial_weights

VOCABULARY = 64
# The newest name of the argument that is the KV cache.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
NEWLINES = tuple(range(3, VOCABULARY - 4, 7))
EOS = VOCABULARY - 1
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large enough for text that does not repeat itself at once
    "bos_token_id": None,
    "eos_token_id": None,  # nothing ends the text by itself
    "pad_token_id": EOS,
}


def model(
    dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **config: Any
) -> LlamaForCausalLM:
    """A Llama of `SHAPE` with random weights."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(**(SHAPE | config)))
    made.set_attn_implementation(attention)
    return made.to(dtype).eval()


def config(**changes: Any) -> CacheProcessorConfig:
    boundary = {"rule": "token_ids", "token_ids": NEWLINES} | changes.pop("boundary", {})
    settings: dict[str, Any] = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_query_heads": 4,
        "processor_dim": 32,
        "processor_heads": 4,
        "processor_mlp_dim": 48,
        "top_k": 5,
        "recent_window": 8,
        "boundary": BoundaryConfig(**boundary),
    }
    return CacheProcessorConfig(**(settings | changes))


def processor(random_scale: float = 5.0, **changes: Any) -> CacheProcessor:
    """random_scale 0 is the identity; 5 changes the text at once."""
    made = config(**changes)
    weights = initial_weights(made, random_scale=random_scale, seed=1)
    return CacheProcessor(made, weights, weight_dtype="float32")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... for ids 0, 1, ...; those in NEWLINES end with a newline."""
    words = {f"w{i}\n" if i in NEWLINES else f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=f"w{EOS}", padding_side="left")


def prompts(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, padded on the left: ids and attention mask, both [batch, longest]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), EOS)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(0, VOCABULARY - 4, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


class Script(LogitsProcessor):
    """Forces the tokens of each row; after its script a row is free."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, tokens in enumerate(self.rows):
            if self.step < len(tokens):
                scores[row] = -torch.inf
                scores[row, tokens[self.step]] = 0
        self.step += 1
        return scores
