"""The KV cache of a rollout, as a value: every operation returns a new cache and leaves the old one valid.

Shapes: B batch, N tokens a frame, h key-value heads, F cached frames, d head dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.types import Frames


class KeyValue(NamedTuple):
    """Keys and values of one time-attention layer, [B, N, h, F, d] each; keys normalised, not yet rotated."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the frames known so far, one pair a time-attention layer.

    Keys are stored before RoPE and rotated when they are read, by their slot in the cache. So time is
    relative to the window: dropping old frames or pinning the first ones moves the rest to lower slots, and a
    rollout of any length only ever sees the positions that training saw, as long as at most T_train - 1
    frames are kept.
    """

    layers: tuple[KeyValue, ...]
    newest: Frames | None = None
    """The newest frame [B, 1] as it was committed, noise included; for models with `previous_frame`."""

    @property
    def num_frames(self) -> int:
        """Cached frames."""
        return self.layers[0].key.shape[3]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.layers[0].key.shape[0]

    def append(self, layers: Sequence[KeyValue], newest: Frames | None = None) -> "KVCache":
        """Add newer frames at the end."""
        joined = tuple(
            KeyValue(torch.cat([old.key, new.key], 3), torch.cat([old.value, new.value], 3))
            for old, new in zip(self.layers, layers, strict=True)
        )
        return KVCache(joined, newest)

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVCache":
        """Apply to every tensor."""
        layers = (KeyValue(function(layer.key), function(layer.value)) for layer in self.layers)
        return KVCache(tuple(layers), None if self.newest is None else self.newest.map(function))

    def fork(self, index_B: Tensor) -> "KVCache":
        """Select rows, with repetition: one state becomes many, or the survivors are kept."""
        return self.map(lambda tensor: tensor.index_select(0, index_B))

    def roll(self, window: int, sink: int = 0) -> "KVCache":
        """Keep the first `sink` frames, pinned, and the newest others: at most `window` in all.

        What a kept frame stored is left as it is, so it may still remember frames that were dropped.
        """
        if not 0 <= sink < window:
            raise ConfigError("sink of the KV cache", got=sink, expected=f"0 to window - 1 = {window - 1}")
        if self.num_frames <= window:
            return self
        newest = self.num_frames - (window - sink)

        def keep(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, :, :, :sink], tensor[:, :, :, newest:]], 3)

        layers = tuple(KeyValue(keep(layer.key), keep(layer.value)) for layer in self.layers)
        return replace(self, layers=layers)
