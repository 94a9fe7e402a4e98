"""World model: layouts, action slots, branching, views, planning; without any file but our own."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import world_model
from adapter import AdapterConfig, PixelDecoder, PixelDecoderConfig, create_adapter
from data import InputError, load_tensors, map_actions, save_tensors
from diffusion import DDPM, FlowMatching
from dit import DiT, DiTConfig, load_dit, merge_views, split_views
from encoders import EncoderConfig, create_autoencoder
from world_model import (
    PLANNERS,
    LatentSpace,
    WorldModel,
    candidate_cost,
    cheapest,
    plan_cem,
    plan_gradient,
    plan_grid,
    save_world_model,
)

ABOUT = {
    "image_size": 16,
    "stride": 1,
    "num_history": 2,
    "action_merge": "drop",
    "action_mapping": "bridge",
    "fps": 5,
}


def make(path, objective=None, views: int = 1, **config):
    """Write a world model of random weights over 2x2 tokens; every output layer is alive."""
    torch.manual_seed(1)
    config = {"max_frames": 5, "wide_head": False} | config
    dit = DiT(DiTConfig(192, 1, 64, 2, 2, num_views=views, **config))
    for name, parameter in dit.named_parameters():
        if "adaLN" in name or "final" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    space = LatentSpace(create_autoencoder(EncoderConfig("pixels", patch_size=8)), num_views=views)
    space.mean, space.std = torch.full((192,), -0.1), torch.full((192,), 0.5)
    save_world_model(path, dit, objective or FlowMatching(steps=3), space, ABOUT)
    return path


@pytest.fixture
def model(tmp_path):
    return WorldModel(make(tmp_path / "world_model.safetensors"), device="cpu")


def count_passes(dit) -> list[int]:
    """Collect the frames that pass through a DiT, call by call."""
    passes = []
    dit.blocks[0].s_block.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].shape[:2].numel())
    )
    return passes


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_the_latent_space_is_undone_by_decode(model):
    frames = torch.rand(2, 3, 16, 16, 3)
    assert torch.allclose(model.decode(model.encode(frames)), frames, atol=1e-5)  # float32 scaling


def test_frames_come_back_in_the_layout_they_were_given_in(model):
    frames, actions = torch.rand(2, 3, 16, 16, 3), torch.randn(2, 4, 10)
    model.reset(frames)
    batched = model.generate_chunk(actions, generator=seed())
    assert batched.shape == (2, 4, 16, 16, 3) and 0 <= batched.min() and batched.max() <= 1
    model.reset(frames)
    assert model.step(actions[:, 0]).shape == (2, 16, 16, 3)
    seen = (frames[0] * 255).to(torch.uint8)
    assert torch.equal(model.reset(seen.numpy()), seen / 255)  # as a gym gives its first frame
    assert model.generate_chunk(actions[0]).shape == (4, 16, 16, 3)
    assert model.generate_chunk(actions[0, 0].numpy()).shape == (1, 16, 16, 3)
    assert model.step(actions[0, 0]).shape == (16, 16, 3)


def test_actions_stand_where_the_contract_says(model, monkeypatch):
    """a[0] beside the newest known frame, a[j] beside new frame j, a copy of a[-1] beside the last,
    which the next call overwrites."""
    seen = []
    extend = FlowMatching.extend

    def spy(self, dit, z, actions, noise, **options):
        seen.append(actions[0, :, 0].tolist())
        return extend(self, dit, z, actions, noise, **options)

    monkeypatch.setattr(FlowMatching, "extend", spy)
    actions = torch.zeros(6, 10)
    actions[:, 0] = torch.arange(1.0, 7.0)
    model.reset(torch.rand(2, 16, 16, 3), actions[:1])
    model.generate_chunk(actions[1:3])
    model.generate_chunk(actions[3:4])
    assert seen == [[1, 2, 3, 3], [1, 2, 3, 4, 4]]
    model.reset(torch.rand(2, 16, 16, 3))
    model.step(actions[0])
    assert seen[-1] == [0, 1, 1]
    model.rollout(torch.rand(2, 16, 16, 3), actions[:4])
    assert seen[-1] == [1, 2, 3, 4]


@pytest.mark.parametrize("context", ["exact", "rolling"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_chunks_and_one_long_rollout_agree(tmp_path, context, guidance):
    """The first new frame of a chunk knows the next action, a single step only a copy: with equal
    actions all are the same model inputs, so the frames agree, also beyond the window."""
    path = make(tmp_path / "m.safetensors")
    model = WorldModel(path, device="cpu", context=context, guidance=guidance)
    frames, action = torch.rand(2, 16, 16, 3), torch.randn(10)
    noise = torch.randn(1, 7, 2, 2, 192)
    whole = model.rollout(frames, action.expand(9, 10), noise=noise)[2:]
    for lengths in ([1] * 7, [3, 4], [5, 1, 1]):
        model.reset(frames, action[None])
        parts = [
            model.generate_chunk(action.expand(K, 10), noise=eps)
            for K, eps in zip(lengths, noise.split(lengths, 1), strict=True)
        ]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5)  # the window slides after 3


def test_the_open_slot_is_overwritten_in_the_cache_too(tmp_path):
    """What a rollout knows in advance, steps learn one by one: the last frame of every step was
    dreamed beside a copy, all older frames stand beside their own action."""
    model = WorldModel(make(tmp_path / "m.safetensors"), device="cpu")
    frames, actions, noise = (
        torch.rand(1, 16, 16, 3),
        torch.randn(3, 10),
        torch.randn(1, 3, 2, 2, 192),
    )
    model.reset(frames)
    steps = torch.stack([model.step(a, noise=noise[:, i : i + 1]) for i, a in enumerate(actions)])
    z = model.encode(frames)[None]
    for i in range(3):  # by hand, without any cache
        beside = torch.cat((actions[: i + 1], actions[i : i + 1]))[None]
        args = (model.dit.forward, z, beside, 1)
        z = model.objective.rollout(*args, noise=noise[:, i : i + 1])
        assert torch.allclose(model.decode(z)[0, -1], steps[i], atol=1e-5)


@pytest.mark.parametrize(
    ("context", "costs"), [("exact", [14, 13, 13, 16, 16]), ("rolling", [14, 13, 13, 13, 13])]
)
def test_a_step_costs_what_the_cache_leaves(tmp_path, context, costs):
    objective = FlowMatching(steps=12)
    model = WorldModel(make(tmp_path / "m.safetensors", objective), device="cpu", context=context)
    passes = count_passes(model.dit)
    model.reset(torch.rand(2, 16, 16, 3))
    for cost in costs:  # 12 denoising steps; the frames not yet cached, or all 4 of a full window
        passes.clear()
        model.step(torch.randn(10))
        assert sum(passes) == cost


@pytest.mark.parametrize("context", ["exact", "rolling"])
def test_a_restored_state_repeats_and_branches(tmp_path, context):
    model = WorldModel(make(tmp_path / "m.safetensors"), device="cpu", context=context)
    model.reset(torch.rand(3, 16, 16, 3))
    for _ in range(4):  # beyond the window
        model.step(torch.zeros(10), generator=seed())
    state = model.state()
    once = model.generate_chunk(torch.ones(2, 10), generator=seed(1))
    model.restore(state)
    other = model.generate_chunk(-torch.ones(2, 10), generator=seed(1))
    assert not torch.allclose(once, other, atol=1e-3)
    torch.save(state, tmp_path / "state.pt")
    for again in (state, torch.load(tmp_path / "state.pt", weights_only=False)):
        model.restore(again)
        assert torch.equal(once, model.generate_chunk(torch.ones(2, 10), generator=seed(1)))


@pytest.mark.parametrize("objective", [FlowMatching(steps=2), DDPM(steps=2)])
@pytest.mark.parametrize("wide", [False, True])
def test_every_objective_and_head_survives_the_file(tmp_path, objective, wide):
    path = make(tmp_path / "m.safetensors", objective, wide_head=wide, head_dim=32)
    model = WorldModel(path, device="cpu")
    assert model.objective == objective and model.dit.config.wide_head == wide
    frames, actions = torch.rand(2, 16, 16, 3), torch.randn(5, 10)
    video = model.rollout(frames, actions, generator=seed())
    assert video.shape == (5, 16, 16, 3) and torch.equal(video[:2], frames)
    assert torch.equal(video, model.rollout(frames, actions, generator=seed()))


def test_adapter_and_pixel_decoder_travel_in_the_file(tmp_path):
    encoder = create_autoencoder(EncoderConfig("pixels", patch_size=8))
    adapter = create_adapter(AdapterConfig("mlp", adapter_latent_dim=8), 192)
    shape = dict(latent_dim=8, base_channels=32, channel_multipliers=(1, 1, 1, 1))
    space = LatentSpace(encoder, adapter, PixelDecoder(PixelDecoderConfig(**shape)))
    dit = DiT(DiTConfig(8, 1, 64, 1, 1, max_frames=4))
    save_world_model(tmp_path / "m.safetensors", dit, FlowMatching(steps=2), space, ABOUT)
    model, frames = WorldModel(tmp_path / "m.safetensors", "cpu"), torch.rand(1, 2, 16, 16, 3)
    z = space.encode(frames)
    assert torch.equal(model.encode(frames), z) and z.shape == (1, 2, 2, 2, 8)
    assert torch.equal(model.decode(z), space.decode(z))
    assert model.space.fingerprint == space.fingerprint != encoder.fingerprint
    two = LatentSpace(encoder, adapter, space.pixel_decoder, num_views=2)
    views = two.decode(two.encode(torch.stack((frames, frames.flip(2)), 1)))
    assert torch.allclose(views[:, 0], space.decode(z), atol=1e-5)  # float32, other batches
    assert torch.allclose(views[:, 1], space.decode(space.encode(frames.flip(2))), atol=1e-5)


class Pairs(torch.nn.Module):
    """An encoder of two frames in one latent: their mean."""

    temporal_stride, latent_dim, has_decoder, fingerprint = 2, 192, True, "pairs"

    def __init__(self):
        super().__init__()
        self.single = create_autoencoder(EncoderConfig("pixels", patch_size=8))

    def encode(self, frames):
        return self.single.encode(frames.unflatten(-4, (-1, 2)).mean(-4))

    def decode(self, z):
        return self.single.decode(z).repeat_interleave(2, -4)


def test_two_frame_latents_take_two_actions(monkeypatch):
    dit = DiT(DiTConfig(192, 1, 64, 1, 1, action_dim=20, max_frames=3))
    model = WorldModel((dit, FlowMatching(steps=2), LatentSpace(Pairs()), ABOUT), "cpu")
    seen, extend = [], FlowMatching.extend

    def spy(self, dit, z, actions, noise, **options):
        seen.append(actions[0, :, ::10].tolist())
        return extend(self, dit, z, actions, noise, **options)

    monkeypatch.setattr(FlowMatching, "extend", spy)
    actions = torch.arange(1.0, 9.0)[:, None].expand(8, 10)
    model.reset(torch.rand(4, 16, 16, 3), actions[:3])
    assert model.generate_chunk(actions[3:5]).shape == (2, 16, 16, 3)
    model.generate_chunk(actions[5:7])
    assert seen == [[[1, 2], [3, 4], [5, 5]], [[1, 2], [3, 4], [5, 6], [7, 7]]]
    model.space.decode = lambda z: z.diff(dim=1, prepend=0 * z[:, :1]).repeat_interleave(2, 1)
    known = model.z[0, -1]  # what this decoder makes of a latent depends on the one before
    assert torch.equal(model.generate_chunk(actions[5:7])[0], model.z[0, -1] - known)
    for call, complaint in (
        (lambda: model.step(actions[0]), "multiple"),
        (lambda: model.reset(torch.rand(3, 16, 16, 3)), "multiple"),
    ):
        with pytest.raises(InputError, match=complaint):
            call()


def test_new_frames_of_a_pair_decoder_are_those_of_the_whole_clip():
    shape = {"latent_dim": 192, "base_channels": 32, "channel_multipliers": (1,)}
    decoder = PixelDecoder(PixelDecoderConfig(**shape, temporal_upsample=True))
    space, z = LatentSpace(Pairs(), None, decoder), torch.randn(1, 5, 2, 2, 192)
    whole = space.decode(z)
    for n in (1, 3):
        new = space.decode_new(z, n)
        assert torch.allclose(new, whole[:, 2 * n :], atol=1e-5)  # float32, other batches
    assert not torch.allclose(space.decode(z[:, 3:])[:, :1], whole[:, 6:7], atol=1e-3)


def test_a_diverged_model_dreams_nothing_and_stays_where_it_was():
    dit = DiT(DiTConfig(192, 1, 64, 1, 1, max_frames=3))
    space = LatentSpace(create_autoencoder(EncoderConfig("pixels", patch_size=8)))
    model = WorldModel((dit, FlowMatching(steps=2), space, ABOUT), "cpu")
    model.reset(torch.rand(2, 16, 16, 3))
    torch.nn.init.constant_(dit.final_layer["linear"].bias, math.nan)
    with pytest.raises(InputError, match="diverged"):
        model.generate_chunk(torch.zeros(1, 10))
    assert model.z.shape[1] == 2 and model.cache is None  # as after the reset


@pytest.mark.parametrize("method", ["cem", "gradient", "grid"])
def test_a_diverged_model_plans_nothing(method):
    def lost(z, tau, actions):
        return z * math.nan + 0 * actions.sum()

    noise, start = torch.randn(1, 2, 2, 4), torch.zeros(1, 10)
    known = torch.rand(2, 2, 2, 4), torch.zeros(1, 10)
    cost = candidate_cost(lost, FlowMatching(steps=1), *known, torch.rand(1, 2, 2, 4), noise)
    with pytest.raises(InputError, match="diverged"):
        PLANNERS[method](cost, start)
    some = torch.tensor([math.nan, 2.0, math.inf, 1.0])
    assert cheapest(some, torch.arange(4))[0] == 3


def test_tokens_keep_their_view_through_a_rollout(tmp_path):
    """Every cell carries its view and place, and a model that adds one to the newest frame."""
    V, h, w = 3, 2, 4
    cells = torch.stack(torch.meshgrid(*map(torch.arange, (V, h, w)), indexing="ij"), -1).float()
    z = merge_views(cells[None, :, None])

    def count_up(z_tau, tau, actions):
        target = torch.cat((z_tau[:, :1], z_tau[:, :-1] + 1), 1)
        return (z_tau - target) / tau[..., None, None, None].clamp(min=1e-6)

    out = FlowMatching().rollout(count_up, z, torch.zeros(1, 4, 10), 3)
    views = split_views(out, V)  # (1, V, T, h, w, 3)
    for t in range(4):
        torch.testing.assert_close(views[0, :, t], cells + t, atol=1e-4, rtol=0)


def test_views_keep_their_places(tmp_path):
    model = WorldModel(make(tmp_path / "m.safetensors", views=3), device="cpu")
    frames = torch.rand(2, 3, 2, 16, 16, 3)
    assert torch.allclose(model.decode(model.encode(frames)), frames, atol=1e-5)
    model.reset(frames)
    assert model.generate_chunk(torch.randn(2, 2, 10)).shape == (2, 3, 2, 16, 16, 3)
    model.reset(frames[0])
    assert model.step(torch.randn(10)).shape == (3, 16, 16, 3)
    with pytest.raises(InputError, match="3 views"):
        model.reset(frames[:, :2])


def test_a_policy_runs_inside_the_model(model):
    frames = torch.rand(2, 1, 16, 16, 3)
    video, actions = model.rollout_policy(
        lambda newest: newest.mean((1, 2, 3))[:, None].expand(2, 10), frames, 3, generator=seed()
    )
    assert video.shape == (2, 4, 16, 16, 3) and actions.shape == (2, 3, 10)
    assert torch.allclose(actions[:, 1, 0], video[:, 1].mean((1, 2, 3)))  # it saw the dream
    chunks = model.rollout_policy(lambda newest: torch.zeros(2, 10), frames[0], 5)
    assert chunks[0].shape == (6, 16, 16, 3) and chunks[1].shape == (5, 10)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: m.step(np.zeros(10)), "reset"),
        (lambda m: m.reset(torch.rand(16, 16, 3)), "give"),
        (lambda m: m.reset(torch.rand(1, 32, 16, 3)), "32, 16"),
        (lambda m: m.reset(torch.rand(1, 16, 16, 3) * 255), "0, 1"),
        (lambda m: m.reset(torch.rand(3, 16, 16, 3), torch.zeros(1, 10)), "give 2"),
        (lambda m: (m.reset(torch.rand(1, 16, 16, 3)), m.step(torch.zeros(7))), "10"),
        (lambda m: (m.reset(torch.rand(1, 16, 16, 3)), m.step(torch.full((10,), np.nan))), "NaN"),
        (lambda m: m.rollout(torch.rand(2, 16, 16, 3), torch.zeros(2, 10)), "give more"),
        (lambda m: m.reset(torch.rand(1, 16, 16, 3), torch.zeros(1, 10)), "give 0"),
        (lambda m: m.rollout_policy(len, torch.rand(1, 16, 16, 3), 0), "at least once"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(model, call, complaint):
    with pytest.raises(InputError, match=complaint):
        call(model)


def test_a_refused_reset_changes_nothing(model):
    model.reset(torch.rand(2, 16, 16, 3))
    before = model.state()
    with pytest.raises(InputError, match="give 0"):
        model.reset(torch.rand(1, 1, 16, 16, 3), torch.zeros(1, 3, 10))
    assert torch.equal(model.z, before[0]) and torch.equal(model.actions, before[1])
    action, noise = np.zeros(10), np.zeros((1, 1, *model.z.shape[2:]))
    frame = model.step(action, noise=noise)  # NumPy's arrays serve everywhere
    model.restore(before)
    assert torch.equal(model.step(torch.zeros(10), noise=torch.zeros(noise.shape)), frame)


@pytest.mark.parametrize("wrong", [None, 3, [], "x", {"image_size": "16"}, {"stride": -1}])
@pytest.mark.parametrize("field", ["objective", "data", "encoder_config", "dit_config"])
def test_damaged_metadata_is_refused_by_name(tmp_path, model, field, wrong):
    tensors, metadata = load_tensors(tmp_path / "world_model.safetensors")
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, metadata | {field: wrong})
    with pytest.raises(InputError, match="x.safetensors: "):
        WorldModel(path)
    for name, part in (("latent_stats", "encoder_config"), ("steps", "objective")):
        save_tensors(path, tensors, metadata | {part: metadata[part] | {name: 1.5}})
        with pytest.raises(InputError, match=f"x.safetensors: {name} is 1.5, not "):
            WorldModel(path)
    if field == "dit_config":
        save_tensors(path, tensors, metadata | {field: wrong})
        with pytest.raises(InputError, match="x.safetensors: "):
            load_dit(path)


@pytest.mark.parametrize("scale", [{"std": 192}, {"mean": 192}, {"mean": 3, "std": 192}])
def test_half_a_latent_scale_is_refused(tmp_path, model, scale):
    tensors, metadata = load_tensors(tmp_path / "world_model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith("latent.")}
    tensors |= {f"latent.{name}": torch.ones(n) for name, n in scale.items()}
    save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(InputError, match="x.safetensors: "):
        WorldModel(tmp_path / "x.safetensors")


def test_a_file_of_another_encoder_or_kind_is_refused(tmp_path, model):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="not a world model"):
        WorldModel(tmp_path / "x.safetensors")
    path = make(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated"):
        WorldModel(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WorldModel(tmp_path / "nowhere.safetensors")


def test_actions_are_mapped_as_in_training(model):
    raw = np.random.default_rng(0).uniform(-0.05, 0.05, (3, 7))
    for name in ("bridge", "viola"):
        model.clip_format = ABOUT | {"action_mapping": name}
        assert np.array_equal(model.map_actions(raw).numpy(), map_actions(raw, name))


# ------------------------------------------------------------------------------------------------
# The command line.


@pytest.mark.parametrize("views", [1, 2])
def test_the_command_line_dreams_from_files_and_from_typed_actions(tmp_path, monkeypatch, views):
    path, gif = make(tmp_path / "m.safetensors", views=views), tmp_path / "out.gif"
    picture = np.random.default_rng(0).integers(0, 256, (40, 40 * views, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")  # other sizes are resized, view by view
    raw = np.random.default_rng(1).uniform(-0.05, 0.05, (3, 7))
    np.savetxt(tmp_path / "a.txt", raw)
    np.save(tmp_path / "a.npy", raw)
    np.save(tmp_path / "units.npy", map_actions(raw, "bridge"))

    def run(*words, typed=""):
        gif.unlink(missing_ok=True)
        words = ["--checkpoint", str(path), "--image", str(tmp_path / "x.png"), *map(str, words)]
        monkeypatch.setattr("sys.argv", ["world_model.py", *words, "--output", str(gif)])
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        world_model.main()
        with Image.open(gif) as opened:
            assert opened.size == (16 * views, 16) and opened.n_frames in (2, 4)
        return gif.read_bytes()

    text = run("--actions", tmp_path / "a.txt", "--device", "cpu")
    assert run("--actions", tmp_path / "a.npy") == text
    assert run("--actions", tmp_path / "units.npy", "--raw", "false") == text
    np.save(tmp_path / "one.npy", raw[0])  # without an axis of time
    one = run("--actions", tmp_path / "one.npy")
    lines = "".join(" ".join(map(str, a)) + "\n" for a in raw)
    assert run(typed=lines.partition("\n")[0]) == one
    assert run(typed=lines.replace(" ", ", ")) == text
    for end in ("", "\n"):  # the end of the input, or an empty line
        assert run(typed=lines + end) == text
    (tmp_path / "words.txt").write_text("up up left")
    for words, complaint in (
        (["--actions", tmp_path / "words.txt"], "words.txt"),
        (["--actions", tmp_path / "none.txt"], "none.txt"),
        (["--image", tmp_path / "none.png"], "none.png"),
        (["--image", tmp_path / "words.txt"], "give another picture"),
    ):
        with pytest.raises(InputError, match=complaint):
            run(*words)
    for typed, fault in (("left 3\n", "typed"), ("", "typed: no action")):
        with pytest.raises(InputError, match=fault):
            run(typed=typed)


# ------------------------------------------------------------------------------------------------
# Planning.


def linear_world(k: int):
    """A world whose next state is the last plus B a: the best actions are known."""
    torch.manual_seed(3)
    B, truth = torch.linalg.qr(torch.randn(7, 7))[0], torch.rand(k, 10) * 2 - 1

    def states(actions):
        return (actions[..., :7] @ B).cumsum(-2)

    return truth, lambda actions: (states(actions) - states(truth)).square().mean((1, 2))


@pytest.mark.parametrize(("k", "tolerance"), [(1, 0.02), (4, 0.15)])
def test_cem_finds_the_action_of_a_linear_world(k, tolerance):
    truth, cost = linear_world(k)
    start = torch.zeros(k, 10)
    options = {"population": 1000, "elites": 100, "iterations": 40, "generator": seed()}
    found, value = plan_cem(cost, start, **options)
    # 28 numbers at once: the Gaussian has shrunk before the least sensitive ones have settled
    assert (found - truth)[:, :7].square().mean().sqrt() < tolerance
    assert value < 0.02 * cost(start[None]) and torch.allclose(value, cost(found[None]))
    assert found[:, 7:].eq(0).all()  # not searched


def test_gradient_and_grid_lower_the_cost():
    truth, cost = linear_world(1)
    start = truth + 0.3 * torch.randn(1, 10)
    found, value = plan_gradient(cost, start, steps=400)
    assert value < 1e-2 * cost(start[None]) and torch.equal(found[:, 7:], start[:, 7:])
    snapped = torch.tensor([[-2.0, 0.0, 2.0, 0, 0, 0, 0, 0, 0, 0]])
    found, value = plan_grid(
        lambda a: (a - snapped).square().sum((1, 2)), torch.zeros(1, 10), points=5
    )
    assert torch.equal(found, snapped) and value == 0
    with pytest.raises(InputError, match="candidates"):
        plan_grid(cost, torch.zeros(4, 10), dims=range(7))
    with pytest.raises(InputError, match="elites"):
        plan_cem(cost, truth, population=4, elites=5)


def test_candidates_share_their_context_and_cost_eleven_passes_a_frame(model):
    torch.manual_seed(0)
    objective = dataclasses.replace(model.objective, steps=10)
    context, known = torch.randn(2, 2, 2, 192), torch.randn(1, 10)
    target, noise = torch.randn(3, 2, 2, 192), torch.randn(3, 2, 2, 192)
    passes = count_passes(model.dit)
    cost = candidate_cost(model.dit, objective, context, known, target, noise)
    assert sum(passes) == 1  # the one frame before the newest, for all candidates
    candidates = torch.randn(4, 3, 10)
    cached = cost(candidates)
    assert sum(passes) == 1 + 4 * 11 * 3
    uncached = cost(candidates.requires_grad_(True))
    assert torch.allclose(cached, uncached, rtol=1e-4)  # float32 over 30 steps


def test_a_long_context_is_cut_to_its_newest_frames_and_their_actions(model):
    context, known, noise = torch.randn(6, 2, 2, 192), torch.randn(5, 10), torch.randn(2, 2, 2, 192)
    fixed, candidates = (torch.randn(2, 2, 2, 192), noise), torch.randn(4, 2, 10)
    dit, objective = model.dit, model.objective
    long = candidate_cost(dit, objective, context, known, *fixed)(candidates)
    short = candidate_cost(dit, objective, context[-3:], known[-2:], *fixed)(candidates)
    assert torch.equal(long, short)  # the window of 5 holds 3 known frames beside 2 dreamed ones


def test_the_last_action_stands_beside_the_last_dreamed_frame():
    seen, z, noise = [], torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 3)

    def still(z, tau, actions):
        seen.append(actions)
        return torch.zeros_like(z)

    known, candidates, last = torch.randn(1, 10), torch.randn(4, 2, 10), torch.randn(10)
    for given, expected in ((last, last.expand(4, 10)), (None, candidates[:, -1])):
        candidate_cost(still, FlowMatching(steps=1), z, known, noise, noise, given)(candidates)
        assert torch.equal(seen[-1][:, -1], expected)
        assert torch.equal(seen[-1][:, 1:3], candidates)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cem", {"population": 32, "elites": 4, "iterations": 3}),
        ("gradient", {"steps": 8, "lr": 0.1}),
        ("grid", {"dims": range(2), "points": 3}),
    ],
)
def test_each_planner_dreams_nearer_to_the_goal_than_where_it_began(model, method, options):
    frames, noise = torch.rand(2, 16, 16, 3), torch.randn(1, 2, 2, 2, 192, generator=seed())

    def end(actions):
        model.reset(frames)
        frame = model.generate_chunk(actions, noise=noise)[-1]
        return frame, model.z[0, -1]

    goal, _ = end(torch.tensor([[2.0, -2.0], [0.0, 2.0]]).repeat(1, 5))
    model.reset(frames)
    plan = model.plan(goal, 2, method, generator=seed(), **options)
    assert plan.shape == (2, 10) and plan.abs().max() <= 2
    assert torch.equal(plan, model.plan(goal, 2, method, generator=seed(), **options))
    far, near = (
        (end(a)[1] - model.encode(goal[None])[0]).norm() for a in (plan.new_zeros(2, 10), plan)
    )
    assert near < far  # the noise of the search is the one dreamed with


def test_plan_refuses_what_it_cannot_search(model):
    model.reset(torch.rand(3, 2, 16, 16, 3))
    with pytest.raises(InputError, match="one sample"):
        model.plan(torch.rand(16, 16, 3), 1)
    model.reset(torch.rand(2, 16, 16, 3))
    with pytest.raises(InputError, match="method"):
        model.plan(torch.rand(16, 16, 3), 1, method="guess")
