"""What else could have happened: weighted replays against posteriors that are computed in other ways."""

import dataclasses
import math
import statistics

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.errors import ConfigError, DataError
from vidworld.lab import conditional as module
from vidworld.lab.conditional import Conditional, conditional, log_likelihood
from vidworld.lab.effect import BaseEffect
from vidworld.lab.episode import LabConfig, LabEpisode, effect_of, generate, resimulate

SCRIPTED = LabConfig(size=64, exploration=0.0)


@pytest.fixture(scope="module")
def struck() -> LabEpisode:
    return generate("container", 3, SCRIPTED, render=False)


class Line(BaseEffect):
    """Readings of a line: with Gaussian priors and errors, what is hidden has a Gaussian posterior."""

    readout_noise = {"y": 0.5}  # noqa: RUF012

    def prior(self, rng, visible):
        slope, height = rng.standard_normal(2)
        return {"slope": float(slope), "height": 2.0 * float(height)}


def on_line(episode, effect, scene, hidden, *, render):
    time_T = np.arange(episode.config.frames) * 0.1
    return dataclasses.replace(episode, outcomes_T={"y": hidden["height"] + hidden["slope"] * time_T})


@pytest.mark.parametrize("k", [1, 6, 30])
def test_weighted_draws_are_the_posterior_of_bayesian_regression(monkeypatch, struck, k):
    monkeypatch.setattr(module, "effect_of", lambda kind, frames: Line())
    monkeypatch.setattr(module, "Scene", lambda *anything: None)
    monkeypatch.setattr(module, "play", on_line)
    seen = on_line(struck, None, None, {"slope": 0.8, "height": -1.0}, render=False)
    found = conditional(seen, k, 20_000)
    # Bishop (2006), eq. 3.53 and 3.54: the posterior of a linear model.
    design_K2 = np.stack([np.arange(k) * 0.1, np.ones(k)], axis=1)
    precision_22 = np.diag([1.0, 1 / 4]) + design_K2.T @ design_K2 / 0.25
    mean_2 = np.linalg.solve(precision_22, design_K2.T @ seen.outcomes_T["y"][:k] / 0.25)
    covariance_22 = np.linalg.inv(precision_22)
    draws_N2 = np.array([[draw["slope"], draw["height"]] for draw in found.hidden])
    error_2 = np.sqrt(np.diag(covariance_22) / found.effective_draws)
    weighted_2 = found.weights_N @ draws_N2
    assert (np.abs(weighted_2 - mean_2) < 4 * error_2).all()
    apart_N2 = draws_N2 - weighted_2
    weighted_22 = (found.weights_N[:, None] * apart_N2).T @ apart_N2
    np.testing.assert_allclose(weighted_22, covariance_22, atol=0.06 * np.diag(covariance_22).max())
    # The outcome later on follows, and so does a sample with equal weights; the prior's does not.
    later = float(mean_2 @ (5.0, 1.0))
    spread = math.sqrt(np.array([5.0, 1.0]) @ covariance_22 @ (5.0, 1.0))
    assert found.mean("y")[50] == pytest.approx(later, abs=4 * spread / math.sqrt(found.effective_draws))
    equal = found.outcomes_NT["y"][found.resample(4000), 50]
    assert equal.mean() == pytest.approx(found.mean("y")[50], abs=0.1 * spread)
    assert equal.std() == pytest.approx(spread, rel=0.1)
    if k == 30:
        assert abs(found.outcomes_NT["y"][:, 50].mean() - later) > spread


@pytest.mark.filterwarnings("ignore:.*are worth")
@pytest.mark.parametrize(
    ("kind", "seed", "frames", "early", "late", "count"),
    [
        ("container", 3, 64, 10, 40, 5),
        ("paint", 10, 64, 4, 50, 4),
        ("smoke", 2, 16, 2, 16, 2),
        ("liquid", 0, 34, 8, 34, 2),
    ],
)
def test_each_draw_is_a_resimulation_weighed_by_its_errors(kind, seed, frames, early, late, count):
    episode = generate(kind, seed, dataclasses.replace(SCRIPTED, frames=frames), render=False)
    noise = effect_of(kind).readout_noise
    before = conditional(episode, early, count, proprio_noise=0.02)
    np.testing.assert_array_equal(before.weights_N, 1 / count)
    after = conditional(episode, late, count)
    assert before.hidden == after.hidden
    logs = []
    for index, hidden in enumerate(after.hidden):
        run = resimulate(episode, hidden, render=False)
        for name, column in run.outcomes_T.items():
            np.testing.assert_array_equal(after.outcomes_NT[name][index], column, name)
        log = 0.0
        for name, sigma in noise.items():
            error = statistics.NormalDist(0.0, sigma)
            for ours, theirs in zip(episode.outcomes_T[name][:late], run.outcomes_T[name], strict=False):
                log += math.log(max(error.pdf(float(theirs - ours)), 1e-300) / error.pdf(0.0))
        logs.append(log)
    assert len({round(log, 6) for log in logs}) == count, "what was seen tells the draws apart"
    # A density of 1e-300 is where this reference stops counting; such a draw weighs nothing either way.
    weights_N = np.exp(np.array(logs) - max(logs))
    np.testing.assert_allclose(after.weights_N, weights_N / weights_N.sum(), rtol=1e-6, atol=1e-12)


def test_what_hides_nothing_has_one_future():
    for kind, seed in (("rigid", 1), ("liquid", 1)):
        episode = generate(kind, seed, dataclasses.replace(SCRIPTED, frames=8), render=False)
        assert episode.hidden == {}
        found = conditional(episode, 8, 2)
        np.testing.assert_array_equal(found.weights_N, 0.5)
        for name, column in episode.outcomes_T.items():
            np.testing.assert_array_equal(found.outcomes_NT[name], [column, column], name)


def test_proprioception_tells_more_and_collapse_is_reported(struck):
    with pytest.warns(UserWarning, match="raise n to"):
        seen = conditional(struck, 64, 24)
    with pytest.warns(UserWarning, match="24 draws given 64 frames are worth"):
        felt = conditional(struck, 64, 24, proprio_noise=0.02)
    assert felt.effective_draws <= seen.effective_draws + 1e-9
    assert seen.weights_N.sum() == pytest.approx(1)
    with pytest.raises(DataError, match=r"24 draws given 64 frames: got .* effective, expected 20"):
        conditional(struck, 64, 24, at_least=20)
    for wrong, message in (({"k": 65}, "k 65"), ({"k": 0}, "k 0"), ({"n": 0}, "n 0")):
        with pytest.raises(ConfigError, match=message):
            conditional(struck, **{"k": 1, "n": 4, **wrong})
    with pytest.raises(ConfigError, match="proprio_noise"):
        conditional(struck, 1, 4, proprio_noise=0.0)


def test_a_full_turn_is_no_difference(struck):
    effect = effect_of("container")
    near, far = (
        dataclasses.replace(struck, outcomes_T={**struck.outcomes_T, "box_yaw": np.full(64, yaw)})
        for yaw in (np.pi - 0.01, 0.01 - np.pi)
    )
    assert log_likelihood(effect, near, far, 1) == pytest.approx(-0.5 * (0.02 / 0.06) ** 2)
    assert log_likelihood(effect, near, struck, 1) < -100


def test_resampling_keeps_the_shares():
    found = Conditional(({}, {}, {}), np.array([0.5, 0.3, 0.2]), {})
    assert np.bincount(found.resample(10)).tolist() == [5, 3, 2]
    assert found.effective_draws == pytest.approx(1 / 0.38)
