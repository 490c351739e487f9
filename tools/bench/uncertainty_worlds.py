"""Windows of lab episodes, what worlds imagine from them, and what a ruler reads of it: for uncertainty.py.

Shapes: W windows, M samples, C known frames, T frames after them, H W pixels, A action dims, S proprio dims,
X latent values of a frame, Q quantities.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.data.shards import EpisodeArrays, ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.futures import through_tokenizer
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import kind_of
from vidworld.evaluation.readout import Readings, Readout
from vidworld.evaluation.readout_errors import blunt
from vidworld.evaluation.windows import half_of, spaced
from vidworld.world.engine import RolloutEngine
from vidworld.world.ensemble import Ensemble
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

VIDEO_BYTES = 2**30
MOST_THREADS = 16


@dataclass(frozen=True)
class Window:
    """The first C + T frames of an episode, or of something like one that a world is asked about."""

    key: str
    kind: str
    frames_THWC: np.ndarray
    actions_TA: np.ndarray
    """Row t leads from frame t to t + 1; C + T - 1 of them."""
    proprio_TS: np.ndarray
    context: int
    episode: EpisodeArrays | None = None
    """With all its frames and the truth, where it was recorded."""

    def prompt(self, world: WorldModel) -> Prompt:
        """The known frames, as those of the world's own robot."""
        known = slice(self.context)
        (contract, *more) = world.spec.contracts
        if more:
            raise ConfigError("robots of the world", got=len(more) + 1, expected="the lab's arm alone")
        return Prompt(
            self.frames_THWC[known, None],
            self.proprio_TS[known],
            self.actions_TA[: self.context - 1],
            contract.embodiment,
        )


@dataclass(frozen=True)
class Imagined:
    """M futures of a window; of an ensemble member after member, as many of each."""

    window: Window
    latents_MTX: Tensor
    """Normalised, on the device."""
    proprio_MTS: np.ndarray
    video_MTHWC: np.ndarray
    """The frames that were decoded."""


def read_windows(
    dataset: ShardDataset,
    kind: str,
    *,
    split: str,
    half: str | None,
    context: int,
    frames: int,
    count: int,
) -> list[Window]:
    """The first frames of episodes of a kind, evenly spaced over a split or a half of it."""
    chosen = [
        sample
        for sample in dataset.manifest.samples(split)
        if sample.frames >= context + frames and half in (None, half_of(sample.episode_id))
    ]
    if not chosen:
        raise DataError(
            f"episodes of split {split!r}" + (f", {half} half" if half else ""),
            where=dataset.directory,
            got="none",
            expected=f"some of {context} + {frames} frames",
        )
    length = context + frames

    def read(place: int) -> Window | None:
        sample = chosen[place]
        episode = dataset.read(sample.key)
        if kind_of(episode.meta, where=f"{sample.key} of {dataset.directory}") != kind:
            return None
        return Window(
            sample.key,
            kind,
            scene(episode)[:length],
            episode.actions_TA[: length - 1],
            episode.proprio_TS[:length],
            context,
            episode,
        )

    places = spaced(len(chosen) - 1, min(count, len(chosen)))
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return [window for window in pool.map(read, places) if window is not None]


class Imaginer:
    """Rolls windows out, always as many rows at once."""

    def __init__(
        self,
        world: WorldModel,
        *,
        samples: int,
        rows: int,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
    ) -> None:
        members = world.num_members if isinstance(world, Ensemble) else 1
        if samples % members:
            raise ConfigError("--samples", got=samples, expected=f"a multiple of {members} members")
        self.world, self.samples, self.rows, self.seed = world, samples, rows, seed
        self.each, self.members = samples // members, members
        self.engine = RolloutEngine(world, sampler=sampler or world.spec.sampler)

    @torch.no_grad()
    def __call__(self, windows: Sequence[Window], at: Sequence[int] | None = None) -> Iterator[Imagined]:
        """Futures of each window under its own commands; equal contexts and horizons throughout.

        `at` are the frames of the horizon to decode, counted from 0; all by default.
        """
        if not windows:
            return
        frames, height, width = windows[0].frames_THWC.shape[:3]
        at = range(frames - windows[0].context) if at is None else at
        fitting = max(1, VIDEO_BYTES // (3 * max(1, len(at)) * height * width))
        together = max(1, min(self.rows, fitting) // self.samples)
        together = min(together, len(windows))
        for first in range(0, len(windows), together):
            # The last group is filled up: another batch size would be captured anew.
            places = [min(first + place, len(windows) - 1) for place in range(together)]
            some = [windows[place] for place in places]
            state = self.world.reset(
                [window.prompt(self.world) for window in some],
                self.each,
                self.seed,
                sample_ids=[place * self.each + m for place in places for m in range(self.each)],
                sampler=self.engine.sampler,
                allow_out_of_range=True,
            )
            actions = [window.actions_TA[window.context - 1 :] for window in some]
            rolled = self.engine.rollout(
                state,
                np.repeat(np.stack(actions), self.samples, axis=0),
                decode=False,
                allow_out_of_range=True,
            )
            latents_BTX = rolled.latents_BTVChw.float().flatten(2)
            proprio_BTS = rolled.proprio_BTS.double().cpu().numpy()
            video = np.zeros((len(proprio_BTS), 0, height, width, 3), np.uint8)
            if len(at):
                pictures = self.world.codec.pictures(rolled.latents_BTVChw[:, list(at)])
                video = pictures[:, :, 0].cpu().numpy()
            for index, place in enumerate(dict.fromkeys(places)):
                mine = slice(index * self.samples, (index + 1) * self.samples)
                yield Imagined(
                    windows[place],
                    latents_BTX[mine],
                    proprio_BTS[mine, :, : windows[place].proprio_TS.shape[-1]],
                    video[mine],
                )


@torch.no_grad()
def encode(world: WorldModel, frames_THWC: np.ndarray) -> Tensor:
    """Normalised latents [T, X] of frames, on the device."""
    pieces = torch.from_numpy(np.ascontiguousarray(frames_THWC))[:, None].split(64)
    return torch.cat([world.encode(piece[None].to(world.device))[0].float().flatten(1) for piece in pieces])


class Ruler:
    """A readout, with the quantities of a kind that it reads well enough to judge by."""

    def __init__(self, readout: Readout) -> None:
        self.readout = readout

    def names(self, kind: str) -> tuple[str, ...]:
        """Quantities that always count and that the ruler tells; all of them if it tells none."""
        subject = self.readout.net.subjects[kind]
        every = [name for name, quantity in subject.named.items() if quantity.below is None]
        bad = set(blunt(self.readout.errors[kind])) if self.readout.errors.get(kind) else set()
        return tuple(name for name in every if name not in bad) or tuple(every)

    def read(self, videos_NTHWC: np.ndarray, kind: str, reference_HWC: np.ndarray) -> Readings:
        """Readings of videos of one episode."""
        reference = np.repeat(reference_HWC[None], len(videos_NTHWC), 0)
        return self.readout(videos_NTHWC, kind, reference)

    def values(self, readings: Readings, names: Sequence[str]) -> np.ndarray:
        """Quantities [N, T, Q]."""
        return np.stack([readings.quantities[name].astype(np.float64) for name in names], -1)


def shown(world: WorldModel, frames_THWC: np.ndarray) -> np.ndarray:
    """Frames as the world's tokenizer shows them."""
    return through_tokenizer(world, np.ascontiguousarray(frames_THWC)[:, None])[1][:, 0]


def outcome_of(window: Window) -> Mapping[str, Any]:
    """Hidden values and readouts that only the simulator knows."""
    assert window.episode is not None
    return window.episode.meta["outcome"]
