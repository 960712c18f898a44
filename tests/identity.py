"""The full identity proof: with a zero Processor, SmolLM2 writes exactly what stock transformers writes.

    python -m tests.identity --data gsm8k_test.jsonl        (or: make identity DATA=gsm8k_test.jsonl)

For every dtype, cache and batch size the first questions of the file are answered twice, greedily, once by the stock
model and once with an identity Processor attached; every token must agree, and boundaries must have happened. Takes
about an hour on two cores; tests/test_transformers.py has the short form that runs with the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from bottlenecked import CacheProcessor, CacheProcessorConfig, backbones
from bottlenecked.checkpoint import initial_weights
from bottlenecked.integrations.transformers import attach


def questions(path: Path, count: int) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]


def identity_processor(model) -> CacheProcessor:
    config = CacheProcessorConfig(
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=model.config.num_key_value_heads,
        num_query_heads=model.config.num_attention_heads,
        head_dim=model.config.head_dim,
        processor_dim=128,
        processor_heads=4,
        processor_mlp_dim=560,
    )
    return CacheProcessor(config, initial_weights(config))


def compare(model, tokenizer, prompts: list[str], *, batch: int, cache: str, tokens: int) -> tuple[int, int, int]:
    """(prompts, prompts whose tokens differ from stock, boundaries)."""
    processor = identity_processor(model)
    differing = boundaries = 0
    for begin in range(0, len(prompts), batch):
        conversations = [[{"role": "user", "content": q}] for q in prompts[begin : begin + batch]]
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        options = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": cache}
        if cache == "static":
            options["disable_compile"] = True
        stock = model.generate(**inputs, **options)
        with attach(model, processor, tokenizer) as attachment:
            ours = model.generate(**inputs, **options)
        boundaries += attachment.stats.boundaries
        differing += len(stock) if stock.shape != ours.shape else int((stock != ours).any(dim=1).sum())
    return len(prompts), differing, boundaries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with a question per line")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cache", nargs="+", default=["dynamic", "static"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts = questions(arguments.data, arguments.questions)
    failed = 0
    for dtype in arguments.dtype:
        model, tokenizer = backbones.load("smollm2", dtype=dtype)
        tokenizer.padding_side = "left"
        for cache in arguments.cache:
            for batch in arguments.batch:
                start = time.perf_counter()
                count, differing, boundaries = compare(
                    model, tokenizer, prompts, batch=batch, cache=cache, tokens=arguments.tokens
                )
                failed += differing > 0 or boundaries < count
                print(
                    f"{dtype} {cache} batch {batch}: {count - differing}/{count} prompts token-identical to stock, "
                    f"{boundaries} boundaries, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    print("FAILED" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
