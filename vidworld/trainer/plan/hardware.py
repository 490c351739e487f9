"""What GPUs can do: data sheets, and how much of them was reached where it was measured.

Only one GPU type was measured. Everything about the others is the measured share of their data sheet, which
the plan says.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vidworld.errors import ConfigError

MEASURED_ON = "one H100 80GB SXM, torch 2.11"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    memory_gib: float
    """What programs can have."""
    peak_tflops: float
    """Dense bfloat16 matrix products with float32 sums."""
    bandwidth_tb_s: float
    """Memory."""
    link_gb_s: float
    """To another GPU of the same node, one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79.1, 989, 3.35, 450),
        Gpu("h200", 140, 989, 4.8, 450),
        Gpu("b200", 178, 2250, 8.0, 900),
        Gpu("a100", 79.1, 312, 2.04, 300),
        Gpu("a100-40gb", 39.4, 312, 1.56, 300),
        Gpu("l40s", 44.4, 362, 0.864, 32),
        Gpu("a10g", 22.0, 70, 0.6, 16),
        Gpu("rtx3090", 23.6, 71, 0.936, 16),
        Gpu("rtx4090", 23.6, 165, 1.008, 32),
        Gpu("rtx5090", 31.3, 210, 1.79, 64),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises ConfigError with the names that are known."""
    if name.lower() not in GPUS:
        raise ConfigError("--gpu", got=name, expected=f"one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


class MeasuredProduct(NamedTuple):
    """bfloat16 [m, k] x [k, n] on MEASURED_ON."""

    m: int
    k: int
    n: int
    tflops: float


MEASURED_PRODUCTS = (
    MeasuredProduct(8192, 8192, 8192, 781),
    MeasuredProduct(64, 1024, 4096, 131),
    MeasuredProduct(256, 1024, 4096, 374),
    MeasuredProduct(512, 1024, 4096, 543),
    MeasuredProduct(4096, 1024, 4096, 611),
)
MEASURED_COPY_TB_S = 3.03
"""Device-to-device copy on MEASURED_ON, bytes read and written together."""


class MeasuredAttention(NamedTuple):
    """Forward and backward of one attention on MEASURED_ON, TFLOP/s per visible operation."""

    tokens: int
    head_dim: int
    full: float
    """No mask (sdpa, flash)."""
    rectangles: float
    """No mask, cuDNN: what visible rectangles are made of."""
    flex: float
    """Frame-causal."""
    dense_mask: float
    """sdpa that reads a mask."""


MEASURED_ATTENTION = (
    MeasuredAttention(4096, 64, full=276, rectangles=435, flex=294, dense_mask=139),
    MeasuredAttention(8192, 128, full=318, rectangles=545, flex=380, dense_mask=163),
)


class MeasuredStep(NamedTuple):
    """A compiled step of a plain causal DiT on MEASURED_ON: frame-causal flex attention, MLP of 4 widths.

    16 frames a clip, AdaLN of 6 widths a frame, AdamW; the clips of the last row were not written down.
    """

    layers: int
    width: int
    clips: int
    tokens_per_frame: int
    head_dim: int
    tokens_per_s: float


MEASURED_STEPS = (
    MeasuredStep(12, 1024, 8, 256, 64, 300e3),
    MeasuredStep(12, 2048, 8, 256, 128, 109e3),
    MeasuredStep(12, 384, 64, 64, 64, 1.49e6),
)


class OwnStep(NamedTuple):
    """A step of vidworld's own loop on MEASURED_ON: two streams of 16 frames, AdamW, before the bootstrap."""

    layers: int
    width: int
    heads: tuple[int, int]
    """Of queries, and of keys and values."""
    side: int
    """Rows and columns of the latents, 16 channels."""
    clips: int
    plain_ms: float | None
    """Compiled."""
    fused_ms: float | None
    """With the fused kernels."""


OWN_STEPS = (
    OwnStep(12, 384, (6, 2), 16, 64, 100.3, 84.7),
    OwnStep(12, 768, (12, 4), 32, 16, 231.8, 199.5),
    OwnStep(24, 1024, (8, 4), 32, 6, 269.9, 240.0),
    OwnStep(28, 1536, (12, 4), 32, 3, None, 271.2),
)

# seconds = operations / (PRODUCT_SHARE peak) + TRAFFIC_SHARE bytes / bandwidth + LAUNCH_S. These three
# numbers bring the largest error over MEASURED_PRODUCTS to its least, 11 %.
PRODUCT_SHARE = 830 / 989
TRAFFIC_SHARE = 0.45
LAUNCH_S = 1.7e-6


class Roofline:
    """Seconds of operations on a GPU, from what was measured on MEASURED_ON scaled by data sheets."""

    def __init__(self, gpu: Gpu) -> None:
        reference = GPUS["h100"]
        self.gpu = gpu
        self.compute = gpu.peak_tflops / reference.peak_tflops
        self.bytes_per_s = 1e12 * MEASURED_COPY_TB_S * gpu.bandwidth_tb_s / reference.bandwidth_tb_s

    def product(self, m: int, k: int, n: int) -> float:
        """One bfloat16 matrix product [m, k] x [k, n]."""
        operations, values = 2 * m * k * n, m * k + k * n + m * n
        peak = 1e12 * PRODUCT_SHARE * self.gpu.peak_tflops
        return operations / peak + TRAFFIC_SHARE * 2 * values / self.bytes_per_s + LAUNCH_S

    def traffic(self, num_bytes: float) -> float:
        """Bytes read and written by elementwise work."""
        return num_bytes / self.bytes_per_s

    def attention_tflops(self, kind: str, head_dim: int) -> float:
        """Rate of forward and backward together for `kind`, a column of MEASURED_ATTENTION."""
        row = MEASURED_ATTENTION[head_dim > 96]
        return self.compute * getattr(row, kind)
