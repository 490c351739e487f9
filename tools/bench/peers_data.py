"""The same episodes for all contenders: training clips on the device, and held-out windows.

Shapes: N frames of all episodes, B batch, T frames, C channels, h w latent, H W pixels, A action dims.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidworld.data.manifest import MANIFEST
from vidworld.data.shards import ShardDataset
from vidworld.errors import DataError
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.lab_frames import open_datasets, scene
from vidworld.evaluation.windows import spaced
from vidworld.world.prompt import Prompt
from vidworld.world.world import WorldModel

ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class Case:
    """One held-out window."""

    prompt: Prompt
    actions_TA: np.ndarray
    """After the context."""
    true_THWC: np.ndarray
    last_HWC: np.ndarray

    @property
    def prompt_actions(self) -> np.ndarray:
        """Between the frames of the context."""
        assert self.prompt.actions is not None
        return self.prompt.actions


class Corpus:
    """Training episodes on the device: frames, latents and normalised commands."""

    def __init__(
        self, frames_NHWC: Tensor, latents_NChw: Tensor, actions_NA: Tensor, lengths: list[int]
    ) -> None:
        self.frames_NHWC, self.latents_NChw, self.actions_NA = frames_NHWC, latents_NChw, actions_NA
        self.lengths = torch.tensor(lengths)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def clips(self, latents: bool, batch: int, frames: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random clips: latents [B, T, C, h, w] or pictures [B, T, 3, H, W], and commands [B, T, A].

        Pictures are in [-1, 1]. Episodes come in proportion to the clips that they hold. The last command
        leads out of the clip.
        """
        room = (self.lengths - frames + 1).clamp(min=0)
        if not room.any():
            raise DataError(
                "training episodes", got=f"at most {int(self.lengths.max())} frames", expected=frames
            )
        chosen = torch.multinomial(room.double(), batch, replacement=True, generator=random)
        offset = (torch.rand(batch, generator=random) * room[chosen]).long()
        rows = (self.starts[chosen] + offset)[:, None] + torch.arange(frames)
        rows = rows.to(self.frames_NHWC.device)
        actions_BTA = self.actions_NA[rows]
        if latents:
            return self.latents_NChw[rows].float(), actions_BTA
        return self.frames_NHWC[rows].movedim(-1, 2).float() / 127.5 - 1, actions_BTA


def open_all(paths: Sequence[Path]) -> list[ShardDataset]:
    """Datasets, and those in folders that are none. Raises DataError where there is none."""
    found: list[Path] = []
    for path in paths:
        inside = (
            [path]
            if (path / MANIFEST).is_file()
            else sorted(one.parent for one in path.glob(f"*/{MANIFEST}"))
        )
        if not inside:
            raise DataError(
                "--data", where=path, got="no dataset", expected=f"{MANIFEST} in it, or in its folders"
            )
        found += inside
    return open_datasets(found)


def corpus(
    datasets: Sequence[ShardDataset],
    world: WorldModel,
    latents: Path,
    device: str,
    *,
    most_gb: float,
    most_episodes: int | None = None,
) -> Corpus:
    """Read the training split; latents come from those that a run encoded, or are made where it has none."""
    samples = [(dataset, sample) for dataset in datasets for sample in dataset.manifest.samples("train")]
    if most_episodes is not None:
        samples = [samples[place] for place in spaced(len(samples) - 1, min(len(samples), most_episodes))]
    lengths = [sample.frames for _, sample in samples]
    total, height, width = sum(lengths), world.spec.height, world.spec.width
    size_gb = total * height * width * 3 / 2**30
    if not samples or size_gb > most_gb:
        raise DataError(
            "training frames",
            where=", ".join(str(dataset.directory) for dataset in datasets),
            got=f"{total:,} of them, {size_gb:.1f} GiB",
            expected=f"some, and at most --frames-gb {most_gb:g}",
            fix="pass --train-episodes",
        )
    frames_NHWC = torch.empty(total, height, width, 3, dtype=torch.uint8)
    actions_NA = np.empty((total, world.spec.shape.action_dims), np.float32)
    starts = np.cumsum([0, *lengths])

    def read(place: int) -> None:
        dataset, sample = samples[place]
        episode = dataset.read(sample.key)
        rows = slice(starts[place], starts[place + 1])
        frames_NHWC[rows] = torch.from_numpy(scene(episode))
        actions_NA[rows] = episode.actions_TA

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(read, range(len(samples))))
    frames_NHWC = frames_NHWC.to(device)
    raw = torch.from_numpy(actions_NA).to(device, world.dtype)[None]
    actions = world.normalizer.actions(raw, torch.zeros(1, dtype=torch.long, device=device))[0].float()
    encoded = read_latents(latents, [sample.key for _, sample in samples], starts, world)
    if encoded is None:
        pieces = [
            world.encode(piece[:, None, None])[:, 0, 0].half() for piece in frames_NHWC.split(ENCODED_AT_ONCE)
        ]
        encoded = torch.cat(pieces)
    return Corpus(frames_NHWC, encoded.to(device), actions, lengths)


def read_latents(folder: Path, keys: list[str], starts: np.ndarray, world: WorldModel) -> Tensor | None:
    """Latents [N, C, h, w] float16 of the same episodes, if they lie there; None where a key is not alone."""
    parts = [path.parent for path in (folder / MANIFEST, *folder.glob(f"*/{MANIFEST}")) if path.is_file()]
    place_of: dict[str, ShardDataset] = {}
    for part in parts:
        dataset = ShardDataset.open(part)
        for sample in dataset.manifest.samples():
            if sample.key in place_of:
                return None
            place_of[sample.key] = dataset
    if not set(keys) <= place_of.keys():
        return None
    shape = world.spec.shape
    latents_NChw = torch.empty(
        int(starts[-1]), shape.channels, shape.height, shape.width, dtype=torch.float16
    )

    def read(place: int) -> None:
        found = place_of[keys[place]].read(keys[place]).latents
        assert found is not None
        latents_NChw[starts[place] : starts[place + 1]] = torch.from_numpy(next(iter(found.values())))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(read, range(len(keys))))
    return latents_NChw


def cases(
    datasets: Sequence[ShardDataset], world: WorldModel, *, episodes: int, context: int, frames: int
) -> list[Case]:
    """Held-out episodes from their first frames: as many of each dataset, evenly spaced."""
    found: list[list[Case]] = []
    for dataset in datasets:
        samples = [one for one in dataset.manifest.samples("val") if one.frames >= context + frames]
        if not samples:
            raise DataError(
                f"held-out episodes of {context} + {frames} frames", where=dataset.directory, got="none"
            )
        count = min(len(samples), -(-episodes // len(datasets)))
        found.append([])
        for place in spaced(len(samples) - 1, count):
            grounding = ground_episode(
                dataset, samples[place].key, world.spec, context=context, frames=frames
            )
            recording = grounding.recording
            assert recording is not None
            found[-1].append(
                Case(
                    grounding.prompt,
                    recording.actions_TA,
                    recording.frames_TVHWC[:, 0],
                    np.asarray(grounding.prompt.frames_TVHWC(world.spec))[-1, 0],
                )
            )
    return [case for row in found for case in row]
