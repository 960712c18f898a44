"""The commands around training: prepare, augment, train, merge and others. `bottlenecked.cli` adds them to its own."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..messages import loading

if TYPE_CHECKING:
    from .data import Dataset

commands = typer.Typer()
tasks = typer.Typer(help="Write problems of a synthetic multi-step task, or a tiny untrained model for them.")
commands.add_typer(tasks, name="synthesize")

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
    from .augment import augment_file
    from .data import write_lines

    refuse_existing(output)
    made = augment_file(file, copies=copies, seed=seed)
    if not made.lines:
        raise ValueError(f"{file}: not one of {made.problems} problems can be varied: {made.rejected}; nothing written")
    write_lines(made.lines, output)
    share = made.varied / made.problems
    print(f"wrote {output}: {len(made.lines):,} problems made from {made.varied:,} of {made.problems:,} ({share:.1%})")
    for reason, count in made.rejected.items():
        print(f"{count:8,}  {reason}")


@commands.command()
def train(
    backbone: Annotated[str, typer.Option(help=_BACKBONE)],
    data: Annotated[list[Path], typer.Option(help="JSONL to train on, never a test set; may be given repeatedly.")],
    output: Annotated[Path, typer.Option(help="Directory of the run: logs, checkpoints, results.")],
    config: Annotated[Path | None, typer.Option(help="YAML: docs/training.md lists its fields.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Fine-tune a backbone, then train a Processor for it; writes OUTPUT/backbone and OUTPUT/processor."""
    from .. import cli

    cli.quiet_libraries()
    from .config import TrainingConfig
    from .run import train as run

    settings = TrainingConfig() if config is None else TrainingConfig.load(config)
    print(run(backbone, data, output, settings, resume=resume).sentence())


@commands.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of LoRA adapters, as peft writes it.")],
    backbone: Annotated[str, typer.Option(help=_BACKBONE)],
    output: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
) -> None:
    """Write a backbone with LoRA adapters merged into its weights, for generate, eval, train and vLLM."""
    from .. import backbones, cli

    cli.quiet_libraries()
    backbones.merge_adapter(backbone, adapter, output)
    print(f"wrote {output}")


class Part(StrEnum):
    both = "both"
    keys = "keys"
    values = "values"


@commands.command()
def probe(
    files: Annotated[list[Path], typer.Argument(help="JSONL as for training; held-back problems are best.")],
    backbone: Annotated[str, typer.Option(help=_BACKBONE)],
    template: Annotated[str, typer.Option(help=_TEMPLATE)] = "auto",
    max_length: Annotated[int, typer.Option(help="Tokens; longer examples are left out.")] = 512,
    examples: Annotated[int, typer.Option(help="At most so many, drawn at random.")] = 400,
    part: Annotated[Part, typer.Option(help="Of the KV rows.")] = Part.both,
    seed: Annotated[int, typer.Option(help="Of the draw, the folds and the shuffled labels.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell, before training, whether a backbone's KV rows hold what a Processor would have to move."""
    from .. import cli

    model, tokenizer = cli.load_backbone(backbone, cli.DType.float32, option="--backbone")
    from .probe import conclusion
    from .probe import probe as probe_rows

    findings = probe_rows(
        model,
        tokenizer,
        files,
        template=unescape(template),
        max_length=max_length,
        max_examples=examples,
        part=part.value,
        seed=seed,
    )
    if as_json:
        print(json.dumps({"findings": [f.to_dict() for f in findings], "conclusion": conclusion(findings)}))
        return
    width = max(len(f.what) for f in findings)
    print(f"{'from which rows, what':{width}}  rows classes majority shuffled  best layer tells         verdict")
    for f in findings:
        best = f.layers[f.best]
        print(
            f"{f.what:{width}} {f.rows:5} {f.classes:7} {f.majority:8.3f} {f.shuffled:8.3f}  "
            f"{f.best:3}  {best.share:.3f} [{best.low:.3f}, {best.high:.3f}]  {f.verdict}"
        )
    print(f"\n{conclusion(findings)}")


_COUNT = "How many problems."
_OUTPUT = "JSONL file to write; it must not exist."
_STEPS = "Lines of an answer, least:most."
_WARM_UP = "Problems whose first step the first rewrite must prepare: a curriculum."


@tasks.command()
def chain(
    output: Annotated[Path, typer.Option(help=_OUTPUT)],
    count: Annotated[int, typer.Option(help=_COUNT)] = 10000,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    steps: Annotated[str, typer.Option(help=_STEPS)] = "1:5",
    modulus: Annotated[int, typer.Option(help="Numbers are below it.")] = 7,
    names: Annotated[int, typer.Option(help="Letters to choose from.")] = 20,
    leaves: Annotated[int, typer.Option(help="Operands that have a name.")] = 3,
    indirect: Annotated[float, typer.Option(help="Share of the steps whose operand is such a name.")] = 0.3,
    distractors: Annotated[int, typer.Option(help="Most definitions that nothing asks for.")] = 2,
    warm_up: Annotated[bool, typer.Option("--warm-up", help=_WARM_UP)] = False,
) -> None:
    """Follow a chain of definitions: mfa;gc5;a4;...;?m1."""
    from .tasks import ChainTask

    task = ChainTask(
        steps=_range(steps), modulus=modulus, names=names, leaves=leaves, indirect=indirect, distractors=distractors
    )
    _synthesize(task.warm_up() if warm_up else task, output, count, seed)


@tasks.command()
def registers(
    output: Annotated[Path, typer.Option(help=_OUTPUT)],
    count: Annotated[int, typer.Option(help=_COUNT)] = 10000,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    steps: Annotated[str, typer.Option(help=_STEPS)] = "3:8",
    registers: Annotated[int, typer.Option(help="How many; 4 is harder than 2.")] = 2,
    facts: Annotated[int, typer.Option(help="In the prompt.")] = 6,
    names: Annotated[int, typer.Option(help="Letters to choose from.")] = 10,
    classes: Annotated[int, typer.Option(help="Of names.")] = 2,
    advance: Annotated[float, typer.Option(help="Share of lines that advance a register: the hard ones.")] = 0.45,
    query: Annotated[float, typer.Option(help="Share of lines that look a fact up: the easy ones.")] = 0.2,
    repeat: Annotated[float, typer.Option(help="Share of lines about the register of the line before.")] = 0.0,
    look_ups: Annotated[bool, typer.Option("--look-ups", help="No advances: what a backbone learns first.")] = False,
    warm_up: Annotated[bool, typer.Option("--warm-up", help=_WARM_UP)] = False,
) -> None:
    """Run a register machine whose every line looks a fact of the prompt up."""
    from .tasks import RegisterTask

    if look_ups and warm_up:
        raise typer.BadParameter("give one of --look-ups and --warm-up", param_hint="--look-ups")
    task = RegisterTask(
        steps=_range(steps),
        registers=registers,
        facts=facts,
        names=names,
        classes=classes,
        advance=advance,
        query=query,
        repeat=repeat,
    )
    _synthesize(task.look_ups() if look_ups else task.warm_up() if warm_up else task, output, count, seed)


@tasks.command()
def backbone(
    output: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    layers: Annotated[int, typer.Option(help="Of the Llama.")] = 2,
    hidden_size: Annotated[int, typer.Option(help="Its width.")] = 64,
    mlp_size: Annotated[int, typer.Option(help="Width of its MLP.")] = 128,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="32 or more: vLLM on CPUs needs that.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest text in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make a tiny untrained Llama with a tokenizer for these tasks."""
    from .. import cli

    refuse_existing(output)
    cli.quiet_libraries()
    from .tasks import save_backbone, tiny_backbone

    model = tiny_backbone(
        layers=layers,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        seed=seed,
    )
    save_backbone(model, output)
    print(f"wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters, untrained")


def _synthesize(task: Any, output: Path, count: int, seed: int) -> None:
    from .data import write_lines
    from .tasks import synthesize

    refuse_existing(output)
    records = list(synthesize(task, count, seed=seed))
    write_lines(records, output)
    print(f"wrote {output}: {count:,} problems, such as\n{records[0]['question']}\n{records[0]['answer']}", end="")


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number or least:most", param_hint="--steps") from None


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
    with loading(f"the tokenizer of {backbone}"):
        return backbones.load_tokenizer(backbone)


def unescape(template: str) -> str:
    """A command line can hardly hold a newline: \\n stands for it."""
    return template.replace("\\n", "\n")


def _spread(values: list[int]) -> str:
    least, median, most, largest = values
    return f"{least} to {largest}, half up to {median}, 95% up to {most}"
