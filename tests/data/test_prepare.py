import dataclasses
import io
import json

import numpy as np
import pytest

from vidworld.contract import Dimension
from vidworld.data.mapping import Change, EmbodimentMapping, RoleMapping
from vidworld.data.prepare import Recipe, decimation, plain_outcome, prepare, resample_actions
from vidworld.data.sources.base import video_of
from vidworld.data.video import decode_video
from vidworld.errors import DataError
from vidworld.types import EmbodimentSpec, Episode, Video

SPEC = EmbodimentSpec(
    "arm",
    10,
    action=(Dimension("v", "m/s", "velocity"), Dimension("grip", "1", "binary")),
    proprio=(Dimension("x", "m", "position"),),
)
RECIPE = Recipe(
    width=32,
    height=32,
    fit="crop",
    fps=10,
    views=("top",),
    trim="refuse",
    min_frames=2,
    embodiments={"arm": SPEC},
)


def picture(index: int) -> np.ndarray:
    return np.full((32, 32, 3), 20 + 10 * index, np.uint8)


def make(num_frames: int = 12, num_pictures: int | None = None, fps: float = 10, **changes) -> Episode:
    count = num_frames if num_pictures is None else num_pictures
    number = np.arange(num_frames, dtype=np.float32)
    return dataclasses.replace(
        Episode(
            episode_id="e",
            embodiment="arm",
            fps=fps,
            views={"top": video_of([picture(index) for index in range(count)])},
            actions_TA=np.stack([number, number % 2], 1),
            proprio_TS=number[:, None],
            timestamps_T=number.astype(np.float64) / fps,
        ),
        **changes,
    )


def load(members, suffix):
    return np.load(io.BytesIO(members[suffix]), allow_pickle=False)


def brightness(members) -> list[int]:
    return [round((float(frame.mean()) - 20) / 10) for frame in decode_video(members["top.mp4"])]


def test_members_hold_what_was_recorded():
    episode = make(text="go", outcome={"success": True}, source={"index": 3})
    done = prepare(episode, RECIPE)
    assert (done.frames, done.embodiment, done.text) == (12, "arm", "go")
    assert (load(done.members, "actions.npy") == episode.actions_TA).all()
    assert (load(done.members, "proprio.npy") == episode.proprio_TS).all()
    assert (load(done.members, "timestamps.npy") == episode.timestamps_T).all()
    assert brightness(done.members) == list(range(12))
    assert json.loads(done.members["meta.json"]) == {
        "episode_id": "e",
        "embodiment": "arm",
        "text": "go",
        "fps": 10,
        "frames": 12,
        "views": ["top"],
        "outcome": {"success": True},
        "source": {"index": 3},
    }


def put(array: np.ndarray, index, value) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def failing(after: int) -> Video:
    def frames():
        yield from (picture(index) for index in range(after))
        raise DataError("corrupt video: decoding stops")

    return Video(12, frames)


GOOD = make()
FAULTS = {
    "nan action": (
        {"actions_TA": put(GOOD.actions_TA, (5, 1), np.nan)},
        r"action 'grip' at row 5: got nan",
    ),
    "inf state": ({"proprio_TS": put(GOOD.proprio_TS, (7, 0), np.inf)}, r"proprio 'x' at row 7: got inf"),
    "clock goes back": (
        {"timestamps_T": put(GOOD.timestamps_T, 4, 0.05)},
        r"timestamp at row 4: got 0\.05, expected more than 0\.3",
    ),
    "clock stands": ({"timestamps_T": put(GOOD.timestamps_T, 4, 0.3)}, r"timestamp at row 4"),
    "clock is nan": ({"timestamps_T": put(GOOD.timestamps_T, 4, np.nan)}, r"timestamps: .*finite"),
    "clock of another rate": (
        {"timestamps_T": GOOD.timestamps_T / 3},
        r"recorded clock: got 30 rows/s, expected .* 10",
    ),
    "no frames": ({"views": {"top": video_of([])}}, "no frames in view 'top'"),
    "no rows": (
        {"actions_TA": np.zeros((0, 2)), "proprio_TS": np.zeros((0, 1)), "timestamps_T": np.zeros(0)},
        "no rows",
    ),
    "short clock": ({"timestamps_T": GOOD.timestamps_T[:-1]}, r"rows of timestamps: got 11, expected 12"),
    "short state": ({"proprio_TS": GOOD.proprio_TS[:-1]}, r"rows of proprio: got 11, expected 12"),
    "wide action": ({"actions_TA": np.zeros((12, 3))}, r"action shape: got \(12, 3\), expected \[T, 2\]"),
    "no such robot": ({"embodiment": "leg"}, "undeclared embodiment 'leg'"),
    "no such view": ({"views": {}}, "no view 'top'"),
    "video breaks off": ({"views": {"top": failing(6)}}, "corrupt video: decoding stops"),
    "video ends early": (
        {"views": {"top": dataclasses.replace(video_of([picture(0)]), num_frames=12)}},
        "frames of view 'top': got 1, expected 12",
    ),
    "video goes on": (
        {"views": {"top": dataclasses.replace(video_of([picture(0)] * 14), num_frames=12)}},
        "frames of view 'top': got more, expected 12",
    ),
    "float video": ({"views": {"top": video_of(np.zeros((12, 32, 32, 3)))}}, "video frame: got float64"),
    "frame too many": (
        {"views": {"top": video_of([picture(0)] * 13)}},
        r"differ in number: got rows 12, top 13.*--trim shorter",
    ),
    "not json": ({"outcome": {"mass": float("nan")}}, "not JSON"),
    "odd rate": ({"fps": 15.0, "timestamps_T": GOOD.timestamps_T / 1.5}, "got 15, asked for 10"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    changes, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        prepare(make(**changes), RECIPE)


def test_too_short():
    prepare(make(num_frames=2), RECIPE)
    with pytest.raises(DataError, match="too short: got 1 frames, expected at least 2"):
        prepare(make(num_frames=1), RECIPE)


@pytest.mark.parametrize(("rows", "pictures"), [(12, 14), (14, 12)])
def test_trim_cuts_the_longer_and_says_so(rows, pictures):
    recipe = dataclasses.replace(RECIPE, trim="shorter")
    done = prepare(make(rows, pictures), recipe)
    assert done.frames == 12
    assert load(done.members, "actions.npy").shape == (12, 2)
    assert brightness(done.members) == list(range(12))
    meta = json.loads(done.members["meta.json"])
    counts = {"rows": rows, "top": pictures}
    assert meta["source"]["trimmed"] == {"policy": "shorter", "to": 12, "from": counts}
    assert "trimmed" not in json.loads(prepare(make(), recipe).members["meta.json"])["source"]


def test_trim_does_not_hide_a_broken_video():
    with pytest.raises(DataError, match="corrupt"):
        prepare(make(views={"top": failing(6)}), dataclasses.replace(RECIPE, trim="shorter"))


def test_decimation_keeps_every_nth_frame():
    recipe = dataclasses.replace(RECIPE, fps=10)
    done = prepare(make(num_frames=11, fps=30), recipe)
    assert done.frames == 4
    assert brightness(done.members) == [0, 3, 6, 9]
    assert load(done.members, "proprio.npy")[:, 0].tolist() == [0, 3, 6, 9]
    assert load(done.members, "timestamps.npy").tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert load(done.members, "actions.npy").tolist() == [[1, 0], [4, 1], [7, 0], [9.5, 0]]
    assert json.loads(done.members["meta.json"])["source"]["decimation"] == 3


def test_resampled_actions_do_what_the_recorded_ones_did():
    kinds = ("velocity", "delta", "position", "binary", "force")
    dimensions = tuple(Dimension(kind, "1", kind) for kind in kinds)
    generator = np.random.default_rng(0)
    actions = generator.normal(size=(12, 5))
    coarse = resample_actions(actions, dimensions, 4)
    # The path of a robot that integrates velocities, or adds deltas, is the same at the frames kept.
    path = np.cumsum(actions[:, 0]) * 0.1
    assert np.cumsum(coarse[:, 0]) * 0.4 == pytest.approx(path[3::4])
    assert np.cumsum(coarse[:, 1]) == pytest.approx(np.cumsum(actions[:, 1])[3::4])
    assert (coarse[:, 2] == actions[3::4, 2]).all()
    assert (coarse[:, 3] == actions[3::4, 3]).all()
    assert coarse[:, 4] == pytest.approx(actions[:, 4].reshape(3, 4).mean(1))
    assert resample_actions(actions, dimensions, 1) is actions
    assert resample_actions(np.zeros((5, 0)), (), 2).shape == (3, 0)


def test_unknown_kinds_are_not_resampled():
    with pytest.raises(DataError, match=r"'j' cannot be resampled.*--contract"):
        resample_actions(np.zeros((4, 1)), (Dimension("j"),), 2)


def test_decimation_is_whole():
    assert [decimation(30, target) for target in (30, 15, 10)] == [1, 2, 3]
    assert decimation(29.97, 10) == 3
    for target in (20, 60, 8):
        with pytest.raises(DataError, match="whole fraction of the recorded rate: 30, 15, 10"):
            decimation(30, target)


@pytest.mark.parametrize(("rows", "pictures"), [(12, 14), (14, 12)])
def test_trim_at_the_head_keeps_the_ends_together(rows, pictures):
    done = prepare(make(rows, pictures), dataclasses.replace(RECIPE, trim="head"))
    assert done.frames == 12
    assert load(done.members, "actions.npy")[:, 0].tolist() == list(range(rows - 12, rows))
    assert load(done.members, "timestamps.npy")[0] == pytest.approx((rows - 12) / 10)
    assert brightness(done.members) == list(range(pictures - 12, pictures))
    counts = {"rows": rows, "top": pictures}
    meta = json.loads(done.members["meta.json"])
    assert meta["source"]["trimmed"] == {"policy": "head", "to": 12, "from": counts}


@pytest.mark.parametrize("policy", ["shorter", "head"])
@pytest.mark.parametrize(("rows", "pictures"), [(20, 12), (12, 20)])
def test_trim_is_for_small_differences(policy, rows, pictures):
    with pytest.raises(
        DataError, match=r"differ too much to be trimmed: got rows .*within 20%: is one of them"
    ):
        prepare(make(rows, pictures), dataclasses.replace(RECIPE, trim=policy))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *((label, True) for label in (True, 1, 1.0, "1", "success", "True", " Succeeded ", np.bool_(True))),
        *((label, False) for label in (False, 0, "0", "failure", "FALSE", "failed", np.array([0.0]))),
    ],
)
def test_success_is_true_or_false(label, expected):
    assert plain_outcome({"mass": 2, "success": label}) == {"success": expected, "mass": 2}
    members = prepare(make(outcome={"success": label}), RECIPE).members
    assert json.loads(members["meta.json"])["outcome"]["success"] is expected


def test_outcomes_that_are_not_known_are_left_out():
    for label in (None, "", "unknown", float("nan")):
        assert plain_outcome({"success": label}) == {}
    assert plain_outcome({"reward": 3.5}) == {"reward": 3.5}
    assert plain_outcome({"reward": 3.5}, success_reward=3) == {"success": True, "reward": 3.5}
    assert plain_outcome({"reward": 2}, success_reward=3) == {"success": False, "reward": 2}
    assert plain_outcome({"success": 0, "reward": 9}, success_reward=3)["success"] is False
    with pytest.raises(DataError, match="success label: got 'perhaps', expected true or false"):
        plain_outcome({"success": "perhaps"})
    with pytest.raises(DataError, match="success label: got 2"):
        prepare(make(outcome={"success": 2}), RECIPE)


def resampling(fps: float, **changes) -> Recipe:
    return dataclasses.replace(RECIPE, fps=fps, resample="nearest", **changes)


def test_frames_nearest_in_time():
    done = prepare(make(num_frames=12, fps=15), resampling(10))
    assert brightness(done.members) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert load(done.members, "timestamps.npy") == pytest.approx(np.arange(8) / 10)
    assert load(done.members, "proprio.npy")[:, 0] == pytest.approx(1.5 * np.arange(8))
    meta = json.loads(done.members["meta.json"])
    assert (meta["fps"], meta["frames"]) == (10, 8)
    facts = {
        "policy": "nearest",
        "from_fps": 15,
        "repeated_frames": 0,
        "most_off_s": pytest.approx(1 / 30, abs=1e-6),
    }
    assert meta["source"]["resampled"] == facts


def test_a_gap_in_the_clock_repeats_a_picture_and_says_so():
    times = np.arange(12) / 15
    times[6:] += 0.25
    done = prepare(make(num_frames=12, fps=15, timestamps_T=times), resampling(10))
    assert brightness(done.members) == [0, 1, 3, 4, 5, 6, 6, 7, 8, 10]
    assert json.loads(done.members["meta.json"])["source"]["resampled"]["repeated_frames"] == 1


def test_resampling_at_the_recorded_rate_or_a_whole_fraction_changes_nothing():
    jittered = np.cumsum(np.random.default_rng(0).uniform(0.07, 0.13, 12))
    for fps, target in ((10, 10), (20, 10), (30, 10)):
        episode = make(fps=fps, timestamps_T=jittered * 10 / fps)
        plain = prepare(episode, dataclasses.replace(RECIPE, fps=target))
        assert prepare(episode, resampling(target)) == plain


def test_no_frames_are_made_up():
    with pytest.raises(
        DataError, match=r"got 10, asked for 15, expected at most the recorded rate: frames are"
    ):
        prepare(make(), resampling(15))


def test_a_rate_that_only_the_user_knows():
    for times in (np.zeros(0), np.arange(12.0)):
        episode = dataclasses.replace(make(), fps=0.0, timestamps_T=times)
        done = prepare(episode, dataclasses.replace(RECIPE, rates={"arm": 20.0}, fps=10))
        assert load(done.members, "timestamps.npy") == pytest.approx(np.arange(6) / 10)
        with pytest.raises(DataError, match=r"rows a second: got not in the logs; say rate_hz .*--fps"):
            prepare(episode, RECIPE)


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [("", "tidy up"), ("pick; place", "pick; place"), (" pick\n", "pick"), (" ", "tidy up")],
)
def test_episodes_without_an_instruction_get_that_of_the_contract_file(recorded, expected):
    same = [RoleMapping(tuple(map(Change, role))) for role in (SPEC.action, SPEC.proprio)]
    mapping = EmbodimentMapping(*same, text="tidy up")
    done = prepare(make(text=recorded), dataclasses.replace(RECIPE, mappings={"arm": mapping}))
    assert done.text == json.loads(done.members["meta.json"])["text"] == expected
    assert prepare(make(text=recorded), RECIPE).text == recorded.strip()
    assert (load(done.members, "actions.npy") == GOOD.actions_TA).all()
