"""Adaptive importance sampling against quadrature, on targets that are bent, rough, or all alike."""

import numpy as np
import pytest

from vidworld.lab.emulator import Emulator
from vidworld.lab.importance import Kernels, effective, sample


def bent(points_ND: np.ndarray) -> np.ndarray:
    """A thin banana."""
    first_N, second_N = points_ND.T
    return np.stack([(second_N - first_N**2 + 0.5) / 0.1, (first_N - 0.4) / 0.6], axis=1)


def rough(points_ND: np.ndarray) -> np.ndarray:
    """A narrow target whose errors jump by two standard deviations from one hair's breadth to the next."""
    return np.stack([(points_ND[:, 0] - 1.2) / 0.1 + 2 * np.sin(900 * points_ND[:, 0])], axis=1)


def split(points_ND: np.ndarray) -> np.ndarray:
    """Two narrow peaks, one of them with a ninth of the other's mass."""
    return (np.abs(points_ND[:, :1] - 0.9) - 1.2) / 0.08


def quadrature(simulate, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of prior x likelihood on a grid."""
    axis = np.linspace(-5, 5, 40_001 if dims == 1 else 1201)
    grid_ND = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), axis=-1).reshape(-1, dims)
    log_N = -0.5 * np.square(grid_ND).sum(1) - 0.5 * np.square(simulate(grid_ND)).sum(1)
    weights_N = np.exp(log_N - log_N.max())
    weights_N /= weights_N.sum()
    mean_D = weights_N @ grid_ND
    return mean_D, np.sqrt(weights_N @ (grid_ND - mean_D) ** 2)


@pytest.mark.parametrize(("simulate", "dims", "least"), [(bent, 2, 80), (rough, 1, 30), (split, 1, 80)])
def test_moments_are_those_of_quadrature(simulate, dims, least):
    mean_D, spread_D = quadrature(simulate, dims)
    means, spreads, naive, unweighted, worth, prior = [], [], [], [], [], []
    for seed in range(8):
        found = sample(simulate, dims, 300, np.random.default_rng(seed))
        assert found.adapted
        weights_N = np.exp(found.log_weights_N - found.log_weights_N.max())
        weights_N /= weights_N.sum()
        worth.append(effective(found.log_weights_N))
        means.append(weights_N @ found.points_ND)
        spreads.append(weights_N @ (found.points_ND - mean_D) ** 2)
        unweighted.append(np.square(found.points_ND - mean_D).mean(0))
        # Negative controls: no weights at all, and prior x likelihood alone, as if draws had been uniform.
        log_N = -0.5 * np.square(found.points_ND).sum(1) - 0.5 * np.square(simulate(found.points_ND)).sum(1)
        alone_N = np.exp(log_N - log_N.max())
        naive.append(alone_N / alone_N.sum() @ (found.points_ND - mean_D) ** 2)
        points_ND = np.random.default_rng(seed).standard_normal((300, dims))
        prior.append(effective(-0.5 * np.square(simulate(points_ND)).sum(1)))
    assert np.mean(worth) > least
    assert np.mean(worth) > 3 * np.mean(prior)
    bound_D = 4 * spread_D / np.sqrt(np.sum(worth))
    assert (np.abs(np.mean(means, axis=0) - mean_D) < bound_D).all()
    np.testing.assert_allclose(np.sqrt(np.mean(spreads, axis=0)), spread_D, rtol=0.12)
    for wrong in (naive, unweighted):
        assert (np.abs(np.sqrt(np.mean(wrong, axis=0)) / spread_D - 1) > 0.12).any()


def test_what_tells_nothing_leaves_draws_of_the_prior():
    found = sample(lambda points_ND: np.zeros((len(points_ND), 3)), 2, 200, np.random.default_rng(0))
    assert not found.adapted
    np.testing.assert_array_equal(found.log_weights_N, 0)
    few = sample(bent, 2, 79, np.random.default_rng(0))
    assert not few.adapted
    np.testing.assert_array_equal(few.log_weights_N, -0.5 * np.square(bent(few.points_ND)).sum(1))


def test_kernels_have_the_density_that_they_are_drawn_from():
    rng = np.random.default_rng(0)
    kernels = Kernels.around(0.3 * rng.standard_normal((300, 2)) + (1.0, -1.0), rng)
    axis = np.linspace(-6, 6, 241)
    grid_ND = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    mass_N = np.exp(kernels.log_density(grid_ND)) * (axis[1] - axis[0]) ** 2
    assert mass_N.sum() == pytest.approx(1, abs=5e-3)
    inside_N = (np.abs(grid_ND - (1.0, -1.0)) < 0.3).all(1)
    drawn_ND = kernels.draw(40_000, rng)
    share = (np.abs(drawn_ND - (1.0, -1.0)) < 0.3).all(1).mean()
    assert share == pytest.approx(mass_N[inside_N].sum(), abs=0.015)


def test_the_emulator_predicts_what_it_has_not_seen_and_knows_when_it_cannot():
    rng = np.random.default_rng(0)
    points_ND, held_ND = rng.standard_normal((120, 2)), rng.standard_normal((200, 2))
    many = rng.standard_normal((2, 40))  # as many readings as frames, of two independent quantities
    emulator = Emulator(points_ND, bent(points_ND) @ many)
    inside_N = np.square(held_ND).sum(1) < 2
    true_N = -0.5 * np.square(bent(held_ND) @ many).sum(1)
    told_N = emulator.log_likelihood(held_ND)
    near_N = inside_N & (true_N > -15)
    assert near_N.sum() >= 5
    assert np.abs(np.sqrt(-2 * told_N[near_N]) - np.sqrt(-2 * true_N[near_N])).max() < 1.5
    # Far from all training points the expected likelihood is flat: an open mind, not a wrong certainty.
    far = emulator.log_likelihood(np.array([[40.0, 40.0]]))[0]
    assert far > -0.5 * np.square(bent(np.array([[40.0, 40.0]])) @ many).sum() / 100
