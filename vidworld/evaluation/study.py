"""Measure a world on recorded episodes: rollouts from many windows against what really happened.

Shapes: W windows, M samples, B = W * M rows, T frames of the horizon, V views, H W pixels, A action dims,
S proprio dims. Frame t of the horizon is counted from 1 in tables.
"""

import contextlib
import itertools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.contract import ActionContract
from vidworld.data.shards import ShardDataset
from vidworld.evaluation.calibration import Verified, verify
from vidworld.evaluation.disagreement import Spread, spread_of
from vidworld.evaluation.futures import Rolled, Roller, roll_out, through_tokenizer
from vidworld.evaluation.metrics import appearance, proprio_metrics, video_metrics
from vidworld.evaluation.outcomes import read_outcomes
from vidworld.evaluation.perceptual import Lpips
from vidworld.evaluation.readout import Readout, load_readout
from vidworld.evaluation.strata import contact, kind_of_lab, strata
from vidworld.evaluation.windows import (
    Plan,
    Recorded,
    Settings,
    Window,
    pairs,
    plan_windows,
    spaced,
)
from vidworld.types import Frames
from vidworld.world.engine import RolloutEngine
from vidworld.world.faithfulness import action_faithfulness
from vidworld.world.spec import WorldSpec
from vidworld.world.world import WorldModel

ROWS_AT_ONCE = {"cuda": 128}
ROWS_AT_ONCE_ELSEWHERE = 32
VIDEO_BYTES = 2**30
MOST_THREADS = 8

DENOISING_CLIPS = 32
"""Clips of an embodiment at most for the denoising loss under wrong actions."""

DENOISING_LEVELS = (0.0, 0.5)
"""Signal levels at which it is measured: pure noise, where actions count most, and half way."""

LOOKS = ("contrast", "sharpness", "motion")
"""What a rollout loses when it collapses, each explained at `_appearance`."""

WORST = "The least gain of all windows not shown above."

FRAMES_A_CLIP = 8
"""A clip of the denoising loss takes the room of about so many rows of a rollout."""


@dataclass(frozen=True)
class Clip:
    """A window to look at, with the context in front of every video."""

    window: Window
    partner: Window | None
    """Whose actions the shuffled ones are."""
    context: int
    """Known frames in front."""
    contract: ActionContract
    truth_TVHWC: np.ndarray
    samples_MTVHWC: np.ndarray
    shuffled_TVHWC: np.ndarray | None
    proprio_TS: np.ndarray
    """Recorded, context included, a row for every latent frame."""
    predicted_MTS: np.ndarray
    """Imagined, without the context."""
    note: str = ""
    """Why it is shown, if not as one of the evenly spaced ones."""


@dataclass(frozen=True)
class Measured:
    """Numbers of one window."""

    window: Window
    partner: Window | None
    """Whose actions were the shuffled ones."""
    views: dict[str, dict[str, np.ndarray]]
    """View -> metric -> [T]."""
    wrong: dict[str, dict[str, np.ndarray]]
    """View -> kind of wrong actions -> mean squared pixel error at `Settings.horizons`."""
    proprio: dict[str, dict[str, Any]]
    """Dimension -> what `proprio_metrics` gives."""
    verified: Verified | None = None
    """What it says of calibration, where that is asked for."""
    spread: Spread | None = None
    """How its futures spread, where there are two of each member."""

    @property
    def last_gain(self) -> float:
        """PSNR above that of the last known frame, at the end of the horizon, in dB."""
        return float(np.mean([found["gain"][-1] for found in self.views.values()]))


@dataclass(frozen=True)
class Study:
    """All that was measured."""

    plan: Plan
    measured: tuple[Measured, ...]
    denoising: dict[str, dict[str, float]]
    """Embodiment -> losses and ratios of `action_faithfulness`; absent where there was but one window."""
    clips: tuple[Clip, ...] = field(repr=False)


@torch.no_grad()
def measure(
    world: WorldModel,
    dataset: ShardDataset,
    settings: Settings,
    *,
    plan: Plan | None = None,
    progress: Callable[[], object] | None = None,
    engine: Roller | None = None,
) -> Study:
    """Roll the world out from every window and compare; `progress` is called after every window.

    `engine` rolls out in place of a `RolloutEngine` of the world.
    """
    plan = plan or plan_windows(dataset, world.spec, settings)
    readout = None if settings.readout is None else load_readout(settings.readout, world.device)
    perceptual = None if settings.lpips is None else Lpips.read(settings.lpips, world.device).of_pictures
    shown = _shown(plan, settings.clips)
    batch = settings.batch or _rows_at_once(world, settings)
    engine = engine or RolloutEngine(world, sampler=settings.sampler(world.spec.sampler))
    futures = settings.samples * world.num_members
    measured: list[Measured] = []
    clips: list[Clip] = []
    denoising: dict[str, dict[str, float]] = {}
    worst: tuple[float, Clip] | None = None
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for embodiment in plan.embodiments:
            windows = plan.of(embodiment)
            probed = {windows[i] for i in spaced(len(windows) - 1, min(DENOISING_CLIPS, len(windows)))}
            probes: list[_Probe] = []
            paired = pairs(dataset, world.spec, settings, windows)
            while chunk := list(itertools.islice(paired, max(1, batch // futures))):
                rollouts = roll_out(engine, settings, chunk, first=len(measured), batch=batch, shown=shown)
                encoded = [through_tokenizer(world, recorded.frames_TVHWC) for recorded, _ in chunk]
                compare = partial(_compare, world.spec, settings, readout, perceptual)
                compared = pool.map(compare, chunk, rollouts, encoded)
                for pair, rolled, (latents_TVChw, _), found in zip(
                    chunk, rollouts, encoded, compared, strict=True
                ):
                    measured.append(found)
                    if found.window in probed:
                        probes.append(_Probe(latents_TVChw.cpu(), pair[0]))
                    if found.window in shown:
                        clips.append(_clip(world.spec, *pair, rolled))
                    elif settings.clips and (worst is None or found.last_gain < worst[0]):
                        worst = found.last_gain, _clip(world.spec, *pair, rolled, note=WORST)
                    if progress is not None:
                        progress()
            if len(probes) > 1:
                denoising[embodiment] = _denoising(world, settings, probes, max(2, batch // FRAMES_A_CLIP))
    if worst is not None:
        clips.append(worst[1])
    return Study(plan, tuple(measured), denoising, tuple(clips))


def _rows_at_once(world: WorldModel, settings: Settings) -> int:
    """Rollouts side by side, so that their videos stay below a bound."""
    spec = world.spec
    row_bytes = 3 * settings.frames * len(spec.views) * spec.height * spec.width
    most = ROWS_AT_ONCE.get(world.device.type, ROWS_AT_ONCE_ELSEWHERE)
    return max(1, min(most, VIDEO_BYTES // row_bytes))


def _shown(plan: Plan, count: int) -> set[Window]:
    """Windows to show, spread over the episodes and over their length."""
    if not count:
        return set()
    keys = list(dict.fromkeys(window.sample.key for window in plan.windows))
    nested = sorted(plan.windows, key=lambda window: (keys.index(window.sample.key), window.start))
    return {nested[index] for index in spaced(len(nested) - 1, min(count, len(nested)))}


@dataclass(frozen=True)
class _Probe:
    latents_TVChw: Tensor
    recorded: Recorded


def _compare(
    spec: WorldSpec,
    settings: Settings,
    readout: Readout | None,
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    pair: tuple[Recorded, Recorded | None],
    rolled: Rolled,
    encoded: tuple[Tensor, np.ndarray],
) -> Measured:
    (recorded, partner), bound_TVHWC = pair, encoded[1][settings.context :]
    at_horizons = [horizon - 1 for horizon in settings.horizons]
    views, wrong = {}, {}
    for v, view in enumerate(spec.views):
        before_HWC, truth_THWC, bound_THWC, samples_MTHWC = (
            pictures.astype(np.float32) / 255
            for pictures in (
                recorded.frames_TVHWC[recorded.context - 1, v],
                recorded.frames_TVHWC[recorded.context :, v],
                bound_TVHWC[:, v],
                rolled.video_MTVHWC[:, :, v],
            )
        )
        found = video_metrics(
            *(samples_MTHWC, truth_THWC, before_HWC), reconstruction_THWC=bound_THWC, perceptual=perceptual
        )
        found["gain"] = found["psnr"] - found["psnr_copy"]
        found["mse"] = _square_error(samples_MTHWC, truth_THWC).mean(0)
        found["mse_first"] = _square_error(samples_MTHWC[0], truth_THWC)
        found["mse_copy"] = _square_error(before_HWC, truth_THWC)
        wrong[view] = {
            kind: _square_error(pictures[:, v].astype(np.float32) / 255, truth_THWC[at_horizons])
            for kind, pictures in rolled.wrong.items()
        }
        looks = {"truth": truth_THWC[None], "bound": bound_THWC[None], "model": samples_MTHWC}
        for name, videos in looks.items():
            for measure_name, values_T in appearance(videos, before_HWC).items():
                found[f"{measure_name}_{name}"] = values_T
        views[view] = found
    proprio = {}
    if recorded.grounding.contract.proprio:
        dims, k = recorded.grounding.contract.proprio, spec.frames_per_step
        proprio = proprio_metrics(
            rolled.proprio_MTS[..., : len(dims)],
            recorded.proprio_TS[recorded.context - 1 :: k][1:],
            recorded.proprio_TS[recorded.context - 1],
            dims,
        )
    partner_window = None if partner is None else partner.window
    verified = _verify(spec, recorded, rolled, bound_TVHWC, readout) if settings.calibration else None
    spread = None
    if settings.samples > 1:
        spread = spread_of(rolled.video_MTVHWC, rolled.proprio_MTS, rolled.member_M, bound_TVHWC)
    return Measured(recorded.window, partner_window, views, wrong, proprio, verified, spread)


def _verify(
    spec: WorldSpec, recorded: Recorded, rolled: Rolled, bound_TVHWC: np.ndarray, readout: Readout | None
) -> Verified:
    contract, known = recorded.grounding.contract, recorded.context - 1
    dims, window = contract.proprio, recorded.window
    touching_T = contact(recorded.meta)
    if touching_T is not None:
        touching_T = touching_T[window.start + known :][: len(bound_TVHWC) + 1]
    outcomes = None
    if readout is not None:
        outcomes = read_outcomes(
            readout,
            rolled.video_MTVHWC,
            bound_TVHWC,
            recorded.frames_TVHWC[: recorded.context],
            recorded.meta,
            window.start,
            where=window.sample.key,
        )
    return verify(
        rolled.video_MTVHWC,
        bound_TVHWC,
        recorded.frames_TVHWC[recorded.context :],
        recorded.frames_TVHWC[known],
        rolled.proprio_MTS[..., : len(dims)],
        recorded.proprio_TS[known :: spec.frames_per_step][1:],
        [(dimension.name, dimension.unit) for dimension in dims],
        seed=zlib.crc32(f"{window.sample.key}@{window.start}".encode()),
        stratum_T=strata(
            recorded.frames_TVHWC[known:],
            recorded.proprio_TS[known:],
            contract.proprio_statistics,
            touching_T,
        ),
        kind=kind_of_lab(recorded.meta),
        readings={} if outcomes is None else outcomes.readings,
        cases=() if outcomes is None else outcomes.cases,
    )


def _square_error(predicted: np.ndarray, truth_THWC: np.ndarray) -> np.ndarray:
    """Mean squared error of pixels in [0, 1] for each frame [..., T]."""
    return np.square(predicted - truth_THWC).mean((-3, -2, -1), dtype=np.float64)


def _clip(
    spec: WorldSpec, recorded: Recorded, partner: Recorded | None, rolled: Rolled, *, note: str = ""
) -> Clip:
    context_TVHWC = recorded.frames_TVHWC[: recorded.context]
    shuffled_TVHWC = rolled.shuffled_TVHWC
    return Clip(
        recorded.window,
        None if partner is None else partner.window,
        recorded.context,
        recorded.grounding.contract,
        recorded.frames_TVHWC,
        np.stack([np.concatenate([context_TVHWC, video]) for video in rolled.video_MTVHWC]),
        None if shuffled_TVHWC is None else np.concatenate([context_TVHWC, shuffled_TVHWC]),
        recorded.proprio_TS[:: spec.frames_per_step],
        rolled.proprio_MTS[..., : len(recorded.grounding.contract.proprio)],
        note,
    )


def _denoising(
    world: WorldModel, settings: Settings, probes: Sequence[_Probe], clips_at_once: int
) -> dict[str, float]:
    """Denoising losses under true and wrong actions over all probes, and their ratios."""
    sampler = settings.sampler(world.spec.sampler)
    k = world.spec.frames_per_step
    # No more frames than the model was trained on.
    frames = min(len(probes[0].latents_TVChw), sampler.window)
    sums: dict[str, float] = {}
    chunks = max(1, len(probes) // clips_at_once)
    for rows in np.array_split(np.arange(len(probes)), chunks):
        chosen = [probes[row] for row in rows]
        embodiment = world.spec.embodiment_index(chosen[0].recorded.window.sample.embodiment)
        embodiment_B = torch.full((len(chosen),), embodiment, device=world.device)
        proprio_BTS = _padded(
            [probe.recorded.proprio_TS[::k][:frames] for probe in chosen],
            world.spec.shape.proprio_dims,
            world,
        )
        span = 1 + (frames - 1) * k
        actions_BTA = _padded(
            [_with_last(probe.recorded.actions_TA, span) for probe in chosen],
            world.spec.shape.action_dims,
            world,
        )
        latents_BTVChw = torch.stack([probe.latents_TVChw[:frames] for probe in chosen]).to(world.device)
        with _autocast(world):
            found = action_faithfulness(
                world.model,
                world.normalizer,
                Frames(latents_BTVChw, world.normalizer.proprio(proprio_BTS, embodiment_B)),
                actions_BTA,
                embodiment_B,
                levels=DENOISING_LEVELS,
                seed=settings.seed,
                context_noise=sampler.context_noise,
                finest_steps=sampler.finest_steps,
            )
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(chosen)
    means = {name: total / len(probes) for name, total in sums.items()}
    return means | _ratios(means)


def _autocast(world: WorldModel) -> contextlib.AbstractContextManager[object]:
    """The precision of the world's own rollouts."""
    if world.autocast and world.device.type == "cuda" and world.dtype == torch.float32:
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def _ratios(losses: Mapping[str, float]) -> dict[str, float]:
    """Ratios of the mean losses, in place of means of ratios."""
    ratios = {}
    for name in losses:
        prefix, found, kind = name.rpartition("ratio_")
        if found:
            ratios[name] = losses[f"{prefix}{kind}"] / losses[f"{prefix}true"]
    return ratios


def _with_last(actions_TA: np.ndarray, rows: int) -> np.ndarray:
    """The first `rows` actions; the one that leads out of the clip is not used and may be missing."""
    padded_TA = np.concatenate([actions_TA, actions_TA[-1:]])
    return padded_TA[:rows]


def _padded(rows: Sequence[np.ndarray], width: int, world: WorldModel) -> Tensor:
    values = torch.tensor(np.stack(rows), dtype=world.dtype, device=world.device)
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))
