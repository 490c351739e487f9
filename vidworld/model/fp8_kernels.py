"""Triton kernels that write the inputs of `fp8` products: each row rounded to e4m3 as it is made.

A program sees whole rows, so that their largest numbers are known before they are written. No gradients.
Import it only where `triton` is installed.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from vidworld.model.fp8 import E4M3
from vidworld.model.fused_residual import _rounded_to_fp8, _rows, launch_forward


@triton_op("vidworld::add_modulate_fp8", mutates_args=())
def add_modulate_fp8(
    x_BTND: Tensor, y_BTND: Tensor, gate_BT1D: Tensor, shift_BT1D: Tensor, scale_BT1D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_residual.add_modulate`: the stream, and its reading in e4m3 with scales [B, T, N, 1]."""
    x_BTND, y_BTND = _rows(x_BTND), _rows(y_BTND)
    batch, frames, tokens, width = x_BTND.shape
    out = x_BTND.new_empty(batch, frames, tokens, width)
    h = x_BTND.new_empty(batch, frames, tokens, width, dtype=E4M3)
    scales = x_BTND.new_empty(batch, frames, tokens, 1, dtype=torch.float32)
    parts = gate_BT1D, shift_BT1D, scale_BT1D
    launch_forward(x_BTND, y_BTND, parts, out, h, h.stride()[:3], scales, fp8=True)
    return out, h, scales


@triton.jit
def _swiglu_kernel(x, out, scales, num_tokens, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    live = (row < num_tokens) & (column < hidden)
    gate = tl.load(x + row * 2 * hidden + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * hidden + hidden + column, mask=live, other=0.0).to(tl.float32)
    value, scale = _rounded_to_fp8(gate * tl.sigmoid(gate) * up)
    tl.store(out + row * hidden + column, value.to(out.dtype.element_ty), mask=live)
    tl.store(scales + row, scale, mask=row < num_tokens)


def swiglu_tile(num_tokens: int, hidden: int) -> dict[str, int]:
    """Rows of a program, which takes all columns."""
    columns = triton.next_power_of_2(hidden)
    return {"ROWS": 1, "COLUMNS": columns, "num_warps": 4 if columns <= 2048 else 8}


@triton_op("vidworld::swiglu_fp8", mutates_args=())
def swiglu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `fused.swiglu`, in e4m3 with scales [..., 1]."""
    x = x.contiguous()
    hidden = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], hidden, dtype=E4M3)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    tile, tokens = swiglu_tile(scales.numel(), hidden), scales.numel()
    wrap_triton(_swiglu_kernel)[(triton.cdiv(tokens, tile["ROWS"]),)](  # type: ignore[index]
        x, out, scales, tokens, hidden, **tile
    )
    return out, scales
