"""SLURM: the job that `vidworld launch` submits, and the hosts that it finds when it runs inside one."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vidworld.config import to_yaml
from vidworld.errors import ConfigError
from vidworld.files import write_atomic
from vidworld.trainer.config import Training
from vidworld.trainer.launch.hosts import Host, RemoteShell
from vidworld.trainer.launch.settings import LaunchConfig

SCRIPT = """\
#!/bin/bash
# The job of `vidworld launch CONFIG --launcher slurm`, which submits it as shown by --dry-run. By hand:
#   sbatch --nodes=2 --gpus-per-node=8 training/slurm.sbatch \\
#     vidworld launch CONFIG --launcher slurm --nodes 2 --gpus-per-node 8 --out RUN
# One task a node: the launcher on the first one reaches the others through srun.
#SBATCH --job-name=vidworld
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
# Three minutes before its time is up the run saves, and leaves with exit code 3.
#SBATCH --signal=B:TERM@180
exec "$@"
"""
STEP = "srun --overlap --nodes=1 --ntasks=1 --nodelist={host} --job-name=vidworld"


def inside(environment: Mapping[str, str]) -> bool:
    """Whether this process has an allocation."""
    return "SLURM_JOB_ID" in environment


def restarted(environment: Mapping[str, str]) -> bool:
    """Whether this job was in the queue before."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def allocation(nodes: int, environment: Mapping[str, str]) -> tuple[list[Host], RemoteShell]:
    """The hosts of this job, and srun as the way to them."""
    listed = environment.get("SLURM_JOB_NODELIST", "")
    done = _run(["scontrol", "show", "hostnames", listed])
    hosts = [Host(name) for name in done.split()]
    if len(hosts) < nodes:
        raise ConfigError("hosts of the SLURM job", got=len(hosts), expected=f"--nodes {nodes}")
    return hosts[:nodes], RemoteShell(tuple(shlex.split(STEP)))


def submit_command(
    config: LaunchConfig, processes: int, script: Path, run: Path, command: Sequence[str]
) -> list[str]:
    """The arguments of sbatch. The job gets `command` as arguments too: nothing is quoted or expanded."""
    options = [
        f"--nodes={config.nodes}",
        *([] if config.cpu else [f"--gpus-per-node={processes}"]),
        # sbatch fills in %j, and takes a backslash before nothing.
        f"--output={str(run / 'logs').replace('%', '%%')}/slurm-%j.out",
        *(["--requeue"] if config.slurm.requeue else []),
        *(["--wait"] if config.slurm.wait else []),
        *(f"--{option.lstrip('-')}" for option in config.slurm.options),
    ]
    return ["sbatch", "--parsable", *options, str(script), *command]


def write_job(script: Path, frozen: Path, training: Training) -> None:
    """Write the job's script, and the settings that it will train with."""
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(script, SCRIPT.encode())
        write_atomic(frozen, to_yaml(training).encode())
    except OSError as error:
        raise ConfigError(
            "cannot write to the run directory", where=script.parent, got=error.strerror
        ) from None


def submit(command: Sequence[str]) -> tuple[str, int]:
    """Submit a job; its number, and with --wait its exit code."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not here", fix="run this where jobs are submitted, or see it with --dry-run"
        )
    done = subprocess.run(list(command), capture_output=True, text=True)
    number = done.stdout.strip().partition(";")[0]
    if not number:
        raise ConfigError("sbatch refused the job", got=done.stderr.strip() or f"exit code {done.returncode}")
    return number, done.returncode


def requeue() -> None:
    """Put this job back into the queue."""
    _run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"cannot run {command[0]}", got=error.strerror) from None
    if done.returncode:
        raise ConfigError(f"{command[0]} {command[1]} failed", got=done.stderr.strip())
    return done.stdout
