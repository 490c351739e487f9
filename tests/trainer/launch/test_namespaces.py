"""Two and three hosts, each a network namespace of this machine: real training, and what goes wrong."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vidworld.trainer.launch.rank import read_records

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def launch(vidworld: Callable, namespaces, toy_config: Path, tmp_path: Path) -> Callable:
    """Launch the toy run on the first hosts."""

    def run(nodes: int, *arguments: object, slots: int = 1, rsh: str | None = None, **more: str):
        hostfile = namespaces.hostfile(tmp_path, nodes, slots)
        flags = ("--nodes", nodes, "--hostfile", hostfile, "--rsh", rsh or namespaces.rsh, "--cpu")
        if "--preflight-s" not in arguments:  # hosts that share a busy machine
            flags = (*flags, "--preflight-s", 240)
        return vidworld("launch", toy_config, *flags, *arguments, **more)

    return run


@pytest.fixture
def alone(vidworld: Callable, toy_config: Path, tmp_path: Path) -> Callable:
    """The toy run in one process that does the micro-batches of `ranks` ranks; and with another seed."""

    def train(ranks: int, *arguments: object) -> tuple[Path, Path]:
        outs = tmp_path / "alone", tmp_path / "other"
        for seed, out in enumerate(outs):
            flags = ("--engine.accumulation", ranks, "--seed", seed, "--out", out)
            ended = vidworld("train", toy_config, *arguments, *flags)
            assert ended.code == 0, ended.said
        return outs

    return train


@pytest.mark.parametrize(("launcher", "nodes"), [("torchrun", 2), ("deepspeed", 3)])
def test_hosts_train_what_one_process_trains(
    launch: Callable,
    alone: Callable,
    tmp_path: Path,
    odd: str,
    require_same: Callable,
    launcher: str,
    nodes: int,
    namespaces,
) -> None:
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    run = tmp_path / odd
    ended = launch(nodes, "--launcher", launcher, "--out", run)
    assert ended.code == 0, ended.said
    assert f"{nodes} ranks on {nodes} hosts" in ended.said
    logs = run / "logs" / "0001"
    for rank, name in enumerate(namespaces.names[:nodes]):
        assert (logs / f"{name}-rank-{rank}.log").is_file()
        assert f"\n{name} " in ended.said, "a row of the table"
    one, other = alone(nodes)
    require_same(run, one, other)


def test_faults_of_hosts_are_found_before_anything_starts(
    launch: Callable, namespaces, tmp_path: Path
) -> None:
    """A host that is missing, one with other code, and one whose port is taken."""
    missing = launch(2, "--out", "run", rsh="ip netns exec {host}-gone")
    assert missing.code == 2
    assert missing.said.count("Cannot open network namespace") == 2, missing.said
    first, second = namespaces.names[:2]

    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(REPOSITORY / "vidworld"), str(other)], check=True)
    with (other / "errors.py").open("a") as file:
        file.write("# a newer commit\n")
    script = tmp_path / "rsh.sh"
    script.write_text(
        'host=$1; shift\n[ "$host" = "$CHANGED" ] || exec ip netns exec "$host" "$@"\n'
        'exec ip netns exec "$host" unshare --mount sh -c '
        '\'mount --bind "$0" "$1" && shift && exec "$@"\' '
        f'{other} {REPOSITORY / "vidworld"} "$@"\n'
    )
    changed = launch(2, "--out", "run", rsh=f"sh {script} {{host}}", CHANGED=second)
    assert changed.code == 2, changed.said
    assert f"vidworld: {second}: vidworld's code is " in changed.said
    assert "1 fault on 1 of 2 hosts" in changed.said

    port = 29517
    listen = (
        "import socket, time; s = socket.socket(); s.bind(('', int(__import__('sys').argv[1]))); s.listen(); "
        "print('taken', flush=True); time.sleep(600)"
    )
    command = ["ip", "netns", "exec", first, sys.executable, "-c", listen, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"taken\n"
        busy = launch(2, "--out", "run", "--master-port", port)
        holder.kill()
    assert busy.code == 2
    assert f"vidworld: {first}: port {port}: Address already in use; give another --master-port" in busy.said
    assert not (tmp_path / "run").exists(), "nothing is left of a launch that never started"


def test_hosts_that_do_not_reach_each_other(launch: Callable, namespaces, tmp_path: Path) -> None:
    """Both can be told to start, and their network is down between them."""
    _, second, _ = namespaces.names
    _link(second, "down")
    try:
        ended = launch(2, "--out", "run", "--preflight-s", 40)
    finally:
        _link(second, "up")
    assert ended.code == 2, ended.said
    assert f"{second}: cannot reach the rendezvous {namespaces.addresses[0]}:" in ended.said
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_killed_costs_no_step(
    launch: Callable, alone: Callable, tmp_path: Path, require_same: Callable
) -> None:
    run, steps = tmp_path / "run", ("--loop.steps", 60, "--loop.save-every", 10)
    killed = []

    def kill() -> None:
        latest = run / "checkpoints" / "latest"
        while not latest.is_file():
            time.sleep(0.05)
        (victim,) = [record for record in read_records(run / "logs" / "0001") if record.rank == 1]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    ended = launch(2, "--out", run, *steps, "--max-restarts", 3)
    assert ended.code == 0, ended.said
    assert killed
    assert ended.said.count("failed first: killed by SIGKILL") == 1
    assert "starts again from step 10" in ended.said or "starts again from step" in ended.said
    assert "goes on from step" in next((run / "logs" / "0002").glob("*-rank-0.log")).read_text()
    one, other = alone(2, *steps)
    require_same(run, one, other)


def test_a_network_that_comes_back(launch: Callable, namespaces, tmp_path: Path) -> None:
    """Two starts find no network, the third one does; the run goes on from its checkpoint."""
    run, second = tmp_path / "run", namespaces.names[1]
    latest = run / "checkpoints" / "latest"

    def cut() -> None:
        while not latest.is_file():
            time.sleep(0.05)
        _link(second, "down")
        while not (run / "logs" / "0002").is_dir():
            time.sleep(0.2)
        while (run / "logs" / "0002").is_dir():
            time.sleep(0.2)
        _link(second, "up")

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    try:
        ended = launch(
            *(2, "--out", run, "--loop.steps", 300, "--loop.save-every", 10, "--loop.hang-s", 5),
            *("--max-restarts", 6, "--preflight-s", 40),
        )
    finally:
        _link(second, "up")
    assert ended.code == 0, ended.said
    assert "failed first" in ended.said
    assert "not started again" in ended.said


def by_itself(
    namespaces, node: int, config: Path, environment: dict[str, str], *arguments: object
) -> list[str]:
    rendezvous = ("--master-addr", namespaces.addresses[0], "--master-port", 29519, "--join-s", 120)
    flags = ("--nodes", 2, "--node-rank", node, "--gpus-per-node", 1, "--cpu", *rendezvous, *arguments)
    shell = ["ip", "netns", "exec", namespaces.names[node]]
    return [*shell, sys.executable, "-m", "vidworld", "launch", str(config), *map(str, flags)]


def together(commands: Sequence[list[str]], environment: dict[str, str]) -> list[tuple[int, str]]:
    processes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    said = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_hosts_that_start_by_themselves(
    namespaces,
    toy_config: Path,
    environment: dict[str, str],
    tmp_path: Path,
    alone: Callable,
    require_same: Callable,
) -> None:
    """As pods do: the same command on every host, and nobody who reaches them."""
    run = tmp_path / "run"
    ends = together(
        [by_itself(namespaces, node, toy_config, environment, "--out", run) for node in range(2)], environment
    )
    assert [code for code, _ in ends] == [0, 0], ends
    names = sorted(path.name for path in (run / "logs" / "0001").glob("*-rank-*.log"))
    assert names == [f"{socket.gethostname()}-{rank}-rank-{rank}.log" for rank in range(2)]
    one, other = alone(2)
    require_same(run, one, other)


def test_hosts_with_different_configs_all_refuse(
    namespaces, toy_config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changed = tmp_path / "changed.yaml"
    changed.write_text(toy_config.read_text().replace("steps: 8", "steps: 9"))
    ends = together(
        [
            by_itself(namespaces, node, config, environment, "--out", run)
            for node, config in enumerate((toy_config, changed))
        ],
        environment,
    )
    assert [code for code, _ in ends] == [2, 2], ends
    for _, said in ends:
        assert "the config's digest is" in said
    assert not (run / "checkpoints").exists()


def _link(name: str, state: str) -> None:
    subprocess.run(["ip", "-n", name, "link", "set", "eth9", state], check=True)
