"""Compress frozen features to a few channels that diffuse well, and paint frames from them.

    features z --encode--> u --decode--> z'        S-VAE, MLP or identity      (one frame at a time)
                           u --PixelDecoder--> frames                          (LDM-style)

Shapes: T frames, h w latent grid, D feature width, C compact width, N frames folded.
    z  (..., h, w, D)      u  (..., h, w, C)      frames  (..., H, W, 3) in [0, 1]
The h w tokens of one frame are one attention sequence; leading axes may be any. What is u here is
the world model's z.

Sources: arXiv 2605.06388 (S-VAE, sizes, checkpoint layout); He et al. 2022, arXiv 2111.06377
(ViT-MAE block); Rombach et al. 2022, arXiv 2112.10752 (convolutional decoder).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import InputError

GRID = 16  # where the pixel decoder starts: 256x256 frames, 16 pixels a token
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, eps=1e-6)


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
        check_fields(self)


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
        kinds = ("sigmoid", "none")
        for name, wrong, remedy in (
            ("channel_multipliers", not 1 <= len(levels) <= 8, "give 1 to 8 of them"),
            ("attn_resolutions", {*self.attn_resolutions} - {*levels}, f"levels are {levels}"),
            ("base_channels", self.base_channels % self.norm_groups, "norm_groups must divide it"),
            ("attn_heads", self.base_channels % self.attn_heads, "it must divide base_channels"),
            ("dropout", not 0 <= self.dropout < 1, "choose a share in [0, 1)"),
            ("output_activation", self.output_activation not in kinds, f"choose among {kinds}"),
        ):
            if wrong:
                raise InputError(f"{name} is {getattr(self, name)!r}; {remedy}")


def check_fields(config: AdapterConfig | PixelDecoderConfig) -> None:
    """Refuse values that no network can have, and sizes that only a damaged file would ask for."""
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if value is None and kind.endswith("None"):
            continue
        low, high = int(field.default != 0), 128 if name.endswith(("layers", "blocks")) else 65_536
        numbers = value if kind.startswith("tuple") else (value,)
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
        (*_, h, w, width), heads = x.shape, self.heads
        y, project = self.layernorm_before(x), self.attention["attention"].values()
        parts = (f(y).reshape(-1, h * w, heads, width // heads) for f in project)
        q, k, v = (part.transpose(1, 2) for part in parts)  #                   (N, heads, hw, -)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.attention["output"]["dense"](y)
        y = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](y)


def make_blocks(count: int, width: int, heads: int, hidden: int) -> nn.Sequential:
    """Stack transformer blocks; a stack of none is the identity."""
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
        for name, first, last in (("encoder_mlp", D, C), ("decoder_mlp", C, D)):
            a, b, c = nn.Linear(first, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, last)
            self.add_module(name, nn.Sequential(a, nn.GELU(), b, nn.GELU(), c))

    def posterior(self, z: Tensor) -> tuple[Tensor, None]:
        return self.encoder_mlp(super().posterior(z)[0]), None

    def decode(self, u: Tensor) -> Tensor:
        return self.decoder_mlp(super().decode(u))


class SVAEAdapter(Adapter):
    """Semantic VAE: transformer blocks on both sides of a Gaussian bottleneck.

    A progressive one narrows in two steps, D -> mid -> C. With `adapter_latent_layers`, blocks of
    width C refine the draw before and after it is u.
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
        mid, mid_heads, layers = D, 1, config.adapter_num_layers
        mid_norm = mid_linear = nn.Identity  # which takes any sizes
        if config.adapter_progressive:
            mid, layers = config.adapter_mid_dim or int(math.sqrt(D * C)), max(layers - 1, 1)
            mid_heads = config.adapter_mid_heads or most_heads(mid, 16)
            mid = max(mid // mid_heads, 1) * mid_heads
            mid_norm, mid_linear = nn.LayerNorm, nn.Linear
        middle = (int(config.adapter_progressive), mid, mid_heads, 4 * mid)
        self.enc_norm_high, self.enc_down = mid_norm(D), mid_linear(D, mid)
        self.enc_blocks_mid, self.dec_blocks_mid = make_blocks(*middle), make_blocks(*middle)
        self.dec_norm_mid, self.dec_up = mid_norm(mid), mid_linear(mid, D)
        self.enc_blocks = make_blocks(layers, D, heads, config.adapter_intermediate_size)
        self.dec_blocks = make_blocks(layers, D, heads, config.adapter_intermediate_size)
        self.enc_norm, self.enc_proj = nn.LayerNorm(mid), nn.Linear(mid, 2 * C)
        self.dec_proj, self.dec_norm = nn.Linear(C, mid), nn.LayerNorm(D)
        if config.adapter_pca:
            self.register_buffer("center", torch.zeros(D))
            self.register_buffer("axes", torch.eye(D))
        narrow = (config.adapter_latent_layers, C, narrow_heads, 4 * C)
        narrow_norm = nn.LayerNorm if config.adapter_latent_layers else nn.Identity
        self.latent_enc_blocks, self.latent_enc_norm = make_blocks(*narrow), narrow_norm(C)
        self.latent_dec_blocks, self.latent_dec_norm = make_blocks(*narrow), narrow_norm(C)

    def posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = super().posterior(z)[0]
        z = (z - self.center) @ self.axes if self.config.adapter_pca else z
        x = self.enc_down(self.enc_norm_high(self.enc_blocks(z)))  #         (..., h, w, D or mid)
        return self.enc_proj(self.enc_norm(self.enc_blocks_mid(x))).chunk(2, dim=-1)

    def refine(self, u: Tensor) -> Tensor:
        return self.latent_enc_norm(self.latent_enc_blocks(u))

    def decode(self, u: Tensor) -> Tensor:
        x = self.latent_dec_norm(self.latent_dec_blocks(super().decode(u)))  #      (..., h, w, C)
        x = self.dec_norm_mid(self.dec_blocks_mid(self.dec_proj(x)))  #      (..., h, w, D or mid)
        z = self.dec_norm(self.dec_blocks(self.dec_up(x)))  #                       (..., h, w, D)
        return z @ self.axes.T + self.center if self.config.adapter_pca else z

    @torch.no_grad()
    def init_from_pca(self, mean: Tensor, axes: Tensor, variances: Tensor) -> None:
        """Make encode and decode the projection on the first principal axes, nearly.

        u_i = y_i / variance_i^(1/4),  y = (z - mean) @ axes;  blocks begin as the identity. A norm
        over channels would lose what its mean and its length carry (the grey level of raw patches:
        all channels alike); +-sink in the two weakest channels makes it nearly linear.

        mean, axes, variances  (D,), (D, D), (D,)   strongest axis first
        """
        self.center.copy_(mean), self.axes.copy_(axes)
        sink = 4 * variances.sum().sqrt()
        unit = sink * math.sqrt(2 / len(mean))  # the standard deviation that the norms divide by
        for name, x in self.named_parameters():
            if "output.dense" in name or "_proj." in name:  # the ends of blocks, D -> C -> D
                nn.init.zeros_(x)
        for blocks in (self.enc_blocks, self.dec_blocks):
            blocks[-1].output["dense"].bias[-2:] = torch.stack((sink, -sink))
        scale = variances[: self.latent_dim].clamp_min(1e-6 * variances[0]) ** 0.25
        self.enc_proj.weight[: len(scale)].fill_diagonal_(1).mul_((unit / scale)[:, None])
        self.enc_proj.bias[len(scale) :] = -4.0  # logvar
        self.dec_proj.weight.fill_diagonal_(1).mul_(scale)
        self.dec_norm.weight.fill_(unit)[-2:] = 0.0


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions of the normalised input to the input."""

    def __init__(self, c_in: int, c_out: int, config: PixelDecoderConfig):
        super().__init__()
        self.norm1, self.norm2 = (group_norm(config.norm_groups, c) for c in (c_in, c_out))
        self.conv1, self.conv2 = conv3x3(c_in, c_out), conv3x3(c_out, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

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
        y = self.norm(x)
        parts = (f(y).flatten(2) for f in (self.q, self.k, self.v))
        q, k, v = (part.unflatten(1, (self.heads, -1)).mT for part in parts)  #  (N, heads, HW, -)
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(y)


class PixelDecoder(nn.Module):
    """Paint frames from latents: u (..., T, h, w, C) -> (..., T or 2 T, H, W, 3).

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
            inputs = [inner] + [n] * (config.num_res_blocks - 1)
            level = nn.Sequential()
            level.blocks = nn.Sequential(*(ResidualBlock(m, n, config) for m in inputs))
            if GRID << i in config.attn_resolutions:
                level.attn = SpatialAttention(n, config)
            if i < len(widths) - 1:
                level.upsample = nn.Sequential(nn.Upsample(scale_factor=2.0))
                level.upsample.conv = conv3x3(n, n)
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


def pack(**parts: nn.Module | None) -> tuple[dict, dict]:
    """Lay modules out for one file: tensors `part.name` and metadata `part_config`."""
    tensors, metadata = {}, {}
    for part, module in parts.items():
        state = module.state_dict() if module else {}
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
        metadata[f"{part}_config"] = module and dataclasses.asdict(module.config)
    return tensors, metadata


def adapter_from(
    tensors: dict, metadata: dict, where: str
) -> tuple[Adapter | None, PixelDecoder | None]:
    """Make adapter and pixel decoder, in eval mode, of what `pack` laid out, if they are there."""
    makers = {
        "adapter": lambda **x: create_adapter(AdapterConfig(**x), metadata["input_dim"]),
        "pixel_decoder": lambda **x: PixelDecoder(PixelDecoderConfig(**x)),
    }
    made = []
    for part, make in makers.items():
        state = {n[len(part) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{part}.")}
        config = metadata[f"{part}_config"]
        made.append(None if config is None else data.rebuild(make, config, state, where))
    if made[0]:
        made[0].encoder_config = metadata["encoder_config"]
        made[0].encoder_fingerprint = metadata["encoder_fingerprint"]
    return tuple(made)


def save_adapter(path: str | Path, adapter: Adapter, pixel_decoder: PixelDecoder | None) -> None:
    """Write weights, configs and the encoder they belong to as one safetensors file."""
    tensors, metadata = pack(adapter=adapter, pixel_decoder=pixel_decoder)
    for name in ("input_dim", "encoder_config", "encoder_fingerprint"):
        metadata[name] = getattr(adapter, name)
    data.save_tensors(path, tensors, metadata)


def read_released(path: str | Path) -> tuple[dict, dict]:
    """Translate a released file into ours: (tensors, metadata)."""

    def pick(cls: type, given: dict) -> dict:  # no shape shows heads: unknown ones stay, to fail
        names = [name for name in given if hasattr(cls, name) or "head" in name]
        return {name: given[name] for name in names if given[name] is not None}

    file = dict(data.load_torch(path))
    config, state = file["adapter_config"], data.strip_prefixes(file["adapter"])
    tensors, paint = {f"adapter.{name}": tensor for name, tensor in state.items()}, None
    last = {"svae": "dec_norm.weight", "mlp": "decoder_mlp.4.weight"}.get(config["adapter_type"])
    input_dim = len(state[last]) if last else config["adapter_latent_dim"]
    if state := data.strip_prefixes(file.get("pixel_decoder") or {}):
        # Configs without attn_* entries are older than attention inside the levels.
        paint = {"attn_resolutions": (), "attn_heads": 1} | file["pixel_decoder_config"]
        paint = pick(PixelDecoderConfig, paint)
        input_dim = input_dim if last else paint["latent_dim"]
        for name, tensor in state.items():  # only the doubling of time has weights of three axes
            place, _, kind = name.rpartition(".")
            place = "temporal_upsample" if state[f"{place}.weight"].ndim == 3 else place
            tensors[f"pixel_decoder.{place}.{kind}"] = tensor
    metadata = {"adapter_config": pick(AdapterConfig, config), "pixel_decoder_config": paint}
    metadata |= {"encoder_config": file.get("encoder_config"), "encoder_fingerprint": None}
    return tensors, {**metadata, "input_dim": input_dim}


def load_adapter(
    path: str | Path, fingerprint: str | None = None
) -> tuple[Adapter, PixelDecoder | None]:
    """Read our safetensors file or a released `.pt`: (adapter, pixel decoder), in eval mode.

    fingerprint  of the encoder that will feed the adapter; None: not compared
    Raises InputError when the file is damaged or belongs to another encoder.
    """
    remedy = "choose a file of train_adapter.py or a released adapter, or copy it again"
    with data.reading(path, remedy, RuntimeError, *data.PARSE_ERRORS):
        read = data.load_tensors if Path(path).suffix == ".safetensors" else read_released
        adapter, pixel_decoder = adapter_from(*read(path), str(path))
        if adapter is None:
            raise InputError(f"{path}: holds no adapter; {remedy}")
        # A released file names only the type of its encoder, which every fingerprint begins with.
        own = adapter.encoder_fingerprint or (adapter.encoder_config or {}).get("encoder_type")
    if fingerprint and own and not f"{fingerprint}-".startswith(f"{own}-"):
        other = f"belongs to encoder {own}, not to {fingerprint}; choose that encoder, with the"
        raise InputError(f"{path}: {other} weights and options of its training, or another file")
    return adapter, pixel_decoder
