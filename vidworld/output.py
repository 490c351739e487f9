"""Output directories that are there whole or not at all."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vidworld.errors import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def output_directory(out: Path, record: str, *, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes `out` when all went well, and leaves nothing behind when not.

    An existing `out` is refused; with `overwrite` it is replaced, but only if it is empty or holds `record`,
    the mark of an earlier output of the same kind.
    """
    if out.exists() and not overwrite:
        raise ConfigError("--out exists already", where=out, fix="pass --overwrite, or another --out")
    if out.exists() and not (out.is_dir() and ((out / record).is_file() or not any(out.iterdir()))):
        raise ConfigError(
            f"--out holds no {record}",
            where=out,
            fix="--overwrite replaces only an earlier output of its kind",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConfigError("cannot write --out", where=out, got=error.strerror) from None
    try:
        written = staging / "new"
        written.mkdir()
        yield written
        if out.exists():
            out.rename(staging / "old")
        written.rename(out)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ConfigError("no space left for --out", where=out, fix="free some and run again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
