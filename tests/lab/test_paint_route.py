"""Where the brush goes: an easel's frame, strokes that stay on the canvas, poses that a brush can take."""

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.lab.paint import PaintEffect
from vidworld.lab.paint_props import easel_of
from vidworld.lab.paint_route import STYLES, Easel, Route, scribble, stroke_line
from vidworld.lab.scene import planner

UPRIGHT = Easel((0.45, 0.35, 0.3), 0.4, 0.0, 0.0)


@pytest.mark.parametrize("lean", [0.0, 25.0, 90.0])
@pytest.mark.parametrize("yaw", [0.0, -9.0])
def test_the_frame_of_a_canvas_is_orthonormal_and_inverts(lean, yaw):
    easel = Easel((0.45, 0.35, 0.3), 0.4, lean, yaw)
    np.testing.assert_allclose(easel.axes_33.T @ easel.axes_33, np.eye(3), atol=1e-12)
    assert np.linalg.det(easel.axes_33) == pytest.approx(1)
    points = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(easel.local(easel.world(points)), points, atol=1e-12)
    np.testing.assert_allclose(easel.world(np.array([[0.2, 0.2, 0]])), [[0.45, 0.35, 0.3]], atol=1e-12)
    # Down the canvas is down in the world, by as much as it slopes.
    assert easel.axes_33[2, 1] == pytest.approx(-easel.slope, abs=1e-12)
    turned = easel.brush_rotation(0.7)
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_allclose(turned[:, 2], easel.axes_33[:, 2], atol=1e-12)
    np.testing.assert_allclose(easel.dip_rotation(0.7)[:, 2], [0, 0, -1], atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_strokes_stay_on_the_canvas_and_are_long_enough_to_see(style):
    rng = np.random.default_rng(3)
    for _ in range(30):
        line = stroke_line(rng, style, 0.4)
        assert line.min() >= 0.03
        assert line.max() <= 0.37
        assert np.linalg.norm(np.diff(line, axis=0), axis=1).sum() > 0.15


def test_a_stroke_is_pressed_in_only_along_its_line():
    route = Route(UPRIGHT, (0.45, 0.2, 0.3), 1.0)
    line = np.array([[0.1, 0.1], [0.3, 0.3]])
    route.stroke(line, 0.006, 0.4)
    local = UPRIGHT.local(np.array(route.rows)[:, :3])
    pressed = local[local[:, 2] > 0.005]
    assert len(pressed) > 6
    assert np.abs(pressed[:, 0] - pressed[:, 1]).max() < 1e-9, "on the diagonal"
    assert local[-1, 2] == pytest.approx(-0.06)
    positions, rotations = route.poses(100, 0.0)
    assert positions.shape == (101, 3)
    assert rotations.shape == (101, 3, 3)
    np.testing.assert_allclose(positions[-1], route.rows[-1][:3])


def test_a_scribble_touches_and_leaves_the_canvas():
    rng = np.random.default_rng(0)
    depth = np.concatenate([UPRIGHT.local(scribble(rng, UPRIGHT, 64))[:, 2] for _ in range(20)])
    assert 0.1 < (depth > 0).mean() < 0.9
    assert depth.max() <= 0.009 + 1e-9


def test_most_plans_are_reachable_and_their_tip_goes_where_the_paint_is():
    effect = PaintEffect()
    arm = planner(None, effect.tool_offset_3)
    reached = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        visible = effect.sample_visible(rng)
        plan = effect.plan(rng, arm, visible)
        if plan is None:
            continue
        reached += 1
        assert plan.joint_targets_TJ.shape == (64, 7)
        assert plan.text
        tips = np.array([arm.forward(joints)[0] for joints in plan.joint_targets_TJ])
        pressed = easel_of(visible).local(tips)[:, 2].max() > -0.006
        dipped = min(np.linalg.norm(tips - [*bucket, 0.042], axis=1).min() for bucket in visible["buckets"])
        assert pressed
        assert visible["loaded"] >= 0 or dipped < 0.01
    assert reached >= 9
