"""Rollouts many times longer than training clips: known positions, no jump as the window rolls, one scene."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.tokenizers.base import chunk_actions
from vidworld.types import Frames
from vidworld.world import dynamics
from vidworld.world.engine import RolloutEngine
from vidworld.world.noise import NoiseStream
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

TRAINED = 4
"""Frames of the clips that `learnt_world` was trained on."""
ROWS, PERIODS = 24, 24
CONSTANT = 3
"""Channel of the toy data that stays the same all clip long: the identity of the scene."""


def jump_ratio(motion_T: np.ndarray, period: int) -> float:
    """Mean motion at the worst phase of a period over the mean motion."""
    by_phase = motion_T[: len(motion_T) // period * period].reshape(-1, period).mean(0)
    return float(by_phase.max() / by_phase.mean())


def peak(motion_T: np.ndarray, period: int) -> float:
    """Power of the change at this period and its harmonics, over the median power at other frequencies."""
    power_F = np.abs(np.fft.rfft(motion_T - motion_T.mean())) ** 2
    own = np.zeros(len(power_F), bool)
    own[len(motion_T) // period :: len(motion_T) // period] = True
    others = ~own
    others[0] = False
    return float(power_F[own].mean() / np.median(power_F[others]))


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("fast", [False, True])
def test_no_position_is_beyond_training(
    world: WorldModel,
    prompt: Callable,
    actions: Callable,
    monkeypatch: pytest.MonkeyPatch,
    sink: int,
    fast: bool,
) -> None:
    """At 8 times the window, and in the engine too."""
    sampler = dataclasses.replace(world.spec.sampler, window=6, sink=sink, steps=1)
    seen: list[int] = []
    own = CausalDiT.rotation

    def recorded(self: CausalDiT, positions_NP: torch.Tensor, dtype: torch.dtype):
        if positions_NP.shape[-1] == 1:  # time
            seen.append(int(positions_NP.max()))
        return own(self, positions_NP, dtype)

    monkeypatch.setattr(CausalDiT, "rotation", recorded)
    with torch.no_grad():
        state = world.reset(prompt(world), 2, sampler=sampler)
        if fast:
            RolloutEngine(world, sampler=sampler).rollout(state, actions(world, 48), decode=False)
        else:
            after = world.rollout(state, actions(world, 48), sampler=sampler, decode=False).state
            assert after.cache.num_frames == 6
    assert seen
    assert max(seen) == 5, "the last one of a window of 6"


@pytest.fixture(scope="module")
def scenes(learnt_world: WorldModel, clips: Callable) -> Callable[..., np.ndarray]:
    """How the constant of scenes changes over 24 windows: [rows, frames], 0 is as it began."""

    def roll_out(sink: int = 0) -> np.ndarray:
        world, frames = learnt_world, TRAINED * PERIODS
        clean, actions_BTA, embodiment_B = clips(world, ROWS, 3 + frames, seed=77)
        sampler = SamplerConfig(steps=1, window=TRAINED, sink=sink, context_noise=0.1)
        stream = NoiseStream(0, torch.arange(ROWS), torch.float32)
        actions_BTkA, keep_BT = chunk_actions(world.normalizer.actions(actions_BTA, embodiment_B), 1)
        conditioning = Conditioning(actions_BTkA, keep_BT, embodiment_B)
        known: Frames = clean[:, :3]
        _, cache = dynamics.take_in(
            world.model, None, known, None, conditioning.frames(slice(0, 3)), 0, stream, sampler
        )
        shown = []
        for t in range(3, 3 + frames):
            one = conditioning.frames(slice(t, t + 1))
            frame, cache = dynamics.imagine(world.model, cache, one, t, stream, sampler)
            shown.append(frame.latents_BTVChw[:, 0, 0, CONSTANT].mean((-2, -1)))
        began_B1 = known.latents_BTVChw[:, :, 0, CONSTANT].mean((1, 2, 3))[:, None]
        return (torch.stack(shown, 1) - began_B1).numpy()

    return roll_out


def changes(shown_BT: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(shown_BT, axis=1)).mean(0)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is emptied once in a window: rollouts in chunks that do not know each other."""
    roll, calls = KVCache.roll, iter(range(10**6))

    def emptied(self: KVCache, window: int, sink: int = 0) -> KVCache:
        cache = roll(self, window, sink)
        if next(calls) % TRAINED:
            return cache
        return KVCache(tuple(KeyValue(*(t[:, :, :, :0] for t in layer)) for layer in cache.layers))

    monkeypatch.setattr(KVCache, "roll", emptied)


def test_nothing_comes_back_with_the_window(scenes: Callable) -> None:
    motion_T = changes(scenes())
    assert jump_ratio(motion_T, TRAINED) < 1.12
    assert peak(motion_T, TRAINED) < 3


def test_the_measure_sees_chunks_that_do_not_know_each_other(forgetful: None, scenes: Callable) -> None:
    """The negative control."""
    motion_T = changes(scenes())
    assert jump_ratio(motion_T, TRAINED) > 1.3
    assert jump_ratio(motion_T, TRAINED + 1) < 1.15, "of this period alone"
    assert peak(motion_T, TRAINED) > 10


def test_a_pinned_first_frame_keeps_the_scene(scenes: Callable) -> None:
    """Far beyond the training length the scene is what it was after one window; without a sink it wanders."""
    pinned, free = (np.abs(scenes(sink)).mean(0) for sink in (1, 0))
    assert pinned[-8:].mean() < 1.3 * pinned[:8].mean()
    assert free[-8:].mean() > 1.3 * pinned[-8:].mean(), "negative control"
