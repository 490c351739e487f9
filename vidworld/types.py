"""The nouns that rooms hand to each other.

Shapes: B batch, T frames, V views, C channels, H W pixels, h w latent, A action dims, S proprio dims,
k actions per latent frame.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.contract import Dimension

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Video:
    """One view of an episode before it is written: frames are decoded only when asked for."""

    num_frames: int
    frames: Callable[[], Iterator[np.ndarray]]
    """Opens the video and yields `num_frames` RGB frames [H, W, 3] uint8."""


@dataclass(frozen=True)
class Episode:
    """One recorded or simulated episode, in raw units.

    `actions_TA[t]` takes frame t to frame t+1; the last row has no frame after it.
    """

    episode_id: str
    embodiment: str
    fps: float
    views: dict[str, Video]
    actions_TA: np.ndarray
    proprio_TS: np.ndarray
    timestamps_T: np.ndarray
    """Seconds, as recorded (they may jitter)."""
    text: str = ""
    outcome: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    """Where it came from: dataset, original index, converter version, trims."""

    def __len__(self) -> int:
        return len(self.actions_TA)


@dataclass(frozen=True)
class Layout:
    """How the pictures of an embodiment look: its cameras in order, their size in pixels, frames a second."""

    views: tuple[str, ...]
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class EmbodimentSpec:
    """An action contract before its statistics are known: what a source declares."""

    embodiment: str
    rate_hz: float
    action: tuple[Dimension, ...]
    proprio: tuple[Dimension, ...]
    control_frame: str = "unknown"
    note: str = ""


@dataclass(frozen=True)
class SignalLevel:
    """How clean each frame is: `signal` 1 is clean data and 0 is pure noise (tau in the papers used here).

    Two ports of the same method had this direction reversed, so that 0.1 of context noise became 0.9: a bare
    tensor is never a level in vidworld, and each constructor says what its number means.
    """

    signal: "Tensor"

    @classmethod
    def from_signal(cls, signal: "Tensor") -> "SignalLevel":
        """From the share of data, 1 = clean."""
        return cls(signal)

    @classmethod
    def from_noise(cls, noise: "Tensor") -> "SignalLevel":
        """From the share of noise, 0 = clean."""
        return cls(1 - noise)

    @property
    def noise(self) -> "Tensor":
        """The share of noise, 1 - signal."""
        return 1 - self.signal

    def signal_like(self, value: "Tensor") -> "Tensor":
        """`signal` with trailing axes of one, to broadcast against `value`."""
        return self.signal.reshape(*self.signal.shape, *([1] * (value.ndim - self.signal.ndim)))

    def __getitem__(self, index: Any) -> "SignalLevel":
        return SignalLevel(self.signal[index])

    @staticmethod
    def cat(levels: "Sequence[SignalLevel]", dim: int) -> "SignalLevel":
        """Join levels along an axis."""
        import torch

        return SignalLevel(torch.cat([level.signal for level in levels], dim))


@dataclass(frozen=True)
class Frames:
    """Latents and proprioception of the same frames, denoised together.

    latents_BTVChw: normalised latents [B, T, V, C, h, w]; proprio_BTS: normalised proprioception [B, T, S].
    """

    latents_BTVChw: "Tensor"
    proprio_BTS: "Tensor"

    def map(self, function: "Callable[..., Tensor]", *others: "Frames") -> "Frames":
        """Apply `function` to the latents of all, and to the proprioception of all."""
        return Frames(
            function(self.latents_BTVChw, *(other.latents_BTVChw for other in others)),
            function(self.proprio_BTS, *(other.proprio_BTS for other in others)),
        )

    @staticmethod
    def cat(frames: "Sequence[Frames]", dim: int) -> "Frames":
        """Join along batch (0) or time (1)."""
        import torch

        first, *rest = frames
        return first.map(lambda *tensors: torch.cat(tensors, dim), *rest)

    def __getitem__(self, index: Any) -> "Frames":
        return self.map(lambda tensor: tensor[index])

    @property
    def num_frames(self) -> int:
        """Frames along time."""
        return self.proprio_BTS.shape[1]


@dataclass(frozen=True)
class Batch:
    """Clips as the loader gives them: raw units, padded to the widest embodiment (also views and pictures).

    Exactly one of `video_BTVCHW` (uint8) and `latents_BTVChw` (float16, normalised) is present.
    """

    ids: tuple[str, ...]
    """`<sample key>@<first frame>` for each clip, in order."""
    actions_BTA: "Tensor"
    proprio_BTS: "Tensor"
    embodiment_B: "Tensor"
    """Index into the dataset's contracts, int64."""
    video_BTVCHW: "Tensor | None" = None
    latents_BTVChw: "Tensor | None" = None

    def to(self, device: "torch.device | str", *, non_blocking: bool = False) -> "Batch":
        """Move every tensor."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), self.ids)

    def rows(self, rows: "Sequence[int]") -> "Batch":
        """Some of the clips."""
        rows = list(rows)
        return self._map(lambda tensor: tensor[rows], tuple(self.ids[row] for row in rows))

    def _map(self, function: "Callable[[Tensor], Tensor]", ids: tuple[str, ...]) -> "Batch":
        video, latents = self.video_BTVCHW, self.latents_BTVChw
        return Batch(
            ids=ids,
            actions_BTA=function(self.actions_BTA),
            proprio_BTS=function(self.proprio_BTS),
            embodiment_B=function(self.embodiment_B),
            video_BTVCHW=None if video is None else function(video),
            latents_BTVChw=None if latents is None else function(latents),
        )
