"""make train-demo: from nothing to a tiny language model and a Processor that helps it, on one CPU core in minutes.

The task is a register machine (`bottlenecked.training.tasks.RegisterTask`). The prompt holds facts, "ab;" for f(a) = b.
Then lines come: "A=a1" sets a register, "A>b0" advances it to f(A), and "?cd" asks for f(c) = d. To advance a register
the model must find which name it holds, some lines before, and then look that name up in the prompt: one look-up too
many for its two layers. At the end of a line the Processor can write what the line has just looked up into the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from bottlenecked import CacheProcessor, backbones
from bottlenecked.evaluation.statistics import share
from bottlenecked.integrations.transformers import attach
from bottlenecked.training.data import load_examples
from bottlenecked.training.tasks import RegisterTask, exact_match, save_backbone, synthesize, tiny_backbone

COMMAND = (sys.executable, "-m", "bottlenecked")
TASK = RegisterTask(steps=(3, 6))
TEST = 500

CONFIG = {
    "data": {"max_length": 64, "held_back": 500},
    "sft": {
        "iterations": 2000,
        "batch_size": 64,
        "learning_rate": 4e-3,
        "warmup": 50,
        "schedule": "linear",
        # Look-ups first: without them the rest is not learned.
        "curriculum": {"files": ["look_ups.jsonl"], "iterations": 600},
        "evaluate_every": 1000,
    },
    "processor": {
        "dim": 64,
        "heads": 4,
        "mlp_dim": 128,
        "top_k": 4,
        "recent_window": 4,
        "gate": 0.0,
        "rewrite_prompt": False,
        "iterations": 1800,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "warmup": 50,
        "schedule": "linear",
        # Lines that advance the register of the line before: the first calls have work to do.
        "curriculum": {"files": ["warm_up.jsonl"], "iterations": 700},
        "evaluate_every": 300,
    },
}


def title(text: str) -> None:
    print(f"\n\x1b[1m== {text} ==\x1b[0m" if sys.stdout.isatty() else f"\n== {text} ==", flush=True)


def run(*arguments: str) -> None:
    print("$ bottlenecked", *arguments, flush=True)
    # A model this small is no faster with two threads, and much slower where the cores have other work too.
    subprocess.run((*COMMAND, *arguments), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to make; it must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of model, data and training")
    options = parser.parse_args()
    began, output, seed = time.perf_counter(), options.output, options.seed
    output.mkdir(parents=True)

    title("problems, and an untrained model of two layers")
    sizes = {"train": (TASK, 30000), "look_ups": (TASK.look_ups(), 10000), "warm_up": (TASK.warm_up(), 15000)}
    files = {name: output / f"{name}.jsonl" for name in (*sizes, "test")}
    for number, (name, (task, count)) in enumerate((sizes | {"test": (TASK, TEST)}).items()):
        records = synthesize(task, count, seed=10 * seed + number)
        files[name].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    save_backbone(tiny_backbone(seed=seed), output / "untrained")
    config = CONFIG | {"seed": seed}
    for stage in ("sft", "processor"):
        of_stage = config[stage]["curriculum"]
        of_stage["files"] = [str(output / Path(file).name) for file in of_stage["files"]]
    (output / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    first = next(iter(synthesize(TASK, 1, seed=10 * seed + 3)))
    print(first["question"], first["answer"], sep="\n")

    title("fine-tuning it, then training its Processor")
    trained = output / "run"
    data = ("--data", str(files["train"]), "--config", str(output / "train.yaml"))
    run("train", "--backbone", str(output / "untrained"), *data, "--output", str(trained))

    title(f"whole answers right, of {TEST} that nobody has seen")
    torch.set_num_threads(1)
    model, tokenizer = backbones.load(trained / "backbone")
    processor = CacheProcessor.from_pretrained(trained / "processor")
    examples = load_examples([files["test"]], tokenizer, max_length=64).examples
    print(f"{'without a Processor':20} {share(exact_match(model, examples))}", flush=True)
    with attach(model, processor, tokenizer):
        print(f"{'with it':20} {share(exact_match(model, examples))}", flush=True)

    title("the same checkpoint in `generate`")
    used = ("--model", str(trained / "backbone"), "--processor", str(trained / "processor"))
    run("generate", *used, "--prompt", first["question"], "--max-new-tokens", "24", "--threads", "1")

    last = json.loads((trained / "processor.evaluations.jsonl").read_text().splitlines()[-1])
    found = last["kinds"]["all"]
    title("what you saw")
    print(
        f"held-back cross-entropy with the Processor {found['processor']:.4f}, without {found['identity']:.4f}: "
        f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] nats per token\n"
        f"(n = {last['examples']} examples, {found['tokens']:,} tokens); {time.perf_counter() - began:.0f} s in all.\n"
        f"{trained}/backbone and {trained}/processor are a model and a Processor like any other.\n"
        "It shows that training works. That a Processor is a better use of its parameters than one more layer of the\n"
        "backbone is not shown (docs/evidence.md)."
    )
    return 0 if found["high"] < 0 else 1


if __name__ == "__main__":
    sys.exit(main())
