"""The main job end to end, small: logs to shards to tokenizer to world model to rollouts to a report."""

import json

import pytest

import vidworld
from vidworld import cli
from vidworld.data.convert import ConvertOptions, convert
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.world.world import WorldModel


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path, capsys):
    out = tmp_path / "demo"
    small = ["--episodes", "12", "--tokenizer-minutes", "0.1", "--world-minutes", "0.2", "--frames", "8"]
    assert cli.run(["demo", "--out", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ vidworld") == 7
    assert "report.html" in printed
    record = json.loads((out / "demo.json").read_text())
    assert record["state"] == "done"
    assert "psnr_gain.f8" in record["summary"]
    for made in ("rollout/grid.mp4", "rollout/strip.png", "sweep/grid.mp4", "report/report.html"):
        assert (out / made).stat().st_size > 1000
    assert isinstance(vidworld.load(out / "world"), WorldModel)
    assert cli.run(["demo", "--out", str(out), *small]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("frames", "val", "says"),
    [
        (12, 1, "got 1, the longest of 12 frames, expected one of 4 + 24 frames; pass --frames 8"),
        (30, 0, "got 0, the longest of 0 frames, expected one of 4 + 24 frames; give more"),
    ],
)
def test_data_that_cannot_be_shown_are_refused_before_training(tmp_path, capsys, frames, val, says):
    source = PlanarSource(3, config=PlanarConfig(frames=frames, size=32))
    held_out = tuple(source.episode_ids()[:val])
    options = ConvertOptions(
        out=tmp_path / "data", size="32x32", workers=1, val_episodes=held_out, val_fraction=0.0
    )
    convert(source, options)
    assert cli.run(["demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "demo")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "demo" / "tokenizer").exists()


def test_demo_never_empties_a_directory_that_it_did_not_make(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.run(["demo", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "which no demo made" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
