"""Read some episodes of a dataset, and keep of each what detectors and figures need.

Shapes: T frames, A action dims, S proprio dims, H W pixels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.manifest import Manifest, Sample
from vidworld.data.pool import num_cores
from vidworld.data.shards import EpisodeArrays, ShardDataset

MAX_FRAMES, MAX_BYTES = 512, 128 << 20
"""Frames read of one episode at most, and bytes of its pictures: enough for every detector, and it bounds
time and memory."""
THUMBNAILS = 8
MAX_PICTURED = 24
"""Thumbnails kept of an episode, and episodes of which they are kept."""
ANALYSED_ROWS = 64
"""Pictures are thinned to about this many rows before brightness and change are measured."""


@dataclass(frozen=True)
class ViewLook:
    """One camera in one episode; videos have all fields, latents no brightness."""

    brightness_T: np.ndarray
    """Mean of each picture, 0 to 255."""
    contrast_T: np.ndarray
    """Standard deviation of each picture's pixels."""
    change_T: np.ndarray
    """Mean absolute difference of picture t and t+1 [T-1], in levels of 255 (or latent units)."""
    thumbnails: tuple[np.ndarray, ...] = ()
    """Pictures [H, W, 3] spread over the episode."""


@dataclass(frozen=True)
class Look:
    """One episode, or the window of a long one, without its pictures."""

    sample: Sample
    split: str
    start: int
    """First frame of the window."""
    actions_TA: np.ndarray
    proprio_TS: np.ndarray
    timestamps_T: np.ndarray
    views: dict[str, ViewLook]
    stride: int = 1
    """Frames from one picture to the next: more than 1 for latents with a time stride."""

    @property
    def finite(self) -> bool:
        """Whether every number is one; detectors that calculate skip the others."""
        tables = (self.actions_TA, self.proprio_TS, self.timestamps_T)
        return all(bool(np.isfinite(table).all()) for table in tables)


@dataclass(frozen=True)
class Survey:
    """A manifest, and the episodes that were read; without any, only the manifest is judged."""

    manifest: Manifest
    looks: tuple[Look, ...] = ()

    def of(self, embodiment: str) -> list[Look]:
        """Finite episodes of an embodiment."""
        return [look for look in self.looks if look.sample.embodiment == embodiment and look.finite]

    def tables(
        self, contract: ActionContract
    ) -> Iterator[tuple[str, tuple[Dimension, ...], list[tuple[Look, np.ndarray]]]]:
        """("action" or "proprio", its dimensions, its rows in each finite episode)."""
        looks = self.of(contract.embodiment)
        yield "action", contract.action, [(look, look.actions_TA) for look in looks]
        yield "proprio", contract.proprio, [(look, look.proprio_TS) for look in looks]

    def dimensions(self) -> Iterator[tuple[ActionContract, str, int, Dimension, Statistics]]:
        """(contract, "action" or "proprio", index, dimension, statistics of its role) of every dimension."""
        for contract in self.manifest.contracts:
            for index, dimension in enumerate(contract.action):
                yield contract, "action", index, dimension, contract.action_statistics
            for index, dimension in enumerate(contract.proprio):
                yield contract, "proprio", index, dimension, contract.proprio_statistics


def choose(manifest: Manifest, count: int, seed: int = 0) -> list[str]:
    """Keys of at most `count` episodes, as many of each embodiment as of others, in shard order.

    >>> choose(manifest, 64) == choose(manifest, 64)  # a pure function of manifest, count and seed
    True
    """
    samples = manifest.samples()
    order = np.random.default_rng(seed).permutation(len(samples))
    queues: dict[str, list[int]] = {}
    for index in order:
        queues.setdefault(samples[index].embodiment, []).append(int(index))
    # Rounds: the first of every embodiment, the second of every embodiment, ...
    rounds = [(turn, index) for queue in queues.values() for turn, index in enumerate(queue)]
    taken = [index for _, index in sorted(rounds, key=lambda pair: pair[0])[:count]]
    return [samples[index].key for index in sorted(taken)]


def read(dataset: ShardDataset, keys: list[str], *, workers: int | None = None) -> Survey:
    """Read episodes in parallel with a progress bar.

    Raises DataError for the first damaged one.
    """
    manifest = dataset.manifest
    split = {sample.key: shard.split for shard in manifest.shards for sample in shard.samples}
    pictured = set(keys[:: max(1, -(-len(keys) // MAX_PICTURED))])
    for embodiment in {dataset.sample(key).embodiment for key in keys}:
        pictured.update([key for key in keys if dataset.sample(key).embodiment == embodiment][:4])
    one = partial(_look, dataset, split, pictured)
    workers = workers or min(8, num_cores())
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(keys), unit="episode", desc="reading", disable=None) as bar,
    ):
        looks = []
        try:
            for look in pool.map(one, keys):
                looks.append(look)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Survey(manifest, tuple(looks))


def _look(dataset: ShardDataset, split: dict[str, str], pictured: set[str], key: str) -> Look:
    sample = dataset.sample(key)
    manifest, tokenizer = dataset.manifest, dataset.manifest.tokenizer or {}
    stride = int(tokenizer.get("time_stride", 1))
    decoded = 3 * manifest.width * manifest.height * len(manifest.views)
    most = min(sample.frames, MAX_FRAMES, max(2, MAX_BYTES // decoded))
    length = 1 + (most - 1) // stride * stride
    start = (sample.frames - length) // 2 // stride * stride
    episode = dataset.read_clip(key, start, length)
    keep = key in pictured
    return Look(
        sample=sample,
        split=split[key],
        start=start,
        actions_TA=episode.actions_TA,
        proprio_TS=episode.proprio_TS,
        timestamps_T=episode.timestamps_T,
        views=_views(episode, keep),
        stride=stride,
    )


def _views(episode: EpisodeArrays, keep: bool) -> dict[str, ViewLook]:
    if episode.video is not None:
        return {view: look_at(frames, keep) for view, frames in episode.video.items()}
    assert episode.latents is not None
    return {view: _look_at_latents(latents, keep) for view, latents in episode.latents.items()}


def look_at(frames_THWC: np.ndarray, keep: bool = True) -> ViewLook:
    """Measure the frames of one view, uint8 RGB."""
    thin = max(1, frames_THWC.shape[1] // ANALYSED_ROWS)
    thinned = frames_THWC[:, ::thin, ::thin]
    # Rec. 601 weights; int16 keeps differences of pictures exact.
    luma_THW = (thinned @ np.array([0.299, 0.587, 0.114], np.float32)).round().astype(np.int16)
    change_T = np.abs(np.diff(luma_THW, axis=0)).mean((1, 2))
    return ViewLook(
        luma_THW.mean((1, 2)), luma_THW.std((1, 2)), change_T, _spread(frames_THWC) if keep else ()
    )


def _look_at_latents(latents_TChw: np.ndarray, keep: bool) -> ViewLook:
    latents = latents_TChw.astype(np.float32)
    change_T = np.abs(np.diff(latents, axis=0)).mean((1, 2, 3))
    none = np.zeros(0, np.float32)
    return ViewLook(none, none, change_T, _spread(_false_colours(latents)) if keep else ())


def _false_colours(latents_TChw: np.ndarray) -> np.ndarray:
    """The first three channels as red, green and blue [T, h, w, 3] uint8."""
    three = latents_TChw[:, [0, min(1, latents_TChw.shape[1] - 1), min(2, latents_TChw.shape[1] - 1)]]
    low, high = np.percentile(three, (1, 99), axis=(0, 2, 3), keepdims=True)
    scaled = np.clip((three - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    return np.moveaxis(scaled, 1, 3).round().astype(np.uint8)


def _spread(frames_THWC: np.ndarray) -> tuple[np.ndarray, ...]:
    places = np.linspace(0, len(frames_THWC) - 1, min(THUMBNAILS, len(frames_THWC))).round().astype(int)
    return tuple(frames_THWC[place].copy() for place in places)
