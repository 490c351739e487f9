"""How much of what can be foreseen is foreseen: skill by the readout ruler, by kind and horizon.

skill = (H - E) / (H - O) of mean errors over episodes: E of what was imagined, H of holding the last known
frame, O of the oracle, all read by the same ruler. 1 is as good as the true simulator that does not know what
is hidden, 0 as good as doing nothing. A quantity counts at a horizon where the oracle is better than holding
beyond doubt: else there is nothing to foresee. A kind's skill is the mean over its headline quantities that
count and that the ruler reads well enough.

Shapes: M samples, T horizons, E episodes, N bootstrap draws.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.evaluation.fidelity import IOU, frame_errors, iou
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.quantities import LEAST_PIXELS, SUBJECTS
from vidworld.evaluation.readout_errors import blunt

if TYPE_CHECKING:
    from vidworld.evaluation.readout import Readings

HEADLINE: Mapping[str, tuple[str, ...]] = {
    "rigid": ("object_position_m", "object_iou_error"),
    "container": ("box_position_m", "box_tilt", "box_iou_error"),
    "paint": ("streak_iou_error", "coverage"),
    "liquid": ("fill", "spilled_ml", "liquid_iou_error"),
    "smoke": ("smoke_iou_error", "plume_position_m"),
}
"""What a kind's skill is the mean of."""
DRAWS = 2000
OF_OBJECTS = "object"
"""Begins the names of what is averaged over rigid objects."""


@dataclass(frozen=True)
class Skill:
    """One quantity, or the mean of several, at one horizon."""

    value: float | None
    """None where nothing can be foreseen."""
    interval: tuple[float, float] | None
    """Central 95 % over resampled episodes."""
    episodes: int
    imagined: float | None = None
    held: float | None = None
    oracle: float | None = None
    used: tuple[str, ...] = ()
    """Of a mean: the quantities that counted."""


def headline_errors(readings: "Readings", truth: Truth) -> dict[str, np.ndarray]:
    """Errors [M, T] of the headline quantities of a kind, NaN where the truth shows nothing to read.

    A mask counts where the truth shows `LEAST_PIXELS` of it, whatever was read, so that all who are compared
    are judged on the same frames.
    """
    errors = frame_errors(readings, truth)
    for name, true_THW in truth.masks_THW.items():
        seen_T = true_THW.sum((-2, -1)) >= LEAST_PIXELS
        error = 1 - iou(readings.masks[name], np.broadcast_to(true_THW, readings.masks[name].shape))
        errors[name + IOU] = np.where(seen_T, error, np.nan)
    subject = SUBJECTS[truth.kind]
    if subject.items:
        stacked = np.stack([errors[item + IOU] for item in subject.items])
        count = np.isfinite(stacked).sum(0)
        total = np.where(np.isfinite(stacked), stacked, 0).sum(0)
        errors[OF_OBJECTS + IOU] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return {name: errors[name] for name in HEADLINE[truth.kind]}


def too_blunt(kind: str, held_out: Mapping[str, Any]) -> tuple[str, ...]:
    """Headline quantities of a kind that the ruler reads too badly to judge by, by its own card.

    A distance is as blunt as half or more of its coordinates, an average over objects as half of theirs.
    """
    bad, subject = set(blunt(held_out)), SUBJECTS[kind]
    parts: dict[str, list[str]] = {
        name: [axis for thing in things for axis in thing] for name, things in subject.distances.items()
    }
    parts |= {f"{mask}{IOU}": [f"{mask} mask"] for mask in subject.masks}
    parts[OF_OBJECTS + IOU] = [f"{item} mask" for item in subject.items]
    found = []
    for name in HEADLINE[kind]:
        of = parts.get(name, [name])
        if 2 * sum(part in bad for part in of) >= len(of):
            found.append(name)
    return tuple(found)


def ruler_error(name: str, kind: str, held_out: Mapping[str, Any]) -> str:
    """What a ruler's card says of a headline quantity, in a few words."""
    masks, quantities = held_out["masks"], held_out["quantities"]
    if name in quantities:
        found = quantities[name]
        return f"ruler off by {_brief(found['mae'])}, R2 {_brief(found['r2'])}"
    if name in held_out.get("distances", {}):
        return f"ruler off by {_brief(held_out['distances'][name]['mean'])}"
    of = SUBJECTS[kind].items if name == OF_OBJECTS + IOU else (name.removesuffix(IOU),)
    known = [masks[mask]["iou"] for mask in of if masks[mask]["iou"] is not None]
    return f"ruler IoU {_brief(float(np.mean(known)) if known else None)}"


def skills(
    imagined: Sequence[Mapping[str, np.ndarray]],
    held: Sequence[Mapping[str, np.ndarray]],
    oracle: Sequence[Mapping[str, np.ndarray]],
    horizon: int,
    *,
    leave_out: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Skill]:
    """Skill of every quantity and, under "", of the kind, at column `horizon` of errors [M, T] an episode.

    `leave_out`: quantities that the mean is not taken over, unless there are no others.
    """
    count = len(imagined)
    if not count or len(held) != count or len(oracle) != count:
        raise ValueError(f"errors of {count}, {len(held)} and {len(oracle)} episodes; expected as many")
    counts_NE = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    found: dict[str, Skill] = {}
    draws: dict[str, np.ndarray] = {}
    for name in imagined[0]:
        errors_E3 = np.array(
            [
                [_mean(one[name][..., horizon]) for one in three]
                for three in zip(imagined, held, oracle, strict=True)
            ]
        )
        known_E = np.isfinite(errors_E3).all(1)
        if known_E.sum() < 2:
            found[name] = Skill(None, None, int(known_E.sum()))
            continue
        e, h, o = errors_E3[known_E].mean(0)
        totals_N3 = counts_NE[:, known_E] @ errors_E3[known_E]
        gap_N = totals_N3[:, 1] - totals_N3[:, 2]
        facts = {"episodes": int(known_E.sum()), "imagined": float(e), "held": float(h), "oracle": float(o)}
        if np.quantile(gap_N, 0.025) <= 0:
            found[name] = Skill(None, None, **facts)
            continue
        draws[name] = (totals_N3[:, 1] - totals_N3[:, 0]) / gap_N
        found[name] = Skill(float((h - e) / (h - o)), _central(draws[name]), **facts)
    used = tuple(name for name in draws if name not in leave_out) or tuple(draws)
    values = [value for name in used if (value := found[name].value) is not None]
    found[""] = Skill(
        float(np.mean(values)) if values else None,
        _central(np.mean([draws[name] for name in used], 0)) if values else None,
        count,
        used=used,
    )
    return found


def in_words(name: str, one: Skill) -> str:
    """A skill's interval, errors and episodes, for the unit of a row."""
    spread = "" if one.interval is None else f", 95 % {one.interval[0]:.2f} to {one.interval[1]:.2f}"
    if one.used:
        return f"mean of {', '.join(one.used)}{spread}, {one.episodes} episodes"
    unit = re.search("_(m|ml)$", name)
    errors = f"{_brief(one.imagined)} imagined, {_brief(one.held)} held, {_brief(one.oracle)} oracle"
    return f"errors{f' in {unit[1]}' if unit else ''}: {errors}{spread}, {one.episodes} episodes"


def _mean(values: np.ndarray) -> float:
    """Mean over samples of one episode; NaN where the truth shows nothing."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


def _central(values_N: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_N, (0.025, 0.975))
    return float(low), float(high)


def _brief(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
