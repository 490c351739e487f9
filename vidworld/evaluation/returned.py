"""Does a view look the same when the robot comes back to it? There and back within one window, and compare.

A world that forgets what it does not see invents it anew. The robot follows recorded commands for some frames
and then takes the same way back, so that it is last where it was first, while the first view is still in
sight of the model. What it moved on the way may rightly differ.

Shapes: N rollouts, T frames, V views, H W pixels, A action dims, S proprio dims.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError
from vidworld.evaluation.grounding import Grounding
from vidworld.evaluation.metrics import psnr
from vidworld.world.engine import RolloutEngine
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

SETTLE = 2
"""Frames in which the last command is held: arms arrive late."""
LEAST_TURN = 2
"""Frames away; a shorter way leads nowhere."""


def there_and_back(
    contract: ActionContract, recorded_TA: np.ndarray, last_A: np.ndarray | None, turn: int
) -> np.ndarray | None:
    """Commands [2 turn + SETTLE, A]: the first `turn` recorded ones, the way back, and rest.

    Positions and switches are commanded in reverse, down to the last command before the recorded ones
    (`last_A`); rates and steps in reverse with the opposite sign, and then zero. None where that is not
    known: a force has no way back, and a position none to where no command is known.
    """
    kinds = np.array([dimension.kind for dimension in contract.action])
    by_sign_A = np.isin(kinds, ("velocity", "delta"))
    by_place_A = np.isin(kinds, ("position", "binary"))
    if not (by_sign_A | by_place_A).all() or (by_place_A.any() and last_A is None) or len(recorded_TA) < turn:
        return None
    there_TA = np.asarray(recorded_TA[:turn], np.float64)
    before_A = np.zeros(len(kinds)) if last_A is None else np.asarray(last_A, np.float64)
    places_TA = np.concatenate([there_TA[-2::-1], before_A[None]]) if turn > 1 else before_A[None]
    back_TA = np.where(by_sign_A, -there_TA[::-1], places_TA)
    rest_A = np.where(by_sign_A, 0.0, before_A)
    return np.concatenate([there_TA, back_TA, np.tile(rest_A, (SETTLE, 1))]).astype(np.float32)


def returned(
    world: WorldModel, groundings: Sequence[Grounding], sampler: SamplerConfig, *, context: int, seed: int = 0
) -> dict[str, Any] | None:
    """PSNR in dB of imagined views against the last known one: at the turn, and back again; plain JSON.

    `frames` is how long it took; `psnr_turn` says how far away the view was, `psnr_return` how like itself it
    came back, `psnr_bound` what the tokenizer alone allows. `proprio_turn` and `proprio_return`: the same of
    the robot's own state, root mean square in normalised units, 0 where it began. All are means over
    rollouts. None where commands have no way back, or the window is too short for one.
    """
    if world.spec.frames_per_step != 1:
        return None
    turn = (sampler.window - context - SETTLE) // 2
    if turn < LEAST_TURN:
        return None
    chosen, rows = [], []
    for grounding in groundings:
        if grounding.recording is None:
            raise ConfigError("a grounding without a recording", fix="ground it in an episode")
        actions = grounding.prompt.actions
        last_A = None if actions is None or not len(actions) else actions[-1]
        commands_TA = there_and_back(grounding.contract, grounding.recording.actions_TA, last_A, turn)
        if commands_TA is not None:
            chosen.append(grounding)
            rows.append(commands_TA)
    if not chosen:
        return None
    with torch.no_grad():
        state = world.reset(
            [one.prompt for one in chosen],
            seed=seed,
            sample_ids=[0] * len(chosen),
            sampler=sampler,
            allow_out_of_range=True,
        )
        rolled = RolloutEngine(world, sampler=sampler).rollout(state, np.stack(rows), allow_out_of_range=True)
        first = world.observation(state)
        assert rolled.video_BTVHWC is not None
        assert first.video_BVHWC is not None
        proprio_BTS = world.normalizer.proprio(rolled.proprio_BTS, state.embodiment_B)
        began_B1S = state.newest.proprio_BTS
    video_NTVHWC = rolled.video_BTVHWC.cpu().numpy()
    last_NVHWC = np.stack([np.asarray(one.prompt.frames_TVHWC(world.spec))[-1] for one in chosen])
    away_BT = (proprio_BTS - began_B1S).square().mean(-1).sqrt().mean(0).tolist()
    return {
        "rollouts": len(chosen),
        "frames": video_NTVHWC.shape[1],
        "psnr_turn": float(psnr(video_NTVHWC[:, turn - 1], last_NVHWC).mean()),
        "psnr_return": float(psnr(video_NTVHWC[:, -1], last_NVHWC).mean()),
        "psnr_bound": float(psnr(first.video_BVHWC.cpu().numpy(), last_NVHWC).mean()),
        "proprio_turn": away_BT[turn - 1],
        "proprio_return": away_BT[-1],
    }
