"""Starting again: what is started again, how often, and what is never."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidworld.config import to_yaml
from vidworld.errors import ConfigError
from vidworld.trainer import heartbeat
from vidworld.trainer.checkpoint import CheckpointStore, newest_step
from vidworld.trainer.supervise import CrashLoopError, StoppedError, supervise, supervise_command


class Ended:
    """A process that has ended with a code."""

    def __init__(self, code: int) -> None:
        self.code, self.signals = code, []

    def wait(self) -> int:
        return self.code

    def send_signal(self, sig: int, /) -> None:
        self.signals.append(sig)


class Script:
    """Plays attempts: each is (exit code, step of the newest checkpoint afterwards)."""

    def __init__(self, *attempts: tuple[int, int]) -> None:
        self.attempts, self.started = attempts, []
        self.lines: list[str] = []
        self.slept: list[float] = []

    def start(self, attempt: int) -> Ended:
        self.started.append(attempt)
        return Ended(self.attempts[attempt][0])

    def progress(self) -> int:
        return self.attempts[self.started[-1]][1]

    def run(self, max_restarts: int, **options: Any) -> int:
        return supervise(
            self.start, self.progress, max_restarts, say=self.lines.append, sleep=self.slept.append, **options
        )


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_what_is_final_is_not_started_again(code: int) -> None:
    script = Script((code, -1))
    assert script.run(5) == code
    assert script.started == [0]
    assert script.lines == script.slept == []


def test_a_death_is_started_again_and_told() -> None:
    script = Script((-9, -1), (1, 100), (0, 300))
    assert script.run(5) == 0
    assert script.started == [0, 1, 2]
    assert (
        "was killed by SIGKILL; starts again from the beginning in 1 s (5 restarts left)" in script.lines[0]
    )
    assert "ended with exit code 1; starts again from step 100 in 1 s (4 restarts left)" in script.lines[1]


def test_three_restarts_without_progress_are_enough() -> None:
    script = Script((1, 100), (1, 100), (-6, 100), (1, 100), (0, 100))
    with pytest.raises(CrashLoopError, match="3 restarts without progress from step 100") as error:
        script.run(100)
    assert error.value.exit_code == 1
    assert script.started == [0, 1, 2, 3], "the start and three more"
    assert script.slept == [1.0, 2.0, 5.0], "it waits longer each time"


def test_progress_forgives() -> None:
    script = Script((1, 0), (1, 0), (1, 0), (1, 50), (1, 50), (1, 50), (1, 60), (0, 99))
    assert script.run(7) == 0


def test_an_older_checkpoint_is_no_progress() -> None:
    script = Script((1, 100), (1, 90), (1, 95), (1, 100), (0, 100))
    with pytest.raises(CrashLoopError, match="without progress"):
        script.run(10)


def test_no_more_restarts_than_allowed() -> None:
    script = Script((1, 1), (1, 2), (1, 3), (0, 4))
    with pytest.raises(CrashLoopError, match="given up after 2 restarts"):
        script.run(2)
    assert script.started == [0, 1, 2]


def test_a_launcher_that_hides_the_code(tmp_path: Path) -> None:
    """torchrun says 1; the ranks said preempted."""
    path = heartbeat.path_of(tmp_path, 0)
    path.parent.mkdir()
    path.write_text(
        '{"rank":0,"world_size":1,"host":"h","pid":1,"beat":1,"step":5,"state":"preempted","idle_s":0,'
        '"exit_code":3,"time":0}'
    )
    script = Script((1, -1))
    assert script.run(5, explain=lambda code: heartbeat.exit_code(tmp_path, code)) == 3


CHILD = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path(sys.argv[1], "told").write_text(str(number))
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1], "ready").touch()
while True: time.sleep(0.05)
"""


def asked_to_stop(folder: Path, code: int) -> Callable[[int], subprocess.Popen[bytes]]:
    """Starts a child that leaves with `code` when asked; the supervisor is asked once the child is ready."""

    def start(attempt: int) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(code)])
        while not (folder / "ready").exists():
            assert child.poll() is None
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    return start


def test_a_signal_reaches_the_training_and_nothing_starts_again(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(asked_to_stop(tmp_path, 3), lambda: -1, 5) == 3
    assert (tmp_path / "told").read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    (tmp_path / "ready").unlink()
    with pytest.raises(StoppedError, match="SIGTERM, and the training ended with exit code 7"):
        supervise(asked_to_stop(tmp_path, 7), lambda: -1, 5)


def test_the_newest_step_by_name(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == -1
    for name in ("step-00000010", "step-00000030", "step-00000030-2", ".staging-step-00000040", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").touch()
    assert newest_step(tmp_path) == 30


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = CheckpointStore(run / "checkpoints").newest()
    assert saved is not None
    assert saved.step == 40
    return saved.tensors("model") | saved.tensors("optimizer-0")


@pytest.mark.slow
def test_a_killed_command_goes_on_without_a_person(planar: Path, tmp_path: Path, settings: Any) -> None:
    """`vidworld train --max-restarts`, killed twice: the weights of the run that nobody killed."""
    loop = {"steps": 40, "log_every": 2, "save_every": 4, "keep": 2}
    config = tmp_path / "tokenizer.yaml"
    config.write_text(to_yaml(settings.tokenizer(planar, loop=loop)))
    command = [sys.executable, "-m", "vidworld", "train", str(config)]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    subprocess.run([*command, "--out", str(calm)], check=True, capture_output=True)
    supervisor = subprocess.Popen(
        [*command, "--out", str(killed), "--max-restarts", "5"], stderr=subprocess.PIPE, text=True
    )
    victims: set[int] = set()
    for step in (8, 24):
        while newest_step(killed / "checkpoints") < step:
            assert supervisor.poll() is None
            time.sleep(0.01)
        beat = heartbeat.read(heartbeat.path_of(killed, 0))
        assert beat is not None
        victims.add(beat.pid)
        os.kill(beat.pid, signal.SIGKILL)
    _, said = supervisor.communicate(timeout=280)
    assert supervisor.returncode == 0, said[-3000:]
    assert len(victims) == 2
    assert said.count("was killed by SIGKILL; starts again from step") == 2
    one, other = weights(calm), weights(killed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_command_that_always_dies_is_given_up(planar: Path, tmp_path: Path, settings: Any) -> None:
    """A child that dies of a wrong import, whatever the supervisor does."""
    config = tmp_path / "tokenizer.yaml"
    config.write_text(to_yaml(settings.tokenizer(planar)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "accelerate.py").write_text("raise RuntimeError('broken package')")
    done = subprocess.run(
        [sys.executable, "-m", "vidworld", "train", str(config), "--out", str(tmp_path / "run")]
        + ["--max-restarts", "9"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'broken'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: broken package") == 4, "the start and three more"
    last = done.stderr.strip().splitlines()[-1]
    assert "given up after 3 restarts without progress from the beginning" in last


def test_restarts_under_a_launcher_and_below_zero_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--max-restarts: got -1"):
        supervise_command(["a.yaml"], tmp_path, -1)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="give it to the launcher"):
        supervise_command(["a.yaml"], tmp_path, 3)
