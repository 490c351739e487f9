"""Noise as a pure function of (seed, sample, frame, purpose): Philox-4x32-10 and Box-Muller.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". There is no generator state: a sample's
noise has the same bits at any batch size, in any order, on any number of devices. Everything after the
integer rounds uses only float64 + - * / and square root, which IEEE 754 rounds correctly, so that a CPU and
a GPU agree to the bit as well; logarithm, sine and cosine of the math libraries do not.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidworld.model.inputs import FrameShape
from vidworld.types import Frames

MASK = 0xFFFFFFFF
MAX_SEED = 2**64
MAX_SAMPLE_ID = 2**55

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOG_TERMS = tuple(1 / (2 * i + 1) for i in range(9))
_SIN_TERMS = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(9))
_COS_TERMS = tuple((-1) ** i / math.factorial(2 * i) for i in range(10))


class Purpose(enum.IntEnum):
    """What a stream of noise is for; each purpose is independent of the others."""

    LATENTS = 0
    PROPRIO = 1
    CONTEXT_LATENTS = 2
    CONTEXT_PROPRIO = 3
    MODEL = 4
    FORK = 5


def philox(counter: Sequence[Tensor], key: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on four broadcastable int64 counters below 2**32 and two key words.

    Returns four int64 tensors below 2**32. An int64 product wraps around to the unsigned 64-bit pattern.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(
    seed: int, sample_ids_B: Tensor, frame: int, purpose: Purpose, num_blocks: int
) -> tuple[Tensor, ...]:
    """Four int64 tensors [B, num_blocks] of uniform 32-bit words; block i never depends on `num_blocks`."""
    assert 0 <= seed < MAX_SEED, "seed out of range"
    assert 0 <= frame <= MASK, "frame out of range"
    ids_B1 = sample_ids_B[:, None]
    counter = (
        torch.arange(num_blocks, device=sample_ids_B.device)[None],
        torch.tensor(frame, device=sample_ids_B.device),
        ids_B1 & MASK,
        (ids_B1 >> 32) << 8 | int(purpose),
    )
    return philox(counter, (seed & MASK, seed >> 32))


def normal(
    seed: int,
    sample_ids_B: Tensor,
    frame: int,
    purpose: Purpose,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals [B, *shape] on the device of `sample_ids_B` (int64, 0 <= id < 2**55).

    Element i is the same for every shape with more than i elements. Box-Muller in float64, then cast.
    """
    size = math.prod(shape)
    w0, w1, w2, w3 = words(seed, sample_ids_B, frame, purpose, -(-size // 4))
    radius_word, angle_word = torch.stack((w0, w2), -1), torch.stack((w1, w3), -1)
    radius = (-2 * _log((radius_word.double() + 0.5) * 2.0**-32)).sqrt()
    # Two bits choose the quadrant, thirty the angle inside it: no reduction of the argument is needed.
    angle = ((angle_word & 0x3FFFFFFF).double() + 0.5) * (math.pi / 2 * 2.0**-30)
    squared = angle * angle
    cosine = _horner(_COS_TERMS, squared) * (1 - (angle_word >> 30 & 1) * 2)
    sine = angle * _horner(_SIN_TERMS, squared) * (1 - (angle_word >> 31) * 2)
    normals = torch.stack((radius * cosine, radius * sine), -1)
    return normals.flatten(1)[:, :size].reshape(len(sample_ids_B), *shape).to(dtype)


@dataclass(frozen=True)
class NoiseStream:
    """The noise of B samples: where every random number of a rollout comes from."""

    seed: int
    sample_ids_B: Tensor
    dtype: torch.dtype = torch.float32

    def frames(self, shape: FrameShape, indices: Sequence[int], latents: Purpose, proprio: Purpose) -> Frames:
        """Noise [B, T, ...] for the frames `indices`, one stream for latents, one for proprioception."""
        picture = (shape.views, shape.channels, shape.height, shape.width)
        return Frames(
            torch.stack([self.draw(index, latents, picture) for index in indices], 1),
            torch.stack([self.draw(index, proprio, (shape.proprio_dims,)) for index in indices], 1),
        )

    def draw(self, frame: int, purpose: Purpose, shape: Sequence[int]) -> Tensor:
        """Noise [B, *shape] of one frame."""
        return normal(self.seed, self.sample_ids_B, frame, purpose, shape, dtype=self.dtype)


def fork_ids(seed: int, sample_ids_B: Tensor, frame: int, copy_B: Tensor) -> Tensor:
    """Ids [B] for branches of samples: copy 0 keeps its id, copy n gets a hash of (seed, id, frame, n).

    A branch's future thus depends on its parent and its number alone, not on what else is in the batch.
    """
    blocks = words(seed, sample_ids_B, frame, Purpose.FORK, int(copy_B.max()) + 1 if len(copy_B) else 1)
    high, low = (word.gather(1, copy_B[:, None])[:, 0] for word in blocks[:2])
    return torch.where(copy_B == 0, sample_ids_B, (high << 32 | low) & (MAX_SAMPLE_ID - 1))


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of float64 in (0, 1), to about 1e-14: log m = 2 atanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    return (exponent.double() - small.double()) * math.log(2) + 2 * s * _horner(_LOG_TERMS, s * s)
