import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.errors import ConfigError
from vidworld.lab import arm, gl, policy, scene
from vidworld.lab.effect import BaseEffect, Framing
from vidworld.lab.kinematics import ArmPlanner, minimum_jerk, rotation_rpy, slerp, tool_down
from vidworld.lab.text import describe

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")


class Nothing(BaseEffect):
    kind = "nothing"

    def sample_visible(self, rng):
        return {}

    def build(self, spec, visible):
        pass

    def plan(self, rng, arm, visible):
        return None

    def reset(self, scene, visible, hidden):
        pass

    def outcome(self):
        return {}


@pytest.fixture(scope="module")
def planner() -> ArmPlanner:
    return scene.planner(None)


def make_scene(seed: int = 0, size: int = 64) -> scene.Scene:
    effect = Nothing()
    look = scene.sample_look(np.random.default_rng(seed), effect.framing, "full")
    return scene.Scene(effect, look, {}, size)  # type: ignore[arg-type]


def test_inverse_kinematics_inverts_forward_kinematics(planner):
    rng = np.random.default_rng(0)
    for _ in range(20):
        position, rotation = (
            rng.uniform((0.36, -0.22, 0.03), (0.6, 0.22, 0.25)),
            tool_down(rng.uniform(-0.8, 0.8)),
        )
        joints, residual = planner.solve(position, rotation, planner.home_J, 60)
        reached, turned = planner.forward(joints)
        assert residual < 2e-3
        np.testing.assert_allclose(reached, position, atol=2e-3)
        np.testing.assert_allclose(turned, rotation, atol=0.02)
        assert (joints >= planner.low_J).all()
        assert (joints <= planner.high_J).all()


def test_paths_out_of_reach_or_with_jumps_are_rejected(planner):
    near = np.linspace((0.4, -0.1, 0.2), (0.5, 0.1, 0.2), 20)
    assert planner.path(near, tool_down(0.0)).shape == (20, 7)
    assert planner.path(near + (0.9, 0, 0), tool_down(0.0)) is None
    assert planner.path(near[[0, 19]] * (1, 4, 1), tool_down(0.0)) is None


def test_a_tool_offset_moves_the_tool_centre_point(planner):
    brush = scene.planner(None, (0.0, 0.0, 0.12))
    position, rotation = planner.forward(planner.home_J)
    moved, _ = brush.forward(brush.home_J)
    np.testing.assert_allclose(moved, position + 0.12 * rotation[:, 2], atol=1e-12)


def test_minimum_jerk_rests_at_waypoints_and_slerp_ends_where_it_should():
    times = np.linspace(0, 2, 2001)
    path = minimum_jerk((0, 1, 2), np.array([[0.0], [1.0], [-1.0]]), times)[:, 0]
    speed = np.gradient(path, times)
    assert abs(speed[[0, 1000, 2000]]).max() < 1e-2
    assert path[[0, 1000, 2000]] == pytest.approx([0, 1, -1])
    last = rotation_rpy(0.3, -0.5, 1.0)
    turned = slerp(np.eye(3), last, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(turned[2], last, atol=1e-9)
    np.testing.assert_allclose(turned[1] @ turned[1], last, atol=1e-9)
    with pytest.raises(ValueError, match="ascending"):
        minimum_jerk((0, 0), np.zeros((2, 1)), times)


def test_the_arm_holds_and_follows_its_targets(planner):
    world = make_scene()
    first, _ = planner.solve(np.array([0.45, 0.0, 0.2]), tool_down(0.0), planner.home_J, 60)
    last, _ = planner.solve(np.array([0.5, 0.05, 0.2]), tool_down(0.0), first, 60)
    world.start(first, 1.0)
    before, _ = world.tool_pose()
    calls = []
    for _ in range(5):
        world.step_frame(first, 1.0, calls.append, every=4)
    assert np.linalg.norm(world.tool_pose()[0] - before) < 2e-3
    assert len(calls) == 25
    assert sum(calls) == pytest.approx(5 * 0.08)
    for share in np.linspace(0, 1, 15):
        world.step_frame(first + share * (last - first), 1.0, calls.append)
    for _ in range(10):
        world.step_frame(last, 1.0, calls.append)
    np.testing.assert_allclose(world.tool_pose()[0], (0.5, 0.05, 0.2), atol=4e-3)
    ends, radius = world.arm_capsules()
    assert ends.shape == (len(radius), 2, 3)
    assert np.abs(ends.mean(1) - world.tool_pose()[0]).sum(1).min() < 0.1


@needs_gl
def test_pictures_agree_with_the_camera_and_repeat():
    world = make_scene(size=64)
    world.start(np.array(arm.HOME_J), 1.0)
    rgb, depth = world.render()
    again, _ = world.render()
    assert rgb.shape == (128, 128, 3)
    assert np.array_equal(rgb, again)
    table = world.segment() == world.model.geom("table").id
    rows, columns = np.nonzero(table)
    # A pixel that shows the table, put back into the world by its depth, lies at z = 0 or on its rim.
    camera = world.camera
    focal = 32 / np.tan(np.radians(camera.fovy_deg) / 2)
    z = depth[::2, ::2][table]
    local = np.stack([(columns + 0.25 - 32) / focal * z, -(rows + 0.25 - 32) / focal * z, -z], axis=1)
    heights = (camera.position_3 + local @ camera.rotation_33.T)[:, 2]
    assert np.median(np.abs(heights)) < 2e-3
    pixel, distance = camera.project(camera.position_3 - 2 * camera.rotation_33[:, 2:].T)
    assert pixel[0] == pytest.approx([32, 32])
    assert distance[0] == pytest.approx(2)
    world.close()


@needs_gl
def test_scenes_of_other_sizes_do_not_disturb_each_other():
    small, large = make_scene(seed=1, size=64), make_scene(seed=2, size=128)
    for world in (small, large):
        world.start(np.array(arm.HOME_J), 1.0)
    before, _ = small.render()
    bigger, _ = large.render()
    assert bigger.shape == (256, 256, 3)
    assert np.array_equal(small.render()[0], before)
    assert np.array_equal(large.render()[0], bigger)
    small.close()
    assert np.array_equal(large.render()[0], bigger)
    large.close()


def test_impossible_sizes_and_varieties_are_refused():
    with pytest.raises(ConfigError, match="100"):
        make_scene(size=100)
    with pytest.raises(ConfigError, match="one or core or full"):
        scene.sample_look(np.random.default_rng(0), Framing(), "garish")
    cameras = {
        scene.sample_look(np.random.default_rng(seed), Framing(), "core")["azimuth_deg"] for seed in range(60)
    }
    assert len(cameras) == 4


def test_one_look_leaves_the_rest_of_a_seed_as_it_is():
    looks, afterwards = [], []
    for seed in range(8):
        for variety in ("one", "core"):
            rng = np.random.default_rng(seed)
            looks.append((variety, str(scene.sample_look(rng, Framing(), variety))))
            afterwards.append(rng.random())
    assert len({look for variety, look in looks if variety == "one"}) == 1
    assert len({look for variety, look in looks if variety == "core"}) > 4
    assert afterwards[::2] == afterwards[1::2]


def test_any_mjcf_arm_with_the_named_joints_is_taken(tmp_path):
    path = tmp_path / "arm.xml"
    path.write_text(arm.MJCF)
    assert arm.load_arm(path).compile().nu == 9
    for wrong, message in (
        (arm.MJCF.replace("joint4", "elbow"), "joint4"),
        (arm.MJCF.replace('site name="tool"', 'site name="tip"'), "tool"),
        (arm.MJCF.replace('range="-3.0718 -0.0698" ', ""), "no range"),
        ("<mujoco><worldbody>", "no MJCF"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=message):
            arm.load_arm(path)
    with pytest.raises(ConfigError, match="no such file"):
        arm.load_arm(tmp_path / "none.xml")


def test_exploration_stays_in_its_box_and_moves(planner):
    low, high = np.array([0.36, -0.2, 0.06]), np.array([0.6, 0.2, 0.3])
    plans = [policy.random_motion(np.random.default_rng(seed), planner, 64, low, high) for seed in range(6)]
    found = [plan for plan in plans if plan is not None]
    assert len(found) >= 5
    for plan in found:
        points = np.array([planner.forward(joints)[0] for joints in plan.joint_targets_TJ])
        assert (points > low - 0.011).all()
        assert (points < high + 0.011).all()
        assert np.ptp(points, axis=0).max() > 0.08
        assert (plan.gripper_T >= 0).all()
        assert (plan.gripper_T <= 1).all()
    assert len({plan.policy for plan in found}) == 2


def test_captions_vary_and_fill_their_slots():
    rules = {"push": ("push the {thing}", "<arm> pushes the {thing}<slowly>")}
    said = {describe(np.random.default_rng(s), "push", rules, {"thing": "cup"}) for s in range(60)}
    assert len(said) > 8
    assert all("cup" in phrase and "<" not in phrase for phrase in said)
    with pytest.raises(ValueError, match="slot"):
        describe(np.random.default_rng(0), "push", rules)
    with pytest.raises(ValueError, match="rule"):
        describe(np.random.default_rng(0), "pour")
