"""What a GPU would refuse, or have to be waited for: found on a device that computes on the CPU."""

import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import finish, start
from second_device import needed

import data
from data import ToyConfig, generate_toy

SHAPE = "--subset_names toy --image_size 32 --num_frames 4 --batch_size 2 --seed 3 "
SHAPE += "--bf16 false --compile false --log_every 99 --val_every 99 --save_every 99 --val_clips 2"
pytestmark = needed


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_toy(folder, ToyConfig(size=32, episodes=6, test_episodes=4, steps=(8, 12)))
    return folder


def watched(module) -> None:
    """Have a script's `main` run where the device exists, and say what the host waited for."""
    import second_device

    second_device.register()
    main = module.main

    def watch() -> None:
        main()
        for what, times in second_device.WAITS.items():
            print(f"waited {times} times: {what}", flush=True)

    module.main = watch
    if module.__name__ == "train_dit":
        module.DIT_SIZES["T"] = {"dim": 48, "depth": 2, "heads": 2}


def train(script: str, episodes: Path, folder: Path, words: str, device="second") -> Counter:
    """Train on a device; return what the host waited for, and how often."""
    words = ["toy", *SHAPE.split(), *words.split(), "--dataset_dir", episodes, "--device", device]
    log = folder.with_name(f"{folder.name}.txt")
    text = finish(start(script, [*words, "--output_dir", folder], log, 1, watched), log)
    found = re.findall(r"^waited (\d+) times: (.*)$", text, re.MULTILINE)
    return Counter({what: int(times) for times, what in found})


@pytest.mark.parametrize(
    "script, words",
    [
        ("train_dit", "--standardize true --variable_history true"),
        ("train_dit", "--cache_latents false --num_views 2 --objective ddpm --grad_accum 2"),
        ("train_adapter", "--gan_weight 0.1 --gan_start 0 --decoder_multipliers 1,1,1,1"),
        ("train_adapter", "--use_pixel_decoder false --cache_latents true --crop 2"),
    ],
)
def test_training_never_waits_for_the_device_and_learns_as_on_the_cpu(
    episodes, tmp_path, script, words
):
    short = train(script, episodes, tmp_path / "short", f"{words} --max_steps 2")
    long = train(script, episodes, tmp_path / "long", f"{words} --max_steps 5")
    assert short and not long - short, long - short
    train(script, episodes, tmp_path / "cpu", f"{words} --max_steps 5", "cpu")
    logs = (tmp_path / name / "log.csv" for name in ("long", "cpu"))
    (one, *_), (other, *_) = (csv.DictReader(log.open()) for log in logs)
    names = [name for name in one if "grad" in name or name in ("loss", "gan", "critic")]
    names = [name for name in names if other[name]]
    values = [[float(row[name]) for name in names] for row in (one, other)]
    assert values[0] == pytest.approx(values[1], rel=2e-3)  # Adam's first steps are mere signs


def dream_on_it(module) -> None:
    """Have world_model.py's `main` do on the device what a user does with a model."""

    def main() -> None:
        from second_device import UNKNOWN, WAITS

        UNKNOWN.add(torch.float64)
        path, folder = sys.argv[1:]
        model = module.WorldModel(path, device="second")
        cut = {"image_size": 32, "num_frames": 4, "num_history": 1, "stride": 1}
        config = module.data.DataConfig(folder, "toy", **cut)
        frames, actions = module.data.EpisodeDataset(config, "test")[0]
        for known in (frames, (255 * frames).byte(), frames.numpy(), frames.double()):
            model.reset(known[:2], actions[:1])
        assert model.step(actions[1]).device.type == "second"
        assert model.rollout(frames[:1], actions).shape == frames.shape
        assert model.decode(model.encode(frames).cpu()).device.type == "second"
        model.reset(frames[:1])
        searches = ("cem", {"population": 8, "elites": 2}), ("gradient", {"steps": 2})
        for method, options in searches:
            assert model.plan(frames[2], 1, method, **options).device.type == "second"
        z, beside = model.encode(frames)[None, :1], actions[None].to("second")
        for context, guidance in (("exact", 1.0), ("exact", 2.0), ("rolling", 1.0)):
            options = {"context": context, "guidance": guidance}
            noise = torch.randn(1, 3, *z.shape[2:]).to("second")
            WAITS.clear()
            model.objective.rollout(model.dit, z, beside, 3, noise=noise, **options)
            print(f"{context}, {guidance}: waited {dict(WAITS)}")

    module.main = main
    watched(module)


def test_training_on_a_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(data, "open_device", torch.device)
    with pytest.raises(data.InputError, match="device mps: it lacks float64"):
        data.init_processes("mps")


def test_a_model_dreams_and_is_measured_on_the_device_as_on_the_cpu(episodes, tmp_path):
    train("train_dit", episodes, tmp_path / "run", "--max_steps 2 --standardize true")
    path, log = tmp_path / "run/world_model.safetensors", tmp_path / "log"
    text = finish(start("world_model", [path, episodes], log, 1, dream_on_it), log)
    assert text.count("waited {}") == 3, text
    words = f"toy --dataset_dir {episodes} --checkpoint_path {path} --horizons 1 --windows 2 "
    words += "--population 16 --num_episodes 4 --max_steps 2 --metrics "
    words += "psnr,ssim,pck_patch,controllability,idm,counterfactual"
    rows = {}
    for device in ("cpu", "second"):
        flags = [*words.split(), "--device", device, "--output_dir", tmp_path / device]
        before, log = watched if device == "second" else None, tmp_path / f"{device}.txt"
        finish(start("evaluate", flags, log, 1, before), log)
        results = json.loads((tmp_path / device / "results.json").read_text())
        rows[device] = results["metrics"]
    assert rows["cpu"].keys() == rows["second"].keys()
    assert all(rows["second"][name]["value"] is not None for name in ("cem_k1", "idm_r_k1"))
    for name in ("psnr", "ssim", "counterfactual_error"):
        assert rows["second"][name]["value"] == pytest.approx(rows["cpu"][name]["value"], rel=1e-4)
