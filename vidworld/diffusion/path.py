"""The straight path between noise and data: z = (1 - tau) eps + tau x, with tau the signal level.

Flow matching with the linear (rectified) path, Lipman et al. 2023 and Liu et al. 2023. Every level is a
`SignalLevel` of shape [B, T]: each frame has its own.
"""

import math

import torch
from torch import Tensor

from vidworld.types import Frames, SignalLevel

NOISE_FLOOR = 1e-3
"""1 - tau is held above this where it divides: clean frames have no defined velocity."""

SHIFT_REFERENCE = 4096
"""Tokens times channels of the latent at which the level is not shifted."""


def mix(clean: Frames, noise: Frames, level: SignalLevel) -> Frames:
    """Noisy frames z at `level`: the noise itself at signal 0, the clean frames at signal 1."""

    def blend(clean: Tensor, noise: Tensor) -> Tensor:
        signal = level.signal_like(clean)
        return (1 - signal) * noise + signal * clean

    return clean.map(blend, noise)


def velocity(clean: Frames, z: Frames, level: SignalLevel) -> Frames:
    """dz/dtau = (x - z) / (1 - tau) of the path that runs through `z` and ends in `clean`."""
    return clean.map(lambda x, z: (x - z) / (1 - level.signal_like(z)).clamp_min(NOISE_FLOOR), z)


def advance(z: Frames, velocity: Frames, dt: float | Tensor) -> Frames:
    """Move along the velocity by `dt` of signal, one number or one a frame [B, T]."""

    def move(z: Tensor, v: Tensor) -> Tensor:
        return z + (SignalLevel.from_signal(dt).signal_like(z) if isinstance(dt, Tensor) else dt) * v

    return z.map(move, velocity)


def clean_from(z: Frames, velocity: Frames, level: SignalLevel) -> Frames:
    """The clean end of the path through `z` with this velocity: x = z + (1 - tau) v."""
    return advance(z, velocity, level.noise)


def noise_from(z: Frames, velocity: Frames, level: SignalLevel) -> Frames:
    """The noise end of the path through `z` with this velocity: eps = z - tau v."""
    return advance(z, velocity, -level.signal)


def shift(level: SignalLevel, tokens_times_channels: int) -> SignalLevel:
    """Move levels towards noise for large latents, whose pixels tell more about each other.

    With n the share of noise, n' = s n / (1 + (s - 1) n), s = sqrt(tokens * channels / 4096) (Esser et al.
    2024, eq. 23). Latents smaller than the reference are left alone (s >= 1): a push towards clean levels
    would take training away from the noise end, on which few-step sampling rests.
    """
    strength = max(1.0, math.sqrt(tokens_times_channels / SHIFT_REFERENCE))
    noise = level.noise
    return SignalLevel.from_noise(strength * noise / (1 + (strength - 1) * noise))


def constant_level(frames: Frames, signal: float) -> SignalLevel:
    """The same level [B, T] for all frames, in float32 or better."""
    proprio_BTS = frames.proprio_BTS
    dtype = torch.promote_types(proprio_BTS.dtype, torch.float32)
    return SignalLevel.from_signal(
        torch.full(proprio_BTS.shape[:2], signal, dtype=dtype, device=proprio_BTS.device)
    )
