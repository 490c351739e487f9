"""Weights by motion: the definition, what they do to both objectives, and nothing at 0."""

import math

import numpy as np
import pytest
import torch

from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.motion import MOST, motion_weights
from vidworld.diffusion.objective import ObjectiveConfig, draw_levels, energy_loss, noise_like, shortcut_loss
from vidworld.errors import ConfigError
from vidworld.types import Frames


def half(z, level, step_BT):
    """A model that halves what it sees."""
    return z.map(lambda tensor: 0.5 * tensor)


def reference_weights(z_TVChw: np.ndarray, motion_weight: float) -> np.ndarray:
    """Position by position, for one clip."""
    frames, views, channels, height, width = z_TVChw.shape
    own = np.zeros((frames, views, height, width))
    for t, v, y, x in np.ndindex(own.shape):
        if t > 1:
            newest, before, first = (z_TVChw[s, v, :, y, x] for s in (t - 1, t - 2, 0))
            total = sum((newest[c] - before[c]) ** 2 + (newest[c] - first[c]) ** 2 for c in range(channels))
            own[t, v, y, x] = math.sqrt(total / channels / 2)
    weights = np.ones_like(own)
    for t in range(2, frames):
        change = np.zeros_like(own[t])
        for v, y, x in np.ndindex(change.shape):
            change[v, y, x] = own[t, v, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
        relative = np.minimum(change / change.mean(), MOST)
        weights[t] = (1 + motion_weight * relative) / (1 + motion_weight * relative.mean())
    return weights


@pytest.mark.parametrize("motion_weight", [0.5, 3.0])
def test_parity_with_plain_loops(draw_frames, motion_weight: float) -> None:
    clean = draw_frames(2, 5)
    got_BTVhw = motion_weights(clean, motion_weight)[:, :, :, 0]
    for row in range(2):
        expected = reference_weights(clean.latents_BTVChw[row].numpy(), motion_weight)
        np.testing.assert_allclose(got_BTVhw[row].numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(got_BTVhw.flatten(2).mean(2), torch.ones(2, 5).double())
    assert (got_BTVhw[:, :2] == 1).all(), "nothing can have moved before the first two"


def test_a_frame_does_not_weigh_itself(draw_frames) -> None:
    """Else what is made up is cheap, what is missed is dear, and neither mean nor score is a proper one."""
    clean = draw_frames(2, 6)
    before = motion_weights(clean, 1.0)
    latents = clean.latents_BTVChw.clone()
    latents[:, 3:] += torch.randn(latents[:, 3:].shape, dtype=latents.dtype)
    after = motion_weights(Frames(latents, clean.proprio_BTS), 1.0)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 0.1, "negative control"


def test_the_mean_that_is_learnt_is_the_mean_of_what_happens() -> None:
    """A thing moves on in a fifth of the clips: the weighted squared error is least at a fifth."""
    latents = torch.zeros(1000, 5, 1, 1, 1, 8)
    latents[:, 1, ..., 0] = latents[:, 2, ..., 1] = 1.0
    latents[:200, 3, ..., 2] = latents[200:, 3, ..., 1] = 1.0
    truth = latents[:, 3, 0, 0, 0]
    weight = motion_weights(Frames(latents, torch.zeros(1000, 5, 1)), 3.0)[:, 3, 0, 0, 0]
    best_w = (weight * truth).sum(0) / weight.sum(0)
    torch.testing.assert_close(best_w[1:3], torch.tensor([0.8, 0.2]))
    own = 1 + 3 * (truth - latents[:, 2, 0, 0, 0]).abs() * 4
    assert ((own * truth).sum(0) / own.sum(0))[2] > 0.5, "negative control: weighed by its own change"


def test_what_moved_and_rests_keeps_its_weight() -> None:
    """An object goes from place 0 to place 8 in frame 2 and stays; place 4 is far from both."""
    latents = torch.zeros(1, 7, 1, 2, 1, 9)
    latents[:, :2, ..., 0], latents[:, 2:, ..., 8] = 1.0, 1.0
    weight_Tw = motion_weights(Frames(latents, torch.zeros(1, 7, 1)), 1.0)[0, :, 0, 0, 0]
    torch.testing.assert_close(weight_Tw[3:, 4], torch.full((4,), 0.5))
    assert (weight_Tw[:3] == 1).all()
    assert (weight_Tw[3:][:, [0, 1, 7, 8]] > 1.2).all(), "the place it left and the one where it lies"


def test_one_thing_that_moves_does_not_make_all_else_forgotten() -> None:
    """One place of 900 changes: it counts 1 + MOST times as much as others, which keep their weight."""
    latents = torch.zeros(1, 5, 1, 2, 30, 30)
    latents[:, 1::2, ..., 7, 11] = 1.0
    weight = motion_weights(Frames(latents, torch.zeros(1, 5, 1)), 1.0)[0, 2:, 0, 0]
    assert weight.max() / weight.min() == pytest.approx(1 + MOST, rel=1e-5)
    assert weight.min() > 0.9
    assert weight[0].mean() == pytest.approx(1, rel=1e-5)


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
    assert abs(loss(2.0, 0.0) - loss(0.0, 0.0)) > 1e-4, "negative control"
    whole = loss(0.0, 1.0) - loss(0.0, 0.0)
    assert loss(2.0, 1.0) - loss(2.0, 0.0) == pytest.approx(whole, rel=1e-4), "whole frames as before"


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="motion_weight"):
        ObjectiveConfig(motion_weight=weight)
