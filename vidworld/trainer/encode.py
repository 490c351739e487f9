"""Turn video shards into latent shards: `vidworld encode DATA --tokenizer RUN --out DIR`.

One latent shard a video shard, with the same keys, splits, actions, proprioception and meta. Interrupted work
continues at the shard that it had reached; the manifest is written last. Repeated on the same device, the
bytes are the same.
"""

import dataclasses
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse
from vidworld.data.manifest import MANIFEST, SPLITS, Manifest, Sample, Shard
from vidworld.data.shards import (
    EpisodeArrays,
    ShardDataset,
    ShardWriter,
    json_bytes,
    latents_member,
    npy_bytes,
)
from vidworld.data.staging import SHARDS, Group, Staging, existing, locked
from vidworld.errors import ConfigError, DataError, require
from vidworld.tokenizers.base import (
    ChannelStatistics,
    Tokenizer,
    check_size,
    num_latent_frames,
    to_unit_range,
    usable_frames,
)
from vidworld.tokenizers.store import load_tokenizer

ENCODER = 1
"""Raised when the same video and tokenizer would give other latents."""
BATCH_FRAMES = 256
READERS = 4
STATISTICS_EPISODES = 64
MEAN_ALARM, STD_ALARM = 1.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn video shards into latent shards."""

    data: tyro.conf.Positional[Path]
    """Dataset of video shards, as `vidworld shard` writes it."""
    tokenizer: Path
    """Run that trained a tokenizer, or the tokenizer's folder."""
    out: Path
    """Directory of the latent dataset."""
    batch_frames: int = BATCH_FRAMES
    """Frames that the tokenizer encodes at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if there is one."""
    overwrite: bool = False
    """Replace latents that were made of other video or by another tokenizer."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld encode`."""
    options = parse(Options, arguments, prog=prog)
    tokenizer = load_tokenizer(options.tokenizer)
    assert isinstance(tokenizer, nn.Module)
    tokenizer.to(_device(options.device))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        manifest = encode_dataset(
            options.data,
            tokenizer,
            options.out,
            batch_frames=options.batch_frames,
            overwrite=options.overwrite,
        )
        statistics = latent_statistics(options.out)
    for warning in caught:
        print(f"{prog}: warning: {warning.message}", file=sys.stderr)
    mean_C, std_C = statistics.mean_C, statistics.std_C
    frames = sum(sample.frames for sample in manifest.samples())
    print(
        f"{len(manifest.samples())} episodes, {frames} frames of {', '.join(manifest.views)}, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB; channel means "
        f"{mean_C.min():.2f} to {mean_C.max():.2f}, deviations {std_C.min():.2f} to {std_C.max():.2f}"
    )
    print(f"{options.out}: done; next: set `data: {options.out}` in a world config and run vidworld train")


def encode_dataset(
    dataset_dir: Path | str,
    tokenizer: Tokenizer,
    out_dir: Path | str,
    *,
    batch_frames: int = BATCH_FRAMES,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Manifest:
    """Encode a video dataset on the device where the tokenizer is, and return the manifest of the latents.

    Does nothing when the directory already holds them, and continues what was interrupted. With a time stride
    k, each episode loses the frames at its end that make no whole latent frame. `progress`: show a bar; by
    default where there is a terminal. Warns when the latents are far from mean 0 and deviation 1.

    Raises DataError for a dataset that holds no video or is damaged, or frames that the tokenizer cannot
    take; ConfigError when the directory holds something else.
    """
    require("webdataset", "train")
    out = Path(out_dir)
    dataset = ShardDataset.open(dataset_dir)
    source = dataset.manifest
    _check(dataset, tokenizer, out, batch_frames)
    identity = {
        "encoder": ENCODER,
        "source": source.name,
        "source_fingerprint": source.digest,
        "tokenizer": tokenizer.digest,
    }
    with locked(out):
        if not overwrite and (manifest := existing(out, identity)):
            return manifest
        staging = Staging(out, identity, overwrite=overwrite)
        shards = _write_shards(dataset, tokenizer, staging, batch_frames, progress)
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


def _check(dataset: ShardDataset, tokenizer: Tokenizer, out: Path, batch_frames: int) -> None:
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
    if batch_frames < 1:
        raise ConfigError("--batch-frames", got=batch_frames, expected="at least 1")
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
    dataset: ShardDataset, tokenizer: Tokenizer, staging: Staging, batch_frames: int, progress: bool | None
) -> list[Shard]:
    """Encode the shards that no earlier run finished; returns all, in the order of the source."""
    done: dict[str, Shard] = {}
    todo: list[tuple[int, Shard]] = []
    for split in SPLITS:
        of_split = [shard for shard in dataset.manifest.shards if shard.split == split]
        keys = tuple(sample.key for shard in of_split for sample in shard.samples)
        groups = staging.finished(split, keys)
        for group, shard in zip(groups, of_split, strict=False):
            assert group.shard is not None
            done[shard.file] = group.shard
        todo += [(index, shard) for index, shard in enumerate(of_split) if index >= len(groups)]
    total = sum(sample.frames for sample in dataset.manifest.samples())
    left = sum(sample.frames for _, shard in todo for sample in shard.samples)
    keys = [sample.key for _, shard in todo for sample in shard.samples]
    disable = None if progress is None else not progress
    with (
        _read_ahead(dataset, keys) as episodes,
        _repeatable(),
        torch.inference_mode(),
        tqdm(total=total, initial=total - left, unit="frame", desc="encode", disable=disable) as bar,
    ):
        for index, shard in todo:
            done[shard.file] = _write_shard(index, shard, episodes, tokenizer, staging, batch_frames, bar)
    return [done[shard.file] for shard in dataset.manifest.shards]


def _write_shard(
    index: int,
    source: Shard,
    episodes: Iterator[EpisodeArrays],
    tokenizer: Tokenizer,
    staging: Staging,
    batch_frames: int,
    bar: "tqdm[Any]",
) -> Shard:
    path = staging.tar(source.split, index)
    samples: list[Sample] = []
    with ShardWriter(path) as writer:
        for sample in source.samples:
            episode = next(episodes)
            assert episode.key == sample.key
            frames = usable_frames(sample.frames, tokenizer.time_stride)
            writer.add(sample.key, _members(episode, frames, tokenizer, batch_frames))
            samples.append(dataclasses.replace(sample, frames=frames))
            bar.update(sample.frames)
    shard = Shard(f"{SHARDS}/{path.name}", writer.sha256, writer.bytes, source.split, samples=tuple(samples))
    keys = tuple(sample.key for sample in samples)
    staging.finish(index, Group(source.split, keys, quarantined=(), shard=shard))
    return shard


def _members(
    episode: EpisodeArrays, frames: int, tokenizer: Tokenizer, batch_frames: int
) -> dict[str, bytes]:
    """The members of a latent sample, cut to the frames that make whole latent frames."""
    assert episode.video is not None
    members = {}
    for view, video_THWC in episode.video.items():
        latents_TChw = encode_frames(tokenizer, video_THWC[:frames], batch_frames)
        if not np.isfinite(latents_TChw).all():
            raise DataError(
                f"latents of view {view!r} of sample {episode.key!r}",
                got="values that are not finite in float16",
                fix="the tokenizer has diverged: train it anew",
            )
        members[latents_member(view)] = npy_bytes(latents_TChw)
    meta = {**episode.meta, "frames": frames} if "frames" in episode.meta else episode.meta
    return members | {
        "actions.npy": npy_bytes(episode.actions_TA[:frames]),
        "proprio.npy": npy_bytes(episode.proprio_TS[:frames]),
        "timestamps.npy": npy_bytes(episode.timestamps_T[:frames]),
        "meta.json": json_bytes(meta),
    }


def encode_frames(
    tokenizer: Tokenizer, video_THWC: np.ndarray, batch_frames: int = BATCH_FRAMES
) -> np.ndarray:
    """RGB frames [T, H, W, 3] uint8 of one view to latents [T_latent, C, h, w] float16.

    A tokenizer that compresses time takes all frames at once; it bounds its own memory.
    """
    assert isinstance(tokenizer, nn.Module)
    device = next(tokenizer.parameters()).device
    at_once = batch_frames if tokenizer.time_stride == 1 else len(video_THWC)
    pieces = []
    for start in range(0, len(video_THWC), at_once):
        pixels_THWC = torch.from_numpy(video_THWC[start : start + at_once]).to(device)
        video_BTCHW = to_unit_range(pixels_THWC.movedim(-1, -3)[None])
        pieces.append(tokenizer.encode(video_BTCHW)[0].to("cpu", torch.float16))
    latents_TChw = torch.cat(pieces).numpy()
    assert len(latents_TChw) == num_latent_frames(len(video_THWC), tokenizer.time_stride)
    return latents_TChw


@contextmanager
def _read_ahead(dataset: ShardDataset, keys: Sequence[str]) -> Iterator[Iterator[EpisodeArrays]]:
    """Decode the next episodes in threads while the tokenizer works; they come in order."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        waiting: deque[Future[EpisodeArrays]] = deque()
        upcoming = iter(keys)

        def episodes() -> Iterator[EpisodeArrays]:
            for key in upcoming:
                waiting.append(pool.submit(dataset.read, key))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield episodes()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN choose its algorithms the same way every time."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


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
