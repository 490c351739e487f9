import math

import numpy as np
import pytest
import torch

from vidworld.diffusion.energy import EnergyConfig, energy_score, frame_energy_scores
from vidworld.errors import ConfigError
from vidworld.types import Frames


def reference_score(samples: np.ndarray, target: np.ndarray, fairness: float) -> float:
    """The weighted sum of the fair and the biased score, pair by pair, for one vector."""
    m = len(samples)
    error = sum(math.dist(x, target) for x in samples) / m
    pairs = sum(math.dist(x, y) for x in samples for y in samples)
    fair = error - pairs / (2 * m * (m - 1))
    biased = error - pairs / (2 * m * m)
    return fairness * fair + (1 - fairness) * biased


@pytest.mark.parametrize("fairness", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_parity_with_a_plain_loop(num_samples, fairness):
    rng = np.random.default_rng(0)
    samples, target = rng.normal(size=(num_samples, 2, 3, 4)), rng.normal(size=(2, 3, 4))
    got = energy_score(torch.from_numpy(samples), torch.from_numpy(target), fairness=fairness)
    for b in range(2):
        for t in range(3):
            expected = reference_score(samples[:, b, t], target[b, t], fairness)
            assert got[b, t].item() == pytest.approx(expected, abs=1e-12)


def gaussian_crps(y: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Closed form of the CRPS of N(mean, std^2) (Gneiting et al. 2005)."""
    w = (y - mean) / std
    density = torch.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
    return std * (w * torch.erf(w / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def mean_score(mean: float, std: float, fairness: float, num_samples: int = 2) -> float:
    """Mean score of ensembles of N(mean, std^2) for targets of N(0, 1), with common random numbers."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    samples = mean + std * torch.randn(num_samples, *target.shape, generator=generator, dtype=torch.float64)
    return energy_score(samples, target, fairness=fairness).mean().item()


def test_the_fair_score_of_two_samples_is_unbiased_for_the_closed_form():
    target = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_crps(target, 0.3, 1.5).mean().item()
    assert mean_score(0.3, 1.5, fairness=1.0) == pytest.approx(expected, abs=0.01)
    excess = 1.5 / math.sqrt(math.pi) / 2
    assert mean_score(0.3, 1.5, fairness=0.0) == pytest.approx(expected + excess, abs=0.01), (
        "biased by E|x-x'|/2M"
    )


def test_the_score_is_least_at_the_truth():
    spreads = {std: mean_score(0.0, std, fairness=1.0) for std in (0.4, 0.7, 1.0, 1.4, 2.0)}
    assert min(spreads, key=spreads.__getitem__) == 1.0
    means = {mean: mean_score(mean, 1.0, fairness=1.0) for mean in (-0.5, -0.2, 0.0, 0.2, 0.5)}
    assert min(means, key=means.__getitem__) == 0.0
    almost = {std: mean_score(0.0, std, fairness=0.95) for std in (0.4, 0.7, 0.95, 1.4)}
    assert min(almost, key=almost.__getitem__) == 0.95
    biased = {std: mean_score(0.0, std, fairness=0.0) for std in (0.4, 0.7, 1.0, 1.4, 2.0)}
    assert min(biased, key=biased.__getitem__) == 0.4, "the negative control rewards too little spread"


def test_the_vector_score_sees_dependence_that_marginals_miss():
    """Right marginals with the wrong sign of correlation score worse than the truth."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, sign: float) -> torch.Tensor:
        shared, own = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        return torch.stack([shared, sign * (0.95 * shared + math.sqrt(1 - 0.95**2) * own)], -1)

    target = draw(100_000, sign=1)
    right, wrong = (energy_score(draw(2, 100_000, sign=sign), target).mean() for sign in (1, -1))
    assert right < wrong - 0.05


def test_gradients_are_finite_where_samples_coincide():
    samples = torch.zeros(2, 3, 4, requires_grad=True)
    energy_score(samples, torch.zeros(3, 4)).sum().backward()
    assert samples.grad is not None
    assert samples.grad.isfinite().all()


def test_frame_scores_group_patches_and_whole_frames(draw_frames):
    samples, target = [draw_frames() for _ in range(3)], draw_frames()
    stacked = samples[0].map(lambda *tensors: torch.stack(tensors), *samples[1:])
    latents_BT, proprio_BT = frame_energy_scores(stacked, target, EnergyConfig(samples=3, patch=2))
    assert latents_BT.shape == proprio_BT.shape == (4, 3)

    members = stacked.latents_BTVChw[:, 1, 2].float().double().numpy()
    truth = target.latents_BTVChw[1, 2].float().double().numpy()
    patches = [
        reference_score(
            members[:, view, :, y : y + 2, x : x + 2].reshape(3, -1),
            truth[view, :, y : y + 2, x : x + 2].ravel(),
            0.95,
        )
        / 4  # sqrt of 4 channels x 2 x 2
        for view in range(2)
        for y in (0, 2)
        for x in (0, 2, 4)
    ]
    whole = reference_score(members.reshape(3, -1), truth.ravel(), 0.95) / math.sqrt(truth.size)
    assert latents_BT[1, 2].item() == pytest.approx(np.mean(patches) + 0.5 * whole, rel=1e-5)
    state = reference_score(
        stacked.proprio_BTS[:, 1, 2].numpy(), target.proprio_BTS[1, 2].numpy(), 0.95
    ) / math.sqrt(5)
    assert proprio_BT[1, 2].item() == pytest.approx(state, rel=1e-5)


def test_scales_score_means_over_pixels(draw_frames):
    """Against a plain loop; weights are those of the pixels averaged."""
    samples, target = [draw_frames() for _ in range(2)], draw_frames()
    stacked = samples[0].map(lambda *tensors: torch.stack(tensors), samples[1])
    weight = torch.rand(4, 3, 2, 1, 4, 6)
    config = EnergyConfig(patch=1, scales=(1, 2), global_weight=0.0)
    latents_BT, _ = frame_energy_scores(stacked, target, config, weight_BTV1hw=weight)

    members = stacked.latents_BTVChw[:, 1, 2].float().double().numpy()
    truth = target.latents_BTVChw[1, 2].float().double().numpy()
    weights = weight[1, 2, :, 0].double().numpy()
    of_scales = []
    for scale in (1, 2):
        cells = [
            (view, slice(y, y + scale), slice(x, x + scale))
            for view in range(2)
            for y in range(0, 4, scale)
            for x in range(0, 6, scale)
        ]
        scores = [
            scale
            * weights[view, rows, columns].mean()
            * reference_score(
                members[:, view, :, rows, columns].mean((-2, -1)),
                truth[view, :, rows, columns].mean((-2, -1)),
                0.95,
            )
            / 2  # sqrt of 4 channels
            for view, rows, columns in cells
        ]
        of_scales.append(np.mean(scores))
    assert latents_BT[1, 2].item() == pytest.approx(np.mean(of_scales), rel=1e-5)
    assert of_scales[0] != pytest.approx(of_scales[1], rel=0.01)


def test_coarse_scales_see_whether_neighbours_agree():
    """Samples that move all patches alike, where true patches move each by itself, have right patches."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, size: int) -> Frames:
        return Frames(
            torch.randn(count, 2000, 1, 1, 1, size, size, generator=generator).expand(
                count, 2000, 1, 1, 1, 4, 4
            ),
            torch.zeros(count, 2000, 1, 0),
        )

    def scored(size: int, *scales: int) -> float:
        config = EnergyConfig(patch=1, scales=scales, global_weight=0.0, fairness=1.0)
        return float(frame_energy_scores(draw(2, size), draw(1, 4)[0], config)[0].mean())

    fine = abs(scored(1, 1) - scored(4, 1))
    assert fine < 0.03, "single patches cannot tell"
    assert scored(1, 4) > scored(4, 4) + 0.3
    assert scored(4, 4) == pytest.approx(scored(4, 1), abs=0.05), "what is independent weighs alike"


def test_impossible_settings_are_refused(draw_frames):
    for scales in ((), (0,), (2, 2)):
        with pytest.raises(ConfigError, match=r"objective\.energy\.scales"):
            EnergyConfig(scales=scales)
    same = draw_frames().map(lambda tensor: torch.stack([tensor, tensor]))
    with pytest.raises(ConfigError, match=r"energy\.scales.*4.*divisors of the latent size 4x6"):
        frame_energy_scores(same, draw_frames(), EnergyConfig(patch=1, scales=(4,)))
    for wrong in ({"samples": 1}, {"fairness": 1.2}, {"patch": 0}):
        with pytest.raises(ConfigError):
            EnergyConfig(**wrong)
    with pytest.raises(ValueError, match="at least 2"):
        energy_score(torch.zeros(1, 3), torch.zeros(3))
    pair = draw_frames().map(lambda tensor: torch.stack([tensor, tensor]))
    with pytest.raises(ConfigError, match="a divisor of the latent size 4x6"):
        frame_energy_scores(pair, draw_frames(), EnergyConfig(patch=4))
