"""Rates, mappings and what identifies a conversion."""

import dataclasses

import numpy as np
import pytest

from vidworld.contract import Dimension
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.manifest import Manifest
from vidworld.data.plan import make_plan
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.base import SimulatedSource, video_of
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode

ARM = EmbodimentSpec(
    "arm",
    15,
    action=(Dimension("v", "m/s", "velocity"), Dimension("grip", "1", "binary")),
    proprio=(Dimension("x", "m", "position"), Dimension("lift", "mm", "position")),
)


def make(episode_id: str, fps: float = 15) -> Episode:
    generator = np.random.default_rng(int(episode_id))
    actions = np.stack([generator.normal(size=18), generator.integers(0, 2, 18)], 1)
    pictures = [np.full((32, 48, 3), 10 * index, np.uint8) for index in range(18)]
    return Episode(
        episode_id,
        "arm",
        fps,
        {"top": video_of(pictures)},
        actions.astype(np.float32),
        generator.normal(size=(18, 2)).astype(np.float32),
        np.arange(18) / (fps or 1),
    )


def unclocked(episode_id: str) -> Episode:
    return make(episode_id, fps=0)


LOGS = SimulatedSource("logs", (ARM,), ("top",), 15, ("1", "2", "3"), make)
NO_RATE = dataclasses.replace(
    LOGS, fps=0.0, embodiments=(dataclasses.replace(ARM, rate_hz=0.0),), make=unclocked
)


def options(out, **changes) -> ConvertOptions:
    return ConvertOptions(out=out, **{"size": "48x32", "workers": 1, "val_episodes": ("3",), **changes})


def test_a_rate_that_the_logs_do_not_say(tmp_path, contract_file):
    for changes in ({"contract": contract_file("rate_hz: 15")}, {"fps": 15.0}):
        manifest = convert(NO_RATE, options(tmp_path / "d", overwrite=True, **changes))
        assert (manifest.fps, manifest.contracts[0].rate_hz) == (15, 15)
        read = ShardDataset.open(tmp_path / "d").read("1")
        assert read.timestamps_T == pytest.approx(np.arange(18) / 15)
        assert manifest.options["rates"] == {"arm": 15}
    halved = convert(NO_RATE, options(tmp_path / "h", fps=5.0, contract=contract_file("rate_hz: 15")))
    assert {sample.frames for sample in halved.samples()} == {6}
    assert Manifest.read(tmp_path / "h") == halved


def test_no_rate_at_all(tmp_path):
    with pytest.raises(
        ConfigError, match=r"rows a second of embodiment 'arm' in logs: .*rate_hz .*--fps"
    ) as caught:
        convert(NO_RATE, options(tmp_path / "d"))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "d").exists()


def test_a_rate_that_the_logs_contradict(tmp_path, contract_file):
    with pytest.raises(
        ConfigError, match=r"rate_hz of embodiment 'arm': got 10, expected 15 as the logs say"
    ):
        make_plan(LOGS, options(tmp_path, contract=contract_file("rate_hz: 10")))
    make_plan(LOGS, options(tmp_path, contract=contract_file("rate_hz: 15.01")))


def test_robots_of_several_rates_need_one_choice(tmp_path):
    hand = dataclasses.replace(ARM, embodiment="hand")
    source = dataclasses.replace(NO_RATE, embodiments=(ARM, hand))
    files = []
    for name, rate in (("arm", 15), ("hand", 30)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"applies_to: {name}\nrate_hz: {rate}")
    with pytest.raises(
        ConfigError, match="several rates in one dataset: got arm 15, hand 30; choose one with --fps"
    ):
        make_plan(source, options(tmp_path, contract=tuple(files)))
    assert make_plan(source, options(tmp_path, contract=tuple(files), fps=15)).recipe.fps == 15


def test_another_rate_is_refused_unless_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"got 15, asked for 10, .*15, 7.5, 5,.*--resample nearest") as caught:
        convert(LOGS, options(tmp_path / "d", fps=10))
    assert caught.value.exit_code == 2
    manifest = convert(LOGS, options(tmp_path / "d", fps=10, resample="nearest"))
    assert {sample.frames for sample in manifest.samples()} == {12}
    assert manifest.contracts[0].note == (
        "frames nearest in time, proprioception interpolated; "
        "one action stands for several recorded ones: velocities averaged, last binary command kept"
    )
    assert manifest.options["resample"] == "nearest"
    with pytest.raises(DataError, match="got 15, asked for 30"):
        make_plan(LOGS, options(tmp_path, fps=30))
    with pytest.raises(DataError, match="got 15, asked for 20, expected at most the recorded rate"):
        make_plan(LOGS, options(tmp_path, fps=20, resample="nearest"))


def test_numbers_of_unknown_kind_are_not_interpolated(tmp_path):
    vague = dataclasses.replace(LOGS, embodiments=(dataclasses.replace(ARM, proprio=(Dimension("q"),) * 2),))
    with pytest.raises(DataError, match=r"proprio 'q' cannot be resampled.*--contract"):
        make_plan(vague, options(tmp_path, fps=10, resample="nearest"))


def test_the_mapping_is_part_of_the_dataset(tmp_path, contract_file):
    text = (
        "proprio: {lift: {unit: mm, to: m}}\naction: {grip: {invert: true}}\naction_keep: [grip, v]\ntext: go"
    )
    plain = convert(LOGS, options(tmp_path / "plain"))
    mapped = convert(LOGS, options(tmp_path / "mapped", contract=contract_file(text)))
    assert plain.digest != mapped.digest
    assert "mapping" not in plain.options
    assert mapped.options["mapping"]["arm"]["action"]["keep"] == ["grip", "v"]
    assert mapped.contracts[0].note == "action: grip = 1 - x; proprio: lift = mm to m"
    assert [d.unit for d in mapped.contracts[0].proprio] == ["m", "m"]
    before, after = (ShardDataset.open(tmp_path / name).read("1") for name in ("plain", "mapped"))
    assert after.actions_TA == pytest.approx(
        np.stack([1 - before.actions_TA[:, 1], before.actions_TA[:, 0]], 1)
    )
    assert after.proprio_TS == pytest.approx(before.proprio_TS * [1, 0.001])
    assert after.meta["text"] == "go"
    assert {sample.text for sample in mapped.samples()} == {"go"}
    with pytest.raises(ConfigError, match="'contract'"):
        convert(LOGS, options(tmp_path / "mapped"))


def test_two_mappings_with_equal_dimensions_are_two_datasets(tmp_path, contract_file):
    out = tmp_path / "d"
    convert(LOGS, options(out, contract=contract_file("text: go")))
    with pytest.raises(ConfigError, match="'mapping'"):
        convert(LOGS, options(out, contract=contract_file("text: stop")))


def test_identity_of_what_was_converted_before_stays(tmp_path):
    """Without new options the keys are those that vidworld 0.1 wrote: it is complete, not made anew."""
    identity = make_plan(LOGS, options(tmp_path)).identity
    assert not {"mapping", "rates", "resample"} & identity.keys()
    assert identity["contract"]["arm"]["action"][0] == {"name": "v", "unit": "m/s", "kind": "velocity"}


def test_manifests_with_a_whole_rate_keep_their_digest(tmp_path):
    manifest = dataclasses.replace(convert(LOGS, options(tmp_path / "d")), fps=15)
    manifest.write(tmp_path / "d")
    assert Manifest.read(tmp_path / "d").digest == manifest.digest
