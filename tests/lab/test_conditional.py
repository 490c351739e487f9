"""What else could have happened: weighted replays against posteriors that are computed in other ways."""

import dataclasses
import math
import statistics
import warnings

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.errors import ConfigError, DataError
from vidworld.lab import conditional as module
from vidworld.lab.conditional import Conditional, conditional, log_likelihood
from vidworld.lab.container import MASS_KG
from vidworld.lab.effect import BaseEffect
from vidworld.lab.episode import LabConfig, LabEpisode, effect_of, generate, resimulate

SCRIPTED = LabConfig(size=64, exploration=0.0)


@pytest.fixture(scope="module")
def struck() -> LabEpisode:
    return generate("container", 3, SCRIPTED, render=False)


class Line(BaseEffect):
    """Readings of a line: with Gaussian priors and errors, what is hidden has a Gaussian posterior."""

    readout_noise = {"y": 0.5}  # noqa: RUF012
    hidden_dims = 2

    def prior(self, rng, visible):
        return self.hidden_at(rng.random(2), visible)

    def hidden_at(self, uniform_D, visible):
        slope, height = map(statistics.NormalDist().inv_cdf, map(float, uniform_D))
        return {"slope": slope, "height": 2.0 * height}


class FineLine(Line):
    """Read so well that of 400 draws from the prior three or so agree."""

    readout_noise = {"y": 0.05}  # noqa: RUF012


class OnlyPrior(Line):
    """An effect that knows no more of its hidden values than how to draw them."""

    hidden_dims = 0

    def prior(self, rng, visible):
        return Line().prior(rng, visible)

    def hidden_at(self, uniform_D, visible):
        return {}


def on_line(episode, effect, scene, hidden, *, render, frames=None):
    time_T = np.arange(frames or episode.config.frames) * 0.1
    return dataclasses.replace(episode, outcomes_T={"y": hidden["height"] + hidden["slope"] * time_T})


@pytest.fixture
def line(monkeypatch, struck):
    """What is seen of a line, and a function that makes an effect the one that `conditional` finds."""

    def use(effect):
        monkeypatch.setattr(module, "effect_of", lambda kind, frames: effect)

    monkeypatch.setattr(module, "Scene", lambda *anything: None)
    monkeypatch.setattr(module, "play", on_line)
    return on_line(struck, None, None, {"slope": 0.8, "height": -1.0}, render=False), use


def posterior(seen, k: int, sigma: float):
    """Mean [2] and covariance [2, 2] of slope and height: Bishop (2006), eq. 3.53 and 3.54."""
    design_K2 = np.stack([np.arange(k) * 0.1, np.ones(k)], axis=1)
    precision_22 = np.diag([1.0, 1 / 4]) + design_K2.T @ design_K2 / sigma**2
    mean_2 = np.linalg.solve(precision_22, design_K2.T @ seen.outcomes_T["y"][:k] / sigma**2)
    return mean_2, np.linalg.inv(precision_22)


def moments(found: Conditional, weights_N: np.ndarray):
    draws_N2 = np.array([[draw["slope"], draw["height"]] for draw in found.hidden])
    weighted_2 = weights_N @ draws_N2
    apart_N2 = draws_N2 - weighted_2
    return weighted_2, (weights_N[:, None] * apart_N2).T @ apart_N2


@pytest.mark.parametrize("effect", [Line(), OnlyPrior()], ids=["adaptive", "prior"])
@pytest.mark.parametrize("k", [1, 6, 30])
def test_weighted_draws_are_the_posterior_of_bayesian_regression(line, k, effect):
    seen, use = line
    use(effect)
    found = conditional(seen, k, 6000)
    mean_2, covariance_22 = posterior(seen, k, 0.5)
    error_2 = np.sqrt(np.diag(covariance_22) / found.effective_draws)
    weighted_2, weighted_22 = moments(found, found.weights_N)
    assert (np.abs(weighted_2 - mean_2) < 4 * error_2).all()
    share = 4 * math.sqrt(2 / found.effective_draws)
    np.testing.assert_allclose(weighted_22, covariance_22, atol=share * np.diag(covariance_22).max())
    # The outcome later on follows, and so does a sample with equal weights.
    later = float(mean_2 @ (5.0, 1.0))
    spread = math.sqrt(np.array([5.0, 1.0]) @ covariance_22 @ (5.0, 1.0))
    assert found.mean("y")[50] == pytest.approx(later, abs=4 * spread / math.sqrt(found.effective_draws))
    equal = found.outcomes_NT["y"][found.resample(4000), 50]
    assert equal.mean() == pytest.approx(found.mean("y")[50], abs=0.1 * spread)
    assert equal.std() == pytest.approx(spread, rel=share)
    assert effect.hidden_dims == 0 or share < 0.2


@pytest.mark.filterwarnings("ignore:.*are worth")
def test_few_simulations_find_a_narrow_posterior_without_bias(line):
    seen, use = line
    mean_2, covariance_22 = posterior(seen, 30, 0.05)
    weighted, worth = [], []
    use(FineLine())
    for seed in range(6):
        found = conditional(seen, 30, 400, seed=seed)
        worth.append(found.effective_draws)
        weighted.append(moments(found, found.weights_N))
    assert min(worth) > 100
    # The mean over runs is held to its own error, which shrinks with their number.
    spread_2 = np.sqrt(np.diag(covariance_22))
    bound_2 = 4 * spread_2 / math.sqrt(sum(worth))
    assert (np.abs(np.mean([mean for mean, _ in weighted], axis=0) - mean_2) < bound_2).all()
    variance_2 = np.mean([np.diag(covariance) for _, covariance in weighted], axis=0)
    np.testing.assert_allclose(variance_2 / spread_2**2, 1, atol=0.15)
    # Negative control: the prior alone finds next to nothing.
    assert (
        np.mean([conditional(seen, 30, 400, seed=seed, adapt=False).effective_draws for seed in range(6)])
        < 10
    )


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
    for wrong, message in (
        ({"k": 65}, "k 65"),
        ({"k": 0}, "k 0"),
        ({"n": 0}, "n 0"),
        ({"workers": 0}, "workers 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            conditional(struck, **{"k": 1, "n": 4, **wrong})
    with pytest.raises(ConfigError, match="proprio_noise"):
        conditional(struck, 1, 4, proprio_noise=0.0)


def test_contact_leaves_many_effective_draws_on_any_number_of_workers(struck):
    k = int(np.argmax(struck.outcomes_T["touched"] > 0)) + 3
    with warnings.catch_warnings(action="error"):
        found = conditional(struck, k, 120)
    other = conditional(struck, k, 120, workers=2)
    assert found.effective_draws > 20
    assert found.hidden == other.hidden
    np.testing.assert_array_equal(found.weights_N, other.weights_N)
    for name, column in found.outcomes_NT.items():
        np.testing.assert_array_equal(column, other.outcomes_NT[name], name)
    last = found.hidden[-1]
    np.testing.assert_array_equal(
        found.outcomes_NT["box_travel_m"][-1],
        resimulate(struck, last, render=False).outcomes_T["box_travel_m"],
    )


def test_before_anything_shows_all_draws_are_the_prior(struck):
    found = conditional(struck, 2, 100)
    np.testing.assert_array_equal(found.weights_N, 1 / 100)
    mass_N = np.log([draw["mass_kg"] for draw in found.hidden])
    low, high = np.log(MASS_KG)
    assert mass_N.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 100))
    assert mass_N.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 4000 simulations for the reference, and as many to compare
@pytest.mark.filterwarnings("ignore:.*are worth")
@pytest.mark.parametrize(("seed", "proprio_noise"), [(3, None), (1, None), (3, 0.2)])
def test_looked_for_draws_agree_with_many_from_the_prior(seed, proprio_noise):
    episode = generate("container", seed, SCRIPTED, render=False)
    k = int(np.argmax(episode.outcomes_T["touched"] > 0)) + 3
    effect, player = effect_of("container"), module._Player(episode)
    rng = np.random.default_rng(7)
    draws = [effect.prior(rng, episode.visible) for _ in range(4000)]
    logs = [log_likelihood(effect, episode, player((draw, k)), k, proprio_noise) for draw in draws]
    reference_N = np.exp(np.array(logs) - max(logs))
    reference_N /= reference_N.sum()
    assert 1 / np.square(reference_N).sum() > 60, "the reference is worth something"
    runs = [conditional(episode, k, 400, seed=s, proprio_noise=proprio_noise) for s in range(3)]
    few = np.mean([1 / np.square(reference_N[at : at + 400]).sum() for at in range(0, 4000, 400)])
    few *= np.mean([reference_N[at : at + 400].sum() ** 2 for at in range(0, 4000, 400)])
    worth = sum(run.effective_draws for run in runs)
    assert worth / 3 > 50
    assert worth / 3 > 3 * few
    kept = np.flatnonzero(reference_N > 1e-4 * reference_N.max())
    full = [player((draws[index], None)).outcomes_T for index in kept]
    weights_N = reference_N[kept] / reference_N[kept].sum()
    quantities = {name: np.array([draws[index][name] for index in kept]) for name in draws[0]}
    for name in ("box_travel_m", "box_tilt", "toppled"):
        quantities[name] = np.array([outcome[name][-1] for outcome in full])
    wrong = []
    for name, truth_N in quantities.items():
        found = [
            [draw[name] for draw in run.hidden] if name in draws[0] else run.outcomes_NT[name][:, -1]
            for run in runs
        ]
        mean = weights_N @ truth_N
        spread = math.sqrt(weights_N @ (truth_N - mean) ** 2)
        bound = 4 * spread * math.sqrt(np.square(weights_N).sum() + 1 / worth)
        ours = np.mean([run.weights_N @ np.array(values) for run, values in zip(runs, found, strict=True)])
        assert abs(ours - mean) <= bound + 1e-9, name
        if name in draws[0]:
            wrong.append(abs(np.mean([draw[name] for draw in draws]) - mean) > bound)
    assert any(wrong), "what was seen tells of something hidden, or this test could not tell"


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
