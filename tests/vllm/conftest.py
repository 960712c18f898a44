"""One backbone, one Processor and its reference for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import engine as tools


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    return tools.save_processor(tmp_path_factory.mktemp("processor"), backbone)


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    return tools.save_processor(tmp_path_factory.mktemp("identity"), backbone, random_scale=0.0)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return tools.make_prompts(8)


@pytest.fixture(scope="session")
def expected(backbone: Path, processor: Path, prompts: list[list[int]]) -> tools.Reference:
    return tools.reference(backbone, processor, prompts, 60)


@pytest.fixture(scope="session")
def stock(backbone: Path, prompts: list[list[int]]) -> tools.Reference:
    return tools.reference(backbone, None, prompts, 60)
