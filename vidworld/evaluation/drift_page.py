"""What drift looks like: a figure and a table of a report, and a line for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vidworld.page import Report
from vidworld.plots import Line, Panel, draw

HOW_TO_READ = (
    "Rollouts many times longer than what was trained on, under recorded commands (of other episodes, once "
    "its own have run out). PSNR is known while the recording lasts. Background is what never moved in the "
    "recording: if it fades, the scene loses its identity. Contrast, sharpness and motion are shares of the "
    "recording's, where 1 is right: contrast towards 0 is grey, sharpness towards 0 blurred and far above 1 "
    "noisy, motion towards 0 frozen. A jump ratio well above 1 is a jump that comes back with the window."
)

RETURNED = ("psnr_turn", "psnr_return", "psnr_bound", "proprio_turn", "proprio_return")


def write_drift(report: Report, robot: str, found: Mapping[str, Any]) -> Figure:
    """Add the section of one robot; returns its figure."""
    report.section(f"Does it hold for {found['frames']} frames? ({robot})", HOW_TO_READ)
    curves, frames = found["curves"], found["frames"]
    time_T = np.arange(1, frames + 1)
    last = max((t + 1 for t, count in enumerate(found["compared"]) if count), default=1)
    pictures = (
        Line("imagined", time_T[:last], curves["psnr"][:last]),
        Line("last frame held", time_T[:last], curves["psnr_copy"][:last], floor=True),
    )
    looks = [
        Line(name, time_T, smooth(curves[f"{name}_ratio"])) for name in ("contrast", "sharpness", "motion")
    ]
    looks.append(Line("as recorded", [1, frames], [1.0, 1.0], floor=True))
    panels = [
        Panel(pictures, "Against the recording", "imagined frame", "PSNR [dB]"),
        Panel(tuple(looks), "Looks (mean of 16 frames)", "imagined frame", "imagined / recorded"),
    ]
    if any(value is not None for value in curves["background_psnr"]):
        line = Line("background", time_T, curves["background_psnr"])
        panels.insert(1, Panel((line,), "What does not move", "imagined frame", "PSNR [dB]"))
    drawn = draw(panels, columns=len(panels), panel_size=(3.9, 3.0))
    report.figure(drawn, f"Means over {found['rollouts']} rollouts.")
    end = found["end"]
    report.table(
        ["gain while recorded, dB", "background, first 16", "background, last quarter", *end, "jump ratio"],
        [
            [
                found["gain_while_recorded_db"],
                found["background_begin_db"],
                found["background_end_db"],
                *end.values(),
                found["jump_ratio"],
            ]
        ],
        caption="Contrast, sharpness and motion of the last quarter, as shares of the recording's.",
    )
    if (view := found.get("returned")) is not None:
        report.table(
            [
                "frames",
                "at the turn, dB",
                "back again, dB",
                "tokenizer, dB",
                "proprio, turn",
                "proprio, back",
            ],
            [[view[name] for name in ("frames", *RETURNED)]],
            caption="There and back within the window, by recorded commands and then the same way in "
            "reverse: imagined views and proprioception against the last known ones.",
        )
    return drawn


def drift_line(robot: str, found: Mapping[str, Any]) -> str:
    """One robot in one line for the terminal."""
    end = ", ".join(f"{name} x{value:.2f}" for name, value in found["end"].items())
    background = found["background_end_db"]
    scene = "" if background is None else f"; background {background:.1f} dB at the end"
    jump = "" if found["jump_ratio"] is None else f"; jump ratio {found['jump_ratio']:.2f}"
    view = found.get("returned")
    back = ""
    if view is not None:
        back = f"; there and back {view['psnr_turn']:.1f} -> {view['psnr_return']:.1f} dB"
    return f"{robot}, {found['frames']} frames at a stretch: ends with {end}{scene}{jump}{back}"


def smooth(values: Sequence[float | None], width: int = 16) -> np.ndarray:
    """Mean of the frames around each; unknown ones are left out of it."""
    numbers = np.array([np.nan if value is None else value for value in values], float)
    known, kernel = np.isfinite(numbers), np.ones(min(width, len(numbers)))
    count = np.convolve(known, kernel, "same")
    total = np.convolve(np.where(known, numbers, 0), kernel, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
