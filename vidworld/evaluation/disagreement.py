"""What an evaluation says of A and E: how much is open, how much is unknown, and which scenes to collect.

Shapes: N futures of a window, T camera frames, L latent frames, V views, H W pixels, S proprio dims.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidworld.evaluation.unsure import pixel_variances
from vidworld.page import Report
from vidworld.plots import Line, Panel, draw
from vidworld.world.uncertainty import Rows

SCENES = "scenes.csv"
SCENES_SHOWN = 20


@dataclass(frozen=True)
class Spread:
    """Variances of one window's futures, means over the picture; `unknown` is None for one member."""

    open_T: np.ndarray
    unknown_T: np.ndarray | None
    error_T: np.ndarray
    """Mean squared error of the mean of all futures, against recorded frames as the tokenizer has them."""
    proprio_open_LS: np.ndarray
    proprio_unknown_LS: np.ndarray | None

    @property
    def unknown(self) -> float | None:
        """E of the whole window, as a standard deviation of pixels from 0 to 1."""
        return None if self.unknown_T is None else float(np.sqrt(max(0.0, self.unknown_T.mean())))


def spread_of(
    video_NTVHWC: np.ndarray, proprio_NLS: np.ndarray, member_N: np.ndarray, bound_TVHWC: np.ndarray
) -> Spread:
    """Part the spread of one window's futures, 2 or more of each member."""
    opened, unknown = pixel_variances(video_NTVHWC, member_N)
    rows = Rows(torch.zeros(len(member_N), dtype=torch.int64), torch.from_numpy(member_N))
    proprio = rows.split(torch.from_numpy(proprio_NLS.astype(np.float64)))
    mean_TVHWC = video_NTVHWC.mean(0, dtype=np.float32)
    return Spread(
        opened.mean((1, 2, 3)),
        None if unknown is None else unknown.mean((1, 2, 3)),
        np.square((mean_TVHWC - bound_TVHWC) / 255).mean((1, 2, 3, 4)),
        proprio.aleatoric_SX[0].numpy(),
        None if proprio.epistemic_SX is None else proprio.epistemic_SX[0].numpy(),
    )


def summarise(
    windows: Sequence[Spread], names: Sequence[tuple[str, str]], frames_per_step: int
) -> dict[str, Any]:
    """Standard deviations at each frame, roots of means over windows; `names` are those and units of S."""

    def roots(variances: Sequence[np.ndarray | None]) -> list[float] | None:
        known = [one for one in variances if one is not None]
        return np.sqrt(np.maximum(np.mean(known, 0), 0)).tolist() if known else None

    steps = len(windows[0].proprio_open_LS)
    proprio = {}
    for index, (name, unit) in enumerate(names):
        parts = [
            (
                one.proprio_open_LS[:, index],
                None if one.proprio_unknown_LS is None else one.proprio_unknown_LS[:, index],
            )
            for one in windows
        ]
        proprio[name] = {
            "unit": unit,
            "open": roots([opened for opened, _ in parts]),
            "unknown": roots([unknown for _, unknown in parts]),
        }
    return {
        "frames": list(range(1, len(windows[0].open_T) + 1)),
        "pixels": {
            "open": roots([one.open_T for one in windows]),
            "unknown": roots([one.unknown_T for one in windows]),
            "error": roots([one.error_T for one in windows]),
        },
        "proprio_frames": [(step + 1) * frames_per_step for step in range(steps)],
        "proprio": proprio,
    }


def rank(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scenes with `unknown`, what is least known first: those to collect next."""
    known = [row for row in rows if row.get("unknown") is not None]
    ordered = sorted(known, key=lambda row: -row["unknown"])
    return [{"rank": place, **row} for place, row in enumerate(ordered, 1)]


def rank_correlation(scenes: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's, of what is unknown with the error that was made: is the ranking worth following?"""
    if len(scenes) < 3:
        return None
    unknown, error = (
        np.argsort(np.argsort([scene[name] for scene in scenes])) for name in ("unknown", "error")
    )
    return float(np.corrcoef(unknown, error)[0, 1])


def scenes_csv(scenes: Sequence[Mapping[str, Any]]) -> str:
    """The ranking as a table for other tools."""
    buffer = io.StringIO()
    names = ["rank", "key", "episode_id", "start", "unknown", "open", "error"]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(scenes)
    return buffer.getvalue()


def write_spread(report: Report, robot: str, found: Mapping[str, Any]) -> None:
    """Add the section of one robot."""
    pixels = found["pixels"]
    labels = {"open": "open (aleatoric)", "unknown": "unknown (epistemic)", "error": "error of the mean"}
    lines = [
        Line(labels[name], found["frames"], curve, floor=name == "error")
        for name, curve in pixels.items()
        if curve is not None
    ]
    text = (
        "Open is what the world leaves open: the spread of samples. Unknown is what the model does not know: "
        "the disagreement of members that were trained apart, beyond what so few samples cause. Standard "
        "deviations."
    )
    report.section(f"What is open and what is unknown ({robot})", text)
    panel = Panel(tuple(lines), "Pixels", "imagined frame", "share of the range")
    report.figure(draw([panel], panel_size=(10.7, 2.6)))
    rows = [["pixels", "1", *_last(pixels)]]
    rows += [[name, one["unit"], *_last(one)] for name, one in found["proprio"].items()]
    report.table(["quantity", "unit", "open", "unknown"], rows, caption="At the last frame.", digits=4)


def write_scenes(report: Report, scenes: Sequence[Mapping[str, Any]], correlation: float | None) -> None:
    """Add the scenes that are least known."""
    text = (
        "Where members disagree most, more episodes teach most. All are in scenes.csv. Error is that of the "
        "mean of all futures, which is known here because these scenes were recorded."
    )
    if correlation is not None:
        text += f" Rank correlation of unknown with error: {correlation:.2f}."
    report.section("Which scenes to collect next", text)
    rows = [
        [scene["rank"], scene["key"], scene["start"], scene["unknown"], scene["open"], scene["error"]]
        for scene in scenes[:SCENES_SHOWN]
    ]
    report.table(["rank", "episode", "first frame", "unknown", "open", "error"], rows, digits=4)


def _last(parts: Mapping[str, Any]) -> list[float | None]:
    return [None if parts[name] is None else parts[name][-1] for name in ("open", "unknown")]
