"""Worlds by name: the package's folder, unless one of that name lies here, and what comes with it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vidworld
from vidworld import cli
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import read_truth
from vidworld.lab.effect import EFFECTS
from vidworld.quantize import MEMBER_CHANGES, SCALE
from vidworld.world import shipped
from vidworld.world.novelty import novelty
from vidworld.world.shipped import FOLDER, prompts_of, resolve

MOST_BYTES, MOST_BYTES_OF_ALL_MEMBERS = 16 * 2**20, 18 * 2**20


def test_a_name_is_the_package_s_folder_and_a_path_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "weights" / "lab").mkdir(parents=True)
    (tmp_path / "weights" / "lab" / "world.json").write_text("{}")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("lab") == resolve(Path("lab")) == tmp_path / "weights" / "lab"
    assert resolve("runs/lab") == Path("runs/lab")
    assert resolve(tmp_path / "lab") == tmp_path / "lab"
    Path("lab").mkdir()
    assert resolve("lab") == tmp_path / "weights" / "lab"
    Path("lab/world.json").write_text("{}")
    assert resolve("lab") == Path("lab")


def test_a_name_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"weights of 'lab' are not in this copy .*; install a release"):
        vidworld.load("lab", "cpu")


def test_what_comes_along_is_small_enough():
    size = sum(path.stat().st_size for path in (FOLDER / "lab").rglob("*.safetensors"))
    with safe_open(FOLDER / "lab" / "model.safetensors", "pt") as stored:
        changes = [name for name in stored.keys() if name.removesuffix(SCALE).endswith(MEMBER_CHANGES)]  # noqa: SIM118
        members = sum(stored.get_tensor(name).nbytes for name in changes)
    assert changes
    assert size - members <= MOST_BYTES
    assert size <= MOST_BYTES_OF_ALL_MEMBERS


def test_more_steps_than_it_learnt_are_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["rollout", "lab", "--steps", "4", "--out", str(out)]) == 2
    assert "leave --steps (sampler.steps) at 1" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "count"), [(("--temperature", "0"), 1), ((), 4), (("--temperature", "0", "--samples", "2"), 2)]
)
def test_a_mean_is_imagined_once_unless_more_is_asked_for(tmp_path, capsys, words, count):
    out = tmp_path / "out"
    assert cli.run(["rollout", "lab", "--frames", "2", "--out", str(out), *words]) == 0
    assert len(list(out.glob("sample-*.mp4"))) == count
    assert f"{count} sample{'s' * (count > 1)} of 2 frames" in capsys.readouterr().out
    futures_NTS = np.load(out / "proprio.npz")["predicted_NTS"]
    assert np.array_equal(futures_NTS[0], futures_NTS[-1]) == (count < 4)


def prompt_of(world, kind, *, context, frames):
    """An episode that comes along: what is known, and what happened."""
    prompts = prompts_of(FOLDER / "lab")
    assert prompts is not None
    dataset = ShardDataset.open(prompts)
    key = next(sample.key for sample in dataset.manifest.samples("val") if sample.key.startswith(kind))
    grounding = ground_episode(dataset, key, world.spec, context=context, frames=frames)
    assert grounding.recording is not None
    return grounding.prompt, grounding.recording


def test_the_shipped_world_has_a_mean_beside_its_samples_and_radii():
    world = vidworld.load("lab", "cpu")
    assert world.calibration is not None
    radii_T = world.calibration.radii("lab_arm_joint", "pixels")([0.05] * 8)
    assert min(radii_T) > 0
    prompt, recorded = prompt_of(world, "rigid", context=8, frames=8)

    def rolled(temperature):
        sampler = world.spec.sampler.changed(temperature=temperature)
        state = world.reset(prompt, num_samples=3, seed=0, sampler=sampler)
        actions_BTA = np.repeat(recorded.actions_TA[None, :8], 3, 0)
        with torch.no_grad():
            video_BTVHWC = world.rollout(state, actions_BTA, sampler=sampler).video_BTVHWC
        assert video_BTVHWC is not None
        return video_BTVHWC.numpy().astype(np.float64) / 255

    truth = recorded.frames_TVHWC[:8].astype(np.float64) / 255
    held = np.square(prompt.frames[-1].astype(np.float64).reshape(truth[0].shape) / 255 - truth).mean()
    mean, samples = rolled(0.0), rolled(1.0)
    error = {name: np.square(one - truth).mean() for name, one in (("mean", mean), ("sample", samples))}
    assert error["mean"] < 0.7 * error["sample"]
    assert error["mean"] < 0.2 * held
    assert mean.var(0).mean() < 0.05 * samples.var(0).mean(), "one future, and many"


def test_its_four_members_part_over_what_they_never_saw():
    ensemble = vidworld.load("lab", "cpu", members=4)
    prompt, _ = prompt_of(ensemble, "rigid", context=8, frames=4)

    def unknown(frames):
        parted_PT = novelty(ensemble, dataclasses.replace(prompt, frames=frames)).disagreement_PT
        assert parted_PT is not None
        return float(parted_PT.mean())

    noise = np.random.default_rng(0).integers(0, 256, prompt.frames.shape, np.uint8)
    assert ensemble.reset(prompt, num_samples=2, seed=0).member_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert unknown(noise) > 10 * unknown(prompt.frames) > 0


def test_the_prompts_are_an_episode_of_each_kind_with_its_truth():
    prompts = prompts_of(FOLDER / "lab")
    assert prompts is not None
    dataset = ShardDataset.open(prompts)
    dataset.verify_all()
    kinds = set()
    for sample in dataset.manifest.samples("val"):
        episode = dataset.read(sample.key)
        kinds.add(read_truth(episode.meta, scene(episode), where=sample.key).kind)
        assert episode.meta["source"]["seed"] >= 9_000_000  # training begins at 0
        assert sample.frames == 57
    assert kinds == set(EFFECTS)
    assert sum(path.stat().st_size for path in prompts.rglob("*") if path.is_file()) < 1_500_000
