"""Read a shard by position: check its size, checksum and members once, then fetch any row of any member.

A tar has no integrity of its own: a flipped bit or a cut can silently shorten it, and interleaved members
would give half samples. Nothing here is trusted before it agrees with the manifest.
"""

import functools
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.data.manifest import NAME_PATTERN, Sample, Shard
from vidworld.errors import DataError

MEMBER_PATTERN = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_-]*\.)+(?:mp4|jpg|png|npy|npz|json|txt)")
MAX_MEMBER_BYTES = 4 << 30
HEADER_BYTES = 4096
"""A `.npy` header is read in one piece of at most this."""


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class OpenShard:
    """A checked shard."""

    fingerprint: tuple[int, int, int]
    """Size, modification time and inode of the file that was checked."""
    members: dict[str, dict[str, Member]]
    """Sample key -> member suffix -> where it lies."""


def open_shard(
    path: Path, shard: Shard, suffixes: Iterable[str], *, verify: bool, where: Path | str
) -> OpenShard:
    """Check a shard's size, checksum and members, and index it; each sample must have `suffixes`.

    `path` is the file, `where` the dataset it belongs to. Raises DataError naming the shard.
    """
    try:
        with open(path, "rb") as file:
            fingerprint = _fingerprint(file.fileno())
            if fingerprint[0] != shard.bytes:
                raise damaged(shard, where, f"{fingerprint[0]} bytes", f"{shard.bytes} bytes")
            if verify:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard.sha256:
                    raise damaged(shard, where, f"sha256 {found[:12]}", shard.sha256[:12])
                file.seek(0)
            members = _index(file, shard, where)
    except OSError as error:
        raise unreadable(shard, where, error) from None
    expected = [sample.key for sample in shard.samples]
    if list(members) != expected:
        got = f"{len(members)} samples ({_brief(members)})"
        raise damaged(shard, where, got, f"{len(expected)} ({_brief(expected)})")
    for key, present in members.items():
        if missing := set(suffixes) - present.keys():
            got = f"sample {key!r} without {', '.join(sorted(missing))}"
            raise damaged(shard, where, got, "all members")
    return OpenShard(fingerprint, members)


def unreadable(shard: Shard, where: Path | str, error: OSError) -> DataError:
    """The error for a shard that is missing or cannot be read."""
    fix = "copy it again or run vidworld shard again" if isinstance(error, FileNotFoundError) else None
    return DataError(f"cannot read shard {shard.file}", where=where, got=error.strerror, fix=fix)


def damaged(shard: Shard, where: Path | str, got: str, expected: str) -> DataError:
    """The error for a shard that is not what the manifest says."""
    return DataError(
        f"shard {shard.file} is damaged",
        where=where,
        got=got,
        expected=expected,
        fix="copy it again or run vidworld shard again",
    )


def _index(file: io.BufferedReader, shard: Shard, where: Path | str) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> place, from the tar headers; samples must lie in one piece."""
    members: dict[str, dict[str, Member]] = {}
    current = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                key, _, suffix = entry.name.partition(".")
                named = NAME_PATTERN.fullmatch(key) and MEMBER_PATTERN.fullmatch(suffix)
                if not entry.isreg() or not named:
                    got = f"member {entry.name[:100]!r}"
                    raise damaged(
                        shard, where, got, "files KEY.name.mp4, .jpg, .png, .npy, .npz, .json, .txt"
                    )
                if entry.size > MAX_MEMBER_BYTES:
                    got = f"member of {entry.size} bytes"
                    raise damaged(shard, where, got, f"at most {MAX_MEMBER_BYTES}")
                if key != current and key in members:
                    raise damaged(shard, where, f"sample {key!r} in pieces", "each sample in one piece")
                current = key
                if suffix in members.setdefault(key, {}):
                    raise damaged(shard, where, f"member {entry.name!r} twice", "once")
                members[key][suffix] = Member(entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise damaged(shard, where, str(error), "a readable tar") from None
    return members


class MemberReader:
    """Members of one sample of a checked shard; open it, and use it in a `with` block."""

    def __init__(
        self, path: Path, shard: Shard, sample: Sample, opened: OpenShard, *, where: Path | str
    ) -> None:
        self.path, self.shard, self.sample, self.opened, self.where = path, shard, sample, opened, where

    def open(self) -> "MemberReader":
        """Open the file. Raises DataError when it is no longer the one that was checked."""
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(self.shard, self.where, error) from None
        if _fingerprint(self._handle) != self.opened.fingerprint:
            os.close(self._handle)
            raise DataError(
                f"shard {self.shard.file} changed while it was in use",
                where=self.where,
                fix="start again when nothing writes to the dataset",
            )
        return self

    def __enter__(self) -> "MemberReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def content(self, suffix: str) -> bytes:
        """A whole member."""
        member = self.opened.members[self.sample.key][suffix]
        return self._pread(suffix, member.offset, member.size)

    def json(self, suffix: str) -> dict[str, Any]:
        """A JSON mapping."""
        try:
            loaded = json.loads(self.content(suffix))
        except (ValueError, RecursionError) as error:
            raise self.bad(suffix, str(error), "valid JSON") from None
        if not isinstance(loaded, dict):
            raise self.bad(suffix, type(loaded).__name__, "a mapping")
        return loaded

    def rows(self, suffix: str, rows: slice, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray:
        """Rows of a `.npy` of known shape and dtype, reading no others; objects are never unpickled."""
        member = self.opened.members[self.sample.key][suffix]
        head = self._pread(suffix, member.offset, min(member.size, HEADER_BYTES))
        try:
            end = 10 + int.from_bytes(head[8:10], "little")
            found, fortran, dtype, header_bytes = _npy_header(head[:end])
        except ValueError as error:
            raise self.bad(suffix, str(error), "an npy file of version 1.0") from None
        allowed = [np.dtype(name).newbyteorder("<").str for name in dtypes]
        if found != shape or fortran or dtype.str not in allowed:
            raise self.bad(suffix, f"{dtype} {found}", f"{' or '.join(dtypes)} {shape} in C order")
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        if header_bytes + shape[0] * row_bytes != member.size:
            raise self.bad(suffix, f"{member.size} bytes", f"{header_bytes + shape[0] * row_bytes} bytes")
        count, first = rows.stop - rows.start, member.offset + header_bytes + rows.start * row_bytes
        content = bytearray(self._pread(suffix, first, count * row_bytes))
        return np.frombuffer(content, dtype).reshape(count, *shape[1:])

    def bad(self, suffix: str, got: str, expected: str) -> DataError:
        """An error that names the member."""
        name = f"{self.sample.key}.{suffix}"
        return DataError(name, where=f"{self.where}/{self.shard.file}", got=got, expected=expected)

    def _pread(self, suffix: str, offset: int, size: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < size:  # one call returns at most 2 GiB
            piece = os.pread(self._handle, size - len(pieces), offset + len(pieces))
            if not piece:
                raise self.bad(suffix, f"{len(pieces)} bytes", f"{size} bytes")
            if len(piece) == size:
                return piece
            pieces += piece
        return bytes(pieces)


@functools.lru_cache(maxsize=2**16)
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of an npy header; parsing costs as much as reading a clip."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    return *np.lib.format.read_array_header_1_0(stream), stream.tell()


def _fingerprint(handle: int) -> tuple[int, int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _brief(keys: Iterable[str]) -> str:
    text = ", ".join(keys)
    return text if len(text) <= 60 else f"{text[:57]}..."
