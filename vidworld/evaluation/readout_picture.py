"""Readings to look at: masks over the pictures they were read from, and numbers over time."""

from collections.abc import Mapping

import numpy as np

from vidworld import media, plots
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.quantities import SUBJECTS
from vidworld.evaluation.readout import Readings

TINTS: Mapping[str, tuple[int, int, int]] = {
    "arm": (255, 255, 255),
    "canvas": (255, 255, 255),
    "streak": (0, 230, 255),
}
SUBJECT = (255, 64, 160)
"""Of every other mask."""
OUTLINED = ("arm", "canvas")
"""Masks of surroundings: their outline says enough."""
TINT = 0.35
HEIGHT = 192
COLUMNS = 6
MOST_PANELS = 9


def tint(frames_THWC: np.ndarray, masks_THW: Mapping[str, np.ndarray], *, scale: int = 1) -> np.ndarray:
    """Frames with masks tinted and outlined, each in its own colour, enlarged `scale` times."""
    out_THWC = frames_THWC.repeat(scale, 1).repeat(scale, 2).astype(np.float32)
    for name, mask_THW in masks_THW.items():
        large_THW = mask_THW.repeat(scale, 1).repeat(scale, 2)
        colour = np.array(TINTS.get(name, SUBJECT), np.float32)
        share_THW = np.where(edges(large_THW), 0.9, 0.0 if name in OUTLINED else TINT) * large_THW
        out_THWC += share_THW[..., None] * (colour - out_THWC)
    return out_THWC.round().astype(np.uint8)


def edges(mask_THW: np.ndarray) -> np.ndarray:
    """Pixels of a mask beside one that is not in it; the picture's border is no edge."""
    wide = np.pad(mask_THW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    inner = wide[:, :-2, 1:-1] & wide[:, 2:, 1:-1] & wide[:, 1:-1, :-2] & wide[:, 1:-1, 2:]
    return mask_THW & ~inner


def strip(frames_THWC: np.ndarray, readings: Readings, truth: Truth | None) -> np.ndarray:
    """A film strip of one clip: pictures, what was read, what was true."""
    rows = {"picture": frames_THWC, "read": tint(frames_THWC, readings.masks)}
    if truth is not None:
        rows["true"] = tint(frames_THWC, truth.masks_THW)
    count = len(frames_THWC)
    times = np.unique(np.linspace(0, count - 1, min(COLUMNS, count)).round().astype(int))
    return media.strip(rows, times.tolist(), height=HEIGHT)


def curves(readings: Readings, truth: Truth | None, fps: float) -> bytes:
    """A PNG of the quantities of one clip over time, those that count in the truth first."""
    panels = []
    for name, quantity in SUBJECTS[readings.kind].named.items():
        read_T = readings.quantities[name]
        time_s = np.arange(len(read_T)) / fps
        lines = [plots.Line("read", time_s, read_T)]
        true_T = None if truth is None else truth.quantities_T[name]
        if true_T is not None:
            if not np.isfinite(true_T).any() or not (true_T.any() or np.abs(read_T).max() > 0.02):
                continue
            lines.append(plots.Line("true", time_s, true_T))
        unit = "" if quantity.unit == "1" else f" [{quantity.unit}]"
        panels.append(plots.Panel(tuple(lines), name, "time [s]", f"value{unit}"))
    figure = plots.draw(panels[:MOST_PANELS], columns=3, panel_size=(3.6, 2.2))
    return plots.to_png(figure)
