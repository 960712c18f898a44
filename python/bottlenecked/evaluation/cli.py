"""The commands eval and lm-eval. `bottlenecked.cli` adds them to its own."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

commands = typer.Typer()


class EngineName(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


@commands.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A model's directory, a .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option(help="Directory of predictions, metrics.json and table.md.")],
    processor: Annotated[
        Path | None, typer.Option(help="A Processor's directory; without it: the plain model.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Problems: GSM8K, GSM-Hard (JSONL), SVAMP (JSON), synthetic; may be given repeatedly."),
    ] = None,
    traces: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL as for training, held back from it: cross-entropy; may be given repeatedly."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]plain, PROCESSOR, MODEL or MODEL,PROCESSOR, on the same items; repeatedly."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="What writes the answers.")] = EngineName.transformers,
    template: Annotated[
        str, typer.Option(help="chat (the tokenizer's), a text with {question} in it, or auto, as in training.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Upper limit of an answer's length.")] = 512,
    limit: Annotated[int | None, typer.Option(help="The first so many problems of each file.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers at a time (32; vllm: 128; traces: 8).")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV cache: float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU where there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of a CPU; default: torch's.")] = None,
    other_weights: Annotated[
        bool, typer.Option("--other-weights", help="Take a Processor made for other weights of this architecture.")
    ] = False,
    vllm_options: Annotated[str, typer.Option(help="JSON: further arguments of vLLM's LLM.")] = "{}",
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --output, perhaps with more baselines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json instead of the table.")] = False,
) -> None:
    """Accuracy, with intervals, of a model with a Processor, and of others on the same problems."""
    try:
        options = json.loads(vllm_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{vllm_options!r} is not a JSON object", param_hint="--vllm-options")
    from .. import cli
    from ..training.cli import unescape

    cli.quiet_libraries()
    from .engines import EngineSettings, System
    from .run import PLAIN, Settings, parse_baseline, table
    from .run import evaluate as run

    settings = Settings(
        template=unescape(template),
        max_new_tokens=max_new_tokens,
        limit=limit,
        engine=engine.value,
        run=EngineSettings(
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            threads=threads,
            check_weights=not other_weights,
            vllm=options,
        ),
    )
    main = System(PLAIN if processor is None else "processor", model, processor)
    systems = [main, *(parse_baseline(text, model) for text in baseline or [])]
    metrics = run(
        systems, output, data=data or [], traces=traces or [], settings=settings, resume=resume, progress=True
    )
    print(json.dumps(metrics) if as_json else table(metrics), end="\n" if as_json else "")


@commands.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def lm_eval(context: typer.Context) -> Any:
    """Run lm-eval-harness with the model type bottlenecked; all options are lm-eval's own."""
    from .harness import main

    main(context.args)
