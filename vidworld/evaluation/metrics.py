"""How close imagined episodes are to what happened: per frame of the horizon, in numpy.

Pictures are uint8 or floats in [0, 1], with any axes in front of [H, W, C]. Samples of one episode stand on
the first axis (M); frame t of the horizon is the t-th imagined frame after the context, counted from 1 in
tables. Distortion favours the blurry mean, so sharpness and spread are told apart: the PSNR of single
samples, of their mean and median, and of the best one, beside the CRPS.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vidworld.contract import Dimension

PSNR_CEILING_DB = 100.0
"""PSNR of equal pictures, so that means stay finite; one wrong value in 128 x 96 x 3 is 94 dB."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture [..., H, W, C] -> [...]."""
    error = _unit(predicted) - _unit(truth)
    mean_square = np.square(error).mean((-3, -2, -1))
    return -10 * np.log10(np.maximum(mean_square, 10 ** (-PSNR_CEILING_DB / 10)))


def ssim(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture [..., H, W, C] -> [...], 1 for equal ones.

    Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), mean over channels;
    pictures are mirrored at their edges, as torchmetrics does. Raises ValueError for pictures smaller than
    the window.
    """
    predicted, truth = np.broadcast_arrays(np.asarray(predicted), np.asarray(truth))
    height, width = predicted.shape[-3:-1]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM of pictures of {height} x {width}; expected at least {SSIM_WINDOW} on each side"
        )
    blur_rows, blur_columns = _gaussian_blur(height), _gaussian_blur(width)
    scores = np.empty(predicted.shape[:-3])
    for place in np.ndindex(scores.shape):
        a_CHW, b_CHW = (np.moveaxis(_unit(picture[place]), -1, 0) for picture in (predicted, truth))
        maps = np.stack([a_CHW, b_CHW, a_CHW * a_CHW, b_CHW * b_CHW, a_CHW * b_CHW])
        mean_a, mean_b, square_a, square_b, product = blur_rows @ maps @ blur_columns.T
        luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
        variances = square_a - mean_a**2 + square_b - mean_b**2
        scores[place] = (
            luminance * (2 * (product - mean_a * mean_b) + SSIM_C2) / (variances + SSIM_C2)
        ).mean()
    return scores


def _gaussian_blur(size: int) -> np.ndarray:
    """The blur of a line of pixels, mirrored at its ends, as a matrix [size, size]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    source = np.abs(np.arange(size)[:, None] + offsets)
    source = np.where(source < size, source, 2 * (size - 1) - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weights / weights.sum())
    return matrix


def appearance(videos_MTHWC: np.ndarray, before_HWC: np.ndarray) -> dict[str, np.ndarray]:
    """How pictures in [0, 1] look, for each frame [T]; the first one is compared with `before_HWC`.

    contrast is the standard deviation of a picture's pixels, sharpness the mean square of its differences of
    neighbours, motion the mean absolute change from the frame before.
    """
    count = len(videos_MTHWC)
    first_M1HWC = np.broadcast_to(before_HWC, (count, 1, *before_HWC.shape))
    before_MTHWC = np.concatenate([first_M1HWC, videos_MTHWC[:, :-1]], 1)
    across = np.square(np.diff(videos_MTHWC, axis=-2)).mean((-3, -2, -1))
    down = np.square(np.diff(videos_MTHWC, axis=-3)).mean((-3, -2, -1))
    return {
        "contrast": videos_MTHWC.std((-3, -2), dtype=np.float64).mean((0, -1)),
        "sharpness": (across + down).mean(0, dtype=np.float64),
        "motion": np.abs(videos_MTHWC - before_MTHWC).mean((0, -3, -2, -1), dtype=np.float64),
    }


def crps(samples_MX: np.ndarray, truth_X: np.ndarray) -> np.ndarray:
    """Fair continuous ranked probability score of M samples at each place X; lower is better.

    (1/M) sum_i |x_i - y| - 1/(2 M (M - 1)) sum_ij |x_i - x_j| (Ferro 2014): unbiased for any M, so ensembles
    of different sizes compare. One sample gives its absolute error.
    """
    samples_MX, truth_X = _float(samples_MX), _float(truth_X)
    num_samples = len(samples_MX)
    error_X = np.abs(samples_MX - truth_X).mean(0)
    if num_samples == 1:
        return error_X
    # sum_ij |x_i - x_j| = 2 sum_i (2 i - M + 1) x_(i) over the samples in order, i from 0.
    rank_M = (2 * np.arange(num_samples) - num_samples + 1).astype(samples_MX.dtype)
    spread_X = 2 * np.tensordot(rank_M, np.sort(samples_MX, axis=0), axes=1)
    return error_X - spread_X / (2 * num_samples * (num_samples - 1))


def video_metrics(
    samples_MTHWC: np.ndarray,
    truth_THWC: np.ndarray,
    last_HWC: np.ndarray,
    *,
    reconstruction_THWC: np.ndarray | None = None,
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Picture metrics of one episode and view for each frame of the horizon, name -> [T].

    `last_HWC` is the last frame of the context, held still by the copy-last-frame baseline;
    `reconstruction_THWC` is the truth through the tokenizer, the bound of every model on it.

    psnr and ssim are means over samples; psnr_mean and psnr_median are of the pixel mean and median of the
    samples; psnr_best is of the sample that is best over the whole horizon; crps is fair and in units of the
    picture's range; psnr_copy, ssim_copy, psnr_bound, ssim_bound are those of the baseline and of the bound.
    With a `perceptual` distance of pictures, such as `Lpips.of_pictures`, lpips, lpips_copy and lpips_bound.
    """
    if samples_MTHWC.ndim != 5 or samples_MTHWC.shape[1:] != truth_THWC.shape or not samples_MTHWC.size:
        raise ValueError(
            f"samples {samples_MTHWC.shape} of a truth {truth_THWC.shape}; expected [M, T, H, W, C]"
        )
    samples, truth = _unit(samples_MTHWC), _unit(truth_THWC)
    psnr_MT = psnr(samples, truth)
    error_M = np.square(samples - truth).mean((1, 2, 3, 4))
    metrics = {
        "psnr": psnr_MT.mean(0),
        "psnr_mean": psnr(samples.mean(0), truth),
        "psnr_median": psnr(np.median(samples, axis=0), truth),
        "psnr_best": psnr_MT[int(error_M.argmin())],
        "psnr_copy": psnr(_unit(last_HWC), truth),
        "ssim": ssim(samples, truth).mean(0),
        "ssim_copy": ssim(_unit(last_HWC), truth),
        "crps": crps(samples, truth).mean((1, 2, 3)),
    }
    if reconstruction_THWC is not None:
        metrics["psnr_bound"] = psnr(reconstruction_THWC, truth)
        metrics["ssim_bound"] = ssim(reconstruction_THWC, truth)
    if perceptual is not None:
        metrics["lpips"] = perceptual(samples, truth).mean(0)
        metrics["lpips_copy"] = perceptual(_unit(last_HWC), truth)
        if reconstruction_THWC is not None:
            metrics["lpips_bound"] = perceptual(reconstruction_THWC, truth)
    return metrics


def proprio_metrics(
    samples_MTS: np.ndarray,
    truth_TS: np.ndarray,
    last_S: np.ndarray,
    dimensions: Sequence[Dimension],
) -> dict[str, dict[str, Any]]:
    """Proprioception of one episode in its own units, dimension name -> unit and [T] for each metric.

    mae is the absolute error of the mean of the samples, mae_copy that of holding the last known value, crps
    the fair score of the samples.
    """
    if samples_MTS.shape[1:] != truth_TS.shape or truth_TS.shape[1] != len(dimensions):
        raise ValueError(
            f"samples {samples_MTS.shape}, truth {truth_TS.shape}, {len(dimensions)} dimensions; "
            "expected [M, T, S], [T, S] and S"
        )
    samples, truth = np.asarray(samples_MTS, np.float64), np.asarray(truth_TS, np.float64)
    mae = np.abs(samples.mean(0) - truth)
    mae_copy = np.abs(np.asarray(last_S, np.float64) - truth)
    score = crps(samples, truth)
    return {
        dimension.name: {
            "unit": dimension.unit, "mae": mae[:, s], "mae_copy": mae_copy[:, s], "crps": score[:, s],
        }
        for s, dimension in enumerate(dimensions)
    }  # fmt: skip


def horizon_table(episodes: Sequence[Mapping[str, np.ndarray]], horizons: Sequence[int]) -> dict[str, Any]:
    """Means over episodes at chosen frames of the horizon, ready for JSON.

    Gives "horizons", "episodes" (how many reach each), and "mean" and "standard_error" of every metric, lists
    in the order of `horizons`. Episodes that end before a horizon are left out there; where none is left, or
    for the error where there is one, the value is None.
    """
    if not episodes or not horizons or min(horizons) < 1:
        raise ValueError(
            f"a table of {len(episodes)} episodes at frames {list(horizons)}; the first frame is 1"
        )
    names = list(episodes[0])
    if any(list(episode) != names for episode in episodes):
        raise ValueError(f"episodes with other metrics than {names}")
    mean: dict[str, list[float | None]] = {name: [] for name in names}
    error: dict[str, list[float | None]] = {name: [] for name in names}
    counts: list[int] = []
    for horizon in horizons:
        reached = [episode for episode in episodes if len(episode[names[0]]) >= horizon]
        counts.append(len(reached))
        for name in names:
            values = np.array([episode[name][horizon - 1] for episode in reached], np.float64)
            mean[name].append(float(values.mean()) if len(values) else None)
            spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
            error[name].append(spread)
    return {"horizons": list(horizons), "episodes": counts, "mean": mean, "standard_error": error}


def curve(episodes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """`horizon_table` at every frame that an episode reaches, for plots."""
    longest = max((len(next(iter(episode.values()))) for episode in episodes), default=0)
    return horizon_table(episodes, range(1, longest + 1))


def _unit(pictures: np.ndarray) -> np.ndarray:
    """Floats in [0, 1]."""
    pictures = np.asarray(pictures)
    if pictures.dtype == np.uint8:
        return pictures.astype(np.float64) / 255
    if pictures.dtype.kind != "f":
        raise ValueError(f"pictures of {pictures.dtype}; expected uint8 or floats in [0, 1]")
    return _float(pictures)


def _float(values: np.ndarray) -> np.ndarray:
    """Float64, or float32 as it is."""
    values = np.asarray(values)
    return values if values.dtype == np.float32 else values.astype(np.float64)
