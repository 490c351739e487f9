"""The KV cache of a rollout in fixed slots: nothing moves and no shape changes, so that a graph can hold it.

A frame keeps its slot until a newer one takes it; where a frame stands in time is told by `Clock`, not by
its place in memory. Shapes: B batch, N tokens a frame, h key-value heads, W slots, d head dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.model.cache import KeyValue, KVCache


@dataclass(frozen=True)
class Moment:
    """The slots as frame number `frame` of a ring is denoised."""

    frame: int
    slot: int
    """Where this frame goes; whatever was there has left the window."""
    position: int
    """This frame's time position: the newest of those in sight."""
    positions_W: tuple[int, ...]
    """Time position of what each slot holds; 0 where it holds nothing."""
    seen_W: tuple[bool, ...]
    """Slots in sight, this frame's own included."""


@dataclass(frozen=True)
class Clock:
    """Which frame of a rollout goes to which slot, and where each stands in time.

    The first `sink` frames stay. The others take turns in the remaining slots, so that a new frame replaces
    the oldest, which is the one that `KVCache.roll(window - 1, sink)` drops. Positions are those of the
    rolled cache: how old a frame is counts, and its number does not.
    """

    window: int
    """Slots W: the frames in sight, the new one included."""
    sink: int = 0

    def __post_init__(self) -> None:
        """Refuse a sink that leaves no room with ConfigError."""
        if not 0 <= self.sink < self.window - 1:
            raise ConfigError(
                "sink of the KV ring", got=self.sink, expected=f"0 to window - 2 = {self.window - 2}"
            )

    @property
    def turn(self) -> int:
        """Frames after which the slots stand as before."""
        return self.window - self.sink

    def slot(self, frame: int) -> int:
        """Slot of a frame."""
        return frame if frame < self.window else self.sink + (frame - self.sink) % self.turn

    def is_full(self, frame: int) -> bool:
        """Whether all slots are in sight as `frame` is denoised, so that no mask is needed."""
        return frame >= self.window - 1

    def at(self, frame: int) -> Moment:
        """The slots as a frame is denoised."""
        position = min(frame, self.window - 1)
        held = {one: one for one in range(min(self.sink, frame + 1))}
        oldest = max(self.sink, frame - self.turn + 1)
        held |= {self.slot(one): position - (frame - one) for one in range(oldest, frame + 1)}
        slots = range(self.window)
        return Moment(
            frame,
            self.slot(frame),
            position,
            tuple(held.get(slot, 0) for slot in slots),
            tuple(slot in held for slot in slots),
        )

    def row(self, frame: int) -> int:
        """Row of `moments` that holds for a frame."""
        return frame if frame < self.window else self.window + (frame - self.window) % self.turn

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """All moments there are: of the frames until the slots are full, and of one turn after."""
        return tuple(self.at(frame) for frame in range(self.window + self.turn))


@dataclass(frozen=True)
class RingCache:
    """Keys (normalised, not rotated) and values of the frames in sight, in the slots of a clock.

    As a `KVCache` it is a value. It holds the same frames as one that is rolled to window - 1 frames before
    each new one, and `to_cache` gives it back bit for bit.
    """

    clock: Clock
    layers: tuple[KeyValue, ...]
    """[B, N, h, W, d] each; slots that hold nothing are zero."""
    num_frames: int
    """Frames written so far, the ones that were replaced included: the number of the next frame."""

    @classmethod
    def from_cache(cls, cache: KVCache, clock: Clock) -> "RingCache":
        """Lay a cache out in slots; frames beyond window - 1 leave, as they do before the next frame."""
        cache = cache.roll(clock.window - 1, clock.sink)
        free = clock.window - cache.num_frames

        def spread(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0, 0, free))

        layers = tuple(KeyValue(spread(layer.key), spread(layer.value)) for layer in cache.layers)
        return cls(clock, layers, cache.num_frames)

    def to_cache(self) -> KVCache:
        """The frames held, oldest first behind the sink."""
        if not self.num_frames:
            raise ValueError("an empty ring has no cache")
        order, starts = self.order, [0]
        starts += [i for i in range(1, len(order)) if order[i] != order[i - 1] + 1]
        runs = [order[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]

        def in_order(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, :, :, run[0] : run[-1] + 1] for run in runs], 3)

        return KVCache(tuple(KeyValue(in_order(layer.key), in_order(layer.value)) for layer in self.layers))

    @property
    def order(self) -> list[int]:
        """Slots that hold a frame, in order of time."""
        moment = self.clock.at(self.num_frames - 1)
        slots = [slot for slot, seen in enumerate(moment.seen_W) if seen]
        return sorted(slots, key=lambda slot: moment.positions_W[slot])

    def append(self, layers: Sequence[KeyValue]) -> "RingCache":
        """One newer frame [B, N, h, 1, d] a layer, in the place of the one that leaves."""
        slot = self.clock.slot(self.num_frames)

        def write(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old[:, :, :, :slot], new, old[:, :, :, slot + 1 :]], 3)

        written = tuple(
            KeyValue(write(old.key, new.key), write(old.value, new.value))
            for old, new in zip(self.layers, layers, strict=True)
        )
        return RingCache(self.clock, written, self.num_frames + 1)

    def fork(self, index_B: Tensor) -> "RingCache":
        """Select rows, with repetition."""
        layers = (
            KeyValue(layer.key.index_select(0, index_B), layer.value.index_select(0, index_B))
            for layer in self.layers
        )
        return RingCache(self.clock, tuple(layers), self.num_frames)
