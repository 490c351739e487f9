"""A liquid that the arm pours or stirs: FLIP particles, a ray-marched surface, and a wrench back on the arm.

Two set-ups: a clear or opaque cup over a glass, and a paddle in a tray. In an opaque cup the fill level and
the viscosity are hidden; until it first tilts, nothing that a camera or the arm's joints show depends on
them: the liquid is not drawn and does not weigh on the arm. From then on both. Needs MuJoCo and Numba.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vidworld.errors import ConfigError
from vidworld.lab import liquid_plan as plans
from vidworld.lab.effect import BaseEffect, Camera, Framing, Plan, between
from vidworld.lab.flip import PER_AXIS, Flip, FlipConfig, lattice
from vidworld.lab.flip_solids import Shape, solid
from vidworld.lab.gl import mujoco
from vidworld.lab.kinematics import ArmPlanner
from vidworld.lab.liquid_plan import GLASS_FLOOR, PADDLE_DOWN, PADDLE_HALF, TRAY_CENTRE
from vidworld.lab.liquid_render import LIQUIDS, Surface, draw_liquid, surface_of
from vidworld.lab.scene import Scene
from vidworld.lab.textures import add_lathe

CELL = {"pour": 0.0066, "stir": 0.012}
"""Grid cells, m."""
GLASS_WALL, TRAY_WALL, TRAY_HEIGHT, CUP_FLOOR = 0.004, 0.008, 0.065, 0.004
TILT_RAD = 0.12
"""Tilt at which a pour begins."""
FILL = (0.3, 0.62)
SETTLE = 12
"""Steps with the arm at rest before the first frame."""
SMOOTHING = 0.35
"""Share of a new wrench in the one that is applied: the pressure of single steps is noisy."""
DRAWN_M = 0.12
"""Drops that land further than this from both vessels are simulated and counted, not drawn."""
MUGS = ((0.82, 0.33, 0.24), (0.2, 0.42, 0.55), (0.88, 0.74, 0.36), (0.36, 0.52, 0.38), (0.9, 0.89, 0.86))
TRAYS = ((0.86, 0.86, 0.84), (0.29, 0.33, 0.38), (0.62, 0.71, 0.72), (0.74, 0.63, 0.5))


class LiquidEffect(BaseEffect):
    """Pour or stir; `visible["task"]` says which."""

    kind: ClassVar[str] = "liquid"
    framing = Framing(
        target_3=(0.5, 0.0, 0.115),
        distance_m=(0.66, 0.76),
        azimuth_deg=(-38.0, 38.0),
        elevation_deg=(19.0, 31.0),
    )
    substep_every = 4
    readout_noise: ClassVar[Mapping[str, float]] = {"fill": 0.02, "spilled_ml": 4.0}
    hidden_dims: ClassVar[int] = 3

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Task, liquid, vessels (m); the fill and viscosity too where a camera can see them."""
        task = str(rng.choice(("pour", "pour", "stir")))
        visible: dict[str, Any] = {"task": task, "liquid": str(rng.choice(list(LIQUIDS)))}
        clear = bool(rng.random() < 0.5)
        side = int(rng.choice((-1, 1)))
        visible |= {
            "clear": clear,
            "side": side,
            "flip": -1,
            "cup_radius": float(rng.uniform(0.034, 0.038)),
            "cup_height": float(rng.uniform(0.095, 0.115)),
            "cup_wall": 0.004,
            "glass_radius": float(rng.uniform(0.042, 0.052)),
            "glass_height": float(rng.uniform(0.075, 0.1)),
            "glass_xy": [float(rng.uniform(0.5, 0.55)), side * float(rng.uniform(0.03, 0.06))],
            "mug": int(rng.integers(len(MUGS))),
            "tray": int(rng.integers(len(TRAYS))),
            "tray_half": [0.012 * int(rng.integers(9, 11)), 0.012 * int(rng.integers(12, 15))],
            "tray_fill": 0.006 * int(rng.integers(5, 8)),
        }
        if task == "stir" or clear:
            visible |= self.hidden_at(rng.random(self.hidden_dims), visible)
        return visible

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """fill: share of the cup's height; log10_viscosity: of m^2/s. Only an opaque cup hides them."""
        return {} if "fill" in visible else self.hidden_at(rng.random(self.hidden_dims), visible)

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Mostly thin as water, at times up to syrup: which of the two, how viscous, and the fill."""
        thin = uniform_D[0] < 0.6
        exponent = between(uniform_D[1], *((-6.0, -5.0) if thin else (-4.5, -2.8)))
        return {"fill": float(between(uniform_D[2], *FILL)), "log10_viscosity": float(exponent)}

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """The mug or the paddle in the gripper, and the tray; clear vessels are drawn with the liquid."""
        site = next((site for site in spec.sites if site.name == "tool"), None)
        if site is None:
            raise ConfigError("no site named tool", where="the arm")
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, np.asarray(site.quat, float))
        origin, turn_33 = np.asarray(site.pos, float), turn.reshape(3, 3)
        if visible["task"] == "pour":
            if not visible["clear"]:
                _add_mug(spec, site.parent, origin, turn_33, visible)
            return
        _add_paddle(site.parent, origin, turn_33)
        _add_tray(spec, visible)

    def plan(self, rng: np.random.Generator, arm: ArmPlanner, visible: Mapping[str, Any]) -> Plan | None:
        """Pour or stir."""
        script = plans.pour if visible["task"] == "pour" else plans.stir
        return script(rng, arm, self.frames, visible)

    def explore(self, rng: np.random.Generator, arm: ArmPlanner, visible: Mapping[str, Any]) -> Plan | None:
        """Tilt the cup at random, or move the paddle at random."""
        script = plans.wave_cup if visible["task"] == "pour" else plans.wander_tray
        return script(rng, arm, self.frames, visible)

    def reset(self, scene: Scene, visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """Fill the cup or the tray and let it come to rest."""
        self._visible, self._light_3 = visible, scene.light_direction_3
        self._hides = "fill" not in visible
        self._started = not self._hides
        self._seen: np.ndarray | None = None
        self._wrench = np.zeros(6)
        self._body = scene.model.body(scene.model.site_bodyid[scene.model.site("tool").id]).name
        self._held: np.ndarray | None = None
        self._solids = self._place(scene, 0.0)
        values = {**visible, **hidden}
        task = visible["task"]
        config = FlipConfig(cell=CELL[task], viscosity=10.0 ** values["log10_viscosity"])
        seed = np.random.default_rng([int(1e6 * values["fill"]), int(1e6 * visible["cup_radius"])])
        if task == "pour":
            self._flip = Flip([0.2, -0.42, 0], [0.8, 0.42, 0.5], self._cupful(values["fill"], seed), config)
        else:
            self._flip = self._trayful(visible, config, seed)
        for _ in range(SETTLE):
            self._flip.step(0.008, self._solids)
        self._flip.v_N3[:] = 0

    def _cupful(self, fill: float, rng: np.random.Generator) -> np.ndarray:
        radius, height = self._visible["cup_radius"], fill * self._visible["cup_height"]
        cell = CELL["pour"]
        x = lattice([-radius, -radius, 0], [radius, radius, height], cell, rng)
        x = x[np.hypot(x[:, 0], x[:, 1]) < radius - 0.05 * cell]
        cup = self._solids[0]
        return cup[1:4] + x @ cup[4:13].reshape(3, 3).T

    def _trayful(self, visible: Mapping[str, Any], config: FlipConfig, rng: np.random.Generator) -> Flip:
        a, b = visible["tray_half"]
        centre, edge = np.array(TRAY_CENTRE), 4 * config.cell
        x = centre + lattice([-a, -b, 0], [a, b, visible["tray_fill"]], config.cell, rng)
        low, high = centre - [a + edge, b + edge, centre[2]], centre + [a + edge, b + edge, 0.2]
        flip = Flip(low, high, x, config)
        clear = flip.distance_to_solids(self._solids) > 0
        return Flip(low, high, x[clear], config)

    def _place(self, scene: Scene, dt: float) -> np.ndarray:
        """Rows of the solids at the arm's pose; what the arm holds comes first."""
        visible = self._visible
        tool_3, tool_33 = scene.tool_pose()
        if visible["task"] == "pour":
            position, rotation = plans.cup_pose(tool_3, tool_33, visible)
            sizes = [visible["cup_radius"], visible["cup_height"], CUP_FLOOR, visible["cup_wall"]]
            held = solid(Shape.CUP, position, rotation, sizes, self._held, dt)
            place = [*visible["glass_xy"], GLASS_FLOOR]
            sizes = [visible["glass_radius"], visible["glass_height"], GLASS_FLOOR, GLASS_WALL]
            still = solid(Shape.CUP, place, np.eye(3), sizes)
            if rotation[2, 2] < np.cos(TILT_RAD):
                self._started = True
        else:
            held = solid(
                Shape.BOX, tool_3 + PADDLE_DOWN * tool_33[:, 2], tool_33, PADDLE_HALF, self._held, dt
            )
            sizes = [*visible["tray_half"], TRAY_HEIGHT, TRAY_WALL]
            still = solid(Shape.TRAY, TRAY_CENTRE, np.eye(3), sizes)
        self._held = held
        return np.stack([held, still])

    def substep(self, scene: Scene, dt: float) -> None:
        """Move the liquid with the solids and push back on the arm."""
        self._solids = self._place(scene, dt)
        self._flip.step(dt, self._solids)
        wrench = self._flip.impulse_S6[0] / dt
        self._wrench += SMOOTHING * (wrench - self._wrench)
        if self._started:
            index = scene.model.body(self._body).id
            arm = self._solids[0, 1:4] - scene.data.xipos[index]
            force = self._wrench[:3]
            scene.apply_wrench(self._body, force, self._wrench[3:] + np.cross(arm, force))

    def draw(self, rgb_HWC: np.ndarray, depth_HW: np.ndarray, camera: Camera) -> np.ndarray:
        """Liquid and clear vessels over the frame."""
        visible = self._visible
        surface: Surface | None = None
        if self._started:
            drawn = self._near_vessels()
            surface = surface_of(drawn, CELL[visible["task"]] / PER_AXIS) if len(drawn) else None
        glasses = []
        if visible["task"] == "pour":
            glasses = [self._solids[1]] + ([self._solids[0]] if visible["clear"] else [])
        liquid = LIQUIDS[visible["liquid"]]
        picture, self._seen = draw_liquid(rgb_HWC, depth_HW, camera, surface, liquid, self._light_3, glasses)
        return picture

    def _near_vessels(self) -> np.ndarray:
        """Particles to draw: a few far drops would make the surface's grid several times larger."""
        x = self._flip.x_N3
        if self._visible["task"] == "stir":
            return x
        near = np.zeros(len(x), bool)
        for row in self._solids:
            near |= np.abs(x[:, :2] - row[1:3]).max(1) < DRAWN_M
        return x[near]

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """Where liquid is what one sees."""
        if self._seen is None:
            return {"liquid": np.zeros((camera.size, camera.size), bool)}
        blocks = self._seen.reshape(camera.size, 2, camera.size, 2)
        return {"liquid": blocks.sum((1, 3)) >= 2}

    def outcome(self) -> dict[str, float]:
        """fill: of the glass (or tray), by volume; volumes in ml; kinetic energy in mJ.

        Spilled is what is in neither vessel and has come down to the table.
        """
        x = self._flip.x_N3.astype(np.float64)
        ml = 1e6 * self._flip.mass / self._flip.config.density
        held, still = self._solids
        local = x - still[1:4]
        if self._visible["task"] == "pour":
            within = (
                (np.hypot(local[:, 0], local[:, 1]) < still[19])
                & (local[:, 2] > 0)
                & (local[:, 2] < still[20])
            )
            capacity = np.pi * still[19] ** 2 * still[20]
            cup = (x - held[1:4]) @ held[4:13].reshape(3, 3)
            in_cup = (np.hypot(cup[:, 0], cup[:, 1]) < held[19]) & (cup[:, 2] > 0) & (cup[:, 2] < held[20])
        else:
            within = (np.abs(local[:, 0]) < still[19]) & (np.abs(local[:, 1]) < still[20]) & (local[:, 2] > 0)
            capacity = 4 * still[19] * still[20] * still[21]
            in_cup = np.zeros(len(x), bool)
        lost = ~within & ~in_cup & (x[:, 2] < 0.02)
        kinetic = 0.5 * self._flip.mass * float(np.square(self._flip.v_N3, dtype=np.float64).sum())
        return {
            "fill": float(within.sum() * ml * 1e-6 / capacity),
            "received_ml": float(within.sum() * ml),
            "cup_ml": float(in_cup.sum() * ml),
            "spilled_ml": float(lost.sum() * ml),
            "kinetic_mj": 1e3 * kinetic,
        }


def _add_mug(
    spec: Any, hand: Any, origin_3: np.ndarray, turn_33: np.ndarray, visible: Mapping[str, Any]
) -> None:
    radius, height, wall = visible["cup_radius"], visible["cup_height"], visible["cup_wall"]
    outer = radius + wall
    profile = [
        (5e-4, -CUP_FLOOR),
        (outer, -CUP_FLOOR),
        (outer, height),
        (radius, height),
        (radius, 0),
        (5e-4, 0),
    ]
    add_lathe(spec, "mug", profile, 40)
    position, rotation = plans.cup_pose(origin_3, turn_33, visible)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(rotation).ravel())
    _visual(
        hand, type=mujoco.mjtGeom.mjGEOM_MESH, meshname="mug", pos=position, quat=quat,
        rgba=[*MUGS[visible["mug"]], 1],
    )  # fmt: skip


def _add_paddle(hand: Any, origin_3: np.ndarray, turn_33: np.ndarray) -> None:
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(turn_33).ravel())
    shaft, blade = origin_3 + 0.03 * turn_33[:, 2], origin_3 + PADDLE_DOWN * turn_33[:, 2]
    _visual(
        hand, type=mujoco.mjtGeom.mjGEOM_CAPSULE, size=[0.0065, 0.05, 0], pos=shaft, quat=quat,
        rgba=[0.55, 0.4, 0.26, 1],
    )  # fmt: skip
    _visual(
        hand, type=mujoco.mjtGeom.mjGEOM_BOX, size=list(PADDLE_HALF), pos=blade, quat=quat,
        rgba=[0.86, 0.36, 0.22, 1],
    )  # fmt: skip


def _add_tray(spec: Any, visible: Mapping[str, Any]) -> None:
    a, b = visible["tray_half"]
    x, y, floor = TRAY_CENTRE
    half, thick = TRAY_WALL / 2, floor / 2
    middle = floor / 2 + TRAY_HEIGHT / 2
    upright = TRAY_HEIGHT / 2 + thick
    walls = [
        ((x, y, thick), (a + 2 * half, b + 2 * half, thick)),
        ((x + a + half, y, middle), (half, b + 2 * half, upright)),
        ((x - a - half, y, middle), (half, b + 2 * half, upright)),
        ((x, y + b + half, middle), (a, half, upright)),
        ((x, y - b - half, middle), (a, half, upright)),
    ]
    for position, size in walls:
        _visual(
            spec.worldbody, type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=size,
            rgba=[*TRAYS[visible["tray"]], 1],
        )  # fmt: skip


def _visual(body: Any, **attributes: Any) -> None:
    body.add_geom(contype=0, conaffinity=0, mass=0.01, **attributes)
