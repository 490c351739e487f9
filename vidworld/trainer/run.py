"""A run directory: who may write it, what it holds, and starting it anew or going on."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vidworld.config import to_yaml
from vidworld.errors import ConfigError, UserError
from vidworld.trainer.config import Training

CONFIG = "config.yaml"
LOCK = ".lock"
# What a training writes, and --overwrite removes. Latents stay: they know their tokenizer and are costly.
WRITTEN = (
    "checkpoints",
    "tokenizer",
    "samples",
    "wandb",
    "world.json",
    "metrics.jsonl",
    CONFIG,
)
# What may lie in a run directory before its training: other ranks write their heartbeats at once, and a
# launcher its logs.
NOT_OURS = (LOCK, "latents", "heartbeats", "logs")
_BEFORE = ".vidworld-before"


class RunDirectory:
    """A run directory that is held; until `begin` is called, a start that is refused leaves it as it was.

    So a wrong path in a config neither costs the run that was to be overwritten, nor leaves half a new one.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.begun = run, False
        _give_back(run)  # what a killed start had put aside

    def begin(self) -> None:
        """Training starts now: what was there before is given up."""
        shutil.rmtree(self.run / _BEFORE, ignore_errors=True)
        self.begun = True

    def put_aside(self, names: tuple[str, ...]) -> None:
        """Move files away that the start replaces."""
        aside = self.run / _BEFORE
        aside.mkdir()
        for name in names:
            if (self.run / name).exists():
                os.replace(self.run / name, aside / name)

    def restore(self, new: bool) -> None:
        """Undo what the start has done; new: nothing was there, or it was to be overwritten."""
        if new:
            _remove(self.run, WRITTEN)
        _give_back(self.run)


@contextlib.contextmanager
def open_run(run: Path, training: Training, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Hold a run directory against other trainings, with the resolved config in it; see `RunDirectory`.

    Raises ConfigError when it has been trained in and neither `resume` nor `overwrite` is given, when it
    holds something else, or when another process trains there.
    """
    _one_of_them(resume, overwrite)
    busy = ConfigError("another process trains in this run", where=run, fix="wait for it")
    with locked(run / LOCK, run, lambda handle: busy):
        directory = RunDirectory(run)
        others = [path.name for path in run.iterdir() if path.name not in NOT_OURS]
        if not (run / CONFIG).is_file() and others:
            raise ConfigError(
                "--out holds other files than a run's", got=run, fix="choose a new or empty directory"
            )
        # Now, when a killed start has given back what it had put aside.
        require_free(run, resume=resume, overwrite=overwrite)
        directory.put_aside(WRITTEN if overwrite else (CONFIG,))
        temporary = run / f".{CONFIG}.tmp"
        temporary.write_text(to_yaml(training))
        temporary.replace(run / CONFIG)
        try:
            yield directory
        except UserError:
            if not directory.begun:
                directory.restore(new=overwrite or not others)
            raise


def require_free(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run that is here already, unless it is said what to do with it, before anything starts."""
    _one_of_them(resume, overwrite)
    if (run / CONFIG).is_file() and not (resume or overwrite):
        raise ConfigError(
            "run that is here already",
            where=run,
            fix="pass --resume to go on, --overwrite to train it anew, or another --out",
        )


def _one_of_them(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite", fix="give one of them")


def has_begun(run: Path) -> bool:
    """Whether the last start came as far as its training, and can be gone on with."""
    return not (run / _BEFORE).is_dir()


def _remove(run: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _give_back(run: Path) -> None:
    """Put what was moved aside back in its place."""
    aside = run / _BEFORE
    if aside.is_dir():
        for path in aside.iterdir():
            _remove(run, (path.name,))
            os.replace(path, run / path.name)
        aside.rmdir()


@contextlib.contextmanager
def locked(path: Path, run: Path, busy: Callable[[int], ConfigError]) -> Iterator[int]:
    """An advisory lock that a killed process lets go by itself; gives the open lock file.

    Raises what `busy` makes of the lock file when another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError("cannot write to the run directory", where=run, got=error.strerror) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy(handle) from None
        yield handle
    finally:
        os.close(handle)
