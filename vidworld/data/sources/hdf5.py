"""Robot logs in HDF5: robomimic and LIBERO, ACT (ALOHA, Cobot Magic), RoboMIND; a file or a folder of them.

`hdf5_layouts` tells the layouts apart by the first file that opens; `hdf5_file` keeps files from reaching
outside themselves. Pictures are uint8 arrays, or JPEGs and PNGs padded with zeros or of any length. Row t of
each field belongs to picture t. No layout has a clock, so timestamps are row / rate; robomimic files state
the rate, so do ACT's simulated ones, and for the others `fps` is 0: a contract file (`rate_hz`) says it.

Pictures are given as they are stored. LIBERO stores them upside down, and some recorders hand RGB to OpenCV,
which takes it for BGR, before compressing: look at the result, and say `flip: rows` or `channels: bgr` in
`logs.yaml` (see `log_facts`).
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.config import digest, to_mapping
from vidworld.contract import Dimension
from vidworld.data.sources.hdf5_file import (
    check_camera,
    child,
    frames,
    hdf5_files,
    names_in,
    numbers,
    open_hdf5,
)
from vidworld.data.sources.hdf5_layouts import Layout, episode_text, layout_of
from vidworld.data.sources.log_facts import (
    LogFacts,
    join_dimensions,
    read_facts,
    wanted_views,
)
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

ATTEMPTS = 8
"""Files tried before it is believed that none can be read."""


class Hdf5Source:
    """One HDF5 file, or a folder of files of one layout.

    Episode ids are the file's path without its ending, then the group where a file has several episodes:
    `demo_3` in a file alone, `open_drawer_demo/demo_3` among several, `task/episode_12`. `fps` overrides the
    rate.
    """

    def __init__(self, root: Path | str, *, fps: float | None = None) -> None:
        self.root = Path(root)
        self._folder = self.root if self.root.is_dir() else self.root.parent
        self._facts: LogFacts = read_facts(self._folder)
        self._fps = fps
        self._layout, self._widths = self._first_readable()
        self._action = self._facts.action or self._layout.action
        self._state = self._facts.state or self._layout.state
        views = tuple(self._layout.cameras)
        views = wanted_views(views, self._facts, self._folder) if self._facts.views else views
        self._cameras = {view: self._layout.cameras[view] for view in views}

    @classmethod
    def detects(cls, path: Path) -> bool:
        """Whether a path is an HDF5 file, or has one at most a few folders down."""
        return bool(hdf5_files(path, most=1))

    @property
    def name(self) -> str:
        """The name of the file or folder."""
        return self.root.resolve().stem if self.root.is_file() else self.root.resolve().name

    @property
    def fps(self) -> float:
        """As the first file states it; with 0 a contract file or --fps must say it."""
        return float(self._fps or self._layout.fps)

    @property
    def views(self) -> tuple[str, ...]:
        """Cameras by their names in the file."""
        return tuple(self._cameras)

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """As far as the layout and the settings in the file tell."""
        layout = self._layout
        return (
            EmbodimentSpec(
                embodiment=layout.embodiment,
                rate_hz=self.fps,
                action=self._dimensions(self._action),
                proprio=self._dimensions(self._state),
                control_frame=layout.control_frame if self._action == layout.action else "unknown",
                note=layout.note if self._action == layout.action else "",
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the names and sizes of all files, and of `logs.yaml`."""
        sizes = [[self._relative(path), path.stat().st_size] for path in self._files]
        return digest([*sizes, to_mapping(self._facts), self._fps])

    def episode_ids(self) -> list[str]:
        """Every episode; files with several are opened for their names only."""
        return list(self._places)

    def read(self, episode_id: str) -> Episode:
        """Read the numbers of an episode; pictures are read later, a block at a time."""
        if episode_id not in self._places:
            raise DataError(f"no episode {episode_id!r}", where=self.root)
        path, group = self._places[episode_id]
        with open_hdf5(path) as file:
            episode = self._episode(file, group)
            fps = float(self._fps or (layout_of(file).fps if self._layout.many else 0) or self._layout.fps)
            actions = self._joined(episode, self._action, path)
            counts = {view: _pictures(episode, inside, path) for view, inside in self._cameras.items()}
            return Episode(
                episode_id=episode_id,
                embodiment=self._layout.embodiment,
                fps=fps,
                views={
                    view: Video(count, partial(_frames, path, f"{group}/{self._cameras[view]}", self._facts))
                    for view, count in counts.items()
                },
                actions_TA=actions,
                proprio_TS=self._joined(episode, self._state, path, rows=len(actions)),
                timestamps_T=np.arange(len(actions)) / (fps or 1),
                text=episode_text(file, episode),
                outcome=_outcome(episode, path),
                source={
                    "format": f"HDF5 ({self._layout.name})",
                    "file": self._relative(path),
                    "group": group or "/",
                    "timestamps": "row / rate: the file has no clock",
                    "action": list(self._action),
                    "state": list(self._state),
                    **self._facts.changes(),
                },
            )

    def __getstate__(self) -> dict[str, Any]:
        # The lists can be long, and every worker process can make them itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_places", "_files")}

    @cached_property
    def _files(self) -> list[Path]:
        return hdf5_files(self.root)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """Episode id -> its file and group."""
        places: dict[str, tuple[Path, str]] = {}
        for path in self._files:
            file_id = Path(self._relative(path)).with_suffix("").as_posix()
            if not self._layout.many:
                places[file_id] = (path, "")
                continue
            try:
                with open_hdf5(path) as file:
                    groups = self._groups(file, self._layout)
            except DataError:
                # One id for the whole file, so that reading it names what is wrong.
                places[file_id] = (path, "data")
                continue
            for group in groups:
                demo = group.rpartition("/")[2]
                places[demo if len(self._files) == 1 else f"{file_id}/{demo}"] = (path, group)
        return places

    def _first_readable(self) -> tuple[Layout, dict[str, int]]:
        """Layout and widths of the first file that is whole; damaged ones are named when they are read."""
        first_error: DataError | None = None
        for path in self._files[:ATTEMPTS]:
            try:
                with open_hdf5(path) as file:
                    layout = layout_of(file)
                    action = self._facts.action or layout.action
                    if not action:
                        raise DataError("no action", where=path, fix="name its fields in logs.yaml")
                    episode = self._episode(file, self._groups(file, layout)[0])
                    fields = (*action, *(self._facts.state or layout.state))
                    return layout, {name: self._rows(episode, name, path).shape[1] for name in fields}
            except DataError as error:
                first_error = first_error or error
        raise first_error or DataError("no HDF5 file", where=self.root)

    @staticmethod
    def _groups(file: Any, layout: Layout) -> list[str]:
        """Groups of the episodes in a file; the file itself where it is one."""
        if not layout.many:
            return [""]
        groups = [f"data/{name}" for name in names_in(child(file, "data"))]
        if not groups:
            raise DataError("no episodes", where=file.filename)
        return groups

    def _episode(self, file: Any, group: str) -> Any:
        episode = child(file, group) if group else file
        if episode is None or not hasattr(episode, "keys"):
            raise DataError(f"no group {group!r}", where=file.filename)
        return episode

    def _rows(self, episode: Any, path: str, where: Path) -> np.ndarray:
        dataset = child(episode, path)
        if dataset is None:
            raise DataError(f"no dataset {path!r}", where=where)
        return numbers(dataset, f"{path!r} in {where}")

    def _joined(
        self, episode: Any, paths: tuple[str, ...], where: Path, rows: int | None = None
    ) -> np.ndarray:
        """Datasets side by side as float32 [T, D]; all must have as many rows as the first."""
        columns = [self._rows(episode, path, where) for path in paths]
        if not columns:
            return np.zeros((rows or 0, 0), np.float32)
        for path, column in zip(paths, columns, strict=True):
            if len(column) != len(columns[0]):
                raise DataError(
                    f"rows of {path!r}",
                    where=where,
                    got=len(column),
                    expected=f"{len(columns[0])} as {paths[0]!r}",
                )
        return np.concatenate(columns, axis=1)

    def _dimensions(self, paths: tuple[str, ...]) -> tuple[Dimension, ...]:
        return join_dimensions({path: self._widths[path] for path in paths}, self._layout.dimensions)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _pictures(episode: Any, path: str, where: Path) -> int:
    """How many pictures a camera has."""
    dataset = child(episode, path)
    if dataset is None:
        raise DataError(f"no camera {path!r}", where=where)
    check_camera(dataset, f"{path!r} in {where}")
    return len(dataset)


def _frames(path: Path, dataset: str, facts: LogFacts) -> Iterator[np.ndarray]:
    for frame in frames(path, dataset):
        yield facts.upright(frame)


def _outcome(episode: Any, path: Path) -> dict[str, Any]:
    """Robomimic's sparse reward, where 1 is a success; RoboMIND keeps its good episodes in a folder."""
    if "success_episodes" in path.resolve().parts:
        return {"success": True}
    rewards = child(episode, "rewards")
    if rewards is None:
        return {}
    best = float(numbers(rewards, f"'rewards' in {path}").max(initial=0))
    return {"success": True, "reward": best} if best >= 1 else {"reward": best}
