"""What happens in a frame: contact, moving or static; calibration is told apart by it.

A mean over all frames hides that most of them are easy. Shapes: T frames, V views, H W pixels, S proprio
dims.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vidworld.contract import Statistics
from vidworld.evaluation.lab_truth import WORLD, world_of

STRATA = ("contact", "moving", "static")
CONTACT, MOVING, STATIC = range(3)
PIXEL_CHANGE = 16
"""A pixel changes from one frame to the next if a channel does by more than this, of 255."""
PIXEL_SHARE = 0.002
"""A frame moves if more than this share of the pixels of any view changes ..."""
PROPRIO_SHARE = 0.01
"""... or a dimension of proprioception does by more than this share of its range (1 % to 99 %)."""
OBJECT_M = 0.001
"""A rigid object that goes further than this in a frame is in contact."""
FLOWING_ML = 0.2
"""So is a liquid of which more than this changes place, between cup, glass and table, in a frame."""


def kind_of_lab(meta: Mapping[str, Any]) -> str | None:
    """Kind of the lab that an episode is of, None for other logs."""
    world = world_of(meta.get("source"))
    return world.removeprefix(WORLD) if world is not None and world.startswith(WORLD) else None


def contact(meta: Mapping[str, Any]) -> np.ndarray | None:
    """Whether the robot and what it acts on touch, in each frame of an episode, bool [T]; None if unknown.

    From the truth that the lab stores: a box from its first touch on (only then what is hidden takes part),
    rigid objects while one moves, paint while the canvas takes some up, a liquid while it flows. Smoke is not
    touched.
    """
    outcome = meta.get("outcome")
    readouts = outcome.get("readouts") if isinstance(outcome, Mapping) else None
    if not isinstance(readouts, Mapping) or not readouts:
        return None
    columns = {name: np.asarray(column, np.float64) for name, column in readouts.items()}

    def changed(name: str, least: float) -> np.ndarray:
        return np.abs(np.diff(columns[name], prepend=columns[name][:1])) > least

    match kind_of_lab(meta):
        case "container":
            return columns["touched"] > 0.5
        case "rigid":
            places = [name for name in columns if name.startswith("object")]
            return np.any([changed(name, OBJECT_M) for name in places], axis=0)
        case "paint":
            return changed("canvas_ml", 0.0)
        case "liquid":
            return np.any(
                [changed(name, FLOWING_ML) for name in ("received_ml", "cup_ml", "spilled_ml")], axis=0
            )
        case "smoke":
            return np.zeros(len(columns["smoke_l"]), bool)
        case _:
            return None


def strata(
    frames_TVHWC: np.ndarray,
    proprio_TS: np.ndarray,
    statistics: Statistics,
    contact_T: np.ndarray | None = None,
) -> np.ndarray:
    """Indices into `STRATA` of all frames but the first, which only says what was before; int [T - 1].

    Pictures are uint8; `contact_T` is of the same T frames. Contact where it is known, else moving where the
    pictures or the proprioception change from the frame before, else static.
    """
    change_TVHW = np.abs(np.diff(frames_TVHWC.astype(np.int16), axis=0)).max(-1) > PIXEL_CHANGE
    moving_T = (change_TVHW.mean((-2, -1)) > PIXEL_SHARE).any(-1)
    if proprio_TS.shape[-1]:
        range_S = np.asarray(statistics.q99) - np.asarray(statistics.q01)
        step_TS = np.abs(np.diff(proprio_TS.astype(np.float64), axis=0))
        moving_T |= (step_TS > PROPRIO_SHARE * np.maximum(range_S, 1e-9)).any(-1)
    found_T = np.where(moving_T, MOVING, STATIC)
    return found_T if contact_T is None else np.where(contact_T[1:], CONTACT, found_T)
