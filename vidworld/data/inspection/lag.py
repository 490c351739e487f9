"""Time shifts by correlation: actions against the robot's motion, pictures against the robot's motion.

`actions[t]` takes frame t to frame t+1, so a velocity or delta at row t goes with proprio[t+1] - proprio[t],
and so does the change of a commanded position, action[t] - action[t-1]. The lag at which both correlate best
is 0 in a log that keeps the convention.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vidworld.contract import ActionContract, Dimension
from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.pictures import speed
from vidworld.data.inspection.survey import Look, Survey

MAX_LAG = 5
LEAST_ROWS = 4
"""Rows that must be left of an episode for comparison when both ends are kept for lags."""
LEAST_EPISODES = 3
PAIRED = 0.5
"""Least correlation, over all episodes, at which a command is said to drive a number of proprioception."""
LEAST_GAIN = 0.03
"""Least gain in mean correlation over that at lag 0. Motion is smooth: a shift by one frame at 10 Hz costs
0.06 (CR5 actions, from 0.98 to 0.92) or 0.05 (CR5 pictures) while chance moves the mean by less than 0.01."""
CERTAIN = 3.0
"""Standard errors over episodes that the gain must exceed, since several lags are tried."""
VIDEO_LEAST = 0.25
SURE = 0.7
"""Correlation from which sign and scale are judged."""
FACTORS = {180 / math.pi: "degrees for radians", 1000.0: "millimetres for metres"}
FACTOR_TOLERANCE = 0.25
FAR_FACTOR = 4.0
"""A gain beyond this is no controller: those reach 0.5 to 1 of what was asked."""


@dataclass(frozen=True)
class Curve:
    """Mean correlation over episodes at each lag; a positive lag says that motion comes later."""

    lags: tuple[int, ...]
    mean_L: np.ndarray
    gain_L: np.ndarray
    """Mean over episodes of correlation minus that at lag 0, and its standard error."""
    error_L: np.ndarray
    episodes: int

    @property
    def peak(self) -> int:
        """The lag of the largest mean."""
        return self.lags[int(self.mean_L.argmax())]

    def at(self, lag: int) -> float:
        """Mean correlation at a lag."""
        return float(self.mean_L[self.lags.index(lag)])

    def shifted(self, least: float) -> bool:
        """Whether the peak lies beyond doubt at another lag than 0."""
        index = int(self.mean_L.argmax())
        gain = self.gain_L[index]
        return bool(self.mean_L[index] > least and gain > LEAST_GAIN and gain > CERTAIN * self.error_L[index])


@dataclass(frozen=True)
class Pair:
    """A command and the number of proprioception that answers to it."""

    action: int
    proprio: int
    correlation: float
    """Pooled over episodes, at the pair's best lag; negative if they move against each other."""
    lag: int
    slope: float
    """Motion per commanded motion at that lag; 1 when both mean the same in the same unit."""


def action_lag(survey: Survey) -> Iterator[Finding]:
    """Actions that are shifted against the motion that they cause."""
    for contract in survey.manifest.contracts:
        looks = survey.of(contract.embodiment)
        pairs = find_pairs(contract, looks)
        curve = action_curve(contract, looks, pairs)
        if curve is None or not curve.shifted(PAIRED):
            continue
        late = curve.peak > 0
        frames = f"{abs(curve.peak)} frame{'s' if abs(curve.peak) > 1 else ''}"
        yield Finding(
            "action lag",
            f"motion comes {frames} {'after' if late else 'before'} its action",
            f"embodiment {contract.embodiment!r}, {curve.episodes} episodes",
            f"correlation {curve.at(curve.peak):.2f} at lag {curve.peak:+d}, {curve.at(0):.2f} at 0 ("
            + named(
                [f"{contract.action[p.action].name} / {contract.proprio[p.proprio].name}" for p in pairs], 3
            )
            + ")",
            "the peak at lag 0: actions[t] takes frame t to t+1",
            f"a slow controller delays motion by as much; if it is the log, move actions {frames} later"
            if late
            else f"each action describes motion that is over: move actions {frames} earlier in the source",
        )


def video_lag(survey: Survey) -> Iterator[Finding]:
    """Pictures that are shifted against the robot's state."""
    for contract in survey.manifest.contracts:
        looks = survey.of(contract.embodiment)
        for view in survey.manifest.views:
            curve = video_curve(survey, looks, view)
            if curve is None or not curve.shifted(VIDEO_LEAST):
                continue
            frames = f"{abs(curve.peak)} frame{'s' if abs(curve.peak) > 1 else ''}"
            yield Finding(
                "video lag",
                f"view {view!r} is {frames} {'late' if curve.peak > 0 else 'early'}",
                f"embodiment {contract.embodiment!r}, {curve.episodes} episodes",
                f"picture and state correlate {curve.at(curve.peak):.2f} at lag {curve.peak:+d}, "
                f"{curve.at(0):.2f} at 0",
                "the peak at lag 0: frame t shows the state of row t",
                f"move the video {frames} {'earlier' if curve.peak > 0 else 'later'} in the source",
            )


def sign_and_scale(survey: Survey) -> Iterator[Finding]:
    """Commands that move the robot the other way, or by another amount than their unit says."""
    for contract in survey.manifest.contracts:
        for pair in find_pairs(contract, survey.of(contract.embodiment)):
            command, answer = contract.action[pair.action], contract.proprio[pair.proprio]
            known = command.unit != "unknown" and answer.unit != "unknown" and command.kind != "unknown"
            if not known or abs(pair.correlation) < SURE:
                continue
            where = f"embodiment {contract.embodiment!r}"
            if pair.slope < 0:
                yield Finding(
                    "sign",
                    f"proprio {answer.name!r} moves against action {command.name!r}",
                    where,
                    f"correlation {pair.correlation:.2f}",
                    "the same sign",
                    "one of the two has its sign reversed, or another frame of reference: correct the source",
                )
            elif (mistake := _mistake(pair.slope, contract.rate_hz)) is not None:
                yield Finding(
                    "scale",
                    f"proprio {answer.name!r} moves {pair.slope:.3g} times what action {command.name!r} says",
                    where,
                    f"{command.unit} against {answer.unit}, a factor of {pair.slope:.3g}",
                    "a factor near 1",
                    f"{mistake}: correct units or kinds in the contract file",
                )


def unknown_kinds(survey: Survey) -> Iterator[Finding]:
    """Actions of unknown kind, with what they look like."""
    for contract in survey.manifest.contracts:
        unknown = [index for index, d in enumerate(contract.action) if d.kind == "unknown"]
        if not unknown:
            continue
        looks = survey.of(contract.embodiment)
        hints = []
        for kind in ("velocity", "position"):
            for pair in find_pairs(contract, looks, unknown_as=kind):
                if pair.action in unknown and abs(pair.correlation) > SURE:
                    hints.append((abs(pair.correlation), pair, kind))
        best = {pair.action: (pair, kind) for _, pair, kind in sorted(hints, key=lambda hint: hint[0])}
        said = [
            f"{contract.action[action].name} moves {contract.proprio[pair.proprio].name} like a "
            f"{'velocity or delta' if kind == 'velocity' else kind}"
            for action, (pair, kind) in sorted(best.items())
        ]
        yield Finding(
            "unknown kinds",
            f"{len(unknown)} actions of unknown kind",
            f"embodiment {contract.embodiment!r}",
            named(said, 4) if said else named([contract.action[index].name for index in unknown]),
            "position, velocity, delta, binary or force",
            "say them in a contract file: resampling needs them, and users do",
        )


def find_pairs(
    contract: ActionContract, looks: Sequence[Look], *, unknown_as: str | None = None
) -> list[Pair]:
    """For each command the number of proprioception that it drives most clearly, if any."""
    lags = _lags(looks)
    reach = max(lags)
    used = [look for look in looks if len(look.actions_TA) - 1 >= 2 * reach + LEAST_ROWS]
    if not used or not contract.proprio:
        return []
    correlations, slopes = [], []
    moved = [_moved(contract, look, unknown_as) for look in used]
    for lag in lags:
        rows = [_aligned(commands, motion, lag, reach) for commands, motion in moved]
        x_NA = np.concatenate([x - x.mean(0) for x, _ in rows])
        y_NS = np.concatenate([y - y.mean(0) for _, y in rows])
        correlations.append(_correlation(x_NA, y_NS))
        slopes.append(x_NA.T @ y_NS / np.maximum((x_NA**2).sum(0), 1e-12)[:, None])
    pairs = []
    for a, command in enumerate(contract.action):
        fits = [
            s
            for s, answer in enumerate(contract.proprio)
            if answer.kind in ("position", "unknown") and _comparable(command, answer, unknown_as)
        ]
        choices = [(abs(correlations[i][a, s]), i, s) for i in range(len(lags)) for s in fits]
        if choices and (best := max(choices))[0] > PAIRED:
            _, i, s = best
            pairs.append(Pair(a, s, float(correlations[i][a, s]), lags[i], float(slopes[i][a, s])))
    return pairs


def action_curve(contract: ActionContract, looks: Sequence[Look], pairs: Sequence[Pair]) -> Curve | None:
    """How well commands and motion correlate at each lag, in the mean over pairs and episodes."""
    if not pairs:
        return None
    scales_A, scales_S = np.array(contract.action_statistics.std), np.array(contract.proprio_statistics.std)
    series = []
    for look in looks:
        commands_TA, motion_TS = _moved(contract, look, None)
        series += [
            [
                (np.sign(pair.correlation) * commands_TA[:, pair.action], motion_TS[:, pair.proprio])
                for pair in pairs
                # A joint that rests in this episode only has noise to offer.
                if look.actions_TA[:, pair.action].std() > 0.1 * scales_A[pair.action]
                and look.proprio_TS[:, pair.proprio].std() > 0.1 * scales_S[pair.proprio]
            ]
        ]
    return _curve(series, _lags(looks))


def video_curve(survey: Survey, looks: Sequence[Look], view: str) -> Curve | None:
    """How well the change of the picture and the robot's speed correlate at each lag."""
    series = []
    for look in looks:
        change_T, speed_T = look.views[view].change_T, speed(look, survey)
        if len(speed_T) == len(change_T) > 0 and change_T.std() > 0 and speed_T.std() > 0:
            series.append([(speed_T, np.log1p(change_T))])
    stride = max([1, *(look.stride for look in looks)])
    return _curve(series, _lags(looks, stride)) if series else None


def _curve(series: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], lags: tuple[int, ...]) -> Curve | None:
    """Correlations of pairs (before, after) of each episode, averaged over pairs, then over episodes."""
    reach = max(lags)
    rows = []
    for pairs in series:
        found = [
            [
                float(_correlation(*(v[:, None] for v in _aligned(before, after, lag, reach)))[0, 0])
                for lag in lags
            ]
            for before, after in pairs
            if len(before) >= 2 * reach + LEAST_ROWS
        ]
        if found:
            rows.append(np.mean(found, axis=0))
    if len(rows) < LEAST_EPISODES:
        return None
    curves_EL = np.array(rows)
    gain_EL = curves_EL - curves_EL[:, [lags.index(0)]]
    error_L = gain_EL.std(0, ddof=1) / math.sqrt(len(rows))
    return Curve(lags, curves_EL.mean(0), gain_EL.mean(0), error_L, len(rows))


def _moved(contract: ActionContract, look: Look, unknown_as: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Commanded motion [T-1, A] and that of proprioception [T-1, S] from frame t to t+1, in like units."""
    actions_TA = look.actions_TA.astype(np.float64)
    commands_TA = np.zeros((len(actions_TA) - 1, actions_TA.shape[1]))
    for index, dimension in enumerate(contract.action):
        match unknown_as if dimension.kind == "unknown" and unknown_as else dimension.kind:
            case "velocity":
                commands_TA[:, index] = actions_TA[:-1, index] / contract.rate_hz
            case "delta":
                commands_TA[:, index] = actions_TA[:-1, index]
            case "position":
                commands_TA[1:, index] = np.diff(actions_TA[:-1, index])
                # The first command moved from where the robot stood, which nobody wrote down.
                commands_TA[:1, index] = commands_TA[1:2, index] if len(commands_TA) > 1 else 0
            case "binary" | "force" | "unknown":
                pass
            case other:
                raise AssertionError(other)
    return commands_TA, np.diff(look.proprio_TS.astype(np.float64), axis=0)


def _aligned(before: np.ndarray, after: np.ndarray, lag: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Row t of the first with row t + lag of the second: the same rows of the first at every lag."""
    length = len(before)
    return before[reach : length - reach], after[reach + lag : length - reach + lag]


def _lags(looks: Sequence[Look], stride: int = 1) -> tuple[int, ...]:
    """As many lags as leave half of the shorter episodes to compare."""
    shortest = float(np.quantile([len(look.actions_TA) / stride for look in looks], 0.1)) if looks else 0
    reach = int(min(MAX_LAG, max(1, (shortest - 1) // 4)))
    return tuple(range(-reach, reach + 1))


def _correlation(x_NA: np.ndarray, y_NS: np.ndarray) -> np.ndarray:
    """Pearson correlations [A, S]; 0 where one of the two does not change."""
    x_NA, y_NS = x_NA - x_NA.mean(0), y_NS - y_NS.mean(0)
    norms = np.outer(np.linalg.norm(x_NA, axis=0), np.linalg.norm(y_NS, axis=0))
    return np.where(norms > 1e-9, x_NA.T @ y_NS / np.maximum(norms, 1e-9), 0.0)


def _comparable(command: Dimension, answer: Dimension, unknown_as: str | None) -> bool:
    if command.kind in ("binary", "force") or (command.kind == "unknown" and not unknown_as):
        return False
    unit = command.unit.removesuffix("/s")
    return "unknown" in (unit, answer.unit) or unit == answer.unit


def _mistake(slope: float, rate_hz: float) -> str | None:
    """What a factor between command and motion looks like; None for one near 1."""
    for factor, words in ({rate_hz: "a velocity for a delta"} | FACTORS).items():
        for ratio in (factor, 1 / factor):
            if factor > 2 and abs(slope / ratio - 1) < FACTOR_TOLERANCE:
                return f"this is the factor of {words}"
    return None if 1 / FAR_FACTOR < slope < FAR_FACTOR else "no controller is off by so much"
