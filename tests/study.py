"""Compare three latent spaces on the toy world: which one makes a world model useful for control?

    python tests/study.py                 about an hour on two idle cores; goes on after a kill
    python tests/study.py --budget 0.01   every step in a few minutes, for nothing but the path

Three spaces of 64 tokens a frame, one DiT, one training budget, one evaluation:

    pixels   an orthonormal transform of 8x8 patches                     192 channels
    svae     an S-VAE of those patches                                    32 channels
    jepa     an S-VAE of a semantic space made here, without labels       32 channels

The semantic space is a small V-JEPA: a student sees frames with half their patches blanked out and
predicts, at every place, what its own moving average sees in the whole frame [Assran et al. 2023;
Bardes et al. 2024]. Its file has the layout of the released one, so every later step is the same as
with real weights: train_adapter.py, train_dit.py, evaluate.py, evaluate.py --compare. Worlds with
held-out colours, with distractors and with turned cameras are evaluated too; none is trained on.
"""

import copy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import (
    DataConfig,
    EpisodeDataset,
    ToyConfig,
    generate_toy,
    parse_args,
    run_cli,
    write_atomic,
    write_gif,
)
from encoders import EncoderConfig, create_autoencoder
from world_model import WorldModel

ROOT = Path(__file__).parents[1]
WORLDS = {  # test episodes only; the first is the world of training
    "toy": {},
    "colours": {"palette": ("yellow", "purple", "pink")},
    "distractors": {"distractors": 3},
    "camera": {"camera_shift": 8.0},
}
METRICS = "psnr,ssim,objects,counterfactual,pck_patch,controllability".split(",")


@dataclass
class Args:
    output_dir: str = "outputs/study"  # folder of all worlds, runs and tables
    budget: float = 1.0  # share of the training steps


def draw_vjepa(dim: int, depth: int, patch: int) -> dict[str, Tensor]:
    """Draw the weights of a V-JEPA 2.1 encoder, under the names of the released file."""
    layers = {"patch_embed_img.proj": (dim, 3, 1, patch, patch)}
    for i in range(depth):
        block = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        block |= {"norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    layers["norms_block.3"] = (dim,)
    state = {f"{kind}_mod_embed": torch.zeros(1, 1, dim) for kind in ("img", "video")}
    for name, shape in layers.items():
        weight = torch.ones(shape)
        if len(shape) > 1:  # not of a norm
            nn.init.trunc_normal_(weight, std=0.02)
        state |= {f"{name}.weight": weight, f"{name}.bias": torch.zeros(shape[0])}
    frame = state["patch_embed_img.proj.weight"]  # a video of equal frames looks like one frame
    state["patch_embed.proj.weight"] = frame.repeat(1, 1, 2, 1, 1) / 2
    state["patch_embed.proj.bias"] = torch.zeros(dim)
    return state


def train_vjepa(path: Path, dataset_dir: Path, steps: int, batch: int = 64) -> None:
    """Train the small V-JEPA on the toy world's training frames and write its file.

    The encoder resizes frames to 256 pixels and cuts patches of 32. Here it learns on patches of 8
    of the same frames averaged over 4x4 pixels, which is the same sum and 16 times cheaper.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.pt"
        torch.save({"ema_encoder": draw_vjepa(dim=192, depth=4, patch=8)}, file)
        encoder = create_autoencoder(EncoderConfig("vjepa2", weights=str(file)))
    dataset = EpisodeDataset(
        DataConfig(str(dataset_dir), "toy", image_size=64, num_frames=16, stride=1), "train"
    )
    clips = (dataset[draw, i].frames for i in range(len(dataset)) for draw in (0, 1))
    (mean, std), parts = encoder.mean_std, []
    for clip in clips:
        x = F.interpolate(clip.movedim(-1, 1), 256, mode="bicubic").clamp(0, 1)
        parts.append(F.avg_pool2d((x - mean) / std, 4))
    frames = torch.cat(parts)  #                                              (N, 3, 64, 64)
    student, dim = encoder.network, encoder.latent_dim
    weights = [weight.requires_grad_() for weight in student.buffers()]
    teacher = copy.deepcopy(student)
    head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
    optimizer = torch.optim.AdamW([*weights, *head.parameters()], weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1, pct_start=0.1)
    for step in (bar := trange(steps, desc="V-JEPA", disable=None)):
        x = frames[torch.randint(len(frames), (batch,))]
        hidden = torch.rand(batch, 1, 4, 4) < 0.5  # squares of 2x2 patches
        blanked = x * F.interpolate((~hidden).float(), 64)
        hidden = F.interpolate(hidden.float(), 8)[:, 0] > 0  #                    (batch, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = F.layer_norm(teacher.encode(x).float(), (dim,))
            guess = head(student.encode(blanked)).float()
        loss = (guess - target).abs().mean(-1)  #                                 (batch, 8, 8)
        loss = loss[hidden].mean() + 0.5 * loss[~hidden].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            rate = 0.001 + 0.02 * (1 - step / steps)  # of the moving average
            torch._foreach_lerp_(list(teacher.buffers()), weights, rate)
        spread = target.flatten(0, 2).std(0).mean()  # 0: every place of every frame looks the same
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", spread=f"{spread.item():.2f}")
    print(f"V-JEPA: loss {loss.item():.3f}, spread of the features over places {spread:.2f}")
    state = {name: value.detach().clone() for name, value in teacher.state_dict().items()}
    for name in ("patch_embed_img.proj.weight", "patch_embed.proj.weight"):
        state[name] = state[name].repeat_interleave(4, -1).repeat_interleave(4, -2) / 16
    write_atomic(path, lambda file: torch.save({"ema_encoder": state}, file))


def draw_dreams(path: Path, worlds: Path, models: list[Path]) -> None:
    """Write a GIF of three held-out episodes: real | each model | the first, with other actions."""
    config = DataConfig(str(worlds / "toy"), "toy", image_size=64, num_frames=16, stride=1)
    dataset = EpisodeDataset(config, "test")
    frames, actions = (torch.stack(x) for x in zip(*(dataset[i] for i in range(3)), strict=True))
    columns = [frames]
    for model in models:
        columns.append(WorldModel(model).rollout(frames[:, :1], actions))
    columns.append(WorldModel(models[0]).rollout(frames[:, :1], actions.roll(1, 0)))
    video = torch.cat(torch.cat(columns, -2).unbind(), -3)  #                 (T, 3 H, columns W, 3)
    write_gif(path, video.repeat_interleave(2, -2).repeat_interleave(2, -3))


def main() -> None:
    args = parse_args(Args)
    out, budget = Path(args.output_dir), args.budget
    out.mkdir(parents=True, exist_ok=True)

    def run(script: str, *flags, folder: Path) -> None:
        """Run one of our scripts, or go on with it; a folder with a file `done` is left alone."""
        if (folder / "done").exists():
            return
        resume = (folder / "last.pt").exists() and "train" in script
        flags = [f"--resume={folder}"] if resume else [*flags, f"--output_dir={folder}"]
        command = [script, *map(str, flags)]
        print("+ python", *command, flush=True)
        subprocess.run([sys.executable, ROOT / script, *command[1:]], check=True)
        (folder / "done").touch()

    start = time.time()
    for name, changes in WORLDS.items():
        episodes = {} if name == "toy" else {"episodes": 2, "seed": 1}
        generate_toy(out / "worlds" / name, ToyConfig(**changes, **episodes))
    world = f"--dataset_dir={out}/worlds/toy"
    if not (out / "jepa.pt").exists():
        train_vjepa(out / "jepa.pt", out / "worlds" / "toy", max(2, int(800 * budget)))
    jepa = ["--encoder_type=vjepa2", f"--encoder_weights={out}/jepa.pt"]
    adapter = ["train_adapter.py", "toy", world, "--cache_latents=True", "--adapter_latent_dim=32"]
    epochs = max(1, round(16 * budget)), max(1, round(40 * budget))  # of 18 steps
    for name, encoder in (("svae", []), ("jepa", jepa)):
        run(*adapter, *encoder, f"--num_epochs={epochs[0]}", folder=out / f"adapter_{name}")
    svae = ["--adapter_type=svae", "--adapter_checkpoint_path"]
    spaces = {
        "pixels": [],
        "svae": [*svae, out / "adapter_svae/adapter.safetensors"],
        "jepa": [*jepa, *svae, out / "adapter_jepa/adapter.safetensors"],
    }
    train = ["train_dit.py", "toy", world, f"--num_epochs={epochs[1]}"]
    for name, flags in spaces.items():
        run(*train, *flags, folder=out / f"train_{name}")
    for world in WORLDS:
        metrics = METRICS if world == "toy" else METRICS[:4]
        for name in spaces:
            model = f"--checkpoint_path={out}/train_{name}/world_model.safetensors"
            data = f"--dataset_dir={out}/worlds/{world}"
            flags = f"--metrics={','.join(metrics)}", "--horizons=1"
            run("evaluate.py", "toy", model, data, *flags, folder=out / world / name)
        rows = [out / world / name for name in spaces]
        command = ["evaluate.py", "--compare", *rows, f"--output_dir={out / world}"]
        subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], check=True)
    models = [out / f"train_{name}/world_model.safetensors" for name in spaces]
    draw_dreams(out / "dreams.gif", out / "worlds", models)
    print(f"{(time.time() - start) / 60:.0f} minutes in all; {out / 'dreams.gif'} shows the dreams")


if __name__ == "__main__":
    run_cli(main)
