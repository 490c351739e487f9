"""The command that starts the processes of one host, through torchrun or DeepSpeed: a list of arguments."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from vidworld.errors import ConfigError
from vidworld.trainer.launch.hosts import Host
from vidworld.trainer.launch.settings import LauncherName

RANK_MODULE = "vidworld.trainer.launch.rank"


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of all hosts find each other."""

    address: str
    port: int


@dataclass(frozen=True)
class Group:
    """The hosts of a run and the processes on each."""

    hosts: tuple[Host, ...]
    processes: int
    launcher: LauncherName
    rendezvous: Rendezvous | None
    """None for one host: torchrun then takes a free port by itself."""
    python: str

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return len(self.hosts) * self.processes

    def ranks(self, node: int) -> range:
        """Ranks of a host."""
        return range(node * self.processes, (node + 1) * self.processes)


def start_command(group: Group, node: int, logs: Path) -> list[str]:
    """The arguments that start all processes of host number `node`; `rank.Job` says what they run."""
    match group.launcher:
        case "deepspeed":
            return [*_deepspeed(group, node), RANK_MODULE, str(logs), str(node)]
        case "torchrun" | "slurm" | "kubernetes":
            # torchrun takes $$ and ${local_rank} in the arguments of a script for its own.
            return [*_torchrun(group, node), RANK_MODULE, str(logs).replace("$", "$$"), str(node)]
        case _:
            raise ConfigError("--launcher", got=group.launcher)


def _torchrun(group: Group, node: int) -> list[str]:
    common = [group.python, "-m", "torch.distributed.run", f"--nproc-per-node={group.processes}"]
    if group.rendezvous is None:
        where = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        where = [
            f"--nnodes={len(group.hosts)}",
            f"--node-rank={node}",
            f"--master-addr={group.rendezvous.address}",
            f"--master-port={group.rendezvous.port}",
        ]
    # Restarts are ours: torchrun would also restart a run that was preempted or has diverged.
    return [*common, *where, "--max-restarts=0", "-m"]


def _deepspeed(group: Group, node: int) -> list[str]:
    # DeepSpeed's launcher of one host. Its launcher of many hands pdsh a line in which ; and $() run.
    slots = {host.name: list(range(group.processes)) for host in group.hosts}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    where = group.rendezvous or Rendezvous("127.0.0.1", 29500)
    return [
        group.python,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        f"--node_rank={node}",
        f"--master_addr={where.address}",
        f"--master_port={where.port}",
        "--no_local_rank",
        "--module",
    ]
