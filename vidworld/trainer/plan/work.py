"""What one optimizer step computes, counted off the model: products, attention, elementwise traffic.

Shapes: rows are clips of a micro-batch, T' frames of all streams, N tokens a frame.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from vidworld.model.dit import CausalDiT
from vidworld.model.flops import forward_flops, visible_pairs
from vidworld.model.inputs import Streams
from vidworld.trainer.plan.hardware import Roofline

# Traffic of a residual branch (norm, modulation, heads, rotation, activation, gate; forward and backward), in
# width bytes a token: what brings the predictions nearest to MEASURED_STEPS and OWN_STEPS together. If
# everything were fused and in bfloat16 it would be 45. A bfloat16 residual stream takes off what it saved of
# a step of 12x384 on an H100 (7 ms of 100); on top of the fused kernels it saved nothing.
BRANCH_BYTES = {"float32": 105, "autocast": 91}
FUSED_BRANCH_BYTES = 78
# Forward and backward of attention take 3.5 times the operations of the forward pass.
ATTENTION_PASSES = 3.5
# Kernels work on tiles of this many queries: a shorter row costs as much.
TILE = 128
# AdamW reads weight, gradient and two moments and writes three of them; clipping reads the gradient; the
# average reads two and writes one; casting to bfloat16 reads 4 bytes and writes 2.
ADAMW_BYTES, NORM_BYTES, EMA_BYTES, CAST_BYTES = 28, 4, 12, 6
# Muon stacks gradients and momenta, interpolates twice, and writes back.
MUON_BYTES = 64
NEWTON_SCHULZ_STEPS = 5


class Product(NamedTuple):
    """Matrix products [m, k] x [k, n] of the forward pass, `times` of them."""

    m: int
    k: int
    n: int
    times: int = 1

    @property
    def flops(self) -> int:
        """Operations of all."""
        return 2 * self.m * self.k * self.n * self.times


class AttentionWork(NamedTuple):
    """`sequences` attentions of all heads over [queries, keys], in `layers` layers."""

    sequences: int
    queries: int
    keys: int
    pairs: int
    """Visible query-key pairs of one sequence."""
    width: int
    head_dim: int
    layers: int
    kind: str
    """Column of the measured table."""

    @property
    def flops(self) -> int:
        """Operations of the forward pass, visible pairs only."""
        return 4 * self.sequences * self.pairs * self.width * self.layers


@dataclass(frozen=True)
class StepWork:
    """One micro-batch, and the optimizer's step after it."""

    products: tuple[Product, ...]
    """In the blocks, once a token."""
    outside: tuple[Product, ...]
    """Everything else: modulation, embeddings, heads."""
    attention: tuple[AttentionWork, ...]
    branch_bytes: int
    """Traffic of elementwise work."""
    num_parameters: int
    matrices: tuple[tuple[int, int], ...] = ()
    """Shapes of what Muon trains."""
    extra_forward: float = 0.0
    """Forward passes without gradient, as a share of one over all rows."""
    checkpointed: bool = False

    @property
    def forward_flops(self) -> int:
        """Operations of one forward pass."""
        parts: Iterable[Product | AttentionWork] = (*self.products, *self.outside, *self.attention)
        return sum(part.flops for part in parts)

    @property
    def model_flops(self) -> float:
        """What utilisation counts: forward, backward and forward passes that the objective needs."""
        return (3 + self.extra_forward) * self.forward_flops


_OF_PATCHES = ("token_embedding.patch", "token_embedding.previous_patch", "patch_head", "copy_head")


def step_work(
    model: CausalDiT,
    streams: Streams,
    rows: int,
    *,
    muon: bool = False,
    extra_forward: float = 0.0,
    checkpointed: bool = False,
    ranks_per_clip: int = 1,
    fused: bool = False,
) -> StepWork:
    """Count a micro-batch of `rows` clips on one GPU; `model` may be on the meta device."""
    config, tokens = model.config, model.tokens_per_frame
    frames = rows * streams.num_queries // ranks_per_clip
    products, outside = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.startswith("blocks.") and ".modulation" not in name:
            products.append(Product(frames * tokens, module.in_features, module.out_features))
        else:
            count = model.num_patches if name in _OF_PATCHES else 1
            outside.append(Product(frames * count, module.in_features, module.out_features))
    time_layers = sum(map(config.attends_time, range(config.depth)))
    attention = [
        AttentionWork(frames, tokens, tokens, tokens**2, config.width, config.head_dim, config.depth, "full"),
        AttentionWork(
            *(rows * tokens // ranks_per_clip, streams.num_queries, streams.num_keys),
            *(visible_pairs(streams), config.width, config.head_dim, time_layers, "dense_mask"),
        ),
    ]
    branch = FUSED_BRANCH_BYTES if fused else BRANCH_BYTES[config.residual]
    matrices = [p for block in model.blocks for n, p in block.named_parameters() if _is_matrix(n, p)]
    return StepWork(
        tuple(_merged(products)),
        tuple(_merged(outside)),
        tuple(attention),
        branch * frames * tokens * config.width * (2 * config.depth + time_layers),
        sum(parameter.numel() for parameter in model.parameters()),
        tuple((p.shape[0], p.shape[1]) for p in matrices) if muon else (),
        extra_forward,
        checkpointed,
    )


def uncounted_flops(model: CausalDiT, streams: Streams, rows: int) -> int:
    """Operations of the small maps of an embodiment, which `step_work` leaves out."""
    work = step_work(model, streams, rows)
    return rows * forward_flops(model, streams) - work.forward_flops


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Operations to orthogonalise one matrix: 5 times x x^T, its square, and its product with x."""
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3)


def step_seconds(work: StepWork, roofline: Roofline, *, accumulation: int = 1) -> dict[str, float]:
    """Seconds by part, of `accumulation` micro-batches and one step of the optimizer, on one GPU."""
    forward = sum(_product(p, roofline) for p in work.products)
    outside = sum(_product(p, roofline) for p in work.outside)
    backward = sum(_gradient(p, roofline) for p in (*work.products, *work.outside))
    attention = sum(_attention(part, roofline) for part in work.attention)
    elementwise = roofline.traffic(work.branch_bytes)
    again = work.extra_forward + work.checkpointed
    # A forward pass alone is a third of the traffic of both, and 1 / 3.5 of attention.
    once = forward + outside + elementwise / 3 + attention / ATTENTION_PASSES
    parts = {
        "products": forward + outside + backward,
        "attention": attention,
        "elementwise": elementwise,
        "forward again": again * once,
        "casts": roofline.traffic(CAST_BYTES * work.num_parameters),
    }
    parts = {name: accumulation * seconds for name, seconds in parts.items()}
    muon = sum(rows * columns for rows, columns in work.matrices)
    parts["optimizer"] = roofline.traffic(
        (ADAMW_BYTES * (work.num_parameters - muon)) + MUON_BYTES * muon + NORM_BYTES * work.num_parameters
    ) + sum(_newton_schulz(rows, columns, roofline) for rows, columns in work.matrices)
    parts["ema"] = roofline.traffic(EMA_BYTES * work.num_parameters)
    return parts


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not name.startswith("modulation")


def _merged(products: Iterable[Product]) -> list[Product]:
    counts: dict[Product, int] = {}
    for product in products:
        counts[product] = counts.get(product, 0) + 1
    return [product._replace(times=count) for product, count in counts.items()]


def _product(p: Product, roofline: Roofline) -> float:
    return p.times * roofline.product(p.m, p.k, p.n)


def _gradient(p: Product, roofline: Roofline) -> float:
    """Gradients of inputs [m, n] x [n, k] and of weights [n, m] x [m, k]."""
    return p.times * (roofline.product(p.m, p.n, p.k) + roofline.product(p.n, p.m, p.k))


def _attention(a: AttentionWork, roofline: Roofline) -> float:
    """Forward and backward: operations on whole tiles, or the traffic of 12 tensors, if that is longer."""
    if not a.layers:
        return 0.0
    tiled = a.pairs * (-(-a.queries // TILE) * TILE) / a.queries if a.queries > TILE else a.queries * a.keys
    rate = 1e12 * roofline.attention_tflops(a.kind, a.head_dim)
    operations = ATTENTION_PASSES * 4 * a.sequences * tiled * a.width / rate
    traffic = roofline.traffic(12 * 2 * a.sequences * a.queries * a.width)
    return a.layers * max(operations, traffic)


def _newton_schulz(rows: int, columns: int, roofline: Roofline) -> float:
    short, long = sorted((rows, columns))
    square = roofline.product(short, short, short)
    return NEWTON_SCHULZ_STEPS * (2 * roofline.product(short, long, short) + square)
