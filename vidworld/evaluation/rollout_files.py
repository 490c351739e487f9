"""What a rollout leaves behind: videos, a grid, a film strip, and proprioception in its units.

Shapes: N samples, T frames, V views, H W pixels, S proprio dims, k camera frames a latent frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vidworld import media, plots
from vidworld.errors import ConfigError
from vidworld.evaluation.comparison import ERROR_GAIN, difference
from vidworld.evaluation.grounding import Grounding, Recording
from vidworld.evaluation.imagining import Imagined
from vidworld.evaluation.rollout_options import Format
from vidworld.world.spec import WorldSpec

STRIP_COLUMNS = 8
LEAST_COLUMNS = 3
"""With several cameras side by side, fewer columns stay readable."""
STRIP_SAMPLES = 4
GRID_SAMPLES = 15
SWEEP_ROWS = 12
CELL_HEIGHT = 192
"""Of a grid whose captions are names, which need room."""
RECORDED = "recorded"
PLAIN = "sample"
"""Label of the futures of a rollout without branches."""


@dataclass(frozen=True)
class Shown:
    """One scene as it is shown."""

    spec: WorldSpec
    grounding: Grounding
    imagined: dict[str, Imagined]
    """By label: `PLAIN`, or the branches."""
    truth: Recording | None = None
    swept: tuple[str, ...] = ()
    """For each frame, what a sweep is moving."""
    fork_at: int | None = None
    errors: bool = False
    """Whether what differs from the truth is drawn too."""

    @property
    def context_THWC(self) -> np.ndarray:
        """The prompt, cameras side by side."""
        return side_by_side(np.asarray(self.grounding.prompt.frames_TVHWC(self.spec)))

    @property
    def recorded_THWC(self) -> np.ndarray | None:
        """The prompt and what followed it."""
        if self.truth is None:
            return None
        return np.concatenate([self.context_THWC, side_by_side(self.truth.frames_TVHWC)])

    def row(self, label: str, sample: int) -> np.ndarray:
        """The prompt and one future [T, H, V * W, 3]."""
        return np.concatenate([self.context_THWC, side_by_side(self.imagined[label].video_NTVHWC[sample])])

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """All futures by caption, those of a branch after each other."""
        return {
            _caption(label, sample, len(found.video_NTVHWC)): self.row(label, sample)
            for label, found in self.imagined.items()
            for sample in range(len(found.video_NTVHWC))
        }


def write_videos(folder: Path, shown: Shown, formats: Sequence[Format]) -> None:
    """LABEL-000.mp4 ..., grid.mp4 (or the formats asked for) and strip.png; each begins with the prompt."""
    fps = shown.spec.fps
    for label, found in shown.imagined.items():
        for sample in range(len(found.video_NTVHWC)):
            name = f"{label.replace(' ', '-').replace(':', '-').replace('/', '-')}-{sample:03d}"
            _write(folder / name, shown.row(label, sample), fps, formats)
    _write(folder / "grid", grid(shown), fps, formats)
    media.write_png(folder / "strip.png", strip(shown))


def grid(shown: Shown) -> np.ndarray:
    """The recording and the first futures as one video; of branches, a row each."""
    if shown.fork_at is None:
        recorded = {} if shown.recorded_THWC is None else {RECORDED: shown.recorded_THWC}
        cells = recorded | dict(list(shown.rows.items())[:GRID_SAMPLES])
        return media.grid(list(cells.values()), labels=list(cells))
    columns = min(STRIP_SAMPLES, len(next(iter(shown.imagined.values())).video_NTVHWC))
    videos, labels = [], []
    for label, found in shown.imagined.items():
        for sample in range(columns):
            videos.append(shown.row(label, sample))
            labels.append(_caption(label, sample, len(found.video_NTVHWC)))
    return media.grid(videos, columns, labels=labels, height=CELL_HEIGHT)


def strip(shown: Shown) -> np.ndarray:
    """A row for each future (or branch, or swept dimension), a column for each of some moments."""
    last, total = len(shown.context_THWC) - 1, next(iter(shown.imagined.values())).video_NTVHWC.shape[1]
    if shown.swept and shown.fork_at is None:
        return _sweep_strip(shown.row(PLAIN, 0)[last:], shown.swept, shown.spec.fps)
    columns = max(LEAST_COLUMNS, STRIP_COLUMNS // len(shown.spec.views))
    rows = {} if shown.recorded_THWC is None else {RECORDED: shown.recorded_THWC}
    if shown.fork_at is None:
        rows |= dict(list(shown.rows.items())[:STRIP_SAMPLES])
    else:
        rows |= {label: shown.row(label, 0) for label in shown.imagined}
    first = next(iter(shown.rows.values()))
    if shown.errors and shown.recorded_THWC is not None:
        rows[f"difference x{ERROR_GAIN}"] = difference(first, shown.recorded_THWC)
    steps = {round(step) for step in np.linspace(1, total, min(columns, total))}
    if shown.fork_at is not None:
        # Half of the moments lie behind the fork at least, and the fork itself is among them.
        after = np.linspace(shown.fork_at, total, max(2, columns - 2))
        steps = {1, max(1, shown.fork_at // 2), *(round(step) for step in after)}
    moments = [last, *(last + step for step in sorted(steps))]
    labels = ["prompt", *(_moment(step, shown) for step in sorted(steps))]
    return media.strip(rows, moments, labels=labels)


def write_proprio(folder: Path, shown: Shown) -> None:
    """proprio.npz and proprio.png: predicted proprioception in its units, beside the recorded one."""
    dimensions, k, fps = shown.grounding.contract.proprio, shown.spec.frames_per_step, shown.spec.fps
    predicted = {
        label: found.proprio_NTS[..., : len(dimensions)].astype(np.float32)
        for label, found in shown.imagined.items()
    }
    first = next(iter(predicted.values()))
    time_T = np.arange(1, first.shape[1] + 1) * k / fps
    arrays = {
        "time_s": time_T,
        "names": np.array([dimension.name for dimension in dimensions]),
        "units": np.array([dimension.unit for dimension in dimensions]),
        "predicted_NTS": first,
    }
    if shown.fork_at is not None:
        arrays["branches"] = np.array(list(predicted))
        arrays["branches_KNTS"] = np.stack(list(predicted.values()))
    if shown.truth is not None:
        arrays["recorded_TS"] = shown.truth.proprio_TS[k - 1 :: k]
    np.savez(folder / "proprio.npz", **arrays)
    panels = []
    for index, dimension in enumerate(dimensions):
        lines = []
        for label, values_NTS in predicted.items():
            values_NT = values_NTS[:, :, index]
            name = "imagined, mean" if label == PLAIN else label
            lines.append(plots.Line(name, time_T, values_NT.mean(0), values_NT.min(0), values_NT.max(0)))
        if shown.truth is not None:
            lines.append(plots.Line(RECORDED, time_T, arrays["recorded_TS"][:, index]))
        unit = "" if dimension.unit in ("1", "unknown") else f" [{dimension.unit}]"
        panels.append(plots.Panel(tuple(lines), dimension.name, "time [s]", f"value{unit}"))
    if panels:
        columns = min(len(panels), 2 if len(panels) <= 8 else 4)
        figure = plots.draw(panels, columns=columns, panel_size=(4.2, 2.2))
        media.write_bytes(folder / "proprio.png", plots.to_png(figure))


def write_overview(folder: Path, scenes: dict[str, Shown], formats: Sequence[Format]) -> None:
    """grid.mp4 of all scenes: a column each, the recording above its first future where there is one."""
    names = list(scenes)[:GRID_SAMPLES]
    rows: list[tuple[str, np.ndarray]] = []
    recorded = all(scenes[name].recorded_THWC is not None for name in names)
    if recorded:
        for name in names:
            video = scenes[name].recorded_THWC
            assert video is not None
            rows.append((name, video))
    rows += [("imagined" if recorded else name, scenes[name].row(PLAIN, 0)) for name in names]
    columns = len(names) if recorded else None
    cells, labels = [video for _, video in rows], [label for label, _ in rows]
    video = media.grid(cells, columns, labels=labels, height=CELL_HEIGHT)
    _write(folder / "grid", video, next(iter(scenes.values())).spec.fps, formats)


def side_by_side(video_TVHWC: np.ndarray) -> np.ndarray:
    """All views of a frame in one picture [T, H, V * W, 3]."""
    return np.concatenate(list(np.moveaxis(video_TVHWC, 1, 0)), axis=2)


def _write(path: Path, frames_THWC: np.ndarray, fps: float, formats: Sequence[Format]) -> None:
    """One video in each of the formats; `path` has no suffix yet."""
    for kind in dict.fromkeys(formats):
        match kind:
            case "mp4":
                media.write_mp4(path.with_name(f"{path.name}.mp4"), frames_THWC, fps)
            case "gif":
                media.write_gif(path.with_name(f"{path.name}.gif"), frames_THWC, fps)
            case "png":
                for index, frame in enumerate(frames_THWC):
                    media.write_png(path / f"frame-{index:05d}.png", frame)
            case _:
                raise ConfigError("--formats", got=kind, expected="mp4, gif or png")


def _caption(label: str, sample: int, num_samples: int) -> str:
    return f"{label} {sample}" if label == PLAIN or num_samples > 1 else label


def _moment(step: int, shown: Shown) -> str:
    text = f"+{step / shown.spec.fps:.1f} s"
    return f"{text} (fork)" if step == shown.fork_at else text


def _sweep_strip(video_THWC: np.ndarray, labels: Sequence[str], fps: float) -> np.ndarray:
    """A row for each swept dimension, of one sample: what it does from the frame before it moves."""
    starts: dict[str, int] = {}
    for index, label in enumerate(labels):
        starts.setdefault(label, index)
    length = list(labels).count(labels[0]) if len(starts) == 1 else sorted(starts.values())[1]
    rows = {
        label: video_THWC[start : start + length + 1] for label, start in list(starts.items())[:SWEEP_ROWS]
    }
    steps = sorted({round(step) for step in np.linspace(0, length, min(STRIP_COLUMNS, length) + 1)})
    return media.strip(rows, steps, labels=[f"+{step / fps:.1f} s" for step in steps])
