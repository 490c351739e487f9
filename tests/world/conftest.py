"""A tiny world with random weights: untrained is enough for identities."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.diffusion.path import constant_level, mix
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import Conditioning, FrameShape
from vidworld.model.two_stream import target_predictor
from vidworld.tokenizers.base import chunk_actions
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.types import Frames
from vidworld.world.build import build
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.world import WorldModel

HEIGHT, WIDTH = 32, 48
LEARNING_STEPS = 150


def make_contract(name: str, action_dims: int, proprio_dims: int) -> ActionContract:
    generator = np.random.default_rng(action_dims)
    actions = generator.uniform(-2, 2, (200, action_dims))
    proprio = generator.uniform(-1, 3, (200, proprio_dims))
    return ActionContract(
        embodiment=name,
        rate_hz=10.0,
        action=tuple(Dimension(f"joint_{i}", "rad/s", "velocity") for i in range(action_dims)),
        proprio=tuple(Dimension(f"angle_{i}", "rad", "position") for i in range(proprio_dims)),
        action_statistics=Statistics.of(actions),
        proprio_statistics=Statistics.of(proprio),
    )


def make_world(
    *,
    contracts: tuple[ActionContract, ...] | None = None,
    views: tuple[str, ...] = ("top",),
    seed: int = 0,
    **model: int,
) -> WorldModel:
    contracts = contracts or (make_contract("arm", 3, 4),)
    torch.manual_seed(seed)
    tokenizer = ConvTokenizer(
        ConvTokenizerConfig(latent_channels=4, widths=(16, 16, 16), encoder_blocks=(0, 1, 1), norm_groups=4)
    )
    shape = FrameShape.from_contracts(
        contracts, views=len(views), channels=4, height=HEIGHT // 8, width=WIDTH // 8
    )
    settings = {
        "width": 32,
        "depth": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "time_every": 2,
        "num_registers": 1,
    }
    spec = WorldSpec(
        model=DiTConfig(**{**settings, **model}),
        shape=shape,
        views=views,
        height=HEIGHT,
        width=WIDTH,
        fps=10.0,
        contracts=contracts,
        sampler=SamplerConfig(steps=2, window=6),
        tokenizer_digest=tokenizer.digest,
    )
    world = build(spec, tokenizer)
    # Blocks and heads start as the identity and zero, which would make every identity hold trivially.
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return world.requires_grad_(False).eval()


def make_prompt(world: WorldModel, frames: int = 3, seed: int = 0, **changes: object) -> Prompt:
    generator = np.random.default_rng(seed)
    contract = world.spec.contracts[0]
    size = (frames, len(world.spec.views), world.spec.height, world.spec.width, 3)
    prompt = Prompt(
        frames=generator.integers(0, 256, size, dtype=np.uint8),
        proprio=generator.uniform(-1, 3, (frames, len(contract.proprio))).astype(np.float32),
        actions=make_actions(world, frames - 1, seed),
        embodiment=contract.embodiment,
    )
    return dataclasses.replace(prompt, **changes)  # type: ignore[arg-type]


def make_actions(world: WorldModel, frames: int, seed: int = 0) -> np.ndarray:
    dims = len(world.spec.contracts[0].action)
    return np.random.default_rng(100 + seed).uniform(-2, 2, (frames, dims)).astype(np.float32)


def make_clips(
    world: WorldModel, batch: int, frames: int, seed: int
) -> tuple[Frames, torch.Tensor, torch.Tensor]:
    """Toy data: three channels show the action that led into the frame, the fourth a constant of the clip."""
    generator = torch.Generator().manual_seed(seed)
    actions_BTA = torch.empty(batch, frames, 3).uniform_(-2, 2, generator=generator)
    embodiment_B = torch.zeros(batch, dtype=torch.int64)
    shown_BTA = world.normalizer.actions(actions_BTA, embodiment_B).roll(1, 1)
    latents = torch.randn(batch, frames, 1, 4, 4, 6, generator=generator) * 0.05
    latents[:, :, 0, :3] += shown_BTA[..., None, None]
    latents[:, :, 0, 3] += torch.randn(batch, 1, 1, 1, generator=generator)
    proprio_BTS = torch.nn.functional.pad(shown_BTA, (0, 1))
    return Frames(latents, proprio_BTS), actions_BTA, embodiment_B


@pytest.fixture(scope="session")
def clips() -> Callable[..., tuple[Frames, torch.Tensor, torch.Tensor]]:
    return make_clips


@pytest.fixture(scope="session")
def learnt_world() -> WorldModel:
    """A world that has learnt the toy data of `clips`, for sampling in one step."""
    world = make_world(depth=2).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(world.model.parameters(), 4e-3)
    for step in range(LEARNING_STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / LEARNING_STEPS)
        clean, actions_BTA, embodiment_B = make_clips(world, 16, 4, seed=step + 1)
        actions_BTkA, keep_BT = chunk_actions(world.normalizer.actions(actions_BTA, embodiment_B), 1)
        noise = [clean.map(lambda x: torch.randn(x.shape, generator=generator)) for _ in range(2)]
        context_level = constant_level(clean, 0.9)
        predict = target_predictor(
            world.model,
            mix(clean, noise[0], context_level),
            context_level,
            Conditioning(actions_BTkA, keep_BT, embodiment_B),
        )
        level = constant_level(clean, 0.0)
        errors = predict(noise[1], level, torch.ones_like(level.signal)).map(
            lambda x, y: (x - y)[:, 1:].square().mean(), clean
        )
        optimizer.zero_grad()
        (errors.latents_BTVChw + errors.proprio_BTS).backward()
        optimizer.step()
    return world.requires_grad_(False)


@pytest.fixture(scope="session")
def world() -> WorldModel:
    return make_world()


@pytest.fixture(scope="session")
def new_world() -> Callable[..., WorldModel]:
    return make_world


@pytest.fixture(scope="session")
def contract() -> Callable[[str, int, int], ActionContract]:
    return make_contract


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Prompt]:
    return make_prompt


@pytest.fixture(scope="session")
def actions() -> Callable[..., np.ndarray]:
    return make_actions
