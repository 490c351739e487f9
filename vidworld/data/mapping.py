"""What a contract file changes about the numbers: units, gripper conventions, rotations, order, actions.

Pure functions on tables: an array [T, D] and what each of its columns is. The order is fixed: proprioception
is described, scaled and its rotations expressed anew; actions likewise, or they are taken from that
proprioception where the logs have none; last, columns are kept, dropped or put in another order. A mapping of
no rows gives the dimensions of the result, so that the contract and the data cannot disagree.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vidworld.contract import Dimension
from vidworld.data import rotation
from vidworld.data.resample import refuse_wraps, rotation_groups
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode

StateAction = Literal["next_state", "state_delta"]

_PER_RADIAN = {"rad": 1.0, "deg": np.pi / 180, "rev": 2 * np.pi}
_PER_METRE = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
_PER_RATE = {f"{unit}/s": size for unit, size in {**_PER_RADIAN, **_PER_METRE}.items()} | {"rpm": np.pi / 30}
_ANGLE_RATES = {"rad/s", "deg/s", "rev/s", "rpm"}
UNITS: tuple[MappingType[str, float], ...] = (
    _PER_RADIAN,
    _PER_METRE,
    {unit: size for unit, size in _PER_RATE.items() if unit in _ANGLE_RATES},
    {unit: size for unit, size in _PER_RATE.items() if unit not in _ANGLE_RATES},
    {"1": 1.0, "%": 0.01},
)
"""Families of units, each with its size in the first one of the family."""

MOST_RADIANS = 4 * np.pi
"""Euler angles beyond two turns are degrees."""
_SUFFIXES = {
    "quaternion_xyzw": ("qx", "qy", "qz", "qw"),
    "quaternion_wxyz": ("qw", "qx", "qy", "qz"),
    "axis_angle": ("rx", "ry", "rz"),
}


@dataclass(frozen=True)
class Table:
    """Rows [T, D] float64 and what each column is."""

    dimensions: tuple[Dimension, ...]
    values_TD: np.ndarray

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [dimension.name for dimension in self.dimensions]


@dataclass(frozen=True)
class Change:
    """A column becomes `described`: x * scale + offset, then 1 above the threshold, then 1 - x."""

    described: Dimension
    scale: float = 1.0
    offset: float = 0.0
    threshold: float | None = None
    invert: bool = False
    units: str = ""
    """`deg to rad`, when that is where the scale comes from."""

    @property
    def rule(self) -> str:
        """What happens to the numbers, for the contract's note; empty when nothing does."""
        parts = [self.units] if self.units else []
        if not self.units and (self.scale != 1 or self.offset):
            parts.append(f"x * {self.scale!r}" + (f" + {self.offset!r}" if self.offset else ""))
        if self.threshold is not None:
            parts.append(f"1 above {self.threshold!r}")
        return ", ".join([*parts, *(["1 - x"] if self.invert else [])])

    def of(self, column_T: np.ndarray) -> np.ndarray:
        """The changed column. Raises DataError when one to be inverted is not from 0 to 1."""
        if not self.rule:
            return column_T
        column_T = column_T * self.scale + self.offset
        if self.threshold is not None:
            column_T = (column_T > self.threshold).astype(np.float64)
        if self.invert:
            wrong = np.flatnonzero((column_T < -0.05) | (column_T > 1.05))
            if len(wrong):
                raise DataError(
                    f"{self.described.name!r} to be inverted, at row {wrong[0]}",
                    got=f"{column_T[wrong[0]]:g}",
                    expected="0 to 1",
                    fix="give scale and offset, or a threshold, in the contract file",
                )
            column_T = 1 - column_T
        return column_T


@dataclass(frozen=True)
class Rotate:
    """Columns that are one rotation are expressed as another representation, or only declared as one."""

    dims: tuple[str, ...]
    given: str
    to: str
    continuous: bool = True
    """Euler angles, quaternions and axis-angle vectors follow the motion over their jumps."""

    def of(self, table: Table) -> Table:
        """The new columns stand where the first of the old ones stood."""
        old = [table.names.index(name) for name in self.dims]
        dimensions = self._described([table.dimensions[index] for index in old])
        given = table.values_TD[:, old]
        if rotation.in_radians(self.given) and np.abs(given).max(initial=0) > MOST_RADIANS:
            raise DataError(
                f"angles {', '.join(self.dims)}",
                got=f"{np.abs(given).max():g}",
                expected="radians",
                fix="in degrees? say {unit: deg, to: rad} in the contract file",
            )
        # Only declared: the numbers stay as recorded.
        values = given if self.to == self.given else rotation.convert(given, self.given, self.to)
        if self.continuous and dimensions[0].kind != "delta":
            values = rotation.continuous(values, self.to)
        first = old[0] - sum(index < old[0] for index in old[1:])
        rest = [index for index in range(len(table.dimensions)) if index not in old]
        columns = table.values_TD[:, rest]
        others = [table.dimensions[index] for index in rest]
        return Table(
            (*others[:first], *dimensions, *others[first:]),
            np.concatenate([columns[:, :first], values, columns[:, first:]], axis=1),
        )

    def _described(self, old: list[Dimension]) -> tuple[Dimension, ...]:
        kinds = {dimension.kind for dimension in old}
        if len(kinds) > 1 or not kinds <= {"position", "delta"}:
            raise ConfigError(
                f"kinds of the rotation {', '.join(self.dims)}",
                got=", ".join(sorted(kinds)),
                expected="all position, or all delta",
                fix="say the kind of each in the contract file",
            )
        units = {dimension.unit for dimension in old} - {"rad", "unknown"}
        if rotation.in_radians(self.given) and units:
            raise ConfigError(
                f"unit of the rotation {', '.join(self.dims)}",
                got=", ".join(sorted(units)),
                expected="rad",
                fix="add `to: rad` to these dimensions" if units == {"deg"} else None,
            )
        unit = "rad" if rotation.in_radians(self.to) else "1"
        names = self.dims if self.to == self.given else _names(self.dims, self.to)
        return tuple(Dimension(name, unit, old[0].kind, self.to) for name in names)


@dataclass(frozen=True)
class RoleMapping:
    """What becomes of actions, or of proprioception."""

    changes: tuple[Change, ...]
    """One a column."""
    rotations: tuple[Rotate, ...] = ()
    keep: tuple[str, ...] | None = None
    """Names in the order wanted; None keeps all."""

    @property
    def recorded(self) -> tuple[Dimension, ...]:
        """The columns that come in, under the names that errors call them by."""
        return tuple(change.described for change in self.changes)

    def change(self, values_TD: np.ndarray) -> Table:
        """Scale every column, then express the rotations anew."""
        columns = [change.of(column) for change, column in zip(self.changes, values_TD.T, strict=True)]
        table = Table(
            self.recorded,
            np.stack(columns, axis=1) if columns else np.zeros((len(values_TD), 0)),
        )
        for rotate in self.rotations:
            table = rotate.of(table)
        return table

    def select(self, table: Table) -> Table:
        """Only the columns to keep, in their order."""
        if self.keep is None:
            return table
        columns = [table.names.index(name) for name in self.keep]
        return Table(tuple(table.dimensions[index] for index in columns), table.values_TD[:, columns])

    def notes(self, role: str) -> list[str]:
        """Sentences for the contract's note."""
        by_rule: dict[str, list[str]] = defaultdict(list)
        for change in self.changes:
            if change.rule:
                by_rule[change.rule].append(change.described.name)
        said = [f"{', '.join(names)} = {rule}" for rule, names in by_rule.items()]
        for rotate in self.rotations:
            continuous = rotate.continuous and rotate.to not in ("rot6d", "matrix")
            said.append(
                f"{', '.join(rotate.dims)} = "
                + (f"{rotate.given} to {rotate.to}" if rotate.to != rotate.given else rotate.to)
                + (", without jumps" if continuous else "")
            )
        return [f"{role}: {'; '.join(said)}"] if said else []


@dataclass(frozen=True)
class EmbodimentMapping:
    """All that a contract file does to the numbers of one embodiment."""

    action: RoleMapping
    proprio: RoleMapping
    action_from: dict[str, StateAction] = field(default_factory=dict)
    """Proprioception that becomes actions, by its name after mapping: these replace the recorded actions."""
    text: str = ""
    """The instruction of episodes that have none."""
    success_reward: float | None = None
    """An episode whose reward is at least this, and that says nothing else, was a success."""

    @property
    def changes_numbers(self) -> bool:
        """Whether anything but names, units and kinds changes."""
        roles = (self.action, self.proprio)
        return bool(self.action_from) or any(
            role.rotations or role.keep is not None or any(change.rule for change in role.changes)
            for role in roles
        )

    def tables(self, actions_TA: np.ndarray, proprio_TS: np.ndarray) -> tuple[Table, Table]:
        """Actions and proprioception as the dataset has them, [T, A] and [T, S] float64."""
        proprio = self.proprio.change(proprio_TS.astype(np.float64))
        if self.action_from:
            actions_TA = state_actions(proprio, self.action_from).values_TD
        action = self.action.change(actions_TA.astype(np.float64))
        return self.action.select(action), self.proprio.select(proprio)

    def mapped(self, episode: Episode) -> Episode:
        """The episode with its numbers as the dataset has them."""
        text = episode.text.strip() or self.text
        if not self.changes_numbers:
            return dataclasses.replace(episode, text=text)
        action, proprio = self.tables(episode.actions_TA, episode.proprio_TS)
        return dataclasses.replace(
            episode, actions_TA=action.values_TD, proprio_TS=proprio.values_TD, text=text
        )

    def described(self, spec: EmbodimentSpec) -> EmbodimentSpec:
        """The specification of what `mapped` gives, with all that was done in its note."""
        widths = len(spec.action), len(spec.proprio)
        action, proprio = self.tables(*(np.zeros((0, width)) for width in widths))
        for role, table in (("action", action), ("proprio", proprio)):
            if twice := next((name for name in table.names if table.names.count(name) > 1), None):
                raise ConfigError(f"two {role} dimensions of one name", got=repr(twice))
            rotation_groups(table.dimensions)
        notes = [*self.action.notes("action"), *self.proprio.notes("proprio")]
        if self.action_from:
            by_rule: dict[str, list[str]] = defaultdict(list)
            for name, rule in self.action_from.items():
                by_rule[_STATE_ACTIONS[rule]].append(name)
            notes.insert(0, "; ".join(f"{rule}: {', '.join(names)}" for rule, names in by_rule.items()))
        note = "; ".join(filter(None, (spec.note, *notes)))
        return dataclasses.replace(spec, action=action.dimensions, proprio=proprio.dimensions, note=note)


_STATE_ACTIONS: MappingType[StateAction, str] = {
    "next_state": "the action is the state of the next frame",
    "state_delta": "the action is the change of state to the next frame, in the base frame",
}


def state_actions(proprio: Table, rules: MappingType[str, StateAction]) -> Table:
    """Actions [T, A] made of states: row t is the state of frame t + 1, or the change to it.

    Of a binary state it is always the state. The last row, with no frame after it, holds its own state and
    changes by nothing. A declared rotation R becomes R[t + 1] R[t]^T. Raises DataError when an angle that is
    no declared rotation jumps by more than half a turn.
    """
    columns = [proprio.names.index(name) for name in rules]
    dimensions = [proprio.dimensions[column] for column in columns]
    states_TA = proprio.values_TD[:, columns]
    following_TA = np.concatenate([states_TA[1:], states_TA[-1:]])
    for index, (dimension, rule) in enumerate(zip(dimensions, rules.values(), strict=True)):
        if rule == "state_delta" and dimension.kind != "binary":
            dimensions[index] = dataclasses.replace(dimension, kind="delta")
    for group in rotation_groups(tuple(dimensions)):
        if dimensions[group.start].kind == "delta":
            here, there = (
                rotation.to_matrix(table[:, group.start : group.stop], group.representation)
                for table in (states_TA, following_TA)
            )
            change = rotation.from_matrix(there @ np.swapaxes(here, -1, -2), group.representation)
            following_TA[:, group.start : group.stop] = change
    changing = [d.kind == "delta" and not d.rotation for d in dimensions]
    positions = tuple(
        dataclasses.replace(d, kind="position" if delta else "unknown")
        for d, delta in zip(dimensions, changing, strict=True)
    )
    refuse_wraps(states_TA, positions, "an action by its change")
    following_TA[:, changing] -= states_TA[:, changing]
    return Table(tuple(dimensions), following_TA)


def unit_scale(unit: str, to: str, where: object) -> float:
    """How many `to` one `unit` is. Raises ConfigError when they measure different things."""
    for family in UNITS:
        if unit in family and to in family:
            return family[unit] / family[to]
    known = "; ".join(", ".join(family) for family in UNITS)
    raise ConfigError("unit conversion", where=where, got=f"{unit} to {to}", expected=f"two of {known}")


def _names(dims: tuple[str, ...], representation: str) -> tuple[str, ...]:
    """`ee_roll, ee_pitch, ee_yaw` become `ee_rot6d_0` ..., by how the first name begins."""
    head, underscore, _ = dims[0].rpartition("_")
    prefix = head + underscore
    if representation in _SUFFIXES:
        return tuple(prefix + suffix for suffix in _SUFFIXES[representation])
    return tuple(f"{prefix}{representation}_{index}" for index in range(rotation.width_of(representation)))
