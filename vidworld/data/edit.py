"""`vidworld edit`: merge, split, reshard, filter or re-encode datasets, or drop views, exactly."""

import dataclasses
import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vidworld.config import parse
from vidworld.data.edit_plan import (
    Edit,
    chosen_by,
    edit_of,
    held_out,
    keep_all,
    merged,
    named,
    shares,
)
from vidworld.data.edit_write import write_edit
from vidworld.data.manifest import NAME_PATTERN, SPLITS, Manifest
from vidworld.data.plan import parse_size
from vidworld.data.resample import whole_fraction
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.files import url_of
from vidworld.media import Fit

Sources = tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where the result goes, and how it is packed."""

    out: Path
    """Directory of the result, or a URL."""
    name: str | None = None
    """Name of the result; default: that of the source."""
    episodes_per_shard: int | None = None
    """A shard ends after this many episodes, by default as many as in the source,"""
    shard_mb: float | None = None
    """or when it has grown to this many megabytes."""
    overwrite: bool = False
    """Replace a dataset that was made otherwise."""

    @property
    def packing(self) -> dict[str, Any]:
        """What `edit_of` takes of this."""
        names = ("name", "episodes_per_shard", "shard_mb")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Merge(Result):
    """Put datasets of one size, rate and set of views together."""

    sources: tyro.conf.Positional[Sources]
    """Datasets; the first to have a key keeps it, others get the name of their dataset before it."""
    views: tuple[str, ...] = ()
    """Keep these views, which all must have; default: all, which must be the same."""


@dataclass(frozen=True, kw_only=True)
class Split(Result):
    """Choose other held-out episodes, or make several datasets."""

    source: tyro.conf.Positional[Path]
    """The dataset."""
    val_fraction: float | None = None
    """Hold out this share of the episodes, chosen by hash,"""
    val_episodes: tuple[str, ...] = ()
    """or exactly these (keys or episode ids),"""
    val_where: str = ""
    """or those of which this rule holds."""
    parts: tuple[str, ...] = ()
    """Datasets to make in OUT instead: NAME=SHARE (0.8) each, or NAME=RULE each and NAME=rest."""
    seed: int = 0
    """Of the choice by hash."""


@dataclass(frozen=True, kw_only=True)
class Reshard(Result):
    """Pack the same episodes into other shards."""

    source: tyro.conf.Positional[Path]
    """The dataset."""


@dataclass(frozen=True, kw_only=True)
class Filter(Result):
    """Keep some episodes."""

    source: tyro.conf.Positional[Path]
    """The dataset."""
    where: str = ""
    """Keep those of which this rule holds: "frames >= 20 and text ~ banana and outcome.success == true"."""
    include: tuple[str, ...] = ()
    """Keep only these (keys or episode ids)."""
    exclude: tuple[str, ...] = ()
    """Leave these out."""


@dataclass(frozen=True, kw_only=True)
class Reencode(Result):
    """Make the videos smaller, slower or of another quality."""

    source: tyro.conf.Positional[Path]
    """The dataset."""
    size: str | None = None
    """WIDTHxHEIGHT, both divisible by 16."""
    fit: Fit = "crop"
    """How another aspect is met: cut the centre, pad with black, or stretch."""
    fps: float | None = None
    """Frames per second, a whole fraction of the rate; actions are resampled by their kinds."""
    quality: int | None = None
    """JPEG quantizer, 1 (best) to 31; encodes every video anew. Default: 3, where a video must change."""
    workers: int | None = None
    """Processes; default: one a core. The bytes do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class DropViews(Result):
    """Leave cameras out."""

    source: tyro.conf.Positional[Path]
    """The dataset."""
    views: tuple[str, ...] = ()
    """Views to leave out."""


def merge(options: Merge) -> list[tuple[Path, Manifest]]:
    """Put datasets together; raises UserError naming what does not agree."""
    datasets = [ShardDataset.open(source) for source in options.sources]
    edit = merged(datasets, views=options.views, **options.packing)
    renamed = [take for take in edit.takes if take.key != take.sample.key]
    if renamed:
        example = f"{renamed[0].sample.key} is {renamed[0].key}"
        warnings.warn(f"{len(renamed)} keys occurred before and were renamed: {example}", stacklevel=2)
    return [_made(options, options.out, edit, datasets)]


def split(options: Split) -> list[tuple[Path, Manifest]]:
    """Choose held-out episodes anew, or make several datasets; each episode goes to exactly one."""
    dataset = ShardDataset.open(options.source)
    takes = keep_all(dataset)
    ways = [
        options.val_fraction is not None,
        bool(options.val_episodes),
        bool(options.val_where),
        bool(options.parts),
    ]
    if sum(ways) != 1:
        raise ConfigError(
            "how to split",
            got=f"{sum(ways)} ways",
            expected="one: --val-fraction, --val-episodes, --val-where, --parts",
        )
    if options.parts:
        done = []
        for name, keys in _parts(options, dataset).items():
            chosen = [take for take in takes if take.key in keys]
            packing: dict[str, Any] = options.packing | {
                "name": f"{options.name or dataset.manifest.name}-{name}"
            }
            edit = edit_of("split", dataset.manifest, chosen, **packing)
            done.append(_made(options, options.out / name, edit, [dataset]))
        return done
    if options.val_where:
        holds = chosen_by(options.val_where, dataset)
        val = {take.key for take in takes if holds(take.sample, take.split)}
    elif options.val_episodes:
        val = named(options.val_episodes, dataset, "--val-episodes")
    else:
        val = held_out(takes, options.val_fraction or 0.0, options.seed)
    if len(val) in (0, len(takes)) and options.val_fraction != 0:
        which = "no episode" if not val else "every episode"
        raise ConfigError("held-out episodes", got=which, expected="some, and some to train on")
    takes = [dataclasses.replace(take, split="val" if take.key in val else "train") for take in takes]
    edit = edit_of("split", dataset.manifest, takes, **options.packing)
    return [_made(options, options.out, edit, [dataset])]


def reshard(options: Reshard) -> list[tuple[Path, Manifest]]:
    """Pack the same episodes into other shards."""
    if options.episodes_per_shard is None and options.shard_mb is None:
        raise ConfigError("reshard", got="no size", expected="--episodes-per-shard or --shard-mb")
    dataset = ShardDataset.open(options.source)
    edit = edit_of("reshard", dataset.manifest, keep_all(dataset), **options.packing)
    return [_made(options, options.out, edit, [dataset])]


def filter_episodes(options: Filter) -> list[tuple[Path, Manifest]]:
    """Keep the episodes that a rule and lists of ids choose."""
    if not (options.where or options.include or options.exclude):
        raise ConfigError("filter", got="no condition", expected="--where, --include or --exclude")
    dataset = ShardDataset.open(options.source)
    takes = keep_all(dataset)
    if options.include:
        kept = named(options.include, dataset, "--include")
        takes = [take for take in takes if take.key in kept]
    left_out = named(options.exclude, dataset, "--exclude")
    takes = [take for take in takes if take.key not in left_out]
    if options.where:
        holds = chosen_by(options.where, dataset)
        takes = [take for take in takes if holds(take.sample, take.split)]
    edit = edit_of("filter", dataset.manifest, takes, **options.packing, settings={"where": options.where})
    return [_made(options, options.out, edit, [dataset])]


def reencode(options: Reencode) -> list[tuple[Path, Manifest]]:
    """Make the videos smaller, slower or of another quality; those that need not change are copied."""
    dataset = ShardDataset.open(options.source)
    manifest = dataset.manifest
    if manifest.kind != "video":
        raise DataError(
            "dataset to re-encode",
            where=dataset.directory,
            got=manifest.kind,
            expected="video",
            fix="re-encode the videos, then run vidworld encode again",
        )
    if options.quality is not None and not 1 <= options.quality <= 31:
        raise ConfigError("--quality", got=options.quality, expected="1 (best) to 31")
    fps = float(manifest.fps if options.fps is None else options.fps)
    if not fps > 0 or whole_fraction(manifest.fps, fps) is None:
        choices = ", ".join(f"{manifest.fps / divisor:g}" for divisor in range(1, 6))
        raise ConfigError("--fps", got=f"{fps:g}", expected=f"a whole fraction of the rate: {choices} ...")
    width, height = (manifest.width, manifest.height) if options.size is None else parse_size(options.size)
    edit = edit_of(
        "reencode",
        manifest,
        keep_all(dataset),
        **options.packing,
        width=width,
        height=height,
        fps=fps,
        quantizer=options.quality,
        fit=options.fit,
        settings={"quality": options.quality, "fit": options.fit},
    )
    return [_made(options, options.out, edit, [dataset], options.workers)]


def drop_views(options: DropViews) -> list[tuple[Path, Manifest]]:
    """Leave cameras out."""
    dataset = ShardDataset.open(options.source)
    views = dataset.manifest.views
    if not options.views:
        raise ConfigError("--views", got="none", expected=" or ".join(views))
    if unknown := [view for view in options.views if view not in views]:
        raise ConfigError("--views", got=unknown[0], expected=" or ".join(views))
    left = tuple(view for view in views if view not in options.views)
    if not left:
        raise ConfigError("--views", got="all of them", expected=f"not all of {', '.join(views)}")
    edit = edit_of("drop-views", dataset.manifest, keep_all(dataset), **options.packing, views=left)
    return [_made(options, options.out, edit, [dataset])]


@dataclass(frozen=True)
class Operation:
    """One word after `vidworld edit`."""

    options: type
    run: Callable[[Any], list[tuple[Path, Manifest]]]


OPERATIONS = {
    "merge": Operation(Merge, merge),
    "split": Operation(Split, split),
    "reshard": Operation(Reshard, reshard),
    "filter": Operation(Filter, filter_episodes),
    "reencode": Operation(Reencode, reencode),
    "drop-views": Operation(DropViews, drop_views),
}


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld edit`."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        rows = "\n".join(f"  {word:<11}{one.options.__doc__}" for word, one in OPERATIONS.items())
        usage = f"usage: {prog} OPERATION SOURCE ... --out DIR [options]"
        print(f"{usage}\n\n{rows}\n\n{prog} OPERATION --help says more.")
        raise SystemExit(0)
    if name not in OPERATIONS:
        near = difflib.get_close_matches(name, OPERATIONS, n=1)
        fix = f"did you mean {near[0]!r}?" if near else None
        raise ConfigError("operation", got=repr(name), expected=" or ".join(OPERATIONS), fix=fix)
    operation = OPERATIONS[name]
    options = parse(operation.options, arguments[1:], prog=f"{prog} {name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = operation.run(options)
    for warning in caught:
        print(f"{prog}: warning: {warning.message}", file=sys.stderr)
    for out, manifest in made:
        counts = ", ".join(f"{len(manifest.samples(split))} {split}" for split in SPLITS)
        size = sum(shard.bytes for shard in manifest.shards) / 1e6
        print(
            f"{url_of(out) or out}: {len(manifest.samples())} episodes ({counts}), {size:.1f} MB in "
            f"{len(manifest.shards)} shards, digest {manifest.digest}"
        )


def _made(
    options: Result, out: Path, edit: Edit, datasets: Sequence[ShardDataset], workers: int | None = None
) -> tuple[Path, Manifest]:
    return out, write_edit(edit, datasets, out, overwrite=options.overwrite, workers=workers)[0]


def _parts(options: Split, dataset: ShardDataset) -> dict[str, set[str]]:
    """Name of each part -> keys of its episodes."""
    given: dict[str, str] = {}
    for part in options.parts:
        name, sign, what = part.partition("=")
        if not sign or not what or not NAME_PATTERN.fullmatch(name) or name in given:
            raise ConfigError(
                "--parts", got=repr(part), expected="NAME=0.8, NAME=RULE or NAME=rest, each name once"
            )
        given[name] = what
    takes = keep_all(dataset)
    numbers = {name: _number(what) for name, what in given.items()}
    if all(number is not None for number in numbers.values()):
        return shares(takes, {name: number or 0.0 for name, number in numbers.items()}, options.seed)
    rules = {name: chosen_by(what, dataset) for name, what in given.items() if what != "rest"}
    rest = [name for name, what in given.items() if what == "rest"]
    parts: dict[str, set[str]] = {name: set() for name in given}
    for take in takes:
        homes = [name for name, holds in rules.items() if holds(take.sample, take.split)] or rest
        if len(homes) != 1:
            raise ConfigError(
                f"parts for episode {take.key!r}",
                got=", ".join(homes) or "none",
                expected="exactly one",
                fix="make the rules exclude each other, and add NAME=rest for what is left",
            )
        parts[homes[0]].add(take.key)
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
