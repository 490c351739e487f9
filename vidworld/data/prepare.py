"""One episode of any source, checked, trimmed, resampled, resized and encoded into the members of a sample.

This is all that a worker process does, and the only place that decides whether an episode is good.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from vidworld.contract import Dimension
from vidworld.data.shards import json_bytes, npy_bytes, video_member
from vidworld.data.video import encode_video
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

Fit = Literal["crop", "pad", "stretch"]
Trim = Literal["refuse", "shorter"]

RATE_TOLERANCE = 0.01
CLOCK_TOLERANCE = 0.25
"""Recorded clocks jitter; a median step this share off the declared rate is another rate."""


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
    step = decimation(episode.fps, recipe.fps)
    episode, trimmed = _trim(episode, recipe)
    _check(episode, spec)
    length = len(range(0, len(episode), step))
    if length < recipe.min_frames:
        raise DataError("too short", got=f"{length} frames", expected=f"at least {recipe.min_frames}")

    actions_TA = resample_actions(episode.actions_TA, spec.action, step)
    meta = {
        "episode_id": episode.episode_id,
        "embodiment": spec.embodiment,
        "text": episode.text,
        "fps": recipe.fps,
        "frames": length,
        "views": list(recipe.views),
        "outcome": episode.outcome,
        "source": {**episode.source, **trimmed, **({"decimation": step} if step > 1 else {})},
    }
    members = {
        video_member(view): _encode(view, episode.views[view], len(episode), step, recipe, bool(trimmed))
        for view in recipe.views
    }
    members["actions.npy"] = npy_bytes(actions_TA.astype(np.float32))
    members["proprio.npy"] = npy_bytes(episode.proprio_TS[::step].astype(np.float32))
    members["timestamps.npy"] = npy_bytes(episode.timestamps_T[::step].astype(np.float64))
    try:
        members["meta.json"] = json_bytes(meta)
    except (TypeError, ValueError) as error:
        raise DataError("outcome or source facts that are not JSON", got=error) from None
    return Prepared(episode.episode_id, members, length, spec.embodiment, episode.text)


def decimation(fps: float, target_fps: float) -> int:
    """Every how-many-th frame is kept. Raises DataError when that is not a whole number."""
    ratio = fps / target_fps
    step = round(ratio)
    if step < 1 or abs(ratio - step) > RATE_TOLERANCE * ratio:
        choices = ", ".join(f"{fps / divisor:g}" for divisor in range(1, 6))
        raise DataError(
            "frames per second",
            got=f"{fps:g}, asked for {target_fps:g}",
            expected=f"a whole fraction of the recorded rate: {choices} ...",
        )
    return step


def resample_actions(actions_TA: np.ndarray, dimensions: tuple[Dimension, ...], step: int) -> np.ndarray:
    """Actions [T, A] at every `step`-th frame: one command that does what the `step` recorded ones did.

    Row t of the result covers rows step*t ... step*t + step-1, so what it means depends on the kind: deltas
    add up; velocities and forces are averaged (the displacement, or impulse, stays); of positions and binary
    commands the last one is what held when the next kept frame was taken.
    Raises DataError for a dimension of unknown kind.
    """
    if step == 1:
        return actions_TA
    columns = []
    starts = np.arange(0, len(actions_TA), step)
    counts = np.diff(np.append(starts, len(actions_TA)))
    for dimension, column in zip(dimensions, actions_TA.astype(np.float64).T, strict=True):
        match dimension.kind:
            case "delta":
                columns.append(np.add.reduceat(column, starts))
            case "velocity" | "force":
                columns.append(np.add.reduceat(column, starts) / counts)
            case "position" | "binary":
                columns.append(column[starts + counts - 1])
            case "unknown":
                raise unknown_kind(dimension)
            case _:
                raise AssertionError(dimension.kind)
    return np.stack(columns, axis=1) if columns else np.zeros((len(starts), 0))


def unknown_kind(dimension: Dimension) -> DataError:
    """The error of resampling an action whose meaning nobody gave."""
    return DataError(
        f"action {dimension.name!r} cannot be resampled",
        got="kind unknown",
        expected="position, velocity, delta, binary or force",
        fix="say it in a contract file: --contract FILE",
    )


def resize(frame: np.ndarray, width: int, height: int, fit: Fit) -> np.ndarray:
    """Resize RGB [H, W, 3] uint8: cut the centre to the aspect, pad with black, or stretch; anti-aliased."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError("video frame", got=f"{frame.dtype} {frame.shape}", expected="uint8 [H, W, 3]")
    source_height, source_width = frame.shape[:2]
    if (source_height, source_width) == (height, width):
        return frame
    across, down = source_width / width, source_height / height
    box, size = (0.0, 0.0, float(source_width), float(source_height)), (width, height)
    match fit:
        case "crop":
            kept_width = min(width * min(across, down), source_width)
            kept_height = min(height * min(across, down), source_height)
            left, top = (source_width - kept_width) / 2, (source_height - kept_height) / 2
            box = (left, top, left + kept_width, top + kept_height)
        case "pad":
            scale = max(across, down)
            size = (max(1, round(source_width / scale)), max(1, round(source_height / scale)))
        case "stretch":
            pass
        case _:
            raise AssertionError(fit)
    picture = np.asarray(
        Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    )
    if size == (width, height):
        return picture
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = picture
    return canvas


def _trim(episode: Episode, recipe: Recipe) -> tuple[Episode, dict[str, Any]]:
    """Make rows and frames equally many, if the policy allows; says what was cut."""
    rows = len(episode.actions_TA)
    for name, array in (("proprio", episode.proprio_TS), ("timestamps", episode.timestamps_T)):
        if len(array) != rows:
            raise DataError(f"rows of {name}", got=len(array), expected=f"{rows} as actions")
    counts = {"rows": rows, **{view: episode.views[view].num_frames for view in recipe.views}}
    shortest = min(counts.values())
    if not shortest:
        empty = next(name for name, count in counts.items() if not count)
        raise DataError("no rows" if empty == "rows" else f"no frames in view {empty!r}")
    if len(set(counts.values())) == 1:
        return episode, {}
    if recipe.trim == "refuse":
        raise DataError(
            "rows and video frames differ in number",
            got=", ".join(f"{name} {count}" for name, count in counts.items()),
            expected="as many",
            fix="--trim shorter cuts the longer ones at their end",
        )
    cut = dataclasses.replace(
        episode,
        actions_TA=episode.actions_TA[:shortest],
        proprio_TS=episode.proprio_TS[:shortest],
        timestamps_T=episode.timestamps_T[:shortest],
    )
    return cut, {"trimmed": {"policy": recipe.trim, "to": shortest, "from": counts}}


def _check(episode: Episode, spec: EmbodimentSpec) -> None:
    """Refuse values that cannot be: widths, not finite, a clock that stands, goes back or runs otherwise."""
    for role, values, dimensions in (
        ("action", episode.actions_TA, spec.action),
        ("proprio", episode.proprio_TS, spec.proprio),
    ):
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


def _encode(view: str, video: Video, rows: int, step: int, recipe: Recipe, trimmed: bool) -> bytes:
    """Decode, keep every `step`-th of the first `rows` frames, resize and encode."""

    def pictures() -> Iterator[np.ndarray]:
        given = 0
        for index, frame in enumerate(video.frames()):
            if index >= rows:
                if trimmed:
                    return
                raise DataError(f"frames of view {view!r}", got="more", expected=f"{rows} as announced")
            given += 1
            if index % step == 0:
                yield resize(frame, recipe.width, recipe.height, recipe.fit)
        if given < rows:
            raise DataError(f"frames of view {view!r}", got=given, expected=f"{rows} as announced")

    return encode_video(pictures(), recipe.fps)


def resampling_note(spec: EmbodimentSpec) -> str:
    """What a contract says of actions that were resampled."""
    rules = {
        "delta": "deltas added",
        "velocity": "velocities averaged",
        "force": "forces averaged",
        "position": "last position kept",
        "binary": "last binary command kept",
    }
    kinds = {dimension.kind for dimension in spec.action}
    return "one action stands for several recorded ones: " + ", ".join(
        rule for kind, rule in rules.items() if kind in kinds
    )
