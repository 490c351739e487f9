"""Weights by motion: the definition, what they do to both objectives, and nothing at 0."""

import math

import numpy as np
import pytest
import torch

from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.motion import motion_weights
from vidworld.diffusion.objective import ObjectiveConfig, draw_levels, energy_loss, noise_like, shortcut_loss
from vidworld.errors import ConfigError
from vidworld.types import Frames


def half(z, level, step_BT):
    """A model that halves what it sees."""
    return z.map(lambda tensor: 0.5 * tensor)


def reference_weights(z_TVChw: np.ndarray, motion_weight: float) -> np.ndarray:
    """Position by position, for one clip."""
    frames, views, channels, height, width = z_TVChw.shape
    change = np.zeros((frames, views, height, width))
    for t, v, y, x in np.ndindex(change.shape):
        if t > 0:
            now, before, first = (z_TVChw[s, v, :, y, x] for s in (t, t - 1, 0))
            total = sum((now[c] - before[c]) ** 2 + (now[c] - first[c]) ** 2 for c in range(channels))
            change[t, v, y, x] = math.sqrt(total / channels / 2)
    return (1 + motion_weight * change / change.mean()) / (1 + motion_weight)


@pytest.mark.parametrize("motion_weight", [0.5, 3.0])
def test_parity_with_plain_loops(draw_frames, motion_weight: float) -> None:
    clean = draw_frames()
    got_BTVhw = motion_weights(clean, motion_weight)[:, :, :, 0]
    for row in range(4):
        expected = reference_weights(clean.latents_BTVChw[row].numpy(), motion_weight)
        np.testing.assert_allclose(got_BTVhw[row].numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(got_BTVhw.flatten(1).mean(1), torch.ones(4).double())
    assert (got_BTVhw[:, 0] == 1 / (1 + motion_weight)).all(), "nothing is before the first frame"


def test_what_moved_and_rests_keeps_its_weight() -> None:
    """An object goes from place 0 to place 3 in frame 2 and stays; place 1 never changes."""
    latents = torch.zeros(1, 6, 1, 2, 1, 4)
    latents[:, :2, ..., 0], latents[:, 2:, ..., 3] = 1.0, 1.0
    weight_Tw = motion_weights(Frames(latents, torch.zeros(1, 6, 1)), 1.0)[0, :, 0, 0, 0]
    assert torch.equal(weight_Tw[:, 1], torch.full((6,), 0.5))
    assert (weight_Tw[2:, [0, 3]] > 1.2).all(), "the place it left and the one where it lies"
    assert (weight_Tw[2, 3] > weight_Tw[5, 3] > 1).all(), "most while it moves"


def test_a_still_clip_weighs_evenly() -> None:
    clip = torch.randn(1, 1, 1, 4, 4, 4).expand(2, 5, -1, -1, -1, -1)
    assert torch.equal(motion_weights(Frames(clip, torch.zeros(2, 5, 1)), 2.0), torch.ones(2, 5, 1, 1, 4, 4))


def test_rows_do_not_know_each_other(draw_frames) -> None:
    """So that accumulated micro-batches equal one large batch."""
    clean = draw_frames(4)
    assert torch.equal(motion_weights(clean, 1.0)[2:3], motion_weights(clean[2:3], 1.0))


def test_zero_is_bitwise_the_loss_without_weights(draw_frames, generator) -> None:
    clean, noise = draw_frames(), draw_frames()
    draws = draw_levels(clean, ObjectiveConfig(), num_bootstrap=0, generator=generator)
    signal = draws.level.signal

    def plain() -> torch.Tensor:
        losses = []
        for x, eps in ((clean.latents_BTVChw, noise.latents_BTVChw), (clean.proprio_BTS, noise.proprio_BTS)):
            tau = draws.level.signal_like(x)
            losses.append((0.5 * ((1 - tau) * eps + tau * x) - x).flatten(2).square().mean(-1))
        ramp_BT = 0.9 * signal + 0.1
        loss_BT = ramp_BT * (losses[0] + 0.2 * losses[1])
        return loss_BT.sum() / loss_BT.numel()

    def loss(motion_weight: float) -> torch.Tensor:
        config = ObjectiveConfig(motion_weight=motion_weight)
        return shortcut_loss(half, half, clean, noise, draws, config)["loss"]

    assert torch.equal(loss(0.0), plain())
    assert not torch.equal(loss(0.1), plain()), "negative control"


def test_the_loss_is_the_weighted_mean_and_the_log_the_plain_one(draw_frames, generator) -> None:
    clean, noise = draw_frames(), draw_frames()
    draws = draw_levels(clean, ObjectiveConfig(), num_bootstrap=0, generator=generator)
    weighted, plain = (
        shortcut_loss(
            half, half, clean, noise, draws, ObjectiveConfig(motion_weight=w, ramp=(0, 1), proprio_weight=0)
        )
        for w in (2.0, 0.0)
    )
    tau = draws.level.signal_like(clean.latents_BTVChw)
    error = 0.5 * ((1 - tau) * noise.latents_BTVChw + tau * clean.latents_BTVChw) - clean.latents_BTVChw
    expected = (motion_weights(clean, 2.0) * error.square()).mean()
    torch.testing.assert_close(weighted["loss"], expected)
    assert weighted["latents"] == plain["latents"] == plain["loss"]


def test_patches_of_the_energy_score_are_weighted(draw_frames, generator) -> None:
    clean = draw_frames()
    noise = noise_like(Frames.cat([clean] * 2, 1), generator=generator)

    def loss(motion_weight: float, global_weight: float) -> float:
        energy = EnergyConfig(patch=2, global_weight=global_weight)
        config = ObjectiveConfig(
            kind="energy", energy=energy, motion_weight=motion_weight, proprio_weight=0.0
        )
        return energy_loss(half, clean, noise, config)["loss"].item()

    samples = (0.5 * noise.latents_BTVChw).unflatten(1, (2, -1)).float()
    weight = motion_weights(clean, 2.0).float()
    total, count = 0.0, 0
    for view, y, x in np.ndindex(2, 2, 3):
        at = (..., view, slice(None), slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        truth, members = clean.latents_BTVChw[at].float().flatten(2), samples[at].flatten(3)
        error = (members - truth[:, None]).norm(dim=-1).mean(1)
        score = error - 0.5 * (1 - 0.05 / 2) * (members[:, 0] - members[:, 1]).norm(dim=-1)
        total += (score / 4 * weight[at].flatten(2).mean(-1)).mean().item()
        count += 1
    assert loss(2.0, 0.0) == pytest.approx(total / count, rel=1e-5)
    assert abs(loss(2.0, 0.0) - loss(0.0, 0.0)) > 1e-3, "negative control"
    whole = loss(0.0, 1.0) - loss(0.0, 0.0)
    assert loss(2.0, 1.0) - loss(2.0, 0.0) == pytest.approx(whole, rel=1e-4), "whole frames as before"


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="motion_weight"):
        ObjectiveConfig(motion_weight=weight)
