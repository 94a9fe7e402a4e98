"""Laws of the DiT: causality, offsets, views, frame-by-frame equality, released weights."""

import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import InputError, save_tensors
from dit import (
    DIT_SIZES,
    DiT,
    DiTConfig,
    attend_joint,
    attend_time,
    build_rope,
    load_dit,
    merge_views,
    project,
    qk_norm_rope,
    split_views,
)

SMALL = dict(in_channels=6, dim=48, depth=2, heads=2, max_frames=5)
VARIANTS = {
    "factored": {},
    "joint": dict(temporal_mode="joint"),
    "wide": dict(wide_head=True, head_dim=32),
    "patch": dict(patch_size=2),
    "views": dict(num_views=2),
    "official": dict(num_views=2, view_rope="official"),
}


def random_dit(**fields) -> DiT:
    """Build a small DiT in which no weight is zero."""
    dit = DiT(DiTConfig(**SMALL | fields)).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def clip(B: int = 2, T: int = 5, h: int = 4, w: int = 8, C: int = 6):
    return torch.randn(B, T, h, w, C), torch.rand(B, T), torch.randn(B, T, 10)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate without normalising."""
    return qk_norm_rope(x, table) * x.square().mean(-1, keepdim=True).sqrt()


# -- released weights


def golden(shared, name: str) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(x) for key, x in np.load(shared / "golden" / name).items()}


def test_released_weights_give_the_released_velocity(shared):
    case, dit = golden(shared, "dit_wide.npz"), load_dit(shared / "golden/dit_wide.pt")
    with torch.no_grad():
        v = dit(case["z"], case["tau"], case["a"])
        v_null = dit(case["z"], case["tau"], case["a"], torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(v, case["v"], atol=1e-5, rtol=0)  # float32 in another order
    torch.testing.assert_close(v_null, case["v_null"], atol=1e-5, rtol=0)


def plain_rotate(x, angles):
    x0, x1 = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)


def reference(state: dict, c: DiTConfig, z, tau, actions) -> torch.Tensor:
    """Compute a DiT from its released keys as the paper describes it: one head, token and mask at
    a time, nothing shared with dit.py."""
    (B, T, h, w, C), p, V, E = z.shape, c.patch_size, c.num_views, c.dim // c.heads
    h, w = h // p, w // p

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def rms(x, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def angles(places, widths):  # every axis has its own half and frequencies
        parts = []
        for place, width in zip(places, widths, strict=True):
            half = width // 2
            parts.append(place * 10000 ** (-torch.arange(half) / half))
        parts.append(torch.zeros(E // 2 - sum(map(len, parts))))  # the rest is not rotated
        return torch.cat(parts)

    def space(row, column):
        view, x = divmod(column, w // V)
        if c.view_rope == "official" and V > 1:
            E_view = E // 3 - E // 3 % 2
            E_h = (E - E_view) // 2 - (E - E_view) // 2 % 2
            return angles((row, column // V, column % V), (E_h, E - E_view - E_h, E_view))
        return angles((row, x), (E // 2, E // 2)) + angles((view,), (E,))

    def time(t, row, column):
        if c.temporal_mode == "factored":
            return angles((t,), (E,))
        third = E // 6 * 2  # 60 of 64 channels
        if c.view_rope == "official":
            return angles((t, row, column), (third,) * 3)
        view, x = divmod(column, w // V)
        return angles((t, row, x), (third,) * 3) + angles((view,), (E,))

    cells = [(row, column) for row in range(h) for column in range(w)]
    turn_s = torch.stack([space(*cell) for _ in range(T) for cell in cells])
    turn_t = torch.stack([time(t, *cell) for t in range(T) for cell in cells])
    frame = torch.arange(T).repeat_interleave(h * w)
    patch = torch.arange(h * w).repeat(T)
    see_s = frame[:, None] == frame
    see_t = frame[:, None] >= frame
    if c.temporal_mode == "factored":
        see_t &= patch[:, None] == patch

    def block(name, x, cond, turn, see):
        mod = linear(f"{name}.adaLN_modulation.1", F.silu(cond)).chunk(6, -1)
        y = rms(x, 1e-6) * (1 + mod[1]) + mod[0]
        heads = []
        for q, k, v in zip(
            *(y.split(E, -1) for y in linear(f"{name}.attn.qkv_proj", y).chunk(3, -1)), strict=True
        ):
            q, k = (plain_rotate(rms(y, 1.19e-7), turn) for y in (q, k))
            weights = (q @ k.mT / E**0.5).masked_fill(~see, -torch.inf).softmax(-1)
            heads.append(weights @ v)
        x = x + mod[2] * linear(f"{name}.attn.out_proj", torch.cat(heads, -1))
        y = rms(x, 1e-6) * (1 + mod[4]) + mod[3]
        gate, value = linear(f"{name}.ffwd.w12", y).chunk(2, -1)
        return x + mod[5] * linear(f"{name}.ffwd.w3", F.silu(gate) * value)

    waves = 1000 * tau[..., None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    temb = torch.cat((waves.cos(), waves.sin()), -1)
    temb = linear("timestep_mlp.2", F.silu(linear("timestep_mlp.0", temb)))
    cond = temb + linear("action_embedder", actions)
    temb, cond = (y.repeat_interleave(h * w, 1) for y in (temb, cond))  # per token
    pixels = z.flatten(0, 1).movedim(-1, 1)
    x = F.conv2d(pixels, state["x_proj.weight"], state["x_proj.bias"], stride=p)
    x = x.flatten(2).mT.reshape(B, T * h * w, -1)
    for i in range(c.depth):
        x = block(f"blocks.{i}.s_block", x, cond, turn_s, see_s)
        x = block(f"blocks.{i}.t_block", x, cond, turn_t, see_t)
    name = "head_final_layer" if c.wide_head else "final_layer"
    if c.wide_head:
        x = linear("s_projector", F.silu(x + temb))
        cond = x.unflatten(1, (T, -1)).mean(2).repeat_interleave(h * w, 1)
    shift, scale = linear(f"{name}.adaLN_modulation.1", F.silu(cond)).chunk(2, -1)
    x = linear(f"{name}.linear", rms(x, 1e-6) * (1 + scale) + shift)
    v = torch.zeros_like(z)
    for t in range(T):
        for i, (row, column) in enumerate(cells):
            token = x[:, t * h * w + i].view(B, p, p, C)
            v[:, t, row * p : row * p + p, column * p : column * p + p] = token
    return v


@pytest.mark.parametrize("mode", ["factored", "joint"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(dim=128, heads=2),
        dict(dim=144, heads=2, wide_head=True, head_dim=40),
        dict(dim=64, heads=1, patch_size=2, action_dim=20),
        dict(dim=64, heads=1, num_views=2, wide_head=True, head_dim=40),
        dict(dim=64, heads=1, num_views=2, view_rope="official"),
        dict(dim=72, heads=1, num_views=4, view_rope="official"),
    ],
    ids=["plain", "wide 72", "patch", "additive", "official", "official 72"],
)
def test_the_model_is_the_one_of_the_paper(mode, fields):
    config = DiTConfig(**SMALL | dict(temporal_mode=mode) | fields)
    dit, (z, tau, actions) = random_dit(**asdict(config)), clip(T=3)
    actions = torch.randn(2, 3, config.action_dim)
    state = dict(dit.state_dict())
    with torch.no_grad():
        expected = reference(state, config, z, tau, actions)
        torch.testing.assert_close(dit(z, tau, actions), expected, atol=2e-5, rtol=1e-4)
        null = torch.zeros_like(actions)
        null[..., -1] = 1  # of 20 for two-frame latents too
        expected = reference(state, config, z, tau, null)
        v = dit(z, tau, actions, torch.ones(2, dtype=torch.bool))
        torch.testing.assert_close(v, expected, atol=2e-5, rtol=1e-4)


def released(config: DiTConfig) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(x) for name, x in DiT(config).state_dict().items()}


@pytest.mark.parametrize("box", ["ema", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_any_released_container_loads(tmp_path, box, prefix, wide):
    state = released(DiTConfig(5, 2, 64, 3, 1, action_dim=20, wide_head=wide, head_dim=24))
    content = {prefix + name: x for name, x in state.items()}
    torch.save({box: content, "step": 3} if box else content, tmp_path / "dit.pt")
    dit = load_dit(tmp_path / "dit.pt", max_frames=7, temporal_mode="joint")
    assert dit.config == DiTConfig(
        5, 2, 64, 3, 1, 20, 7, wide, 24 if wide else 2048, temporal_mode="joint"
    )
    assert not dit.training
    for name, x in dit.state_dict().items():
        assert torch.equal(x, state[name]), name


def test_ema_is_preferred_to_model(tmp_path):
    config = DiTConfig(5, 1, 64, 1, 1)
    ema, model = released(config), released(config)
    torch.save({"model": model, "ema": ema}, tmp_path / "dit.pt")
    assert torch.equal(load_dit(tmp_path / "dit.pt").x_proj.bias, ema["x_proj.bias"])


@pytest.mark.parametrize("dim, heads", [(128, 2), (384, 6), (768, 12), (1152, 16)])
def test_heads_follow_the_width(tmp_path, dim, heads):
    torch.save(released(DiTConfig(2, 1, dim, 1, heads)), tmp_path / "dit.pt")
    assert load_dit(tmp_path / "dit.pt").config.heads == heads


def damage(state: dict, how: str) -> object:
    """Spoil a state dict in one way."""
    name = "blocks.0.t_block.attn.qkv_proj.weight"
    wrong = {
        "leftover": state | {"extra.weight": torch.zeros(2)},
        "both heads": state | {"s_projector.weight": torch.zeros(9, 64)},
        "missing": {key: x for key, x in state.items() if key != name},
        "a layer short": {key: x for key, x in state.items() if "blocks.0." not in key},
        "transposed": state | {name: state[name].t()},
        "integers": state | {name: state[name].long()},
        "a number inside": state | {"step": 3},
        "two sets": state | {"module." + key: x for key, x in state.items()},
        "inside and beside": state | {"ema": state},
        "unknown box": {"state_dict": state},
        "empty": {"ema": {}},
        "a list": [state],
    }
    return wrong[how]


@pytest.mark.parametrize(
    "how",
    "leftover|both heads|missing|a layer short|transposed|integers|a number inside|two sets|"
    "inside and beside|unknown box|empty|a list".split("|"),
)
def test_a_damaged_checkpoint_does_not_load(tmp_path, how):
    state = released(DiTConfig(5, 1, 64, 2, 1))
    torch.save(damage(state, how), tmp_path / "dit.pt")
    with pytest.raises(InputError, match="dit.pt"):
        load_dit(tmp_path / "dit.pt")


def test_a_truncated_or_absent_file_does_not_load(tmp_path):
    torch.save(released(DiTConfig(5, 1, 64, 1, 1)), tmp_path / "dit.pt")
    content = (tmp_path / "dit.pt").read_bytes()
    (tmp_path / "dit.pt").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match="truncated"):
        load_dit(tmp_path / "dit.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dit(tmp_path / "other.pt")


def test_a_flipped_bit_in_a_released_file_is_noticed(tmp_path):
    torch.save(released(DiTConfig(5, 1, 64, 1, 1)), tmp_path / "dit.pt")
    content = bytearray((tmp_path / "dit.pt").read_bytes())
    content[len(content) // 2] ^= 8  # inside a weight: torch would not see it
    (tmp_path / "dit.pt").write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        load_dit(tmp_path / "dit.pt")


def test_a_file_of_the_format_before_zip_loads(tmp_path):
    state = released(DiTConfig(5, 1, 64, 1, 1))
    torch.save(state, tmp_path / "dit.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_dit(tmp_path / "dit.pt").x_proj.weight, state["x_proj.weight"])


def test_sizes_that_no_memory_holds_are_refused_by_the_shapes(tmp_path):
    tensors = {f"dit.{k}": v for k, v in released(DiTConfig(5, 1, 64, 1, 1)).items()}
    fields = asdict(DiTConfig(5, 1, 64, 1, 1))
    for change in ({"dim": 10**6}, {"depth": 2.5}, {"num_views": "3"}):
        save_tensors(tmp_path / "x.safetensors", tensors, {"dit_config": fields | change})
        with pytest.raises(InputError, match="x.safetensors"):
            load_dit(tmp_path / "x.safetensors")


def test_overrides_fill_in_but_never_contradict(tmp_path):
    torch.save(released(DiTConfig(5, 1, 96, 1, 4)), tmp_path / "dit.pt")
    with pytest.raises(InputError, match="heads"):
        load_dit(tmp_path / "dit.pt")  # 96 is no multiple of 64
    assert load_dit(tmp_path / "dit.pt", heads=4, dim=96).config.heads == 4
    for wrong in (dict(dim=64), dict(depth=2), dict(wide_head=True), dict(colour="red")):
        with pytest.raises(InputError, match="dit.pt"):
            load_dit(tmp_path / "dit.pt", **dict(heads=4) | wrong)


def test_our_file_knows_its_config(tmp_path):
    dit = random_dit(temporal_mode="joint", num_views=2, max_frames=3)
    path = tmp_path / "world_model.safetensors"
    tensors = {f"dit.{name}": x for name, x in dit.state_dict().items()}
    metadata = {"dit_config": asdict(dit.config)}
    save_tensors(path, tensors | {"adapter.weight": torch.zeros(2)}, metadata)
    loaded = load_dit(path, temporal_mode="joint")
    assert loaded.config == dit.config
    inputs = clip(T=3)
    assert torch.equal(loaded(*inputs), dit(*inputs))
    for wrong in (dict(temporal_mode="factored"), dict(max_frames=10), dict(view_rope="official")):
        with pytest.raises(InputError, match=next(iter(wrong))):
            load_dit(path, **wrong)
    save_tensors(path, tensors | {"dit.extra": torch.zeros(2)}, metadata)
    with pytest.raises(InputError, match="extra"):
        load_dit(path)


# -- sizes and initial state


def test_the_size_table_is_the_papers():
    out = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "dit.py"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    table = [line.split() for line in out.splitlines() if line.startswith("DiT-")]
    found = {(row[0], " ".join(row[1:-2])): (float(row[-2]), float(row[-1])) for row in table}
    columns = ["C= 16 p=2", "C= 96 p=1", "C= 96 p=1 wide", "C=1024 p=1 wide", "C=1152 p=1 wide"]
    paper = {
        "DiT-S": [64.420, 64.445, 73.490, 75.748, 76.059],
        "DiT-B": [257.126, 257.176, 266.085, 268.699, 269.060],
        "DiT-L": [910.082, 910.148, 918.639, 921.490, 921.884],
        "DiT-XL": [1343.023, 1343.097, 1351.280, 1354.251, 1354.661],
    }
    for size, millions in paper.items():
        for column, value in zip(columns, millions, strict=True):
            assert abs(found[size, column][0] - value) < 1e-3, (size, column)
    for column, gflop in zip(columns, [316.5, 316.5, None, 318.7, 318.8], strict=True):
        if gflop:  # the paper's counts, to the differences that its rounding and rule explain
            assert abs(found["DiT-L", column][1] - gflop) < 0.7


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity(fields):
    dit = DiT(DiTConfig(**SMALL | fields))
    assert torch.equal(dit(*clip()), torch.zeros(2, 5, 4, 8, 6))
    x, modulation = torch.randn(2, 5, 32, 48), torch.zeros(2, 5, 1, 6 * 48)
    rope = build_rope(dit.config, 0, 5, 4, 8, x.device)[0][:, :1]
    block = dit.blocks[0]["s_block"]
    assert torch.equal(block(x, modulation, rope, lambda q, k, v: v), x)


def test_initial_weights_are_xavier_and_normal():
    dit = DiT(DiTConfig(96, 2, **DIT_SIZES["S"]))
    bound = (6 / (384 + 96 * 4)) ** 0.5  # the patch weight counts as a flat matrix
    assert 0.99 * bound < dit.x_proj.weight.abs().max() <= bound
    qkv = dit.blocks[3]["t_block"].attn.qkv_proj
    assert qkv.bias is None
    assert 0.99 < qkv.weight.abs().max() / (6 / (384 + 3 * 384)) ** 0.5 <= 1
    assert abs(dit.timestep_mlp[0].weight.std() - 0.02) < 1e-3
    assert dit.blocks[0]["s_block"].ffwd.w3.in_features == int(8 * 384 / 3)


# -- laws


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_future_frames_never_change_the_past(fields):
    dit, (z, tau, actions) = random_dit(**fields), clip()
    before = dit(z, tau, actions)
    z[:, 2:], tau[:, 2:], actions[:, 2:] = 9.0, 0.9, -3.0
    after = dit(z, tau, actions)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2:], before[:, 2:])


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_past_changes_the_future(fields):
    dit, (z, tau, actions) = random_dit(**fields), clip()
    before = dit(z, tau, actions)
    z[:, 0] += 1
    assert (dit(z, tau, actions) != before).flatten(2).any(-1).all()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_shorter_window_is_the_front_of_a_longer_one(fields):
    dit, (z, tau, actions) = random_dit(**fields), clip()
    whole = dit(z, tau, actions)
    for T in range(1, 6):
        part = dit(z[:, :T], tau[:, :T], actions[:, :T])
        torch.testing.assert_close(part, whole[:, :T], atol=1e-5, rtol=1e-5)  # other block sizes


def test_samples_of_a_batch_do_not_mix():
    dit, (z, tau, actions) = random_dit(), clip(B=3)
    alone = dit(z[1:2], tau[1:2], actions[1:2])
    torch.testing.assert_close(alone, dit(z, tau, actions)[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 72, 32, 34])
@pytest.mark.parametrize("joint", [False, True], ids=["factored", "joint"])
def test_logits_depend_on_offsets_only(head_dim, joint):
    mode = "joint" if joint else "factored"
    config = DiTConfig(1, 1, head_dim, 1, 1, max_frames=9, temporal_mode=mode)
    space, time = build_rope(config, 0, 6, 7, 8, torch.device("cpu"))
    q, k = torch.randn(2, head_dim)

    def logits(table):  # q . k between all pairs of tokens
        T, N = table.shape[:2]
        a, b = (rotate(x.expand(1, T, N, 1, head_dim), table).flatten(0, 3) for x in (q, k))
        return a @ b.t()

    grid = logits(space).view(7, 8, 7, 8)
    torch.testing.assert_close(grid[1:, 2:, 1:, 2:], grid[:-1, :-2, :-1, :-2], atol=1e-4, rtol=0)
    assert not torch.allclose(grid[0, 0, 0, :4], grid[0, 0, 1, :4], atol=1e-2)
    frames = logits(time).view(6, time.shape[1], 6, time.shape[1])
    torch.testing.assert_close(frames[1:, :, 1:], frames[:-1, :, :-1], atol=1e-4, rtol=0)
    later = logits(build_rope(config, 3, 6, 7, 8, torch.device("cpu"))[1])
    torch.testing.assert_close(later, logits(time), atol=1e-4, rtol=0)


def test_joint_rotation_leaves_the_indivisible_rest_alone():
    config = DiTConfig(1, 1, 64, 1, 1, temporal_mode="joint")
    time = build_rope(config, 0, 4, 3, 3, torch.device("cpu"))[1]
    assert (time[..., 30:, 0] == 1).all() and (time[..., 30:, 1] == 0).all()
    angle = torch.atan2(time[3, 0, 0, :10, 1], time[3, 0, 0, :10, 0])  # frame 3, row and column 0
    expected = torch.tensor([3 * 10000 ** (-i / 10) for i in range(10)])
    torch.testing.assert_close(angle, expected)
    assert (time[3, 0, 0, 10:30, 1] == 0).all()


def test_joint_attention_is_block_causal():
    q, k, v = torch.randn(3, 2, 4, 6, 2, 8)
    frame = torch.arange(24) // 6
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    mask = frame[:, None] >= frame
    expected = F.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(attend_joint(q, k, v).flatten(1, 2), expected)
    torch.testing.assert_close(attend_joint(q[:, 2:], k, v).flatten(1, 2), expected[:, 12:])


def test_temporal_attention_is_causal_per_patch():
    q, k, v = torch.randn(3, 2, 4, 6, 2, 8)
    logits = torch.einsum("btnhe,bsnhe->bnhts", q, k) / 8**0.5
    weights = logits.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
    expected = torch.einsum("bnhts,bsnhe->btnhe", weights, v)
    torch.testing.assert_close(attend_time(q, k, v).unflatten(2, (6, 2)), expected)


# -- views


def test_merge_and_split_are_inverse_and_tokens_keep_their_view():
    V, w = 3, 4
    z = torch.stack(torch.meshgrid(*map(torch.arange, (2, V, 5, 2, w)), indexing="ij"), -1)
    merged = merge_views(z)
    assert merged.shape == (2, 5, 2, V * w, 5)
    assert torch.equal(merged[0, 0, 0, :, 1], torch.arange(V).repeat_interleave(w))
    assert torch.equal(merged[0, 0, 0, :, 4], torch.arange(w).repeat(V))
    assert torch.equal(split_views(merged, V), z)
    with pytest.raises(InputError, match="views"):
        split_views(merged, 5)


@pytest.mark.parametrize("mode", ["factored", "joint"])
def test_additive_views_extend_the_single_view_model(mode):
    config = DiTConfig(1, 1, 64, 1, 1, temporal_mode=mode)
    cpu = torch.device("cpu")
    single = build_rope(config, 0, 3, 4, 5, cpu)
    triple = build_rope(replace(config, num_views=3), 0, 3, 4, 15, cpu)
    q, k = torch.randn(2, 64)
    for one, three in zip(single, triple, strict=True):
        if one.shape[1] == 1:  # time alone does not know views
            assert torch.equal(one, three)
            continue
        three = three.unflatten(1, (4, 3, 5)).movedim(2, 0).flatten(2, 3)  # (V, T, N, ...)
        assert torch.equal(three[0], one)
        logits = [
            torch.einsum("tnhe,snhe->tsn", rotate(q.expand(1, *x.shape[:3], 64), x)[0], y[0])
            for x in (one, *three)
            for y in [rotate(k.expand(1, *x.shape[:3], 64), x).roll(1, 2)]
        ]
        for inside in logits[1:]:
            torch.testing.assert_close(inside, logits[0], atol=1e-4, rtol=0)  # values near 10
        assert not torch.allclose(three[1], one, atol=1e-2)


def test_a_single_view_does_not_see_view_rope():
    cpu = torch.device("cpu")
    additive = build_rope(DiTConfig(1), 0, 3, 4, 5, cpu)
    official = build_rope(DiTConfig(1, view_rope="official"), 0, 3, 4, 5, cpu)
    assert all(map(torch.equal, additive, official))


@pytest.mark.parametrize("head_dim, split", [(64, (22, 22, 20)), (72, (24, 24, 24))])
def test_official_views_use_the_released_columns(head_dim, split):
    V, h, w = 3, 2, 4  # w columns a view
    config = DiTConfig(1, 1, head_dim, 1, 1, num_views=V, view_rope="official")
    space, time = build_rope(config, 0, 2, h, V * w, torch.device("cpu"))
    assert torch.equal(time, build_rope(replace(config, num_views=1), 0, 2, h, w, time.device)[1])
    x = torch.randn(head_dim)
    for row in range(h):
        for column in range(V * w):
            parts = x.split(split)
            places = (row, column // V, column % V)
            expected = torch.cat(
                [
                    plain_rotate(
                        part, place * 10000 ** (-torch.arange(len(part) // 2) / (len(part) // 2))
                    )
                    for part, place in zip(parts, places, strict=True)
                ]
            )
            table = space[:, row * V * w + column][:, None]
            turned = rotate(x.expand(1, 1, 1, 1, head_dim), table).flatten()
            torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_official_joint_blocks_count_columns_through_all_views():
    cpu, config = torch.device("cpu"), DiTConfig(1, 1, 64, 1, 1, temporal_mode="joint")
    official = build_rope(replace(config, num_views=3, view_rope="official"), 0, 2, 2, 12, cpu)[1]
    assert torch.equal(official, build_rope(config, 0, 2, 2, 12, cpu)[1])


# -- frame by frame


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_cached_frames_equal_the_whole_window(fields):
    dit, (z, tau, actions) = random_dit(**fields), clip()
    whole = dit(z, tau, actions)

    def modulations(t):
        return dit.modulations(tau[:, t : t + 1], actions[:, t : t + 1])

    for n in range(5):  # encode n frames at once, append the others one by one
        cache = dit.encode_context(z[:, :n], tau[:, :n], actions[:, :n])
        for t in range(n, 5):
            v = dit.denoise(z[:, t : t + 1], modulations(t), cache)
            torch.testing.assert_close(v, whole[:, t : t + 1], atol=1e-5, rtol=1e-5)
            if t < 4:
                known = z[:, t : t + 1], tau[:, t : t + 1], actions[:, t : t + 1]
                assert dit.encode_context(*known, cache) is cache


@torch.no_grad()
def test_known_frames_may_join_a_cache_in_any_portions():
    dit, (z, tau, actions) = random_dit(), clip()
    whole = dit(z, tau, actions)
    cache = None
    for part in (slice(0, 1), slice(1, 4)):
        cache = dit.encode_context(z[:, part], tau[:, part], actions[:, part], cache)
    v = dit.denoise(z[:, 4:5], dit.modulations(tau[:, 4:5], actions[:, 4:5]), cache)
    torch.testing.assert_close(v, whole[:, 4:5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expanded_cache_serves_candidates_and_can_be_used_again():
    dit, (z, tau, actions) = random_dit(), clip(B=2, T=4)
    shared = dit.encode_context(z[:, :2], tau[:, :2], actions[:, :2])
    for _ in range(2):
        cache, more = shared.repeat(3), torch.randn(6, 2, 10)
        repeated = [x.repeat_interleave(3, 0) for x in (z, tau)]
        dit.encode_context(*(x[:, 2:3] for x in repeated), more[:, :1], cache)
        v = dit.denoise(
            repeated[0][:, 3:4], dit.modulations(repeated[1][:, 3:4], more[:, 1:]), cache
        )
        beside = torch.cat((actions[:, :2].repeat_interleave(3, 0), more), 1)
        torch.testing.assert_close(v, dit(*repeated, beside)[:, 3:4], atol=1e-5, rtol=1e-5)
    assert shared.length == 2


def test_a_window_of_one_frame_has_no_context():
    dit, (z, tau, actions) = random_dit(max_frames=1), clip(T=1)
    cache = dit.encode_context(z[:, :0], tau[:, :0], actions[:, :0])
    torch.testing.assert_close(
        dit.denoise(z, dit.modulations(tau, actions), cache), dit(z, tau, actions)
    )


# -- training


def test_gradients_are_those_of_finite_differences():
    dit, (z, tau, actions) = random_dit(wide_head=True, head_dim=16).double(), clip(1, 3, 2, 2)
    z, actions = (x.double().requires_grad_() for x in (z, actions))
    weight = dit.blocks[0]["t_block"].attn.qkv_proj.weight
    v, direction = dit(z, tau, actions), torch.randn(1, 3, 2, 2, 6).double()
    grads = torch.autograd.grad((v * direction).sum(), (z, actions, weight))
    for x, grad in zip((z, actions, weight), grads, strict=True):
        step = 1e-3 * torch.randn_like(x)
        with torch.no_grad():
            x += step
            plus = (dit(z, tau, actions) * direction).sum()
            x -= 2 * step
            minus = (dit(z, tau, actions) * direction).sum()
            x += step
        # rotations and the norms of q and k are float32 in every precision
        torch.testing.assert_close((plus - minus) / 2, (grad * step).sum(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_pass_computes_again_what_the_forward_pass_computed(autocast):
    seen, weight = [], torch.randn(8, 4, requires_grad=True)

    def prologue(x):
        seen.append(project(torch.tanh, weight.t(), None, x))
        return seen[-1]

    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = project(prologue, weight, None, x)
    y.sum().backward()
    first, again = seen
    assert first.dtype == again.dtype == y.dtype
    assert torch.equal(first, again) and x.grad.isfinite().all()


def test_the_plain_implementation_of_the_benchmark_gives_the_same_gradients():
    from bench import plain_forward

    dit = random_dit()
    inputs = clip()
    gradients = []
    for forward in (dit, lambda *x: plain_forward(dit, *x)):
        dit.zero_grad()
        forward(*inputs).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in dit.named_parameters()})
    for name, grad in gradients[0].items():
        scale = gradients[1][name].abs().max()
        torch.testing.assert_close(grad / scale, gradients[1][name] / scale, atol=1e-4, rtol=0)


def test_actions_are_dropped_by_clip():
    dit, (z, tau, actions) = random_dit(), clip()
    drop = torch.tensor([True, False])
    null = torch.zeros_like(actions)
    null[..., -1] = 1
    mixed = dit(z, tau, actions, drop)
    torch.testing.assert_close(mixed[0], dit(z, tau, null)[0])
    torch.testing.assert_close(mixed[1], dit(z, tau, actions)[1])
    for share, expected in ((0.0, dit(z, tau, actions)), (1.0, dit(z, tau, null))):
        other = DiT(replace(dit.config, action_dropout=share)).train()
        other.load_state_dict(dit.state_dict())
        torch.testing.assert_close(other(z, tau, actions), expected)


def test_low_precision_stays_close():
    dit, inputs = random_dit(), clip()
    with torch.no_grad():
        exact = dit(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = dit(*inputs)
        assert autocast.dtype == torch.float32  # like the latents
        low = dit.bfloat16()(*inputs)
    for v in (autocast, low):
        assert (v - exact).norm() / exact.norm() < 0.05  # bfloat16 keeps 8 bits


# -- contracts


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(heads=5), "heads"),
        (dict(depth=0), "depth"),
        (dict(temporal_mode="both"), "temporal_mode"),
        (dict(view_rope="none"), "view_rope"),
        (dict(action_dropout=1.5), "action_dropout"),
    ],
)
def test_an_impossible_config_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        DiTConfig(**SMALL | fields)


def test_inputs_that_do_not_fit_are_refused():
    dit = random_dit(patch_size=2, num_views=2)
    for inputs, word in (
        (clip(T=6), "max_frames"),
        (clip(C=7), "channels"),
        (clip(h=5), "patches"),
        (clip(w=6), "views"),
        ((*clip()[:2], torch.randn(2, 5, 7)), "actions"),
        ((*clip()[:2], torch.randn(2, 4, 10)), "actions"),
    ):
        with pytest.raises(InputError, match=word):
            dit(*inputs)
    with pytest.raises(InputError, match="window"):
        dit.encode_context(*clip())


def test_a_full_cache_gives_up_its_oldest_frame_in_turn():
    dit = DiT(DiTConfig(4, 1, 64, 2, 1, max_frames=4)).eval()
    z, tau, actions = torch.randn(1, 8, 2, 2, 4), torch.full((1, 8), 0.01), torch.randn(1, 8, 10)
    cache = dit.encode_context(z[:, :3], tau[:, :3], actions[:, :3])
    for t, slot in zip(range(3, 8), (0, 1, 2, 0, 1), strict=True):
        before = cache.kv[0].clone()
        cache = dit.encode_context(z[:, t : t + 1], tau[:, :1], actions[:, t : t + 1], cache)
        changed = (cache.kv[0] != before)[:, 0].flatten(2).any(2).any(0)
        assert changed[:3].nonzero().flatten().tolist() == [slot]
