"""Clips in memory: cut out of episodes, through a cache when that pays, and stacked into arrays."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vidworld.data.manifest import Manifest
from vidworld.data.shards import EpisodeArrays, ShardDataset


@dataclass(frozen=True)
class Clip:
    """`arrays.key`'s frames from `start` on."""

    start: int
    arrays: EpisodeArrays
    embodiment: int
    """Index into the contracts of what is read: a dataset or a mixture."""

    @property
    def id(self) -> str:
        """How batches and reports name it."""
        return f"{self.arrays.key}@{self.start}"

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """View -> video or latents, in the order of the dataset's views."""
        return self.arrays.video or self.arrays.latents or {}


@dataclass(frozen=True)
class ClipFormat:
    """What a stack of clips holds: clips of fewer views, smaller pictures or fewer dimensions are padded."""

    kind: str
    length: int
    action_dims: int
    proprio_dims: int
    views: int
    picture: tuple[int, ...]
    """Shape of one view of one frame as it is stored: [H, W, 3] of video, [C, h, w] of latents."""

    @classmethod
    def of(cls, manifest: Manifest, length: int) -> "ClipFormat":
        """The format of clips of `length` camera frames of a dataset."""
        picture = (manifest.height, manifest.width, 3)
        if manifest.tokenizer is not None:
            space = int(manifest.tokenizer["spatial_stride"])
            channels = int(manifest.tokenizer["channels"])
            picture = (channels, manifest.height // space, manifest.width // space)
        return cls(
            kind=manifest.kind,
            length=length,
            action_dims=max(len(contract.action) for contract in manifest.contracts),
            proprio_dims=max(len(contract.proprio) for contract in manifest.contracts),
            views=len(manifest.views),
            picture=picture,
        )

    @classmethod
    def widest(cls, formats: "Sequence[ClipFormat]") -> "ClipFormat":
        """The smallest format that holds them all."""
        return replace(
            formats[0],
            action_dims=max(one.action_dims for one in formats),
            proprio_dims=max(one.proprio_dims for one in formats),
            views=max(one.views for one in formats),
            picture=tuple(map(max, *(one.picture for one in formats), (0, 0, 0))),
        )


class ClipReader:
    """Reads clips of `length` frames and stacks them.

    cache_bytes: memory for whole episodes; 0 reads each clip by itself.
    """

    def __init__(self, dataset: ShardDataset, length: int, cache_bytes: int) -> None:
        manifest = dataset.manifest
        self.dataset, self.length, self.format = dataset, length, ClipFormat.of(manifest, length)
        self._cache = _EpisodeCache(dataset, cache_bytes) if cache_bytes else None
        self._time_stride = time_stride(manifest)
        index = {contract.embodiment: place for place, contract in enumerate(manifest.contracts)}
        self._embodiment_of = {sample.key: index[sample.embodiment] for sample in manifest.samples()}

    def keys(self, split: str) -> list[str]:
        """Names of the samples that an order counts."""
        return [sample.key for sample in self.dataset.manifest.samples(split)]

    def read(self, key: str, start: int) -> Clip:
        """One clip. Raises DataError when it cannot be read."""
        if self._cache is None:
            arrays = self.dataset.read_clip(key, start, self.length, notes=False)
        else:
            arrays = _window(self._cache.get(key), start, self.length, self._time_stride)
        return Clip(start, arrays, self._embodiment_of[key])

    def stack(self, clips: Sequence[Clip]) -> dict[str, np.ndarray]:
        """Arrays named as in `types.Batch`."""
        return stack(clips, self.format)


def stack(clips: Sequence[Clip], form: ClipFormat) -> dict[str, np.ndarray]:
    """Arrays named as in `types.Batch`; all that a clip does not have is padded with zeros at the end."""
    actions = np.zeros((len(clips), form.length, form.action_dims), np.float32)
    proprio = np.zeros((len(clips), form.length, form.proprio_dims), np.float32)
    for row, clip in enumerate(clips):
        actions[row, :, : clip.arrays.actions_TA.shape[1]] = clip.arrays.actions_TA
        proprio[row, :, : clip.arrays.proprio_TS.shape[1]] = clip.arrays.proprio_TS
    batch = {
        "actions_BTA": actions,
        "proprio_BTS": proprio,
        "embodiment_B": np.array([clip.embodiment for clip in clips], np.int64),
    }
    pictures = _stack_pictures([clip.pictures for clip in clips], form)
    match form.kind:
        case "latents":
            return batch | {"latents_BTVChw": pictures}
        case "video":
            # Channels last in memory, as decoded: turning the axes is free, and convolutions like it.
            return batch | {"video_BTVCHW": pictures.transpose(0, 1, 2, 5, 3, 4)}
        case _:
            raise AssertionError(form.kind)


def _stack_pictures(clips: Sequence[dict[str, np.ndarray]], form: ClipFormat) -> np.ndarray:
    """Arrays [T, ...] per clip and view -> [B, T, V, ...]."""
    first = next(iter(clips[0].values()))
    shape = (len(clips), len(first), form.views, *form.picture)
    fitting = all(
        len(clip) == form.views and next(iter(clip.values())).shape[1:] == form.picture for clip in clips
    )
    stacked = (np.empty if fitting else np.zeros)(shape, first.dtype)
    for row, clip in enumerate(clips):
        for column, frames in enumerate(clip.values()):
            i, j, k = frames.shape[1:]
            stacked[row, :, column, :i, :j, :k] = frames
    return stacked


def time_stride(manifest: Manifest) -> int:
    """Video frames per latent frame; 1 for video."""
    return int((manifest.tokenizer or {}).get("time_stride", 1))


def cache_pays(
    manifest: Manifest,
    split: str,
    *,
    clip_frames: int,
    clip_stride: int,
    mixed: int,
    readers: int,
    budget: int,
) -> bool:
    """Whether to keep whole episodes in memory, `budget` bytes a reader, rather than decode each clip.

    It does when the split fits, or when the `mixed` shards in use at a time fit and each of `readers`
    processes would otherwise decode more frames for its share of the clips than the episodes have.
    """
    frame_bytes = manifest.height * manifest.width * 3
    if manifest.tokenizer is not None:
        space = int(manifest.tokenizer["spatial_stride"])
        area = (manifest.height // space) * (manifest.width // space)
        frame_bytes = 2 * int(manifest.tokenizer["channels"]) * area // time_stride(manifest)
    shards = sorted(
        sum(sample.frames for sample in shard.samples) * frame_bytes * len(manifest.views)
        for shard in manifest.shards
        if shard.split == split
    )
    return sum(shards) <= budget or (sum(shards[-mixed:]) <= budget and clip_frames > clip_stride * readers)


class _EpisodeCache:
    """Whole episodes in memory, the least recently used out first, within a budget of bytes."""

    def __init__(self, dataset: ShardDataset, budget_bytes: int) -> None:
        self.dataset, self.budget_bytes, self.used_bytes = dataset, budget_bytes, 0
        self.episodes: OrderedDict[str, EpisodeArrays] = OrderedDict()

    def get(self, key: str) -> EpisodeArrays:
        """The episode, read at most once while it stays in memory."""
        if key in self.episodes:
            self.episodes.move_to_end(key)
            return self.episodes[key]
        episode = self.dataset.read(key)
        self.episodes[key] = episode
        self.used_bytes += _num_bytes(episode)
        while self.used_bytes > self.budget_bytes and len(self.episodes) > 1:
            _, oldest = self.episodes.popitem(last=False)
            self.used_bytes -= _num_bytes(oldest)
        return episode


def _num_bytes(episode: EpisodeArrays) -> int:
    pictures = (episode.video or {}) | (episode.latents or {})
    tables = (episode.actions_TA, episode.proprio_TS, episode.timestamps_T)
    return sum(array.nbytes for array in (*pictures.values(), *tables))


def _window(episode: EpisodeArrays, start: int, length: int, time_stride: int) -> EpisodeArrays:
    """Frames `start` to `start + length` of an episode, as views of its arrays."""
    rows = slice(start, start + length)
    latent_rows = slice(start // time_stride, (start + length - 1) // time_stride + 1)
    return replace(
        episode,
        video=episode.video and {view: frames[rows] for view, frames in episode.video.items()},
        latents=episode.latents and {view: array[latent_rows] for view, array in episode.latents.items()},
        actions_TA=episode.actions_TA[rows],
        proprio_TS=episode.proprio_TS[rows],
        timestamps_T=episode.timestamps_T[rows],
    )
