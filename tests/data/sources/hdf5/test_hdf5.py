"""HDF5 logs read as recorded; files that reach outside themselves refused; damage in one line."""

import json
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest

from vidworld.data.sources.detect import open_source
from vidworld.data.sources.hdf5 import Hdf5Source
from vidworld.errors import ConfigError, DataError


def frames_of(episode, view):
    return np.stack(list(episode.views[view].frames()))


def test_robomimic(robomimic, footage):
    source = open_source(robomimic)
    assert isinstance(source, Hdf5Source)
    assert source.episode_ids() == ["demo_0", "demo_5", "demo_10"]
    assert (source.name, source.fps) == ("image", 20)
    assert source.views == ("agentview_image", "robot0_eye_in_hand_image")
    (spec,) = source.embodiments
    assert (spec.embodiment, spec.control_frame) == ("panda", "base")
    assert [(d.name, d.kind) for d in spec.action][-2:] == [("ee_rz_delta", "delta"), ("gripper", "position")]
    assert "[0.05, 0.5]" in spec.note
    assert [d.name for d in spec.proprio][3:] == ["ee_qx", "ee_qy", "ee_qz", "ee_qw", "finger_0", "finger_1"]
    for index, (name, length) in enumerate((("demo_0", 8), ("demo_5", 12), ("demo_10", 6))):
        episode = source.read(name)
        assert len(episode) == length
        assert (episode.actions_TA[:, 0] == index).all()
        assert (episode.proprio_TS[:, 2] == np.arange(length)).all()
        assert np.allclose(np.diff(episode.timestamps_T), 1 / 20)
        assert np.array_equal(frames_of(episode, "agentview_image"), footage[:length])
        assert np.array_equal(frames_of(episode, "robot0_eye_in_hand_image"), footage[:length, :, ::-1])
    assert source.read("demo_0").outcome == {"success": True, "reward": 1}
    assert source.read("demo_10").outcome == {"reward": 0}


def test_only_stated_settings_are_believed(robomimic, change):
    def edit(file):
        settings = json.loads(file["data"].attrs["env_args"])
        settings["env_kwargs"] = {"controller_configs": {"type": "JOINT_VELOCITY"}}
        file["data"].attrs["env_args"] = json.dumps(settings)

    change(robomimic, edit)
    source = Hdf5Source(robomimic)
    assert source.fps == 0
    assert {d.kind for d in source.embodiments[0].action} == {"unknown"}
    assert source.embodiments[0].embodiment == "unknown"
    assert Hdf5Source(robomimic, fps=25).read("demo_0").fps == 25


def test_libero_folder(tmp_path, footage, write):
    for task in ("open_drawer", "close_drawer"):
        write.libero(tmp_path / "libero" / f"{task}_demo.hdf5", footage, task.replace("_", " "))
    source = Hdf5Source(tmp_path / "libero")
    assert source.episode_ids() == [
        *("close_drawer_demo/demo_0", "close_drawer_demo/demo_1"),
        *("open_drawer_demo/demo_0", "open_drawer_demo/demo_1"),
    ]
    episode = source.read("open_drawer_demo/demo_1")
    assert (episode.text, len(episode), episode.proprio_TS.shape) == ("open drawer", 7, (7, 15))
    assert np.array_equal(frames_of(episode, "agentview_rgb"), footage[:7, ::-1]), "as stored"
    (tmp_path / "libero" / "logs.yaml").write_text("flip: rows\nviews: [agentview_rgb]")
    turned = Hdf5Source(tmp_path / "libero")
    episode = turned.read("open_drawer_demo/demo_1")
    assert np.array_equal(frames_of(episode, "agentview_rgb"), footage[:7])
    assert (turned.views, episode.source["flip"]) == (("agentview_rgb",), "rows")
    assert turned.fingerprint != source.fingerprint


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("sim", [False, True])
def test_act(tmp_path, footage, write, compress, sim):
    for index in (2, 10):
        write.act(tmp_path / "logs" / f"episode_{index}.hdf5", footage, sim=sim, compress=compress)
    source = Hdf5Source(tmp_path / "logs")
    assert source.episode_ids() == ["episode_2", "episode_10"]
    assert source.views == ("cam_high", "cam_left_wrist")
    assert source.fps == (50 if sim else 0), "a real robot's rate is not in the file"
    (spec,) = source.embodiments
    assert (spec.embodiment, spec.rate_hz) == ("aloha_sim" if sim else "aloha", source.fps)
    assert (spec.action[7].name, spec.action[7].unit, spec.action[7].kind) == (
        "right_joint_0",
        "rad",
        "position",
    )
    episode = source.read("episode_10")
    assert (episode.actions_TA[:, 0] == np.arange(12) + 1).all()
    assert (episode.proprio_TS[:, 13] == np.arange(12)).all()
    assert np.array_equal(frames_of(episode, "cam_high"), footage)


def test_channels_that_opencv_swapped(tmp_path, footage, write):
    """A recorder that hands RGB to cv2.imencode stores red as blue: visible, and told to us."""
    write.act(tmp_path / "logs" / "episode_0.hdf5", footage[..., ::-1], compress=True)
    episode = Hdf5Source(tmp_path / "logs").read("episode_0")
    assert np.array_equal(frames_of(episode, "cam_high"), footage[..., ::-1])
    (tmp_path / "logs" / "logs.yaml").write_text("channels: bgr")
    episode = Hdf5Source(tmp_path / "logs").read("episode_0")
    assert np.array_equal(frames_of(episode, "cam_high"), footage)
    assert episode.source["channels"] == "bgr"


def test_robomind(tmp_path, footage, write):
    place = tmp_path / "robomind" / "steam_egg" / "success_episodes" / "run_1" / "data"
    write.robomind(place / "trajectory.hdf5", footage)
    source = open_source(tmp_path / "robomind")
    assert source.episode_ids() == ["steam_egg/success_episodes/run_1/data/trajectory"]
    assert (source.views, source.fps) == (("camera_front",), 0)
    (spec,) = source.embodiments
    assert [d.name for d in spec.action[6:9]] == [
        *("joint_position_left_6", "joint_position_right_0", "joint_position_right_1"),
    ]
    episode = source.read(source.episode_ids()[0])
    assert (episode.text, episode.outcome) == ("steam the egg", {"success": True})
    assert (episode.actions_TA[:, 13] - episode.proprio_TS[:, 13] == 1).all()
    assert np.array_equal(frames_of(episode, "camera_front"), footage)


def test_jpegs_are_decoded_as_pillow_does(tmp_path, footage, write):
    path = write.act(tmp_path / "episode_0.hdf5", footage)
    jpegs = write.encoded(footage, "JPEG", quality=70)
    with h5py.File(path, "r+") as file:
        for name in ("cam_high", "cam_left_wrist"):
            del file[f"observations/images/{name}"]
        file["observations/images/cam_high"] = write.padded(jpegs)
        write.vlen(file["observations/images"], "cam_low", jpegs)
    episode = Hdf5Source(path).read("episode_0")
    error = frames_of(episode, "cam_high").astype(int) - footage
    assert 0 < (error**2).mean() < 80  # what quality 70 costs, drawn pictures more than real ones
    assert np.array_equal(frames_of(episode, "cam_high"), frames_of(episode, "cam_low"))


def test_fields_of_choice(tmp_path, footage, write):
    path = write.act(tmp_path / "logs" / "episode_0.hdf5", footage)
    facts = tmp_path / "logs" / "logs.yaml"
    facts.write_text("state: [observations/qpos, observations/qvel]\naction: [observations/qvel]")
    source = Hdf5Source(path)
    assert (len(source.embodiments[0].action), len(source.embodiments[0].proprio)) == (14, 28)
    assert source.embodiments[0].control_frame == "unknown"
    assert (source.read("episode_0").actions_TA == 1).all()
    facts.write_text("action: [observations/effort]")
    with pytest.raises(DataError, match="no dataset 'observations/effort' in"):
        Hdf5Source(path)
    facts.write_text("views: [cam_low]")
    with pytest.raises(ConfigError, match="got cam_low, expected cam_high or cam_left_wrist"):
        Hdf5Source(path)
    facts.write_text("flip: columns")
    with pytest.raises(ConfigError, match=r"flip.*columns"):
        Hdf5Source(path)


def test_is_small_and_picklable(tmp_path, footage, write):
    for index in range(30):
        write.act(tmp_path / "logs" / f"episode_{index}.hdf5", footage[:2])
    source = Hdf5Source(tmp_path / "logs")
    assert len(source.episode_ids()) == 30
    packed = pickle.dumps(source)
    assert len(packed) < 6000
    assert pickle.loads(packed).read("episode_29").timestamps_T.tolist() == [0, 1]


# What reaches outside the file or could run something.


@pytest.fixture
def secret(tmp_path, footage):
    """A file next to the logs that no log may read."""
    path = tmp_path / "secret.hdf5"
    with h5py.File(path, "w") as file:
        file["numbers"], file["pictures"] = np.full((8, 7), 42.0), footage[:8]
    return path


def test_links_out_of_the_file(robomimic, change, secret):
    def edit(file):
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = h5py.ExternalLink(str(secret), "/numbers")
        del file["data/demo_5/obs/agentview_image"]
        file["data/demo_5/obs/agentview_image"] = h5py.ExternalLink(str(secret), "/pictures")
        del file["data/demo_10"]
        file["data/demo_10"] = h5py.SoftLink("/data/demo_5")

    source = Hdf5Source(robomimic)
    change(robomimic, edit)
    with pytest.raises(DataError, match=r"external link 'actions' in .*links are not followed"):
        source.read("demo_0")
    with pytest.raises(DataError, match="external link 'actions'"):
        Hdf5Source(robomimic)
    change(robomimic, lambda file: file.move("data/demo_0", "old"))
    for name, message in (("demo_5", "external link 'agentview_image'"), ("demo_10", "soft link 'demo_10'")):
        with pytest.raises(DataError, match=message):
            source.read(name)


def test_bytes_that_lie_in_other_files(robomimic, change, secret, tmp_path):
    (tmp_path / "passwords").write_bytes(bytes(range(256)) * 4)

    def edit(file):
        demo = file["data/demo_0"]
        del demo["actions"]
        demo.create_dataset("actions", (8, 7), "f4", external=[(str(tmp_path / "passwords"), 0, 8 * 7 * 4)])
        layout = h5py.VirtualLayout((8, 7), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "numbers", (8, 7))
        del file["data/demo_5/obs/robot0_eef_pos"]
        file.create_virtual_dataset("data/demo_5/obs/robot0_eef_pos", layout)

    source = Hdf5Source(robomimic)
    change(robomimic, edit)
    for name, what in (("demo_0", "'actions'"), ("demo_5", "'obs/robot0_eef_pos'")):
        with pytest.raises(DataError, match=f"{what} in .* lies in another file"):
            source.read(name)


class Canary:
    """Unpickling it would raise the alarm."""

    def __reduce__(self):
        return (pytest.exit, ("a payload ran",))


def test_pickles_and_references_are_refused(robomimic, change):
    payload = np.void(pickle.dumps(Canary()))
    source = Hdf5Source(robomimic)

    def edit(file):
        file["data"].attrs["language_instruction"] = payload
        del file["data/demo_5/actions"]
        file["data/demo_5/actions"] = np.array([payload] * 12)
        del file["data/demo_10/actions"]
        references = file["data/demo_10"].create_dataset("actions", (6,), h5py.ref_dtype)
        references[0] = file["data"].ref

    change(robomimic, edit)
    for name, message in (
        ("demo_0", "attribute 'language_instruction' in .*never unpickled"),
        ("demo_5", "type of 'actions' in .*got references or opaque bytes"),
        ("demo_10", "type of 'actions' in .*got references or opaque bytes"),
    ):
        with pytest.raises(DataError, match=message):
            source.read(name)


def test_sizes_are_capped_before_reading(robomimic, change):
    """Datasets that claim terabytes and take no room in the file."""
    source = Hdf5Source(robomimic)

    def edit(file):
        demo = file["data/demo_0"]
        del demo["actions"]
        demo.create_dataset("actions", (2**40, 7), "f4", chunks=(1024, 7))
        del file["data/demo_0/rewards"]
        file["data/demo_0"].create_dataset("rewards", (1, 2**27), "f4", chunks=(1, 1024))
        del file["data/demo_5/obs/agentview_image"]
        file["data/demo_5/obs"].create_dataset(
            "agentview_image", (12, 2**20, 2**20, 3), "u1", chunks=(1, 64, 64, 3)
        )
        del file["data/demo_10/obs/agentview_image"]
        file["data/demo_10/obs"].create_dataset(
            "agentview_image", (6, 2**12, 2**12, 3), "u1", chunks=(6, 2**12, 2**12, 3)
        )

    change(robomimic, edit)
    for name, message in (
        ("demo_0", "size of 'actions'"),
        ("demo_5", "size of 'obs/agentview_image'"),
        ("demo_10", "chunk size of 'obs/agentview_image'"),
    ):
        with pytest.raises(DataError, match=message):
            source.read(name)
    change(
        robomimic,
        lambda f: (f.pop("data/demo_0/actions"), f.move("data/demo_0/rewards", "data/demo_0/actions")),
    )
    with pytest.raises(DataError, match=r"size of 'actions' .*got \(1, 134217728\), expected .* 4096 a row"):
        source.read("demo_0")


# Damage.


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_cut_file(robomimic, keep):
    content = robomimic.read_bytes()
    robomimic.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"damaged HDF5 file in .*image\.hdf5: got .*truncated"):
        Hdf5Source(robomimic)


def test_damaged_file_among_good_ones_is_one_bad_episode(tmp_path, footage, write):
    for index in range(3):
        path = write.act(tmp_path / "logs" / f"episode_{index}.hdf5", footage)
        if index == 0:
            path.write_bytes(path.read_bytes()[:900])
    source = Hdf5Source(tmp_path / "logs")
    assert source.episode_ids() == ["episode_0", "episode_1", "episode_2"]
    with pytest.raises(DataError, match="damaged HDF5 file"):
        source.read("episode_0")
    assert len(source.read("episode_2")) == 12
    for index, name in enumerate(("a_demo", "b_demo")):
        path = write.libero(tmp_path / "libero" / f"{name}.hdf5", footage)
        if not index:
            path.write_bytes(path.read_bytes()[:2000])
    source = Hdf5Source(tmp_path / "libero")
    assert source.episode_ids() == ["a_demo", "b_demo/demo_0", "b_demo/demo_1"]
    with pytest.raises(DataError, match="damaged HDF5 file"):
        source.read("a_demo")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.__delitem__("data/demo_0/obs/robot0_eef_pos"), "no dataset 'obs/robot0_eef_pos'"),
        (lambda f: f.__delitem__("data/demo_0/obs/agentview_image"), "no camera"),
        (lambda f: f.__delitem__("data/demo_0"), "no group 'data/demo_0'"),
        (
            lambda f: (
                f.__delitem__("data/demo_0/obs/robot0_eef_pos"),
                f["data/demo_0/obs"].create_dataset("robot0_eef_pos", data=np.zeros((8, 3, 2))),
            ),
            r"'obs/robot0_eef_pos' .*\(8, 3, 2\): got float64, expected numbers",
        ),
        (
            lambda f: (
                f.__delitem__("data/demo_0/actions"),
                f["data/demo_0"].create_dataset("actions", data=np.array([b"go"] * 8)),
            ),
            "'actions' .*expected numbers",
        ),
        (
            lambda f: (
                f.__delitem__("data/demo_0/obs/robot0_eef_quat"),
                f["data/demo_0/obs"].create_dataset("robot0_eef_quat", data=np.zeros((5, 4))),
            ),
            "rows of 'obs/robot0_eef_quat' .*got 5, expected 8 as 'obs/robot0_eef_pos'",
        ),
        (lambda f: f["data"].attrs.__setitem__("env_args", "{"), "attribute 'env_args' .*expected JSON"),
    ],
)
def test_bad_episode_names_what_and_where(robomimic, change, edit, message):
    source = Hdf5Source(robomimic)
    source.episode_ids()
    change(robomimic, edit)
    with pytest.raises(DataError, match=message) as caught:
        source.read("demo_0")
    assert "\n" not in str(caught.value)


def test_damaged_chunk_is_found_when_decoded(robomimic, footage):
    with h5py.File(robomimic) as file:
        chunk = file["data/demo_5/obs/agentview_image"].id.get_chunk_info(7)
    content = bytearray(robomimic.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 255
    robomimic.write_bytes(content)
    frames = Hdf5Source(robomimic).read("demo_5").views["agentview_image"].frames()
    assert [np.array_equal(next(frames), footage[index]) for index in range(7)] == [True] * 7
    with pytest.raises(DataError, match=r"damaged picture 7 of '.*agentview_image'"):
        next(frames)


def test_picture_that_is_none(tmp_path, footage, write):
    path = write.act(tmp_path / "episode_0.hdf5", footage, compress=True)
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_high"][4] = 0
    frames = Hdf5Source(path).read("episode_0").views["cam_high"].frames()
    with pytest.raises(DataError, match=r"damaged picture 4 of .*cam_high.*not a JPEG or PNG"):
        list(frames)


def test_other_hdf5_files_are_told_what_is_expected(tmp_path, robomimic, change):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(DataError, match=r"layout of the HDF5 file .*got weights, expected data/demo_0"):
        open_source(tmp_path / "other.h5")
    (tmp_path / "fake.hdf5").write_text("text")
    assert not Hdf5Source.detects(tmp_path / "fake.hdf5")
    (tmp_path / "empty").mkdir()
    assert not Hdf5Source.detects(tmp_path / "empty")
    with pytest.raises(DataError, match="no HDF5 file"):
        Hdf5Source(tmp_path / "empty")
    change(robomimic, lambda f: [f.pop(f"data/demo_{i}/obs") for i in (0, 5, 10)])
    with pytest.raises(DataError, match=r"no camera in 'obs'.*dataset_states_to_obs\.py"):
        Hdf5Source(robomimic)


def test_a_heap_that_would_hang_the_library(robomimic):
    """Data of variable length lie in a heap; the library walks one of zero-sized entries for ever."""
    source = Hdf5Source(robomimic)
    assert source.episode_ids()
    content = bytearray(robomimic.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 32] = bytes(16)
    robomimic.write_bytes(content + b" ")
    with pytest.raises(DataError, match=r"a heap at byte .* that is not whole"):
        source.read("demo_0")


FUZZ = """
import sys, pathlib, numpy as np
from vidworld.data.sources.hdf5 import Hdf5Source
from vidworld.errors import VidworldError
whole, target = pathlib.Path(sys.argv[1]).read_bytes(), pathlib.Path(sys.argv[2])
generator, refused, good = np.random.default_rng(0), 0, 0
for _ in range(150):
    content = bytearray(whole)
    for _ in range(generator.integers(1, 6)):
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    target.write_bytes(content)
    try:
        source = Hdf5Source(target)
        for name in source.episode_ids():
            for video in source.read(name).views.values():
                for frame in video.frames():
                    pass
        good += 1
    except VidworldError:
        refused += 1
print(refused, good)
"""


def test_flipped_bits_are_refused_or_harmless(tmp_path, footage, write):
    """In a process of its own: a fault in the library would take the tests along."""
    path = write.robomimic(tmp_path / "whole.hdf5", footage[:, ::8, ::8], (3, 2))
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), str(tmp_path / "target.hdf5")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, good = map(int, done.stdout.split())
    assert refused > 5
    assert good > 5
