"""Measure a trained world model on three axes: pixels, control, semantics; invent no number.

    python evaluate.py toy --checkpoint_path outputs/RUN/world_model.safetensors
    python evaluate.py --model_preset DiT-S_WEBSSL_D96 --dataset_dir ./data --metrics psnr,fvd,idm
    torchrun --nproc_per_node=4 evaluate.py --checkpoint_path F --dataset_dir ./data
    python evaluate.py --compare outputs/a outputs/b

    real clip --encode--> context --rollout(actions)--> dreamed z --decode--> dreamed frames
                                          |                                        |
          control: searched actions, inverse dynamics                   pixels: PSNR ... FVD, PCK
          semantics: success probes, a policy inside the dream

Every number stands beside what it must be read against: the encode-decode ceiling, the last known
frame repeated, the same model with another clip's actions, a search without signal, real features.
Protocols: arXiv 2605.06388, sec. 4 and app. B. torchrun splits the clips over its processes; a
clip's noise depends on the clip alone, so any number of processes gives the same numbers.

Shapes: B clips, V views, T frames, H W pixels, h w latent grid, C channels, N points or samples.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import InputError
from diffusion import OBJECTIVES, time_shift
from dit import load_dit, merge_views, split_views
from encoders import EncoderConfig
from world_model import PLANNERS, SEARCHED, WorldModel, build_latent_space, candidate_cost

DISTANCES = ("fid", "fid_tv", "fvd", "fvd_r3d")
PIXELS = ("psnr", "ssim", "ssim_y", "lpips", "t_lpips", *DISTANCES, "pck", "pck_patch")
METRICS = (*PIXELS, "controllability", "idm", "probe", "policy")
KINDS = ("model", "ceiling", "copy", "shuffled")  # what every pixel metric is measured on
TORCH, HUB = "https://download.pytorch.org/models/", "https://huggingface.co/"
FID_RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS = {  # metric: where its weights can be fetched; a file keeps its name
    "lpips": TORCH + "alexnet-owt-7be5be79.pth",
    "t_lpips": TORCH + "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    "fid": FID_RELEASE + "pt_inception-2015-12-05-6726825d.pth",
    "fid_tv": TORCH + "inception_v3_google-0cc3c7bd.pth",
    "fvd": "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
    "fvd_r3d": TORCH + "r3d_18-b3b3357e.pth",
    "pck": "https://github.com/facebookresearch/co-tracker",
    "text": HUB + "google/siglip2-so400m-patch14-224",
}
PRESETS = {  # released models DiT-{S,B,L}_NAME: encoder, hub folder
    "VAE": ("vae", "vae"),
    "VAVAE": ("vavae", "vavae"),
    "COSMOS": ("cosmos", "cosmos"),
    **{f"VJEPA2_{space}": ("vjepa2", "vjepa") for space in ("WIDE", "D96")},
    **{f"WEBSSL_{space}": ("scale_rae_webssl", "webssl") for space in ("WIDE", "D96")},
    **{f"SIGLIP2_{space}": ("scale_rae_siglip", "siglip") for space in ("WIDE", "D96")},
}
PCK_PIXELS = (5, 10, 20, 40)  # thresholds in pixels of a 256-pixel frame
MOVING_PIXELS = 5  # a point that the real video moves further than this counts as moving
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
PROBES = {"linear": 0, "temporal": 1, "spatiotemporal": 2, "progress": 1, "text": 6}  # depth
PROBE_FRAMES, PROBE_EPOCHS = 8, 50
AXES = {  # what --compare sets side by side
    "Pixels": r"psnr|ssim|ssim_y|lpips|t_lpips|fid|fid_tv|fvd|fvd_r3d|pck@10|pck_patch@10",
    "Control": r"(cem|gradient|grid|idm_r)_k\d+(_zero)?",
    "Semantics": r"probe_\w+_balanced_accuracy|success_rate",
}


@dataclass
class Args:
    # -- what
    checkpoint_path: str | None = None  # world_model.safetensors of a run, or a preset's .pt
    model_preset: str | None = None  # a released model, DiT-{S,B,L}_{VAE,WEBSSL_D96,...}
    metrics: str = "psnr,ssim,lpips,pck_patch,controllability"  # comma-separated
    compare: tuple[str, ...] = ()  # instead, set the results in these run folders side by side
    # -- data; frame size, stride, cameras and action units are the checkpoint's
    dataset_dir: str = "./data"  # folder that `data.py --output_dir` wrote
    subset_names: str = "bridge_v2"  # data sets, comma-separated
    split: str = "test"  # episodes to measure on; probes learn from `train`
    num_episodes: int = 1000  # one clip each
    num_context: int = 2  # given frames
    num_frames: int = 8  # predicted frames
    # -- sampler
    objective: Literal["flow_matching", "ddpm"] = "flow_matching"  # of a released model
    steps: int | None = None  # denoising steps (default: the model's, 10)
    guidance: float = 1.0  # 1: no guidance
    context: Literal["exact", "rolling"] = "exact"  # of rollouts longer than the window
    # -- files; a metric whose file is missing is null, with the reason
    weights_dir: str = "./weights"  # folder of the metrics' networks and of released models
    encoder_weights: str | None = None  # public encoder, if not where training found it
    decoder_weights: str | None = None  # its decoder
    i3d_path: str | None = None  # TorchScript I3D for `fvd`; runs the code in the file
    cotracker: str | None = None  # clone of co-tracker, or 'hub', for `pck`; runs its code
    text_weights: str | None = None  # SigLIP 2 folder for the text-conditioned probe
    strict: bool = False  # stop when a metric cannot be computed
    # -- control
    horizons: str = "1,4"  # k: actions searched, or inferred from k + 1 frames
    searches: str = "cem"  # of cem, gradient, grid
    windows: int = 100  # clips to search in
    population: int = 400  # CEM: candidates an iteration
    elites: int = 50  # CEM: best candidates kept
    iterations: int = 5  # CEM
    # -- probes
    max_steps: int = 2000  # training steps of each probe, at most
    probe_width: int = 512  # of the inverse-dynamics probe; success probes: three quarters of it
    probe_episodes: int = 2000  # labelled training episodes, at most
    probe_sampling: Literal["uniform", "fps_1", "bookend", "final_heavy"] = "uniform"  # 8 frames
    # -- policy
    policy: str | None = None  # module:function (frames (B, H, W, 3), sentence) -> actions (B, A)
    policy_starts: int = 20  # episodes whose first frames are started from
    policy_trials: int = 8  # dreams a start
    policy_steps: int = 50  # actions a dream
    # -- run
    output_dir: str | None = None  # default: the checkpoint's folder; --compare: outputs/compare
    batch_size: int = 8  # clips at once
    num_workers: int = 4  # loader processes
    seed: int = 0  # of noise, searches and probes
    device: str | None = None  # default: cuda when there, else cpu

    def __post_init__(self):
        for name, known in (("metrics", METRICS), ("searches", PLANNERS)):
            if unknown := {*getattr(self, name).split(",")} - {*known}:
                raise ValueError(f"{name}: no {sorted(unknown)}; choose among {', '.join(known)}")
        if not all(k.isdigit() and 0 < int(k) <= self.num_frames for k in self.horizons.split(",")):
            raise ValueError(f"horizons {self.horizons!r}: give numbers from 1 to num_frames: 1,4")
        if self.num_episodes < 2 or not 2 <= self.elites <= self.population:
            raise ValueError("need num_episodes >= 2 (for intervals) and 2 <= elites <= population")
        if self.probe_width % 32:
            raise ValueError("probe_width must be a multiple of 32: eight heads share it")
        counts = "num_context batch_size windows iterations max_steps policy_trials policy_starts"
        if small := [name for name in counts.split() if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(small)} must be at least 1")


TOY = Args(subset_names="toy", num_episodes=64, num_frames=4, windows=16, num_workers=0)
TOY.metrics = "psnr,ssim,pck_patch,controllability,idm,probe"
TOY.population, TOY.elites, TOY.max_steps, TOY.probe_width = 64, 8, 500, 128


class Unavailable(InputError):
    """Say why a metric cannot be computed, and what to fetch so that it can."""

    def __init__(self, reason: str, url: str = "", path: str | Path = ""):
        super().__init__(f"{reason}; fetch {url} to {path}" if url else reason)
        self.row = {"value": None, "reason": reason, "url": url, "path": str(path)}


# ------------------------------------------------------------------------------------------------
# Statistics: every value with the interval that its clips allow.


def action_moments(predicted: Tensor, true: Tensor) -> Tensor:
    """Sum what correlations need over each clip's windows: (N, n, D) twice -> (N, D, 6)."""
    x, y = predicted.double(), true.double()
    return torch.stack([s.sum(1) for s in (torch.ones_like(x), x, y, x * x, y * y, x * y)], -1)


def pearson_per_dim(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation r and determination R^2 of each dimension; NaN where the truth is constant.

    moments  (N, D, 6)    per clip: count, sums of x, y, xx, yy, xy; x predicts y
    ->       (D,), (D,)   r, and 1 - sum (x - y)^2 / sum (y - mean y)^2
    """
    n, x, y, xx, yy, xy = np.moveaxis(moments.sum(0), -1, 0)
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    spread_y = np.where(spread_y > 1e-6 * yy, spread_y, np.nan)
    r = (xy - x * y / n) / np.sqrt(np.maximum(spread_x, 1e-12 * xx + 1e-30) * spread_y)
    return r, 1 - (xx + yy - 2 * xy) / spread_y


def balanced_accuracy(samples: np.ndarray) -> float:
    """Mean recall of the two classes; samples (N, 3): label, score, threshold."""
    label, called = samples[:, 0] > 0.5, samples[:, 1] > samples[:, 2]
    return (called[label].mean() + (~called[~label]).mean()) / 2


def auc(samples: np.ndarray) -> float:
    """How often a success outscores a failure, ties counting half: the area under the ROC."""
    from scipy.stats import rankdata

    label = samples[:, 0] > 0.5
    if label.all() or not label.any():
        return math.nan
    wins = rankdata(samples[:, 1])[label] - rankdata(samples[label, 1])
    return wins.mean() / (~label).sum()


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda s: s.mean(),
    "pearson": lambda s: np.nanmean(pearson_per_dim(s)[0]),
    "accuracy": lambda s: ((s[:, 1] > s[:, 2]) == (s[:, 0] > 0.5)).mean(),
    "balanced_accuracy": balanced_accuracy,
    "auc": auc,
}


def bootstrap(samples, statistic: str = "mean", minus=None) -> tuple[float, list | None, int]:
    """Return a statistic of the clips and its 95 % percentile interval over 1000 resamplings.

    samples  (N, ...)   one entry a clip: clips are independent, their frames are not
    minus    (N, ...)   the same clips of another model: the paired difference is returned
    ->       value, [low, high] or None, clips that have a value (of means, others do not count)
    """
    pair = [np.asarray(s, dtype=np.float64) for s in (samples, minus) if s is not None]
    assert len({len(s) for s in pair}) == 1, "paired samples must be of the same clips"
    if statistic == "mean":
        valid = np.isfinite(sum(pair))
        pair = [s[valid] for s in pair]
    size, random = len(pair[0]), np.random.default_rng(0)

    def value(index) -> float:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no class, no spread: NaN
            first, *other = (STATISTICS[statistic](s[index]) for s in pair)
        return float(first - other[0] if other else first)

    if size == 0 or math.isnan(point := value(slice(None))):
        return math.nan, None, size
    draws = [value(random.integers(size, size=size)) for _ in range(1000 * (size > 1))]
    draws = [draw for draw in draws if not math.isnan(draw)]
    return point, np.percentile(draws, [2.5, 97.5]).tolist() if draws else None, size


def measure(samples, better: str, statistic: str = "mean", **extra) -> dict:
    """Make a row of results: value, interval, count, and the samples for paired comparisons."""
    value, interval, n = bootstrap(samples, statistic)
    row = {"value": value, "ci": interval, "n": n, "better": better, "statistic": statistic}
    return row | extra | {"samples": samples}


def borda(values: np.ndarray, higher: Sequence[bool]) -> np.ndarray:
    """Sum each run's ranks over the metrics; 1 is best, equal values share the mean rank.

    values  (runs, metrics)   higher  (metrics,) whether more is better   ->  (runs,)
    """
    from scipy.stats import rankdata

    return rankdata(np.asarray(values) * np.where(higher, -1.0, 1.0), axis=0).sum(1)


# ------------------------------------------------------------------------------------------------
# Pixel metrics: frames (N, H, W, 3) twice -> (N,).


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(1 / MSE) in dB, at most 100."""
    return -10 * (x.double() - y.double()).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity as scikit-image's default: 7x7 box, sample covariance, RGB mean.

    (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2))  [Wang et al. 2004, eq. 13]
    """
    x, y = x.double().movedim(-1, 1), y.double().movedim(-1, 1)
    mx, my, xx, yy, xy = (F.avg_pool2d(m, 7, 1) for m in (x, y, x * x, y * y, x * y))
    sxx, syy, sxy = (49 / 48 * s for s in (xx - mx * mx, yy - my * my, xy - mx * my))
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return ratio.mean((1, 2, 3))


def ssim_y(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of the Rec. 601 luminance (the paper's text; its code, like `ssim`, takes RGB)."""
    luma = torch.tensor(LUMA, dtype=torch.float64, device=x.device)
    return ssim((x.double() @ luma).unsqueeze(-1), (y.double() @ luma).unsqueeze(-1))


class FrechetSums:
    """Accumulate count, sum and outer products of features in float64; features are not kept."""

    def __init__(self, dim: int):
        self.parts = [torch.zeros(shape, dtype=torch.float64) for shape in ((1,), dim, (dim, dim))]

    def add(self, features: Tensor) -> None:
        x = features.to("cpu", torch.float64)
        self.merge([x.new_tensor([len(x)]), x.sum(0), x.T @ x])

    def merge(self, parts: list[Tensor]) -> None:
        for own, new in zip(self.parts, parts, strict=True):
            own += new

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (D,) and unbiased covariance (D, D)."""
        count, total, outer = self.parts
        return total / count, (outer - torch.outer(total, total) / count) / (count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Distance between two Gaussians, without complex numbers.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                [Heusel et al. 2017, eq. 6]

    With S = R R^T from a symmetric eigen-decomposition, the last trace is the nuclear norm of
    R1^T R2: exact for singular S too, where the matrix square root of S1 S2 breaks down.
    """

    def root(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov.double())
        keep = values > values[-1].clamp(min=0) * len(cov) * torch.finfo(torch.float64).eps
        return vectors[:, keep] * values[keep].sqrt()

    cross = torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()
    gap = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, float(gap + cov1.diagonal().sum() + cov2.diagonal().sum() - 2 * cross))


# ------------------------------------------------------------------------------------------------
# Published networks, each read from a local file; frames and clips are channels-last in [0, 1].


def load_network(net: nn.Module, metric: str, folder: str | Path, device) -> nn.Module:
    """Load a metric's network strictly, from `folder` or torch.hub's cache; or raise Unavailable.

    Only batch counters, which old files lack, may be absent.
    """
    name = Path(WEIGHTS[metric]).name
    places = [Path(folder) / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise Unavailable(f"{metric} needs {name}, which is not here", WEIGHTS[metric], places[0])
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    data.load_strictly(net, counters | data.load_torch(path), str(path))
    return net.eval().requires_grad_(False).to(device)


def load_lpips(folder: str | Path, device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build LPIPS (AlexNet) of the lpips package from a local trunk: frames twice -> (N,)."""
    import lpips
    from torchvision.models import alexnet

    trunk = load_network(alexnet(), "lpips", folder, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision the old way
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its heads ship with it
    for part in model.net.children():
        for layer in list(part._modules):  # numbered as in the trunk
            setattr(part, layer, trunk.features[int(layer)])
    model = model.to(device).eval().requires_grad_(False)
    return lambda x, y: model(x.movedim(-1, 1), y.movedim(-1, 1), normalize=True).flatten()


def feed_pool(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Give `block.branch_pool` the input `pool(x)` in place of torchvision's zero-padded average."""
    pooled = []
    block.register_forward_pre_hook(lambda _, args: pooled.append(pool(args[0])))
    block.branch_pool.register_forward_pre_hook(lambda _, args: (pooled.pop(),))


def load_inception(metric: str, folder: str | Path, device) -> Callable[[Tensor], Tensor]:
    """Build the FID network: frames (N, H, W, 3) -> features (N, 2048).

    `fid`: TensorFlow's Inception of 2015 in the pytorch-fid layout: 1008 classes, average pools
    that do not count padding, a max pool in the last block. `fid_tv`: torchvision's Inception,
    as the paper's code. Both see bilinear 299 x 299 (without antialiasing) and 2 x - 1.
    """
    from torchvision.models import inception_v3

    fid = metric == "fid"
    net = inception_v3(num_classes=1008 if fid else 1000, aux_logits=not fid, init_weights=False)
    net = load_network(net, metric, folder, device)
    if fid:
        average = {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            feed_pool(getattr(net, f"Mixed_{name}"), lambda x: F.avg_pool2d(x, **average))
        feed_pool(net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
    net.fc = nn.Identity()

    def features(frames: Tensor) -> Tensor:
        x = F.interpolate(frames.movedim(-1, 1), (299, 299), mode="bilinear", align_corners=False)
        return net(2 * x - 1)

    return features


def pad_clip(clips: Tensor, frames: int = 16) -> Tensor:
    """Repeat the last frame of clips (B, T, H, W, 3), context included, up to `frames` frames."""
    missing = max(0, frames - clips.shape[1])
    return torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], 1)


def load_r3d(folder: str | Path, device) -> Callable[[Tensor], Tensor]:
    """Build the paper's video network, torchvision's r3d_18 at 112 px: clips -> (B, 512)."""
    from torchvision.models.video import r3d_18

    net = load_network(r3d_18(), "fvd_r3d", folder, device)
    net.fc = nn.Identity()
    mean = torch.tensor([0.43216, 0.394666, 0.37645], device=device)  # Kinetics-400
    std = torch.tensor([0.22803, 0.22145, 0.216989], device=device)

    def features(clips: Tensor) -> Tensor:
        x = pad_clip((clips - mean) / std).movedim(-1, 2)
        x = F.interpolate(x.flatten(0, 1), (112, 112), mode="bilinear").unflatten(0, x.shape[:2])
        return net(x.transpose(1, 2))

    return features


def load_i3d(path: str | None, folder: str | Path, device) -> Callable[[Tensor], Tensor]:
    """Open the field's FVD network, a TorchScript I3D (runs its code): clips -> (B, 400)."""
    if path is None or not Path(path).is_file():
        there = f"{path} does not exist" if path else "name it with --i3d_path (its code is run)"
        target = Path(path or Path(folder) / Path(WEIGHTS["fvd"]).name)
        raise Unavailable(f"fvd needs the TorchScript I3D: {there}", WEIGHTS["fvd"], target)
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise InputError(f"{path}: no TorchScript archive; fetch {WEIGHTS['fvd']}") from error
    options = {"rescale": True, "resize": True, "return_features": True}
    return lambda clips: net(pad_clip(clips).movedim(-1, 1) * 255, **options)


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Fetch each pixel p of frames (N, H, W, 3) from p + flow; flow (N, 2, H, W) in pixels."""
    H, W = frames.shape[1:3]
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    size = torch.tensor([W - 1, H - 1], device=flow.device)
    grid = 2 * (torch.stack([x, y]).to(flow) + flow).movedim(1, -1) / size - 1
    out = F.grid_sample(frames.movedim(-1, 1), grid, padding_mode="border", align_corners=True)
    return out.movedim(1, -1)


def load_t_lpips(folder: str | Path, device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build t-LPIPS: real and generated clips (B, T, H, W, 3) -> (B, T - 1).

    |LPIPS(x_t, W x_{t+1}) - LPIPS(y_t, W y_{t+1})|, W warping by the real video's flow (RAFT)
    """
    from torchvision.models.optical_flow import raft_large

    net = load_network(raft_large(), "t_lpips", folder, device)
    lpips = load_lpips(folder, device)

    def compare(real: Tensor, video: Tensor) -> Tensor:
        pairs = [(x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)) for x in (real, video)]
        flow = net(*(2 * x.movedim(-1, 1) - 1 for x in pairs[0]))[-1]
        change = [lpips(now, warp(after, flow)) for now, after in pairs]
        return (change[0] - change[1]).abs().view(len(real), -1)

    return compare


# ------------------------------------------------------------------------------------------------
# Point tracks. A tracker maps clips (B, T, H, W, 3) and points (N, 2) as (x, y) on frame 0 to
# tracks (B, T, N, 2) and visibility (B, T, N).


def grid_points(H: int, W: int, side: int = 16, margin: float = 0.02) -> Tensor:
    """Lay side x side points (x, y) over a frame, `margin` of it away from its border."""
    share = torch.linspace(margin, 1 - margin, side)
    return torch.cartesian_prod(share * (H - 1), share * (W - 1)).flip(-1)


def track_patches(clips: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Follow points by the patch around them on frame 0; no weights.

    Each frame, a point moves to the least mean squared difference within H/16 pixels of where it
    was, plus 1e-3 (d / radius)^2, which keeps points on plain surfaces still. It is visible while
    the root mean squared error there is below 0.1.
    """
    B, T, H, W, _ = clips.shape
    N, r, R = len(points), max(2, H // 64), max(2, H // 16)  # half patch, search radius
    p, s = 2 * r + 1, 2 * R + 1
    frames = F.pad(clips.flatten(0, 1).movedim(-1, 1), [R + r] * 4, mode="replicate")
    frames = frames.movedim(1, -1).unflatten(0, (B, T))
    limit = torch.tensor([W - 1, H - 1], device=clips.device)
    position = points.round().long().to(clips.device).clamp(min=0).minimum(limit).expand(B, N, 2)
    reach = torch.arange(-R, R + 1, device=clips.device)
    prior = 1e-3 * (reach[:, None] ** 2 + reach**2) / R**2

    def cut(t: int, half: int) -> Tensor:  # (B N, 3, side, side) around `position` on frame t
        offset = torch.arange(-half, half + 1, device=clips.device) + R + r
        rows, columns = position[..., 1:] + offset, position[..., :1] + offset
        clip = torch.arange(B, device=clips.device)[:, None, None, None]
        return frames[clip, t, rows[..., None], columns[..., None, :]].flatten(0, 1).movedim(-1, 1)

    patch = cut(0, r)
    tracks, visible = [position], [torch.ones(B, N, dtype=torch.bool, device=clips.device)]
    for t in range(1, T):
        window = cut(t, R + r)
        energy = F.avg_pool2d(window.square().mean(1, keepdim=True), p, 1)[:, 0]
        cross = F.conv2d(window.flatten(0, 1)[None], patch, groups=B * N)[0] / (3 * p * p)
        error = energy - 2 * cross + patch.square().mean((1, 2, 3))[:, None, None]
        best = (error + prior).flatten(1).argmin(1)
        visible.append((error.flatten(1).gather(1, best[:, None]) < 0.01).view(B, N))
        step = torch.stack([best % s - R, best // s - R], -1).view(B, N, 2)
        position = (position + step).clamp(min=0).minimum(limit)
        tracks.append(position)
    return torch.stack(tracks, 1).float(), torch.stack(visible, 1)


def load_cotracker(source: str | None, device) -> Callable[[Tensor, Tensor], tuple]:
    """Open CoTracker3 through torch.hub (runs its code): `source` is 'hub' or a local clone."""
    url, local = WEIGHTS["pck"], source != "hub"
    if source is None or (local and not (Path(source) / "hubconf.py").is_file()):
        there = f"{source} has no hubconf.py" if source else "give --cotracker (its code is run)"
        raise Unavailable(f"pck needs a clone of CoTracker: {there}", url, source or "co-tracker")
    place = (source, "local") if local else ("facebookresearch/co-tracker", "github")
    try:
        net = torch.hub.load(place[0], "cotracker3_offline", source=place[1], trust_repo=True)
    except OSError as error:  # no network: its code or its weights cannot be fetched
        url = HUB + "facebook/cotracker3/resolve/main/scaled_offline.pth"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / "scaled_offline.pth"
        raise Unavailable(f"pck: CoTracker cannot be opened ({error})", url, cache) from error
    net = net.to(device).eval()

    def track(clips: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        queries = F.pad(points, (1, 0)).to(clips).expand(len(clips), -1, -1)  # frame 0, x, y
        tracks, visible = net(clips.movedim(-1, 2) * 255, queries=queries)
        return tracks, visible > 0.5

    return track


def pck(real: tuple, generated: tuple, scale: float) -> dict[str, Tensor]:
    """Compare point tracks: percentage of correct keypoints and what it covers.

    real, generated  tracks (B, T, N, 2) in pixels, visibility (B, T, N)
    scale            256 / H: thresholds are pixels of a 256-pixel frame
    ->               {"@5": (B, T), "_moving@5": ..., "_coverage": ..., "_coverage_generated": ...}

    PCK counts points visible in both videos, `moving` those of them that the real clip moves by
    more than 5 px; NaN where there are none. A model can hide its errors by losing points, so
    read it with the coverage: share visible in both videos, and in the generated one.
    """
    (track, seen), (track_g, seen_g) = real, generated
    both, error = seen & seen_g, (track - track_g).norm(dim=-1) * scale
    travel = (track - track[:, :1]).norm(dim=-1).where(seen, 0).amax(1, keepdim=True) * scale
    out = {"_coverage": both.float().mean(-1), "_coverage_generated": seen_g.float().mean(-1)}
    for prefix, counted in (("", both), ("_moving", both & (travel > MOVING_PIXELS))):
        for pixels in PCK_PIXELS:
            correct = ((error <= pixels) & counted).sum(-1)
            out[f"{prefix}@{pixels}"] = correct / counted.sum(-1)  # 0 / 0 is NaN
    return out


# ------------------------------------------------------------------------------------------------
# Probes: small networks trained on real features, then applied, frozen, to generated ones.


class InverseDynamics(nn.Module):
    """Read the actions between frames off encoder features (app. B.6).

    z   (B, k + 1, h, w, C)   features of consecutive frames
    ->  (B, k, 7)             action[j] drives frame j to frame j + 1
    """

    def __init__(self, channels: int, cells: int, k: int, width: int):
        super().__init__()
        self.project = nn.Sequential(nn.RMSNorm(channels), nn.Linear(channels, width))
        self.time = nn.Parameter(0.02 * torch.randn(k + 1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(cells, width))
        self.queries = nn.Parameter(0.02 * torch.randn(k, width))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, **options)
        self.blocks = nn.TransformerEncoder(block, 6, enable_nested_tensor=False)
        head = nn.Linear(width, width), nn.GELU(), nn.Linear(width, 7)
        self.head = nn.Sequential(nn.LayerNorm(width), *head)

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z.flatten(2, 3)) + self.time + self.place  # (B, k + 1, h w, width)
        x = torch.cat([self.queries.expand(len(z), -1, -1), x.flatten(1, 2)], 1)
        return self.head(self.blocks(x)[:, : len(self.queries)])


class ProbeAttention(nn.Module):
    """Attend from x to `context` (default: itself), with normalised queries and keys."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.q = nn.RMSNorm(width), nn.Linear(width, width, bias=False)
        self.kv, self.out = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (8, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * self.training)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Sequential):
    """Normalise, widen twofold, gate one half by the other, narrow."""

    def forward(self, x: Tensor) -> Tensor:
        norm, widen, narrow = self
        gate, value = widen(norm(x)).chunk(2, -1)
        return narrow(F.silu(gate) * value)


class SuccessProbe(nn.Module):
    """Tell from a clip's features whether the task succeeded.

    features  (B, T, 16, C)   4 x 4 average-pooled; all but spatiotemporal and text use the mean
    text      (B, L, E)       tokens of the instruction from a frozen SigLIP 2 (`text` only)
    ->        (B, T)          a logit a frame; `judge` makes one of them
    """

    def __init__(self, kind: str, channels: int, width: int, text_dim: int = 1152):
        super().__init__()
        self.kind, self.cells = kind, 16 if kind in ("spatiotemporal", "text") else 1
        self.project = nn.Sequential(nn.RMSNorm(channels), nn.Linear(channels, width))
        self.time = nn.Parameter(0.02 * torch.randn(PROBE_FRAMES, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(self.cells, width))
        parts = ["space"] * (self.cells > 1) + ["time"] + ["text"] * (kind == "text")
        self.blocks = nn.ModuleList()
        for _ in range(PROBES[kind]):
            block = {part: ProbeAttention(width) for part in parts}
            wide, narrow = nn.Linear(width, 16 * width // 3), nn.Linear(8 * width // 3, width)
            block["mlp"] = SwiGLU(nn.RMSNorm(width), wide, narrow)
            self.blocks.append(nn.ModuleDict(block))
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(width, 1)
        if kind == "text":
            self.read = nn.Sequential(nn.Linear(text_dim, width), nn.RMSNorm(width), self.dropout)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        shape = features.shape[:2]
        features = features if self.cells > 1 else features.mean(2, keepdim=True)
        x = self.project(features) + self.time + self.place  # (B, T, 16 or 1, width)
        for block in self.blocks:
            if "space" in block:
                x = x + self.dropout(block["space"](x.flatten(0, 1)).unflatten(0, shape))
            y = block["time"](x.transpose(1, 2).flatten(0, 1)).unflatten(0, (shape[0], -1))
            x = x + self.dropout(y.transpose(1, 2))
            if "text" in block:
                x = x + self.dropout(block["text"](x.flatten(1, 2), self.read(text)).view_as(x))
            x = x + self.dropout(block["mlp"](x))
        return self.head(x.mean(2)).squeeze(-1)

    def judge(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        """Score clips (B,): the mean logit, or the last frame's for `progress`."""
        logits = self(features, text)
        return logits[:, -1] if self.kind == "progress" else logits.mean(1)

    def loss(self, features: Tensor, label: Tensor, text: Tensor | None = None) -> Tensor:
        """Cross-entropy; `progress` regresses t / T of a success and 0 of a failure."""
        if self.kind == "progress":
            target = label[:, None] * torch.linspace(0, 1, features.shape[1], device=label.device)
            return F.mse_loss(self(features).sigmoid(), target)
        return F.binary_cross_entropy_with_logits(self.judge(features, text), label)

    def choose_threshold(self, scores: Tensor, label: Tensor) -> tuple[float, float]:
        """Set the threshold (0; for `progress` the best) and return balanced accuracy and AUC."""
        edges = scores.sort().values
        options = (edges[1:] + edges[:-1]) / 2 if self.kind == "progress" else torch.zeros(1)
        tables = [torch.stack([label, scores, t.expand_as(scores)], 1).numpy() for t in options]
        best = max(range(len(options)), key=lambda i: balanced_accuracy(tables[i]))
        self.threshold.fill_(options[best])
        return float(balanced_accuracy(tables[best])), float(auc(tables[best]))


def fit(net: nn.Module, loss_of: Callable, score: Callable, steps: int, lr: float, name: str):
    """Train with AdamW and a cosine; keep the best of ten snapshots by `score` on validation."""
    optimizer, best = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-4), None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(1, steps + 1), name, leave=False):
        with torch.enable_grad():
            loss_of(net).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % math.ceil(steps / 10) == 0 or step == steps:
            result = score(net.eval())
            if best is None or result > best[0]:
                best = result, copy.deepcopy(net.state_dict())
            net.train()
    net.load_state_dict(best[1])
    net.eval().requires_grad_(False)
    return best[0]


def load_text(path: str | None, device) -> Callable[[str], Tensor]:
    """Open SigLIP 2's text tower from a local folder: sentence -> (1, 64, E) tokens."""
    if path is None or not Path(path).is_dir():
        reason = "the text-conditioned probe needs SigLIP 2: name its folder with --text_weights"
        raise Unavailable(reason, WEIGHTS["text"], path or "siglip2-so400m-patch14-224")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tower = AutoModel.from_pretrained(path, local_files_only=True).text_model.eval().to(device)

    @functools.lru_cache(maxsize=4096)
    def tokens(sentence: str) -> Tensor:
        length = {"padding": "max_length", "max_length": 64, "truncation": True}
        ids = tokenizer([sentence.lower()], return_tensors="pt", **length)["input_ids"]
        return tower(input_ids=ids.to(device)).last_hidden_state.float()

    return tokens


def policy_actions(raw: np.ndarray) -> np.ndarray:
    """Turn a policy's raw Bridge actions (..., 7) into model units (..., 10).

    xyz +-0.05 m -> +-1.75, rotation +-0.25 rad -> +-1.4, clipped there; gripper above 0.8 (open)
    -> -1, else +1; no base motion. xyz (0.025, 0, -1) m gives (0.875, 0, -1.75).
    """
    raw = np.asarray(raw, dtype=np.float32)
    limit, scale = np.repeat([0.05, 0.25], 3), np.repeat([1.75, 1.4], 3)
    moves = raw[..., :6].clip(-limit, limit) / limit * scale
    gripper = np.where(raw[..., 6:7] > 0.8, -1.0, 1.0)
    return np.concatenate([moves, gripper, np.zeros_like(moves[..., :3])], -1).astype(np.float32)


def openvla_actions(normalised: np.ndarray, stats: dict) -> np.ndarray:
    """Turn OpenVLA's outputs (..., 7) in [-1, 1] into model units (..., 10).

    raw = q01 + (normalised + 1) / 2 (q99 - q01) where `mask` is true (all but the gripper), with
    stats = norm_stats["bridge_orig"]["action"]: q01, q99, mask; then `policy_actions`
    """
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    raw = low + (np.asarray(normalised) + 1) / 2 * (high - low)
    return policy_actions(np.where(stats.get("mask", np.arange(7) < 6), raw, normalised))


# ------------------------------------------------------------------------------------------------
# Pictures, drawn with Pillow.


def draw_panel(draw: ImageDraw.ImageDraw, box: tuple, curves: dict, colours: dict) -> None:
    """Draw curves (values per step, None where there is none) with their axes into a box."""
    (x0, y0, x1, y1), small = box, ImageFont.load_default(13)
    values = [v for curve in curves.values() for v in curve if v is not None] or [0.0]
    spread, steps = max(max(values) - min(values), 1e-3), max(map(len, curves.values()))
    unit = 10 ** math.floor(math.log10(spread))
    unit *= next(m for m in (0.2, 0.5, 1, 2) if spread <= 5 * m * unit)
    low, high = math.floor(min(values) / unit) * unit, math.ceil(max(values) / unit) * unit
    high = max(high, low + unit)

    def place(step: int, value: float) -> tuple[float, float]:
        up = (value - low) / (high - low)
        return x0 + step / max(1, steps - 1) * (x1 - x0), y1 - up * (y1 - y0)

    for value in np.arange(low, high + unit / 2, unit):
        draw.line([place(0, value), (x1, place(0, value)[1])], "#dddddd")
        draw.text((x0 - 8, place(0, value)[1]), f"{value:.4g}", "#444444", small, "rm")
    for step in range(0, steps, math.ceil(steps / 16)):
        draw.text((place(step, low)[0], y1 + 6), str(step + 1), "#444444", small, "ma")
    draw.text(((x0 + x1) / 2, y1 + 22), "predicted frame", "#444444", small, "ma")
    for name, curve in curves.items():
        points = [place(step, v) for step, v in enumerate(curve) if v is not None]
        draw.line(points, colours[name], 3, joint="curve")
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colours[name])


def draw_curves(path: Path, panels: dict[str, dict[str, list]]) -> None:
    """Write a PNG of small plots, two a row, under one legend: {title: {curve: value per step}}."""
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colours = dict(zip(names, ("#1f5fa8", "#2f8f4e", "#8a8a8a", "#c8452d"), strict=False))
    image = Image.new("RGB", (1080, 50 + 290 * math.ceil(len(panels) / 2)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for i, (name, colour) in enumerate(colours.items()):
        draw.line([70 + 150 * i, 25, 98 + 150 * i, 25], colour, 3)
        draw.text((106 + 150 * i, 25), name, "black", font, "lm")
    for i, (title, curves) in enumerate(panels.items()):
        x, y = i % 2 * 540 + 70, i // 2 * 290 + 90
        draw.text((x, y - 24), title, "black", font)
        draw_panel(draw, (x, y, x + 450, y + 200), curves, colours)
    data.write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


def draw_tables(path: Path, tables: list[list[list[str]]]) -> None:
    """Write tables of Markdown cells (** is bold) as a PNG; the first row of each is its head."""
    font, y = ImageFont.load_default(16), 16
    columns = [list(zip(*table, strict=True)) for table in tables]
    sizes = [[[font.getlength(c.strip("*")) for c in column] for column in t] for t in columns]
    widths = [[28 + int(max(column)) for column in t] for t in sizes]
    area = 16 + max(map(sum, widths)), 32 * sum(len(table) + 1 for table in tables)
    image = Image.new("RGB", area, "white")
    draw = ImageDraw.Draw(image)
    for table, columns in zip(tables, widths, strict=True):
        for i, row in enumerate(table):
            fill = "#e4eaf2" if i == 0 else ("#f5f5f5", "white")[i % 2]
            draw.rectangle([8, y, 8 + sum(columns), y + 31], fill)
            for j, cell in enumerate(row):
                x, anchor = (22, "lm") if j == 0 else (sum(columns[: j + 1]) - 6, "rm")
                bold = 0.4 * (i == 0 or cell.startswith("**"))
                draw.text((x, y + 16), cell.strip("*"), "black", font, anchor, stroke_width=bold)
            y += 32
        y += 32
    data.write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


# ------------------------------------------------------------------------------------------------
# The model, its clips and its results.


def open_model(args: Args, device) -> WorldModel:
    """Open `--checkpoint_path`, or put the parts of a released model together."""
    sampler = {"guidance": args.guidance, "context": args.context, "steps": args.steps}
    encoder = {"encoder_weights": args.encoder_weights, "decoder_weights": args.decoder_weights}
    if args.model_preset is None:
        if args.checkpoint_path is None:
            raise InputError("give --checkpoint_path, --model_preset or --compare")
        return WorldModel(args.checkpoint_path, device, **encoder, **sampler)
    size, _, name = args.model_preset.removeprefix("DiT-").partition("_")
    if size not in ("S", "B", "L") or name not in PRESETS:
        known = ", ".join(f"DiT-{{S,B,L}}_{name}" for name in PRESETS)
        raise InputError(f"--model_preset {args.model_preset}: no such model; known are {known}")
    (kind, folder), narrow = PRESETS[name], name.endswith("_D96")
    files = [f"DiT-{size}{'_D96' * narrow}.pt", f"adapter_{folder}_image_96.pt"][: 1 + narrow]
    paths = [Path(args.weights_dir) / "semantic-wm" / folder / file for file in files]
    paths[0] = Path(args.checkpoint_path or paths[0])
    for path, file in zip(paths, files, strict=True):
        if not path.is_file():
            url = f"{HUB}Nilaksh404/semantic-wm/resolve/main/{folder}/{file}"
            raise Unavailable(f"{args.model_preset}: {path} does not exist", url, path)
    config = EncoderConfig(kind, args.encoder_weights, args.decoder_weights)
    space = build_latent_space(config, *map(str, paths[1:]))
    print(f"{paths[0]}: names no objective; taken as {args.objective} (choose with --objective)")
    shift = 1.0 if kind == "vae" else time_shift(256, space.latent_dim)
    trained = {"image_size": 256, "stride": 2, "num_history": 2, "action_merge": "drop"}
    trained |= {"action_mapping": "bridge", "fps": 5}
    parts = load_dit(paths[0], max_frames=10), OBJECTIVES[args.objective](shift=shift), space
    return WorldModel.from_parts(*parts, trained, device, **sampler)


def plain(x):
    """Turn results into JSON values: seven digits, None for NaN."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (Tensor, np.ndarray, np.generic)):
        x = x.tolist()
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x if not isinstance(x, float) else float(f"{x:.7g}") if math.isfinite(x) else None


def show(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def random_cost(generator: torch.Generator, actions: Tensor) -> Tensor:
    """Tell nothing about actions (N, k, A): random costs (N,), or a random slope for a gradient."""
    if actions.requires_grad:
        return (actions * torch.randn(actions.shape, generator=generator).to(actions)).sum((1, 2))
    return torch.randn(len(actions), generator=generator).to(actions)


class Evaluation:
    """Measure one model on one split; `results` goes to disk as numbers are found.

    The methods named after metrics return {row: what `measure` makes}. Clips are counted by their
    place in `ids`; every process works on its share of them.
    """

    def __init__(self, args: Args, proc: data.Processes):
        self.args, self.proc, self.device, self.n = args, proc, proc.device, args.num_context
        self.horizons = [int(k) for k in args.horizons.split(",")]
        self.model, self.probes = open_model(args, proc.device), {}
        self.space, stored = self.model.space, self.model.data
        self.config = data.DataConfig(
            dataset_dir=args.dataset_dir,
            subset_names=args.subset_names,
            num_frames=args.num_context + args.num_frames,
            num_history=args.num_context,
            views=self.space.num_views,
            seed=args.seed,
            **{key: stored[key] for key in ("image_size", "stride", "action_merge")},
        )
        self.clips = data.EpisodeDataset(self.config, args.split)
        where = f"{args.dataset_dir}, {args.subset_names}, {args.split}"
        if self.clips.action_mapping != stored["action_mapping"]:
            raise InputError(
                f"{where}: actions are mapped as {self.clips.action_mapping!r}, the model was "
                f"trained on {stored['action_mapping']!r}; convert the data as for training"
            )
        count = min(args.num_episodes, len(self.clips))
        self.ids = np.linspace(0, len(self.clips) - 1, count).round().astype(int).tolist()
        infos = [self.clips.info(i) for i in self.ids]
        actions = [self.read(info, info["times"], frames=False)[1].cpu() for info in infos]
        self.actions = torch.cat(actions)  # (N, T, A)
        if count < 2 or (self.actions == self.actions[:1, :1]).all():
            fault = "only one clip" if count < 2 else "all actions are equal: none can matter"
            raise InputError(f"{where}: {fault}; give other episodes")
        self.folder = Path(args.output_dir or Path(args.checkpoint_path or "outputs/_").parent)
        self.resume([[i["path"].parts[-3:], i["times"].tolist()] for i in infos])

    def resume(self, clips: list) -> None:
        """Begin the results, or go on with those that an earlier run left in the folder."""
        free = "metrics compare strict output_dir batch_size num_workers device dataset_dir policy "
        free += "weights_dir i3d_path cotracker text_weights encoder_weights decoder_weights"
        settings = {k: v for k, v in vars(self.args).items() if k not in free.split()}
        weights = hashlib.sha256(self.space.fingerprint.encode())
        for tensor in self.model.dit.state_dict().values():
            weights.update(tensor.cpu().numpy().tobytes())
        self.results = {
            "settings": plain(settings),
            "weights": weights.hexdigest()[:16],
            "clips": hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16],
            "versions": {"numpy": np.__version__, "torch": torch.__version__},
        }
        path = self.folder / "results.json"
        old = json.loads(path.read_text()) if path.is_file() else self.results
        changed = [k for k in ("weights", "clips") if old.get(k) != self.results[k]]
        changed += [k for k, v in plain(settings).items() if v != old["settings"].get(k)]
        if changed:
            raise InputError(
                f"{path}: was measured with other {', '.join(changed)}; give another --output_dir, "
                "or remove the file"
            )
        self.results = {"finished": [], "metrics": {}} | old
        self.gather(None)  # nobody writes before everybody has read

    def gather(self, x) -> list:
        """Give every process what each of them has."""
        parts = [x] * self.proc.world
        if self.proc.world > 1:
            torch.distributed.all_gather_object(parts, x)
        return parts

    def collect(self, store: dict) -> dict:
        """Join {row: {clip: values}} of all processes to {row: values in the order of clips}."""
        joined: dict = {}
        for part in self.gather(store):
            for row, clips in part.items():
                joined.setdefault(row, {}).update(clips)
        return {
            row: torch.stack([clips[i] for i in sorted(clips)]) for row, clips in joined.items()
        }

    def walk(self, items, label: str):
        return tqdm(items, label, disable=self.proc.rank > 0, leave=False)

    def share(self, count: int, label: str):
        """Walk through this process's share of so many clips."""
        return self.walk(range(self.proc.rank, count, self.proc.world), label)

    def read(self, info: dict, times: np.ndarray, frames: bool = True) -> tuple:
        """Read an episode at some times: frames (1, [V,] T, H, W, 3), actions (1, T, A)."""
        episode, config = data.Episode(info["path"]), self.config
        actions = data.merge_actions(episode.actions, times, config.action_merge)
        actions = torch.from_numpy(actions)[None].to(self.device)
        if not frames:
            return None, actions
        x = episode.frames(times, config.views, config.image_size)
        x = torch.from_numpy(x[None] if len(x) > 1 else x).to(self.device)
        return x.float() / 255, actions

    def batches(self, label: str) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Yield this process's batches: clips, their frames, actions and another clip's actions."""
        N, B = len(self.ids), self.args.batch_size
        groups = [list(range(i, min(i + B, N))) for i in range(0, N, B)]
        groups = groups[self.proc.rank :: self.proc.world]
        keys = [[self.ids[i] for i in group] for group in groups]
        loader = torch.utils.data.DataLoader(
            self.clips, batch_sampler=keys, num_workers=self.args.num_workers
        )
        for group, (frames, actions) in zip(groups, self.walk(loader, label), strict=True):
            other = self.actions[[(i + N // 2) % N for i in group]]
            other[:, : self.n - 1] = actions[:, : self.n - 1]  # the past stays as it was
            yield group, *(x.to(self.device) for x in (frames, actions, other))

    def dream(self, z: Tensor, actions: Tensor, seeds: Sequence[int]) -> Tensor:
        """Roll latents out from their first frames; the seed of a clip fixes its noise.

        z (B, at least n, h, w, C), actions (B, T, A)  ->  (B, T', h, w, C)
        """
        n, actions = self.n // self.space.temporal_stride, self.space.group_actions(actions)
        shape = (actions.shape[1] - n, *z.shape[2:])
        draws = [torch.Generator().manual_seed(self.args.seed + seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=g) for g in draws]).to(z.device)
        options = {"guidance": self.args.guidance, "context": self.args.context, "noise": noise}
        rollout = self.model.objective.rollout
        out = rollout(self.model.dit, z[:, :n], actions, shape[0], **options)
        if not out.isfinite().all():
            raise InputError(f"clips {seeds}: the model dreams NaN or infinity; it has diverged")
        return out

    def native(self, frames: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Give encoder features (B, T, h, V w, C) of real frames, or of dreamed latents z."""
        V, adapter = self.space.num_views, self.space.adapter
        if z is None:
            x = self.space.encoder.encode(frames)
            return merge_views(x) if V > 1 else x
        z = split_views(z, V).flatten(0, 1) if V > 1 else z
        z = z if self.space.mean is None else z * self.space.std + self.space.mean
        x = adapter.decode(z).float() if adapter else z
        return merge_views(x.unflatten(0, (-1, V))) if V > 1 else x

    # -- pixels

    def videos(self, group, real, actions, other) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the real clips and four to hold against them, views as clips: (B V, T, H, W, 3)."""
        n, z = self.n, self.space.encode(real)
        known = real[..., :n, :, :, :]
        videos = {"ceiling": self.space.decode(z)}
        for kind, acts in (("model", actions), ("shuffled", other)):
            new = self.space.decode(self.dream(z, acts, group))[..., n:, :, :, :]
            videos[kind] = torch.cat([known, new], -4)
        videos["copy"] = torch.cat([known, known[..., -1:, :, :, :].expand_as(new)], -4)
        for kind, video in videos.items():
            if not video.isfinite().all():
                raise InputError(f"clips {group}: pixels of the {kind} are NaN or infinite")
        return real.flatten(0, -5), {kind: x.flatten(0, -5) for kind, x in videos.items()}

    def open_metric(self, name: str) -> Callable:
        """Open a pixel metric: (real, video) -> {row: (B, steps)}, a distance: video -> features."""
        args, n, folder = self.args, self.n, (self.args.weights_dir, self.device)
        if not self.space.has_decoder:
            raise Unavailable(f"{name}: the model has no decoder; make one with train_adapter.py")

        def future(video: Tensor) -> Tensor:
            return video[:, n:].flatten(0, 1)

        if name in ("fid", "fid_tv"):
            features = load_inception(name, *folder)
            return lambda video: features(future(video))
        if name in ("fvd", "fvd_r3d"):
            return load_i3d(args.i3d_path, *folder) if name == "fvd" else load_r3d(*folder)
        if name == "t_lpips":
            if self.config.image_size % 8 or self.config.image_size < 128:
                raise Unavailable("t_lpips: RAFT needs frames of 128 pixels or more, in eights")
            change = load_t_lpips(*folder)
            return lambda real, video: {name: change(real[:, n - 1 :], video[:, n - 1 :])}
        if name in ("pck", "pck_patch"):
            track = load_cotracker(args.cotracker, self.device) if name == "pck" else track_patches
            known: list = [None, None]  # the real clips seen last, and their tracks

            def compare(real: Tensor, video: Tensor) -> dict[str, Tensor]:
                points = grid_points(*real.shape[2:4])
                if known[0] is not real:
                    known[:] = real, track(real, points)
                rows = pck(known[1], track(video, points), 256 / real.shape[2])
                return {name + row: values[:, n:] for row, values in rows.items()}

            return compare
        frame = {"psnr": psnr, "ssim": ssim, "ssim_y": ssim_y}.get(name) or load_lpips(*folder)
        return lambda real, video: {name: frame(future(real), future(video)).view(len(real), -1)}

    def pixels(self, nets: dict[str, Callable]) -> dict[str, dict]:
        """Measure model, ceiling, copy and shuffled actions against the real clips in one pass."""
        store, sums, gif, rows = {}, {}, [], {}
        for group, *clips in self.batches("pixels"):
            real, videos = self.videos(group, *clips)
            if len(gif) < 4:
                difference = (videos["model"] - real).abs()
                gif += torch.cat([real, videos["model"], difference], 3).cpu()[: 4 - len(gif)]
            for name, (kind, video) in itertools.product(nets, {"real": real, **videos}.items()):
                if name in DISTANCES:
                    x = nets[name](video)
                    sums.setdefault((name, kind), FrechetSums(x.shape[1])).add(x)
                elif kind != "real":
                    for row, values in nets[name](real, video).items():
                        values = values.double().cpu().unflatten(0, (len(group), -1)).nanmean(1)
                        store.setdefault((row, kind), {}).update(zip(group, values, strict=True))
        store = self.collect(store)
        for row in dict.fromkeys(row for row, _ in store):
            clips = {kind: store[row, kind].nanmean(1) for kind in KINDS}
            rows[row] = measure(
                clips["model"],
                "lower" if "lpips" in row else "higher",
                beside={kind: clips[kind].nanmean() for kind in KINDS[1:]},
                minus={k: bootstrap(clips["model"], minus=clips[k])[:2] for k in KINDS[2:]},
                per_step={kind: store[row, kind].nanmean(0) for kind in KINDS},
            )
        rows |= {name: self.distance(name, sums) for name in nets if name in DISTANCES}
        if gif and self.proc.rank == 0:
            data.write_gif(self.folder / "samples.gif", torch.cat(gif, 1), self.model.data["fps"])
        return rows

    def distance(self, name: str, sums: dict[tuple, FrechetSums]) -> dict:
        """Make the row of a Frechet distance from the sums of all processes.

        It has no interval: the distance is biased by N, and so is every resampling of it.
        """
        moments = {}
        for kind in ("real", *KINDS):
            total, *others = [part for part in self.gather(sums.get((name, kind))) if part]
            for other in others:
                total.merge(other.parts)
            moments[kind] = total.moments()
        value, *beside = (frechet_distance(*moments["real"], *moments[kind]) for kind in KINDS)
        n, dim = int(total.parts[0]), len(total.parts[1])
        row = {"value": value, "ci": None, "n": n, "better": "lower"}
        if n <= 2 * dim:
            row["note"] = f"{n} samples of {dim} numbers: biased upward, compare at equal N only"
        return row | {"beside": dict(zip(KINDS[1:], beside, strict=True))}

    # -- control

    def controllability(self) -> dict[str, dict]:
        """Search the actions that lead to the recorded future; error: L2, averaged over steps.

        The mean starts at the true actions (the paper's way; it flatters everybody) or at zero;
        beside each stands the same search on random costs.
        """
        args, n, store, faults = self.args, self.n, {}, {}
        cem = {key: getattr(args, key) for key in ("population", "elites", "iterations")}
        for i in self.share(min(args.windows, len(self.ids)), "search"):
            frames, actions = (x.to(self.device) for x in self.clips[self.ids[i]])
            z = self.space.encode(frames[None])[0]
            for k, search in itertools.product(self.horizons, args.searches.split(",")):
                dims = list(range(3) if search == "grid" else SEARCHED)
                random = torch.Generator().manual_seed(args.seed + i)
                noise = torch.randn((k, *z.shape[1:]), generator=random).to(z.device)
                task = self.model.dit, self.model.objective, z[:n], actions[: n - 1], z[n : n + k]
                signals = {"no signal": functools.partial(random_cost, random)}
                true, last = actions[n - 1 : n - 1 + k], actions[n - 1 + k]
                try:
                    signals["model"] = candidate_cost(*task, noise, last)
                    for start, (kind, cost) in itertools.product(("", "_zero"), signals.items()):
                        first = true.clone()
                        first[:, dims] *= start == ""
                        options = cem | {"generator": random} if search == "cem" else {}
                        found = PLANNERS[search](cost, first, dims, **options)[0]
                        error = (found - true)[:, dims].cpu()
                        store.setdefault((f"{search}_k{k}{start}", kind), {})[i] = error
                except InputError as error:  # too many points, too long for the window
                    faults[f"{search}_k{k}"] = Unavailable(str(error)).row
        store, rows = self.collect(store), self.gather(faults)[0]
        for row in dict.fromkeys(row for row, _ in store):
            size, random = (
                store[row, kind].norm(dim=-1).mean(-1) for kind in ("model", "no signal")
            )
            rows[row] = measure(
                size,
                "lower",
                beside={"no signal": random.mean()},
                minus={"no signal": bootstrap(size, minus=random)[:2]},
                per_dim=store[row, "model"].abs().mean((0, 1)),
            )
        return rows

    def idm(self) -> dict[str, dict]:
        """Train the inverse-dynamics probe per horizon and read the actions off both futures."""
        rows, n = {}, self.n
        for k in self.horizons:
            net, store = self.fit_idm(k), {}
            starts = range(n - 1, self.config.num_frames - k, k)
            for group, real, actions, _ in self.batches(f"idm k={k}"):
                dreamed = self.native(z=self.dream(self.space.encode(real), actions, group))
                true = torch.cat([actions[:, s : s + k, :6] for s in starts], 1)
                for kind, z in (("model", dreamed), ("real", self.native(real))):
                    read = torch.cat([net(z[:, s : s + k + 1])[..., :6] for s in starts], 1)
                    moments = action_moments(read, true).cpu()
                    store.setdefault(kind, {}).update(zip(group, moments, strict=True))
            store = self.collect(store)
            (r, r2), (_, r2_real) = (pearson_per_dim(store[k].numpy()) for k in ("model", "real"))
            beside = {"real": bootstrap(store["real"], "pearson")[0]}
            per_dim = {"r": r, "r2": r2, "r2_real": r2_real}
            row = measure(store["model"], "higher", "pearson", beside=beside, per_dim=per_dim)
            rows[f"idm_r_k{k}"] = row
        return rows

    def fit_idm(self, k: int) -> InverseDynamics:
        """Train on windows of the train split; every tenth episode of it chooses the weights."""
        args = self.args
        config = dataclasses.replace(self.config, num_frames=k + 1, num_history=1)
        train = data.EpisodeDataset(config, "train")
        learn = [i for i in range(len(train)) if i % 10]
        if not learn:
            raise Unavailable("idm needs at least two training episodes")
        draws = np.random.default_rng((args.seed, k)).integers(1, 1 << 30, (args.max_steps, 32))
        keys = [[(draw, learn[draw % len(learn)]) for draw in batch] for batch in draws.tolist()]
        load = functools.partial(torch.utils.data.DataLoader, train, num_workers=args.num_workers)
        batches, held = iter(load(batch_sampler=keys)), range(0, len(train), 10)[:64]
        held = list(torch.utils.data.DataLoader(train, batch_sampler=[[i] for i in held]))

        def loss_of(net, clip=None) -> Tensor:
            frames, actions = (x.to(self.device) for x in clip or next(batches))
            return F.smooth_l1_loss(net(self.native(frames)), actions[:, :k, :7])

        def score(net) -> float:
            return -sum(loss_of(net, clip).item() for clip in held)

        *_, h, w, C = self.native(held[0].frames.to(self.device)).shape
        torch.manual_seed(args.seed)
        net = InverseDynamics(C, h * w, k, args.probe_width).to(self.device)
        lr = 0.15 / args.probe_width  # 3e-4 at the paper's width
        fit(net, loss_of, score, args.max_steps, lr, f"idm k={k}")
        return net

    # -- semantics

    def labelled(self, split: str, count: int) -> list[dict]:
        """List at most `count` episodes with a success label, long enough for eight frames."""
        clips, shortest = data.EpisodeDataset(self.config, split), max(PROBE_FRAMES, self.n + 1)
        infos = [info for i in range(len(clips)) if (info := clips.info(i))["success"] is not None]
        infos = [info for info in infos if len(self.whole(info)) >= shortest]
        labels = {bool(info["success"]) for info in infos}
        if len(labels) < 2:
            found = f"only success={labels.pop()}" if labels else "no success labels"
            where = f"split {split!r} of {self.args.subset_names}"
            raise Unavailable(f"success probes need successes and failures; {where} has {found}")
        picked = np.linspace(0, len(infos) - 1, min(count, len(infos))).round().astype(int)
        return [infos[i] for i in picked]

    def whole(self, info: dict) -> np.ndarray:
        """Give the frames of a whole episode at the model's stride."""
        return np.arange(0, info["length"], self.config.stride)

    def eight(self, steps: int) -> np.ndarray:
        """Choose the frames that a probe sees of so many."""
        fps = self.model.data["fps"] / self.config.stride
        return data.probe_frames(steps, PROBE_FRAMES, self.args.probe_sampling, fps)

    def pooled(self, features: Tensor) -> Tensor:
        """Average features (B, T, h, w, C) over 4 x 4 super-patches: (B, T, 16, C)."""
        x = F.adaptive_avg_pool2d(features.flatten(0, 1).movedim(-1, 1), 4)
        return x.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])

    def read_text(self, kind: str, sentences: Sequence[str]) -> Tensor | None:
        return torch.cat([self.text(s) for s in sentences]) if kind == "text" else None

    def fit_probes(self) -> None:
        """Train the success probes on real features; every fifth episode chooses the weights."""
        args, device = self.args, self.device
        infos, x = self.labelled("train", args.probe_episodes), []
        for info in self.walk(infos, "features"):
            times = self.whole(info)
            real, _ = self.read(info, times[self.eight(len(times))])
            x.append(self.pooled(self.native(real)).half().cpu())
        x, label = torch.cat(x), torch.tensor([float(info["success"]) for info in infos])
        words = np.array([info["language"] for info in infos])
        held, learn = np.arange(0, len(x), 5), np.flatnonzero(np.arange(len(x)) % 5)
        if not all(0 < label[part].sum() < len(part) for part in (held, learn)):
            raise Unavailable("success probes: too few labelled training episodes")
        steps = min(args.max_steps, PROBE_EPOCHS * math.ceil(len(learn) / 32))
        random = np.random.default_rng(args.seed)

        def loss_of(net) -> Tensor:
            part = random.choice(learn, 32)
            z, target = x[part].to(device).float(), label[part].to(device)
            loss = net.loss(z, target, self.read_text(net.kind, words[part]))
            if net.kind == "text":  # with another episode's sentence it is no success
                other = words[random.permutation(part)]
                kept = torch.from_numpy(words[part] == other).to(device)
                loss = loss + net.loss(z, target * kept, self.read_text("text", other))
            return loss

        def score(net) -> tuple[float, float]:
            parts = np.array_split(held, math.ceil(len(held) / 32))
            inputs = [(x[p].to(device).float(), self.read_text(net.kind, words[p])) for p in parts]
            scores = torch.cat([net.judge(*z) for z in inputs])
            return net.choose_threshold(scores.cpu(), label[held])

        for kind in [kind for kind in PROBES if kind != "text" or self.text]:
            torch.manual_seed(args.seed)
            text_dim = self.text("").shape[-1] if kind == "text" else 0
            net = SuccessProbe(kind, x.shape[-1], args.probe_width * 3 // 4, text_dim).to(device)
            net.validation = fit(net, loss_of, score, steps, 1e-3, f"probe {kind}")
            self.probes[kind] = net

    def probe(self) -> dict[str, dict]:
        """Judge real and dreamed test episodes by the probes that learned from real ones."""
        infos, store, rows = self.labelled(self.args.split, self.args.num_episodes), {}, {}
        self.fit_probes()
        for i in self.share(len(infos), "probe"):
            info, times = infos[i], self.whole(infos[i])
            seen, label = self.eight(len(times)), torch.tensor(float(infos[i]["success"]))
            known, real = (self.read(info, t)[0] for t in (times[: self.n], times[seen]))
            actions = self.read(info, times, frames=False)[1]
            z = self.dream(self.space.encode(known), actions, [i])[:, seen]
            features = {"model": self.native(z=z), "real": self.native(real)}
            for net, source in itertools.product(self.probes.values(), features):
                text = self.read_text(net.kind, [info["language"]])
                score = net.judge(self.pooled(features[source]), text)[0].cpu()
                sample = torch.stack([label, score, net.threshold.cpu()]).double()
                store.setdefault((net.kind, source), {})[i] = sample
        store = self.collect(store)
        statistics = ("accuracy", "balanced_accuracy", "auc")
        for kind, statistic in itertools.product(self.probes, statistics):
            beside = {"real": bootstrap(store[kind, "real"], statistic)[0]}
            row = measure(store[kind, "model"], "higher", statistic, beside=beside)
            rows[f"probe_{kind}_{statistic}"] = row
        return rows

    def policy(self) -> dict[str, dict]:
        """Let a policy act inside the dream; the probe that validated best counts successes."""
        args, store = self.args, {}
        infos = self.labelled(args.split, args.policy_starts)
        if not self.probes:
            self.fit_probes()
        net = max(self.probes.values(), key=lambda net: net.validation)
        for i in self.share(len(infos), "policy"):
            sentence = infos[i]["language"]
            known, _ = self.read(infos[i], self.whole(infos[i])[: self.n])
            known = known.expand(args.policy_trials, *known.shape[1:])
            random = torch.Generator().manual_seed(args.seed + i)
            act = functools.partial(self.act, sentence=sentence)
            frames, _ = self.model.rollout_policy(act, known, args.policy_steps, random)
            seen = torch.from_numpy(self.eight(frames.shape[-4])).to(frames.device)
            features = self.pooled(self.native(frames.index_select(frames.ndim - 4, seen)))
            won = net.judge(features, self.read_text(net.kind, [sentence] * len(features)))
            store.setdefault("rate", {})[i] = (won > net.threshold).double().mean().cpu()
        rates = self.collect(store)["rate"]
        spread = (rates.mean() * (1 - rates.mean()) / (len(rates) * args.policy_trials)).sqrt()
        extra = {"trials": args.policy_trials, "standard_error": spread, "judge": net.kind}
        return {"success_rate": measure(rates, "higher", **extra)}

    # -- the whole

    def open(self, name: str):
        """Open what a metric needs before any work is done, or raise Unavailable."""
        if name == "probe_text":
            return load_text(self.args.text_weights, self.device)
        if name in PIXELS:
            return self.open_metric(name)
        if self.space.temporal_stride > 1:
            raise Unavailable(f"{name}: this encoder packs two frames into one latent")
        if name == "policy" and not self.args.policy:
            raise Unavailable("policy: name the function to act with, --policy module:function")
        if name == "policy":
            sys.path.insert(0, os.getcwd())
            function = pydoc.locate(self.args.policy.replace(":", "."))
            if function is None:
                raise InputError(f"--policy {self.args.policy}: there is no such function")
            return function

    def run(self) -> None:
        """Measure group by group; what an earlier run finished is not measured again."""
        done, args, opened, missing = self.results["finished"], self.args, {}, {}
        todo = [name for name in args.metrics.split(",") if name not in done]
        for name in [*todo, *["probe_text"] * bool({"probe", "policy"} & {*todo})]:
            try:
                opened[name] = self.open(name)
            except Unavailable as error:
                if args.strict:
                    raise
                missing[name] = error.row
        self.text, self.act = opened.pop("probe_text", None), opened.get("policy")
        self.report(self.results["metrics"] | missing)
        nets = {name: net for name, net in opened.items() if name in PIXELS}
        work = [(list(nets), functools.partial(self.pixels, nets))] if nets else []
        work += [([name], getattr(self, name)) for name in METRICS if name in opened.keys() - nets]
        for names, measured in work:
            try:
                rows, finished = measured(), names
            except Unavailable as error:
                if args.strict:
                    raise
                rows, finished = {name: error.row for name in names}, []
            done += finished
            self.report(rows)
        if self.proc.rank == 0:
            shown = {
                f"{name}, {row['better']} is better": row["per_step"]
                for name, row in self.results["metrics"].items()
                if "per_step" in row and ("@" not in name or name.endswith("@10"))
            }
            if shown:
                draw_curves(self.folder / "horizon.png", shown)
            print(*in_words(self.results["metrics"]), sep="\n")

    def report(self, rows: dict[str, dict]) -> None:
        """Print rows of the table and put them on disk."""
        self.results["metrics"] |= (rows := plain(rows))
        if self.proc.rank > 0:
            return
        path = self.folder / "results.json"
        data.write_atomic(path, json.dumps(self.results, indent=1).encode())
        for name, row in rows.items():
            if row["value"] is None:
                print(f"{name:32} null: {row.get('reason') or 'no clip has a value'}")
                if row.get("url"):
                    print(f"{'':32} fetch {row['url']}\n{'':32} to {row['path']}")
                continue
            interval = "[{}, {}]".format(*map(show, row["ci"])) if row["ci"] else ""
            beside = [f"{kind} {show(x)}" for kind, x in row.get("beside", {}).items()]
            line = f"{name:32} {row['better']:6} {show(row['value']):>8} {interval:19} {row['n']:5}"
            print(line, *beside, row.get("note", ""), sep="  ")


def in_words(metrics: dict[str, dict]) -> list[str]:
    """Say whether the model listens to its actions and whether it is better than a copy."""
    lines = []
    for name, row in metrics.items():
        sign, value, beside = (1 if row.get("better") == "higher" else -1), row["value"], {}
        for kind, (_, interval) in row.get("minus", {}).items():
            if interval is not None:  # kind: [its value, is the gain over it sure?]
                beside[kind] = show(row["beside"][kind]), min(sign * x for x in interval) > 0
        if name in ("psnr", "ssim", "lpips") and "shuffled" in beside:
            other, listens = beside["shuffled"]
            verb = "listens to" if listens else "ignores"
            with_other = f"{show(value)} with the recorded ones, {other} with another clip's"
            lines.append(f"The model {verb} its actions: {name} is {with_other}.")
            if not beside["copy"][1]:
                lines.append(f"By {name} it is no better than repeating the last known frame.")
        if "no signal" in beside:
            random, useful = beside["no signal"]
            verb = "finds actions" if useful else "finds none, as if the model ignored its actions"
            lines.append(f"{name} {verb}: error {show(value)}, {random} when costs are random.")
    return lines


# ------------------------------------------------------------------------------------------------
# Several runs side by side.


def paired(row: dict, other: dict) -> str:
    """Write the difference of two runs on the same clips with its interval; ** excludes zero."""
    if "samples" not in row:
        return f"{row['value'] - other['value']:+.3g}"
    value, interval, _ = bootstrap(row["samples"], row["statistic"], minus=other["samples"])
    if interval is None:
        return f"{value:+.3g}"
    text = f"{value:+.3g} [{interval[0]:+.3g}, {interval[1]:+.3g}]"
    return f"**{text}**" if interval[0] * interval[1] > 0 else text


def compare(args: Args) -> None:
    """Write the three-axis table of several runs: best in bold, paired differences, Borda ranks."""
    runs, tables, lines = {}, [], []
    for name in args.compare:
        path = Path(name) / "results.json"
        if not path.is_file():
            raise InputError(f"{path}: no results; measure the run first with evaluate.py")
        runs[name] = json.loads(path.read_text())
    first, *others = runs.values()
    if not others or any(run["clips"] != first["clips"] for run in others):
        raise InputError("--compare needs two or more runs measured on the same clips and seed")
    for axis, pattern in AXES.items():
        found = [
            {m for m, row in run["metrics"].items() if row["value"] is not None}
            for run in runs.values()
        ]
        names = [name for name in first["metrics"] if name in set.intersection(*found)]
        names = [name for name in names if re.fullmatch(pattern, name)]
        if not names:
            continue
        rows = {name: [run["metrics"][m] for m in names] for name, run in runs.items()}
        higher = [row["better"] == "higher" for row in rows[args.compare[0]]]
        values = np.array([[cell["value"] for cell in row] for row in rows.values()])
        best = np.where(higher, values.max(0), values.min(0)).tolist()
        ranks = borda(values, higher).tolist()
        arrows = [f"{m} {'up' if up else 'down'}" for m, up in zip(names, higher, strict=True)]
        table, gaps = [[axis, *arrows, "Borda"]], [[f"minus {args.compare[0]}", *names]]
        for name, rank in zip(rows, ranks, strict=True):
            cells = zip(
                [*(row["value"] for row in rows[name]), rank], [*best, min(ranks)], strict=True
            )
            table.append([name, *(f"**{show(x)}**" if x == top else show(x) for x, top in cells)])
            pairs = zip(rows[name], rows[args.compare[0]], strict=True)
            gaps.append([name, *(paired(row, other) for row, other in pairs)])
        del gaps[1]  # the first run minus itself
        tables += [table, gaps]
    for table in tables:
        text = ["| " + " | ".join(row) + " |" for row in table]
        lines += [text[0], "|---" * len(table[0]) + "|", *text[1:], ""]
    folder = Path(args.output_dir or "outputs/compare")
    data.write_atomic(folder / "compare.md", "\n".join(lines).encode())
    draw_tables(folder / "compare.png", tables)
    print(*lines, f"{folder / 'compare.md'}, {folder / 'compare.png'}", sep="\n")


def main() -> None:
    args = data.parse_args(Args, toy=TOY)
    if args.compare:
        return compare(args)
    torch.set_grad_enabled(False)
    Evaluation(args, data.init_processes(args.device)).run()


if __name__ == "__main__":
    data.run_cli(main)
