"""What the arm does with a liquid: pour from a cup into a glass, stir a tray, or explore either."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vidworld.lab.effect import FRAME_S, Plan
from vidworld.lab.kinematics import ArmPlanner, minimum_jerk, tool_down
from vidworld.lab.policy import random_motion
from vidworld.lab.text import Rules, describe

GLASS_FLOOR = 0.006
"""Of the glass that stands on the table, m."""
TRAY_CENTRE = (0.5, 0.0, 0.012)
"""Middle of the tray's inner floor, m."""
PADDLE_DOWN = 0.088
"""From the tool to the middle of the paddle, m."""
PADDLE_HALF = (0.042, 0.006, 0.034)
MISS_SHARE = 0.18
"""Share of pours that aim beside the glass: a model must see failures too."""
HEADINGS = (-0.5, 0.5, -0.9, 0.9, -1.3, 1.3)
"""Directions of the tool that are tried, rad from +x."""
FULL_FRAMES = 64
"""Frames of a whole pour, at least."""
OPEN_M = 0.045
"""Half opening of the gripper that counts as fully open."""
RULES: Rules = {
    "cup": ("a cup", "the {cup}", "a {cup}", "the cup"),
    "glass": ("the glass", "a glass", "a glass on the table"),
    "pours": ("pours", "pours", "tips", "empties"),
    "pour": (
        "<arm> <pours> {liquid} from <cup> into <glass>",
        "pour {liquid} into <glass>",
        "<arm><slowly> <pours> <cup> of {liquid} into <glass>",
        "pour the {liquid} out of <cup>",
        "fill <glass> with {liquid}",
    ),
    "stirs": ("stirs", "pushes a paddle through", "makes waves in"),
    "stir": (
        "<arm> <stirs> a tray of {liquid}",
        "<arm><slowly> <stirs> {liquid} in a tray",
        "stir the {liquid}",
        "push a paddle through the {liquid}",
    ),
    "tilts": ("swings and tilts", "moves and tilts", "waves"),
    "wave_cup": ("<arm> <tilts> <cup> of {liquid}", "<arm> <tilts> <cup>", "random motion with <cup>"),
}


def cup_pose(
    tool_3: np.ndarray, tool_33: np.ndarray, visible: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Inner floor [3] and rotation [3, 3] (z along the cup's axis) of the cup that the tool holds."""
    flip = visible["flip"]
    rotation = np.stack([flip * tool_33[:, 1], tool_33[:, 2], flip * tool_33[:, 0]], axis=1)
    return tool_3 - 0.5 * visible["cup_height"] * rotation[:, 2], rotation


def tool_of_lip(
    lip_3: np.ndarray, tilt: float, heading: float, side: float, visible: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Tool pose that puts the cup's lip at a point, tilted `tilt` rad towards the side of the heading."""
    forward = np.array([np.cos(heading), np.sin(heading), 0.0])
    lateral = np.array([-forward[1], forward[0], 0.0]) * side
    axis = np.array([0, 0, np.cos(tilt)]) + np.sin(tilt) * lateral
    outward = np.cos(tilt) * lateral - np.array([0, 0, np.sin(tilt)])
    position = lip_3 - 0.5 * visible["cup_height"] * axis - visible["cup_radius"] * outward
    x = visible["flip"] * axis
    return position, np.stack([x, np.cross(forward, x), forward], axis=1)


def pour(rng: np.random.Generator, arm: ArmPlanner, frames: int, visible: Mapping[str, Any]) -> Plan | None:
    """Lift beside the glass, tip over it, come back; None if no heading of the tool reaches that."""
    miss = rng.random() < MISS_SHARE
    aim = rng.uniform(-0.03, -0.012) + (rng.choice((-1, 1)) * rng.uniform(0.05, 0.08) if miss else 0.0)
    along = rng.uniform(-0.008, 0.008)
    clear = visible["glass_height"] + GLASS_FLOOR + rng.uniform(0.045, 0.07)
    beside = visible["glass_radius"] + 0.03
    tilt = rng.uniform(1.55, 2.15)
    share = np.array([0.0, 0.15, 0.29, 0.29 + rng.uniform(0.13, 0.22), 0.66, 0.89, 1.0])
    away = beside + rng.uniform(0.02, 0.08)
    rows = np.array(
        [
            [-away, along, rng.uniform(0.13, 0.2), 0.0],
            [-beside, along, clear + 0.05, 0.0],
            [aim, along, clear + 0.015, 0.85],
            [aim, along, clear, tilt],
            [aim, along, clear + 0.005, tilt + 0.12],
            [-beside, along, clear + 0.05, 0.0],
            [-away, along, clear + 0.04, 0.0],
        ]
    )
    slots = {"liquid": visible["liquid"], "cup": "clear cup" if visible["clear"] else "mug"}
    text = describe(rng, "pour", RULES, slots)
    return _with_cup(rng, arm, frames, visible, share, rows, text, "script:pour")


def wave_cup(
    rng: np.random.Generator, arm: ArmPlanner, frames: int, visible: Mapping[str, Any]
) -> Plan | None:
    """Explore with a full cup: random places around the glass, random tilts."""
    count = int(rng.integers(5, 8))
    share = np.linspace(0, 1, count)
    rows = np.stack(
        [
            rng.uniform(-0.15, 0.02, count),
            rng.uniform(-0.05, 0.05, count),
            rng.uniform(0.17, 0.26, count) + 0.02,
            np.maximum(rng.uniform(-0.7, 1.9, count), 0.0),
        ],
        axis=1,
    )
    rows[0, 3] = 0.0
    slots = {"liquid": visible["liquid"], "cup": "clear cup" if visible["clear"] else "mug"}
    text = describe(rng, "wave_cup", RULES, slots)
    return _with_cup(rng, arm, frames, visible, share, rows, text, "explore:reach")


def _with_cup(
    rng: np.random.Generator,
    arm: ArmPlanner,
    frames: int,
    visible: Mapping[str, Any],
    share_N: np.ndarray,
    rows_N4: np.ndarray,
    text: str,
    policy: str,
) -> Plan | None:
    """Follow waypoints of the lip (aside and along from the glass, height; m) and tilt (rad)."""
    # A short episode shows the beginning of a pour: squeezed into less time, no arm could follow it.
    duration_s = max(frames, FULL_FRAMES) * FRAME_S
    path_T4 = minimum_jerk(share_N * duration_s, rows_N4, np.arange(frames + 1) * FRAME_S)
    glass = np.array([*visible["glass_xy"], 0.0])
    first = int(rng.integers(len(HEADINGS)))
    for heading in np.roll(HEADINGS, first):
        forward = np.array([np.cos(heading), np.sin(heading), 0.0])
        lateral = np.array([-forward[1], forward[0], 0.0]) * visible["side"]
        poses = [
            tool_of_lip(
                glass + aside * lateral + along * forward + np.array([0, 0, z]),
                tilt,
                heading,
                visible["side"],
                visible,
            )
            for aside, along, z, tilt in path_T4
        ]
        targets = arm.path(np.array([pose[0] for pose in poses]), np.array([pose[1] for pose in poses]))
        if targets is not None:
            grip = np.full(frames, (visible["cup_radius"] + visible["cup_wall"]) / OPEN_M)
            return Plan(targets[1:], grip, targets[0], text, policy)
    return None


def _stir_box(visible: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Box of the tool in which the paddle stays inside the tray."""
    reach = np.array([visible["tray_half"][0], visible["tray_half"][1]]) - PADDLE_HALF[0] - 0.016
    centre = np.array(TRAY_CENTRE)
    bottom = centre[2] + 0.006 + PADDLE_HALF[2] + PADDLE_DOWN
    low = np.array([centre[0] - reach[0], centre[1] - reach[1], bottom])
    return low, np.array([centre[0] + reach[0], centre[1] + reach[1], bottom + 0.01])


def stir(rng: np.random.Generator, arm: ArmPlanner, frames: int, visible: Mapping[str, Any]) -> Plan | None:
    """Dip the paddle and sweep it through the tray, at changing places and turns."""
    low, high = _stir_box(visible)
    times, rows = [0.0], [[*rng.uniform(low, high)[:2], low[2] + 0.1, rng.uniform(-0.4, 0.4)]]
    side = float(rng.choice((-1, 1)))
    while times[-1] < frames * FRAME_S:
        y = side * high[1] * rng.uniform(0.5, 1.0)
        rows.append([rng.uniform(low[0], high[0]), y, rng.uniform(low[2], high[2]), rng.uniform(-0.5, 0.5)])
        times.append(times[-1] + rng.uniform(0.55, 1.0))
        side = -side
    path_T4 = minimum_jerk(times, np.array(rows), np.arange(frames + 1) * FRAME_S)
    targets = arm.path(path_T4[:, :3], np.array([tool_down(yaw) for yaw in path_T4[:, 3]]))
    if targets is None:
        return None
    text = describe(rng, "stir", RULES, {"liquid": visible["liquid"]})
    return Plan(targets[1:], np.full(frames, 0.15), targets[0], text, "script:stir")


def wander_tray(
    rng: np.random.Generator, arm: ArmPlanner, frames: int, visible: Mapping[str, Any]
) -> Plan | None:
    """Explore with the paddle in and above the tray."""
    low, high = _stir_box(visible)
    plan = random_motion(rng, arm, frames, low, high + np.array([0, 0, 0.05]))
    if plan is None:
        return None
    return Plan(plan.joint_targets_TJ, np.full(frames, 0.15), plan.start_J, plan.text, plan.policy)
