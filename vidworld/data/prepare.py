"""One episode of any source, checked, trimmed, mapped, resampled, resized and encoded into a sample.

This is all that a worker process does, and the only place that decides whether an episode is good.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vidworld import media
from vidworld.contract import Dimension
from vidworld.data.mapping import EmbodimentMapping
from vidworld.data.resample import (
    actions_on_grid,
    decimation,
    even_grid,
    proprio_on_grid,
    refuse_more_frames,
    resample_actions,
    whole_fraction,
)
from vidworld.data.shards import json_bytes, npy_bytes, video_member
from vidworld.data.video import encode_video
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

Fit = Literal["crop", "pad", "stretch"]
Trim = Literal["refuse", "shorter", "head"]
Resample = Literal["refuse", "nearest"]

CLOCK_TOLERANCE = 0.25
"""Recorded clocks jitter; a median step this share off the declared rate is another rate."""
MOST_TRIMMED = 0.2
"""Rows and frames that differ by more than this share were not recorded together."""
_SUCCESS: Mapping[str, bool | None] = {
    **dict.fromkeys(("1", "1.0", "true", "success", "successful", "succeeded", "yes"), True),
    **dict.fromkeys(("0", "0.0", "false", "failure", "fail", "failed", "no"), False),
    **dict.fromkeys(("", "none", "null", "unknown", "nan"), None),
}


@dataclass(frozen=True)
class Recipe:
    """What is done to every episode."""

    width: int
    height: int
    fit: Fit
    fps: float
    views: tuple[str, ...]
    trim: Trim
    min_frames: int
    embodiments: dict[str, EmbodimentSpec]
    """Name in the source -> specification in the dataset."""
    mappings: dict[str, EmbodimentMapping] = field(default_factory=dict)
    """Name in the source -> what happens to its numbers; those that stay as they are, are not in it."""
    rates: dict[str, float] = field(default_factory=dict)
    """Name in the source -> rows a second, where the logs do not say (`Episode.fps` 0)."""
    resample: Resample = "refuse"
    """At a rate that is no whole fraction of the recorded one."""


@dataclass(frozen=True)
class Taken:
    """Which frames of the videos are used, and in what way that is said."""

    rows: int
    """Frames and rows after the trim."""
    starts: dict[str, int]
    """View -> its first frame that counts."""
    frames_N: np.ndarray
    """Of those frames, the ones that are kept: ascending, and the same twice where a clock has a gap."""
    trimmed: bool


@dataclass(frozen=True)
class Prepared:
    """A sample that is ready to be written."""

    episode_id: str
    members: dict[str, bytes]
    frames: int
    embodiment: str
    text: str


def prepare(episode: Episode, recipe: Recipe) -> Prepared:
    """Turn an episode into the members of a sample.

    Raises DataError with the reason when the episode does not hold together.
    """
    if episode.embodiment not in recipe.embodiments:
        raise DataError(f"undeclared embodiment {episode.embodiment!r}")
    if missing := [view for view in recipe.views if view not in episode.views]:
        raise DataError(f"no view {missing[0]!r}", got=", ".join(episode.views))
    spec = recipe.embodiments[episode.embodiment]
    mapping = recipe.mappings.get(episode.embodiment)
    episode = _with_clock(episode, recipe.rates.get(episode.embodiment))
    if recipe.resample == "refuse":
        decimation(episode.fps, recipe.fps)
    episode, starts, facts = _trim(episode, recipe)
    _check(episode, spec, mapping)
    rows, trimmed = len(episode), bool(facts)
    if mapping:
        episode = mapping.mapped(episode)
    episode, frames_N, resampled = _at_rate(episode, spec, recipe)
    length = len(frames_N)
    if length < recipe.min_frames:
        raise DataError("too short", got=f"{length} frames", expected=f"at least {recipe.min_frames}")

    text = episode.text.strip()
    meta = {
        "episode_id": episode.episode_id,
        "embodiment": spec.embodiment,
        "text": text,
        "fps": recipe.fps,
        "frames": length,
        "views": list(recipe.views),
        "outcome": plain_outcome(episode.outcome, mapping.success_reward if mapping else None),
        "source": {**episode.source, **facts, **resampled},
    }
    taken = Taken(rows, starts, frames_N, trimmed)
    members = {video_member(view): _encode(view, episode.views[view], taken, recipe) for view in recipe.views}
    members["actions.npy"] = npy_bytes(episode.actions_TA.astype(np.float32))
    members["proprio.npy"] = npy_bytes(episode.proprio_TS.astype(np.float32))
    members["timestamps.npy"] = npy_bytes(episode.timestamps_T.astype(np.float64))
    try:
        members["meta.json"] = json_bytes(meta)
    except (TypeError, ValueError) as error:
        raise DataError("outcome or source facts that are not JSON", got=error) from None
    return Prepared(episode.episode_id, members, length, spec.embodiment, text)


def plain_outcome(outcome: Mapping[str, Any], success_reward: float | None = None) -> dict[str, Any]:
    """The outcome with `success` as true or false, however the logs say it; left out when they do not know.

    Without a label, a `reward` of at least `success_reward` is a success. Raises DataError for a label that
    is neither.
    """
    result = dict(outcome)
    if "success" in result:
        label = result.pop("success")
        value = label.item() if isinstance(label, np.generic | np.ndarray) and label.size == 1 else label
        word = str(value).strip().lower()
        if word not in _SUCCESS:
            raise DataError(
                "success label", got=repr(value)[:50], expected="true or false, 1 or 0, or a word"
            )
        if (success := _SUCCESS[word]) is not None:
            return {"success": success, **result}
    reward = result.get("reward")
    if success_reward is not None and isinstance(reward, int | float):
        return {"success": reward >= success_reward, **result}
    return result


def _with_clock(episode: Episode, rate: float | None) -> Episode:
    """The episode at the rate that the user gives, where the logs do not say one."""
    if episode.fps:
        return episode
    if rate is None:
        raise DataError(
            "rows a second", got="not in the logs", fix="say rate_hz in a contract file, or --fps"
        )
    times = episode.timestamps_T
    if len(times) == 0 or np.array_equal(times, np.arange(len(times))):
        times = np.arange(len(episode)) / rate
    return dataclasses.replace(episode, fps=rate, timestamps_T=times)


def _at_rate(
    episode: Episode, spec: EmbodimentSpec, recipe: Recipe
) -> tuple[Episode, np.ndarray, dict[str, Any]]:
    """The rows at the rate of the dataset, the frames that go with them, and what to say of it."""
    step = whole_fraction(episode.fps, recipe.fps)
    if step is not None:
        at_rate = dataclasses.replace(
            episode,
            actions_TA=resample_actions(episode.actions_TA, spec.action, step, spec.control_frame),
            proprio_TS=episode.proprio_TS[::step],
            timestamps_T=episode.timestamps_T[::step],
        )
        return at_rate, np.arange(0, len(episode), step), {"decimation": step} if step > 1 else {}
    refuse_more_frames(episode.fps, recipe.fps)
    grid = even_grid(episode.timestamps_T, recipe.fps)
    frames_N = grid.frames_N
    off_s = np.abs(episode.timestamps_T[frames_N] - grid.at_N).max()
    facts = {
        "policy": "nearest",
        "from_fps": episode.fps,
        "repeated_frames": int((np.diff(frames_N) == 0).sum()),
        "most_off_s": round(float(off_s), 6),
    }
    at_rate = dataclasses.replace(
        episode,
        actions_TA=actions_on_grid(episode.actions_TA, spec.action, grid, spec.control_frame),
        proprio_TS=proprio_on_grid(episode.proprio_TS, spec.proprio, grid),
        timestamps_T=grid.at_N,
    )
    return at_rate, frames_N, {"resampled": facts}


def _trim(episode: Episode, recipe: Recipe) -> tuple[Episode, dict[str, int], dict[str, Any]]:
    """Make rows and frames equally many, if the policy allows; says where views begin and what was cut."""
    rows = len(episode.actions_TA)
    for name, array in (("proprio", episode.proprio_TS), ("timestamps", episode.timestamps_T)):
        if len(array) != rows:
            raise DataError(f"rows of {name}", got=len(array), expected=f"{rows} as actions")
    counts = {"rows": rows, **{view: episode.views[view].num_frames for view in recipe.views}}
    starts = dict.fromkeys(recipe.views, 0)
    shortest = min(counts.values())
    if not shortest:
        empty = next(name for name, count in counts.items() if not count)
        raise DataError("no rows" if empty == "rows" else f"no frames in view {empty!r}")
    if len(set(counts.values())) == 1:
        return episode, starts, {}
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    if recipe.trim == "refuse":
        raise DataError(
            "rows and video frames differ in number",
            got=found,
            expected="as many",
            fix="--trim shorter cuts the longer ones at their end, --trim head at their start",
        )
    longest = max(counts.values())
    if longest - shortest > max(1, MOST_TRIMMED * longest):
        raise DataError(
            "rows and video frames differ too much to be trimmed",
            got=found,
            expected=f"within {MOST_TRIMMED:.0%}: is one of them at another rate?",
        )
    first = 0
    if recipe.trim == "head":
        first = rows - shortest
        starts = {view: counts[view] - shortest for view in recipe.views}
    kept = slice(first, first + shortest)
    cut = dataclasses.replace(
        episode,
        actions_TA=episode.actions_TA[kept],
        proprio_TS=episode.proprio_TS[kept],
        timestamps_T=episode.timestamps_T[kept],
    )
    return cut, starts, {"trimmed": {"policy": recipe.trim, "to": shortest, "from": counts}}


def _check(episode: Episode, spec: EmbodimentSpec, mapping: EmbodimentMapping | None) -> None:
    """Refuse values that cannot be: widths, not finite, a clock that stands, goes back or runs otherwise.

    Checks what was recorded: before the mapping, if there is one.
    """
    tables: list[tuple[str, np.ndarray, tuple[Dimension, ...]]] = [
        ("action", episode.actions_TA, mapping.action.recorded if mapping else spec.action),
        ("proprio", episode.proprio_TS, mapping.proprio.recorded if mapping else spec.proprio),
    ]
    for role, values, dimensions in tables[1 if mapping and mapping.action_from else 0 :]:
        if values.ndim != 2 or values.shape[1] != len(dimensions):
            raise DataError(f"{role} shape", got=values.shape, expected=f"[T, {len(dimensions)}]")
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = (int(index) for index in bad[0])
            raise DataError(
                f"{role} {dimensions[column].name!r} at row {row}",
                got=values[row, column],
                expected=f"finite numbers ({len(bad)} are not)",
            )
    times = episode.timestamps_T
    if times.ndim != 1 or not np.isfinite(times).all():
        raise DataError("timestamps", got=f"shape {times.shape}", expected="one finite number a row")
    steps = np.diff(times)
    backward = np.flatnonzero(steps <= 0)
    if len(backward):
        row = int(backward[0]) + 1
        raise DataError(f"timestamp at row {row}", got=times[row], expected=f"more than {times[row - 1]}")
    if len(steps) and abs(np.median(steps) * episode.fps - 1) > CLOCK_TOLERANCE:
        raise DataError(
            "recorded clock",
            got=f"{1 / np.median(steps):.3g} rows/s",
            expected=f"the declared {episode.fps:g}",
        )


def _encode(view: str, video: Video, taken: Taken, recipe: Recipe) -> bytes:
    """Decode, keep the frames taken, resize and encode."""
    start, repeats = taken.starts[view], np.bincount(taken.frames_N, minlength=taken.rows)

    def pictures() -> Iterator[np.ndarray]:
        given = 0
        for index, frame in enumerate(video.frames(), -start):
            if index >= taken.rows:
                if taken.trimmed:
                    return
                raise DataError(f"frames of view {view!r}", got="more", expected=f"{taken.rows} as announced")
            if index < 0:
                continue
            given += 1
            for _ in range(repeats[index]):
                yield _resize(frame, recipe)
        if given < taken.rows:
            raise DataError(f"frames of view {view!r}", got=given, expected=f"{taken.rows} as announced")

    return encode_video(pictures(), recipe.fps)


def _resize(frame: np.ndarray, recipe: Recipe) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError("video frame", got=f"{frame.dtype} {frame.shape}", expected="uint8 [H, W, 3]")
    return media.fit(frame, width=recipe.width, height=recipe.height, mode=recipe.fit)
