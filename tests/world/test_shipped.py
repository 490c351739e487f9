"""Worlds by name: the package's folder, unless one of that name lies here, and what comes with it."""

import dataclasses
from pathlib import Path

import pytest
import torch

import vidworld
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import read_truth
from vidworld.lab.effect import EFFECTS
from vidworld.model.merge import with_fresh_parts
from vidworld.world import shipped
from vidworld.world.build import build, load_weights
from vidworld.world.load import find
from vidworld.world.shipped import FOLDER, prompts_of, resolve

MOST_BYTES = 16 * 2**20


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
    files = [path for path in (FOLDER / "lab").rglob("*") if path.is_file() and "prompts" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_the_shipped_world_means_the_same_with_the_frame_before_as_an_input():
    """Bit for bit: what its recipe goes on from."""
    world = vidworld.load("lab", "cpu")
    files = find("lab")
    spec = dataclasses.replace(world.spec, model=dataclasses.replace(world.spec.model, previous_frame=True))
    grown = build(spec, world.tokenizer).requires_grad_(False).eval()
    with pytest.raises(CheckpointError, match=r"another architecture .* got 3 missing .*previous_"):
        load_weights(grown.model, files.weights)
    load_weights(grown.model, files.weights, adapt=lambda weights: with_fresh_parts(weights, grown.model))
    prompts = prompts_of(FOLDER / "lab")
    assert prompts is not None
    dataset = ShardDataset.open(prompts)
    key = dataset.manifest.samples("val")[0].key
    grounding = ground_episode(dataset, key, world.spec, context=3, frames=2)
    assert grounding.recording is not None
    actions_TA = grounding.recording.actions_TA[:2]
    rolled = [one.rollout(one.reset(grounding.prompt), actions_TA) for one in (world, grown)]
    assert torch.equal(rolled[0].latents_BTVChw, rolled[1].latents_BTVChw)
    assert torch.equal(rolled[0].proprio_BTS, rolled[1].proprio_BTS)


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
