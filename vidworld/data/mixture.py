"""Several datasets as one: which clips of which dataset, in shares that hold exactly, padded side by side.

A mixture keeps the law of `order.py`: what comes at global index g is a pure function of (mixture digest,
seed, g). The stream is cut into periods of PERIOD clips. Each dataset has a fixed number of places in every
period, in proportion to its weight, and its own endless `ClipOrder`; so the clip at a place is the one that
stands at (periods before) * (places a period) + (places before in this period) of that order: no counter is
kept, and resuming replays nothing.

Places are spread by jittered strata: the k-th of a dataset's n places lies at (k + u) / n of the period, u
from the key. So every stretch of a period has its shares to within a clip or two a dataset, and no row of a
batch always belongs to the same one (the first rows of a micro-batch are treated differently in training).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidworld.config import digest
from vidworld.contract import ActionContract
from vidworld.data.clips import Clip, ClipFormat, ClipReader, stack
from vidworld.data.manifest import Manifest, Sample
from vidworld.data.order import ClipOrder, OrderKey, hash_words, stream_keys
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.types import Layout

PERIOD = 1000
"""Clips over which the shares are exact: weights count in thousandths."""
RENAME = (
    "they are two robots to a model: shard one again with another `embodiment:` in its contract file, or "
    "shard both into one dataset"
)
VERSION = 1
"""Version of the mixture's order: raised when the same key would give other clips."""


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture."""

    label: str
    """How clips name it, `<label>/<sample key>@<first frame>`; unique in the mixture."""
    dataset: ShardDataset
    weight: float

    @property
    def manifest(self) -> Manifest:
        """What the dataset says of itself."""
        return self.dataset.manifest


@dataclass(frozen=True)
class Mixture:
    """Datasets of one kind, with weights; their embodiments are joined by name, their statistics pooled.

    Raises ConfigError for weights that make no shares, DataError for datasets that do not go together (kind,
    tokenizer, the same one twice), ContractError where one name stands for two robots.
    """

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, datasets: Sequence[ShardDataset], weights: Sequence[float]) -> "Mixture":
        """Mix datasets, labelled by their names."""
        labels: list[str] = []
        for dataset in datasets:
            name = dataset.manifest.name.replace("/", "-") or "data"
            taken = labels.count(name) + sum(label.startswith(f"{name}-") for label in labels)
            labels.append(f"{name}-{taken + 1}" if name in labels else name)
        parts = zip(labels, datasets, weights, strict=True)
        return cls(tuple(Part(*part) for part in parts))

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("setting 'mix'", got="no dataset", expected="at least one")
        for part in self.parts:
            if not (math.isfinite(part.weight) and part.weight > 0):
                raise ConfigError(
                    f"weight of dataset {part.label!r} in the mix", got=part.weight, expected="above 0"
                )
        self._refuse_strangers()
        # Computed now, so that what they refuse is refused now.
        assert len(self.counts) == len(self.parts)
        assert self.contracts

    def _refuse_strangers(self) -> None:
        first = self.parts[0]
        tokenizer = (first.manifest.tokenizer or {}).get("digest")
        seen: dict[str, Path | str] = {}
        for part in self.parts:
            where = part.dataset.directory
            if part.manifest.kind != first.manifest.kind:
                raise DataError(
                    "kind of dataset in the mix",
                    where=where,
                    got=part.manifest.kind,
                    expected=f"{first.manifest.kind}, as {first.dataset.directory}",
                )
            if part.manifest.tokenizer != first.manifest.tokenizer:
                raise DataError(
                    "tokenizer of the latents in the mix",
                    where=where,
                    got=(part.manifest.tokenizer or {}).get("digest"),
                    expected=f"{tokenizer}, as {first.dataset.directory}",
                    fix="encode them with one tokenizer",
                )
            if part.manifest.digest in seen:
                raise DataError(
                    "the same data twice in the mix",
                    where=where,
                    got=seen[part.manifest.digest],
                    fix="give it once, with the sum of the weights",
                )
            seen[part.manifest.digest] = where

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Places of each dataset in a period: its share of PERIOD by largest remainders."""
        total = sum(part.weight for part in self.parts)
        exact = [part.weight / total * PERIOD for part in self.parts]
        counts = [math.floor(value + 1e-9) for value in exact]
        # Ties go to the dataset that is named first.
        order = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
        for index in order[: PERIOD - sum(counts)]:
            counts[index] += 1
        for part, count in zip(self.parts, counts, strict=True):
            if not count:
                raise ConfigError(
                    f"weight of dataset {part.label!r} in the mix",
                    got=f"{part.weight:g} of {total:g}",
                    expected=f"a share of at least 1/{PERIOD}",
                )
        return tuple(counts)

    @cached_property
    def _robots(self) -> dict[str, tuple[ActionContract, Layout]]:
        joined: dict[str, tuple[ActionContract, Layout]] = {}
        owner: dict[str, Part] = {}
        for part in self.parts:
            layout = layout_of(part.manifest)
            for contract in part.manifest.contracts:
                name, where = contract.embodiment, part.dataset.directory
                if name not in joined:
                    joined[name], owner[name] = (contract, layout), part
                    continue
                known, known_layout = joined[name]
                if known_layout != layout:
                    raise ContractError(
                        f"embodiment {name!r} with another views, size or rate",
                        where=where,
                        got=layout,
                        expected=f"{known_layout}, as in {owner[name].dataset.directory}",
                        fix=RENAME,
                    )
                try:
                    known.require_same_robot(contract, where=where)
                except ContractError as error:
                    raise ContractError(
                        f"embodiment {name!r} with another action contract: {error.what}",
                        where=where,
                        got=error.got,
                        expected=f"{error.expected}, as in {owner[name].dataset.directory}",
                        fix=RENAME,
                    ) from None
                joined[name] = known.pooled(contract), layout
        return joined

    @property
    def contracts(self) -> tuple[ActionContract, ...]:
        """Each embodiment's contract once; batches carry the index into these."""
        return tuple(contract for contract, _ in self._robots.values())

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Each embodiment's pictures, in the order of `contracts`."""
        return tuple(layout for _, layout in self._robots.values())

    @property
    def kind(self) -> str:
        """`video` or `latents`."""
        return self.parts[0].manifest.kind

    @cached_property
    def digest(self) -> str:
        """Short hash of what decides the stream of clips: the data and their shares."""
        content = [[part.manifest.digest, count] for part, count in zip(self.parts, self.counts, strict=True)]
        return digest({"mixture": VERSION, "parts": content})

    def samples(self, split: str | None = None) -> tuple[Sample, ...]:
        """Samples of a split (or of all), dataset after dataset, keys with their label in front."""
        return tuple(
            replace(sample, key=f"{part.label}/{sample.key}")
            for part in self.parts
            for sample in part.manifest.samples(split)
        )

    def describe(self) -> str:
        """One line: the datasets and their shares."""
        shares = zip(self.parts, self.counts, strict=True)
        return ", ".join(f"{part.label} {100 * count / PERIOD:g} %" for part, count in shares)


def layout_of(manifest: Manifest) -> Layout:
    """How the pictures of a dataset look."""
    return Layout(manifest.views, manifest.height, manifest.width, manifest.fps)


class _Pattern(NamedTuple):
    """Whose place each of a period is, and how many of the same dataset come before it: [PERIOD] each."""

    owner: np.ndarray
    rank: np.ndarray


class MixtureOrder:
    """The order of one split's clips in a mixture; episodes count as in `mixture.samples(split)`.

    Raises DataError where a dataset has no clip in the split.
    """

    def __init__(self, mixture: Mixture, key: OrderKey) -> None:
        assert key.manifest_digest == mixture.digest
        self.key = key
        manifests = [part.manifest for part in mixture.parts]
        self.orders = tuple(
            ClipOrder.of(manifest, replace(key, manifest_digest=manifest.digest)) for manifest in manifests
        )
        episodes = [len(manifest.samples(key.split)) for manifest in manifests]
        self._offsets = np.cumsum([0, *episodes[:-1]])
        self._counts = np.array(mixture.counts, np.int64)
        name = f"vidworld mixture {VERSION}\0{mixture.digest}\0{key.split}\0{key.seed}"
        self._seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8").astype(np.uint64)
        self._patterns: dict[int, _Pattern] = {}

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(episode, first frame) of the clips at global indices [n] of the stream, [n] each."""
        owners, places = self.places(indices)
        episodes, starts = np.empty_like(places), np.empty_like(places)
        for part, order in enumerate(self.orders):
            rows = owners == part
            episodes[rows], starts[rows] = order.locate(places[rows])
            episodes[rows] += self._offsets[part]
        return episodes, starts

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, index in that dataset's own order) at global indices [n], [n] each."""
        periods, slots = np.divmod(np.asarray(indices, np.int64), PERIOD)
        owners, places = np.empty_like(slots), np.empty_like(slots)
        for period in np.unique(periods):
            rows = periods == period
            pattern = self._pattern(int(period))
            owners[rows] = pattern.owner[slots[rows]]
            places[rows] = period * self._counts[owners[rows]] + pattern.rank[slots[rows]]
        return owners, places

    def replacement(self, index: int, attempt: int) -> tuple[int, int]:
        """(episode, first frame) to use when the clip at `index` cannot be read, of the same dataset."""
        owners, places = self.places(np.array([index]))
        episode, start = self.orders[int(owners[0])].replacement(int(places[0]), attempt)
        return episode + int(self._offsets[int(owners[0])]), start

    def _pattern(self, period: int) -> _Pattern:
        if period not in self._patterns:
            if len(self._patterns) > 1:  # a batch seldom spans more than two
                self._patterns.clear()
            self._patterns[period] = self._spread(period)
        return self._patterns[period]

    def _spread(self, period: int) -> _Pattern:
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        rank = np.concatenate([np.arange(count) for count in self._counts])
        key = hash_words(self._seed ^ hash_words(np.array([period], np.uint64)))
        jitter = (stream_keys(key, PERIOD) >> np.uint64(32)).astype(np.int64)
        # (rank + u) / count in whole numbers below 2**63, growing with the rank.
        phase = ((rank << 32) | jitter) * PERIOD // self._counts[owner]
        order = np.argsort(phase, kind="stable")
        return _Pattern(owner[order], rank[order])


class MixtureReader:
    """Reads clips of `length` frames of every dataset, and stacks them padded to the widest.

    cache_bytes: memory for whole episodes of each dataset; 0 (or none given) reads each clip by itself.
    """

    def __init__(self, mixture: Mixture, length: int, cache_bytes: Sequence[int] = ()) -> None:
        cache_bytes = cache_bytes or [0] * len(mixture.parts)
        self.mixture = mixture
        self._readers = {
            part.label: ClipReader(part.dataset, length, budget)
            for part, budget in zip(mixture.parts, cache_bytes, strict=True)
        }
        self._index = {contract.embodiment: place for place, contract in enumerate(mixture.contracts)}
        self._format = ClipFormat.widest([reader.format for reader in self._readers.values()])

    def keys(self, split: str) -> list[str]:
        """Names of the samples that an order counts."""
        return [sample.key for sample in self.mixture.samples(split)]

    def read(self, key: str, start: int) -> Clip:
        """One clip. Raises DataError when it cannot be read."""
        label, _, own = key.partition("/")
        reader = self._readers[label]
        clip = reader.read(own, start)
        embodiment = reader.dataset.sample(own).embodiment
        return Clip(start, replace(clip.arrays, key=key), self._index[embodiment])

    def stack(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Arrays named as in `types.Batch`."""
        return stack(clips, self._format)
