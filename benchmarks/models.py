"""Language models with random weights, of the shapes that are measured."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.inputs import SEED, SHAPES

# Vocabulary, hidden and MLP width.
WIDTHS = {"llama-3.2-1b": (128256, 2048, 8192), "tiny": (512, 64, 96)}


def make(shape: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama of one of WIDTHS' shapes, the same each time, in evaluation mode; no token ends its text.

    Made on the device: a billion random numbers take a GPU's host long.
    """
    backbone = SHAPES[shape]
    vocabulary, hidden, mlp = WIDTHS[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_query_heads,
        num_key_value_heads=backbone.num_kv_heads,
        head_dim=backbone.head_dim,
        max_position_embeddings=1 << 17,
        initializer_range=0.3 if shape == "tiny" else 0.02,  # a narrow model's text repeats itself, whatever its cache
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model
