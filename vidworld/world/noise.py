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
from typing import NamedTuple

import torch
from torch import Tensor

from vidworld.model.inputs import FrameShape
from vidworld.types import Frames

MASK = 0xFFFFFFFF
MAX_SEED = 2**64
MAX_SAMPLE_ID = 2**55
MEMBER_STRIDE = 2**48
"""Sample n of member j of an ensemble has the stream n + j * MEMBER_STRIDE: members must not share their
luck, or agreement by chance would be taken for knowledge."""
MAX_MEMBERS = MAX_SAMPLE_ID // MEMBER_STRIDE

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


def philox(counter: Sequence[Tensor], key: Sequence[int | Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


class Request(NamedTuple):
    """Noise of `shape` for one frame and purpose."""

    frame: int
    purpose: Purpose
    shape: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Counters that it takes: each gives four numbers."""
        return -(-math.prod(self.shape) // 4)


def name_blocks(requests: Sequence[Request]) -> Tensor:
    """Block, frame and purpose of every block of all requests: int64 [3, blocks]."""
    assert all(0 <= request.frame <= MASK for request in requests), "frame out of range"
    return torch.cat(
        [
            torch.stack(torch.broadcast_tensors(torch.arange(one.num_blocks), *map(torch.tensor, one[:2])))
            for one in requests
        ],
        1,
    )


def words(seed: int, sample_ids_B: Tensor, requests: Sequence[Request]) -> Tensor:
    """Uniform 32-bit words, int64 [B, blocks of all requests, 4]; no block depends on the others."""
    return _words(split_seed(seed), sample_ids_B, name_blocks(requests).to(sample_ids_B.device))


def split_seed(seed: int) -> tuple[int, int]:
    """A seed as the two key words of Philox."""
    assert 0 <= seed < MAX_SEED, "seed out of range"
    return seed & MASK, seed >> 32


def _words(key: Sequence[int | Tensor], sample_ids_B: Tensor, blocks_3N: Tensor) -> Tensor:
    block_N, frame_N, purpose_N = blocks_3N
    ids_B1 = sample_ids_B[:, None]
    counter = (block_N, frame_N, ids_B1 & MASK, (ids_B1 >> 32) << 8 | purpose_N)
    return torch.stack(philox(counter, key), -1)


def normals(
    seed: int, sample_ids_B: Tensor, requests: Sequence[Request], *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Standard normals [B, *shape] for each request, where `sample_ids_B` is (int64, 0 <= id < 2**55).

    Element i of a request is the same for every shape with more than i elements, and whatever else is asked
    for. Box-Muller in float64, then cast. Many requests cost a GPU little more than one.
    """
    blocks_3N = name_blocks(requests).to(sample_ids_B.device)
    drawn_BX = block_normals(split_seed(seed), sample_ids_B, blocks_3N, dtype=dtype)
    return part_normals(drawn_BX, requests)


def block_normals(
    key: Sequence[int | Tensor], sample_ids_B: Tensor, blocks_3N: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Four standard normals for each block of `name_blocks`, [B, 4 * blocks]; it compiles."""
    words_BN4 = _words(key, sample_ids_B, blocks_3N)
    radius_word, angle_word = words_BN4[..., ::2], words_BN4[..., 1::2]
    radius = (-2 * _log((radius_word.double() + 0.5) * 2.0**-32)).sqrt()
    # Two bits choose the quadrant, thirty the angle inside it: no reduction of the argument is needed.
    angle = ((angle_word & 0x3FFFFFFF).double() + 0.5) * (math.pi / 2 * 2.0**-30)
    squared = angle * angle
    cosine = _horner(_COS_TERMS, squared) * (1 - (angle_word >> 30 & 1) * 2)
    sine = angle * _horner(_SIN_TERMS, squared) * (1 - (angle_word >> 31) * 2)
    return torch.stack((radius * cosine, radius * sine), -1).flatten(1).to(dtype)


def part_normals(drawn_BX: Tensor, requests: Sequence[Request]) -> list[Tensor]:
    """What `block_normals` drew, request by request [B, *shape]: views."""
    parts = drawn_BX.split([4 * request.num_blocks for request in requests], 1)
    return [
        part_BX[:, : math.prod(request.shape)].reshape(len(drawn_BX), *request.shape)
        for part_BX, request in zip(parts, requests, strict=True)
    ]


Kind = tuple[Purpose, Purpose]
"""A purpose for latents and one for proprioception."""

START: Kind = (Purpose.LATENTS, Purpose.PROPRIO)
CONTEXT: Kind = (Purpose.CONTEXT_LATENTS, Purpose.CONTEXT_PROPRIO)


@dataclass(frozen=True)
class NoiseStream:
    """The noise of B samples: where every random number of a rollout comes from."""

    seed: int
    sample_ids_B: Tensor
    dtype: torch.dtype = torch.float32

    def frames(self, shape: FrameShape, indices: Sequence[int], *kinds: Kind) -> tuple[Frames, ...]:
        """Noise [B, T, ...] of each kind for the frames `indices`; a frame at a time, which bounds memory."""
        latents, proprio = (shape.views, shape.channels, shape.height, shape.width), (shape.proprio_dims,)
        drawn = [
            normals(
                self.seed,
                self.sample_ids_B,
                [
                    Request(index, *part)
                    for kind in kinds
                    for part in zip(kind, (latents, proprio), strict=True)
                ],
                dtype=self.dtype,
            )
            for index in indices
        ]
        parts = [torch.stack(part, 1) for part in zip(*drawn, strict=True)]
        return tuple(Frames(*parts[i : i + 2]) for i in range(0, len(parts), 2))

    def draw(self, frame: int, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, *shape] of one frame."""
        return normals(self.seed, self.sample_ids_B, [Request(frame, purpose, shape)], dtype=self.dtype)[0]


def fork_ids(seed: int, sample_ids_B: Tensor, frame: int, copy_B: Tensor) -> Tensor:
    """Ids [B] for branches of samples: copy 0 keeps its id, copy n gets a hash of (seed, id, frame, n).

    A branch's future thus depends on its parent and its number alone, not on what else is in the batch.
    """
    copies = int(copy_B.max()) + 1 if len(copy_B) else 1
    words_BN4 = words(seed, sample_ids_B, [Request(frame, Purpose.FORK, (4 * copies,))])
    high, low, *_ = words_BN4[torch.arange(len(copy_B), device=copy_B.device), copy_B].unbind(-1)
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
