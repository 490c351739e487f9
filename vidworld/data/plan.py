"""What a conversion will make, before any video is touched: sizes, rates, mappings, splits, identity."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidworld.config import to_mapping
from vidworld.data.contract_file import Described, read_contracts
from vidworld.data.manifest import NAME_PATTERN
from vidworld.data.prepare import Fit, Recipe, Resample, Trim
from vidworld.data.resample import (
    RATE_TOLERANCE,
    decimation,
    nearest_note,
    refuse_more_frames,
    resampling_note,
    unknown_kind,
    whole_fraction,
)
from vidworld.data.sources.base import Source
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec

CONVERTER = 1
"""Raised when the same source and options would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How robot logs become shards."""

    out: Path
    """Directory of the dataset, or a URL such as s3://bucket/robot."""
    name: str | None = None
    """Name of the dataset; default: that of the source."""
    size: str = "128x96"
    """WIDTHxHEIGHT of the video, both divisible by 16."""
    fit: Fit = "crop"
    """How another aspect is met: cut the centre, pad with black, or stretch."""
    fps: float | None = None
    """Frames per second, a whole fraction of the recorded rate; default: that rate."""
    resample: Resample = "refuse"
    """At another rate than a whole fraction: refuse, or take the frames nearest in time."""
    views: tuple[str, ...] = ()
    """Cameras to keep; default: all."""
    contract: tuple[Path, ...] = ()
    """YAML with names, units, kinds, rate and note of the robot, and with how its numbers are mapped."""
    val_fraction: float = 0.1
    """Share of episodes held out, chosen by hash; at least one unless 0."""
    val_episodes: tuple[str, ...] = ()
    """Hold out exactly these episodes (ids or numbers) instead."""
    episodes: tuple[str, ...] = ()
    """Convert only these episodes (ids or numbers)."""
    max_episodes: int | None = None
    """Convert only the first N episodes."""
    min_frames: int = 2
    """Shorter episodes are quarantined."""
    trim: Trim = "refuse"
    """When rows and video frames differ in number: quarantine the episode, or cut the longer ones at
    their end (shorter) or at their start (head)."""
    max_quarantined: float = 0.1
    """Largest share of bad episodes to leave out before the conversion fails."""
    episodes_per_shard: int = 64
    """A shard ends after this many episodes,"""
    shard_mb: float = 256
    """or when it has grown to this many megabytes (it is held in memory until then)."""
    seed: int = 0
    """Changes which episodes the hash holds out."""
    workers: int | None = None
    """Worker processes; default: one a core. The result is the same."""
    overwrite: bool = False
    """Replace a dataset that was made from another source or with other options."""


@dataclass(frozen=True)
class Plan:
    """What will be made, before any video is touched."""

    name: str
    recipe: Recipe
    episodes: dict[str, tuple[str, ...]]
    """Split -> episode ids in the order of the source."""
    identity: dict[str, Any]
    """All that decides the result, as JSON values: kept in the manifest as `options`."""

    @property
    def total(self) -> int:
        """Episodes of all splits."""
        return sum(map(len, self.episodes.values()))


def make_plan(source: Source, options: ConvertOptions) -> Plan:
    """Resolve options against a source. Raises ConfigError (or DataError) for what does not fit."""
    width, height = parse_size(options.size)
    for name, least in (("min_frames", 2), ("episodes_per_shard", 1), ("workers", 1), ("max_episodes", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise ConfigError(f"--{name.replace('_', '-')}", got=given, expected=f"at least {least}")
    if unknown := set(options.views) - set(source.views):
        raise ConfigError("--views", got=sorted(unknown)[0], expected=" or ".join(source.views))
    described = read_contracts(options.contract, source.embodiments)
    rates, fps = _rates(source, described, options)
    embodiments = {
        name: _at_rate(one.spec, rates[name], fps, options.resample) for name, one in described.items()
    }
    mappings = {name: one.mapping for name, one in described.items() if one.mapping}
    recipe = Recipe(
        width=width,
        height=height,
        fit=options.fit,
        fps=fps,
        views=tuple(view for view in source.views if view in options.views or not options.views),
        trim=options.trim,
        min_frames=options.min_frames,
        embodiments=embodiments,
        mappings=mappings,
        rates={} if source.fps else rates,
        resample=options.resample,
    )
    episodes = _split(source, options)
    keys = [sample_key(episode_id) for ids in episodes.values() for episode_id in ids]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError("two episodes under one id", where=source.name, got=twice)
    name = options.name or source.name
    identity = {
        "converter": CONVERTER,
        "name": name,
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "size": options.size,
        "contract": {name: to_mapping(spec) for name, spec in embodiments.items()},
        **{name: getattr(recipe, name) for name in ("fit", "fps", "trim", "min_frames")},
        "views": list(recipe.views),
        "val": list(episodes["val"]),
        "episodes": [*options.episodes],
        "max_episodes": options.max_episodes,
        "episodes_per_shard": options.episodes_per_shard,
        "shard_mb": options.shard_mb,
        # What is new here is left out while it does nothing: datasets of before stay what they were.
        **({"mapping": {name: to_mapping(one) for name, one in mappings.items()}} if mappings else {}),
        **({"rates": recipe.rates} if recipe.rates else {}),
        **({"resample": options.resample} if options.resample != "refuse" else {}),
    }
    return Plan(name, recipe, episodes, identity)


def sample_key(episode_id: str) -> str:
    """Key of an episode in the shards: its id if that is safe, else a safe form with a hash of the id.

    >>> sample_key("episode_000027"), sample_key("run 1/a.b")
    ('episode_000027', 'run_1_a_b-8a1b2b3a')
    """
    if NAME_PATTERN.fullmatch(episode_id) and not re.search(r"-[0-9a-f]{8}$", episode_id):
        return episode_id
    safe = re.sub(r"[^A-Za-z0-9]+", "_", episode_id).strip("_")[:48] or "episode"
    return f"{safe}-{_hash(episode_id)[:8]}"


def _split(source: Source, options: ConvertOptions) -> dict[str, tuple[str, ...]]:
    """Which episodes go where, in the order of the source."""
    ids = source.episode_ids()
    if options.episodes:
        wanted = {_find(name, ids, "--episodes") for name in options.episodes}
        ids = [episode_id for episode_id in ids if episode_id in wanted]
    ids = ids[: options.max_episodes]
    if not ids:
        raise DataError("no episodes", where=source.name)
    if options.val_episodes:
        val = {_find(name, ids, "--val-episodes") for name in options.val_episodes}
    else:
        if not 0 <= options.val_fraction < 1:
            raise ConfigError("--val-fraction", got=options.val_fraction, expected="from 0 to below 1")
        count = round(options.val_fraction * len(ids)) or (options.val_fraction > 0 and len(ids) > 1)
        val = set(sorted(ids, key=lambda episode_id: _hash(f"{options.seed}/{episode_id}"))[:count])
    if len(val) == len(ids):
        raise ConfigError("every episode is held out", got=len(val), fix="leave some to train on")
    return {
        "train": tuple(episode_id for episode_id in ids if episode_id not in val),
        "val": tuple(episode_id for episode_id in ids if episode_id in val),
    }


def _find(name: str, ids: Sequence[str], option: str) -> str:
    """An episode by its id, or by the number that its id ends in."""
    if name in ids:
        return name
    numbered = [
        i for i in ids if name.isdecimal() and (m := re.search(r"\d+$", i)) and int(m[0]) == int(name)
    ]
    if len(numbered) != 1:
        shown = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
        raise ConfigError(option, got=repr(name), expected=f"an episode of {shown}")
    return numbered[0]


def _rates(
    source: Source, described: dict[str, Described], options: ConvertOptions
) -> tuple[dict[str, float], float]:
    """Recorded rows a second of each embodiment, and the rate of the dataset."""
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise ConfigError("--fps", got=options.fps, expected="more than 0")
    rates = {
        name: one.rate_hz or source.fps or one.spec.rate_hz or options.fps or 0.0
        for name, one in described.items()
    }
    for name, rate in rates.items():
        if not rate:
            raise ConfigError(
                f"rows a second of embodiment {name!r}",
                where=source.name,
                got="not in the logs",
                fix="say rate_hz in a contract file (--contract FILE), or --fps",
            )
        if source.fps and abs(rate - source.fps) > RATE_TOLERANCE * source.fps:
            raise ConfigError(
                f"rate_hz of embodiment {name!r}", got=f"{rate:g}", expected=f"{source.fps:g} as the logs say"
            )
    if options.fps is None and len(set(rates.values())) > 1:
        said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise ConfigError("several rates in one dataset", got=said, fix="choose one with --fps")
    return rates, float(options.fps or source.fps or next(iter(rates.values())))


def _at_rate(spec: EmbodimentSpec, rate: float, fps: float, resample: Resample) -> EmbodimentSpec:
    """The specification at the rate of the dataset, which says when that is not the recorded one."""
    step = whole_fraction(rate, fps) if resample == "nearest" else decimation(rate, fps)
    spec = spec if spec.rate_hz else dataclasses.replace(spec, rate_hz=rate)
    if step == 1:
        return spec
    if step is None:
        refuse_more_frames(rate, fps)
    for dimension in (*spec.action, *(spec.proprio if step is None else ())):
        if dimension.kind == "unknown":
            raise unknown_kind(dimension, "action" if dimension in spec.action else "proprio")
    said = (nearest_note() if step is None else "", resampling_note(spec))
    return dataclasses.replace(spec, note="; ".join(filter(None, (spec.note, *said))))


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of `WIDTHxHEIGHT`. Raises ConfigError for what a tokenizer could not take."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or width % 16 or height % 16 or not width * height:
        near = f"try {max(16, round(width / 16) * 16)}x{max(16, round(height / 16) * 16)}" if found else None
        raise ConfigError("--size", got=text, expected="WIDTHxHEIGHT, both divisible by 16", fix=near)
    return width, height


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
