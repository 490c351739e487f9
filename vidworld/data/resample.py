"""Another rate: which frames are kept, and what actions and proprioception become at that rate.

Frames are picked, never blended. An action of the result does what the recorded ones in its interval did:

| kind | action of an interval | proprioception at an instant |
|---|---|---|
| delta | added, shared out by time where an interval cuts one; declared rotations are composed | linear |
| velocity, force | mean over time: the displacement, or impulse, stays | linear |
| position | the last command that held | linear; declared rotations along the shortest turn |
| binary | the last command that held | of the nearest row |
| unknown | refused | refused |
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vidworld.contract import Dimension
from vidworld.data import rotation
from vidworld.errors import ContractError, DataError
from vidworld.types import EmbodimentSpec

RATE_TOLERANCE = 0.01
_INSTANT = 1e-6
"""Seconds that do not count: a clock that began in 1970 is not told in finer steps than a quarter of this."""


@dataclass(frozen=True)
class Group:
    """Columns `start` to `stop` that are one rotation."""

    start: int
    stop: int
    representation: str


def rotation_groups(dimensions: tuple[Dimension, ...]) -> list[Group]:
    """The rotations among dimensions, each as many neighbours as its representation has numbers.

    Raises ContractError when neighbours that say to be a rotation are too few.
    """
    groups, start = [], 0
    while start < len(dimensions):
        representation = dimensions[start].rotation
        if not representation:
            start += 1
            continue
        stop = start + rotation.width_of(representation)
        part = dimensions[start:stop]
        if len(part) < stop - start or any(d.rotation != representation for d in part):
            raise ContractError(
                f"rotation that begins with {dimensions[start].name!r}",
                expected=f"{stop - start} neighbouring dimensions of {representation}",
            )
        groups.append(Group(start, stop, representation))
        start = stop
    return groups


def decimation(fps: float, target_fps: float) -> int:
    """Every how-many-th frame is kept. Raises DataError when that is not a whole number."""
    step = whole_fraction(fps, target_fps)
    if step is None:
        choices = ", ".join(f"{fps / divisor:g}" for divisor in range(1, 6))
        raise DataError(
            "frames per second",
            got=f"{fps:g}, asked for {target_fps:g}",
            expected=f"a whole fraction of the recorded rate: {choices} ...",
            fix="or --resample nearest, which picks the frames nearest in time" if target_fps < fps else None,
        )
    return step


def whole_fraction(fps: float, target_fps: float) -> int | None:
    """How many recorded frames make one, if that is a whole number."""
    ratio = fps / target_fps
    step = round(ratio)
    return step if step >= 1 and abs(ratio - step) <= RATE_TOLERANCE * ratio else None


def refuse_more_frames(fps: float, target_fps: float) -> None:
    """Refuse a rate above the recorded one."""
    if target_fps > fps:
        raise DataError(
            "frames per second",
            got=f"{fps:g}, asked for {target_fps:g}",
            expected="at most the recorded rate: frames are not made up",
        )


@dataclass(frozen=True)
class Grid:
    """Instants at an even rate, within the time of an episode whose clock may jitter."""

    times_T: np.ndarray
    """Recorded seconds of each row, ascending."""
    at_N: np.ndarray
    """Seconds of the new rows."""
    fps: float

    @property
    def frames_N(self) -> np.ndarray:
        """The recorded frame nearest to each instant, of two that are equally near the earlier."""
        after = np.clip(np.searchsorted(self.times_T, self.at_N), 1, max(len(self.times_T) - 1, 1))
        after = np.minimum(after, len(self.times_T) - 1)
        before = np.maximum(after - 1, 0)
        later = self.times_T[after] - self.at_N < self.at_N - self.times_T[before] - _INSTANT
        return np.where(later, after, before)

    @property
    def edges_T(self) -> np.ndarray:
        """When each recorded action begins, and the end of the last: one usual step after it began."""
        step = float(np.median(np.diff(self.times_T))) if len(self.times_T) > 1 else 1 / self.fps
        return np.append(self.times_T, max(self.times_T[-1] + step, self.at_N[-1] + _INSTANT))

    @property
    def edges_N(self) -> np.ndarray:
        """When each new action begins, and the end of the last, which is that of the recorded ones."""
        return np.append(self.at_N, self.edges_T[-1])


def even_grid(times_T: np.ndarray, fps: float) -> Grid:
    """Instants 1 / `fps` apart from the first recorded row to no later than the last."""
    count = int(np.floor((times_T[-1] - times_T[0]) * fps + 1e-3)) + 1
    return Grid(times_T, times_T[0] + np.arange(count) / fps, fps)


def actions_on_grid(
    actions_TA: np.ndarray, dimensions: tuple[Dimension, ...], grid: Grid, control_frame: str = "unknown"
) -> np.ndarray:
    """Actions [N, A] float64 over the intervals of a grid; row t was in force from its time to the next.

    The sum of deltas over the episode is that of the recorded ones, and a constant velocity stays constant.
    Raises DataError for a dimension of unknown kind.
    """
    actions_TA = actions_TA.astype(np.float64)
    recorded, edges = grid.edges_T, grid.edges_N
    # The last row that began before the interval's end is what held when the next frame was taken.
    held = np.searchsorted(recorded[:-1], edges[1:] - _INSTANT) - 1
    result = np.empty((len(grid.at_N), len(dimensions)))
    for index, dimension in enumerate(dimensions):
        column = actions_TA[:, index]
        match dimension.kind:
            case "delta":
                total = np.concatenate([[0.0], np.cumsum(column)])
                result[:, index] = np.diff(np.interp(edges, recorded, total))
            case "velocity" | "force":
                total = np.concatenate([[0.0], np.cumsum(column * np.diff(recorded))])
                result[:, index] = np.diff(np.interp(edges, recorded, total)) / np.diff(edges)
            case "position" | "binary":
                result[:, index] = column[held]
            case "unknown":
                raise unknown_kind(dimension)
            case _:
                raise AssertionError(dimension.kind)
    for group in _delta_groups(dimensions):
        columns = slice(group.start, group.stop)
        parts = rotation.to_matrix(actions_TA[:, columns], group.representation)
        composed = [
            _compose(_within(parts, recorded, start, end), control_frame) for start, end in pairwise(edges)
        ]
        result[:, columns] = rotation.from_matrix(np.stack(composed), group.representation)
    return result


def proprio_on_grid(proprio_TS: np.ndarray, dimensions: tuple[Dimension, ...], grid: Grid) -> np.ndarray:
    """Proprioception [N, S] float64 at the instants of a grid.

    Raises DataError for a dimension of unknown kind, and for an angle that jumps by more than half a turn.
    """
    proprio_TS = proprio_TS.astype(np.float64)
    refuse_wraps(proprio_TS, dimensions, "resampled")
    result = np.empty((len(grid.at_N), len(dimensions)))
    for index, dimension in enumerate(dimensions):
        match dimension.kind:
            case "binary":
                result[:, index] = proprio_TS[grid.frames_N, index]
            case "unknown":
                raise unknown_kind(dimension, "proprio")
            case _:
                result[:, index] = np.interp(grid.at_N, grid.times_T, proprio_TS[:, index])
    for group in rotation_groups(dimensions):
        columns = slice(group.start, group.stop)
        matrices = rotation.to_matrix(proprio_TS[:, columns], group.representation)
        turned = rotation.from_matrix(rotation.slerp(matrices, grid.times_T, grid.at_N), group.representation)
        # The branch of the recorded rows is kept: angles that were unwrapped stay so.
        branch = rotation.nearest_branch(turned, proprio_TS[grid.frames_N, columns], group.representation)
        result[:, columns] = branch
    return result


def resample_actions(
    actions_TA: np.ndarray, dimensions: tuple[Dimension, ...], step: int, control_frame: str = "unknown"
) -> np.ndarray:
    """Actions [T, A] at every `step`-th frame: one command that does what the `step` recorded ones did.

    Row t of the result covers rows step*t ... step*t + step-1, so what it means depends on the kind: deltas
    add up (a declared rotation is composed, about the axes of `control_frame`); velocities and forces are
    averaged (the displacement, or impulse, stays); of positions and binary commands the last one is what held
    when the next kept frame was taken.
    Raises DataError for a dimension of unknown kind.
    """
    if step == 1:
        return actions_TA
    columns = []
    starts = np.arange(0, len(actions_TA), step)
    counts = np.diff(np.append(starts, len(actions_TA)))
    for dimension, column in zip(dimensions, actions_TA.astype(np.float64).T, strict=True):
        match dimension.kind:
            case "delta":
                columns.append(np.add.reduceat(column, starts))
            case "velocity" | "force":
                columns.append(np.add.reduceat(column, starts) / counts)
            case "position" | "binary":
                columns.append(column[starts + counts - 1])
            case "unknown":
                raise unknown_kind(dimension)
            case _:
                raise AssertionError(dimension.kind)
    result = np.stack(columns, axis=1) if columns else np.zeros((len(starts), 0))
    for group in _delta_groups(dimensions):
        columns = slice(group.start, group.stop)
        parts = rotation.to_matrix(actions_TA[:, columns], group.representation)
        composed = [_compose(parts[start : start + step], control_frame) for start in starts]
        result[:, columns] = rotation.from_matrix(np.stack(composed), group.representation)
    return result


def _delta_groups(dimensions: tuple[Dimension, ...]) -> list[Group]:
    return [group for group in rotation_groups(dimensions) if dimensions[group.start].kind == "delta"]


def _within(parts_T33: np.ndarray, edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Of rotations that each take one recorded interval, the shares that lie between two instants."""
    overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    inside = overlap > _INSTANT
    shares = (overlap / np.diff(edges))[inside]
    return rotation.power(parts_T33[inside], np.where(shares > 1 - 1e-12, 1.0, shares))


def _compose(parts_T33: np.ndarray, control_frame: str) -> np.ndarray:
    """One rotation [3, 3] for several in a row: about fixed axes the later goes left, else right."""
    total = np.eye(3)
    for part in parts_T33:
        match control_frame:
            case "base":
                total = part @ total
            case "end_effector":
                total = total @ part
            case _:
                raise DataError(
                    "rotation deltas cannot be put together",
                    got=f"control frame {control_frame}",
                    expected="base or end_effector",
                    fix="say control_frame in a contract file: --contract FILE",
                )
    return total


def refuse_wraps(values_TD: np.ndarray, dimensions: tuple[Dimension, ...], what: str) -> None:
    """Refuse angles that jump by more than half a turn between rows and are not declared as a rotation."""
    half_turn = {"rad": np.pi, "deg": 180.0}
    for index, dimension in enumerate(dimensions):
        limit = half_turn.get(dimension.unit)
        if limit is None or dimension.rotation or dimension.kind != "position":
            continue
        jumps = np.abs(np.diff(values_TD[:, index].astype(np.float64)))
        rows = np.flatnonzero(jumps > limit)
        if len(rows):
            raise DataError(
                f"{dimension.name!r} cannot be {what}: it jumps at row {int(rows[0]) + 1}",
                got=f"by {jumps[rows[0]]:.3g} {dimension.unit}",
                expected="less than half a turn",
                fix="Euler angles that wrap? declare `rotation` in a contract file",
            )


def unknown_kind(dimension: Dimension, role: str = "action") -> DataError:
    """The error of resampling a number whose meaning nobody gave."""
    return DataError(
        f"{role} {dimension.name!r} cannot be resampled",
        got="kind unknown",
        expected="position, velocity, delta, binary or force",
        fix="say it in a contract file: --contract FILE",
    )


def resampling_note(spec: EmbodimentSpec) -> str:
    """What a contract says of actions that were resampled."""
    rules = {
        "delta": "deltas added",
        "velocity": "velocities averaged",
        "force": "forces averaged",
        "position": "last position kept",
        "binary": "last binary command kept",
    }
    kinds = {dimension.kind for dimension in spec.action}
    return "one action stands for several recorded ones: " + ", ".join(
        rule for kind, rule in rules.items() if kind in kinds
    )


def nearest_note() -> str:
    """What a contract says when the rate was no whole fraction of the recorded one."""
    return "frames nearest in time, proprioception interpolated"
