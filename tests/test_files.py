"""Whole files or none, and locations that survive pathlib."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.errors import ConfigError
from vidworld.files import anchored, require_local, sha256_of, url_of, write_atomic


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]


def test_killed_write_keeps_the_old_file(tmp_path):
    """SIGKILL between the temporary file and the rename, in a real process."""
    write_atomic(tmp_path / "file", b"old")
    script = (
        "import os, signal, sys, pathlib; from vidworld.files import write_atomic;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "write_atomic(pathlib.Path(sys.argv[1]), b'new' * 100000)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    assert all(entry.name.endswith(".partial") for entry in tmp_path.iterdir() if entry.name != "file")


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    "url", ["s3://bucket/a/b", "gs://bucket", "memory://data", "file:///srv/data", "https://host/data"]
)
def test_urls_survive_pathlib(url):
    assert url_of(url) == url_of(Path(url)) == url_of(url + "/") == url
    assert url_of(Path(url) / "manifest.json") == f"{url}/manifest.json"
    assert url_of(anchored(Path(url))) == url


@pytest.mark.parametrize("path", ["data", "/srv/s3", "a:b", "s3:", "c:/x", "-x://y", ""])
def test_paths_are_no_urls(path):
    assert url_of(path) is None
    assert anchored(Path(path)).is_absolute()


def test_outputs_that_must_be_local():
    assert require_local(Path("runs/a"), "--out") == Path("runs/a")
    with pytest.raises(ConfigError, match=r"--out: got s3://bucket/run, expected a local folder"):
        require_local(Path("s3://bucket/run"), "--out")
