"""RLDS sets read as recorded, and every kind of damage as one line that says where."""

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from vidworld.data.sources.detect import open_source
from vidworld.data.sources.rlds import RldsSource
from vidworld.errors import ConfigError, DataError


def open_quietly(root: Path) -> RldsSource:
    source = open_source(root)
    assert isinstance(source, RldsSource)
    return source


def test_reads_what_was_written(rlds, encode):
    source = RldsSource(rlds, fps=10)
    assert source.episode_ids() == [f"train_{index:06d}" for index in range(5)]
    assert (source.name, source.views, source.fps) == ("toy_set", ("front", "wrist"), 10)
    for index, length in enumerate(encode.lengths):
        episode = source.read(f"train_{index:06d}")
        assert (len(episode), episode.text, episode.outcome) == (
            length,
            "push the block",
            {"success": True, "reward": 1},
        )
        assert (episode.actions_TA[:, 0] == index).all()
        assert (episode.actions_TA[:, 1] == np.arange(length)).all()
        assert (episode.proprio_TS[:, 1] == np.arange(length) + 0.5).all()
        assert np.allclose(np.diff(episode.timestamps_T), 0.1)
        assert episode.source["file_path"] == f"/lab/{index}.npy"
        assert (episode.source["complete"], episode.source["record"]) == (True, index % 3)
        for camera, view in enumerate(source.views):
            frames = list(episode.views[view].frames())
            assert len(frames) == episode.views[view].num_frames == length
            for step, frame in enumerate(frames):
                assert abs(frame.astype(int) - encode.frame(index, step, camera)).max() <= 3


def test_is_small_and_picklable(rlds):
    source = open_quietly(rlds)
    assert len(source.views) == 2
    assert source.read("train_000001").text
    packed = pickle.dumps(source)
    assert len(packed) < 10_000
    assert pickle.loads(packed).read("train_000004").source["shard"].endswith("00001-of-00002")


def test_ids_open_no_file(rlds):
    for path in rlds.glob("*.tfrecord*"):
        path.write_bytes(b"")
    assert len(open_quietly(rlds).episode_ids()) == 5


def test_rate_is_known_or_zero(rlds, encode, tmp_path):
    source = RldsSource(rlds)
    assert (source.fps, source.embodiments[0].rate_hz) == (0, 0)
    assert np.array_equal(source.read("train_000002").timestamps_T, np.arange(4))
    told = RldsSource(rlds, fps=7.5)
    assert (told.fps, told.read("train_000000").fps) == (7.5, 7.5)
    for name, fps in (("viola", 20), ("austin_buds_dataset_converted_externally_to_rlds", 20), ("bridge", 5)):
        root = encode.write(tmp_path / name, [[encode.episode(0, 3)]], name=name)
        assert RldsSource(root).fps == fps
    (rlds / "logs.yaml").write_text("view: [front]")
    with pytest.raises(ConfigError, match="did you mean 'views'"):
        RldsSource(rlds)


def test_camera_that_is_always_black_is_left_out_by_its_pixels(encode, tmp_path):
    episodes = [encode.episode(index, 4, black=["wrist"]) for index in range(3)]
    root = encode.write(tmp_path / "a", [episodes])
    with pytest.warns(UserWarning, match="wrist left out, black in all"):
        assert RldsSource(root).views == ("front",)
    with warnings.catch_warnings(action="ignore"):
        episode = RldsSource(root).read("train_000001")
    assert (list(episode.views), episode.source["left_out_black"]) == (["front"], ["wrist"])
    (root / "logs.yaml").write_text("views: [wrist, front]")
    source = RldsSource(root)
    assert source.views == ("wrist", "front")
    assert source.read("train_000001").source["black_views"] == ["wrist"]
    (root / "logs.yaml").write_text("views: [top]")
    with pytest.raises(ConfigError, match=r"got top, expected front or wrist"):
        _ = RldsSource(root).views
    # Black in some episodes only: kept, and named where it is black.
    episodes[1] = encode.episode(1, 4)
    source = RldsSource(encode.write(tmp_path / "b", [episodes]))
    assert source.views == ("front", "wrist")
    assert source.read("train_000000").source["black_views"] == ["wrist"]
    assert "black_views" not in source.read("train_000001").source


def test_missing_file_is_a_warning_and_ids_stay(rlds):
    next(rlds.glob("*-00000-of-*")).unlink()
    source = RldsSource(rlds)
    with pytest.warns(UserWarning, match="1 of 2 files .* are not here: toy_set-train.tfrecord-00000"):
        assert source.episode_ids() == ["train_000003", "train_000004"]
    assert (source.read("train_000003").actions_TA[:, 0] == 3).all()
    next(rlds.glob("*-00001-of-*")).unlink()
    with pytest.raises(DataError, match="no TFRecord file"):
        RldsSource(rlds).episode_ids()


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_cut_file(rlds, keep):
    path = next(rlds.glob("*-00000-of-*"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    source = RldsSource(rlds)
    assert len(source.episode_ids()) == 5
    with pytest.raises(DataError, match=rf"truncated record [02] in {path}: got \d+ bytes, expected \d+"):
        source.read("train_000000")
    assert source.read("train_000003").source["record"] == 0


def test_file_cut_between_two_records(rlds, encode):
    path = next(rlds.glob("*-00000-of-*"))
    first = encode.record(encode.example(encode.episode(0, 6)))
    assert path.read_bytes().startswith(first)
    path.write_bytes(first)
    with pytest.raises(
        DataError, match=r"episodes in the file .*got 1, expected 3 as dataset_info.json says"
    ):
        RldsSource(rlds).read("train_000000")


def test_flipped_byte_spares_the_other_episodes(rlds, encode):
    path = next(rlds.glob("*-00000-of-*"))
    content = bytearray(path.read_bytes())
    content[len(encode.record(encode.example(encode.episode(0, 6)))) + 1000] ^= 4
    path.write_bytes(content)
    source = RldsSource(rlds)
    assert [len(source.read(f"train_00000{index}")) for index in (0, 2)] == [6, 4]
    with pytest.raises(DataError, match="checksum of the record"):
        source.read("train_000001")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.pop("steps/action"), "no field 'action' in .*, record 1"),
        (lambda e: e.update({"steps/action": np.zeros(8, "f4")}), "numbers of 'action' .*got 8, expected 3"),
        (lambda e: e.update({"steps/action": [b"x"]}), "field 'action' .*got bytes, expected numbers"),
        (lambda e: e["steps/observation/front"].pop(), "pictures of 'observation/front' .*got 8, expected 9"),
        (lambda e: e.pop("steps/observation/front"), "no pictures 'observation/front'"),
        (
            lambda e: e.update({"steps/observation/state": np.zeros(3, "f4")}),
            "numbers of 'observation/state' .*got 3, expected 9 x 2",
        ),
        (
            lambda e: e["steps/observation/front"].__setitem__(0, b"GIF89a" + bytes(50)),
            "damaged picture 0 .*not a JPEG or PNG",
        ),
    ],
)  # fmt: skip
def test_bad_record_names_field_and_place(encode, tmp_path, edit, message):
    episodes = [encode.episode(index, 9) for index in range(2)]
    edit(episodes[1])
    source = RldsSource(encode.write(tmp_path / "x", [episodes]))
    with pytest.raises(DataError, match=message) as caught:
        source.read("train_000001")
    assert "\n" not in str(caught.value)
    assert len(source.read("train_000000")) == 9


def test_damaged_picture_is_found_when_decoded(encode, tmp_path):
    broken = encode.episode(0, 9)
    whole = broken["steps/observation/front"][3]
    broken["steps/observation/front"][3] = whole[: len(whole) // 2]
    video = RldsSource(encode.write(tmp_path / "x", [[broken]])).read("train_000000").views["front"]
    with pytest.raises(DataError, match=r"damaged picture 3 of observation/front in .*record 0"):
        list(video.frames())


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("dataset_info.json", lambda c: c.update(splits=[]), "no splits"),
        ("dataset_info.json", lambda c: c["splits"][0].update(shardLengths=["x"]), "shardLengths"),
        ("dataset_info.json", lambda c: c["splits"][0].update(shardLengths=["-4"]), "shardLengths"),
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(filepathTemplate="../../{SPLIT}.tfrecord-{SHARD_X_OF_Y}"),
            "filepathTemplate",
        ),
        (
            "dataset_info.json",
            lambda c: c["splits"][0].update(filepathTemplate="{SPLIT}.array_record-{SHARD_X_OF_Y}"),
            "filepathTemplate",
        ),
        ("dataset_info.json", lambda c: c["splits"][0].update(name="../x"), "filepathTemplate"),
        ("features.json", lambda c: c["featuresDict"]["features"].pop("steps"), "no `steps`"),
        ("features.json", lambda c: c["featuresDict"]["features"]["steps"].clear(), "features in"),
    ],
)
def test_bad_metadata(rlds, change_json, file, edit, message):
    change_json(rlds / file, edit)
    with pytest.raises(DataError, match=message):
        RldsSource(rlds).episode_ids()


def test_shape_that_cannot_be_an_action_allocates_nothing(rlds, change_json):
    def edit(content):
        steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"][
            "features"
        ]
        steps["action"]["tensor"]["shape"]["dimensions"] = [str(2**40)]

    change_json(rlds / "features.json", edit)
    with pytest.raises(DataError, match=r"no action in .*features\.json"):
        RldsSource(rlds)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_metadata_that_is_no_json(rlds, content):
    (rlds / "features.json").write_text(content)
    with pytest.raises(DataError, match=r"features\.json"):
        RldsSource(rlds)


def test_actions_in_a_dictionary_and_numbered_cameras(encode, tmp_path):
    steps = {
        "action": encode.group(world_vector=encode.tensor(3), open_gripper=encode.tensor(dtype="bool")),
        "observation": encode.group(
            left=encode.group(rgb=encode.image(), joints=encode.tensor(2, dtype="float64")),
            right=encode.group(rgb=encode.image(), joints=encode.tensor(2, dtype="float64")),
            natural_language_instruction={"text": {}},
            language_embedding=encode.tensor(512),
        ),
    }
    pictures = [encode.picture(encode.frame(0, step), "PNG") for step in range(4)]
    values = {
        "steps/action/world_vector": np.arange(12, dtype=np.float32),
        "steps/action/open_gripper": np.array([0, 1, 1, 0]),
        "steps/observation/natural_language_instruction": [b"go", b"go", b"stop", b"stop"],
        **{f"steps/observation/{side}/rgb": pictures for side in ("left", "right")},
        **{f"steps/observation/{side}/joints": np.arange(8, dtype=np.float32) for side in ("left", "right")},
    }
    source = RldsSource(encode.write(tmp_path / "x", [[values]], name="other", steps=steps))
    assert source.views == ("left_rgb", "right_rgb")
    spec = source.embodiments[0]
    assert [d.name for d in spec.action] == [
        "open_gripper",
        "world_vector_0",
        "world_vector_1",
        "world_vector_2",
    ]
    assert [d.name for d in spec.proprio][::2] == ["observation.left.joints_0", "observation.right.joints_0"]
    assert {d.kind for d in (*spec.action, *spec.proprio)} == {"unknown"}
    episode = source.read("train_000000")
    assert episode.actions_TA[1].tolist() == [1, 3, 4, 5]
    assert episode.text == "go; stop"
    assert episode.outcome == {}
    frame = next(episode.views["left_rgb"].frames())
    assert np.array_equal(frame, encode.frame(0, 0)), "PNG is exact"
    (tmp_path / "x" / "logs.yaml").write_text(
        "action: [action/world_vector]\nstate: [observation/right/joints]\nchannels: bgr\nflip: rows"
    )
    source = RldsSource(tmp_path / "x")
    episode = source.read("train_000000")
    assert (episode.actions_TA.shape, episode.proprio_TS.shape) == ((4, 3), (4, 2))
    assert np.array_equal(next(episode.views["left_rgb"].frames()), frame[::-1, :, ::-1])
    assert episode.source["flip"] == "rows"
    (tmp_path / "x" / "logs.yaml").write_text("action: [action/left]")
    with pytest.raises(
        ConfigError, match="got action/left, expected action/open_gripper, action/world_vector"
    ):
        RldsSource(tmp_path / "x")


def test_droid_layout(encode, tmp_path):
    """The fields of DROID's own schema (docs/the-droid-dataset.md of its repository)."""
    numbers = {"cartesian_position": 6, "joint_position": 7, "gripper_position": 1}
    cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    steps = {
        "action": encode.tensor(7, dtype="float64"),
        "action_dict": encode.group(**{k: encode.tensor(n, dtype="float64") for k, n in numbers.items()}),
        "language_instruction": {"text": {}},
        "language_instruction_2": {"text": {}},
        "observation": encode.group(
            **{k: encode.tensor(n, dtype="float64") for k, n in numbers.items()},
            **{camera: encode.image() for camera in cameras},
        ),
    }
    rows = {name: np.arange(5 * width, dtype=np.float32) / 10 for name, width in numbers.items()}
    values = {
        "steps/action": np.zeros(35, np.float32),
        "steps/language_instruction": [b""] * 5,
        "steps/language_instruction_2": [b"close the drawer"] * 5,
        **{f"steps/action_dict/{name}": value + 1 for name, value in rows.items()},
        **{f"steps/observation/{name}": value for name, value in rows.items()},
        **{
            f"steps/observation/{name}": [encode.picture(encode.frame(i, t)) for t in range(5)]
            for i, name in enumerate(cameras)
        },
        "episode_metadata/recording_folderpath": [b"/droid/1"],
    }
    source = RldsSource(encode.write(tmp_path / "x", [[values]], name="droid_100", steps=steps))
    assert (source.fps, source.views) == (15, cameras)
    spec = source.embodiments[0]
    assert [(d.name, d.unit, d.kind) for d in spec.action][-2:] == [
        ("ee_yaw", "rad", "position"),
        ("gripper", "1", "position"),
    ]
    assert [d.name for d in spec.proprio] == [
        *("ee_x", "ee_y", "ee_z", "ee_roll", "ee_pitch", "ee_yaw"),
        *(f"joint_{index}" for index in range(7)),
        "gripper",
    ]
    episode = source.read("train_000000")
    assert np.allclose(episode.actions_TA[2], [2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 1.2])
    assert episode.text == "close the drawer"
    assert episode.source["recording_folderpath"] == "/droid/1"


def test_detection(rlds, tmp_path):
    assert RldsSource.detects(rlds)
    with pytest.raises(DataError, match=r"did you mean .*1\.0\.0\?"):
        open_source(rlds.parent)
    shutil.copytree(rlds, tmp_path / "copy")
    first = RldsSource(tmp_path / "copy").fingerprint
    assert first == RldsSource(rlds).fingerprint
    (tmp_path / "copy" / "logs.yaml").write_text("flip: rows")
    assert RldsSource(tmp_path / "copy").fingerprint != first


def test_unknown_episode(rlds):
    for name in ("train_000005", "val_000000", "train", "train_x", "train_-1", "train_²"):
        with pytest.raises(DataError, match="no episode"):
            RldsSource(rlds).read(name)
