"""Measure what an export to LeRobot costs: pictures, bytes and time.

    python tools/bench/export_lerobot.py path/to/a/video/dataset [--codec av1]

The dataset of shards is exported into a temporary folder by one worker, and each episode's frames are
compared with those of the shards. Next to the export stands the loss of 4:2:0 colour alone, without a codec.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.data.export_lerobot import Options as Export
from vidworld.data.export_lerobot import export
from vidworld.data.export_lerobot_video import Codec
from vidworld.data.manifest import SPLITS
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.lerobot import LeRobotSource


@dataclass(frozen=True)
class Options:
    """Export a dataset and compare."""

    dataset: tyro.conf.Positional[Path]
    """Directory of a dataset of videos with one robot."""
    codec: Codec = "h264"
    out: Path = Path("benchmarks/export_lerobot.json")
    """Rows are added here."""


def psnr_T(first_THWC: np.ndarray, second_THWC: np.ndarray) -> np.ndarray:
    """Decibels, frame by frame."""
    error = (first_THWC.astype(np.float32) - second_THWC) ** 2
    return 10 * np.log10(255**2 / error.mean((1, 2, 3)))


def halved_colour(frames_THWC: np.ndarray) -> np.ndarray:
    """To 4:2:0 and back."""
    there, back = VideoReformatter(), VideoReformatter()
    pictures = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames_THWC)
    halved = (there.reformat(picture, format="yuv420p") for picture in pictures)
    return np.stack([back.reformat(picture, format="rgb24").to_ndarray() for picture in halved])


def main(arguments: Sequence[str]) -> None:
    """Run with command-line arguments."""
    options = parse(Options, arguments, prog="export_lerobot.py")
    dataset = ShardDataset.open(options.dataset)
    manifest = dataset.manifest
    samples = [sample for split in SPLITS for sample in manifest.samples(split)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        export(
            Export(dataset=options.dataset, out=Path(folder), codec=options.codec, workers=1), Path(folder)
        )
        seconds = time.process_time() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.mp4"))
        source, exported, colour = LeRobotSource(folder), [], []
        for name, sample in zip(source.episode_ids(), samples, strict=True):
            read, true = source.read(name), dataset.read(sample.key).video
            assert true is not None
            for view, frames in true.items():
                exported.append(psnr_T(np.stack(list(read.views[view].frames())), frames))
                colour.append(psnr_T(halved_colour(frames), frames))
    pictures = len(manifest.views) * sum(sample.frames for sample in samples)
    row = f"export_lerobot.{options.codec}.{manifest.width}x{manifest.height}"
    values = {
        f"{row}.psnr": (round(float(np.concatenate(exported).mean()), 2), "dB"),
        f"{row}.psnr_worst_episode": (round(min(float(episode.mean()) for episode in exported), 2), "dB"),
        f"{row}.psnr_colour_alone": (round(float(np.concatenate(colour).mean()), 2), "dB"),
        f"{row}.bytes_per_frame": (round(size / pictures, 1), "B"),
        f"{row}.frames": (round(pictures / seconds), "frames/CPU-s"),
        f"{row}.memory": (round(memory / 1000), "MB"),
    }
    for name, (value, unit) in values.items():
        print(f"{name:<50}{value:>10} {unit}")
    command = f"python tools/bench/export_lerobot.py {manifest.name} --codec {options.codec}"
    add_rows(options.out, values, device=f"{cpu_name()}, one used", command=command, packages=["av", "numpy"])


if __name__ == "__main__":
    main(sys.argv[1:])
