"""`vidworld inspect`: say what a dataset holds and what looks wrong in it, as text, as JSON or as a page.

The manifest alone answers most questions in a moment. Episodes are read for the page, or when asked for.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from vidworld.config import parse
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.inspection.detectors import suspicious
from vidworld.data.inspection.finding import Finding
from vidworld.data.inspection.survey import Survey, choose, read
from vidworld.data.manifest import SPLITS, Manifest, Sample
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError

PAGE_EPISODES = 64
SHOWN = 20
"""Rows of a list in the text; --json and the page have more."""


@dataclass(frozen=True)
class Options:
    """Say what a dataset holds, and what looks wrong in it."""

    directory: tyro.conf.Positional[str]
    """Folder or URL of a dataset that `vidworld shard` or `vidworld encode` wrote."""
    json: bool = False
    """Print JSON instead of text."""
    html: Path | None = None
    """Also write a page with pictures and figures: a file that ends in .html, replaced if it is there."""
    max_episodes: int | None = None
    """Episodes to read, alike many of each embodiment; default: 64 with --html, otherwise none."""
    seed: int = 0
    """Changes which episodes are read."""
    workers: int | None = None
    """Threads that read; default: one a core, at most 8."""
    verify: bool = False
    """Also check the checksum and members of every shard."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld inspect`."""
    options = parse(Options, arguments, prog=prog)
    _check(options)
    dataset = ShardDataset.open(options.directory, verify=False)
    if options.verify:
        verify(dataset)
    count = options.max_episodes
    if count is None:
        count = PAGE_EPISODES if options.html else 0
    survey = Survey(dataset.manifest)
    if count:
        keys = choose(dataset.manifest, count, options.seed)
        survey = read(dataset, keys, workers=options.workers)
    findings = suspicious(survey)
    summary = describe(dataset.manifest) | {
        "verified": options.verify,
        "episodes_read": len(survey.looks),
        "suspicious": [finding.to_mapping() for finding in findings],
    }
    if options.html:
        from vidworld.data.inspection.page import write_page  # figures take a second to import

        write_page(summary, survey, findings, options.html, seed=options.seed)
    if options.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    print("\n".join(_lines(dataset.manifest, summary)))
    print("\n".join(_findings(findings, summary, options)))


def _check(options: Options) -> None:
    """Refuse what cannot be done before anything is read."""
    for name, value in (("--max-episodes", options.max_episodes), ("--workers", options.workers)):
        if value is not None and value < (1 if name == "--workers" else 0):
            raise ConfigError(name, got=value, expected="a positive number")
    if options.html is not None:
        if options.html.suffix.lower() not in (".html", ".htm") or options.html.is_dir():
            raise ConfigError("--html", got=options.html, expected="a file that ends in .html")
        if options.max_episodes == 0:
            raise ConfigError("--max-episodes", got=0, expected="at least 1 for a page")


def verify(dataset: ShardDataset) -> None:
    """Check every shard; raises DataError that names all damaged ones."""
    problems: list[DataError] = []
    shards = dataset.manifest.shards
    with tqdm(total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=None) as bar:
        for shard in shards:
            try:
                dataset.verify_shard(shard)
            except DataError as error:
                problems.append(error)
            bar.update(shard.bytes)
    if problems:
        raise DataError(f"{len(problems)} of {len(shards)} shards: {' | '.join(map(str, problems))}")


def describe(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says, as JSON values."""
    samples = manifest.samples()
    return {
        "name": manifest.name,
        "kind": manifest.kind,
        "schema_version": manifest.schema_version,
        "digest": manifest.digest,
        "episodes": len(samples),
        "frames": _frames(samples),
        "duration_s": round(_frames(samples) / manifest.fps, 3),
        "fps": manifest.fps,
        "width": manifest.width,
        "height": manifest.height,
        "views": list(manifest.views),
        "splits": {
            split: {"episodes": len(manifest.samples(split)), "frames": _frames(manifest.samples(split))}
            for split in SPLITS
        },
        "embodiments": [_embodiment(contract, samples) for contract in manifest.contracts],
        "quarantined": [{"episode_id": q.episode_id, "reason": q.reason} for q in manifest.quarantined],
        "shards": [
            {
                "file": shard.file,
                "split": shard.split,
                "episodes": len(shard.samples),
                "frames": _frames(shard.samples),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for shard in manifest.shards
        ],
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "tokenizer": manifest.tokenizer,
        "created_by": manifest.created_by,
        "options": manifest.options,
    }


def _embodiment(contract: ActionContract, samples: Sequence[Sample]) -> dict[str, Any]:
    own = [sample for sample in samples if sample.embodiment == contract.embodiment]
    low, high = contract.proprio_statistics.minimum, contract.proprio_statistics.maximum
    return {
        "embodiment": contract.embodiment,
        "episodes": len(own),
        "frames": _frames(own),
        "contract": contract.to_mapping(),
        "contract_digest": contract.digest,
        "constant_actions": contract.constant_actions(),
        "constant_proprio": [d.name for d, a, b in zip(contract.proprio, low, high, strict=True) if a == b],
    }


def _frames(samples: Sequence[Sample]) -> int:
    return sum(sample.frames for sample in samples)


def _lines(manifest: Manifest, summary: dict[str, Any]) -> Iterator[str]:
    """The text for people."""
    shape = f"{manifest.width}x{manifest.height} at {manifest.fps:g} fps, views {', '.join(manifest.views)}"
    minutes, seconds = divmod(round(summary["duration_s"]), 60)
    yield f"{manifest.name}: {manifest.kind}, {shape}"
    yield (
        f"  {summary['episodes']} episodes, {summary['frames']} frames ({minutes} min {seconds} s), "
        f"{summary['bytes'] / 1e6:.1f} MB in {len(manifest.shards)} shards"
        f"{', checksums hold' if summary['verified'] else ''}"
    )
    for split, counts in summary["splits"].items():
        yield f"  {split:<5} {counts['episodes']:>6} episodes {counts['frames']:>9} frames"
    if manifest.tokenizer is not None:
        facts = ", ".join(f"{name} {value}" for name, value in manifest.tokenizer.items())
        yield f"  tokenizer: {facts}"
    yield f"  digest {manifest.digest}, made by {manifest.created_by or 'unknown'}"
    for contract, found in zip(manifest.contracts, summary["embodiments"], strict=True):
        yield ""
        yield (
            f"embodiment {contract.embodiment}: {found['episodes']} episodes, {contract.rate_hz:g} Hz, "
            f"control frame {contract.control_frame}, contract {contract.digest}"
        )
        if contract.note:
            yield f"  note: {contract.note}"
        yield from _table("action", contract.action, contract.action_statistics)
        yield from _table("proprio", contract.proprio, contract.proprio_statistics)
    if manifest.quarantined:
        yield ""
        yield f"quarantined {len(manifest.quarantined)}:"
        yield from (f"  {bad.episode_id}: {bad.reason}" for bad in manifest.quarantined[:SHOWN])
        if len(manifest.quarantined) > SHOWN:
            yield f"  and {len(manifest.quarantined) - SHOWN} more (--json has all)"


def _findings(findings: Sequence[Finding], summary: dict[str, Any], options: Options) -> Iterator[str]:
    """What looks wrong, and how much was looked at."""
    read_ = summary["episodes_read"]
    yield ""
    looked = f"{read_} of {summary['episodes']} episodes read" if read_ else "only the manifest was read"
    yield f"suspicious: {len(findings) or 'nothing'} ({looked})"
    yield from (f"  {finding}" for finding in findings)
    if options.html:
        yield f"page: {options.html}"
    elif not read_:
        yield f"next: vidworld inspect {options.directory} --html inspect.html looks into the episodes"


def _table(role: str, dimensions: Sequence[Dimension], statistics: Statistics) -> Iterator[str]:
    wide = max([len(role), *(len(dimension.name) for dimension in dimensions)])
    unit = max([len("unit"), *(len(dimension.unit) for dimension in dimensions)])
    yield (
        f"  {role:<{wide}}  {'unit':<{unit}}  {'kind':<8}"
        f"{'minimum':>11}{'1 %':>11}{'mean':>11}{'99 %':>11}{'maximum':>11}"
    )
    for index, dimension in enumerate(dimensions):
        row = [
            column[index]
            for column in (
                statistics.minimum,
                statistics.q01,
                statistics.mean,
                statistics.q99,
                statistics.maximum,
            )
        ]
        constant = "  constant" if row[0] == row[-1] else ""
        numbers = "".join(f"{value:>11.4g}" for value in row)
        yield f"  {dimension.name:<{wide}}  {dimension.unit:<{unit}}  {dimension.kind:<8}{numbers}{constant}"
