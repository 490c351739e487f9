"""What a tokenizer is trained to minimise."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the parts of the loss; pixels lie in [-1, 1]."""

    l1: float = 1.0
    """Mean absolute error: keeps small errors moving, so that flat areas come out clean."""
    l2: float = 10.0
    """Mean squared error: most of the PSNR. With 10 the two weigh alike at about 30 dB."""
    gradient: float = 0.5
    """Mean absolute error of horizontal and vertical pixel differences: edges stay sharp."""
    latent: float = 1e-3
    """Mean square of the raw latents: holds their scale and offset without squeezing out information."""


def reconstruction_loss(
    reconstruction: Tensor,
    target: Tensor,
    latents: Tensor,
    config: ReconstructionLossConfig = ReconstructionLossConfig(),
) -> dict[str, Tensor]:
    """Compare pictures [..., C, H, W] with their targets; `latents` are the raw ones they came from.

    Returns scalars: "loss" with gradient; without gradient its parts "l1", "l2", "gradient", "latent", each
    before its weight, and "psnr" in dB, the mean over pictures. Computed in float32 at least.
    """
    assert reconstruction.shape == target.shape
    wide = torch.promote_types(torch.promote_types(reconstruction.dtype, target.dtype), torch.float32)
    reconstruction, target, latents = reconstruction.to(wide), target.to(wide), latents.to(wide)
    error = reconstruction - target
    squared = error.square()
    parts = {
        "l1": error.abs().mean(),
        "l2": squared.mean(),
        "gradient": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        "latent": latents.square().mean(),
    }
    loss = (
        config.l1 * parts["l1"]
        + config.l2 * parts["l2"]
        + config.gradient * parts["gradient"]
        + config.latent * parts["latent"]
    )
    return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, "psnr": _psnr(squared)}


def _psnr(squared: Tensor) -> Tensor:
    """Mean PSNR in dB of pictures [..., C, H, W] in [-1, 1], whose peak-to-peak is 2."""
    per_picture = squared.detach().flatten(-3).mean(-1).clamp(min=1e-10)
    return (10 * torch.log10(4 / per_picture)).mean()
