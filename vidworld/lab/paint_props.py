"""What stands around a canvas: its frame and light, buckets of paint, a brush in the gripper."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vidworld.lab.gl import mujoco
from vidworld.lab.paint_canvas import PAINTS, PaintConfig, weave
from vidworld.lab.paint_route import Easel
from vidworld.lab.textures import add_lathe, add_material

BUCKET_RADIUS, BUCKET_HEIGHT, PAINT_LEVEL = 0.052, 0.085, 0.066
BRUSH_LENGTH = 0.125
"""From between the fingers to the tip of the bristles."""
HAIR = (0.72, 0.6, 0.42)
GROUNDS = ((0.93, 0.92, 0.89), (0.93, 0.89, 0.8), (0.85, 0.88, 0.9))
FILL_LIGHT = 0.56
"""Of a light from the side of the room that an upright canvas faces."""


def easel_of(visible: Mapping[str, Any]) -> Easel:
    values = visible["easel"]
    return Easel(tuple(values["centre_3"]), values["width"], values["lean_deg"], values["yaw_deg"])


def ground_of(visible: Mapping[str, Any], config: PaintConfig) -> np.ndarray:
    """The bare canvas [N, N, 3] in [0, 1]."""
    threads = weave(config.texels, np.random.default_rng(visible["texture_seed"]))
    return np.array(GROUNDS[visible["ground"]]) * (1 - 0.06 * threads[..., None])


def add_canvas(spec: Any, visible: Mapping[str, Any], easel: Easel, ground: np.ndarray) -> None:
    """A textured plane, the wooden frame behind it, what holds it, and a light that fills it."""
    picture = np.rint(255 * np.clip(ground, 0, 1)).astype(np.uint8)
    add_material(spec, "canvas", picture, specular=0.05, shininess=0.1)
    u, v, w = easel.axes_33.T
    half, centre = easel.width / 2, np.array(easel.centre_3)
    world, geom = spec.worldbody, mujoco.mjtGeom
    still = {"contype": 0, "conaffinity": 0}
    world.add_geom(
        type=geom.mjGEOM_PLANE,
        size=[half, half, 0.01],
        pos=centre,
        xyaxes=[*u, *-v],
        material="canvas",
        **still,
    )
    wood = [0.5, 0.36, 0.22, 1]
    rim = half + 0.014
    world.add_geom(
        type=geom.mjGEOM_BOX,
        size=[rim, rim, 0.01],
        pos=centre + 0.0125 * w,
        xyaxes=[*u, *-v],
        rgba=wood,
        **still,
    )
    foot = centre + rim * v + 0.02 * w
    for side in (-0.6, 0.6):
        post = centre + side * half * u + 0.035 * w
        if visible["surface"] == "table":
            tall = float(post[2] - 0.3 * half * v[2]) / 2
            place = [post[0], post[1] + 0.3 * half, max(tall - 0.02, 0.01)]
            world.add_geom(type=geom.mjGEOM_BOX, size=[0.02, 0.04, place[2]], pos=place, rgba=wood, **still)
        else:
            top = centre - rim * v + side * half * u + 0.035 * w
            bottom = np.array([top[0], foot[1] + side * half * u[1] + 0.05, 0.0])
            world.add_geom(
                type=geom.mjGEOM_CAPSULE, size=[0.012, 0, 0], fromto=[*top, *bottom], rgba=wood, **still
            )
    # The canvas is bright whether the main light comes from before it or from behind.
    lit = max([0.0, *(float(np.array(light.dir) @ w) for light in spec.lights)])
    toward = -0.42 * u - 0.1 * v - 0.9 * w
    light = world.add_light(pos=centre + 2 * toward, dir=-toward)
    light.type, light.castshadow = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, False
    light.diffuse, light.specular, light.ambient = [max(0.0, FILL_LIGHT - 0.7 * lit)] * 3, [0.1] * 3, [0] * 3


def add_buckets(spec: Any, visible: Mapping[str, Any]) -> None:
    """Open buckets, each full of one paint and with a band of its colour."""
    base, top = 0.82 * BUCKET_RADIUS, BUCKET_RADIUS
    inner = [(0.92 * top, BUCKET_HEIGHT), (0.9 * base, 0.008), (0.0005, 0.008)]
    add_lathe(spec, "bucket", [(0.0005, 0), (base, 0), (top, BUCKET_HEIGHT), *inner], segments=24)
    geom, still = mujoco.mjtGeom, {"contype": 0, "conaffinity": 0}
    for name, (x, y) in zip(visible["paints"], visible["buckets"], strict=True):
        colour = [*PAINTS[name], 1]
        spec.worldbody.add_geom(
            type=geom.mjGEOM_MESH, meshname="bucket", pos=[x, y, 0], rgba=[0.78, 0.79, 0.8, 1], **still
        )
        for radius, half, z in ((0.89 * top, 0.002, PAINT_LEVEL), (0.965 * top, 0.014, 0.042)):
            spec.worldbody.add_geom(
                type=geom.mjGEOM_CYLINDER, size=[radius, half, 0], pos=[x, y, z], rgba=colour, **still
            )


def add_brush(spec: Any, visible: Mapping[str, Any]) -> None:
    """A flat brush whose handle is between the fingers."""
    site = next(site for site in spec.sites if site.name == "tool")
    place, turn = np.array(site.pos), np.zeros(9)
    mujoco.mju_quat2Mat(turn, np.array(site.quat))
    along = turn.reshape(3, 3)[:, 2]
    wide, geom = visible["brush_half_width"], mujoco.mjtGeom
    parts = (
        ("handle", geom.mjGEOM_CAPSULE, [0.008, 0.045, 0], 0.02, (0.72, 0.42, 0.2)),
        ("ferrule", geom.mjGEOM_BOX, [wide, 0.008, 0.013], BRUSH_LENGTH - 0.055, (0.66, 0.67, 0.7)),
        ("bristles", geom.mjGEOM_BOX, [0.95 * wide, 0.0075, 0.021], BRUSH_LENGTH - 0.021, HAIR),
    )
    for name, kind, size, offset, colour in parts:
        site.parent.add_geom(
            name=name,
            type=kind,
            size=size,
            pos=place + offset * along,
            quat=site.quat,
            rgba=[*colour, 1],
            contype=0,
            conaffinity=0,
            mass=0.01,
        )
