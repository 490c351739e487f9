"""How far two sets of outcomes are from each other, and whether a score tells two kinds of cases apart.

Shapes: N and K draws, Q quantities.
"""

import numpy as np

from vidworld.errors import ConfigError


def wasserstein(first_N: np.ndarray, second_K: np.ndarray, weights_K: np.ndarray | None = None) -> float:
    """1-Wasserstein distance of two samples of one quantity: the area between their distribution functions.

    The second may be weighted. In the quantity's unit.
    """
    first_N, second_K = np.asarray(first_N, np.float64), np.asarray(second_K, np.float64)
    if not len(first_N) or not len(second_K):
        raise ConfigError("samples of a distance", got=f"{len(first_N)} and {len(second_K)}", expected="some")
    share_K = np.full(len(second_K), 1.0) if weights_K is None else np.asarray(weights_K, np.float64)
    values = np.concatenate([first_N, second_K])
    steps = np.concatenate([np.full(len(first_N), 1 / len(first_N)), -share_K / share_K.sum()])
    order = np.argsort(values, kind="stable")
    apart = np.cumsum(steps[order])[:-1]
    return float((np.abs(apart) * np.diff(values[order])).sum())


def auroc(ordinary_N: np.ndarray, strange_K: np.ndarray) -> float:
    """Chance that a strange case has the higher score of a random pair; ties count half (Mann-Whitney)."""
    ordinary_N, strange_K = np.asarray(ordinary_N, np.float64), np.asarray(strange_K, np.float64)
    if not len(ordinary_N) or not len(strange_K):
        raise ConfigError("cases of an AUROC", got=f"{len(ordinary_N)} and {len(strange_K)}", expected="some")
    ahead = strange_K[:, None] - ordinary_N[None]
    return float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())


def auroc_interval(
    ordinary_N: np.ndarray, strange_K: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The central 95 % of the AUROC over resampled cases of both kinds."""
    rng = np.random.default_rng(seed)
    found = [
        auroc(rng.choice(ordinary_N, len(ordinary_N)), rng.choice(strange_K, len(strange_K)))
        for _ in range(draws)
    ]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def outside(samples_NQ: np.ndarray, support_KQ: np.ndarray, tolerance_Q: np.ndarray) -> float:
    """Share of samples with any quantity beyond the least or greatest of `support` by more than a tolerance.

    The range of few draws is narrower than the true support: hold it to that of other true draws.
    """
    low_Q, high_Q = support_KQ.min(0) - tolerance_Q, support_KQ.max(0) + tolerance_Q
    return float(((samples_NQ < low_Q) | (samples_NQ > high_Q)).any(1).mean())


def weighted_std(values_N: np.ndarray, weights_N: np.ndarray) -> float:
    """Standard deviation of weighted draws, unbiased in the sense of reliability weights."""
    share_N = np.asarray(weights_N, np.float64) / np.sum(weights_N)
    mean = share_N @ values_N
    return float(np.sqrt(share_N @ np.square(values_N - mean) / max(1 - np.square(share_N).sum(), 1e-12)))


class KernelRidge:
    """Ridge regression with a Gaussian kernel on standardised features: a probe that is fitted in a second.

    The width is the median distance of training rows, the penalty the one of the least leave-one-out error.
    """

    def __init__(self, features_NF: np.ndarray, target_N: np.ndarray) -> None:
        features_NF = np.asarray(features_NF, np.float64)
        self.mean_F = features_NF.mean(0)
        spread_F = features_NF.std(0)
        # What never varied in training says nothing, and would otherwise say anything.
        self.scale_F = np.where(spread_F > 1e-9 * (1 + np.abs(self.mean_F)), spread_F, np.inf)
        self.rows_NF = (features_NF - self.mean_F) / self.scale_F
        square_NN = _square_distances(self.rows_NF, self.rows_NF)
        self.width = float(np.median(square_NN[np.triu_indices(len(square_NN), 1)])) + 1e-12
        values, vectors = np.linalg.eigh(np.exp(-square_NN / self.width))
        self.offset = float(np.mean(target_N))
        projected = vectors.T @ (np.asarray(target_N, np.float64) - self.offset)
        best = np.inf
        for penalty in np.logspace(-6, 2, 17):
            solved = vectors @ (projected / (values + penalty))
            inverse_diagonal = (np.square(vectors) / (values + penalty)).sum(1)
            # Leave-one-out residuals of ridge regression: alpha_i / (K + penalty)^-1_ii.
            error = float(np.square(solved / inverse_diagonal).mean())
            if error < best:
                best, self.weights_N, self.penalty = error, solved, float(penalty)
        variance = float(np.var(target_N))
        self.r2 = 1 - best / variance if variance > 0 else float("nan")
        """Of leave-one-out predictions."""

    def __call__(self, features_KF: np.ndarray) -> np.ndarray:
        """Predictions [K]."""
        rows_KF = (np.asarray(features_KF, np.float64) - self.mean_F) / self.scale_F
        kernel_KN = np.exp(-_square_distances(rows_KF, self.rows_NF) / self.width)
        return kernel_KN @ self.weights_N + self.offset


def _square_distances(first_NF: np.ndarray, second_KF: np.ndarray) -> np.ndarray:
    found = np.square(first_NF).sum(1)[:, None] + np.square(second_KF).sum(1) - 2 * first_NF @ second_KF.T
    return np.maximum(found, 0)
