"""`vidworld rollout --lerobot`: imagined episodes open as any other dataset and are what was imagined."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from vidworld import cli, media
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.dreams import check_world, is_imagined
from vidworld.evaluation.lab_truth import kind_of
from vidworld.world.spec import WorldSpec

CONTEXT, FRAMES, SAMPLES, SEED = 3, 5, 2, 7


@pytest.fixture(scope="module")
def episode(planar_data) -> str:
    return ShardDataset.open(planar_data).manifest.samples("val")[0].key


@pytest.fixture(scope="module")
def dreamt(untrained_run, planar_data, episode, tmp_path_factory):
    """A rollout with its dataset: (output directory, its LeRobot source)."""
    out = tmp_path_factory.mktemp("dreams") / "out"
    arguments = ["--prompt", episode, "--data", planar_data, "--context", CONTEXT, "--frames", FRAMES]
    arguments += ["--samples", SAMPLES, "--seed", SEED, "--out", out, "--lerobot"]
    assert cli.run(["rollout", str(untrained_run), *map(str, arguments)]) == 0
    return out, LeRobotSource(out / "lerobot")


def test_one_episode_a_sample_and_the_numbers_are_what_was_imagined(dreamt, planar_data, episode):
    out, source = dreamt
    assert source.episode_ids() == ["episode_000000", "episode_000001"]
    recorded = ShardDataset.open(planar_data).read(episode)
    commands = np.load(out / "actions.npy", allow_pickle=False)
    predicted_NTS = np.load(out / "proprio.npz", allow_pickle=False)["predicted_NTS"]
    for sample, name in enumerate(source.episode_ids()):
        read = source.read(name)
        assert len(read) == CONTEXT + FRAMES
        assert np.array_equal(read.proprio_TS[:CONTEXT], recorded.proprio_TS[:CONTEXT])
        assert np.array_equal(read.proprio_TS[CONTEXT:], predicted_NTS[sample])
        # actions[t] leads from frame t to t + 1; the last one is held.
        assert np.array_equal(read.actions_TA[: CONTEXT - 1], recorded.actions_TA[: CONTEXT - 1])
        assert np.array_equal(read.actions_TA[CONTEXT - 1 : -1], commands)
        assert np.array_equal(read.actions_TA[-1], commands[-1])
        assert np.allclose(np.diff(read.timestamps_T), 1 / source.fps)
        assert read.text == ShardDataset.open(planar_data).sample(episode).text
    first, second = (source.read(name).proprio_TS for name in source.episode_ids())
    assert np.array_equal(first[:CONTEXT], second[:CONTEXT])
    assert not np.array_equal(first[CONTEXT:], second[CONTEXT:])


def test_the_frames_are_the_prompt_and_then_the_dream(dreamt):
    out, source = dreamt
    for sample, name in enumerate(source.episode_ids()):
        shown, _ = media.read_video(out / f"sample-{sample:03d}.mp4")
        view = source.read(name).views[source.views[0]]
        frames = np.stack(list(view.frames()))
        assert frames.shape == shown.shape
        # Both went through H.264, each on its own; one frame off is further off.
        error = np.abs(frames.astype(float) - shown).mean()
        assert error < 4
        assert np.abs(frames[1:].astype(float) - shown[:-1]).mean() > 1.2 * error


def test_context_is_marked_and_provenance_kept(dreamt, untrained_run, episode):
    out, _ = dreamt
    rows = pq.read_table(next((out / "lerobot/data").rglob("*.parquet")))
    assert rows["is_context"].to_pylist() == SAMPLES * [*CONTEXT * [True], *FRAMES * [False]]
    episodes = pq.read_table(next((out / "lerobot/meta/episodes").rglob("*.parquet"))).to_pylist()
    assert [(row["vidworld/seed"], row["vidworld/sample"]) for row in episodes] == [(SEED, 0), (SEED, 1)]
    record = json.loads((out / "rollout.json").read_text())
    origin = json.loads(episodes[1]["vidworld/source"])
    assert origin["imagined"] is True
    assert origin["prompt"] == record["prompt"]
    assert origin["prompt"]["key"] == episode
    assert origin["world"]["weights_sha256"] == record["world"]["weights_sha256"]
    note = json.loads((out / "lerobot/meta/vidworld.json").read_text())
    assert note["imagined"] is True
    assert note["contract"] == WorldSpec.read(untrained_run).contracts[0].to_mapping()


def test_dreams_become_shards_that_say_where_they_came_from(dreamt, untrained_run, tmp_path):
    _, source = dreamt
    manifest = convert(
        source, ConvertOptions(out=tmp_path / "dreams", size="32x32", val_fraction=0, workers=1)
    )
    assert [sample.frames for sample in manifest.samples()] == SAMPLES * [CONTEXT + FRAMES]
    (contract,), (own,) = manifest.contracts, WorldSpec.read(untrained_run).contracts
    assert (contract.embodiment, contract.action, contract.proprio) == (
        own.embodiment,
        own.action,
        own.proprio,
    )
    meta = ShardDataset.open(tmp_path / "dreams").read("episode_000001").meta
    assert meta["source"]["episode_id"] == f"dream-{SEED}-1"
    assert meta["source"]["origin"]["imagined"] is True
    assert is_imagined(meta["source"])
    with pytest.raises(DataError, match="an imagined episode"):
        kind_of(meta, where="here")


def test_recorded_episodes_do_not_pass_for_imagined_ones(planar_data, episode):
    assert not is_imagined(ShardDataset.open(planar_data).meta(episode)["source"])
    assert not is_imagined({"imagined": False, "origin": [{"world": "lab_paint"}, None, 3]})
    assert is_imagined({"origin": {"made_of": [{"imagined": True}]}})


def test_a_picture_gives_the_proprioception_that_the_world_read_off_it(untrained_run, tmp_path):
    picture = tmp_path / "scene.png"
    media.write_png(picture, np.full((32, 32, 3), 90, np.uint8))
    arguments = ["rollout", untrained_run, "--prompt", picture, "--frames", 4, "--samples", 1, "--lerobot"]
    assert cli.run([*map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    source = LeRobotSource(tmp_path / "out/lerobot")
    read = source.read("episode_000000")
    predicted_NTS = np.load(tmp_path / "out/proprio.npz", allow_pickle=False)["predicted_NTS"]
    assert len(read) == 5
    assert np.array_equal(read.proprio_TS[1:], predicted_NTS[0])
    assert np.isfinite(read.proprio_TS[0]).all()
    rows = pq.read_table(next((tmp_path / "out/lerobot/data").rglob("*.parquet")))
    assert rows["is_context"].to_pylist() == [True, *4 * [False]]


def test_without_the_flag_there_is_no_dataset_and_an_old_one_is_not_added_to(
    dreamt, untrained_run, planar_data, episode, capsys
):
    out, _ = dreamt
    arguments = ["rollout", str(untrained_run), "--prompt", episode, "--data", str(planar_data)]
    assert cli.run([*arguments, "--frames", "2", "--samples", "1", "--out", str(out), "--lerobot"]) == 2
    assert "--out exists already" in capsys.readouterr().err
    plain = out.parent / "plain"
    assert cli.run([*arguments, "--frames", "2", "--samples", "1", "--out", str(plain)]) == 0
    assert not (plain / "lerobot").exists()


def test_a_world_with_a_time_stride_is_refused():
    with pytest.raises(ConfigError, match=r"every 4 frames, expected one row a frame; leave it out"):
        check_world(SimpleNamespace(frames_per_step=4))  # type: ignore[arg-type]
