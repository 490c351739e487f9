"""Choosing the noise of served context: what counts as better, and what is written into a run."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vidworld.config import to_yaml
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.errors import UserError
from vidworld.evaluation.metrics import crps
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.trainer.config import TokenizerTraining, WorldTraining, read_training
from vidworld.world.spec import SamplerConfig, SamplerSettings, WorldSpec

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("context_noise")


def test_the_score_is_that_of_the_evaluation(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    samples, truth = rng.normal(size=(5, 3, 4)), rng.normal(size=(3, 4))
    got = script.fair_crps(torch.from_numpy(samples), torch.from_numpy(truth))
    np.testing.assert_allclose(got.numpy(), crps(samples, truth), rtol=1e-12)


def test_another_noise_must_beat_the_own_by_more_than_chance(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    windows = rng.normal(1.0, 0.3, 12)  # what makes one window harder than another is shared by all noises
    scores = {0.0: windows + 0.1, 0.1: windows, 0.2: windows - 0.05 + rng.normal(0, 0.02, 12)}
    assert script.choose(scores, own=0.1) == 0.2
    assert script.choose(scores | {0.2: windows - 0.01 + rng.normal(0, 0.5, 12)}, own=0.1) == 0.1
    assert script.choose({0.1: windows[:1], 0.2: windows[:1] - 0.1}, own=0.1) == 0.2
    assert script.choose({0.1: windows}, own=0.1) == 0.1


def run_of(folder: Path) -> WorldSpec:
    """world.json and config.yaml of a run."""
    statistics = Statistics.of(np.linspace([-1], [1], 9))
    dimension = (Dimension("x", "m", "position"),)
    contract = ActionContract("arm", 10.0, dimension, dimension, statistics, statistics)
    shape = FrameShape(1, 4, 4, 4, 1, 1, embodiment_action_dims=(1,), embodiment_proprio_dims=(1,))
    spec = WorldSpec(
        *(DiTConfig(width=16, depth=4, num_heads=2), shape, ("front",), 32, 32, 10.0, (contract,)),
        SamplerConfig(steps=2, sink=1, window=8),
    )
    spec.write(folder)
    training = WorldTraining(
        data=Path("data"), tokenizer=Path("tokenizer"), sampler=SamplerSettings(steps=2, sink=1)
    )
    (folder / "config.yaml").write_text(to_yaml(training))
    return spec


def test_the_choice_goes_into_both_files_and_nothing_else_changes(script: ModuleType, tmp_path: Path) -> None:
    before = run_of(tmp_path)
    script.write(tmp_path, 0.06)
    after, training = WorldSpec.read(tmp_path), read_training(tmp_path / "config.yaml")
    assert after.sampler == SamplerConfig(steps=2, sink=1, window=8, context_noise=0.06)
    assert after.digest == before.digest, "states of this world stay valid"
    assert isinstance(training, WorldTraining)
    assert training.sampler == SamplerSettings(steps=2, sink=1, context_noise=0.06)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "world.json"]


def test_what_is_no_world_run_is_refused(script: ModuleType, tmp_path: Path) -> None:
    run_of(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(TokenizerTraining(data=Path("data"))))
    with pytest.raises(UserError, match="got tokenizer, expected world"):
        script.write(tmp_path, 0.06)
    assert WorldSpec.read(tmp_path).sampler.context_noise == 0.1, "nothing half-written"
    with pytest.raises(UserError, match="--noises"):
        script.Options(tmp_path, tmp_path, noises=(1.0,))
