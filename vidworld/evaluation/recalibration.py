"""Fit a world's noise to the spread that it should have, and radii that hold whole rollouts.

Calibration episodes are cut in two: the first half fits the noise scales and the floors of the radii, the
second sets their multipliers, and so is new to both. Shapes: E episodes (a window each), M samples, T leads,
S proprio dims.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.verification import coverage, rank_counts, ranks, spread_and_error, spread_skill
from vidworld.world.calibration import LATENTS, PIXELS, PROPRIO, Conformal, Radii
from vidworld.world.noise_scale import NoiseScale
from vidworld.world.spec import WorldSpec

Scaled = Literal["start", "model", "both"]
Source = Literal["auto", Scaled, "none"]
GAIN = 0.7
"""Share of the found mismatch that a round mends: noise of a lead also spreads all later ones."""
MOST_STEP = 1.6
MOST_FACTOR = 4.0
SMOOTH_LEADS = 5
CRPS_TOLERANCE = 1.01
"""Factors that make the CRPS worse than this are not kept: spread is not worth any error."""
LEAST_FLOOR = 0.3
"""Of the typical error: a lead at which the samples happen to agree does not set the radius of all others."""


@dataclass(frozen=True)
class Forecast:
    """What the samples of one window said, and what came."""

    key: str
    embodiment: str
    proprio_MTS: np.ndarray
    """In the contract's units."""
    truth_TS: np.ndarray
    latent_variance_T: np.ndarray
    """Mean s^2 over a frame's latents."""
    latent_error_T: np.ndarray
    """Mean (mean - y)^2 - s^2 / M."""
    latent_square_T: np.ndarray
    """Mean (mean - y)^2."""
    latent_crps_T: np.ndarray
    pixel_variance_T: np.ndarray | None = None
    pixel_square_T: np.ndarray | None = None
    """Of pixels from 0 to 1; None where they were not decoded."""


Imagine = Callable[[NoiseScale | None], Sequence[Forecast]]
"""Forecasts of the same windows with other noise."""


@dataclass(frozen=True)
class Round:
    """Noise scales that were tried."""

    scale: NoiseScale | None
    mismatch: float
    """Mean |log spread / skill| over leads, latents and proprioception."""
    crps: float
    """Relative to the world as trained."""


def ratios(forecasts: Sequence[Forecast]) -> dict[str, np.ndarray]:
    """Unbiased spread-skill ratio at each lead [T] of latents and of proprioception; NaN where undefined.

    Dimensions of proprioception count in units of their own error.
    """
    found = {
        LATENTS: np.array(
            [
                spread_skill(variance, error)
                for variance, error in zip(
                    np.mean([one.latent_variance_T for one in forecasts], 0),
                    np.mean([one.latent_error_T for one in forecasts], 0),
                    strict=True,
                )
            ]
        )
    }
    if forecasts[0].truth_TS.shape[-1]:
        scale_S = _error_S(forecasts)
        parts = [spread_and_error(one.proprio_MTS, one.truth_TS) for one in forecasts]
        variance_TS = np.mean([variance for variance, _ in parts], 0) / scale_S
        error_TS = np.mean([error for _, error in parts], 0) / scale_S
        found[PROPRIO] = np.array(
            [spread_skill(v, e) for v, e in zip(variance_TS.mean(1), error_TS.mean(1), strict=True)]
        )
    return found


def scores(forecasts: Sequence[Forecast]) -> dict[str, float]:
    """CRPS over all leads of latents and proprioception; dimensions count in units of their own spread."""
    found = {LATENTS: float(np.mean([one.latent_crps_T for one in forecasts]))}
    if forecasts[0].truth_TS.shape[-1]:
        spread_S = np.std(np.concatenate([one.truth_TS for one in forecasts]), 0).clip(min=1e-9)
        found[PROPRIO] = float(
            np.mean([crps(one.proprio_MTS / spread_S, one.truth_TS / spread_S).mean() for one in forecasts])
        )
    return found


def summary(forecasts: Sequence[Forecast], seed: int = 0) -> dict[str, Any]:
    """Spread-skill, CRPS, and coverage of proprioception at 90 %, over all leads; ready for JSON."""
    found: dict[str, Any] = {"episodes": len(forecasts), "crps": scores(forecasts), "spread_skill": {}}
    pairs = {
        LATENTS: (
            np.mean([one.latent_variance_T for one in forecasts]),
            np.mean([one.latent_error_T for one in forecasts]),
        )
    }
    if forecasts[0].truth_TS.shape[-1]:
        scale_S = _error_S(forecasts)
        parts = [spread_and_error(one.proprio_MTS, one.truth_TS) for one in forecasts]
        pairs[PROPRIO] = (
            np.mean([v / scale_S for v, _ in parts]),
            np.mean([e / scale_S for _, e in parts]),
        )
        samples = len(forecasts[0].proprio_MTS)
        rng = np.random.default_rng(seed)
        counts_R = sum(
            (rank_counts(ranks(one.proprio_MTS, one.truth_TS, rng), samples) for one in forecasts),
            np.zeros(samples + 1, np.int64),
        )
        if (samples - 1) / (samples + 1) >= 0.9:
            found["coverage90"] = {PROPRIO: coverage(counts_R, 0.9)}
    for name, (variance, error) in pairs.items():
        ratio = spread_skill(float(variance), float(error))
        found["spread_skill"][name] = ratio if math.isfinite(ratio) else None
    return found


def source_of(spec: WorldSpec, asked: Source) -> Scaled | Literal["none"]:
    """What can be scaled of a world; raises ConfigError for noise that it does not have."""
    has = {"start": spec.sampler.start_noise > 0, "model": spec.model.noise_dims > 0}
    own: Scaled = "both" if all(has.values()) else "model" if has["model"] else "start"
    if asked in ("model", "both") and not has["model"]:
        raise ConfigError(
            "--noise", got=asked, expected="start or none: the network has no noise input (noise_dims)"
        )
    if asked in ("start", "both") and not has["start"]:
        raise ConfigError(
            "--noise", got=asked, expected="model or none: its frames start from no noise (start_noise)"
        )
    return own if asked == "auto" else asked


def fit_scale(
    imagine: Imagine, source: Scaled, *, rounds: int = 5, report: Callable[[Round], None]
) -> tuple[NoiseScale | None, list[Round]]:
    """Factors a lead under which the spread of samples tells their error; None if none are better than 1.

    Each round imagines the windows, and moves each factor by a share of the (smoothed) log spread-skill ratio
    at its lead. What is kept is the round of the least mismatch among those whose CRPS is no worse than the
    world's own by more than 1 %. `source`: factors on what latents and proprioception are denoised from, on
    the network's own noise input, or on both.
    """
    forecasts = imagine(None)
    leads = len(forecasts[0].latent_variance_T)
    names = {"start": (LATENTS, PROPRIO), "model": ("model",), "both": (LATENTS, PROPRIO, "model")}[source]
    series = {name: np.ones(leads) for name in names}
    own = scores(forecasts)
    tried = [Round(None, _mismatch(forecasts), 1.0)]
    report(tried[0])
    for _ in range(rounds):
        found = {
            name: np.where(np.isfinite(row), np.log(row), 0.0) for name, row in ratios(forecasts).items()
        }
        found["model"] = np.mean(list(found.values()), 0)
        for name in names:
            step_T = np.clip(-GAIN * _smooth(found[name]), -math.log(MOST_STEP), math.log(MOST_STEP))
            series[name] = np.clip(series[name] * np.exp(step_T), 1 / MOST_FACTOR, MOST_FACTOR)
        scale = NoiseScale(
            **{name: tuple(float(f"{one:.4f}") for one in row) for name, row in series.items()}
        )
        forecasts = imagine(scale)
        relative = [score / max(own[name], 1e-12) for name, score in scores(forecasts).items()]
        tried.append(Round(scale, _mismatch(forecasts), float(np.mean(relative))))
        report(tried[-1])
    best = min((one for one in tried if one.crps <= CRPS_TOLERANCE), key=lambda one: one.mismatch)
    return best.scale, tried


def fit_conformal(
    first: Sequence[Forecast], second: Sequence[Forecast], contract: ActionContract, level: float
) -> Conformal:
    """Radii of one embodiment: floors from the first half of its episodes, multipliers from the second.

    Raises DataError when the second half has too few episodes for the level.
    """
    order = math.ceil((len(second) + 1) * level - 1e-9)
    if not first or order > len(second):
        least = math.ceil(level / (1 - level) - 1e-9)
        raise DataError(
            f"calibration episodes of {contract.embodiment} for a coverage of {level:.0%}",
            got=f"{len(first)} and {len(second)} in two halves",
            expected=f"{least} or more in the second",
            fix="give more episodes (--episodes, more data), or take a lower --coverage",
        )
    fitted_all, scored_all = ([_columns(one, contract) for one in half] for half in (first, second))
    units = {f"{PROPRIO} {one.name}": one.unit for one in contract.proprio}
    quantities: dict[str, Radii] = {}
    together = np.zeros(len(second))
    for name in fitted_all[0]:
        fitted, scored = ([one[name] for one in half] for half in (fitted_all, scored_all))
        square_T = np.mean([square for _, square in fitted], 0)
        told_T = np.mean([variance for variance, _ in fitted], 0)
        untold_T = _smooth(square_T - told_T)
        floor_T = np.sqrt(np.maximum(untold_T, LEAST_FLOOR**2 * square_T.mean()) + 1e-24)
        scores_E = np.array([np.sqrt(square / (variance + floor_T**2)).max() for variance, square in scored])
        if name in units:
            together = np.maximum(together, scores_E)
        quantities[name] = Radii(
            units.get(name, "1"), float(np.sort(scores_E)[order - 1]), tuple(float(f) for f in floor_T)
        )
    return Conformal(
        level,
        len(second),
        len(first[0].latent_variance_T),
        quantities,
        float(np.sort(together)[order - 1]) if units else None,
    )


def _columns(forecast: Forecast, contract: ActionContract) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Quantity -> variance of the samples and square error of their mean, each [T]."""
    found = {LATENTS: (forecast.latent_variance_T, forecast.latent_square_T)}
    if forecast.pixel_variance_T is not None and forecast.pixel_square_T is not None:
        found[PIXELS] = (forecast.pixel_variance_T, forecast.pixel_square_T)
    variance_TS = forecast.proprio_MTS.var(0, ddof=1)
    square_TS = np.square(forecast.proprio_MTS.mean(0) - forecast.truth_TS)
    for index, dimension in enumerate(contract.proprio):
        found[f"{PROPRIO} {dimension.name}"] = (variance_TS[:, index], square_TS[:, index])
    return found


def _mismatch(forecasts: Sequence[Forecast]) -> float:
    rows = [np.abs(np.log(row[np.isfinite(row) & (row > 0)])) for row in ratios(forecasts).values()]
    return float(np.mean(np.concatenate(rows))) if any(len(row) for row in rows) else float("inf")


def _error_S(forecasts: Sequence[Forecast]) -> np.ndarray:
    squares = [np.square(one.proprio_MTS.mean(0) - one.truth_TS).mean(0) for one in forecasts]
    return np.mean(squares, 0).clip(min=1e-24)


def _smooth(row_T: np.ndarray) -> np.ndarray:
    """Mean over neighbouring leads, fewer at the ends."""
    reach = SMOOTH_LEADS // 2
    return np.array([row_T[max(0, t - reach) : t + reach + 1].mean() for t in range(len(row_T))])
