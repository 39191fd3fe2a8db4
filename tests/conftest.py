"""Fixtures that tests of several rooms use."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

LONGEST = (
    "test_resume",
    "test_xla_backend",
    "test_recipes",
    "test_torch_backend",
    "test_training",
    "test_save_hf_model",
)
"""Files that take a minute or nearly one each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def coda_shared() -> Path:
    """Folder with data that the repository does not carry (`CODA_SHARED`); the test is skipped without it."""
    folder = Path(os.environ.get("CODA_SHARED") or REPO.parent / "shared")
    if not folder.is_dir():
        pytest.skip("needs the shared data folder: set CODA_SHARED")
    return folder
