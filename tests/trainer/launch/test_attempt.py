"""Ranks that end, fail, hang or are told to stop: what becomes of the others, and with which exit code."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vidworld.errors import ConfigError
from vidworld.trainer.launch import attempt as attempt_module
from vidworld.trainer.launch.attempt import Attempt, NodeStart
from vidworld.trainer.launch.hosts import Host
from vidworld.trainer.launch.rank import Lease, read_records
from vidworld.trainer.launch.start import Group

FAKE = Path(__file__).with_name("fake_rank.py")
FOREVER = "import time; time.sleep(600)"
SAVES = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)

Make = Callable[..., Attempt]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Make:
    """An attempt of one rank a host, each of which runs a line of Python."""
    monkeypatch.setattr(attempt_module, "POLL_S", 0.05)
    monkeypatch.setattr("vidworld.trainer.launch.rank.POLL_S", 0.05)

    def build(*codes: str | list[str]) -> Attempt:
        hosts = tuple(Host("abcd"[number]) for number in range(len(codes)))
        starts = [
            NodeStart(
                number,
                [sys.executable, str(FAKE), str(tmp_path), hosts[number].name, str(number), code]
                if isinstance(code, str)
                else code,
            )
            for number, code in enumerate(codes)
        ]
        return Attempt(Group(hosts, 1, "torchrun", None, sys.executable), starts, tmp_path, say=said.append)

    return build


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_end_well(make: Make, said: list[str], tmp_path: Path) -> None:
    attempt = make("print('one')", "print('two')")
    assert attempt.wait() == 0
    assert attempt.failure is None
    assert said == []
    assert (tmp_path / "a-rank-0.log").read_text() == "one\n"
    assert (tmp_path / "b-rank-1.log").read_text() == "two\n"


def test_one_failure_ends_all_and_is_shown_first(make: Make, said: list[str], tmp_path: Path) -> None:
    attempt = make(FOREVER, "raise OSError('the disk is gone')", FOREVER)
    assert attempt.wait() == 1
    assert attempt.failure is not None
    assert attempt.failure.name == "rank 1 on b"
    (words,) = said
    assert words.startswith("vidworld: rank 1 on b failed first: exit code 1")
    assert "Traceback (most recent call last)" in words
    assert words.endswith("OSError: the disk is gone")
    ends = {record.rank: (record.exit_code, record.asked) for record in read_records(tmp_path)}
    assert ends == {0: (-9, "kill"), 1: (1, None), 2: (-9, "kill")}


@pytest.mark.parametrize("code", [2, 3, 4])
def test_ends_on_purpose_pass_through(make: Make, code: int) -> None:
    """The launchers of hosts would leave with 1."""
    assert make(*[f"raise SystemExit({code})"] * 2).wait() == code


def test_a_mistake_of_one_rank_is_the_run_s(make: Make, said: list[str]) -> None:
    """The others then miss their neighbour, and say so with another exit code."""
    late = "import time; time.sleep(1); raise RuntimeError('[gloo] Connection closed by peer')"
    attempt = make(late, "import sys; print('vidworld: error: setting x'); sys.exit(2)", late)
    assert attempt.wait() == 2
    assert "rank 1 on b failed first: exit code 2, a mistake in the input" in said[0]
    assert said[0].endswith("vidworld: error: setting x")


def test_a_signal_becomes_an_order_to_save(make: Make, tmp_path: Path) -> None:
    attempt = make(SAVES, SAVES)
    until(lambda: ready(tmp_path, 2))
    attempt.send_signal(signal.SIGTERM)
    assert attempt.wait() == 3
    assert {record.asked for record in read_records(tmp_path)} == {"save"}


def ready(folder: Path, count: int) -> bool:
    return sum("ready" in path.read_text() for path in folder.glob("*-rank-*.log")) == count


def test_a_second_signal_ends_what_does_not_listen(make: Make, tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
    attempt = make(deaf + "time.sleep(600)")
    until(lambda: ready(tmp_path, 1))
    attempt.send_signal(signal.SIGINT)
    timer = threading.Timer(2.5, attempt.send_signal, [signal.SIGINT])
    timer.start()
    assert attempt.wait() == 1
    (record,) = read_records(tmp_path)
    assert record.exit_code == -9


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_rank_is_named_with_its_signal(make: Make, said: list[str], signal_name: str) -> None:
    attempt = make(FOREVER, f"import os, signal; os.kill(os.getpid(), signal.{signal_name})")
    assert attempt.wait() == 1
    assert f"rank 1 on b failed first: killed by {signal_name}" in said[0]


def test_a_stopped_rank_does_not_outlive_the_others(make: Make, tmp_path: Path) -> None:
    stopped = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    attempt = make(stopped, "import time; time.sleep(1); raise RuntimeError('has not been heard of')")
    assert attempt.wait() == 1
    assert {record.rank: record.exit_code for record in read_records(tmp_path)} == {0: -9, 1: 1}


def test_a_host_that_starts_no_rank(make: Make, said: list[str]) -> None:
    attempt = make(FOREVER, [sys.executable, "-c", "raise SystemExit('port 29500 is in use')"])
    assert attempt.wait() == 1
    assert "host b failed first: no rank was started (exit code 1)" in said[0]
    assert "port 29500 is in use" in said[0]


def test_a_missing_program_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot start /no/such/shell"):
        make(FOREVER, ["/no/such/shell", "b"])
    (record,) = read_records(tmp_path) or [None]
    assert record is None or record.exit_code == -9


def test_processes_of_a_rank_end_with_it(make: Make, tmp_path: Path) -> None:
    """A loader's workers, say."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    assert make(child).wait() == 0
    pid = int((tmp_path / "a-rank-0.log").read_text())
    until(lambda: gone(pid))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_rank_ends_with_the_process_that_started_it(make: Make, tmp_path: Path) -> None:
    """torchrun and DeepSpeed end with a SIGKILL what does not listen to a SIGTERM."""
    attempt = make(FOREVER)
    until(lambda: read_records(tmp_path))
    (record,) = read_records(tmp_path)
    parent = int(Path(f"/proc/{record.pid}/stat").read_text().split(")")[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    attempt_module.SETTLE_S, before = 0.5, attempt_module.SETTLE_S
    try:
        assert attempt.wait() == 1
    finally:
        attempt_module.SETTLE_S = before
    assert attempt.failure is not None
    assert "went silent" in attempt.failure.how
    until(lambda: gone(record.pid))


def test_ranks_whose_launcher_is_gone_save_and_leave(tmp_path: Path) -> None:
    rank = subprocess.run([sys.executable, str(FAKE), str(tmp_path), "a", "0", SAVES, "2"], timeout=60)
    assert rank.returncode == 3
    (record,) = read_records(tmp_path)
    assert (record.exit_code, record.asked) == (3, "lease")


def test_a_lease_lapses_by_the_reader_s_clock(tmp_path: Path) -> None:
    now = [0.0]
    lease = Lease(tmp_path / "lease", limit_s=120, now=lambda: now[0])
    lease.path.write_text("1")
    for now[0], content, lapsed in [
        (100, "1", False),
        (200, "2", False),
        (310, "2", False),
        (321, "2", True),
        (322, "3", False),
        (443, "", True),
    ]:
        lease.path.write_text(content)
        assert lease.lapsed() == lapsed, now
