"""Does a world hold over hundreds of frames? One long rollout of each episode, measured frame by frame.

Recordings end before such rollouts do. While one lasts, frames are compared with it and with holding the last
known frame. All along, how pictures look is compared with how the recording looked, and what never moved in
the recording (the background, under a camera that stands still) with what it was: that is the identity of the
scene. Commands are the episode's own, then those of other episodes in turn, all from the data.

Shapes: N rollouts, T frames, V views, H W pixels, A action dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vidworld.data.shards import ShardDataset
from vidworld.errors import DataError
from vidworld.evaluation.grounding import Grounding, ground_episode
from vidworld.evaluation.metrics import appearance, psnr
from vidworld.evaluation.returned import returned
from vidworld.evaluation.windows import Settings, Window
from vidworld.world.engine import RolloutEngine
from vidworld.world.world import WorldModel

MOST_ROLLOUTS = 8
SEGMENT = 32
"""Frames imagined and measured at once; pictures of more would not fit into memory."""
STILL = 8
"""Of 255: what a pixel may change over a whole recording and still be background."""
LEAST_STILL = 0.02
"""Share of a view that must be background to be judged by it."""
LAST_SHARE = 4
"""The end of a rollout is its last quarter."""


@dataclass(frozen=True)
class Reference:
    """What one recording says of its scene."""

    grounding: Grounding
    looks: dict[str, float]
    """Mean contrast, sharpness and motion of the recorded frames."""
    still_VHW: np.ndarray
    """Pixels that never changed."""
    scene_VHWC: np.ndarray
    """What they showed, uint8."""

    @classmethod
    def of(cls, grounding: Grounding, frames_TVHWC: np.ndarray) -> "Reference":
        """Measure all recorded frames of an episode."""
        spread = frames_TVHWC.max(0).astype(np.int16) - frames_TVHWC.min(0)
        still_VHW = (spread <= STILL).all(-1)
        if still_VHW.mean() < LEAST_STILL:
            still_VHW = np.zeros_like(still_VHW)
        scene_VHWC = np.median(frames_TVHWC, 0).astype(np.uint8)
        looks = _looks(frames_TVHWC[1:], frames_TVHWC[0])
        return cls(
            grounding, {name: float(value.mean()) for name, value in looks.items()}, still_VHW, scene_VHWC
        )


def drift(
    world: WorldModel,
    dataset: ShardDataset,
    settings: Settings,
    windows: Sequence[Window],
    frames: int,
    *,
    watch: Callable[[int, int, np.ndarray], object] | None = None,
) -> dict[str, Any]:
    """Roll out up to 8 episodes of one robot for `frames` frames and measure each; plain JSON.

    `windows` say which episodes; each is begun at its first frame. `watch` is given each piece of each
    rollout: its row, its first frame and the video [T, V, H, W, 3]. Raises DataError where none leaves a
    recorded frame after its context.
    """
    spec = world.spec
    k = spec.frames_per_step
    frames = -(-frames // k) * k
    references = _references(world, dataset, settings, windows)
    commands_NTA = _commands([one.grounding for one in references], frames)
    sampler = settings.sampler(spec.sampler)
    engine = RolloutEngine(world, sampler=sampler)
    curves: list[dict[str, np.ndarray]] = [{} for _ in references]
    pieces: list[list[dict[str, np.ndarray]]] = [[] for _ in references]
    before = [np.asarray(one.grounding.prompt.frames_TVHWC(spec))[-1] for one in references]
    last_known = list(before)
    with (
        torch.no_grad(),
        tqdm(total=frames * len(references), unit="frame", desc="drift", disable=None) as bar,
    ):
        state = world.reset(
            [one.grounding.prompt for one in references],
            seed=settings.seed,
            sample_ids=[0] * len(references),
            sampler=sampler,
            allow_out_of_range=True,
        )
        segment = -(-SEGMENT // k) * k
        for first in range(0, frames, segment):
            found = engine.rollout(state, commands_NTA[:, first : first + segment], allow_out_of_range=True)
            assert found.video_BTVHWC is not None
            for row, video_TVHWC in enumerate(found.video_BTVHWC.cpu().numpy()):
                pieces[row].append(
                    _measure(references[row], video_TVHWC, before[row], last_known[row], first)
                )
                if watch is not None:
                    watch(row, first, video_TVHWC)
                before[row] = video_TVHWC[-1]
                bar.update(len(video_TVHWC))
            state = found.state
    curves = [
        {name: np.concatenate([piece[name] for piece in parts]) for name in parts[0]} for parts in pieces
    ]
    found = summarise(curves, frames, turn=(sampler.window - sampler.sink) * k)
    groundings = [one.grounding for one in references]
    view = returned(world, groundings, sampler, context=settings.context, seed=settings.seed)
    return found if view is None else found | {"returned": view}


def summarise(curves: Sequence[dict[str, np.ndarray]], frames: int, *, turn: int) -> dict[str, Any]:
    """Means over rollouts of each curve [T], and what they come to.

    turn: camera frames after which the window's slots come round, the period to suspect of jumps.
    """
    mean = {name: _mean([curve[name] for curve in curves]) for name in curves[0]}
    end = slice(-max(1, frames // LAST_SHARE), None)
    begin = slice(0, min(16, frames))
    looks = {name: float(mean[f"{name}_ratio"][end].mean()) for name in ("contrast", "sharpness", "motion")}
    background = mean["background_psnr"]
    return {
        "rollouts": len(curves),
        "frames": frames,
        "turn": turn,
        "compared": [int(sum(np.isfinite(curve["psnr"][t]) for curve in curves)) for t in range(frames)],
        "curves": {name: _plain(values) for name, values in mean.items()},
        "gain_while_recorded_db": _finite_mean(mean["psnr"] - mean["psnr_copy"]),
        "end": looks,
        "background_begin_db": _finite_mean(background[begin]),
        "background_end_db": _finite_mean(background[end]),
        "jump_ratio": jump_ratio(mean["motion_ratio"], turn),
    }


def jump_ratio(motion_T: np.ndarray, period: int) -> float | None:
    """How much more pictures change at the worst phase of a period than on average; 1 is evenly.

    Chance alone makes it exceed 1 by about the scatter of the motion over the square root of the number of
    periods. None for fewer than four periods.
    """
    periods = len(motion_T) // period
    if periods < 4 or period < 2:
        return None
    by_phase = np.asarray(motion_T)[: periods * period].reshape(periods, period).mean(0)
    return float(by_phase.max() / by_phase.mean()) if by_phase.mean() > 0 else None


def _references(
    world: WorldModel, dataset: ShardDataset, settings: Settings, windows: Sequence[Window]
) -> list[Reference]:
    samples = list({window.sample.key: window.sample for window in windows}.values())
    long_enough = [sample for sample in samples if sample.frames > settings.context]
    if not long_enough:
        raise DataError(
            "episodes to measure drift on",
            where=dataset.directory,
            got="none longer than the context",
            expected=f"more than {settings.context} frames",
        )
    places = np.linspace(0, len(long_enough) - 1, min(MOST_ROLLOUTS, len(long_enough)))
    references = []
    for place in dict.fromkeys(round(place) for place in places):
        grounding = ground_episode(
            dataset, long_enough[place].key, world.spec, context=settings.context, resize=settings.resize
        )
        assert grounding.recording is not None
        known_TVHWC = np.asarray(grounding.prompt.frames_TVHWC(world.spec))
        references.append(
            Reference.of(grounding, np.concatenate([known_TVHWC, grounding.recording.frames_TVHWC]))
        )
    return references


def _commands(groundings: Sequence[Grounding], frames: int) -> np.ndarray:
    """Commands [N, T, A]: an episode's own, then the next one's, and so on around."""
    recorded = [one.recording.actions_TA for one in groundings if one.recording is not None]
    rows = []
    for index in range(len(recorded)):
        row, place = [recorded[index]], index
        while sum(map(len, row)) < frames:
            place = (place + 1) % len(recorded)
            row.append(recorded[place])
        rows.append(np.concatenate(row)[:frames])
    return np.stack(rows)


def _measure(
    reference: Reference,
    video_TVHWC: np.ndarray,
    before_VHWC: np.ndarray,
    last_known_VHWC: np.ndarray,
    first: int,
) -> dict[str, np.ndarray]:
    """All curves over one segment that begins with imagined frame `first`."""
    recording = reference.grounding.recording
    assert recording is not None
    truth_TVHWC = recording.frames_TVHWC[first : first + len(video_TVHWC)]
    found = {name: np.full(len(video_TVHWC), np.nan) for name in ("psnr", "psnr_copy", "background_psnr")}
    known = len(truth_TVHWC)
    if known:
        found["psnr"][:known] = psnr(video_TVHWC[:known], truth_TVHWC).mean(-1)
        held = np.broadcast_to(last_known_VHWC, truth_TVHWC.shape)
        found["psnr_copy"][:known] = psnr(held, truth_TVHWC).mean(-1)
    if reference.still_VHW.any():
        still_TX13 = video_TVHWC[:, reference.still_VHW][:, :, None]
        found["background_psnr"] = psnr(still_TX13, reference.scene_VHWC[reference.still_VHW][:, None])
    for name, values in _looks(video_TVHWC, before_VHWC).items():
        found[f"{name}_ratio"] = values / max(reference.looks[name], 1e-9)
    return found


def _looks(video_TVHWC: np.ndarray, before_VHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Contrast, sharpness and motion [T], mean over views."""
    found = [
        appearance(
            video_TVHWC[None, :, view].astype(np.float32) / 255, before_VHWC[view].astype(np.float32) / 255
        )
        for view in range(video_TVHWC.shape[1])
    ]
    return {name: np.mean([one[name] for one in found], 0) for name in found[0]}


def _mean(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of what is known at each frame; NaN where nothing is."""
    stacked_NT = np.stack(curves)
    known_NT = np.isfinite(stacked_NT)
    count_T = known_NT.sum(0)
    total_T = np.where(known_NT, stacked_NT, 0).sum(0)
    return np.where(count_T > 0, total_T / np.maximum(count_T, 1), np.nan)


def _finite_mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
