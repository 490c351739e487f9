"""What preflight finds, one line a fault; and that it finds nothing on a host that is well."""

import json
import shutil
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import vidworld
from vidworld.config import digest
from vidworld.errors import ConfigError
from vidworld.trainer.config import read_training
from vidworld.trainer.launch.facts import Facts, Request, code_digest, gather, meet
from vidworld.trainer.launch.hosts import Host, RemoteShell
from vidworld.trainer.launch.preflight import (
    Answer,
    Wanted,
    Way,
    ask,
    clock_warnings,
    judge,
    judge_meeting,
    refuse,
    table,
)

WELL = Facts(
    hostname="a",
    python="3.11.7",
    vidworld="0.1.0",
    code="c0de",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
    cuda="12.8",
    gpus=("H100",) * 8,
    config="c0f1",
    data={"/data": "da7a"},
    same_run=True,
    free_gb=500,
    interface="eth0",
    time=1000.0,
)
WANTED = Wanted(processes=8, cpu=False, min_free_gb=5, config="c0f1", shared=True)


def answers(*facts: Facts | str) -> list[Answer]:
    return [
        Answer(Host("abc"[number]), None, each)
        if isinstance(each, str)
        else Answer(Host("abc"[number]), asdict(each), seconds=1.0)
        for number, each in enumerate(facts)
    ]


def test_hosts_that_are_well() -> None:
    assert judge(answers(WELL, WELL, WELL), WANTED) == []
    refuse([], answers(WELL))


@pytest.mark.parametrize(
    ("second", "says", "fix"),
    [
        ("no answer within 60 s", "cannot be reached (no answer within 60 s)", "--rsh"),
        (replace(WELL, code="0ld"), "vidworld's code is 0ld, that of a is c0de", "one commit"),
        (replace(WELL, config="0th"), "the config's digest is 0th, that of a is c0f1", "same config"),
        (replace(WELL, config="unreadable: no file"), "config unreadable: no file", "all hosts see it"),
        (replace(WELL, vidworld="0.0.9"), "vidworld is 0.0.9", "one version"),
        (replace(WELL, python="3.12.1"), "Python is 3.12.1, that of a is 3.11.7", "one Python"),
        (replace(WELL, cuda="12.6"), "CUDA is 12.6", "one build of torch"),
        (
            replace(WELL, versions={"torch": "2.12.0", "deepspeed": "0.19.8"}),
            "torch is 2.12.0",
            "one version",
        ),
        (replace(WELL, versions={"torch": "2.13.0"}), "deepspeed is missing", "one version"),
        (replace(WELL, gpus=("H100",) * 7), "7 GPUs, 8 wanted", "--gpus-per-node"),
        (replace(WELL, same_run=False), "sees another run directory", "all hosts share"),
        (replace(WELL, free_gb=1.2), "1.2 GB free in the run directory, 5 wanted", "--min-free-gb"),
        (replace(WELL, data={"/data": ""}), "no dataset at /data", "mount it there"),
        (replace(WELL, data={"/data": "0ther"}), "the manifest of /data is 0ther", "same dataset"),
        (replace(WELL, port_error="port 29500: Address already in use"), "port 29500", "--master-port"),
    ],
)
def test_each_fault_is_one_line_with_its_host_and_cure(second: Facts | str, says: str, fix: str) -> None:
    faults = judge(answers(WELL, second, WELL), WANTED)
    (line,) = {str(fault) for fault in faults if says in str(fault)}
    assert line.startswith("b: ")
    assert fix in line.partition(";")[2]
    assert "\n" not in line
    assert {fault.host for fault in faults} == {"b"}


def test_without_gpus() -> None:
    bare = replace(WELL, gpus=())
    assert judge(answers(bare), replace(WANTED, cpu=True)) == []
    assert "0 GPUs, 8 wanted" in str(judge(answers(bare), WANTED)[0])


def test_one_host_has_its_run_to_itself() -> None:
    assert judge(answers(replace(WELL, same_run=False)), replace(WANTED, shared=False)) == []


def test_refusal_shows_the_table_and_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(WELL, replace(WELL, code="0ld", free_gb=1), "exit code 255: no route")
    with pytest.raises(ConfigError, match=r"3 faults on 2 of 3 hosts.*nothing was started") as error:
        refuse(judge(found, WANTED), found)
    assert error.value.exit_code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split()[:3] == ["host", "python", "torch"]
    assert "8 x H100" in lines[1]
    assert [line.split(":")[1].strip() for line in lines[4:]] == ["b", "b", "c"]
    assert len({line.index("3.11.7") for line in lines[1:3]}) == 1, "columns are straight"
    assert table(found).splitlines()[3].endswith("no")


def test_meeting_faults() -> None:
    well = {"store": True, "gloo": True, "nccl": None, "error": ""}
    cases = [
        (well, None),
        ({**well, "nccl": True}, None),
        (
            {**well, "store": False, "error": "timed out"},
            "cannot reach the rendezvous 10.0.0.1:29500 (timed out)",
        ),
        ({**well, "gloo": False, "error": "no route"}, "gloo does not get through"),
        ({**well, "nccl": False}, "NCCL does not get through"),
        ({**well, "error": "NCCL: no socket interface"}, "NCCL does not get through (NCCL: no socket"),
    ]
    for content, says in cases:
        faults = judge_meeting([Answer(Host("b"), content)], "10.0.0.1", 29500)
        assert [says in str(fault) for fault in faults] == ([] if says is None else [True]), content
    (fault,) = judge_meeting([Answer(Host("b"), None, "no answer within 30 s")], "10.0.0.1", 29500)
    assert "no answer within 30 s" in str(fault)


def test_clocks_are_remarked_on_only() -> None:
    assert clock_warnings(answers(WELL, replace(WELL, time=1003.0))) == []
    (line,) = clock_warnings(answers(WELL, replace(WELL, time=400.0)))
    assert "the clock of b is -600 s off that of a" in line
    assert judge(answers(WELL, replace(WELL, time=400.0)), WANTED) == []


def test_this_host_is_well(toy_config: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret")
    request = Request(str(toy_config), str(tmp_path), "s3cret", str(token), toward="127.0.0.1", port=0)
    facts = gather(request)
    wanted = Wanted(1, True, 0.001, digest(read_training(toy_config)), True)
    assert judge([Answer(Host("a"), asdict(facts))], wanted) == []
    assert facts.config == wanted.config
    assert facts.interface == "lo"
    assert 0 < facts.port < 65536
    assert gather(replace(request, token="other")).same_run is False
    assert gather(replace(request, config="/no/such")).config.startswith("unreadable: cannot read")


def test_a_busy_port_is_found(toy_config: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        facts = gather(Request(str(toy_config), str(tmp_path), "", "", port=port))
        assert facts.port_error == f"port {port}: Address already in use"
    assert gather(Request(str(toy_config), str(tmp_path), "", "", port=port)).port == port


def test_code_digest_sees_a_change(tmp_path: Path) -> None:
    copy = tmp_path / "vidworld"
    shutil.copytree(Path(vidworld.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_digest(copy) == code_digest()
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "\n")
    assert code_digest(copy) != code_digest()
    other = tmp_path / "renamed"
    shutil.copytree(Path(vidworld.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "errors.py").rename(other / "mistakes.py")
    assert code_digest(other) != code_digest()


def test_a_host_alone_meets_itself() -> None:
    found = meet(Request("", "", "", "", toward="127.0.0.1", port=0, world_size=1, limit_s=20))
    assert found == {"store": True, "gloo": True, "nccl": None, "error": ""}


def test_a_meeting_says_how_far_it_came() -> None:
    """Nobody listens on the port of a socket that is bound and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        found = meet(Request("", "", "", "", toward="127.0.0.1", port=port, rank=1, world_size=2, limit_s=1))
    assert found["store"] is False
    assert found["error"]


def shell(tmp_path: Path, script: str) -> Way:
    """A way to hosts through a script, with the answer of no real host."""
    path = tmp_path / "rsh.py"
    path.write_text(script)
    template = (sys.executable, str(path), "{host}")
    return Way(RemoteShell(template), {}, tmp_path, sys.executable)


def test_answers_are_found_between_other_lines(tmp_path: Path) -> None:
    content = json.dumps({"hostname": "a"})
    way = shell(tmp_path, f"print('Welcome!'); print('vidworld-facts ' + {content!r}); print('bye')")
    request = Request("", "", "", "")
    assert ask(way, Host("a"), request, 30).content == {"hostname": "a"}


@pytest.mark.parametrize(
    ("script", "limit_s", "says"),
    [
        ("import sys; sys.exit('Permission denied (publickey)')", 30, "exit code 1: Permission denied"),
        ("import time; time.sleep(60)", 0.5, "no answer within"),
        ("pass", 30, "exit code 0: nothing was said"),
    ],
)
def test_a_host_that_does_not_answer(tmp_path: Path, script: str, limit_s: float, says: str) -> None:
    answer = ask(shell(tmp_path, script), Host("a"), Request("", "", "", ""), limit_s)
    assert answer.facts is None
    assert says in answer.error
    missing = Way(RemoteShell(("/no/such/rsh", "{host}")), {}, tmp_path, sys.executable)
    assert "cannot run /no/such/rsh" in ask(missing, Host("a"), Request("", "", "", ""), 5).error
