"""Paint: a brush is dipped in a bucket and dragged over a canvas that stands, leans or lies.

Hidden are how much the brush takes up, how fast it runs dry and how thin the paint is: none of them shows
before the brush touches the canvas. The canvas is a texture that `paint_canvas` draws; MuJoCo lights it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vidworld.lab.effect import FRAME_S, BaseEffect, Camera, Framing, Plan, between
from vidworld.lab.paint_canvas import PAINTS, Brush, Canvas, PaintConfig, mixed_colour
from vidworld.lab.paint_props import (
    BRUSH_LENGTH,
    BUCKET_RADIUS,
    GROUNDS,
    HAIR,
    PAINT_LEVEL,
    add_brush,
    add_buckets,
    add_canvas,
    easel_of,
    ground_of,
)
from vidworld.lab.paint_route import STYLES, Easel, Route, scribble, stroke_line
from vidworld.lab.text import describe

if TYPE_CHECKING:
    from vidworld.lab.kinematics import ArmPlanner
    from vidworld.lab.scene import Scene

DIP_Z = 0.042
"""Height of the tip in a bucket."""
DIP_FRAMES = 36
"""Time that a dip and a short stroke take."""
GRIPPER = (0.18, 0.24)
"""Openings of the gripper around the handle."""
SHOWN_DEPTH = 0.006
"""A pixel shows the canvas when what was drawn there is no nearer than this, metres."""

RULES = {
    "dip": (
        "<arm> dips <brush> in the {paint} paint and <paints> <mark> on the {surface}",
        "dip <brush> in {paint} and <paint> <mark> on the {surface}",
        "<paint> <mark> in {paint} on the {surface}",
        "<arm> <paints><slowly> with {paint} paint",
    ),
    "loaded": (
        "<arm> <paints> <mark> in {paint} on the {surface}",
        "<paint> the {surface} with {paint} paint",
        "a brush full of {paint} paint is dragged over the {surface}",
    ),
    "mix": (
        "<arm> <paints> in {first}, then dips <brush> in {paint} and paints over it",
        "<paint> in {first} and then in {paint} on the {surface}",
        "<paint> the {surface} in {first} and {paint}",
    ),
    "scribble": (
        "<arm> <scribbles> with a brush on the {surface}",
        "random strokes of a brush on the {surface}",
        "<arm> <scribbles> in {paint}",
    ),
    "brush": ("the brush", "a brush", "its brush", "a wide brush"),
    "paint": ("paint", "brush", "draw"),
    "paints": ("paints", "brushes", "draws"),
    "mark": ("a streak", "{mark}", "{mark}", "strokes"),
    "scribbles": ("scribbles", "dabs and wanders", "moves at random"),
}
MARKS = {
    "line": "a line",
    "across": "a stroke from top to bottom",
    "zigzag": "a zigzag",
    "wave": "a wave",
    "loop": "a ring",
    "fill": "a filled patch",
}
WORDS = {
    "wall": ("wall", "canvas", "panel"),
    "easel": ("canvas", "easel", "picture"),
    "table": ("canvas", "board", "canvas on the table"),
}


class PaintEffect(BaseEffect):
    """A brush in the gripper, buckets on the table, a canvas to the left of the arm."""

    kind = "paint"
    framing = Framing(
        target_3=(0.42, 0.11, 0.165),
        distance_m=(1.0, 1.08),
        azimuth_deg=(-74.0, -34.0),
        elevation_deg=(20.0, 34.0),
    )
    tool_offset_3 = (0.0, 0.0, BRUSH_LENGTH)
    substep_every = 2
    readout_noise: ClassVar[Mapping[str, float]] = {"coverage": 0.004, "lowest_m": 0.004}
    hidden_dims: ClassVar[int] = 3

    def __init__(self, config: PaintConfig | None = None) -> None:
        self.config = config or PaintConfig()

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Canvas, buckets, brush, and the paint that the brush holds at the start (-1: it is clean)."""
        surface = str(rng.choice(("wall", "easel", "table")))
        width, lean, centre = {
            "wall": (0.42, rng.uniform(0, 6), (rng.uniform(0.42, 0.5), rng.uniform(0.33, 0.37), 0.29)),
            "easel": (0.42, rng.uniform(18, 32), (rng.uniform(0.42, 0.5), rng.uniform(0.3, 0.34), 0.25)),
            "table": (0.38, rng.uniform(76, 88), (rng.uniform(0.44, 0.5), rng.uniform(0.15, 0.19), 0.07)),
        }[surface]
        names = [str(name) for name in rng.permutation([name for name in PAINTS if name != "white"])]
        paints = names[: int(rng.integers(2, 4))]
        front = -0.17 if surface == "table" else -0.1
        places = np.linspace(0.32, 0.32 + 0.15 * (len(paints) - 1), len(paints)) + rng.uniform(0, 0.06)
        return {
            "surface": surface,
            "easel": {
                "centre_3": [round(float(value), 4) for value in centre],
                "width": width,
                "lean_deg": round(float(lean), 3),
                "yaw_deg": round(float(rng.uniform(-10, 10)), 3),
            },
            "paints": paints,
            "buckets": [
                [round(float(x), 4), round(front + float(rng.uniform(-0.03, 0.03)), 4)] for x in places
            ],
            "brush_half_width": round(float(rng.uniform(0.026, 0.036)), 4),
            "loaded": int(rng.integers(len(paints))) if rng.random() < 0.4 else -1,
            "ground": int(rng.integers(len(GROUNDS))),
            "texture_seed": int(rng.integers(2**31)),
        }

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """load_ml: what a full brush holds; depletion_m: see `Canvas.stroke`; viscosity in Pa s."""
        return self.hidden_at(rng.random(self.hidden_dims), visible)

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Load, depletion and viscosity, one after the other."""
        return {
            "load_ml": float(between(uniform_D[0], 1.2, 5.5)),
            "depletion_m": float(np.exp(between(uniform_D[1], np.log(0.12), np.log(0.5)))),
            "viscosity": float(np.exp(between(uniform_D[2], np.log(0.02), np.log(0.4)))),
        }

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """Canvas with its frame, buckets of paint, and a brush in the gripper."""
        easel = easel_of(visible)
        add_canvas(spec, visible, easel, ground_of(visible, self.config))
        add_buckets(spec, visible)
        add_brush(spec, visible)

    def plan(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Strokes with the paint that is loaded, then dips and strokes for as long as there is time."""
        easel, paints = easel_of(visible), visible["paints"]
        loaded = visible["loaded"]
        used: list[int] = []
        style = str(rng.choice(STYLES))
        if loaded >= 0:
            used.append(loaded)
            route = Route(easel, self._near(rng, easel), 1.0)
            # A quick stroke leaves time to fetch a second colour and to drag it through the first.
            crosses = bool(rng.random() < 0.6)
            style = "line" if crosses else style
            self._paint(rng, route, style, hurry=crosses)
        else:
            route = Route(
                easel, (rng.uniform(0.35, 0.5), rng.uniform(-0.1, 0.05), rng.uniform(0.2, 0.28)), 0.0
            )
        while not used or len(route) < self.frames - 12:
            mark = style if not used else "across" if used == [loaded] else str(rng.choice(STYLES))
            if not used or self.frames - len(route) > DIP_FRAMES:
                others = [paint for paint in range(len(paints)) if paint not in used[-1:]]
                used.append(int(rng.choice(others)))
                route.dip(visible["buckets"][used[-1]], DIP_Z)
            self._paint(rng, route, mark, hurry=len(used) > 1)
        symbol = "mix" if len(used) > 1 else "loaded" if loaded >= 0 else "dip"
        slots = {
            "paint": paints[used[-1]],
            "first": paints[used[0]],
            "surface": str(rng.choice(WORDS[visible["surface"]])),
            "mark": MARKS[style],
        }
        return self._planned(rng, arm, route, describe(rng, symbol, RULES, slots), "script:paint")

    def explore(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Noise about the canvas, or reaches to random points on it and off it; often after a dip."""
        easel, paints = easel_of(visible), visible["paints"]
        loaded = visible["loaded"]
        if loaded < 0:
            loaded = int(rng.integers(len(paints)))
            route = Route(easel, (rng.uniform(0.35, 0.5), rng.uniform(-0.1, 0.05), 0.24), 0.0)
            if rng.random() < 0.75:
                route.dip(visible["buckets"][loaded], DIP_Z)
        else:
            route = Route(easel, self._near(rng, easel), 1.0)
        noisy = bool(rng.random() < 0.5)
        if noisy:
            noise_T3 = scribble(rng, easel, self.frames)
            route.along(noise_T3[:1], 9, 1.0)
            route.rows += list(np.concatenate([noise_T3, np.ones((len(noise_T3), 1))], axis=1))
        while len(route) < self.frames + 1:
            u, v = rng.uniform(0.1, 0.9, 2) * easel.width
            depth = rng.uniform(0.001, 0.009) if rng.random() < 0.75 else rng.uniform(-0.08, -0.02)
            goal = easel.world(np.array([[u, v, depth]]))
            distance = float(np.linalg.norm(route.rows[-1][:3] - goal[0])) + 0.2 * (1 - route.rows[-1][3])
            route.along(goal, 4 + round(distance / rng.uniform(0.02, 0.05)), 1.0)
        slots = {"paint": paints[loaded], "surface": str(rng.choice(WORDS[visible["surface"]]))}
        policy = "explore:noise" if noisy else "explore:reach"
        return self._planned(rng, arm, route, describe(rng, "scribble", RULES, slots), policy)

    def _near(self, rng: np.random.Generator, easel: Easel) -> np.ndarray:
        u, v = rng.uniform(0.3, 0.7, 2) * easel.width
        return easel.world(np.array([[u, v, -rng.uniform(0.06, 0.1)]]))[0]

    def _paint(self, rng: np.random.Generator, route: Route, style: str, *, hurry: bool = False) -> None:
        """One stroke; one in twenty hovers before the canvas and leaves nothing."""
        press = -0.004 if rng.random() < 1 / 20 else rng.uniform(0.004, 0.011)
        route.stroke(
            stroke_line(rng, style, route.easel.width),
            press,
            rng.uniform(0.45, 0.6) if hurry else rng.uniform(0.24, 0.5),
        )

    def _planned(
        self, rng: np.random.Generator, arm: "ArmPlanner", route: Route, text: str, policy: str
    ) -> Plan | None:
        for roll in rng.permutation([0.0, 0.5 * np.pi, np.pi, -0.5 * np.pi]):
            targets_TJ = arm.path(*route.poses(self.frames, roll + rng.uniform(-0.25, 0.25)))
            if targets_TJ is not None:
                gripper_T = np.full(self.frames, rng.uniform(*GRIPPER))
                return Plan(targets_TJ[1:], gripper_T, targets_TJ[0], text, policy)
        return None

    def reset(self, scene: "Scene", visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """A bare canvas, and a brush that is clean or loaded."""
        self.easel, self._hidden, self._visible = easel_of(visible), dict(hidden), visible
        paints = visible["paints"]
        self.canvas = Canvas(
            self.easel.width, ground_of(visible, self.config), paints, visible["texture_seed"], self.config
        )
        self.brush = Brush(
            visible["brush_half_width"], 0.006, len(paints), self.config.bristles, visible["texture_seed"]
        )
        self._wet_ml, self._tips = 0.0, None
        self._in_bucket = False
        self._clock = 0.0
        self._seen: np.ndarray | None = None
        self._geom = scene.model.geom("bristles").id
        texture = scene.model.texture("canvas").id
        start, texels = scene.model.tex_adr[texture], self.config.texels
        self._pixels = scene.model.tex_data[start : start + 3 * texels**2].reshape(texels, texels, 3)
        if visible["loaded"] >= 0:
            self._dip(visible["loaded"])
        self._show(scene)

    def _dip(self, paint: int) -> None:
        self.brush.dip(paint, self._hidden["load_ml"])
        self._wet_ml = float(self.brush.volume_P.sum())

    def substep(self, scene: "Scene", dt: float) -> None:
        """Dip, drag and drip."""
        position_3, rotation_33 = scene.tool_pose()
        away = [np.hypot(*(position_3[:2] - bucket)) for bucket in self._visible["buckets"]]
        nearest = int(np.argmin(away))
        inside = away[nearest] < BUCKET_RADIUS and position_3[2] < PAINT_LEVEL
        if inside and not self._in_bucket:
            self._dip(nearest)
        self._in_bucket = inside
        tips = self.easel.local(self.brush.tips(position_3, rotation_33))
        # Hairs bend along the stroke only when the brush meets the canvas with its tip.
        faces = rotation_33[:, 2] @ self.easel.axes_33[:, 2] > 0.5
        if self._tips is not None and faces and self.brush.load_KP.any():
            self.canvas.stroke(self.brush, self._tips, tips, self._hidden["depletion_m"])
        self._tips = tips if faces else None
        self._clock += dt
        if self._clock >= FRAME_S - 1e-9:
            self._clock = 0.0
            self.canvas.drip(FRAME_S, self._hidden["viscosity"], self.easel.slope)
            self._show(scene)

    def _show(self, scene: "Scene") -> None:
        """Put the canvas and the colour of the bristles before the renderer."""
        self._pixels[:] = self.canvas.shade(np.array([-0.42, -0.5, 0.76]))
        scene.upload_texture("canvas")
        hair, wet = np.array(HAIR), 0.0
        if self._wet_ml > 0:
            wet = 0.35 + 0.65 * float(self.brush.volume_P.sum()) / self._wet_ml
            hair = hair + wet * (mixed_colour(self.brush.volume_P, self.canvas.reflectance_P3) - hair)
        scene.model.geom_rgba[self._geom, :3] = np.round(hair, 3)

    def draw(self, rgb_HWC: np.ndarray, depth_HW: np.ndarray, camera: Camera) -> np.ndarray:
        """MuJoCo drew it all; only where the canvas is seen is kept, for the masks."""
        if self._seen is None:
            self._texel_HW2, self._plane_HW = look_up(camera, self.easel, self.config.texels)
        self._seen = np.abs(depth_HW - self._plane_HW) < SHOWN_DEPTH
        return rgb_HWC

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """`streak`: seen paint on the canvas; `canvas`: seen canvas, painted or not."""
        if self._seen is None:
            raise ValueError("masks are of the frame drawn last: call draw first")
        painted = self.canvas.streak()[self._texel_HW2[..., 0], self._texel_HW2[..., 1]] & self._seen
        return {"streak": _half(painted), "canvas": _half(self._seen)}

    def outcome(self) -> dict[str, float]:
        """Shares of the canvas covered, in all and by paint (0: not there), how far down, volumes in mL."""
        shares = dict(zip(self.canvas.paints, self.canvas.coverage_P().tolist(), strict=True))
        return {
            "coverage": float(sum(shares.values())),
            **{f"coverage_{name}": shares.get(name, 0.0) for name in PAINTS},
            "lowest_m": self.canvas.lowest * self.easel.width,
            "canvas_ml": float(self.canvas.volume_P.sum()),
            "brush_ml": float(self.brush.volume_P.sum()),
            "lost_ml": float(self.canvas.lost_P.sum()),
        }


def _half(picture_HW: np.ndarray) -> np.ndarray:
    """A mask [2S, 2S] to [S, S]: set where at least two of four are."""
    return (
        picture_HW[0::2, 0::2].astype(np.int8)
        + picture_HW[1::2, 0::2]
        + picture_HW[0::2, 1::2]
        + picture_HW[1::2, 1::2]
    ) >= 2


def look_up(camera: Camera, easel: Easel, texels: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel at twice the output size: the texel (row, column) it sees, its depth (inf: none)."""
    side = 2 * camera.size
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    reach = np.tan(np.radians(camera.fovy_deg) / 2)
    rays = np.stack([x * reach, y * reach, -np.ones_like(x)], axis=-1) @ camera.rotation_33.T
    inward = easel.axes_33[:, 2]
    toward = rays @ inward
    with np.errstate(divide="ignore"):
        depth = (easel.corner_3 - camera.position_3) @ inward / toward
    local = easel.local(camera.position_3 + np.where(toward > 1e-6, depth, 0)[..., None] * rays)
    texel = np.floor(local[..., [1, 0]] / easel.width * texels).astype(int)
    hit = (toward > 1e-6) & (depth > 0) & ((texel >= 0) & (texel < texels)).all(-1)
    return np.where(hit[..., None], texel, 0), np.where(hit, depth, np.inf)
