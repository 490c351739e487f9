"""Adaptive importance sampling of a few hidden values whose likelihood takes a simulation.

Hidden values are points of a space in which their prior is the standard normal distribution. A first batch of
draws comes from the prior. Then, in rounds: an emulator of the simulation is fitted to all draws so far, its
posterior is sampled by tempered sequential Monte Carlo (calibrate, emulate, sample: Cleary et al. 2021), and
the next batch comes from a mixture of kernels on that sample. The emulator only says where to look. Each draw
is simulated, and weighs prior x likelihood / proposal, with the mixture of all batches as its proposal
(adaptive multiple importance sampling: Cornuet, Marin, Mira and Robert 2012), so the target is exact. The
prior stays in that mixture and bounds the weights (defensive mixtures: Hesterberg 1995).

N draws of D dimensions, R standardised errors of readings, J particles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import lgamma

import numpy as np

from vidworld.lab.emulator import Emulator

FIRST_SHARE, FEWEST_FIRST, ROUNDS = 0.2, 40, 6
"""Share and least number of draws that come from the prior; batches that follow."""
TRAINED_SHARE, MOST_TRAINED = 0.5, 150
"""The emulator is fitted to the better half of the draws, and not to more than so many."""
PARTICLES, MOVES, STEPS = 600, 6, (0.1, 0.4, 1.0)
"""Of the sampling of the emulator: Metropolis moves a temperature, and their sizes (2.38 / sqrt(D) is 1)."""
KERNELS, NEIGHBOURS, BANDWIDTH, FREEDOM = 200, 60, 0.6, 5.0
"""Kernels of a proposal, particles that shape each, its size, and the degrees of freedom of its tail."""


@dataclass(frozen=True)
class Kernels:
    """A mixture of equal Student kernels, each shaped by its surroundings (Givens and Raftery 1996).

    Centres are drawn to the mean of their neighbours, so that the mixture is as wide as they are and no wider
    (West 1993, eq. 7).
    """

    centres_JD: np.ndarray
    lower_JDD: np.ndarray
    """Cholesky factors of the scale matrices."""

    @classmethod
    def around(cls, points_JD: np.ndarray, rng: np.random.Generator) -> "Kernels":
        """Kernels on some of the points of a sample."""
        dims = points_JD.shape[1]
        ridge_DD = 1e-6 * np.eye(dims)
        whole_DD = np.linalg.cholesky(np.atleast_2d(np.cov(points_JD.T)) + ridge_DD)
        white_JD = np.linalg.solve(whole_DD, points_JD.T).T
        keep = np.sqrt(1 - BANDWIDTH**2)
        centres, lowers = [], []
        for index in rng.permutation(len(points_JD))[:KERNELS]:
            near = np.argsort(np.square(white_JD - white_JD[index]).sum(1), kind="stable")[:NEIGHBOURS]
            covariance_DD = np.atleast_2d(np.cov(points_JD[near].T)) + ridge_DD
            centres.append(keep * points_JD[index] + (1 - keep) * points_JD[near].mean(0))
            lowers.append(BANDWIDTH * np.linalg.cholesky(covariance_DD))
        return cls(np.array(centres), np.array(lowers))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points [count, D]."""
        which = rng.integers(len(self.centres_JD), size=count)
        normal_ND = rng.standard_normal((count, self.centres_JD.shape[1]))
        stretch_N = np.sqrt(FREEDOM / rng.chisquare(FREEDOM, count))
        return self.centres_JD[which] + stretch_N[:, None] * np.einsum(
            "nij,nj->ni", self.lower_JDD[which], normal_ND
        )

    def log_density(self, points_ND: np.ndarray) -> np.ndarray:
        """Log density [N]."""
        kernels, dims = self.centres_JD.shape
        log_JN = np.empty((kernels, len(points_ND)))
        for index, (centre_D, lower_DD) in enumerate(zip(self.centres_JD, self.lower_JDD, strict=True)):
            square_N = np.square(np.linalg.solve(lower_DD, (points_ND - centre_D).T)).sum(0)
            log_JN[index] = -0.5 * (FREEDOM + dims) * np.log1p(square_N / FREEDOM)
            log_JN[index] -= np.log(np.diag(lower_DD)).sum()
        constant = lgamma((FREEDOM + dims) / 2) - lgamma(FREEDOM / 2) - 0.5 * dims * np.log(FREEDOM * np.pi)
        return _log_sum(log_JN) - np.log(kernels) + constant


@dataclass(frozen=True)
class Draws:
    """Draws [N, D] in the space of the standard normal prior and the logs of their weights [N]."""

    points_ND: np.ndarray
    log_weights_N: np.ndarray
    adapted: bool
    """Whether any of them were looked for; else all are the prior's, and weights are likelihoods."""


def sample(
    simulate: Callable[[np.ndarray], np.ndarray],
    dims: int,
    count: int,
    rng: np.random.Generator,
    *,
    adapt: bool = True,
) -> Draws:
    """`count` weighted draws of prior x likelihood; `simulate` maps points [N, D] to errors [N, R].

    The likelihood is exp(-errors^2 / 2). All draws come from the prior when there are too few to adapt, and
    as long as half of them agree with what was seen.
    """
    first = max(FEWEST_FIRST, round(FIRST_SHARE * count))
    if not adapt or dims == 0 or count < 2 * FEWEST_FIRST:
        first = count
    points_ND = rng.standard_normal((first, dims))
    errors_NR = simulate(points_ND)
    batches: list[tuple[int, Kernels | None]] = [(first, None)]
    rest = count - first
    for left in range(ROUNDS, 0, -1):
        size = -(-rest // left)
        rest -= size
        if not size:
            break
        proposal = None
        if effective(_log_weights(points_ND, errors_NR, batches)) < 0.5 * len(points_ND):
            proposal = _proposal(points_ND, errors_NR, rng)
        following_ND = rng.standard_normal((size, dims)) if proposal is None else proposal.draw(size, rng)
        points_ND = np.concatenate([points_ND, following_ND])
        errors_NR = np.concatenate([errors_NR, simulate(following_ND)])
        batches.append((size, proposal))
    adapted = any(proposal is not None for _, proposal in batches)
    return Draws(points_ND, _log_weights(points_ND, errors_NR, batches), adapted)


def effective(log_weights_N: np.ndarray) -> float:
    """How many equal draws weighted ones are worth: (sum of w)^2 / sum of w^2 (Kish 1965)."""
    weights_N = np.exp(log_weights_N - log_weights_N.max())
    return float(weights_N.sum() ** 2 / np.square(weights_N).sum())


def _log_weights(
    points_ND: np.ndarray, errors_NR: np.ndarray, batches: list[tuple[int, Kernels | None]]
) -> np.ndarray:
    """Log of prior x likelihood / mixture of all batches; constants that are common to all are left out."""
    log_N = -0.5 * np.square(errors_NR).sum(1)
    if all(proposal is None for _, proposal in batches):
        return log_N
    prior_N = _log_normal(points_ND)
    parts = [
        np.log(size) + (prior_N if proposal is None else proposal.log_density(points_ND))
        for size, proposal in batches
    ]
    return log_N + prior_N - _log_sum(np.array(parts))


def _proposal(points_ND: np.ndarray, errors_NR: np.ndarray, rng: np.random.Generator) -> Kernels:
    """Where an emulator of the better draws expects agreement."""
    trained = min(MOST_TRAINED, max(FEWEST_FIRST, round(TRAINED_SHARE * len(points_ND))))
    best = np.argsort(np.square(errors_NR).sum(1), kind="stable")[:trained]
    emulator = Emulator(points_ND[best], errors_NR[best])
    return Kernels.around(tempered(emulator.log_likelihood, points_ND.shape[1], rng), rng)


def tempered(
    log_likelihood: Callable[[np.ndarray], np.ndarray], dims: int, rng: np.random.Generator
) -> np.ndarray:
    """Particles [J, D] of a posterior under a standard normal prior.

    Sequential Monte Carlo from the prior over powers of the likelihood (Del Moral, Doucet and Jasra 2006),
    each power as far from the last as keeps half of the particles effective, with Metropolis moves.
    """
    points_JD = rng.standard_normal((PARTICLES, dims))
    log_J, power = log_likelihood(points_JD), 0.0
    while power < 1:
        step = _step(log_J, 1 - power)
        weights_J = np.exp(step * (log_J - log_J.max()))
        places = (rng.random() + np.arange(PARTICLES)) / PARTICLES
        chosen = np.searchsorted(np.cumsum(weights_J / weights_J.sum()), places)
        chosen = np.minimum(chosen, PARTICLES - 1)
        points_JD, log_J, power = points_JD[chosen], log_J[chosen], power + step
        for _ in range(MOVES):
            spread_DD = np.linalg.cholesky(np.atleast_2d(np.cov(points_JD.T)) + 1e-9 * np.eye(dims))
            size = rng.choice(STEPS) * 2.38 / np.sqrt(dims)
            moved_JD = points_JD + size * rng.standard_normal(points_JD.shape) @ spread_DD.T
            moved_J = log_likelihood(moved_JD)
            change_J = _log_normal(moved_JD) - _log_normal(points_JD) + power * (moved_J - log_J)
            accepted_J = np.log(rng.random(PARTICLES)) < change_J
            points_JD = np.where(accepted_J[:, None], moved_JD, points_JD)
            log_J = np.where(accepted_J, moved_J, log_J)
    return points_JD


def _step(log_J: np.ndarray, most: float) -> float:
    """The greatest step in power that keeps half of the particles effective, by bisection."""
    if effective(most * log_J) >= PARTICLES / 2:
        return most
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle * log_J) >= PARTICLES / 2 else (low, middle)
    return max(low, 1e-6)


def _log_normal(points_ND: np.ndarray) -> np.ndarray:
    return -0.5 * np.square(points_ND).sum(-1) - 0.5 * points_ND.shape[-1] * np.log(2 * np.pi)


def _log_sum(log_JN: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the first axis."""
    most_N = log_JN.max(0)
    return most_N + np.log(np.exp(log_JN - most_N).sum(0))
