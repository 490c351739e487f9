"""RLDS datasets as TensorFlow Datasets writes them: Open X-Embodiment, DROID, BridgeData. No TensorFlow.

    <version>/dataset_info.json, features.json, <name>-<split>.tfrecord-00000-of-00012

`features.json` says which fields there are, their shapes and encodings; one record is one episode, with all
steps of a field in one list. Cameras are the RGB picture features of `observation`. Paths of fields here and
in `logs.yaml` leave out the leading `steps/`.

What RLDS does not store: the rate (known for datasets in `rlds_cards`, else 0, and a contract file says it),
and a clock, so timestamps are step / rate. Action and state are those of the dataset's card; else `action`
or `action_dict`, and `observation/state` or every short vector of `observation`.

Converters fill missing cameras with black pictures, and the flags that should say so are not reliable. A
camera that is black in every episode looked at is therefore left out with a warning, unless `logs.yaml` asks
for it, and each episode names in its `source` which of its views are black.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.config import digest, to_mapping
from vidworld.contract import Dimension
from vidworld.data.sources.log_facts import (
    LogFacts,
    join_dimensions,
    read_facts,
    wanted_views,
)
from vidworld.data.sources.naming import view_name
from vidworld.data.sources.picture import decode_picture
from vidworld.data.sources.rlds_cards import card_of, rate_of
from vidworld.data.sources.rlds_features import Feature, read_features, read_json
from vidworld.data.sources.rlds_shards import INFO, Shard, list_shards, locate
from vidworld.data.sources.tfrecord import Value, parse_example, read_record
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode, Video

FEATURES = "features.json"
PROBES = 8
"""Episodes looked at to tell whether a camera is always black."""
DARK = 8
"""A picture without any value above this is black; JPEG may add a little noise to zeros."""
WIDEST_STATE = 64
"""Longer vectors of `observation` are embeddings, not the state of a robot."""
MAX_STEPS = 2**22


class RldsSource:
    """One version folder of an RLDS dataset.

    Episode ids are `train_000027`: split and position in the order of its shards, which the counts in
    dataset_info.json fix even when some of the shards are not here. `fps` overrides the rate.
    """

    def __init__(self, root: Path | str, *, fps: float | None = None) -> None:
        self.root = Path(root)
        self._facts: LogFacts = read_facts(self.root)
        self._info = read_json(self.root / INFO)
        self._features = read_features(self.root / FEATURES)
        self._fps = fps or rate_of(self.name)
        card = card_of(self.name)
        # A dataset of that name with other fields is another dataset.
        fits = card is not None and all(path in self._features for path in (*card.action, *card.state))
        self._card = card if fits else None
        self._pictures = _picture_fields(self._features)
        if not self._pictures:
            raise DataError("no RGB camera in `observation`", where=self.root / FEATURES)
        self._action = self._chosen(self._facts.action, self._card and self._card.action, "action")
        self._state = self._chosen(self._facts.state, self._card and self._card.state, "state")
        if not self._action:
            raise DataError("no action", where=self.root / FEATURES, fix="name its fields in logs.yaml")

    @classmethod
    def detects(cls, path: Path) -> bool:
        """Whether a folder is the version folder of an RLDS dataset."""
        return (path / INFO).is_file() and (path / FEATURES).is_file()

    @property
    def name(self) -> str:
        """The name in dataset_info.json."""
        name = self._info.get("name")
        return name if isinstance(name, str) and name else self.root.resolve().parent.name

    @property
    def fps(self) -> float:
        """Steps a second, by the table of known datasets; with 0 a contract file or --fps must say it."""
        return float(self._fps or 0)

    @property
    def views(self) -> tuple[str, ...]:
        """Cameras by the last part of their name, sorted; those that are always black are left out."""
        return tuple(self._cameras)

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """Of the dataset's card, if there is one; else names only, with unknown units and kinds."""
        card = self._card
        return (
            EmbodimentSpec(
                embodiment=card.embodiment if card else self.name,
                rate_hz=self.fps,
                action=self._dimensions(self._action),
                proprio=self._dimensions(self._state),
                control_frame=card.control_frame if card and self._action == card.action else "unknown",
                note=card.note if card else "",
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the names and sizes of all files, and of `logs.yaml`."""
        files = [shard.path for shard in self._shards if shard.path.is_file()]
        sizes = [
            [path.name, path.stat().st_size] for path in (self.root / FEATURES, self.root / INFO, *files)
        ]
        return digest([*sizes, to_mapping(self._facts), self._fps])

    def episode_ids(self) -> list[str]:
        """Every episode that the files here should hold; they are opened only if their counts are unknown."""
        return [
            f"{shard.split}_{shard.first + index:06d}"
            for shard in self._shards
            if shard.path.is_file()
            for index in range(shard.episodes)
        ]

    def read(self, episode_id: str) -> Episode:
        """Read the record of an episode into memory; its pictures are decoded later."""
        shard, index = locate(self._shards, episode_id)
        values, where = self._record(shard, index)
        length = self._length(values, where)
        pictures = {view: self._encoded(values, path, length, where) for view, path in self._cameras.items()}
        black = [view for view, encoded in pictures.items() if _is_dark(encoded, where)]
        fps = self.fps
        return Episode(
            episode_id=episode_id,
            embodiment=self.embodiments[0].embodiment,
            fps=fps,
            views={
                view: Video(length, partial(_decode, encoded, self._cameras[view], where, self._facts))
                for view, encoded in pictures.items()
            },
            actions_TA=self._rows(values, self._action, length, where),
            proprio_TS=self._rows(values, self._state, length, where),
            timestamps_T=np.arange(length) / (fps or 1),
            text=self._text(values),
            outcome=_outcome(values),
            source={
                "format": "RLDS",
                "split": shard.split,
                "shard": shard.path.name,
                "record": index,
                "complete": bool(_last(values, "is_last")),
                "timestamps": "step / rate: RLDS has no clock",
                "action": list(self._action),
                "state": list(self._state),
                **({"black_views": black} if black else {}),
                **({"left_out_black": self._always_black} if self._always_black else {}),
                **self._facts.changes(),
                **_metadata(values),
            },
        )

    def _chosen(self, asked: tuple[str, ...], card: tuple[str, ...] | None, role: str) -> tuple[str, ...]:
        """Fields that make up a role: those that `logs.yaml` names, else the card's or a general rule's."""
        if not asked and card is not None:
            return card
        if not asked:
            return tuple(_actions(self._features) if role == "action" else _states(self._features))
        for path in asked:
            if path not in self._features or self._features[path].kind != "numbers":
                raise ConfigError(
                    role,
                    where=self.root / "logs.yaml",
                    got=path,
                    expected=", ".join(p for p, f in self._features.items() if f.kind == "numbers"),
                )
        return asked

    def _dimensions(self, fields: tuple[str, ...]) -> tuple[Dimension, ...]:
        widths = {path: math.prod(self._features[path].shape) for path in fields}
        return join_dimensions(widths, self._card.dimensions if self._card else {})

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        return list_shards(self.root, self._info, self.name)

    @cached_property
    def _cameras(self) -> dict[str, str]:
        """View -> field, without cameras that are black wherever one looks, unless asked for."""
        if self._facts.views:
            return {v: self._pictures[v] for v in wanted_views(tuple(self._pictures), self._facts, self.root)}
        if black := self._always_black:
            probed = min(PROBES, len(self.episode_ids()))
            warnings.warn(
                f"{self.root}: {', '.join(black)} left out, black in all {probed} episodes looked at; "
                "`views` in logs.yaml can ask for it",
                stacklevel=2,
            )
        kept = {view: path for view, path in self._pictures.items() if view not in black}
        if not kept:
            raise DataError("every camera is black", where=self.root, got=", ".join(self._pictures))
        return kept

    @cached_property
    def _always_black(self) -> list[str]:
        """Cameras that are black in every episode looked at; one camera alone is never judged."""
        if self._facts.views or len(self._pictures) == 1:
            return []
        ids = self.episode_ids()
        lit: set[str] = set()
        readable = False
        for position in np.unique(np.linspace(0, max(len(ids) - 1, 0), min(PROBES, len(ids))).astype(int)):
            try:
                shard, index = locate(self._shards, ids[position])
                values, where = self._record(shard, index)
                length = self._length(values, where)
                for view, path in self._pictures.items():
                    if not _is_dark(self._encoded(values, path, length, where), where):
                        lit.add(view)
                readable = True
            except (DataError, IndexError):
                # A damaged episode is named when it is converted; another one can be looked at.
                continue
        return [view for view in self._pictures if view not in lit] if readable else []

    def _record(self, shard: Shard, index: int) -> tuple[dict[str, Value], str]:
        """Fields of a record without `steps/`, and where it is."""
        span = shard.span(index)
        where = f"{shard.path}, record {index}"
        try:
            values = parse_example(read_record(shard.path, span))
        except DataError as error:
            raise error if error.where else DataError(error.what, where=where, got=error.got) from None
        return {key.removeprefix("steps/"): value for key, value in values.items()}, where

    def _length(self, values: Mapping[str, Value], where: str) -> int:
        """Steps of an episode, by its first action field; every other field must agree."""
        path = self._action[0]
        width = math.prod(self._features[path].shape)
        found = len(self._numbers(values, path, where))
        if found % max(width, 1) or found // max(width, 1) > MAX_STEPS:
            raise DataError(f"numbers of {path!r}", where=where, got=found, expected=f"{width} a step")
        return found // max(width, 1)

    def _numbers(self, values: Mapping[str, Value], path: str, where: str) -> np.ndarray:
        value, feature = values.get(path), self._features[path]
        if value is None:
            raise DataError(f"no field {path!r}", where=where)
        if isinstance(value, list):
            # `encoding: bytes` keeps each step's array as its own bytes.
            joined, dtype = b"".join(value), feature.dtype
            if dtype is None or feature.encoding != "bytes" or len(joined) % dtype.itemsize:
                raise DataError(f"field {path!r}", where=where, got="bytes", expected="numbers")
            return np.frombuffer(joined, dtype)
        return value

    def _rows(
        self, values: Mapping[str, Value], fields: tuple[str, ...], length: int, where: str
    ) -> np.ndarray:
        """Fields joined as float32 [T, D]."""
        columns = []
        for path in fields:
            width, numbers = math.prod(self._features[path].shape), self._numbers(values, path, where)
            if len(numbers) != length * width:
                raise DataError(
                    f"numbers of {path!r}", where=where, got=len(numbers), expected=f"{length} x {width}"
                )
            columns.append(numbers.reshape(length, width).astype(np.float32))
        return np.concatenate(columns, axis=1) if columns else np.zeros((length, 0), np.float32)

    def _encoded(self, values: Mapping[str, Value], path: str, length: int, where: str) -> list[memoryview]:
        """The encoded pictures of a camera, one a step."""
        pictures = values.get(path)
        if not isinstance(pictures, list):
            raise DataError(f"no pictures {path!r}", where=where)
        if len(pictures) != length:
            raise DataError(f"pictures of {path!r}", where=where, got=len(pictures), expected=length)
        return pictures

    def _text(self, values: Mapping[str, Value]) -> str:
        """The instruction; several that follow one another are joined, of alternatives the first counts."""
        for path, feature in self._features.items():
            texts = values.get(path)
            if feature.kind == "text" and "instruction" in path and isinstance(texts, list):
                seen = dict.fromkeys(bytes(text).decode(errors="replace").strip() for text in texts)
                if joined := "; ".join(text for text in seen if text):
                    return joined
        return ""


def _last(values: Mapping[str, Value], path: str) -> float | None:
    """The last number of a field, if it has any."""
    value = values.get(path)
    return float(value[-1]) if isinstance(value, np.ndarray) and len(value) else None


def _outcome(values: Mapping[str, Value]) -> dict[str, Any]:
    """The last reward; 1 is a success, and what less means is not told."""
    reward = _last(values, "reward")
    if reward is None:
        return {}
    return {"success": True, "reward": reward} if reward >= 1 else {"reward": reward}


def _picture_fields(features: Mapping[str, Feature]) -> dict[str, str]:
    """View -> field of every RGB camera; whole paths where last parts are alike."""
    paths = [path for path, feature in features.items() if feature.kind == "picture"]
    paths = [path for path in paths if path.startswith("observation/")]
    short = [view_name(path.rpartition("/")[2]) for path in paths]
    names = [
        name if short.count(name) == 1 else view_name(path.removeprefix("observation/"))
        for name, path in zip(short, paths, strict=True)
    ]
    return dict(sorted(zip(names, paths, strict=True)))


def _actions(features: Mapping[str, Feature]) -> list[str]:
    for name in ("action", "actions", "action_dict"):
        inside = [path for path in features if path == name or path.startswith(f"{name}/")]
        if found := [path for path in inside if features[path].kind == "numbers"]:
            return found
    return []


def _states(features: Mapping[str, Feature]) -> list[str]:
    for name in ("observation/state", "observation/proprio"):
        if name in features and features[name].kind == "numbers":
            return [name]
    return [
        path
        for path, feature in features.items()
        if path.startswith("observation/")
        and feature.kind == "numbers"
        and feature.dtype in (np.float16, np.float32, np.float64)
        and math.prod(feature.shape) <= WIDEST_STATE
        and not re.search("embedding|instruction", path)
    ]


def _is_dark(encoded: list[memoryview], where: str) -> bool:
    """Whether the first, middle and last picture of a camera are black."""
    places = sorted({0, len(encoded) // 2, len(encoded) - 1}) if encoded else []
    return all(decode_picture(encoded[place], f"picture {place}", where).max() <= DARK for place in places)


def _decode(encoded: list[memoryview], path: str, where: str, facts: LogFacts) -> Iterator[np.ndarray]:
    for step, content in enumerate(encoded):
        yield facts.upright(decode_picture(content, f"picture {step} of {path}", where))


def _metadata(values: Mapping[str, Value]) -> dict[str, Any]:
    """Facts of `episode_metadata` that are short: where the episode came from."""
    facts: dict[str, Any] = {}
    for name in ("file_path", "recording_folderpath", "episode_id"):
        value = values.get(f"episode_metadata/{name}")
        if isinstance(value, np.ndarray) and len(value) == 1:
            facts[name] = int(value[0])
        elif isinstance(value, list) and len(value) == 1:
            facts[name] = bytes(value[0]).decode(errors="replace")[:1000]
    return facts
