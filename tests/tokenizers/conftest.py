"""Moving shapes, and a small tokenizer trained on them once for all tests that need one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidworld.tokenizers.base import to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig

SMALL = ConvTokenizerConfig(
    widths=(16, 32, 48), encoder_blocks=(0, 1, 1), decoder_blocks=(1, 1, 1), norm_groups=8
)


def shapes(count: int, seed: int, size: int = 32) -> Tensor:
    """Videos of one frame [count, 1, 3, size, size] in [-1, 1]: a disc and a bar on a shaded ground."""
    generator = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    frames = np.empty((count, size, size, 3), dtype=np.uint8)
    for frame in frames:
        ground = (170 + 60 * (y - 0.5))[..., None] * np.array([1.0, 0.95, 0.9])
        cx, cy, angle = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0, np.pi)
        edge = size / 2
        disc = np.clip((0.16 - np.hypot(x - cx, y - cy)) * edge + 0.5, 0, 1)[..., None]
        across = np.abs((x - 0.5) * np.sin(angle) - (y - 0.5) * np.cos(angle))
        bar = np.clip((0.05 - across) * edge + 0.5, 0, 1)[..., None]
        picture = ground * (1 - bar) + np.array([60, 80, 120]) * bar
        frame[:] = picture * (1 - disc) + np.array([210, 60, 50]) * disc
    return to_unit_range(torch.from_numpy(frames)).permute(0, 3, 1, 2)[:, None].contiguous()


def psnr(video: Tensor, target: Tensor) -> float:
    """Mean PSNR in dB of frames in [-1, 1], clamped to what a screen shows."""
    squared = (video.clamp(-1, 1) - target).square().flatten(-3).mean(-1)
    return float((10 * torch.log10(4 / squared.clamp(min=1e-10))).mean())


def train(config: ConvTokenizerConfig, steps: int, seed: int = 0) -> SimpleNamespace:
    """Train for a few seconds; gives the tokenizer, with statistics, and its losses."""
    torch.manual_seed(seed)
    tokenizer = ConvTokenizer(config)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.95))
    videos = shapes(512, seed=1)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(videos), (8,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20, (steps - step) / (0.3 * steps))
        found = tokenizer.training_loss(videos[rows], generator)
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        losses.append(float(found["loss"].detach()))
    tokenizer.eval().requires_grad_(False).measure_statistics(videos.split(64))
    return SimpleNamespace(tokenizer=tokenizer, losses=losses, train=videos)


@pytest.fixture(scope="session")
def trained() -> SimpleNamespace:
    """A tokenizer trained on moving shapes, its losses, the training videos, and held-out videos."""
    result = train(SMALL, steps=160)
    result.held_out = shapes(96, seed=2)
    return result


@pytest.fixture
def make_tokenizer() -> Callable[..., ConvTokenizer]:
    """Builds a small tokenizer with weights of a seed and odd statistics, so that both must count."""

    def build(seed: int = 0, **changes: Any) -> ConvTokenizer:
        torch.manual_seed(seed)
        settings = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__} | changes
        tokenizer = ConvTokenizer(ConvTokenizerConfig(**settings)).eval().requires_grad_(False)
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        channels = tokenizer.latent_channels
        tokenizer.set_statistics(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))
        return tokenizer

    return build


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The synthetic world's functions, for tests that import nothing from here."""
    return SimpleNamespace(shapes=shapes, psnr=psnr, train=train, config=SMALL)
