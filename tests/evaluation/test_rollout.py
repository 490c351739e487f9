"""`vidworld rollout`: what it writes, that it repeats, and that bad input ends in one line and code 2."""

import json
import struct
import zlib

import numpy as np
import pytest

from vidworld import cli, media
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.shards import ShardDataset
from vidworld.errors import ContractError
from vidworld.evaluation import commands
from vidworld.evaluation.grounding import ground_episode
from vidworld.world.spec import WorldSpec


@pytest.fixture(scope="session")
def episode(planar_data):
    return ShardDataset.open(planar_data).manifest.samples("val")[0].key


@pytest.fixture
def rollout(untrained_run, planar_data, episode, tmp_path):
    """Run the command with some arguments; returns (exit code, output directory)."""

    def run(*arguments, prompt=None, data=True, out="out"):
        given = ["--prompt", *(prompt or [episode]), *(["--data", str(planar_data)] if data else [])]
        out = tmp_path / out
        return cli.run(["rollout", str(untrained_run), "--out", str(out), *given, *map(str, arguments)]), out

    return run


def test_an_episode_is_imagined_and_compared(rollout, episode, capsys):
    code, out = rollout("--frames", 6, "--samples", 2, "--context", 3, "--start", 2, "--seed", 5)
    assert code == 0, capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "actions.npy", "grid.mp4", "proprio.npz", "proprio.png", "rollout.json", "sample-000.mp4",
        "sample-001.mp4", "strip.png",
    ]  # fmt: skip
    frames, fps = media.read_video(out / "sample-000.mp4")
    assert frames.shape == (9, 32, 32, 3)
    assert fps == 10
    proprio = np.load(out / "proprio.npz", allow_pickle=False)
    assert proprio["predicted_NTS"].shape == (2, 6, 4)
    assert proprio["recorded_TS"].shape == (6, 4)
    assert proprio["names"].tolist() == ["shoulder", "elbow", "tip_x", "tip_y"]
    assert proprio["units"].tolist() == ["rad", "rad", "m", "m"]
    record = json.loads((out / "rollout.json").read_text())
    assert record["prompt"]["key"] == episode
    assert (record["seed"], record["samples"], record["frames"]) == (5, 2, 6)
    assert record["world"]["checkpoint"] == "step-00000001"
    assert len(record["world"]["weights_sha256"]) == 64
    printed = capsys.readouterr().out
    assert "strip.png" in printed


def test_the_recording_is_what_followed_the_prompt(untrained_run, planar_data, episode):
    dataset = ShardDataset.open(planar_data)
    spec = WorldSpec.read(untrained_run)
    grounding = ground_episode(dataset, episode, spec, context=3, start=2, frames=5)
    whole = dataset.read(episode)
    assert whole.video is not None
    view = whole.video[spec.views[0]]
    assert np.array_equal(grounding.prompt.frames[:, 0], view[2:5])
    assert grounding.prompt.actions is not None
    assert grounding.recording is not None
    assert np.array_equal(grounding.prompt.actions, whole.actions_TA[2:4])
    assert np.array_equal(grounding.recording.frames_TVHWC[:, 0], view[5:10])
    # actions[t] leads to frame t + 1: the first imagined frame, 5, follows action 4.
    assert np.array_equal(grounding.recording.actions_TA, whole.actions_TA[4:9])
    assert np.array_equal(grounding.recording.proprio_TS, whole.proprio_TS[5:10])


def test_a_rollout_repeats_and_another_seed_differs(rollout):
    arguments = ("--frames", 3, "--samples", 2)
    results = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, folder = rollout(*arguments, "--seed", seed, out=out)
        assert code == 0
        results[out] = (folder / "sample-001.mp4").read_bytes()
        predicted = np.load(folder / "proprio.npz")["predicted_NTS"]
        results[out + "p"] = predicted
    assert results["a"] == results["b"]
    assert np.array_equal(results["ap"], results["bp"])
    assert not np.array_equal(results["ap"], results["cp"])


def test_its_own_actions_file_repeats_it(rollout):
    _, first = rollout("--frames", 4, "--samples", 1)
    code, again = rollout("--actions", first / "actions.npy", "--samples", 1, out="again")
    assert code == 0
    assert np.array_equal(
        np.load(first / "proprio.npz")["predicted_NTS"], np.load(again / "proprio.npz")["predicted_NTS"]
    )
    assert "recorded_TS" not in np.load(again / "proprio.npz")


def test_a_picture_and_a_sweep(rollout, tmp_path):
    media.write_png(tmp_path / "start.png", np.full((60, 60, 3), 90, np.uint8))
    code, out = rollout(
        "--resize", "--samples", 1, "--frames", 10, prompt=[str(tmp_path / "start.png")], data=False
    )
    assert code == 0
    record = json.loads((out / "rollout.json").read_text())
    assert record["actions"]["source"] == "sweep"
    assert media.read_video(out / "grid.mp4")[0].shape[0] == 11


def test_a_video_prompt(rollout, tmp_path):
    media.write_mp4(tmp_path / "start.mp4", np.full((8, 32, 32, 3), 90, np.uint8), 10)
    arguments = ("--samples", 1, "--frames", 2, "--actions", "sweep:brush")
    code, out = rollout(*arguments, prompt=[str(tmp_path / "start.mp4")], data=False)
    assert code == 0
    assert json.loads((out / "rollout.json").read_text())["prompt"]["context"] == 4


def test_an_existing_output_stays_unless_told(rollout, tmp_path, capsys):
    arguments = ("--frames", 2, "--samples", 1)
    assert rollout(*arguments)[0] == 0
    assert rollout(*arguments)[0] == 2
    assert "exists already" in capsys.readouterr().err
    assert rollout(*arguments, "--overwrite", "--seed", 9)[0] == 0
    assert json.loads((tmp_path / "out" / "rollout.json").read_text())["seed"] == 9
    # Somebody's own folder is not an earlier rollout.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert rollout(*arguments, "--overwrite", out="mine")[0] == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def write_npy(path, array):
    np.save(path / "actions.npy", array)
    return "--actions", path / "actions.npy"


def write_csv(path, text):
    (path / "actions.csv").write_text(text)
    return "--actions", path / "actions.csv"


GOOD_CSV = "brush,elbow_velocity,shoulder_velocity\n" + "0,0.5,0.1\n" * 6

BAD_ACTIONS = {
    "width": (lambda path: write_npy(path, np.zeros((6, 2))), "shape (6, 2), expected 3"),
    "axes": (lambda path: write_npy(path, np.zeros(3)), "shape of the actions"),
    "length": (lambda path: write_npy(path, np.zeros((3, 3))), "number of actions"),
    "dtype": (lambda path: write_npy(path, np.full((6, 3), "a")), "dtype"),
    "pickle": (lambda path: write_npy(path, np.full((6, 3), None)), "not a plain .npy"),
    "NaN": (
        lambda path: write_npy(path, np.full((6, 3), np.nan)),
        "'shoulder_velocity' not finite at step 0",
    ),
    "degrees": (lambda path: write_npy(path, np.full((6, 3), 57.3)), "'shoulder_velocity' out of range"),
    "csv name": (lambda path: write_csv(path, GOOD_CSV.replace("brush", "brsh")), "no brush; unknown brsh"),
    "csv cell": (lambda path: write_csv(path, GOOD_CSV + "0,x,0\n"), "row 7"),
    "csv width": (lambda path: write_csv(path, "0,0\n" * 6), "shape (6, 2)"),
    "csv NaN": (lambda path: write_csv(path, "0,nan,0\n" * 6), "'elbow_velocity' not finite"),
    "csv empty": (lambda path: write_csv(path, "\n"), "csv without rows"),
    "missing": (lambda path: ("--actions", path / "none.npy"), "no such file"),
    "suffix": (lambda path: ("--actions", path), "no such file"),
    "dimension": (lambda path: ("--actions", "sweep:wrist"), "dimension to sweep"),
    "episode": (lambda path: ("--actions", "episode:none"), "episode 'none' is not there"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ACTIONS.values(), ids=BAD_ACTIONS.keys())
def test_bad_actions_end_in_one_line(rollout, tmp_path, capsys, arguments, message):
    code, out = rollout(*arguments(tmp_path), "--frames", 5)
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert message in error
    assert "\n" not in error.partition("vidworld: error")[2]
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def bomb(path):
    # Only the header is needed: it must be refused before anything is decoded.
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")
    return [str(path / "bomb.png")]


def playlist(path):
    (path / "list.mp4").write_text("#EXTM3U\n/etc/passwd\n")
    return [str(path / "list.mp4")]


def large(path):
    media.write_png(path / "large.png", np.zeros((64, 64, 3), np.uint8))
    return [str(path / "large.png")]


def fast(path):
    media.write_mp4(path / "fast.mp4", np.zeros((8, 32, 32, 3), np.uint8), 30)
    return [str(path / "fast.mp4")]


def short(path):
    media.write_mp4(path / "short.mp4", np.zeros((2, 32, 32, 3), np.uint8), 10)
    return [str(path / "short.mp4")]


BAD_PROMPTS = {
    "no such episode": (lambda path: ["ghost"], "episode 'ghost' is not there", True),
    "no dataset": (lambda path: ["ghost"], "episode ids with --data", False),
    "20k picture": (bomb, "too large to decode", False),
    "playlist": (playlist, "not a video file", False),
    "other size": (large, "pass --resize", False),
    "other rate": (fast, "got 30 fps, expected 10 fps", False),
    "too short": (short, "frames of the prompt video", False),
    "missing": (lambda path: [str(path / "none.mp4")], "no such file", False),
    "mixed": (lambda path: ["a.png", "ghost"], "episode ids with --data, or files", False),
}


@pytest.mark.parametrize(("make", "message", "data"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_bad_prompts_end_in_one_line(rollout, tmp_path, capsys, make, message, data):
    code, out = rollout("--actions", "sweep", "--frames", 2, prompt=make(tmp_path), data=data)
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", 30), "to imagine"),
        (("--samples", 0), "--samples"),
        (("--steps", 0), "--steps"),
        (("--guidance", -1), "guidance"),
        (("--context", 0), "context 0"),
        (("--seed", -1), "seed"),
        (("--frmes", 3), "--frames"),
    ],
)
def test_bad_numbers_end_in_one_line(rollout, capsys, arguments, message):
    code, out = rollout(*arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert not out.exists()


def test_no_run(tmp_path, planar_data, capsys):
    arguments = ["rollout", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--prompt", "x"]
    assert cli.run(arguments) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_diverging_world_names_the_frame(rollout, tmp_path, capsys):
    actions = np.zeros((6, 3), np.float32)
    actions[2] = 3e38
    code, out = rollout(*write_npy(tmp_path, actions), "--allow-out-of-range")
    assert code == 4
    assert "not finite from frame 6 on" in capsys.readouterr().err
    assert not out.exists()


def contract(*kinds) -> ActionContract:
    values = np.random.default_rng(0).uniform(-1, 3, (500, len(kinds)))
    dimensions = tuple(Dimension(f"d{index}", "rad", kind) for index, kind in enumerate(kinds))
    return ActionContract("arm", 10.0, dimensions, dimensions, Statistics.of(values), Statistics.of(values))


def test_named_columns_come_in_any_order(tmp_path):
    arm = contract("velocity", "velocity", "velocity")
    (tmp_path / "named.csv").write_text("d2,d0,d1\n2,0,1\n2.5,0.5,1.5\n")
    (tmp_path / "plain.csv").write_text("0,1,2\n0.5,1.5,2.5\n")
    named, plain = (commands.from_file(tmp_path / name, arm) for name in ("named.csv", "plain.csv"))
    assert np.array_equal(named.actions_TA, plain.actions_TA)


def test_a_sweep_moves_one_dimension_at_a_time_over_its_range():
    arm = contract("velocity", "position", "binary")
    swept = commands.sweep(arm, 10.0, last_action_A=np.array([2.0, 0.25, 1.0]))
    assert swept.labels == ("d0",) * 20 + ("d1",) * 20 + ("d2",) * 20
    blocks = swept.actions_TA.reshape(3, 20, 3)
    rest = np.array([0.0, 0.25, 1.0])
    for index, block in enumerate(blocks):
        others = [other for other in range(3) if other != index]
        assert np.allclose(block[:, others], rest[others])
        assert np.allclose(block[-1], rest, atol=1e-6)
    low, high = np.array(arm.action_statistics.q01), np.array(arm.action_statistics.q99)
    assert np.allclose(blocks[0][:, 0].max(), high[0], rtol=1e-3)
    assert np.allclose(blocks[0][:, 0].min(), low[0], rtol=1e-3)
    assert np.allclose(blocks[1][:, 1].max(), high[1], rtol=1e-3)
    assert set(blocks[2][:, 2]) == {0.0, 1.0}
    arm.check_actions(swept.actions_TA)
    only = commands.sweep(arm, 10.0, only="1", frames=30)
    assert only.actions_TA.shape == (30, 3)
    assert set(only.labels) == {"d1"}


def test_another_dataset_of_the_same_robot_is_welcome():
    arm = contract("velocity", "position")
    shifted = np.random.default_rng(1).uniform(0, 2, (50, 2))
    fields = (arm.action, arm.proprio, Statistics.of(shifted), Statistics.of(shifted))
    arm.require_same_robot(ActionContract("arm", 10.0, *fields, note="another day"), where="data")
    with pytest.raises(ContractError, match="rate_hz"):
        arm.require_same_robot(ActionContract("arm", 20.0, *fields), where="data")
    with pytest.raises(ContractError, match="action of embodiment"):
        arm.require_same_robot(contract("velocity", "velocity"), where="data")
    with pytest.raises(ContractError, match="action of embodiment"):
        arm.require_same_robot(contract("velocity"), where="data")
