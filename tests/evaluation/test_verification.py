"""Verification scores against closed forms, an independent library, and ensembles known to be wrong."""

import numpy as np
import pytest
import scoringrules

from vidworld.errors import ConfigError
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.verification import (
    bootstrap,
    coverage,
    energy_score,
    energy_test,
    interval,
    rank_counts,
    rank_test,
    ranks,
    reliability,
    spread_and_error,
    spread_skill,
    variogram_score,
)

CASES = 20_000


def ensemble(
    samples: int, spread: float = 1.0, bias: float = 0.0, cases: int = CASES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Samples [M, N] and truths [N] of Gaussians of other means; calibrated at spread 1 and bias 0."""
    rng = np.random.default_rng(seed)
    mean_N = rng.normal(0, 3, cases)
    samples_MN = mean_N + bias + spread * rng.normal(size=(samples, cases))
    return samples_MN, mean_N + rng.normal(size=cases)


def counts_of(samples_MN: np.ndarray, truth_N: np.ndarray) -> np.ndarray:
    return rank_counts(ranks(samples_MN, truth_N, np.random.default_rng(1)), len(samples_MN))


@pytest.mark.parametrize("samples", [2, 4, 32])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_spread_skill_is_the_ratio_of_deviations_at_any_size(samples: int, spread: float) -> None:
    samples_MN, truth_N = ensemble(samples, spread)
    found = spread_skill(*spread_and_error(samples_MN, truth_N))
    assert found == pytest.approx(spread, rel=0.04)
    naive = np.sqrt(samples_MN.var(0, ddof=1).mean() / np.square(samples_MN.mean(0) - truth_N).mean())
    if (samples, spread) == (2, 1.0):
        assert naive < 0.9, "without the correction small ensembles look overconfident"


def test_spread_skill_tells_a_bias() -> None:
    assert spread_skill(*spread_and_error(*ensemble(16, bias=1.0))) == pytest.approx(1 / np.sqrt(2), rel=0.04)
    assert np.isnan(spread_skill(1.0, 0.0))


@pytest.mark.parametrize("samples", [9, 32])
@pytest.mark.parametrize("level", [0.5, 0.8])
def test_coverage_is_exact_at_any_size(samples: int, level: float) -> None:
    assert coverage(counts_of(*ensemble(samples)), level) == pytest.approx(level, abs=0.012)
    assert coverage(counts_of(*ensemble(samples, spread=0.5)), level) < level - 0.15
    quantiles = np.quantile(ensemble(samples)[0], [(1 - level) / 2, (1 + level) / 2], axis=0)
    truth_N = ensemble(samples)[1]
    if samples == 9:
        plain = ((truth_N > quantiles[0]) & (truth_N < quantiles[1])).mean()
        assert plain < level - 0.03, "quantiles of few samples cover less than they say"


def test_coverage_refuses_what_so_few_samples_cannot_tell() -> None:
    with pytest.raises(
        ConfigError, match=r"level of an interval: got 0\.9, expected above 0, at most 0\.600"
    ):
        coverage(np.ones(5), 0.9)


def test_ranks_of_ties_are_uniform() -> None:
    counts = rank_counts(ranks(np.zeros((4, 50_000)), np.zeros(50_000), np.random.default_rng(0)), 4)
    assert rank_test(counts).p_flat > 0.001
    assert ranks(np.array([[1.0], [2.0]]), np.array([1.5]), np.random.default_rng(0)).tolist() == [1]


def test_a_rank_test_rejects_as_often_as_it_says() -> None:
    tests = [rank_test(counts_of(*ensemble(32, cases=200, seed=seed))) for seed in range(300)]
    for name in ("p_flat", "p_bias", "p_dispersion"):
        rejected = np.mean([getattr(found, name) < 0.05 for found in tests])
        assert 0.015 < rejected < 0.1, name
    close, low = (
        rank_test(counts_of(*ensemble(32, cases=200, **wrong))) for wrong in ({"spread": 0.5}, {"bias": 0.7})
    )
    assert close.p_flat < 1e-3
    assert close.p_dispersion < 1e-6 < close.p_bias, "too close together, and not to one side"
    assert low.p_bias < 1e-6, "to one side"


def test_energy_and_variogram_scores_agree_with_scoringrules() -> None:
    rng = np.random.default_rng(0)
    samples_MD, truth_D = rng.normal(size=(12, 5)), rng.normal(size=5)
    assert energy_score(samples_MD, truth_D) == pytest.approx(
        float(scoringrules.es_ensemble(truth_D, samples_MD, estimator="fair"))
    )
    assert variogram_score(samples_MD, truth_D) == pytest.approx(
        float(scoringrules.vs_ensemble(truth_D, samples_MD, p=0.5))
    )
    values_MX = rng.normal(size=(12, 40))
    seen_X = rng.normal(size=40)
    np.testing.assert_allclose(
        crps(values_MX, seen_X), scoringrules.crps_ensemble(seen_X, values_MX, m_axis=0, estimator="fair")
    )


def test_crps_of_a_gaussian_ensemble_has_its_closed_form() -> None:
    for samples in (2, 8):
        samples_MN, truth_N = ensemble(samples)
        # E|x - y| - E|x - x'| / 2 with both differences N(0, 2): sqrt(4 / pi) / 2.
        assert crps(samples_MN, truth_N).mean() == pytest.approx(1 / np.sqrt(np.pi), rel=0.02)


def test_the_fair_energy_score_is_best_for_the_truth_at_two_samples() -> None:
    rng = np.random.default_rng(0)
    truth_ND = rng.normal(size=(4000, 3))
    scores = {
        spread: np.mean([energy_score(spread * rng.normal(size=(2, 3)), truth_D) for truth_D in truth_ND])
        for spread in (0.6, 1.0, 1.6)
    }
    assert min(scores, key=scores.__getitem__) == 1.0


def test_energy_test_tells_distributions_apart() -> None:
    rng = np.random.default_rng(0)
    same = [
        energy_test(rng.normal(size=(20, 2)), rng.normal(size=(20, 2)), draws=99, seed=s) for s in range(60)
    ]
    assert np.mean([p <= 0.1 for p in same]) < 0.25
    assert energy_test(rng.normal(size=(30, 2)), 2.0 * rng.normal(size=(30, 2)) + 0.5, draws=199) < 0.02


def test_reliability_of_honest_and_of_overconfident_forecasts() -> None:
    rng = np.random.default_rng(0)
    chance_N = rng.uniform(size=CASES)
    happened_N = rng.uniform(size=CASES) < chance_N
    honest = reliability(chance_N, happened_N)
    assert honest.error < 0.02
    assert honest.brier == pytest.approx(1 / 6, rel=0.03)
    np.testing.assert_allclose(honest.forecast_B, honest.frequency_B, atol=0.04)
    assert reliability((chance_N > 0.5).astype(float), happened_N).error > 0.2
    with pytest.raises(ConfigError, match="cases of a reliability diagram"):
        reliability(chance_N, happened_N[:3])


def test_bootstrap_takes_episodes_as_the_unit() -> None:
    rng = np.random.default_rng(0)
    level_E = rng.normal(5, 1, 20)
    sums_E2 = np.stack([level_E * 100, np.full(20, 100.0)], 1)
    low, high = interval(bootstrap(sums_E2)) or (0, 0)
    half = 1.96 * level_E.std() / np.sqrt(20)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert bootstrap(np.zeros((3, 2))) is None


def test_one_sample_has_no_spread() -> None:
    with pytest.raises(ConfigError, match="samples: got 1, expected 2 or more"):
        spread_and_error(np.zeros((1, 3)), np.zeros(3))
