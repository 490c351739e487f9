import dataclasses

import numpy as np
import pytest

from vidworld.contract import Statistics
from vidworld.data.inspection.figures import MAX_POINTS, thinned
from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.lag import MAX_LAG, action_curve, find_pairs, video_curve
from vidworld.data.inspection.survey import choose, look_at, read
from vidworld.data.manifest import Manifest, Sample, Shard
from vidworld.data.shards import ShardDataset
from vidworld.errors import DataError


def big_manifest(manifest: Manifest, count: int, rare: int = 0) -> Manifest:
    """The manifest with `count` episodes that no shard holds, the last `rare` of a second embodiment."""
    other = dataclasses.replace(manifest.contracts[0], embodiment="rare")
    samples = [
        Sample(
            f"e-{i}",
            40 + i % 7,
            "rare" if i >= count - rare else manifest.contracts[0].embodiment,
            f"e-{i}",
            "push",
        )
        for i in range(count)
    ]
    shards = tuple(
        Shard(
            f"shards/train-{i:06d}.tar",
            "0" * 64,
            10**8,
            "train" if i else "val",
            tuple(samples[i * 64 : i * 64 + 64]),
        )
        for i in range(-(-count // 64))
    )
    return dataclasses.replace(
        manifest, shards=shards, contracts=(*manifest.contracts, other)[: 1 + bool(rare)]
    )


def test_choice_is_pure_spread_and_fair(clean):
    manifest = big_manifest(clean.manifest, 1000, rare=10)
    keys = choose(manifest, 60, seed=3)
    assert keys == choose(manifest, 60, seed=3) != choose(manifest, 60, seed=4)
    assert len(set(keys)) == 60
    numbers = [int(key.removeprefix("e-")) for key in keys]
    assert numbers == sorted(numbers), "in shard order"
    assert sum(number >= 990 for number in numbers) == 10, "all of the rare robot"
    assert len({number // 250 for number in numbers if number < 990}) == 4
    assert choose(manifest, 5000) == [sample.key for sample in manifest.samples()]


def test_reading_keeps_tables_and_measures_pictures(clean_dir, clean):
    dataset = ShardDataset.open(clean_dir)
    assert [look.sample.key for look in clean.looks] == [s.key for s in dataset.manifest.samples()]
    for look in clean.looks[:3]:
        episode = dataset.read(look.sample.key)
        assert episode.video is not None
        assert np.array_equal(look.actions_TA, episode.actions_TA)
        assert np.array_equal(look.timestamps_T, episode.timestamps_T)
        seen = look.views["top"]
        weights = [0.299, 0.587, 0.114]
        assert np.allclose(seen.brightness_T, (episode.video["top"] @ weights).mean((1, 2)), atol=0.5)
        assert len(seen.change_T) == len(episode.actions_TA) - 1
        assert np.array_equal(seen.thumbnails[0], episode.video["top"][0])
        assert np.array_equal(seen.thumbnails[-1], episode.video["top"][-1])
    assert [look.split for look in clean.looks].count("val") == 1


def test_the_result_does_not_depend_on_the_number_of_threads(clean_dir, clean):
    threaded = read(ShardDataset.open(clean_dir), [look.sample.key for look in clean.looks], workers=4)
    for one, other in zip(clean.looks, threaded.looks, strict=True):
        assert one.sample == other.sample
        assert np.array_equal(one.views["top"].change_T, other.views["top"].change_T)


def test_repeated_pictures_change_by_exactly_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (6, 80, 100, 3), dtype=np.uint8)
    frames[3] = frames[2]
    change_T = look_at(frames).change_T
    assert change_T[2] == 0
    assert (np.delete(change_T, 2) > 10).all()


def test_long_episodes_are_read_in_part_and_few_are_pictured(clean_dir, monkeypatch):
    monkeypatch.setattr("vidworld.data.inspection.survey.MAX_FRAMES", 20)
    monkeypatch.setattr("vidworld.data.inspection.survey.MAX_PICTURED", 2)
    dataset = ShardDataset.open(clean_dir)
    looks = read(dataset, choose(dataset.manifest, 10), workers=1).looks
    assert {(look.start, len(look.actions_TA)) for look in looks} == {(10, 20)}
    assert sum(bool(look.views["top"].thumbnails) for look in looks) == 5  # 2, and 4 of every embodiment
    monkeypatch.setattr("vidworld.data.inspection.survey.MAX_BYTES", 15 * 3 * 32 * 32)
    assert {len(look.actions_TA) for look in read(dataset, choose(dataset.manifest, 2)).looks} == {15}


def test_damage_is_named(clean_dir, tmp_path):
    (tmp_path / "shards").mkdir()
    for path in clean_dir.glob("**/*.*"):
        content = bytearray(path.read_bytes())
        if path.name == "val-000000.tar":
            content[:512] = bytes(512)
        (tmp_path / path.relative_to(clean_dir)).write_bytes(content)
    dataset = ShardDataset.open(tmp_path, verify=False)
    with pytest.raises(DataError, match=r"shard shards/val-000000\.tar is damaged"):
        read(dataset, choose(dataset.manifest, 10))


def test_lag_curves_are_right_about_noise_and_delay(clean):
    """A white command delayed by two frames: correlation 1 at lag 2 and none elsewhere."""
    contract, looks = clean.manifest.contracts[0], []
    for index, look in enumerate(clean.looks):
        command = np.random.default_rng(index).normal(0, 1, len(look.actions_TA))
        motion = np.concatenate([[0, 0, 0], command[:-3]]) * 0.1
        actions, states = look.actions_TA.copy(), look.proprio_TS.copy()
        actions[:, 0], states[:, 0] = command, np.cumsum(motion)
        looks.append(dataclasses.replace(look, actions_TA=actions, proprio_TS=states))
    contract = dataclasses.replace(
        contract,
        action_statistics=Statistics.of(np.concatenate([look.actions_TA for look in looks])),
        proprio_statistics=Statistics.of(np.concatenate([look.proprio_TS for look in looks])),
    )
    pair, *_ = find_pairs(contract, looks)
    assert (pair.action, pair.proprio, pair.lag) == (0, 0, 2)
    assert pair.correlation == pytest.approx(1, abs=1e-4)
    assert pair.slope == pytest.approx(1, abs=1e-3)
    curve = action_curve(contract, looks, [pair])
    assert curve is not None
    assert curve.lags == tuple(range(-MAX_LAG, MAX_LAG + 1))
    assert curve.peak == 2
    assert curve.at(2) == pytest.approx(1, abs=1e-4)
    assert max(abs(curve.at(lag)) for lag in curve.lags if lag != 2) < 0.15
    assert curve.shifted(0.5)
    assert action_curve(contract, looks[:2], [pair]) is None, "two episodes prove nothing"


def test_chance_is_no_lag(clean):
    """Pictures that have nothing to do with the robot: whatever peaks is not beyond doubt."""
    shifted = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        looks = []
        for look in clean.looks:
            seen = dataclasses.replace(
                look.views["top"], change_T=generator.exponential(size=len(look.actions_TA) - 1)
            )
            looks.append(dataclasses.replace(look, views={"top": seen}))
        curve = video_curve(clean, looks, "top")
        assert curve is not None
        shifted += curve.shifted(0.25)
    assert shifted == 0


def test_thinned_traces_keep_spikes():
    values = np.zeros(100_000)
    values[777], values[55_555] = 9, -9
    places, kept = thinned(values)
    assert len(kept) <= MAX_POINTS
    assert (kept.max(), kept.min()) == (9, -9)
    assert (np.diff(places) > 0).all()


def test_words():
    assert named(["a", "b", "c"], 2) == "a, b and 1 more"
    finding = Finding("units", "too large", "embodiment 'x'", "9", "1", "mend it")
    assert str(finding) == "too large in embodiment 'x': got 9, expected 1; mend it"
    assert list(finding.to_mapping()) == ["detector", "what", "where", "got", "expected", "fix"]
