"""Micro-batches for the loop: the loader's, and optionally long clips between short ones."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vidworld.data.loader import LoaderConfig, make_loader
from vidworld.data.mixture import Mixture, MixtureReader
from vidworld.data.order import ClipOrder, OrderKey
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.trainer.loop import Feed
from vidworld.types import Batch


def clip_feed(
    dataset: ShardDataset | Mixture,
    config: LoaderConfig,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    long_clip_frames: int = 0,
    long_clip_fraction: float = 0.0,
) -> Feed:
    """The training split in batches; each kind of clip has an order of its own, a pure function of the step.

    With long clips, step s reads them when floor((s + 1) f) > floor(s f), and then as many clips fewer as
    they are longer. Raises DataError and ConfigError as `make_loader` does.
    """
    layout = {"rank": rank, "world_size": world_size, "accumulation": accumulation}
    configs = clip_kinds(config, long_clip_frames, long_clip_fraction, world_size * accumulation)

    def kind_steps(step: int) -> dict[str, int]:
        """Steps of each kind among the first `step`."""
        long = math.floor(step * long_clip_fraction + 1e-9)
        return {"short": step - long, "long": long}

    def open_at(step: int) -> Iterator[Batch]:
        done = kind_steps(step)
        streams = {
            kind: iter(make_loader(dataset, "train", one, seed=seed, start_step=done[kind], **layout))
            for kind, one in configs.items()
        }
        while True:
            step += 1
            now = kind_steps(step)
            kind = "long" if now["long"] > done["long"] else "short"
            done = now
            for _ in range(accumulation):
                yield next(streams[kind])

    keys = {
        kind: make_loader(dataset, "train", dataclasses.replace(one, workers=0), seed=seed, **layout).key(0)
        for kind, one in configs.items()
    }

    def order(step: int) -> Mapping[str, Any]:
        done = kind_steps(step)
        return {kind: key.at(done[kind]).to_mapping() for kind, key in keys.items()}

    def require_same(stored: Mapping[str, Any], where: object) -> None:
        if stored.keys() != keys.keys():
            raise DataError(
                "kinds of clips in the sample order",
                where=where,
                got=", ".join(keys),
                expected=", ".join(stored),
                fix="give back long_clip_fraction, or start a new run",
            )
        for kind, key in keys.items():
            OrderKey.from_mapping(stored[kind], where).require_equal(key, where=where)

    return Feed(open_at, order, require_same)


def clip_batches(
    dataset: ShardDataset | Mixture, split: str, config: LoaderConfig, count: int
) -> list[Batch]:
    """The first `count` batches of a split, kept in memory: the same in every run on these data."""
    config = dataclasses.replace(config, workers=0, cache_gb=0)
    return list(make_loader(dataset, split, config, seed=0, num_steps=count))


def part_batches(mixture: Mixture, label: str, split: str, config: LoaderConfig, count: int) -> list[Batch]:
    """The first `count` batches of one dataset of a mixture, padded and counted as the mixture's are."""
    (part,) = (part for part in mixture.parts if part.label == label)
    key = make_loader(part.dataset, split, dataclasses.replace(config, workers=0), seed=0).key(0)
    order, reader = ClipOrder.of(part.manifest, key), MixtureReader(mixture, config.clip_frames)
    keys = [f"{label}/{sample.key}" for sample in part.manifest.samples(split)]
    batches = []
    for step in range(count):
        clips = [
            reader.read(keys[episode], int(start)) for episode, start in zip(*order.batch(step), strict=True)
        ]
        tensors = {name: torch.from_numpy(array) for name, array in reader.stack(clips).items()}
        batches.append(Batch(ids=tuple(clip.id for clip in clips), **tensors))
    return batches


def clip_kinds(
    config: LoaderConfig, long_clip_frames: int, long_clip_fraction: float, parts: int
) -> dict[str, LoaderConfig]:
    """The loader's settings for each kind of clip that a run reads, in batches of `parts` micro-batches."""
    if not long_clip_fraction:
        return {"short": config}
    return {"short": config, "long": _long(config, long_clip_frames, parts)}


def _long(config: LoaderConfig, frames: int, parts: int) -> LoaderConfig:
    """Settings of long clips: about as many frames a batch, in whole micro-batches."""
    if frames <= config.clip_frames:
        raise ConfigError("long_clip_frames", got=frames, expected=f"more than {config.clip_frames}")
    clips = max(1, round(config.batch_size * config.clip_frames / frames / parts)) * parts
    return dataclasses.replace(config, clip_frames=frames, batch_size=clips)
