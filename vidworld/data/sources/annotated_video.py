"""Sets of mp4 files with one JSON an episode: Ctrl-World, IRASim, and what is written for Cosmos like them.

    annotation/train/0.json       {"texts": [...], "success": 1, "videos": [{"video_path": ...}, ...], ...}
    videos/train/0/0.mp4          one file a camera, named by the JSON relative to this folder

A folder of several such parts is one source too. What the numbers are is told by which fields a JSON has, see
`annotation_layouts`; a set may mix layouts, and each is an embodiment of its own. Where a JSON has no action,
the state of the next frame is it, absolute, and the contract's note says so.

Frames have no clock: timestamps are frame number / fps. The rate is that of the JSON (`fps`), else the one
known of the layout, else that of the mp4 header, which is known to be wrong in such sets.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.config import digest, to_mapping
from vidworld.contract import Dimension
from vidworld.data.resample import resample_actions
from vidworld.data.sources.annotation_layouts import JOINTS, LAYOUTS, NEXT_STATE, Field, Layout, chosen
from vidworld.data.sources.location import inside
from vidworld.data.sources.log_facts import FACTS_FILE, LogFacts, read_facts
from vidworld.data.sources.naming import natural, view_name
from vidworld.data.sources.video_file import FPS_TOLERANCE, measured_fps, whole_video
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode, Video

ANNOTATION = "annotation"
MAX_JSON_BYTES = 2**28
MAX_TEXT = 10_000
NO_CLOCK = "frame number / fps: the logs have no clock"


class AnnotatedVideoSource:
    """One folder of mp4 files with a JSON an episode, or a folder of several such parts.

    Episode ids are `<part>-<split>-<name of the JSON>`, without what there is only one of: `val-199`. `fps`
    overrides the rate. A `logs.yaml` may choose other fields of the JSON: `action: [action.joint_velocity]`.
    """

    def __init__(self, root: Path | str, *, fps: float | None = None) -> None:
        self.root = Path(root)
        self._fps = fps
        self._rate_of_headers = False
        self._facts = read_facts(self.root)
        if replace(self._facts, action=(), state=()) != LogFacts():
            raise ConfigError(
                "settings", where=self.root / FACTS_FILE, expected="action and state only, for mp4 + JSON"
            )
        rates: dict[float, str] = {}
        views: dict[str, None] = {}
        self._specs: dict[str, EmbodimentSpec] = {}
        for folder in _folders(self.root):
            path, record, layout = _first_readable(folder, self._facts)
            videos = self._videos(path, record, layout)
            header = _header_fps(next(iter(videos.values())))
            declared = fps or _declared_fps(record, path) or layout.fps
            rate = declared or header
            self._rate_of_headers |= declared is None
            if rate is None:
                raise DataError("frames per second", where=path, got="none", expected="a number as `fps`")
            rates.setdefault(rate, self._relative(folder))
            views |= dict.fromkeys(videos)
            spec = _spec(layout, record, path, rate)
            if header is not None and abs(header - rate) > FPS_TOLERANCE * rate:
                said = (
                    f"mp4 headers of {self._relative(folder)} say {header:g} fps, the frames are {rate:g} Hz"
                )
                known = self._specs.get(layout.name, spec)
                spec = replace(known, note=f"{known.note}; {said}".strip("; "))
            else:
                spec = self._specs.get(layout.name, spec)
            self._specs[layout.name] = spec
        if len(rates) > 1:
            found = ", ".join(f"{folder} {rate:g}" for rate, folder in rates.items())
            raise DataError(
                "parts of different frame rates", where=self.root, got=found, fix="convert each alone"
            )
        self.fps = next(iter(rates))
        self.views = tuple(views)

    @classmethod
    def detects(cls, path: Path) -> bool:
        """Whether a folder, or a folder right in it, has JSON files in `annotation` or a folder of it."""
        return path.is_dir() and next(iter(_folders(path, check=False)), None) is not None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """One a layout."""
        return tuple(self._specs.values())

    @property
    def fingerprint(self) -> str:
        """Digest of the names and sizes of all JSON and video files."""
        files = sorted(path for path in self.root.rglob("*") if path.suffix in (".json", ".mp4"))
        facts = [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in files]
        return digest([facts, self._fps, to_mapping(self._facts)])

    def episode_ids(self) -> list[str]:
        """Every JSON, by the names of its part, its split and itself."""
        return list(self._files)

    def read(self, episode_id: str) -> Episode:
        """Read the JSON of an episode and open its videos, without decoding them."""
        if episode_id not in self._files:
            raise DataError(f"no episode {episode_id!r}", where=self.root)
        path = self._files[episode_id]
        record = _read_json(inside(self.root, self._relative(path), where=self.root))
        layout = _layout_of(record, path, self._facts)
        spec = self._specs.get(layout.name)
        if spec is None:
            raise DataError(
                f"fields as in {layout.name}", where=path, expected=f"as in {' or '.join(self._specs)}"
            )
        arrays = {field.key: _numbers(record, field, path) for field in layout.fields}
        rows = math.ceil(len(arrays[layout.fields[0].key]) / layout.fields[0].every)
        _check_lengths(layout, arrays, rows, path)
        proprio = [arrays[field.key][:: field.every] for field in layout.proprio]
        proprio_TS = np.concatenate(proprio, axis=1) if proprio else np.zeros((rows, 0), np.float32)
        videos = self._videos(path, record, layout)
        views, header = self._open(videos)
        source: dict[str, Any] = {"format": f"mp4 + JSON, {layout.name}", "file": self._relative(path)}
        source |= {"episode_id": _episode_name(record, path), "timestamps": NO_CLOCK}
        if not layout.action:
            source["actions"] = NEXT_STATE
        if header is not None:
            source["video_header_fps"] = header
        return Episode(
            episode_id=episode_id,
            embodiment=spec.embodiment,
            fps=self.fps,
            views=views,
            actions_TA=_actions(layout, arrays, proprio_TS, len(spec.action)),
            proprio_TS=proprio_TS,
            timestamps_T=np.arange(rows) / self.fps,
            text=_text(record, path),
            outcome=_outcome(record, path),
            source=source,
        )

    def __getstate__(self) -> dict[str, Any]:
        # The list of files can be long and every worker process can make it itself.
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Episode id -> its JSON."""
        return {
            "-".join((*self._prefix(folder), path.stem)): path
            for folder in _folders(self.root)
            for path in _json_files(folder)
        }

    def _prefix(self, folder: Path) -> tuple[str, ...]:
        """Names of the part and the split of a folder of JSON files."""
        return tuple(part for part in folder.relative_to(self.root).parts if part != ANNOTATION)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _videos(self, path: Path, record: Mapping[str, Any], layout: Layout) -> dict[str, Path]:
        """Name of a view -> its file."""
        entries = record.get("videos", [{"video_path": record.get("video_path")}])
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise DataError("videos", where=path, expected='a list of {"video_path": ...}')
        part = next(parent for parent in path.parents if parent.name == ANNOTATION).parent
        given = [entry.get("camera") for entry in entries]
        if all(isinstance(name, str) for name in given):
            names = [view_name(str(name)) for name in given]
        elif len(layout.views) == len(entries):
            names = list(layout.views)
        else:
            names = [f"view_{index}" for index in range(len(entries))]
        if len(set(names)) < len(names):
            raise DataError("two cameras under one name", where=path, got=", ".join(names))
        return {
            name: inside(part, entry.get("video_path"), where=path)
            for name, entry in zip(names, entries, strict=True)
        }

    def _open(self, videos: Mapping[str, Path]) -> tuple[dict[str, Video], float | None]:
        """The videos, and the rate that their headers say, if it is another."""
        opened: dict[str, Video] = {}
        wrong = None
        for view, path in videos.items():
            header = measured_fps(path) or self.fps
            opened[view] = whole_video(path, declared_fps=self.fps if self._rate_of_headers else header)
            if abs(header - self.fps) > FPS_TOLERANCE * self.fps:
                wrong = header
        return opened, wrong


def _folders(root: Path, *, check: bool = True) -> list[Path]:
    """Folders that hold JSON files: `annotation` of the root or of its parts, or the splits in it."""
    own = root / ANNOTATION
    annotations = [own] if own.is_dir() else sorted(root.glob(f"*/{ANNOTATION}"))
    candidates = [folder for path in annotations for folder in (path, *sorted(path.glob("*/")))]
    found = [folder for folder in candidates if next(folder.glob("*.json"), None)]
    if not found and check:
        raise DataError(f"no JSON in {ANNOTATION}", where=root)
    return found


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: natural(path.stem))


def _first_readable(folder: Path, facts: LogFacts) -> tuple[Path, dict[str, Any], Layout]:
    """The first JSON of a folder that is whole, which tells what the others hold."""
    reasons = []
    for path in _json_files(folder):
        try:
            record = _read_json(path)
            return path, record, _layout_of(record, path, facts)
        except DataError as error:
            reasons.append(error)
    raise reasons[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise DataError("cannot read the JSON", where=path, got=error.strerror) from None
    if size > MAX_JSON_BYTES:
        raise DataError("size of the JSON", where=path, got=f"{size} bytes", expected=MAX_JSON_BYTES)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("damaged JSON", where=path, got=str(error)[:200]) from None
    if not isinstance(record, dict):
        raise DataError("JSON", where=path, got=type(record).__name__, expected="an object with named fields")
    return record


def _layout_of(record: Mapping[str, Any], path: Path, facts: LogFacts) -> Layout:
    for known in LAYOUTS:
        if all(field.key in record for field in known.fields):
            layout = chosen(known, facts.action, facts.state)
            for field in layout.fields:
                if field.key not in record:
                    raise DataError(f"no field {field.key!r}", where=path, got=", ".join(map(str, record)))
            return layout
    raise DataError(
        "fields of the JSON",
        where=path,
        got=", ".join(map(str, list(record)[:12])) or "none",
        expected="; or ".join(", ".join(field.key for field in layout.fields) for layout in LAYOUTS),
        fix="a plain folder with a vidworld.yaml takes any other: docs/bring-your-own-data.md",
    )


def _spec(layout: Layout, record: Mapping[str, Any], path: Path, rate: float) -> EmbodimentSpec:
    """The embodiment of a layout, with the widths of this episode where the layout leaves them open."""

    def dimensions(fields: tuple[Field, ...]) -> Iterator[Dimension]:
        for field in fields:
            width = 0 if field.dimensions else _numbers(record, field, path).shape[1]
            yield from field.dimensions or (Dimension(f"{field.key}_{index}") for index in range(width))

    proprio = tuple(dimensions(layout.proprio))
    # A pose and its gripper are a command; the joints that go with it would say the same twice.
    action = tuple(dimensions(layout.action)) or tuple(d for d in proprio if d not in JOINTS)
    return EmbodimentSpec(layout.embodiment, rate, action, proprio, layout.control_frame, layout.note)


def _actions(
    layout: Layout, arrays: Mapping[str, np.ndarray], proprio_TS: np.ndarray, width: int
) -> np.ndarray:
    """One action a frame: the recorded ones at the rate of the frames, or the next frame's state."""
    if not layout.action:
        # No frame follows the last one: it keeps its own state.
        return np.concatenate([proprio_TS[1:, :width], proprio_TS[-1:, :width]])
    columns = [
        resample_actions(arrays[field.key], field.dimensions, field.every, layout.control_frame)
        for field in layout.action
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _numbers(record: Mapping[str, Any], field: Field, path: Path) -> np.ndarray:
    """A field as float32 [N, D]; what is too large for it becomes infinite, and is then refused by name."""
    try:
        values = np.array(record[field.key])
    except (ValueError, OverflowError, RecursionError):
        raise DataError(f"{field.key!r}", where=path, got="rows of different widths") from None
    if values.ndim == 1:
        values = values[:, None]
    if values.dtype.kind not in "iuf" or values.ndim != 2:
        raise DataError(
            f"{field.key!r}", where=path, got=f"{values.dtype} {values.shape}", expected="rows of numbers"
        )
    wanted = len(field.dimensions)
    if values.shape[1] < wanted:
        raise DataError(
            f"{field.key!r}", where=path, got=f"{values.shape[1]} numbers a row", expected=f"{wanted}"
        )
    with np.errstate(over="ignore"):
        return values[:, : wanted or None].astype(np.float32)


def _check_lengths(layout: Layout, arrays: Mapping[str, np.ndarray], rows: int, path: Path) -> None:
    first = layout.fields[0].key
    for field in layout.fields:
        count, every = len(arrays[field.key]), field.every
        if math.ceil(count / every) != rows:
            raise DataError(
                f"rows of {field.key!r}",
                where=path,
                got=count,
                expected=f"{every} a frame, {every * (rows - 1) + 1} to {every * rows} for the {rows} {first}"
                if every > 1
                else f"{rows} as {first}",
            )


def _declared_fps(record: Mapping[str, Any], path: Path) -> float | None:
    fps = record.get("fps")
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise DataError("fps", where=path, got=repr(fps)[:50], expected="frames a second")
    return float(fps)


def _header_fps(path: Path) -> float | None:
    """The rate that a header says; a damaged video is reported when its episode is read."""
    try:
        return measured_fps(path)
    except DataError:
        return None


def _text(record: Mapping[str, Any], path: Path) -> str:
    texts = next((record[key] for key in ("texts", "text", "task") if key in record), [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("texts", where=path, got=repr(texts)[:100], expected="a list of texts")
    text = "; ".join(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(text) > MAX_TEXT:
        raise DataError("texts", where=path, got=f"{len(text)} characters", expected=f"at most {MAX_TEXT}")
    return text


def _outcome(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    success = record.get("success")
    if success is None:
        return {}
    if success not in (0, 1):
        raise DataError("success", where=path, got=repr(success)[:50], expected="0 or 1")
    return {"success": bool(success)}


def _episode_name(record: Mapping[str, Any], path: Path) -> int | str:
    """The id in the JSON: a number or a text; the file's name where there is none."""
    name = record.get("episode_id", path.stem)
    if isinstance(name, bool) or not isinstance(name, int | str) or len(str(name)) > 200:
        raise DataError("episode_id", where=path, got=repr(name)[:50], expected="a number or a text")
    return name
