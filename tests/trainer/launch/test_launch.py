"""`vidworld launch` on this machine, from the command line."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LOCAL = ("--cpu", "--gpus-per-node", 2)
Launcher = Callable[..., "object"]


def test_two_ranks_in_a_folder_with_a_hard_name(
    vidworld: Callable, toy_config: Path, tmp_path: Path, odd: str
) -> None:
    run = tmp_path / odd
    ended = vidworld("launch", toy_config, *LOCAL, "--out", run, "--loop.steps", 2, "--status-s", 1)
    assert ended.code == 0, ended.said
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    logs = run / "logs" / "0001"
    assert "2 x cpu" in (logs / "localhost-rank-0.log").read_text()
    assert (logs / "localhost-rank-1.log").is_file()
    assert "2 ranks on 1 host" in ended.said
    assert "step 2/2" in ended.said
    again = vidworld("launch", toy_config, *LOCAL, "--out", run)
    assert again.code == 2
    assert "--resume to go on" in again.said
    assert not (run / "logs" / "0002").exists()


def test_a_dry_run_prints_all_and_writes_nothing(
    vidworld: Callable, toy_config: Path, tmp_path: Path, odd: str
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4 addr=10.0.0.1\nb slots=4\n")
    before = sorted(tmp_path.rglob("*"))
    ended = vidworld(
        *("launch", toy_config, "--nodes", 2, "--hostfile", hosts, "--out", odd, "--dry-run", "--resume"),
        *("--master-port", 29511, "--env", "X=a b;$(c)", "--launcher", "deepspeed"),
    )
    assert ended.code == 0, ended.said
    assert sorted(tmp_path.rglob("*")) == before
    lines = ended.said.splitlines()
    train = shlex.split(
        lines[lines.index(next(line for line in lines if line.startswith("# every rank"))) + 1]
    )
    assert train[:2] == ["vidworld", "train"]
    assert train[-1] == "--resume"
    assert train[4] == str(tmp_path / odd)
    for node, host in enumerate(("a", "b")):
        words = shlex.split(lines[lines.index(f"# host {host}") + 1])
        assert words[0] == "ssh"
        assert words[-2] == host
        remote = shlex.split(words[-1])
        assert remote[:2] == ["env", f"--chdir={tmp_path}"]
        assert "X=a b;$(c)" in remote
        assert {"--master_addr=10.0.0.1", "--master_port=29511", f"--node_rank={node}"} < set(remote)
        assert remote[-2:] == [f"{tmp_path / odd}/logs/NNNN", str(node)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give a YAML or a run"),
        (("{config}", "--nodes", 2), "give --hosts A B"),
        (("{config}", "--nodes", 0), "--nodes: got 0"),
        (("{config}", "--node", 2), "--nodes"),
        (("{config}", "--loop.step", 2), "--loop.steps"),
        (("{config}", "--gpus-per-node", 0), "give --cpu"),
        (("{config}", "--launcher", "mpi"), "mpi"),
        (("{config}", "--launcher", "slurm"), "--gpus-per-node in --launcher slurm"),
        (("{config}", "--nodes", 2, "--node-rank", 2), "--node-rank: got 2"),
        (("{config}", "--nodes", 2, "--node-rank", 1), "same --master-addr and --master-port"),
        (("{config}", "--hosts", "a", "--rsh", "ssh 'x {host}"), "a command line"),
        (("{config}", "--hostfile", "none"), "cannot read the hosts file"),
        (("{config}", "--resume", "--overwrite"), "give one of them"),
        (("none.yaml",), "cannot read the configuration"),
    ],
)
def test_mistakes(
    toy_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple,
    says: str,
) -> None:
    from vidworld.cli import run as command

    monkeypatch.chdir(tmp_path)
    words = [str(each).replace("{config}", str(toy_config)) for each in arguments]
    assert command(["launch", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_dies_at_start_shows_its_traceback_first(
    vidworld: Callable, toy_config: Path, tmp_path: Path, faulty: Callable, environment: dict[str, str]
) -> None:
    folder = faulty("exec('if rank == 1: raise RuntimeError(\"the GPU fell off the bus\")')")
    path = f"{folder}:{environment['PYTHONPATH']}"
    ended = vidworld("launch", toy_config, *LOCAL, "--out", "run", PYTHONPATH=path)
    assert ended.code == 1, ended.said
    said = ended.said[ended.said.index("rank 1 on localhost failed first: exit code 1") :]
    assert "Traceback (most recent call last)" in said
    assert "RuntimeError: the GPU fell off the bus" in said
    assert "--max-restarts" in said
    assert "rank 0" not in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crash_loop_is_given_up(
    vidworld: Callable, toy_config: Path, tmp_path: Path, faulty: Callable, environment: dict[str, str]
) -> None:
    folder = faulty("exec('if rank == 1: os.kill(os.getpid(), signal.SIGKILL)')")
    path = f"{folder}:{environment['PYTHONPATH']}"
    ended = vidworld("launch", toy_config, *LOCAL, "--out", "run", "--max-restarts", 9, PYTHONPATH=path)
    assert ended.code == 1, ended.said
    assert "given up after 3 restarts without progress" in ended.said
    assert ended.said.count("rank 1 on localhost failed first: killed by SIGKILL") == 4
    assert len(list((tmp_path / "run" / "logs").glob("0*"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_saves_and_the_run_goes_on(
    environment: dict[str, str], vidworld: Callable, toy_config: Path, tmp_path: Path
) -> None:
    """SIGTERM to the launcher: checkpoint and exit code 3; --resume goes on there. One launch at a time."""
    run = tmp_path / "run"
    command = ["launch", toy_config, *LOCAL, "--out", run, "--loop.steps", 1000000]
    launched = subprocess.Popen(
        [sys.executable, "-m", "vidworld", *map(str, command)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = vidworld("launch", toy_config, *LOCAL, "--out", run, "--resume")
    assert second.code == 2
    assert f'"process": {launched.pid}' in second.said
    os.kill(launched.pid, signal.SIGTERM)
    _, said = launched.communicate(timeout=200)
    assert launched.returncode == 3, said
    step = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert step >= 3
    ended = vidworld("launch", toy_config, *LOCAL, "--out", run, "--loop.steps", step + 5, "--resume")
    assert ended.code == 0, ended.said
    assert f"goes on from step {step}" in (run / "logs" / "0002" / "localhost-rank-0.log").read_text()
    assert (run / "checkpoints" / f"step-{step + 5:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_diverges_is_not_started_again(
    vidworld: Callable, toy_config: Path, tmp_path: Path
) -> None:
    ended = vidworld(
        *("launch", toy_config, *LOCAL, "--out", "run", "--max-restarts", 5, "--loop.steps", 60),
        *("--optim.lr", "1e18", "--optim.clip", 0, "--loop.max-skips", 2),
    )
    assert ended.code == 4, ended.said
    assert "diverged" in ended.said
    assert not (tmp_path / "run" / "logs" / "0002").exists()
