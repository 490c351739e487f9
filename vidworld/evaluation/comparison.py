"""An imagined scene beside what was recorded: how far apart they are, frame by frame.

Shapes: N samples, T frames, V views, H W pixels, S proprio dims, k camera frames a latent frame.
"""

from typing import Any

import numpy as np

from vidworld import plots
from vidworld.contract import ActionContract
from vidworld.evaluation.grounding import Recording
from vidworld.evaluation.imagining import Imagined
from vidworld.evaluation.metrics import psnr

ERROR_GAIN = 3
"""How much differences are brightened to be seen."""


def compare(
    imagined: Imagined, truth: Recording, last_VHWC: np.ndarray, contract: ActionContract, fps: float
) -> dict[str, Any]:
    """PSNR of every frame (mean over views) and error of proprioception, beside holding the last known ones.

    last_VHWC: the prompt's last frame. Proprioception errors are in units of each dimension's recorded
    standard deviation, averaged over dimensions. Plain JSON.
    """
    frames = imagined.video_NTVHWC.shape[1]
    truth_TVHWC = truth.frames_TVHWC[:frames]
    model_NT = np.stack([psnr(video, truth_TVHWC).mean(-1) for video in imagined.video_NTVHWC])
    copy_T = psnr(np.broadcast_to(last_VHWC, truth_TVHWC.shape), truth_TVHWC).mean(-1)
    steps, dims = imagined.proprio_NTS.shape[1], len(contract.proprio)
    k = frames // steps
    recorded_TS = truth.proprio_TS[k - 1 : frames : k]
    scale_S = np.maximum(np.array(contract.proprio_statistics.std), 1e-9)
    error_NTS = np.abs(imagined.proprio_NTS[..., :dims] - recorded_TS) / scale_S
    held_TS = np.abs(imagined.grounded_NS[:1, :dims] - recorded_TS) / scale_S
    return {
        "time_s": _rounded((np.arange(frames) + 1) / fps),
        "psnr_db": {
            "mean": _rounded(model_NT.mean(0)),
            "least": _rounded(model_NT.min(0)),
            "most": _rounded(model_NT.max(0)),
            "last_frame_held": _rounded(copy_T),
        },
        "psnr_gain_db": round(float(model_NT.mean() - copy_T.mean()), 3),
        "proprio_time_s": _rounded((np.arange(steps) + 1) * k / fps),
        "proprio_error_std": {
            "mean": _rounded(error_NTS.mean((0, 2))),
            "last_value_held": _rounded(held_TS.mean(1)),
        },
    }


def figure(compared: dict[str, Any]) -> bytes:
    """The curves of `compare` as a PNG."""
    pictures, proprio = compared["psnr_db"], compared["proprio_error_std"]
    panels = [
        plots.Panel(
            (
                plots.Line(
                    "imagined", compared["time_s"], pictures["mean"], pictures["least"], pictures["most"]
                ),
                plots.Line("last frame held", compared["time_s"], pictures["last_frame_held"], floor=True),
            ),
            "Pictures",
            "time [s]",
            "PSNR [dB]",
        )
    ]
    if any(proprio["mean"]):
        panels.append(
            plots.Panel(
                (
                    plots.Line("imagined", compared["proprio_time_s"], proprio["mean"]),
                    plots.Line(
                        "last frame held", compared["proprio_time_s"], proprio["last_value_held"], floor=True
                    ),
                ),
                "Proprioception",
                "time [s]",
                "mean error [standard deviations]",
            )
        )
    return plots.to_png(plots.draw(panels))


def difference(video: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """What two uint8 videos differ by, brightened, as a video: black where they are equal."""
    apart = np.abs(video.astype(np.int16) - truth.astype(np.int16)) * ERROR_GAIN
    return np.minimum(apart, 255).astype(np.uint8)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
