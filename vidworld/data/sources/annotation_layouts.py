"""What the numbers in the JSON files of `annotated_video` are: one row a layout, found by its fields."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vidworld.contract import Dimension

_POSE = (
    *(Dimension(f"ee_{axis}", "m", "position") for axis in "xyz"),
    *(Dimension(f"ee_{angle}", "rad", "position", "euler_xyz") for angle in ("roll", "pitch", "yaw")),
)
_GRIPPER = Dimension("gripper", "1", "position")
JOINTS = tuple(Dimension(f"joint_{index}", "rad", "position") for index in range(7))
_EULER = "recorded as Euler angles (fixed axes x, y, z), which jump at +-pi"
NEXT_STATE = (
    "no actions in the logs: the next frame's state (absolute) is the action, unless mapped otherwise"
)


@dataclass(frozen=True)
class Field:
    """A field of a JSON that becomes columns: rows of numbers, or one number a row."""

    key: str
    dimensions: tuple[Dimension, ...] = ()
    """Of its first columns; none: as many as it has, named `<key>_0` and so on, of unknown kind."""
    every: int = 1
    """Rows of the field to one frame."""


@dataclass(frozen=True)
class Layout:
    """What the numbers of a JSON are, when it has all the fields named here."""

    name: str
    embodiment: str
    proprio: tuple[Field, ...]
    action: tuple[Field, ...] = ()
    """None: the first field of proprio (and its gripper) a frame later."""
    fps: float | None = None
    """Frames a second, whatever the mp4 headers say."""
    views: tuple[str, ...] = ()
    """Cameras in their order, if there are so many."""
    control_frame: str = "unknown"
    note: str = ""

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields that a JSON must have."""
        return (*self.proprio, *self.action)


_STATES = Field("states", (*_POSE, _GRIPPER))
_DROID_VIEWS = ("exterior_1", "exterior_2", "wrist")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "Ctrl-World",
        "droid_franka",
        proprio=(_STATES, Field("observation.state.joint_position", JOINTS, every=3)),
        action=(
            Field("action.cartesian_position", _POSE, every=3),
            Field("action.gripper_position", (_GRIPPER,), every=3),
        ),
        fps=5.0,
        views=_DROID_VIEWS,
        control_frame="base",
        note=f"commanded pose, the last of 3 commands (15 Hz) a frame; gripper 0 open to 1 closed; {_EULER}",
    ),
    Layout(
        "Ctrl-World without actions",
        "droid_franka_next_state",
        proprio=(_STATES, Field("joints", JOINTS)),
        fps=5.0,
        views=_DROID_VIEWS,
        control_frame="base",
        note=f"{NEXT_STATE}; gripper 0 open to 1 closed; {_EULER}",
    ),
    Layout(
        "Ctrl-World with states only",
        "franka_next_state",
        proprio=(_STATES,),
        fps=5.0,
        views=_DROID_VIEWS,
        control_frame="base",
        note=f"{NEXT_STATE}; {_EULER}",
    ),
    Layout(
        "IRASim",
        "arm_next_state",
        proprio=(Field("state", _POSE), Field("continuous_gripper_state", (_GRIPPER,))),
        control_frame="base",
        note=f"the action is the state of the next frame (absolute), as readers of this layout do; {_EULER}",
    ),
    Layout("IRASim, actions only", "unknown", proprio=(), action=(Field("actions"),)),
)

FIELDS = {field.key: field for layout in LAYOUTS for field in layout.fields} | {
    "action.joint_position": Field("action.joint_position", JOINTS, every=3),
    "action.joint_velocity": Field(
        "action.joint_velocity",
        tuple(Dimension(f"joint_{index}_vel", "rad/s", "velocity") for index in range(7)),
        every=3,
    ),
}
"""Fields that are known, by their keys: `logs.yaml` may choose among them."""


def chosen(layout: Layout, action: Sequence[str], state: Sequence[str]) -> Layout:
    """A layout with other fields for actions and proprioception; one without actions stays as it is."""
    if not layout.action or not (action or state):
        return layout
    proprio = tuple(FIELDS.get(key, Field(key)) for key in state) or layout.proprio
    if not action:
        return replace(layout, proprio=proprio)
    fields = tuple(FIELDS.get(key, Field(key)) for key in action)
    note = f"actions chosen: {', '.join(action)}"
    return replace(layout, proprio=proprio, action=fields, control_frame="unknown", note=note)
