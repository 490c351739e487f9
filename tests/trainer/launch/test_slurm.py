"""The job that is submitted; and, where SLURM is installed, real jobs on two nodes on this machine."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vidworld.errors import ConfigError
from vidworld.trainer.launch import slurm
from vidworld.trainer.launch.settings import LaunchConfig, SlurmConfig

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def test_the_script_is_the_one_in_training() -> None:
    path = Path(__file__).resolve().parents[3] / "training" / "slurm.sbatch"
    assert path.read_text() == slurm.SCRIPT
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_job_gets_its_arguments_as_arguments(tmp_path: Path, odd: str) -> None:
    """bash runs the script as SLURM does: with the words of sbatch's command line."""
    script, frozen, run = tmp_path / "job.sbatch", tmp_path / "frozen.yaml", Path("/runs") / odd
    options = SlurmConfig(options=("partition=gpu", "--time=24:00:00"), requeue=True)
    config = LaunchConfig(launcher="slurm", nodes=2, slurm=options)
    echo = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    command = slurm.submit_command(config, 8, script, run, [*echo, str(frozen), "--out", str(run)])
    assert command[:2] == ["sbatch", "--parsable"]
    flags, words = command[2 : command.index(str(script))], command[command.index(str(script)) + 1 :]
    assert {"--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--time=24:00:00", "--requeue"} < set(flags)
    (output,) = (flag for flag in flags if flag.startswith("--output="))
    assert output.removeprefix("--output=").replace("%%", "%") == f"{run}/logs/slurm-%j.out"
    script.write_text(slurm.SCRIPT)
    seen = json.loads(subprocess.check_output(["bash", str(script), *words], cwd=tmp_path))
    assert seen == [str(frozen), "--out", str(run)]
    assert "--gpus-per-node=8" not in slurm.submit_command(
        LaunchConfig(launcher="slurm", cpu=True), 8, script, run, echo
    )


def test_a_dry_run_writes_nothing(vidworld: Callable, toy_config: Path, tmp_path: Path) -> None:
    ended = vidworld(
        "launch", toy_config, "--launcher", "slurm", "--nodes", 2, "--cpu", "--out", "r 1", "--dry-run"
    )
    assert ended.code == 0, ended.said
    words = shlex.split(ended.said.splitlines()[0])
    assert words[0] == "sbatch"
    assert words[words.index("launch") + 1].endswith(".yaml")
    assert words[words.index("--gpus-per-node") + 1] == "1"
    assert not (tmp_path / "r 1").exists()


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch is not here.*--dry-run"):
        slurm.submit(["sbatch"])
    with pytest.raises(ConfigError, match="cannot run scontrol"):
        slurm.allocation(2, {"SLURM_JOB_NODELIST": "node[1-2]"})
    assert slurm.inside({"SLURM_JOB_ID": "1"})
    assert not slurm.inside({})
    assert [slurm.restarted({"SLURM_RESTART_COUNT": count}) for count in ("0", "1")] == [False, True]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two nodes on this machine with a key, a controller and ports of their own."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"SLURM needs root, and {', '.join(missing) or 'its programs'} (Debian: slurm-wlm, munge)"
        )
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):
        if parent != Path("/") and not os.stat(parent).st_mode & 0o001:
            os.chmod(parent, os.stat(parent).st_mode | 0o011)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    ports = dict(zip(("port", "port1", "port2"), _free_ports(3), strict=True))
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder, **ports))
    environment = {"SLURM_CONF": str(conf)}
    files = {name: f"{folder}/{name}" for name in ("munge.socket", "munged.pid", "munged.log", "munge.seed")}
    munged = [
        *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files['munge.socket']}"),
        *(f"--pid-file={files['munged.pid']}", f"--log-file={files['munged.log']}"),
        f"--seed-file={files['munge.seed']}",
    ]
    commands = [
        munged,
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-f", str(conf), "-N", node] for node in ("node1", "node2")),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            log = (folder / f"{len(daemons)}.out").open("wb")
            everything = {**os.environ, **environment}
            daemons.append(subprocess.Popen(command, env=everything, stdout=log, stderr=log))
            if command is munged:
                _until(lambda: Path(files["munge.socket"]).exists(), "munged")
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        _until(lambda: _output(idle, environment).strip() == "2", "two idle nodes")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env={**os.environ, **environment}, capture_output=True)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_job_on_two_nodes(
    cluster: dict[str, str],
    vidworld: Callable,
    toy_config: Path,
    tmp_path: Path,
    odd: str,
    require_same: Callable,
) -> None:
    run, alone, other = tmp_path / odd, tmp_path / "alone", tmp_path / "other"
    ended = vidworld(
        *("launch", toy_config, "--launcher", "slurm", "--nodes", 2, "--gpus-per-node", 1, "--cpu"),
        *("--slurm.wait", "--master-addr", "127.0.0.1", "--out", run),
        **cluster,
    )
    output = "".join(path.read_text() for path in (run / "logs").glob("slurm-*.out"))
    assert ended.code == 0, ended.said + output
    assert "2 ranks on 2 hosts" in output
    assert {path.name for path in (run / "logs" / "0001").glob("*-rank-*.log")} == {
        "node1-rank-0.log",
        "node2-rank-1.log",
    }
    for seed, out in ((0, alone), (1, other)):
        assert (
            vidworld("train", toy_config, "--engine.accumulation", 2, "--seed", seed, "--out", out).code == 0
        )
    require_same(run, alone, other)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_up_saves_and_comes_back(
    cluster: dict[str, str], vidworld: Callable, toy_config: Path, tmp_path: Path
) -> None:
    """The signal of --signal comes to the launcher, the ranks save, the job is requeued and goes on."""
    run = tmp_path / "run"
    ended = vidworld(
        *("launch", toy_config, "--launcher", "slurm", "--nodes", 2, "--gpus-per-node", 1, "--cpu"),
        *("--master-addr", "127.0.0.1", "--out", run, "--slurm.requeue", "--loop.steps", 3000),
        *("--loop.save-every", 100000, "--max-restarts", 3),
        **cluster,
    )
    assert ended.code == 0, ended.said
    number = ended.said.split("job ")[1].split(":")[0]
    metrics = run / "metrics.jsonl"
    _until(lambda: metrics.is_file() and '"step": 3,' in metrics.read_text(), "three steps", 240)
    _output(["scancel", "--batch", "--signal=TERM", number], cluster)
    latest = run / "checkpoints" / "latest"
    _until(latest.is_file, "a checkpoint", 120)
    saved = latest.read_text()
    _until(
        lambda: _state(number, cluster) in ("PENDING", "RUNNING") and (run / "logs/0001").is_dir(),
        "the queue",
    )
    # SLURM holds a requeued job back for a while; nobody needs to wait for that here.
    _until(
        lambda: (
            _output(["scontrol", "update", f"jobid={number}", "starttime=now"], cluster) == ""
            and (run / "logs" / "0002").is_dir()
        ),
        "a second start",
        240,
    )
    _until(lambda: "goes on from step" in _read(run / "logs" / "0002" / "node1-rank-0.log"), "going on", 240)
    _output(["scancel", number], cluster)
    step = int(saved.strip().removeprefix("step-"))
    assert f"goes on from step {step}" in _read(run / "logs" / "0002" / "node1-rank-0.log")
    assert step >= 3
    assert f"SIGTERM at step {step}, checkpoint saved" in _read(run / "logs" / "0001" / "node1-rank-0.log")


def _state(number: str, environment: dict[str, str]) -> str:
    return _output(["squeue", "--noheader", f"--jobs={number}", "--format=%T"], environment).strip()


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True).stdout


def _until(true: Callable[[], object], what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
