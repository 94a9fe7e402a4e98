"""Train an adapter that compresses frozen features, and a decoder that paints frames from it.

    python train_adapter.py toy                              embedded toy world, CPU
    python train_adapter.py --encoder_type vjepa2 --use_pixel_decoder true --dataset_dir ./data
    torchrun --nproc_per_node=4 train_adapter.py --encoder_type vjepa2 --use_pixel_decoder true
    python train_adapter.py --resume outputs/adapter_svae    continue a killed run

    z = encoder(frames)    u ~ N(mean(z), var(z))    z' = decode(u)    frames' = paint(u)

    loss = MSE(z', z) + 1 (1 - cos) + 0.01 |  |FFT z'| - |FFT z|  | + 1e-4 KL
         + 1 (MSE(frames', frames) + 0.5 LPIPS + 0.5 (1 - MS-SSIM)) + adaptive 0.1 PatchGAN

Stage `svae` paints from a detached u: pixels do not shape the latent; `psvae` lets them. Defaults
are those of arXiv 2605.06388, appendix B. All that is random (clips, posterior draws) is a function
of the seed and the sample's number: a resumed run is the same run, and N processes compute what one
would. Writes adapter.safetensors, last.pt, log.csv and sample_*.png: real | decoded | PCA colours
of the features before | after the adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import StackDataset, default_collate

import data
from adapter import AdapterConfig, PixelDecoder, PixelDecoderConfig, create_adapter, save_adapter
from data import Clip, EpisodeDataset, InputError, Processes, Run, prepare_data, psnr, setup, wrap
from diffusion import draw
from encoders import BaseAutoencoder, EncoderConfig, create_autoencoder

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"
COLUMNS = (
    "step loss mse cosine spectral kl pixel lpips ms_ssim gan critic grad_adapter grad_decoder lr "
    "clips_per_s ms_per_step mfu minutes_left memory_gb skipped val_mse val_cosine val_psnr "
    "val_gauss_ssim pca_cosine pca_psnr"
).split()
FIXED = (  # what resuming may not change
    "subset_names image_size num_frames stride num_views encoder_type pixel_patch adapter "
    "use_pixel_decoder decoder_channels decoder_multipliers decoder_blocks decoder_attention "
    "decoder_groups stage gan_weight seed subset_weights"
).split()


@dataclass
class Args:
    # -- data
    dataset_dir: str = "./data"  # folder that `data.py --output_dir` wrote
    subset_names: str = "bridge_v2"  # data sets to mix, comma-separated
    subset_weights: str = ""  # their shares of an epoch, e.g. "3,1" (default: by size)
    image_size: int = 256  # side of the frames in pixels
    num_frames: int = 10  # frames of a clip
    stride: int = 2  # raw frames between two of them
    num_views: int = 1  # cameras; each is a clip of its own
    num_workers: int = 4  # loader processes per training process
    cache_latents: bool = False  # encode every frame once, take the features from the files
    # -- frozen encoder
    encoder_type: str = "scale_rae_webssl"  # pixels | vae | rae | vjepa2 | ... (encoders.py)
    encoder_weights: str | None = None  # file, folder or hub id (default: the public release)
    pixel_patch: int = 16  # patch side of the `pixels` encoder
    # -- adapter and pixel decoder
    adapter: Annotated[AdapterConfig, tyro.conf.arg(name="")] = field(default_factory=AdapterConfig)
    use_pixel_decoder: bool = False  # train one, for encoders that cannot paint
    decoder_channels: int = 160  # its outermost width: 160 in the paper, 128 in its code
    decoder_multipliers: str = "1,1,2,4,8"  # widths of its levels, outermost first
    decoder_blocks: int = 2  # residual blocks a level
    decoder_attention: str = "16"  # levels with attention, by size on 256x256 frames
    decoder_groups: int = 32  # of its GroupNorms; fewer if narrow, 3 channels or more each
    # -- loss
    stage: Literal["svae", "psvae"] = "svae"  # psvae: the pixel loss reaches the adapter
    cosine_weight: float = 1.0  # 1 - cosine similarity of a feature and its reconstruction
    spectral_weight: float = 0.01  # L1 between magnitudes of the FFT along the tokens
    kl_weight: float = 1e-4  # KL to a unit Gaussian, mean over channels
    kl_warmup: float = 0.2  # share of the run over which it grows to that
    pixel_weight: float = 1.0  # of the four pixel terms together
    lpips_weight: float = 0.5  # VGG LPIPS; needs the file that a missing-file error names
    lpips_start: int = 50_000  # clips seen before LPIPS is used
    ms_ssim_weight: float = 0.5  # 1 - MS-SSIM over five scales, fewer on frames below 176 pixels
    gan_weight: float = 0.0  # PatchGAN, scaled as in VQGAN; the paper's option is 0.1
    gan_start: int = 100_000  # clips seen before the PatchGAN is used
    # -- optimisation
    crop: int | None = None  # train on random windows of so many latent cells a side
    batch_size: int = 16  # clips per process and micro step
    grad_accum: int = 1  # micro steps per optimiser step
    num_epochs: int = 200  # length of the run and of the learning-rate schedule
    max_steps: int | None = None  # stop here; the schedule is not changed
    lr: float = 1e-4  # peak learning rate of the adapter
    decoder_lr_scale: float = 3.0  # the pixel decoder's, as a multiple of it
    warmup_epochs: float = 0.0  # linear warm-up from lr / 1000
    final_lr: float = 1.0  # last learning rate of the cosine, as a share of the peak
    weight_decay: float = 1e-4  # AdamW
    clip_grad: float = 1.0  # largest gradient norm, of adapter and decoder each; 0: any
    # -- run
    output_dir: str | None = None  # default: outputs/adapter_<adapter_type>
    resume: str | None = None  # run folder to continue; no other flag is needed
    seed: int = 0  # of weights, clips and posterior draws
    device: str | None = None  # default: cuda when there, else cpu
    bf16: bool | None = None  # autocast (default: on CUDA)
    compile: bool | None = None  # torch.compile (default: on CUDA)
    log_every: int = 10  # steps between lines of log.csv
    val_every: int = 2000  # steps between validations
    val_clips: int = 64  # held-out clips of a validation; as many training clips fit the PCA
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self):
        if isinstance(self.adapter, dict):  # from a config.json
            self.adapter = data.config_from(AdapterConfig, self.adapter, "config.json: adapter")
        counts = "batch_size grad_accum num_epochs log_every val_every val_clips save_every crop"
        data.check_flags(self, counts)
        if self.adapter.adapter_type == "identity" and not self.use_pixel_decoder:
            raise InputError("an identity adapter has nothing to train; add use_pixel_decoder")
        if self.gan_weight and not self.pixel_weight:
            raise InputError("gan_weight is relative to the pixel loss, but pixel_weight is 0")
        self.pixel_decoder_config(self.adapter.adapter_latent_dim)

    def pixel_decoder_config(self, latent_dim: int, temporal: bool = False) -> PixelDecoderConfig:
        lists = self.decoder_multipliers, self.decoder_attention
        try:
            multipliers, attention = ([int(n) for n in x.split(",") if n.strip()] for x in lists)
            sizes = latent_dim, self.decoder_channels, multipliers, self.decoder_blocks
            others = {"attn_resolutions": attention, "norm_groups": self.decoder_groups}
            return PixelDecoderConfig(*sizes, temporal_upsample=temporal, **others)
        except ValueError as error:
            names = "decoder_channels, decoder_multipliers, decoder_attention, decoder_groups"
            raise InputError(f"{names}: {error}") from error


TOY = Args(
    subset_names="toy",
    image_size=64,
    num_frames=2,
    stride=1,
    num_workers=0,
    encoder_type="pixels",
    pixel_patch=8,
    adapter=AdapterConfig("svae", 16, 1, 6, 384),  # latent width, layers, heads, hidden width
    use_pixel_decoder=True,
    decoder_channels=64,
    decoder_multipliers="1,1,2,2",
    decoder_blocks=1,
    lpips_weight=0.0,
    num_epochs=5,
    lr=1e-3,
    warmup_epochs=0.2,
    final_lr=0.05,
    val_every=200,
    save_every=200,
)


def lr_at(step: int, args: Args, steps_per_epoch: float) -> float:
    """Warm up linearly from lr / 1000, then follow half a cosine down to `final_lr` times lr."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.num_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (1e-3 + (1 - 1e-3) * step / warmup)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
    return args.lr * (args.final_lr + (1 - args.final_lr) * wave)


def ms_ssim(a: Tensor, b: Tensor, scales: int | None = None) -> Tensor:
    """Compare frames by structure at several scales; one scale is the plain SSIM.

    prod_s mean(contrast * structure at scale s)^w_s, at the last scale times luminance
    [Wang et al. 2003, eq. 7; 11x11 Gaussian window, sigma 1.5]. By default there are five scales
    or as many as leave 11 pixels; the exponents of fewer than five are brought to a sum of 1.
    Frames below 11 pixels are an InputError.

    a, b  (..., H, W, 3) in [0, 1] -> (...)
    """
    if (side := min(a.shape[-3:-1])) < 11:
        raise InputError(f"MS-SSIM: {side} pixels, its window has 11; raise crop or image_size")
    scales = scales or min(5, (side // 11).bit_length())
    exponents = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales]  # of floats: no copy to a GPU
    exponents = exponents if scales == 5 else [x / sum(exponents) for x in exponents]
    window = torch.exp(-(torch.arange(11, device=a.device) - 5.0).square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(15, 1, 1, 11)
    lead, out = a.shape[:-3], 1.0
    a, b = (x.reshape(-1, *x.shape[-3:]).movedim(-1, 1) for x in (a, b))  #         (N, 3, H, W)
    for s in range(scales):
        x = torch.cat((a, b, a * a, b * b, a * b), dim=1)
        x = F.conv2d(F.conv2d(x, window, groups=15), window.mT, groups=15)
        mean_a, mean_b, square_a, square_b, product = x.chunk(5, dim=1)
        spread = square_a - mean_a.square() + square_b - mean_b.square()
        y = (2 * (product - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
        if s == scales - 1:
            y = y * (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
        out = out * y.mean((2, 3)).relu() ** exponents[s]  #                               (N, 3)
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return out.mean(1).reshape(lead)


def load_lpips(device: torch.device) -> nn.Module:
    """Build LPIPS on VGG-16 from the file that torchvision would download; nothing is fetched."""
    import lpips

    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG.rpartition("/")[2]
    if not path.is_file():
        raise data.MissingFileError(
            f"{path}: no such file, and lpips_weight needs it; download {VGG} to that place, or "
            "train without the term: --lpips_weight 0"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision the old way
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = data.load_torch(path)
    names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    state = {name: trunk[there] for name, there in names.items() if there in trunk}
    data.load_strictly(model.net, state, str(path))
    return model.to(device).eval().requires_grad_(False)


class Critic(nn.Module):
    """Tell real frames from decoded ones, patch by patch: PatchGAN with spectral and batch norm."""

    def __init__(self):
        super().__init__()

        def conv(*args, **kwargs):
            return spectral_norm(nn.Conv2d(*args, kernel_size=4, padding=1, **kwargs))

        self.body = nn.Sequential(
            *(conv(3, 64, stride=2), nn.LeakyReLU(0.2)),
            *(conv(64, 128, stride=2, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2)),
            *(conv(128, 256, bias=False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2)),
            conv(256, 1),
        )

    def logits(self, frames: Tensor) -> Tensor:
        return self.body(2 * frames.flatten(0, -4).movedim(-1, 1) - 1)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the hinge loss [Lim and Ye 2017]."""
        return 0.5 * (F.relu(1 - self.logits(real)).mean() + F.relu(1 + self.logits(fake)).mean())


class Autoencoder(nn.Module):
    """Adapter and pixel decoder in one forward: all that DDP has to see of a step."""

    def __init__(self, adapter: nn.Module, pixel_decoder: nn.Module | None, joint: bool):
        super().__init__()
        self.adapter, self.pixel_decoder, self.joint = adapter, pixel_decoder, joint

    def forward(self, z: Tensor, eps: Tensor) -> tuple:
        """Return z', mean, logvar (if any) and, with a pixel decoder, decoded frames."""
        mean, logvar = (x if x is None else x.float() for x in self.adapter.posterior(z))
        u = self.adapter.refine(mean if logvar is None else mean + torch.exp(0.5 * logvar) * eps)
        z_rec, decoded = self.adapter.decode(u).float(), None
        if self.pixel_decoder is not None:
            decoded = self.pixel_decoder(u if self.joint else u.detach()).float()
        return z_rec, mean, logvar, decoded


def loss_terms(
    out: tuple,
    z: Tensor,
    frames: Tensor | None,
    args: Args,
    kl_weight: float,
    lpips: nn.Module | None = None,
) -> dict[str, tuple]:
    """Compare reconstructed features and decoded frames with true ones: {name: (weight, value)}."""
    z_rec, mean, logvar, decoded = out
    terms = {"mse": (1.0, F.mse_loss(z_rec, z))}
    terms["cosine"] = (args.cosine_weight, 1 - F.cosine_similarity(z_rec, z, dim=-1).mean())
    a, b = (torch.fft.rfft(x.flatten(-3, -2), dim=-2).abs() for x in (z_rec, z))
    terms["spectral"] = (args.spectral_weight, F.l1_loss(a, b))
    if logvar is not None:
        terms["kl"] = (kl_weight, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean())
    if decoded is None:
        return terms
    terms["pixel"] = (args.pixel_weight, F.mse_loss(decoded, frames))
    if lpips is not None:
        a, b = (2 * x.flatten(0, -4).movedim(-1, 1) - 1 for x in (decoded, frames))
        terms["lpips"] = (args.pixel_weight * args.lpips_weight, lpips(a, b).mean())
    if args.ms_ssim_weight:
        similarity = ms_ssim(decoded, frames).mean()
        terms["ms_ssim"] = (args.pixel_weight * args.ms_ssim_weight, 1 - similarity)
    return terms


def crop(z: Tensor, frames: Tensor | None, cells: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Cut a random window of latent cells out of features, and the same place out of frames."""
    rng, (h, w) = random.Random(seed), z.shape[-3:-1]
    y, x = (rng.randrange(max(1, n - cells + 1)) for n in (h, w))
    if frames is not None:
        p = frames.shape[-2] // w
        frames = frames[..., p * y : p * (y + cells), p * x : p * (x + cells), :]
    return z[..., y : y + cells, x : x + cells, :], frames


def adaptive_weight(loss: Tensor, gan: Tensor, last: nn.Parameter, proc: Processes) -> Tensor:
    """Weigh the GAN so that both losses pull alike at the last layer [Esser et al. 2021, eq. 7]."""
    grads = [torch.autograd.grad(x, last, retain_graph=True)[0] for x in (loss, gan)]
    norm, gan_norm = (proc.all_reduce(grad).norm() / proc.world_size for grad in grads)
    return (norm / (gan_norm + 1e-4)).clamp(0, 1e4)


@torch.no_grad()
def fit_pca(clips: Iterable[tuple], proc: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """Find mean (D,), principal axes (D, D) and their variances (D,), strongest axis first."""
    moments = 0.0
    for z, _ in clips:
        x = F.pad(z.flatten(0, -2).double(), (0, 1), value=1.0)  # the ones count and sum
        moments = moments + x.T @ x
    moments = proc.all_reduce(moments)
    mean = moments[-1, :-1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / moments[-1, -1] - mean.outer(mean)
    variances, axes = torch.linalg.eigh(covariance)  # ascending
    return mean.float(), axes.flip(1).float(), variances.flip(0).clamp_min(0).float()


@torch.no_grad()
def validate(
    model: Autoencoder, encoder: BaseAutoencoder, clips: Iterable, pca: tuple, proc: Processes
) -> tuple[dict[str, float], list]:
    """Average over held-out clips what adapter and decoder keep, and what an equal PCA keeps.

    The PCA's frames come from the encoder's own decoder; figures that need a decoder which does
    not exist are left out. Every process measures its share of the clips; all get the averages.
    ->  averages; of up to four clips the first frames (V, H, W, 3), real and, if there is a
        decoder, decoded, and the first features (V, h, w, D) before and after the adapter
    """
    (mean, basis), totals, shown = pca, {}, []
    for z, frames in clips:
        u, z_pca, decoded = model.adapter.encode(z), mean + (z - mean) @ basis @ basis.T, None
        z_rec = model.adapter.decode(u)
        if model.pixel_decoder is not None:
            decoded = model.pixel_decoder(u)
        elif encoder.has_decoder:
            decoded = encoder.decode(z_rec)
        values = {"clips": z.new_ones(1), "val_mse": (z_rec - z).square()}
        values["val_cosine"] = F.cosine_similarity(z_rec, z, dim=-1)
        values["pca_cosine"] = F.cosine_similarity(z_pca, z, dim=-1)
        if decoded is not None:
            values["val_psnr"] = psnr(decoded, frames)
            values["val_gauss_ssim"] = ms_ssim(decoded, frames, 1)
        if encoder.has_decoder:
            values["pca_psnr"] = psnr(encoder.decode(z_pca), frames)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + len(z) * value.double().mean()
        if len(shown) < 4:
            shown.append([x[:, 0] for x in (frames, decoded, z, z_rec) if x is not None])
    sums = proc.all_reduce(torch.stack([*totals.values()]))
    averages = dict(zip(totals, (sums / sums[0]).tolist(), strict=True))
    return averages | {"clips": int(sums[0])}, shown


def write_picture(path: Path, shown: list, pca: tuple) -> None:
    """Write a row for each frame that `validate` shows: real | decoded | features before | after.

    The colours of the features are their first three principal components, the same in both.
    """
    *columns, z, z_rec = (torch.cat(x) for x in zip(*shown, strict=True))
    colours = [(x - pca[0]) @ pca[1][:, :3] for x in (z, z_rec)]
    low, high = colours[0].amin((0, 1, 2)), colours[0].amax((0, 1, 2))
    for x in colours:
        x = ((x - low) / (high - low)).clamp(0, 1).movedim(-1, 1)
        columns.append(F.interpolate(x, columns[0].shape[1:3]).movedim(1, -1))
    picture = torch.cat([x.flatten(0, 1) for x in columns], dim=1)
    image = Image.fromarray(data.to_uint8(picture))
    data.write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


def main() -> None:
    # 1. Flags, processes, seed.
    args, proc = setup(Args, TOY, FIXED)
    device, on_cuda = proc.device, proc.device.type == "cuda"
    use_bf16 = on_cuda if args.bf16 is None else args.bf16
    use_compile = on_cuda if args.compile is None else args.compile
    use_gan = args.use_pixel_decoder and args.gan_weight > 0
    use_lpips = args.use_pixel_decoder and args.lpips_weight > 0 and args.pixel_weight > 0
    if use_gan and proc.world_size > 1 and not on_cuda:
        raise InputError(
            "gan_weight: several CPU processes cannot share the critic's batch norm; use one "
            "process, CUDA, or --gan_weight 0"
        )

    # 2. Frozen models.
    encoder = create_autoencoder(
        EncoderConfig(args.encoder_type, args.encoder_weights, patch_size=args.pixel_patch)
    ).to(device)
    if args.num_frames % encoder.temporal_stride:
        raise InputError(f"num_frames {args.num_frames}: {args.encoder_type} takes frames in pairs")
    lpips = load_lpips(device) if use_lpips else None

    # 3. Data: frames, cached features, or both.
    config = prepare_data(args, proc, num_history=0)
    train_set = EpisodeDataset(config, "train", as_stored=True)
    test_set = EpisodeDataset(config, "test")
    served = {"frames": train_set} if args.use_pixel_decoder or not args.cache_latents else {}
    if args.cache_latents:
        name = encoder.fingerprint
        data.fill_cache(config, proc, name, encoder.encode, encoder.temporal_stride)
        served["z"] = EpisodeDataset(config, "train", name, as_stored=True)

    def encode_batch(batch: dict[str, Clip]) -> tuple[Tensor, Tensor | None]:
        """Return features and frames, views folded: (B V, T, h, w, D), (B V, T, H, W, 3)."""
        x = {n: c.frames.to(device, non_blocking=True).flatten(0, -5) for n, c in batch.items()}
        z = x["z"].float() if "z" in x else encoder.encode(x["frames"])
        return z, data.to_floats(x["frames"]) if "frames" in x else None

    def one_by_one(dataset: EpisodeDataset) -> Iterable[tuple[Tensor, Tensor]]:
        """Go through this process's share of `val_clips` clips, one at a time."""
        for n in range(max(args.val_clips, proc.world_size))[proc.rank :: proc.world_size]:
            key = divmod(n, len(dataset))  # draw, clip: past the last, all come at other starts
            yield encode_batch({"frames": default_collate([dataset[key]])})

    # 4. The trained model.
    adapter, pixel_decoder = create_adapter(args.adapter, encoder.latent_dim), None
    adapter.encoder_config = dataclasses.asdict(encoder.config)
    adapter.encoder_fingerprint = encoder.fingerprint
    z = next(one_by_one(test_set))[0]
    if args.use_pixel_decoder:
        side = z.shape[-3] << args.decoder_multipliers.count(",")
        if side != args.image_size:
            raise InputError(
                f"decoder_multipliers {args.decoder_multipliers}: paints {side} pixels a side, but "
                f"image_size is {args.image_size}; each number but the first doubles the side"
            )
        pixel_decoder = PixelDecoder(
            args.pixel_decoder_config(adapter.latent_dim, encoder.temporal_stride == 2)
        )
    model = Autoencoder(adapter, pixel_decoder, args.stage == "psvae").to(device)
    mean, axes, variances = fit_pca(one_by_one(train_set), proc)
    pca = mean, axes[:, : adapter.latent_dim]
    if args.adapter.adapter_pca:
        adapter.init_from_pca(mean, axes, variances)

    # 5. Optimisers, compile, DDP. `model` is the raw module, `net` the one that is called.
    groups = [{"params": [*adapter.parameters()], "scale": 1.0, "name": "adapter"}]
    if pixel_decoder is not None:
        painter = {"scale": args.decoder_lr_scale, "name": "decoder"}
        groups.append({"params": [*pixel_decoder.parameters()], **painter})
    groups = [group for group in groups if group["params"]]  # an identity adapter has none
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    net, parts = wrap(model, proc, use_compile), {"model": model, "optimizer": optimizer}
    if use_gan:
        critic = Critic()
        if proc.world_size > 1:
            critic = nn.SyncBatchNorm.convert_sync_batchnorm(critic)
        critic_net = wrap(critic.to(device), proc)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), 4e-5, (0.0, 0.99), fused=True)
        parts |= {"critic": critic, "critic_optimizer": critic_optimizer}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)
    bound = {"max_norm": args.clip_grad or math.inf, "foreach": True}
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, **bound)

    # 6. The run folder: a new one, or one to go on with.
    folder = Path(args.resume or args.output_dir or f"outputs/adapter_{args.adapter.adapter_type}")
    forward = functools.partial(model, z, z.new_zeros((*z.shape[:-1], adapter.latent_dim)))
    run = Run(folder, args, proc, parts, train_set, encoder.fingerprint, COLUMNS, forward)
    sizes = (sum(p.numel() for p in group["params"]) / 1e6 for group in groups)
    run.print0(f"{' + '.join(f'{size:.2f}' for size in sizes)} M parameters")

    # 7. The loop, with one extra turn for the last validation and save.
    batches = run.start_loader(StackDataset(**served))
    while True:
        stopped = proc.any(bool(run.signals))
        if run.due(args.val_every) and not stopped:
            averages, shown = validate(model, encoder, one_by_one(test_set), pca, proc)
            run.log_row({"step": run.step, **averages})
            run.on_rank0(write_picture, folder / f"sample_{run.step:07d}.png", shown, pca)
        if run.due(args.save_every) or stopped:
            run.save()
            run.on_rank0(save_adapter, folder / "adapter.safetensors", adapter, pixel_decoder)
        if run.step >= run.last_step or stopped:
            break

        lr, seen = lr_at(run.step, args, run.epoch_steps), run.step * run.global_batch
        for group, flags in zip(optimizer.param_groups, groups, strict=True):  # not a checkpoint's
            group["lr"], group["weight_decay"] = lr * flags["scale"], args.weight_decay
        warm = args.kl_warmup * args.num_epochs * run.epoch_steps
        kl_weight = args.kl_weight * min(1.0, run.step / max(1.0, warm))
        for batch, draws in run.micro_steps(net, batches):
            z, frames = encode_batch(batch)
            if args.crop:
                z, frames = crop(z, frames, args.crop, args.seed + run.step)
            eps = draw(torch.randn, (*z.shape[:-1], adapter.latent_dim), z, **draws)
            with autocast:
                out = net(z, eps)
            judged = lpips if seen >= args.lpips_start else None
            terms, decoded = loss_terms(out, z, frames, args, kl_weight, judged), out[3]
            loss = sum(weight * value for weight, value in terms.values())
            if use_gan and seen >= args.gan_start:
                critic.requires_grad_(False)
                gan = -critic.logits(decoded).mean()
                last = pixel_decoder.conv_out.weight
                share = args.gan_weight * adaptive_weight(loss, gan, last, proc)
                terms["gan"], loss = (share, gan), loss + share * gan
            (loss / args.grad_accum).backward()
            if "gan" in terms:
                critic.requires_grad_(True)
                terms["critic"] = (0.0, critic_net(frames, decoded.detach()))
                (terms["critic"][1] / args.grad_accum).backward()
            run.accumulate(loss=loss, **{name: value for name, (_, value) in terms.items()})
        norms = {f"grad_{group['name']}": clip(group["params"]) for group in groups}
        run.update(*norms.values())
        run.log_losses(lr, **norms)

    run.end()
    run.print0(f"{folder / 'adapter.safetensors'} holds the adapter of step {run.step}")


if __name__ == "__main__":
    data.run_cli(main)
