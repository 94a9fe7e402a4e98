"""Claims of evaluate.py: metrics against their definitions, protocols against known answers."""

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_episode
from PIL import Image
from test_world_model import Pairs
from torch import nn

import data
import evaluate
from adapter import PixelDecoder, PixelDecoderConfig
from diffusion import FlowMatching
from dit import DiT, DiTConfig
from encoders import EncoderConfig, create_autoencoder
from evaluate import bootstrap, frechet_distance, gram
from world_model import LatentSpace, WorldModel, save_world_model

CPU = torch.device("cpu")


def randomised(net):
    """Give every tensor of a network a value that matters, so that swapped layers show."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.dim() > 1 else 1
            scale = 0.5 if "running_var" in name or "bn.weight" in name else (1 / fan) ** 0.5
            tensor.uniform_(-scale, scale)
            if "running_var" in name or "bn.weight" in name:
                tensor.add_(1)
    return net


@pytest.fixture
def pictures():
    x = F.interpolate(torch.rand(3, 3, 12, 15), (48, 60), mode="bicubic").clamp(0, 1)
    return x.movedim(1, -1), (x.movedim(1, -1) + 0.1 * torch.randn(3, 48, 60, 3)).clamp(0, 1)


# -- pixel metrics


def test_psnr_and_ssim_are_those_of_scikit_image(pictures):
    measures = pytest.importorskip("skimage.metrics")
    for x, y, p, s in zip(
        *pictures, evaluate.psnr(*pictures), evaluate.ssim(*pictures), strict=True
    ):
        x, y = x.double().numpy(), y.double().numpy()
        options = dict(channel_axis=2, data_range=1.0)
        assert s.item() == pytest.approx(measures.structural_similarity(x, y, **options), abs=1e-9)
        assert p.item() == pytest.approx(
            measures.peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9
        )


def test_equal_pictures_score_100_db_and_1(pictures):
    assert evaluate.psnr(pictures[0], pictures[0]).tolist() == [100.0] * 3
    assert evaluate.ssim(pictures[0], pictures[0]).tolist() == pytest.approx([1.0] * 3)


def test_lpips_is_that_of_the_lpips_package(pictures, tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(alexnet().state_dict(), folder / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.warns(UserWarning):  # the package calls torchvision the old way
        reference = lpips.LPIPS(net="alex", verbose=False)
    channels_first = [2 * x.movedim(-1, 1) - 1 for x in pictures]
    expected = reference(*channels_first).flatten()
    ours = evaluate.load_lpips(tmp_path, CPU)(*pictures)
    assert expected.min() > 0 and ours.shape == (3,)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_missing_weights_name_the_file_the_url_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    loaders = {
        "lpips": lambda: evaluate.load_lpips(tmp_path, CPU),
        "fid": lambda: evaluate.load_inception("fid", tmp_path, CPU),
        "fid_tv": lambda: evaluate.load_inception("fid_tv", tmp_path, CPU),
        "fvd": lambda: evaluate.load_fvd("fvd", None, tmp_path, CPU),
        "fvd_r3d": lambda: evaluate.load_fvd("fvd_r3d", None, tmp_path, CPU),
        "t_lpips": lambda: evaluate.load_t_lpips(tmp_path, CPU),
        "pck": lambda: evaluate.load_cotracker(None, CPU),
    }
    for metric, load in loaders.items():
        with pytest.raises(evaluate.Unavailable) as caught:
            load()
        error, url = caught.value, evaluate.WEIGHTS[metric]
        assert error.url == url and url in str(error) and metric in error.reason
        assert Path(error.path).name == Path(url).name and error.path in str(error)


def test_weights_of_another_network_are_refused(tmp_path):
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), tmp_path / Path(evaluate.WEIGHTS["fid"]).name)
    with pytest.raises(evaluate.InputError, match="do not fit Inception3"):
        evaluate.load_inception("fid", tmp_path, CPU)


@pytest.fixture(scope="module")
def fid_weights(tmp_path_factory):
    """A random file of the pytorch-fid layout: 1008 classes, no batch counters."""
    from torchvision.models import inception_v3

    torch.manual_seed(1)
    net = randomised(inception_v3(num_classes=1008, aux_logits=False, init_weights=False))
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    folder = tmp_path_factory.mktemp("weights")
    torch.save(state, folder / Path(evaluate.WEIGHTS["fid"]).name)
    return folder


def test_fid_features_are_those_of_the_2015_network(fid_weights):
    """Its blocks written out: average pools that skip padding, a max pool in the last block."""
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    state = torch.load(fid_weights / Path(evaluate.WEIGHTS["fid"]).name)
    net.load_state_dict(state, strict=False)
    net.eval()

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block_a(m, x):
        far = m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x)))
        near = m.branch5x5_2(m.branch5x5_1(x))
        return torch.cat([m.branch1x1(x), near, far, m.branch_pool(average(x))], 1)

    def block_c(m, x):
        near = m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x)))
        far = m.branch7x7dbl_3(m.branch7x7dbl_2(m.branch7x7dbl_1(x)))
        far = m.branch7x7dbl_5(m.branch7x7dbl_4(far))
        return torch.cat([m.branch1x1(x), near, far, m.branch_pool(average(x))], 1)

    def block_e(m, x, pool):
        near, far = m.branch3x3_1(x), m.branch3x3dbl_2(m.branch3x3dbl_1(x))
        near = [m.branch3x3_2a(near), m.branch3x3_2b(near)]
        far = [m.branch3x3dbl_3a(far), m.branch3x3dbl_3b(far)]
        return torch.cat([m.branch1x1(x), *near, *far, m.branch_pool(pool(x))], 1)

    frames = torch.rand(2, 64, 64, 3)
    with torch.no_grad():
        x = F.interpolate(frames.movedim(-1, 1), (299, 299), mode="bilinear", align_corners=False)
        x = net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(2 * x - 1)))
        x = net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(net.maxpool1(x)))
        x = net.maxpool2(x)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = block_a(getattr(net, name), x)
        x = net.Mixed_6a(x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = block_c(getattr(net, name), x)
        x = block_e(net.Mixed_7b, net.Mixed_7a(x), average)
        x = block_e(net.Mixed_7c, x, lambda x: F.max_pool2d(x, 3, 1, 1))
        expected = x.mean((2, 3))
        ours = evaluate.load_inception("fid", fid_weights, CPU)(frames)
    assert ours.shape == (2, 2048) and expected.std() > 1e-4
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_fid_features_are_those_of_the_pytorch_fid_package(fid_weights, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    path = fid_weights / Path(evaluate.WEIGHTS["fid"]).name
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: torch.load(path))
    frames = torch.rand(2, 80, 64, 3)
    with torch.no_grad():
        expected = inception.InceptionV3([3]).eval()(frames.movedim(-1, 1))[0].flatten(1)
        ours = evaluate.load_inception("fid", fid_weights, CPU)(frames)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_r3d_sees_the_last_frame_repeated_to_sixteen(tmp_path):
    from torchvision.models.video import r3d_18

    torch.save(r3d_18().state_dict(), tmp_path / Path(evaluate.WEIGHTS["fvd_r3d"]).name)
    features = evaluate.load_fvd("fvd_r3d", None, tmp_path, CPU)
    clip = torch.rand(1, 3, 32, 32, 3)
    with torch.no_grad():
        out = features(clip)
        by_hand = features(torch.cat([clip, clip[:, -1:].repeat(1, 13, 1, 1, 1)], 1))
    assert out.shape == (1, 512) and torch.equal(out, by_hand)


class Brightness(nn.Module):
    """Stand-in for I3D: checks what it is given, returns mean colours."""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        assert x.shape[2] == 16 and rescale and resize and return_features
        return x.mean((2, 3, 4))


def test_i3d_gets_sixteen_frames_of_0_to_255_channels_first(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.script(Brightness()).save(str(path))
    clips = torch.rand(2, 16, 8, 8, 3)
    out = evaluate.load_fvd("fvd", str(path), tmp_path, CPU)(clips)
    torch.testing.assert_close(out, 255 * clips.mean((1, 2, 3)))
    path.write_bytes(b"broken")
    with pytest.raises(evaluate.InputError, match="no TorchScript archive"):
        evaluate.load_fvd("fvd", str(path), tmp_path, CPU)


def test_cotracker_is_asked_for_points_of_the_first_frame(tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Tracker(torch.nn.Module):\n"
        "    def forward(self, video, queries):\n"
        "        assert video.shape[2] == 3 and video.max() > 1 and (queries[..., 0] == 0).all()\n"
        "        tracks = queries[:, None, :, 1:].expand(-1, video.shape[1], -1, -1)\n"
        "        return tracks, torch.ones(tracks.shape[:-1])\n"
        "def cotracker3_offline(pretrained=True):\n"
        "    return Tracker()\n"
    )
    track = evaluate.load_cotracker(str(tmp_path), CPU)
    points = evaluate.grid_points(32, 32, side=3)
    tracks, visible = track(torch.rand(2, 4, 32, 32, 3), points)
    assert torch.equal(tracks, points.expand(2, 4, 9, 2)) and visible.dtype == torch.bool
    with pytest.raises(evaluate.Unavailable, match="no hubconf.py"):
        evaluate.load_cotracker(str(tmp_path / "elsewhere"), CPU)


def test_t_lpips_compares_changes_along_the_real_flow(tmp_path, monkeypatch):
    flow = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    monkeypatch.setattr(
        evaluate, "load_network", lambda *_: lambda a, b: [flow.expand(len(a), 2, *a.shape[2:])]
    )
    monkeypatch.setattr(
        evaluate, "load_lpips", lambda *_: lambda x, y: (x - y)[:, :, :4].abs().mean((1, 2, 3))
    )
    real = torch.rand(1, 1, 8, 8, 3).repeat(1, 3, 1, 1, 1)
    for t in range(3):  # a pattern that moves two pixels to the right each frame
        real[:, t] = real[:, 0].roll(2 * t, 2)
    video = real.clone()
    video[:, 2] += 0.25
    change = evaluate.load_t_lpips(tmp_path, CPU)(real, video)
    assert change.shape == (1, 2)
    assert change[0].tolist() == pytest.approx([0.0, 0.25], abs=1e-5)


# -- Frechet distance


def moments(x, batch=7):
    return evaluate.moments(sum(gram(part) for part in x.split(batch)))


def test_streamed_moments_are_those_of_the_whole_set():
    x = torch.randn(50, 6) * 3 + 5
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.double().mean(0))
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=1e-9)


def test_frechet_distance_is_the_matrix_square_root_form():
    from scipy.linalg import sqrtm

    x, y = torch.randn(400, 16) @ torch.randn(16, 16), torch.randn(300, 16) + 0.5
    (m1, s1), (m2, s2) = moments(x), moments(y)
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace()
    expected -= 2 * np.trace(sqrtm(s1.numpy() @ s2.numpy()).real)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_diagonal_gaussians_is_known():
    a, b, gap = torch.tensor([4.0, 9.0, 1.0]), torch.tensor([1.0, 0.0, 16.0]), torch.ones(3)
    distance = frechet_distance(torch.zeros(3), a.diag(), gap, b.diag())
    assert distance == pytest.approx(3 + 1 + 9 + 9)  # |gap|^2 + sum (sqrt a - sqrt b)^2


def test_frechet_distance_of_equal_sets_is_zero_even_when_singular():
    x = torch.randn(20, 64) + 3  # rank 19 of 64
    assert frechet_distance(*moments(x), *moments(x.flip(0), batch=3)) < 1e-9
    constant = torch.ones(5, 8)
    assert frechet_distance(*moments(constant), *moments(constant)) == 0


# -- point tracks


def moving_square(steps=6, velocity=(3, 2), size=128):
    """A textured square that moves over a plain table, and its centre (x, y) per frame."""
    generator = torch.Generator().manual_seed(5)
    texture = torch.rand(24, 24, 3, generator=generator)
    clip = torch.full((1, steps, size, size, 3), 0.5)
    centres = []
    for t in range(steps):
        x, y = 30 + velocity[0] * t, 40 + velocity[1] * t
        clip[0, t, y - 12 : y + 12, x - 12 : x + 12] = texture
        centres.append((x, y))
    return clip, torch.tensor(centres).float()


def test_patches_follow_a_moving_square_and_leave_the_table_still():
    clip, centres = moving_square()
    tracks, visible = evaluate.track_patches(clip, torch.tensor([[30.0, 40.0], [100.0, 20.0]]))
    assert torch.equal(tracks[0, :, 0], centres)
    assert torch.equal(tracks[0, :, 1], torch.tensor([[100.0, 20.0]]).expand(6, 2))
    assert visible.all()


def test_a_patch_that_vanishes_is_not_visible():
    clip, _ = moving_square()
    clip[:, 3:] = 0.5
    _, visible = evaluate.track_patches(clip, torch.tensor([[30.0, 40.0]]))
    assert visible[0, :, 0].tolist() == [True] * 3 + [False] * 3


def test_tracks_of_a_clip_do_not_depend_on_its_batch():
    clips = torch.cat([moving_square()[0], moving_square(velocity=(-2, 3))[0]])
    points = evaluate.grid_points(128, 128, side=5)
    tracks, visible = evaluate.track_patches(clips, points)
    for i in range(2):
        one = evaluate.track_patches(clips[i : i + 1], points)
        assert torch.equal(one[0][0], tracks[i]) and torch.equal(one[1][0], visible[i])


def test_grid_points_keep_a_margin_of_two_percent():
    points = evaluate.grid_points(256, 128)
    assert points.shape == (256, 2)
    assert points.amin(0).tolist() == pytest.approx([0.02 * 127, 0.02 * 255])
    assert points.amax(0).tolist() == pytest.approx([0.98 * 127, 0.98 * 255])


def test_pck_counts_points_seen_in_both_videos():
    still = torch.zeros(1, 2, 4, 2)
    real = still.clone()
    real[0, 1, 0] = torch.tensor([6.0, 8.0])  # moves 10 px; the others stay
    generated = still.clone()
    generated[0, 1, 1] = torch.tensor([0.0, 7.0])
    seen, seen_g = torch.ones(1, 2, 4, dtype=torch.bool), torch.ones(1, 2, 4, dtype=torch.bool)
    seen_g[0, 1, 3] = False
    out = evaluate.pck((real, seen), (generated, seen_g), scale=1.0)
    assert [out[f"@{p}"][0, 1].item() for p in (5, 10)] == pytest.approx([1 / 3, 1.0])
    assert [out[f"_moving@{p}"][0, 1].item() for p in (5, 10)] == [0.0, 1.0]
    assert out["_coverage"][0].tolist() == out["_coverage_generated"][0].tolist() == [1.0, 0.75]
    doubled = evaluate.pck((real, seen), (generated, seen_g), scale=2.0)
    assert doubled["@10"][0, 1].item() == pytest.approx(1 / 3)
    seen_g[:] = False
    assert math.isnan(evaluate.pck((real, seen), (generated, seen_g), scale=1.0)["@5"][0, 1])


def test_pck_counts_in_pixels_of_a_256_pixel_frame(monkeypatch):
    def shifted(clips, points):  # every point stands as far to the right as its clip is bright
        place = clips.mean((2, 3, 4))[..., None, None].expand(-1, -1, 4, 2)
        return place, torch.ones(*place.shape[:3], dtype=torch.bool)

    monkeypatch.setattr(evaluate, "track_patches", shifted)
    about = {"image_size": 64, "has_decoder": True}
    subject = SimpleNamespace(args=evaluate.Args(), n=1, device=CPU)
    subject.space = subject.config = SimpleNamespace(**about)
    real = torch.zeros(1, 3, 64, 64, 3)
    rows = evaluate.Evaluation.open_metric(subject, "pck_patch")(real, real + 6 / math.sqrt(2))
    found = [rows[f"pck_patch@{p}"].tolist() for p in (5, 10, 20, 40)]
    assert found == [[[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]], [[1.0, 1.0]]]  # 6 px are 24 of 256


# -- statistics


def test_bootstrap_interval_is_that_of_the_normal_mean():
    samples = np.random.default_rng(0).normal(3, 2, size=400)
    value, (low, high), n = bootstrap(samples)
    half = 1.96 * samples.std() / 20
    assert value == pytest.approx(samples.mean())
    near = pytest.approx(half, rel=0.1)  # that of 90 % is 0.84 of it
    assert high - value == near and value - low == near
    assert n == 400 and bootstrap(samples) == bootstrap(samples)


def test_paired_differences_are_tighter_than_the_runs_themselves():
    random = np.random.default_rng(0)
    a = random.normal(20, 3, size=100)
    b = a - 0.5 + random.normal(0, 0.1, size=100)
    value, (low, high), _ = bootstrap(a, minus=b)
    assert low < 0.5 < high and high - low < 0.1 and value == pytest.approx((a - b).mean())


def test_clips_without_a_value_do_not_count():
    assert bootstrap([1.0, math.nan, 3.0])[::2] == (2.0, 2)
    assert bootstrap([math.nan])[1] is None and math.isnan(bootstrap([math.nan])[0])
    assert bootstrap([4.0]) == (4.0, None, 1)


def test_auc_is_the_chance_that_a_success_outscores_a_failure():
    random = np.random.default_rng(0)
    label, score = random.integers(2, size=40), random.integers(6, size=40) / 6
    pairs = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    samples = np.stack([label, score - 0.5], 1)
    assert evaluate.auc(samples) == pytest.approx(np.mean(pairs))
    with pytest.warns(RuntimeWarning):
        assert math.isnan(evaluate.auc(samples[label == 1]))


def test_balanced_accuracy_is_the_mean_recall():
    samples = np.array([[1, 0.4], [1, -0.3], [0, -0.4], [0, -0.2], [0, -0.1]])
    assert evaluate.balanced_accuracy(samples) == pytest.approx((0.5 + 1) / 2)
    assert evaluate.STATISTICS["accuracy"](samples) == pytest.approx(0.8)


def test_correlation_is_that_of_all_windows_of_all_clips():
    random = np.random.default_rng(0)
    y = random.normal(size=(30, 4, 2))
    x = 0.5 * y + random.normal(size=y.shape) + 1
    y[..., 1] = 0.7  # a dimension that never changes has no correlation
    r, r2 = evaluate.correlation(np.stack([x, y], 2))
    assert r[0] == pytest.approx(np.corrcoef(x[..., 0].ravel(), y[..., 0].ravel())[0, 1])
    flat_x, flat_y = x[..., 0].ravel(), y[..., 0].ravel()
    expected = 1 - ((flat_x - flat_y) ** 2).sum() / ((flat_y - flat_y.mean()) ** 2).sum()
    assert r2[0] == pytest.approx(expected)
    assert math.isnan(r[1]) and math.isnan(r2[1])


def test_borda_sums_the_ranks_and_ties_share():
    values = [[30.0, 0.1], [28.0, 0.1], [25.0, 0.3]]  # PSNR up, LPIPS down
    assert evaluate.borda(np.array(values), [True, False]).tolist() == [2.5, 3.5, 6.0]


# -- a linear world: what a search, a probe and a rollout must find is known


def waves():
    """Ten smooth grey patterns (10, 16, 16, 3): JPEG keeps them."""
    x = (torch.arange(16) + 0.5) * math.pi / 16
    rows = [
        torch.cos(i * x)[:, None] * torch.cos(j * x)
        for i, j in itertools.product(range(4), repeat=2)
    ]
    return 0.05 * torch.stack(rows[1:11]).unsqueeze(-1).expand(10, 16, 16, 3)


class LinearWorld(nn.Module):
    """A perfect model of z' = z + action @ waves, with the interface of a DiT; or a deaf one."""

    def __init__(self, deaf=False):
        super().__init__()
        self.config = DiTConfig(in_channels=48, dim=64, depth=1, heads=1, max_frames=10)
        encoder = create_autoencoder(EncoderConfig(patch_size=4))
        moves = encoder.encode(waves()[:, None] + 0.5) - encoder.encode(
            torch.full((1, 1, 16, 16, 3), 0.5)
        )
        self.register_buffer("moves", moves[:, 0] * (not deaf))

    def forward(self, z, tau, actions):
        target = z + torch.einsum("bta,ahwc->bthwc", actions, self.moves)
        target = torch.cat([z[:, :1], target[:, :-1]], 1)
        return (z - target) / tau[:, :, None, None, None]


def write_world(folder, seed=0, success=True, constant=False, test=12):
    """Write episodes of the linear world: 14 frames of 16 px; the successful ones are brighter."""
    random, patterns, splits = np.random.default_rng(seed), waves().numpy(), {}
    for split, count in (("train", 30), ("test", test)):
        for i in range(count):
            actions = np.zeros((14, 10), np.float32)
            actions[:, :7] = random.uniform(-1, 1, (14, 7)) * (not constant)
            moves = np.tensordot(actions, patterns, 1)
            frames = np.cumsum([np.full((16, 16, 3), 0.42 + 0.16 * (i % 2)), *moves[:-1]], 0)
            path = folder / "linear" / split / f"{i:09d}.safetensors"
            meta = {"language": "brighten", "success": bool(i % 2) if success else None, "fps": 5}
            pixels = (frames * 255).round().clip(0, 255).astype(np.uint8)
            splits.setdefault(split, []).append(data.write_episode(path, pixels, actions, meta))
    head = {"dataset": "linear", "fps": 5, "action_mapping": "bridge", "image_size": 16}
    data.append_index(folder / "linear", head)
    data.append_index(folder / "linear", {"shard": "0", "episodes": splits})


def linear_model(deaf=False):
    space = LatentSpace(create_autoencoder(EncoderConfig(patch_size=4)))
    stored = {"image_size": 16, "stride": 1, "num_history": 2, "action_merge": "drop"}
    stored |= {"action_mapping": "bridge", "fps": 5}
    return WorldModel((LinearWorld(deaf), FlowMatching(steps=2), space, stored), "cpu")


SEARCH = {"windows": 6, "population": 80, "horizons": "1"}


@pytest.fixture
def measure_world(tmp_path, monkeypatch):
    """Return a function that measures a linear world with given flags: results.json as a dict."""
    torch.set_grad_enabled(False)
    write_world(tmp_path / "data")

    def run(deaf=False, **flags):
        torch.manual_seed(0)
        monkeypatch.setattr(evaluate, "open_model", lambda *_: linear_model(deaf))
        options = dict(dataset_dir=str(tmp_path / "data"), subset_names="linear")
        options |= dict(output_dir=str(tmp_path / "out"), num_episodes=12, num_frames=4)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
        options |= dict(weights_dir=str(tmp_path / "none"), horizons="1") | flags
        args = evaluate.Args(**options)
        evaluate.Evaluation(args, data.Processes(0, 1, CPU)).run()
        return json.loads((Path(args.output_dir) / "results.json").read_text())

    yield run
    torch.set_grad_enabled(True)


def values(results, *names):
    return [results["metrics"][name]["value"] for name in names]


def test_a_perfect_model_reaches_the_ceiling_and_needs_its_actions(measure_world, capsys):
    rows = measure_world(metrics="psnr,ssim,pck_patch,lpips")["metrics"]
    for name in ("psnr", "ssim"):
        row = rows[name]
        beside, gain = row["beside"], row["minus"]["shuffled"]
        assert row["value"] > beside["copy"] and gain[0] > 0 and gain[1][0] > 0
        assert row["n"] == 12 and row["ci"][0] < row["value"] < row["ci"][1]
        assert len(row["per_step"]["model"]) == 4 and len(row["samples"]) == 12
    assert rows["psnr"]["beside"]["ceiling"] == 100  # patches are exact
    assert rows["psnr"]["value"] > 40  # JPEG noise of the context
    assert rows["lpips"]["value"] is None and "alexnet" in rows["lpips"]["path"]
    said = capsys.readouterr().out
    assert "The model listens to its actions: psnr" in said and "null: lpips needs" in said


def test_shuffled_actions_are_another_clips_from_the_newest_known_frame_on(
    measure_world, monkeypatch
):
    videos, seen = evaluate.Evaluation.videos, []

    def watched(self, clips, real, actions, other):
        seen.append(torch.stack([actions, other]))
        return videos(self, clips, real, actions, other)

    monkeypatch.setattr(evaluate.Evaluation, "videos", watched)
    measure_world(metrics="psnr")
    actions, other = torch.cat(seen, 1)
    assert torch.equal(other[:, :1], actions[:, :1])  # two frames are known: between them is one
    assert torch.equal(other[:, 1:], actions.roll(6, 0)[:, 1:])  # half of the 12 clips further on


def test_distances_are_zero_for_the_ceiling_and_grow_for_the_copy(measure_world, monkeypatch):
    def colours(metric, folder, device):
        return lambda frames: frames.flatten(1)[:, ::97]

    monkeypatch.setattr(evaluate, "load_inception", colours)
    monkeypatch.setattr(evaluate, "load_fvd", lambda *_: lambda x: x.flatten(1)[:, ::997])
    rows = measure_world(metrics="fid,fvd_r3d")["metrics"]
    for name, n in (("fid", 12 * 4), ("fvd_r3d", 12)):
        row = rows[name]
        assert row["beside"]["ceiling"] < 1e-6 < row["value"] < row["beside"]["copy"]
        assert row["n"] == n and row["ci"] is None and row["better"] == "lower"
    assert "note" not in rows["fid"] or rows["fid"]["n"] <= 2 * 8


def test_a_distance_of_few_samples_is_marked_as_biased(measure_world, monkeypatch):
    features = lambda *_: lambda frames: frames.flatten(1)[:, ::7]  # noqa: E731
    monkeypatch.setattr(evaluate, "load_inception", features)
    assert "biased up" in measure_world(metrics="fid")["metrics"]["fid"]["note"]


def test_pictures_are_drawn_and_show_real_dreamed_and_difference(measure_world, tmp_path):
    measure_world(metrics="psnr,ssim")
    gif = Image.open(tmp_path / "out" / "samples.gif")
    assert gif.size == (3 * 16, 4 * 16) and gif.n_frames == 6  # four clips of 2 + 4 frames
    png = np.asarray(Image.open(tmp_path / "out" / "horizon.png").convert("RGB")).astype(int)
    blue = (np.abs(png - (0x1F, 0x5F, 0xA8)).sum(-1) < 30).any(1)  # the model's curve
    assert blue[60:].any() and png.shape[1] == 1080


def test_a_deaf_model_scores_like_no_signal_and_the_report_says_so(measure_world, capsys):
    rows = measure_world(deaf=True, metrics="psnr,controllability", **SEARCH)["metrics"]
    assert rows["psnr"]["minus"]["shuffled"][0] == 0
    row = rows["cem_k1_zero"]
    low, high = row["minus"]["no signal"][1]
    assert low < 0 < high and row["value"] > 1
    said = capsys.readouterr().out
    assert "The model ignores its actions, as far as these clips can tell: psnr" in said
    assert "no better than repeating the last known frame" in said
    assert "cem_k1_zero finds none, as far as these clips can tell, as if the model ignored" in said


def test_cem_finds_the_actions_of_a_linear_world(measure_world, capsys):
    flags = SEARCH | {"population": 320, "horizons": "1,2"}
    rows = measure_world(metrics="controllability", **flags)["metrics"]
    assert len(rows["cem_k2_zero_xyz"]["per_dim"]["model"]) == 3
    for name in ("cem_k1", "cem_k1_zero", "cem_k2", "cem_k2_zero"):
        row = rows[name]
        bound = 0.2 if "k1" in name else 0.8  # 7 and 14 numbers; JPEG noise bounds them below
        assert row["value"] < bound < 1 < row["beside"]["no signal"]
        assert len(row["per_dim"]["model"]) == 7 and row["minus"]["no signal"][1][1] < 0
    assert "cem_k1_zero finds actions" in capsys.readouterr().out


def test_gradient_and_grid_search_report_their_errors_and_limits(measure_world):
    rows = measure_world(
        metrics="controllability", searches="gradient,grid", windows=2, horizons="1,4"
    )["metrics"]
    assert rows["gradient_k1"]["value"] < 0.1  # starts at the truth and stays
    assert rows["gradient_k1_zero"]["value"] < rows["gradient_k1_zero"]["beside"]["no signal"]
    assert rows["grid_k1"]["value"] == rows["grid_k1_zero"]["value"] < 1
    assert rows["grid_k4"]["value"] is None and "candidates" in rows["grid_k4"]["reason"]


def test_a_planner_of_ones_own_is_measured_as_the_others_are(measure_world, monkeypatch, tmp_path):
    monkeypatch.setitem(evaluate.PLANNERS, "mine", evaluate.PLANNERS["cem"])
    flags = {"metrics": "controllability", "searches": "mine", **SEARCH}
    one, other = (measure_world(**flags, output_dir=str(tmp_path / name)) for name in "ab")
    row = one["metrics"]["mine_k1"]
    assert row["better"] == "lower" and row["minus"]["no signal"][1][1] < 0
    assert row["samples"] == other["metrics"]["mine_k1"]["samples"]  # it draws with the seed


def test_a_metric_without_a_function_is_not_measured_by_another(measure_world, monkeypatch):
    monkeypatch.setattr(evaluate, "load_lpips", lambda *_: evaluate.psnr)
    monkeypatch.setattr(evaluate, "PIXELS", (*evaluate.PIXELS, "mine"))
    monkeypatch.setattr(evaluate, "METRICS", (*evaluate.METRICS, "mine"))
    with pytest.raises(KeyError, match="mine"):
        measure_world(metrics="mine")


def test_costs_without_a_gradient_are_no_signal(measure_world, tmp_path, capsys):
    flags = {"metrics": "controllability", "searches": "gradient", "windows": 4}
    rows = measure_world(deaf=True, **flags)["metrics"]
    said = capsys.readouterr().out
    for name in ("gradient_k1", "gradient_k1_zero"):  # not 0, the error of staying at the truth
        row = rows[name]
        assert row["value"] == row["beside"]["no signal"] > 1  # 50 steps of 0.01, 7 numbers
        assert f"{name} finds none, as far as these clips can tell" in said
    measure_world(**flags, output_dir=str(tmp_path / "hears"))
    assert "gradient_k1_zero finds actions" in capsys.readouterr().out


def test_a_search_starts_at_the_truth_or_at_zero_where_it_searches(measure_world, monkeypatch):
    starts = []

    def stay(cost, start, dims):
        starts.append(start[0])
        return start, cost(start[None])

    monkeypatch.setitem(evaluate.PLANNERS, "grid", stay)
    measure_world(metrics="controllability", searches="grid", windows=2)
    zero = [start for start in starts if start[:3].eq(0).all()]
    truth = [start for start in starts if start[:3].ne(0).all()]
    assert len(zero) == len(truth) == len(starts) / 2 > 2
    assert all(any(torch.equal(a[3:], b[3:]) for b in truth) for a in zero)


def test_a_search_knows_the_recorded_action_beside_the_last_target(measure_world, monkeypatch):
    seen, make, search = [], evaluate.candidate_cost, evaluate.Evaluation.search

    def spy_cost(*known):
        seen.append(known[-1])
        return make(*known)

    def spy_search(self, i, *rest):
        found = search(self, i, *rest)
        assert torch.equal(seen[-1], self.actions[i, self.n + 1]), "two frames after n - 1"
        return found

    monkeypatch.setattr(evaluate, "candidate_cost", spy_cost)
    monkeypatch.setattr(evaluate.Evaluation, "search", spy_search)
    measure_world(metrics="controllability", windows=2, population=16, horizons="2")
    assert len(seen) > 4


class PerfectReader:
    """Reads the seven actions off the difference of two frames of the linear world."""

    def __call__(self, z):
        inverse = torch.linalg.pinv(LinearWorld().moves.flatten(1).double().T)
        moved = (z[:, 1:] - z[:, :-1]).flatten(2).double()  # z (B, k + 1, h w, C)
        return (moved @ inverse.T).float()[..., :7]


def test_inverse_dynamics_reads_each_window_of_real_and_dreamed_futures(
    measure_world, monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluate.Evaluation, "fit_idm", lambda *_: PerfectReader())
    dreamed, dream = [], evaluate.Evaluation.dream

    def count(self, z, actions, seeds):
        dreamed.extend(seeds)
        return dream(self, z, actions, seeds)

    monkeypatch.setattr(evaluate.Evaluation, "dream", count)
    rows = measure_world(metrics="idm", horizons="1,2", max_steps=2)["metrics"]
    assert dreamed == [*range(12)]  # once for both horizons
    for name in ("idm_r_k1", "idm_r_k2"):
        row = rows[name]
        assert row["value"] > 0.98 and row["beside"]["real"] > 0.98  # JPEG noise
        assert row["ci"][0] <= row["value"] and min(row["per_dim"]["model"]["r2"]) > 0.9
        assert min(row["per_dim"]["real"]["r"]) > 0.98
        assert np.shape(row["samples"]) == (12, 4, 2, 6)  # clips, predicted frames, read and true
    flags = {"output_dir": str(tmp_path / "deaf"), "max_steps": 2}
    deaf = measure_world(deaf=True, metrics="idm", **flags)
    row = deaf["metrics"]["idm_r_k1"]
    assert abs(row["value"]) < 0.3 and row["beside"]["real"] > 0.98


def test_inverse_dynamics_learns_from_every_window_of_one_bank_of_bounded_size(
    measure_world, monkeypatch
):
    learned = []

    def fit(net, read, y, held, *_):
        learned.append((read(np.arange(len(y)))[0], y, held))
        net.eval()

    monkeypatch.setattr(evaluate, "train_probe", fit)
    monkeypatch.setattr(evaluate, "BANK", 20 * (6 * 16 * 48) * 2)  # twenty clips of two bytes each
    flags = {"horizons": "1,4", "max_steps": 50, "probe_width": 32}
    rows = measure_world(metrics="idm", **flags)["metrics"]
    assert rows["idm_r_k1"]["note"].startswith("learned from 20 clips, all that 0 MiB hold")
    for k, (z, y, held) in zip((1, 4), learned, strict=True):
        assert z.dtype == torch.half and z.shape == (20 * (6 - k), k + 1, 16, 48)
        pairs = torch.stack([PerfectReader()(z.float()), y], 2)[..., :6]
        assert evaluate.correlation(pairs.numpy())[0].min() > 0.95  # JPEG noise, half precision
        assert held.sum() == 2 * (6 - k)  # two of twenty episodes


def test_frame_pairs_are_decoded_as_in_the_whole_clip():
    shape = {"latent_dim": 192, "base_channels": 32, "channel_multipliers": (1, 1, 1, 1)}
    decoder = PixelDecoder(PixelDecoderConfig(**shape, temporal_upsample=True))
    space, real = LatentSpace(Pairs(), None, decoder), torch.rand(2, 6, 16, 16, 3)
    tested = SimpleNamespace(space=space, n=2, dream=lambda z, *_: z)
    videos = evaluate.Evaluation.videos(tested, [0, 1], real, None, None)
    for kind in ("model", "shuffled"):
        assert torch.equal(videos[kind][:, :2], real[:, :2])
        assert torch.allclose(videos[kind][:, 2:], videos["ceiling"][:, 2:], atol=1e-5)


@pytest.mark.parametrize("views", [1, 2])
def test_probes_read_what_they_learn_from_in_the_latent_cache(tmp_path, monkeypatch, views):
    data.generate_toy(tmp_path, data.ToyConfig(size=16, episodes=4, test_episodes=2, steps=(9, 9)))
    encoder = create_autoencoder(EncoderConfig(patch_size=4))
    stored = {"image_size": 16, "stride": 1, "num_history": 2, "action_merge": "drop"}
    config = data.DataConfig(str(tmp_path), "toy", image_size=16, stride=1, views=views)
    space = LatentSpace(encoder, num_views=views)
    parts = FlowMatching(steps=2), space, stored | {"action_mapping": "bridge", "fps": 5}
    dit = DiT(DiTConfig(48, 1, 64, 1, 1, num_views=views, max_frames=6))
    monkeypatch.setattr(evaluate, "open_model", lambda *_: WorldModel((dit, *parts), CPU))
    args = evaluate.Args(dataset_dir=str(tmp_path), subset_names="toy", output_dir=str(tmp_path))
    tested = evaluate.Evaluation(args, data.Processes(0, 1, CPU))
    clips = data.EpisodeDataset(tested.config, "train")
    wanted = [tested.known_features(clips.info(i), slice(2, 5)) for i in range(4)]
    data.write_latent_cache(config, "train", encoder.fingerprint, encoder.encode)
    monkeypatch.setattr(tested, "load_frames", None)  # no frame is read any more
    for i, z in enumerate(wanted):
        found = tested.known_features(clips.info(i), slice(2, 5))
        assert found.shape == (1, 3, 4, 4 * views, 48)
        assert torch.equal(found, z.bfloat16().float())


def test_success_probes_tell_bright_episodes_real_and_dreamed(measure_world):
    rows = measure_world(metrics="probe", max_steps=30, probe_width=32)["metrics"]
    assert rows["probe_text"]["value"] is None and "siglip2" in rows["probe_text"]["url"]
    for kind in ("linear", "temporal", "spatiotemporal", "progress"):
        for name in ("accuracy", "balanced_accuracy", "auc"):
            row = rows[f"probe_{kind}_{name}"]
            assert row["value"] > 0.8 and row["beside"]["real"] > 0.8, (kind, name)


class Judge(nn.Module):
    """Stands for a probe that reads text; keeps what it is trained on."""

    kind = "text"

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []
        self.register_buffer("scale", torch.zeros(2, 1))

    def prepare(self, z):
        return z

    def judge(self, z, text):
        return self.weight * z.flatten(1).mean(1)

    def loss(self, z, y, text):
        self.seen.append((z[:, 0, 0, 0], y, text))
        return self.weight.square().sum()


def test_only_another_instruction_makes_a_success_a_failure():
    net, texts = Judge(), torch.tensor([[[1.0], [1.0]], [[1.0], [2.0]], [[3.0], [3.0]]])
    kind, y = torch.arange(60) % 3, torch.ones(60)
    y[0] = 0  # one of the held

    def read(p):  # clip p shows the number of its instruction
        return kind[p].float()[:, None, None, None], texts[kind[p]]

    with torch.no_grad():
        evaluate.train_probe(net, read, y, np.arange(60) < 6, 4, 1e-3)
    for (shown, own, text), (_, judged, other) in zip(net.seen[::2], net.seen[1::2], strict=True):
        assert torch.equal(text, texts[shown.long()]) and own.all()
        assert torch.equal(judged.bool(), (text == other).flatten(1).all(1))
        assert judged.any() and not judged.all()


def test_both_classes_choose_the_weights_of_a_success_probe(measure_world, monkeypatch, tmp_path):
    held_out, fit = [], evaluate.train_probe

    def spy(net, read, y, held, *rest):
        held_out.append((y[held].tolist(), y[~held].tolist()))
        return fit(net, read, y, held, *rest)

    monkeypatch.setattr(evaluate, "train_probe", spy)
    labelled = evaluate.Evaluation.labelled
    few = lambda self, *how: labelled(self, *how)[:4]  # noqa: E731  two of each
    monkeypatch.setattr(evaluate.Evaluation, "labelled", few)
    measure_world(metrics="probe", max_steps=2, probe_width=32)
    assert held_out and all({*a} == {*b} == {0.0, 1.0} for a, b in held_out)


class RecordedPolicy:
    sentences: set = set()


def stand_still(frames, sentence):
    RecordedPolicy.sentences.add((sentence, *frames.shape[1:]))
    return torch.zeros(len(frames), 10)


def test_a_policy_that_stands_still_wins_where_the_start_was_bright(measure_world):
    flags = {"policy": "test_evaluate:stand_still", "policy_steps": 8, "policy_trials": 2}
    flags |= {"max_steps": 30, "probe_width": 32}
    row = measure_world(metrics="policy", policy_starts=4, **flags)["metrics"]["success_rate"]
    assert row["value"] == 0.5 and row["n"] == 4 and row["note"] == "4 of 8"
    assert row["standard_error"] == pytest.approx(math.sqrt(0.25 / 8))


def sit(frames, text):
    return torch.ones(len(frames), 10)


def test_another_policy_is_measured_again_and_an_old_reason_goes(measure_world, monkeypatch):
    flags = {"policy_steps": 8, "policy_trials": 1, "policy_starts": 4, "max_steps": 4}
    flags |= {"metrics": "policy", "probe_width": 32}
    assert measure_world(**flags)["metrics"]["policy"]["value"] is None  # none is named
    first = measure_world(policy="test_evaluate:stand_still", **flags)
    assert "policy" not in first["metrics"] and "success_rate" in first["metrics"]
    asked = []
    plain = sit
    monkeypatch.setattr(
        sys.modules["test_evaluate"], "sit", lambda *x: asked.append(1) or plain(*x)
    )
    assert len(measure_world(policy="test_evaluate:sit", **flags)["finished"]) == 1 and asked
    asked.clear()
    for again in ({"policy": "test_evaluate:sit"}, {}):  # a flag left out changes nothing
        rows = measure_world(**flags, **again)["metrics"]
        assert not asked and "policy" not in rows
    measure_world(policy="test_evaluate:stand_still", **flags)
    measure_world(policy="test_evaluate:sit", **flags)
    assert asked  # the numbers on disk were the other's
    for name in ("nowhere:f", "test_evaluate:SEARCH"):
        with pytest.raises(evaluate.InputError, match="no such function"):
            measure_world(policy=name, **flags)


# -- the toy world: the simulator itself as the model, and a model that repeats the last frame


GAIN = np.repeat([1.75 / 0.05, 1.4 / 0.25], 3)


class Simulator(nn.Module):
    """Looks up which state a frame shows and lets the simulator act from there; or stands still."""

    def __init__(self, folder, space, deaf=False):
        super().__init__()
        self.config = DiTConfig(in_channels=192, dim=32, depth=1, heads=1, max_frames=5)
        self.space, self.deaf, self.states = space, deaf, {}
        for path in [] if deaf else sorted((folder / "toy" / "test").glob("0*.safetensors")):
            frames, _, metadata = read_episode(path)
            world = data.toy_state_at(metadata, 0)
            for t, frame in enumerate(frames[0]):
                self.keep(torch.from_numpy(frame)[None, None] / 255, world)
                world.step(metadata["toy"]["actions"][t])

    def keep(self, frame, world):
        z = self.space.encode(frame)[0, 0]
        self.states[self.key(z)] = copy.deepcopy(world)
        return z

    def key(self, z):
        return tuple(z.flatten()[::29].mul(1000).round().int().tolist())

    def forward(self, z, tau, actions):
        target = z.clone()
        for b in range(len(z)):
            target[b, -1] = z[b, -2]
            if not self.deaf:
                frame = self.key(z[b, -2])  # KeyError: no frame of the world's
                world = copy.deepcopy(self.states[frame])
                action = actions[b, -2].double().numpy()
                world.step([*(action[:6] / GAIN), float(action[6] < 0)])
                frame = torch.from_numpy(world.render(views=(0,)))[None] / 255
                target[b, -1] = self.keep(frame, world)
        return (z - target) / tau[:, :, None, None, None].clamp_min(1e-3)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    shares = {"policies": (1, 0, 1, 1), "steps": (6, 7)}
    config = data.ToyConfig(size=32, episodes=4, test_episodes=2, **shares)
    data.generate_toy(folder, config)
    return folder


@pytest.fixture
def measure_toy(toy_folder, tmp_path, monkeypatch):
    """Return a function that measures a model of the toy world: the rows of results."""

    def run(dit, space, **flags):
        stored = {"image_size": 32, "stride": 1, "num_history": 1, "action_merge": "drop"}
        stored |= {"action_mapping": "bridge", "fps": 5}
        parts = dit, FlowMatching(steps=1), space, stored
        monkeypatch.setattr(evaluate, "open_model", lambda *_: WorldModel(parts, "cpu"))
        options = dict(dataset_dir=str(toy_folder), subset_names="toy", output_dir=str(tmp_path))
        args = evaluate.Args(**options | dict(horizons="1", batch_size=2) | flags)
        evaluate.Evaluation(args, data.Processes(0, 1, CPU)).run()
        return json.loads((tmp_path / "results.json").read_text())["metrics"]

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    yield run
    torch.set_grad_enabled(True)


def pixel_space(views=1):
    return LatentSpace(create_autoencoder(EncoderConfig(patch_size=8)), num_views=views)


def test_the_simulator_as_model_scores_perfectly(measure_toy, toy_folder, capsys):
    space = pixel_space()
    rows = measure_toy(
        Simulator(toy_folder, space),
        space,
        metrics="counterfactual,objects,goal,controllability,psnr",
        population=64,
    )
    row = rows["counterfactual_error"]
    assert row["value"] < 1e-3 < 0.02 < row["beside"]["opposite"] and row["better"] == "lower"
    assert len(row["per_step"]["model"]) == 4  # one known frame, as in training, of a window of 5
    assert rows["counterfactual_sides"]["value"] == 1.0
    hits, _, trials = rows["counterfactual_sides"]["note"].split()
    assert hits == trials and 2 <= int(trials) <= 6
    for name in ("objects_gripper", "objects_blocks"):
        assert rows[name]["value"] < rows[name]["beside"]["real"] + 0.2 < 2
    assert rows["objects_gripper"]["beside"]["copy"] > 2
    assert rows["objects_found"]["value"] == rows["objects_found"]["beside"]["real"] == 1
    assert rows["goal_k1"]["value"] == 1.0 and rows["goal_k1"]["note"] == "2 of 2"
    row = rows["cem_k1_zero"]
    assert len(row["per_dim"]["model"]) == 4 and row["value"] < 0.6 * row["beside"]["no signal"]
    assert rows["cem_k1"]["value"] < rows["cem_k1"]["beside"]["no signal"] / 2
    said = capsys.readouterr().out
    assert f"{hits} of {trials} pairs" in said and "cem_k1 finds actions" in said


def test_a_model_that_stands_still_fails_where_a_simulator_looks(measure_toy, toy_folder):
    space = pixel_space()
    metrics = "counterfactual,objects,goal,controllability"
    rows = measure_toy(Simulator(toy_folder, space, True), space, metrics=metrics, population=16)
    row = rows["counterfactual_error"]
    assert row["value"] == pytest.approx(row["beside"]["copy"], rel=0.02)
    assert row["minus"]["opposite"][0] == 0 and rows["counterfactual_sides"]["value"] == 0
    row = rows["objects_gripper"]
    assert row["value"] == pytest.approx(row["beside"]["copy"]) and row["value"] > 2
    assert rows["goal_k1"]["value"] <= rows["goal_k1"]["beside"]["still"]
    row = rows["cem_k1_zero"]
    assert row["value"] > 0.6 * row["beside"]["no signal"]


def test_opposite_actions_are_opposite_from_the_newest_known_frame_on(
    measure_toy, toy_folder, monkeypatch
):
    acted, act = [], evaluate.Evaluation.simulate

    def spy(self, world, actions):
        acted.append(actions)
        return act(self, world, actions)

    monkeypatch.setattr(evaluate.Evaluation, "simulate", spy)
    space = pixel_space()
    measure_toy(Simulator(toy_folder, space, deaf=True), space, metrics="counterfactual")
    for one, other in zip(acted[::2], acted[1::2], strict=True):
        assert torch.equal(one[:, :6], -other[:, :6]) and one[:, :6].any(1).all()
        assert torch.equal(one[:, 6:], other[:, 6:])
    assert len(acted) == 12


def test_a_model_of_two_cameras_is_measured_in_both(measure_toy, tmp_path):
    shape = dict(in_channels=192, dim=32, depth=1, heads=1, max_frames=5, num_views=2)
    flags = dict(population=16, num_frames=2, max_steps=2, probe_width=32)
    metrics = "psnr,ssim,pck_patch,controllability,idm,counterfactual,objects,goal"
    rows = measure_toy(DiT(DiTConfig(**shape)), pixel_space(2), metrics=metrics, **flags)
    names = (
        "psnr ssim pck_patch_coverage cem_k1 counterfactual_error objects_gripper goal_k1".split()
    )
    assert all(math.isfinite(rows[name]["value"]) for name in names) and "idm_r_k1" in rows
    assert rows["psnr"]["n"] == 2 and rows["psnr"]["beside"]["ceiling"] == 100
    assert rows["objects_gripper"]["n"] == 4  # each clip in each camera
    gif = Image.open(tmp_path / "samples.gif")
    assert gif.size == (3 * 32, 4 * 32)  # real, dreamed, difference; two clips of two cameras


def test_episodes_that_no_simulator_made_have_no_simulated_truth(measure_world):
    rows = measure_world(metrics="counterfactual,objects,goal")["metrics"]
    for name in ("counterfactual", "objects", "goal"):
        assert rows[name]["value"] is None and "toy world" in rows[name]["reason"]


# -- probes


def probe_of(kind, shape, **options):
    torch.manual_seed(0)
    return evaluate.Probe(kind, shape, 32, **options).eval().requires_grad_(False)


def test_inverse_dynamics_sees_order_and_place_of_what_it_reads():
    net, z = probe_of("idm", (3, 4, 8)), torch.randn(1, 3, 4, 8)
    out = net(z)
    assert out.shape == (1, 2, 7) and not torch.allclose(out[:, 0], out[:, 1])
    assert not torch.allclose(out, net(z.flip(1))) and not torch.allclose(out, net(z.flip(2)))


@torch.no_grad()
def test_inverse_dynamics_learns_small_moves_on_large_offsets_and_keeps_its_best_state():
    x = torch.randn(400, 2, 4, 6) + 50 * torch.randn(6)  # what does not move is much brighter
    y = torch.cat([0.5 * (x[:, 1] - x[:, 0]).mean(1), torch.zeros(400, 1)], 1)[:, None]
    torch.manual_seed(0)
    net, held = evaluate.Probe("idm", (2, 4, 6), 32), np.arange(400) % 10 == 0
    score, _ = evaluate.train_probe(net, lambda p: (x[p], None), y, held, 150, 4e-3)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    final = -len(y[held]) * net.loss(x[held], y[held]).item()
    assert final == pytest.approx(score, rel=1e-4)  # the best state is in place
    r, r2 = evaluate.correlation(torch.stack([net(x[held]), y[held]], 2).numpy())
    assert r2[:6].min() > 0.7 and math.isnan(r2[6])


def test_success_probes_see_what_their_kind_sees():
    z, y = torch.randn(2, 8, 16, 6), torch.tensor([1.0, 0.0])
    nets = {kind: probe_of(kind, (8, 16, 6)) for kind in ("linear", "temporal", "spatiotemporal")}
    for kind, net in nets.items():
        assert net(z).shape == (2, 8) and torch.isfinite(net.loss(z, y))
        blind = torch.allclose(net.judge(z), net.judge(z.flip(2)), atol=1e-6)
        assert blind == (kind != "spatiotemporal")
    still = z.clone()
    still[:, 1:] += 1
    assert torch.equal(nets["linear"](z)[:, 0], nets["linear"](still)[:, 0])
    assert not torch.equal(nets["temporal"](z)[:, 0], nets["temporal"](still)[:, 0])
    progress = probe_of("progress", (8, 16, 6))
    assert torch.equal(progress.judge(z), progress(z)[:, -1])
    ramp = y[:, None] * torch.linspace(0, 1, 8)
    assert progress.loss(z, y) == F.mse_loss(progress(z).sigmoid(), ramp)


def test_the_text_probe_reads_the_instruction():
    net, z, text = probe_of("text", (8, 16, 6), text_dim=5), torch.randn(2, 8, 16, 6), None
    text = torch.randn(2, 4, 5)
    assert net.judge(z, text).shape == (2,) and len(net.blocks) == 6
    assert not torch.allclose(net.judge(z, text), net.judge(z, text.flip(0)))


def test_a_block_of_the_text_probe_is_factored_into_space_time_words_and_swiglu():
    torch.manual_seed(0)
    block = evaluate.FactoredBlock(32).eval().requires_grad_(False)
    x, text = torch.randn(1, 3, 4, 32), torch.randn(1, 5, 32)

    def seen_by(part, *inputs):
        """Which outputs (frame, cell) a change in frame 1, cell 2 reaches."""
        other = inputs[0].clone()
        other[:, 1, 2] += 1
        change = part(other, *inputs[1:]) - part(*inputs)
        return {tuple(p) for p in change[0].abs().amax(-1).gt(1e-6).nonzero().tolist()}

    assert seen_by(block.space, x) == {(1, cell) for cell in range(4)}
    over_time = lambda x: block.time(x.transpose(1, 2)).transpose(1, 2)  # noqa: E731
    assert seen_by(over_time, x) == {(frame, 2) for frame in range(3)}
    assert seen_by(lambda x: block.words(x.flatten(1, 2), text).view_as(x), x) == {(1, 2)}
    assert len(seen_by(block, x, text)) == 12
    y = over_time(block.space(x))
    y = block.words(y.flatten(1, 2), text).view_as(x)
    z = block.norm(y)
    y = y + block.out[0](F.silu(block.gate(z)) * block.value(z))
    torch.testing.assert_close(block(x, text), y)


def test_attention_of_the_text_probe_does_not_depend_on_the_length_of_queries_and_keys():
    torch.manual_seed(0)
    layer = evaluate.Attention(32).eval().requires_grad_(False)
    x = torch.randn(2, 6, 32)
    before = layer(x)
    layer.q.weight.mul_(7), layer.q.bias.mul_(7)
    layer.kv.weight[:32].mul_(7), layer.kv.bias[:32].mul_(7)
    torch.testing.assert_close(layer(x), before)
    layer.kv.weight[32:].mul_(7)
    assert not torch.allclose(layer(x), before)


@torch.no_grad()
def test_the_text_probe_learns_that_another_instruction_is_no_success():
    x, y = torch.randn(60, 4, 4, 6) * 0.1, torch.ones(60)
    word = torch.arange(60) % 2
    x[:, :, :, 0] += 2.0 * word[:, None, None]  # the picture shows which task was done
    y[::7] = 0
    x[::7, :, :, 1] += 2.0
    tokens = F.one_hot(word, 2).float()[:, None].repeat(1, 3, 1)
    torch.manual_seed(0)
    net = evaluate.Probe("text", (4, 4, 6), 32, 2)
    evaluate.train_probe(net, lambda p: (x[p], tokens[p]), y, np.arange(60) % 5 == 0, 60, 3e-3)
    right, wrong = net.judge(x[1:6], tokens[1:6]), net.judge(x[1:6], tokens[1:6].flip(2))
    assert (right > wrong).all()


# -- runs, resumed, shared and compared


def test_a_second_run_measures_only_what_is_missing(measure_world, monkeypatch):
    first = measure_world(metrics="psnr,lpips")
    assert first["finished"] == ["psnr"]
    monkeypatch.setattr(evaluate, "psnr", None)  # would fail if it were called again
    second = measure_world(metrics="psnr,ssim,lpips")
    assert second["finished"] == ["psnr", "ssim"]
    assert second["metrics"]["psnr"] == first["metrics"]["psnr"]
    with pytest.raises(evaluate.InputError, match="measured with other seed, clips"):
        measure_world(metrics="psnr", seed=1)
    with pytest.raises(evaluate.InputError, match="measured with other weights"):
        measure_world(deaf=True, metrics="psnr")


def measure_in_process(rank, world, folder):
    """Measure a part of the linear world in a process of its own (started by spawn)."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29731")
    evaluate.open_model = lambda *_: linear_model()
    evaluate.load_inception = lambda *_: lambda frames: frames.flatten(1)[:, ::97]
    proc = data.init_processes("cpu")
    args = evaluate.Args(
        metrics="psnr,pck_patch,fid,controllability,idm,probe",
        max_steps=3,
        probe_width=32,
        dataset_dir=f"{folder}/data",
        subset_names="linear",
        output_dir=f"{folder}/{world}",
        num_episodes=12,
        num_frames=4,
        batch_size=5,
        **SEARCH,
    )
    evaluate.Evaluation(args, proc).run()
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    write_world(tmp_path / "data")
    for world in (1, 2):
        torch.multiprocessing.spawn(measure_in_process, (world, str(tmp_path)), nprocs=world)
    one, two = (json.loads((tmp_path / f"{n}/results.json").read_text()) for n in (1, 2))
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, row in one["metrics"].items():
        other = two["metrics"][name]
        assert other.get("n") == row.get("n") and other["value"] == pytest.approx(row["value"])
        if "samples" in row:
            expected = pytest.approx(np.array(row["samples"], dtype=float), rel=1e-4, nan_ok=True)
            assert np.array(other["samples"], dtype=float) == expected, name
        elif row["value"] is not None:
            assert other["beside"] == pytest.approx(row["beside"], abs=1e-9), name
    assert {"fid", "idm_r_k1", "probe_temporal_auc"} <= one["metrics"].keys()


def test_a_process_encodes_its_share_of_the_training_clips_alone():
    class Second(data.Processes):
        all_reduce = staticmethod(lambda x: x)  # what the other one has is missing

    proc = Second(1, 2, CPU)
    stub = SimpleNamespace(out=SimpleNamespace(proc=proc))
    x = evaluate.Evaluation.encode_all(stub, range(5), lambda i: torch.full((1, 3), i + 1.0), "")
    assert x[:, 0].tolist() == [0, 2, 0, 4, 0] and x.dtype == torch.half


@pytest.mark.parametrize(
    "metrics, work, damaged",
    [("psnr,fid", "videos", False), ("controllability", "search", False)]
    + [("controllability", "search", True)],
)
def test_a_killed_metric_goes_on_behind_its_last_clips(
    measure_world, monkeypatch, tmp_path, metrics, work, damaged
):
    flags = SEARCH | {"metrics": metrics, "batch_size": 4}
    features = lambda *_: lambda frames: frames.flatten(1)[:, ::97]  # noqa: E731
    monkeypatch.setattr(evaluate, "load_inception", features)
    whole = measure_world(output_dir=str(tmp_path / "whole"), **flags)
    method, seen = getattr(evaluate.Evaluation, work), []

    def counted(self, clips, *rest):
        seen.append(clips if work == "search" else clips[0])
        if seen[-1] > 6 and killed:
            raise KeyboardInterrupt
        return method(self, clips, *rest)

    monkeypatch.setattr(evaluate.Evaluation, work, counted)
    monkeypatch.setattr(evaluate, "NOTE_SECONDS", -1)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        measure_world(**flags)
    (note,) = (tmp_path / "out").glob("unfinished_*")
    assert 4 in seen
    if damaged:
        note.write_bytes(note.read_bytes()[:-200])
    killed, seen[:] = False, []
    resumed = measure_world(**flags)  # a search is first tried on window 0
    assert ({*seen} <= {0, 7, 8, 9, 11}) != damaged and max(seen) > 6
    assert resumed["metrics"] == whole["metrics"]
    assert not list((tmp_path / "out").glob("unfinished_*"))


def test_every_process_of_every_number_of_processes_notes_its_own_clips(tmp_path):
    class Lonely(data.Processes):
        def barrier(self):
            """The others are not there."""

    notes = set()
    for rank, world in ((0, 1), (0, 2), (1, 2), (0, 3)):
        results = evaluate.Results(tmp_path, evaluate.Args(), Lonely(rank, world, CPU))
        results.resume_metric("psnr")
        notes.add(results.note_path)
    assert len(notes) == 4


@pytest.mark.parametrize(
    "flags, fault",
    [
        ({"metrics": "psnr,lpips"}, "alexnet.*fetch"),
        ({"horizons": "1,4", "searches": "cem,grid"}, "grid.*candidates"),
        ({"horizons": "1,10", "num_frames": 11}, "horizon 10: the model sees 10 frames"),
    ],
)
def test_strict_refuses_what_cannot_be_computed_before_any_work(
    measure_world, monkeypatch, flags, fault
):
    monkeypatch.setattr(evaluate.Evaluation, "pixels", None)  # would fail if it were called
    with pytest.raises(evaluate.InputError, match=fault):
        measure_world(**{"metrics": "psnr,controllability", "strict": True} | flags)


def test_results_name_the_versions_of_what_computed_them(measure_world):
    versions = measure_world(metrics="psnr")["versions"]
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["pillow"] == importlib.metadata.version("pillow")
    assert {"numpy", "transformers", "scipy"} <= versions.keys()


def test_compare_ranks_runs_and_marks_the_best(measure_world, tmp_path, monkeypatch, capsys):
    for name, deaf in (("good", False), ("deaf", True)):
        measure_world(deaf, metrics="psnr,ssim", output_dir=str(tmp_path / name))
    folders = (str(tmp_path / "deaf"), str(tmp_path / "good"))
    evaluate.compare(evaluate.Args(compare=folders, output_dir=str(tmp_path / "table")))
    text = (tmp_path / "table" / "compare.md").read_text()
    best = [line for line in text.splitlines() if line.startswith(f"| {folders[1]}")]
    assert best[0].count("**") == 6 and best[0].endswith("| **2** |")  # psnr, ssim, Borda
    gaps = [line for line in text.splitlines() if line.startswith(f"| {folders[1]} minus")]
    assert gaps[0].count("**") == 4 and "+" in gaps[0]  # both differences exclude zero
    assert (tmp_path / "table" / "compare.png").stat().st_size > 1000


# -- errors


def test_unlabelled_episodes_have_no_success_probe(measure_world, tmp_path):
    write_world(tmp_path / "plain", success=False)
    flags = {"metrics": "probe,policy", "policy": "test_evaluate:stand_still"}
    rows = measure_world(dataset_dir=str(tmp_path / "plain"), **flags)["metrics"]
    for name in ("probe", "policy"):
        assert rows[name]["value"] is None and "has 0 and 0" in rows[name]["reason"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"finished": [], "metr'])
def test_damaged_results_are_named(measure_world, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(text)
    with pytest.raises(evaluate.InputError, match=r"results\.json: .*remove it"):
        measure_world(metrics="psnr")
    args = evaluate.Args(compare=(str(tmp_path / "out"),) * 2)
    with pytest.raises(evaluate.InputError, match=r"results\.json: .*remove it"):
        evaluate.compare(args)


def test_only_runs_measured_alike_with_a_common_metric_are_compared(measure_world, tmp_path):
    a, b, c, d = folders = [str(tmp_path / name) for name in "abcd"]
    write_world(tmp_path / "lone", test=1)
    measure_world(metrics="psnr", output_dir=a)
    measure_world(metrics="psnr", output_dir=b, num_context=1)
    measure_world(metrics="ssim", output_dir=c)
    table = str(tmp_path / "table")
    with pytest.raises(evaluate.InputError, match="num_context differ; measure one again"):
        evaluate.compare(evaluate.Args(compare=(a, b), output_dir=table))
    with pytest.raises(evaluate.InputError, match="no metric in common"):
        evaluate.compare(evaluate.Args(compare=(a, c), output_dir=table))
    assert not Path(table).exists()
    for folder in folders[2:]:
        shown = folder + "_lone"
        measure_world(metrics="psnr", dataset_dir=str(tmp_path / "lone"), output_dir=shown)
    evaluate.compare(evaluate.Args(compare=(c + "_lone", d + "_lone"), output_dir=table))
    assert "| +0 |" in (Path(table) / "compare.md").read_text()  # one clip has no interval


def test_a_metric_that_lacks_episodes_does_not_stop_the_others(measure_world, tmp_path):
    write_world(tmp_path / "few")
    index = tmp_path / "few" / "linear" / "index.jsonl"
    index.write_text(index.read_text().replace('"train"', '"other"'))
    flags = {"dataset_dir": str(tmp_path / "few"), "policy": "test_evaluate:stand_still"}
    rows = measure_world(metrics="psnr,idm,probe,policy", **flags)["metrics"]
    assert rows["psnr"]["value"] > 0
    for name in ("idm", "probe", "policy"):
        assert "no usable episode in split 'train'" in rows[name]["reason"]


def test_one_sample_has_no_distance(measure_world, monkeypatch, tmp_path):
    write_world(tmp_path / "lone", test=1)
    monkeypatch.setattr(evaluate, "load_fvd", lambda *_: lambda clips: clips.flatten(1)[:, ::97])
    flags = {"metrics": "psnr,fvd", "dataset_dir": str(tmp_path / "lone")}
    rows = measure_world(**flags)["metrics"]
    assert rows["psnr"]["value"] > 0 and "no covariance" in rows["fvd"]["reason"]


def test_what_a_killed_run_left_is_removed_and_a_refused_one_leaves_nothing(
    measure_world, tmp_path
):
    left = [".results.json.77.tmp", ".unfinished_a.pt.77.tmp", ".samples.gif.77.tmp"]
    left += ["unfinished_psnr_0123456789abcdef.pt"]
    (tmp_path / "out").mkdir()
    for name in [*left, ".last.pt.77.tmp"]:  # the last may be a training's, at work
        (tmp_path / "out" / name).write_bytes(b"")
    with pytest.raises(evaluate.Unavailable):
        measure_world(metrics="lpips", strict=True)
    assert not (tmp_path / "out" / "results.json").exists()
    measure_world(metrics="psnr")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "samples.gif", "horizon.png", ".last.pt.77.tmp"}


def test_constant_actions_are_refused(measure_world, tmp_path):
    write_world(tmp_path / "still", constant=True)
    with pytest.raises(evaluate.InputError, match="all actions are equal"):
        measure_world(dataset_dir=str(tmp_path / "still"), metrics="psnr")


def test_a_lone_clip_is_measured_without_intervals(measure_world, tmp_path, capsys):
    write_world(tmp_path / "lone", test=1)
    rows = measure_world(dataset_dir=str(tmp_path / "lone"), metrics="psnr, ssim")["metrics"]
    assert rows["psnr"]["n"] == 1 and rows["psnr"]["ci"] is None and rows["ssim"]["value"] > 0
    assert "The model" not in capsys.readouterr().out  # one clip makes nothing sure


def test_an_empty_split_is_refused(measure_world):
    with pytest.raises(evaluate.InputError, match="no usable episode in split 'nowhere'"):
        measure_world(split="nowhere")


def test_a_diverged_model_is_refused(measure_world, monkeypatch):
    forward = LinearWorld.forward
    monkeypatch.setattr(LinearWorld, "forward", lambda *a: forward(*a) * math.nan)
    with pytest.raises(evaluate.InputError, match="NaN"):
        measure_world(metrics="psnr")


PUBLISHED = (
    "evaluate.py --model_preset DiT-S_WEBSSL_WIDE --dataset_dir ./data --subset_names bridge_v2 "
    "--metrics psnr,ssim,lpips,fvd,pck,controllability"
)


def test_the_published_command_parses_and_toy_swaps_the_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", PUBLISHED.split())
    args = data.parse_args(evaluate.Args, toy=evaluate.TOY)
    assert (args.model_preset, args.num_episodes) == ("DiT-S_WEBSSL_WIDE", 1000)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "toy", "--strict", "true"])
    args = data.parse_args(evaluate.Args, toy=evaluate.TOY)
    assert args.strict is True and args.subset_names == "toy" and args.max_steps < 2000
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", "a", "b"])
    assert data.parse_args(evaluate.Args, toy=evaluate.TOY).compare == ("a", "b")


def test_the_command_measures_a_checkpoint_and_writes_beside_it(tmp_path, monkeypatch, capsys):
    write_world(tmp_path / "data")
    stored = {"image_size": 16, "stride": 2, "num_history": 2, "action_merge": "drop"}
    space = LatentSpace(create_autoencoder(EncoderConfig(patch_size=4)))
    dit = DiT(DiTConfig(in_channels=48, dim=32, depth=1, heads=1, max_frames=6))
    path = tmp_path / "run" / "world_model.safetensors"
    flags = "--num_episodes 4 --num_frames 4 --horizons 1 --metrics psnr"
    command = f"evaluate.py --checkpoint_path {path} --dataset_dir {tmp_path / 'data'} {flags}"
    monkeypatch.setattr(sys, "argv", f"{command} --subset_names linear".split())
    for mapping in ("bridge", "toy"):
        known = stored | {"action_mapping": mapping, "fps": 5}
        save_world_model(path, dit, FlowMatching(), space, known)
        if mapping == "bridge":
            evaluate.main()
            assert "The model ignores its actions" in capsys.readouterr().out  # it is untrained
            assert {p.name for p in path.parent.iterdir()} == {
                *("world_model.safetensors", "results.json", "horizon.png", "samples.gif")
            }
        else:
            with pytest.raises(evaluate.InputError, match="actions are mapped as 'bridge'"):
                evaluate.main()
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    "flags",
    [
        {"metrics": "psnr,fdi"},
        {"searches": "random"},
        {"horizons": "0"},
        {"num_episodes": 1},
        {"population": 8},
        {"policy_starts": 1},
        {"batch_size": 0},
    ],
)
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        evaluate.Args(**flags)


def test_released_models_map_actions_by_a_known_name_and_fill_their_window():
    assert evaluate.RELEASED["action_mapping"] in data.ACTION_MAPPINGS
    assert {"image_size", "stride", "num_history", "action_merge", "fps"} < {*evaluate.RELEASED}


def test_a_preset_names_its_files_and_where_to_fetch_them(tmp_path):
    args = evaluate.Args(model_preset="DiT-S_VJEPA2_D96", weights_dir=str(tmp_path))
    with pytest.raises(evaluate.Unavailable) as caught:
        evaluate.open_model(args, CPU)
    assert caught.value.url.endswith("semantic-wm/resolve/main/vjepa/DiT-S_D96.pt")
    with pytest.raises(evaluate.InputError, match="DiT-{S,B,L}_WEBSSL_WIDE"):
        evaluate.open_model(evaluate.Args(model_preset="DiT-M_VAE"), CPU)
    with pytest.raises(evaluate.InputError, match="--checkpoint_path"):
        evaluate.open_model(evaluate.Args(), CPU)


def test_an_objective_that_is_not_the_models_own_is_refused(monkeypatch):
    monkeypatch.setattr(evaluate, "WorldModel", lambda *_, **__: linear_model())
    args = evaluate.Args(checkpoint_path="m.safetensors", objective="ddpm")
    with pytest.raises(evaluate.InputError, match="its own, flow_matching"):
        evaluate.open_model(args, CPU)
    same = dataclasses.replace(args, objective="flow_matching")
    assert evaluate.open_model(same, CPU).objective == FlowMatching(steps=2)
