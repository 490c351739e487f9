"""LeRobot datasets, v2.0, v2.1 and v3.0, read without the `lerobot` package.

`meta/info.json` says where things are: its path templates are followed, not its version string. Episodes are
looked up by `episode_index`, never by position, so a dataset may have gaps. In v3.0 many episodes share a
parquet and a video file; the episode table gives each one's span of seconds in the video.

Row i goes with frame i of the episode. The `timestamp` column is kept as recorded and may jitter: it is not
used to look frames up, and is never made up when it is missing.

What `vidworld export-dataset` wrote beside the standard columns is read back: the contract, the recorded
times (LeRobot needs `timestamp` to be regular), outcomes and the episodes' ids in their first source.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vidworld.config import digest
from vidworld.data import lerobot_format as lerobot
from vidworld.data.sources.lerobot_meta import (
    feature_names,
    filled_path,
    read_episodes,
    read_info,
    read_rows,
    read_tasks,
)
from vidworld.data.sources.naming import guess_dimension, view_name
from vidworld.data.sources.picture import decode_picture
from vidworld.data.sources.video_file import part_of_video, whole_video
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video


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
        self._info = read_info(self.root)
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
                action=tuple(map(guess_dimension, feature_names(self._features, self.action_key))),
                proprio=tuple(map(guess_dimension, feature_names(self._features, self.state_key))),
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
        return read_episodes(self.root)

    @cached_property
    def _tasks(self) -> dict[int, str]:
        """Task index -> text."""
        return read_tasks(self.root)

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
        return path, read_rows(path, keys, index)

    def _kept_contract(self) -> EmbodimentSpec | None:
        """What the contract file of an export says, as long as it speaks of the columns that are here."""
        contract = lerobot.read_contract(self.root)
        if contract is None:
            return None
        for key, dimensions in ((self.action_key, contract.action), (self.state_key, contract.proprio)):
            if [dimension.name for dimension in dimensions] != feature_names(self._features, key):
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
        values["episode_chunk"] = index // self._info.get("chunks_size", 1000)
        for number in ("chunk_index", "file_index"):
            if row.get(f"{prefix}/{number}") is not None:
                values[number] = row[f"{prefix}/{number}"]
        return filled_path(self.root, self._info, template, values, prefix)

    def _video(self, key: str, index: int, row: Mapping[str, Any], rows_path: Path) -> Video:
        if self._features[key]["dtype"] == "image":
            count = read_rows(rows_path, (lerobot.EPISODE_INDEX,), index).num_rows
            return Video(count, partial(_decode_images, rows_path, key, index))
        prefix = f"videos/{key}"
        path = self._path("video_path", index, row, prefix, key)
        if not path.is_file():
            raise DataError(f"missing video of {key}", where=path)
        start, end = (row.get(f"{prefix}/{bound}_timestamp") for bound in ("from", "to"))
        if start is None or end is None:
            return whole_video(path, declared_fps=self.fps)
        return part_of_video(path, declared_fps=self.fps, start_s=start, end_s=end)


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
        read_rows(path, (key, lerobot.EPISODE_INDEX), index).column(key).to_pylist()
    ):
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if not isinstance(content, bytes):
            raise DataError(f"no picture in row {row} of {key}", where=path)
        yield decode_picture(content, f"picture {row} of {key}", path)
