"""Paint end to end: same bytes, nothing hidden shows before the canvas is touched, paint is accounted for."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl
from vidworld.lab.conditional import conditional
from vidworld.lab.effect import Camera
from vidworld.lab.episode import LabConfig, generate, resimulate
from vidworld.lab.paint import look_up
from vidworld.lab.paint_route import Easel

needs_gl = pytest.mark.skipif(not gl.can_render(), reason=f"no headless OpenGL: {gl.INSTALL}")
CONFIG = LabConfig(size=64, exploration=0.0)
LOADED, DIPPED, EXPLORED = 8, 10, 3
"""Seeds: a brush that holds paint at the start, one that is dipped first, and exploration."""


def first_touch(episode) -> int:
    """First frame at which paint is on the canvas."""
    return int(np.argmax(episode.outcomes_T["canvas_ml"] > 0))


@pytest.fixture(scope="module")
def dipped():
    return generate("paint", DIPPED, CONFIG)


@needs_gl
@pytest.mark.parametrize("seed", [LOADED, DIPPED])
def test_no_hidden_value_shows_before_the_brush_touches_the_canvas(seed):
    episode = generate("paint", seed, CONFIG)
    others = [
        {"load_ml": 1.3, "depletion_m": 0.5, "viscosity": 0.02},
        {"load_ml": 5.4, "depletion_m": 0.12, "viscosity": 0.4},
    ]
    runs = [resimulate(episode, hidden) for hidden in others]
    frames, *other_frames = (run.frames_THWC for run in (episode, *runs))
    assert frames is not None
    touch = min(first_touch(run) for run in runs)
    assert touch > 5
    for run, pictures in zip(runs, other_frames, strict=True):
        assert pictures is not None
        np.testing.assert_array_equal(pictures[:touch], frames[:touch])
        np.testing.assert_array_equal(run.proprio_TS, episode.proprio_TS, "paint does not push back")
        assert (pictures[-1] != frames[-1]).any(), "and it does show afterwards"


@needs_gl
def test_paint_comes_from_the_bucket_and_never_grows(dipped):
    canvas, brush = dipped.outcomes_T["canvas_ml"], dipped.outcomes_T["brush_ml"]
    total = canvas + brush + dipped.outcomes_T["lost_ml"]
    assert dipped.visible["loaded"] == -1
    assert total[0] == 0
    dips = np.flatnonzero(np.diff(total) > 1e-12)
    assert len(dips) == 1, "one dip, then every drop is accounted for"
    np.testing.assert_allclose(total[dips[0] + 1 :], dipped.hidden["load_ml"], rtol=1e-9)
    assert (np.diff(brush[dips[0] + 1 :]) <= 1e-12).all()
    assert (canvas[: first_touch(dipped)] == 0).all()
    assert canvas[-1] > 0.1
    assert dipped.outcomes_T["coverage"][-1] > 0.01


@needs_gl
def test_the_streak_mask_is_where_the_picture_changed(dipped):
    streak, canvas = dipped.masks_THW["streak"], dipped.masks_THW["canvas"]
    assert streak.shape == dipped.frames_THWC.shape[:3]
    assert not streak[: first_touch(dipped)].any()
    assert not (streak & ~canvas).any()
    assert streak[-1].sum() > 10
    change = np.abs(dipped.frames_THWC[-1].astype(int) - dipped.frames_THWC[0].astype(int)).max(-1)
    assert np.median(change[streak[-1]]) > 40
    bare = canvas[-1] & canvas[0] & ~streak[-1]
    assert np.median(change[bare]) < 12


@needs_gl
def test_resimulation_repeats(dipped):
    again = resimulate(dipped)
    np.testing.assert_array_equal(again.frames_THWC, dipped.frames_THWC)
    for name, mask in dipped.masks_THW.items():
        np.testing.assert_array_equal(again.masks_THW[name], mask)


@pytest.mark.parametrize(("frames", "tells", "count"), [(4, False, 3), (64, True, 8)])
def test_only_watching_the_streak_tells_what_is_hidden(frames, tells, count):
    episode = generate("paint", DIPPED, CONFIG, render=False)
    draws = conditional(episode, k=frames, n=count)
    coverage = draws.outcomes_NT["coverage"][:, -1]
    assert np.ptp(coverage) > 0.01, "the outcome is open"
    if not tells:
        np.testing.assert_allclose(draws.weights_N, 1 / count)
        return
    apart = np.abs(coverage - episode.outcomes_T["coverage"][-1])
    assert draws.weights_N @ apart < 0.7 * apart.mean()


@pytest.mark.parametrize(("frames", "exploration"), [(2, 0.0), (2, 1.0), (160, 0.0)])
def test_any_length_can_be_planned(frames, exploration):
    config = LabConfig(size=64, frames=frames, exploration=exploration)
    episode = generate("paint", DIPPED, config, render=False)
    assert len(episode.actions_TA) == frames
    assert episode.plan.text


def test_exploration_paints_too():
    explored = generate("paint", EXPLORED, LabConfig(size=64, exploration=1.0), render=False)
    assert explored.plan.policy.startswith("explore")
    assert explored.outcomes_T["coverage"][-1] > 0


@needs_gl
def test_another_process_makes_the_same_bytes(dipped):
    code = (
        "import hashlib; from vidworld.lab.episode import *;"
        f"e = generate('paint', {DIPPED}, LabConfig(size=64, exploration=0.0));"
        "print(hashlib.sha256(e.frames_THWC.tobytes() + e.proprio_TS.tobytes()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    expected = hashlib.sha256(dipped.frames_THWC.tobytes() + dipped.proprio_TS.tobytes()).hexdigest()
    assert other.stdout.strip() == expected


def test_pixels_find_their_texel():
    easel = Easel((0.45, 0.35, 0.3), 0.4, 20.0, 5.0)
    back = np.array([0.3, -0.9, 0.3]) / np.linalg.norm([0.3, -0.9, 0.3])
    right = np.cross([0, 0, 1.0], back) / np.linalg.norm(np.cross([0, 0, 1.0], back))
    camera = Camera(
        np.array([0.45, 0.3, 0.25]) + back, np.stack([right, np.cross(back, right), back], 1), 42.0, 64
    )
    texel_HW2, plane_HW = look_up(camera, easel, 100)
    local = np.array([[0.1, 0.3, 0.0], [0.37, 0.05, 0.0]])
    pixels, depths = camera.project(easel.world(local))
    for (x, y), depth, (u, v, _) in zip(pixels, depths, local, strict=True):
        row, column = int(2 * y), int(2 * x)
        np.testing.assert_allclose(texel_HW2[row, column], [v * 250, u * 250], atol=1.6)
        assert plane_HW[row, column] == pytest.approx(depth, abs=0.01)
    assert np.isinf(plane_HW[0, 0])
