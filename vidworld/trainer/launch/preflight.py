"""Every host is looked at before anything starts: one table, and one line for each fault with its cure."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vidworld.errors import ConfigError
from vidworld.trainer.launch.facts import MARK, Facts, Request
from vidworld.trainer.launch.hosts import Host, RemoteShell, with_environment

FACTS_MODULE = "vidworld.trainer.launch.facts"
MAX_AT_ONCE = 64
SKEW_S = 5.0


@dataclass(frozen=True)
class Way:
    """How commands come to the hosts, and with which environment."""

    shell: RemoteShell | None
    """None for this machine itself."""
    variables: Mapping[str, str]
    directory: Path
    python: str

    def command(self, host: Host, command: Sequence[str], more: Mapping[str, str] | None = None) -> list[str]:
        """The arguments that run `command` on a host."""
        full = with_environment(command, {**self.variables, **(more or {})}, self.directory)
        return full if self.shell is None else self.shell.wrap(host, full)

    def start(
        self, host: Host, command: Sequence[str], more: Mapping[str, str] | None = None
    ) -> tuple[list[str], dict[str, str] | None]:
        """Arguments and environment of a process here that runs `command` on a host, in this directory."""
        if self.shell is None:
            return list(command), {**os.environ, **self.variables, **(more or {})}
        return self.command(host, command, more), None


@dataclass(frozen=True)
class Fault:
    """What is wrong with a host, and what mends it."""

    host: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Answer:
    """What came back from a host: JSON, or why there is none."""

    host: Host
    content: dict[str, Any] | None
    error: str = ""
    seconds: float = 0.0

    @property
    def facts(self) -> Facts | None:
        """The answer to a request without `world_size`."""
        return None if self.content is None else Facts(**self.content)


@dataclass(frozen=True)
class Wanted:
    """What every host is to have."""

    processes: int
    cpu: bool
    min_free_gb: float
    config: str
    """Digest of the settings here."""
    shared: bool
    """Whether the run directory must be one and the same."""


def ask(
    way: Way, host: Host, request: Request, limit_s: float, more: Mapping[str, str] | None = None
) -> Answer:
    """Put a request to a host."""
    command, environment = way.start(
        host, [way.python, "-m", FACTS_MODULE, json.dumps(asdict(request))], more
    )
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, None, f"no answer within {limit_s:.0f} s")
    except OSError as error:
        return Answer(host, None, f"cannot run {command[0]}: {error.strerror}")
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Answer(host, json.loads(line.removeprefix(MARK)), seconds=time.monotonic() - begin)
    said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
    return Answer(host, None, f"exit code {done.returncode}: {said[:200]}")


def ask_all(
    way: Way, questions: Sequence[tuple[Host, Request, Mapping[str, str]]], limit_s: float
) -> list[Answer]:
    """Put requests to hosts at once, in the order given."""
    with ThreadPoolExecutor(min(MAX_AT_ONCE, len(questions))) as pool:
        return list(pool.map(lambda each: ask(way, each[0], each[1], limit_s, each[2]), questions))


def judge(answers: Sequence[Answer], wanted: Wanted) -> list[Fault]:
    """The faults of all hosts; the first host that answered is what others are compared with."""
    faults: list[Fault] = []
    reference = next(((a.host.name, a.facts) for a in answers if a.facts is not None), None)
    for answer in answers:
        facts = answer.facts
        if facts is None or reference is None:
            faults.append(
                Fault(
                    answer.host.name,
                    f"cannot be reached ({answer.error})",
                    "check its name, --rsh, and Python there",
                )
            )
            continue
        faults += _own_faults(answer.host.name, facts, wanted)
        faults += _differences(answer.host.name, facts, *reference)
    return faults


def judge_meeting(answers: Sequence[Answer], address: str, port: int) -> list[Fault]:
    """The faults of hosts that were to meet."""
    faults = []
    for answer in answers:
        name, found = answer.host.name, answer.content or {}
        error = answer.error or found.get("error", "")
        if not found.get("store"):
            what = f"cannot reach the rendezvous {address}:{port} ({error})"
            fix = "open this port between the hosts, or give --master-addr, --master-port or --interface"
        elif not found.get("gloo"):
            what, fix = (
                f"gloo does not get through ({error})",
                "open ports between the hosts, or give --interface",
            )
        elif found.get("nccl") is False or error:
            what, fix = (
                f"NCCL does not get through ({error})",
                "see it with --env NCCL_DEBUG=INFO, or give --interface",
            )
        else:
            continue
        faults.append(Fault(name, what, fix))
    return faults


def table(answers: Sequence[Answer]) -> str:
    """One row a host: what was found there."""
    head = [
        "host",
        "python",
        "torch",
        "deepspeed",
        "code",
        "config",
        "GPUs",
        "free GB",
        "network",
        "answered",
    ]
    rows = [head]
    for answer in answers:
        facts = answer.facts
        if facts is None:
            rows.append([answer.host.name, *["-"] * 8, "no"])
            continue
        rows.append(
            [
                answer.host.name,
                facts.python,
                facts.versions.get("torch", "") + (f" CUDA {facts.cuda}" if facts.cuda else ""),
                facts.versions.get("deepspeed") or "none",
                facts.code,
                facts.config[:12],
                _gpus(facts.gpus),
                f"{facts.free_gb:.0f}",
                facts.interface or "-",
                f"{answer.seconds:.1f} s",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def refuse(faults: Sequence[Fault], answers: Sequence[Answer]) -> None:
    """Print the table and the faults, and raise ConfigError when there are any."""
    if not faults:
        return
    print(table(answers), file=sys.stderr)
    for fault in faults:
        print(f"vidworld: {fault}", file=sys.stderr)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    hosts = len({fault.host for fault in faults})
    raise ConfigError(
        f"{count} on {hosts} of {len(answers)} hosts, listed above",
        fix="nothing was started",
    )


@dataclass(frozen=True)
class Checked:
    """What preflight found out that the start needs."""

    port: int
    networks: tuple[dict[str, str], ...]
    """Variables by host that name its network interface."""


def check(
    way: Way,
    hosts: Sequence[Host],
    request: Request,
    wanted: Wanted,
    *,
    address: str,
    port: int,
    interface: str | None,
    limit_s: float,
    say: Callable[[str], object] = print,
) -> Checked:
    """Look at every host, then let them meet as training will.

    Raises ConfigError after a table and a line for each fault, the exit code of which is 2.
    """
    several = len(hosts) > 1
    first = replace(request, toward=address if several else None, limit_s=limit_s)
    questions = [
        (host, replace(first, port=port if node == 0 else None), {}) for node, host in enumerate(hosts)
    ]
    answers = ask_all(way, questions, limit_s)
    refuse(judge(answers, wanted), answers)
    found = [facts for answer in answers if (facts := answer.facts) is not None]
    for line in clock_warnings(answers):
        say(line)
    port = found[0].port
    networks = tuple(network(interface or facts.interface) if several else {} for facts in found)
    if several:
        questions = [
            (
                host,
                replace(first, port=port, rank=node, world_size=len(hosts), limit_s=limit_s / 2),
                networks[node],
            )
            for node, host in enumerate(hosts)
        ]
        met = ask_all(way, questions, limit_s)
        refuse(judge_meeting(met, address, port), answers)
    say(table(answers))
    return Checked(port, networks)


def network(interface: str) -> dict[str, str]:
    """Variables that keep gloo and NCCL on an interface, unless the user has set them."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: interface for name in names if interface and name not in os.environ}


def clock_warnings(answers: Sequence[Answer]) -> list[str]:
    """A line for each host whose clock is off; runs bear it, people who compare logs do not."""
    times = [(a.host.name, facts.time) for a in answers if (facts := a.facts) is not None]
    # Answers come within the time that hosts take to import torch.
    allowed_s = SKEW_S + max(answer.seconds for answer in answers)
    return [
        f"vidworld: warning: the clock of {name} is {seconds - times[0][1]:+.0f} s off that of {times[0][0]}"
        for name, seconds in times[1:]
        if abs(seconds - times[0][1]) > allowed_s
    ]


def _own_faults(name: str, facts: Facts, wanted: Wanted) -> list[Fault]:
    faults = []
    if facts.config.startswith("unreadable"):
        faults.append(
            Fault(name, f"config {facts.config}", "put --out where all hosts see it, under one path")
        )
    if wanted.shared and not facts.same_run:
        faults.append(
            Fault(
                name, "sees another run directory than this one", "put --out on storage that all hosts share"
            )
        )
    elif facts.free_gb < wanted.min_free_gb:
        faults.append(
            Fault(
                name,
                f"{facts.free_gb:.1f} GB free in the run directory, {wanted.min_free_gb:g} wanted",
                "free some, or lower --min-free-gb",
            )
        )
    if not wanted.cpu and len(facts.gpus) < wanted.processes:
        faults.append(
            Fault(
                name,
                f"{len(facts.gpus)} GPUs, {wanted.processes} wanted",
                "lower --gpus-per-node, or give --cpu to train without",
            )
        )
    if facts.port_error:
        faults.append(Fault(name, facts.port_error, "give another --master-port, or 0 for a free one"))
    missing = [path for path, found in facts.data.items() if not found]
    faults += [Fault(name, f"no dataset at {path}", "copy or mount it there") for path in missing]
    return faults


def _differences(name: str, facts: Facts, other: str, reference: Facts) -> list[Fault]:
    pairs = [
        ("Python", facts.python, reference.python, "use one Python on all hosts"),
        ("vidworld", facts.vidworld, reference.vidworld, "install one version on all hosts"),
        ("vidworld's code", facts.code, reference.code, "bring all hosts to one commit"),
        ("CUDA", facts.cuda, reference.cuda, "install one build of torch on all hosts"),
        *(
            (
                package,
                facts.versions.get(package),
                reference.versions.get(package),
                "install one version on all hosts",
            )
            for package in reference.versions
        ),
        (
            "the config's digest",
            facts.config,
            reference.config,
            "give all hosts the same config and the same code",
        ),
        *(
            (
                f"the manifest of {path}",
                facts.data.get(path),
                expected,
                "copy one and the same dataset to all hosts",
            )
            for path, expected in reference.data.items()
            if facts.data.get(path) and expected
        ),
    ]
    return [
        Fault(name, f"{what} is {mine or 'missing'}, that of {other} is {theirs or 'missing'}", fix)
        for what, mine, theirs, fix in pairs
        if mine != theirs
    ]


def _gpus(names: Sequence[str]) -> str:
    kinds = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" for name, count in kinds.items()) or "none"
