"""The command `vidworld shard` on RLDS, made up and real."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidworld.cli import run
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.rlds import RldsSource

TOY = ("--size", "32x16", "--fps", 10)


def shard(source: Path, out: Path, *flags: object) -> int:
    return run(["shard", str(source), "--out", str(out), "--workers", "1", *map(str, flags)])


def test_the_command(rlds, encode, tmp_path, capsys):
    assert shard(rlds, tmp_path / "d", *TOY, "--name", "toy") == 0
    assert (
        "5 episodes (4 train, 1 val), 31 frames of front, wrist at 32x16, 10 fps" in capsys.readouterr().out
    )
    dataset = ShardDataset.open(tmp_path / "d")
    for index, length in enumerate(encode.lengths):
        read = dataset.read(f"train_{index:06d}")
        assert (len(read.actions_TA), set(read.actions_TA[:, 0])) == (length, {index})
        assert read.meta["outcome"] == {"success": True, "reward": 1}


def test_damage_is_quarantined_by_name(rlds, encode, tmp_path, capsys):
    path = next(rlds.glob("*-00001-of-*"))
    path.write_bytes(path.read_bytes()[:-7])
    assert shard(rlds, tmp_path / "d", *TOY) == 2
    error = capsys.readouterr().err
    assert "too many bad episodes: 1 of 5" in error
    assert error.count("\n") == 1
    assert shard(rlds, tmp_path / "d", *TOY, "--max-quarantined", 0.5) == 0
    error = capsys.readouterr().err
    # The file is cut in its second record, so that neither of its episodes can be trusted to be what it says.
    assert "quarantined train_000003: truncated record 1 in toy_set-train.tfrecord-00001-of-00002" in error
    assert str(rlds) not in error


def test_no_rate_is_one_line_with_the_way_out(rlds, tmp_path, capsys):
    assert shard(rlds, tmp_path / "d", "--size", "32x16") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rate_hz in a contract file" in error
    assert not (tmp_path / "d" / "manifest.json").exists()
    (tmp_path / "robot.yaml").write_text("rate_hz: 8")
    assert shard(rlds, tmp_path / "d", "--size", "32x16", "--contract", tmp_path / "robot.yaml") == 0
    dataset = ShardDataset.open(tmp_path / "d")
    assert dataset.manifest.fps == 8
    assert np.allclose(np.diff(dataset.read("train_000001").timestamps_T), 1 / 8)


@pytest.fixture
def bridge(real) -> Path:
    return real("octo_bridge_rlds") / "bridge_dataset" / "1.0.0"


def jpegs_of(record: bytes) -> list[bytes]:
    """All JPEGs of a record found by their markers: inside a scan, 0xFF is never followed by 0xD9."""
    return re.findall(rb"\xff\xd8\xff.*?\xff\xd9", record, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*(left out|are not here)")
def test_real_bridge_is_byte_exact(bridge):
    """Every picture and every number against a search of the raw file that knows no protobuf."""
    file = bridge / "bridge_dataset-train.tfrecord-00000-of-00001"
    content, offset = file.read_bytes(), 0
    source = RldsSource(bridge)
    assert source.views == ("image_0", "image_1", "image_2")
    steps = 0
    for episode_id in source.episode_ids():
        length = int.from_bytes(content[offset : offset + 8], "little")
        record = content[offset + 12 : offset + 12 + length]
        offset += length + 16
        pictures = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs_of(record)]
        assert len(pictures) == 40
        episode = source.read(episode_id)
        steps += len(episode)
        cameras = {}
        for view in ("image_0", "image_1", "image_2", "image_3"):
            place = record.index(f"steps/observation/{view}".encode())
            before = len(jpegs_of(record[:place]))
            cameras[view] = np.stack(pictures[before : before + 10])
        assert not cameras.pop("image_3").any()
        for view, expected in cameras.items():
            assert np.array_equal(np.stack(list(episode.views[view].frames())), expected)
        for name, rows in (("action", episode.actions_TA), ("observation/state", episode.proprio_TS)):
            place = record.index(f"\x0a{chr(len(name) + 6)}steps/{name}".encode())
            packed = record.index(rows.astype("<f4").tobytes(), place)
            assert packed - place < 64
            assert rows.shape == (10, 7)
        assert episode.text.encode() in record
    assert (offset, steps) == (len(content), 250)


@pytest.mark.filterwarnings("ignore:.*(left out|are not here)")
def test_real_bridge_converts(bridge, tmp_path, capsys):
    contract = Path(__file__).resolve().parents[4] / "datasets" / "bridge_rlds.contract.yaml"
    assert shard(bridge, tmp_path / "d", "--size", "64x64", "--name", "bridge", "--contract", contract) == 0
    said = capsys.readouterr()
    counts = "25 episodes (23 train, 2 val), 250 frames of image_0, image_1, image_2 at 64x64, 5 fps"
    assert f"{counts}, 0 quarantined" in said.out
    assert "1 of 2 files that dataset_info.json lists are not here: bridge_dataset-val" in said.err
    assert "image_3 left out, black in all 8 episodes looked at" in said.err
    dataset, source = ShardDataset.open(tmp_path / "d"), RldsSource(bridge)
    assert {sample.text for sample in dataset.manifest.samples()} >= {
        "put cup from counter or drying rack into sink"
    }
    (spec,) = dataset.manifest.contracts
    assert (spec.embodiment, spec.rate_hz, spec.control_frame) == ("widowx", 5, "base")
    assert [d.kind for d in spec.action] == ["delta"] * 6 + ["position"]
    for episode_id in source.episode_ids()[::8]:
        read, episode = dataset.read(episode_id), source.read(episode_id)
        assert np.array_equal(read.actions_TA, episode.actions_TA)
        assert read.video is not None
        for view in source.views:
            true = np.stack(list(episode.views[view].frames())).astype(float)
            assert ((read.video[view] - true) ** 2).mean() < 255**2 / 10**3.5, "35 dB"
    # Rows belong to frames: what an action asks for is what the next state did, axis by axis.
    pairs = [
        (read.actions_TA[:-1], np.diff(read.proprio_TS, axis=0))
        for read in map(dataset.read, source.episode_ids())
    ]
    asked, done = (np.concatenate(column) for column in zip(*pairs, strict=True))
    late = np.concatenate([change[2:] for _, change in pairs]), np.concatenate([a[:-2] for a, _ in pairs])
    for axis in range(3):
        now = np.corrcoef(asked[:, axis], done[:, axis])[0, 1]
        assert now > 0.7
        assert now > np.corrcoef(late[0][:, axis], late[1][:, axis])[0, 1]
