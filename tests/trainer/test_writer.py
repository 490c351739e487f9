"""Checkpoints in the background: what was copied is what is written, nobody waits, and failures are heard."""

import errno
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vidworld.errors import PreemptedError
from vidworld.trainer.checkpoint import CheckpointStore, SaveError, Snapshot
from vidworld.trainer.loop import Loop
from vidworld.trainer.writer import Writer

POINTS = ("staged", "optimizer", "model", "ema", "state", "manifest", "renamed", "latest", "pruned")
WAIT_S = 60


class Gate:
    """Holds the writer at a point until it is opened: a storage that is as slow as the test wants."""

    def __init__(self, point: str = "model") -> None:
        self.point, self.there, self.open = point, threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.there.set()
            assert self.open.wait(WAIT_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def after_each_step(loop: Loop, call: Callable[[int], None]) -> None:
    """Call with the number of steps done, before the loop looks at what is due."""
    plain = loop.look_and_save

    def watched() -> None:
        call(loop.clock.step)
        plain()

    loop.look_and_save = watched  # type: ignore[method-assign]


def test_steps_go_on_while_a_checkpoint_is_written(
    make_loop: Callable[..., Loop], gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = make_loop(steps=9, save_every=2, keep=9)
    loop.saving.writer.reached = gate
    at_two: dict[str, Any] = {}
    names_at_six: list[str] = []

    def watch(step: int) -> None:
        if step == 2:
            at_two.update({k: v.clone() for k, v in loop.task.net.state_dict().items()})
        if step == 3:
            assert gate.there.wait(WAIT_S), "it is being written"
        if step == 6:
            names_at_six.extend(loop.store.names())
            gate.open.set()
            # Only so that the next step finds it done, on however slow a machine.
            loop.saving.writer._thread.join(WAIT_S)  # type: ignore[union-attr]

    after_each_step(loop, watch)
    loop.fit()
    assert names_at_six == [], "four steps were done while the first checkpoint stood at its gate"
    # Due at 4 while one was being written, taken at 7, when all ranks knew that it was done.
    assert loop.store.names()[0] == "step-00000009"
    assert loop.store.names()[-2:] == ["step-00000007", "step-00000002"]
    assert "step 7: the checkpoint due at step 4 waited" in capsys.readouterr().out
    saved = {name: loop.store.directory / name for name in loop.store.names()}
    from safetensors.torch import load_file

    written = load_file(saved["step-00000002"] / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in at_two.items())
    now = loop.task.net.state_dict()
    assert not any(torch.equal(written[name], now[name]) for name in written), "weights have moved on since"


def test_background_or_not_trains_the_same(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    runs = []
    for in_background in (True, False):
        loop = make_loop(tmp_path / str(in_background), save_every=3, save_in_background=in_background)
        loop.fit()
        saved = loop.store.newest()
        assert saved is not None
        runs.append({kind: saved.tensors(kind) for kind in ("model", "ema", "optimizer-0")})
    for kind, tensors in runs[0].items():
        assert all(torch.equal(tensors[name], runs[1][kind][name]) for name in tensors)


def full_disk(at: str) -> Callable[[str], None]:
    def reached(point: str) -> None:
        if point == at:
            raise OSError(errno.ENOSPC, "No space left on device")

    return reached


def test_a_full_disk_is_raised_by_the_next_step(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(steps=50, save_every=2)
    fail_from = 4

    def reached(point: str) -> None:
        if loop.saving.writer.submitted > 1:
            full_disk("ema")(point)

    loop.saving.writer.reached = reached

    def watch(step: int) -> None:
        if step == fail_from + 1:
            loop.saving.writer._thread.join(WAIT_S)  # type: ignore[union-attr]

    after_each_step(loop, watch)
    with pytest.raises(SaveError, match=r"step \d+ .*No space left on device.*go on with --resume") as error:
        loop.fit()
    assert error.value.exit_code == 1
    # Written at 2 or, on a slow machine, the first step at which nobody wrote.
    assert len(loop.store.names()) == 1
    assert not list(loop.store.directory.glob(".staging*"))
    again = make_loop(steps=50, save_every=10)
    assert again.clock.step == loop.store.newest().step  # type: ignore[union-attr]


def test_any_error_of_the_thread_is_heard(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(steps=4, save_every=2, save_in_background=False)

    def broken(point: str) -> None:
        raise MemoryError("of the writer")

    loop.saving.writer.reached = broken
    with pytest.raises(SaveError, match="step 2 could not be written: of the writer"):
        loop.fit()


def test_asked_to_stop_while_one_is_written(make_loop: Callable[..., Loop], gate: Gate) -> None:
    """Both are whole before the process leaves with exit code 3."""
    loop = make_loop(steps=9, save_every=2, keep=9)
    loop.saving.writer.reached = gate

    def watch(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 4:
            gate.open.set()

    after_each_step(loop, watch)
    with pytest.raises(PreemptedError):
        loop.fit()
    steps = [int(name.split("-")[1]) for name in loop.store.names()]
    assert steps[-1] == 2
    assert steps[0] == loop.clock.step
    assert loop.store.newest() is not None


def snapshot(step: int) -> Snapshot:
    weight = torch.full((40, 30), float(step))
    return Snapshot(step, {"w": weight}, {"w": weight}, {"m": weight[0]}, {}, {"note": step})


def killed_saves(directory: Path, runs: int) -> int:
    """Kill a process at each labelled point in turn while its thread writes; the number of runs.

    After each the newest checkpoint is whole, and is the one before or the one that was being written.
    """
    store = CheckpointStore(directory, keep=2)
    store.save(snapshot(1))
    good = 1
    for run in range(runs):
        point, step = POINTS[run % len(POINTS)], good + 1
        child = os.fork()
        if child == 0:
            writer = Writer(
                CheckpointStore(directory, keep=2),
                torch.device("cpu"),
                reached=lambda now, point=point: (
                    os.kill(os.getpid(), signal.SIGKILL) if now == point else None
                ),
            )
            writer.submit(snapshot(step))
            writer.wait()
            os._exit(7)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = store.newest()
        assert saved is not None
        arrived = POINTS.index(point) >= POINTS.index("renamed")
        assert saved.step == (step if arrived else good), point
        assert torch.equal(saved.tensors("model")["w"], torch.full((40, 30), float(saved.step)))
        assert saved.state["note"] == saved.step
        good = saved.step
    return runs


def test_killed_at_every_point_of_a_background_save(tmp_path: Path) -> None:
    killed_saves(tmp_path, len(POINTS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_point_two_hundred_times(tmp_path: Path) -> None:
    assert killed_saves(tmp_path, 23 * len(POINTS)) >= 200


def test_the_log_says_what_saving_cost(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(steps=4, save_every=2, log_every=2)
    loop.fit()
    rows = [json.loads(line) for line in loop.log.path.read_text().splitlines()]
    assert all(0 <= row["save_share"] <= 1 for row in rows)


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_the_moment(tmp_path: Path) -> None:
    """The training changes the weights at once, after the fence; the file holds what they were."""
    device = torch.device("cuda")
    weights = {name: torch.full((4096, 4096), float(n), device=device) for n, name in enumerate("abcd")}
    writer = Writer(CheckpointStore(tmp_path), device)
    for step in (1, 2):  # the second save uses the buffers of the first again
        before = {name: tensor.clone() for name, tensor in weights.items()}
        writer.submit(Snapshot(step, weights, weights, weights, {}, {}))
        writer.fence()
        for tensor in weights.values():
            tensor.add_(10.0)
        writer.wait()
        saved = writer.store.newest()
        assert saved is not None
        for kind in ("model", "ema", "optimizer-0"):
            found = saved.tensors(kind)
            assert all(torch.equal(found[name], before[name].cpu()) for name in before)
            assert not any(torch.equal(found[name], weights[name].cpu()) for name in before)
