"""The action contract: what each number of an action and of proprioception means, and how it is scaled.

It is written into every dataset, travels into every checkpoint, and refuses data, actions or policies
that do not match it. Training and rollout scale with the same two numbers a dimension, taken from here.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from vidworld.config import digest, from_mapping, to_mapping
from vidworld.errors import ContractError

Kind = Literal["position", "velocity", "delta", "binary", "force", "unknown"]

# A command may leave the recorded range by this share of it before it is refused: enough for a bolder
# policy, too little for raw degrees in place of radians or normalised values in place of raw ones.
RANGE_MARGIN = 0.5
LEAST_SHARE_OF_RANGE = 0.2


@dataclass(frozen=True)
class Dimension:
    """One number of an action or of proprioception."""

    name: str
    unit: str = "unknown"
    """SI unit such as `rad`, `rad/s`, `m`; `1` for a ratio; `unknown` when the source does not say."""
    kind: Kind = "unknown"
    rotation: str = dataclasses.field(default="", metadata={"omit_default": True})
    """The representation, such as `rot6d`, of a rotation that this and its neighbours make up together."""


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics over all training frames, in the dimensions' own units."""

    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, values_TD: np.ndarray) -> "Statistics":
        """Measure rows of finite values [T, D]."""
        values = np.asarray(values_TD, dtype=np.float64)
        if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
            raise ContractError(
                "statistics", got=f"shape {values.shape}", expected="finite rows [T, D], T > 0"
            )

        def floats(row: np.ndarray) -> tuple[float, ...]:
            return tuple(float(value) for value in row)

        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(
            minimum=floats(values.min(0)),
            maximum=floats(values.max(0)),
            mean=floats(values.mean(0)),
            std=floats(values.std(0)),
            q01=floats(q01),
            q99=floats(q99),
            count=len(values),
        )

    def pooled(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets of rows together.

        All exact but the quantiles, which their parts do not tell: theirs are the outer ones of the two, so
        that no row of either set is scaled further out than it was alone.
        """
        count = self.count + other.count
        share = other.count / count
        mean = np.array(self.mean) + share * (np.array(other.mean) - self.mean)
        spread = (1 - share) * np.square(self.std) + share * np.square(other.std)
        between = share * (1 - share) * np.square(np.array(other.mean) - self.mean)
        outer = {"minimum": min, "maximum": max, "q01": min, "q99": max}
        return Statistics(
            mean=tuple(map(float, mean)),
            std=tuple(map(float, np.sqrt(spread + between))),
            count=count,
            **{
                name: tuple(map(choose, getattr(self, name), getattr(other, name)))
                for name, choose in outer.items()
            },
        )


@dataclass(frozen=True)
class ActionContract:
    """One embodiment: a robot in one control mode.

    `actions[t]` is the command that takes frame t to frame t+1, so N actions go with N+1 frames.
    """

    embodiment: str
    rate_hz: float
    """Actions per second; one action per frame."""
    action: tuple[Dimension, ...]
    proprio: tuple[Dimension, ...]
    action_statistics: Statistics
    proprio_statistics: Statistics
    control_frame: str = "unknown"
    """The frame of reference of the command: `joint`, `base`, `end_effector`, or `unknown`."""
    note: str = ""
    """What a user should know, such as measured velocities standing in for commands."""

    def __post_init__(self) -> None:
        # An int rate would change the digest after a trip through JSON.
        object.__setattr__(self, "rate_hz", float(self.rate_hz))
        for role, dimensions, statistics in (
            ("action", self.action, self.action_statistics),
            ("proprio", self.proprio, self.proprio_statistics),
        ):
            if len(dimensions) != len(statistics.mean):
                raise ContractError(
                    f"{role} statistics of embodiment {self.embodiment!r}",
                    got=f"{len(statistics.mean)} dimensions",
                    expected=f"{len(dimensions)} ({', '.join(d.name for d in dimensions)})",
                )

    @cached_property
    def digest(self) -> str:
        """Short hash over names, units, kinds, rate and statistics."""
        return digest(self)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values that `from_mapping` reads back to an equal contract."""
        return to_mapping(self)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: object = "the contract") -> "ActionContract":
        """Read what `to_mapping` wrote."""
        return from_mapping(cls, mapping, where=where)

    @property
    def action_scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale [A] float32: normalised = (action - offset) / scale."""
        return _scaling(self.action, self.action_statistics)

    @property
    def proprio_scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale [S] float32: normalised = (proprio - offset) / scale."""
        return _scaling(self.proprio, self.proprio_statistics)

    @property
    def accepted_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest action [A] that `check_actions` lets through: half the recorded range more."""
        low, high = np.array(self.action_statistics.minimum), np.array(self.action_statistics.maximum)
        margin = RANGE_MARGIN * (high - low) + 1e-6 + 1e-3 * np.maximum(np.abs(low), np.abs(high))
        return low - margin, high + margin

    def constant_actions(self) -> list[str]:
        """Names of action dimensions that never changed in the data: the model cannot know their effect."""
        low, high = self.action_statistics.minimum, self.action_statistics.maximum
        return [d.name for d, a, b in zip(self.action, low, high, strict=True) if a == b]

    def check_actions(
        self,
        actions: np.ndarray,
        *,
        where: object = "actions",
        rate_hz: float | None = None,
        allow_out_of_range: bool = False,
    ) -> None:
        """Refuse actions [..., A] in raw units that this embodiment cannot have meant.

        Raises ContractError naming the dimension: wrong count, not finite, outside the recorded range by more
        than half of it, or recorded at another rate.
        """
        _check(self.action, actions, where, self.embodiment, "action")
        if rate_hz is not None and abs(rate_hz - self.rate_hz) > 0.02 * self.rate_hz:
            raise ContractError(
                "action rate",
                where=where,
                got=f"{rate_hz:g} Hz",
                expected=f"{self.rate_hz:g} Hz for embodiment {self.embodiment!r}",
                fix="resample the actions",
            )
        if not allow_out_of_range:
            self._check_range(np.asarray(actions), where)

    def check_proprio(self, proprio: np.ndarray, *, where: object = "proprio") -> None:
        """Refuse proprioception [..., S] of the wrong width or with values that are not finite."""
        _check(self.proprio, proprio, where, self.embodiment, "proprio")

    def require_equal(self, other: "ActionContract", *, where: object) -> None:
        """Refuse another contract, naming the first thing that differs."""
        if self.digest == other.digest:
            return
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                raise ContractError(
                    f"{field.name} of embodiment {self.embodiment!r}",
                    where=where,
                    got=_brief(theirs),
                    expected=_brief(mine),
                    fix="use the dataset that the checkpoint was trained on, or train anew",
                )

    def require_same_robot(self, other: "ActionContract", *, where: object) -> None:
        """Refuse a contract whose numbers mean something else; statistics and notes may differ."""
        own = {}
        for role in ("action", "proprio"):
            if len(getattr(self, role)) == len(getattr(other, role)):
                own[f"{role}_statistics"] = getattr(self, f"{role}_statistics")
        self.require_equal(dataclasses.replace(other, note=self.note, **own), where=where)

    def pooled(self, other: "ActionContract") -> "ActionContract":
        """The contract of both datasets of one robot together; `require_same_robot` must hold."""
        return dataclasses.replace(
            self,
            action_statistics=self.action_statistics.pooled(other.action_statistics),
            proprio_statistics=self.proprio_statistics.pooled(other.proprio_statistics),
        )

    def _check_range(self, actions: np.ndarray, where: object) -> None:
        lowest, highest = self.accepted_range
        wrong = (actions < lowest) | (actions > highest)
        if not wrong.any():
            return
        *rows, dimension = (int(index[0]) for index in np.nonzero(wrong))
        named = self.action[dimension]
        low, high = self.action_statistics.minimum[dimension], self.action_statistics.maximum[dimension]
        raise ContractError(
            f"action {named.name!r} out of range at step {rows[-1] if rows else 0}",
            where=where,
            got=f"{float(actions[(*rows, dimension)]):.4g} {named.unit}",
            expected=f"{low:.4g} to {high:.4g} {named.unit} (as recorded, +- half)",
            fix="give raw commands in the contract's units, or pass --allow-out-of-range",
        )


def _scaling(dimensions: Sequence[Dimension], statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles 1 % and 99 % go to -1 and 1; a binary 0 and 1 too; a constant dimension keeps scale 1.

    A dimension that hardly ever moves has both quantiles near one value: its scale is at least a fifth of the
    full half range, so that nothing recorded leaves [-10, 10].
    """
    low, high = np.array(statistics.q01), np.array(statistics.q99)
    binary = np.array([dimension.kind == "binary" for dimension in dimensions], dtype=bool)
    low, high = np.where(binary, 0.0, low), np.where(binary, 1.0, high)
    full = (np.array(statistics.maximum) - np.array(statistics.minimum)) / 2
    scale = np.maximum((high - low) / 2, LEAST_SHARE_OF_RANGE * full)
    constant = scale <= 1e-8
    return ((low + high) / 2).astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _check(
    dimensions: Sequence[Dimension], values: np.ndarray, where: object, embodiment: str, role: str
) -> None:
    values = np.asarray(values)
    if values.dtype.kind not in "fiu":
        raise ContractError(f"{role} dtype", where=where, got=values.dtype, expected="a float array")
    if values.ndim == 0 or values.shape[-1] != len(dimensions):
        raise ContractError(
            f"{role} dimensions",
            where=where,
            got=f"shape {values.shape}",
            expected=f"{len(dimensions)} in the last axis for embodiment {embodiment!r} "
            f"({', '.join(d.name for d in dimensions)})",
        )
    finite = np.isfinite(values)
    if not finite.all():
        *rows, dimension = (int(index[0]) for index in np.nonzero(~finite))
        raise ContractError(
            f"{role} {dimensions[dimension].name!r} not finite at step {rows[-1] if rows else 0}",
            where=where,
            got=values[(*rows, dimension)],
            expected="finite numbers",
        )


def warn_constant(contract: ActionContract) -> None:
    """Say once which action dimensions never move in the data."""
    names = contract.constant_actions()
    if names:
        warnings.warn(
            f"embodiment {contract.embodiment!r}: action {', '.join(names)} never changes in the data; "
            "it is kept with scale 1 and the model cannot learn its effect",
            stacklevel=2,
        )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
