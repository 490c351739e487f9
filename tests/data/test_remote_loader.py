"""Worker processes of the loader read from a URL, after their parent has used the same storage."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from vidworld.data import cache


@pytest.fixture
def s3_url(dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    for name, value in (
        ("ENDPOINT_URL", f"http://{host}:{port}"),
        ("ACCESS_KEY_ID", "test"),
        ("SECRET_ACCESS_KEY", "test"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("loader")
    fs.put(f"{dataset_dir}/", "loader/toy/", recursive=True)
    yield "s3://loader/toy"
    type(fs).clear_instance_cache()
    server.stop()


SCRIPT = """
import sys
import torch
from vidworld.data.loader import LoaderConfig, make_loader
from vidworld.data.shards import ShardDataset

if __name__ == "__main__":
    far, near = (ShardDataset.open(place) for place in sys.argv[1:])
    far.read("ep-000002")  # the parent's connection is open when workers start
    config = LoaderConfig(clip_frames=4, batch_size=2, workers=2)
    both = [list(make_loader(one, "train", config, seed=0, num_steps=4)) for one in (far, near)]
    assert len(both[0]) == 4
    assert all(torch.equal(one.video_BTVCHW, other.video_BTVCHW) for one, other in zip(*both, strict=True))
"""
"""In a process of its own: a fork server that other tests started has another environment."""


def test_loader_workers_read_from_s3(s3_url: str, dataset_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), s3_url, str(dataset_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
