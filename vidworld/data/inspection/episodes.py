"""Episodes as wholes: lengths, repetitions, texts."""

import hashlib
from collections.abc import Iterator

import numpy as np

from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.survey import Survey

FAR = 4.0
"""Times longer or shorter than the median. Lengths of one task spread log-normally by about 1.4, so that four
times is four standard deviations."""
LEAST_EPISODES = 8
CLIP_FRAMES = 16
"""Frames of a clip by default (`loader.clip_frames`)."""
QUARANTINED = 0.1


def lengths(survey: Survey) -> Iterator[Finding]:
    """Episodes far longer or shorter than their embodiment's median."""
    for contract in survey.manifest.contracts:
        samples = [s for s in survey.manifest.samples() if s.embodiment == contract.embodiment]
        if len(samples) < LEAST_EPISODES:
            continue
        median = float(np.median([sample.frames for sample in samples]))
        far = [s for s in samples if not median / FAR <= s.frames <= median * FAR]
        if far:
            yield Finding(
                "episode lengths",
                f"{len(far)} of {len(samples)} episodes are far off in length",
                f"embodiment {contract.embodiment!r}",
                named([f"{sample.episode_id} ({sample.frames} frames)" for sample in far]),
                f"within {FAR:g} times the median of {median:.0f} frames",
                "look at them: aborted, or several episodes in one? Filter them if so",
            )


def short(survey: Survey) -> Iterator[Finding]:
    """Episodes from which the loader cannot cut a clip."""
    samples = survey.manifest.samples()
    few = [sample.episode_id for sample in samples if sample.frames < CLIP_FRAMES]
    if few:
        yield Finding(
            "short episodes",
            f"{len(few)} of {len(samples)} episodes are shorter than a clip",
            named(few),
            f"fewer than {CLIP_FRAMES} frames",
            f"{CLIP_FRAMES}, the default of loader.clip_frames",
            "they are never drawn in training unless loader.clip_frames is lower",
        )


def repeated(survey: Survey) -> Iterator[Finding]:
    """Episodes with the same numbers as another; worse if one of the two is held out."""
    by_digest: dict[str, list[tuple[str, str]]] = {}
    for look in survey.looks:
        # Episodes in which nothing moves are alike without being copies.
        if any(table.size and np.ptp(table, axis=0).any() for table in (look.actions_TA, look.proprio_TS)):
            content = look.actions_TA.tobytes() + look.proprio_TS.tobytes()
            key = f"{look.sample.embodiment}/{hashlib.sha256(content).hexdigest()}"
            by_digest.setdefault(key, []).append((look.sample.episode_id, look.split))
    groups = [group for group in by_digest.values() if len(group) > 1]
    if groups:
        leaks = sum(len({split for _, split in group}) > 1 for group in groups)
        yield Finding(
            "repeated episodes",
            f"{len(groups)} episodes occur more than once",
            named([" = ".join(name for name, _ in group) for group in groups], 3),
            "equal actions and proprioception" + (f", {leaks} in both train and val" if leaks else ""),
            "every episode once",
            "leave the copies out" + (": held-out scores are not held out" if leaks else ""),
        )


def texts(survey: Survey) -> Iterator[Finding]:
    """Some episodes have a text and some have none."""
    samples = survey.manifest.samples()
    empty = [sample.episode_id for sample in samples if not sample.text.strip()]
    if 0 < len(empty) < len(samples):
        yield Finding(
            "missing texts",
            f"{len(empty)} of {len(samples)} episodes have no text",
            named(empty),
            "an empty text",
            "a text in every episode, as in the others",
            "add texts in the source, or ignore this if the model is not given text",
        )


def quarantined(survey: Survey) -> Iterator[Finding]:
    """Many episodes were left out."""
    manifest = survey.manifest
    total = len(manifest.samples()) + len(manifest.quarantined)
    if len(manifest.quarantined) > QUARANTINED * total:
        yield Finding(
            "quarantined",
            f"{len(manifest.quarantined)} of {total} episodes were left out",
            named([bad.episode_id for bad in manifest.quarantined]),
            manifest.quarantined[0].reason,
            f"at most {QUARANTINED:.0%} bad",
            "the list below has every reason: mend the source and convert again",
        )
