"""Matrix products of 8-bit floats (e4m3), a scale a row of both factors: for rollouts on recent GPUs.

A weight [O, I] is rounded once, with a scale for each output; what it multiplies is rounded as it is made,
with a scale for each token: scale = max |row| / 448, the largest e4m3. Half the bytes of bfloat16 move, and
the matrix units work at up to twice the speed. It rounds more: e4m3 has three bits of mantissa, so numbers
are off by up to 6 %, and a product of random matrices by 4 % of its norm (bfloat16: 0.3 %). Hence nothing
uses it unless asked. No gradients.

Shapes: I inputs, O outputs.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidworld.model.dit import Block, CausalDiT

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-12
"""Least maximum of a row: rows of zeros have a scale, too."""
FAST_ACCUMULATION = True
"""Sums in the matrix units with fewer bits than float32, which is faster on an H100."""
MULTIPLE = 16
"""Sizes of a matrix that the products take are multiples of this."""


class Scaled(NamedTuple):
    """Numbers as values * scale."""

    values: Tensor
    """[..., I] e4m3."""
    scale: Tensor
    """[..., 1] float32."""

    def wide(self) -> Tensor:
        """The numbers in float32."""
        return self.values.float() * self.scale


def quantise(x: Tensor) -> Scaled:
    """Rows of x rounded, each with its own scale."""
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    return Scaled((wide * (LARGEST / peak)).clamp(-LARGEST, LARGEST).to(E4M3), peak * (1 / LARGEST))


class Fp8Linear(nn.Module):
    """A linear map without bias in 8-bit floats, to bfloat16; of tokens as they come or already `Scaled`."""

    weight_OI: Tensor
    scale_1O: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None
        values, scale = quantise(linear.weight.detach())
        self.register_buffer("weight_OI", values, persistent=False)
        self.register_buffer("scale_1O", scale.t().contiguous(), persistent=False)

    def forward(self, x: Tensor | Scaled, member_B: None = None) -> Tensor:
        """[..., I] to [..., O]; `member_B` is there for the place of a `MemberLinear`."""
        values, scale = x if isinstance(x, Scaled) else quantise(x)
        found = torch._scaled_mm(
            values.reshape(-1, values.shape[-1]),
            self.weight_OI.t(),
            scale.reshape(-1, 1),
            self.scale_1O,
            out_dtype=torch.bfloat16,
            use_fast_accum=FAST_ACCUMULATION,
        )
        return found.unflatten(0, values.shape[:-1])


def use_fp8(model: CausalDiT) -> CausalDiT:
    """Let the large matrices of the blocks multiply in 8-bit floats from now on, in place.

    Those are the projections to queries, keys and values, and the MLP's; what attention puts out, modulation,
    embeddings and heads stay as they are.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        places = [(block.space, "qkv"), (block.mlp, "gate_up"), (block.mlp, "down")]
        places += [(block.time, "qkv")] if block.time is not None else []
        for place, name in places:
            linear = getattr(place, name)
            if not any(size % MULTIPLE for size in linear.weight.shape):
                setattr(place, name, Fp8Linear(linear))
    return model


@functools.cache
@torch.no_grad()
def why_not(device: torch.device) -> str | None:
    """Why such products do not run on a device, or None if one was tried and is right."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        return f"the GPU's compute capability is {major}.{minor}, not 9.0 or more"
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 128, bias=False)
    linear.weight.data = torch.randn(128, 256, generator=generator)
    x = quantise(torch.randn(70, 256, generator=generator))
    want = x.wide() @ quantise(linear.weight).wide().t()
    try:
        got = Fp8Linear(linear.to(device))(Scaled(x.values.to(device), x.scale.to(device))).float().cpu()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    off = float((got - want).norm() / want.norm())
    return None if off < 0.01 else f"a product is off by {off:.2g}"
