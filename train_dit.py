"""Train the action-conditioned latent diffusion world model: frozen encoder -> causal DiT.

    python train_dit.py toy                       embedded toy world, 2 CPU cores
    python train_dit.py --encoder_type vae --dataset_dir ./data --subset_names bridge_v2
    torchrun --nproc_per_node=4 train_dit.py --encoder_type vae --dataset_dir ./data
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_dit.py
    python train_dit.py --resume outputs/20260101-120000

Defaults are the paper's (arXiv 2605.06388, section 4 and appendix B). N processes compute what one
would with the same global batch: noise, noise levels and action dropout are drawn for the global
batch and sliced. A killed run, resumed, ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import data
import world_model
from data import Clip, EpisodeDataset, InputError, Processes, Run, prepare_data, psnr, setup, wrap
from diffusion import OBJECTIVES, draw
from dit import DIT_SIZES, DiT, DiTConfig
from encoders import ENCODERS, EncoderConfig
from world_model import LatentSpace, Model, dream

COLUMNS = (
    "step loss grad_norm lr clips_per_s ms_per_step mfu minutes_left memory_gb skipped psnr_model "
    "psnr_shuffled psnr_copy psnr_ceiling latent_mse_model latent_mse_shuffled latent_mse_copy"
).split()
FIXED = (  # what resuming may not change
    "subset_names image_size num_frames num_history stride variable_history action_merge num_views "
    "encoder_type pixel_patch adapter_type dit_size dit_patch wide_head temporal_mode view_rope "
    "objective standardize freeze seed subset_weights"
).split()
# GFLOP per 256x256 frame, 2 per multiply-add, of the encoders in the paper's table 4.
ENCODER_GFLOP = {"pixels": 0, "vae": 270.8, "vavae": 137.9, "cosmos": 47.6, "vjepa2": 154.7}
ENCODER_GFLOP |= {"scale_rae_webssl": 155.8, "scale_rae_siglip": 211.9}
BRIDGE_CLIPS, BRIDGE_FRAMES, DRY_MFU = 51_000, 2e6, 0.3  # clips an epoch, frames; assumed share


@dataclass
class Args:
    # -- data
    dataset_dir: str = "./data"  # folder that `data.py --output_dir` wrote
    subset_names: str = "bridge_v2"  # data sets to mix, comma-separated
    subset_weights: str = ""  # their shares of an epoch, e.g. "3,1" (default: by size)
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
    encoder_type: str = "vae"  # pixels | vae | rae | scale_rae_webssl | ... (encoders.py)
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
    clip_grad: float = 1.0  # largest gradient norm; 0: any
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
    dry_run: int = 0  # print what the run would need and take on so many GPUs, and stop
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self):
        counts = "num_history stride batch_size grad_accum num_epochs num_views log_every val_every"
        data.check_flags(self, f"{counts} val_clips save_every")
        if self.ema > 1 or self.num_history >= self.num_frames:
            raise InputError("ema must be at most 1, num_history below num_frames")
        if (self.adapter_type == "identity") != (self.adapter_checkpoint_path is None):
            raise InputError("adapter_type mlp or svae and adapter_checkpoint_path go together")
        if self.objective == "ddpm" and self.time_dist != "logit_normal":
            raise InputError("time_dist: DDPM's levels are uniform; leave it out")


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
    lr=3e-3,
    warmup_epochs=5.0,
    final_lr=0.02,
    ema=0.998,
    val_every=400,
    save_every=400,
    val_clips=32,
)


def lr_at(step: int, args: Args, steps_per_epoch: float) -> float:
    """Warm up linearly from lr / 1000, then follow half a cosine down to `final_lr` times lr."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.num_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (1e-3 + (1 - 1e-3) * step / warmup)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
    return args.lr * (args.final_lr + (1 - args.final_lr) * wave)


def spread_clips(dataset: EpisodeDataset, count: int) -> Clip:
    """Read up to `count` clips spread evenly over a split, stacked."""
    return default_collate([dataset[i] for i in data.even_indices(len(dataset), count)])


@torch.no_grad()
def latent_scale(space: LatentSpace, dataset: EpisodeDataset, args: Args) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (C,) of latents: given weights', or those of training clips."""
    device, total = next(space.buffers()).device, 0
    path = Path(args.pretrained_checkpoint or "")
    path = Path(args.resume, "world_model.safetensors") if args.resume else path
    if path.suffix == ".safetensors" and path.is_file():
        with data.open_tensors(path, device=device) as (file, _):
            if known := {n: file.get_tensor(n) for n in world_model.SCALE if n in file.keys()}:
                return world_model.scale_from(known, space.latent_dim)
    for x in spread_clips(dataset, 128).frames.split(1):
        x = x[0].to(device)
        z = (x if dataset.fingerprint else space.encode_unscaled(x[None])).flatten(0, -2).double()
        total = total + torch.stack((torch.ones_like(z[0]) * len(z), z.sum(0), z.square().sum(0)))
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean**2).clamp_min(0).sqrt()
    return mean.float(), std.clamp_min(1e-3 * std.max()).float()


@torch.no_grad()
def validate(model: Model, clips: Clip, args: Args, proc: Processes) -> dict[str, float]:
    """Measure on held-out clips the rollout and what it must be compared with.

    model     rollout with the recorded actions      copy     the last history frame, repeated
    shuffled  rollout with another clip's actions    ceiling  encode-decode of the true frames
              (a lone clip's own, reversed in time)
    ->        means over clips and future frames: PSNR in dB; without a decoder, squared errors of
              latents, named so. Every process measures its share; all get the same averages.
    """
    space, n = model[-1], args.num_history
    history = n // space.temporal_stride
    others = clips.actions.roll(-1, 0) if len(clips.actions) > 1 else clips.actions.flip(1)
    names = ("model", "shuffled", "copy", "ceiling")[: 3 + space.has_decoder]
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    for i in torch.arange(proc.rank, len(others), proc.world_size).split(8):
        real, own, other = (x[i].to(proc.device) for x in (*clips, others))
        z = space.encode(real)
        dreams = [dream(model, z, actions, history, args.seed + i) for actions in (own, other)]
        if space.has_decoder:
            dreamed, shuffled, ceiling = (space.decode_new(x, history) for x in (*dreams, z))
            videos = dreamed, shuffled, real[..., n - 1 : n, :, :, :], ceiling
            values = [psnr(x, real[..., n:, :, :, :]) for x in videos]
        else:
            values = [(x - z)[:, history:].square() for x in (*dreams, z[:, history - 1 : history])]
        sums += torch.tensor([len(i), *(v.flatten(1).mean(1).sum().item() for v in values)])
    count, *sums = proc.all_reduce(sums).tolist()
    kind = "psnr" if space.has_decoder else "latent_mse"
    return {f"{kind}_{name}": value / count for name, value in zip(names, sums, strict=True)}


@torch.no_grad()
def write_sample(path: Path, model: Model, clips: Clip, args: Args) -> None:
    """Write a GIF of up to four held-out clips, one a row: real | dreamed."""
    space = model[-1]
    real, actions = (x[:4].to(next(space.buffers()).device) for x in clips)
    n, seeds = args.num_history // space.temporal_stride, range(args.seed, args.seed + 4)
    z = dream(model, space.encode(real), actions, n, seeds[: len(real)])
    pair = torch.cat((real, space.decode(z)), -2)
    pair = torch.cat(pair.unbind(1), -2) if space.num_views > 1 else pair  # views side by side
    zoom = max(1, 128 // args.image_size)
    video = torch.cat(pair.unbind(0), -3).repeat_interleave(zoom, -2).repeat_interleave(zoom, -3)
    data.write_gif(path, video, fps=5)


def freeze(dit: DiT, prefixes: str) -> list[str]:
    """Stop training the parameters whose names start with one of the prefixes; return the names."""
    starts = tuple(filter(None, prefixes.split(",")))
    frozen = [name for name, _ in dit.named_parameters() if name.startswith(starts)]
    idle = [start for start in starts if not any(name.startswith(start) for name in frozen)]
    if idle or len(frozen) == len(list(dit.parameters())):
        raise InputError(
            f"--freeze {prefixes}: {idle or 'nothing'} names no parameters, or none is left to "
            "train; names begin like x_proj, blocks.0.s_block, blocks.0.t_block.attn"
        )
    for name in frozen:
        dit.get_parameter(name).requires_grad_(False)
    return frozen


def make_dit_config(args: Args, channels: int, frames: int, action_dim: int = 10) -> DiTConfig:
    """Shape the network for clips of so many latent frames and channels; the paper fills gaps."""
    native = ENCODERS[args.encoder_type][3] == "yes" and args.adapter_type == "identity"
    flags = {f.name: getattr(args, f.name) for f in fields(DiTConfig) if f.name in vars(args)}
    flags["wide_head"] = native if args.wide_head is None else args.wide_head
    patch = args.dit_patch or (2 if args.encoder_type == "vae" else 1)
    given = dict(in_channels=channels, patch_size=patch, action_dim=action_dim, max_frames=frames)
    return DiTConfig(**flags, **given, **DIT_SIZES[args.dit_size])


def count_costs(config: DiTConfig, h: int, w: int) -> tuple[int, float, float]:
    """Count parameters, forward FLOPs a frame and bytes kept for a backward pass; compute nothing.

    h, w  latent grid of a view; bytes: of all that autograd keeps of a clip in bfloat16, eager mode
    """
    kept, T = {}, config.max_frames

    def keep(x: Tensor) -> Tensor:
        kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    shapes = (h, w * config.num_views, config.in_channels), (), (config.action_dim,)
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        dit = DiT(config).bfloat16()
        clip = [torch.empty(1, T, *shape, dtype=torch.bfloat16) for shape in shapes]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            dit(*clip)
    for weight in dit.parameters():
        kept.pop(id(weight.untyped_storage()), None)
    activations = sum(x.nbytes() for x in kept.values())
    return sum(p.numel() for p in dit.parameters()), flops.get_total_flops() / T, activations


def dry_run(args: Args, world: int) -> None:
    """Print the cost of a run on `world` processes; no file is read and nothing is computed."""
    kind, T, V = EncoderConfig(args.encoder_type).encoder_type, args.num_frames, args.num_views
    *grid, C = map(int, ENCODERS[kind][1].split("x"))
    scale = args.image_size / 256 if ENCODERS[kind][3] == "no" else 1  # the others resize frames
    h, w = (int(n * scale) for n in grid)
    if kind == "pixels":
        h = w = args.image_size // args.pixel_patch
        C = 3 * args.pixel_patch**2
    C = args.adapter_latent_dim or (C if args.adapter_type == "identity" else 96)
    count, forward, kept = count_costs(make_dit_config(args, C, T), h, w)
    encoder = 0 if args.cache_latents else 1e9 * ENCODER_GFLOP.get(kind, 0) * V * scale**2
    said = f"{encoder / 1e9:.1f} GFLOP a frame" if kind in ENCODER_GFLOP else "not counted"
    clip, cells = T * (3 * forward + encoder), V * h * w * C  # FLOPs; numbers in a frame's latent
    clips = args.batch_size * args.grad_accum * world
    parts = {"weights": 4 * count, "gradients": 4 * count, "AdamW": 8 * count, "average": 4 * count}
    parts["activations"] = kept * args.batch_size
    print(f"""\
DiT-{args.dit_size}: {count / 1e6:.1f} M parameters, {forward / 1e9:.1f} GFLOP a frame forward
latents {V} x {h} x {w} x {C}, {T} frames a clip; its encoder: {said}
a step: {clips} clips on {world} processes, {clips * clip / 1e12:.1f} TFLOP: 3 x forward + encoder
memory a process: {sum(parts.values()) / 1e9:.1f} GB = \
{", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())} (bfloat16, eager)
latents of Bridge V2: {BRIDGE_FRAMES * 2 * cells / 1e12:.2f} TB; GB/s are read from them
{args.num_epochs} epochs of {BRIDGE_CLIPS} clips at {DRY_MFU:.0%} of a GPU's peak; rollout frames/s:
at 10 steps, exact ({T + 9} frame passes), rolling (11), and if reading the weights were all
GPU        clips/s    hours     GB/s    exact  rolling  reading""")
    for name, (peak, bandwidth) in data.GPUS.items():
        speed = DRY_MFU * peak * 1e12
        pace = world * speed / clip
        row = [pace, args.num_epochs * BRIDGE_CLIPS / pace / 3600, pace * T * 2 * cells / 1e9]
        row += [speed / forward / (T + 9), speed / forward / 11]
        row += [1e12 * bandwidth / (11 * 2 * count)]
        print(f"{name:9}" + "".join(f"{x:9.2f}" for x in row))
    for size, pace, hours in (("S", 218, "6-7 h"), ("L", 33, "34 h")):
        forward = count_costs(DiTConfig(96, 1, **DIT_SIZES[size]), 16, 16)[1]
        work = 10 * pace * (3 * forward + 1e9 * ENCODER_GFLOP["scale_rae_webssl"])
        mfu = work / (4e12 * data.GPUS["H100"][0])
        print(f"the paper, DiT-{size} on four H100, {hours}: about {pace} clips/s, MFU {mfu:.1%}")


def main() -> None:
    # 1. Flags, processes, seed.
    args, proc = setup(Args, TOY, FIXED)
    if args.dry_run:
        return dry_run(args, args.dry_run)
    on_cuda = proc.device.type == "cuda"
    in_bf16 = on_cuda or torch.cpu._is_avx512_bf16_supported()  # there it is faster than float32
    use_bf16 = in_bf16 if args.bf16 is None else args.bf16
    compiles = on_cuda or shutil.which("g++") is not None
    use_compile = compiles if args.compile is None else args.compile

    # 2. Frozen models.
    sources = args.encoder_weights, args.decoder_weights
    encoder = EncoderConfig(args.encoder_type, *sources, patch_size=args.pixel_patch)
    space = world_model.build_latent_space(encoder, args.adapter_checkpoint_path, args.num_views)
    space.to(proc.device)
    if space.adapter and (kind := space.adapter.config.adapter_type) != args.adapter_type:
        raise InputError(
            f"{args.adapter_checkpoint_path}: holds {kind}; give --adapter_type {kind}"
        )
    given, found = args.adapter_latent_dim, space.latent_dim
    if given not in (None, found):
        raise InputError(f"adapter_latent_dim {given}: latents are {found}-d; leave it out")
    if pretrained := None if args.resume else args.pretrained_checkpoint:
        flags = "temporal_mode", "view_rope", "objective", "standardize"
        start = world_model.load_pretrained(pretrained, {k: getattr(args, k) for k in flags})
    s = space.temporal_stride
    if args.num_frames % s or args.num_history % s:
        remedy = "num_frames and num_history need multiples of it"
        raise InputError(f"{args.encoder_type} packs {s} frames: {remedy}")

    # 3. Data: latents from the cache, or frames that the loop encodes.
    config = prepare_data(args, proc)
    cached = space.fingerprint if args.cache_latents or args.cache_only else None
    if cached:
        data.fill_cache(config, proc, cached, space.encode_unscaled, space.temporal_stride)
        if args.cache_only:
            return proc.cleanup()
    train_set = EpisodeDataset(config, "train", cached, as_stored=True)
    shown = replace(config, variable_history=False)
    clips = spread_clips(EpisodeDataset(shown, "test"), args.val_clips)
    train_clips = spread_clips(EpisodeDataset(shown, "train"), 4)
    if args.standardize:
        space.mean, space.std = latent_scale(space, train_set, args)

    # 4. The trained model.
    z = space.encode(clips.frames[:1].to(proc.device))
    beside = space.group_actions(clips.actions[:1].to(proc.device))
    dit_config = make_dit_config(args, space.latent_dim, z.shape[1], beside.shape[-1])
    dit = DiT(dit_config).to(proc.device)
    if pretrained:
        data.load_strictly(dit, start.state_dict(), pretrained)
        del start  # or its copy of the weights would stay for the whole run
    frozen = freeze(dit, args.freeze)
    tokens = z.shape[2] * z.shape[3] // args.num_views // dit_config.patch_size**2
    if (shift := args.shift) is None:
        shift = world_model.default_shift(args.encoder_type, tokens, space.latent_dim)
    options = {"time_dist": args.time_dist} if args.objective == "flow_matching" else {}
    objective = OBJECTIVES[args.objective](shift=shift, **options)
    history = args.num_history // space.temporal_stride

    # 5. Average, optimiser, compile, DDP. `dit` is the raw module, `net` the one that is called.
    ema = copy.deepcopy(dit).eval().requires_grad_(False)
    # Detached: else the average of weights that need gradients would keep a graph of all steps.
    average, weights = ([p.detach() for p in m.parameters()] for m in (ema, dit))
    model = ema, objective, space
    trained = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=args.weight_decay, fused=True
    )
    net = wrap(dit, proc, use_compile)
    autocast = torch.autocast(proc.device.type, torch.bfloat16, enabled=use_bf16)

    # 6. The run folder: a new one, or one to go on with.
    folder = Path(args.resume or args.output_dir or time.strftime("outputs/%Y%m%d-%H%M%S"))
    parts = {"dit": dit, "ema": ema, "optimizer": optimizer}
    forward = functools.partial(ema, z, torch.ones(z.shape[:2], device=proc.device), beside)
    run = Run(folder, args, proc, parts, train_set, space.fingerprint, COLUMNS, forward)
    run.print0(f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters, {tokens} tokens a frame")
    if pretrained:
        run.print0(f"copied {len(dit.state_dict())} tensors from {pretrained}; none is new")
    if frozen:
        run.print0(f"frozen: {', '.join(frozen)}")
    wide = space.latent_dim * dit_config.patch_size**2
    if dit_config.dim < wide and not dit_config.wide_head:
        fault = f"width {dit_config.dim} is below the {wide} numbers of a token: noise cannot pass"
        run.print0(f"warning: {fault} through it; take a larger --dit_size or an adapter")
    kept = "image_size", "stride", "num_history", "action_merge"
    clip_format = {name: getattr(args, name) for name in kept}
    clip_format |= {"action_mapping": train_set.action_mapping, "fps": train_set.fps}

    # 7. The loop, with one extra turn for the last validation and save.
    batches = run.start_loader(train_set)
    while True:
        stopped = proc.any(bool(run.signals))
        if run.due(args.val_every) and not stopped:
            scores = validate(model, clips, args, proc)
            run.log_row({"step": run.step, **scores})
            for name, some in (("sample", clips), ("train_sample", train_clips)):
                if space.has_decoder:
                    path = folder / f"{name}_{run.step:07d}.gif"
                    run.on_rank0(write_sample, path, model, some, args)
        if run.due(args.save_every) or stopped:
            run.save()
            path = folder / "world_model.safetensors"
            run.on_rank0(world_model.save_world_model, path, *model, clip_format)
        if run.step >= run.last_step or stopped:
            break

        lr = lr_at(run.step, args, run.epoch_steps)
        optimizer.param_groups[0] |= {"lr": lr, "weight_decay": args.weight_decay}
        for batch, draws in run.micro_steps(net, batches):
            x, actions = (x.to(proc.device, non_blocking=True) for x in batch)
            z = space.scale(x) if cached else space.encode(x)
            drop = draw(torch.rand, (len(z),), z, **draws) < args.action_dropout
            velocity, actions = functools.partial(net, drop=drop), space.group_actions(actions)
            with autocast:
                loss, logs = objective.loss(velocity, z, actions, history, **draws)
                (loss / args.grad_accum).backward()
            run.accumulate(**logs)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad or math.inf, foreach=True)
        decay = min(args.ema, (1 + run.step) / (10 + run.step))
        run.update(norm)
        torch._foreach_lerp_(average, weights, 1 - decay)
        run.log_losses(lr, grad_norm=norm)
    run.end()


if __name__ == "__main__":
    data.run_cli(main)
