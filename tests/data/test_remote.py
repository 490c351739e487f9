"""Datasets behind URLs: read through the cache, written and uploaded, and every way a network can fail."""

import dataclasses
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vidworld.data import cache, remote
from vidworld.data.cache import Cache
from vidworld.data.manifest import MANIFEST, Manifest
from vidworld.data.shards import ShardDataset
from vidworld.data.staging import locked
from vidworld.errors import ConfigError, DataError, MissingDependencyError

TRAIN = "shards/train-000000.tar"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone, and no waiting between tries."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(cache.LIMIT, raising=False)
    monkeypatch.delenv(cache.OFFLINE, raising=False)
    monkeypatch.setattr(remote, "DELAYS_S", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def url(dataset_dir: Path) -> Iterator[str]:
    """The fixture dataset in fsspec's memory file system."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{dataset_dir}/", "/robot/", recursive=True)
    yield "memory://robot"
    memory.store.clear()


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shards/*/*"))


def equal(one: Any, other: Any) -> bool:
    tables = ("actions_TA", "proprio_TS", "timestamps_T")
    same = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in tables)
    return same and all(np.array_equal(one.video[view], other.video[view]) for view in other.video)


class Flaky(MemoryFileSystem):
    """A memory file system whose files break off after some bytes, so many times."""

    protocol = ("flaky",)
    failures = 0
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        Flaky.opened += 1
        options.pop("cache_type", None)
        return Breaking(super().cat_file(path))

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionResetError("reset by peer")
        return super().cat_file(path, *arguments, **options)


class Breaking(io.BytesIO):
    """Gives 5000 bytes, then fails while failures are left."""

    given = False

    def read(self, size: int | None = -1) -> bytes:
        if self.given and Flaky.failures:
            Flaky.failures -= 1
            raise TimeoutError("timed out")
        self.given = True
        return super().read(min(size, 5000) if size and size > 0 else 5000)


@pytest.fixture
def flaky(url: str) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures = Flaky.opened = 0
    return url.replace("memory", "flaky")


def test_reads_as_a_local_dataset(url, dataset_dir, cache_folder):
    local, far = ShardDataset.open(dataset_dir), ShardDataset.open(url)
    assert far.manifest == local.manifest
    assert far.directory == url
    assert cached(cache_folder) == []
    assert equal(far.read("ep-000000"), local.read("ep-000000"))
    assert cached(cache_folder) == [f"{local.manifest.shards[0].sha256}.tar"]  # what was touched, no more
    assert equal(far.read_clip("ep-000002", 3, 5), local.read_clip("ep-000002", 3, 5))
    far.verify_all()
    again = pickle.loads(pickle.dumps(far))
    assert equal(again.read("ep-000001"), local.read("ep-000001"))


def test_a_url_that_went_through_pathlib(url, dataset_dir):
    assert ShardDataset.open(Path(url)).manifest == Manifest.read(Path(url)) == Manifest.read(dataset_dir)


def test_file_urls(dataset_dir):
    assert ShardDataset.open(f"file://{dataset_dir}").read("ep-000000").meta["embodiment"] == "toy"


def test_web_servers(dataset_dir):
    """Python's own: it lists no folders and sends no ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(dataset_dir))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        far = ShardDataset.open(url)
        far.verify_all()
        assert equal(far.read("ep-000002"), ShardDataset.open(dataset_dir).read("ep-000002"))
        with pytest.raises(DataError, match=f"no manifest.json in {url}/nothing"):
            ShardDataset.open(f"{url}/nothing")
        server.shutdown()


def test_a_shard_is_downloaded_once_and_read_offline_by_content(url, dataset_dir, monkeypatch):
    far = ShardDataset.open(url)
    far.verify_all()
    fsspec.filesystem("memory").rm("/robot", recursive=True)
    assert far.read("ep-000000").key == "ep-000000"
    with pytest.raises(DataError, match=r"no manifest.json in memory://robot"):
        ShardDataset.open(url)
    monkeypatch.setenv(cache.OFFLINE, "1")
    assert ShardDataset.open(url).read("ep-000002").key == "ep-000002"
    with pytest.raises(
        DataError, match=r"not in the cache in memory://other/manifest.json; unset VIDWORLD_O"
    ):
        ShardDataset.open("memory://other")
    far._store.drop(far.manifest.shards[0])
    with pytest.raises(DataError, match=r"not in the cache in memory://robot/shards/train-000000.tar"):
        ShardDataset.open(url).read("ep-000000")


def test_other_urls_with_the_same_shards_share_them(url, dataset_dir, cache_folder):
    ShardDataset.open(url).verify_all()
    ShardDataset.open(f"file://{dataset_dir}").verify_all()
    assert len(cached(cache_folder)) == 2


def test_damaged_copy_is_fetched_again(url, dataset_dir):
    far = ShardDataset.open(url)
    path = far._store.path(far.manifest.shards[0])
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    assert equal(ShardDataset.open(url).read("ep-000000"), ShardDataset.open(dataset_dir).read("ep-000000"))
    path.write_bytes(content[:2000])
    assert equal(ShardDataset.open(url).read("ep-000000"), ShardDataset.open(dataset_dir).read("ep-000000"))


def test_evicted_while_in_use(url):
    far = ShardDataset.open(url)
    before = far.read("ep-000000")
    far._store.path(far.manifest.shards[0]).unlink()
    assert equal(far.read("ep-000000"), before)


def test_damaged_at_the_source(url, cache_folder):
    far, memory = ShardDataset.open(url), fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(f"/robot/{TRAIN}"))
    content[3000] ^= 1
    memory.pipe_file(f"/robot/{TRAIN}", bytes(content))
    says = r"downloaded is damaged \(3 times\) in memory://robot/shards/train-000000.tar: got sha256"
    with pytest.raises(DataError, match=says):
        far.read("ep-000000")
    memory.pipe_file(f"/robot/{TRAIN}", bytes(content[:-512]))
    with pytest.raises(DataError, match=r"train-000000.tar is damaged in memory://robot: got \d+ bytes"):
        ShardDataset.open(url)
    with pytest.raises(DataError, match=r"cannot read the storage .* the file ends at byte \d+, at byte"):
        far.read("ep-000000")
    memory.rm_file(f"/robot/{TRAIN}")
    with pytest.raises(DataError, match=r"cannot read shard shards/train-000000.tar in memory://robot"):
        ShardDataset.open(url)
    with pytest.raises(DataError, match=r"no such file in memory://robot/shards/train-000000.tar"):
        far.read("ep-000000")
    assert cached(cache_folder) == []


def test_broken_transfers_go_on_where_they_were(flaky, dataset_dir):
    Flaky.failures = 2
    far = ShardDataset.open(flaky)
    assert Flaky.failures == 0
    size = far.manifest.shards[0].bytes
    Flaky.failures, Flaky.opened = size // 5000 - 1, 0  # after almost every piece
    assert equal(far.read("ep-000000"), ShardDataset.open(dataset_dir).read("ep-000000"))
    assert Flaky.failures == 0
    assert Flaky.opened == size // 5000  # nothing was read twice


def test_storage_that_stays_broken(flaky, monkeypatch):
    Flaky.failures = 10**6
    with pytest.raises(
        DataError, match=r"cannot reach the storage \(4 tries\) in flaky://robot/manifest.json"
    ):
        ShardDataset.open(flaky)
    Flaky.failures = 0
    far = ShardDataset.open(flaky)
    monkeypatch.setattr(Breaking, "read", lambda *_: (_ for _ in ()).throw(ConnectionResetError("by peer")))
    with pytest.raises(DataError, match=r"cannot read the storage \(4 tries\).*by peer, at byte 0 of"):
        far.read("ep-000000")


def test_unreachable_storage_leaves_the_copy(flaky):
    ShardDataset.open(flaky).verify_all()
    Flaky.failures = 10**6
    with pytest.warns(UserWarning, match="cannot reach the storage.*going on with the copy in the cache"):
        far = ShardDataset.open(flaky)
    assert far.read("ep-000000").key == "ep-000000"


def test_errors_of_one_line(monkeypatch):
    for wrong, kind, says in (
        (
            "nosuch://a/b",
            ConfigError,
            "kind of URL: got nosuch://a/b/manifest.json, expected one that fsspec",
        ),
        ("memory://nothing", DataError, "no manifest.json in memory://nothing; conversion unfinished"),
        ("abfs://a/b", MissingDependencyError, "storage abfs:// needs a package"),
    ):
        with pytest.raises(kind, match=says) as caught:
            ShardDataset.open(wrong)
        assert caught.value.exit_code == 2
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(ConfigError, match=r"VIDWORLD_CACHE_GB: got 'much', expected gigabytes"):
        ShardDataset.open("memory://nothing")
    assert remote.shown("ftp://me:secret@host/a") == "ftp://host/a"


def test_cache_that_cannot_be_written(url, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"cannot write to the cache in .*/file: .*set VIDWORLD_CACHE to a folder"
    ):
        ShardDataset.open(url)


def test_full_disk(url, monkeypatch):
    far = ShardDataset.open(url)

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "download", full)
    with pytest.raises(DataError, match=r"cannot write to the cache.*No space.*VIDWORLD_CACHE_GB lower"):
        far.read("ep-000000")


# The size limit


def put(store: Cache, content: bytes) -> str:
    fsspec.filesystem("memory").pipe_file("/blob", content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.fetch("memory://blob", sha256, len(content))
    return sha256


def test_the_least_recently_used_go_first(tmp_path):
    store = Cache(tmp_path / "small", limit_bytes=350)
    first, second, third = (put(store, bytes([value]) * 100) for value in range(3))
    assert all(store.path(name).is_file() for name in (first, second, third))
    store.fetch("memory://gone", first, 100)  # used again
    fourth = put(store, b"d" * 100)
    assert [store.path(name).is_file() for name in (first, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]
    large = put(store, b"e" * 1000)  # larger than the limit: kept while it is the newest
    assert cached(store.folder) == [f"{large}.tar"]


def test_limit_below_the_dataset_is_said(url, monkeypatch, cache_folder):
    monkeypatch.setenv(cache.LIMIT, "0.00001")
    with pytest.warns(UserWarning, match="downloaded again and again; raise VIDWORLD_CACHE_GB"):
        far = ShardDataset.open(url)
    for key in ("ep-000000", "ep-000002", "ep-000001"):
        assert far.read(key).key == key
        assert len(cached(cache_folder)) == 1


def test_use_does_not_look_like_a_change(url):
    far = ShardDataset.open(url)
    before = far.read("ep-000000")
    far._store.path(far.manifest.shards[0])
    assert equal(far.read("ep-000000"), before)


# Processes


def read_all(url: str, folder: str, found: Any) -> None:
    os.environ[cache.FOLDER] = folder
    dataset = ShardDataset.open(url)
    found.put([float(dataset.read(key).actions_TA.sum()) for key in ("ep-000000", "ep-000001", "ep-000002")])


def test_processes_share_the_cache(dataset_dir, cache_folder):
    """Three processes at once, while a fourth deletes copies under their hands."""
    url, context = f"file://{dataset_dir}", multiprocessing.get_context("spawn")
    found = context.Queue()
    readers = [context.Process(target=read_all, args=(url, str(cache_folder), found)) for _ in range(3)]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 200
    while any(reader.is_alive() for reader in readers) and time.monotonic() < deadline:
        for path in cache_folder.glob("shards/*/*.tar"):
            path.unlink(missing_ok=True)
        time.sleep(0.05)
    results = [found.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(60)
    truth = ShardDataset.open(dataset_dir)
    expected = [float(truth.read(key).actions_TA.sum()) for key in ("ep-000000", "ep-000001", "ep-000002")]
    assert results == [expected] * 3
    assert not list(cache_folder.glob("shards/*/*.partial"))


def test_waits_for_a_lock_no_longer_than_the_deadline(cache_folder, monkeypatch):
    store = Cache.of_environment()
    monkeypatch.setattr(cache, "LOCK_DEADLINE_S", 0.1)
    with (
        store.locked("ab"),
        pytest.raises(DataError, match="held the cache for too long"),
        store.locked("ab"),
    ):
        pass
    with store.locked("ab"):
        pass


def test_damaged_manifest():
    fsspec.filesystem("memory").pipe_file(f"/text/{MANIFEST}", b"{")
    with pytest.raises(DataError, match=r"not valid JSON in memory://text/manifest.json"):
        Manifest.read("memory://text")


def test_hostile_manifest_cannot_leave_the_cache(url, cache_folder, tmp_path):
    manifest = Manifest.read(url)
    shard = dataclasses.replace(manifest.shards[0], sha256="../../../escaped")
    hostile = dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:]))
    fsspec.filesystem("memory").pipe_file(f"/robot/{MANIFEST}", hostile.write(tmp_path).read_bytes())
    with pytest.raises(DataError, match=r"sha256 of a shard: got '../../../escaped', expected 64 hex"):
        ShardDataset.open(url).read("ep-000000")
    assert not list(tmp_path.rglob("escaped*"))


def test_chained_urls_are_local_paths():
    """fsspec's `a::b://` would open one storage from within another."""
    with pytest.raises(DataError, match="no such dataset directory"):
        ShardDataset.open("simplecache::memory://robot")


def test_folders_are_not_named_like_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match="--out: got s3://bucket/d, expected a local directory"),
        locked(Path("s3://bucket/d")),
    ):
        pass
    assert not list(tmp_path.glob("s3*"))
