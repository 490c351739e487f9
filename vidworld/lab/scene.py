"""The scene that every effect plays in: table, light, backdrop, camera, arm; physics steps and pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.errors import ConfigError, DataError
from vidworld.lab import textures
from vidworld.lab.arm import FINGERS, JOINTS, TOOL, home_of, load_arm
from vidworld.lab.effect import PHYSICS_S, STEPS, Camera, Effect, Framing
from vidworld.lab.gl import mujoco, offscreen
from vidworld.lab.kinematics import ArmPlanner

SIZES = (64, 128, 256)
WOOD, SLATE, STONE, DARK, SAGE = (
    (0.66, 0.5, 0.34),
    (0.44, 0.48, 0.53),
    (0.74, 0.72, 0.68),
    (0.36, 0.28, 0.22),
    (0.55, 0.6, 0.52),
)
TABLES = (
    ("planks", WOOD),
    ("mottled", SLATE),
    ("mottled", STONE),
    ("planks", DARK),
    ("tiles", STONE),
    ("tiles", SAGE),
)
BACKDROPS = (
    ((0.86, 0.87, 0.88), (0.6, 0.64, 0.69)),
    ((0.9, 0.86, 0.8), (0.68, 0.62, 0.55)),
    ((0.74, 0.81, 0.83), (0.47, 0.56, 0.6)),
    ((0.8, 0.83, 0.77), (0.53, 0.58, 0.5)),
    ((0.84, 0.8, 0.85), (0.58, 0.53, 0.61)),
)
CORE_TABLES, CORE_BACKDROPS = 3, 1
VARIETIES = ("one", "core", "full")
ONE: Mapping[str, Any] = {"light_azimuth_deg": 62.0, "table": 0, "backdrop": 0, "texture_seed": 0}


def sample_look(rng: np.random.Generator, framing: Framing, variety: str) -> dict[str, Any]:
    """Camera, light and surfaces of an episode as JSON values.

    `one` has one camera, table and light, which minutes on a laptop suffice for; `core` has four cameras and
    three tables, which a small model learns first; `full` draws all freely.
    """

    def between(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 4)

    if variety not in VARIETIES:
        raise ConfigError("variety", got=variety, expected=" or ".join(VARIETIES))
    core = variety != "full"
    camera = int(rng.integers(4))
    if variety == "one":
        camera = 2
    low, high = framing.azimuth_deg
    azimuth = low + (high - low) * (0.05, 0.35, 0.65, 0.95)[camera] if core else between(low, high)
    low, high = framing.elevation_deg
    elevation = low + (high - low) * (0.7, 0.25, 0.55, 0.4)[camera] if core else between(low, high)
    low, high = framing.distance_m
    distance = low + (high - low) * 0.4 if core else between(low, high)
    if variety == "one" and framing.single_distance_m is not None:
        distance = framing.single_distance_m
    look = {
        "azimuth_deg": float(azimuth),
        "elevation_deg": float(elevation),
        "distance_m": float(distance),
        "light_azimuth_deg": between(50, 75) * float(rng.choice((-1, 1))),
        "light_elevation_deg": 62.0 if core else between(50, 72),
        "light": 0.62 if core else between(0.52, 0.7),
        "table": int(rng.integers(CORE_TABLES if core else len(TABLES))),
        "backdrop": int(rng.integers(CORE_BACKDROPS if core else len(BACKDROPS))),
        "texture_seed": int(rng.integers(4 if core else 2**31)),
    }
    # All is drawn in any case, so that a seed sets up the same things on the table of `one` and of `core`.
    return {**look, **ONE} if variety == "one" else look


def camera_of(look: Mapping[str, Any], framing: Framing, size: int) -> Camera:
    """The pinhole camera that a look describes."""
    azimuth, elevation = np.radians(look["azimuth_deg"]), np.radians(look["elevation_deg"])
    back = np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    rotation_33 = np.stack([right, np.cross(back, right), back], axis=1)
    position_3 = np.array(framing.target_3) + look["distance_m"] * back
    return Camera(position_3, rotation_33, framing.fovy_deg, size)


def planner(robot: Path | None, tool_offset_3: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ArmPlanner:
    """Kinematics of the arm alone."""
    spec = load_arm(robot)
    return ArmPlanner(spec.compile(), JOINTS, home_of(spec, robot), tool_offset_3)


class Scene:
    """A compiled episode: MuJoCo's model and data, the camera, and the pictures it takes.

    `size` is the side of the output in pixels; pictures are drawn at twice that.
    """

    def __init__(
        self,
        effect: Effect,
        look: Mapping[str, Any],
        visible: Mapping[str, Any],
        size: int,
        robot: Path | None = None,
    ) -> None:
        if size not in SIZES:
            raise ConfigError("size", got=size, expected=" or ".join(map(str, SIZES)))
        self.size, self._look = size, look
        self.camera = camera_of(look, effect.framing, size)
        self.spec = load_arm(robot)
        arm_bodies = {body.name for body in self.spec.bodies} - {"world"}
        self.light_direction_3 = _dress(self.spec, look, self.camera)
        effect.build(self.spec, visible)
        self.model = self.spec.compile()
        self.data = mujoco.MjData(self.model)
        self._tool_offset_3 = np.asarray(effect.tool_offset_3, float)
        model = self.model
        joints = [model.joint(name).id for name in JOINTS]
        fingers = [model.joint(name).id for name in FINGERS]
        self._arm_qpos, self._arm_dof = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self._finger_qpos, self._finger_dof = model.jnt_qposadr[fingers], model.jnt_dofadr[fingers]
        self._opening_2 = model.jnt_range[fingers, 1]
        self._tool = model.site(TOOL).id
        bodies = [model.body(name).id for name in sorted(arm_bodies) if name]
        self.arm_geoms = np.flatnonzero(np.isin(model.geom_bodyid, bodies))
        self._arm_segments()
        self._target_J = np.zeros(len(JOINTS))
        self._gripper = 0.0
        self._pictures: _Pictures | None = None

    # Physics

    def start(self, joints_J: np.ndarray, gripper: float) -> None:
        """Back to the first state: the arm rests in a posture, its fingers `gripper` (0..1) open."""
        mujoco.mj_resetData(self.model, self.data)
        self._target_J, self._gripper = np.array(joints_J, float), float(gripper)
        self.data.qpos[self._arm_qpos] = joints_J
        self.data.qpos[self._finger_qpos] = gripper * self._opening_2
        self._command(self._target_J, self._gripper)
        mujoco.mj_forward(self.model, self.data)

    def step_frame(
        self, target_J: np.ndarray, gripper: float, each: Callable[[float], None], every: int = 1
    ) -> None:
        """Advance one frame towards joint targets, set linearly; `each(dt)` after every `every` steps.

        Raises DataError when the physics diverges.
        """
        before = self._target_J
        for step in range(1, STEPS + 1):
            self._command(before + (target_J - before) * (step / STEPS), gripper)
            mujoco.mj_step(self.model, self.data)
            if step % every == 0:
                each(every * PHYSICS_S)
        self._target_J, self._gripper = np.array(target_J, float), float(gripper)
        if (
            self.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number
            or not np.isfinite(self.data.qpos).all()
        ):
            raise DataError("the physics diverged", where=f"{self.data.time:.2f} s of an episode")

    def _command(self, joints_J: np.ndarray, gripper: float) -> None:
        self.data.ctrl[: len(JOINTS)] = joints_J
        self.data.ctrl[len(JOINTS) : len(JOINTS) + 2] = gripper * self._opening_2

    def apply_wrench(self, body: str, force_3: np.ndarray, torque_3: np.ndarray) -> None:
        """Push a body at its centre of mass: newtons and newton metres, world frame, until changed."""
        index = self.model.body(body).id
        self.data.xfrc_applied[index, :3] = force_3
        self.data.xfrc_applied[index, 3:] = torque_3

    # What is where

    def tool_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] in metres and rotation [3, 3] of the tool centre point."""
        rotation_33 = self.data.site_xmat[self._tool].reshape(3, 3).copy()
        return self.data.site_xpos[self._tool] + rotation_33 @ self._tool_offset_3, rotation_33

    def joints(self) -> tuple[np.ndarray, np.ndarray]:
        """Angles [7] in rad and velocities [7] in rad/s."""
        return self.data.qpos[self._arm_qpos].copy(), self.data.qvel[self._arm_dof].copy()

    def opening(self) -> float:
        """Distance between the fingers in metres."""
        return float(self.data.qpos[self._finger_qpos].sum())

    def joint_torques(self) -> np.ndarray:
        """Torques [7] of the servos in N m."""
        return self.data.actuator_force[: len(JOINTS)].copy()

    def arm_touches(self) -> bool:
        """Whether the arm is in contact with anything but itself."""
        return bool(np.isin(self.data.contact.geom, self.arm_geoms).any())

    def arm_capsules(self) -> tuple[np.ndarray, np.ndarray]:
        """The arm and what it holds fast, as capsules: ends [N, 2, 3] and radii [N], metres, world frame."""
        rotation_N33 = self.data.geom_xmat[self.arm_geoms].reshape(-1, 3, 3)
        ends_N23 = np.einsum("nij,nkj->nki", rotation_N33, self._ends_N23)
        return ends_N23 + self.data.geom_xpos[self.arm_geoms][:, None], self._radius_N

    def _arm_segments(self) -> None:
        """A capsule in each arm geom's own frame: along its longest side, as thick as its second longest."""
        boxes = self.model.geom_aabb[self.arm_geoms]
        self._ends_N23, self._radius_N = np.zeros((len(boxes), 2, 3)), np.zeros(len(boxes))
        for index, (centre, half) in enumerate(zip(boxes[:, :3], boxes[:, 3:], strict=True)):
            order = np.argsort(half)
            radius = float(half[order[1]])
            reach = np.zeros(3)
            reach[order[2]] = max(float(half[order[2]]) - radius, 0.0)
            self._ends_N23[index] = centre - reach, centre + reach
            self._radius_N[index] = radius

    # Pictures

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours [2S, 2S, 3] uint8 and depths [2S, 2S] float32 in metres along the view axis."""
        return self._opened().colours()

    def segment(self) -> np.ndarray:
        """Geom under each pixel [S, S] int32, -1 for none."""
        return self._opened().geoms()

    def upload_texture(self, name: str) -> None:
        """Send a texture that was changed in `model.tex_data` to the renderer, if there is one yet."""
        if self._pictures is not None:
            self._pictures.activate()
            index = self.model.texture(name).id
            mujoco.mjr_uploadTexture(self.model, self._pictures.context, index)

    def _opened(self) -> "_Pictures":
        if self._pictures is None:
            self._pictures = _Pictures(self.model, self.data, self.size)
        return self._pictures

    def close(self) -> None:
        """Free what the renderer holds; the physics can still be used."""
        if self._pictures is not None:
            self._pictures.close()
            self._pictures = None


class _Pictures:
    """MuJoCo's renderer for one model."""

    def __init__(self, model: Any, data: Any, size: int) -> None:
        self.window = offscreen(2 * size)
        self.window.make_current()
        self.model, self.data, self.size = model, data, size
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self.scene = mujoco.MjvScene(model, maxgeom=2000)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[3] = 0
        self.option.sitegroup[:] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.type, self.camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera("camera").id

    def activate(self) -> None:
        """Make this renderer the current one: another scene may have drawn since."""
        self.window.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)

    def close(self) -> None:
        self.window.make_current()
        self.context.free()

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        rgb, buffer = self._draw(2 * self.size)
        near, far = (
            clip * self.model.stat.extent for clip in (self.model.vis.map.znear, self.model.vis.map.zfar)
        )
        return rgb, near * far / (far - buffer * (far - near))

    def geoms(self) -> np.ndarray:
        flags = (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR)
        for flag in flags:
            self.scene.flags[flag] = 1
        shadows = self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW]
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        rgb, _ = self._draw(self.size)
        for flag in flags:
            self.scene.flags[flag] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        codes = rgb.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        lookup = np.full(int(codes.max()) + 2, -1, np.int32)
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid + 1 < len(lookup):
                lookup[geom.segid + 1] = geom.objid
        return lookup[codes]

    def _draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        rgb, buffer = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.float32)
        area = mujoco.MjrRect(0, 0, size, size)
        category = mujoco.mjtCatBit.mjCAT_ALL
        self.activate()
        mujoco.mjv_updateScene(self.model, self.data, self.option, None, self.camera, category, self.scene)
        mujoco.mjr_render(area, self.scene, self.context)
        mujoco.mjr_readPixels(rgb, buffer, area, self.context)
        return rgb[::-1].copy(), buffer[::-1].copy()


def halve(picture_HWC: np.ndarray) -> np.ndarray:
    """Box-filter a uint8 picture [2S, 2S, 3] to [S, S, 3], rounding to nearest."""
    wide = picture_HWC.astype(np.uint16)
    total = wide[0::2, 0::2] + wide[1::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def _dress(spec: Any, look: Mapping[str, Any], camera: Camera) -> np.ndarray:
    """Add table, backdrop, light and camera; returns the direction of the light."""
    spec.option.timestep = PHYSICS_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10
    visual = spec.visual
    visual.quality.shadowsize, visual.quality.offsamples = 768, 0
    # Rounds are drawn coarser than by default: at these sizes it shows only in the time it takes.
    visual.quality.numslices, visual.quality.numstacks, visual.quality.numquads = 18, 10, 1
    visual.global_.offwidth = visual.global_.offheight = 2 * camera.size
    visual.map.znear, visual.map.zfar, visual.map.shadowclip = 0.02, 8, 1.6
    spec.stat.extent, spec.stat.center = 1.0, [0.35, 0, 0.25]
    visual.headlight.ambient, visual.headlight.diffuse = [0.36] * 3, [0.16] * 3
    visual.headlight.specular = [0] * 3

    elevation, azimuth = np.radians(look["light_elevation_deg"]), np.radians(look["light_azimuth_deg"])
    toward = np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    light = spec.worldbody.add_light(pos=np.array([0.35, 0, 0.25]) + 2.0 * toward, dir=-toward)
    light.type, light.castshadow = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, True
    light.diffuse, light.specular, light.ambient = [look["light"]] * 3, [0.3] * 3, [0] * 3

    rng = np.random.default_rng(look["texture_seed"])
    style, colour = TABLES[look["table"]]
    if style == "planks":
        picture = textures.planks(rng, 256, colour)
    elif style == "tiles":
        picture = textures.tiles(rng, 256, colour)
    else:
        picture = textures.mottled(rng, 256, colour, 0.1)
    textures.add_material(spec, "table", picture, repeat=(2, 2))
    spec.worldbody.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[0.85, 0.95, 0.03],
        pos=[0.3, 0, -0.03],
        material="table",
        friction=[0.6, 0.005, 0.0001],
    )
    sky = spec.add_texture(name="backdrop", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=64, height=384)
    sky.builtin = mujoco.mjtBuiltin.mjBUILTIN_GRADIENT
    sky.rgb1, sky.rgb2 = (list(colour) for colour in BACKDROPS[look["backdrop"]])
    right, up = camera.rotation_33[:, 0], camera.rotation_33[:, 1]
    spec.worldbody.add_camera(
        name="camera", pos=camera.position_3, xyaxes=[*right, *up], fovy=camera.fovy_deg
    )
    return -toward
