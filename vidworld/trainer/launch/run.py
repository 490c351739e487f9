"""A launch from preflight to the last restart."""

import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vidworld.config import digest, to_yaml
from vidworld.errors import ConfigError
from vidworld.trainer import heartbeat
from vidworld.trainer.checkpoint import newest_step
from vidworld.trainer.config import Training
from vidworld.trainer.launch.attempt import Attempt, NodeStart
from vidworld.trainer.launch.exchange import Place, exchange, unique_names
from vidworld.trainer.launch.facts import Request
from vidworld.trainer.launch.hosts import Host, RemoteShell
from vidworld.trainer.launch.logs import FOLDER, AttemptFolder, only_launch
from vidworld.trainer.launch.preflight import Wanted, Way, check
from vidworld.trainer.launch.rank import Job
from vidworld.trainer.launch.settings import LaunchConfig
from vidworld.trainer.launch.start import Group, Rendezvous, start_command
from vidworld.trainer.launch.watch import StatusLine
from vidworld.trainer.run import has_begun
from vidworld.trainer.supervise import CrashLoopError, Process, supervise


@dataclass(frozen=True)
class Launch:
    """What is started where."""

    config: LaunchConfig
    training: Training
    run: Path
    hosts: tuple[Host, ...]
    shell: RemoteShell | None
    processes: int
    variables: Mapping[str, str]

    @property
    def by_themselves(self) -> bool:
        """Whether every host runs this command by itself."""
        return self.config.node_rank is not None and self.config.nodes > 1

    @property
    def way(self) -> Way:
        """How commands come to the hosts."""
        return Way(self.shell, self.variables, Path.cwd(), self.config.python or sys.executable)

    @property
    def address(self) -> str:
        """The first host as the others see it."""
        return self.config.master_addr or self.hosts[0].address or self.hosts[0].name

    def run_all(self, max_restarts: int, *, resume: bool, overwrite: bool) -> int:
        """Preflight, start, watch, and start again; the exit code of the run."""
        if self.by_themselves and self.config.node_rank != 0:
            return self._supervised(max_restarts, resume=resume, overwrite=overwrite)
        with only_launch(self.run):
            return self._supervised(max_restarts, resume=resume, overwrite=overwrite)

    def describe(self, *, resume: bool, overwrite: bool) -> str:
        """What would be run, one command a host; a port that preflight chooses is shown as 0."""
        logs = self.run / FOLDER / "NNNN"
        train = self._train_arguments(logs / "config.yaml", resume=resume, overwrite=overwrite)
        lines = [
            f"# {logs}/config.yaml",
            to_yaml(self.training),
            f"# every rank, by {logs}/job.json",
            shlex.join(["vidworld", *train]),
        ]
        group = self._group(self.config.master_port, self.hosts)
        for node in [self.config.node_rank or 0] if self.by_themselves else range(len(self.hosts)):
            command = self.way.command(self.hosts[node], start_command(group, node, logs))
            lines += [f"# host {self.hosts[node].name}", shlex.join(command)]
        return "\n".join(lines)

    def _supervised(self, max_restarts: int, *, resume: bool, overwrite: bool) -> int:
        status = StatusLine(self.run, self.config.status_s)

        def start(attempt: int) -> Process:
            if attempt == 0:
                return self._start(status, resume=resume, overwrite=overwrite)
            try:
                # A start that was to replace a run and never came to it still is to.
                anew = overwrite and not has_begun(self.run)
                return self._start(status, resume=not anew, overwrite=anew)
            except ConfigError as error:  # a host may need a moment to come back
                _say(f"vidworld: not started again: {error}")
                return NotStarted()

        try:
            return supervise(start, lambda: newest_step(self.run / "checkpoints"), max_restarts)
        except CrashLoopError:
            if max_restarts:
                raise
            _say("vidworld: to go on: the same command with --resume; --max-restarts N does so by itself")
            return 1
        finally:
            status.end()

    def _start(self, status: StatusLine, *, resume: bool, overwrite: bool) -> Attempt:
        if self.by_themselves:
            folder, group, nodes, networks = self._meet_others()
        else:
            folder = AttemptFolder.create(self.run, self.training)
            try:
                checked = check(
                    self.way,
                    self.hosts,
                    self._request(folder),
                    self._wanted(len(self.hosts) > 1),
                    address=self.address,
                    port=self.config.master_port,
                    interface=self.config.interface,
                    limit_s=self.config.preflight_s,
                    say=_say,
                )
            except BaseException:
                folder.remove()
                raise
            heartbeat.clear(self.run)
            group = self._group(checked.port, self.hosts)
            nodes, networks = range(len(self.hosts)), checked.networks
        if 0 in nodes:
            train = self._train_arguments(folder.config, resume=resume, overwrite=overwrite)
            Job(tuple(host.label for host in group.hosts), tuple(train), self.config.cpu).write(folder.path)
        starts = [
            NodeStart(
                node, *self.way.start(group.hosts[node], start_command(group, node, folder.path), network)
            )
            for node, network in zip(nodes, networks, strict=True)
        ]
        where = f"{len(group.hosts)} host{'s' if len(group.hosts) > 1 else ''}"
        _say(f"vidworld: {group.world_size} ranks on {where}, logs in {folder.path}")
        return Attempt(group, starts, folder.path, show=status, say=_say)

    def _meet_others(self) -> tuple[AttemptFolder, Group, list[int], list[dict[str, str]]]:
        """Every host by itself: the first one makes the folder, and all compare what they are."""
        node = self.config.node_rank
        assert node is not None
        place = Place(node, self.config.nodes, self.address, self.config.master_port, self.config.join_s)

        def announce() -> dict[str, str]:
            folder = AttemptFolder.create(self.run, self.training)
            heartbeat.clear(self.run)
            return {"path": str(folder.path), "token": folder.token}

        with tempfile.TemporaryDirectory() as temporary:
            # What this host would train, which is compared with what the others would.
            mine = Path(temporary) / "config.yaml"
            mine.write_text(to_yaml(self.training))

            def request(announced: dict[str, str]) -> Request:
                folder = AttemptFolder(Path(announced["path"]), announced["token"])
                return replace(self._request(folder), config=str(mine))

            hosts, announced, variables = exchange(
                place,
                socket.gethostname(),
                announce,
                request,
                self._wanted(True),
                interface=self.config.interface,
                limit_s=self.config.preflight_s,
                say=_say,
            )
        folder = AttemptFolder(Path(announced["path"]), announced["token"])
        return folder, self._group(place.port, unique_names(hosts)), [node], [variables]

    def _group(self, port: int, hosts: Sequence[Host]) -> Group:
        rendezvous = Rendezvous(self.address, port) if len(hosts) > 1 else None
        return Group(
            tuple(hosts),
            self.processes,
            self.config.launcher,
            rendezvous,
            self.config.python or sys.executable,
        )

    def _request(self, folder: AttemptFolder) -> Request:
        return Request(str(folder.config), str(self.run), folder.token, str(folder.token_path))

    def _wanted(self, shared: bool) -> Wanted:
        return Wanted(self.processes, self.config.cpu, self.config.min_free_gb, digest(self.training), shared)

    def _train_arguments(self, config: Path, *, resume: bool, overwrite: bool) -> list[str]:
        flags = [*(["--resume"] if resume else []), *(["--overwrite"] if overwrite else [])]
        return ["train", str(config), "--out", str(self.run), *flags]


class NotStarted:
    """A start that failed before there was a process."""

    def wait(self) -> int:
        """Exit code 1: something that a restart may mend."""
        return 1

    def send_signal(self, sig: int) -> None:
        """Nothing is there to be told."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
