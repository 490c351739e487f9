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

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.model.attention import Backend, attend, resolve_backend
from vidworld.model.cache import KeyValue
from vidworld.model.dit import Axis, Block, CausalDiT, Stream, read
from vidworld.model.layers import compute_dtype
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


class StreamKernels(NamedTuple):
    """Which Triton kernels a rollout runs; the numbers are those of the plain code but for rounding."""

    space: bool = False
    """Attention in a frame, from the projection to the mixed heads (`stream_kernels`)."""
    time: bool = False
    """Attention to the slots, likewise; keys are turned as they are read."""
    mlp: bool = False
    """The SwiGLU of `fused`."""
    residual: bool = False
    """Adding a branch, the norm and the modulation at once (`fused_residual`)."""

    @classmethod
    def here(
        cls, names: Collection[str], model: CausalDiT, window: int, dtype: torch.dtype
    ) -> "StreamKernels":
        """Those of `names` that run here: on CUDA, as far as the sizes of heads and slots allow."""
        on_gpu = next(model.parameters()).is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
        if not names or not on_gpu or find_spec("triton") is None or dtype == torch.float64:
            return cls()
        import vidworld.model.fused
        import vidworld.model.fused_residual  # noqa: F401
        from vidworld.model.stream_kernels import MOST_SLOTS

        half = model.config.head_dim // 2
        heads = half >= 16 and half & (half - 1) == 0
        # Padded frames hide tokens from each other, which the kernel knows nothing of.
        return cls(
            "space" in names and heads and model.used_tokens_EN is None,
            "time" in names and heads and window <= MOST_SLOTS,
            "mlp" in names,
            "residual" in names,
        )


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
        self._space, self._out = wrap(_space), wrap(_out)
        self._time_in, self._project = wrap(_time_in), wrap(_project)
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
        """Predict the clean frames of `frames` [B, F].

        rows: of the conditions, those of the frames. With `commits` the first of them is the frame
        before, whose keys and values stay; the others are versions of the frame now, which do not see each
        other. previous: the frame before each [B, F], as it was committed, with `previous_frame`. `first`:
        the first pass of a frame. `full`: all slots are in sight, now and before.
        """
        model = self.model
        x_BFND = self._embed(model, frames, actions_BFkD, embodiment_B, previous)
        if model.config.residual == "autocast":
            x_BFND = x_BFND.to(compute_dtype(x_BFND))
        space = model.space_axis(self.in_space, x_BFND, embodiment_B)
        backend = resolve_backend(model.config.attention, self.device, compute_dtype(x_BFND), 0)
        backend = "sdpa" if not full or backend == "flex" else backend
        counts = [*(block.num_parts for block in self._blocks()), 2]
        parts_of = [
            self._of_pass(whole, rows).chunk(count, dim=-1)
            for whole, count in zip(modulation, counts, strict=True)
        ]
        turns_Fd = self._turns(x_BFND.shape[1], commits)
        stream: Tensor | Stream = x_BFND
        for layer, block in enumerate(self._blocks()):
            parts, mixed = parts_of[layer], None
            stream = self._space(block, stream, parts[:3], space, self.kernels)
            if layer in self.slots and self.kernels.time:
                stream, qkv_BFNY = self._project(block, stream, parts[3:5], self.kernels)
                mixed = self._attend_in_one(block, self.slots[layer], qkv_BFNY, commits)
            elif layer in self.slots:
                stream, *new = self._time_in(block, stream, parts[3:5], turns_Fd, self.kernels)
                mixed = self._attend(self.slots[layer], New(*new), commits, first, full, backend)
            stream = self._out(block, stream, mixed, parts[5 if layer in self.slots else 3 :], self.kernels)
        return self._predict(model, stream, parts_of[-1], embodiment_B, frames, previous)

    def _of_pass(self, whole_BQ1P: Tensor, rows: slice) -> Tensor:
        """The conditions of a pass; for kernels, with one stride over the frames of all samples."""
        if not self.kernels.residual:
            return whole_BQ1P[:, rows]
        return whole_BQ1P[0, rows][None] if self.batch == 1 else whole_BQ1P[:, rows].contiguous()

    def _turns(self, num_frames: int, commits: bool) -> Rotation:
        """Of each new frame [F, d/2]: the frame before if it commits, then versions of the frame now."""
        times = [self.before.query] * commits + [self.now.query] * (num_frames - commits)
        return Rotation(torch.cat([one.cos for one in times]), torch.cat([one.sin for one in times]))

    def _attend(
        self, slots: Slots, new: New, commits: bool, first: bool, full: bool, backend: Backend
    ) -> Tensor:
        """Each new frame in turn takes its slot and looks at all; [G, H, F, d]."""
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
            mask = None if full else moment.seen_1W
            mixed.append(attend(new.query[:, :, at], rotated, slots.value, mask, backend))
        return torch.cat(mixed, 2) if len(mixed) > 1 else mixed[0]

    def _attend_in_one(self, block: Block, slots: Slots, qkv_BFNY: Tensor, commits: bool) -> Tensor:
        """The same from the projection on; [B, F, N, D]."""
        from vidworld.model.stream_kernels import ring_attention

        assert block.time is not None
        scales = block.time.query_scale_d, block.time.key_scale_d
        now, before = ((instant.slot, instant.turns, instant.seen_1W) for instant in (self.now, self.before))
        return ring_attention(qkv_BFNY, *scales, now, before, slots.key, slots.value, commits=commits)

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


def _space(
    block: Block, stream: Tensor | Stream, parts: tuple[Tensor, ...], space: Axis, kernels: StreamKernels
) -> Tensor | Stream:
    shift, scale, gate = parts
    x_BFND, h_BFND = read(stream, shift, scale, fused=kernels.residual)
    h_GnD = h_BFND.flatten(0, 1)
    if kernels.space:
        layer = block.space
        scales = layer.query_scale_d, layer.key_scale_d
        mixed = torch.ops.vidworld.frame_attention(layer.qkv(h_GnD), *scales, *space.query, *layer.heads[:2])
        h_GnD = layer.out(mixed)
    else:
        h_GnD, _ = block.space(h_GnD, space)
    return _add(x_BFND, h_GnD.unflatten(0, x_BFND.shape[:2]), gate, kernels)


def _project(
    block: Block, stream: Tensor | Stream, parts: tuple[Tensor, ...], kernels: StreamKernels
) -> tuple[Tensor, Tensor]:
    """The stream, and queries, keys and values [B, F, N, Y] as the time attention's matrix gives them."""
    assert block.time is not None
    x_BFND, h_BFND = read(stream, *parts, fused=kernels.residual)
    return x_BFND, block.time.qkv(h_BFND)


def _time_in(
    block: Block,
    stream: Tensor | Stream,
    parts: tuple[Tensor, ...],
    turns_Fd: Rotation,
    kernels: StreamKernels,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The stream; turned queries [B * N, H, F, d]; keys, turned keys and values [B * N, h, F, d]."""
    assert block.time is not None
    x_BFND, h_BFND = read(stream, *parts, fused=kernels.residual)
    q_GHFd, new = block.time.project(h_BFND.transpose(1, 2).flatten(0, 1))
    return x_BFND, rotate(q_GHFd, turns_Fd), new.key, rotate(new.key, turns_Fd), new.value


def _out(
    block: Block,
    stream: Tensor | Stream,
    mixed: Tensor | None,
    parts: tuple[Tensor, ...],
    kernels: StreamKernels,
) -> Tensor | Stream:
    """The rest of a block. mixed, by time attention: [B, F, N, D] of the kernel, else [B * N, H, F, d]."""
    if mixed is not None:
        assert block.time is not None
        assert isinstance(stream, Tensor)
        if kernels.time:
            h_BFND = block.time.out(mixed)
        else:
            h_GFD = block.time.join_heads(mixed)
            h_BFND = h_GFD.unflatten(0, (stream.shape[0], -1)).transpose(1, 2)
        stream = _add(stream, h_BFND, parts[0], kernels)
    shift, scale, gate = parts[-3:]
    x_BFND, h_BFND = read(stream, shift, scale, fused=kernels.residual)
    mlp = block.mlp
    if kernels.mlp:
        return _add(x_BFND, mlp.down(torch.ops.vidworld.swiglu(mlp.gate_up(h_BFND))), gate, kernels)
    return _add(x_BFND, mlp(h_BFND), gate, kernels)


def _add(x_BFND: Tensor, h_BFND: Tensor, gate: Tensor, kernels: StreamKernels) -> Tensor | Stream:
    """A gated branch; kernels leave the addition to the next reader."""
    stream = Stream(x_BFND, h_BFND, gate)
    return stream if kernels.residual else stream.joined()


def _turn(rotated: Tensor, key: Tensor, rotation: Rotation) -> None:
    rotated.copy_(rotate(key, rotation))


def _embed(
    model: CausalDiT, frames: Frames, actions_BFkD: Tensor, embodiment_B: Tensor, previous: Frames | None
) -> Tensor:
    return model.embed(frames, actions_BFkD, embodiment_B, previous)


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
