"""Pictures in and out of a world: its tokenizer, and where that stands if it compresses time.

Shapes: B samples, T frames, V views, C channels, H W pixels, h w latent, k camera frames a latent frame.
"""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.errors import ConfigError, DataError
from vidworld.tokenizers.base import Tokenizer, fold_views, to_pixels, to_unit_range, unfold_views
from vidworld.tokenizers.streaming import StreamState, streaming
from vidworld.world.coding import Coding
from vidworld.world.intake import gather_pictures
from vidworld.world.spec import WorldSpec

PICTURES_AT_ONCE = 256
"""Pictures of a rollout that are decoded in one go."""


@dataclass(frozen=True)
class Codec:
    """A tokenizer as a world uses it: views beside each other, `dtype` outside, autocast within."""

    tokenizer: Tokenizer
    spec: WorldSpec
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[Any]]

    def encode(self, video_BTVHWC: Tensor) -> Tensor:
        """Uint8 pictures to normalised latents [B, T, V, C, h, w], as a video of its own."""
        with self.autocast():
            latents_NTChw = self.tokenizer.encode(self._folded(video_BTVHWC))
        return unfold_views(latents_NTChw.to(self.dtype), video_BTVHWC.shape[2])

    def decode(self, latents_BTVChw: Tensor) -> Tensor:
        """Normalised latents to pixels [B, T, V, C, H, W] in -1 to 1, as a video of its own."""
        with self.autocast():
            video_NTCHW = self.tokenizer.decode(fold_views(latents_BTVChw))
        return unfold_views(video_NTCHW.to(self.dtype), latents_BTVChw.shape[2])

    def begin(self, video_BTVHWC: Tensor) -> tuple[Tensor, Coding | None]:
        """Latents of a prompt, and where the tokenizer stands after it."""
        if self.spec.frames_per_step == 1:
            return self.encode(video_BTVHWC), None
        tokenizer = streaming(self.tokenizer)
        if tokenizer is None:
            latents_BTVChw = self.encode(video_BTVHWC)
            return latents_BTVChw, Coding(latents_BTVChw.detach())
        start = tokenizer.start(video_BTVHWC.shape[0] * video_BTVHWC.shape[2])
        encoder, latents_BTVChw = self._encode_next(start, video_BTVHWC)
        return latents_BTVChw, Coding(latents_BTVChw.detach(), start, encoder)

    def observe(self, coding: Coding | None, frames: Tensor | np.ndarray, batch: int) -> tuple[Any, Any]:
        """Latents [B, 1, V, C, h, w] of the next real frames, and where the tokenizer stands after them.

        frames: uint8 [B, V, H, W, 3] or [V, H, W, 3], with an axis k before V if time is compressed.
        """
        k = self.spec.frames_per_step
        array = np.asarray(frames.cpu() if isinstance(frames, Tensor) else frames)
        if k == 1:
            pictures = gather_pictures(array, batch, self.spec)
            return self.encode(self._to_device(pictures[:, None])), None
        assert coding is not None
        if coding.decoder is None:
            raise ConfigError(
                "observe with a tokenizer that cannot stream",
                fix="use reset with the frames so far as prompt",
            )
        if coding.encoder is None:
            raise ConfigError(
                "observe after imagined frames",
                got="a tokenizer that compresses time: its encoder has not seen the frames before",
                fix="observe a state before it imagines (states are values, so imagine on it and keep it), "
                "or reset with the frames so far as prompt",
            )
        if array.ndim == 5:
            array = np.broadcast_to(array, (batch, *array.shape))
        if array.ndim != 6 or array.shape[:2] != (batch, k):
            raise DataError(
                "shape of the observed frames",
                got=array.shape,
                expected=f"[{batch}, {k}, V, H, W, 3] or [{k}, V, H, W, 3]: {k} camera frames a step",
            )
        pictures = gather_pictures(array.reshape(batch * k, *array.shape[2:]), batch * k, self.spec)
        encoder, latents_B1VChw = self._encode_next(
            coding.encoder, self._to_device(pictures.reshape(array.shape))
        )
        return latents_B1VChw, coding.observed(latents_B1VChw, encoder)

    def show(self, coding: Coding, steps: int) -> tuple[Tensor, Coding]:
        """Uint8 video of the newest `steps` latent frames, none of them decoded yet, and the coding after."""
        k, pending_BTVChw = self.spec.frames_per_step, coding.pending_BTVChw
        batch, _, views = pending_BTVChw.shape[:3]
        tokenizer = streaming(self.tokenizer)
        if coding.decoder is None or tokenizer is None:
            video_BTVHWC = to_video(self.decode(pending_BTVChw))
            after = coding
        else:
            decoder, pieces = coding.decoder, []
            for latents in pending_BTVChw.split(max(1, PICTURES_AT_ONCE // (batch * views * k)), 1):
                with self.autocast():
                    decoder, video_NTCHW = tokenizer.decode_next(decoder, fold_views(latents))
                pieces.append(to_video(unfold_views(video_NTCHW.to(self.dtype), views)))
            video_BTVHWC = torch.cat(pieces, 1)
            after = dataclasses.replace(coding, pending_BTVChw=pending_BTVChw[:, :0], decoder=decoder)
        return video_BTVHWC[:, -steps * k :], dataclasses.replace(after, shown_BkVHWC=video_BTVHWC[:, -k:])

    def newest(self, coding: Coding) -> tuple[Tensor, Coding]:
        """Uint8 pictures [B, k, V, H, W, 3] of the newest latent frame, and the coding after."""
        if coding.shown_BkVHWC is not None:
            return coding.shown_BkVHWC, coding
        if coding.decoder is None:
            warnings.warn(
                "this tokenizer cannot stream: each step that shows pictures decodes again all latents since "
                "the prompt began; pass decode=False and look rarely, or use rollout, which decodes once",
                stacklevel=4,
            )
        return self.show(coding, 1)

    def pictures(self, latents_BTVChw: Tensor) -> Tensor:
        """Uint8 video [B, T, V, H, W, 3] of latent frames that do not depend on each other, few at a time."""
        batch, frames, views = latents_BTVChw.shape[:3]
        if not frames:
            size = (batch, 0, views, self.spec.height, self.spec.width, 3)
            return torch.zeros(size, dtype=torch.uint8, device=latents_BTVChw.device)
        pieces = latents_BTVChw.detach().split(max(1, PICTURES_AT_ONCE // (batch * views)), 1)
        return torch.cat([to_video(self.decode(piece)) for piece in pieces], 1)

    def _encode_next(self, state: StreamState, video_BTVHWC: Tensor) -> tuple[StreamState, Tensor]:
        tokenizer = streaming(self.tokenizer)
        assert tokenizer is not None
        with self.autocast():
            state, latents_NTChw = tokenizer.encode_next(state, self._folded(video_BTVHWC))
        return state, unfold_views(latents_NTChw.to(self.dtype), video_BTVHWC.shape[2])

    def _folded(self, video_BTVHWC: Tensor) -> Tensor:
        return fold_views(to_unit_range(video_BTVHWC).to(self.dtype).movedim(-1, -3))

    def _to_device(self, pictures: np.ndarray) -> Tensor:
        assert isinstance(self.tokenizer, torch.nn.Module)
        return torch.tensor(pictures, device=next(self.tokenizer.parameters()).device)


def to_video(pixels_CHW: Tensor) -> Tensor:
    """Decoded pixels [..., C, H, W] to uint8 [..., H, W, C]; carries no gradient."""
    return to_pixels(pixels_CHW.detach()).movedim(-3, -1).contiguous()
