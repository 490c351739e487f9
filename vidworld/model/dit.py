"""The world model's network: a factorised space-time causal diffusion transformer.

Each frame is a set of tokens. Space attention mixes the tokens of one frame in every block; time attention
mixes each token with its own past in every `time_every`-th block. What a frame is conditioned on (signal
level, step size, actions, embodiment) modulates its tokens (AdaLN, arXiv 2212.09748, sec. 3.2). The network
predicts clean frames.

Shapes: B batch, T frames (all streams together), N tokens a frame, D width, G sequences attended alone, n
their length, H query heads, h key-value heads, d head dims.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidworld.errors import ConfigError
from vidworld.model.attention import Choice, choose_attention, prepare_mask, resolve_backend
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.config import DiTConfig
from vidworld.model.embed import (
    ActionEmbedding,
    ConditionEmbedding,
    EmbodimentLinear,
    TokenEmbedding,
    frames_before,
    patch_positions,
    unpatchify,
)
from vidworld.model.embodiments import used_latents, used_tokens
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.model.layers import Axis, SelfAttention, SwiGLU, compute_dtype
from vidworld.model.rope import Rotation, axial_rotation
from vidworld.model.sequence import SequenceGroup, frames_of, gather_frames, to_all_frames, to_all_tokens
from vidworld.types import Frames, SignalLevel

CLOSED = -4.0
"""Bias of a copy gate at first: it copies 2 %, so that weights from before nearly mean what they meant."""


class Stream(NamedTuple):
    """A residual stream whose last branch is still to be added: x + gate y."""

    x_BTND: Tensor
    y_BTND: Tensor
    gate_BT1D: Tensor

    def joined(self) -> Tensor:
        """The sum [B, T, N, D]."""
        return self.x_BTND + self.gate_BT1D * self.y_BTND


class Block(nn.Module):
    """Space attention, time attention in some blocks, and an MLP; modulated and gated per frame.

    The gates start at zero, so that every block starts as the identity. Takes and returns tensors only, so
    that it compiles into one graph.
    """

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        self.sequence: SequenceGroup | None = None
        self.fused = False
        """Whether to run the kernels of `fused_residual`, and leave the last addition to the next reader."""
        self.space = SelfAttention(config)
        self.time = SelfAttention(config) if config.attends_time(layer) else None
        self.mlp = SwiGLU(config)
        self.num_parts = 3 * (2 if self.time is None else 3)
        outputs, rank = self.num_parts * config.width, config.modulation_rank
        self.modulation = nn.Linear(rank or config.width, outputs)
        if rank:
            self.modulation = nn.Sequential(nn.Linear(config.width, rank, bias=False), self.modulation)

    def forward(
        self,
        x_BTND: "Tensor | Stream",
        condition_BTD: Tensor,
        space: Axis,
        time: Axis,
        past: KeyValue | None = None,
        commit: bool = False,
        member_B: Tensor | None = None,
    ) -> tuple["Tensor | Stream", KeyValue | None]:
        """Returns the tokens and, from a block with time attention if `commit`, its new keys and values."""
        parts = self.modulate_by(condition_BTD)

        shift, scale, gate = parts[:3]
        x_BTND, h_BTND = read(x_BTND, shift, scale, fused=self.fused)
        batch, frames, tokens, _ = x_BTND.shape
        h_GnD, _ = self.space(h_BTND.flatten(0, 1), space, member_B=member_B, commit=False)
        stream = Stream(x_BTND, h_GnD.unflatten(0, (batch, frames)), gate)

        new = None
        if self.time is not None:
            shift, scale, gate = parts[3:6]
            by_token = self.sequence is None
            x_BTND, h_BTND = read(stream, shift, scale, fused=self.fused, by_token=by_token)
            if self.sequence is not None:
                h_BTND = to_all_frames(h_BTND, self.sequence)
            h_GnD = h_BTND.transpose(1, 2).flatten(0, 1)
            if past is not None:
                past = KeyValue(past.key.flatten(0, 1), past.value.flatten(0, 1))
            h_GnD, new = self.time(h_GnD, time, past, member_B, commit=commit)
            h_BTND = h_GnD.unflatten(0, (batch, -1)).transpose(1, 2)
            if self.sequence is not None:
                h_BTND = to_all_tokens(h_BTND, tokens, self.sequence)
            stream = Stream(x_BTND, h_BTND, gate)
            new = (
                KeyValue(*(tensor.unflatten(0, (batch, tokens)) for tensor in new))
                if new is not None and commit
                else None
            )

        shift, scale, gate = parts[-3:]
        x_BTND, h_BTND = read(stream, shift, scale, fused=self.fused)
        stream = Stream(x_BTND, self.mlp(h_BTND, member_B), gate)
        return (stream if self.fused else stream.joined()), new

    def modulate_by(self, condition_BTD: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate [B, T, 1, D] of space attention, of time attention if any, and of the MLP."""
        return self.modulation(F.silu(condition_BTD))[:, :, None].chunk(self.num_parts, dim=-1)


class CausalDiT(nn.Module):
    """Predicts clean frames from noisy ones, each with its own signal level, seeing only the past.

    >>> model = CausalDiT(DiTConfig(width=32, depth=4, num_heads=2), FrameShape(1, 4, 4, 4, 3, 2))
    >>> sum(p.numel() for p in model.parameters()) > 0
    True
    """

    positions_N2: Tensor
    used_tokens_EN: Tensor | None
    """Tokens that belong to each embodiment; None where none is padded, and then nothing is masked."""
    used_latents_EV1hw: Tensor | None

    def __init__(self, config: DiTConfig, shape: FrameShape) -> None:
        super().__init__()
        sizes = [(shape.height, shape.width), *(shape.grid(e)[1:] for e in range(shape.num_embodiments))]
        for height, width in sizes:
            if height % config.patch_size or width % config.patch_size:
                raise ConfigError(
                    "latent size",
                    got=f"{height}x{width}",
                    expected=f"a multiple of patch_size = {config.patch_size}",
                )
        self.config, self.shape = config, shape
        self.sequence: SequenceGroup | None = None
        self.checkpoint_blocks = False
        width = config.width
        self.action_embedding = ActionEmbedding(shape, width)
        self.token_embedding = TokenEmbedding(
            shape, width, config.patch_size, config.num_registers, previous_frame=config.previous_frame
        )
        self.condition_embedding = ConditionEmbedding(shape, width, config.noise_dims)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.patch_head = nn.Linear(width, shape.channels * config.patch_size**2)
        self.copy_head = nn.Linear(width, self.patch_head.out_features) if config.copy_gate else None
        self.proprio_head = EmbodimentLinear(
            shape.num_embodiments, width, shape.proprio_dims, used_out=shape.embodiment_proprio_dims
        )
        # Integers, so that a change of the model's dtype cannot round them.
        num_special = 1 + shape.actions_per_frame + config.num_registers
        positions_N2 = patch_positions(shape, config.patch_size, num_special)
        self.register_buffer("positions_N2", positions_N2, persistent=False)
        self.num_patches = len(positions_N2) - num_special
        padded = shape.is_padded
        tokens_EN = used_tokens(shape, config.patch_size, num_special) if padded else None
        self.register_buffer("used_tokens_EN", tokens_EN, persistent=False)
        self.register_buffer("used_latents_EV1hw", used_latents(shape) if padded else None, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Blocks start as the identity and heads at zero, so the first prediction is the mean of the data.

        Matrices keep the scale of what passes through them: std 1 / sqrt(inputs).
        """
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if name.startswith("modulation.") and not name.startswith("modulation.0."):
                    nn.init.zeros_(parameter)
                elif parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for head in (self.head_modulation, self.patch_head, self.proprio_head):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        if self.copy_head is not None:
            nn.init.zeros_(self.copy_head.weight)
            nn.init.constant_(self.copy_head.bias, CLOSED)

    @property
    def tokens_per_frame(self) -> int:
        """Patches of all views, proprioception, actions and registers."""
        return len(self.positions_N2)

    def forward(
        self,
        frames: Frames,
        level: SignalLevel,
        step_BT: Tensor,
        conditioning: Conditioning,
        *,
        streams: Streams,
        cache: KVCache | None = None,
        commit: bool = False,
    ) -> tuple[Frames, KVCache | None]:
        """Predict the clean frames of `frames`, in the dtype they came in.

        frames, level [B, T], step_BT and conditioning share the time axis that `streams` describes. With a
        `cache` they come after the cached frames. With `commit` the extended cache is returned (only the
        context stream is kept), else None.
        """
        streams = replace(streams, past=0 if cache is None else cache.num_frames)
        assert frames.num_frames == streams.num_queries, (frames.num_frames, streams)
        previous = newest = None
        if self.config.previous_frame:
            previous = frames_before(frames, streams, None if cache is None else cache.newest)
            newest = frames[:, streams.context - 1 : streams.context]
        if self.sequence is not None:
            assert cache is None, "a cache is not cut across ranks"
            assert not commit, "a cache is not cut across ranks"
            mine = (slice(None), frames_of(self.sequence, streams.num_queries))
            frames, level, step_BT = frames[mine], level[mine], step_BT[mine]
            previous = None if previous is None else previous[mine]
            conditioning = conditioning.frames(mine[1])
        actions_BTkD = self.action_embedding(conditioning)
        x_BTND = self.embed(frames, actions_BTkD, conditioning.embodiment_B, previous)
        condition_BTD = self.condition_embedding(level, step_BT, actions_BTkD, conditioning)
        if self.config.residual == "autocast":
            x_BTND = x_BTND.to(compute_dtype(x_BTND))

        space, time = self._axes(streams, x_BTND, conditioning.embodiment_B)
        committed: list[KeyValue] = []
        past = iter(() if cache is None else cache.layers)
        for block in self.blocks:
            of_block = next(past, None) if block.time is not None else None
            given = (x_BTND, condition_BTD, space, time, of_block, commit, conditioning.member_B)
            x_BTND, new = self._run(block, *given)
            if new is not None:
                committed.append(KeyValue(*(tensor[:, :, :, : streams.context] for tensor in new)))

        parts = self.modulate_head_by(condition_BTD)
        prediction = self.predict(x_BTND, parts, conditioning.embodiment_B, previous)
        prediction = prediction.map(lambda output, like: output.to(like.dtype), frames)
        if (group := self.sequence) is not None:
            prediction = prediction.map(lambda output: gather_frames(output, group))
        if not commit:
            return prediction, None
        return prediction, cache.append(committed, newest) if cache else KVCache(tuple(committed), newest)

    def embed(
        self, frames: Frames, actions_BTkD: Tensor, embodiment_B: Tensor, previous: Frames | None
    ) -> Tensor:
        """Tokens [B, T, N, D] of frames, and of those before them where the model reads them."""
        before = None if previous is None else self.unpadded(previous, embodiment_B)
        return self.token_embedding(self.unpadded(frames, embodiment_B), actions_BTkD, embodiment_B, before)

    def time_attention(self, streams: Streams, device: torch.device, dtype: torch.dtype) -> Choice:
        """The backend that time attention will use here, and why."""
        size = streams.num_queries * streams.num_keys
        return choose_attention(self.config.attention, device, dtype, size)

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[Tensor | Stream, KeyValue | None]:
        """Run a block, and with `checkpoint_blocks` keep only its inputs for the backward pass."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # No dropout in a block, so there is no random state to keep either.
            output: Any = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            return output
        return block(*inputs)

    def unpadded(self, frames: Frames, embodiment_B: Tensor) -> Frames:
        """Zeros for all latents that pad an embodiment's pictures; no gradient comes from there."""
        if self.used_latents_EV1hw is None:
            return frames
        used_B1V1hw = self.used_latents_EV1hw[embodiment_B][:, None]
        return Frames(frames.latents_BTVChw.where(used_B1V1hw, 0), frames.proprio_BTS)

    def _space_mask(self, num_frames: int, embodiment_B: Tensor) -> Tensor | None:
        """Who is seen in space [B * T, 1, 1, N]: no token sees one that pads an embodiment's pictures."""
        if self.used_tokens_EN is None:
            return None
        return self.used_tokens_EN[embodiment_B].repeat_interleave(num_frames, 0)[:, None, None]

    def _axes(self, streams: Streams, x_BTND: Tensor, embodiment_B: Tensor) -> tuple[Axis, Axis]:
        """How space and time are attended in this pass; shared by all blocks."""
        device = x_BTND.device
        mask_size = streams.num_queries * streams.num_keys
        backend = resolve_backend(self.config.attention, device, compute_dtype(x_BTND), mask_size)
        time = Axis(
            self.rotation(streams.query_positions(device)[:, None], x_BTND.dtype),
            self.rotation(streams.key_positions(device)[:, None], x_BTND.dtype),
            prepare_mask(streams, backend, device),
            backend,
        )
        return self.space_axis(self.rotation(self.positions_N2, x_BTND.dtype), x_BTND, embodiment_B), time

    def space_axis(self, in_space: Rotation, x_BTND: Tensor, embodiment_B: Tensor) -> Axis:
        """How the tokens of a frame attend each other, turned by their `positions_N2`."""
        mask = self._space_mask(x_BTND.shape[1], embodiment_B)
        # A mask of its own for each row is a tensor, which flex would make a new block mask of in every step.
        backend = "sdpa" if mask is not None else self.config.attention
        backend = resolve_backend(backend, x_BTND.device, compute_dtype(x_BTND), 0)
        return Axis(in_space, in_space, mask, backend)

    def rotation(self, positions_NP: Tensor, dtype: torch.dtype) -> Rotation:
        """How heads are turned by positions of P axes."""
        return axial_rotation(positions_NP, self.config.head_dim, dtype)

    def modulate_head_by(self, condition_BTD: Tensor) -> tuple[Tensor, ...]:
        """Shift and scale [B, T, 1, D] of what the heads read."""
        return self.head_modulation(F.silu(condition_BTD))[:, :, None].chunk(2, dim=-1)

    def predict(
        self,
        x_BTND: Tensor | Stream,
        parts: tuple[Tensor, ...],
        embodiment_B: Tensor,
        previous: Frames | None,
    ) -> Frames:
        """Clean frames [B, T] read off the tokens [B, T, N, D], and by the gate off `previous`.

        previous: the frame before each [B, T], as the context shows it; for models with `copy_gate`.
        """
        _, x_BTND = read(x_BTND, *parts, fused=isinstance(x_BTND, Stream))
        patches_BTMP = self.patch_head(x_BTND[:, :, : self.num_patches])
        proprio_BTS = self.proprio_head(x_BTND[:, :, self.num_patches], embodiment_B)
        latents_BTVChw = self._unpatchified(patches_BTMP)
        if self.copy_head is not None:
            assert previous is not None
            # In the precision of the frames: what rests is copied hundreds of times.
            copied_BTVChw = previous.latents_BTVChw
            gate_BTVChw = self._unpatchified(self.copy_head(x_BTND[:, :, : self.num_patches]))
            gate_BTVChw = gate_BTVChw.to(copied_BTVChw).sigmoid()
            latents_BTVChw = torch.lerp(latents_BTVChw.to(copied_BTVChw), copied_BTVChw, gate_BTVChw)
        frames = Frames(latents_BTVChw, proprio_BTS)
        return self.unpadded(frames, embodiment_B)

    def _unpatchified(self, patches_BTMP: Tensor) -> Tensor:
        patches_BTVnP = patches_BTMP.unflatten(2, (self.shape.views, -1))
        return unpatchify(patches_BTVnP, self.shape, self.config.patch_size)


def read(
    stream: Tensor | Stream, shift_BT1D: Tensor, scale_BT1D: Tensor, *, fused: bool, by_token: bool = False
) -> tuple[Tensor, Tensor]:
    """The stream with all that was to be added, and what a branch reads of it.

    By `fused`, in one kernel, which lays what is read out as [B, N, T, D] in memory with `by_token`.
    """
    if isinstance(stream, Tensor):
        return stream, modulate(stream, shift_BT1D, scale_BT1D)
    if fused:
        x, h, _ = torch.ops.vidworld.add_modulate(*stream, shift_BT1D, scale_BT1D, by_token)
        return x, h
    x_BTND = stream.joined()
    return x_BTND, modulate(x_BTND, shift_BT1D, scale_BT1D)


def modulate(x_BTND: Tensor, shift_BT1D: Tensor, scale_BT1D: Tensor) -> Tensor:
    """Normalise without weights of its own, then scale and shift by the frame's condition."""
    return F.rms_norm(x_BTND, x_BTND.shape[-1:]) * (1 + scale_BT1D) + shift_BT1D
