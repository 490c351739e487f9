"""Encode and decode a video piece by piece, the memory of a causal tokenizer being a value.

Shapes: B batch, T frames, C channels, H W pixels, h w latent, k time stride.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from vidworld.errors import DataError
from vidworld.tokenizers.base import Tokenizer, num_latent_frames


@dataclass(frozen=True)
class StreamState:
    """What a tokenizer remembers of the frames of one stream; nothing in it is ever changed in place.

    Encoding and decoding have a state each. A fork of a stream is a copy of the value, and any number of
    streams may take turns on one tokenizer.
    """

    batch: int
    """Videos side by side."""
    frames: int = 0
    """Latent frames that went through."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Activations that the next frames need, [R, ...] each."""
    rows_B: Tensor | None = None
    """Which of the R rows each video has; None: its own. Copies that have not gone apart share a row, for one
    may take hundreds of megabytes."""

    def select(self, index_B: Tensor) -> "StreamState":
        """Videos in a new order, some perhaps twice or not at all."""
        rows_B = index_B if self.rows_B is None else self.rows_B[index_B]
        chosen = StreamState(len(index_B), self.frames, self.features, rows_B)
        shared = any(len(index_B) > len(feature) for feature in self.features.values())
        return chosen if shared else chosen.gathered()

    def gathered(self) -> "StreamState":
        """The same with a row for each video."""
        if self.rows_B is None:
            return self
        features = {name: feature[self.rows_B] for name, feature in self.features.items()}
        return StreamState(self.batch, self.frames, features)

    def map(self, function: Callable[[Tensor], Tensor]) -> "StreamState":
        """Apply a function to every tensor."""
        features = {name: function(feature) for name, feature in self.features.items()}
        rows_B = None if self.rows_B is None else function(self.rows_B)
        return dataclasses.replace(self, features=features, rows_B=rows_B)


@runtime_checkable
class StreamingTokenizer(Tokenizer, Protocol):
    """A tokenizer that also goes on where a stream stopped: pieces give the bits of the whole.

    Not every tokenizer can: ask `streaming(tokenizer)`.
    """

    def start(self, batch: int) -> StreamState:
        """A stream of `batch` videos of which nothing has been seen."""
        ...

    def encode_next(self, state: StreamState, video_BTCHW: Tensor) -> tuple[StreamState, Tensor]:
        """Latents of the next frames: 1 + nk of them on the first call, nk on later ones."""
        ...

    def decode_next(self, state: StreamState, latents_BTChw: Tensor) -> tuple[StreamState, Tensor]:
        """Video of the next latents: the first of a stream gives one frame, each later one k."""
        ...


class FrameStreaming:
    """Streaming for tokenizers of single frames, which have nothing to remember."""

    def start(self, batch: int) -> StreamState:
        """A stream of `batch` videos."""
        return StreamState(batch)

    def encode_next(self, state: StreamState, video_BTCHW: Tensor) -> tuple[StreamState, Tensor]:
        """Latents of the next frames, any number."""
        after = advanced(state, video_BTCHW, video_BTCHW.shape[1])
        return after, cast(Tokenizer, self).encode(video_BTCHW)

    def decode_next(self, state: StreamState, latents_BTChw: Tensor) -> tuple[StreamState, Tensor]:
        """Video of the next latents, any number."""
        after = advanced(state, latents_BTChw, latents_BTChw.shape[1])
        return after, cast(Tokenizer, self).decode(latents_BTChw)


def streaming(tokenizer: Tokenizer) -> StreamingTokenizer | None:
    """The tokenizer if it can stream; cheaper than `isinstance`, which computes its digest."""
    return cast(StreamingTokenizer, tokenizer) if hasattr(tokenizer, "decode_next") else None


def advanced(
    state: StreamState, given_BT: Tensor, frames: int, features: Mapping[str, Tensor] | None = None
) -> StreamState:
    """The state `frames` latent frames later; refuses another number of videos with DataError."""
    require_batch(state, given_BT)
    return StreamState(
        state.batch, state.frames + frames, state.features if features is None else dict(features)
    )


def require_batch(state: StreamState, given_BT: Tensor) -> None:
    """Refuse another number of videos than the stream began with."""
    if len(given_BT) != state.batch:
        raise DataError("videos of the stream", got=len(given_BT), expected=state.batch)


def next_latent_frames(state: StreamState, num_frames: int, time_stride: int) -> int:
    """Latent frames that the next `num_frames` camera frames make.

    Raises DataError where they are not whole: 1 + nk at the start of a stream, nk after that.
    """
    if not state.frames:
        return num_latent_frames(num_frames, time_stride)
    if num_frames < 1 or num_frames % time_stride:
        raise DataError(
            "next frames of the stream",
            got=num_frames,
            expected=f"a multiple of the tokenizer's time stride {time_stride}",
        )
    return num_frames // time_stride
