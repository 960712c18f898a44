"""make demo: SmolLM2-135M-Instruct answers a question while our C extension rewrites its KV cache at every newline;
then a model so small that it is in the repository, with its trained Processor."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May? Think step by step, one step per line."
)
TOKENS = "160"
COMMAND = (sys.executable, "-m", "bottlenecked")
MARK = "[step of "  # how `generate` begins the line that marks a boundary
TRAINED = Path(__file__).resolve().parent.parent / "checkpoints" / "registers"
PROBLEMS = "1000"


def title(text: str) -> None:
    print(f"\n\x1b[1m== {text} ==\x1b[0m" if sys.stdout.isatty() else f"\n== {text} ==", flush=True)


def generate(*options: str) -> str:
    """Streams one generation to the screen and returns its text, without the marks."""
    command = (*COMMAND, "generate", "--model", "smollm2", "--prompt", QUESTION, "--max-new-tokens", TOKENS, *options)
    text = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 4096):
            text += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    if process.returncode != 0:
        sys.exit(process.returncode)
    lines = text.decode("utf-8").splitlines()
    return "\n".join(line for line in lines if line and not line.startswith(MARK))


def init(output: Path, *options: str) -> None:
    size = ("--processor-dim", "128", "--processor-heads", "4", "--processor-mlp-dim", "560")
    subprocess.run((*COMMAND, "init", "--backbone", "smollm2", "--output", str(output), *size, *options), check=True)


def trained(directory: Path) -> None:
    """Prints whole answers that are right with the register machine's Processor and without."""
    problems, model, processor = directory / "registers.jsonl", TRAINED / "backbone", TRAINED / "processor"
    made = ("--registers", "4", "--seed", "5", "--count", PROBLEMS, "--output", str(problems))
    subprocess.run((*COMMAND, "synthesize", "registers", *made), check=True)
    used = ("--model", str(model), "--processor", str(processor), "--baseline", "plain")
    told = ("--data", str(problems), "--output", str(directory / "evaluation"), "--threads", "1")
    subprocess.run((*COMMAND, "eval", *used, *told), check=True)


def main() -> int:
    print("Question:", QUESTION)
    with tempfile.TemporaryDirectory(prefix="bottlenecked-demo-") as directory:
        identity, noise = Path(directory, "identity"), Path(directory, "noise")
        title("two untrained Processors: the identity, and small random weights")
        init(identity)
        init(noise, "--random-scale", "0.1", "--seed", "1")
        title("stock transformers")
        stock = generate()
        title("with the identity Processor: its KV cache rewritten at every newline, by nothing")
        same = generate("--processor", str(identity))
        title("with the random Processor")
        other = generate("--processor", str(noise))
        title("a trained Processor, for a tiny model and a task that lacks just that: whole answers that are right")
        trained(Path(directory))
    title("what you saw")
    print("identity Processor: text", "equal to stock" if same == stock else "DIFFERENT FROM STOCK")
    print("random Processor:   text", "different from stock" if other != stock else "EQUAL TO STOCK")
    print(
        "Neither improves anything: one does nothing, the other adds noise. A Processor has to be trained for its\n"
        "backbone before it helps, as the tiny model's was. docs/evidence.md says what that shows, and what not."
    )
    return 0 if same == stock and other != stock else 1


if __name__ == "__main__":
    sys.exit(main())
