"""Predict the velocity of noised latent frames with an action-conditioned causal transformer.

DiT blocks (Peebles & Xie 2023) factored in space and time, after arXiv 2605.06388:

    z_tau --patch--> x --[ spatial block -> temporal block ] x depth--> norm, linear --> v
                              ^                 ^
    tau, actions ---------> adaLN-zero: shift, scale, gate for attention and MLP, per frame

Spatial attention is full inside a frame, temporal attention causal per patch ("factored") or
block-causal over all patches ("joint"). Temporal keys and values are all that a new frame needs
of the past: `ContextCache` keeps them through the denoising steps.

Shapes: B batch, V views, T frames, h w latent grid, C latent channels, N patches a frame, D width,
H heads, E head dim, A action width. Inside the network x is (B, T, N, D) throughout: both kinds
of attention run on views of it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError, config_from, load_strictly, load_tensors, load_torch, strip_prefixes

DIT_SIZES = {
    "T": dict(dim=256, depth=4, heads=4),
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
    "L": dict(dim=1024, depth=24, heads=16),
    "XL": dict(dim=1152, depth=28, heads=16),
}
NORM_EPS = 1e-6
QK_NORM_EPS = torch.finfo(torch.float32).eps  # in every precision: the statistics are float32


@dataclass(frozen=True)
class DiTConfig:
    in_channels: int  # latent channels C
    patch_size: int = 1  # side of a patch in latent cells
    dim: int = 384  # width D
    depth: int = 12  # layers, each a spatial and a temporal block
    heads: int = 6
    action_dim: int = 10
    max_frames: int = 10  # longest attention window in frames
    wide_head: bool = False  # DDT head, for wide semantic latents
    head_dim: int = 2048  # width of the wide head
    temporal_mode: str = "factored"  # factored | joint
    num_views: int = 1  # cameras, side by side along the latent width
    view_rope: str = "additive"  # additive | official
    action_dropout: float = 0.1  # share of training clips without actions

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise InputError(f"DiT {name} is {value}; give at least 1")
        if self.dim % (2 * self.heads):
            raise InputError(
                f"DiT width {self.dim} does not divide into {self.heads} heads of even width; "
                "choose another dim or heads"
            )
        choices = {"temporal_mode": ("factored", "joint"), "view_rope": ("additive", "official")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"DiT {name} is {getattr(self, name)!r}; choose {' or '.join(allowed)}"
                )
        if not 0 <= self.action_dropout <= 1:
            raise InputError(f"DiT action_dropout is {self.action_dropout}; choose 0 to 1")


def merge_views(z: Tensor) -> Tensor:
    """Lay views side by side, (B, V, T, h, w, C) -> (B, T, h, V*w, C): column v*w + x is x of v."""
    return z.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def split_views(z: Tensor, num_views: int) -> Tensor:
    """Undo `merge_views`, (B, T, h, V*w, C) -> (B, V, T, h, w, C)."""
    if z.shape[3] % num_views:
        raise InputError(f"a latent width of {z.shape[3]} does not split into {num_views} views")
    return z.unflatten(3, (num_views, -1)).permute(0, 3, 1, 2, 4, 5)


# ------------------------------------------------------------------------------------------------
# Rotary positions (Su et al. 2021, arXiv 2104.09864).


def axis_angles(positions: Tensor, channels: int) -> Tensor:
    """Give position * 10000^(-i / half) for i < half = channels / 2: (...) -> (..., half)."""
    half = channels // 2
    return positions[..., None] * 10000.0 ** (-torch.arange(half, device=positions.device) / half)


def rotations(angles: Tensor) -> Tensor:
    """Stack cos and sin, with an axis for heads: (T, N, half) -> (T, N, 1, half, 2) float32."""
    return torch.stack((angles.cos(), angles.sin()), -1)[:, :, None]


def build_rope(
    config: DiTConfig, first: int, T: int, h: int, w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Build the rotations of spatial and of temporal attention for T frames from position `first`.

    Axes share the head dim evenly, first axis first: h, w in space; t in time; t, h, w jointly.
    Channel pairs left over stand still. Additive views (ours): every angle + v 10000^(-i/(E/2)).
    Official views: column c has width index c // V, view index c % V; channels are h, w, view;
    temporal blocks ignore views.

    h, w  patches, all views side by side
    ->    (1, N, 1, E/2, 2), (T, 1 or N, 1, E/2, 2)
    """
    V, E, joint = config.num_views, config.dim // config.heads, config.temporal_mode == "joint"
    times = torch.arange(first, first + T, device=device).float()
    t, row, column = torch.meshgrid(
        times,
        torch.arange(h, device=device).float(),
        torch.arange(w, device=device).float(),
        indexing="ij",
    )
    t, row, column = t.flatten(1), row.flatten(1), column.flatten(1)  # (T, N)
    view, x = column // (w // V), column % (w // V)
    if config.view_rope == "official" and V > 1:
        E_view = E // 3 // 2 * 2
        E_h = (E - E_view) // 4 * 2
        space = [(row, E_h), (column // V, E - E_view - E_h), (column % V, E_view)]
        view, x = torch.zeros_like(view), column
    else:
        space = [(row, E // 4 * 2), (x, E // 4 * 2)]

    def join(axes: list[tuple[Tensor, int]]) -> Tensor:
        angles = torch.cat([axis_angles(*axis) for axis in axes], -1)
        angles = F.pad(angles, (0, E // 2 - angles.shape[-1]))
        return rotations(angles + axis_angles(view, E))

    if joint:
        temporal = join([(t, E // 6 * 2), (row, E // 6 * 2), (x, E // 6 * 2)])
    else:
        temporal = rotations(axis_angles(times[:, None], E))
    return join(space)[:1], temporal


@functools.lru_cache(maxsize=64)
def cached_rope(*key) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # training may meet a table that a rollout made
        return build_rope(*key)


def rotate(x: Tensor, table: Tensor, back: bool = False) -> Tensor:
    """Rotate adjacent channel pairs: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).

    x (B, T, N, H, E), table (., ., 1, E/2, 2), both float32; back: by the negative angles
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, and knows no complex numbers
        (x0, x1), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)
    turn = torch.view_as_complex(table)
    return torch.view_as_real(
        torch.view_as_complex(pairs) * (turn.conj() if back else turn)
    ).flatten(-2)


# ------------------------------------------------------------------------------------------------
# Fast parts. In eager mode they save little for the backward pass, and so touch little memory.


@torch.library.custom_op("dit::matmul", mutates_args=())
def onednn_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_matmul.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias, in float32 on a CPU by oneDNN.

    F.linear takes MKL there, which on AMD keeps to AVX2: oneDNN is 2.2 times faster (Zen 5).
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return onednn_matmul(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Give the dtype of matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Project(torch.autograd.Function):
    """Apply prologue, then a linear map; keep the prologue's inputs and recompute its output."""

    @staticmethod
    def forward(ctx, prologue: Callable | None, dtype: torch.dtype, weight, bias, *inputs):
        x = prologue(*inputs) if prologue else inputs[0]
        ctx.prologue, ctx.dtype = prologue, dtype
        ctx.save_for_backward(weight, bias, *inputs)
        bias = bias if bias is None else bias.to(dtype)
        return matmul(x.to(dtype), weight.to(dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight, bias, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if ctx.prologue:
            inputs = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs[4:], strict=True)]
            with torch.enable_grad():
                x = ctx.prologue(*inputs)
        else:
            x = inputs[0]
        rows, grad_weight, grad_bias = grad.flatten(0, -2), None, None
        if needs[2]:
            columns = x.detach().flatten(0, -2).to(ctx.dtype).t()
            grad_weight = matmul(rows.t(), columns).to(weight.dtype)
        if needs[3]:
            grad_bias = rows.sum(0, dtype=bias.dtype)
        grads = [None] * len(inputs)
        if any(needs[4:]):
            grad_x = matmul(grad, weight.to(ctx.dtype).t()).to(x.dtype)
            if ctx.prologue:
                wanted = [i for i, n in enumerate(needs[4:]) if n]
                found = torch.autograd.grad(x, [inputs[i] for i in wanted], grad_x)
                for i, g in zip(wanted, found, strict=True):
                    grads[i] = g
            else:
                grads = [grad_x]
        return None, None, grad_weight, grad_bias, *grads


class Linear(nn.Linear):
    """Linear layer after an element-wise prologue, whose output is not kept for the backward."""

    def forward(self, *inputs: Tensor, prologue: Callable | None = None) -> Tensor:
        if prologue and torch.compiler.is_compiling():  # the compiler recomputes by itself
            inputs, prologue = (prologue(*inputs),), None
        dtype = compute_dtype(self.weight)
        return Project.apply(prologue, dtype, self.weight, self.bias, *inputs)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise without weights, then scale and shift per frame: rms(x) (1 + scale) + shift."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def swiglu(x: Tensor) -> Tensor:
    """Gate the second half of the channels by the first: silu(gate) * value."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


class NormRotate(torch.autograd.Function):
    """Split (B, T, N, 3, H, E) into q, k, v; normalise and rotate q and k.

    With y the result, r = 1 / rms(x) and R the rotation: dx = R^T [ r (g - y mean(g y)) ]. So
    only q and k themselves, which attention keeps anyway, are saved.
    """

    @staticmethod
    def forward(ctx, qkv, table):
        q, k, v = qkv.unbind(3)
        saved, E = [], q.shape[-1]
        for x in (q, k):
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            r = torch.rsqrt(norm.square_().div_(E).add_(QK_NORM_EPS))
            saved += [rotate(x.float() * r, table).to(x.dtype), r]
        ctx.save_for_backward(*saved, table)
        return saved[0], saved[2], v.contiguous()

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        q, r_q, k, r_k, table = ctx.saved_tensors
        out = grad_v.new_empty(*grad_v.shape[:3], 3, *grad_v.shape[3:])
        for i, (y, r, grad) in enumerate(((q, r_q, grad_q), (k, r_k, grad_k))):
            y, grad = y.float(), grad.float()
            mean = (grad * y).mean(-1, keepdim=True)
            out[:, :, :, i] = rotate(
                torch.addcmul(grad, y, mean, value=-1).mul_(r), table, back=True
            )
        out[:, :, :, 2] = grad_v
        return out, None


def norm_rotate(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, T, N, 3, H, E) into q, k, v; normalise (RMS over E) and rotate q and k."""
    if not torch.compiler.is_compiling():
        return NormRotate.apply(qkv, table)
    q, k, v = qkv.unbind(3)
    q, k = (F.rms_norm(x.float(), x.shape[-1:], eps=QK_NORM_EPS) for x in (q, k))
    return rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype), v.contiguous()


# ------------------------------------------------------------------------------------------------
# Attention patterns over q (B, T, N, H, E) and k, v (B, T', N, H, E): the queries are the last T
# of T' frames. All are plain or causal SDPA on views, without masks: memory is linear in T.


def attend_space(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of its own frame."""
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # (B*T, H, N, E)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see itself in this and earlier frames (all T are new, or one is)."""
    assert q.shape[1] in (1, k.shape[1]), f"{q.shape[1]} new of {k.shape[1]} frames"
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # (B, N*H, T, E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)


def attend_joint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of this and earlier frames."""
    T, past = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # (B, H, T, N, E)
    frames = [
        F.scaled_dot_product_attention(
            q[:, :, t], *(x[:, :, : past + t + 1].flatten(2, 3) for x in (k, v))
        )
        for t in range(T)
    ]
    return torch.stack(frames, 2).permute(0, 2, 3, 1, 4)


class ContextCache:
    """Keep the temporal keys and values of known frames for the denoising steps of the next one.

    keys, values  per layer (B, window, N, H, E)   slots need no order: positions are in the keys
    frames        slots in use, at most window - 1: one is for the frame that is denoised
    position      frames seen since `encode_context`; a full cache has overwritten older ones
    rope          rotations (space, time) of the next frame
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values = keys, values
        self.frames = self.position = 0
        self.rope: tuple[Tensor, Tensor] | None = None
        for x in (*keys, *values):
            if x.is_cuda:  # lets CUDA graphs write to it
                torch._dynamo.mark_static_address(x)

    @property
    def full(self) -> bool:
        return self.frames == self.keys[0].shape[1] - 1

    def expand(self, n: int) -> ContextCache:
        """Copy every sample n times, for n candidates each; `rewind` lets them share the copy."""
        copy = ContextCache(
            *([x.repeat_interleave(n, 0) for x in xs] for xs in (self.keys, self.values))
        )
        copy.frames, copy.position, copy.rope = self.frames, self.position, self.rope
        return copy


ATTEND = {"factored": attend_time, "joint": attend_joint}

# ------------------------------------------------------------------------------------------------
# Blocks.


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = Linear(dim, 3 * dim, bias=False)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, rope: Tensor, attend: Callable):
        qkv = self.qkv_proj(x, shift, scale, prologue=modulate)
        y = attend(*norm_rotate(qkv.unflatten(-1, (3, self.heads, -1)), rope))
        return None if y is None else self.out_proj(y.reshape(x.shape))


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.w12 = Linear(dim, 2 * int(8 * dim / 3))
        self.w3 = Linear(int(8 * dim / 3), dim)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.w3(self.w12(x, shift, scale, prologue=modulate), prologue=swiglu)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.attn = Attention(dim, heads)
        self.ffwd = SwiGLU(dim)

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, attend: Callable):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        y = self.attn(x, shift_attn, scale_attn, rope, attend)
        if y is None:  # only keys and values were wanted
            return None
        x = torch.addcmul(x, gate_attn, y)
        return torch.addcmul(x, gate_mlp, self.ffwd(x, shift_mlp, scale_mlp))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.s_block = Block(dim, heads)
        self.t_block = Block(dim, heads)


class PatchEmbed(nn.Module):
    """Project p x p patches: the convolution of the released weights as one matrix product."""

    def __init__(self, in_channels: int, patch_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, z: Tensor) -> Tensor:
        p = self.weight.shape[-1]
        patches = z.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, T, h/p, p, w/p, p, C)
        patches = patches.permute(0, 1, 2, 4, 6, 3, 5).flatten(4).flatten(2, 3)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))
        self.linear = Linear(dim, out)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(x, *modulation.chunk(2, -1), prologue=modulate)


def timestep_embedding(tau: Tensor) -> Tensor:
    """Embed 1000 tau as [cos, sin] of 128 frequencies exp(-ln(10000) i / 128), in float32."""
    frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=tau.device))
    angles = 1000 * tau.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


# ------------------------------------------------------------------------------------------------
# The model.


class DiT(nn.Module):
    """Predict v of every frame from noised latents, noise levels and actions.

    z        (B, T, h, w, C)  V views side by side along w; T <= max_frames
    tau      (B, T)           noise level of each frame in [0, 1]
    actions  (B, T, A)        action[t] drives frame t to frame t + 1
    drop     (B,) bool        clips that get the null action (zeros, last entry 1); None: none, but
                              in training mode a share of `action_dropout`, drawn here
    ->       (B, T, h, w, C)
    Raises InputError for a window, grid or action width that the model does not have.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D, out = config.dim, config.patch_size**2 * config.in_channels
        self.x_proj = PatchEmbed(config.in_channels, config.patch_size, D)
        self.timestep_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.action_embedder = nn.Linear(config.action_dim, D)
        self.blocks = nn.ModuleList(Layer(D, config.heads) for _ in range(config.depth))
        if config.wide_head:
            self.s_projector = Linear(D, config.head_dim)
            self.head_final_layer = FinalLayer(config.head_dim, out)
        else:
            self.final_layer = FinalLayer(D, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as adaLN-zero does: every block starts as the identity, and v as zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, PatchEmbed)):
                if "adaLN_modulation" in name or "final_layer" in name:
                    nn.init.zeros_(module.weight)
                elif "timestep_mlp" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, z: Tensor, tau: Tensor, actions: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        B, T, h, w, _ = z.shape
        if T > self.config.max_frames:
            raise InputError(
                f"DiT got {T} frames, its window is {self.config.max_frames}; give fewer, or load "
                "it with the max_frames that it was trained with"
            )
        if drop is None and self.training and self.config.action_dropout > 0:
            drop = torch.rand(B, device=z.device) < self.config.action_dropout
        if drop is not None:
            no_action = F.one_hot(torch.tensor(actions.shape[-1] - 1), actions.shape[-1])
            actions = torch.where(drop[:, None, None], no_action.to(actions), actions)
        attend = [ATTEND[self.config.temporal_mode]] * self.config.depth
        return self._run(z, self.modulations(tau, actions), self._rope(0, T, h, w, z), attend)

    def modulations(self, tau: Tensor, actions: Tensor) -> list[Tensor]:
        """Turn noise levels (B, T) and actions (B, T, A) into what every block is modulated with.

        The K denoising steps of one frame may stand for T: one product serves all of them.

        ->  2 depth + 1 tensors (B, T, 1, ...): spatial and temporal blocks in turn, then the head
        """
        if actions.shape[-1] != self.config.action_dim:
            raise InputError(
                f"actions are {actions.shape[-1]} wide, the DiT takes {self.config.action_dim}; "
                "map them to its units first"
            )
        assert actions.shape[:2] == tau.shape, f"actions {actions.shape} beside tau {tau.shape}"
        dtype = self.action_embedder.weight.dtype
        time = self.timestep_mlp(timestep_embedding(tau).to(dtype))[:, :, None]
        c = time + self.action_embedder(actions.to(dtype))[:, :, None]  # (B, T, 1, D)
        blocks = [block for layer in self.blocks for block in (layer.s_block, layer.t_block)]
        head = time if self.config.wide_head else self.final_layer.adaLN_modulation(c)
        return [*(block.adaLN_modulation(c) for block in blocks), head]

    def _rope(self, first: int, T: int, h: int, w: int, z: Tensor) -> tuple[Tensor, Tensor]:
        p, build = self.config.patch_size, build_rope
        if not torch.compiler.is_compiling():
            build = cached_rope
        return build(self.config, first, T, h // p, w // p, z.device)

    def _run(self, z: Tensor, modulations: list[Tensor], rope: tuple, attend: list[Callable]):
        """Run the layers on T frames; attend[i] is the temporal attention of layer i."""
        B, T, h, w, C = z.shape
        p, V = self.config.patch_size, self.config.num_views
        if C != self.config.in_channels or h % p or w % (p * V):
            raise InputError(
                f"latents are {h} x {w} x {C}; the DiT takes {self.config.in_channels} channels "
                f"in patches of {p}, {V} views side by side"
            )
        x = self.x_proj(z)  # (B, T, N, D)
        for i, layer in enumerate(self.blocks):
            x = layer.s_block(x, modulations[2 * i], rope[0], attend_space)
            x = layer.t_block(x, modulations[2 * i + 1], rope[1], attend[i])
        if x is None:
            return None
        if self.config.wide_head:
            x = self.s_projector(F.silu(x + modulations[-1]))  # (B, T, N, head_dim)
            condition = x.mean(2, keepdim=True)
            x = self.head_final_layer(x, self.head_final_layer.adaLN_modulation(condition))
        else:
            x = self.final_layer(x, modulations[-1])  # (B, T, N, p*p*C)
        x = x.unflatten(-1, (p, p, C)).unflatten(2, (h // p, w // p))
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(z.shape).to(z.dtype)

    # -- frame by frame: encode_context once, then denoise K times and append, frame after frame

    def encode_context(
        self, z: Tensor, tau: Tensor, actions: Tensor, cache: ContextCache | None = None
    ) -> ContextCache:
        """Compute the keys and values of known frames, one frame pass each.

        z, tau, actions  as in `forward`, T < max_frames; T = 0 gives an empty cache
        cache            an older one of the same batch and grid, whose memory is used again
        """
        B, T, h, w, _ = z.shape
        window, p, H = self.config.max_frames, self.config.patch_size, self.config.heads
        if T >= window:
            raise InputError(f"a window of {window} holds {window - 1} known frames, not {T}")
        if cache is None:
            shape = (B, window, h * w // p**2, H, self.config.dim // H)
            new = functools.partial(
                torch.empty, shape, dtype=compute_dtype(self.x_proj.weight), device=z.device
            )
            cache = ContextCache([new() for _ in self.blocks], [new() for _ in self.blocks])
        if T:
            attend = self._cached_attention(cache, slice(0, T), T, keys_only=True)
            self._run(z, self.modulations(tau, actions), self._rope(0, T, h, w, z), attend)
        cache.frames = cache.position = T
        cache.rope = self._rope(T, 1, h, w, z)
        return cache

    def denoise(self, z: Tensor, modulations: list[Tensor], cache: ContextCache) -> Tensor:
        """Predict v (B, 1, h, w, C) of one new frame after the cached ones, in one frame pass.

        modulations  of this frame at this step: `modulations(tau, actions)` with T = 1
        """
        n = cache.frames
        attend = self._cached_attention(cache, slice(n, n + 1), n + 1)
        return self._run(z, modulations, cache.rope, attend)

    def append(self, z: Tensor, modulations: list[Tensor], cache: ContextCache) -> None:
        """Add one known frame (B, 1, h, w, C) to the cache, in one frame pass.

        In a full cache it takes the place of the oldest frame; the others are approximate from
        then on, because their keys have seen frames that are gone.
        """
        room = self.config.max_frames - 1
        if room == 0:
            return
        slot, frames = cache.position % room, min(cache.frames + 1, room)
        attend = self._cached_attention(cache, slice(slot, slot + 1), frames, keys_only=True)
        self._run(z, modulations, cache.rope, attend)
        cache.frames, cache.position = frames, cache.position + 1
        cache.rope = self._rope(cache.position, 1, *z.shape[2:4], z)

    def _cached_attention(
        self, cache: ContextCache, slots: slice, past: int, keys_only: bool = False
    ) -> list[Callable]:
        """Write new keys and values to `slots`, then attend to the first `past` slots.

        keys_only  stop in the last layer, whose output nobody needs
        """

        def layer(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            cache.keys[i][:, slots], cache.values[i][:, slots] = k, v
            if keys_only and i == self.config.depth - 1:
                return None
            attend = ATTEND[self.config.temporal_mode]
            return attend(q, cache.keys[i][:, :past], cache.values[i][:, :past])

        return [functools.partial(layer, i) for i in range(self.config.depth)]


# ------------------------------------------------------------------------------------------------
# Files.


def config_from_shapes(state: dict[str, Tensor], where: str, overrides: dict) -> DiTConfig:
    """Read the config that the shapes of released weights show; `overrides` give the rest.

    Heads follow the size table: head dim 64, 72 at width 1152.
    """
    for name, ndim in (("x_proj.weight", 4), ("action_embedder.weight", 2)):
        if name not in state or state[name].ndim != ndim:
            raise InputError(f"{where}: has no {name} of a DiT; give a DiT checkpoint")
    dim, in_channels, patch_size, _ = state["x_proj.weight"].shape
    layers = {match[0] for name in state if (match := re.match(r"blocks\.\d+\.", name))}
    seen = dict(in_channels=in_channels, patch_size=patch_size, dim=dim, depth=len(layers))
    seen["action_dim"] = state["action_embedder.weight"].shape[1]
    seen["wide_head"] = "s_projector.weight" in state
    if seen["wide_head"]:
        seen["head_dim"] = len(state["s_projector.weight"])
    heads = {size["dim"]: size["heads"] for size in DIT_SIZES.values()}
    if "heads" not in overrides:
        if dim not in heads and dim % 64:
            raise InputError(f"{where}: width {dim} does not tell the heads; give heads=")
        seen["heads"] = heads.get(dim, dim // 64)
    refuse_contradictions(seen, overrides, where)
    return config_from(DiTConfig, seen | overrides, where)


def refuse_contradictions(known: dict, overrides: dict, where: str) -> None:
    """Raise InputError if an override differs from what the file says."""
    for name in known.keys() & overrides.keys():
        if known[name] != overrides[name]:
            raise InputError(
                f"{where}: has {name}={known[name]!r}, you gave {overrides[name]!r}; leave it out "
                "or give the file that fits"
            )


def released_state(content: object, where: str) -> dict[str, Tensor]:
    """Find the one state dict of a released checkpoint: `ema`, else `model`, else the file itself.

    Raises InputError unless it is a plain dict of float tensors with distinct names.
    """
    if isinstance(content, dict):
        boxes = [name for name in ("ema", "model") if content.get(name) is not None]
        content = content[boxes[0]] if boxes else content
    if not isinstance(content, dict) or not content:
        raise InputError(f"{where}: holds no state dict; give a DiT checkpoint")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(
                f"{where}: {name!r} is not a float tensor, so this is no DiT state dict; it must "
                "stand under 'ema' or 'model', or be the whole file"
            )
    state = strip_prefixes(content, ("module.", "_orig_mod."))
    if len(state) != len(content):
        raise InputError(f"{where}: tensors occur with and without a prefix; keep one set")
    return state


def load_dit(path: str | Path, **overrides) -> DiT:
    """Load our `world_model.safetensors` or a released `.pt`, exactly or not at all.

    overrides  config fields that released weights do not show: temporal_mode, num_views,
               view_rope, max_frames, action_dropout, unusual heads; they may repeat what the
               file says but not contradict it
    ->         DiT in eval mode, float32, on the CPU
    Raises InputError for anything missing, left over, ambiguous or contradictory.
    """
    path, metadata = Path(path), {}
    if path.suffix == ".safetensors":
        content, metadata = load_tensors(path)
    else:
        content = load_torch(path)
    if "dit_config" in metadata:
        config = config_from(DiTConfig, metadata["dit_config"], str(path))
        refuse_contradictions(vars(config), overrides, str(path))
        config_from(DiTConfig, vars(config) | overrides, str(path))  # refuses unknown names
        state = {name[4:]: x for name, x in content.items() if name.startswith("dit.")}
    else:
        state = released_state(content, str(path))
        config = config_from_shapes(state, str(path), overrides)
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device="cpu")
    load_strictly(dit, state, str(path))
    return dit.eval()


def gflop_per_frame(config: DiTConfig, N: int = 256) -> float:
    """Count a forward pass per frame at T = max_frames: 2 per multiply-add of every matrix product
    on patches, full score and value products in attention (also where causality hides half)."""
    D, T = config.dim, config.max_frames
    hidden, patch = int(8 * D / 3), config.patch_size**2 * config.in_channels
    linear = 2 * config.depth * (4 * D * D + 3 * D * hidden) + D * patch
    linear += config.head_dim * (D + patch) if config.wide_head else D * patch
    seen = N + (T if config.temporal_mode == "factored" else N * T)
    return 2 * N * (linear + 2 * config.depth * D * seen) / 1e9


if __name__ == "__main__":
    columns = [(16, 2, False), (96, 1, False), (96, 1, True), (1024, 1, True), (1152, 1, True)]
    print("parameters (M) and GFLOP a frame (16 x 16 patches, T = 10, 2 per multiply-add)")
    print("      " + "".join(f"C={C} p={p}{' wide' * wide}".rjust(20) for C, p, wide in columns))
    for size, shape in DIT_SIZES.items():
        cells = []
        for C, p, wide in columns:
            config = DiTConfig(C, p, wide_head=wide, **shape)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in DiT(config).parameters())
            cells.append(f"{count / 1e6:.3f}  {gflop_per_frame(config):7.1f}".rjust(20))
        print(f"DiT-{size:2}" + "".join(cells))
    print("the paper's DiT-L: 316.5 (C=96, 910.1 M), 318.7 (C=1024 wide), 318.8 (C=1152 wide)")
