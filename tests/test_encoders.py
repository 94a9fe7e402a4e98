"""Encoders load the public layouts strictly and compute the upstream features."""

import json
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import encoders
from data import InputError, MissingFileError
from encoders import EncoderConfig, create_autoencoder

ROOT = Path(__file__).parents[1]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32, sums in another order


def randomise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights like those of a trained network: matrices keep the scale, norms change it."""
    out = {}
    for name, value in tensors.items():
        out[name] = torch.randn(value.shape)
        if value.ndim > 1:
            out[name] *= value[0].numel() ** -0.5
        elif name.endswith("weight") or "lambda" in name:
            out[name] = 1 + 0.3 * out[name]
    return out


# ------------------------------------------------------------------------------------------------
# Small checkpoints in the public layouts, and what upstream computes with them


def save_hugging_face(model, folder):
    """Fill a transformers model with random weights, save it, return it in evaluation mode."""
    torch.manual_seed(1)
    model.load_state_dict(randomise(model.state_dict()), strict=False)
    model.save_pretrained(folder)
    return model.float().eval()


def dino(folder, registers=True, image=98, swiglu=False):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2}
    sizes |= {"image_size": image, "patch_size": 14, "use_swiglu_ffn": swiglu}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **sizes)
        return save_hugging_face(transformers.Dinov2WithRegistersModel(config), folder)
    return save_hugging_face(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)), folder)


SIGLIP = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 70}
SIGLIP |= {"intermediate_size": 72, "patch_size": 14}


def siglip(folder, tower_only=False):
    transformers = pytest.importorskip("transformers")
    if tower_only:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
        return save_hugging_face(model, folder)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.SiglipConfig(vision_config=SIGLIP, text_config=text)
    return save_hugging_face(transformers.SiglipModel(config), folder).vision_model


def qwen(folder):
    transformers = pytest.importorskip("transformers")
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4}
    vision |= {"out_hidden_size": 24, "window_size": 56, "fullatt_block_indexes": [1]}
    text = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    model = save_hugging_face(transformers.Qwen2_5_VLForConditionalGeneration(config), folder)
    return model.model.visual


def vjepa_state(dim=128, depth=2, hidden=192):
    norm = {"weight": (dim,), "bias": (dim,)}
    shapes = {"img_mod_embed": (1, 1, dim), "video_mod_embed": (1, 1, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 2, 16, 16), "patch_embed.proj.bias": (dim,)}
    shapes |= {"patch_embed_img.proj.weight": (dim, 3, 1, 16, 16)}
    shapes |= {"patch_embed_img.proj.bias": (dim,)}
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns)}
            shapes |= {f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{key}": shape for key, shape in norm.items()}
    for i in range(4):
        shapes |= {f"norms_block.{i}.{key}": shape for key, shape in norm.items()}
    return randomise({name: torch.empty(shape) for name, shape in shapes.items()})


def vjepa(path):
    state = vjepa_state()
    wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
    other = {name: value + 1 for name, value in wrapped.items()}
    torch.save({"ema_encoder": wrapped, "encoder": other, "epoch": 3, "lr": 0.1}, path)
    return state


def vjepa_reference(state, image):
    """Follow the published description token by token and pair by pair: image (3, H, W)."""
    s, dim = state, state["img_mod_embed"].shape[-1]
    weight, bias = s["patch_embed_img.proj.weight"][:, :, 0], s["patch_embed_img.proj.bias"]
    grid = F.conv2d(image[None], weight, bias, stride=16)[0]
    D, h, w = grid.shape
    x = grid.flatten(1).T + s["img_mod_embed"][0]
    for i in range(2):
        p = f"blocks.{i}."
        y = F.layer_norm(x, (dim,), s[p + "norm1.weight"], s[p + "norm1.bias"], 1e-6)
        q, k, v = (y @ s[p + "attn.qkv.weight"].T + s[p + "attn.qkv.bias"]).chunk(3, dim=-1)
        heads = []
        for head in range(dim // 64):
            a, b, c = (t[:, 64 * head : 64 * head + 64].clone() for t in (q, k, v))
            for token in range(h * w):
                row, column = token // w * 15 / (h - 1), token % w * 15 / (w - 1)
                for axis, position in enumerate((0.0, row, column)):
                    for pair in range(10):
                        angle = torch.tensor(position * 10000 ** (-pair / 10))
                        j = 20 * axis + 2 * pair
                        for t in (a, b):
                            first, second = t[token, j].clone(), t[token, j + 1].clone()
                            t[token, j] = first * angle.cos() - second * angle.sin()
                            t[token, j + 1] = second * angle.cos() + first * angle.sin()
            heads.append((a @ b.T / 8).softmax(-1) @ c)
        x = x + torch.cat(heads, 1) @ s[p + "attn.proj.weight"].T + s[p + "attn.proj.bias"]
        y = F.layer_norm(x, (dim,), s[p + "norm2.weight"], s[p + "norm2.bias"], 1e-6)
        y = F.gelu(y @ s[p + "mlp.fc1.weight"].T + s[p + "mlp.fc1.bias"])
        x = x + y @ s[p + "mlp.fc2.weight"].T + s[p + "mlp.fc2.bias"]
    x = F.layer_norm(x, (dim,), s["norms_block.3.weight"], s["norms_block.3.bias"], 1e-6)
    return x.view(h, w, dim)


class Mae(nn.Module):
    """The decoder of RAE built from torch's own transformer layers."""

    def __init__(self, in_dim=48, dim=32, heads=4, hidden=56, depth=2, side=5, p=4):
        super().__init__()
        layer = {"dim_feedforward": hidden, "dropout": 0, "activation": "gelu", "bias": True}
        layer |= {"layer_norm_eps": 1e-12, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, **layer) for _ in range(depth)
        )
        self.embed, self.pred = nn.Linear(in_dim, dim), nn.Linear(dim, 3 * p * p)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.table = nn.Parameter(torch.randn(1, 1 + side * side, dim))
        self.side, self.p = side, p
        self.load_state_dict(randomise(self.state_dict()))

    def forward(self, z):
        x = self.embed(z)
        if x.shape[1] != self.side:
            x = F.interpolate(x.movedim(-1, 1), (self.side, self.side), mode="bilinear")
            x = x.movedim(1, -1)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x.flatten(1, 2)], 1) + self.table
        for block in self.blocks:
            x = block(x)
        x, side, p = self.pred(self.norm(x))[:, 1:], self.side, self.p
        out = torch.empty(len(x), 3, side * p, side * p)
        for i in range(side):
            for j in range(side):
                patch = x[:, i * side + j].view(-1, p, p, 3).permute(0, 3, 1, 2)
                out[:, :, i * p : i * p + p, j * p : j * p + p] = patch
        return out

    def public(self):
        """Return the weights under their public names."""
        s = self.state_dict()
        out = {"decoder_pos_embed": s["table"], "trainable_cls_token": s["cls"]}
        for theirs, ours in (("embed", "embed"), ("norm", "norm"), ("pred", "pred")):
            out |= {f"decoder_{theirs}.{k}": s[f"{ours}.{k}"] for k in ("weight", "bias")}
        for i in range(len(self.blocks)):
            a, b = f"decoder_layers.{i}.", f"blocks.{i}."
            for key in ("weight", "bias"):
                qkv = s[f"{b}self_attn.in_proj_{key}"].chunk(3)
                for name, rows in zip(("query", "key", "value"), qkv, strict=True):
                    out[f"{a}attention.attention.{name}.{key}"] = rows.clone()
                out[f"{a}attention.output.dense.{key}"] = s[f"{b}self_attn.out_proj.{key}"]
                out[f"{a}intermediate.dense.{key}"] = s[f"{b}linear1.{key}"]
                out[f"{a}output.dense.{key}"] = s[f"{b}linear2.{key}"]
                out[f"{a}layernorm_before.{key}"] = s[f"{b}norm1.{key}"]
                out[f"{a}layernorm_after.{key}"] = s[f"{b}norm2.{key}"]
        return out


def rae_decoder(folder, **sizes):
    folder.mkdir(parents=True, exist_ok=True)
    model = Mae(**sizes).eval()
    torch.save(model.public(), folder / "model.pt")
    config = {"decoder_num_attention_heads": 4, "patch_size": "SHOULD BE RELOADED"}
    (folder / "config.json").write_text(json.dumps(config))
    return model


class Ldm(nn.Module):
    """The LDM autoencoder in plain modules whose names are the public ones (VA-VAE's)."""

    class Resnet(nn.Module):
        def __init__(self, a, b, groups):
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(groups, a, 1e-6), nn.GroupNorm(groups, b, 1e-6)
            self.conv1, self.conv2 = nn.Conv2d(a, b, 3, 1, 1), nn.Conv2d(b, b, 3, 1, 1)
            if a != b:
                self.nin_shortcut = nn.Conv2d(a, b, 1)

        def forward(self, x):
            y = self.norm1(x)
            y = self.conv1(y * y.sigmoid())
            y = self.norm2(y)
            y = self.conv2(y * y.sigmoid())
            return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Attention(nn.Module):
        def __init__(self, c, groups):
            super().__init__()
            self.norm = nn.GroupNorm(groups, c, 1e-6)
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

        def forward(self, x):
            y = self.norm(x)
            q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
            a = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=2)
            return x + self.proj_out((v @ a.transpose(1, 2)).view_as(x))

    def __init__(self, ch=32, mult=(1, 2, 2), z=4, groups=32, attended=True, quant=True):
        super().__init__()
        widths, n = [ch * m for m in mult], len(mult)
        self.n = n
        for side, a, b in (("encoder", 3, 2 * z), ("decoder", z, 3)):
            half = nn.Module()
            down = side == "encoder"
            order = list(range(n)) if down else list(range(n))[::-1]
            dim = widths[order[0]]
            half.conv_in = nn.Conv2d(a, dim, 3, 1, 1)
            levels = {}
            for i in order:
                levels[i] = level = nn.Module()
                level.block, level.attn = nn.ModuleList(), nn.ModuleList()
                for _ in range(2 if down else 3):
                    level.block.append(Ldm.Resnet(dim, widths[i], groups))
                    dim = widths[i]
                    if attended and i == n - 1:
                        level.attn.append(Ldm.Attention(dim, groups))
                if i != order[-1]:
                    resample = nn.Module()
                    resample.conv = nn.Conv2d(dim, dim, 3, 2, 0) if down else None
                    if not down:
                        resample.conv = nn.Conv2d(dim, dim, 3, 1, 1)
                    setattr(level, "downsample" if down else "upsample", resample)
            setattr(half, "down" if down else "up", nn.ModuleList(levels[i] for i in range(n)))
            half.mid = nn.Module()
            half.mid.block_1 = Ldm.Resnet(widths[-1], widths[-1], groups)
            half.mid.attn_1 = Ldm.Attention(widths[-1], groups)
            half.mid.block_2 = Ldm.Resnet(widths[-1], widths[-1], groups)
            half.norm_out = nn.GroupNorm(groups, dim, 1e-6)
            half.conv_out = nn.Conv2d(dim, b, 3, 1, 1)
            setattr(self, side, half)
        if quant:
            self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
            self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.load_state_dict(randomise(self.state_dict()))

    def level(self, level, x):
        for i, block in enumerate(level.block):
            x = block(x)
            x = level.attn[i](x) if len(level.attn) else x
        return x

    def encode(self, x):
        e = self.encoder
        x = e.conv_in(x)
        for i, level in enumerate(e.down):
            x = self.level(level, x)
            if i < self.n - 1:
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = e.conv_out(F.silu(e.norm_out(e.mid.block_2(e.mid.attn_1(e.mid.block_1(x))))))
        x = self.quant_conv(x) if hasattr(self, "quant_conv") else x
        return x[:, : x.shape[1] // 2]

    def decode(self, z):
        d = self.decoder
        x = d.conv_in(self.post_quant_conv(z) if hasattr(self, "quant_conv") else z)
        x = d.mid.block_2(d.mid.attn_1(d.mid.block_1(x)))
        for i in range(self.n)[::-1]:
            x = self.level(d.up[i], x)
            if i:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = d.up[i].upsample.conv(x)
        return d.conv_out(F.silu(d.norm_out(x)))


def vavae(path, **sizes):
    model = Ldm(**sizes).eval()
    extra = {"loss.logvar": torch.zeros(()), "foundation_model.model.x": torch.ones(2)}
    extra |= {"linear_proj.weight": torch.ones(2, 2)}
    torch.save({"state_dict": model.state_dict() | extra, "epoch": 1}, path)
    return model


def diffusers_name(name, levels):
    """Translate a name of LDM to diffusers', from the two tables of names."""
    part = name.split(".")
    attention = {
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
    }
    if part[1] in ("down", "up"):
        i = int(part[2]) if part[1] == "down" else levels - 1 - int(part[2])
        rest = ".".join(part[4:]).replace("nin_shortcut", "conv_shortcut")
        kind = {"block": f"resnets.{rest}"}.get(part[3], f"{part[3]}rs.0.conv.{part[-1]}")
        return f"{part[0]}.{part[1]}_blocks.{i}.{kind}"
    if part[1] == "mid" and part[2] == "attn_1":
        return f"{part[0]}.mid_block.attentions.0.{attention[part[3]]}.{part[4]}"
    if part[1] == "mid":
        return f"{part[0]}.mid_block.resnets.{int(part[2][-1]) - 1}.{'.'.join(part[3:])}"
    return name.replace("norm_out", "conv_norm_out")


def sd3(folder):
    """A small file of diffusers' AutoencoderKL: half precision, attention as linear layers."""
    folder.mkdir(parents=True)
    model = Ldm(ch=16, mult=(1, 2, 2, 2), z=4, groups=8, attended=False, quant=False).eval()
    model = model.half().float()
    state = {diffusers_name(k, 4): v.half().contiguous() for k, v in model.state_dict().items()}
    for name, value in state.items():
        if "attentions" in name and value.ndim == 4:
            state[name] = value[..., 0, 0].contiguous()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = {"norm_num_groups": 8, "scaling_factor": 1.5, "shift_factor": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    return model


class JitEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("haar", torch.ones(1))  # before any parameter, and never half
        self.conv = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, x):
        return self.conv(x.to(self.conv.weight.dtype)), (torch.zeros(1), torch.zeros(1))


def cosmos(folder, dtype=torch.bfloat16):
    folder.mkdir(parents=True)
    encoder, decoder = JitEncoder(), nn.ConvTranspose2d(6, 3, 8, stride=8).to(dtype)
    encoder.conv.to(dtype)
    with torch.no_grad():
        torch.jit.trace(encoder, torch.zeros(1, 3, 16, 16)).save(str(folder / "encoder.jit"))
        z = torch.zeros(1, 6, 2, 2, dtype=dtype)
        torch.jit.trace(decoder, z).save(str(folder / "decoder.jit"))
    return encoder, decoder


IMAGENET = torch.tensor(encoders.IMAGENET).view(2, 3, 1, 1)


def resized(frames, side, mean_std=IMAGENET, clamp=False):
    """The reference's preprocessing of frames (N, H, W, 3): bicubic without antialias."""
    x = frames.movedim(-1, 1)
    x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False)
    return ((x.clamp(0, 1) if clamp else x) - mean_std[0]) / mean_std[1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and empty caches; the working directory is an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)


# ------------------------------------------------------------------------------------------------
# The contract


def test_pixels_are_orthonormal_and_exactly_invertible():
    encoder = create_autoencoder(EncoderConfig("pixels", patch_size=8))
    frames = torch.randint(0, 256, (2, 3, 16, 24, 3), dtype=torch.uint8)
    z = encoder.encode(frames)
    assert z.shape == (2, 3, 2, 3, 192) and encoder.latent_dim == 192
    assert torch.equal((encoder.decode(z) * 255).round().to(torch.uint8), frames)
    x = 2 * frames.double() / 255 - 1
    torch.testing.assert_close(z.double().norm(), x.norm())
    torch.testing.assert_close(z, encoder.encode(frames / 255))
    first = x[0, 0, :8, 8:16].float().flatten()
    torch.testing.assert_close(z[0, 0, 0, 1], first)


@pytest.mark.parametrize(
    "frames",
    [
        torch.rand(1, 1, 16, 16, 4),
        torch.rand(1, 1, 3, 16, 16),
        torch.rand(16, 16, 3),
        torch.rand(1, 1, 12, 16, 3),
        torch.rand(1, 1, 16, 16, 3) * 255,
        torch.rand(1, 1, 16, 16, 3) * 2 - 1,
        torch.full((1, 1, 16, 16, 3), float("nan")),
        torch.zeros(1, 1, 16, 16, 3, dtype=torch.int64),
        torch.rand(0, 1, 16, 16, 3),
    ],
)
def test_frames_that_are_no_video_are_refused(frames):
    with pytest.raises(InputError):
        create_autoencoder(EncoderConfig("pixels", patch_size=8)).encode(frames)


def test_a_single_nan_is_found_anywhere():
    frames = torch.rand(1, 2, 16, 16, 3)
    frames[0, 1, 7, 3, 2] = float("nan")
    with pytest.raises(InputError, match="nan"):
        create_autoencoder(EncoderConfig("pixels", patch_size=8)).encode(frames)


def test_leading_axes_are_kept_and_chunks_change_nothing(tmp_path):
    vjepa(tmp_path / "v.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2", weights=str(tmp_path / "v.pt")))
    encoder.image_size = 32
    frames = torch.rand(2, 2, 3, 40, 36, 3)
    z = encoder.encode(frames)
    assert z.shape == (2, 2, 3, 2, 2, 128)
    encoder.network.chunk = 5
    torch.testing.assert_close(encoder.encode(frames), z, **CLOSE)
    torch.testing.assert_close(encoder.encode(frames[1, 0]), z[1, 0], **CLOSE)


def test_encoders_are_frozen_and_leave_no_graph(tmp_path):
    vavae(tmp_path / "vavae.pt")
    encoder = create_autoencoder(EncoderConfig("vavae", weights=str(tmp_path / "vavae.pt")))
    assert not encoder.training and not list(encoder.parameters())
    z = encoder.encode(torch.rand(1, 1, 8, 8, 3))
    assert not z.requires_grad and not encoder.decode(z.requires_grad_()).requires_grad
    assert torch.equal(
        encoder.encode(torch.ones(1, 1, 8, 8, 3)), encoder.encode(torch.ones(1, 1, 8, 8, 3))
    )


def test_latents_do_not_depend_on_the_callers_autocast(tmp_path):
    vjepa(tmp_path / "v.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt"), image_size=32))
    frames = torch.rand(1, 2, 32, 32, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder.encode(frames)
    assert z.dtype == torch.float32 and torch.equal(z, encoder.encode(frames))


def test_bfloat16_networks_stay_close(tmp_path):
    vjepa(tmp_path / "v.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt"), image_size=64))
    frames = torch.rand(1, 2, 64, 64, 3)
    z = encoder.encode(frames)
    encoder.dtype = torch.bfloat16
    half = encoder.encode(frames)
    assert half.dtype == torch.float32 and next(encoder.network.buffers()).dtype == torch.bfloat16
    assert (half - z).norm() / z.norm() < 0.03  # bfloat16 keeps 8 bits: 0.4 % a rounding


@pytest.mark.parametrize("kind", ["vae", "vavae", "rae", "scale_rae_webssl", "qwen", "decoder"])
def test_every_network_runs_in_bfloat16(tmp_path, kind):
    options, _ = small(kind, tmp_path)
    encoder = build(kind, options)
    frames = torch.rand(1, 2, 56, 56, 3)
    z = encoder.encode(frames)
    image = encoder.decode(z) if encoder.has_decoder else None
    encoder.dtype = torch.bfloat16
    assert (encoder.encode(frames) - z).norm() / z.norm() < 0.1
    if image is not None:
        assert (encoder.decode(z) - image).abs().mean() < 0.05
    encoder.dtype = None
    assert encoder.encode(frames).isfinite().all()


def test_options_of_other_encoders_are_refused():
    for options in (
        {"encoder_type": "nosuch"},
        {"encoder_type": "qwen", "qwen_mode": "audio"},
        {"encoder_type": "rae", "qwen_mode": "image"},
        {"encoder_type": "rae", "sd3_shift": True},
        {"encoder_type": "vae", "standardize": True},
        {"encoder_type": "vjepa2", "decoder_weights": "x"},
        {"encoder_type": "pixels", "weights": "x"},
        {"encoder_type": "rae", "final_norm": False},
        {"encoder_type": "pixels", "patch_size": 0},
        {"encoder_type": "pixels", "image_size": 0},
    ):
        with pytest.raises(ValueError):
            EncoderConfig(**options)


def test_the_fingerprint_names_the_latent_space(tmp_path):
    def of(**options):
        options = {"weights": str(tmp_path / "v.pt")} | options
        return create_autoencoder(EncoderConfig("vjepa2", **options)).fingerprint

    vjepa(tmp_path / "v.pt")
    first = of()
    torch.save(torch.load(tmp_path / "v.pt") | {"epoch": 4}, tmp_path / "moved.pt")
    assert of(weights=str(tmp_path / "moved.pt")) == first == of(image_size=256)
    torch.save({"std": torch.full((128,), 2.0)}, tmp_path / "stats.pt")
    state = vjepa_state()
    state["blocks.1.mlp.fc2.weight"][3, 5] += 1e-3
    torch.save({"ema_encoder": state}, tmp_path / "other.pt")
    others = [of(image_size=224), of(latent_stats=str(tmp_path / "stats.pt"))]
    others += [of(weights=str(tmp_path / "other.pt"))]
    assert len({first, *others}) == 4 and first.startswith("vjepa2-")


def test_options_that_change_latents_change_the_fingerprint(tmp_path):
    for kind, option in (
        ("scale_rae_siglip", {"final_norm": False}),
        ("qwen", {"qwen_mode": "image"}),
        ("vae", {"sd3_shift": True}),
    ):
        options, _ = small(kind, tmp_path / kind)
        assert build(kind, options).fingerprint != build(kind, options | option).fingerprint


# ------------------------------------------------------------------------------------------------
# Agreement with upstream


def test_sd3_agrees_with_plain_modules_for_folder_parent_and_file(tmp_path):
    model = sd3(tmp_path / "vae")
    frames = torch.rand(1, 2, 24, 16, 3)
    mean = model.encode(frames[0].movedim(-1, 1) * 2 - 1).movedim(1, -1)[None]
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    for weights in (tmp_path, tmp_path / "vae", file):
        encoder = create_autoencoder(EncoderConfig("vae", weights=str(weights)))
        z = encoder.encode(frames)
        assert encoder.latent_dim == 4 and z.shape == (1, 2, 3, 2, 4)
        torch.testing.assert_close(z, mean * 1.5, **CLOSE)
    image = model.decode(mean[0].movedim(-1, 1)).movedim(1, -1)[None]
    torch.testing.assert_close(encoder.decode(z), (image / 2 + 0.5).clamp(0, 1), **CLOSE)
    shifted = create_autoencoder(EncoderConfig("vae", weights=str(tmp_path), sd3_shift=True))
    torch.testing.assert_close(shifted.encode(frames), (mean - 0.25) * 1.5, **CLOSE)
    torch.testing.assert_close(shifted.decode(shifted.encode(frames)), encoder.decode(z), **CLOSE)


def test_sd3_without_numbers_in_its_config_has_those_of_the_release(tmp_path):
    model, frames = sd3(tmp_path / "vae"), torch.rand(1, 1, 16, 16, 3)
    (tmp_path / "vae/config.json").write_text('{"norm_num_groups": 8}')
    mean = model.encode(frames[0].movedim(-1, 1) * 2 - 1).movedim(1, -1)[None]
    for shift, want in ((False, mean * 1.5305), (True, (mean - 0.0609) * 1.5305)):
        encoder = create_autoencoder(EncoderConfig("vae", str(tmp_path), sd3_shift=shift))
        torch.testing.assert_close(encoder.encode(frames), want, **CLOSE)


def test_vavae_agrees_with_plain_modules(tmp_path):
    model = vavae(tmp_path / "vavae-imagenet256-f16d32-dinov2.pt")
    frames = torch.rand(2, 1, 12, 16, 3)
    mean = model.encode(frames[:, 0].movedim(-1, 1) * 2 - 1).movedim(1, -1)[:, None]
    torch.save(
        {
            "mean": mean.mean((0, 1, 2, 3))[None, :, None, None],
            "std": mean.std((0, 1, 2, 3))[None, :, None, None],
        },
        tmp_path / "latents_stats.pt",
    )
    for weights in (tmp_path, tmp_path / "vavae-imagenet256-f16d32-dinov2.pt"):
        encoder = create_autoencoder(EncoderConfig("vavae", weights=str(weights)))
        torch.testing.assert_close(encoder.encode(frames), mean, **CLOSE)
    image = model.decode(mean[:, 0].movedim(-1, 1)).movedim(1, -1)[:, None]
    torch.testing.assert_close(encoder.decode(mean), (image / 2 + 0.5).clamp(0, 1), **CLOSE)
    stats = str(tmp_path / "latents_stats.pt")
    for options in ({"latent_stats": stats}, {"standardize": True}):
        standard = create_autoencoder(EncoderConfig("vavae", str(tmp_path), **options))
        z = standard.encode(frames)
        torch.testing.assert_close(z.mean((0, 1, 2, 3)), torch.zeros(4), **CLOSE)
        torch.testing.assert_close(z.std((0, 1, 2, 3)), torch.ones(4), **CLOSE)
        torch.testing.assert_close(standard.decode(z), encoder.decode(mean), **CLOSE)


def test_vjepa_agrees_with_its_description(tmp_path):
    state = vjepa(tmp_path / "v.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt"), image_size=48))
    frames = torch.rand(1, 2, 70, 60, 3)
    x = resized(frames[0], 48, clamp=True)
    want = torch.stack([vjepa_reference(state, image) for image in x])[None]
    torch.testing.assert_close(encoder.encode(frames), want, **CLOSE)
    default = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt")))
    assert default.encode(frames[:, :1]).shape == (1, 1, 16, 16, 128)
    single = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt"), image_size=16))
    assert single.encode(frames).isfinite().all()  # one patch: its position is 0, not 0 / 0


@pytest.mark.parametrize("side, image", [(98, 98), (126, 98), (56, 98)])
def test_rae_agrees_with_transformers(tmp_path, side, image):
    model = dino(tmp_path, image=image)
    encoder = create_autoencoder(EncoderConfig("rae", weights=str(tmp_path), image_size=side))
    frames = torch.rand(2, 2, 100, 90, 3)
    model.layernorm = nn.LayerNorm(48, eps=1e-6, elementwise_affine=False)
    with torch.no_grad():
        tokens = model(resized(frames.flatten(0, 1), side)).last_hidden_state[:, 5:]
    want = tokens.view(2, 2, side // 14, side // 14, 48)
    torch.testing.assert_close(encoder.encode(frames), want, **CLOSE)
    assert not encoder.has_decoder  # these weights are not the release's


@pytest.mark.parametrize("side", [70, 112])
@pytest.mark.parametrize("swiglu", [True, False])
def test_web_dino_agrees_with_transformers(tmp_path, side, swiglu):
    model = dino(tmp_path, registers=False, image=70, swiglu=swiglu)
    config = EncoderConfig("scale_rae_webssl", weights=str(tmp_path), image_size=side)
    frames = torch.rand(1, 2, side, side, 3)
    with torch.no_grad():
        tokens = model(resized(frames[0], side)).last_hidden_state[:, 1:]
    want = tokens.view(1, 2, side // 14, side // 14, 48)
    torch.testing.assert_close(create_autoencoder(config).encode(frames), want, **CLOSE)
    released = create_autoencoder(EncoderConfig("scale_rae_webssl", str(tmp_path)))
    assert released.image_size == 224  # whatever table of positions the file has


@pytest.mark.parametrize("tower_only", [False, True])
def test_siglip_agrees_with_transformers(tmp_path, tower_only):
    model = siglip(tmp_path, tower_only)
    seen = []
    layers = getattr(model, "vision_model", model).encoder.layers  # the name before transformers 5
    layers[-1].register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    frames = torch.rand(1, 2, 80, 80, 3)
    half = torch.full((2, 3, 1, 1), 0.5)
    with torch.no_grad():
        model(resized(frames[0], 70, half))
    raw = seen[0].view(1, 2, 5, 5, 48)
    for final_norm, want in ((True, F.layer_norm(raw, (48,), eps=1e-6)), (False, raw)):
        config = EncoderConfig("scale_rae_siglip", str(tmp_path), final_norm=final_norm)
        torch.testing.assert_close(create_autoencoder(config).encode(frames), want, **CLOSE)


def test_qwen_agrees_with_transformers(tmp_path):
    tower = qwen(tmp_path)
    encoder = create_autoencoder(EncoderConfig("qwen", str(tmp_path), image_size=140))
    frames = torch.rand(1, 3, 100, 120, 3)
    z = encoder.encode(frames)
    assert encoder.temporal_stride == 2 and z.shape == (1, 2, 10, 10, 32)
    x = resized(frames[0], 140, torch.tensor(encoders.CLIP).view(2, 3, 1, 1), clamp=True)
    x = torch.cat([x, x[-1:]])  # odd: the last frame again
    t, g = 2, 5  # time steps, groups a side
    rows = x.view(t, 2, 3, g, 2, 14, g, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5)
    with torch.no_grad():
        out = tower(rows.flatten(0, 4), grid_thw=torch.tensor([[t, 10, 10]]))
        merged = getattr(out, "pooler_output", out)
        groups = z.view(t, g, 2, g, 2, 32).permute(0, 1, 3, 2, 4, 5).reshape(-1, 128)
        torch.testing.assert_close(tower.merger.mlp(groups), merged, **CLOSE)
    # one frame in image mode is the pair of that frame with itself
    image = create_autoencoder(
        EncoderConfig("qwen", str(tmp_path), image_size=140, qwen_mode="image")
    )
    assert image.temporal_stride == 1
    torch.testing.assert_close(image.encode(frames)[:, 2:], z[:, 1:], **CLOSE)
    tower.save_pretrained(tmp_path / "tower")  # alone, its names without a prefix
    alone = create_autoencoder(EncoderConfig("qwen", str(tmp_path / "tower"), image_size=140))
    assert torch.equal(alone.encode(frames), z)


def test_rae_decodes_as_torchs_own_layers_do(tmp_path):
    dino(tmp_path / "encoder")
    model = rae_decoder(tmp_path / "decoder")
    file = tmp_path / "decoder" / "model.pt"
    var = torch.rand(48, 5, 5) + 0.1
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    frames = torch.rand(1, 2, 70, 70, 3)
    options = {"weights": str(tmp_path / "encoder"), "image_size": 70}
    for weights in (file, file.parent):
        encoder = create_autoencoder(EncoderConfig("rae", decoder_weights=str(weights), **options))
        z = encoder.encode(frames)
        with torch.no_grad():
            want = model(z[0]) * IMAGENET[1] + IMAGENET[0]
        want = want.clamp(0, 1).movedim(1, -1)[None]
        assert encoder.has_decoder and want.shape == (1, 2, 20, 20, 3)
        torch.testing.assert_close(encoder.decode(z), want, **CLOSE)
    stats = {"latent_stats": str(tmp_path / "stat.pt"), "decoder_weights": str(file)}
    standard = create_autoencoder(EncoderConfig("rae", **options, **stats))
    scaled = z / (var + 1e-5).sqrt().movedim(0, -1)
    torch.testing.assert_close(standard.encode(frames), scaled, **CLOSE)
    torch.testing.assert_close(standard.decode(scaled), want, **CLOSE)
    with pytest.raises(InputError, match="statistics"):
        create_autoencoder(
            EncoderConfig("rae", str(tmp_path / "encoder"), image_size=84, **stats)
        ).encode(frames)
    wide = create_autoencoder(
        EncoderConfig("rae", str(tmp_path / "encoder"), str(file), image_size=98)
    )
    z = wide.encode(frames)  # 7 x 7 tokens for a decoder of 5 x 5
    with torch.no_grad():
        want = (model(z[0]) * IMAGENET[1] + IMAGENET[0]).clamp(0, 1).movedim(1, -1)[None]
    torch.testing.assert_close(wide.decode(z), want, **CLOSE)


@pytest.mark.parametrize("kind", ["rae", "scale_rae_webssl", "scale_rae_siglip", "decoder"])
def test_norms_have_the_released_epsilons(tmp_path, kind):
    encoder = build(kind, small(kind, tmp_path)[0])
    network, eps = (encoder.decoder, 1e-12) if kind == "decoder" else (encoder.network, 1e-6)
    x = 1e-4 * torch.randn(1, 4, network.dim)  # so small that the constant shows
    full = next(n for n in network.state_dict() if n.endswith(f"{network.norm1}.weight"))
    name = full[len(network.prefix) : -len(".weight")]
    y = network.norm(x, name) - network.tensor(f"{name}.bias")
    want = F.layer_norm(x, x.shape[-1:], network.tensor(f"{name}.weight"), eps=eps)
    torch.testing.assert_close(y, want, **CLOSE)


def test_the_decoder_of_a_release_is_fetched_when_it_is_needed(offline, monkeypatch, tmp_path):
    dino(tmp_path / "encoder")
    config = EncoderConfig("rae", str(tmp_path / "encoder"), image_size=70)
    assert not create_autoencoder(config).has_decoder
    monkeypatch.setitem(encoders.ENCODERS, "rae", ["rae", "16x16x48"])
    encoder = create_autoencoder(config)  # as wide as the release: as if it were it
    z = encoder.encode(torch.rand(1, 1, 70, 70, 3))
    assert encoder.has_decoder
    with pytest.raises(MissingFileError, match="model.pt .* weights/rae/decoder"):
        encoder.decode(z)
    rae_decoder(tmp_path / "weights/rae/decoder")
    assert encoder.decode(z).shape == (1, 1, 20, 20, 3)


@pytest.mark.parametrize("name", [*encoders.DECODERS.values(), "somebody/decoder"])
def test_a_decoder_of_the_hub_comes_with_its_config(monkeypatch, tmp_path, name):
    rae_decoder(tmp_path / "hub")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "hub" / "config.json").rename(tmp_path / "elsewhere" / "config.json")
    asked = []

    def fetch(_, file, cached):
        asked.append(file)
        return tmp_path / ("hub" if file == "model.pt" else "elsewhere") / file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoders, "hub_file", fetch)
    own = name.startswith("somebody")  # all released ones have 16 heads, and RAE's no config
    assert encoders.build_network(encoders.ViTDecoder, name).heads == (4 if own else 16)
    assert asked == ["model.pt"] + ["config.json"] * own


def test_scale_rae_decodes_with_the_normalisation_of_its_encoder(tmp_path):
    siglip(tmp_path / "encoder")
    model = rae_decoder(tmp_path / "decoder")
    config = EncoderConfig("scale_rae_siglip", str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    encoder = create_autoencoder(config)
    z = encoder.encode(torch.rand(1, 1, 70, 70, 3))
    with torch.no_grad():
        want = (model(z[0]) * 0.5 + 0.5).clamp(0, 1).movedim(1, -1)[None]
    torch.testing.assert_close(encoder.decode(z), want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cosmos_runs_archives_in_their_own_dtype(tmp_path, dtype):
    encode, decode = cosmos(tmp_path / "jit", dtype)
    encoder = create_autoencoder(EncoderConfig("cosmos", weights=str(tmp_path / "jit")))
    encoder.to(torch.float32).to(torch.bfloat16)
    frames = torch.rand(1, 3, 16, 24, 3)
    z = encoder.encode(frames)
    assert encoder.latent_dim == 6 and z.shape == (1, 3, 2, 3, 6) and z.dtype == torch.float32
    with torch.no_grad():
        want = encode((frames[0].movedim(-1, 1) * 2 - 1).to(dtype))[0]
        torch.testing.assert_close(z[0], want.float().movedim(1, -1))
        image = (decode(z[0].movedim(-1, 1).to(dtype)).float() + 1) / 2
    torch.testing.assert_close(encoder.decode(z)[0], image.clamp(0, 1).movedim(1, -1))
    with pytest.raises(InputError, match="8"):
        encoder.encode(torch.rand(1, 1, 20, 16, 3))
    for file in ("encoder.jit", "decoder.jit"):
        cosmos(tmp_path / file, dtype)
        content = bytearray((tmp_path / file / file).read_bytes())
        flipped = content.copy()
        with zipfile.ZipFile(tmp_path / file / file) as archive:
            weight = max(archive.infolist(), key=lambda x: ("/data/" in x.filename, x.file_size))
        flipped[weight.header_offset + 200] ^= 64  # in a weight: torch itself would not notice
        for damaged, fault in (
            (b"", "truncated or of another format"),
            (content[:900], "truncated or of another format"),
            (flipped, "the checksum of .* does not match"),
        ):
            (tmp_path / file / file).write_bytes(damaged)
            with pytest.raises(InputError, match=f"{file}: {fault}"):
                create_autoencoder(EncoderConfig("cosmos", weights=str(tmp_path / file)))
        (tmp_path / file / file).unlink()
        with pytest.raises(MissingFileError, match=file):
            create_autoencoder(EncoderConfig("cosmos", weights=str(tmp_path / file)))


def test_golden_sd3(shared):
    io = np.load(shared / "golden/sd3_vae/io.npz")
    pixels, close = torch.from_numpy(io["pixels"]), {"atol": 1e-4, "rtol": 1e-4}
    for shift, name in ((False, "z_mode_scaled"), (True, "z_mode_shift_scaled")):
        config = EncoderConfig("vae", str(shared / "golden/sd3_vae/vae"), sd3_shift=shift)
        encoder = create_autoencoder(config)
        z = encoder.encode(pixels)
        torch.testing.assert_close(z, torch.from_numpy(io[name]), **close)
        image = torch.from_numpy(io["recon_pixels"]).clamp(0, 1)
        torch.testing.assert_close(encoder.decode(z), image, **close)


def test_golden_vjepa(shared):
    folder, close = shared / "golden/vjepa2_1", {"atol": 1e-4, "rtol": 1e-4}
    io = {name: torch.from_numpy(value) for name, value in np.load(folder / "io.npz").items()}
    encoder = create_autoencoder(
        EncoderConfig("vjepa2", str(folder / "vjepa2_1.pt"), image_size=64)
    )
    torch.testing.assert_close(encoder.encode(io["pixels"]), io["z"], **close)
    for kind in ("image", "video"):
        tokens = encoder.network(io[f"{kind}_input"]).flatten(1, 3)
        torch.testing.assert_close(tokens, io[f"{kind}_tokens"], **close)
    for kind in ("nonsquare", "256"):
        tokens = encoder.network(io[f"image_input_{kind}"]).flatten(1, 3)
        torch.testing.assert_close(tokens, io[f"image_tokens_{kind}"], **close)


def test_golden_qwen(shared):
    folder, close = shared / "golden/qwen2_5_vl", {"atol": 2e-4, "rtol": 1e-4}
    io = np.load(folder / "io.npz")
    for kind, mode in (("video", "video"), ("image", "image"), ("odd", "image")):
        encoder = create_autoencoder(EncoderConfig("qwen", str(folder / "model"), qwen_mode=mode))
        encoder.image_size = None if kind == "odd" else encoder.image_size  # 140 x 168 pixels
        z = encoder.encode(torch.from_numpy(io[f"{kind}_pixels_u8"]))
        torch.testing.assert_close(z, torch.from_numpy(io[f"{kind}_z"]), **close)


FULL = {
    "sd3_vae": lambda s: encoders.KLAutoencoder(Path("x"), s, {}),
    "vavae_f16d32": lambda s: encoders.VAVAE(Path("x"), s, {}),
    "dinov2_with_registers_base": lambda s: encoders.RAE(Path("x"), s, {}),
    "webssl_dino300m_full2b_224": lambda s: encoders.DINO(
        Path("x"), s, {"num_attention_heads": 16, "use_swiglu_ffn": True}
    ),
    "siglip2_so400m_patch14_224_vision": lambda s: encoders.SigLIP(
        Path("x"), s, {"num_attention_heads": 16}
    ),
    "vjepa2_1_vitl_384": lambda s: encoders.VJEPA(Path("x"), s, {}),
    "vjepa2_1_vitb_384": lambda s: encoders.VJEPA(Path("x"), s, {}),
    "qwen2_5_vl_3b_visual": lambda s: encoders.QwenTower(Path("x"), s, {}),
    "rae_decoder_dinov2_wreg_base_vitxl": lambda s: encoders.ViTDecoder(Path("x"), s, {}),
    "scale_rae_decoder_siglip2_so400m": lambda s: encoders.ViTDecoder(Path("x"), s, {}),
    "scale_rae_decoder_webssl300m": lambda s: encoders.ViTDecoder(Path("x"), s, {}),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_networks_have_exactly_the_public_tensors(shared, name):
    table = json.loads((shared / "keys" / f"{name}.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
    network = FULL[name](dict(state))
    unasked = {name.removeprefix(network.prefix) for name in state if name not in network.asked}
    assert all(name.startswith(network.unused) for name in unasked)
    assert network.asked.keys() <= state.keys()
    for spoiled in (sorted(network.asked)[0], sorted(network.asked)[-1]):
        without = {name: value for name, value in state.items() if name != spoiled}
        with pytest.raises(InputError, match=spoiled.replace(".", r"\.")):
            FULL[name](without)
    with pytest.raises(InputError, match=r"unexpected .*surplus"):
        FULL[name](state | {f"{network.prefix}surplus.weight": torch.empty(1, device="meta")})


# ------------------------------------------------------------------------------------------------
# Files that are not what they should be


def small(kind, folder):
    """Write a small checkpoint of any kind; return (config options, file of its tensors)."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "vae":
        sd3(folder / "vae")
        return {"weights": str(folder)}, folder / "vae/diffusion_pytorch_model.safetensors"
    if kind == "vavae":
        vavae(folder / "vavae.pt", mult=(1, 1, 2))
        return {"weights": str(folder)}, folder / "vavae.pt"
    if kind == "vjepa2":
        vjepa(folder / "v.pt")
        return {"weights": str(folder / "v.pt"), "image_size": 32}, folder / "v.pt"
    if kind == "decoder":
        dino(folder / "encoder")
        rae_decoder(folder / "decoder")
        paths = {"weights": str(folder / "encoder"), "decoder_weights": str(folder / "decoder")}
        return paths | {"image_size": 56}, folder / "decoder/model.pt"
    {"rae": dino, "scale_rae_siglip": siglip, "qwen": qwen}.get(
        kind, lambda path: dino(path, registers=False, swiglu=True)
    )(folder)
    size = {"scale_rae_siglip": 70}.get(kind, 56)
    return {"weights": str(folder), "image_size": size}, folder / "model.safetensors"


KINDS = ("vae", "vavae", "vjepa2", "rae", "scale_rae_webssl", "scale_rae_siglip", "qwen", "decoder")


def rewrite(file, change):
    """Apply `change` to the dict of tensors inside a file, whatever its container."""
    if file.suffix == ".safetensors":
        state = load_file(file)
        change(state)
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        whole = torch.load(file)
        change(whole.get("ema_encoder", whole.get("state_dict", whole)))
        torch.save(whole, file)


def build(kind, options):
    return create_autoencoder(EncoderConfig("rae" if kind == "decoder" else kind, **options))


def needed(state):
    """Names whose loss must be noticed."""
    spare = ("loss.", "foundation", "linear_proj", "mask_token", "head.", "merger.mlp", "text_")
    spare += ("norms_block.0", "norms_block.1", "norms_block.2", "logit", "post_layernorm")
    spare += ("lm_head", "language", "embed_tokens", "model.layers", "model.norm")
    return [k for k in sorted(state) if not any(word in k for word in spare)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_surplus_or_misshapen_tensor_is_named(tmp_path, kind):
    options, file = small(kind, tmp_path)
    build(kind, options)
    whole, state = file.read_bytes(), {}
    rewrite(file, state.update)
    names = [k for k in needed(state) if not (kind == "rae" and k.startswith("layernorm."))]

    def fault(change):
        """Return what is said about the file after a change of its tensors."""
        file.write_bytes(whole)
        rewrite(file, change)
        with pytest.raises(InputError) as error:
            build(kind, options)
        assert str(file) in str(error.value)
        return str(error.value)

    for name in [names[i * len(names) // 5] for i in range(5)] + names[-1:]:
        assert name in fault(lambda s, name=name: s.pop(name))
        if state[name].shape[0] > 1:
            message = fault(lambda s, name=name: s.update({name: s[name][:1]}))
            assert name.rpartition(".")[0] in message or "its tensors say 1" in message
    surplus = f"{names[0]}.surplus"
    assert f"unexpected tensors: {surplus}" in fault(lambda s: s.update({surplus: torch.ones(2)}))
    like = ((k, k.replace(".0.", ".1.")) for k in names if ".0." in k)
    name = next(name for name, other in like if other in state)  # which lets the check go on
    message = fault(lambda s: s.update({f"{name}.renamed": s.pop(name)}))
    assert f"missing tensors: {name} and unexpected tensors: {name}.renamed" in message
    message = fault(lambda s: s.update({name: torch.full_like(s[name], float("nan"))}))
    assert name in message and "finite" in message


@pytest.mark.parametrize(
    "kind, part",
    [
        ("rae", "embeddings.register_tokens"),
        ("vavae", "quant_conv."),
        ("vavae", "post_quant_conv."),
        ("vavae", "encoder.down.2.attn."),
        ("vavae", "decoder.up.2.attn."),
        ("vavae", "encoder.down.1.block.1."),
        ("vae", "decoder.up_blocks.2.resnets.2."),
        ("scale_rae_webssl", "encoder.layer.2."),
        ("scale_rae_siglip", "vision_model.encoder.layers.2."),
        ("vjepa2", "module.backbone.patch_embed_img."),
        ("decoder", "trainable_cls_token"),
    ],
)
def test_what_is_left_out_whole_is_missed(tmp_path, kind, part):
    options, file = small(kind, tmp_path)
    rewrite(file, lambda s: [s.pop(name) for name in list(s) if name.startswith(part)])
    with pytest.raises(InputError, match="missing tensors: .*" + part.replace(".", r"\.")):
        build(kind, options)


@pytest.mark.parametrize(
    "kind, key",
    [
        ("rae", "hidden_size"),
        ("rae", "image_size"),
        ("scale_rae_webssl", "patch_size"),
        ("scale_rae_siglip", "image_size"),
        ("qwen", "hidden_size"),
        ("vae", "latent_channels"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, kind, key):
    options, file = small(kind, tmp_path)
    config = file.parent / "config.json"
    values = json.loads(config.read_text())
    values.get("vision_config", values)[key] = 7
    config.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{key} is 7, its tensors say"):
        build(kind, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Defining your")  # torch's, about what the bytes say
def test_damaged_files_give_one_sentence_or_load(tmp_path, kind):
    options, file = small(kind, tmp_path)
    whole, generator = file.read_bytes(), np.random.default_rng(0)
    for trial in range(12):
        damaged = bytearray(whole)
        if trial < 4:
            damaged = damaged[: int(len(whole) * (0.0, 0.01, 0.5, 0.999)[trial])]
        else:
            for _ in range(8):  # near the start and the end, where the tables of the formats are
                at = int(generator.integers(0, 3000)) * (1 if trial % 2 else -1)
                damaged[at % len(damaged)] = int(generator.integers(0, 256))
        file.write_bytes(damaged)
        try:
            build(kind, options)
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)[:80]
        else:
            assert trial >= 4
    file.write_bytes(whole)
    config = next((p for p in (file.parent / "config.json",) if p.is_file()), None)
    for text in ("", "[]", "{", '"x"', '{"vision_config": 3}', "[" * 100_000) if config else ():
        config.write_text(text)
        try:
            build(kind, options)
        except InputError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    "kind, key",
    [
        ("rae", "num_attention_heads"),
        ("scale_rae_siglip", "num_attention_heads"),
        ("qwen", "num_heads"),
        ("qwen", "window_size"),
        ("qwen", "fullatt_block_indexes"),
        ("vae", "norm_num_groups"),
        ("vae", "scaling_factor"),
        ("decoder", "decoder_num_attention_heads"),
        ("decoder", "layer_norm_eps"),
    ],
)
def test_nonsense_in_a_config_is_named(tmp_path, kind, key):
    options, file = small(kind, tmp_path)
    config = file.parent / "config.json"
    values = json.loads(config.read_text())
    inner = values.get("vision_config", values)
    for nonsense in (0, -4, 7, "12", None, True, {}, float("nan")):
        if (nonsense, key) in ((7, "window_size"), (7, "scaling_factor"), (7, "layer_norm_eps")):
            continue
        inner[key] = nonsense
        config.write_text(json.dumps(values))
        with pytest.raises(InputError) as error:
            build(kind, options)
        assert key in str(error.value) or "group" in str(error.value)


def test_shards_are_found_through_the_index_and_nowhere_else(tmp_path):
    options, file = small("rae", tmp_path)
    frames = torch.rand(1, 1, 56, 56, 3)
    z = build("rae", options).encode(frames)
    state = load_file(file)
    file.unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / shard)
    table = {name: shard for shard, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert torch.equal(build("rae", options).encode(frames), z)
    for wrong in ("", "../b.safetensors", "/etc/passwd", 3, "nosuch.safetensors", "*", None):
        index.write_text(json.dumps({"weight_map": table | {names[0]: wrong}}))
        with pytest.raises(InputError):
            build("rae", options)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": 1}'):
        index.write_text(text)
        with pytest.raises(InputError):
            build("rae", options)


def test_a_released_depth_is_not_taken_from_a_truncated_file(tmp_path):
    options, file = small("rae", tmp_path)
    rewrite(file, lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.layer.2.")])
    with pytest.raises(InputError, match=r"encoder\.layer\.2\."):
        build("rae", options)


def test_a_file_that_needs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    for kind in ("vjepa2", "vavae"):
        torch.save({"ema_encoder": Evil(), "state_dict": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(InputError):
            create_autoencoder(EncoderConfig(kind, weights=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"mean": torch.zeros(4)},
        {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
        {"mean": torch.zeros(4), "var": torch.ones(5)},
        {"mean": torch.zeros(5), "std": torch.ones(4)},
        {"std": torch.zeros(4)},
        {"var": torch.full((4,), float("nan"))},
        {"var": -torch.ones(4)},
        {"std": "x"},
        {"std": torch.ones(2, 4, 1, 1)},
        {"std": torch.ones(4, 2)},
        torch.ones(4),
        [],
    ],
)
def test_statistics_without_a_spread_are_refused(tmp_path, stats):
    vavae(tmp_path / "vavae.pt")
    torch.save(stats, tmp_path / "stats.pt")
    with pytest.raises(InputError, match="stats.pt"):
        create_autoencoder(
            EncoderConfig(
                "vavae", str(tmp_path / "vavae.pt"), latent_stats=str(tmp_path / "stats.pt")
            )
        )


def test_variance_and_deviation_standardise_alike(tmp_path):
    mean, var = torch.randn(192), torch.rand(192) + 0.5
    frames = torch.rand(1, 2, 16, 16, 3)
    z = create_autoencoder(EncoderConfig("pixels", patch_size=8)).encode(frames)
    for stats in (
        {"mean": mean, "var": var},
        {"mean": mean[:, None, None], "std": (var + 1e-5).sqrt()[:, None, None]},
        {"mean": mean[:, None, None].expand(192, 2, 2), "var": var[None, :, None, None]},
    ):
        torch.save(stats, tmp_path / "s.pt")
        config = EncoderConfig("pixels", patch_size=8, latent_stats=str(tmp_path / "s.pt"))
        encoder = create_autoencoder(config)
        torch.testing.assert_close(encoder.encode(frames), (z - mean) / (var + 1e-5).sqrt())
        torch.testing.assert_close(encoder.decode(encoder.encode(frames)), frames)


# ------------------------------------------------------------------------------------------------
# Where files come from


@pytest.mark.parametrize("kind", [kind for kind in encoders.RELEASES if kind != "pixels"])
def test_offline_one_sentence_says_what_whence_and_where_to(offline, kind):
    with pytest.raises(MissingFileError) as error:
        create_autoencoder(EncoderConfig(kind))
    message = str(error.value)
    assert encoders.RELEASES[kind].split("/")[0] in message and f"weights/{kind}" in message
    assert any(word in message for word in (".safetensors", ".pt", ".jit"))
    assert len(message.split(". ")) == 1 and "no connection" in message


def test_the_folder_weights_stands_for_a_release(offline, tmp_path):
    vjepa(tmp_path / "made.pt")
    folder = tmp_path / "weights/vjepa2"
    folder.mkdir(parents=True)
    (tmp_path / "made.pt").rename(folder / "vjepa2_1_vitl_dist_vitG_384.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2"))
    assert encoder.latent_dim == 128


def test_a_decoder_in_its_folder_does_not_hide_the_encoder_elsewhere(
    offline, monkeypatch, tmp_path
):
    rae_decoder(tmp_path / "weights/rae/decoder")
    dino(tmp_path / "cache")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repo, file, local_files_only: str((tmp_path / "cache" / file).resolve(strict=True)),
    )
    assert create_autoencoder(EncoderConfig("rae", image_size=56)).latent_dim == 48


def test_without_a_connection_no_download_is_begun(offline, monkeypatch):
    class ConnectError(Exception):
        """What HTTP libraries raise is no OSError."""

    def ask(url, timeout):
        asked.append(url)
        raise ConnectError

    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    with pytest.raises(MissingFileError, match="no connection"):
        create_autoencoder(EncoderConfig("rae"))
    assert len(asked) == 1 and asked[0].endswith("base/resolve/main/model.safetensors")


def test_a_download_is_asked_for_by_its_exact_name(monkeypatch, tmp_path):
    sd3(tmp_path / "vae")
    asked = []

    def download(repo, file, local_files_only=False):
        asked.append((repo, file, local_files_only))
        if local_files_only:
            raise FileNotFoundError
        return str(tmp_path / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: url)
    create_autoencoder(EncoderConfig("vae"))
    repo = "stabilityai/stable-diffusion-3-medium-diffusers"
    assert (repo, "vae/diffusion_pytorch_model.safetensors", False) in asked
    assert (repo, "vae/config.json", False) in asked or (tmp_path / "vae/config.json").exists()
    assert asked[0][2]  # the cache first


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(offline, tmp_path):
    for weights in ("nosuch.pt", "./a/b", str(tmp_path / "x"), "a/b.pt", "~/nosuch", "folder"):
        with pytest.raises(MissingFileError, match="no such file"):
            create_autoencoder(EncoderConfig("vjepa2", weights=weights))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="empty"):
        create_autoencoder(EncoderConfig("rae", weights=str(tmp_path / "empty")))


def test_an_encoder_without_decoder_names_the_remedy(tmp_path):
    vjepa(tmp_path / "v.pt")
    encoder = create_autoencoder(EncoderConfig("vjepa2", str(tmp_path / "v.pt"), image_size=32))
    assert not encoder.has_decoder
    with pytest.raises(InputError, match="train_adapter.py --encoder_type vjepa2"):
        encoder.decode(encoder.encode(torch.rand(1, 1, 32, 32, 3)))
    pixels = create_autoencoder(EncoderConfig("pixels"))
    with pytest.raises(InputError, match="768"):
        pixels.decode(torch.rand(1, 1, 2, 2, 192))


# ------------------------------------------------------------------------------------------------
# Command line


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "encoders.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_the_table_names_every_encoder(tmp_path):
    out = run(cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for kind in encoders.RELEASES:
        assert kind in out.stdout


def test_a_picture_shows_input_reconstruction_and_latents(tmp_path, monkeypatch, capsys):
    photo = np.random.default_rng(0).random((50, 80, 3)) * 255
    Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)

    def show(*words):
        monkeypatch.setattr(sys, "argv", ["encoders.py", *words])
        encoders.data.run_cli(encoders.main)
        return capsys.readouterr().out

    out = show("--encoder_type", "pixels", "--image", "photo.png")
    assert out == "encoder.png: input, reconstruction, latents (16, 16, 768)\n"
    written = Image.open(tmp_path / "encoder.png")
    assert written.size == (768, 256)
    left = np.asarray(written)[:, :256].astype(int)
    assert abs(left - np.asarray(written)[:, 256:512]).max() <= 1  # pixels lose nothing
    vjepa(tmp_path / "v.pt")
    words = ("--encoder_type", "vjepa2", "--weights", "v.pt", "--output", "two.png")
    out = show(*words, "--image_size", "64", "--image", "photo.png")
    assert out == "two.png: input, latents (4, 4, 128)\n"
    written = np.asarray(Image.open("two.png"))
    assert written.shape == (256, 512, 3) and len(np.unique(written[:, 256:], axis=0)) <= 4
    for image in ("nosuch.png", "v.pt"):
        with pytest.raises(SystemExit) as stop:
            show("--encoder_type", "pixels", "--image", image)
        assert stop.value.code == 2 and image in capsys.readouterr().err
