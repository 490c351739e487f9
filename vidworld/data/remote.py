"""Files behind URLs, through fsspec: whole or not at all, with retries, and errors of one line.

Credentials come from the environment of each storage (for S3: AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL and so on), never from a config.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vidworld.errors import ConfigError, DataError, MissingDependencyError, require

T = TypeVar("T")

DELAYS_S = (0.5, 1.0, 2.0, 4.0)
"""Waits between tries of one request; a download that gets further starts again from the first."""
CHUNK_BYTES = 32 << 20
_NETWORK = ("aiohttp", "aiobotocore", "botocore", "urllib3", "requests", "google", "gcsfs", "azure", "adlfs")


class MissingFileError(DataError):
    """There is no such file, folder or bucket."""


class UnreachableError(DataError):
    """The storage did not answer, or broke off, too often."""


def read(url: str) -> bytes:
    """A whole small file. Raises MissingFileError, UnreachableError or another DataError."""
    return _tried(url, lambda fs, path: fs.cat_file(path))


def write(url: str, content: bytes) -> None:
    """Write a small file."""

    def put(fs: Any, path: str) -> None:
        _make_folder(fs, path)
        fs.pipe_file(path, content)

    _tried(url, put)


def upload(source: Path, url: str) -> None:
    """Copy a local file there."""

    def put(fs: Any, path: str) -> None:
        _make_folder(fs, path)
        fs.put_file(str(source), path)

    _tried(url, put)


def remove(url: str) -> None:
    """Delete a file if it is there."""

    def delete(fs: Any, path: str) -> None:
        if fs.exists(path):
            fs.rm_file(path)

    _tried(url, delete)


def sizes(url: str) -> dict[str, int] | None:
    """File -> bytes of all files below a folder, relative to it; None where a storage cannot list."""

    def find(fs: Any, path: str) -> dict[str, int] | None:
        try:
            found = fs.find(path, detail=True)
        except NotImplementedError:
            return None
        start = len(path.rstrip("/")) + 1
        return {
            name[start:]: int(facts["size"]) for name, facts in found.items() if facts.get("type") == "file"
        }

    if url.startswith(("http://", "https://")):
        return None
    return _tried(url, find)


def download(url: str, target: Path, size: int, progress: Callable[[int], object] | None = None) -> str:
    """Copy a file of known size here and return its sha256; a broken transfer goes on where it was.

    Raises UnreachableError when it stays unreachable or too short, OSError for the disk.
    """
    found, done, failed = hashlib.sha256(), 0, 0
    with target.open("wb") as out:
        while done < size:
            try:
                for piece in _pieces(url, done, size):
                    out.write(piece)
                    found.update(piece)
                    done, failed = done + len(piece), 0
                    if progress:
                        progress(len(piece))
            except _BrokenError as broken:
                if failed == len(DELAYS_S):
                    raise UnreachableError(
                        f"cannot read the storage ({failed + 1} tries)",
                        where=shown(url),
                        got=f"{broken}, at byte {done} of {size}",
                    ) from None
                time.sleep(DELAYS_S[failed])
                failed += 1
    return found.hexdigest()


def shown(url: str) -> str:
    """A URL for people to read, without a password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//", url)


class _BrokenError(Exception):
    """A transfer that is worth another try."""


def _pieces(url: str, start: int, size: int) -> Iterator[bytes]:
    """The bytes from `start` on, in pieces. Raises _BrokenError for what may pass by itself."""
    try:
        fs, path = _filesystem(url)
        with fs.open(path, "rb", cache_type="none") as file:
            yield from _chunks(file, start, size)
    except _BrokenError:
        raise
    except Exception as error:
        raise _BrokenError(_passing(error, url)) from None


def _chunks(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    try:
        file.seek(start)
    except ValueError:  # some web servers only send files from their beginning
        raise _BrokenError("the server cannot send the rest of a file") from None
    while start < size:
        piece = file.read(min(CHUNK_BYTES, size - start))
        if not piece:
            raise _BrokenError(f"the file ends at byte {start}")
        start += len(piece)
        yield piece


def _tried(url: str, work: Callable[[Any, str], T]) -> T:
    """Do something with a file system, again after a wait where that may help."""
    for delay in (*DELAYS_S, None):
        try:
            return work(*_filesystem(url))
        except Exception as error:
            reason = _passing(error, url)
            if delay is None:
                raise UnreachableError(
                    f"cannot reach the storage ({len(DELAYS_S) + 1} tries)", where=shown(url), got=reason
                ) from None
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def _filesystem(url: str) -> tuple[Any, str]:
    """The storage and the path in it. Made anew for each use: fsspec keeps one a process and thread."""
    fsspec = require("fsspec", "remote")
    scheme = url.partition("://")[0]
    # The retries are ours; the library's own would multiply with them.
    options = {"config_kwargs": {"retries": {"max_attempts": 0}}} if scheme in ("s3", "s3a") else {}
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    if options:
        fs.retries = 1
    return fs, path


def _make_folder(fs: Any, path: str) -> None:
    # A bucket is nothing to make on the way; folders matter on disks only.
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if protocol in ("file", "memory", "sftp", "ssh"):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _lasting(error: Exception, url: str) -> Exception | None:
    """The one-line error for what no retry mends, None for the rest."""
    name, scheme = type(error).__name__, url.partition("://")[0]
    if isinstance(error, MissingDependencyError | DataError):
        return error
    if isinstance(error, ImportError):
        return MissingDependencyError(
            f"storage {scheme}:// needs a package that is not installed",
            got=_brief(error),
            fix='run: pip install "vidworld[remote]", or the package that fsspec names',
        )
    if isinstance(error, ValueError) and "protocol" in str(error).lower():
        return ConfigError("kind of URL", got=shown(url), expected="one that fsspec knows, such as s3://")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        if re.search(r"bucket (does not exist|not found)|nosuchbucket", str(error), re.IGNORECASE):
            return MissingFileError("no such bucket", where=shown(url))
        return MissingFileError("no such file", where=shown(url))
    if isinstance(error, PermissionError) or "Credential" in name or "Token" in name or "Profile" in name:
        return DataError(
            "no access",
            where=shown(url),
            got=_brief(error),
            fix="check the credentials in the environment"
            + (" (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL)" if scheme.startswith("s3") else ""),
        )
    if "ParamValidation" in name or "InvalidBucket" in name:
        return ConfigError("URL", got=shown(url), expected=f"{scheme}://BUCKET/FOLDER")
    return None


def _passing(error: Exception, url: str) -> str:
    """What to say of a failure that may pass by itself; raises for one that will not."""
    problem = _lasting(error, url)
    if problem is not None:
        raise problem from None
    module = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError | TimeoutError | EOFError) and module not in _NETWORK:
        raise error
    return _brief(error)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:160]}"
