"""From shards of video to shards of latents, one by one.

Shapes: T frames, C channels, H W pixels, h w latent.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from vidworld.data.manifest import Sample, Shard
from vidworld.data.shards import (
    EpisodeArrays,
    ShardDataset,
    ShardWriter,
    json_bytes,
    latents_member,
    npy_bytes,
)
from vidworld.data.staging import SHARDS, Group, Staging
from vidworld.errors import DataError
from vidworld.tokenizers.base import Tokenizer, num_latent_frames, to_unit_range, usable_frames
from vidworld.tokenizers.streaming import streaming

BATCH_FRAMES = 256
READERS = 4


def write_shards(
    dataset: ShardDataset,
    tokenizer: Tokenizer,
    staging: Staging,
    todo: Sequence[tuple[int, Shard]],
    batch_frames: int,
    progress: Callable[[int], object],
) -> dict[str, Shard]:
    """Encode shards, each given with its number in its split; returns them by the file of the video shard."""
    keys = [sample.key for _, shard in todo for sample in shard.samples]
    with _read_ahead(dataset, keys) as episodes, repeatable(), torch.inference_mode():
        return {
            shard.file: _write_shard(index, shard, episodes, tokenizer, staging, batch_frames, progress)
            for index, shard in todo
        }


def _write_shard(
    index: int,
    source: Shard,
    episodes: Iterator[EpisodeArrays],
    tokenizer: Tokenizer,
    staging: Staging,
    batch_frames: int,
    progress: Callable[[int], object],
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
            progress(sample.frames)
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

    A tokenizer that compresses time but streams is given about `batch_frames` too, and the latents are those
    of the whole; one that does not stream takes all frames at once.
    """
    assert isinstance(tokenizer, nn.Module)
    device, k = next(tokenizer.parameters()).device, tokenizer.time_stride
    stream = streaming(tokenizer)
    at_once = max(k, batch_frames // k * k) if stream is not None or k == 1 else len(video_THWC)
    state = None if stream is None else stream.start(1)
    first = min(len(video_THWC), at_once if k == 1 or stream is None else 1 + at_once)
    pieces = []
    for start, stop in _spans(first, at_once, len(video_THWC)):
        pixels_THWC = torch.from_numpy(video_THWC[start:stop]).to(device)
        video_BTCHW = to_unit_range(pixels_THWC.movedim(-1, -3)[None])
        if stream is None or state is None:
            latents_BTChw = tokenizer.encode(video_BTCHW)
        else:
            state, latents_BTChw = stream.encode_next(state, video_BTCHW)
        pieces.append(latents_BTChw[0].to("cpu", torch.float16))
    latents_TChw = torch.cat(pieces).numpy()
    assert len(latents_TChw) == num_latent_frames(len(video_THWC), tokenizer.time_stride)
    return latents_TChw


def _spans(first: int, at_once: int, total: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover `total` frames."""
    yield 0, first
    for start in range(first, total, at_once):
        yield start, min(start + at_once, total)


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
def repeatable() -> Iterator[None]:
    """Let cuDNN choose its algorithms the same way every time."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
