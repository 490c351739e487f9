"""Samplers: plain functions from noise to frames. They allow gradients; the caller chooses `no_grad`."""

import itertools

import numpy as np
import torch

from vidworld.diffusion.path import advance, constant_level, velocity
from vidworld.diffusion.predict import Predict
from vidworld.diffusion.schedule import check_schedule
from vidworld.types import Frames, SignalLevel


def euler(predict: Predict, noise: Frames, steps: int, *, finest_steps: int | None = None) -> Frames:
    """Euler's method on dz/dtau = (x(z, tau) - z) / (1 - tau), `steps` equal steps from tau = 0 to 1.

    One model call a step, told the step size d = 1/steps; the last step lands on the prediction itself. With
    shortcut models (Frans et al. 2024, algorithm 2) take a power of two, and give the `finest_steps` of
    training so that a longer run does not ask for a d that was never seen.
    """
    z = noise
    told = 1 / min(_positive(steps), finest_steps or steps)
    for k in range(steps):
        level = constant_level(z, k / steps)
        clean = predict(z, level, torch.full_like(level.signal, told))
        z = advance(z, velocity(clean, z, level), 1 / steps)
    return z


def heun(predict: Predict, noise: Frames, steps: int, *, finest_steps: int | None = None) -> Frames:
    """Heun's second-order method on the same equation (Karras et al. 2022, algorithm 1 without churn).

    Two model calls a step, except for the last step, which is Euler's: velocity is undefined on clean frames.
    The model is told the finest d, at which it predicts the velocity of the moment; at d = 1/steps it
    predicts the mean over the step, and correcting that a second time would be wrong.
    """
    z = noise
    told = 1 / max(_positive(steps), finest_steps or steps)
    for k in range(steps):
        level, after = constant_level(z, k / steps), constant_level(z, (k + 1) / steps)
        step_BT = torch.full_like(level.signal, told)
        slope = velocity(predict(z, level, step_BT), z, level)
        ahead = advance(z, slope, 1 / steps)
        if k + 1 < steps:
            slope_ahead = velocity(predict(ahead, after, step_BT), ahead, after)
            ahead = advance(z, slope.map(lambda a, b: (a + b) / 2, slope_ahead), 1 / steps)
        z = ahead
    return z


def scheduled_euler(predict: Predict, noise: Frames, matrix_PT: np.ndarray) -> Frames:
    """Euler's method in the order of a sampling matrix (`schedule`), frames at levels of their own.

    One model call a pass over all frames (Chen et al. 2024, algorithm 2). A frame that falls by n of N steps
    in a pass is told d = n/N; one that rests is told 1/N and left exactly as it is.
    """
    num_steps = int(matrix_PT[0, 0])
    check_schedule(matrix_PT, num_steps)
    if matrix_PT.shape[1] != noise.num_frames:
        raise ValueError(f"a schedule of {matrix_PT.shape[1]} frames for noise of {noise.num_frames}")
    z = noise
    ones = constant_level(noise, 1.0).signal
    for before_T, after_T in itertools.pairwise(matrix_PT):
        level = SignalLevel.from_noise(ones * torch.as_tensor(before_T / num_steps).to(ones))
        dt_BT = ones * torch.as_tensor((before_T - after_T) / num_steps).to(ones)
        clean = predict(z, level, dt_BT.clamp_min(1 / num_steps))
        moved = advance(z, velocity(clean, z, level), dt_BT)
        moving = SignalLevel.from_signal(dt_BT)
        z = z.map(lambda old, new, moving=moving: torch.where(moving.signal_like(old) > 0, new, old), moved)
    return z


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{steps} sampling steps; expected at least 1")
    return steps
