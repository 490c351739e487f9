"""Many prompts, branches, batches, formats and the truth: each against a plain rollout of the same thing."""

import json

import numpy as np
import pytest
from PIL import Image

from vidworld import cli, media
from vidworld.data.shards import ShardDataset
from vidworld.evaluation import commands
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.preview import Preview, block_art

CLOSE = 1e-4
"""Of proprioception in its units: matrix products of other sizes round differently."""


@pytest.fixture(scope="module")
def episodes(planar_data):
    dataset = ShardDataset.open(planar_data)
    return [sample.key for sample in dataset.manifest.samples()][:3]


@pytest.fixture(scope="module")
def rollout(untrained_run, planar_data, episodes, tmp_path_factory):
    """Run the command; returns its output directory, or the exit code if it is not 0."""
    folder = tmp_path_factory.mktemp("rollouts")
    made = 0

    def run(*arguments, prompt=None):
        nonlocal made
        made += 1
        out = folder / str(made)
        given = ["--prompt", *(prompt or episodes[:1]), "--data", planar_data, "--context", 3, "--frames", 6]
        code = cli.run(["rollout", *map(str, [untrained_run, "--out", out, *given, *arguments])])
        assert (code == 0) == out.exists(), "whole or not at all"
        return code or out

    return run


@pytest.fixture(scope="module")
def plain(rollout):
    return rollout("--samples", 3, "--seed", 4, "--formats", "png")


def proprio(folder):
    return np.load(folder / "proprio.npz", allow_pickle=False)["predicted_NTS"]


def frames(folder, name="sample-000"):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / name).iterdir())])


def record(folder):
    return json.loads((folder / "rollout.json").read_text())


def test_rows_at_once_change_nothing(rollout, plain):
    for batch in (1, 2):
        out = rollout("--samples", 3, "--seed", 4, "--formats", "png", "--batch", batch)
        assert np.abs(proprio(out) - proprio(plain)).max() < CLOSE
        for sample in range(3):
            name = f"sample-{sample:03d}"
            assert np.abs(frames(out, name).astype(int) - frames(plain, name)).max() <= 1
    assert np.abs(proprio(plain)[0] - proprio(plain)[1]).max() > 10 * CLOSE, "samples differ"


def test_prompts_side_by_side_are_what_each_is_alone(rollout, episodes):
    out = rollout("--samples", 2, "--batch", 4, prompt=episodes)
    names = record(out)["scenes"]
    assert len(names) == 3
    assert (out / "grid.mp4").is_file()
    for name, episode in zip(names, episodes, strict=True):
        alone = rollout("--samples", 2, prompt=[episode])
        assert np.abs(proprio(out / name) - proprio(alone)).max() < CLOSE
        assert sorted(path.name for path in (out / name).iterdir()) == sorted(
            path.name for path in alone.iterdir()
        )
        for key in ("prompt", "actions", "seed", "sampler"):
            assert record(out / name)[key] == record(alone)[key]
    assert not np.allclose(proprio(out / names[0]), proprio(out / names[1]), atol=10 * CLOSE)


def test_the_same_prompt_twice_has_two_folders(rollout, episodes):
    out = rollout("--samples", 1, prompt=[episodes[0]] * 2)
    first, second = record(out)["scenes"]
    assert first != second
    assert np.array_equal(proprio(out / first), proprio(out / second))


def test_branches_part_at_the_fork_and_only_by_their_actions(rollout, plain):
    out = rollout("--samples", 3, "--seed", 4, "--fork-at", 2, "--formats", "png")
    arrays = np.load(out / "proprio.npz", allow_pickle=False)
    labels, branches = arrays["branches"].tolist(), arrays["branches_KNTS"]
    assert labels == ["as given", "hold", "mirror"]
    assert np.abs(branches[0] - proprio(plain)).max() < CLOSE, "as given is the plain rollout"
    assert np.array_equal(branches[:, :, :2], np.broadcast_to(branches[:1, :, :2], branches[:, :, :2].shape))
    assert (np.abs(branches[1:, :, 2:] - branches[0, :, 2:]).max((1, 2, 3)) > 1e-3).all()
    # Its own actions from the start, under the same noise, give the same branch.
    fork = record(out)["fork"]
    again = rollout("--samples", 3, "--seed", 4, "--actions", out / fork["branches"]["hold"]["file"])
    assert np.abs(proprio(again) - branches[1]).max() < CLOSE
    shown = {path.name for path in out.iterdir() if path.is_dir()}
    assert {"as-given-000", "hold-002", "mirror-001", "grid"} <= shown


def test_any_actions_make_a_branch(rollout, episodes, tmp_path):
    np.save(tmp_path / "still.npy", np.zeros((4, 3), np.float32))
    names = (f"episode:{episodes[1]}", "sweep:elbow_velocity", str(tmp_path / "still.npy"))
    out = rollout("--samples", 1, "--fork-at", 2, "--branches", *names)
    assert list(record(out)["fork"]["branches"]) == ["as given", *names]


def test_the_truth_is_measured_and_shown(rollout, planar_data, episodes, capsys):
    out = rollout("--samples", 2, "--compare", "truth", "--formats", "png")
    compared = json.loads((out / "truth.json").read_text())
    view = next(iter(ShardDataset.open(planar_data).read(episodes[0]).video.values()))
    recorded, last = view[3:9], view[2]
    expected = np.stack([psnr(frames(out, f"sample-00{i}")[3:], recorded) for i in range(2)])
    assert np.allclose(compared["psnr_db"]["mean"], expected.mean(0), atol=1e-3)
    assert np.allclose(compared["psnr_db"]["most"], expected.max(0), atol=1e-3)
    held = psnr(np.broadcast_to(last, recorded.shape), recorded)
    assert np.allclose(compared["psnr_db"]["last_frame_held"], held, atol=1e-3)
    assert compared["psnr_gain_db"] == pytest.approx(expected.mean() - held.mean(), abs=2e-3)
    assert (out / "truth.png").is_file()
    without = rollout("--samples", 2, "--compare", "none")
    assert "recorded_TS" not in np.load(without / "proprio.npz")
    assert rollout("--compare", "truth", "--actions", "hold") == 2
    assert "got hold, expected an episode under its own actions" in capsys.readouterr().err


def test_gifs_hold_all_frames_and_last_as_long(rollout):
    out = rollout("--samples", 1, "--formats", "gif", "mp4")
    with Image.open(out / "sample-000.gif") as image:
        assert image.n_frames == 9
        durations = []
        for index in range(9):
            image.seek(index)
            durations.append(image.info["duration"])
    assert sum(durations) == 900
    assert media.read_video(out / "sample-000.mp4")[0].shape[0] == 9
    ragged = media.encode_gif(np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), np.uint8), 30)
    assert ragged[:6] == b"GIF89a"


def test_the_preview_draws_without_changing_the_rollout(rollout, plain, capsys):
    out = rollout("--samples", 3, "--seed", 4, "--formats", "png", "--preview")
    assert np.abs(proprio(out) - proprio(plain)).max() < CLOSE
    assert np.abs(frames(out).astype(int) - frames(plain)).max() <= 1
    drawn = capsys.readouterr().err
    assert "18 of 18 frames" in drawn
    assert "▀" in drawn


def test_block_art_has_the_colours_of_the_picture():
    picture = np.zeros((4, 2, 3), np.uint8)
    picture[0], picture[3] = (255, 0, 0), (0, 0, 255)
    upper, lower = block_art(picture, 80)
    assert upper == "\x1b[38;2;255;0;0;48;2;0;0;0m▀" * 2
    assert lower == "\x1b[38;2;0;0;0;48;2;0;0;255m▀" * 2


def test_the_preview_goes_back_over_what_it_drew(capsys):
    preview = Preview(columns=4)
    for caption in ("one", "two"):
        preview.show(np.zeros((8, 8, 3), np.uint8), caption)
    assert capsys.readouterr().err.count("\x1b[3F") == 1, "two lines of picture and one of text"


def test_hold_and_mirror_by_hand(planar_data):
    contract = ShardDataset.open(planar_data).manifest.contracts[0]
    still = commands.hold(contract, 3, np.array([1.0, -1.0, 1.0]))
    assert np.allclose(still.actions_TA[:, :2], 0), "rates rest at zero"
    given = np.array([[0.1, -0.2, 0.0]], np.float32)
    mirrored = commands.mirror(contract, commands.Commands(given, "x"))
    assert np.allclose(mirrored.actions_TA[0, :2], [-0.1, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fork-at", 6), "--fork-at: got 6, expected 1 to 5"),
        (("--fork-at", 2, "--branches", "sweep:wrist"), "dimension to sweep"),
        (("--fork-at", 2, "--branches", "gone.csv"), "no such file of actions"),
        (("--fork-at", 2, "--lerobot"), "a rollout without branches"),
        (("--batch", 0), "--batch"),
        (("--policy", "a:b", "--actions", "hold"), "one of the two"),
        (("--replan", 3), "no --policy"),
        (("--formats", "avi"), "avi"),
        (("--compare", "nothing"), "nothing"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(rollout, capsys, arguments, message):
    assert rollout(*arguments) == 2
    assert message in capsys.readouterr().err


def test_dreams_of_several_prompts_are_one_dataset(rollout, episodes):
    from vidworld.data.sources.lerobot import LeRobotSource

    out = rollout("--samples", 2, "--lerobot", prompt=episodes[:2])
    source = LeRobotSource(out / "lerobot")
    assert len(source.episode_ids()) == 4
    for index, name in enumerate(record(out)["scenes"]):
        for sample in range(2):
            read = source.read(source.episode_ids()[2 * index + sample])
            assert np.array_equal(read.proprio_TS[3:], proprio(out / name)[sample])
