"""Shared fixtures: determinism, and the optional folder of upstream-made test data."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def shared() -> Path:
    """Folder `shared` beside the repository; the test is skipped where it does not exist."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the optional test data beside the repository")
    return folder
