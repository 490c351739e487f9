"""Rotary position embedding: axial for patches in a frame, relative for frames in time.

RoFormer (arXiv 2104.09864), eq. 34: rotating queries by their position and keys by theirs makes the score
depend on the difference of positions only. Shapes: N positions, d head dims; a rotation holds d/2 angles a
position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Frames and patches number tens, not thousands: the slowest pair turns once in about 2 * pi * 100 positions.
BASE = 100.0


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which each position is turned, [N, d/2] each."""

    cos: Tensor
    sin: Tensor


def axial_rotation(positions_NP: Tensor, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Rotation for positions with P integer coordinates; each coordinate owns head_dim / (2 P) pairs.

    Position zero on all axes is no rotation. Angles are computed in float64 and stored in at least float32,
    whatever the model's dtype: bfloat16 angles would merge neighbouring positions.
    """
    num_axes = positions_NP.shape[-1]
    pairs = head_dim // 2 // num_axes
    assert pairs * 2 * num_axes == head_dim, (head_dim, num_axes)
    exponents = torch.arange(pairs, device=positions_NP.device, dtype=torch.float64) / pairs
    angles = (positions_NP[..., None] * BASE**-exponents).flatten(-2)
    wide = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(wide), angles.sin().to(wide))


def rotate(x_BHNd: Tensor, rotation: Rotation) -> Tensor:
    """Turn pair (i, i + d/2) of each vector by the angle of its position; returns x's dtype."""
    first, second = x_BHNd.chunk(2, dim=-1)
    cos, sin = rotation
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BHNd.dtype)
