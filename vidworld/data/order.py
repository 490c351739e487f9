"""Which clip comes when: a pure function of (manifest digest, seed, step), with no iterator state.

The clips of a split are its windows of `clip_frames` frames whose starts are `clip_stride` frames apart.
They form one endless stream: global index g is clip `g % num_clips` of epoch `g // num_clips`, and step s of
batch size B is g = s*B ... s*B + B-1. So every clip comes exactly once an epoch, a batch may straddle two
epochs, nothing is dropped or padded, and a run resumes from its step number alone.

Shuffling has two levels, so that big datasets are read a few shards at a time: an epoch permutes the shards
and cuts them into groups of at most `shuffle_shards`; clips are permuted within a group. The permutation of
a group is a keyed bijection computed for the indices asked for, never a table of all clips: memory is
O(episodes + shards), any step costs the same, and resuming replays nothing. Only integer arithmetic is
used, because the streams of `numpy.random.Generator` may change between NumPy releases, and an order must
outlive an upgrade.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.config import from_mapping, to_mapping
from vidworld.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vidworld.data.manifest import Manifest

VERSION = 1
"""Version of the order itself: raised when the same key would give other clips."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# The fewest rounds after which even the 720 permutations of six clips are equally likely (chi-square test).
_ROUNDS = 16


@dataclass(frozen=True)
class OrderKey:
    """All that decides the order, and the step reached: what a checkpoint stores to resume the data."""

    manifest_digest: str
    split: str
    seed: int
    batch_size: int
    """Global clips per step, over all ranks and accumulated micro-batches."""
    clip_frames: int
    clip_stride: int
    shuffle_shards: int
    step: int = 0
    """The next step: a position in the order, not part of its identity."""
    version: int = VERSION

    def at(self, step: int) -> "OrderKey":
        """The same order, standing before `step`."""
        return dataclasses.replace(self, step=step)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values that `from_mapping` reads back to an equal key."""
        return to_mapping(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: object = "the order key") -> "OrderKey":
        """Read what `to_mapping` wrote."""
        return from_mapping(cls, mapping, where=where)

    def require_equal(self, other: "OrderKey", *, where: object = "the run to resume") -> None:
        """Refuse to go on with another order: `self` is what was stored, `other` what would be used now.

        Raises DataError naming the first thing that differs. The step is not compared.
        """
        for field in dataclasses.fields(self):
            stored, now = getattr(self, field.name), getattr(other, field.name)
            if field.name != "step" and stored != now:
                raise DataError(
                    f"{field.name} of the sample order",
                    where=where,
                    got=repr(now),
                    expected=repr(stored),
                    fix="some clips would be skipped and others repeated: give back the stored value, "
                    "or start a new run",
                )


def rank_slice(
    step: int, micro_batch: int, *, batch_size: int, accumulation: int = 1, rank: int = 0, world_size: int = 1
) -> range:
    """Global indices that one rank reads for one micro-batch.

    The global batch is cut into `accumulation` equal micro-batches, and each of those into `world_size` equal
    slices, one a rank: joined by micro-batch, then by rank, they are the global batch in its order.
    Raises ConfigError when the batch cannot be cut so.
    """
    parts = world_size * accumulation
    if batch_size % parts:
        raise ConfigError(
            "setting 'batch_size'",
            got=batch_size,
            expected=f"a multiple of {parts} ({world_size} ranks x {accumulation} micro-batches)",
        )
    if not (0 <= rank < world_size and 0 <= micro_batch < accumulation and step >= 0):
        raise ConfigError(
            "place in the batch",
            got=f"step {step}, micro-batch {micro_batch}, rank {rank}",
            expected=f"step >= 0, micro-batch below {accumulation}, rank below {world_size}",
        )
    length = batch_size // parts
    start = step * batch_size + (micro_batch * world_size + rank) * length
    return range(start, start + length)


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in their order, and the groups they are mixed in; lengths are in clips."""

    shards: np.ndarray
    shard_ends: np.ndarray
    group_starts: np.ndarray
    group_lengths: np.ndarray
    group_keys: np.ndarray


class ClipOrder:
    """The order of one split's clips.

    frames: frames of each episode [E]; shard_of: index of each episode's shard [E], not decreasing.
    Raises DataError when there is no episode, or none as long as a clip.
    """

    def __init__(self, frames: np.ndarray, shard_of: np.ndarray, key: OrderKey) -> None:
        frames, shard_of = np.asarray(frames, np.int64), np.asarray(shard_of, np.int64)
        assert frames.shape == shard_of.shape, "one shard per episode"
        assert (np.diff(shard_of) >= 0).all(), "episodes are counted shard by shard"
        _refuse_bad_key(key)
        clips = np.maximum(0, (frames - key.clip_frames) // key.clip_stride + 1)
        self.key = key
        self.num_excluded = int((clips == 0).sum())
        """Episodes shorter than a clip: they are never read."""
        self.num_clips = int(clips.sum())
        self.num_episodes = len(frames) - self.num_excluded
        if not self.num_clips:
            raise DataError(
                f"the {key.split!r} split",
                got=f"a longest episode of {frames.max()} frames" if len(frames) else "no episode",
                expected=f"at least one of {key.clip_frames} frames (one clip)",
                fix="use a smaller clip_frames" if len(frames) else "convert with episodes in this split",
            )
        self._episode_ends = np.cumsum(clips)
        self._episode_starts = self._episode_ends - clips
        # Shards without a clip would only make groups smaller.
        shards, first_episode = np.unique(shard_of[clips > 0], return_index=True)
        self._shard_starts = self._episode_starts[clips > 0][first_episode]
        self._shard_lengths = np.diff(np.append(self._shard_starts, self.num_clips))
        self._num_groups = -(-len(shards) // key.shuffle_shards)
        name = f"vidworld order {key.version}\0{key.manifest_digest}\0{key.split}\0{key.seed}"
        self._seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8").astype(np.uint64)
        self._epochs: dict[int, _Epoch] = {}

    @classmethod
    def of(cls, manifest: "Manifest", key: OrderKey) -> "ClipOrder":
        """The order of `manifest`'s split `key.split`; episodes count as in `manifest.samples(split)`."""
        frames = [sample.frames for sample in manifest.samples(key.split)]
        counts = [len(shard.samples) for shard in manifest.shards if shard.split == key.split]
        shard_of = np.repeat(np.arange(len(counts)), np.array(counts, np.int64))
        return cls(np.array(frames, np.int64), shard_of, key)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in an epoch; a fraction when the last batch runs on into the next epoch."""
        return self.num_clips / self.key.batch_size

    def describe(self) -> str:
        """One line: how many clips there are, and what was left out."""
        short = f", {self.num_excluded} shorter left out" if self.num_excluded else ""
        return (
            f"{self.key.split}: {self.num_clips:,} clips of {self.key.clip_frames} frames "
            f"in {self.num_episodes:,} episodes{short}; {self.steps_per_epoch:.1f} steps an epoch"
        )

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(episode, first frame) of each clip of the global batch `step`, [B] each."""
        size = self.key.batch_size
        return self.locate(np.arange(step * size, (step + 1) * size))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(episode, first frame) of the clips at global indices [n] of the stream, [n] each."""
        epochs, positions = np.divmod(np.asarray(indices, np.int64), self.num_clips)
        clips = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            clips[rows] = self._shuffle(self._epoch(int(epoch)), positions[rows])
        return self._clips(clips)

    def replacement(self, index: int, attempt: int) -> tuple[int, int]:
        """(episode, first frame) of the clip to use when the one at `index` cannot be read; attempts from 1.

        Depends on the order and on `index` only, so that every rank and every rerun picks the same.
        """
        words = np.array([index, attempt], np.uint64)
        draw = hash_words(hash_words(self._seed ^ hash_words(words[:1])) ^ words[1:])
        episodes, starts = self._clips((draw % np.uint64(self.num_clips)).astype(np.int64))
        return int(episodes[0]), int(starts[0])

    def _clips(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        episodes = np.searchsorted(self._episode_ends, clips, "right")
        return episodes, (clips - self._episode_starts[episodes]) * self.key.clip_stride

    def _shuffle(self, epoch: _Epoch, positions: np.ndarray) -> np.ndarray:
        """The clips, counted in manifest order, that stand at `positions` of an epoch."""
        groups = np.searchsorted(epoch.group_starts, positions, "right") - 1
        starts = epoch.group_starts[groups]
        mixed = starts + permute(positions - starts, epoch.group_lengths[groups], epoch.group_keys[groups])
        slots = np.searchsorted(epoch.shard_ends, mixed, "right")
        shards = epoch.shards[slots]
        within = mixed - (epoch.shard_ends[slots] - self._shard_lengths[shards])
        return self._shard_starts[shards] + within

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch seldom spans more than two
                self._epochs.clear()
            self._epochs[epoch] = self._build_epoch(epoch)
        return self._epochs[epoch]

    def _build_epoch(self, epoch: int) -> _Epoch:
        num_shards = len(self._shard_lengths)
        key = hash_words(self._seed + np.array([epoch], np.uint64) * _GOLDEN)
        shards = np.argsort(stream_keys(key, num_shards), kind="stable")
        ends = np.cumsum(self._shard_lengths[shards])
        # Equal groups: a remainder of one shard would be hardly shuffled.
        cuts = np.arange(self._num_groups + 1) * num_shards // self._num_groups
        bounds = np.append(0, ends)[cuts]
        return _Epoch(
            shards=shards,
            shard_ends=ends,
            group_starts=bounds[:-1],
            group_lengths=np.diff(bounds),
            group_keys=stream_keys(~key, self._num_groups),
        )


def permute(indices: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0...length-1 sends each index; all [n], a length and uint64 key per index.

    An alternating Feistel network on Z_a x Z_b, a = ceil(sqrt(length)), with cycle walking (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). a*b exceeds the length by less than a, so few walk.
    """
    rows = np.ceil(np.sqrt(lengths)).astype(np.uint64)
    lengths, out = lengths.astype(np.uint64), indices.astype(np.uint64)
    columns = (lengths + rows - np.uint64(1)) // rows
    walking = np.arange(len(out))
    while len(walking):
        a, b, key = rows[walking], columns[walking], keys[walking]
        left, right = np.divmod(out[walking], b)
        for turn in range(_ROUNDS):
            key = key + _GOLDEN
            if turn % 2:
                right = (right + hash_words(left ^ key)) % b
            else:
                left = (left + hash_words(right ^ key)) % a
        out[walking] = left * b + right
        walking = walking[out[walking] >= lengths[walking]]
    return out.astype(np.int64)


def stream_keys(key: np.ndarray, count: int) -> np.ndarray:
    """`count` keys [count] uint64 drawn from one [1]: SplitMix64's stream."""
    return hash_words(key + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def hash_words(words: np.ndarray) -> np.ndarray:
    """Hash uint64 words: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _refuse_bad_key(key: OrderKey) -> None:
    for name in ("batch_size", "clip_frames", "clip_stride", "shuffle_shards"):
        if getattr(key, name) < 1:
            raise ConfigError(f"setting {name!r}", got=getattr(key, name), expected="at least 1")
    if key.version != VERSION:
        raise DataError(
            "version of the sample order",
            got=key.version,
            expected=VERSION,
            fix="use the vidworld release that wrote it",
        )
