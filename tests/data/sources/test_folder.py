"""Plain folders of videos and tables: every setting, every fault, and the description written for you."""

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidworld.cli import run
from vidworld.contract import Dimension
from vidworld.data.contract_file import read_contracts
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.describe import UndescribedFolderError
from vidworld.data.sources.detect import open_source
from vidworld.data.sources.folder import FolderSource
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec

LENGTHS = {"run_2": 5, "run_10": 7, "run_3": 4}
SIZE = ("--size", "64x48", "--workers", "1")
YAML = """
fps: 10
views: [front, wrist]
videos: "{episode}/{view}.mp4"
rows: "{episode}/log.csv"
timestamps: time
text: push the cup
success: done
embodiment: my_arm
control_frame: joint
note: recorded by hand
action:
  "cmd_*": {unit: rad/s, kind: velocity}
  grip: {name: gripper, unit: "1", kind: binary}
proprio:
  elbow_pos: {unit: rad}
"""


def columns_of(episode: str, rows: int) -> dict[str, np.ndarray]:
    number = np.arange(rows)
    return {
        "time": 100 + number / 10,
        "cmd_a": number + 0.25,
        "cmd_b": -number * 1.5,
        "elbow_pos": number / 7,
        "grip": number % 2,
        "done": (number == rows - 1) & (episode != "run_3"),
        "unused": number,
    }


def csv_of(columns: dict[str, np.ndarray], mark: str = ",") -> str:
    rows = zip(*columns.values(), strict=True)
    return "\n".join([mark.join(columns), *(mark.join(map(str, row)) for row in rows)]) + "\n"


def add_videos(root: Path, write_video: Callable[..., Path], pattern: str = "{episode}/{view}.mp4") -> None:
    for episode, rows in LENGTHS.items():
        for view in ("front", "wrist"):
            write_video(root / pattern.format(episode=episode, view=view), int(episode[4:]), rows)


@pytest.fixture
def folder(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    root = tmp_path / "my logs"
    add_videos(root, write_video)
    for episode, rows in LENGTHS.items():
        (root / episode / "log.csv").write_text(csv_of(columns_of(episode, rows)))
    (root / "vidworld.yaml").write_text(YAML)
    return root


def change(folder: Path, old: str, new: str) -> Path:
    text = (folder / "vidworld.yaml").read_text()
    assert old in text
    (folder / "vidworld.yaml").write_text(text.replace(old, new))
    return folder


def test_converts(folder, tmp_path, capsys, code):
    out = tmp_path / "d"
    assert run(["shard", str(folder), "--out", str(out), *SIZE, "--val-episodes", "run_3"]) == 0
    assert (
        "3 episodes (2 train, 1 val), 16 frames of front, wrist at 64x48, 10 fps" in capsys.readouterr().out
    )
    dataset = ShardDataset.open(out)
    assert [sample.key for sample in dataset.manifest.samples("train")] == ["run_2", "run_10"]
    for episode, rows in LENGTHS.items():
        read = dataset.read(episode)
        assert read.video is not None
        for view in ("front", "wrist"):
            assert [code(f) for f in read.video[view]] == [(int(episode[4:]), row) for row in range(rows)]
        columns = columns_of(episode, rows)
        wanted = np.column_stack([columns[name] for name in ("cmd_a", "cmd_b", "grip")])
        assert (read.actions_TA == wanted.astype(np.float32)).all()
        assert (read.proprio_TS[:, 0] == columns["elbow_pos"].astype(np.float32)).all()
        assert (read.timestamps_T == columns["time"]).all()
        assert (read.meta["text"], read.meta["outcome"]) == ("push the cup", {"success": episode != "run_3"})
    (contract,) = dataset.manifest.contracts
    assert [(d.name, d.unit, d.kind) for d in contract.action] == [
        ("cmd_a", "rad/s", "velocity"),
        ("cmd_b", "rad/s", "velocity"),
        ("gripper", "1", "binary"),
    ]
    assert [(d.name, d.unit, d.kind) for d in contract.proprio] == [("elbow_pos", "rad", "position")]
    assert (contract.embodiment, contract.control_frame, contract.note) == (
        "my_arm",
        "joint",
        "recorded by hand",
    )


def arrays_of(episode: str, rows: int) -> dict[str, np.ndarray]:
    columns = columns_of(episode, rows)
    return {
        "action": np.column_stack([columns["cmd_a"], columns["grip"]]),
        "elbow_pos": columns["elbow_pos"].astype(np.float32),
        "clock": (columns["time"] * 1e9).astype(np.int64),
        "words": np.array(["left out"] * rows),
        "pictures": np.zeros((rows, 2, 2, 3), np.uint8),
    }


def test_npz_with_arrays_and_nanoseconds(tmp_path, write_video):
    add_videos(tmp_path, write_video)
    for episode, rows in LENGTHS.items():
        np.savez_compressed(tmp_path / f"{episode}.npz", **arrays_of(episode, rows))
    (tmp_path / "dataset.yaml").write_text(
        'fps: 10\nviews: [wrist]\nrows: "{episode}.npz"\ntimestamps: clock\ntimestamp_unit: ns\n'
        'action: {"action.*": {kind: velocity}}\nproprio: {elbow_pos: {unit: rad}}'
    )
    source = open_source(tmp_path)
    (robot,) = source.embodiments
    assert [(d.name, d.kind) for d in robot.action] == [("action.0", "velocity"), ("action.1", "velocity")]
    episode = source.read("run_10")
    assert (episode.actions_TA == arrays_of("run_10", 7)["action"].astype(np.float32)).all()
    assert episode.timestamps_T == pytest.approx(100 + np.arange(7) / 10)
    assert list(episode.views) == ["wrist"]


@pytest.mark.parametrize("structured", [False, True])
def test_npy(tmp_path, write_video, structured):
    add_videos(tmp_path, write_video)
    for episode, rows in LENGTHS.items():
        values = np.arange(rows * 3).reshape(rows, 3).astype(np.float32)
        if structured:
            values = np.array(list(map(tuple, values)), dtype=[("x", "f4"), ("y", "f4"), ("z", "f4")])
        np.save(tmp_path / f"{episode}.npy", values)
    names = ("y", "x") if structured else ("1", "0")
    (tmp_path / "vidworld.yaml").write_text(
        f'fps: 10\nviews: [front]\nrows: "{{episode}}.npy"\naction: {{{names[0]}: {{}}, {names[1]}: {{}}}}'
    )
    source = open_source(tmp_path)
    assert [d.name for d in source.embodiments[0].action] == list(names)
    episode = source.read("run_2")
    assert (episode.actions_TA == np.arange(15).reshape(5, 3)[:, [1, 0]]).all()
    assert episode.proprio_TS.shape == (5, 0)
    assert "frame number / fps" in episode.source["timestamps"]


def test_text_files_clock_and_pickling(folder):
    change(folder, "text: push the cup", 'text_file: "{episode}/task.txt"')
    (folder / "run_2/task.txt").write_text("open the drawer\n")
    source = pickle.loads(pickle.dumps(open_source(folder)))
    assert source.read("run_2").text == "open the drawer"
    with pytest.raises(DataError, match=r"cannot read the instruction in .*run_3/task.txt"):
        source.read("run_3")
    (folder / "run_3/task.txt").write_text("a" * 20_000)
    with pytest.raises(DataError, match=r"length of the instruction in .*expected at most 10000"):
        source.read("run_3")
    before = source.fingerprint
    change(folder, "fps: 10", "fps: 20")
    assert FolderSource(folder).fingerprint != before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fps: 10", "fsp: 10", "unknown setting 'fsp' in .*did you mean 'fps'"),
        ("fps: 10", "fps: 0", "setting 'fps' .*got 0"),
        ("fps: 10", "fps: ten", "setting 'fps' .*got 'ten'"),
        ("fps: 10", "", "setting 'fps'"),
        ("views: [front, wrist]", "views: []", "setting 'views' .*expected different names"),
        ("views: [front, wrist]", "views: [front, front]", "setting 'views' .*expected different names"),
        ("{episode}/{view}.mp4", "{episode}/front.mp4", "setting 'videos' .*expected a path with .*{view}"),
        ("{episode}/{view}.mp4", "{episode}/{cam}.mp4", "setting 'videos' .*expected a path with {episode}"),
        ("{episode}/{view}.mp4", "{episode!r}/{view}.mp4", "setting 'videos' .*expected a path with"),
        ("{episode}/{view}.mp4", "{episode/{view}.mp4", "setting 'videos' "),
        ("{episode}/{view}.mp4", "../{episode}/{view}.mp4", "file name leaves the dataset in videos of"),
        ("{episode}/log.csv", "/etc/{episode}.csv", "file name leaves the dataset in rows of"),
        ("{episode}/log.csv", "{episode}/log.txt", "setting 'rows' .*expected .csv, .npz or .npy"),
        ("{episode}/log.csv", "{episode}/none.csv", "cannot read the table in .*No such file"),
        ("cmd_*", "comd_a", "no column 'comd_a' in action of .*did you mean 'cmd_a'"),
        ("timestamps: time", "timestamps: tme", "no column 'tme' in timestamps of .*did you mean 'time'"),
        ("success: done", "success: won", "no column 'won' in success of"),
        ("kind: velocity", "kind: speed", "setting 'kind' in 'cmd_.' of action .*got 'speed'"),
        ("unit: rad/s", "units: rad/s", "unknown setting 'units' .*did you mean 'unit'"),
        ("unit: rad/s", "name: x", "'cmd_.' gives 2 columns one name"),
        ("name: gripper", "name: cmd_a", "two columns under one name in action"),
        ("text: push the cup", "delimiter: ', '", "setting 'delimiter' .*expected one character"),
        ("text: push the cup", "rows_per_frame: 0", "setting 'rows_per_frame' .*got 0, expected 1 or more"),
        ("{name: gripper,", "{name: 7,", "setting 'action.grip.name' .*got 7"),
        ("embodiment: my_arm", "{", "not valid YAML"),
    ],
)
def test_wrong_descriptions(folder, tmp_path, capsys, old, new, message):
    change(folder, old, new)
    with pytest.raises((ConfigError, DataError), match=message):
        open_source(folder)
    assert run(["shard", str(folder), "--out", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.25,", "", "cells in row 1 in .*got 6, expected 7 as the header"),
        ("1.25", "1.25,1", "cells in row 1 in .*got 8, expected 7 as the header"),
        ("1.25", "fast", "column 'cmd_a' at row 1 in .*got 'fast', expected a number"),
        ("1.25", "", "column 'cmd_a' at row 1 in .*got '', expected a number"),
        ("1.25", "1_25", "column 'cmd_a' at row 1 in .*got '1_25', expected a number"),
        ("cmd_a", "cmd_b", "two columns under one name in .*'cmd_b'"),
        ("cmd_a", "cmd_z", "no column 'cmd_a' in .*got time, cmd_z"),
        ("time,", '"time', "damaged csv"),
        ("time", "\0", "."),
        (
            "time,cmd_a,cmd_b,elbow_pos,grip,done,unused",
            "1,2,3,4,5,6,7",
            "first line .*got numbers, expected names",
        ),
    ],
)
def test_wrong_tables(folder, old, new, message):
    path = folder / "run_3/log.csv"
    source = open_source(folder)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        source.read("run_3")
    assert "\n" not in str(caught.value)
    assert len(source.read("run_2")) == 5


def test_other_delimiters(folder):
    for episode, rows in LENGTHS.items():
        (folder / episode / "log.csv").write_text("\ufeff" + csv_of(columns_of(episode, rows), ";"), "utf-8")
    with pytest.raises(DataError, match=r"one column in the csv .*say delimiter: ';'"):
        open_source(folder)
    change(folder, "text: push the cup", 'delimiter: ";"')
    assert open_source(folder).read("run_2").actions_TA[:, 0].tolist() == [0.25, 1.25, 2.25, 3.25, 4.25]


def test_tables_faster_than_the_video(folder, write_video):
    """Three rows a frame: velocities are averaged, of a switch and of a state one row counts."""
    for episode, rows in LENGTHS.items():
        (folder / episode / "log.csv").write_text(csv_of(columns_of(episode, 3 * rows - 1)))
    change(folder, "text: push the cup", "rows_per_frame: 3")
    change(folder, "timestamps: time\n", "")
    episode = open_source(folder).read("run_2")
    number = np.arange(14)
    assert episode.actions_TA[:, 0].tolist() == [1.25, 4.25, 7.25, 10.25, 12.75]
    assert episode.actions_TA[:, 2].tolist() == [0, 1, 0, 1, 1]
    assert episode.proprio_TS[:, 0] == pytest.approx(number[::3] / 7)
    assert episode.timestamps_T == pytest.approx(np.arange(5) / 10)
    assert {video.num_frames for video in episode.views.values()} == {5}
    change(folder, ", kind: binary", "")
    with pytest.raises(ConfigError, match=r"kind of action 'gripper' in .*got unknown, expected position"):
        open_source(folder)


def test_a_header_that_numpy_wrote_as_a_comment(folder):
    path = folder / "run_3/log.csv"
    path.write_text("# " + path.read_text())
    assert len(open_source(folder).read("run_3")) == 4


def test_faults_that_cost_one_episode(folder, tmp_path, write_video):
    """Every bad episode is named with its reason; what has only a video or only a table is not skipped."""
    table = csv_of(columns_of("run_2", 5))
    for name in ("run_4", "run_5", "run_6", "run_7", "run_8"):
        for view in ("front", "wrist"):
            write_video(folder / name / f"{view}.mp4", 1, 5, 20 if name == "run_7" else 10)
        (folder / name / "log.csv").write_text(table)
    (folder / "run_4/log.csv").write_text(table.replace("1.25", "nan"))
    (folder / "run_5/log.csv").unlink()
    (folder / "run_6/wrist.mp4").unlink()
    (folder / "run_8/log.csv").write_text(table.replace("100.2", "100.1"))
    flags = ("--max-quarantined", "0.9", "--val-fraction", "0")
    assert run(["shard", str(folder), "--out", str(tmp_path / "d"), *SIZE, *flags]) == 0
    reasons = {bad.episode_id: bad.reason for bad in Manifest.read(tmp_path / "d").quarantined}
    assert "action 'cmd_a' at row 1: got nan" in reasons.pop("run_4")
    assert "cannot read the table in run_5/log.csv" in reasons.pop("run_5")
    assert "cannot read the video in run_6/wrist.mp4" in reasons.pop("run_6")
    assert "frame rate of the video in run_7/front.mp4: got 20 fps" in reasons.pop("run_7")
    assert "timestamp at row 2" in reasons.pop("run_8")
    assert not reasons


def test_rate_of_headers_can_be_ignored(folder, write_video):
    write_video(folder / "run_2/front.mp4", 2, 5, 20)
    with pytest.raises(DataError, match="got 20 fps, expected the declared 10 fps"):
        open_source(folder).read("run_2")
    change(folder, "text: push the cup", "ignore_video_rate: true")
    assert open_source(folder).read("run_2").views["front"].num_frames == 5


def test_links_out_of_the_folder(folder, tmp_path):
    for name in ("log.csv", "wrist.mp4"):
        path = folder / "run_2" / name
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
        with pytest.raises(DataError, match="link leaves the dataset"):
            open_source(folder).read("run_2")
        path.unlink()
        (tmp_path / name).rename(path)
    assert len(open_source(folder).read("run_2")) == 5


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_pickles_are_never_run(tmp_path, write_video, suffix):
    add_videos(tmp_path, write_video)
    victim = tmp_path / "run"
    payload = np.array([Canary(str(victim))], dtype=object)
    path = tmp_path / f"run_2.{suffix}"
    if suffix == "npz":
        np.savez(path, x=payload)
    else:
        np.save(path, payload, allow_pickle=True)
    (tmp_path / "vidworld.yaml").write_text(
        f'fps: 10\nviews: [front]\nrows: "{{episode}}.{suffix}"\naction: {{x: {{}}}}'
    )
    with pytest.raises(DataError, match=f"damaged {suffix} in .*allow_pickle"):
        open_source(tmp_path)
    assert not victim.exists()
    np.load(path, allow_pickle=True)["x"] if suffix == "npz" else np.load(path, allow_pickle=True)
    assert victim.exists(), "negative control: the payload works"


@pytest.mark.parametrize("suffix", ["csv", "npz", "npy"])
def test_fuzzed_tables_are_an_episode_or_one_line(tmp_path, write_video, suffix):
    add_videos(tmp_path, write_video)
    for episode, rows in LENGTHS.items():
        path = tmp_path / f"{episode}.{suffix}"
        columns = {name: value.astype(float) for name, value in columns_of(episode, rows).items()}
        match suffix:
            case "csv":
                path.write_text(csv_of(columns))
            case "npz":
                np.savez(path, **columns)
            case _:
                np.save(path, np.column_stack(list(columns.values())))
    wanted = "1" if suffix == "npy" else "cmd_a"
    (tmp_path / "vidworld.yaml").write_text(
        f'fps: 10\nviews: [front]\nrows: "{{episode}}.{suffix}"\naction: {{"{wanted}": {{}}}}'
    )
    source, chance = open_source(tmp_path), random.Random(1)
    path = tmp_path / f"run_2.{suffix}"
    whole = path.read_bytes()
    failed = 0
    for round_ in range(120):
        damaged = bytearray(whole)
        if round_ % 2:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            for _ in range(4):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            episode = source.read("run_2")
        except DataError as error:
            failed += "\n" not in str(error)
        else:
            assert episode.actions_TA.shape == (len(episode), 1)
    assert failed > 30


LAYOUTS = [
    ("{episode}/{view}.mp4", "{episode}/log.csv"),
    ("{episode}/{view}.mp4", "{episode}.csv"),
    ("videos/{episode}/{view}.mp4", "tables/{episode}.npz"),
    ("videos/{view}/{episode}.mp4", "rows/{episode}.csv"),
    ("{view}/{episode}.mp4", "{episode}.npy"),
    ("{episode}_{view}.mp4", "{episode}.csv"),
    ("{episode}.mp4", "{episode}.csv"),
    ("clips/{episode}.mp4", "clips/{episode}.csv"),
]


@pytest.mark.parametrize(("videos", "rows"), LAYOUTS)
def test_a_description_is_written_for_any_usual_layout(tmp_path, write_video, videos, rows, capsys):
    """The lines printed below the error, saved as they are, open the folder."""
    root = tmp_path / "logs"
    add_videos(root, write_video, videos)
    for episode, length in LENGTHS.items():
        path = root / rows.format(episode=episode)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = columns_of(episode, length)
        match path.suffix:
            case ".csv":
                path.write_text(csv_of(columns))
            case ".npz":
                np.savez(path, **columns)
            case _:
                np.save(path, np.column_stack(list(columns.values())))
    assert run(["shard", str(root), "--out", str(tmp_path / "d")]) == 2
    line, empty, *description = capsys.readouterr().err.splitlines()
    assert (
        f"no vidworld.yaml in {root}: got {6 if 'view' in videos else 3} videos; save the lines below" in line
    )
    assert empty == ""
    assert not (tmp_path / "d").exists()
    (root / "vidworld.yaml").write_text("\n".join(description))
    source = open_source(root)
    assert source.episode_ids() == ["run_2", "run_3", "run_10"]
    assert source.views == (("front", "wrist") if "view" in videos else ("camera",))
    reads = {episode: source.read(episode) for episode in LENGTHS}
    for episode, length in LENGTHS.items():
        assert len(reads[episode]) == length
        assert {video.num_frames for video in reads[episode].views.values()} == {length}
    names = [d.name for d in source.embodiments[0].action]
    assert names == (["0"] if rows.endswith("npy") else ["cmd_a", "cmd_b"])
    if not rows.endswith("npy"):
        assert reads["run_2"].timestamps_T[0] == 100


def test_videos_alone(tmp_path, write_video):
    """Without any table the description says what is missing."""
    add_videos(tmp_path, write_video)
    with pytest.raises(UndescribedFolderError) as caught:
        open_source(tmp_path)
    assert "none found: a csv" in caught.value.description
    (tmp_path / "vidworld.yaml").write_text(caught.value.description)
    with pytest.raises(DataError, match="cannot read the table"):
        open_source(tmp_path)


def test_folder_without_videos(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"format of the robot logs .*vidworld\.yaml"):
        open_source(tmp_path)


def test_no_episodes(tmp_path):
    (tmp_path / "vidworld.yaml").write_text("fps: 10\nviews: [front]\naction: {x: {}}")
    with pytest.raises(DataError, match=r"no episodes in .*expected files like {episode}.csv"):
        open_source(tmp_path)


def test_names_with_brackets_are_taken_literally(tmp_path, write_video):
    write_video(tmp_path / "run[1]/front.mp4", 1, 3)
    (tmp_path / "run[1].csv").write_text("x\n1\n2\n3\n")
    (tmp_path / "vidworld.yaml").write_text("fps: 10\nviews: [front]\naction: {x: {}}")
    source = open_source(tmp_path)
    assert source.episode_ids() == ["run[1]"]
    assert json.dumps(source.read("run[1]").source)


REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = REPOSITORY / "docs" / "bring-your-own-data.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_recipe_of_the_card_does_what_it_says(tmp_path, monkeypatch, capsys):
    """As written: the toy folder, the description that the page shows, and what the command prints."""
    monkeypatch.chdir(tmp_path)
    card = REPOSITORY / "datasets" / "folder.md"
    (script,) = blocks(card, "python")
    exec(compile(script, card, "exec"), {})
    assert run(["shard", "my_logs", "--out", "data/mine"]) == 2
    printed = capsys.readouterr().err
    (console,) = blocks(PAGE, "console")
    assert printed == console.partition("\n")[2]
    Path("my_logs/vidworld.yaml").write_text(printed.partition("\n\n")[2])
    assert run(["shard", "my_logs", "--out", "data/mine", "--size", "96x96", "--workers", "1"]) == 0
    said = re.findall(r"prints `([^`]*)`", card.read_text())
    assert capsys.readouterr().out.startswith(said[0])


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = blocks(PAGE, "python")
    with pytest.warns(UserWarning, match="action wheel never changes"):
        exec(compile(script, PAGE, "exec"), {})
    assert len(Manifest.read(Path("data/mine")).samples()) == 2
    (contract,) = blocks(PAGE, "yaml")
    Path("robot.yaml").write_text(contract)
    spec = EmbodimentSpec("log", 10, (Dimension("joint_0"), Dimension("gripper")), (Dimension("joint_0"),))
    described = read_contracts([Path("robot.yaml")], [spec])["log"].spec
    assert [(d.name, d.unit, d.kind) for d in described.action] == [
        ("joint_0", "rad", "position"),
        ("gripper", "1", "binary"),
    ]
