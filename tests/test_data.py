"""Data: files, pictures, episodes, clips, shards, conversion, downloads, latent cache."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import read_episode
from PIL import Image, ImageFile
from tqdm import tqdm

import data


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


def opened(folder, name="robot", split="train", latents=None, **fields) -> data.EpisodeDataset:
    fields = {"image_size": 32, "num_frames": 4, "num_history": 1, "stride": 1, **fields}
    return data.EpisodeDataset(data.DataConfig(str(folder), name, **fields), split, latents)


opened_latents = functools.partial(opened, latents="fp")


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
    assert data.init_processes("cpu") == (0, 1, torch.device("cpu"), None)


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
    shown, read, found = read_episode(path)
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
    shown, _, _ = read_episode(path)
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
        ({"frames": [b"this is text, not an image"] * 3}, "view 0, frame 0: not a JPEG"),
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
        read_episode(info["path"])


def test_index_line_cut_by_a_kill_was_never_written(tmp_path):
    entries = make_dataset(tmp_path, [5, 6])
    path = tmp_path / "robot" / "index.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20):
        path.write_bytes(whole + whole.splitlines()[1][:-cut])
        assert data.read_index(path.parent)[2] == {"train": entries}
    for cut in (b"", whole[:30]):  # not even its first line was written
        path.write_bytes(cut)
        with pytest.raises(data.MissingFileError, match="no such data set; check the name"):
            data.read_index(path.parent)
    with pytest.raises(data.MissingFileError, match="train_dit.py toy --dataset_dir .* writes it"):
        data.read_index(tmp_path / "toy")
    path.write_bytes(whole + b"{")
    data.append_index(path.parent, {"shard": "b", "episodes": {"test": entries[:1]}})
    assert data.read_index(path.parent)[2] == {"train": entries, "test": entries[:1]}
    path.write_bytes(whole.replace(b'"length": 5', b'"length": x'))
    with pytest.raises(data.InputError, match="of another format"):
        data.read_index(path.parent)


# --- clips


def test_clip_is_the_frames_and_actions_that_its_key_names(tmp_path):
    make_dataset(tmp_path, [12, 25])
    dataset = opened(tmp_path, num_frames=4, stride=3)
    frames, actions = dataset[3, 1]
    times = dataset.info((3, 1))["times"]
    assert np.array_equal(actions[:, 0], times) and np.array_equal(np.diff(times), [3, 3, 3])
    whole, _, _ = read_episode(dataset.info(1)["path"])
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
        times = data.draw_times(38, config, np.random.default_rng(seed))
        assert times.min() >= 0 and times.max() < 38 and len(times) == 10
        seen.add(tuple(times.tolist()))
    assert (0, 8, 16, 18, 20, 22, 24, 26, 28, 30) in seen  # the docstring's example
    gaps = {(b - a, c - b, d - c) for a, b, c, d, *_ in seen}
    assert gaps == {(8, 8, 2), (0, 0, 2), (0, 0, 4)}  # s = 4 with history would need 61 frames
    assert {t[2] for t in seen if t[1] != t[2]} == set(range(16, 24))
    draws = [data.draw_times(200, config, np.random.default_rng(s)) for s in range(4000)]
    repeats = np.mean([t[0] == t[2] for t in draws])
    assert abs(repeats - 0.15) < 0.02  # 3.5 standard errors of 4000 draws
    assert abs(np.mean([t[3] - t[2] == 4 for t in draws]) - 0.5) < 0.03
    short = data.draw_times(19, config, np.random.default_rng(0))
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


def test_probe_times_are_those_of_the_docstring():
    table = {
        "uniform": [0, 6, 11, 17, 22, 28, 33, 39],
        "fps_1": [4, 9, 14, 19, 24, 29, 34, 39],
        "bookend": [0, 1, 2, 3, 36, 37, 38, 39],
        "final_heavy": [0, 10, 20, 24, 28, 31, 35, 39],
    }
    for sampling, times in table.items():
        assert data.probe_times(40, 8, sampling, 5).tolist() == times
        for length in range(8, 60):
            found = data.probe_times(length, 8, sampling, 5)
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
     {"num_history": 10}, {"image_size": 0}, {"seed": -1}, {"subset_weights": "1,x"}],
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
    counts = np.bincount([i for _, i in keys[: 12 * 9] if i < 9])
    assert counts.tolist() == [3] * 9  # 27 draws walk through the nine three times
    with pytest.raises(data.InputError, match="one number per data set"):
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
    start, used = time.perf_counter(), psutil.Process().memory_info().rss
    dataset = opened(tmp_path, "big", num_frames=10, stride=2)
    sampler = data.ClipSampler(dataset, 16)
    assert len(sampler.batch(10_000)) == 16 and len(dataset) == 60_000
    assert time.perf_counter() - start < 10  # no episode file exists that could be opened
    assert psutil.Process().memory_info().rss - used < 2**28  # 4 KB an episode


# --- RLDS: framing, schemas, action mappings


def slow_crc32c(message: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(payload: bytes) -> bytes:
    parts = (struct.pack("<Q", len(payload)), payload)
    return b"".join(p + struct.pack("<I", masked(slow_crc32c(p))) for p in parts)


def test_checksum_matches_published_vectors_and_the_bitwise_definition():
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43}  # RFC 3720, section B.4
    vectors |= {bytes(range(32)): 0x46DD794E, bytes(range(32))[::-1]: 0x113FDB5C}
    for message, crc in vectors.items():
        assert data.masked_crc32c(message) == masked(crc) and slow_crc32c(message) == crc
    rng = np.random.default_rng(0)
    for size in [*range(20), 63, 64, 65, 511, 513, 4095, 5001, 20011]:
        message = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        assert data.masked_crc32c(message) == masked(slow_crc32c(message)), size


def flat(example: dict) -> dict:
    """Flatten {"steps": [step, ...], ...} to the keys and value lists of a tf.train.Example."""
    out = {}

    def walk(prefix, values):
        if isinstance(values[0], dict):
            for key in values[0]:
                walk(f"{prefix}/{key}", [value[key] for value in values])
        else:
            out[prefix] = values

    for key, value in example.items():
        walk(key, value if key == "steps" else [value])
    return out


def serialize(example: dict) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example()
    for key, values in flat(example).items():
        feature = proto.features.feature[key]
        if isinstance(values[0], (bytes, str)):
            values = [v.encode() if isinstance(v, str) else v for v in values]
            feature.bytes_list.value.extend(values)
        else:
            values = np.concatenate([np.ravel(v) for v in values])
            if values.dtype.kind == "f":
                feature.float_list.value.extend(values.tolist())
            else:
                feature.int64_list.value.extend(values.astype(int).tolist())
    return proto.SerializeToString()


def schema_of(example: dict):
    """Infer tfds features from one example: bytes are images, strings are texts."""
    import tensorflow_datasets as tfds

    def infer(value):
        if isinstance(value, dict):
            return tfds.features.FeaturesDict({key: infer(v) for key, v in value.items()})
        if isinstance(value, list):
            return tfds.features.Dataset(infer(value[0]))
        if isinstance(value, bytes):
            return tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        if isinstance(value, str):
            return tfds.features.Text()
        value = np.asarray(value)
        return tfds.features.Tensor(shape=value.shape, dtype=value.dtype)

    return infer(example)


def write_rlds(folder: Path, splits: dict, name="robot_data", prefix=None) -> Path:
    """Write an RLDS data set: {split: [[example, ...] of each shard]}."""
    folder.mkdir(parents=True)
    info = {"fileFormat": "tfrecord", "name": name, "version": "1.0.0", "splits": []}
    for split, shards in splits.items():
        for i, examples in enumerate(shards):
            path = f"{prefix or name}-{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
            content = b"".join(framed(serialize(example)) for example in examples)
            (folder / path).write_bytes(content)
        lengths = [str(len(examples)) for examples in shards]
        info["splits"].append({"name": split, "shardLengths": lengths, "numBytes": "1000"})
    schema_of(next(shards[0][0] for shards in splits.values())).save_config(folder)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def bridge_example(seed: int, length: int = 3, views: int = 1, **about) -> dict:
    steps = []
    for t in range(length):
        action = np.random.default_rng([seed, t]).uniform(-0.04, 0.04, 7).astype(np.float32)
        action[6] = t % 2
        images = {f"image_{k}": jpeg(picture(100 * seed + 10 * k + t)) for k in range(views)}
        steps.append(
            {"action": action, "observation": images, "language_instruction": f"do {seed}"}
        )
    return {"steps": steps, "episode_metadata": {"file_path": f"/raw/{seed}", **about}}


def convert(source, output, name="bridge_v2", **options) -> Path:
    options = {"image_size": 32, "num_workers": 2, **options}
    data.convert(data.Args(name, str(output), str(source), **options))
    return Path(output) / name


def episodes_of(folder: Path) -> list[data.Episode]:
    _, _, splits = data.read_index(folder)
    named = {f"{s}/{e['number']:09d}.safetensors" for s, es in splits.items() for e in es}
    stored = {str(path.relative_to(folder)) for path in folder.glob("*/*.safetensors")}
    assert named == stored  # the index names all files and no other
    return [data.Episode(folder / path) for path in sorted(named, reverse=True)]  # train first


def test_real_bridge_returns_actions_and_jpeg_bytes(shared, tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    folder = convert(shared / "data/bridge_real", tmp_path, image_size=256)
    assert "tensorflow" not in sys.modules
    stored = {(e.path.parent.name, e.metadata["source"]): e for e in episodes_of(folder)}
    assert (
        len(stored) == 8 and len(data.EpisodeDataset(data.DataConfig(str(tmp_path)), "train")) == 7
    )
    seen = 0
    for path in sorted((shared / "data/bridge_real").rglob("*tfrecord*")):
        content, at, number = path.read_bytes(), 0, 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            example = tf_example_pb2.Example.FromString(content[at + 12 : at + 12 + size])
            at, feature = at + 16 + size, example.features.feature
            split = "test" if "-val." in path.name else "train"
            episode = stored[split, f"{path.name}/{number}"]
            images = list(feature["steps/observation/image_0"].bytes_list.value)
            assert [episode.jpeg_bytes(t) for t in range(len(episode))] == images
            raw = np.array(feature["steps/action"].float_list.value).reshape(-1, 7)
            wanted = np.zeros((len(raw), 10))
            wanted[:, :3] = np.clip((raw[:, :3] + 0.05) / 0.1 * 3.5 - 1.75, -1.74, 1.74)
            wanted[:, 3:6] = np.clip((raw[:, 3:6] + 0.25) / 0.5 * 2.8 - 1.4, -1.39, 1.39)
            wanted[:, 6] = -(2 * np.round(raw[:, 6]) - 1)
            assert np.abs(episode.actions - wanted).max() < 1e-5
            number, seen = number + 1, seen + 1
    assert seen == 8


def test_real_soar_keeps_its_labels_and_has_bridge_actions(shared, tmp_path):
    folder = convert(shared / "data/soar_tiny", tmp_path, "soar", image_size=256)
    episodes = episodes_of(folder)
    labels = {("-success." in e.metadata["source"], e.metadata["success"]) for e in episodes}
    assert labels == {(True, True), (False, False)}
    for actions in (episode.actions for episode in episodes):
        assert np.abs(actions).max() < 1.75 and set(np.unique(actions[:, 6])) <= {-1, 1}


def test_fitting_jpegs_pass_through_undecoded(tmp_path, monkeypatch):
    examples = [bridge_example(k) for k in range(3)]
    for step in itertools.chain(*(example["steps"] for example in examples)):
        step["goal"] = jpeg(picture(9))  # as SOAR has it, beside the observation
    source = write_rlds(tmp_path / "rlds", {"train": [examples]})

    def decoded(*_):
        raise AssertionError("a JPEG was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", decoded)
        patch.setattr(ImageFile.ImageFile, "load", decoded)
        folder = convert(source, tmp_path / "out")
        with pytest.raises(data.InputError, match="was decoded"):
            convert(source, tmp_path / "resized", image_size=16)
    for k, episode in enumerate(sorted(episodes_of(folder), key=lambda e: e.path)):
        images = [step["observation"]["image_0"] for step in bridge_example(k)["steps"]]
        assert [episode.jpeg_bytes(t) for t in range(3)] == images


def test_other_image_sizes_and_integer_features_are_read_by_their_schema(tmp_path):
    example = bridge_example(0)
    for t, step in enumerate(example["steps"]):
        step["observation"]["image_0"] = jpeg(
            np.asarray(Image.fromarray(picture(t)).resize((48, 40)))
        )
        step |= {"is_first": np.bool_(t == 0), "count": np.int64(t), "reward": np.int32(t == 2)}
    source = write_rlds(tmp_path / "rlds", {"train": [[example]]})
    (episode,) = episodes_of(convert(source, tmp_path / "out"))
    assert read_episode(episode.path)[0].shape == (3, 32, 32, 3)
    assert episode.metadata["success"] is True


# What one step of each data set says, and its ten numbers worked out by hand.
_XYZ, _TURN = np.float32([0.01, -0.02, 0.03]), np.float32([0.05, -0.1, 0.2])
_OXE = {"world_vector": _XYZ, "rotation_delta": _TURN, "terminate_episode": np.float32(0)}
_CLOSE = {**_OXE, "gripper_closedness_action": np.float32([-1])}
_SEVEN = np.float32([0.01, -0.02, 0.06, 0.05, -0.1, 0.3, 1])
_BRIDGE_TEN = [0.35, -0.7, 1.74, 0.28, -0.56, 1.39, -1, 0, 0, 0]  # gains 35 and 5.6, clipped
_TEN = {
    "bridge_v2": ("image_0", _SEVEN, _BRIDGE_TEN),
    "bridge_v2_multiview": ("image_0", _SEVEN, _BRIDGE_TEN),
    "soar": ("image_0", _SEVEN, _BRIDGE_TEN),
    "bridge": ("image", {**_OXE, "open_gripper": np.bool_(True)},
               [0.35, -0.7, 1.05, 0.28, -0.56, 1.12, -1, 0, 0, 0]),
    "rt_1": ("image", {**_CLOSE, "base_displacement_vector": np.float32([0.5, 0.25]),
                       "base_displacement_vertical_rotation": np.float32([1])},
             [0.01, -0.02, 0.03, 0.05, -0.1, 0.2, -1, 0.5, 0.25, 0]),  # the last is our flag
    "taco_play": ("rgb_static", {"actions": _SEVEN * 9, "rel_actions_world": _SEVEN},
                  [0.35, -0.7, 1.74, 0.28, -0.56, 1.39, 1, 0, 0, 0]),
    "jaco_play": ("image", {"world_vector": _XYZ, "gripper_closedness_action": np.float32([1])},
                  [0.0738413, -0.1467337, 0.3043480, 0, 0, 0, 1, 0, 0, 0]),
    "berkeley_cable_routing": ("image", _OXE, [0.01, -0.02, 0.03, 0.05, -0.1, 0.2, 0, 0, 0, 0]),
    "roboturk": ("front_rgb", _CLOSE, [0.01, -0.02, 0.03, 0.05, -0.1, 0.2, -1, 0, 0, 0]),
    "nyu_door_opening_surprising_effectiveness":
        ("image", _CLOSE, [0.2, -0.4, 0.6, 0.75, -1.5, 3, -1, 0, 0, 0]),
    "viola": ("agentview_rgb", {**_OXE, "gripper_closedness_action": np.float32(1)},
              [0.0175, -0.035, 0.0525, 0.15, -0.3, 0.6, 1, 0, 0, 0]),
    "berkeley_autolab_ur5": ("image", {**_OXE, "gripper_closedness_action": np.float32(1)},
                             [1, -2, 3, 0.75, -1.5, 3, 1, 0, 0, 0]),
    "toto": ("image", {**_OXE, "open_gripper": np.bool_(True)},
             [0.02, -0.04, 0.06, 0.05, -0.1, 0.2, 1, 0, 0, 0]),
}  # fmt: skip
for _name in ("10", "object", "goal", "spatial"):  # gains 1.75 and 3.5
    _LIBERO = np.float32([0.2, -0.4, 1, 0.1, -0.2, 0.4, -1])
    _TEN[f"libero_{_name}"] = ("image", _LIBERO, [0.35, -0.7, 1.74, 0.35, -0.7, 1.39, -1, 0, 0, 0])


@pytest.mark.parametrize("name", sorted(data.SOURCES))
def test_actions_of_every_data_set_by_hand(tmp_path, name):
    camera, action, ten = _TEN[name]
    step = {"action": action, "observation": {camera: jpeg(picture(1))}}
    if isinstance(action, dict):  # Open X-Embodiment; taco_play has several instructions
        step["observation"] |= {"natural_language_instruction": "lift"}
        step["observation"] |= {"structured_language_instruction": "lift_pink_block"}
    else:
        step |= {"language_instruction": "lift"}
    if name == "bridge_v2_multiview":
        step["observation"] |= {f"image_{k}": jpeg(picture(k)) for k in (1, 2, 3)}
    source = write_rlds(tmp_path / "rlds", {"train": [[{"steps": [step, step]}]]})
    (episode,) = episodes_of(convert(source, tmp_path / "out", name))
    assert np.abs(episode.actions - np.float32(ten)).max() < 1e-5
    assert episode.metadata["language"] == "lift"
    assert episode.metadata["fps"] == data.SOURCES[name].fps


def test_policy_actions_by_hand():
    raw = np.array([[0.05, -0.06, 0, 0.25, -0.3, 0, 0.81], [0, 0, 0, 0, 0, 0, 0.8]])
    ten = data.map_actions(raw, "bridge_policy")
    assert np.allclose(ten[0], [1.75, -1.75, 0, 1.4, -1.4, 0, -1, 0, 0, 0], atol=1e-6)
    assert ten[1, 6] == 1
    for wrong in (np.zeros((3, 6)), np.zeros((3, 11)), np.float32(1)):
        with pytest.raises(data.InputError, match="last axis"):
            data.map_actions(wrong, "bridge")
    with pytest.raises(data.InputError, match="use one of"):
        data.map_actions(raw, "bridge2")


def test_cameras_are_there_by_their_flags_or_unless_black(tmp_path):
    black = jpeg(np.zeros((32, 32, 3), np.uint8))
    flags = {"has_image_0": True, "has_image_1": False, "has_image_2": True, "has_image_3": False}
    flagged = bridge_example(1, views=4, **{k: np.bool_(v) for k, v in flags.items()})
    for step in flagged["steps"]:
        step["observation"]["image_2"] = black  # the flag decides, not the picture
    plain = bridge_example(2, views=4)
    for step in plain["steps"]:
        step["observation"]["image_1"] = black
    for name, example, views in (("a", flagged, [0, 2]), ("b", plain, [0, 2, 3])):
        source = write_rlds(tmp_path / name, {"train": [[example]]})
        (episode,) = episodes_of(convert(source, tmp_path / f"{name}_out", "bridge_v2_multiview"))
        assert episode.views == views
        images = [s["observation"][f"image_{views[-1]}"] for s in example["steps"]]
        assert [episode.jpeg_bytes(t, views[-1]) for t in range(3)] == images
    blind = bridge_example(3, has_image_0=np.bool_(False))
    source = write_rlds(tmp_path / "c", {"train": [[blind]]})
    with pytest.raises(data.InputError, match="main camera of .image_0. is missing"):
        convert(source, tmp_path / "c_out")


def test_success_comes_from_the_metadata_or_the_last_reward(tmp_path):
    for name, labels in (("soar", (True, False)), ("bridge_v2", (1.0, 0.0))):
        examples = []
        for seed, label in enumerate(labels):
            example = bridge_example(seed)
            if name == "soar":
                example["episode_metadata"]["success"] = np.bool_(label)
            for t, step in enumerate(example["steps"] if name != "soar" else ()):
                step["reward"] = np.float32(label * (t == 2))
            examples.append(example)
        source = write_rlds(tmp_path / name, {"train": [examples], "val": [examples[:1]]})
        folder = convert(source, tmp_path / "out", name)
        _, _, splits = data.read_index(folder)
        assert [entry["success"] for entry in splits["train"]] == [True, False]
        assert [entry["success"] for entry in splits["test"]] == [True]


def test_hashed_split_is_the_same_in_every_process_and_order(tmp_path):
    examples = [bridge_example(seed, success=np.bool_(seed % 2)) for seed in range(40)]
    for example in examples:
        example["steps"] = example["steps"][:1]
    a = write_rlds(tmp_path / "a", {"success": [examples[:20]], "failure": [examples[20:]]})
    b = write_rlds(tmp_path / "b", {"failure": [examples[::-2]], "success": [examples[-2::-2]]})
    split = {}
    for source in (a, b):
        folder = convert(source, tmp_path / f"{source.name}_out", "soar")
        for episode in episodes_of(folder):
            key = episode.metadata["language"]
            split.setdefault(key, []).append(episode.path.parent.name)
    assert len(split) == 40 and all(x == y for x, y in split.values())
    share = np.mean([x == "test" for x, _ in split.values()])
    assert share == np.mean(
        [int(hashlib.sha256(f"/raw/{s}".encode()).hexdigest(), 16) % 10 == 0 for s in range(40)]
    )
    assert 0 < share < 0.3


def test_other_prefixes_missing_shards_and_chosen_splits(tmp_path, capsys):
    shards = [[bridge_example(10 * i + k) for k in range(2)] for i in range(4)]
    splits = {"train": shards, "val": [[bridge_example(99)]]}
    source = write_rlds(tmp_path / "libero_10", splits, "robot_data", prefix="liber_o10")
    next(source.glob("*train*00001-of*")).unlink()
    folder = convert(source, tmp_path / "out")
    assert "1 of 4 shards of train" in capsys.readouterr().out
    texts = [e.metadata["language"] for e in episodes_of(folder)]
    assert sorted(texts) == sorted(f"do {k}" for k in (0, 1, 20, 21, 30, 31, 99))
    few = convert(source, tmp_path / "few", splits="train", max_shards=2)
    texts = [e.metadata["language"] for e in episodes_of(few)]
    assert sorted(texts) == sorted(f"do {k}" for k in (0, 1, 20, 21))
    rest = convert(source, tmp_path / "few")  # the same command without limits adds the rest
    assert len(episodes_of(rest)) == 7
    test = convert(source, tmp_path / "test", splits="test")
    assert [e.metadata["language"] for e in episodes_of(test)] == ["do 99"]
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"][1]["filepathTemplate"] = "its_own-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (source / "dataset_info.json").write_text(json.dumps(info))
    assert len(episodes_of(convert(source, tmp_path / "template"))) == 7
    with pytest.raises(data.InputError, match="'tset'.*choose of them"):
        convert(source, tmp_path / "typo", splits="train,tset")


def test_shards_that_were_finished_when_another_failed_are_kept(tmp_path):
    shards = [[bridge_example(10 * i + k) for k in range(2)] for i in range(6)]
    source = write_rlds(tmp_path / "rlds", {"train": shards})
    spoil(next(source.glob("*00003-of*")), "payload")
    with pytest.raises(data.InputError, match="wrong checksum"):
        convert(source, tmp_path / "out", num_workers=3)
    assert episodes_of(tmp_path / "out" / "bridge_v2")  # and the index names all files


def spoil(path: Path, fault: str) -> None:
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    second = size + 16
    if fault == "payload":
        content[second + 12 + 50] ^= 4
    elif fault == "length":
        content[second] ^= 1
    elif fault == "huge":
        header = struct.pack("<Q", 1 << 60)
        content[second : second + 12] = header + struct.pack("<I", masked(slow_crc32c(header)))
    elif fault == "cut":
        del content[-5:]
    elif fault == "lost":
        del content[second:]
    path.write_bytes(content)


@pytest.mark.parametrize(
    "fault, message, left",
    [
        ("payload", "wrong checksum", 2),
        ("length", "damaged length", 1),
        ("huge", "cut off", 1),
        ("cut", "cut off", 2),
        ("lost", "should be 3 episodes", 1),
    ],
)
def test_damaged_shards_stop_or_are_counted(tmp_path, fault, message, left):
    source = write_rlds(tmp_path / "rlds", {"train": [[bridge_example(k) for k in range(3)]]})
    spoil(next(source.glob("*tfrecord*")), fault)
    with pytest.raises(data.InputError, match=message):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    folder = convert(source, tmp_path / "out", on_error="skip")
    assert len(episodes_of(folder)) == left
    errors = data.read_index(folder)[1][0]["errors"]
    assert len(errors) == 3 - left  # each episode that is not there is counted
    assert message in errors[0] and "robot_data-train.tfrecord-00000-of-00001, episode" in errors[0]
    if fault == "payload":  # unless told not to look
        convert(source, tmp_path / "blind", check_crc=False, on_error="skip")


def broken_example(fault: str) -> dict:
    example = bridge_example(1)
    step = example["steps"][1]
    if fault == "text":
        step["observation"]["image_0"] = b"no image"
    elif fault == "nan":
        step["action"] = step["action"] * np.float32(np.nan)
    elif fault == "missing":
        for each in example["steps"]:
            del each["action"]
    elif fault == "ragged":
        example["steps"][2]["action"] = example["steps"][2]["action"][:4]
    elif fault == "empty":
        for each in example["steps"]:
            each["observation"]["image_0"] = b""
    return example


@pytest.mark.parametrize(
    "fault, message",
    [
        ("text", "not a JPEG"),
        ("nan", "not finite"),
        ("missing", "no steps/action"),
        ("ragged", "does not match features.json"),
        ("empty", "not a JPEG"),
    ],
)
def test_bad_records_stop_or_are_counted(tmp_path, fault, message):
    examples = [bridge_example(0), broken_example(fault), bridge_example(2)]
    source = write_rlds(tmp_path / "rlds", {"train": [examples]})
    with pytest.raises(data.InputError, match=message):
        convert(source, tmp_path / "out")
    folder = convert(source, tmp_path / "out", on_error="skip")
    assert [e.metadata["language"] for e in episodes_of(folder)] == ["do 2", "do 0"]
    (error,) = data.read_index(folder)[1][0]["errors"]
    assert message in error and "episode 1" in error


@pytest.mark.parametrize(
    "fault, said",
    [("camera", "features"), ("foreign", "features"), ("features", "features.json"),
     ("class", "features.json"), ("info", "dataset_info.json"),
     ("template", "dataset_info.json"), ("empty", "nothing to convert"),
     ("two", "name one of them"), ("absent", "check --source")],
)  # fmt: skip
def test_bad_schemas_are_refused_before_anything_is_written(tmp_path, fault, said):
    source, name = write_rlds(tmp_path / "in" / "a", {"train": [[bridge_example(0)]]}), "bridge_v2"
    if fault == "camera":
        name = "viola"
    elif fault in ("foreign", "class"):
        text, known = (source / "features.json").read_text(), "tensorflow_datasets.core.features."
        other = "this.Text" if fault == "foreign" else f"{known}no.Text"
        (source / "features.json").write_text(text.replace(f"{known}text_feature.Text", other))
    elif fault in ("features", "info"):
        path = source / ("features.json" if fault == "features" else "dataset_info.json")
        path.write_text("{")
    elif fault in ("template", "empty"):
        info = json.loads((source / "dataset_info.json").read_text())
        change = {"shardLengths": []} if fault == "empty" else {"filepathTemplate": "x{WHAT}"}
        info["splits"][0] |= change
        (source / "dataset_info.json").write_text(json.dumps(info))
    elif fault == "two":
        write_rlds(tmp_path / "in" / "b", {"train": [[bridge_example(0)]]})
    with pytest.raises(data.InputError, match=said):
        convert(tmp_path / ("in" if fault != "absent" else "nowhere"), tmp_path / "out", name)
    assert "this" not in sys.modules and not list(tmp_path.glob("out/*/*"))


def test_conversion_with_other_options_into_the_same_folder_is_refused(tmp_path):
    source = write_rlds(tmp_path / "rlds", {"train": [[bridge_example(0)]]})
    convert(source, tmp_path / "out")
    with pytest.raises(data.InputError, match="take another"):
        convert(source, tmp_path / "out", image_size=64)


def test_full_disk_is_named_and_what_was_finished_stays(tmp_path, capsys, monkeypatch):
    shards = [[bridge_example(i)] for i in range(4)]
    (tmp_path / "out/bridge_v2").mkdir(parents=True)
    (tmp_path / "out/bridge_v2/index.jsonl").write_text('{"dataset": "bri')  # killed at once
    source = write_rlds(tmp_path / "rlds", {"train": shards})
    write, written = data.write_atomic, []

    def limited(path, content):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(data, "write_atomic", limited)
    words = ("--dataset_name", "bridge_v2", "--source", source, "--output_dir", tmp_path / "out")
    words += ("--image_size", 32, "--num_workers", 1)
    code, _, said = run(capsys, monkeypatch, *words)
    assert code == 2 and "No space left" in said and "safetensors" in said and "free space" in said
    monkeypatch.undo()
    assert len(episodes_of(tmp_path / "out" / "bridge_v2")) == 2
    assert len(episodes_of(convert(source, tmp_path / "out"))) == 4


# --- a user's own episodes


def test_own_npz_and_image_folders_become_episodes(tmp_path):
    source, frames = tmp_path / "mine", np.stack([picture(t) for t in range(4)])
    actions = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    (source / "train").mkdir(parents=True)
    np.savez(source / "train" / "a.npz", frames=frames, actions=actions, language="lift",
             success=True, fps=7.0, states=np.zeros((4, 3)))  # fmt: skip
    np.savez(source / "train" / "b.npz", frames=np.stack([frames] * 2), actions=actions)
    for camera in ("front", "wrist"):
        (source / "test" / "c" / camera).mkdir(parents=True)
        for t in range(4):
            (source / "test" / "c" / camera / f"{t:03d}.jpg").write_bytes(jpeg(frames[t]))
    np.save(source / "test" / "c" / "actions.npy", actions)
    (source / "test" / "c" / "metadata.json").write_text('{"language": "push", "success": false}')
    folder = convert(source, tmp_path / "out", "mine")
    named = {Path(e.metadata["source"]).parts[1]: e for e in episodes_of(folder)}
    a, b, c = named["a.npz"], named["b.npz"], named["c"]
    assert (a.metadata["language"], a.metadata["success"], a.metadata["fps"]) == ("lift", True, 7)
    assert np.array_equal(a.actions[:, :7], actions) and not a.actions[:, 7:].any()
    assert (a.views, b.views, c.views) == ([0], [0, 1], [0, 1])
    assert c.path.parent.name == "test" and c.jpeg_bytes(2, 1) == jpeg(frames[2])
    assert (c.metadata["language"], c.metadata["success"]) == ("push", False)
    np.savez(source / "train" / "0.npz", frames=frames, actions=actions)  # added later
    assert len(episodes_of(convert(source, tmp_path / "out", "mine"))) == 4
    mapped = convert(source, tmp_path / "mapped", "mine", action_mapping="bridge", fps=3)
    assert data.read_index(mapped)[0]["action_mapping"] == "bridge"
    assert {e.metadata["fps"] for e in episodes_of(mapped)} == {3, 7}


def test_own_images_stand_in_the_order_of_their_numbers_and_keep_their_brightness(tmp_path):
    source, out = tmp_path / "mine" / "walk", tmp_path / "out"
    source.mkdir(parents=True)
    for t in range(12):  # 16 bits a pixel
        grey = np.full((16, 16), 5000 * t, np.uint16)
        Image.fromarray(grey).save(source / f"{t}.png")
    np.save(source / "actions.npy", np.zeros((12, 7)))
    (source / "metadata.json").write_text('{"fps": 12}')
    folder = convert(source.parent, out, "mine")
    (episode,) = episodes_of(folder)
    shown = episode.frames(range(12), [0], None)[0].mean((1, 2, 3))
    assert np.abs(shown - 5000 * np.arange(12) / 256).max() < 2
    assert data.read_index(folder)[0]["fps"] == 12  # the first episode's
    assert len(episodes_of(convert(source.parent, out, "mine"))) == 1  # still
    with pytest.raises(data.InputError, match="splits and max_shards"):
        convert(source.parent, tmp_path / "new", "mine", max_shards=1)


def test_a_run_that_finished_nothing_binds_no_later_one(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    np.savez(source / "a.npz", frames=np.stack([picture(0)] * 3), actions=np.zeros((3, 3)))
    with pytest.raises(data.InputError, match="7 to 10"):
        convert(source, tmp_path / "out", "mine", fps=3)
    (source / "a.npz").rename(source / ".a.npz")
    with pytest.raises(data.InputError, match=r"holds no .*npz"):  # but a hidden one
        convert(source, tmp_path / "out", "mine", fps=3)
    np.savez(source / "a.npz", frames=np.stack([picture(0)] * 3), actions=np.zeros((3, 7)))
    folder = convert(source, tmp_path / "out", "mine", fps=9)
    assert data.read_index(folder)[0]["fps"] == 9
    with pytest.raises(data.InputError, match="was written with"):
        convert(source, tmp_path / "out", "mine", fps=3)


@pytest.mark.parametrize(
    "fault", ["no frames", "pickle", "zip", "width", "lengths", "text", "words", "point"]
)
def test_bad_own_episodes_are_refused_or_counted(tmp_path, fault):
    source, frames = tmp_path / "mine", np.stack([picture(t) for t in range(4)])
    source.mkdir()
    values = {"frames": frames, "actions": np.zeros((4, 7))}
    np.savez(source / "good.npz", **values)
    changes = {
        "no frames": {"frames": np.zeros((0, 8, 8, 3), np.uint8)},
        "pickle": {"frames": np.array([{}], object)},
        "zip": {},
        "width": {"actions": np.zeros((4, 3))},
        "lengths": {"actions": np.zeros((5, 7))},
        "text": {"frames": np.array(["a"] * 4)},
        "words": {"actions": np.array([["a"] * 7] * 4)},
        "point": {"frames": np.zeros((), np.uint8)},
    }
    np.savez(source / "bad.npz", **{**values, **changes[fault]})
    if fault == "zip":
        (source / "bad.npz").write_bytes((source / "good.npz").read_bytes()[:-300])
    with pytest.raises(data.InputError, match="bad.npz"):
        convert(source, tmp_path / "out", "mine")
    folder = convert(source, tmp_path / "out", "mine", on_error="skip")
    assert [e.metadata["source"] for e in episodes_of(folder)] == ["good.npz/0"]


@pytest.mark.parametrize(
    "about", [{"language": 5}, {"success": "no"}, {"fps": math.nan}, {"fps": "5"}, {"language": {}}]
)
def test_own_metadata_of_other_kinds_is_refused(tmp_path, about):
    values = {"frames": picture(0)[None], "actions": np.zeros((1, 7))}
    (tmp_path / "in" / "a").mkdir(parents=True)
    np.savez(tmp_path / "in" / "a.npz", **values)
    (tmp_path / "in" / "a" / "0.png").write_bytes(jpeg(picture(0), "PNG"))
    np.save(tmp_path / "in" / "a" / "actions.npy", values["actions"])
    (tmp_path / "in" / "a" / "metadata.json").write_text(json.dumps(about))
    with pytest.raises(data.InputError, match="a: language is text"):
        convert(tmp_path / "in", tmp_path / "out", "mine")


def test_own_episodes_keep_their_numbers_when_a_run_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(5):
        np.savez(tmp_path / "in" / f"{k}.npz", frames=picture(k)[None], actions=np.zeros((1, 7)))
    whole = convert(tmp_path / "in", tmp_path / "whole", "mine")
    folder = convert(tmp_path / "in", tmp_path / "out", "mine")
    header, *lines = (folder / "index.jsonl").read_bytes().splitlines(True)
    lines.sort(key=lambda line: json.loads(line)["shard"])
    (folder / "index.jsonl").write_bytes(header + lines[2] + lines[4])  # as after a kill
    for a, b in zip(episodes_of(convert(tmp_path / "in", tmp_path / "out", "mine")),
                    episodes_of(whole), strict=True):  # fmt: skip
        assert a.path.name == b.path.name and a.path.read_bytes() == b.path.read_bytes()


def test_hidden_files_are_no_frames_and_a_lone_episode_folder_is_a_data_set(tmp_path):
    folder = tmp_path / "mine"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("0.png", "1.png", "._0.png"):
        (folder / name).write_bytes(jpeg(picture(0), "PNG"))
    np.save(folder / "actions.npy", np.zeros((2, 7)))
    assert len(*episodes_of(convert(folder, tmp_path / "out", "mine"))) == 2


@pytest.mark.parametrize("file", ["actions.npy", "metadata.json", "1.png"])
def test_damaged_file_of_an_own_folder_is_named(tmp_path, file):
    folder = tmp_path / "mine" / "a"
    folder.mkdir(parents=True)
    for t in range(2):
        (folder / f"{t}.png").write_bytes(jpeg(picture(t), "PNG"))
    np.save(folder / "actions.npy", np.zeros((2, 7)))
    (folder / "metadata.json").write_text('{"language": "lift", "operator": "me"}')
    (episode,) = episodes_of(convert(tmp_path / "mine", tmp_path / "good", "mine"))
    assert episode.metadata["language"] == "lift"
    (folder / file).write_bytes((folder / file).read_bytes()[:-40])
    with pytest.raises(data.InputError, match="a, episode 0" if file == "1.png" else file):
        convert(tmp_path / "mine", tmp_path / "out", "mine")


@pytest.mark.parametrize("kind, file", [("a LeRobot", "meta/info.json"), ("an MP4", "a/b.mp4")])
def test_video_folders_are_answered_with_two_lines_of_python(tmp_path, kind, file):
    (tmp_path / "in" / file).parent.mkdir(parents=True)
    (tmp_path / "in" / file).write_text("{}")
    with pytest.raises(data.InputError, match=f"{kind} folder") as error:
        convert(tmp_path / "in", tmp_path / "out", "mine")
    lines = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    compile("\n".join(line.strip() for line in lines), "answer", "exec")  # it is Python


def test_those_two_lines_turn_a_video_into_an_episode(tmp_path):
    av, video = pytest.importorskip("av"), tmp_path / "in" / "a.mp4"
    video.parent.mkdir()
    with av.open(str(video), "w") as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width = stream.height = 32
        for t in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(t), format="rgb24")))
        out.mux(stream.encode())
    with pytest.raises(data.InputError) as error:
        convert(video.parent, tmp_path / "out", "mine")
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    names = {"av": av, "np": np, "video": str(video), "actions": np.zeros((5, 7)), "text": "lift"}
    exec("\n".join(lines), {**names, "name": tmp_path / "episodes.npz"})
    video.unlink()
    (episode,) = episodes_of(convert(tmp_path, tmp_path / "out", "mine"))
    assert len(episode) == 5 and episode.metadata["language"] == "lift"


# --- downloads


class Server(http.server.ThreadingHTTPServer):
    """Serve a folder; `faults` are used up one a request of a shard."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        is_shard = "tfrecord" in name
        server.requests.append((name, self.headers.get("Range")))
        fault = server.faults.pop(0) if is_shard and server.faults else None
        path = server.folder / name
        if fault in (403, 503) or not path.is_file():
            self.send_error(fault or 404)
            return
        content, start = path.read_bytes(), 0
        if self.headers.get("Range") and fault != "no range":
            start = int(self.headers["Range"][6:].rstrip("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", span)
        if fault == "short":  # somebody on the way lost the rest and does not know
            content = content[:-100]
        length = len(content) - start
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault == "corrupt":
            content = content[:-9] + bytes(9)
        if fault in ("cut", "stall"):
            self.wfile.write(content[start : start + length // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(1.0)
            self.connection.shutdown(2)
            return
        self.wfile.write(content[start:])


@pytest.fixture
def server(tmp_path, monkeypatch):
    write_rlds(
        tmp_path / "web",
        {"train": [[bridge_example(10 * i + k) for k in range(2)] for i in range(3)]},
    )
    server = Server(tmp_path / "web")
    fetch = data.download
    quick = {"timeout": 0.3, "tries": 3, "pause": 0.001}
    monkeypatch.setattr(data, "download", lambda *args: fetch(*args, **quick))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["cut", "cut", "cut", "cut", "cut"],
        ["stall"],
        [503, 503, "cut", 503],
        ["cut", "no range", "cut"],
    ],
)
def test_download_survives_bad_connections(tmp_path, server, faults):
    server.faults = list(faults)
    folder = convert(server.url, tmp_path / "out", num_workers=1)
    local = convert(server.folder, tmp_path / "local")
    for a, b in zip(episodes_of(folder), episodes_of(local), strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()
    assert not server.faults and not list((folder / "download").glob("*tfrecord*"))
    resumed = [span for _, span in server.requests if span]
    assert bool(resumed) == ("cut" in faults or "stall" in faults)
    for record in data.read_index(folder)[1]:
        content = (server.folder / record["shard"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["bytes"] == len(content)


def test_a_server_without_ranges_is_asked_once_and_read_from_the_beginning(tmp_path, server):
    shard = next((tmp_path / "web").glob("*00000-of-00003"))
    (tmp_path / "a.part").write_bytes(b"half of it")
    server.faults = ["no range"]
    data.download(f"{server.url}/{shard.name}", tmp_path / "a", lambda count: None)
    assert (tmp_path / "a").read_bytes() == shard.read_bytes() and len(server.requests) == 1


def test_download_gives_up_in_one_sentence_and_continues_later(tmp_path, server):
    server.faults = ["cut", 503, 503, 503, 503]
    with pytest.raises(data.InputError, match="run the same command later"):
        convert(server.url, tmp_path / "out", num_workers=1)
    kept = next((tmp_path / "out").rglob("*00000-of-00003.part"))
    assert kept.stat().st_size > 0
    server.faults, server.requests = [], []
    assert len(episodes_of(convert(server.url, tmp_path / "out", num_workers=1))) == 6
    spans = [span for name, span in server.requests if "00000-of" in name]
    assert len(spans) == 1 and spans[0].startswith("bytes=")  # went on where it was
    for status in (403, 404):
        server.faults = [403]
        with pytest.raises(data.InputError, match=str(status)):
            convert(server.url + ("/x" if status == 404 else ""), tmp_path / str(status))


@pytest.mark.parametrize("fault, said", [("corrupt", "wrong checksum"), ("short", "is cut off")])
def test_shard_damaged_on_its_way_is_fetched_again(tmp_path, server, fault, said):
    server.faults = [fault]
    with pytest.raises(data.InputError, match=said):
        convert(server.url, tmp_path / "out", num_workers=1)
    assert len(episodes_of(convert(server.url, tmp_path / "out"))) == 6


def test_public_buckets_are_asked_over_https(tmp_path, monkeypatch):
    asked = []

    def answer(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.HTTPError(request.full_url, 404, "Not Found", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(data.InputError, match="404"):
        convert("", tmp_path, "viola")
    assert asked == ["https://storage.googleapis.com/gresearch/robotics/viola/0.1.0/features.json"]


def test_full_disk_ends_a_download_without_another_try(tmp_path, server, monkeypatch):
    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device", self.name)

    monkeypatch.setattr(data, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left on device: .*a.part"):
        data.download(f"{server.url}/features.json", tmp_path / "a", lambda count: None)
    assert len(server.requests) == 1


def fork(target, *args):
    """Start a process to be killed; the lock that tqdm shares with it would outlive it."""

    def run():
        tqdm.set_lock(threading.RLock())
        target(*args)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_killed_conversion_continues_and_ends_equal(tmp_path):
    shards = [[bridge_example(10 * i + k, 12) for k in range(3)] for i in range(8)]
    source = write_rlds(tmp_path / "rlds", {"train": shards})
    whole, folder = convert(source, tmp_path / "whole"), tmp_path / "out" / "bridge_v2"
    rng, kills = np.random.default_rng(0), 0
    while kills < 10:
        process = fork(convert, source, tmp_path / "out")
        before, more = len(list(folder.glob("*/*"))), int(rng.integers(8))
        end = time.time() + 20
        while process.is_alive() and len(list(folder.glob("*/*"))) < before + more:
            assert time.time() < end, "conversion hangs"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 2
    convert(source, tmp_path / "out")
    assert not list(folder.glob("*/.*"))  # nothing half written is left
    for a, b in zip(episodes_of(folder), episodes_of(whole), strict=True):
        assert a.path.name == b.path.name and a.path.read_bytes() == b.path.read_bytes()


# --- the latent cache


def encode(frames: torch.Tensor) -> torch.Tensor:
    assert frames.shape[0] == 1 and frames.shape[1] <= 32 and frames.max() <= 1
    pooled = torch.nn.functional.avg_pool2d(frames[0].permute(0, 3, 1, 2), 8)
    return pooled.permute(0, 2, 3, 1)[None]  # (1, T, 4, 4, 3)


def cache(folder, latents="fp", views=1, shard=(0, 1), encode=encode):
    config = data.DataConfig(str(folder), "robot", image_size=32, views=views)
    data.write_latent_cache(config, "train", latents, encode, shard)


@pytest.mark.parametrize("views", [1, 2])
def test_cache_serves_the_encoder_s_output_without_the_encoder(tmp_path, views):
    make_dataset(tmp_path, [70, 9, 3], views=2)
    cache(tmp_path, views=views)
    fields = {"views": views, "stride": 2, "variable_history": True}
    frames, latents = opened(tmp_path, **fields), opened_latents(tmp_path, **fields)
    assert len(frames) == len(latents) == 2  # the third is too short for a clip
    for key in ((0, 0), (5, 0), (9, 1)):
        z, actions = latents[key]
        rgb = frames[key].frames.reshape(-1, 1, 4, 32, 32, 3)
        wanted = torch.cat([encode(view) for view in rgb])
        assert z.dtype == torch.float32 and z.shape == (
            (2, 4, 4, 4, 3) if views > 1 else (4, 4, 4, 3)
        )
        assert torch.equal(z, wanted.bfloat16().float().squeeze(0))
        assert torch.equal(actions, frames[key].actions)


@pytest.mark.parametrize("latents", [None, "fp"])
def test_clips_as_stored_are_those_of_floats(tmp_path, latents):
    make_dataset(tmp_path, [9])
    cache(tmp_path)
    floats = opened(tmp_path, latents=latents)
    stored = data.EpisodeDataset(floats.config, "train", latents, as_stored=True)
    (one, actions), (other, same) = stored[0], floats[0]
    assert (one.dtype, other.dtype) == (torch.bfloat16 if latents else torch.uint8, torch.float32)
    assert torch.equal(data.to_floats(one), other) and torch.equal(actions, same)


def test_partial_and_stale_caches_are_refused(tmp_path):
    make_dataset(tmp_path, [9, 8, 7])
    with pytest.raises(data.InputError, match="no complete latent cache"):
        opened_latents(tmp_path)
    cache(tmp_path, shard=(0, 2))
    with pytest.raises(data.InputError, match="no complete latent cache"):
        opened_latents(tmp_path)
    cache(tmp_path, shard=(1, 2))  # the last part completes it
    assert len(opened_latents(tmp_path)) == 3
    for change in ({"latents": "other"}, {"image_size": 16}, {"views": (0, 1)}):
        with pytest.raises(data.InputError):
            opened_latents(tmp_path, **change)
    entries = make_dataset(tmp_path / "more", [12])
    os.rename(tmp_path / "more/robot/train/000000000.safetensors",
              tmp_path / "robot/train/000000003.safetensors")  # fmt: skip
    record = {"shard": "new", "episodes": {"train": [{**entries[0], "number": 3}]}}
    data.append_index(tmp_path / "robot", record)
    with pytest.raises(data.InputError, match="1 of 4 episodes"):
        opened_latents(tmp_path)
    count = []
    cache(tmp_path, encode=lambda frames: count.append(frames.shape[1]) or encode(frames))
    assert count == [12] and len(opened_latents(tmp_path)) == 4  # only the new one was encoded
    frames, actions = [jpeg(picture(t + 50)) for t in range(9)], np.zeros((9, 10))
    data.write_episode(tmp_path / "robot/train/000000000.safetensors", frames, actions, {})
    dataset = opened_latents(tmp_path)
    assert dataset[1].frames.shape == (4, 4, 4, 3)
    with pytest.raises(data.InputError, match="stale.*remove it, then --cache_latents true"):
        dataset[0]  # as long as before, of other pictures


def test_cache_interrupted_at_any_write_continues(tmp_path, monkeypatch):
    make_dataset(tmp_path, [6] * 5)
    replace, encoded = os.replace, []

    def counted(frames):
        encoded.append(1)
        return encode(frames)

    for _ in range(6):  # each run dies at its second write
        writes = itertools.count()

        def dying(a, b, writes=writes):
            if next(writes) == 1:
                raise KeyboardInterrupt
            replace(a, b)

        monkeypatch.setattr(os, "replace", dying)
        with contextlib.suppress(KeyboardInterrupt):
            cache(tmp_path, encode=counted)
        monkeypatch.undo()
        if len(list((tmp_path / "robot").rglob("latents*/*.safetensors"))) == 5:
            break
        with pytest.raises(data.InputError, match="no complete"):
            opened_latents(tmp_path)
    assert len(encoded) == 9 and len(opened_latents(tmp_path)) == 5  # four were lost at a write


def test_cache_killed_at_any_moment_continues_and_ends_equal(tmp_path):
    lengths, rng, kills = [12] * 8, np.random.default_rng(0), 0
    make_dataset(tmp_path / "whole", lengths)
    make_dataset(tmp_path / "cut", lengths)
    cache(tmp_path / "whole")
    while kills < 8:
        process = fork(slow_cache, tmp_path)
        process.join(rng.uniform(0.0, 0.06))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        if len(list(tmp_path.glob("cut/robot/train/latents*/*.safetensors"))) < len(lengths):
            with pytest.raises(data.InputError, match="no complete"):
                opened_latents(tmp_path / "cut")
    assert kills >= 2
    cache(tmp_path / "cut")
    dataset, wanted = opened_latents(tmp_path / "cut"), opened_latents(tmp_path / "whole")
    for i in range(len(lengths)):
        assert torch.equal(dataset[i].frames, wanted[i].frames)


def slow_cache(tmp_path):
    torch.set_num_threads(1)  # a forked process has no other threads

    def paced(frames):
        time.sleep(0.01)
        return encode(frames)

    cache(tmp_path / "cut", encode=paced)


# --- damaged files


def mutations(content: bytes, seed: int, count: int = 200):
    """Yield damaged copies: cut, bits flipped, bytes overwritten, a huge header, pieces swapped."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        copy, kind = bytearray(content), k % 5
        at = int(rng.integers(len(copy)))
        head = int(rng.integers(min(600, len(copy))))
        if kind == 0:
            del copy[at:]
        elif kind == 1:
            copy[head] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            copy[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            copy[:8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes() if k % 2 else b"\xff" * 8
        else:
            digits = [i for i, byte in enumerate(copy[:600]) if chr(byte).isdigit()]
            if digits:
                copy[int(rng.choice(digits))] = ord("9")
            copy[head] = int(rng.integers(256))
        yield bytes(copy)


@pytest.mark.parametrize("reader", ["episode", "latents", "tfrecord", "index", "npz", "images"])
def test_two_hundred_damaged_files_give_clean_errors(tmp_path, reader):
    if reader == "tfrecord":
        source = write_rlds(tmp_path / "rlds", {"train": [[bridge_example(k) for k in range(2)]]})
        path = next(source.glob("*tfrecord*"))
        rlds = data.load_rlds(source, data.SOURCES["bridge_v2"])

        def read():
            found = list(data.read_shard(path, data.SOURCES["bridge_v2"], rlds, True))
            for item in found:
                if isinstance(item, data.InputError):
                    raise item
    elif reader in ("npz", "images"):
        frames, actions = np.stack([picture(t) for t in range(3)]), np.zeros((3, 7))
        path = tmp_path / ("a.npz" if reader == "npz" else "actions.npy")
        np.save(path, actions)
        if reader == "npz":
            np.savez(path, frames=frames, actions=actions)
        else:
            (tmp_path / "0.jpg").write_bytes(jpeg(frames[0]))

        def read():
            (found,) = data.read_own(path if reader == "npz" else tmp_path)
            if isinstance(found, data.InputError):
                raise found

    elif reader == "index":
        make_dataset(tmp_path, [6] * 3)
        path, read = tmp_path / "robot" / "index.jsonl", functools.partial(opened, tmp_path)
    else:
        make_dataset(tmp_path, [6])
        cache(tmp_path)
        dataset = opened_latents(tmp_path) if reader == "latents" else opened(tmp_path)
        folder = (
            next((tmp_path / "robot" / "train").glob("latents*")) if reader == "latents" else ""
        )
        path = tmp_path / "robot" / "train" / folder / "000000000.safetensors"

        def read():
            dataset[0]
            if reader == "episode":
                read_episode(path)

    content, errors = path.read_bytes(), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for damaged in mutations(content, 1):
        path.write_bytes(damaged)
        try:
            read()
        except data.InputError as error:
            errors += 1
            assert str(tmp_path) in str(error) or reader == "tfrecord"
    # a flipped bit inside a float or a JPEG may still be a valid file; a TFRecord has checksums
    assert errors >= (195 if reader == "tfrecord" else 100)  # of two hundred
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KB
    path.write_bytes(content)
    read()


# --- the command line


def run(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    """Run data.py's main as the shell would: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
    code = 0
    try:
        data.run_cli(data.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_command_line_converts_inspects_and_answers_in_one_sentence(tmp_path, capsys, monkeypatch):
    train = [[bridge_example(k, 20) for k in range(3)]]
    source = write_rlds(tmp_path / "rlds", {"train": train, "val": [[bridge_example(9, 20)]]})
    spoil(next(source.glob("*train*")), "payload")
    call = functools.partial(run, capsys, monkeypatch)
    flags = ("--dataset_name", "bridge_v2", "--source", source, "--output_dir", tmp_path / "out")
    code, _, said = call(*flags)
    assert code == 2 and said.startswith("error: ") and "wrong checksum" in said
    flags = (*flags, "--on_error", "skip", "--check_crc", "true")
    code, _, said = call(*flags, "--image_size", 64)
    assert code == 2 and "take another" in said  # begun with 256
    code, said, _ = call(*flags)
    assert code == 0 and "2 train episodes, 1 left out" in said
    code, said, _ = call("--inspect", tmp_path / "out" / "bridge_v2")
    assert code == 0
    for text in ("train: 2 episodes, 40 frames", "dropped by a loader", "'do 2'", "wrong checksum"):
        assert text in said
    with Image.open(tmp_path / "out/bridge_v2/contact_sheet.png") as sheet:
        assert sheet.size == (1024, 3 * 142)
    with Image.open(tmp_path / "out/bridge_v2/episodes.gif") as gif:
        assert gif.n_frames > 1 and gif.size == (3 * 128, 128)
    for words in (("--dataset_name", "bridg"), ("--source", "/nowhere"), ("--inspect", tmp_path)):
        code, _, said = call(*words, "--output_dir", tmp_path / "x")
        assert code == 2 and said.startswith("error: ") and len(said.strip().splitlines()) == 1


def test_a_full_disk_anywhere_ends_in_one_sentence(capsys, monkeypatch):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "last.pt")

    monkeypatch.setattr(data, "main", main)
    code, _, said = run(capsys, monkeypatch)
    assert code == 2 and "No space left" in said and "last.pt" in said and "free space" in said

    def other():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "data/file")

    monkeypatch.setattr(data, "main", other)
    code, _, said = run(capsys, monkeypatch)
    assert code == 2 and "data/file" in said and "name another place" in said
    monkeypatch.setattr(data, "main", lambda: open("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):  # what is not ours keeps its traceback
        run(capsys, monkeypatch)


def test_help_names_the_older_bridge_and_the_form_of_own_data(capsys, monkeypatch):
    code, said, _ = run(capsys, monkeypatch, "--help")
    said = " ".join(said.replace("│", " ").split())
    assert code == 0 and "OLDER data set (387 GB" in said
    assert "actions.npy" in said and "--on_error" in said
