"""Rollouts of recorded windows under true and wrong actions, decoded no more than is looked at.

Shapes: W windows, M samples, B rows, T frames of the horizon, V views, H W pixels, A action dims, S proprio
dims.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vidworld.evaluation.windows import WRONG, Recorded, Settings, Window
from vidworld.world.codec import PICTURES_AT_ONCE, to_video
from vidworld.world.intake import Numbers
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import Rollout, WorldState
from vidworld.world.world import WorldModel


@dataclass(frozen=True)
class Rolled:
    """Rollouts of one window; those under wrong actions have the noise of sample 0."""

    video_MTVHWC: np.ndarray
    proprio_MTS: np.ndarray
    member_M: np.ndarray
    """Which member of an ensemble imagined each; all 0 for one world."""
    wrong: dict[str, np.ndarray]
    """Kind of wrong actions -> pictures at the horizons."""
    shuffled_TVHWC: np.ndarray | None
    """All frames under shuffled actions, where they are to be shown."""


class Roller(Protocol):
    """What rolls a world out with one sampler: a `RolloutEngine`, or something that passes for one."""

    world: WorldModel
    sampler: SamplerConfig

    def rollout(
        self, state: WorldState, actions: Numbers, *, decode: bool = True, allow_out_of_range: bool = False
    ) -> Rollout:
        """As `WorldModel.rollout`."""
        ...


def roll_out(
    engine: Roller,
    settings: Settings,
    chunk: Sequence[tuple[Recorded, Recorded | None]],
    *,
    first: int,
    batch: int,
    shown: set[Window],
) -> list[Rolled]:
    """Rollouts of a chunk of windows under true actions, M samples each, and under wrong ones, one each.

    Of an ensemble M are the samples of all members, `settings.samples` each.
    The noise of a sample depends on the window's number in the whole study (`first` is the chunk's), and not
    on the size of the chunks.
    """
    world, of_each = engine.world, settings.samples
    samples = of_each * world.num_members
    state = world.reset(
        [recorded.grounding.prompt for recorded, _ in chunk],
        of_each,
        settings.seed,
        sample_ids=range(first * of_each, (first + len(chunk)) * of_each),
        sampler=engine.sampler,
        allow_out_of_range=True,
    )

    def rollouts(rows: Sequence[int], actions: Sequence[np.ndarray], decode: bool) -> Iterator[Rollout]:
        for start in range(0, len(rows), batch):
            places = list(range(start, min(start + batch, len(rows))))
            count = len(places)
            if world.device.type == "cuda":  # where another size is captured anew
                places += places[-1:] * (batch - count)
            found = engine.rollout(
                state.select([rows[place] for place in places]),
                np.stack([actions[place] for place in places]),
                decode=decode,
                allow_out_of_range=True,
            )
            yield found if count == len(places) else _first(found, count)

    videos, proprios = [], []
    true = [recorded.future_TA for recorded, _ in chunk for _ in range(samples)]
    for rolled in rollouts(range(len(true)), true, decode=True):
        assert rolled.video_BTVHWC is not None
        videos.append(rolled.video_BTVHWC.cpu().numpy())
        proprios.append(rolled.proprio_BTS.double().cpu().numpy())
    video_WMTVHWC = np.concatenate(videos).reshape(len(chunk), samples, *videos[0].shape[1:])
    proprio_WMTS = np.concatenate(proprios).reshape(len(chunk), samples, *proprios[0].shape[1:])

    member_M = state.member_B[:samples].cpu().numpy()

    jobs = [
        (number, kind, actions_TA)
        for number, (recorded, partner) in enumerate(chunk)
        for kind in WRONG
        if (actions_TA := recorded.wrong(kind, partner)) is not None
    ]
    at_horizons = [horizon - 1 for horizon in settings.horizons]
    wrong: list[dict[str, np.ndarray]] = [{} for _ in chunk]
    shuffled: list[np.ndarray | None] = [None for _ in chunk]
    upcoming = iter(jobs)
    # Decoding takes most of the time and few frames are looked at; with a time stride it must be all of them.
    decode = world.spec.frames_per_step > 1
    actions = [actions_TA for *_, actions_TA in jobs]
    for rolled in rollouts([number * samples for number, *_ in jobs], actions, decode=decode):
        seen_BTVHWC = _pictures(world, rolled, at_horizons)
        for row, (number, kind, _) in enumerate(itertools.islice(upcoming, len(seen_BTVHWC))):
            wrong[number][kind] = seen_BTVHWC[row]
            if kind == "shuffled" and chunk[number][0].window in shown:
                shuffled[number] = _pictures(world, rolled, range(settings.frames), slice(row, row + 1))[0]
    return [
        Rolled(video_WMTVHWC[number], proprio_WMTS[number], member_M, wrong[number], shuffled[number])
        for number in range(len(chunk))
    ]


def _first(rolled: Rollout, count: int) -> Rollout:
    """The first rows of a rollout."""
    video_BTVHWC = rolled.video_BTVHWC
    return Rollout(
        latents_BTVChw=rolled.latents_BTVChw[:count],
        proprio_BTS=rolled.proprio_BTS[:count],
        video_BTVHWC=None if video_BTVHWC is None else video_BTVHWC[:count],
        state=rolled.state.select(slice(count)),
    )


def _pictures(
    world: WorldModel, rolled: Rollout, frames: Sequence[int], rows: slice = slice(None)
) -> np.ndarray:
    """Some frames of some rows of a rollout [B, T, V, H, W, 3], decoded few at a time if they are not yet."""
    if rolled.video_BTVHWC is not None:
        return rolled.video_BTVHWC[rows][:, frames].cpu().numpy()
    latents_BTVChw = rolled.latents_BTVChw[rows][:, frames]
    batch, count, views = latents_BTVChw.shape[:3]
    pieces = latents_BTVChw.flatten(0, 1)[:, None].split(max(1, PICTURES_AT_ONCE // views))
    pictures = torch.cat([to_video(world.decode(piece))[:, 0].cpu() for piece in pieces])
    return pictures.unflatten(0, (batch, count)).numpy()


def through_tokenizer(world: WorldModel, frames_TVHWC: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Latents [T, V, C, h, w] of a video, and the video as the tokenizer gives it back."""
    video_TVHWC = torch.from_numpy(frames_TVHWC)
    # With a time stride frames depend on each other, and the tokenizer bounds its own memory.
    alone = world.spec.frames_per_step == 1
    at_once = max(1, PICTURES_AT_ONCE // frames_TVHWC.shape[1]) if alone else len(video_TVHWC)
    latents, pictures = [], []
    for piece_TVHWC in video_TVHWC.split(at_once):
        latents_1TVChw = world.encode(piece_TVHWC[None].to(world.device))
        latents.append(latents_1TVChw[0])
        pictures.append(to_video(world.decode(latents_1TVChw))[0].cpu())
    return torch.cat(latents), torch.cat(pictures).numpy()
