"""Verification of a world's futures of lab episodes, kind by kind: a part of uncertainty.py.

Shapes: M samples, T leads, X latent values, S proprio dims, R = M + 1 ranks, E episodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from uncertainty_worlds import Imagined, Imaginer, Ruler, Window, encode, shown

from vidworld.evaluation import events
from vidworld.evaluation.calibration import Tally, Verified, tally
from vidworld.evaluation.outcomes import read_outcomes
from vidworld.evaluation.strata import STRATA, contact, strata
from vidworld.evaluation.verification import (
    bootstrap,
    coverage,
    interval,
    rank_test,
    spread_skill,
)

FIRST_LEAD = 4
RANK_LEAD = 16
Late = Callable[[], bool]
"""Whether time is up."""


@dataclass
class Kind:
    """What was found of one kind: a window's verification each, and what a fan chart shows."""

    kind: str
    verified: list[Verified] = field(default_factory=list)
    fan: dict[str, Any] = field(default_factory=dict)

    def names(self, prefix: str) -> list[str]:
        """Quantities of a group: latents, proprio or read."""
        found = dict.fromkeys(name for one in self.verified for name in one.tallies)
        return [name for name in found if name.split(" ")[0] == prefix]


def calibrate_kind(
    kind: str, windows: Sequence[Window], imaginer: Imaginer, ruler: Ruler | None, late: Late
) -> Kind:
    """Imagine windows of a kind and verify latents, proprioception and outcomes."""
    found = Kind(kind)
    # Pictures take most of the time, and only a ruler looks at them.
    for number, imagined in enumerate(imaginer(windows, () if ruler is None else None)):
        found.verified.append(verify(imagined, imaginer, ruler, number, found.fan))
        if late() and len(found.verified) > 1:
            break
    return found


def verify(
    imagined: Imagined, imaginer: Imaginer, ruler: Ruler | None, number: int, fan: dict[str, Any]
) -> Verified:
    """Compare the futures of one window with what came."""
    window, world = imagined.window, imaginer.world
    rng = np.random.default_rng([0x0C, number])
    known, contract = window.context, world.spec.contracts[0]
    truth_TX = encode(world, window.frames_THWC[known:])
    tallies = {"latents": latent_tally(imagined.latents_MTX, truth_TX)}
    for s, dimension in enumerate(contract.proprio):
        tallies[f"proprio {dimension.name}"] = tally(
            imagined.proprio_MTS[:, :, s : s + 1],
            window.proprio_TS[known:, s : s + 1].astype(np.float64),
            rng,
            unit=dimension.unit,
        )
    cases: tuple[events.Case, ...] = ()
    assert window.episode is not None
    if ruler is not None and imagined.window.kind in ruler.readout.kinds:
        bound_THWC = shown(world, window.frames_THWC[known:])
        outcomes = read_outcomes(
            ruler.readout,
            imagined.video_MTHWC[:, :, None],
            bound_THWC[:, None],
            window.frames_THWC[:known, None],
            window.episode.meta,
            0,
            where=window.key,
        )
        cases = outcomes.cases
        names = ruler.names(window.kind)
        for name in names:
            unit, samples_MT, read_T = outcomes.readings[name]
            tallies[f"read {name}"] = tally(
                samples_MT[..., None],
                read_T[:, None],
                rng,
                unit=unit,
                where_TX=np.isfinite(read_T)[:, None],
            )
        _keep_fan(fan, window, outcomes.readings, names)
    touching_T = contact(window.episode.meta)
    stratum_T = strata(
        window.frames_THWC[known - 1 :, None],
        window.proprio_TS[known - 1 :],
        contract.proprio_statistics,
        None if touching_T is None else touching_T[known - 1 : len(window.frames_THWC)],
    )
    return Verified(
        tallies,
        np.zeros(len(truth_TX)),
        imagined.proprio_MTS,
        window.proprio_TS[known:],
        stratum_T,
        window.kind,
        cases,
    )


def latent_tally(samples_MTX: Tensor, truth_TX: Tensor) -> Tally:
    """Sums over a frame's latents, on the device that they are on."""
    count = len(samples_MTX)
    variance_TX = samples_MTX.var(0)
    error_TX = (samples_MTX.mean(0) - truth_TX).square() - variance_TX / count
    rank_M = 2 * torch.arange(count, device=truth_TX.device, dtype=truth_TX.dtype) - count + 1
    apart_TX = torch.tensordot(rank_M, samples_MTX.sort(0).values, 1) / (count * (count - 1))
    crps_TX = (samples_MTX - truth_TX).abs().mean(0) - apart_TX
    below_TX = (samples_MTX < truth_TX).sum(0)
    counts_TR = torch.stack([torch.bincount(row, minlength=count + 1) for row in below_TX])
    variance_T, error_T, crps_T = (
        part.double().sum(1).cpu().numpy() for part in (variance_TX, error_TX, crps_TX)
    )
    cases_T = np.full(len(truth_TX), float(truth_TX.shape[1]))
    return Tally("1", cases_T, variance_T, error_T, crps_T, counts_TR.cpu().numpy())


def pooled(found: Kind, prefix: str, *, stratum: int | None = None) -> dict[str, Any] | None:
    """Spread-skill, coverage and CRPS from lead 4 on of a group of quantities, each in units of its error."""
    names = found.names(prefix)
    leads_T = np.arange(1, len(found.verified[0].floor_T) + 1) >= FIRST_LEAD
    sums, counts, total_crps = [], [], 0.0
    for name in names:
        chosen = [
            (one.tallies[name] if stratum is None else one.within(name, stratum)).where(leads_T)
            for one in found.verified
            if name in one.tallies
        ]
        cases = sum(one.cases_T.sum() for one in chosen)
        samples = chosen[0].ranks_TR.shape[1] - 1
        square = sum(one.error_T.sum() + one.variance_T.sum() / samples for one in chosen)
        if cases and square > 0:
            scale = square / cases
            sums.append([[one.variance_T.sum() / scale, one.error_T.sum() / scale] for one in chosen])
            counts.append(sum(one.ranks_TR.sum(0) for one in chosen))
            total_crps += sum(one.crps_T.sum() for one in chosen) / np.sqrt(scale) / cases
    if not sums:
        return None
    sums_EP, counts_R = np.sum(sums, 0), np.sum(counts, 0)
    spans = bootstrap(sums_EP) if len(sums_EP) > 4 and (sums_EP.sum(0) > 0).all() else None
    above, below = sums_EP.sum(0)
    most = (len(counts_R) - 2) / len(counts_R)
    return {
        "quantities": [name.partition(" ")[2] or name for name in names],
        "ssr": spread_skill(above, below),
        "ssr_interval": interval(None if spans is None else np.sqrt(np.maximum(spans, 0))),
        "coverage90": coverage(counts_R, 0.9) if most >= 0.9 else None,
        "rank_counts": counts_R.tolist(),
        "crps": total_crps / len(sums),
    }


def rank_p(found: Kind, prefix: str) -> float | None:
    """p-value of flat rank histograms at one lead, a rank an episode, over all quantities (Bonferroni)."""
    values = []
    for name in found.names(prefix):
        counts = [one.tallies[name].ranks_TR for one in found.verified if name in one.tallies]
        lead = min(RANK_LEAD, len(counts[0])) - 1
        row_R = np.sum([one[lead] for one in counts], 0)
        if row_R.sum() >= 10:
            values.append(rank_test(row_R).p_flat)
    return min(1.0, min(values) * len(values)) if values else None


def kind_rows(found: Kind, suffix: str = "") -> dict[str, tuple[float, str]]:
    """Rows of one kind. The headline is of outcomes where they are read, else of latents."""
    rows: dict[str, tuple[float, str]] = {}
    groups = [prefix for prefix in ("read", "latents", "proprio") if found.names(prefix)]
    episodes, kind = len(found.verified), found.kind
    for place, prefix in enumerate(groups):
        one = pooled(found, prefix)
        if one is None:
            continue
        what = {"read": "outcomes", "latents": "latents", "proprio": "proprioception"}[prefix]
        span = one["ssr_interval"]
        said = f"{what}, {episodes} episodes" + (f", 95 % {span[0]:.2f} to {span[1]:.2f}" if span else "")
        for name in [f"{kind}"] * (place == 0) + [f"{kind}.{what}"]:
            rows[f"uncertainty.ssr.{name}{suffix}"] = (one["ssr"], said)
            if one["coverage90"] is not None:
                rows[f"uncertainty.coverage90.{name}{suffix}"] = (one["coverage90"], f"{what}, want 0.9")
            if prefix != "latents" and (p := rank_p(found, prefix)) is not None:
                rows[f"uncertainty.rank_p.{name}{suffix}"] = (p, f"chance of so uneven ranks, {what}")
            rows[f"uncertainty.crps.{name}{suffix}"] = (one["crps"], f"of the typical error, {what}")
    for index, stratum in enumerate(STRATA):
        one = pooled(found, "latents", stratum=index)
        if one is not None:
            rows[f"uncertainty.ssr.{kind}.latents.{stratum}{suffix}"] = (one["ssr"], "spread / skill")
    return {name: row for name, row in rows.items() if np.isfinite(row[0])}


def event_rows(
    found: Sequence[Kind], leads: Sequence[int], suffix: str = ""
) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    """Reliability error of each event, and the diagrams."""
    forecasts = {
        f"{one.kind}-{number}": list(verified.cases)
        for one in found
        for number, verified in enumerate(one.verified)
    }
    if not any(forecasts.values()):
        return {}, {}
    told = events.summarise(forecasts, leads)
    rows = {}
    for name, one in told.items():
        said = (
            f"{one['windows']} windows, {one['base_rate']:.0%} came, {one['error_by_chance']:.3f} by chance"
        )
        rows[f"uncertainty.event_error.{name}{suffix}"] = (one["error"], said)
    return rows, told


def _keep_fan(
    fan: dict[str, Any],
    window: Window,
    readings: Mapping[str, tuple[str, np.ndarray, np.ndarray]],
    names: Sequence[str],
) -> None:
    """Keep the window and quantity that moves most, for a picture."""
    for name in names:
        unit, samples_MT, read_T = readings[name]
        moved = float(np.ptp(read_T[np.isfinite(read_T)])) if np.isfinite(read_T).any() else 0.0
        relative = moved / (float(np.std(samples_MT)) + 1e-9) * (moved > 0)
        spread = float(samples_MT.std(0).mean())
        score = spread * moved
        if score > fan.get("score", -1.0) and relative >= 0:
            fan.update(
                score=score, key=window.key, name=name, unit=unit, samples=samples_MT, truth=read_T,
                context=window.context,
            )  # fmt: skip
