"""Turn robot logs into shards: `vidworld shard SOURCE --out DIR`.

Worker processes prepare episodes; this process packs them, in the order of the source, into shards, so that
the bytes do not depend on the number of workers. Interrupted work continues, see `vidworld.data.staging`.
"""

import dataclasses
import hashlib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse, to_mapping
from vidworld.contract import warn_constant
from vidworld.data.contract_file import read_contracts
from vidworld.data.manifest import NAME_PATTERN, SPLITS, Manifest, Quarantined, Sample, Shard
from vidworld.data.measure import measure_contracts
from vidworld.data.pool import Job, results
from vidworld.data.prepare import (
    Fit,
    Prepared,
    Recipe,
    Trim,
    decimation,
    resampling_note,
    unknown_kind,
)
from vidworld.data.shards import ShardWriter
from vidworld.data.sources.base import Source
from vidworld.data.sources.detect import open_source
from vidworld.data.staging import SHARDS, Group, Staging, existing, locked
from vidworld.errors import ConfigError, DataError, require
from vidworld.types import EmbodimentSpec

CONVERTER = 1
"""Raised when the same source and options would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How robot logs become shards."""

    out: Path
    """Directory of the dataset."""
    name: str | None = None
    """Name of the dataset; default: that of the source."""
    size: str = "128x96"
    """WIDTHxHEIGHT of the video, both divisible by 16."""
    fit: Fit = "crop"
    """How another aspect is met: cut the centre, pad with black, or stretch."""
    fps: float | None = None
    """Frames per second, a whole fraction of the recorded rate; default: that rate."""
    views: tuple[str, ...] = ()
    """Cameras to keep; default: all."""
    contract: tuple[Path, ...] = ()
    """YAML with names, units, kinds, control frame and note of the robot, where the logs do not say."""
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
    """When rows and video frames differ in number: quarantine the episode, or cut to the shorter."""
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


@dataclass(frozen=True, kw_only=True)
class Options(ConvertOptions):
    """Turn robot logs into WebDataset shards."""

    source: tyro.conf.Positional[Path]
    """Folder of the logs: a LeRobot dataset (v2.0, v2.1, v3.0)."""


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


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld shard`."""
    options = parse(Options, arguments, prog=prog)
    source = open_source(options.source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        manifest, fresh = _convert(source, options, str(options.source))
    for warning in caught:
        print(f"{prog}: warning: {warning.message}", file=sys.stderr)
    for bad in manifest.quarantined:
        print(f"{prog}: quarantined {bad.episode_id}: {bad.reason}", file=sys.stderr)
    frames = sum(sample.frames for sample in manifest.samples())
    counts = ", ".join(f"{len(manifest.samples(split))} {split}" for split in SPLITS)
    print(
        f"{len(manifest.samples())} episodes ({counts}), {frames} frames of {', '.join(manifest.views)} at "
        f"{manifest.width}x{manifest.height}, {manifest.fps:g} fps, {len(manifest.quarantined)} quarantined, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB in {len(manifest.shards)} shards"
    )
    print(
        f"{options.out}: {'done' if fresh else 'already complete with these options, nothing to do'}; "
        f"next: vidworld inspect {options.out}"
    )


def convert(source: Source, options: ConvertOptions) -> Manifest:
    """Convert a source into a dataset directory and return its manifest.

    Does nothing when the directory already holds the result, and continues what was interrupted. With more
    than one worker, a script that calls this needs the usual `if __name__ == "__main__":` guard.

    Raises ConfigError for options that do not fit the source or differ from those of the directory, DataError
    when more than `max_quarantined` of the episodes are bad or the disk is full.
    """
    return _convert(source, options, root="")[0]


def _convert(source: Source, options: ConvertOptions, root: str) -> tuple[Manifest, bool]:
    """The manifest, and whether anything had to be done; `root` is cut from paths in quarantine reasons."""
    require("webdataset", "train")
    plan = make_plan(source, options)
    with locked(options.out):
        if not options.overwrite and (manifest := existing(options.out, plan.identity)):
            return manifest, False
        staging = Staging(options.out, plan.identity, overwrite=options.overwrite)
        groups = _write_shards(plan, options, staging, Job(source, plan.recipe, root))
        shards = [group.shard for group in groups if group.shard]
        if not any(shard.split == "train" for shard in shards):
            raise DataError("no good episode to train on", where=source.name)
        contracts = measure_contracts(
            tuple(plan.recipe.embodiments.values()),
            plan.recipe.fps,
            [(s, _tar_of(staging, s)) for s in shards],
        )
        for contract in contracts:
            warn_constant(contract)
        manifest = Manifest(
            kind="video",
            name=plan.name,
            fps=plan.recipe.fps,
            height=plan.recipe.height,
            width=plan.recipe.width,
            views=plan.recipe.views,
            contracts=contracts,
            shards=tuple(shards),
            quarantined=tuple(bad for group in groups for bad in group.quarantined),
            created_by=f"vidworld {__version__}",
            options=plan.identity,
        )
        staging.publish(manifest)
    return manifest, True


def make_plan(source: Source, options: ConvertOptions) -> Plan:
    """Resolve options against a source. Raises ConfigError (or DataError) for what does not fit."""
    width, height = _size(options.size)
    for name, least in (("min_frames", 2), ("episodes_per_shard", 1), ("workers", 1), ("max_episodes", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise ConfigError(f"--{name.replace('_', '-')}", got=given, expected=f"at least {least}")
    if unknown := set(options.views) - set(source.views):
        raise ConfigError("--views", got=sorted(unknown)[0], expected=" or ".join(source.views))
    fps = float(source.fps if options.fps is None else options.fps)
    if not fps > 0:
        raise ConfigError("--fps", got=fps, expected="more than 0")
    embodiments = read_contracts(options.contract, source.embodiments)
    if decimation(source.fps, fps) > 1:
        embodiments = {name: _resampled(spec) for name, spec in embodiments.items()}
    recipe = Recipe(
        width=width,
        height=height,
        fit=options.fit,
        fps=fps,
        views=tuple(view for view in source.views if view in options.views or not options.views),
        trim=options.trim,
        min_frames=options.min_frames,
        embodiments=embodiments,
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


def _write_shards(plan: Plan, options: ConvertOptions, staging: Staging, job: Job) -> list[Group]:
    """Prepare all episodes that no earlier run finished, and pack them into shards."""
    groups = {split: staging.finished(split, ids) for split, ids in plan.episodes.items()}
    done = {split: sum(len(group.episodes) for group in found) for split, found in groups.items()}
    todo = {split: ids[done[split] :] for split, ids in plan.episodes.items()}
    quarantined = [bad for found in groups.values() for group in found for bad in group.quarantined]
    budget = math.floor(options.max_quarantined * plan.total)

    def watched(prepared: Iterator[Prepared | Quarantined]) -> Iterator[Prepared | Quarantined]:
        frames = 0
        with tqdm(total=plan.total, initial=sum(done.values()), unit="episode", disable=None) as bar:
            for result in prepared:
                if isinstance(result, Quarantined):
                    quarantined.append(result)
                    _check_budget(quarantined, budget, plan.total)
                else:
                    frames += result.frames * len(plan.recipe.views)
                bar.set_postfix_str(f"{frames / max(bar.format_dict['elapsed'], 1e-3):.0f} frames/s", False)
                bar.update()
                yield result

    _check_budget(quarantined, budget, plan.total)
    pending = [episode_id for split in SPLITS for episode_id in todo[split]]
    workers = min(options.workers or _cores(), max(len(pending), 1))
    with results(job, pending, workers) as stream:
        prepared = watched(stream)
        for split in SPLITS:
            left = todo[split]
            while left:
                group = _write_group(split, len(groups[split]), left, prepared, options, staging)
                groups[split].append(group)
                left = left[len(group.episodes) :]
    return [group for split in SPLITS for group in groups[split]]


def _write_group(
    split: str,
    index: int,
    planned: tuple[str, ...],
    prepared: Iterator[Prepared | Quarantined],
    options: ConvertOptions,
    staging: Staging,
) -> Group:
    """Take the next results until a shard is full or the split ends, and write it."""
    episodes: list[str] = []
    quarantined: list[Quarantined] = []
    good: list[Prepared] = []
    size = 0
    while len(episodes) < len(planned) and len(good) < options.episodes_per_shard:
        result = next(prepared)
        assert result.episode_id == planned[len(episodes)]
        episodes.append(result.episode_id)
        if isinstance(result, Quarantined):
            quarantined.append(result)
            continue
        good.append(result)
        size += sum(map(len, result.members.values()))
        if size >= options.shard_mb * 1e6:
            break
    shard = None
    if good:
        path = staging.tar(split, index)
        with ShardWriter(path) as writer:
            for done in good:
                writer.add(sample_key(done.episode_id), done.members)
        samples = tuple(
            Sample(sample_key(done.episode_id), done.frames, done.embodiment, done.episode_id, done.text)
            for done in good
        )
        shard = Shard(f"{SHARDS}/{path.name}", writer.sha256, writer.bytes, split, samples)
    group = Group(split, tuple(episodes), tuple(quarantined), shard)
    staging.finish(index, group)
    return group


def _check_budget(quarantined: Sequence[Quarantined], budget: int, total: int) -> None:
    if len(quarantined) > budget:
        reasons = "; ".join(f"{bad.episode_id}: {bad.reason}" for bad in quarantined[:10])
        raise DataError(
            f"too many bad episodes: {len(quarantined)} of {total}, allowed are {budget} ({reasons})",
            fix="mend or leave them out, or accept more with --max-quarantined 0.5",
        )


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


def _resampled(spec: EmbodimentSpec) -> EmbodimentSpec:
    for dimension in spec.action:
        if dimension.kind == "unknown":
            raise unknown_kind(dimension)
    return dataclasses.replace(spec, note="; ".join(filter(None, (spec.note, resampling_note(spec)))))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or width % 16 or height % 16 or not width * height:
        near = f"try {max(16, round(width / 16) * 16)}x{max(16, round(height / 16) * 16)}" if found else None
        raise ConfigError("--size", got=text, expected="WIDTHxHEIGHT, both divisible by 16", fix=near)
    return width, height


def _tar_of(staging: Staging, shard: Shard) -> Path:
    path = staging.locate(shard)
    assert path is not None
    return path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
