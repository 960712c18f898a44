"""Model cards: the README.md of what a run exports, and the same facts as `training` in a Processor's config.json."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .trainer import BackboneTrainer, ProcessorTrainer, Trainer


def training_record(
    trainer: Trainer, *, files: list[str] | None = None, evaluation: Evaluation | None = None
) -> dict[str, Any]:
    """How it was made: JSON values. files: names of the data files."""
    config = trainer.config
    return {
        "method": trainer.name,
        "data": {"files": files or [], "digest": trainer.data.digest, "examples": len(trainer.data.examples)},
        "seed": config.seed,
        "iterations": trainer.iteration,
        "license": config.license,
        "config": config.to_dict(),
        "evaluation": None if evaluation is None else evaluation.to_dict(),
    }


def processor_card(
    trainer: ProcessorTrainer, *, files: list[str] | None = None, evaluation: Evaluation | None = None
) -> str:
    """Of a Processor."""
    config = trainer.processor.config
    name = config.backbone.get("name") or config.backbone.get("architecture")
    template = trainer.config.data.template.replace("\n", "\\n")
    option = "" if template == "auto" else f"--template {shlex.quote(template)} "
    text = f"""
# Cache Processor for {name}

Rewrites the KV cache of its backbone at the end of every reasoning step
([arXiv 2505.16950](https://arxiv.org/abs/2505.16950)). Made with `bottlenecked`; it works with this backbone only:

```
bottlenecked generate --model BACKBONE --processor THIS_DIRECTORY {option}--prompt "..."
```

| | |
|---|---|
| backbone | {name}, {config.backbone.get("architecture")}, weights {config.backbone.get("weights_hash")} |
| parameters | {config.num_parameters():,} |
| top_k, recent_window | {config.top_k}, {config.recent_window} |
"""
    return (
        _front_matter(trainer, ["kv-cache", "cache-processor"], name)
        + text.lstrip()
        + _facts(trainer, files)
        + ("" if evaluation is None else _table(evaluation))
    )


def backbone_card(
    trainer: BackboneTrainer, *, files: list[str] | None = None, evaluation: Evaluation | None = None
) -> str:
    """Of a fine-tuned backbone."""
    name = trainer.fingerprint()["backbone"]["name"]
    text = f"# {name}, fine-tuned\n\nBy supervised fine-tuning on reasoning traces, with `bottlenecked`.\n\n"
    text += "| | |\n|---|---|\n"
    if evaluation is not None:
        found = evaluation.kinds["all"]
        text += f"| held-back cross-entropy | {found.processor:.4f} nats per token, n = {evaluation.examples} |\n"
    return _front_matter(trainer, ["text-generation"], name) + text + _facts(trainer, files)


def _front_matter(trainer: Trainer, tags: list[str], base: Any) -> str:
    lines = ["---", "library_name: bottlenecked", f"tags: [{', '.join(tags)}]"]
    lines += [f"base_model: {base}"] if base else []
    lines += [f"license: {trainer.config.license}"] if trainer.config.license else []
    return "\n".join([*lines, "---", "", ""])


def _facts(trainer: Trainer, files: list[str] | None) -> str:
    data = trainer.data
    return (
        f"| data | {', '.join(files or []) or 'not stated'}: {len(data.examples):,} examples, "
        f"{len(trainer.held_back.examples):,} more held back; digest {data.digest[:16]} |\n"
        f"| seed, iterations | {trainer.config.seed}, {trainer.iteration} |\n"
        f"| licence | {trainer.config.license or 'not stated'} |\n"
    )


def _table(evaluation: Evaluation) -> str:
    lines = [
        "",
        f"Cross-entropy on {evaluation.examples} held-back examples, nats per token, with its 95% interval (paired "
        "bootstrap over",
        "examples). It is teacher-forced and says nothing about the accuracy of answers.",
        "",
        "| tokens | number | without | with | difference |",
        "|---|---|---|---|---|",
    ]
    names = {"all": "all", "first": "first of a step", "rest": "rest"}
    for kind, c in evaluation.kinds.items():
        interval = f"{c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]"
        lines.append(f"| {names[kind]} | {c.tokens:,} | {c.identity:.4f} | {c.processor:.4f} | {interval} |")
    return "\n".join([*lines, ""])


__all__ = ["backbone_card", "processor_card", "training_record"]
