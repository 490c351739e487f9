import itertools

import pytest
import torch

from vidworld.diffusion.guidance import guide
from vidworld.diffusion.samplers import euler, heun, scheduled_euler
from vidworld.diffusion.schedule import autoregressive, full_sequence, pyramid
from vidworld.types import Frames

MEAN, STD = 0.7, 0.4


def gaussian_posterior_mean(z, level, step_BT):
    """E[x | z] for x ~ N(MEAN, STD^2): the perfect denoiser of Gaussian data."""

    def posterior(z):
        tau = level.signal_like(z)
        variance = (1 - tau) ** 2 + tau**2 * STD**2
        return MEAN + STD**2 * tau / variance * (z - tau * MEAN)

    return z.map(posterior)


def transported(noise: Frames) -> Frames:
    """The exact end of the flow: it maps N(0, 1) to N(MEAN, STD^2) monotonically."""
    return noise.map(lambda eps: MEAN + STD * eps)


def worst(a: Frames, b: Frames) -> float:
    difference = a.map(torch.sub, b)
    return max(difference.latents_BTVChw.abs().max().item(), difference.proprio_BTS.abs().max().item())


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_convergence_order_on_gaussian_data(sampler, order, draw_frames):
    noise = draw_frames()
    errors = [
        worst(sampler(gaussian_posterior_mean, noise, steps), transported(noise)) for steps in (32, 64, 128)
    ]
    assert errors[-1] < {1: 0.02, 2: 5e-4}[order]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_straight_paths_are_followed_exactly(sampler, steps, draw_frames):
    clean, noise = draw_frames(), draw_frames()
    assert worst(sampler(lambda z, level, step: clean, noise, steps), clean) < 1e-12


def test_one_euler_step_is_the_prediction(draw_frames):
    noise = draw_frames()
    assert (
        worst(euler(gaussian_posterior_mean, noise, 1), noise.map(lambda z: torch.full_like(z, MEAN))) < 1e-12
    )


def test_levels_and_steps_that_the_model_is_told(draw_frames):
    noise, told = draw_frames(), []

    def spy(z, level, step_BT):
        assert level.signal.shape == step_BT.shape == (4, 3)
        told.append((level.signal[0, 0].item(), step_BT[0, 0].item()))
        return z

    euler(spy, noise, 4)
    assert told == [(0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]
    told.clear()
    euler(spy, noise, 4, finest_steps=2)
    assert {step for _, step in told} == {0.5}, "no finer than was trained"
    told.clear()
    heun(spy, noise, 2, finest_steps=16)
    assert told == [(0, 1 / 16), (0.5, 1 / 16), (0.5, 1 / 16)], (
        "instantaneous velocities, and never at tau = 1"
    )


@pytest.mark.parametrize("sampler", [euler, heun])
def test_gradients_flow_through(sampler, draw_frames):
    noise = draw_frames().map(lambda tensor: tensor.requires_grad_())
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def predict(z, level, step_BT):
        return gaussian_posterior_mean(z, level, step_BT).map(lambda x: gain * x)

    def total(gain_value: float) -> float:
        frames = sampler(lambda *a: gaussian_posterior_mean(*a).map(lambda x: gain_value * x), noise, 4)
        return frames.proprio_BTS.sum().item()

    sampler(predict, noise, 4).proprio_BTS.sum().backward()
    numeric = (total(0.5 + 1e-5) - total(0.5 - 1e-5)) / 2e-5
    assert gain.grad is not None
    assert gain.grad.item() == pytest.approx(numeric, rel=1e-6)
    assert noise.proprio_BTS.grad.abs().min() > 0
    with torch.no_grad():
        assert not sampler(predict, noise, 4).proprio_BTS.requires_grad


def test_full_sequence_schedule_is_plain_euler(draw_frames):
    noise = draw_frames()
    by_matrix = scheduled_euler(gaussian_posterior_mean, noise, full_sequence(3, 8))
    assert worst(by_matrix, euler(gaussian_posterior_mean, noise, 8)) < 1e-12


@pytest.mark.parametrize("matrix", [autoregressive(3, 8), pyramid(3, 8, 3)])
def test_order_does_not_matter_for_independent_frames(matrix, draw_frames):
    noise = draw_frames()
    by_matrix = scheduled_euler(gaussian_posterior_mean, noise, matrix)
    assert worst(by_matrix, euler(gaussian_posterior_mean, noise, 8)) < 1e-12


def test_resting_frames_are_left_exactly_as_they_are(draw_frames):
    """In autoregressive order, later frames stay their noise and earlier ones stay finished, bit for bit."""
    noise, seen = draw_frames(), []

    def spy(z, level, step_BT):
        seen.append((z, level.signal[0].tolist()))
        assert (step_BT > 0).all()
        return gaussian_posterior_mean(z, level, step_BT)

    end = scheduled_euler(spy, noise, autoregressive(3, 2))
    assert [levels for _, levels in seen][::2] == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert torch.equal(seen[3][0].latents_BTVChw[:, 2], noise.latents_BTVChw[:, 2])
    assert torch.equal(seen[2][0].latents_BTVChw[:, 0], end.latents_BTVChw[:, 0])


def test_impossible_requests_are_refused(draw_frames):
    for sampler in (euler, heun):
        with pytest.raises(ValueError, match="expected at least 1"):
            sampler(gaussian_posterior_mean, draw_frames(), 0)
    with pytest.raises(ValueError, match="schedule of 4 frames"):
        scheduled_euler(gaussian_posterior_mean, draw_frames(), full_sequence(4, 2))


def test_guidance(draw_frames, generator):
    noise, a, b = draw_frames(), draw_frames(), draw_frames()

    def with_action(z, level, step):
        return a

    def without(z, level, step):
        return b

    assert guide(with_action, without, 0.0) is with_action
    step = torch.ones(4, 3)
    guided = guide(with_action, without, 1.5)(noise, None, step)
    torch.testing.assert_close(guided.proprio_BTS, 2.5 * a.proprio_BTS - 1.5 * b.proprio_BTS)
    same = guide(with_action, with_action, 3.0)(noise, None, step)
    assert torch.equal(same.latents_BTVChw, a.latents_BTVChw)
