"""Angles that wrap, and quaternions that change sign: jumps in the numbers where the robot made none."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from vidworld.contract import Dimension
from vidworld.data.inspection.finding import Finding
from vidworld.data.inspection.survey import Survey

TURN = {"rad": 2 * math.pi, "deg": 360.0, "degree": 360.0, "degrees": 360.0}
WRAP = 0.75
"""Share of a turn: a step this large in one frame is a wrap: a joint would need several turns a second."""
CONVERT = "convert it with rotation: {dims: [...], from: ..., to: rot6d} in the contract file"
UNIT_NORM = 0.02
FLIP = -0.5
"""Cosine between a quaternion and the next. Sign flips give -1, a turn of 240 degrees in a frame -0.5."""


def euler_wraps(survey: Survey) -> Iterator[Finding]:
    """Angles that jump by a turn between one frame and the next."""
    for contract in survey.manifest.contracts:
        for role, dimensions, tables in survey.tables(contract):
            for index, dimension in enumerate(dimensions):
                if dimension.kind not in ("position", "unknown"):
                    continue
                count, first = 0, ""
                for look, rows in tables:
                    turn = TURN.get(dimension.unit) or _turn_of(rows[:, index])
                    # A wrap goes to the same angle a turn away, which no range larger than a turn shows.
                    steps_T = np.abs(np.diff(rows[:, index]))
                    wraps = np.flatnonzero((steps_T > WRAP * turn) & (steps_T < 1.1 * turn)) if turn else []
                    if len(wraps) and not first:
                        first = f"{look.sample.episode_id} at row {look.start + int(wraps[0]) + 1}"
                    count += len(wraps)
                if count:
                    yield Finding(
                        "wraps",
                        f"{role} {dimension.name!r} wraps around",
                        f"embodiment {contract.embodiment!r}",
                        f"{count} jumps by a turn, first in {first}",
                        "an angle that is continuous in time",
                        CONVERT,
                    )


def quaternion_flips(survey: Survey) -> Iterator[Finding]:
    """Four numbers of norm 1 whose sign changes from one frame to the next."""
    for contract in survey.manifest.contracts:
        for role, dimensions, tables in survey.tables(contract):
            if not tables:
                continue
            for first in _quaternions(dimensions, np.concatenate([rows for _, rows in tables])):
                flips = [
                    (look, row)
                    for look, rows in tables
                    for row in np.flatnonzero(_cosines(rows[:, first : first + 4]) < FLIP)
                ]
                if flips:
                    look, row = flips[0]
                    names = f"{dimensions[first].name} ... {dimensions[first + 3].name}"
                    yield Finding(
                        "quaternion signs",
                        f"{role} quaternion {names} changes its sign",
                        f"embodiment {contract.embodiment!r}",
                        f"{len(flips)}, first in {look.sample.episode_id} at row {look.start + row + 1}",
                        "a quaternion that is continuous in time",
                        CONVERT,
                    )


def _turn_of(values_T: np.ndarray) -> float | None:
    """A turn in radians, if numbers of unknown unit fill -pi to pi and never leave it."""
    fills = values_T.max() - values_T.min() > 0.9 * 2 * math.pi
    return 2 * math.pi if fills and np.abs(values_T).max() <= math.pi + 1e-3 else None


def _quaternions(dimensions: Sequence[Dimension], values_TD: np.ndarray) -> Iterator[int]:
    """Where four neighbours of norm 1 begin, none of them said to be an angle or a length."""
    index = 0
    while index + 4 <= len(dimensions):
        four = dimensions[index : index + 4]
        norms_T = np.linalg.norm(values_TD[:, index : index + 4], axis=1)
        plain = all(dimension.unit in ("1", "unknown") for dimension in four)
        if (
            plain
            and (np.abs(norms_T - 1) < UNIT_NORM).mean() > 0.99
            and values_TD[:, index : index + 4].std()
        ):
            yield index
            index += 4
        else:
            index += 1


def _cosines(quaternions_T4: np.ndarray) -> np.ndarray:
    return (quaternions_T4[1:] * quaternions_T4[:-1]).sum(1)
