"""Measure a world on recorded episodes: rollouts from many windows against what really happened.

Shapes: W windows, M samples, B = W * M rows, T frames of the horizon, V views, H W pixels, A action dims,
S proprio dims. Frame t of the horizon is counted from 1 in tables.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.contract import ActionContract
from vidworld.data.shards import ShardDataset
from vidworld.evaluation.metrics import proprio_metrics, video_metrics
from vidworld.evaluation.windows import (
    WRONG,
    Plan,
    Recorded,
    Settings,
    Window,
    pairs,
    plan_windows,
    spaced,
)
from vidworld.types import Frames
from vidworld.world.faithfulness import action_faithfulness
from vidworld.world.spec import WorldSpec
from vidworld.world.world import PICTURES_AT_ONCE, WorldModel, to_video

ROWS_AT_ONCE = {"cuda": 128}
ROWS_AT_ONCE_ELSEWHERE = 32
DENOISING_CLIPS = 64
"""Clips of an embodiment at most for the denoising loss under wrong actions."""


@dataclass(frozen=True)
class Clip:
    """A window to look at, with the context in front of every video."""

    window: Window
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


@dataclass(frozen=True)
class Measured:
    """Numbers of one window: metric name -> [T]."""

    window: Window
    partner: Window | None
    """Whose actions were the shuffled ones."""
    views: dict[str, dict[str, np.ndarray]]
    proprio: dict[str, dict[str, Any]]


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
) -> Study:
    """Roll the world out from every window and compare; `progress` is called after every window."""
    plan = plan or plan_windows(dataset, world.spec, settings)
    shown = {plan.windows[i] for i in spaced(len(plan.windows) - 1, min(settings.clips, len(plan.windows)))}
    batch = settings.batch or ROWS_AT_ONCE.get(world.device.type, ROWS_AT_ONCE_ELSEWHERE)
    measured: list[Measured] = []
    clips: list[Clip] = []
    denoising: dict[str, dict[str, float]] = {}
    for embodiment in plan.embodiments:
        windows = plan.of(embodiment)
        probed = {windows[i] for i in spaced(len(windows) - 1, min(DENOISING_CLIPS, len(windows)))}
        probes: list[_Probe] = []
        paired = pairs(dataset, world.spec, settings, windows)
        while chunk := list(itertools.islice(paired, max(1, batch // settings.samples))):
            rollouts = _roll_out(world, settings, chunk, first=len(measured), batch=batch)
            for (recorded, partner), rollout in zip(chunk, rollouts, strict=True):
                latents_TVChw, bound_TVHWC = _through_tokenizer(world, recorded.frames_TVHWC)
                if recorded.window in probed:
                    probes.append(_Probe(latents_TVChw.cpu(), recorded))
                measured.append(
                    _compare(world.spec, recorded, partner, rollout, bound_TVHWC[settings.context :])
                )
                if recorded.window in shown:
                    clips.append(_clip(world.spec, recorded, rollout))
                if progress is not None:
                    progress()
        if len(probes) > 1:
            denoising[embodiment] = _denoising(world, settings, probes, batch)
    return Study(plan, tuple(measured), denoising, tuple(clips))


@dataclass(frozen=True)
class _Rolled:
    video_MTVHWC: np.ndarray
    proprio_MTS: np.ndarray
    wrong: dict[str, np.ndarray]
    """Kind of wrong actions -> [T, V, H, W, 3], with the noise of sample 0."""


@dataclass(frozen=True)
class _Probe:
    latents_TVChw: Tensor
    recorded: Recorded


def _roll_out(
    world: WorldModel,
    settings: Settings,
    chunk: Sequence[tuple[Recorded, Recorded | None]],
    *,
    first: int,
    batch: int,
) -> list[_Rolled]:
    """Rollouts of a chunk of windows under true actions, M samples each, and under wrong ones, one each.

    The noise of a sample depends on the window's number in the whole study, not on the chunk.
    """
    sampler, samples = settings.sampler(world.spec.sampler), settings.samples
    count = len(chunk)
    state = world.reset(
        [recorded.grounding.prompt for recorded, _ in chunk],
        samples,
        settings.seed,
        sample_ids=range(first * samples, (first + count) * samples),
        sampler=sampler,
        allow_out_of_range=True,
    )
    rows = list(range(count * samples))
    given = [recorded.future_TA for recorded, _ in chunk for _ in range(samples)]
    kinds: list[tuple[int, str]] = []
    for number, (recorded, partner) in enumerate(chunk):
        for kind in WRONG:
            actions_TA = recorded.wrong(kind, partner)
            if actions_TA is not None:
                kinds.append((number, kind))
                rows.append(number * samples)
                given.append(actions_TA)
    videos, proprios = [], []
    for start in range(0, len(rows), batch):
        actions_BTA = np.stack(given[start : start + batch])
        rolled = world.rollout(
            state.select(rows[start : start + batch]), actions_BTA, sampler=sampler, allow_out_of_range=True
        )
        assert rolled.video_BTVHWC is not None
        videos += list(rolled.video_BTVHWC.cpu().numpy())
        proprios += list(rolled.proprio_BTS.double().cpu().numpy())
    wrong: list[dict[str, np.ndarray]] = [{} for _ in chunk]
    for (number, kind), video_TVHWC in zip(kinds, videos[count * samples :], strict=True):
        wrong[number][kind] = video_TVHWC
    return [
        _Rolled(
            np.stack(videos[number * samples : (number + 1) * samples]),
            np.stack(proprios[number * samples : (number + 1) * samples]),
            wrong[number],
        )
        for number in range(count)
    ]


def _through_tokenizer(world: WorldModel, frames_TVHWC: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Latents [T, V, C, h, w] of a video, and the video as the tokenizer gives it back."""
    video_TVHWC = torch.from_numpy(frames_TVHWC)
    # With a time stride frames depend on each other, and the tokenizer bounds its own memory.
    alone = world.spec.frames_per_step == 1
    at_once = max(1, PICTURES_AT_ONCE // frames_TVHWC.shape[1]) if alone else len(video_TVHWC)
    latents, pictures = [], []
    for piece_TVHWC in video_TVHWC.split(at_once):
        latents_1TVChw = world.encode(piece_TVHWC[None].to(world.device))
        latents.append(latents_1TVChw[0])
        pictures.append(to_video(world.decode(latents_1TVChw))[0].cpu())
    return torch.cat(latents), torch.cat(pictures).numpy()


def _compare(
    spec: WorldSpec, recorded: Recorded, partner: Recorded | None, rolled: _Rolled, bound_TVHWC: np.ndarray
) -> Measured:
    views = {}
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
        found = video_metrics(samples_MTHWC, truth_THWC, before_HWC, reconstruction_THWC=bound_THWC)
        found["gain"] = found["psnr"] - found["psnr_copy"]
        found["mse"] = _square_error(samples_MTHWC, truth_THWC).mean(0)
        found["mse_first"] = _square_error(samples_MTHWC[0], truth_THWC)
        found["mse_copy"] = _square_error(before_HWC, truth_THWC)
        for kind in WRONG:
            video_TVHWC = rolled.wrong.get(kind)
            found[f"mse_{kind}"] = (
                np.full(len(truth_THWC), math.nan)
                if video_TVHWC is None
                else _square_error(video_TVHWC[:, v].astype(np.float32) / 255, truth_THWC)
            )
        looks = {"truth": truth_THWC[None], "bound": bound_THWC[None], "model": samples_MTHWC}
        for name, videos in looks.items():
            for measure_name, values_T in _appearance(videos, before_HWC).items():
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
    return Measured(recorded.window, None if partner is None else partner.window, views, proprio)


def _square_error(predicted: np.ndarray, truth_THWC: np.ndarray) -> np.ndarray:
    """Mean squared error of pixels in [0, 1] for each frame [..., T]."""
    return np.square(predicted - truth_THWC).mean((-3, -2, -1), dtype=np.float64)


def _appearance(videos_MTHWC: np.ndarray, before_HWC: np.ndarray) -> dict[str, np.ndarray]:
    """What a rollout loses when it collapses, for each frame [T]: contrast, sharpness, motion.

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


def _clip(spec: WorldSpec, recorded: Recorded, rolled: _Rolled) -> Clip:
    context_TVHWC = recorded.frames_TVHWC[: recorded.context]
    shuffled = rolled.wrong.get("shuffled")
    return Clip(
        recorded.window,
        recorded.context,
        recorded.grounding.contract,
        recorded.frames_TVHWC,
        np.stack([np.concatenate([context_TVHWC, video]) for video in rolled.video_MTVHWC]),
        None if shuffled is None else np.concatenate([context_TVHWC, shuffled]),
        recorded.proprio_TS[:: spec.frames_per_step],
        rolled.proprio_MTS[..., : len(recorded.grounding.contract.proprio)],
    )


def _denoising(
    world: WorldModel, settings: Settings, probes: Sequence[_Probe], batch: int
) -> dict[str, float]:
    """Denoising losses under true and wrong actions over all probes, and their ratios."""
    sampler = settings.sampler(world.spec.sampler)
    k = world.spec.frames_per_step
    # No more frames than the model was trained on.
    frames = min(len(probes[0].latents_TVChw), sampler.window)
    sums: dict[str, float] = {}
    chunks = max(1, len(probes) // max(2, batch))
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
        found = action_faithfulness(
            world.model,
            world.normalizer,
            Frames(latents_BTVChw, world.normalizer.proprio(proprio_BTS, embodiment_B)),
            actions_BTA,
            embodiment_B,
            seed=settings.seed,
            context_noise=sampler.context_noise,
            finest_steps=sampler.finest_steps,
        )
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(chosen)
    means = {name: total / len(probes) for name, total in sums.items()}
    return means | _ratios(means)


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
