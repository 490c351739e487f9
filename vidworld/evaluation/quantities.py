"""What can be read off a lab picture, kind by kind: masks, and quantities with their units.

Left out is what no single picture shows: liquid in an opaque cup, kinetic energy, paint in the brush, smoke
given off so far, whether the box was touched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vidworld.errors import ConfigError

LEAST_PIXELS = 8
"""What shows fewer pixels than this is not seen: its quantities do not count in that frame."""
UPRIGHT_RAD = 0.6
"""The yaw of a box that leans further than this says nothing."""
COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.79, 0.2, 0.16),
        "blue": (0.16, 0.33, 0.68),
        "green": (0.2, 0.55, 0.31),
        "yellow": (0.91, 0.73, 0.19),
        "purple": (0.47, 0.27, 0.6),
        "teal": (0.12, 0.55, 0.57),
    }
)
"""Of rigid objects. They are read by colour: a picture does not say which one is the target."""
PAINTS = ("red", "blue", "yellow", "green", "black", "orange", "purple")


@dataclass(frozen=True)
class Quantity:
    """One number of a frame."""

    name: str
    unit: str
    period: float | None = None
    """Values this far apart are the same: a box looks alike from both ends."""
    seen_in: str = ""
    """Mask of which the truth must show `LEAST_PIXELS`, else the frame does not count."""
    below: tuple[str, float] | None = None
    """Counts only while this quantity is below this value."""


@dataclass(frozen=True)
class Subject:
    """What is read of one kind of episode."""

    kind: str
    masks: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    items: tuple[str, ...] = ()
    """Masks of things that are alike: each has the quantities, named `<item>_<quantity>`."""
    places: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Name of a distance in metres -> the quantities that are the coordinates of the place."""

    @property
    def named(self) -> dict[str, Quantity]:
        """Full name -> quantity."""
        if not self.items:
            return {quantity.name: quantity for quantity in self.quantities}
        return {f"{item}_{one.name}": one for item in self.items for one in self.quantities}

    def seen_in(self, name: str) -> str:
        """The mask in which a quantity's subject must be seen; empty if it always counts."""
        return name.rpartition("_")[0] if self.items else self.named[name].seen_in

    @property
    def distances(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Name of a distance -> coordinates of each thing whose distances are averaged."""
        if not self.items:
            return {name: (axes,) for name, axes in self.places}
        return {
            name: tuple(tuple(f"{item}_{axis}" for axis in axes) for item in self.items)
            for name, axes in self.places
        }


def _metres(prefix: str, seen_in: str = "") -> tuple[Quantity, ...]:
    return tuple(Quantity(f"{prefix}{axis}", "m", seen_in=seen_in) for axis in "xyz")


SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        "rigid": Subject(
            "rigid",
            masks=(*COLOURS, "arm"),
            quantities=_metres(""),
            items=tuple(COLOURS),
            places=(("object_position_m", ("x", "y", "z")),),
        ),
        "container": Subject(
            "container",
            masks=("box", "arm"),
            quantities=(
                *_metres("box_", "box"),
                Quantity("box_yaw", "rad", math.pi, "box", ("box_tilt", UPRIGHT_RAD)),
                Quantity("box_tilt", "rad", seen_in="box"),
                Quantity("box_clearance_m", "m", seen_in="box"),
            ),
            places=(("box_position_m", ("box_x", "box_y", "box_z")),),
        ),
        "paint": Subject(
            "paint",
            masks=("canvas", "streak"),
            quantities=(
                Quantity("coverage", "1"),
                *(Quantity(f"coverage_{paint}", "1") for paint in PAINTS),
                Quantity("lowest_m", "m"),
            ),
        ),
        "liquid": Subject(
            "liquid",
            masks=("liquid",),
            quantities=(
                Quantity("fill", "1"),
                Quantity("received_ml", "mL"),
                Quantity("spilled_ml", "mL"),
            ),
        ),
        "smoke": Subject(
            "smoke",
            masks=("smoke",),
            quantities=(Quantity("smoke_l", "L"), *_metres("smoke_", "smoke")),
            places=(("plume_position_m", ("smoke_x", "smoke_y", "smoke_z")),),
        ),
    }
)
"""Kind of the lab -> what is read of it. Positions are in the world frame of the lab."""


def subject_of(kind: str, known: Mapping[str, Subject] = SUBJECTS, *, where: object = None) -> Subject:
    """What is read of a kind. Raises ConfigError for one that is not among those known."""
    if kind not in known:
        raise ConfigError("kind of episode to read", where=where, got=repr(kind), expected=" or ".join(known))
    return known[kind]
