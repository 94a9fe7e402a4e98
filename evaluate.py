"""Measure a trained world model on three axes: pixels, control, semantics; invent no number.

    python evaluate.py toy --checkpoint_path outputs/RUN/world_model.safetensors
    python evaluate.py --model_preset DiT-S_WEBSSL_D96 --dataset_dir ./data --metrics psnr,fvd,idm
    torchrun --nproc_per_node=4 evaluate.py --checkpoint_path F --dataset_dir ./data
    python evaluate.py --compare outputs/a outputs/b

Every number stands beside what it must be read against: the encode-decode ceiling, the last known
frame repeated, another clip's actions, a search without signal, real features. Protocols: arXiv
2605.06388, sec. 4, app. B. Metrics: psnr ssim lpips t_lpips fid fid_tv fvd fvd_r3d pck pck_patch,
controllability idm, probe policy; in the toy world counterfactual objects goal. A clip's noise
depends on the clip alone: any number of processes gives the same numbers.
Shapes: B clips, V views, T frames, H W pixels, h w latent grid, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import pydoc
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import data
from adapter import most_heads
from data import InputError
from diffusion import OBJECTIVES
from dit import load_dit, merge_views
from encoders import EncoderConfig
from world_model import (
    DETERMINISTIC,
    DIVERGED,
    PLANNERS,
    SEARCHED,
    WorldModel,
    build_latent_space,
    candidate_cost,
    default_shift,
    dream,
)

Device = str | torch.device
DISTANCES = ("fid", "fid_tv", "fvd", "fvd_r3d")
PIXELS = ("psnr", "ssim", "lpips", "t_lpips", *DISTANCES, "pck", "pck_patch")
SIMULATED = ("counterfactual", "objects", "goal")  # need episodes of the toy world
METRICS = (*PIXELS, "controllability", "idm", "probe", "policy", *SIMULATED)
KINDS = ("model", "ceiling", "copy", "shuffled")  # what pixel metrics are measured on
LOWER = r"(t_)?lpips|counterfactual_error|objects_(gripper|blocks)"  # is better; as of distances
CURVES = "|".join({*PIXELS} - {*DISTANCES} | {"pck(_patch)?(_coverage.*|(_moving)?@10)"})
AXES = {  # rows that --compare sets side by side
    "Pixels": "|".join((*PIXELS, "pck(_patch)?@10")),
    "Control": rf"({'|'.join(PLANNERS)}|idm_r|goal)_k\d+(_zero)?(_xyz)?",
    "Semantics": r"probe_\w+_balanced_accuracy|success_rate",
    "Simulator": r"(counterfactual|objects)_\w+",
}
TORCH_URL, HF_URL = "https://download.pytorch.org/models/", "https://huggingface.co/"
FID_RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS = {  # metric: where its weights can be fetched; a file keeps its name
    "lpips": TORCH_URL + "alexnet-owt-7be5be79.pth",
    "t_lpips": TORCH_URL + "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    "fid": FID_RELEASE + "pt_inception-2015-12-05-6726825d.pth",
    "fid_tv": TORCH_URL + "inception_v3_google-0cc3c7bd.pth",
    "fvd": "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt",
    "fvd_r3d": TORCH_URL + "r3d_18-b3b3357e.pth",
    "pck": "https://github.com/facebookresearch/co-tracker",
    "text": HF_URL + "google/siglip2-so400m-patch14-224",
}
PRESETS = {  # released models DiT-{S,B,L}_NAME: encoder, hub folder
    "VAE": ("vae", "vae"),
    "VAVAE": ("vavae", "vavae"),
    "COSMOS": ("cosmos", "cosmos"),
    **{f"VJEPA2_{space}": ("vjepa2", "vjepa") for space in ("WIDE", "D96")},
    **{f"WEBSSL_{space}": ("scale_rae_webssl", "webssl") for space in ("WIDE", "D96")},
    **{f"SIGLIP2_{space}": ("scale_rae_siglip", "siglip") for space in ("WIDE", "D96")},
}
RELEASED = {"image_size": 256, "stride": 2, "num_history": 2, "action_merge": "drop", "fps": 5}
RELEASED["action_mapping"] = "bridge"
PACKAGES = "torch torchvision numpy scipy transformers safetensors lpips pillow"
METRIC_FLAG = {"policy": "policy", "probe": "text_weights", "fvd": "i3d_path", "pck": "cotracker"}
NOTE_SECONDS = 30  # seconds at least from one note of unfinished metrics on disk to the next
BANK = 4 << 30  # bytes of features, at most, that the inverse-dynamics probe learns from
DEPTHS = {"linear": 0, "temporal": 1, "spatiotemporal": 2, "progress": 1, "text": 6, "idm": 6}


@dataclasses.dataclass
class Args:
    # -- what
    checkpoint_path: str | None = None  # world_model.safetensors of a run, or a preset's .pt
    model_preset: str | None = None  # a released model, DiT-{S,B,L}_{VAE,WEBSSL_D96,...}
    objective: Literal["flow_matching", "ddpm"] | None = None  # of a preset (none: flow_matching)
    metrics: str = "psnr,ssim,lpips,pck_patch,controllability"  # comma-separated
    compare: tuple[str, ...] = ()  # instead, set the results in these run folders side by side
    # -- data; frame size, stride, cameras and action units are the checkpoint's
    dataset_dir: str = "./data"  # folder that `data.py --output_dir` wrote
    subset_names: str = "bridge_v2"  # data sets, comma-separated
    split: str = "test"  # episodes to measure on; probes learn from `train`
    num_episodes: int = 1000  # one clip each
    num_context: int | None = None  # given frames (default: as in training)
    num_frames: int | None = None  # predicted frames (default: what the model's window has left)
    # -- files; a metric whose file is missing is null, with the reason
    weights_dir: str = "./weights"  # folder of the metrics' networks and of released models
    encoder_weights: str | None = None  # public encoder, if not where training found it
    i3d_path: str | None = None  # TorchScript I3D for `fvd`; runs the code in the file
    cotracker: str | None = None  # clone of co-tracker, or 'hub', for `pck`; runs its code
    text_weights: str | None = None  # SigLIP 2 folder for the text-conditioned probe
    strict: bool = False  # stop when a metric cannot be computed
    # -- control, on `windows` clips
    horizons: str = "1,4"  # k: actions searched, or inferred from k + 1 frames
    searches: str = "cem"  # of cem, gradient, grid
    windows: int = 100  # clips to search in
    population: int = 400  # CEM: candidates an iteration, of 5; the best eighth is kept
    # -- probes and policy
    max_steps: int = 2000  # training steps of each probe, at most
    probe_width: int = 512  # of the inverse-dynamics probe, in 32s; success probes: 3/4 of it
    policy: str | None = None  # module:function (frames (B, H, W, 3), sentence) -> actions (B, A)
    policy_starts: int = 20  # episodes whose first frames are started from
    policy_trials: int = 8  # dreams a start
    policy_steps: int = 50  # actions a dream
    # -- run
    output_dir: str | None = None  # default: the checkpoint's folder; --compare: outputs/compare
    batch_size: int = 8  # clips at once
    seed: int = 0  # of noise, searches and probes
    device: str | None = None  # default: cuda when there, else cpu

    def __post_init__(self):
        for name in ("metrics", "searches", "horizons"):
            setattr(self, name, getattr(self, name).replace(" ", ""))
        for name, known in (("metrics", METRICS), ("searches", PLANNERS)):
            if unknown := {*getattr(self, name).split(",")} - {*known}:
                raise InputError(f"{name}: no {sorted(unknown)}; choose among {', '.join(known)}")
        if not all(k.isdecimal() and int(k) > 0 for k in self.horizons.split(",")):
            raise InputError(f"horizons {self.horizons!r}: give numbers from 1 on, such as 1,4")
        least = {"num_episodes": 2, "windows": 2, "population": 16, "batch_size": 1, "max_steps": 1}
        least |= {"policy_starts": 2, "policy_trials": 1, "policy_steps": 8, "probe_width": 32}
        least |= {k: 1 for k in ("num_context", "num_frames") if getattr(self, k) is not None}
        if small := [f"{name} >= {n}" for name, n in least.items() if getattr(self, name) < n]:
            raise InputError(f"need {', '.join(small)}")
        data.check_seed(self.seed)


TOY = Args(subset_names="toy", num_episodes=64, windows=16, population=64)
TOY.metrics = "psnr,ssim,pck_patch,controllability,idm,probe," + ",".join(SIMULATED)
TOY.max_steps, TOY.probe_width = 120, 64


class Unavailable(InputError):
    """Say why a metric cannot be computed, and what to fetch so that it can."""

    def __init__(self, reason: str, url: str = "", path: str | Path = ""):
        super().__init__(f"{reason}; fetch {url} to {path}" if url else reason)
        self.reason, self.url, self.path = reason, url, str(path)


# ------------------------------------------------------------------------------------------------
# Statistics: every value with the interval that its clips allow.


def correlation(samples: np.ndarray) -> np.ndarray:
    """Compute Pearson r and R^2 = 1 - sum (x - y)^2 / sum (y - mean y)^2 of each dimension: (2, D).

    samples  (N, n, 2, D)   n windows a clip: x read, y true; NaN where all y are equal
    """
    x, y = np.moveaxis(samples, 2, 0).reshape(2, -1, samples.shape[-1])
    dx, dy = x - x.mean(0), y - y.mean(0)
    spread = np.where(np.ptp(y, 0) > 1e-6, (dy * dy).sum(0), np.nan)
    r = (dx * dy).sum(0) / np.sqrt(np.maximum((dx * dx).sum(0), 1e-12) * spread)
    return np.stack([r, 1 - ((x - y) ** 2).sum(0) / spread])


def balanced_accuracy(samples: np.ndarray) -> float:
    """Average the recall of the two classes; samples (N, 2): label, score (success above 0)."""
    label, called = samples[:, 0] > 0.5, samples[:, 1] > 0
    return (called[label].mean() + (~called[~label]).mean()) / 2


def auc(samples: np.ndarray) -> float:
    """Count how often a success outscores a failure, ties half: the area under the ROC."""
    label, score = samples[:, 0] > 0.5, samples[:, 1]
    return (np.sign(score[label, None] - score[~label]) / 2 + 0.5).mean()


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda s: s.mean(),
    "share": lambda s: np.nanmean(s),  # of hits (1) among trials, several a clip
    "l2": lambda s: np.linalg.norm(s, axis=-1).mean(),
    "pearson": lambda s: np.nanmean(correlation(s)[0]),
    "accuracy": lambda s: ((s[:, 1] > 0) == (s[:, 0] > 0.5)).mean(),
    "balanced_accuracy": balanced_accuracy,
    "auc": auc,
}


def bootstrap(
    samples: Any, statistic: str = "mean", minus: Any = None
) -> tuple[float, list | None, int]:
    """Give a statistic of the clips, its 95 % percentile interval over 1000 resamplings, and N.

    samples  (N, ...)   one entry a clip; of means, clips without a value do not count
    minus    (N, ...)   the same clips of another model: the paired difference is returned
    """
    pair = [np.asarray(s, dtype=np.float64) for s in (samples, minus) if s is not None]
    valid = np.isfinite(sum(pair)) if statistic == "mean" else np.ones(len(pair[0]), bool)
    pair, size, random = [s[valid] for s in pair], int(valid.sum()), np.random.default_rng(0)

    def value(index: Any) -> float:
        first, *other = (STATISTICS[statistic](s[index]) for s in pair)
        return float(first - sum(other))

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class, no spread: NaN
        if not size or math.isnan(point := value(slice(None))):
            return math.nan, None, size
        draws = [value(random.integers(size, size=size)) for _ in range(1000)]
    return point, np.nanpercentile(draws, [2.5, 97.5]).tolist() if size > 1 else None, size


def borda(values: np.ndarray, higher: Sequence[bool]) -> np.ndarray:
    """Sum the ranks of each run (runs, metrics); 1 is best, equal values share the mean rank."""
    from scipy.stats import rankdata

    return rankdata(np.asarray(values) * np.where(higher, -1.0, 1.0), axis=0).sum(1)


# ------------------------------------------------------------------------------------------------
# Pixel metrics: frames (N, H, W, 3) twice -> (N,). Frechet distances: features (N, D).


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio 10 log10(1 / MSE) in dB, at most 100."""
    return data.psnr(x.double(), y.double())


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute SSIM as scikit-image does by default: 7x7 box, sample covariance, RGB mean.

    (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2))  [Wang et al. 2004, eq. 13]
    """
    x, y = x.double().movedim(-1, 1), y.double().movedim(-1, 1)
    mx, my, xx, yy, xy = (F.avg_pool2d(m, 7, 1) for m in (x, y, x * x, y * y, x * y))
    sxx, syy, sxy = (49 / 48 * s for s in (xx - mx * mx, yy - my * my, xy - mx * my))
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return ratio.mean((1, 2, 3))


def gram(features: Tensor) -> Tensor:
    """Sum (1, x) (1, x)^T over features in float64: all of them that a distance needs."""
    x = F.pad(features.to("cpu", torch.float64), (1, 0), value=1)
    return x.T @ x


def moments(total: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean (D,) and unbiased covariance (D, D) from a sum of `gram`s."""
    n, mean = total[0, 0], total[0, 1:] / total[0, 0]
    return mean, (total[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Give |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        [Heusel et al. 2017, eq. 6].

    With S = R R^T from a symmetric eigen-decomposition, the last trace is the nuclear norm of
    R1^T R2: real, and exact for singular S, where the square root of S1 S2 breaks down.
    """

    def root(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov.double())
        keep = values > values[-1].clamp(min=0) * len(cov) * torch.finfo(torch.float64).eps
        return vectors[:, keep] * values[keep].sqrt()

    cross = torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()
    gap = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, float(gap + cov1.trace() + cov2.trace() - 2 * cross))


# ------------------------------------------------------------------------------------------------
# Published networks, each read from a local file; frames and clips are channels-last in [0, 1].


def load_network(
    metric: str, kind: str, folder: str | Path, device: Device, **options: Any
) -> nn.Module:
    """Build a torchvision model, load it strictly from `folder` or torch.hub's cache.

    Only batch counters, which old files lack, may be absent. Raises Unavailable without the file.
    """
    import torchvision

    name = Path(WEIGHTS[metric]).name
    places = [Path(folder) / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise Unavailable(f"{metric} needs {name}, which is not here", WEIGHTS[metric], places[0])
    net = torchvision.models.get_model(kind, weights=None, **options)
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    data.load_strictly(net, counters | data.load_torch(path), str(path))
    return net.eval().requires_grad_(False).to(device)


def load_lpips(folder: str | Path, device: Device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build LPIPS (AlexNet) of the lpips package from a local trunk: frames twice -> (N,)."""
    import lpips

    trunk = load_network("lpips", "alexnet", folder, "cpu").features.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision the old way
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its heads ship with it
    parts = model.net.state_dict()  # slice2.3.bias is the trunk's 3.bias
    model.net.load_state_dict({name: trunk[name.partition(".")[2]] for name in parts})
    model = model.to(device).eval().requires_grad_(False)
    return lambda x, y: model(x.movedim(-1, 1), y.movedim(-1, 1), normalize=True).flatten()


def load_t_lpips(folder: str | Path, device: Device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build t-LPIPS: real and generated clips (B, T, H, W, 3) -> (B, T - 1).

    |LPIPS(x_t, W x_{t+1}) - LPIPS(y_t, W y_{t+1})|, W warping by the real video's flow (RAFT)
    """
    net, lpips = load_network("t_lpips", "raft_large", folder, device), load_lpips(folder, device)

    def compare(real: Tensor, video: Tensor) -> Tensor:
        (B, T, H, W, _), device = real.shape, real.device
        pairs = [(x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)) for x in (real, video)]
        flow = net(*(2 * x.movedim(-1, 1) - 1 for x in pairs[0]))[-1].movedim(1, -1)
        size = torch.tensor([W, H], device=device)  # pixel p comes from p + flow
        pixel = torch.stack(torch.meshgrid(*map(torch.arange, (W, H)), indexing="xy"), -1)
        grid = 2 * (pixel.to(device) + flow) / (size - 1) - 1
        warp = functools.partial(F.grid_sample, padding_mode="border", align_corners=True)
        pairs = [(now, warp(after.movedim(-1, 1), grid).movedim(1, -1)) for now, after in pairs]
        return (lpips(*pairs[0]) - lpips(*pairs[1])).abs().view(B, T - 1)

    return compare


def load_inception(metric: str, folder: str | Path, device: Device) -> Callable[[Tensor], Tensor]:
    """Build the FID network: frames (N, H, W, 3) -> features (N, 2048).

    `fid`: TensorFlow's Inception of 2015 in the pytorch-fid layout: 1008 classes, average pools
    that do not count padding, a max pool in the last block. `fid_tv`: torchvision's Inception,
    as the paper's code. Both see bilinear 299 x 299 (without antialiasing) and 2 x - 1.
    """
    fid = metric == "fid"
    options = {"num_classes": 1008 if fid else 1000, "aux_logits": not fid, "init_weights": False}
    net = load_network(metric, "inception_v3", folder, device, **options)
    net.fc, average = nn.Identity(), functools.partial(F.avg_pool2d, count_include_pad=False)
    # What torchvision pools for `branch_pool` is replaced by the block's input, pooled as here.
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c") if fid else ():
        block, pool = net.get_submodule(f"Mixed_{name}"), F.max_pool2d if name == "7c" else average
        pool, pooled = functools.partial(pool, kernel_size=3, stride=1, padding=1), []
        block.register_forward_pre_hook(lambda _, x, to=pooled, pool=pool: to.append(pool(x[0])))
        block.branch_pool.register_forward_pre_hook(lambda _, x, of=pooled: (of.pop(),))

    def features(frames: Tensor) -> Tensor:
        x = F.interpolate(frames.movedim(-1, 1), (299, 299), mode="bilinear", align_corners=False)
        return net(2 * x - 1)

    return features


def load_fvd(metric: str, i3d: str | None, folder: str | Path, device: Device) -> Callable:
    """Build an FVD network: clips (B, T, H, W, 3), the last frame repeated up to 16 -> features.

    `fvd`: the field's I3D as TorchScript, whose code is run. `fvd_r3d`: the paper's, torchvision's
    r3d_18 at 112 px with the mean and deviation of Kinetics-400.
    """
    if metric == "fvd_r3d":
        net = load_network(metric, "r3d_18", folder, device)
        net.fc = nn.Identity()
        mean, std = torch.tensor([0.43216, 0.394666, 0.37645, 0.22803, 0.22145, 0.216989]).chunk(2)
    elif not (i3d and Path(i3d).is_file()):
        target = i3d or Path(folder) / Path(WEIGHTS["fvd"]).name
        reason = "fvd needs the TorchScript I3D; name it with --i3d_path (its code is run)"
        raise Unavailable(reason, WEIGHTS["fvd"], target)
    else:
        try:
            net = torch.jit.load(i3d, map_location=device).eval()
        except RuntimeError as error:
            raise InputError(f"{i3d}: no TorchScript archive; fetch {WEIGHTS['fvd']}") from error

    def features(x: Tensor) -> Tensor:
        x = torch.cat([x, x[:, -1:].expand(-1, max(0, 16 - x.shape[1]), -1, -1, -1)], 1)
        if metric == "fvd":
            return net(x.movedim(-1, 1) * 255, rescale=True, resize=True, return_features=True)
        y = ((x - mean.to(x)) / std.to(x)).movedim(-1, 2).flatten(0, 1)
        y = F.interpolate(y, (112, 112), mode="bilinear").unflatten(0, x.shape[:2])
        return net(y.transpose(1, 2))

    return features


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
    (B, T, H, W, _), device = clips.shape, clips.device
    N, r, R = len(points), max(2, H // 64), max(2, H // 16)  # half patch, search radius
    p, s = 2 * r + 1, 2 * R + 1
    frames = F.pad(clips.flatten(0, 1).movedim(-1, 1), [R + r] * 4, mode="replicate")
    frames = frames.movedim(1, -1).unflatten(0, (B, T))
    limit = torch.tensor([W - 1, H - 1], device=device)
    position = points.round().long().to(device).clamp(min=0).minimum(limit).expand(B, N, 2)
    away = torch.arange(-R, R + 1, device=device) ** 2

    def cut(t: int, half: int) -> Tensor:  # (B N, 3, side, side) around `position` on frame t
        offset = torch.arange(-half, half + 1, device=device) + R + r
        rows, columns = position[..., 1:, None] + offset[:, None], position[..., None, :1] + offset
        clip = torch.arange(B, device=device)[:, None, None, None]
        return frames[clip, t, rows, columns].flatten(0, 1).movedim(-1, 1)

    patch, tracks = cut(0, r), []
    for t in range(T):
        window = cut(t, R + r)
        energy = F.avg_pool2d(window.square().mean(1, keepdim=True), p, 1)[:, 0]
        cross = F.conv2d(window.flatten(0, 1)[None], patch, groups=B * N)[0] / (3 * p * p)
        error = energy - 2 * cross + patch.square().mean((1, 2, 3))[:, None, None]
        best = (error + 1e-3 * (away[:, None] + away) / R**2).flatten(1).argmin(1, keepdim=True)
        step = torch.cat([best % s - R, best // s - R], -1).view(B, N, 2)
        position = (position + step).clamp(min=0).minimum(limit)
        tracks.append((position.float(), (error.flatten(1).gather(1, best) < 0.01).view(B, N)))
    return tuple(torch.stack(x, 1) for x in zip(*tracks, strict=True))


def load_cotracker(source: str | None, device: Device) -> Callable[[Tensor, Tensor], tuple]:
    """Open CoTracker3 through torch.hub (runs its code): `source` is 'hub' or a local clone."""
    if source != "hub" and not (source and (Path(source) / "hubconf.py").is_file()):
        what = f"no hubconf.py in {source}" if source else "none named"
        reason = f"pck needs CoTracker by --cotracker, 'hub' or a clone (its code is run): {what}"
        raise Unavailable(reason, WEIGHTS["pck"], source or "co-tracker")
    place = ("facebookresearch/co-tracker", "github") if source == "hub" else (source, "local")
    try:
        net = torch.hub.load(place[0], "cotracker3_offline", source=place[1], trust_repo=True)
    except OSError as error:  # no network: its code or its weights cannot be fetched
        url = HF_URL + "facebook/cotracker3/resolve/main/scaled_offline.pth"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / "scaled_offline.pth"
        raise Unavailable(f"pck: CoTracker cannot be opened ({error})", url, cache) from error
    net = net.to(device).eval()

    def track(clips: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        queries = F.pad(points, (1, 0)).to(clips).expand(len(clips), -1, -1)  # frame 0, x, y
        tracks, visible = net(clips.movedim(-1, 2) * 255, queries=queries)
        return tracks, visible > 0.5

    return track


def pck(real: tuple, generated: tuple, scale: float) -> dict[str, Tensor]:
    """Compare point tracks: percentage of correct keypoints and what it covers, each (B, T).

    real, generated  tracks (B, T, N, 2) in pixels, visibility (B, T, N)
    scale            256 / H: thresholds are pixels of a 256-pixel frame

    Counted are points visible in both videos, `moving`: that the real clip moves by more than 5 px;
    NaN: there are none. A model can hide its errors by losing points, so read it with the coverage:
    the share visible in both videos, and in the generated one.
    """
    (track, seen), (track_g, seen_g) = real, generated
    both, error = seen & seen_g, (track - track_g).norm(dim=-1) * scale
    travel = (track - track[:, :1]).norm(dim=-1).where(seen, 0).amax(1, keepdim=True) * scale
    out = {"_coverage": both.float().mean(-1), "_coverage_generated": seen_g.float().mean(-1)}
    counts = {"": both, "_moving": both & (travel > 5)}
    for (prefix, counted), pixels in itertools.product(counts.items(), (5, 10, 20, 40)):
        correct = ((error <= pixels) & counted).sum(-1)
        out[f"{prefix}@{pixels}"] = correct / counted.sum(-1)  # 0 / 0 is NaN
    return out


# ------------------------------------------------------------------------------------------------
# Probes: small networks trained on real features, then applied, frozen, to generated ones.


def heads(width: int) -> int:
    """Take eight heads, as the paper; fewer where they would have less than 32 channels each."""
    return most_heads(width, min(8, max(1, width // 32)))


class Attention(nn.Module):
    """Attend with QK-norm: x (..., L, width) to itself or to seen (..., M, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.norm, head = nn.RMSNorm(width), width // heads(width)
        self.q_norm, self.k_norm = nn.RMSNorm(head), nn.RMSNorm(head)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        q, *kv = self.q(y), *self.kv(y if seen is None else seen).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (heads(z.shape[-1]), -1)).transpose(-2, -3) for z in (q, *kv))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return x + self.out(y.transpose(-2, -3).flatten(-2))


class FactoredBlock(nn.Module):
    """Attend inside a frame, along time, to the instruction; then SwiGLU. x (B, T, N, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.space, self.time, self.words = (Attention(width) for _ in range(3))
        self.norm, hidden = nn.RMSNorm(width), 8 * width // 3
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.out = nn.Sequential(nn.Linear(hidden, width), nn.Dropout(0.1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.space(x)  # the N cells of each of B T frames
        x = self.time(x.transpose(1, 2)).transpose(1, 2)  # the T frames of each of B N cells
        x = self.words(x.flatten(1, 2), text).view_as(x)  # the instruction's L tokens
        y = self.norm(x)
        return x + self.out(F.silu(self.gate(y)) * self.value(y))


class Probe(nn.Module):
    """Read off features which actions lie between frames (app. B.6), or whether the task succeeded.

    z     (B, T, N, C)   features of N cells; linear, temporal and progress average them
    text  (B, L, E)      of `text`: the instruction's tokens from a frozen SigLIP 2
    ->    (B, T - 1, 7)  of `idm`, the actions between the frames; else (B, T) a logit a frame
    """

    def __init__(self, kind: str, shape: Sequence[int], width: int, text_dim: int = 1):
        super().__init__()
        (T, N, C), self.kind, self.k = shape, kind, (shape[0] - 1) * (kind == "idm")
        self.averaged, C = kind in ("linear", "temporal", "progress"), 2 * C if self.k else C
        self.register_buffer("scale", torch.tensor([[0.0], [1.0]]).expand(2, C).clone())
        self.project = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, width))
        sizes = (T, 1), (1 if self.averaged else N,), (self.k,)
        rows = [nn.Parameter(0.5 * torch.randn(*size, width)) for size in sizes]  # from 0.02, the
        # paper's, nothing is learned in hundreds of steps
        self.time, self.place, self.queries = rows
        if kind == "text":
            reader = nn.Linear(text_dim, width), nn.RMSNorm(width), nn.Dropout(0.1)
            self.read = nn.Sequential(*reader)
            self.blocks = nn.ModuleList(FactoredBlock(width) for _ in range(DEPTHS[kind]))
        elif DEPTHS[kind]:
            options = {"activation": "gelu", "batch_first": True, "norm_first": True}
            layer = nn.TransformerEncoderLayer(width, heads(width), 4 * width, 0.1, **options)
            layer.self_attn.dropout = 0.0  # on attention weights it would cost ten times the time
            self.blocks = nn.TransformerEncoder(layer, DEPTHS[kind], enable_nested_tensor=False)
        deep = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, 7)] if self.k else []
        self.head = nn.Sequential(nn.LayerNorm(width), *(deep or [nn.Linear(width, 1)]))

    def prepare(self, z: Tensor) -> Tensor:
        """Average the cells, or put beside each what the last action changed in it."""
        z = z.float().mean(2, keepdim=True) if self.averaged else z.float()
        return torch.cat([z, F.pad(z.diff(dim=1), (0, 0, 0, 0, 1, 0))], -1) if self.k else z

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        z = (self.prepare(z) - self.scale[0]) / self.scale[1]
        x = self.project(z) + self.time + self.place  # (B, T, N, width)
        if self.kind == "text":
            text = self.read(text)
            for block in self.blocks:
                x = block(x, text)
        elif DEPTHS[self.kind]:
            x = torch.cat([self.queries.expand(len(z), -1, -1), x.flatten(1, 2)], 1)
            x = self.blocks(x)  # (B, k + T N, width)
            x = x[:, : self.k] if self.k else x.unflatten(1, z.shape[1:3])
        return self.head(x) if self.k else self.head(x).mean((2, 3))

    def judge(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """Score clips (B,): the mean logit of the frames, or of `progress` the last frame's."""
        return self(z, text)[:, -1] if self.kind == "progress" else self(z, text).mean(1)

    def loss(self, z: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        """Take smooth L1 of actions, cross-entropy of success; `progress`: t / T or, failed, 0."""
        if self.kind == "idm":
            return F.smooth_l1_loss(self(z), y)
        if self.kind == "progress":
            rising = torch.linspace(0, 1, z.shape[1], device=z.device)
            return F.mse_loss(self(z).sigmoid(), y[:, None] * rising)
        return F.binary_cross_entropy_with_logits(self.judge(z, text), y)


def train_probe(
    net: Probe, read: Callable, y: Tensor, held: np.ndarray, steps: int, lr: float
) -> tuple[float, float]:
    """Train on the samples that are not held out; keep the best of ten states, give its score.

    read(p)  features (B, T, cells, C) of the samples p and their text (B, L, E) or None, on the
             device of the network; with the text of another sample, none is a success
    y        (samples, ...)   actions, or 1 for a success
    ->       on the held samples, minus the loss of `idm`, else balanced accuracy, then AUC
    """
    random, learn = np.random.default_rng(0), np.flatnonzero(~held)
    seen = net.prepare(read(random.choice(learn, 64))[0]).flatten(0, 2)
    net.scale[:] = torch.stack([seen.mean(0), seen.std(0) + 1e-3 * seen.std()])
    optimizer, states = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-4), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    parts = np.array_split(np.flatnonzero(held), math.ceil(held.sum() / 32))
    for step in tqdm(range(1, steps + 1), net.kind, leave=False, disable=None):
        p = random.choice(learn, 32)
        z, text = read(p)
        with torch.enable_grad():
            loss = net.loss(z, y[p], text)
            if text is not None:
                other = text.roll(1, 0)
                same = (text == other).flatten(1).all(1)
                loss = loss + net.loss(z, y[p] * same, other)
            loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % math.ceil(steps / 10) == 0 or step == steps:
            net.eval()
            if net.kind == "idm":
                score = -sum(len(p) * net.loss(read(p)[0], y[p]).item() for p in parts), 0
            else:
                samples = [torch.stack([y[p], net.judge(*read(p))], 1) for p in parts]
                samples = torch.cat(samples).cpu().numpy()
                score = balanced_accuracy(samples), auc(samples)
            states.append((score, step, copy.deepcopy(net.state_dict())))
            net.train()
    score, _, state = max(states)
    net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return score


def load_text_encoder(path: str | None, device: Device) -> Callable[[Sequence[str]], Tensor]:
    """Open SigLIP 2's text tower from a local folder: B sentences -> tokens (B, 64, E)."""
    if path is None or not Path(path).is_dir():
        reason = "the text-conditioned probe needs SigLIP 2: name its folder with --text_weights"
        raise Unavailable(reason, WEIGHTS["text"], path or "siglip2-so400m-patch14-224")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tower = AutoModel.from_pretrained(path, local_files_only=True).text_model.eval().to(device)
    options = {"padding": "max_length", "max_length": 64, "truncation": True}

    @functools.lru_cache(maxsize=4096)
    def tokens(sentence: str) -> Tensor:
        ids = tokenizer([sentence.lower()], return_tensors="pt", **options)["input_ids"]
        return tower(input_ids=ids.to(device)).last_hidden_state.float()

    return lambda sentences: torch.cat([tokens(s) for s in sentences])


# ------------------------------------------------------------------------------------------------
# Pictures, drawn with Pillow.


def draw_curves(path: Path, rows: dict[str, dict]) -> None:
    """Write a PNG of the pixel metrics per step, small plots two a row under one legend."""
    shown = [x for x in rows.items() if re.fullmatch(CURVES, x[0]) and x[1]["value"] is not None]
    if not shown:
        return
    font, grey = ImageFont.load_default(14), "#444444"
    colours = dict(zip(KINDS, ("#1f5fa8", "#2f8f4e", "#8a8a8a", "#c8452d"), strict=True))
    image = Image.new("RGB", (1080, 50 + 290 * math.ceil(len(shown) / 2)), "white")
    pen = ImageDraw.Draw(image)
    for i, (kind, colour) in enumerate(colours.items()):
        pen.text((70 + 150 * i, 25), kind, colour, font, "lm", stroke_width=0.4)
    for i, (name, row) in enumerate(shown):
        values = np.array([row["per_step"][kind] for kind in KINDS], float)  # None becomes NaN
        values[values > 99] = np.nan  # the 100 dB of an exact decoder would flatten the others
        low, high = np.nanmin(values), np.nanmax(values)
        x, y = i % 2 * 540 + 70, i // 2 * 290 + 90
        xs = np.linspace(x, x + 450, values.shape[1])
        pen.text((x, y - 24), f"{name}, {row['better']} is better", "black", font)
        pen.text((x + 225, y + 222), "predicted frame", grey, font, "ma")
        for share in np.linspace(0, 1, 5):
            pen.line([x, y + 200 * share, x + 450, y + 200 * share], "#dddddd")
            tick = f"{high - share * (high - low):.4g}"
            pen.text((x - 8, y + 200 * share), tick, grey, font, "rm")
        for step in range(0, len(xs), math.ceil(len(xs) / 16)):
            pen.text((xs[step], y + 206), str(step + 1), grey, font, "ma")
        heights = y + 200 * (high - values) / max(high - low, 1e-9)
        for colour, ys in zip(colours.values(), heights, strict=True):
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if y == y]
            pen.line(points, colour, 3, joint="curve")
            for point in points:  # of one step there is no line
                pen.circle(point, 3, colour)
    data.write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


def draw_tables(path: Path, tables: list[list[list[str]]]) -> None:
    """Write tables of Markdown cells (** is bold) as a PNG; the first row of each is its head."""
    font, y = ImageFont.load_default(16), 16
    columns = [[24 + max(map(font.getlength, c)) for c in zip(*t, strict=True)] for t in tables]
    size = int(max(map(sum, columns))), 32 * sum(len(table) + 1 for table in tables)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for table, widths in zip(tables, columns, strict=True):
        pen.rectangle([0, y, sum(widths), y + 31], "#e4eaf2")
        lefts = np.cumsum([12, *widths[:-1]])
        for row in table:
            for cell, left in zip(row, lefts, strict=True):
                bold = 0.4 * cell.startswith("**")
                pen.text((left, y + 16), cell.strip("*"), "black", font, "lm", stroke_width=bold)
            y += 32
        y += 32
    data.write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


# ------------------------------------------------------------------------------------------------
# Results: rows of numbers, what they say in words, and the file they are kept in.


def to_json(x: Any) -> Any:
    """Turn results into JSON values: lists for tensors, None for NaN."""
    return json.loads(json.dumps(x, default=lambda x: x.tolist()), parse_constant=lambda _: None)


def fmt(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def make_row(name: str, statistic: str, kinds: dict[str, Tensor]) -> dict:
    """Make a result of samples of clips: the model's value beside those of the other kinds.

    mean     (N, steps)     numbers of the predicted frames   share    (N, trials)  hits, 1 or 0
    l2       (N, k, D)      errors of k actions               pearson  (N, n, 2, D) read and true
    frechet  (processes, D + 1, D + 1)   sums of `gram`       others   (N, 2)  label and score
    """
    lower = statistic in ("l2", "frechet") or re.match(LOWER, name)
    row, model = {"better": "lower" if lower else "higher"}, kinds["model"]
    if statistic == "frechet":
        real, *grams = (kinds[kind].sum(0) for kind in ("real", *KINDS))
        if real[0, 0] < 2:
            return row | {"value": None, "reason": "one sample has no covariance; give more clips"}
        value, *beside = (frechet_distance(*moments(real), *moments(x)) for x in grams)
        n, dim = int(real[0, 0]), len(real) - 1
        if n <= 2 * dim:
            row["note"] = f"{n} samples of {dim} numbers: biased up, compare at equal N"
        row["beside"] = dict(zip(KINDS[1:], beside, strict=True))
        return row | {"value": value, "ci": None, "n": n}  # no interval: resampling biases
    if statistic == "mean":
        row["per_step"] = {kind: s.nanmean(0) for kind, s in kinds.items()}
        kinds = {kind: s.nanmean(1) for kind, s in kinds.items()}
    elif statistic == "share":
        row["note"] = f"{model.nansum():.0f} of {model.isfinite().sum()}"
    elif statistic == "l2":
        row["per_dim"] = {kind: s.abs().mean((0, 1)) for kind, s in kinds.items()}
    elif statistic == "pearson":
        pairs = {kind: correlation(s.numpy()) for kind, s in kinds.items()}
        row["per_dim"] = {kind: {"r": r, "r2": r2} for kind, (r, r2) in pairs.items()}
    samples = kinds.pop("model")
    value, interval, n = bootstrap(samples, statistic)
    row |= {"value": value, "ci": interval, "n": n, "statistic": statistic, "samples": samples}
    row["beside"] = {kind: bootstrap(s, statistic)[0] for kind, s in kinds.items()}
    row["minus"] = {kind: bootstrap(samples, statistic, s)[:2] for kind, s in kinds.items()}
    return row


def format_row(name: str, row: dict) -> str:
    """Write a result as a line: direction, value, interval, N and what stands beside it."""
    if row["value"] is None:
        place = f"\n{'':38} fetch {row['url']}\n{'':38} to {row['path']}" if row.get("url") else ""
        return f"{name:38} null: {row.get('reason') or 'no clip has a value'}{place}"
    interval = "[{}, {}]".format(*map(fmt, row["ci"])) if row["ci"] else ""
    beside = [f"{kind} {fmt(x)}" for kind, x in row.get("beside", {}).items()]
    line = f"{name:38} {row['better']:6} {fmt(row['value']):>8} {interval:19} {row['n']:5}"
    return "  ".join([line, *beside, row.get("note", "")])


def conclusions(metrics: dict[str, dict]) -> Iterator[str]:
    """Say whether the model listens to its actions and whether it is better than a copy."""
    seen = ", as far as these clips can tell"
    for name, row in metrics.items():
        if row.get("n") == 1:  # nothing is sure
            continue
        sign, value = (1 if row.get("better") == "higher" else -1), fmt(row["value"])
        beside = {kind: fmt(x) for kind, x in row.get("beside", {}).items()}
        gaps = {kind: ci or [0] for kind, (_, ci) in row.get("minus", {}).items()}
        above = {kind: min(sign * x for x in ci) > 0 for kind, ci in gaps.items()}  # surely better
        if name in ("psnr", "ssim", "lpips") and above:
            said = "listens to its actions" if above["shuffled"] else f"ignores its actions{seen}"
            yield f"The model {said}: {name} is {value}, {beside['shuffled']} with another clip's."
            if not above["copy"]:
                yield f"By {name} it is no better than repeating the last known frame{seen}."
        if "no signal" in above:
            none = f"finds none{seen}, as if the model ignored its actions"
            verb, random = "finds actions" if above["no signal"] else none, beside["no signal"]
            yield f"{name} {verb}: error {value}, {random} when costs are random."
        if name == "counterfactual_sides" and "note" in row:
            yield f"Opposite actions move the gripper to their own sides: {row['note']} pairs."


def read_results(path: Path) -> dict:
    """Read a results.json: finished metrics, their rows, config and versions."""
    with data.reading(path, "remove it and measure again", *data.PARSE_ERRORS):
        stored = json.loads(path.read_text())
        metrics = {name: {**row, "value": row["value"]} for name, row in stored["metrics"].items()}
        kinds = {"config": dict, "versions": dict, "finished": list}
        return {"metrics": metrics, **{key: kind(stored[key]) for key, kind in kinds.items()}}


class Results:
    """Keep results.json, and a note of the metric in progress, so that a kill costs little.

    samples  {(statistic, row, kind): {clip: sample}}   of this process and the metric in progress
    """

    def __init__(self, folder: Path, args: Args, proc: data.Processes, **subject: str):
        self.proc, self.args, self.path = proc, vars(args), folder / "results.json"
        free = "metrics compare strict output_dir batch_size device dataset_dir policy weights_dir "
        free += "i3d_path cotracker text_weights encoder_weights"
        config = {k: v for k, v in self.args.items() if k not in free.split()} | subject
        here = {str(d.name).lower(): d.version for d in importlib.metadata.distributions()}
        versions = {name: here[name] for name in PACKAGES.split() if name in here}
        new = {"finished": [], "metrics": {}, "config": to_json(config), "versions": versions}
        self.all = read_results(self.path) if self.path.is_file() else new
        if changed := [k for k, v in new["config"].items() if self.all["config"].get(k) != v]:
            other = f"was measured with other {', '.join(changed)}"
            raise InputError(f"{self.path}: {other}; give another --output_dir, or remove the file")
        proc.barrier()  # nobody writes before everybody has read
        if proc.rank == 0:
            names = self.path.name, "samples.gif", "horizon.png", "unfinished_*"
            for path in itertools.chain(*(folder.glob(f".{name}.*.tmp") for name in names)):
                path.unlink(missing_ok=True)  # of a run that was killed

    def resume_metric(self, name: str) -> None:
        """Start on a metric, without samples or behind those that a killed run has noted."""
        self.samples, self.done, self.noted = defaultdict(dict), {}, time.monotonic()
        free = "metrics strict output_dir device".split()
        what = [name, *self.proc[:2], self.all["config"], self.all["versions"]]
        what += [(key, value) for key, value in self.args.items() if key not in free]
        what = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        self.note_path = self.path.with_name(f"unfinished_{name.replace(' ', '-')}_{what}.pt")
        if self.note_path.is_file():
            try:
                done, samples = data.load_torch(self.note_path)
                self.done, self.samples = dict(done), defaultdict(dict, samples)
            except (InputError, TypeError, ValueError) as error:
                print(f"warning: {error}; {name} begins anew")

    def shard(self, items: Sequence, label: str) -> Iterator:
        """Walk through this process's share of the items that are not done; note what is."""
        rank, world = self.proc[:2]
        items, done = items[rank::world], self.done.get(label, 0)
        if done:
            print(f"{label}: goes on after {done} of {len(items)}")
        for item in tqdm(items[done:], label, disable=rank > 0 or None, leave=False):
            yield item
            self.done[label] = done = done + 1
            if time.monotonic() > self.noted + NOTE_SECONDS:
                state = self.done, dict(self.samples)
                try:
                    data.write_atomic(self.note_path, lambda path, x=state: torch.save(x, path))
                except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
                    print(f"warning: {self.note_path} not written ({error}); the work goes on")
                self.noted = time.monotonic()

    def rows(self) -> dict[str, dict]:
        """Make results of everybody's samples."""
        mine = {key: {i: s.cpu() for i, s in clips.items()} for key, clips in self.samples.items()}
        joined, out = defaultdict(lambda: defaultdict(dict)), {}
        for part in self.proc.all_gather(mine):
            for (statistic, name, kind), clips in part.items():
                joined[statistic, name][kind] |= clips
        for (statistic, name), kinds in joined.items():
            kinds = {k: torch.stack([c[i] for i in sorted(c)]) for k, c in kinds.items()}
            out[name] = make_row(name, statistic, kinds)
        return out

    def label(self, name: str) -> str:
        """Name a metric as it counts as finished: with the function or file that it was given."""
        given = self.args.get(METRIC_FLAG.get(name))
        return f"{name} by {given}" if given else name

    def report(self, rows: dict[str, dict], finished: Sequence[str] = ()) -> None:
        """Print rows of the table and put them on disk."""
        others = [x for x in self.all["finished"] if x.partition(" by ")[0] not in finished]
        self.all["finished"] = others + [*map(self.label, finished)]
        self.all["metrics"] |= (rows := to_json(rows))
        if self.proc.rank == 0:
            data.write_atomic(self.path, json.dumps(self.all, indent=1).encode())
            for item in rows.items():
                print(format_row(*item))
        if finished:  # and what was noted with other flags
            for path in self.path.parent.glob(f"unfinished_{'-'.join(finished)}_{'?' * 16}.pt"):
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# The model and its clips, measured.


def open_model(args: Args, device: Device) -> WorldModel:
    """Open `--checkpoint_path`, or put the parts of a released model together."""
    if args.model_preset is None:
        if args.checkpoint_path is None:
            raise InputError("give --checkpoint_path, --model_preset or --compare")
        model = WorldModel(args.checkpoint_path, device, encoder_weights=args.encoder_weights)
        where, trained = args.checkpoint_path, model.objective.to_dict()["name"]
        if args.objective not in (None, trained):
            raise InputError(f"{where}: --objective is its own, {trained}; leave it out")
        return model
    size, _, name = args.model_preset.removeprefix("DiT-").partition("_")
    if size not in ("S", "B", "L") or name not in PRESETS:
        known = ", ".join(f"DiT-{{S,B,L}}_{name}" for name in PRESETS)
        raise InputError(f"--model_preset {args.model_preset}: no such model; known are {known}")
    kind, folder = PRESETS[name]
    pair = [f"DiT-{size}_D96.pt", f"adapter_{folder}_image_96.pt"]
    files = pair if name.endswith("_D96") else [f"DiT-{size}.pt"]
    paths = [Path(args.weights_dir) / "semantic-wm" / folder / file for file in files]
    paths[0] = Path(args.checkpoint_path or paths[0])
    for path, file in zip(paths, files, strict=True):
        if not path.is_file():
            url = f"{HF_URL}Nilaksh404/semantic-wm/resolve/main/{folder}/{file}"
            raise Unavailable(f"{args.model_preset}: {path} does not exist", url, path)
    space = build_latent_space(EncoderConfig(kind, args.encoder_weights), *map(str, paths[1:]))
    objective = args.objective or "flow_matching"
    print(f"{paths[0]}: names no objective; taken as {objective} (choose with --objective)")
    shift = default_shift(kind, 256, space.latent_dim)
    parts = load_dit(paths[0], max_frames=10), OBJECTIVES[objective](shift=shift), space
    return WorldModel((*parts, RELEASED), device)


class Evaluation:
    """Measure one model on one split; clips are counted by their place in `infos`.

    The methods named after metrics are generators of two steps: they open what they need, so that
    nothing is found to be missing hours later; then they measure and yield rows of results.
    """

    def __init__(self, args: Args, proc: data.Processes):
        self.device, self.model = proc.device, open_model(args, proc.device)
        self.space, stored = self.model.space, self.model.clip_format
        self.n = n = args.num_context or stored["num_history"]
        window = self.model.dit.config.max_frames * self.space.temporal_stride
        steps = args.num_frames or max(1, window - n)
        if n % (s := self.space.temporal_stride) or steps % s:
            raise InputError(f"latents hold {s} frames: give num_context, num_frames in multiples")
        own = self.model.objective.to_dict()["name"]
        self.args = args = dataclasses.replace(args, num_context=n, num_frames=steps, objective=own)
        self.horizons = [int(k) for k in args.horizons.split(",")]
        if max(self.horizons) > steps:
            raise InputError(f"--horizons {args.horizons}: only {steps} frames are predicted")
        cut = {key: stored[key] for key in ("image_size", "stride", "action_merge")}
        cut |= {"num_frames": n + steps, "num_history": n, "views": self.space.num_views}
        self.config = data.DataConfig(args.dataset_dir, args.subset_names, seed=args.seed, **cut)
        clips = data.EpisodeDataset(self.config, args.split)
        where = f"{args.dataset_dir}, {args.subset_names}, {args.split}"
        if clips.action_mapping != stored["action_mapping"]:
            mapped = f"actions are mapped as {clips.action_mapping!r}, in training they were"
            raise InputError(f"{where}: {mapped} {stored['action_mapping']!r}; convert them so")
        self.infos = [clips.info(i) for i in data.even_indices(len(clips), args.num_episodes)]
        self.windows = data.even_indices(len(self.infos), args.windows)
        self.cem = {"population": args.population, "elites": args.population // 8}
        self.actions = torch.cat([self.load_actions(info) for info in self.infos])  # (N, T, A)
        moved = self.actions.flatten(0, 1).std(0)
        self.dims = [d for d in SEARCHED if moved[d] > 0]  # the others never change
        if not self.dims:
            raise InputError(f"{where}: all actions are equal; give episodes that differ in them")
        weights = hashlib.sha256(self.space.fingerprint.encode())
        for x in self.model.dit.state_dict().values():
            weights.update(x.cpu().numpy().tobytes())
        names = [(*info["path"].parts[-3:], *info["times"].tolist()) for info in self.infos]
        digest = hashlib.sha256(json.dumps(names).encode())
        subject = {"weights": weights.hexdigest()[:16], "clips": digest.hexdigest()[:16]}
        self.cache = clips  # names and reads cached latents from here on, where there are any
        self.cache.fingerprint = self.space.encoder.fingerprint
        self.folder = Path(args.output_dir or Path(args.checkpoint_path or "outputs/_").parent)
        self.out = Results(self.folder, args, proc, **subject)

    @contextlib.contextmanager
    def needing(self, name: str, fault: type = Unavailable) -> Iterator[None]:
        """Open what a result needs; where that cannot be, report why or, with --strict, stop."""
        try:
            yield
            if "reason" in self.out.all["metrics"].get(name, ()):  # of an earlier run
                del self.out.all["metrics"][name]
        except fault as error:
            if self.args.strict:
                raise
            self.out.report({name: {"value": None, "reason": str(error), **vars(error)}})

    def open_clips(self, config: data.DataConfig, split: str) -> data.EpisodeDataset:
        """Open the clips that a metric needs besides those that all are measured on."""
        try:
            return data.EpisodeDataset(config, split)
        except InputError as error:
            raise Unavailable(str(error)) from error

    def load_actions(self, info: dict) -> Tensor:
        """Read the actions (1, T, A) of a clip."""
        actions = data.Episode(info["path"]).actions
        actions = data.merge_actions(actions, info["times"], self.config.action_merge)
        return torch.from_numpy(actions)[None].to(self.device)

    def load_frames(self, info: dict, places: Any = slice(None)) -> Tensor:
        """Read the frames (1, [V,] T, H, W, 3) of a clip, or those at some places in it."""
        episode, times = data.Episode(info["path"]), info["times"][places]
        x = data.to_floats(episode.frames(times, self.config.views, self.config.image_size))
        return (x[None] if len(x) > 1 else x).to(self.device)  # of one view, V serves as the 1

    def batches(self, label: str) -> Iterator[tuple[Sequence, Tensor, Tensor, Tensor]]:
        """Yield this process's batches: clips, their frames, actions and another clip's actions.

        A lone clip's own stand for these, reversed in time.
        """
        (N, n), B = (len(self.infos), self.n), self.args.batch_size
        other = self.actions.roll(-(N // 2), 0) if N > 1 else self.actions.flip(1)
        other[:, : n - 1] = self.actions[:, : n - 1]  # the past stays as it was
        for clips in self.out.shard([[*range(N)[i : i + B]] for i in range(0, N, B)], label):
            frames = torch.cat([self.load_frames(self.infos[i]) for i in clips])
            yield clips, frames, self.actions[clips], other[clips]

    def dream(self, z: Tensor, actions: Tensor, seeds: Sequence[int]) -> Tensor:
        """Roll latents out from their first frames; the seed of a clip fixes its noise.

        z (B, at least n, h, w, C), actions (B, T, A)  ->  (B, T', h, w, C)
        """
        n, model = self.n // self.space.temporal_stride, self.model
        draws = [self.args.seed + seed for seed in seeds]
        out = dream((model.dit, model.objective, self.space), z, actions, n, draws)
        if not out.isfinite().all():
            raise InputError(f"clips {[*seeds]}: {DIVERGED}")
        return out

    def real_features(self, frames: Tensor) -> Tensor:
        """Give the encoder's features of real frames: (B, [V,] T, H, W, 3) -> (B, T, h, V w, C)."""
        x = self.space.encoder.encode(frames)
        return merge_views(x) if self.space.num_views > 1 else x

    def known_features(self, info: dict, places: Any = slice(None)) -> Tensor:
        """Give those of a clip's frames (1, T, h, V w, C), from the latent cache if they are there.

        train_adapter.py --cache_latents writes it, and train_dit.py for a model without adapter.
        """
        path = info["path"]
        if not (self.cache.latent_folder(path.parent) / path.name).exists():
            return self.real_features(self.load_frames(info, places))
        x = self.cache.read_latents(data.Episode(path), info["times"][places]).to(self.device)
        return merge_views(x[None]) if len(x) > 1 else x

    def dreamed_features(self, z: Tensor) -> Tensor:
        """Give the encoder's features that dreamed latents stand for: (B, T, h, V w, C)."""
        x = self.space.unscale(z)
        x = self.space.adapter.decode(x).float() if self.space.adapter else x
        return merge_views(x) if self.space.num_views > 1 else x

    def encode_all(self, infos: Sequence[dict], encode: Callable, label: str) -> Tensor:
        """Give the features (N, ...) of clips, encode(info) (1, ...) of each, in half precision.

        Every process encodes its share and gets all, in main memory.
        """
        (rank, world), first = self.out.proc[:2], encode(infos[0])[0]
        x = torch.zeros(len(infos), *first.shape, dtype=torch.half)
        for j in tqdm(range(rank, len(infos), world), label, disable=rank > 0 or None, leave=False):
            x[j] = encode(infos[j])[0]
        return self.out.proc.all_reduce(x).cpu()

    # -- pixels

    def videos(
        self, clips: Sequence[int], real: Tensor, actions: Tensor, other: Tensor
    ) -> dict[str, Tensor]:
        """Give the real clips and four to hold against them, views as clips: (B V, T, H, W, 3)."""
        space, n, z = self.space, self.n, self.space.encode(real)
        dreams = (self.dream(z, beside, clips) for beside in (actions, other))
        known = n // space.temporal_stride
        new, shuffled = (space.decode_new(x, known).flatten(0, -5) for x in dreams)
        ceiling, real = space.decode(z).flatten(0, -5), real.flatten(0, -5)
        known, still = real[:, :n], real[:, n - 1 : n].expand_as(new)
        futures = {"model": new, "shuffled": shuffled, "copy": still}
        videos = {"real": real, "ceiling": ceiling}
        videos |= {kind: torch.cat([known, x], 1) for kind, x in futures.items()}
        for kind, video in videos.items():
            if not video.isfinite().all():
                raise InputError(f"clips {[*clips]}: pixels of the {kind} are NaN or infinite")
        return videos

    def open_metric(self, name: str) -> Callable:
        """Open a metric: (real, video) -> {row: (B V, steps)}, of a Frechet distance features."""
        args, n, where = self.args, self.n, (self.args.weights_dir, self.device)
        if not self.space.has_decoder:
            raise Unavailable(f"{name}: the model has no decoder; make one with train_adapter.py")
        if name in ("fvd", "fvd_r3d"):
            features = load_fvd(name, args.i3d_path, *where)
            return lambda real, video: features(video)
        if name in ("fid", "fid_tv"):
            features = load_inception(name, *where)
            return lambda real, video: features(video[:, n:].flatten(0, 1))
        if name in ("pck", "pck_patch"):
            track = load_cotracker(args.cotracker, self.device) if name == "pck" else track_patches
            points = grid_points(*2 * [self.config.image_size])
            track = functools.lru_cache(2)(functools.partial(track, points=points))

            def follow(*clips: Tensor) -> dict[str, Tensor]:
                rows = pck(*map(track, clips), 256 / self.config.image_size)
                return {name + row: values[:, n:] for row, values in rows.items()}

            return follow
        if name == "t_lpips":
            if self.config.image_size % 8 or self.config.image_size < 128:
                raise Unavailable("t_lpips: RAFT needs frames of 128 pixels or more, in eights")
            change = load_t_lpips(*where)
            return lambda real, video: {name: change(real[:, n - 1 :], video[:, n - 1 :])}
        score = load_lpips(*where) if name == "lpips" else {"psnr": psnr, "ssim": ssim}[name]

        def by_frame(*clips: Tensor) -> dict[str, Tensor]:
            values = score(*(x[:, n:].flatten(0, 1) for x in clips))
            return {name: values.view(len(clips[0]), -1)}

        return by_frame

    def pixels(self, nets: dict[str, Callable]) -> Iterator[dict]:
        """Measure model, ceiling, copy and shuffled actions against the real clips in one pass."""
        samples, rank = self.out.samples, self.out.proc.rank
        for clips, *batch in self.batches("pixels"):
            videos = self.videos(clips, *batch)
            real, new = videos["real"], videos["model"]
            if clips[0] == 0:
                picture = torch.cat([*torch.cat([real, new, (new - real).abs()], 3)[:4]], 1)
                data.write_gif(self.folder / "samples.gif", picture, self.model.clip_format["fps"])
            for name, (kind, video) in itertools.product(nets, videos.items()):
                if name in DISTANCES:
                    sums = samples["frechet", name, kind]
                    sums[rank] = sums.get(rank, 0) + gram(nets[name](real, video))
                elif kind != "real":
                    for row, values in nets[name](real, video).items():
                        values = values.double().unflatten(0, (len(clips), -1)).nanmean(1)
                        samples["mean", row, kind] |= zip(clips, values, strict=True)
        yield self.out.rows()

    # -- control

    def controllability(self) -> Iterator[dict]:
        """Search the actions that lead to the recorded future; error: L2, averaged over steps.

        The mean starts at the true actions (the paper's way; it flatters everybody) or at zero;
        beside each stands the same search on random costs.
        """
        methods, searches, starts = self.args.searches.split(","), {}, ("", "_zero")
        z = self.space.encode(self.load_frames(self.infos[0]))[0]
        for k, method, start in itertools.product(self.horizons, methods, starts):
            row, dims = f"{method}_k{k}{start}", self.dims[: 3 if method == "grid" else None]
            how = method, k, start != "_zero", dims
            with self.needing(row, InputError):  # too many points, too long for the window
                self.search(0, z, how, ["no signal"])
                searches[row] = how
        yield
        samples = self.out.samples
        for i in self.out.shard(self.windows, "search"):
            z = self.space.encode(self.load_frames(self.infos[i]))[0]
            for row, how in searches.items():
                for kind, error in self.search(i, z, how).items():
                    samples["l2", row, kind][i] = error[:, how[-1]]
                    samples["l2", f"{row}_xyz", kind][i] = error[:, :3]
        yield self.out.rows()

    def search(
        self, i: int, z: Tensor, how: tuple, kinds: Sequence[str] = ("model", "no signal")
    ) -> dict[str, Tensor]:
        """Search the actions of window i: {kind of costs: errors (k, A)}.

        how  (method, k, whether the search starts at the true actions, dims that it searches)

        Without signal, costs are random; to a gradient, so is their one slope. It stands in for a
        model whose costs have none: the search would stay at its start, as if that were found.
        """
        (method, k, truth, dims), n, actions = how, self.n, self.actions[i]
        random = torch.Generator().manual_seed(self.args.seed + i)
        noise = torch.randn((k, *z.shape[1:]), generator=random).to(z.device)
        true, last = actions[n - 1 : n - 1 + k], actions[n - 1 + k]
        start = true.clone()
        if not truth:
            start[:, dims] = 0
        known = self.model.dit, self.model.objective, z[:n], actions[: n - 1]
        options = {} if method in DETERMINISTIC else self.cem | {"generator": random}
        costs = {"model": candidate_cost(*known, z[n : n + k], noise, last)}
        costs["no signal"] = lambda a: torch.randn(a.shape, generator=random).to(a).sum((1, 2))
        if method == "gradient":
            slope = torch.randn(start.shape, generator=random).to(start)
            costs["no signal"] = lambda actions: (actions * slope).sum((1, 2))
            moved = start.clone()
            moved[:, dims] += 1
            if not costs["model"](torch.stack((start, moved))).diff():
                costs["model"] = costs["no signal"]
        found = {x: PLANNERS[method](costs[x], start, dims, **options)[0] for x in kinds}
        return {kind: actions - true for kind, actions in found.items()}

    def idm(self) -> Iterator[dict]:
        """Train the inverse-dynamics probe per horizon and read the actions off both futures."""
        clips = self.open_clips(self.config, "train")
        if len(clips) < 2:
            raise Unavailable("idm: the split 'train' has one usable episode; convert more")
        yield
        n, (*bank, cut) = self.n, self.bank(clips)
        nets = {k: self.fit_idm(k, *bank) for k in self.horizons}
        for clips, real, actions, _ in self.batches("idm"):
            dreamed = self.dreamed_features(self.dream(self.space.encode(real), actions, clips))
            features = {"model": dreamed, "real": self.real_features(real)}
            features = {kind: z.flatten(2, 3) for kind, z in features.items()}
            for (k, net), (kind, z) in itertools.product(nets.items(), features.items()):
                starts = range(n - 1, self.config.num_frames - k, k)
                true = torch.cat([actions[:, s : s + k, :6] for s in starts], 1)
                read = torch.cat([net(z[:, s : s + k + 1])[..., :6] for s in starts], 1)
                pairs = zip(clips, torch.stack([read, true], 2), strict=True)
                self.out.samples["pearson", f"idm_r_k{k}", kind] |= pairs
        note = f"learned from {len(bank[0])} clips" + f", all that {BANK >> 20} MiB hold" * cut
        yield {k: row | {"note": note} for k, row in self.out.rows().items()}

    def bank(self, clips: data.EpisodeDataset) -> tuple[Tensor, Tensor, np.ndarray, bool]:
        """Encode clips of the train split, once for all horizons.

        features  (N, T, cells, C)   half precision in main memory; eight windows of the longest
                                     horizon a step, no more than BANK bytes (800 of V-JEPA)
        actions   (N, T, 7)
        held      (N,)               of every tenth episode, which chooses the weights
        cut       whether more clips were wanted
        """

        def encode(info: dict) -> Tensor:
            return self.known_features(info).flatten(2, 3)

        shape = encode(clips.info(0)).shape[1:]
        most = math.ceil(8 * self.args.max_steps / (shape[0] - max(self.horizons)))
        count = max(2, min(most, BANK // (2 * math.prod(shape))))
        keys = data.ClipSampler(clips, count).batch(0)
        infos = [clips.info(key) for key in keys]
        actions = torch.cat([self.load_actions(info)[..., :7] for info in infos])
        _, episode = np.unique([i for _, i in keys], return_inverse=True)
        bank = self.encode_all(infos, encode, "training clips")
        return bank, actions, episode % 10 == 0, count < most

    def fit_idm(self, k: int, bank: Tensor, actions: Tensor, held: np.ndarray) -> Probe:
        """Train a probe on all windows of k + 1 frames in the bank's clips."""
        windows, args = bank.shape[1] - k, self.args  # of a clip
        y = actions[:, :-1].unfold(1, k, 1).flatten(0, 1).transpose(1, 2)  # (N windows, k, 7)

        def read(p: np.ndarray) -> tuple[Tensor, None]:
            frames = p[:, None] % windows + np.arange(k + 1)
            return bank[p[:, None] // windows, frames].to(self.device), None

        torch.manual_seed(args.seed)
        net = Probe("idm", (k + 1, *bank.shape[2:]), args.probe_width).to(self.device)
        train_probe(net, read, y, held.repeat(windows), args.max_steps, 0.15 / args.probe_width)
        return net

    # -- semantics

    def labelled(self, split: str, count: int) -> list[dict]:
        """List at most `count` episodes with a success label, long enough for eight frames.

        times  of all frames at the model's stride       seen  places in it of the eight that count
        """
        config = dataclasses.replace(self.config, num_frames=max(8, self.n + 1))
        clips = self.open_clips(config, split)
        infos = [info for i in range(len(clips)) if (info := clips.info(i))["success"] is not None]
        won = sum(info["success"] for info in infos)
        if min(won, len(infos) - won) < 2:
            found = f"{split!r} of {self.args.subset_names} has {won} and {len(infos) - won}"
            raise Unavailable(f"success probes need two labelled successes and failures; {found}")
        infos = [infos[i] for i in data.even_indices(len(infos), count)]
        for info in infos:
            info["times"] = np.arange(0, info["length"], self.config.stride)
            info["seen"] = data.probe_times(len(info["times"]), 8, "uniform", 1)
        return infos

    @functools.cached_property
    def readers(self) -> dict[str, Callable]:
        """Name the success probes that can be trained, and how each reads sentences, if it does."""
        self.labelled("train", 2), self.labelled(self.args.split, 2)
        kinds = {kind: lambda words: None for kind in DEPTHS if kind not in ("idm", "text")}
        with self.needing("probe_text"):
            kinds["text"] = load_text_encoder(self.args.text_weights, self.device)
        return kinds

    def pooled(self, features: Tensor) -> Tensor:
        """Average features (B, T, h, w, C) over 4 x 4 super-patches: (B, T, 16, C)."""
        x = F.adaptive_avg_pool2d(features.flatten(0, 1).movedim(-1, 1), 4)
        return x.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])

    @functools.cached_property
    def trained_probes(self) -> dict[str, Probe]:
        """Train the success probes on real features; every fifth episode chooses the weights."""
        args, infos, probes = self.args, self.labelled("train", 2000), {}
        infos.sort(key=lambda info: info["success"])  # so that both parts have both classes

        def encode(info: dict) -> Tensor:
            return self.pooled(self.known_features(info, info["seen"]))

        x = self.encode_all(infos, encode, "features").to(self.device)
        y = torch.tensor([float(info["success"]) for info in infos], device=self.device)
        won = int(y.sum())
        held = np.r_[: len(x) - won, :won] % 5 == 0
        words = np.array([info["language"] for info in infos])
        steps = min(args.max_steps, 50 * math.ceil(len(x) / 32))

        for kind, reader in self.readers.items():

            def read(p: np.ndarray, reader: Callable = reader) -> tuple[Tensor, Tensor | None]:
                return x[p], reader(words[p])

            torch.manual_seed(args.seed)
            text_dim = reader(words[:1]).shape[-1] if kind == "text" else 1
            net = Probe(kind, x.shape[1:], args.probe_width * 3 // 4, text_dim).to(self.device)
            score = train_probe(net, read, y, held, steps, 1e-3)
            probes[kind], net.score = net, score
        return probes

    def judge(self, kind: str, features: Tensor, sentence: str) -> Tensor:
        """Score clips of one instruction by a success probe: (B, 8, h, w, C) -> (B,)."""
        text = self.readers[kind]([sentence] * len(features))
        return self.trained_probes[kind].judge(self.pooled(features), text)

    def probe(self) -> Iterator[dict]:
        """Judge real and dreamed test episodes by the probes that learned from real ones."""
        label = f"probe {' '.join(self.readers)}"
        yield
        infos, probes = self.labelled(self.args.split, self.args.num_episodes), self.trained_probes
        for i, info in self.out.shard([*enumerate(infos)], label):
            z = self.space.encode(self.load_frames(info, slice(self.n)))
            z = self.dream(z, self.load_actions(info), [i])[:, info["seen"]]
            real = self.real_features(self.load_frames(info, info["seen"]))
            features = {"model": self.dreamed_features(z), "real": real}
            for kind, source in itertools.product(probes, features):
                score = self.judge(kind, features[source], info["language"])[0].item()
                for statistic in ("accuracy", "balanced_accuracy", "auc"):
                    clips = self.out.samples[statistic, f"probe_{kind}_{statistic}", source]
                    clips[i] = torch.tensor([info["success"], score])
        yield self.out.rows()

    def policy(self) -> Iterator[dict]:
        """Let a policy act inside the dream; the probe that validated best counts successes."""
        args = self.args
        if not args.policy:
            raise Unavailable("policy: name the function to act with, --policy module:function")
        try:
            policy = pydoc.locate(args.policy.replace(":", "."))
        except pydoc.ErrorDuringImport as error:
            raise InputError(f"--policy {args.policy}: {error}; mend it") from error
        if not callable(policy):
            raise InputError(f"--policy {args.policy}: there is no such function")
        label = f"policy {' '.join(self.readers)}"
        yield
        won = self.out.samples["share", "success_rate", "model"]
        infos = self.labelled(args.split, args.policy_starts)
        best = max(self.trained_probes, key=lambda kind: self.trained_probes[kind].score)
        for i, info in self.out.shard([*enumerate(infos)], label):
            known = self.load_frames(info, slice(self.n))
            known = known.expand(args.policy_trials, *known.shape[1:])
            random = torch.Generator().manual_seed(args.seed + i)

            def act(frame: Tensor, sentence: str = info["language"]) -> Any:
                return policy(frame, sentence)

            frames, _ = self.model.rollout_policy(act, known, args.policy_steps, random)
            seen = data.probe_times(frames.shape[-4], 8, "uniform", 1)
            features = self.real_features(frames[..., seen, :, :, :])
            won[i] = (self.judge(best, features, info["language"]) > 0).double()
        row = self.out.rows()["success_rate"]
        error = (row["value"] * (1 - row["value"]) / len(infos) / args.policy_trials) ** 0.5
        yield {"success_rate": row | {"judge": best, "standard_error": error}}

    # -- what only a simulator can tell

    def simulator(self, i: int, t: int) -> data.ToyWorld:
        """Rebuild the world that clip i was filmed in, as it stands in frame t."""
        metadata = data.Episode(self.infos[i]["path"]).metadata
        if "toy" not in metadata:
            raise Unavailable("needs episodes of the toy world: its simulator knows the truth")
        return data.toy_state_at(metadata, int(self.infos[i]["times"][t]))

    def simulate(self, world: data.ToyWorld, actions: Tensor) -> Tensor:
        """Act in the simulator, in model units; give the frames ([V,] k, H, W, 3) after each."""
        config, film = self.config, []
        gain, _, turn, *_ = data.ACTION_MAPPINGS[self.model.clip_format["action_mapping"]]
        scale = np.repeat([gain, turn], 3) * (config.stride if config.action_merge == "sum" else 1)
        for action in actions.cpu().double().numpy():
            for _ in range(config.stride):
                world.step([*(action[:6] / scale), float(action[6] < 0)])
            film.append(world.render(config.image_size, config.views))
        film = data.to_floats(np.stack(film, 1)).to(self.device)
        return film if len(film) > 1 else film[0]

    def counterfactual(self) -> Iterator[dict]:
        """Send the gripper along +x, -x, +y, -y, +z, -z from one state, dreamed and simulated.

        error  root mean squared difference of the pixels; beside it the dream of the opposite
        sides  how often both of two opposite actions move the gripper to their own side, counted
               where the simulator moves it by 2 % of the image or more
        """
        self.simulator(0, 0)
        yield
        n, samples, opposite = self.n, self.out.samples, [1, 0, 3, 2, 5, 4]
        for i in self.out.shard(self.windows, "counterfactual"):
            frames, beside = self.load_frames(self.infos[i]), self.actions[i].repeat(6, 1, 1)
            beside[:, n:] = beside[:, n - 1 : n]
            way = torch.eye(6)[[0, 0, 1, 1, 2, 2], None].to(beside)
            beside[:, n - 1 :, :6] = 1.575 * way  # 45 mm a step
            beside[1::2, n - 1 :, :6] *= -1
            true = [self.simulate(self.simulator(i, n - 1), a[n - 1 : -1]) for a in beside]
            true, known = torch.stack(true), frames[..., n - 1 : n, :, :, :]
            z = self.space.encode(frames).expand(6, -1, -1, -1, -1)
            new = self.space.decode_new(self.dream(z, beside, [i] * 6), n)
            for kind, video in {"model": new, "opposite": new[opposite], "copy": known}.items():
                error = (video - true).square().mean((-3, -2, -1)).sqrt()
                samples["mean", "counterfactual_error", kind][i] = error.flatten(0, -2).mean(0)
            last = [(x if x.ndim == 5 else x[:, 0])[:, -1] for x in (new, true, known)]  # camera 0
            moved, truth, start = (data.centroid(x, "cyan") for x in last)
            side = truth - truth[opposite]
            side /= np.linalg.norm(side, axis=-1, keepdims=True)
            ways = [((x - start) * side).sum(-1).reshape(3, 2) for x in (moved, truth)]
            moved, truth = (x.min(1) for x in ways)  # of each pair, the shorter of its two ways
            hits = np.where(truth > 0.02 * self.config.image_size, moved > 0, np.nan)
            samples["share", "counterfactual_sides", "model"][i] = torch.from_numpy(hits)
        yield self.out.rows()

    def objects(self) -> Iterator[dict]:
        """Find gripper and blocks by colour: pixels from where the simulator has them; their share.

        Where the real frame shows no such colour, nothing counts; its own errors are the floor.
        """
        self.simulator(0, 0)
        yield
        n, size, samples = self.n, self.config.image_size, self.out.samples
        for clips, *batch in self.batches("objects"):
            videos = self.videos(clips, *batch)
            for j, (i, view) in enumerate(itertools.product(clips, self.config.views)):
                worlds = [self.simulator(i, t) for t in range(n, self.config.num_frames)]
                names = {"cyan": "marker"} | {c: c for c in worlds[0].names if c in data.COLOURS}
                places = [[w.positions()[name] for w in worlds] for name in names.values()]
                places = worlds[0].project(np.array(places), view, size)
                off = {}
                for kind, video in videos.items():
                    found = np.stack([data.centroid(video[j, n:], colour) for colour in names])
                    off[kind] = torch.from_numpy(np.linalg.norm(found - places, axis=-1))
                seen = off["real"].isfinite()
                for kind, x in off.items():
                    found = x.isfinite().double().where(seen, math.nan)
                    x = x.where(seen, math.nan)
                    samples["mean", "objects_gripper", kind][i, view] = x[0]
                    samples["mean", "objects_blocks", kind][i, view] = x[1:].nanmean(0)
                    samples["mean", "objects_found", kind][i, view] = found.nanmean(0)
        yield self.out.rows()

    def goal(self) -> Iterator[dict]:
        """Plan to the frame that k recorded actions lead to and act in the simulator.

        Reached: gripper and blocks appear within 5 % of the image of where that frame has them.
        """
        self.simulator(0, 0)
        yield
        samples = self.out.samples
        for i in self.out.shard(self.windows, "goal"):
            for k in self.horizons:
                for kind, far in self.goal_distances(i, k).items():
                    samples["share", f"goal_k{k}", kind][i] = torch.tensor([float(far < 0.05)])
        yield self.out.rows()

    def goal_distances(self, i: int, k: int) -> dict[str, float]:
        """Act on k planned, random and no actions: the farthest that a thing ends from its goal."""
        n, frames, actions = self.n, self.load_frames(self.infos[i]), self.actions[i]
        random = torch.Generator().manual_seed(self.args.seed + i)

        def end(plan: Tensor) -> tuple[Tensor, np.ndarray]:
            world = self.simulator(i, n - 1)
            frame = self.simulate(world, plan).select(-4, -1)
            places = np.stack([*world.positions().values()])
            return frame, np.stack([world.project(places, v, 1) for v in self.config.views])

        recorded, still, chance = actions[n - 1 : n - 1 + k].repeat(3, 1, 1)
        still[:, :6], chance[:, :7] = 0, 3.5 * torch.rand(k, 7, generator=random) - 1.75
        picture, places = end(recorded)
        self.model.reset(frames[..., :n, :, :, :], actions[None, : n - 1])
        plan = self.model.plan(picture, k, dims=self.dims, generator=random, **self.cem)
        ends = {"model": end(plan)[1], "random": end(chance)[1], "still": end(still)[1]}
        return {kind: np.linalg.norm(at - places, axis=-1).max() for kind, at in ends.items()}

    # -- the whole

    def run(self) -> None:
        """Measure group by group; what an earlier run finished is not measured again."""
        found, wanted, nets, groups = self.out.all["metrics"], self.args.metrics.split(","), {}, []
        if self.out.proc.rank == 0:
            for item in found.items():
                print(format_row(*item))
        done = self.out.all["finished"]
        done = {*done, *(x.partition(" by ")[0] for x in done)}  # a flag left out changes nothing
        for name in [x for x in METRICS if x in wanted and self.out.label(x) not in done]:
            with self.needing(name):
                if name in PIXELS:
                    nets[name] = self.open_metric(name)
                elif self.space.temporal_stride > 1:
                    raise Unavailable(f"{name}: this encoder packs two frames into one latent")
                else:
                    work = getattr(self, name)()
                    next(work)  # opens what it needs
                    groups.append(([name], work))
        if nets:
            groups.insert(0, ([*nets], self.pixels(nets)))
        for names, work in groups:
            self.out.resume_metric(" ".join(names))
            self.out.report(next(work), names)
        if self.out.proc.rank == 0:
            draw_curves(self.folder / "horizon.png", found)
            print(*conclusions(found), sep="\n")


# ------------------------------------------------------------------------------------------------
# Several runs side by side.


def paired(row: dict, other: dict) -> str:
    """Write the difference of two runs on the same clips with its interval; ** excludes zero."""
    if "samples" not in row:
        return f"{row['value'] - other['value']:+.3g}"
    value, ci, _ = bootstrap(row["samples"], row["statistic"], minus=other["samples"])
    if ci is None:  # one clip, or none with a value in both
        return f"{value:+.3g}"
    text = f"{value:+.3g} [{ci[0]:+.3g}, {ci[1]:+.3g}]"
    return f"**{text}**" if ci[0] * ci[1] > 0 else text


def tabulate(axis: str, names: list[str], runs: dict[str, dict]) -> list[list[str]]:
    """Set runs side by side: best in bold, Borda ranks, then the differences to the first run."""
    (first, base), *others = runs.items()
    higher = [base[name]["better"] == "higher" for name in names]
    values = np.array([[rows[name]["value"] for name in names] for rows in runs.values()])
    values = np.column_stack([values, borda(values, higher)])
    best = np.where([*higher, False], values.max(0), values.min(0))
    pairs = zip(names, higher, strict=True)
    table = [[axis, *(f"{name} {'up' if up else 'down'}" for name, up in pairs), "Borda"]]
    for run, row in zip(runs, values, strict=True):
        bold = np.where(row == best, "**", "")
        table.append([run, *(f"{b}{fmt(x)}{b}" for b, x in zip(bold, row, strict=True))])
    for run, rows in others:
        gaps = [paired(rows[name], base[name]) for name in names]
        table.append([f"{run} minus {first}", *gaps, ""])
    return table


def compare(args: Args) -> None:
    """Write the tables of several runs, one an axis, as Markdown and as a picture."""
    stored, lines = {}, []
    for run in args.compare:
        path = Path(run) / "results.json"
        if not path.is_file():
            raise InputError(f"{path}: no results; measure the run first with evaluate.py")
        stored[run] = read_results(path)
    first, *others = [results["config"] for results in stored.values()]
    own = {"checkpoint_path", "model_preset", "objective", "weights", "horizons", "searches"}
    unlike = {key for x in others for key in {*first, *x} - own if first.get(key) != x.get(key)}
    if not others or unlike:
        fault = f": {', '.join(sorted(unlike))} differ; measure one again" * bool(unlike)
        raise InputError(f"--compare needs two or more runs that were measured alike{fault}")
    runs, common = {run: results["metrics"] for run, results in stored.items()}, []
    for name in runs[args.compare[0]]:
        if all(rows.get(name, {}).get("value") is not None for rows in runs.values()):
            common.append(name)
    axes = {axis: [n for n in common if re.fullmatch(form, n)] for axis, form in AXES.items()}
    tables = [tabulate(axis, names, runs) for axis, names in axes.items() if names]
    if not tables:
        raise InputError(f"--compare: {', '.join(runs)} have no metric in common; measure one more")
    for head, *rows in tables:
        rule = ["---"] * len(head)
        lines += ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]
    folder = Path(args.output_dir or "outputs/compare")
    data.write_atomic(folder / "compare.md", "\n".join(lines).encode())
    draw_tables(folder / "compare.png", tables)
    print(*lines, f"{folder / 'compare.md'}, {folder / 'compare.png'}", sep="\n")


def main() -> None:
    args = data.parse_args(Args, toy=TOY)
    if args.compare:
        return compare(args)
    torch.set_grad_enabled(False)
    proc = data.init_processes(args.device)
    Evaluation(args, proc).run()
    proc.cleanup()


if __name__ == "__main__":
    data.run_cli(main)
