"""The commands around training data: prepare, augment. `bottlenecked.cli` adds them to its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .data import Dataset

commands = typer.Typer()

_BACKBONE = "A model's directory, a .gguf file, or smollm2."
_TEMPLATE = "chat (the tokenizer's), a text with {question} in it, or auto: chat if there is one, else the question."


@commands.command()
def prepare(
    files: Annotated[list[Path], typer.Argument(help="JSONL: question and answer, or messages, on each line.")],
    backbone: Annotated[str, typer.Option(help=_BACKBONE)],
    output: Annotated[Path | None, typer.Option(help="Directory to keep the tokens in.")] = None,
    template: Annotated[str, typer.Option(help=_TEMPLATE)] = "auto",
    max_length: Annotated[int, typer.Option(help="Tokens; longer examples are dropped.")] = 512,
    keep_marks: Annotated[bool, typer.Option("--keep-marks", help="Keep calculator marks, <<48/2=24>>.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check training files, print what they hold and what is dropped, and keep their tokens."""
    from .data import load_examples

    tokenizer = load_tokenizer(backbone)
    template = unescape(template)
    dataset = load_examples(
        files, tokenizer, template=template, max_length=max_length, cache_dir=output, keep_marks=keep_marks
    )
    found = statistics(dataset)
    if as_json:
        print(json.dumps(found))
        return
    first = dataset.examples[0]
    lines = {
        "examples": f"{found['examples']:,}",
        **{f"dropped, {reason}": f"{count:,}" for reason, count in dataset.dropped.items()},
        "tokens": f"{found['tokens']:,}, of which {found['learned_tokens']:,} are to be learned",
        "length": _spread(found["length"]),
        "steps": f"{_spread(found['steps'])}: " + ", ".join(f"{n}: {c:,}" for n, c in found["step_counts"].items()),
        "step length": f"{_spread(found['step_length'])}; longer than 96: {found['steps_longer_than_96']:.1%}",
        "digest": dataset.digest,
    }
    if output is not None:
        lines["kept in"] = str(output / f"{dataset.digest}.safetensors")
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    print(f"\n{first.name}, by steps:")
    for begin, end in first.segments:
        print(f"  {tokenizer.decode(first.tokens[begin:end])!r}")


@commands.command()
def augment(
    file: Annotated[Path, typer.Argument(help="JSONL: question and answer with calculator marks, <<48/2=24>>.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; it must not exist.")],
    copies: Annotated[int, typer.Option(help="At most so many of each problem, all different.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the numbers that are drawn.")] = 0,
) -> None:
    """Write copies of problems with other numbers, every calculation verified; print why others have none."""
    from .augment import augment_file, write_lines

    refuse_existing(output)
    made = augment_file(file, copies=copies, seed=seed)
    if not made.lines:
        raise ValueError(f"{file}: not one of {made.problems} problems can be varied: {made.rejected}; nothing written")
    write_lines(made.lines, output)
    share = made.varied / made.problems
    print(f"wrote {output}: {len(made.lines):,} problems made from {made.varied:,} of {made.problems:,} ({share:.1%})")
    for reason, count in made.rejected.items():
        print(f"{count:8,}  {reason}")


def refuse_existing(output: Path) -> None:
    """Data that a run was trained on is not to change under its name."""
    if output.exists():
        raise FileExistsError(f"--output {output} exists: give another name, or remove it")


def statistics(dataset: Dataset) -> dict[str, Any]:
    """What `prepare` prints: counts, and [least, median, 95 of 100, largest] of lengths in tokens and of steps."""
    import numpy as np

    def spread(values: Any) -> list[int]:
        return [int(v) for v in np.percentile(values, (0, 50, 95, 100), method="lower")]

    lengths, steps = dataset.lengths(), dataset.num_steps()
    step_lengths = np.array([end - begin for e in dataset.examples for begin, end in e.segments[1:]])
    return {
        "examples": len(dataset.examples),
        "dropped": dataset.dropped,
        "tokens": int(lengths.sum()),
        "learned_tokens": sum(sum(e.loss_mask) for e in dataset.examples),
        "length": spread(lengths),
        "steps": spread(steps),
        "step_counts": {int(n): int(c) for n, c in zip(*np.unique(steps, return_counts=True), strict=True)},
        "step_length": spread(step_lengths),
        "steps_longer_than_96": float((step_lengths > 96).mean()),
        "digest": dataset.digest,
    }


def load_tokenizer(backbone: str) -> Any:
    """Quietly and offline; ValueError in one sentence where it cannot be loaded."""
    from .. import backbones, cli

    backbones.locate(backbone)
    cli.quiet_libraries()
    try:
        return backbones.load_tokenizer(backbone)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries that read the files raise
        raise ValueError(f"the tokenizer of {backbone} cannot be loaded: {error}") from None


def unescape(template: str) -> str:
    """A command line can hardly hold a newline: \\n stands for it."""
    return template.replace("\\n", "\n")


def _spread(values: list[int]) -> str:
    least, median, most, largest = values
    return f"{least} to {largest}, half up to {median}, 95% up to {most}"
