"""Every detector sees its fault planted into clean episodes, says what it is, and is silent without it."""

import dataclasses

import numpy as np
import pytest

from vidworld.data.inspection.detectors import DETECTORS, silent, suspicious
from vidworld.data.inspection.survey import Survey
from vidworld.data.sources.base import video_of


def replace(episode, **changes):
    return dataclasses.replace(episode, **changes)


def column(array, index, values):
    changed = array.copy()
    changed[:, index] = values
    return changed


def only(findings, detector):
    """The findings, which must all be of one detector."""
    assert {finding.detector for finding in findings} == {detector}, [str(f) for f in findings]
    return findings


def test_nothing_is_suspicious_without_a_fault(clean):
    assert suspicious(clean) == []
    assert silent(clean, []) == list(DETECTORS)
    assert suspicious(Survey(clean.manifest)) == []
    assert silent(Survey(clean.manifest), []) == [d for d in DETECTORS if not d.reads]


def test_a_robot_without_proprioception_or_with_two_frames(planted, robot, pictures):
    """Nothing to correlate is no reason to fail."""
    bare = dataclasses.replace(robot(), proprio=())
    assert planted(lambda e, _: replace(e, proprio_TS=e.proprio_TS[:, :0]), spec=bare) == []
    short = planted(lambda e, _: cut(e, 2, pictures), overwrite=True)
    assert "short episodes" in {finding.detector for finding in short}


# Time shifts


@pytest.mark.parametrize("shift", [-2, -1, 1, 3])
def test_shifted_actions(planted, shift):
    """shift 1: row t holds what was commanded at row t+1, so motion comes one frame after."""

    def plant(episode, index):
        rows = np.clip(np.arange(len(episode)) + shift, 0, len(episode) - 1)
        return replace(episode, actions_TA=episode.actions_TA[rows])

    (finding,) = only(planted(plant), "action lag")
    word = "after" if shift > 0 else "before"
    assert finding.what == f"motion comes {abs(shift)} frame{'s' * (abs(shift) > 1)} {word} its action"
    assert f"at lag {shift:+d}" in finding.got


@pytest.mark.parametrize(("shift", "word"), [(-1, "late"), (2, "early")])
def test_shifted_video(planted, pictures, shift, word):
    def plant(episode, index):
        rows = np.clip(np.arange(len(episode)) + shift, 0, len(episode) - 1)
        return replace(episode, views={"top": video_of(pictures(episode)[rows])})

    (finding,) = only(planted(plant), "video lag")
    assert finding.what == f"view 'top' is {abs(shift)} frame{'s' * (abs(shift) > 1)} {word}"


def test_next_state_as_action_is_no_shift(planted, robot):
    """The convention for logs without actions: actions[t] is the state at t+1."""

    def plant(episode, index):
        states = episode.proprio_TS[:, :2]
        actions = np.concatenate([states[1:], states[-1:]])
        return replace(episode, actions_TA=np.concatenate([actions, episode.actions_TA[:, 2:]], 1))

    kind = {"unit": "rad", "kind": "position"}
    assert planted(plant, spec=robot(action={0: kind, 1: kind})) == []


# Sign, scale, kinds


def test_reversed_sign(planted):
    def plant(episode, index):
        return replace(episode, actions_TA=episode.actions_TA * np.float32([-1, 1, 1]))

    (finding,) = only(planted(plant), "sign")
    assert finding.what == "proprio 'shoulder' moves against action 'shoulder_velocity'"


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (np.degrees(1), "degrees for radians"),
        (0.1, "a velocity for a delta"),
        (50.0, "degrees"),
        (300.0, "off by so"),
    ],
)
def test_scale(planted, factor, words):
    def plant(episode, index):
        return replace(episode, actions_TA=episode.actions_TA * np.float32([1, factor, 1]))

    findings = planted(plant)
    (finding,) = [finding for finding in findings if finding.detector == "scale"]
    assert "'elbow' moves" in finding.what
    assert words in finding.fix
    assert {f.detector for f in findings} <= {"scale", "units"}


def test_unknown_kinds_are_guessed_from_motion(planted, robot):
    unknown = {"unit": "unknown", "kind": "unknown"}
    (finding,) = only(planted(spec=robot(action={0: unknown, 1: unknown})), "unknown kinds")
    assert "shoulder_velocity moves shoulder like a velocity or delta" in finding.got
    assert "elbow_velocity moves elbow like a velocity or delta" in finding.got


# Pictures


@pytest.mark.parametrize(("level", "word"), [(2, "dark"), (252, "white"), (120, "one even colour")])
def test_blank_camera(planted, pictures, level, word):
    def plant(episode, index):
        blank = np.full_like(pictures(episode), level)
        return replace(episode, views={**episode.views, "side": video_of(blank)})

    (finding,) = only(
        [f for f in planted(plant, views=("top", "side")) if f.detector != "frozen video"], "dark camera"
    )
    assert finding.what == f"view 'side' is {word}"
    assert "10 of 10 episodes" in finding.where


def test_a_dark_camera_in_two_episodes_is_said_by_name(planted, pictures):
    def plant(episode, index):
        return (
            replace(episode, views={"top": video_of(pictures(episode) // 60)}) if index in (1, 4) else episode
        )

    (finding,) = only(planted(plant), "dark camera")
    assert "2 of 10 episodes (planar-000001, planar-000004)" in finding.where


def test_a_dim_room_is_not_dark(planted, pictures):
    assert planted(lambda e, _: replace(e, views={"top": video_of(pictures(e) // 10)})) == []


def test_frozen_video(planted, pictures):
    def plant(episode, index):
        frames = pictures(episode)
        frames[10:20] = frames[10]
        return replace(episode, views={"top": video_of(frames)}) if index == 3 else episode

    (finding,) = only(planted(plant), "frozen video")
    assert "planar-000003" in finding.where
    assert "to row 19)" in finding.got
    assert "hung" in finding.fix


def test_a_slow_camera(planted, pictures):
    """Every frame twice: half the rate that is declared."""

    def plant(episode, index):
        return replace(episode, views={"top": video_of(pictures(episode)[np.arange(len(episode)) // 2 * 2])})

    (finding,) = [f for f in planted(plant) if f.detector == "frozen video"]
    assert "lower --fps" in finding.fix


def test_a_robot_at_rest_is_not_a_frozen_video(planted, pictures):
    def plant(episode, index):
        frames, states = pictures(episode), episode.proprio_TS.copy()
        frames[15:] = frames[15]
        states[15:] = states[15]
        actions = episode.actions_TA.copy()
        actions[15:, :2] = 0
        return (
            replace(episode, views={"top": video_of(frames)}, proprio_TS=states, actions_TA=actions)
            if index < 2
            else episode
        )

    assert planted(plant) == []


def test_the_same_camera_twice(planted, pictures):
    def plant(episode, index):
        return replace(episode, views={**episode.views, "copy": video_of(pictures(episode))})

    (finding,) = only(planted(plant, views=("top", "copy")), "same views")
    assert finding.what == "views 'top' and 'copy' show the same"


def test_two_cameras_are_not_the_same(planted, pictures):
    def plant(episode, index):
        return replace(episode, views={**episode.views, "turned": video_of(pictures(episode)[:, ::-1])})

    assert planted(plant, views=("top", "turned")) == []


# Clocks


def test_wrong_fps(planted):
    (finding,) = only(planted(lambda e, _: replace(e, timestamps_T=e.timestamps_T * 1.2)), "wrong fps")
    assert "8.333 frames/s" in finding.got
    assert finding.expected == "the declared 10"


def test_a_jittering_clock_is_not_another_rate(planted):
    def plant(episode, index):
        steps = np.random.default_rng(index).uniform(0.05, 0.15, len(episode))
        return replace(episode, timestamps_T=np.cumsum(steps))

    assert planted(plant) == []


def test_pause(planted):
    def plant(episode, index):
        return replace(
            episode, timestamps_T=episode.timestamps_T + (np.arange(len(episode)) >= 12) * 2.0 * (index == 1)
        )

    (finding,) = only(planted(plant), "pauses")
    assert finding.got == "planar-000001 at row 12 (21 frames long)"


# Numbers


def test_constant_and_gripper(planted, robot):
    def plant(episode, index):
        return replace(
            episode,
            actions_TA=column(episode.actions_TA, 2, 0.25),
            proprio_TS=column(episode.proprio_TS, 3, 7),
        )

    findings = planted(plant, spec=robot(action={2: {"name": "gripper_opening", "kind": "position"}}))
    assert [finding.detector for finding in findings] == ["gripper", "constant"]
    assert findings[0].what == "the gripper (action 'gripper_opening') never moves"
    assert findings[1].got == "'tip_y' = 7"


def test_hardly_moves(planted):
    def plant(episode, index):
        values = np.random.default_rng(index).normal(0, 1e-3, len(episode))
        values[5] = (-1) ** index * 0.9 if index < 3 else 0
        return replace(episode, actions_TA=column(episode.actions_TA, 0, values))

    findings = [f for f in planted(plant) if f.detector == "hardly moves"]
    assert [finding.what for finding in findings] == ["action 'shoulder_velocity' hardly ever moves"]


@pytest.mark.parametrize(
    ("role", "index", "factor", "mistaken"),
    [
        ("proprio", 0, np.degrees(1), "degrees"),
        ("proprio", 2, 1000, "millimetres"),
        ("action", 1, np.degrees(1), "degrees"),
    ],
)
def test_units(planted, role, index, factor, mistaken):
    def plant(episode, _):
        name = "actions_TA" if role == "action" else "proprio_TS"
        array = getattr(episode, name)
        return replace(episode, **{name: column(array, index, array[:, index] * factor)})

    findings = planted(plant)
    (finding,) = [finding for finding in findings if finding.detector == "units"]
    assert f"are these {mistaken}" in finding.fix


def test_binary_beyond_its_range(planted):
    (finding,) = only(
        planted(lambda e, _: replace(e, actions_TA=e.actions_TA * np.float32([1, 1, 255]))), "binary"
    )
    assert finding.got == "0 to 255"


def test_saturated(planted):
    def plant(episode, index):
        return replace(
            episode, proprio_TS=column(episode.proprio_TS, 3, np.minimum(episode.proprio_TS[:, 3], -0.3))
        )

    (finding,) = only(planted(plant), "saturated")
    assert "at exactly -0.3 m" in finding.got


def test_normalised(planted, robot):
    def plant(episode, index):
        scaled = np.clip(episode.actions_TA / 1.2, -1, 1)
        scaled[0] = 1 - 2 * (index % 2)
        return replace(episode, actions_TA=scaled)

    unknown = {"unit": "unknown", "kind": "position"}
    findings = planted(plant, spec=robot(action=dict.fromkeys(range(3), unknown)))
    assert "normalised" in {finding.detector for finding in findings}


def test_held_out_episode_outside_the_range(planted):
    def plant(episode, index):
        return replace(episode, actions_TA=column(episode.actions_TA, 0, 9.0)) if index == 9 else episode

    (finding,) = [f for f in planted(plant) if f.detector == "held-out range"]
    assert finding.got == "'shoulder_velocity' = 9 at row 0 of planar-000009"


def test_euler_wrap(planted):
    def plant(episode, index):
        turned = episode.proprio_TS[:, 1] + 2.5
        return replace(
            episode, proprio_TS=column(episode.proprio_TS, 1, (turned + np.pi) % (2 * np.pi) - np.pi)
        )

    (finding,) = [f for f in planted(plant) if f.detector == "wraps"]
    assert finding.what == "proprio 'elbow' wraps around"
    assert "jumps by a turn" in finding.got


@pytest.mark.parametrize("flip", [False, True])
def test_quaternion_signs(planted, robot, flip):
    def plant(episode, index):
        half = np.cumsum(np.full(len(episode), 0.05)) + index
        axis = np.float64([0.6, 0.0, 0.8])
        quaternions = np.concatenate([np.sin(half)[:, None] * axis, np.cos(half)[:, None]], 1)
        if flip:
            quaternions[quaternions[:, 3] < 0] *= -1  # the usual "w is positive", which jumps
        return replace(episode, proprio_TS=quaternions.astype(np.float32))

    spec = robot(
        proprio={i: {"name": f"q{c}", "unit": "1", "kind": "position"} for i, c in enumerate("xyzw")}
    )
    findings = [f for f in planted(plant, spec=spec) if f.detector == "quaternion signs"]
    assert [f.what for f in findings] == ["proprio quaternion qx ... qw changes its sign"] * flip


# Episodes


def cut(episode, length, pictures):
    return replace(
        episode,
        views={"top": video_of(pictures(episode)[:length])},
        actions_TA=episode.actions_TA[:length],
        proprio_TS=episode.proprio_TS[:length],
        timestamps_T=episode.timestamps_T[:length],
    )


def test_far_too_short(planted, pictures):
    findings = planted(lambda e, index: cut(e, 8, pictures) if index == 5 else e)
    assert [finding.detector for finding in findings] == ["episode lengths", "short episodes"]
    assert "planar-000005 (8 frames)" in findings[0].got
    assert "1 of 10 episodes are shorter than a clip" in findings[1].what


def test_a_held_out_episode_that_is_trained_on(planted):
    first = {}

    def plant(episode, index):
        first.setdefault("episode", episode)
        return replace(first["episode"], episode_id=episode.episode_id) if index == 9 else episode

    (finding,) = only(planted(plant), "repeated episodes")
    assert finding.where == "planar-000000 = planar-000009"
    assert "1 in both train and val" in finding.got


def test_missing_text(planted):
    (finding,) = only(
        planted(lambda e, index: replace(e, text="" if index == 2 else "push")), "missing texts"
    )
    assert finding.where == "planar-000002"
    assert planted(lambda e, index: replace(e, text=""), overwrite=True) == []


def test_many_quarantined(planted):
    def plant(episode, index):
        return replace(episode, proprio_TS=episode.proprio_TS * np.nan) if index in (1, 2) else episode

    (finding,) = only(planted(plant, max_quarantined=0.5), "quarantined")
    assert finding.what == "2 of 10 episodes were left out"


def test_not_finite(clean):
    """The converter refuses them; shards may come from elsewhere."""
    look = clean.looks[2]
    bad = dataclasses.replace(look, actions_TA=column(look.actions_TA, 0, np.nan))
    (finding,) = suspicious(Survey(clean.manifest, (*clean.looks[:2], bad, *clean.looks[3:])))
    assert (finding.detector, finding.where) == ("not finite", look.sample.episode_id)
