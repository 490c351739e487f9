import json
import subprocess
import sys

import numpy as np
import pytest

from vidworld import cli
from vidworld.data.shards import ShardDataset
from vidworld.lab_command import kinds_known

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl, truth

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")
SMALL = ["--episodes", "4", "--frames", "6", "--size", "64"]


def shard_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.tar"))}


@needs_gl
def test_shards_are_the_same_bytes_whatever_the_workers(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.run(["lab", "container", *SMALL, "--workers", "1", "--out", str(one)]) == 0
    assert cli.run(["lab", "container", *SMALL, "--workers", "2", "--out", str(two)]) == 0
    assert shard_bytes(one) == shard_bytes(two)
    assert len(shard_bytes(one)) >= 2
    assert (one / "contact_sheet.png").stat().st_size > 5000
    assert cli.run(["lab", "container", *SMALL, "--out", str(one)]) == 0
    assert cli.run(["lab", "container", *SMALL, "--seed", "9", "--out", str(one)]) == 2
    assert cli.run(["inspect", str(one)]) == 0
    capsys.readouterr()


@needs_gl
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "frames"), [("smoke", "12"), ("liquid", "36")])
def test_flows_are_the_same_bytes_whatever_the_workers(tmp_path, capsys, kind, frames):
    small = ["--episodes", "3", "--frames", frames, "--size", "64", "--exploration", "0"]
    for workers in ("1", "2", "3"):
        out = str(tmp_path / workers)
        assert cli.run(["lab", kind, *small, "--workers", workers, "--out", out]) == 0
    one, two, three = (shard_bytes(tmp_path / workers) for workers in ("1", "2", "3"))
    assert one == two == three
    assert len(one) >= 2
    capsys.readouterr()


@needs_gl
def test_the_truth_travels_in_the_outcome(tmp_path):
    import tarfile

    assert cli.run(["lab", "rigid", *SMALL, "--workers", "1", "--out", str(tmp_path / "data")]) == 0
    shard = sorted((tmp_path / "data" / "shards").glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        name = next(name for name in tar.getnames() if name.endswith("meta.json"))
        meta = json.load(tar.extractfile(name))
    assert meta["outcome"]["hidden"] == {}
    assert len(meta["outcome"]["readouts"]["target_lift_m"]) == 6
    masks = {name: truth.unpack_mask(packed) for name, packed in meta["outcome"]["masks"].items()}
    assert masks["arm"].shape == (6, 64, 64)
    assert np.mean(masks["arm"]) > 0.02
    assert meta["source"]["versions"]["mujoco"]
    without = ["--no-masks", "--out", str(tmp_path / "without")]
    assert cli.run(["lab", "rigid", *SMALL, "--workers", "1", *without]) == 0
    key = name.removesuffix(".meta.json")
    assert "masks" not in ShardDataset.open(tmp_path / "without").meta(key)["outcome"]


@needs_gl
def test_show_saves_a_clip_with_masks_and_readouts(tmp_path, capsys):
    out = tmp_path / "show"
    asked = ["lab", "show", "rigid", "--seed", "1", "--frames", "6", "--size", "64", "--out", str(out)]
    assert cli.run(asked) == 0
    for name in ("clip.mp4", "strip.png", "readouts.png", "episode.json"):
        assert (out / name).stat().st_size > 500
    assert cli.run(asked) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run(["lab", "show", "soup", "--out", str(tmp_path / "soup")]) == 2
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["soup"], "soup"),
        (["rigid", "--size", "100"], "64 or 128 or 256"),
        (["rigid", "--frames", "1"], "--frames"),
        (["rigid", "--episodes", "1"], "--episodes"),
        (["rigid", "--frames", "1000"], "2 to 256"),
        (["rigid", "--robot", "nowhere.xml"], "no such file"),
        (["rigid", "--variety", "garish"], "garish"),
    ],
)
def test_wrong_requests_leave_nothing(tmp_path, capsys, extra, message):
    out = tmp_path / "data"
    assert cli.run(["lab", *extra, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_planar_needs_no_mujoco_and_the_others_say_how_to_install_it():
    assert kinds_known()[0] == "planar"
    code = """
import importlib.util, sys
from vidworld import cli, lab_command
import vidworld.lab.planar
assert lab_command.kinds_known()[0] == "planar"
assert not {"numba", "mujoco"} & set(sys.modules)
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "mujoco" else found(name, *rest)
sys.exit(cli.run(["lab", "rigid", "--out", "nowhere/at/all"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "vidworld[lab]" in done.stderr
