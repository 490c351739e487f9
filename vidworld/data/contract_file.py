"""A small YAML that tells what the logs do not: names, units, kinds, rate, and how numbers are to be mapped.

    embodiment: cr5              # a name for the robot, if the logs have none or a poor one
    control_frame: base          # joint, base, end_effector
    note: measured velocities stand in for commands
    rate_hz: 5                   # rows a second, if the logs do not say
    text: put it on the plate    # the instruction of episodes without one
    success_reward: 1            # a reward that means success, if the logs have no label
    proprio:
      ee_[xyz]: {unit: mm, kind: position, to: m}      # keys are names in the logs, or patterns
      gripper: {kind: binary, threshold: 0.5, invert: true}
    rotation:                                          # one, or a list of them
      dims: [ee_roll, ee_pitch, ee_yaw]
      from: euler_xyz
      to: rot6d
    action_from: state_delta     # or next_state, or {ee_*: state_delta, gripper: next_state}
    action_keep: [ee_*, gripper] # these, in this order; proprio_keep likewise

What is left out stays as the source says. `rotation` and what follows use the names given by `name`, and
`action_from`, `*_keep` those after `rotation`. With several robots in one dataset, give one file each, with
`applies_to: <embodiment in the logs>`.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vidworld.config import from_mapping, from_yaml
from vidworld.contract import Dimension, Kind
from vidworld.data import rotation
from vidworld.data.mapping import (
    Change,
    EmbodimentMapping,
    RoleMapping,
    Rotate,
    StateAction,
    state_actions,
    unit_scale,
)
from vidworld.errors import ConfigError
from vidworld.types import EmbodimentSpec

ROLES = ("action", "proprio")


@dataclass(frozen=True)
class DimensionFacts:
    """What a contract file says of one dimension; None keeps what the source says."""

    name: str | None = None
    unit: str | None = None
    """Of the numbers in the logs; after `scale`, where one is given."""
    kind: Kind | None = None
    to: str | None = None
    """A unit to convert to."""
    scale: float | None = None
    offset: float | None = None
    threshold: float | None = None
    """1 above it, else 0."""
    invert: bool = False
    """1 - x: the other convention of a gripper from 0 to 1."""


@dataclass(frozen=True)
class RotationFacts:
    """Dimensions that are one rotation."""

    dims: tuple[str, ...]
    given: str
    to: str | None = None
    continuous: bool = True
    of: str | None = None
    """`action` or `proprio`; default: wherever all the dimensions are."""


@dataclass(frozen=True)
class Described:
    """One embodiment of a source with what a contract file says of it."""

    spec: EmbodimentSpec
    mapping: EmbodimentMapping | None = None
    """None: no number changes."""
    rate_hz: float | None = None


@dataclass(frozen=True)
class ContractFile:
    """The fields of a contract file, all optional."""

    applies_to: str | None = None
    embodiment: str | None = None
    control_frame: str | None = None
    note: str | None = None
    rate_hz: float | None = None
    text: str = ""
    success_reward: float | None = None
    action: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name or pattern -> fields of `DimensionFacts`."""
    proprio: dict[str, dict[str, Any]] = field(default_factory=dict)
    rotation: dict[str, Any] | tuple[dict[str, Any], ...] = ()
    """Fields of `RotationFacts`, with `from` for `given`."""
    action_from: str | dict[str, str] | None = None
    """A `StateAction` for all of proprioception, or one for each name or pattern in it."""
    action_keep: tuple[str, ...] | None = None
    proprio_keep: tuple[str, ...] | None = None

    def applied_to(self, spec: EmbodimentSpec, where: Path) -> Described:
        """A specification with these facts in it, and the mapping that goes with it.

        Raises ConfigError for a name that matches nothing and for facts that contradict each other.
        """
        if self.rate_hz is not None and not 0 < self.rate_hz < float("inf"):
            raise ConfigError("rate_hz", where=where, got=self.rate_hz, expected="rows a second, more than 0")
        changes = {
            name: value
            for name in ("embodiment", "control_frame", "note")
            if (value := getattr(self, name)) is not None
        }
        mapping = self._mapping(spec, self.control_frame or spec.control_frame, where)
        described = mapping.described(dataclasses.replace(spec, **changes))
        used = mapping.changes_numbers or self.text or self.success_reward is not None
        return Described(described, mapping if used else None, self.rate_hz)

    def _mapping(self, spec: EmbodimentSpec, control_frame: str, where: Path) -> EmbodimentMapping:
        groups = self._rotations(where)
        proprio = RoleMapping(_changes(spec.proprio, self.proprio, f"proprio of {where}"))
        used = set[int]()
        proprio = _rotated(proprio, spec.proprio, groups, "proprio", used)
        table = proprio.change(np.zeros((0, len(spec.proprio))))
        action_from = self._action_from(table.dimensions, control_frame, where)
        actions = state_actions(table, action_from).dimensions if action_from else spec.action
        action = RoleMapping(_changes(actions, self.action, f"action of {where}"))
        action = _rotated(action, actions, groups, "action", used)
        for index, group in enumerate(groups):
            if index not in used:
                names = [change.described.name for role in (action, proprio) for change in role.changes]
                raise ConfigError(
                    f"no rotation {', '.join(group.dims)}",
                    where=where,
                    expected=f"{group.of or 'action or proprio'} to have all of them ({', '.join(names)})",
                )
        after = action.change(np.zeros((0, len(actions)))).names
        action = dataclasses.replace(action, keep=_kept(self.action_keep, after, f"action_keep of {where}"))
        keep = _kept(self.proprio_keep, table.names, f"proprio_keep of {where}")
        proprio = dataclasses.replace(proprio, keep=keep)
        return EmbodimentMapping(action, proprio, action_from, self.text, self.success_reward)

    def _rotations(self, where: Path) -> list[RotationFacts]:
        groups = []
        for given in [self.rotation] if isinstance(self.rotation, dict) else self.rotation:
            # `from` is no name that a Python field can have.
            facts = {"given" if key == "from" else key: value for key, value in given.items()}
            if missing := [key for key in ("dims", "given") if key not in facts]:
                name = "from" if missing[0] == "given" else missing[0]
                raise ConfigError(
                    f"rotation without {name!r}", where=where, fix="dims, from and to are needed"
                )
            group = from_mapping(RotationFacts, facts, where=f"rotation of {where}")
            width = rotation.width_of(group.given)
            if len(group.dims) != width or len(set(group.dims)) != width:
                raise ConfigError(
                    "dims of a rotation", where=where, got=", ".join(group.dims), expected=f"{width} names"
                )
            rotation.width_of(group.to or group.given)
            if group.of not in (None, *ROLES):
                raise ConfigError(
                    "of", where=f"rotation of {where}", got=group.of, expected=" or ".join(ROLES)
                )
            groups.append(group)
        return groups

    def _action_from(
        self, proprio: tuple[Dimension, ...], control_frame: str, where: Path
    ) -> dict[str, StateAction]:
        if self.action_from is None:
            return {}
        wanted = {"*": self.action_from} if isinstance(self.action_from, str) else self.action_from
        known: dict[str, StateAction] = {rule: rule for rule in get_args(StateAction)}
        if unknown := set(wanted.values()) - known.keys():
            raise ConfigError("action_from", where=where, got=unknown.pop(), expected=" or ".join(known))
        names = [dimension.name for dimension in proprio]
        rules: dict[str, StateAction] = {
            names[index]: known[rule]
            for pattern, rule in wanted.items()
            for index in _matches(pattern, names, f"action_from of {where}")
        }
        turns = any(d.rotation and rules.get(d.name) == "state_delta" for d in proprio)
        if turns and control_frame != "base":
            raise ConfigError(
                "action_from: state_delta with a rotation",
                where=where,
                got=f"control_frame {control_frame}",
                expected="control_frame: base, as changes of state are taken there",
            )
        for dimension in proprio:
            if dimension.kind == "unknown" and dimension.name in rules:
                raise ConfigError(
                    f"action_from: kind of {dimension.name!r}",
                    where=where,
                    got="unknown",
                    expected="position, velocity, binary or force",
                    fix="say it under proprio",
                )
        return rules


def read_contracts(paths: Sequence[Path], specs: Sequence[EmbodimentSpec]) -> dict[str, Described]:
    """Embodiment name in the source -> what it is after the contract files.

    Raises ConfigError when a file is for no embodiment of the source, or two files are for the same one.
    """
    described = {spec.embodiment: Described(spec) for spec in specs}
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
        described[target] = file.applied_to(described[target].spec, path)
    names = [one.spec.embodiment for one in described.values()]
    if len(set(names)) != len(names):
        raise ConfigError("two embodiments under one name", got=", ".join(names))
    return described


def _changes(
    dimensions: tuple[Dimension, ...], facts: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[Change, ...]:
    """One change a dimension: what the last pattern that matches says of each field."""
    result: list[dict[str, Any]] = [{} for _ in dimensions]
    names = [dimension.name for dimension in dimensions]
    for pattern, mapping in facts.items():
        place = f"{pattern!r} of {where}"
        said = from_mapping(DimensionFacts, mapping, where=place)
        matches = _matches(pattern, names, where)
        if said.name is not None and len(matches) > 1:
            raise ConfigError(f"{pattern!r} gives {len(matches)} dimensions one name", where=where)
        if said.to is not None and (said.scale is not None or said.offset is not None):
            raise ConfigError("both `to` and `scale` or `offset`", where=place, fix="say one of them")
        for index in matches:
            result[index] |= {key: getattr(said, key) for key in mapping}
    return tuple(
        _change(dimension, facts, where) for dimension, facts in zip(dimensions, result, strict=True)
    )


def _change(dimension: Dimension, facts: Mapping[str, Any], where: str) -> Change:
    for key in ("scale", "offset", "threshold"):
        if not math.isfinite(facts.get(key) or 0):
            raise ConfigError(
                key, where=f"{dimension.name!r} of {where}", got=facts[key], expected="a number"
            )
    if facts.get("scale") == 0:
        raise ConfigError(
            "scale", where=f"{dimension.name!r} of {where}", got=0, expected="not 0: it erases all"
        )
    labels = {key: facts[key] for key in ("name", "unit", "kind") if facts.get(key) is not None}
    described = dataclasses.replace(dimension, **labels)
    scale, units = facts.get("scale"), ""
    if (to := facts.get("to")) is not None:
        scale = unit_scale(described.unit, to, f"{dimension.name!r} of {where}")
        units = "" if to == described.unit else f"{described.unit} to {to}"
        described = dataclasses.replace(described, unit=to)
    threshold = facts.get("threshold")
    if threshold is not None:
        described = dataclasses.replace(described, unit="1", kind=facts.get("kind") or "binary")
    if described.rotation and (scale is not None or threshold is not None or facts.get("invert")):
        raise ConfigError(f"{dimension.name!r} is part of a rotation", where=where, got="a change of numbers")
    return Change(
        described,
        1.0 if scale is None else float(scale),
        float(facts.get("offset") or 0.0),
        threshold,
        bool(facts.get("invert")),
        units,
    )


def _rotated(
    role: RoleMapping,
    dimensions: tuple[Dimension, ...],
    groups: Sequence[RotationFacts],
    name: str,
    used: set[int],
) -> RoleMapping:
    """The role with those rotations whose dimensions it has; adds their numbers to `used`."""
    for index, group in enumerate(groups):
        table = role.change(np.zeros((0, len(dimensions))))
        rotations = {dimension.name: dimension.rotation for dimension in table.dimensions}
        if group.of not in (None, name) or not rotations.keys() >= set(group.dims):
            continue
        used.add(index)
        # Actions taken from states have their rotations as those do already.
        if {rotations[dim] for dim in group.dims} != {group.to or group.given}:
            rotate = Rotate(group.dims, group.given, group.to or group.given, group.continuous)
            role = dataclasses.replace(role, rotations=(*role.rotations, rotate))
    return role


def _kept(patterns: tuple[str, ...] | None, names: list[str], where: str) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    indices = [index for pattern in patterns for index in _matches(pattern, names, where)]
    return tuple(dict.fromkeys(names[index] for index in indices))


def _matches(pattern: str, names: Sequence[str], where: str) -> list[int]:
    matches = [index for index, name in enumerate(names) if fnmatchcase(name, pattern)]
    if not matches:
        near = difflib.get_close_matches(pattern, names, n=1)
        raise ConfigError(
            f"no dimension is called {pattern!r}",
            where=where,
            expected=f"a name or pattern among {', '.join(names)}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    return matches
