"""What a study found, as tables over the horizon and a few headline figures: the body of metrics.json.

Frames of the horizon are counted from 1. Errors of pixels are means of squares, with pixels from 0 to 1.
Means are over windows and views.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidworld.evaluation import disagreement
from vidworld.evaluation.calibration import summarise as calibrate
from vidworld.evaluation.metrics import horizon_table
from vidworld.evaluation.study import LOOKS, Measured, Study
from vidworld.evaluation.verification import bootstrap, interval
from vidworld.evaluation.windows import WRONG, Settings

HEADLINES = (8, 16, 48)
"""Frames of the horizon that the summary names, beside the last one."""

PICTURE_METRICS = (
    "psnr", "psnr_mean", "psnr_median", "psnr_best", "psnr_copy", "psnr_bound", "gain",
    "ssim", "ssim_copy", "ssim_bound", "lpips", "lpips_copy", "lpips_bound", "crps", "mse", "mse_copy",
)  # fmt: skip

COLLAPSED = {"contrast": (0.6, "grey"), "sharpness": (0.4, "blurred"), "motion": (0.3, "frozen")}
"""Below these shares of what the tokenizer shows a rollout has collapsed, and into what."""

NOISY = {"sharpness": (2.5, "noisy"), "motion": (3.0, "flickering")}
"""And above these."""

RATIO_ALARM = 1.05
EPISODES_FOR_INTERVAL = 5


def summarise(study: Study, settings: Settings, frames_per_step: int = 1) -> dict[str, Any]:
    """All tables, and a summary of a few figures under dotted names."""
    horizons, measured = settings.horizons, study.measured
    names = dict.fromkeys(one.window.sample.embodiment for one in measured)
    robots = {name: [one for one in measured if one.window.sample.embodiment == name] for name in names}
    views = {view: [_of_view(one, view) for one in measured] for view in measured[0].views}
    pictures: dict[str, Any] = {"all": _pictures(measured, horizons)}
    for kind, groups in (("views", views), ("embodiments", robots)):
        if len(groups) > 1:
            pictures[kind] = {name: _pictures(group, horizons) for name, group in groups.items()}
    actions, collapse = _actions(measured, horizons), _collapse(measured)
    summary = _summary(pictures["all"], actions, collapse)
    calibration = {
        name: calibrate(verified, frames_per_step, horizons)
        for name, group in robots.items()
        if (verified := [(one.window.sample.key, one.verified) for one in group if one.verified])
    }
    spreads = {
        name: disagreement.summarise(found, _dimensions(group[0]), frames_per_step)
        for name, group in robots.items()
        if (found := [one.spread for one in group if one.spread is not None])
    }
    return {
        "summary": summary,
        "intervals": _intervals(measured, horizons),
        "warnings": _warnings(study, settings, summary, collapse),
        "pictures": pictures,
        "actions": {"rollout": actions, "denoising": study.denoising},
        "collapse": collapse,
        "proprio": {name: _proprio(group, horizons, frames_per_step) for name, group in robots.items()},
        **({"calibration": calibration} if calibration else {}),
        **({"uncertainty": spreads} if spreads else {}),
        "curve": _pictures(measured, range(1, settings.frames + 1)),
        "windows": [_window(one, horizons) for one in measured],
    }


def _of_view(one: Measured, view: str) -> Measured:
    return dataclasses.replace(one, views={view: one.views[view]}, wrong={view: one.wrong[view]})


def _rows(
    measured: Sequence[Measured],
) -> Iterator[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
    """For each window and view its metrics, and its errors under wrong actions."""
    for one in measured:
        for view, found in one.views.items():
            yield found, one.wrong[view]


def _pictures(measured: Sequence[Measured], horizons: Sequence[int]) -> dict[str, Any]:
    """Means; for the gain also the median, and that of the pooled error, which still windows do not sway."""
    rows = [{name: found[name] for name in PICTURE_METRICS if name in found} for found, _ in _rows(measured)]
    table = horizon_table(rows, horizons)
    table["windows"] = table.pop("episodes")
    mean = table["mean"]
    mean["gain_median"] = [float(np.median([row["gain"][h - 1] for row in rows])) for h in horizons]
    mean["gain_pooled"] = [
        None if not own or not copy else float(10 * np.log10(copy / own))
        for own, copy in zip(mean["mse"], mean["mse_copy"], strict=True)
    ]
    return table


def _actions(measured: Sequence[Measured], horizons: Sequence[int]) -> dict[str, Any]:
    """Pixel error under wrong actions over that under the true ones, with the same noise.

    `ratio` is at each of the horizons, `ratio_all` of the mean errors over them.
    """
    at_horizons = [horizon - 1 for horizon in horizons]
    table: dict[str, Any] = {"horizons": list(horizons)}
    for kind in WRONG:
        rows = [
            (found["mse_first"][at_horizons], wrong[kind])
            for found, wrong in _rows(measured)
            if kind in wrong
        ]
        if rows:
            true_H, wrong_H = np.mean(rows, 0)
            table[kind] = {
                "ratio": [_ratio(wrong, true) for wrong, true in zip(wrong_H, true_H, strict=True)],
                "ratio_all": _ratio(wrong_H.mean(), true_H.mean()),
            }
        else:
            table[kind] = None
    return table


def _collapse(measured: Sequence[Measured]) -> dict[str, Any]:
    """Looks of the last quarter of the frames against the truth's: 1 is alike, 0 has collapsed."""
    rows = [found for found, _ in _rows(measured)]
    tail = max(1, len(rows[0]["psnr"]) // 4)
    table: dict[str, Any] = {"last_frames": tail}
    for name in LOOKS:
        truth, bound, model = (
            float(np.mean([row[f"{name}_{whose}"][-tail:].mean() for row in rows]))
            for whose in ("truth", "bound", "model")
        )
        table[name] = {"ratio": _ratio(model, truth), "ratio_bound": _ratio(bound, truth)}
    return table


def _summary(
    pictures: Mapping[str, Any], actions: Mapping[str, Any], collapse: Mapping[str, Any]
) -> dict[str, float | None]:
    horizons: list[int] = pictures["horizons"]
    mean = pictures["mean"]
    summary: dict[str, float | None] = {}
    for place, horizon in enumerate(horizons):
        if horizon not in HEADLINES and horizon != horizons[-1]:
            continue
        summary[f"psnr_gain.f{horizon}"] = mean["gain"][place]
        summary[f"psnr.f{horizon}"] = mean["psnr"][place]
        summary[f"psnr_copy.f{horizon}"] = mean["psnr_copy"][place]
        summary[f"psnr_bound.f{horizon}"] = mean["psnr_bound"][place]
        if "lpips" in mean:
            summary[f"lpips.f{horizon}"] = mean["lpips"][place]
        summary[f"shuffle_ratio.f{horizon}"] = actions["shuffled"] and actions["shuffled"]["ratio"][place]
    summary["shuffle_ratio"] = actions["shuffled"] and actions["shuffled"]["ratio_all"]
    for name in LOOKS:
        summary[f"{name}_ratio"] = collapse[name]["ratio"]
    return summary


def _intervals(measured: Sequence[Measured], horizons: Sequence[int]) -> dict[str, list[float] | None]:
    """95 % intervals of the headline figures: bootstrap over episodes, as windows of one are alike."""
    at_horizons = [horizon - 1 for horizon in horizons]

    def interval_of(parts: Callable[[Mapping, Mapping], tuple[float, float] | None]) -> list[float] | None:
        """Of sum(first) / sum(second)."""
        sums: dict[str, list[tuple[float, float]]] = {}
        for one in measured:
            found = [pair for row in _rows([one]) if (pair := parts(*row)) is not None]
            sums.setdefault(one.window.sample.key, []).extend(found)
        sums_E2 = np.array([np.sum(pairs, 0) for pairs in sums.values() if pairs])
        if len(sums_E2) < EPISODES_FOR_INTERVAL:
            return None
        return interval(bootstrap(sums_E2))

    intervals = {
        f"psnr_gain.f{horizon}": interval_of(lambda found, _, h=horizon: (found["gain"][h - 1], 1.0))
        for horizon in horizons
        if horizon in HEADLINES or horizon == horizons[-1]
    }
    intervals["shuffle_ratio"] = interval_of(
        lambda found, wrong: (
            (wrong["shuffled"].mean(), found["mse_first"][at_horizons].mean())
            if "shuffled" in wrong
            else None
        )
    )
    return intervals


def _warnings(
    study: Study, settings: Settings, summary: Mapping[str, float | None], collapse: Mapping[str, Any]
) -> list[str]:
    """What a reader must not overlook, in plain words."""
    warnings = []
    if settings.split == "train":
        warnings.append("these are episodes that were trained on")
    gain, ratio = summary[f"psnr_gain.f{settings.frames}"], summary["shuffle_ratio"]
    if gain is not None and gain <= 0:
        warnings.append(
            f"at frame {settings.frames} the rollout is no better than holding the last known frame"
        )
    if ratio is None:
        warnings.append("there is but one window, so actions could not be shuffled")
    elif ratio < RATIO_ALARM:
        warnings.append(f"wrong actions hardly make the rollout worse ({ratio:.2f} x): it ignores them")
    for name, (bound, word) in [*COLLAPSED.items(), *NOISY.items()]:
        share, possible = collapse[name]["ratio"], collapse[name]["ratio_bound"]
        if (
            share is not None
            and possible
            and (share < bound * possible if bound < 1 else share > bound * possible)
        ):
            warnings.append(f"the rollout ends {word}: its {name} is {share:.2f} x the truth's")
    same = [one for one in study.measured if one.partner and one.partner.sample == one.window.sample]
    if same:
        warnings.append(f"{len(same)} windows were given actions of the same episode as the shuffled ones")
    if study.plan.too_short:
        keys = [sample.key for sample in study.plan.too_short]
        shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
        warnings.append(f"episodes too short for the horizon were left out: {len(keys)} ({shown})")
    return warnings


def _proprio(measured: Sequence[Measured], horizons: Sequence[int], frames_per_step: int) -> dict[str, Any]:
    """Absolute errors in units; where time is compressed, at whole steps only."""
    steps = [horizon // frames_per_step for horizon in horizons if horizon % frames_per_step == 0]
    dimensions = {}
    for name, first in measured[0].proprio.items():
        rows = [{key: one.proprio[name][key] for key in ("mae", "mae_copy", "crps")} for one in measured]
        dimensions[name] = {"unit": first["unit"], **horizon_table(rows, steps)["mean"]}
    return {"horizons": [step * frames_per_step for step in steps], "dimensions": dimensions}


def _window(one: Measured, horizons: Sequence[int]) -> dict[str, Any]:
    by_view = {
        name: {view: [found[name][h - 1] for h in horizons] for view, found in one.views.items()}
        for name in ("psnr", "gain")
    }
    return {
        "key": one.window.sample.key,
        "episode_id": one.window.sample.episode_id,
        "start": one.window.start,
        "shuffled_with": one.partner and f"{one.partner.sample.key}@{one.partner.start}",
        **_spread(one),
        **by_view,
    }


def _spread(one: Measured) -> dict[str, float | None]:
    """What is open, unknown and wrong in a window: standard deviations of pixels, over all its frames."""
    if one.spread is None:
        return {}
    return {
        "open": float(np.sqrt(one.spread.open_T.mean())),
        "unknown": one.spread.unknown,
        "error": float(np.sqrt(one.spread.error_T.mean())),
    }


def _dimensions(one: Measured) -> list[tuple[str, str]]:
    return [(name, found["unit"]) for name, found in one.proprio.items()]


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None
