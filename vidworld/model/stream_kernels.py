"""Triton kernels for attention in rollouts: from a layer's projection to its mixed heads in one pass.

A rollout attends with few queries: a frame's tokens among themselves, or one or two frames to a short cache.
There, kernels made for long sequences leave most of their tiles empty, and what surrounds them (norms,
rotations, transposes, copies into the cache) costs as much as they do. Here all of it happens where the heads
are read. Arithmetic is float32, and products of bfloat16 heads are summed in float32. No gradients. Import it
only where `triton` is installed.

Shapes: G sequences, n tokens of each, B batch, F frames of a pass, N tokens a frame, H query heads, h
key-value heads, W slots, d head dims, Y = (H + 2 h) d, D = H d.
"""

# What depends on a constant of a kernel is bound where it is read.
# pyright: reportPossiblyUnboundVariable=false
import os

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from vidworld.model.fused import EPS, _load_pair

LOG2_E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter multiplies matrices of float32 only."""
MOST_SLOTS = 64
"""Slots that a program of `ring_attention` can hold."""
FILLS_A_GPU = 264
"""Programs, two for each multiprocessor of an H100; with fewer, work is cut finer."""
ALL_KEYS = 128
"""Keys up to which a program of `frame_attention` keeps all of them."""


@triton.jit
def _normal(first, second, scale, pair, HALF: tl.constexpr, EPS: tl.constexpr):
    """Vectors over their root mean square, times a scale for each dimension."""
    square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    factor = tl.rsqrt(square / (2 * HALF) + EPS)[:, None]
    scale_first, scale_second = _load_pair(scale, pair, pair < HALF, HALF)
    return first * factor * scale_first, second * factor * scale_second


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _head(qkv, offset, token, live, scale, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr):
    """Halves of normalised, turned heads, in the projection's dtype."""
    pair = tl.arange(0, HALF)[None, :]
    first, second = _load_pair(qkv, offset + pair, live, HALF)
    first, second = _normal(first, second, scale, pair, HALF, EPS)
    angle = token * HALF + pair
    of_cos = tl.load(cos + angle, mask=live, other=0.0).to(tl.float32)
    of_sin = tl.load(sin + angle, mask=live, other=0.0).to(tl.float32)
    first, second = _turn(first, second, of_cos, of_sin)
    return first.to(qkv.dtype.element_ty), second.to(qkv.dtype.element_ty)


@triton.jit
def _product(a, b, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(q_first, q_second, k_first, k_second, key, length, scale, WIDE: tl.constexpr):
    scores = _product(q_first, tl.trans(k_first), WIDE) + _product(q_second, tl.trans(k_second), WIDE)
    return tl.where(key[None, :] < length, scores * scale, float("-inf"))


@triton.jit
def _keys(qkv, key, kv, length, k_scale, cos, sin,
          H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """Keys in halves, and values, of some tokens."""
    token, live = key[:, None], key[:, None] < length
    row = token * (H + 2 * KV) * 2 * HALF
    k_first, k_second = _head(qkv, row + (H + kv) * 2 * HALF, token, live, k_scale, cos, sin, HALF, EPS)
    dims = tl.arange(0, 2 * HALF)[None, :]
    v = tl.load(qkv + row + (H + KV + kv) * 2 * HALF + dims, mask=live, other=0.0)
    return k_first, k_second, v


@triton.jit
def _frame_attention_kernel(
    qkv, q_scale, k_scale, cos, sin, out, length, splits,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Some tiles of the queries that share a key-value head; rows are (head, token)."""
    split, kv = tl.program_id(0) % splits, (tl.program_id(0) // splits) % KV
    sequence = (tl.program_id(0) // splits // KV).to(tl.int64)
    qkv += sequence * length * (H + 2 * KV) * 2 * HALF
    out += sequence * length * H * 2 * HALF
    dims = tl.arange(0, 2 * HALF)[None, :]
    if BLOCKS == 1:
        key = tl.arange(0, KEYS)
        k_first, k_second, v = _keys(qkv, key, kv, length, k_scale, cos, sin, H, KV, HALF, EPS)
    for tile in range(TILES):
        index = (split * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        head, token = kv * (H // KV) + index // length, index % length
        live = index < (H // KV) * length
        offset = (token * (H + 2 * KV) + head) * 2 * HALF
        q_first, q_second = _head(qkv, offset, token, live, q_scale, cos, sin, HALF, EPS)
        if BLOCKS == 1:
            scores = _scores(q_first, q_second, k_first, k_second, key, length, SCALE, WIDE)
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weights, 1)
            mixed = _product(weights.to(v.dtype), v, WIDE)
        else:
            # The running softmax of arXiv 2205.14135, algorithm 1.
            most = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, 2 * HALF], tl.float32)
            for block in range(BLOCKS):
                key = block * KEYS + tl.arange(0, KEYS)
                k_first, k_second, v = _keys(qkv, key, kv, length, k_scale, cos, sin, H, KV, HALF, EPS)
                scores = _scores(q_first, q_second, k_first, k_second, key, length, SCALE, WIDE)
                new_most = tl.maximum(most, tl.max(scores, 1))
                weights = tl.exp2(scores - new_most[:, None])
                fade = tl.exp2(most - new_most)
                total = total * fade + tl.sum(weights, 1)
                mixed = mixed * fade[:, None] + _product(weights.to(v.dtype), v, WIDE)
                most = new_most
        mixed = mixed / total[:, None]
        tl.store(out + (token * H + head) * 2 * HALF + dims, mixed.to(out.dtype.element_ty), mask=live)


@triton_op("vidworld::frame_attention", mutates_args=())
def frame_attention(
    qkv_GnY: Tensor,
    query_scale_d: Tensor,
    key_scale_d: Tensor,
    cos_nd: Tensor,
    sin_nd: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Each token attends to all of its sequence: mixed heads [G, n, D].

    Queries and keys are normalised, scaled, and turned by the angles [n, d/2] of their places.
    """
    groups, length, _ = qkv_GnY.shape
    dims = query_scale_d.shape[-1]
    qkv_GnY, cos_nd, sin_nd = qkv_GnY.contiguous(), cos_nd.contiguous(), sin_nd.contiguous()
    out = qkv_GnY.new_empty(groups, length, num_heads * dims)
    queries = num_heads // num_kv_heads * length
    rows, splits = 64, 1
    if groups * num_kv_heads < FILLS_A_GPU:
        rows = 64 if groups * num_kv_heads * triton.cdiv(queries, 64) >= FILLS_A_GPU else 32
        splits = triton.cdiv(queries, rows)
    keys = max(16, triton.next_power_of_2(length)) if length <= ALL_KEYS else 64
    wrap_triton(_frame_attention_kernel)[(groups * num_kv_heads * splits,)](  # type: ignore[index]
        qkv_GnY, query_scale_d, key_scale_d, cos_nd, sin_nd, out, length, splits,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, ROWS=rows, KEYS=keys,
        BLOCKS=triton.cdiv(length, keys), TILES=triton.cdiv(queries, rows * splits),
        SCALE=LOG2_E * dims**-0.5, EPS=EPS, WIDE=INTERPRETED,
    )  # fmt: skip
    return out


@triton.jit
def _ring_attention_kernel(
    qkv, q_scale, k_scale, now_slot, now_turns, now_seen, before_slot, before_turns, before_seen,
    keys, values, out, num_sequences, num_tokens, num_slots,
    F: tl.constexpr, COMMITS: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, SEQUENCES: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One key-value head of a few tokens: their slots are read once for all queries."""
    kv = tl.program_id(0) % KV
    slot, column = tl.arange(0, SLOTS)[:, None], tl.arange(0, SLOTS)[None, :]
    pair = tl.arange(0, HALF)[None, :]
    for one in tl.range(SEQUENCES, num_stages=1):
        sequence = ((tl.program_id(0) // KV) * SEQUENCES + one).to(tl.int64)
        is_one = sequence < num_sequences
        batch, token = sequence // num_tokens, sequence % num_tokens
        held = (sequence * KV + kv) * num_slots * 2 * HALF
        live = (slot < num_slots) & is_one
        k_first, k_second = _load_pair(keys, held + slot * 2 * HALF + pair, live, HALF)
        v_first, v_second = _load_pair(values, held + slot * 2 * HALF + pair, live, HALF)
        inside = (pair < HALF) & is_one
        for frame in tl.static_range(F):
            row = (batch * F + frame) * num_tokens + token
            new = row * (H + 2 * KV) * 2 * HALF + pair
            nk_first, nk_second = _load_pair(qkv, new + (H + kv) * 2 * HALF, inside, HALF)
            nk_first, nk_second = _normal(nk_first, nk_second, k_scale, pair, HALF, EPS)
            # As the slots will hold it.
            nk_first = nk_first.to(keys.dtype.element_ty).to(tl.float32)
            nk_second = nk_second.to(keys.dtype.element_ty).to(tl.float32)
            nv_first, nv_second = _load_pair(qkv, new + (H + KV + kv) * 2 * HALF, inside, HALF)
            if COMMITS and frame == 0:
                at, turns, seen = tl.load(before_slot), before_turns, before_seen
                place = held + at * 2 * HALF + pair
                tl.store(keys + place, nk_first.to(keys.dtype.element_ty), mask=inside)
                tl.store(keys + place + HALF, nk_second.to(keys.dtype.element_ty), mask=inside)
                tl.store(values + place, nv_first.to(values.dtype.element_ty), mask=inside)
                tl.store(values + place + HALF, nv_second.to(values.dtype.element_ty), mask=inside)
            else:
                at, turns, seen = tl.load(now_slot), now_turns, now_seen
            # A later version of the frame now takes the same slot, so nothing is to be put back.
            k_first, k_second = (
                tl.where(slot == at, nk_first, k_first),
                tl.where(slot == at, nk_second, k_second),
            )
            v_first, v_second = (
                tl.where(slot == at, nv_first, v_first),
                tl.where(slot == at, nv_second, v_second),
            )
            cos, sin = _load_pair(turns, (1 + slot) * 2 * HALF + pair, slot < num_slots, HALF)
            t_first, t_second = _turn(k_first, k_second, cos, sin)
            q_cos, q_sin = _load_pair(turns, pair, pair < HALF, HALF)
            member = tl.arange(0, HEADS)[:, None]
            head, mine = kv * (H // KV) + member, (member < H // KV) & is_one
            q_first, q_second = _load_pair(qkv, new + head * 2 * HALF, mine, HALF)
            q_first, q_second = _normal(q_first, q_second, q_scale, pair, HALF, EPS)
            q_first, q_second = _turn(q_first, q_second, q_cos, q_sin)
            like = qkv.dtype.element_ty
            scores = _product(q_first.to(like), tl.trans(t_first.to(like)), WIDE)
            scores += _product(q_second.to(like), tl.trans(t_second.to(like)), WIDE)
            visible = tl.load(seen + column, mask=column < num_slots, other=0) != 0
            scores = tl.where(visible, scores * SCALE, float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            weights = (weights / tl.sum(weights, 1)[:, None]).to(like)
            mixed = (row * H + head) * 2 * HALF + pair
            first = _product(weights, v_first.to(like), WIDE)
            second = _product(weights, v_second.to(like), WIDE)
            tl.store(out + mixed, first.to(out.dtype.element_ty), mask=mine)
            tl.store(out + mixed + HALF, second.to(out.dtype.element_ty), mask=mine)


def ring_attention(
    qkv_BFNY: Tensor,
    query_scale_d: Tensor,
    key_scale_d: Tensor,
    now: tuple[Tensor, Tensor, Tensor],
    before: tuple[Tensor, Tensor, Tensor],
    key_GhWd: Tensor,
    value_GhWd: Tensor,
    *,
    commits: bool,
) -> Tensor:
    """Each token attends to its own past in the slots: mixed heads [B, F, N, D].

    Each new frame takes its slot while it looks, as `StreamedDiT` says. With `commits` the first one takes
    the slot of `before` and stays, which changes `key_GhWd` (normalised, not turned) and `value_GhWd`
    (G = B N); the others are versions of the frame `now` and leave nothing. now, before: the slot [1], angles
    [1 + W, d] and slots in sight [1, W] of an `Instant`. At most `MOST_SLOTS` slots.
    """
    batch, frames, tokens, _ = qkv_BFNY.shape
    sequences, num_kv_heads, slots, dims = key_GhWd.shape
    num_heads = qkv_BFNY.shape[-1] // dims - 2 * num_kv_heads
    assert slots <= MOST_SLOTS
    assert sequences == batch * tokens
    qkv_BFNY = qkv_BFNY.contiguous()
    out = qkv_BFNY.new_empty(batch, frames, tokens, num_heads * dims)
    together = 4 if sequences * num_kv_heads >= 64 * FILLS_A_GPU else 1
    _ring_attention_kernel[(triton.cdiv(sequences, together) * num_kv_heads,)](  # type: ignore[index]
        qkv_BFNY, query_scale_d, key_scale_d, *now, *before, key_GhWd, value_GhWd, out,
        sequences, tokens, slots,
        F=frames, COMMITS=commits, H=num_heads, KV=num_kv_heads, HALF=dims // 2,
        # Matrix units multiply tiles of 16.
        SLOTS=max(16, triton.next_power_of_2(slots)),
        HEADS=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        SEQUENCES=together, SCALE=LOG2_E * dims**-0.5, EPS=EPS, WIDE=INTERPRETED, num_warps=2,
    )  # fmt: skip
    return out
