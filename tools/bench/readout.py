"""Measure a readout on held-out true lab frames, and draw what it reads.

    vidworld readout train data/lab/* --config configs/readout.yaml --out runs/readout
    python tools/bench/readout.py runs/readout --data data/lab/rigid data/lab/paint

Adds `readout.<kind>.<quantity>.mae` (in its unit) and `.r2`, `readout.<kind>.<mask>.iou`, each beside
`_hold`, which holds every episode's first frame; `readout.<kind>.blurred.iou` of pictures that went through
half the resolution; the reading speed; the size of the file. The six colours of rigid objects are averaged.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from table import add_rows, cpu_name

from vidworld import media
from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation.lab_frames import LabFrames, load_frames, open_datasets, scene
from vidworld.evaluation.lab_truth import Truth, read_truth
from vidworld.evaluation.quantities import SUBJECTS
from vidworld.evaluation.readout import WEIGHTS, Readings, Readout, load_readout, readout_folder
from vidworld.evaluation.readout_errors import measure
from vidworld.evaluation.readout_picture import OUTLINED, edges, tint

SCALE = 2
COLUMNS = 5
CAPTIONS: Mapping[str, tuple[str, ...]] = {
    "container": ("box_tilt",),
    "paint": ("coverage",),
    "liquid": ("fill",),
    "smoke": ("smoke_l",),
}


@dataclass(frozen=True)
class Options:
    """Measure a readout."""

    readout: tyro.conf.Positional[Path]
    """Directory that `vidworld readout train` wrote."""
    data: tuple[Path, ...] = ()
    """Datasets of the lab; their val split is read."""
    stride: int = 2
    """Every how many frames one is read."""
    picture: Path | None = None
    """Also draw one held-out episode of each kind, .jpg."""
    picture_episode: int = 0
    """Which of the val split."""
    out: Path = Path("benchmarks/readout.json")
    """Rows are added here."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Add the rows of every kind that the readout and the data have in common."""
    options = parse(Options, arguments, prog=prog)
    if not options.data:
        raise ConfigError("--data", got="nothing", expected="datasets of the lab")
    readout = load_readout(options.readout)
    datasets = open_datasets(options.data)
    rows: dict[str, tuple[float, str]] = {}
    for kind, frames in load_frames(datasets, "val", stride=options.stride, memory_gb=24).items():
        rows |= kind_rows(kind, measure(readout, frames), len(np.unique(frames.first_N)))
        rows |= blurred_rows(readout, frames)
    rows["readout.frames_per_s"] = (round(reading_speed(readout), 1), "frames/s/core")
    rows["readout.mb"] = (round((readout_folder(options.readout) / WEIGHTS).stat().st_size / 1e6, 2), "MB")
    if options.picture is not None:
        media.write_bytes(
            options.picture, media.encode_jpeg(sheet(readout, datasets, options.picture_episode))
        )
    add_rows(
        options.out,
        rows,
        device=f"{cpu_name()}, CPU seconds",
        command=f"python tools/bench/readout.py {options.readout} --data "
        + " ".join(str(path) for path in options.data)
        + f" --stride {options.stride}",
        packages=("torch", "numpy"),
    )
    for name, (value, unit) in rows.items():
        print(f"{name:<44} {value:10.4g} {unit}")


def kind_rows(kind: str, found: Mapping[str, Any], episodes: int) -> dict[str, tuple[float, str]]:
    """Rows of what `measure` found."""
    subject, rows = SUBJECTS[kind], {f"readout.{kind}.episodes": (float(episodes), "episodes")}
    for quantity in subject.quantities:
        names = [f"{item}_{quantity.name}" for item in subject.items] or [quantity.name]
        for key, unit in (("mae", quantity.unit), ("mae_hold", quantity.unit), ("r2", "1")):
            values = [found["quantities"][name][key] for name in names]
            known = [value for value in values if value is not None]
            if known:
                rows[f"readout.{kind}.{quantity.name}.{key}"] = (float(f"{np.mean(known):.4g}"), unit)
    for name, distance in found.get("distances", {}).items():
        for key in ("mean", "mean_hold"):
            if distance[key] is not None:
                rows[f"readout.{kind}.{name}.{key}"] = (distance[key], "m")
    objects = [name for name in subject.masks if name in subject.items]
    groups = {name: [name] for name in subject.masks if name not in objects}
    groups |= {"object": objects} if objects else {}
    for name, masks in groups.items():
        for key, unit in (("iou", "1"), ("iou_hold", "1"), ("centre_px", "px")):
            known = [value for mask in masks if (value := found["masks"][mask][key]) is not None]
            if known:
                rows[f"readout.{kind}.{name}.{key}"] = (float(f"{np.mean(known):.4g}"), unit)
    return rows


def blurred_rows(readout: Readout, frames: LabFrames) -> dict[str, tuple[float, str]]:
    """Mean mask IoU on pictures that went through half the resolution, as a weak decoder might show them."""
    size = readout.size
    blurred = np.stack(
        [
            np.asarray(
                Image.fromarray(frame)
                .resize((size // 2, size // 2), Image.Resampling.BOX)
                .resize((size, size), Image.Resampling.BICUBIC)
            )
            for frame in frames.frames_NHWC
        ]
    )
    found = measure(readout, dataclasses.replace(frames, frames_NHWC=blurred))
    known = [mask["iou"] for mask in found["masks"].values() if mask["iou"] is not None]
    return {f"readout.{frames.kind}.blurred.iou": (float(f"{np.mean(known):.4g}"), "1")}


def reading_speed(readout: Readout, count: int = 128) -> float:
    """Frames a CPU second on one thread, kinds in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    frames = np.random.default_rng(0).integers(0, 256, (1, count, readout.size, readout.size, 3), np.uint8)
    readout(frames[:, :8], readout.kinds[0])
    began = time.process_time()
    for kind in readout.kinds:
        readout(frames, kind)
    spent = time.process_time() - began
    torch.set_num_threads(threads)
    return count * len(readout.kinds) / spent


def sheet(readout: Readout, datasets: Sequence[ShardDataset], index: int) -> np.ndarray:
    """A row a kind: read masks tinted, true ones outlined, read positions crossed, true ones ringed."""
    rows = []
    for dataset in datasets:
        samples = dataset.manifest.samples("val")
        episode = dataset.read(samples[min(index, len(samples) - 1)].key)
        frames_THWC = scene(episode)
        truth = read_truth(episode.meta, frames_THWC, where=dataset.directory)
        times = np.linspace(0.12 * len(frames_THWC), len(frames_THWC) - 1, COLUMNS).round().astype(int)
        readings = readout(frames_THWC[None], truth.kind)[0][times]
        rows.append(_row(frames_THWC[times], readings, truth[times], int(episode.meta["source"]["seed"])))
    gap = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1])


def _row(frames_THWC: np.ndarray, readings: Readings, truth: Truth, seed: int) -> np.ndarray:
    read = {name: mask for name, mask in readings.masks.items() if name not in OUTLINED}
    shown_THWC = tint(frames_THWC, read, scale=SCALE)
    for name in read:
        shown_THWC[edges(truth.masks_THW[name].repeat(SCALE, 1).repeat(SCALE, 2))] = 255
    cells = []
    points = _points(readings, truth, seed, frames_THWC.shape[1])
    for frame, picture_HWC in enumerate(shown_THWC):
        image = Image.fromarray(picture_HWC)
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
        for read_T2, true_T2 in points:
            if np.isfinite(true_T2[frame]).all():
                x, y = SCALE * read_T2[frame]
                for width, colour in ((5, "black"), (2, "white")):
                    draw.line((x - 6, y - 6, x + 6, y + 6), colour, width)
                    draw.line((x - 6, y + 6, x + 6, y - 6), colour, width)
                x, y = SCALE * true_T2[frame]
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline="white", width=2)
        words = [
            f"{name} {readings.quantities[name][frame]:.2f} (true {truth.quantities_T[name][frame]:.2f})"
            for name in CAPTIONS.get(truth.kind, ())
        ]
        if words:
            draw.text((6, 5), words[0], "white", font, stroke_width=2, stroke_fill="black")
        cells += [np.asarray(image), np.full((image.height, 6, 3), 255, np.uint8)]
    return np.concatenate(cells[:-1], axis=1)


def _points(readings: Readings, truth: Truth, seed: int, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read and true positions in the picture [T, 2], by the camera of the episode, which is made again."""
    from vidworld.lab.episode import effect_of, generate
    from vidworld.lab.scene import camera_of

    things = [axes for group in SUBJECTS[truth.kind].distances.values() for axes in group]
    if not things:
        return []
    camera = camera_of(generate(truth.kind, seed, render=False).look, effect_of(truth.kind).framing, size)
    return [
        (
            camera.project(np.stack([readings.quantities[axis] for axis in axes], 1))[0],
            camera.project(np.stack([truth.quantities_T[axis] for axis in axes], 1))[0],
        )
        for axes in things
    ]


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "tools/bench/readout.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
