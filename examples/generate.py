"""Attach a Processor to a transformers model, and generate as usual.

    python examples/generate.py                    a small random Processor, made here: it improves nothing
    python examples/generate.py PROCESSOR [MODEL]  a directory made by `bottlenecked init` or by training

MODEL is a directory, a .gguf file or smollm2, the default.
"""

import sys

from transformers import TextStreamer

from bottlenecked import CacheProcessor, CacheProcessorConfig, RewriteReport
from bottlenecked.backbones import describe, load
from bottlenecked.checkpoint import initial_weights
from bottlenecked.integrations.transformers import attach

QUESTION = "A farm has 12 hens. Each lays 5 eggs a week. How many eggs is that in 3 weeks? Think step by step."


def show(report: RewriteReport) -> None:
    """Called after each rewrite, before the next token is fed."""
    for event, begin, recalled in zip(report.events, report.window_begin, report.recalled, strict=True):
        print(f"  <- rewrote {begin}..{event.step_end - 1} and {recalled.shape[1]} recalled positions a layer")


def main() -> None:
    name = sys.argv[2] if len(sys.argv) > 2 else "smollm2"
    if len(sys.argv) > 1:
        processor = CacheProcessor.from_pretrained(sys.argv[1])
    else:
        config = CacheProcessorConfig(**describe(name), processor_dim=128, processor_heads=4, processor_mlp_dim=560)
        processor = CacheProcessor(config, initial_weights(config, random_scale=0.01))

    model, tokenizer = load(name)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with attach(model, processor, tokenizer, on_boundary=show) as attachment:
        model.generate(**inputs, max_new_tokens=120, do_sample=False, streamer=streamer)
    print(attachment.stats)


if __name__ == "__main__":
    main()
