"""Shards -> LeRobot v3.0: the layout as the official source reads it, the way back, and what is refused.

`open_as_official` is written from lerobot 0.4 to 0.6, function by function, without the writer's code.
"""

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidworld import cli
from vidworld.contract import Dimension
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.export_lerobot import Options, export
from vidworld.data.export_lerobot_writer import Layout
from vidworld.data.manifest import SPLITS, Manifest
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.base import SimulatedSource, video_of
from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.errors import ContractError, DataError
from vidworld.types import EmbodimentSpec, Episode

HEIGHT, WIDTH, FPS = 32, 48, 10
LENGTHS = {f"take {number}": length for number, length in enumerate((23, 2, 140, 31, 40))}
VIEWS = ("top", "wrist-left")
VAL = ("take 1", "take 3")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
ROBOT = EmbodimentSpec(
    "toy_arm",
    rate_hz=FPS,
    action=(Dimension("x", "m", "delta"), Dimension("grip", "1", "binary")),
    proprio=(
        Dimension("a", "rad", "position"),
        Dimension("b", "rad", "position"),
        Dimension("c", "N", "force"),
    ),
    control_frame="base",
    note="made up",
)
LIFT = EmbodimentSpec("lift", rate_hz=FPS, action=(Dimension("z"),), proprio=(Dimension("height", "m"),))


def pictures(seed: int, count: int) -> np.ndarray:
    """Soft shapes that move, [T, H, W, 3]: no hard edges, which 4:2:0 colour would blur."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = []
    for time in range(count):
        centre = (WIDTH / 2 + 15 * np.sin(0.2 * time + seed), HEIGHT / 2 + 8 * np.cos(0.3 * time))
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 60)
        frames.append(np.stack([60 + 120 * spot, 90 + 40 * spot + seed, 120 - 60 * spot + x * 0.5], -1))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def make(name: str) -> Episode:
    """An episode with a jittered clock and numbers that only survive without rounding."""
    seed, count = int(name[-1]), LENGTHS[name]
    generator = np.random.default_rng(seed)
    robot = LIFT if seed == 4 else ROBOT
    return Episode(
        episode_id=name,
        embodiment=robot.embodiment,
        fps=FPS,
        views={view: video_of(pictures(seed + 3 * index, count)) for index, view in enumerate(VIEWS)},
        actions_TA=generator.normal(size=(count, len(robot.action))).astype("f4"),
        proprio_TS=generator.normal(size=(count, len(robot.proprio))).astype("f4"),
        timestamps_T=1e9 / 7 + np.arange(count) / FPS + generator.uniform(0, 0.03, count),
        text="" if seed == 1 else f"push the {'rød' if seed % 2 else 'blue'} cup",
        outcome={"success": seed != 2, "score": seed / 3},
    )


def simulated(names: tuple[str, ...]) -> SimulatedSource:
    return SimulatedSource("toys", (ROBOT, LIFT), VIEWS, FPS, names, make)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Four episodes of one robot, two views, two of them held out."""
    out = tmp_path_factory.mktemp("toys") / "shards"
    names = tuple(LENGTHS)[:4]
    options = ConvertOptions(out=out, size=f"{WIDTH}x{HEIGHT}", val_episodes=VAL, workers=1)
    source = dataclasses.replace(simulated(names), embodiments=(ROBOT,))
    convert(source, options)
    return out


@pytest.fixture(scope="session")
def exported(shards, tmp_path_factory) -> Path:
    """The same as LeRobot, in several small files."""
    out = tmp_path_factory.mktemp("lerobot") / "out"
    small = ("--data-file-mb", "0.005", "--video-file-mb", "0.02")
    assert run(shards, out, *small) == 0
    return out


def run(dataset: Path, out: Path, *arguments: object) -> int:
    return cli.run(
        ["export-dataset", str(dataset), "--to", "lerobot", "--out", str(out), *map(str, arguments)]
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What the official loader does with a folder


def load_nested_dataset(folder: Path) -> pa.Table:
    """`io_utils.load_nested_dataset`: every file two levels down, in the order of names."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*/*.parquet")))


def load_tasks(root: Path) -> dict[str, int]:
    """`io_utils.load_tasks`: pandas makes the column an index that the table's note names."""
    table = pq.read_table(root / "meta/tasks.parquet")
    (index,) = json.loads(table.schema.metadata[b"pandas"])["index_columns"]
    assert table.column_names == ["task_index", index]
    return dict(zip(table[index].to_pylist(), table["task_index"].to_pylist(), strict=True))


def hf_type(feature: dict) -> pa.DataType:
    """`feature_utils.get_hf_features_from_features`: shape (1,) is a value, others a list of fixed length."""
    value = {"bool": pa.bool_(), "float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64()}
    single = value[feature["dtype"]]
    (length,) = feature["shape"]
    return single if length == 1 else pa.list_(single, length)


def frame_times(path: Path) -> np.ndarray:
    with av.open(str(path)) as mp4:
        stream = mp4.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(FPS)
        return np.array([float(frame.pts * frame.time_base) for frame in mp4.decode(stream)])


def open_as_official(root: Path) -> dict:
    """Read all metadata, hold every rule that the official reader relies on, and return what was read."""
    info = json.loads((root / "meta/info.json").read_text())
    # utils.DatasetInfo: these fields, no others (it warns of unknown ones), all positive.
    assert list(info) == [
        "codebase_version", "robot_type", "total_episodes", "total_frames", "total_tasks", "chunks_size",
        "data_files_size_in_mb", "video_files_size_in_mb", "fps", "splits", "data_path", "video_path",
        "features",
    ]  # fmt: skip
    assert info["codebase_version"] == "v3.0"
    assert type(info["fps"]) is int
    features = info["features"]
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    # utils.constants.DEFAULT_FEATURES
    bookkeeping = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    assert list(features)[-5:] == list(bookkeeping)
    assert [features[key]["dtype"] for key in bookkeeping] == ["float32", *["int64"] * 4]
    # utils.feature_utils._validate_feature_names
    assert not any("/" in key for key in features)

    rows = load_nested_dataset(root / "data")
    assert rows.column_names == [key for key in features if key not in videos]
    for key in rows.column_names:
        assert rows.schema.field(key).type == hf_type(features[key]), key
        assert rows[key].null_count == 0
    described = json.loads(rows.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(described) == rows.column_names
    assert rows.num_rows == info["total_frames"]
    # dataset_reader.get_item: hf_dataset[i] is the row with index i.
    assert rows["index"].to_pylist() == list(range(rows.num_rows))

    tasks = load_tasks(root)
    assert sorted(tasks.values()) == list(range(info["total_tasks"]))
    episodes = load_nested_dataset(root / "meta/episodes").to_pylist()
    assert [row["episode_index"] for row in episodes] == list(range(info["total_episodes"]))
    end = 0
    frames = {}
    for row in episodes:
        first, last = row["dataset_from_index"], row["dataset_to_index"]
        assert (first, last - first) == (end, row["length"])
        end = last
        part = rows.slice(first, last - first)
        assert set(part["episode_index"].to_pylist()) == {row["episode_index"]}
        assert part["frame_index"].to_pylist() == list(range(row["length"]))
        assert [tasks[text] for text in row["tasks"]] == sorted(set(part["task_index"].to_pylist()))
        # dataset_metadata.get_data_file_path, and the meta file that holds this very row
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        inside = pq.read_table(root / info["data_path"].format(**place))["episode_index"].to_pylist()
        assert inside.count(row["episode_index"]) == row["length"]
        place = {name: row[f"meta/episodes/{name}"] for name in ("chunk_index", "file_index")}
        table = root / "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet".format(**place)
        assert row["episode_index"] in pq.read_table(table)["episode_index"].to_pylist()
        for key in videos:
            # dataset_reader._query_videos: frame at from_timestamp + timestamp, to 0.1 ms (tolerance_s).
            place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            path = root / info["video_path"].format(video_key=key, **place)
            times = frames.setdefault(path, frame_times(path))
            wanted = row[f"videos/{key}/from_timestamp"] + part["timestamp"].to_numpy()
            number = np.round(wanted * info["fps"]).astype(int)
            assert np.abs(times[number] - wanted).max() < 1e-4
            spanned = row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"]
            assert round(spanned * info["fps"], 6) == row["length"]
        check_statistics(
            {key.removeprefix("stats/"): value for key, value in row.items() if "stats/" in key}, features
        )
    assert end == rows.num_rows
    assert sum(map(len, frames.values())) == len(videos) * rows.num_rows
    check_statistics(
        {
            f"{key}/{name}": value
            for key, stats in json.loads((root / "meta/stats.json").read_text()).items()
            for name, value in stats.items()
        },
        features,
    )
    return {"info": info, "rows": rows, "episodes": episodes, "tasks": tasks, "videos": frames}


def check_statistics(flat: dict[str, list], features: dict) -> None:
    """`compute_stats._assert_type_and_shape` and the names that `get_feature_stats` gives."""
    names = ["min", "max", "mean", "std", "count", *QUANTILES]
    assert sorted(flat) == sorted(f"{key}/{name}" for key in features for name in names)
    for key, feature in features.items():
        for name in names:
            expected = (
                (1,)
                if name == "count"
                else (3, 1, 1)
                if feature["dtype"] == "video"
                else tuple(feature["shape"])
            )
            assert np.shape(flat[f"{key}/{name}"]) == expected, (key, name)


def test_the_official_reader_finds_everything(exported, shards):
    found = open_as_official(exported)
    manifest = Manifest.read(shards)
    samples = [sample for split in SPLITS for sample in manifest.samples(split)]
    assert [row["length"] for row in found["episodes"]] == [sample.frames for sample in samples]
    assert [row["tasks"] for row in found["episodes"]] == [[sample.text] for sample in samples]
    assert [row["vidworld/episode_id"] for row in found["episodes"]] == [s.episode_id for s in samples]
    assert found["info"]["splits"] == {"train": "0:2", "val": "2:4"}
    assert found["info"]["robot_type"] == "toy_arm"
    assert found["info"]["features"]["action"]["names"] == ["x", "grip"]
    assert "observation.images.wrist-left" in found["info"]["features"]
    assert [row["vidworld/split"] for row in found["episodes"]] == ["train", "train", "val", "val"]


def test_small_limits_give_several_files_that_keep_them(exported, shards):
    parquet, videos = list(exported.glob("data/*/*")), list(exported.glob("videos/*/*/*"))
    assert len(parquet) > 1
    assert len(videos) > 2 * len(VIEWS) - 1
    spans = [row["length"] for row in load_nested_dataset(exported / "meta/episodes").to_pylist()]
    longest = spans.index(max(spans))
    for row in load_nested_dataset(exported / "meta/episodes").to_pylist():
        for view in VIEWS:
            number = row[f"videos/observation.images.{view}/file_index"]
            path = exported / f"videos/observation.images.{view}/chunk-000/file-{number:03d}.mp4"
            # Only an episode that is too large by itself may go over the limit.
            assert path.stat().st_size < 0.02 * 2**20 or row["episode_index"] == longest


def test_there_and_back_again(exported, shards, tmp_path):
    """Shards -> LeRobot -> shards: numbers equal to the bit, pictures within the codec's error."""
    ids = [f"episode_{index:06d}" for index in (2, 3)]
    options = ConvertOptions(
        out=tmp_path / "again", size=f"{WIDTH}x{HEIGHT}", val_episodes=tuple(ids), workers=1
    )
    convert(LeRobotSource(exported), options)
    before, after = ShardDataset.open(shards), ShardDataset.open(tmp_path / "again")
    assert after.manifest.views == before.manifest.views
    worst = np.inf
    for split in SPLITS:
        old, new = before.manifest.samples(split), after.manifest.samples(split)
        assert [(s.frames, s.text, s.embodiment) for s in new] == [
            (s.frames, s.text, s.embodiment) for s in old
        ]
        for first, second in zip(old, new, strict=True):
            a, b = before.read(first.key), after.read(second.key)
            for name in ("actions_TA", "proprio_TS", "timestamps_T"):
                one, other = getattr(a, name), getattr(b, name)
                assert one.dtype == other.dtype
                assert one.tobytes() == other.tobytes(), name
            assert b.meta["outcome"] == a.meta["outcome"]
            assert b.meta["source"]["episode_id"] == first.episode_id
            assert a.video is not None
            assert b.video is not None
            for view in VIEWS:
                error = (a.video[view].astype(float) - b.video[view]) ** 2
                worst = min(worst, *(10 * np.log10(255**2 / error.mean((1, 2, 3)))))
    assert worst > 35
    # Names, units, kinds, frame, note and statistics: the whole contract is the same one.
    assert [c.digest for c in after.manifest.contracts] == [c.digest for c in before.manifest.contracts]


def test_neighbours_are_not_swapped(exported, shards):
    """The negative control of the comparison above: the frame before or after is further off."""
    source, dataset = LeRobotSource(exported), ShardDataset.open(shards)
    true = dataset.read("take_2-" + Manifest.read(shards).samples("train")[1].key[-8:]).video
    assert true is not None
    read = np.stack(list(source.read("episode_000001").views["top"].frames())).astype(float)
    errors = [np.abs(read[5:100] - true["top"][5 + lag : 100 + lag]).mean() for lag in (-1, 0, 1)]
    assert errors[1] < 0.5 * min(errors[0], errors[2])


def test_equal_bytes_with_any_number_of_workers(shards, tmp_path):
    for workers in (1, 3):
        assert run(shards, tmp_path / str(workers), "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_one_split_and_success_column(shards, tmp_path):
    assert run(shards, tmp_path / "val", "--split", "val") == 0
    found = open_as_official(tmp_path / "val")
    assert found["info"]["splits"] == {"val": "0:2"}
    # Both held-out episodes succeeded: true on the last frame, as in LeRobot's own simulators.
    success = np.array(found["rows"]["next.success"].to_pylist())
    last = [row["dataset_to_index"] - 1 for row in found["episodes"]]
    assert np.flatnonzero(success).tolist() == last
    assert json.loads(found["episodes"][1]["vidworld/outcome"]) == {"score": 1.0, "success": True}


def test_same_fields_as_a_real_dataset(exported):
    """Field by field against a dataset that the official converter wrote."""
    real = Path(__file__).resolve().parents[3] / "shared/data/cr5_banana_lerobot_v30_derived"
    if not real.is_dir():
        pytest.skip("no real v3.0 dataset here")
    infos = [json.loads((root / "meta/info.json").read_text()) for root in (exported, real)]
    ours, theirs = (info.pop("features") for info in infos)
    assert set(infos[0]) == set(infos[1])
    assert [type(infos[0][key]) for key in infos[0] if "size_in" not in key] == [
        type(infos[1][key]) for key in infos[0] if "size_in" not in key
    ]
    assert {key: infos[0][key] for key in ("codebase_version", "data_path", "video_path", "chunks_size")} == {
        key: infos[1][key] for key in ("codebase_version", "data_path", "video_path", "chunks_size")
    }
    top = "observation.images.top"
    assert set(ours[top]["info"]) == set(theirs[top]["info"])
    assert set(theirs) <= set(ours)
    for key, feature in theirs.items():
        # The v2.1 converter repeats fps in each feature; the recorder of 0.4 to 0.6 does not.
        assert set(ours[key]) == set(feature) - {"fps"}
        assert ours[key]["dtype"] == feature["dtype"]
    table, reference = (load_nested_dataset(root / "meta/episodes").schema for root in (exported, real))
    for field in reference:
        assert table.field(field.name).type.id == field.type.id, field.name
    mine, official = (load_nested_dataset(root / "data").schema for root in (exported, real))
    for name in official.names:
        listed = pa.types.is_list(official.field(name).type)
        assert pa.types.is_fixed_size_list(mine.field(name).type) == listed
        leaf = official.field(name).type.value_type if listed else official.field(name).type
        assert (mine.field(name).type.value_type if listed else mine.field(name).type) == leaf
    stats = [json.loads((root / "meta/stats.json").read_text()) for root in (exported, real)]
    for key, features in stats[1].items():
        assert set(features) <= set(stats[0][key])
    assert load_tasks(real) == {"put the banana on the plate": 0}


def test_av1_where_there_is_an_encoder(shards, tmp_path, capfd):
    if "libsvtav1" not in av.codecs_available:
        assert run(shards, tmp_path / "out", "--codec", "av1") == 2
        return
    assert run(shards, tmp_path / "out", "--codec", "av1", "--split", "val") == 0
    assert "Svt" not in capfd.readouterr().err
    found = open_as_official(tmp_path / "out")
    assert found["info"]["features"]["observation.images.top"]["info"]["video.codec"] == "av1"


@pytest.mark.slow
def test_real_pictures_lose_little(tmp_path):
    """A CR5 arm: every episode over 36 dB, every number as recorded, jittered clock included."""
    logs = Path(__file__).resolve().parents[3] / "shared/data/cr5_banana_lerobot_v21"
    if not logs.is_dir():
        pytest.skip("no real dataset here")
    source = LeRobotSource(logs)
    convert(source, ConvertOptions(out=tmp_path / "shards", size="128x96", max_episodes=3, workers=1))
    assert run(tmp_path / "shards", tmp_path / "out") == 0
    open_as_official(tmp_path / "out")
    exported, dataset = LeRobotSource(tmp_path / "out"), ShardDataset.open(tmp_path / "shards")
    samples = [sample for split in SPLITS for sample in dataset.manifest.samples(split)]
    for name, sample in zip(exported.episode_ids(), samples, strict=True):
        read, true = exported.read(name), source.read(sample.episode_id)
        assert read.timestamps_T.tobytes() == true.timestamps_T.tobytes()
        assert read.actions_TA.tobytes() == true.actions_TA.tobytes()
        video = dataset.read(sample.key).video
        assert video is not None
        error = (np.stack(list(read.views["top"].frames())).astype(float) - video["top"]) ** 2
        psnr_T = 10 * np.log10(255**2 / error.mean((1, 2, 3)))
        # Colour at half the resolution (4:2:0) alone costs down to 35 dB in some frames of this size.
        assert psnr_T.mean() > 36
        assert psnr_T.min() > 34


# What is refused


def refused(capsys, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    return error


def test_latents_are_refused_with_the_way_out(latents_dir, tmp_path, capsys):
    error = refused(capsys, run(latents_dir, tmp_path / "out"))
    assert "no pictures to export" in error
    assert "export the video dataset that it was encoded from" in error
    assert list(tmp_path.iterdir()) == [latents_dir]


def test_several_robots_go_into_folders_of_their_own(tmp_path, capsys):
    names = ("take 0", "take 1", "take 4")
    convert(
        simulated(names),
        ConvertOptions(out=tmp_path / "two", size=f"{WIDTH}x{HEIGHT}", val_fraction=0, workers=1),
    )
    error = refused(capsys, run(tmp_path / "two", tmp_path / "out"))
    assert "got lift, toy_arm, expected one; export each into a folder of its own: --embodiment lift" in error
    for robot, episodes in (("lift", 1), ("toy_arm", 2)):
        assert run(tmp_path / "two", tmp_path / robot, "--embodiment", robot) == 0
        found = open_as_official(tmp_path / robot)
        assert (found["info"]["robot_type"], found["info"]["total_episodes"]) == (robot, episodes)
    # A vector of one number is a plain column in LeRobot, and comes back as [T, 1].
    lift = LeRobotSource(tmp_path / "lift")
    assert np.array_equal(lift.read("episode_000000").actions_TA, make("take 4").actions_TA)
    assert "no such embodiment" in refused(capsys, run(tmp_path / "two", tmp_path / "x", "--embodiment", "y"))


def test_out_that_exists_is_kept(shards, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    assert "--out exists already" in refused(capsys, run(shards, out))
    assert "--out holds no meta/info.json" in refused(capsys, run(shards, out, "--overwrite"))
    assert contents(out) == {"diary.txt": b"mine"}
    (out / "diary.txt").unlink()
    assert run(shards, out, "--overwrite", "--split", "val") == 0
    assert run(shards, out, "--overwrite", "--split", "train") == 0
    assert json.loads((out / "meta/info.json").read_text())["splits"] == {"train": "0:2"}


def test_a_place_that_cannot_be_written(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write --out" in refused(capsys, run(shards, tmp_path / "file" / "out"))


def test_a_full_disk_is_one_line_and_leaves_nothing(shards, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert "no space left" in refused(capsys, run(shards, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_stops_it_and_leaves_nothing(shards, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    path = next(copy.rglob("val-*.tar"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"shard shards/{path.name} is damaged" in refused(capsys, run(copy, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--video-file-mb", 0), "--video-file-mb: got 0"),
        (("--workers", 0), "--workers: got 0"),
        (("--codec", "mpeg2"), "codec"),
        (("--too", "lerobot"), "--too"),
    ],
)
def test_bad_options(shards, tmp_path, capsys, arguments, message):
    assert message in refused(capsys, run(shards, tmp_path / "out", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_dataset(tmp_path, capsys):
    assert "no such dataset directory" in refused(capsys, run(tmp_path / "none", tmp_path / "out"))


def test_what_lerobot_cannot_hold_is_refused_by_name(shards):
    contract = Manifest.read(shards).contracts[0]

    def layout(**changes: object) -> Layout:
        given = {"fps": 10.0, "height": HEIGHT, "width": WIDTH, "views": ("top",), "contract": contract}
        return Layout(**(given | changes))  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"got 47x32, expected even numbers.*convert the logs again"):
        layout(width=47)
    with pytest.raises(DataError, match=r"got 'left/wrist', expected a name without '/'"):
        layout(views=("left/wrist",))
    with pytest.raises(DataError, match="name of a LeRobot feature"):
        layout(columns={"reward/dense": "float32"})
    twice = dataclasses.replace(contract, action=(contract.action[0], contract.action[0]))
    with pytest.raises(
        ContractError, match=r"got x, x, expected different names, at least one; .*--contract"
    ):
        layout(contract=twice)


def test_a_spoilt_contract_file_is_named(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "meta/vidworld.json").write_text('{"contract": {"embodiment": 3}}')
    with pytest.raises(DataError, match=r"vidworld\.json.*delete the file to do without it"):
        _ = LeRobotSource(copy).embodiments
    (copy / "meta/vidworld.json").unlink()
    (spec,) = LeRobotSource(copy).embodiments
    assert [(d.name, d.unit) for d in spec.action] == [("x", "unknown"), ("grip", "unknown")]


def test_export_is_streamed(shards, tmp_path, monkeypatch):
    """No more than a few dozen frames of a view are ever decoded at once."""
    asked = []
    read_clip = ShardDataset.read_clip

    def watch(self, key, start, length, *, pictures=True):
        asked.append(length if pictures else 0)
        return read_clip(self, key, start, length, pictures=pictures)

    monkeypatch.setattr(ShardDataset, "read_clip", watch)
    (tmp_path / "out").mkdir()
    export(Options(dataset=shards, out=tmp_path / "out", workers=1), tmp_path / "out")
    assert max(asked) <= 64
    assert sum(asked) == sum(list(LENGTHS.values())[:4])
