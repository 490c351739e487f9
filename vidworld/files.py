"""Files that are there whole or not at all, and the names of places: local paths and URLs."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from vidworld.errors import ConfigError

PARTIAL_SUFFIX = ".partial"
"""Ends the hidden name of a file that is still being written."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,3})(?=[^/])")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make what another library wrote into a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_local(location: Path, flag: str) -> Path:
    """The path of an output that is written piece by piece, which storage behind a URL cannot be."""
    if url := url_of(location):
        raise ConfigError(flag, got=url, expected="a local folder", fix="copy it to the storage afterwards")
    return location


def url_of(location: Path | str) -> str | None:
    """The URL that a location is, or None for a local path.

    A URL that went through `pathlib`, which folds its slashes, comes out as it went in.

    >>> url_of("s3://bucket/data"), url_of(Path("s3://bucket/data")), url_of(Path("data/s3"))
    ('s3://bucket/data', 's3://bucket/data', None)
    >>> url_of(Path("file:///srv/data"))
    'file:///srv/data'
    """
    found = _SCHEME.match(str(location))
    if not found:
        return None
    rest = str(location)[found.end() :].rstrip("/")
    scheme = found[1].lower()
    return f"{scheme}://{'/' if scheme in ('file', 'local') else ''}{rest}"


def anchored(location: Path) -> Path:
    """The same place named from any directory; URLs stay as they are."""
    return location if url_of(location) else location.absolute()
