"""Assemble frozen encoder, frozen adapter, causal DiT and decoder into a model one can step.

    frames --encoder--> features --adapter--> z --+
                                                  DiT + sampler --> next z --decoder--> frames
    actions --------------------------------------+

B batch, V views, T frames, k new ones, H W pixels, h w latent grid, C channels, A action width
    frames   (B, T, H, W, 3), with several views (B, V, T, H, W, 3)   floats in [0, 1] or uint8
    z        (B, T, h, V w, C)   latents of the views side by side along the width
    actions  (B, T, A)           action[t] stands beside frame t and drives it to frame t + 1
B may be left out: what comes back then has none either.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

import data
from adapter import Adapter, PixelDecoder, adapter_from, load_adapter, pack
from data import InputError
from diffusion import Objective, draw, objective_from, time_shift
from dit import ContextCache, DiT, dit_from, merge_views, split_views
from encoders import BaseAutoencoder, EncoderConfig, create_autoencoder

Array = Tensor | np.ndarray
Cost = Callable[[Tensor], Tensor]  # candidates (N, k, A) -> (N,)
Plan = tuple[Tensor, Tensor]  # the best actions seen (k, A) and their cost


class LatentSpace(nn.Module):
    """Map frames to the latents a DiT predicts, and back: encoder, adapter, scale, all frozen.

    mean, std  (C,)   z = (latent - mean) / std; None: latents as they are
    """

    def __init__(
        self,
        encoder: BaseAutoencoder,
        adapter: Adapter | None = None,
        pixel_decoder: PixelDecoder | None = None,
        num_views: int = 1,
    ):
        super().__init__()
        self.encoder, self.adapter, self.pixel_decoder = encoder, adapter, pixel_decoder
        self.num_views, self.temporal_stride = num_views, encoder.temporal_stride
        self.latent_dim = (adapter or encoder).latent_dim
        self.has_decoder = pixel_decoder is not None or encoder.has_decoder
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self.eval().requires_grad_(False)

    def encode_unscaled(self, frames: Tensor) -> Tensor:
        """Give the unscaled latents of each view: (..., T, H, W, 3) -> (..., T', h, w, C)."""
        z = self.encoder.encode(frames)
        return self.adapter.encode(z).float() if self.adapter else z

    def scale(self, features: Tensor) -> Tensor:
        """Turn `features`, fresh or cached, into z: (B, [V,] T', h, w, C) -> (B, T', h, V w, C)."""
        z = features.float()  # of the cache: bfloat16
        z = z if self.mean is None else (z - self.mean) / self.std
        return merge_views(z) if self.num_views > 1 else z

    def unscale(self, z: Tensor) -> Tensor:
        """Undo `scale`: (B, T', h, V w, C) -> (B, [V,] T', h, w, C)."""
        z = split_views(z, self.num_views) if self.num_views > 1 else z
        return z if self.mean is None else z * self.std + self.mean

    def encode(self, frames: Tensor) -> Tensor:
        """Encode clips: (B, [V,] T, H, W, 3) -> (B, T', h, V w, C), float32."""
        return self.scale(self.encode_unscaled(frames))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents: (B, T', h, V w, C) -> (B, [V,] T, H, W, 3), float32 in [0, 1]."""
        z = self.unscale(z)
        if self.pixel_decoder:
            return self.pixel_decoder(z).float().clamp(0, 1)
        return self.encoder.decode(self.adapter.decode(z) if self.adapter else z)

    def decode_new(self, z: Tensor, n: int) -> Tensor:
        """Decode what follows the first n latents; a decoder of frame pairs sees the one before."""
        s, lead = self.temporal_stride, int(self.temporal_stride > 1)
        return self.decode(z[:, n - lead :])[..., lead * s :, :, :, :]

    def group_actions(self, actions: Tensor) -> Tensor:
        """Put the actions of a latent's frames side by side: (B, T, A) -> (B, T', stride A)."""
        return actions.unflatten(1, (-1, self.temporal_stride)).flatten(2)

    @property
    def fingerprint(self) -> str:
        """Name encoder, weights, options and adapter: equal names mean equal `features`."""
        if self.adapter is None:
            return self.encoder.fingerprint
        digest = hashlib.sha256()
        for name, tensor in self.adapter.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"{self.encoder.fingerprint}-adapter-{digest.hexdigest()[:16]}"


def build_latent_space(
    config: EncoderConfig, adapter_path: str | None = None, num_views: int = 1
) -> LatentSpace:
    """Create the encoder and, if a file is given, the adapter, which must belong to the encoder."""
    encoder = create_autoencoder(config)
    parts = load_adapter(adapter_path, encoder.fingerprint) if adapter_path else ()
    return LatentSpace(encoder, *parts, num_views=num_views)


Model = tuple[DiT, Objective, LatentSpace]  # all that it takes to dream


def dream(model: Model, z: Tensor, actions: Tensor, n: int, seeds: Iterable[int]) -> Tensor:
    """Replace all but the first n latents of clips by a rollout; a clip's seed fixes its noise.

    z (B, at least n, h, w, C), actions (B, T, A), B seeds  ->  (B, T', h, w, C)
    """
    dit, objective, space = model
    beside = space.group_actions(actions)
    shape = (beside.shape[1] - n, *z.shape[2:])
    draws = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=g) for g in draws]).to(z.device)
    return objective.rollout(dit, z[:, :n], beside, shape[0], noise=noise)


def default_shift(encoder_type: str, tokens: int, channels: int) -> float:
    """Give the time shift for latents of so many tokens a frame; none for `vae`  [2605.06388]."""
    return 1.0 if encoder_type == "vae" else time_shift(tokens, channels)


# -- Planning: entries `dims` of `start` (k, A) are searched in [-LIMIT, LIMIT], the others stay.

SEARCHED = range(7)  # position, rotation, gripper; the base does not move
DIVERGED = "the model dreams NaN or infinity: its weights have diverged; take an earlier file"
LIMIT = 2.0  # of every number of an action, in model units [code of 2605.06388]


def replace_dims(start: Tensor, dims: Sequence[int], values: Tensor) -> Tensor:
    """Copy `start` (k, A) with its entries `dims` set to values (N, k, len(dims)): (N, k, A)."""
    index = torch.tensor(list(dims), device=start.device)
    return start.expand(len(values), -1, -1).index_copy(2, index, values)


def cheapest(costs: Tensor, candidates: Tensor) -> Plan:
    """Choose among candidates (N, ...) by their costs (N,); a model that has diverged has none."""
    best = costs.nan_to_num(torch.inf, torch.inf).argmin()
    if not costs[best].isfinite():
        raise InputError(DIVERGED)
    return candidates[best], costs[best]


def plan_cem(
    cost: Cost,
    start: Tensor,
    dims: Sequence[int] = SEARCHED,
    population: int = 400,
    elites: int = 50,
    iterations: int = 5,
    generator: Generator | None = None,
) -> Plan:
    """Fit a Gaussian to the best candidates again and again (cross-entropy)  [2605.06388]."""
    if not 2 <= elites <= population or iterations < 1:
        raise InputError(f"CEM: {elites} elites of {population}; keep 2 or more in 1 turn or more")
    mean, std, tried = start[:, list(dims)], LIMIT / 2, []  # a quarter of the range
    for _ in range(iterations):
        eps = draw(torch.randn, (population, *mean.shape), start, generator)
        values = (mean + std * eps).clamp(-LIMIT, LIMIT)
        costs, order = cost(replace_dims(start, dims, values)).sort()
        elite = values[order[:elites]]
        tried.append((costs[0], elite[:1]))
        mean, std = elite.mean(0), elite.std(0).clamp_min(1e-4)
    best, best_cost = cheapest(*map(torch.stack, zip(*tried, strict=True)))
    return replace_dims(start, dims, best)[0], best_cost


def plan_gradient(
    cost: Cost, start: Tensor, dims: Sequence[int] = SEARCHED, steps: int = 50, lr: float = 0.01
) -> Plan:
    """Descend the cost's gradient with Adam."""
    free, tried = start[None, :, list(dims)].clone().requires_grad_(True), []
    adam = torch.optim.Adam([free], lr=lr)
    for _ in range(steps + 1):
        with torch.enable_grad():
            actions = replace_dims(start, dims, free.clamp(-LIMIT, LIMIT))
            value = cost(actions)[0]
            (free.grad,) = torch.autograd.grad(value, free)
        tried.append((value.detach(), actions[0].detach()))
        adam.step()
    return cheapest(*map(torch.stack, zip(*tried, strict=True)))


def plan_grid(cost: Cost, start: Tensor, dims: Sequence[int] = range(3), points: int = 5) -> Plan:
    """Try every combination of evenly spaced values, at most 100,000."""
    free = len(dims) * len(start)
    if points**free > 100_000:
        count = f"{points} points for {free} numbers are {points**free} candidates, over 100000"
        raise InputError(f"grid: {count}; take fewer numbers or points, or CEM")
    grid = torch.cartesian_prod(*[torch.linspace(-LIMIT, LIMIT, points)] * free).to(start)
    candidates = replace_dims(start, dims, grid.view(-1, len(start), len(dims)))
    return cheapest(cost(candidates), candidates)


PLANNERS = {"cem": plan_cem, "gradient": plan_gradient, "grid": plan_grid}
DETERMINISTIC = "gradient", "grid"  # the others draw, from a generator


def candidate_cost(
    model: Callable,
    objective: Objective,
    z_context: Tensor,
    past: Tensor,
    z_target: Tensor,
    noise: Tensor,
    last_action: Tensor | None = None,
) -> Cost:
    """Make the cost of k candidate actions: squared distance of the dreamed latents to a target.

    The first action goes beside the last context frame, the others beside the first k - 1 dreamed
    frames. Candidates share the noise and the cached context: 11 k frame passes each at 10 steps.

    z_context, past  (n, h, w, C), (n - 1, A)   the newest max_frames - k latents are used
    z_target          (k or 1, h, w, C)          for every dreamed frame, or for the last
    noise             (k, h, w, C)
    last_action       (A,)   beside the last dreamed frame; None: the candidate's last
    """
    k, cached = len(noise), hasattr(model, "encode_context")
    window = model.config.max_frames if hasattr(model, "config") else len(z_context) + k
    if (n := min(len(z_context), window - k)) < 1:
        raise InputError(f"horizon {k}: the model sees {window} frames in all")
    z_context, past = z_context[-n:], past[len(past) + 1 - n :]
    shared = objective.encode_context(model, z_context[None, :-1], past[None]) if cached else None

    def distance(a: Tensor) -> Tensor:  # (N, n + k, A) -> (N,)
        net, cache = model, shared and shared.repeat(len(a), room=k + 1)
        if a.requires_grad or not cached:  # autograd cannot pass through a cache: hide it
            net, cache = functools.partial(model), None
        z, eps = (x.expand(len(a), *x.shape) for x in (z_context, noise))
        z, _ = objective.extend(net, z, a, eps, cache=cache)
        return (z[:, -len(z_target) :] - z_target).square().mean((1, 2, 3, 4))

    def cost(candidates: Tensor) -> Tensor:
        N, last = len(candidates), candidates[:, -1:]
        last = last if last_action is None else last_action.expand(N, 1, -1)
        a = torch.cat((past.expand(N, *past.shape), candidates, last), 1)
        with torch.set_grad_enabled(candidates.requires_grad):
            return torch.cat([distance(part) for part in a.split(32)])

    return cost


# -- The one file of a trained model, and the model.

CLIP_FORMAT = {name: (int,) for name in ("image_size", "stride", "num_history")}
CLIP_FORMAT |= {"action_merge": (str,), "action_mapping": (str,), "fps": (int, float)}
SCALE = "latent.mean", "latent.std"  # tensors of a model that was trained with `standardize`


def save_world_model(
    path: str | Path, dit: DiT, objective: Objective, space: LatentSpace, clip_format: dict
) -> None:
    """Write the one file that `WorldModel` needs besides public encoder weights.

    clip_format  what CLIP_FORMAT names, as in training
    """
    encoder = space.encoder
    tensors, metadata = pack(dit=dit, adapter=space.adapter, pixel_decoder=space.pixel_decoder)
    tensors |= {} if space.mean is None else dict(zip(SCALE, (space.mean, space.std), strict=True))
    metadata |= {"objective": objective.to_dict(), "data": clip_format}
    metadata |= {"encoder_config": dataclasses.asdict(encoder.config)}
    metadata |= {"encoder_fingerprint": encoder.fingerprint, "input_dim": encoder.latent_dim}
    data.save_tensors(path, tensors, metadata)


def scale_from(tensors: dict, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Take the mean and deviation (C,) of latents out of a file's tensors, if they are there."""
    found = [tensors[name] for name in SCALE if name in tensors]
    if found and [x.shape for x in found] != 2 * [(channels,)]:
        raise ValueError(f"{' and '.join(SCALE)} do not fit {channels} channels")
    return tuple(found or (None, None))


def load_world_model(
    path: str | Path, encoder_weights: str | None = None, decoder_weights: str | None = None
) -> tuple[DiT, Objective, LatentSpace, dict]:
    """Read what `save_world_model` wrote: (dit, objective, space, clip_format)."""
    where = str(path)
    tensors, metadata = data.load_tensors(where)
    stored = "objective data input_dim encoder_fingerprint encoder_config dit_config adapter_config"
    if not {*stored.split(), "pixel_decoder_config"} <= metadata.keys():
        raise InputError(f"{where}: is not a world model; give world_model.safetensors of a run")
    paths = {"weights": encoder_weights, "decoder_weights": decoder_weights}
    with data.reading(where, "copy it again", *data.PARSE_ERRORS):
        values = metadata["encoder_config"] | {name: path for name, path in paths.items() if path}
        config, clip_format = data.config_from(EncoderConfig, values, where), metadata["data"]
        objective = objective_from(metadata["objective"], where)
        given = [(clip_format[name], kinds) for name, kinds in CLIP_FORMAT.items()]
        if not all(type(x) in kinds and (kinds == (str,) or x > 0) for x, kinds in given):
            raise ValueError(f"clips are {clip_format}")
    encoder = create_autoencoder(config)
    if encoder.fingerprint != (trained := metadata["encoder_fingerprint"]):
        found = f"was trained on encoder {trained}, here is {encoder.fingerprint}"
        raise InputError(f"{where}: {found}; point encoder_weights at the weights of its training")
    with data.reading(where, "copy it again", RuntimeError, *data.PARSE_ERRORS):
        dit, parts = dit_from(tensors, metadata, where), adapter_from(tensors, metadata, where)
        space = LatentSpace(encoder, *parts, num_views=dit.config.num_views)
        space.mean, space.std = scale_from(tensors, space.latent_dim)
    return dit, objective, space, clip_format


def load_pretrained(path: str | Path, flags: dict[str, Any]) -> DiT:
    """Read the DiT to start from; a file that says it was trained with other flags is refused.

    flags  temporal_mode, view_rope, objective (a name), standardize; released files tell none
    """
    tensors, metadata = data.load_weights(where := str(path))
    with data.reading(where, "copy it again", *data.PARSE_ERRORS):
        dit = dit_from(tensors, metadata, where)
    if "objective" not in metadata:
        return dit
    names = ["temporal_mode", *["view_rope"] * (dit.config.num_views > 1)]
    trained = {name: getattr(dit.config, name) for name in names}
    trained["objective"] = objective_from(metadata["objective"], where).to_dict()["name"]
    trained["standardize"] = bool(tensors.keys() & {*SCALE})
    for name, value in trained.items():
        if value != flags[name]:
            raise InputError(f"{where}: was trained with {name} {value}; give --{name} {value}")
    return dit


class WorldModel:
    """Dream robot video, one action at a time.

        model = WorldModel("outputs/run/world_model.safetensors")
        model.reset(frames[:2], actions[:1])
        new = model.generate_chunk(actions[1:])

    checkpoint_path   that file, or its parts as `load_world_model` gives them
    device            default: CUDA, else Apple's MPS, else the CPU
    encoder_weights   and decoder_weights: where the public encoder lies here, if not where it lay
    guidance          and context: see `Objective.extend`
    **draws           noise (B, k, h, V w, C), which fixes every draw, or a seeded `generator`
    """

    def __init__(
        self,
        checkpoint_path: str | Path | tuple,
        device: str | torch.device | None = None,
        encoder_weights: str | None = None,
        decoder_weights: str | None = None,
        guidance: float = 1.0,
        context: str = "exact",
    ):
        if not isinstance(parts := checkpoint_path, tuple):
            parts = load_world_model(checkpoint_path, encoder_weights, decoder_weights)
        self.dit, self.objective, self.space, self.clip_format = parts
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        config, C = self.dit.config, self.space.latent_dim
        if config.in_channels != C:
            channels = f"the DiT predicts {config.in_channels} channels, the latents have {C}"
            raise InputError(f"{channels}; choose the encoder and adapter of its training")
        self.device = data.open_device(device or "cpu")
        self.sampler = {"guidance": guidance, "context": context}
        self.dit.eval().requires_grad_(False).to(self.device)
        self.space.to(self.device)
        self.action_dim = config.action_dim // self.space.temporal_stride
        self.z: Tensor | None = None  # (B, n, h, V w, C) known latents, at most a window of them
        self.actions: Tensor | None = None  # (B, frames of z, A) the newest slot is still open
        self.cache: ContextCache | None = None  # keys and values of all but the newest of z
        self.batched = False

    def state(self) -> tuple:
        """Copy all that `reset` and later steps have built, so that a planner can branch."""
        return copy.deepcopy((self.z, self.actions, self.cache, self.batched))

    def restore(self, state: tuple) -> None:
        """Go back to what `state` returned."""
        self.z, self.actions, self.cache, self.batched = copy.deepcopy(state)

    def encode(self, frames: Array) -> Tensor:
        """Encode frames ([B,] [V,] T, H, W, 3) to latents ([B,] T', h, V w, C)."""
        frames, V, s = torch.as_tensor(frames), self.space.num_views, self.space.temporal_stride
        size, shape, views = self.clip_format["image_size"], tuple(frames.shape), (V,) * (V > 1)
        batched, T = len(shape) == 5 + len(views), shape[-4] if len(shape) > 3 else 0
        if not T or T % s or shape[batched:] != (*views, T, size, size, 3):
            layout = f"([B,] {f'{V} views, ' * len(views)}T, {size}, {size}, 3)"
            packs = f" with T a multiple of {s}" * (s > 1)
            raise InputError(f"frames are {shape}; give this model {layout}{packs}, RGB last")
        frames = frames if frames.dtype == torch.uint8 else frames.float()  # MPS has no float64
        z = self.space.encode((frames if batched else frames[None]).to(self.device))
        return z if batched else z[0]

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents ([B,] T', h, V w, C) to frames ([B,] [V,] T, H, W, 3) in [0, 1]."""
        z = torch.as_tensor(z).to(self.device)
        return self.space.decode(z) if z.ndim == 5 else self.space.decode(z[None])[0]

    def map_actions(self, raw: Array) -> Tensor:
        """Turn raw robot actions (..., 7), in units of the data set, into model units (..., A)."""
        return torch.as_tensor(data.map_actions(raw, self.clip_format["action_mapping"]))

    def _batched(self, actions: Array) -> Tensor:
        """Shape actions for the known samples: (B, k, A)."""
        if self.z is None:
            raise InputError("the world model knows no frame yet; call reset(frames) first")
        return self._shape_actions(actions, len(self.z), self.batched)

    def _shape_actions(self, actions: Array, B: int, batched: bool) -> Tensor:
        """Give actions batch and time axes: (B, k, A), float32 on the model's device."""
        try:
            given = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"actions are no array of numbers ({error})") from error
        actions = given[None] if given.ndim == 1 else given
        if actions.ndim == 2:
            actions = actions[:, None] if batched else actions[None]
        A = self.action_dim
        if actions.ndim != 3 or actions.shape[::2] != (B, A) or not actions.shape[1]:
            takes = f"([{B},] k, {A}), a robot's own numbers through map_actions (--raw true)"
            raise InputError(f"actions are {tuple(given.shape)}; this model takes {takes}")
        if not actions.isfinite().all():
            raise InputError("actions hold NaN or infinity; mend them before the rollout")
        return actions

    def reset(self, frames: Array, actions: Array | None = None) -> Tensor:
        """Start from n known frames, oldest first, and the n - 1 actions between; None: zeros.

        -> the frames as floats, on the model's device
        """
        frames = data.to_floats(frames).to(self.device)
        z = self.encode(frames)
        z, batched = (z, True) if z.ndim == 5 else (z[None], False)
        n = z.shape[1] * self.space.temporal_stride
        beside = z.new_zeros(len(z), n, self.action_dim)
        if actions is not None and (n > 1 or torch.as_tensor(actions).numel()):
            known = self._shape_actions(actions, len(z), batched)
            if known.shape[1] != n - 1:
                raise InputError(f"{known.shape[1]} actions for {n} frames; give {n - 1}")
            beside[:, :-1] = known
        self.z, self.actions, self.cache, self.batched = z, beside, None, batched
        return frames

    @torch.no_grad()
    def generate_chunk(
        self,
        actions: Array,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        last: Array | None = None,
    ) -> Tensor:
        """Dream one frame for each action: a[0] goes beside the newest known frame.

        Beside the last new frame stands `last`, one action, else a copy of a[-1], until the next
        call overwrites its slot.
        actions  (A,), (k, A) or (B, k, A); of a batch also (B, A)   ->  ([B,] [V,] k, H, W, 3)
        """
        actions, s, (B, n, *cell) = self._batched(actions), self.space.temporal_stride, self.z.shape
        if (k := actions.shape[1]) % s:
            raise InputError(f"{k} frames to dream: a latent holds {s}; ask for a multiple")
        if noise is None:
            noise = draw(torch.randn, (B, k // s, *cell), self.z, generator)
        last = actions[:, -1:] if last is None else self._batched(last)
        actions = torch.cat((self.actions[:, :-1], actions, last), 1)  # (B, s n + k, A)
        beside, keep = self.space.group_actions(actions), self.dit.config.max_frames
        known = self.dit, self.z, beside, torch.as_tensor(noise).to(self.z)
        z, self.cache = self.objective.extend(*known, cache=self.cache, **self.sampler)
        if not z.isfinite().all():
            self.cache = None  # it has gone ahead of z
            raise InputError(DIVERGED)
        self.z, self.actions = z[:, -keep:], actions[:, -keep * s :]
        frames = self.space.decode_new(z, n)
        return frames if self.batched else frames[0]

    def step(self, action: Array, **draws: Any) -> Tensor:
        """Dream the next frame: action (A,) or (B, A) -> ([B,] [V,] H, W, 3)."""
        return self.generate_chunk(action, **draws).select(-4, 0)

    def rollout(self, frames: Array, actions: Array, **draws: Any) -> Tensor:
        """Dream a recorded clip on from its first n frames, with an action beside every frame.

        actions ([B,] T, A), T > n  ->  the n frames as given, then T - n new ones
        """
        known, actions = self.reset(frames), self._batched(actions)
        n = self.actions.shape[1]
        if actions.shape[1] <= n:
            raise InputError(f"{actions.shape[1]} actions for {n} known frames; give more")
        self.actions = actions[:, :n]
        new = self.generate_chunk(actions[:, n - 1 : -1], last=actions[:, -1:], **draws)
        return torch.cat((known, new), -4)

    def rollout_policy(
        self,
        policy: Callable[[Tensor], Array],
        initial_frames: Array,
        steps: int,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let a policy act inside the model.

        policy  newest frame ([B,] [V,] H, W, 3) -> actions (A,), (k, A), (B, A) or (B, k, A)
        ->      frames ([B,] [V,] n + steps, H, W, 3), actions ([B,] steps, A)
        """
        if steps < 1:
            raise InputError(f"steps is {steps}; let the policy act at least once")
        video, taken = [self.reset(initial_frames)], []
        while (left := steps - sum(a.shape[1] for a in taken)) > 0:
            taken.append(self._batched(policy(video[-1].select(-4, -1)))[:, :left])
            video.append(self.generate_chunk(taken[-1], generator=generator))
        actions = torch.cat(taken, 1)
        return torch.cat(video, -4), actions if self.batched else actions[0]

    def plan(
        self,
        goal_frame: Array,
        horizon: int,
        method: str = "cem",
        start: Array | None = None,
        generator: Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Search the actions (horizon, A) that lead from the newest known frame to a goal frame.

        goal_frame  ([V,] H, W, 3)   method  cem | gradient | grid, which take the `options`
        start       (horizon, A)     where the search begins; None: zeros
        """
        if method not in PLANNERS or horizon < 1:
            raise InputError(f"plan: method is one of {', '.join(PLANNERS)}, horizon at least 1")
        if self.z is None or len(self.z) != 1 or self.space.temporal_stride != 1:
            raise InputError("plan: reset to one sample first; encoders must not pack two frames")
        z_goal = self.encode(torch.as_tensor(goal_frame).unsqueeze(-4))
        noise = draw(torch.randn, (horizon, *z_goal.shape[1:]), z_goal, generator)
        parts = self.dit, self.objective, self.z[0], self.actions[0, :-1], z_goal, noise
        start = torch.zeros(horizon, self.action_dim) if start is None else torch.as_tensor(start)
        options = options if method in DETERMINISTIC else {"generator": generator} | options
        return PLANNERS[method](candidate_cost(*parts), start.to(self.z), **options)[0]


@dataclasses.dataclass
class Args:
    """Dream from one image and write a GIF: actions from a file, or typed one a line."""

    checkpoint: str  # world_model.safetensors of a run
    image: str  # start frame; several views side by side
    actions: str | None = None  # .npy, or text with one action a line; none: typed
    raw: bool = True  # actions are the robot's own numbers, 7 to 10; false: model units
    output: str = "dream.gif"  # the GIF
    encoder_weights: str | None = None  # the public encoder, if not where training found it
    seed: int = 0  # of the noise
    device: str | None = None  # default: cuda, mps or cpu, whichever is there


def read_actions(path: str | None) -> np.ndarray:
    """Read actions (k, A), one a line: from .npy or text, or typed up to an empty line."""
    try:
        if path is None:
            print("one action a line, numbers separated by spaces; end with an empty line")
            lines = [*iter(lambda: sys.stdin.readline().strip(), "")]
        elif path.endswith(".npy"):
            found = np.atleast_2d(np.load(path)).astype(float)
            if found.ndim > 2:
                raise ValueError(f"an array {found.shape}")
            return found
        else:
            lines = [line.partition("#")[0] for line in Path(path).read_text().splitlines()]
        numbers = [line.replace(",", " ") for line in lines if line.strip()]
        if not numbers:
            raise ValueError("no action")
        return np.loadtxt(numbers, ndmin=2)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise InputError(f"{path or 'typed'}: {error}; give .npy, or one action a line") from error


def main() -> None:
    args = data.parse_args(Args)
    model = WorldModel(args.checkpoint, args.device, args.encoder_weights)
    with data.reading(args.image, remedy := "give another picture", OSError):
        picture = data.decode_frame(Path(args.image).read_bytes(), None, args.image, remedy)
    size, V = model.clip_format["image_size"], model.space.num_views
    if picture.shape[1] % V:
        raise InputError(f"{args.image}: {picture.shape[1]} pixels wide; give {V} equal views")
    views = [data.decode_frame(x, size, args.image, remedy) for x in np.split(picture, V, 1)]
    still = np.stack([np.stack(views)] * model.space.temporal_stride, 1)  # (V, T, H, W, 3)
    actions = read_actions(args.actions)
    actions = model.map_actions(actions) if args.raw else actions
    random = torch.Generator().manual_seed(args.seed)
    known = model.reset(still if V > 1 else still[0])
    video = torch.cat((known, model.generate_chunk(actions, generator=random)), -4)
    video = torch.cat(video.unbind(), -2) if V > 1 else video  # views side by side
    data.write_gif(args.output, video, model.clip_format["fps"])
    print(f"wrote {args.output}")


if __name__ == "__main__":
    data.run_cli(main)
