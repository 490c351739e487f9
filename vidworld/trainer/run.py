"""A run directory: who may write it, what it holds, and starting it anew or going on."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vidworld.config import to_yaml
from vidworld.errors import ConfigError
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
# What may lie in a run directory before its training: other ranks write their heartbeats at once.
NOT_OURS = (LOCK, "latents", "heartbeats")


@contextlib.contextmanager
def open_run(run: Path, training: Training, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold a run directory against other trainings, with the resolved config in it.

    Raises ConfigError when it has been trained in and neither `resume` nor `overwrite` is given, when it
    holds something else, or when another process trains there.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite", fix="give one of them")
    with _locked(run):
        others = [path.name for path in run.iterdir() if path.name not in NOT_OURS]
        if not (run / CONFIG).is_file() and others:
            raise ConfigError(
                "--out holds other files than a run's", got=run, fix="choose a new or empty directory"
            )
        if (run / CONFIG).is_file() and not (resume or overwrite):
            raise ConfigError(
                "run that is here already",
                where=run,
                fix="pass --resume to go on, --overwrite to train it anew, or another --out",
            )
        if overwrite:
            for name in WRITTEN:
                path = run / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        temporary = run / f".{CONFIG}.tmp"
        temporary.write_text(to_yaml(training))
        temporary.replace(run / CONFIG)
        yield


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """An advisory lock that a killed process lets go by itself."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError("cannot write to the run directory", where=run, got=error.strerror) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another process trains in this run", where=run, fix="wait for it") from None
        yield
    finally:
        os.close(handle)
