"""Is the spread of a world's samples honest? Verification of rollouts, for each lead and quantity.

Shapes: M samples, T leads (imagined frames), V views, H W pixels, S proprio dims, X cases of one lead,
R = M + 1 ranks. Pictures are compared with the recorded ones as the tokenizer shows them, so that its own
error, which no sample can spread over, stays apart (`floor`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vidworld.errors import ConfigError
from vidworld.evaluation import events
from vidworld.evaluation.conformal import fit_bands
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.strata import STRATA
from vidworld.evaluation.verification import (
    bootstrap,
    coverage,
    interval,
    rank_counts,
    rank_test,
    ranks,
    spread_and_error,
    spread_skill,
)

LEAST_SAMPLES = 8
LEVELS = (0.5, 0.8, 0.9)
MOVING = 16 / 255
"""A pixel moves if a channel differs from the last known frame by more than this share of its range."""
BAND_LEVEL = 0.9
LEAST_EPISODES = 5
"""Episodes for an interval or a test; fewer tell nothing."""


@dataclass(frozen=True)
class Tally:
    """Sums over the cases of a quantity in one window, at each of T leads."""

    unit: str
    cases_T: np.ndarray
    variance_T: np.ndarray
    """Of s^2."""
    error_T: np.ndarray
    """Of (mean - y)^2 - s^2 / M."""
    crps_T: np.ndarray
    ranks_TR: np.ndarray

    def __add__(self, other: "Tally") -> "Tally":
        names = ("cases_T", "variance_T", "error_T", "crps_T", "ranks_TR")
        return Tally(self.unit, *(getattr(self, name) + getattr(other, name) for name in names))

    def where(self, keep_T: np.ndarray) -> "Tally":
        """Its cases at some leads."""
        return Tally(
            self.unit,
            np.where(keep_T, self.cases_T, 0),
            np.where(keep_T, self.variance_T, 0),
            np.where(keep_T, self.error_T, 0),
            np.where(keep_T, self.crps_T, 0),
            np.where(keep_T[:, None], self.ranks_TR, 0),
        )


@dataclass(frozen=True)
class Verified:
    """What one window says of calibration."""

    tallies: Mapping[str, Tally]
    """Quantity -> sums: `pixels`, `pixels moving`, `pixels still`, `proprio NAME`, `read NAME`."""
    floor_T: np.ndarray
    """Mean squared error of the tokenizer on the recorded frames, pixels from 0 to 1."""
    proprio_MTS: np.ndarray
    truth_TS: np.ndarray
    stratum_T: np.ndarray | None = None
    """Index into `STRATA` of each camera frame; None if it was not asked for."""
    kind: str | None = None
    """Of the lab; None for other logs."""
    cases: tuple[events.Case, ...] = ()
    """Forecasts of events."""

    def within(self, name: str, stratum: int) -> Tally:
        """The cases of a quantity in the frames of a stratum."""
        assert self.stratum_T is not None
        found = self.tallies[name]
        step = len(self.stratum_T) // len(found.cases_T)
        return found.where(self.stratum_T[step - 1 :: step] == stratum)


def require_samples(samples: int) -> None:
    """Refuse numbers of samples that tell no distribution, with ConfigError."""
    if samples < LEAST_SAMPLES:
        raise ConfigError(
            "--samples", got=samples, expected=f"{LEAST_SAMPLES} or more with --calibration", fix="take 32"
        )


def tally(
    samples_MTX: np.ndarray,
    truth_TX: np.ndarray,
    rng: np.random.Generator,
    *,
    unit: str = "",
    where_TX: np.ndarray | None = None,
) -> Tally:
    """Sum up cases, those of `where_TX` only if it is given."""
    num_samples, leads = len(samples_MTX), len(truth_TX)
    rows = np.zeros((4, leads))
    counts_TR = np.zeros((leads, num_samples + 1), np.int64)
    for t in range(leads):
        samples_MX, truth_X = samples_MTX[:, t], truth_TX[t]
        if where_TX is not None:
            samples_MX, truth_X = samples_MX[:, where_TX[t]], truth_X[where_TX[t]]
        if not truth_X.size:
            continue
        variance_X, error_X = spread_and_error(samples_MX, truth_X)
        score_X = crps(samples_MX, truth_X)
        rows[:, t] = truth_X.size, variance_X.sum(), error_X.sum(), score_X.sum()
        counts_TR[t] = rank_counts(ranks(samples_MX, truth_X, rng), num_samples)
    cases_T, variance_T, error_T, crps_T = rows
    return Tally(unit, cases_T, variance_T, error_T, crps_T, counts_TR)


def verify(
    samples_MTVHWC: np.ndarray,
    bound_TVHWC: np.ndarray,
    truth_TVHWC: np.ndarray,
    last_VHWC: np.ndarray,
    proprio_MTS: np.ndarray,
    truth_TS: np.ndarray,
    names: Sequence[tuple[str, str]],
    *,
    seed: int,
    stratum_T: np.ndarray | None = None,
    kind: str | None = None,
    readings: Mapping[str, tuple[str, np.ndarray, np.ndarray]] = MappingProxyType({}),
    cases: Sequence[events.Case] = (),
) -> Verified:
    """Verify one window. Pictures are uint8, `bound` being the truth as the tokenizer shows it.

    `names` are names and units of the S dimensions; `seed` breaks ties of ranks. `readings`: outcome -> its
    unit, samples [M, T] and truth [T], NaN where it does not count.
    """
    rng = np.random.default_rng([0xCA1B, seed])
    leads = len(truth_TVHWC)
    samples_MTX = samples_MTVHWC.reshape(len(samples_MTVHWC), leads, -1).astype(np.float32) / 255
    bound_TX = bound_TVHWC.reshape(leads, -1).astype(np.float32) / 255
    change_TVHWC = np.abs(truth_TVHWC.astype(np.int16) - last_VHWC) > 255 * MOVING
    moving_TVHWC = np.broadcast_to(change_TVHWC.any(-1, keepdims=True), truth_TVHWC.shape)
    moving_TX = moving_TVHWC.reshape(leads, -1)
    tallies = {
        "pixels": tally(samples_MTX, bound_TX, rng),
        "pixels moving": tally(samples_MTX, bound_TX, rng, where_TX=moving_TX),
        "pixels still": tally(samples_MTX, bound_TX, rng, where_TX=~moving_TX),
    }
    for s, (name, unit) in enumerate(names):
        one_MT1, seen_T1 = proprio_MTS[:, :, s : s + 1], truth_TS[:, s : s + 1]
        tallies[f"proprio {name}"] = tally(one_MT1, seen_T1, rng, unit=unit)
    for name, (unit, samples_MT, read_T) in readings.items():
        counts_T1 = np.isfinite(read_T)[:, None]
        tallies[f"read {name}"] = tally(
            samples_MT[..., None], read_T[:, None], rng, unit=unit, where_TX=counts_T1
        )
    error = (bound_TVHWC.astype(np.float64) - truth_TVHWC).reshape(leads, -1) / 255
    floor_T = np.square(error).mean(1)
    return Verified(tallies, floor_T, proprio_MTS, truth_TS, stratum_T, kind, tuple(cases))


def summarise(
    windows: Sequence[tuple[str, Verified]], frames_per_step: int = 1, leads: Sequence[int] | None = None
) -> dict[str, Any]:
    """The calibration of a robot over windows, each with the key of its episode; ready for JSON.

    For each quantity and lead: `spread_skill`, `spread` and `error` (root mean squares), `crps`, `coverage`
    at each level that so many samples can tell, and `p_flat`, `p_bias`, `p_dispersion` of the rank histogram
    over the first window of each episode. `pooled` is over all leads, with an interval over episodes.
    `strata` and `kinds` pool the frames of each stratum and the windows of each kind of the lab; `events` are
    the reliability of forecasts at `leads` (default: the last).
    """
    first: dict[str, Verified] = {}
    for key, found in windows:
        first.setdefault(key, found)
    num_samples = len(next(iter(windows[0][1].tallies.values())).ranks_TR[0]) - 1
    levels = [level for level in LEVELS if level <= (num_samples - 1) / (num_samples + 1)]
    quantities = {}
    for name in _names(windows):
        by_episode = _by_episode(
            (key, found.tallies[name]) for key, found in windows if name in found.tallies
        )
        tests = None
        if not name.startswith("pixels"):
            tests = np.sum([one.tallies[name].ranks_TR for one in first.values() if name in one.tallies], 0)
        quantities[name] = _quantity(by_episode, levels, tests, name, frames_per_step)
    by_kind: dict[str, list[tuple[str, Verified]]] = {}
    forecasts: dict[str, list[events.Case]] = {}
    for key, found in windows:
        if found.kind is not None:
            by_kind.setdefault(found.kind, []).append((key, found))
        forecasts.setdefault(key, []).extend(found.cases)
    last = len(windows[0][1].floor_T)
    return {
        "samples": num_samples,
        "episodes": len(first),
        "floor": np.mean([found.floor_T for _, found in windows], 0).tolist(),
        "quantities": quantities,
        "bands": _bands(list(first.values())),
        "strata": _strata(windows, levels),
        **(
            {
                "kinds": {
                    kind: {
                        "windows": len(some),
                        "quantities": {
                            name: _pooled(
                                _by_episode(
                                    (key, one.tallies[name]) for key, one in some if name in one.tallies
                                ),
                                levels,
                            )
                            for name in _names(some)
                        },
                        "strata": _strata(some, levels),
                    }
                    for kind, some in by_kind.items()
                }
            }
            if by_kind
            else {}
        ),
        **({"events": events.summarise(forecasts, leads or (last,))} if any(forecasts.values()) else {}),
    }


def _names(windows: Sequence[tuple[str, Verified]]) -> list[str]:
    return list(dict.fromkeys(name for _, found in windows for name in found.tallies))


def _by_episode(tallies: Iterable[tuple[str, Tally]]) -> list[Tally]:
    """Sums over the windows of each episode."""
    found: dict[str, Tally] = {}
    for key, one in tallies:
        found[key] = found[key] + one if key in found else one
    return list(found.values())


def _strata(windows: Sequence[tuple[str, Verified]], levels: Sequence[float]) -> dict[str, Any]:
    """Frames of each stratum, and its quantities pooled over leads."""
    told = [(key, found) for key, found in windows if found.stratum_T is not None]
    table: dict[str, Any] = {}
    for index, stratum in enumerate(STRATA):
        frames = sum(int((found.stratum_T == index).sum()) for _, found in told)
        if frames:
            table[stratum] = {
                "frames": frames,
                "quantities": {
                    name: _pooled(
                        _by_episode(
                            (key, found.within(name, index)) for key, found in told if name in found.tallies
                        ),
                        levels,
                    )
                    for name in _names(told)
                },
            }
    return table


def _pooled(episodes: Sequence[Tally], levels: Sequence[float]) -> dict[str, Any]:
    """A quantity over all leads, with an interval over episodes."""
    told = [one for one in episodes if one.cases_T.any()]
    sums_EP = np.array([[one.variance_T.sum(), one.error_T.sum()] for one in told]).reshape(-1, 2)
    enough = len(told) >= LEAST_EPISODES and sums_EP[:, 1].sum() > 0
    ratios = bootstrap(sums_EP) if enough else None
    pooled_R = np.sum([one.ranks_TR.sum(0) for one in episodes], 0)
    cases = float(np.sum([one.cases_T.sum() for one in episodes]))
    above, below = sums_EP.sum(0)
    return {
        "cases": cases,
        "episodes": len(told),
        "spread_skill": spread_skill(above, below),
        "spread_skill_interval": interval(None if ratios is None else np.sqrt(np.maximum(ratios, 0.0))),
        "crps": float(np.sum([one.crps_T.sum() for one in episodes])) / cases if cases else None,
        "coverage": {str(level): coverage(pooled_R, level) if cases else None for level in levels},
        "rank_counts": pooled_R.tolist(),
    }


def _quantity(
    episodes: Sequence[Tally],
    levels: Sequence[float],
    tests_TR: np.ndarray | None,
    name: str,
    frames_per_step: int,
) -> dict[str, Any]:
    total = episodes[0]
    for one in episodes[1:]:
        total = total + one
    cases_T = np.maximum(total.cases_T, 1)
    leads = range(len(cases_T))
    step = frames_per_step if name.startswith("proprio") else 1
    seen = [bool(total.cases_T[t]) for t in leads]
    tested = (
        [] if tests_TR is None or len(episodes) < LEAST_EPISODES else [rank_test(row) for row in tests_TR]
    )
    return {
        "unit": total.unit,
        "leads": [(t + 1) * step for t in leads],
        "cases": total.cases_T.tolist(),
        "spread_skill": [spread_skill(total.variance_T[t], total.error_T[t]) for t in leads],
        "spread": np.sqrt(total.variance_T / cases_T).tolist(),
        "error": np.sqrt(np.maximum(total.error_T, 0) / cases_T).tolist(),
        "crps": (total.crps_T / cases_T).tolist(),
        "coverage": {
            str(level): [coverage(total.ranks_TR[t], level) if seen[t] else None for t in leads]
            for level in levels
        },
        **{
            field: [getattr(found, field) for found in tested]
            for field in ("p_flat", "p_bias", "p_dispersion")
            if tested
        },
        "pooled": _pooled(episodes, levels),
    }


def _bands(first: Sequence[Verified]) -> dict[str, Any] | None:
    """Fit simultaneous bands of proprioception on every other episode and try them on the rest."""
    samples_EMTS = np.stack([found.proprio_MTS for found in first])
    truth_ETS = np.stack([found.truth_TS for found in first])
    needed = 2 * 17
    if len(first) < needed or not truth_ETS.shape[-1]:
        return None
    bands = fit_bands(samples_EMTS[::2], truth_ETS[::2], BAND_LEVEL)
    tried = list(zip(samples_EMTS[1::2], truth_ETS[1::2], strict=True))
    held = sum(bands.holds(*pair) for pair in tried)
    return {
        "level": BAND_LEVEL,
        "episodes_fitted": len(first) - len(tried),
        "episodes_tried": len(tried),
        "held": held / len(tried),
        "radius": bands.radius,
    }
