"""Datasets written to URLs, and S3 through a local server: identity, resumption, and errors of one line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from vidworld.cli import run
from vidworld.data import cache, deliver, remote
from vidworld.data.cache import Cache
from vidworld.data.deliver import local_output
from vidworld.data.manifest import MANIFEST, Manifest
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError

pytest.importorskip("s3fs")
TRAIN, VAL = "shards/train-000000.tar", "shards/val-000000.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 server on this machine."""
    moto = pytest.importorskip("moto.server")
    started = moto.ThreadedMotoServer(port=0)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(cache.OFFLINE, raising=False)
    monkeypatch.setattr(remote, "DELAYS_S", (0.0, 0.0))


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The file system of that server with one empty bucket, reached as users do: through the environment."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    if not fs.exists("robots"):
        fs.mkdir("robots")
    yield fs
    fs.rm("robots", recursive=True)
    type(fs).clear_instance_cache()


def below(fs: Any, place: str) -> list[str]:
    return sorted(name.removeprefix(f"{place}/") for name in fs.find(place))


def send(folder: Path, url: str, **options: Any) -> Path:
    """Deliver a copy of a local dataset."""
    with local_output(Path(url), **options) as out:
        fsspec.filesystem("file").copy(f"{folder}/", f"{out}/", recursive=True)
    return out


def test_there_and_back_over_s3(s3, dataset_dir, capsys):
    out = send(dataset_dir, "s3://robots/cr5")
    assert below(s3, "robots/cr5") == [MANIFEST, TRAIN, VAL]
    assert s3.cat("robots/cr5/" + TRAIN) == (dataset_dir / TRAIN).read_bytes()
    assert not list(out.glob("shards/*"))  # moved into the cache: no second copy, no download
    far = ShardDataset.open("s3://robots/cr5")
    assert far.manifest == Manifest.read(dataset_dir)
    far.verify_all()
    Cache.of_environment().drop(far.manifest.shards[0].sha256)
    assert far.read("ep-000000").key == "ep-000000"  # downloaded
    assert run(["inspect", "s3://robots/cr5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "toy"


def test_repeated_delivery_does_nothing(s3, dataset_dir, monkeypatch):
    send(dataset_dir, "s3://robots/cr5")
    monkeypatch.setattr(remote, "upload", lambda *_: pytest.fail("uploaded again"))
    send(dataset_dir, "s3://robots/cr5")


def test_manifest_comes_last_and_uploads_go_on(s3, dataset_dir, monkeypatch):
    upload, sent = remote.upload, []

    def breaks(source: Path, url: str) -> None:
        if url.endswith(VAL) and len(sent) < 2:
            sent.append(url)
            raise remote.UnreachableError("cannot reach the storage", where=url)
        sent.append(url)
        upload(source, url)

    monkeypatch.setattr(remote, "upload", breaks)
    with pytest.raises(DataError, match="cannot reach the storage"):
        send(dataset_dir, "s3://robots/cr5")
    assert below(s3, "robots/cr5") == [TRAIN]
    with pytest.raises(DataError, match=r"no manifest.json in s3://robots/cr5"):
        ShardDataset.open("s3://robots/cr5")
    send(dataset_dir, "s3://robots/cr5")
    assert [url.rpartition("/")[2] for url in sent] == [
        "train-000000.tar",
        "val-000000.tar",
        "val-000000.tar",
        MANIFEST,
    ]
    ShardDataset.open("s3://robots/cr5").verify_all()


def test_another_dataset_is_replaced_on_request_only(s3, dataset_dir, latents_dir):
    send(latents_dir, "s3://robots/cr5")
    before = Manifest.read("s3://robots/cr5")
    with pytest.raises(
        ConfigError, match=r"--out holds another dataset: got s3://robots/cr5; pass --overwrite"
    ):
        send(dataset_dir, "s3://robots/cr5")
    assert Manifest.read("s3://robots/cr5") == before
    s3.touch("robots/cr5/shards/train-000009.tar")
    send(dataset_dir, "s3://robots/cr5", overwrite=True)
    assert below(s3, "robots/cr5") == [MANIFEST, TRAIN, VAL]
    ShardDataset.open("s3://robots/cr5").verify_all()


def test_wrong_bucket_and_credentials(s3, dataset_dir, monkeypatch, capsys):
    with pytest.raises(DataError, match=r"^no such bucket in s3://nowhere/cr5"):
        send(dataset_dir, "s3://nowhere/cr5")
    with pytest.raises(DataError, match=r"^no such bucket in s3://nowhere/cr5"):
        ShardDataset.open("s3://nowhere/cr5")
    with pytest.raises(DataError, match=r"^no manifest.json in s3://robots/bucket"):
        ShardDataset.open("s3://robots/bucket")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(s3).clear_instance_cache()
    assert run(["inspect", "s3://robots/cr5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no access in s3://robots/cr5/manifest.json" in line
    assert "check the credentials in the environment (AWS_ACCESS_KEY_ID" in line


def test_dead_endpoint_fails_soon(s3, monkeypatch):
    type(s3).clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot reach the storage \(3 tries\) in s3://robots/cr5"):
        ShardDataset.open("s3://robots/cr5")


def test_offline_output_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.OFFLINE, "1")
    with pytest.raises(ConfigError, match="VIDWORLD_OFFLINE is set"), local_output(Path("memory://a")):
        pass


def test_local_output_is_itself(tmp_path):
    with local_output(tmp_path / "d") as out:
        assert out == tmp_path / "d"


def test_a_damaged_upload_is_found(dataset_dir, monkeypatch):
    memory, upload = fsspec.filesystem("memory"), remote.upload

    def cuts(source: Path, url: str) -> None:
        upload(source, url)
        if url.endswith(VAL):
            memory.pipe_file("/cut/" + VAL, source.read_bytes()[:-512])

    monkeypatch.setattr(remote, "upload", cuts)
    with pytest.raises(DataError, match=rf"uploaded shard {VAL} in memory://cut: got \d+ bytes.*run again"):
        send(dataset_dir, "memory://cut")
    assert not memory.exists(f"/cut/{MANIFEST}")
    monkeypatch.setattr(remote, "upload", upload)
    send(dataset_dir, "memory://cut")
    ShardDataset.open("memory://cut").verify_all()
    memory.rm("/cut", recursive=True)


KILLED = """
import os, signal, sys
from vidworld.data import remote
upload = remote.upload
def dies(source, url):
    if url.endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    upload(source, url)
remote.upload = dies
from pathlib import Path
from vidworld.data.deliver import deliver
from vidworld.data.cache import Cache
deliver(Path(sys.argv[2]), sys.argv[3], Cache.of_environment(), overwrite=False)
"""


@pytest.mark.parametrize("point", [TRAIN, VAL, MANIFEST])
def test_killed_while_uploading(dataset_dir, tmp_path, point):
    url = f"file://{tmp_path}/remote/cr5"
    done = subprocess.run([sys.executable, "-c", KILLED, point, str(dataset_dir), url], env=os.environ)
    assert done.returncode == -9
    assert not (tmp_path / "remote/cr5" / MANIFEST).exists()
    deliver.deliver(dataset_dir, url, Cache.of_environment(), overwrite=False)
    ShardDataset.open(url).verify_all()
    ShardDataset.open(tmp_path / "remote/cr5").verify_all()
