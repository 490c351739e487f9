"""Does the model listen to its actions? Its denoising loss under true actions against wrong ones.

A world model that ignores its commands still predicts plausible video, and its training loss falls all the
same; this is the alarm for that. Shapes: B batch, T frames, A action dims, S proprio dims.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidworld.diffusion.path import constant_level, mix
from vidworld.errors import ConfigError
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.model.normalizer import Normalizer
from vidworld.model.two_stream import target_predictor
from vidworld.tokenizers.base import chunk_actions
from vidworld.types import Frames
from vidworld.world.noise import CONTEXT, START, NoiseStream

WRONG = ("shuffled", "zero", "shifted", "dropped")
"""The wrong actions, each explained at `action_faithfulness`."""


@torch.no_grad()
def action_faithfulness(
    model: CausalDiT,
    normalizer: Normalizer,
    clean: Frames,
    actions_BTA: Tensor,
    embodiment_B: Tensor,
    *,
    levels: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    seed: int = 0,
    context_noise: float = 0.1,
    finest_steps: int = 16,
) -> dict[str, float]:
    """Denoising loss under true and wrong actions, with the very same frames, noise and levels.

    clean: normalised frames [B, T, ...]. actions_BTA: raw units as in a batch, row t leads from camera frame
    t to t + 1. levels: signal levels of the target frames, 0 = pure noise, where actions count most. Take
    `context_noise` and `finest_steps` from the sampler.

    The wrong actions are `shuffled` (those of another clip of the same embodiment), `zero` (the middle of
    each recorded range), `shifted` (one frame late) and `dropped` (the learned "no action").

    Returns floats, over all frames but the first: for the latents "true", "shuffled", ... (mean squared
    error) and "ratio_shuffled", ... (wrong / true: 1 means that the model ignores its actions); for
    proprioception the same names after "proprio_". Deterministic; takes 5 * len(levels) forward passes.
    Raises ConfigError where no clip has a partner to swap actions with.
    """
    num_clips, num_frames = clean.proprio_BTS.shape[:2]
    partner_B, has_partner_B = _partners(embodiment_B)
    if not bool(has_partner_B.any()):
        raise ConfigError("clips for action faithfulness", got=num_clips, expected="two of one embodiment")
    normalised_BTA = normalizer.actions(actions_BTA.to(clean.proprio_BTS.dtype), embodiment_B)
    late_BTA = torch.cat([normalised_BTA[:, :1], normalised_BTA[:, :-1]], 1)
    given = {
        "true": normalised_BTA,
        "shuffled": normalised_BTA[partner_B],
        "zero": torch.zeros_like(normalised_BTA),
        "shifted": late_BTA,
        "dropped": normalised_BTA,
    }
    stream = NoiseStream(seed, torch.arange(num_clips, device=embodiment_B.device), clean.proprio_BTS.dtype)
    shape = model.shape
    context_level = constant_level(clean, 1 - context_noise)
    numbers = range(num_frames)
    (noise,) = stream.frames(shape, numbers, CONTEXT)
    context = mix(clean, noise, context_level)

    errors: dict[str, Frames] = {}
    for name, actions in given.items():
        conditioning = Conditioning(*chunk_actions(actions, shape.actions_per_frame), embodiment_B)
        if name == "dropped":
            conditioning = conditioning.without_actions()
        predict = target_predictor(model, context, context_level, conditioning)
        at_levels = []
        for number, signal in enumerate(levels):
            # Noise of its own for each level, and the same for each kind of action.
            numbers = range(number * num_frames, (number + 1) * num_frames)
            (noise,) = stream.frames(shape, numbers, START)
            level = constant_level(clean, signal)
            predicted = predict(
                mix(clean, noise, level), level, torch.full_like(level.signal, 1 / finest_steps)
            )
            at_levels.append(predicted.map(_clip_error, clean))
        errors[name] = Frames(
            torch.stack([error.latents_BTVChw for error in at_levels]).mean(0),
            torch.stack([error.proprio_BTS for error in at_levels]).mean(0),
        )

    everyone_B = torch.ones_like(has_partner_B)
    result: dict[str, float] = {}
    roles = (("", "latents_BTVChw"), ("proprio_", "proprio_BTS"))
    for prefix, role in roles if shape.proprio_dims else roles[:1]:
        true_B = getattr(errors["true"], role)
        result[f"{prefix}true"] = float(true_B.mean())
        for name in WRONG:
            rows_B = has_partner_B if name == "shuffled" else everyone_B
            wrong = getattr(errors[name], role)[rows_B].mean()
            result[f"{prefix}{name}"] = float(wrong)
            result[f"{prefix}ratio_{name}"] = float(wrong / true_B[rows_B].mean())
    return result


def _partners(embodiment_B: Tensor) -> tuple[Tensor, Tensor]:
    """For each clip the next one of its embodiment, cyclically, and whether that is another clip."""
    partner_B = torch.arange(len(embodiment_B), device=embodiment_B.device)
    for embodiment in set(embodiment_B.tolist()):
        rows = torch.nonzero(embodiment_B == embodiment)[:, 0]
        partner_B[rows] = rows.roll(-1)
    return partner_B, partner_B != torch.arange(len(embodiment_B), device=embodiment_B.device)


def _clip_error(predicted: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error [B] over all frames but the first, to which no action leads."""
    return (predicted[:, 1:] - clean[:, 1:]).square().flatten(1).mean(1)
