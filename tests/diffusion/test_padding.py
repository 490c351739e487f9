"""Objectives of padded rows are those of the rows without their padding."""

import pytest
import torch

from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.objective import ObjectiveConfig, draw_levels, energy_loss, shortcut_loss
from vidworld.types import Frames

VIEWS, HEIGHT, WIDTH = 1, 2, 4
USED = torch.tensor([VIEWS * HEIGHT * WIDTH / (2 * 4 * 4)])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(seed: int, time: int = 3) -> Frames:
    """A row of 2 views of 4x4, of which only 1 view of 2x4 is not zero."""
    latents = torch.zeros(1, time, 2, 3, 4, 4, dtype=torch.float64)
    latents[:, :, :VIEWS, :, :HEIGHT, :WIDTH] = normal(seed, 1, time, VIEWS, 3, HEIGHT, WIDTH)
    return Frames(latents, normal(seed + 100, 1, time, 2))


def cut(frames: Frames) -> Frames:
    return Frames(frames.latents_BTVChw[:, :, :VIEWS, :, :HEIGHT, :WIDTH], frames.proprio_BTS)


def toy(frames: Frames, level, step_BT) -> Frames:
    """Keeps zeros zero, as the network does."""
    return frames.map(lambda tensor: torch.tanh(0.7 * tensor))


@pytest.mark.parametrize("motion_weight", [0.0, 2.0])
@pytest.mark.parametrize("bootstrap", [0, 1])
def test_shortcut(bootstrap: int, motion_weight: float) -> None:
    config = ObjectiveConfig(shift="none", motion_weight=motion_weight)
    clean, noise = padded(0), padded(1)
    draws = draw_levels(clean, config, num_bootstrap=bootstrap, generator=torch.Generator().manual_seed(2))
    whole = shortcut_loss(toy, toy, clean, noise, draws, config, used_B=USED)
    own = shortcut_loss(toy, toy, cut(clean), cut(noise), draws, config)
    diluted = shortcut_loss(toy, toy, clean, noise, draws, config)
    for name, value in own.items():
        torch.testing.assert_close(whole[name], value)
    assert diluted["latents"] < 0.5 * own["latents"], "negative control"


@pytest.mark.parametrize("motion_weight", [0.0, 2.0])
def test_energy(motion_weight: float) -> None:
    energy = EnergyConfig(samples=2, patch=2)
    config = ObjectiveConfig(kind="energy", energy=energy, motion_weight=motion_weight)
    clean, noise = padded(0), padded(1, time=6)
    whole = energy_loss(toy, clean, noise, config, used_B=USED)
    own = energy_loss(toy, cut(clean), cut(noise), config)
    for name, value in own.items():
        torch.testing.assert_close(whole[name], value)
    assert energy_loss(toy, clean, noise, config)["latents"] < 0.8 * own["latents"], "negative control"


def test_energy_sends_no_nan_into_padding() -> None:
    """The norm of a vector of zeros has no slope of its own."""
    clean, noise = padded(0), padded(1, time=6)
    noise.latents_BTVChw.requires_grad_()
    config = ObjectiveConfig(kind="energy")
    energy_loss(toy, clean, noise, config, used_B=USED)["loss"].backward()
    assert noise.latents_BTVChw.grad is not None
    assert noise.latents_BTVChw.grad.isfinite().all()
