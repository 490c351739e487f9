"""Shards: ordinary WebDataset tars, written whole or not at all, read only after their checksum held.

A tar has no integrity of its own (a flipped bit or a cut can silently shorten it), so every read goes through
the manifest: size at open, sha256 on first touch, then the exact list of members.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vidworld.data.manifest import NAME_PATTERN, Manifest, Sample, Shard, sync_directory
from vidworld.data.video import VIDEO_SUFFIX, decode_video
from vidworld.errors import DataError, require

MEMBER_PATTERN = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_-]*\.)+(?:mp4|jpg|png|npy|npz|json|txt)")
PARTIAL_SUFFIX = ".partial"
MAX_MEMBER_NAME = 100
MAX_MEMBER_BYTES = 4 << 30


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
    what was written. An exception leaves nothing behind.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.sha256, self.bytes = "", 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        writer = require("webdataset", "train").TarWriter
        self._file = open(self._partial, "wb")
        self._hashed = _HashedFile(self._file)
        self._tar = writer(self._hashed, user="root", group="root", mode=0o644, encoder=False, mtime=0)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: member suffix (`top.mp4`, `actions.npy`) -> its bytes.

        Raises DataError for a key or suffix that a tar reader could misread, and for a key given twice.
        """
        check_key(key)
        if key in self._keys:
            raise DataError(f"sample key {key!r} given twice", where=self.path)
        if not members:
            raise DataError(f"sample {key!r} has no members", where=self.path)
        for suffix, content in members.items():
            if not MEMBER_PATTERN.fullmatch(suffix) or len(f"{key}.{suffix}") > MAX_MEMBER_NAME:
                raise DataError(
                    f"member name of sample {key!r}",
                    where=self.path,
                    got=repr(suffix),
                    expected=f"name.mp4, .jpg, .png, .npy, .npz, .json or .txt, {MAX_MEMBER_NAME} characters",
                )
            assert isinstance(content, bytes)
        self._keys.add(key)
        self._tar.write({"__key__": key, **members})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
                sync_directory(self.path.parent)
                self.sha256, self.bytes = self._hashed.hash.hexdigest(), self._hashed.size
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


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

    Exactly one of `video` and `latents` is present. Latents have their own rows when the tokenizer has a time
    stride k: 1 + (T - 1) / k of them.
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


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


@dataclass(frozen=True)
class _Opened:
    """A verified shard: who it was, and where its members lie."""

    fingerprint: tuple[int, int, int]
    members: dict[str, dict[str, _Member]]


class ShardDataset:
    """Verified random access to the episodes of a dataset directory.

    Safe to share between threads and to pickle into worker processes; each process verifies a shard once.
    """

    def __init__(self, directory: Path, manifest: Manifest, verify: bool) -> None:
        self.directory, self.manifest, self._verify = directory, manifest, verify
        self._place = {sample.key: (shard, sample) for shard in manifest.shards for sample in shard.samples}
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path | str, *, verify: bool = True) -> "ShardDataset":
        """Open a dataset; every shard must be there with the size that the manifest says.

        `verify=False` skips the checksums and keeps the checks of sizes, members and shapes.
        """
        directory = Path(directory)
        dataset = cls(directory, Manifest.read(directory), verify)
        for shard in dataset.manifest.shards:
            try:
                size = (directory / shard.file).stat().st_size
            except FileNotFoundError:
                raise DataError(
                    f"shard {shard.file} is missing",
                    where=directory,
                    fix="copy it again or run vidworld shard",
                ) from None
            if size != shard.bytes:
                raise _damaged(shard, directory, f"{size} bytes", f"{shard.bytes} bytes")
        return dataset

    def __getstate__(self) -> tuple[Path, Manifest, bool]:
        return self.directory, self.manifest, self._verify

    def __setstate__(self, state: tuple[Path, Manifest, bool]) -> None:
        self.__init__(*state)

    def sample(self, key: str) -> Sample:
        """What the manifest says of a sample."""
        return self._locate(key)[1]

    def read(self, key: str) -> EpisodeArrays:
        """Read a whole episode."""
        return self.read_clip(key, 0, self.sample(key).frames)

    def read_clip(self, key: str, start: int, length: int) -> EpisodeArrays:
        """Read frames `start` to `start + length` of an episode, decoding only those.

        Latents with a time stride k need `start` and `length - 1` divisible by k.
        """
        shard, sample = self._locate(key)
        if start < 0 or length < 1 or start + length > sample.frames:
            raise DataError(
                f"clip of sample {key!r}",
                got=f"frames {start} to {start + length}",
                expected=f"within 0 to {sample.frames}",
            )
        with _Reader(self.directory, shard, sample, self._open(shard)) as reader:
            contract = self.manifest.contract(sample.embodiment)
            rows = slice(start, start + length)

            def table(suffix: str, width: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray:
                return reader.rows(suffix, rows, (sample.frames, *width), dtypes)

            return EpisodeArrays(
                key=key,
                video=self._video(reader, rows) if self.manifest.kind == "video" else None,
                latents=self._latents(reader, rows) if self.manifest.kind == "latents" else None,
                actions_TA=table("actions.npy", (len(contract.action),), ("float32",)),
                proprio_TS=table("proprio.npy", (len(contract.proprio),), ("float32",)),
                timestamps_T=table("timestamps.npy", (), ("float64", "float32")),
                meta=reader.json("meta.json"),
            )

    def verify_all(self) -> None:
        """Check every shard now, checksums included."""
        for shard in self.manifest.shards:
            self.verify_shard(shard)

    def verify_shard(self, shard: Shard) -> None:
        """Check one shard now, checksum included."""
        _open_shard(self.directory, shard, self.manifest, verify=True)

    def _video(self, reader: "_Reader", rows: slice) -> dict[str, np.ndarray]:
        size = (self.manifest.height, self.manifest.width)
        videos = {}
        for view in self.manifest.views:
            suffix = video_member(view)
            try:
                frames = decode_video(reader.content(suffix), rows.start, rows.stop - rows.start)
            except DataError as error:
                raise reader.bad(suffix, str(error), "a readable video") from None
            if frames.shape[1:3] != size:
                raise reader.bad(suffix, f"{frames.shape[1:3]} pixels", f"{size}")
            videos[view] = frames
        return videos

    def _latents(self, reader: "_Reader", rows: slice) -> dict[str, np.ndarray]:
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

    def _locate(self, key: str) -> tuple[Shard, Sample]:
        try:
            return self._place[key]
        except KeyError:
            raise DataError(f"no sample {key!r}", where=self.directory) from None

    def _open(self, shard: Shard) -> _Opened:
        opened = self._opened.get(shard.file)
        if opened is None:
            with self._lock:
                opened = self._opened.get(shard.file)
                if opened is None:
                    opened = _open_shard(self.directory, shard, self.manifest, self._verify)
                    self._opened[shard.file] = opened
        return opened


def _open_shard(directory: Path, shard: Shard, manifest: Manifest, verify: bool) -> _Opened:
    """Check a shard's size, checksum and members, and index it."""
    try:
        with open(directory / shard.file, "rb") as file:
            fingerprint = _fingerprint(file.fileno())
            if fingerprint[0] != shard.bytes:
                raise _damaged(shard, directory, f"{fingerprint[0]} bytes", f"{shard.bytes} bytes")
            if verify:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard.sha256:
                    raise _damaged(shard, directory, f"sha256 {found[:12]}", shard.sha256[:12])
                file.seek(0)
            members = _index(file, shard, directory)
    except OSError as error:
        raise DataError(f"cannot read shard {shard.file}", where=directory, got=error.strerror) from None
    suffixes = {"actions.npy", "proprio.npy", "timestamps.npy", "meta.json"}
    member = video_member if manifest.kind == "video" else latents_member
    suffixes.update(member(view) for view in manifest.views)
    expected = [sample.key for sample in shard.samples]
    if list(members) != expected:
        raise _damaged(
            shard,
            directory,
            f"{len(members)} samples ({_brief(members)})",
            f"{len(expected)} ({_brief(expected)})",
        )
    for key, present in members.items():
        if missing := suffixes - present.keys():
            raise _damaged(shard, directory, f"sample {key!r} without {', '.join(sorted(missing))}", "it")
    return _Opened(fingerprint, members)


def _index(file: io.BufferedReader, shard: Shard, directory: Path) -> dict[str, dict[str, _Member]]:
    """Key -> suffix -> place, from the tar headers; samples must lie in one piece."""
    members: dict[str, dict[str, _Member]] = {}
    current = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                key, _, suffix = entry.name.partition(".")
                if (
                    not entry.isreg()
                    or not NAME_PATTERN.fullmatch(key)
                    or not MEMBER_PATTERN.fullmatch(suffix)
                ):
                    raise _damaged(
                        shard, directory, f"member {entry.name!r}", "KEY.name.mp4, .npy, .json ..."
                    )
                if entry.size > MAX_MEMBER_BYTES:
                    raise _damaged(shard, directory, f"member of {entry.size} bytes", f"{MAX_MEMBER_BYTES}")
                if key != current and key in members:
                    raise _damaged(shard, directory, f"sample {key!r} in two pieces", "samples in one piece")
                current = key
                if suffix in members.setdefault(key, {}):
                    raise _damaged(shard, directory, f"member {entry.name!r} twice", "once")
                members[key][suffix] = _Member(entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise _damaged(shard, directory, str(error), "a readable tar") from None
    return members


class _Reader:
    """Members of one sample of an opened shard, read by position."""

    def __init__(self, directory: Path, shard: Shard, sample: Sample, opened: _Opened) -> None:
        self.directory, self.shard, self.sample, self.opened = directory, shard, sample, opened

    def __enter__(self) -> "_Reader":
        with contextlib.ExitStack() as stack:
            try:
                self._handle = os.open(self.directory / self.shard.file, os.O_RDONLY)
            except OSError as error:
                raise DataError(
                    f"cannot read shard {self.shard.file}", where=self.directory, got=error.strerror
                ) from None
            stack.callback(os.close, self._handle)
            if _fingerprint(self._handle) != self.opened.fingerprint:
                raise DataError(f"shard {self.shard.file} changed while it was in use", where=self.directory)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def content(self, suffix: str) -> bytes:
        """A whole member."""
        member = self._member(suffix)
        return self._pread(suffix, member.offset, member.size)

    def json(self, suffix: str) -> dict[str, Any]:
        """A JSON mapping."""
        try:
            loaded = json.loads(self.content(suffix))
        except ValueError as error:
            raise self.bad(suffix, str(error), "valid JSON") from None
        if not isinstance(loaded, dict):
            raise self.bad(suffix, type(loaded).__name__, "a mapping")
        return loaded

    def rows(self, suffix: str, rows: slice, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray:
        """Rows of a `.npy` of known shape and dtype, reading no others."""
        member = self._member(suffix)
        head = io.BytesIO(self._pread(suffix, member.offset, min(member.size, 4096)))
        try:
            version = np.lib.format.read_magic(head)
            read_header = np.lib.format.read_array_header_1_0
            found_shape, fortran, dtype = (
                read_header(head) if version == (1, 0) else ((), True, np.dtype("O"))
            )
        except ValueError as error:
            raise self.bad(suffix, str(error), "a npy file") from None
        if found_shape != shape or fortran or dtype.name not in dtypes or not dtype.isnative:
            raise self.bad(suffix, f"{dtype} {found_shape}", f"{' or '.join(dtypes)} {shape}, C order")
        row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if head.tell() + shape[0] * row_bytes != member.size:
            raise self.bad(suffix, f"{member.size} bytes", f"{head.tell() + shape[0] * row_bytes} bytes")
        count = rows.stop - rows.start
        content = self._pread(suffix, member.offset + head.tell() + rows.start * row_bytes, count * row_bytes)
        return np.frombuffer(bytearray(content), dtype).reshape(count, *shape[1:])

    def bad(self, suffix: str, got: str, expected: str) -> DataError:
        """An error that names the member."""
        return DataError(
            f"{self.sample.key}.{suffix}", where=self.directory / self.shard.file, got=got, expected=expected
        )

    def _member(self, suffix: str) -> _Member:
        return self.opened.members[self.sample.key][suffix]

    def _pread(self, suffix: str, offset: int, size: int) -> bytes:
        content = os.pread(self._handle, size, offset)
        if len(content) != size:
            raise self.bad(suffix, f"{len(content)} bytes", f"{size} bytes")
        return content


class _HashedFile:
    """A file for writing only that hashes what goes through."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.size += len(content)
        return self.file.write(content)


def _fingerprint(handle: int) -> tuple[int, int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _damaged(shard: Shard, directory: Path, got: str, expected: str) -> DataError:
    return DataError(
        f"shard {shard.file} is damaged",
        where=directory,
        got=got,
        expected=expected,
        fix="copy it again or run vidworld shard",
    )


def _brief(keys: Any) -> str:
    text = ", ".join(keys)
    return text if len(text) <= 60 else f"{text[:57]}..."
