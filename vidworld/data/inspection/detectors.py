"""The list of detectors, in the order in which they speak. docs/inspect.md says what each means."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vidworld.data.inspection import constant, episodes, lag, pictures, ranges, rotations, timing
from vidworld.data.inspection.finding import Finding
from vidworld.data.inspection.survey import Survey


@dataclass(frozen=True)
class Detector:
    """One kind of fault. `reads`: it needs episodes; without any it is silent."""

    name: str
    asks: str
    run: Callable[[Survey], Iterator[Finding]]
    reads: bool
    pixels: bool = False
    """Whether it judges pictures, which latents are not."""


DETECTORS = (
    Detector("not finite", "Are all numbers finite?", ranges.not_finite, reads=True),
    Detector("action lag", "Does motion follow its action at once?", lag.action_lag, reads=True),
    Detector(
        "sign and scale", "Does it move as far, and the way, that was asked?", lag.sign_and_scale, reads=True
    ),
    Detector("video lag", "Do pictures and states go together?", lag.video_lag, reads=True),
    Detector("dark camera", "Do all cameras see something?", pictures.dark, reads=True, pixels=True),
    Detector("frozen video", "Is every frame a new picture?", pictures.frozen, reads=True),
    Detector("same views", "Are the cameras different ones?", pictures.same_views, reads=True, pixels=True),
    Detector("wrong fps", "Does the recorded clock agree with the rate?", timing.rate, reads=True),
    Detector("pauses", "Are there frames missing in between?", timing.pauses, reads=True),
    Detector("gripper and constants", "Does every number change?", constant.constant, reads=False),
    Detector("hardly moves", "Is every number in regular use?", constant.hardly, reads=False),
    Detector("units", "Are values possible in their unit?", ranges.units, reads=False),
    Detector("binary", "Are binary numbers 0 or 1?", ranges.binary, reads=False),
    Detector("normalised", "Are actions raw?", ranges.normalised, reads=False),
    Detector("saturated", "Are values free of clipping?", ranges.saturated, reads=True),
    Detector(
        "held-out range", "Are held-out actions within the training range?", ranges.held_out_range, reads=True
    ),
    Detector("wraps", "Are angles continuous?", rotations.euler_wraps, reads=True),
    Detector("quaternion signs", "Are quaternions continuous?", rotations.quaternion_flips, reads=True),
    Detector("unknown kinds", "Is it said what every action is?", lag.unknown_kinds, reads=False),
    Detector("episode lengths", "Are episodes of similar length?", episodes.lengths, reads=False),
    Detector("short episodes", "Is every episode long enough for a clip?", episodes.short, reads=False),
    Detector("repeated episodes", "Is every episode there once?", episodes.repeated, reads=True),
    Detector("missing texts", "Do all episodes have a text, or none?", episodes.texts, reads=False),
    Detector("quarantined", "Were few episodes left out?", episodes.quarantined, reads=False),
)


def suspicious(survey: Survey) -> list[Finding]:
    """All that looks wrong, by what was read; empty when nothing does."""
    return [finding for detector in DETECTORS for finding in detector.run(survey)]


def silent(survey: Survey, findings: list[Finding]) -> list[Detector]:
    """Detectors that had what they need and found nothing."""
    loud = {finding.detector for finding in findings}
    return [
        detector
        for detector in DETECTORS
        if (survey.looks or not detector.reads)
        and not (detector.pixels and survey.manifest.kind == "latents")
        and not loud & set(_says(detector))
    ]


def _says(detector: Detector) -> tuple[str, ...]:
    """Names under which a detector's findings go."""
    pairs = {"gripper and constants": ("gripper", "constant"), "sign and scale": ("sign", "scale")}
    return pairs.get(detector.name, (detector.name,))
