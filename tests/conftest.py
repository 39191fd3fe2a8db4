"""Fixtures that tests of several rooms use."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


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
