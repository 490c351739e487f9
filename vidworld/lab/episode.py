"""Episodes of the lab: `generate(kind, seed)` makes one, `resimulate` replays it with other hidden values.

What else could have happened, given the first frames, is in `vidworld.lab.conditional`.
"""

import dataclasses
import importlib
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidworld.contract import Dimension
from vidworld.errors import ConfigError, DataError
from vidworld.lab.effect import EFFECTS, FRAME_S, BaseEffect, Plan
from vidworld.lab.gl import mujoco
from vidworld.lab.kinematics import ArmPlanner
from vidworld.lab.scene import SIZES, VARIETIES, Scene, halve, planner, sample_look
from vidworld.types import EmbodimentSpec

VERSION = 3
"""Raise it when the same seed shows something else."""
ATTEMPTS = 40
MOST_FRAMES = 256

Control = Literal["joint", "ee_delta"]
Variety = Literal["one", "core", "full"]


@dataclass(frozen=True)
class LabConfig:
    """How episodes look and what is recorded."""

    frames: int = 64
    """At 12.5 Hz; at most 256."""
    size: int = 128
    """Pixels of a side: 64, 128 or 256."""
    variety: Variety = "core"
    """`core`: four cameras and few backgrounds, what a small model learns first; `one`: a single look."""
    exploration: float = 0.35
    """Share of episodes that explore instead of following a script."""
    control: Control = "joint"
    """What actions are: joint targets, or changes of the tool's commanded pose."""
    forces: bool = False
    """Joint torques in the proprioception; they tell hidden masses."""
    robot: Path | None = None
    """An MJCF arm of your own, see `vidworld.lab.arm`; default: ours."""
    masks: bool = True
    """Draw masks too, for evaluation."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError("size", got=self.size, expected=" or ".join(map(str, SIZES)))
        if not 2 <= self.frames <= MOST_FRAMES:
            raise ConfigError("frames", got=self.frames, expected=f"2 to {MOST_FRAMES}")
        if not 0 <= self.exploration <= 1:
            raise ConfigError("exploration", got=self.exploration, expected="a share from 0 to 1")
        for name, known in (("variety", VARIETIES), ("control", ("joint", "ee_delta"))):
            if getattr(self, name) not in known:
                raise ConfigError(name, got=getattr(self, name), expected=" or ".join(known))


@dataclass(frozen=True)
class LabEpisode:
    """One episode with its truth; T frames of S pixels.

    `masks`, `outcomes` and `hidden` are for evaluation and never for a model.
    """

    kind: str
    seed: int
    config: LabConfig
    look: Mapping[str, Any]
    visible: Mapping[str, Any]
    hidden: Mapping[str, float]
    plan: Plan
    frames_THWC: np.ndarray | None
    """[T, S, S, 3] uint8; None when it was not rendered."""
    actions_TA: np.ndarray
    proprio_TS: np.ndarray
    masks_THW: Mapping[str, np.ndarray]
    """Name -> bool [T, S, S]; empty when it was not rendered."""
    outcomes_T: Mapping[str, np.ndarray]
    """Readout -> float64 [T]."""
    versions: Mapping[str, str] = field(default_factory=dict)


def effect_of(kind: str, frames: int = 64) -> BaseEffect:
    """A fresh effect of a kind. Raises ConfigError for an unknown one."""
    if kind not in EFFECTS:
        raise ConfigError("simulated world", got=kind, expected=" or ".join(EFFECTS))
    module, _, name = EFFECTS[kind].partition(":")
    effect = getattr(importlib.import_module(module), name)()
    effect.frames = frames
    return effect


def embodiment_of(config: LabConfig) -> EmbodimentSpec:
    """Names and units of actions and proprioception."""
    joints = [f"joint{index}" for index in range(1, 8)]
    if config.control == "joint":
        action = [Dimension(f"{name}_target", "rad", "position") for name in joints]
    else:
        action = [Dimension(f"tool_d{axis}", "m", "delta") for axis in "xyz"]
        action += [Dimension(f"tool_turn_{axis}", "rad", "delta") for axis in "xyz"]
    action.append(Dimension("gripper_target", "1", "position"))
    proprio = [Dimension(name, "rad", "position") for name in joints]
    proprio += [Dimension(f"{name}_velocity", "rad/s", "velocity") for name in joints]
    proprio.append(Dimension("gripper_width", "m", "position"))
    proprio += [Dimension(f"tool_{axis}", "m", "position") for axis in "xyz"]
    proprio += [Dimension(f"tool_rot6d_{i}", "1", "position", rotation="rot6d") for i in range(6)]
    if config.forces:
        proprio += [Dimension(f"{name}_torque", "N m", "force") for name in joints]
    robot = Path(config.robot).stem.replace(".", "_") if config.robot else "lab_arm"
    return EmbodimentSpec(
        embodiment=f"{robot}_{config.control}" + ("_forces" if config.forces else ""),
        rate_hz=1 / FRAME_S,
        action=tuple(action),
        proprio=tuple(proprio),
        control_frame="joint" if config.control == "joint" else "base",
        note="simulated; commands are targets of position servos",
    )


def streams(kind: str, seed: int, attempt: int) -> tuple[np.random.Generator, ...]:
    """Separate generators for what is visible, what is hidden, and the policy."""
    root = np.random.SeedSequence([zlib.crc32(kind.encode()), seed, attempt])
    return tuple(np.random.default_rng(child) for child in root.spawn(3))


def generate(kind: str, seed: int, config: LabConfig = LabConfig(), *, render: bool = True) -> LabEpisode:
    """Make the episode of a seed; the same seed gives the same bytes on one MuJoCo version.

    Raises ConfigError for an unknown kind or a missing OpenGL, DataError when no plan is reachable.
    """
    if seed < 0:
        raise ConfigError("seed", got=seed, expected="0 or more")
    effect = effect_of(kind, config.frames)
    arm = planner(config.robot, effect.tool_offset_3)
    for attempt in range(ATTEMPTS):
        visible_rng, hidden_rng, policy_rng = streams(kind, seed, attempt)
        look = sample_look(visible_rng, effect.framing, config.variety)
        visible = effect.sample_visible(visible_rng)  # type: ignore[attr-defined]
        # One draw for the seed, not for the attempt: rejected scripts must not add to exploration.
        explores = streams(kind, seed, ATTEMPTS)[2].random() < config.exploration
        plan = effect.explore(policy_rng, arm, visible) if explores else effect.plan(policy_rng, arm, visible)  # type: ignore[attr-defined]
        if plan is not None and _starts_clear(effect, look, visible, plan, config):
            hidden = effect.prior(hidden_rng, visible)
            blank = _blank(kind, seed, config, look, visible, hidden, plan, arm)
            return _run_alone(blank, effect, hidden, render)
    raise DataError(
        f"no reachable plan in {ATTEMPTS} attempts",
        where=f"{kind}, seed {seed}",
        fix="take another seed or robot",
    )


def resimulate(
    episode: LabEpisode, hidden: Mapping[str, float] | None = None, *, render: bool = True
) -> LabEpisode:
    """The same set-up and commands with other hidden values (default: its own)."""
    hidden = episode.hidden if hidden is None else hidden
    if set(hidden) != set(episode.hidden):
        raise ConfigError("hidden values", got=sorted(hidden), expected=sorted(episode.hidden))
    return _run_alone(episode, effect_of(episode.kind, episode.config.frames), hidden, render)


def _starts_clear(
    effect: BaseEffect, look: Mapping[str, Any], visible: Mapping[str, Any], plan: Plan, config: LabConfig
) -> bool:
    """Whether the arm begins out of touch: else what it begins in would burst away."""
    scene = Scene(effect, look, visible, config.size, config.robot)  # type: ignore[arg-type]
    scene.start(plan.start_J, float(plan.gripper_T[0]))
    return not scene.arm_touches()


def _blank(
    kind: str,
    seed: int,
    config: LabConfig,
    look: Mapping[str, Any],
    visible: Mapping[str, Any],
    hidden: Mapping[str, float],
    plan: Plan,
    arm: ArmPlanner,
) -> LabEpisode:
    """An episode that is planned and not yet played."""
    actions_TA = _actions(plan, arm, config.control)
    return LabEpisode(
        kind,
        seed,
        config,
        look,
        visible,
        hidden,
        plan,
        None,
        actions_TA,
        np.zeros((0, 0)),
        {},
        {},
        versions(),
    )


def _actions(plan: Plan, arm: ArmPlanner, control: Control) -> np.ndarray:
    """Commands [T, A] float32 in the control mode."""
    if control == "joint":
        rows_TA = plan.joint_targets_TJ
    else:
        poses = [arm.forward(joints_J) for joints_J in (plan.start_J, *plan.joint_targets_TJ)]
        rows_TA = np.array([_change(before, after) for before, after in itertools.pairwise(poses)])
    return np.concatenate([rows_TA, plan.gripper_T[:, None]], axis=1).astype(np.float32)


def _change(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Change of place [3] and turn [3] (rotation vector, base frame) of the tool."""
    quat, turn = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quat, (after[1] @ before[1].T).ravel())
    mujoco.mju_quat2Vel(turn, quat, 1.0)
    return np.concatenate([after[0] - before[0], turn])


def versions() -> dict[str, str]:
    """What must be equal for the same bytes."""
    return {"lab": str(VERSION), "mujoco": mujoco.__version__, "numpy": np.__version__}


def _run_alone(
    episode: LabEpisode, effect: BaseEffect, hidden: Mapping[str, float], render: bool
) -> LabEpisode:
    config = episode.config
    scene = Scene(effect, episode.look, episode.visible, config.size, config.robot)  # type: ignore[arg-type]
    try:
        return play(episode, effect, scene, hidden, render=render)
    finally:
        scene.close()


def play(
    episode: LabEpisode,
    effect: Any,
    scene: Scene,
    hidden: Mapping[str, float],
    *,
    render: bool,
    frames: int | None = None,
) -> LabEpisode:
    """Play the commands of an episode, or its first `frames`, in a scene that may have played before."""
    config, plan = episode.config, episode.plan
    scene.start(plan.start_J, float(plan.gripper_T[0]))
    effect.reset(scene, episode.visible, hidden)
    pictures, rows, outcomes, masks = [], [], [], []
    for target_J, gripper in zip(plan.joint_targets_TJ[:frames], plan.gripper_T[:frames], strict=True):
        rows.append(_proprio(scene, config.forces))
        if render:
            rgb, depth = scene.render()
            pictures.append(halve(effect.draw(rgb, depth, scene.camera)))
            if config.masks:
                masks.append(effect.masks(scene.camera))
        outcomes.append(effect.outcome())
        scene.step_frame(
            target_J, float(gripper), lambda dt: effect.substep(scene, dt), every=effect.substep_every
        )
    return dataclasses.replace(
        episode,
        hidden=dict(hidden),
        frames_THWC=np.stack(pictures) if render else None,
        proprio_TS=np.array(rows, dtype=np.float32),
        masks_THW=_columns(masks),
        outcomes_T=_columns(outcomes),
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _proprio(scene: Scene, forces: bool) -> np.ndarray:
    """What the robot feels: angles, velocities, opening, tool position, first two columns of its rotation."""
    angles_J, velocities_J = scene.joints()
    position_3, rotation_33 = scene.tool_pose()
    parts = [angles_J, velocities_J, [scene.opening()], position_3, rotation_33[:, :2].T.ravel()]
    if forces:
        parts.append(scene.joint_torques())
    return np.concatenate(parts)
