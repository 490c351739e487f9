"""A small deterministic robot world in NumPy: a planar arm pushes a disc and paints a streak.

It needs no renderer and no download, draws hundreds of frames a second on one core, and has what a world
model must learn: kinematics, contact, and paint that stays where it was laid. The demo and the tests use it.
World coordinates are metres on a table of 2 x 2 m, x to the right, y up, origin at the table's centre.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from vidworld.config import digest, to_mapping
from vidworld.contract import Dimension
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

VERSION = 1
EMBODIMENT = EmbodimentSpec(
    embodiment="planar_arm",
    rate_hz=10.0,
    action=(
        Dimension("shoulder_velocity", "rad/s", "velocity"),
        Dimension("elbow_velocity", "rad/s", "velocity"),
        Dimension("brush", "1", "binary"),
    ),
    proprio=(
        Dimension("shoulder", "rad", "position"),
        Dimension("elbow", "rad", "position"),
        Dimension("tip_x", "m", "position"),
        Dimension("tip_y", "m", "position"),
    ),
    control_frame="joint",
)

BASE = np.array([0.0, -1.0])
LINKS = (0.85, 0.75)
LINK_RADII = (0.17, 0.14)
TIP_RADIUS = 0.17
DISC_RADIUS = 0.26
BRUSH_RADIUS = 0.1
SHOULDER_LIMITS = (0.25, np.pi - 0.25)
ELBOW_LIMITS = (-2.2, 2.2)
MAX_VELOCITY = 1.6

TABLE = np.array([226, 222, 212], dtype=np.float32)
LINK_COLOURS = np.array([[48, 62, 92], [86, 108, 150]], dtype=np.float32)
TIP_COLOUR = np.array([242, 158, 44], dtype=np.float32)
DISC_COLOUR = np.array([204, 62, 56], dtype=np.float32)
PAINT_COLOUR = np.array([22, 138, 128], dtype=np.float32)


@dataclass(frozen=True)
class PlanarConfig:
    """How long and how large the episodes are."""

    frames: int = 48
    size: int = 64
    """Width and height in pixels."""
    exploration: float = 0.5
    """Share of episodes that move by an Ornstein-Uhlenbeck process instead of reaching for the disc."""


@dataclass(frozen=True)
class Trajectory:
    """The simulated truth of one episode; T frames."""

    actions_T3: np.ndarray
    joints_T2: np.ndarray
    disc_T2: np.ndarray
    tip_T2: np.ndarray


def forward_kinematics(joints_2: np.ndarray) -> np.ndarray:
    """Elbow and tip positions [2, 2] in metres of joint angles in radians; the elbow angle is relative."""
    shoulder, elbow = joints_2
    elbow_xy = BASE + LINKS[0] * np.array([np.cos(shoulder), np.sin(shoulder)])
    total = shoulder + elbow
    return np.stack([elbow_xy, elbow_xy + LINKS[1] * np.array([np.cos(total), np.sin(total)])])


def simulate(seed: int, config: PlanarConfig = PlanarConfig()) -> Trajectory:
    """Run one episode; the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    joints = np.array([rng.uniform(0.9, np.pi - 0.9), rng.uniform(-1.6, 1.6)])
    disc = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.2, 0.7)])
    explores = rng.random() < config.exploration
    velocity, brush, goal = np.zeros(2), 0.0, disc.copy()
    rows = []
    for t in range(config.frames):
        tip = forward_kinematics(joints)[1]
        if t % 12 == 0:
            brush = float(rng.random() < 0.5)
            goal = disc + rng.normal(0, 0.25, 2) if rng.random() < 0.7 else rng.uniform(-0.8, 0.8, 2)
        if explores:
            velocity = 0.8 * velocity + rng.normal(0, 0.75, 2)
        else:
            velocity = _reach(joints, tip, goal) + rng.normal(0, 0.15, 2)
        velocity = np.clip(velocity, -MAX_VELOCITY, MAX_VELOCITY)
        bounded = _bounded(joints + velocity / EMBODIMENT.rate_hz)
        command = (bounded - joints) * EMBODIMENT.rate_hz
        rows.append((np.append(command, brush), joints.copy(), disc.copy(), tip))
        velocity = command
        joints, disc = advance(joints, disc, command)
    actions, angles, discs, tips = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return Trajectory(actions, angles, discs, tips)


def advance(
    joints_2: np.ndarray, disc_2: np.ndarray, velocity_2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One step of 1/rate seconds: joints integrate, the tip pushes the disc out of its way (quasi-static)."""
    substeps = 8
    for _ in range(substeps):
        joints_2 = _bounded(joints_2 + velocity_2 / EMBODIMENT.rate_hz / substeps)
        offset = disc_2 - forward_kinematics(joints_2)[1]
        distance = float(np.hypot(*offset))
        overlap = DISC_RADIUS + TIP_RADIUS - distance
        if overlap > 0:
            disc_2 = disc_2 + overlap * offset / max(distance, 1e-6)
            disc_2 = np.clip(disc_2, -1 + DISC_RADIUS, 1 - DISC_RADIUS)
    return joints_2, disc_2


def render(trajectory: Trajectory, size: int) -> Iterator[np.ndarray]:
    """Yield RGB frames [size, size, 3] uint8 with analytic antialiasing."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    paint = np.zeros((size, size), dtype=np.float32)
    edge = 2.0 / size
    for action, joints, disc, tip in zip(
        trajectory.actions_T3, trajectory.joints_T2, trajectory.disc_T2, trajectory.tip_T2, strict=True
    ):
        elbow, _ = forward_kinematics(joints)
        image = np.broadcast_to(TABLE, (size, size, 3)).copy()
        image = _blend(image, PAINT_COLOUR, paint)
        image = _blend(image, DISC_COLOUR, _cover(_capsule(x, y, disc, disc, DISC_RADIUS), edge))
        image = _blend(image, LINK_COLOURS[0], _cover(_capsule(x, y, BASE, elbow, LINK_RADII[0]), edge))
        image = _blend(image, LINK_COLOURS[1], _cover(_capsule(x, y, elbow, tip, LINK_RADII[1]), edge))
        image = _blend(image, TIP_COLOUR, _cover(_capsule(x, y, tip, tip, TIP_RADIUS), edge))
        yield np.rint(image).astype(np.uint8)
        # The stroke of this action shows from the next frame on, as a command takes frame t to t+1.
        if action[2] > 0.5:
            following, _ = advance(joints, disc, action[:2])
            end = forward_kinematics(following)[1]
            paint = np.maximum(paint, _cover(_capsule(x, y, tip, end, BRUSH_RADIUS), edge))


@dataclass(frozen=True)
class PlanarSource:
    """Simulated episodes behind the same door as robot logs; ids are `planar-<seed>`."""

    episodes: int
    seed: int = 0
    config: PlanarConfig = PlanarConfig()

    @property
    def name(self) -> str:
        """Name of the dataset that is made."""
        return "planar"

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """The one planar arm."""
        return (EMBODIMENT,)

    @property
    def views(self) -> tuple[str, ...]:
        """One camera that looks down on the table."""
        return ("top",)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return EMBODIMENT.rate_hz

    @property
    def fingerprint(self) -> str:
        """Digest of what determines the episodes; raise VERSION when the same seed shows something else."""
        return digest([VERSION, self.episodes, self.seed, to_mapping(self.config)])

    def episode_ids(self) -> list[str]:
        """Ids in order."""
        return [f"planar-{self.seed + index:06d}" for index in range(self.episodes)]

    def read(self, episode_id: str) -> Episode:
        """Simulate one episode; frames are rendered only when iterated."""
        if episode_id not in self.episode_ids():
            raise DataError("no such episode", where="the planar world", got=episode_id)
        seed = int(episode_id.removeprefix("planar-"))
        trajectory = simulate(seed, self.config)
        travel = float(np.hypot(*(trajectory.disc_T2[-1] - trajectory.disc_T2[0])))
        frames = self.config.frames
        return Episode(
            episode_id=episode_id,
            embodiment=EMBODIMENT.embodiment,
            fps=self.fps,
            views={"top": Video(frames, partial(render, trajectory, self.config.size))},
            actions_TA=trajectory.actions_T3.astype(np.float32),
            proprio_TS=np.concatenate([trajectory.joints_T2, trajectory.tip_T2], 1).astype(np.float32),
            timestamps_T=np.arange(frames) / self.fps,
            text="push the disc" if travel > 0.05 else "move over the table",
            outcome={"disc_travel_m": round(travel, 4)},
            source={"world": "planar", "seed": seed},
        )


def _reach(joints: np.ndarray, tip: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Damped least-squares joint velocity towards a point."""
    elbow = forward_kinematics(joints)[0]
    jacobian = np.stack([[-(tip - BASE)[1], (tip - BASE)[0]], [-(tip - elbow)[1], (tip - elbow)[0]]], axis=1)
    damped = jacobian @ jacobian.T + 0.05 * np.eye(2)
    return jacobian.T @ np.linalg.solve(damped, 3.0 * (goal - tip))


def _bounded(joints: np.ndarray) -> np.ndarray:
    return np.clip(joints, (SHOULDER_LIMITS[0], ELBOW_LIMITS[0]), (SHOULDER_LIMITS[1], ELBOW_LIMITS[1]))


def _capsule(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in metres to a segment thickened by `radius`, negative inside."""
    along = end - start
    length_squared = max(float(along @ along), 1e-9)
    share = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length_squared, 0, 1)
    return np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1]) - radius


def _cover(distance: np.ndarray, edge: float) -> np.ndarray:
    """Pixel coverage in [0, 1] of a shape by its signed distance."""
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def _blend(image: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return image + alpha[..., None] * (colour - image)
