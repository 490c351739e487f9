"""The local copies of remote shards: by content, checked, shared between processes, within a size limit.

    CACHE/shards/ab/ab12...tar     a shard under its sha256: two datasets that share it share the file
    CACHE/manifests/...json        the last manifest of each URL, for work without a network
    CACHE/locks/                   one file per first byte of the sha256

CACHE is VIDWORLD_CACHE, or ~/.cache/vidworld; VIDWORLD_CACHE_GB limits it (100 GB), the least recently used
shards go first. With VIDWORLD_OFFLINE=1 nothing is asked for over the network.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidworld.data import remote
from vidworld.errors import ConfigError, DataError
from vidworld.files import PARTIAL_SUFFIX, write_atomic

FOLDER, LIMIT, OFFLINE = "VIDWORLD_CACHE", "VIDWORLD_CACHE_GB", "VIDWORLD_OFFLINE"
DEFAULT_LIMIT_GB = 100.0
DOWNLOADS = 3
"""Times that a file is fetched before its content is called damaged."""
LOCK_DEADLINE_S = 1800
_POLL_S = 0.05
_FORGOTTEN_S = 24 * 3600


@dataclass(frozen=True)
class Cache:
    """A folder of local copies."""

    folder: Path
    limit_bytes: int
    offline: bool = False

    @classmethod
    def of_environment(cls) -> "Cache":
        """As the environment variables say. Raises ConfigError for a limit that is no number."""
        folder = os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vidworld"
        given = os.environ.get(LIMIT) or str(DEFAULT_LIMIT_GB)
        try:
            limit = float(given)
        except ValueError:
            limit = -1.0
        if not limit >= 0:
            raise ConfigError(LIMIT, got=repr(given), expected="gigabytes, such as 100")
        return cls(Path(folder).expanduser(), int(limit * 1e9), os.environ.get(OFFLINE, "") not in ("", "0"))

    def fetch(self, url: str, sha256: str, size: int) -> Path:
        """The local copy of a file, downloaded and checked if it is not here yet.

        Another process may evict it at any time: open it at once, and fetch again if it is gone.
        Raises DataError naming the URL when it is missing, unreachable or not what `sha256` says.
        """
        path = self.path(sha256)
        if self._use(path, size):
            return path
        if self.offline:
            raise DataError(
                "not in the cache", where=remote.shown(url), fix=f"unset {OFFLINE} to download it"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.locked(sha256[:2]):
                if not self._use(path, size):
                    self._download(url, path, sha256, size)
        except OSError as error:
            raise self._unwritable(error) from None
        self._evict(path)
        return path

    def path(self, sha256: str) -> Path:
        """Where the copy of a shard lies, if it is here. Raises DataError for what is no sha256."""
        # It comes from a manifest that anyone may have written, and names a file here.
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError("sha256 of a shard", got=repr(sha256[:80]), expected="64 hexadecimal digits")
        return self.folder / "shards" / sha256[:2] / f"{sha256}.tar"

    def drop(self, sha256: str) -> None:
        """Forget a copy, because it is damaged."""
        self.path(sha256).unlink(missing_ok=True)

    def adopt(self, file: Path, sha256: str) -> None:
        """Move a file whose content is known in here, so that it need not be downloaded."""
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, path)
        self._evict(path)

    def manifest(self, url: str) -> bytes:
        """The manifest at a URL; without a network the last one seen there, with a warning.

        Raises MissingFileError, UnreachableError or another DataError.
        """
        kept = self.folder / "manifests" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
        if self.offline:
            if not kept.is_file():
                raise DataError(
                    "not in the cache", where=remote.shown(url), fix=f"unset {OFFLINE} to read it"
                )
            return kept.read_bytes()
        try:
            content = remote.read(url)
        except remote.UnreachableError as error:
            if not kept.is_file():
                raise
            warnings.warn(f"{error}; going on with the copy in the cache", stacklevel=3)
            return kept.read_bytes()
        try:
            if not kept.is_file() or kept.read_bytes() != content:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(kept, content)
        except OSError as error:
            raise self._unwritable(error) from None
        return content

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock against other threads and processes; a killed one lets go by itself."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + LOCK_DEADLINE_S
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DataError(
                            "another process has held the cache for too long", where=folder / name
                        ) from None
                    time.sleep(_POLL_S)
            yield
        finally:
            os.close(handle)

    def _use(self, path: Path, size: int) -> bool:
        """Whether a copy is here; says that it was used, which its modification time must not show."""
        try:
            status = path.stat()
            if status.st_size != size:
                return False
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def _download(self, url: str, path: Path, sha256: str, size: int) -> None:
        partial, found = path.with_suffix(PARTIAL_SUFFIX), ""
        try:
            for _ in range(DOWNLOADS):
                found = remote.download(url, partial, size)
                if found == sha256:
                    os.replace(partial, path)
                    return
        finally:
            partial.unlink(missing_ok=True)
        raise DataError(
            f"what was downloaded is damaged ({DOWNLOADS} times)",
            where=remote.shown(url),
            got=f"sha256 {found[:12]}",
            expected=sha256[:12],
            fix="upload the dataset again",
        )

    def _evict(self, kept: Path) -> None:
        """Delete the least recently used copies until the rest fits; never the one just fetched."""
        with self.locked("evict"):
            files: list[tuple[int, int, Path]] = []
            for path in self.folder.glob("shards/*/*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.suffix == PARTIAL_SUFFIX:
                    if time.time() - status.st_mtime > _FORGOTTEN_S:
                        path.unlink(missing_ok=True)
                    continue
                files.append((status.st_atime_ns, status.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self.limit_bytes:
                    return
                if path != kept:
                    path.unlink(missing_ok=True)
                    total -= size

    def _unwritable(self, error: OSError) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = f"free some space, or set {LIMIT} lower" if full else f"set {FOLDER} to a folder of yours"
        return DataError("cannot write to the cache", where=self.folder, got=error.strerror, fix=fix)
