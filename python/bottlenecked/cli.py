"""The `bottlenecked` command: info, init, generate, serve, bench; training's and evaluation's are added to it.

Standard output carries the answer only (text or one JSON object); everything else goes to standard error. An
error of the user's making is one sentence there and a non-zero exit status: 2 for the command line itself, 1
otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .evaluation.cli import commands as evaluation_commands
from .messages import loading, sentence
from .training.cli import commands as training_commands
from .training.cli import unescape

if TYPE_CHECKING:
    from .config import CacheProcessorConfig
    from .processor import RewriteReport

app = typer.Typer(
    help="Language models that think in their KV cache (arXiv 2505.16950).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(training_commands)
app.add_typer(evaluation_commands)

_PACKAGES = ("numpy", "safetensors", "torch", "transformers", "gguf", "vllm")


class DType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class CacheKind(StrEnum):
    dynamic = "dynamic"
    static = "static"


class KeySpace(StrEnum):
    rotated = "rotated"
    unrotated = "unrotated"


class Timing(StrEnum):
    post = "post"
    pre = "pre"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    arguments: without the program's name; None means sys.argv.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="bottlenecked", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # The reader has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:
        return 130
    except MemoryError:
        return _fail("out of memory: use a smaller model, Processor or --dtype")
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        return _fail(sentence(error))
    except Exception as error:
        # What the command-line library raises for a wrong command line; its name differs between versions.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(error.format_message())
            return int(error.exit_code)
        raise


@app.command()
def info(
    processor: Annotated[Path | None, typer.Option(help="A Processor's directory: what it takes in memory.")] = None,
    batch: Annotated[int | None, typer.Option(help="For this many sequences at once (1).")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of at most this many cache positions (4096).")] = None,
    threads: Annotated[int | None, typer.Option(help="On this many threads (1).")] = None,
    dtype: Annotated[DType | None, typer.Option(help="With a KV cache of this dtype (float32).")] = None,
    where: Annotated[
        str | None, typer.Option("--backend", help="On cpu, cuda, or another backend that there is (cpu).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Versions, backends, instruction set, CUDA; what a Processor takes in memory."""
    import bottleneck_ext

    from .processor import native_weight_dtype

    about_memory = {"--batch": batch, "--tokens": tokens, "--threads": threads, "--dtype": dtype, "--backend": where}
    for option, given in about_memory.items():
        if given is not None and processor is None:
            raise typer.BadParameter("is about a Processor's memory: give --processor too", param_hint=option)
    build = bottleneck_ext.build_info()
    backend = bottleneck_ext.default_backend()
    found: dict[str, Any] = {
        "version": bottleneck_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "build": {key: value for key, value in build.items() if key != "cuda"},
        "backends": [entry["name"] for entry in bottleneck_ext.backends() if entry["available"]],
        "instruction_set": backend.partition(":")[2],
        "weight_dtype": native_weight_dtype(backend),
        "cuda": build["cuda"],
    }
    if processor is not None:
        found["memory"] = _memory(
            processor,
            batch=1 if batch is None else batch,
            tokens=4096 if tokens is None else tokens,
            threads=1 if threads is None else threads,
            dtype=DType.float32 if dtype is None else dtype,
            backend="cpu" if where is None else where,
        )
    if as_json:
        print(json.dumps(found))
        return
    cuda = found["cuda"]
    lines = {
        "bottlenecked": found["version"],
        "python": f"{found['python']} on {found['platform']}",
        **{name: version or "not installed" for name, version in found["packages"].items()},
        "compiler": build["compiler"],
        "backends": ", ".join(found["backends"]),
        "instruction set": found["instruction_set"],
        "weights": f"{found['weight_dtype']}, unless told otherwise",
        "CUDA": f"compiled for {', '.join(cuda['architectures'])}"
        if cuda["compiled"]
        else "not compiled in: this is a CPU-only build",
        "CUDA device": cuda["device"] or "none",
        "CUDA driver": cuda["driver"] or "not found",
        "cuBLASLt": cuda["cublaslt"] or "not found",
    }
    if memory := found.get("memory"):
        lines |= {
            "memory": f"{memory['batch']} x {memory['tokens']} tokens, {memory['dtype']}, {memory['threads']} threads, "
            f"{memory['backend']}",
            "  weights": f"{_size(memory['weights'])}, {memory['weight_dtype']}",
            "  query store": f"{_size(memory['query_store'])}, {_size(memory['query_store_per_sequence'])} a sequence",
            "  workspace": _size(memory["workspace"]),
        }
    for name, value in lines.items():
        print(f"{name:16} {value}")


def _memory(directory: Path, *, batch: int, tokens: int, threads: int, dtype: DType, backend: str) -> dict[str, Any]:
    """Bytes that a Processor takes at most for `batch` sequences of up to `tokens` cache positions."""
    from .processor import CacheProcessor

    processor = CacheProcessor.from_pretrained(directory, backend=backend)
    config = processor.config
    element = 4 if dtype is DType.float32 else 2
    queries = config.num_layers * config.recent_window * config.num_query_heads * config.head_dim * element
    return {
        "processor": str(directory),
        "batch": batch,
        "tokens": tokens,
        "threads": threads,
        "dtype": dtype.value,
        "backend": processor.backend,
        "weight_dtype": processor.weight_dtype,
        "weights": processor.nbytes,
        "query_store_per_sequence": queries,
        "query_store": batch * queries,
        "workspace": processor.native.workspace_bytes(threads, batch, tokens, cache_dtype=dtype.value),
    }


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


@app.command()
def init(
    backbone: Annotated[
        str, typer.Option(help="A model's directory (its config.json is enough), a .gguf file, or smollm2.")
    ],
    output: Annotated[Path | None, typer.Option(help="Directory to write.")] = None,
    processor_dim: Annotated[int, typer.Option(help="Width of the Processor's block, d_p.")] = 512,
    processor_heads: Annotated[int, typer.Option(help="Heads of its attention.")] = 16,
    processor_mlp_dim: Annotated[int, typer.Option(help="Width of its gated MLP.")] = 2240,
    top_k: Annotated[int, typer.Option(help="Earlier positions recalled per layer.")] = 32,
    recent_window: Annotated[int, typer.Option(help="Tokens of a step that are rewritten, at most 256.")] = 96,
    random_scale: Annotated[
        float, typer.Option(help="Standard deviation of the output matrices; 0 is the identity.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    boundary_token_ids: Annotated[
        str | None,
        typer.Option(help="Token ids that end a step, such as 198,271; else the tokens with a newline."),
    ] = None,
    min_step_length: Annotated[int, typer.Option(help="Shorter steps go on.")] = 1,
    timing: Annotated[Timing, typer.Option(help="Rewrite after the line-ending token's KV, or before.")] = Timing.post,
    key_space: Annotated[KeySpace, typer.Option(help="Keys as cached, or with RoPE undone.")] = KeySpace.rotated,
    rewrite_prompt: Annotated[bool, typer.Option(help="Treat the prompt as a step.")] = True,
    norm_eps: Annotated[float, typer.Option(help="Epsilon of the RMS norms.")] = 1e-6,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing Processor.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the size and write nothing.")] = False,
) -> None:
    """Make a new Processor for a backbone: the identity, unless --random-scale says otherwise."""
    from . import backbones
    from .checkpoint import initial_weights, save_checkpoint
    from .config import BoundaryConfig, CacheProcessorConfig

    if output is None and not dry_run:
        raise typer.BadParameter("give a directory to write, or --dry-run", param_hint="--output")
    if random_scale < 0:
        raise typer.BadParameter(f"{random_scale} is negative: give 0 or more", param_hint="--random-scale")
    if boundary_token_ids is not None:
        rule, token_ids = "token_ids", _token_ids(boundary_token_ids)
    else:
        rule, token_ids = "newline", backbones.tokenizer_newline_ids(backbone) or ()
    described = backbones.describe(backbone)
    config = CacheProcessorConfig(
        **described,
        processor_dim=processor_dim,
        processor_heads=processor_heads,
        processor_mlp_dim=processor_mlp_dim,
        top_k=top_k,
        recent_window=recent_window,
        rewrite_prompt=rewrite_prompt,
        key_space=key_space.value,
        norm_eps=norm_eps,
        boundary=BoundaryConfig(
            rule=rule,  # type: ignore[arg-type]
            token_ids=token_ids,
            min_step_length=min_step_length,
            timing=timing.value,
        ),
        training={"method": "none", "random_scale": random_scale, "seed": seed},
    )
    if output is not None:
        _check_output(output, force=force)
    if not token_ids:
        print(
            f"bottlenecked: {backbone} has no tokenizer we can read, so the line-ending tokens are found when a "
            "tokenizer is attached; --boundary-token-ids fixes them now",
            file=sys.stderr,
        )
    if output is not None and not dry_run:
        save_checkpoint(output, config, initial_weights(config, random_scale=random_scale, seed=seed))
    _print_size(config, output, "random" if random_scale else "identity", dry_run)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A model's directory, a .gguf file, or smollm2.")],
    processor: Annotated[Path | None, typer.Option(help="A Processor's directory; without it: stock text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to say to the model.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The same, from a UTF-8 file; - is standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Upper limit of the answer's length.")] = 256,
    dtype: Annotated[DType, typer.Option(help="Of weights and KV cache.")] = DType.float32,
    threads: Annotated[int | None, typer.Option(help="For model and rewrite; default: torch's.")] = None,
    cache: Annotated[CacheKind, typer.Option(help="Kind of KV cache.")] = CacheKind.dynamic,
    template: Annotated[
        str, typer.Option(help="chat (the tokenizer's), a text with {question} in it, or auto, as in training.")
    ] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without a template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat template.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; default: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much of the probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Generate text while a Processor rewrites the KV cache after every step; marks where and how much."""
    text = _prompt(prompt, prompt_file)
    for option, value in (("--max-new-tokens", max_new_tokens), ("--threads", threads)):
        if value is not None and value < 1:
            raise typer.BadParameter(f"{value} is not positive", param_hint=option)
    if temperature is not None and not temperature > 0:
        raise typer.BadParameter(f"{temperature} is not positive; leave it out for greedy", param_hint="--temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise typer.BadParameter(f"{top_p} is not in (0, 1]", param_hint="--top-p")
    if raw and template != "auto":
        raise typer.BadParameter("leave it out: --raw sends the prompt alone", param_hint="--template")
    if processor is not None:
        # Before the model, which takes longer.
        from .processor import CacheProcessor

        loaded = CacheProcessor.from_pretrained(processor)
    lm, tokenizer = load_backbone(model, dtype, option="--model")
    import torch

    from .integrations.transformers import attach

    if threads is not None:
        torch.set_num_threads(threads)
    inputs = _encode(tokenizer, text, raw=raw, template=unescape(template), system=system)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise typer.BadParameter("the prompt has no tokens", param_hint="--prompt")
    sampling = temperature is not None or top_p is not None
    settings: dict[str, Any] = {"do_sample": sampling, "temperature": None, "top_p": None, "top_k": None}
    if sampling:
        torch.manual_seed(seed)
        settings |= {"temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}
    if lm.generation_config.pad_token_id is None and tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id

    reports: list[RewriteReport] = []
    writer = None if as_json else _Writer(tokenizer)

    def on_boundary(report: RewriteReport) -> None:
        reports.append(report)
        if writer is not None:
            writer.mark(_mark(report, writer.fancy))

    attachment: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if processor is not None:
        attachment = attach(lm, loaded, tokenizer, num_threads=threads, on_boundary=on_boundary)
    with attachment:
        begin = time.perf_counter()
        output = lm.generate(
            **inputs,
            **settings,
            max_new_tokens=max_new_tokens,
            cache_implementation=cache.value,
            streamer=writer,
        )
        seconds = time.perf_counter() - begin
    token_ids: list[int] = output[0, length:].tolist()
    if as_json:
        answer = {
            "token_ids": token_ids,
            "text": tokenizer.decode(token_ids, skip_special_tokens=True),
            "boundaries": [_boundary(report) for report in reports],
            "seconds": seconds,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    count = len(token_ids)
    print(
        f"{count} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s), {len(reports)} boundaries",
        file=sys.stderr,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What vLLM is to serve: a directory, a name it knows, or smollm2.")],
    processor: Annotated[Path, typer.Option(help="A Processor's directory.")],
) -> None:
    """Run vLLM's OpenAI server with a Processor; further options are vLLM's own."""
    from .integrations.vllm.serve import serve as run

    run(model, processor, context.args)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> int:
    """Run the benchmarks of a checkout: what python -m benchmarks does; --help lists its cases and options."""
    # As `python -m` looks for it: here first.
    spec = importlib.machinery.PathFinder.find_spec("benchmarks", [os.getcwd(), *sys.path])
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    if not any((Path(place) / "peak.c").is_file() for place in places):
        raise ImportError(
            "bench needs the package benchmarks, which is not installed: run it in a checkout's directory"
        )
    return subprocess.call([sys.executable, "-m", "benchmarks", *context.args])


class _Writer:
    """A streamer, one token late: a step's mark belongs before the token that was sampled when it ended."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fancy = _encodes("▁▂▃▄▅▆▇█·–")
        self.color = sys.stdout.isatty()
        self.tokens: list[int] = []
        self.written = ""
        self.held: int | None = None
        self.in_prompt = True

    def put(self, value: Any) -> None:
        if self.in_prompt:
            self.in_prompt = False
            return
        self._release()
        self.held = int(value.reshape(-1)[0])

    def end(self) -> None:
        self._release()
        self._write(final=True)
        if not self.written.endswith("\n"):
            print(flush=True)

    def mark(self, text: str) -> None:
        self._write(final=False)
        lead = "" if self.written.endswith("\n") or not self.written else "\n"
        print(f"{lead}\x1b[2m{text}\x1b[0m" if self.color else f"{lead}{text}", flush=True)

    def _release(self) -> None:
        if self.held is not None:
            self.tokens.append(self.held)
            self.held = None
            self._write(final=False)

    def _write(self, *, final: bool) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and not final:
            return  # part of a character
        if not _encodes(text):
            text = text.encode("ascii", "replace").decode()
        print(text[len(self.written) :], end="", flush=True)
        self.written = text


def _boundary(report: RewriteReport) -> dict[str, Any]:
    """Of the only sequence there is. Without padding, cache positions are token positions."""
    return {
        "begin": report.window_begin[0],
        "end": report.events[0].step_end,
        "recalled": report.recalled[0].tolist(),
        "delta_norm": report.delta_norm[:, 0].tolist(),
    }


def _mark(report: RewriteReport, fancy: bool) -> str:
    """One line: length of the step, recalled positions of all layers, edit relative to the rows it went to."""
    event = report.events[0]
    recalled = report.recalled[0]
    positions = sorted({int(position) for layer in recalled for position in layer})
    relative = [
        float(delta / row) if row else 0.0
        for delta, row in zip(report.delta_norm[:, 0], report.row_norm[:, 0], strict=True)
    ]
    words = [
        f"step of {event.step_end - event.step_begin}, "
        f"{report.window_begin[0]}{'–' if fancy else '-'}{event.step_end - 1} rewritten",
        f"recalled {recalled.shape[1]} a layer: {_ranges(positions)}" if positions else "nothing to recall",
        f"edit {min(relative):.2%} to {max(relative):.2%} by layer {_bars(relative, fancy)}",
    ]
    return f"[{(' · ' if fancy else '; ').join(words)}]"


def _ranges(positions: Sequence[int], limit: int = 8) -> str:
    """0, 1, 2, 7 as "0-2 7"; at most `limit` ranges."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1] + 1:
            ranges[-1][1] = position
        else:
            ranges.append([position, position])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return " ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def _bars(values: Sequence[float], fancy: bool) -> str:
    """A character per value, relative to the largest."""
    steps = "▁▂▃▄▅▆▇█" if fancy else "01234567"
    largest = max(values) or 1.0
    return "".join(steps[min(7, int(8 * value / largest))] for value in values)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give one of --prompt and --prompt-file", param_hint="--prompt")
    if prompt_file is None:
        text = prompt or ""
    elif str(prompt_file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompt_file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        hint = "--prompt" if prompt_file is None else "--prompt-file"
        raise typer.BadParameter("the prompt is empty: give at least one word", param_hint=hint)
    return text


def load_backbone(model: str, dtype: DType, *, option: str) -> tuple[Any, Any]:
    """The backbone and its tokenizer, quietly and offline. option: which named it, for messages."""
    from . import backbones

    backbones.locate(model)
    quiet_libraries()
    with loading(f"{option} {model}"):
        return backbones.load(model, dtype=dtype.value)


def quiet_libraries() -> None:
    """Before torch and transformers are imported: offline, and nothing printed but by us."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        raise ImportError("this needs torch and transformers: install bottlenecked with its extra [transformers]")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _Conversation(NamedTuple):
    """What `encode_prompts` encodes."""

    name: str
    messages: list[dict[str, str]]


def _encode(tokenizer: Any, text: str, *, raw: bool, template: str, system: str | None) -> dict[str, Any]:
    """input_ids and attention_mask, [1, tokens]: of the same prompt as in training and evaluation, unless raw."""
    import torch

    from .training.data import encode_prompts, resolve_template

    template = "" if raw else resolve_template(template, tokenizer)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        if template != "chat":
            reason = f"--template is a text, {template!r}"
            if raw or not tokenizer.chat_template:
                reason = "--raw sends the prompt alone" if raw else "the tokenizer has no chat template"
            raise typer.BadParameter(f"leave it out: {reason}", param_hint="--system")
        messages.insert(0, {"role": "system", "content": system})
    if raw:
        ids = tokenizer(text)["input_ids"]
    else:
        (ids,) = encode_prompts([_Conversation("the prompt", messages)], tokenizer, template)
    input_ids = torch.tensor([ids], dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of token ids such as 198,271", param_hint="--boundary-token-ids"
        ) from None
    if any(token < 0 for token in ids):
        raise typer.BadParameter(f"{text!r} holds a negative token id", param_hint="--boundary-token-ids")
    return ids


def _check_output(output: Path, *, force: bool) -> None:
    """Never write over another model's config.json, and over a Processor only when told to."""
    from .config import MODEL_TYPE, read_object

    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file: give a directory")
    file = output / "config.json"
    if not file.exists() and not (output / "model.safetensors").exists():
        return
    try:
        ours = read_object(file).get("model_type") == MODEL_TYPE
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise FileExistsError(f"--output {output} holds something other than a Processor: give another directory")
    if not force:
        raise FileExistsError(f"--output {output} already holds a Processor: give another directory, or --force")


def _print_size(config: CacheProcessorConfig, output: Path | None, kind: str, dry_run: bool) -> None:
    parameters = config.num_parameters()
    done = f"would write {output}" if dry_run and output else "not written" if dry_run else f"wrote {output}"
    print(
        f"{done}: {kind} Processor for "
        f"{config.backbone.get('architecture') or 'a backbone'} with {config.num_layers} layers, "
        f"{parameters:,} parameters ({parameters / 1e6:.2f}M)"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _fail(message: str) -> int:
    print(f"bottlenecked: {' '.join(message.split())}", file=sys.stderr)
    return 1


__all__ = ["app", "main"]
