"""Parts of a block in a rollout, between two looks into the slots, with the Triton kernels that run there.

Shapes: B batch, F new frames of a pass, N tokens a frame, G = B F sequences or B N, n their length, D width,
H query heads, h key-value heads, d head dims, Y = (H + 2 h) d.
"""

import os
from collections.abc import Collection
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidworld.model.dit import Axis, Block, CausalDiT, Stream, read
from vidworld.model.fp8 import Fp8Linear, Scaled
from vidworld.model.layers import SwiGLU
from vidworld.model.rope import Rotation, rotate


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
        import vidworld.model.fp8_kernels
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


def run_space(
    block: Block, stream: Tensor | Stream, parts: tuple[Tensor, ...], space: Axis, kernels: StreamKernels
) -> Tensor | Stream:
    shift, scale, gate = parts
    layer = block.space
    if kernels.space:
        x_BFND, h_BFND = _read(stream, shift, scale, kernels, layer.qkv)
        qkv_GnY = layer.qkv(h_BFND).flatten(0, 1)
        scales = layer.query_scale_d, layer.key_scale_d
        h_GnD = layer.out(
            torch.ops.vidworld.frame_attention(qkv_GnY, *scales, *space.query, *layer.heads[:2])
        )
    else:
        x_BFND, h_BFND = read(stream, shift, scale, fused=kernels.residual)
        h_GnD, _ = layer(h_BFND.flatten(0, 1), space)
    return _add(x_BFND, h_GnD.unflatten(0, x_BFND.shape[:2]), gate, kernels)


def project_time(
    block: Block, stream: Tensor | Stream, parts: tuple[Tensor, ...], kernels: StreamKernels
) -> tuple[Tensor, Tensor]:
    """The stream, and queries, keys and values [B, F, N, Y] as the time attention's matrix gives them."""
    assert block.time is not None
    shift, scale = parts
    x_BFND, h_BFND = _read(stream, shift, scale, kernels, block.time.qkv)
    return x_BFND, block.time.qkv(h_BFND)


def enter_time(
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


def run_out(
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
    x_BFND, h_BFND = _read(stream, shift, scale, kernels, block.mlp.gate_up if kernels.mlp else None)
    return _add(x_BFND, _mlp(block.mlp, h_BFND) if kernels.mlp else block.mlp(h_BFND), gate, kernels)


def _mlp(mlp: SwiGLU, h_BFND: Tensor | Scaled) -> Tensor:
    hidden = mlp.gate_up(h_BFND)
    if isinstance(mlp.down, Fp8Linear):
        return mlp.down(Scaled(*torch.ops.vidworld.swiglu_fp8(hidden)))
    return mlp.down(torch.ops.vidworld.swiglu(hidden))


def _read(
    stream: Tensor | Stream, shift: Tensor, scale: Tensor, kernels: StreamKernels, reader: nn.Module | None
) -> tuple[Tensor, Tensor | Scaled]:
    """The stream, and what is read of it, as `reader` wants it."""
    if kernels.residual and isinstance(stream, Stream) and isinstance(reader, Fp8Linear):
        x_BFND, *h = torch.ops.vidworld.add_modulate_fp8(*stream, shift, scale)
        return x_BFND, Scaled(*h)
    return read(stream, shift, scale, fused=kernels.residual)


def _add(x_BFND: Tensor, h_BFND: Tensor, gate: Tensor, kernels: StreamKernels) -> Tensor | Stream:
    """A gated branch; kernels leave the addition to the next reader."""
    stream = Stream(x_BFND, h_BFND, gate)
    return stream if kernels.residual else stream.joined()
