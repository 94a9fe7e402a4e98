"""Training an adapter: loss terms with known answers, one process or two, killed and resumed."""

import csv
import math
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start, torchrun, wait_until

import data
import train_adapter
from adapter import AdapterConfig, PixelDecoder, PixelDecoderConfig, create_adapter, load_adapter
from data import (
    ClipSampler,
    DataConfig,
    EpisodeDataset,
    InputError,
    append_index,
    load_torch,
    write_episode,
)
from train_adapter import COLUMNS, Args, Autoencoder, Critic, adaptive_weight, ms_ssim

ADAPTER = AdapterConfig(
    adapter_latent_dim=6, adapter_num_layers=1, adapter_num_heads=4, adapter_intermediate_size=32
)
ALONE = data.Processes(0, 1, torch.device("cpu"))
TINY = (
    "--subset_names tiny --image_size 32 --num_frames 2 --stride 1 --num_workers 0 "
    "--encoder_type pixels --pixel_patch 4 --adapter_latent_dim 6 --adapter_num_layers 1 "
    "--adapter_num_heads 4 --adapter_intermediate_size 32 --use_pixel_decoder true "
    "--decoder_channels 32 --decoder_multipliers 1,1,1 --decoder_blocks 1 --lpips_weight 0 "
    "--batch_size 4 --num_epochs 8 --lr 3e-3 --val_clips 2 --val_every 100 "
    "--save_every 100 --log_every 1 --device cpu"
).split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A data set of 8 + 2 short episodes: a square that moves over a slope of colours."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    episodes = {"train": [], "test": []}
    slope = np.linspace(40, 200, 32).astype(np.uint8)
    for number in range(10):
        split, color, place = "train" if number < 8 else "test", rng.integers(256, size=3), 3
        frames = np.stack([np.stack([slope[None].repeat(32, 0)] * 3, -1)] * 5)
        for t in range(5):
            frames[t, place : place + 8, 3 * t : 3 * t + 8] = color
        path = root / "tiny" / split / f"{number:09d}.safetensors"
        actions = rng.normal(size=(5, 10)).astype(np.float32)
        about = {"fps": 5, "source": "test"}
        episodes[split].append(write_episode(path, frames, actions, about))
    header = {"dataset": "tiny", "fps": 5, "action_mapping": "bridge", "image_size": 32}
    append_index(root / "tiny", header)
    append_index(root / "tiny", {"shard": "all", "episodes": episodes})
    return root


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Run the script in this process: train(folder name, flags...) -> folder."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *flags, resume=False):
        folder = tmp_path / name
        words = ["--resume", str(folder)] if resume else [*TINY, "--dataset_dir", str(tiny)]
        words += [] if resume else ["--output_dir", str(folder)]
        monkeypatch.setattr(sys, "argv", ["train_adapter.py", *words, *map(str, flags)])
        torch.set_num_threads(1)
        train_adapter.main()
        return folder

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def plain():
    """Weights of a run without further flags, filled by the first test that needs them."""
    return {}


def parameters(folder):
    """Read all weights of a run's adapter file: {name: tensor}."""
    return data.load_tensors(folder / "adapter.safetensors")[0]


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def tensors(tree, name=""):
    """Flatten nested dicts and lists: {path: tensor or number}."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, sub in pairs for k, v in tensors(sub, f"{name}/{key}").items()}
    return {name: tree}


def same(one, other):
    """Whether two checkpoints hold the same names, numbers and bits."""
    a, b = (load_torch(folder / "last.pt") for folder in (one, other))
    a, b = (tensors({k: v for k, v in state.items() if k != "config"}) for state in (a, b))
    assert a.keys() == b.keys() and len(a) > 30
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


# ------------------------------------------------------------------------------------------------
# Loss terms


def test_ssim_agrees_with_skimage():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.rand(2, 40, 48, 3), torch.rand(2, 40, 48, 3)
    b = 0.7 * a + 0.3 * b
    expected = [
        metrics.structural_similarity(
            *(x.double().numpy() for x in pair),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for pair in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ms_ssim(a, b, 1), expected, atol=1e-5)  # float32 against float64


def test_ms_ssim_of_plain_frames_is_their_luminance_to_the_last_exponent():
    """Without structure, contrast terms are 1 at every scale: l^0.1333, l = (2ab+c)/(aa+bb+c)."""
    a, b = torch.full((1, 176, 176, 3), 0.2), torch.full((1, 176, 176, 3), 0.5)
    luminance = (2 * 0.2 * 0.5 + 1e-4) / (0.2**2 + 0.5**2 + 1e-4)
    assert ms_ssim(a, b).item() == pytest.approx(luminance**0.1333, abs=1e-4)
    assert ms_ssim(a, b, 1).item() == pytest.approx(luminance, abs=1e-4)


def test_ms_ssim_is_one_for_equal_frames_and_falls_with_noise():
    a = torch.rand(1, 2, 176, 176, 3)
    values = [ms_ssim(a, a + s * torch.randn_like(a)).mean().item() for s in (0, 0.05, 0.2)]
    assert values[0] == pytest.approx(1, abs=1e-5) and values[0] > values[1] > values[2]
    assert ms_ssim(a, a).shape == (1, 2)


def test_ms_ssim_is_its_definition_in_numpy():
    ndimage = pytest.importorskip("scipy.ndimage")
    a = torch.rand(48, 56, 3)
    b, want = 0.7 * a + 0.3 * torch.rand(48, 56, 3), 1.0
    x, y = a.double().numpy(), b.double().numpy()
    exponents = np.array([0.0448, 0.2856, 0.3001])
    for scale, exponent in enumerate(exponents / exponents.sum()):

        def blur(image):
            sigma = (1.5, 1.5, 0)
            return ndimage.gaussian_filter(image, sigma, radius=(5, 5, 0))[5:-5, 5:-5]

        mx, my = blur(x), blur(y)
        score = 2 * (blur(x * y) - mx * my) + 0.03**2
        score /= blur(x * x) - mx**2 + blur(y * y) - my**2 + 0.03**2
        score *= (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2) if scale == 2 else 1
        want = want * score.mean((0, 1)) ** exponent
        x, y = (z.reshape(z.shape[0] // 2, 2, -1, 2, 3).mean((1, 3)) for z in (x, y))
    assert ms_ssim(a, b, 3).item() == pytest.approx(want.mean(), abs=1e-5)


def test_ms_ssim_can_be_descended_from_any_start():
    a, b = torch.rand(1, 48, 48, 3), torch.rand(1, 48, 48, 3)
    b.requires_grad_()
    (1 - ms_ssim(1 - b, a, 3)).sum().backward()  # anti-correlated: the base of the power is cut
    assert b.grad.isfinite().all()


def feature_loss(z_rec, z, mean, logvar, kl_weight=1.0, **flags):
    args = Args(adapter=ADAPTER, **flags)
    return train_adapter.loss_terms((z_rec, mean, logvar, None), z, None, args, kl_weight)


def test_perfect_features_cost_nothing_but_the_posterior():
    z, mean, logvar = torch.randn(2, 1, 4, 4, 8), torch.randn(2, 1, 4, 4, 3), torch.randn(3)
    logvar = logvar.expand_as(mean)
    terms = feature_loss(z, z, mean, logvar)
    assert all(abs(terms[name][1]) < 1e-6 for name in ("mse", "cosine", "spectral"))
    gauss = [
        torch.distributions.Normal(m, s) for m, s in ((mean, (0.5 * logvar).exp()), (0.0, 1.0))
    ]
    expected = torch.distributions.kl_divergence(*gauss).mean()
    torch.testing.assert_close(terms["kl"][1], expected)


def test_feature_terms_have_known_values():
    z = torch.randn(1, 1, 4, 4, 8)
    mean = torch.zeros(1, 1, 4, 4, 3)
    terms = feature_loss(-2 * z, z, mean, None)
    assert "kl" not in terms  # a deterministic adapter has no posterior
    torch.testing.assert_close(terms["mse"][1], 9 * z.square().mean())
    torch.testing.assert_close(terms["cosine"][1], torch.tensor(2.0))
    spectrum = np.abs(np.fft.rfft(z.flatten(2, 3).numpy(), axis=2))  # along the tokens
    torch.testing.assert_close(
        terms["spectral"][1].item(), float(spectrum.mean()), rtol=1e-5, atol=0
    )
    shifted = feature_loss(z.flatten(2, 3).roll(1, 2).view_as(z), z, mean, None)
    assert shifted["spectral"][1] < 1e-5 < shifted["mse"][1]  # magnitudes do not see a shift


def test_defaults_are_the_weights_of_the_paper():
    z, mean = torch.randn(1, 1, 4, 4, 8), torch.zeros(1, 1, 4, 4, 3)
    frames = torch.rand(1, 1, 176, 176, 3)
    args = Args(adapter=ADAPTER)
    out, lpips = (z, mean, mean, frames), lambda a, b: (a - b).square()
    terms = train_adapter.loss_terms(out, z, frames, args, args.kl_weight, lpips)
    weights = {name: weight for name, (weight, _) in terms.items()}
    names = "mse cosine spectral kl pixel lpips ms_ssim".split()
    assert weights == dict(zip(names, (1.0, 1.0, 0.01, 1e-4, 1.0, 0.5, 0.5), strict=True))
    assert (args.lpips_start, args.gan_start, args.decoder_lr_scale) == (50_000, 100_000, 3.0)


def test_lpips_sees_frames_from_minus_one_to_one_channels_first():
    seen, frames, z = [], torch.rand(2, 3, 40, 48, 3), torch.randn(1, 1, 4, 4, 8)
    args, lpips = Args(adapter=ADAPTER), lambda a, b: seen.append((a, b)) or a.mean()
    train_adapter.loss_terms((z, z, None, frames), z, frames, args, 1.0, lpips)
    expected = 2 * frames.permute(0, 1, 4, 2, 3).flatten(0, 1) - 1
    assert all(torch.equal(x, expected) for x in seen[0])


def autoencoder(joint):
    config = PixelDecoderConfig(6, 32, (1, 1), 1, attn_resolutions=())
    return Autoencoder(create_adapter(ADAPTER, 48), PixelDecoder(config), joint)


@pytest.mark.parametrize("joint", [False, True])
def test_pixels_shape_the_latent_in_stage_psvae_only(joint):
    model, z = autoencoder(joint), torch.randn(1, 1, 4, 4, 48)
    model(z, torch.randn(1, 1, 4, 4, 6))[3].mean().backward()
    assert all(p.grad is not None for p in model.pixel_decoder.parameters())
    assert any(p.grad is not None for p in model.adapter.parameters()) == joint


def test_decoder_paints_from_the_draw_and_decode_too():
    model, z = autoencoder(True).eval(), torch.randn(1, 1, 4, 4, 48)
    eps = torch.randn(2, 1, 1, 4, 4, 6)
    one, other, mean = model(z, eps[0]), model(z, eps[1]), model(z, 0 * eps[0])
    assert not torch.allclose(one[0], other[0]) and not torch.allclose(one[3], other[3])
    u = model.adapter.encode(z)
    torch.testing.assert_close(mean[0], model.adapter.decode(u))
    torch.testing.assert_close(mean[3], model.pixel_decoder(u))


def test_a_draw_lies_standard_deviations_away_from_the_mean(monkeypatch):
    model, z, seen = autoencoder(False), torch.randn(1, 1, 4, 4, 48), []
    mean, variance, eps = (
        torch.randn(1, 1, 4, 4, 6),
        torch.rand(6) + 0.1,
        torch.randn(1, 1, 4, 4, 6),
    )
    monkeypatch.setattr(model.adapter, "posterior", lambda z: (mean, variance.log()))
    monkeypatch.setattr(model.adapter, "decode", lambda u: seen.append(u) or z)
    model(z, eps)
    torch.testing.assert_close(seen[0], mean + variance.sqrt() * eps)


def test_windows_cut_the_same_place_from_frames_and_grid_and_reach_everywhere():
    z = torch.arange(36).view(1, 1, 6, 6, 1)
    frames, seen = z.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 1, 12, 12, 3), set()
    for seed in range(60):
        part, seen_part = train_adapter.crop(z, frames, 4, seed)
        assert part.shape == (1, 1, 4, 4, 1) and seen_part.shape == (1, 1, 8, 8, 3)
        assert torch.equal(seen_part[..., ::2, ::2, :1], part)
        seen.add(part[0, 0, 0, 0, 0].item())
    assert len(seen) == 9
    assert torch.equal(train_adapter.crop(z, None, 8, 0)[0], z)


def test_critic_has_the_published_size_and_judges_patches():
    critic = Critic()
    assert round(sum(p.numel() for p in critic.parameters()) / 1e6, 2) == 0.66
    assert critic.logits(torch.rand(2, 2, 32, 32, 3)).shape == (4, 1, 6, 6)
    scales = [m for m in critic.modules() if hasattr(m, "parametrizations")]
    assert len(scales) == 4  # every convolution has a spectral norm
    for _ in range(30):  # power iterations
        critic.logits(torch.rand(1, 1, 32, 32, 3))
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() for m in scales]
    assert norms == pytest.approx([1] * 4, abs=0.05)


def test_hinge_loss_is_zero_beyond_the_margin_and_one_when_undecided(monkeypatch):
    critic = Critic()
    monkeypatch.setattr(critic, "logits", lambda frames: frames)
    for real, painted, expected in ((2, -2, 0), (0, 0, 1), (-1, 1, 2), (1, 0, 0.5)):
        assert critic(torch.tensor(float(real)), torch.tensor(float(painted))) == expected


def test_balance_makes_both_losses_pull_equally():
    weight = torch.nn.Parameter(torch.randn(5))
    a, b = (3 * weight).sum(), (weight * torch.randn(5)).sum()
    share = adaptive_weight(a, b, weight, ALONE)
    grads = [torch.autograd.grad(x, weight)[0].norm() for x in (a, b)]
    torch.testing.assert_close(share * grads[1], grads[0], rtol=1e-3, atol=0)  # 1e-4 in the ratio
    assert not share.requires_grad


def test_pca_finds_the_plane_in_which_features_lie():
    basis = torch.linalg.qr(torch.randn(10, 2))[0]
    clips = [(3 + torch.randn(2, 1, 4, 4, 2) @ basis.T, None) for _ in range(3)]
    mean, axes, variances = train_adapter.fit_pca(clips, ALONE)
    found = axes[:, :2]
    x = clips[0][0]
    torch.testing.assert_close(mean + (x - mean) @ found @ found.T, x, atol=1e-4, rtol=0)
    assert (variances[:2] > 0.5).all() and (variances[2:] < 1e-4).all()


def test_missing_lpips_weights_fail_with_path_and_address(tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as error:
        train_adapter.load_lpips(torch.device("cpu"))
    assert str(tmp_path / "checkpoints" / "vgg16-397923af.pth") in str(error.value)
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # lpips calls it the old way
def test_lpips_takes_its_trunk_from_the_file(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    trunk = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net
    names = {n: f"features.{n.partition('.')[2]}" for n in trunk.state_dict()}
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    state = {names[n]: t for n, t in trunk.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, path)
    model, x = train_adapter.load_lpips(torch.device("cpu")), torch.rand(1, 3, 32, 32)
    assert all(torch.equal(t, trunk.state_dict()[n]) for n, t in model.net.state_dict().items())
    assert model(x, x).item() == 0 < model(x, -x).item()
    state.pop("features.28.bias")
    torch.save(state, path)
    with pytest.raises(InputError, match="slice5.28.bias"):
        train_adapter.load_lpips(torch.device("cpu"))


def test_a_term_begins_after_its_clips_and_is_averaged_from_there(train, monkeypatch):
    distance = lambda device: lambda a, b: (a - b).abs().mean()  # noqa: E731
    monkeypatch.setattr(train_adapter, "load_lpips", distance)
    flags = ("--max_steps", 4, "--lpips_weight", 0.5, "--lpips_start", 8)  # two steps of four clips
    each = rows(train("each", *flags))
    once = rows(train("once", *flags, "--log_every", 4))
    found = {int(row["step"]): row["lpips"] for row in each if row["loss"]}
    assert found[1] == found[2] == "" and float(found[3]) > 0
    mean = (float(found[3]) + float(found[4])) / 2
    assert float(once[0]["lpips"]) == pytest.approx(mean, rel=1e-6)  # not over all four steps


def test_frames_below_the_window_of_ms_ssim_are_named(train):
    with pytest.raises(InputError, match="MS-SSIM: 8 pixels, its window has 11"):
        train("small", "--crop", 2, "--max_steps", 1)
    train("without", "--crop", 2, "--max_steps", 1, "--ms_ssim_weight", 0)


# ------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words",
    [
        "--encoder_type scale_rae_webssl --adapter_type svae --adapter_latent_dim 96 --dataset_dir "
        "./data --subset_names bridge_v2 --batch_size 16 --num_epochs 50 --use_pixel_decoder true "
        "--stage svae",
        "toy --max_steps 5",
        "toy",
    ],
)
def test_published_flags_parse(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_adapter.py", *words.split()])
    args = data.parse_args(Args, toy=train_adapter.TOY)
    assert args.use_pixel_decoder and args.adapter.adapter_type == "svae"
    assert (args.subset_names, args.adapter.adapter_latent_dim) == (
        ("toy", 16) if words.startswith("toy") else ("bridge_v2", 96)
    )


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"adapter": AdapterConfig("identity")}, "nothing to train"),
        ({"decoder_multipliers": "1,x"}, "decoder_multipliers"),
        ({"decoder_channels": 33}, "base_channels"),
    ],
)
def test_impossible_flags_are_refused(flags, match):
    with pytest.raises(ValueError, match=match):
        Args(**{"adapter": ADAPTER, **flags})


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_short_run_learns_and_writes_all_it_promises(train, capsys):
    folder = train("run", "--num_epochs", "40", "--val_every", "40")
    log = rows(folder)
    assert list(log[0]) == COLUMNS
    losses = [float(row["loss"]) for row in log if row["loss"]]
    assert len(losses) == 80 and losses[-1] < 0.6 * losses[0]
    first, last = ([row for row in log if row["val_mse"]][i] for i in (0, -1))
    assert float(last["val_mse"]) < float(first["val_mse"])
    assert float(last["val_psnr"]) > 15 and 0 < float(last["val_gauss_ssim"]) <= 1
    assert float(last["pca_psnr"]) > float(last["val_psnr"])  # raw patches are easy for a PCA
    for name in "mse cosine spectral kl pixel ms_ssim grad_adapter grad_decoder lr".split():
        assert all(math.isfinite(float(row[name])) for row in log if row["loss"])
    weights = {"mse": 1, "cosine": 1, "spectral": 0.01, "pixel": 1, "ms_ssim": 0.5}
    total = sum(w * float(log[0][name]) for name, w in weights.items())
    assert losses[0] == pytest.approx(total, rel=1e-4)  # KL weighs nothing in the first step
    adapter, paint = load_adapter(folder / "adapter.safetensors")
    assert adapter.encoder_config["encoder_type"] == "pixels" and paint.config.latent_dim == 6
    picture = Image.open(folder / "sample_0000080.png")
    assert picture.size == (4 * 32, 2 * 32)  # real, painted, features before, after; two clips
    assert "pca_psnr" in capsys.readouterr().out


def test_resumed_equals_uninterrupted_bit_for_bit(train):
    straight = train("straight", "--grad_accum", "2", "--num_workers", "1")
    train("parts", "--grad_accum", "2", "--num_workers", "1", "--max_steps", "3")
    parts = train("parts", "--max_steps", "8", resume=True)
    assert load_torch(straight / "last.pt")["step"] == 8
    assert same(straight, parts)
    a, b = rows(straight), rows(parts)
    a, b = ([r["loss"] for r in log if r["loss"]] for log in (a, b))
    assert a == b and len(a) == 8


def test_seed_changes_the_run(train):
    assert not same(train("a"), train("b", "--seed", "1"))


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(train, capsys):
    folder = train("run", "--save_every", "3", "--max_steps", "6")
    assert load_torch(folder / "previous.pt")["step"] == 3
    content = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(content[: len(content) // 2])
    train("run", "--max_steps", "8", resume=True)
    assert "last.pt" in (text := capsys.readouterr().out) and "resumed" in text
    assert same(folder, train("whole", "--max_steps", "8"))


def test_a_finished_run_is_not_overwritten(train):
    train("run", "--max_steps", "1")
    with pytest.raises(InputError, match="--resume"):
        train("run", "--max_steps", "1")


def test_resuming_lists_changed_flags_and_refuses_what_must_not_change(train, capsys):
    train("run", "--max_steps", "1")
    train("run", "--lr", "1e-3", "--max_steps", "2", resume=True)
    assert "lr 0.003 -> 0.001" in capsys.readouterr().out
    for flags, match in (
        (("--stage", "psvae"), "--stage psvae"),
        (("--adapter_latent_dim", "7"), "--adapter"),
        (("--batch_size", "2"), "4 clips a step .batch_size x grad_accum x processes., now 2"),
    ):
        with pytest.raises(InputError, match=match):
            train("run", *flags, resume=True)
    capsys.readouterr()
    train("run", "--max_steps", "3", resume=True)
    assert "lr" not in capsys.readouterr().out.partition("resumed")[0]  # 0.001 is remembered


@pytest.mark.parametrize(
    "flags",
    [
        "--cosine_weight 0",
        "--spectral_weight 0",
        "--kl_weight 1",
        "--kl_warmup 1",
        "--pixel_weight 2",
        "--ms_ssim_weight 0",
        "--stage psvae",
        "--decoder_lr_scale 1",
        "--weight_decay 1",
        "--clip_grad 0.01",
        "--warmup_epochs 2",
        "--final_lr 0.1",
        "--gan_weight 0.1 --gan_start 8",
        "--bf16 true",
        "--adapter_type mlp",
        "--decoder_attention 32",
        "--crop 4",
        "--decoder_groups 8",
        "--adapter_pca true",
        "--stride 2",
    ],
)
def test_every_flag_changes_the_weights(train, flags, plain):
    other = parameters(train("other", "--max_steps", "3", *flags.split()))
    if not plain:
        plain.update(parameters(train("plain", "--max_steps", "3")))
    assert plain.keys() != other.keys() or any(not torch.equal(plain[n], other[n]) for n in plain)


def test_gan_terms_are_logged_and_the_critic_is_saved(train):
    folder = train("run", "--gan_weight", "0.1", "--gan_start", "8", "--max_steps", "4")
    log = [row for row in rows(folder) if row["loss"]]
    assert [bool(row["gan"]) for row in log] == [False, False, True, True]
    assert all(float(row["critic"]) > 0 for row in log[2:])
    assert {"critic", "critic_optimizer"} <= load_torch(folder / "last.pt").keys()
    resumed = train("run", "--max_steps", "6", resume=True)
    straight = train("straight", "--gan_weight", "0.1", "--gan_start", "8", "--max_steps", "6")
    assert same(resumed, straight)


def test_the_kl_grows_over_its_share_of_the_run(train):
    folder = train("run", *"--kl_weight 1 --kl_warmup 0.25 --max_steps 6".split())
    log, weights = [row for row in rows(folder) if row["loss"]], []
    fixed = {"mse": 1, "cosine": 1, "spectral": 0.01, "pixel": 1, "ms_ssim": 0.5}
    for row in log:
        rest = float(row["loss"]) - sum(w * float(row[name]) for name, w in fixed.items())
        weights.append(rest / float(row["kl"]))
    assert weights == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-3)  # of 16 steps


def test_the_decoder_learns_at_its_multiple_of_the_rate(train):
    folder = train("run", "--decoder_lr_scale", "4", "--max_steps", "1")
    groups = load_torch(folder / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([3e-3, 4 * 3e-3])


def test_windows_move_from_step_to_step(train, monkeypatch):
    whole, places = train_adapter.crop, set()

    def watched(z, frames, cells, seed):
        places.add(whole(torch.arange(64).view(1, 8, 8, 1), None, cells, seed)[0][0, 0, 0].item())
        return whole(z, frames, cells, seed)

    monkeypatch.setattr(train_adapter, "crop", watched)
    train("run", "--crop", "4", "--max_steps", "4")
    assert len(places) > 2


def test_the_critic_learns_from_its_own_loss_alone(train):
    """In the first step both see the same frames, however much the painter heeds the critic."""
    flags = "--gan_start 0 --max_steps 1 --gan_weight".split()
    one, other = (load_torch(train(w, *flags, w) / "last.pt") for w in ("0.1", "10"))
    assert all(torch.equal(t, other["critic"][name]) for name, t in one["critic"].items())
    assert any(not torch.equal(t, other["model"][name]) for name, t in one["model"].items())


def test_identity_adapter_trains_a_decoder_alone(train):
    folder = train("run", "--adapter_type", "identity", "--max_steps", "3")
    adapter, paint = load_adapter(folder / "adapter.safetensors")
    assert adapter.latent_dim == 48 == paint.config.latent_dim
    assert not list(adapter.parameters())


def test_cached_features_train_to_nearly_the_same_weights(train):
    """The cache is bfloat16: features differ by at most 2^-9 of their size."""
    plain, cached = train("plain"), train("cached", "--cache_latents", "true")
    a, b = (load_adapter(f / "adapter.safetensors")[0].state_dict() for f in (plain, cached))
    assert any(not torch.equal(a[n], b[n]) for n in a)
    assert all((a[n] - b[n]).norm() < 0.05 * a[n].norm() + 0.05 for n in a)
    blind = train("blind", "--cache_latents", "true", "--use_pixel_decoder", "false")
    assert load_adapter(blind / "adapter.safetensors")[1] is None


def test_a_decoder_of_another_size_is_refused(train):
    with pytest.raises(InputError, match="paints 16 pixels"):
        train("run", "--decoder_multipliers", "1,1")


def test_losses_that_are_not_finite_are_skipped_and_counted(train, monkeypatch):
    whole, calls = train_adapter.loss_terms, []

    def poisoned(*args):
        calls.append(1)
        terms = whole(*args)
        bad = len(calls) == 2
        return {n: (w, v * (float("nan") if bad else 1.0)) for n, (w, v) in terms.items()}

    monkeypatch.setattr(train_adapter, "loss_terms", poisoned)
    folder = train("run", "--max_steps", "4")
    assert [row["skipped"] for row in rows(folder) if row["loss"]] == ["0", "1", "1", "1"]
    state = load_torch(folder / "last.pt")
    assert all(torch.isfinite(t).all() for t in state["model"].values())
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {3.0}


def test_ten_bad_losses_in_a_row_stop_the_run_with_names_and_a_checkpoint(train, monkeypatch):
    whole = train_adapter.loss_terms
    monkeypatch.setattr(
        train_adapter,
        "loss_terms",
        lambda *a: {n: (w, v * math.inf) for n, (w, v) in whole(*a).items()},
    )
    with pytest.raises(InputError, match=r"step 10: ten losses .*00000000\d.safetensors.*--resume"):
        train("run", "--num_epochs", "20")
    folder = next(Path(sys.argv[sys.argv.index("--output_dir") + 1]).glob("last.pt"))
    assert load_torch(folder)["step"] == 10


def test_a_full_disk_leaves_the_old_checkpoint_and_a_warning(train, monkeypatch, capsys):
    whole, calls = torch.save, []

    def full(state, path):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("file write failed")  # as torch.save says it
        whole(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="last.pt: could not be saved .*and --resume "):
        train("run", "--save_every", "3", "--max_steps", "6")
    out = capsys.readouterr().out
    assert "warning: " in out and "holds the adapter" not in out
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    assert load_torch(folder / "last.pt")["step"] == 3


def launch(folder, tiny, log, *flags, world=1):
    words = [*TINY, "--dataset_dir", tiny, "--output_dir", folder, *flags]
    return start("train_adapter", words, log, world)


def test_two_processes_with_half_the_batch_equal_one(tiny, tmp_path):
    """Adapter, decoder, accumulation and posterior draws; sums differ in their order only."""
    flags = ["--num_epochs", "20", "--max_steps", "20", "--lr", "3e-4", "--stage", "psvae"]
    flags += ["--crop", "4"]
    half, texts = [*flags, "--batch_size", "2", "--grad_accum", "2"], [tmp_path / n for n in "ab"]
    one = launch(tmp_path / "one", tiny, texts[0], *flags, "--batch_size", "8")
    two = launch(tmp_path / "two", tiny, texts[1], *half, world=2)
    finish(one, texts[0]), finish(two, texts[1])
    logs = [[float(r["loss"]) for r in rows(tmp_path / n) if r["loss"]] for n in ("one", "two")]
    assert len(logs[0]) == 20
    np.testing.assert_allclose(*logs, rtol=1e-5)
    states = [load_torch(tmp_path / n / "last.pt")["model"] for n in ("one", "two")]
    for name in states[0]:
        # Biases before a norm and of attention keys have no gradient but rounding, which AdamW
        # scales up to the learning rate; they change nothing. The others moved by up to 6e-3.
        if not re.search(r"(conv\d?|k|key)\.bias$", name):
            torch.testing.assert_close(states[0][name], states[1][name], atol=5e-5, rtol=0)
    scores = [[r for r in rows(tmp_path / n) if r["val_mse"]][-1] for n in ("one", "two")]
    assert float(scores[0]["val_psnr"]) == pytest.approx(float(scores[1]["val_psnr"]), abs=1e-2)


def test_a_terminated_run_saves_and_says_how_to_go_on(tiny, tmp_path):
    folder, straight, log = tmp_path / "run", tmp_path / "straight", tmp_path / "log"
    other = launch(straight, tiny, tmp_path / "other", "--num_epochs", "40")
    (process,) = launch(folder, tiny, log, "--num_epochs", "40")
    while process.is_alive() and not ((folder / "log.csv").exists() and len(rows(folder)) > 3):
        time.sleep(0.01)
    process.terminate()
    assert f"train_adapter.py --resume {folder}" in finish([process], log)
    assert 3 < load_torch(folder / "last.pt")["step"] < 80
    finish(start("train_adapter", ["--resume", folder], log), log)
    finish(other, tmp_path / "other")
    assert same(folder, straight)


def test_kill_9_at_ten_random_moments_loses_nothing(tiny, tmp_path):
    folder, straight, log = tmp_path / "run", tmp_path / "straight", tmp_path / "log"
    flags, rng = ["--num_epochs", "20", "--save_every", "2"], random.Random(0)
    other, wanted = launch(straight, tiny, tmp_path / "other", *flags), 0
    for _ in range(10):
        begun = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
        resume = ("train_adapter", ["--resume", folder], log)
        (process,) = start(*resume) if begun else launch(folder, tiny, log, *flags)
        wanted += rng.randrange(5)  # sometimes before the first step
        while process.is_alive():
            if (folder / "log.csv").exists() and len(rows(folder)) >= min(wanted, 35):
                break
            time.sleep(0.005)
        time.sleep(0.03 * rng.random())
        process.kill()
        process.join()
    finish(start("train_adapter", ["--resume", folder], log), log)
    finish(other, tmp_path / "other")
    assert same(folder, straight)


def test_torchrun_ends_at_once_with_the_error_of_one_process(tiny, tmp_path):
    """An episode is damaged that only the second process reads, and only in the loop."""
    dataset = EpisodeDataset(
        DataConfig(
            str(shutil.copytree(tiny, tmp_path / "data")),
            "tiny",
            num_frames=2,
            stride=1,
            image_size=32,
            num_history=0,
        ),
        "train",
    )
    orders = [iter(ClipSampler(dataset, 1, rank, 2)) for rank in range(2)]
    steps = ([batch[0][1] for batch in pair] for pair in zip(*orders, strict=True))
    seen, (first, second) = {0, 1}, next(steps)  # the first clips fit the PCA
    while second in seen | {first}:
        seen |= {first, second}
        first, second = next(steps)
    damaged = dataset.info(second)["path"]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    flags = ["--dataset_dir", tmp_path / "data", "--output_dir", tmp_path / "run"]
    flags += ["--batch_size", 1, "--num_epochs", 1000]
    with (tmp_path / "log").open("w") as log:
        process = torchrun("train_adapter", [*TINY, *flags], log)
        wait_until(lambda: "error: " in (tmp_path / "log").read_text())
        code = process.wait(timeout=20)  # torchrun kills after 30 s what does not end
    text = (tmp_path / "log").read_text()
    assert code != 0 and f"error: {damaged}: truncated" in text, text


def test_missing_data_is_one_sentence_and_exit_code_2(tmp_path):
    (process,) = launch(tmp_path / "run", tmp_path / "nowhere", tmp_path / "log")
    process.join(timeout=120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and "nowhere" in text and "Traceback" not in text


def test_stored_flags_are_found_in_both_spellings(train, monkeypatch):
    folder = train("run", "--max_steps", "1")
    for words in (["--resume", str(folder)], [f"--resume={folder}"]):
        monkeypatch.setattr(sys, "argv", ["train_adapter.py", *words])
        args, changes = data.read_args(Args, train_adapter.TOY, train_adapter.FIXED)
        assert args.adapter == ADAPTER and args.max_steps == 1 and not changes
