"""Write a LeRobot v3.0 dataset, episode by episode, with bounded memory and equal bytes for equal episodes.

    layout = Layout(...)                         # what all episodes have in common
    with LeRobotWriter(folder, layout) as writer:
        for episode in episodes:
            writer.add(encode_episode(episode, layout))   # encode_episode is safe in threads
        writer.finish(splits={"train": "0:18"}, contract=...)

Shapes: T frames, A action dims, S proprio dims. Source of the layout: `lerobot.datasets.dataset_writer`,
`dataset_metadata` and `io_utils` of lerobot 0.4 to 0.6.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from vidworld.contract import ActionContract
from vidworld.data import lerobot_format as lerobot
from vidworld.data.export_lerobot_stats import FeatureStats, PictureStats, RunningStats, of_rows
from vidworld.data.export_lerobot_tables import MB, EpisodeTable, ParquetFiles, Place, to_table, write_tasks
from vidworld.data.export_lerobot_video import Codec, EncodedVideo, EpisodeEncoder, VideoFile
from vidworld.errors import ContractError, DataError


@dataclass(frozen=True)
class Layout:
    """What all episodes of a dataset have in common. Raises DataError for what LeRobot cannot hold."""

    fps: float
    height: int
    width: int
    views: tuple[str, ...]
    contract: ActionContract
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of single numbers: name -> dtype."""
    codec: Codec = "h264"
    data_file_mb: float = lerobot.DATA_FILE_MB
    video_file_mb: float = lerobot.VIDEO_FILE_MB
    files_per_chunk: int = lerobot.FILES_PER_CHUNK

    def __post_init__(self) -> None:
        if self.height % 2 or self.width % 2:
            raise DataError(
                "size of the video",
                got=f"{self.width}x{self.height}",
                expected="even numbers: H.264 with 4:2:0 colour has no others",
                fix="convert the logs again with an even --size",
            )
        for name in (*map(lerobot.camera_key, self.views), *self.columns):
            lerobot.check_feature(name)
        for role, dimensions in (("action", self.contract.action), ("proprio", self.contract.proprio)):
            given = [dimension.name for dimension in dimensions]
            if len(set(given)) < len(given) or (role == "action" and not given):
                raise ContractError(
                    f"{role} dimensions of {self.contract.embodiment!r}",
                    got=", ".join(given) or "none",
                    expected="different names, at least one" if role == "action" else "different names",
                    fix="name them in a contract file and convert again: vidworld shard --contract FILE",
                )

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """`features` of info.json, in the order of the columns."""
        vectors = {lerobot.STATE: self.contract.proprio, lerobot.ACTION: self.contract.action}
        singles = dict(self.columns) | {lerobot.RECORDED_TIME: "float64"} | lerobot.BOOKKEEPING
        return {
            **{
                key: _feature("float32", len(dimensions), [dimension.name for dimension in dimensions])
                for key, dimensions in vectors.items()
                if dimensions
            },
            **{lerobot.camera_key(view): self._camera() for view in self.views},
            **{key: _feature(dtype, 1, None) for key, dtype in singles.items()},
        }

    @property
    def schema(self) -> pa.Schema:
        """Of the data files: vectors of fixed length, and what Hugging Face's `datasets` reads them as."""
        columns, described = [], {}
        for key, feature in self.features.items():
            if feature["dtype"] == "video":
                continue
            length, value = feature["shape"][0], {"dtype": feature["dtype"], "_type": "Value"}
            single = pa.bool_() if feature["dtype"] == "bool" else getattr(pa, feature["dtype"])()
            columns.append((key, single if length == 1 else pa.list_(single, length)))
            described[key] = value if length == 1 else {"feature": value, "length": length, "_type": "List"}
        note = json.dumps({"info": {"features": described}})
        return pa.schema(columns, metadata={"huggingface": note})

    def _camera(self) -> dict[str, Any]:
        return {
            "dtype": "video",
            "shape": [self.height, self.width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": self.height,
                "video.width": self.width,
                "video.codec": self.codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": whole(self.fps),
                "video.channels": 3,
                "has_audio": False,
            },
        }


@dataclass(frozen=True)
class Take:
    """An episode to write, in raw units."""

    name: str
    text: str
    actions_TA: np.ndarray
    proprio_TS: np.ndarray
    timestamps_T: np.ndarray
    pictures: Callable[[], Iterator[Mapping[str, np.ndarray]]]
    """Yields view -> the next frames [n, H, W, 3] uint8, until all T were given."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The layout's further columns, [T] each."""
    facts: Mapping[str, str | int] = field(default_factory=dict)
    """Further columns of the episode table, the same for every episode."""


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode whose pictures are encoded and whose statistics are known."""

    take: Take
    videos: dict[str, EncodedVideo]
    pictures: dict[str, FeatureStats]


def encode_episode(take: Take, layout: Layout) -> EncodedEpisode:
    """Encode all views of an episode; a few frames at a time are in memory."""
    frames = len(take.actions_TA)
    encoders = {
        view: EpisodeEncoder(layout.width, layout.height, layout.fps, layout.codec) for view in layout.views
    }
    pictures = {view: PictureStats(frames) for view in layout.views}
    try:
        for part in take.pictures():
            for view in layout.views:
                encoders[view].add(part[view])
                pictures[view].add(part[view])
        videos = {view: encoder.finish() for view, encoder in encoders.items()}
    finally:
        for encoder in encoders.values():
            encoder.close()
    for view, video in videos.items():
        if video.num_frames != frames:
            raise DataError(
                f"frames of view {view!r} of {take.name!r}", got=video.num_frames, expected=frames
            )
    return EncodedEpisode(take, videos, {view: seen.result() for view, seen in pictures.items()})


class LeRobotWriter:
    """A dataset that grows by episodes; it is complete after `finish`, and not before."""

    def __init__(self, root: Path, layout: Layout) -> None:
        self.root, self.layout = root, layout
        self.num_episodes = self.num_frames = 0
        self._tasks: dict[str, int] = {}
        self._stats = RunningStats()
        self._rows = ParquetFiles(
            root, lerobot.DATA, layout.data_file_mb, layout.files_per_chunk, schema=layout.schema
        )
        self._table = EpisodeTable(root, layout.data_file_mb, layout.files_per_chunk)
        self._places = {view: Place(layout.files_per_chunk) for view in layout.views}
        self._videos: dict[str, VideoFile] = {}

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, episode: EncodedEpisode) -> None:
        """Append an episode."""
        take = episode.take
        columns = self._columns(take)
        stats = {key: of_rows(values) for key, values in columns.items() if values.dtype.kind in "fib"} | {
            lerobot.camera_key(view): seen for view, seen in episode.pictures.items()
        }
        place = self._rows.write(to_table(columns, self.layout.schema))
        row: dict[str, Any] = {
            lerobot.EPISODE_INDEX: self.num_episodes,
            "tasks": [take.text],
            "length": len(take.actions_TA),
            "data/chunk_index": place.chunk,
            "data/file_index": place.file,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + len(take.actions_TA),
        }
        for view, video in episode.videos.items():
            row |= self._append_video(view, video)
        row |= take.facts
        for key, feature in stats.items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in feature.items()}
        self._table.add(row)
        self._stats.add(stats)
        self.num_episodes += 1
        self.num_frames += len(take.actions_TA)

    def finish(self, *, splits: Mapping[str, str], note: Mapping[str, Any]) -> None:
        """Write what describes the whole: info, tasks, statistics, and our own `note` with the contract."""
        self._close()
        layout = self.layout
        write_tasks(self.root / lerobot.TASKS, list(self._tasks))
        _write_json(self.root / lerobot.STATS, self._stats.result())
        _write_json(self.root / lerobot.CONTRACT, {"contract": layout.contract.to_mapping(), **note})
        info = {
            "codebase_version": lerobot.VERSION,
            "robot_type": layout.contract.embodiment,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": layout.files_per_chunk,
            "data_files_size_in_mb": whole(layout.data_file_mb),
            "video_files_size_in_mb": whole(layout.video_file_mb),
            "fps": whole(layout.fps),
            "splits": dict(splits),
            "data_path": lerobot.DATA,
            "video_path": lerobot.VIDEO,
            "features": layout.features,
        }
        _write_json(self.root / lerobot.INFO, info)

    def _columns(self, take: Take) -> dict[str, np.ndarray]:
        frames = len(take.actions_TA)
        number = np.arange(frames)
        task = self._tasks.setdefault(take.text, len(self._tasks))
        values = {
            lerobot.STATE: take.proprio_TS,
            lerobot.ACTION: take.actions_TA,
            **take.columns,
            lerobot.RECORDED_TIME: take.timestamps_T,
            # The official loader looks a frame up by this time and allows 0.1 ms.
            lerobot.TIMESTAMP: number / self.layout.fps,
            lerobot.FRAME_INDEX: number,
            lerobot.EPISODE_INDEX: np.full(frames, self.num_episodes),
            lerobot.INDEX: self.num_frames + number,
            lerobot.TASK_INDEX: np.full(frames, task),
        }
        features = self.layout.features
        columns = {}
        for key in self.layout.schema.names:
            columns[key] = values[key].astype(features[key]["dtype"], copy=False)
            if len(columns[key]) != frames:
                raise DataError(f"rows of {key} of {take.name!r}", got=len(columns[key]), expected=frames)
        return columns

    def _append_video(self, view: str, video: EncodedVideo) -> dict[str, Any]:
        key, place = lerobot.camera_key(view), self._places[view]
        file = self._videos.get(view)
        if file is None or file.bytes + len(video.content) >= self.layout.video_file_mb * MB:
            if file is not None:
                file.close()
                place.advance()
            path = self.root / lerobot.VIDEO.format(
                video_key=key, chunk_index=place.chunk, file_index=place.file
            )
            file = self._videos[view] = VideoFile(path, self.layout.fps)
        start = file.num_frames
        file.append(video)
        return {
            f"videos/{key}/chunk_index": place.chunk,
            f"videos/{key}/file_index": place.file,
            f"videos/{key}/from_timestamp": start / self.layout.fps,
            f"videos/{key}/to_timestamp": file.num_frames / self.layout.fps,
        }

    def _close(self) -> None:
        self._rows.close()
        self._table.close()
        for video in self._videos.values():
            video.close()


def whole(number: float) -> int | float:
    """A whole number as such: LeRobot has `fps` as an integer where it is one."""
    return int(number) if float(number).is_integer() else float(number)


def _feature(dtype: str, length: int, labels: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [length], "names": labels}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
