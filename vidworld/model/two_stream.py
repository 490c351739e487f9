"""One identity, two sides: training with context and target streams, rolling out with a KV cache.

A target frame i of `target_predictor` sees the context frames before i at their own noise, and itself. A
frame denoised by `cached_predictor` sees the same frames as `ingest` committed them. Both give the same
numbers, so what is trained is what is rolled out. Shapes: B batch, T frames, M target streams.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vidworld.model.cache import KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, Streams
from vidworld.types import Frames, SignalLevel

# Context frames are read, not denoised: they carry no step size, which tells the network which they are.
CONTEXT_STEP = 0.0


class TargetPredict(Protocol):
    """`Predict` over the target frames, on a subset of the batch if asked."""

    def __call__(self, frames: Frames, level: SignalLevel, step_BT: Tensor, rows: slice = ...) -> Frames: ...


def target_predictor(
    model: CausalDiT,
    context: Frames,
    context_level: SignalLevel,
    conditioning: Conditioning,
    num_targets: int = 1,
) -> TargetPredict:
    """Close over the context stream, so that an objective only sees the frames it denoises.

    context: T frames at signal level `context_level` [B, T]; conditioning: of those T frames. The returned
    predict takes M = num_targets streams of the same T frames, joined along time: frames [B, M*T, ...], level
    and step [B, M*T], and answers alike; `unflatten(1, (M, T))` parts them again. Streams do not see each
    other. conditioning.noise_BTX, if any, belongs to the targets: [B, M*T, X]; the context's is zero. `rows`
    selects the batch rows that the given frames belong to, such as those of the half steps of a bootstrap.
    """
    streams = Streams(context=context.num_frames, targets=num_targets)
    conditioning = _tile(conditioning, num_targets)

    def predict(frames: Frames, level: SignalLevel, step_BT: Tensor, rows: slice = slice(None)) -> Frames:
        seen, seen_level = context[rows], context_level[rows]
        both, _ = model(
            Frames.cat([seen, frames], dim=1),
            SignalLevel.cat([seen_level, level], dim=1),
            torch.cat([torch.full_like(seen_level.signal, CONTEXT_STEP), step_BT], dim=1),
            conditioning[rows],
            streams=streams,
        )
        return both[:, streams.context :]

    return predict


def ingest(
    model: CausalDiT,
    frames: Frames,
    level: SignalLevel,
    conditioning: Conditioning,
    cache: KVCache | None = None,
) -> KVCache:
    """Commit known frames, at the signal level they are given at, behind those in the cache."""
    conditioning = replace(conditioning, noise_BTX=None)
    _, cache = model(
        frames,
        level,
        torch.full_like(level.signal, CONTEXT_STEP),
        conditioning,
        streams=Streams(context=frames.num_frames),
        cache=cache,
        commit=True,
    )
    assert cache is not None
    return cache


def cached_predictor(model: CausalDiT, conditioning: Conditioning, cache: KVCache | None) -> TargetPredict:
    """Close over the cache: predict the one frame that follows it, [B, 1, ...], given its conditioning."""

    def predict(frames: Frames, level: SignalLevel, step_BT: Tensor, rows: slice = slice(None)) -> Frames:
        assert frames.num_frames == 1
        assert rows == slice(None), "the cache holds every row"
        prediction, _ = model(frames, level, step_BT, conditioning, streams=Streams(context=1), cache=cache)
        return prediction

    return predict


def _tile(conditioning: Conditioning, num_targets: int) -> Conditioning:
    """Repeat along time for the context and each target stream; the context gets zero noise."""
    copies = 1 + num_targets
    noise = conditioning.noise_BTX
    if noise is not None:
        num_frames = conditioning.keep_BT.shape[1]
        assert noise.shape[1] == num_targets * num_frames, (noise.shape, num_targets, num_frames)
        noise = torch.cat([torch.zeros_like(noise[:, :num_frames]), noise], dim=1)
    return Conditioning(
        conditioning.actions_BTkA.repeat(1, copies, 1, 1),
        conditioning.keep_BT.repeat(1, copies),
        conditioning.embodiment_B,
        noise,
        conditioning.member_B,
    )
