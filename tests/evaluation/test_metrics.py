import json
import math

import numpy as np
import pytest
import torch

from vidworld.contract import Dimension
from vidworld.evaluation.metrics import (
    crps,
    curve,
    horizon_table,
    proprio_metrics,
    psnr,
    ssim,
    video_metrics,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def episode(rng) -> np.ndarray:
    """A bright disc that crosses a dim textured floor: [6, 32, 40, 3] in [0, 1]."""
    y, x = np.mgrid[:32, :40]
    floor = 0.3 + 0.1 * rng.random((32, 40, 3))
    frames = [np.where(((x - 8 - 4 * t) ** 2 + (y - 16) ** 2 < 30)[..., None], 0.9, floor) for t in range(6)]
    return np.stack(frames)


def test_psnr_by_hand_and_its_ceiling(episode):
    off = np.clip(episode + 0.1, 0, None)
    assert psnr(off, episode) == pytest.approx(np.full(6, 20.0))
    assert psnr(episode, episode) == pytest.approx(np.full(6, 100.0))
    eight_bit = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr(eight_bit + np.uint8(51), eight_bit)[0] == pytest.approx(-20 * math.log10(0.2))
    assert psnr(eight_bit, np.zeros((1, 4, 4, 3)))[0] == 100.0, "uint8 and floats meet on one scale"
    with pytest.raises(ValueError, match="expected uint8 or floats"):
        psnr(eight_bit.astype(np.int64), eight_bit)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.4])
def test_parity_with_torchmetrics(episode, rng, noise):
    image = pytest.importorskip("torchmetrics.functional.image")
    other = np.clip(episode + noise * rng.standard_normal(episode.shape), 0, 1)
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (other, episode))
    expected = image.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert ssim(other, episode) == pytest.approx(expected.numpy(), abs=1e-6)
    for t in range(6):
        reference = image.peak_signal_noise_ratio(a[t], b[t], data_range=1.0).item()
        assert psnr(other, episode)[t] == pytest.approx(reference, abs=1e-5)


def test_ssim_orders_pictures_as_eyes_do(episode, rng):
    assert ssim(episode, episode) == pytest.approx(np.ones(6))
    assert ssim(episode, episode[:1]).shape == (6,)
    brighter = episode + 0.05
    noise = rng.standard_normal(episode.shape)
    noisy = episode + 0.05 * noise / noise.std()
    assert psnr(brighter, episode) == pytest.approx(psnr(noisy, episode), abs=0.1)
    assert (ssim(brighter, episode) > ssim(noisy, episode) + 0.1).all()
    with pytest.raises(ValueError, match="expected at least 11"):
        ssim(episode[:, :10], episode[:, :10])


@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_crps_parity_with_a_plain_loop(rng, num_samples):
    samples, truth = rng.normal(size=(num_samples, 5, 2)), rng.normal(size=(5, 2))
    got = crps(samples, truth)
    for place in np.ndindex(5, 2):
        x, y = samples[(slice(None), *place)], truth[place]
        spread = sum(abs(a - b) for a in x for b in x) / (2 * num_samples * (num_samples - 1))
        assert got[place] == pytest.approx(np.abs(x - y).mean() - spread)
    assert crps(samples[:1], truth) == pytest.approx(np.abs(samples[0] - truth))


def test_crps_is_fair_and_least_at_the_truth(rng):
    truth = rng.normal(size=100_000)
    scores = {std: crps(std * rng.normal(size=(3, truth.size)), truth).mean() for std in (0.5, 1.0, 2.0)}
    assert min(scores, key=scores.__getitem__) == 1.0
    expected = 1 / math.sqrt(math.pi)  # CRPS of N(0, 1) on its own draws
    assert scores[1.0] == pytest.approx(expected, abs=0.01)
    assert crps(rng.normal(size=(20, truth.size)), truth).mean() == pytest.approx(expected, abs=0.01)
    assert crps(0 * truth[None], truth).mean() > scores[1.0] + 0.1, "the negative control: the mean alone"


def test_video_metrics_tell_sharp_samples_from_the_blurry_mean(episode):
    """Two equally likely futures: one sample has each."""
    mirrored = episode[:, ::-1].copy()
    mirrored[:, :, :5] = 0.0
    samples = np.stack([mirrored, episode])
    metrics = video_metrics(samples, episode, episode[0], reconstruction_THWC=episode)
    assert {name: values.shape for name, values in metrics.items()} == dict.fromkeys(metrics, (6,))
    assert metrics["psnr_best"] == pytest.approx(np.full(6, 100.0))
    assert metrics["psnr"] == pytest.approx((100 + psnr(mirrored, episode)) / 2)
    assert metrics["psnr_mean"] == pytest.approx(psnr((mirrored + episode) / 2, episode))
    assert metrics["psnr_median"] == pytest.approx(metrics["psnr_mean"]), "two samples have no other median"
    assert (metrics["psnr_mean"] > psnr(mirrored, episode)).all()
    assert metrics["psnr_copy"][0] == 100.0
    assert (metrics["psnr_copy"][1:] < 30).all()
    assert metrics["psnr_bound"] == pytest.approx(np.full(6, 100.0))
    assert metrics["ssim"] == pytest.approx((1 + ssim(mirrored, episode)) / 2)
    assert metrics["crps"] == pytest.approx(np.zeros(6), abs=1e-12), "fair: half of the samples are exact"


def test_best_sample_is_one_sample_and_not_the_best_of_each_frame(episode):
    first, second = episode.copy(), episode.copy()
    first[3:] += 0.3
    second[:3] += 0.1
    metrics = video_metrics(np.stack([first, second]), episode, episode[0])
    assert metrics["psnr_best"] == pytest.approx([20, 20, 20, 100, 100, 100])
    assert "psnr_bound" not in metrics


def test_mismatched_videos_are_refused(episode):
    with pytest.raises(ValueError, match=r"expected \[M, T, H, W, C\]"):
        video_metrics(episode[None, :5], episode, episode[0])
    with pytest.raises(ValueError, match=r"expected \[M, T, H, W, C\]"):
        video_metrics(episode, episode, episode[0])


def test_proprio_errors_keep_their_units():
    truth = np.array([[0.0, 10.0], [1.0, 20.0]])
    samples = np.array([[[0.5, 10.0], [1.0, 24.0]], [[-0.5, 12.0], [2.0, 20.0]]])
    joints = (Dimension("elbow", "rad", "position"), Dimension("gripper", "mm", "position"))
    metrics = proprio_metrics(samples, truth, np.array([0.0, 10.0]), joints)
    assert metrics["elbow"]["unit"] == "rad"
    assert metrics["elbow"]["mae"] == pytest.approx([0.0, 0.5])
    assert metrics["gripper"]["mae"] == pytest.approx([1.0, 2.0])
    assert metrics["gripper"]["mae_copy"] == pytest.approx([0.0, 10.0])
    assert metrics["gripper"]["crps"] == pytest.approx([1.0 - 1.0, 2.0 - 2.0])
    with pytest.raises(ValueError, match=r"expected \[M, T, S\]"):
        proprio_metrics(samples, truth, truth[0], joints[:1])


def test_horizon_table_counts_who_got_there():
    episodes = [{"psnr": np.array([30.0, 20.0, 10.0])}, {"psnr": np.array([40.0, 30.0])}]
    table = horizon_table(episodes, [1, 2, 3, 8])
    assert table["episodes"] == [2, 2, 1, 0]
    assert table["mean"]["psnr"] == [35.0, 25.0, 10.0, None]
    assert table["standard_error"]["psnr"] == [pytest.approx(5.0), pytest.approx(5.0), None, None]
    assert json.loads(json.dumps(table)) == table
    assert curve(episodes)["horizons"] == [1, 2, 3]
    for bad in ((episodes, [0]), ([], [1]), (episodes, [])):
        with pytest.raises(ValueError, match="the first frame is 1"):
            horizon_table(*bad)
    with pytest.raises(ValueError, match="other metrics"):
        horizon_table([*episodes, {"ssim": np.array([1.0])}], [1])
