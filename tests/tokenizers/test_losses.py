"""The reconstruction loss against a plain NumPy reading of its definition."""

import numpy as np
import pytest
import torch

from vidworld.tokenizers.losses import ReconstructionLossConfig, reconstruction_loss

CONFIG = ReconstructionLossConfig(l1=1.0, l2=7.0, gradient=0.3, latent=0.01)


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 6, 8, generator=generator) * 2 - 1
    reconstruction = target + 0.1 * torch.randn(target.shape, generator=generator)
    return reconstruction, target, torch.randn(3, 16, 2, 2, generator=generator)


def test_parts_and_sum_match_numpy(pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reconstruction, target, latents = pictures
    found = reconstruction_loss(reconstruction, target, latents, CONFIG)
    r, x, z = (tensor.numpy().astype(np.float64) for tensor in pictures)
    expected = {
        "l1": np.abs(r - x).mean(),
        "l2": ((r - x) ** 2).mean(),
        "gradient": np.abs(np.diff(r, axis=-1) - np.diff(x, axis=-1)).mean()
        + np.abs(np.diff(r, axis=-2) - np.diff(x, axis=-2)).mean(),
        "latent": (z**2).mean(),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    assert float(found["loss"]) == pytest.approx(
        expected["l1"] + 7 * expected["l2"] + 0.3 * expected["gradient"] + 0.01 * expected["latent"], rel=1e-5
    )
    per_picture = ((r - x) ** 2).mean((1, 2, 3))
    assert float(found["psnr"]) == pytest.approx((10 * np.log10(4 / per_picture)).mean(), rel=1e-5)


def test_a_perfect_picture_costs_only_its_latents() -> None:
    target = torch.rand(2, 3, 16, 16)
    found = reconstruction_loss(target, target, torch.full((2, 16, 2, 2), 2.0), CONFIG)
    assert float(found["loss"]) == pytest.approx(0.04)
    assert float(found["psnr"]) > 100


def test_a_constant_shift_has_no_gradient_error() -> None:
    target = torch.rand(2, 3, 16, 16)
    found = reconstruction_loss(target + 0.1, target, torch.zeros(2, 16, 2, 2), CONFIG)
    assert float(found["gradient"]) < 1e-6
    assert float(found["l1"]) == pytest.approx(0.1, rel=1e-5)


def test_only_the_loss_carries_gradient(pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reconstruction, target, latents = (tensor.requires_grad_() for tensor in pictures)
    found = reconstruction_loss(reconstruction, target, latents, CONFIG)
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]


def test_half_precision_is_compared_in_float32(
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    reconstruction, target, latents = pictures
    found = reconstruction_loss(reconstruction.bfloat16(), target, latents, CONFIG)
    assert all(value.dtype == torch.float32 for value in found.values())
