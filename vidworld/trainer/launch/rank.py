"""The process around one rank: gives it a log of its own, stops it when asked, and records how it ended.

torchrun and DeepSpeed start `python -m vidworld.trainer.launch.rank DIR NODE`, without flags, since torchrun
would look for its own among them. It runs a training in a child, and speaks with the launcher through files
in DIR, because signals do not pass through a remote shell and exit codes do not pass through torchrun:

    job.json            what the ranks run, and the names of the hosts
    stop                written by the launcher: "save" or "kill"
    lease-NODE          changed by the launcher every few seconds
    HOST-rank-3.log     what the rank printed
    HOST-rank-3.json    whether it runs, or how it ended
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from vidworld.files import write_atomic

JOB = "job.json"
STOP = "stop"
POLL_S = 0.2
LEASE_S = 120.0
"""A launcher that gives no sign of life for longer is gone: the rank saves and leaves."""
KILL_AFTER_S = 5.0
"""Between the order to kill and the kill: ranks that lost their neighbours say so themselves until then."""


@dataclass(frozen=True)
class Job:
    """What all ranks of an attempt run."""

    hosts: tuple[str, ...]
    """Labels of the hosts in order."""
    arguments: tuple[str, ...]
    """Arguments of `vidworld`."""
    cpu: bool = False
    """Hide the GPUs, which DeepSpeed would show again."""

    def write(self, logs: Path) -> None:
        """Store it for the ranks."""
        write_atomic(logs / JOB, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, logs: Path) -> "Job":
        """Read what `write` stored."""
        content = json.loads((logs / JOB).read_text())
        return cls(tuple(content["hosts"]), tuple(content["arguments"]), content["cpu"])


@dataclass(frozen=True)
class Record:
    """What is known of a rank's process."""

    rank: int
    host: str
    hostname: str
    pid: int
    exit_code: int | None = None
    """None while it runs; negative for the signal that killed it."""
    asked: str | None = None
    """Why it was told to stop: save, kill, lease, or the signal that came."""

    @property
    def name(self) -> str:
        """The rank for a message."""
        return f"rank {self.rank} on {self.host}"

    def file(self, logs: Path, suffix: str) -> Path:
        """The rank's file in the directory of an attempt."""
        return logs / f"{self.host}-rank-{self.rank}.{suffix}"


def read_records(logs: Path) -> list[Record]:
    """The records of an attempt by rank; a file that is no record is passed over."""
    records = []
    for path in logs.glob("*-rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            records.append(Record(**json.loads(path.read_bytes())))
    return sorted(records, key=lambda record: record.rank)


def lease_name(node: int) -> str:
    """The file by which the ranks of a host see that their launcher lives."""
    return f"lease-{node}"


class Lease:
    """Whether the launcher still lives, by this process's own clock."""

    def __init__(
        self, path: Path, limit_s: float = LEASE_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.limit_s, self._now = path, limit_s, now
        self._content, self._since_s = b"", now()

    def lapsed(self) -> bool:
        """Whether nothing has changed in the file for too long."""
        content = b""
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
        if content and content != self._content:
            self._content, self._since_s = content, self._now()
        return self._now() - self._since_s > self.limit_s


class RankProcess:
    """The child that trains, and what it is told."""

    def __init__(
        self,
        command: Sequence[str],
        logs: Path,
        host: str,
        lease: Lease,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.logs, self.lease = logs, lease
        rank = int(os.environ.get("RANK", "0"))
        blank = Record(rank, host, socket.gethostname(), os.getpid())
        # One rank's group, so that the processes of its loader end with it.
        with blank.file(logs, "log").open("ab") as log:
            self.child = subprocess.Popen(
                command,
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.record = replace(blank, pid=self.child.pid)
        self._kill_at_s: float | None = None
        self._write()

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Pass a signal on; the child decides what it means."""
        self.record = replace(self.record, asked=self.record.asked or signal.Signals(number).name)
        self.child.send_signal(number)

    def wait(self) -> Record:
        """Serve the child until it has ended."""
        looked_s = 0.0
        while (code := self.child.poll()) is None:
            time.sleep(POLL_S)
            if time.monotonic() - looked_s >= 1:
                looked_s = time.monotonic()
                self._obey()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.record = replace(self.record, exit_code=code)
        self._write()
        return self.record

    def _obey(self) -> None:
        order = self._order()
        if order == "kill":
            if self._kill_at_s is None:
                self._kill_at_s = time.monotonic() + KILL_AFTER_S
                self.record = replace(self.record, asked="kill")
            elif time.monotonic() >= self._kill_at_s:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.child.pid, signal.SIGKILL)
        elif order is not None and self.record.asked is None:
            self.record = replace(self.record, asked=order)
            self.child.send_signal(signal.SIGTERM)

    def _order(self) -> str | None:
        with contextlib.suppress(OSError):
            return (self.logs / STOP).read_text().strip() or None
        return "lease" if self.lease.lapsed() else None

    def _write(self) -> None:
        try:
            write_atomic(self.record.file(self.logs, "json"), json.dumps(asdict(self.record)).encode())
        except OSError as error:  # a full disk: the launcher then goes by the ends of the hosts' processes
            print(f"vidworld: warning: no record of rank {self.record.rank}: {error}", file=sys.stderr)


def _die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the parent is killed, as torchrun and DeepSpeed do in the end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run one rank; its exit code, or 128 + the signal that killed it."""
    logs, node = Path(arguments[0]), int(arguments[1])
    job = Job.read(logs)
    command = [sys.executable, "-u", "-m", "vidworld", *job.arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if job.cpu else None
    rank = RankProcess(command, logs, job.hosts[node], Lease(logs / lease_name(node)), environment)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, rank.forward)
    code = rank.wait().exit_code
    assert code is not None
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
