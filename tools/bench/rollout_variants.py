"""Ways to roll out that `rollout.py` times: the plain world, and engines with and without kernels."""

from typing import Literal

import numpy as np

from vidworld.model.streaming import StreamKernels
from vidworld.world.engine import RolloutEngine
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import Observation, Rollout, WorldState
from vidworld.world.world import WorldModel

Variant = Literal[
    "plain",
    "engine",
    "half",
    "compiled",
    "lean",
    "flash",
    "space",
    "time",
    "blocks",
    "kernels",
    "fused",
    "autotune",
    "fp8",
    "fp8-kernels",
]
"""`lean` is `compiled` with the stream between blocks in half precision. All that follow are lean as well:
`flash` without cuDNN's attention, `space`, `time` and `blocks` with those Triton kernels alone (`blocks`: MLP
and residual stream), `fused` with all of them, `kernels` with all and without the compiler,
`autotune` with all and with tuned matrix products. `fp8` is `fused` and `fp8-kernels` is `kernels`, both with
the large matrix products in 8-bit floats."""
KERNELS: dict[Variant, tuple[str, ...]] = {
    "space": ("space",),
    "time": ("time",),
    "blocks": ("mlp", "residual"),
    "fused": StreamKernels._fields,
    "autotune": StreamKernels._fields,
    "fp8": StreamKernels._fields,
}


class Plain:
    """The plain world with a fixed sampler, called as an engine is."""

    def __init__(self, world: WorldModel, sampler: SamplerConfig) -> None:
        self.world, self.sampler = world, sampler
        self.state: WorldState | None = None

    def rollout(self, state: WorldState, actions: np.ndarray, *, decode: bool, check: bool) -> Rollout:
        """As the engine's."""
        return self.world.rollout(state, actions, sampler=self.sampler, decode=decode, check=check)

    def load(self, state: WorldState) -> None:
        """As the engine's."""
        self.state = state

    def step(self, action: np.ndarray) -> Observation:
        """As the engine's."""
        assert self.state is not None
        self.state, seen = self.world.step(self.state, action, sampler=self.sampler)
        return seen


def runner(variant: Variant, world: WorldModel, sampler: SamplerConfig) -> "RolloutEngine | Plain":
    """What rolls out in the way of a variant."""
    match variant:
        case "plain":
            return Plain(world, sampler)
        case "engine":
            return RolloutEngine(world, sampler=sampler)
        case "half":
            return RolloutEngine(world, sampler=sampler, half=True)
        case "compiled":
            return RolloutEngine(world, sampler=sampler, compile=True)
        case "kernels" | "fp8-kernels":
            names, products = StreamKernels._fields, "fp8" if variant == "fp8-kernels" else "autocast"
            return RolloutEngine(
                world, sampler=sampler, residual="autocast", kernels=names, products=products
            )
        case "autotune":
            return RolloutEngine(
                world, sampler=sampler, compile="autotune", residual="autocast", kernels=KERNELS[variant]
            )
        case _:
            return RolloutEngine(
                world,
                sampler=sampler,
                compile=True,
                residual="autocast",
                kernels=KERNELS.get(variant, ()),
                products="fp8" if variant == "fp8" else "autocast",
            )
