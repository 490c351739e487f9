"""Editing datasets: identities, byte-exact copies, statistics, resumption, and what is refused."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from vidworld.cli import run
from vidworld.contract import Dimension, Statistics
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.edit import Filter, Merge, filter_episodes, merge
from vidworld.data.manifest import Manifest, Quarantined
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.base import SimulatedSource, video_of
from vidworld.data.staging import Group, Staging, locked
from vidworld.errors import ContractError, DataError
from vidworld.types import EmbodimentSpec, Episode

ARM = EmbodimentSpec(
    "arm",
    10,
    action=(Dimension("v", "m/s", "velocity"), Dimension("d", "m", "delta"), Dimension("g", "1", "binary")),
    proprio=(Dimension("x", "m", "position"),),
)
HAND = EmbodimentSpec("hand", 10, action=(Dimension("f", "N", "force"),), proprio=())
VIEWS = ("top", "wrist")


def make(episode_id: str, scale: float = 1.0) -> Episode:
    """Ids ending in `h` are of the hand; lengths, texts and outcomes follow from the number in the id."""
    spec = HAND if episode_id.endswith("h") else ARM
    number = int("".join(c for c in episode_id if c.isdigit()))
    generator, length = np.random.default_rng(number), 7 + number % 4
    ground = generator.integers(0, 200, (32, 48, 3))
    pictures = [(ground + index).astype(np.uint8) for index in range(length)]
    return Episode(
        episode_id=episode_id,
        embodiment=spec.embodiment,
        fps=10,
        views={"top": video_of(pictures), "wrist": video_of(pictures[::-1])},
        actions_TA=(scale * generator.normal(size=(length, len(spec.action)))).astype(np.float32),
        proprio_TS=generator.normal(size=(length, len(spec.proprio))).astype(np.float32),
        timestamps_T=np.arange(length) / 10,
        text="pick the banana" if number % 2 else "pour",
        outcome={"success": number % 3 == 0},
    )


def dataset_of(
    out: Path, ids: tuple[str, ...], *, source: str = "toy", scale: float = 1.0, **changes: Any
) -> Path:
    def read(episode_id: str) -> Episode:
        return make(episode_id, scale)

    robots = tuple(s for s in (ARM, HAND) if any((i[-1] == "h") == (s is HAND) for i in ids))
    made = SimulatedSource(source, robots, VIEWS, 10, ids, read)
    convert(
        made, ConvertOptions(out=out, **{"size": "48x32", "workers": 1, "episodes_per_shard": 3} | changes)
    )
    return out


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes of the arm, two of the hand, in five shards; read only."""
    ids = (*(f"e{index}" for index in range(8)), "a8h", "a9h")
    return dataset_of(tmp_path_factory.mktemp("edit") / "eight", ids, val_episodes=("e2", "e5"))


def edit(*arguments: object) -> Manifest:
    """Run `vidworld edit` and read the result of the one dataset it made."""
    words = [str(argument) for argument in arguments]
    assert run(["edit", *words]) == 0
    return Manifest.read(words[words.index("--out") + 1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that `vidworld edit` says when it refuses."""
    capsys.readouterr()
    assert run(["edit", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def members(location: Path | str) -> dict[str, dict[str, bytes]]:
    dataset = ShardDataset.open(location)
    dataset.verify_all()
    return {sample.key: dataset.members(sample.key) for sample in dataset.manifest.samples()}


def contents(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Identities


def test_filter_true_is_the_dataset(eight, tmp_path):
    result = edit("filter", eight, "--where", "frames >= 0", "--out", tmp_path / "d")
    assert result.digest == Manifest.read(eight).digest
    assert members(tmp_path / "d") == members(eight)


def test_filters_compose(eight, tmp_path):
    one = edit("filter", eight, "--where", "frames > 7 and text ~ banana", "--out", tmp_path / "one")
    edit("filter", eight, "--where", "frames > 7", "--out", tmp_path / "half")
    two = edit("filter", tmp_path / "half", "--where", "text ~ BANANA", "--out", tmp_path / "two")
    assert one.digest == two.digest
    assert [sample.key for sample in one.samples()] == ["e1", "e3", "e7", "a9h", "e5"]


def test_filter_by_meta_and_ids(eight, tmp_path):
    rule = "outcome.success == true and embodiment == arm"
    result = edit("filter", eight, "--where", rule, "--exclude", "e0", "--out", tmp_path / "d")
    assert [sample.key for sample in result.samples()] == ["e3", "e6"]
    result = edit("filter", eight, "--include", "e1", "e2", "e4", "--exclude", "e4", "--out", tmp_path / "e")
    assert [(shard.split, sample.key) for shard in result.shards for sample in shard.samples] == [
        ("train", "e1"),
        ("val", "e2"),
    ]
    assert [contract.embodiment for contract in result.contracts] == ["arm"]


def test_statistics_are_of_the_episodes_that_are_left(eight, tmp_path):
    result = edit("filter", eight, "--include", "e1", "e2", "e4", "--out", tmp_path / "d")
    rows = np.concatenate([make(key).actions_TA for key in ("e1", "e4")])
    assert result.contract("arm").action_statistics == Statistics.of(rows)
    assert result.contract("arm").action_statistics != Manifest.read(eight).contract("arm").action_statistics


def test_reshard_there_and_back(eight, tmp_path):
    small = edit("reshard", eight, "--episodes-per-shard", 1, "--out", tmp_path / "small")
    assert [len(shard.samples) for shard in small.shards] == [1] * 10
    assert members(tmp_path / "small") == members(eight)
    back = edit("reshard", tmp_path / "small", "--episodes-per-shard", 3, "--out", tmp_path / "back")
    assert back.digest == Manifest.read(eight).digest != small.digest
    twice = edit("reshard", tmp_path / "back", "--episodes-per-shard", 3, "--out", tmp_path / "twice")
    assert twice.digest == back.digest
    assert small.contracts == back.contracts
    by_size = edit("reshard", eight, "--shard-mb", 0.02, "--out", tmp_path / "mb")
    assert max(len(shard.samples) for shard in by_size.shards) < 3


def test_merge_of_the_parts_is_the_dataset(eight, tmp_path):
    out = tmp_path / "parts"
    assert run(["edit", "split", str(eight), "--parts", "a=0.5", "b=0.3", "c=0.2", "--out", str(out)]) == 0
    sizes = {path.name: len(Manifest.read(path).samples()) for path in sorted(out.iterdir())}
    assert sizes == {"a": 5, "b": 3, "c": 2}
    merged = edit("merge", *(out / name for name in "abc"), "--out", tmp_path / "m")
    assert members(tmp_path / "m") == members(eight)
    for contract in merged.contracts:
        before = Manifest.read(eight).contract(contract.embodiment).action_statistics
        assert contract.action_statistics.count == before.count
        assert contract.action_statistics.q01 == before.q01  # orders differ, quantiles cannot
        assert np.allclose(contract.action_statistics.mean, before.mean)


def test_merge_of_parts_in_order_is_the_dataset_by_digest(tmp_path):
    whole = dataset_of(tmp_path / "whole", ("e0", "e1", "e3", "e4", "e6"), val_fraction=0.0)
    rules = ("a=key in (e0, e1, e3)", "b=rest")
    assert run(["edit", "split", str(whole), "--parts", *rules, "--out", str(tmp_path / "p")]) == 0
    merged = edit("merge", tmp_path / "p/a", tmp_path / "p/b", "--out", tmp_path / "m")
    assert merged.digest == Manifest.read(whole).digest


def test_split_into_train_and_val(eight, tmp_path):
    keys = [sample.key for sample in Manifest.read(eight).samples()]
    result = edit("split", eight, "--val-where", "key in (e0, e7)", "--out", tmp_path / "a")
    assert [sample.key for sample in result.samples("val")] == ["e0", "e7"]
    assert {sample.key for sample in result.samples()} == set(keys)
    assert members(tmp_path / "a") == members(eight)
    same = edit("split", eight, "--val-episodes", "e0", "e7", "--out", tmp_path / "b")
    assert same.digest == result.digest
    rows = np.concatenate([make(s.key).actions_TA for s in same.samples("train") if s.embodiment == "arm"])
    assert same.contract("arm").action_statistics == Statistics.of(rows)
    drawn = edit("split", eight, "--val-fraction", 0.3, "--out", tmp_path / "c")
    again = edit("split", eight, "--val-fraction", 0.3, "--seed", 1, "--out", tmp_path / "d")
    assert len(drawn.samples("val")) == len(again.samples("val")) == 3
    assert drawn.samples("val") != again.samples("val")
    back = edit("split", tmp_path / "a", "--val-episodes", "e2", "e5", "--out", tmp_path / "e")
    assert members(tmp_path / "e") == members(eight)
    assert {s.key for s in back.samples("val")} == {"e2", "e5"}


def test_reencode_of_nothing_is_the_dataset(eight, tmp_path):
    result = edit("reencode", eight, "--size", "48x32", "--fps", 10, "--out", tmp_path / "d")
    assert result.digest == Manifest.read(eight).digest


def test_drop_views_copies_the_rest(eight, tmp_path):
    result = edit("drop-views", eight, "--views", "wrist", "--out", tmp_path / "d")
    assert result.views == ("top",)
    before, after = members(eight), members(tmp_path / "d")
    for key in before:
        assert after[key].keys() == before[key].keys() - {"wrist.mp4"}
        assert all(after[key][name] == before[key][name] for name in after[key] if name != "meta.json")
        old, new = json.loads(before[key]["meta.json"]), json.loads(after[key]["meta.json"])
        assert new == old | {"views": ["top"]}
    assert result.contracts == Manifest.read(eight).contracts


def test_drop_views_and_filter_commute(eight, tmp_path):
    edit("drop-views", eight, "--views", "top", "--out", tmp_path / "a")
    one = edit("filter", tmp_path / "a", "--where", "frames > 8", "--out", tmp_path / "b")
    edit("filter", eight, "--where", "frames > 8", "--out", tmp_path / "c")
    two = edit("drop-views", tmp_path / "c", "--views", "top", "--out", tmp_path / "e")
    assert one.digest == two.digest


def test_reencode_changes_pictures_only(eight, tmp_path):
    result = edit("reencode", eight, "--size", "32x16", "--fit", "stretch", "--out", tmp_path / "d")
    assert (result.width, result.height) == (32, 16)
    before, after = ShardDataset.open(eight), ShardDataset.open(tmp_path / "d")
    clip = after.read("e1")
    assert clip.video is not None
    assert clip.video["top"].shape == (8, 16, 32, 3)
    whole = before.read("e1")
    assert whole.video is not None
    assert abs(float(clip.video["top"].mean()) - float(whole.video["top"].mean())) < 2
    old, new = members(eight), members(tmp_path / "d")
    for key in old:
        assert all(old[key][name] == new[key][name] for name in old[key] if not name.endswith("mp4"))
    coarse = edit("reencode", eight, "--quality", 31, "--out", tmp_path / "q")
    assert sum(s.bytes for s in coarse.shards) < sum(s.bytes for s in before.manifest.shards)


def test_reencode_to_half_the_rate(eight, tmp_path):
    result = edit("reencode", eight, "--fps", 5, "--workers", 1, "--out", tmp_path / "d")
    dataset, truth = ShardDataset.open(tmp_path / "d"), make("e1")
    clip, whole = dataset.read("e1"), ShardDataset.open(eight).read("e1")
    assert result.fps == 5
    assert [contract.rate_hz for contract in result.contracts] == [5, 5]
    assert "velocities averaged" in result.contract("arm").note
    pairs = truth.actions_TA.reshape(4, 2, 3)
    assert np.allclose(clip.actions_TA[:, 0], pairs[:, :, 0].mean(1))
    assert np.allclose(clip.actions_TA[:, 1], pairs[:, :, 1].sum(1))
    assert np.array_equal(clip.actions_TA[:, 2], pairs[:, 1, 2])
    assert np.array_equal(clip.proprio_TS, truth.proprio_TS[::2])
    assert np.array_equal(clip.timestamps_T, truth.timestamps_T[::2])
    assert (clip.meta["fps"], clip.meta["frames"], clip.meta["source"]["decimation"]) == (5, 4, 2)
    assert clip.video is not None
    assert whole.video is not None
    assert np.abs(clip.video["top"].astype(int) - whole.video["top"][::2]).mean() < 3
    assert result.contract("arm").action_statistics.count == sum(
        sample.frames for sample in result.samples("train") if sample.embodiment == "arm"
    )


# Merging


def test_merge_pools_statistics_and_renames(tmp_path):
    one = dataset_of(tmp_path / "one", ("e0", "e1"), source="lab one", val_fraction=0.0)
    two = dataset_of(tmp_path / "two", ("e1", "e3"), source="lab/two", val_fraction=0.0, scale=10.0)
    with pytest.warns(UserWarning, match="1 keys occurred before and were renamed: e1 is lab_two-e1"):
        ((_, result),) = merge(Merge(sources=(one, two), out=tmp_path / "m"))
    assert [sample.key for sample in result.samples()] == ["e0", "e1", "lab_two-e1", "e3"]
    assert [sample.episode_id for sample in result.samples()] == ["e0", "e1", "e1", "e3"]
    rows = [make(key).actions_TA for key in ("e0", "e1")] + [
        make(key, 10.0).actions_TA for key in ("e1", "e3")
    ]
    assert result.contract("arm").action_statistics == Statistics.of(np.concatenate(rows))
    assert result.name == "lab one+lab/two"
    assert [source["name"] for source in result.options["sources"]] == ["lab one", "lab/two"]
    assert members(tmp_path / "m")["lab_two-e1"] == members(two)["e1"]


def test_merge_of_different_robots(tmp_path):
    one = dataset_of(tmp_path / "one", ("e0", "e1"))
    two = dataset_of(tmp_path / "two", ("a2h", "a3h"))
    result = edit("merge", one, two, "--out", tmp_path / "m", "--name", "both")
    assert [contract.embodiment for contract in result.contracts] == ["arm", "hand"]
    assert result.name == "both"


def changed(directory: Path, out: Path, **changes: Any) -> Path:
    """A copy of a dataset whose manifest says otherwise."""
    fsspec.filesystem("file").copy(f"{directory}/", f"{out}/", recursive=True)
    dataclasses.replace(Manifest.read(directory), **changes).write(out)
    return out


def test_merge_refuses_by_name(eight, latents_dir, tmp_path, capsys):
    manifest = Manifest.read(eight)
    arm = manifest.contract("arm")
    wide = dataclasses.replace(
        arm,
        action=(*arm.action, Dimension("w")),
        action_statistics=Statistics.of(np.zeros((2, 4))),
    )
    moved = dataclasses.replace(arm, control_frame="base")
    hand = manifest.contract("hand")
    for index, (changes, says) in enumerate(
        [
            ({"contracts": (wide, hand)}, r"action of embodiment 'arm' in other: got 4 \(v m/s velocity"),
            ({"contracts": (moved, hand)}, "control frame of embodiment 'arm' in other: got base"),
            (
                {"fps": 5.0},
                "frames per second of 'other': got 5.0, expected 10.0 as of 'toy'.*reencode --fps 5",
            ),
            (
                {"height": 64},
                "size of 'other': got 48x64, expected 48x32.*vidworld edit reencode --size 48x32",
            ),
            ({"views": ("top",)}, "views of 'other': got top, expected top, wrist as in 'toy'.*--views"),
        ]
    ):
        other = changed(eight, tmp_path / str(index), name="other", **changes)
        with pytest.raises((DataError, ContractError), match=says):
            merge(Merge(sources=(eight, other), out=tmp_path / "m"))
    says = refused(capsys, "merge", eight, latents_dir, "--out", tmp_path / "m")
    assert "kind of dataset of 'toy': got latents, expected video" in says
    assert "'toy' twice" in refused(capsys, "merge", eight, eight, "--out", tmp_path / "m")
    assert "two or more" in refused(capsys, "merge", eight, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_merge_with_common_views(eight, tmp_path, capsys):
    one = edit("drop-views", eight, "--views", "wrist", "--out", tmp_path / "top")
    other = dataset_of(tmp_path / "more", ("e20", "e21"), val_fraction=0.0)
    result = edit("merge", tmp_path / "top", other, "--views", "top", "--out", tmp_path / "m")
    assert result.views == ("top",)
    assert len(result.samples()) == len(one.samples()) + 2
    assert "wrist.mp4" not in members(tmp_path / "m")["e20"]
    says = refused(capsys, "merge", tmp_path / "top", other, "--views", "wrist", "--out", tmp_path / "n")
    assert "--views in toy: got wrist, expected top" in says


# Latents


def test_latents_are_edited_too(latents_dir, tmp_path, capsys):
    same = edit("filter", latents_dir, "--where", "frames > 0", "--out", tmp_path / "a")
    assert same.digest == Manifest.read(latents_dir).digest
    edit("reshard", latents_dir, "--episodes-per-shard", 1, "--out", tmp_path / "b")
    assert members(tmp_path / "b") == members(latents_dir)
    says = refused(capsys, "reencode", latents_dir, "--size", "16x16", "--out", tmp_path / "c")
    assert "dataset to re-encode" in says
    assert "got latents, expected video; re-encode the videos" in says


# Carried, refused, repeated


def test_quarantine_and_provenance_are_carried(eight, tmp_path):
    bad = (Quarantined("e99", "NaN"),)
    source = changed(eight, tmp_path / "s", quarantined=bad)
    result = edit("filter", source, "--include", "e1", "--out", tmp_path / "d")
    assert result.quarantined == bad
    options = result.options
    assert options["edit"] == "filter"
    assert options["sources"] == [{"name": "toy", "digest": Manifest.read(eight).digest}]
    assert options["made_from"][0]["options"]["source"] == "toy"
    assert str(tmp_path) not in json.dumps(options)


def test_held_out_robot_keeps_its_statistics(eight, tmp_path):
    options = Filter(source=eight, where="split == val or embodiment == hand", out=tmp_path / "d")
    with pytest.warns(UserWarning, match="'arm' has no episode to train on here: its statistics stay"):
        ((_, result),) = filter_episodes(options)
    assert result.contract("arm") == Manifest.read(eight).contract("arm")
    assert not [sample for sample in result.samples("train") if sample.embodiment == "arm"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("filter",), "filter: got no condition"),
        (("filter", "--where", "frames > 1000"), "no episode is left in toy"),
        (
            ("filter", "--where", "frame > 1"),
            "field 'frame' of the rule in toy: got no episode has it, expected",
        ),
        (("filter", "--where", "frames >"), "column 9: got the end, expected a value"),
        (("filter", "--where", "text > 3"), "expected numbers on both sides"),
        (("filter", "--include", "e77"), "--include: got 'e77', expected an episode of e0"),
        (("reshard",), "reshard: got no size"),
        (("reshard", "--episodes-per-shard", "0"), "--episodes-per-shard: got 0"),
        (("split",), "how to split: got 0 ways"),
        (("split", "--val-fraction", "0.1", "--val-episodes", "e1"), "how to split: got 2 ways"),
        (("split", "--val-fraction", "1"), "--val-fraction: got 1.0"),
        (("split", "--parts", "a=0.5", "b=0.6"), "shares of the parts: got a=0.5, b=0.6"),
        (("split", "--parts", "a=frames > 8"), "parts for episode 'e0': got none, expected exactly one"),
        (("split", "--parts", "a=frames > 8", "b=frames > 7", "c=rest"), "got a, b, expected exactly one"),
        (("split", "--parts", "../a=0.5", "b=0.5"), "--parts: got '../a=0.5'"),
        (("reencode", "--size", "50x30"), "--size: got 50x30"),
        (("split", "--val-where", "frames > 100"), "held-out episodes: got no episode"),
        (("split", "--val-where", "frames > 1"), "held-out episodes: got every episode"),
        (("reencode", "--fps", "3"), "--fps: got 3, expected a whole fraction of the rate: 10, 5, 3.33333"),
        (("reencode", "--fps", "0"), "--fps: got 0"),
        (("reencode", "--fps", "1.25"), "at 1.25 fps: got 1, expected at least 2"),
        (("reencode", "--quality", "40"), "--quality: got 40"),
        (("drop-views", "--views", "left"), "--views: got left, expected top or wrist"),
        (("drop-views", "--views", "top", "wrist"), "--views: got all of them"),
        (("mrge",), "operation: got 'mrge'"),
    ],
)
def test_refused_in_one_line(eight, tmp_path, capsys, arguments, says):
    assert says in refused(capsys, arguments[0], eight, *arguments[1:], "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_source_is_never_overwritten(eight, capsys):
    before = contents(eight)
    says = refused(capsys, "reshard", eight, "--episodes-per-shard", 1, "--out", eight, "--overwrite")
    assert "--out is a source" in says
    assert contents(eight) == before


def test_repeated_does_nothing_and_other_options_are_refused(eight, tmp_path, capsys):
    out = tmp_path / "d"
    edit("filter", eight, "--where", "frames > 8", "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    edit("filter", eight, "--where", "frames > 8", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "pass --overwrite" in refused(capsys, "filter", eight, "--where", "frames > 7", "--out", out)
    assert len(edit("filter", eight, "--where", "frames > 7", "--out", out, "--overwrite").samples()) == 7
    edit("filter", eight, "--where", "frames > 7", "--out", tmp_path / "e")
    assert contents(out) == contents(tmp_path / "e")


def test_unknown_kinds_cannot_change_their_rate(eight, tmp_path, capsys):
    manifest = Manifest.read(eight)
    hand = dataclasses.replace(manifest.contract("hand"), action=(Dimension("f"),))
    other = changed(eight, tmp_path / "s", contracts=(manifest.contract("arm"), hand))
    says = refused(capsys, "reencode", other, "--fps", 5, "--out", tmp_path / "d")
    assert "action 'f' cannot be resampled: got kind unknown" in says


def test_damaged_source_stops_the_edit(eight, tmp_path, capsys):
    source = changed(eight, tmp_path / "s")
    path = source / "shards/train-000001.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    says = refused(capsys, "reshard", source, "--episodes-per-shard", 2, "--out", tmp_path / "d")
    assert "shard shards/train-000001.tar is damaged" in says
    assert not (tmp_path / "d/manifest.json").exists()
    fsspec.filesystem("file").copy(str(eight / "shards/train-000001.tar"), str(path))
    result = edit("reshard", source, "--episodes-per-shard", 2, "--out", tmp_path / "d")  # goes on
    assert result.digest == edit("reshard", eight, "--episodes-per-shard", 2, "--out", tmp_path / "e").digest


KILL = """
import os, signal, sys
from vidworld.data import staging
finish, count = staging.Staging.finish, int(sys.argv[1])
def dies(self, index, group):
    global count
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    finish(self, index, group)
staging.Staging.finish = dies
from vidworld.cli import run
run(sys.argv[2:])
"""


@pytest.mark.parametrize("count", [0, 2, 4])
def test_killed_edits_go_on(eight, tmp_path, count):
    words = ["edit", "reshard", str(eight), "--episodes-per-shard", "2", "--out", str(tmp_path / "d")]
    done = subprocess.run([sys.executable, "-c", KILL, str(count), *words], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "d/manifest.json").exists()
    assert len(list((tmp_path / "d/.partial").glob("*.json"))) == 1 + count
    edit(*words[1:])
    edit(*words[1:-1], tmp_path / "e")
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_two_edits_of_one_output(eight, tmp_path, capsys):
    with locked(tmp_path / "d"):
        says = refused(capsys, "reshard", eight, "--episodes-per-shard", 2, "--out", tmp_path / "d")
    assert "another conversion is writing here" in says


def test_full_disk_leaves_work_to_go_on_from(eight, tmp_path, capsys, monkeypatch):
    words = ("reshard", eight, "--episodes-per-shard", 2, "--out", tmp_path / "d")
    finish, left = Staging.finish, [2]

    def full(self: Staging, index: int, group: Group) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        finish(self, index, group)

    monkeypatch.setattr(Staging, "finish", full)
    assert "no space left in" in refused(capsys, *words)
    monkeypatch.setattr(Staging, "finish", finish)
    assert edit(*words).digest == edit(*words[:-1], tmp_path / "e").digest


def test_other_files_are_left_alone(eight, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    says = refused(capsys, "reshard", eight, "--episodes-per-shard", 2, "--out", tmp_path)
    assert "--out holds other files" in says


def test_worker_processes_give_the_same_bytes(eight, tmp_path):
    for workers in (1, 2):
        edit("reencode", eight, "--size", "32x16", "--workers", workers, "--out", tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_edit_between_urls(eight, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDWORLD_CACHE", str(tmp_path / "cache"))
    memory: Any = fsspec.filesystem("memory")
    memory.put(f"{eight}/", "/eight/", recursive=True)
    result = edit("filter", "memory://eight", "--where", "frames > 8", "--out", "memory://long")
    local = edit("filter", eight, "--where", "frames > 8", "--out", tmp_path / "local")
    assert result.digest == local.digest
    assert members("memory://long") == members(tmp_path / "local")
    edit("filter", "memory://eight", "--where", "frames > 8", "--out", "memory://long")
    memory.store.clear()


def test_help_names_all_operations(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stopped:
            run(["edit", *arguments])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert all(
            name in shown for name in ("merge", "split", "reshard", "filter", "reencode", "drop-views")
        )
