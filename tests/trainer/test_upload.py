"""Checkpoints behind a URL: whole or not there, pruned, fetched, checked; and a storage that fails."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from vidworld.data import remote
from vidworld.errors import DataError
from vidworld.trainer.checkpoint import CheckpointStore, Snapshot, verify
from vidworld.trainer.loop import Loop
from vidworld.trainer.upload import Uploader, as_url, fetch_newest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAYS_S", (0.0,))


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://runs/cr5"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/runs/cr5"
    server.stop()


def snapshot(step: int) -> Snapshot:
    weight = torch.full((40, 30), float(step))
    return Snapshot(step, {"w": weight}, {"w": weight}, {"m": weight[0]}, {}, {"note": step})


def there(url: str) -> set[str]:
    """Names of the complete checkpoints of a storage."""
    return {path.split("/")[0] for path in remote.sizes(url) or {} if path.endswith("manifest.json")}


def steps_of(directory: Path) -> list[int]:
    return [int(name.split("-")[1]) for name in CheckpointStore(directory).names()]


@pytest.mark.parametrize("kind", ["memory", "folder", "s3"])
def test_there_and_back(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "away") if kind == "folder" else request.getfixturevalue(kind)
    store = CheckpointStore(tmp_path / "here", keep=9)
    uploader = Uploader(url, keep=2)
    for step in (1, 2, 3):
        uploader.offer(store.save(snapshot(step)))
        uploader.finish()
    assert there(as_url(url)) == {"step-00000003", "step-00000002"}
    assert remote.read(f"{as_url(url)}/latest") == b"step-00000003\n"

    fetch_newest(url, tmp_path / "other")
    saved = CheckpointStore(tmp_path / "other").newest()
    assert saved is not None
    assert saved.step == saved.state["note"] == 3
    for path in (tmp_path / "here" / "step-00000003").iterdir():
        assert (saved.directory / path.name).read_bytes() == path.read_bytes()
    store.save(snapshot(4))
    fetch_newest(url, tmp_path / "here")
    assert steps_of(tmp_path / "here")[0] == 4, "what is here is newer"


def test_a_damaged_one_is_passed_over(tmp_path: Path, memory: str) -> None:
    store = CheckpointStore(tmp_path / "here", keep=9)
    uploader = Uploader(memory, keep=9)
    for step in (1, 2, 3, 4):
        uploader.copy(store.save(snapshot(step)))
    content = bytearray(remote.read(f"{memory}/step-00000004/ema.safetensors"))
    content[-1] ^= 1
    remote.write(f"{memory}/step-00000004/ema.safetensors", bytes(content))
    remote.remove(f"{memory}/step-00000003/manifest.json")
    with pytest.warns(UserWarning, match=r"step-00000004 .*is damaged.*ema\.safetensors"):
        fetch_newest(memory, tmp_path / "other")
    assert steps_of(tmp_path / "other") == [2], "3 was never complete there"
    verify(tmp_path / "other" / "step-00000002")
    assert sorted((path.name for path in (tmp_path / "other").iterdir()), reverse=True) == [
        "step-00000002",
        "latest",
    ], "nothing half fetched"


def test_a_manifest_names_no_file_elsewhere(tmp_path: Path, memory: str) -> None:
    files = {"../../outside": {"bytes": 1, "sha256": "0"}}
    remote.write(f"{memory}/step-00000001/manifest.json", json.dumps({"files": files}).encode())
    remote.write(f"{memory}/outside", b"x")
    with pytest.warns(UserWarning, match="file name in a manifest"):
        fetch_newest(memory, tmp_path / "other")
    assert steps_of(tmp_path / "other") == []


def test_nothing_there_is_a_fresh_start(tmp_path: Path, memory: str) -> None:
    fetch_newest(memory, tmp_path / "other")
    assert steps_of(tmp_path / "other") == []


def test_a_slow_storage_gets_the_newest_only(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    plain, uploaded = Uploader.copy, []

    def slow(self: Uploader, directory: Path) -> None:
        started.set()
        assert go_on.wait(60)
        plain(self, directory)
        uploaded.append(directory.name)

    monkeypatch.setattr(Uploader, "copy", slow)
    store = CheckpointStore(tmp_path / "here", keep=9)
    uploader = Uploader(memory)
    uploader.offer(store.save(snapshot(1)))
    assert started.wait(60)
    for step in (2, 3, 4):
        uploader.offer(store.save(snapshot(step)))
    go_on.set()
    uploader.finish()
    assert uploaded == ["step-00000001", "step-00000004"]


def test_a_storage_that_is_down_is_a_warning(
    make_loop: Callable[..., Loop], tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = remote.upload, []

    def down(source: Path, url: str) -> None:
        calls.append(url)
        if "step-00000002" in url:
            raise DataError("cannot write to the storage", where=url)
        plain(source, url)

    monkeypatch.setattr(remote, "upload", down)
    loop = make_loop(steps=6, save_every=2, save_in_background=False, upload=memory)
    # Each upload is done before the next save, so that the test knows what comes.
    plain_save = loop.saving.save

    def save(*arguments: Any) -> None:
        plain_save(*arguments)
        loop.saving.finish()

    loop.saving.save = save  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="step-00000002 was not uploaded: cannot write to the storage"):
        loop.fit()
    assert there(memory) == {"step-00000004", "step-00000006"}
    assert loop.clock.step == 6


def test_a_run_goes_on_from_a_url_bit_by_bit(
    make_loop: Callable[..., Loop], tmp_path: Path, memory: str
) -> None:
    whole = make_loop(tmp_path / "whole")
    whole.fit()
    first = make_loop(tmp_path / "first", steps=10, save_every=5, upload=memory)
    plain = first.step

    def dies(micro_batches: Any) -> None:
        if first.clock.step == 7:
            first.saving.finish()
            raise ZeroDivisionError("the machine is gone")
        plain(micro_batches)

    first.step = dies  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        first.fit()
    fetch_newest(memory, tmp_path / "second" / "checkpoints")
    second = make_loop(tmp_path / "second", upload=memory)
    assert second.clock.step == 5
    second.fit()
    for name, tensor in whole.task.net.state_dict().items():
        assert torch.equal(tensor, second.task.net.state_dict()[name])
    assert "step-00000010" in there(memory)


def test_finish_with_nothing_to_do(memory: str) -> None:
    begin = time.monotonic()
    Uploader(memory).finish()
    assert time.monotonic() - begin < 60
