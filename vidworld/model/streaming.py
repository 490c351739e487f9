"""The network as a rollout runs it: a few new frames a pass, against keys and values in fixed slots.

Computes what `CausalDiT.forward` does with a rolled `KVCache`. What differs is where things are kept and how
often they are computed:

- keys and values are written in place into the slots of a `Clock`; cached keys are rotated once a frame;
- what modulates the blocks is computed for all passes of a frame at once, so that its weights, a third of the
  network's, are read once a frame and not once a pass;
- the frame before is committed in the first pass of the next one. It attends to what it would have seen in a
  pass of its own, so K denoising steps take K passes instead of K + 1.

Nothing here carries gradients; `vidworld.world.dynamics` does. Shapes: B batch, F new frames of a pass, N
tokens a frame, D width, H query heads, h key-value heads, W slots, d head dims, Q conditions of a frame.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.model.attention import Backend, attend, resolve_backend
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.dit import Block, CausalDiT, Stream
from vidworld.model.layers import compute_dtype
from vidworld.model.ring import Clock, Moment, RingCache
from vidworld.model.rope import Rotation, rotate
from vidworld.model.stream_blocks import StreamKernels, enter_time, project_time, run_out, run_space
from vidworld.types import Frames


@dataclass(frozen=True)
class Instant:
    """A `Moment` on the device, in buffers whose content moves on from frame to frame."""

    slot: Tensor
    """[1] int64."""
    turns: Tensor
    """[1 + W, d], d/2 cosines and d/2 sines: of the new frame, then of what each slot holds."""
    seen_1W: Tensor
    """Slots in sight, bool."""

    @property
    def query(self) -> Rotation:
        """Of the new frame, [1, d/2]."""
        return Rotation(*self.turns[:1].chunk(2, dim=-1))

    @property
    def key(self) -> Rotation:
        """Of what each slot holds, [W, d/2]."""
        return Rotation(*self.turns[1:].chunk(2, dim=-1))

    def copy_(self, other: "Instant") -> None:
        """Take over another's content."""
        self.slot.copy_(other.slot)
        self.turns.copy_(other.turns)
        self.seen_1W.copy_(other.seen_1W)


@dataclass(frozen=True)
class Slots:
    """One layer's keys and values [B * N, h, W, d], written in place."""

    key: Tensor
    """Not rotated."""
    value: Tensor
    rotated: Tensor | None
    """The keys, turned to where they stand in time now; missing where a kernel turns them as it reads."""


@dataclass(frozen=True)
class New:
    """What a time attention makes of the new frames."""

    query: Tensor
    """[B * N, H, F, d], turned."""
    key: Tensor
    """[B * N, h, F, d], not turned, as the slots keep it."""
    turned: Tensor
    value: Tensor


class StreamedDiT:
    """A network and the buffers of a rollout of B samples. Inference only.

    model: shared, not copied; its `nn.Linear` weights may be in half precision under autocast. dtype: of the
    keys and values kept. compiler: wraps each part of a block between two looks into the slots, such as
    `torch.compile`; blocks of a kind share what it makes. kernels: names of `StreamKernels` to run where they
    can.
    """

    def __init__(
        self,
        model: CausalDiT,
        clock: Clock,
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        kernels: Collection[str] = (),
    ) -> None:
        self.model, self.clock, self.batch = model, clock, batch
        parameter = next(model.parameters())
        self.device, self.wide = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        heads, config = model.config.num_kv_heads, model.config
        size = (batch * model.tokens_per_frame, heads, clock.window, config.head_dim)
        dtype = dtype or parameter.dtype
        self.kernels = StreamKernels.here(kernels, model, clock.window, dtype)

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        timed = [layer for layer in range(config.depth) if config.attends_time(layer)]
        self.slots = {
            layer: Slots(zeros(), zeros(), None if self.kernels.time else zeros()) for layer in timed
        }
        self.in_space = model.rotation(model.positions_N2, self.wide)
        self.num_frames = 0
        """Frames begun since the ring was loaded, the cached ones included."""
        self.moments = [self._instant(moment) for moment in clock.moments]
        self.now, self.before = self._instant(clock.at(0)), self._instant(clock.at(0))
        wrap = compiler or (lambda function: function)
        self._space, self._out = wrap(run_space), wrap(run_out)
        self._time_in, self._project = wrap(enter_time), wrap(project_time)
        self._turn, self._embed, self._predict = wrap(_turn), wrap(_embed), wrap(_predict)

    def load(self, cache: KVCache) -> None:
        """Take over a cache's frames; those beyond window - 1 leave, as they do before the next frame."""
        cache = cache.roll(self.clock.window - 1, self.clock.sink)
        self.num_frames = held = cache.num_frames
        for slots, layer in zip(self.slots.values(), cache.layers, strict=True):
            for own, given in ((slots.key, layer.key), (slots.value, layer.value)):
                own[:, :, :held].copy_(given.flatten(0, 1))
                own[:, :, held:].zero_()

    def cache(self) -> KVCache:
        """A copy of the committed frames."""
        layers = tuple(
            KeyValue(*(one.unflatten(0, (self.batch, -1)) for one in (slots.key, slots.value)))
            for slots in self.slots.values()
        )
        return RingCache(self.clock, layers, self.num_frames).to_cache()

    def begin(self) -> None:
        """Go on to the next frame: everything in sight becomes one older."""
        self.before.copy_(self.now)
        self.now.copy_(self.moments[self.clock.row(self.num_frames)])
        self.num_frames += 1

    def buffers(self) -> list[Tensor]:
        """All that passes change in place."""
        every = [one for slots in self.slots.values() for one in (slots.key, slots.value, slots.rotated)]
        return [one for one in every if one is not None]

    def modulation(self, conditions_BQD: Tensor) -> list[Tensor]:
        """What modulates each block, and last the heads, in all conditions of a frame: [B, Q, 1, parts D]."""
        active = F.silu(conditions_BQD)
        maps = [*(block.modulation for block in self._blocks()), self.model.head_modulation]
        return [one(active)[:, :, None] for one in maps]

    def __call__(
        self,
        frames: Frames,
        actions_BFkD: Tensor,
        embodiment_B: Tensor,
        modulation: list[Tensor],
        rows: slice,
        previous: Frames | None = None,
        *,
        commits: bool,
        first: bool,
        full: bool,
    ) -> Frames:
        """Predict the clean frames of `frames` [B, F], with `commits` those of all but the first.

        rows: of the conditions, those of the frames. With `commits` the first of them is the frame
        before, whose keys and values stay: once the last time attention has them, it is left alone. The
        others are versions of the frame now, which do not see each other. previous: the frame before each
        [B, F], as it was committed, with `previous_frame`. `first`: the first pass of a frame. `full`: all
        slots are in sight, now and before.
        """
        model = self.model
        x_BFND = self._embed(model, frames, actions_BFkD, embodiment_B, previous)
        space = model.space_axis(self.in_space, x_BFND, embodiment_B)
        backend = resolve_backend(model.config.attention, self.device, compute_dtype(x_BFND), 0)
        backend = "sdpa" if not full or backend == "flex" else backend
        counts = [*(block.num_parts for block in self._blocks()), 2]
        parts_of = [
            whole[:, rows].chunk(count, dim=-1) for whole, count in zip(modulation, counts, strict=True)
        ]
        turns_Fd = self._turns(x_BFND.shape[1], commits)
        stream: Tensor | Stream = x_BFND
        for layer, block in enumerate(self._blocks()):
            parts, mixed = parts_of[layer], None
            stream = self._space(block, stream, parts[:3], space, self.kernels)
            unread = commits and layer == max(self.slots)
            if layer in self.slots and self.kernels.time:
                stream, qkv_BFNY = self._project(block, stream, parts[3:5], self.kernels)
                mixed = self._attend_in_one(block, self.slots[layer], qkv_BFNY, commits, unread)
            elif layer in self.slots:
                stream, *new = self._time_in(block, stream, parts[3:5], turns_Fd, self.kernels)
                mixed = self._attend(self.slots[layer], New(*new), commits, first, full, backend, unread)
            if unread:
                assert isinstance(stream, Tensor)
                frames, stream = frames[:, 1:], stream[:, 1:]
                previous = None if previous is None else previous[:, 1:]
                if not frames.num_frames:
                    return frames
                parts_of = [tuple(part[:, 1:] for part in parts) for parts in parts_of]
                parts, space = parts_of[layer], model.space_axis(self.in_space, stream, embodiment_B)
            stream = self._out(block, stream, mixed, parts[5 if layer in self.slots else 3 :], self.kernels)
        return self._predict(model, stream, parts_of[-1], embodiment_B, frames, previous)

    def _turns(self, num_frames: int, commits: bool) -> Rotation:
        """Of each new frame [F, d/2]: the frame before if it commits, then versions of the frame now."""
        times = [self.before.query] * commits + [self.now.query] * (num_frames - commits)
        return Rotation(torch.cat([one.cos for one in times]), torch.cat([one.sin for one in times]))

    def _attend(
        self, slots: Slots, new: New, commits: bool, first: bool, full: bool, backend: Backend, unread: bool
    ) -> Tensor:
        """Each new frame in turn takes its slot and looks at all, the first not if `unread`; [G, H, F, d]."""
        mixed: list[Tensor] = []
        rotated = slots.rotated
        assert rotated is not None
        for index in range(new.query.shape[2]):
            at = slice(index, index + 1)
            committing = commits and index == 0
            moment = self.before if committing else self.now
            if committing:
                slots.key.index_copy_(2, moment.slot, new.key[:, :, at])
            elif first and index == int(commits):
                self._turn(rotated, slots.key, moment.key)
            rotated.index_copy_(2, moment.slot, new.turned[:, :, at])
            slots.value.index_copy_(2, moment.slot, new.value[:, :, at])
            if unread and not index:
                continue
            mask = None if full else moment.seen_1W
            mixed.append(attend(new.query[:, :, at], rotated, slots.value, mask, backend))
        return torch.cat(mixed, 2) if mixed else new.query[:, :, :0]

    def _attend_in_one(
        self, block: Block, slots: Slots, qkv_BFNY: Tensor, commits: bool, unread: bool
    ) -> Tensor:
        """The same from the projection on; [B, F, N, D]."""
        from vidworld.model.stream_kernels import ring_attention

        assert block.time is not None
        scales = block.time.query_scale_d, block.time.key_scale_d
        now, before = ((instant.slot, instant.turns, instant.seen_1W) for instant in (self.now, self.before))
        given = (qkv_BFNY, *scales, now, before, slots.key, slots.value)
        return ring_attention(*given, commits=commits, unread=unread)

    def _instant(self, moment: Moment) -> Instant:
        """A moment's numbers on the device."""
        positions = torch.tensor([[moment.position], *([one] for one in moment.positions_W)])
        turns = self.model.rotation(positions.to(self.device), self.wide)
        return Instant(
            torch.tensor([moment.slot], device=self.device),
            torch.cat(turns, -1),
            torch.tensor([moment.seen_W], device=self.device),
        )

    def _blocks(self) -> list[Block]:
        return [block for block in self.model.blocks if isinstance(block, Block)]


def _turn(rotated: Tensor, key: Tensor, rotation: Rotation) -> None:
    rotated.copy_(rotate(key, rotation))


def _embed(
    model: CausalDiT, frames: Frames, actions_BFkD: Tensor, embodiment_B: Tensor, previous: Frames | None
) -> Tensor:
    x_BFND = model.embed(frames, actions_BFkD, embodiment_B, previous)
    return x_BFND.to(compute_dtype(x_BFND)) if model.config.residual == "autocast" else x_BFND


def _predict(
    model: CausalDiT,
    stream: Tensor | Stream,
    parts: tuple[Tensor, ...],
    embodiment_B: Tensor,
    like: Frames,
    previous: Frames | None,
) -> Frames:
    """Clean frames in the dtypes of `like`."""
    prediction = model.predict(stream, parts, embodiment_B, previous)
    return Frames(
        prediction.latents_BTVChw.to(like.latents_BTVChw.dtype),
        prediction.proprio_BTS.to(like.proprio_BTS.dtype),
    )
