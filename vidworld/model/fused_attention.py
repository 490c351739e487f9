"""Triton kernels for attention inside short sequences in training: from a projection to its mixed heads.

The tokens of a frame among themselves are one or two tiles, for which kernels made for long sequences, and
the passes that lay heads out for them, cost several times what the products do. Here one program sees a
key-value head of a sequence and all queries that read it, so that each way needs one pass over memory:
forward, heads are normalised and turned where they are read; backward, all of that is computed again, and
gradients leave as those of the projection. Arithmetic is float32; products are of heads in the projection's
dtype, summed in float32. Import it only where `triton` is installed.

Keys come in a full block of KEYS and a rest of up to TAIL, both powers of two: a frame has few more tokens
than its patches, whose number often is one.

Shapes: G sequences, n tokens of each, H query heads, h key-value heads, d head dims, Y = (H + 2 h) d,
D = H d.
"""

# What depends on a constant of a kernel is bound where it is read.
# pyright: reportPossiblyUnboundVariable=false
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from vidworld.model.fused import EPS, _load_pair, _normal_factor, _store_pair
from vidworld.model.stream_kernels import INTERPRETED, LOG2_E, _normal, _product, _turn

LAUNCH: dict[str, dict[str, int]] = {
    "forward": {"ROWS": 64, "num_warps": 4, "num_stages": 2},
    "backward": {"ROWS": 64, "num_warps": 4, "num_stages": 1},
}
"""Queries of a tile, and how programs are compiled; `tools/bench/kernels_attention.py` tries more."""


@triton.jit
def _load_pair_late(base, offset, live, HALF: tl.constexpr):
    """`_load_pair` of what was read before; as the same load, it would be kept in registers until here."""
    first = tl.load(base + offset, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(base + offset + HALF, mask=live, other=0.0, eviction_policy="evict_first")
    return first, second.to(tl.float32)


@triton.jit
def _whole(first, second):
    """Vectors of their halves."""
    halves = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(halves, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _halves(whole, HALF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(whole, (whole.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _turned(qkv, offset, token, live, scale, angles, HALF: tl.constexpr, EPS: tl.constexpr):
    """Normalised, scaled and turned heads, in the projection's dtype."""
    pair = tl.arange(0, HALF)[None, :]
    first, second = _load_pair(qkv, offset + pair, live, HALF)
    first, second = _normal(first, second, scale, pair, HALF, EPS)
    cos, sin = _load_pair(angles, token * 2 * HALF + pair, live, HALF)
    first, second = _turn(first, second, cos, sin)
    return _whole(first.to(qkv.dtype.element_ty), second.to(qkv.dtype.element_ty))


@triton.jit
def _turned_backward(grad, qkv, grad_qkv, offset, token, live, scale, angles,
                     HALF: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """Store the gradient of the heads that `_turned` read; returns the halves of their scale's, summed."""
    pair = tl.arange(0, HALF)[None, :]
    turned_first, turned_second = _halves(grad, HALF)
    cos, sin = _load_pair_late(angles, token * 2 * HALF + pair, live, HALF)
    grad_first = turned_first * cos + turned_second * sin
    grad_second = turned_second * cos - turned_first * sin
    first, second = _load_pair_late(qkv, offset + pair, live, HALF)
    factor = _normal_factor(first, second, EPS, HALF)
    first, second = first * factor, second * factor
    of_first, of_second = tl.sum(grad_first * first, 0), tl.sum(grad_second * second, 0)
    scale_first, scale_second = _load_pair(scale, pair, pair < HALF, HALF)
    grad_first, grad_second = grad_first * scale_first, grad_second * scale_second
    along = (tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1))[:, None] / (2 * HALF)
    _store_pair(grad_qkv, offset + pair, factor * (grad_first - first * along),
                factor * (grad_second - second * along), live, HALF)  # fmt: skip
    return of_first, of_second


@triton.jit
def _keys(qkv, key, kv, length, scales, angles,
          H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """Turned keys, and values, of some tokens of a sequence."""
    token, live = key[:, None], key[:, None] < length
    row = token * (H + 2 * KV) * 2 * HALF
    scale, angle = scales + 2 * HALF, angles + length * 2 * HALF
    k = _turned(qkv, row + (H + kv) * 2 * HALF, token, live, scale, angle, HALF, EPS)
    dims = tl.arange(0, 2 * HALF)[None, :]
    return k, tl.load(qkv + row + (H + KV + kv) * 2 * HALF + dims, mask=live, other=0.0)


@triton.jit
def _keys_backward(grad_k, grad_v, qkv, grad_qkv, key, kv, length, scales, angles,
                   H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """Store the gradients of what `_keys` read; returns the halves of the scale's, summed."""
    token, live = key[:, None], key[:, None] < length
    row = token * (H + 2 * KV) * 2 * HALF
    dims = tl.arange(0, 2 * HALF)[None, :]
    tl.store(grad_qkv + row + (H + KV + kv) * 2 * HALF + dims, grad_v, mask=live)
    offset, scale, angle = row + (H + kv) * 2 * HALF, scales + 2 * HALF, angles + length * 2 * HALF
    return _turned_backward(grad_k, qkv, grad_qkv, offset, token, live, scale, angle, HALF, EPS)


@triton.jit
def _forward_kernel(
    qkv, scales, angles, out, lse, length,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One key-value head of a sequence, and all queries that read it; rows are (head, token)."""
    kv, sequence = tl.program_id(0) % KV, (tl.program_id(0) // KV).to(tl.int64)
    qkv += sequence * length * (H + 2 * KV) * 2 * HALF
    out += sequence * length * H * 2 * HALF
    lse += (sequence * H + kv * (H // KV)) * length
    dims = tl.arange(0, 2 * HALF)[None, :]
    k, v = _keys(qkv, tl.arange(0, KEYS), kv, length, scales, angles, H, KV, HALF, EPS)
    if TAIL:
        key = KEYS + tl.arange(0, TAIL)
        k_tail, v_tail = _keys(qkv, key, kv, length, scales, angles, H, KV, HALF, EPS)
    for tile in range(TILES):
        row = tile * ROWS + tl.arange(0, ROWS)
        index = row[:, None]
        head, token, live = kv * (H // KV) + index // length, index % length, index < (H // KV) * length
        q = _turned(qkv, (token * (H + 2 * KV) + head) * 2 * HALF, token, live, scales, angles, HALF, EPS)
        scores = _product(q, tl.trans(k), WIDE) * SCALE
        most = tl.max(scores, 1)
        if TAIL:
            scores_tail = _product(q, tl.trans(k_tail), WIDE) * SCALE
            scores_tail = tl.where(key[None, :] < length, scores_tail, float("-inf"))
            most = tl.maximum(most, tl.max(scores_tail, 1))
        weights = tl.exp2(scores - most[:, None])
        total = tl.sum(weights, 1)
        mixed = _product(weights.to(v.dtype), v, WIDE)
        if TAIL:
            weights_tail = tl.exp2(scores_tail - most[:, None])
            total += tl.sum(weights_tail, 1)
            mixed += _product(weights_tail.to(v.dtype), v_tail, WIDE)
        mixed = mixed / total[:, None]
        tl.store(out + (token * H + head) * 2 * HALF + dims, mixed.to(out.dtype.element_ty), mask=live)
        tl.store(lse + row, most + tl.log2(total), mask=row < (H // KV) * length)


@triton.jit
def _backward_kernel(
    grad_out, qkv, scales, angles, lse, grad_qkv, sums, length,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of what a program of `_forward_kernel` read; sums for the scales go to rows of its own."""
    kv, sequence = tl.program_id(0) % KV, (tl.program_id(0) // KV).to(tl.int64)
    qkv += sequence * length * (H + 2 * KV) * 2 * HALF
    grad_qkv += sequence * length * (H + 2 * KV) * 2 * HALF
    grad_out += sequence * length * H * 2 * HALF
    lse += (sequence * H + kv * (H // KV)) * length
    sums += tl.program_id(0).to(tl.int64) * 4 * HALF
    like = qkv.dtype.element_ty
    pair, dims = tl.arange(0, HALF), tl.arange(0, 2 * HALF)[None, :]
    k, v = _keys(qkv, tl.arange(0, KEYS), kv, length, scales, angles, H, KV, HALF, EPS)
    grad_k = tl.zeros([KEYS, 2 * HALF], tl.float32)
    grad_v = tl.zeros([KEYS, 2 * HALF], tl.float32)
    if TAIL:
        key = KEYS + tl.arange(0, TAIL)
        k_tail, v_tail = _keys(qkv, key, kv, length, scales, angles, H, KV, HALF, EPS)
        grad_k_tail = tl.zeros([TAIL, 2 * HALF], tl.float32)
        grad_v_tail = tl.zeros([TAIL, 2 * HALF], tl.float32)
    q_first, q_second = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for tile in range(TILES):
        row = tile * ROWS + tl.arange(0, ROWS)
        index = row[:, None]
        head, token, live = kv * (H // KV) + index // length, index % length, index < (H // KV) * length
        offset = (token * (H + 2 * KV) + head) * 2 * HALF
        grad = tl.load(grad_out + (token * H + head) * 2 * HALF + dims, mask=live, other=0.0)
        above = tl.load(lse + row, mask=row < (H // KV) * length, other=0.0)[:, None]
        q = _turned(qkv, offset, token, live, scales, angles, HALF, EPS)
        weights = tl.exp2(_product(q, tl.trans(k), WIDE) * SCALE - above)
        grad_weights = _product(grad, tl.trans(v), WIDE)
        along = tl.sum(weights * grad_weights, 1)
        if TAIL:
            weights_tail = tl.exp2(_product(q, tl.trans(k_tail), WIDE) * SCALE - above)
            weights_tail = tl.where(key[None, :] < length, weights_tail, 0.0)
            grad_weights_tail = _product(grad, tl.trans(v_tail), WIDE)
            along += tl.sum(weights_tail * grad_weights_tail, 1)
        grad_scores = (weights * (grad_weights - along[:, None])).to(like)
        grad_q = _product(grad_scores, k, WIDE)
        grad_k += _product(tl.trans(grad_scores), q, WIDE)
        grad_v += _product(tl.trans(weights.to(like)), grad, WIDE)
        if TAIL:
            grad_scores_tail = (weights_tail * (grad_weights_tail - along[:, None])).to(like)
            grad_q += _product(grad_scores_tail, k_tail, WIDE)
            grad_k_tail += _product(tl.trans(grad_scores_tail), q, WIDE)
            grad_v_tail += _product(tl.trans(weights_tail.to(like)), grad, WIDE)
        of_first, of_second = _turned_backward(
            grad_q * ROOT, qkv, grad_qkv, offset, token, live, scales, angles, HALF, EPS
        )
        q_first += of_first
        q_second += of_second
    k_first, k_second = _keys_backward(
        grad_k * ROOT, grad_v, qkv, grad_qkv, tl.arange(0, KEYS), kv, length, scales, angles, H, KV, HALF, EPS
    )
    if TAIL:
        of_first, of_second = _keys_backward(
            grad_k_tail * ROOT, grad_v_tail, qkv, grad_qkv, key, kv, length, scales, angles, H, KV, HALF, EPS
        )
        k_first += of_first
        k_second += of_second
    tl.store(sums + pair, q_first)
    tl.store(sums + HALF + pair, q_second)
    tl.store(sums + 2 * HALF + pair, k_first)
    tl.store(sums + 3 * HALF + pair, k_second)


def _tiles(length: int, queries: int, rows: int) -> dict[str, int]:
    """How a program cuts its keys and queries."""
    keys = 1 << (length.bit_length() - 1)
    rest = length - keys
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    return {"KEYS": keys, "TAIL": tail, "TILES": triton.cdiv(queries, rows)}


@triton_op("vidworld::short_attention", mutates_args=())
def short_attention(
    qkv_GnY: Tensor, scales_2d: Tensor, angles_2nd: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Each token attends to all of its sequence: mixed heads [G, n, D], and log-sum-exps [G, H, n] to base 2.

    For 16 <= n < 128. Queries and keys are normalised, scaled by `scales_2d` (queries', keys') and turned by
    `angles_2nd`, as in `split_heads`.
    """
    groups, length, _ = qkv_GnY.shape
    dims = scales_2d.shape[-1]
    qkv_GnY = qkv_GnY.contiguous()
    mixed = qkv_GnY.new_empty(groups, length, num_heads * dims)
    lse = qkv_GnY.new_empty(groups, num_heads, length, dtype=torch.float32)
    launch = LAUNCH["forward"]
    wrap_triton(_forward_kernel)[(groups * num_kv_heads,)](  # type: ignore[index]
        qkv_GnY, scales_2d, angles_2nd, mixed, lse, length,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, SCALE=LOG2_E * dims**-0.5, EPS=EPS, WIDE=INTERPRETED,
        **_tiles(length, num_heads // num_kv_heads * length, launch["ROWS"]), **launch,
    )  # fmt: skip
    return mixed, lse


@triton_op("vidworld::short_attention_backward", mutates_args=())
def short_attention_backward(
    grad_GnD: Tensor,
    qkv_GnY: Tensor,
    scales_2d: Tensor,
    angles_2nd: Tensor,
    lse_GHn: Tensor,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv_GnY`, and of `scales_2d` in parts [G h, 2, d]."""
    groups, num_heads, length = lse_GHn.shape
    dims = scales_2d.shape[-1]
    qkv_GnY, grad_GnD = qkv_GnY.contiguous(), grad_GnD.contiguous()
    grad_qkv = torch.empty_like(qkv_GnY)
    sums = scales_2d.new_empty(groups * num_kv_heads, 2, dims, dtype=torch.float32)
    launch = LAUNCH["backward"]
    wrap_triton(_backward_kernel)[(groups * num_kv_heads,)](  # type: ignore[index]
        grad_GnD, qkv_GnY, scales_2d, angles_2nd, lse_GHn, grad_qkv, sums, length,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, SCALE=LOG2_E * dims**-0.5, ROOT=dims**-0.5, EPS=EPS,
        WIDE=INTERPRETED, **_tiles(length, num_heads // num_kv_heads * length, launch["ROWS"]), **launch,
    )  # fmt: skip
    return grad_qkv, sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[:3], lse)
    ctx.num_kv_heads = inputs[4]


def _gradients(ctx: Any, grad_GnD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    qkv_GnY, scales_2d, angles_2nd, lse = ctx.saved_tensors
    grad_qkv, sums = short_attention_backward(grad_GnD, qkv_GnY, scales_2d, angles_2nd, lse, ctx.num_kv_heads)
    return grad_qkv, sums.sum(0).to(scales_2d.dtype), None, None, None


short_attention.register_autograd(_gradients, setup_context=_keep)  # type: ignore[attr-defined]
