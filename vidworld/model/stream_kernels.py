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
from typing import NamedTuple

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
def _softmax_step(scores, v, most, total, mixed, WIDE: tl.constexpr):
    """One step of the running softmax to base 2 (arXiv 2205.14135, algorithm 1)."""
    new_most = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - new_most[:, None])
    fade = tl.exp2(most - new_most)
    total = total * fade + tl.sum(weights, 1)
    mixed = mixed * fade[:, None] + _product(weights.to(v.dtype), v, WIDE)
    return new_most, total, mixed


@triton.jit
def _look(q_first, q_second, k_first, k_second, v, key, most, total, mixed, length,
          SCALE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A step over a block of keys."""
    scores = _scores(q_first, q_second, k_first, k_second, key, length, SCALE, WIDE)
    return _softmax_step(scores, v, most, total, mixed, WIDE)


@triton.jit
def _frame_attention_kernel(
    qkv, q_scale, k_scale, cos, sin, out, length, splits,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, REST: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Some tiles of the queries that share a key-value head; rows are (head, token).

    Keys come in BLOCKS of KEYS, and a smaller block of REST if any.
    """
    split, kv = tl.program_id(0) % splits, (tl.program_id(0) // splits) % KV
    sequence = (tl.program_id(0) // splits // KV).to(tl.int64)
    qkv += sequence * length * (H + 2 * KV) * 2 * HALF
    out += sequence * length * H * 2 * HALF
    dims = tl.arange(0, 2 * HALF)[None, :]
    if BLOCKS == 1:
        key = tl.arange(0, KEYS)
        k_first, k_second, v = _keys(qkv, key, kv, length, k_scale, cos, sin, H, KV, HALF, EPS)
    if REST > 0:
        rest = BLOCKS * KEYS + tl.arange(0, REST)
        r_first, r_second, r_v = _keys(qkv, rest, kv, length, k_scale, cos, sin, H, KV, HALF, EPS)
    for tile in range(TILES):
        index = (split * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        head, token = kv * (H // KV) + index // length, index % length
        live = index < (H // KV) * length
        offset = (token * (H + 2 * KV) + head) * 2 * HALF
        q_first, q_second = _head(qkv, offset, token, live, q_scale, cos, sin, HALF, EPS)
        if BLOCKS == 1:
            scores = _scores(q_first, q_second, k_first, k_second, key, length, SCALE, WIDE)
            most = tl.max(scores, 1)
            if REST > 0:
                others = _scores(q_first, q_second, r_first, r_second, rest, length, SCALE, WIDE)
                most = tl.maximum(most, tl.max(others, 1))
            weights = tl.exp2(scores - most[:, None])
            total = tl.sum(weights, 1)
            mixed = _product(weights.to(v.dtype), v, WIDE)
            if REST > 0:
                weights = tl.exp2(others - most[:, None])
                total += tl.sum(weights, 1)
                mixed += _product(weights.to(v.dtype), r_v, WIDE)
        else:
            most = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, 2 * HALF], tl.float32)
            for block in range(BLOCKS):
                key = block * KEYS + tl.arange(0, KEYS)
                k_first, k_second, v = _keys(qkv, key, kv, length, k_scale, cos, sin, H, KV, HALF, EPS)
                most, total, mixed = _look(q_first, q_second, k_first, k_second, v, key, most, total, mixed,
                                           length, SCALE, WIDE)  # fmt: skip
            if REST > 0:
                most, total, mixed = _look(q_first, q_second, r_first, r_second, r_v, rest, most, total,
                                           mixed, length, SCALE, WIDE)  # fmt: skip
        mixed = mixed / total[:, None]
        tl.store(out + (token * H + head) * 2 * HALF + dims, mixed.to(out.dtype.element_ty), mask=live)


class FrameTiles(NamedTuple):
    """How `frame_attention` is cut into programs."""

    rows: int
    """Queries of a tile."""
    splits: int
    """Programs that share the queries of one key-value head of one sequence."""
    keys: int
    """Keys of a block."""
    num_warps: int
    num_stages: int = 2

    def of_keys(self, length: int) -> tuple[int, int]:
        """Whole blocks, and the size of the smaller one that follows, or 0."""
        blocks, left = divmod(length, self.keys)
        rest = max(16, triton.next_power_of_2(left)) if left else 0
        return (blocks + 1, 0) if rest >= self.keys or not blocks else (blocks, rest)


def frame_tiles(heads: int, queries: int, length: int) -> FrameTiles:
    """By key-value heads of all sequences, queries of each, and keys of each.

    With few heads their queries go to many programs, each of which prepares the keys anew; with many, keys
    are prepared once.
    """
    block = max(16, triton.next_power_of_2(length + 1) // 2)
    if heads >= FILLS_A_GPU:
        return FrameTiles(64, 1, min(64, block), 4)
    rows = 64 if heads * triton.cdiv(queries, 64) >= FILLS_A_GPU else 32
    return FrameTiles(rows, triton.cdiv(queries, rows), min(128, block), 4, num_stages=1)


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
    tiles = frame_tiles(groups * num_kv_heads, queries, length)
    blocks, rest = tiles.of_keys(length)
    wrap_triton(_frame_attention_kernel)[(groups * num_kv_heads * tiles.splits,)](  # type: ignore[index]
        qkv_GnY, query_scale_d, key_scale_d, cos_nd, sin_nd, out, length, tiles.splits,
        H=num_heads, KV=num_kv_heads, HALF=dims // 2, ROWS=tiles.rows, KEYS=tiles.keys,
        BLOCKS=blocks, REST=rest, TILES=triton.cdiv(queries, tiles.rows * tiles.splits),
        SCALE=LOG2_E * dims**-0.5, EPS=EPS, WIDE=INTERPRETED,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


@triton.jit
def _ring_attention_kernel(
    qkv, q_scale, k_scale, now_slot, now_turns, now_seen, before_slot, before_turns, before_seen,
    keys, values, out, num_sequences, num_tokens, num_slots,
    F: tl.constexpr, COMMITS: tl.constexpr, UNREAD: tl.constexpr, H: tl.constexpr, KV: tl.constexpr,
    HALF: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One key-value head of a few tokens: their slots are read once, and one product serves all queries.

    Rows of queries are (sequence, head), rows of keys (sequence, slot); none sees another sequence's.
    """
    kv = tl.program_id(0) % KV
    first_sequence = ((tl.program_id(0) // KV) * SEQUENCES).to(tl.int64)
    pair, dims = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
    key = tl.arange(0, SEQUENCES * SLOTS)
    slot, sequence = (key % SLOTS)[:, None], first_sequence + (key // SLOTS)[:, None]
    live = (slot < num_slots) & (sequence < num_sequences)
    held = ((sequence * KV + kv) * num_slots + slot) * 2 * HALF
    k_first = tl.load(keys + held + pair, mask=live, other=0.0)
    k_second = tl.load(keys + held + HALF + pair, mask=live, other=0.0)
    v = tl.load(values + held + dims, mask=live, other=0.0)
    k_batch, k_token = sequence // num_tokens, sequence % num_tokens
    row = tl.arange(0, ROWS)
    member, of_row = (row % HEADS)[:, None], row // HEADS % SEQUENCES
    mine = (member < H // KV) & (row < SEQUENCES * HEADS)[:, None]
    mine = mine & (first_sequence + of_row[:, None] < num_sequences)
    q_batch = (first_sequence + of_row[:, None]) // num_tokens
    q_token = (first_sequence + of_row[:, None]) % num_tokens
    together = of_row[:, None] == (key // SLOTS)[None, :]
    for frame in tl.static_range(F):
        if COMMITS and frame == 0:
            at, turns, seen = tl.load(before_slot), before_turns, before_seen
        else:
            at, turns, seen = tl.load(now_slot), now_turns, now_seen
        # A later version of the frame now takes the same slot, so nothing is to be put back.
        takes = (slot == at) & live
        new = ((k_batch * F + frame) * num_tokens + k_token) * (H + 2 * KV) * 2 * HALF
        nk_first, nk_second = _load_pair(qkv, new + (H + kv) * 2 * HALF + pair, takes, HALF)
        nk_first, nk_second = _normal(nk_first, nk_second, k_scale, pair, HALF, EPS)
        nv = tl.load(qkv + new + (H + KV + kv) * 2 * HALF + dims, mask=takes, other=0.0)
        # As the slots will hold it.
        k_first = tl.where(takes, nk_first.to(k_first.dtype), k_first)
        k_second = tl.where(takes, nk_second.to(k_second.dtype), k_second)
        v = tl.where(takes, nv.to(v.dtype), v)
        if COMMITS and frame == 0:
            tl.store(keys + held + pair, k_first, mask=takes)
            tl.store(keys + held + HALF + pair, k_second, mask=takes)
            tl.store(values + held + dims, v, mask=takes)
        if frame >= UNREAD:
            cos, sin = _load_pair(turns, (1 + slot) * 2 * HALF + pair, slot < num_slots, HALF)
            t_first, t_second = _turn(k_first.to(tl.float32), k_second.to(tl.float32), cos, sin)
            q_cos, q_sin = _load_pair(turns, pair, pair < HALF, HALF)
            head = kv * (H // KV) + member
            asked = (q_batch * F + frame) * num_tokens + q_token
            asked = (asked * (H + 2 * KV) + head) * 2 * HALF
            q_first, q_second = _load_pair(qkv, asked + pair, mine, HALF)
            q_first, q_second = _normal(q_first, q_second, q_scale, pair, HALF, EPS)
            q_first, q_second = _turn(q_first, q_second, q_cos, q_sin)
            like = qkv.dtype.element_ty
            scores = _product(q_first.to(like), tl.trans(t_first.to(like)), WIDE)
            scores += _product(q_second.to(like), tl.trans(t_second.to(like)), WIDE)
            visible = tl.load(seen + key % SLOTS, mask=key % SLOTS < num_slots, other=0) != 0
            scores = tl.where(together & visible[None, :], scores * SCALE, float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            weights = (weights / tl.sum(weights, 1)[:, None]).to(like)
            mixed = _product(weights, v.to(like), WIDE)
            answer = (q_batch * (F - UNREAD) + frame - UNREAD) * num_tokens + q_token
            answer = (answer * H + head) * 2 * HALF
            tl.store(out + answer + dims, mixed.to(out.dtype.element_ty), mask=mine)


class RingTiles(NamedTuple):
    """How `ring_attention` is cut into programs."""

    sequences: int
    """Tokens of a program."""
    num_warps: int


def ring_tiles(heads: int, slots: int) -> RingTiles:
    """By padded query heads of a key-value head, and padded slots.

    Matrix units multiply tiles of 16 rows. Tokens that fill half of one were fastest on an H100, from 262 to
    17,920 sequences: more keep too much in registers.
    """
    return RingTiles(max(1, min(8 // heads, 64 // slots)), 4)


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
    unread: bool = False,
) -> Tensor:
    """Each token attends to its own past in the slots: mixed heads [B, F, N, D].

    Each new frame takes its slot while it looks, as `StreamedDiT` says. With `commits` the first one takes
    the slot of `before` and stays, which changes `key_GhWd` (normalised, not turned) and `value_GhWd`
    (G = B N); the others are versions of the frame `now` and leave nothing. With `unread` the first one does
    not look: F - 1 frames come out. now, before: the slot [1], angles [1 + W, d] and slots in sight [1, W] of
    an `Instant`. At most `MOST_SLOTS` slots.
    """
    batch, frames, tokens, _ = qkv_BFNY.shape
    sequences, num_kv_heads, slots, dims = key_GhWd.shape
    num_heads = qkv_BFNY.shape[-1] // dims - 2 * num_kv_heads
    assert slots <= MOST_SLOTS
    assert sequences == batch * tokens
    assert commits or not unread
    qkv_BFNY = qkv_BFNY.contiguous()
    out = qkv_BFNY.new_empty(batch, frames - unread, tokens, num_heads * dims)
    heads, padded = triton.next_power_of_2(num_heads // num_kv_heads), triton.next_power_of_2(slots)
    together, num_warps = ring_tiles(heads, padded)
    # Matrix units multiply tiles of 16.
    padded = max(padded, 16 // together)
    _ring_attention_kernel[(triton.cdiv(sequences, together) * num_kv_heads,)](  # type: ignore[index]
        qkv_BFNY, query_scale_d, key_scale_d, *now, *before, key_GhWd, value_GhWd, out,
        sequences, tokens, slots,
        F=frames, COMMITS=commits, UNREAD=int(unread), H=num_heads, KV=num_kv_heads, HALF=dims // 2,
        SLOTS=padded, HEADS=heads, SEQUENCES=together, ROWS=max(16, together * heads),
        SCALE=LOG2_E * dims**-0.5, EPS=EPS, WIDE=INTERPRETED, num_warps=num_warps,
    )  # fmt: skip
    return out
