"""`RUN/logs`: one folder for each attempt, and the lock that keeps two launches apart."""

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidworld.config import to_yaml
from vidworld.errors import ConfigError
from vidworld.files import write_atomic
from vidworld.trainer.config import Training
from vidworld.trainer.run import CONFIG, LOCK, locked

FOLDER = "logs"
TOKEN = "token"


@dataclass(frozen=True)
class AttemptFolder:
    """Where one attempt keeps its config, its logs and what passes between launcher and ranks."""

    path: Path
    token: str

    @property
    def config(self) -> Path:
        """The settings that all ranks read."""
        return self.path / CONFIG

    @property
    def token_path(self) -> Path:
        """A file that only hosts on the same storage can read."""
        return self.path / TOKEN

    @classmethod
    def create(cls, run: Path, training: Training) -> "AttemptFolder":
        """Make the next folder, with the settings in it."""
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            taken = [int(path.name) for path in (run / FOLDER).iterdir() if path.name.isdecimal()]
            path = run / FOLDER / f"{max(taken, default=0) + 1:04d}"
            path.mkdir()
            folder = cls(path, secrets.token_hex(16))
            write_atomic(folder.token_path, folder.token.encode())
            write_atomic(folder.config, to_yaml(training).encode())
        except OSError as error:
            raise ConfigError("cannot write to the run directory", where=run, got=error.strerror) from None
        return folder

    def remove(self) -> None:
        """Leave nothing of an attempt that never started."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def only_launch(run: Path) -> Iterator[None]:
    """Hold a run against other launches; a launcher that was killed lets go by itself."""
    folder = run / FOLDER
    new = not run.exists()

    def held(handle: int) -> ConfigError:
        return ConfigError(
            "another launch is at work in this run",
            where=run,
            got=os.read(handle, 1000).decode(errors="replace").strip() or "unknown",
            fix="wait for it, end it, or give another --out",
        )

    with locked(folder / LOCK, run, held) as handle:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        try:
            yield
        finally:
            if new and {path.name for path in run.iterdir()} == {FOLDER}:
                with contextlib.suppress(OSError):  # logs of an attempt stay, and then their folder
                    if [path.name for path in folder.iterdir()] == [LOCK]:
                        shutil.rmtree(run)
