"""The episodes of the lab that come with vidworld are what their card says, and what the lab makes."""

import io
import shlex
from pathlib import Path

import numpy as np
import pytest

import vidworld
from vidworld.data.shards import ShardDataset

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(vidworld.__file__).parent / "lab" / "sample"
CARD = ROOT / "datasets" / "lab_sample.md"
MOST_BYTES = 4_000_000


def recipe() -> list[str]:
    """The arguments of `vidworld` in the card's recipe."""
    (line,) = [line for line in CARD.read_text().splitlines() if "vidworld lab" in line and "--out" in line]
    words = shlex.split(line)
    return words[words.index("vidworld") + 1 :]


def test_the_sample_is_what_its_card_says():
    dataset = ShardDataset.open(SAMPLE)
    dataset.verify_all()
    manifest, card = dataset.manifest, CARD.read_text()
    assert f"`{manifest.digest}`" in card
    train, val = (len(manifest.samples(split)) for split in ("train", "val"))
    assert f"{train + val} episodes ({train} train, {val} val) of 32 frames" in card
    assert {sample.frames for sample in manifest.samples()} == {32}
    kept = [path for path in SAMPLE.rglob("*") if path.is_file() and path.suffix in (".tar", ".json")]
    assert sum(path.stat().st_size for path in kept) < MOST_BYTES


def test_the_recipe_makes_the_sample(tmp_path):
    """Its plan is the card's, and so is one episode, byte for byte, with the versions that made it."""
    pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
    from vidworld.config import parse
    from vidworld.data.video import encode_video
    from vidworld.lab import episode, gl
    from vidworld.lab_command import LabOptions, LabSource, config_of

    dataset = ShardDataset.open(SAMPLE)
    options = parse(LabOptions, recipe()[1:], prog="vidworld lab")
    source = LabSource(options.kind, options.episodes, options.seed, config_of(options))
    assert sorted(source.episode_ids()) == sorted(s.episode_id for s in dataset.manifest.samples())
    sample = dataset.manifest.samples("val")[0]
    made, here = dataset.meta(sample.key)["source"]["versions"], episode.versions()
    if (made["mujoco"], made["numpy"]) != (here["mujoco"], here["numpy"]) or gl.available()[:1] != ["osmesa"]:
        pytest.skip(f"made with {made} and OSMesa, here are {here} and {gl.available()}")
    again, stored = source.read(sample.episode_id), dataset.members(sample.key)
    assert encode_video(again.views["scene"].frames(), again.fps) == stored["scene.mp4"], (
        "the lab shows something else than when the sample was made: follow the recipe of its card again"
    )
    assert np.array_equal(again.actions_TA, np.load(io.BytesIO(stored["actions.npy"])))
    other = source.read(dataset.manifest.samples("val")[1].episode_id)
    assert encode_video(other.views["scene"].frames(), other.fps) != stored["scene.mp4"]
