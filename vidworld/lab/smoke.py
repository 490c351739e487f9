"""Smoke: it rises from a pot and the arm stirs it with a paddle, or the arm waves a wand that gives it off
while the gripper squeezes it.

Hidden are the wind, the buoyancy of the smoke and the turbulence it is born with. None of them shows before
the smoke begins, a moment after the start: until then all frames are the same whatever is hidden.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vidworld.lab.arm import FINGERS
from vidworld.lab.effect import FRAME_S, PHYSICS_S, BaseEffect, Camera, Framing, Plan, between
from vidworld.lab.gl import mujoco
from vidworld.lab.kinematics import minimum_jerk, tool_down
from vidworld.lab.policy import random_motion
from vidworld.lab.smoke_flow import FlowConfig, SmokeFlow, Source
from vidworld.lab.smoke_pressure import Capsules
from vidworld.lab.smoke_render import SmokeLook, draw_smoke
from vidworld.lab.text import describe
from vidworld.lab.textures import add_lathe

if TYPE_CHECKING:
    from vidworld.lab.kinematics import ArmPlanner
    from vidworld.lab.scene import Scene

TONES: Mapping[str, tuple[float, float, float]] = {
    "white": (0.94, 0.94, 0.95),
    "grey": (0.38, 0.39, 0.42),
    "black": (0.09, 0.09, 0.1),
    "red": (0.8, 0.24, 0.17),
    "blue": (0.22, 0.4, 0.82),
    "yellow": (0.93, 0.72, 0.22),
}
SQUEEZED, RELEASED = 0.15, 0.9
"""Openings of the gripper at which the wand gives off all its smoke, and none."""
SEEN = 0.15
"""Opacity from which a pixel counts as smoke."""
POT_HEIGHT, POT_RADIUS, POT_MOUTH = 0.09, 0.062, 0.048
REACH = 0.1
"""From between the fingers to the middle of the paddle and the tip of the wand."""
SLATS, SLAT_RADIUS, SLAT_HALF = 5, 0.0125, 0.045
STYLES = ("sweep", "circle", "fan", "hold")

RULES = {
    "sweep": (
        "<arm> sweeps a paddle through the {tone} smoke",
        "<arm> <stirs> the {tone} smoke that rises from a pot",
        "sweep the paddle through the plume<slowly>",
        "a paddle cuts through a column of {tone} smoke",
    ),
    "circle": (
        "<arm> moves a paddle round the {tone} plume",
        "circle the {tone} smoke with the paddle",
        "<arm> <stirs> the {tone} smoke in circles",
    ),
    "fan": (
        "<arm> fans the {tone} smoke",
        "fan the smoke of the pot to the {side}",
        "<arm> waves a paddle beside a plume of {tone} smoke",
    ),
    "hold": (
        "<arm> holds a paddle over the smoking pot",
        "hold the paddle in the {tone} plume",
        "{tone} smoke flows round a paddle that <arm> holds",
    ),
    "wand": (
        "<arm> waves a wand that gives off {tone} smoke",
        "draw in the air with {tone} smoke",
        "a wand in the gripper trails {tone} smoke",
        "<arm> squeezes a wand that gives off {tone} smoke, and lets go",
        "<arm> moves a smoking wand<slowly>",
    ),
    "wander": (
        "<arm> <wanders> and {tone} smoke drifts",
        "random motion of the arm near {tone} smoke",
        "<arm> <wanders> in the smoke",
    ),
    "stirs": ("stirs", "mixes", "swirls"),
}


class SmokeEffect(BaseEffect):
    """A plume of smoke in front of the arm."""

    kind = "smoke"
    framing = Framing(
        target_3=(0.44, 0.0, 0.31),
        distance_m=(1.2, 1.3),
        azimuth_deg=(-44.0, 44.0),
        elevation_deg=(11.0, 24.0),
    )
    tool_offset_3 = (0.0, 0.0, REACH)
    substep_every = 10
    explore_low_3 = (0.36, -0.22, 0.17)
    explore_high_3 = (0.6, 0.22, 0.36)

    # Errors of neighbouring frames are alike, so these are larger than the error of one frame.
    readout_noise: ClassVar[Mapping[str, float]] = {
        "smoke_l": 2.0,
        "smoke_x": 0.06,
        "smoke_y": 0.06,
        "smoke_z": 0.06,
    }
    hidden_dims: ClassVar[int] = 3

    def __init__(self, config: FlowConfig | None = None) -> None:
        self.config = config or FlowConfig()

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """What gives off the smoke, where, how much of it, its colour, and when it begins."""
        return {
            "source": "pot" if rng.random() < 0.65 else "wand",
            "pot": [round(float(value), 4) for value in rng.uniform((0.43, -0.07), (0.53, 0.07))],
            "tone": str(rng.choice(tuple(TONES))),
            "rate": round(float(rng.uniform(9, 18)), 3),
            "begins_s": round(float(rng.uniform(0.16, 0.64)), 2),
        }

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """wind_x, wind_y in m/s; buoyancy in m/s^2; turbulence: the seed of the swirls at the source."""
        flow = self.hidden_at(rng.random(self.hidden_dims), visible)
        return {**flow, "turbulence": float(rng.integers(2**24))}

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Speed and heading of the wind, and buoyancy, one after the other."""
        speed, heading = between(uniform_D[0], 0.0, 0.32), between(uniform_D[1], 0, 2 * np.pi)
        return {
            "wind_x": float(speed * np.cos(heading)),
            "wind_y": float(speed * np.sin(heading)),
            "buoyancy": float(between(uniform_D[2], 1.4, 3.2)),
        }

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """A pot on the table and a paddle in the gripper, or only a wand in the gripper."""
        site = next(site for site in spec.sites if site.name == "tool")
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, np.array(site.quat))
        turn_33, geom = turn.reshape(3, 3), mujoco.mjtGeom
        still = {"contype": 0, "conaffinity": 0}

        def hold(kind: Any, size: list[float], at: tuple[float, float, float], rgb: tuple) -> None:
            place = np.array(site.pos) + turn_33 @ np.array(at)
            site.parent.add_geom(
                type=kind, size=size, pos=place, quat=site.quat, rgba=[*rgb, 1], mass=0.004, **still
            )

        hold(geom.mjGEOM_CAPSULE, [0.0075, 0.04, 0], (0, 0, 0.02), (0.5, 0.34, 0.2))
        if visible["source"] == "wand":
            hold(geom.mjGEOM_CAPSULE, [0.011, 0.024, 0], (0, 0, REACH - 0.035), (0.2, 0.21, 0.24))
            hold(geom.mjGEOM_CYLINDER, [0.016, 0.009, 0], (0, 0, REACH - 0.008), (0.92, 0.45, 0.12))
            return
        for across in np.linspace(-0.045, 0.045, SLATS):
            size = [SLAT_RADIUS, SLAT_HALF, 0.0]
            hold(geom.mjGEOM_CAPSULE, size, (float(across), 0.0, REACH), (0.16, 0.42, 0.46))
        mouth, tall = POT_MOUTH, POT_HEIGHT
        outside = [
            (0.0005, 0),
            (0.045, 0),
            (POT_RADIUS, 0.45 * tall),
            (mouth, 0.9 * tall),
            (mouth + 0.006, tall),
        ]
        inside = [(mouth - 0.004, tall), (mouth - 0.006, 0.75 * tall), (0.0005, 0.7 * tall)]
        add_lathe(spec, "pot", [*outside, *inside], segments=28)
        world, (x, y) = spec.worldbody, visible["pot"]
        world.add_geom(
            type=geom.mjGEOM_MESH, meshname="pot", pos=[x, y, 0], rgba=[0.6, 0.29, 0.18, 1], **still
        )
        ember = {"size": [mouth - 0.008, 0.002, 0], "pos": [x, y, 0.72 * tall], "rgba": [0.12, 0.08, 0.07, 1]}
        world.add_geom(type=geom.mjGEOM_CYLINDER, **ember, **still)

    def plan(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Sweep, circle, fan or hold a paddle about the plume, or wave the wand."""
        at_T = np.arange(self.frames + 1) * FRAME_S
        side = float(rng.choice((-1.0, 1.0)))
        if visible["source"] == "wand":
            style = "wand"
            positions_T3 = self._waves(rng, at_T)
        else:
            style = str(rng.choice(STYLES))
            positions_T3 = _about_plume(rng, style, np.array(visible["pot"]), side, at_T)
        yaw_T = minimum_jerk((0.0, at_T[-1]), rng.uniform(-0.5, 0.5, (2, 1)), at_T)[:, 0]
        targets_TJ = arm.path(positions_T3, np.array([tool_down(yaw) for yaw in yaw_T]))
        if targets_TJ is None:
            return None
        # Seen from the front of the arm, +y is to the right.
        slots = {"tone": visible["tone"], "side": "left" if side > 0 else "right"}
        text = describe(rng, style, RULES, slots)
        gripper_T = self._squeezes(rng) if style == "wand" else np.full(self.frames, SQUEEZED)
        return Plan(targets_TJ[1:], gripper_T, targets_TJ[0], text, f"script:{style}")

    def explore(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Ornstein-Uhlenbeck motion or random reaching, often through the plume."""
        heights = np.array([[*visible["pot"], z] for z in (0.2, 0.26, 0.32)])
        focus_N3 = heights if visible["source"] == "pot" else None
        plan = random_motion(rng, arm, self.frames, self.explore_low_3, self.explore_high_3, focus_N3)
        if plan is None:
            return None
        text = describe(rng, "wander", RULES, {"tone": visible["tone"]})
        wand = visible["source"] == "wand"
        gripper_T = self._squeezes(rng) if wand else np.full(self.frames, SQUEEZED)
        return Plan(plan.joint_targets_TJ, gripper_T, plan.start_J, text, plan.policy)

    def reset(self, scene: "Scene", visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """Clear air that moves with the wind."""
        self._visible, self._hidden = visible, dict(hidden)
        self._flow = SmokeFlow(self.config, int(hidden["turbulence"]))
        self._flow.u[:], self._flow.v[:] = hidden["wind_x"], hidden["wind_y"]
        self._swirls = np.random.default_rng((int(hidden["turbulence"]), 1))
        self._swirl_3 = np.zeros(3)
        self._look = SmokeLook(TONES[visible["tone"]])
        self._light_3 = scene.light_direction_3
        self._widest = sum(float(scene.model.joint(name).range[1]) for name in FINGERS)
        self._ends_N23 = self._solids(scene)[0]
        self._steps = 0
        self._opacity: np.ndarray | None = None

    def substep(self, scene: "Scene", dt: float) -> None:
        """Give off smoke and move the air, with the arm where it is now."""
        ends_N23, radius_N = self._solids(scene)
        solids = Capsules(ends_N23, radius_N, (ends_N23 - self._ends_N23) / dt)
        self._ends_N23 = ends_N23
        self._steps += 1
        keep = np.exp(-dt / 0.35)
        self._swirl_3 = keep * self._swirl_3 + 0.09 * np.sqrt(1 - keep**2) * self._swirls.standard_normal(3)
        source = None
        if self._steps * self.substep_every * PHYSICS_S > self._visible["begins_s"]:
            source = self._source(scene)
        wind_2 = (self._hidden["wind_x"], self._hidden["wind_y"])
        self._flow.step(dt, buoyancy=self._hidden["buoyancy"], wind_2=wind_2, source=source, solids=solids)

    def _source(self, scene: "Scene") -> Source | None:
        rate = self._visible["rate"]
        if self._visible["source"] == "pot":
            x, y = self._visible["pot"]
            place = np.array([x, y, POT_HEIGHT + 0.012])
            return Source(place, 0.046, rate, np.array([0.0, 0.0, 0.3]) + self._swirl_3)
        squeeze = (RELEASED - scene.opening() / self._widest) / (RELEASED - SQUEEZED)
        if squeeze <= 0.02:
            return None
        rate *= min(squeeze, 1.0)
        position_3, rotation_33 = scene.tool_pose()
        out_3 = rotation_33[:, 2]
        return Source(position_3 + 0.03 * out_3, 0.04, 2.0 * rate, 0.35 * out_3 + self._swirl_3)

    def _solids(self, scene: "Scene") -> tuple[np.ndarray, np.ndarray]:
        """The arm with what it holds, and the pot."""
        ends_N23, radius_N = scene.arm_capsules()
        if self._visible["source"] == "wand":
            return ends_N23, radius_N
        x, y = self._visible["pot"]
        pot = np.array([[[x, y, 0.02], [x, y, POT_HEIGHT - 0.05]]])
        return np.concatenate([ends_N23, pot]), np.append(radius_N, 0.045)

    def draw(self, rgb_HWC: np.ndarray, depth_HW: np.ndarray, camera: Camera) -> np.ndarray:
        """The smoke before, behind and around what was rendered, and its shadow."""
        picture, self._opacity = draw_smoke(
            rgb_HWC,
            depth_HW,
            self._flow.density,
            cell=self.config.cell,
            origin_3=np.asarray(self.config.origin),
            camera=camera,
            light_direction_3=self._light_3,
            look=self._look,
        )
        return picture

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """`smoke`: pixels that the smoke covers by 15 % or more."""
        if self._opacity is None:
            raise ValueError("masks are of the frame drawn last: call draw first")
        return {"smoke": self._opacity > SEEN}

    def outcome(self) -> dict[str, float]:
        """Smoke in the air and given off so far, in litres of density 1, and its centre of mass in metres."""
        x, y, z = self._flow.centroid_3
        return {
            "smoke_l": 1e3 * self._flow.mass,
            "emitted_l": 1e3 * self._flow.emitted,
            "smoke_x": float(x),
            "smoke_y": float(y),
            "smoke_z": float(z),
        }

    def _squeezes(self, rng: np.random.Generator) -> np.ndarray:
        """Opening of the gripper [T]: it squeezes the wand, and now and then lets go for a while."""
        goals: list[float] = []
        while len(goals) < self.frames:
            goals += [SQUEEZED] * int(rng.integers(14, 34)) + [RELEASED] * int(rng.integers(6, 14))
        opening, rows = SQUEEZED, []
        for goal in goals[: self.frames]:
            opening += float(np.clip(goal - opening, -0.25, 0.25))
            rows.append(opening)
        return np.array(rows)

    def _waves(self, rng: np.random.Generator, at_T: np.ndarray) -> np.ndarray:
        times, points = [0.0], [rng.uniform(self.explore_low_3, self.explore_high_3)]
        while times[-1] < at_T[-1]:
            point = rng.uniform(self.explore_low_3, self.explore_high_3)
            if abs(point[1] - points[-1][1]) < 0.1:
                point[1] = -np.sign(points[-1][1] + 1e-9) * rng.uniform(0.08, 0.2)
            times.append(times[-1] + float(np.linalg.norm(point - points[-1])) / rng.uniform(0.18, 0.4) + 0.1)
            points.append(point)
        return minimum_jerk(times, np.array(points), at_T)


def _about_plume(
    rng: np.random.Generator, style: str, pot_2: np.ndarray, side: float, at_T: np.ndarray
) -> np.ndarray:
    """Positions [T, 3] of the paddle; it begins beside the plume, on `side` (the sign of y)."""
    start = np.array([pot_2[0] + rng.uniform(-0.04, 0.04), pot_2[1] + side * rng.uniform(0.13, 0.18), 0.28])
    start[1] = np.clip(start[1], -0.23, 0.23)
    wait = rng.uniform(0.5, 1.1)
    times, points = [0.0, wait], [start, start + (0, 0, 1e-4)]
    centre = np.array([*pot_2, rng.uniform(0.21, 0.3)])
    if style == "circle":
        radius, period = rng.uniform(0.07, 0.11), rng.uniform(1.3, 2.4)
        phase_T = np.maximum(at_T - wait - 0.6, 0) * 2 * np.pi / period * side
        ring_T3 = np.stack([radius * np.sin(phase_T), side * radius * np.cos(phase_T), 0 * phase_T], axis=1)
        join_T3 = minimum_jerk((0.0, wait, wait + 0.6), np.stack([start, start, centre + ring_T3[0]]), at_T)
        return np.where((at_T < wait + 0.6)[:, None], join_T3, centre + ring_T3)
    turn = 0
    while times[-1] < at_T[-1]:
        jitter = rng.uniform((-0.035, -0.02, -0.04), (0.035, 0.02, 0.05))
        if style == "sweep":
            goal = centre + jitter + (0, -side * (-1) ** turn * rng.uniform(0.1, 0.15), 0)
        elif style == "fan":
            goal = centre + 0.5 * jitter + (0, side * (0.05 if turn % 2 == 0 else 0.13), 0)
        elif style == "hold":
            goal = centre + 0.4 * jitter + (0, 0, 0.02)
        else:
            raise ValueError(f"no way to stir smoke called {style!r}")
        goal[2] = np.clip(goal[2], 0.19, 0.36)
        slow = {"sweep": (0.2, 0.4), "fan": (0.14, 0.26), "hold": (0.05, 0.15)}[style]
        pause = rng.uniform(0.6, 1.2) if style == "hold" else 0.12
        times.append(times[-1] + pause + float(np.linalg.norm(goal - points[-1])) / rng.uniform(*slow))
        points.append(goal)
        turn += 1
    return minimum_jerk(times, np.array(points), at_T)
