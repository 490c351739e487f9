"""What `vidworld launch` can be told, defaults included."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vidworld.errors import ConfigError

LauncherName = Literal["torchrun", "deepspeed", "slurm", "kubernetes"]


@dataclass(frozen=True)
class SlurmConfig:
    """What the job is submitted with."""

    options: tuple[str, ...] = ()
    """Options of sbatch without their dashes, such as partition=gpu time=24:00:00."""
    wait: bool = False
    """Stay until the job has ended, and leave with its exit code."""
    requeue: bool = False
    """Put the job back in the queue when it was preempted or its time is up, to go on from its checkpoint."""


@dataclass(frozen=True)
class KubernetesConfig:
    """What the manifest says."""

    manifest: Literal["trainjob", "job"] = "trainjob"
    """`trainjob` for Kubeflow Trainer, or `job`: a plain indexed Job with a headless Service."""
    image: str | None = None
    """Container image in which vidworld is installed."""
    name: str | None = None
    """Name of the job; by default that of the run."""
    namespace: str = "default"
    runtime: str = "torch-distributed"
    """Kubeflow ClusterTrainingRuntime."""
    volumes: tuple[str, ...] = ()
    """Volume claims and where they go: CLAIM:/MOUNT. The config, the data and the run must lie in them."""
    shm_gib: int = 16
    """Shared memory for loader workers, in GiB."""


@dataclass(frozen=True)
class LaunchConfig:
    """Where the processes of a run are, and how they are started."""

    launcher: LauncherName = "torchrun"
    """`torchrun` or `deepspeed` start the processes of a host; `slurm` and `kubernetes` give the hosts."""
    nodes: int = 1
    """Number of hosts."""
    gpus_per_node: int | None = None
    """Processes on each host, one a GPU; by default the hosts file's slots, or the GPUs that are here."""
    cpu: bool = False
    """Train without GPUs, with as many processes a host as gpus_per_node says."""
    dry_run: bool = False
    """Print what would be run, and run nothing."""
    hostfile: Path | None = None
    """Lines of `HOST slots=N [addr=ADDRESS]`, as DeepSpeed reads them."""
    hosts: tuple[str, ...] = ()
    """Hosts by name, in place of a hosts file."""
    rsh: str | None = None
    """How a host is reached: a command line with {host} in it; by default ssh. Programs other than ssh, rsh,
    pdsh and clush get the command as separate arguments: `ip netns exec {host}`, `docker exec {host}`."""
    master_addr: str | None = None
    """Address of the first host as the others see it; by default its name."""
    master_port: int = 0
    """Port of the rendezvous on the first host; 0 takes a free one."""
    interface: str | None = None
    """Network interface for gloo and NCCL; by default the one with the route to the first host."""
    node_rank: int | None = None
    """Number of this host, when every host runs this command by itself."""
    python: str | None = None
    """Python on the hosts; by default this one's path."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for every process, beside what is passed on anyway."""
    min_free_gb: float = 5.0
    """Free space that the run directory must have, in GB."""
    preflight_s: float = 60.0
    """Seconds that a host may take to answer."""
    join_s: float = 900.0
    """Seconds that hosts which start by themselves wait for each other."""
    status_s: float = 10.0
    """Seconds between two lines of status."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("preflight_s", 1), ("status_s", 0.1), ("min_free_gb", 0)):
            if getattr(self, name) < least:
                raise ConfigError(_flag(name), got=getattr(self, name), expected=f"at least {least}")
        if self.gpus_per_node is not None and self.gpus_per_node < 1:
            raise ConfigError(
                _flag("gpus_per_node"),
                got=self.gpus_per_node,
                expected="at least 1",
                fix="without GPUs, give --cpu and the number of processes",
            )
        if not 0 <= self.master_port <= 65535:
            raise ConfigError(_flag("master_port"), got=self.master_port, expected="0 to 65535")
        if self.hostfile is not None and self.hosts:
            raise ConfigError("--hostfile and --hosts", fix="give one of them")
        for pair in self.env:
            if not pair.partition("=")[0].isidentifier() or "=" not in pair:
                raise ConfigError("--env", got=pair, expected="NAME=VALUE")
        if self.node_rank is not None:
            if not 0 <= self.node_rank < self.nodes:
                raise ConfigError(_flag("node_rank"), got=self.node_rank, expected=f"0 to {self.nodes - 1}")
            if self.nodes > 1 and (self.master_addr is None or not self.master_port):
                raise ConfigError(
                    "--node-rank",
                    got="no rendezvous",
                    fix="give every host the same --master-addr and --master-port",
                )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
