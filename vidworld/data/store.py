"""Where the shards of a dataset are: a local folder, or a URL with local copies."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vidworld.data import remote
from vidworld.data.cache import LIMIT, Cache
from vidworld.data.manifest import Shard
from vidworld.data.tar_reader import damaged, unreadable
from vidworld.files import url_of


class Store(Protocol):
    """The files of one dataset; picklable."""

    @property
    def where(self) -> Path | str:
        """The folder or URL, for people and for messages."""
        ...

    @property
    def replaces(self) -> bool:
        """Whether a file that is gone or damaged can be had again."""
        ...

    def check(self, shards: Sequence[Shard]) -> None:
        """Raise DataError unless every shard is there with its size."""
        ...

    def path(self, shard: Shard) -> Path:
        """A local file with a shard, fetched if need be."""
        ...

    def drop(self, shard: Shard) -> None:
        """Forget a local copy that is damaged."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder."""

    where: Path
    replaces: bool = False

    def check(self, shards: Sequence[Shard]) -> None:
        """Raise DataError unless every shard is there with its size."""
        for shard in shards:
            try:
                size = self.path(shard).stat().st_size
            except OSError as error:
                raise unreadable(shard, self.where, error) from None
            if size != shard.bytes:
                raise damaged(shard, self.where, f"{size} bytes", f"{shard.bytes} bytes")

    def path(self, shard: Shard) -> Path:
        """Where a shard is."""
        return self.where / shard.file

    def drop(self, shard: Shard) -> None:
        """Nothing: what lies here is no copy."""


@dataclass(frozen=True)
class RemoteStore:
    """A URL; shards are downloaded whole when they are first touched."""

    where: str
    cache: Cache
    replaces: bool = True

    def check(self, shards: Sequence[Shard]) -> None:
        """Raise DataError unless every shard that is not in the cache is there with its size."""
        total = sum(shard.bytes for shard in shards)
        if total > self.cache.limit_bytes:
            warnings.warn(
                f"{remote.shown(self.where)} has {total / 1e9:.3g} GB and the cache holds "
                f"{self.cache.limit_bytes / 1e9:.3g}: shards will be downloaded again and again; "
                f"raise {LIMIT}",
                stacklevel=4,
            )
        absent = [shard for shard in shards if not self.cache.path(shard.sha256).is_file()]
        found = remote.sizes(self.where) if absent and not self.cache.offline else None
        if found is None:
            return
        for shard in absent:
            if shard.file not in found:
                raise unreadable(shard, remote.shown(self.where), FileNotFoundError(2, "No such file"))
            if found[shard.file] != shard.bytes:
                got = f"{found[shard.file]} bytes"
                raise damaged(shard, remote.shown(self.where), got, f"{shard.bytes} bytes")

    def path(self, shard: Shard) -> Path:
        """The local copy of a shard."""
        return self.cache.fetch(f"{self.where}/{shard.file}", shard.sha256, shard.bytes)

    def drop(self, shard: Shard) -> None:
        """Forget the local copy of a shard."""
        self.cache.drop(shard.sha256)


def store_at(location: Path | str) -> Store:
    """The store at a folder or URL."""
    url = url_of(location)
    return LocalStore(Path(location)) if url is None else RemoteStore(url, Cache.of_environment())
