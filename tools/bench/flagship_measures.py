"""Measures of imagined episodes that need no ruler: PSNR, SSIM, LPIPS, and the pixels that move.

Shapes: M samples, T frames at the horizons, H W pixels, C channels, A action dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vidworld.evaluation.futures import through_tokenizer
from vidworld.evaluation.grounding import Grounding
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.metrics import psnr, ssim
from vidworld.evaluation.oracle import Recorded
from vidworld.world.world import WorldModel

MOVED = 16 / 255
"""A pixel moves if a channel differs from the last known frame by more than this."""
LEAST_MOVED = 0.002
"""Share of a picture that must have moved for its moving pixels to be judged."""


@dataclass(frozen=True)
class Case:
    """One held-out episode with all that is compared."""

    key: str
    grounding: Grounding
    truth: Truth
    """At the horizons."""
    frames_THWC: np.ndarray
    """True frames at the horizons."""
    last_HWC: np.ndarray
    """The last known frame."""
    recorded: Recorded

    @property
    def actions_TA(self) -> np.ndarray:
        """Commands after the context."""
        assert self.grounding.recording is not None
        return self.grounding.recording.actions_TA


@dataclass(frozen=True)
class Imagined:
    """What a world makes of a case."""

    frames_MTHWC: np.ndarray
    """At the horizons."""
    shuffled_THWC: np.ndarray
    """Sample 0 under the commands of another episode."""
    video_THWC: np.ndarray
    """All frames of sample 0."""


def picture_rows(
    kind: str,
    world: WorldModel,
    cases: Sequence[Case],
    imagined: Sequence[Imagined],
    horizons: Sequence[int],
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    prefix: str = "flagship",
) -> dict[str, tuple[float, str]]:
    """PSNR, SSIM and LPIPS, beside the last frame held and the tokenizer; the ratio of wrong commands."""
    count = len(cases)
    values: dict[str, list[np.ndarray]] = {}
    wrong, right = [], []
    for case, found in zip(cases, imagined, strict=True):
        true_THWC = case.frames_THWC
        bound_THWC = through_tokenizer(world, true_THWC[:, None])[1][:, 0]
        held_THWC = np.broadcast_to(case.last_HWC, true_THWC.shape)
        for who, frames_MTHWC in (
            ("", found.frames_MTHWC),
            (".held", held_THWC[None]),
            (".bound", bound_THWC[None]),
        ):
            true_MTHWC = np.broadcast_to(true_THWC, frames_MTHWC.shape)
            values.setdefault(f"psnr{who}", []).append(psnr(frames_MTHWC, true_MTHWC).mean(0))
            values.setdefault(f"ssim{who}", []).append(ssim(frames_MTHWC, true_MTHWC).mean(0))
            values.setdefault(f"psnr_moving{who}", []).append(
                moving_psnr(frames_MTHWC, true_THWC, case.last_HWC)
            )
            if perceptual is not None:
                values.setdefault(f"lpips{who}", []).append(perceptual(frames_MTHWC, true_MTHWC))
        wrong.append(square_error(found.shuffled_THWC, true_THWC))
        right.append(square_error(found.frames_MTHWC[0], true_THWC))
    units = {"psnr": "dB", "psnr_moving": "dB, of pixels that move", "ssim": "1", "lpips": "1"}
    rows = {
        f"{prefix}.{name}.{kind}.h{horizon}": (
            float(np.nanmean(column)),
            f"{units[name.partition('.')[0]]}, {int(np.isfinite(column).sum())} episodes",
        )
        for name, per_episode in values.items()
        for horizon, column in zip(horizons, np.array(per_episode).T, strict=True)
        if np.isfinite(column).any()
    }
    ratio = float(np.mean(wrong) / np.mean(right))
    return rows | {f"{prefix}.shuffle_ratio.{kind}": (ratio, f"1, frames {horizons}, {count} episodes")}


def moving_psnr(frames_MTHWC: np.ndarray, true_THWC: np.ndarray, last_HWC: np.ndarray) -> np.ndarray:
    """PSNR [T] over what differs in truth from the last known frame; NaN where hardly anything does."""
    square_T = moving_error(frames_MTHWC, true_THWC, last_HWC).mean(0)
    return -10 * np.log10(np.maximum(square_T, 1e-10))


def moving_error(frames_MTHWC: np.ndarray, true_THWC: np.ndarray, last_HWC: np.ndarray) -> np.ndarray:
    """Mean squared error [M, T] over what differs in truth from the last known frame, or NaN as above."""
    truth = true_THWC / 255.0
    moves_THW = (np.abs(truth - last_HWC / 255.0) > MOVED).any(axis=-1)
    square_MTHW = np.square(frames_MTHWC / 255.0 - truth).mean(-1)
    count_T = moves_THW.sum((1, 2))
    mean_MT = (square_MTHW * moves_THW).sum((2, 3)) / np.maximum(count_T, 1)
    return np.where(count_T >= LEAST_MOVED * np.prod(true_THWC.shape[1:3]), mean_MT, np.nan)


def square_error(frames_THWC: np.ndarray, true_THWC: np.ndarray) -> float:
    """Mean over pixels and frames."""
    return float(np.square(frames_THWC / 255.0 - true_THWC / 255.0).mean())
