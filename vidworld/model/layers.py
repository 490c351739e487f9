"""Parts of a block: attention over one axis, and the gated MLP.

Shapes: B batch, G sequences attended alone, n their length, D width, H query heads, h key-value heads, d head
dims.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vidworld.model.attention import Backend, attend
from vidworld.model.cache import KeyValue
from vidworld.model.members import MemberLinear
from vidworld.model.rectangles import StreamSizes
from vidworld.model.rope import Rotation, rotate

if TYPE_CHECKING:
    from vidworld.model.config import DiTConfig

# `fused_attention` is for so few tokens and head dims: the gradients of two tiles of keys stay in registers,
# which they do not at head dims of 128.
SHORT_TOKENS, SHORT_DIMS = 128, 64
# `fused_attention_long` is for fewer than so many: on an H100 it saves passes that at 262 tokens took as long
# as cuDNN's gradient, but makes seven products of five. The one grows with n, the other with its square.
LONG_TOKENS = 512


class Axis(NamedTuple):
    """How one axis is attended: rotations of queries and keys, who sees whom, and by which backend."""

    query: Rotation
    key: Rotation
    mask: Tensor | BlockMask | StreamSizes | None
    backend: Backend


class SelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys, over one axis and an optional past."""

    def __init__(self, config: "DiTConfig") -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.fused = self.fused_attention = False
        """Whether to run the kernels of `fused`, and those of `fused_attention` where they pay."""
        members: dict[str, int] = {"members": config.members, "rank": config.member_rank}
        self.qkv = MemberLinear(config.width, sum(self.heads) * config.head_dim, **members)
        self.out = MemberLinear(config.width, config.width, **members)
        self.query_scale_d = nn.Parameter(torch.ones(config.head_dim))
        self.key_scale_d = nn.Parameter(torch.ones(config.head_dim))

    def forward(
        self,
        x_GnD: Tensor,
        axis: Axis,
        past: KeyValue | None = None,
        member_B: Tensor | None = None,
        *,
        commit: bool = True,
    ) -> tuple[Tensor, KeyValue | None]:
        """Returns the mixed tokens [G, n, D], and the new keys (not rotated) and values [G, h, n, d].

        Without `commit` the latter may be missing.
        """
        if past is None and not commit:
            if self.fused_attention and (inside := self._inside(x_GnD, axis)) is not None:
                mixed_GnD = inside(*self._operands(x_GnD, axis, member_B))[0]
                return self.out(mixed_GnD, member_B), None
            if self.fused:
                return self._fused_forward(x_GnD, axis, member_B), None
        q_GHnd, new = self.project(x_GnD, member_B)
        k_Ghnd, v_Ghnd = new if past is None else map(_join_time, past, new)
        mixed_GHnd = attend(
            rotate(q_GHnd, axis.query), rotate(k_Ghnd, axis.key), v_Ghnd, axis.mask, axis.backend
        )
        return self.join_heads(mixed_GHnd, member_B), new

    def _fused_forward(self, x_GnD: Tensor, axis: Axis, member_B: Tensor | None) -> Tensor:
        """The same in fewer passes over memory."""
        q_GHnd, k_Ghnd, v_Ghnd = torch.ops.vidworld.split_heads(*self._operands(x_GnD, axis, member_B))
        mixed_GHnd = attend(q_GHnd, k_Ghnd, v_Ghnd, axis.mask, axis.backend)
        return self.join_heads(mixed_GHnd, member_B)

    def _inside(self, x_GnD: Tensor, axis: Axis) -> Callable[..., tuple[Tensor, ...]] | None:
        """The kernel for attention inside sequences of this size, if all see all and it pays."""
        narrow = compute_dtype(x_GnD).itemsize == 2 or not x_GnD.is_cuda
        if axis.mask is not None or axis.backend != "sdpa" or not narrow:
            return None
        if not 16 <= x_GnD.shape[1] < LONG_TOKENS:
            return None
        if x_GnD.shape[1] < SHORT_TOKENS and self.head_dim <= SHORT_DIMS:
            return torch.ops.vidworld.short_attention
        return torch.ops.vidworld.long_attention

    def _operands(self, x_GnD: Tensor, axis: Axis, member_B: Tensor | None) -> tuple[Tensor | int, ...]:
        """What the kernels take: the projection, scales [2, d], angles [2, n, d], and numbers of heads."""
        scales_2d = torch.stack([self.query_scale_d, self.key_scale_d]).float()
        angles_2nd = torch.stack([torch.cat(rotation, dim=-1) for rotation in (axis.query, axis.key)]).float()
        return self.qkv(x_GnD, member_B), scales_2d, angles_2nd, *self.heads[:2]

    def project(self, x_GnD: Tensor, member_B: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        """Queries [G, H, n, d], keys and values [G, h, n, d]; normalised and not rotated."""
        heads = self.qkv(x_GnD, member_B).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_GHnd, k_Ghnd, v_Ghnd = heads.split(self.heads, dim=1)
        return _rms_norm(q_GHnd, self.query_scale_d), KeyValue(_rms_norm(k_Ghnd, self.key_scale_d), v_Ghnd)

    def join_heads(self, mixed_GHnd: Tensor, member_B: Tensor | None = None) -> Tensor:
        """What the heads found, as tokens [G, n, D]."""
        return self.out(mixed_GHnd.transpose(1, 2).flatten(2), member_B)


class SwiGLU(nn.Module):
    """The gated MLP of arXiv 2002.05202, eq. 6."""

    def __init__(self, config: "DiTConfig") -> None:
        super().__init__()
        members: dict[str, int] = {"members": config.members, "rank": config.member_rank}
        self.fused = False
        """Whether to run the kernels of `fused`."""
        self.gate_up = MemberLinear(config.width, 2 * config.mlp_hidden, **members)
        self.down = MemberLinear(config.mlp_hidden, config.width, **members)

    def forward(self, x: Tensor, member_B: Tensor | None = None) -> Tensor:
        if self.fused:
            return self.down(torch.ops.vidworld.swiglu(self.gate_up(x, member_B)), member_B)
        gate, up = self.gate_up(x, member_B).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, member_B)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (F.rms_norm(x, x.shape[-1:]) * weight).to(x.dtype)


def _join_time(past_Ghnd: Tensor, new_Ghnd: Tensor) -> Tensor:
    return torch.cat([past_Ghnd, new_Ghnd], dim=2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of `x` are computed in here, autocast or not."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
