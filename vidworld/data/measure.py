"""Measure the statistics of action contracts from what was written, so that a resumed run gets the same."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vidworld.contract import ActionContract, Statistics
from vidworld.data.manifest import Shard
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec


def measure_contracts(
    specs: Sequence[EmbodimentSpec], fps: float, shards: Sequence[tuple[Shard, Path]]
) -> tuple[ActionContract, ...]:
    """Contracts of the embodiments that occur, with statistics over all rows of the train split.

    `shards` pairs each shard with where its tar is now.
    Raises DataError for an embodiment that occurs only in the val split.
    """
    rows: dict[tuple[str, str], list[np.ndarray]] = {}
    for shard, path in shards:
        if shard.split == "train":
            for embodiment, suffix, values in _tables(shard, path):
                rows.setdefault((embodiment, suffix), []).append(values)
    present = {sample.embodiment for shard, _ in shards for sample in shard.samples}
    contracts = []
    for spec in specs:
        if spec.embodiment not in present:
            continue
        if (spec.embodiment, "actions.npy") not in rows:
            raise DataError(
                f"embodiment {spec.embodiment!r} has no episode to train on",
                got="held-out episodes only",
                fix="choose others with --val-episodes",
            )
        contracts.append(
            ActionContract(
                embodiment=spec.embodiment,
                rate_hz=fps,
                action=spec.action,
                proprio=spec.proprio,
                action_statistics=Statistics.of(np.concatenate(rows[spec.embodiment, "actions.npy"])),
                proprio_statistics=Statistics.of(np.concatenate(rows[spec.embodiment, "proprio.npy"])),
                control_frame=spec.control_frame,
                note=spec.note,
            )
        )
    return tuple(contracts)


def _tables(shard: Shard, path: Path) -> list[tuple[str, str, np.ndarray]]:
    """(embodiment, member suffix, values) of the small tables in a tar."""
    embodiment = {sample.key: sample.embodiment for sample in shard.samples}
    found = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix in ("actions.npy", "proprio.npy"):
                file = tar.extractfile(member)
                assert file is not None
                found.append((embodiment[key], suffix, np.load(io.BytesIO(file.read()), allow_pickle=False)))
    return found
