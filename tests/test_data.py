"""Data: files, pictures, episodes, clips, shards, conversion, downloads, latent cache."""

import io
import itertools

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


def picture(seed: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_dataset(folder, lengths, name="robot", views=1, split="train") -> list[dict]:
    """Write episodes whose actions count the frames; return their index entries."""
    if not (folder / name / "index.jsonl").exists():
        data.append_index(folder / name, {"fps": 5, "action_mapping": "bridge"})
    entries = []
    for number, length in enumerate(lengths):
        frames = [[jpeg(picture(1000 * v + t)) for t in range(length)] for v in range(views)]
        actions = np.arange(length)[:, None] + np.zeros(10, np.float32)
        path = folder / name / split / f"{number:09d}.safetensors"
        entries.append(data.write_episode(path, frames, actions, {"language": f"task {number}"}))
    data.append_index(folder / name, {"shard": split, "episodes": {split: entries}})
    return entries


def test_episode_file_returns_jpeg_bytes_actions_and_metadata(tmp_path):
    frames = [[jpeg(picture(10 * v + t)) for t in range(4)] for v in range(2)]
    actions = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    path = tmp_path / "000000007.safetensors"
    metadata = {"language": "lift", "success": False, "views": [0, 3]}
    entry = data.write_episode(path, frames, actions, metadata)
    assert entry == {"number": 7, "length": 4, **metadata}
    episode = data.Episode(path)
    for v, view in enumerate((0, 3)):
        assert [episode.jpeg_bytes(t, view) for t in range(4)] == frames[v]
    shown, read, found = data.read_episode(path)
    assert shown.shape == (2, 4, 32, 32, 3) and np.array_equal(read, actions) and found == metadata


def test_clip_is_the_frames_and_actions_that_its_key_names(tmp_path):
    make_dataset(tmp_path, [12, 25])
    config = data.DataConfig(str(tmp_path), "robot", image_size=32, num_frames=4, stride=3)
    dataset = data.EpisodeDataset(config, "train")
    frames, actions = dataset[3, 1]
    times = dataset.info((3, 1))["times"]
    assert np.array_equal(actions[:, 0], times) and np.array_equal(np.diff(times), [3, 3, 3])
    whole, _, _ = data.read_episode(dataset.info(1)["path"])
    assert torch.equal(frames, torch.from_numpy(whole[times]) / 255) and dataset[3, 1][0].max() <= 1


def test_sampler_sees_every_clip_once_an_epoch_and_resumes_anywhere(tmp_path):
    make_dataset(tmp_path, [10] * 7)
    config = data.DataConfig(str(tmp_path), "robot", num_frames=2, num_history=1)
    dataset = data.EpisodeDataset(config, "train")
    whole = list(itertools.islice(data.ClipSampler(dataset, 4), 14))
    keys = sum(whole, [])
    for epoch in range(8):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [(epoch, i) for i in range(7)]
    assert list(itertools.islice(data.ClipSampler(dataset, 4, start=5), 9)) == whole[5:]
    halves = [itertools.islice(data.ClipSampler(dataset, 2, rank, 2), 14) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
