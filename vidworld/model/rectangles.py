"""Attention over visible rectangles only: every piece is attended without a mask, and pieces are merged.

A softmax over a union of key sets is the mean of the softmaxes over the sets, weighted by exp of their
log-sum-exps (online softmax, arXiv 1805.02867; as in ring attention, arXiv 2310.01889). Frame-causal
attention is made of rectangles that all queries of a piece see whole, so that kernels which know no mask, or
run faster without one, can do it. The gradient calls each piece's kernel with the merged output and
log-sum-exp: exp(score - log-sum-exp) is then the weight among all keys.

Shapes: B batch, H query heads, h key-value heads, g = H / h, T queries, S keys, D head dims, R rows gathered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

aten: Any = torch.ops.aten

Kernel = Literal["cpu", "cudnn", "flash", "math"]


class StreamSizes(NamedTuple):
    """The numbers that describe `inputs.Streams` of `tokens` tokens a frame."""

    context: int
    targets: int
    past: int
    tokens: int = 1


class Piece(NamedTuple):
    """Rectangles of one size: queries [start, start + num_queries) see keys [start, start + num_keys).

    No query is in two of them. In a causal piece (a square) query i sees keys up to i.
    """

    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    num_queries: int
    num_keys: int
    causal: bool = False


@functools.lru_cache(maxsize=64)
def cover(sizes: StreamSizes) -> tuple[Piece, ...]:
    """Pieces that cover what is visible in `sizes` exactly once; the first has all queries.

    Every frame sees itself: squares on the diagonal. Frames of all streams see the context before them: a
    triangle without its diagonal, halved again and again into rectangles, which all streams share.
    """
    frames, tokens, past = sizes.context, sizes.tokens, sizes.past
    queries = range(frames * (1 + sizes.targets))
    starts = tuple(query * tokens for query in queries)
    pieces = [Piece(starts, tuple((past + query) * tokens for query in queries), tokens, tokens)]
    if past:
        pieces.append(Piece((0,), (0,), len(queries) * tokens, past * tokens))
    streams = range(1 + sizes.targets)
    if tokens == 1:
        if frames > 1:
            first = tuple(stream * frames + 1 for stream in streams)
            pieces.append(Piece(first, (past,) * len(first), frames - 1, frames - 1, causal=True))
        return tuple(pieces)
    spans = [(0, frames)]
    while spans:
        rectangles: dict[tuple[int, int], list[tuple[int, int]]] = {}
        halves = []
        for start, stop in spans:
            if stop - start > 1:
                middle = (start + stop) // 2
                rectangles.setdefault((stop - middle, middle - start), []).append((middle, start))
                halves += [(start, middle), (middle, stop)]
        for (rows, columns), corners in rectangles.items():
            pieces.append(
                Piece(
                    tuple((stream * frames + query) * tokens for stream in streams for query, _ in corners),
                    tuple((past + key) * tokens for _ in streams for _, key in corners),
                    rows * tokens,
                    columns * tokens,
                )
            )
        spans = halves
    return tuple(pieces)


def rectangle_attention(q_BHTD: Tensor, k_BhSD: Tensor, v_BhSD: Tensor, sizes: StreamSizes) -> Tensor:
    """Softmax attention of the streams that `sizes` describes [B, H, T, D]; differentiable once, compiles."""
    return _attention(q_BHTD, k_BhSD, v_BhSD, list(sizes))[0]


@torch.library.custom_op("vidworld::rectangle_attention", mutates_args=())
def _attention(q_BHTD: Tensor, k_BhSD: Tensor, v_BhSD: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The output in q's dtype, and the log-sum-exp [B, H, T] of all scores of a query."""
    kernel = kernel_for(q_BHTD.device.type, q_BHTD.dtype, q_BHTD.shape[-1])
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    out, total = q_BHTD.new_empty(0), q_BHTD.new_empty(0)
    for number, piece in enumerate(cover(StreamSizes(*sizes))):
        query_rows, key_rows = _rows(piece, q_BHTD.device)
        q, k, v = _cut(q_BHTD, query_rows, piece), *_keys(k_BhSD, v_BhSD, key_rows, piece, q_BHTD)
        part, lse = _joined(*_forward(kernel, q, k, v, piece), piece, q_BHTD)
        if number == 0:  # all queries, in order
            out, total = part.to(wide).contiguous(), lse.to(wide).contiguous()
            continue
        before = total.index_select(2, query_rows)
        after = torch.logaddexp(before, lse)
        kept = out.index_select(2, query_rows) * (before - after).exp()[..., None]
        out.index_copy_(2, query_rows, kept + part * (lse - after).exp()[..., None])
        total.index_copy_(2, query_rows, after)
    return out.to(q_BHTD.dtype), total


@_attention.register_fake
def _(q_BHTD: Tensor, k_BhSD: Tensor, v_BhSD: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    return q_BHTD.new_empty(q_BHTD.shape), q_BHTD.new_empty(q_BHTD.shape[:-1], dtype=wide)


@torch.library.custom_op("vidworld::rectangle_attention_backward", mutates_args=())
def _attention_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BhSD: Tensor,
    v_BhSD: Tensor,
    out_BHTD: Tensor,
    total_BHT: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_for(q_BHTD.device.type, q_BHTD.dtype, q_BHTD.shape[-1])
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    sums = [
        torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in (q_BHTD, k_BhSD, v_BhSD)
    ]
    for piece in cover(StreamSizes(*sizes)):
        query_rows, key_rows = _rows(piece, q_BHTD.device)
        grad, q, out = (_cut(tensor, query_rows, piece) for tensor in (grad_BHTD, q_BHTD, out_BHTD))
        lse = _cut(total_BHT[..., None], query_rows, piece)[..., 0]
        k, v = _keys(k_BhSD, v_BhSD, key_rows, piece, q_BHTD)
        dq, dk, dv = _backward(kernel, grad, q, k, v, out, lse, piece)
        sums[0].index_add_(2, query_rows, _joined(dq, lse, piece, q_BHTD)[0].to(wide))
        for total, part in ((sums[1], dk), (sums[2], dv)):
            total.index_add_(2, key_rows, _joined_keys(part.to(wide), piece, k_BhSD))
    return sums[0].to(q_BHTD.dtype), sums[1].to(k_BhSD.dtype), sums[2].to(v_BhSD.dtype)


@_attention_backward.register_fake
def _(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BhSD: Tensor,
    v_BhSD: Tensor,
    out_BHTD: Tensor,
    total_BHT: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor.new_empty(tensor.shape) for tensor in (q_BHTD, k_BhSD, v_BhSD))
    return q, k, v


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHTD, k_BhSD, v_BhSD, ctx.sizes = inputs
    ctx.save_for_backward(q_BHTD, k_BhSD, v_BhSD, *output)


def _gradient(ctx: Any, grad_BHTD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad_BHTD, *ctx.saved_tensors, ctx.sizes), None)


_attention.register_autograd(_gradient, setup_context=_remember)


@functools.lru_cache(maxsize=256)
def _rows(piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the queries and of the keys of all rectangles, one after another."""
    with torch.inference_mode(False):
        return tuple(
            (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).flatten()
            for starts, length in (
                (piece.query_starts, piece.num_queries),
                (piece.key_starts, piece.num_keys),
            )
        )  # type: ignore[return-value]


def _cut(x_BHTD: Tensor, rows_R: Tensor, piece: Piece) -> Tensor:
    """One batch row for each rectangle: [B * rectangles, H, n, D]."""
    x_BHRD = x_BHTD.index_select(2, rows_R)
    return x_BHRD.unflatten(2, (len(piece.query_starts), -1)).movedim(2, 1).flatten(0, 1)


def _keys(k_BhSD: Tensor, v_BhSD: Tensor, rows_R: Tensor, piece: Piece, q_BHTD: Tensor) -> list[Tensor]:
    """Keys and values of each rectangle, once for each query head."""
    groups = q_BHTD.shape[1] // k_BhSD.shape[1]
    cuts = [_cut(tensor, rows_R, piece) for tensor in (k_BhSD, v_BhSD)]
    return [cut.repeat_interleave(groups, 1) if groups > 1 else cut for cut in cuts]


def _joined(part: Tensor, lse: Tensor, piece: Piece, q_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    """Rectangles one after another again: [B, H, R, D] and [B, H, R]."""
    shape = (q_BHTD.shape[0], len(piece.query_starts))
    part_BHRD = part.unflatten(0, shape).movedim(1, 2).flatten(2, 3)
    return part_BHRD, lse.unflatten(0, shape).movedim(1, 2).flatten(2, 3)


def _joined_keys(part: Tensor, piece: Piece, k_BhSD: Tensor) -> Tensor:
    """Gradients of keys or values, summed over the query heads that read them: [B, h, R, D]."""
    batch, heads = k_BhSD.shape[:2]
    part = part.unflatten(1, (heads, -1)).sum(2)
    return part.unflatten(0, (batch, len(piece.key_starts))).movedim(1, 2).flatten(2, 3)


def _forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    if piece.num_queries == piece.num_keys == 1:
        return v, (q * k).sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) / q.shape[-1] ** 0.5
    return KERNELS[kernel][0](q, k, v, piece.causal)


def _backward(
    kernel: Kernel, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> tuple[Tensor, Tensor, Tensor]:
    if piece.num_queries == piece.num_keys == 1:
        return _math_backward(grad, q, k, v, out, lse, False)
    return KERNELS[kernel][1](grad, q, k, v, out, lse, piece.causal)


def _math_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(scores)).to(q.dtype), lse


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, causal)
    grad, v, out, q, k = (tensor.to(scores) for tensor in (grad, v, out, q, k))
    weights = (scores - lse[..., None]).exp()
    d_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return d_scores @ k, d_scores.mT @ q, weights.mT @ grad


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(2, dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        *(grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal),
        *(unused, unused),
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.view(q.shape[:3])


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, q, k, v, out, lse.contiguous()[..., None], unused, unused, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, causal),
    )


KERNELS: dict[Kernel, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_cpu_forward, _cpu_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "flash": (_flash_forward, _flash_backward),
    "math": (_math_forward, _math_backward),
}


@functools.lru_cache(maxsize=16)
def kernel_for(device_type: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The first kernel that runs here and agrees with the definition, forward and backward."""
    if device_type == "cpu":
        return "cpu"
    fused: tuple[Kernel, ...] = ("cudnn", "flash") if dtype.itemsize == 2 else ()
    for name in fused:
        if fault_of(name, device_type, dtype, head_dim) is None:
            return name
    return "math"


def fault_of(kernel: Kernel, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with a kernel for a square, causal or not: None, or why it cannot be used."""
    device = torch.device(device_type)
    try:
        for causal in (False, True):
            wave = torch.arange(4 * 2 * 2 * 96 * head_dim, device=device, dtype=torch.float64).mul(0.37).sin()
            q, k, v, grad = wave.to(dtype).view(4, 2, 2, 96, head_dim)
            out, lse = KERNELS[kernel][0](q, k, v, causal)
            exact = [tensor.double() for tensor in (q, k, v)]
            expected = _math_forward(*exact, causal)
            got = [out, lse, *KERNELS[kernel][1](grad, q, k, v, out, lse, causal)]
            wanted = [*expected, *_math_backward(grad.double(), *exact, *expected, causal)]
            for one, other in zip(got, wanted, strict=True):
                deviation = float((one.double() - other.double()).abs().max())
                scale = float(other.abs().max()) + 1
                if not deviation < (0.03 if dtype.itemsize == 2 else 1e-3) * scale:
                    return f"wrong by {deviation:.2g} against the definition"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
