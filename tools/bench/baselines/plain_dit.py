"""A peer: a plain diffusion-forcing transformer on latents.

Chen et al. 2024, "Diffusion forcing: next-token prediction meets full-sequence diffusion" (arXiv 2407.01392):
each frame of a clip has a noise level of its own, drawn independently, and a causal network denoises all of
them at once. The network is a DiT (Peebles and Xie 2023, arXiv 2212.09748) with one attention over all tokens
of all frames so far (block-causal), adaLN-Zero from level and action repeated for each token, GELU MLPs of
ratio 4, as in open re-implementations of such world models. It predicts v (Salimans and Ho 2022, arXiv
2202.00512, app. D) under the cosine schedule, and is sampled by 10 deterministic DDIM steps (Song et al.
2021, arXiv 2010.02502, eq. 12), frame after frame.

Chosen in its favour: keys and values of known frames are kept, rotary positions in time (so that the window
can roll), a little noise on known frames, told to the network, as the paper does against drift; the latents
are those of the other model's tokenizer.

Shapes: B batch, T frames, N tokens a frame, M tokens of all frames, C channels, h w latent, D width, A action
dims, H heads, d head dims. Level t: 0 clean, 1 noise.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """Size and sampler."""

    action_dims: int
    channels: int = 16
    side: int = 16
    """Rows and columns of a latent."""
    width: int = 384
    depth: int = 12
    patch: int = 2
    window: int = 16
    """Frames in sight, the new one included: the clip length of training."""
    steps: int = 10
    context_level: float = 0.1
    """Noise level of frames that are known."""

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return (self.side // self.patch) ** 2

    @property
    def heads(self) -> int:
        """Of 64 dims."""
        return max(1, self.width // 64)


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = cos(pi t / 2) and sigma = sin(pi t / 2): z = alpha x + sigma eps keeps unit variance."""
    return (t * math.pi / 2).cos(), (t * math.pi / 2).sin()


def velocity(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = alpha eps - sigma x, of a level that broadcasts."""
    alpha, sigma = signal_and_noise(t)
    return alpha * eps - sigma * x


def ddim_step(z: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From level t to s along the direction that v gives: x = alpha z - sigma v, eps = sigma z + alpha v."""
    alpha, sigma = signal_and_noise(t)
    alpha_s, sigma_s = signal_and_noise(s)
    return alpha_s * (alpha * z - sigma * v) + sigma_s * (sigma * z + alpha * v)


@dataclass
class Cache:
    """Rotated keys and values of the frames in sight, in slots that are written in turn."""

    keys: Tensor
    """[L, B, H, window - 1, N, d]"""
    values: Tensor
    seen_W: Tensor
    """Which slots hold a frame."""
    frame: int = 0
    """Frames so far."""


class PlainDiT(nn.Module):
    """The network with its loss and its rollout."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        features = config.channels * config.patch**2
        self.enter = nn.Linear(features, width)
        self.place_ND = nn.Parameter(0.02 * torch.randn(config.tokens, width))
        self.level = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.action = nn.Sequential(
            nn.Linear(config.action_dims + 1, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.final = _zero(nn.Linear(width, 2 * width))
        self.leave = _zero(nn.Linear(width, features))

    def condition(self, t_BT: Tensor, actions_BTA: Tensor, known_BT: Tensor) -> Tensor:
        """[B, T, D] from levels, the actions that led to the frames, and whether those are known."""
        half = torch.exp(-math.log(10_000) * torch.arange(128, device=t_BT.device) / 128)
        angle = 1000 * t_BT[..., None] * half
        told = torch.cat([actions_BTA * known_BT[..., None], known_BT[..., None]], -1)
        return self.level(torch.cat([angle.cos(), angle.sin()], -1)) + self.action(told)

    def forward(
        self,
        z_BTChw: Tensor,
        condition_BTD: Tensor,
        first: int | Tensor = 0,
        cache: Cache | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """v of frames `first` and on; they see what is in the cache, or without one each other, causally.

        Also gives each block's rotated keys and values if they are to be kept.
        """
        config = self.config
        frames = z_BTChw.shape[1]
        x_BTND = self.enter(patchify(z_BTChw, config.patch)) + self.place_ND
        times_T = first + torch.arange(frames, device=z_BTChw.device)
        mask = None
        if cache is None:
            frame_M = torch.arange(frames, device=z_BTChw.device).repeat_interleave(config.tokens)
            mask = frame_M[:, None] >= frame_M
        else:
            assert frames == 1, "one frame at a time against the cache"
            seen_M = cache.seen_W.repeat_interleave(config.tokens)
            mask = torch.cat([seen_M, seen_M.new_ones(config.tokens)])[None]
        x_BMD = x_BTND.flatten(1, 2)
        condition_BMD = condition_BTD.repeat_interleave(config.tokens, 1)
        kept = []
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else (cache.keys[layer], cache.values[layer])
            x_BMD, new = block(x_BMD, condition_BMD, times_T, mask, past)
            if keep:
                kept.append(new)
        shift, scale = self.final(F.silu(condition_BMD)).chunk(2, -1)
        v_BMD = self.leave(_norm(x_BMD) * (1 + scale) + shift)
        return unpatchify(v_BMD.unflatten(1, (frames, config.tokens)), config.patch, config.side), kept

    def loss(self, latents_BTChw: Tensor, actions_BTA: Tensor) -> Tensor:
        """Mean squared error of v, a level a frame; actions[t] leads from frame t to t + 1."""
        batch, frames = latents_BTChw.shape[:2]
        t_BT = torch.rand(batch, frames, device=latents_BTChw.device)
        eps = torch.randn_like(latents_BTChw)
        t = t_BT[..., None, None, None]
        alpha, sigma = signal_and_noise(t)
        led_BTA, known_BT = led_by(actions_BTA[:, : frames - 1])
        v, _ = self(alpha * latents_BTChw + sigma * eps, self.condition(t_BT, led_BTA, known_BT))
        return F.mse_loss(v.float(), velocity(latents_BTChw, eps, t))

    @torch.no_grad()
    def rollout(
        self, known_BTChw: Tensor, known_actions_BTA: Tensor, actions_BTA: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Imagine a latent for each of `actions`, after some and the actions between them."""
        cache = self.empty_cache(known_BTChw)
        led_BTA, known_BT = led_by(known_actions_BTA)
        for place in range(known_BTChw.shape[1]):
            one = slice(place, place + 1)
            self.commit(cache, known_BTChw[:, one], led_BTA[:, one], known_BT[:, one], generator)
        frames = []
        for place in range(actions_BTA.shape[1]):
            action_B1A = actions_BTA[:, place : place + 1]
            ones_B1 = torch.ones(len(action_B1A), 1, device=action_B1A.device)
            frames.append(self.sample(cache, action_B1A, ones_B1, generator))
            self.commit(cache, frames[-1], action_B1A, ones_B1, generator)
        return torch.cat(frames, 1)

    def sample(
        self, cache: Cache, action_B1A: Tensor, known_B1: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The next latent [B, 1, C, h, w] by DDIM."""
        config = self.config
        shape = (len(action_B1A), 1, config.channels, config.side, config.side)
        z = torch.randn(shape, generator=generator, device=action_B1A.device)
        levels = torch.linspace(1, 0, config.steps + 1, device=z.device)
        for t, s in itertools.pairwise(levels):
            condition = self.condition(t.expand(len(z), 1), action_B1A, known_B1)
            v, _ = self.run(z, condition, torch.tensor(cache.frame, device=z.device), cache)
            z = ddim_step(z, v.float(), t, s)
        return z

    def commit(
        self,
        cache: Cache,
        frame_B1Chw: Tensor,
        action_B1A: Tensor,
        known_B1: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Take a frame in, with a little noise that the network is told."""
        t_B1 = torch.full_like(known_B1, self.config.context_level)
        alpha, sigma = signal_and_noise(t_B1[..., None, None, None])
        eps = torch.randn(frame_B1Chw.shape, generator=generator, device=frame_B1Chw.device)
        _, kept = self.run(
            alpha * frame_B1Chw + sigma * eps,
            self.condition(t_B1, action_B1A, known_B1),
            torch.tensor(cache.frame, device=eps.device),
            cache,
            True,
        )
        slot = cache.frame % len(cache.seen_W)
        for layer, (key, value) in enumerate(kept):
            cache.keys[layer, :, :, slot] = key
            cache.values[layer, :, :, slot] = value
        cache.seen_W[slot] = True
        cache.frame += 1

    def run(self, *arguments: object) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The network as it is sampled from, which may be replaced by a compiled one."""
        return self(*arguments)

    def empty_cache(self, like_BTChw: Tensor) -> Cache:
        """No frame yet."""
        config = self.config
        size = (
            config.depth,
            len(like_BTChw),
            config.heads,
            config.window - 1,
            config.tokens,
            config.width // config.heads,
        )
        half = torch.is_autocast_enabled(like_BTChw.device.type)
        keys = torch.zeros(size, device=like_BTChw.device, dtype=torch.bfloat16 if half else like_BTChw.dtype)
        seen_W = torch.zeros(config.window - 1, dtype=torch.bool, device=like_BTChw.device)
        return Cache(keys, keys.clone(), seen_W)


class PlainBlock(nn.Module):
    """Attention and MLP under adaLN-Zero, modulated token by token."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        width, self.heads, self.tokens = config.width, config.heads, config.tokens
        self.modulate = _zero(nn.Linear(width, 6 * width))
        self.project = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        x_BMD: Tensor,
        condition_BMD: Tensor,
        times_T: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens of all frames, and this block's keys and values [B, H, N, d] of the last frame."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulate(F.silu(condition_BMD)).chunk(6, -1)
        heads = self.project(_norm(x_BMD) * (1 + scale_a) + shift_a).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        times_M = times_T.repeat_interleave(self.tokens)
        q, k = in_time(q, times_M), in_time(k, times_M)
        new = (k[:, :, -self.tokens :], v[:, :, -self.tokens :])
        if past is not None:
            k, v = (
                torch.cat([old.flatten(2, 3).to(one.dtype), one], 2)
                for old, one in zip(past, (k, v), strict=True)
            )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BMD = x_BMD + gate_a * self.leave(mixed.transpose(1, 2).flatten(2))
        return x_BMD + gate_m * self.mlp(_norm(x_BMD) * (1 + scale_m) + shift_m), new


def in_time(x_BHMd: Tensor, times_M: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of frames in the first half of the head's dims."""
    pairs = x_BHMd.shape[-1] // 4
    rates = 100.0 ** -(torch.arange(pairs, device=x_BHMd.device) / pairs)
    angle_MP = times_M[:, None] * rates
    cos, sin = angle_MP.cos().to(x_BHMd.dtype), angle_MP.sin().to(x_BHMd.dtype)
    a, b, rest = x_BHMd.split((pairs, pairs, x_BHMd.shape[-1] - 2 * pairs), -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def led_by(actions_BTA: Tensor) -> tuple[Tensor, Tensor]:
    """For each of T + 1 frames the action that led to it, and whether there is one: not for the first."""
    led_BTA = F.pad(actions_BTA, (0, 0, 1, 0))
    known_BT = torch.ones(led_BTA.shape[:2], device=led_BTA.device)
    known_BT[:, 0] = 0
    return led_BTA, known_BT


def patchify(z_BTChw: Tensor, patch: int) -> Tensor:
    """[B, T, C, h, w] -> [B, T, N, C * patch * patch]."""
    parts = z_BTChw.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # b t c r p q s
    return parts.permute(0, 1, 3, 5, 2, 4, 6).flatten(2, 3).flatten(3)


def unpatchify(x_BTNX: Tensor, patch: int, side: int) -> Tensor:
    """The inverse of `patchify`."""
    rows = side // patch
    parts = x_BTNX.unflatten(2, (rows, rows)).unflatten(-1, (-1, patch, patch))  # b t r q c p s
    return parts.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def matched(config: PlainConfig, parameters: int) -> PlainConfig:
    """The config whose depth comes nearest to a number of parameters."""
    with torch.device("meta"):
        return min(
            (replace(config, depth=depth) for depth in range(1, 49)),
            key=lambda one: abs(sum(p.numel() for p in PlainDiT(one).parameters()) - parameters),
        )


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
