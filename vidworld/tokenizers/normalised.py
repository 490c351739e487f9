"""What tokenizers share: latents normalised by the stored mean and deviation of each channel."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vidworld.errors import DataError
from vidworld.tokenizers.base import STD_FLOOR, ChannelStatistics, check_video


class NormalisedTokenizer(nn.Module, ABC):
    """Holds the statistics; subclasses give the raw latents."""

    size_multiple: int
    latent_channels: int

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.register_buffer("mean_C", torch.zeros(latent_channels))
        self.register_buffer("std_C", torch.ones(latent_channels))
        self.mean_C: Tensor
        self.std_C: Tensor

    @abstractmethod
    def encode_raw(self, video_BTCHW: Tensor) -> Tensor:
        """`encode` without normalisation."""

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Set what `encode` subtracts and divides by: mean and standard deviation of the raw latents.

        Raises DataError for values that are not finite or a channel that never changes.
        """
        expected = (self.latent_channels,)
        if mean_C.shape != expected or std_C.shape != expected:
            raise DataError(
                "latent statistics",
                got=f"{tuple(mean_C.shape)}, {tuple(std_C.shape)}",
                expected=str(expected),
            )
        if not (torch.isfinite(mean_C).all() and torch.isfinite(std_C).all() and (std_C > STD_FLOOR).all()):
            raise DataError(
                "latent statistics",
                got=f"std {std_C.tolist()}",
                expected=f"finite values, std above {STD_FLOOR:g}",
                fix="the tokenizer has a dead channel or diverged: train it anew",
            )
        self.mean_C.copy_(mean_C)
        self.std_C.copy_(std_C)

    @torch.no_grad()
    def measure_statistics(self, videos: Iterable[Tensor]) -> ChannelStatistics:
        """Measure raw latents over videos [B, T, 3, H, W] in [-1, 1] and set the statistics from them."""
        statistics = ChannelStatistics(self.latent_channels)
        for video_BTCHW in videos:
            statistics.update(self.encode_raw(video_BTCHW))
        if not statistics.count:
            raise DataError("videos to measure latents on", got="none", expected="at least one")
        self.set_statistics(statistics.mean_C, statistics.std_C)
        return statistics

    def normalised(self, raw_BTChw: Tensor) -> Tensor:
        """Raw latents to mean 0 and deviation 1."""
        return (raw_BTChw - _spread(self.mean_C)) / _spread(self.std_C)

    def denormalised(self, latents_BTChw: Tensor) -> Tensor:
        """Undo `normalised`."""
        return latents_BTChw * _spread(self.std_C) + _spread(self.mean_C)

    def check_video(self, video_BTCHW: Tensor) -> None:
        """Refuse what is no video or has a size that does not divide, with DataError."""
        check_video(video_BTCHW, self.size_multiple)

    def check_latents(self, latents_BTChw: Tensor) -> None:
        """Refuse latents of another shape with DataError."""
        if latents_BTChw.ndim != 5 or latents_BTChw.shape[2] != self.latent_channels:
            raise DataError(
                "latents to decode",
                got=f"shape {tuple(latents_BTChw.shape)}",
                expected=f"[B, T, {self.latent_channels}, h, w]",
            )


def _spread(values_C: Tensor) -> Tensor:
    return values_C[:, None, None]
