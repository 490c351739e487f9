"""Robots side by side: one's padding reaches nobody, and its rows of the tables go where it goes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.compile import compile_blocks
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.embodiments import Robots, carry_over, used_latents, used_tokens
from vidworld.model.inputs import FrameShape, Streams
from vidworld.types import Frames

CONFIG = DiTConfig(width=64, depth=4, num_heads=4, num_kv_heads=2, time_every=2, num_registers=2)
MIXED = FrameShape(
    views=3,
    channels=3,
    height=4,
    width=6,
    proprio_dims=5,
    action_dims=4,
    actions_per_frame=2,
    num_embodiments=3,
    embodiment_action_dims=(4, 2, 3),
    embodiment_proprio_dims=(3, 5, 1),
    embodiment_views=(1, 3, 2),
    embodiment_heights=(4, 4, 2),
    embodiment_widths=(6, 4, 2),
)
NAMES = ("a", "b", "c")
STREAMS = Streams(context=5)


def only(shape: FrameShape, index: int) -> FrameShape:
    """The shape that a model of this embodiment alone would have."""
    views, height, width = shape.grid(index)
    return FrameShape(
        views=views,
        channels=shape.channels,
        height=height,
        width=width,
        proprio_dims=shape.embodiment_proprio_dims[index],
        action_dims=shape.embodiment_action_dims[index],
        actions_per_frame=shape.actions_per_frame,
    )


def alone(model: CausalDiT, index: int) -> CausalDiT:
    """The model cut down to one embodiment."""
    before = Robots(NAMES, model.shape, model.config.patch_size)
    after = Robots((NAMES[index],), only(model.shape, index), model.config.patch_size)
    small = CausalDiT(model.config, after.shape).double()
    small.load_state_dict(carry_over(model.state_dict(), before, after))
    return small.requires_grad_(False)


def cut(clip, index: int):
    """The clip as a model of this embodiment alone takes it."""
    views, height, width = MIXED.grid(index)
    conditioning = clip.conditioning
    return dataclasses.replace(
        clip,
        frames=Frames(
            clip.frames.latents_BTVChw[:, :, :views, :, :height, :width],
            clip.frames.proprio_BTS[..., : MIXED.embodiment_proprio_dims[index]],
        ),
        conditioning=dataclasses.replace(
            conditioning,
            actions_BTkA=conditioning.actions_BTkA[..., : MIXED.embodiment_action_dims[index]],
            embodiment_B=torch.zeros_like(conditioning.embodiment_B),
        ),
    )


def run(model: CausalDiT, clip, streams: Streams = STREAMS) -> Frames:
    return model(*clip.parts(), streams=streams)[0]


@pytest.fixture(params=[False, True], ids=["attention", "previous frame"])
def model(make_model: Callable[..., CausalDiT], request: pytest.FixtureRequest) -> CausalDiT:
    return make_model(MIXED, previous_frame=request.param)


def scrambled(frames: Frames, embodiment_B: torch.Tensor, value: float) -> Frames:
    """The same frames with other values wherever they are padded."""
    used = used_latents(MIXED)[embodiment_B][:, None].expand_as(frames.latents_BTVChw)
    dims = torch.tensor(MIXED.embodiment_proprio_dims)[embodiment_B][:, None, None]
    valid = (torch.arange(MIXED.proprio_dims) < dims).expand_as(frames.proprio_BTS)
    return Frames(frames.latents_BTVChw.where(used, value), frames.proprio_BTS.where(valid, value))


@pytest.mark.parametrize("value", [0.0, 1e6, float("nan")])
def test_what_stands_in_the_padding_changes_no_bit(model, make_clip, value: float) -> None:
    clip = make_clip(batch=6, shape=MIXED)
    embodiment_B = clip.conditioning.embodiment_B
    expected = run(model, clip)
    other = dataclasses.replace(clip, frames=scrambled(clip.frames, embodiment_B, value))
    found = run(model, other)
    assert torch.equal(found.latents_BTVChw, expected.latents_BTVChw)
    assert torch.equal(found.proprio_BTS, expected.proprio_BTS)
    assert not found.latents_BTVChw[
        ~used_latents(MIXED)[embodiment_B][:, None].expand_as(found.latents_BTVChw)
    ].any()


@pytest.mark.parametrize("streams", [Streams(context=5), Streams(context=2, targets=2)])
def test_a_padded_row_is_the_clip_in_a_model_of_its_own(model, make_clip, difference, streams) -> None:
    clip = make_clip(time=streams.num_queries, batch=6, shape=MIXED)
    whole = run(model, clip, streams)
    for row in range(6):
        index = row % 3
        own = cut(clip[row : row + 1], index)
        views, height, width = MIXED.grid(index)
        of_row = Frames(
            whole.latents_BTVChw[row : row + 1, :, :views, :, :height, :width],
            whole.proprio_BTS[row : row + 1, :, : MIXED.embodiment_proprio_dims[index]],
        )
        assert difference(run(alone(model, index), own, streams), of_row) < 1e-10


def test_negative_control_without_the_mask_padding_leaks(model, make_clip, difference) -> None:
    clip = make_clip(batch=3, shape=MIXED)
    expected = run(model, clip)
    model.used_tokens_EN = torch.ones_like(model.used_tokens_EN)
    assert difference(run(model, clip), expected) > 1e-3


def test_neighbours_in_the_batch_change_nothing(model, make_clip, difference) -> None:
    clip = make_clip(batch=6, shape=MIXED)
    whole = run(model, clip)
    for row in range(6):
        assert difference(run(model, clip[row : row + 1]), whole[row : row + 1]) < 1e-12


def test_no_gradient_comes_from_padding_or_goes_there(model, make_clip) -> None:
    clip = make_clip(batch=3, shape=MIXED)
    latents = clip.frames.latents_BTVChw.requires_grad_()
    model.requires_grad_(True)
    found = run(model, clip)
    (found.latents_BTVChw.square().sum() + found.proprio_BTS.square().sum()).backward()
    used = used_latents(MIXED)[clip.conditioning.embodiment_B][:, None].expand_as(latents)
    assert latents.grad is not None
    assert not latents.grad[~used].any()
    assert latents.grad[used].all()
    # Only the three-view robot has a third view; alone in a batch, the others teach it nothing.
    model.zero_grad()
    found = run(model, clip[:1])
    (found.latents_BTVChw.square().sum() + found.proprio_BTS.square().sum()).backward()
    view_grad = model.token_embedding.view_VD.grad
    assert view_grad is not None
    assert view_grad[0].any()
    assert not view_grad[1:].any()


def test_a_model_of_equal_robots_has_no_mask(make_model) -> None:
    plain = dataclasses.replace(
        MIXED, embodiment_views=(3, 3, 3), embodiment_heights=(), embodiment_widths=(6, 6, 6)
    )
    model = make_model(plain)
    assert model.used_tokens_EN is None
    assert model.used_latents_EV1hw is None
    space, _ = model._axes(
        STREAMS, torch.zeros(1, 5, 3, 64, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    )
    assert space.mask is None


def test_special_tokens_belong_to_everyone() -> None:
    tokens_EN = used_tokens(MIXED, 2, num_special=5)
    assert tokens_EN.shape == (3, 3 * 2 * 3 + 5)
    assert tokens_EN[:, -5:].all()
    assert tokens_EN.sum(1).tolist() == [1 * 2 * 3 + 5, 3 * 2 * 2 + 5, 2 * 1 * 1 + 5]


def test_every_padded_size_must_be_whole_patches() -> None:
    with pytest.raises(ConfigError, match="latent size"):
        CausalDiT(CONFIG, dataclasses.replace(MIXED, embodiment_heights=(4, 3, 2)))
    with pytest.raises(ConfigError, match="embodiment_views"):
        dataclasses.replace(MIXED, embodiment_views=(4, 3, 2))
    with pytest.raises(ConfigError, match="embodiment_widths"):
        dataclasses.replace(MIXED, embodiment_widths=(6, 4))


@pytest.mark.slow
def test_compiled_blocks_take_the_mask(model, make_clip, difference) -> None:
    clip = make_clip(batch=3, shape=MIXED)
    expected = run(model, clip)
    compile_blocks(model, backend="aot_eager")
    assert difference(run(model, clip), expected) < 1e-10


@pytest.mark.parametrize("order", [("b", "new", "a"), ("new", "a", "b", "c")])
def test_known_robots_keep_every_bit_when_tables_grow(make_model, make_clip, order) -> None:
    """A new robot with more of everything comes in between; each old one predicts what it did."""
    old = make_model(MIXED, previous_frame=True)
    known = {name: index for index, name in enumerate(NAMES)}
    wider = FrameShape(
        views=4,
        channels=3,
        height=6,
        width=8,
        proprio_dims=7,
        action_dims=6,
        actions_per_frame=2,
        num_embodiments=len(order),
        embodiment_action_dims=tuple(
            MIXED.embodiment_action_dims[known[n]] if n in known else 6 for n in order
        ),
        embodiment_proprio_dims=tuple(
            MIXED.embodiment_proprio_dims[known[n]] if n in known else 7 for n in order
        ),
        embodiment_views=tuple(MIXED.grid(known[n])[0] if n in known else 4 for n in order),
        embodiment_heights=tuple(MIXED.grid(known[n])[1] if n in known else 6 for n in order),
        embodiment_widths=tuple(MIXED.grid(known[n])[2] if n in known else 8 for n in order),
    )
    before, after = Robots(NAMES, MIXED, 2), Robots(order, wider, 2)
    grown = make_model(wider, previous_frame=True)
    grown.load_state_dict(carry_over(old.state_dict(), before, after))
    clip = make_clip(batch=1, shape=MIXED)
    for name in set(order) & set(NAMES):
        index = known[name]
        single = Robots((name,), only(MIXED, index), 2)
        small = CausalDiT(grown.config, single.shape).double().requires_grad_(False)
        small.load_state_dict(carry_over(grown.state_dict(), after, single))
        expected, found = run(alone(old, index), cut(clip, index)), run(small, cut(clip, index))
        assert torch.equal(found.latents_BTVChw, expected.latents_BTVChw)
        assert torch.equal(found.proprio_BTS, expected.proprio_BTS)

    new = order.index("new")
    table = grown.condition_embedding.embodiment.weight
    torch.testing.assert_close(table[new], old.condition_embedding.embodiment.weight.mean(0))
    assert not grown.action_embedding.linear.weight_EIO[new].any()
    assert not grown.proprio_head.weight_EIO[new].any()
    assert not grown.token_embedding.previous_proprio.weight_EIO[new].any()


def test_negative_control_rows_by_place_are_other_robots(make_model) -> None:
    old = make_model(MIXED)
    swapped = Robots(("b", "a", "c"), MIXED, 2)
    by_name = carry_over(old.state_dict(), Robots(NAMES, MIXED, 2), swapped)
    key = "condition_embedding.embodiment.weight"
    assert torch.equal(by_name[key][0], old.state_dict()[key][1])
    assert not torch.equal(by_name[key], old.state_dict()[key])
    same = carry_over(old.state_dict(), Robots(NAMES, MIXED, 2), Robots(NAMES, MIXED, 2))
    assert all(torch.equal(same[name], value) for name, value in old.state_dict().items())
