"""An opaque box of hidden mass, friction and centre of mass: push, strike, topple, lift.

Nothing shows what is inside, so the outcome of the same commands is truly uncertain. The box is held still
until it is first touched and until then takes no part in the physics, so nothing hidden shows before.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vidworld.lab.effect import BaseEffect, Camera, Framing, Plan, between
from vidworld.lab.gl import mujoco
from vidworld.lab.kinematics import ArmPlanner, tool_down
from vidworld.lab.policy import random_motion
from vidworld.lab.rigid import follow
from vidworld.lab.scene import Scene
from vidworld.lab.text import Rules, describe
from vidworld.lab.textures import add_material, fractal_noise

TASKS = ("push", "strike", "topple", "lift")
MASS_KG = (0.2, 8.0)
FRICTION = (0.12, 0.9)
OFF_CENTRE = 0.65
"""Farthest centre of mass from the box's middle, as a share of its half sides."""
SOFTNESS, WEAKNESS = 0.08, 0.11
"""Shares of the servos' stiffness and torque: a strong arm would move any box the same way."""
CARTONS = ((0.72, 0.55, 0.37), (0.78, 0.64, 0.45), (0.6, 0.45, 0.31))
TAPES = ((0.87, 0.83, 0.7), (0.24, 0.38, 0.55), (0.62, 0.24, 0.2))
FREE, HELD = (1, 1), (8, 2)
"""contype and conaffinity: held, the box meets the arm (contype 2) and nothing else."""
RULES: Rules = {
    "box": ("the box", "the cardboard box", "a closed carton", "the carton", "the closed box"),
    "push": ("<arm> pushes <box>", "<arm><slowly> pushes <box> over the table", "push <box>", "slide <box>"),
    "strike": ("<arm> strikes <box>", "<arm> gives <box> a quick knock", "knock against <box>", "tap <box>"),
    "topple": (
        "<arm> pushes against the top of <box>",
        "push <box> high up",
        "<arm><slowly> leans on <box>",
        "press sideways against <box> near its top",
    ),
    "lift": (
        "<arm> grips <box> and raises its hand",
        "grasp <box> and lift",
        "<arm> reaches for <box> to lift",
    ),
}


class Container(BaseEffect):
    """One closed box."""

    kind: ClassVar[str] = "container"
    framing = Framing(target_3=(0.46, 0.0, 0.12), distance_m=(0.9, 1.02), elevation_deg=(20.0, 32.0))
    readout_noise: ClassVar[Mapping[str, float]] = {
        "box_x": 0.004,
        "box_y": 0.004,
        "box_z": 0.004,
        "box_yaw": 0.06,
        "box_tilt": 0.06,
    }
    angles: ClassVar[frozenset[str]] = frozenset({"box_yaw"})
    hidden_dims: ClassVar[int] = 5

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Task, half sides and place in metres, turn in rad, look of the carton."""
        task = str(rng.choice(TASKS))
        sides = {
            "push": ((0.045, 0.06), (0.045, 0.065), (0.04, 0.06)),
            "strike": ((0.04, 0.055), (0.04, 0.06), (0.035, 0.055)),
            "topple": ((0.038, 0.05), (0.036, 0.048), (0.1, 0.13)),
            "lift": ((0.036, 0.055), (0.03, 0.036), (0.045, 0.065)),
        }[task]
        return {
            "task": task,
            "half_m": [float(rng.uniform(*side)) for side in sides],
            "x": float(rng.uniform(0.43, 0.52)),
            "y": float(rng.uniform(-0.06, 0.06)),
            "yaw": float(rng.uniform(-0.3, 0.3)),
            "carton": int(rng.integers(len(CARTONS))),
            "tape": int(rng.integers(len(TAPES))),
            "texture_seed": int(rng.integers(2**31)),
        }

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Mass in kg (log-uniform), sliding friction, and the centre of mass in metres from the middle."""
        return self.hidden_at(rng.random(self.hidden_dims), visible)

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Centre of mass x, y, z, mass and friction, one after the other."""
        centre_3 = OFF_CENTRE * between(uniform_D[:3], -1, 1) * np.array(visible["half_m"])
        return {
            "mass_kg": float(np.exp(between(uniform_D[3], *np.log(MASS_KG)))),
            "friction": float(between(uniform_D[4], *FRICTION)),
            **{f"centre_{axis}_m": float(value) for axis, value in zip("xyz", centre_3, strict=True)},
        }

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """The box, with an off-centre inertia so that MuJoCo does not simplify it away."""
        add_material(spec, "carton", _carton(visible), specular=0.05)
        half = visible["half_m"]
        body = spec.worldbody.add_body(name="box", pos=[visible["x"], visible["y"], half[2]])
        body.quat = [np.cos(visible["yaw"] / 2), 0, 0, np.sin(visible["yaw"] / 2)]
        body.add_freejoint(name="box")
        body.explicitinertial, body.mass = True, 1.0
        body.ipos, body.iquat, body.inertia = [0.003, 0.002, 0.004], [1, 0, 0, 0], [0.01, 0.011, 0.012]
        geom = body.add_geom(
            name="box", type=mujoco.mjtGeom.mjGEOM_BOX, size=half, material="carton", mass=1.0
        )
        geom.friction, geom.condim, geom.priority = [0.5, 0.005, 0.0005], 4, 2
        geom.solref, geom.solimp = [0.008, 1], [0.99, 0.9999, 0.0005, 0.5, 2]

    def plan(self, rng: np.random.Generator, arm: ArmPlanner, visible: Mapping[str, Any]) -> Plan | None:
        """Waypoints of the visible task."""
        task = visible["task"]
        times, rows, yaw = _lift(rng, visible) if task == "lift" else _shove(rng, visible)
        text = describe(rng, task, RULES)
        return follow(arm, self.frames, times, rows, tool_down(yaw), text, f"script:{task}")

    def explore(self, rng: np.random.Generator, arm: ArmPlanner, visible: Mapping[str, Any]) -> Plan | None:
        """Random motion that seeks the box."""
        half = np.array(visible["half_m"])
        around = np.array((visible["x"], visible["y"], half[2])) + rng.normal(0, 1, (6, 3)) * half
        low, high = (0.36, -0.2, 0.03), (0.6, 0.2, 0.24)
        return random_motion(rng, arm, self.frames, low, high, np.clip(around, low, high))

    def reset(self, scene: Scene, visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """Give the box its contents and hold it."""
        self._scene, model = scene, scene.model
        self._body, self._geom = model.body("box").id, model.geom("box").id
        joint = model.joint("box")
        place, speed = int(joint.qposadr[0]), int(joint.dofadr[0])
        self._pose, self._speed = slice(place, place + 7), slice(speed, speed + 6)
        self._half_3 = np.array(visible["half_m"])
        _fill(model, self._body, self._geom, self._half_3, hidden)
        soften(model)
        self._start_7 = scene.model.qpos0[self._pose].copy()
        self._touched = False
        self._set_bits(HELD)
        self._hold()
        mujoco.mj_forward(model, scene.data)

    def substep(self, scene: Scene, dt: float) -> None:
        """Hold the box until the arm touches it."""
        if self._touched:
            return
        contacts = scene.data.contact.geom
        if len(contacts) and (contacts == self._geom).any():
            self._touched = True
            self._set_bits(FREE)
        else:
            self._hold()

    def _set_bits(self, bits: tuple[int, int]) -> None:
        self._scene.model.geom_contype[self._geom], self._scene.model.geom_conaffinity[self._geom] = bits

    def _hold(self) -> None:
        self._scene.data.qpos[self._pose] = self._start_7
        self._scene.data.qvel[self._speed] = 0.0

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """The box and the arm."""
        seen = self._scene.segment()
        return {"box": seen == self._geom, "arm": np.isin(seen, self._scene.arm_geoms)}

    def outcome(self) -> dict[str, float]:
        """Pose of the box: metres, radians; how far it went; whether it was touched, lies, is in the air.

        `box_yaw` is the turn about the vertical that is left when the tilt is taken away (swing and twist),
        so it stays well defined when the box lies on its side.
        """
        pose_7 = self._scene.data.qpos[self._pose]
        rotation_33 = np.zeros(9)
        mujoco.mju_quat2Mat(rotation_33, pose_7[3:])
        rotation_33 = rotation_33.reshape(3, 3)
        tilt = float(np.arccos(np.clip(rotation_33[2, 2], -1, 1)))
        corners_83 = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * self._half_3
        lowest = float((corners_83 @ rotation_33.T)[:, 2].min() + pose_7[2])
        moved_2 = pose_7[:2] - self._start_7[:2]
        twist = 2 * np.arctan2(pose_7[6], pose_7[3])
        return {
            "box_x": float(pose_7[0]),
            "box_y": float(pose_7[1]),
            "box_z": float(pose_7[2]),
            "box_yaw": float(np.arctan2(np.sin(twist), np.cos(twist))),
            "box_tilt": tilt,
            "box_travel_m": float(np.hypot(*moved_2)),
            "box_clearance_m": lowest,
            "toppled": float(tilt > 1.0),
            "touched": float(self._touched),
        }


def soften(model: Any) -> None:
    """Weaken the seven servos of a model to their share; the fingers to half."""
    from vidworld.lab.arm import DAMPING, GRIP, JOINTS, STIFFNESS, TORQUE

    count = len(JOINTS)
    model.actuator_gainprm[:count, 0] = SOFTNESS * np.array(STIFFNESS)
    model.actuator_biasprm[:count, 1] = -SOFTNESS * np.array(STIFFNESS)
    # The damping ratio is kept: it goes with the square root of the stiffness.
    model.actuator_biasprm[:count, 2] = -np.sqrt(SOFTNESS) * 0.25 * np.array(DAMPING)
    limit = WEAKNESS * np.array(TORQUE)[:, None] * np.array([-1.0, 1.0])
    model.actuator_forcerange[:count] = limit
    model.actuator_forcerange[count : count + 2] = 0.5 * GRIP[2] * np.array([-1.0, 1.0])


def _fill(model: Any, body: int, geom: int, half_3: np.ndarray, hidden: Mapping[str, float]) -> None:
    """Write hidden values into a compiled model: a solid block's inertia, less 20 % for its hollow."""
    mass = hidden["mass_kg"]
    square_3 = half_3**2
    model.body_mass[body] = mass
    model.body_inertia[body] = 0.8 * mass / 3 * (square_3.sum() - square_3)
    model.body_ipos[body] = [hidden[f"centre_{axis}_m"] for axis in "xyz"]
    model.geom_friction[geom, 0] = hidden["friction"]
    # The constants of the box follow its mass; those of the whole model (they set the solver's tolerance and
    # the camera's clip planes) must not, or pictures and proprioception would tell.
    extent, centre_3 = float(model.stat.extent), model.stat.center.copy()
    mujoco.mj_setConst(model, mujoco.MjData(model))
    model.stat.meaninertia, model.stat.meanmass = 1.0, 1.0
    model.stat.extent, model.stat.center[:] = extent, centre_3


def _carton(visible: Mapping[str, Any]) -> np.ndarray:
    """Cardboard with a strip of tape: uint8 [64, 64, 3]."""
    rng = np.random.default_rng(visible["texture_seed"])
    picture = np.array(CARTONS[visible["carton"]]) * (1 + 0.1 * fractal_noise(rng, 64)[..., None])
    picture[27:37] = np.array(TAPES[visible["tape"]]) * (1 + 0.03 * fractal_noise(rng, 64)[27:37, :, None])
    picture[:2], picture[-2:], picture[:, :2], picture[:, -2:] = (
        0.8 * np.array(CARTONS[visible["carton"]]),
    ) * 4
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _shove(
    rng: np.random.Generator, visible: Mapping[str, Any]
) -> tuple[list[float], list[list[float]], float]:
    """Push, strike or topple along one of the box's sides."""
    task, half = visible["task"], visible["half_m"]
    side = float(rng.choice((-1, 1)))
    angle = visible["yaw"] + side * np.pi / 2 + rng.uniform(-0.12, 0.12)
    along, across = np.array((np.cos(angle), np.sin(angle))), np.array((-np.sin(angle), np.cos(angle)))
    place = np.array((visible["x"], visible["y"])) + rng.uniform(-0.6, 0.6) * half[0] * across
    before = place - along * (half[1] + 0.07)
    low, reach, duration = {
        "push": (rng.uniform(0.6, 1.1) * half[2], rng.uniform(0.15, 0.24), rng.uniform(0.5, 1.0)),
        "strike": (rng.uniform(0.7, 1.2) * half[2], rng.uniform(0.1, 0.125), rng.uniform(0.32, 0.42)),
        "topple": (2 * half[2] * rng.uniform(0.72, 0.92), rng.uniform(0.11, 0.17), rng.uniform(0.7, 1.4)),
    }[task]
    low = max(low, 0.025)
    after = before + along * reach
    begin = 1.6
    high = max(low + 0.1, 0.16)
    start = [rng.uniform(0.4, 0.46), float(before[1]) * 0.8, high + rng.uniform(0.02, 0.06)]
    back = after - along * 0.07
    rows = [
        [*start, 0],
        [*before, high, 0],
        [*before, low, 0],
        [*before, low, 0],
        [*after, low, 0],
        [*after, low, 0],
        [*back, low + 0.03, 0],
        [*back, high, 0],
    ]
    end = begin + duration
    return [0.0, 0.9, 1.4, begin, end, end + 0.25, end + 0.6, end + 1.3], rows, float(rng.uniform(-0.3, 0.3))


def _lift(
    rng: np.random.Generator, visible: Mapping[str, Any]
) -> tuple[list[float], list[list[float]], float]:
    """Grip over the short side, not always in its middle, raise and carry."""
    half, yaw = visible["half_m"], visible["yaw"]
    shift = rng.uniform(-0.35, 0.35) * half[0]
    place = np.array((visible["x"], visible["y"])) + shift * np.array((np.cos(yaw), np.sin(yaw)))
    low = float(rng.uniform(1.2, 1.55) * half[2])
    high = low + float(rng.uniform(0.12, 0.17))
    aside = [float(place[0]), float(place[1] + rng.choice((-1, 1)) * rng.uniform(0.04, 0.1))]
    start = [rng.uniform(0.4, 0.48), rng.uniform(-0.1, 0.1), rng.uniform(0.2, 0.26)]
    rows = [
        [*start, 1],
        [*place, low + 0.1, 1],
        [*place, low, 1],
        [*place, low, 0],
        [*place, low, 0],
        [*place, high, 0],
        [*aside, high, 0],
    ]
    return [0.0, 1.0, 1.6, 1.9, 2.1, 3.2, 4.4], rows, yaw
