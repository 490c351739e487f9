"""Attention behind one function, with the backends that run on this machine.

Shapes: B batch, H query heads, h key-value heads (H is a multiple of h), T queries, S keys, D head dims.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vidworld.errors import ConfigError, require
from vidworld.model.rectangles import StreamSizes, rectangle_attention

Backend = Literal["auto", "sdpa", "flex", "rectangles", "xformers"]

# Fused kernels lay the batch along a CUDA grid axis of this length; thousands of environments exceed it.
MAX_KERNEL_BATCH = 65_535
# On an H100, sdpa with a dense mask of 4,096 x 4,096 ran at half the speed of flex; the mask of a clip of
# a few dozen frames is nothing. Where between them the two cross has not been measured.
LARGE_MASK = 1024 * 1024
# Who computes large masks on CUDA: the first that runs. Rectangles come first once they are measured faster.
LARGE_MASK_ORDER: tuple["Backend", ...] = ("flex", "rectangles", "sdpa")


class Choice(NamedTuple):
    """A backend that runs here, and why it."""

    backend: "Backend"
    reason: str


class Pattern(Protocol):
    """A hashable rule of who sees whom, for backends that would rather not read a dense mask."""

    @property
    def num_queries(self) -> int: ...
    @property
    def num_keys(self) -> int: ...
    @property
    def all_visible(self) -> bool: ...
    @property
    def sizes(self) -> StreamSizes: ...
    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether query index sees key index (integer tensors that broadcast)."""
        ...


def attend(
    q_BHTD: Tensor,
    k_BhSD: Tensor,
    v_BhSD: Tensor,
    mask: Tensor | BlockMask | StreamSizes | Pattern | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention with grouped queries: [B, H, T, D].

    Query head i reads key-value head i // (H / h). `mask` is None (all see all), bool [T, S] (True =
    visible), bool [B, 1, 1, S] (the keys that all queries of a row see; sdpa only), a `Pattern`, or what
    `prepare_mask` made of one. Every query must see at least one key. A backend that does not run here warns
    and falls back to sdpa; inside a compiled region, where nothing can be probed, pass what `resolve_backend`
    answered.
    """
    if not torch.compiler.is_compiling():
        size = q_BHTD.shape[2] * k_BhSD.shape[2]
        backend = resolve_backend(backend, q_BHTD.device, q_BHTD.dtype, 0 if mask is None else size)
        mask = prepare_mask(mask, backend, q_BHTD.device)
    match backend:
        case "sdpa":
            assert mask is None or isinstance(mask, Tensor)
            return _ungroup(_sdpa, q_BHTD, k_BhSD, v_BhSD, mask)
        case "xformers":
            assert mask is None or isinstance(mask, Tensor)
            return _ungroup(_xformers, q_BHTD, k_BhSD, v_BhSD, mask)
        case "flex":
            return _flex()(q_BHTD, k_BhSD, v_BhSD, block_mask=mask, enable_gqa=True)
        case "rectangles":
            if mask is None:
                return _ungroup(_sdpa, q_BHTD, k_BhSD, v_BhSD, None)
            if not isinstance(mask, StreamSizes):
                raise ConfigError(
                    "mask for attention backend 'rectangles'", got="a tensor", expected="a Pattern"
                )
            return rectangle_attention(q_BHTD, k_BhSD, v_BhSD, mask)
    raise ConfigError("attention backend", got=backend, expected=" | ".join(get_args(Backend)))


def resolve_backend(backend: Backend, device: torch.device, dtype: torch.dtype, mask_size: int) -> Backend:
    """The backend of `choose_attention`; warns where it is not the one that was asked for."""
    choice = choose_attention(backend, device, dtype, mask_size)
    if backend not in ("auto", choice.backend):
        warnings.warn(
            f"attention backend {backend!r} does not run here, using {choice.backend}: {choice.reason}",
            stacklevel=2,
        )
    return choice.backend


def choose_attention(backend: Backend, device: torch.device, dtype: torch.dtype, mask_size: int) -> Choice:
    """The concrete backend to use for a mask of `mask_size` = queries x keys (0: no mask), and why.

    auto is sdpa, except that a mask of LARGE_MASK entries or more on CUDA goes to the first of
    LARGE_MASK_ORDER that runs: these skip what is hidden instead of reading it. Time attention over a clip is
    far below that. A backend asked for by name that does not run gives sdpa, and its fault as the reason.
    """
    if backend not in get_args(Backend):
        raise ConfigError("attention backend", got=backend, expected=" | ".join(get_args(Backend)))
    if backend == "sdpa":
        return Choice(backend, "as configured")
    if backend != "auto":
        fault = probe(backend, device.type, dtype, torch.is_grad_enabled())
        return Choice(backend, "as configured") if fault is None else Choice("sdpa", fault)
    if mask_size == 0:
        return Choice("sdpa", "all see all, which its fused kernels do without a mask")
    if device.type != "cuda":
        return Choice("sdpa", f"its kernel reads a mask on {device.type}")
    if mask_size < LARGE_MASK:
        return Choice("sdpa", f"a mask of {mask_size:,} entries is small enough to be read")
    faults = []
    for name in LARGE_MASK_ORDER:
        fault = None if name == "sdpa" else probe(name, device.type, dtype, torch.is_grad_enabled())
        if fault is None:
            why = f"a mask of {mask_size:,} entries is large, and {name} skips what is hidden"
            return Choice(name, "; ".join([why if name != "sdpa" else "nothing else runs here", *faults]))
        faults.append(f"{name} does not run here: {fault}")
    raise AssertionError("sdpa is always there")


def prepare_mask(
    mask: Tensor | BlockMask | StreamSizes | Pattern | None, backend: Backend, device: torch.device
) -> Tensor | BlockMask | StreamSizes | None:
    """Bring a mask into the form that a concrete backend takes; what is already in it passes through."""
    if mask is None or isinstance(mask, BlockMask | StreamSizes):
        return mask
    if isinstance(mask, Tensor):
        return _block_mask_of(mask) if backend == "flex" else mask
    if mask.all_visible:
        return None
    if backend == "rectangles":
        return mask.sizes
    return _block_mask(mask, device) if backend == "flex" else dense_mask(mask, device)


def dense_mask(pattern: Pattern, device: torch.device) -> Tensor:
    """The bool mask [T, S] of a pattern."""
    queries = torch.arange(pattern.num_queries, device=device)[:, None]
    return pattern.visible(queries, torch.arange(pattern.num_keys, device=device))


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The backends whose probe succeeds on this device and dtype."""
    names: tuple[Backend, ...] = ("sdpa", "flex", "rectangles", "xformers")
    return tuple(name for name in names if probe(name, torch.device(device).type, dtype) is None)


@functools.lru_cache(maxsize=64)
def probe(backend: Backend, device_type: str, dtype: torch.dtype, backward: bool = True) -> str | None:
    """Run one small masked, grouped attention, and its gradient: None if right, else what went wrong.

    Importing proves nothing: wheels import and then refuse every operator, and a kernel may take a mask and
    ignore it. The inputs are fixed, so that no random state moves.
    """
    device = torch.device(device_type)
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(backward),
        torch.autocast(device_type, enabled=False),
    ):
        try:
            wave = torch.arange(8 * 16 * 32, device=device, dtype=torch.float64).mul(0.37).sin()
            q, k, v = (
                wave[start : start + heads * 16 * 32]
                .view(1, heads, 16, 32)
                .to(dtype)
                .requires_grad_(backward)
                for heads, start in ((4, 0), (2, 512), (2, 2048))
            )
            mask = torch.ones(16, 16, dtype=torch.bool, device=device).tril()
            match backend:
                case "sdpa":
                    out = _ungroup(_sdpa, q, k, v, mask)
                case "xformers":
                    out = _ungroup(_xformers, q, k, v, mask)
                case "flex":
                    out = _flex()(q, k, v, block_mask=_block_mask_of(mask), enable_gqa=True)
                case "rectangles":
                    out = rectangle_attention(q, k, v, StreamSizes(context=16, targets=0, past=0))
                case _:
                    raise ConfigError("attention backend", got=backend)
            expected = reference(q, k, v, mask)
            pairs = [(out, expected)]
            if backward:
                gradients = [torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected)]
                pairs.append((gradients[0], gradients[1]))
            deviation = max(float((got - want).detach().abs().max()) for got, want in pairs)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    tolerance = 0.05 if dtype.itemsize == 2 else 1e-3
    return None if deviation < tolerance else f"wrong by {deviation:.2g} against the definition"


def reference(q_BHTD: Tensor, k_BhSD: Tensor, v_BhSD: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Attention by its definition (arXiv 1706.03762, eq. 1) in float64, which backends are held to."""
    groups = q_BHTD.shape[1] // k_BhSD.shape[1]
    q, k, v = q_BHTD.double(), k_BhSD.double(), v_BhSD.double()
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return scores.softmax(-1) @ v


def _ungroup(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q_BHTD: Tensor,
    k_BhSD: Tensor,
    v_BhSD: Tensor,
    mask_TS: Tensor | None,
) -> Tensor:
    """Run grouped queries on a kernel that knows nothing of groups, by laying the group along the queries.

    Keys and values are read once per group and never copied, and short time axes make fuller tiles.
    """
    batch, heads, num_queries, dims = q_BHTD.shape
    kv_heads = k_BhSD.shape[1]
    groups = heads // kv_heads
    if mask_TS is not None and mask_TS.ndim == 2 and groups > 1:
        mask_TS = mask_TS.repeat(groups, 1)
    q = q_BHTD.reshape(batch, kv_heads, groups * num_queries, dims)
    return kernel(q, k_BhSD, v_BhSD, mask_TS).reshape(batch, heads, num_queries, dims)


def _sdpa(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    if q_BHTD.shape[0] <= MAX_KERNEL_BATCH:
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)
    parts = zip(*(tensor.split(MAX_KERNEL_BATCH) for tensor in (q_BHTD, k_BHSD, v_BHSD)), strict=True)
    if mask_TS is None or mask_TS.ndim == 2:
        return torch.cat([F.scaled_dot_product_attention(*part, attn_mask=mask_TS) for part in parts])
    masks = mask_TS.split(MAX_KERNEL_BATCH)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*part, attn_mask=mask)
            for part, mask in zip(parts, masks, strict=True)
        ]
    )


def _xformers(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    ops: Any = require("xformers.ops", "xformers")
    bias = None
    if mask_TS is not None:
        # Its kernels want rows of the bias aligned to 8 entries and the bias expanded over batch and heads.
        rows, columns = mask_TS.shape
        padded = q_BHTD.new_zeros(rows, -(-columns // 8) * 8)[:, :columns]
        bias = padded.masked_fill_(~mask_TS, float("-inf")).expand(*q_BHTD.shape[:2], rows, columns)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BHTD, k_BHSD, v_BHSD))
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def _flex() -> Callable[..., Any]:
    """flex_attention, compiled unless the caller is being compiled; uncompiled it would be dense and slow."""
    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=32)
def _block_mask(pattern: Pattern, device: torch.device) -> BlockMask:
    """Building one costs more than the attention, so each pattern's is built once."""
    with torch.inference_mode(False):
        return create_block_mask(
            lambda batch, head, query, key: pattern.visible(query, key),
            None,
            None,
            pattern.num_queries,
            pattern.num_keys,
            device=str(device),
        )


def _block_mask_of(mask_TS: Tensor) -> BlockMask:
    return create_block_mask(
        lambda batch, head, query, key: mask_TS[query, key],
        None,
        None,
        *mask_TS.shape,
        device=str(mask_TS.device),
    )
