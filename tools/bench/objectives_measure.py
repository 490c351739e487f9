"""Ensembles of rollouts, verified on the accelerator: what `objectives.py` measures of a world.

Shapes: W windows, M samples, T imagined frames, X any places; otherwise as in `vidworld.world`.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vidworld.evaluation.verification import coverage, spread_skill
from vidworld.evaluation.windows import Recorded
from vidworld.tokenizers.base import to_pixels
from vidworld.world.engine import RolloutEngine
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel

MOVING = 0.5
"""Latents move where they differ from the last known frame by more than this (root mean square)."""
CHANGED = 16 / 255
"""The same for pixels, of their range, in any channel."""
SHOWN = 2
"""Samples of a window that are decoded and shown."""


class Ensembles(Protocol):
    """What is asked for."""

    @property
    def context(self) -> int:
        """Known frames of a window."""
        ...

    @property
    def samples(self) -> int:
        """Rollouts of a window."""
        ...


@torch.no_grad()
def measure(
    world: WorldModel, windows: Sequence[Recorded], options: Ensembles, steps: int, *, speed: bool = True
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Roll out an ensemble of every window and verify it; figures, and videos of the liveliest window.

    speed: also the frames a second, which depend on the steps alone.
    """
    sampler = dataclasses.replace(world.spec.sampler, steps=steps)
    prompts = [one.grounding.prompt for one in windows]
    count, samples = len(windows), options.samples
    state = world.reset(prompts, samples, sampler=sampler, allow_out_of_range=True)
    actions_BTA = np.repeat(np.stack([one.future_TA for one in windows]), samples, 0)
    engine = RolloutEngine(world, sampler=sampler)
    rolled = engine.rollout(state, actions_BTA, decode=False, allow_out_of_range=True)
    imagined_WM = rolled.latents_BTVChw.unflatten(0, (count, samples))

    frames_WTVHWC = torch.from_numpy(np.stack([one.frames_TVHWC for one in windows])).to(world.device)
    known_WTVChw = torch.cat([world.encode(part) for part in frames_WTVHWC.split(8)])
    truth_WT = known_WTVChw[:, options.context :]
    last_W1 = known_WTVChw[:, options.context - 1 : options.context]
    change_WTV1hw = (truth_WT - last_W1).square().mean(3, keepdim=True).sqrt()
    moving_WT = (change_WTV1hw > MOVING).expand_as(truth_WT)
    imagined_MW = imagined_WM.movedim(1, 0)
    whole, moving = (ensemble_scores(imagined_MW, truth_WT, where) for where in (None, moving_WT))

    embodiment_B = rolled.state.embodiment_B
    proprio_BTS = world.normalizer.proprio(rolled.proprio_BTS, embodiment_B)
    seen_WTS = torch.from_numpy(np.stack([one.proprio_TS[options.context :] for one in windows]))
    seen_WTS = world.normalizer.proprio(seen_WTS.to(proprio_BTS), embodiment_B[::samples])
    robot = ensemble_scores(proprio_BTS.unflatten(0, (count, samples)).movedim(1, 0), seen_WTS)

    future_WTVHWC = frames_WTVHWC[:, options.context :]
    sharpness, psnr = looks(world, imagined_WM[:, :SHOWN], truth_WT, last_W1, future_WTVHWC)
    liveliest = int(change_WTV1hw.flatten(1).mean(1).argmax())
    videos = {"truth": windows[liveliest].frames_TVHWC[options.context :, 0]}
    for sample in range(SHOWN):
        shown_TVCHW = world.decode(imagined_WM[liveliest, sample][None])[0]
        videos[f"sample {sample}"] = to_pixels(shown_TVCHW[:, 0]).movedim(1, -1).cpu().numpy()
    found = {
        "sharpness": sharpness,
        "psnr": psnr,
        "crps_latents": whole["crps"],
        "crps_moving": moving["crps"],
        "crps_proprio": robot["crps"],
        "coverage": moving["coverage"],
        "coverage_proprio": robot["coverage"],
        "spread_skill": moving["spread_skill"],
        "spread_skill_proprio": robot["spread_skill"],
    }
    if speed:
        alone = RolloutEngine(world, sampler=sampler)
        found["fps"] = frames_per_s(engine, state, actions_BTA[:, :4])
        found["fps_alone"] = frames_per_s(alone, state.select([0]), actions_BTA[:1, :4])
    return found, videos


def ensemble_scores(samples_M: Tensor, truth: Tensor, where: Tensor | None = None) -> dict[str, float]:
    """Fair CRPS, coverage of the 90 % interval and unbiased spread-skill over all places, or those `where`.

    The definitions of `vidworld.evaluation.verification`, on the accelerator: [M, ...] against [...].
    """
    num_samples = len(samples_M)
    chosen = torch.ones_like(truth, dtype=torch.bool) if where is None else where
    samples_MX, truth_X = samples_M[:, chosen].double(), truth[chosen].double()
    if not truth_X.numel():
        return dict.fromkeys(("crps", "coverage", "spread_skill"), float("nan"))
    counts_R = torch.bincount((samples_MX < truth_X).sum(0), minlength=num_samples + 1)
    variance_X = samples_MX.var(0)
    error_X = (samples_MX.mean(0) - truth_X).square() - variance_X / num_samples
    return {
        "crps": float(fair_crps(samples_MX, truth_X).mean()),
        "coverage": coverage(counts_R.cpu().numpy(), 0.9),
        "spread_skill": spread_skill(float(variance_X.mean()), float(error_X.mean())),
    }


def fair_crps(samples_M: Tensor, truth: Tensor) -> Tensor:
    """`vidworld.evaluation.metrics.crps` on the accelerator: [M, ...] against [...], at every place."""
    num_samples = len(samples_M)
    order_M = torch.arange(num_samples, device=truth.device, dtype=truth.dtype)
    order_M = (2 * order_M - num_samples + 1).view(-1, *[1] * truth.ndim)
    pairs = 2 * (order_M * samples_M.sort(0).values).sum(0)
    return (samples_M - truth).abs().mean(0) - pairs / (2 * num_samples * (num_samples - 1))


def looks(
    world: WorldModel, imagined_WM: Tensor, truth_WT: Tensor, last_W1: Tensor, frames_WTVHWC: Tensor
) -> tuple[float, float]:
    """Gradient energy of changed pixels over that of the truth, and the PSNR of single samples in dB.

    Pixels count where they differ from the last known frame, each video by its own; the truth is seen through
    the tokenizer. Blur lowers the ratio, wherever things went.
    """
    energies: list[list[Tensor]] = [[], []]
    decibels = []
    for samples_MT, truth_T, last_1, frames_TVHWC in zip(
        imagined_WM, truth_WT, last_W1, frames_WTVHWC, strict=True
    ):
        last_VCHW = world.decode(last_1[None])[0, 0]
        pixels_NTVCHW = world.decode(torch.cat([samples_MT, truth_T[None]]))
        for place, videos in enumerate((pixels_NTVCHW[:-1], pixels_NTVCHW[-1:])):
            energies[place].append(gradient_energy(videos / 2, last_VCHW / 2))
        target_TVCHW = frames_TVHWC.movedim(-1, -3).to(pixels_NTVCHW) / 127.5 - 1
        squared = (pixels_NTVCHW[:-1].clamp(-1, 1) - target_TVCHW).square() / 4
        decibels.append(-10 * squared.flatten(2).mean(-1).clamp_min(1e-10).log10().mean())
    imagined, real = (torch.stack(parts).sum(0) for parts in energies)
    ratio = (imagined[0] / imagined[1].clamp_min(1)) / (real[0] / real[1].clamp_min(1)).clamp_min(1e-12)
    return float(ratio), float(torch.stack(decibels).mean())


def gradient_energy(videos_NTVCHW: Tensor, last_VCHW: Tensor) -> Tensor:
    """Sum of squared differences of neighbours over changed pixels, and the number of these; range 0 to 1."""
    changed = ((videos_NTVCHW - last_VCHW).abs() > CHANGED).any(-3)[..., :-1, :-1]
    across = videos_NTVCHW.diff(dim=-1).square().sum(-3)[..., :-1, :]
    down = videos_NTVCHW.diff(dim=-2).square().sum(-3)[..., :-1]
    return torch.stack([((across + down) * changed).sum(), changed.sum()])


def frames_per_s(engine: RolloutEngine, state: WorldState, actions_BTA: np.ndarray) -> float:
    """Imagined frames a second without decoding, in the better of two rollouts after one not timed."""
    times = []
    for _ in range(3):
        engine.load(state)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        engine.rollout(state, actions_BTA, decode=False, check=False, allow_out_of_range=True)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return actions_BTA.shape[0] * actions_BTA.shape[1] / min(times[1:])
