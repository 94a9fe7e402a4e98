"""Train the action-conditioned latent diffusion world model: frozen encoder -> causal DiT.

    python train_dit.py toy                       embedded toy world, 2 CPU cores
    python train_dit.py --encoder_type vae --dataset_dir ./data --subset_names bridge_v2
    torchrun --nproc_per_node=4 train_dit.py --encoder_type vae --dataset_dir ./data
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_dit.py
    python train_dit.py --resume outputs/20260101-120000

Defaults are the paper's (arXiv 2605.06388, section 4 and appendix B). N processes compute what one
would with the same global batch: noise, noise levels and action dropout are drawn for the global
batch and sliced.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from data import (
    Clip,
    ClipSampler,
    DataConfig,
    EpisodeDataset,
    InputError,
    MissingFileError,
    config_from,
    generate_toy,
    init_processes,
    load_strictly,
    load_torch,
    parse_args,
    run_cli,
    write_atomic,
    write_gif,
    write_latent_cache,
)
from diffusion import OBJECTIVES, draw, time_shift
from dit import DIT_SIZES, DiT, DiTConfig, load_dit
from encoders import EncoderConfig
from world_model import build_latent_space, save_world_model

NATIVE_SEMANTIC = ("rae", "scale_rae_siglip", "scale_rae_webssl", "qwen", "vjepa2")
COLUMNS = (
    "step loss grad_norm lr clips_per_s ms_per_step skipped memory_gb psnr_model psnr_shuffled "
    "psnr_copy psnr_ceiling latent_mse_model latent_mse_shuffled latent_mse_copy"
).split()
FIXED = (
    "subset_names image_size num_frames num_history stride variable_history action_merge num_views "
    "encoder_type pixel_patch adapter_type dit_size dit_patch wide_head temporal_mode view_rope "
    "objective seed"
).split()  # what resuming may not change


@dataclass
class Args:
    # -- data
    dataset_dir: str = "./data"  # folder that `data.py --output_dir` wrote
    subset_names: str = "bridge_v2"  # data sets to mix, comma-separated
    image_size: int = 256  # side of the frames in pixels
    num_frames: int = 10  # frames of a clip, history included
    num_history: int = 2  # given frames; the others are predicted
    stride: int = 2  # frame skip of evaluation clips, and of training without variable history
    variable_history: bool = True  # the paper's random strides in training clips
    action_merge: Literal["drop", "sum"] = "drop"  # actions between kept frames
    num_views: int = 1  # cameras, side by side in the latent
    num_workers: int = 4  # loader processes per training process
    cache_latents: bool = False  # encode every frame once, train from the files
    cache_only: bool = False  # write the latent cache and stop
    # -- latent space
    encoder_type: str = "vae"  # pixels | vae | rae | scale_rae_siglip | scale_rae_webssl | qwen | vjepa2 | cosmos | vavae
    encoder_weights: str | None = None  # file, folder or hub id (default: the public release)
    decoder_weights: str | None = None  # the same for the encoder's own decoder
    pixel_patch: int = 16  # patch side of the `pixels` encoder
    adapter_type: Literal["identity", "mlp", "svae"] = "identity"  # must match the adapter file
    adapter_checkpoint_path: str | None = None  # file written by train_adapter.py
    adapter_latent_dim: int | None = None  # checked against the adapter file
    standardize: bool = False  # scale each latent channel to zero mean and unit variance
    # -- model
    dit_size: Literal["T", "S", "B", "L", "XL"] = "S"  # width, depth and heads
    dit_patch: int | None = None  # latent cells per token side (default: 2 for vae, else 1)
    wide_head: bool | None = None  # default: for native semantic latents only
    temporal_mode: Literal["factored", "joint"] = "factored"  # attention over time
    view_rope: Literal["additive", "official"] = "additive"  # how views enter the rotation
    action_dropout: float = 0.1  # share of clips trained without actions
    pretrained_checkpoint: str | None = None  # start from these weights (one view to many: ok)
    freeze: str = ""  # parameters to freeze: name prefixes, comma-separated
    # -- objective
    objective: Literal["flow_matching", "ddpm"] = "flow_matching"  # what the network learns
    shift: float | None = None  # time shift (default: from tokens and channels; 1 for vae)
    time_dist: Literal["logit_normal", "uniform"] = "logit_normal"  # flow matching noise levels
    # -- optimisation
    batch_size: int = 16  # clips per process and micro step
    grad_accum: int = 1  # micro steps per optimiser step
    num_epochs: int = 100  # length of the learning-rate schedule
    max_steps: int | None = None  # stop here; the schedule is not changed
    lr: float = 1e-4  # peak learning rate
    warmup_epochs: float = 3.0  # linear warm-up from lr / 1000
    final_lr: float = 0.7  # last learning rate of the cosine, as a share of the peak
    weight_decay: float = 2e-3  # AdamW
    clip_grad: float = 1.0  # largest gradient norm
    ema: float = 0.9995  # decay of the weight average (ramped up over the first steps)
    # -- run
    output_dir: str | None = None  # default: outputs/<timestamp>
    resume: str | None = None  # run folder to continue; no other flag is needed
    seed: int = 0  # of weights, clips and noise
    device: str | None = None  # default: cuda when there, else cpu
    bf16: bool | None = None  # autocast (default: on CUDA, and on CPUs that compute in bf16)
    compile: bool | None = None  # torch.compile (default: on CUDA, and where g++ is found)
    log_every: int = 10  # steps between lines of log.csv
    val_every: int = 2000  # steps between validations
    val_clips: int = 64  # held-out clips rolled out by a validation
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self):
        if not 1 <= self.num_history < self.num_frames:
            raise ValueError("num_history must be at least 1 and below num_frames")
        for name in ("batch_size", "grad_accum", "stride", "num_views", "log_every", "val_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if (self.adapter_type == "identity") != (self.adapter_checkpoint_path is None):
            raise ValueError(
                "adapter_type mlp or svae and adapter_checkpoint_path belong together: give both"
            )


TOY = Args(  # 64 tokens a frame and two layers: a step of 80 clip frames takes 0.3 s on two cores
    subset_names="toy",
    image_size=64,
    num_frames=5,
    num_history=1,  # the toy world has no momentum: one frame shows its state
    stride=1,
    variable_history=False,
    num_workers=0,
    cache_latents=True,
    encoder_type="pixels",
    pixel_patch=8,
    standardize=True,
    dit_size="T",
    shift=10.0,  # neighbouring pixels are alike: only strong noise hides where things are
    batch_size=16,
    num_epochs=100,
    lr=3e-3,
    warmup_epochs=5.0,
    final_lr=0.02,
    ema=0.998,
    val_every=400,
    save_every=400,
    val_clips=32,
)


def lr_at(step: int, args: Args, steps_per_epoch: int) -> float:
    """Warm up linearly from lr / 1000, then follow half a cosine down to `final_lr` times lr."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.num_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (1e-3 + (1 - 1e-3) * step / warmup)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return args.lr * (
        args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per frame in dB; (..., H, W, 3) in [0, 1] -> (...)."""
    return -10 * (a - b).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def spread_clips(dataset: EpisodeDataset, count: int) -> Clip:
    """Read up to `count` clips spread evenly over a split, stacked."""
    picked = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    return default_collate([dataset[int(i)] for i in picked])


@torch.no_grad()
def latent_statistics(space, dataset, cached: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the latents of evenly spread training clips."""
    device, total = next(space.buffers()).device, 0
    for x in spread_clips(dataset, 128).frames.split(1):
        x = x[0].to(device)
        z = (x if cached else space.features(x[None])).flatten(0, -2).double()
        total = total + torch.stack((torch.ones_like(z[0]) * len(z), z.sum(0), z.square().sum(0)))
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean**2).clamp_min(0).sqrt()
    return mean.float(), std.clamp_min(1e-3 * std.max()).float()


def dream(dit, objective, space, frames, actions, args, seeds) -> tuple[Tensor, Tensor]:
    """Encode clips, roll out all but their history: (z of the clips, z with a dreamed future).

    seeds  one a clip: its noise depends on no batch, device or process
    """
    z = space.encode(frames)
    n = args.num_history // space.temporal_stride
    noise = torch.stack(
        [
            torch.randn(z[0, n:].shape, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
    )
    actions = space.group_actions(actions)
    return z, objective.rollout(dit, z[:, :n], actions, z.shape[1] - n, noise=noise.to(z.device))


@torch.no_grad()
def validate(dit, objective, space, clips, args, proc) -> dict[str, float]:
    """Measure on held-out clips the rollout and what it must be compared with.

    model     rollout with the recorded actions      copy     the last history frame, repeated
    shuffled  rollout with another clip's actions    ceiling  encode-decode of the true frames
              (a lone clip's own, reversed in time)
    ->        means over clips and future frames: PSNR in dB; without a decoder, squared errors of
              latents, named so. Every process measures its share; all get the same averages.
    """
    frames, actions = clips
    n, now = args.num_history, args.num_history // space.temporal_stride
    swapped = actions.roll(-1, 0) if len(actions) > 1 else actions.flip(1)
    names = ["model", "shuffled", "copy", *(["ceiling"] if space.has_decoder else [])]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)
    for i in torch.arange(proc.rank, len(frames), proc.world).split(8):
        real, beside = frames[i].to(proc.device), actions[i].to(proc.device)
        other = swapped[i].to(proc.device)
        z, model = dream(dit, objective, space, real, beside, args, args.seed + i)
        _, shuffled = dream(dit, objective, space, real, other, args, args.seed + i)
        copied = z[:, now - 1 : now].expand_as(z[:, now:])
        if space.has_decoder:
            shown = [space.decode(x) for x in (model[:, now:], shuffled[:, now:], z[:, now:])]
            shown.insert(2, real[..., n - 1 : n, :, :, :])
            values = [psnr(x, real[..., n:, :, :, :]) for x in shown]
        else:
            dreams = (model[:, now:], shuffled[:, now:], copied)
            values = [(x - z[:, now:]).square().mean((-3, -2, -1)) for x in dreams]
        sums[:-1] += torch.stack([v.flatten(1).mean(1).double().sum().cpu() for v in values])
        sums[-1] += len(i)
    if proc.world > 1:
        sums = sums.to(proc.device)
        torch.distributed.all_reduce(sums)
    kind = "psnr" if space.has_decoder else "latent_mse"
    means = (sums[:-1] / sums[-1]).tolist()
    return {f"{kind}_{name}": value for name, value in zip(names, means, strict=True)}


@torch.no_grad()
def write_sample(path: Path, dit, objective, space, clips, args, device) -> None:
    """Write a GIF of up to four held-out clips, one a row: real | dreamed."""
    real, actions = (x[:4].to(device) for x in clips)
    _, z = dream(dit, objective, space, real, actions, args, args.seed + torch.arange(len(real)))
    pair = torch.cat((real, space.decode(z)), -2)
    if space.num_views > 1:
        pair = torch.cat(pair.unbind(1), -2)  # each view beside the next
    zoom = max(1, 128 // args.image_size)
    video = torch.cat(pair.unbind(0), -3).repeat_interleave(zoom, -2).repeat_interleave(zoom, -3)
    write_gif(path, video, fps=5)


def freeze(dit: DiT, prefixes: str) -> list[str]:
    """Stop training the parameters whose names start with one of the prefixes; return the names."""
    starts = tuple(filter(None, prefixes.split(",")))
    frozen = [name for name, _ in dit.named_parameters() if starts and name.startswith(starts)]
    idle = [start for start in starts if not any(name.startswith(start) for name in frozen)]
    if idle or len(frozen) == len(list(dit.parameters())):
        raise InputError(
            f"--freeze {prefixes}: {idle or 'nothing'} names no parameters, or none is left to "
            "train; names begin like x_proj, blocks.0.s_block, blocks.0.t_block.attn"
        )
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def stored_args(words: list[str]) -> Args | None:
    """Read the config of the run that `--resume` names; None for a new run."""
    if "--resume" not in words[:-1]:
        return None
    path = Path(words[words.index("--resume") + 1]) / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; --resume takes the folder of a run")
    return config_from(Args, json.loads(path.read_text()), str(path))


def check_resumable(old: Args, new: Args, say) -> None:
    """List the flags that differ from the stored run; refuse those that change what is trained."""
    for name in (field.name for field in dataclasses.fields(Args)):
        before, now = getattr(old, name), getattr(new, name)
        if before == now or name in ("resume", "output_dir"):
            continue
        if name in FIXED:
            raise InputError(
                f"--{name} {now}: the run was started with {before}, which resuming cannot "
                "change; leave the flag out or start a new run"
            )
        say(f"changed since the run was started: {name} {before} -> {now}")


def save_run(folder: Path, state: dict) -> None:
    """Write last.pt and keep the one before as previous.pt; a kill leaves at least one of them."""
    last = folder / "last.pt"
    if last.exists():
        os.replace(last, folder / "previous.pt")
    write_atomic(last, lambda path: torch.save(state, path))


def load_run(folder: Path, say) -> dict:
    """Read the newest checkpoint of a run that is whole."""
    for name in ("last.pt", "previous.pt"):
        try:
            return load_torch(folder / name)
        except InputError as error:
            say(f"warning: {error}")
    raise MissingFileError(f"{folder}: no whole last.pt or previous.pt; nothing to resume from")


class Log:
    """Append rows to log.csv; on resuming, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        lines = [self.line(COLUMNS)]
        lines += [self.line(row.values()) for row in rows if int(row["step"]) <= step]
        write_atomic(path, "".join(lines).encode())

    @staticmethod
    def line(values) -> str:
        return ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n"

    def write(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(self.line(row.get(name, "") for name in COLUMNS))


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device, or of this process on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, KiB here


def main() -> None:
    # 1. Configuration, processes, seed.
    old = stored_args(sys.argv)
    args = parse_args(Args, toy=TOY, default=old)
    proc = init_processes(args.device)
    say = print if proc.rank == 0 else lambda *_: None
    if old is not None:
        check_resumable(old, args, say)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    on_cuda = proc.device.type == "cuda"
    if (use_bf16 := args.bf16) is None:  # where the processor multiplies it faster than float32
        use_bf16 = on_cuda or torch.cpu._is_avx512_bf16_supported()
    if (use_compile := args.compile) is None:
        use_compile = on_cuda or shutil.which("g++") is not None
    parallel = torch.distributed if proc.world > 1 else None

    # 2. Frozen models.
    encoder = EncoderConfig(
        args.encoder_type,
        weights=args.encoder_weights,
        decoder_weights=args.decoder_weights,
        patch_size=args.pixel_patch,
    )
    space = build_latent_space(encoder, args.adapter_checkpoint_path, args.num_views)
    space.to(proc.device)
    if args.adapter_latent_dim not in (None, space.latent_dim):
        raise InputError(
            f"--adapter_latent_dim {args.adapter_latent_dim}: the latents are {space.latent_dim}-d; "
            "take the adapter of that width or leave the flag out"
        )

    # 3. Data: latents from the cache, or frames that the loop encodes.
    data = DataConfig(
        dataset_dir=args.dataset_dir,
        subset_names=args.subset_names,
        image_size=args.image_size,
        num_frames=args.num_frames,
        num_history=args.num_history,
        stride=args.stride,
        variable_history=args.variable_history,
        action_merge=args.action_merge,
        views=args.num_views,
        seed=args.seed,
    )
    if "toy" in args.subset_names.split(",") and proc.rank == 0:
        if not (Path(args.dataset_dir) / "toy").exists():
            generate_toy(args.dataset_dir)
    if parallel:
        parallel.barrier()
    latents = space.fingerprint if args.cache_latents or args.cache_only else None
    if latents:
        write_latent_cache(data, "train", latents, space.features, (proc.rank, proc.world))
        if parallel:
            parallel.barrier()
        if args.cache_only:
            return
    train_set = EpisodeDataset(data, "train", latents)
    shown = dataclasses.replace(data, variable_history=False)
    clips = spread_clips(EpisodeDataset(shown, "test"), args.val_clips)
    train_clips = spread_clips(EpisodeDataset(shown, "train"), 4)
    if args.standardize:
        space.mean, space.std = latent_statistics(space, train_set, latents is not None)
    global_batch = args.batch_size * args.grad_accum * proc.world
    epoch_steps = max(1, len(train_set) // global_batch)

    # 4. The trained model.
    z = space.encode(clips.frames[:1].to(proc.device))
    patch = args.dit_patch or (2 if args.encoder_type == "vae" else 1)
    native = args.encoder_type in NATIVE_SEMANTIC and space.adapter is None
    dit = DiT(
        DiTConfig(
            in_channels=space.latent_dim,
            patch_size=patch,
            **DIT_SIZES[args.dit_size],
            action_dim=clips.actions.shape[-1] * space.temporal_stride,
            max_frames=z.shape[1],
            wide_head=native if args.wide_head is None else args.wide_head,
            temporal_mode=args.temporal_mode,
            num_views=args.num_views,
            view_rope=args.view_rope,
            action_dropout=args.action_dropout,
        )
    )
    if dit.config.dim < (wide := space.latent_dim * patch**2) and not dit.config.wide_head:
        say(
            f"warning: width {dit.config.dim} is below the {wide} numbers of a token: noise cannot "
            "pass through it; take a larger --dit_size or an adapter"
        )
    tokens = z.shape[2] * z.shape[3] // args.num_views // patch**2
    if (shift := args.shift) is None:
        shift = 1.0 if args.encoder_type == "vae" else time_shift(tokens, space.latent_dim)
    kind = OBJECTIVES[args.objective]
    options = {"time_dist": args.time_dist} if args.objective == "flow_matching" else {}
    objective = kind(shift=shift, **options)
    if args.pretrained_checkpoint and old is None:
        weights = load_dit(args.pretrained_checkpoint).state_dict()
        load_strictly(dit, weights, args.pretrained_checkpoint)
        say(f"copied {len(weights)} tensors from {args.pretrained_checkpoint}, none is new")
    if frozen := freeze(dit, args.freeze):
        say(f"frozen: {', '.join(frozen)}")
    dit.to(proc.device)

    # 5. Average, optimiser, compile, DDP. `dit` is the raw module, `net` the one that is called.
    ema = copy.deepcopy(dit).eval().requires_grad_(False)
    trained = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=args.weight_decay, fused=True
    )
    net = torch.compile(dit) if use_compile else dit
    if parallel:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    autocast = torch.autocast(proc.device.type, torch.bfloat16, enabled=use_bf16)
    generator = torch.Generator(proc.device)

    # 6. The run folder: a new one, or one to go on with.
    folder = Path(args.resume or args.output_dir or time.strftime("outputs/%Y%m%d-%H%M%S"))
    step, skipped, in_a_row = 0, *torch.zeros(2, device=proc.device)
    history = args.num_history // space.temporal_stride
    if args.resume:
        state = load_run(folder, say)
        if state["global_batch"] != global_batch:
            raise InputError(
                f"{folder}: was trained with {state['global_batch']} clips a step, now "
                f"{global_batch} (batch_size x grad_accum x processes); make them equal"
            )
        dit.load_state_dict(state["dit"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        say(f"resumed {folder} at step {step}")
    elif proc.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(
            folder / "config.json", json.dumps(dataclasses.asdict(args), indent=1).encode()
        )
    about = {
        "image_size": args.image_size,
        "stride": args.stride,
        "num_history": args.num_history,
        "action_merge": args.action_merge,
        "action_mapping": train_set.action_mapping,
        "fps": train_set.fps,
    }

    def save() -> None:
        """Write the checkpoint and the world model; a full disk leaves the old ones and a warning."""
        if proc.rank == 0:
            state = {"step": step, "global_batch": global_batch, "dit": dit.state_dict()}
            state |= {"ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            try:
                save_run(folder, state)
                save_world_model(folder / "world_model.safetensors", ema, objective, space, about)
            except OSError as error:
                say(f"warning: step {step} could not be saved ({error}); the run goes on")

    # 7. The loop, with one extra turn for the last validation and save.
    last_step = args.num_epochs * epoch_steps if args.max_steps is None else args.max_steps
    sampler = ClipSampler(
        train_set, args.batch_size, proc.rank, proc.world, start=step * args.grad_accum
    )
    loader = DataLoader(
        train_set, batch_sampler=sampler, num_workers=args.num_workers, pin_memory=on_cuda
    )
    batches = iter(loader)
    signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: signals.append(number))
    log = Log(folder / "log.csv", step) if proc.rank == 0 else None
    say(
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters, {tokens} tokens a frame, "
        f"{len(train_set)} episodes, {epoch_steps} steps an epoch, steps {step} to {last_step}, "
        f"{folder}"
    )
    bar = tqdm(total=last_step, initial=step, disable=proc.rank > 0 or not sys.stderr.isatty())
    loss_sum, since, began = torch.zeros((), device=proc.device), step, time.perf_counter()
    while True:
        stopped = bool(signals)
        if parallel and (stopped := step % args.log_every == 0):  # all processes must agree
            votes = torch.tensor(float(bool(signals)), device=proc.device)
            parallel.all_reduce(votes)
            stopped = votes.item() > 0
        last = step >= last_step
        if not stopped and (last or (step and step % args.val_every == 0)):
            scores = validate(ema, objective, space, clips, args, proc)
            if proc.rank == 0:
                log.write(step=step, **scores)
                say(f"step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))
                for name, some in (("sample", clips), ("train_sample", train_clips)):
                    if space.has_decoder:
                        path = folder / f"{name}_{step:07d}.gif"
                        write_sample(path, ema, objective, space, some, args, proc.device)
        if last or stopped or (step and step % args.save_every == 0):
            save()
        if last or stopped:
            break

        lr = lr_at(step, args, epoch_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(args.grad_accum):
            batch = next(batches)
            x, actions = (x.to(proc.device, non_blocking=True) for x in batch)
            z = space.finish(x) if latents else space.encode(x)
            actions = space.group_actions(actions)
            shard = (micro * proc.world + proc.rank, args.grad_accum * proc.world)
            generator.manual_seed(args.seed + 1_000_003 * step)
            drop = draw(torch.rand, (len(z),), z, generator, shard) < args.action_dropout

            def predict(z_tau, tau, beside, drop=drop):
                return net(z_tau, tau, beside, drop)

            wait = parallel and micro + 1 < args.grad_accum
            with autocast, net.no_sync() if wait else contextlib.nullcontext():
                loss, _ = objective.loss(predict, z, actions, history, generator, shard)
                (loss / args.grad_accum).backward()
            loss_sum += loss.detach() / args.grad_accum
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad, foreach=True)
        optimizer.found_inf = (~grad_norm.isfinite()).float()  # fused AdamW then skips the step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(dit.parameters()), 1 - decay)
        skipped += optimizer.found_inf
        in_a_row = (in_a_row + 1) * optimizer.found_inf
        step += 1
        bar.update()
        if step % args.log_every == 0:
            mean = torch.stack((loss_sum / (step - since), grad_norm))
            if parallel:
                parallel.all_reduce(mean)
            loss_mean, norm = (mean / proc.world).tolist()  # the only host sync
            pace = (time.perf_counter() - began) / (step - since)
            row = {"step": step, "loss": loss_mean, "grad_norm": norm, "lr": lr}
            row |= {"clips_per_s": global_batch / pace, "ms_per_step": 1000 * pace}
            row |= {"skipped": skipped.item(), "memory_gb": memory_gb(proc.device)}
            if in_a_row.item() >= 10:
                save()
                names = sorted(
                    {str(train_set.info(key)["path"]) for key in sampler.batch(step - 1)}
                )
                raise InputError(
                    f"step {step}: ten losses in a row were not finite; the last clips were of "
                    f"{', '.join(names)}; look at them, or lower --lr and --resume {folder}"
                )
            if proc.rank == 0:
                log.write(**row)
                left = pace * (last_step - step)
                bar.set_postfix_str(f"loss {loss_mean:.4f}, {1000 * pace:.0f} ms a step")
                if bar.disable:
                    say(
                        ", ".join(f"{k} {v:.4g}" for k, v in row.items())
                        + f", {left / 60:.0f} min left"
                    )
            loss_sum.zero_()
            since, began = step, time.perf_counter()

    if stopped:
        say(f"stopped at step {step}; go on with: python train_dit.py --resume {folder}")
    if parallel:
        parallel.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
