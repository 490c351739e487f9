"""Search over the network's noise: exact likelihoods, and better futures than drawing finds."""

import math

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.world.ensemble import Ensemble
from vidworld.world.scenario import log_likelihood, radius, search, stream_noise, tail


@pytest.fixture(scope="module")
def noisy(new_world):
    return new_world(noise_dims=3)


def angle(rolled):
    return rolled.proprio_BTS[..., 0].mean(1)


def test_the_streams_noise_given_by_hand_is_the_same_future(noisy, new_world, prompt, actions):
    given = actions(noisy, 4)
    for world in (noisy, Ensemble([noisy, new_world(noise_dims=3)])):
        state = world.reset(prompt(world), num_samples=2)
        noise_BTX = stream_noise(world, state, 4)
        expected = world.rollout(state, given, decode=False)
        assert torch.equal(
            world.rollout(state, given, decode=False, noise_BTX=noise_BTX).latents_BTVChw,
            expected.latents_BTVChw,
        )
        other = world.rollout(state, given, decode=False, noise_BTX=noise_BTX + 1)
        assert not torch.allclose(other.latents_BTVChw, expected.latents_BTVChw, atol=1e-3)


@pytest.mark.parametrize("worst", [True, False])
def test_it_finds_what_drawing_does_not_within_its_budget(noisy, prompt, actions, worst):
    given = torch.from_numpy(actions(noisy, 3))
    state = noisy.reset(prompt(noisy), num_samples=4)
    found = search(noisy, state, given, angle, worst=worst, steps=12, mass=0.9)
    drawn = noisy.rollout(noisy.reset(prompt(noisy), num_samples=64), given, decode=False)
    extreme = angle(drawn).min() if worst else angle(drawn).max()
    best = found.reward_B.min() if worst else found.reward_B.max()
    assert best < extreme if worst else best > extreme
    assert bool((found.reward_B <= found.start_B).all() if worst else (found.reward_B >= found.start_B).all())
    # What is reported is what it rolls out to, and within the ball.
    again = noisy.rollout(state, given, decode=False, noise_BTX=found.noise_BTX)
    assert torch.allclose(angle(again), found.reward_B, atol=1e-5)
    assert float(found.tail_B.min()) >= 0.1 - 1e-6
    # A smaller budget reaches less far.
    tight = search(noisy, state, given, angle, worst=worst, steps=12, mass=0.001)
    reach = abs(float(best - angle(drawn).mean()))
    assert abs(float((tight.reward_B.min() if worst else tight.reward_B.max()) - angle(drawn).mean())) < reach


def test_likelihoods_are_those_of_the_normal_distribution():
    noise_BTX = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise_BTX).sum((1, 2))
    assert torch.allclose(log_likelihood(noise_BTX), expected)
    # Two dimensions have a closed form: P(chi^2_2 >= r^2) = exp(-r^2 / 2).
    two = torch.tensor([[[1.0, 2.0]]])
    assert float(tail(two)) == pytest.approx(math.exp(-2.5), rel=1e-6)
    assert radius(2, 0.9) == pytest.approx(math.sqrt(-2 * math.log(0.1)), rel=1e-6)
    drawn = torch.randn(20_000, 6, 2, generator=torch.Generator().manual_seed(1))
    assert float((tail(drawn) < 0.1).double().mean()) == pytest.approx(0.1, abs=0.01)


def test_what_cannot_be_searched_is_refused(world, noisy, prompt, actions):
    given = torch.from_numpy(actions(world, 2))
    with pytest.raises(ConfigError, match="noise_dims 0"):
        search(world, world.reset(prompt(world)), given, angle, worst=True)
    state = noisy.reset(prompt(noisy))
    with pytest.raises(ConfigError, match="one without a gradient"):
        search(noisy, state, given, lambda rolled: angle(rolled).detach(), worst=True)
    with pytest.raises(ConfigError, match=r"mass 1\.5"):
        search(noisy, state, given, angle, worst=True, mass=1.5)
    with pytest.raises(ConfigError, match=r"got shape \(1, 3, 3\), expected \(1, 2, 3\)"):
        noisy.rollout(state, given, noise_BTX=torch.zeros(1, 3, 3))
    with pytest.raises(ConfigError, match="noise of the network"):
        world.rollout(world.reset(prompt(world)), given, noise_BTX=torch.zeros(1, 2, 0))
