"""Write an edited dataset: what need not change is copied byte for byte, the rest is made anew.

Shards are staged and published as a conversion's are, see `vidworld.data.staging`: interrupted work
continues, the manifest comes last, and repeated work gives the same bytes.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vidworld import __version__, media
from vidworld.contract import ActionContract, warn_constant
from vidworld.data.deliver import local_output
from vidworld.data.edit_plan import Edit, Take, identity
from vidworld.data.manifest import SPLITS, Manifest, Quarantined, Sample, Shard
from vidworld.data.measure import measure_contracts
from vidworld.data.pool import num_cores, results
from vidworld.data.prepare import Prepared
from vidworld.data.resample import decimation, resample_actions, resampling_note, unknown_kind
from vidworld.data.shards import (
    ShardDataset,
    ShardWriter,
    json_bytes,
    latents_member,
    npy_bytes,
    video_member,
)
from vidworld.data.staging import SHARDS, Group, Staging, existing, locked
from vidworld.data.video import JPEG_QUANTIZER, decode_video, encode_video
from vidworld.errors import ConfigError, DataError, require
from vidworld.files import url_of
from vidworld.types import EmbodimentSpec


def write_edit(
    edit: Edit,
    datasets: Sequence[ShardDataset],
    out: Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
) -> tuple[Manifest, bool]:
    """Make the edited dataset in a folder or at a URL; the manifest, and whether anything had to be done.

    Raises ConfigError when the directory holds something else, DataError for a damaged source or a full disk,
    ContractError or DataError for actions that have no meaning at the new rate.
    """
    require("webdataset", "train")
    for dataset in datasets:
        if _same_place(dataset.directory, out):
            raise ConfigError("--out is a source", got=dataset.directory, fix="choose another directory")
    with local_output(out, overwrite=overwrite) as folder:
        return _write(edit, datasets, folder, overwrite, workers)


def _write(
    edit: Edit, datasets: Sequence[ShardDataset], out: Path, overwrite: bool, workers: int | None
) -> tuple[Manifest, bool]:
    work = EditWork(edit, tuple(datasets))
    work.check()
    made_of = identity(edit, datasets)
    first = datasets[0].manifest
    with locked(out):
        if not overwrite and (manifest := existing(out, made_of)):
            return manifest, False
        staging = Staging(out, made_of, overwrite=overwrite)
        shards = _write_shards(edit, work, staging, workers)
        manifest = Manifest(
            kind=first.kind,
            name=edit.name,
            fps=edit.fps,
            height=edit.height,
            width=edit.width,
            views=edit.views,
            contracts=_contracts(edit, datasets, shards, staging),
            shards=tuple(shards),
            quarantined=edit.quarantined,
            created_by=f"vidworld {__version__}",
            options=made_of,
            tokenizer=first.tokenizer,
        )
        staging.publish(manifest)
    return manifest, True


@dataclass(frozen=True)
class EditWork:
    """What a worker needs to make any episode of the result."""

    edit: Edit
    datasets: tuple[ShardDataset, ...]

    def check(self) -> None:
        """Refuse before any work what could only fail later."""
        for contract in self.edit.contracts:
            for dimension in contract.action if self._step(contract.rate_hz) > 1 else ():
                if dimension.kind == "unknown":
                    raise unknown_kind(dimension)
        for take in self.edit.takes:
            fps = self.datasets[take.source].manifest.fps
            if -(-take.sample.frames // self._step(fps)) < 2:
                raise DataError(
                    f"frames of sample {take.sample.key!r} at {self.edit.fps:g} fps",
                    got=1,
                    expected="at least 2",
                    fix="leave it out first: vidworld edit filter",
                )

    @cached_property
    def _takes(self) -> dict[str, Take]:
        return {take.key: take for take in self.edit.takes}

    @property
    def encodes(self) -> bool:
        """Whether videos are encoded anew, which takes time."""
        return any(self._changes_video(dataset.manifest) for dataset in self.datasets)

    def run(self, episode_id: str) -> Prepared | Quarantined:
        """Make the episode that will have this key. Raises DataError for a damaged source."""
        take = self._takes[episode_id]
        dataset = self.datasets[take.source]
        manifest = dataset.manifest
        members = dataset.members(take.sample.key)
        member = video_member if manifest.kind == "video" else latents_member
        for view in set(manifest.views) - set(self.edit.views):
            del members[member(view)]
        step = self._step(manifest.fps)
        if self._changes_video(manifest):
            for view in self.edit.views:
                members[video_member(view)] = self._encoded(members[video_member(view)], take, step)
        frames = -(-take.sample.frames // step)
        if step > 1:
            members |= self._rows(take, step)
        changed = {"frames": frames, "fps": self.edit.fps} if step > 1 else {}
        if self.edit.views != manifest.views:
            changed["views"] = list(self.edit.views)
        if changed:
            members["meta.json"] = _with(members["meta.json"], changed, step)
        return Prepared(take.key, members, frames, take.sample.embodiment, take.sample.text)

    def _step(self, fps: float) -> int:
        return decimation(fps, self.edit.fps)

    def _changes_video(self, manifest: Manifest) -> bool:
        size = (manifest.height, manifest.width) != (self.edit.height, self.edit.width)
        return size or self._step(manifest.fps) > 1 or self.edit.quantizer is not None

    def _encoded(self, content: bytes, take: Take, step: int) -> bytes:
        frames_THWC = decode_video(content, num_frames=take.sample.frames)[::step]
        fitted = media.fit(frames_THWC, width=self.edit.width, height=self.edit.height, mode=self.edit.fit)
        return encode_video(iter(fitted), self.edit.fps, quantizer=self.edit.quantizer or JPEG_QUANTIZER)

    def _rows(self, take: Take, step: int) -> dict[str, bytes]:
        dataset = self.datasets[take.source]
        tables = dataset.read_clip(take.sample.key, 0, take.sample.frames, pictures=False)
        contract = dataset.manifest.contract(take.sample.embodiment)
        actions_TA = resample_actions(tables.actions_TA, contract.action, step, contract.control_frame)
        return {
            "actions.npy": npy_bytes(actions_TA.astype(np.float32)),
            "proprio.npy": npy_bytes(tables.proprio_TS[::step]),
            "timestamps.npy": npy_bytes(tables.timestamps_T[::step]),
        }


def _with(content: bytes, changed: dict[str, Any], step: int) -> bytes:
    """`meta.json` with some fields changed where it has them, and what was done to its rate."""
    meta = json.loads(content)
    meta |= {name: value for name, value in changed.items() if name in meta}
    source = meta.get("source")
    if step > 1 and isinstance(source, dict):
        meta["source"] = {**source, "decimation": step * int(source.get("decimation", 1))}
    return json_bytes(meta)


def _write_shards(edit: Edit, work: EditWork, staging: Staging, workers: int | None) -> list[Shard]:
    """Make the episodes that no earlier run finished; all shards, in order."""
    planned = {split: edit.of_split(split) for split in SPLITS}
    keys = {split: tuple(take.key for take in takes) for split, takes in planned.items()}
    groups = {split: staging.finished(split, keys[split]) for split in SPLITS}
    done = {split: sum(len(group.episodes) for group in found) for split, found in groups.items()}
    pending = [key for split in SPLITS for key in keys[split][done[split] :]]
    # Copying waits for the disk, not for a processor, and each worker would check the shards again.
    workers = min(workers or num_cores(), max(len(pending), 1)) if work.encodes else 1
    with (
        results(work, pending, workers) as stream,
        tqdm(total=len(edit.takes), initial=sum(done.values()), unit="episode", disable=None) as bar,
    ):
        for split in SPLITS:
            left = planned[split][done[split] :]
            while left:
                group = _write_group(len(groups[split]), left, stream, edit, staging, bar)
                groups[split].append(group)
                left = left[len(group.episodes) :]
    return [group.shard for split in SPLITS for group in groups[split] if group.shard]


def _write_group(
    index: int,
    planned: Sequence[Take],
    stream: Iterator[Prepared | Quarantined],
    edit: Edit,
    staging: Staging,
    bar: "tqdm[Any]",
) -> Group:
    """Write the next episodes until a shard is full or the split ends."""
    split, size = planned[0].split, 0.0
    path = staging.tar(split, index)
    samples: list[Sample] = []
    with ShardWriter(path) as writer:
        while len(samples) < min(len(planned), edit.episodes_per_shard) and size < edit.shard_mb * 1e6:
            take, made = planned[len(samples)], next(stream)
            assert isinstance(made, Prepared)
            assert made.episode_id == take.key
            writer.add(take.key, made.members)
            samples.append(dataclasses.replace(take.sample, key=take.key, frames=made.frames))
            size += sum(map(len, made.members.values()))
            bar.update()
    shard = Shard(f"{SHARDS}/{path.name}", writer.sha256, writer.bytes, split, tuple(samples))
    group = Group(split, tuple(sample.key for sample in samples), quarantined=(), shard=shard)
    staging.finish(index, group)
    return group


def _contracts(
    edit: Edit, datasets: Sequence[ShardDataset], shards: Sequence[Shard], staging: Staging
) -> tuple[ActionContract, ...]:
    """Contracts with statistics of the new train split; of a robot that is only held out, those it had."""
    trained = {sample.embodiment for shard in shards if shard.split == "train" for sample in shard.samples}
    present = {sample.embodiment for shard in shards for sample in shard.samples}
    specs = {c.embodiment: _spec(edit, c) for c in edit.contracts if c.embodiment in trained}
    pairs = [(shard, path) for shard in shards if (path := staging.locate(shard)) is not None]
    assert len(pairs) == len(shards)
    measured = {c.embodiment: c for c in measure_contracts(tuple(specs.values()), edit.fps, pairs)}
    contracts = []
    for contract in edit.contracts:
        name = contract.embodiment
        if name in measured:
            warn_constant(measured[name])
            contracts.append(measured[name])
        elif name in present:
            _require_one_contract(name, edit, datasets)
            warnings.warn(
                f"embodiment {name!r} has no episode to train on here: its statistics stay those it had",
                stacklevel=2,
            )
            contracts.append(contract)
    return tuple(contracts)


def _spec(edit: Edit, contract: ActionContract) -> EmbodimentSpec:
    """A contract without its statistics, at the new rate."""
    spec = EmbodimentSpec(
        embodiment=contract.embodiment,
        rate_hz=edit.fps,
        action=contract.action,
        proprio=contract.proprio,
        control_frame=contract.control_frame,
        note=contract.note,
    )
    if decimation(contract.rate_hz, edit.fps) == 1:
        return spec
    notes = dict.fromkeys(filter(None, (*contract.note.split("; "), resampling_note(spec))))
    return dataclasses.replace(spec, note="; ".join(notes))


def _require_one_contract(name: str, edit: Edit, datasets: Sequence[ShardDataset]) -> None:
    known = {
        contract.digest
        for dataset in datasets
        for contract in dataset.manifest.contracts
        if contract.embodiment == name
    }
    rates = {dataset.manifest.fps for dataset in datasets}
    if len(known) > 1 or rates != {edit.fps}:
        raise DataError(
            f"embodiment {name!r} has no episode to train on",
            got="held-out episodes only, of several contracts or at another rate",
            fix="keep some of its training episodes",
        )


def _same_place(source: Path | str, out: Path) -> bool:
    urls = url_of(source), url_of(out)
    if urls != (None, None):
        return urls[0] == urls[1]
    return Path(source).resolve() == out.resolve()
