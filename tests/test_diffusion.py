"""Laws of the objectives: exact answers of an oracle, cached rollouts equal to uncached ones."""

import math

import numpy as np
import pytest
import torch

from data import InputError
from diffusion import (
    DDPM,
    OBJECTIVES,
    FlowMatching,
    alphas_cumprod,
    draw,
    guide,
    interpolate,
    null_action,
    objective_from,
    shift_tau,
    time_shift,
)
from dit import DiT, DiTConfig, load_dit

BOTH = pytest.mark.parametrize("objective", [FlowMatching(shift=2.5), DDPM()], ids=OBJECTIVES)


def random_dit(**fields) -> DiT:
    """Build a small DiT in which no weight is zero."""
    config = dict(in_channels=6, dim=48, depth=2, heads=2, max_frames=4) | fields
    dit = DiT(DiTConfig(**config)).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def uncached(model):
    """Hide the cache methods of a model."""

    def call(z_tau, tau, actions):
        return model(z_tau, tau, actions)

    call.config = model.config
    return call


class Counter:
    """Count the frames that pass through the layers of a DiT."""

    def __init__(self, dit: DiT):
        self.frames = 0
        dit.blocks[0]["s_block"].register_forward_pre_hook(self.count)

    def count(self, _, inputs):
        self.frames += inputs[0].shape[1]


# -- equations


def test_the_shift_of_the_papers_latents():
    for tokens, channels, g in (
        (256, 16, 1.0),
        (256, 32, 1.414),
        (256, 96, 2.449),
        (256, 1024, 8.0),
        (256, 1152, 8.485),
        (64, 16, 1.0),  # would be 0.5
    ):
        assert abs(time_shift(tokens, channels) - g) < 1e-3
    assert time_shift(64, 16, minimum=0) == 0.5
    tau = torch.linspace(0, 1, 11)
    assert torch.equal(shift_tau(tau, 1.0), tau)
    shifted = shift_tau(tau, 2.449)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
    assert abs(shifted[5] - 2.449 / 3.449) < 1e-6  # the middle of the grid


def test_paths_end_at_data_and_noise():
    z, eps = torch.randn(2, 3, 5, 4, 4, 6)
    tau = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75]).expand(3, 5)
    z_tau = interpolate(z, eps, tau)
    assert torch.equal(z_tau[:, 0], z[:, 0]) and torch.equal(z_tau[:, 1], eps[:, 1])
    torch.testing.assert_close(z_tau[:, 2], 0.75 * z[:, 2] + 0.25 * eps[:, 2])


def test_the_sigmoid_schedule():
    a = alphas_cumprod()
    assert a.shape == (1000,) and a.dtype == torch.float32 and (a.diff() < 0).all()
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    for k in (0, 14, 499, 900):  # written out: the curve itself, where no beta is clipped
        s = 1 / (1 + math.exp(3 - 6 * (k + 1) / 1000))
        assert abs(a[k] - (high - s) / (high - low)) < 1e-6
    assert abs(a[999] / a[998] - 0.001) < 1e-6  # the last beta is 1 before clipping


def test_the_sampling_grids():
    grid = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    assert DDPM().levels() == [level / 1000 for level in grid]
    grid = FlowMatching(shift=3.0, steps=4).levels()
    expected = [1.0, 0.9, 0.75, 0.5, 0.0]  # 3 t / (1 + 2 t) at t = 1, 3/4, ...
    torch.testing.assert_close(torch.tensor(grid), torch.tensor(expected))


# -- loss


def recorded(objective, z, num_history=2, **options):
    """Run the loss with a model that returns zeros: (z_tau, tau, loss)."""
    seen = []

    def model(z_tau, tau, actions):
        seen.append((z_tau, tau))
        return torch.zeros_like(z_tau)

    loss, logs = objective.loss(model, z, torch.zeros(*z.shape[:2], 10), num_history, **options)
    assert torch.equal(logs["loss"], loss) and not logs["loss"].requires_grad
    return *seen[0], loss


@pytest.mark.parametrize("n", [0, 2, 4])
def test_an_oracle_has_no_flow_matching_loss(n):
    z = torch.randn(3, 5, 4, 4, 6)

    def oracle(z_tau, tau, actions):
        v = (z_tau - z) / tau[..., None, None, None]  # eps - z; infinite on history, unscored
        return v

    loss, _ = FlowMatching(2.0).loss(oracle, z, torch.zeros(3, 5, 10), n)
    assert loss < 1e-6  # float32, divided by small tau


def test_an_oracle_has_no_ddpm_loss():
    z = torch.randn(3, 5, 4, 4, 6)

    def oracle(z_tau, tau, actions):
        a = alphas_cumprod()[(1000 * tau).round().long()][..., None, None, None]
        eps = (z_tau - a.sqrt() * z) / (1 - a).sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * z

    loss, _ = DDPM().loss(oracle, z, torch.zeros(3, 5, 10), 2)
    assert loss < 1e-6


def test_flow_matching_scores_future_frames_and_perturbs_history():
    z = torch.randn(64, 6, 4, 4, 8)
    z_tau, tau, loss = recorded(FlowMatching(), z, 3)
    assert (tau[:, :3] == 0).all() and (tau[:, 3:] > 0).all()
    assert len(tau[:, 3:].unique()) == 64 * 3  # a level for every frame of every clip
    assert abs(loss - 2) < 0.1  # E (eps - z)^2
    history = z_tau[:, :3]
    assert abs(history.std() - 1) < 0.02  # the perturbation keeps the variance
    clean = (history * z[:, :3]).mean((2, 3, 4))  # 1 / sqrt(1 + s^2) of every frame
    assert clean.std() > 0.02  # s is drawn per frame
    expected = 1 / (1 + (0.3 * torch.randn(10**5)) ** 2).sqrt()
    assert abs(clean.mean() - expected.mean()) < 0.02


def test_ddpm_noises_and_scores_every_frame():
    z = torch.randn(64, 6, 4, 4, 8)
    z_tau, tau, loss = recorded(DDPM(), z, 3)
    level = (1000 * tau).round()
    assert (1000 * tau - level).abs().max() < 1e-4  # integers, to float32
    assert 0 <= level.min() and level.max() <= 999
    assert len(level[:, :3].unique()) > 150  # drawn per frame, history too
    assert abs(loss - 1) < 0.05  # v has unit variance, like its parts
    assert abs(level.mean() - 499.5) < 40
    assert (1000 * recorded(DDPM(shift=8.0), z)[1]).mean() > 700


def test_times_follow_their_distribution():
    z = torch.randn(4000, 3, 1, 1, 1)
    for options, quantile in (
        (dict(time_dist="uniform"), lambda q: q),
        (dict(), lambda q: torch.special.ndtri(q).sigmoid()),
        (dict(shift=2.5), lambda q: shift_tau(torch.special.ndtri(q).sigmoid(), 2.5)),
    ):
        tau = recorded(FlowMatching(**options), z, 1)[1][:, 1:].flatten()
        q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
        torch.testing.assert_close(tau.quantile(q), quantile(q), atol=0.02, rtol=0)


@BOTH
def test_noise_and_levels_are_float32_under_autocast(objective):
    z = torch.randn(2, 4, 4, 4, 6)
    plain = recorded(objective, z, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        auto = recorded(objective, z, generator=torch.Generator().manual_seed(1))
    assert auto[0].dtype == auto[1].dtype == auto[2].dtype == torch.float32
    assert all(map(torch.equal, plain, auto))


@BOTH
def test_slices_of_the_global_draw_equal_the_whole(objective):
    z = torch.randn(6, 4, 4, 4, 6)
    whole = recorded(objective, z, generator=torch.Generator().manual_seed(1))
    parts = [
        recorded(
            objective,
            z[2 * i : 2 * i + 2],
            generator=torch.Generator().manual_seed(1),
            shard=(i, 3),
        )
        for i in range(3)
    ]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    torch.testing.assert_close(sum(part[2] for part in parts) / 3, whole[2])
    assert draw(torch.rand, (2, 3), z).shape == (2, 3)


@BOTH
def test_a_clip_that_does_not_fit_is_refused(objective):
    z, actions = torch.randn(2, 4, 4, 4, 6), torch.zeros(2, 4, 10)
    for n in (-1, 4):
        with pytest.raises(AssertionError, match="4, 4, 4, 6"):
            objective.loss(torch.zeros_like, z, actions, n)
    with pytest.raises(AssertionError, match="2, 3, 10"):
        objective.loss(torch.zeros_like, z, actions[:, :3], 1)


# -- rollout


@BOTH
def test_every_step_of_an_oracle_stays_on_its_path(objective):
    z, eps = torch.randn(2, 3, 1, 4, 4, 6)

    def on_path(level):
        """Give the noised latent and its velocity, by the formulas of the papers."""
        if isinstance(objective, FlowMatching):
            return (1 - level) * z + level * eps, eps - z
        a = torch.tensor(1.0) if level < 0 else alphas_cumprod()[round(1000 * level)]
        return a.sqrt() * z + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z

    levels = objective.levels()
    for k in range(objective.steps):
        z_next = objective.step(*on_path(levels[k]), k)
        torch.testing.assert_close(z_next, on_path(levels[k + 1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_an_oracle_velocity_lands_on_the_data(steps):
    target, noise = torch.randn(2, 5, 3, 3, 4), torch.randn(2, 3, 3, 3, 4)

    def flow(z_tau, tau, actions):
        t = z_tau.shape[1]
        return (z_tau - target[:, :t]) / tau[..., None, None, None].clamp(min=1e-6)

    def ddpm(z_tau, tau, actions):
        a = alphas_cumprod()[(1000 * tau).round().long()][..., None, None, None]
        z = target[:, : z_tau.shape[1]]
        return (a.sqrt() * z_tau - z) / (1 - a).sqrt()

    for objective, oracle in ((FlowMatching(2.0, steps), flow), (DDPM(steps=steps), ddpm)):
        out = objective.rollout(oracle, target[:, :2], torch.zeros(2, 5, 10), 3, noise=noise)
        torch.testing.assert_close(out, target, atol=1e-4, rtol=0)  # a_999 of DDPM is 1e-6


def golden(shared) -> dict[str, torch.Tensor]:
    case = np.load(shared / "golden/rollout_flow.npz")
    return {key: torch.tensor(x) for key, x in case.items()}


@pytest.mark.parametrize("hide", [lambda dit: dit, uncached], ids=["cached", "uncached"])
def test_the_released_rollout_is_reproduced(shared, hide):
    case = golden(shared)
    dit = load_dit(shared / "golden/dit_wide.pt", max_frames=6)
    out = FlowMatching(shift=2.4494897).rollout(
        hide(dit), case["z"][:, :2], case["a"], 7, noise=case["noise"]
    )
    torch.testing.assert_close(out, case["out"], atol=1e-5, rtol=0)  # float32 in another order


@BOTH
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(temporal_mode="joint"),
        dict(wide_head=True, head_dim=32, patch_size=2),
        dict(num_views=2, view_rope="official"),
        dict(num_views=2, temporal_mode="joint"),
    ],
    ids=["factored", "joint", "wide", "views", "joint views"],
)
def test_cached_equals_uncached(objective, guidance, fields):
    dit, z = random_dit(**fields), torch.randn(2, 6, 4, 4, 6)
    actions, noise = torch.randn(2, 7, 10), torch.randn(2, 6, 4, 4, 6)
    for n in (1, 6):  # the window of 4 grows and slides; it starts full
        options = dict(num_frames=7 - n, guidance=guidance, noise=noise[:, : 7 - n])
        one = objective.rollout(dit, z[:, :n], actions, **options)
        other = objective.rollout(uncached(dit), z[:, :n], actions, **options)
        assert torch.equal(one[:, :n], z[:, :n])
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@BOTH
def test_rolling_equals_exact_until_the_window_slides(objective):
    dit, z, actions = random_dit(), torch.randn(1, 1, 4, 4, 6), torch.randn(1, 8, 10)
    noise = torch.randn(1, 7, 4, 4, 6)
    exact = objective.rollout(dit, z, actions, 7, noise=noise)
    rolling = objective.rollout(dit, z, actions, 7, noise=noise, context="rolling")
    torch.testing.assert_close(rolling[:, :4], exact[:, :4], atol=1e-6, rtol=1e-5)
    later = (rolling[:, 4:] - exact[:, 4:]).norm() / exact[:, 4:].norm()
    assert 0 < later < 0.5  # approximate, not something else


@BOTH
def test_frame_passes(objective):
    dit, z = random_dit(max_frames=10), torch.randn(1, 10, 2, 2, 6)
    counter, before = Counter(dit), {}
    for frames in (1, 2, 3):
        for context in ("exact", "rolling"):
            counter.frames = 0
            objective.rollout(dit, z, torch.zeros(1, 10 + frames, 10), frames, context=context)
            before[frames, context] = counter.frames
    assert before[1, "exact"] == before[1, "rolling"] == 9 + 10
    for frames in (2, 3):  # what one more frame costs at a full window of 10
        assert before[frames, "exact"] - before[frames - 1, "exact"] == 19
        assert before[frames, "rolling"] - before[frames - 1, "rolling"] == 11
    counter.frames = 0
    objective.rollout(dit, z[:, :2], torch.zeros(1, 6, 10), 4)
    assert counter.frames == (2 + 10) + 3 * (1 + 10)  # a growing window
    counter.frames = 0
    objective.rollout(uncached(dit), z, torch.zeros(1, 11, 10), 1)
    assert counter.frames == 100


@BOTH
def test_candidates_share_their_context(objective):
    dit, z, noise = random_dit(), torch.randn(1, 2, 4, 4, 6), torch.randn(1, 2, 4, 4, 6)
    actions = torch.randn(3, 4, 10)
    actions[:, 0] = actions[0, 0]  # beside the frame that all candidates share
    counter = Counter(dit)
    shared = objective.encode_context(dit, z[:, :1], actions[:1, :1])
    counter.frames, cache, newest, dreamed = (
        0,
        shared.repeat(3),
        z[:, 1:].expand(3, -1, -1, -1, -1),
        [],
    )
    for j in (0, 1):
        objective.encode_context(dit, newest, actions[:, j + 1 : j + 2], cache=cache)
        eps = noise[:, j : j + 1].expand(3, -1, -1, -1, -1)
        newest = objective.next_frame(dit, cache, actions[:, j + 2], eps)
        dreamed.append(newest)
    assert counter.frames == 11 * 2  # a batch of candidates, 11 k frame passes each
    expected = objective.rollout(
        dit, z.expand(3, -1, -1, -1, -1), actions, 2, noise=noise.expand(3, -1, -1, -1, -1)
    )
    torch.testing.assert_close(torch.cat(dreamed, 1), expected[:, 2:], atol=1e-5, rtol=1e-5)


@BOTH
def test_the_window_never_exceeds_max_frames(objective):
    dit, z = random_dit(), torch.randn(1, 9, 4, 4, 6)
    actions, noise = torch.randn(1, 10, 10), torch.randn(1, 1, 4, 4, 6)
    out = objective.rollout(dit, z, actions, 1, noise=noise)
    z[:, :6], actions[:, :6] = 0, 0  # older than the window of 4
    torch.testing.assert_close(
        objective.rollout(dit, z, actions, 1, noise=noise)[:, 9], out[:, 9], atol=0, rtol=0
    )
    z[:, 6] += 1
    assert not torch.equal(objective.rollout(dit, z, actions, 1, noise=noise)[:, 9], out[:, 9])
    lengths = []

    def bare(z_tau, tau, actions):
        lengths.append(z_tau.shape[1])
        return torch.zeros_like(z_tau)

    objective.rollout(bare, z, torch.zeros(1, 12, 10), 3)  # without config: sees all frames
    assert sorted(set(lengths)) == [10, 11, 12]


def test_context_is_conditioned_as_the_objective_says():
    z, seen = torch.randn(1, 2, 3, 3, 4), []

    def model(z_tau, tau, actions):
        seen.append((z_tau, tau))
        return torch.zeros_like(z_tau)

    FlowMatching(context_tau=0.05).rollout(model, z, torch.zeros(1, 3, 10), 1)
    for z_tau, tau in seen:
        assert torch.equal(z_tau[:, :2], z) and (tau[:, :2] == 0.05).all()
    assert [tau[0, 2].item() for _, tau in seen[:2]] == pytest.approx([1.0, 0.9])
    seen.clear()
    DDPM().rollout(model, z, torch.zeros(1, 3, 10), 1)
    for z_tau, tau in seen:
        torch.testing.assert_close(z_tau[:, :2], alphas_cumprod()[14].sqrt() * z)
        assert ((1000 * tau[:, :2]).round() == 14).all()
    assert [round(1000 * tau[0, 2].item()) for _, tau in seen] == list(range(999, 0, -100))


@BOTH
def test_the_action_of_a_frame_stands_beside_it(objective):
    dit, z, noise = random_dit(), torch.randn(1, 2, 4, 4, 6), torch.randn(1, 3, 4, 4, 6)
    actions = torch.randn(1, 5, 10)
    out = objective.rollout(dit, z, actions, 3, noise=noise)
    changed = actions.clone()
    changed[:, 3] += 1
    other = objective.rollout(dit, z, changed, 3, noise=noise)
    assert torch.equal(other[:, :3], out[:, :3])  # frames before it never see it
    assert not torch.equal(other[:, 3], out[:, 3]) and not torch.equal(other[:, 4], out[:, 4])


def test_guidance_mixes_the_branches():
    v = torch.randn(4, 1, 3, 3, 2)
    assert torch.equal(guide(v, 1.0), v)
    cond, null = v.chunk(2)
    torch.testing.assert_close(guide(v, 3.0), null + 3 * (cond - null))
    assert null_action(torch.randn(2, 20)).tolist() == [[0.0] * 19 + [1.0]] * 2
    batches = []

    def model(z_tau, tau, actions):
        batches.append(actions)
        return torch.zeros_like(z_tau)

    z, actions = torch.randn(2, 1, 3, 3, 4), torch.randn(2, 2, 10)
    FlowMatching().rollout(model, z, actions, 1, guidance=1.0)
    assert all(len(batch) == 2 for batch in batches)  # the null pass is skipped
    batches.clear()
    FlowMatching().rollout(model, z, actions, 1, guidance=2.0)
    assert len(batches) == 10
    for batch in batches:
        assert torch.equal(batch, torch.cat((actions, null_action(actions))))


@BOTH
def test_a_generator_repeats_a_rollout(objective):
    dit, z, actions = random_dit(), torch.randn(2, 1, 4, 4, 6), torch.randn(2, 3, 10)
    outs = [
        objective.rollout(dit, z, actions, 2, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(objective.rollout(dit, z, actions[:, :1], 0), z)


def test_a_single_frame_step_compiles_to_one_graph():
    dit, z, actions = random_dit(depth=1), torch.randn(1, 3, 4, 4, 6), torch.randn(1, 4, 10)
    objective, eps = FlowMatching(), torch.randn(1, 1, 4, 4, 6)
    cache = objective.encode_context(dit, z, actions[:, :3])
    modulations = dit.modulations(torch.ones(1, 1), actions[:, 3:])
    step = torch.compile(dit.denoise, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        out = step(eps, modulations, cache)
        torch.testing.assert_close(out, dit.denoise(eps, modulations, cache), atol=1e-5, rtol=1e-5)


def test_rollout_arguments_that_do_not_fit_are_refused():
    dit, z = random_dit(), torch.randn(1, 2, 4, 4, 6)
    for options, word in (
        (dict(actions=torch.zeros(1, 4, 10)), "actions"),
        (dict(noise=torch.zeros(1, 2, 4, 4, 6)), "noise"),
        (dict(context="approximate"), "context"),
    ):
        with pytest.raises(InputError, match=word):
            FlowMatching().rollout(
                **dict(model=dit, z_context=z, actions=torch.zeros(1, 5, 10), num_frames=3)
                | options
            )


# -- configuration


def test_objectives_are_stored_and_read():
    for objective in (FlowMatching(2.0, 5, 0.02, "uniform"), DDPM(1.5, 20)):
        assert objective_from(objective.to_dict()) == objective
    for values in ({"name": "rectified"}, {"name": "ddpm", "context_tau": 0.1}, {}):
        with pytest.raises(InputError, match="file.json"):
            objective_from(values, "file.json")


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(shift=0), "shift"),
        (dict(steps=0), "steps"),
        (dict(context_tau=2), "context_tau"),
        (dict(time_dist="normal"), "time_dist"),
    ],
)
def test_an_impossible_objective_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        FlowMatching(**fields)
