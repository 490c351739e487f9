"""Triton kernels for what a compiler spreads over several passes in training; CUDA only.

What surrounds the matrix products of a block moves memory and little else, so passes count. Here queries,
keys and values are read once and written once, normalised, turned and laid out by heads, and so are their
gradients; and the gradient of a SwiGLU reads each of its inputs once. Arithmetic is float32 inside, as in the
plain code, and nothing is rounded in between. Import it only where `triton` is installed.

Shapes: G sequences, n tokens of each, H query heads, h key-value heads, d head dims, Y = (H + 2 h) d.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

EPS = torch.finfo(torch.float32).eps
"""What `rms_norm` adds to the mean square by default. A constant of the kernels: as an argument it would be a
float64 in compiled graphs, and all that it meets too."""
ROWS = 32
"""Tokens of a program; one program sees one head of each."""


@triton.jit
def _load_pair(base, offset, live, HALF: tl.constexpr):
    """Both halves of vectors as float32."""
    first = tl.load(base + offset, mask=live, other=0.0).to(tl.float32)
    return first, tl.load(base + offset + HALF, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(base, offset, first, second, live, HALF: tl.constexpr):
    tl.store(base + offset, first, mask=live)
    tl.store(base + offset + HALF, second, mask=live)


@triton.jit
def _normal_factor(first, second, EPS: tl.constexpr, HALF: tl.constexpr):
    """1 / root mean square of each vector."""
    square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    return tl.rsqrt(square / (2 * HALF) + EPS)[:, None]


@triton.jit
def _split_heads_kernel(
    qkv,
    scales,
    angles,
    q,
    k,
    v,
    num_tokens,
    length,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """One head of ROWS tokens: normalise, scale, turn, and write by heads."""
    head = tl.program_id(0) % (H + 2 * KV)
    row = (tl.program_id(0) // (H + 2 * KV)) * ROWS + tl.arange(0, ROWS)[:, None]
    group, place = (row // length).to(tl.int64), row % length
    live, row = row < num_tokens, row.to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    first, second = _load_pair(qkv, (row * (H + 2 * KV) + head) * 2 * HALF + pair, live, HALF)
    if head < H + KV:
        kind = (head >= H).to(tl.int32)
        factor = _normal_factor(first, second, EPS, HALF)
        scale_first, scale_second = _load_pair(scales, kind * 2 * HALF + pair, pair < HALF, HALF)
        first = first * factor * scale_first
        second = second * factor * scale_second
        cos, sin = _load_pair(angles, (kind * length + place) * 2 * HALF + pair, live, HALF)
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        if head < H:
            _store_pair(q, ((group * H + head) * length + place) * 2 * HALF + pair,
                        turned_first, turned_second, live, HALF)  # fmt: skip
        else:
            _store_pair(k, ((group * KV + head - H) * length + place) * 2 * HALF + pair,
                        turned_first, turned_second, live, HALF)  # fmt: skip
    else:
        _store_pair(v, ((group * KV + head - H - KV) * length + place) * 2 * HALF + pair,
                    first, second, live, HALF)  # fmt: skip


@triton.jit
def _split_heads_backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    qkv,
    scales,
    angles,
    grad_qkv,
    grad_scales,
    num_tokens,
    length,
    q_group,
    q_head,
    q_row,
    k_group,
    k_head,
    k_row,
    v_group,
    v_head,
    v_row,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """One head of ROWS tokens; sums for the scales go to a row of each program's own."""
    head = tl.program_id(0) % (H + 2 * KV)
    block = tl.program_id(0) // (H + 2 * KV)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    group, place = (row // length).to(tl.int64), row % length
    live, row = row < num_tokens, row.to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    offset = (row * (H + 2 * KV) + head) * 2 * HALF + pair
    if head < H + KV:
        kind = (head >= H).to(tl.int32)
        if head < H:
            turned_first, turned_second = _load_pair(
                grad_q, group * q_group + head * q_head + place * q_row + pair, live, HALF
            )
        else:
            turned_first, turned_second = _load_pair(
                grad_k, group * k_group + (head - H) * k_head + place * k_row + pair, live, HALF
            )
        cos, sin = _load_pair(angles, (kind * length + place) * 2 * HALF + pair, live, HALF)
        grad_first = turned_first * cos + turned_second * sin
        grad_second = turned_second * cos - turned_first * sin
        first, second = _load_pair(qkv, offset, live, HALF)
        factor = _normal_factor(first, second, EPS, HALF)
        first, second = first * factor, second * factor
        sums = (block.to(tl.int64) * (H + KV) + head) * 2 * HALF + tl.arange(0, HALF)
        tl.store(grad_scales + sums, tl.sum(grad_first * first, 0))
        tl.store(grad_scales + sums + HALF, tl.sum(grad_second * second, 0))
        scale_first, scale_second = _load_pair(scales, kind * 2 * HALF + pair, pair < HALF, HALF)
        grad_first, grad_second = grad_first * scale_first, grad_second * scale_second
        along = (tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1))[:, None] / (2 * HALF)
        _store_pair(grad_qkv, offset, factor * (grad_first - first * along),
                    factor * (grad_second - second * along), live, HALF)  # fmt: skip
    else:
        first, second = _load_pair(
            grad_v, group * v_group + (head - H - KV) * v_head + place * v_row + pair, live, HALF
        )
        _store_pair(grad_qkv, offset, first, second, live, HALF)


@triton_op("vidworld::split_heads", mutates_args=())
def split_heads(
    qkv_GnY: Tensor, scales_2d: Tensor, angles_2nd: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [G, H, n, d], keys and values [G, h, n, d] for attention.

    Queries and keys are normalised, scaled by `scales_2d` (queries', keys') and turned by `angles_2nd`
    (queries', keys'; cosines, then sines, of the angle of each pair (i, i + d/2)).
    """
    groups, length, _ = qkv_GnY.shape
    dims = scales_2d.shape[-1]
    qkv_GnY = qkv_GnY.contiguous()
    q = qkv_GnY.new_empty(groups, num_heads, length, dims)
    k, v = (qkv_GnY.new_empty(groups, num_kv_heads, length, dims) for _ in range(2))
    grid = (triton.cdiv(groups * length, ROWS) * (num_heads + 2 * num_kv_heads),)
    wrap_triton(_split_heads_kernel)[grid](  # type: ignore[index]
        qkv_GnY, scales_2d, angles_2nd, q, k, v, groups * length, length,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, ROWS=ROWS, EPS=EPS,
    )  # fmt: skip
    return q, k, v


@triton_op("vidworld::split_heads_backward", mutates_args=())
def split_heads_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv_GnY: Tensor, scales_2d: Tensor, angles_2nd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv_GnY`, and of `scales_2d` in parts [blocks, H + h, d]."""
    groups, num_heads, length, dims = grad_q.shape
    num_kv_heads = grad_k.shape[1]
    qkv_GnY = qkv_GnY.contiguous()
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    blocks = triton.cdiv(groups * length, ROWS)
    grad_qkv = torch.empty_like(qkv_GnY)
    sums = scales_2d.new_empty(blocks, num_heads + num_kv_heads, dims, dtype=torch.float32)
    strides = [stride for grad in grads for stride in grad.stride()[:3]]
    wrap_triton(_split_heads_backward_kernel)[(blocks * (num_heads + 2 * num_kv_heads),)](  # type: ignore[index]
        *grads, qkv_GnY, scales_2d, angles_2nd, grad_qkv, sums, groups * length, length, *strides,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, ROWS=ROWS, EPS=EPS,
    )  # fmt: skip
    return grad_qkv, sums


def _keep_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.num_heads = inputs[3]


def _of_heads(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    qkv_GnY, scales_2d, angles_2nd = ctx.saved_tensors
    grad_qkv, sums = split_heads_backward(grad_q, grad_k, grad_v, qkv_GnY, scales_2d, angles_2nd)
    per_head = sums.sum(0)
    grad_scales = torch.stack([per_head[: ctx.num_heads].sum(0), per_head[ctx.num_heads :].sum(0)])
    return grad_qkv, grad_scales.to(scales_2d.dtype), None, None, None


split_heads.register_autograd(_of_heads, setup_context=_keep_heads)  # type: ignore[attr-defined]


@triton.jit
def _swiglu_kernel(x, out, num_tokens, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = (row < num_tokens) & (column < hidden)
    gate = tl.load(x + row * 2 * hidden + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * hidden + hidden + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, gate * tl.sigmoid(gate) * up, mask=live)


@triton.jit
def _swiglu_backward_kernel(
    grad,
    x,
    grad_x,
    num_tokens,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = (row < num_tokens) & (column < hidden)
    of_gate = row * 2 * hidden + column
    gate = tl.load(x + of_gate, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + of_gate + hidden, mask=live, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * hidden + column, mask=live, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_x + of_gate, incoming * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=live)
    tl.store(grad_x + of_gate + hidden, incoming * gate * sigmoid, mask=live)


def _tiles(num_tokens: int, hidden: int) -> tuple[tuple[int, int], dict[str, int]]:
    tile = {"ROWS": 8, "COLUMNS": 128}
    return (triton.cdiv(num_tokens, tile["ROWS"]), triton.cdiv(hidden, tile["COLUMNS"])), tile


@triton_op("vidworld::swiglu", mutates_args=())
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of gate and up one after the other in the last axis."""
    x = x.contiguous()
    hidden = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], hidden)
    grid, tile = _tiles(out.numel() // hidden, hidden)
    wrap_triton(_swiglu_kernel)[grid](x, out, out.numel() // hidden, hidden, **tile)  # type: ignore[index]
    return out


@triton_op("vidworld::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`."""
    grad, x = grad.contiguous(), x.contiguous()
    hidden = grad.shape[-1]
    grad_x = torch.empty_like(x)
    grid, tile = _tiles(grad.numel() // hidden, hidden)
    wrap_triton(_swiglu_backward_kernel)[grid](grad, x, grad_x, grad.numel() // hidden, hidden, **tile)  # type: ignore[index]
    return grad_x


def _keep_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _of_swiglu(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_backward(grad, *ctx.saved_tensors)


swiglu.register_autograd(_of_swiglu, setup_context=_keep_swiglu)  # type: ignore[attr-defined]
