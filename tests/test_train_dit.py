"""Training: the run folder, resuming, several processes, bad input. World model: what a run wrote."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dit
from data import (
    DataConfig,
    EpisodeDataset,
    ToyConfig,
    generate_toy,
    load_tensors,
    load_torch,
    run_cli,
)
from diffusion import draw
from world_model import WorldModel

ROOT = Path(__file__).parents[1]
SMALL = (
    "--subset_names mini --image_size 32 --num_frames 5 --batch_size 4 --val_clips 4 --log_every 1 "
    "--action_dropout 0.5 --seed 3 --bf16 False --compile False"
).split()


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    """A few small toy episodes under the name of a data set of its own."""
    folder = tmp_path_factory.mktemp("data")
    generate_toy(folder, ToyConfig(size=32, episodes=10, test_episodes=4, steps=(8, 12)))
    (folder / "toy").rename(folder / "mini")
    return folder


def train(episodes: Path, folder: Path, *words) -> Path:
    """Run train_dit.py on the small episodes, in this process."""
    run("toy", *SMALL, "--dataset_dir", episodes, "--output_dir", folder, *words)
    return folder


def run(*words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_dit.py", *map(str, words)])
        train_dit.main()


def launch(processes: int, *words) -> subprocess.CompletedProcess:
    """Run train_dit.py in processes of its own, as torchrun does."""
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*python, f"--nproc_per_node={processes}", "train_dit.py", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def losses(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "log.csv").open())
    return [float(row["loss"]) for row in rows if row["loss"]]


@pytest.fixture(scope="module")
def straight(episodes, tmp_path_factory) -> Path:
    """Six steps without interruption."""
    return train(episodes, tmp_path_factory.mktemp("runs") / "straight", "--max_steps", 6)


def test_learning_rate_warms_up_and_ends_at_its_floor():
    args = train_dit.Args(lr=1.0, warmup_epochs=2, num_epochs=10, final_lr=0.7)
    rates = [train_dit.lr_at(step, args, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3) and rates[20] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.7) and np.argmax(rates) == 20
    assert train_dit.lr_at(1000, args, 10) == pytest.approx(0.7)


def test_a_run_leaves_all_its_files(straight):
    names = {path.name for path in straight.iterdir()}
    assert {"config.json", "log.csv", "last.pt", "world_model.safetensors"} <= names
    assert "sample_0000006.gif" in names
    with Image.open(straight / "sample_0000006.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (2 * 128, 4 * 128)  # real | dreamed, four rows
    assert len(losses(straight)) == 6 and all(np.isfinite(losses(straight)))
    assert json.loads((straight / "config.json").read_text())["max_steps"] == 6


def test_resumed_equals_uninterrupted_bit_for_bit(episodes, straight, tmp_path, capsys):
    folder = train(episodes, tmp_path / "run", "--max_steps", 3)
    run("--resume", folder, "--max_steps", 6)
    assert "max_steps 3 -> 6" in capsys.readouterr().out
    assert losses(folder) == losses(straight)
    once, twice = (load_tensors(f / "world_model.safetensors")[0] for f in (straight, folder))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(episodes, tmp_path, capsys):
    folder = train(episodes, tmp_path / "run", "--max_steps", 4, "--save_every", 2)
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    run("--resume", folder, "--max_steps", 4)
    assert "warning" in (out := capsys.readouterr().out) and "at step 2" in out


def test_a_signal_saves_and_names_the_command_to_go_on(episodes, tmp_path, monkeypatch, capsys):
    draws = []

    def interrupt(*args, **kwargs):  # as Ctrl-C does, in the third step
        draws.append(1)
        if len(draws) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args, **kwargs)

    monkeypatch.setattr(train_dit, "draw", interrupt)
    folder = train(episodes, tmp_path / "run", "--max_steps", 50)
    out = capsys.readouterr().out
    assert f"stopped at step 3; go on with: python train_dit.py --resume {folder}" in out
    assert load_torch(folder / "last.pt")["step"] == 3
    assert (folder / "world_model.safetensors").is_file()


def test_two_processes_and_accumulation_equal_one_process(episodes, tmp_path):
    one = losses(train(episodes, tmp_path / "one", "--max_steps", 20))
    half = ("--batch_size", 2, "--max_steps", 20)
    accumulated = losses(
        train(episodes, tmp_path / "accum", *half, "--grad_accum", 2, "--max_steps", 8)
    )
    done = launch(
        2, "toy", *SMALL, "--dataset_dir", episodes, "--output_dir", tmp_path / "two", *half
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two = losses(tmp_path / "two")
    # float32 sums in another order
    assert np.allclose(one[:8], accumulated, atol=1e-5, rtol=0)
    assert np.allclose(one, two, atol=1e-5, rtol=0), np.abs(np.subtract(one, two)).max()


def test_the_world_model_file_repeats_the_training_time_sample(episodes, straight):
    config = DataConfig(
        dataset_dir=str(episodes),
        subset_names="mini",
        image_size=32,
        num_frames=5,
        stride=1,
        seed=3,
    )
    frames, actions = EpisodeDataset(config, "test")[0]
    model = WorldModel(straight / "world_model.safetensors", device="cpu")
    seed = torch.Generator().manual_seed(3)
    n = model.data["num_history"]
    video = model.rollout(frames[:n], actions, generator=seed)
    assert video.shape == frames.shape and torch.equal(video[:n], frames[:n])
    with Image.open(straight / "sample_0000006.gif") as gif:
        gif.seek(4)
        shown = np.asarray(gif.convert("RGB"), np.float32)[:128:4, 128::4] / 255
    # a palette of 256 colours for all frames: a few percent
    assert np.abs(shown - video[4].numpy()).mean() < 0.05


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dataset_dir", "nowhere"], "nowhere"),
        (["--subset_names", "mini,other"], "other"),
        (["--num_history", "9"], "num_history"),
        (["--pixel_patch", "7"], "multiples of 7"),
        (["--resume", "nowhere"], "nowhere"),
        (["--freeze", "block5"], "block5"),
        (["--num_frames", "30"], "too short"),
        (["--adapter_type", "svae"], "adapter_checkpoint_path"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(episodes, tmp_path, words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train(episodes, tmp_path / "run", *words))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
