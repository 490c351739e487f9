"""The split of spreads against closed forms, and what it refuses."""

import numpy as np
import pytest
import torch

from vidworld.errors import ConfigError, DataError
from vidworld.world.uncertainty import Rows, Uncertainty, cvar, pessimistic, split

MEANS = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
STDS = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)


def draws(means_J, stds_J, samples, count, seed=0):
    """Gaussian members: [count, J, M]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(means_J), samples, generator=generator, dtype=torch.float64)
    return means_J[:, None] + stds_J[:, None] * noise


def error_of_mean(values):
    return float(values.std() / len(values) ** 0.5)


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_both_parts_are_unbiased(samples):
    """Members with known means and variances: the averages over many draws are the closed forms."""
    found = split(draws(MEANS, STDS, samples, 200_000))
    assert found.epistemic_SX is not None
    assert abs(float(found.aleatoric_SX.mean()) - float((STDS**2).mean())) < 4 * error_of_mean(
        found.aleatoric_SX
    )
    assert abs(float(found.epistemic_SX.mean()) - float(MEANS.var())) < 4 * error_of_mean(found.epistemic_SX)
    # Negative controls: the variance of means without the correction, and the biased variance of samples.
    means = draws(MEANS, STDS, samples, 200_000).mean(2)
    assert abs(float(means.var(1).mean()) - float(MEANS.var())) > 20 * error_of_mean(found.epistemic_SX)
    biased = draws(MEANS, STDS, samples, 200_000).var(2, unbiased=False).mean(1)
    assert abs(float(biased.mean()) - float((STDS**2).mean())) > 20 * error_of_mean(found.aleatoric_SX)


def test_agreeing_members_have_no_epistemic_part_and_shared_noise_would_hide_a_part():
    found = split(draws(torch.zeros(4, dtype=torch.float64), STDS, 4, 100_000))
    assert found.epistemic_SX is not None
    assert abs(float(found.epistemic_SX.mean())) < 4 * error_of_mean(found.epistemic_SX)
    assert 0.3 < float((found.epistemic_SX < 0).double().mean()) < 0.7
    # Members with the same luck agree by chance: E would come out below zero, and in truth it is zero.
    alike = draws(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 4, 100_000)
    shared = split(alike.expand(-1, 4, -1)).epistemic_SX
    assert shared is not None
    assert float(shared.mean()) < -0.2


def test_it_is_the_law_of_total_variance():
    """With many samples and members, A + E is the variance of the mixture."""
    generator = torch.Generator().manual_seed(1)
    means_J = torch.randn(2000, generator=generator, dtype=torch.float64)
    samples = draws(means_J, torch.full((2000,), 0.7, dtype=torch.float64), 50, 1)
    found = split(samples)
    assert float(found.total_SX) == pytest.approx(float(samples.var()), rel=5e-3)
    assert float(found.total_SX) == pytest.approx(1 + 0.49, rel=0.05)


def test_one_member_says_nothing_of_what_it_does_not_know():
    samples = draws(MEANS[:1], STDS[:1], 6, 3)
    found = split(samples)
    assert found.epistemic_SX is None
    assert torch.equal(found.total_SX, samples[:, 0].var(1))


def test_rows_are_compared_within_scenes_in_any_order():
    samples_SJM = draws(MEANS, STDS, 3, 5)
    scene_B = torch.arange(5).repeat_interleave(12)
    member_B = torch.arange(4).repeat_interleave(3).repeat(5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = Rows(scene_B[order], member_B[order])
    found = rows.split(samples_SJM.flatten()[order])
    expected = split(samples_SJM)
    assert torch.allclose(found.aleatoric_SX, expected.aleatoric_SX, atol=1e-12)
    assert torch.allclose(found.epistemic_SX, expected.epistemic_SX, atol=1e-12)
    wrong = Rows(scene_B, member_B[order]).scene_B  # other scenes beside each other
    mixed = Rows(wrong.sort().values[order], member_B[order]).split(samples_SJM.flatten())
    assert not torch.allclose(mixed.aleatoric_SX, expected.aleatoric_SX)


def test_rows_that_cannot_be_compared_are_refused():
    member_B = torch.tensor([0, 0, 1, 1, 1])
    rows = Rows(torch.zeros(5, dtype=torch.int64), member_B)
    with pytest.raises(DataError, match="scene 0 member 0: 2, scene 0 member 1: 3"):
        rows.split(torch.zeros(5))
    with pytest.raises(ConfigError, match="samples of each member: got 1"):
        Rows(torch.zeros(2, dtype=torch.int64), torch.arange(2)).split(torch.zeros(2))
    seen = Uncertainty(
        Rows(torch.zeros(2, dtype=torch.int64), torch.zeros(2)), torch.zeros(2), torch.zeros(2), None
    )
    with pytest.raises(ConfigError, match="decoded pictures"):
        _ = seen.pixels
    with pytest.raises(DataError, match="rows to compare: got 3, expected 2"):
        seen.of(torch.zeros(3))


def test_a_split_carries_gradients():
    values = draws(MEANS, STDS, 3, 2).requires_grad_(True)
    found = split(values)
    assert found.epistemic_SX is not None
    assert torch.autograd.gradcheck(lambda x: split(x).aleatoric_SX, values)
    found.epistemic_SX.sum().backward()
    assert float(values.grad.abs().sum()) > 0


def test_cvar_is_the_tail_mean():
    values = torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0, 5.0, 4.0, -2.0, 6.0, 7.0], dtype=torch.float64)
    assert float(cvar(values, 0.1)) == -2
    assert float(cvar(values, 0.2)) == -1.5
    assert float(cvar(values, 0.15)) == pytest.approx((-2 - 0.5) / 1.5)
    assert float(cvar(values, 1.0)) == pytest.approx(float(values.mean()))
    assert float(cvar(values, 0.2, worst="high")) == 6.5
    # The normal distribution's: -phi(z) / share.
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal(400_000))
    assert float(cvar(normal, 0.1)) == pytest.approx(-1.754983, abs=0.01)
    assert torch.autograd.gradcheck(lambda x: cvar(x, 0.35), values.requires_grad_(True))
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share of CVaR"):
            cvar(values, share)
    with pytest.raises(ConfigError, match="low or high"):
        cvar(values, 0.5, worst="left")


def test_a_pessimist_pays_for_what_is_not_known_alone():
    reward, epistemic = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 4.0, -0.5])
    assert pessimistic(reward, epistemic, 0.5).tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(pessimistic(reward, epistemic, 0.0), reward)
    with pytest.raises(ConfigError, match="weight of the pessimism"):
        pessimistic(reward, epistemic, -1.0)
