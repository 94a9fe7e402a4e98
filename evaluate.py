"""Measure a trained world model on three axes: pixels, control, semantics; invent no number.

    real clip --encode--> context --rollout(actions)--> dreamed latents --decode--> dreamed frames
                                                             |                          |
                              control: searched actions, inverse dynamics     pixels: PSNR ... FVD, PCK
                              semantics: success probes, a policy in the dream

Every number stands beside what it must be read against: the encode-decode ceiling, copying the last
known frame, and the same model with another clip's actions. Protocols: "Reconstruction or
Semantics?" (arXiv 2605.06388), sec. 4 and app. B. B clips, T frames, H W pixels, N points or samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import InputError, load_torch

WEIGHTS = {  # metric: (file name, where it can be fetched)
    "lpips": (
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
    "t_lpips": (
        "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
        "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    ),
    "fid": (
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    "fid_tv": (
        "inception_v3_google-0cc3c7bd.pth",
        "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
    ),
    "fvd": ("i3d_torchscript.pt", "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"),
    "fvd_r3d": (
        "r3d_18-b3b3357e.pth",
        "https://download.pytorch.org/models/r3d_18-b3b3357e.pth",
    ),
    "pck": ("co-tracker", "https://github.com/facebookresearch/co-tracker"),
}
PCK_PIXELS = (5, 10, 20, 40)  # thresholds in pixels of a 256-pixel frame
MOVING_PIXELS = 5  # a point that the real video moves further than this counts as moving
LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as in Y'CbCr


class Unavailable(InputError):
    """Say that a metric cannot be computed, and how to make it computable."""

    def __init__(self, reason: str, url: str = "", path: str | Path = ""):
        fetch = f"; fetch {url} to {path}" if url else ""
        super().__init__(reason + fetch)
        self.reason, self.url, self.path = reason, url, str(path)


# ------------------------------------------------------------------------------------------------
# Statistics: every value with the interval that its clips allow.


def pearson_per_dim(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation r and determination R^2 of each dimension from summed moments.

    moments  (N, D, 6)  per clip: count, sum x, sum y, sum xx, sum yy, sum xy; x predicts y
    ->       (D,), (D,) r, and 1 - sum (x - y)^2 / sum (y - mean y)^2; NaN where y is constant
    """
    n, x, y, xx, yy, xy = np.moveaxis(moments.sum(0), -1, 0)
    spread_x, spread_y, shared = xx - x * x / n, yy - y * y / n, xy - x * y / n
    spread_y = np.where(spread_y > 1e-9 * yy, spread_y, np.nan)
    r = shared / np.sqrt(np.maximum(spread_x, 1e-12 * np.maximum(xx, 1e-12)) * spread_y)
    return r, 1 - (xx + yy - 2 * xy) / spread_y


def balanced_accuracy(samples: np.ndarray) -> float:
    """Mean recall of the two classes. samples (N, 3): label, score, decision threshold."""
    label, hit = samples[:, 0] > 0.5, (samples[:, 1] > samples[:, 2]) == (samples[:, 0] > 0.5)
    return (hit[label].mean() + hit[~label].mean()) / 2 if 0 < label.sum() < len(label) else np.nan


def auc(samples: np.ndarray) -> float:
    """Area under the ROC curve: how often a success outscores a failure, ties counting half."""
    from scipy.stats import rankdata

    label = samples[:, 0] > 0.5
    if not 0 < label.sum() < len(label):
        return np.nan
    positives, ranks = label.sum(), rankdata(samples[:, 1])
    wins = ranks[label].sum() - positives * (positives + 1) / 2
    return wins / (positives * (len(label) - positives))


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda s: np.nanmean(s) if np.isfinite(s).any() else np.nan,
    "pearson": lambda s: np.nanmean(pearson_per_dim(s.reshape(len(s), -1, 6))[0]),
    "accuracy": lambda s: ((s[:, 1] > s[:, 2]) == (s[:, 0] > 0.5)).mean(),
    "balanced_accuracy": balanced_accuracy,
    "auc": auc,
}


def bootstrap(
    samples: np.ndarray,
    statistic: str = "mean",
    minus: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, list[float] | None]:
    """Return a statistic of the clips and its 95 % percentile interval over resampled clips.

    samples  (N,) or (N, m)  one entry a clip; clips, not frames, are independent
    minus    same shape      the same clips from another model: the paired difference is returned
    ->       value, [low, high]; no interval for fewer than two clips
    """
    samples = np.asarray(samples, dtype=np.float64)
    pair = [samples] if minus is None else [samples, np.asarray(minus, dtype=np.float64)]
    assert all(len(s) == len(samples) for s in pair), "paired samples must be of the same clips"
    if statistic == "mean":  # a clip without a value (no visible point) does not count
        valid = np.isfinite(sum(s.reshape(len(s), -1).mean(1) for s in pair))
        pair = [s[valid] for s in pair]

    def value(index) -> float:
        parts = [STATISTICS[statistic](s[index]) for s in pair]
        return float(parts[0] - parts[1] if len(parts) == 2 else parts[0])

    size = len(pair[0])
    if size < 2:
        return (value(slice(None)) if size else math.nan), None
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        draws = [value(random.integers(size, size=size)) for _ in range(resamples)]
        point = value(slice(None))
    if not np.isfinite(draws).any():
        return point, None
    return point, [float(q) for q in np.nanpercentile(draws, [2.5, 97.5])]


def borda(values: np.ndarray, higher: Sequence[bool]) -> np.ndarray:
    """Sum each run's ranks over the metrics; 1 is best, equal values share the mean rank.

    values  (runs, metrics)   higher  (metrics,) whether more is better   ->  (runs,)
    """
    from scipy.stats import rankdata

    signs = np.where(np.asarray(higher), -1.0, 1.0)
    return rankdata(np.asarray(values, dtype=np.float64) * signs, axis=0).sum(1)


# ------------------------------------------------------------------------------------------------
# Pixel metrics, one value a frame.


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(1 / MSE) in dB; (N, H, W, 3) twice -> (N,), at most 100."""
    mse = (x.double() - y.double()).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity as scikit-image's default: 7x7 box, sample covariance, channel mean.

    (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2))    [Wang et al. 2004, eq. 13]

    x, y  (N, H, W, C) in [0, 1]   H, W >= 7; C = 1 gives the paper's luminance variant
    ->    (N,)                     mean over channels and the positions whose box lies inside
    """
    x, y = x.double().movedim(-1, 1), y.double().movedim(-1, 1)
    mx, my, xx, yy, xy = (F.avg_pool2d(m, 7, 1) for m in (x, y, x * x, y * y, x * y))
    unbiased = 49 / 48
    sxx, syy, sxy = unbiased * (xx - mx * mx), unbiased * (yy - my * my), unbiased * (xy - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return ratio.mean((1, 2, 3))


def ssim_y(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of the Rec. 601 luminance (the paper's text; its code and `ssim` take RGB)."""
    luma = torch.tensor(LUMA, dtype=torch.float64, device=x.device)
    return ssim((x.double() @ luma).unsqueeze(-1), (y.double() @ luma).unsqueeze(-1))


# ------------------------------------------------------------------------------------------------
# Frechet distances: sums are kept, features are not.


class FrechetSums:
    """Accumulate count, sum and outer products of feature vectors in float64."""

    def __init__(self, dim: int):
        self.count = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        features = features.to("cpu", torch.float64)
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (D,) and unbiased covariance (D, D)."""
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


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
# Published networks, each read from a local file. Frames go in as (N, H, W, 3), clips as
# (B, T, H, W, 3), both in [0, 1].


def weight_file(metric: str, folder: str | Path) -> Path:
    """Find a metric's weights in `folder` or in torch.hub's cache; raise Unavailable otherwise."""
    name, url = WEIGHTS[metric]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / name
    found = next((p for p in (Path(folder) / name, cache) if p.is_file()), None)
    if found is None:
        raise Unavailable(f"{metric} needs {name}, which is not here", url, Path(folder) / name)
    return found


def load_network(net: torch.nn.Module, state: dict, where: Path) -> torch.nn.Module:
    """Load published weights strictly; only batch counters, which old files lack, may be absent."""
    from data import load_strictly

    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_strictly(net, counters | state, str(where))
    return net.eval().requires_grad_(False)


def load_lpips(folder: str | Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build LPIPS (AlexNet) of the lpips package from a local trunk: frames, frames -> (N,)."""
    import lpips

    path = weight_file("lpips", folder)
    trunk = load_torch(path)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # linear heads ship with it
    slices = {
        f"features.{layer}.": f"slice{i}.{layer}." for i, layer in enumerate((0, 3, 6, 8, 10), 1)
    }
    state = {
        slices[prefix] + name[len(prefix) :]: tensor
        for name, tensor in trunk.items()
        for prefix in slices
        if name.startswith(prefix)
    }
    load_network(model.net, state, path)
    model = model.to(device).eval()
    return lambda x, y: model(x.movedim(-1, 1), y.movedim(-1, 1), normalize=True).flatten()


def feed_pool(block: torch.nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Give `block.branch_pool` the input `pool(x)` in place of torchvision's zero-padded average."""
    pooled = []
    block.register_forward_pre_hook(lambda _, args: pooled.append(pool(args[0])))
    block.branch_pool.register_forward_pre_hook(lambda _, args: (pooled.pop(),))


def load_inception(metric: str, folder: str | Path, device: torch.device) -> Callable:
    """Build the FID network: frames (N, H, W, 3) -> features (N, 2048).

    `fid`: TensorFlow's Inception of 2015 in the pytorch-fid layout: 1008 classes, average pools
    that do not count padding, a max pool in the last block. `fid_tv`: torchvision's Inception,
    as the paper's code. Both see bilinear 299 x 299 (without antialiasing) and 2 x - 1.
    """
    from torchvision.models import inception_v3

    path, standard = weight_file(metric, folder), metric == "fid"
    net = inception_v3(
        num_classes=1008 if standard else 1000, aux_logits=not standard, init_weights=False
    )
    load_network(net, load_torch(path), path)
    if standard:
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            block = getattr(net, f"Mixed_{name}")
            feed_pool(block, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        feed_pool(net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
    net.fc = torch.nn.Identity()
    net.to(device)

    def features(frames: Tensor) -> Tensor:
        x = F.interpolate(frames.movedim(-1, 1), (299, 299), mode="bilinear", align_corners=False)
        return net(2 * x - 1)

    return features


def pad_clip(clip: Tensor, frames: int = 16) -> Tensor:
    """Repeat the last frame until a clip (B, T, H, W, 3) has `frames` frames."""
    missing = max(0, frames - clip.shape[1])
    return torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1, -1)], 1)


def load_r3d(folder: str | Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Build the paper's video network, torchvision's r3d_18 at 112 px: clips -> (B, 512)."""
    from torchvision.models.video import r3d_18

    path = weight_file("fvd_r3d", folder)
    net = load_network(r3d_18(), load_torch(path), path).to(device)
    net.fc = torch.nn.Identity()
    mean = torch.tensor([0.43216, 0.394666, 0.37645], device=device)  # Kinetics-400
    std = torch.tensor([0.22803, 0.22145, 0.216989], device=device)

    def features(clips: Tensor) -> Tensor:
        x = pad_clip(clips)
        B, T = x.shape[:2]
        x = F.interpolate(x.flatten(0, 1).movedim(-1, 1), (112, 112), mode="bilinear")
        x = (x.movedim(1, -1) - mean) / std
        return net(x.reshape(B, T, 112, 112, 3).movedim(-1, 1))

    return features


def load_i3d(path: str, folder: str | Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Open the field's FVD network, a TorchScript I3D (runs code): clips -> (B, 400)."""
    name, url = WEIGHTS["fvd"]
    if not path:
        reason = f"fvd needs {name}, a TorchScript archive that runs code: name it with --i3d_path"
        raise Unavailable(reason, url, Path(folder) / name)
    if not Path(path).is_file():
        raise Unavailable(f"fvd: {path} does not exist", url, path)
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise InputError(f"{path}: not a TorchScript archive; fetch {url} again") from error

    def features(clips: Tensor) -> Tensor:
        x = pad_clip(clips).movedim(-1, 1) * 255
        return net(x, rescale=True, resize=True, return_features=True)

    return features


def load_flow(folder: str | Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Build RAFT: frames, next frames -> flow (N, 2, H, W) in pixels, from first to next."""
    from torchvision.models.optical_flow import raft_large

    path = weight_file("t_lpips", folder)
    net = load_network(raft_large(), load_torch(path), path).to(device)
    return lambda a, b: net(a.movedim(-1, 1) * 2 - 1, b.movedim(-1, 1) * 2 - 1)[-1]


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Fetch each pixel p of frames (N, H, W, 3) from p + flow; flow (N, 2, H, W) in pixels."""
    N, H, W, _ = frames.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    target = torch.stack([x, y]).to(flow) + flow
    scale = torch.tensor([(W - 1) / 2, (H - 1) / 2], device=flow.device).view(1, 2, 1, 1)
    grid = (target / scale - 1).movedim(1, -1)
    out = F.grid_sample(frames.movedim(-1, 1), grid, padding_mode="border", align_corners=True)
    return out.movedim(1, -1)


# ------------------------------------------------------------------------------------------------
# Point tracks. A tracker maps clips (B, T, H, W, 3) and points (N, 2) as (x, y) on frame 0 to
# tracks (B, T, N, 2) and visibility (B, T, N).


def grid_points(H: int, W: int, side: int = 16, margin: float = 0.02) -> Tensor:
    """Lay side x side points (x, y) over a frame, `margin` of it away from its border."""
    y = torch.linspace(margin, 1 - margin, side) * (H - 1)
    x = torch.linspace(margin, 1 - margin, side) * (W - 1)
    return torch.cartesian_prod(y, x).flip(-1)


def track_patches(clips: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Follow points by the patch around them on frame 0; no weights.

    Each frame, a point moves to the least mean squared difference within H/16 pixels of where it
    was, plus 1e-3 (d / radius)^2, which keeps points on plain surfaces still. A point is visible
    while its patch is found with a root mean squared error below 0.1.
    """
    B, T, H, W, _ = clips.shape
    N, r, R = len(points), max(2, H // 64), max(2, H // 16)  # half patch, search radius
    p, s = 2 * r + 1, 2 * R + 1
    frames = F.pad(clips.movedim(-1, 2).flatten(0, 1), [R + r] * 4, mode="replicate")
    frames = frames.unflatten(0, (B, T))
    limit = torch.tensor([W - 1, H - 1], device=clips.device)
    position = points.round().long().to(clips.device).clamp(min=0).minimum(limit).expand(B, N, 2)
    reach = torch.arange(-R, R + 1, device=clips.device, dtype=clips.dtype)
    prior = 1e-3 * (reach[:, None] ** 2 + reach**2) / R**2
    batch = torch.arange(B, device=clips.device).view(B, 1, 1, 1)

    def cut(t: int, half: int) -> Tensor:  # (B, N, 3, side, side) around `position` of frame t
        offset = torch.arange(-half, half + 1, device=clips.device) + R + r
        rows = (position[..., 1:] + offset)[..., :, None]
        columns = (position[..., :1] + offset)[..., None, :]
        return frames[batch, t, :, rows, columns].movedim(-1, 2)

    patch = cut(0, r).flatten(0, 1)
    tracks, visible = [position], [torch.ones(B, N, dtype=torch.bool, device=clips.device)]
    for t in range(1, T):
        window = cut(t, R + r).flatten(0, 1)
        energy = F.avg_pool2d(window.square().mean(1, keepdim=True), p, 1)[:, 0]
        cross = F.conv2d(window.flatten(0, 1)[None], patch, groups=B * N)[0] / (3 * p * p)
        error = energy - 2 * cross + patch.square().mean((1, 2, 3))[:, None, None]
        best = (error + prior).flatten(1).argmin(1)
        step = torch.stack([best % s - R, best // s - R], -1).view(B, N, 2)
        position = (position + step).clamp(min=0).minimum(limit)
        tracks.append(position)
        visible.append((error.flatten(1).gather(1, best[:, None]) < 0.01).view(B, N))
    return torch.stack(tracks, 1).float(), torch.stack(visible, 1)


def load_cotracker(source: str, device: torch.device) -> Callable:
    """Open CoTracker3 through torch.hub (runs its code): `source` is 'hub' or a local clone."""
    name, url = WEIGHTS["pck"]
    if not source:
        reason = "pck needs CoTracker, whose code is run: name a clone (or 'hub') with --cotracker"
        raise Unavailable(reason, url, name)
    if source != "hub" and not (Path(source) / "hubconf.py").is_file():
        raise Unavailable(f"pck: {source} is no clone of CoTracker (no hubconf.py)", url, source)
    repository = "facebookresearch/co-tracker" if source == "hub" else source
    try:
        net = torch.hub.load(
            repository,
            "cotracker3_offline",
            source="github" if source == "hub" else "local",
            trust_repo=True,
        )
    except OSError as error:  # no network: the repository or its weights cannot be fetched
        weights = "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / "scaled_offline.pth"
        raise Unavailable(f"pck: CoTracker cannot be opened ({error})", weights, cache) from error
    net = net.to(device).eval()

    def track(clips: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        queries = torch.cat([torch.zeros(len(points), 1), points], 1).to(clips)
        tracks, visible = net(
            clips.movedim(-1, 2) * 255, queries=queries.expand(len(clips), -1, -1)
        )
        return tracks, visible > 0.5

    return track


def pck(
    real: tuple[Tensor, Tensor], generated: tuple[Tensor, Tensor], scale: float
) -> dict[str, Tensor]:
    """Compare point tracks: percentage of correct keypoints and what it covers.

    real, generated  tracks (B, T, N, 2) in pixels, visibility (B, T, N)
    scale            256 / H: thresholds are pixels of a 256-pixel frame
    ->               {"@5": (B, T), "moving@5": ..., "coverage": ..., "coverage_generated": ...}

    PCK counts points visible in both videos, `moving` those of them that the real clip moves by
    more than 5 px; NaN where there are none. A model can hide its errors by losing points, so
    read it with the coverage: share visible in both videos, and in the generated one.
    """
    (track, seen), (track_g, seen_g) = real, generated
    both = seen & seen_g
    error = (track - track_g).norm(dim=-1) * scale
    travel = (track - track[:, :1]).norm(dim=-1).where(seen, 0).amax(1, keepdim=True) * scale
    out = {}
    for prefix, counted in (("", both), ("moving", both & (travel > MOVING_PIXELS))):
        total = counted.sum(-1)
        for pixels in PCK_PIXELS:
            correct = ((error <= pixels) & counted).sum(-1)
            out[f"{prefix}@{pixels}"] = correct / total.where(total > 0, torch.nan)
    out["coverage"], out["coverage_generated"] = both.float().mean(-1), seen_g.float().mean(-1)
    return out


def action_moments(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Sum what correlations need over the windows of each clip: (N, n, D) twice -> (N, D, 6)."""
    x, y = predicted.astype(np.float64), true.astype(np.float64)
    return np.stack([s.sum(1) for s in (np.ones_like(x), x, y, x * x, y * y, x * y)], -1)
