"""`vidworld calibrate`: fit a world's noise and conformal radii on episodes set apart.

Shapes: W windows, M samples, B rows, T leads (imagined latent frames), V views, H W pixels, S proprio dims, k
camera frames a latent frame.
"""

import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.evaluate import world_of
from vidworld.evaluation.futures import through_tokenizer
from vidworld.evaluation.recalibration import (
    Forecast,
    Round,
    Source,
    fit_conformal,
    fit_scale,
    source_of,
    summary,
)
from vidworld.evaluation.windows import Recorded, Settings, plan_windows, read_window
from vidworld.world.calibration import FILE_NAME, Calibration, Conformal, sampling_of
from vidworld.world.engine import RolloutEngine
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import find, load, verify
from vidworld.world.noise_scale import NoiseScale
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

ROWS_AT_ONCE = {"cuda": 128}
ROWS_AT_ONCE_ELSEWHERE = 32
LEAST_SAMPLES = 8


@dataclass(frozen=True)
class Options:
    """Fit a world's spread to its errors on episodes set apart, and say how far off it may be.

    Takes the calibration half of the split (by a hash of the episode's id; vidworld eval then leaves it out),
    a window of each episode. Writes RUN/calibration.json, which vidworld.load applies. Members that share a
    network are calibrated together, windows being theirs in turn; runs of their own one by one.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained world: a run or an export."""
    data: tyro.conf.Positional[tuple[Path, ...]]
    """Dataset directories of videos, of the same robots."""
    split: str = "val"
    episodes: int | None = 40
    """Calibration episodes of each dataset at most, evenly spaced."""
    context: int = 8
    """Known frames before each rollout."""
    frames: int = 32
    """Frames to imagine: radii hold for so many."""
    samples: int = 16
    """Futures of each window."""
    noise: Source = "auto"
    """What is scaled: `start`, the noise that frames are denoised from; `model`, the network's noise input;
    `both`; `none`; `auto` takes all that the samples begin with."""
    rounds: int = 5
    """Times that the factors are corrected."""
    coverage: float = 0.9
    """Of the radii."""
    seed: int = 1
    """Of the noise."""
    batch: int | None = None
    """Rollouts side by side (default: 128 on a GPU, 32 on a CPU)."""
    resize: bool = False
    """Scale and centre-crop videos of another size."""
    device: str | None = None
    """Default: the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier calibration of the run."""

    def check(self) -> None:
        """Refuse numbers that make no sense, before anything is loaded."""
        least = {"samples": LEAST_SAMPLES, "rounds": 1, "context": 1, "frames": 1, "seed": 0}
        least |= {name: 1 for name in ("episodes", "batch") if getattr(self, name) is not None}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"--{name}", got=getattr(self, name), expected=f"{minimum} or more")
        if not 0 < self.coverage < 1:
            raise ConfigError("--coverage", got=self.coverage, expected="between 0 and 1")


@dataclass(frozen=True)
class Prepared:
    """A window with its truth as the tokenizer has it."""

    world: WorldModel
    recorded: Recorded
    latents_TVChw: Tensor
    """On the CPU."""
    bound_TVHWC: np.ndarray


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld calibrate`."""
    options = parse(Options, arguments, prog=prog)
    options.check()
    files = find(options.run)
    if (files.directory / FILE_NAME).exists() and not options.overwrite:
        raise ConfigError(
            "the run is calibrated already", where=files.directory / FILE_NAME, fix="pass --overwrite"
        )
    world = load(options.run, options.device, calibrated=False, members="all")
    found = replace(calibrate(world, options.data, options), weights_sha256=verify(files.weights))
    path = found.write(files.directory)
    print(_lines(found))
    print(f"{path}: vidworld.load applies it; vidworld eval now takes the other half of {options.split!r}")


@torch.no_grad()
def calibrate(world: WorldModel, locations: Sequence[Path | str], options: Options) -> Calibration:
    """Calibrate a world; the result lacks the digest of its weights.

    Of an ensemble each window is imagined by one member, in turn: noise and radii are those of a member,
    whichever it is. Raises DataError where there are too few episodes, and as `vidworld.evaluation.windows`
    does.
    """
    prepared, listed = _prepare(world, locations, options)
    source = source_of(world.spec, options.noise)
    halves = tuple(_by_member(half) for half in _halves(prepared))
    fits = source != "none"
    steps = len(prepared) * (1 + fits) + len(halves[0]) * options.rounds * fits
    with tqdm(total=steps, unit="window", desc="calibrate", disable=None) as bar:

        def imagine(
            windows: Sequence[Prepared], scale: NoiseScale | None, pixels: bool = False
        ) -> list[Forecast]:
            return forecast(windows, scale, options, pixels=pixels, progress=bar.update)

        def tell(one: Round) -> None:
            bar.set_postfix_str(f"mismatch {one.mismatch:.3f}, CRPS x{one.crps:.3f}", refresh=False)

        scale, tried = None, []
        before = [imagine(half, None, pixels=not fits) for half in halves]
        if fits:
            unscaled = iter([before[0]])
            scale, tried = fit_scale(
                lambda one: imagine(halves[0], one) if one else next(unscaled),
                source,
                rounds=options.rounds,
                report=tell,
            )
        first, second = (imagine(half, scale, pixels=True) for half in halves) if fits else before
    return Calibration(
        weights_sha256="",
        world=world.spec.digest,
        sampler=sampling_of(world.spec.sampler),
        noise_scale=scale,
        conformal=_conformal(world, first, second, options.coverage),
        fit={
            "datasets": listed,
            "split": options.split,
            "context": options.context,
            "frames": options.frames,
            "samples": options.samples,
            "seed": options.seed,
            "noise": source,
            "rounds": [
                {"mismatch": _plain(one.mismatch), "crps": _plain(one.crps), "kept": one.scale == scale}
                for one in tried
            ],
            "fitted": {"before": summary(before[0]), "after": summary(first)},
            "held_out": {"before": summary(before[1]), "after": summary(second)},
            "vidworld": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )


def forecast(
    windows: Sequence[Prepared],
    scale: NoiseScale | None,
    options: Options,
    *,
    pixels: bool,
    progress: Callable[[], object],
) -> list[Forecast]:
    """Imagine windows with scaled noise; the noise of a sample depends on its window's place in the list."""
    found: list[Forecast] = []
    numbered = list(enumerate(windows))
    for _, group in itertools.groupby(numbered, key=lambda pair: id(pair[1].world)):
        some = list(group)
        world = some[0][1].world
        sampler = replace(world.spec.sampler, noise_scale=scale)
        rows = options.batch or ROWS_AT_ONCE.get(world.device.type, ROWS_AT_ONCE_ELSEWHERE)
        at_once = max(1, min(len(some), rows // options.samples))
        engine = RolloutEngine(world, sampler=sampler)
        for start in range(0, len(some), at_once):
            chunk = some[start : start + at_once]
            # Always as many rows: an engine makes its buffers and graphs for one number of them.
            chunk += [chunk[-1]] * (at_once - len(chunk))
            real = min(at_once, len(some) - start)
            found += _chunk(engine, sampler, chunk, real, options, pixels)
            for _ in range(real):
                progress()
    return found


def _chunk(
    engine: RolloutEngine,
    sampler: SamplerConfig,
    chunk: Sequence[tuple[int, Prepared]],
    real: int,
    options: Options,
    pixels: bool,
) -> list[Forecast]:
    world, samples = engine.world, options.samples
    state = world.reset(
        [one.recorded.grounding.prompt for _, one in chunk],
        samples,
        options.seed,
        sample_ids=[number * samples + m for number, _ in chunk for m in range(samples)],
        sampler=sampler,
        allow_out_of_range=True,
    )
    actions = np.repeat(np.stack([one.recorded.future_TA for _, one in chunk]), samples, axis=0)
    rolled = engine.rollout(state, actions, decode=pixels, allow_out_of_range=True)
    latents_WMTX = rolled.latents_BTVChw.float().unflatten(0, (-1, samples)).flatten(3)
    proprio_WMTS = (
        rolled.proprio_BTS.double()
        .cpu()
        .numpy()
        .reshape(len(chunk), samples, -1, rolled.proprio_BTS.shape[-1])
    )
    found = []
    for w, (_, one) in enumerate(chunk[:real]):
        recorded, k = one.recorded, world.spec.frames_per_step
        dims = len(recorded.grounding.contract.proprio)
        truth_TX = one.latents_TVChw.to(latents_WMTX).flatten(1)
        variance_TX, square_TX, crps_TX = _of_samples(latents_WMTX[w], truth_TX)
        pixel_variance_T = pixel_square_T = None
        if pixels:
            assert rolled.video_BTVHWC is not None
            video = rolled.video_BTVHWC[w * samples : (w + 1) * samples]
            pixel_variance_T, pixel_square_T = _of_pixels(video, one.bound_TVHWC, k)
        found.append(
            Forecast(
                recorded.window.sample.key,
                recorded.window.sample.embodiment,
                proprio_WMTS[w, ..., :dims],
                recorded.proprio_TS[recorded.context - 1 :: k][1:],
                variance_TX.mean(1).double().cpu().numpy(),
                (square_TX - variance_TX / samples).mean(1).double().cpu().numpy(),
                square_TX.mean(1).double().cpu().numpy(),
                crps_TX.mean(1).double().cpu().numpy(),
                pixel_variance_T,
                pixel_square_T,
            )
        )
    return found


def _of_samples(samples_MTX: Tensor, truth_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, square error of the mean, and fair CRPS, each [T, X]."""
    count = len(samples_MTX)
    rank_M = 2 * torch.arange(count, device=truth_TX.device, dtype=truth_TX.dtype) - count + 1
    apart_TX = torch.tensordot(rank_M, samples_MTX.sort(0).values, 1) / (count * (count - 1))
    return (
        samples_MTX.var(0),
        (samples_MTX.mean(0) - truth_TX).square(),
        (samples_MTX - truth_TX).abs().mean(0) - apart_TX,
    )


def _of_pixels(video_MTVHWC: Tensor, bound_TVHWC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean variance and square error of pixels from 0 to 1 of each latent frame, [T]."""
    rows = []
    for t in range(video_MTVHWC.shape[1]):
        samples = video_MTVHWC[:, t].float() / 255
        truth = torch.from_numpy(bound_TVHWC[t]).to(samples.device).float() / 255
        rows.append(torch.stack([samples.var(0).mean(), (samples.mean(0) - truth).square().mean()]))
    found_T2 = torch.stack(rows).double().cpu().numpy().reshape(-1, k, 2).mean(1)
    return found_T2[:, 0], found_T2[:, 1]


def _prepare(
    world: WorldModel, locations: Sequence[Path | str], options: Options
) -> tuple[list[Prepared], list[dict[str, Any]]]:
    """A window of each calibration episode, and what was taken of each dataset."""
    settings = Settings(
        split=options.split,
        half="calibration",
        episodes=options.episodes,
        windows_per_episode=1,
        context=options.context,
        frames=options.frames,
        samples=options.samples,
        resize=options.resize,
        seed=options.seed,
    )
    prepared, listed = [], []
    for location in locations:
        dataset = ShardDataset.open(location)
        own = world_of(world, dataset, options.split)
        plan = plan_windows(dataset, own.spec, settings)
        for window in plan.windows:
            recorded = read_window(dataset, own.spec, settings, window)
            latents_TVChw, pictures_TVHWC = through_tokenizer(own, recorded.frames_TVHWC)
            known = 1 + (options.context - 1) // own.spec.frames_per_step
            prepared.append(
                Prepared(own, recorded, latents_TVChw[known:].cpu(), pictures_TVHWC[options.context :])
            )
        listed.append(
            {
                "name": dataset.manifest.name,
                "digest": dataset.manifest.digest,
                "episodes": sorted({window.sample.episode_id for window in plan.windows}),
            }
        )
    return prepared, listed


def _halves(prepared: Sequence[Prepared]) -> tuple[list[Prepared], list[Prepared]]:
    """Every other window of each robot, those of one world next to each other."""
    halves: tuple[list[Prepared], list[Prepared]] = ([], [])
    turn: dict[str, int] = {}
    for one in prepared:
        robot = one.recorded.window.sample.embodiment
        halves[turn.get(robot, 0) % 2].append(one)
        turn[robot] = turn.get(robot, 0) + 1
    if not halves[1]:
        raise DataError("calibration episodes", got=len(prepared), expected="2 or more")
    return halves


def _by_member(windows: Sequence[Prepared]) -> list[Prepared]:
    """The windows of an ensemble, its members' in turn, those of a member next to each other."""
    members: dict[int, list[WorldModel]] = {}
    found: dict[tuple[int, int], list[Prepared]] = {}
    for number, one in enumerate(windows):
        if not isinstance(one.world, Ensemble):
            found.setdefault((id(one.world), 0), []).append(one)
            continue
        own = members.setdefault(id(one.world), one.world.members)
        place = number % len(own)
        found.setdefault((id(one.world), place), []).append(replace(one, world=own[place]))
    return [one for group in found.values() for one in group]


def _conformal(
    world: WorldModel, first: Sequence[Forecast], second: Sequence[Forecast], level: float
) -> Mapping[str, Conformal]:
    found = {}
    for contract in world.spec.contracts:
        fitted, scored = (
            [one for one in half if one.embodiment == contract.embodiment] for half in (first, second)
        )
        if fitted or scored:
            found[contract.embodiment] = fit_conformal(fitted, scored, contract, level)
    return found


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lines(found: Calibration) -> str:
    """Before and after, on the episodes that the noise was not fitted on."""
    held = found.fit["held_out"]
    lines = [f"noise: {found.noise_scale or 'as trained: no factors were better'}"]
    for name in held["before"]["spread_skill"]:
        before, after = (held[when]["spread_skill"][name] for when in ("before", "after"))
        scores = [held[when]["crps"][name] for when in ("before", "after")]
        shown = " -> ".join("-" if one is None else f"{one:.3f}" for one in (before, after))
        lines.append(f"  {name:<8} spread / skill {shown}, CRPS {scores[0]:.4g} -> {scores[1]:.4g}")
    for robot, one in found.conformal.items():
        lines.append(
            f"  {robot}: radii that hold {one.leads} frames in {one.coverage:.0%} of episodes "
            f"(set by {one.episodes})"
        )
    return "\n".join(lines)
