"""Which of the known ways to lay out a robot's HDF5 file one follows, and what its numbers are.

| layout | known by | actions | state |
|---|---|---|---|
| robomimic, LIBERO | `data/demo_0/actions` | `actions` | pose and gripper in `obs` |
| ACT (ALOHA and its kin) | `observations/images` | `action` | `observations/qpos` |
| RoboMIND | `observations/rgb_images` | `master/joint_position*` | `puppet/joint_position*` |

Robomimic keeps an episode in a group and many in a file, the others one in a file.
Only what the file itself or the definition of its layout states is said of units and kinds.
"""

from dataclasses import dataclass, field
from typing import Any

from vidworld.contract import Dimension
from vidworld.data.sources.hdf5_file import (
    attribute,
    camera_kind,
    child,
    is_vector,
    json_attribute,
    names_in,
    text_of,
)
from vidworld.data.sources.naming import view_name
from vidworld.errors import DataError

WIDEST_STATE = 64
ACT_SIMULATION_FPS = 50.0
"""DT = 0.02 in the constants of ACT's simulation (github.com/tonyzhaozh/act)."""


@dataclass(frozen=True)
class Layout:
    """What one file holds. Paths of cameras, actions and state are relative to an episode's group."""

    name: str
    cameras: dict[str, str]
    action: tuple[str, ...]
    state: tuple[str, ...]
    fps: float
    """0 where the file does not say it."""
    embodiment: str
    dimensions: dict[str, tuple[Dimension, ...]] = field(default_factory=dict)
    control_frame: str = "unknown"
    note: str = ""
    many: bool = False
    """Whether a file holds several episodes, in the groups of `data`."""


def layout_of(file: Any) -> Layout:
    """The layout of an open file, by the first of its episodes. Raises DataError when it is none of them."""
    data = child(file, "data")
    if data is not None and (demos := names_in(data)):
        demo = child(data, demos[0])
        if child(demo, "actions") is not None:
            return _robomimic(data, demo)
    if child(file, "observations/rgb_images") is not None:
        return _robomind(file)
    if child(file, "observations/images") is not None:
        return _act(file)
    raise DataError(
        "layout of the HDF5 file",
        where=file.filename,
        got=", ".join(names_in(file)[:8]) or "nothing",
        expected="data/demo_0/actions (robomimic, LIBERO), observations/images and action (ACT, ALOHA), or "
        "observations/rgb_images (RoboMIND)",
    )


def episode_text(file: Any, episode: Any) -> str:
    """The instruction, from wherever these layouts keep it; empty where there is none."""
    places = [episode] if episode.name == "/" else [episode, child(file, "data")]
    for place in places:
        told = json_attribute(place, "problem_info").get("language_instruction")
        if isinstance(told, list):
            told = " ".join(map(str, told))
        for name in ("language_instruction", "instruction", "language"):
            if told:
                break
            told = attribute(place, name)
        for name in ("language_raw", "language_instruction"):
            told = told or text_of(child(place, name), name)
        if isinstance(told, str) and told.strip():
            return told.strip().strip('"')
    return ""


def _cameras(episode: Any, folder: str) -> dict[str, str]:
    group = child(episode, folder)
    paths = {name: f"{folder}/{name}" for name in names_in(group)}
    found = {view_name(name): path for name, path in paths.items() if camera_kind(child(episode, path))}
    if not found:
        raise DataError(
            f"no camera in {folder!r}",
            where=episode.file.filename,
            got=", ".join(paths) or "nothing",
            expected="uint8 [T, H, W, 3], or a JPEG or PNG a row",
            fix="robomimic: render pictures with dataset_states_to_obs.py" if folder == "obs" else None,
        )
    return found


_XYZ = tuple(Dimension(f"ee_{axis}", "m", "position") for axis in "xyz")
_OBSERVED = {
    "obs/robot0_eef_pos": _XYZ,
    "obs/ee_pos": _XYZ,
    "obs/robot0_eef_quat": tuple(Dimension(f"ee_q{axis}", "1", "position") for axis in "xyzw"),
    "obs/ee_ori": tuple(Dimension(f"ee_r{axis}", "rad", "position") for axis in "xyz"),
    "obs/robot0_gripper_qpos": tuple(Dimension(f"finger_{index}", "m", "position") for index in range(2)),
    "obs/gripper_states": tuple(Dimension(f"finger_{index}", "m", "position") for index in range(2)),
    "obs/joint_states": tuple(Dimension(f"joint_{index}", "rad", "position") for index in range(7)),
}


def _robomimic(data: Any, demo: Any) -> Layout:
    settings = json_attribute(data, "env_args").get("env_kwargs")
    settings = settings if isinstance(settings, dict) else {}
    rate, robots = settings.get("control_freq"), settings.get("robots")
    robots = [robots] if isinstance(robots, str) else robots if isinstance(robots, list) else []
    dimensions, frame, note = dict(_OBSERVED), "unknown", ""
    controller = settings.get("controller_configs")
    shape = getattr(child(demo, "actions"), "shape", ())
    if (
        isinstance(controller, dict)
        and controller.get("type") == "OSC_POSE"
        and controller.get("control_delta") is True
        and shape[1:] == (7,)
    ):
        dimensions["actions"] = (
            *(Dimension(f"ee_{axis}_delta", "1", "delta") for axis in "xyz"),
            *(Dimension(f"ee_r{axis}_delta", "1", "delta") for axis in "xyz"),
            Dimension("gripper", "1", "position"),
        )
        frame = "base"
        largest = controller.get("output_max", "output_max")
        note = (
            f"steps as shares of the controller's largest ({largest}: m, then rad as axis times angle); "
            "gripper -1 open to 1 closed"
        )
    return Layout(
        name="robomimic",
        cameras=_cameras(demo, "obs"),
        action=("actions",),
        state=_robomimic_state(demo),
        fps=float(rate)
        if isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0
        else 0.0,
        embodiment="_".join(str(robot).lower() for robot in robots) or "unknown",
        dimensions=dimensions,
        control_frame=frame,
        note=note,
        many=True,
    )


def _robomimic_state(demo: Any) -> tuple[str, ...]:
    """Pose and gripper as robosuite or LIBERO call them; else all short vectors but those of objects."""
    names = names_in(child(demo, "obs"))
    for wanted in (
        ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
        ("ee_pos", "ee_ori", "gripper_states", "joint_states"),
    ):
        if all(name in names for name in wanted):
            second = [name.replace("robot0", "robot1") for name in wanted if name.startswith("robot0")]
            both = (*wanted, *second) if second and all(name in names for name in second) else wanted
            return tuple(f"obs/{name}" for name in both)
    return tuple(
        f"obs/{name}"
        for name in names
        if not name.startswith("object") and is_vector(child(demo, f"obs/{name}"), WIDEST_STATE)
    )


def _act(file: Any) -> Layout:
    simulated = attribute(file, "sim") is True
    widths = {getattr(child(file, path), "shape", ())[1:] for path in ("action", "observations/qpos")}
    arms = tuple(
        Dimension(f"{side}_{part}", unit, "position")
        for side in ("left", "right")
        for part, unit in (*((f"joint_{index}", "rad") for index in range(6)), ("gripper", "unknown"))
    )
    two_arms = widths == {(14,)}
    return Layout(
        name="ACT",
        cameras=_cameras(file, "observations/images"),
        action=("action",),
        state=("observations/qpos",),
        fps=ACT_SIMULATION_FPS if simulated else 0.0,
        embodiment=("aloha" if two_arms else "act") + ("_sim" if simulated else ""),
        dimensions={"action": arms, "observations/qpos": arms} if two_arms else {},
        control_frame="joint",
        note="commanded joint positions",
    )


def _robomind(file: Any) -> Layout:
    found = {
        role: tuple(
            f"{role}/{name}" for name in names_in(child(file, role)) if name.startswith("joint_position")
        )
        for role in ("master", "puppet")
    }
    return Layout(
        name="RoboMIND",
        cameras=_cameras(file, "observations/rgb_images"),
        action=found["master"],
        state=found["puppet"],
        fps=0.0,
        embodiment="robomind",
        control_frame="joint",
        note="joint positions of the leading arm stand in for commands",
    )
