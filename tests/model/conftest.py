"""A tiny model with every part in use, and clips for it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape
from vidworld.types import Frames, SignalLevel

TINY = DiTConfig(width=64, depth=4, num_heads=4, num_kv_heads=2, time_every=2, num_registers=2)
SHAPE = FrameShape(
    views=2,
    channels=3,
    height=4,
    width=6,
    proprio_dims=5,
    action_dims=4,
    actions_per_frame=2,
    num_embodiments=2,
    embodiment_action_dims=(4, 2),
    embodiment_proprio_dims=(3, 5),
)


@dataclass(frozen=True)
class Clip:
    """Arguments of the model."""

    frames: Frames
    level: SignalLevel
    step_BT: Tensor
    conditioning: Conditioning

    def __getitem__(self, rows) -> "Clip":
        return Clip(self.frames[rows], self.level[rows], self.step_BT[rows], self.conditioning[rows])

    def time(self, index: slice) -> "Clip":
        return Clip(
            self.frames[:, index],
            self.level[:, index],
            self.step_BT[:, index],
            self.conditioning.frames(index),
        )

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Clip":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        conditioning = {
            field.name: value if value is None else move(value)
            for field in fields(self.conditioning)
            for value in [getattr(self.conditioning, field.name)]
        }
        return Clip(
            self.frames.map(move),
            SignalLevel.from_signal(move(self.level.signal)),
            move(self.step_BT),
            Conditioning(**conditioning),
        )

    def parts(self) -> tuple[Frames, SignalLevel, Tensor, Conditioning]:
        return self.frames, self.level, self.step_BT, self.conditioning


@pytest.fixture
def make_model() -> Callable[..., CausalDiT]:
    """A float64 model, every parameter random: an untrained one hides faults behind zero gates."""

    def make(shape: FrameShape = SHAPE, **changes) -> CausalDiT:
        torch.manual_seed(0)
        model = CausalDiT(replace(TINY, **changes), shape).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        return model.requires_grad_(False)

    return make


@pytest.fixture
def make_clip() -> Callable[..., Clip]:
    """Random float64 clips; different seeds differ everywhere."""

    def make(
        time: int = 5, batch: int = 3, shape: FrameShape = SHAPE, noise_dims: int = 0, seed: int = 1
    ) -> Clip:
        random = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        return Clip(
            Frames(
                normal(batch, time, shape.views, shape.channels, shape.height, shape.width),
                normal(batch, time, shape.proprio_dims),
            ),
            SignalLevel.from_signal(torch.rand(batch, time, generator=random, dtype=torch.float64)),
            torch.rand(batch, time, generator=random, dtype=torch.float64),
            Conditioning(
                normal(batch, time, shape.actions_per_frame, shape.action_dims),
                torch.rand(batch, time, generator=random) > 0.3,
                torch.arange(batch) % shape.num_embodiments,
                normal(batch, time, noise_dims) if noise_dims else None,
            ),
        )

    return make


@pytest.fixture
def difference() -> Callable[[Frames, Frames], float]:
    """The largest difference of two predictions."""

    def largest(got: Frames, expected: Frames) -> float:
        deltas = got.map(lambda a, b: (a - b).detach().abs(), expected)
        return max(float(deltas.latents_BTVChw.max()), float(deltas.proprio_BTS.max()))

    return largest
