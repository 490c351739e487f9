"""True frames of lab datasets in memory, with their truth: what a readout is trained and tested on.

Shapes: N frames of all episodes, M masks, Q quantities, H W pixels.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.data.shards import EpisodeArrays, ShardDataset
from vidworld.errors import DataError
from vidworld.evaluation.lab_truth import kind_of, read_truth
from vidworld.evaluation.quantities import SUBJECTS

MOST_THREADS = 16
SIZE_MULTIPLE = 16


@dataclass(frozen=True)
class LabFrames:
    """Frames of one kind; those of an episode follow each other."""

    kind: str
    frames_NHWC: np.ndarray
    bits_NMX: np.ndarray
    """Masks in the order of the subject's, packed to bits."""
    values_NQ: np.ndarray
    """float32, NaN where a quantity does not count."""
    first_N: np.ndarray
    """Row of the first frame of each frame's episode."""

    def __len__(self) -> int:
        return len(self.frames_NHWC)

    def masks(self, rows: Any) -> np.ndarray:
        """Masks [n, M, H, W] bool of some rows."""
        height, width = self.frames_NHWC.shape[1:3]
        bits = self.bits_NMX[rows]
        return np.unpackbits(bits, axis=-1, count=height * width).reshape(*bits.shape[:2], height, width) > 0


def view_of(dataset: ShardDataset, *, where: object) -> str:
    """The one camera of a dataset of videos. Raises DataError for latents or several cameras."""
    manifest = dataset.manifest
    if manifest.kind != "video":
        raise DataError("kind of dataset", where=where, got=manifest.kind, expected="video")
    if len(manifest.views) != 1:
        raise DataError("cameras", where=where, got=", ".join(manifest.views), expected="one")
    return manifest.views[0]


def check_size(height: int, width: int, *, where: object, expected: int | None = None) -> None:
    """Refuse pictures that are not square, not of a multiple of 16 pixels, or not of the size expected."""
    if height == width and height % SIZE_MULTIPLE == 0 and height > 0 and expected in (None, height):
        return
    wanted = (
        f"squares of a multiple of {SIZE_MULTIPLE} pixels" if expected is None else f"{expected}x{expected}"
    )
    raise DataError("size of the pictures", where=where, got=f"{width}x{height}", expected=wanted)


def load_frames(
    datasets: Sequence[ShardDataset], split: str, *, stride: int, memory_gb: float
) -> dict[str, LabFrames]:
    """Every `stride`-th frame of a split of lab datasets, kind -> frames, kinds in the lab's order.

    Raises DataError for an imagined episode or one without its truth, for pictures of different sizes, and
    when the frames would take more than `memory_gb`.
    """
    size = datasets[0].manifest.height
    jobs: list[tuple[ShardDataset, str]] = []
    total = 0
    for dataset in datasets:
        view_of(dataset, where=dataset.directory)
        check_size(dataset.manifest.height, dataset.manifest.width, where=dataset.directory)
        check_size(dataset.manifest.height, dataset.manifest.width, where=dataset.directory, expected=size)
        for sample in dataset.manifest.samples(split):
            jobs.append((dataset, sample.key))
            total += -(-sample.frames // stride)
    needed_gb = total * size * size * 3 / 2**30
    if needed_gb > memory_gb:
        raise DataError(
            f"frames of the {split} split",
            got=f"{total:,} of them, {needed_gb:.1f} GiB",
            expected=f"at most memory_gb = {memory_gb:g}",
            fix="raise it, or stride",
        )
    parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for kind, *arrays in pool.map(lambda job: _episode(job[0], job[1], stride), jobs):
            parts[kind].append(tuple(arrays))  # type: ignore[arg-type]
    return {kind: _joined(kind, parts[kind]) for kind in SUBJECTS if kind in parts}


def _episode(dataset: ShardDataset, key: str, stride: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    where = f"{key} of {dataset.directory}"
    kind = kind_of(dataset.meta(key), where=where)
    episode = dataset.read(key)
    frames_THWC = scene(episode)
    truth = read_truth(episode.meta, frames_THWC, where=where)[::stride]
    masks_TMHW = np.stack(list(truth.masks_THW.values()), axis=1)
    bits_TMX = np.packbits(masks_TMHW.reshape(*masks_TMHW.shape[:2], -1), axis=-1)
    values_TQ = np.stack(list(truth.quantities_T.values()), axis=1).astype(np.float32)
    return kind, frames_THWC[::stride], bits_TMX, values_TQ


def scene(episode: EpisodeArrays) -> np.ndarray:
    """Frames [T, H, W, 3] of the one camera of an episode."""
    assert episode.video is not None
    return next(iter(episode.video.values()))


def _joined(kind: str, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> LabFrames:
    frames, bits, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    lengths = np.array([len(part[0]) for part in parts])
    starts = np.cumsum(lengths) - lengths
    return LabFrames(kind, frames, bits, values, np.repeat(starts, lengths))


def open_datasets(locations: Sequence[Path | str]) -> list[ShardDataset]:
    """Open datasets, each once. Raises DataError for one that is not there or given twice."""
    datasets = [ShardDataset.open(location) for location in locations]
    seen: dict[str, object] = {}
    for dataset in datasets:
        if dataset.manifest.digest in seen:
            raise DataError("the same data twice", where=dataset.directory, got=seen[dataset.manifest.digest])
        seen[dataset.manifest.digest] = dataset.directory
    return datasets
