"""The oracle plays true episodes on: with nothing hidden it is the truth, and else it knows no more."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

import vidworld
from vidworld.data.shards import ShardDataset
from vidworld.errors import DataError
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.oracle import OracleConfig, Recorded, foresee
from vidworld.lab import episode as lab
from vidworld.lab import gl

PROMPTS = Path(vidworld.__file__).parent / "weights" / "lab" / "prompts"
JPEG = 1.2
"""Levels that the compression of the recordings costs, on average, and a bit."""


def recorded(key):
    dataset = ShardDataset.open(PROMPTS)
    episode = dataset.read(key)
    made, here = episode.meta["source"]["versions"], lab.versions()
    if made["mujoco"] != here["mujoco"] or not gl.available():
        pytest.skip(f"made with {made}, here are {here} and {gl.available()}")
    return Recorded.of(episode, dataset.manifest.height, key), scene(episode)


def test_with_nothing_hidden_the_oracle_sees_the_recording():
    episode, frames_THWC = recorded("rigid-9000000")
    found = foresee(episode, (20, 50), OracleConfig())
    assert found.effective_draws == float("inf")
    seen_MTHWC = found.frames_MTHWC
    assert seen_MTHWC.shape == (1, 2, 128, 128, 3)
    assert np.abs(seen_MTHWC[0].astype(int) - frames_THWC[[20, 50]]).mean() < JPEG
    assert np.abs(seen_MTHWC[0].astype(int) - frames_THWC[[50, 20]]).mean() > 3 * JPEG


def test_hidden_values_are_drawn_from_what_the_context_leaves_open():
    episode, frames_THWC = recorded("container-9000002")
    early = foresee(episode, (1, 56), OracleConfig(context=1, draws=6, samples=6))
    assert early.effective_draws == pytest.approx(6)
    seen_MTHWC = early.frames_MTHWC.astype(int)
    # Before contact all futures are the recording; in the end they differ from each other.
    assert np.abs(seen_MTHWC[:, 0] - frames_THWC[1]).mean() < JPEG
    assert np.abs(seen_MTHWC[:, 1] - seen_MTHWC[:1, 1]).mean((1, 2, 3)).max() > 1


def test_an_episode_that_cannot_be_made_again_is_refused():
    episode, _ = recorded("rigid-9000000")
    with pytest.raises(DataError, match="--variety and --exploration"):
        foresee(episode, (20,), OracleConfig(exploration=0.0))
    readouts = dict(episode.meta["outcome"]["readouts"])
    readouts["object0_x"] = [value + 0.05 for value in readouts["object0_x"]]
    other = {**episode.meta, "outcome": {**episode.meta["outcome"], "readouts": readouts}}
    with pytest.raises(DataError, match="object0_x of the episode, played again"):
        foresee(dataclasses.replace(episode, meta=other), (20,), OracleConfig())
