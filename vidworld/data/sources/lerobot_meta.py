"""The metadata of a LeRobot folder, checked as they are read: whatever is wrong in them is one DataError."""

import json
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq

from vidworld.data import lerobot_format as lerobot
from vidworld.errors import DataError

TEMPLATE_FIELDS = {"episode_chunk", "episode_index", "video_key", "chunk_index", "file_index"}
MAX_NUMBER = 10**9
"""Of an episode, chunk or file."""
MAX_ROWS = 50_000_000
"""In one data file, which is of about 100 MB: more are equal numbers, packed to burst when unpacked."""
UNREADABLE = (OSError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException)
"""What pyarrow raises on damaged files."""


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`, with features, rate and path templates as they must be."""
    path = root / lerobot.INFO
    info = _json(path, "not valid JSON", _text(path))
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError("no features", where=path, fix="is this a LeRobot dataset of v2.0 or newer?")
    for key, feature in info["features"].items():
        facts = [feature.get("info"), feature.get("video_info")] if isinstance(feature, dict) else [feature]
        if not isinstance(feature, dict) or any(not isinstance(fact, dict | None) for fact in facts):
            raise DataError(f"feature {key!r}", where=path, got=_short(feature), expected="a mapping")
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise DataError("fps", where=path, got=fps, expected="frames per second")
    size = info.get("chunks_size", 1000)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError("chunks_size", where=path, got=_short(size), expected="a number of episodes")
    cameras = any(feature.get("dtype") == "video" for feature in info["features"].values())
    for template in ("data_path", "video_path") if cameras else ("data_path",):
        if not isinstance(info.get(template), str):
            raise DataError(
                f"no {template}",
                where=path,
                got=f"version {_short(info.get('codebase_version'))}",
                expected="LeRobot v2.0, v2.1 or v3.0",
                fix="older datasets: convert with lerobot's own converter first",
            )
    return info


def feature_names(features: Mapping[str, Any], key: str) -> list[str]:
    """One name per number of a feature: lists and `{"motors": [...]}` are both in use, or none at all."""
    if key not in features:
        return []
    shape, names = features[key].get("shape"), features[key].get("names")
    if (
        not isinstance(shape, list)
        or len(shape) != 1
        or isinstance(shape[0], bool)
        or not isinstance(shape[0], int)
        or not 0 <= shape[0] <= 4096
    ):
        raise DataError(f"shape of feature {key!r}", got=_short(shape), expected="one axis")
    while isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, dict):
        names = list(names)
    if (
        not isinstance(names, list)
        or len(names) != shape[0]
        or len({str(name) for name in names}) != shape[0]
    ):
        names = [f"{key.rpartition('.')[2]}_{index}" for index in range(shape[0])]
    return [str(name) for name in names]


def read_episodes(root: Path) -> dict[int, dict[str, Any]]:
    """Episode index -> its row of the episode table, of either version."""
    folder = root / lerobot.EPISODE_TABLES
    rows = _parquet_rows(folder) if folder.is_dir() else _json_lines(root / lerobot.LINES_OF_EPISODES)
    table: dict[int, dict[str, Any]] = {}
    for row in rows:
        index = row.get(lerobot.EPISODE_INDEX)
        if not _is_number(index) or index in table:
            raise DataError("episode_index in the episode table", where=root / "meta", got=_short(index))
        tasks = row.get("tasks") or []
        if not isinstance(tasks, str | list) or not all(isinstance(task, str) for task in tasks):
            raise DataError(
                f"tasks of episode {index}", where=root / "meta", got=_short(tasks), expected="texts"
            )
        for key, value in row.items():
            if value is None:
                continue
            counts = key == "length" or key.endswith(("/chunk_index", "/file_index"))
            if counts and not _is_number(value):
                raise DataError(f"{key} of episode {index}", where=root / "meta", got=_short(value))
            if key.endswith(("/from_timestamp", "/to_timestamp")) and not _is_time(value):
                raise DataError(
                    f"{key} of episode {index}", where=root / "meta", got=_short(value), expected="seconds"
                )
        table[index] = row
    if not table:
        raise DataError("no episodes in the episode table", where=root / "meta")
    return table


def read_tasks(root: Path) -> dict[int, str]:
    """Task index -> text, of either version."""
    lines, table = root / lerobot.LINES_OF_TASKS, root / lerobot.TASKS
    if lines.is_file():
        rows = [(row.get(lerobot.TASK_INDEX), row.get("task")) for row in _json_lines(lines)]
    elif table.is_file():
        try:
            columns = pq.read_table(table).to_pydict()
        except UNREADABLE as error:
            raise DataError("damaged table of tasks", where=table, got=error) from None
        # v3.0 writes the text as the table's index, whatever that column is then called.
        texts = [column for name, column in columns.items() if name != lerobot.TASK_INDEX]
        rows = list(zip(columns.get(lerobot.TASK_INDEX, []), texts[0] if texts else [], strict=False))
    else:
        return {}
    found: dict[int, str] = {}
    for index, text in rows:
        if not _is_number(index) or not isinstance(text, str):
            raise DataError(
                "task",
                where=root / "meta",
                got=f"{_short(index)}: {_short(text)}",
                expected="number and text",
            )
        found[index] = text
    return found


def filled_path(
    root: Path, info: Mapping[str, Any], template: str, values: Mapping[str, Any], prefix: str
) -> Path:
    """Fill a path template of info.json; `prefix` is where the episode table keeps the numbers."""
    pattern, where = info[template], root / lerobot.INFO
    try:
        parsed = [part for part in string.Formatter().parse(pattern) if part[1] is not None]
    except ValueError as error:
        raise DataError(template, where=where, got=_short(pattern), expected=str(error)) from None
    wanted = {str(field) for _, field, _, _ in parsed}
    if unknown := wanted - TEMPLATE_FIELDS:
        raise DataError(f"{template} names {', '.join(sorted(unknown))}", where=where)
    for _, field, spec, conversion in parsed:
        if conversion or not re.fullmatch(r"" if field == "video_key" else r"(0?[0-9]{0,2}d)?", spec or ""):
            raise DataError(
                template, where=where, got=_short(pattern), expected="numbers like {file_index:03d}"
            )
    if missing := wanted - values.keys():
        raise DataError(f"episode table without {prefix}/{missing.pop()}", where=root / "meta")
    filled = PurePosixPath(pattern.format(**values))
    if filled.is_absolute() or ".." in filled.parts or "\0" in str(filled):
        raise DataError(f"{template} leaves the dataset", where=where, got=_short(str(filled)))
    return root / filled


def read_rows(path: Path, wanted: Sequence[str], index: int) -> pa.Table:
    """Those of the wanted columns of a data file that exist, for the rows of one episode."""
    try:
        metadata = pq.read_metadata(path)
        if metadata.num_rows > MAX_ROWS:
            raise DataError(
                "rows of a data file", where=path, got=metadata.num_rows, expected=f"at most {MAX_ROWS}"
            )
        present = set(metadata.schema.to_arrow_schema().names)
        filters = [(lerobot.EPISODE_INDEX, "=", index)] if lerobot.EPISODE_INDEX in present else None
        return pq.read_table(path, columns=[key for key in wanted if key in present], filters=filters)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("missing data file", where=path) from None
    except UNREADABLE as error:
        raise DataError("damaged data file", where=path, got=error) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("cannot read the metadata", where=path, got=error.strerror) from None
    except UnicodeDecodeError as error:
        raise DataError("not text in UTF-8", where=path, got=error) from None


def _json(path: Path, what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(what, where=path, got=error) from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [_json(path, "not valid JSON lines", line) for line in _text(path).splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"line {number}", where=path, got=_short(row), expected="a mapping")
    return rows


def _parquet_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the v3.0 episode table, statistics left out (they are most of its bytes)."""
    for path in sorted(folder.rglob("*.parquet")):
        try:
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            yield from pq.read_table(path, columns=names).to_pylist()
        except UNREADABLE as error:
            raise DataError("damaged episode table", where=path, got=error) from None


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _short(value: Any) -> str:
    """A value for a message, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
