"""Training: run folder, resuming, several processes, bad input. World model: what a run wrote."""

import contextlib
import csv
import ctypes
import dataclasses
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start, torchrun, wait_until
from test_data import mutations
from test_world_model import Pairs

import data
import train_dit
from adapter import PixelDecoder, PixelDecoderConfig
from data import (
    Clip,
    DataConfig,
    EpisodeDataset,
    InputError,
    Processes,
    ToyConfig,
    generate_toy,
    load_tensors,
    load_torch,
    run_cli,
)
from diffusion import FlowMatching, draw
from dit import load_dit
from encoders import EncoderConfig, create_autoencoder
from world_model import LatentSpace, WorldModel

SMALL = (
    "--subset_names mini --image_size 32 --num_frames 5 --batch_size 4 --val_clips 4 --log_every 1 "
    "--action_dropout 0.5 --seed 3 --bf16 False --compile False"
).split()


def small(module) -> None:
    module.DIT_SIZES["T"] = {"dim": 48, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
        patch.setitem(train_dit.DIT_SIZES, "T", None)  # put back afterwards
        small(train_dit)
        torch.set_num_threads(1)
        train_dit.main()


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


def rows(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "log.csv").open()))


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, average and optimiser, bit for bit."""
    states = [load_torch(folder / "last.pt") for folder in (one, other)]
    assert states[0].keys() == states[1].keys() and states[0]["step"] == states[1]["step"]
    flat = [
        {**s["dit"], **{f"ema.{n}": t for n, t in s["ema"].items()}}
        | {f"{i}.{n}": t for i, m in s["optimizer"]["state"].items() for n, t in m.items()}
        for s in states
    ]
    return all(torch.equal(tensor, flat[1][name]) for name, tensor in flat[0].items())


def test_resumed_equals_uninterrupted_bit_for_bit(episodes, straight, tmp_path, capsys):
    folder = train(episodes, tmp_path / "run", "--max_steps", 3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # another process would start like this
    run("--resume", folder, "--max_steps", 6)
    assert "max_steps 3 -> 6" in capsys.readouterr().out
    assert losses(folder) == losses(straight)
    assert same(folder, straight)
    once, twice = (load_tensors(f / "world_model.safetensors")[0] for f in (straight, folder))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    a, b = (load_torch(f / "last.pt") for f in (straight, folder))
    assert {"epoch", "position", "config", "skipped"} <= a.keys()
    assert a["random"][0][:2] == b["random"][0][:2]  # Python and NumPy
    assert torch.equal(a["random"][0][2], b["random"][0][2])


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(episodes, tmp_path, capsys):
    flags = "--max_steps 4 --save_every 2 --val_every 2".split()
    folder = train(episodes, tmp_path / "run", *flags)
    last, log = folder / "last.pt", rows(folder)
    assert [row["step"] for row in log] == ["1", "2", "2", "3", "4", "4"]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    run("--resume", folder, "--max_steps", 4)
    out = capsys.readouterr().out
    assert f"warning: {last}" in out and f"resumed {folder} at step 2" in out
    for row, again in zip(log, rows(folder), strict=True):
        assert all(row[name] == again[name] for name in ("step", "loss", "psnr_model"))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # inside a tensor: the file still opens
    last.write_bytes(content)
    run("--resume", folder, "--max_steps", 4)
    out = capsys.readouterr().out
    assert f"warning: {last}" in out and f"resumed {folder} at step 2" in out
    for path in (last, folder / "previous.pt"):
        path.write_bytes(b"PK")
    with pytest.raises(InputError, match="no whole last.pt or previous.pt"):
        run("--resume", folder)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:-9])
    with pytest.raises(InputError, match="config.json: truncated"):
        run("--resume", folder)


def loaded(folder: Path, fixed: dict, episodes: int = 10, **parts) -> SimpleNamespace:
    """Load a checkpoint as a run of so many episodes and these parts does."""
    run = SimpleNamespace(folder=folder, parts=parts, fixed=fixed, dataset=range(episodes))
    run.print0, (run.skipped, run.in_a_row) = print, torch.zeros(2)
    run.proc = data.Processes(0, 1, torch.device("cpu"))
    data.Run.load(run)
    return run


def test_two_hundred_damaged_checkpoints_fall_back_to_the_one_before(straight, tmp_path):
    state, fallen = load_torch(straight / "last.pt"), 0
    del state["dit"], state["ema"], state["optimizer"]  # tensors are tensors
    torch.save(state, tmp_path / "previous.pt")
    content = (tmp_path / "previous.pt").read_bytes()
    for damaged in mutations(content, 2):
        (tmp_path / "last.pt").write_bytes(damaged)
        run = loaded(tmp_path, state["fixed"])
        assert run.step == 6 and run.state["random"]
        fallen += not run.rotate
    assert fallen > 100  # the others hit what nobody reads


def test_resuming_tells_of_other_episodes_and_refuses_other_scripts_and_shapes(straight, capsys):
    fixed = load_torch(straight / "last.pt")["fixed"]
    loaded(straight, fixed, 11)
    assert "episodes 10 -> 11" in capsys.readouterr().out
    with pytest.raises(InputError, match="no whole last.pt"):
        loaded(straight, fixed, critic=None)
    assert "another script or version, without {'critic'}" in capsys.readouterr().out
    with pytest.raises(InputError, match="last.pt: dit is of another model"):
        loaded(straight, fixed, dit=torch.nn.Linear(2, 2))


def test_resuming_lists_changed_flags_and_refuses_what_must_not_change(
    episodes, straight, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(straight, tmp_path / "run")
    run("--resume", folder, "--lr", "1e-5", "--weight_decay", 0.5, "--max_steps", 7)
    out = capsys.readouterr().out
    assert "lr 0.003 -> 1e-05" in out and "max_steps 6 -> 7" in out and "seed" not in out
    (group,) = load_torch(folder / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] < 1e-5 and group["weight_decay"] == 0.5  # not those of the checkpoint
    for flags, match in (
        (("--seed", 4), "--seed 4: the run was started with 3"),
        (("--objective", "ddpm"), "--objective ddpm: the run was started with flow_matching"),
        (("--standardize", False), "--standardize False"),
        (("--freeze", "x_proj"), "--freeze x_proj"),
        (("--batch_size", 2), "4 clips a step .batch_size x grad_accum x processes., now 2"),
    ):
        with pytest.raises(InputError, match=match):
            run("--resume", folder, *flags)
    monkeypatch.setattr(LatentSpace, "fingerprint", "another")
    with pytest.raises(InputError, match="encoder and adapter, now another"):
        run("--resume", folder)
    monkeypatch.undo()
    capsys.readouterr()
    run(f"--resume={folder}")
    assert "lr" not in capsys.readouterr().out.partition("resumed")[0]  # 1e-5 is remembered


def interrupt(module, number=signal.SIGINT, step=3):
    """Send this process a signal in a step, as Ctrl-C or a scheduler does."""
    draws = []

    def watched(*args, **kwargs):
        draws.append(1)
        if len(draws) == step:
            os.kill(os.getpid(), number)
        return draw(*args, **kwargs)

    module.draw = watched


def interrupt_one(module):
    small(module)
    if os.environ["RANK"] == "1":
        interrupt(module, signal.SIGTERM)


def test_the_weight_average_follows_closely_at_first(episodes, tmp_path):
    folder = train(episodes, tmp_path / "run", "--max_steps", 2, "--save_every", 1)
    before, after = (load_torch(folder / f"{name}.pt") for name in ("previous", "last"))
    assert (before["step"], after["step"]) == (1, 2)
    decay = (1 + 1) / (10 + 1)  # at step 1; far below --ema
    for name, average in after["ema"].items():
        expected = torch.lerp(before["ema"][name], after["dit"][name], 1 - decay)
        torch.testing.assert_close(average, expected)


def test_a_largest_norm_of_zero_means_that_nothing_is_clipped(episodes, tmp_path):
    bounds = {
        bound: train(episodes, tmp_path / bound, "--max_steps", 2, "--clip_grad", bound)
        for bound in ("0", "1e9", "1e-3")
    }
    free, wide, tight = (load_torch(bounds[bound] / "last.pt")["dit"] for bound in bounds)
    name = "x_proj.weight"
    assert torch.equal(free[name], wide[name]) and not torch.equal(free[name], tight[name])


def test_a_signal_saves_and_names_the_command_to_go_on(episodes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dit, "draw", draw)
    interrupt(train_dit)
    before = signal.getsignal(signal.SIGTERM)
    folder = train(episodes, tmp_path / "run", "--max_steps", 50)
    assert signal.getsignal(signal.SIGTERM) is before  # signals are ours no longer
    out = capsys.readouterr().out
    assert f"stopped at step 3; go on with: python train_dit.py --resume {folder}" in out
    assert load_torch(folder / "last.pt")["step"] == 3
    assert (folder / "world_model.safetensors").is_file() and (folder / "loss.png").is_file()


def words(episodes: Path, folder: Path, *others) -> list:
    return ["toy", *SMALL, "--dataset_dir", episodes, "--output_dir", folder, *others]


def test_a_signal_to_one_of_two_processes_saves_and_resumes_bit_for_bit(episodes, tmp_path):
    """Variable history, action dropout, accumulation and loader processes included."""
    flags = "--batch_size 1 --grad_accum 2 --num_workers 1 --variable_history True".split()
    flags += "--num_frames 4 --num_history 2 --max_steps 6 --cache_latents False".split()
    folder, straight, log = tmp_path / "run", tmp_path / "straight", tmp_path / "log"
    first = start("train_dit", words(episodes, folder, *flags), log, 2, interrupt_one)
    other = start("train_dit", words(episodes, straight, *flags), tmp_path / "other", 2, small)
    assert "go on with" in finish(first, log)
    step = load_torch(folder / "last.pt")["step"]
    assert 1 <= step <= 3 and len(load_torch(folder / "last.pt")["random"]) == 2
    finish(start("train_dit", ["--resume", folder], log, 2, small), log)
    finish(other, tmp_path / "other")
    assert losses(folder) == losses(straight) and same(folder, straight)


def test_kill_9_at_ten_random_moments_loses_nothing(episodes, tmp_path):
    folder, straight, log = tmp_path / "run", tmp_path / "straight", tmp_path / "log"
    flags = "--max_steps 40 --save_every 2 --val_every 1000 --val_clips 1".split()
    other = start("train_dit", words(episodes, straight, *flags), tmp_path / "other", 1, small)
    rng, steps = random.Random(0), []
    for _ in range(10):
        begun = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
        command = ["--resume", folder] if begun else words(episodes, folder, *flags)
        (process,) = start("train_dit", command, log, 1, small)
        seen, until = len(rows(folder)) if begun else 0, time.monotonic() + 30
        wanted = seen + rng.randrange(4)  # sometimes before the first step, never after the last
        while time.monotonic() < until and process.is_alive():
            if (folder / "log.csv").exists() and len(rows(folder)) >= wanted:
                break
            time.sleep(0.005)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.join()
        steps.append(len(rows(folder)) if (folder / "log.csv").exists() else 0)
    assert 4 < steps[-1] < 40, steps
    finish(start("train_dit", ["--resume", folder], log, 1, small), log)
    finish(other, tmp_path / "other")
    assert same(folder, straight) and losses(folder) == losses(straight)


def capture(module):
    """Have every process compare its weights with the others' when it ends."""
    small(module)
    made, build, leave = [], module.DiT, torch.distributed.destroy_process_group

    def remember(config):
        made.append(build(config))
        return made[-1]

    def compare():
        mine = torch.cat([p.detach().flatten() for p in made[0].parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        print("equal weights" if torch.equal(*both) else "different weights")
        leave()

    module.DiT, torch.distributed.destroy_process_group = remember, compare


def test_two_processes_and_accumulation_equal_one_process(episodes, tmp_path):
    logs = [tmp_path / name for name in ("one.txt", "accum.txt", "two.txt")]
    half = "--batch_size 2 --max_steps 20 --val_every 7".split()
    whole, accumulated = "--max_steps 20", "--batch_size 2 --max_steps 20 --grad_accum 2"
    runs = [
        start("train_dit", words(episodes, tmp_path / "one", *whole.split()), logs[0], 1, small),
        start(
            "train_dit",
            words(episodes, tmp_path / "accum", *accumulated.split()),
            logs[1],
            1,
            small,
        ),
        start("train_dit", words(episodes, tmp_path / "two", *half), logs[2], 2, capture),
    ]
    texts = [finish(*pair) for pair in zip(runs, logs, strict=True)]
    assert texts[2].count("equal weights") == 2
    one, accum, two = (losses(tmp_path / name) for name in ("one", "accum", "two"))
    assert len(one) == len(accum) == len(two) == 20
    # float32 sums in another order
    assert np.allclose(one, accum, atol=1e-5, rtol=0), np.abs(np.subtract(one, accum)).max()
    assert np.allclose(one, two, atol=1e-5, rtol=0), np.abs(np.subtract(one, two)).max()
    scores = [[float(r["psnr_model"]) for r in rows(tmp_path / n) if r["psnr_model"]] for n in
              ("one", "two")]  # fmt: skip
    assert scores[0][-1] == pytest.approx(scores[1][-1], abs=1e-2)


def test_latents_of_frame_pairs_are_not_cached(episodes):
    config = DataConfig(str(episodes), "mini", num_frames=2, num_history=1, stride=1)
    proc = data.Processes(0, 1, torch.device("cpu"))
    with pytest.raises(InputError, match="cache_latents: these features depend on the clip"):
        data.fill_cache(config, proc, "pairs", lambda frames: frames[:, ::2], stride=2)


def test_only_the_last_micro_step_exchanges_gradients_and_all_draw_the_same():
    held, seen = [], []

    class Net:
        @contextlib.contextmanager
        def no_sync(self):
            held.append(True)
            yield
            held.pop()

    args, proc = SimpleNamespace(grad_accum=3, seed=0), data.Processes(1, 2, torch.device("cpu"))
    run = SimpleNamespace(args=args, proc=proc, step=5, generator=torch.Generator())
    for batch, draws in data.Run.micro_steps(run, Net(), iter("abc")):
        drawn = torch.rand((), generator=draws["generator"]).item()
        seen.append((batch, draws["shard"], bool(held), drawn))
    assert [entry[:3] for entry in seen] == [
        ("a", (1, 6), True),
        ("b", (3, 6), True),
        ("c", (5, 6), False),
    ]
    assert len({drawn for *_, drawn in seen}) == 1 and not held


def fail_on_rank_1(module):
    def broken(*args, **kwargs):
        raise RuntimeError("a bad shard")

    small(module)
    if os.environ["RANK"] == "1":
        module.lr_at = broken


def test_an_exception_of_one_process_ends_all_with_its_error_on_screen(episodes, tmp_path):
    log, began = tmp_path / "log", time.monotonic()
    flags = words(episodes, tmp_path / "run", "--max_steps", 1000)
    processes = start("train_dit", flags, log, 2, fail_on_rank_1)
    for process in processes:
        process.join(timeout=60)
    assert all(process.exitcode not in (0, None) for process in processes)
    assert "RuntimeError: a bad shard" in log.read_text() and time.monotonic() - began < 60


def test_a_finished_run_resumed_by_its_own_command_adds_nothing(episodes, tmp_path):
    """The word `toy` brings no defaults back; foreign lines of the log and a kill's rest go."""
    flags = "--max_steps", 3, "--val_every", 2
    folder = train(episodes, tmp_path / "run", *flags)
    before = (folder / "log.csv").read_text()
    with open(folder / "log.csv", "a") as log:
        log.write("\nhello,world\n4,cut")
    (folder / ".last.pt.1.tmp").write_bytes(b"half")
    run("toy", "--resume", folder)
    assert not list(folder.glob(".*")) and (folder / "log.csv").read_text() == before


def test_shares_of_data_sets_are_those_of_the_flag():
    args = train_dit.Args(subset_names="a,b", subset_weights="3,1")
    alone = Processes(0, 1, torch.device("cpu"))
    assert data.prepare_data(args, alone).weights == [3.0, 1.0]


def test_an_error_does_not_wait_for_loader_processes(episodes, tmp_path):
    folder = shutil.copytree(episodes, tmp_path / "data")
    (path,) = folder.glob("*/train/*5.safetensors")  # only they read it
    path.write_bytes(path.read_bytes()[:-100])
    flags = "--num_workers 2 --max_steps 100 --cache_latents False --standardize False".split()
    flags = map(str, words(folder, tmp_path / "run", *flags))
    command = [sys.executable, train_dit.__file__, *flags]
    ended = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 2 and f"error: {path}: truncated" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_signal_to_torchrun_saves_and_names_the_command_to_go_on(episodes, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = words(episodes, folder, "--max_steps", 100_000, "--log_every", 2)
    with log.open("w") as file:
        process = torchrun("train_dit", flags, file)
        wait_until(lambda: (folder / "log.csv").exists() and len(rows(folder)) > 2)
        process.terminate()
        process.wait(timeout=20)  # torchrun kills after 30 s what does not end
    command = f"torchrun --nproc_per_node=2 train_dit.py --resume {folder}"
    assert f"go on with: {command}" in log.read_text(), log.read_text()
    assert load_torch(folder / "last.pt")["step"] >= 6


def slow_process(module):
    """Have one process cache, the other draw for longer than collectives wait."""
    small(module)
    begin, rank = module.data.init_processes, os.environ["RANK"]
    name = "write_sample" if rank == "0" else "write_latent_cache"
    owner = module if rank == "0" else module.data
    slow = getattr(owner, name)

    def sleepy(*args):
        time.sleep(3)
        slow(*args)
        setattr(owner, name, slow)

    setattr(owner, name, sleepy)
    module.data.init_processes = lambda device: begin(device, timeout_minutes=2.5 / 60)


def test_no_process_runs_into_a_timeout_while_another_caches_or_draws(episodes, tmp_path):
    flags = words(episodes, tmp_path / "run", "--max_steps", 2, "--val_every", 1)
    log = tmp_path / "log"
    finish(start("train_dit", flags, log, 2, slow_process), log)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(
    episodes, tmp_path, monkeypatch, capsys
):
    """Writing really fails: the largest size of a file is set below that of a checkpoint."""
    save, limits = train_dit.Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = iter((limits[0], 100_000, 100_000, limits[0]))

    def full(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (next(sizes), limits[1]))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            kept.append(load_torch(folder / "last.pt")["step"])

    kept, folder = [], tmp_path / "run"
    monkeypatch.setattr(train_dit.Run, "save", full)
    train(episodes, folder, "--max_steps", 4, "--save_every", 1)
    assert kept == [1, 1, 1, 4] and len(losses(folder)) == 4
    assert capsys.readouterr().out.count("last.pt could not be saved") == 2
    assert not list(folder.glob(".*.tmp"))


def test_a_run_whose_end_could_not_be_saved_does_not_end_well(episodes, tmp_path, monkeypatch):
    def full(state, path):
        raise RuntimeError("unexpected pos 960192 vs 960080")  # as torch.save says it

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        InputError, match="last.pt: could not be saved .is the disk full.*begin again"
    ):
        train(episodes, tmp_path / "run", "--max_steps", 2)
    assert (tmp_path / "run" / "world_model.safetensors").exists()


def test_the_weight_average_is_validated_and_written(episodes, tmp_path, monkeypatch):
    whole, seen = train_dit.validate, []

    def watched(model, *rest):
        seen.append({name: t.clone() for name, t in model[0].state_dict().items()})
        return whole(model, *rest)

    monkeypatch.setattr(train_dit, "validate", watched)
    folder = train(episodes, tmp_path / "run", "--max_steps", 2)
    written = load_tensors(folder / "world_model.safetensors")[0]
    for name, tensor in load_torch(folder / "last.pt")["ema"].items():
        assert torch.equal(written[f"dit.{name}"], tensor) and torch.equal(seen[-1][name], tensor)


def test_validation_gives_every_clip_another_clips_actions(monkeypatch):
    space = LatentSpace(create_autoencoder(EncoderConfig("pixels", patch_size=8)))
    seen, args = [], train_dit.Args(num_history=1, num_frames=3)
    monkeypatch.setattr(train_dit, "dream", lambda *x: seen.append(x[2]) or x[1])
    alone = Processes(0, 1, torch.device("cpu"))
    frames, actions = torch.rand(3, 3, 16, 16, 3), torch.randn(3, 3, 10)
    model = None, None, space
    scores = train_dit.validate(model, Clip(frames, actions), args, alone)
    assert torch.equal(seen[0], actions) and torch.equal(seen[1], actions[[1, 2, 0]])
    assert scores["psnr_model"] == scores["psnr_ceiling"] > 60 > scores["psnr_copy"]
    train_dit.validate(model, Clip(frames[:1], actions[:1]), args, alone)
    assert torch.equal(seen[3], actions[:1].flip(1))  # a lone clip's own, reversed


def test_validation_decodes_frame_pairs_as_in_the_whole_clip(monkeypatch):
    shape = {"latent_dim": 192, "base_channels": 32, "channel_multipliers": (1, 1, 1, 1)}
    decoder = PixelDecoder(PixelDecoderConfig(**shape, temporal_upsample=True))
    space, frames = LatentSpace(Pairs(), None, decoder), torch.rand(2, 6, 16, 16, 3)
    monkeypatch.setattr(train_dit, "dream", lambda model, z, *_: z)
    args, alone = train_dit.Args(num_history=2, num_frames=6), Processes(0, 1, torch.device("cpu"))
    clips = Clip(frames, torch.randn(2, 6, 10))
    scores = train_dit.validate((None, None, space), clips, args, alone)
    whole = data.psnr(space.decode(space.encode(frames))[:, 2:], frames[:, 2:]).mean().item()
    assert scores["psnr_model"] == pytest.approx(whole, abs=1e-4)
    assert scores["psnr_ceiling"] == pytest.approx(whole, abs=1e-4)


def test_actions_are_dropped_as_often_as_the_flag_says(episodes, tmp_path, monkeypatch):
    loss, dropped = FlowMatching.loss, []

    def watched(self, model, *rest, **draws):
        dropped.append(model.keywords["drop"])
        return loss(self, model, *rest, **draws)

    monkeypatch.setattr(FlowMatching, "loss", watched)
    train(episodes, tmp_path / "run", "--max_steps", 4, "--action_dropout", 0.1, "--batch_size", 8)
    assert torch.cat(dropped).float().mean() < 0.3  # of 32 clips


def test_a_channel_without_spread_is_scaled_by_a_thousandth_of_the_largest():
    class Cached(list):
        fingerprint = "of a cache"

    z = torch.tensor([2.0, 3.0]) + torch.tensor([7.0, 0.0]) * torch.randn(4, 50, 2, 2, 2)
    clips = Cached(Clip(clip, torch.zeros(50, 10)) for clip in z)
    space = LatentSpace(create_autoencoder(EncoderConfig("pixels")))
    mean, std = train_dit.latent_scale(space, clips, train_dit.Args())
    torch.testing.assert_close(mean, z.mean((0, 1, 2, 3)))
    torch.testing.assert_close(std[0], z[..., 0].std(correction=0))
    torch.testing.assert_close(std[1], 1e-3 * std[0])


def poison(monkeypatch, bad):
    """Make the loss infinite in the steps that bad(step) names; steps are counted from 1."""
    loss, calls = FlowMatching.loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        value, logs = loss(*args, **kwargs)
        return value * (math.inf if bad(len(calls)) else 1.0), logs

    monkeypatch.setattr(FlowMatching, "loss", poisoned)


def test_losses_that_are_not_finite_are_skipped_and_counted(episodes, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: step == 2)
    folder = train(episodes, tmp_path / "run", "--max_steps", 4)
    assert [row["skipped"] for row in rows(folder) if row["loss"]] == ["0", "1", "1", "1"]
    state = load_torch(folder / "last.pt")
    assert all(torch.isfinite(t).all() for part in ("dit", "ema") for t in state[part].values())
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {3.0}


def test_ten_bad_losses_in_a_row_stop_the_run_with_names_and_a_checkpoint(
    episodes, tmp_path, monkeypatch
):
    """They are noticed though they began before a resume and ended before the next log line."""
    read, bad, init = [], [], data.Episode.__init__
    monkeypatch.setattr(
        data.Episode, "__init__", lambda self, path: read.append(path) or init(self, path)
    )
    poison(monkeypatch, lambda step: 3 <= step <= 12 and bool(bad.append(read[-1]) or True))
    folder = tmp_path / "run"
    train(episodes, folder, "--max_steps", 6, "--batch_size", 1, "--log_every", 7)
    before = load_torch(folder / "last.pt")
    with pytest.raises(InputError, match="step 14: ten losses .* of steps 3 to 12") as error:
        run("--resume", folder, "--max_steps", 50)
    names = re.findall(r"\S+safetensors", str(error.value))
    assert len(bad) == 10 and sorted(names) == sorted({str(path) for path in bad}) != []
    after = load_torch(folder / "last.pt")
    assert (before["step"], after["step"], after["skipped"], after["in_a_row"]) == (6, 14, 12, 0)
    assert all(torch.equal(tensor, after["dit"][name]) for name, tensor in before["dit"].items())


def test_the_log_has_every_column_and_a_curve(episodes, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GPUS", {"": (1, 1)})  # any device: 1 TFLOP/s
    folder = train(episodes, tmp_path / "run", "--max_steps", 3)
    log = [row for row in rows(folder) if row["loss"]]
    names = "loss grad_norm lr clips_per_s ms_per_step mfu minutes_left memory_gb".split()
    for row in log:
        assert all(float(row[name]) >= 0 for name in names)
    clips = float(log[-1]["ms_per_step"]) * float(log[-1]["clips_per_s"]) / 1000
    assert clips == pytest.approx(4, rel=1e-3) and float(log[-1]["minutes_left"]) == 0
    assert 0 < float(log[-1]["mfu"]) < 1
    with Image.open(folder / "loss.png") as picture:
        blue = (np.asarray(picture) == (0x1F, 0x5F, 0xBF)).all(-1)
        assert picture.size == (800, 480) and blue.any(0).sum() > 450  # a curve from step 1 to 3


def test_a_line_of_the_log_is_the_mean_since_the_last(episodes, straight, tmp_path):
    folder = train(episodes, tmp_path / "run", "--max_steps", 6, "--log_every", 3)
    assert losses(folder) == pytest.approx(np.reshape(losses(straight), (2, 3)).mean(1), rel=1e-4)


def test_a_bar_is_drawn_on_a_terminal_only(episodes, tmp_path, monkeypatch, capsys):
    train(episodes, tmp_path / "file", "--max_steps", 1)
    assert "1/1" not in (said := capsys.readouterr()).err and "loss" in said.out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(episodes, tmp_path / "screen", "--max_steps", 1)
    assert "1/1" in (said := capsys.readouterr()).err and "grad_norm" not in said.out


class MallocInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def watch_memory(module):
    """Print every fifty steps what is resident and what malloc gave out."""
    small(module)
    lr_at, info = module.lr_at, ctypes.CDLL(None).mallinfo2
    info.restype = MallocInfo

    def watched(step, *args):
        if step % 50 == 0:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            print("memory", resident, info().uordblks)
        return lr_at(step, *args)

    module.lr_at = watched


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc and /proc")
def test_a_step_leaves_nothing_behind_in_memory(episodes, tmp_path):
    """A graph kept by the weight average cost 27 kB a step: 4 MB here, hidden in what is free."""
    flags = "--max_steps 201 --batch_size 2 --num_frames 2 --val_every 1000 --log_every 10".split()
    log = tmp_path / "log"
    text = finish(
        start("train_dit", words(episodes, tmp_path / "run", *flags), log, 1, watch_memory), log
    )
    counts = [line.split()[1:] for line in text.splitlines() if line.startswith("memory")]
    assert len(counts) == 5  # the first is before everything is warm
    (resident, given), last = ([*map(int, counts[i])] for i in (1, -1))
    assert last[0] < 1.005 * resident and last[1] < given + 300_000, counts


@pytest.mark.parametrize("reader", [load_dit, WorldModel])
def test_two_hundred_damaged_files_give_clean_errors(straight, tmp_path, reader):
    content, refused = (straight / "world_model.safetensors").read_bytes(), 0
    path = tmp_path / "damaged.safetensors"
    for damaged in mutations(content, 1):
        path.write_bytes(damaged)
        try:
            reader(path)
        except InputError as error:
            assert "damaged.safetensors" in str(error)
            refused += 1
    assert refused >= 40


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
    n = model.clip_format["num_history"]
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
        (["--encoder_type", "vaee"], "'vaee' is none of pixels"),
        (["--device", "gpu"], "'gpu' cannot be used"),
        (["--objective", "ddpm", "--time_dist", "uniform"], "time_dist: DDPM"),
        (["--subset_names", "mini,other"], "other"),
        (["--num_history", "9"], "num_history"),
        (["--save_every", "0"], "save_every"),
        (["--val_clips", "0"], "val_clips"),
        (["--num_workers", "-1"], "num_workers"),
        (["--seed", "-1"], "seed"),
        (["--seed", "5000000000"], "seed is 5000000000; give a number from 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--ema", "1.5"], "ema"),
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


def test_an_encoder_of_frame_pairs_wants_even_clips_and_histories(episodes, tmp_path, monkeypatch):
    make = train_dit.world_model.build_latent_space

    def pairs(*how):
        space = make(*how)
        space.temporal_stride = 2
        return space

    monkeypatch.setattr(train_dit.world_model, "build_latent_space", pairs)
    for flags in (("--num_frames", "6", "--num_history", "1"), ("--num_history", "2")):
        with pytest.raises(InputError, match="num_frames and num_history need multiples"):
            train(episodes, tmp_path / "run", "--cache_latents", "false", *flags)


def test_flags_of_the_network_are_its_config():
    args = train_dit.Args(temporal_mode="joint", num_views=3, view_rope="official", wide_head=True)
    args.action_dropout = 0.3
    config = train_dit.make_dit_config(args, 4, 10)
    for field in dataclasses.fields(config):
        if field.name in vars(args):
            assert getattr(config, field.name) == getattr(args, field.name)
    assert (config.num_views, config.action_dropout, config.wide_head) == (3, 0.3, True)


def test_a_dry_run_reads_nothing_and_scales_with_gpus_and_cache(capsys):
    def hours(*flags, **fields) -> float:
        train_dit.dry_run(train_dit.Args(encoder_type="vae", dit_size="T", **fields), *flags)
        shown = capsys.readouterr().out
        assert f"{parameters / 1e6:.1f} M parameters" in shown
        return float(shown.split("\nA100")[1].split()[1])

    model = train_dit.DiT(train_dit.DiTConfig(16, 2, **train_dit.DIT_SIZES["T"]))
    parameters = sum(p.numel() for p in model.parameters())
    assert hours(1) == pytest.approx(4 * hours(4), rel=0.05)
    assert hours(1, cache_latents=True) < 0.5 * hours(1)  # most of it is the encoder's


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--temporal_mode", "joint"), "temporal_mode factored; give --temporal_mode factored"),
        (("--objective", "ddpm"), "objective flow_matching; give"),
        (("--standardize", "false"), "standardize True; give"),
        (("--num_views", 2, "--view_rope", "official"), "view_rope additive; give"),
    ],
)
def test_weights_to_start_from_are_of_the_same_kind(episodes, straight, tmp_path, flags, complaint):
    path = straight / "world_model.safetensors"
    if "--view_rope" in flags:  # of one view, any order may come
        tensors, metadata = load_tensors(path)
        metadata["dit_config"]["num_views"] = 2
        data.save_tensors(path := tmp_path / "two.safetensors", tensors, metadata)
    with pytest.raises(InputError, match=complaint):
        train(episodes, tmp_path / "run", "--pretrained_checkpoint", path, *flags)
    assert not (tmp_path / "run").exists()


def test_one_view_becomes_three_and_frozen_parameters_stay(episodes, straight, tmp_path, capsys):
    single = straight / "world_model.safetensors"
    flags = "--num_views", 3, "--pretrained_checkpoint", single, "--max_steps", 1, "--lr", 1
    folder = train(episodes, tmp_path / "run", *flags, "--freeze", "blocks.0.t_block,x_proj")
    before, after = (load_tensors(f / "world_model.safetensors") for f in (straight, folder))
    out = capsys.readouterr().out
    copied = [name for name in before[0] if name.startswith("dit.")]
    assert f"copied {len(copied)} tensors from {single}; none is new" in out
    assert "frozen: " in out and after[1]["dit_config"]["num_views"] == 3
    assert torch.equal(before[0]["latent.mean"], after[0]["latent.mean"])  # as the weights know it
    average, dit = load_torch(straight / "last.pt")["ema"], load_torch(folder / "last.pt")["dit"]
    kept = {name for name in dit if torch.equal(dit[name], average[name])}
    frozen = set(out.partition("frozen: ")[2].splitlines()[0].split(", "))
    parameters = {name for name, _ in load_dit(single).named_parameters()}
    assert frozen == {n for n in parameters if n.startswith(("blocks.0.t_block", "x_proj"))}
    assert kept & parameters == frozen
