"""Compress frozen features to a few channels that diffuse well, and paint frames from them.

    features z --encode--> u --decode--> z'        S-VAE, MLP or identity      (one frame at a time)
                           u --PixelDecoder--> frames                          (LDM-style)

Shapes: T frames, h w latent grid, D feature width, C compact width, N frames folded.
    z  (..., h, w, D)      u  (..., h, w, C)      frames  (..., H, W, 3) in [0, 1]
Every method takes any leading axes; the h * w tokens of one frame are one attention sequence.

Sources: arXiv 2605.06388 (S-VAE, sizes, checkpoint layout); He et al. 2022, arXiv 2111.06377
(ViT-MAE block); Rombach et al. 2022, arXiv 2112.10752 (convolutional decoder).
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    InputError,
    config_from,
    load_strictly,
    load_tensors,
    load_torch,
    save_tensors,
    strip_prefixes,
)

WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and DDP put these before every key
GRID = 16  # where the pixel decoder starts: 256x256 frames, 16 pixels a token


@dataclasses.dataclass
class AdapterConfig:
    """Describe an adapter; stored beside its weights under the names of the released files."""

    adapter_type: str = "svae"  # identity | mlp | svae
    adapter_latent_dim: int = 96  # C: channels that the world model sees
    adapter_num_layers: int = 3  # svae: transformer blocks on each side
    adapter_num_heads: int = 16  # svae: heads of these blocks; must divide the feature width
    adapter_intermediate_size: int = 1024  # svae: hidden width of their MLPs
    adapter_progressive: bool = False  # svae: narrow in two steps, D -> mid -> C
    adapter_mid_dim: int | None = None  # progressive: mid width, default sqrt(D C)
    adapter_mid_heads: int | None = None  # progressive: default the most <= 16 that divide mid
    adapter_latent_layers: int = 0  # svae: refinement blocks at width C on each side
    adapter_latent_heads: int | None = None  # their heads: default the most <= 8 that divide C
    adapter_hidden_dim: int | None = None  # mlp: hidden width, default (D + C) // 2

    def __post_init__(self):
        if self.adapter_type not in ("identity", "mlp", "svae"):
            raise ValueError(f"adapter_type {self.adapter_type!r}: choose identity, mlp or svae")
        check_fields(self, may_be_zero=("adapter_latent_layers",))
        if self.adapter_latent_layers and self.adapter_latent_dim % (
            self.adapter_latent_heads or 1
        ):
            raise ValueError(
                f"adapter_latent_heads {self.adapter_latent_heads} does not divide "
                f"adapter_latent_dim {self.adapter_latent_dim}; choose a divisor"
            )


@dataclasses.dataclass
class PixelDecoderConfig:
    """Describe a pixel decoder; it enlarges the grid 2^(levels - 1) times."""

    latent_dim: int = 96  # C: channels of u
    base_channels: int = 160  # width of the outermost level: 160 in the paper, 128 in its code
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 4, 8)  # outermost to innermost level
    num_res_blocks: int = 2  # residual blocks a level
    dropout: float = 0.0  # inside the residual blocks
    output_activation: str = "sigmoid"  # sigmoid | none
    temporal_upsample: bool = False  # two frames from each latent (Qwen video features)
    attn_resolutions: tuple[int, ...] = (16,)  # levels with attention: 16, 32, 64, ... from inside
    attn_heads: int = 4  # heads of every attention

    def __post_init__(self):
        self.channel_multipliers = tuple(self.channel_multipliers)
        self.attn_resolutions = tuple(self.attn_resolutions)
        check_fields(self)
        levels = [GRID << i for i in range(len(self.channel_multipliers))]
        if not 1 <= len(levels) <= 8:
            raise ValueError(f"channel_multipliers {self.channel_multipliers}: give 1 to 8 numbers")
        if not set(self.attn_resolutions) <= set(levels):
            raise ValueError(f"attn_resolutions {self.attn_resolutions}: the levels are {levels}")
        if self.base_channels % 32 or self.base_channels % self.attn_heads:
            raise ValueError(
                f"base_channels {self.base_channels} must be a multiple of 32 (GroupNorm) and of "
                f"attn_heads {self.attn_heads}; try {math.lcm(32, self.attn_heads)}"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r} is not a number in [0, 1)")
        if self.output_activation not in ("sigmoid", "none"):
            raise ValueError(f"output_activation {self.output_activation!r}: sigmoid or none")


def check_fields(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Refuse values that no network can have, and sizes that only a damaged file would ask for."""
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        low = 0 if name in may_be_zero else 1
        high = 128 if name.endswith(("layers", "blocks")) else 65_536
        numbers = value if kind.startswith("tuple") else (value,)
        if value is None and kind.endswith("None"):
            continue
        if "int" in kind and not all(type(n) is int and low <= n <= high for n in numbers):
            raise ValueError(f"{name} {value!r}: needs whole numbers from {low} to {high}")
        if kind == "bool" and type(value) is not bool:
            raise ValueError(f"{name} {value!r}: needs True or False")


def most_heads(width: int, limit: int) -> int:
    """Return the largest number of heads up to `limit` that divides `width`."""
    return next(n for n in range(min(limit, width), 0, -1) if width % n == 0)


# ------------------------------------------------------------------------------------------------
# Adapters


class TransformerBlock(nn.Module):
    """Mix tokens by pre-norm self-attention and an erf-GELU MLP, with the key names of ViT-MAE."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-12):
        super().__init__()
        self.heads = heads
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps) for _ in range(2))
        project = nn.ModuleDict({n: nn.Linear(width, width) for n in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": project, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        y, project = self.layernorm_before(x), self.attention["attention"]
        heads = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (project[n](y).unflatten(-1, heads).transpose(1, 2) for n in project)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](y)
        y = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](y)


def stack(count: int, width: int, heads: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(count)))


class Adapter(nn.Module):
    """Pass features through: the identity adapter, and what every adapter can do.

    posterior(z) -> (mean, logvar)  of the Gaussian over latents; logvar None: deterministic
    refine(u)    -> u               from a draw (or the mean) to what decode and the DiT see
    encode(z)    -> u               = refine(mean)
    decode(u)    -> z
    """

    encoder_config: dict | None = None  # the encoder whose features it was trained on, ...
    encoder_fingerprint: str | None = None  # ... as its file names it

    def __init__(self, config: AdapterConfig, input_dim: int):
        super().__init__()
        self.config, self.input_dim = config, input_dim
        identity = config.adapter_type == "identity"
        self.latent_dim = input_dim if identity else config.adapter_latent_dim

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        assert z.shape[-1] == self.input_dim, (tuple(z.shape), self.input_dim)
        return z, None

    def refine(self, u: Tensor) -> Tensor:
        return u

    def encode(self, z: Tensor) -> Tensor:
        """Return the latent of the posterior mean, in training mode too."""
        return self.refine(self.posterior(z)[0])

    def decode(self, u: Tensor) -> Tensor:
        assert u.shape[-1] == self.latent_dim, (tuple(u.shape), self.latent_dim)
        return u


class MLPAdapter(Adapter):
    """Map each token alone: two MLPs with two hidden layers, no posterior."""

    def __init__(self, config: AdapterConfig, input_dim: int):
        super().__init__(config, input_dim)
        D, C, hidden = input_dim, self.latent_dim, config.adapter_hidden_dim
        hidden = hidden or (D + C) // 2

        def mlp(width_in: int, width_out: int) -> nn.Sequential:
            first, middle = nn.Linear(width_in, hidden), nn.Linear(hidden, hidden)
            return nn.Sequential(first, nn.GELU(), middle, nn.GELU(), nn.Linear(hidden, width_out))

        self.encoder_mlp, self.decoder_mlp = mlp(D, C), mlp(C, D)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.encoder_mlp(super().posterior(z)[0]), None

    def decode(self, u: Tensor) -> Tensor:
        return self.decoder_mlp(super().decode(u))


class SVAEAdapter(Adapter):
    """Semantic VAE: transformer blocks on both sides of a Gaussian bottleneck.

    flat         z -> blocks, norm -> (mean, logvar)                    u -> blocks, norm -> z
    progressive  z -> blocks, norm -> mid block, norm -> (mean, logvar)   u -> mid block, norm -> ...
    With `adapter_latent_layers`, blocks of width C refine the draw before and after it is u.

    Raises ValueError when a number of heads does not divide its width.
    """

    def __init__(self, config: AdapterConfig, input_dim: int):
        super().__init__(config, input_dim)
        D, C, heads = input_dim, self.latent_dim, config.adapter_num_heads
        if D % heads:
            raise ValueError(
                f"adapter_num_heads {heads} does not divide the feature width {D}; "
                f"choose a divisor, for example {most_heads(D, 16)}"
            )
        wide, mid, layers = (
            (D, heads, config.adapter_intermediate_size),
            D,
            config.adapter_num_layers,
        )
        if config.adapter_progressive:
            mid, layers = config.adapter_mid_dim or int(math.sqrt(D * C)), max(layers - 1, 1)
            heads = config.adapter_mid_heads or most_heads(mid, 16)
            mid = max(mid // heads, 1) * heads
            self.enc_norm_high, self.enc_down = nn.LayerNorm(D), nn.Linear(D, mid)
            self.enc_blocks_mid = stack(1, mid, heads, 4 * mid)
            self.dec_blocks_mid = stack(1, mid, heads, 4 * mid)
            self.dec_norm_mid, self.dec_up = nn.LayerNorm(mid), nn.Linear(mid, D)
        self.enc_blocks, self.dec_blocks = stack(layers, *wide), stack(layers, *wide)
        self.enc_norm, self.enc_proj = nn.LayerNorm(mid), nn.Linear(mid, 2 * C)
        self.dec_proj, self.dec_norm = nn.Linear(C, mid), nn.LayerNorm(D)
        if count := config.adapter_latent_layers:
            narrow = (C, config.adapter_latent_heads or most_heads(C, 8), 4 * C)
            self.latent_enc_blocks, self.latent_enc_norm = stack(count, *narrow), nn.LayerNorm(C)
            self.latent_dec_blocks, self.latent_dec_norm = stack(count, *narrow), nn.LayerNorm(C)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        *lead, h, w, D = super().posterior(z)[0].shape
        x = self.enc_blocks(z.reshape(-1, h * w, D))  #                                  (N, hw, D)
        if self.config.adapter_progressive:
            x = self.enc_blocks_mid(self.enc_down(self.enc_norm_high(x)))  #           (N, hw, mid)
        moments = self.enc_proj(self.enc_norm(x))  #                                    (N, hw, 2C)
        return moments.reshape(*lead, h, w, -1).chunk(2, dim=-1)

    def refine(self, u: Tensor) -> Tensor:
        if not self.config.adapter_latent_layers:
            return u
        x = u.reshape(-1, u.shape[-3] * u.shape[-2], u.shape[-1])  #                     (N, hw, C)
        return self.latent_enc_norm(self.latent_enc_blocks(x)).reshape(u.shape)

    def decode(self, u: Tensor) -> Tensor:
        *lead, h, w, C = super().decode(u).shape
        x = u.reshape(-1, h * w, C)  #                                                   (N, hw, C)
        if self.config.adapter_latent_layers:
            x = self.latent_dec_norm(self.latent_dec_blocks(x))
        x = self.dec_proj(x)  #                                             (N, hw, D), mid or flat
        if self.config.adapter_progressive:
            x = self.dec_up(self.dec_norm_mid(self.dec_blocks_mid(x)))  #                (N, hw, D)
        return self.dec_norm(self.dec_blocks(x)).reshape(*lead, h, w, -1)


# ------------------------------------------------------------------------------------------------
# Pixel decoder (channels first inside)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions of the normalised input to the input."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels_in), group_norm(channels_out)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.dropout = nn.Dropout(dropout)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(y))))


class SpatialAttention(nn.Module):
    """Add attention among all positions of one frame."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in "qkvp")

    def forward(self, x: Tensor) -> Tensor:
        y, heads = self.norm(x), (self.heads, x.shape[1] // self.heads)
        q, k, v = (
            f(y).flatten(2).unflatten(1, heads).transpose(2, 3) for f in (self.q, self.k, self.v)
        )  #                                                                     (N, heads, HW, -)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return x + self.proj_out(y)


class PixelDecoder(nn.Module):
    """Paint frames from latents: u (..., T, h, w, C) -> (..., T, H, W, 3).

    A level is residual blocks, perhaps attention, and (all but the outermost) doubling of the
    size. With `temporal_upsample` T latents give 2 T frames.
    """

    def __init__(self, config: PixelDecoderConfig):
        super().__init__()
        self.config, C = config, config.latent_dim
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        if config.temporal_upsample:
            self.temporal_upsample = nn.ConvTranspose1d(C, C, kernel_size=4, stride=2, padding=1)
        width = widths[0]
        self.proj_in = nn.Conv2d(C, width, 1)
        self.mid_block1 = ResidualBlock(width, width, config.dropout)
        self.mid_attn = SpatialAttention(width, config.attn_heads)
        self.mid_block2 = ResidualBlock(width, width, config.dropout)
        self.up_levels = nn.Sequential()
        for i, width_out in enumerate(widths):
            level, blocks = OrderedDict(), nn.Sequential()
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, width_out, config.dropout))
                width = width_out
            level["blocks"] = blocks
            if GRID << i in config.attn_resolutions:
                level["attn"] = SpatialAttention(width, config.attn_heads)
            if i < len(widths) - 1:
                double, conv = nn.Upsample(scale_factor=2.0), conv3x3(width, width)
                level["upsample"] = nn.Sequential(OrderedDict(nearest=double, conv=conv))
            self.up_levels.append(nn.Sequential(level))
        self.norm_out, self.conv_out = group_norm(width), conv3x3(width, 3)

    def forward(self, u: Tensor) -> Tensor:
        *lead, T, h, w, C = u.shape
        assert C == self.config.latent_dim, (tuple(u.shape), self.config.latent_dim)
        if self.config.temporal_upsample:
            x = u.reshape(-1, T, h * w, C).permute(0, 2, 3, 1)  #                     (B, hw, C, T)
            x = self.temporal_upsample(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, hw, C, 2T)
            u, T = x.permute(0, 3, 1, 2), 2 * T
        x = u.reshape(-1, h, w, C).permute(0, 3, 1, 2)  #                              (N, C, h, w)
        x = self.mid_block2(self.mid_attn(self.mid_block1(self.proj_in(x))))
        x = self.up_levels(x)  #                                                    (N, base, H, W)
        x = self.conv_out(F.silu(self.norm_out(x))).permute(0, 2, 3, 1)  #             (N, H, W, 3)
        x = x.sigmoid() if self.config.output_activation == "sigmoid" else x
        return x.reshape(*lead, T, *x.shape[1:])


# ------------------------------------------------------------------------------------------------
# Build, save, load


def create_adapter(config: AdapterConfig, input_dim: int) -> Adapter:
    """Build an untrained adapter for features of width `input_dim`."""
    classes = {"identity": Adapter, "mlp": MLPAdapter, "svae": SVAEAdapter}
    return classes[config.adapter_type](config, input_dim)


def save_adapter(path: str | Path, adapter: Adapter, pixel_decoder: PixelDecoder | None) -> None:
    """Write weights, configs and the encoder they belong to as one safetensors file."""
    parts = {"adapter": adapter, "pixel_decoder": pixel_decoder}
    parts = {name: module for name, module in parts.items() if module is not None}
    tensors = {f"{p}.{name}": t for p, m in parts.items() for name, t in m.state_dict().items()}
    metadata = {f"{part}_config": dataclasses.asdict(m.config) for part, m in parts.items()}
    origin = ("input_dim", "encoder_config", "encoder_fingerprint")
    metadata |= {name: getattr(adapter, name) for name in origin}
    save_tensors(path, tensors, {"pixel_decoder_config": None, **metadata})


def load_adapter(
    path: str | Path, fingerprint: str | None = None
) -> tuple[Adapter, PixelDecoder | None]:
    """Read our safetensors file or a released `.pt`: (adapter, pixel decoder), in eval mode.

    fingerprint  of the encoder that will feed the adapter; None: not compared
    Raises InputError when the file is damaged or belongs to another encoder.
    """
    try:
        read = load_tensors if Path(path).suffix == ".safetensors" else read_released
        tensors, metadata = read(path)
        config = config_from(AdapterConfig, metadata["adapter_config"], str(path))
        adapter = build(tensors, "adapter.", path, create_adapter, config, metadata["input_dim"])
        adapter.encoder_config = metadata["encoder_config"]
        adapter.encoder_fingerprint = metadata["encoder_fingerprint"]
        pixel_decoder = None
        if metadata["pixel_decoder_config"] is not None:
            config = config_from(PixelDecoderConfig, metadata["pixel_decoder_config"], str(path))
            pixel_decoder = build(tensors, "pixel_decoder.", path, PixelDecoder, config)
        # A released file names only the type of its encoder, which every fingerprint begins with.
        own = adapter.encoder_fingerprint or (adapter.encoder_config or {}).get("encoder_type")
        if fingerprint and own and not f"{fingerprint}-".startswith(f"{own}-"):
            raise InputError(
                f"{path}: belongs to encoder {own}, not to {fingerprint}; choose that encoder with "
                "the weights and options the adapter was trained on, or another adapter"
            )
        return adapter, pixel_decoder
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: does not describe an adapter ({type(error).__name__}: {error}); choose a file "
            "that train_adapter.py wrote or a released adapter, or copy it again"
        ) from error


def build(tensors: dict, prefix: str, where: Any, make: Callable, *args: Any) -> nn.Module:
    """Fill make(*args) with the tensors under a prefix; no memory is taken before shapes agree."""
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if wrong := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(f"{where}: {wrong[0]} does not hold real numbers; copy the file again")
    try:
        with torch.device("meta"):
            module = make(*args)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{where}: its config cannot be built: {error}") from error
    load_strictly(module, {name: tensor.to("meta") for name, tensor in state.items()}, str(where))
    module.to_empty(device="cpu")
    load_strictly(module, state, str(where))
    return module.eval()


def read_released(path: str | Path) -> tuple[dict, dict]:
    """Translate a released file into ours: (tensors, metadata)."""

    def pick(cls: type, values: dict) -> dict:  # no shape shows heads: unknown ones stay, to fail
        names = {field.name for field in dataclasses.fields(cls)}
        return {n: v for n, v in values.items() if v is not None and (n in names or "head" in n)}

    file = load_torch(path)
    config, state = file["adapter_config"], strip_prefixes(file["adapter"], WRAPPERS)
    tensors = {f"adapter.{name}": tensor for name, tensor in state.items()}
    last = {"svae": "dec_norm.weight", "mlp": "decoder_mlp.4.weight"}.get(config["adapter_type"])
    input_dim, paint = state[last].shape[0] if last else config["adapter_latent_dim"], None
    if state := strip_prefixes(file.get("pixel_decoder") or {}, WRAPPERS):
        # Configs without attn_* entries are older than attention inside the levels.
        paint = {"attn_resolutions": (), "attn_heads": 1, **file["pixel_decoder_config"]}
        paint, input_dim = (
            pick(PixelDecoderConfig, paint),
            input_dim if last else paint["latent_dim"],
        )
        for name, tensor in state.items():  # only the doubling of time has weights of three axes
            place, _, kind = name.rpartition(".")
            doubling = state[f"{place}.weight"].ndim == 3
            tensors[f"pixel_decoder.{'temporal_upsample' if doubling else place}.{kind}"] = tensor
    return tensors, {
        "adapter_config": pick(AdapterConfig, config),
        "pixel_decoder_config": paint,
        "input_dim": input_dim,
        "encoder_config": file.get("encoder_config"),
        "encoder_fingerprint": None,
    }
