"""Turn frames into latents and back with frozen public networks, or without any.

    frames (B, T, H, W, 3) --resize, normalise--> network --standardise--> z (B, T', h, w, C)

A frozen network is a file of tensors and a forward pass that asks for them by their public names:
no layer is declared, every size is the file's, and one dry run on loading finds what is missing,
left over or misshapen. (transformers renames these modules in memory from release to release.)

Shapes: B batch, T frames, H W pixels, h w latent grid, C latent channels, D network width,
N images of one call, n tokens of an image, d channels of a head, p pixels a side of a patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
from data import InputError, MissingFileError

TABLE = """\
name             latent     params   adapter decoder weights
pixels           16x16x768  0+0      no      yes     -
vae              32x32x16   34+50M   no      yes     stabilityai/stable-diffusion-3-medium-diffusers/vae
vavae            16x16x32   28+41M   no      yes     hustvl/vavae-imagenet256-f16d32-dinov2
cosmos           16x16x16   34+48M   no      yes     nvidia/Cosmos-0.1-Tokenizer-CI16x16
rae              16x16x768  87+415M  yes     yes     facebook/dinov2-with-registers-base
scale_rae_siglip 16x16x1152 428+416M yes     yes     google/siglip2-so400m-patch14-224
scale_rae_webssl 16x16x1024 304+415M yes     yes     facebook/webssl-dino300m-full2b-224
vjepa2           16x16x1024 305M     yes     no      https://dl.fbaipublicfiles.com/vjepa2
qwen             16x16x1280 669M     yes     no      Qwen/Qwen2.5-VL-3B-Instruct
"""  # noqa: E501  latent of a 256x256 frame; encoder + decoder; adapter: the paper compresses it
ENCODERS = {row.split()[0]: row.split() for row in TABLE.splitlines()[1:]}
RELEASES = {kind: row[-1] for kind, row in ENCODERS.items()}
DECODERS = {
    "rae": "nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/ViTXL_n08",
    "scale_rae_siglip": "nyu-visionx/siglip2_decoder",
    "scale_rae_webssl": "nyu-visionx/webssl300m_decoder",
}
LATENT_STATS = {
    "rae": "nyu-visionx/RAE-collections/stats/dinov2/wReg_base/imagenet1k",
    "vavae": "hustvl/vavae-imagenet256-f16d32-dinov2",
}
LOCAL_DIRS = {name: f"weights/{kind}/decoder" for kind, name in DECODERS.items()}
LOCAL_DIRS |= {name: f"weights/{kind}" for kind, name in (*LATENT_STATS.items(), *RELEASES.items())}
HF_FILES = ("model.safetensors", "model.safetensors.index.json")
CONTAINERS = ("ema_encoder", "target_encoder", "state_dict")  # what may hold the tensors of a .pt
NO_NETWORK = """LocalEntryNotFoundError OfflineModeIsEnabled URLError ConnectionError ConnectTimeout
    ReadTimeout ProxyError SSLError TimeoutError""".split()  # how a download without network ends
REMEDY = f"name a file of tensors, at its top level or in {', '.join(CONTAINERS)}"
WRAPPERS = r"((module|_orig_mod|backbone|model|visual|vision_model)\.)*"  # before a tensor's name
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
            raise InputError(f"encoder_type {self.encoder_type!r} is none of {', '.join(RELEASES)}")
        if self.qwen_mode not in ("video", "image"):
            raise InputError(f"qwen_mode {self.qwen_mode!r} is neither 'video' nor 'image'")
        if self.patch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise InputError("patch_size and image_size must be positive")
        owners = {"decoder_weights": DECODERS, "standardize": LATENT_STATS, "sd3_shift": ["vae"]}
        owners |= {"qwen_mode": ["qwen"], "final_norm": ["scale_rae_siglip"]}
        for name, types in (owners | {"weights": [*RELEASES][1:]}).items():
            if self.encoder_type not in types and getattr(self, name) != getattr(type(self), name):
                raise InputError(f"{name} is an option of {', '.join(types)} only")


def hub_file(name: str, file: str, cached: bool) -> Path:
    """Return a file of a hub id (org/name/folder) or https folder: the cached one, or download."""
    if "://" not in name:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        org, repo, *folders = name.split("/")
        file = "/".join([*folders, file])
        if not cached:  # without a connection a download would be tried for half a minute
            try:
                get_hf_file_metadata(hf_hub_url(f"{org}/{repo}", file), timeout=10)
            except Exception as error:  # of an HTTP library that changes from release to release
                known = isinstance(error, (OSError, ValueError))
                raise error if known else URLError(error) from error
        return Path(hf_hub_download(f"{org}/{repo}", file, local_files_only=cached))
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not cached:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"{name}/{file}", str(path))
    return path.resolve(strict=True)


def find_file(name: str, *files: str, download: bool = True) -> Path:
    """Return the first of `files` in what the user named: here, in a cache, or downloaded.

    name   file (then it is the answer), folder, hub id (org/name/folder), https folder; for a
           release first the folder below weights/ that stands for it
    Raises MissingFileError saying what to fetch, from where, and where to put it.
    """
    name, path = str(name), Path(name).expanduser()
    for place in (Path(LOCAL_DIRS.get(name, name)), path):
        if place.is_file():
            return place
        for file in files:
            if len(found := [*place.glob(file)]) == 1:
                return found[0]
    exact = [file for file in files if "*" not in file]
    remote = r"https://.+|(?!.*\.(pt|jit|safetensors)$)\w[\w.-]*(/[\w.-]+)+"
    if path.is_dir() or not re.fullmatch(remote, name):
        what = f"no such file, or a folder without {' or '.join(exact)}"
        raise MissingFileError(f"{path}: {what}; check the path")
    for file, cached in [(f, True) for f in exact] + [(f, False) for f in exact if download]:
        try:
            return hub_file(name, file, cached)
        except (OSError, ValueError) as error:
            reason = type(error).__name__
            if not cached and reason in NO_NETWORK:  # another name would wait in vain again
                break
    place = re.sub(r"^([\w.-]+/[\w.-]+)", r"https://huggingface.co/\1/resolve/main", name)
    raise MissingFileError(
        f"{place}/{files[0]} is not on this machine and cannot be fetched "
        f"({'no connection' if reason in NO_NETWORK else reason}); put it, with its config.json, "
        f"shards or decoder.jit, in {LOCAL_DIRS.get(name, 'a folder')} here (a licence may need "
        "consent), or name its folder"
    )


def find_companion(path: Path, name: str, file: str) -> Path:
    """Return a companion of a file that was found in `name`."""
    here = Path(name).expanduser().exists() or (path.parent / file).is_file()
    return find_file(str(path.parent.absolute()) if here else name, file)


def read_json(path: Path, key: str) -> dict:
    """Read a JSON object, or the object under a key of it if it has that key."""
    with data.reading(path, "fetch it again", OSError, *data.PARSE_ERRORS):
        values = json.loads(path.read_text())
        return dict(values.get(key, values))


def read_tensors(path: Path, keep: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the tensors whose names begin with `keep` from a .safetensors or .pt; no code is run."""
    if path.suffix == ".safetensors":
        with data.open_tensors(path) as (file, _):
            state = {key: file.get_tensor(key) for key in file.keys() if key.startswith(keep)}
    else:
        with data.reading(path, REMEDY, RuntimeError, *data.PARSE_ERRORS):
            state = data.load_torch(path)
            state = next((state[name] for name in CONTAINERS if name in state), state)
            state = {key: value for key, value in state.items() if key.startswith(keep)}
    for name, value in state.items():
        good = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        if not (good and value.isfinite().all()):
            raise InputError(f"{path}: '{name}' is no tensor of finite floats; {REMEDY}")
    return state


def read_stats(path: Path, latent_dim: int) -> Tensor:
    """Read latent statistics, z' = (z - mean) / std, std = sqrt(var + 1e-5).

    The file holds 'std' or 'var', and 'mean' (None or absent: zero), of axes C, C h w or 1 C h w.
    ->  (2, h, w, C) or (2, 1, 1, C)   mean, std
    """
    remedy = f"name a file of 'std' or 'var', and 'mean', of {latent_dim} latent channels"
    with data.reading(path, remedy, RuntimeError, *data.PARSE_ERRORS):
        values = data.load_torch(path)
        mean, std = values.get("mean"), values.get("std")
        std = (values["var"] + 1e-5).sqrt() if std is None else std
        mean = torch.zeros_like(std) if mean is None else mean
        pair = [x.view(-1, 1, 1) if x.ndim == 1 else x for x in (mean, std)]
        pair = [x.float().reshape(latent_dim, *x.shape[-2:]) for x in pair]
        stats = torch.stack(torch.broadcast_tensors(*pair))
        if not (stats.isfinite().all() and (stats[1] > 0).all()):
            raise ValueError("not all finite and positive")
    return stats.movedim(1, -1).contiguous()


class Network(nn.Module):
    """The tensors of a public file under their own names, and the layers that ask for them."""

    files, keep = HF_FILES, ("",)  # see `find_file` and `read_tensors`
    needs_config = (True, True)  # its config.json is a must: beside a file here, in the hub
    unused, names = ("\n",), ""  # tensors not asked for; pairs our=the file's part of a name
    size, mean_std, clamp = None, HALF, False  # of the frames it is made for: side, range
    stride, chunk = 1, 32  # frames a latent stands for, frames a call
    archives, eps, end_norm = (), 1e-6, ""

    def __init__(self, where: Path, state: dict[str, Tensor], config: dict):
        super().__init__()
        self.where, self.config, self.asked = where, config, {}
        self.prefix = re.match(WRAPPERS, min(state, default=""))[0]
        for name in sorted(state):  # register_buffer takes no dots in a name
            self._buffers[name] = state[name].to(torch.float32, copy=True)
        self.build()

    def fault(self, what: str) -> InputError:
        return InputError(f"{self.where}: {what}; name the file and config.json of this encoder")

    def rename(self, name: str) -> str:
        """Return the name that a tensor has in the file."""
        for pair in self.names.split():
            name = name.replace(*pair.split("="))
        return self.prefix + name

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return a tensor; give its shape (-1: any) where broadcasting could hide another.

        For a missing one its like in another layer stands in, so that `check` can name them all.
        """
        name = self.rename(name)
        value, self.asked[name] = self._buffers.get(name), True
        if value is None:
            pattern = re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
            value = next((v for k, v in self._buffers.items() if re.fullmatch(pattern, k)), None)
        if value is None:
            raise self.fault(f"missing tensors: {name}")
        sizes = zip(shape, value.shape, strict=False)
        fits = len(shape) == value.ndim and all(a in (-1, b) for a, b in sizes)
        if shape and not fits:
            raise self.fault(f"tensor {name} is {tuple(value.shape)}, expected {shape}")
        return value

    def n_layers(self, prefix: str, key: str = "") -> int:
        """Count layers: the config's `key`, or one more than the largest number after `prefix`."""
        pattern = re.escape(self.rename(prefix)).replace(r"\*", r"\d+") + r"(\d{1,3})\."
        found = [int(match[1]) for name in self._buffers if (match := re.match(pattern, name))]
        return self.hparam(key, max(found, default=0) + 1)

    def hparam(self, key: str, default: float, divides: int = 0) -> int | float:
        """Return a positive number of the config, or the default where it has none."""
        value = self.config.get(key, default)
        if type(value) not in (int, type(default)) or not 0 < value < 1e6:
            raise self.fault(f"{key} is {value!r}")
        if divides % value:
            raise self.fault(f"{key} is {value!r}, which does not divide {divides}")
        return value

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Apply a linear layer; a 1x1 convolution holds the same numbers."""
        weight = self.tensor(f"{name}.weight").flatten(1)
        return data.linear(x.type_as(weight), weight, self.tensor(f"{name}.bias", len(weight)))

    def conv(self, x: Tensor, name: str, bias: bool = True, **options: Any) -> Tensor:
        weight = self.tensor(f"{name}.weight")
        bias = self.tensor(f"{name}.bias", len(weight)) if bias else None
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x.type_as(weight), weight, bias, **options)

    def patches(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        """Embed patches: (N, 3, [T,] H, W) -> (N, [t,] h, w, D)."""
        x = self.conv(x, name, bias, stride=self.tensor(f"{name}.weight").shape[2:])
        return x.movedim(1, -1).contiguous()  # or every block would run on transposed tokens

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    @torch.no_grad()
    def check(self, run: Callable, *shape: int, **facts: int) -> None:
        """Run without numbers: all tensors are there, fit the config's `facts`, none is over."""
        for key, value in facts.items():
            if self.config.get(key, value) != value:
                raise self.fault(f"{key} is {self.config[key]!r}, its tensors say {value}")
        buffers, broken = self._buffers, None
        self._buffers = {name: value.to("meta") for name, value in buffers.items()}
        try:
            run(torch.empty(shape, device="meta"))
        except (RuntimeError, ValueError, IndexError) as error:
            broken = error
        self._buffers = buffers
        missing = [name for name in self.asked if name not in buffers]
        if broken and not missing:
            layer = [*self.asked][-1].rpartition(".")[0]
            misfit = self.fault(f"its tensors do not fit together at {layer} ({broken})")
            raise broken if isinstance(broken, InputError) else misfit
        spare = tuple(self.prefix + name for name in self.unused)
        left = [name for name in buffers if name not in self.asked and not name.startswith(spare)]
        kinds = {"missing": missing, "unexpected": [] if broken else left}
        faults = [f"{kind} tensors: {', '.join(x[:4])}" for kind, x in kinds.items() if x]
        if faults:
            raise self.fault(" and ".join(faults))


def resize_grid(x: Tensor, size: tuple[int, int], mode: str, antialias: bool = False) -> Tensor:
    """Resize a token grid (N, h, w, D) in float32; one that fits stays as it is."""
    if x.shape[1:3] == size:
        return x
    y = F.interpolate(x.float().movedim(-1, 1), size, mode=mode, antialias=antialias)
    return y.movedim(1, -1).type_as(x)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """Lay out patches (N, h, w, p p 3), colour last, to images (N, 3, h p, w p)."""
    x = x.unflatten(3, (p, p, 3)).permute(0, 5, 1, 3, 2, 4)  #              (N, 3, h, p, w, p)
    return x.flatten(4).flatten(2, 3)


def axial_rope(*axes: Tensor, pairs: int) -> Tensor:
    """Return e^(i angle), angle_j = position * 10000^(-j / K), for K pairs an axis; the rest 1.

    axes  positions along each axis of a grid of n tokens   ->  (n, pairs) complex
    """
    K = pairs // len(axes)
    frequency = 10000 ** (-torch.arange(K, device=axes[0].device) / K)
    grid = torch.meshgrid(*axes, indexing="ij")
    angle = torch.cat([axis.reshape(-1, 1) * frequency for axis in grid], dim=1)
    angle = F.pad(angle, (0, pairs - angle.shape[1]))
    return torch.polar(torch.ones_like(angle), angle)


class Transformer(Network):
    """A stack of pre-norm blocks; subclasses say what the file calls the parts of a block.

    x += scale1 proj(attention(norm1(x)))
    x += scale2 fc2(gelu(fc1(norm2(x)))),   gated: fc2(silu(gate) up), [gate, up] = fc1(...)
    """

    blocks, norm1, norm2, qkv, proj = "blocks.", "norm1", "norm2", ("attn.qkv",), "attn.proj"
    fc1, fc2, scales, gelu = ("mlp.fc1",), "mlp.fc2", (), "none"
    gated, rotate_half = False, False

    def apply_rope(self, x: Tensor, rope: Tensor) -> Tensor:
        """Turn channel pairs by position, in float32: (a + ib) e^(i angle) [Su et al. 2021, 3.2.2].

        x (N, heads, n, d), rope (n, d / 2); a pair is 2j, 2j + 1, or j, j + d / 2 in `rotate_half`
        """
        x, dtype, halves = x.float(), x.dtype, self.rotate_half
        pairs = x.unflatten(-1, (2, -1)).mT.contiguous() if halves else x.unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs).mul_(rope))
        return (turned.mT if halves else turned).flatten(-2).to(dtype)

    def parts(self, x: Tensor, name: str, parts: tuple, count: int) -> list[Tensor]:
        """Apply `count` layers, which the file may hold as one."""
        out = [self.linear(x, name + part) for part in parts]
        return out if len(out) == count else out[0].chunk(count, dim=-1)

    def block(
        self, x: Tensor, i: int, rope: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map tokens (N, n, D) through block i; out of place: tests/study.py trains through it."""
        name = f"{self.blocks}{i}."
        scales = [self.tensor(name + scale, x.shape[-1]) for scale in self.scales]
        y = self.norm(x, name + self.norm1)
        qkv = self.parts(y, name, self.qkv, 3)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        if rope is not None:
            q, k = self.apply_rope(q, rope), self.apply_rope(k, rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  #      (N, heads, n, d)
        y = self.linear(y.transpose(1, 2).flatten(2), name + self.proj)
        x = torch.addcmul(x, y, scales[0]) if scales else x + y
        y = self.parts(self.norm(x, name + self.norm2), name, self.fc1, 1 + self.gated)
        y = F.silu(y[0]) * y[1] if self.gated else F.gelu(y[0], approximate=self.gelu)
        y = self.linear(y, name + self.fc2)
        return torch.addcmul(x, y, scales[1]) if scales else x + y


class DINO(Transformer):
    """DINOv2 as in Web-DINO: images to tokens, by a table of positions."""

    end_norm = "file"  # the norm at the end: the "file"'s, a "plain" one without weights, or "none"
    mean_std, unused, size = IMAGENET, ("embeddings.mask_token",), 224
    patch, table = "embeddings.patch_embeddings.projection", "embeddings.position_embeddings"
    cls, registers = "embeddings.cls_token", ""
    blocks, proj = "encoder.layer.", "attention.output.dense"
    qkv = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    scales = ("layer_scale1.lambda1", "layer_scale2.lambda1")

    def build(self) -> None:
        self.dim, _, _, self.unit = self.tensor(f"{self.patch}.weight", -1, 3, -1, -1).shape
        self.heads = self.hparam("num_attention_heads", 12, self.dim)
        self.eps = self.hparam("layer_norm_eps", 1e-6)
        self.depth = self.n_layers(self.blocks, "num_hidden_layers")
        if self.config.get("use_swiglu_ffn"):
            self.fc1, self.fc2, self.gated = ("mlp.weights_in",), "mlp.weights_out", True
        self.places = self.tensor(self.table).numel() // self.dim - bool(self.cls)
        self.h, side = math.isqrt(self.places), 2 * self.unit
        self.size = self.size or self.h * self.unit
        facts = {"patch_size": self.unit, "image_size": self.h * self.unit}
        self.check(self.encode, 1, 3, side, side, hidden_size=self.dim, **facts)

    def encode(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to tokens (N, h, w, D)."""
        x = self.patches(x, self.patch)
        N, h, w, D = x.shape
        table = self.tensor(self.table).view(1, -1, D)
        grid = table[:, -self.places :].unflatten(1, (self.h, self.h))
        antialias = bool(self.registers)  # upstream's classes with and without registers differ
        x = (x + resize_grid(grid, (h, w), "bicubic", antialias)).flatten(1, 2)
        prefix = [self.tensor(self.cls, 1, 1, D) + table[:, :1]] if self.cls else []
        prefix += [self.tensor(self.registers)] if self.registers else []  # without a position
        x = torch.cat([*(token.expand(N, -1, -1) for token in prefix), x], dim=1)
        for i in range(self.depth):
            x = self.block(x, i)
        x = x[:, -h * w :].unflatten(1, (h, w))
        if self.end_norm == "file":
            return self.norm(x, "layernorm")
        return F.layer_norm(x, (D,), eps=1e-6) if self.end_norm == "plain" else x


class RAE(DINO):
    """DINOv2 with registers as in RAE, which does without the weights of the last norm."""

    registers, end_norm = "embeddings.register_tokens", "plain"
    unused = ("embeddings.mask_token", "layernorm.")


class SigLIP(DINO):
    """SigLIP's vision tower (Scale-RAE), to its last layer: as DINO, without CLS and scales."""

    keep = ("vision_model.", "embeddings.", "encoder.")
    mean_std, end_norm, unused, size = HALF, "plain", ("head.", "post_layernorm."), None
    patch, table, cls = "embeddings.patch_embedding", "embeddings.position_embedding.weight", ""
    blocks, norm1, norm2 = "encoder.layers.", "layer_norm1", "layer_norm2"
    qkv, proj = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
    scales, gelu = (), "tanh"


class VJEPA(Transformer):
    """V-JEPA 2.1: every block turns 20 of 64 channels by time, 20 by row, 20 by column, 4 not."""

    files, needs_config = ("vjepa2_1_vitl_dist_vitG_384.pt", "vjepa*.pt"), (False, False)
    size, mean_std, clamp = 256, IMAGENET, True
    unused = ("norms_block.0.", "norms_block.1.", "norms_block.2.")  # of intermediate outputs

    def build(self) -> None:
        weight = self.tensor("patch_embed.proj.weight", -1, 3, -1, -1, -1)
        self.dim, _, frames, _, self.unit = weight.shape
        self.heads, self.depth, side = self.dim // 64, self.n_layers(self.blocks), 2 * self.unit
        self.check(lambda x: (self(x), self.encode(x[:, :, 0])), 1, 3, frames, side, side)

    def forward(self, x: Tensor) -> Tensor:
        """Map one frame (N, 3, 1, H, W) or a video (N, 3, T, H, W) to tokens (N, t, h, w, D)."""
        suffix, kind = ("_img", "img") if x.shape[2] == 1 else ("", "video")
        x = self.patches(x, f"patch_embed{suffix}.proj")
        grid = t, h, w = x.shape[1:4]
        time, row, column = (torch.arange(size, device=x.device).float() for size in grid)
        row, column = row * 15 / max(h - 1, 1), column * 15 / max(w - 1, 1)  # spans 0..15, its grid
        rope = axial_rope(time, row, column, pairs=32)
        x = x.flatten(1, 3) + self.tensor(f"{kind}_mod_embed", 1, 1, self.dim)
        for i in range(self.depth):
            x = self.block(x, i, rope)
        return self.norm(x, "norms_block.3").unflatten(1, grid)

    def encode(self, x: Tensor) -> Tensor:
        return self(x[:, :, None]).squeeze(1)  # every frame is an image


class QwenTower(Transformer):
    """Qwen2.5-VL's vision tower on pairs of frames, up to the norm of its merger.

    In raster order: most blocks attend inside windows of patches, cut from the top left, by a mask
    instead of upstream's permutation. Pairs never see each other.
    """

    files = HF_FILES[::-1]
    keep = ("visual.", "model.visual.", "patch_embed.", "blocks.", "merger.")
    size, mean_std, clamp, unused = 224, CLIP, True, ("merger.mlp.",)
    fc1, fc2, gated, rotate_half = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", True, True

    def build(self) -> None:
        weight = self.tensor("patch_embed.proj.weight", -1, 3, -1, -1, -1)
        self.dim, _, self.pair, _, p = weight.shape
        self.stride = self.pair  # or 1: every frame is an image, paired with itself
        self.heads = self.hparam("num_heads", 16, self.dim // 4)
        self.depth = self.n_layers(self.blocks, "depth")
        self.unit = p * self.hparam("spatial_merge_size", 2)  # windows hold whole groups of patches
        self.window = self.hparam("window_size", 112) // self.unit * self.unit // p
        self.full = self.config.get("fullatt_block_indexes", [7, 15, 23, 31])
        if self.window < 1 or not isinstance(self.full, list):
            raise self.fault("window_size or fullatt_block_indexes is none")
        facts = {"patch_size": p, "temporal_patch_size": self.pair, "hidden_size": self.dim}
        self.check(self.encode, self.stride, 3, self.unit, self.unit, **facts)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensor(f"{name}.weight"), 1e-6)

    def encode(self, x: Tensor) -> Tensor:
        """Map frames (N, 3, H, W) to tokens (N / frames, h, w, D)."""
        x = x.unflatten(0, (-1, self.stride)).transpose(1, 2).expand(-1, -1, self.pair, -1, -1)
        x = self.patches(x, "patch_embed.proj", bias=False).squeeze(1)
        h, w, D = x.shape[1:]
        row, column = (torch.arange(size, device=x.device) for size in (h, w))
        rope = axial_rope(row.float(), column.float(), pairs=D // self.heads // 2)
        window = (row[:, None] // self.window * w + column // self.window).flatten()
        same, x = window[:, None] == window, x.flatten(1, 2)
        for i in range(self.depth):
            x = self.block(x, i, rope, None if i in self.full else same)
        return self.norm(x, "merger.ln_q").unflatten(1, (h, w))


class ViTDecoder(Transformer):
    """Decoder of RAE and Scale-RAE, a ViT-MAE decoder: tokens to the patches of an image."""

    files, needs_config = ("model.pt", "*dec*.pt"), (False, True)
    blocks, norm1, norm2 = "decoder_layers.", "layernorm_before", "layernorm_after"
    qkv, proj, fc1, fc2 = DINO.qkv, DINO.proj, ("intermediate.dense",), "output.dense"

    def build(self) -> None:
        self.dim, self.in_dim = self.tensor("decoder_embed.weight", -1, -1).shape
        self.heads = self.hparam("decoder_num_attention_heads", 16, self.dim)  # all released: 16
        self.depth = self.n_layers(self.blocks, "decoder_num_hidden_layers")
        self.eps = self.hparam("layer_norm_eps", 1e-12)
        self.places = self.tensor("decoder_pos_embed", 1, -1, self.dim).shape[1]
        self.h = math.isqrt(self.places - 1)
        self.patch = math.isqrt(self.tensor("decoder_pred.bias", -1).numel() // 3)
        self.check(self.decode, 1, self.h, self.h, self.in_dim)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (N, h, w, C) to normalised images (N, 3, side p, side p)."""
        x = resize_grid(self.linear(z, "decoder_embed"), (self.h, self.h), "bilinear").flatten(1, 2)
        cls = self.tensor("trainable_cls_token", 1, 1, self.dim)
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        x = x + self.tensor("decoder_pos_embed", 1, self.places, self.dim)
        for i in range(self.depth):
            x = self.block(x, i)
        x = self.linear(self.norm(x[:, 1:], "decoder_norm"), "decoder_pred")
        return unpatchify(x.unflatten(1, (self.h, self.h)), self.patch)


class KLAutoencoder(Network):
    """The autoencoder of latent diffusion, under the names of LDM (VA-VAE) or diffusers (SD3)."""

    files = ("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    needs_config, chunk, ldm = (False, True), 8, False
    names = """
        encoder.down.=encoder.down_blocks. decoder.up.=decoder.up_blocks. .block.=.resnets.
        sample.conv.=samplers.0.conv. mid.block_1.=mid_block.resnets.0.
        mid.block_2.=mid_block.resnets.1. mid.attn_1.norm.=mid_block.attentions.0.group_norm.
        mid.attn_1.proj_out.=mid_block.attentions.0.to_out.0. mid.attn_1.=mid_block.attentions.0.to_
        norm_out.=conv_norm_out. nin_shortcut.=conv_shortcut.
    """

    def build(self) -> None:
        self.groups = self.hparam("norm_num_groups", 32)  # the dry run finds what does not divide
        self.dim = self.tensor("decoder.conv_in.weight", -1, -1, 3, 3).shape[1]
        self.levels = self.n_layers("encoder.down.")
        self.blocks = self.n_layers("encoder.down.*.block.", "layers_per_block")
        self.quant, self.unit = self.config.get("use_quant_conv", self.ldm), 2 ** (self.levels - 1)
        run, side = lambda x: self.decode(self.encode(x)), 2 * self.unit
        self.check(run, 1, 3, side, side, latent_channels=self.dim)

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
        y = self.group_norm(x, f"{name}.norm").flatten(2).mT[:, None]  #    (N, 1, h w, D)
        q, k, v = (self.linear(y, f"{name}.{part}") for part in "qkv")
        y = self.linear(F.scaled_dot_product_attention(q, k, v), f"{name}.proj_out")
        return x + y[:, 0].mT.unflatten(2, x.shape[2:])

    def level(self, x: Tensor, name: str, blocks: int, coarsest: bool) -> Tensor:
        for i in range(blocks):
            x = self.resnet(x, f"{name}.block.{i}")
            if self.ldm and coarsest:  # at any size of x
                x = self.attention(x, f"{name}.attn.{i}")
        return x

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.attention(self.resnet(x, f"{name}.block_1"), f"{name}.attn_1")
        return self.resnet(x, f"{name}.block_2")

    def encode(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to posterior means (N, h, w, C)."""
        x = self.conv(x, "encoder.conv_in", padding=1)
        for i in range(self.levels):
            x = self.level(x, f"encoder.down.{i}", self.blocks, i == self.levels - 1)
            if i < self.levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", stride=2)
        x = self.layer(self.middle(x, "encoder.mid"), "encoder.norm_out", "encoder.conv_out")
        x = self.conv(x, "quant_conv") if self.quant else x
        return x.chunk(2, dim=1)[0].movedim(1, -1)  # the other half: log variances

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (N, h, w, C) to images (N, 3, H, W)."""
        x = z.movedim(-1, 1)
        x = self.conv(x, "post_quant_conv") if self.quant else x
        x = self.middle(self.conv(x, "decoder.conv_in", padding=1), "decoder.mid")
        for i in range(self.levels):  # diffusers counts from the coarsest, LDM from the finest
            name = f"decoder.up.{self.levels - 1 - i if self.ldm else i}"
            x = self.level(x, name, self.blocks + 1, i == 0)
            if i < self.levels - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"{name}.upsample.conv", padding=1)
        return self.layer(x, "decoder.norm_out", "decoder.conv_out")


class VAVAE(KLAutoencoder):
    """VA-VAE: LDM's own names, two more convolutions, attention after each of the last resnets."""

    files = ("vavae-imagenet256-f16d32-dinov2.pt", "vavae*.pt")
    keep = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    needs_config, ldm, names = (False, False), True, ""


class Patches(Network):
    """No network: z is the p x p x 3 values of a patch, undone exactly."""

    chunk = 4096

    def build(self) -> None:
        self.unit, self.dim = self.config["patch_size"], 3 * self.config["patch_size"] ** 2

    def encode(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, self.unit)).unflatten(2, (-1, self.unit))  # (N, 3, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)  #                     (N, h, w, p p 3)

    def decode(self, z: Tensor) -> Tensor:
        return unpatchify(z, self.unit)


class Cosmos(Network):
    """NVIDIA's TorchScript archives. They run code, and a trace bakes its dtype in: never cast."""

    files, chunk = ("encoder.jit",), 8

    @torch.no_grad()
    def build(self) -> None:
        self.archives, self.jits = (self.where, self.config["decoder"]), {}
        with data.reading(self.where, "fetch it again", RuntimeError, *data.PARSE_ERRORS):
            z = self.encode(torch.zeros(1, 3, 64, 64))
            _, h, _, self.dim = z.shape
        with data.reading(self.archives[1], "fetch it again", RuntimeError, *data.PARSE_ERRORS):
            if self.decode(z).ndim != 4:
                raise ValueError("does not give images")
        self.unit = 64 // h

    def call_jit(self, i: int, x: Tensor) -> Tensor:
        """Run encoder (0) or decoder (1), loaded for x's device: constants of a trace stay put."""
        if (i, x.device) not in self.jits:
            data.check_zip(self.archives[i])
            jit = torch.jit.load(str(self.archives[i]), map_location=x.device).eval()
            dtypes = [value.dtype for value in (*jit.parameters(), *jit.buffers())]
            self.jits[i, x.device] = jit, (dtypes or [torch.float32])[0]
        jit, dtype = self.jits[i, x.device]
        out = jit(x.to(dtype).contiguous())
        return out[0] if isinstance(out, tuple) else out

    def encode(self, x: Tensor) -> Tensor:
        return self.call_jit(0, x).movedim(1, -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.call_jit(1, z.movedim(-1, 1))


NETWORKS = {"pixels": Patches, "vae": KLAutoencoder, "vavae": VAVAE, "cosmos": Cosmos, "rae": RAE}
NETWORKS |= {"scale_rae_siglip": SigLIP, "scale_rae_webssl": DINO, "vjepa2": VJEPA}
NETWORKS["qwen"] = QwenTower


def build_network(cls: type, name: str) -> Network:
    """Find, read and build a network: its tensors, from the shards needed, and its config.json."""
    path, state = find_file(name, *cls.files), {}
    if cls is Cosmos:
        return Cosmos(path, {}, {"decoder": find_companion(path, name, "decoder.jit")})
    shards, config = [path.name], path.parent / "config.json"
    if path.suffix == ".json":
        table = read_json(path, "weight_map")
        shards = sorted({str(table[key]) for key in table if key.startswith(cls.keep)})
        if not all(re.fullmatch(r"\w[\w.-]*", shard) for shard in shards):
            raise InputError(f"{path}: weight_map holds more than names of files; fetch it again")
    for shard in shards:
        state |= read_tensors(find_companion(path, name, shard), cls.keep)
    here, hub = cls.needs_config
    hub = hub and not name.startswith("nyu-visionx/")  # all of 16 heads; RAE's lacks one
    needed = here if Path(name).expanduser().exists() else hub
    if needed:
        config = find_companion(path, name, "config.json")
    return cls(path, state, read_json(config, "vision_config") if config.is_file() else {})


class BaseAutoencoder(nn.Module):
    """The one contract: encode and decode, frozen, deterministic, in chunks, float32 outside.

    latent_dim       channels C of a latent
    temporal_stride  frames a latent stands for
    fingerprint      names the latent space: type, weights and options; the decoder has no part
    dtype            of the networks; none: bfloat16 on CUDA, float32 elsewhere
    """

    dtype: torch.dtype | None = None

    def __init__(self, config: EncoderConfig):
        super().__init__()
        kind = config.encoder_type
        if kind == "pixels":
            network = Patches(Path(), {}, {"patch_size": config.patch_size})
        else:
            network = build_network(NETWORKS[kind], config.weights or RELEASES[kind])
        network.stride = 1 if config.qwen_mode == "image" else network.stride
        network.end_norm = network.end_norm if config.final_norm else "none"
        self.config, self.network, self.decoder = config, network, None
        self.latent_dim, self.temporal_stride = network.dim, network.stride
        self.image_size = config.image_size or network.size
        release = kind in DECODERS and network.dim == int(ENCODERS[kind][1].split("x")[2])
        self.has_decoder = hasattr(network, "decode") or bool(config.decoder_weights) or release
        if config.decoder_weights:  # the release's is fetched when it is needed
            self.load_decoder()
        stats = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # mean, std of the latents
        if kind == "vae":  # z = (mean - shift) scale
            stats[0] = network.hparam("shift_factor", 0.0609) if config.sd3_shift else 0
            stats[1] = 1 / network.hparam("scaling_factor", 1.5305)
        if config.latent_stats or config.standardize:
            files, home = ("latents_stats.pt", "stat.pt"), network.where.parent
            own = [home / file for file in files if (home / file).is_file()]
            name = config.latent_stats or [*own, LATENT_STATS[kind]][0]
            stats = read_stats(find_file(name, *files), network.dim)
        self.stats = nn.Buffer(stats, persistent=False)
        self.mean_std = nn.Buffer(torch.tensor(network.mean_std).view(2, 3, 1, 1), persistent=False)
        facts = [kind, network.dim, self.image_size, config.qwen_mode, config.final_norm]
        facts += [hashlib.sha256(path.read_bytes()).digest() for path in network.archives[:1]]
        for name, value in (*network.state_dict().items(), ("stats", stats)):
            bits = value.view(torch.int32).sum(dtype=torch.int64).item()  # exact in any order
            facts += [name.removeprefix(network.prefix), tuple(value.shape), bits]
        self.fingerprint = f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
        self.eval()  # there is nothing to train: not one parameter, and no layer with two modes

    def run_in_chunks(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a network in chunks and in its own dtype, whatever the caller's autocast says."""
        device = self.stats.device
        dtype = self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        for network in self.children():  # costs next to nothing but after a move
            network.to(device, dtype)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            parts = x.split(self.network.chunk)
            return torch.cat([call(part.to(device, non_blocking=True)).float() for part in parts])

    def load_decoder(self) -> None:
        """Load the decoder of RAE or Scale-RAE."""
        name = self.config.decoder_weights or DECODERS[self.config.encoder_type]
        self.decoder = build_network(ViTDecoder, name)
        if self.decoder.in_dim != self.latent_dim:
            what = f"it decodes {self.decoder.in_dim} channels, not {self.latent_dim}"
            raise self.decoder.fault(what)

    def encode_chunk(self, frames: Tensor) -> Tensor:
        """Resize and normalise frames (N, H, W, 3), encode and standardise them."""
        x = data.to_floats(frames.movedim(-1, 1))
        size = (self.image_size or x.shape[2], self.image_size or x.shape[3])
        if x.shape[2:] != size:  # as upstream: no antialias, and it overshoots [0, 1] at edges
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        x = x.clamp(0, 1) if self.network.clamp else x
        z = self.network.encode((x - self.mean_std[0]) / self.mean_std[1]).float()
        if self.stats.shape[1:3] not in ((1, 1), z.shape[1:3]):
            shapes = f"{tuple(z.shape[1:])}, their statistics {tuple(self.stats.shape[1:])}"
            raise InputError(f"latents are {shapes}; change image_size or latent_stats")
        return (z - self.stats[0]) / self.stats[1]

    def decode_chunk(self, z: Tensor) -> Tensor:
        """Undo `encode_chunk`: (N, h, w, C) to frames (N, H, W, 3)."""
        decode = (self.decoder or self.network).decode
        x = decode(z.float() * self.stats[1] + self.stats[0])
        return (x.float() * self.mean_std[1] + self.mean_std[0]).clamp(0, 1).movedim(1, -1)

    def check_frames(self, frames: Tensor) -> None:
        """Refuse what is no video."""
        if frames.ndim < 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise InputError(f"frames are {tuple(frames.shape)}; give (B, T, H, W, 3), RGB last")
        size, unit = [self.image_size or side for side in frames.shape[-3:-1]], self.network.unit
        if size[0] % unit or size[1] % unit:
            what = f"{size[0]}x{size[1]} pixels: {self.config.encoder_type}"
            raise InputError(f"{what} needs multiples of {unit}; crop them or set image_size")
        if frames.dtype == torch.uint8:
            return
        low, high = (value.item() for value in torch.aminmax(frames.real))
        if not (frames.is_floating_point() and low >= -1e-3 and high <= 1.001):  # refuses NaN too
            what = f"frames are {frames.dtype} from {low:.4g} to {high:.4g}"
            raise InputError(f"{what}; give floats in [0, 1] (0..255: divide by 255), or uint8")

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames; the same frames always give the same latents.

        frames  (B, T, H, W, 3)    uint8, or floats in [0, 1]; other leading axes are kept too
        ->      (B, T', h, w, C)   float32, T' = ceil(T / temporal_stride)
        Raises InputError for another layout, range or size.
        """
        self.check_frames(frames := torch.as_tensor(frames))
        if missing := -frames.shape[-4] % self.temporal_stride:  # repeat the last frame
            frames = torch.cat([frames, *[frames[..., -1:, :, :, :]] * missing], dim=-4)
        z = self.run_in_chunks(self.encode_chunk, frames.flatten(0, -4))
        return z.unflatten(0, (*frames.shape[:-4], -1))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to frames in [0, 1].

        z   (B, T', h, w, C)    other leading axes are kept too
        ->  (B, T', H, W, 3)    float32
        Raises InputError when this encoder has no decoder or the latents are another's.
        """
        kind, z = self.config.encoder_type, torch.as_tensor(z)
        if not self.has_decoder:
            what = f"{kind} has no decoder{' unless you name decoder_weights' * (kind in DECODERS)}"
            remedy = f"python train_adapter.py --encoder_type {kind} --use_pixel_decoder true"
            raise InputError(f"{what}; train a pixel decoder for its latents: {remedy}")
        if z.ndim < 4 or z.shape[-1] != self.latent_dim or 0 in z.shape:
            shape = f"(B, T, h, w, {self.latent_dim})"
            raise InputError(f"latents are {tuple(z.shape)}; {kind} decodes {shape}")
        if kind in DECODERS and self.decoder is None:
            self.load_decoder()
        return self.run_in_chunks(self.decode_chunk, z.flatten(0, -4)).unflatten(0, z.shape[:-3])


def create_autoencoder(config: EncoderConfig) -> BaseAutoencoder:
    """Build the encoder that the config names, with its weights loaded strictly."""
    return BaseAutoencoder(config)


@dataclasses.dataclass(frozen=True)
class Args(EncoderConfig):
    """Print the table of encoders, or show what one makes of a picture."""

    image: str | None = None  # picture file; none: print the table
    output: str = "encoder.png"  # input | reconstruction, if any | PCA of the latents as RGB


def main() -> None:
    args = data.parse_args(Args)
    if args.image is None:
        head, *rows = (f"{row:105}" for row in TABLE.splitlines())
        print(f"{head}found")
        for row, (kind, name) in zip(rows, RELEASES.items(), strict=True):
            try:
                found = kind == "pixels" or find_file(name, *NETWORKS[kind].files, download=False)
            except MissingFileError:
                found = False
            print(f"{row}{'yes' if found else 'no'}")
        print("latent of a 256x256 frame; encoder + decoder; adapter: the paper compresses it so")
        return
    with data.reading(args.image, remedy := "name a picture", OSError):
        photo = data.decode_frame(Path(args.image).read_bytes(), 256, args.image, remedy)
    encoder, frames = create_autoencoder(args), data.to_floats(photo)[None]
    z = encoder.encode(frames)  #                                           (T = 1, h, w, C)
    x = z[0] - z[0].mean((0, 1))
    rgb = x @ torch.linalg.svd(x.flatten(0, 1), full_matrices=False)[2][:3].T
    rgb = F.pad(rgb, (0, 3 - rgb.shape[-1]))  # one cell has one axis
    low, high = rgb.flatten(0, 1).quantile(torch.tensor([0.01, 0.99]), dim=0)
    colours = (rgb - low) / (high - low).clamp(min=1e-6)
    pictures = [frames[0], *(encoder.decode(z) if encoder.has_decoder else ()), colours]
    tiles = [F.interpolate(picture.movedim(-1, 0)[None], 256)[0] for picture in pictures]
    sheet = Image.fromarray(data.to_uint8(torch.cat(tiles, dim=2).movedim(0, -1)))
    data.write_atomic(args.output, lambda path: sheet.save(path, "PNG"))
    middle = "reconstruction, " * encoder.has_decoder
    print(f"{args.output}: input, {middle}latents {tuple(z.shape[1:])}")


if __name__ == "__main__":
    data.run_cli(main)
