import numpy as np
import pytest

pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl, scene
from vidworld.lab.smoke import STYLES, SmokeEffect
from vidworld.lab.smoke_flow import MAX_DIVERGENCE, FlowConfig

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")
COARSE = FlowConfig(shape=(24, 24, 30), cell=0.0248)
HIDDEN = {"wind_x": 0.0, "wind_y": 0.0, "buoyancy": 2.4, "turbulence": 7.0}
FRAME_S = 0.08


@pytest.fixture(scope="module")
def planner():
    return scene.planner(None, SmokeEffect.tool_offset_3)


def draw_setup(planner, seed: int, source: str):
    """A visible set-up with that source and a plan that is reachable."""
    rng, effect = np.random.default_rng(seed), SmokeEffect(COARSE)
    for _ in range(40):
        visible = {**effect.sample_visible(rng), "source": source}
        plan = effect.plan(rng, planner, visible)
        if plan is not None:
            return visible, plan
    raise AssertionError("no reachable plan in 40 draws")


def play(visible, plan, hidden, *, frames=24, render=True, still=False, gripper=0.15):
    """Frames, masks and outcomes of the first frames; `still` keeps the arm at its start."""
    effect = SmokeEffect(COARSE)
    look = scene.sample_look(np.random.default_rng(0), effect.framing, "core")
    stage = scene.Scene(effect, look, visible, 64)
    stage.start(plan.start_J, gripper)
    effect.reset(stage, visible, hidden)
    pictures, masks, outcomes = [], [], []
    for frame in range(frames):
        if render:
            pictures.append(scene.halve(effect.draw(*stage.render(), stage.camera)))
            masks.append(effect.masks(stage.camera)["smoke"])
        outcomes.append(effect.outcome())
        target_J = plan.start_J if still else plan.joint_targets_TJ[frame]
        stage.step_frame(target_J, gripper, lambda dt: effect.substep(stage, dt), effect.substep_every)
        assert effect._flow.divergence(0.04) <= MAX_DIVERGENCE
    stage.close()
    return pictures, masks, outcomes


@needs_gl
@pytest.mark.parametrize("source", ["pot", "wand"])
def test_what_is_hidden_shows_only_once_smoke_begins(planner, source):
    visible, plan = draw_setup(planner, 3, source)
    other = {"wind_x": 0.2, "wind_y": -0.25, "buoyancy": 1.5, "turbulence": 9.0}
    ours, masks, outcomes = play(visible, plan, HIDDEN)
    theirs, _, _ = play(visible, plan, other)
    begins = int(visible["begins_s"] / FRAME_S) + 1
    assert 2 < begins < 10
    for frame in range(begins):
        assert np.array_equal(ours[frame], theirs[frame])
        assert not masks[frame].any()
        assert outcomes[frame]["smoke_l"] == 0
    assert np.abs(ours[-1].astype(int) - theirs[-1]).max() > 40
    assert masks[-1].mean() > 0.01


@needs_gl
def test_the_mask_is_where_the_picture_changes(planner):
    visible, plan = draw_setup(planner, 4, "pot")
    visible = {**visible, "tone": "black"}
    ours, masks, _ = play(visible, plan, HIDDEN, still=True)
    changed = np.abs(ours[-1].astype(int) - ours[0]).max(axis=2)
    assert changed[masks[-1]].mean() > 20
    assert changed[~masks[-1]].mean() < 5


@needs_gl
def test_same_bytes_twice(planner):
    visible, plan = draw_setup(planner, 5, "pot")
    first, second = (play(visible, plan, HIDDEN, frames=14) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[2] == second[2]


def test_wind_turbulence_and_the_arm_move_the_smoke(planner):
    visible, plan = draw_setup(planner, 6, "pot")

    def end(hidden, still=False) -> np.ndarray:
        last = play(visible, plan, hidden, frames=40, render=False, still=still)[2][-1]
        return np.array([last["smoke_x"], last["smoke_y"], last["smoke_z"], last["smoke_l"]])

    calm = end(HIDDEN)
    assert calm[2] > 0.15
    assert end({**HIDDEN, "wind_y": 0.3})[1] > calm[1] + 0.03
    assert end({**HIDDEN, "buoyancy": 0.8})[2] < calm[2] - 0.02
    assert np.abs(end({**HIDDEN, "turbulence": 8.0}) - calm)[:3].max() > 1e-4
    assert np.abs(end(HIDDEN, still=True) - calm)[:3].max() > 5e-3


def test_smoke_in_the_air_is_never_more_than_was_given_off(planner):
    visible, plan = draw_setup(planner, 7, "wand")
    outcomes = play(visible, plan, HIDDEN, frames=40, render=False)[2]
    smoke = np.array([row["smoke_l"] for row in outcomes])
    emitted = np.array([row["emitted_l"] for row in outcomes])
    assert (smoke <= emitted + 1e-6).all()
    assert (np.diff(smoke) <= np.diff(emitted) + 1e-6).all()
    assert smoke[-1] > 0.5


def test_the_wand_smokes_only_while_it_is_squeezed(planner):
    visible, plan = draw_setup(planner, 9, "wand")
    given_off = [
        play(visible, plan, HIDDEN, render=False, gripper=opening)[2][-1]["emitted_l"]
        for opening in (0.15, 0.5, 0.95)
    ]
    assert given_off[0] > 1.5 * given_off[1] > 0
    assert given_off[2] == 0
    assert plan.gripper_T.min() < 0.2
    assert plan.gripper_T.max() > 0.85


def test_most_plans_are_reachable_and_of_every_style(planner):
    effect, styles, reached = SmokeEffect(), set(), 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        visible = effect.sample_visible(rng)
        plan = (effect.plan if seed % 3 else effect.explore)(rng, planner, visible)
        if plan is not None:
            reached += 1
            styles.add(plan.policy.split(":")[1])
            assert plan.joint_targets_TJ.shape == (64, 7)
            assert "{" not in plan.text
            assert "<" not in plan.text
    assert reached >= 16
    assert len(styles & {*STYLES, "wand"}) >= 4
    assert styles & {"noise", "reach"}


def test_masks_need_a_drawn_frame(planner):
    effect = SmokeEffect(COARSE)
    visible, plan = draw_setup(planner, 8, "pot")
    stage = scene.Scene(
        effect, scene.sample_look(np.random.default_rng(0), effect.framing, "core"), visible, 64
    )
    stage.start(plan.start_J, 0.15)
    effect.reset(stage, visible, HIDDEN)
    with pytest.raises(ValueError, match="call draw first"):
        effect.masks(stage.camera)


@needs_gl
def test_an_episode_of_the_lab_repeats_and_tells_what_else_could_have_been():
    from vidworld.lab.conditional import conditional
    from vidworld.lab.episode import LabConfig, generate, resimulate

    episode = generate("smoke", 2, LabConfig(frames=14, size=64))
    assert episode.frames_THWC.shape == (14, 64, 64, 3)
    assert episode.masks_THW["smoke"].shape == (14, 64, 64)
    again = resimulate(episode)
    assert np.array_equal(again.frames_THWC, episode.frames_THWC)
    early, late = (conditional(episode, k, 4) for k in (2, 14))
    # Before smoke begins every draw is as good as any other; what is seen of it later tells them apart.
    np.testing.assert_allclose(early.weights_N, 1 / 4)
    assert late.effective_draws < 3.99
    assert late.outcomes_NT["smoke_y"][:, -1].std() > 0.002
