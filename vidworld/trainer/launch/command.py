"""`vidworld launch CONFIG`: a training on many processes and hosts, started, watched and restarted."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vidworld.config import digest, parse
from vidworld.errors import ConfigError
from vidworld.files import require_local
from vidworld.trainer.config import TokenizerTraining, Training, WorldTraining, absolute
from vidworld.trainer.launch import kubernetes, slurm
from vidworld.trainer.launch.hosts import Host, choose_hosts, passed_on, processes_per_node
from vidworld.trainer.launch.run import Launch
from vidworld.trainer.launch.settings import LaunchConfig
from vidworld.trainer.run import has_begun, require_free
from vidworld.trainer.train import RunOptions, named_training


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(RunOptions):
    """Train on many processes and hosts."""

    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class LaunchTokenizer(LaunchOptions):
    """Train a tokenizer on many processes and hosts."""

    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class LaunchWorld(LaunchOptions):
    """Train a world model on many processes and hosts."""

    training: Annotated[WorldTraining, tyro.conf.arg(name="")]


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld launch`."""
    options, training, run = read_options(arguments, prog)
    launch = options.launch
    match launch.launcher:
        case "kubernetes":
            _to_kubernetes(launch, options, training, run)
            return
        case "slurm" if not slurm.inside(os.environ):
            code = _to_slurm(launch, options, training, run, arguments)
        case "slurm" | "torchrun" | "deepspeed":
            code = _here(launch, options, training, run)
            if code == 0 and not launch.dry_run:
                print(f"{run}: done")
        case _:
            raise ConfigError("--launcher", got=launch.launcher)
    if code:
        raise SystemExit(code)


def read_options(arguments: Sequence[str], prog: str) -> tuple[LaunchOptions, Training, Path]:
    """Settings of the launch and of the training, and the run directory; paths are absolute."""
    path, out, training = named_training(arguments, prog, LaunchWorld, "--nodes N ...")
    match training:
        case TokenizerTraining():
            options = parse(
                LaunchTokenizer,
                arguments,
                prog=prog,
                default=LaunchTokenizer(config=path, out=out, training=training, launch=LaunchConfig()),
            )
        case WorldTraining():
            options = parse(
                LaunchWorld,
                arguments,
                prog=prog,
                default=LaunchWorld(config=path, out=out, training=training, launch=LaunchConfig()),
            )
    run = require_local(options.out or Path("runs") / path.stem, "--out").absolute()
    return options, absolute(options.training), run


def _here(launch: LaunchConfig, options: LaunchOptions, training: Training, run: Path) -> int:
    """Start and watch from this process."""
    resume, overwrite = options.resume, options.overwrite
    if launch.launcher == "slurm":
        hosts, shell = slurm.allocation(launch.nodes, os.environ)
        if slurm.restarted(os.environ):
            overwrite = overwrite and not has_begun(run)
            resume = not overwrite
    elif launch.node_rank is not None and launch.nodes > 1:
        # The names of the others come with the rendezvous.
        hosts, shell = [Host(f"host-{node}") for node in range(launch.nodes)], None
    else:
        hosts, shell = choose_hosts(launch)
    processes = processes_per_node(launch, hosts)
    variables = passed_on(os.environ, launch.env)
    if launch.cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    require_free(run, resume=resume, overwrite=overwrite)
    work = Launch(launch, training, run, tuple(hosts), shell, processes, variables)
    if launch.dry_run:
        print(work.describe(resume=resume, overwrite=overwrite))
        return 0
    code = work.run_all(options.max_restarts, resume=resume, overwrite=overwrite)
    if code == 3 and launch.launcher == "slurm" and launch.slurm.requeue:
        slurm.requeue()
    return code


def _to_slurm(
    launch: LaunchConfig, options: LaunchOptions, training: Training, run: Path, arguments: Sequence[str]
) -> int:
    processes = _asked_processes(launch)
    require_free(run, resume=options.resume, overwrite=options.overwrite)
    # The job runs what is asked for now, though the YAML be edited before it starts.
    frozen = run / "logs" / f"submitted-{digest(training)}.yaml"
    script = run / "logs" / "job.sbatch"
    inner = [*arguments[1:], "--out", str(run), "--gpus-per-node", str(processes)]
    program = [launch.python or sys.executable, "-m", "vidworld", "launch"]
    command = slurm.submit_command(launch, processes, script, run, [*program, str(frozen), *inner])
    if launch.dry_run:
        print(shlex.join(command))
        print(f"\n# {script}\n{slurm.SCRIPT}", end="")
        return 0
    slurm.write_job(script, frozen, training)
    number, code = slurm.submit(command)
    print(f"job {number}: scontrol show job {number}; its output {run}/logs/slurm-{number}.out")
    print(f"status: vidworld watch {shlex.quote(str(run))}")
    return code


def _asked_processes(launch: LaunchConfig) -> int:
    """Processes a node, where those nodes cannot be asked yet."""
    if launch.gpus_per_node is None and not launch.cpu:
        raise ConfigError(
            "--gpus-per-node", where=f"--launcher {launch.launcher}", fix="say how many, or give --cpu"
        )
    return launch.gpus_per_node or 1


def _to_kubernetes(launch: LaunchConfig, options: LaunchOptions, training: Training, run: Path) -> None:
    processes = _asked_processes(launch)
    if options.overwrite:
        raise ConfigError("--overwrite", got="a pod that starts again", fix="choose another --out")
    flags = ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
    objects = kubernetes.manifests(launch, processes, training, run, flags)
    text = kubernetes.to_text(objects)
    if launch.dry_run:
        print(text, end="")
    else:
        kubernetes.apply(text)
