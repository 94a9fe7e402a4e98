"""Encoders load the public layouts strictly and compute the upstream features."""

import pytest
import torch

from data import InputError
from encoders import EncoderConfig, create_autoencoder


def test_pixels_are_orthonormal_and_exactly_invertible():
    encoder = create_autoencoder(EncoderConfig("pixels", patch_size=8))
    frames = torch.randint(0, 256, (2, 3, 16, 24, 3), dtype=torch.uint8)
    z = encoder.encode(frames)
    assert z.shape == (2, 3, 2, 3, 192) and encoder.latent_dim == 192
    assert torch.equal((encoder.decode(z) * 255).round().to(torch.uint8), frames)
    x = 2 * frames.double() / 255 - 1
    torch.testing.assert_close(z.double().norm(), x.norm())
    torch.testing.assert_close(z, encoder.encode(frames / 255))


@pytest.mark.parametrize(
    "frames",
    [
        torch.rand(1, 1, 16, 16, 4),
        torch.rand(16, 16, 3),
        torch.rand(1, 1, 12, 16, 3),
        torch.rand(1, 1, 16, 16, 3) * 255,
        torch.rand(1, 1, 16, 16, 3) * 2 - 1,
        torch.full((1, 1, 16, 16, 3), float("nan")),
        torch.zeros(1, 1, 16, 16, 3, dtype=torch.int64),
        torch.rand(0, 1, 16, 16, 3),
    ],
)
def test_frames_that_are_no_video_are_refused(frames):
    with pytest.raises(InputError):
        create_autoencoder(EncoderConfig("pixels", patch_size=8)).encode(frames)
