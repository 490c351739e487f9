from collections.abc import Callable

import pytest
import torch

from vidworld.types import Frames


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def draw_frames(generator: torch.Generator) -> Callable[..., Frames]:
    """Random frames in float64: batch, frames, then views, channels, height, width, proprio dims."""

    def draw(
        batch: int = 4, frames: int = 3, shape: tuple[int, ...] = (2, 4, 4, 6), proprio: int = 5
    ) -> Frames:
        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        return Frames(normal(batch, frames, *shape), normal(batch, frames, proprio))

    return draw
