"""The same network as most code bases would write it first, with the same weights and the same answers.

Eager; keys and values repeated for each query head; a dense mask given to sdpa; norms written out; shift,
scale and gate of a frame repeated for each of its tokens, as models with one noise level a token have them.
The matrix that makes them still runs once a frame: once a token, as some have it, would be slower yet.

`full` is another network of as many weights: every block attends over all tokens of all frames at once
through one dense frame-causal mask, as causal video transformers without factorised attention do.

Shapes: as in vidworld/model/dit.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.model.attention import dense_mask
from vidworld.model.cache import KeyValue
from vidworld.model.dit import Axis, Block, CausalDiT, Stream
from vidworld.model.inputs import FrameCausal, Streams
from vidworld.model.layers import SelfAttention
from vidworld.model.rope import Rotation


class NaiveAttention(SelfAttention):
    """Attention with a dense mask, heads repeated."""

    def forward(
        self,
        x_GnD: Tensor,
        axis: Axis,
        past: KeyValue | None = None,
        member_B: Tensor | None = None,
        *,
        commit: bool = True,
    ) -> tuple[Tensor, Any]:
        heads = self.qkv(x_GnD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        q = turn(norm(q) * self.query_scale_d, axis.query).to(v.dtype)
        k = turn(norm(k) * self.key_scale_d, axis.key).to(v.dtype)
        groups = self.heads[0] // self.heads[1]
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        mask: Any = axis.mask
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class NaiveBlock(Block):
    """A block that repeats what a frame is modulated by for each token."""

    full: Axis | None = None

    def forward(
        self,
        x_BTND: Tensor | Stream,
        condition_BTD: Tensor,
        space: Axis,
        time: Axis,
        past: KeyValue | None = None,
        commit: bool = False,
        member_B: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        assert past is None and not commit, "training only"  # noqa: PT018
        assert isinstance(x_BTND, Tensor), "no fused kernels"
        x: Tensor = x_BTND
        batch, frames, tokens, _ = x.shape
        per_frame = self.modulation(F.silu(condition_BTD))
        per_token = per_frame[:, :, None].repeat(1, 1, tokens, 1)
        parts = per_token.chunk(self.num_parts, dim=-1)

        h = modulated(x, *parts[:2])
        if self.full is not None:
            h, _ = self.space(h.flatten(1, 2), self.full)
            x = x + parts[2] * h.unflatten(1, (frames, tokens))
        else:
            h, _ = self.space(h.flatten(0, 1), space)
            x = x + parts[2] * h.unflatten(0, (batch, frames))
        if self.time is not None and self.full is None:
            h = modulated(x, *parts[3:5]).transpose(1, 2).flatten(0, 1)
            h, _ = self.time(h, time)
            x = x + parts[5] * h.unflatten(0, (batch, tokens)).transpose(1, 2)
        return x + parts[-1] * self.mlp(modulated(x, *parts[-3:-1])), None


def make_naive(
    model: CausalDiT, streams: Streams | None = None, device: torch.device | None = None
) -> CausalDiT:
    """Turn a model into its naive self in place; with `streams` into one of full attention on `device`."""
    axis = None
    if streams is not None:
        pattern = FrameCausal(streams, model.tokens_per_frame)
        positions = model.positions_N2.repeat(streams.num_queries, 1).to(device)
        rotation = model.rotation(positions, torch.float32)
        axis = Axis(rotation, rotation, dense_mask(pattern, device or torch.device("cpu")), "sdpa")
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = NaiveBlock
            module.full = axis  # type: ignore[attr-defined]
        elif isinstance(module, SelfAttention):
            module.__class__ = NaiveAttention
    return model


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale) + shift


def norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = torch.finfo(x.dtype).eps
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = (torch.cat([half, half], dim=-1) for half in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
