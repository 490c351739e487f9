"""The truth of recorded lab episodes, in the words of `quantities`: what a readout learns and is judged by.

Shapes: T frames, H W pixels.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidworld.errors import DataError
from vidworld.evaluation.dreams import is_imagined
from vidworld.evaluation.quantities import COLOURS, LEAST_PIXELS, SUBJECTS, Subject
from vidworld.lab.truth import unpack_mask

WORLD = "lab_"
"""Begins the `world` of a lab episode's source."""
OBJECT = "object"
"""Begins the names of the rigid scene's objects."""


@dataclass(frozen=True)
class Truth:
    """Masks and quantities of an episode, as they were in the simulator."""

    kind: str
    masks_THW: Mapping[str, np.ndarray]
    """Name -> bool [T, H, W]."""
    quantities_T: Mapping[str, np.ndarray]
    """Name -> float64 [T], NaN where the frame does not show it."""

    def __getitem__(self, frames: Any) -> "Truth":
        """Some of the frames."""
        return Truth(
            self.kind,
            {name: mask_THW[frames] for name, mask_THW in self.masks_THW.items()},
            {name: values_T[frames] for name, values_T in self.quantities_T.items()},
        )


def kind_of(meta: Mapping[str, Any], *, where: object) -> str:
    """The kind of lab episode that a sample's `meta.json` tells of, whoever packed it since.

    Raises DataError for an imagined episode, and for one that is not of the lab or of no kind that is read.
    """
    source = meta.get("source")
    if is_imagined(source):
        raise DataError(
            "an imagined episode",
            where=where,
            expected="true frames of the lab",
            fix="a ruler that has seen what it measures is none: make data with vidworld lab",
        )
    world = world_of(source)
    if world is None or world.removeprefix(WORLD) not in SUBJECTS:
        raise DataError(
            "episode to learn from",
            where=where,
            got=f"world {world!r}",
            expected=" or ".join(WORLD + kind for kind in SUBJECTS),
            fix="make data with vidworld lab KIND",
        )
    return world.removeprefix(WORLD)


def has_truth(meta: Mapping[str, Any]) -> bool:
    """Whether a sample carries what only a simulator knows."""
    outcome = meta.get("outcome")
    return isinstance(outcome, Mapping) and bool(outcome.get("readouts")) and bool(outcome.get("masks"))


def read_truth(meta: Mapping[str, Any], frames_THWC: np.ndarray, *, where: object) -> Truth:
    """The truth of an episode; its frames tell which colour each rigid object has.

    Raises DataError when the truth is not there, is damaged, or is of other frames than these.
    """
    kind = kind_of(meta, where=where)
    if not has_truth(meta):
        raise DataError(
            "no truth in the episode's outcome", where=where, fix="make it with vidworld lab, masks included"
        )
    subject, outcome = SUBJECTS[kind], meta["outcome"]
    readouts = {name: np.asarray(column, np.float64) for name, column in outcome["readouts"].items()}
    masks = {name: unpack_mask(packed) for name, packed in outcome["masks"].items()}
    count, height, width = frames_THWC.shape[:3]
    for what, shape, expected in (
        *((f"readout {name!r}", column.shape, (count,)) for name, column in readouts.items()),
        *((f"mask {name!r}", mask.shape, (count, height, width)) for name, mask in masks.items()),
    ):
        if shape != expected:
            raise DataError(
                f"shape of {what}",
                where=where,
                got=shape,
                expected=expected,
                fix="use the dataset that vidworld lab wrote, neither resized nor thinned out",
            )
    if subject.items:
        readouts, masks = _by_colour(readouts, masks, frames_THWC)
    for name in (*subject.masks, *subject.named):
        if name not in masks and name not in readouts:
            raise DataError(
                f"no {name!r} in the truth", where=where, fix="it was made by another version of the lab"
            )
    seen = {name: masks[name].sum((1, 2)) >= LEAST_PIXELS for name in subject.masks}
    return Truth(
        kind,
        {name: masks[name] for name in subject.masks},
        {name: _counted(name, subject, readouts, seen) for name in subject.named},
    )


def world_of(source: Any) -> str | None:
    """`world` of an episode's source, or of what that says it was made of; None if it says neither."""
    while isinstance(source, Mapping):
        if isinstance(source.get("world"), str):
            return source["world"]
        source = source.get("origin")
    return None


def _counted(
    name: str, subject: Subject, readouts: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray]
) -> np.ndarray:
    values_T = readouts[name].copy()
    if mask := subject.seen_in(name):
        values_T[~seen[mask]] = np.nan
    if below := subject.named[name].below:
        values_T[readouts[below[0]] >= below[1]] = np.nan
    return values_T


def _by_colour(
    readouts: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], frames_THWC: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Masks and places of rigid objects by their colours; those of absent colours are empty and NaN."""
    names = sorted(name for name in masks if name.startswith(OBJECT))
    colour_of = dict(zip(names, colours([masks[name] for name in names], frames_THWC), strict=True))
    nothing_THW = np.zeros(frames_THWC.shape[:3], bool)
    found_masks = dict.fromkeys(COLOURS, nothing_THW) | {
        name: mask for name, mask in masks.items() if name not in colour_of
    }
    found = {f"{colour}_{axis}": np.full(len(frames_THWC), np.nan) for colour in COLOURS for axis in "xyz"}
    for name, colour in colour_of.items():
        found_masks[colour] = masks[name]
        found |= {f"{colour}_{axis}": readouts[f"{name}_{axis}"] for axis in "xyz"}
    return found, found_masks


def colours(masks_THW: Sequence[np.ndarray], frames_THWC: np.ndarray) -> list[str]:
    """The colour of each object of a scene, all different: the assignment nearest in chromaticity.

    One that is never seen takes a colour that is left.
    """
    palette = np.array([np.array(rgb) / sum(rgb) for rgb in COLOURS.values()])
    distance_NC = np.zeros((len(masks_THW), len(COLOURS)))
    for row_C, mask_THW in zip(distance_NC, masks_THW, strict=True):
        if mask_THW.any():
            rgb = frames_THWC[mask_THW].astype(np.float64).mean(0)
            row_C[:] = np.linalg.norm(palette - rgb / max(rgb.sum(), 1e-6), axis=1)
    best = min(
        itertools.permutations(range(len(COLOURS)), len(masks_THW)),
        key=lambda order: sum(distance_NC[index, colour] for index, colour in enumerate(order)),
    )
    return [tuple(COLOURS)[index] for index in best]
