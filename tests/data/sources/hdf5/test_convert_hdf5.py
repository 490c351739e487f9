"""The command `vidworld shard` on HDF5 files of each layout."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from vidworld.cli import run
from vidworld.data.shards import ShardDataset


def shard(source: Path, out: Path, *flags: object) -> int:
    """The command in this process, at the size of the pictures so that nothing is resized."""
    return run(
        ["shard", str(source), "--out", str(out), "--workers", "1", "--size", "64x48", *map(str, flags)]
    )


def check_video(dataset: ShardDataset, key: str, view: str, frames: np.ndarray) -> None:
    """The frames of a sample, up to what its JPEGs lose."""
    video = dataset.read(key).video
    assert video is not None
    assert video[view].shape == frames.shape
    assert ((video[view].astype(float) - frames) ** 2).mean() < 255**2 / 10**3.2, "32 dB"
    others = np.roll(frames, 3, axis=0)
    assert ((video[view].astype(float) - others) ** 2).mean() > (
        (video[view].astype(float) - frames) ** 2
    ).mean()


def test_robomimic(robomimic, footage, tmp_path, capsys):
    assert shard(robomimic, tmp_path / "d") == 0
    printed = capsys.readouterr().out
    views = "agentview_image, robot0_eye_in_hand_image"
    assert f"3 episodes (2 train, 1 val), 26 frames of {views} at 64x48, 20 fps, 0 quarantined" in printed
    dataset = ShardDataset.open(tmp_path / "d")
    check_video(dataset, "demo_5", "agentview_image", footage)
    read = dataset.read("demo_5")
    assert read.meta["outcome"] == {"success": True, "reward": 1}
    assert (read.actions_TA[:, 1] == np.arange(12)).all()


def test_libero_upright(footage, tmp_path, write, capsys):
    for task in ("open_drawer", "close_drawer"):
        write.libero(tmp_path / "logs" / f"{task}.hdf5", footage, task)
    (tmp_path / "logs" / "logs.yaml").write_text("flip: rows")
    assert shard(tmp_path / "logs", tmp_path / "d") == 0
    assert "4 episodes (3 train, 1 val), 26 frames of agentview_rgb" in capsys.readouterr().out
    dataset = ShardDataset.open(tmp_path / "d")
    assert {sample.text for sample in dataset.manifest.samples()} == {"open_drawer", "close_drawer"}
    (sample,) = [s for s in dataset.manifest.samples() if s.episode_id == "open_drawer/demo_1"]
    check_video(dataset, sample.key, "agentview_rgb", footage[:7])


@pytest.mark.parametrize("compress", [False, True])
def test_act_takes_its_rate_from_the_contract(footage, tmp_path, write, capsys, compress):
    for index in range(3):
        write.act(tmp_path / "logs" / f"episode_{index}.hdf5", footage, compress=compress)
    assert shard(tmp_path / "logs", tmp_path / "d") == 2
    assert "rate_hz in a contract file" in capsys.readouterr().err
    contract = Path(__file__).resolve().parents[4] / "datasets" / "aloha.contract.yaml"
    assert shard(tmp_path / "logs", tmp_path / "d", "--contract", contract) == 0
    assert "36 frames of cam_high, cam_left_wrist at 64x48, 50 fps" in capsys.readouterr().out
    dataset = ShardDataset.open(tmp_path / "d")
    check_video(dataset, "episode_1", "cam_high", footage)
    assert np.allclose(np.diff(dataset.read("episode_1").timestamps_T), 0.02)
    # Absolute joint targets can be halved in rate: the last of two counts.
    assert shard(tmp_path / "logs", tmp_path / "half", "--contract", contract, "--fps", 25) == 0
    assert dataset.manifest.contracts[0].action[6].unit == "1"
    assert ShardDataset.open(tmp_path / "half").read("episode_1").actions_TA[:, 0].tolist() == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]


def test_robomind(footage, tmp_path, write, capsys):
    for run_name in ("1017_163121", "1017_163350"):
        place = tmp_path / "h5_songling" / "egg" / "success_episodes" / run_name / "data"
        write.robomind(place / "trajectory.hdf5", footage)
    assert shard(tmp_path / "h5_songling", tmp_path / "d", "--fps", 30) == 0
    assert "24 frames of camera_front at 64x48, 30 fps" in capsys.readouterr().out
    dataset = ShardDataset.open(tmp_path / "d")
    sample = dataset.manifest.samples()[0]
    check_video(dataset, sample.key, "camera_front", footage)
    assert dataset.read(sample.key).meta["outcome"] == {"success": True}
    assert sample.text == "steam the egg"


def test_faults_are_quarantined_by_name(robomimic, tmp_path, capsys, change, footage):
    def edit(file: h5py.File) -> None:
        del file["data/demo_5/obs/agentview_image"]
        file["data/demo_5/obs/agentview_image"] = footage[:11]
        file["data/demo_10/actions"][3, 2] = np.nan

    change(robomimic, edit)
    assert shard(robomimic, tmp_path / "d", "--max-quarantined", 0.7, "--val-fraction", 0) == 0
    error = capsys.readouterr().err
    assert (
        "quarantined demo_5: rows and video frames differ in number: got rows 12, agentview_image 11" in error
    )
    assert "quarantined demo_10: action 'ee_z_delta' at row 3: got nan" in error
    assert shard(robomimic, tmp_path / "e", "--max-quarantined", 0.4, "--trim", "shorter") == 0
    read = ShardDataset.open(tmp_path / "e").read("demo_5")
    assert len(read.actions_TA) == 11
    assert read.meta["source"]["trimmed"]["to"] == 11


def test_too_many_faults_are_one_line(footage, tmp_path, write, capsys):
    for index in range(3):
        path = write.act(tmp_path / "logs" / f"episode_{index}.hdf5", footage, sim=True)
    path.write_bytes(path.read_bytes()[:5000])
    assert shard(tmp_path / "logs", tmp_path / "d") == 2
    error = capsys.readouterr().err
    assert (
        "too many bad episodes: 1 of 3, allowed are 0 (episode_2: damaged HDF5 file in episode_2.hdf5"
        in error
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.slow
def test_workers_do_not_change_the_bytes(robomimic, tmp_path):
    for workers in (1, 2):
        assert shard(robomimic, tmp_path / str(workers), "--workers", workers) == 0
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in "12"
    )
    assert one == two
