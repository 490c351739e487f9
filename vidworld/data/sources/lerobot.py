"""LeRobot datasets, v2.0, v2.1 and v3.0, read without the `lerobot` package.

`meta/info.json` says where things are: its path templates are followed, not its version string. Episodes are
looked up by `episode_index`, never by position, so a dataset may have gaps. In v3.0 many episodes share a
parquet and a video file; the episode table gives each one's span of seconds in the video.

Row i goes with frame i of the episode. The `timestamp` column is kept as recorded and may jitter: it is not
used to look frames up, and is never made up when it is missing.

What `vidworld export-dataset` wrote beside the standard columns is read back: the contract, the recorded
times (LeRobot needs `timestamp` to be regular), outcomes and the episodes' ids in their first source.
"""

import json
import string
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidworld.config import digest
from vidworld.data import lerobot_format as lerobot
from vidworld.data.sources.naming import guess_dimension, view_name
from vidworld.data.sources.picture import decode_picture
from vidworld.data.sources.video_file import part_of_video, whole_video
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

_TEMPLATE_FIELDS = {"episode_chunk", "episode_index", "video_key", "chunk_index", "file_index"}


class LeRobotSource:
    """One LeRobot dataset folder.

    Episode ids are `episode_000027`. `action_key` and `state_key` name the columns that become actions and
    proprioception; a dataset without the latter has proprioception of width 0.
    """

    def __init__(
        self, root: Path | str, *, action_key: str = lerobot.ACTION, state_key: str = lerobot.STATE
    ) -> None:
        self.root = Path(root)
        self.action_key, self.state_key = action_key, state_key
        self._info = _read_info(self.root)
        self._features: dict[str, Any] = self._info["features"]
        if action_key not in self._features:
            raise DataError(
                f"no feature {action_key!r}", where=self.root / lerobot.INFO, got=", ".join(self._features)
            )
        self._cameras = {
            view_name(key): key
            for key, feature in self._features.items()
            if feature.get("dtype") in ("video", "image") and not lerobot.is_depth(feature)
        }
        if not self._cameras:
            raise DataError("no camera among the features", where=self.root / lerobot.INFO)

    @classmethod
    def detects(cls, path: Path) -> bool:
        """Whether a folder is a LeRobot dataset."""
        return (path / lerobot.INFO).is_file()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def views(self) -> tuple[str, ...]:
        """`observation.images.top` is called `top`; depth maps are left out."""
        return tuple(self._cameras)

    @property
    def fps(self) -> float:
        """As declared in info.json."""
        return float(self._info["fps"])

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """`robot_type` with the names of the features, and only those units and kinds that names state."""
        if kept := self._kept_contract():
            return (kept,)
        return (
            EmbodimentSpec(
                embodiment=str(self._info.get("robot_type") or "unknown"),
                rate_hz=self.fps,
                action=tuple(map(guess_dimension, _names(self._features, self.action_key))),
                proprio=tuple(map(guess_dimension, _names(self._features, self.state_key))),
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the names and sizes of all files."""
        folders = (self.root / name for name in ("meta", "data", "videos"))
        files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
        return digest([[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in files])

    def episode_ids(self) -> list[str]:
        """Every episode that the metadata list, by its own index."""
        return [f"episode_{index:06d}" for index in sorted(self._table)]

    def read(self, episode_id: str) -> Episode:
        """Read the rows of an episode and open its videos, without decoding them."""
        number = episode_id.removeprefix("episode_")
        if not number.isdecimal() or int(number) not in self._table:
            raise DataError(f"no episode {episode_id!r}", where=self.root)
        index, row = int(number), self._table[int(number)]
        path, table = self._rows(index, row)
        _check_rows(table, index, row, path)
        success = _column(table, lerobot.SUCCESS, path) if lerobot.SUCCESS in table.column_names else None
        recorded = lerobot.RECORDED_TIME in table.column_names
        times = lerobot.RECORDED_TIME if recorded else lerobot.TIMESTAMP
        return Episode(
            episode_id=episode_id,
            embodiment=self.embodiments[0].embodiment,
            fps=self.fps,
            views={view: self._video(key, index, row, path) for view, key in self._cameras.items()},
            actions_TA=_matrix(table, self.action_key, self._features, path),
            proprio_TS=_matrix(table, self.state_key, self._features, path),
            timestamps_T=_column(table, times, path).astype(np.float64),
            text=self._text(row, table),
            outcome=lerobot.json_of(row, lerobot.OUTCOME)
            or ({} if success is None else {"success": bool(success.any())}),
            source={
                "format": f"LeRobot {self._info.get('codebase_version', '')}".strip(),
                "index": index,
                **({"episode_id": row[lerobot.SOURCE_ID]} if lerobot.SOURCE_ID in row else {}),
                **({"origin": origin} if (origin := lerobot.json_of(row, lerobot.ORIGIN)) else {}),
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        # The episode table can be large and every worker process can read it itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_table", "_tasks")}

    @cached_property
    def _table(self) -> dict[int, dict[str, Any]]:
        """Episode index -> its row of the episode table."""
        folder = self.root / lerobot.EPISODE_TABLES
        rows = (
            _parquet_rows(folder) if folder.is_dir() else _json_lines(self.root / lerobot.LINES_OF_EPISODES)
        )
        table = {}
        for row in rows:
            index = row.get(lerobot.EPISODE_INDEX)
            if not isinstance(index, int) or index < 0 or index in table:
                raise DataError("episode_index in the episode table", where=self.root / "meta", got=index)
            table[index] = row
        if not table:
            raise DataError("no episodes in the episode table", where=self.root / "meta")
        return table

    @cached_property
    def _tasks(self) -> dict[int, str]:
        """Task index -> text."""
        lines = self.root / lerobot.LINES_OF_TASKS
        if lines.is_file():
            return {row["task_index"]: row["task"] for row in _json_lines(lines)}
        table = self.root / lerobot.TASKS
        if not table.is_file():
            return {}
        # v3.0 writes the text as the table's index, whatever that column is then called.
        columns = pq.read_table(table).to_pydict()
        texts = [column for name, column in columns.items() if name != lerobot.TASK_INDEX]
        return dict(zip(columns[lerobot.TASK_INDEX], texts[0], strict=True)) if texts else {}

    def _text(self, row: Mapping[str, Any], table: pa.Table) -> str:
        """Instruction of an episode: of the episode table, else of the task that its rows name."""
        tasks = row.get("tasks") or []
        if not tasks and lerobot.TASK_INDEX in table.column_names:
            seen = dict.fromkeys(table.column(lerobot.TASK_INDEX).to_pylist())
            tasks = [self._tasks[index] for index in seen if index in self._tasks]
        return "; ".join([tasks] if isinstance(tasks, str) else map(str, tasks))

    def _rows(self, index: int, row: Mapping[str, Any]) -> tuple[Path, pa.Table]:
        """Parquet file of an episode and its rows, images left out."""
        path = self._path("data_path", index, row, "data")
        keys = (self.action_key, self.state_key, lerobot.RECORDED_TIME, lerobot.SUCCESS, *lerobot.BOOKKEEPING)
        return path, _read_parquet(path, keys, index)

    def _kept_contract(self) -> EmbodimentSpec | None:
        """What the contract file of an export says, as long as it speaks of the columns that are here."""
        contract = lerobot.read_contract(self.root)
        if contract is None:
            return None
        for key, dimensions in ((self.action_key, contract.action), (self.state_key, contract.proprio)):
            if [dimension.name for dimension in dimensions] != _names(self._features, key):
                return None
        return EmbodimentSpec(
            embodiment=contract.embodiment,
            rate_hz=self.fps,
            action=contract.action,
            proprio=contract.proprio,
            control_frame=contract.control_frame,
            note=contract.note,
        )

    def _path(self, template: str, index: int, row: Mapping[str, Any], prefix: str, key: str = "") -> Path:
        """Fill a path template of info.json; `prefix` is where the episode table keeps the numbers."""
        values: dict[str, Any] = {"episode_index": index, "video_key": key}
        values["episode_chunk"] = index // int(self._info.get("chunks_size", 1000))
        for number in ("chunk_index", "file_index"):
            if row.get(f"{prefix}/{number}") is not None:
                values[number] = row[f"{prefix}/{number}"]
        pattern = self._info[template]
        wanted = {field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None}
        if unknown := wanted - _TEMPLATE_FIELDS:
            raise DataError(f"{template} names {', '.join(sorted(unknown))}", where=self.root / lerobot.INFO)
        if missing := wanted - values.keys():
            raise DataError(f"episode table without {prefix}/{missing.pop()}", where=self.root / "meta")
        filled = PurePosixPath(pattern.format(**values))
        if filled.is_absolute() or ".." in filled.parts:
            raise DataError(f"{template} leaves the dataset", where=self.root / lerobot.INFO, got=str(filled))
        return self.root / filled

    def _video(self, key: str, index: int, row: Mapping[str, Any], rows_path: Path) -> Video:
        if self._features[key]["dtype"] == "image":
            count = _read_parquet(rows_path, (lerobot.EPISODE_INDEX,), index).num_rows
            return Video(count, partial(_decode_images, rows_path, key, index))
        prefix = f"videos/{key}"
        path = self._path("video_path", index, row, prefix, key)
        if not path.is_file():
            raise DataError(f"missing video of {key}", where=path)
        start, end = (row.get(f"{prefix}/{bound}_timestamp") for bound in ("from", "to"))
        if start is None or end is None:
            return whole_video(path, declared_fps=self.fps)
        return part_of_video(path, declared_fps=self.fps, start_s=start, end_s=end)


def _read_info(root: Path) -> dict[str, Any]:
    path = root / lerobot.INFO
    try:
        info = json.loads(path.read_text())
    except OSError as error:
        raise DataError("cannot read the metadata", where=path, got=error.strerror) from None
    except ValueError as error:
        raise DataError("not valid JSON", where=path, got=error) from None
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError("no features", where=path, fix="is this a LeRobot dataset of v2.0 or newer?")
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not fps > 0:
        raise DataError("fps", where=path, got=fps, expected="frames per second")
    cameras = any(feature.get("dtype") == "video" for feature in info["features"].values())
    for template in ("data_path", "video_path") if cameras else ("data_path",):
        if not isinstance(info.get(template), str):
            raise DataError(
                f"no {template}",
                where=path,
                got=f"version {info.get('codebase_version')}",
                expected="LeRobot v2.0, v2.1 or v3.0",
                fix="older datasets: convert with lerobot's own converter first",
            )
    return info


def _names(features: Mapping[str, Any], key: str) -> list[str]:
    """One name per number of a feature: lists and `{"motors": [...]}` are both in use, or none at all."""
    if key not in features:
        return []
    shape, names = features[key].get("shape") or [], features[key].get("names")
    if len(shape) != 1:
        raise DataError(f"shape of feature {key!r}", got=shape, expected="one axis")
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


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError("cannot read the metadata", where=path, got=error.strerror) from None
    except ValueError as error:
        raise DataError("not valid JSON lines", where=path, got=error) from None


def _parquet_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the v3.0 episode table, statistics left out (they are most of its bytes)."""
    for path in sorted(folder.rglob("*.parquet")):
        try:
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            yield from pq.read_table(path, columns=names).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError("damaged episode table", where=path, got=error) from None


def _read_parquet(path: Path, wanted: tuple[str, ...], index: int) -> pa.Table:
    """Those of the wanted columns that exist, for the rows of one episode."""
    try:
        present = set(pq.read_schema(path).names)
        filters = [(lerobot.EPISODE_INDEX, "=", index)] if lerobot.EPISODE_INDEX in present else None
        return pq.read_table(path, columns=[key for key in wanted if key in present], filters=filters)
    except FileNotFoundError:
        raise DataError("missing data file", where=path) from None
    except (OSError, pa.ArrowException) as error:
        raise DataError("damaged data file", where=path, got=error) from None


def _check_rows(table: pa.Table, index: int, row: Mapping[str, Any], path: Path) -> None:
    """The rows must be those of this episode, complete and in order: row i is about to be frame i."""
    length = row.get("length")
    if length is not None and table.num_rows != length:
        raise DataError(
            f"rows of episode {index}",
            where=path,
            got=table.num_rows,
            expected=f"{length} as its length says",
        )
    if lerobot.FRAME_INDEX in table.column_names:
        frames = _column(table, lerobot.FRAME_INDEX, path)
        wrong = np.flatnonzero(frames != np.arange(len(frames)))
        if len(wrong):
            raise DataError(
                f"frame_index at row {wrong[0]} of episode {index}",
                where=path,
                got=frames[wrong[0]],
                expected=f"{wrong[0]}: rows are missing or out of order",
            )


def _column(table: pa.Table, key: str, path: Path) -> np.ndarray:
    """A column of single numbers [T]; lists of one number count as such."""
    if key not in table.column_names:
        raise DataError(f"no column {key!r}", where=path)
    values = _flat(table, key, path)
    if len(values) != table.num_rows:
        raise DataError(f"column {key!r}", where=path, got="lists", expected="one number a row")
    return values


def _matrix(table: pa.Table, key: str, features: Mapping[str, Any], path: Path) -> np.ndarray:
    """A column of vectors as float32 [T, D]."""
    if key not in features:
        return np.zeros((table.num_rows, 0), np.float32)
    if key not in table.column_names:
        raise DataError(f"no column {key!r}", where=path)
    width, values = features[key]["shape"][0], _flat(table, key, path)
    if len(values) != table.num_rows * width:
        raise DataError(
            f"column {key!r}",
            where=path,
            got=f"{len(values)} numbers in {table.num_rows} rows",
            expected=f"{width} a row",
        )
    return values.astype(np.float32).reshape(table.num_rows, width)


def _flat(table: pa.Table, key: str, path: Path) -> np.ndarray:
    column = table.column(key).combine_chunks()
    while (
        pa.types.is_list(column.type)
        or pa.types.is_large_list(column.type)
        or pa.types.is_fixed_size_list(column.type)
    ):
        if column.null_count:
            break
        column = column.flatten()
    if column.null_count:
        raise DataError(f"column {key!r}", where=path, got=f"{column.null_count} empty rows", expected="none")
    if not (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_boolean(column.type)
    ):
        raise DataError(f"column {key!r}", where=path, got=column.type, expected="numbers")
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _decode_images(path: Path, key: str, index: int) -> Iterator[np.ndarray]:
    """Frames of a camera whose pictures lie in the parquet file."""
    for row, picture in enumerate(
        _read_parquet(path, (key, lerobot.EPISODE_INDEX), index).column(key).to_pylist()
    ):
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if not isinstance(content, bytes):
            raise DataError(f"no picture in row {row} of {key}", where=path)
        yield decode_picture(content, f"picture {row} of {key}", path)
