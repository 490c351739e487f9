"""What the model learns: flow matching with shortcut forcing, one-step regression, or energy scores.

All randomness comes from an explicit generator or arrives as noise. Context streams are the model's business
(the `Predict` closes over them): here are only the frames to be denoised.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vidworld.diffusion.energy import EnergyConfig, frame_energy_scores
from vidworld.diffusion.energy import energy_score as energy_score
from vidworld.diffusion.history import LEAST_FRAMES
from vidworld.diffusion.motion import motion_weights
from vidworld.diffusion.path import advance, clean_from, constant_level, mix, shift, velocity
from vidworld.diffusion.predict import Predict
from vidworld.errors import ConfigError
from vidworld.types import Frames, SignalLevel


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective of the dynamics (Dreamer 4, Hafner et al. 2025; shortcut models, Frans et al. 2024)."""

    kind: Literal["shortcut", "regression", "energy"] = "shortcut"
    """`shortcut` learns to sample in 1 to `finest_steps` steps; `regression` the mean of a frame in one step,
    for what follows from the past; `energy` is a fine-tune of one-step samples."""
    finest_steps: int = 16
    """Steps of the finest sampler, a power of two: 1/finest_steps is the step size of plain flow matching."""
    context_noise: float = 0.3
    """Context frames get a share of noise uniform in [0, context_noise], which the model is told."""
    bootstrap_fraction: float = 0.25
    """Share of rows that learn large steps from two half steps."""
    bootstrap_start: float = 0.2
    """Share of training before the bootstrap begins: half steps must be worth copying."""
    pure_noise_fraction: float = 0.3
    """Extra mass of flow levels at tau = 0, where few-step sampling starts."""
    proprio_weight: float = 0.2
    """Weight of proprioception against the latents."""
    motion_weight: float = 0.0
    """Weight of latents where the picture has been changing, see `motion.motion_weights`: 1 shares up to half
    of a frame's weight by change; 0 weighs all places alike."""
    ramp: tuple[float, float] = (0.9, 0.1)
    """Weight of a frame at level tau in `shortcut`: ramp[0] * tau + ramp[1]."""
    resample_fraction: float = 0.0
    """Share of rows whose context is from some frame on what the model itself imagines (`history`)."""
    resample_start: float = 0.7
    """Share of training before that begins: the model must imagine well first."""
    resample_passes: int = 1
    """Frames in a row that are imagined as a rollout would; those after them see fewer imagined ones."""
    shift: Literal["auto", "none"] = "auto"
    """Shift of flow levels towards noise for latents of more than 4096 tokens x channels."""
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    """Read when kind is `energy`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range with ConfigError."""
        if self.finest_steps < 1 or self.finest_steps & (self.finest_steps - 1):
            raise ConfigError("objective.finest_steps", got=self.finest_steps, expected="a power of two")
        shares = ("context_noise", "bootstrap_fraction", "bootstrap_start", "pure_noise_fraction")
        for name in (*shares, "resample_fraction", "resample_start"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"objective.{name}", got=value, expected="a share from 0 to 1")
        if self.resample_passes < 1:
            raise ConfigError("objective.resample_passes", got=self.resample_passes, expected="1 or more")
        weights = (self.proprio_weight, self.motion_weight, self.ramp[1], sum(self.ramp))
        if not min(weights) >= 0 or not all(map(math.isfinite, weights)):
            got = (
                f"proprio_weight {self.proprio_weight}, motion_weight {self.motion_weight}, ramp {self.ramp}"
            )
            raise ConfigError("objective weights", got=got, expected="none below 0")

    @property
    def one_step(self) -> float:
        """The step size that the model is told for a sample in one step: the largest that it learns."""
        taught = self.kind != "shortcut" or (self.bootstrap_fraction > 0 and self.finest_steps > 1)
        return 1.0 if taught else 1 / self.finest_steps


@dataclass(frozen=True)
class Draws:
    """Levels and step sizes of a batch; the first `num_bootstrap` rows are the bootstrap rows."""

    level: SignalLevel
    step_BT: Tensor
    num_bootstrap: int


def bootstrap_rows(config: ObjectiveConfig, batch_size: int, progress: float, count: int) -> int:
    """Bootstrap rows of a micro-batch, from the share of training done and micro-batches so far.

    Alternates between whole numbers where the share is no whole number of rows, and is the same on every
    rank: ranks that disagree on the number of model calls hang under ZeRO-3.
    """
    if config.kind != "shortcut" or progress < config.bootstrap_start or config.finest_steps == 1:
        return 0
    return _share_of_rows(config.bootstrap_fraction, batch_size, count)


def resample_rows(
    config: ObjectiveConfig, batch_size: int, num_frames: int, progress: float, count: int
) -> int:
    """Rows of a micro-batch with an imagined history, as `bootstrap_rows`; none where clips are too short."""
    if progress < config.resample_start or num_frames < LEAST_FRAMES:
        return 0
    return _share_of_rows(config.resample_fraction, batch_size, count)


def _share_of_rows(fraction: float, batch_size: int, count: int) -> int:
    rows = batch_size * fraction
    return min(batch_size, int(rows * (count + 1) + 1e-6) - int(rows * count + 1e-6))


def draw_levels(
    frames: Frames, config: ObjectiveConfig, *, num_bootstrap: int, generator: torch.Generator
) -> Draws:
    """Draw a level and a step size for each frame of a batch [B, T].

    Flow rows: d = 1/finest_steps; tau uniform in [0, 1), shifted, and 0 for `pure_noise_fraction` of them.
    Bootstrap rows: d uniform over 1, 1/2, ... 2/finest_steps; tau uniform over the multiples of d below 1.
    Of `regression` all frames are pure noise, to be left in one step: tau = 0, d = 1.
    """
    if config.kind == "regression":
        pure = constant_level(frames, 0.0)
        return Draws(pure, torch.ones_like(pure.signal), 0)
    shape, device = frames.proprio_BTS.shape[:2], generator.device
    uniform_BT = torch.rand(shape, generator=generator, device=device)
    level = SignalLevel.from_signal(uniform_BT)
    if config.shift == "auto":
        level = shift(level, frames.latents_BTVChw[0, 0].numel())
    pure_BT = torch.rand(shape, generator=generator, device=device) < config.pure_noise_fraction
    tau_BT = torch.where(pure_BT, 0.0, level.signal)

    num_sizes = max(1, config.finest_steps.bit_length() - 1)
    octave_BT = torch.randint(num_sizes, shape, generator=generator, device=device)
    coarse_BT = 0.5**octave_BT
    grid_BT = torch.floor(uniform_BT / coarse_BT) * coarse_BT
    is_bootstrap_B1 = torch.arange(shape[0], device=device)[:, None] < num_bootstrap
    signal_BT = torch.where(is_bootstrap_B1, grid_BT, tau_BT)
    step_BT = torch.where(is_bootstrap_B1, coarse_BT, 1 / config.finest_steps)
    target = frames.proprio_BTS.device
    return Draws(SignalLevel.from_signal(signal_BT.to(target)), step_BT.to(target), num_bootstrap)


def context_levels(frames: Frames, config: ObjectiveConfig, *, generator: torch.Generator) -> SignalLevel:
    """Levels [B, T] of context frames: a share of noise uniform in [0, context_noise] for each frame."""
    noise_BT = torch.rand(frames.proprio_BTS.shape[:2], generator=generator, device=generator.device)
    return SignalLevel.from_noise(noise_BT.to(frames.proprio_BTS.device) * config.context_noise)


def noise_like(frames: Frames, *, generator: torch.Generator) -> Frames:
    """Standard normal frames of the same shape, in float32."""

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, device=generator.device).to(tensor.device)

    return frames.map(normal)


def bootstrap_target(predict: Predict, z: Frames, level: SignalLevel, step_BT: Tensor) -> Frames:
    """Where one step of size d should point, from two steps of d/2, without gradient.

    With b' and b'' the velocities of the two half steps, the target in x-space is
    z + (1 - tau) (b' + b'') / 2 (Dreamer 4, written for x-prediction).
    """
    with torch.no_grad():
        half_BT = step_BT / 2
        first = velocity(predict(z, level, half_BT), z, level)
        middle = advance(z, first, half_BT)
        middle_level = SignalLevel.from_signal(level.signal + half_BT)
        second = velocity(predict(middle, middle_level, half_BT), middle, middle_level)
        target = clean_from(z, first.map(lambda a, b: (a + b) / 2, second), level)
    if torch.is_autocast_enabled(step_BT.device.type):
        # torch 2.10 keeps the weights that were cast without gradient, and the loss would train none of them.
        torch.clear_autocast_cache()
    return target


def shortcut_loss(
    predict: Predict,
    predict_rows: Predict,
    clean: Frames,
    noise: Frames,
    draws: Draws,
    config: ObjectiveConfig,
    *,
    frame_weight_BT: Tensor | None = None,
    denominator: Tensor | float | None = None,
    used_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """Shortcut forcing in x-space: w(tau) |f(z, tau, d) - target|^2, w = 0.9 tau + 0.1; of regression w = 1.

    The target is the clean frame on flow rows and `bootstrap_target` on the first `draws.num_bootstrap` rows,
    for which `predict_rows` is `predict` on those rows alone. The error is a mean over a frame's latents plus
    `proprio_weight` times a mean over its proprioception; frames are averaged with `frame_weight_BT` (default
    1; all zero gives exactly 0). `denominator` replaces the sum of the weights, so that accumulated
    micro-batches of unequal weight add up to one large batch. Where pictures are padded with zeros in
    `clean`, `noise` and what `predict` gives, `used_B` is the share of a row's latents that is not padding:
    the mean is then over those alone. With `config.motion_weight` the mean over latents is weighted by
    `motion_weights(clean)`, for which every frame of `clean` counts.

    Returns "loss" to minimise, and for the log "flow" and "bootstrap" (the same over their rows), "latents"
    and "proprio" (the plain mean squared errors, without ramp and motion weight).
    """
    z = mix(clean, noise, draws.level)
    target, num_bootstrap = clean, draws.num_bootstrap
    if num_bootstrap:
        rows = slice(0, num_bootstrap)
        taught = bootstrap_target(predict_rows, z[rows], draws.level[rows], draws.step_BT[rows])
        target = Frames.cat([taught, clean[num_bootstrap:]], 0)
    moving_BTV1hw = motion_weights(clean, config.motion_weight, used_B) if config.motion_weight else None
    predicted = predict(z, draws.level, draws.step_BT)
    latents_BT, weighted_BT, proprio_BT = _frame_errors(predicted, target, moving_BTV1hw, used_B)
    ramp_BT = 1.0 if config.kind == "regression" else config.ramp[0] * draws.level.signal + config.ramp[1]
    loss_BT = ramp_BT * (weighted_BT + config.proprio_weight * proprio_BT)
    weight_BT = torch.ones_like(loss_BT) if frame_weight_BT is None else frame_weight_BT.to(loss_BT)
    return {
        "loss": weighted_mean(loss_BT, weight_BT, denominator),
        "flow": weighted_mean(loss_BT[num_bootstrap:], weight_BT[num_bootstrap:]).detach(),
        "bootstrap": weighted_mean(loss_BT[:num_bootstrap], weight_BT[:num_bootstrap]).detach(),
        "latents": weighted_mean(latents_BT, weight_BT).detach(),
        "proprio": weighted_mean(proprio_BT, weight_BT).detach(),
    }


def energy_loss(
    predict: Predict,
    clean: Frames,
    noise: Frames,
    config: ObjectiveConfig,
    *,
    frame_weight_BT: Tensor | None = None,
    denominator: Tensor | float | None = None,
    used_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """Energy score of one-step samples: tau = 0, d = 1, `config.energy.samples` samples of every frame.

    `noise` and what `predict` gives hold the M samples one after another along time [B, M * T], one target
    stream a sample; with `config.energy.mean_weight` one stream more, for which there is no noise: of it the
    loss is the squared error, as in `shortcut_loss`. Never couple them: no shared noise, no attention between
    samples. Weights as in `shortcut_loss`. With `used_B` patches are averaged over those that are not
    padding, and whole frames have their own number of dimensions. With `config.motion_weight` patches are
    weighted by the mean of `motion_weights(clean)` in them, and the score of whole frames stays as it is.

    Returns "loss", and for the log "latents" and "proprio" (their scores), with a mean also "mean", its loss.
    """
    num_samples = config.energy.samples
    level = constant_level(noise, 0.0)
    predicted = predict(noise, level, torch.ones_like(level.signal))
    streams_M = predicted.map(lambda tensor: tensor.unflatten(1, (config.energy.streams, -1)).movedim(1, 0))
    samples_M = streams_M[:num_samples]
    moving_BTV1hw = motion_weights(clean, config.motion_weight, used_B) if config.motion_weight else None
    latents_BT, proprio_BT = frame_energy_scores(samples_M, clean, config.energy, used_B, moving_BTV1hw)
    loss_BT = latents_BT + config.proprio_weight * proprio_BT
    weight_BT = torch.ones_like(loss_BT) if frame_weight_BT is None else frame_weight_BT.to(loss_BT)
    found = {
        "latents": weighted_mean(latents_BT, weight_BT).detach(),
        "proprio": weighted_mean(proprio_BT, weight_BT).detach(),
    }
    if config.energy.mean_weight:
        mean = streams_M[num_samples:].map(lambda tensor: tensor.squeeze(0))
        _, weighted_BT, squared_BT = _frame_errors(mean, clean, moving_BTV1hw, used_B)
        mean_BT = weighted_BT + config.proprio_weight * squared_BT
        found["mean"] = weighted_mean(mean_BT, weight_BT).detach()
        loss_BT = loss_BT + config.energy.mean_weight * mean_BT
    return {"loss": weighted_mean(loss_BT, weight_BT, denominator), **found}


def weighted_mean(value_BT: Tensor, weight_BT: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean over frames of positive weight, exactly 0 (and without NaN) when there is none."""
    total = torch.where(weight_BT > 0, value_BT * weight_BT, 0.0).sum()
    count = weight_BT.sum() if denominator is None else torch.as_tensor(denominator).to(weight_BT)
    return total / torch.where(count > 0, count, 1.0)


def _frame_errors(
    predicted: Frames, target: Frames, weight_BTV1hw: Tensor | None, used_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared errors of frames [B, T]: of latents, of latents by weight, and of proprioception."""
    squared = predicted.map(_squared_error, target)
    latents_BT, proprio_BT = _mean_of_frame(squared.latents_BTVChw), _mean_of_frame(squared.proprio_BTS)
    weighted_BT = latents_BT
    if weight_BTV1hw is not None:
        weighted_BT = _mean_of_frame(squared.latents_BTVChw * weight_BTV1hw)
    if used_B is not None:
        latents_BT, weighted_BT = latents_BT / used_B[:, None], weighted_BT / used_B[:, None]
    return latents_BT, weighted_BT, proprio_BT


def _squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """In float32 or better."""
    difference = predicted - target
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).square()


def _mean_of_frame(squared: Tensor) -> Tensor:
    """Mean over all axes but batch and time; 0 where a frame has no values."""
    squared = squared.flatten(2)
    return squared.mean(-1) if squared.shape[-1] else squared.sum(-1)
