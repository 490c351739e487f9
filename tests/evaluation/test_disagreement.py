"""A and E in an evaluation, and the ranking of scenes by what is unknown."""

import csv
import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vidworld import cli
from vidworld.evaluation import disagreement
from vidworld.evaluation.disagreement import rank, rank_correlation, spread_of


@pytest.fixture(scope="session")
def second_run(untrained_run, tmp_path_factory):
    """The same world as if it had been trained with another seed."""
    run = tmp_path_factory.mktemp("member") / "second"
    shutil.copytree(untrained_run, run)
    (weights,) = run.glob("checkpoints/*/ema.safetensors")
    moved = {name: tensor + 0.3 * tensor.roll(1) for name, tensor in load_file(weights).items()}
    save_file(moved, weights)
    return run


@pytest.fixture
def evaluate(untrained_run, planar_data, tmp_path):
    def run(*arguments):
        out = tmp_path / "report"
        given = [untrained_run, planar_data, "--out", out, "--frames", 4, "--split", "train"]
        return cli.run(["eval", *map(str, (*given, *arguments))]), out

    return run


def test_an_ensemble_is_measured_and_scenes_are_ranked(evaluate, second_run, capsys):
    code, out = evaluate(
        "--members", second_run, "--samples", 2, "--windows-per-episode", 2, "--rank-scenes", "--batch", 8
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["world"]["members"] == 2
    assert len({one["weights_sha256"] for one in metrics["world"]["runs"]}) == 2
    (found,) = metrics["uncertainty"].values()
    assert len(found["pixels"]["unknown"]) == 4
    assert set(found["proprio"]) == {"shoulder", "elbow", "tip_x", "tip_y"}
    # The curve is the root mean over windows of what each window says.
    total = np.mean(np.square([window["open"] for window in metrics["windows"]]))
    assert np.mean(np.square(found["pixels"]["open"])) == pytest.approx(total, rel=1e-3)
    rows = list(csv.DictReader((out / "scenes.csv").open()))
    assert [int(row["rank"]) for row in rows] == list(range(1, 9))
    unknown = [float(row["unknown"]) for row in rows]
    assert unknown == sorted(unknown, reverse=True)
    assert {row["key"] for row in rows} == {window["key"] for window in metrics["windows"]}
    page = (out / "report.html").read_text()
    assert "Which scenes to collect next" in page
    assert "least known, to collect next" in printed.out


def test_one_world_tells_what_is_open_alone(evaluate, capsys):
    code, out = evaluate("--samples", 2, "--windows-per-episode", 1)
    assert code == 0, capsys.readouterr().err
    (found,) = json.loads((out / "metrics.json").read_text())["uncertainty"].values()
    assert found["pixels"]["unknown"] is None
    assert len(found["pixels"]["open"]) == 4
    assert not (out / "scenes.csv").exists()


def test_one_world_cannot_rank(evaluate, second_run, capsys):
    assert evaluate("--samples", 2, "--rank-scenes")[0] == 2
    assert "an ensemble, whose members can disagree" in capsys.readouterr().err
    assert evaluate("--samples", 1, "--rank-scenes", "--members", second_run)[0] == 2
    assert "2 or more with --rank-scenes" in capsys.readouterr().err


def test_the_parts_are_those_of_known_futures():
    """Members at 100 and 160, samples 20 about each: closed forms of both parts and of the error."""
    video = np.full((4, 3, 1, 8, 8, 3), 100, np.uint8)
    video[2:] += 60
    video[::2] -= 10
    video[1::2] += 10
    proprio = np.repeat(np.array([0.0, 2.0, 10.0, 12.0]), 3).reshape(4, 3, 1)
    found = spread_of(video, proprio, np.array([0, 0, 1, 1]), np.full((3, 1, 8, 8, 3), 120, np.uint8))
    assert found.open_T == pytest.approx([200 / 255**2] * 3, rel=1e-4)
    assert found.unknown_T == pytest.approx([(1800 - 100) / 255**2] * 3, rel=1e-4)
    assert found.error_T == pytest.approx([100 / 255**2] * 3, rel=1e-4)
    assert found.proprio_open_LS[:, 0] == pytest.approx([2.0] * 3)
    assert found.proprio_unknown_LS[:, 0] == pytest.approx([50.0 - 1.0] * 3)
    said = disagreement.summarise([found, found], [("grip", "m")], 1)
    assert said["proprio"]["grip"]["unknown"] == pytest.approx([7.0] * 3)


def test_ranking_and_its_correlation():
    rows = [
        {"key": str(i), "unknown": value, "error": value**3} for i, value in enumerate((0.2, 0.5, 0.1, 0.4))
    ]
    assert [scene["key"] for scene in rank(rows)] == ["1", "3", "0", "2"]
    assert rank_correlation(rows) == pytest.approx(1)
    assert rank_correlation([{**row, "error": -row["error"]} for row in rows]) == pytest.approx(-1)
    assert rank_correlation(rows[:2]) is None
