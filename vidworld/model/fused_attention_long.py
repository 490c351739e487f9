"""Triton kernels for attention inside longer sequences in training: from a projection to its mixed heads.

For sequences whose keys do not fit one program of `fused_attention`, in blocks (arXiv 2205.14135; for the
gradients 2307.08691): queries and keys are normalised and turned once, values and all gradients stay where
the projection has them. Forward and for the queries' gradients a program sees a tile of queries and all
keys; for those of keys and values, a block of keys and all queries. Each program finishes what it has
summed: gradients leave as those of the projection. Import it only where `triton` is installed.

Keys come in BLOCKS full blocks and a rest of up to TAIL, a power of two.

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

from vidworld.model.fused import EPS
from vidworld.model.fused_attention import _turned, _turned_backward
from vidworld.model.stream_kernels import INTERPRETED, LOG2_E, _product, _softmax_step

LAUNCH: dict[str, dict[str, int]] = {
    "forward": {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 2},
    "queries": {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    "keys": {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
}
"""Queries and keys of a tile, and how they are compiled; `tools/bench/kernels_attention.py` tries more."""
TURNED = 32
"""Tokens of a program that turns heads."""


@triton.jit
def _turn_kernel(
    qkv, scales, angles, q, k, num_tokens, length,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens: normalise, scale, turn, and write by heads."""
    head = tl.program_id(0) % (H + KV)
    row = (tl.program_id(0) // (H + KV)) * ROWS + tl.arange(0, ROWS)[:, None]
    sequence, token, live = (row // length).to(tl.int64), row % length, row < num_tokens
    kind = (head >= H).to(tl.int32)
    offset = (row.to(tl.int64) * (H + 2 * KV) + head) * 2 * HALF
    scale, angle = scales + kind * 2 * HALF, angles + kind * length * 2 * HALF
    turned = _turned(qkv, offset, token, live, scale, angle, HALF, EPS)
    dims = tl.arange(0, 2 * HALF)[None, :]
    if head < H:
        tl.store(q + ((sequence * H + head) * length + token) * 2 * HALF + dims, turned, mask=live)
    else:
        tl.store(k + ((sequence * KV + head - H) * length + token) * 2 * HALF + dims, turned, mask=live)


@triton.jit
def _block(k, v, start, length, Y: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, REST: tl.constexpr):
    """Keys, and values at the projection's stride; those past the end of a REST are zero."""
    key, dims = start + tl.arange(0, KEYS)[:, None], tl.arange(0, DIMS)[None, :]
    if REST:
        live = key < length
        of_k = tl.load(k + key * DIMS + dims, mask=live, other=0.0)
        of_v = tl.load(v + key * Y + dims, mask=live, other=0.0)
    else:
        of_k, of_v = tl.load(k + key * DIMS + dims), tl.load(v + key * Y + dims)
    return of_k, of_v


@triton.jit
def _mix(q, k, v, start, length, most, total, mixed, Y: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
         REST: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A step over a block of keys."""
    of_k, of_v = _block(k, v, start, length, Y, KEYS, DIMS, REST)
    scores = _product(q, tl.trans(of_k), WIDE) * SCALE
    if REST:
        scores = tl.where((start + tl.arange(0, KEYS))[None, :] < length, scores, float("-inf"))
    return _softmax_step(scores, of_v, most, total, mixed, WIDE)


@triton.jit
def _forward_kernel(
    q, k, qkv, out, lse, length, tiles,
    H: tl.constexpr, KV: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the queries that share a key-value head; rows are (head, token)."""
    tile, pair = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    kv, sequence, queries = pair % KV, pair // KV, (H // KV) * length
    Y: tl.constexpr = (H + 2 * KV) * DIMS
    v = qkv + sequence * length * Y + (H + KV + kv) * DIMS
    k += pair * length * DIMS
    row, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)[None, :]
    index = row[:, None]
    live = index < queries
    tile_q = tl.load(q + (pair * queries + index) * DIMS + dims, mask=live, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    for block in range(BLOCKS):
        most, total, mixed = _mix(
            tile_q, k, v, block * KEYS, length, most, total, mixed, Y, KEYS, DIMS, False, SCALE, WIDE
        )
    if TAIL:
        most, total, mixed = _mix(
            tile_q, k, v, BLOCKS * KEYS, length, most, total, mixed, Y, TAIL, DIMS, True, SCALE, WIDE
        )
    head, token = kv * (H // KV) + index // length, index % length
    place = ((sequence * length + token) * H + head) * DIMS + dims
    tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=live)
    tl.store(lse + pair * queries + row, most + tl.log2(total), mask=row < queries)


@triton.jit
def _to_query(q, grad, above, along, k, v, start, length, grad_q, Y: tl.constexpr, KEYS: tl.constexpr,
              DIMS: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Add what a block of keys gives to the gradient of turned queries."""
    of_k, of_v = _block(k, v, start, length, Y, KEYS, DIMS, REST)
    weights = tl.exp2(_product(q, tl.trans(of_k), WIDE) * SCALE - above[:, None])
    if REST:
        weights = tl.where((start + tl.arange(0, KEYS))[None, :] < length, weights, 0.0)
    grad_scores = weights * (_product(grad, tl.trans(of_v), WIDE) - along[:, None])
    return grad_q + _product(grad_scores.to(of_k.dtype), of_k, WIDE)


@triton.jit
def _queries_kernel(
    grad_out, out, q, k, qkv, scales, angles, lse, grad_qkv, inner, sums, length, tiles,
    H: tl.constexpr, KV: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and the products of mixed heads and their gradients, for the keys'."""
    tile, pair = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    kv, sequence, queries = pair % KV, pair // KV, (H // KV) * length
    Y: tl.constexpr = (H + 2 * KV) * DIMS
    v = qkv + sequence * length * Y + (H + KV + kv) * DIMS
    k += pair * length * DIMS
    row, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)[None, :]
    index = row[:, None]
    live = index < queries
    head, token = kv * (H // KV) + index // length, index % length
    place = ((sequence * length + token) * H + head) * DIMS + dims
    grad = tl.load(grad_out + place, mask=live, other=0.0)
    along = tl.sum(grad.to(tl.float32) * tl.load(out + place, mask=live, other=0.0).to(tl.float32), 1)
    tl.store(inner + pair * queries + row, along, mask=row < queries)
    above = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
    tile_q = tl.load(q + (pair * queries + index) * DIMS + dims, mask=live, other=0.0)
    grad_q = tl.zeros([ROWS, DIMS], tl.float32)
    for block in range(BLOCKS):
        grad_q = _to_query(
            tile_q, grad, above, along, k, v, block * KEYS, length, grad_q, Y, KEYS, DIMS, False, SCALE, WIDE
        )
    if TAIL:
        grad_q = _to_query(
            tile_q, grad, above, along, k, v, BLOCKS * KEYS, length, grad_q, Y, TAIL, DIMS, True, SCALE, WIDE
        )
    offset = (sequence * length + token) * Y + head * DIMS
    first, second = _turned_backward(
        grad_q * ROOT, qkv, grad_qkv, offset, token, live, scales, angles, DIMS // 2, EPS
    )
    sums += tl.program_id(0).to(tl.int64) * DIMS + tl.arange(0, DIMS // 2)
    tl.store(sums, first)
    tl.store(sums + DIMS // 2, second)


@triton.jit
def _to_keys(
    grad_out, q, k, qkv, scales, angles, lse, inner, grad_qkv, sums, pair, start, length,
    H: tl.constexpr, KV: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; scores are (key, query) here, so that none is transposed."""
    kv, sequence, queries = pair % KV, pair // KV, (H // KV) * length
    Y: tl.constexpr = (H + 2 * KV) * DIMS
    of_v = (sequence * length * (H + 2 * KV) + H + KV + kv) * DIMS
    block_k, block_v = _block(k + pair * length * DIMS, qkv + of_v, start, length, Y, KEYS, DIMS, REST)
    grad_k = tl.zeros([KEYS, DIMS], tl.float32)
    grad_v = tl.zeros([KEYS, DIMS], tl.float32)
    dims = tl.arange(0, DIMS)[None, :]
    for tile in range(TILES):
        row = tile * ROWS + tl.arange(0, ROWS)
        index = row[:, None]
        live = index < queries
        head, token = kv * (H // KV) + index // length, index % length
        place = ((sequence * length + token) * H + head) * DIMS + dims
        tile_q = tl.load(q + (pair * queries + index) * DIMS + dims, mask=live, other=0.0)
        grad = tl.load(grad_out + place, mask=live, other=0.0)
        above = tl.load(lse + pair * queries + row, mask=row < queries, other=0.0)
        along = tl.load(inner + pair * queries + row, mask=row < queries, other=0.0)
        weights = tl.exp2(_product(block_k, tl.trans(tile_q), WIDE) * SCALE - above[None, :])
        grad_v += _product(weights.to(grad.dtype), grad, WIDE)
        grad_scores = weights * (_product(block_v, tl.trans(grad), WIDE) - along[None, :])
        grad_k += _product(grad_scores.to(tile_q.dtype), tile_q, WIDE)
    key = start + tl.arange(0, KEYS)[:, None]
    live = key < length
    tl.store(grad_qkv + of_v + key * Y + dims, grad_v.to(grad_qkv.dtype.element_ty), mask=live)
    offset = (sequence * length + key) * Y + (H + kv) * DIMS
    first, second = _turned_backward(
        grad_k * ROOT, qkv, grad_qkv, offset, key, live, scales + DIMS, angles + length * DIMS, DIMS // 2, EPS
    )
    sums += tl.program_id(0).to(tl.int64) * DIMS + tl.arange(0, DIMS // 2)
    tl.store(sums, first)
    tl.store(sums + DIMS // 2, second)


@triton.jit
def _keys_kernel(
    grad_out, q, k, qkv, scales, angles, lse, inner, grad_qkv, sums, length,
    H: tl.constexpr, KV: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr,
    EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of keys, or the rest of them, which takes a smaller tile."""
    blocks: tl.constexpr = BLOCKS + (TAIL > 0)
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    if block < BLOCKS:
        _to_keys(grad_out, q, k, qkv, scales, angles, lse, inner, grad_qkv, sums, pair, block * KEYS, length,
                 H, KV, DIMS, ROWS, TILES, KEYS, False, SCALE, ROOT, EPS, WIDE)  # fmt: skip
    else:
        if TAIL:
            _to_keys(grad_out, q, k, qkv, scales, angles, lse, inner, grad_qkv, sums, pair, BLOCKS * KEYS,
                     length, H, KV, DIMS, ROWS, TILES, TAIL, True, SCALE, ROOT, EPS, WIDE)  # fmt: skip


def _cut(length: int, queries: int, launch: dict[str, int]) -> tuple[int, dict[str, int]]:
    """How many tiles of queries there are, and how keys are cut."""
    keys = min(launch["KEYS"], 1 << (length.bit_length() - 1))
    rest = length % keys
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    cut = {"BLOCKS": length // keys, "TAIL": tail}
    return triton.cdiv(queries, launch["ROWS"]), launch | {"KEYS": keys} | cut


@triton_op("vidworld::long_attention", mutates_args=())
def long_attention(
    qkv_GnY: Tensor, scales_2d: Tensor, angles_2nd: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `short_attention`, for any n from 16 on: also queries [G, H, n, d] and keys [G, h, n, d], turned."""
    groups, length, _ = qkv_GnY.shape
    dims = scales_2d.shape[-1]
    qkv_GnY = qkv_GnY.contiguous()
    q = qkv_GnY.new_empty(groups, num_heads, length, dims)
    k = qkv_GnY.new_empty(groups, num_kv_heads, length, dims)
    turned = triton.cdiv(groups * length, TURNED) * (num_heads + num_kv_heads)
    wrap_triton(_turn_kernel)[(turned,)](  # type: ignore[index]
        qkv_GnY, scales_2d, angles_2nd, q, k, groups * length, length,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, ROWS=TURNED, EPS=EPS,
    )  # fmt: skip
    mixed = qkv_GnY.new_empty(groups, length, num_heads * dims)
    lse = qkv_GnY.new_empty(groups, num_heads, length, dtype=torch.float32)
    tiles, cut = _cut(length, num_heads // num_kv_heads * length, LAUNCH["forward"])
    wrap_triton(_forward_kernel)[(groups * num_kv_heads * tiles,)](  # type: ignore[index]
        q, k, qkv_GnY, mixed, lse, length, tiles,
        H=num_heads, KV=num_kv_heads, DIMS=dims, SCALE=LOG2_E * dims**-0.5, WIDE=INTERPRETED, **cut,
    )  # fmt: skip
    return mixed, lse, q, k


@triton_op("vidworld::long_attention_backward", mutates_args=())
def long_attention_backward(
    grad_GnD: Tensor,
    qkv_GnY: Tensor,
    scales_2d: Tensor,
    angles_2nd: Tensor,
    mixed_GnD: Tensor,
    lse_GHn: Tensor,
    q_GHnd: Tensor,
    k_Ghnd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `qkv_GnY`, and in parts [programs, d] of the queries' and of the keys' scale."""
    groups, num_heads, length, dims = q_GHnd.shape
    num_kv_heads = k_Ghnd.shape[1]
    pairs, queries = groups * num_kv_heads, num_heads // num_kv_heads * length
    qkv_GnY, grad_GnD = qkv_GnY.contiguous(), grad_GnD.contiguous()
    grad_qkv = torch.empty_like(qkv_GnY)
    inner = torch.empty_like(lse_GHn)
    common = {"H": num_heads, "KV": num_kv_heads, "DIMS": dims, "EPS": EPS, "WIDE": INTERPRETED}
    common |= {"SCALE": LOG2_E * dims**-0.5, "ROOT": dims**-0.5}
    tiles, cut = _cut(length, queries, LAUNCH["queries"])
    of_queries = scales_2d.new_empty(pairs * tiles, dims, dtype=torch.float32)
    wrap_triton(_queries_kernel)[(pairs * tiles,)](  # type: ignore[index]
        grad_GnD, mixed_GnD, q_GHnd, k_Ghnd, qkv_GnY, scales_2d, angles_2nd, lse_GHn, grad_qkv, inner,
        of_queries, length, tiles, **common, **cut,
    )  # fmt: skip
    tiles, cut = _cut(length, queries, LAUNCH["keys"])
    blocks = cut["BLOCKS"] + (cut["TAIL"] > 0)
    of_keys = scales_2d.new_empty(pairs * blocks, dims, dtype=torch.float32)
    wrap_triton(_keys_kernel)[(pairs * blocks,)](  # type: ignore[index]
        grad_GnD, q_GHnd, k_Ghnd, qkv_GnY, scales_2d, angles_2nd, lse_GHn, inner, grad_qkv,
        of_keys, length, TILES=tiles, **common, **cut,
    )  # fmt: skip
    return grad_qkv, of_queries, of_keys


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(ctx: Any, grad_GnD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_qkv, of_queries, of_keys = long_attention_backward(grad_GnD, *ctx.saved_tensors)
    grad_scales = torch.stack([of_queries.sum(0), of_keys.sum(0)])
    return grad_qkv, grad_scales.to(ctx.saved_tensors[1].dtype), None, None, None


long_attention.register_autograd(_gradients, setup_context=_keep)  # type: ignore[attr-defined]
