"""Adapters and the pixel decoder: released layout, laws of encode and decode, refused files."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from adapter import (
    AdapterConfig,
    PixelDecoder,
    PixelDecoderConfig,
    create_adapter,
    load_adapter,
    save_adapter,
)
from data import InputError, MissingFileError

FLAT = {
    "adapter_type": "svae",
    "adapter_latent_dim": 8,
    "adapter_num_heads": 4,
    "adapter_num_layers": 2,
    "adapter_intermediate_size": 48,
}
PROGRESSIVE = FLAT | {"adapter_progressive": True, "adapter_num_layers": 3}
REFINED = FLAT | {"adapter_latent_layers": 2}
MLP = {"adapter_type": "mlp", "adapter_latent_dim": 8}
PAINT = {
    "latent_dim": 8,
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "dropout": 0.0,
    "output_activation": "sigmoid",
    "temporal_upsample": False,
}
BLOCK = [
    f"{part}.{kind}"
    for part in (
        "attention.attention.query attention.attention.key attention.attention.value "
        "attention.output.dense intermediate.dense output.dense layernorm_before layernorm_after"
    ).split()
    for kind in ("weight", "bias")
]


def randomise(module):
    """Give every tensor values that a wrong reading would show: norms and biases too."""
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5
    return module


def make(values, input_dim=32):
    return randomise(create_adapter(AdapterConfig(**values), input_dim))


def released(path, adapter, values, paint=None, paint_values=None, prefix="", rename=None):
    """Write the official file layout."""
    file = {
        "adapter": {prefix + name: t for name, t in adapter.state_dict().items()},
        "adapter_config": values,
        "encoder_config": {"encoder_type": "vjepa2"},
        "step": 7,
    }
    if paint is not None:
        names = {n: n.replace(*rename) if rename else n for n in paint.state_dict()}
        file["pixel_decoder"] = {prefix + names[n]: t for n, t in paint.state_dict().items()}
        file["pixel_decoder_config"] = paint_values
    torch.save(file, path)
    return path


# ------------------------------------------------------------------------------------------------
# Agreement with the released weights


def test_golden_adapter_and_pixel_decoder_agree(shared):
    adapter, paint = load_adapter(shared / "golden" / "adapter_svae.pt")
    golden = {
        k: torch.from_numpy(v) for k, v in np.load(shared / "golden/adapter_svae.npz").items()
    }
    with torch.no_grad():
        u, rec = adapter.encode(golden["z"]), adapter.decode(golden["u"])
        rgb = paint(golden["u"])
    for ours, theirs in ((u, golden["u"]), (rec, golden["rec"]), (rgb, golden["rgb"])):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5  # float32, another order of summation


def test_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        models = {
            38.1: create_adapter(AdapterConfig(), 1024),
            46.4: create_adapter(AdapterConfig(), 1152),
            113.3: PixelDecoder(PixelDecoderConfig(base_channels=128)),
            177.0: PixelDecoder(PixelDecoderConfig()),
        }
    for millions, model in models.items():
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "values, blocks, others",
    [
        (FLAT, {"enc_blocks": 2, "dec_blocks": 2}, "enc_norm enc_proj dec_proj dec_norm"),
        (
            PROGRESSIVE,
            {"enc_blocks": 2, "dec_blocks": 2, "enc_blocks_mid": 1, "dec_blocks_mid": 1},
            "enc_norm_high enc_down enc_norm enc_proj dec_proj dec_norm_mid dec_up dec_norm",
        ),
        (
            REFINED,
            {"enc_blocks": 2, "dec_blocks": 2, "latent_enc_blocks": 2, "latent_dec_blocks": 2},
            "enc_norm enc_proj dec_proj dec_norm latent_enc_norm latent_dec_norm",
        ),
        (
            MLP,
            {},
            " ".join(f"{side}_mlp.{i}" for side in ("encoder", "decoder") for i in (0, 2, 4)),
        ),
        ({"adapter_type": "identity"}, {}, ""),
    ],
)
def test_keys_are_the_released_ones(values, blocks, others):
    expected = {f"{n}.{i}.{k}" for n, count in blocks.items() for i in range(count) for k in BLOCK}
    expected |= {f"{name}.{kind}" for name in others.split() for kind in ("weight", "bias")}
    assert set(make(values).state_dict()) == expected


def test_hidden_widths_are_the_released_ones():
    """By default; of the blocks at the latent's width always four times that width."""
    mlp, refined = make(MLP), make(REFINED)
    assert mlp.encoder_mlp[0].out_features == mlp.decoder_mlp[2].out_features == (32 + 8) // 2
    for blocks, width in (("enc", 48), ("dec", 48), ("latent_enc", 4 * 8), ("latent_dec", 4 * 8)):
        stack = refined.get_submodule(f"{blocks}_blocks")
        assert {block.intermediate["dense"].out_features for block in stack} == {width}


def test_norms_have_the_released_epsilons():
    adapter = make(REFINED | PROGRESSIVE)
    norms = {n: m.eps for n, m in adapter.named_modules() if isinstance(m, nn.LayerNorm)}
    inside = {n: eps for n, eps in norms.items() if ".layernorm_" in n}
    assert set(inside.values()) == {1e-12} and len(inside) > 8
    assert {eps for n, eps in norms.items() if n not in inside} == {1e-5}
    paint = PixelDecoder(PixelDecoderConfig(**PAINT))
    groups = [m for m in paint.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_groups == 32 and m.eps == 1e-6 for m in groups)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("values", [FLAT, PROGRESSIVE, REFINED, MLP, {"adapter_type": "identity"}])
def test_released_files_load_with_any_wrapper(tmp_path, values, prefix):
    official = {"adapter_hidden_dim": None, "adapter_mid_dim": None, "adapter_mid_heads": None}
    official |= {"adapter_latent_dim": 32, "some_later_option": 1, **values}
    adapter = make(values)
    paint = randomise(
        PixelDecoder(PixelDecoderConfig(**PAINT | {"latent_dim": adapter.latent_dim}))
    )
    paint_values = dataclasses.asdict(paint.config)
    path = released(tmp_path / "a.pt", adapter, official, paint, paint_values, prefix)
    loaded, loaded_paint = load_adapter(path)
    z = torch.randn(2, 3, 4, 4, 32)
    assert loaded.input_dim == 32 and not loaded.training
    u = adapter.encode(z)
    assert torch.equal(loaded.encode(z), u)
    assert torch.equal(loaded.decode(u), adapter.decode(u))
    assert torch.equal(loaded_paint(u), paint(u))
    assert load_adapter(released(tmp_path / "b.pt", adapter, official))[1] is None


def test_config_without_attention_fields_means_no_level_attention_and_one_middle_head(tmp_path):
    old = PixelDecoder(PixelDecoderConfig(**PAINT, attn_resolutions=(), attn_heads=1))
    path = released(tmp_path / "a.pt", make(FLAT), FLAT, randomise(old), dict(PAINT))
    paint = load_adapter(path)[1]
    assert paint.config.attn_resolutions == () and paint.mid_attn.heads == 1
    assert not any(name.startswith("up_levels") and ".attn." in name for name in paint.state_dict())
    u = torch.randn(1, 2, 4, 4, 8)
    assert torch.equal(paint(u), old(u))


def test_unknown_head_counts_are_refused_since_no_shape_shows_them(tmp_path):
    values = FLAT | {"adapter_query_heads": 2}
    with pytest.raises(InputError, match="adapter_query_heads"):
        load_adapter(released(tmp_path / "a.pt", make(FLAT), values))


def test_doubling_of_time_loads_under_any_name(tmp_path):
    values = PAINT | {"temporal_upsample": True, "attn_resolutions": (16,), "attn_heads": 4}
    paint = randomise(PixelDecoder(PixelDecoderConfig(**values)))
    rename = ("temporal_upsample", "time_up.0")
    path = released(tmp_path / "a.pt", make(FLAT), FLAT, paint, values, rename=rename)
    u = torch.randn(2, 3, 4, 4, 8)
    assert torch.equal(load_adapter(path)[1](u), paint(u))
    assert paint(u).shape == (2, 6, 8, 8, 3)


# ------------------------------------------------------------------------------------------------
# Laws


def test_a_block_is_pre_norm_attention_and_an_erf_gelu_mlp():
    block, x = make(FLAT).enc_blocks[0], torch.randn(3, 2, 5, 32)
    state = block.state_dict()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    y, names = norm(x.flatten(1, 2), "layernorm_before"), ("query", "key", "value")
    parts = [linear(y, f"attention.attention.{name}").split(8, -1) for name in names]
    heads = [(q @ k.mT / 8**0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
    want = x.flatten(1, 2) + linear(torch.cat(heads, -1), "attention.output.dense")
    y = linear(norm(want, "layernorm_after"), "intermediate.dense")
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    want = want + linear(y, "output.dense")
    torch.testing.assert_close(block(x).flatten(1, 2), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("values", [FLAT, PROGRESSIVE, REFINED, MLP])
def test_encode_is_the_refined_mean_in_training_mode_too(values):
    adapter, z = make(values), torch.randn(2, 3, 4, 4, 32)
    mean, logvar = adapter.posterior(z)
    assert mean.shape == (2, 3, 4, 4, 8) and (logvar is None) == (values is MLP)
    trained, evaluated = adapter.train().encode(z), adapter.eval().encode(z)
    assert type(trained) is torch.Tensor and torch.equal(trained, evaluated)
    assert torch.equal(evaluated, adapter.refine(mean))
    assert torch.equal(adapter.refine(mean), mean) == (values is not REFINED)
    assert adapter.decode(evaluated).shape == z.shape


def test_latents_leave_and_enter_refinement_normalised():
    adapter = create_adapter(AdapterConfig(**REFINED), 32)
    u, entered = adapter.refine(3 + 5 * torch.randn(2, 4, 4, 8)), []
    adapter.dec_proj.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    adapter.decode(3 + 5 * u)
    for x in (u, entered[0]):
        torch.testing.assert_close(x.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.var(-1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)


def test_identity_passes_features_through():
    adapter, z = create_adapter(AdapterConfig("identity"), 32), torch.randn(1, 2, 4, 4, 32)
    assert adapter.latent_dim == 32 and adapter.encode(z) is z and adapter.decode(z) is z


@pytest.mark.parametrize("values", [FLAT, PROGRESSIVE, REFINED, MLP])
def test_frames_do_not_see_each_other_and_tokens_of_a_frame_do(values):
    adapter, z = make(values), torch.randn(1, 3, 4, 4, 32)
    changed = z.clone()
    changed[:, 2, 0, 0] += 1
    for x, y in (
        (adapter.encode(z), adapter.encode(changed)),
        (adapter.decode(z[..., :8]), adapter.decode(changed[..., :8])),
    ):
        assert torch.equal(x[:, :2], y[:, :2])
        assert (not torch.equal(x[:, 2, 1:], y[:, 2, 1:])) == (values is not MLP)


def test_any_leading_axes_give_the_same_frames():
    adapter, z = make(PROGRESSIVE), torch.randn(2, 3, 4, 5, 32)
    paint = randomise(PixelDecoder(PixelDecoderConfig(**PAINT)))
    u = adapter.encode(z)
    folded = adapter.encode(z.flatten(0, 1))
    torch.testing.assert_close(folded.view_as(u), u)
    torch.testing.assert_close(adapter.decode(u[0]), adapter.decode(u)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(paint(u[0]), paint(u)[0], atol=1e-5, rtol=1e-5)
    assert paint(u[:, None]).shape == (2, 1, 3, 8, 10, 3)


def test_tokens_have_no_order_but_for_where_they_stand():
    """Without positions, permuting the tokens of a frame permutes the result."""
    adapter, z = make(FLAT), torch.randn(1, 1, 4, 4, 32)
    order = torch.randperm(16)
    shuffled = z.flatten(2, 3)[:, :, order].view_as(z)
    expected = adapter.encode(z).flatten(2, 3)[:, :, order]
    torch.testing.assert_close(adapter.encode(shuffled).flatten(2, 3), expected)


def test_mid_width_is_the_geometric_mean_in_whole_heads():
    cases = {(1024, 96, None, None): (313, 1), (64, 16, None, None): (32, 16)}
    cases |= {
        (1024, 96, None, 16): (304, 16),
        (64, 16, 40, None): (40, 10),
        (64, 16, 40, 16): (32, 16),
    }
    for (D, C, mid, heads), expected in cases.items():
        config = AdapterConfig(
            adapter_latent_dim=C,
            adapter_progressive=True,
            adapter_mid_dim=mid,
            adapter_mid_heads=heads,
        )
        with torch.device("meta"):
            adapter = create_adapter(config, D)
        block = adapter.enc_blocks_mid[0]
        assert (adapter.enc_down.out_features, block.heads) == expected
        assert block.intermediate["dense"].out_features == 4 * expected[0]
        assert int(math.sqrt(D * C)) - expected[0] < 16 or mid


def test_an_adapter_that_begins_as_pca_projects_on_the_first_axes():
    """Features whose plain LayerNorm would lose most: all channels alike, of many lengths."""
    torch.manual_seed(0)
    axes, _ = torch.linalg.qr(torch.cat((torch.ones(32, 1), torch.randn(32, 31)), 1))
    variances = 4.0 ** -torch.arange(32.0)
    z = 3 + (torch.randn(4, 1, 8, 8, 32) * variances.sqrt()) @ axes.T
    adapter = create_adapter(AdapterConfig(**FLAT, adapter_pca=True), 32)
    adapter.init_from_pca(torch.full((32,), 3.0), axes, variances)
    y = (z - 3) @ axes[:, :8]
    u, rebuilt = adapter.encode(z), adapter.decode(adapter.encode(z))
    # the norms bend long features by some percent, as the draw has it
    torch.testing.assert_close(u * variances[:8] ** 0.25, y, atol=0.25, rtol=0.1)
    assert (rebuilt - (3 + y @ axes[:, :8].T)).norm() < 0.3 * (z - 3).norm()
    assert adapter.posterior(z)[1].exp().sqrt().mean().item() == pytest.approx(math.exp(-2))


def test_an_adapter_begins_as_pca_of_features_with_fewer_axes_than_it_has_channels():
    z = torch.randn(2, 4, 4, 3) @ torch.eye(3, 32)
    adapter = create_adapter(AdapterConfig(**FLAT, adapter_pca=True), 32)
    variances = torch.cat((torch.ones(3), torch.zeros(29)))
    adapter.init_from_pca(torch.zeros(32), torch.eye(32), variances)
    rebuilt = adapter.decode(adapter.encode(z))
    assert (rebuilt - z).norm() < 0.3 * z.norm()  # NaN where it divides by nothing


def test_groups_of_two_channels_lose_brightness_and_groups_of_four_keep_it():
    """Two numbers of mean 0 and variance 1 are +1 and -1, whatever they were."""
    grey = torch.randn(2, 16, 2).sort(descending=True)[0].flatten(1)[..., None, None]
    for groups, kept in ((16, False), (8, True)):
        paint = PixelDecoder(PixelDecoderConfig(**PAINT | {"norm_groups": groups}))
        dark, bright = paint.norm_out(grey.expand(2, 32, 4, 4))
        assert torch.allclose(dark, bright, atol=0.1) != kept


def test_pixel_decoder_attends_at_the_named_resolution_only():
    for attn, levels in (((16,), {0}), ((32,), {1}), ((16, 32), {0, 1}), ((), set())):
        paint = PixelDecoder(PixelDecoderConfig(**PAINT, attn_resolutions=attn))
        names = [n.split(".") for n in paint.state_dict() if n.startswith("up_levels")]
        assert {int(n[1]) for n in names if n[2] == "attn"} == levels
        assert {n[1] for n in names if n[2] == "upsample"} == {"0"}  # the outermost does not grow


def test_doubling_of_time_mixes_neighbours_in_time_and_no_clips():
    values = PAINT | {"temporal_upsample": True}
    paint, u = randomise(PixelDecoder(PixelDecoderConfig(**values))), torch.randn(2, 4, 2, 3, 8)
    frames = paint(u)
    torch.testing.assert_close(frames[1:], paint(u[1:]))
    u[0, 2] += 1  # reaches frames 2 * 2 - 1 ... 2 * 2 + 2: a kernel of four steps
    changed = (paint(u) - frames).abs().amax((2, 3, 4)) > 1e-4
    assert changed.tolist() == [[t in (3, 4, 5, 6) for t in range(8)], [False] * 8]


def test_pixel_decoder_paints_between_0_and_1_and_frames_alone():
    paint = randomise(PixelDecoder(PixelDecoderConfig(**PAINT)))
    u = 5 * torch.randn(1, 2, 4, 4, 8)
    frames = paint(u)
    assert 0 <= frames.min() and frames.max() <= 1
    bare = PixelDecoder(PixelDecoderConfig(**PAINT | {"output_activation": "none"}))
    bare.load_state_dict(paint.state_dict())
    torch.testing.assert_close(bare(u).sigmoid(), frames)
    u[:, 1] += 1
    assert torch.equal(paint(u)[:, 0], frames[:, 0])


def test_dropout_acts_in_training_only():
    paint = randomise(PixelDecoder(PixelDecoderConfig(**PAINT | {"dropout": 0.5})))
    u = torch.randn(1, 1, 4, 4, 8)
    assert not torch.equal(paint.train()(u), paint(u))
    assert torch.equal(paint.eval()(u), paint(u))


def test_heads_change_the_result():
    z, outputs = torch.randn(1, 1, 4, 4, 32), []
    state = make(REFINED | PROGRESSIVE).state_dict()
    for heads in (
        {},
        {"adapter_num_heads": 8},
        {"adapter_mid_heads": 4},
        {"adapter_latent_heads": 2},
    ):
        adapter = create_adapter(AdapterConfig(**REFINED | PROGRESSIVE | heads), 32)
        adapter.load_state_dict(state)
        outputs.append(adapter.decode(adapter.encode(z)))
    assert all(not torch.allclose(outputs[0], other) for other in outputs[1:])


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    "values",
    [FLAT, FLAT | {"adapter_pca": True}, PROGRESSIVE, REFINED, MLP, {"adapter_type": "identity"}],
)
@pytest.mark.parametrize("with_paint", [False, True])
def test_saved_adapter_comes_back_bit_for_bit(tmp_path, values, with_paint):
    adapter = make(values)
    adapter.encoder_config = {"encoder_type": "pixels", "patch_size": 16}
    adapter.encoder_fingerprint = "pixels-1234"
    config = PixelDecoderConfig(**PAINT | {"latent_dim": adapter.latent_dim})
    paint = randomise(PixelDecoder(config)) if with_paint else None
    save_adapter(tmp_path / "adapter.safetensors", adapter, paint)
    before = torch.random.get_rng_state()
    loaded, loaded_paint = load_adapter(tmp_path / "adapter.safetensors", "pixels-1234")
    assert torch.equal(torch.random.get_rng_state(), before)  # loading draws nothing
    assert loaded.config == adapter.config and loaded.input_dim == 32
    assert loaded.encoder_config == adapter.encoder_config
    for one, other in ((adapter, loaded), (paint, loaded_paint)):
        assert (one is None) == (other is None)
        if one is not None:
            ours, theirs = one.state_dict(), other.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded_paint is None or loaded_paint.config == config


def test_adapter_of_another_encoder_is_refused_by_name(tmp_path):
    adapter = make(FLAT)
    path = released(tmp_path / "a.pt", adapter, FLAT)
    assert load_adapter(path, "vjepa2-0011")[0].encoder_config == {"encoder_type": "vjepa2"}
    with pytest.raises(InputError, match="belongs to encoder vjepa2, not to scale_rae_webssl-0011"):
        load_adapter(path, "scale_rae_webssl-0011")
    adapter.encoder_fingerprint = "vjepa2-0011"
    save_adapter(tmp_path / "a.safetensors", adapter, None)
    with pytest.raises(InputError, match="vjepa2-0011, not to vjepa2-0012"):  # other weights
        load_adapter(tmp_path / "a.safetensors", "vjepa2-0012")


@pytest.mark.parametrize(
    "cls, values, match",
    [
        (AdapterConfig, {"adapter_type": "vae"}, "identity, mlp or svae"),
        (AdapterConfig, {"adapter_latent_dim": 0}, "adapter_latent_dim"),
        (AdapterConfig, {"adapter_num_layers": 10**6}, "adapter_num_layers"),
        (AdapterConfig, {"adapter_progressive": "yes"}, "adapter_progressive"),
        (AdapterConfig, {"adapter_mid_dim": 1.5}, "adapter_mid_dim"),
        (PixelDecoderConfig, {"base_channels": 48}, "base_channels"),
        (PixelDecoderConfig, {"attn_heads": 3}, "attn_heads"),
        (PixelDecoderConfig, {"norm_groups": 48}, "norm_groups"),
        (AdapterConfig, {"adapter_pca": True, "adapter_progressive": True}, "adapter_pca"),
        (PixelDecoderConfig, {"attn_resolutions": (8,)}, "attn_resolutions"),
        (PixelDecoderConfig, {"channel_multipliers": ()}, "channel_multipliers"),
        (PixelDecoderConfig, {"channel_multipliers": (1, 0)}, "channel_multipliers"),
        (PixelDecoderConfig, {"dropout": 1.0}, "dropout"),
        (PixelDecoderConfig, {"output_activation": "tanh"}, "output_activation"),
    ],
)
def test_impossible_configs_are_refused(cls, values, match):
    with pytest.raises(ValueError, match=match):
        cls(**values)


def test_heads_that_do_not_divide_are_refused_with_a_number_that_does():
    with pytest.raises(ValueError, match="adapter_num_heads 12 the 1024 features .try 16"):
        create_adapter(AdapterConfig(adapter_num_heads=12), 1024)
    with pytest.raises(ValueError, match="adapter_latent_heads 7 the 96"):
        create_adapter(AdapterConfig(adapter_latent_layers=1, adapter_latent_heads=7), 1024)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere.pt"):
        load_adapter(tmp_path / "nowhere.pt")
    for content in ({"model": {}}, torch.zeros(3), [1], {"adapter": {}, "adapter_config": None}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match="a.pt"):
            load_adapter(tmp_path / "a.pt")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    adapter, path = make(FLAT), tmp_path / "a.pt"
    for damage in (
        {"enc_proj.bias": None},
        {"enc_proj.bias": torch.zeros(3)},
        {"enc_proj.bias": torch.zeros(16, dtype=torch.int64)},
        {"extra.weight": torch.zeros(3)},
        {"enc_proj.bias": 5},
    ):
        state = {**adapter.state_dict(), **damage}
        state = {name: value for name, value in state.items() if value is not None}
        torch.save({"adapter": state, "adapter_config": FLAT}, path)
        with pytest.raises(InputError, match="a.pt"):
            load_adapter(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_give_our_errors_and_no_crash(tmp_path, suffix):
    """200 mutations of each format: loaded in full, or refused with one sentence."""
    adapter, paint = make(FLAT, 16), PixelDecoder(PixelDecoderConfig(**PAINT))
    good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    if suffix == ".pt":
        released(good, adapter, FLAT, paint, dataclasses.asdict(paint.config))
    else:
        save_adapter(good, adapter, paint)
    whole, rng, refused = good.read_bytes(), np.random.default_rng(0), 0
    head = 4000 if suffix == ".safetensors" else len(whole)
    for i in range(200):
        content = bytearray(whole)
        if i % 4 == 0:
            content = content[: rng.integers(len(content))]
        elif i == 1:
            content[:8] = b"\xff" * 8  # a header as large as the world
        else:
            for place in rng.integers(head, size=1 + i % 3):
                content[place] ^= 1 << rng.integers(8)
        bad.write_bytes(content)
        try:
            loaded, _ = load_adapter(bad)
            assert (
                loaded.encode(torch.randn(1, 2, 2, loaded.input_dim)).shape[-1] == loaded.latent_dim
            )
        except InputError as error:
            assert "bad" in str(error)
            refused += 1
    assert refused >= 50  # every truncation at least


def test_damaged_descriptions_are_refused(tmp_path):
    from data import load_tensors, save_tensors

    save_adapter(tmp_path / "a.safetensors", make(FLAT), PixelDecoder(PixelDecoderConfig(**PAINT)))
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    for key, value in (
        ("adapter_config", None),
        ("adapter_config", []),
        ("adapter_config", metadata["adapter_config"] | {"adapter_latent_dim": 10**12}),
        ("adapter_config", metadata["adapter_config"] | {"adapter_num_layers": 128}),
        ("adapter_config", metadata["adapter_config"] | {"new": 1}),
        ("pixel_decoder_config", 3),
        ("pixel_decoder_config", metadata["pixel_decoder_config"] | {"channel_multipliers": 3}),
        ("pixel_decoder_config", metadata["pixel_decoder_config"] | {"base_channels": 65504}),
        ("input_dim", "32"),
        ("input_dim", 10**15),
        ("input_dim", -32),
        ("input_dim", None),
    ):
        save_tensors(tmp_path / "b.safetensors", tensors, metadata | {key: value})
        with pytest.raises(InputError, match="b.safetensors"):
            load_adapter(tmp_path / "b.safetensors")
