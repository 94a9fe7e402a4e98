"""Predict the velocity of noised latent frames with an action-conditioned causal transformer.

DiT blocks (Peebles & Xie 2023, sec. 3.2), factored in space and time after arXiv 2605.06388:

    z_tau --patch--> x --[ spatial block -> temporal block ] x depth--> norm, linear --> v
                              ^                 ^
    tau, actions ---------> adaLN-zero: shift, scale, gate for attention and MLP, per frame

Spatial attention is full inside a frame, temporal attention causal per patch ("factored") or
block-causal over all patches ("joint"); `ContextCache` keeps the temporal keys and values.

Shapes: B batch, V views, T frames, h w latent grid, C latent channels, N patches a frame, D width,
H heads, E head dim, A action width. Tokens x are (B, T, N, D); all attention runs on views of it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
from data import InputError, linear

DIT_SIZES = {
    "T": dict(dim=256, depth=2, heads=4),
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
    wide_head: bool = False  # DDT head, for wide semantic latents (arXiv 2510.11690)
    head_dim: int = 2048  # width of the wide head
    temporal_mode: str = "factored"  # factored | joint
    num_views: int = 1  # cameras, side by side along the latent width
    view_rope: str = "additive"  # additive | official
    action_dropout: float = 0.1  # share of training clips without actions

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise InputError(f"DiT {field.name} is {value!r}; give a whole number from 1 on")
        if self.dim % (2 * self.heads):
            raise InputError(f"DiT dim {self.dim} is not {self.heads} heads of even width")
        for name, known in (("temporal_mode", ATTEND), ("view_rope", ("additive", "official"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if not 0 <= self.action_dropout <= 1:
            raise InputError(f"action_dropout is {self.action_dropout}; choose a share, 0 to 1")


def merge_views(z: Tensor) -> Tensor:
    """Lay views side by side, (B, V, T, h, w, C) -> (B, T, h, V*w, C): column v*w + x is x of v."""
    return z.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def split_views(z: Tensor, num_views: int) -> Tensor:
    """Undo `merge_views`, (B, T, h, V*w, C) -> (B, V, T, h, w, C)."""
    if z.shape[3] % num_views:
        raise InputError(f"a latent width of {z.shape[3]} does not split into {num_views} views")
    return z.unflatten(3, (num_views, -1)).permute(0, 3, 1, 2, 4, 5)


# -- Rotary positions (Su et al. 2021, arXiv 2104.09864, sec. 3.2.2).


def axis_angles(positions: Tensor, channels: int) -> Tensor:
    """Give position * 10000^(-i / half) for i < half = channels / 2: (...) -> (..., half)."""
    half = channels // 2
    return positions[..., None] * 10000.0 ** (-torch.arange(half, device=positions.device) / half)


def build_rope(
    config: DiTConfig, first: int, T: int, h: int, w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Build cos and sin of spatial and of temporal attention, T frames from position `first`.

    Axes share the head dim evenly, first axis first: h, w in space; t in time; t, h, w jointly.
    Pairs left over stand still. Additive views (ours) turn every pair by v 10000^(-i/(E/2)) more.
    Official views: column c has width index c // V, view index c % V, channels are h, w, view;
    temporal blocks ignore views. h, w are the latent grid, all views side by side.

    ->  (1, N, 1, E/2, 2), (T, 1 or N, 1, E/2, 2)   float32 in every precision
    """
    p, V, E = config.patch_size, config.num_views, config.dim // config.heads
    spans = ((first, first + T), (0, h // p), (0, w // p))
    grid = torch.meshgrid(*(torch.arange(*span, device=device) for span in spans), indexing="ij")
    t, row, column = (axis.flatten(1).float() for axis in grid)  # (T, N)
    view, x = column // (w // p // V), column % (w // p // V)
    space, time = [(row, E // 4 * 2), (x, E // 4 * 2)], [(t[:, :1], E)]
    if config.view_rope == "official" and V > 1:
        E_view = E // 3 // 2 * 2
        E_h = (E - E_view) // 4 * 2
        space = [(row, E_h), (column // V, E - E_view - E_h), (column % V, E_view)]
        view, x = 0 * view, column
    if config.temporal_mode == "joint":
        time = [(axis, E // 6 * 2) for axis in (t, row, x)]

    def rotations(axes: list[tuple[Tensor, int]]) -> Tensor:
        angles = torch.cat([axis_angles(*axis) for axis in axes], -1)
        angles = F.pad(angles, (0, E // 2 - angles.shape[-1]))
        angles = angles + axis_angles(view[:, : angles.shape[1]], E)
        return torch.stack((angles.cos(), angles.sin()), -1)[:, :, None]

    return rotations(space)[:1], rotations(time)


# Kept for reuse, and not as inference tensors: training may meet a table that a rollout made.
cached_rope = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(build_rope))


def qk_norm_rope(x: Tensor, table: Tensor) -> Tensor:
    """Normalise each head of x (B, T, N, H, E) by its RMS, then rotate adjacent channel pairs:

    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), all in float32
    """
    y = F.rms_norm(x.float(), x.shape[-1:], eps=QK_NORM_EPS).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, and knows no complex numbers
        (y0, y1), (cos, sin) = y.unbind(-1), table.unbind(-1)
        y = torch.stack((y0 * cos - y1 * sin, y1 * cos + y0 * sin), -1)
    else:
        y = torch.view_as_real(torch.view_as_complex(y) * torch.view_as_complex(table))
    return y.flatten(-2).to(x.dtype)


# -- Fast parts: they keep little for the backward pass, and so touch little memory.


class Project(torch.autograd.Function):
    """Multiply prologue(*inputs) by a weight; keep the inputs and compute the prologue again."""

    @staticmethod
    def forward(
        ctx: Any, prologue: Callable, weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        device = weight.device.type.replace("meta", "cpu")  # meta tensors know no autocast
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.prologue, ctx.autocast = prologue, torch.autocast(device, dtype, enabled)
        ctx.save_for_backward(weight, bias, *inputs)
        return linear(prologue(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *inputs = ctx.saved_tensors
        _, need_weight, need_bias, *needs = ctx.needs_input_grad
        inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with torch.enable_grad(), ctx.autocast:
            x = ctx.prologue(*inputs)
        rows, columns = (y.detach().flatten(0, -2).to(grad.dtype).t() for y in (grad, x))
        grad_weight = linear(rows, columns).to(weight.dtype) if need_weight else None
        grad_bias = rows.sum(1, dtype=bias.dtype) if need_bias else None
        if x.requires_grad:
            x.backward(linear(grad, weight.to(grad.dtype).t()).to(x.dtype))
        return None, grad_weight, grad_bias, *(x.grad for x in inputs)


def project(prologue: Callable, weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """Compute prologue(*inputs) weight^T + bias, keeping for the backward pass the inputs only."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(prologue(*inputs), weight, bias)
    return Project.apply(prologue, weight, bias, *inputs)


class Linear(nn.Linear):
    """Linear layer behind a prologue whose output is not kept."""

    def forward(self, *inputs: Tensor, prologue: Callable = lambda x: x) -> Tensor:
        return project(prologue, self.weight, self.bias, *inputs)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise without weights, then scale and shift per frame: rms(x) (1 + scale) + shift."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def swiglu(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Widen modulated tokens by w12, gate: silu(gate) * value           [Shazeer 2020, sec. 2]."""
    gate, value = project(modulate, weight, bias, x, shift, scale).chunk(2, -1)
    return F.silu(gate) * value


# -- Attention over q (B, T, N, H, E) and k, v (B, T', N, H, E), the queries being the last T of T'
# frames: plain or causal SDPA on views, never with a mask, so memory is linear in T.


def attend_space(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of its own frame."""
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # (B*T, H, N, E)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see itself in this and earlier frames (all T are new, or one is)."""
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # (B, N*H, T or T', E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)


def attend_joint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every patch see all patches of this and earlier frames."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # (B, H, T or T', N, E)
    frames, past = [], k.shape[2] - q.shape[2]
    for t in range(q.shape[2]):
        k_seen, v_seen = (x[:, :, : past + t + 1].flatten(2, 3) for x in (k, v))
        frames.append(F.scaled_dot_product_attention(q[:, :, t], k_seen, v_seen))
    return torch.stack(frames, 2).permute(0, 2, 3, 1, 4)


ATTEND = {"factored": attend_time, "joint": attend_joint}


@dataclass
class ContextCache:
    """Keep the temporal keys and values of known frames for the denoising steps of the next one."""

    window: int
    length: int  # slots in use, at most window - 1: one is for the frame that is denoised
    position: int  # frames added since it was empty; a full cache has overwritten the oldest
    kv: dict[int, Tensor]  # layer: (2, B, window, N, H, E), made at first use; slots have no order

    def repeat(self, n: int, room: int | None = None) -> ContextCache:
        """Copy every sample n times, for n candidates each; room: only that many frames more."""
        end = None if room is None else self.length + room
        kv = {i: x[:, :, :end].repeat_interleave(n, 1) for i, x in self.kv.items()}
        return replace(self, kv=kv)


class Block(nn.Module):
    """Attend, then transform; `attend` takes q, k, v and decides who sees whom."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, hidden, qkv = heads, int(8 * dim / 3), Linear(dim, 3 * dim, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.attn = nn.ModuleDict(dict(qkv_proj=qkv, out_proj=Linear(dim, dim)))
        self.ffwd = nn.ModuleDict(dict(w12=Linear(dim, 2 * hidden), w3=Linear(hidden, dim)))

    def forward(self, x: Tensor, modulation: Tensor, rope: Tensor, attend: Callable) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        qkv = self.attn["qkv_proj"](x, shift_attn, scale_attn, prologue=modulate)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(3)  # (B, T, N, H, E)
        y = attend(qk_norm_rope(q, rope), qk_norm_rope(k, rope), v)
        x = torch.addcmul(x, gate_attn, self.attn["out_proj"](y.reshape(x.shape)))
        inputs = x, shift_mlp, scale_mlp, *self.ffwd["w12"].parameters()
        return torch.addcmul(x, gate_mlp, self.ffwd["w3"](*inputs, prologue=swiglu))


def timestep_embedding(tau: Tensor) -> Tensor:
    """Embed 1000 tau: cos, sin of 128 waves 10000^(-i/128), float32 [Vaswani et al. 2017, 3.5]."""
    waves = torch.exp(-math.log(10000) * torch.arange(128, device=tau.device) / 128)
    angles = 1000 * tau.float()[..., None] * waves
    return torch.cat((angles.cos(), angles.sin()), -1)


class DiT(nn.Module):
    """Predict v of every frame from noised latents, noise levels and actions.

    z        (B, T, h, w, C)  V views side by side along w; T <= max_frames
    tau      (B, T)           noise level of each frame in [0, 1]
    actions  (B, T, A)        action[t] drives frame t to frame t + 1
    drop     (B,) bool        clips that get the null action (zeros, last entry 1); None: none, but
                              in training mode a share of `action_dropout`, drawn here
    ->       (B, T, h, w, C)
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D, out = config.dim, config.patch_size**2 * config.in_channels
        self.x_proj = nn.Conv2d(config.in_channels, D, config.patch_size, config.patch_size)
        self.timestep_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.action_embedder = nn.Linear(config.action_dim, D)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: Block(D, config.heads) for name in ("s_block", "t_block")})
            for _ in range(config.depth)
        )
        if config.wide_head:
            self.s_projector = Linear(D, config.head_dim)
            D = config.head_dim
        adaLN = nn.Sequential(nn.SiLU(), Linear(D, 2 * D))
        head = nn.ModuleDict({"adaLN_modulation": adaLN, "linear": Linear(D, out)})
        self.add_module("head_final_layer" if config.wide_head else "final_layer", head)
        for name, x in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(x)  # v starts as zero, every block as the identity
            elif "timestep_mlp" in name:
                nn.init.normal_(x, std=0.02)
            else:
                nn.init.xavier_uniform_(x.flatten(1))

    def forward(
        self, z: Tensor, tau: Tensor, actions: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        B, T = z.shape[:2]
        if T > self.config.max_frames:
            raise InputError(f"DiT got {T} frames, over max_frames={self.config.max_frames}")
        if drop is None and self.training and self.config.action_dropout > 0:
            drop = torch.rand(B, device=z.device) < self.config.action_dropout
        if drop is not None:
            actions = torch.where(drop[:, None, None], data.null_action(actions), actions)
        attend = ATTEND[self.config.temporal_mode]
        return self._run(z, self.modulations(tau, actions), 0, lambda layer, *qkv: attend(*qkv))

    def modulations(self, tau: Tensor, actions: Tensor) -> list[Tensor]:
        """Turn noise levels (B, T) and actions (B, T, A) into what every block is modulated with.

        -> (B, T, 1, ...) for every block and the head; denoising steps of one frame may stand for T
        """
        if actions.shape != (needed := (*tau.shape, self.config.action_dim)):
            raise InputError(f"DiT got actions of shape {tuple(actions.shape)}; give {needed}")
        dtype = self.action_embedder.weight.dtype
        time = self.timestep_mlp(timestep_embedding(tau).to(dtype))[:, :, None]
        c = time + self.action_embedder(actions.to(dtype))[:, :, None]  # (B, T, 1, D)
        blocks = [block for layer in self.blocks for block in layer.values()]
        head = time if self.config.wide_head else self.final_layer["adaLN_modulation"](c)
        return [*(block.adaLN_modulation(c) for block in blocks), head]

    def _run(self, z: Tensor, modulations: list[Tensor], first: int, attend: Callable) -> Tensor:
        """Run frames from position `first`; attend(layer, q, k, v) is the temporal attention."""
        B, T, h, w, C = z.shape
        p, V = self.config.patch_size, self.config.num_views
        if C != self.config.in_channels or h % p or w % (p * V):
            needed = f"{self.config.in_channels} channels, {V} views side by side, {p}x{p} patches"
            raise InputError(f"DiT got latents of {h} x {w} x {C}; give {needed}")
        rope = build_rope if torch.compiler.is_compiling() else cached_rope
        rope_s, rope_t = rope(self.config, first, T, h, w, z.device)
        *modulations, last = modulations
        x = self.x_proj(z.flatten(0, 1).movedim(-1, 1).to(self.x_proj.weight.dtype))
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, T))  # (B, T, N, D)
        for i, layer in enumerate(self.blocks):
            x = layer["s_block"](x, modulations[2 * i], rope_s, attend_space)
            x = layer["t_block"](x, modulations[2 * i + 1], rope_t, functools.partial(attend, i))
        head = self.head_final_layer if self.config.wide_head else self.final_layer
        if self.config.wide_head:
            x = self.s_projector(F.silu(x + last))  # (B, T, N, head_dim)
            last = head["adaLN_modulation"](x.mean(2, keepdim=True))
        x = head["linear"](x, *last.chunk(2, -1), prologue=modulate)  # (B, T, N, p*p*C)
        x = x.unflatten(-1, (p, p, C)).unflatten(2, (h // p, w // p))
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(z.shape).to(z.dtype)

    # -- frame by frame: encode what is known, denoise the next at every noise level, encode it too
    @torch.no_grad()
    def encode_context(
        self, z: Tensor, tau: Tensor, actions: Tensor, cache: ContextCache | None = None
    ) -> ContextCache:
        """Add the keys and values of known frames, T < max_frames, to a cache; None: to a new one.

        A full cache gives up its oldest frame, which the keys of the others still have seen.
        """
        T, window = z.shape[1], self.config.max_frames
        if T >= window:
            raise InputError(f"a window of {window} holds {window - 1} known frames, not {T}")
        cache = cache or ContextCache(window, 0, 0, {})
        modulations = self.modulations(tau, actions) if T else []
        alone = z.device.type == "cpu" or cache.length  # one at a time fits a CPU's caches
        step, room = 1 if alone else window, window - 1
        for t in range(0, T, step):
            part, new = slice(t, t + step), min(step, T - t)
            seen = min(cache.length + new, room)
            attend = self._attend(cache, cache.position % room, seen)
            self._run(z[:, part], [m[:, part] for m in modulations], cache.position, attend)
            cache.length, cache.position = seen, cache.position + new
        return cache

    @torch.no_grad()
    def denoise(self, z: Tensor, modulations: list[Tensor], cache: ContextCache) -> Tensor:
        """Predict v of the frame (B, 1, h, w, C) after the cached ones; they stay as they are.

        modulations  `modulations(tau, actions)` of this frame (T = 1) at this noise level
        """
        attend = self._attend(cache, cache.length, cache.length + 1)
        return self._run(z, modulations, cache.position, attend)

    def _attend(self, cache: ContextCache, slot: int, seen: int) -> Callable:
        """Give the attention of frames that go to `slot` of the cache and see its first `seen`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer not in cache.kv:
                cache.kv[layer] = k.new_empty(2, len(k), cache.window, *k.shape[2:])
            keys, values = cache.kv[layer].unbind(0)
            new = slice(slot, slot + k.shape[1])
            keys[:, new], values[:, new] = k, v
            return ATTEND[self.config.temporal_mode](q, keys[:, :seen], values[:, :seen])

        return attend


def released_state(content: object, where: str) -> dict[str, Tensor]:
    """Find the one state dict of a released file: `ema`, else `model`, else the file itself."""
    boxes = content if isinstance(content, dict) else {}
    box = next((name for name in ("ema", "model") if boxes.get(name) is not None), None)
    if box and any("x_proj.weight" in name for name in content):
        raise InputError(f"{where}: has weights both inside and beside {box!r}; keep one set")
    content = content[box] if box else content
    values = content.values() if isinstance(content, dict) else [None]
    if not all(torch.is_tensor(x) and x.is_floating_point() for x in values):
        raise InputError(f"{where}: no state dict, bare or in 'ema' or 'model'; give a DiT file")
    state = data.strip_prefixes(content)
    if len(state) != len(content):
        raise InputError(f"{where}: tensors occur with and without a prefix; keep one set")
    return state


def load_dit(path: str | Path, **overrides: Any) -> DiT:
    """Load our `world_model.safetensors` or a released `.pt`, exactly or not at all, in eval mode.

    overrides  config fields that released weights do not show: temporal_mode, num_views, view_rope,
               max_frames, action_dropout; heads if not of dim 64 (72 at width 1152)
    Raises InputError for anything missing, left over, ambiguous or contradictory.
    """
    with data.reading(path, "copy it again", *data.PARSE_ERRORS):
        return dit_from(*data.load_weights(path), str(path), **overrides)


def dit_from(state: Any, metadata: dict, where: str, **overrides: Any) -> DiT:
    """Make the DiT of a file that was read; see `load_dit`."""
    if "dit_config" in metadata:
        given = metadata["dit_config"]
        state = {name[4:]: x for name, x in state.items() if name.startswith("dit.")}
    else:
        state = released_state(state, where)
        names = "x_proj.weight", "action_embedder.weight"
        try:
            (dim, channels, patch_size, _), (_, action_dim) = (state[name].shape for name in names)
        except (KeyError, ValueError):
            raise InputError(f"{where}: has no {' and '.join(names)} of a DiT") from None
        layers = {match[0] for name in state if (match := re.match(r"blocks\.\d+\.", name))}
        wide = state.get("s_projector.weight")
        given = dict(in_channels=channels, patch_size=patch_size, dim=dim, depth=len(layers))
        given |= dict(action_dim=action_dim, wide_head=wide is not None)
        given |= {} if wide is None else dict(head_dim=len(wide))
    for name in given.keys() & overrides.keys():
        if given[name] != overrides[name]:
            raise InputError(f"{where}: {name} is {given[name]!r}, not {overrides[name]!r}")
    given = given | overrides
    if "heads" not in given:
        if given["dim"] % 64:
            raise InputError(f"{where}: width {given['dim']} does not tell the heads; give heads")
        given["heads"] = 16 if given["dim"] == 1152 else given["dim"] // 64
    return data.rebuild(lambda **values: DiT(DiTConfig(**values)), given, state, where)


if __name__ == "__main__":
    print("parameters (M) and GFLOP a frame: forward, 16 x 16 patches, T = 10, 2 per multiply-add")
    columns = (16, 2, False), (96, 1, False), (96, 1, True), (1024, 1, True), (1152, 1, True)
    for (C, p, wide), (size, shape) in itertools.product(columns, DIT_SIZES.items()):
        costs = []
        for depth in (1, 2):  # every further layer adds the same
            with torch.device("meta"), FlopCounterMode(display=False) as flops:
                dit = DiT(DiTConfig(C, p, wide_head=wide, **shape | {"depth": depth})).eval()
                dit(*(torch.empty(1, 10, *s) for s in ((16 * p, 16 * p, C), (), (10,))))
            parameters = sum(x.numel() for x in dit.parameters())
            costs.append((parameters / 1e6, flops.get_total_flops() / 1e10))
        M, G = (a + (shape["depth"] - 1) * (b - a) for a, b in zip(*costs, strict=True))
        print(f"DiT-{size:2} C={C:4} p={p} {'wide' if wide else '    '} {M:9.3f} {G:7.1f}")
    print("the paper's DiT-L: 316.5 (C=96), 318.7 (C=1024 wide), 318.8 (C=1152 wide)")
