"""Token parity at full size: SmolLM2-135M behind the OpenAI server, all prompts at once, against the transformers
integration one at a time.

    python -m tests.vllm.smollm2 --data gsm8k_test.jsonl --prompts 64

float32, R = 96, k = 32, a random Processor. Prints every prompt whose tokens differ with the margin between the two
best logits where they part: float32 sums in another order may decide a near tie otherwise. Exit status 1 where one
parts at a margin above --near.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from bottlenecked import CacheProcessor, CacheProcessorConfig
from bottlenecked.backbones import describe, load, tokenizer_newline_ids
from bottlenecked.checkpoint import initial_weights, save_checkpoint
from bottlenecked.config import BoundaryConfig
from bottlenecked.integrations.transformers import attach
from bottlenecked.integrations.vllm.serve import smollm2_directory

from .server import metrics, running, serve_command
from .test_server import ask, tokens_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.smollm2", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--random-scale", type=float, default=0.01)
    parser.add_argument("--near", type=float, default=2e-3, help="margin of logits that counts as a near tie")
    options = parser.parse_args()
    directory = smollm2_directory()
    questions = [json.loads(line)["question"] for line in options.data.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load(directory)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in questions[: options.prompts]
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = CacheProcessorConfig(
            **describe(directory),
            processor_dim=128,
            processor_heads=4,
            processor_mlp_dim=560,
            boundary=BoundaryConfig(token_ids=tokenizer_newline_ids(directory) or ()),
        )
        processor = Path(folder) / "processor"
        save_checkpoint(processor, config, initial_weights(config, random_scale=options.random_scale, seed=0))
        options_file = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        flags = [*options_file, "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(3 << 30)]
        with running(serve_command("smollm2", processor, *flags), Path(folder) / "log") as address:
            began = time.perf_counter()
            common = {"model": "smollm2", "max_tokens": options.tokens, "temperature": 0, "return_token_ids": True}
            answers = ask(address, [{**common, "prompt": prompt} for prompt in prompts])
            seconds = time.perf_counter() - began
            boundaries = metrics(address)["vllm:bottlenecked_boundaries_total"]
        served = [tokens_of(answer) for answer in answers]
        print(f"served {sum(map(len, served))} tokens in {seconds:.0f} s, {boundaries:.0f} boundaries", flush=True)
        with attach(model, CacheProcessor.from_pretrained(processor)) as attachment:
            return compare(model, prompts, served, options, attachment, boundaries)


def compare(model, prompts, served, options, attachment, boundaries) -> int:  # type: ignore[no-untyped-def]
    equal, near, failed = 0, 0, 0
    for i, (prompt, tokens) in enumerate(zip(prompts, served, strict=True)):
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=options.tokens, return_dict_in_generate=True, output_logits=True, temperature=None,
            top_p=None, top_k=None, pad_token_id=0,
        )  # fmt: skip
        alone = output.sequences[0, len(prompt) :].tolist()
        if alone == tokens:
            equal += 1
            continue
        at = next(j for j, (a, b) in enumerate(zip([*alone, -1], [*tokens, -1], strict=False)) if a != b)
        top = output.logits[at][0].topk(2).values
        margin = float(top[0] - top[1])
        print(f"prompt {i} parts at token {at} of {len(alone)}, margin {margin:.2e}", flush=True)
        near += margin < options.near
        failed += margin >= options.near
    counted = attachment.stats.boundaries
    print(f"{equal} of {len(prompts)} equal, {near} part at a near tie (below {options.near:g}), {failed} elsewhere; "
          f"boundaries: server {boundaries:.0f}, transformers {counted}")  # fmt: skip
    return 1 if failed or (equal == len(prompts) and counted != boundaries) else 0


if __name__ == "__main__":
    sys.exit(main())
