"""Exploratory motion of the tool: what a model must see besides demonstrations to learn what actions do."""

from collections.abc import Sequence

import numpy as np

from vidworld.lab.effect import FRAME_S, Plan
from vidworld.lab.kinematics import ArmPlanner, minimum_jerk, tool_down
from vidworld.lab.text import describe

ATTEMPTS = 6
OU_RATE = 1.4
"""Return of the noise to its mean, 1/s."""
OU_SPEED = 0.62
"""Stationary spread of the tool's velocity, m/s, before the box bounds it."""


def random_motion(
    rng: np.random.Generator,
    arm: ArmPlanner,
    frames: int,
    low_3: Sequence[float] | np.ndarray,
    high_3: Sequence[float] | np.ndarray,
    focus_N3: np.ndarray | None = None,
) -> Plan | None:
    """Frozen commands that explore the box from `low_3` to `high_3` (metres), or None if none is found.

    Half of them are Ornstein-Uhlenbeck noise (Uhlenbeck and Ornstein, 1930) on the tool's velocity, half go
    to random points; with `focus_N3` a good part of the points are near those.
    """
    low, high = np.asarray(low_3, float), np.asarray(high_3, float)
    for _ in range(ATTEMPTS):
        noisy = bool(rng.random() < 0.5)
        if noisy:
            positions_T3 = ornstein_uhlenbeck(rng, frames + 1, low, high)
        else:
            positions_T3 = random_reaches(rng, frames + 1, low, high, focus_N3)
        turns = np.array([0.0, frames * FRAME_S])
        yaw_T = minimum_jerk(turns, rng.uniform(-0.9, 0.9, (2, 1)), np.arange(frames + 1) * FRAME_S)[:, 0]
        rotations_T33 = np.array([tool_down(yaw) for yaw in yaw_T])
        targets_TJ = arm.path(positions_T3, rotations_T33)
        if targets_TJ is not None:
            policy = "explore:noise" if noisy else "explore:reach"
            gripper_T = random_gripper(rng, frames)
            return Plan(targets_TJ[1:], gripper_T, targets_TJ[0], describe(rng, "explore"), policy)
    return None


def ornstein_uhlenbeck(
    rng: np.random.Generator, rows: int, low_3: np.ndarray, high_3: np.ndarray
) -> np.ndarray:
    """Positions [rows, 3] whose velocity is Ornstein-Uhlenbeck noise; the walls of the box reflect it."""
    keep = np.exp(-OU_RATE * FRAME_S)
    spread = OU_SPEED * np.sqrt(1 - keep**2)
    position, velocity = rng.uniform(low_3, high_3), OU_SPEED * rng.standard_normal(3)
    path = []
    for _ in range(rows):
        path.append(position)
        velocity = keep * velocity + spread * rng.standard_normal(3)
        following = position + velocity * FRAME_S
        outside = (following < low_3) | (following > high_3)
        velocity = np.where(outside, -velocity, velocity)
        position = np.clip(following, low_3, high_3)
    return _smoothed(np.array(path))


def random_reaches(
    rng: np.random.Generator,
    rows: int,
    low_3: np.ndarray,
    high_3: np.ndarray,
    focus_N3: np.ndarray | None = None,
) -> np.ndarray:
    """Positions [rows, 3] of minimum-jerk reaches between random points, rests included."""
    times, points = [0.0], [rng.uniform(low_3, high_3)]
    while times[-1] < rows * FRAME_S:
        point = rng.uniform(low_3, high_3)
        if focus_N3 is not None and rng.random() < 0.65:
            near = focus_N3[rng.integers(len(focus_N3))] + rng.normal(0, 0.025, 3)
            point = np.clip(near, low_3, high_3)
        if rng.random() < 0.15:
            point = points[-1]
        distance = float(np.linalg.norm(point - points[-1]))
        times.append(times[-1] + max(0.32, distance / rng.uniform(0.2, 0.5)))
        points.append(point)
    return minimum_jerk(times, np.array(points), np.arange(rows) * FRAME_S)


def random_gripper(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Opening [frames] in 0..1 that changes now and then, over a few frames."""
    opening, rows = float(rng.random()), np.zeros(frames)
    goal = opening
    for frame in range(frames):
        if rng.random() < 0.06:
            goal = float(rng.choice((0.0, 1.0, rng.random())))
        opening += np.clip(goal - opening, -0.2, 0.2)
        rows[frame] = opening
    return rows


def _smoothed(path_T3: np.ndarray) -> np.ndarray:
    """A path without corners: mean of three neighbours."""
    padded = np.pad(path_T3, ((1, 1), (0, 0)), mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3
