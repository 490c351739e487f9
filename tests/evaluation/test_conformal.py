"""Bands hold whole rollouts as often as they say; stretched samples spread as they err."""

import numpy as np
import pytest

from vidworld.errors import DataError
from vidworld.evaluation.conformal import fit_bands, inflate, inflation
from vidworld.evaluation.verification import spread_and_error, spread_skill

LEADS, DIMENSIONS, SAMPLES = 12, 2, 8


def rollouts(episodes: int, seed: int, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Samples [E, M, T, S] and truths [E, T, S]: errors are random walks, and samples spread too little."""
    rng = np.random.default_rng(seed)
    units = np.array([1.0, 40.0])
    walks = rng.normal(size=(episodes, SAMPLES + 1, LEADS, DIMENSIONS)).cumsum(2) * units
    return spread * walks[:, 1:], walks[:, 0]


def test_bands_hold_whole_rollouts_with_the_stated_probability() -> None:
    held, held_at_each = [], []
    for seed in range(150):
        samples, truth = rollouts(58, seed)
        bands = fit_bands(samples[:38], truth[:38], level=0.9)
        held += [bands.holds(s, t) for s, t in zip(samples[38:], truth[38:], strict=True)]
        # Negative control: a quantile of each lead alone, which lets many rollouts leave somewhere.
        error = np.abs(samples.mean(1) - truth)
        radius = np.quantile(error[:38], 0.9, axis=0, method="higher")
        held_at_each += (error[38:] <= radius).all((1, 2)).tolist()
    assert 0.89 < np.mean(held) < 0.96
    assert np.mean(held_at_each) < 0.8


def test_bands_grow_with_the_lead_and_keep_units() -> None:
    samples, truth = rollouts(60, 0)
    bands = fit_bands(samples, truth)
    low, high = bands.around(samples[0])
    width = high - low
    assert width[-1, 0] > 2 * width[0, 0]
    assert width[-1, 1] / width[-1, 0] == pytest.approx(40, rel=0.5)


def test_too_few_episodes_are_refused_with_the_number_needed() -> None:
    samples, truth = rollouts(16, 0)
    with pytest.raises(DataError, match="episodes for bands of 90%: got 16, expected 17 or more"):
        fit_bands(samples, truth)
    fit_bands(*rollouts(17, 0))


def test_stretched_samples_spread_as_they_err_on_other_episodes() -> None:
    samples, truth = rollouts(3000, 0)
    factor = inflation(samples, truth)
    assert factor.shape == (LEADS,)
    assert factor == pytest.approx(np.full(LEADS, 2.0), rel=0.2)
    others, seen = rollouts(3000, 1)
    scaled = np.stack([inflate(one, factor) for one in others])
    ratio = spread_skill(*spread_and_error(np.moveaxis(scaled, 1, 0)[..., 0], seen[..., 0]))
    assert ratio == pytest.approx(1.0, abs=0.07)
    before = spread_skill(*spread_and_error(np.moveaxis(others, 1, 0)[..., 0], seen[..., 0]))
    assert before < 0.6
    np.testing.assert_allclose(scaled.mean(1), others.mean(1), atol=1e-9)
