"""Statistics against formulas written from lerobot.datasets.compute_stats, over all rows at once."""

import numpy as np
import pytest

from vidworld.data.export_lerobot_stats import NAMES, PictureStats, RunningStats, of_rows, sampled_frames

GENERATOR = np.random.default_rng(0)


def least_value(values: np.ndarray, share: float) -> float:
    """`_compute_single_quantile` with bins of no width: the first value that `share` of all do not exceed."""
    ordered = np.sort(values)
    return next(value for rank, value in enumerate(ordered, 1) if rank >= share * len(ordered))


@pytest.mark.parametrize("count", [1, 2, 7, 400])
def test_rows(count):
    values = GENERATOR.normal(size=(count, 3)).astype("f4")
    stats = of_rows(values)
    assert list(stats) == list(NAMES)
    for column in range(3):
        one = values[:, column].astype(float)
        assert stats["min"][column] == one.min()
        assert stats["max"][column] == one.max()
        np.testing.assert_allclose(stats["mean"][column], one.sum() / count, rtol=1e-12)
        np.testing.assert_allclose(stats["std"][column] ** 2, ((one - one.mean()) ** 2).mean(), atol=1e-12)
        for name, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            assert stats[name][column] == least_value(one, share)
    assert stats["count"].tolist() == [count]


def test_whole_numbers_stay_whole():
    stats = of_rows(np.arange(5))
    assert stats["min"].dtype == stats["max"].dtype == np.int64
    assert stats["mean"].tolist() == [2.0]
    assert of_rows(np.array([True, False]))["max"].tolist() == [1.0]


@pytest.mark.parametrize(("count", "size"), [(5, (20, 30)), (130, (20, 30)), (3, (320, 480))])
def test_pictures(count, size):
    video = GENERATOR.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    seen = PictureStats(count)
    for start in range(0, count, 7):
        seen.add(video[start : start + 7])
    # sample_indices, then auto_downsample_height_width, then statistics over axes (0, 2, 3).
    least = min(100, count)
    number = max(least, min(int(count**0.75), 10_000))
    looked_at = video[np.round(np.linspace(0, count - 1, number)).astype(int)]
    if max(size) >= 300:
        looked_at = looked_at[:, :: size[1] // 150, :: size[1] // 150]
    pixels = looked_at.reshape(-1, 3) / 255
    stats = seen.result()
    assert stats["count"].tolist() == [number]
    for name, expected in (
        ("min", pixels.min(0)),
        ("max", pixels.max(0)),
        ("mean", pixels.mean(0)),
        ("std", pixels.std(0)),
        ("q10", [least_value(colour, 0.1) for colour in pixels.T]),
        ("q99", [least_value(colour, 0.99) for colour in pixels.T]),
    ):
        assert stats[name].shape == (3, 1, 1)
        np.testing.assert_allclose(stats[name].ravel(), expected, atol=1e-9)


def test_frames_that_stand_for_an_episode():
    assert sampled_frames(1) == [0]
    assert sampled_frames(100) == list(range(100))
    assert [len(sampled_frames(count)) for count in (500, 1000, 10_000, 20_000)] == [105, 177, 1000, 1681]
    assert sampled_frames(1000)[-1] == 999


def test_a_dataset_is_the_sum_of_its_episodes():
    episodes = [GENERATOR.normal(index, 1 + index, (5 + 40 * index, 2)) for index in range(4)]
    running = RunningStats()
    for rows in episodes:
        running.add({"action": of_rows(rows)})
    pooled, found = np.concatenate(episodes), running.result()["action"]
    assert found["count"] == [len(pooled)]
    assert found["min"] == pooled.min(0).tolist()
    assert found["max"] == pooled.max(0).tolist()
    np.testing.assert_allclose(found["mean"], pooled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], pooled.std(0), rtol=1e-12)
    # aggregate_feature_stats: quantiles are averaged, weighted by count.
    weights = [len(rows) for rows in episodes]
    expected = np.average([of_rows(rows)["q90"] for rows in episodes], axis=0, weights=weights)
    np.testing.assert_allclose(found["q90"], expected, rtol=1e-12)
