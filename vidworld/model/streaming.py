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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.model.attention import Backend, attend, resolve_backend
from vidworld.model.cache import KeyValue
from vidworld.model.dit import Axis, Block, CausalDiT, compute_dtype, modulate
from vidworld.model.ring import Clock, Moment, RingCache
from vidworld.model.rope import Rotation, rotate
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
    rotated: Tensor
    """The keys, turned to where they stand in time now."""


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
    `torch.compile`; blocks of a kind share what it makes.
    """

    def __init__(
        self,
        model: CausalDiT,
        clock: Clock,
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.model, self.clock, self.batch = model, clock, batch
        parameter = next(model.parameters())
        self.device, self.wide = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        heads, config = model.config.num_kv_heads, model.config
        size = (batch * model.tokens_per_frame, heads, clock.window, config.head_dim)
        dtype = dtype or parameter.dtype
        timed = [layer for layer in range(config.depth) if config.attends_time(layer)]
        self.slots = {
            layer: Slots(*(torch.zeros(size, dtype=dtype, device=self.device) for _ in range(3)))
            for layer in timed
        }
        self.in_space = model.rotation(model.positions_N2, self.wide)
        self.num_frames = 0
        """Frames begun since the ring was loaded, the cached ones included."""
        self.moments = [self._instant(moment) for moment in clock.moments]
        self.now, self.before = self._instant(clock.at(0)), self._instant(clock.at(0))
        wrap = compiler or (lambda function: function)
        self._space, self._time_in, self._out = wrap(_space), wrap(_time_in), wrap(_out)
        self._turn, self._embed, self._predict = wrap(_turn), wrap(_embed), wrap(_predict)

    def load(self, ring: RingCache) -> None:
        """Take over a ring's frames."""
        assert ring.clock == self.clock
        for slots, layer in zip(self.slots.values(), ring.layers, strict=True):
            slots.key.copy_(layer.key.flatten(0, 1))
            slots.value.copy_(layer.value.flatten(0, 1))
        self.num_frames = ring.num_frames

    def ring(self) -> RingCache:
        """A copy of the committed frames."""
        layers = tuple(
            KeyValue(*(one.clone().unflatten(0, (self.batch, -1)) for one in (slots.key, slots.value)))
            for slots in self.slots.values()
        )
        return RingCache(self.clock, layers, self.num_frames)

    def begin(self) -> None:
        """Go on to the next frame: everything in sight becomes one older."""
        self.before.copy_(self.now)
        self.now.copy_(self.moments[self.clock.row(self.num_frames)])
        self.num_frames += 1

    def buffers(self) -> list[Tensor]:
        """All that passes change in place."""
        return [one for slots in self.slots.values() for one in (slots.key, slots.value, slots.rotated)]

    def modulation(self, conditions_BQD: Tensor) -> list[tuple[Tensor, ...]]:
        """What modulates each block, and last the heads, for all conditions of a frame: [B, Q, 1, D] each."""
        active = F.silu(conditions_BQD)
        blocks: list[tuple[Tensor, ...]] = [
            block.modulation(active)[:, :, None].chunk(block.num_parts, dim=-1) for block in self._blocks()
        ]
        return [*blocks, self.model.head_modulation(active)[:, :, None].chunk(2, dim=-1)]

    def __call__(
        self,
        frames: Frames,
        actions_BFkD: Tensor,
        embodiment_B: Tensor,
        modulation: list[tuple[Tensor, ...]],
        rows: slice,
        *,
        commits: bool,
        first: bool,
        full: bool,
    ) -> Frames:
        """Predict the clean frames of `frames` [B, F].

        rows: of the conditions, those of the frames. With `commits` the first of them is the frame
        before, whose keys and values stay; the others are versions of the frame now, which do not see each
        other. `first`: the first pass of a frame. `full`: all slots are in sight, now and before.
        """
        model = self.model
        x_BFND = self._embed(model, frames, actions_BFkD, embodiment_B)
        if model.config.residual == "autocast":
            x_BFND = x_BFND.to(compute_dtype(x_BFND))
        space = model.space_axis(self.in_space, x_BFND, embodiment_B)
        backend = resolve_backend(model.config.attention, self.device, compute_dtype(x_BFND), 0)
        backend = "sdpa" if not full or backend == "flex" else backend
        parts_of = [tuple(part[:, rows] for part in parts) for parts in modulation]
        turns_Fd = self._turns(x_BFND.shape[1], commits)
        for layer, block in enumerate(self._blocks()):
            parts = parts_of[layer]
            x_BFND = self._space(block, x_BFND, parts[:3], space)
            if layer in self.slots:
                q, k, turned, v = self._time_in(block, x_BFND, parts[3:5], turns_Fd)
                new = New(q, k, turned, v)
                mixed = self._attend(self.slots[layer], new, commits, first, full, backend)
                x_BFND = self._out(block, x_BFND, mixed, parts[5:])
            else:
                x_BFND = self._out(block, x_BFND, None, parts[3:])
        return self._predict(model, x_BFND, parts_of[-1], embodiment_B, frames)

    def _turns(self, num_frames: int, commits: bool) -> Rotation:
        """Of each new frame [F, d/2]: the frame before if it commits, then versions of the frame now."""
        times = [self.before.query] * commits + [self.now.query] * (num_frames - commits)
        return Rotation(torch.cat([one.cos for one in times]), torch.cat([one.sin for one in times]))

    def _attend(
        self, slots: Slots, new: New, commits: bool, first: bool, full: bool, backend: Backend
    ) -> Tensor:
        """Each new frame in turn takes its slot and looks at all; [G, H, F, d]."""
        mixed: list[Tensor] = []
        for index in range(new.query.shape[2]):
            at = slice(index, index + 1)
            committing = commits and index == 0
            moment = self.before if committing else self.now
            if committing:
                slots.key.index_copy_(2, moment.slot, new.key[:, :, at])
            elif first and index == int(commits):
                self._turn(slots.rotated, slots.key, moment.key)
            slots.rotated.index_copy_(2, moment.slot, new.turned[:, :, at])
            slots.value.index_copy_(2, moment.slot, new.value[:, :, at])
            mask = None if full else moment.seen_1W
            mixed.append(attend(new.query[:, :, at], slots.rotated, slots.value, mask, backend))
        return torch.cat(mixed, 2) if len(mixed) > 1 else mixed[0]

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


def _space(block: Block, x_BFND: Tensor, parts: tuple[Tensor, ...], space: Axis) -> Tensor:
    shift, scale, gate = parts
    h_GnD, _ = block.space(modulate(x_BFND, shift, scale).flatten(0, 1), space)
    return x_BFND + gate * h_GnD.unflatten(0, x_BFND.shape[:2])


def _time_in(
    block: Block, x_BFND: Tensor, parts: tuple[Tensor, ...], turns_Fd: Rotation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turned queries [B * N, H, F, d]; keys, turned keys and values [B * N, h, F, d]."""
    assert block.time is not None
    shift, scale = parts
    q_GHFd, new = block.time.project(modulate(x_BFND, shift, scale).transpose(1, 2).flatten(0, 1))
    return rotate(q_GHFd, turns_Fd), new.key, rotate(new.key, turns_Fd), new.value


def _out(block: Block, x_BFND: Tensor, mixed_GHFd: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
    if mixed_GHFd is not None:
        assert block.time is not None
        h_GFD = block.time.join_heads(mixed_GHFd)
        x_BFND = x_BFND + parts[0] * h_GFD.unflatten(0, (x_BFND.shape[0], -1)).transpose(1, 2)
    shift, scale, gate = parts[-3:]
    return x_BFND + gate * block.mlp(modulate(x_BFND, shift, scale))


def _turn(rotated: Tensor, key: Tensor, rotation: Rotation) -> None:
    rotated.copy_(rotate(key, rotation))


def _embed(model: CausalDiT, frames: Frames, actions_BFkD: Tensor, embodiment_B: Tensor) -> Tensor:
    return model.token_embedding(model.unpadded(frames, embodiment_B), actions_BFkD, embodiment_B)


def _predict(
    model: CausalDiT, x_BFND: Tensor, parts: tuple[Tensor, ...], embodiment_B: Tensor, like: Frames
) -> Frames:
    """Clean frames in the dtypes of `like`."""
    prediction = model.predict(x_BFND, parts, embodiment_B)
    return Frames(
        prediction.latents_BTVChw.to(like.latents_BTVChw.dtype),
        prediction.proprio_BTS.to(like.proprio_BTS.dtype),
    )
