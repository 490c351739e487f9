"""The hosts of a launch and the way to each: hosts file, remote shell, the environment that goes along."""

import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidworld.errors import ConfigError
from vidworld.trainer.launch.settings import LaunchConfig

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=30 {host}"
SHELLED = ("ssh", "rsh", "pdsh", "clush")
"""Programs that join their arguments into one line for a shell on the other side."""
# Never a secret: what is passed on stands in the list of processes of every host.
PASSED_ON = re.compile(
    r"(PYTHON(PATH|UNBUFFERED|WARNINGS)|LD_LIBRARY_PATH|OMP_|MKL_|NCCL_|GLOO_|UCX_|TORCH|CUDA_HOME)"
)
NOT_PASSED_ON = re.compile(r"TORCHELASTIC_")


@dataclass(frozen=True)
class Host:
    """A machine, or whatever counts as one."""

    name: str
    slots: int | None = None
    """Processes that it takes, if the hosts file says so."""
    address: str | None = None
    """How other hosts reach it, if not by its name."""

    @property
    def label(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.-]", "_", self.name)


@dataclass(frozen=True)
class RemoteShell:
    """A command line that runs another one on a host."""

    template: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "RemoteShell":
        """Read `--rsh`; ConfigError when it names no host or is no command line."""
        try:
            template = tuple(shlex.split(line))
        except ValueError as error:
            raise ConfigError("--rsh", got=line, expected=f"a command line ({error})") from None
        if not any("{host}" in part for part in template):
            raise ConfigError("--rsh", got=line, expected="{host} in it", fix=f"as in: {SSH}")
        return cls(template)

    def wrap(self, host: Host, command: Sequence[str]) -> list[str]:
        """The arguments that run `command` on `host`, whatever characters it holds.

        A program that hands a line to a shell gets one line in which every argument is quoted.
        """
        words = [part.replace("{host}", host.name) for part in self.template]
        program = Path(words[0]).name
        if program not in SHELLED:
            return [*words, *command]
        line = shlex.join(command)
        # pdsh puts the host's name and number where the line says %h and %n.
        return [*words, line.replace("%", "%%") if program == "pdsh" else line]


def read_hostfile(path: Path) -> list[Host]:
    """Read `HOST slots=N [addr=ADDRESS]` lines; ConfigError names the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the hosts file", where=path, got=str(error)) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        content = line.partition("#")[0].split()
        if not content:
            continue
        name, *settings = content
        found = pairs(settings)
        slots = found.pop("slots", "")
        address = found.pop("addr", None)
        if found or not slots.isdecimal() or int(slots) < 1:
            raise ConfigError(
                "hosts file",
                where=f"{path}, line {number}",
                got=line.strip(),
                expected="HOST slots=N [addr=ADDRESS]",
            )
        hosts.append(Host(name, int(slots), address))
    _check_names(hosts, path)
    if not hosts:
        raise ConfigError("hosts file", where=path, got="no hosts", expected="lines of HOST slots=N")
    return hosts


def choose_hosts(config: LaunchConfig) -> tuple[list[Host], RemoteShell | None]:
    """The hosts of a launch, and the way to them; None for this machine itself.

    Raises ConfigError when there are fewer than `nodes`.
    """
    if config.hostfile is None and not config.hosts:
        if config.nodes > 1:
            raise ConfigError(
                f"--nodes {config.nodes}",
                got="no hosts",
                fix="give --hosts A B ..., a --hostfile, --launcher slurm, or --node-rank on every host",
            )
        return [Host("localhost" if config.rsh is None else socket.gethostname())], None
    if config.hostfile is not None:
        hosts = read_hostfile(config.hostfile)
    else:
        hosts = [Host(name) for name in config.hosts]
        _check_names(hosts, "--hosts")
    if len(hosts) < config.nodes:
        where = config.hostfile or "--hosts"
        raise ConfigError("hosts", where=where, got=f"{len(hosts)}", expected=f"--nodes {config.nodes}")
    return hosts[: config.nodes], RemoteShell.parse(config.rsh or SSH)


def passed_on(environment: Mapping[str, str], extra: Sequence[str]) -> dict[str, str]:
    """The variables that processes on the hosts get: those for libraries and networks, and `--env`."""
    kept = {
        name: value
        for name, value in environment.items()
        if PASSED_ON.match(name) and not NOT_PASSED_ON.match(name)
    }
    return dict(sorted(kept.items())) | pairs(extra)


def pairs(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE strings as a mapping."""
    return {name: value for name, _, value in (setting.partition("=") for setting in settings)}


def with_environment(command: Sequence[str], variables: Mapping[str, str], directory: Path) -> list[str]:
    """`command` in a directory and with variables, as arguments and without a shell."""
    return [
        "env",
        f"--chdir={directory}",
        *(f"{name}={value}" for name, value in variables.items()),
        *command,
    ]


def count_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def processes_per_node(config: LaunchConfig, hosts: Sequence[Host]) -> int:
    """How many processes every host gets; ConfigError when the hosts file says different numbers."""
    if config.gpus_per_node is not None:
        short = [host for host in hosts if host.slots is not None and host.slots < config.gpus_per_node]
        if short:
            raise ConfigError(
                f"slots of host {short[0].name}",
                where=config.hostfile,
                got=short[0].slots,
                expected=f"--gpus-per-node {config.gpus_per_node}",
            )
        return config.gpus_per_node
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise ConfigError(
            "slots",
            where=config.hostfile,
            got=", ".join(f"{host.name} {host.slots}" for host in hosts),
            expected="the same number on every host",
            fix="give --gpus-per-node",
        )
    return next(iter(slots)) or (1 if config.cpu else max(1, count_gpus()))


def _check_names(hosts: Sequence[Host], where: object) -> None:
    names = [host.name for host in hosts]
    if odd := [name for name in names if name.startswith("-")]:
        raise ConfigError("name of a host", where=where, got=odd[0], expected="no option of a remote shell")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("host named twice", where=where, got=", ".join(twice))
