"""Predict the velocity of noised latent frames with an action-conditioned causal transformer.

Architecture: DiT blocks (Peebles & Xie 2023), factored in space and time, after arXiv 2605.06388.

    z_tau --patch--> x --[ spatial block -> temporal block ] x depth--> norm, linear --> v
                              ^                 ^
    tau, actions ---------> adaLN-zero: shift, scale, gate for attention and MLP, per frame

Spatial attention is full inside a frame, temporal attention causal per patch position ("factored")
or block-causal over all patches ("joint"). Keys and values of temporal attention are all that a
new frame needs of the past: `ContextCache` keeps them through the denoising steps.

Shapes: B batch, V views, T frames, h w latent grid, C latent channels, N patches a frame, D width,
K denoising steps, A action width, H heads, E head dim.
"""

from __future__ import annotations

import dataclasses
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
    max_frames: int = 10  # longest attention window, in frames
    wide_head: bool = False  # DDT head for wide semantic latents
    head_dim: int = 2048  # width of the wide head
    temporal_mode: str = "factored"  # factored | joint
    num_views: int = 1  # cameras, side by side along the latent width
    view_rope: str = "additive"  # additive | official
    action_dropout: float = 0.1  # clips trained without actions

    def __post_init__(self):
        for name in ("in_channels", "patch_size", "dim", "depth", "heads", "action_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"DiTConfig.{name} is {getattr(self, name)}; give at least 1")
        for name in ("max_frames", "head_dim", "num_views"):
            if getattr(self, name) < 1:
                raise InputError(f"DiTConfig.{name} is {getattr(self, name)}; give at least 1")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise InputError(
                f"DiTConfig: {self.heads} heads do not divide dim {self.dim} into even parts; "
                "choose other heads or another dim"
            )
        if self.temporal_mode not in ("factored", "joint"):
            raise InputError(
                f"DiTConfig.temporal_mode is {self.temporal_mode!r}; choose factored or joint"
            )
        if self.view_rope not in ("additive", "official"):
            raise InputError(
                f"DiTConfig.view_rope is {self.view_rope!r}; choose additive or official"
            )
        if not 0 <= self.action_dropout <= 1:
            raise InputError(
                f"DiTConfig.action_dropout is {self.action_dropout}; choose a share in [0, 1]"
            )


# ------------------------------------------------------------------------------------------------
# Views.


def merge_views(z: Tensor) -> Tensor:
    """Lay the latents of V views side by side along the width: column v * w + x is cell x of v.

    z   (B, V, T, h, w, C)
    ->  (B, T, h, V*w, C)
    """
    return z.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def split_views(z: Tensor, num_views: int) -> Tensor:
    """Undo `merge_views`.

    z   (B, T, h, V*w, C)
    ->  (B, V, T, h, w, C)
    """
    if z.shape[3] % num_views:
        raise InputError(
            f"split_views: width {z.shape[3]} is not divisible by {num_views} views; "
            "give latents made by merge_views"
        )
    return z.unflatten(3, (num_views, -1)).permute(0, 3, 1, 2, 4, 5)


# ------------------------------------------------------------------------------------------------
# Rotary positions.


def axis_angles(positions: Tensor, channels: int) -> Tensor:
    """Give the angles of one axis: position * 10000^(-i / half), half = channels / 2.

    positions  (...)        integer indices
    ->         (..., half)  radians, float64
    """
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return positions.double()[..., None] * frequencies


def rope_angles(config: DiTConfig, times: range | None, h: int, w: int) -> Tensor:
    """Give every patch its rotation angles (arXiv 2104.09864), one per adjacent channel pair.

    The axes (t,) h, w split the head dim evenly, first axis first; pairs that are left over
    stand still. Additive views: angle + v 10000^(-i / (E/2)), zero for view 0. Official views:
    column c has width index c // V and view index c % V; channels h, w, view.

    times  frame positions of joint attention; None for attention inside one frame
    h, w   patches, all views side by side
    ->     (T or 1, h*w, E/2)  radians, float64
    """
    V, E = config.num_views, config.dim // config.heads
    official = config.view_rope == "official" and V > 1
    t, row, column = torch.meshgrid(
        torch.arange(1) if times is None else torch.tensor(times),
        torch.arange(h),
        torch.arange(w),
        indexing="ij",
    )
    t, row, column = t.flatten(1), row.flatten(1), column.flatten(1)
    if times is not None:
        share = E // 6 * 2
        x = column if official else column % (w // V)
        parts = [axis_angles(axis, share) for axis in (t, row, x)]
    elif official:
        E_view = E // 3 // 2 * 2
        E_h = (E - E_view) // 2 // 2 * 2
        parts = [
            axis_angles(row, E_h),
            axis_angles(column // V, E - E_view - E_h),
            axis_angles(column % V, E_view),
        ]
    else:
        share = E // 4 * 2
        parts = [axis_angles(axis, share) for axis in (row, column % (w // V))]
    angles = torch.cat(parts, -1)
    angles = F.pad(angles, (0, E // 2 - angles.shape[-1]))
    if not official:
        angles = angles + axis_angles(column // (w // V), E)
    return angles


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=64)
def rope_tables(
    config: DiTConfig, first: int, T: int, h: int, w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Build the rotations (cos, sin) of spatial and temporal attention once per window and grid.

    first, T  position of the first frame, number of frames
    ->        (1, N, 1, E/2, 2), (T, 1 or N, 1, E/2, 2)   float32 in every precision
    """
    times = range(first, first + T)
    if config.temporal_mode == "joint":
        temporal = rope_angles(config, times, h, w)
    else:
        temporal = axis_angles(torch.tensor(times), config.dim // config.heads)[:, None]
    with torch.inference_mode(False):
        return tuple(
            torch.stack((angles.cos(), angles.sin()), -1).float()[:, :, None].to(device)
            for angles in (rope_angles(config, None, h, w), temporal)
        )


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).

    x      (B, T, N, H, E)     float32
    table  (., ., 1, E/2, 2)   cos and sin
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, and knows no complex numbers
        (x0, x1), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2)


# ------------------------------------------------------------------------------------------------
# Attention patterns over q (B, T, N, H, E) and k, v (B, T', N, H, E), T' >= T: the queries are
# the last T of the T' frames. All of them are plain or causal SDPA on views, without masks.


def attend_space(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of its own frame."""
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # (B*T, H, N, E)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see itself in this and earlier frames; patches and heads share an axis."""
    T, past = q.shape[1], k.shape[1]
    assert T in (1, past), f"{T} new frames beside {past} known ones: give one or all"
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # (B, N*H, T, E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1).transpose(1, 2)


def attend_joint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of this and earlier frames: one unmasked call per frame."""
    T, past = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # (B, H, T, N, E)
    frames = [
        F.scaled_dot_product_attention(
            q[:, :, t], k[:, :, : past + t + 1].flatten(2, 3), v[:, :, : past + t + 1].flatten(2, 3)
        )
        for t in range(T)
    ]
    return torch.stack(frames, 2).permute(0, 2, 3, 1, 4)


ATTEND = {"factored": attend_time, "joint": attend_joint}


class ContextCache:
    """Keep the temporal keys and values of known frames, for all denoising steps of the next one.

    keys, values  per layer (B, window, N, H, E)   slots in no order: positions are in the keys
    frames        int   slots in use, at most window - 1: the last is for the frame being denoised
    position      int   frames seen since the cache was encoded; older ones have been overwritten
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], frames: int, grid: tuple):
        self.keys, self.values, self.grid = keys, values, grid
        self.frames = self.position = frames

    @property
    def full(self) -> bool:
        return self.frames == self.keys[0].shape[1] - 1

    def expand(self, n: int) -> ContextCache:
        """Repeat every sample n times (sample b becomes b*n ... b*n + n-1), for n candidates."""
        keys, values = ([x.repeat_interleave(n, 0) for x in xs] for xs in (self.keys, self.values))
        copy = ContextCache(keys, values, self.frames, self.grid)
        copy.position = self.position
        return copy

    def rewind(self, frames: int) -> None:
        """Forget all but the first `frames` frames, to branch again from there."""
        assert frames <= self.frames == self.position, "a cache that has slid cannot be rewound"
        self.frames = self.position = frames


# ------------------------------------------------------------------------------------------------
# Blocks.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise without weights, then scale and shift per frame: rms(x) (1 + scale) + shift."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project, normalise and rotate: x (B, T, N, D) -> q, k, v (B, T, N, H, E)."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (
            rotate(F.rms_norm(y.float(), y.shape[-1:], eps=QK_NORM_EPS), rope).to(v.dtype)
            for y in (q, k)
        )
        return q, k, v.contiguous()

    def forward(self, x: Tensor, rope: Tensor, attend: Callable) -> Tensor:
        return self.out_proj(attend(*self.qkv(x, rope)).reshape(x.shape))


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = int(8 * dim / 3)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.attn = Attention(dim, heads)
        self.ffwd = SwiGLU(dim)

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, attend: Callable) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        x = x + gate_attn * self.attn(modulate(x, shift_attn, scale_attn), rope, attend)
        return x + gate_mlp * self.ffwd(modulate(x, shift_mlp, scale_mlp))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.s_block = Block(dim, heads)
        self.t_block = Block(dim, heads)


class PatchEmbed(nn.Module):
    """Project p x p patches: the convolution of the released weights, as one matrix product."""

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
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(modulate(x, *modulation.chunk(2, -1)))


def timestep_embedding(tau: Tensor) -> Tensor:
    """Embed the noise level: [cos, sin] of 1000 tau exp(-ln(10000) i / 128), i < 128, float32."""
    frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=tau.device))
    angles = 1000 * tau.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


# ------------------------------------------------------------------------------------------------
# The model.


class DiT(nn.Module):
    """Predict v for every frame from noised latents, noise levels and actions.

    z        (B, T, h, w, C)  noised latents; V views side by side along w; T <= max_frames
    tau      (B, T)           noise level of each frame in [0, 1]
    actions  (B, T, A)        action[t] drives frame t to frame t + 1
    drop     (B,)             bool: clips that get the null action; None: in training mode drawn
                              with `action_dropout`, else none
    ->       (B, T, h, w, C)  v, the derivative (flow matching) or v-prediction (DDPM)
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
            self.s_projector = nn.Linear(D, config.head_dim)
            self.head_final_layer = FinalLayer(config.head_dim, out)
        else:
            self.final_layer = FinalLayer(D, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as adaLN-zero does: the model starts as v = 0 with identity blocks."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | PatchEmbed):
                if "adaLN_modulation" in name or "final_layer" in name:
                    nn.init.zeros_(module.weight)
                elif name.startswith("timestep_mlp"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, z: Tensor, tau: Tensor, actions: Tensor, drop: Tensor | None = None):
        T = z.shape[1]
        if T > self.config.max_frames:
            raise InputError(
                f"DiT got {T} frames, its window is {self.config.max_frames}; give fewer frames, "
                "or load it with max_frames set to the length it was trained with"
            )
        if drop is None and self.training and self.config.action_dropout > 0:
            drop = torch.rand(len(z), device=z.device) < self.config.action_dropout
        if drop is not None:
            no_action = F.one_hot(torch.tensor(actions.shape[-1] - 1), actions.shape[-1])
            actions = torch.where(drop[:, None, None], no_action.to(actions), actions)
        attend = ATTEND[self.config.temporal_mode]
        return self.run(z, self.modulations(tau, actions), 0, [attend] * self.config.depth)

    def modulations(self, tau: Tensor, actions: Tensor) -> list[Tensor]:
        """Turn noise levels and actions into the adaLN modulations of every block.

        For K denoising steps of one frame, K takes the place of T: one product for all steps.

        tau, actions  (B, T), (B, T, A)
        ->            2 depth + 1 tensors (B, T, 1, ...): each block, then the final layer
        """
        if actions.shape[-1] != self.config.action_dim:
            raise InputError(
                f"actions are {actions.shape[-1]} wide, the DiT was built for "
                f"{self.config.action_dim}; map them to its units first (WorldModel.map_actions)"
            )
        assert actions.shape[:2] == tau.shape, f"{tau.shape} tau, {actions.shape} actions"
        dtype = self.action_embedder.weight.dtype
        time = self.timestep_mlp(timestep_embedding(tau).to(dtype))
        c = (time + self.action_embedder(actions.to(dtype))).unsqueeze(2)
        blocks = [block for layer in self.blocks for block in (layer.s_block, layer.t_block)]
        last = time.unsqueeze(2) if self.config.wide_head else self.final_layer.adaLN_modulation(c)
        return [*(block.adaLN_modulation(c) for block in blocks), last]

    def run(
        self, z: Tensor, modulations: list[Tensor], first: int, attend: list[Callable]
    ) -> Tensor | None:
        """Run all layers on T frames whose first has position `first` in the window."""
        B, T, h, w, C = z.shape
        p, V = self.config.patch_size, self.config.num_views
        if C != self.config.in_channels or h % p or w % (p * V):
            raise InputError(
                f"latents are {h} x {w} x {C}; the DiT was built for {self.config.in_channels} "
                f"channels, patches of {p} and {V} views side by side: give latents that fit"
            )
        rope_s, rope_t = rope_tables(self.config, first, T, h // p, w // p, z.device)
        *modulations, last = modulations
        x = self.x_proj(z)  # (B, T, N, D)
        for i, layer in enumerate(self.blocks):
            x = layer.s_block(x, modulations[2 * i], rope_s, attend_space)
            x = layer.t_block(x, modulations[2 * i + 1], rope_t, attend[i])
        if self.config.wide_head:
            x = self.s_projector(F.silu(x + last))  # (B, T, N, head_dim)
            condition = x.mean(2, keepdim=True)
            x = self.head_final_layer(x, self.head_final_layer.adaLN_modulation(condition))
        else:
            x = self.final_layer(x, last)  # (B, T, N, p*p*C)
        x = x.unflatten(-1, (p, p, C)).unflatten(2, (h // p, w // p))
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(z.shape).to(z.dtype)

    # -- frame by frame: encode_context, then (denoise x K, append) for every new frame

    def encode_context(
        self, z: Tensor, tau: Tensor, actions: Tensor, cache: ContextCache | None = None
    ) -> ContextCache:
        """Compute the keys and values of known frames once (one frame pass each).

        z, tau, actions  as in `forward`, with T < max_frames; T = 0 gives an empty cache
        cache            an older cache of the same batch and grid, whose memory is used again
        """
        B, T, h, w, C = z.shape
        window, p = self.config.max_frames, self.config.patch_size
        if T >= window:
            raise InputError(
                f"encode_context got {T} frames; the window is {window}: give at most {window - 1}"
            )
        if cache is None:
            shape = (B, window, h // p * (w // p), self.config.heads, -1)
            like = self.x_proj.weight.new_empty(B, window, h // p * (w // p), self.config.dim)
            keys = [torch.empty_like(like).view(shape) for _ in self.blocks]
            values = [torch.empty_like(like).view(shape) for _ in self.blocks]
            cache = ContextCache(keys, values, T, (h, w))
        cache.frames = cache.position = T
        if T:
            self._run_cached(z, self.modulations(tau, actions), cache, 0, slice(0, T), T)
        return cache

    def denoise(self, z: Tensor, modulations: list[Tensor], cache: ContextCache) -> Tensor:
        """Predict v for one new frame after the cached ones (one frame pass).

        z            (B, 1, h, w, C)
        modulations  of this frame at this step: `modulations(tau, actions)` with T = 1
        """
        n = cache.frames
        return self._run_cached(z, modulations, cache, cache.position, slice(n, n + 1), n + 1)

    def append(self, z: Tensor, modulations: list[Tensor], cache: ContextCache) -> None:
        """Add one known frame to the cache (one frame pass); in a full cache the oldest one goes.

        A full cache then is approximate: its keys still carry what they saw of older frames.
        """
        window = self.config.max_frames
        if window == 1:
            return
        slot = cache.position % (window - 1)
        frames = min(cache.frames + 1, window - 1)
        self._run_cached(z, modulations, cache, cache.position, slice(slot, slot + 1), frames)
        cache.frames, cache.position = frames, cache.position + 1

    def _run_cached(self, z, modulations, cache, first, slots, past) -> Tensor:
        """Run frames whose keys and values go to `slots` and which attend to the first `past`."""
        attend = ATTEND[self.config.temporal_mode]

        def through(keys: Tensor, values: Tensor) -> Callable:
            def write_and_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys[:, slots], values[:, slots] = k, v
                return attend(q, keys[:, :past], values[:, :past])

            return write_and_attend

        layers = [through(*pair) for pair in zip(cache.keys, cache.values, strict=True)]
        return self.run(z, modulations, first, layers)


# ------------------------------------------------------------------------------------------------
# Files.


def config_from_shapes(state: dict[str, Tensor], where: str, overrides: dict) -> DiTConfig:
    """Read what the shapes of released weights show; the rest comes from `overrides` or defaults.

    Heads follow the size table: head dim 64, 72 at width 1152.
    """
    needed = ("x_proj.weight", "action_embedder.weight")
    for name in needed:
        if name not in state or state[name].ndim != (4 if name == "x_proj.weight" else 2):
            raise InputError(
                f"{where}: no usable {name} among {len(state)} tensors; "
                "give a DiT checkpoint of ours or a released one"
            )
    dim, in_channels, patch_size, _ = state["x_proj.weight"].shape
    layers = {int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)}
    seen = dict(
        in_channels=in_channels,
        patch_size=patch_size,
        dim=dim,
        depth=len(layers),
        action_dim=state["action_embedder.weight"].shape[1],
        wide_head="s_projector.weight" in state,
    )
    if seen["wide_head"]:
        seen["head_dim"] = len(state["s_projector.weight"])
    if "heads" not in overrides:
        sizes = {size["dim"]: size["heads"] for size in DIT_SIZES.values()}
        if dim not in sizes and dim % 64:
            raise InputError(f"{where}: width {dim} does not tell the heads; give heads=...")
        seen["heads"] = sizes.get(dim, dim // 64)
    for name in seen.keys() & overrides.keys():
        if seen[name] != overrides[name]:
            raise InputError(
                f"{where}: the weights have {name}={seen[name]}, you gave {overrides[name]}; "
                "leave it out"
            )
    return config_from(DiTConfig, {**seen, **overrides}, where)


def released_state(content: object, where: str) -> dict[str, Tensor]:
    """Find the one state dict in a released checkpoint: `ema`, else `model`, else the file itself.

    Raises InputError when it is not a plain dict of float tensors with distinct names.
    """
    if isinstance(content, dict):
        boxes = [name for name in ("ema", "model") if content.get(name) is not None]
        content = content[boxes[0]] if boxes else content
    if not isinstance(content, dict) or not content:
        raise InputError(f"{where}: holds no state dict; give a DiT checkpoint")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(
                f"{where}: entry {name!r} is not a float tensor, so this is no DiT state dict "
                "(expected one under 'ema' or 'model', or bare); save it in that form"
            )
    state = strip_prefixes(content, ("module.", "_orig_mod."))
    if len(state) != len(content):
        raise InputError(f"{where}: some tensors occur with and without a prefix; keep one set")
    return state


def load_dit(path: str | Path, **overrides) -> DiT:
    """Load a DiT: our `world_model.safetensors` or a released `.pt`, exactly or not at all.

    overrides  config fields that released weights do not show: temporal_mode, num_views,
               view_rope, max_frames, heads, action_dropout. Whatever the metadata or the shapes
               show cannot be overridden.
    ->         DiT in eval mode, float32, on the CPU
    Raises InputError for anything missing, left over, ambiguous or contradictory.
    """
    if Path(path).suffix == ".safetensors":
        tensors, metadata = load_tensors(path)
    else:
        tensors, metadata = load_torch(path), {}
    if "dit_config" in metadata:
        config = config_from(DiTConfig, metadata["dit_config"], str(path))
        for name, value in overrides.items():
            if getattr(config, name, None) != value:
                raise InputError(
                    f"{path}: was written with {name}={getattr(config, name, None)}, you gave "
                    f"{value}; leave it out"
                )
        state = {name[4:]: x for name, x in tensors.items() if name.startswith("dit.")}
    else:
        state = released_state(tensors, str(path))
        config = config_from_shapes(state, str(path), overrides)
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device="cpu")
    load_strictly(dit, state, str(path))
    return dit.eval()
