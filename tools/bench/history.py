"""Do imagined histories in training make long rollouts drift less? Measured on a dot that is pushed about.

    python tools/bench/history.py --seeds 0 1 2

A spot on a torus moves by commands that are known exactly, so every frame has one right answer, and how far
an imagined one is from the nearest spot of any place tells decay from wandering. Tiny networks are trained
with and without the late phase of `objective.resample_fraction`, equally long, with clean and with noisy
context, and roll out for 8 times their training length in one step a frame. One core takes two minutes for
each seed.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import add_rows, cpu_name
from torch import Tensor

from vidworld.config import parse
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import UserError
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.types import Batch, Frames
from vidworld.world.dynamics import imagine, take_in
from vidworld.world.noise import NoiseStream
from vidworld.world.spec import SamplerConfig

CLIP, CONTEXT, HORIZON = 6, 3, 48
SIDE, REACH, RADIUS = 4, 0.12, 0.16
"""Latents on a side; the longest step of the dot and its size, as shares of the torus."""
DIMENSIONS = (Dimension("x", "m", "velocity"), Dimension("y", "m", "velocity"))
CONTRACT = ActionContract(
    *("dot", 10.0, DIMENSIONS, (Dimension("none", "m", "position"),)),
    Statistics.of(np.linspace([-1, -1], [1, 1], 9)),
    Statistics.of(np.linspace([-1], [1], 9)),
)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "imagined": {"resample_fraction": 0.5, "resample_start": 0.5},
    "imagined3": {"resample_fraction": 0.5, "resample_start": 0.5, "resample_passes": 3},
}
NOISES: dict[str, tuple[float, float]] = {"clean": (0.0, 0.0), "noisy": (0.3, 0.1)}
"""Context noise: the most in training, and in rollouts."""


@dataclass(frozen=True)
class Options:
    """Measure drift with and without imagined histories."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    rows: Path | None = Path("benchmarks/history.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Train and roll out every arm; print and write what it comes to."""
    options = parse(Options, arguments, prog=prog)
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for noise in NOISES:
            for arm in ARMS:
                figures = measure(arm, noise, seed, options.steps)
                print(
                    f"seed {seed} {noise:<6}{arm:<10}" + "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
                )
                for name, value in figures.items():
                    found.setdefault(f"history.{noise}.{arm}.{name}", []).append(value)
    if options.rows is not None:
        rows = {}
        for name, values in found.items():
            text = f"mean square, mean of {len(values)} seeds"
            if len(values) > 1:
                text += f", standard deviation {statistics.stdev(values):.2g}"
            rows[name] = (float(f"{statistics.fmean(values):.4g}"), text)
        command = " ".join(["python", "tools/bench/history.py", *arguments])
        add_rows(options.rows, rows, device=cpu_name(), command=command, packages=("torch",))


def measure(arm: str, noise: str, seed: int, steps: int) -> dict[str, float]:
    """Mean square errors of latents at frames 1, 12 and 41 to 48, and what the last lack to be any dot."""
    training, serving = NOISES[noise]
    model = train(ObjectiveConfig(finest_steps=1, context_noise=training, **ARMS[arm]), seed, steps)
    error_T, decay_T = roll_out(model, serving)
    return {
        "error.f1": error_T[0],
        "error.f12": error_T[11],
        "error.f48": statistics.fmean(error_T[-8:]),
        "decay.f48": statistics.fmean(decay_T[-8:]),
    }


def clips(rows: int, frames: int, generator: torch.Generator) -> Batch:
    """Clips of a dot: commands are uniform, a command of 1 moves it by REACH."""
    actions_BTA = torch.rand(rows, frames, 2, generator=generator) * 2 - 1
    start_B1 = torch.rand(rows, 1, 2, generator=generator)
    places_BTA = torch.cat([start_B1, start_B1 + REACH * actions_BTA[:, :-1].cumsum(1)], 1)
    return Batch(
        ids=("",) * rows,
        actions_BTA=actions_BTA,
        proprio_BTS=torch.zeros(rows, frames, 1),
        embodiment_B=torch.zeros(rows, dtype=torch.int64),
        latents_BTVChw=dots(places_BTA)[:, :, None],
    )


def dots(places_XA: Tensor) -> Tensor:
    """Pictures [..., 2, SIDE, SIDE] of dots at places [..., 2], in shares of the torus."""
    grid_s = (torch.arange(SIDE) + 0.5) / SIDE
    x_Xs, y_Xs = ((places_XA[..., axis, None] - grid_s + 0.5) % 1.0 - 0.5 for axis in (0, 1))
    spot_Xhw = torch.exp(-(x_Xs[..., :, None].square() + y_Xs[..., None, :].square()) / (2 * RADIUS**2))
    return torch.stack([4 * spot_Xhw - 1, 1 - 2 * spot_Xhw], -3)


def train(
    objective: ObjectiveConfig,
    seed: int,
    steps: int,
    *,
    make: Callable[[int, int, torch.Generator], Batch] = clips,
    side: int = SIDE,
    rate: float = 4e-3,
) -> CausalDiT:
    """A tiny world that is told everything, for one-step sampling of what has one right answer."""
    torch.manual_seed(seed)
    shape = FrameShape(views=1, channels=2, height=side, width=side, proprio_dims=1, action_dims=2)
    config = DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=1, num_registers=0)
    task = WorldTask(
        CausalDiT(config, shape), Normalizer([CONTRACT]), objective, action_dropout=0.0, clip_dropout=0.0
    )
    optimizer = torch.optim.AdamW(task.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 30, (1 - step / steps) / 0.3)
        optimizer.zero_grad()
        own = torch.Generator().manual_seed(1000 * seed + step)  # so that all arms see the same clips
        task(make(12, CLIP, generator), own, Moment(step / steps, step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    return task.net


def roll_out(model: CausalDiT, context_noise: float, rows: int = 48) -> tuple[list[float], list[float]]:
    """Mean square error against the truth, and against the nearest of 48 x 48 dots, of each frame."""
    batch = clips(rows, CONTEXT + HORIZON, torch.Generator().manual_seed(99))
    assert batch.latents_BTVChw is not None
    axis = torch.arange(48) / 48
    every_NX = dots(torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)).flatten(0, 1).flatten(1)
    errors, decays = [], []
    truth = batch.latents_BTVChw[:, CONTEXT:].split(1, 1)
    for latents, seen in zip(imagined(model, batch, context_noise), truth, strict=True):
        errors.append(float((latents - seen).square().mean()))
        apart_BN = torch.cdist(latents.flatten(1), every_NX)
        decays.append(float(apart_BN.min(1).values.square().mean() / every_NX.shape[1]))
    return errors, decays


@torch.no_grad()
def imagined(model: CausalDiT, batch: Batch, context_noise: float) -> Iterator[Tensor]:
    """Latents [B, 1, V, C, h, w] of each frame after CONTEXT, in one step, under the batch's commands."""
    rows, frames = batch.actions_BTA.shape[:2]
    assert batch.latents_BTVChw is not None
    truth = Frames(batch.latents_BTVChw, batch.proprio_BTS)
    into_BTkA = torch.cat([torch.zeros(rows, 1, 2), batch.actions_BTA[:, :-1]], 1)[:, :, None]
    keep_BT = torch.ones(rows, frames, dtype=torch.bool)
    keep_BT[:, 0] = False
    conditioning = Conditioning(into_BTkA, keep_BT, batch.embodiment_B)
    sampler = SamplerConfig(steps=1, context_noise=context_noise, window=CLIP, finest_steps=1)
    stream = NoiseStream(0, torch.arange(rows), torch.float32)
    known = slice(0, CONTEXT)
    _, cache = take_in(model, None, truth[:, known], None, conditioning.frames(known), 0, stream, sampler)
    for t in range(CONTEXT, frames):
        frame, cache = imagine(model, cache, conditioning.frames(slice(t, t + 1)), t, stream, sampler)
        yield frame.latents_BTVChw


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "tools/bench/history.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
