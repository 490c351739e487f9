"""How new what it is shown is to a world: how far frames are from what it expects, and where members part.

Each known frame is predicted in one step from the known frames before it, from no noise (`temperature` 0),
and held to what came. Nothing is sampled, so members' disagreement has no spread of samples in it; nothing is
rolled out, so it costs one pass over the prompt a member. Shapes: P prompts, J members, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidworld.diffusion.path import constant_level, mix
from vidworld.errors import DataError
from vidworld.model.inputs import Conditioning
from vidworld.model.two_stream import target_predictor
from vidworld.tokenizers.base import chunk_actions
from vidworld.types import Frames
from vidworld.world.ensemble import Ensemble
from vidworld.world.intake import gather_prompts
from vidworld.world.noise import CONTEXT, NoiseStream
from vidworld.world.prompt import Prompt
from vidworld.world.world import WorldModel


@dataclass(frozen=True)
class Novelty:
    """Of every known frame but the first, in squared normalised units; higher is newer."""

    surprise_PT: Tensor
    """Mean squared error of the latents that the first member expects."""
    proprio_PT: Tensor
    """The same of proprioception; 0 where a prompt has none."""
    disagreement_PT: Tensor | None
    """Variance of the members' means, mean over latents: what the model does not know. None for one."""


@torch.no_grad()
def novelty(
    world: WorldModel, prompt: Prompt | Sequence[Prompt], *, seed: int = 0, allow_out_of_range: bool = True
) -> Novelty:
    """Measure prompts of equal length, two frames or more each.

    Meant for worlds that predict means from no noise (`objective.energy.mean_weight`, or `regression`). Of a
    prompt longer than the window the newest frames count. The noise in the context is the same for every
    prompt. Raises DataError or ContractError as `reset` does.
    """
    prompts = [prompt] if isinstance(prompt, Prompt) else list(prompt)
    given = gather_prompts(prompts, world.spec, allow_out_of_range=allow_out_of_range)
    members = world.members if isinstance(world, Ensemble) else [world]
    device, k = world.device, world.spec.frames_per_step
    latents_PTVChw, _ = world.codec.begin(given.video_PTVHWC.to(device))
    if latents_PTVChw.shape[1] < 2:
        raise DataError("frames of a prompt to be surprised by", got=1, expected="2 or more")
    embodiment_P = given.embodiment_P.to(device)
    newest = slice(-world.spec.sampler.window, None)
    latents_PTVChw = latents_PTVChw[:, newest]
    has_proprio_P, has_actions_P1 = given.has_proprio_P.to(device), given.has_actions_P[:, None].to(device)
    means, squared = [], None
    for member in members:
        proprio_PTS = given.proprio_PTS[:, ::k][:, newest].to(device, member.dtype)
        clean = Frames(latents_PTVChw.to(member.dtype), member.normalizer.proprio(proprio_PTS, embodiment_P))
        actions_PTA = member.normalizer.actions(given.actions_PTA.to(device, member.dtype), embodiment_P)
        actions_PTkA, keep_PT = chunk_actions(actions_PTA, k)
        conditioning = Conditioning(actions_PTkA, keep_PT & has_actions_P1, embodiment_P).frames(newest)
        expected = _expected(member, clean, conditioning, seed)
        means.append(expected.latents_BTVChw[:, 1:].float())
        if squared is None:
            squared = expected.map(lambda one, true: (one - true)[:, 1:].float().square(), clean)
    assert squared is not None
    disagreement_PT = None
    if len(members) > 1:
        disagreement_PT = torch.stack(means).var(0).flatten(2).mean(-1)
    proprio_PTS = squared.proprio_BTS * has_proprio_P[:, None, None]
    proprio_PT = proprio_PTS.mean(-1) if proprio_PTS.shape[-1] else proprio_PTS.sum(-1)
    return Novelty(squared.latents_BTVChw.flatten(2).mean(-1), proprio_PT, disagreement_PT)


def _expected(member: WorldModel, clean: Frames, conditioning: Conditioning, seed: int) -> Frames:
    """The mean of every frame, in one step from those before it."""
    shape, sampler = member.spec.shape, member.spec.sampler
    rows, frames = clean.proprio_BTS.shape[:2]
    stream = NoiseStream(seed, torch.zeros(rows, dtype=torch.int64, device=member.device), member.dtype)
    (noise,) = stream.frames(shape, range(frames), CONTEXT)
    level = constant_level(clean, 1 - sampler.context_noise)
    if noise_dims := member.spec.model.noise_dims:
        conditioning = replace(conditioning, noise_BTX=clean.proprio_BTS.new_zeros(rows, frames, noise_dims))
    predict = target_predictor(member.model, mix(clean, noise, level), level, conditioning)
    nothing = constant_level(clean, 0.0)
    with member.precision():
        return predict(clean.map(torch.zeros_like), nothing, torch.ones_like(nothing.signal))
