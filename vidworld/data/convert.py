"""Turn robot logs into shards: `vidworld shard SOURCE --out DIR`.

Worker processes prepare episodes; this process packs them, in the order of the source, into shards, so that
the bytes do not depend on the number of workers. Interrupted work continues, see `vidworld.data.staging`.
"""

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse
from vidworld.contract import warn_constant
from vidworld.data.deliver import local_output
from vidworld.data.manifest import SPLITS, Manifest, Quarantined, Sample, Shard
from vidworld.data.measure import measure_contracts
from vidworld.data.plan import ConvertOptions, Plan, make_plan, sample_key
from vidworld.data.pool import Job, num_cores, results
from vidworld.data.prepare import Prepared
from vidworld.data.shards import ShardWriter
from vidworld.data.sources.base import Source
from vidworld.data.sources.detect import open_source
from vidworld.data.staging import SHARDS, Group, Staging, existing, locked
from vidworld.errors import DataError, require
from vidworld.files import url_of


@dataclass(frozen=True, kw_only=True)
class Options(ConvertOptions):
    """Turn robot logs into WebDataset shards."""

    source: tyro.conf.Positional[Path]
    """Folder or file of the logs: LeRobot, RLDS, HDF5, mp4 + JSON, or videos and tables of your own."""


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
    where = url_of(options.out) or options.out
    print(
        f"{where}: {'done' if fresh else 'already complete with these options, nothing to do'}; "
        f"next: vidworld inspect {where}"
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
    if url_of(options.out):
        with local_output(options.out, overwrite=options.overwrite) as out:
            return _convert(source, dataclasses.replace(options, out=out), root)
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
    workers = min(options.workers or num_cores(), max(len(pending), 1))
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


def _tar_of(staging: Staging, shard: Shard) -> Path:
    path = staging.locate(shard)
    assert path is not None
    return path
