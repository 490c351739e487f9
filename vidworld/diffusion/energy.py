"""The energy score: a proper score of samples, so that one-step samples learn the spread of the future.

Gneiting & Raftery 2007, for vectors; trained on a model that takes noise as an input (distributional
diffusion models, De Bortoli et al. 2025; FGN, Alet et al. 2025).
"""

from dataclasses import dataclass, field

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.types import Frames


@dataclass(frozen=True)
class EnergyConfig:
    """Energy-score fine-tune of one-step samples."""

    samples: int = 2
    """Samples of each target frame, at least 2."""
    fairness: float = 0.95
    """1 is the fair score, which is degenerate at two samples; 0 is the biased one."""
    patch: int = 2
    """Latents are scored in patches of this many pixels a side, all channels of a view together."""
    scales: tuple[int, ...] = field(default=(1,), metadata={"omit_default": True})
    """Patches of latents as they are (1), and of their means over so many pixels a side: scores of small
    patches alone do not see whether neighbours agree (Lang et al. 2025, arXiv 2506.10868)."""
    global_weight: float = 0.5
    """Weight of the score of whole frames, all views together, against the mean over patches."""
    mean_weight: float = 0.0
    """Weight of the squared error of one sample more, drawn from no noise at all: above 0 the world learns
    the mean of a frame beside its spread, and `sampler.temperature` 0 imagines it."""

    def __post_init__(self) -> None:
        """Refuse values outside their range with ConfigError."""
        if self.samples < 2:
            raise ConfigError("objective.energy.samples", got=self.samples, expected="2 or more")
        if not 0 <= self.fairness <= 1:
            raise ConfigError("objective.energy.fairness", got=self.fairness, expected="a share from 0 to 1")
        if self.patch < 1 or not min(self.global_weight, self.mean_weight) >= 0:
            raise ConfigError(
                "objective.energy",
                got=(self.patch, self.global_weight, self.mean_weight),
                expected="a patch of 1 or more, no weight below 0",
            )
        if not self.scales or min(self.scales) < 1 or len(set(self.scales)) < len(self.scales):
            raise ConfigError(
                "objective.energy.scales",
                got=self.scales,
                expected="different scales of 1 or more, as [1, 2, 4]",
            )

    @property
    def streams(self) -> int:
        """Frames that are predicted of each: the samples, and last the mean where it is learnt."""
        return self.samples + (self.mean_weight > 0)


def energy_score(samples_MXD: Tensor, target_XD: Tensor, *, fairness: float = 1.0) -> Tensor:
    """Energy score of M samples for vectors along the last axis; any axes X between; lower is better.

    (1/M) sum_j |x_j - y|  -  (1 - e) / (2 M (M - 1)) sum_{j != k} |x_j - x_k|,  e = (1 - fairness) / M: fair
    at fairness 1, almost fair at 0.95 (AIFS-CRPS, Lang et al. 2024), the score of the empirical distribution
    at 0. With D = 1 this is the CRPS.
    """
    num_samples = len(samples_MXD)
    if num_samples < 2:
        raise ValueError(f"energy score of {num_samples} samples; expected at least 2")
    error_X = torch.linalg.vector_norm(samples_MXD - target_XD, dim=-1).mean(0)
    first, second = torch.triu_indices(num_samples, num_samples, offset=1, device=samples_MXD.device)
    spread_X = torch.linalg.vector_norm(samples_MXD[first] - samples_MXD[second], dim=-1).mean(0)
    biased = (1 - fairness) / num_samples
    return error_X - 0.5 * (1 - biased) * spread_X


def frame_energy_scores(
    samples_M: Frames,
    target: Frames,
    config: EnergyConfig,
    used_B: Tensor | None = None,
    weight_BTV1hw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, T] of latents (mean over patches of all scales plus whole frames) and of proprioception.

    `samples_M` has an axis of samples in front of each tensor. Norms are divided by the root of their
    dimensions, so that each score is of the order of the error of one value; means over s x s pixels count s
    times, so that this also holds of them where errors are independent. `used_B`: the share of a row's
    latents that is not padding, where samples and target are both zero; whole patches of it, in number and in
    dimensions. `weight_BTV1hw`: weights of latent positions; a patch gets their mean, whole frames none.
    """

    def scaled(samples: Tensor, target: Tensor) -> Tensor:
        score = energy_score(samples.float(), target.float(), fairness=config.fairness)
        return score / max(1, target.shape[-1]) ** 0.5

    def of_patches(scale: int) -> Tensor:
        patches_BTVhw = scaled(
            *(
                _patches(scale * _pooled(one.latents_BTVChw, scale), config.patch)
                for one in (samples_M, target)
            )
        )
        if weight_BTV1hw is not None:
            patches_BTVhw = patches_BTVhw * _patches(_pooled(weight_BTV1hw, scale), config.patch).mean(-1)
        return patches_BTVhw.mean((-3, -2, -1))

    patches = torch.stack([of_patches(scale) for scale in config.scales]).mean(0)
    whole = scaled(samples_M.latents_BTVChw.flatten(-4), target.latents_BTVChw.flatten(-4))
    if used_B is not None:
        patches, whole = patches / used_B[:, None], whole / used_B[:, None].sqrt()
    return patches + config.global_weight * whole, scaled(samples_M.proprio_BTS, target.proprio_BTS)


def _pooled(latents_XChw: Tensor, scale: int) -> Tensor:
    """Means over scale x scale pixels."""
    if scale == 1:
        return latents_XChw
    height, width = latents_XChw.shape[-2:]
    if height % scale or width % scale:
        raise ConfigError(
            "objective.energy.scales", got=scale, expected=f"divisors of the latent size {height}x{width}"
        )
    return F.avg_pool2d(latents_XChw.flatten(0, -4), scale).unflatten(0, latents_XChw.shape[:-3])


def _patches(latents_XVChw: Tensor, patch: int) -> Tensor:
    """Cut latents [..., V, C, h, w] into patches [..., V, h/patch, w/patch, C*patch*patch]."""
    height, width = latents_XVChw.shape[-2:]
    if height % patch or width % patch:
        raise ConfigError(
            "objective.energy.patch", got=patch, expected=f"a divisor of the latent size {height}x{width}"
        )
    pattern = "... c (h p) (w q) -> ... h w (c p q)"
    return einops.rearrange(latents_XVChw, pattern, p=patch, q=patch)
