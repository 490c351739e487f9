"""Hosts files, and command lines that come through a remote shell as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.errors import ConfigError
from vidworld.trainer.launch.hosts import (
    SSH,
    Host,
    RemoteShell,
    choose_hosts,
    passed_on,
    processes_per_node,
    read_hostfile,
    with_environment,
)
from vidworld.trainer.launch.settings import LaunchConfig

NASTY = [
    "a b",
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "'",
    '"',
    "\\",
    "*",
    "",
    "%h",
    "ü",
    "a\nb",
    "-x",
]
ECHO = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nworker-0 slots=8\n\nworker-1   slots=8 addr=10.0.0.2  # second\n")
    assert read_hostfile(path) == [Host("worker-0", 8), Host("worker-1", 8, "10.0.0.2")]


def test_hostfile_reads_as_deepspeed_reads_it(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = Path(__file__).resolve().parents[3] / "training" / "hostfile"
    theirs = dict(runner.fetch_hostfile(str(path)))
    assert {host.name: host.slots for host in read_hostfile(path)} == theirs
    assert len(theirs) >= 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a slots=x\n", "line 1"),
        ("a slots=1\nb\n", "line 2"),
        ("a slots=0\n", "line 1"),
        ("a slots=1 port=3\n", "line 1"),
        ("a slots=1\na slots=1\n", "named twice"),
        ("-oProxyCommand=x slots=1\n", "no option"),
        ("# nobody\n", "no hosts"),
    ],
)
def test_hostfile_faults(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_hostfile(path)


def test_hosts_must_be_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hostfile"):
        choose_hosts(LaunchConfig(nodes=2))
    with pytest.raises(ConfigError, match="got 1, expected --nodes 2"):
        choose_hosts(LaunchConfig(nodes=2, hosts=("a",)))
    with pytest.raises(ConfigError, match="one of them"):
        LaunchConfig(hosts=("a",), hostfile=tmp_path)
    with pytest.raises(ConfigError, match=r"\{host\} in it"):
        choose_hosts(LaunchConfig(nodes=1, hosts=("a",), rsh="ssh"))
    hosts, shell = choose_hosts(LaunchConfig(nodes=1, hosts=("a", "b")))
    assert [host.name for host in hosts] == ["a"]
    assert shell == RemoteShell.parse(SSH)
    assert choose_hosts(LaunchConfig())[1] is None


def test_processes_per_node() -> None:
    same, other = [Host("a", 4), Host("b", 4)], [Host("a", 4), Host("b", 2)]
    assert processes_per_node(LaunchConfig(), same) == 4
    assert processes_per_node(LaunchConfig(gpus_per_node=2), other) == 2
    with pytest.raises(ConfigError, match="a 4, b 2"):
        processes_per_node(LaunchConfig(), other)
    with pytest.raises(ConfigError, match="slots of host b: got 2"):
        processes_per_node(LaunchConfig(gpus_per_node=3), other)
    assert processes_per_node(LaunchConfig(cpu=True), [Host("a")]) == 1


def test_arguments_survive_programs_that_take_arguments(tmp_path: Path) -> None:
    command = RemoteShell.parse("env HOST={host}").wrap(Host("a"), [*ECHO, *NASTY])
    assert command[:2] == ["env", "HOST=a"]
    assert json.loads(subprocess.check_output(command, cwd=tmp_path)) == NASTY


@pytest.mark.parametrize("program", ["ssh", "/opt/site/bin/rsh", "clush"])
def test_arguments_survive_programs_that_hand_a_line_to_a_shell(tmp_path: Path, program: str) -> None:
    """The far side does what sshd does: it gives the line to the user's shell."""
    *words, line = RemoteShell.parse(f"{program} -p 22 {{host}}").wrap(Host("a"), [*ECHO, *NASTY])
    assert words == [program, "-p", "22", "a"]
    for shell in ("sh", "bash"):
        assert json.loads(subprocess.check_output([shell, "-c", line], cwd=tmp_path)) == NASTY
    assert not (tmp_path / "pwned").exists()


def test_pdsh_gets_its_percent_signs_doubled() -> None:
    assert RemoteShell.parse("pdsh -S -w {host}").wrap(Host("a"), ["echo", "100%h"])[-1] == "echo 100%%h"
    assert RemoteShell.parse("ssh {host}").wrap(Host("a"), ["echo", "100%h"])[-1] == "echo 100%h"


def test_environment_goes_along_but_no_secrets(tmp_path: Path) -> None:
    here = {
        "PYTHONPATH": "/a b",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "WANDB_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "TORCHELASTIC_RUN_ID": "mine",
        "HOME": "/root",
    }
    passed = passed_on(here, ["HF_HOME=/x=y;$(z)"])
    assert passed == {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "/a b",
        "HF_HOME": "/x=y;$(z)",
    }
    folder = tmp_path / "a;b c"
    folder.mkdir()
    code = "import json, os; print(json.dumps([os.getcwd(), os.environ['HF_HOME']]))"
    command = with_environment([sys.executable, "-c", code], passed, folder)
    assert json.loads(subprocess.check_output(command)) == [os.path.realpath(folder), "/x=y;$(z)"]
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        LaunchConfig(env=("HF_HOME",))
