"""Checkpoints copied to storage behind a URL, in the background, and fetched from there on a new machine.

The same files as in `checkpoints/`; the manifest goes last, so that a checkpoint with one is complete there,
and what is fetched is checked against it byte by byte.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from vidworld.data import remote
from vidworld.errors import CheckpointError, DataError
from vidworld.files import sync_directory, url_of, write_atomic
from vidworld.trainer.checkpoint import LATEST, MANIFEST, STAGING, newest_step, step_of, verify


class Uploader:
    """Copies the newest checkpoint to a folder of a storage; an older one that was still waiting is left out.

    Trouble with the storage is a warning: the checkpoints here are whole, and the next is tried anew.
    """

    def __init__(self, url: str, *, keep: int = 2, say: Callable[[str], object] = lambda line: None) -> None:
        self.url, self.keep, self.say = as_url(url), keep, say
        self._waiting: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, directory: Path) -> None:
        """Copy this checkpoint next."""
        with self._changed:
            self._waiting = directory
            if self._thread is None:
                self._thread = threading.Thread(target=self._copy_on, name="upload", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait until what was offered last is there, or was tried."""
        if (thread := self._thread) is not None and thread.is_alive():
            self.say(f"waiting for the upload to {remote.shown(self.url)}")
            thread.join()

    def _copy_on(self) -> None:
        while True:
            with self._changed:
                directory, self._waiting = self._waiting, None
                if directory is None:
                    self._thread = None
                    return
            try:
                self.copy(directory)
            except FileNotFoundError:
                continue  # pruned meanwhile: a newer one is here
            except (DataError, OSError) as error:
                warnings.warn(
                    f"checkpoint {directory.name} was not uploaded: {error}; training goes on", stacklevel=1
                )

    def copy(self, directory: Path) -> None:
        """Copy a checkpoint and then forget older ones there; raises DataError."""
        verify(directory)
        base = f"{self.url}/{directory.name}"
        files = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
        for path in (*files, directory / MANIFEST):
            remote.upload(path, f"{base}/{path.name}")
        remote.write(f"{self.url}/{LATEST}", f"{directory.name}\n".encode())
        self._prune()

    def _prune(self) -> None:
        there = _checkpoints(self.url)
        complete = [name for name in there if MANIFEST in there[name]]
        if len(complete) < self.keep:
            return
        for name in there:
            if name not in complete[: self.keep]:
                # The manifest first: what is half deleted must not look complete.
                for file in sorted(there[name], key=lambda file: file != MANIFEST):
                    remote.remove(f"{self.url}/{name}/{file}")


def fetch_newest(url: str, directory: Path, *, say: Callable[[str], object] = lambda line: None) -> None:
    """Copy the newest whole checkpoint of a storage into `directory`, unless a newer one is there.

    A damaged one is passed over with a warning. Raises DataError when the storage cannot be read.
    """
    url = as_url(url)
    there = _checkpoints(url)
    for name in there:
        if MANIFEST not in there[name]:
            continue
        if step_of(name) <= newest_step(directory):
            return
        say(f"fetching {name} from {remote.shown(url)}")
        try:
            _fetch(f"{url}/{name}", directory / name)
            return
        except CheckpointError as error:
            warnings.warn(f"checkpoint {name} at {remote.shown(url)} is damaged: {error}", stacklevel=2)


def as_url(location: str) -> str:
    """A URL as it is, a folder as one."""
    return url_of(location) or Path(location).absolute().as_uri()


def _fetch(url: str, final: Path) -> None:
    staging = final.with_name(f"{STAGING}{final.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        content = remote.read(f"{url}/{MANIFEST}")
        (staging / MANIFEST).write_bytes(content)
        try:
            files = json.loads(content)["files"]
            sizes = {str(name): int(facts["bytes"]) for name, facts in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError("checkpoint manifest", where=remote.shown(url), got="damaged") from None
        for name, size in sizes.items():
            if name != Path(name).name:
                raise CheckpointError("file name in a manifest", where=remote.shown(url), got=repr(name))
            remote.download(f"{url}/{name}", staging / name, size)
        verify(staging)
        staging.rename(final)
        sync_directory(final.parent)
        write_atomic(final.parent / LATEST, f"{final.name}\n".encode())
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checkpoints(url: str) -> dict[str, set[str]]:
    """Checkpoint -> its files in the storage, newest first."""
    try:
        sizes = remote.sizes(url)
    except remote.MissingFileError:
        sizes = {}
    if sizes is None:
        raise DataError(
            "checkpoints behind a URL that cannot be listed",
            where=remote.shown(url),
            fix="use s3://, gs:// ...",
        )
    found: dict[str, set[str]] = {}
    for path in sizes:
        name, _, file = path.partition("/")
        if name.startswith("step-") and file:
            found.setdefault(name, set()).add(file)
    return dict(sorted(found.items(), reverse=True))
