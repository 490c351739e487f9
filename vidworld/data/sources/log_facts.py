"""How logs are to be read where their files leave it open: `logs.yaml`, in the folder of the logs.

    views: [front, wrist]           # cameras to take, also one that is black in the samples looked at
    action: [action_dict/joint_velocity, action_dict/gripper_position]   # fields, joined in this order
    state: [observation/joint_position]
    channels: bgr                   # red and blue are swapped in the pictures
    flip: rows                      # pictures are upside down; `both` if they are turned by 180 degrees

All of it is optional, and read by the sources of RLDS and of HDF5 files. What the numbers mean, and at what
rate they were recorded, is said in a contract file (`vidworld shard --contract FILE`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vidworld.config import from_yaml
from vidworld.contract import Dimension
from vidworld.data.sources.naming import guess_dimension
from vidworld.errors import ConfigError

FACTS_FILE = "logs.yaml"


@dataclass(frozen=True)
class LogFacts:
    """The fields of `logs.yaml`."""

    views: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    channels: Literal["rgb", "bgr"] = "rgb"
    flip: Literal["none", "rows", "both"] = "none"

    def upright(self, frame: np.ndarray) -> np.ndarray:
        """A recorded frame [H, W, 3] as RGB, upright."""
        if self.channels == "bgr":
            frame = frame[..., ::-1]
        match self.flip:
            case "none":
                pass
            case "rows":
                frame = frame[::-1]
            case "both":
                frame = frame[::-1, ::-1]
            case _:
                raise AssertionError(self.flip)
        return np.ascontiguousarray(frame)

    def changes(self) -> dict[str, str]:
        """What was done to the pictures, for an episode's `source`."""
        done = {"channels": self.channels, "flip": self.flip}
        return {name: value for name, value in done.items() if value != getattr(LogFacts, name)}


def read_facts(folder: Path) -> LogFacts:
    """The facts in a folder, or none. Raises ConfigError for an unknown key or a value that cannot be."""
    path = folder / FACTS_FILE
    return from_yaml(LogFacts, path) if path.is_file() else LogFacts()


def wanted_views(views: Sequence[str], facts: LogFacts, where: Path) -> tuple[str, ...]:
    """Those cameras that `logs.yaml` asks for. Raises ConfigError for one that is not there."""
    for view in facts.views:
        if view not in views:
            raise ConfigError("views", where=where / FACTS_FILE, got=view, expected=" or ".join(views))
    return tuple(facts.views)


def join_dimensions(
    widths: Mapping[str, int], known: Mapping[str, tuple[Dimension, ...]]
) -> tuple[Dimension, ...]:
    """Dimensions of fields joined in order, from path -> width: as known, else by the names of the fields."""
    joined = [
        dimension
        for path, width in widths.items()
        for dimension in (
            known[path] if len(known.get(path, ())) == width else _numbered(path.rpartition("/")[2], width)
        )
    ]
    if len({dimension.name for dimension in joined}) == len(joined):
        return tuple(joined)
    # Fields of two arms may end alike: their whole paths tell them apart.
    return tuple(d for path, width in widths.items() for d in _numbered(path.replace("/", "."), width))


def _numbered(name: str, width: int) -> tuple[Dimension, ...]:
    names = [name] if width == 1 else [f"{name}_{index}" for index in range(width)]
    return tuple(map(guess_dimension, names))
