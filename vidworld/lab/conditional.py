"""What else could have happened in an episode, given its first frames: weighted replays.

The commands of an episode are frozen, so a draw of what is hidden leads to one outcome. Draws weigh
prior x agreement with the frames that were seen / proposal: importance sampling, whose weighted draws are
draws from the conditional distribution (Robert and Casella, Monte Carlo Statistical Methods, 3.3). Where
those from the prior rarely agree, later ones are looked for near those that do: `vidworld.lab.importance`.

The observer is a camera that reads an effect's `readout_noise` quantities once a frame, with independent
Gaussian errors of that size, and happened to read the truth. Frames before anything hidden shows agree bit
for bit, so draws given only those are draws from the prior, with equal weights.
"""

import contextlib
import dataclasses
import multiprocessing
import statistics
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from vidworld.errors import ConfigError, DataError, VidworldError
from vidworld.lab.effect import BaseEffect
from vidworld.lab.episode import LabEpisode, effect_of, play
from vidworld.lab.importance import sample
from vidworld.lab.scene import Scene

FEW = 10
"""Effective draws below which there is a warning: too few for a distribution."""
RANGE_FLOOR = 1e-3
"""Added to the range of each dimension of proprioception: what stands still still has some noise."""
LEAST_WEIGHT = 1e-6
"""Share of the heaviest draw's weight below which a draw that was looked for is not played to its end."""


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
    adapt: bool = True,
    workers: int = 1,
    frames: int | None = None,
) -> Conditional:
    """Draw `n` hidden values, weighted so that they are draws given frames 0 to k - 1.

    With `proprio_noise`, proprioception counts too: errors of that share of each dimension's range in the
    episode. The same seed gives the same draws on any number of worker processes. Fewer than 80 draws all
    come from the prior, as do more while half of them agree with what was seen; then weights are likelihoods.
    Otherwise later draws are looked for where earlier ones agree, and those that weigh less than a millionth
    of the heaviest one are not played to their end and not returned. Without `adapt` all come from the prior.
    `frames` is the length of the outcomes, the episode's by default; weights alone need no more than `k`.

    Raises ConfigError for impossible `k`, `n`, `workers` and `frames`, DataError when the draws are worth
    fewer than `at_least` equal ones; warns when they are worth fewer than ten.
    """
    last = episode.config.frames if frames is None else frames
    if not 1 <= k <= last <= episode.config.frames or n < 1 or workers < 1:
        expected = f"k 1..{episode.config.frames}, frames from k on, n and workers >= 1"
        got = f"k {k}, frames {last}, n {n}, workers {workers}"
        raise ConfigError("conditional", got=got, expected=expected)
    if proprio_noise is not None and not proprio_noise > 0:
        raise ConfigError("proprio_noise", got=proprio_noise, expected="a positive share, or None")
    effect = effect_of(episode.kind, episode.config.frames)
    rng = np.random.default_rng([zlib.crc32(episode.kind.encode()), episode.seed, seed, 0xC0])
    dims = effect.hidden_dims if episode.hidden else 0
    hidden: list[Mapping[str, float]] = []
    runs: list[LabEpisode] = []

    with _player(episode, workers) as run_all:

        def simulate(points_ND: np.ndarray) -> np.ndarray:
            """Errors [N, R] of draws at points of a standard normal prior."""
            draws = [dict(effect.prior(rng, episode.visible)) for _ in points_ND]
            if dims:
                cube_ND = np.vectorize(statistics.NormalDist().cdf, otypes=[float])(points_ND)
                for draw, cube_D in zip(draws, cube_ND, strict=True):
                    draw |= effect.hidden_at(cube_D, episode.visible)
            new = run_all(draws, k)
            hidden.extend(draws)
            runs.extend(new)
            return np.array([errors(effect, episode, run, k, proprio_noise) for run in new])

        found = sample(simulate, dims, n, rng, adapt=adapt)
        weights_N = np.exp(found.log_weights_N - found.log_weights_N.max())
        kept = np.flatnonzero(weights_N > (LEAST_WEIGHT if found.adapted else -1))
        hidden = [hidden[index] for index in kept]
        runs = [runs[index] for index in kept] if k == last else run_all(hidden, last)

    columns = {name: np.array([run.outcomes_T[name] for run in runs]) for name in runs[0].outcomes_T}
    result = Conditional(tuple(hidden), weights_N[kept] / weights_N[kept].sum(), columns)
    _check(result, n, k, at_least)
    return result


def errors(
    effect: BaseEffect, seen: LabEpisode, other: LabEpisode, k: int, proprio_noise: float | None = None
) -> np.ndarray:
    """How far `other` is from `seen` in the readings of the first `k` frames, in standard deviations [R]."""
    parts = []
    for name, sigma in effect.readout_noise.items():
        apart_T = other.outcomes_T[name][:k] - seen.outcomes_T[name][:k]
        if name in effect.angles:
            apart_T = (apart_T + np.pi) % (2 * np.pi) - np.pi
        parts.append(apart_T / sigma)
    if proprio_noise is not None:
        scale_S = proprio_noise * (np.ptp(seen.proprio_TS, axis=0) + RANGE_FLOOR)
        parts.append(((other.proprio_TS[:k] - seen.proprio_TS[:k]) / scale_S).ravel())
    return np.concatenate(parts) if parts else np.zeros(0)


def log_likelihood(
    effect: BaseEffect, seen: LabEpisode, other: LabEpisode, k: int, proprio_noise: float | None = None
) -> float:
    """Log probability, but for a constant, of reading `seen` in the first `k` frames if `other` is true."""
    return -0.5 * float(np.square(errors(effect, seen, other, k, proprio_noise)).sum())


class _Player:
    """Plays an episode with other hidden values in one scene, without pictures."""

    def __init__(self, episode: LabEpisode) -> None:
        self.episode, self.effect = episode, effect_of(episode.kind, episode.config.frames)
        config = episode.config
        self.scene = Scene(self.effect, episode.look, episode.visible, config.size, config.robot)  # type: ignore[arg-type]

    def __call__(self, job: tuple[Mapping[str, float], int | None]) -> LabEpisode:
        hidden, frames = job
        return play(self.episode, self.effect, self.scene, hidden, render=False, frames=frames)


def _start_worker(episode: LabEpisode) -> None:
    global _worker
    _worker = _Player(episode)


def _play(job: tuple[Mapping[str, float], int | None]) -> LabEpisode:
    return _worker(job)


@contextlib.contextmanager
def _player(episode: LabEpisode, workers: int) -> Iterator[Callable[..., list[LabEpisode]]]:
    """A function that plays the episode with each of some hidden values, in their order."""
    if workers == 1:
        player = _Player(episode)
        yield lambda draws, frames: [player((hidden, frames)) for hidden in draws]
        return
    bare = dataclasses.replace(episode, frames_THWC=None, masks_THW={})
    # Spawned, not forked: a fork of a process with threads (torch, OpenMP) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (bare,))
    try:
        yield lambda draws, frames: list(pool.map(_play, [(hidden, frames) for hidden in draws]))
    except BrokenProcessPool:
        raise VidworldError(
            "a worker process died: out of memory (use fewer workers), or a script without the "
            '`if __name__ == "__main__":` guard'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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
