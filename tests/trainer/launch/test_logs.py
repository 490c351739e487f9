"""Folders of attempts, and two launches into one run."""

import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.errors import ConfigError
from vidworld.trainer.config import read_training
from vidworld.trainer.launch.logs import AttemptFolder, only_launch
from vidworld.trainer.run import require_free


def test_attempts_are_numbered(tmp_path: Path, toy_config: Path) -> None:
    training = read_training(toy_config)
    first, second = (AttemptFolder.create(tmp_path / "run", training) for _ in range(2))
    assert (first.path.name, second.path.name) == ("0001", "0002")
    assert read_training(first.config) == training
    assert first.token_path.read_text() == first.token != second.token
    second.remove()
    assert AttemptFolder.create(tmp_path / "run", training).path.name == "0002"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the run directory"):
        AttemptFolder.create(tmp_path / "file", training)


def test_two_launches_into_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    hold = (
        "import sys; from pathlib import Path; from vidworld.trainer.launch.logs import only_launch\n"
        "with only_launch(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f'another launch is at work.*"process": {holder.pid}'),
            only_launch(run),
        ):
            pytest.fail("held twice")
        holder.kill()
    with only_launch(run):
        pass
    assert run.is_dir()


def test_a_launch_that_never_started_leaves_nothing(tmp_path: Path, toy_config: Path) -> None:
    with only_launch(tmp_path / "new"):
        AttemptFolder.create(tmp_path / "new", read_training(toy_config)).remove()
    assert list(tmp_path.iterdir()) == []
    with only_launch(tmp_path / "new"):
        AttemptFolder.create(tmp_path / "new", read_training(toy_config))
    assert (tmp_path / "new" / "logs" / "0001").is_dir()


def test_a_run_that_is_here_is_not_touched_unasked(tmp_path: Path) -> None:
    require_free(tmp_path, resume=False, overwrite=False)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="--resume to go on, --overwrite"):
        require_free(tmp_path, resume=False, overwrite=False)
    require_free(tmp_path, resume=True, overwrite=False)
    with pytest.raises(ConfigError, match="one of them"):
        require_free(tmp_path, resume=True, overwrite=True)
