"""Prompts that do not fit the world are refused, each by what is wrong."""

import dataclasses

import numpy as np
import pytest

from vidworld.errors import ContractError, DataError, UserError


def test_one_view_needs_no_axis(world, prompt):
    known = prompt(world)
    flat = dataclasses.replace(known, frames=known.frames[:, 0])
    assert np.array_equal(flat.frames_TVHWC(world.spec), known.frames_TVHWC(world.spec))


def test_resizing_is_asked_for(world, prompt):
    large = dataclasses.replace(prompt(world), frames=np.full((3, 1, 90, 120, 3), 40, np.uint8))
    with pytest.raises(DataError, match=r"got 90x120.*expected 32x48; use prompt.resized\(32, 48\)"):
        large.frames_TVHWC(world.spec)
    fitted = large.resized(32, 48)
    assert fitted.frames_TVHWC(world.spec).shape == (3, 1, 32, 48, 3)
    assert abs(int(fitted.frames.mean()) - 40) <= 1


BAD = {
    "float frames": ({"frames": np.zeros((3, 1, 32, 48, 3))}, "dtype.*float64, expected uint8"),
    "grey frames": ({"frames": np.zeros((3, 32, 48), np.uint8)}, r"shape .*\(3, 32, 48\)"),
    "no frames": ({"frames": np.zeros((0, 1, 32, 48, 3), np.uint8)}, "shape"),
    "two views": ({"frames": np.zeros((3, 2, 32, 48, 3), np.uint8)}, r"views.*got 2, expected 1 \(top\)"),
    "size": ({"frames": np.zeros((3, 1, 48, 32, 3), np.uint8)}, "size.*got 48x32"),
    "proprio rows": ({"proprio": np.zeros((2, 4))}, "proprio rows.*3 rows, one a frame"),
    "proprio width": ({"proprio": np.zeros((3, 5))}, "proprio dimensions"),
    "proprio NaN": ({"proprio": np.full((3, 4), np.nan)}, "'angle_0' not finite"),
    "as many actions as frames": ({"actions": np.zeros((3, 3))}, "action rows.*2 rows, one between"),
    "action width": ({"actions": np.zeros((2, 2))}, "action dimensions"),
    "action range": ({"actions": np.full((2, 3), 90.0)}, "'joint_0' out of range"),
    "embodiment": ({"embodiment": "leg"}, "embodiment.*'leg'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused_by_name(world, prompt, changes, message):
    with pytest.raises(UserError, match=message):
        world.reset(dataclasses.replace(prompt(world), **changes))


def test_range_may_be_waived(world, prompt):
    world.reset(prompt(world, actions=np.full((2, 3), 90.0)), allow_out_of_range=True)
    with pytest.raises(ContractError):
        world.reset(prompt(world, actions=np.full((2, 3), np.inf)), allow_out_of_range=True)


def test_a_single_frame_has_no_actions(world, prompt):
    one = dataclasses.replace(
        prompt(world, frames=1), proprio=np.zeros((1, 4)), actions=np.zeros((0, 3), np.float32)
    )
    assert world.reset(one).frame == 1
