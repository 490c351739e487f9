"""Where the brush goes: dips, strokes and scribbles as poses of its tip, in the frame of a canvas."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidworld.lab.effect import FRAME_S
from vidworld.lab.kinematics import slerp

STYLES = ("line", "across", "zigzag", "wave", "loop", "fill")
CLEAR = 0.06
"""Metres in front of the canvas where the brush travels freely."""


@dataclass(frozen=True)
class Easel:
    """How a canvas stands: `lean_deg` 0 is upright and 90 lies flat; it faces -y, turned by `yaw_deg`."""

    centre_3: tuple[float, float, float]
    width: float
    lean_deg: float
    yaw_deg: float

    @property
    def axes_33(self) -> np.ndarray:
        """Columns in the world: u to the right, v down the canvas, w into it."""
        lean, yaw = np.radians(self.lean_deg), np.radians(self.yaw_deg)
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        down, inward = (0, -np.sin(lean), -np.cos(lean)), (0, np.cos(lean), -np.sin(lean))
        return turn @ np.stack([(1, 0, 0), down, inward], axis=1)

    @property
    def corner_3(self) -> np.ndarray:
        """Top left corner in the world, the origin of canvas coordinates."""
        u, v, _ = self.axes_33.T
        return np.array(self.centre_3) - 0.5 * self.width * (u + v)

    @property
    def slope(self) -> float:
        """Sine of the tilt against the ground."""
        return float(np.cos(np.radians(self.lean_deg)))

    def local(self, points_N3: np.ndarray) -> np.ndarray:
        """World to canvas coordinates, metres."""
        return (points_N3 - self.corner_3) @ self.axes_33

    def world(self, points_N3: np.ndarray) -> np.ndarray:
        """Canvas coordinates to world, metres."""
        return self.corner_3 + np.asarray(points_N3) @ self.axes_33.T

    def brush_rotation(self, roll: float) -> np.ndarray:
        """Rotation [3, 3] of a tool square to the canvas: z into it, x along u turned by `roll` radians."""
        u, v, w = self.axes_33.T
        x = np.cos(roll) * u + np.sin(roll) * v
        return np.stack([x, np.cross(w, x), w], axis=1)

    def dip_rotation(self, roll: float) -> np.ndarray:
        """The same tool tipped about u until it points down: the shortest way to a bucket."""
        flat = Easel(self.centre_3, self.width, 90.0, self.yaw_deg)
        return flat.brush_rotation(roll)


class Route:
    """Poses of the tip, a frame each: world position and the share of the turn from dipping to painting."""

    def __init__(self, easel: Easel, start_3: Sequence[float] | np.ndarray, turned: float) -> None:
        self.easel = easel
        self.rows = [np.array([*start_3, turned], float)]

    def __len__(self) -> int:
        return len(self.rows)

    def along(self, points_M3: np.ndarray, frames: int, turned: float) -> None:
        """Follow a line through world points, rest to rest with minimum jerk in its length."""
        goals = np.concatenate([points_M3, np.full((len(points_M3), 1), turned)], axis=1)
        line = np.concatenate([self.rows[-1][None], goals])
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1) + 1e-9)])
        share = (np.arange(frames) + 1) / frames
        at = length[-1] * share**3 * (10 - 15 * share + 6 * share**2)
        self.rows += list(np.stack([np.interp(at, length, column) for column in line.T], axis=1))

    def dip(self, bucket_2: Sequence[float], depth_z: float) -> None:
        """Go over a bucket, into its paint and out again."""
        x, y = bucket_2
        high, low = [x, y, 0.2], [x, y, depth_z]
        distance = float(np.linalg.norm(self.rows[-1][:3] - high))
        self.along(np.array([high]), 3 + round(distance / 0.07), 0.0)
        self.along(np.array([low]), 4, 0.0)
        self.along(np.array([low]), 2, 0.0)
        self.along(np.array([high]), 4, 0.0)

    def stroke(self, line_M2: np.ndarray, press: float, speed: float) -> None:
        """Come to the canvas, drag the tip along a line (u, v) at a depth of `press` metres, and lift it."""
        first, last = line_M2[0], line_M2[-1]
        near = self.easel.world(np.array([[*first, -CLEAR]]))
        distance = float(np.linalg.norm(self.rows[-1][:3] - near[0])) + 0.25 * (1 - self.rows[-1][3])
        self.along(near, 2 + round(distance / 0.075), 1.0)
        self.along(self.easel.world(np.array([[*first, press]])), 4, 1.0)
        length = float(np.linalg.norm(np.diff(line_M2, axis=0), axis=1).sum())
        depth = np.full((len(line_M2), 1), press)
        points = self.easel.world(np.concatenate([line_M2, depth], axis=1))
        self.along(points, max(4, round(length / speed / FRAME_S)), 1.0)
        # The arm follows its commands 0.1 s late: it finishes the stroke before it lifts.
        self.along(points[-1:], 2, 1.0)
        self.along(self.easel.world(np.array([[*last, -CLEAR]])), 3, 1.0)

    def poses(self, frames: int, roll: float) -> tuple[np.ndarray, np.ndarray]:
        """Positions [T + 1, 3] and rotations [T + 1, 3, 3] of the tip; the last pose is held."""
        rows = np.array((self.rows + [self.rows[-1]] * (frames + 1))[: frames + 1])
        turned = slerp(
            self.easel.dip_rotation(roll), self.easel.brush_rotation(roll), np.clip(rows[:, 3], 0, 1)
        )
        return rows[:, :3], turned


def stroke_line(rng: np.random.Generator, style: str, width: float) -> np.ndarray:
    """A line [M, 2] in canvas coordinates that stays on a canvas of that width."""
    margin = 0.12 * width

    def place(low: float, high: float) -> float:
        return float(rng.uniform(margin + low * (width - 2 * margin), margin + high * (width - 2 * margin)))

    flip = rng.random() < 0.5
    match style:
        case "line":
            points = np.array([[place(0, 0.2), place(0, 1)], [place(0.8, 1), place(0, 1)]])
        case "across":
            u = place(0.1, 0.9)
            points = np.array([[u, place(0, 0.15)], [u + 0.3 * (place(0, 1) - u), place(0.85, 1)]])
        case "zigzag":
            turns = int(rng.integers(3, 5))
            top, bottom = sorted((place(0, 0.25), place(0.7, 1)))
            u = np.linspace(place(0, 0.2), place(0.8, 1), turns)
            points = np.stack([u, np.where(np.arange(turns) % 2, bottom, top)], axis=1)
        case "wave":
            u = np.linspace(place(0, 0.15), place(0.85, 1), 40)
            height, middle = 0.2 * width * rng.uniform(0.6, 1), place(0.35, 0.65)
            points = np.stack([u, middle + height * np.sin(np.linspace(0, rng.uniform(5, 9), 40))], axis=1)
        case "loop":
            angle = np.linspace(0, 2 * np.pi * rng.uniform(0.8, 1.15), 40) + rng.uniform(0, 6.28)
            radius = width * rng.uniform(0.2, 0.3)
            centre = np.array([place(0.4, 0.6), place(0.4, 0.6)])
            points = centre + radius * np.stack(
                [np.cos(angle), rng.uniform(0.7, 1.1) * np.sin(angle)], axis=1
            )
        case "fill":
            rows = int(rng.integers(3, 5))
            left, right = place(0.05, 0.25), place(0.7, 0.95)
            v = place(0.05, 0.35) + np.arange(rows) * 0.1 * width
            ends = [(left, right) if row % 2 == 0 else (right, left) for row in range(rows)]
            points = np.array([[end, v[row]] for row in range(rows) for end in ends[row]])
        case _:
            raise AssertionError(f"no style {style!r}")
    if flip and style != "fill":
        points = points[::-1]
    return np.clip(points, 0.08 * width, 0.92 * width)


def scribble(rng: np.random.Generator, easel: Easel, frames: int) -> np.ndarray:
    """Ornstein-Uhlenbeck motion of the tip [T, 3] on a canvas and off it, world frame."""
    state, rows = np.zeros(3), []
    place = np.array([rng.uniform(0.25, 0.75) * easel.width, rng.uniform(0.25, 0.75) * easel.width, -0.03])
    middle = np.array([easel.width / 2, easel.width / 2, 0.002])
    spread, pull = np.array([0.18, 0.18, 0.03]), np.array([1.2, 1.2, 4.0])
    for _ in range(frames):
        state = 0.82 * state + rng.normal(0, 1, 3) * spread
        place = place + FRAME_S * (state + pull * (middle - place))
        place = np.clip(place, [0.0, 0.0, -0.08], [easel.width, easel.width, 0.009])
        rows.append(place)
    return easel.world(np.array(rows))
