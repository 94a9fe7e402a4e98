"""Shared fixtures: determinism, and the optional folder of upstream-made test data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import Episode


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


def read_episode(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Frames uint8 (T, H, W, 3) or (V, T, H, W, 3), actions and metadata of a whole file."""
    episode = Episode(path)
    frames = episode.frames(range(len(episode)), episode.views, None)
    return frames[0] if len(frames) == 1 else frames, episode.actions, episode.metadata
