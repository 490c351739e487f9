"""What an edited dataset will hold, decided from the manifests of its sources before any shard is touched."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidworld.contract import ActionContract
from vidworld.data.edit_rules import ABSENT, Rule, known_fields, lookup, parse_rule
from vidworld.data.manifest import NAME_PATTERN, SPLITS, Manifest, Quarantined, Sample
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.media import Fit

EDITOR = 1
"""Raised when the same sources and options would give other bytes."""
DEFAULT_EPISODES, DEFAULT_MB = 64, 256.0
MANIFEST_FIELDS = ("key", "episode_id", "frames", "duration", "embodiment", "text", "split", "dataset")
"""Fields of a rule that the manifest answers; all others are of `meta.json`."""
_REENCODE = "make them alike first: vidworld edit reencode"


@dataclass(frozen=True)
class Take:
    """One episode of the result."""

    source: int
    """Position of its dataset among the sources."""
    sample: Sample
    """As it is there."""
    key: str
    """As it will be called."""
    split: str


@dataclass(frozen=True)
class Edit:
    """What will be made: which episodes under which names, of what size, rate and views."""

    operation: str
    name: str
    takes: tuple[Take, ...]
    fps: float
    height: int
    width: int
    views: tuple[str, ...]
    contracts: tuple[ActionContract, ...]
    """Of the sources; statistics are measured anew."""
    quarantined: tuple[Quarantined, ...]
    episodes_per_shard: int
    shard_mb: float
    quantizer: int | None = None
    """Encode every video anew with this quality; None keeps what need not change."""
    fit: Fit = "crop"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was asked for, as JSON values."""

    def of_split(self, split: str) -> tuple[Take, ...]:
        """Episodes of a split, in order."""
        return tuple(take for take in self.takes if take.split == split)


def keep_all(dataset: ShardDataset) -> list[Take]:
    """Every episode under its own name."""
    return [
        Take(0, sample, sample.key, shard.split)
        for shard in dataset.manifest.shards
        for sample in shard.samples
    ]


def edit_of(
    operation: str,
    manifest: Manifest,
    takes: Sequence[Take],
    *,
    name: str | None,
    episodes_per_shard: int | None = None,
    shard_mb: float | None = None,
    **changes: Any,
) -> Edit:
    """An edit of one dataset that changes only what is said; shards are as large as they were.

    Raises ConfigError for shards of nothing, DataError when no episode is left.
    """
    for option, value in (("--episodes-per-shard", episodes_per_shard), ("--shard-mb", shard_mb)):
        if value is not None and not value > 0:
            raise ConfigError(option, got=value, expected="more than 0")
    if not takes:
        raise DataError("no episode is left", where=manifest.name, fix="choose others")
    largest = max(len(shard.samples) for shard in manifest.shards)
    before = manifest.options
    return Edit(
        operation=operation,
        name=name or manifest.name,
        takes=tuple(takes),
        contracts=manifest.contracts,
        quarantined=manifest.quarantined,
        episodes_per_shard=episodes_per_shard or int(before.get("episodes_per_shard", largest)),
        shard_mb=shard_mb or float(before.get("shard_mb", DEFAULT_MB)),
        **{field: getattr(manifest, field) for field in ("fps", "height", "width", "views")} | changes,
    )


def merged(
    datasets: Sequence[ShardDataset], *, name: str | None, views: tuple[str, ...], **sizes: Any
) -> Edit:
    """All episodes of several datasets, in their order; a key that occurs before gets its dataset's name.

    Raises DataError for other kinds, rates, sizes or views, ContractError for one robot of two contracts.
    """
    manifests = [dataset.manifest for dataset in datasets]
    if len(datasets) < 2:
        raise ConfigError("datasets to merge", got=len(datasets), expected="two or more")
    digests = [manifest.digest for manifest in manifests]
    if len(set(digests)) < len(digests):
        twice = next(
            m.name for m, digest in zip(manifests, digests, strict=True) if digests.count(digest) > 1
        )
        raise ConfigError("datasets to merge", got=f"{twice!r} twice", expected="different ones")
    first = manifests[0]
    for other in manifests[1:]:
        _require_alike(first, other)
    for manifest in manifests:
        if missing := [view for view in views if view not in manifest.views]:
            raise ConfigError(
                "--views", where=manifest.name, got=missing[0], expected=" or ".join(manifest.views)
            )
        if not views and set(manifest.views) != set(first.views):
            raise DataError(
                f"views of {manifest.name!r}",
                got=", ".join(manifest.views),
                expected=f"{', '.join(first.views)} as in {first.name!r}",
                fix="name those that all have: --views TOP ...",
            )
    takes = [
        dataclasses.replace(take, source=index)
        for index, dataset in enumerate(datasets)
        for take in keep_all(dataset)
    ]
    return dataclasses.replace(
        edit_of(
            "merge",
            first,
            _renamed(takes, manifests),
            name=name or "+".join(dict.fromkeys(manifest.name for manifest in manifests)),
            views=views or first.views,
            **sizes,
        ),
        contracts=_pooled(manifests),
        quarantined=tuple(bad for manifest in manifests for bad in manifest.quarantined),
    )


def _require_alike(first: Manifest, other: Manifest) -> None:
    """Refuse to merge what no model could be trained on together."""
    for what, one, two, fix in (
        ("kind of dataset", first.kind, other.kind, "merge videos with videos, latents with latents"),
        (
            "tokenizer of the latents",
            (first.tokenizer or {}).get("digest"),
            (other.tokenizer or {}).get("digest"),
            "encode both with one tokenizer: vidworld encode",
        ),
        ("frames per second", first.fps, other.fps, f"{_REENCODE} --fps {min(first.fps, other.fps):g}"),
        (
            "size",
            f"{first.width}x{first.height}",
            f"{other.width}x{other.height}",
            f"{_REENCODE} --size {first.width}x{first.height}",
        ),
    ):
        if one != two:
            raise DataError(
                f"{what} of {other.name!r}", got=two, expected=f"{one} as of {first.name!r}", fix=fix
            )


def _pooled(manifests: Sequence[Manifest]) -> tuple[ActionContract, ...]:
    """One contract an embodiment; all but the statistics must agree."""
    found: dict[str, tuple[ActionContract, str]] = {}
    for manifest in manifests:
        for contract in manifest.contracts:
            first, where = found.setdefault(contract.embodiment, (contract, manifest.name))
            for field in ("rate_hz", "action", "proprio", "control_frame"):
                one, two = getattr(first, field), getattr(contract, field)
                if one != two:
                    raise ContractError(
                        f"{field.replace('_', ' ')} of embodiment {contract.embodiment!r}",
                        where=manifest.name,
                        got=_described(two),
                        expected=f"{_described(one)} as in {where!r}",
                        fix="two robots need two names: convert one again with another embodiment name",
                    )
            notes = dict.fromkeys(filter(None, (*first.note.split("; "), *contract.note.split("; "))))
            found[contract.embodiment] = dataclasses.replace(first, note="; ".join(notes)), where
    return tuple(contract for contract, _ in found.values())


def _described(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    text = f"{len(value)} ({', '.join(f'{d.name} {d.unit} {d.kind}' for d in value)})"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _renamed(takes: Sequence[Take], manifests: Sequence[Manifest]) -> list[Take]:
    """Give every episode a key of its own; the first to have a key keeps it."""
    taken: set[str] = set()
    result = []
    for take in takes:
        key = take.key
        if key in taken:
            prefix = re.sub(r"[^A-Za-z0-9]+", "_", manifests[take.source].name).strip("_") or "dataset"
            key = f"{prefix}-{take.key}"
        if key in taken or not NAME_PATTERN.fullmatch(key):
            origin = f"{manifests[take.source].digest}/{take.key}"
            key = f"{take.key[:48]}-{hashlib.sha256(origin.encode()).hexdigest()[:12]}"
        taken.add(key)
        result.append(dataclasses.replace(take, key=key))
    return result


def chosen_by(text: str, dataset: ShardDataset) -> Callable[[Sample, str], bool]:
    """A rule as a function of (sample, split); `meta.json` is read only for fields that are nowhere else.

    Raises ConfigError for a rule that does not parse, or that asks for a field which no episode has.
    """
    rule = parse_rule(text)
    _require_fields(rule, dataset)
    return lambda sample, split: rule.holds(_facts(dataset, sample, split, rule))


def _facts(dataset: ShardDataset, sample: Sample, split: str, rule: Rule) -> dict[str, Any]:
    manifest = dataset.manifest
    facts = {
        "key": sample.key,
        "episode_id": sample.episode_id,
        "frames": sample.frames,
        "duration": sample.frames / manifest.fps,
        "embodiment": sample.embodiment,
        "text": sample.text,
        "split": split,
        "dataset": manifest.name,
    }
    asks_meta = any(field not in MANIFEST_FIELDS for field in rule.fields())
    return {**(dataset.meta(sample.key) if asks_meta else {}), **facts}


def _require_fields(rule: Rule, dataset: ShardDataset) -> None:
    """A misspelt field would quietly choose nothing."""
    unknown = rule.fields() - set[str](MANIFEST_FIELDS)
    known: set[str] = set(MANIFEST_FIELDS)
    for sample in dataset.manifest.samples():
        if not unknown:
            return
        meta = dataset.meta(sample.key)
        known.update(known_fields(meta))
        unknown = {field for field in unknown if lookup(meta, field) is ABSENT}
    if unknown:
        raise ConfigError(
            f"field {sorted(unknown)[0]!r} of the rule",
            where=dataset.manifest.name,
            got="no episode has it",
            expected=", ".join(sorted(known)),
        )


def named(ids: Sequence[str], dataset: ShardDataset, option: str) -> set[str]:
    """Keys of episodes given by key or episode id. Raises ConfigError for one that is not there."""
    places: dict[str, list[str]] = {}
    for sample in dataset.manifest.samples():
        for name in {sample.key, sample.episode_id}:
            places.setdefault(name, []).append(sample.key)
    found = set()
    for name in ids:
        if name not in places:
            shown = ", ".join([sample.key for sample in dataset.manifest.samples()][:5])
            raise ConfigError(option, got=repr(name), expected=f"an episode of {shown} ...")
        found.update(places[name])
    return found


def held_out(takes: Sequence[Take], fraction: float, seed: int) -> set[str]:
    """Keys of a share of episodes, chosen by hash; at least one unless the share is 0."""
    if not 0 <= fraction < 1:
        raise ConfigError("--val-fraction", got=fraction, expected="from 0 to below 1")
    ranked = sorted((take.key for take in takes), key=lambda key: _rank(key, seed))
    return set(ranked[: round(fraction * len(ranked)) or (fraction > 0 and len(ranked) > 1)])


def shares(takes: Sequence[Take], fractions: Mapping[str, float], seed: int) -> dict[str, set[str]]:
    """Keys of each part, of as many episodes as its share says; the last takes what rounding leaves."""
    if not all(fraction > 0 for fraction in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        given = ", ".join(f"{name}={fraction:g}" for name, fraction in fractions.items())
        raise ConfigError("shares of the parts", got=given, expected="positive, 1 in all")
    ranked = sorted((take.key for take in takes), key=lambda key: _rank(key, seed))
    parts: dict[str, set[str]] = {}
    start, total = 0, 0.0
    for name, fraction in fractions.items():
        total += fraction
        end = round(total * len(ranked))
        parts[name] = set(ranked[start:end])
        start = end
    return parts


def _rank(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def identity(edit: Edit, datasets: Sequence[ShardDataset]) -> dict[str, Any]:
    """All that decides the result, as JSON values, and where its episodes come from."""
    manifests = [dataset.manifest for dataset in datasets]
    return {
        "editor": EDITOR,
        "edit": edit.operation,
        "name": edit.name,
        "sources": [{"name": manifest.name, "digest": manifest.digest} for manifest in manifests],
        **edit.settings,
        **{split: [take.key for take in edit.of_split(split)] for split in SPLITS},
        "views": list(edit.views),
        "fps": edit.fps,
        "size": f"{edit.width}x{edit.height}",
        "episodes_per_shard": edit.episodes_per_shard,
        "shard_mb": edit.shard_mb,
        "made_from": [
            {"name": manifest.name, "created_by": manifest.created_by, "options": manifest.options}
            for manifest in manifests
        ],
    }
