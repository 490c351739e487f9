"""The protocol of video tokenizers, and what follows from their strides.

Shapes: B batch, T frames, V views, C channels, H W pixels, h w latent rows and columns, A action dims, k time
stride. Pixels lie in [-1, 1]; latents are normalised to mean 0 and standard deviation 1 in every channel.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vidworld.errors import DataError

STD_FLOOR = 1e-6


@runtime_checkable
class Tokenizer(Protocol):
    """A video autoencoder: every tokenizer is an `nn.Module` with these members.

    Time is causal: latent frame 0 is camera frame 0, latent frame t > 0 holds camera frames (t-1)k+1 .. tk.
    With time stride 1 each frame is encoded and decoded by itself, so that any split of a video along time or
    batch gives the same latents.
    """

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        ...

    @property
    def size_multiple(self) -> int:
        """Height and width must be divisible by this."""
        ...

    @property
    def time_stride(self) -> int:
        """Camera frames a latent frame, k."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents."""
        ...

    @property
    def digest(self) -> str:
        """Short hash over kind, config, weights and statistics."""
        ...

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Video in [-1, 1] to normalised latents [B, 1 + (T-1)/k, C, h, w]."""
        ...

    def decode(self, latents_BTChw: Tensor) -> Tensor:
        """Normalised latents to video [B, 1 + (T-1)k, 3, H, W], about -1 to 1, not clamped."""
        ...


def to_unit_range(video: Tensor) -> Tensor:
    """Pixels uint8 0..255 to float32 -1..1."""
    return video.to(torch.float32) / 127.5 - 1


def to_pixels(video: Tensor) -> Tensor:
    """Video in -1..1 to uint8 0..255, clamped and rounded: the inverse of `to_unit_range`."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fold_views(video_BTV: Tensor) -> Tensor:
    """Put views into the batch: [B, T, V, ...] to [B * V, T, ...]."""
    return video_BTV.movedim(2, 1).flatten(0, 1)


def unfold_views(video_NT: Tensor, num_views: int) -> Tensor:
    """Undo `fold_views`: [B * V, T, ...] to [B, T, V, ...]."""
    return video_NT.unflatten(0, (-1, num_views)).movedim(1, 2)


def num_latent_frames(num_frames: int, time_stride: int) -> int:
    """T_latent = 1 + (T - 1) / k.

    Raises DataError where T - 1 is not divisible by k.
    """
    if num_frames < 1 or (num_frames - 1) % time_stride:
        fits = usable_frames(max(num_frames, 1), time_stride)
        raise DataError(
            "number of frames",
            got=num_frames,
            expected=f"1 more than a multiple of the tokenizer's time stride {time_stride}",
            fix=f"take {fits} or {fits + time_stride} frames",
        )
    return 1 + (num_frames - 1) // time_stride


def usable_frames(num_frames: int, time_stride: int) -> int:
    """The most frames of an episode that make whole latent frames."""
    return (num_frames - 1) // time_stride * time_stride + 1


def chunk_actions(actions_BTA: Tensor, time_stride: int) -> tuple[Tensor, Tensor]:
    """Give each latent frame the k actions that lead into it.

    Row t of `actions_BTA` takes camera frame t to t + 1, one row a camera frame; the last leads out of the
    clip and is dropped. Returns actions [B, T_latent, k, A] and keep [B, T_latent] bool: frame 0 has zeros
    and keep False, frame t > 0 has rows (t-1)k .. tk-1. Differentiable.
    Raises DataError where T - 1 is not divisible by k.
    """
    batch, num_frames, dims = actions_BTA.shape
    num_latent = num_latent_frames(num_frames, time_stride)
    into = actions_BTA[:, :-1].unflatten(1, (num_latent - 1, time_stride))
    first = actions_BTA.new_zeros(batch, 1, time_stride, dims)
    keep_BT = torch.ones(batch, num_latent, dtype=torch.bool, device=actions_BTA.device)
    keep_BT[:, 0] = False
    return torch.cat([first, into], 1), keep_BT


def check_video(video_BTCHW: Tensor, size_multiple: int) -> None:
    """Refuse what is no float RGB video [B, T, 3, H, W] of a size divisible by `size_multiple`."""
    if video_BTCHW.ndim != 5 or video_BTCHW.shape[2] != 3 or 0 in video_BTCHW.shape:
        raise DataError(
            "video to encode", got=f"shape {tuple(video_BTCHW.shape)}", expected="[B, T, 3, H, W], not empty"
        )
    if not video_BTCHW.is_floating_point():
        raise DataError(
            "video to encode",
            got=video_BTCHW.dtype,
            expected="a float video in [-1, 1]",
            fix="pass it through to_unit_range",
        )
    check_size(video_BTCHW.shape[-2], video_BTCHW.shape[-1], size_multiple)


def check_size(height: int, width: int, size_multiple: int) -> None:
    """Refuse a frame size that does not divide into the tokenizer's latents and the model's patches."""
    if height % size_multiple or width % size_multiple or min(height, width) < 1:

        def near(size: int) -> int:
            return max(1, round(size / size_multiple)) * size_multiple

        raise DataError(
            "frame size",
            got=f"{width}x{height}",
            expected=f"width and height divisible by {size_multiple}",
            fix=f"shard the video at {near(width)}x{near(height)}",
        )


class ChannelStatistics:
    """Mean and standard deviation of each latent channel over all frames given, gathered in float64."""

    def __init__(self, latent_channels: int) -> None:
        self.count = 0
        self._sum_C = torch.zeros(latent_channels, dtype=torch.float64)
        self._squares_C = torch.zeros(latent_channels, dtype=torch.float64)

    def update(self, latents_BTChw: Tensor) -> None:
        """Count latents [..., C, h, w]."""
        # In float64 the plain sums are exact enough for latents, whose mean and spread are of one order.
        rows_CN = latents_BTChw.detach().double().movedim(-3, 0).flatten(1)
        self._sum_C += rows_CN.sum(1).cpu()
        self._squares_C += rows_CN.square().sum(1).cpu()
        self.count += rows_CN.shape[1]

    @property
    def mean_C(self) -> Tensor:
        """Mean [C] float32."""
        assert self.count, "no latents counted"
        return (self._sum_C / self.count).float()

    @property
    def std_C(self) -> Tensor:
        """Standard deviation [C] float32."""
        assert self.count, "no latents counted"
        mean_C = self._sum_C / self.count
        return (self._squares_C / self.count - mean_C.square()).clamp(min=0).sqrt().float()


def tokenizer_digest(kind: str, config: Mapping[str, Any], module: nn.Module) -> str:
    """Short sha256 over a tokenizer's kind, config, and tensors by name, dtype, shape and bytes."""
    hashed = hashlib.sha256(json.dumps([kind, config], sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(flat.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
