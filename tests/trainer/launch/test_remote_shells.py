"""Real ssh, and pdsh over it, between two hosts that are network namespaces."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vidworld.trainer.launch.hosts import Host, RemoteShell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

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
    "%h %n",
    "ü",
    "a\nb",
]


@pytest.fixture(scope="module")
def ssh(namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A command line that reaches the first two hosts by their names, with a key made for this test."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if shutil.which("ssh") is None or not Path(server).exists():
        pytest.skip("needs ssh and sshd (Debian: openssh-client, openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    keys = folder / "authorized"
    keys.write_text((folder / "user.pub").read_text())
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {keys}\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    client = "".join(
        f"Host {name}\n  HostName {address}\n"
        for name, address in zip(namespaces.names, namespaces.addresses, strict=True)
    )
    (folder / "config").write_text(
        f"{client}Host *\n  User root\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {folder}/known\n  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = [
        subprocess.Popen(["ip", "netns", "exec", name, server, "-D", "-e", "-f", str(folder / "sshd_config")])
        for name in namespaces.names[:2]
    ]
    try:
        yield f"ssh -F {folder}/config -o BatchMode=yes -o ConnectionAttempts=20 {{host}}"
    finally:
        for each in servers:
            each.send_signal(signal.SIGTERM)
            each.wait(20)


def test_arguments_survive_ssh_and_pdsh(ssh: str, namespaces, tmp_path: Path) -> None:
    first, second = namespaces.names[:2]
    code = "import json, os, sys; print(json.dumps(sys.argv[1:])); print(os.readlink('/proc/self/ns/net'))"
    command = [sys.executable, "-c", code, *NASTY]
    ways = [(ssh, {})]
    if shutil.which("pdsh"):
        arguments = ssh.removeprefix("ssh ").removesuffix(" {host}")
        ways.append(("pdsh -N -S -R ssh -w {host}", {"PDSH_SSH_ARGS": f"-2 -a -x -l%u %h {arguments}"}))
    for line, more in ways:
        words = RemoteShell.parse(line).wrap(Host(second), command)
        done = subprocess.run(
            ["ip", "netns", "exec", first, *words],
            env={**os.environ, **more},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        seen, network = done.stdout.splitlines()
        assert json.loads(seen) == NASTY, line
        there = ["ip", "netns", "exec", second, "readlink", "/proc/self/ns/net"]
        assert network == subprocess.check_output(there, text=True).strip(), "it ran on the other host"
    assert not list(tmp_path.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()


def test_a_launch_over_ssh(
    ssh: str,
    namespaces,
    environment: dict[str, str],
    toy_config: Path,
    tmp_path: Path,
    odd: str,
    vidworld: Callable,
    require_same: Callable,
) -> None:
    """The launcher runs on the first host and reaches both through ssh."""
    run = tmp_path / odd
    hostfile = namespaces.hostfile(tmp_path, 2)
    launch = ["launch", toy_config, "--nodes", 2, "--hostfile", hostfile, "--rsh", ssh, "--cpu", "--out", run]
    shell = ["ip", "netns", "exec", namespaces.names[0]]
    done = subprocess.run(
        [*shell, sys.executable, "-m", "vidworld", *map(str, launch)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outs = tmp_path / "alone", tmp_path / "other"
    for seed, out in enumerate(outs):
        ended = vidworld("train", toy_config, "--engine.accumulation", 2, "--seed", seed, "--out", out)
        assert ended.code == 0, ended.said
    require_same(run, outs[0], outs[1])
