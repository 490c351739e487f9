"""Drift: faults of synthetic videos are found, sound ones are not; the command measures real rollouts."""

import json

import numpy as np
import pytest
import torch

from vidworld import cli
from vidworld.data.shards import ShardDataset
from vidworld.errors import DataError
from vidworld.evaluation import drift as module
from vidworld.evaluation.drift import Reference, drift, jump_ratio, summarise
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.windows import Settings, plan_windows
from vidworld.world.load import load
from vidworld.world.spec import WorldSpec

CONTEXT, TURN, FRAMES = 4, 8, 64


@pytest.fixture(scope="module")
def reference(untrained_run, planar_data):
    dataset = ShardDataset.open(planar_data)
    key = dataset.manifest.samples("train")[0].key
    grounding = ground_episode(dataset, key, WorldSpec.read(untrained_run), context=CONTEXT)
    known = np.asarray(grounding.prompt.frames)
    return Reference.of(grounding, np.concatenate([known, grounding.recording.frames_TVHWC]))


@pytest.fixture
def sound(reference):
    """The recording to and fro: looks like it and goes on for ever."""
    recorded = reference.grounding.recording.frames_TVHWC
    both_ways = np.concatenate([recorded, recorded[::-1]])
    return both_ways[np.arange(FRAMES) % len(both_ways)]


def measured(reference, video, segment=32):
    before = last = np.asarray(reference.grounding.prompt.frames)[-1]
    pieces = []
    for first in range(0, len(video), segment):
        pieces.append(module._measure(reference, video[first : first + segment], before, last, first))
        before = video[first : first + segment][-1]
    curve = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return summarise([curve], len(video), turn=TURN)


def test_a_sound_rollout_is_found_sound(reference, sound):
    found = measured(reference, sound)
    length = len(reference.grounding.recording.frames_TVHWC)
    assert found["compared"] == [1] * length + [0] * (FRAMES - length)
    assert found["curves"]["psnr"][:length] == [100.0] * length, "it is the recording"
    assert found["curves"]["psnr"][length] is None
    assert found["gain_while_recorded_db"] > 30
    assert all(0.6 < found["end"][name] < 1.4 for name in ("contrast", "sharpness", "motion"))
    assert found["background_end_db"] > 30
    assert found["jump_ratio"] < 1.6


def fade(video):
    weight_T = np.linspace(0, 1, len(video))[:, None, None, None, None]
    return ((1 - weight_T) * video + weight_T * 128).astype(np.uint8)


def freeze(video):
    return np.repeat(video[:8], len(video) // 8, 0)[: len(video)] * 0 + video[7]


def noise(video):
    random = np.random.default_rng(0).integers(-60, 60, video.shape)
    return np.clip(video + random, 0, 255).astype(np.uint8)


def other_scene(video):
    later = video.copy()
    later[len(video) // 2 :] = 255 - later[len(video) // 2 :]
    return later


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (fade, lambda found: found["end"]["contrast"] < 0.4),
        (freeze, lambda found: found["end"]["motion"] < 0.05),
        (noise, lambda found: found["end"]["sharpness"] > 3 and found["end"]["motion"] > 3),
        (other_scene, lambda found: found["background_end_db"] < found["background_begin_db"] - 15),
    ],
)
def test_each_fault_is_found(reference, sound, spoil, fault):
    assert fault(measured(reference, spoil(sound)))
    assert not fault(measured(reference, sound))


def test_a_jump_that_comes_back_with_the_window_is_found():
    random = np.random.default_rng(1)
    even = random.uniform(0.8, 1.2, 512)
    jumping = even + 1.5 * (np.arange(512) % TURN == 3)
    other_period = even + 1.5 * (np.arange(512) % (TURN + 1) == 3)
    assert jump_ratio(even, TURN) < 1.1
    assert jump_ratio(jumping, TURN) > 1.8
    assert jump_ratio(other_period, TURN) < 1.3
    assert jump_ratio(even[: 3 * TURN], TURN) is None


def test_segments_change_nothing(reference, sound):
    few, all_at_once = measured(reference, sound, 7), measured(reference, sound, 64)
    for name, curve in all_at_once["curves"].items():
        assert np.allclose(np.array(few["curves"][name], float), np.array(curve, float), equal_nan=True)
    assert few["jump_ratio"] == pytest.approx(all_at_once["jump_ratio"])


def test_a_moving_camera_has_no_background(reference):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (6, 1, 16, 16, 3), np.uint8)
    assert not Reference.of(reference.grounding, frames).still_VHW.any()


def test_commands_go_on_with_the_next_episodes(untrained_run, planar_data):
    dataset, spec = ShardDataset.open(planar_data), WorldSpec.read(untrained_run)
    groundings = [
        ground_episode(dataset, sample.key, spec, context=CONTEXT)
        for sample in dataset.manifest.samples("train")[:2]
    ]
    own, other = (one.recording.actions_TA for one in groundings)
    commands_NTA = module._commands(groundings, 40)
    assert commands_NTA.shape == (2, 40, 3)
    assert np.array_equal(commands_NTA[0, :16], own)
    assert np.array_equal(commands_NTA[0, 16:32], other)
    assert np.array_equal(commands_NTA[0, 32:], own[:8])
    assert np.array_equal(commands_NTA[1, 16:32], own)


def test_the_rollouts_are_the_worlds(untrained_run, planar_data):
    world, dataset = load(untrained_run, "cpu"), ShardDataset.open(planar_data)
    settings = Settings(split="train", context=CONTEXT, episodes=1, seed=3)
    windows = plan_windows(dataset, world.spec, settings).windows
    found = drift(world, dataset, settings, windows, 40)
    grounding = ground_episode(dataset, windows[0].sample.key, world.spec, context=CONTEXT)
    with torch.no_grad():
        state = world.reset(grounding.prompt, seed=3)
        rolled = world.rollout(state, grounding.recording.actions_TA, allow_out_of_range=True)
    expected = psnr(rolled.video_BTVHWC[0].numpy(), grounding.recording.frames_TVHWC).mean(-1)
    assert np.allclose(found["curves"]["psnr"][:16], expected, atol=0.05)
    assert (found["frames"], found["rollouts"], found["turn"]) == (40, 1, world.spec.sampler.window)


def test_the_command_reports_it(untrained_run, planar_data, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = ["eval", untrained_run, planar_data, "--out", out, "--frames", 4, "--drift", 36]
    assert cli.run([*map(str, arguments), "--windows-per-episode", "1", "--samples", "1"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    found = metrics["drift"]["planar_arm"]
    assert len(found["curves"]["motion_ratio"]) == found["frames"] == 36
    assert (out / "drift-planar_arm.png").stat().st_size > 10_000
    assert "Does it hold for 36 frames? (planar_arm)" in (out / "report.html").read_text()
    assert "planar_arm, 36 frames at a stretch" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(untrained_run, planar_data, tmp_path, capsys):
    arguments = ["eval", untrained_run, planar_data, "--out", tmp_path / "out", "--drift", 0]
    assert cli.run([*map(str, arguments)]) == 2
    assert "--drift: got 0" in capsys.readouterr().err
    world, dataset = load(untrained_run, "cpu"), ShardDataset.open(planar_data)
    windows = plan_windows(dataset, world.spec, Settings(split="train")).windows
    with pytest.raises(DataError, match="none longer than the context"):
        drift(world, dataset, Settings(context=20), windows, 8)
