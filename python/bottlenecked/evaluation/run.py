"""A whole evaluation: systems on the same problems and traces, resumable, to a directory.

OUTPUT/run.json                            what is evaluated on what
OUTPUT/predictions/SYSTEM.DATA.jsonl       a line per problem: text, tokens, number found, whether it is right
OUTPUT/predictions/SYSTEM.TRACES.jsonl     a line per example: summed cross-entropy and tokens
OUTPUT/metrics.json, table.md              the figures
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import backbones
from ..boundary import newline_token_ids
from ..config import CONFIG_FILE, MODEL_TYPE, WEIGHTS_FILE, BoundaryConfig, CacheProcessorConfig, read_object
from ..messages import loading
from ..training.config import differences
from ..training.data import Dataset, load_examples
from .answers import FLEXIBLE, STRICT, equal, extract
from .engines import DTYPES, VLLM, Batch, Engine, EngineSettings, System, Transformers
from .problems import ProblemSet, check_prompts, encode_problems, read_problems
from .records import RecordFile, write_json, write_text
from .statistics import compare_paired, share

PLAIN = "plain"
_FORMAT = 1
_NO_LIMIT = 1 << 30
_TRACES_AT_A_TIME = 8
_PACKAGES = ("bottlenecked", "torch", "transformers", "vllm", "lm_eval", "math-verify", "scipy")

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """template: as for `load_examples`. max_new_tokens: of an answer. limit: the first so many problems of each file.

    engine: "transformers" or "vllm". run: how it runs.
    """

    template: str = "auto"
    max_new_tokens: int = 512
    limit: int | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    run: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        counts = {"max_new_tokens": self.max_new_tokens, "limit": self.limit, "batch_size": self.run.batch_size}
        for name, value in {**counts, "threads": self.run.threads}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but it must be 1 or more")
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"engine is {self.engine!r}, but it must be transformers or vllm")
        if self.run.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.run.dtype!r}, but it must be one of {', '.join(DTYPES)}")
        if self.run.vllm and self.engine != "vllm":
            raise ValueError(f"vllm is {dict(self.run.vllm)}, but the engine is {self.engine}")


def parse_baseline(text: str, model: str) -> System:
    """A system as the command line names it: [NAME=]plain, PROCESSOR, MODEL or MODEL,PROCESSOR.

    model: whose Processor PROCESSOR is, and what "plain" is. Raises FileNotFoundError for what is neither.
    """
    name, _, what = text.rpartition("=")
    if what == PLAIN:
        return System(name or PLAIN, model)
    first, _, second = what.partition(",")
    if second:
        return System(name or Path(second).name, first, Path(second))
    if _is_processor(Path(first)):
        return System(name or Path(first).name, model, Path(first))
    backbones.locate(first)
    return System(name or Path(first).stem, first)


def evaluate(
    systems: Sequence[System],
    output: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] = (),
    traces: Sequence[str | os.PathLike[str]] = (),
    settings: Settings | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Metrics:
    """Evaluate systems, the first against each of the others; see the module's text. Returns what metrics.json holds.

    data: files as `read_problems` takes them. traces: JSONL as for training, held back from it; their cross-entropy is
        computed with the right answer so far given, the first tokens of steps apart from the rest.
    resume: go on in `output`; what is there must be of the same systems, files and settings. More systems and files
        may be given, and another limit.
    progress: bars on standard error, where that is a terminal.

    Raises ValueError, OSError, ImportError and NotImplementedError, each in one sentence; all that can be checked is
    checked before the first model is loaded.
    """
    settings = Settings() if settings is None else settings
    directory = Path(output)
    if directory.exists() and any(directory.iterdir()) and not resume:
        raise FileExistsError(f"--output {directory} is not empty: give another directory, or --resume it")
    if resume and not (directory / "run.json").exists():
        raise ValueError(f"{directory} holds nothing to resume: leave out --resume")
    if not data and not traces:
        raise ValueError("there is nothing to evaluate on: give --data or --traces")
    if traces and settings.engine == "vllm":
        raise ValueError("--traces needs --engine transformers: vLLM only writes answers")
    _check_names("systems", [s.name for s in systems], "name them: --baseline NAME=...")
    found = [read_problems(path) for path in data]
    _check_names("files", [s.name for s in found] + [Path(path).stem for path in traces], "rename one")
    described = {system.name: _describe(system, settings) for system in systems}

    main = systems[0].model
    tokenizers = {model: _load_tokenizer(model) for model in dict.fromkeys(s.model for s in systems)}
    encoded, held_back = _encode(systems, found, traces, tokenizers, settings)
    sets = encoded[main]
    fingerprint: dict[str, Any] = {
        "format": _FORMAT,
        "main": systems[0].name,
        "engine": settings.engine,
        "dtype": settings.run.dtype,
        "template": settings.template,
        "max_new_tokens": settings.max_new_tokens,
        "systems": described,
        "data": {s.name: {"kind": s.kind, "digest": s.digest} for s in found},
        "traces": {name: dataset.digest for name, dataset in held_back[main].items()},
    }
    if resume:
        fingerprint = _same_run(directory / "run.json", fingerprint)
    engine = _make_engine(settings, sets)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "run.json", fingerprint)

    answers: dict[str, dict[str, dict[str, Any]]] = {}
    losses: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for system in systems:
            for problems in encoded[system.model]:
                with RecordFile(directory / "predictions" / f"{system.name}.{problems.name}.jsonl") as file:
                    _answer(engine, system, problems, file, tokenizers[system.model], settings, progress)
                    answers.setdefault(problems.name, {})[system.name] = file.records
            for name, dataset in held_back[system.model].items():
                with RecordFile(directory / "predictions" / f"{system.name}.{name}.jsonl") as file:
                    assert isinstance(engine, Transformers)
                    _losses(engine, system, name, dataset, file, settings, progress)
                    losses.setdefault(name, {})[system.name] = file.records
    finally:
        engine.close()
    metrics: Metrics = {
        "run": fingerprint,
        "limit": settings.limit,
        "machine": _machine(),
        "data": {problems.name: _summary(problems, systems, answers[problems.name]) for problems in sets},
        "traces": {
            name: _trace_summary(dataset, systems, losses[name], settings) for name, dataset in held_back[main].items()
        },
    }
    write_json(directory / "metrics.json", metrics)
    write_text(directory / "table.md", table(metrics))
    return metrics


def table(metrics: Metrics) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    main = metrics["run"]["main"]
    if metrics["data"]:
        lines += [
            f"| data | system | n | accuracy | {main} - system | p | tokens each | unfinished | s | tokens/s | MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for name, found in metrics["data"].items():
        for system, s in found["systems"].items():
            pair = found["comparisons"].get(system)
            difference, p = ("", "") if pair is None else (_interval(pair["difference"], "+"), f"{pair['p_value']:.2g}")
            lines.append(
                f"| {name} | {system} | {s['problems']} | {_interval(s['accuracy'])} | {difference} | {p} "
                f"| {s['tokens'] / s['problems']:.1f} | {s['unfinished']} | {s['seconds']:.1f} "
                f"| {s['tokens_per_second']:.1f} | {s['memory'] / 1e6:.0f} |"
            )
    for name, found in metrics["data"].items():
        steps = next(iter(found["systems"].values()))["by_steps"]
        if len(steps) > 1:
            names = list(found["systems"])
            lines += ["", f"| {name}, steps | n | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
            for count, each in steps.items():
                shares = " | ".join(_interval(found["systems"][n]["by_steps"][count]["accuracy"]) for n in names)
                lines.append(f"| {count} | {each['problems']} | {shares} |")
    if metrics["traces"]:
        lines += [
            "",
            f"| traces | system | tokens | n | cross-entropy | {main} - system |",
            "|---|---|---|---|---|---|",
        ]
    for name, found in metrics["traces"].items():
        for system, s in found["systems"].items():
            for kind, each in s["kinds"].items():
                pair = found["comparisons"].get(system, {}).get("kinds", {}).get(kind)
                difference = (
                    "" if pair is None else f"{pair['difference']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}]"
                )
                lines.append(
                    f"| {name} | {system} | {kind} | {each['tokens']} | {each['cross_entropy']:.4f} | {difference} |"
                )
    return "\n".join(lines).lstrip("\n") + "\n"


# --- before a model is loaded -----------------------------------------------------------------------------------


def _check_names(what: str, names: Sequence[str], remedy: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {what} are called {name!r}: {remedy}")
        if "/" in name or not name.strip("."):
            raise ValueError(f"{name!r} names one of the {what}, but it must do as a file's name: {remedy}")


def _is_processor(path: Path) -> bool:
    try:
        return bool(read_object(path / CONFIG_FILE).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError):
        return False


def _describe(system: System, settings: Settings) -> dict[str, Any]:
    """What a system is, to tell it from another; ValueError where its Processor is for another model."""
    backbone = backbones.describe(system.model)["backbone"]
    found = {"model": system.model, "backbone": backbone, "processor": None, "processor_digest": None}
    if system.processor is None:
        return found
    wanted = CacheProcessorConfig.load(system.processor).backbone
    for key in ("architecture", "config_hash", *(["weights_hash"] if settings.run.check_weights else [])):
        if wanted.get(key) is not None and backbone.get(key) not in (None, wanted[key]):
            raise ValueError(
                f"the Processor in {system.processor} was made for a backbone with {key} {wanted[key]}, but "
                f"{system.model} has {backbone[key]}: give the model it was trained for"
            )
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((system.processor / name).read_bytes())
    return found | {"processor": str(system.processor), "processor_digest": digest.hexdigest()}


def _load_tokenizer(model: str) -> Any:
    backbones.locate(model)
    with loading(f"the tokenizer of {model}"):
        return backbones.load_tokenizer(model)


def _encode(
    systems: Sequence[System],
    found: Sequence[ProblemSet],
    traces: Sequence[str | os.PathLike[str]],
    tokenizers: Mapping[str, Any],
    settings: Settings,
) -> tuple[dict[str, list[ProblemSet]], dict[str, dict[str, Dataset]]]:
    """Problems and traces as tokens, by model; ValueError where these differ, since pairs are of the same tokens."""
    problems: dict[str, list[ProblemSet]] = {}
    held_back: dict[str, dict[str, Dataset]] = {}
    main = systems[0].model
    for model, tokenizer in tokenizers.items():
        sets = [encode_problems(each, tokenizer, template=settings.template) for each in found]
        problems[model] = [replace(each, problems=each.problems[: settings.limit]) for each in sets]
        check_prompts(problems[main], problems[model], model)
        held_back[model] = {
            Path(path).stem: load_examples(
                [path],
                tokenizer,
                template=settings.template,
                max_length=_NO_LIMIT,
                boundary=_boundary(systems, tokenizer),
            )
            for path in traces
        }
        for name, dataset in held_back[main].items():
            if dataset.digest != held_back[model][name].digest:
                raise ValueError(f"{model} reads {name} as other tokens, so its losses cannot be paired here")
    return problems, held_back


def _boundary(systems: Sequence[System], tokenizer: Any) -> BoundaryConfig:
    """What ends a step in traces: the same for all systems, or which tokens come first would depend on the system."""
    newlines = newline_token_ids(tokenizer)
    found: list[tuple[str, BoundaryConfig]] = []
    for system in systems:
        if system.processor is not None:
            boundary = CacheProcessorConfig.load(system.processor).boundary
            ids = boundary.token_ids or newlines
            kept = BoundaryConfig(
                rule="token_ids", token_ids=ids, min_step_length=boundary.min_step_length, timing=boundary.timing
            )
            found.append((system.name, kept))
    for name, boundary in found:
        if boundary != found[0][1]:
            raise ValueError(f"{name} ends steps elsewhere than {found[0][0]}: give --traces to one at a time")
    return found[0][1] if found else BoundaryConfig(token_ids=newlines)


def _same_run(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What is to be written there now; ValueError where it is of another run, listing what differs."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: start again in another directory") from None
    merged = dict(now)
    common = dict(before)
    for section in ("systems", "data", "traces"):
        merged[section] = before[section] | now[section]
        common[section] = {k: v for k, v in before[section].items() if k in now[section]}
        now = now | {section: {k: v for k, v in now[section].items() if k in before[section]}}
    if changed := differences(common, now):
        raise ValueError(f"{path} is of another run: {'; '.join(changed)}; use the same, or another directory")
    return merged


def _make_engine(settings: Settings, sets: Sequence[ProblemSet]) -> Engine:
    if settings.engine == "transformers":
        return Transformers(settings.run)
    return VLLM(settings.run, [p for found in sets for p in found.problems], settings.max_new_tokens)


# --- running ----------------------------------------------------------------------------------------------------


def _answer(
    engine: Engine,
    system: System,
    found: ProblemSet,
    file: RecordFile,
    tokenizer: Any,
    settings: Settings,
    progress: bool,
) -> None:
    """Answer what has not been answered yet."""
    missing = [p for p in found.problems if p.name not in file.records]
    if not missing:
        return
    with _bar(f"{found.name}, {system.name}", len(found.problems), len(missing), progress) as bar:
        for batch in engine.generate(system, missing, settings.max_new_tokens):
            file.append(_score(found, batch, tokenizer, engine.memory()))
            right = sum(record["right"] for record in file.records.values())
            bar.set_postfix_str(f"{right} of {len(file.records)} right", refresh=False)
            bar.update(len(batch.answers))


def _score(found: ProblemSet, batch: Batch, tokenizer: Any, memory: int) -> list[dict[str, Any]]:
    from ..training.tasks import is_exact

    records = []
    for answer in batch.answers:
        problem, text = answer.problem, tokenizer.decode(answer.tokens, skip_special_tokens=True)
        record = {"name": problem.name, "text": text, "tokens": len(answer.tokens), "stopped": answer.stopped}
        if found.kind == "number":
            number, strict = extract([text], FLEXIBLE)[0], extract([text], STRICT)[0]
            right = equal(problem.answer, number)
            record |= {"number": number, "reference": problem.answer, "right": right}
            record["strict"] = right if strict == number else equal(problem.answer, strict)
        else:
            record["right"] = is_exact(*problem.expected, answer.tokens)
        records.append(record | {"seconds": batch.seconds / len(batch.answers), "memory": memory})
    return records


def _losses(
    engine: Transformers,
    system: System,
    name: str,
    dataset: Dataset,
    file: RecordFile,
    settings: Settings,
    progress: bool,
) -> None:
    examples = list(dataset.examples)[: settings.limit]
    missing = sorted((e for e in examples if e.name not in file.records), key=lambda e: len(e.tokens), reverse=True)
    size = settings.run.batch_size or _TRACES_AT_A_TIME
    with _bar(f"{name}, {system.name}", len(examples), len(missing), progress) as bar:
        for begin in range(0, len(missing), size):
            batch = missing[begin : begin + size]
            found = engine.losses(system, batch)
            file.append(
                [
                    {"name": e.name, "sums": sums, "counts": counts}
                    for e, sums, counts in zip(batch, found.sums.tolist(), found.counts.tolist(), strict=True)
                ]
            )
            bar.update(len(batch))


def _bar(what: str, total: int, missing: int, progress: bool) -> Any:
    from tqdm import tqdm

    # None: only where standard error is a terminal.
    return tqdm(total=total, initial=total - missing, desc=what, file=sys.stderr, disable=None if progress else True)


# --- figures ----------------------------------------------------------------------------------------------------


def _summary(found: ProblemSet, systems: Sequence[System], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of one file: each system, and the first one against each of the others."""
    rows = {s.name: [records[s.name][p.name] for p in found.problems] for s in systems}
    right = {name: [record["right"] for record in each] for name, each in rows.items()}
    main = systems[0].name
    return {
        "file": str(found.path),
        "kind": found.kind,
        "systems": {name: _system_summary(found, each) for name, each in rows.items()},
        "comparisons": {
            name: asdict(compare_paired(each, right[main])) for name, each in right.items() if name != main
        },
    }


def _system_summary(found: ProblemSet, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens, seconds = sum(r["tokens"] for r in records), math.fsum(r["seconds"] for r in records)
    steps = sorted({p.steps for p in found.problems if p.steps})
    by_steps = {n: [r["right"] for p, r in zip(found.problems, records, strict=True) if p.steps == n] for n in steps}
    summary = {
        "problems": len(records),
        "right": sum(r["right"] for r in records),
        "accuracy": asdict(share([r["right"] for r in records])),
        "unfinished": sum(not r["stopped"] for r in records),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "memory": max(r["memory"] for r in records),
        "by_steps": {str(n): {"problems": len(of), "accuracy": asdict(share(of))} for n, of in by_steps.items()},
    }
    if found.kind == "number":
        summary["strict_accuracy"] = asdict(share([r["strict"] for r in records]))
    return summary


def _trace_summary(
    dataset: Dataset, systems: Sequence[System], records: Mapping[str, Mapping[str, Any]], settings: Settings
) -> dict[str, Any]:
    """Cross-entropy in nats per token, of all tokens, the first of every step, and the rest."""
    import torch

    from ..training.evaluate import KINDS, compare
    from ..training.rollout import Losses

    names = [e.name for e in list(dataset.examples)[: settings.limit]]
    found = {
        s.name: Losses(
            torch.tensor([records[s.name][n]["sums"] for n in names], dtype=torch.float64),
            torch.tensor([records[s.name][n]["counts"] for n in names]),
        )
        for s in systems
    }

    def kinds(losses: Losses) -> dict[str, Any]:
        made = {}
        for kind, columns in KINDS.items():
            count = int(losses.counts[:, list(columns)].sum())
            if count:
                total = float(losses.sums[:, list(columns)].sum())
                made[kind] = {"tokens": count, "cross_entropy": total / count}
        return made

    main = found[systems[0].name]
    return {
        "examples": len(names),
        "systems": {name: {"kinds": kinds(losses)} for name, losses in found.items()},
        "comparisons": {s.name: compare(found[s.name], main).to_dict() for s in systems[1:]},
    }


def _machine() -> dict[str, Any]:
    import torch

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.get_device_name() if used else None
    return {"platform": platform.platform(), "device": device, "threads": torch.get_num_threads(), "versions": versions}


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


__all__ = ["PLAIN", "Metrics", "Settings", "evaluate", "parse_baseline", "table"]
