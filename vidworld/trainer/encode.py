"""Turn video shards into latent shards: `vidworld encode DATA --tokenizer RUN --out DIR`.

One latent shard a video shard, with the same keys, splits, actions, proprioception and meta. Interrupted work
keeps every finished shard; the manifest is written last. Repeated on the same device, the bytes are the same,
whatever the number of processes. Nothing is augmented: latents are those of the recorded frames.
"""

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse
from vidworld.data.manifest import MANIFEST, SPLITS, Manifest, Shard
from vidworld.data.shards import ShardDataset
from vidworld.data.staging import Staging, existing, locked
from vidworld.errors import ConfigError, DataError, require
from vidworld.files import require_local
from vidworld.tokenizers.base import ChannelStatistics, Tokenizer, check_size, to_unit_range, usable_frames
from vidworld.tokenizers.pretrained import DType, PretrainedTokenizer
from vidworld.tokenizers.store import FOLDER, load_tokenizer, restore_statistics, save_tokenizer
from vidworld.trainer.encode_processes import encode_shards
from vidworld.trainer.encode_shards import BATCH_FRAMES, repeatable, write_shards

ENCODER = 1
"""Raised when the same video and tokenizer would give other latents."""
STATISTICS_EPISODES = 64
STATISTICS_LATENTS = 9
"""Latent frames of an episode that the statistics of a pretrained tokenizer are measured on."""
MEAN_ALARM, STD_ALARM = 1.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn video shards into latent shards."""

    data: tyro.conf.Positional[Path]
    """Dataset of video shards, as `vidworld shard` writes it."""
    tokenizer: Path
    """Run that trained a tokenizer, the tokenizer's folder, or a diffusers autoencoder's."""
    out: Path
    """Directory of the latent dataset."""
    processes: int = 1
    """Shards that are encoded side by side, each by a process; with several GPUs they are shared out."""
    batch_frames: int = BATCH_FRAMES
    """Frames that the tokenizer encodes at once."""
    dtype: DType = "float32"
    """Precision of the weights of a diffusers autoencoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if there is one."""
    overwrite: bool = False
    """Replace latents that were made of other video or by another tokenizer."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld encode`."""
    options = parse(Options, arguments, prog=prog)
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            "vidworld encode under a launcher",
            got=f"{ranks} ranks",
            fix=f"run it once, with --processes {ranks}: it starts its own and shares out the GPUs",
        )
    require_local(options.out, "--out")
    tokenizer = load_tokenizer(options.tokenizer, dtype=options.dtype)
    assert isinstance(tokenizer, nn.Module)
    tokenizer.to(_device(options.device))
    work = Work()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        manifest = encode_dataset(
            options.data,
            tokenizer,
            options.out,
            batch_frames=options.batch_frames,
            processes=options.processes,
            overwrite=options.overwrite,
            work=work,
        )
        statistics = latent_statistics(options.out)
    for warning in caught:
        print(f"{prog}: warning: {warning.message}", file=sys.stderr)
    mean_C, std_C = statistics.mean_C, statistics.std_C
    frames = sum(sample.frames for sample in manifest.samples())
    print(
        f"{len(manifest.samples())} episodes, {frames} frames of {', '.join(manifest.views)}; channel means "
        f"{mean_C.min():.2f} to {mean_C.max():.2f}, deviations {std_C.min():.2f} to {std_C.max():.2f}"
    )
    print(work.report())
    given = options.out if isinstance(tokenizer, PretrainedTokenizer) else options.tokenizer
    print(
        f"{options.out}: done; next: set `data: {options.out}` and `tokenizer: {given}` in a world config "
        "and run vidworld train"
    )


@dataclass
class Work:
    """What an encoding took, filled in while it runs."""

    frames: int = 0
    """Camera frames of all views that were encoded now, not in an earlier run."""
    seconds: float = 0.0
    processes: int = 1
    bytes_in: int = 0
    bytes_out: int = 0

    def report(self) -> str:
        """Storage and speed in a line."""
        share = self.bytes_out / max(self.bytes_in, 1)
        line = f"video {self.bytes_in / 1e6:.1f} MB, latents {self.bytes_out / 1e6:.1f} MB ({share:.2f} x)"
        if not self.frames:
            return f"{line}; all was here already"
        rate = self.frames / max(self.seconds, 1e-9)
        return f"{line}; {rate:.0f} frames/s in {self.processes} process(es), reading and writing included"


def encode_dataset(
    dataset_dir: Path | str,
    tokenizer: Tokenizer,
    out_dir: Path | str,
    *,
    batch_frames: int = BATCH_FRAMES,
    processes: int = 1,
    overwrite: bool = False,
    progress: bool | None = None,
    work: Work | None = None,
) -> Manifest:
    """Encode a video dataset on the device where the tokenizer is, and return the manifest of the latents.

    Does nothing when the directory already holds them, and continues what was interrupted. With a time stride
    k, each episode loses the frames at its end that make no whole latent frame. The spread of a pretrained
    tokenizer's latents is measured first if its config does not say it; with the latents goes a
    `tokenizer/` that names it. `progress`: show a bar; by default where there is a terminal. `work` is filled
    in. Warns when the latents are far from mean 0 and deviation 1.

    Raises DataError for a dataset that holds no video or is damaged, or frames that the tokenizer cannot
    take; ConfigError when the directory holds something else.
    """
    require("webdataset", "train")
    out = Path(out_dir)
    dataset = ShardDataset.open(dataset_dir)
    source = dataset.manifest
    _check(dataset, tokenizer, out, batch_frames, processes)
    work = work or Work()
    work.processes = processes
    work.bytes_in = sum(shard.bytes for shard in source.shards)
    with locked(out):
        _know_statistics(tokenizer, dataset, None if overwrite else out / FOLDER)
        identity = {
            "encoder": ENCODER,
            "source": source.name,
            "source_fingerprint": source.digest,
            "tokenizer": tokenizer.digest,
        }
        if not overwrite and (manifest := existing(out, identity)):
            work.bytes_out = sum(shard.bytes for shard in manifest.shards)
            return manifest
        staging = Staging(out, identity, overwrite=overwrite)
        if isinstance(tokenizer, PretrainedTokenizer):
            save_tokenizer(tokenizer, out / FOLDER)
        began = time.perf_counter()
        shards = _write_shards(dataset, tokenizer, staging, batch_frames, progress, work)
        work.seconds = time.perf_counter() - began
        work.bytes_out = sum(shard.bytes for shard in shards)
        manifest = dataclasses.replace(
            source,
            kind="latents",
            shards=tuple(shards),
            created_by=f"vidworld {__version__}",
            options=identity,
            tokenizer={
                "digest": tokenizer.digest,
                "channels": tokenizer.latent_channels,
                "spatial_stride": tokenizer.spatial_stride,
                "time_stride": tokenizer.time_stride,
            },
        )
        staging.publish(manifest)
    _warn_unnormalised(latent_statistics(out))
    return manifest


def latent_statistics(latents_dir: Path | str) -> ChannelStatistics:
    """Mean and deviation of each channel over training episodes, at most 64 of them spread evenly."""
    dataset = ShardDataset.open(latents_dir, verify=False)
    if dataset.manifest.tokenizer is None:
        raise DataError("kind of dataset", where=latents_dir, got=dataset.manifest.kind, expected="latents")
    samples = dataset.manifest.samples("train")
    statistics = ChannelStatistics(int(dataset.manifest.tokenizer["channels"]))
    for sample in samples[:: -(-len(samples) // STATISTICS_EPISODES) or 1]:
        latents = dataset.read(sample.key).latents
        assert latents is not None
        for latents_TChw in latents.values():
            statistics.update(torch.from_numpy(latents_TChw))
    return statistics


def _know_statistics(tokenizer: Tokenizer, dataset: ShardDataset, before: Path | None) -> None:
    """Measure the latents of a pretrained tokenizer whose config does not say how they are spread.

    `before`: where an interrupted run left what it measured.
    """
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.statistics_from != "nowhere":
        return
    if before is not None and restore_statistics(tokenizer, before):
        return
    device = next(tokenizer.parameters()).device
    samples = dataset.manifest.samples("train")

    def videos() -> Iterator[torch.Tensor]:
        for sample in samples[:: -(-len(samples) // STATISTICS_EPISODES) or 1]:
            frames = usable_frames(sample.frames, tokenizer.time_stride)
            frames = min(frames, 1 + (STATISTICS_LATENTS - 1) * tokenizer.time_stride)
            for video_THWC in (dataset.read_clip(sample.key, 0, frames).video or {}).values():
                yield to_unit_range(torch.from_numpy(video_THWC).to(device).movedim(-1, -3)[None])

    with repeatable():
        tokenizer.measure_statistics(videos())


def _check(dataset: ShardDataset, tokenizer: Tokenizer, out: Path, batch_frames: int, processes: int) -> None:
    """Refuse before any work what could only fail later."""
    manifest = dataset.manifest
    if manifest.kind != "video":
        raise DataError(
            "dataset to encode",
            where=dataset.directory,
            got=manifest.kind,
            expected="video",
            fix="give the dataset that vidworld shard wrote",
        )
    for name, value in (("--batch-frames", batch_frames), ("--processes", processes)):
        if value < 1:
            raise ConfigError(name, got=value, expected="at least 1")
    check_size(manifest.height, manifest.width, tokenizer.size_multiple)
    # Even --overwrite must not cost anyone the video.
    if (out / MANIFEST).is_file() and _kind(out) == "video":
        raise ConfigError(
            "--out holds a video dataset", got=out, fix="choose another directory for the latents"
        )


def _kind(directory: Path) -> str | None:
    try:
        return Manifest.read(directory).kind
    except DataError:
        return None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", got=name, expected="cpu: no GPU is available here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _write_shards(
    dataset: ShardDataset,
    tokenizer: Tokenizer,
    staging: Staging,
    batch_frames: int,
    progress: bool | None,
    work: Work,
) -> list[Shard]:
    """Encode the shards that no earlier run finished; returns all, in the order of the source."""
    done: dict[str, Shard] = {}
    todo: list[tuple[int, Shard]] = []
    for split in SPLITS:
        for index, shard in enumerate(shard for shard in dataset.manifest.shards if shard.split == split):
            group = staging.finished_at(split, index)
            if group is not None and group.episodes == tuple(sample.key for sample in shard.samples):
                assert group.shard is not None
                done[shard.file] = group.shard
            else:
                todo.append((index, shard))
    total = sum(sample.frames for sample in dataset.manifest.samples())
    left = sum(sample.frames for _, shard in todo for sample in shard.samples)
    work.frames = left * len(dataset.manifest.views)
    disable = None if progress is None else not progress
    with tqdm(total=total, initial=total - left, unit="frame", desc="encode", disable=disable) as bar:
        if work.processes > 1 and len(todo) > 1:
            done |= encode_shards(
                Path(dataset.directory), tokenizer, staging, todo, batch_frames, work.processes, bar.update
            )
        else:
            done |= write_shards(dataset, tokenizer, staging, todo, batch_frames, bar.update)
    return [done[shard.file] for shard in dataset.manifest.shards]


def _warn_unnormalised(statistics: ChannelStatistics) -> None:
    """A normaliser that is silently inert ruins the world model: say so."""
    worst_mean = float(statistics.mean_C.abs().max())
    low, high = float(statistics.std_C.min()), float(statistics.std_C.max())
    if worst_mean > MEAN_ALARM or low < 1 / STD_ALARM or high > STD_ALARM:
        warnings.warn(
            f"latent channels have means up to {worst_mean:.2f} and deviations {low:.2f} to {high:.2f}, not "
            "0 and 1: was the tokenizer trained on other data, or its statistics never measured?",
            stacklevel=3,
        )
