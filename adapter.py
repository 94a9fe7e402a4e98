"""Compress frozen features to a few channels that diffuse well, and paint frames from them.

    features z --encode--> u --decode--> z'        S-VAE, MLP or identity      (one frame at a time)
                           u --PixelDecoder--> frames                          (LDM-style)

Shapes: T frames, h w latent grid, D feature width, C compact width, N frames folded.
    z  (..., h, w, D)      u  (..., h, w, C)      frames  (..., H, W, 3) in [0, 1]
The h w tokens of one frame are one attention sequence; leading axes may be any.

Sources: arXiv 2605.06388 (S-VAE, sizes, checkpoint layout); He et al. 2022, arXiv 2111.06377
(ViT-MAE block); Rombach et al. 2022, arXiv 2112.10752 (convolutional decoder).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import InputError

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
    adapter_pca: bool = False  # svae, flat: see principal axes of the features, begin as their PCA
    adapter_hidden_dim: int | None = None  # mlp: hidden width, default (D + C) // 2

    def __post_init__(self):
        if self.adapter_type not in ("identity", "mlp", "svae"):
            raise InputError(f"adapter_type {self.adapter_type!r}: choose identity, mlp or svae")
        plain = self.adapter_type == "svae" and not self.adapter_progressive
        if self.adapter_pca and (not plain or self.adapter_latent_layers):
            raise InputError("adapter_pca: needs a flat svae without latent layers")
        check_fields(self, may_be_zero=("adapter_latent_layers",))


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
    norm_groups: int = 32  # of every GroupNorm; with under 3 channels each, brightness gets lost

    def __post_init__(self):
        self.channel_multipliers = tuple(self.channel_multipliers)
        self.attn_resolutions = tuple(self.attn_resolutions)
        check_fields(self)
        levels = [GRID << i for i in range(len(self.channel_multipliers))]
        wrong = {
            "channel_multipliers: give 1 to 8 of them": not 1 <= len(levels) <= 8,
            f"attn_resolutions: levels are {levels}": {*self.attn_resolutions} - {*levels},
            "base_channels: needs a multiple of norm_groups": self.base_channels % self.norm_groups,
            "attn_heads: must divide base_channels": self.base_channels % self.attn_heads,
            "dropout: must be in [0, 1)": not 0 <= self.dropout < 1,
            "output_activation: sigmoid or none": self.output_activation not in ("sigmoid", "none"),
        }
        for message in (text for text, is_wrong in wrong.items() if is_wrong):
            raise InputError(f"{message} (now {getattr(self, message.partition(':')[0])!r})")


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
            raise InputError(f"{name} is {value!r}: needs whole numbers from {low} to {high}")
        if kind == "bool" and type(value) is not bool:
            raise InputError(f"{name} is {value!r}: needs True or False")


def most_heads(width: int, limit: int) -> int:
    """Return the largest number of heads up to `limit` that divides `width`."""
    return next(n for n in range(min(limit, width), 0, -1) if width % n == 0)


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


def stack(count: int, width: int, heads: int, hidden: int | None = None) -> nn.Sequential:
    """Stack transformer blocks; their MLPs are four times as wide as the tokens unless given."""
    hidden = hidden or 4 * width
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
        D, C = input_dim, self.latent_dim
        hidden = config.adapter_hidden_dim or (D + C) // 2

        def mlp(*widths: int) -> nn.Sequential:
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
            return nn.Sequential(*layers[:-1])

        self.encoder_mlp, self.decoder_mlp = mlp(D, hidden, hidden, C), mlp(C, hidden, hidden, D)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.encoder_mlp(super().posterior(z)[0]), None

    def decode(self, u: Tensor) -> Tensor:
        return self.decoder_mlp(super().decode(u))


class SVAEAdapter(Adapter):
    """Semantic VAE: transformer blocks on both sides of a Gaussian bottleneck.

    flat         z -> blocks, norm -> (mean, logvar)                    u -> blocks, norm -> z
    progressive  z -> blocks, norm -> mid block, norm -> (mean, logvar)   u -> mid block, norm -> ...
    With `adapter_latent_layers`, blocks of width C refine the draw before and after it is u.
    """

    def __init__(self, config: AdapterConfig, input_dim: int):
        super().__init__(config, input_dim)
        D, C, heads = input_dim, self.latent_dim, config.adapter_num_heads
        narrow_heads = config.adapter_latent_heads or most_heads(C, 8)
        if D % heads or C % narrow_heads:
            raise InputError(
                f"heads must divide their width: adapter_num_heads {heads} the {D} features (try "
                f"{most_heads(D, 16)}), adapter_latent_heads {narrow_heads} the {C} of the latent"
            )
        mid, layers = D, config.adapter_num_layers
        if config.adapter_progressive:
            mid, layers = config.adapter_mid_dim or int(math.sqrt(D * C)), max(layers - 1, 1)
            mid_heads = config.adapter_mid_heads or most_heads(mid, 16)
            mid = max(mid // mid_heads, 1) * mid_heads
            self.enc_norm_high, self.enc_down = nn.LayerNorm(D), nn.Linear(D, mid)
            self.enc_blocks_mid = stack(1, mid, mid_heads)
            self.dec_blocks_mid = stack(1, mid, mid_heads)
            self.dec_norm_mid, self.dec_up = nn.LayerNorm(mid), nn.Linear(mid, D)
        self.enc_blocks = stack(layers, D, heads, config.adapter_intermediate_size)
        self.dec_blocks = stack(layers, D, heads, config.adapter_intermediate_size)
        self.enc_norm, self.enc_proj = nn.LayerNorm(mid), nn.Linear(mid, 2 * C)
        self.dec_proj, self.dec_norm = nn.Linear(C, mid), nn.LayerNorm(D)
        if config.adapter_pca:
            self.register_buffer("center", torch.zeros(D))
            self.register_buffer("axes", torch.eye(D))
        if config.adapter_latent_layers:
            narrow = (config.adapter_latent_layers, C, narrow_heads)
            self.latent_enc_blocks, self.latent_enc_norm = stack(*narrow), nn.LayerNorm(C)
            self.latent_dec_blocks, self.latent_dec_norm = stack(*narrow), nn.LayerNorm(C)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        *lead, h, w, D = super().posterior(z)[0].shape
        z = (z - self.center) @ self.axes if self.config.adapter_pca else z
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
        z = self.dec_norm(self.dec_blocks(x)).reshape(*lead, h, w, -1)
        return z @ self.axes.T + self.center if self.config.adapter_pca else z

    @torch.no_grad()
    def begin_as_pca(self, mean: Tensor, axes: Tensor, variances: Tensor) -> None:
        """Make encode and decode the projection on the first principal axes, nearly.

        u_i = y_i / variance_i^(1/4),  y = (z - mean) @ axes;  blocks begin as the identity. A norm
        over channels would lose what its mean and its length carry (the grey level of raw patches:
        all channels alike); +-sink in the two weakest channels makes it nearly linear.

        mean, axes, variances  (D,), (D, D), (D,)   strongest axis first
        """
        self.center.copy_(mean), self.axes.copy_(axes)
        sink = 4 * variances.sum().sqrt()
        unit = sink * math.sqrt(2 / len(mean))  # the standard deviation that the norms divide by
        for blocks in (self.enc_blocks, self.dec_blocks):
            for dense in (d for b in blocks for d in (b.attention["output"], b.output)):
                dense["dense"].weight.zero_(), dense["dense"].bias.zero_()
            blocks[-1].output["dense"].bias[-2:] = torch.stack((sink, -sink))
        scale = variances[: self.latent_dim].clamp_min(1e-6 * variances[0]) ** 0.25
        for layer in (self.enc_proj, self.dec_proj):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        self.enc_proj.weight[: len(scale)].fill_diagonal_(1).mul_((unit / scale)[:, None])
        self.enc_proj.bias[len(scale) :] = -4.0  # logvar
        self.dec_proj.weight.fill_diagonal_(1).mul_(scale)
        self.dec_norm.weight.fill_(unit)[-2:] = 0.0


conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, eps=1e-6)


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions of the normalised input to the input."""

    def __init__(self, channels_in: int, channels_out: int, config: PixelDecoderConfig):
        super().__init__()
        self.norm1 = group_norm(config.norm_groups, channels_in)
        self.norm2 = group_norm(config.norm_groups, channels_out)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.dropout = nn.Dropout(config.dropout)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(y))))


class SpatialAttention(nn.Module):
    """Add attention among all positions of one frame."""

    def __init__(self, channels: int, config: PixelDecoderConfig):
        super().__init__()
        self.heads, self.norm = config.attn_heads, group_norm(config.norm_groups, channels)
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

    A level is residual blocks, perhaps attention, and (but for the outermost) doubling of the size.
    With `temporal_upsample` T latents give 2 T frames.
    """

    def __init__(self, config: PixelDecoderConfig):
        super().__init__()
        self.config, C = config, config.latent_dim
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        if config.temporal_upsample:
            self.temporal_upsample = nn.ConvTranspose1d(C, C, kernel_size=4, stride=2, padding=1)
        width = widths[0]
        self.proj_in = nn.Conv2d(C, width, 1)
        self.mid_block1 = ResidualBlock(width, width, config)
        self.mid_attn = SpatialAttention(width, config)
        self.mid_block2 = ResidualBlock(width, width, config)
        self.up_levels = nn.Sequential()
        for i, (inner, n) in enumerate(pairwise([width, *widths])):
            level, inputs = nn.Sequential(), [inner] + [n] * (config.num_res_blocks - 1)
            blocks = (ResidualBlock(m, n, config) for m in inputs)
            level.add_module("blocks", nn.Sequential(*blocks))
            if GRID << i in config.attn_resolutions:
                level.add_module("attn", SpatialAttention(n, config))
            if i < len(widths) - 1:
                level.add_module("upsample", nn.Sequential(nn.Upsample(scale_factor=2.0)))
                level.upsample.add_module("conv", conv3x3(n, n))
            self.up_levels.append(level)
        self.norm_out, self.conv_out = group_norm(config.norm_groups, n), conv3x3(n, 3)

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


def create_adapter(config: AdapterConfig, input_dim: int) -> Adapter:
    """Build an untrained adapter for features of width `input_dim`; its heads must divide it."""
    classes = {"identity": Adapter, "mlp": MLPAdapter, "svae": SVAEAdapter}
    return classes[config.adapter_type](config, input_dim)


def save_adapter(path: str | Path, adapter: Adapter, pixel_decoder: PixelDecoder | None) -> None:
    """Write weights, configs and the encoder they belong to as one safetensors file."""
    tensors, metadata = {}, {"pixel_decoder_config": None}
    metadata |= {
        n: getattr(adapter, n) for n in ("input_dim", "encoder_config", "encoder_fingerprint")
    }
    for part, module in (("adapter", adapter), ("pixel_decoder", pixel_decoder)):
        if module is not None:
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
            metadata[f"{part}_config"] = dataclasses.asdict(module.config)
    data.save_tensors(path, tensors, metadata)


def load_adapter(
    path: str | Path, fingerprint: str | None = None
) -> tuple[Adapter, PixelDecoder | None]:
    """Read our safetensors file or a released `.pt`: (adapter, pixel decoder), in eval mode.

    fingerprint  of the encoder that will feed the adapter; None: not compared
    Raises InputError when the file is damaged or belongs to another encoder.
    """
    try:
        read = data.load_tensors if Path(path).suffix == ".safetensors" else read_released
        tensors, metadata = read(path)
        make = partial(create_adapter, input_dim=metadata["input_dim"])
        adapter = build("adapter", make, AdapterConfig, tensors, metadata, str(path))
        pixel_decoder = build(
            "pixel_decoder", PixelDecoder, PixelDecoderConfig, tensors, metadata, str(path)
        )
        adapter.encoder_config = metadata["encoder_config"]
        adapter.encoder_fingerprint = metadata["encoder_fingerprint"]
        # A released file names only the type of its encoder, which every fingerprint begins with.
        own = adapter.encoder_fingerprint or (adapter.encoder_config or {}).get("encoder_type")
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: does not describe an adapter ({type(error).__name__}: {error}); choose a file "
            "that train_adapter.py wrote or a released adapter, or copy it again"
        ) from error
    if fingerprint and own and not f"{fingerprint}-".startswith(f"{own}-"):
        raise InputError(
            f"{path}: belongs to encoder {own}, not to {fingerprint}; choose that encoder with the "
            "weights and options the adapter was trained on, or another adapter"
        )
    return adapter, pixel_decoder


def build(
    part: str, make: Callable, cls: type, tensors: dict, metadata: dict, where: str
) -> nn.Module | None:
    """Make a part of a file, in eval mode, if it has it; no memory is taken before shapes agree."""
    if metadata[f"{part}_config"] is None:
        return None
    config = data.config_from(cls, metadata[f"{part}_config"], where)
    state = {n[len(part) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{part}.")}
    if wrong := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(f"{where}: {wrong[0]} holds no real numbers; copy the file again")
    try:
        with torch.device("meta"):
            module = make(config)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{where}: its config cannot be built: {error}") from error
    data.load_strictly(module, {name: t.to("meta") for name, t in state.items()}, where)
    data.load_strictly(module.to_empty(device="cpu"), state, where)
    return module.eval()


def read_released(path: str | Path) -> tuple[dict, dict]:
    """Translate a released file into ours: (tensors, metadata)."""

    def pick(cls: type, values: dict) -> dict:  # no shape shows heads: unknown ones stay, to fail
        names = {field.name for field in dataclasses.fields(cls)}
        return {n: v for n, v in values.items() if v is not None and (n in names or "head" in n)}

    file = data.load_torch(path)
    if not isinstance(file, dict):
        raise InputError(
            f"{path}: holds no dict of adapter_config and adapter; give an adapter file"
        )
    config, state = file["adapter_config"], data.strip_prefixes(file["adapter"], WRAPPERS)
    tensors, paint = {f"adapter.{name}": tensor for name, tensor in state.items()}, None
    last = {"svae": "dec_norm.weight", "mlp": "decoder_mlp.4.weight"}.get(config["adapter_type"])
    input_dim = state[last].shape[0] if last else config["adapter_latent_dim"]
    if state := data.strip_prefixes(file.get("pixel_decoder") or {}, WRAPPERS):
        # Configs without attn_* entries are older than attention inside the levels.
        paint = {"attn_resolutions": (), "attn_heads": 1, **file["pixel_decoder_config"]}
        paint = pick(PixelDecoderConfig, paint)
        input_dim = input_dim if last else paint["latent_dim"]
        for name, tensor in state.items():  # only the doubling of time has weights of three axes
            place, _, kind = name.rpartition(".")
            place = "temporal_upsample" if state[f"{place}.weight"].ndim == 3 else place
            tensors[f"pixel_decoder.{place}.{kind}"] = tensor
    metadata = {"adapter_config": pick(AdapterConfig, config), "pixel_decoder_config": paint}
    metadata |= {"encoder_config": file.get("encoder_config"), "encoder_fingerprint": None}
    return tensors, {**metadata, "input_dim": input_dim}
