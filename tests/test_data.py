"""Data: files, pictures, episodes, clips, shards, conversion, downloads, latent cache."""

import dataclasses
import errno
import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

ROOT = Path(__file__).parents[1]


def picture(seed: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, quality=90)
    return buffer.getvalue()


def make_dataset(folder, lengths, name="robot", views=1, split="train", size=32) -> list[dict]:
    """Write episodes whose actions count the frames; return their index entries."""
    if not (folder / name / "index.jsonl").exists():
        data.append_index(folder / name, {"fps": 5, "action_mapping": "bridge"})
    entries = []
    for number, length in enumerate(lengths):
        frames = [[jpeg(picture(1000 * v + t, size)) for t in range(length)] for v in range(views)]
        actions = np.arange(length)[:, None] + np.zeros(10, np.float32)
        path = folder / name / split / f"{number:09d}.safetensors"
        entries.append(data.write_episode(path, frames, actions, {"language": f"task {number}"}))
    data.append_index(folder / name, {"shard": split, "episodes": {split: entries}})
    return entries


def opened(folder, name="robot", split="train", **fields) -> data.EpisodeDataset:
    fields = {"image_size": 32, "num_frames": 4, "num_history": 1, "stride": 1, **fields}
    return data.EpisodeDataset(data.DataConfig(str(folder), name, **fields), split)


# --- files and pictures


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


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    data.write_atomic(path, b"old")

    def half(temporary):
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_atomic(path, half)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# --- episode files


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


@pytest.mark.parametrize("kind", ["array", "PNG", "other size"])
def test_frames_that_are_no_fitting_jpeg_are_encoded_once(tmp_path, kind):
    size = 48 if kind == "other size" else 32
    images = [picture(t, size) for t in range(3)]
    frames = (
        np.stack(images)
        if kind == "array"
        else [jpeg(i, kind[:3] == "PNG" and "PNG" or "JPEG") for i in images]
    )
    path = tmp_path / "000000000.safetensors"
    data.write_episode(path, frames, np.zeros((3, 10)), {}, size=32)
    shown, _, _ = data.read_episode(path)
    assert shown.shape == (3, 32, 32, 3)
    wanted = np.stack([np.asarray(Image.fromarray(i).resize((32, 32), 3)) for i in images])
    # smooth pictures; JPEG at quality 95 (and 90 before it) with halved colour resolution
    assert np.abs(shown.astype(float) - wanted).mean() < 4


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"actions": np.zeros((3, 7))}, "width 10"),
        ({"actions": np.zeros((2, 10))}, "every frame one action"),
        ({"actions": np.full((3, 10), np.nan)}, "not finite"),
        ({"actions": np.zeros((0, 10)), "frames": []}, "every frame one action"),
        ({"frames": [b"this is text, not an image"] * 3}, "not a JPEG"),
        ({"frames": np.zeros((3, 8, 8, 3))}, "uint8"),
        ({"frames": [[b"x"], [b"x", b"y"]]}, "every frame one action"),
    ],
)
def test_bad_episodes_are_refused_in_one_sentence(tmp_path, fault, message):
    good = {"frames": np.zeros((3, 8, 8, 3), np.uint8), "actions": np.zeros((3, 10))}
    with pytest.raises(data.InputError, match=message):
        data.write_episode(tmp_path / "000000000.safetensors", **{**good, **fault}, metadata={})
    assert not list(tmp_path.iterdir())


def test_clip_needs_no_byte_of_other_frames(tmp_path):
    make_dataset(tmp_path, [12], views=2)
    dataset = opened(tmp_path, num_frames=3, stride=2)
    frames, _ = dataset[0]
    info = dataset.info(0)
    episode, content = data.Episode(info["path"]), bytearray(info["path"].read_bytes())
    kept = {(0, t) for t in info["times"]}
    for v, t in set(itertools.product(range(2), range(12))) - kept:
        other = episode.jpeg_bytes(t, v)
        start = content.index(other)
        content[start : start + len(other)] = bytes(len(other))
    info["path"].write_bytes(content)
    assert torch.equal(dataset[0].frames, frames)
    with pytest.raises(data.InputError, match="not a JPEG"):
        data.read_episode(info["path"])


def test_index_line_cut_by_a_kill_was_never_written(tmp_path):
    entries = make_dataset(tmp_path, [5, 6])
    path = tmp_path / "robot" / "index.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20):
        path.write_bytes(whole + whole.splitlines()[1][:-cut])
        assert data.read_index(path.parent)[2] == {"train": entries}
    data.append_index(path.parent, {"shard": "b", "episodes": {"test": entries[:1]}})
    assert data.read_index(path.parent)[2] == {"train": entries, "test": entries[:1]}
    path.write_bytes(whole.replace(b'"length": 5', b'"length": x'))
    with pytest.raises(data.InputError, match="damaged index"):
        data.read_index(path.parent)


# --- clips


def test_clip_is_the_frames_and_actions_that_its_key_names(tmp_path):
    make_dataset(tmp_path, [12, 25])
    dataset = opened(tmp_path, num_frames=4, stride=3)
    frames, actions = dataset[3, 1]
    times = dataset.info((3, 1))["times"]
    assert np.array_equal(actions[:, 0], times) and np.array_equal(np.diff(times), [3, 3, 3])
    whole, _, _ = data.read_episode(dataset.info(1)["path"])
    assert torch.equal(frames, torch.from_numpy(whole[times]) / 255) and frames.max() <= 1
    starts = {int(dataset.info((draw, 1))["times"][0]) for draw in range(300)}
    assert starts == set(range(25 - 9))  # every start that fits, and no other


def test_views_stand_in_front_and_are_chosen_by_number(tmp_path):
    make_dataset(tmp_path, [6], views=3)
    both, one = opened(tmp_path, views=(2, 0)), opened(tmp_path)
    assert both[0].frames.shape == (2, 4, 32, 32, 3) and one[0].frames.shape == (4, 32, 32, 3)
    assert torch.equal(both[0].frames[1], one[0].frames)
    assert opened(tmp_path, views=3)[0].frames.shape[0] == 3
    with pytest.raises(data.InputError, match="missing view': 1"):
        opened(tmp_path, views=4)


def test_short_episodes_are_dropped_and_counted(tmp_path):
    make_dataset(tmp_path, [18, 19, 5])
    dataset = opened(tmp_path, num_frames=10, stride=2)  # needs 9 * 2 + 1 = 19 frames
    assert len(dataset) == 1 and dataset.dropped == {"missing view": 0, "too short": 2}
    assert dataset.info(0)["times"].tolist() == list(range(0, 19, 2))


def test_variable_history_example_and_what_is_drawn():
    config = data.DataConfig(num_frames=10, num_history=2, stride=2)
    seen = set()
    for seed in range(4000):
        times = data.draw_frames(38, config, np.random.default_rng(seed))
        assert times.min() >= 0 and times.max() < 38 and len(times) == 10
        seen.add(tuple(times.tolist()))
    assert (0, 8, 16, 18, 20, 22, 24, 26, 28, 30) in seen  # the docstring's example
    gaps = {(b - a, c - b, d - c) for a, b, c, d, *_ in seen}
    assert gaps == {(8, 8, 2), (0, 0, 2), (0, 0, 4)}  # s = 4 with history would need 61 frames
    assert {t[2] for t in seen if t[1] != t[2]} == set(range(16, 24))
    draws = [data.draw_frames(200, config, np.random.default_rng(s)) for s in range(4000)]
    repeats = np.mean([t[0] == t[2] for t in draws])
    assert abs(repeats - 0.15) < 0.02  # 3.5 standard errors of 4000 draws
    assert abs(np.mean([t[3] - t[2] == 4 for t in draws]) - 0.5) < 0.03
    short = data.draw_frames(19, config, np.random.default_rng(0))
    assert short[0] == short[2] and short[9] - short[2] == 14  # 31 do not fit: history repeats


def test_evaluation_never_draws_variable_history(tmp_path):
    for split in ("train", "test"):
        make_dataset(tmp_path, [40], split=split)
    fields = {"num_frames": 6, "num_history": 2, "stride": 2, "variable_history": True}
    train, test = (opened(tmp_path, split=split, **fields) for split in ("train", "test"))
    gaps = [{tuple(np.diff(s.info((d, 0))["times"])) for d in range(50)} for s in (train, test)]
    assert len(gaps[0]) > 1 and gaps[1] == {(2, 2, 2, 2, 2)}


def test_merged_actions_by_hand():
    actions = np.arange(12.0)[:, None] + np.zeros(10, np.float32)
    times = np.array([2, 5, 8])
    assert data.merge_actions(actions, times, "drop")[:, 0].tolist() == [2, 5, 8]
    merged = data.merge_actions(actions, times, "sum")
    assert merged[:, 0].tolist() == [2 + 3 + 4, 5 + 6 + 7, 8 + 9 + 10]
    assert merged[:, 6].tolist() == [4, 7, 10]  # the last gripper command
    late = data.merge_actions(actions, np.array([6, 10]), "sum")
    assert late[1, 0] == 10 + 11 and late[1, 6] == 11  # as far as the episode goes
    still = data.merge_actions(actions, np.array([3, 3, 5]), "sum")
    assert still[0].tolist() == [0, 0, 0, 0, 0, 0, 3, 0, 0, 0]


def test_probe_frames_are_those_of_the_docstring():
    table = {
        "uniform": [0, 6, 11, 17, 22, 28, 33, 39],
        "fps_1": [4, 9, 14, 19, 24, 29, 34, 39],
        "bookend": [0, 1, 2, 3, 36, 37, 38, 39],
        "final_heavy": [0, 10, 20, 24, 28, 31, 35, 39],
    }
    for sampling, times in table.items():
        assert data.probe_frames(40, 8, sampling, 5).tolist() == times
        for length in range(8, 60):
            found = data.probe_frames(length, 8, sampling, 5)
            assert found[-1] == length - 1 and found[0] >= 0 and (np.diff(found) > 0).all()


def test_every_option_of_the_config_changes_what_is_served(tmp_path):
    make_dataset(tmp_path / "a", [40, 50], views=2)
    make_dataset(tmp_path / "a", [45], name="other")
    make_dataset(tmp_path / "b", [60])
    base = {"num_frames": 5, "num_history": 2, "stride": 2}

    def served(**fields):
        folder = fields.pop("dataset_dir", tmp_path / "a")
        dataset = opened(folder, fields.pop("name", "robot"), **{**base, **fields})
        batches = [data.ClipSampler(dataset, 4).batch(k) for k in range(6)]
        clips = [dataset[key] for key in batches[0]]
        parts = [repr(batches)] + [f"{c.frames.shape}{c.frames.sum()}{c.actions}" for c in clips]
        return "".join(parts)

    plain, two = served(), served(name="robot,other")
    changes = {
        "dataset_dir": tmp_path / "b",
        "image_size": 16,
        "num_frames": 6,
        "stride": 3,
        "variable_history": True,
        "action_merge": "sum",
        "views": 2,
        "sampling": "bookend",
        "seed": 1,
    }
    assert all(served(**{name: value}) != plain for name, value in changes.items())
    assert two != plain and served(name="robot,other", subset_weights="1,5") != two
    variable = served(variable_history=True)
    assert served(variable_history=True, num_history=1) != variable
    named = {*changes, "subset_names", "subset_weights", "num_history"}
    assert named == {field.name for field in dataclasses.fields(data.DataConfig)}


@pytest.mark.parametrize(
    "fields",
    [{"views": 0}, {"views": (1, 1)}, {"action_merge": "mean"}, {"sampling": "all"}, {"stride": 0},
     {"num_history": 10}, {"image_size": 0}],
)  # fmt: skip
def test_impossible_configs_are_refused(fields):
    with pytest.raises(data.InputError):
        data.DataConfig(**fields)


@pytest.mark.parametrize("name", ["../robot", "/etc", "", ".", "a/b"])
def test_subset_names_cannot_leave_the_folder(tmp_path, name):
    make_dataset(tmp_path, [9])
    with pytest.raises(data.InputError, match="name of a data set"):
        opened(tmp_path / "robot", name)


# --- sampling


def test_sampler_sees_every_clip_once_an_epoch_and_resumes_anywhere(tmp_path):
    make_dataset(tmp_path, [10] * 7)
    dataset = opened(tmp_path)
    whole = list(itertools.islice(data.ClipSampler(dataset, 4), 14))
    keys = sum(whole, [])
    for epoch in range(8):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [(epoch, i) for i in range(7)]
    assert keys[:7] != [(0, i) for _, i in keys[7:14]]  # freshly shuffled
    assert list(itertools.islice(data.ClipSampler(dataset, 4, start=5), 9)) == whole[5:]
    halves = [itertools.islice(data.ClipSampler(dataset, 2, rank, 2), 14) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_mixture_follows_its_weights_and_never_repeats_a_start_key(tmp_path):
    make_dataset(tmp_path, [10] * 9, "big")
    make_dataset(tmp_path, [10] * 3, "small")
    dataset = opened(tmp_path, "big,small", subset_weights="1,3")
    sampler = data.ClipSampler(dataset, 6)
    keys = sum((sampler.batch(k) for k in range(20)), [])
    assert sampler.epoch_length == 12 and len(set(keys)) == len(keys)
    for epoch in range(10):
        part = [i for _, i in keys[12 * epoch : 12 * epoch + 12]]
        assert sum(i < 9 for i in part) == 3  # a quarter of 12
        assert sorted(i for i in part if i >= 9) == [9, 9, 9, 10, 10, 10, 11, 11, 11]
    seen = [i for _, i in keys if i < 9]
    assert all(sorted(seen[k : k + 9]) != [] for k in range(3))
    counts = np.bincount([i for _, i in keys[: 12 * 9] if i < 9])
    assert counts.tolist() == [3] * 9  # 27 draws walk through the nine three times
    with pytest.raises(data.InputError, match="subset_weights"):
        data.ClipSampler(opened(tmp_path, "big,small", subset_weights="1"), 6)


def test_workers_serve_the_same_batches(tmp_path):
    make_dataset(tmp_path, [12] * 5)
    dataset = opened(tmp_path, variable_history=True)
    served = []
    for workers in (0, 2):
        sampler = data.ClipSampler(dataset, 3, start=2)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
        served.append(list(itertools.islice(loader, 4)))
    for a, b in zip(*served, strict=True):
        assert isinstance(a, data.Clip) and a.frames.shape == (3, 4, 32, 32, 3)
        assert torch.equal(a.frames, b.frames) and torch.equal(a.actions, b.actions)


def test_sixty_thousand_episodes_open_at_once(tmp_path):
    folder = tmp_path / "big"
    data.append_index(folder, {"fps": 5, "action_mapping": "bridge"})
    with open(folder / "index.jsonl", "a") as file:
        for shard in range(60):
            entries = [
                {"number": 10_000 * shard + i, "length": 38, "views": [0], "success": True,
                 "language": f"put the {i} in the sink"}
                for i in range(1000)
            ]  # fmt: skip
            file.write(json.dumps({"shard": str(shard), "episodes": {"train": entries}}) + "\n")
    start = time.perf_counter()
    dataset = opened(tmp_path, "big", num_frames=10, stride=2)
    sampler = data.ClipSampler(dataset, 16)
    assert len(sampler.batch(10_000)) == 16 and len(dataset) == 60_000
    # 10 s are allowed on a quiet machine, no episode file exists that could be opened
    assert time.perf_counter() - start < 20
