"""The manifest of a dataset: what is in which shard, under which action contract, with which checksums.

It is written last, so a directory without it is an unfinished conversion and never a half dataset.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vidworld.config import digest, from_mapping, to_mapping
from vidworld.contract import ActionContract
from vidworld.data.cache import Cache
from vidworld.data.remote import MissingFileError, shown
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.files import url_of, write_atomic

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Sample:
    """One episode in a shard."""

    key: str
    """Its name in the tar: letters, digits, `-` and `_`, at most 64."""
    frames: int
    embodiment: str
    episode_id: str
    """Its name in the source."""
    text: str = ""


@dataclass(frozen=True)
class Shard:
    """One tar file; `samples` in the order in which they lie in it."""

    file: str
    """Path relative to the dataset directory, such as `shards/train-000000.tar`."""
    sha256: str
    bytes: int
    split: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Quarantined:
    """An episode that was left out, and why."""

    episode_id: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """All that is known about a dataset without opening a shard.

    Raises DataError when it contradicts itself.
    """

    kind: Literal["video", "latents"]
    name: str
    fps: float
    height: int
    """Rows of the video in pixels, also where the dataset holds latents of it."""
    width: int
    views: tuple[str, ...]
    contracts: tuple[ActionContract, ...]
    shards: tuple[Shard, ...]
    quarantined: tuple[Quarantined, ...] = ()
    created_by: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """The conversion options that made it."""
    tokenizer: dict[str, Any] | None = None
    """Latents only: `digest`, `channels`, `spatial_stride`, `time_stride`."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        # An int would change the digest after a trip through JSON.
        object.__setattr__(self, "fps", float(self.fps))
        for problem in self._problems():
            raise DataError(f"manifest of dataset {self.name!r}: {problem}")

    def _problems(self) -> Iterable[str]:
        if self.schema_version != SCHEMA_VERSION:
            yield f"schema version {self.schema_version}, this vidworld knows {SCHEMA_VERSION}"
        if not (self.fps > 0 and self.height > 0 and self.width > 0):
            yield f"fps {self.fps}, size {self.width}x{self.height} must be positive"
        if not self.views:
            yield "no views"
        for name in self.views:
            if not NAME_PATTERN.fullmatch(name):
                yield f"view name {name!r} may hold letters, digits, '-' and '_' only"
        # WebDataset folds member suffixes to lower case when it reads.
        yield from (f"view {name!r} twice" for name in _repeated(view.lower() for view in self.views))
        yield from (f"embodiment {name!r} twice" for name in _repeated(c.embodiment for c in self.contracts))
        if (self.kind == "latents") != (self.tokenizer is not None):
            yield f"kind {self.kind!r} and tokenizer {self.tokenizer!r} do not go together"
        if self.tokenizer is not None:
            yield from self._tokenizer_problems(self.tokenizer)
        known = {contract.embodiment for contract in self.contracts}
        for shard in self.shards:
            yield from _shard_problems(shard, known)
        yield from (f"shard {name!r} twice" for name in _repeated(shard.file for shard in self.shards))
        keys = (sample.key for shard in self.shards for sample in shard.samples)
        yield from (f"sample key {key!r} twice" for key in _repeated(keys))

    def _tokenizer_problems(self, tokenizer: dict[str, Any]) -> Iterable[str]:
        numbers = [tokenizer.get(name) for name in ("channels", "spatial_stride", "time_stride")]
        if not isinstance(tokenizer.get("digest"), str) or not all(
            isinstance(number, int) and number > 0 for number in numbers
        ):
            yield f"tokenizer {tokenizer} needs digest, channels, spatial_stride and time_stride"
            return
        space, time = tokenizer["spatial_stride"], tokenizer["time_stride"]
        if self.height % space or self.width % space:
            yield f"size {self.width}x{self.height} is not divisible by the spatial stride {space}"
        for sample in self.samples():
            if (sample.frames - 1) % time:
                yield f"sample {sample.key!r}: {sample.frames} frames are not 1 + n * time stride {time}"

    @cached_property
    def digest(self) -> str:
        """Short hash of what identifies the data; who made it, its name and its options do not count."""
        content = to_mapping(self)
        for label in ("name", "created_by", "options", "quarantined"):
            del content[label]
        return digest(content)

    def samples(self, split: str | None = None) -> tuple[Sample, ...]:
        """Samples of a split (or of all) in shard order."""
        if split is not None and split not in SPLITS:
            raise DataError("split", where=self.name, got=repr(split), expected=" or ".join(SPLITS))
        return tuple(
            sample for shard in self.shards if split in (None, shard.split) for sample in shard.samples
        )

    def contract(self, embodiment: str) -> ActionContract:
        """The action contract of an embodiment, by name."""
        return self.contracts[self.embodiment_index(embodiment)]

    def embodiment_index(self, embodiment: str) -> int:
        """Position of an embodiment in `contracts`: the number that batches carry."""
        for index, contract in enumerate(self.contracts):
            if contract.embodiment == embodiment:
                return index
        raise ContractError(
            f"embodiment {embodiment!r} in dataset {self.name!r}",
            got="no such embodiment",
            expected=" or ".join(repr(contract.embodiment) for contract in self.contracts),
        )

    def write(self, directory: Path | str) -> Path:
        """Write `manifest.json` so that it is there whole or not at all; returns its path."""
        path = Path(directory) / MANIFEST
        first = {"schema_version": self.schema_version, "digest": self.digest}
        text = json.dumps(first | to_mapping(self), indent=1, ensure_ascii=False)
        write_atomic(path, text.encode() + b"\n")
        return path

    @classmethod
    def read(cls, location: Path | str) -> "Manifest":
        """Read `manifest.json` of a dataset's folder or URL (or the file itself).

        Raises DataError when it is missing, not JSON, of another schema version, or changed by hand.
        """
        path: Path | str = Path(location)
        path = path if path.name == MANIFEST else path / MANIFEST
        path = url_of(path) or path
        loaded = _load_json(path)
        version = loaded.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                "schema version",
                where=path,
                got=version,
                expected=SCHEMA_VERSION,
                fix="convert the source again with this vidworld, or install the vidworld that wrote it",
            )
        written = loaded.pop("digest", None)
        try:
            manifest = from_mapping(cls, loaded, where=path)
        except DataError:
            raise
        except ConfigError as error:
            raise DataError(str(error), fix="run vidworld shard again") from None
        if written != manifest.digest:
            raise DataError(
                "the manifest does not match its own digest, it was edited by hand or damaged",
                where=path,
                got=manifest.digest,
                expected=written,
                fix="run vidworld shard again",
            )
        return manifest


def _load_json(path: Path | str) -> dict[str, Any]:
    content = _content(path)
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "not valid JSON", where=path, got=str(error), fix="run vidworld shard again"
        ) from None
    if not isinstance(loaded, Mapping):
        raise DataError("manifest", where=path, got=type(loaded).__name__, expected="a mapping")
    return dict(loaded)


def _content(path: Path | str) -> bytes:
    unfinished = "conversion unfinished? run vidworld shard again"
    if isinstance(path, str):
        try:
            return Cache.of_environment().manifest(path)
        except MissingFileError as error:
            where = shown(path).removesuffix(f"/{MANIFEST}")
            what = "no such bucket" if "bucket" in error.what else f"no {MANIFEST}"
            raise DataError(what, where=where, fix=None if "bucket" in error.what else unfinished) from None
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise DataError("no such dataset directory", where=path.parent) from None
        raise DataError(f"no {MANIFEST}", where=path.parent, fix=unfinished) from None
    except OSError as error:
        raise DataError("cannot read the manifest", where=path, got=error.strerror) from None


def _shard_problems(shard: Shard, embodiments: set[str]) -> Iterable[str]:
    parts = PurePosixPath(shard.file).parts
    if not parts or ".." in parts or shard.file.startswith("/") or "\\" in shard.file:
        yield f"shard path {shard.file!r} must lie inside the dataset"
    if shard.split not in SPLITS:
        yield f"split {shard.split!r} of shard {shard.file!r} is none of {', '.join(SPLITS)}"
    if not shard.samples:
        yield f"shard {shard.file!r} holds no samples"
    for sample in shard.samples:
        if not NAME_PATTERN.fullmatch(sample.key):
            yield f"sample key {sample.key!r} may hold 1 to 64 letters, digits, '-' and '_' only"
        if sample.frames < 1:
            yield f"sample {sample.key!r} has {sample.frames} frames"
        if sample.embodiment not in embodiments:
            yield f"sample {sample.key!r} is of embodiment {sample.embodiment!r}, which has no contract"


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
