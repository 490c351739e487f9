"""Measure the loader: frames per CPU second from video and latent shards, and against the source's own mp4s;
and the conversion of 640x480 mp4s into shards.

    python tools/bench/loader.py path/to/lerobot_v21_dataset

One process reads the same random clips in turn from the source's mp4 files with PyAV (seek, decode, resize),
from video shards, from episodes that the loader keeps in memory, and from latent shards. CPU time counts, so
other work on the machine disturbs little; the median over the rounds goes into benchmarks/loader.json.
Then the start: wall seconds and memory of a new process until its first batch out of 10,000 episodes.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
import tyro
from av.video.reformatter import VideoReformatter

from vidworld.config import parse
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.loader import Loader, LoaderConfig, make_loader
from vidworld.data.manifest import Shard
from vidworld.data.order import ClipOrder, OrderKey
from vidworld.data.shards import (
    ShardDataset,
    ShardWriter,
    json_bytes,
    latents_member,
    npy_bytes,
    video_member,
)
from vidworld.data.sources.detect import open_source
from vidworld.data.video import encode_video
from vidworld.errors import DataError

SPATIAL_STRIDE, CHANNELS = 8, 16


@dataclass(frozen=True)
class Options:
    """Measure the loader on one dataset."""

    source: tyro.conf.Positional[Path]
    """A LeRobot v2 dataset: one mp4 per episode and camera."""
    out: Path = Path("benchmarks/loader.json")
    """Rows are added here."""
    size: str = "128x96"
    """Size of the video in the shards; the direct reader resizes to it."""
    max_episodes: int = 4
    clip_frames: int = 16
    batch_size: int = 16
    rounds: int = 5
    seconds: float = 1.0
    """CPU seconds per reader and round."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Convert, measure in turn, check that the readers agree, and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rates = {
            size: measure(options, size, Path(work) / size)
            for size in dict.fromkeys([options.size, native_size(options.source)])
        }
    small, native = rates[options.size], rates[native_size(options.source)]
    unit, ratio = "frames/CPU-s", "x"
    rows = [
        ("loader.frames_per_s_core", small["video"], unit),
        ("loader.frames_per_s_core.cached", small["cached"], unit),
        ("loader.frames_per_s_core.latents", small["latents"], unit),
        ("loader.frames_per_s_core.latents_cached", small["latents_cached"], unit),
        ("loader.frames_per_s_core.mp4", small["mp4"], unit),
        ("loader.ratio_vs_mp4", small["video"] / small["mp4"], ratio),
        ("loader.ratio_vs_mp4.cached", small["cached"] / small["mp4"], ratio),
        ("loader.ratio_vs_mp4.latents", small["latents"] / small["mp4"], ratio),
        ("loader.ratio_vs_mp4.native_size", native["video"] / native["mp4"], ratio),
        ("loader.order_us.clips1e7_b64", order_us(), "us"),
        ("convert.frames_per_s_core", small["convert"], unit),
        ("convert.times_real_time_30fps", small["convert"] / 30, ratio),
    ]
    rows += start_rows(options)
    write_rows(options, rows)
    for name, value, unit in rows:
        print(f"{name:<42} {value:>12.2f} {unit}")


def measure(options: Options, size: str, work: Path) -> dict[str, float]:
    """Frames per CPU second of each reader, at one size."""
    source = open_source(options.source)
    plan = ConvertOptions(
        out=work / "video", size=size, max_episodes=options.max_episodes, val_fraction=0, workers=1
    )
    began = time.process_time()
    manifest = convert(source, plan)
    converted = sum(sample.frames for sample in manifest.samples()) / (time.process_time() - began)
    dataset = ShardDataset.open(work / "video")
    latents = ShardDataset.open(write_latents(dataset, work / "latents"))
    config = LoaderConfig(
        clip_frames=options.clip_frames, batch_size=options.batch_size, workers=0, cache_gb=8.0
    )
    uncached = replace(config, cache_gb=0.0)
    loaders = {
        "video": make_loader(dataset, "train", uncached, seed=0),
        "cached": make_loader(dataset, "train", config, seed=0),
        "latents": make_loader(latents, "train", uncached, seed=0),
        "latents_cached": make_loader(latents, "train", config, seed=0),
    }
    readers = {name: video_or_latents(loader) for name, loader in loaders.items()}
    readers["mp4"] = read_mp4s(options.source, dataset, loaders["video"])
    check_agreement(next(readers["video"]), next(readers["mp4"]))
    for name in ("cached", "latents_cached"):  # fills the cache
        order = loaders[name].order
        assert isinstance(order, ClipOrder)
        for _ in range(3 * round(order.steps_per_epoch) // 4):
            next(readers[name])
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds):
        for name, reader in readers.items():
            found[name].append(frames_per_cpu_s(reader, options.seconds))
    rates = {name: statistics.median(values) for name, values in found.items()}
    return rates | {"convert": converted}


START_EPISODES, START_FRAMES, START_SHARD = 10_000, 64, 64
START = """
import json, sys, time
from pathlib import Path
began = float(sys.argv[2])
from vidworld.data.loader import LoaderConfig, make_loader
from vidworld.data.shards import ShardDataset
imported = time.time()
config = LoaderConfig(clip_frames=16, batch_size=16, workers=0)
next(iter(make_loader(ShardDataset.open(sys.argv[1]), "train", config, seed=0)))
done = time.time()
# Not ru_maxrss, which a child inherits from its parent.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
gb = int(status["VmHWM"].split()[0]) * 1024 / 1e9
print(json.dumps({"start_s": done - began, "open_s": done - imported, "gb": gb}))
"""
"""A process of its own: from its start, imports included, to the first batch in memory."""


def start_rows(options: Options) -> list[tuple[str, float, str]]:
    """Seconds and memory to start on 10,000 episodes, median of three processes; needs 1.5 GB of disk."""
    with tempfile.TemporaryDirectory() as work:
        data = write_many(options, Path(work))
        found = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", START, str(data), str(time.time())],
                    capture_output=True,
                    check=True,
                    text=True,
                ).stdout
            )
            for _ in range(3)
        ]
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return [
        ("loader.start_s.10k", median["start_s"], "s"),
        ("loader.start_s.10k.without_imports", median["open_s"], "s"),
        ("loader.start_gb.10k", median["gb"], "GB"),
    ]


def write_many(options: Options, work: Path) -> Path:
    """10,000 episodes that are all the beginning of one real episode, in shards of 64."""
    plan = ConvertOptions(
        out=work / "one", size=options.size, max_episodes=1, val_fraction=0, workers=1, episodes_per_shard=1
    )
    manifest = convert(open_source(options.source), plan)
    (sample,) = manifest.samples()
    frames = min(START_FRAMES, sample.frames)
    clip = ShardDataset.open(work / "one").read_clip(sample.key, 0, frames)
    assert clip.video is not None
    members = {video_member(view): encode_video(video, manifest.fps) for view, video in clip.video.items()}
    members |= {
        "actions.npy": npy_bytes(clip.actions_TA),
        "proprio.npy": npy_bytes(clip.proprio_TS),
        "timestamps.npy": npy_bytes(clip.timestamps_T),
        "meta.json": json_bytes(clip.meta),
    }
    (work / "many" / "shards").mkdir(parents=True)
    shards = []
    for first in range(0, START_EPISODES, START_SHARD):
        keys = [f"episode_{index:06d}" for index in range(first, min(first + START_SHARD, START_EPISODES))]
        file = f"shards/train-{first // START_SHARD:06d}.tar"
        with ShardWriter(work / "many" / file) as writer:
            for key in keys:
                writer.add(key, members)
        samples = tuple(replace(sample, key=key, episode_id=key, frames=frames) for key in keys)
        shards.append(Shard(file, writer.sha256, writer.bytes, "train", samples))
    replace(manifest, shards=tuple(shards)).write(work / "many")
    return work / "many"


def order_us(batch_size: int = 64, steps: int = 500) -> float:
    """Microseconds of CPU to find the clips of a batch among ten million, median over steps."""
    key = OrderKey("", "train", 0, batch_size, clip_frames=16, clip_stride=1, shuffle_shards=16)
    order = ClipOrder(np.full(100_000, 115), np.arange(100_000) // 100, key)
    order.batch(0)
    times_us = []
    for step in range(1, steps):
        begin = time.process_time()
        order.batch(step)
        times_us.append(1e6 * (time.process_time() - begin))
    return statistics.median(times_us)


def frames_per_cpu_s(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Frames [B, T, V] read in a CPU second."""
    begin, frames = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        frames += next(batches).shape[:3].numel()
    return frames / spent


def video_or_latents(loader: Loader) -> Iterator[torch.Tensor]:
    """The pictures of each batch."""
    for batch in loader:
        pictures = batch.video_BTVCHW if batch.latents_BTVChw is None else batch.latents_BTVChw
        assert pictures is not None
        yield pictures


def read_mp4s(source: Path, dataset: ShardDataset, loader: Loader) -> Iterator[torch.Tensor]:
    """The same clips straight from the source's files: what one does without shards."""
    manifest, samples = dataset.manifest, dataset.manifest.samples("train")
    files = {
        (sample.key, view): mp4_file(source, sample.episode_id, view)
        for sample in samples
        for view in manifest.views
    }
    tables = {sample.key: dataset.read_clip(sample.key, 0, sample.frames) for sample in samples}
    length, step, order = loader.config.clip_frames, 0, loader.order
    assert isinstance(order, ClipOrder)
    while True:
        clips, actions = [], []
        for episode, start in zip(*order.batch(step), strict=True):
            key, rows = samples[episode].key, slice(int(start), int(start) + length)
            views = [
                mp4_window(files[key, view], int(start), length, manifest.width, manifest.height)
                for view in manifest.views
            ]
            clips.append(np.stack(views, 1))
            actions.append(tables[key].actions_TA[rows])
        torch.from_numpy(np.stack(actions))
        yield torch.from_numpy(np.stack(clips)).permute(0, 1, 2, 5, 3, 4)
        step += 1


def mp4_window(path: Path, start: int, length: int, width: int, height: int) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of a file, from the key frame before them, one thread."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.average_rate is not None
        assert stream.time_base is not None
        ticks = 1 / (stream.average_rate * stream.time_base)
        scaler = VideoReformatter()
        container.seek(round(start * ticks), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            if round(frame.pts / ticks) >= start:
                frames.append(scaler.reformat(frame, width, height, "rgb24", threads=1).to_ndarray())
                if len(frames) == length:
                    return np.stack(frames)
    raise DataError("frames of the video", where=path, got=len(frames), expected=length)


def mp4_file(source: Path, episode_id: str, view: str) -> Path:
    """The mp4 of one episode and camera."""
    found = [path for path in source.glob(f"videos/**/{episode_id}.mp4") if path.parent.name.endswith(view)]
    if len(found) != 1:
        raise DataError(
            f"{len(found)} files {episode_id}.mp4 of {view}", where=source, expected="one per episode"
        )
    return found[0]


def native_size(source: Path) -> str:
    """WIDTHxHEIGHT of the source's first video."""
    path = next(source.glob("videos/**/*.mp4"), None)
    if path is None:
        raise DataError("no mp4 file", where=source)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        return f"{context.width}x{context.height}"


def write_latents(dataset: ShardDataset, out: Path) -> Path:
    """Latents of the same episodes, noise in place of a tokenizer's output: only bytes and shapes count."""
    manifest, noise = dataset.manifest, np.random.default_rng(0)
    (out / "shards").mkdir(parents=True)
    shards: list[Shard] = []
    for shard in manifest.shards:
        with ShardWriter(out / shard.file) as writer:
            for sample in shard.samples:
                episode = dataset.read_clip(sample.key, 0, sample.frames)
                area = (manifest.height // SPATIAL_STRIDE, manifest.width // SPATIAL_STRIDE)
                shape = (sample.frames, CHANNELS, *area)
                pictures = {
                    latents_member(view): npy_bytes(
                        noise.standard_normal(shape, np.float32).astype(np.float16)
                    )
                    for view in manifest.views
                }
                tables = {
                    "actions.npy": npy_bytes(episode.actions_TA),
                    "proprio.npy": npy_bytes(episode.proprio_TS),
                    "timestamps.npy": npy_bytes(episode.timestamps_T),
                    "meta.json": json_bytes(episode.meta),
                }
                writer.add(sample.key, pictures | tables)
        shards.append(replace(shard, sha256=writer.sha256, bytes=writer.bytes))
    tokenizer = {"digest": "noise", "channels": CHANNELS, "spatial_stride": SPATIAL_STRIDE, "time_stride": 1}
    latents = replace(manifest, kind="latents", tokenizer=tokenizer, shards=tuple(shards))
    latents.write(out)
    return out


def check_agreement(ours: torch.Tensor, direct: torch.Tensor) -> None:
    """Both readers must give the same pictures but for compression and scaling."""
    error = (ours.float() - direct.float()).square().mean()
    psnr_db = float(10 * torch.log10(255**2 / error))
    if ours.shape != direct.shape or psnr_db < 25:
        raise DataError("clips of the two readers differ", got=f"{psnr_db:.1f} dB", expected="at least 25 dB")


def write_rows(options: Options, rows: Sequence[tuple[str, float, str]]) -> None:
    """Add rows of the benchmark schema; the newest of a name counts."""
    kept = json.loads(options.out.read_text()) if options.out.exists() else []
    modules = {"torch": torch, "av": av, "numpy": np}
    facts = {
        "device": f"{cpu_name()}, one core",
        "versions": {"python": platform.python_version()} | {n: m.__version__ for n, m in modules.items()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python tools/bench/loader.py {options.source.resolve().name} --size {options.size}"
        f" --clip-frames {options.clip_frames} --batch-size {options.batch_size}",
    }
    kept += [{"name": name, "value": round(value, 2), "unit": unit, **facts} for name, value, unit in rows]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's model, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:], "python tools/bench/loader.py")
