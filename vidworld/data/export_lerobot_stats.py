"""Statistics as LeRobot keeps them: min, max, mean, std, count and five quantiles, an episode and a dataset.

Source: `lerobot.datasets.compute_stats` (0.4 to 0.6): `get_feature_stats`, `sample_indices`,
`auto_downsample_height_width`, `aggregate_feature_stats`. A quantile of an episode is the least value that
so large a share of the values does not exceed: LeRobot takes it from a histogram of 5000 bins and is off by
up to one bin, here it is exact. A dataset's is the mean of its episodes', weighted by count, there and here.
"""

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)

FeatureStats = dict[str, np.ndarray]
"""Name -> values; `count` has shape (1,)."""


def of_rows(values: np.ndarray) -> FeatureStats:
    """Statistics of a column of an episode, [T] or [T, D]: each of shape [1] or [D]."""
    rows = values.reshape(len(values), -1)
    numbers = rows.astype(np.float64)
    # Integers keep their type where a single one of them is reported.
    exact = rows if rows.dtype.kind in "iu" else numbers
    levels = list(QUANTILES.values())
    return {
        "min": exact.min(0),
        "max": exact.max(0),
        "mean": numbers.mean(0),
        "std": numbers.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, np.quantile(numbers, levels, axis=0, method="inverted_cdf"), strict=True)),
    }


class PictureStats:
    """Statistics of an episode's pictures, per colour and from 0 to 1, of about a hundred of its frames.

    Frames come in order, [n, H, W, 3] uint8 at a time; `result` has shape [3, 1, 1] but for `count`, which is
    the number of pictures looked at.
    """

    def __init__(self, num_frames: int) -> None:
        self._wanted = set(sampled_frames(num_frames))
        self._seen = 0
        self._counts_C256 = np.zeros((3, 256), np.int64)

    def add(self, frames_THWC: np.ndarray) -> None:
        """Look at the next frames."""
        for index, frame in enumerate(frames_THWC, self._seen):
            if index in self._wanted:
                small = _downsampled(frame)
                for colour in range(3):
                    self._counts_C256[colour] += np.bincount(small[..., colour].ravel(), minlength=256)
        self._seen += len(frames_THWC)

    def result(self) -> FeatureStats:
        """What was seen."""
        # A picture has 256 levels, so that counting them gives every statistic exactly.
        levels, counts = np.arange(256) / 255, self._counts_C256
        total = int(counts[0].sum())
        mean = counts @ levels / total
        spread = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
        present = [np.flatnonzero(row) for row in counts]
        stats = {
            "min": np.array([levels[row[0]] for row in present]),
            "max": np.array([levels[row[-1]] for row in present]),
            "mean": mean,
            "std": spread,
            **{name: _quantile(counts, share) / 255 for name, share in QUANTILES.items()},
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in stats.items()}
        return {name: shaped[name] if name != "count" else np.array([len(self._wanted)]) for name in NAMES}


def sampled_frames(num_frames: int) -> list[int]:
    """Frames that stand for an episode: all of up to 100, and n ** 0.75 of a longer one."""
    count = max(min(100, num_frames), min(int(num_frames**0.75), 10_000))
    return sorted({int(index) for index in np.round(np.linspace(0, num_frames - 1, count))})


class RunningStats:
    """Statistics of a dataset from those of its episodes, one after the other."""

    def __init__(self) -> None:
        self._features: dict[str, FeatureStats] = {}

    def add(self, episode: dict[str, FeatureStats]) -> None:
        """Take another episode in."""
        for key, new in episode.items():
            old = self._features.get(key)
            self._features[key] = dict(new) if old is None else _merge(old, new)

    def result(self) -> dict[str, dict[str, list]]:
        """Plain lists by feature, as stats.json has them."""
        return {key: {name: stats[name].tolist() for name in NAMES} for key, stats in self._features.items()}


def _merge(old: FeatureStats, new: FeatureStats) -> FeatureStats:
    total = old["count"] + new["count"]
    share = float(new["count"][0] / total[0])
    step = new["mean"] - old["mean"]
    variance = old["std"] ** 2 * (1 - share) + new["std"] ** 2 * share + step**2 * share * (1 - share)
    return {
        "min": np.minimum(old["min"], new["min"]),
        "max": np.maximum(old["max"], new["max"]),
        "mean": old["mean"] + step * share,
        "std": np.sqrt(variance),
        "count": total,
        **{name: old[name] + (new[name] - old[name]) * share for name in QUANTILES},
    }


def _downsampled(frame: np.ndarray) -> np.ndarray:
    """Every n-th pixel of pictures of 300 pixels and more."""
    height, width = frame.shape[:2]
    if max(height, width) < 300:
        return frame
    step = max(height, width) // 150
    return frame[::step, ::step]


def _quantile(counts_CN: np.ndarray, share: float) -> np.ndarray:
    """The same quantile of whole numbers 0 to N - 1, given how often each occurs [C]."""
    cumulated = counts_CN.cumsum(1)
    return (cumulated < share * cumulated[:, -1:]).sum(1)
