"""Laws of the DiT: causality, offsets, views, released weights."""

import numpy as np
import torch

from dit import DIT_SIZES, DiT, DiTConfig, load_dit


def random_dit(**fields) -> DiT:
    """Build a small DiT whose output layers are not zero."""
    config = dict(in_channels=6, dim=48, depth=2, heads=2, max_frames=5) | fields
    dit = DiT(DiTConfig(**config)).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def test_released_weights_give_the_released_velocity(shared):
    golden = {k: torch.tensor(v) for k, v in np.load(shared / "golden/dit_wide.npz").items()}
    dit = load_dit(shared / "golden/dit_wide.pt")
    with torch.no_grad():
        v = dit(golden["z"], golden["tau"], golden["a"])
        v_null = dit(golden["z"], golden["tau"], golden["a"], torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(v, golden["v"], atol=1e-5, rtol=0)  # float32, other operator order
    torch.testing.assert_close(v_null, golden["v_null"], atol=1e-5, rtol=0)


def test_sizes_have_the_parameters_of_the_paper():
    with torch.device("meta"):
        dit = DiT(DiTConfig(96, 1, **DIT_SIZES["S"]))
    assert abs(sum(p.numel() for p in dit.parameters()) / 1e6 - 64.445) < 1e-3
