"""Train and roll out a world model: flow matching and DDPM over latent frames.

    noise -> loss;    one denoising step -> one frame -> rollout

    flow matching  z_tau = (1 - tau) z + tau eps             v = dz/dtau = eps - z
    DDPM           z_i = sqrt(a_i) z + sqrt(1 - a_i) eps     v = sqrt(a_i) eps - sqrt(1 - a_i) z

Straight paths: Lipman et al. 2023, sec. 4.1, in the time of Esser et al. 2024, eq. 13, with their
logit-normal levels, sec. 3.1. DDPM: Ho et al. 2020, eq. 4; its v: Salimans & Ho 2022, sec. 4. Every
frame has its own level; a rollout denoises frame by frame. All in float32, even under autocast.

Shapes: B batch, T frames, k new ones, h w latent grid, C latent channels, A action width.
    z, eps, z_tau, v  (B, T, h, w, C)   clean latents, unit Gaussian, noised latents, velocity
    tau               (B, T)            noise level per frame: 0 clean, 1 noise
    actions           (B, T, A)         action[t] stands beside frame t, drives t to t + 1
    model             any callable (z_tau, tau, actions) -> v; a DiT also lends its context cache
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from data import InputError, config_from, null_action

HISTORY_NOISE = 0.3  # standard deviation of the noise strength on history frames in training
DDPM_LEVELS, DDPM_CONTEXT_LEVEL = 1000, 14


def time_shift(tokens: int, channels: int, minimum: float = 1.0) -> float:
    """Give max(sqrt(tokens channels / 4096), minimum) of a patched frame   [arXiv 2510.11690]."""
    return max((tokens * channels / 4096) ** 0.5, minimum)


def shift_tau(tau: Tensor, g: float) -> Tensor:
    """Move levels (...) toward noise: g tau / (1 + (g - 1) tau)     [Esser et al. 2024, eq. 23]."""
    return g * tau / (1 + (g - 1) * tau)


def interpolate(z: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
    """Move clean latents along the straight path toward noise: (1 - tau) z + tau eps."""
    tau = tau[:, :, None, None, None]
    return (1 - tau) * z + tau * eps


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # training may meet a table that a rollout made
def alphas_cumprod(device: str | torch.device = "cpu") -> Tensor:
    """Give a_i, i < 1000: sigmoid schedule from -3 to 3 [arXiv 2212.11972], betas <= 0.999."""
    s = torch.linspace(-3, 3, DDPM_LEVELS + 1, dtype=torch.float64).sigmoid()
    a = (s[-1] - s) / (s[-1] - s[0])
    betas = (1 - a[1:] / a[:-1]).clamp(0, 0.999)
    return (1 - betas).cumprod(0).float().to(device)


def draw(
    kind: Callable,
    shape: Sequence[int],
    like: Tensor,
    generator: Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Draw for the global batch and take this process's slice, so that N processes equal one.

    kind   torch.randn or torch.rand: float32, drawn on the generator's device, moved to `like`'s
    shape  of this process's share;  shard  its (index, count)
    """
    (index, count), B, device = shard, shape[0], (generator or like).device
    drawn = kind((count * B, *shape[1:]), generator=generator, device=device)
    return drawn[index * B : (index + 1) * B].to(like.device)


def branches(x: Tensor, guidance: float, null: Callable = lambda x: x) -> Tensor:
    """Stack the branches of guidance, with and without action, along the batch."""
    return x if guidance == 1.0 else torch.cat((x, null(x)))


def guide(v: Tensor, guidance: float) -> Tensor:
    """Join the branches: v_null + guidance (v_cond - v_null)      [Ho & Salimans 2022, eq. 6]."""
    if guidance == 1.0:
        return v.float()
    v_cond, v_null = v.float().chunk(2)
    return v_null + guidance * (v_cond - v_null)


@dataclass
class Objective:
    """Share the loss and the climb from one denoising step to a rollout.

    Subclasses give noised(z, num_history, draw) -> (z_tau, tau, v, first scored frame), levels(),
    step(z, v, i) -> z one step cleaner, condition(z) -> known frames as the model sees them.
    """

    shift: float = 1.0  # g of `shift_tau`
    steps: int = 10  # denoising steps a frame

    def __post_init__(self):
        if not (self.shift > 0 and self.steps >= 1):
            raise InputError(f"shift {self.shift} and steps {self.steps} must be above 0")

    def to_dict(self) -> dict:
        """Give what `objective_from` reads."""
        name = next(name for name, kind in OBJECTIVES.items() if kind is type(self))
        return {"name": name, **asdict(self)}

    def loss(
        self, model: Callable, z: Tensor, actions: Tensor, num_history: int, **draws: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the mean squared error of v, and detached logs.

        num_history frames, 0 to T - 1, are known; draws: generator and shard, see `draw`.
        """
        assert z.ndim == 5 and actions.shape[:-1] == z.shape[:2], (z.shape, actions.shape)
        assert 0 <= num_history < z.shape[1], (num_history, z.shape)
        sample = functools.partial(draw, like=z, **draws)
        z_tau, tau, v, scored = self.noised(z.float(), num_history, sample)
        loss = (model(z_tau, tau, actions).float() - v)[:, scored:].square().mean()
        return loss, {"loss": loss.detach()}

    def integrate(self, velocity: Callable[[Tensor, int], Tensor], z: Tensor) -> Tensor:
        """Go from noise to a clean frame; velocity(z, i) is v at step i."""
        for i in range(self.steps):
            z = self.step(z, velocity(z, i), i)
        return z

    def next_frame_uncached(
        self, model: Callable, z: Tensor, actions: Tensor, eps: Tensor, guidance: float = 1.0
    ) -> Tensor:
        """Denoise the frame after z, running the whole window at every step.

        z (B, n, h, w, C), actions (B, n + 1, A), eps (B, 1, h, w, C)  ->  (B, 1, h, w, C)
        """
        levels, (z_known, tau_known) = self.levels(), self.condition(z)
        actions = branches(actions, guidance, null_action)

        def velocity(z_new: Tensor, i: int) -> Tensor:
            tau = torch.cat((tau_known, tau_known.new_full((len(z), 1), levels[i])), 1)
            z_tau, tau = branches(torch.cat((z_known, z_new), 1), guidance), branches(tau, guidance)
            return guide(model(z_tau, tau, actions)[:, -1:], guidance)

        return self.integrate(velocity, eps)

    def encode_context(
        self, model: Any, z: Tensor, actions: Tensor, guidance: float = 1.0, cache: Any = None
    ) -> Any:
        """Add known frames (B, n, ...) and their actions to a context cache; None: to a new one."""
        z, tau = (branches(x, guidance) for x in self.condition(z))
        return model.encode_context(z, tau, branches(actions, guidance, null_action), cache)

    def next_frame(
        self, model: Any, cache: Any, action: Tensor, eps: Tensor, guidance: float = 1.0
    ) -> Tensor:
        """Denoise the frame after the cached ones; the cache is left as it was.

        action (B, A) beside the new frame, eps (B, 1, h, w, C)  ->  (B, 1, h, w, C)
        """
        beside = branches(action, guidance, null_action)[:, None].expand(-1, self.steps, -1)
        tau = [eps.new_full((len(beside), 1), tau) for tau in self.levels()[: self.steps]]
        modulations = model.modulations(torch.cat(tau, 1), beside)

        def velocity(z: Tensor, i: int) -> Tensor:
            at_i = [m[:, i : i + 1] for m in modulations]
            return guide(model.denoise(branches(z, guidance), at_i, cache), guidance)

        return self.integrate(velocity, eps)

    @torch.no_grad()
    def rollout(
        self,
        model: Callable,
        z_context: Tensor,
        actions: Tensor,
        num_frames: int,
        guidance: float = 1.0,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        context: str = "exact",
    ) -> Tensor:
        """Dream num_frames frames after z_context (B, n, h, w, C); actions (B, n + num_frames, A).

        noise     (B, num_frames, h, w, C)  fixes every draw; else drawn from `generator`
        guidance  1.0 skips the branch without actions; context: see `extend`
        ->        (B, n + num_frames, h, w, C)   z_context in front
        """
        if noise is None:
            shape = (len(z_context), num_frames, *z_context.shape[2:])
            noise = draw(torch.randn, shape, z_context, generator)
        return self.extend(model, z_context.float(), actions, noise, guidance, context)[0]

    def extend(
        self,
        model: Callable,
        z: Tensor,
        actions: Tensor,
        noise: Tensor,
        guidance: float = 1.0,
        context: str = "exact",
        cache: Any = None,
    ) -> tuple[Tensor, Any]:
        """Do a rollout, or go on with one: -> all frames (B, n + k, ...) and their context cache.

        A callable without config sees all frames, not `model.config.max_frames`; one without cache
        methods is run on the whole window at every step (so gradients can pass).
        z        (B, n, h, w, C)  known frames; those in the cache may be missing in front
        actions  (B, n + k, A)    beside known and new frames;  noise  (B, k, h, w, C)
        context  exact: a full window is encoded anew for every frame; rolling: it slides
                 (approximate, 11 frame passes instead of 19)
        cache    of all frames before the last of z, as an earlier call gave it; changed in place
        """
        (B, n, *cell), k = z.shape, noise.shape[1]
        if actions.shape[:2] != (B, n + k) or noise.shape != (B, k, *cell):
            got = f"actions {tuple(actions.shape)} and noise {tuple(noise.shape)}"
            raise InputError(f"rollout got {got}; give ({B}, {n + k}, A) and {(B, k, *cell)}")
        if context not in ("exact", "rolling"):
            raise InputError(f"context is {context!r}; choose exact or rolling")
        window = model.config.max_frames if hasattr(model, "config") else n + k
        frames, cached = [z[:, t : t + 1] for t in range(n)], hasattr(model, "encode_context")
        for t in range(n, n + k):
            if cache and context == "exact" and cache.length == window - 1:
                cache.length = cache.position = 0  # what slides is encoded anew
            first = t - 1 if cache and cache.length else max(0, t + 1 - window)  # not cached yet
            past, eps = torch.cat((z[:, :0], *frames[first:t]), 1), noise[:, t - n, None].float()
            if cached:
                cache = self.encode_context(model, past, actions[:, first:t], guidance, cache)
                frames.append(self.next_frame(model, cache, actions[:, t], eps, guidance))
            else:
                beside = actions[:, first : t + 1]
                frames.append(self.next_frame_uncached(model, past, beside, eps, guidance))
        return torch.cat((z[:, :0], *frames), 1), cache


@dataclass
class FlowMatching(Objective):
    """Move frames along straight paths; predict the derivative eps - z of the future ones."""

    context_tau: float = 0.01  # noise level that known frames are said to have in a rollout
    time_dist: str = "logit_normal"  # logit_normal | uniform, before the shift

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.context_tau <= 1:
            raise InputError(f"context_tau is {self.context_tau}; choose a level in [0, 1]")
        if self.time_dist not in ("logit_normal", "uniform"):
            raise InputError(f"time_dist is {self.time_dist!r}; choose logit_normal or uniform")

    def noised(self, z: Tensor, num_history: int, draw: Callable) -> tuple:
        """Noise future frames; perturb history (tau 0): (z + s n) / sqrt(1 + s^2), s ~ 0.3 N."""
        uniform = self.time_dist == "uniform"
        tau = draw(torch.rand if uniform else torch.randn, z.shape[:2])
        tau = shift_tau(tau if uniform else tau.sigmoid(), self.shift)
        tau[:, :num_history] = 0
        eps = draw(torch.randn, z.shape)
        s = HISTORY_NOISE * draw(torch.randn, (*tau.shape, 1, 1, 1))
        z_tau, perturbed = interpolate(z, eps, tau), (z + s * eps) / (1 + s**2).sqrt()
        z_tau[:, :num_history] = perturbed[:, :num_history]
        return z_tau, tau, eps - z, num_history

    def levels(self) -> list[float]:
        grid = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return shift_tau(grid, self.shift).tolist()

    def step(self, z: Tensor, v: Tensor, i: int) -> Tensor:
        """Follow v to the next level (Euler)."""
        levels = self.levels()
        return z + (levels[i + 1] - levels[i]) * v

    def condition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z.new_full(z.shape[:2], self.context_tau)


@dataclass
class DDPM(Objective):
    """Diffuse in 1000 levels; predict v = sqrt(a) eps - sqrt(1 - a) z of every frame."""

    def noised(self, z: Tensor, num_history: int, draw: Callable) -> tuple:
        """Noise all frames alike, each at level floor(1000 shift(u)), u uniform."""
        level = (DDPM_LEVELS * shift_tau(draw(torch.rand, z.shape[:2]), self.shift)).long()
        level = level.clamp(max=DDPM_LEVELS - 1)  # rounding can give 1000
        eps, a = draw(torch.randn, z.shape), alphas_cumprod(z.device)[level][:, :, None, None, None]
        z_tau, v = a.sqrt() * z + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z
        return z_tau, level / DDPM_LEVELS, v, 0

    def levels(self) -> list[float]:
        """Give linspace(-1, 999, steps + 1) from noise on, as integers, over 1000; -1 is clean."""
        grid = torch.linspace(-1, DDPM_LEVELS - 1, self.steps + 1, dtype=torch.float64)
        return (grid.long().flip(0).double() / DDPM_LEVELS).tolist()

    def step(self, z: Tensor, v: Tensor, i: int) -> Tensor:
        """Mix the clean frame and noise that v implies anew  [DDIM: Song et al. 2021, eq. 12]."""
        levels, table = self.levels()[i : i + 2], alphas_cumprod().tolist()
        a, a_next = (1.0 if tau < 0 else table[round(DDPM_LEVELS * tau)] for tau in levels)
        clean, eps = a**0.5 * z - (1 - a) ** 0.5 * v, (1 - a) ** 0.5 * z + a**0.5 * v
        return a_next**0.5 * clean + (1 - a_next) ** 0.5 * eps

    def condition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        a = alphas_cumprod()[DDPM_CONTEXT_LEVEL].item()
        return a**0.5 * z, z.new_full(z.shape[:2], DDPM_CONTEXT_LEVEL / DDPM_LEVELS)


OBJECTIVES = {"flow_matching": FlowMatching, "ddpm": DDPM}


def objective_from(values: dict, where: str = "objective") -> Objective:
    """Build an objective from what `Objective.to_dict` stored."""
    if not isinstance(values, dict) or values.get("name") not in [*OBJECTIVES]:
        raise InputError(f"{where}: no objective {values!r}; choose {' or '.join(OBJECTIVES)}")
    fields = {k: v for k, v in values.items() if k != "name"}
    return config_from(OBJECTIVES[values["name"]], fields, where)
