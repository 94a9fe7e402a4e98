"""Claims of evaluate.py: metrics against their definitions, protocols against known answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from evaluate import FrechetSums, bootstrap, frechet_distance

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


def test_luminance_ssim_is_the_ssim_of_the_luminance(pictures):
    measures = pytest.importorskip("skimage.metrics")
    grey = [(x.double() @ torch.tensor([0.299, 0.587, 0.114]).double()).numpy() for x in pictures]
    expected = [
        measures.structural_similarity(x, y, data_range=1.0) for x, y in zip(*grey, strict=True)
    ]
    assert evaluate.ssim_y(*pictures).tolist() == pytest.approx(expected, abs=1e-7)  # float32 luma
    assert not np.allclose(expected, evaluate.ssim(*pictures), atol=1e-3)


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
        "fvd": lambda: evaluate.load_i3d("", tmp_path, CPU),
        "fvd_r3d": lambda: evaluate.load_r3d(tmp_path, CPU),
        "t_lpips": lambda: evaluate.load_flow(tmp_path, CPU),
        "pck": lambda: evaluate.load_cotracker("", CPU),
    }
    for metric, load in loaders.items():
        with pytest.raises(evaluate.Unavailable) as caught:
            load()
        name, url = evaluate.WEIGHTS[metric]
        assert (
            caught.value.url == url and name in caught.value.path and metric in caught.value.reason
        )


def test_weights_of_another_network_are_refused(tmp_path):
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), tmp_path / evaluate.WEIGHTS["fid"][0])
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
    torch.save(state, folder / evaluate.WEIGHTS["fid"][0])
    return folder


def test_fid_features_are_those_of_the_2015_network(fid_weights):
    """Its blocks written out: average pools that skip padding, a max pool in the last block."""
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    state = torch.load(fid_weights / evaluate.WEIGHTS["fid"][0])
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
    path = fid_weights / evaluate.WEIGHTS["fid"][0]
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: torch.load(path))
    frames = torch.rand(2, 80, 64, 3)
    with torch.no_grad():
        expected = inception.InceptionV3([3]).eval()(frames.movedim(-1, 1))[0].flatten(1)
        ours = evaluate.load_inception("fid", fid_weights, CPU)(frames)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_r3d_sees_the_last_frame_repeated_to_sixteen(tmp_path):
    from torchvision.models.video import r3d_18

    torch.save(r3d_18().state_dict(), tmp_path / evaluate.WEIGHTS["fvd_r3d"][0])
    features = evaluate.load_r3d(tmp_path, CPU)
    clip = torch.rand(1, 3, 32, 32, 3)
    with torch.no_grad():
        out = features(clip)
        by_hand = features(torch.cat([clip, clip[:, -1:].repeat(1, 13, 1, 1, 1)], 1))
    assert out.shape == (1, 512) and torch.equal(out, by_hand)


def test_warp_fetches_each_pixel_from_where_the_flow_points():
    frames = torch.rand(2, 9, 11, 3)
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(2, 2, 9, 11)  # 3 right, 2 up
    out = evaluate.warp(frames, flow)
    torch.testing.assert_close(out[:, 2:, :8], frames[:, :-2, 3:], atol=1e-5, rtol=0)


# -- Frechet distance


def moments(x, batch=7):
    sums = FrechetSums(x.shape[1])
    for part in x.split(batch):
        sums.add(part)
    return sums.moments()


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
    assert [out[f"moving@{p}"][0, 1].item() for p in (5, 10)] == [0.0, 1.0]
    assert out["coverage"][0].tolist() == out["coverage_generated"][0].tolist() == [1.0, 0.75]
    doubled = evaluate.pck((real, seen), (generated, seen_g), scale=2.0)
    assert doubled["@10"][0, 1].item() == pytest.approx(1 / 3)
    seen_g[:] = False
    assert math.isnan(evaluate.pck((real, seen), (generated, seen_g), scale=1.0)["@5"][0, 1])


# -- statistics


def test_bootstrap_interval_is_that_of_the_normal_mean():
    samples = np.random.default_rng(0).normal(3, 2, size=400)
    value, (low, high) = bootstrap(samples)
    half = 1.96 * samples.std() / 20
    assert value == pytest.approx(samples.mean())
    assert high - value == pytest.approx(half, rel=0.15) and value - low == pytest.approx(
        half, rel=0.15
    )
    assert bootstrap(samples) == bootstrap(samples) != bootstrap(samples, seed=1)


def test_paired_differences_are_tighter_than_the_runs_themselves():
    random = np.random.default_rng(0)
    a = random.normal(20, 3, size=100)
    b = a - 0.5 + random.normal(0, 0.1, size=100)
    value, (low, high) = bootstrap(a, minus=b)
    assert low < 0.5 < high and high - low < 0.1 and value == pytest.approx((a - b).mean())


def test_clips_without_a_value_do_not_count():
    assert bootstrap([1.0, math.nan, 3.0])[0] == 2.0
    assert bootstrap([math.nan])[1] is None and math.isnan(bootstrap([math.nan])[0])
    assert bootstrap([4.0]) == (4.0, None)


def test_auc_is_the_chance_that_a_success_outscores_a_failure():
    random = np.random.default_rng(0)
    label, score = random.integers(2, size=40), random.integers(6, size=40) / 6
    pairs = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    samples = np.stack([label, score, np.full(40, 0.5)], 1)
    assert evaluate.auc(samples) == pytest.approx(np.mean(pairs))
    assert math.isnan(evaluate.auc(samples[label == 1]))


def test_balanced_accuracy_is_the_mean_recall():
    samples = np.array([[1, 0.9, 0.5], [1, 0.2, 0.5], [0, 0.1, 0.5], [0, 0.3, 0.5], [0, 0.4, 0.5]])
    assert evaluate.balanced_accuracy(samples) == pytest.approx((0.5 + 1) / 2)
    assert evaluate.STATISTICS["accuracy"](samples) == pytest.approx(0.8)


def test_correlation_from_moments_is_that_of_the_values():
    random = np.random.default_rng(0)
    y = random.normal(size=(30, 4, 2))
    x = 0.5 * y + random.normal(size=y.shape) + 1
    y[..., 1] = 0.7  # a dimension that never changes has no correlation
    r, r2 = evaluate.pearson_per_dim(evaluate.action_moments(x, y))
    assert r[0] == pytest.approx(np.corrcoef(x[..., 0].ravel(), y[..., 0].ravel())[0, 1])
    flat_x, flat_y = x[..., 0].ravel(), y[..., 0].ravel()
    expected = 1 - ((flat_x - flat_y) ** 2).sum() / ((flat_y - flat_y.mean()) ** 2).sum()
    assert r2[0] == pytest.approx(expected)
    assert math.isnan(r[1]) and math.isnan(r2[1])


def test_borda_sums_the_ranks_and_ties_share():
    values = [[30.0, 0.1], [28.0, 0.1], [25.0, 0.3]]  # PSNR up, LPIPS down
    assert evaluate.borda(np.array(values), [True, False]).tolist() == [2.5, 3.5, 6.0]
