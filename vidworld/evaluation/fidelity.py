"""How far readings are from the truth, frame by frame and by horizon: what skill is made of.

Errors are in the quantity's unit, distances in metres, centres of masks in pixels, masks as 1 - IoU. A frame
that does not count (the truth shows nothing to read) is NaN and is left out of every mean.

Shapes: any leading axes, T frames, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.errors import DataError
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.quantities import LEAST_PIXELS, SUBJECTS

if TYPE_CHECKING:
    from vidworld.evaluation.readout import Readings

IOU, CENTRE = "_iou_error", "_centre_px"


def difference(read: np.ndarray, truth: np.ndarray, period: float | None = None) -> np.ndarray:
    """read - truth, for a periodic quantity the one nearest to zero."""
    apart = np.asarray(read, np.float64) - truth
    return apart if period is None else (apart + period / 2) % period - period / 2


def iou(read: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of bool masks [..., H, W] -> [...]; NaN where both are empty."""
    both, either = (read & truth).sum((-2, -1)), (read | truth).sum((-2, -1))
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def centroid(mask: np.ndarray) -> np.ndarray:
    """Centre [..., 2] of bool masks [..., H, W]: x right, y down, pixel centres at .5; NaN where empty."""
    height, width = mask.shape[-2:]
    rows, columns = mask.sum(-1), mask.sum(-2)
    count = rows.sum(-1)
    x, y = columns @ (np.arange(width) + 0.5), rows @ (np.arange(height) + 0.5)
    return np.where(count > 0, np.stack([x, y]) / np.maximum(count, 1), np.nan).transpose(
        *range(1, mask.ndim - 1), 0
    )


def frame_errors(readings: "Readings", truth: Truth) -> dict[str, np.ndarray]:
    """Errors [..., T] of readings [..., T] against the truth of the same frames.

    Names: each quantity; each distance of the subject (mean over its things); `<mask>_iou_error` and
    `<mask>_centre_px`. A mask that is read empty where the truth shows something is a whole picture's side
    off. Raises DataError for readings of another kind or number of frames.
    """
    if readings.kind != truth.kind:
        raise DataError("kind of the readings", got=readings.kind, expected=truth.kind)
    read_frames = next(iter(readings.quantities.values())).shape[-1]
    frames = len(next(iter(truth.quantities_T.values())))
    if read_frames != frames:
        raise DataError("frames of the readings", got=read_frames, expected=f"{frames}, as the truth")
    subject = SUBJECTS[truth.kind]
    apart = {
        name: difference(readings.quantities[name], truth.quantities_T[name], quantity.period)
        for name, quantity in subject.named.items()
    }
    errors = {name: np.abs(value) for name, value in apart.items()}
    for name, things in subject.distances.items():
        distances = [np.linalg.norm([apart[axis] for axis in axes], axis=0) for axes in things]
        errors[name] = _mean(np.stack(distances), 0)
    for name, true_THW in truth.masks_THW.items():
        read = readings.masks[name]
        errors[name + IOU] = 1 - iou(read, np.broadcast_to(true_THW, read.shape))
        away = np.linalg.norm(centroid(read) - centroid(true_THW), axis=-1)
        seen_T = true_THW.sum((-2, -1)) >= LEAST_PIXELS
        away = np.where(read.any((-2, -1)), away, true_THW.shape[-1])
        errors[name + CENTRE] = np.where(seen_T, away, np.nan)
    return errors


def hold(readings: "Readings", frame: int, frames: int) -> "Readings":
    """The copy-last-frame baseline: what was read at one frame, for as many frames as asked."""
    masks = {
        name: np.repeat(mask[..., frame, None, :, :], frames, -3) for name, mask in readings.masks.items()
    }
    values = {name: np.repeat(row[..., frame, None], frames, -1) for name, row in readings.quantities.items()}
    return type(readings)(readings.kind, masks, values)


def horizon_errors(episodes: Sequence[Mapping[str, np.ndarray]], horizons: Sequence[int]) -> dict[str, Any]:
    """Mean errors at chosen frames of the horizon, counted from 1, over episodes and samples; for JSON.

    `episodes`: for each, errors [..., T] of the frames after the context. Gives `horizons`, and for each name
    `mean` and `episodes` (how many count), lists in the order of the horizons; None where none counts.
    """
    if not episodes or not horizons or min(horizons) < 1:
        raise ValueError(f"{len(episodes)} episodes at frames {list(horizons)}; the first frame is 1")
    table: dict[str, Any] = {"horizons": list(horizons)}
    for name in episodes[0]:
        means, counts = [], []
        for horizon in horizons:
            at = [
                float(_mean(episode[name][..., horizon - 1].reshape(-1), 0))
                for episode in episodes
                if episode[name].shape[-1] >= horizon
            ]
            known = [value for value in at if np.isfinite(value)]
            counts.append(len(known))
            means.append(float(np.mean(known)) if known else None)
        table[name] = {"mean": means, "episodes": counts}
    return table


def skill(model: Mapping[str, Any], baseline: Mapping[str, Any], oracle: Mapping[str, Any]) -> dict[str, Any]:
    """(baseline error - model error) / (baseline error - oracle error) of three `horizon_errors`.

    1 is as good as the true simulator with hidden values drawn anew, 0 as good as holding the last frame;
    None where the oracle is no better than the baseline, so that there is nothing to predict.
    """

    def share(m: float | None, b: float | None, o: float | None) -> float | None:
        return None if m is None or b is None or o is None or b <= o else (b - m) / (b - o)

    table: dict[str, Any] = {"horizons": list(model["horizons"])}
    for name in (name for name in model if name != "horizons"):
        columns = (table_of[name]["mean"] for table_of in (model, baseline, oracle))
        table[name] = [share(*row) for row in zip(*columns, strict=True)]
    return table


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0).sum(axis) / np.maximum(count, 1), np.nan)
