"""The noise of a rollout's next frames, drawn several frames at a time.

A frame's noise costs a device some hundred small operations whether it is drawn for one frame or for sixteen.
Shapes: B samples, N blocks of four numbers, X numbers of a frame.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidworld.model.inputs import FrameShape
from vidworld.types import Frames
from vidworld.world.noise import (
    CONTEXT,
    START,
    Purpose,
    Request,
    block_normals,
    name_blocks,
    part_normals,
    split_seed,
)

FRAMES_AHEAD = 16
BLOCKS_AT_ONCE = 2**17
"""Blocks of all samples drawn in one go, at least one frame's: temporaries take some 300 bytes a block."""

EXACT: dict[str, Any] = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
"""No fused multiply-add and correct division: a compiled kernel then gives the bits of the plain one."""


class NoiseAhead:
    """The bits of `NoiseStream` for frame after frame, in one buffer that stays where it is.

    Without `starts` or `contexts` that noise is zero and not drawn: for samplers that take none of it. With
    `compile` the drawing is one fused kernel, which is held to the bits of the plain one the first time and
    given up, with a warning, if it differs.
    """

    def __init__(
        self,
        shape: FrameShape,
        noise_dims: int,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool = False,
        starts: bool = True,
        contexts: bool = True,
    ) -> None:
        latents, proprio = (shape.views, shape.channels, shape.height, shape.width), (shape.proprio_dims,)
        starts = starts or not (contexts or noise_dims)
        self._drawn = (starts, contexts)
        self.requests = [
            Request(0, purpose, size)
            for kind, wanted in zip((START, CONTEXT), self._drawn, strict=True)
            for purpose, size in zip(kind, (latents, proprio), strict=True)
            if wanted
        ]
        self._none = Frames(
            *(torch.zeros(batch, 1, *size, dtype=dtype, device=device) for size in (latents, proprio))
        )
        if noise_dims:
            self.requests.append(Request(0, Purpose.MODEL, (noise_dims,)))
        blocks_3N = name_blocks(self.requests).to(device)
        self.ahead = max(1, min(FRAMES_AHEAD, BLOCKS_AT_ONCE // (batch * blocks_3N.shape[1])))
        self._blocks_3N = blocks_3N.repeat(1, self.ahead)
        self._later_N = torch.arange(self.ahead, device=device).repeat_interleave(blocks_3N.shape[1])
        self._ids_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._key = torch.zeros(2, dtype=torch.int64, device=device)
        self._dtype, self._first, self._drawn_BX = dtype, -1, None
        self._compiled: Callable[..., Any] | None = (
            torch.compile(_block_normals, dynamic=False, fullgraph=True, options=EXACT) if compile else None
        )
        self._checked = False
        self.now_BX = torch.zeros(batch, 4 * blocks_3N.shape[1], dtype=dtype, device=device)

    def load(self, seed: int, sample_ids_B: Tensor) -> None:
        """Whose noise it is."""
        self._ids_B.copy_(sample_ids_B)
        self._key.copy_(torch.tensor(split_seed(seed)))
        self._drawn_BX = None

    def go_to(self, frame: int) -> None:
        """Put the noise of a frame into the buffer."""
        if self._drawn_BX is None or not 0 <= frame - self._first < self.ahead:
            self._first, self._drawn_BX = frame, self._draw(frame)
        width = self.now_BX.shape[1]
        start = (frame - self._first) * width
        self.now_BX.copy_(self._drawn_BX[:, start : start + width])

    @property
    def parts(self) -> tuple[Frames, Frames, Tensor | None]:
        """Views of the buffer: the start and the context's noise [B, 1, ...], the model's [B, X]."""
        parts = iter(part_normals(self.now_BX, self.requests))
        start, context = (
            Frames(next(parts)[:, None], next(parts)[:, None]) if drawn else self._none
            for drawn in self._drawn
        )
        return start, context, next(parts, None)

    def _draw(self, frame: int) -> Tensor:
        blocks_3N = self._blocks_3N.clone()
        blocks_3N[1] = self._later_N + frame
        arguments = (self._key, self._ids_B, blocks_3N, self._dtype)
        if self._compiled is None:
            return _block_normals(*arguments)
        try:
            drawn_BX = self._compiled(*arguments)
        except Exception as error:
            return self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", arguments)
        if not self._checked:
            if not torch.equal(drawn_BX, _block_normals(*arguments)):
                return self._give_up("it does not give the bits of the plain one", arguments)
            self._checked = True
        return drawn_BX

    def _give_up(self, reason: str, arguments: tuple[Any, ...]) -> Tensor:
        warnings.warn(f"the noise is drawn without a compiled kernel: {reason}", stacklevel=4)
        self._compiled = None
        return _block_normals(*arguments)


def _block_normals(key_2: Tensor, ids_B: Tensor, blocks_3N: Tensor, dtype: torch.dtype) -> Tensor:
    return block_normals((key_2[0], key_2[1]), ids_B, blocks_3N, dtype=dtype)
