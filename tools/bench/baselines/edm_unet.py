"""A peer: pixel-space diffusion of the next frame by a U-Net, after DIAMOND.

Alonso et al. 2024, "Diffusion for world modeling: visual details matter in Atari" (arXiv 2405.12399), with
the preconditioning of Karras et al. 2022 (EDM, arXiv 2206.00364), written anew from the papers and the
published settings (github.com/eloialonso/diamond). As there: the last 4 frames are stacked with the noisy one
along channels, the 4 actions that belong to them and the noise level modulate every group norm, noise is
log-normal with an offset for each channel, frames are rounded to 8 bits, the second training step is
conditioned on the model's own first one, and sampling takes 3 Euler steps.

What differs: actions are vectors (a linear embedding in place of a table), widths grow with depth and are
chosen to match a number of parameters, attention at the lowest resolution has heads of 32 dims, and sampling
begins with noise of the highest level, as EDM has it.

Shapes: B batch, T frames, C channels, H W pixels, A action dims, D condition width. Pictures are in [-1, 1].
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
HEAD = 32


@dataclass(frozen=True)
class EdmConfig:
    """Size, noise and sampler; defaults are DIAMOND's but for the widths."""

    action_dims: int
    channels: tuple[int, ...] = (64, 128, 192, 256)
    """At full resolution and after each halving."""
    depth: int = 2
    """Residual blocks at each resolution."""
    condition: int = 256
    context: int = 4
    """Known frames that are stacked."""
    own_steps: int = 1
    """Further training steps on the model's own frame."""
    sigma_data: float = 0.5
    sigma_offset: float = 0.3
    """Of noise that is the same in all pixels of a channel."""
    log_mean: float = -0.4
    log_std: float = 1.2
    sigma_bounds: tuple[float, float] = (2e-3, 20.0)
    """Of training."""
    steps: int = 3
    sigma_range: tuple[float, float] = (2e-3, 5.0)
    """Of sampling."""
    rho: float = 7.0


class Scales(NamedTuple):
    """What EDM multiplies by at a noise level, [B, 1, 1, 1], and the level as the network is told it, [B]."""

    c_in: Tensor
    c_out: Tensor
    c_skip: Tensor
    c_noise: Tensor


def precondition(sigma_B: Tensor, config: EdmConfig) -> Scales:
    """EDM's Table 1, with the offset noise added to the level as DIAMOND does.

    The denoiser is D(x) = c_skip x + c_out F(c_in x, c_noise): inputs and targets of F have unit variance at
    every level if data has the deviation sigma_data.
    """
    square_B = sigma_B**2 + config.sigma_offset**2
    total_B = square_B + config.sigma_data**2
    c_skip = config.sigma_data**2 / total_B
    wide = (scale[:, None, None, None] for scale in (total_B.rsqrt(), (square_B * c_skip).sqrt(), c_skip))
    return Scales(*wide, c_noise=square_B.log() / 8)


def sigmas(config: EdmConfig) -> Tensor:
    """Noise levels of sampling, eq. 5 of EDM, ending in 0."""
    low, high = (bound ** (1 / config.rho) for bound in config.sigma_range)
    ramp = torch.linspace(0, 1, config.steps, dtype=torch.float64)
    return torch.cat([(high + ramp * (low - high)) ** config.rho, torch.zeros(1, dtype=torch.float64)])


class EdmUNet(nn.Module):
    """The denoiser with its loss and its rollout."""

    def __init__(self, config: EdmConfig) -> None:
        super().__init__()
        self.config = config
        width = config.condition
        self.register_buffer("frequencies", torch.randn(width // 2))
        self.frequencies: Tensor
        self.actions = nn.Linear(config.action_dims, width // config.context)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(3 * (config.context + 1), config.channels[0], 3, padding=1)
        self.unet = UNet(config.channels, config.depth, width)
        self.leave = nn.Sequential(
            _norm(config.channels[0]), nn.SiLU(), _zero(nn.Conv2d(config.channels[0], 3, 3, padding=1))
        )

    def forward(
        self, noisy_BCHW: Tensor, c_noise_B: Tensor, known_BTCHW: Tensor, actions_BTA: Tensor
    ) -> Tensor:
        """The network F of EDM; `known` are the last frames, in units of sigma_data."""
        angle_BD = 2 * math.pi * c_noise_B[:, None] * self.frequencies
        level_BD = torch.cat([angle_BD.cos(), angle_BD.sin()], -1)
        condition_BD = self.mix(level_BD + self.actions(actions_BTA).flatten(1))
        x = self.enter(torch.cat([known_BTCHW.flatten(1, 2), noisy_BCHW], 1))
        return self.leave(self.unet(x, condition_BD))

    def denoise(
        self, noisy_BCHW: Tensor, sigma_B: Tensor, known_BTCHW: Tensor, actions_BTA: Tensor
    ) -> tuple[Tensor, Tensor, Scales]:
        """The clean picture, rounded to 8 bits, what the network said, and the scales between them."""
        scales = precondition(sigma_B, self.config)
        said = self(
            noisy_BCHW * scales.c_in, scales.c_noise, known_BTCHW / self.config.sigma_data, actions_BTA
        ).float()
        clean = scales.c_skip * noisy_BCHW + scales.c_out * said
        return to_eight_bits(clean), said, scales

    def loss(self, frames_BTCHW: Tensor, actions_BTA: Tensor) -> Tensor:
        """Mean over `own_steps` + 1 next frames of clips of `context` + 1 + `own_steps` frames.

        actions[t] leads from frame t to t + 1.
        """
        config, known = self.config, self.config.context
        frames = list(frames_BTCHW.unbind(1))
        losses = []
        for place in range(known, known + 1 + config.own_steps):
            true = frames_BTCHW[:, place]
            batch = len(true)
            log_B = config.log_mean + config.log_std * torch.randn(batch, device=true.device)
            sigma_B = log_B.exp().clamp(*config.sigma_bounds)
            offset = config.sigma_offset * torch.randn(batch, 3, 1, 1, device=true.device)
            noisy = true + offset + sigma_B[:, None, None, None] * torch.randn_like(true)
            clean, said, scales = self.denoise(
                noisy,
                sigma_B,
                torch.stack(frames[place - known : place], 1),
                actions_BTA[:, place - known : place],
            )
            losses.append(F.mse_loss(said, (true - scales.c_skip * noisy) / scales.c_out))
            frames[place] = clean.detach()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def rollout(
        self, known_BTCHW: Tensor, known_actions_BTA: Tensor, actions_BTA: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Imagine a frame for each of `actions`, after `context` known frames or more."""
        frames = list(known_BTCHW.unbind(1))
        all_actions = torch.cat([known_actions_BTA, actions_BTA], 1)
        last = self.config.context
        for place in range(len(frames), len(frames) + actions_BTA.shape[1]):
            known = torch.stack(frames[-last:], 1)
            frames.append(self.sample(known, all_actions[:, place - last : place], generator))
        return torch.stack(frames[known_BTCHW.shape[1] :], 1)

    @torch.no_grad()
    def sample(self, known_BTCHW: Tensor, actions_BTA: Tensor, generator: torch.Generator) -> Tensor:
        """One frame by Euler steps of the probability flow (EDM, algorithm 1 of order 1)."""
        x = torch.randn(known_BTCHW[:, 0].shape, generator=generator, device=known_BTCHW.device)
        levels = sigmas(self.config).tolist()
        x = x * levels[0]
        for level, following in itertools.pairwise(levels):
            sigma_B = torch.full((len(x),), level, device=x.device)
            clean, _, _ = self.denoise(x, sigma_B, known_BTCHW, actions_BTA)
            x = x + (following - level) * (x - clean) / level
        return x


class UNet(nn.Module):
    """Residual blocks at halving resolutions and back, every output concatenated on the way up."""

    def __init__(self, channels: tuple[int, ...], depth: int, condition: int) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(0, level - 1)]
            self.shrink.append(nn.Conv2d(before, before, 3, stride=2, padding=1) if level else nn.Identity())
            self.down.append(
                nn.ModuleList(
                    ResBlock(before if block == 0 else width, width, condition) for block in range(depth)
                )
            )
            widths = [(2 * width, width)] * depth + [(before + width, before)]
            self.up.append(nn.ModuleList(ResBlock(wide, out, condition) for wide, out in widths))
            self.grow.append(
                nn.Conv2d(width, width, 3, padding=1) if level < len(channels) - 1 else nn.Identity()
            )
        self.middle = nn.ModuleList(
            ResBlock(channels[-1], channels[-1], condition, attends=True) for _ in range(2)
        )

    def forward(self, x: Tensor, condition_BD: Tensor) -> Tensor:
        """Features of the input's size."""
        kept: list[list[Tensor]] = []
        for shrink, blocks in zip(self.shrink, self.down, strict=True):
            x = shrink(x)
            outputs = [x]
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, condition_BD)
                outputs.append(x)
            kept.append(outputs)
        for block in self.middle:
            x = block(x, condition_BD)
        for level in reversed(range(len(kept))):
            if level < len(kept) - 1:
                x = self.grow[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for block, skip in zip(self.up[level], reversed(kept[level]), strict=True):  # type: ignore[arg-type]
                x = block(torch.cat([x, skip], 1), condition_BD)
        return x


class ResBlock(nn.Module):
    """Two convolutions under adaptive group norm, the identity at first where the width stays."""

    def __init__(self, width: int, out: int, condition: int, *, attends: bool = False) -> None:
        super().__init__()
        self.modulate = nn.Linear(condition, 2 * (width + out))
        self.widths = (width, width, out, out)
        self.groups = (_groups(width), _groups(out))
        self.first = nn.Conv2d(width, out, 3, padding=1)
        self.second = _zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.attention = Attention(out) if attends else nn.Identity()

    def forward(self, x: Tensor, condition_BD: Tensor) -> Tensor:
        """x [B, width, h, w] -> [B, out, h, w]."""
        parts = [part[:, :, None, None] for part in self.modulate(condition_BD).split(self.widths, 1)]
        h = self.first(F.silu(F.group_norm(x, self.groups[0]) * (1 + parts[0]) + parts[1]))
        h = self.second(F.silu(F.group_norm(h, self.groups[1]) * (1 + parts[2]) + parts[3]))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over all places of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm = _norm(width)
        self.project = nn.Conv2d(width, 3 * width, 1)
        self.leave = _zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x + attention."""
        heads = self.project(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        mixed = F.scaled_dot_product_attention(*heads.unbind(1))
        return x + self.leave(mixed.transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[-2:]))


def to_eight_bits(pictures: Tensor) -> Tensor:
    """Pictures as a screen would show them, again in [-1, 1]; DIAMOND cuts, this rounds."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def matched(config: EdmConfig, parameters: int) -> EdmConfig:
    """The config whose widths, in steps of 16, come nearest to a number of parameters."""
    shares = [width / config.channels[0] for width in config.channels]
    options = [
        replace(config, channels=tuple(round(share * base / 16) * 16 for share in shares))
        for base in range(16, 400, 16)
    ]
    with torch.device("meta"):
        return min(
            options, key=lambda one: abs(sum(p.numel() for p in EdmUNet(one).parameters()) - parameters)
        )


def _groups(width: int) -> int:
    return max(1, width // GROUP) if width % max(1, width // GROUP) == 0 else 1


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(width), width)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
