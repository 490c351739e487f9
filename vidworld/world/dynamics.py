"""How frames are imagined and how known ones become context. Differentiable; no checks, no pixels.

Everything is normalised here. Shapes: B samples, T frames, S proprio dims, X noise dims.
"""

import dataclasses
from typing import get_args

import torch
from torch import Tensor

from vidworld.diffusion.guidance import guide
from vidworld.diffusion.path import constant_level, mix
from vidworld.diffusion.predict import Predict
from vidworld.diffusion.samplers import euler, heun
from vidworld.errors import ConfigError
from vidworld.model.cache import KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.model.two_stream import cached_predictor, ingest
from vidworld.types import Frames, SignalLevel
from vidworld.world.noise import CONTEXT, START, NoiseStream, Purpose
from vidworld.world.spec import Method, SamplerConfig


def imagine(
    model: CausalDiT,
    cache: KVCache,
    conditioning: Conditioning,
    frame: int,
    stream: NoiseStream,
    sampler: SamplerConfig,
    lead: int = 1,
    noise_BX: Tensor | None = None,
) -> tuple[Frames, KVCache]:
    """Denoise frame number `frame` [B, 1], the `lead`-th after the last known one, and commit it.

    `noise_BX`: the network's own noise, in place of the stream's.
    The cache is rolled first, so that with the new frame `sampler.window` frames are in sight: positions
    never leave the range that training saw.
    """
    cache = cache.roll(sampler.window - 1, sampler.sink)
    start, context = stream.frames(model.shape, [frame], START, CONTEXT)
    of_model = 1.0
    if sampler.scales_noise:
        latents, proprio, of_model = sampler.factors(lead)
        start = Frames(start.latents_BTVChw * latents, start.proprio_BTS * proprio)
    predict = _predictor(model, cache, conditioning, frame, stream, sampler.guidance, of_model, noise_BX)
    clean = sample(predict, start, sampler)
    return clean, commit(model, cache, clean, conditioning, context, sampler)


def take_in(
    model: CausalDiT,
    cache: KVCache | None,
    known: Frames,
    has_proprio_B: Tensor | None,
    conditioning: Conditioning,
    first_frame: int,
    stream: NoiseStream,
    sampler: SamplerConfig,
) -> tuple[Frames, KVCache]:
    """Commit known frames [B, T], numbered from `first_frame`; returns the newest one and the cache.

    `has_proprio_B` says whose proprioception is known, None that all is: then all frames go in one pass. Else
    it is read off the pictures, frame by frame. More frames than the window leaves room for lose the oldest,
    except for the sink; those kept count as consecutive, also for a network that reads the frame before.
    """
    room = sampler.window - 1
    indices = list(range(known.num_frames))
    if len(indices) > room:
        indices = indices[: sampler.sink] + indices[len(indices) - (room - sampler.sink) :]
        known = known[:, indices]
        kept = torch.tensor(indices, device=known.proprio_BTS.device)
        conditioning = dataclasses.replace(
            conditioning,
            actions_BTkA=conditioning.actions_BTkA[:, kept],
            keep_BT=conditioning.keep_BT[:, kept],
        )
    frames = [first_frame + index for index in indices]
    if cache is not None:
        cache = cache.roll(room, sampler.sink)
    (context,) = stream.frames(model.shape, frames, CONTEXT)
    if has_proprio_B is None:
        return known[:, -1:], commit(model, cache, known, conditioning, context, sampler)
    (start,) = stream.frames(model.shape, frames, START)
    if sampler.start_noise != 1:
        start = start.map(lambda tensor: tensor * sampler.start_noise)
    newest = known[:, :1]
    for t, frame in enumerate(frames):
        at = (slice(None), slice(t, t + 1))
        one = conditioning.frames(at[1])
        predict = _predictor(model, cache, one, frame, stream, 0.0)
        newest = read_proprio(predict, known[at], has_proprio_B, start[at], sampler)
        cache = commit(model, cache, newest, one, context[at], sampler)
    assert cache is not None
    return newest, cache


def read_proprio(
    predict: Predict, known: Frames, has_proprio_B: Tensor, start: Frames, sampler: SamplerConfig
) -> Frames:
    """Sample the unknown proprioception of a frame [B, 1] given its picture.

    Pictures and proprioception are denoised together, so a picture that is known only has to be held: with x
    the known latents as the prediction, z = (1 - tau) eps + tau x at every level, as in training. This is
    replacement conditioning (Song et al. 2021, appendix I.2) on a straight path.
    """
    has_proprio_B11 = has_proprio_B[:, None, None]

    def held(z: Frames, level: SignalLevel, step_BT: Tensor) -> Frames:
        read_B1S = predict(z, level, step_BT).proprio_BTS
        return Frames(known.latents_BTVChw, torch.where(has_proprio_B11, known.proprio_BTS, read_B1S))

    read_B1S = sample(held, start, sampler).proprio_BTS
    return Frames(known.latents_BTVChw, torch.where(has_proprio_B11, known.proprio_BTS, read_B1S))


def sample(predict: Predict, start: Frames, sampler: SamplerConfig) -> Frames:
    """Run the sampler from noise to clean frames."""
    match sampler.method:
        case "euler":
            return euler(predict, start, sampler.steps, finest_steps=sampler.finest_steps)
        case "heun":
            return heun(predict, start, sampler.steps, finest_steps=sampler.finest_steps)
    raise ConfigError("sampler.method", got=sampler.method, expected=" | ".join(get_args(Method)))


def commit(
    model: CausalDiT,
    cache: KVCache | None,
    clean: Frames,
    conditioning: Conditioning,
    noise: Frames,
    sampler: SamplerConfig,
) -> KVCache:
    """Append frames to the context with a little of `noise`, whose level the model is told.

    Without it a model that was trained on perfect context drifts within tens of frames (GameNGen, Valevski et
    al. 2024, section 3.2.1).
    """
    level = constant_level(clean, 1 - sampler.context_noise)
    return ingest(model, mix(clean, noise, level), level, conditioning, cache)


def _predictor(
    model: CausalDiT,
    cache: KVCache | None,
    conditioning: Conditioning,
    frame: int,
    stream: NoiseStream,
    guidance: float,
    noise_factor: float = 1.0,
    noise_BX: Tensor | None = None,
) -> Predict:
    if model.config.noise_dims:
        if noise_BX is None:
            noise_BX = stream.draw(frame, Purpose.MODEL, (model.config.noise_dims,))
        conditioning = dataclasses.replace(conditioning, noise_BTX=(noise_BX * noise_factor)[:, None])
    return guide(
        cached_predictor(model, conditioning, cache),
        cached_predictor(model, conditioning.without_actions(), cache),
        guidance,
    )
