"""The files of an RLDS dataset, and which of its episodes lie where."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidworld.data.sources.tfrecord import Span, record_spans
from vidworld.errors import DataError

INFO = "dataset_info.json"


@dataclass(frozen=True)
class Shard:
    """One file of a split."""

    split: str
    path: Path
    first: int
    """Position of its first episode in the split."""
    count: int | None
    """Episodes that it should hold; None: as many as there are."""

    @property
    def episodes(self) -> int:
        """Episodes that it should hold, or, where nothing says so, does hold."""
        return len(_spans(self.path)) if self.count is None else self.count

    def span(self, index: int) -> Span:
        """Where an episode lies. Raises DataError when the file holds another number than it should."""
        spans = _spans(self.path)
        if len(spans) != self.episodes:
            raise DataError(
                "episodes in the file",
                where=self.path,
                got=len(spans),
                expected=f"{self.count} as {INFO} says",
            )
        return spans[index]


def list_shards(root: Path, info: Mapping[str, Any], name: str) -> tuple[Shard, ...]:
    """All files that dataset_info.json lists, present or not; a warning names those that are missing.

    Raises DataError when there is none of them.
    """
    shards: list[Shard] = []
    splits = info.get("splits")
    if not isinstance(splits, list) or not splits:
        raise DataError("no splits", where=root / INFO)
    for split in splits:
        file = _file_name(split, name, root / INFO)
        lengths = _lengths(split, root / INFO)
        total = len(lengths) or len(list(root.glob(f"{file}-*-of-*")))
        first = 0
        for index in range(total):
            path = root / f"{file}-{index:05d}-of-{total:05d}"
            shards.append(Shard(str(split["name"]), path, first, lengths[index] if lengths else None))
            first += shards[-1].episodes
    missing = [shard.path.name for shard in shards if not shard.path.is_file()]
    if len(missing) == len(shards):
        raise DataError("no TFRecord file", where=root, expected=", ".join(missing[:3]) or "some")
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        warnings.warn(
            f"{root}: {len(missing)} of {len(shards)} files that {INFO} lists are not here: {shown}",
            stacklevel=2,
        )
    return tuple(shards)


def locate(shards: Sequence[Shard], episode_id: str) -> tuple[Shard, int]:
    """The file of an episode and its position there. Raises DataError for an id that is none."""
    split, _, number = episode_id.rpartition("_")
    if re.fullmatch(r"[0-9]{1,12}", number):
        for shard in shards:
            index = int(number) - shard.first
            if shard.split == split and 0 <= index < shard.episodes:
                return shard, index
    raise DataError(f"no episode {episode_id!r}", where=shards[0].path.parent)


def _lengths(split: Mapping[str, Any], where: Path) -> list[int]:
    """Episodes of each file, as strings in JSON; none where the builder did not count."""
    try:
        lengths = [int(length) for length in split.get("shardLengths") or []]
    except (TypeError, ValueError):
        lengths = [-1]
    if any(length < 0 for length in lengths):
        raise DataError("shardLengths", where=where, got=split.get("shardLengths"), expected="counts")
    return lengths


def _file_name(split: Any, name: str, where: Path) -> str:
    """The part of a file name before its number, by the template in dataset_info.json."""
    if not isinstance(split, Mapping) or not isinstance(split.get("name"), str):
        raise DataError("split", where=where, got=str(split)[:100], expected="an object with a name")
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    values = {"{DATASET}": name, "{SPLIT}": split["name"], "{FILEFORMAT}": "tfrecord"}
    file = str(template)
    for mark, value in values.items():
        file = file.replace(mark, value)
    prefix, number, rest = file.partition("-{SHARD_X_OF_Y}")
    if not number or rest or re.search(r"[{}/\\*?\[\]]|\.\.", prefix) or "tfrecord" not in prefix:
        raise DataError(
            "filepathTemplate", where=where, got=template, expected="TFRecord files of this folder"
        )
    return prefix


def _spans(path: Path) -> tuple[Span, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError("cannot read the records", where=path, got=error.strerror) from None
    return _spans_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _spans_of(path: Path, size: int, mtime_ns: int) -> tuple[Span, ...]:
    """Spans of one version of a file: the size and time are only there to make it one version."""
    return tuple(record_spans(path))
