"""Verification of ensembles, as weather forecasts are verified: does the spread of samples tell the error?

Shapes: M samples on the first axis, X any axes of cases (episodes, leads, pixels, dimensions), R = M + 1
ranks, N cases, D components of a vector, E episodes. All estimators are fair: an ensemble drawn from the
truth's own distribution has the stated expectation at any M, so ensembles of different sizes compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vidworld.errors import ConfigError

BOOTSTRAP_DRAWS = 2000


def spread_and_error(samples_MX: np.ndarray, truth_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance s^2 of the samples, and (mean - y)^2 - s^2 / M; if calibrated, their expectations agree.

    Each [X]. The second takes away what a mean of M samples errs by itself (Fortin et al. 2014).
    """
    samples_MX = np.asarray(samples_MX, np.float64)
    num_samples = _at_least_two(samples_MX)
    variance_X = samples_MX.var(0, ddof=1)
    return variance_X, np.square(samples_MX.mean(0) - truth_X) - variance_X / num_samples


def spread_skill(variance: np.ndarray | float, square_error: np.ndarray | float) -> float:
    """sqrt(mean s^2 / mean[(mean - y)^2 - s^2 / M]), unbiased: below 1 is overconfident; NaN if undefined."""
    above, below = float(np.mean(variance)), float(np.mean(square_error))
    return float(np.sqrt(above / below)) if below > 0 else float("nan")


def ranks(samples_MX: np.ndarray, truth_X: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many samples lie below the truth, 0 to M, with ties broken at random; int [X].

    Uniform over M + 1 ranks if the truth is like one more sample (Hamill 2001).
    """
    below_X = (samples_MX < truth_X).sum(0)
    ties_X = (samples_MX == truth_X).sum(0)
    return below_X + rng.integers(0, ties_X + 1)


def rank_counts(ranks_X: np.ndarray, num_samples: int) -> np.ndarray:
    """Histogram of ranks, int [R]."""
    return np.bincount(np.asarray(ranks_X).ravel(), minlength=num_samples + 1)


def coverage(counts_R: np.ndarray, level: float) -> float:
    """Share of truths inside the central interval of the samples whose nominal coverage is exactly `level`.

    The truth lies between the k-th smallest and k-th largest of M samples with probability 1 - 2 k / (M + 1);
    levels in between are interpolated between neighbouring k. Raises ConfigError for a level above what M
    samples can tell, (M - 1) / (M + 1).
    """
    num_ranks, total = len(counts_R), counts_R.sum()
    if not 0 < level <= (num_ranks - 2) / num_ranks:
        raise ConfigError(
            "level of an interval",
            got=level,
            expected=f"above 0, at most {(num_ranks - 2) / num_ranks:.3f} for {num_ranks - 1} samples",
            fix="take more samples",
        )
    cut = (1 - level) / 2 * num_ranks
    inside = np.array([counts_R[k : num_ranks - k].sum() for k in range((num_ranks + 1) // 2 + 1)]) / total
    return float(np.interp(cut, np.arange(len(inside)), inside))


@dataclass(frozen=True)
class RankTest:
    """Is a rank histogram flat? Each p-value is small where it is not."""

    count: int
    p_flat: float
    """Pearson's chi^2 over (merged) ranks."""
    p_bias: float
    """Of its linear part alone: samples too low or too high (Jolliffe and Primo 2008)."""
    p_dispersion: float
    """Of its V- or dome-shaped part alone: samples too close together or too far apart."""


def rank_test(counts_R: np.ndarray, least_expected: float = 5.0) -> RankTest:
    """Test a histogram of independent ranks for flatness.

    Neighbouring ranks are merged, as evenly as their number allows, until each is expected `least_expected`
    times, below which the chi^2 distribution does not hold. Ranks of one episode depend on each other: count
    one an episode.
    """
    counts_R = np.asarray(counts_R, np.float64)
    total = counts_R.sum()
    groups = int(np.clip(total // least_expected, 2, len(counts_R)))
    edges = np.linspace(0, len(counts_R), groups + 1).round().astype(int)
    observed = np.add.reduceat(counts_R, edges[:-1])
    share = np.diff(edges) / len(counts_R)
    if total == 0:
        return RankTest(0, float("nan"), float("nan"), float("nan"))
    residual = (observed - total * share) / np.sqrt(total * share)
    centre = (edges[:-1] + edges[1:]) / 2 / len(counts_R) - 0.5
    parts = []
    for shape in (centre, np.square(centre)):
        # Orthogonal to sqrt(share), along which residuals vanish, and (the second) to the first.
        vector = np.sqrt(share) * shape
        for other in (np.sqrt(share), *(found for found, _ in parts)):
            vector = vector - (vector @ other) / (other @ other) * other
        norm = np.linalg.norm(vector)
        parts.append((vector, float((residual @ vector / norm) ** 2) if norm > 1e-9 else float("nan")))
    return RankTest(
        int(total),
        chi2_survival(float(residual @ residual), groups - 1),
        *(chi2_survival(value, 1) for _, value in parts),
    )


def chi2_survival(value: float, freedom: int) -> float:
    """Probability that a chi^2 variable exceeds `value`."""
    half = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def energy_score(samples_MD: np.ndarray, truth_D: np.ndarray) -> float:
    """Fair energy score of a vector (Gneiting and Raftery 2007), the CRPS of D dimensions; lower is better.

    (1/M) sum_i |x_i - y| - 1/(2 M (M - 1)) sum_ij |x_i - x_j| with Euclidean norms.
    """
    samples_MD = np.asarray(samples_MD, np.float64)
    num_samples = _at_least_two(samples_MD)
    error = np.linalg.norm(samples_MD - truth_D, axis=-1).mean()
    apart = np.linalg.norm(samples_MD[:, None] - samples_MD[None], axis=-1).sum()
    return float(error - apart / (2 * num_samples * (num_samples - 1)))


def variogram_score(samples_MD: np.ndarray, truth_D: np.ndarray, order: float = 0.5) -> float:
    """Variogram score (Scheuerer and Hamill 2015): do components differ from each other as the truth's do?

    sum_ij (|y_i - y_j|^p - (1/M) sum_k |x_ki - x_kj|^p)^2; sees correlations that marginals do not show.
    """
    samples_MD, truth_D = np.asarray(samples_MD, np.float64), np.asarray(truth_D, np.float64)
    seen = np.abs(truth_D[:, None] - truth_D[None]) ** order
    said = (np.abs(samples_MD[:, :, None] - samples_MD[:, None]) ** order).mean(0)
    return float(np.square(seen - said).sum())


def energy_test(first_ND: np.ndarray, second_ND: np.ndarray, draws: int = 999, seed: int = 0) -> float:
    """p-value of the two-sample energy test (Szekely and Rizzo 2004) by permutation: small if they differ."""
    first_ND, second_ND = np.atleast_2d(first_ND), np.atleast_2d(second_ND)
    both_ND = np.concatenate([first_ND, second_ND]).astype(np.float64)
    distance_NN = np.linalg.norm(both_ND[:, None] - both_ND[None], axis=-1)
    count, total = len(first_ND), len(both_ND)
    rng = np.random.default_rng(seed)

    def statistic(sign_N: np.ndarray) -> float:
        # Signs of +1/n and -1/m make the quadratic form minus the energy distance.
        return float(-sign_N @ distance_NN @ sign_N)

    sign_N = np.where(np.arange(total) < count, 1 / count, -1 / (total - count))
    observed = statistic(sign_N)
    larger = sum(statistic(rng.permutation(sign_N)) >= observed - 1e-12 for _ in range(draws))
    return (larger + 1) / (draws + 1)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: for each bin of forecast probability, how often the event came; B bins."""

    forecast_B: np.ndarray
    """Mean probability; NaN in an empty bin."""
    frequency_B: np.ndarray
    count_B: np.ndarray
    error: float
    """Mean |probability - frequency| over cases: 0 is reliable. Few cases a bin make it large by chance."""
    brier: float
    base_rate: float


def reliability(probability_N: np.ndarray, happened_N: np.ndarray, bins: int = 10) -> Reliability:
    """Compare forecast probabilities (shares of samples) with what happened (bool)."""
    probability_N = np.asarray(probability_N, np.float64)
    happened_N = np.asarray(happened_N, np.float64)
    if probability_N.shape != happened_N.shape or probability_N.ndim != 1 or not len(probability_N):
        raise ConfigError(
            "cases of a reliability diagram",
            got=f"{probability_N.shape} probabilities, {happened_N.shape} outcomes",
            expected="as many of both, at least one",
        )
    place_N = np.minimum((probability_N * bins).astype(int), bins - 1)
    count_B = np.bincount(place_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        forecast_B = np.bincount(place_N, probability_N, bins) / count_B
        frequency_B = np.bincount(place_N, happened_N, bins) / count_B
    gaps = np.abs(forecast_B - frequency_B)[count_B > 0]
    return Reliability(
        forecast_B,
        frequency_B,
        count_B,
        float((gaps * count_B[count_B > 0]).sum() / len(probability_N)),
        float(np.square(probability_N - happened_N).mean()),
        float(happened_N.mean()),
    )


def bootstrap(
    sums_EP: np.ndarray, above: int = 0, below: int = 1, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> np.ndarray | None:
    """Ratios sum(column `above`) / sum(column `below`) over resampled episodes [draws]; None if undefined.

    Episodes are the unit: windows and pixels of one depend on each other.
    """
    share_E = np.full(len(sums_EP), 1 / len(sums_EP))
    counts_NE = np.random.default_rng(seed).multinomial(len(sums_EP), share_E, draws)
    totals_NP = counts_NE @ np.asarray(sums_EP, np.float64)
    if not (totals_NP[:, below] != 0).all():
        return None
    return totals_NP[:, above] / totals_NP[:, below]


def interval(values_N: np.ndarray | None) -> list[float] | None:
    """The central 95 % of bootstrap values."""
    return None if values_N is None else [float(value) for value in np.quantile(values_N, (0.025, 0.975))]


def as_table(found: Reliability) -> Mapping[str, list[float | None]]:
    """A reliability diagram for JSON, empty bins as None."""
    rows = {"forecast": found.forecast_B, "frequency": found.frequency_B}
    return {
        **{name: [None if value != value else float(value) for value in row] for name, row in rows.items()},
        "count": found.count_B.tolist(),
    }


def _at_least_two(samples_MX: np.ndarray) -> int:
    if len(samples_MX) < 2:
        raise ConfigError("samples", got=len(samples_MX), expected="2 or more to have a spread")
    return len(samples_MX)
