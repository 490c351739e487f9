"""What an effect offers to the lab, and the constants that all effects share.

An effect is what the arm acts on: rigid objects, paint, a liquid, smoke, a container with hidden contents.
One instance lives for one episode. World frame: metres, z up, table top at z = 0, arm base at the origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from vidworld.lab.kinematics import ArmPlanner
    from vidworld.lab.scene import Scene

FRAME_S = 0.08
"""Seconds of a frame: 12.5 Hz."""
PHYSICS_S = 0.004
"""Seconds of a physics step."""
STEPS = 20
"""Physics steps of a frame."""
EFFECTS: Mapping[str, str] = {
    "rigid": "vidworld.lab.rigid:Rigid",
    "container": "vidworld.lab.container:Container",
    "paint": "vidworld.lab.paint:PaintEffect",
    "smoke": "vidworld.lab.smoke:SmokeEffect",
    "liquid": "vidworld.lab.liquid:LiquidEffect",
}
"""Kind -> where its effect is."""


@dataclass(frozen=True)
class Plan:
    """The frozen commands of an episode: replayed, never computed again, when hidden values change."""

    joint_targets_TJ: np.ndarray
    """[T, 7] radians; row t is reached at frame t + 1."""
    gripper_T: np.ndarray
    """[T], 0 closed to 1 open."""
    start_J: np.ndarray
    """[7] radians, the pose of frame 0."""
    text: str
    policy: str
    """What chose the commands: `script:<task>`, `explore:noise` or `explore:reach`."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera as MuJoCo has it."""

    position_3: np.ndarray
    rotation_33: np.ndarray
    """Columns: right, up, back."""
    fovy_deg: float
    size: int
    """Pixels of a side of the output frame."""

    def project(self, points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points to output pixels [N, 2] (x right, y down, pixel centres at .5) and depths [N] in m."""
        local_N3 = (np.asarray(points_N3, np.float64) - self.position_3) @ self.rotation_33
        depth_N = -local_N3[:, 2]
        focal = 0.5 * self.size / np.tan(np.radians(self.fovy_deg) / 2)
        scale_N = focal / np.maximum(depth_N, 1e-6)
        x_N = 0.5 * self.size + scale_N * local_N3[:, 0]
        y_N = 0.5 * self.size - scale_N * local_N3[:, 1]
        return np.stack([x_N, y_N], axis=1), depth_N


@dataclass(frozen=True)
class Framing:
    """Where cameras of an effect may stand; azimuth 0 looks at the arm from the front (from +x)."""

    target_3: tuple[float, float, float] = (0.46, 0.0, 0.14)
    distance_m: tuple[float, float] = (1.02, 1.15)
    single_distance_m: float | None = None
    """Of the only camera of variety `one`; None: as in `core`."""
    azimuth_deg: tuple[float, float] = (-42.0, 42.0)
    elevation_deg: tuple[float, float] = (24.0, 36.0)
    fovy_deg: float = 42.0


class Effect(Protocol):
    """One kind of episode. Inherit from `BaseEffect` and override what differs."""

    kind: ClassVar[str]
    framing: Framing
    tool_offset_3: tuple[float, float, float]
    substep_every: int
    readout_noise: ClassVar[Mapping[str, float]]
    angles: ClassVar[frozenset[str]]
    hidden_dims: ClassVar[int]

    def sample_visible(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """What a camera can see of the set-up, as JSON values."""
        ...

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Hidden values; empty if nothing is hidden."""
        ...

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """The hidden values at a point of the unit cube [hidden_dims]: uniform points give the prior."""
        ...

    def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
        """Add bodies, meshes and textures to the `mujoco.MjSpec` before it is compiled."""
        ...

    def plan(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Scripted commands, or None when they cannot be reached: then all is drawn again."""
        ...

    def explore(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Exploratory commands, or None."""
        ...

    def reset(self, scene: "Scene", visible: Mapping[str, Any], hidden: Mapping[str, float]) -> None:
        """Put the effect into its first state; the arm stands at its start already."""
        ...

    def substep(self, scene: "Scene", dt: float) -> None:
        """Advance by `dt` seconds; called after every `substep_every` physics steps."""
        ...

    def draw(self, rgb_HWC: np.ndarray, depth_HW: np.ndarray, camera: Camera) -> np.ndarray:
        """Composite on the frame of twice the output size; uint8 in, uint8 out, depth in metres."""
        ...

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """Name -> bool [H, W] at output size, of the frame drawn last; for evaluation only."""
        ...

    def outcome(self) -> dict[str, float]:
        """Readouts of this frame."""
        ...


def between(uniform: Any, low: float, high: float) -> Any:
    """What `Generator.uniform(low, high)` makes of a number from 0 to 1, bit for bit."""
    return low + (high - low) * uniform


class BaseEffect:
    """Defaults of an effect: nothing hidden, nothing drawn, random motion to explore."""

    framing = Framing()
    tool_offset_3: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Tool centre point in the frame of the arm's tool site, metres; an effect with a brush moves it."""
    substep_every = 1
    readout_noise: ClassVar[Mapping[str, float]] = {}
    """Readouts that a camera can tell, with the standard deviation of its error in one frame."""
    angles: ClassVar[frozenset[str]] = frozenset()
    """Those of them that are angles in radians: pi and -pi are the same."""
    hidden_dims: ClassVar[int] = 0
    """Numbers that `hidden_at` turns into hidden values; 0 where only draws from the prior are known."""
    frames = 64
    """Frames of the episode; set by the lab before anything else is called."""
    explore_low_3 = (0.34, -0.24, 0.05)
    explore_high_3 = (0.62, 0.24, 0.3)
    """The box in which exploration moves the tool."""

    def prior(self, rng: np.random.Generator, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """Nothing is hidden."""
        return {}

    def hidden_at(self, uniform_D: np.ndarray, visible: Mapping[str, Any]) -> Mapping[str, float]:
        """None; what it leaves out (the seed of a turbulence) is always drawn from the prior."""
        return {}

    def explore(self, rng: np.random.Generator, arm: "ArmPlanner", visible: Mapping[str, Any]) -> Plan | None:
        """Ornstein-Uhlenbeck motion or random reaching of the tool in a box over the table."""
        from vidworld.lab.policy import random_motion

        return random_motion(rng, arm, self.frames, self.explore_low_3, self.explore_high_3)

    def substep(self, scene: "Scene", dt: float) -> None:
        """MuJoCo does it all."""

    def draw(self, rgb_HWC: np.ndarray, depth_HW: np.ndarray, camera: Camera) -> np.ndarray:
        """The frame as it is."""
        return rgb_HWC

    def masks(self, camera: Camera) -> dict[str, np.ndarray]:
        """No masks."""
        return {}
