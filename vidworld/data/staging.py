"""An output directory while it is being converted: locked, resumable, published at the end.

    DIR/.vidworld.lock         held while a converter works here
    DIR/.partial/plan.json     what the unfinished conversion is of
    DIR/.partial/train-000000.tar, .json    a finished shard and what it holds, with its checksum
    DIR/shards/, DIR/manifest.json          appear when everything is done, the manifest last

A killed conversion leaves no manifest of its own and loses at most the shard it was writing.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidworld.config import from_mapping, to_mapping
from vidworld.data.manifest import MANIFEST, Manifest, Quarantined, Shard
from vidworld.data.store import store_at
from vidworld.errors import ConfigError, DataError
from vidworld.files import sha256_of, sync_directory, url_of, write_atomic

LOCK = ".vidworld.lock"
DELIVERED = ".delivered.json"
STAGING = ".partial"
SHARDS = "shards"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REPLACE = "pass --overwrite to convert again, or another --out"


@dataclass(frozen=True)
class Group:
    """Consecutive planned episodes and the shard that holds the good ones (None if there are none)."""

    split: str
    episodes: tuple[str, ...]
    quarantined: tuple[Quarantined, ...]
    shard: Shard | None


class Staging:
    """The unfinished part of one output directory; make it with the lock held."""

    def __init__(self, out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.out, self.folder = out, out / STAGING
        plan = self.folder / "plan.json"
        begun = json.loads(plan.read_bytes()) if plan.is_file() else None
        if begun is not None and not overwrite:
            require_same(begun, identity, out)
        if begun != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_atomic(plan, json.dumps(identity, indent=1).encode())
        for leftover in self.folder.glob(".*"):
            leftover.unlink()

    def finished(self, split: str, episodes: tuple[str, ...]) -> list[Group]:
        """Groups of a split that an earlier run finished and whose shards are still what they were."""
        groups: list[Group] = []
        done = 0
        while (group := self.finished_at(split, len(groups))) is not None:
            if group.episodes != episodes[done : done + len(group.episodes)]:
                break
            groups.append(group)
            done += len(group.episodes)
        return groups

    def finished_at(self, split: str, index: int) -> Group | None:
        """One group, if an earlier run finished it and its shard is still what it was."""
        note = self.note(split, index)
        if not note.is_file():
            return None
        group = from_mapping(Group, json.loads(note.read_bytes()), where=note)
        return group if self._intact(group.shard) else None

    def note(self, split: str, index: int) -> Path:
        """Side file of a finished group."""
        return self.folder / f"{split}-{index:06d}.json"

    def tar(self, split: str, index: int) -> Path:
        """Where a group's shard is written."""
        return self.folder / f"{split}-{index:06d}.tar"

    def finish(self, index: int, group: Group) -> None:
        """Say that a group is done; its shard is on disk already."""
        write_atomic(self.note(group.split, index), json.dumps(to_mapping(group)).encode())

    def locate(self, shard: Shard) -> Path | None:
        """Where a shard is now: staged, or in place already if a run was killed while publishing."""
        staged, placed = self.folder / Path(shard.file).name, self.out / shard.file
        return next((path for path in (staged, placed) if path.is_file()), None)

    def publish(self, manifest: Manifest) -> None:
        """Put the shards in place, then write the manifest, then forget the staging folder."""
        (self.out / MANIFEST).unlink(missing_ok=True)
        folder = self.out / SHARDS
        folder.mkdir(exist_ok=True)
        for shard in manifest.shards:
            staged = self.folder / Path(shard.file).name
            if staged.is_file():
                os.replace(staged, self.out / shard.file)
        wanted = {Path(shard.file).name for shard in manifest.shards}
        for stale in folder.glob("*.tar"):
            if stale.name not in wanted:
                stale.unlink()
        sync_directory(folder)
        manifest.write(self.out)
        shutil.rmtree(self.folder)

    def _intact(self, shard: Shard | None) -> bool:
        if shard is None:
            return True
        path = self.locate(shard)
        if path is None or path.stat().st_size != shard.bytes:
            return False
        return sha256_of(path) == shard.sha256


def existing(out: Path, identity: Mapping[str, Any]) -> Manifest | None:
    """The finished dataset in a directory, if there is one of the same source and options.

    Raises ConfigError when it was made otherwise, DataError when it is damaged.
    """
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = Manifest.read(out)
    except DataError as error:
        raise DataError(f"the dataset that is here already is unreadable ({error})", fix=_REPLACE) from None
    require_same(manifest.options, identity, out)
    url = delivered_to(out, manifest)
    where = out if url is None else url
    try:
        store_at(where).check(manifest.shards)
    except DataError as error:
        raise DataError(f"a shard is missing or cut ({error})", fix=_REPLACE) from None
    return manifest


def delivered_to(out: Path, manifest: Manifest) -> str | None:
    """The URL to which the shards of the dataset of a folder were moved, see `vidworld.data.deliver`."""
    note = out / DELIVERED
    said = json.loads(note.read_bytes()) if note.is_file() else {}
    return said.get("url") if said.get("digest") == manifest.digest else None


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to mix conversions, naming the first option that differs."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old != new:
            changed = name in ("source", "source_fingerprint")
            raise ConfigError(
                f"{'the source' if changed else f'option {name!r}'} is not that of the conversion",
                where=out,
                got=_brief(new),
                expected=_brief(old),
                fix=_REPLACE,
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make a directory and hold it against other converters; a killed one lets go by itself.

    Raises DataError when another converter is at work, or when the directory holds something else.
    """
    if url := url_of(out):
        raise ConfigError("--out", got=url, expected="a local directory here: upload it afterwards")
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", got=out, expected="a directory")
    ours = (MANIFEST, STAGING, LOCK, DELIVERED)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise ConfigError("--out holds other files", got=out, fix="choose a new or empty directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError("cannot write to --out", where=out, got=error.strerror) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one before may have removed the file between our open and our lock.
        if not (out / LOCK).exists() or os.stat(out / LOCK).st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(handle)
        raise DataError("another conversion is writing here", where=out, fix="wait for it to end") from None
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DataError(
            "no space left", where=out, got=error.strerror, fix="free some and run again: it continues"
        ) from None
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(handle)
