"""Batches of clips for training, in the order of `order.py`, read by worker processes.

A loader holds no state worth saving: build it with `start_step` and it goes on from there, with the same
ordered ids at any number of ranks, workers and accumulated micro-batches.
"""

import itertools
import math
import multiprocessing
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vidworld.data.clips import Clip, ClipReader, cache_pays, time_stride
from vidworld.data.manifest import Manifest
from vidworld.data.mixture import Mixture, MixtureOrder, MixtureReader
from vidworld.data.order import ClipOrder, OrderKey, rank_slice
from vidworld.data.shards import EpisodeArrays, ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.types import Batch

# How often a waiting loader looks whether its workers still live.
_POLL_S = 2.0
_MAX_ATTEMPTS = 100


@dataclass(frozen=True)
class LoaderConfig:
    """How clips are cut, batched and read."""

    clip_frames: int = 16
    clip_stride: int = 1
    """Frames between the starts of neighbouring clips of an episode."""
    batch_size: int = 64
    """Clips per step over all ranks and accumulated micro-batches."""
    shuffle_shards: int = 16
    """Shards whose clips are mixed with each other: the working set of a big dataset."""
    workers: int = 2
    """Reading processes per rank; 0 reads in the training process."""
    prefetch: int = 2
    """Micro-batches that each worker keeps ready."""
    cache_gb: float = 1.0
    """Memory for decoded episodes in each reading process, shared alike by the datasets of a mixture; 0
    decodes every clip anew."""
    max_bad_episodes: int = 0
    """Unreadable episodes that are replaced by other clips before the run stops."""
    timeout_s: float = 300.0
    """Longest wait for a batch before the workers count as hung; a dead one is noticed in seconds."""

    def __post_init__(self) -> None:
        for name, least in (
            ("clip_frames", 1),
            ("clip_stride", 1),
            ("batch_size", 1),
            ("shuffle_shards", 1),
            ("workers", 0),
            ("prefetch", 1),
            ("cache_gb", 0),
            ("max_bad_episodes", 0),
        ):
            if not getattr(self, name) >= least:
                raise ConfigError(f"setting {name!r}", got=getattr(self, name), expected=f"at least {least}")
        if not self.timeout_s > 0:
            raise ConfigError("setting 'timeout_s'", got=self.timeout_s, expected="more than 0")


def make_loader(
    dataset: ShardDataset | Mixture,
    split: str,
    config: LoaderConfig,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
) -> "Loader":
    """Micro-batches of `rank`, `accumulation` per step, from `start_step` on; endless without `num_steps`.

    Of a mixture, clips come in its shares and are padded to the widest dataset; see `mixture.py`. Joined by
    micro-batch and then by rank, the micro-batches of a step are its global batch in order.
    Raises DataError for a split without a clip, ConfigError for a batch that cannot be shared out.
    """
    parts = [dataset] if isinstance(dataset, ShardDataset) else [part.dataset for part in dataset.parts]
    for part in parts:
        _refuse_unaligned(config, time_stride(part.manifest))
    key = OrderKey(
        manifest_digest=dataset.manifest.digest if isinstance(dataset, ShardDataset) else dataset.digest,
        split=split,
        seed=seed,
        batch_size=config.batch_size,
        clip_frames=config.clip_frames,
        clip_stride=config.clip_stride,
        shuffle_shards=config.shuffle_shards,
        step=start_step,
    )
    slices = _Slices(key, num_steps, rank, world_size, accumulation)
    readers = world_size * max(1, config.workers)
    budget = round(config.cache_gb * 2**30 / len(parts))
    caches = [_cache_bytes(part.manifest, split, config, readers, budget) for part in parts]
    if isinstance(dataset, ShardDataset):
        reader = ClipReader(dataset, config.clip_frames, caches[0])
        return Loader(reader, ClipOrder.of(dataset.manifest, key), slices, config)
    return Loader(
        MixtureReader(dataset, config.clip_frames, caches), MixtureOrder(dataset, key), slices, config
    )


def _cache_bytes(manifest: Manifest, split: str, config: LoaderConfig, readers: int, budget: int) -> int:
    """Memory for the episodes of a dataset in each reading process; 0 where a cache does not pay."""
    pays = cache_pays(
        manifest,
        split,
        clip_frames=config.clip_frames,
        clip_stride=config.clip_stride,
        mixed=config.shuffle_shards,
        readers=readers,
        budget=budget,
    )
    return budget if pays else 0


def iter_episodes(dataset: ShardDataset, split: str) -> Iterator[EpisodeArrays]:
    """Whole episodes of a split, one after the other in manifest order."""
    for sample in dataset.manifest.samples(split):
        yield dataset.read(sample.key)


class Loader:
    """What `make_loader` returns: iterate it for batches; each iteration starts at `start_step`.

    Raises, while iterating, DataError for an unreadable episode, a dead worker, or no batch in `timeout_s`.
    """

    def __init__(
        self,
        reader: ClipReader | MixtureReader,
        order: ClipOrder | MixtureOrder,
        slices: Iterable[range],
        config: LoaderConfig,
    ) -> None:
        self.order, self.config = order, config
        self.wait_s = 0.0
        """Seconds spent waiting for batches so far: grows little when reading keeps up."""
        self.bad_episodes: dict[str, str] = {}
        """Key and reason of each episode that could not be read, and was replaced."""
        self._processes: set[BaseProcess] = set()
        self._asked_at = math.inf  # perf_counter of the batch being waited for
        self._loader: DataLoader[Any] = DataLoader(
            _Clips(reader, order, config.max_bad_episodes),
            batch_size=None,
            sampler=slices,
            collate_fn=_same,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            persistent_workers=config.workers > 0,
            multiprocessing_context=_context() if config.workers else None,
            timeout=min(_POLL_S, config.timeout_s) if config.workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the global random stream alone
        )

    def key(self, step: int) -> OrderKey:
        """What a checkpoint stores to go on at `step`; `stored.require_equal(loader.key(step))` on resume."""
        return self.order.key.at(step)

    def __iter__(self) -> Iterator[Batch]:
        others = set(multiprocessing.active_children())
        iterator = iter(self._loader)
        self._processes |= set(multiprocessing.active_children()) - others
        ended = threading.Event()
        if self._processes:
            threading.Thread(target=self._watch, args=(ended,), name="loader-watch", daemon=True).start()
        try:
            while (fetched := self._next(iterator)) is not None:
                if isinstance(fetched, DataError):
                    raise fetched
                self._count_bad(fetched.bad)
                yield Batch(ids=fetched.ids, **fetched.tensors)
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        """Kill the workers when a batch is long overdue, until `ended`.

        PyTorch's own timeout covers the announcement of a batch only: it then asks the worker for the memory,
        and waits forever if that was stopped in between. A killed worker ends that wait with an EOFError.
        """
        while not ended.wait(_POLL_S):
            if time.perf_counter() - self._asked_at > self.config.timeout_s + _POLL_S:
                self._kill()

    def _next(self, iterator: "Iterator[_Fetched | DataError]") -> "_Fetched | DataError | None":
        """The next micro-batch, or None at the end."""
        begin = time.perf_counter()
        self._asked_at = begin
        try:
            while True:
                try:
                    return next(iterator, None)
                except (RuntimeError, OSError, EOFError) as error:
                    waited_s = time.perf_counter() - begin
                    if waited_s >= self.config.timeout_s:
                        raise self._silence(waited_s) from error
                    slow = str(error).startswith("DataLoader timed out")
                    if not slow:  # a connection ends a little before its process
                        wait([process.sentinel for process in self._processes], timeout=1.0)
                    if dead := [process for process in self._processes if not process.is_alive()]:
                        raise self._death(dead) from error
                    if not slow:
                        raise
        finally:
            self._asked_at = math.inf
            self.wait_s += time.perf_counter() - begin

    def _kill(self) -> None:
        for process in self._processes:  # a stopped worker would keep this process from exiting
            process.kill()

    def _death(self, dead: list[BaseProcess]) -> DataError:
        codes = ", ".join(f"process {process.pid} with code {process.exitcode}" for process in dead)
        self._kill()
        return DataError(
            "a reading process died",
            got=codes,
            fix="if the system killed it for memory, lower workers, prefetch or cache_gb, then resume",
        )

    def _silence(self, waited_s: float) -> DataError:
        self._kill()
        return DataError(
            "no batch from the reading processes",
            got=f"{waited_s:.0f} s of silence",
            expected=f"one within timeout_s = {self.config.timeout_s:g} s",
            fix="look at the storage, or raise timeout_s if it is only slow, then resume",
        )

    def _count_bad(self, bad: dict[str, str]) -> None:
        for key in sorted(bad.keys() - self.bad_episodes.keys()):
            self.bad_episodes[key] = bad[key]
            warnings.warn(f"episode {key!r} was replaced by another clip: {bad[key]}", stacklevel=4)
        if len(self.bad_episodes) > self.config.max_bad_episodes:
            raise DataError(
                "unreadable episodes",
                got=f"{len(self.bad_episodes)} ({'; '.join(self.bad_episodes.values())})",
                expected=f"at most max_bad_episodes = {self.config.max_bad_episodes}",
            )


class _Fetched(NamedTuple):
    """A micro-batch on its way between processes, in types that PyTorch can pin."""

    ids: tuple[str, ...]
    tensors: dict[str, Tensor]
    bad: dict[str, str]


class _Slices(Sampler[range]):
    """The global indices of each micro-batch of a rank."""

    def __init__(
        self, key: OrderKey, num_steps: int | None, rank: int, world_size: int, accumulation: int
    ) -> None:
        self.key, self.num_steps = key, num_steps
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self._slice(key.step, 0)  # refuse a bad layout now, not at the first step

    def __iter__(self) -> Iterator[range]:
        steps: Iterable[int] = itertools.count(self.key.step)
        if self.num_steps is not None:
            steps = range(self.key.step, self.key.step + self.num_steps)
        return (self._slice(step, micro) for step in steps for micro in range(self.accumulation))

    def _slice(self, step: int, micro_batch: int) -> range:
        return rank_slice(
            step,
            micro_batch,
            batch_size=self.key.batch_size,
            accumulation=self.accumulation,
            rank=self.rank,
            world_size=self.world_size,
        )


class _Clips(Dataset):
    """The micro-batch at a range of global indices; lives in each reading process."""

    def __init__(
        self, reader: ClipReader | MixtureReader, order: ClipOrder | MixtureOrder, max_bad_episodes: int
    ) -> None:
        self.reader, self.order, self.max_bad_episodes = reader, order, max_bad_episodes
        self.keys = reader.keys(order.key.split)

    def __getitem__(self, indices: range) -> _Fetched | DataError:
        # An error travels as a value: PyTorch would wrap one that is raised in a traceback.
        bad: dict[str, str] = {}
        episodes, starts = self.order.locate(np.arange(indices.start, indices.stop))
        try:
            clips = [
                self._read(index, int(episode), int(start), bad)
                for index, episode, start in zip(indices, episodes, starts, strict=True)
            ]
        except DataError as error:
            return error
        arrays = self.reader.stack(clips)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return _Fetched(tuple(clip.id for clip in clips), tensors, bad)

    def _read(self, index: int, episode: int, start: int, bad: dict[str, str]) -> Clip:
        """The clip, or its replacement when it cannot be read."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            key = self.keys[episode]
            try:
                return self.reader.read(key, start)
            except DataError as error:
                bad[key] = str(error)
                if len(bad) > self.max_bad_episodes or attempt == _MAX_ATTEMPTS:
                    raise
            episode, start = self.order.replacement(index, attempt)
        raise AssertionError("the last attempt returns or raises")


def _refuse_unaligned(config: LoaderConfig, stride: int) -> None:
    """Latents of several frames each can only be cut between them."""
    if config.clip_stride % stride or (config.clip_frames - 1) % stride:
        raise ConfigError(
            "settings 'clip_frames' and 'clip_stride'",
            got=f"{config.clip_frames} and {config.clip_stride}",
            expected=f"1 + n*{stride} and a multiple of {stride}, the tokenizer's time stride",
        )


def _context() -> BaseContext:
    """How workers start: from a clean server process that has imported PyTorch once.

    Never by forking this process: its threads (CUDA, NCCL, BLAS) do not survive a fork but their locks do, so
    that a worker may hang. A fork server starts workers faster than `spawn`, which imports PyTorch for each.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidworld.data.loader"])
    return context


def _same(fetched: Any) -> Any:
    return fetched
