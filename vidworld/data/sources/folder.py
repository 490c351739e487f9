"""A plain folder: videos, a table of numbers an episode, and a `vidworld.yaml` that says which is which.

    fps: 10                                 # rows and frames a second
    views: [front, wrist]
    videos: "{episode}/{view}.mp4"          # where the videos are, under this folder
    rows: "{episode}.csv"                   # csv with a header, npz or npy: one row a frame
    action:                                 # columns, or patterns of columns, in this order
      "v*": {unit: m/s, kind: velocity}
      grip: {name: gripper, unit: "1", kind: binary}
    proprio:
      "joint_*": {unit: rad, kind: position}

Columns of an npz are its arrays of shape [T], and `name.0`, `name.1` ... of its arrays of shape [T, D]; those
of an npy are its named fields, or `0`, `1` ... Where the YAML says no unit or kind, `sources/naming.py` does.
See `FolderLayout` for all settings, and `sources/describe.py` for who writes the YAML.
"""

import difflib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidworld.config import digest, from_mapping, from_yaml
from vidworld.contract import Dimension, Kind
from vidworld.data.resample import resample_actions
from vidworld.data.sources.location import inside
from vidworld.data.sources.naming import guess_dimension, natural, view_name
from vidworld.data.sources.tables import read_columns
from vidworld.data.sources.video_file import measured_fps, whole_video
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode

DESCRIPTIONS = ("vidworld.yaml", "dataset.yaml")
MAX_TEXT = 10_000
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class ColumnFacts:
    """What is said of a column; None keeps what its name says."""

    name: str | None = None
    unit: str | None = None
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """The settings of a `vidworld.yaml`."""

    fps: float
    """Frames a second; a row of numbers goes with each frame."""
    views: tuple[str, ...]
    """Names of the cameras, as they stand in the file names."""
    videos: str = "{episode}/{view}.mp4"
    """Where the videos are; `{view}` may be left out when there is one."""
    rows: str = "{episode}.csv"
    """Where the numbers are: .csv, .npz or .npy."""
    action: dict[str, dict[str, str]]
    """Column or pattern -> fields of `ColumnFacts`."""
    proprio: dict[str, dict[str, str]] = field(default_factory=dict)
    rows_per_frame: int = 1
    """Rows to one frame, where the table runs faster than the video: k actions become one by their kinds."""
    timestamps: str | None = None
    """Column with the time of each row, as recorded; without one, the clock is frame number / fps."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "s"
    delimiter: str = ","
    """Between the cells of a csv."""
    text: str = ""
    """Instruction of all episodes."""
    text_file: str | None = None
    """Where a text file with the instruction of each episode is, instead: `{episode}/task.txt`."""
    success: str | None = None
    """Column that is 1 in any row of an episode that succeeded."""
    ignore_video_rate: bool = False
    """Take the videos' frames one a row, even if their headers say another rate than `fps`."""
    embodiment: str | None = None
    """Name of the robot; default: that of the folder."""
    control_frame: str = "unknown"
    note: str = ""


class FolderSource:
    """One folder with a `vidworld.yaml` or `dataset.yaml`. Episode ids are what `{episode}` stands for."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._file = next(self.root / name for name in DESCRIPTIONS if (self.root / name).is_file())
        self._layout = layout = from_yaml(FolderLayout, self._file)
        self._cameras = {view_name(view): view for view in layout.views}
        self._check()
        columns = self._first_columns()
        action = _select(columns, layout.action, f"action of {self._file}")
        proprio = _select(columns, layout.proprio, f"proprio of {self._file}")
        self._action, self._proprio = list(action), list(proprio)
        unknown = [dimension.name for dimension in action.values() if dimension.kind == "unknown"]
        if unknown and layout.rows_per_frame > 1:
            raise ConfigError(
                f"kind of action {unknown[0]!r}",
                where=self._file,
                got="unknown",
                expected="position, velocity, delta, binary or force, as rows_per_frame is more than 1",
            )
        for setting in ("timestamps", "success"):
            if (column := getattr(layout, setting)) is not None:
                _select(columns, {column: {}}, f"{setting} of {self._file}")
        self.embodiments = (
            EmbodimentSpec(
                embodiment=layout.embodiment or self.name,
                rate_hz=self.fps,
                action=tuple(action.values()),
                proprio=tuple(proprio.values()),
                control_frame=layout.control_frame,
                note=layout.note,
            ),
        )

    @classmethod
    def detects(cls, path: Path) -> bool:
        """Whether a folder has a description."""
        return any((path / name).is_file() for name in DESCRIPTIONS)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the cameras, made safe."""
        return tuple(self._cameras)

    @property
    def fps(self) -> float:
        """As the description says."""
        return float(self._layout.fps)

    @property
    def fingerprint(self) -> str:
        """Digest of the description, and of the names and sizes of all files."""
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        facts = [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in files]
        return digest([facts, self._file.read_text()])

    def episode_ids(self) -> list[str]:
        """Whatever has a table or a video, so that an episode that lacks the other is named, not skipped."""
        return list(self._episodes)

    def read(self, episode_id: str) -> Episode:
        """Read the table of an episode and open its videos, without decoding them."""
        if episode_id not in self._episodes:
            raise DataError(f"no episode {episode_id!r}", where=self.root)
        layout = self._layout
        path = self._path(layout.rows, episode_id)
        extra = [column for column in (layout.timestamps, layout.success) if column]
        table = read_columns(path, [*self._action, *self._proprio, *extra], layout.delimiter)
        rows, step = len(table[self._action[0]]), layout.rows_per_frame
        actions_TA = resample_actions(
            _matrix(table, self._action, rows), self.embodiments[0].action, step, layout.control_frame
        ).astype(np.float32)
        views = {}
        for view, camera in self._cameras.items():
            video = self._path(layout.videos, episode_id, camera)
            header = measured_fps(video) if layout.ignore_video_rate else None
            views[view] = whole_video(video, declared_fps=header or self.fps)
        source: dict[str, Any] = {
            "format": "folder",
            "rows_per_frame": step,
            "file": path.relative_to(self.root).as_posix(),
        }
        if layout.timestamps:
            times = table[layout.timestamps].astype(np.float64) * _SECONDS[layout.timestamp_unit]
        else:
            times = np.arange(rows) * (1 / (self.fps * step))
            source["timestamps"] = "frame number / fps: the description names no clock"
        return Episode(
            episode_id=episode_id,
            embodiment=self.embodiments[0].embodiment,
            fps=self.fps,
            views=views,
            actions_TA=actions_TA,
            proprio_TS=_matrix(table, self._proprio, rows)[::step],
            timestamps_T=times[::step],
            text=self._text(episode_id),
            outcome={"success": bool((table[layout.success] > 0).any())} if layout.success else {},
            source=source,
        )

    def __getstate__(self) -> dict[str, Any]:
        # The list can be long and every worker process can make it itself.
        return {name: value for name, value in self.__dict__.items() if name != "_episodes"}

    @cached_property
    def _episodes(self) -> dict[str, None]:
        layout = self._layout
        patterns = [layout.rows, *(layout.videos.replace("{view}", view) for view in layout.views)]
        found = {name for pattern in patterns for name in _matches(self.root, pattern)}
        if not found:
            raise DataError("no episodes", where=self.root, expected=f"files like {layout.rows}")
        return dict.fromkeys(sorted(found, key=natural))

    def _check(self) -> None:
        """Refuse settings that cannot be, by name."""
        layout, file = self._layout, self._file
        if not 0 < layout.fps <= 1000:
            raise ConfigError("setting 'fps'", where=file, got=layout.fps, expected="frames a second")
        if not layout.views or len(self._cameras) < len(layout.views):
            raise ConfigError("setting 'views'", where=file, got=layout.views, expected="different names")
        if not layout.action:
            raise ConfigError("setting 'action'", where=file, got="no column", expected="at least one")
        if layout.rows_per_frame < 1:
            raise ConfigError(
                "setting 'rows_per_frame'", where=file, got=layout.rows_per_frame, expected="1 or more"
            )
        if len(layout.delimiter) != 1:
            raise ConfigError(
                "setting 'delimiter'", where=file, got=repr(layout.delimiter), expected="one character"
            )
        several = {"episode", "view"} if len(layout.views) > 1 else {"episode"}
        for setting, needed in (("videos", several), ("rows", {"episode"}), ("text_file", {"episode"})):
            if (pattern := getattr(layout, setting)) is not None:
                _check_pattern(pattern, setting, needed, file)
                inside(self.root, pattern, where=f"{setting} of {file}")
        if Path(layout.rows).suffix not in (".csv", ".npz", ".npy"):
            raise ConfigError("setting 'rows'", where=file, got=layout.rows, expected=".csv, .npz or .npy")

    def _first_columns(self) -> list[str]:
        """Columns of the first table that can be read."""
        reasons = []
        for episode in self._episodes:
            try:
                path = self._path(self._layout.rows, episode)
                return list(read_columns(path, None, self._layout.delimiter))
            except DataError as error:
                reasons.append(error)
        raise reasons[0]

    def _path(self, pattern: str, episode: str, view: str = "") -> Path:
        return inside(self.root, pattern.format(episode=episode, view=view), where=self._file)

    def _text(self, episode: str) -> str:
        if self._layout.text_file is None:
            return self._layout.text
        path = self._path(self._layout.text_file, episode)
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_TEXT + 1).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read the instruction", where=path, got=error) from None
        if len(text) > MAX_TEXT:
            raise DataError(
                "length of the instruction", where=path, expected=f"at most {MAX_TEXT} characters"
            )
        return text


def _select(columns: list[str], facts: Mapping[str, Any], where: str) -> dict[str, Dimension]:
    """Columns that names or patterns mean, each once, in the order of the patterns and then of the table."""
    chosen: dict[str, Dimension] = {}
    for pattern, mapping in facts.items():
        said = from_mapping(ColumnFacts, mapping, where=f"{pattern!r} of {where}")
        matches = [column for column in columns if column == pattern or fnmatchcase(column, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, columns, n=1)
            shown = ", ".join(columns[:20]) + (" ..." if len(columns) > 20 else "")
            raise ConfigError(
                f"no column {pattern!r}",
                where=where,
                expected=f"a name or pattern among {shown}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        if said.name is not None and len(matches) > 1:
            raise ConfigError(f"{pattern!r} gives {len(matches)} columns one name", where=where)
        changes = {key: value for key, value in vars(said).items() if value is not None}
        for column in matches:
            chosen[column] = replace(chosen.get(column) or guess_dimension(column), **changes)
    names = [dimension.name for dimension in chosen.values()]
    if len(set(names)) < len(names):
        raise ConfigError("two columns under one name", where=where, got=", ".join(names))
    return chosen


def _check_pattern(pattern: str, setting: str, needed: set[str], file: Path) -> None:
    """A pattern names what it must and nothing else, and stays in the folder."""
    try:
        parsed = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(pattern)]
    except ValueError as error:
        raise ConfigError(f"setting {setting!r}", where=file, got=f"{pattern!r} ({error})") from None
    names = {name for name, _, _ in parsed if name is not None}
    allowed = {"episode", "view"} if setting == "videos" else {"episode"}
    plain = not any(spec or conversion for _, spec, conversion in parsed)
    if not needed <= names <= allowed or not plain:
        raise ConfigError(
            f"setting {setting!r}",
            where=file,
            got=repr(pattern),
            expected="a path with " + " and ".join(f"{{{name}}}" for name in sorted(needed)),
        )


def _matches(root: Path, pattern: str) -> set[str]:
    """What `{episode}` stands for in the files of a pattern."""
    glob = re.sub(r"[\[\]*?]", "?", pattern).replace("{episode}", "*")
    first, *others = (re.escape(part) for part in pattern.split("{episode}"))
    named = first + "(?P<episode>[^/]+)" + "(?P=episode)".join(others)
    paths = (path.relative_to(root).as_posix() for path in root.glob(glob) if path.is_file())
    return {found["episode"] for path in paths if (found := re.fullmatch(named, path))}


def _matrix(table: Mapping[str, np.ndarray], columns: list[str], rows: int) -> np.ndarray:
    """Columns as float32 [T, D]; what is too large for it becomes infinite, and is then refused by name."""
    if not columns:
        return np.zeros((rows, 0), np.float32)
    with np.errstate(over="ignore"):
        return np.stack([table[column] for column in columns], axis=1).astype(np.float32)
