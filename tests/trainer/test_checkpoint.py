"""A save may die anywhere, a bit may flip anywhere: the last good checkpoint is found, or the fault named."""

import itertools
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from vidworld.errors import CheckpointError
from vidworld.trainer.checkpoint import CheckpointStore, SaveError, Snapshot, load_weights, verify

POINTS = ("staged", "optimizer", "model", "ema", "state", "manifest", "renamed", "latest", "pruned")


def snapshot(step: int) -> Snapshot:
    """Weights that tell their step."""
    tensors = {"weight": torch.full((40, 30), float(step)), "bias": torch.arange(3.0) + step}
    return Snapshot(
        step, tensors, tensors, {"moment": tensors["bias"]}, {"groups": []}, {"note": f"at {step}"}
    )


def die_at(point: str) -> Callable[[str], None]:
    """A hook that kills this very process at `point`."""

    def reached(now: str) -> None:
        if now == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def killed_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def newest_step(directory: Path) -> int:
    """The newest whole checkpoint, loaded and checked for content."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = CheckpointStore(directory).newest()
    assert saved is not None
    assert torch.equal(saved.tensors("model")["weight"], torch.full((40, 30), float(saved.step)))
    assert saved.state["note"] == f"at {saved.step}"
    return saved.step


def damage(path: Path, offset: int | None = None) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 4
    path.write_bytes(content)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.newest() is None
    directory = store.save(snapshot(5))
    saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.directory.name) == (5, "step-00000005")
    assert directory == saved.directory
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    assert sorted(path.name for path in directory.iterdir()) == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer-0.safetensors",
        "state.json",
    ]
    for name in ("model", "ema"):
        assert {k: v.tolist() for k, v in saved.tensors(name).items()} == {
            k: v.tolist() for k, v in snapshot(5).model.items()
        }
    with safe_open(directory / "optimizer-0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["groups"]) == {"groups": []}


def test_views_into_one_buffer_are_saved(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    views = {"a": flat[:6].view(2, 3), "b": flat[6:], "c": torch.arange(6.0).view(2, 3).T}
    CheckpointStore(tmp_path).save(Snapshot(1, views, {}, {}, {}, {}))
    saved = CheckpointStore(tmp_path).newest()
    assert saved is not None
    assert all(torch.equal(saved.tensors("model")[name], view) for name, view in views.items())


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(tmp_path: Path, point: str) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(snapshot(1))
    assert killed_child(lambda: store.save(snapshot(2), reached=die_at(point))) == signal.SIGKILL
    survived = POINTS.index(point) >= POINTS.index("renamed")
    assert newest_step(tmp_path) == (2 if survived else 1)
    store.save(snapshot(3))
    assert newest_step(tmp_path) == 3
    assert (tmp_path / "latest").read_text().strip() == "step-00000003"
    assert not list(tmp_path.glob(".staging*")), "leftovers are swept by the next save"


def kill_at_random_times(directory: Path, runs: int) -> None:
    """Save in a child without pause, kill it at a random moment, and look: no good step is ever lost.

    The moment is some time after a random number of labelled points, so that a busy machine changes nothing.
    """
    store = CheckpointStore(directory, keep=2)
    rng = random.Random(0)
    store.save(snapshot(1))
    good = 1
    for _ in range(runs):
        points, reading, writing = rng.randrange(1, 5 * len(POINTS)), *os.pipe()

        def save_on(start: int = good, writing: int = writing) -> None:
            for step in itertools.count(start + 1):
                store.save(snapshot(step), reached=lambda _: os.write(writing, b"."))

        child = os.fork()
        if child == 0:
            try:
                save_on()
            finally:
                os._exit(1)
        for _ in range(points):
            assert os.read(reading, 1) == b"."
        time.sleep(rng.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(reading)
        os.close(writing)
        now = newest_step(directory)
        assert now >= good + points // len(POINTS), "what was saved is there"
        good = now


def test_killed_at_random_times(tmp_path: Path) -> None:
    kill_at_random_times(tmp_path, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_times_two_hundred(tmp_path: Path) -> None:
    kill_at_random_times(tmp_path, 200)


def test_a_naive_save_would_fail_these_tests(tmp_path: Path) -> None:
    """The negative control: writing in place under the final name leaves a torn newest checkpoint."""

    def naive(step: int, reached: Callable[[str], None]) -> None:
        source = CheckpointStore(tmp_path / "source").save(snapshot(step))
        final = tmp_path / f"step-{step:08d}"
        final.mkdir()
        for path in sorted(source.iterdir()):
            shutil.copy(path, final)
            reached(path.name)

    naive(1, lambda point: None)
    assert killed_child(lambda: naive(2, die_at("model.safetensors"))) == signal.SIGKILL
    with pytest.raises(CheckpointError, match="missing"):
        verify(tmp_path / "step-00000002")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"]
)
def test_a_flipped_bit_in_the_newest(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))
    damage(store.save(snapshot(2)) / name)
    with pytest.warns(UserWarning, match="step-00000002") as caught:
        saved = store.newest()
    assert saved is not None
    assert saved.step == 1
    messages = [str(warning.message) for warning in caught]
    assert any("step-00000002 is damaged" in message and name in message for message in messages)
    assert any("latest names step-00000002" in message for message in messages)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path).save(snapshot(1))
    whole = (directory / "manifest.json").read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        (directory / "manifest.json").write_bytes(whole)
        offset = rng.randrange(len(whole))
        damage(directory / "manifest.json", offset)
        try:
            verify(directory)
        except CheckpointError:
            continue
        changed = whole[max(0, offset - 12) : offset + 1]
        assert b"version" in changed or whole[offset : offset + 1].isspace(), changed


def test_a_missing_rank_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))
    (store.save(snapshot(2)) / "optimizer-0.safetensors").unlink()
    with pytest.warns(UserWarning, match="missing"):
        saved = store.newest()
    assert saved is not None
    assert saved.step == 1
    with pytest.raises(CheckpointError, match=r"no optimizer-3\.safetensors"):
        saved.tensors("optimizer-3")


def test_a_dangling_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.warns(UserWarning, match="latest names step-00000009"):
        saved = store.newest()
    assert saved is not None
    assert saved.step == 1


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    damage(store.save(snapshot(1)) / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="none is whole"),
    ):
        store.newest()


def test_retention_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(snapshot(step))
    assert store.names() == ["step-00000003", "step-00000002"]
    for name in store.names():
        damage(tmp_path / name / "ema.safetensors")
    with pytest.warns(UserWarning, match="damaged"):
        store.save(snapshot(4))
    assert store.names() == ["step-00000004", "step-00000003", "step-00000002"]
    store.save(snapshot(5))
    assert store.names() == ["step-00000005", "step-00000004"], "damaged ones go when two whole are newer"


def test_saving_a_step_again_removes_nothing_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(snapshot(7))
    assert store.save(snapshot(7)).name == "step-00000007-2"
    assert newest_step(tmp_path) == 7
    assert (tmp_path / "latest").read_text().strip() == "step-00000007-2"
    assert store.save(snapshot(8)).name == store.names()[0] == "step-00000008"


def test_weights_of_another_architecture_load_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    with pytest.raises(CheckpointError) as error:
        load_weights(module, other.state_dict(), where="here")
    for part in ("here", "+2.weight", "0.weight [5, 3] is [4, 3] here"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match=r"-1\.bias"):
        load_weights(module, {k: v for k, v in before.items() if k != "1.bias"}, where="here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_full_disk_keeps_the_last_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(snapshot(1))

    def full(point: str) -> None:
        if point == "model":
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"step 2 .*No space left on device.*make room") as error:
        store.save(snapshot(2), reached=full)
    assert error.value.exit_code == 1
    assert newest_step(tmp_path) == 1
    assert not list(tmp_path.glob(".staging*")), "what was half written gives its room back"
