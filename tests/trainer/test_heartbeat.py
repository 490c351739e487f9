"""Signs of life: who is alive, who is silent, who hangs, and what a rank says when it gives up."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidworld.errors import ConfigError, DivergedError, PreemptedError
from vidworld.trainer import heartbeat
from vidworld.trainer.heartbeat import BYTES, Heartbeat, Silence, read_all


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_file_says_what_a_rank_does(tmp_path: Path) -> None:
    clock = Clock()
    with Heartbeat(tmp_path, rank=1, world_size=2, now=clock) as heart:
        heart.mark("training", 7)
        clock.now_s += 2.5
        heart.beat()
        (beat,) = heartbeat.read_all(tmp_path)
        assert (beat.rank, beat.world_size, beat.step, beat.state) == (1, 2, 7, "training")
        assert (beat.pid, beat.idle_s, beat.exit_code) == (os.getpid(), 2.5, None)
        first = beat.beat
        heart.beat()
        (beat,) = heartbeat.read_all(tmp_path)
        assert beat.beat == first + 1
    (beat,) = heartbeat.read_all(tmp_path)
    assert (beat.state, beat.exit_code) == ("done", 0)
    content = heartbeat.path_of(tmp_path, 1).read_bytes()
    assert len(content) == BYTES, "always as long: a full disk cannot stop it"
    assert set(json.loads(content)) == {
        *("rank", "world_size", "host", "pid", "beat", "step", "state", "idle_s", "exit_code", "time")
    }


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (PreemptedError("SIGTERM"), "preempted", 3),
        (DivergedError("NaN"), "diverged", 4),
        (ConfigError("x"), "refused", 2),
        (RuntimeError("x"), "failed", 1),
    ],
)
def test_the_last_word_is_how_it_ended(tmp_path: Path, error: Exception, state: str, code: int) -> None:
    with pytest.raises(type(error)), Heartbeat(tmp_path):
        raise error
    (beat,) = heartbeat.read_all(tmp_path)
    assert (beat.state, beat.exit_code) == (state, code)
    # torchrun leaves with 1, whatever its workers left with.
    assert heartbeat.exit_code(tmp_path, 1) == code
    heartbeat.clear(tmp_path)
    assert heartbeat.exit_code(tmp_path, 1) == 1
    assert heartbeat.exit_code(tmp_path, 0) == 0


def test_a_rank_that_stops_beating_is_silent(tmp_path: Path) -> None:
    clock = Clock()
    one = Heartbeat(tmp_path, rank=1, world_size=2, now=clock)
    with one:
        watcher = Heartbeat(tmp_path, rank=0, world_size=2, silent_s=60, now=clock)
        assert watcher.trouble() is None
        clock.now_s += 500
        assert watcher.trouble() is None, "a file that never changed may be of an earlier start"
        one.mark("training", 12)
        for _ in range(5):
            one.beat()
            clock.now_s += 50
            assert watcher.trouble() is None
        clock.now_s += 61
        trouble = watcher.trouble()
        assert trouble is not None
        assert f"rank 1 ({heartbeat.socket.gethostname()}, process {os.getpid()})" in trouble
        assert "61 s" in trouble
        assert "step 12 (training)" in trouble
        one.beat()
        assert watcher.trouble() is None, "it came back"
    clock.now_s += 1
    assert watcher.trouble() is None
    clock.now_s += 500
    assert watcher.trouble() is None, "it left on purpose"


def test_wall_clocks_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    silence = Silence(tmp_path, [0], 60)
    with Heartbeat(tmp_path, now=clock) as heart:
        for skew_s in (0, 1e6, -1e9, 3600, -3600):
            monkeypatch.setattr(time, "time", lambda skew_s=skew_s: 1.7e9 + skew_s)
            heart.beat()
            clock.now_s += 40
            assert silence.look(clock.now_s) == []
        assert heart.trouble() is None
        clock.now_s += 61
        assert len(silence.look(clock.now_s)) == 1, "and a true silence is heard"


def test_a_step_that_takes_too_long(tmp_path: Path) -> None:
    clock = Clock()
    heart = Heartbeat(tmp_path, hang_s=100, now=clock)
    clock.now_s += 10_000
    assert heart.trouble() is None, "encoding a dataset takes what it takes"
    heart.mark("training", 40)
    clock.now_s += 399
    assert heart.trouble() is None, "the first step compiles"
    clock.now_s += 2
    assert "rank 0 hangs: 401 s in step 40 (training)" in str(heart.trouble())
    heart.mark("training", 41)
    clock.now_s += 99
    assert heart.trouble() is None
    clock.now_s += 2
    assert heart.trouble() is not None
    heart.mark("looking", 41)
    clock.now_s += 399
    assert heart.trouble() is None
    assert Heartbeat(tmp_path, hang_s=0, now=clock).trouble() is None


def test_a_machine_that_stood_still_makes_nobody_silent(tmp_path: Path) -> None:
    clock = Clock()
    heart = Heartbeat(tmp_path, world_size=2, hang_s=100, silent_s=60, now=clock)
    with Heartbeat(tmp_path, rank=1, world_size=2, now=clock) as other:
        heart.mark("training", 5)
        heart.mark("training", 6)
        assert heart.trouble() is None
        other.beat()
        assert heart.trouble() is None
        clock.now_s += 500
        heart.overslept(500 - heart.interval_s)
        assert heart.trouble() is None, "neither the neighbour's silence nor our own idleness"
        clock.now_s += 61
        assert "rank 1" in str(heart.trouble()), "and a true silence is heard"


def test_a_torn_file_is_no_news(tmp_path: Path) -> None:
    clock = Clock()
    silence = Silence(tmp_path, [0], 60)
    with Heartbeat(tmp_path) as heart:
        silence.look(clock.now_s)
        heart.beat()
        silence.look(clock.now_s)
        path = heartbeat.path_of(tmp_path, 0)
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        assert heartbeat.read_all(tmp_path) == []
        assert silence.look(clock.now_s + 59) == []
        ((beat, _),) = silence.look(clock.now_s + 61)
        assert beat.rank == 0


def test_ranks_of_a_larger_start_are_forgotten(tmp_path: Path) -> None:
    for rank in range(4):
        with Heartbeat(tmp_path, rank=rank, world_size=4):
            pass
    with Heartbeat(tmp_path, rank=0, world_size=2):
        assert [beat.rank for beat in heartbeat.read_all(tmp_path)] == [0, 1]


def test_a_full_disk_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Heartbeat(tmp_path) as heart:
        monkeypatch.setattr(os, "pwrite", full)
        heart.beat()
    assert "no heartbeat" in capsys.readouterr().err


HANGS = """
import sys, threading, time
from pathlib import Path
from vidworld.trainer.heartbeat import Heartbeat
def stuck_here():
    threading.Event().wait()
with Heartbeat(Path(sys.argv[1]), hang_s=0.01, silent_s=0.8) as heart:
    heart.mark("training", 3)
    stuck_here()
"""


def test_a_hang_ends_the_process_and_says_where(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "rank 0 hangs" in done.stderr
    assert "stuck_here" in done.stderr
    stacks = (tmp_path / "heartbeats" / "stacks-0.txt").read_text()
    assert stacks.startswith("rank 0 hangs")
    assert "stuck_here" in stacks
    (beat,) = heartbeat.read_all(tmp_path)
    assert (beat.state, beat.step, beat.exit_code) == ("hung", 3, 1)


ORPHAN = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank = '''
import signal, sys, time
from pathlib import Path
from vidworld.trainer.heartbeat import Heartbeat
run = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: ((run / "told").touch(), sys.exit(3)))
with Heartbeat(run, silent_s=0.8):
    (run / "ready").touch()
    time.sleep(20)
'''
subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]])
while not (Path(sys.argv[1]) / "ready").exists():
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_rank_whose_torchrun_was_killed_is_told_to_stop(tmp_path: Path, by_torchrun: bool) -> None:
    """As by a scheduler's signal, so that it saves; the child of a shell that has ended goes on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment |= {"TORCHELASTIC_RUN_ID": "none"} if by_torchrun else {}
    dead = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path)], env=environment, check=False)
    assert dead.returncode == -signal.SIGKILL
    orphan = read_all(tmp_path)[0]
    try:
        deadline = time.monotonic() + (15 if by_torchrun else 1.5)
        while not (tmp_path / "told").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "told").exists() == by_torchrun
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan.pid, signal.SIGKILL)
