"""The main job end to end, small: logs to shards to tokenizer to world model to rollouts to a report."""

import json

import pytest

import vidworld
from vidworld import cli, demo
from vidworld.data.convert import ConvertOptions, convert
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.world.world import WorldModel

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl


@pytest.fixture
def commands(monkeypatch):
    """The commands that the demo asks for, which are not run."""
    asked: list[list[str]] = []
    monkeypatch.setattr(demo, "run_command", asked.append)
    return asked


def test_the_lab_makes_the_data_where_it_can_draw(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(demo, "_no_lab", lambda: None)
    made = demo._dataset(demo.DemoOptions(out=tmp_path, episodes=7))
    assert made == tmp_path / "data"
    assert [words[0] for words in commands] == ["lab", "inspect"]
    assert {"--episodes", "7", "one"} <= set(commands[0])


def test_without_opengl_the_episodes_that_come_along_serve(tmp_path, monkeypatch, commands, capsys):
    monkeypatch.setattr("vidworld.lab.gl.available", list)
    gl.offscreen.cache_clear()
    assert demo._dataset(demo.DemoOptions(out=tmp_path)) == demo.SAMPLE
    assert [words[0] for words in commands] == ["inspect"]
    printed = capsys.readouterr().out
    assert gl.INSTALL in printed
    assert str(demo.SAMPLE) in printed


def test_your_own_shards_are_taken_as_they_are(commands):
    assert demo._dataset(demo.DemoOptions(data=demo.SAMPLE)) == demo.SAMPLE
    assert commands == []


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_no_lab", lambda: "no headless OpenGL")
    out = tmp_path / "demo"
    small = ["--tokenizer-minutes", "0.1", "--world-minutes", "0.2", "--frames", "8"]
    assert cli.run(["demo", "--out", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ vidworld") == 6
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
