"""Rigid objects on a table: pick and place, push, sweep. Nothing is hidden."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vidworld.lab.effect import FRAME_S, BaseEffect, Camera, Framing, Plan
from vidworld.lab.gl import mujoco
from vidworld.lab.kinematics import ArmPlanner, minimum_jerk, tool_down
from vidworld.lab.scene import Scene
from vidworld.lab.text import Rules, describe

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.79, 0.2, 0.16),
    "blue": (0.16, 0.33, 0.68),
    "green": (0.2, 0.55, 0.31),
    "yellow": (0.91, 0.73, 0.19),
    "purple": (0.47, 0.27, 0.6),
    "teal": (0.12, 0.55, 0.57),
}
SHAPES = ("cube", "cylinder", "ball", "brick")
LOW, HIGH = np.array((0.38, -0.21)), np.array((0.58, 0.21))
SPACING_M = 0.135
MISS_SHARE = 0.12
"""Share of picks that close beside the object: a model must see failures too."""
RULES: Rules = {
    "thing": ("the {colour} {shape}", "the {colour} {shape}", "a {colour} {shape}"),
    "takes": ("picks up", "grasps", "lifts", "takes"),
    "puts": ("puts it down elsewhere", "places it on the table", "sets it down", "moves it aside"),
    "pick": (
        "<arm> <takes> <thing>",
        "<arm><slowly> <takes> <thing> and <puts>",
        "pick up the {colour} {shape}",
        "pick and place the {colour} {shape}",
    ),
    "shoves": ("pushes", "shoves", "slides", "nudges"),
    "push": (
        "<arm> <shoves> <thing>",
        "<arm><slowly> <shoves> <thing> over the table",
        "push the {colour} {shape}",
        "slide the {colour} {shape} aside",
    ),
    "sweep": (
        "<arm> sweeps over the table",
        "sweep the objects aside",
        "<arm> brushes past the {colour} {shape}",
        "clear the table with one sweep",
    ),
}


class Rigid(BaseEffect):
    """Two to four objects; the first one is the target."""

    kind: ClassVar[str] = "rigid"
    # Near: objects are 14 to 22 of 128 pixels wide. A single camera has to see all that an arm explores.
    framing = Framing(
        target_3=(0.45, 0.0, 0.1),
        distance_m=(0.67, 0.75),
        elevation_deg=(27.0, 38.0),
        single_distance_m=0.928,
    )
    explore_low_3 = (0.36, -0.22, 0.02)
    explore_high_3 = (0.6, 0.22, 0.22)

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Shapes, colours, sizes (half width, m), places (m) and turns (rad)."""
        colours = rng.permutation(list(COLOURS))
        objects: list[dict[str, Any]] = []
        places: list[np.ndarray] = []
        for index in range(int(rng.integers(2, 5))):
            free = (
                place
                for place in (rng.uniform(LOW, HIGH) for _ in range(60))
                if all(np.linalg.norm(place - other) > SPACING_M for other in places)
            )
            place = next(free, None)
            if place is None:
                break
            places.append(place)
            objects.append(
                {
                    "shape": str(rng.choice(SHAPES)),
                    "colour": str(colours[index]),
                    "half_m": float(rng.uniform(0.027, 0.036)),
                    "x": float(place[0]),
                    "y": float(place[1]),
                    "yaw": float(rng.uniform(-0.7, 0.7)),
                }
            )
        return {"objects": objects, "task": str(rng.choice(("pick", "push", "sweep"), p=(0.5, 0.35, 0.15)))}

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """One free body an object."""
        kinds = mujoco.mjtGeom
        for index, item in enumerate(visible["objects"]):
            half = item["half_m"]
            height = _height(item)
            body = spec.worldbody.add_body(name=f"object{index}", pos=[item["x"], item["y"], height])
            body.quat = [np.cos(item["yaw"] / 2), 0, 0, np.sin(item["yaw"] / 2)]
            body.add_freejoint()
            shape, size = {
                "cube": (kinds.mjGEOM_BOX, [half, half, half]),
                "brick": (kinds.mjGEOM_BOX, [1.7 * half, 0.8 * half, height]),
                "cylinder": (kinds.mjGEOM_CYLINDER, [half, height, 0]),
                "ball": (kinds.mjGEOM_SPHERE, [half, 0, 0]),
            }[item["shape"]]
            geom = body.add_geom(name=f"object{index}", type=shape, size=size, density=500)
            geom.rgba = [*COLOURS[item["colour"]], 1]
            geom.friction, geom.condim = [0.7, 0.01, 0.0025], 6

    def plan(self, rng: np.random.Generator, arm: ArmPlanner, visible: Mapping[str, Any]) -> Plan | None:
        """Pick, push or sweep by waypoints of the tool."""
        task, target = visible["task"], visible["objects"][0]
        policy = f"script:{task}"
        if task == "pick":
            times, rows, yaw, missed = _pick(rng, visible)
            policy += "_miss" if missed else ""
        elif task == "push":
            times, rows, yaw = _push(rng, target)
        else:
            times, rows, yaw = _sweep(rng)
        text = describe(rng, task, RULES, {"colour": target["colour"], "shape": target["shape"]})
        return follow(arm, self.frames, times, rows, tool_down(yaw), text, policy)

    def reset(self, scene: Scene, visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """Objects stand where the model puts them."""
        self._scene = scene
        self._names = [f"object{index}" for index in range(len(visible["objects"]))]
        self._start_N3 = self._places()

    def _places(self) -> np.ndarray:
        return np.array([self._scene.data.body(name).xpos for name in self._names])

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """Each object and the arm."""
        seen, scene = self._scene.segment(), self._scene
        found = {name: seen == scene.model.geom(name).id for name in self._names}
        return found | {"arm": np.isin(seen, scene.arm_geoms)}

    def outcome(self) -> dict[str, float]:
        """Places in metres, and how far and how high the target was moved."""
        places_N3 = self._places()
        moved_3 = places_N3[0] - self._start_N3[0]
        values = {
            f"{name}_{axis}": float(value)
            for name, place in zip(self._names, places_N3, strict=True)
            for axis, value in zip("xyz", place, strict=True)
        }
        values["target_travel_m"] = float(np.hypot(moved_3[0], moved_3[1]))
        values["target_lift_m"] = float(moved_3[2])
        return values


def follow(
    arm: ArmPlanner,
    frames: int,
    times: list[float],
    rows_N4: list[list[float]],
    rotation_33: np.ndarray,
    text: str,
    policy: str,
) -> Plan | None:
    """Commands along waypoints (x, y, z in metres, gripper 0..1) at nominal times of a 64-frame episode.

    None when the arm cannot follow them.
    """
    pace = float(np.clip(frames / 64, 0.75, 1.6))
    at_T = np.arange(frames + 1) * FRAME_S
    path_T4 = minimum_jerk(np.array(times) * pace, np.array(rows_N4), at_T)
    targets_TJ = arm.path(path_T4[:, :3], rotation_33)
    if targets_TJ is None:
        return None
    return Plan(targets_TJ[1:], path_T4[1:, 3], targets_TJ[0], text, policy)


def _height(item: Mapping[str, Any]) -> float:
    """Half the height of an object in metres."""
    return item["half_m"] * {"cube": 1.0, "ball": 1.0, "brick": 0.9, "cylinder": 1.25}[item["shape"]]


def _pick(
    rng: np.random.Generator, visible: Mapping[str, Any]
) -> tuple[list[float], list[list[float]], float, bool]:
    target, others = visible["objects"][0], visible["objects"][1:]
    place = np.array((target["x"], target["y"]))
    missed = bool(rng.random() < MISS_SHARE)
    if missed:
        angle = rng.uniform(0, 2 * np.pi)
        place = place + rng.uniform(0.05, 0.075) * np.array((np.cos(angle), np.sin(angle)))
    # A brick is gripped over its short side; a cube or cylinder over whichever side is nearer.
    yaw = target["yaw"]
    drop = rng.uniform(LOW, HIGH)
    for _ in range(40):
        if all(np.hypot(drop[0] - o["x"], drop[1] - o["y"]) > SPACING_M for o in (target, *others)):
            break
        drop = rng.uniform(LOW, HIGH)
    low, carry = max(_height(target) * 0.9, 0.02), float(rng.uniform(0.15, 0.2))
    start = [rng.uniform(0.38, 0.5), rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.26)]
    times = [0.0, 1.1, 1.7, 2.1, 2.8, 3.6, 4.2, 4.5, 5.1]
    if rng.random() < 0.3:
        rows = [[*start, 1], [*place, 0.15, 1], [*place, low, 1], [*place, low, 0], [*place, carry, 0]]
        return times[:5], rows, yaw, missed
    rows = [
        [*start, 1],
        [*place, 0.15, 1],
        [*place, low, 1],
        [*place, low, 0],
        [*place, carry, 0],
        [*drop, carry, 0],
        [*drop, low + 0.008, 0],
        [*drop, low + 0.008, 1],
        [*drop, 0.17, 1],
    ]
    return times, rows, yaw, missed


def _push(
    rng: np.random.Generator, target: Mapping[str, Any]
) -> tuple[list[float], list[list[float]], float]:
    place, angle = np.array((target["x"], target["y"])), rng.uniform(0, 2 * np.pi)
    along = np.array((np.cos(angle), np.sin(angle)))
    aside = rng.uniform(-0.6, 0.6) * target["half_m"] * np.array((-along[1], along[0]))
    before = place + aside - along * (target["half_m"] * 1.8 + 0.045)
    after = place + aside + along * rng.uniform(0.03, 0.13)
    start = [rng.uniform(0.38, 0.5), rng.uniform(-0.15, 0.15), rng.uniform(0.18, 0.25)]
    low = float(rng.uniform(0.02, 0.03))
    rows = [
        [*start, 0],
        [*before, 0.15, 0],
        [*before, low, 0],
        [*after, low, 0],
        [*after, 0.16, 0],
        [*start, 0],
    ]
    return [0.0, 1.0, 1.6, 1.6 + rng.uniform(0.7, 1.6), 3.8, 5.1], rows, float(rng.uniform(-0.5, 0.5))


def _sweep(rng: np.random.Generator) -> tuple[list[float], list[list[float]], float]:
    side, low = float(rng.choice((-1, 1))), float(rng.uniform(0.02, 0.035))
    first = [rng.uniform(0.4, 0.52), -0.24 * side]
    last = [rng.uniform(0.4, 0.52), 0.22 * side]
    middle = [rng.uniform(0.42, 0.58), 0.0]
    rows = [[0.45, -0.1 * side, 0.22, 0], [*first, 0.15, 0], [*first, low, 0]]
    rows += [[*middle, low, 0], [*last, low, 0], [*last, 0.16, 0]]
    return [0.0, 0.9, 1.4, 2.5, 3.6, 4.4], rows, float(rng.uniform(-0.4, 0.4))
