"""Which GPU a process of many draws on."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mujoco")

from vidworld.lab import gl


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of four GPUs."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gl, "NVIDIA_GPUS", tmp_path)
    monkeypatch.delenv(gl.DEVICE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def worker(monkeypatch: pytest.MonkeyPatch, *identity: int) -> None:
    """Be a process of a pool."""
    monkeypatch.setattr(gl.multiprocessing, "current_process", lambda: SimpleNamespace(_identity=identity))


def test_workers_take_turns(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number in range(1, 7):
        worker(monkeypatch, number)
        found.append(gl.own_device())
    assert found == ["0", "1", "2", "3", "0", "1"]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [(gl.DEVICE, "3", None), ("CUDA_VISIBLE_DEVICES", "2", None), ("CUDA_VISIBLE_DEVICES", "2,3", "1")],
)
def test_what_the_user_chose_holds(
    four: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str | None
) -> None:
    worker(monkeypatch, 4)
    monkeypatch.setenv(variable, value)
    assert gl.own_device() == expected


def test_one_gpu_or_no_worker_leaves_it_to_mujoco(
    four: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert gl.own_device() is None  # not of a pool
    worker(monkeypatch, 2)
    assert gl.own_device() == "1"
    monkeypatch.setattr(gl, "NVIDIA_GPUS", tmp_path_factory.mktemp("none"))
    assert gl.own_device() is None


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_without_egl_falls_back(four: Path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    asked: list[str | None] = []

    def make(width: int, height: int) -> Any:
        asked.append(os.environ.get(gl.DEVICE))
        if asked[-1] is not None and not works:
            raise RuntimeError("no such device")
        return (width, height)

    monkeypatch.setitem(sys.modules, "mujoco.egl", SimpleNamespace(GLContext=make))
    worker(monkeypatch, 3)
    assert gl._context("egl", 64) == (64, 64)
    assert asked == (["2"] if works else ["2", None])
    assert gl.DEVICE not in os.environ
