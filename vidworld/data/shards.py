"""Shards: ordinary WebDataset tars, written whole or not at all, read only after their checksum held.

Every read goes through the manifest: sizes at open, sha256 on first touch, then the exact list of samples.
"""

import contextlib
import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vidworld.data.manifest import NAME_PATTERN, Manifest, Sample, Shard
from vidworld.data.store import Store, store_at
from vidworld.data.tar_reader import MEMBER_PATTERN, MemberReader, OpenShard, open_shard
from vidworld.data.video import VIDEO_SUFFIX, decode_video
from vidworld.errors import DataError, require
from vidworld.files import PARTIAL_SUFFIX, sync_directory

TABLES = ("actions.npy", "proprio.npy", "timestamps.npy", "meta.json")
"""Member suffixes that every sample has, next to one per view."""
MAX_MEMBER_NAME = 100
"""Of the plainest tar header (ustar), which every reader knows."""
FETCHES = 3
"""Times that a local copy of a remote shard is fetched before its damage is an error."""


def video_member(view: str) -> str:
    """Suffix of a view's video."""
    return f"{view}.{VIDEO_SUFFIX}"


def latents_member(view: str) -> str:
    """Suffix of a view's latents."""
    return f"{view}.latents.npy"


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def json_bytes(mapping: Mapping[str, Any]) -> bytes:
    """A mapping as a `.json` file, equal content to equal bytes."""
    return json.dumps(mapping, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class ShardWriter:
    """Write one shard; equal samples give equal bytes.

    The file appears under its name only when the `with` block ends well, after which `sha256` and `bytes` say
    what was written. An exception leaves nothing behind; a kill leaves at most a hidden `*.partial`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.sha256, self.bytes = "", 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        writer = require("webdataset", "train").TarWriter
        self._sink = _HashedFile(open(self._partial, "wb"))
        self._tar = writer(self._sink, user="root", group="root", mode=0o644, encoder=False, mtime=0)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: member suffix (`top.mp4`, `actions.npy`) -> its bytes.

        Raises DataError for a key or suffix that a tar reader could misread, and for a key given twice.
        """
        check_key(key)
        if key in self._keys:
            raise DataError(f"sample key {key!r} given twice", where=self.path)
        if len({suffix.lower() for suffix in members}) != len(members) or not members:
            raise DataError(
                f"members of sample {key!r}",
                where=self.path,
                got=", ".join(members) or "none",
                expected="names that differ in more than case",
            )
        for suffix, content in members.items():
            if not MEMBER_PATTERN.fullmatch(suffix) or len(f"{key}.{suffix}") > MAX_MEMBER_NAME:
                raise DataError(
                    f"member name of sample {key!r}",
                    where=self.path,
                    got=repr(suffix[:MAX_MEMBER_NAME]),
                    expected="name.mp4, .jpg, .png, .npy, .npz, .json or .txt, with the key at most "
                    f"{MAX_MEMBER_NAME} characters",
                )
            assert isinstance(content, bytes), f"{suffix} is {type(content).__name__}"
        self._keys.add(key)
        self._tar.write({"__key__": key, **members})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._sink.commit(self._partial, self.path)
                self.sha256, self.bytes = self._sink.hash.hexdigest(), self._sink.size
        finally:
            self._sink.discard()
            self._tar.close()
            self._partial.unlink(missing_ok=True)


class _HashedFile:
    """What a tar stream writes into: hashes what goes through, and becomes a sink once it is discarded."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        if not self.file.closed:
            self.hash.update(content)
            self.size += len(content)
            self.file.write(content)
        return len(content)

    def commit(self, partial: Path, final: Path) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(partial, final)
        sync_directory(final.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails the last flush of what is thrown away anyway
            self.file.close()


def check_key(key: str) -> None:
    """Refuse a sample key that is not 1 to 64 letters, digits, `-` and `_`."""
    if not NAME_PATTERN.fullmatch(key):
        raise DataError(
            "sample key",
            got=repr(key[:80]),
            expected="1 to 64 letters, digits, '-' and '_' (a dot would merge samples)",
        )


@dataclass(frozen=True)
class EpisodeArrays:
    """An episode, or a clip of one, in memory and in raw units.

    Exactly one of `video` and `latents` is present, none where pictures were not asked for. Latents have
    their own rows when the tokenizer has a time stride k: 1 + (T - 1) / k of them.
    """

    key: str
    video: dict[str, np.ndarray] | None
    """View -> RGB [T, H, W, 3] uint8."""
    latents: dict[str, np.ndarray] | None
    """View -> [T, C, h, w] float16."""
    actions_TA: np.ndarray
    proprio_TS: np.ndarray
    timestamps_T: np.ndarray
    meta: dict[str, Any]


class ShardDataset:
    """Verified random access to the episodes of a dataset, in a folder or at a URL.

    Safe to share between threads and to pickle into worker processes; each process verifies a shard once.
    """

    def __init__(self, store: Store, manifest: Manifest, verify: bool) -> None:
        self.manifest, self._store, self._verify = manifest, store, verify
        self._place = {sample.key: (shard, sample) for shard in manifest.shards for sample in shard.samples}
        self._opened: dict[str, OpenShard] = {}
        self._locks: dict[str, threading.Lock] = {shard.file: threading.Lock() for shard in manifest.shards}

    @classmethod
    def open(cls, location: Path | str, *, verify: bool = True) -> "ShardDataset":
        """Open a dataset; every shard must be there with the size that the manifest says.

        `location` is a folder or a URL that fsspec knows; a shard at a URL is downloaded when it is first
        touched, see `vidworld.data.cache`. `verify=False` skips the checksums of each process and keeps the
        checks of sizes, members and shapes.
        """
        dataset = cls(store_at(location), Manifest.read(location), verify)
        dataset._store.check(dataset.manifest.shards)
        return dataset

    @property
    def directory(self) -> Path | str:
        """The folder or URL."""
        return self._store.where

    def __getstate__(self) -> tuple[Store, Manifest, bool]:
        return self._store, self.manifest, self._verify

    def __setstate__(self, state: tuple[Store, Manifest, bool]) -> None:
        self.__init__(*state)

    def sample(self, key: str) -> Sample:
        """What the manifest says of a sample. Raises DataError for an unknown key."""
        return self._locate(key)[1]

    def read(self, key: str) -> EpisodeArrays:
        """Read a whole episode."""
        return self.read_clip(key, 0, self.sample(key).frames)

    def read_clip(
        self, key: str, start: int, length: int, *, pictures: bool = True, notes: bool = True
    ) -> EpisodeArrays:
        """Read frames `start` to `start + length` of an episode, decoding only those.

        Without `pictures`, neither video nor latents are read; without `notes`, neither timestamps nor meta.
        Latents with a time stride k need `start` and `length - 1` divisible by k.
        """
        shard, sample = self._locate(key)
        if start < 0 or length < 1 or start + length > sample.frames:
            raise DataError(
                f"clip of sample {key!r}",
                got=f"frames {start} to {start + length}",
                expected=f"within 0 to {sample.frames}",
            )
        with self._reader(shard, sample) as reader:
            contract = self.manifest.contract(sample.embodiment)
            rows = slice(start, start + length)

            def table(suffix: str, width: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray:
                return reader.rows(suffix, rows, (sample.frames, *width), dtypes)

            return EpisodeArrays(
                key=key,
                video=self._video(reader, rows) if pictures and self.manifest.kind == "video" else None,
                latents=self._latents(reader, rows) if pictures and self.manifest.kind == "latents" else None,
                actions_TA=table("actions.npy", (len(contract.action),), ("float32",)),
                proprio_TS=table("proprio.npy", (len(contract.proprio),), ("float32",)),
                timestamps_T=table("timestamps.npy", (), ("float64", "float32")) if notes else np.zeros(0),
                meta=reader.json("meta.json") if notes else {},
            )

    def members(self, key: str) -> dict[str, bytes]:
        """All members of a sample, suffix -> bytes, as they lie in the shard."""
        with self._reader(*self._locate(key)) as reader:
            return {suffix: reader.content(suffix) for suffix in reader.opened.members[key]}

    def meta(self, key: str) -> dict[str, Any]:
        """What `meta.json` says of an episode."""
        with self._reader(*self._locate(key)) as reader:
            return reader.json("meta.json")

    def verify_all(self) -> None:
        """Check every shard now, checksums included."""
        for shard in self.manifest.shards:
            self.verify_shard(shard)

    def verify_shard(self, shard: Shard) -> None:
        """Check one shard now, checksum included."""
        self._check(shard, verify=True)

    def _video(self, reader: MemberReader, rows: slice) -> dict[str, np.ndarray]:
        videos = {}
        for view in self.manifest.views:
            suffix = video_member(view)
            try:
                content = reader.content(suffix)
                length, total = rows.stop - rows.start, reader.sample.frames
                frames = decode_video(content, rows.start, length, num_frames=total)
            except DataError as error:
                raise reader.bad(suffix, str(error), "a readable video") from None
            if frames.shape[1:3] != (self.manifest.height, self.manifest.width):
                got = f"{frames.shape[2]}x{frames.shape[1]} pixels"
                raise reader.bad(suffix, got, f"{self.manifest.width}x{self.manifest.height}")
            videos[view] = frames
        return videos

    def _latents(self, reader: MemberReader, rows: slice) -> dict[str, np.ndarray]:
        tokenizer = self.manifest.tokenizer
        assert tokenizer is not None
        stride, space = int(tokenizer.get("time_stride", 1)), int(tokenizer["spatial_stride"])
        if rows.start % stride or (rows.stop - rows.start - 1) % stride:
            raise DataError(
                f"clip of sample {reader.sample.key!r}",
                got=f"start {rows.start}, length {rows.stop - rows.start}",
                expected=f"start and length - 1 divisible by the tokenizer's time stride {stride}",
            )
        rows = slice(rows.start // stride, (rows.stop - 1) // stride + 1)
        height, width = self.manifest.height // space, self.manifest.width // space
        shape = (1 + (reader.sample.frames - 1) // stride, int(tokenizer["channels"]), height, width)
        return {
            view: reader.rows(latents_member(view), rows, shape, ("float16",)) for view in self.manifest.views
        }

    def _suffixes(self) -> list[str]:
        member = video_member if self.manifest.kind == "video" else latents_member
        return [*TABLES, *(member(view) for view in self.manifest.views)]

    def _locate(self, key: str) -> tuple[Shard, Sample]:
        try:
            return self._place[key]
        except KeyError:
            raise DataError(f"no sample {key!r}", where=self.directory) from None

    def _reader(self, shard: Shard, sample: Sample) -> MemberReader:
        """An open reader of one sample; a local copy evicted since it was checked is fetched again."""
        for tries_left in reversed(range(FETCHES)):
            opened = self._open(shard)
            reader = MemberReader(self._store.path(shard), shard, sample, opened, where=self.directory)
            try:
                return reader.open()
            except DataError:
                if not self._store.replaces or not tries_left:
                    raise
                self._opened.pop(shard.file, None)
        raise AssertionError("the last try returns or raises")

    def _open(self, shard: Shard) -> OpenShard:
        opened = self._opened.get(shard.file)
        if opened is None:
            with self._locks[shard.file]:
                opened = self._opened.get(shard.file)
                if opened is None:
                    opened = self._check(shard, verify=self._verify)
                    self._opened[shard.file] = opened
        return opened

    def _check(self, shard: Shard, *, verify: bool) -> OpenShard:
        """Check a shard; a local copy that is damaged or gone is fetched again."""
        for tries_left in reversed(range(FETCHES)):
            path = self._store.path(shard)
            try:
                return open_shard(path, shard, self._suffixes(), verify=verify, where=self.directory)
            except DataError:
                if not self._store.replaces or not tries_left:
                    raise
                self._store.drop(shard)
        raise AssertionError("the last try returns or raises")
