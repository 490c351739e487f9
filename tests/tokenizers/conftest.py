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


WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, 0.2, -0.1, 0.0],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", WAN),
    "wan2.2": (
        "AutoencoderKLWan",
        WAN
        | {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "decoder_base_dim": 4,
        },
    ),
    "qwen": ("AutoencoderKLQwenImage", WAN),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "latents_mean": [0.1, 0.3] * 4,
            "latents_std": [1.0, 1.5] * 4,
        },
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "decoder_causal": True,
        },
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (16,) * 5, "layers_per_block": 1},
    ),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "encoder_layers_per_block": (1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "encoder_qkv_multiscales": ((), (), (), (5,)),
            "decoder_qkv_multiscales": ((), (), (), (5,)),
            "scaling_factor": 0.4,
        },
    ),
}


def make_vae(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of diffusers' real class, with weights that let the signal through."""
    import diffusers

    cls, config = TINY[name]
    torch.manual_seed(seed)
    vae = getattr(diffusers, cls)(**config | changes)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        torch.nn.init.normal_(parameter, std=max(fan_in, 4) ** -0.5)
    return vae.eval()


@pytest.fixture(scope="session")
def vae() -> Callable[..., Any]:
    return make_vae


@pytest.fixture(scope="session")
def vae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder in diffusers' layout for each tiny model: read only."""
    root = tmp_path_factory.mktemp("vaes")
    for name in TINY:
        make_vae(name).save_pretrained(root / name)
    return {name: root / name for name in TINY}
