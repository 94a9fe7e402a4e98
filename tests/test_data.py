"""Data: files, pictures, episodes, clips, shards, conversion, downloads, latent cache."""

import numpy as np
import torch
from PIL import Image

import data


def test_gif_keeps_frames_colours_and_rate(tmp_path):
    frames = torch.zeros(5, 16, 24, 3)
    for t in range(5):
        frames[t, :, 4 * t : 4 * t + 4] = torch.tensor([1.0, 0.5, 0.25])
    data.write_gif(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 100 and gif.info["loop"] == 0
        for t in range(5):
            gif.seek(t)
            shown = np.asarray(gif.convert("RGB"), np.float32) / 255
            # 256 palette entries hold two colours exactly, up to 8-bit rounding
            assert np.abs(shown - frames[t].numpy()).max() < 0.02
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]  # no temporary file stays


def test_one_process_is_rank_zero_of_one():
    assert data.init_processes("cpu") == (0, 1, 0, torch.device("cpu"))
