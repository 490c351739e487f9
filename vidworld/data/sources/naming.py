"""What a name in a log says without doubt, and nothing more.

A wrong unit or kind makes a wrong simulator in silence, so only endings that leave no choice are read:

| name ends in (or is)                                  | kind     |
|-------------------------------------------------------|----------|
| `vel`, `velocity`                                     | velocity |
| `pos`, `position`                                     | position |
| `delta`, or begins with `delta`                       | delta    |
| `force`, `torque`, `effort`                           | force    |
| anything else, such as `joint_0`, `x` or `gripper`    | unknown  |

The unit is read from a last word `rad` or `deg` (`elbow_rad`), which says nothing about the kind. Everything
else is `unknown` until a contract file says it (`vidworld shard --contract FILE`).
"""

import re

from vidworld.contract import Dimension, Kind

_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"(.*\W)?(vel|velocity)", "velocity"),
    (r"(.*\W)?(pos|position)", "position"),
    (r"(.*\W)?delta|delta\W.*", "delta"),
    (r"(.*\W)?(force|torque|effort)", "force"),
)


def guess_dimension(name: str) -> Dimension:
    """A dimension with the unit and kind that its name states.

    >>> guess_dimension("joint_0_vel").kind, guess_dimension("gripper").kind
    ('velocity', 'unknown')
    """
    words = re.sub(r"_", " ", name.lower())
    unit = re.search(r"(?:\W)(rad|deg)$", words)
    kinds: list[Kind] = [kind for pattern, kind in _KINDS if re.fullmatch(pattern, words)]
    return Dimension(
        name=name,
        unit=unit.group(1) if unit else "unknown",
        kind=kinds[0] if len(kinds) == 1 else "unknown",
    )


def view_name(camera: str) -> str:
    """Short name of a camera, safe inside a tar key: letters, digits, `_` and `-`.

    >>> view_name("observation.images.top"), view_name("observation.image"), view_name("cam.left wrist")
    ('top', 'image', 'cam_left_wrist')
    """
    short = re.sub(r"^observation\.(images\.)?", "", camera)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", short).strip("_") or "view"


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as people do: `run 2` before `run 10`."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)]
