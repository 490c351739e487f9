"""Noise is scaled until spread tells error, and radii hold whole rollouts as often as they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidworld import cli
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.calibrate import _of_samples
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.recalibration import (
    Forecast,
    fit_conformal,
    fit_scale,
    ratios,
    source_of,
    summary,
)
from vidworld.evaluation.verification import spread_and_error
from vidworld.evaluation.windows import half_of
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.world.calibration import Calibration
from vidworld.world.load import load
from vidworld.world.noise_scale import NoiseScale

LEADS, SAMPLES = 10, 16
CONTRACT = ActionContract(
    embodiment="arm",
    rate_hz=10.0,
    action=(Dimension("a", "rad", "position"),),
    proprio=(Dimension("x", "m", "position"), Dimension("y", "rad", "position")),
    action_statistics=Statistics.of(np.zeros((2, 1))),
    proprio_statistics=Statistics.of(np.zeros((2, 2))),
)


def walk(rng, size, noise_T, decay=0.9):
    """Autoregressive walks [*size, T]: noise of a lead goes on into later ones."""
    steps = rng.normal(size=(*size, len(noise_T))) * noise_T
    out = np.zeros_like(steps)
    for t in range(len(noise_T)):
        out[..., t] = steps[..., t] + (decay * out[..., t - 1] if t else 0)
    return out


def forecasts(scale, own, episodes=60, seed=0, source="start", bias=0.0) -> list[Forecast]:
    """Samples of a world whose noise is `own` times the truth's, times what `scale` makes of it."""
    rng = np.random.default_rng(seed)
    factors = np.array([(scale or NoiseScale()).at(lead) for lead in range(1, LEADS + 1)])
    of_latents, of_proprio = {
        "start": (factors[:, 0], factors[:, 1]),
        "model": (factors[:, 2], factors[:, 2]),
        "both": tuple(np.hypot(factors[:, k], factors[:, 2]) / 2**0.5 for k in (0, 1)),
    }[source]
    found = []
    for number in range(episodes):
        truth = walk(rng, (1, 30), np.ones(LEADS)), walk(rng, (1, 2), np.ones(LEADS))
        latents = walk(rng, (SAMPLES, 30), own * of_latents) + bias
        proprio = walk(rng, (SAMPLES, 2), own * of_proprio)
        variance, error = spread_and_error(latents, truth[0][0])
        scored = crps(latents, truth[0][0])
        found.append(
            Forecast(
                f"e{number}", "arm", proprio.transpose(0, 2, 1), truth[1][0].T,
                variance.mean(0), error.mean(0), (error + variance / SAMPLES).mean(0), scored.mean(0),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("source", ["start", "model", "both"])
@pytest.mark.parametrize("own", [0.5, 2.0])
def test_factors_mend_a_world_of_the_wrong_spread(own, source):
    shrink_T = own * np.linspace(1.0, 1.3, LEADS)
    tried = []
    scale, rounds = fit_scale(
        lambda one: forecasts(one, shrink_T, source=source), source, rounds=6, report=tried.append
    )
    assert tried == rounds
    assert scale is not None
    fresh = forecasts(scale, shrink_T, seed=1, source=source)
    for name, row in ratios(fresh).items():
        assert np.abs(np.log(row)).max() < 0.2, name
        assert np.abs(np.log(ratios(forecasts(None, shrink_T, seed=1))[name])).min() > 0.3, "as trained"
    factor_T = np.array([scale.at(lead) for lead in range(1, LEADS + 1)])[:, 2 if source == "model" else 0]
    # Single factors trade with their neighbours; what they do together is what they should.
    assert np.exp(np.log(factor_T * shrink_T).mean()) == pytest.approx(1, abs=0.2)
    assert (scale.model == ()) == (source == "start")
    assert (scale.latents == ()) == (source == "model")


@pytest.mark.parametrize(
    ("start_noise", "noise_dims", "asked", "found"),
    [
        (1.0, 0, "auto", "start"),
        (0.0, 8, "auto", "model"),
        (0.5, 8, "auto", "both"),
        (1.0, 8, "start", "start"),
        (1.0, 8, "model", "model"),
        (0.0, 8, "none", "none"),
        (1.0, 0, "model", "expected start or none: the network has no noise input"),
        (1.0, 0, "both", "expected start or none: the network has no noise input"),
        (0.0, 8, "start", "expected model or none: its frames start from no noise"),
        (0.0, 8, "both", "expected model or none: its frames start from no noise"),
    ],
)
def test_what_is_scaled_is_the_noise_that_samples_begin_with(start_noise, noise_dims, asked, found):
    """Factors on noise that a world does not have, or does not need, would mend nothing."""
    spec = SimpleNamespace(
        sampler=SimpleNamespace(start_noise=start_noise), model=SimpleNamespace(noise_dims=noise_dims)
    )
    if found.startswith("expected"):
        with pytest.raises(ConfigError, match=found):
            source_of(spec, asked)
    else:
        assert source_of(spec, asked) == found


def test_an_honest_world_is_left_nearly_as_it_is():
    scale, rounds = fit_scale(
        lambda one: forecasts(one, np.ones(LEADS), episodes=150), "start", rounds=2, report=lambda _: None
    )
    assert min(one.mismatch for one in rounds) < 0.05
    assert scale is None or max(abs(np.log(scale.latents))) < 0.2


def test_spread_is_not_bought_with_error():
    """Samples that are wrong in the mean spread too little; noise would have to hide that."""

    def worse(scale):
        found = forecasts(scale, np.full(LEADS, 0.2))
        # As if noise made the world lose what it knows.
        factor = 1 if scale is None else 1 + max(scale.latents)
        return [Forecast(**{**vars(one), "latent_crps_T": one.latent_crps_T * factor}) for one in found]

    scale, rounds = fit_scale(worse, "start", rounds=3, report=lambda _: None)
    assert scale is None
    assert min(one.mismatch for one in rounds[1:]) < rounds[0].mismatch


def test_radii_hold_whole_rollouts_of_new_episodes():
    own = np.full(LEADS, 0.5)
    held, together, pointwise = [], [], []
    for seed in range(12):
        first, second, new = (forecasts(None, own, 30, 3 * seed + part) for part in range(3))
        found = fit_conformal(first, second, CONTRACT, 0.9)
        assert found.episodes == 30
        radii = found.quantities["proprio x"]
        for one in new:
            spread_T = one.proprio_MTS[..., 0].std(0, ddof=1)
            error_T = np.abs(one.proprio_MTS[..., 0].mean(0) - one.truth_TS[:, 0])
            held.append((error_T <= radii(spread_T)).all())
            pointwise.append((error_T <= 1.645 * 2 * spread_T).all())
            scores = [
                np.abs(one.proprio_MTS[..., s].mean(0) - one.truth_TS[:, s])
                / found.quantities[f"proprio {name}"](one.proprio_MTS[..., s].std(0, ddof=1))
                * found.quantities[f"proprio {name}"].multiplier
                for s, name in enumerate("xy")
            ]
            together.append(np.max(scores) <= found.proprio_multiplier)
    assert 0.87 < np.mean(held) < 0.96
    assert 0.87 < np.mean(together) < 0.96
    assert np.mean(pointwise) < 0.8, "negative control: the right spread at each lead does not hold them all"
    assert found.quantities["proprio y"].unit == "rad"


def test_radii_are_narrow_where_the_spread_is():
    first, second = (forecasts(None, np.ones(LEADS), 40, seed) for seed in (0, 1))
    radii = fit_conformal(first, second, CONTRACT, 0.8).quantities["latents"]
    spread = np.sqrt(np.mean([one.latent_variance_T for one in first], 0))
    assert (radii(0.2 * spread) < 0.7 * radii(spread)).all()
    assert radii(0.2 * spread)[-1] < 0.5 * radii(spread)[-1]


def test_too_few_episodes_are_named():
    some = forecasts(None, np.ones(LEADS), 8)
    with pytest.raises(DataError, match="9 or more in the second"):
        fit_conformal(some, some, CONTRACT, 0.9)


def test_the_figures_are_those_of_the_other_estimators():
    rng = np.random.default_rng(0)
    samples, truth = rng.normal(size=(9, 4, 50)), rng.normal(size=(4, 50))
    variance, square, score = _of_samples(torch.from_numpy(samples), torch.from_numpy(truth))
    expected_variance, expected_error = spread_and_error(samples, truth)
    np.testing.assert_allclose(variance, expected_variance)
    np.testing.assert_allclose(square - variance / 9, expected_error)
    np.testing.assert_allclose(score, crps(samples, truth))
    honest = summary(forecasts(None, np.ones(LEADS)))
    assert honest["spread_skill"]["proprio"] == pytest.approx(1, abs=0.1)


def test_halves_are_fixed_and_even():
    ids = [f"container-{number:06d}" for number in range(400)]
    calibration = [name for name in ids if half_of(name) == "calibration"]
    assert 160 < len(calibration) < 240
    assert half_of("container-000000") == "evaluation", "the same for ever"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planar") / "data"
    convert(
        PlanarSource(16, config=PlanarConfig(frames=12, size=32)),
        ConvertOptions(out=out, size="32x32", workers=1),
    )
    return out


def test_the_command_calibrates_a_run_and_eval_takes_the_other_half(untrained_run, data, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    words = ["calibrate", run, data, "--split", "train", "--context", 3, "--frames", 4, "--samples", 8,
             "--rounds", 2, "--device", "cpu"]  # fmt: skip
    arguments = [str(word) for word in words]
    assert cli.run(arguments) == 2, "so few episodes make no 90 %"
    assert "take a lower --coverage" in capsys.readouterr().err
    assert not (run / "calibration.json").exists()
    arguments += ["--coverage", "0.5"]
    assert cli.run(arguments) == 0
    said = capsys.readouterr()
    assert "spread / skill" in said.out
    found = Calibration.read(run)
    ids = {sample.episode_id for sample in ShardDataset.open(data).manifest.samples("train")}
    taken = set(found.fit["datasets"][0]["episodes"])
    assert taken == {name for name in ids if half_of(name) == "calibration"}
    assert set(found.fit["held_out"]) == {"before", "after"}
    assert list(found.conformal) == ["planar_arm"]
    assert {"latents", "pixels"} < set(found.conformal["planar_arm"].quantities)
    assert cli.run(arguments) == 2
    assert "calibrated already" in capsys.readouterr().err
    assert load(run, "cpu").calibration == found
    report = tmp_path / "report"
    words = ["eval", run, data, "--split", "train", "--context", 3, "--frames", 4, "--samples", 2,
             "--windows-per-episode", 1, "--clips", 0, "--out", report, "--device", "cpu"]  # fmt: skip
    assert cli.run([str(word) for word in words]) == 0
    assert "calibrated by" in capsys.readouterr().err
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["world"]["calibrated"] is True
    assert metrics["settings"]["half"] == "evaluation"
    assert metrics["data"]["episodes"] == len(ids - taken)
    assert metrics["sampler"].get("noise_scale") == (
        None if found.noise_scale is None else json.loads(json.dumps(vars(found.noise_scale)))
    )
