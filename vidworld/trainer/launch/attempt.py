"""One start of all processes of a run: started on every host, watched, and ended together."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidworld.errors import ConfigError
from vidworld.trainer.launch.failure import Failure, exit_code, first_failure
from vidworld.trainer.launch.rank import STOP, Record, lease_name, read_records
from vidworld.trainer.launch.start import Group
from vidworld.trainer.supervise import FINAL

POLL_S = 0.5
LEASE_EVERY_S = 5.0
TOGETHER_S = 120.0
"""Ranks that stop on purpose do so together: the others have so long after the first one."""
GIVE_UP_S = 60.0
"""After the order to kill: processes that are left then are ended from here."""
SETTLE_S = 20.0


@dataclass(frozen=True)
class NodeStart:
    """How the processes of one host are started from here."""

    node: int
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    """None for this process's own."""


class Attempt:
    """All ranks of a run from their start to the end of the last.

    It waits like a process, and signals to it become an order in a file, because signals do not pass through
    remote shells: the first one asks for a checkpoint and exit code 3, a second one ends everything.
    """

    def __init__(
        self,
        group: Group,
        starts: Sequence[NodeStart],
        logs: Path,
        *,
        show: Callable[[], object] = lambda: None,
        say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.group, self.logs, self._show, self._say = group, logs, show, say
        self.failure: Failure | None = None
        self._beats, self._leased_s = 0, -LEASE_EVERY_S
        self._nodes = [start.node for start in starts]
        self._ranks = {rank for node in self._nodes for rank in group.ranks(node)}
        self._signals, self._ordered_kill_s = 0, None
        self._deadline_s: float | None = None
        self._renew()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for start in starts:
                self._processes[start.node] = self._start(start)
        except OSError as error:
            self._order("kill")
            self.wait()
            raise ConfigError(
                f"cannot start {error.filename}", got=error.strerror, fix="install it here"
            ) from None

    def send_signal(self, sig: int) -> None:
        """Ask all ranks to save and leave; the second time, end them."""
        self._signals += 1
        self._order("save" if self._signals == 1 and sig != signal.SIGKILL else "kill")

    def wait(self) -> int:
        """Watch until all is over; the exit code of the run: 0, 2, 3, 4 or 1."""
        while any(process.poll() is None for process in self._processes.values()):
            self._renew()
            self._judge(read_records(self.logs))
            self._show()
            # A thousand records are a thousand small reads from a file server.
            time.sleep(max(POLL_S, self.group.world_size / 500))
        records = self._settled()
        nodes = {
            self.group.hosts[node].label: (process.returncode, self.group.ranks(node))
            for node, process in self._processes.items()
        }
        self.failure = first_failure(self.logs, records, self._ranks, nodes)
        code = exit_code(records, self._ranks, self.failure)
        if self.failure is not None and code not in (0, 3):
            self._say(f"vidworld: {self.failure}")
        return code

    def _start(self, start: NodeStart) -> subprocess.Popen[bytes]:
        label = self.group.hosts[start.node].label
        with (self.logs / f"{label}.log").open("ab") as log:
            # A session of its own: Ctrl-C in a terminal reaches the ranks as an order to save, not as a blow.
            return subprocess.Popen(
                list(start.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if start.environment is None else dict(start.environment),
                start_new_session=True,
            )

    def _renew(self) -> None:
        if time.monotonic() - self._leased_s < LEASE_EVERY_S:
            return
        self._leased_s = time.monotonic()
        self._beats += 1
        for node in self._nodes:
            with contextlib.suppress(OSError):  # a full disk is the ranks' to report
                (self.logs / lease_name(node)).write_text(f"{os.getpid()} {self._beats}\n")

    def _order(self, order: str) -> None:
        if order == "kill" and self._ordered_kill_s is None:
            self._ordered_kill_s = time.monotonic()
        with contextlib.suppress(OSError):
            (self.logs / STOP).write_text(f"{order}\n")

    def _judge(self, records: Sequence[Record]) -> None:
        """One rank's end is everybody's: on purpose together, by accident at once."""
        now = time.monotonic()
        codes = {record.exit_code for record in records} - {None, 0}
        broken = [node for node, process in self._processes.items() if process.poll() not in (None, 0)]
        if codes - set(FINAL) or (broken and not codes):
            if self._ordered_kill_s is None:
                self._order("kill")
        elif codes:
            self._deadline_s = self._deadline_s or now + TOGETHER_S
            if now > self._deadline_s and self._ordered_kill_s is None:
                self._order("kill")
        if self._ordered_kill_s is not None and now - self._ordered_kill_s > GIVE_UP_S:
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _settled(self) -> list[Record]:
        """All records, once the ranks started from here have ended; those of a host that is lost do not."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            mine = [record for record in read_records(self.logs) if record.rank in self._ranks]
            lost = [record for record in mine if record.exit_code is None]
            # The processes that started them are gone: what is not there now will not come.
            if not lost:
                break
            if self._ordered_kill_s is None:
                self._order("kill")
            self._renew()
            time.sleep(POLL_S)
        return read_records(self.logs)
