"""Assemble frozen encoder, frozen adapter, causal DiT and decoder into a model one can step.

    frames --encoder--> features --adapter--> z --+
                                                  DiT + sampler --> next z --decoder--> frames
    actions --------------------------------------+

Shapes: B batch, V views, T frames, H W pixels, h w latent grid, C latent channels, A action width.
    frames   (B, T, H, W, 3), with several views (B, V, T, H, W, 3)   floats in [0, 1] or uint8
    z        (B, T, h, V w, C)   latents of the views side by side along the width
    actions  (B, T, A)           action[t] stands beside frame t and drives it to frame t + 1
B may be left out: what comes back then has none either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapter import load_adapter
from data import (
    InputError,
    MissingFileError,
    config_from,
    decode_frame,
    load_tensors,
    map_actions,
    parse_args,
    run_cli,
    save_tensors,
    write_gif,
)
from diffusion import Objective, objective_from
from dit import DiT, load_dit, merge_views, split_views
from encoders import EncoderConfig, create_autoencoder


class LatentSpace(nn.Module):
    """Map frames to the latents a DiT predicts, and back: encoder, adapter, scale, all frozen.

    mean, std  (C,)   z = (latent - mean) / std; None: latents as they are
    """

    def __init__(
        self,
        encoder: nn.Module,
        adapter: nn.Module | None = None,
        pixel_decoder: nn.Module | None = None,
        num_views: int = 1,
    ):
        super().__init__()
        self.encoder, self.adapter, self.pixel_decoder = encoder, adapter, pixel_decoder
        self.num_views = num_views
        self.latent_dim = adapter.latent_dim if adapter else encoder.latent_dim
        self.temporal_stride = encoder.temporal_stride
        self.has_decoder = pixel_decoder is not None or encoder.has_decoder
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """Give the unscaled latents of each view: (..., T, H, W, 3) -> (..., T', h, w, C)."""
        z = self.encoder.encode(frames)
        if self.adapter is None:
            return z
        return self.adapter.encode(z.flatten(0, -5)).float().view(*z.shape[:-1], -1)

    def finish(self, features: Tensor) -> Tensor:
        """Turn `features`, fresh or cached, into z: (B, [V,] T', h, w, C) -> (B, T', h, V w, C)."""
        z = features if self.mean is None else (features - self.mean) / self.std
        return merge_views(z) if self.num_views > 1 else z

    def encode(self, frames: Tensor) -> Tensor:
        """Encode clips: (B, [V,] T, H, W, 3) -> (B, T', h, V w, C), float32."""
        return self.finish(self.features(frames))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents: (B, T', h, V w, C) -> (B, [V,] T, H, W, 3), float32 in [0, 1].

        Raises InputError when neither the encoder nor the adapter file has a decoder.
        """
        B, V = len(z), self.num_views
        z = split_views(z, V).flatten(0, 1) if V > 1 else z
        z = z if self.mean is None else z * self.std + self.mean
        if self.pixel_decoder is not None:
            frames = self.pixel_decoder(z).float().clamp(0, 1)
        else:
            frames = self.encoder.decode(self.adapter.decode(z) if self.adapter else z)
        return frames.unflatten(0, (B, V)) if V > 1 else frames

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
    if adapter_path is None:
        return LatentSpace(encoder, num_views=num_views)
    parts = load_adapter(adapter_path, encoder.fingerprint)
    return LatentSpace(encoder, *parts, num_views=num_views)


# ------------------------------------------------------------------------------------------------
# Planning. cost maps candidates (N, k, A) to (N,); entries of `start` (k, A) outside `dims` stay as
# they are, the others stay in [-limit, limit]. All return the best actions seen (k, A), their cost.

SEARCHED = range(7)  # position, rotation, gripper; the base does not move


def plan_cem(
    cost: Callable[[Tensor], Tensor],
    start: Tensor,
    dims: Sequence[int] = SEARCHED,
    limit: float = 2.0,
    population: int = 400,
    elites: int = 50,
    iterations: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian to the best candidates again and again: cross-entropy method.

    The mean begins at `start`, the deviation at a quarter of the range  [arXiv 2605.06388, B.5]
    """
    dims, device = list(dims), generator.device if generator else start.device
    mean, std = start[:, dims], torch.full_like(start[:, dims], 2 * limit / 4)
    best, best_cost = start, start.new_tensor(float("inf"))
    for _ in range(iterations):
        eps = torch.randn((population, *mean.shape), generator=generator, device=device)
        candidates = start.repeat(population, 1, 1)
        candidates[:, :, dims] = (mean + std * eps.to(start.device)).clamp(-limit, limit)
        costs, order = cost(candidates).sort()
        elite = candidates[order[:elites]]
        mean, std = elite[:, :, dims].mean(0), elite[:, :, dims].std(0).clamp_min(1e-4)
        best = torch.where(costs[0] < best_cost, elite[0], best)
        best_cost = torch.minimum(costs[0], best_cost)
    return best, best_cost


def plan_gradient(
    cost: Callable[[Tensor], Tensor],
    start: Tensor,
    dims: Sequence[int] = SEARCHED,
    limit: float = 2.0,
    steps: int = 50,
    lr: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Descend the cost's gradient with Adam."""
    dims = list(dims)
    free = start[:, dims].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=lr)
    best, best_cost = start, start.new_tensor(float("inf"))
    for _ in range(steps + 1):
        with torch.enable_grad():
            actions = start.clone()
            actions[:, dims] = free.clamp(-limit, limit)
            value = cost(actions[None])[0]
            (free.grad,) = torch.autograd.grad(value, free)
        best = torch.where(value.detach() < best_cost, actions.detach(), best)
        best_cost = torch.minimum(value.detach(), best_cost)
        optimizer.step()
    return best, best_cost


def plan_grid(
    cost: Callable[[Tensor], Tensor],
    start: Tensor,
    dims: Sequence[int] = range(3),
    limit: float = 2.0,
    points: int = 5,
    most: int = 100_000,
) -> tuple[Tensor, Tensor]:
    """Try every combination of evenly spaced values; refuse more than `most` of them."""
    dims = list(dims)
    free = len(dims) * len(start)
    if points**free > most:
        raise InputError(
            f"a grid of {points} points over {len(dims)} entries of {len(start)} actions has "
            f"{points**free} candidates, over {most}; take fewer entries or points, or CEM"
        )
    grid = torch.cartesian_prod(*[torch.linspace(-limit, limit, points)] * free).to(start)
    candidates = start.repeat(len(grid), 1, 1)
    candidates[:, :, dims] = grid.view(len(grid), len(start), len(dims))
    costs = cost(candidates)
    return candidates[costs.argmin()], costs.min()


PLANNERS = {"cem": plan_cem, "gradient": plan_gradient, "grid": plan_grid}


def candidate_cost(
    model: Callable,
    objective: Objective,
    z_context: Tensor,
    known: Tensor,
    z_target: Tensor,
    noise: Tensor,
    last_action: Tensor | None = None,
    batch: int = 32,
) -> Callable[[Tensor], Tensor]:
    """Make the cost of k candidate actions: squared distance of the dreamed latents to a target.

    The first action goes beside the last context frame, the others beside the first k - 1 dreamed
    frames. Candidates share the noise and the cached context: 11 k frame passes each at 10 steps.

    z_context    (n, h, w, C)        known latents; the newest max_frames - k are used
    known        (n - 1, A)          the actions between them
    z_target     (k or 1, h, w, C)   for every dreamed frame, or for the last
    noise        (k, h, w, C)        gives k, the number of dreamed frames
    last_action  (A,)                beside the last dreamed frame; None: the candidate's last
    """
    k = len(noise)
    room = model.config.max_frames - k if hasattr(model, "config") else len(z_context)
    if room < 1:
        raise InputError(f"horizon {k}: the model sees {model.config.max_frames} frames in all")
    z_context = z_context[-room:]
    known = known[len(known) + 1 - len(z_context) :]
    cached = hasattr(model, "encode_context")
    shared = cached and objective.encode_context(model, z_context[None, :-1], known[None])

    def spread(x: Tensor, count: int) -> Tensor:
        return x.expand(count, *x.shape)

    def dream(a: Tensor) -> Tensor:
        if cached and not a.requires_grad:  # autograd cannot pass through a cache
            cache, z = shared.expand(len(a)), spread(z_context[-1:], len(a))
            for j in range(k):
                objective.append(model, cache, z[:, -1:], a[:, j])
                eps = spread(noise[j : j + 1], len(a))
                z = torch.cat((z, objective.next_frame(model, cache, a[:, j + 1], eps)), 1)
        else:
            z, beside = spread(z_context, len(a)), torch.cat((spread(known, len(a)), a), 1)
            for j in range(k):
                eps, acts = spread(noise[j : j + 1], len(a)), beside[:, : z.shape[1] + 1]
                z = torch.cat((z, objective.next_frame_uncached(model, z, acts, eps)), 1)
        return (z[:, -len(z_target) :] - z_target).square().mean((1, 2, 3, 4))

    def cost(candidates: Tensor) -> Tensor:
        last = candidates[:, -1] if last_action is None else spread(last_action, len(candidates))
        a = torch.cat((candidates, last[:, None]), 1)  # (N, k + 1, A)
        with torch.set_grad_enabled(candidates.requires_grad):
            return torch.cat([dream(part) for part in a.split(batch)])

    return cost


# ------------------------------------------------------------------------------------------------
# The model.


def save_world_model(
    path: str | Path, dit: DiT, objective: Objective, space: LatentSpace, data: dict
) -> None:
    """Write the one file that `WorldModel` needs besides public encoder weights.

    data  {image_size, stride, num_history, action_merge, action_mapping, fps}
    """
    metadata = {
        "objective": objective.to_dict(),
        "encoder_config": dataclasses.asdict(space.encoder.config),
        "encoder_fingerprint": space.encoder.fingerprint,
        "input_dim": space.encoder.latent_dim,
        "data": data,
    }
    tensors = {}
    parts = {"dit": dit, "adapter": space.adapter, "pixel_decoder": space.pixel_decoder}
    for part, module in parts.items():
        metadata[f"{part}_config"] = module and dataclasses.asdict(module.config)
        if module:
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    if space.mean is not None:
        tensors |= {"latent.mean": space.mean, "latent.std": space.std}
    save_tensors(path, tensors, metadata)


class WorldModel:
    """Dream robot video, one action at a time.

        model = WorldModel("outputs/run/world_model.safetensors")
        model.reset(frames[:2], actions[:1])
        new = model.generate_chunk(actions[1:])

    device                             default: CUDA, else Apple's MPS, else the CPU
    encoder_weights, decoder_weights   where the public encoder lies here, if not where it lay
    guidance, context, steps           of the sampler, see `Objective.rollout`
    Raises MissingFileError, or InputError when the file or the encoder is not the right one.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        device: str | torch.device | None = None,
        *,
        encoder_weights: str | None = None,
        decoder_weights: str | None = None,
        **sampler: Any,
    ):
        where = str(checkpoint_path)
        tensors, metadata = load_tensors(where)
        try:
            values, data = dict(metadata["encoder_config"]), dict(metadata["data"])
            objective = objective_from(metadata["objective"], where)
            fingerprint, adapted = metadata["encoder_fingerprint"], metadata["adapter_config"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{where}: is not a world model ({error}); give world_model.safetensors of a run"
            ) from error
        paths = {"weights": encoder_weights, "decoder_weights": decoder_weights}
        values |= {name: path for name, path in paths.items() if path}
        encoder = create_autoencoder(config_from(EncoderConfig, values, where))
        if encoder.fingerprint != fingerprint:
            raise InputError(
                f"{where}: was trained on encoder {fingerprint}, here is {encoder.fingerprint}; "
                "point encoder_weights at the weights it was trained with"
            )
        dit = load_dit(where)
        parts = load_adapter(where, fingerprint) if adapted else ()
        space = LatentSpace(encoder, *parts, num_views=dit.config.num_views)
        space.mean, space.std = tensors.get("latent.mean"), tensors.get("latent.std")
        self.assemble(dit, objective, space, data, device, **sampler)

    @classmethod
    def from_parts(cls, *parts: Any, **options: Any) -> WorldModel:
        """Build from the parts `assemble` takes, such as released DiT and adapter files."""
        model = cls.__new__(cls)
        model.assemble(*parts, **options)
        return model

    def assemble(
        self,
        dit: DiT,
        objective: Objective,
        space: LatentSpace,
        data: dict,
        device: str | torch.device | None = None,
        guidance: float = 1.0,
        context: str = "exact",
        steps: int | None = None,
    ) -> None:
        if device is None:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
            device = "cuda" if torch.cuda.is_available() else device
        if dit.config.in_channels != space.latent_dim:
            raise InputError(
                f"the DiT predicts {dit.config.in_channels} channels, the latents have "
                f"{space.latent_dim}; choose the encoder and adapter it was trained with"
            )
        self.device, self.data = torch.device(device), data
        self.dit = dit.eval().requires_grad_(False).to(self.device)
        self.space = space.to(self.device)
        self.objective = dataclasses.replace(objective, steps=steps or objective.steps)
        self.guidance, self.context = guidance, context
        self.action_dim = dit.config.action_dim // space.temporal_stride
        self.z: Tensor | None = None  # (B, n, h, V w, C) known latents, at most a window of them
        self.actions: Tensor | None = None  # (B, frames of z, A) the newest slot is still open
        self.batched = False

    # -- checks: a batch axis for everything, one sentence for what does not fit

    def _frames(self, frames: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        """Give frames a batch axis and the model's device: (frames, had they one already)."""
        frames, V, size = torch.as_tensor(frames), self.space.num_views, self.data["image_size"]
        axes = 5 if V == 1 else 6
        if frames.ndim not in (axes - 1, axes) or frames.shape[-1] != 3:
            layout = "([B,] T, H, W, 3)" if V == 1 else f"([B,] {V} views, T, H, W, 3)"
            raise InputError(f"frames are {tuple(frames.shape)}; give {layout}, RGB last")
        batched = frames.ndim == axes
        frames = (frames if batched else frames[None]).to(self.device)
        if V > 1 and frames.shape[1] != V:
            raise InputError(f"frames have {frames.shape[1]} views, this model {V}; give as many")
        if tuple(frames.shape[-3:-1]) != (size, size):
            raise InputError(
                f"frames are {frames.shape[-3]}x{frames.shape[-2]} pixels; this model was trained "
                f"on {size}x{size}: resize them"
            )
        if frames.shape[-4] % self.space.temporal_stride or not frames.shape[-4]:
            raise InputError(
                f"{frames.shape[-4]} frames: the encoder packs {self.space.temporal_stride} into "
                "one latent; give one such group or more"
            )
        return frames, batched

    def _actions(self, actions: Tensor | np.ndarray) -> Tensor:
        """Give actions batch and time axes: (B, K, A), float32 on the model's device."""
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        shape = tuple(actions.shape)
        if actions.ndim == 1:
            actions = actions[None]
        if actions.ndim == 2:
            actions = actions[:, None] if self.batched else actions[None]
        if actions.ndim != 3 or actions.shape[::2] != (len(self.z), self.action_dim):
            raise InputError(
                f"actions are {shape}; this model takes ([{len(self.z)},] K, {self.action_dim}), "
                "a robot's own numbers through map_actions"
            )
        if not actions.isfinite().all():
            raise InputError("actions hold NaN or infinity; mend them before the rollout")
        return actions

    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """Encode frames ([B,] [V,] T, H, W, 3) to latents ([B,] T', h, V w, C)."""
        frames, batched = self._frames(frames)
        z = self.space.encode(frames)
        return z if batched else z[0]

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents ([B,] T', h, V w, C) to frames ([B,] [V,] T, H, W, 3) in [0, 1]."""
        return self.space.decode(z) if z.ndim == 5 else self.space.decode(z[None])[0]

    def map_actions(self, raw: Tensor | np.ndarray) -> Tensor:
        """Turn raw robot actions (..., 7) into the units of training (..., A).

        xyz delta in m, rotation delta in rad, gripper: as the data set of the metadata records them
        """
        return torch.as_tensor(map_actions(np.asarray(raw), self.data["action_mapping"]))

    # -- dreaming

    def reset(
        self, frames: Tensor | np.ndarray, actions: Tensor | np.ndarray | None = None
    ) -> None:
        """Start from known frames.

        frames   ([B,] [V,] n, H, W, 3)   history, oldest first; uint8, or floats in [0, 1]
        actions  ([B,] n - 1, A)          the actions between them; None: zeros
        """
        frames, self.batched = self._frames(frames)
        n, self.z = frames.shape[-4], self.space.encode(frames)
        self.actions = self.z.new_zeros(len(frames), n, self.action_dim)
        if actions is not None and n > 1:
            known = self._actions(actions)
            if known.shape[1] != n - 1:
                raise InputError(f"{known.shape[1]} actions for {n} frames; give {n - 1}")
            self.actions[:, :-1] = known

    def state(self) -> dict:
        """Copy all that `reset` and later steps have built, so that a planner can branch."""
        self._need_frames()
        return {"z": self.z.clone(), "actions": self.actions.clone(), "batched": self.batched}

    def restore(self, state: dict) -> None:
        """Go back to what `state` returned."""
        self.z, self.actions = state["z"].clone(), state["actions"].clone()
        self.batched = state["batched"]

    def _need_frames(self) -> None:
        if self.z is None:
            raise InputError("the world model knows no frame yet; call reset(frames) first")

    def _dream(self, beside: Tensor, K: int, noise: Tensor | None, generator) -> Tensor:
        """Dream K frames with one action beside every known and new frame; return the new ones."""
        s = self.space.temporal_stride
        if K % s:
            raise InputError(f"{K} frames to dream: a latent holds {s}; ask for a multiple")
        if noise is None:
            shape = (len(self.z), K // s, *self.z.shape[2:])
            device = generator.device if generator else self.device
            noise = torch.randn(shape, generator=generator, device=device)
        z = self.objective.rollout(
            self.dit,
            self.z,
            self.space.group_actions(beside),
            K // s,
            guidance=self.guidance,
            noise=noise.to(self.device),
            context=self.context,
        )
        new, keep = z[:, self.z.shape[1] :], self.dit.config.max_frames
        self.z, self.actions = z[:, -keep:], beside[:, -keep * s :]
        return self.space.decode(new)

    def generate_chunk(
        self,
        actions: Tensor | np.ndarray,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Dream one frame for each action: a[0] goes beside the newest known frame.

        The last new frame holds a copy of a[-1] until the next call overwrites its slot.

        actions  (A,), (K, A) or (B, K, A); of a batch also (B, A)
        noise    (B, K', h, V w, C)   fixes every draw; else drawn from `generator`, on its device
        ->       ([B,] [V,] K, H, W, 3)
        """
        self._need_frames()
        actions = self._actions(actions)
        beside = torch.cat((self.actions[:, :-1], actions, actions[:, -1:]), 1)  # (B, n + K, A)
        frames = self._dream(beside, actions.shape[1], noise, generator)
        return frames if self.batched else frames[0]

    def step(self, action: Tensor | np.ndarray, **draws: Any) -> Tensor:
        """Dream the next frame: action (A,) or (B, A) -> ([B,] [V,] H, W, 3)."""
        return self.generate_chunk(action, **draws).select(-4, 0)

    def rollout(
        self,
        frames: Tensor | np.ndarray,
        actions: Tensor | np.ndarray,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Dream a recorded clip on from its first frames, with one action beside every frame.

        frames   ([B,] [V,] n, H, W, 3)   history
        actions  ([B,] T, A)              T > n
        ->       ([B,] [V,] T, H, W, 3)   the history as given, then T - n new frames
        """
        self.reset(frames)
        known, _ = self._frames(frames)
        actions, n = self._actions(actions), known.shape[-4]
        if actions.shape[1] <= n:
            raise InputError(f"{actions.shape[1]} actions for {n} known frames; give more")
        new = self._dream(actions, actions.shape[1] - n, noise, generator)
        video = torch.cat((known / 255 if known.dtype == torch.uint8 else known.float(), new), -4)
        return video if self.batched else video[0]

    def rollout_policy(
        self,
        policy: Callable[[Tensor], Tensor],
        initial_frames: Tensor | np.ndarray,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let a policy act inside the model.

        policy  newest frame ([B,] [V,] H, W, 3) -> actions (A,), (K, A), (B, A) or (B, K, A)
        ->      frames ([B,] [V,] n + steps, H, W, 3), actions ([B,] steps, A)
        """
        self.reset(initial_frames)
        frames = torch.as_tensor(initial_frames).to(self.device)
        video, taken = [frames / 255 if frames.dtype == torch.uint8 else frames.float()], []
        while (left := steps - sum(a.shape[1] for a in taken)) > 0:
            actions = self._actions(policy(video[-1].select(-4, -1)))[:, :left]
            taken.append(actions)
            chunk = actions if self.batched else actions[0]
            video.append(self.generate_chunk(chunk, generator=generator))
        actions = torch.cat(taken, 1)
        return torch.cat(video, -4), actions if self.batched else actions[0]

    def plan(
        self,
        goal_frame: Tensor | np.ndarray,
        horizon: int,
        method: str = "cem",
        start: Tensor | np.ndarray | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Search the actions that lead from the newest known frame to a goal frame.

        goal_frame  ([V,] H, W, 3)   to be reached after `horizon` steps
        method      cem | gradient | grid, which take the `options`
        start       (horizon, A)     where the search begins; None: zeros
        ->          (horizon, A)     in model units
        """
        self._need_frames()
        if method not in PLANNERS or horizon < 1:
            raise InputError(f"plan: method is one of {', '.join(PLANNERS)}, horizon at least 1")
        if len(self.z) != 1 or self.space.temporal_stride != 1:
            raise InputError("plan: works on one sample and on encoders with one frame a latent")
        z_goal = self.encode(torch.as_tensor(goal_frame).unsqueeze(-4))
        device = generator.device if generator else self.device
        noise = torch.randn((horizon, *z_goal.shape[1:]), generator=generator, device=device)
        noise, known = noise.to(self.device), self.actions[0, :-1]
        cost = candidate_cost(self.dit, self.objective, self.z[0], known, z_goal, noise)
        start = torch.zeros(horizon, self.action_dim) if start is None else torch.as_tensor(start)
        if method == "cem":
            options = {"generator": generator} | options
        return PLANNERS[method](cost, start.float().to(self.device), **options)[0]


@dataclasses.dataclass
class Args:
    """Dream from one image and write a GIF: actions from a file, or typed one a line."""

    checkpoint: str  # world_model.safetensors of a run
    image: str  # start frame; several views side by side
    actions: str | None = None  # .npy, or text with one action a line; none: typed
    raw: bool = True  # actions are the robot's own 7 numbers; false: model units
    output: str = "dream.gif"  # the GIF
    encoder_weights: str | None = None  # the public encoder, if not where training found it
    guidance: float = 1.0  # 1: none
    context: str = "exact"  # exact | rolling
    seed: int = 0  # of the noise
    device: str | None = None  # default: cuda, mps or cpu, whichever is there


def read_bytes(path: str) -> bytes:
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: no such file; check the path")
    return Path(path).read_bytes()


def typed_actions(path: str | None) -> Iterator[np.ndarray]:
    """Yield the actions of a file, all at once (K, A), or those typed, one by one (A,)."""
    try:
        if path and path.endswith(".npy"):
            yield np.load(io.BytesIO(read_bytes(path)), allow_pickle=False).astype(np.float32)
        elif path:
            lines = read_bytes(path).decode().splitlines()
            yield np.array([line.split() for line in lines if line.strip()], np.float32)
        else:
            print("one action a line, numbers separated by spaces; end with an empty line")
            for line in iter(lambda: sys.stdin.readline().strip(), ""):
                yield np.array(line.split(), np.float32)
    except ValueError as error:
        raise InputError(
            f"{path or 'typed'}: {error}; give .npy, or one action of numbers a line"
        ) from error


def main() -> None:
    args = parse_args(Args)
    sampler = {"guidance": args.guidance, "context": args.context}
    model = WorldModel(
        args.checkpoint, args.device, encoder_weights=args.encoder_weights, **sampler
    )
    generator, views = torch.Generator().manual_seed(args.seed), model.space.num_views
    picture = decode_frame(read_bytes(args.image), None, args.image)
    frame = torch.from_numpy(picture.copy()).unflatten(1, (views, -1)).movedim(1, 0)[:, None]
    frame = frame if views > 1 else frame[0]  # ([V,] 1, H, W, 3)
    model.reset(frame)
    video = [frame / 255]
    units = model.map_actions if args.raw else torch.as_tensor
    for actions in typed_actions(args.actions):
        video.append(model.generate_chunk(units(actions), generator=generator).cpu())
    frames = torch.cat(video, -4)
    write_gif(
        args.output, torch.cat(frames.unbind(0), -2) if views > 1 else frames, model.data["fps"]
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_cli(main)
