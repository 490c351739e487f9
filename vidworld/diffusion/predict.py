"""The one thing this room asks of a model."""

from collections.abc import Callable

from torch import Tensor

from vidworld.types import Frames, SignalLevel

Predict = Callable[[Frames, SignalLevel, Tensor], Frames]
"""(noisy frames z, level [B, T], step size d [B, T] in (0, 1]) -> the clean frames that z came from.

d is the shortcut's step (Frans et al. 2024): the prediction, taken as a velocity, should carry z from tau to
tau + d in one go. At the finest d it is the ordinary denoiser. Actions and other conditions are closed over.
"""
