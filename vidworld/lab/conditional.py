"""What else could have happened in an episode, given its first frames: weighted replays.

The commands of an episode are frozen, so a draw of what is hidden leads to one outcome. Draws come from the
prior and weigh as much as they agree with the frames that were seen: importance sampling, whose weighted
draws are draws from the conditional distribution (Robert and Casella, Monte Carlo Statistical Methods, 3.3).

The observer is a camera that reads an effect's `readout_noise` quantities once a frame, with independent
Gaussian errors of that size, and happened to read the truth. Frames before anything hidden shows agree bit
for bit, so draws given only those are draws from the prior, with equal weights.
"""

import dataclasses
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vidworld.errors import ConfigError, DataError
from vidworld.lab.effect import BaseEffect
from vidworld.lab.episode import LabEpisode, effect_of, play
from vidworld.lab.scene import Scene

FEW = 10
"""Effective draws below which there is a warning: too few for a distribution."""
RANGE_FLOOR = 1e-3
"""Added to the range of each dimension of proprioception: what stands still still has some noise."""


@dataclass(frozen=True)
class Conditional:
    """Weighted draws of what is hidden, given the first frames of an episode; N draws, T frames."""

    hidden: tuple[Mapping[str, float], ...]
    weights_N: np.ndarray
    """Sum to one."""
    outcomes_NT: Mapping[str, np.ndarray]

    @property
    def effective_draws(self) -> float:
        """1 / sum of squared weights (Kish, 1965): how many equal draws these are worth."""
        return float(1 / np.square(self.weights_N).sum())

    def mean(self, readout: str) -> np.ndarray:
        """Expected readout [T]."""
        return self.weights_N @ self.outcomes_NT[readout]

    def resample(self, count: int, seed: int = 0) -> np.ndarray:
        """Indices [count] of draws with equal weights, by systematic resampling (Kitagawa, 1996)."""
        places = (np.random.default_rng(seed).random() + np.arange(count)) / count
        return np.minimum(np.searchsorted(np.cumsum(self.weights_N), places), len(self.weights_N) - 1)


def conditional(
    episode: LabEpisode,
    k: int,
    n: int,
    *,
    seed: int = 0,
    proprio_noise: float | None = None,
    at_least: float = 0.0,
    frames: int | None = None,
) -> Conditional:
    """Draw `n` hidden values from the prior, weighted by agreement with frames 0 to k - 1.

    With `proprio_noise`, proprioception counts too: errors of that share of each dimension's range in the
    episode. The same seed gives the same draws whatever `k` is. `frames` (from k on) is how far each is
    played, and so the length of the outcomes: weights alone need no more than k. Raises ConfigError for
    impossible `k`, `n` and `frames`, DataError when the draws are worth fewer than `at_least` equal ones;
    warns when they are worth fewer than ten.
    """
    frames = episode.config.frames if frames is None else frames
    if not 1 <= k <= frames <= episode.config.frames or n < 1:
        expected = f"k 1..{episode.config.frames}, n >= 1, frames k..{episode.config.frames}"
        raise ConfigError("conditional", got=f"k {k}, n {n}, frames {frames}", expected=expected)
    if proprio_noise is not None and not proprio_noise > 0:
        raise ConfigError("proprio_noise", got=proprio_noise, expected="a positive share, or None")
    effect = effect_of(episode.kind, episode.config.frames)
    rng = np.random.default_rng([zlib.crc32(episode.kind.encode()), episode.seed, seed, 0xC0])
    scene = Scene(effect, episode.look, episode.visible, episode.config.size, episode.config.robot)  # type: ignore[arg-type]
    plan, begun = episode.plan, slice(frames)
    plan = dataclasses.replace(
        plan, joint_targets_TJ=plan.joint_targets_TJ[begun], gripper_T=plan.gripper_T[begun]
    )
    begun_episode = dataclasses.replace(episode, plan=plan)
    draws, outcomes, logs = [], [], []
    for _ in range(n):
        hidden = effect.prior(rng, episode.visible)
        run = play(begun_episode, effect, scene, hidden, render=False)
        draws.append(hidden)
        outcomes.append(run.outcomes_T)
        logs.append(log_likelihood(effect, episode, run, k, proprio_noise))
    weights_N = np.exp(np.array(logs) - max(logs))
    columns = {name: np.array([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
    found = Conditional(tuple(draws), weights_N / weights_N.sum(), columns)
    _check(found, n, k, at_least)
    return found


def log_likelihood(
    effect: BaseEffect, seen: LabEpisode, other: LabEpisode, k: int, proprio_noise: float | None = None
) -> float:
    """Log probability, but for a constant, of reading `seen` in the first `k` frames if `other` is true."""
    log = 0.0
    for name, sigma in effect.readout_noise.items():
        apart_T = other.outcomes_T[name][:k] - seen.outcomes_T[name][:k]
        if name in effect.angles:
            apart_T = (apart_T + np.pi) % (2 * np.pi) - np.pi
        log -= 0.5 * float(np.square(apart_T / sigma).sum())
    if proprio_noise is not None:
        scale_S = proprio_noise * (np.ptp(seen.proprio_TS, axis=0) + RANGE_FLOOR)
        log -= 0.5 * float(np.square((other.proprio_TS[:k] - seen.proprio_TS[:k]) / scale_S).sum())
    return log


def _check(found: Conditional, n: int, k: int, at_least: float) -> None:
    """Say when the weights have collapsed onto a few draws."""
    worth = found.effective_draws
    goal = max(at_least, FEW)
    advice = f"raise n to {int(np.ceil(n * goal / worth / 100) * 100)} or so, or condition on fewer frames"
    if worth < at_least:
        raise DataError(
            f"{n} draws given {k} frames", got=f"{worth:.1f} effective", expected=at_least, fix=advice
        )
    if worth < min(FEW, 0.5 * n):
        warnings.warn(
            f"{n} draws given {k} frames are worth {worth:.1f}: few agree with what was seen; {advice}",
            stacklevel=3,
        )
