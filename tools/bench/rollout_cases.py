"""What `rollout.py` measures: sizes of networks with random weights, and worlds made of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vidworld.contract import ActionContract, Statistics
from vidworld.errors import ConfigError
from vidworld.lab.planar import EMBODIMENT
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.world.build import build
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.world import WorldModel

SIZES: dict[str, tuple[DiTConfig, int]] = {
    "24x1024": (DiTConfig(width=1024, depth=24, num_heads=16, num_kv_heads=4), 256),
    "16x512": (DiTConfig(width=512, depth=16, num_heads=8, num_kv_heads=2), 128),
    "12x384": (DiTConfig(width=384, depth=12, num_heads=6, num_kv_heads=2), 128),
    "8x256": (DiTConfig(width=256, depth=8, num_heads=4, num_kv_heads=2), 128),
}
"""Network and pixels on a side; a patch of latents is 16 x 16 pixels, so 256 and 64 patches a frame."""

SHIPPED = "lab"
"""The world that comes with the package, in place of a size."""


@dataclass(frozen=True)
class Case:
    """One size, batch and number of denoising steps."""

    size: str
    batch: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From SIZE.bBATCH.kSTEPS; raises ConfigError."""
        size, *rest = text.split(".")
        if size not in (*SIZES, SHIPPED) or len(rest) != 2 or rest[0][:1] != "b" or rest[1][:1] != "k":
            raise ConfigError(
                "--cases", got=text, expected=f"SIZE.bBATCH.kSTEPS, SIZE of {', '.join((*SIZES, SHIPPED))}"
            )
        return cls(size, int(rest[0][1:]), int(rest[1][1:]))

    @property
    def name(self) -> str:
        """As it was given."""
        return f"{self.size}.b{self.batch}.k{self.steps}"


def full_prompt(spec: WorldSpec, sampler: SamplerConfig) -> Prompt:
    """A prompt that fills the window."""
    frames = np.zeros((sampler.window, spec.height, spec.width, 3), np.uint8)
    return Prompt(frames, np.zeros((sampler.window, len(spec.contracts[0].proprio)), np.float32))


def make_world(model: DiTConfig, pixels: int, window: int, device: str) -> WorldModel:
    """A world of the planar arm's embodiment with random weights, none of them zero."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(ConvTokenizerConfig())
    generator = np.random.default_rng(0)
    contract = ActionContract(
        EMBODIMENT.embodiment,
        EMBODIMENT.rate_hz,
        EMBODIMENT.action,
        EMBODIMENT.proprio,
        Statistics.of(generator.uniform(-1, 1, (100, len(EMBODIMENT.action)))),
        Statistics.of(generator.uniform(-1, 1, (100, len(EMBODIMENT.proprio)))),
    )
    side = pixels // tokenizer.spatial_stride
    shape = FrameShape.from_contracts(
        [contract], views=1, channels=tokenizer.latent_channels, height=side, width=side
    )
    sampler = SamplerConfig(window=window)
    spec = WorldSpec(model, shape, ("top",), pixels, pixels, 10.0, (contract,), sampler)
    world = build(spec, tokenizer)
    for parameter in world.model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    return world.requires_grad_(False).eval().to(device)
