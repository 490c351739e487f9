"""How far off a readout is on held-out true frames, beside readers that look at nothing.

Shapes: N pictures, M masks, Q quantities, H W pixels.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vidworld.evaluation.fidelity import centroid, difference
from vidworld.evaluation.lab_frames import LabFrames
from vidworld.evaluation.quantities import LEAST_PIXELS, SUBJECTS, Subject
from vidworld.evaluation.readout import PICTURES_AT_ONCE, Readout, decode_numbers

LEAST_R2, LEAST_IOU = 0.7, 0.6
"""What is read worse than this on true frames is too blunt to judge imagined ones by."""
LEAST_SPREAD = 1e-4
"""Of a quantity that varies less than this, no share of the spread is explained."""


def measure(readout: Readout, frames: LabFrames) -> dict[str, Any]:
    """Errors of a readout on true frames of one kind, for JSON.

    `quantities`: for each its unit, `mae`, `rmse`, `spread` (standard deviation of the truth), `r2`, and the
    mean absolute errors of always saying the training mean (`mae_mean`) and of holding each episode's first
    value (`mae_hold`). `masks`: `iou` (all frames together), `iou_hold` (each episode's first mask held) and
    `centre_px` (mean distance of centres where the truth shows `LEAST_PIXELS`; nothing read is a side off).
    """
    subject = SUBJECTS[frames.kind]
    inter, union, hold_inter, hold_union = (np.zeros(len(subject.masks)) for _ in range(4))
    values, away = [], []
    for start in range(0, len(frames), PICTURES_AT_ONCE):
        rows = np.arange(start, min(start + PICTURES_AT_ONCE, len(frames)))
        references = torch.from_numpy(frames.frames_NHWC[frames.first_N[rows]])
        with torch.no_grad():
            masks_NMHW, values_NQ = readout.pictures(
                torch.from_numpy(frames.frames_NHWC[rows]),
                frames.kind,
                references if readout.net.config.reference else None,
            )
        read_NMHW, true_NMHW = masks_NMHW.cpu().numpy(), frames.masks(rows)
        held_NMHW = frames.masks(frames.first_N[rows])
        values.append(values_NQ.cpu().numpy())
        inter += (read_NMHW & true_NMHW).sum((0, 2, 3))
        union += (read_NMHW | true_NMHW).sum((0, 2, 3))
        hold_inter += (held_NMHW & true_NMHW).sum((0, 2, 3))
        hold_union += (held_NMHW | true_NMHW).sum((0, 2, 3))
        distance_NM = np.linalg.norm(centroid(read_NMHW) - centroid(true_NMHW), axis=-1)
        distance_NM = np.where(read_NMHW.any((2, 3)), distance_NM, true_NMHW.shape[-1])
        away.append(np.where(true_NMHW.sum((2, 3)) >= LEAST_PIXELS, distance_NM, np.nan))
    read_NQ, away_NM = np.concatenate(values), np.concatenate(away)
    quantities = {}
    for place, (name, quantity) in enumerate(subject.named.items()):
        true_N = frames.values_NQ[:, place].astype(np.float64)
        mean = _mean_value(readout, frames.kind, place)
        quantities[name] = {
            "unit": quantity.unit,
            **_number_errors(read_NQ[:, place], true_N, true_N[frames.first_N], mean, quantity.period),
        }
    masks = {
        name: {
            "iou": _ratio(inter[place], union[place]),
            "iou_hold": _ratio(hold_inter[place], hold_union[place]),
            "centre_px": _round(_finite_mean(away_NM[:, place])),
        }
        for place, name in enumerate(subject.masks)
    }
    found: dict[str, Any] = {"quantities": quantities, "masks": masks}
    if subject.distances:
        found["distances"] = _distances(read_NQ, frames, subject)
    return found


def blunt(errors: Mapping[str, Any]) -> list[str]:
    """Quantities and masks of one kind's `measure` that are read too badly, or never vary there.

    Those of things that the held-out episodes never show are left out.
    """
    numbers = [
        name
        for name, found in errors["quantities"].items()
        if found["frames"] and (found["r2"] is None or found["r2"] < LEAST_R2)
    ]
    masks = [
        f"{name} mask"
        for name, found in errors["masks"].items()
        if found["iou"] is not None and found["iou"] < LEAST_IOU
    ]
    return numbers + masks


def _mean_value(readout: Readout, kind: str, place: int) -> float:
    """What the readout would say of a quantity if it always said the training mean."""
    subject = SUBJECTS[kind]
    nothing = torch.zeros(1, max(1, len(subject.items)), len(readout.scales[kind].mean))
    return float(decode_numbers(nothing, subject, readout.scales[kind])[0, place])


def _number_errors(
    read_N: np.ndarray, true_N: np.ndarray, first_N: np.ndarray, mean: float, period: float | None
) -> dict[str, Any]:
    counts_N = np.isfinite(true_N)
    if not counts_N.any():
        return dict.fromkeys(("mae", "rmse", "spread", "r2", "mae_mean", "mae_hold")) | {"frames": 0}
    apart_N = difference(read_N, true_N, period)[counts_N]
    from_mean_N = difference(true_N, np.full(len(true_N), mean), period)[counts_N]
    centred_N = from_mean_N - from_mean_N.mean()
    spread = float(np.sqrt(np.mean(centred_N**2)))
    held_N = np.abs(difference(first_N, true_N, period))
    return {
        "mae": _round(float(np.abs(apart_N).mean())),
        "rmse": _round(float(np.sqrt(np.mean(apart_N**2)))),
        "spread": _round(spread),
        "r2": _round(float(1 - np.mean(apart_N**2) / spread**2)) if spread > LEAST_SPREAD else None,
        "mae_mean": _round(float(np.abs(from_mean_N).mean())),
        "mae_hold": _round(_finite_mean(held_N)),
        "frames": int(counts_N.sum()),
    }


def _distances(read_NQ: np.ndarray, frames: LabFrames, subject: Subject) -> dict[str, Any]:
    """Mean distances in metres, read and held."""
    names = list(subject.named)
    found = {}
    for name, things in subject.distances.items():
        columns = [[names.index(axis) for axis in axes] for axes in things]
        true, first = frames.values_NQ, frames.values_NQ[frames.first_N]
        read = [np.linalg.norm((read_NQ - true)[:, column], axis=1) for column in columns]
        held = [np.linalg.norm((first - true)[:, column], axis=1) for column in columns]
        found[name] = {
            "unit": "m",
            "mean": _round(_finite_mean(np.stack(read))),
            "mean_hold": _round(_finite_mean(np.stack(held))),
        }
    return found


def _finite_mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _ratio(inter: float, union: float) -> float | None:
    return _round(inter / union) if union else None


def _round(value: float) -> float | None:
    """Five digits; None for what is not a number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
