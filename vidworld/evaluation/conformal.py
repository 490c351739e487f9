"""Bands that hold a whole rollout with a stated probability, and spreads scaled to the errors they tell.

Shapes: E calibration episodes, M samples, T leads, S dimensions.
"""

import math
from dataclasses import dataclass

import numpy as np

from vidworld.errors import DataError
from vidworld.evaluation.verification import spread_and_error, spread_skill


def inflation(samples_EMTS: np.ndarray, truth_ETS: np.ndarray) -> np.ndarray:
    """By how much to stretch samples about their mean at each lead, so that spread tells error; [T].

    The inverse of the unbiased spread-skill ratio, pooled over episodes and dimensions in units of each
    dimension's error. 1 where the samples have no spread to stretch.
    """
    samples = np.moveaxis(np.asarray(samples_EMTS, np.float64), 1, 0)
    variance_ETS, error_ETS = spread_and_error(samples, truth_ETS)
    scale_S = np.square(samples.mean(0) - truth_ETS).mean((0, 1)).clip(min=1e-24)
    factors = []
    for t in range(truth_ETS.shape[1]):
        ratio = spread_skill(variance_ETS[:, t] / scale_S, error_ETS[:, t] / scale_S)
        factors.append(1 / ratio if np.isfinite(ratio) and ratio > 0 else 1.0)
    return np.array(factors)


def inflate(samples_MTS: np.ndarray, factor_T: np.ndarray) -> np.ndarray:
    """Samples stretched about their mean by a factor a lead."""
    mean_TS = samples_MTS.mean(0)
    return mean_TS + (samples_MTS - mean_TS) * factor_T[:, None]


@dataclass(frozen=True)
class Bands:
    """Simultaneous bands over all leads and dimensions: mean +- radius * scale."""

    level: float
    radius: float
    """In units of `scale_TS`."""
    scale_TS: np.ndarray
    """Typical error at each lead and dimension, of the calibration episodes' first half."""

    def around(self, samples_MTS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper edge [T, S]."""
        mean_TS, reach_TS = samples_MTS.mean(0), self.radius * self.scale_TS
        return mean_TS - reach_TS, mean_TS + reach_TS

    def holds(self, samples_MTS: np.ndarray, truth_TS: np.ndarray) -> bool:
        """Whether the truth stays inside at every lead and dimension."""
        return bool(_score(samples_MTS, truth_TS, self.scale_TS) <= self.radius)


def fit_bands(samples_EMTS: np.ndarray, truth_ETS: np.ndarray, level: float = 0.9) -> Bands:
    """Split-conformal bands (Vovk et al. 2005): the unit is the episode, the score its maximum over time.

    A new episode, exchangeable with these, stays inside at all leads at once with probability of at least
    `level` (Stankeviciute et al. 2021, without their union bound). The first half of the episodes sets the
    scale of each lead and dimension, the second half the radius. Raises DataError if there are too few.
    """
    half = len(truth_ETS) // 2
    scored = len(truth_ETS) - half
    order = math.ceil((scored + 1) * level - 1e-9)
    if not half or order > scored:
        least = 2 * math.ceil(level / (1 - level) - 1e-9) - 1
        raise DataError(
            f"episodes for bands of {level:.0%}", got=len(truth_ETS), expected=f"{least} or more",
            fix="record more, or take a lower level",
        )  # fmt: skip
    error_ETS = np.abs(samples_EMTS[:half].mean(1) - truth_ETS[:half])
    scale_TS = np.sqrt(np.square(error_ETS).mean(0))
    # A lead without any error would have a band of no width: let it lean on its dimension's mean.
    scale_TS = np.maximum(scale_TS, 0.05 * scale_TS.mean(0) + 1e-12)
    scores = sorted(
        _score(one, truth, scale_TS) for one, truth in zip(samples_EMTS[half:], truth_ETS[half:], strict=True)
    )
    return Bands(level, scores[order - 1], scale_TS)


def _score(samples_MTS: np.ndarray, truth_TS: np.ndarray, scale_TS: np.ndarray) -> float:
    return float((np.abs(samples_MTS.mean(0) - truth_TS) / scale_TS).max())
