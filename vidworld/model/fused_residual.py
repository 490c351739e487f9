"""Triton kernels for the residual stream: add a gated branch, normalise, modulate; and the gradients of all.

Per-frame sums (the gradients of shift, scale and gate) run down the tokens and the norm's run along the
width, so a compiler reads everything twice. Here a program holds whole tokens of a frame and sums both ways.
Import it only where `triton` is installed.

Shapes: B batch, T frames, N tokens a frame, D width, C chunks of a frame's tokens.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from vidworld.model.fused import EPS

CHUNK = 36
"""Tokens that a program takes at most, one small tile after another."""
TILE = 2048
"""Numbers in a tile."""
FULL_GPU = 528
"""Programs of the forward pass, four for each multiprocessor of an H100; with fewer, chunks are cut finer."""


@triton.jit
def _rounded_to_fp8(row):
    """Rows as they are stored in e4m3, and their scales: as in `fp8.quantise`."""
    peak = tl.maximum(tl.max(tl.abs(row), 1)[:, None], 1e-12)
    return tl.minimum(tl.maximum(row * (448.0 / peak), -448.0), 448.0), peak * (1 / 448.0)


@triton.jit
def _forward_kernel(
    x, y, gate, shift, scale, out, h, factors,
    x_batch, x_frame, x_token, y_batch, y_frame, y_token, h_batch, h_frame, h_token,
    gate_batch, gate_frame, shift_batch, shift_frame, scale_batch, scale_frame,
    num_frames, num_tokens, chunks, width,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    frame = (tl.program_id(0) // chunks).to(tl.int64)
    begin = (tl.program_id(0) % chunks) * CHUNK
    batch, time = frame // num_frames, frame % num_frames
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    of_gate, of_shift = batch * gate_batch + time * gate_frame, batch * shift_batch + time * shift_frame
    of_scale = batch * scale_batch + time * scale_frame
    gates = tl.load(gate + of_gate + column, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + of_shift + column, mask=inside, other=0.0).to(tl.float32)
    scales = 1 + tl.load(scale + of_scale + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, CHUNK, ROWS):
        token = begin + start + tl.arange(0, ROWS)[:, None]
        live = (token < num_tokens) & (start + tl.arange(0, ROWS)[:, None] < CHUNK)
        mask = live & inside
        row = frame * num_tokens + token
        added = tl.load(y + batch * y_batch + time * y_frame + token * y_token + column, mask=mask, other=0.0)
        wide = tl.load(x + batch * x_batch + time * x_frame + token * x_token + column, mask=mask, other=0.0)
        wide = wide.to(tl.float32)
        # What the norm sees is what the stream holds.
        wide = (wide + gates * added.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row * width + column, wide, mask=mask)
        wide = wide.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / width + EPS)
        read = wide * factor * scales + shifts
        if FP8:
            read, factor = _rounded_to_fp8(read)
        tl.store(factors + row, factor, mask=live)
        tl.store(
            h + batch * h_batch + time * h_frame + token * h_token + column,
            read.to(h.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def _backward_kernel(
    grad_out, grad_h, out, factors, y, gate, scale, grad_x, grad_y, sums,
    g_batch, g_frame, g_token, y_batch, y_frame, y_token, d_batch, d_frame, d_token, gate_row, scale_row,
    num_frames, num_tokens, chunks, width, sums_row,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    frame, begin = program // chunks, (program % chunks) * CHUNK
    batch, time = frame // num_frames, frame % num_frames
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    gates = tl.load(gate + frame * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    scales = 1 + tl.load(scale + frame * scale_row + column, mask=inside, other=0.0).to(tl.float32)
    of_shift = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_scale = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, CHUNK, ROWS):
        token = begin + start + tl.arange(0, ROWS)[:, None]
        live = (token < num_tokens) & (start + tl.arange(0, ROWS)[:, None] < CHUNK)
        mask = live & inside
        row = frame * num_tokens + token
        # All loads before the sums along the width, whose barriers would hold them back.
        factor = tl.load(factors + row, mask=live, other=0.0)
        wide = tl.load(out + row * width + column, mask=mask, other=0.0)
        read = tl.load(
            grad_h + batch * g_batch + time * g_frame + token * g_token + column, mask=mask, other=0.0
        )
        grad = tl.load(grad_out + row * width + column, mask=mask, other=0.0)
        added = tl.load(y + batch * y_batch + time * y_frame + token * y_token + column, mask=mask, other=0.0)
        normal = wide.to(tl.float32) * factor
        incoming = read.to(tl.float32)
        of_shift += incoming
        of_scale += incoming * normal
        incoming = incoming * scales
        along = tl.sum(incoming * normal, 1)[:, None] / width
        grad = grad.to(tl.float32) + factor * (incoming - normal * along)
        tl.store(grad_x + row * width + column, grad, mask=mask)
        of_gate += grad * added.to(tl.float32)
        tl.store(
            grad_y + batch * d_batch + time * d_frame + token * d_token + column, grad * gates, mask=mask
        )
    place = program * width + tl.arange(0, COLUMNS)
    within = tl.arange(0, COLUMNS) < width
    tl.store(sums + place, tl.sum(of_shift, 0), mask=within)
    tl.store(sums + sums_row + place, tl.sum(of_scale, 0), mask=within)
    tl.store(sums + 2 * sums_row + place, tl.sum(of_gate, 0), mask=within)


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"CHUNK": CHUNK, "ROWS": max(1, TILE // columns), "COLUMNS": columns}


def forward_tile(frames: int, tokens: int, width: int) -> dict[str, int]:
    """Sizes for the forward pass, which need not be the backward's: it keeps no sums of a chunk.

    A program takes one tile, a smaller one with few frames.
    """
    tile = _tile(width)
    full = frames * triton.cdiv(tokens, CHUNK) >= FULL_GPU
    rows = max(1, TILE // (1 if full else 2) // tile["COLUMNS"])
    return tile | {"CHUNK": rows, "ROWS": rows, "num_warps": 4}


def _of_frames(part_BT1D: Tensor) -> tuple[Tensor, int]:
    """With rows of one stride over all frames, and that stride."""
    by_batch, by_frame, _, by_column = part_BT1D.stride()
    if by_column != 1 or by_batch != part_BT1D.shape[1] * by_frame:
        part_BT1D = part_BT1D.contiguous()
    return part_BT1D, part_BT1D.stride(1)


def _strides_of_frames(part_BT1D: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """With adjacent columns, and its strides by batch and frame."""
    part_BT1D = _rows(part_BT1D)
    return part_BT1D, (part_BT1D.stride(0), part_BT1D.stride(1))


def _rows(tensor_BTND: Tensor) -> Tensor:
    return tensor_BTND if tensor_BTND.stride(-1) == 1 else tensor_BTND.contiguous()


def _branch(like: Tensor, y_BTND: Tensor, by_token: bool) -> tuple[Tensor, tuple[int, int, int], Tensor]:
    """Memory for an input of a branch, its strides by batch, frame and token, and it as [B, T, N, D].

    The tokens of a frame lie together, or with `by_token` the frames of a token. Kernels get the memory as it
    lies: compilers know best what writes to whole tensors.
    """
    batch, frames, tokens, width = like.shape
    if by_token:
        memory = y_BTND.new_empty(batch, tokens, frames, width)
        return memory, (memory.stride(0), memory.stride(2), memory.stride(1)), memory.transpose(1, 2)
    memory = y_BTND.new_empty(batch, frames, tokens, width)
    return memory, (memory.stride(0), memory.stride(1), memory.stride(2)), memory


def launch_forward(
    x_BTND: Tensor,
    y_BTND: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    out_BTND: Tensor,
    memory: Tensor,
    strides: tuple[int, ...],
    factors: Tensor,
    *,
    fp8: bool,
) -> None:
    """Run `_forward_kernel` on gate, shift and scale [B, T, 1, D]; it fills `out`, `memory` and `factors`."""
    batch, frames, tokens, width = x_BTND.shape
    (gate, of_gate), (shift, of_shift), (scale, of_scale) = map(_strides_of_frames, parts)
    tile = forward_tile(batch * frames, tokens, width)
    chunks = triton.cdiv(tokens, tile["CHUNK"])
    wrap_triton(_forward_kernel)[(batch * frames * chunks,)](  # type: ignore[index]
        x_BTND, y_BTND, gate, shift, scale, out_BTND, memory, factors,
        *x_BTND.stride()[:3], *y_BTND.stride()[:3], *strides, *of_gate, *of_shift, *of_scale,
        frames, tokens, chunks, width, **tile, EPS=EPS, FP8=fp8,
    )  # fmt: skip


@triton_op("vidworld::add_modulate", mutates_args=())
def add_modulate(
    x_BTND: Tensor, y_BTND: Tensor, gate_BT1D: Tensor, shift_BT1D: Tensor, scale_BT1D: Tensor, by_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream x + gate y, what the next branch reads of it, and 1 / root mean square of each token.

    What is read is RMS-normalised, times 1 + scale, plus shift, in y's dtype. With `by_token` it lies in
    memory as [B, N, T, D].
    """
    x_BTND, y_BTND = _rows(x_BTND), _rows(y_BTND)
    batch, frames, tokens, width = x_BTND.shape
    out = x_BTND.new_empty(batch, frames, tokens, width)
    memory, h_strides, h = _branch(x_BTND, y_BTND, by_token)
    factors = x_BTND.new_empty(batch, frames, tokens, dtype=torch.float32)
    parts = gate_BT1D, shift_BT1D, scale_BT1D
    launch_forward(x_BTND, y_BTND, parts, out, memory, h_strides, factors, fp8=False)
    return out, h, factors


@triton_op("vidworld::add_modulate_backward", mutates_args=())
def add_modulate_backward(
    grad_out: Tensor,
    grad_h: Tensor,
    out: Tensor,
    factors: Tensor,
    y_BTND: Tensor,
    gate_BT1D: Tensor,
    scale_BT1D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y, and of shift, scale and gate in parts [3, B, T, C, D]."""
    grad_out, out, grad_h, y_BTND = grad_out.contiguous(), out.contiguous(), _rows(grad_h), _rows(y_BTND)
    batch, frames, tokens, width = out.shape
    grad_x = torch.empty_like(out)
    memory, strides, grad_y = _branch(out, y_BTND, y_BTND.stride(1) < y_BTND.stride(2))
    (gate, gate_row), (scale, scale_row) = map(_of_frames, (gate_BT1D, scale_BT1D))
    chunks = triton.cdiv(tokens, CHUNK)
    sums = out.new_empty(3, batch, frames, chunks, width, dtype=torch.float32)
    wrap_triton(_backward_kernel)[(batch * frames * chunks,)](  # type: ignore[index]
        grad_out, grad_h, out, factors, y_BTND, gate, scale, grad_x, memory, sums,
        *grad_h.stride()[:3], *y_BTND.stride()[:3], *strides, gate_row, scale_row,
        frames, tokens, chunks, width, sums.stride(0), **_tile(width),
    )  # fmt: skip
    return grad_x, grad_y, sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, gate, shift, scale, _ = inputs
    out, _, factors = output
    ctx.mark_non_differentiable(factors)
    ctx.save_for_backward(out, factors, y, gate, scale)
    ctx.shift_dtype = shift.dtype


def _gradients(ctx: Any, grad_out: Tensor, grad_h: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, factors, y, gate, scale = ctx.saved_tensors
    grad_x, grad_y, sums = add_modulate_backward(grad_out, grad_h, out, factors, y, gate, scale)
    of_shift, of_scale, of_gate = sums.sum(3)[:, :, :, None].unbind()
    of_shift, of_scale = of_shift.to(ctx.shift_dtype), of_scale.to(scale.dtype)
    return grad_x, grad_y, of_gate.to(gate.dtype), of_shift, of_scale, None


add_modulate.register_autograd(_gradients, setup_context=_keep)  # type: ignore[attr-defined]
