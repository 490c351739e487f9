"""The best and worst that may happen, with a known likelihood: search over the noise that selects futures.

Shapes: B rows, T frames, X noise dims; D = T * X.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.world.noise import NoiseStream, Purpose
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import Rollout, WorldState
from vidworld.world.world import WorldModel

Reward = Callable[[Rollout], Tensor]
"""Of a rollout's rows [B]; differentiable with respect to its latents and proprioception."""


@dataclass(frozen=True)
class Scenario:
    """Futures that a search found, one a row; where it found none better it is the one it began with."""

    noise_BTX: Tensor
    reward_B: Tensor
    start_B: Tensor
    """Rewards of the futures that it began with."""

    @property
    def log_likelihood_B(self) -> Tensor:
        """log N(noise; 0, I) over all frames, in nats."""
        return log_likelihood(self.noise_BTX)

    @property
    def tail_B(self) -> Tensor:
        """Chance that a drawn future's noise is at least as far out: P(chi^2_D >= |noise|^2)."""
        return tail(self.noise_BTX)


def log_likelihood(noise_BTX: Tensor) -> Tensor:
    """log N(noise; 0, I) [B], in nats; a drawn one has -D / 2 (1 + log 2 pi) +- sqrt(D / 2)."""
    flat_BD = noise_BTX.flatten(1)
    return -0.5 * flat_BD.square().sum(1) - 0.5 * flat_BD.shape[1] * math.log(2 * math.pi)


def tail(noise_BTX: Tensor) -> Tensor:
    """P(chi^2_D >= |noise|^2) [B]."""
    flat_BD = noise_BTX.flatten(1).double()
    half = torch.full_like(flat_BD[:, 0], flat_BD.shape[1] / 2)
    return torch.special.gammaincc(half, flat_BD.square().sum(1) / 2)


def radius(dims: int, mass: float) -> float:
    """Of the ball around 0 that holds a share `mass` of N(0, I) in so many dimensions."""
    low, high = 0.0, 2.0 * dims + 100
    half = torch.tensor(dims / 2, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        inside = float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if inside < mass else (low, middle)
    return math.sqrt(high)


def search(
    world: WorldModel,
    state: WorldState,
    actions: Tensor,
    reward: Reward,
    *,
    worst: bool,
    steps: int = 20,
    mass: float = 0.9,
    step_size: float = 0.2,
    sampler: SamplerConfig | None = None,
    allow_out_of_range: bool = False,
    progress: Callable[[], object] | None = None,
) -> Scenario:
    """Follow the gradient of a reward over the network's noise, from where each row's own stream begins.

    The noise stays in the ball that holds a share `mass` of its prior N(0, I), so what is found is no less
    likely than one future in 1 / (1 - mass): an adversary with a budget in likelihood. Steps have a length of
    `step_size` times the ball's radius, less and less of it. All other noise stays as it is. The best noise
    seen of each row is kept. Raises ConfigError for a world without `noise_dims`.
    """
    dims = world.spec.model.noise_dims
    if not dims:
        raise ConfigError(
            "search over the network's noise",
            got="a world with model.noise_dims 0",
            expected="one that was trained with noise of its own",
            fix="train it with objective.kind energy, or choose among more samples",
        )
    if steps < 1 or not 0 < mass < 1:
        raise ConfigError(
            "search", got=f"{steps} steps, mass {mass}", expected="1 or more, and a share below 1"
        )
    state = state.detach()
    frames = actions.shape[-2] // world.spec.frames_per_step
    noise_BTX = stream_noise(world, state, frames)
    most = radius(frames * dims, mass)
    noise_BTX = _inside(noise_BTX, most)
    sign = -1.0 if worst else 1.0
    best_B, best_BTX, start_B = None, noise_BTX, None
    for step in range(steps + 1):
        noise_BTX = noise_BTX.detach().requires_grad_(True)
        rolled = world.rollout(
            state,
            actions,
            sampler=sampler,
            decode=False,
            allow_out_of_range=allow_out_of_range,
            noise_BTX=noise_BTX,
        )
        reward_B = reward(rolled)
        if not reward_B.requires_grad:
            raise ConfigError(
                "reward of a search", got="one without a gradient", expected="one of proprioception alone"
            )
        found_B = sign * reward_B.detach()
        if best_B is None or start_B is None:
            best_B, start_B = found_B, reward_B.detach()
        better_B = found_B > best_B
        best_B = torch.where(better_B, found_B, best_B)
        best_BTX = torch.where(better_B[:, None, None], noise_BTX.detach(), best_BTX)
        if progress is not None:
            progress()
        if step == steps:
            break
        (gradient_BTX,) = torch.autograd.grad(reward_B.sum(), noise_BTX)
        length_B11 = torch.linalg.vector_norm(gradient_BTX.flatten(1), dim=1)[:, None, None].clamp(min=1e-30)
        ahead = sign * step_size * most * (1 - step / steps)
        noise_BTX = _inside(noise_BTX.detach() + ahead * gradient_BTX / length_B11, most)
    assert best_B is not None
    assert start_B is not None
    return Scenario(best_BTX.detach(), sign * best_B, start_B)


def stream_noise(world: WorldModel, state: WorldState, frames: int) -> Tensor:
    """The network's noise [B, T, X] that the rows' own streams would give for the next frames."""
    stream = NoiseStream(state.seed, state.sample_ids_B, world.dtype)
    dims = (world.spec.model.noise_dims,)
    return torch.stack([stream.draw(state.frame + t, Purpose.MODEL, dims) for t in range(frames)], 1)


def _inside(noise_BTX: Tensor, most: float) -> Tensor:
    """The nearest noise in the ball."""
    length_B11 = torch.linalg.vector_norm(noise_BTX.flatten(1), dim=1)[:, None, None]
    return noise_BTX * (most / length_B11.clamp(min=1e-30)).clamp(max=1.0)
