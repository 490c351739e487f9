"""`vidworld export-dataset`: shards as a dataset that other tools open, LeRobot v3.0.

One dataset holds one robot: LeRobot has one `robot_type` and one width of `action`. The folder appears when
it is complete; a killed export leaves nothing under its name.
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse
from vidworld.data import lerobot_format as lerobot
from vidworld.data.export_lerobot_video import Codec, require_encoder
from vidworld.data.export_lerobot_writer import EncodedEpisode, Layout, LeRobotWriter, Take, encode_episode
from vidworld.data.manifest import SPLITS, Manifest, Sample
from vidworld.data.shards import EpisodeArrays, ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.output import output_directory

FRAMES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write shards as a dataset that other tools open."""

    dataset: tyro.conf.Positional[Path]
    """Directory of a dataset of videos."""
    out: Path
    """Directory to write; it must not exist."""
    to: Literal["lerobot"] = "lerobot"
    """Format: LeRobot v3.0."""
    split: Literal["all", "train", "val"] = "all"
    """Episodes to take; with `all`, those for training come first."""
    embodiment: str | None = None
    """The robot to take, where the dataset holds several."""
    codec: Codec = "h264"
    """Of the videos; av1 makes smaller files and takes longer."""
    data_file_mb: float = lerobot.DATA_FILE_MB
    """Largest size of a parquet file."""
    video_file_mb: float = lerobot.VIDEO_FILE_MB
    """Largest size of a video file (one episode is never cut)."""
    workers: int | None = None
    """Episodes encoded at once; default: one a core. The result is the same."""
    overwrite: bool = False
    """Replace an earlier export in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld export-dataset`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, lerobot.INFO, overwrite=options.overwrite) as folder:
        writer = export(options, folder)
    layout = writer.layout
    print(
        f"{options.out}: LeRobot {lerobot.VERSION}, {writer.num_episodes} episodes, "
        f"{writer.num_frames} frames of {', '.join(layout.views)} at {layout.width}x{layout.height}, "
        f"{layout.fps:g} fps, robot {layout.contract.embodiment!r}"
    )


def export(options: Options, folder: Path) -> LeRobotWriter:
    """Write the dataset into a folder that is there and empty; returns the writer, finished.

    Raises DataError for latents, odd sizes and damaged shards, ConfigError when several robots are left.
    """
    for name in ("data_file_mb", "video_file_mb", "workers"):
        if (given := getattr(options, name)) is not None and not given > 0:
            raise ConfigError(f"--{name.replace('_', '-')}", got=given, expected="more than 0")
    require_encoder(options.codec)
    dataset = ShardDataset.open(options.dataset)
    manifest = dataset.manifest
    if manifest.kind != "video":
        raise DataError(
            "a dataset of latents has no pictures to export",
            where=options.dataset,
            fix="export the video dataset that it was encoded from",
        )
    chosen = _choose(manifest, options)
    samples = [sample for split in chosen.values() for sample in split]
    contract = manifest.contract(samples[0].embodiment)
    layout = Layout(
        fps=manifest.fps,
        height=manifest.height,
        width=manifest.width,
        views=manifest.views,
        contract=contract,
        columns={lerobot.SUCCESS: "bool"} if _all_say_success(dataset, samples) else {},
        codec=options.codec,
        data_file_mb=options.data_file_mb,
        video_file_mb=options.video_file_mb,
    )
    splits, first = {}, 0
    for split, found in chosen.items():
        splits[split] = f"{first}:{first + len(found)}"
        first += len(found)
    split_of = {sample.key: split for split, found in chosen.items() for sample in found}
    workers = options.workers or len(os.sched_getaffinity(0))
    with LeRobotWriter(folder, layout) as writer:
        takes = partial(_encode, dataset, layout, split_of)
        with tqdm(total=len(samples), unit="episode", disable=None) as bar:
            for episode in _in_order(takes, samples, workers):
                writer.add(episode)
                bar.update()
        writer.finish(
            splits=splits,
            note={
                "created_by": f"vidworld {__version__}",
                "dataset": manifest.name,
                "dataset_digest": manifest.digest,
            },
        )
    return writer


def _choose(manifest: Manifest, options: Options) -> dict[str, list[Sample]]:
    """Split -> its samples, of the one robot that is left."""
    wanted = SPLITS if options.split == "all" else (options.split,)
    if options.embodiment is not None:
        manifest.contract(options.embodiment)
    chosen = {
        split: [
            sample for sample in manifest.samples(split) if options.embodiment in (None, sample.embodiment)
        ]
        for split in wanted
    }
    chosen = {split: samples for split, samples in chosen.items() if samples}
    robots = sorted({sample.embodiment for samples in chosen.values() for sample in samples})
    if not robots:
        raise DataError("no episodes to export", where=manifest.name, got=f"split {options.split!r}")
    if len(robots) > 1:
        raise ConfigError(
            "robots in one LeRobot dataset",
            where=manifest.name,
            got=", ".join(robots),
            expected="one",
            fix=f"export each into a folder of its own: --embodiment {robots[0]}",
        )
    return chosen


def _all_say_success(dataset: ShardDataset, samples: Sequence[Sample]) -> bool:
    """Whether every episode says if it succeeded: a column of LeRobot has no empty cells."""
    return all("success" in _outcome(_tables(dataset, sample)) for sample in samples)


def _tables(dataset: ShardDataset, sample: Sample) -> EpisodeArrays:
    return dataset.read_clip(sample.key, 0, sample.frames, pictures=False)


def _outcome(tables: EpisodeArrays) -> Mapping[str, Any]:
    outcome = tables.meta.get("outcome")
    return outcome if isinstance(outcome, Mapping) else {}


def _encode(
    dataset: ShardDataset, layout: Layout, split_of: Mapping[str, str], sample: Sample
) -> EncodedEpisode:
    tables = _tables(dataset, sample)
    outcome = _outcome(tables)
    success_T = np.zeros(sample.frames, bool)
    # As LeRobot's simulators write it: true on the frame where the task is done.
    success_T[-1] = bool(outcome.get("success"))
    take = Take(
        name=sample.key,
        text=sample.text,
        actions_TA=tables.actions_TA,
        proprio_TS=tables.proprio_TS,
        timestamps_T=tables.timestamps_T,
        pictures=partial(_pictures, dataset, sample),
        columns={lerobot.SUCCESS: success_T} if lerobot.SUCCESS in layout.columns else {},
        facts={
            lerobot.SOURCE_ID: sample.episode_id,
            lerobot.SPLIT: split_of[sample.key],
            lerobot.OUTCOME: json.dumps(dict(outcome), sort_keys=True),
            lerobot.ORIGIN: json.dumps(tables.meta.get("source") or {}, sort_keys=True),
        },
    )
    return encode_episode(take, layout)


def _pictures(dataset: ShardDataset, sample: Sample) -> Iterator[Mapping[str, np.ndarray]]:
    for start in range(0, sample.frames, FRAMES_AT_ONCE):
        clip = dataset.read_clip(sample.key, start, min(FRAMES_AT_ONCE, sample.frames - start))
        assert clip.video is not None
        yield clip.video


def _in_order(encode: Any, samples: Sequence[Sample], workers: int) -> Iterator[EncodedEpisode]:
    """Encode some episodes ahead in threads (FFmpeg lets go of the interpreter), and yield them in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for sample in samples:
                waiting.append(pool.submit(encode, sample))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
