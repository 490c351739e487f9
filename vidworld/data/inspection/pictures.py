"""Cameras: dark or blank, frozen while the robot moves, or the same one twice."""

from collections.abc import Iterator

import numpy as np

from vidworld import media
from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.survey import Look, Survey

DARK, BRIGHT, FLAT = 8.0, 247.0, 2.0
"""Levels of 255. An absent camera is black (0, or 2 after coding), a dim room 20; sensor noise is 2."""
MOST = 0.95
"""Share of an episode's frames that must be dark or blank."""
SAME_PICTURE = 0.01
"""Levels of 255. A camera at rest changes by 0.05 and more; a repeated frame decodes alike."""
MOVING = 0.5
"""Steps faster than this share of the mean speed count as motion, so that a robot at rest is no fault."""
FROZEN, LONG, LOST = 0.05, 5, 2
"""Share of an episode's steps, or steps in a row, without any change of picture; up to two
lost frames are common. CR5 and the planar lab have no such step."""
SAME_VIEW = 2.0
"""Mean difference of two cameras in levels of 255; two cameras beside each other differ by 10 and more."""


def dark(survey: Survey) -> Iterator[Finding]:
    """A camera that shows black, white or one even colour."""
    for embodiment, view, looks in _views(survey):
        blank: dict[str, list[Look]] = {}
        for look in looks:
            seen = look.views[view]
            if not len(seen.brightness_T):
                continue
            for word, marks_T in (
                ("dark", seen.brightness_T < DARK),
                ("white", seen.brightness_T > BRIGHT),
                ("one even colour", seen.contrast_T < FLAT),
            ):
                if marks_T.mean() > MOST:
                    blank.setdefault(word, []).append(look)
                    break
        for word, found in blank.items():
            level = np.mean([look.views[view].brightness_T.mean() for look in found])
            yield Finding(
                "dark camera",
                f"view {view!r} is {word}",
                f"embodiment {embodiment!r}, {len(found)} of {len(looks)} episodes"
                + (
                    f" ({named([look.sample.episode_id for look in found])})"
                    if len(found) < len(looks)
                    else ""
                ),
                f"mean brightness {level:.1f} of 255",
                "a picture",
                "leave these episodes out"
                if len(found) < len(looks)
                else "leave the camera out with --views",
            )


def frozen(survey: Survey) -> Iterator[Finding]:
    """Frames that repeat the one before although the robot moves."""
    for embodiment, view, looks in _views(survey):
        speeds = [speed(look, survey) for look in looks]
        if not any(len(s) for s in speeds):
            continue
        least = MOVING * float(np.concatenate(speeds).mean())
        moving = repeated = 0
        episodes: list[str] = []
        stretch, where = 0, ""
        for look, speed_T in zip(looks, speeds, strict=True):
            seen = look.views[view]
            if len(seen.brightness_T) and seen.brightness_T.mean() < DARK:
                continue  # said by `dark`
            change_T = seen.change_T
            moves_T = speed_T[: len(change_T)] > least
            still_T = moves_T & (change_T[: len(moves_T)] <= SAME_PICTURE)
            moving, repeated = moving + int(moves_T.sum()), repeated + int(still_T.sum())
            longest, end = _longest(still_T)
            if longest >= LONG or still_T.sum() > max(LOST, FROZEN * len(still_T)):
                episodes.append(look.sample.episode_id)
            if longest > stretch:
                stretch, where = longest, f"{look.sample.episode_id} to row {look.start + end * look.stride}"
        if not episodes:
            continue
        share = repeated / max(moving, 1)
        rhythm = share > 0.25 and stretch <= 4
        yield Finding(
            "frozen video",
            f"view {view!r} repeats frames while the robot moves",
            f"embodiment {embodiment!r}: {named(episodes)}",
            f"{share:.0%} of moving frames repeat the one before, at most {stretch + 1} alike ({where})",
            "a new picture in every frame",
            f"the camera seems slower than {survey.manifest.fps:g} fps: convert with a lower --fps"
            if rhythm
            else "the camera or its recorder hung: leave these episodes out",
        )


def same_views(survey: Survey) -> Iterator[Finding]:
    """Two views that show the same picture."""
    views = survey.manifest.views
    for index, first in enumerate(views):
        for second in views[index + 1 :]:
            differences = [
                np.mean([_difference(a, b) for a, b in zip(one.thumbnails, two.thumbnails, strict=True)])
                for look in survey.looks
                if (one := look.views[first]).thumbnails
                and len((two := look.views[second]).thumbnails) == len(one.thumbnails)
                and len(one.brightness_T)
                and min(one.brightness_T.mean(), two.brightness_T.mean()) > DARK
            ]
            if differences and (mean := float(np.mean(differences))) < SAME_VIEW:
                yield Finding(
                    "same views",
                    f"views {first!r} and {second!r} show the same",
                    f"{len(differences)} episodes",
                    f"a mean difference of {mean:.2f} levels of 255",
                    f"more than {SAME_VIEW:g}",
                    "leave one out with --views: it costs time and adds nothing",
                )


def speed(look: Look, survey: Survey) -> np.ndarray:
    """How fast the robot moves between pictures [T-1]: proprio changes in their own spread, averaged."""
    contract = survey.manifest.contract(look.sample.embodiment)
    spread_S = np.array(contract.proprio_statistics.std)
    steps_TS = np.abs(np.diff(look.proprio_TS[:: look.stride].astype(np.float64), axis=0))
    used = spread_S > 1e-6
    return (steps_TS[:, used] / spread_S[used]).mean(1) if used.any() else np.zeros(0)


def _views(survey: Survey) -> Iterator[tuple[str, str, list[Look]]]:
    for contract in survey.manifest.contracts:
        if looks := survey.of(contract.embodiment):
            for view in survey.manifest.views:
                yield contract.embodiment, view, looks


def _longest(marks_T: np.ndarray) -> tuple[int, int]:
    """Length of the longest run of True, and where it ends."""
    longest = run = end = 0
    for index, mark in enumerate(marks_T):
        run = run + 1 if mark else 0
        if run > longest:
            longest, end = run, index + 1
    return longest, end


def _difference(first_HWC: np.ndarray, second_HWC: np.ndarray) -> float:
    small = [
        media.fit(picture, width=32, height=24, mode="stretch").astype(np.int16)
        for picture in (first_HWC, second_HWC)
    ]
    return float(np.abs(small[0] - small[1]).mean())
