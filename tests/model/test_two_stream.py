from dataclasses import replace
from functools import partial

import pytest
import torch

from vidworld.model.two_stream import cached_predictor, ingest, target_predictor
from vidworld.types import Frames, SignalLevel

EXACT = 1e-11
T = 5


@pytest.fixture(params=[False, True], ids=["attention", "previous frame"])
def make_model(make_model, request):
    """Models that see the past by attention alone, and such that are given the frame before as well."""
    return partial(make_model, previous_frame=request.param)


@pytest.fixture
def context(make_clip):
    return make_clip(time=T, noise_dims=0, seed=1)


@pytest.fixture
def targets(make_clip):
    return make_clip(time=T, noise_dims=3, seed=2)


def predictor(model, context, noise=None, num_targets=1):
    conditioning = replace(context.conditioning, noise_BTX=noise)
    return target_predictor(model, context.frames, context.level, conditioning, num_targets)


def answer(predict, clip, **rows):
    return predict(clip.frames, clip.level, clip.step_BT, **rows)


def joined(clips):
    return (
        Frames.cat([clip.frames for clip in clips], 1),
        SignalLevel.cat([clip.level for clip in clips], 1),
        torch.cat([clip.step_BT for clip in clips], 1),
    )


def test_training_equals_inference(make_model, context, targets, difference):
    """Target frame i equals frame i denoised against the committed cache of the context before it."""
    model, noise = make_model(noise_dims=3), targets.conditioning.noise_BTX
    trained = answer(predictor(model, context, noise), targets)
    cache = None
    for frame in range(T):
        now = slice(frame, frame + 1)
        conditioning = replace(context.conditioning, noise_BTX=noise).frames(now)
        got = answer(cached_predictor(model, conditioning, cache), targets.time(now))
        assert difference(got, trained[:, now]) < EXACT
        known = context.time(now)
        cache = ingest(model, known.frames, known.level, conditioning, cache)


def test_targets_see_the_context_before_them_and_no_other_target(make_model, context, targets, difference):
    model = make_model(noise_dims=3)
    before = answer(predictor(model, context), targets)

    def changed(tensor):
        tensor = tensor.clone()
        tensor[:, 2] += 1
        return tensor

    moved = answer(predictor(model, replace(context, frames=context.frames.map(changed))), targets)
    assert difference(moved[:, :3], before[:, :3]) == 0
    assert difference(moved[:, 3:4], before[:, 3:4]) > 1e-3

    moved = answer(predictor(model, context), replace(targets, frames=targets.frames.map(changed)))
    others = [0, 1, 3, 4]
    assert difference(moved[:, others], before[:, others]) == 0
    assert difference(moved[:, 2:3], before[:, 2:3]) > 1e-3


def test_the_frame_before_a_target_is_the_context_s(make_model, context, targets, difference):
    """With all gates of attention shut, the frame before is all that is seen of the past."""
    model = make_model(noise_dims=3)
    reads = model.config.previous_frame
    for block in model.blocks:
        for parameter in block.modulation.parameters():
            parameter.zero_()
    before = answer(predictor(model, context), targets)
    for part in ("latents_BTVChw", "proprio_BTS"):
        changed = getattr(context.frames, part).clone()
        changed[:, 2] += 1
        moved = replace(context, frames=replace(context.frames, **{part: changed}))
        after = answer(predictor(model, moved), targets)
        others = [0, 1, 2, 4]
        assert difference(after[:, others], before[:, others]) == 0
        assert (difference(after[:, 3:4], before[:, 3:4]) > 1e-3) == reads


def test_streams_are_independent(make_model, make_clip, context, difference):
    """M streams in one pass equal M passes with one stream each, noise included."""
    model = make_model(noise_dims=3)
    streams = [make_clip(time=T, noise_dims=3, seed=seed) for seed in (2, 3, 4)]
    noises = [stream.conditioning.noise_BTX for stream in streams]
    together = predictor(model, context, torch.cat(noises, 1), num_targets=3)(*joined(streams))
    parted = together.map(lambda tensor: tensor.unflatten(1, (3, T)))
    for index, (stream, noise) in enumerate(zip(streams, noises, strict=True)):
        alone = answer(predictor(model, context, noise), stream)
        assert difference(parted[:, index], alone) < EXACT


def test_row_subsets(make_model, context, targets, difference):
    model = make_model(noise_dims=3)
    predict = predictor(model, context, targets.conditioning.noise_BTX)
    rows = slice(0, 2)
    assert difference(answer(predict, targets[rows], rows=rows), answer(predict, targets)[rows]) < EXACT


def test_context_level_is_heard(make_model, context, targets, difference):
    model = make_model(noise_dims=3)
    louder = replace(context, level=SignalLevel.from_signal(1 - context.level.signal))
    before, after = (answer(predictor(model, clip), targets) for clip in (context, louder))
    assert difference(after[:, :1], before[:, :1]) == 0
    assert difference(after[:, 1:], before[:, 1:]) > 1e-3
