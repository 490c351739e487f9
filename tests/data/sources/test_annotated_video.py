"""mp4 + JSON sets: two rates in one file, states for actions, wrong headers, hostile and damaged JSON."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidworld.cli import run
from vidworld.data.manifest import Manifest
from vidworld.data.rotation import to_matrix
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.annotated_video import AnnotatedVideoSource
from vidworld.data.sources.detect import open_source
from vidworld.errors import ConfigError, DataError

POSE = ["ee_x", "ee_y", "ee_z", "ee_roll", "ee_pitch", "ee_yaw", "gripper"]
RAW = {"0": 13, "10": 18, "9": 10}
"""Name of the JSON in train -> raw rows at 15 Hz: 5, 6 and 4 frames."""


def poses(rows: int, seed: int) -> np.ndarray:
    """A path whose roll goes through pi and comes out at -pi."""
    values = np.random.default_rng(seed).uniform(-1, 1, (rows, 7)).round(6)
    values[:, 3] = (np.linspace(3.0, 3.3, rows) + np.pi) % (2 * np.pi) - np.pi
    values[:, 6] = np.linspace(0, 1, rows)
    return values


def with_actions(number: int, raw: int, split: str, path: str) -> dict[str, Any]:
    """A JSON of droid_subset: `raw` rows at 15 Hz, every third of them a frame."""
    observed, joints = poses(raw, number), np.arange(raw * 7).reshape(raw, 7) / 100
    return {
        "texts": ["" if number == 9 else f"task {number}"],
        "episode_id": number,
        "success": number % 2,
        "video_length": -(-raw // 3),
        "raw_length": raw,
        "videos": [{"video_path": f"videos/{split}/{path}/{view}.mp4"} for view in range(3)],
        "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{path}/0.pt"}],
        "states": observed[::3].tolist(),
        "observation.state.joint_position": joints.tolist(),
        "action.cartesian_position": (observed[:, :6] + 0.01).tolist(),
        "action.gripper_position": observed[:, 6].tolist(),
        "action.joint_velocity": joints.tolist(),
    }


def without_actions(name: str, frames: int) -> dict[str, Any]:
    """A JSON of droid_new_setup."""
    return {
        "texts": ["fold the towel"],
        "episode_id": name,
        "success": 1,
        "videos": [{"video_path": f"videos/val/{name}/{view}.mp4"} for view in range(3)],
        "states": poses(frames, int(name)).tolist(),
        "joints": np.ones((frames, 8)).tolist(),
    }


def write(folder: Path, name: str, record: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


@pytest.fixture
def subset(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    root = tmp_path / "logs" / "droid_subset"
    for split, episodes in (("train", RAW), ("val", {"199": 12})):
        for name, raw in episodes.items():
            write(root / "annotation" / split, name, with_actions(int(name), raw, split, name))
            for view in range(3):
                write_video(root / f"videos/{split}/{name}/{view}.mp4", int(name), -(-raw // 3), 5)
    return root


@pytest.fixture
def new_setup(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """Headers say 4 fps, and episode 0003 has a frame too many."""
    root = tmp_path / "logs" / "droid_new_setup"
    for name, frames in (("0001", 6), ("0003", 5)):
        write(root / "annotation/val", name, without_actions(name, frames))
        for view in range(3):
            write_video(root / f"videos/val/{name}/{view}.mp4", int(name), frames + (name == "0003"), 4)
    return root


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_what_the_source_says(subset):
    source = open_source(subset)
    assert (source.name, source.fps) == ("droid_subset", 5.0)
    assert source.views == ("exterior_1", "exterior_2", "wrist")
    assert source.episode_ids() == ["train-0", "train-9", "train-10", "val-199"]
    (robot,) = source.embodiments
    assert [d.name for d in robot.action] == POSE
    assert [d.name for d in robot.proprio] == [*POSE, *(f"joint_{i}" for i in range(7))]
    assert {(d.unit, d.kind) for d in robot.action} == {
        ("m", "position"),
        ("rad", "position"),
        ("1", "position"),
    }
    assert (robot.control_frame, robot.rate_hz) == ("base", 5.0)
    episode = source.read("train-9")
    assert (episode.text, episode.outcome) == ("", {"success": True})
    assert episode.source["episode_id"] == 9
    assert source.read("train-10").text == "task 10"
    assert episode.timestamps_T.tolist() == pytest.approx([0, 0.2, 0.4, 0.6])


def test_commands_at_15_hz_become_the_last_one_of_each_frame(subset):
    source = AnnotatedVideoSource(subset)
    for name, raw in RAW.items():
        record = json.loads((subset / f"annotation/train/{name}.json").read_text())
        commands = np.column_stack(
            [record["action.cartesian_position"], record["action.gripper_position"]]
        ).astype(np.float32)
        episode = source.read(f"train-{name}")
        last = [min(3 * t + 2, raw - 1) for t in range(-(-raw // 3))]
        assert (episode.actions_TA == commands[last]).all()
        assert (episode.actions_TA != commands[::3][: len(last)]).any(), (
            "negative control: the first of three"
        )
        assert (episode.proprio_TS[:, :7] == np.float32(record["states"])).all()
        joints = np.float32(record["observation.state.joint_position"])
        assert (episode.proprio_TS[:, 7:] == joints[::3]).all()
        assert {video.num_frames for video in episode.views.values()} == {len(episode)}


def test_other_fields_can_be_chosen(subset):
    """Velocities are averaged over the three commands of a frame, as their kind asks."""
    facts = subset / "logs.yaml"
    before = AnnotatedVideoSource(subset).fingerprint
    facts.write_text(
        "action: [action.joint_velocity, action.gripper_position]\nstate: [observation.state.joint_position]"
    )
    source = open_source(subset)
    assert source.fingerprint != before
    (robot,) = source.embodiments
    assert [d.kind for d in robot.action] == ["velocity"] * 7 + ["position"]
    assert (robot.action[0].unit, robot.control_frame, len(robot.proprio)) == ("rad/s", "unknown", 7)
    velocities = np.array(
        json.loads((subset / "annotation/train/9.json").read_text())["action.joint_velocity"]
    )
    episode = source.read("train-9")
    mean = [velocities[start : start + 3].mean(0) for start in (0, 3, 6, 9)]
    assert episode.actions_TA[:, :7] == pytest.approx(np.array(mean), abs=1e-6)
    assert episode.proprio_TS.shape == (4, 7)
    facts.write_text("action: [action.torque]")
    with pytest.raises(DataError, match=r"no field 'action.torque' in .*got texts, episode_id"):
        open_source(subset)
    facts.write_text("acton: [x]")
    with pytest.raises(ConfigError, match="did you mean 'action'"):
        open_source(subset)
    facts.write_text("flip: rows")
    with pytest.raises(ConfigError, match=r"logs.yaml: expected action and state only"):
        open_source(subset)


def test_next_state_is_the_action_where_there_is_none(new_setup):
    source = AnnotatedVideoSource(new_setup)
    (robot,) = source.embodiments
    assert "no actions in the logs" in robot.note
    assert "mp4 headers of annotation/val say 4 fps, the frames are 5 Hz" in robot.note
    assert len(robot.action) == 7
    episode = source.read("val-0001")
    states = np.float32(json.loads((new_setup / "annotation/val/0001.json").read_text())["states"])
    assert (episode.actions_TA[:-1] == states[1:]).all()
    assert (episode.actions_TA[-1] == states[-1]).all()
    assert np.abs(np.diff(states[:, 3])).max() > 6, "the roll jumps at pi, and is left so"
    assert episode.source["video_header_fps"] == 4.0
    assert "next frame" in episode.source["actions"]
    assert episode.source["episode_id"] == "0001"


def test_two_parts_are_two_embodiments(subset, new_setup, code):
    source = open_source(subset.parent)
    assert len(source.episode_ids()) == 6
    assert source.episode_ids()[0] == "droid_new_setup-val-0001"
    assert {robot.embodiment for robot in source.embodiments} == {"droid_franka", "droid_franka_next_state"}
    for name in ("droid_subset-train-10", "droid_new_setup-val-0001"):
        episode = source.read(name)
        frames = list(episode.views["wrist"].frames())
        assert [code(frame)[1] for frame in frames] == list(range(6))
    assert source.read("droid_subset-val-199").embodiment == "droid_franka"
    again = pickle.loads(pickle.dumps(source))
    assert again.episode_ids() == source.episode_ids()
    before = source.fingerprint
    (subset / "videos/val/199/0.mp4").write_bytes(b"other")
    assert source.fingerprint != before


def test_frame_too_many_needs_a_policy(new_setup, tmp_path, capsys):
    flags = ["--size", "64x48", "--workers", "1", "--val-fraction", "0", "--max-quarantined", "0.5"]
    assert run(["shard", str(new_setup), "--out", str(tmp_path / "a"), *flags]) == 0
    (bad,) = Manifest.read(tmp_path / "a").quarantined
    assert bad.episode_id == "val-0003"
    assert "got rows 5, exterior_1 6, exterior_2 6, wrist 6" in bad.reason
    assert "--trim shorter" in bad.reason
    capsys.readouterr()
    assert run(["shard", str(new_setup), "--out", str(tmp_path / "b"), *flags, "--trim", "shorter"]) == 0
    dataset = ShardDataset.open(tmp_path / "b")
    assert {sample.key: sample.frames for sample in dataset.manifest.samples()} == {
        "val-0001": 6,
        "val-0003": 5,
    }
    meta = dataset.read("val-0003").meta
    assert meta["source"]["trimmed"]["to"] == 5
    assert meta["outcome"] == {"success": True}
    (contract,) = dataset.manifest.contracts
    assert "the next frame's state (absolute) is the action" in contract.note


def test_irasim_states(tmp_path, write_video):
    """Poses and gripper apart, a rate that only the mp4 header says, cameras with names."""
    record = {
        "episode_id": "7",
        "task": "robot_trajectory_prediction",
        "texts": ["push", "push "],
        "videos": [{"video_path": "videos/train/7/rgb.mp4"}],
        "state": poses(6, 1).tolist(),
        "continuous_gripper_state": [0, 0, 1, 1, 1, 0.5],
        "action": [[0.0] * 7] * 5,
    }
    write(tmp_path / "annotation/train", "7", record)
    write_video(tmp_path / "videos/train/7/rgb.mp4", 7, 6, 4)
    source = open_source(tmp_path)
    assert (source.fps, source.views) == (4.0, ("view_0",))
    episode = source.read("train-7")
    assert episode.text == "push"
    assert episode.actions_TA.shape == (6, 7)
    assert episode.actions_TA[:, 6].tolist() == [0, 1, 1, 1, 0.5, 0.5]

    record["videos"] = [{"camera": "left wrist", "video_path": "videos/train/7/rgb.mp4"}]
    write(tmp_path / "annotation/train", "7", record | {"fps": 8})
    source = AnnotatedVideoSource(tmp_path)
    assert (source.fps, source.views) == (8.0, ("left_wrist",))
    assert source.read("train-7").source["video_header_fps"] == 4.0
    assert AnnotatedVideoSource(tmp_path, fps=5).fps == 5


def test_irasim_actions_only(tmp_path, write_video):
    """The layout of Language Table: one video, 2 numbers an action, no state and no text."""
    record = {
        "actions": [[0.03, -0.02], [0.005, 0.001], [0.05, 0.02]],
        "video_path": "videos/test/000027.mp4",
        "latent_video_path": "latent_videos/test/000027.pt",
        "episode_id": "000027",
    }
    write(tmp_path / "annotation/test", "000027", record)
    write_video(tmp_path / "videos/test/000027.mp4", 27, 3, 10)
    source = open_source(tmp_path)
    (robot,) = source.embodiments
    assert [(d.name, d.kind) for d in robot.action] == [("actions_0", "unknown"), ("actions_1", "unknown")]
    episode = source.read("test-000027")
    assert episode.proprio_TS.shape == (3, 0)
    assert (episode.actions_TA == np.float32(record["actions"])).all()
    write_video(tmp_path / "videos/test/000028.mp4", 28, 3, 30)
    write(tmp_path / "annotation/test", "000028", record | {"video_path": "videos/test/000028.mp4"})
    with pytest.raises(DataError, match=r"frame rate of the video .* got 30 fps, expected the declared 10"):
        open_source(tmp_path).read("test-000028")


@pytest.mark.parametrize(
    "path",
    [
        "../../secret.mp4",
        "/etc/passwd",
        "videos/../../x.mp4",
        "a\\..\\b.mp4",
        "a\0b.mp4",
        "",
        7,
        None,
        ["x"],
        {},
    ],
)
def test_hostile_paths(subset, path):
    file = subset / "annotation/train/9.json"
    edit(file, lambda record: record["videos"][1].update(video_path=path))
    with pytest.raises(DataError, match=r"^file name .*annotation/train/9\.json"):
        AnnotatedVideoSource(subset).read("train-9")


def test_links_out_of_the_dataset(subset, tmp_path):
    target = tmp_path / "elsewhere.mp4"
    video, note = subset / "videos/train/9/0.mp4", subset / "annotation/train/10.json"
    video.rename(target)
    video.symlink_to(target)
    with pytest.raises(DataError, match=r"link leaves the dataset.*cp -rL"):
        AnnotatedVideoSource(subset).read("train-9")
    note.rename(tmp_path / "elsewhere.json")
    note.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match="link leaves the dataset"):
        AnnotatedVideoSource(subset).read("train-10")
    inside = subset / "videos/train/9/copy.mp4"
    target.rename(inside)
    video.unlink()
    video.symlink_to(inside)
    assert len(AnnotatedVideoSource(subset).read("train-9")) == 4, "a link within the dataset is fine"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("states", [[1.0] * 7, [1.0] * 6], "'states' .*rows of different widths"),
        ("states", [["1.0"] * 7] * 4, "'states' .*expected rows of numbers"),
        ("states", [[True] * 7] * 4, "'states' .*expected rows of numbers"),
        ("states", [[10**400] * 7] * 4, "'states' .*"),
        ("states", [[None] * 7] * 4, "'states' .*expected rows of numbers"),
        ("states", [[1.0] * 3] * 4, "'states' .*3 numbers a row, expected 7"),
        ("states", [], "'states' .*"),
        ("states", "none", "'states' .*expected rows of numbers"),
        ("states", {"a": 1}, "'states' .*expected rows of numbers"),
        ("states", [[0.0] * 7] * 5, "rows of 'observation.* got 10, expected 3 a frame, 13 to 15 for the 5"),
        (
            "action.gripper_position",
            [0.0] * 4,
            "rows of 'action.gripper_position' .*got 4, expected 3 a frame",
        ),
        ("success", "yes", "success .*got 'yes', expected 0 or 1"),
        ("success", 2, "success .*expected 0 or 1"),
        ("texts", [1], "texts .*expected a list of texts"),
        ("texts", {"a": "b"}, "texts .*expected a list of texts"),
        ("texts", ["a" * 20_000], "texts .*got 20000 characters, expected at most 10000"),
        ("episode_id", [1], "episode_id .*expected a number or a text"),
        ("episode_id", True, "episode_id .*expected a number or a text"),
        ("videos", [], "videos .*expected a list of"),
        ("videos", "x.mp4", "videos .*expected a list of"),
        ("videos", [{"video_path": "videos/train/9/7.mp4"}] * 3, "cannot read the video .*No such file"),
        ("videos", [{"video_path": "annotation/train/9.json"}] * 3, "video container .*expected .mp4"),
        ("videos", [{"camera": "a", "video_path": "x.mp4"}] * 2, "two cameras under one name"),
    ],
)
def test_wrong_fields(subset, key, value, message):
    edit(subset / "annotation/train/9.json", lambda record: record.update({key: value}))
    with pytest.raises(DataError, match=message) as caught:
        AnnotatedVideoSource(subset).read("train-9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged JSON"),
        ('{"states": [[1, 2', "damaged JSON"),
        ("[1, 2]", "got list, expected an object"),
        ("[" * 100_000, "damaged JSON"),
        ('{"states": ' + "9" * 5000 + "}", "damaged JSON"),
        ('{"\xff": 1}', "fields of the JSON"),
        ("{}", "got none, expected states"),
    ],
)
def test_damaged_files(subset, content, message):
    """A damaged JSON, even the first, costs its episode and no other."""
    (subset / "annotation/train/0.json").write_text(
        content, encoding="latin-1" if "\xff" in content else None
    )
    source = AnnotatedVideoSource(subset)
    assert len(source.read("train-9")) == 4
    with pytest.raises(DataError, match="damaged JSON" if "\xff" in content else message):
        source.read("train-0")


def test_a_json_too_large_is_not_read(subset):
    with (subset / "annotation/train/0.json").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(DataError, match=r"size of the JSON .*got 268435457 bytes, expected 268435456"):
        AnnotatedVideoSource(subset).read("train-0")


def test_infinite_and_missing_numbers_reach_the_converter(subset, tmp_path):
    """Values that are not finite are recorded facts: the converter refuses them with row and name."""
    edit(subset / "annotation/train/9.json", lambda record: record["states"][2].__setitem__(1, float("nan")))
    edit(subset / "annotation/train/10.json", lambda record: record["states"][1].__setitem__(0, 1e300))
    flags = ["--size", "64x48", "--workers", "1", "--max-quarantined", "0.5"]
    assert run(["shard", str(subset), "--out", str(tmp_path / "d"), *flags]) == 0
    reasons = {bad.episode_id: bad.reason for bad in Manifest.read(tmp_path / "d").quarantined}
    assert "'ee_y' at row 2: got nan" in reasons["train-9"]
    assert "'ee_x' at row 1: got inf" in reasons["train-10"]


def test_fuzzed_json_is_an_episode_or_one_line(subset):
    """Any damage to a JSON gives a whole episode or a DataError, never another exception."""
    file = subset / "annotation/train/9.json"
    whole = file.read_bytes()
    chance = random.Random(0)
    swaps = [None, True, -1, 1e308, "x" * 50, [], {}, [[]], [[[1.0]]], [[1, [2]]], "../../x", float("inf")]
    failed = 0
    for round_ in range(150):
        damaged = bytearray(whole)
        match round_ % 3:
            case 0:
                del damaged[chance.randrange(len(damaged)) :]
            case 1:
                for _ in range(5):
                    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            case _:
                record = json.loads(whole)
                for key in chance.sample(sorted(record), 2):
                    record[key] = chance.choice(swaps)
                damaged = bytearray(json.dumps(record).encode())
        file.write_bytes(damaged)
        try:
            episode = AnnotatedVideoSource(subset).read("train-9")
        except DataError as error:
            failed += "\n" not in str(error)
        else:
            assert episode.actions_TA.shape == (len(episode), 7)
            assert episode.proprio_TS.shape == (len(episode), 14)
    assert failed > 75


def test_parts_of_different_rates(subset, tmp_path, write_video):
    other = subset.parent / "other"
    write(other / "annotation/val", "1", without_actions("1", 3) | {"fps": 10})
    for view in range(3):
        write_video(other / f"videos/val/1/{view}.mp4", 1, 3, 10)
    with pytest.raises(DataError, match=r"parts of different frame rates .*convert each alone"):
        open_source(subset.parent)


def test_other_folders_are_not_of_this_format(tmp_path):
    (tmp_path / "annotation").mkdir()
    assert not AnnotatedVideoSource.detects(tmp_path)
    with pytest.raises(DataError, match="no JSON in annotation"):
        AnnotatedVideoSource(tmp_path)


PARTS = {"droid_subset": (11, 854), "droid_new_setup": (13, 1433)}
LONGER = {"0003", "0006", "0013"}


@pytest.mark.parametrize("part", PARTS)
def test_real_counts(real, part):
    """As stated where the data came from: 24 episodes, 2287 frames, three of them one frame longer."""
    source = open_source(real("ctrl_world_droid") / "dataset_example" / part)
    episodes = [source.read(name) for name in source.episode_ids()]
    assert (len(episodes), sum(map(len, episodes))) == PARTS[part]
    for episode in episodes:
        extra = part == "droid_new_setup" and episode.episode_id.removeprefix("val-") in LONGER
        assert {video.num_frames for video in episode.views.values()} == {len(episode) + extra}
        assert len(episode.views) == 3
    if part == "droid_subset":
        record = json.loads((source.root / "annotation/val/899.json").read_text())  # type: ignore[attr-defined]
        read = source.read("val-899")
        assert (read.proprio_TS[:, 7:] == np.float32(record["joints"])[:, :7]).all(), "15 Hz rows [::3]"


def test_real_motion_has_no_lag(real):
    """Frames change when the arm moves, and most so without a shift; the frame too many is the last."""
    source = open_source(real("ctrl_world_droid") / "dataset_example" / "droid_new_setup")
    scores = np.zeros(7)
    for name in ("val-0006", "val-0008", "val-0013"):
        episode = source.read(name)
        frames = np.stack([frame[::8, ::8] for frame in episode.views["wrist"].frames()]).astype(np.float32)
        moved = np.abs(np.diff(frames[: len(episode)], axis=0)).mean((1, 2, 3))[3:-3]
        turned = np.abs(np.diff(episode.proprio_TS[:, 7:], axis=0)).sum(1)
        scores += [np.corrcoef(moved, turned[3 + lag : len(turned) - 3 + lag])[0, 1] for lag in range(-3, 4)]
    assert abs(int(np.argmax(scores)) - 3) <= 1, scores


def flange(joints_T7: np.ndarray) -> np.ndarray:
    """Pose [T, 4, 4] of a Franka's flange in its base, by the maker's (modified) Denavit-Hartenberg table."""
    half = np.pi / 2
    table = [(0, 0.333, 0), (0, 0, -half), (0, 0.316, half), (0.0825, 0, half), (-0.0825, 0.384, -half)]
    table += [(0, 0, half), (0.088, 0, half), (0, 0.107, 0)]
    pose = np.broadcast_to(np.eye(4), (len(joints_T7), 4, 4))
    for (a, d, alpha), angle in zip(table, [*joints_T7.T, np.zeros(len(joints_T7))], strict=True):
        step = np.zeros((len(joints_T7), 4, 4))
        cos, sin, ca, sa = np.cos(angle), np.sin(angle), np.cos(alpha), np.sin(alpha)
        step[:, 0, 0], step[:, 0, 1], step[:, 0, 3] = cos, -sin, a
        step[:, 1, 0], step[:, 1, 1], step[:, 1, 2], step[:, 1, 3] = sin * ca, cos * ca, -sa, -d * sa
        step[:, 2, 0], step[:, 2, 1], step[:, 2, 2], step[:, 2, 3] = sin * sa, cos * sa, ca, d * ca
        step[:, 3, 3] = 1
        pose = pose @ step
    return pose


@pytest.mark.parametrize("name", ["droid_subset-val-899", "droid_new_setup-val-0012"])
def test_real_states_are_the_flange_in_the_base(real, name):
    """Names, units, rotation and control frame of the layout, checked against the arm's own geometry."""
    source = open_source(real("ctrl_world_droid") / "dataset_example")
    episode = source.read(name)
    spec = next(s for s in source.embodiments if s.embodiment == episode.embodiment)
    assert {d.rotation for d in spec.proprio[3:6]} == {"euler_xyz"}
    pose = flange(episode.proprio_TS[:, 7:].astype(np.float64))
    assert np.abs(pose[:, :3, 3] - episode.proprio_TS[:, :3]).max() < 1e-5
    angles = episode.proprio_TS[:, 3:6].astype(np.float64)
    assert np.abs(pose[:, :3, :3] - to_matrix(angles, "euler_xyz")).max() < 1e-5
    assert np.abs(pose[:, :3, :3] - to_matrix(angles, "euler_XYZ")).max() > 0.1, "negative control"


CONTRACTS = [
    Path(__file__).resolve().parents[3] / "datasets" / f"ctrl_world_droid{part}.contract.yaml"
    for part in ("", "_new_setup")
]


def test_real_contract_files(real, tmp_path):
    """The recipe's contract files make rotations that do not jump."""
    logs = str(real("ctrl_world_droid") / "dataset_example")
    names = ["droid_subset-val-899", "droid_new_setup-val-0006"]
    flags = ["--size", "64x48", "--workers", "1", "--trim", "shorter", "--views", "wrist"]
    flags += ["--episodes", *names, "--val-fraction", "0", "--contract", *map(str, CONTRACTS)]
    assert run(["shard", logs, "--out", str(tmp_path / "d"), *flags]) == 0
    dataset = ShardDataset.open(tmp_path / "d")
    for name in names:
        read = dataset.read(name)
        assert (read.actions_TA.shape[1], read.proprio_TS.shape[1]) == (10, 17)
        assert np.abs(np.diff(read.actions_TA[:, 3:9], axis=0)).max() < 0.7
        recorded = open_source(logs).read(name).actions_TA[:, 3]
        assert np.abs(np.diff(recorded)).max() > 6, "negative control: as recorded they do"


@pytest.mark.slow
def test_real_conversion(real, tmp_path, capsys):
    """Both parts at once: every frame of every view is decoded, three episodes are trimmed."""
    logs = str(real("ctrl_world_droid") / "dataset_example")
    flags = ["--size", "64x48", "--trim", "shorter", "--val-episodes", "droid_subset-val-899"]
    flags += ["--contract", *map(str, CONTRACTS)]
    assert run(["shard", logs, "--out", str(tmp_path / "d"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "24 episodes (23 train, 1 val), 2287 frames of exterior_1, exterior_2, wrist" in printed
    dataset = ShardDataset.open(tmp_path / "d")
    dataset.verify_all()
    trimmed = {
        sample.episode_id[-4:]
        for sample in dataset.manifest.samples()
        if "trimmed" in dataset.read(sample.key).meta["source"]
    }
    assert trimmed == LONGER
