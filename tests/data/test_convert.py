import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vidworld.contract import Dimension, Statistics
from vidworld.data import staging
from vidworld.data.convert import ConvertOptions, convert, make_plan, sample_key
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset, ShardWriter
from vidworld.data.sources.base import SimulatedSource, video_of
from vidworld.data.staging import locked
from vidworld.errors import ConfigError, DataError, VidworldError
from vidworld.types import EmbodimentSpec, Episode

ARM = EmbodimentSpec(
    "arm",
    10,
    action=(Dimension("v", "m/s", "velocity"), Dimension("still", "1", "binary")),
    proprio=(Dimension("x", "m", "position"),),
)
HAND = EmbodimentSpec("hand", 10, action=(Dimension("f"),), proprio=())
VIEWS = ("top", "wrist")


def make(episode_id: str) -> Episode:
    """Ids ending in `h` are of the other robot; `bad` ones hold a NaN."""
    seed = int(hashlib.sha256(episode_id.encode()).hexdigest()[:8], 16)
    generator = np.random.default_rng(seed)
    length = 6 + seed % 5
    spec = HAND if episode_id.endswith("h") else ARM
    actions = generator.normal(size=(length, len(spec.action))).astype(np.float32)
    actions[:, 1:] = 1
    if "bad" in episode_id:
        actions[2, 0] = np.nan
    level = np.cumsum(np.abs(actions[:, 0])) * 10 % 200
    pictures = [np.full((32, 48, 3), value, np.uint8) for value in np.nan_to_num(level)]
    return Episode(
        episode_id=episode_id,
        embodiment=spec.embodiment,
        fps=10,
        views={"top": video_of(pictures), "wrist": video_of(pictures[::-1])},
        actions_TA=actions,
        proprio_TS=generator.normal(size=(length, len(spec.proprio))).astype(np.float32),
        timestamps_T=np.arange(length) / 10,
        text=f"do {episode_id}",
    )


def source(*ids: str, version: str = "", make=make) -> SimulatedSource:
    ids = ids or tuple(f"e{index}" for index in range(10))
    return SimulatedSource("toy", (ARM, HAND), VIEWS, 10, ids, make, version)


def options(out: Path, **changes) -> ConvertOptions:
    changes = {"size": "48x32", "workers": 1, "episodes_per_shard": 3, **changes}
    return ConvertOptions(out=out, **changes)


def contents(out: Path) -> dict[str, str]:
    """File -> sha256 of all that lies in a directory."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_what_goes_in_comes_out(tmp_path):
    manifest = convert(source("e1", "e2", "e3", "a1h", "a2h"), options(tmp_path / "d", val_episodes=("e2",)))
    dataset = ShardDataset.open(tmp_path / "d")
    dataset.verify_all()
    assert dataset.manifest == manifest
    assert [sample.episode_id for sample in manifest.samples("train")] == ["e1", "e3", "a1h", "a2h"]
    assert [sample.episode_id for sample in manifest.samples("val")] == ["e2"]
    assert [shard.file for shard in manifest.shards] == [
        "shards/train-000000.tar",
        "shards/train-000001.tar",
        "shards/val-000000.tar",
    ]
    for sample in manifest.samples():
        episode, read = make(sample.episode_id), dataset.read(sample.key)
        assert (sample.frames, sample.embodiment, sample.text) == (
            len(episode),
            episode.embodiment,
            episode.text,
        )
        assert (read.actions_TA == episode.actions_TA).all()
        assert (read.proprio_TS == episode.proprio_TS).all()
        assert (read.timestamps_T == episode.timestamps_T).all()
        assert read.video is not None
        for view in VIEWS:
            truth = np.stack(list(episode.views[view].frames())).astype(int)
            assert np.abs(read.video[view] - truth).mean() < 3
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["manifest.json", "shards"]


def test_statistics_are_of_the_train_split_only(tmp_path):
    with pytest.warns(UserWarning, match=r"'arm': action still never changes"):
        manifest = convert(source("e1", "e2", "e3"), options(tmp_path / "d", val_episodes=("e2",)))
    train = np.concatenate([make(episode_id).actions_TA for episode_id in ("e1", "e3")])
    both = np.concatenate([train, make("e2").actions_TA])
    (contract,) = manifest.contracts
    assert contract.action_statistics == Statistics.of(train)
    assert contract.action_statistics != Statistics.of(both)
    assert (contract.rate_hz, contract.action, contract.proprio) == (10, ARM.action, ARM.proprio)
    assert contract.constant_actions() == ["still"]


def test_robot_without_training_episodes_is_refused(tmp_path):
    with pytest.raises(DataError, match="'hand' has no episode to train on"):
        convert(source("e1", "e2", "a1h"), options(tmp_path / "d", val_episodes=("a1h",)))


def test_bad_episodes_are_quarantined_by_name(tmp_path):
    ids = ("e1", "bad1", "e2", "e3", "e4", "e5", "e6", "bad2")
    out = tmp_path / "d"
    with pytest.raises(DataError) as caught:
        convert(source(*ids), options(out, max_quarantined=0.2))
    assert caught.value.exit_code == 2
    assert "2 of 8, allowed are 1" in str(caught.value)
    assert "bad1: action 'v' at row 2: got nan" in str(caught.value)
    assert not (out / "manifest.json").exists()

    manifest = convert(source(*ids), options(out, max_quarantined=0.25))
    reason = "action 'v' at row 2: got nan, expected finite numbers (1 are not)"
    assert [(bad.episode_id, bad.reason) for bad in manifest.quarantined] == [
        ("bad1", reason),
        ("bad2", reason),
    ]
    assert len(manifest.samples()) == 6
    ShardDataset.open(out).verify_all()


def test_split_of_bad_episodes_only(tmp_path):
    manifest = convert(
        source("e1", "e2", "bad1"), options(tmp_path / "d", val_episodes=("bad1",), max_quarantined=0.5)
    )
    assert {shard.split for shard in manifest.shards} == {"train"}
    with pytest.raises(DataError, match="no good episode to train on"):
        convert(source("bad1", "e1"), options(tmp_path / "x", val_episodes=("e1",), max_quarantined=0.9))


def test_errors_of_the_program_are_not_quarantined(tmp_path):
    def broken(episode_id):
        raise KeyError("a bug")

    with pytest.raises(KeyError) as caught:
        convert(source(make=broken), options(tmp_path / "d", val_fraction=0))
    assert caught.value.__notes__ == ["while converting episode 'e0'"]


def test_rerun_does_nothing(tmp_path):
    out = tmp_path / "d"
    first = convert(source(), options(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def never(episode_id):
        raise AssertionError

    assert convert(source(make=never), options(out)) == first
    # Neither the number of workers nor the budget is part of the result.
    assert convert(source(make=never), options(out, workers=4, max_quarantined=0.9)) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_same_bytes_when_repeated(tmp_path):
    convert(source(), options(tmp_path / "a"))
    convert(source(), options(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    convert(source(), options(tmp_path / "a", overwrite=True))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": "32x32"}, "'size'"),
        ({"fit": "pad"}, "'fit'"),
        ({"views": ("top",)}, "'views'"),
        ({"val_episodes": ("e1",)}, "'val'"),
        ({"episodes_per_shard": 4}, "'episodes_per_shard'"),
        ({"trim": "shorter"}, "'trim'"),
    ],
)
def test_other_options_are_refused_by_name(tmp_path, changes, named):
    out = tmp_path / "d"
    convert(source("e1", "e2", "e3", "e4"), options(out))
    before = contents(out)
    with pytest.raises(ConfigError, match=rf"{named}.*--overwrite"):
        convert(source("e1", "e2", "e3", "e4"), options(out, **changes))
    assert contents(out) == before
    convert(source("e1", "e2", "e3", "e4"), options(out, overwrite=True, **changes))
    convert(source("e1", "e2", "e3", "e4"), options(tmp_path / "fresh", **changes))
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_changed_source_is_refused(tmp_path):
    convert(source(), options(tmp_path / "d"))
    with pytest.raises(ConfigError, match="the source is not that of the conversion"):
        convert(source(version="2"), options(tmp_path / "d"))


class StopError(Exception):
    pass


def stopping(at: str, seen: list[str]):
    """A `make` that records whom it made, and stops at one."""

    def stop(episode_id: str) -> Episode:
        if episode_id == at:
            raise StopError
        seen.append(episode_id)
        return make(episode_id)

    return stop


def test_interrupted_work_continues(tmp_path):
    out = tmp_path / "d"
    seen: list[str] = []
    with pytest.raises(StopError):
        convert(source(make=stopping("e8", seen)), options(out, val_episodes=("e1",)))
    assert seen == ["e0", "e2", "e3", "e4", "e5", "e6", "e7"]
    assert not (out / "manifest.json").exists()
    assert not (out / "shards").exists()
    with pytest.raises(ConfigError, match="'size'"):
        convert(source(), options(out, size="32x32", val_episodes=("e1",)))

    seen.clear()
    convert(source(make=stopping("", seen)), options(out, val_episodes=("e1",)))
    assert seen == ["e7", "e8", "e9", "e1"], "two finished shards of three are not made again"
    convert(source(), options(tmp_path / "whole", val_episodes=("e1",)))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_finished_shard_is_checked_before_it_is_kept(tmp_path, damage):
    out = tmp_path / "d"
    with pytest.raises(StopError):
        convert(source(make=stopping("e8", [])), options(out))
    path = out / ".partial" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[700] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-512])
        case "delete":
            path.unlink()
    convert(source(), options(out))
    convert(source(), options(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_while_publishing(tmp_path, monkeypatch):
    """Shards are in place already, the manifest is not: nothing is made again, and nothing is lost."""
    out = tmp_path / "d"

    def killed(self, directory):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", killed)
        with pytest.raises(StopError):
            convert(source(), options(out))
    assert (out / "shards" / "train-000000.tar").exists()
    assert not (out / "manifest.json").exists()
    seen: list[str] = []
    convert(source(make=stopping("", seen)), options(out))
    assert seen == []
    convert(source(), options(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_overwriting_leaves_the_old_dataset_until_the_end(tmp_path):
    out = tmp_path / "d"
    convert(source(), options(out))
    before = contents(out)
    with pytest.raises(StopError):
        convert(source(make=stopping("e8", [])), options(out, size="32x32", overwrite=True))
    assert {name: before[name] for name in before} == {name: contents(out)[name] for name in before}
    ShardDataset.open(out).verify_all()


def test_a_damaged_result_is_not_taken_for_done(tmp_path):
    out = tmp_path / "d"
    convert(source(), options(out))
    (out / "shards" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"missing or cut .*train-000001.tar.*--overwrite"):
        convert(source(), options(out))
    (out / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"unreadable.*--overwrite"):
        convert(source(), options(out))
    convert(source(), options(out, overwrite=True))
    ShardDataset.open(out).verify_all()


def test_two_converters_on_one_output(tmp_path):
    out = tmp_path / "d"
    with locked(out), pytest.raises(DataError, match="another conversion is writing here"):
        convert(source(), options(out))
    convert(source(), options(out))
    assert not (out / staging.LOCK).exists()


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="--out holds other files"):
            convert(source(), options(tmp_path, overwrite=overwrite))
    with pytest.raises(ConfigError, match="expected a directory"):
        convert(source(), options(tmp_path / "thesis.txt"))
    assert contents(tmp_path).keys() == {"thesis.txt"}


def test_disk_full(tmp_path, monkeypatch):
    out = tmp_path / "d"
    add = ShardWriter.add

    def full(self, key, members):
        if key == "e7":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, members)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(DataError, match=r"no space left .*it continues"):
            convert(source(), options(out))
    assert not (out / "manifest.json").exists()
    convert(source(), options(out))
    convert(source(), options(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_end_by_size_too(tmp_path):
    manifest = convert(source(), options(tmp_path / "d", episodes_per_shard=100, shard_mb=1e-6))
    assert [len(shard.samples) for shard in manifest.shards] == [1] * 10


def test_keys_are_safe_and_never_collide():
    assert sample_key("episode_000027") == "episode_000027"
    ids = ["a.b", "a_b", "a b", "../../a", "a/b", "a" * 65, "a" * 66, "-a", "é", "", "ü.mp4", "x-01234567"]
    keys = [sample_key(episode_id) for episode_id in ids]
    assert len(set(keys)) == len(ids)
    assert sample_key(keys[0]) not in keys, "an id that looks like another's key gets another key"
    for key in keys:
        assert key.replace("_", "").replace("-", "").isalnum()
        assert key.isascii()
        assert 0 < len(key) <= 64


def test_two_episodes_under_one_id(tmp_path):
    with pytest.raises(DataError, match="two episodes under one id"):
        convert(source("a", "b", "a"), options(tmp_path / "d"))


def test_split_is_exact_repeatable_and_seeded(tmp_path):
    ids = tuple(f"e{index}" for index in range(40))

    def val(**changes):
        return make_plan(source(*ids), options(tmp_path, **changes)).episodes["val"]

    assert len(val(val_fraction=0.15)) == 6
    assert val(val_fraction=0.15) == val(val_fraction=0.15)
    assert val(val_fraction=0.15) != val(val_fraction=0.15, seed=1)
    assert set(val(val_fraction=0.1)) < set(val(val_fraction=0.3))
    assert val(val_fraction=0) == ()
    assert len(val(val_fraction=0.001)) == 1
    assert val(val_episodes=("7", "e3")) == ("e3", "e7")
    plan = make_plan(source(*ids), options(tmp_path, episodes=("5", "e6", "7"), max_episodes=2))
    assert sorted(plan.episodes["train"] + plan.episodes["val"]) == ["e5", "e6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "100x96"}, r"--size: got 100x96, .*try 96x96"),
        ({"size": "big"}, "--size: got big"),
        ({"size": "0x16"}, "--size"),
        ({"views": ("front",)}, "--views: got front, expected top or wrist"),
        ({"fps": 4}, "whole fraction of the recorded rate: 10, 5"),
        ({"fps": 0}, "--fps"),
        ({"fps": 5}, "action 'f' cannot be resampled"),
        ({"episodes": ("nope",)}, "--episodes: got 'nope', expected an episode of e0, e1"),
        ({"val_episodes": ("99",)}, "--val-episodes: got '99'"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"episodes": ("e1",), "val_episodes": ("e1",)}, "every episode is held out"),
        ({"min_frames": 1}, "--min-frames: got 1, expected at least 2"),
        ({"workers": 0}, "--workers"),
        ({"max_episodes": 0}, "--max-episodes"),
    ],
)
def test_options_that_cannot_be(tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        convert(source(), options(tmp_path / "d", **changes))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "d").exists()


def test_resampled_contract_says_so(tmp_path):
    toy = SimulatedSource("toy", (ARM,), VIEWS, 10, ("e1", "e2", "e3"), make)
    manifest = convert(toy, options(tmp_path / "d", fps=5, val_fraction=0))
    (contract,) = manifest.contracts
    assert (manifest.fps, contract.rate_hz) == (5, 5)
    assert "velocities averaged, last binary command kept" in contract.note


def test_a_source_that_cannot_travel_needs_one_worker(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be sent to worker processes.*workers=1"):
        convert(source(make=lambda episode_id: make(episode_id)), options(tmp_path / "d", workers=2))


def test_conversion_does_not_import_torch():
    program = "import sys, vidworld.data.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_worker_that_dies_is_named(tmp_path):
    """`exec` stands in for a source that takes the whole process down; it pickles, as a lambda would not."""
    deadly = SimulatedSource("toy", (ARM,), VIEWS, 10, ("import os; os._exit(9)", "pass"), exec)
    with pytest.raises(VidworldError, match=r"a worker process died: out of memory .*run again to continue"):
        convert(deadly, options(tmp_path / "d", workers=2))
