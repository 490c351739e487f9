"""The commands that start a host's processes, against the launchers' own parsers."""

import base64
import json
from pathlib import Path
from string import Template

import pytest

from vidworld.trainer.launch.hosts import Host
from vidworld.trainer.launch.start import RANK_MODULE, Group, Rendezvous, start_command

HOSTS = (Host("a", 2), Host("b", 2, "10.0.0.2"))


def group(launcher: str, hosts: tuple[Host, ...] = HOSTS, rendezvous: bool = True) -> Group:
    where = Rendezvous("10.0.0.1", 29511) if rendezvous else None
    return Group(hosts, 2, launcher, where, "python3")  # type: ignore[arg-type]


def test_torchrun_reads_what_is_meant(odd: str) -> None:
    from torch.distributed.run import parse_args

    logs = Path("/runs") / odd
    command = start_command(group("torchrun"), 1, logs)
    assert command[:3] == ["python3", "-m", "torch.distributed.run"]
    read = parse_args(command[3:])
    assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", "2", 1)
    assert (read.master_addr, read.master_port, read.max_restarts) == ("10.0.0.1", 29511, 0)
    assert read.module
    assert read.training_script == RANK_MODULE
    # torchrun fills in its own names in the arguments of every rank.
    seen = [Template(each).safe_substitute(local_rank="0") for each in read.training_script_args]
    assert seen == [str(logs), "1"]
    assert Template(str(logs)).safe_substitute(local_rank="0") != str(logs), "the name is a hard one"


def test_one_host_needs_no_port() -> None:
    from torch.distributed.run import parse_args

    read = parse_args(start_command(group("torchrun", HOSTS[:1], rendezvous=False), 0, Path("/logs"))[3:])
    assert read.standalone
    assert read.nproc_per_node == "2"


def test_deepspeed_reads_what_is_meant(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("deepspeed.launcher.launch")
    logs = Path("/runs") / odd
    command = start_command(group("deepspeed"), 1, logs)
    assert command[:3] == ["python3", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr("sys.argv", command[2:])
    read = launch.parse_args()
    assert json.loads(base64.urlsafe_b64decode(read.world_info)) == {"a": [0, 1], "b": [0, 1]}
    assert (read.node_rank, read.master_addr, read.master_port) == (1, "10.0.0.1", 29511)
    assert read.module
    assert read.no_local_rank
    assert [read.training_script, *read.training_script_args] == [RANK_MODULE, str(logs), "1"]


def test_ranks_of_hosts() -> None:
    assert group("torchrun").world_size == 4
    assert list(group("torchrun").ranks(1)) == [2, 3]
