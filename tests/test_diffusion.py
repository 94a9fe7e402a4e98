"""Laws of the objectives: exact answers of an oracle, and cached rollouts equal to uncached ones."""

import numpy as np
import pytest
import torch

from diffusion import DDPM, FlowMatching
from dit import load_dit


def uncached(model):
    """Hide the cache methods of a model."""

    def call(z_tau, tau, actions):
        return model(z_tau, tau, actions)

    call.config = model.config
    return call


@pytest.mark.parametrize("plain", [False, True], ids=["cached", "uncached"])
def test_the_released_rollout_is_reproduced(shared, plain):
    golden = {k: torch.tensor(v) for k, v in np.load(shared / "golden/rollout_flow.npz").items()}
    dit = load_dit(shared / "golden/dit_wide.pt", max_frames=6)
    out = FlowMatching(shift=2.4494897).rollout(
        uncached(dit) if plain else dit,
        golden["z"][:, :2],
        golden["a"],
        7,
        noise=golden["noise"],
    )
    torch.testing.assert_close(out, golden["out"], atol=1e-5, rtol=0)


def test_objectives_have_a_finite_loss_and_logs():
    z, actions = torch.randn(2, 4, 2, 2, 3), torch.randn(2, 4, 10)
    for objective in (FlowMatching(), DDPM()):
        loss, logs = objective.loss(lambda z, tau, a: torch.zeros_like(z), z, actions, 1)
        assert loss.isfinite() and not logs["loss"].requires_grad
