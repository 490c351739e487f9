"""A small YAML that tells what the logs do not: names, units, kinds, control frame, a note.

    embodiment: cr5              # a name for the robot, if the logs have none or a poor one
    control_frame: joint         # joint, base, end_effector
    note: measured velocities stand in for commands
    action:
      joint_*_vel: {unit: rad/s} # keys are names in the logs, or patterns
      gripper: {unit: "1", kind: binary}
    proprio:
      joint_*: {unit: rad, kind: position}

What is left out stays as the source says. With several robots in one dataset, give one file each, with
`applies_to: <embodiment in the logs>`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from vidworld.config import from_mapping, from_yaml
from vidworld.contract import Dimension, Kind
from vidworld.errors import ConfigError
from vidworld.types import EmbodimentSpec


@dataclass(frozen=True)
class DimensionFacts:
    """What a contract file says of one dimension; None keeps what the source says."""

    name: str | None = None
    unit: str | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class ContractFile:
    """The fields of a contract file, all optional."""

    applies_to: str | None = None
    embodiment: str | None = None
    control_frame: str | None = None
    note: str | None = None
    action: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name or pattern -> fields of `DimensionFacts`."""
    proprio: dict[str, dict[str, str]] = field(default_factory=dict)

    def applied_to(self, spec: EmbodimentSpec, where: object) -> EmbodimentSpec:
        """A specification with these facts in it. Raises ConfigError for a name that matches nothing."""
        changes = {
            name: value
            for name in ("embodiment", "control_frame", "note")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            spec,
            **changes,
            action=_describe(spec.action, self.action, f"action of {where}"),
            proprio=_describe(spec.proprio, self.proprio, f"proprio of {where}"),
        )


def read_contracts(paths: Sequence[Path], specs: Sequence[EmbodimentSpec]) -> dict[str, EmbodimentSpec]:
    """Embodiment name in the source -> its specification after the contract files.

    Raises ConfigError when a file is for no embodiment of the source, or two files are for the same one.
    """
    described = {spec.embodiment: spec for spec in specs}
    seen: dict[str, Path] = {}
    for path in paths:
        file = from_yaml(ContractFile, path)
        target = file.applies_to
        if target is None and len(specs) == 1:
            target = specs[0].embodiment
        if target not in described:
            raise ConfigError(
                "applies_to",
                where=path,
                got=target or "nothing",
                expected=" or ".join(spec.embodiment for spec in specs),
            )
        if target in seen:
            raise ConfigError(f"second contract file for embodiment {target!r}", where=path, got=seen[target])
        seen[target] = path
        described[target] = file.applied_to(described[target], path)
    names = [spec.embodiment for spec in described.values()]
    if len(set(names)) != len(names):
        raise ConfigError("two embodiments under one name", got=", ".join(names))
    return described


def _describe(
    dimensions: tuple[Dimension, ...], facts: Mapping[str, Mapping[str, str]], where: str
) -> tuple[Dimension, ...]:
    result = list(dimensions)
    names = [dimension.name for dimension in dimensions]
    for pattern, mapping in facts.items():
        said = from_mapping(DimensionFacts, mapping, where=f"{pattern!r} of {where}")
        matches = [index for index, name in enumerate(names) if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1)
            raise ConfigError(
                f"no dimension is called {pattern!r}",
                where=where,
                expected=f"a name or pattern among {', '.join(names)}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        if said.name is not None and len(matches) > 1:
            raise ConfigError(f"{pattern!r} gives {len(matches)} dimensions one name", where=where)
        changes = {key: value for key, value in dataclasses.asdict(said).items() if value is not None}
        for index in matches:
            result[index] = dataclasses.replace(result[index], **changes)
    return tuple(result)
