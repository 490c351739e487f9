import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vidworld.data.sources.detect import open_source
from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.data.sources.naming import guess_dimension, view_name
from vidworld.errors import DataError

TOP = "observation.images.top"


def test_reads_both_versions_alike(lerobot, code, lengths):
    source = open_source(lerobot)
    assert source.episode_ids() == ["episode_000003", "episode_000005", "episode_000012"]
    assert (source.views, source.fps) == (("top",), 10.0)
    for (index, length), episode_id in zip(lengths.items(), source.episode_ids(), strict=True):
        episode = source.read(episode_id)
        assert (len(episode), episode.text, episode.embodiment) == (length, "push", "toy_arm")
        assert (episode.actions_TA[:, 0] == index + 0.5).all()
        assert (episode.actions_TA[:, 1] == np.arange(length)).all()
        assert (episode.proprio_TS[:, 0] == np.arange(length)).all()
        assert [code(frame) for frame in episode.views["top"].frames()] == [(index, t) for t in range(length)]


def test_clock_is_kept_as_recorded(lerobot):
    times = open_source(lerobot).read("episode_000012").timestamps_T
    assert times[0] > 0
    assert np.diff(times).std() > 0.005


def test_video_can_be_opened_twice_and_left_early(lerobot_v3, code):
    video = open_source(lerobot_v3).read("episode_000012").views["top"]
    assert code(next(video.frames())) == (12, 0)
    assert [code(frame) for frame in video.frames()][-1] == (12, 16)


def test_units_and_kinds_are_not_guessed():
    assert [
        guess_dimension(name).kind for name in ("j_vel", "elbow.pos", "delta_x", "x_delta", "wrist_torque")
    ] == [
        "velocity",
        "position",
        "delta",
        "delta",
        "force",
    ]
    for ambiguous in ("gripper", "joint_0", "x", "level", "vel_x", "delta_vel", "position_error", "apos"):
        assert guess_dimension(ambiguous).kind == "unknown"
        assert guess_dimension(ambiguous).unit == "unknown"
    assert guess_dimension("elbow_rad").unit == "rad"


def test_names_of_features(lerobot, change_info):
    spec = open_source(lerobot).embodiments[0]
    assert [(d.name, d.kind) for d in spec.action] == [("x_vel", "velocity"), ("gripper", "unknown")]
    assert [d.name for d in spec.proprio] == ["a", "b", "c"]

    def edit(info):
        info["features"]["action"]["names"] = None
        info["robot_type"] = None
        del info["features"]["observation.state"]

    change_info(lerobot, edit)
    source = open_source(lerobot)
    spec = source.embodiments[0]
    assert ([d.name for d in spec.action], spec.proprio) == (["action_0", "action_1"], ())
    assert spec.embodiment == "unknown"
    assert source.read("episode_000005").proprio_TS.shape == (9, 0)


def test_view_names():
    assert [view_name(name) for name in (TOP, "observation.image", "cam.left wrist", "...")] == [
        "top",
        "image",
        "cam_left_wrist",
        "view",
    ]


def test_depth_maps_are_left_out(lerobot_v2, change_info):
    depth = {"dtype": "video", "shape": [48, 64, 3], "info": {"video.is_depth_map": True}}
    change_info(lerobot_v2, lambda info: info["features"].update({"observation.images.depth": depth}))
    assert open_source(lerobot_v2).views == ("top",)


def test_text_from_task_index_when_the_table_has_none(lerobot_v2):
    table = lerobot_v2 / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("\n".join(json.dumps({**row, "tasks": []}) for row in rows))
    assert open_source(lerobot_v2).read("episode_000003").text == "push it"


def test_templates_are_followed_not_the_version(lerobot_v2, change_info):
    (lerobot_v2 / "data").rename(lerobot_v2 / "rows")
    change_info(
        lerobot_v2,
        lambda info: info.update(
            codebase_version="v9",
            data_path="rows/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        ),
    )
    assert len(open_source(lerobot_v2).read("episode_000012")) == 17


@pytest.mark.parametrize("template", ["../x/{episode_index}.parquet", "/etc/{episode_index}", "{evil}"])
def test_templates_stay_inside(lerobot_v2, change_info, template):
    change_info(lerobot_v2, lambda info: info.update(data_path=template))
    with pytest.raises(DataError, match=r"data_path (leaves|names)"):
        open_source(lerobot_v2).read("episode_000003")


def test_pictures_inside_the_parquet(lerobot_v2, change_info, lengths):
    change_info(lerobot_v2, lambda info: info["features"][TOP].update(dtype="image"))
    for path in (lerobot_v2 / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        pictures = []
        for row in range(table.num_rows):
            buffer = io.BytesIO()
            Image.fromarray(np.full((48, 64, 3), 10 * row, np.uint8)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        pq.write_table(table.append_column(TOP, pa.array(pictures)), path)
    video = open_source(lerobot_v2).read("episode_000005").views["top"]
    assert video.num_frames == lengths[5]
    assert [int(frame[0, 0, 0]) for frame in video.frames()] == [10 * row for row in range(9)]


def test_pickles_small_and_reads_after(lerobot):
    source = LeRobotSource(lerobot)
    source.read("episode_000005")
    copy = pickle.loads(pickle.dumps(source))
    assert "_table" not in copy.__dict__
    assert copy.episode_ids() == source.episode_ids()


def test_fingerprint_follows_the_files(lerobot_v2, rewrite_video):
    before = open_source(lerobot_v2).fingerprint
    assert open_source(lerobot_v2).fingerprint == before
    rewrite_video(lerobot_v2, 5, 4)
    assert open_source(lerobot_v2).fingerprint != before


def frames_of(root, episode_id):
    return list(open_source(root).read(episode_id).views["top"].frames())


def test_missing_video(lerobot_v2):
    next(lerobot_v2.rglob("episode_000005.mp4")).unlink()
    with pytest.raises(DataError, match=r"missing video of observation.images.top in .*episode_000005.mp4"):
        open_source(lerobot_v2).read("episode_000005")
    assert len(open_source(lerobot_v2).read("episode_000003")) == 13


@pytest.mark.parametrize("faststart", [{}, {"movflags": "faststart"}])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_truncated_video(lerobot_v2, rewrite_video, faststart, share):
    path = rewrite_video(lerobot_v2, 12, 17, **faststart)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"(truncated|damaged) video.* in .*episode_000012.mp4"):
        frames_of(lerobot_v2, "episode_000012")


def test_corrupt_video(lerobot_v2, rewrite_video):
    path = rewrite_video(lerobot_v2, 12, 17)
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 900
    content[start : start + 600] = bytes(600)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"(corrupt|damaged) video"):
        frames_of(lerobot_v2, "episode_000012")


@pytest.mark.parametrize(
    "content", [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"not a video", b"ffconcat version 1.0"]
)
def test_playlists_are_refused(lerobot_v2, content):
    next(lerobot_v2.rglob("episode_000005.mp4")).write_bytes(content)
    with pytest.raises(DataError, match="damaged video"):
        open_source(lerobot_v2).read("episode_000005")


def test_rate_of_the_video_must_be_the_declared(lerobot_v2, rewrite_video):
    rewrite_video(lerobot_v2, 5, 9, fps=15)
    with pytest.raises(DataError, match=r"frame rate of the video .*got 15 fps, expected .* 10 fps"):
        open_source(lerobot_v2).read("episode_000005")


def test_span_outside_the_shared_video(lerobot_v3):
    path = lerobot_v3 / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[-1][f"videos/{TOP}/from_timestamp"] += 60
    rows[-1][f"videos/{TOP}/to_timestamp"] += 60
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"no frame at 62\.2 s"):
        open_source(lerobot_v3).read("episode_000012")


def test_unequal_frames_are_reported_not_mended(lerobot_v2, rewrite_video):
    rewrite_video(lerobot_v2, 5, 11)
    episode = open_source(lerobot_v2).read("episode_000005")
    assert (len(episode), episode.views["top"].num_frames) == (9, 11)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.pop("timestamp"), "no column 'timestamp'"),
        (lambda rows: rows["action"].__setitem__(2, None), "column 'action' .*got 1 empty rows"),
        (lambda rows: rows.update(frame_index=[0, 1, 2, 4, 5, 6, 7, 8, 9]), "frame_index at row 3 .*got 4"),
        (lambda rows: [rows.update({k: list(v)[:-1]}) for k, v in list(rows.items())], "got 8, expected 9"),
        (lambda rows: rows.update(episode_index=[7] * 9), "rows of episode 5 .*got 0, expected 9"),
    ],
)
def test_rows_at_fault(lerobot_v2, change_rows, edit, message):
    change_rows(lerobot_v2, 5, edit)
    with pytest.raises(DataError, match=message):
        open_source(lerobot_v2).read("episode_000005")


def test_damaged_and_missing_parquet(lerobot_v2):
    next(lerobot_v2.rglob("episode_000003.parquet")).write_bytes(b"PAR1 no")
    next(lerobot_v2.rglob("episode_000005.parquet")).unlink()
    source = open_source(lerobot_v2)
    with pytest.raises(DataError, match="damaged data file"):
        source.read("episode_000003")
    with pytest.raises(DataError, match="missing data file"):
        source.read("episode_000005")
    with pytest.raises(DataError, match="no episode 'episode_000004'"):
        source.read("episode_000004")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda info: info.pop("fps"), "fps in .*expected frames per second"),
        (lambda info: info.pop("data_path"), "no data_path .*older datasets"),
        (lambda info: info["features"].pop("action"), "no feature 'action'"),
        (lambda info: info["features"].pop(TOP), "no camera"),
        (lambda info: info.pop("features"), "no features"),
    ],
)
def test_metadata_at_fault(lerobot_v2, change_info, edit, message):
    change_info(lerobot_v2, edit)
    with pytest.raises(DataError, match=message):
        open_source(lerobot_v2)


def test_open_source_says_what_it_found(lerobot_v2, tmp_path):
    with pytest.raises(DataError, match=r"no such file .*hf download --repo-type dataset lerobot/pusht"):
        open_source("lerobot/pusht")
    with pytest.raises(DataError, match=r"none that is known.*did you mean .*logs\?"):
        open_source(tmp_path)
    (tmp_path / "done" / "shards").mkdir(parents=True)
    (tmp_path / "done" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="shards already"):
        open_source(tmp_path / "done")


def test_real_data_agree_across_versions(real):
    """Episodes 72 and 73 of the v2.1 set are 0 and 1 of the v3.0 set: same rows, same pixels."""
    old = open_source(real("cr5_banana_lerobot_v21")).read("episode_000073")
    new = open_source(real("cr5_banana_lerobot_v30_derived")).read("episode_000001")
    assert (old.actions_TA == new.actions_TA).all()
    assert (old.proprio_TS == new.proprio_TS).all()
    assert (len(new), new.views["top"].num_frames) == (181, 181)
    for _, a, b in zip(range(20), old.views["top"].frames(), new.views["top"].frames(), strict=False):
        assert (a == b).all()
