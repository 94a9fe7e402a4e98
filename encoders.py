"""Turn frames into latents and back with frozen public networks, or without any.

    frames (B, T, H, W, 3) --resize, normalise--> network --standardise--> z (B, T', h, w, C)

A frozen network is a file of tensors and a forward pass that asks for them by their public names:
no layer is declared here, every size is the file's, and one dry run on loading finds what is
missing, left over or misshapen. (transformers renames these modules in memory from release to
release: a load through it is neither strict nor able to name the file's tensors.)

Shapes: B batch, T frames, H W pixels, h w latent grid, C latent channels, D network width,
N images of one call, n tokens of an image, d channels of a head, p pixels a side of a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
from data import InputError, MissingFileError

TABLE = """\
name             latent     params   adapter weights
pixels           16x16x768  0+0      no      -
vae              32x32x16   34+50M   no      stabilityai/stable-diffusion-3-medium-diffusers/vae
vavae            16x16x32   28+41M   no      hustvl/vavae-imagenet256-f16d32-dinov2
cosmos           16x16x16   34+48M   no      nvidia/Cosmos-0.1-Tokenizer-CI16x16
rae              16x16x768  87+415M  yes     facebook/dinov2-with-registers-base
scale_rae_siglip 16x16x1152 428+416M yes     google/siglip2-so400m-patch14-224
scale_rae_webssl 16x16x1024 304+415M yes     facebook/webssl-dino300m-full2b-224
vjepa2           16x16x1024 305M     yes     https://dl.fbaipublicfiles.com/vjepa2
qwen             16x16x1280 669M     yes     Qwen/Qwen2.5-VL-3B-Instruct
"""  # latent of a 256x256 frame; encoder + decoder; adapter: so wide that the paper compresses it
RELEASES = {row.split()[0]: row.split()[-1] for row in TABLE.splitlines()[1:]}
DECODERS = {
    "rae": "nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/ViTXL_n08",
    "scale_rae_siglip": "nyu-visionx/siglip2_decoder",
    "scale_rae_webssl": "nyu-visionx/webssl300m_decoder",
}
STATISTICS = {
    "rae": "nyu-visionx/RAE-collections/stats/dinov2/wReg_base/imagenet1k",
    "vavae": "hustvl/vavae-imagenet256-f16d32-dinov2",
}
HOMES = {name: f"weights/{kind}/decoder" for kind, name in DECODERS.items()}
HOMES |= {name: f"weights/{kind}" for kind, name in (*STATISTICS.items(), *RELEASES.items())}
FILES = {  # that are looked for, and in a folder here also the one that fits a pattern
    "vae": ("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    "vavae": ("vavae-imagenet256-f16d32-dinov2.pt", "vavae*.pt"),
    "cosmos": ("encoder.jit",),
    "vjepa2": ("vjepa2_1_vitl_dist_vitG_384.pt", "vjepa*.pt"),
}
HUGGING_FACE = {  # beginnings of the names that are read, and what is cut off them
    "rae": (("",), ()),
    "scale_rae_webssl": (("",), ()),
    "scale_rae_siglip": (("vision_model.", "embeddings.", "encoder."), ("vision_model.",)),
    "qwen": (("visual.", "model.visual."), ("visual.", "model.visual.")),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of a network's input
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Choose an encoder, its files and its options."""

    encoder_type: str = "pixels"  # pixels, vae, vavae, cosmos, rae, scale_rae_siglip, ...
    weights: str | None = None  # file, folder or hub id (org/name/folder); none: the release
    decoder_weights: str | None = None  # the same for the decoder of rae and scale_rae_*
    latent_stats: str | None = None  # file of latent mean/var or mean/std to standardise with
    image_size: int | None = None  # side frames are resized to; none: the release's, or as they are
    qwen_mode: str = "video"  # qwen: video (two frames a latent) or image (one)
    sd3_shift: bool = False  # vae: subtract the shift factor, as Stable Diffusion 3 does
    standardize: bool = False  # vavae, rae: standardise with the statistics of the release
    final_norm: bool = True  # scale_rae_siglip: end with the layer norm its decoder was trained on
    patch_size: int = 16  # pixels: side of the patch that becomes one latent

    def __post_init__(self):
        if self.encoder_type not in RELEASES:
            raise ValueError(f"encoder_type {self.encoder_type!r} is none of {', '.join(RELEASES)}")
        if self.qwen_mode not in ("video", "image"):
            raise ValueError(f"qwen_mode {self.qwen_mode!r} is neither 'video' nor 'image'")
        if self.patch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError("patch_size and image_size must be positive")
        owners = {"decoder_weights": DECODERS, "standardize": STATISTICS, "sd3_shift": ["vae"]}
        owners |= {"qwen_mode": ["qwen"], "patch_size": ["pixels"], "weights": [*RELEASES][1:]}
        for name, types in (owners | {"final_norm": ["scale_rae_siglip"]}).items():
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default and self.encoder_type not in types:
                raise ValueError(f"{name} is an option of {', '.join(types)} only")


# ------------------------------------------------------------------------------------------------
# Finding and reading files


def fetch(name: str, file: str, cached: bool) -> Path:
    """Return a file of a hub id (org/name/folder) or https folder: the cached one, or download."""
    if name.startswith("https://"):
        path = Path(torch.hub.get_dir(), "checkpoints", file)
        if not cached:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{name}/{file}", str(path))
        return path.resolve(strict=True)
    from huggingface_hub import hf_hub_download

    org, repo, *folder = name.split("/")
    file = "/".join([*folder, file])
    return Path(hf_hub_download(f"{org}/{repo}", file, local_files_only=cached))


def find(name: str, *files: str, download: bool = True) -> Path:
    """Return the first of `files` in what the user named: here, in a cache, or downloaded.

    name   file (then it is the answer), folder, hub id (org/name/folder), https folder; for a
           release first the folder below weights/ that stands for it
    files  names; in a folder here also patterns that must fit one file
    Raises MissingFileError saying what to fetch, from where, and where to put it.
    """
    home, reason = HOMES.get(name, "a folder"), ""
    path = Path(home if name in HOMES and Path(home).is_dir() else name).expanduser()
    if path.is_file():
        return path
    for file in files if path.is_dir() else ():
        if len(found := list(path.glob(file))) == 1:
            return found[0]
    remote = r"https://.+|(?!.*\.(pt|jit|safetensors)$)\w[\w.-]*(/[\w.-]+)+"
    if path.is_dir() or not re.fullmatch(remote, name):
        raise MissingFileError(f"{path}: no such file, or a folder without {files[0]}; check it")
    for cached in (True, False)[: 1 + download]:
        for file in (file for file in files if "*" not in file):
            try:
                return fetch(name, file, cached)
            except (OSError, ValueError) as error:
                reason = type(error).__name__
            if reason == "LocalEntryNotFoundError" and not cached:
                break  # no connection
    page = name if name.startswith("https://") else f"https://huggingface.co/{name}"
    raise MissingFileError(
        f"{page}: {files[0]} is not on this machine and not downloadable ({reason}); fetch it and "
        "any config.json beside it from there where you can (a licence may have to be accepted), "
        f"and put them in {home} of the folder you work in, or name their folder"
    )


def beside(path: Path, name: str, file: str) -> Path:
    """Return a companion of a file that was found in `name`."""
    here = Path(name).expanduser().exists() or (path.parent / file).is_file()
    return find(str(path.parent) if here else name, file)


def read_json(path: Path, required: bool = True) -> dict:
    """Read a JSON object; {} where none is required and there is none."""
    try:
        if not required and not path.is_file():
            return {}
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{path}: no readable JSON object ({error}); fetch it again") from error


def read_tensors(path: Path, prefixes=("",), containers=(), strip=()) -> dict[str, Tensor]:
    """Read float tensors by name from .safetensors, or from a .pt without running code.

    prefixes    keep names that begin with one of these; strip: then cut these off the front
    containers  entries of a .pt that may hold the tensors, first come; else its top level does
    """
    if path.suffix == ".safetensors":
        with data.open_tensors(path) as (file, _):
            state = {
                name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)
            }
    else:
        state = data.load_torch(path)
        for name in containers:
            state = state[name] if isinstance(state, dict) and name in state else state
        state = state if isinstance(state, dict) else {"its content": state}
        state = {f"{k}": v for k, v in state.items() if f"{k}".startswith(prefixes)}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            wanted = " or ".join(containers) or "tensors only"
            raise InputError(f"{path}: '{name}' is no float tensor; name a file with {wanted}")
    return data.strip_prefixes(state, strip)


def read_hugging_face(name: str, prefixes=("",), strip=()) -> tuple[Path, dict, dict]:
    """Read (path, tensors, config) of a transformers folder or hub id, from the shards needed."""
    path = find(name, "model.safetensors.index.json", "model.safetensors")
    state, shards = {}, [path.name]
    if path.suffix == ".json":
        table = read_json(path).get("weight_map")
        if not isinstance(table, dict):
            raise InputError(f"{path}: has no weight_map; fetch it again")
        shards = sorted({str(table[key]) for key in table if key.startswith(prefixes)})
    for shard in shards:
        state |= read_tensors(beside(path, name, shard), prefixes, strip=strip)
    return path, state, read_json(beside(path, name, "config.json"))


def read_stats(path: Path, latent_dim: int) -> Tensor:
    """Read latent statistics as (2, h, w, C) or (2, 1, 1, C): mean, std.

    z' = (z - mean) / std,   std = sqrt(var + 1e-5) where the file holds a variance

    The file holds 'std' or 'var', and 'mean' (None or absent: zero): (C,), (C, h, w), (1, C, h, w).
    """
    values = data.load_torch(path)
    try:
        std = values["std"] if values.get("std") is not None else (values["var"] + 1e-5).sqrt()
        mean = values["mean"] if values.get("mean") is not None else torch.zeros_like(std)
        pair = [
            v.float().reshape(latent_dim, *(v.shape[-2:] if v.ndim > 2 else (1, 1)))
            for v in (mean, std)
        ]
        stats = torch.stack(torch.broadcast_tensors(*pair))
        if not stats.isfinite().all() or not (stats[1] > 0).all():
            raise ValueError("not all finite and positive")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"no 'std' or 'var', and 'mean', of {latent_dim} latent channels"
        raise InputError(f"{path}: {what} ({error!r}); name a file that holds them") from error
    return stats.movedim(1, -1).contiguous()


# ------------------------------------------------------------------------------------------------
# Networks


class Network(nn.Module):
    """The tensors of a public file under their own names, and the layers that ask for them.

    config  the config.json beside the file: what no shape can tell
    unused  beginnings of names that the forward pass does without
    """

    unused: tuple[str, ...] = ()
    eps, rename = 1e-6, str  # rename: our name of a tensor to the file's
    size: int | None = None  # side of the frames it is made for; none: any
    mean_std, clamp = HALF, False  # of its input
    frames, chunk = 1, 32  # that become one latent; that are encoded at once

    def __init__(self, where: Path, state: dict[str, Tensor], config: dict):
        super().__init__()
        self.where, self.config, self.asked, self.counts = where, config, set(), {}
        for name in sorted(state):  # "/": a buffer's name has no dots
            self.register_buffer(name.replace(".", "/"), state[name].to(torch.float32, copy=True))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.buffers()).dtype

    def fault(self, what: str) -> InputError:
        return InputError(f"{self.where}: {what}; name the file and config.json of this encoder")

    def has(self, name: str) -> bool:
        return self.rename(name).replace(".", "/") in self._buffers

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor, of a shape where it matters; None stands for any size."""
        self.asked.add(name := self.rename(name))
        value = self._buffers.get(name.replace(".", "/"))
        if value is None:
            raise self.fault(f"tensor {name} is missing")
        want = tuple(size if size else got for size, got in zip(shape, value.shape, strict=False))
        if shape and (want != value.shape or len(shape) != value.ndim or 0 in want):
            raise self.fault(f"tensor {name} is {tuple(value.shape)}, expected {shape}")
        return value

    def count(self, prefix: str, key: str = "") -> int:
        """Count layers: the config's `key`, else one more than the largest number after `prefix`."""
        if prefix not in self.counts:
            pattern = re.compile(re.escape(self.rename(prefix).replace(".", "/")) + r"(\d{1,3})/")
            found = [int(match[1]) for name in self._buffers if (match := pattern.match(name))]
            self.counts[prefix] = self.number(key, max(found, default=0) + 1)
        return self.counts[prefix]

    def number(self, key: str, default: float, divides: int = 0) -> int | float:
        """Return a positive number of the config, or the default where it has none."""
        value = self.config.get(key, default)
        good = type(value) in (int, type(default)) and 0 < value < 1e6
        if not good or divides % value:
            raise self.fault(f"{key} is {value!r}" + f", which does not divide {divides}" * good)
        return value

    def side(self, name: str, places: int) -> int:
        if places < 1 or math.isqrt(places) ** 2 != places:
            raise self.fault(f"tensor {name} stands for {places} places, which are no square")
        return math.isqrt(places)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Apply a linear layer; a 1x1 convolution holds the same numbers."""
        weight = self.tensor(f"{name}.weight").flatten(1)
        return F.linear(x, weight, self.tensor(f"{name}.bias", len(weight)))

    def conv(self, x: Tensor, name: str, bias: bool = True, **options) -> Tensor:
        """Apply a convolution; stride=0: by patches, as far as the kernel is wide."""
        weight = self.tensor(f"{name}.weight")
        bias = self.tensor(f"{name}.bias", len(weight)) if bias else None
        options["stride"] = options.get("stride", 1) or weight.shape[2:]
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    @torch.no_grad()
    def check(self, run, *shape: int) -> None:
        """Run without numbers: every tensor is there, they fit together, and none is left over."""
        buffers, self._buffers = self._buffers, {k: v.to("meta") for k, v in self._buffers.items()}
        try:
            run(torch.empty(shape, device="meta"))
        except (RuntimeError, ValueError, IndexError) as error:
            clear = isinstance(error, InputError)
            raise error if clear else self.fault(f"tensors do not fit ({error})") from error
        finally:
            self._buffers = buffers
        left = sorted({name.replace("/", ".") for name in buffers} - self.asked)
        left = [name for name in left if not name.startswith(self.unused)]
        if left:
            raise self.fault(f"{len(left)} unexpected tensors: {', '.join(left[:4])}")


def rotate(x: Tensor, turn: Tensor, halves: bool) -> Tensor:
    """Turn pairs of channels by position, (a + ib) e^(i angle), in float32.    [Su et al. 2021]

    x       (..., n, d)  queries or keys
    turn    (n, d / 2)   complex e^(i angle)
    halves               pair channel j with j + d / 2; else neighbours 2j, 2j + 1
    """
    pairs = x.float().unflatten(-1, (2, -1)).mT if halves else x.float().unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned.mT if halves else turned).flatten(-2).type_as(x)


def turns(*axes: Tensor, pairs: int, total: int) -> Tensor:
    """Return e^(i angle), angle_k = position * 10000^(-k / pairs), axis after axis; the rest 1.

    axes  positions along each axis of a grid of n tokens   ->  (n, total) complex
    """
    frequency = 10000 ** (-torch.arange(pairs, device=axes[0].device) / pairs)
    grid = torch.meshgrid(*axes, indexing="ij")
    angle = torch.cat([axis.reshape(-1, 1) * frequency for axis in grid], dim=1)
    angle = F.pad(angle, (0, total - angle.shape[1]))
    return torch.polar(torch.ones_like(angle), angle)


def resize_grid(x: Tensor, size: tuple[int, int], mode: str, antialias: bool = False) -> Tensor:
    """Resize a token grid (N, h, w, D) in float32; one that fits stays as it is."""
    if x.shape[1:3] == size:
        return x
    y = F.interpolate(x.float().movedim(-1, 1), size, mode=mode, antialias=antialias)
    return y.movedim(1, -1).type_as(x)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """Lay out patches (N, h, w, p p 3), colour last, as images (N, 3, h p, w p)."""
    x = x.unflatten(3, (p, p, 3)).permute(0, 5, 1, 3, 2, 4)  #              (N, 3, h, p, w, p)
    return x.flatten(4).flatten(2, 3)


class Transformer(Network):
    """A stack of pre-norm blocks; subclasses say what the file calls the parts of a block.

    x += scale1 proj(attention(norm1(x)))
    x += scale2 fc2(act(fc1(norm2(x)))),   without act: fc2(silu(gate) up), [gate, up] = fc1(...)
    """

    blocks, norm1, norm2, qkv, proj = "blocks.", "norm1", "norm2", ("attn.qkv",), "attn.proj"
    fc1, fc2, scales, act, halves = ("mlp.fc1",), "mlp.fc2", (), staticmethod(F.gelu), False

    def parts(self, x: Tensor, name: str, layers: tuple[str, ...], count: int) -> tuple:
        """Apply `count` layers, which the file may hold as one."""
        out = [self.linear(x, name + layer) for layer in layers]
        return out if len(out) == count else out[0].chunk(count, dim=-1)

    def block(self, x: Tensor, i: int, turn: Tensor | None = None, mask: Tensor | None = None):
        """Map tokens (N, n, D) through block i."""
        name, scales = f"{self.blocks}{i}.", ()
        qkv = self.parts(self.norm(x, name + self.norm1), name, self.qkv, 3)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        if turn is not None:
            q, k = rotate(q, turn, self.halves), rotate(k, turn, self.halves)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  #      (N, heads, n, d)
        y = self.linear(y.transpose(1, 2).flatten(2), name + self.proj)
        if self.scales:
            scales = [self.tensor(name + key, x.shape[-1]) for key in self.scales]
        x = torch.addcmul(x, y, scales[0]) if scales else x + y
        y = self.norm(x, name + self.norm2)
        if self.act is None:
            gate, up = self.parts(y, name, self.fc1, 2)
            y = F.silu(gate) * up
        else:
            y = self.act(self.linear(y, name + self.fc1[0]))
        y = self.linear(y, name + self.fc2)
        return torch.addcmul(x, y, scales[1]) if scales else x + y


class DINO(Transformer):
    """DINOv2 with registers (RAE) and Web-DINO: images to tokens, by a table of positions.

    last  the norm at the end: the "file"'s, a "plain" one without weights in its place, or "none"
    """

    size, mean_std = 224, IMAGENET

    patch, table = "embeddings.patch_embeddings.projection", "embeddings.position_embeddings"
    cls, registers, end = "embeddings.cls_token", "embeddings.register_tokens", "layernorm"
    blocks, proj = "encoder.layer.", "attention.output.dense"
    qkv = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    scales = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    unused = ("embeddings.mask_token",)

    def __init__(self, where: Path, state: dict, config: dict, last: str):
        super().__init__(where, state, config)
        self.dim, _, _, self.unit = self.tensor(f"{self.patch}.weight", *[None] * 4).shape
        self.heads = self.number("num_attention_heads", 12, self.dim)
        self.eps = self.number("layer_norm_eps", 1e-6)
        self.depth = self.count(self.blocks, "num_hidden_layers")
        self.last = last
        self.unused += () if last == "file" else (f"{self.end}.",)
        if self.has(f"{self.blocks}0.mlp.weights_in.weight"):
            self.fc1, self.fc2, self.act = ("mlp.weights_in",), "mlp.weights_out", None
        self.places = self.tensor(self.table).numel() // self.dim - bool(self.cls)
        self.h = self.side(self.table, self.places)
        if not self.has(self.registers):  # RAE's encoder was made for 518 and is used at 224
            self.size = self.h * self.unit
        self.check(self.encode, 1, 3, 2 * self.unit, 2 * self.unit)

    def encode(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to tokens (N, h, w, D)."""
        x = self.conv(x, self.patch, stride=0).movedim(1, -1)
        N, h, w, D = x.shape
        table = self.tensor(self.table).view(1, -1, D)
        grid = table[:, -self.places :].unflatten(1, (self.h, self.h))
        registers = self.has(self.registers)  # upstream's classes with and without differ
        x = (x + resize_grid(grid, (h, w), "bicubic", antialias=registers)).flatten(1, 2)
        if self.cls:
            prefix = [self.tensor(self.cls) + table[:, :1]]
            prefix += [self.tensor(self.registers)] if registers else []  # these have no position
            x = torch.cat([*(token.expand(N, -1, -1) for token in prefix), x], dim=1)
        for i in range(self.depth):
            x = self.block(x, i)
        x = x[:, -h * w :].unflatten(1, (h, w))
        if self.last == "plain":
            return F.layer_norm(x, (D,), eps=1e-6)
        return self.norm(x, self.end) if self.last == "file" else x


class SigLIP(DINO):
    """SigLIP's vision tower (Scale-RAE), to its last layer: as DINO, without CLS and scales."""

    mean_std = HALF

    patch, table = "embeddings.patch_embedding", "embeddings.position_embedding.weight"
    cls, registers, end = "", "", "post_layernorm"
    blocks, norm1, norm2 = "encoder.layers.", "layer_norm1", "layer_norm2"
    qkv, proj = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
    scales, act = (), staticmethod(functools.partial(F.gelu, approximate="tanh"))
    unused = ("head.", "post_layernorm.")


class VJEPA(Transformer):
    """V-JEPA 2.1: no table; every block turns queries and keys by time, row and column.

    Each axis turns 2 floor(floor(d / 3) / 2) channels of a head, the rest of it stays as it is.
    """

    size, mean_std, clamp = 256, IMAGENET, True
    unused = ("norms_block.0.", "norms_block.1.", "norms_block.2.")  # of intermediate outputs

    def __init__(self, where: Path, state: dict, config: dict):
        super().__init__(where, state, config)
        shape = self.tensor("patch_embed.proj.weight", *[None] * 5).shape
        self.dim, _, frames, _, self.unit = shape
        self.heads = self.dim // self.number("head_dim", 64, self.dim)
        self.depth = self.count(self.blocks)
        side = 2 * self.unit
        self.check(lambda x: (self(x), self(x[:, :, :1])), 1, 3, frames, side, side)

    def forward(self, x: Tensor) -> Tensor:
        """Map one frame (N, 3, 1, H, W) or a video (N, 3, T, H, W) to tokens (N, t, h, w, D)."""
        image = x.shape[2] == 1
        patch = "patch_embed_img.proj" if image else "patch_embed.proj"
        x = self.conv(x, patch, stride=0).movedim(1, -1)
        t, h, w = grid = x.shape[1:4]
        time, row, column = (torch.arange(size, device=x.device).float() for size in grid)
        row, column = row * 15 / (h - 1), column * 15 / (w - 1)  # span the 16 x 16 grid it knows
        turn = turns(time, row, column, pairs=(64 // 3) // 2, total=32)
        kind = "img_mod_embed" if image else "video_mod_embed"
        x = x.flatten(1, 3) + self.tensor(kind, 1, 1, self.dim)
        for i in range(self.depth):
            x = self.block(x, i, turn)
        return self.norm(x, "norms_block.3").unflatten(1, grid)

    def encode(self, x: Tensor) -> Tensor:
        return self(x[:, :, None]).squeeze(1)  # every frame is an image


class QwenTower(Transformer):
    """Qwen2.5-VL's vision tower on pairs of frames, up to the norm of its merger.

    In raster order: most blocks attend inside windows of patches cut from the top left, which a
    mask says as well as upstream's permutation does. Pairs never see each other.
    """

    size, mean_std, clamp = 224, CLIP, True
    fc1, fc2, act, halves = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", None, True
    unused = ("merger.mlp.",)

    def __init__(self, where: Path, state: dict, config: dict, video: bool):
        super().__init__(where, state, config)
        shape = self.tensor("patch_embed.proj.weight", *[None] * 5).shape
        self.dim, _, self.pair, _, p = shape
        self.frames = self.pair if video else 1
        self.heads = self.number("num_heads", 16, self.dim // 4)
        self.depth = self.count(self.blocks, "depth")
        self.unit = p * self.number("spatial_merge_size", 2)  # windows hold whole groups of patches
        self.window = self.number("window_size", 112) // self.unit * self.unit // p
        self.full = config.get("fullatt_block_indexes", [7, 15, 23, 31])
        if self.window < 1 or not isinstance(self.full, list):
            raise self.fault("window_size or fullatt_block_indexes is none")
        self.check(self.forward, 1, 3, self.pair, self.unit, self.unit)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensor(f"{name}.weight"), 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map pairs (N, 3, 2, H, W) to tokens (N, h, w, D)."""
        x = self.conv(x, "patch_embed.proj", bias=False, stride=0).squeeze(2).movedim(1, -1)
        h, w, D = x.shape[1:]
        row, column = (torch.arange(size, device=x.device) for size in (h, w))
        pairs = D // self.heads // 4
        turn = turns(row.float(), column.float(), pairs=pairs, total=2 * pairs)
        window = (row[:, None] // self.window * w + column // self.window).flatten()
        same = window[:, None] == window
        x = x.flatten(1, 2)
        for i in range(self.depth):
            x = self.block(x, i, turn, None if i in self.full else same)
        return self.norm(x, "merger.ln_q").unflatten(1, (h, w))

    def encode(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(0, (-1, self.frames)).transpose(1, 2)  #        (N, 3, 1 or 2, H, W)
        return self(pairs.expand(-1, -1, self.pair, -1, -1))  # an image is a pair of itself


class ViTDecoder(Transformer):
    """Decoder of RAE and Scale-RAE, a ViT-MAE decoder: tokens to the patches of an image."""

    blocks, norm1, norm2 = "decoder_layers.", "layernorm_before", "layernorm_after"
    qkv, proj, fc1, fc2 = DINO.qkv, DINO.proj, ("intermediate.dense",), "output.dense"

    def __init__(self, where: Path, state: dict, config: dict):
        super().__init__(where, state, config)
        self.dim, self.in_dim = self.tensor("decoder_embed.weight", None, None).shape
        self.heads = self.number("decoder_num_attention_heads", 16, self.dim)  # all released: 16
        self.depth = self.count(self.blocks, "decoder_num_hidden_layers")
        self.eps = self.number("layer_norm_eps", 1e-12)
        self.places = self.tensor("decoder_pos_embed", 1, None, self.dim).shape[1]
        self.h = self.side("decoder_pos_embed", self.places - 1)
        self.patch = self.side("decoder_pred.bias", len(self.tensor("decoder_pred.bias")) // 3)
        self.check(self.decode, 1, self.h, self.h, self.in_dim)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (N, h, w, C) to normalised images (N, 3, side p, side p)."""
        x = self.linear(z, "decoder_embed")
        x = resize_grid(x, (self.h, self.h), "bilinear").flatten(1, 2)
        x = torch.cat([self.tensor("trainable_cls_token").expand(len(x), -1, -1), x], dim=1)
        x = x + self.tensor("decoder_pos_embed", 1, self.places, self.dim)
        for i in range(self.depth):
            x = self.block(x, i)
        x = self.linear(self.norm(x[:, 1:], "decoder_norm"), "decoder_pred")
        return unpatchify(x.unflatten(1, (self.h, self.h)), self.patch)


class KLAutoencoder(Network):
    """The autoencoder of latent diffusion, under the names of LDM (VA-VAE) or diffusers (SD3)."""

    chunk = 8
    names = """
        encoder.down.=encoder.down_blocks. decoder.up.=decoder.up_blocks. .block.=.resnets.
        sample.conv.=samplers.0.conv. mid.block_1.=mid_block.resnets.0.
        mid.block_2.=mid_block.resnets.1. mid.attn_1.norm.=mid_block.attentions.0.group_norm.
        mid.attn_1.proj_out.=mid_block.attentions.0.to_out.0. mid.attn_1.=mid_block.attentions.0.to_
        norm_out.=conv_norm_out. nin_shortcut.=conv_shortcut.
    """

    def __init__(self, where: Path, state: dict, config: dict):
        super().__init__(where, state, config)
        self.diffusers = any(name.startswith("encoder.down_blocks.") for name in state)
        self.groups = self.number("norm_num_groups", 32)  # the dry run finds what does not divide
        self.dim = self.tensor("decoder.conv_in.weight", *[None] * 4).shape[1]
        self.levels = self.count("encoder.down.")
        self.unit = side = 2 ** (self.levels - 1)
        self.check(lambda x: self.decode(self.encode(x)), 1, 3, 2 * side, 2 * side)

    def rename(self, name: str) -> str:
        for pair in self.names.split() if self.diffusers else ():
            name = name.replace(*pair.split("="))
        return name

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def layer(self, x: Tensor, norm: str, conv: str) -> Tensor:
        return self.conv(F.silu(self.group_norm(x, norm)), conv, padding=1)

    def resnet(self, x: Tensor, name: str) -> Tensor:
        y = self.layer(x, f"{name}.norm1", f"{name}.conv1")
        y = self.layer(y, f"{name}.norm2", f"{name}.conv2")
        return y + (x if x.shape[1] == y.shape[1] else self.conv(x, f"{name}.nin_shortcut"))

    def attention(self, x: Tensor, name: str) -> Tensor:
        """Attend over all pixels with one head."""
        y = self.group_norm(x, f"{name}.norm").flatten(2).mT[:, None]  #    (N, 1, h w, C)
        q, k, v = (self.linear(y, f"{name}.{part}") for part in "qkv")
        y = self.linear(F.scaled_dot_product_attention(q, k, v), f"{name}.proj_out")
        return x + y[:, 0].mT.unflatten(2, x.shape[2:])

    def level(self, x: Tensor, name: str) -> Tensor:
        for i in range(self.count(f"{name}.block.")):
            x = self.resnet(x, f"{name}.block.{i}")
            if self.has(f"{name}.attn.{i}.norm.weight"):
                x = self.attention(x, f"{name}.attn.{i}")
        return x

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.attention(self.resnet(x, f"{name}.block_1"), f"{name}.attn_1")
        return self.resnet(x, f"{name}.block_2")

    def encode(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to posterior means (N, h, w, C)."""
        x = self.conv(x, "encoder.conv_in", padding=1)
        for i in range(self.levels):
            x = self.level(x, f"encoder.down.{i}")
            if i < self.levels - 1:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(x, f"encoder.down.{i}.downsample.conv", stride=2)
        x = self.layer(self.middle(x, "encoder.mid"), "encoder.norm_out", "encoder.conv_out")
        x = self.conv(x, "quant_conv") if self.has("quant_conv.weight") else x
        return x.chunk(2, dim=1)[0].movedim(1, -1)  # the other half: log variances

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (N, h, w, C) to images (N, 3, H, W)."""
        x = z.movedim(-1, 1)
        x = self.conv(x, "post_quant_conv") if self.has("quant_conv.weight") else x
        x = self.middle(self.conv(x, "decoder.conv_in", padding=1), "decoder.mid")
        for i in range(self.levels):  # diffusers counts from the coarsest, LDM from the finest
            name = f"decoder.up.{i if self.diffusers else self.levels - 1 - i}"
            x = self.level(x, name)
            if i < self.levels - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"{name}.upsample.conv", padding=1)
        return self.layer(x, "decoder.norm_out", "decoder.conv_out")


class Patches(nn.Module):
    """No network: z is the p x p x 3 values of a patch, undone exactly.

    A cosine transform, also orthonormal, would only rotate these channels: Gaussian noise, squared
    error and the world model's first and last layers cannot tell, so the plainest basis is kept.
    """

    size, mean_std, clamp, frames, chunk, dtype = None, HALF, False, 1, 4096, torch.float32

    def __init__(self, p: int):
        super().__init__()
        self.dim, self.unit = 3 * p * p, p

    def encode(self, x: Tensor) -> Tensor:
        p = self.unit
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  #                (N, 3, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)  #                    (N, h, w, p p 3)

    def decode(self, z: Tensor) -> Tensor:
        return unpatchify(z, self.unit)


class Cosmos(nn.Module):
    """NVIDIA's TorchScript archives. They run code, and a trace bakes its dtype in: never cast."""

    size, mean_std, clamp, frames, chunk, dtype = None, HALF, False, 1, 8, torch.float32

    def __init__(self, encoder: Path, decoder: Path):
        super().__init__()
        self.paths, self.jits = (encoder, decoder), {}
        _, h, _, self.dim = self.encode(torch.zeros(1, 3, 64, 64)).shape
        self.unit = 64 // h

    def run(self, which: int, x: Tensor) -> Tensor:
        """Run encoder (0) or decoder (1), loaded for x's device: constants of a trace stay put."""
        path, key = self.paths[which], (which, x.device)
        try:
            if key not in self.jits:
                self.jits[key] = torch.jit.load(str(path), map_location=x.device).eval()
            values = self.jits[key].state_dict().values()
            out = self.jits[key](x.to(next((value.dtype for value in values), torch.float32)))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: does not run as TorchScript ({error}); refetch") from error
        return (out[0] if isinstance(out, tuple) else out).float()

    def encode(self, x: Tensor) -> Tensor:
        return self.run(0, x).movedim(1, -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.run(1, z.movedim(-1, 1).contiguous())


# ------------------------------------------------------------------------------------------------
# Encoders


def load_network(config: EncoderConfig) -> nn.Module:
    """Find, read and build the network that encodes."""
    kind = config.encoder_type
    if kind == "pixels":
        return Patches(config.patch_size)
    name = config.weights or RELEASES[kind]
    if kind in HUGGING_FACE:
        path, state, values = read_hugging_face(name, *HUGGING_FACE[kind])
        values = values.get("vision_config", values)
        if kind == "qwen":
            return QwenTower(path, state, values, config.qwen_mode == "video")
        if kind == "scale_rae_siglip":
            return SigLIP(path, state, values, "plain" if config.final_norm else "none")
        return DINO(path, state, values, "plain" if kind == "rae" else "file")
    path = find(name, *FILES[kind])
    if kind == "cosmos":
        return Cosmos(path, beside(path, name, "decoder.jit"))
    if kind == "vjepa2":
        containers, strip = ("ema_encoder", "target_encoder"), ("module.", "backbone.")
        return VJEPA(path, read_tensors(path, containers=containers, strip=strip), {})
    here = kind == "vavae" or Path(name).expanduser().exists()  # no config.json: as released
    values = path.parent / "config.json" if here else beside(path, name, "config.json")
    keep = ("",) if kind == "vae" else ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return KLAutoencoder(
        path, read_tensors(path, keep, ("state_dict",)), read_json(values, not here)
    )


def load_decoder(config: EncoderConfig, latent_dim: int) -> ViTDecoder:
    """Find, read and build the decoder of RAE or Scale-RAE; without a config.json as released."""
    name = config.decoder_weights or DECODERS[config.encoder_type]
    path = find(name, "model.pt", "*dec*.pt")
    state = read_tensors(path, strip=("module.", "_orig_mod."))
    decoder = ViTDecoder(path, state, read_json(path.parent / "config.json", required=False))
    if decoder.in_dim != latent_dim:
        raise decoder.fault(f"it decodes {decoder.in_dim} channels, not {latent_dim}")
    return decoder


class BaseAutoencoder(nn.Module):
    """The one contract: encode and decode, frozen, deterministic, in chunks, float32 outside.

    latent_dim       channels C of a latent
    temporal_stride  frames a latent stands for
    has_decoder      whether decode works
    fingerprint      names the latent space: type, weights and options; the decoder has no part

    Networks run in bfloat16 on CUDA and in float32 elsewhere, unless `dtype` says otherwise.
    """

    dtype: torch.dtype | None = None
    values_checked = False

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, self.network, self.decoder = config, load_network(config), None
        self.image_size = config.image_size or self.network.size
        self.latent_dim, self.temporal_stride = self.network.dim, self.network.frames
        width = int(TABLE.split(f"\n{config.encoder_type} ")[1].split()[0].split("x")[-1])
        self.has_decoder = hasattr(self.network, "decode") or bool(config.decoder_weights)
        self.has_decoder |= config.encoder_type in DECODERS and self.latent_dim == width
        if config.decoder_weights:  # that of a release is only fetched when it is needed
            self.decoder = load_decoder(config, self.latent_dim)
        constants = {"mean_std": torch.tensor(self.network.mean_std).view(2, 3, 1, 1)}
        constants["stats"] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # mean, std of latents
        if config.encoder_type == "vae":  # z = (mean - shift) scale
            shift = self.network.number("shift_factor", 0.0609) if config.sd3_shift else 0.0
            scale = self.network.number("scaling_factor", 1.5305)
            constants["stats"] = torch.tensor([shift, 1 / scale]).view(2, 1, 1, 1)
        if config.latent_stats or config.standardize:
            name = config.latent_stats or config.weights or ""
            if not config.latent_stats and not (Path(name) / "latents_stats.pt").is_file():
                name = STATISTICS[config.encoder_type]
            path = find(name, "latents_stats.pt", "stat.pt")
            constants["stats"] = read_stats(path, self.latent_dim)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        options = (config.encoder_type, self.image_size, config.qwen_mode, config.final_norm)
        digest = hashlib.sha256(repr((*options, self.latent_dim)).encode())
        for name, value in sorted((*self.network.state_dict().items(), ("stats", self.stats))):
            bits = value.view(torch.int32).sum(dtype=torch.int64).item()  # exact in any order
            digest.update(f"{name} {tuple(value.shape)} {bits}".encode())
        self.fingerprint = f"{config.encoder_type}-{digest.hexdigest()[:16]}"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stay in evaluation mode: a frozen network has no other."""
        return super().train(False)

    def settle(self) -> torch.device:
        """Give the networks their device and dtype, which costs nothing when they have them."""
        device = self.stats.device
        dtype = self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        for network in self.children():
            network.to(device, dtype)
        return device

    def check_frames(self, frames: Tensor) -> None:
        """Refuse what is no video. On CUDA only the first batch's values are read: a host sync."""
        if frames.ndim < 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"frames are {tuple(frames.shape)}; give (B, T, H, W, 3), RGB last")
        size, unit = [self.image_size or side for side in frames.shape[-3:-1]], self.network.unit
        if size[0] % unit or size[1] % unit:
            what = f"{size[0]}x{size[1]} pixels: {self.config.encoder_type}"
            raise InputError(f"{what} needs multiples of {unit}; crop them or set image_size")
        if frames.dtype == torch.uint8 or (frames.is_cuda and self.values_checked):
            return
        self.values_checked = frames.is_cuda
        low, high = (value.item() for value in torch.aminmax(frames))
        if not (frames.is_floating_point() and low >= -1e-3 and high <= 1.001):  # refuses NaN too
            raise InputError(
                f"frames are {frames.dtype} from {low:.4g} to {high:.4g}; give floats in [0, 1] "
                "(divide 0..255 by 255, map -1..1 by (x + 1) / 2), or uint8"
            )

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames; the same frames always give the same latents.

        frames  (B, T, H, W, 3)    uint8, or floats in [0, 1]; other leading axes are kept too
        ->      (B, T', h, w, C)   float32, T' = ceil(T / temporal_stride)
        Raises InputError for another layout, range or size.
        """
        self.check_frames(frames)
        device, network, z = self.settle(), self.network, []
        if missing := -frames.shape[-4] % self.temporal_stride:  # repeat the last frame
            frames = torch.cat([frames, *[frames[..., -1:, :, :, :]] * missing], dim=-4)
        for part in frames.flatten(0, -4).split(network.chunk):
            x = part.to(device, non_blocking=True).movedim(-1, 1)  #        (N, 3, H, W)
            x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
            size = (self.image_size or x.shape[2], self.image_size or x.shape[3])
            if x.shape[2:] != size:  # as upstream: no antialias, overshoots [0, 1] at edges
                x = F.interpolate(x, size, mode="bicubic", align_corners=False)
            x = ((x.clamp(0, 1) if network.clamp else x) - self.mean_std[0]) / self.mean_std[1]
            with torch.autocast(device.type, enabled=False):
                z.append(network.encode(x.to(network.dtype)).float())
        z = torch.cat(z)
        if self.stats.shape[1:3] not in ((1, 1), z.shape[1:3]):
            shapes = f"{tuple(z.shape[1:])}, their statistics {tuple(self.stats.shape[1:])}"
            raise InputError(f"latents are {shapes}; change image_size or latent_stats")
        return ((z - self.stats[0]) / self.stats[1]).unflatten(0, (*frames.shape[:-4], -1))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to frames in [0, 1].

        z   (B, T', h, w, C)    other leading axes are kept too
        ->  (B, T', H, W, 3)    float32
        Raises InputError when this encoder has no decoder or the latents are another's.
        """
        kind, x = self.config.encoder_type, []
        if not self.has_decoder:
            also = " for these weights (or name its decoder_weights)" * (kind in DECODERS)
            raise InputError(
                f"{kind} has no decoder{also}; train a pixel decoder for its latents: python "
                f"train_adapter.py --encoder_type {kind} --use_pixel_decoder true"
            )
        if z.ndim < 4 or z.shape[-1] != self.latent_dim or 0 in z.shape:
            shape = f"(B, T, h, w, {self.latent_dim})"
            raise InputError(f"latents are {tuple(z.shape)}; {kind} decodes {shape}")
        if kind in DECODERS and self.decoder is None:
            self.decoder = load_decoder(self.config, self.latent_dim)
        device, decoder = self.settle(), self.decoder or self.network
        z_flat = z.to(device).float().flatten(0, -4) * self.stats[1] + self.stats[0]
        for part in z_flat.split(self.network.chunk):
            with torch.autocast(device.type, enabled=False):
                y = decoder.decode(part.to(decoder.dtype)).float()
            x.append((y * self.mean_std[1] + self.mean_std[0]).clamp(0, 1))
        return torch.cat(x).movedim(1, -1).unflatten(0, z.shape[:-3])


def create_autoencoder(config: EncoderConfig) -> BaseAutoencoder:
    """Build the encoder that the config names, with its weights loaded strictly."""
    return BaseAutoencoder(config)


# ------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass(frozen=True)
class Args(EncoderConfig):
    """Print the table of encoders, or show what one makes of a picture."""

    image: str | None = None  # picture file; none: print the table
    output: str = "encoder.png"  # input | reconstruction, if any | PCA of the latents as RGB


def main() -> None:
    args = data.parse_args(Args)
    if args.image is None:
        head, *rows = TABLE.splitlines()
        print(f"{head[:44]} decoder found {head[44:]}")
        for row in rows:
            kind = row.split()[0]
            files = FILES.get(kind, ("model.safetensors.index.json", "model.safetensors"))
            try:
                found = kind == "pixels" or bool(find(RELEASES[kind], *files, download=False))
            except MissingFileError:
                found = False
            print(
                f"{row[:44]} {'yes' if '+' in row else 'no':7} {'yes' if found else 'no':5} {row[44:]}"
            )
        return
    try:
        with Image.open(args.image) as image:
            image = image.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        raise InputError(f"{args.image}: no readable picture ({error}); name a file") from error
    encoder = create_autoencoder(args)
    frames = torch.from_numpy(np.array(image))[None]  #                     (T = 1, H, W, 3)
    z = encoder.encode(frames)
    h, w, C = z.shape[1:]
    centred = z[0].flatten(0, 1) - z[0].flatten(0, 1).mean(0)
    rgb = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = rgb.quantile(0.01, dim=0), rgb.quantile(0.99, dim=0)
    rgb = ((rgb - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(h, w, -1)
    pictures = [frames[0], *([encoder.decode(z)[0]] if encoder.has_decoder else []), rgb]
    sheet = Image.new("RGB", (256 * len(pictures), 256))
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(data.to_uint8(picture)).resize((256, 256), Image.Resampling.NEAREST)
        sheet.paste(tile, (256 * i, 0))
    data.write_atomic(args.output, lambda path: sheet.save(path, "PNG"))
    print(f"{args.output}: input | {'reconstruction | ' * encoder.has_decoder}latents {h}x{w}x{C}")


if __name__ == "__main__":
    data.run_cli(main)
