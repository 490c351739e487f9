"""Datasets written to a URL: made in a local folder, then uploaded, the manifest last.

    CACHE/outgoing/<hash of the URL>/    the local folder: staged work, manifest, and what was uploaded

Interrupted work continues where it was, conversion and upload alike. What was uploaded stays in the cache.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from vidworld.data import remote
from vidworld.data.cache import Cache
from vidworld.data.manifest import MANIFEST, Manifest, Shard
from vidworld.data.staging import DELIVERED, SHARDS, locked
from vidworld.errors import ConfigError, DataError
from vidworld.files import url_of, write_atomic

PROBE = ".vidworld-writing"


@contextlib.contextmanager
def local_output(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The local folder to write a dataset into; where `out` is a URL it is uploaded after the block.

    Raises DataError before the block where the URL cannot be written, and after it where another dataset is
    there and `overwrite` is off.
    """
    url = url_of(out)
    if url is None:
        yield out
        return
    cache = Cache.of_environment()
    if cache.offline:
        raise ConfigError("--out", got=remote.shown(url), expected="a local folder: VIDWORLD_OFFLINE is set")
    folder = cache.folder / "outgoing" / hashlib.sha256(url.encode()).hexdigest()[:32]
    remote.write(f"{url}/{PROBE}", b"")
    remote.remove(f"{url}/{PROBE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    yield folder
    with locked(folder):
        deliver(folder, url, cache, overwrite=overwrite)


def deliver(folder: Path, url: str, cache: Cache, *, overwrite: bool) -> None:
    """Upload the dataset of a folder: the shards that are not there yet, then the manifest.

    The shards then move into the cache. Raises ConfigError where another dataset is at the URL.
    """
    manifest = Manifest.read(folder)
    there = _manifest_at(url)
    if there is not None and there.digest != manifest.digest and not overwrite:
        raise ConfigError(
            "--out holds another dataset",
            got=remote.shown(url),
            fix="pass --overwrite to replace it, or another --out",
        )
    if there is None or there.digest != manifest.digest:
        remote.remove(f"{url}/{MANIFEST}")
        _upload_shards(manifest, folder, url, cache)
        remote.upload(folder / MANIFEST, f"{url}/{MANIFEST}")
        _remove_stale(manifest, url)
    for shard in manifest.shards:
        if (folder / shard.file).is_file():
            cache.adopt(folder / shard.file, shard.sha256)
    _note(folder, url, manifest, {shard.file: shard.sha256 for shard in manifest.shards}, manifest.digest)


def _upload_shards(manifest: Manifest, folder: Path, url: str, cache: Cache) -> None:
    """Upload what an earlier run did not, and check that all is there."""
    note = folder / DELIVERED
    said = json.loads(note.read_bytes()) if note.is_file() else {}
    sent: dict[str, str] = said.get("shards", {}) if said.get("url") == url else {}
    found = remote.sizes(url) or {}
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="upload", disable=None) as bar:
        for shard in manifest.shards:
            if sent.get(shard.file) != shard.sha256 or found.get(shard.file) != shard.bytes:
                remote.upload(_local(shard, folder, cache), f"{url}/{shard.file}")
                sent[shard.file] = shard.sha256
                _note(folder, url, manifest, sent, digest="")
            bar.update(shard.bytes)
    found = remote.sizes(url)
    for shard in manifest.shards:
        if found is not None and found.get(shard.file) != shard.bytes:
            raise DataError(
                f"uploaded shard {shard.file}",
                where=remote.shown(url),
                got=f"{found.get(shard.file, 0)} bytes",
                expected=f"{shard.bytes} bytes",
                fix="run again",
            )


def _local(shard: Shard, folder: Path, cache: Cache) -> Path:
    """Where a shard is: in the folder, or in the cache if it was delivered before."""
    path = folder / shard.file
    return path if path.is_file() else cache.path(shard.sha256)


def _remove_stale(manifest: Manifest, url: str) -> None:
    """Delete shards of the dataset that was there before."""
    wanted = {shard.file for shard in manifest.shards}
    for file in remote.sizes(url) or ():
        if file.startswith(f"{SHARDS}/") and file.endswith(".tar") and file not in wanted:
            remote.remove(f"{url}/{file}")


def _manifest_at(url: str) -> Manifest | None:
    try:
        remote.read(f"{url}/{MANIFEST}")
    except remote.MissingFileError:
        return None
    return Manifest.read(url)


def _note(folder: Path, url: str, manifest: Manifest, sent: dict[str, str], digest: str) -> None:
    said = {"url": url, "digest": digest, "name": manifest.name, "shards": sent}
    write_atomic(folder / DELIVERED, json.dumps(said, indent=1).encode())
