"""Turn frames into latents and back with frozen public networks, or without any.

    frames (B, T, H, W, 3) --resize, normalise--> network --standardise--> z (B, T', h, w, C)
    z --un-standardise--> decoder --clamp--> frames

Shapes: B batch, T frames, H W pixels, h w latent grid, C latent channels, D network width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError

ENCODER_TYPES = ("pixels", "vae", "rae", "scale_rae_siglip", "scale_rae_webssl", "qwen", "vjepa2")
ENCODER_TYPES += ("cosmos", "vavae")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Choose an encoder, its files and its options."""

    encoder_type: str = "pixels"  # one of ENCODER_TYPES
    weights: str | None = None  # file, folder or hub id; none: the public release
    decoder_weights: str | None = None  # the same for the decoder of rae and scale_rae_*
    latent_stats: str | None = None  # file of latent mean/var or mean/std to standardise with
    image_size: int | None = None  # side frames are resized to; none: the release's, or as they are
    qwen_mode: str = "video"  # video: two frames a latent; image: one
    sd3_shift: bool = False  # vae: subtract the shift factor, as Stable Diffusion 3 does
    standardize: bool = False  # vavae, rae: standardise with the statistics of the release
    final_norm: bool = True  # scale_rae_siglip: end with the layer norm its decoder was trained on
    patch_size: int = 16  # pixels: side of the patch that becomes one latent

    def __post_init__(self):
        if self.encoder_type not in ENCODER_TYPES:
            raise ValueError(
                f"encoder_type {self.encoder_type!r} is not one of {', '.join(ENCODER_TYPES)}"
            )
        if self.qwen_mode not in ("video", "image"):
            raise ValueError(f"qwen_mode {self.qwen_mode!r} is neither 'video' nor 'image'")
        if self.patch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError("patch_size and image_size must be positive")


class BaseAutoencoder(nn.Module):
    """The one contract: encode and decode, frozen, deterministic, in chunks, float32 outside.

    latent_dim       channels C of a latent
    stride           pixels a side of a latent cell
    temporal_stride  frames a latent stands for
    has_decoder      whether decode works
    fingerprint      names the latent space: type, weights and options; not the decoder

    Subclasses map (N, 3, H, W) in [0, 1] to (N / temporal_stride, h, w, C), and back.
    """

    temporal_stride = 1
    chunk = 32  # frames a network call

    def __init__(self, config: EncoderConfig, latent_dim: int, stride: int, has_decoder: bool):
        super().__init__()
        self.config, self.latent_dim, self.stride = config, latent_dim, stride
        self.has_decoder = has_decoder
        self.image_size = config.image_size
        self.dtype: torch.dtype | None = None  # of the networks; none: bf16 on CUDA, else float32
        self._checked_on_gpu = False
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # carries the device
        self.eval()

    @property
    def fingerprint(self) -> str:
        options = dataclasses.asdict(self.config)
        for path in ("weights", "decoder_weights", "latent_stats"):
            del options[path]  # files count by what is in them
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        return f"{self.config.encoder_type}-{digest.hexdigest()[:16]}"

    def train(self, mode: bool = True):
        """Stay in evaluation mode: a frozen network has no other."""
        return super().train(False)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pixels(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def check_frames(self, frames: Tensor) -> None:
        """Refuse what is no video. On CUDA only the first batch's values are read (a host sync)."""
        if frames.ndim < 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"frames are {tuple(frames.shape)}; give (B, T, H, W, 3), RGB last")
        if frames.dtype == torch.uint8:
            return
        if not frames.is_floating_point():
            raise InputError(f"frames are {frames.dtype}; give uint8, or floats in [0, 1]")
        if frames.is_cuda and self._checked_on_gpu:
            return
        self._checked_on_gpu = frames.is_cuda
        low, high = (value.item() for value in torch.aminmax(frames))
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false for NaN
            raise InputError(
                f"frames reach from {low:.4g} to {high:.4g}; give floats in [0, 1] (divide 0..255 "
                "by 255, map -1..1 by (x + 1) / 2), or uint8"
            )

    def prepare(self, frames: Tensor) -> Tensor:
        """Move (N, H, W, 3) to the device as (N, 3, H, W) in [0, 1], resized if need be."""
        x = frames.to(self.anchor.device, non_blocking=True).movedim(-1, 1)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        size = (self.image_size or x.shape[2], self.image_size or x.shape[3])
        if x.shape[2:] != size:  # as upstream: no antialias, so it overshoots [0, 1] at edges
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        if size[0] % self.stride or size[1] % self.stride:
            raise InputError(
                f"frames of {size[0]}x{size[1]} pixels: {self.config.encoder_type} needs both "
                f"sides to be multiples of {self.stride}; crop them or set image_size"
            )
        return x

    def settle(self) -> None:
        """Give the networks the dtype of the device they are on, once after each move."""
        dtype = self.dtype or (torch.bfloat16 if self.anchor.is_cuda else torch.float32)
        for network in self.children():
            if next(network.parameters()).dtype != dtype:
                network.to(dtype)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames; the same frames always give the same latents.

        frames  (B, T, H, W, 3)    uint8, or floats in [0, 1]; other leading axes are kept too
        ->      (B, T', h, w, C)   float32, T' = ceil(T / temporal_stride)
        Raises InputError for another layout, range or size.
        """
        self.check_frames(frames)
        self.settle()
        lead, time = frames.shape[:-4], frames.shape[-4]
        if missing := -time % self.temporal_stride:  # an odd video repeats its last frame
            frames = torch.cat([frames, *[frames[..., -1:, :, :, :]] * missing], dim=-4)
        with torch.autocast(self.anchor.device.type, enabled=False):
            parts = frames.flatten(0, -4).split(self.chunk)
            z = torch.cat([self.features(self.prepare(part)).float() for part in parts])
        return z.unflatten(0, (*lead, -1))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to frames in [0, 1].

        z   (B, T', h, w, C)    other leading axes are kept too
        ->  (B, T', H, W, 3)    float32
        Raises InputError when this encoder has no decoder or the latents are another's.
        """
        name = self.config.encoder_type
        if not self.has_decoder:
            raise InputError(
                f"{name} has no decoder; train a pixel decoder for its latents: "
                f"python train_adapter.py --encoder_type {name} --use_pixel_decoder true"
            )
        if z.ndim < 4 or z.shape[-1] != self.latent_dim or 0 in z.shape:
            raise InputError(
                f"latents are {tuple(z.shape)}; {name} decodes (B, T, h, w, {self.latent_dim})"
            )
        self.settle()
        with torch.autocast(self.anchor.device.type, enabled=False):
            parts = z.to(self.anchor.device).float().flatten(0, -4).split(self.chunk)
            x = torch.cat([self.pixels(part).float().clamp(0, 1) for part in parts])
        return x.movedim(1, -1).unflatten(0, z.shape[:-3])


class PixelAutoencoder(BaseAutoencoder):
    """Cut frames into patches: z = the p x p x 3 values 2x - 1 of a patch.

    The map is orthonormal and undone exactly. A cosine transform would be a rotation of the same
    channels, which neither Gaussian noise, nor a squared error, nor the network's first and last
    linear layers can tell from this one: so the plainest basis is kept.
    """

    chunk = 4096

    def __init__(self, config: EncoderConfig):
        p = config.patch_size
        super().__init__(config, latent_dim=3 * p * p, stride=p, has_decoder=True)

    def features(self, x: Tensor) -> Tensor:
        p = self.stride
        x = (2 * x - 1).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (N, 3, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)  #               (N, h, w, p p 3)

    def pixels(self, z: Tensor) -> Tensor:
        p = self.stride
        x = z.unflatten(3, (p, p, 3)).permute(0, 5, 1, 3, 2, 4)  #     (N, 3, h, p, w, p)
        return (x.flatten(4).flatten(2, 3) + 1) / 2


def create_autoencoder(config: EncoderConfig) -> BaseAutoencoder:
    """Build the encoder named in the config and load its weights strictly."""
    if config.encoder_type == "pixels":
        return PixelAutoencoder(config)
    raise InputError(f"{config.encoder_type} is being written")
