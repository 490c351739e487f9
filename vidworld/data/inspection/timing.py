"""Clocks: a rate other than the declared one, and pauses in the recording."""

from collections.abc import Iterator

import numpy as np

from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.survey import Survey

RATE_TOLERANCE = 0.05
"""At 5 % a clip of 16 frames is off by most of a frame. Jitter does not count: the median step does."""
PAUSE = 5.0
"""Steps of a jittering clock reach three periods (CR5: 0.31 s at 10 Hz); beyond five, frames are missing."""


def rate(survey: Survey) -> Iterator[Finding]:
    """The median step of the recorded clock against the declared rate."""
    declared = survey.manifest.fps
    for contract in survey.manifest.contracts:
        medians = [
            float(np.median(np.diff(look.timestamps_T)))
            for look in survey.of(contract.embodiment)
            if len(look.timestamps_T) > 1
        ]
        if medians and abs((step := float(np.median(medians))) * declared - 1) > RATE_TOLERANCE:
            measured = f"{1 / step:.4g} frames/s by the recorded clock" if step > 0 else "a clock that stands"
            yield Finding(
                "wrong fps",
                "the recorded clock runs at another rate",
                f"embodiment {contract.embodiment!r}",
                measured,
                f"the declared {declared:g}",
                "correct the rate in the source, so that velocities and rollouts have the right speed",
            )


def pauses(survey: Survey) -> Iterator[Finding]:
    """Steps of the clock that are far longer than a frame: frames were dropped there."""
    for contract in survey.manifest.contracts:
        found = []
        for look in survey.of(contract.embodiment):
            steps = np.diff(look.timestamps_T) * survey.manifest.fps
            if len(steps) and steps.max() > PAUSE:
                row = look.start + int(steps.argmax()) + 1
                found.append(f"{look.sample.episode_id} at row {row} ({steps.max():.0f} frames long)")
        if found:
            yield Finding(
                "pauses",
                "pauses in the recording",
                f"embodiment {contract.embodiment!r}",
                named(found, 3),
                f"steps of at most {PAUSE:g} frames",
                "split these episodes there: one action cannot stand for the time that is missing",
            )
