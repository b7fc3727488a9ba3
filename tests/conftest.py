"""Shared fixtures. Nothing here imports fairchem: kernel tests run without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Kernels run in Triton's interpreter where there is no GPU; this must be set before triton is first imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The authors' reference arrays: E2FORMER_FIXTURES, or ../shared/fixtures beside the checkout."""
    folder = Path(os.environ.get("E2FORMER_FIXTURES", ROOT.parent / "shared" / "fixtures"))
    if not folder.is_dir():
        pytest.skip(f"no reference fixtures at {folder}; name their folder in E2FORMER_FIXTURES")
    return folder


@pytest.fixture
def float64_default() -> Iterator[None]:
    """Float64 as torch's default dtype for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
