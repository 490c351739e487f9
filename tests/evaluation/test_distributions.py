"""Distances, AUROC, supports and the probe, held to closed forms and to brute force."""

import itertools

import numpy as np
import pytest

from vidworld.errors import ConfigError
from vidworld.evaluation.distributions import (
    KernelRidge,
    auroc,
    auroc_interval,
    outside,
    wasserstein,
    weighted_std,
)


def test_wasserstein_is_the_cheapest_assignment():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=5), rng.normal(1, 2, 5)
    brute = min(np.abs(first - second[list(order)]).mean() for order in itertools.permutations(range(5)))
    assert wasserstein(first, second) == pytest.approx(brute)
    assert wasserstein(first, first) == 0
    # A sample and the same sample with every draw twice are one distribution.
    assert wasserstein(np.repeat(second, 3), second) == pytest.approx(0, abs=1e-12)
    assert wasserstein(first, second + 1000) == pytest.approx(1000 + (second - first).mean())


def test_weights_are_repeats():
    rng = np.random.default_rng(1)
    first, second, counts = rng.normal(size=40), rng.normal(size=6), np.array([1, 4, 2, 0, 3, 1])
    repeated = np.repeat(second, counts)
    assert wasserstein(first, second, counts) == pytest.approx(wasserstein(first, repeated))
    assert weighted_std(second, np.ones(6)) == pytest.approx(second.std(ddof=1))
    with pytest.raises(ConfigError):
        wasserstein(first, second[:0])


def test_auroc_of_gaussians_has_its_closed_form():
    rng = np.random.default_rng(2)
    ordinary, strange = rng.normal(size=4000), rng.normal(1.5, 1, 4000)
    expected = 0.8556  # Phi(1.5 / sqrt(2))
    assert auroc(ordinary, strange) == pytest.approx(expected, abs=0.015)
    assert auroc(strange, ordinary) == pytest.approx(1 - auroc(ordinary, strange))
    assert auroc(np.zeros(3), np.zeros(5)) == 0.5
    low, high = auroc_interval(ordinary[:60], strange[:60])
    assert low < auroc(ordinary[:60], strange[:60]) < high
    assert 0.05 < high - low < 0.25


def test_what_cannot_happen_is_outside():
    support = np.array([[0.0, 0.0], [1.0, 2.0], [0.5, 1.0]])
    samples = np.array([[0.5, 0.5], [1.05, 1.0], [0.5, 2.5], [-0.2, -1.0]])
    assert outside(samples, support, np.array([0.1, 0.1])) == 0.5
    assert outside(samples, support, np.array([0.0, 0.0])) == 0.75
    assert outside(samples, support, np.array([9.0, 9.0])) == 0


def test_the_probe_learns_what_is_there_and_says_when_nothing_is():
    rng = np.random.default_rng(3)
    features = np.concatenate([rng.normal(size=(400, 3)), np.ones((400, 1))], 1)
    target = np.sin(2 * features[:, 0]) + features[:, 1] ** 2
    probe = KernelRidge(features[:300], target[:300])
    error = np.square(probe(features[300:]) - target[300:]).mean() / target[300:].var()
    assert error < 0.15
    assert probe.r2 == pytest.approx(1 - error, abs=0.15)
    changed = features[300:].copy()
    changed[:, 3] = 1e6
    np.testing.assert_allclose(probe(changed), probe(features[300:]), err_msg="it never varied")
    assert KernelRidge(features[:300], rng.normal(size=300)).r2 < 0.1
