from dataclasses import replace

import pytest
import torch

from vidworld.config import from_mapping, to_mapping
from vidworld.errors import ConfigError
from vidworld.model.config import DiTConfig
from vidworld.model.dit import Axis, CausalDiT, SelfAttention
from vidworld.model.inputs import FrameShape, Streams
from vidworld.model.rope import axial_rotation
from vidworld.types import Frames, SignalLevel

EXACT = 1e-11


def run(model, clip):
    return model(*clip.parts(), streams=Streams(clip.frames.num_frames))[0]


def change_frame(frames, index):
    def changed(tensor):
        tensor = tensor.clone()
        tensor[:, index] += 1
        return tensor

    return frames.map(changed)


def change_actions(conditioning, index):
    actions = conditioning.actions_BTkA.clone()
    actions[:, index] += 1
    return replace(conditioning, actions_BTkA=actions, keep_BT=torch.ones_like(conditioning.keep_BT))


def change_level(level, index):
    signal = level.signal.clone()
    signal[:, index] = 1 - signal[:, index]
    return SignalLevel.from_signal(signal)


def change_step(step_BT, index):
    step_BT = step_BT.clone()
    step_BT[:, index] += 0.25
    return step_BT


CHANGES = {
    "frames": change_frame,
    "level": change_level,
    "step_BT": change_step,
    "conditioning": change_actions,
}


@pytest.mark.parametrize("name", CHANGES)
def test_causality(make_model, make_clip, difference, name):
    """What changes at frame 3 leaves the outputs before it as they are, and changes those from it on."""
    model, clip = make_model(), make_clip()
    clip = replace(clip, conditioning=change_actions(clip.conditioning, slice(0, 0)))
    before = run(model, clip)
    after = run(model, replace(clip, **{name: CHANGES[name](getattr(clip, name), 3)}))
    assert difference(after[:, :3], before[:, :3]) == 0
    for frame in (3, 4):
        assert difference(after[:, frame : frame + 1], before[:, frame : frame + 1]) > 1e-3


def test_rows_do_not_see_each_other(make_model, make_clip, difference):
    model, clip = make_model(), make_clip()
    assert difference(run(model, clip[1:2]), run(model, clip)[1:2]) < EXACT


def test_an_untrained_model_predicts_the_mean(make_clip):
    clip = make_clip()
    shape = FrameShape(2, 3, 4, 6, 5, 4, actions_per_frame=2, num_embodiments=2)
    model = CausalDiT(DiTConfig(width=64, depth=4, num_heads=4, time_every=2), shape).double()
    prediction = run(model, clip)
    assert not prediction.latents_BTVChw.any()
    assert not prediction.proprio_BTS.any()
    prediction.latents_BTVChw.sum().backward()
    assert model.patch_head.weight.grad.abs().max() > 0


def test_gradient_reaches_actions_noise_and_every_parameter(make_model, make_clip):
    model, clip = make_model(noise_dims=3, previous_frame=True, copy_gate=True), make_clip(noise_dims=3)
    model.requires_grad_(True)
    conditioning = clip.conditioning
    conditioning.actions_BTkA.requires_grad_()
    conditioning.noise_BTX.requires_grad_()
    prediction = run(model, clip)
    (prediction.latents_BTVChw.square().sum() + prediction.proprio_BTS.square().sum()).backward()
    gradient_BT = conditioning.actions_BTkA.grad.abs().amax((-1, -2))
    assert torch.equal(gradient_BT > 0, conditioning.keep_BT)
    assert conditioning.noise_BTX.grad.abs().min() > 0
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropped_actions_are_not_read(make_model, make_clip, difference):
    model, clip = make_model(), make_clip()
    dropped = replace(clip, conditioning=clip.conditioning.without_actions())
    nonsense = replace(dropped.conditioning, actions_BTkA=clip.conditioning.actions_BTkA * torch.nan)
    assert difference(run(model, replace(clip, conditioning=nonsense)), run(model, dropped)) == 0
    assert difference(run(model, clip), run(model, dropped)) > 1e-3


def test_order_of_the_actions_of_a_frame_matters(make_model, make_clip, difference):
    model, clip = make_model(), make_clip()
    flipped = replace(clip.conditioning, actions_BTkA=clip.conditioning.actions_BTkA.flip(2))
    assert difference(run(model, replace(clip, conditioning=flipped)), run(model, clip)) > 1e-3


def test_padding_of_an_embodiment_cannot_leak(make_model, make_clip, difference):
    """Embodiment 0 has 4 actions and 3 of 5 proprio dims; embodiment 1 has 2 of 4 actions and 5."""
    model, clip = make_model(), make_clip()
    before = run(model, clip)
    proprio, actions = clip.frames.proprio_BTS.clone(), clip.conditioning.actions_BTkA.clone()
    proprio[0::2, :, 3:] = torch.nan
    actions[1::2, ..., 2:] = torch.nan
    changed = replace(
        clip,
        frames=Frames(clip.frames.latents_BTVChw, proprio),
        conditioning=replace(clip.conditioning, actions_BTkA=actions),
    )
    assert difference(run(model, changed), before) == 0
    assert not before.proprio_BTS[0::2, :, 3:].any()
    assert before.proprio_BTS[1::2].all()


def test_weights_of_one_embodiment_do_not_touch_another(make_model, make_clip, difference):
    model, clip = make_model(), make_clip()
    before = run(model, clip)
    for parameter in model.parameters():
        if parameter.shape[0] == 2 and parameter.ndim == 3:
            parameter[1] += 1
    after = run(model, clip)
    assert difference(after[0::2], before[0::2]) == 0
    assert difference(after[1::2], before[1::2]) > 1e-3


def test_views_are_told_apart_by_their_embedding_alone(make_model, make_clip, difference):
    """Swapping the cameras and their embeddings swaps the predicted pictures and leaves proprio alone."""
    model, clip = make_model(), make_clip()
    before = run(model, clip)
    swapped = replace(clip, frames=Frames(clip.frames.latents_BTVChw.flip(2), clip.frames.proprio_BTS))
    after = run(model, swapped)
    model.token_embedding.view_VD.copy_(model.token_embedding.view_VD.flip(0).clone())
    both = run(model, swapped)
    assert difference(Frames(both.latents_BTVChw.flip(2), both.proprio_BTS), before) < EXACT
    assert difference(Frames(after.latents_BTVChw.flip(2), after.proprio_BTS), before) > 1e-3


def test_patches_know_where_they_are(make_model, make_clip):
    """Negative control of the rotations: moving the picture by a patch does not just move the output."""
    model, clip = make_model(), make_clip()
    moved = clip.frames.latents_BTVChw.roll(2, -1)
    after = run(model, replace(clip, frames=Frames(moved, clip.frames.proprio_BTS)))
    assert (after.latents_BTVChw - run(model, clip).latents_BTVChw.roll(2, -1)).abs().max() > 1e-3


def test_grouped_heads_equal_a_model_with_repeated_ones(make_model, make_clip, difference):
    grouped, clip = make_model(), make_clip()
    full = make_model(num_kv_heads=4)
    full.load_state_dict(grouped.state_dict() | expanded(grouped), strict=True)
    assert difference(run(full, clip), run(grouped, clip)) < EXACT


def expanded(model):
    """qkv weights with each key-value head repeated for the query heads of its group."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            q, k, v = module.qkv.weight.unflatten(0, (-1, module.head_dim)).split(module.heads)
            repeated = [q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]
            weights[f"{name}.qkv.weight"] = torch.cat(repeated).flatten(0, 1)
    return weights


def test_queries_and_keys_are_normalised(make_model):
    """Scaling the input scales values but not scores, so the output scales alike."""
    attention, x_GnD = make_model().blocks[0].space, torch.randn(2, 7, 64, dtype=torch.float64)
    rotation = axial_rotation(torch.arange(7)[:, None], 16, x_GnD.dtype)
    axis = Axis(rotation, rotation, None, "sdpa")
    torch.testing.assert_close(attention(x_GnD * 10, axis)[0], attention(x_GnD, axis)[0] * 10)


def test_zero_noise_is_no_noise(make_model, make_clip, difference):
    model, clip = make_model(noise_dims=3), make_clip(noise_dims=3)
    silent = replace(clip.conditioning, noise_BTX=None)
    zeros = replace(clip.conditioning, noise_BTX=torch.zeros_like(clip.conditioning.noise_BTX))
    expected = run(model, replace(clip, conditioning=silent))
    assert difference(run(model, replace(clip, conditioning=zeros)), expected) == 0
    assert difference(run(model, clip), expected) > 1e-3


def test_state_dict_round_trip(make_model, make_clip, difference):
    model, clip = make_model(noise_dims=3), make_clip(noise_dims=3)
    other = CausalDiT(model.config, model.shape).double()
    other.load_state_dict(model.state_dict())
    assert difference(run(other, clip), run(model, clip)) == 0
    assert not any("positions" in name or "valid" in name for name in model.state_dict())


def test_half_precision_answers_in_the_dtype_it_was_asked_in(make_model, make_clip, difference):
    model, clip = make_model(), make_clip()
    exact = run(model, clip)
    single = clip.to(torch.float32)
    scale = exact.latents_BTVChw.std()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model.float(), single)
    explicit = run(model.bfloat16(), single)
    for prediction in (mixed, explicit):
        assert prediction.latents_BTVChw.dtype == prediction.proprio_BTS.dtype == torch.float32
        assert (prediction.latents_BTVChw - exact.latents_BTVChw).std() < 0.1 * scale


@pytest.mark.parametrize("changes", [{"proprio_dims": 0}, {"action_dims": 0}])
def test_logs_without_proprio_or_actions(make_model, make_clip, changes):
    shape = replace(FrameShape(1, 3, 4, 4, proprio_dims=2, action_dims=2, num_embodiments=2), **changes)
    prediction = run(make_model(shape), make_clip(shape=shape))
    assert prediction.latents_BTVChw.isfinite().all()
    assert prediction.proprio_BTS.shape[-1] == shape.proprio_dims


def test_token_count(make_model):
    model = make_model()
    assert model.num_patches == 2 * 2 * 3
    assert model.tokens_per_frame == 12 + 1 + 2 + 2


def test_time_attention_in_every_nth_block():
    shape = FrameShape(1, 3, 4, 4, 2, 2)
    model = CausalDiT(DiTConfig(width=32, depth=8, num_heads=2, time_every=4), shape)
    assert [block.time is not None for block in model.blocks] == [False, False, False, True] * 2


def test_config_round_trip():
    config = DiTConfig(width=64, num_heads=4)
    assert from_mapping(DiTConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 100},
        {"num_heads": 4, "num_kv_heads": 3},
        {"width": 36, "num_heads": 6},
        {"depth": 3},
        {"num_kv_heads": 0},
        {"noise_dims": -1},
    ],
)
def test_config_refuses(changes):
    with pytest.raises(ConfigError, match=r"setting '\w+' of the model"):
        replace(DiTConfig(), **changes)


def test_latents_must_divide_into_patches():
    with pytest.raises(ConfigError, match="got 5x4, expected a multiple of patch_size = 2"):
        CausalDiT(DiTConfig(), FrameShape(1, 3, 5, 4, 2, 2))
