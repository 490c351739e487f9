"""The command `vidworld eval`: what it writes, what it prints, what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vidworld import cli, media
from vidworld.data.manifest import Manifest
from vidworld.evaluation import evaluate as command
from vidworld.evaluation.evaluate import run
from vidworld.evaluation.windows import Settings
from vidworld.world.load import load


@pytest.fixture(scope="module")
def report(untrained_run, planar_data, tmp_path_factory) -> Path:
    """A report on the training episodes, of which there are more."""
    out = tmp_path_factory.mktemp("report")
    settings = Settings(split="train", context=3, frames=8, windows_per_episode=2, samples=2, clips=2)
    run(load(untrained_run, "cpu"), planar_data, settings, out)
    return out


def test_the_report_is_whole_and_stands_alone(report, planar_data):
    page = (report / "report.html").read_text()
    shown = [
        "PSNR gain at frame 8", "8 windows of 4 episodes", "These are episodes that were trained on.",
        "shoulder", "rad", "The other actions are those of planar-",
        "The least gain of all windows",
    ]  # fmt: skip
    assert [words for words in shown if words not in page] == []
    # Base64 of a video may spell anything.
    written = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in written.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert "<script" not in page
    assert page.count("<video") == page.count("<img") == 3, "two evenly spaced windows and the worst other"
    strips = sorted(path.name for path in report.glob("strip-*.png"))
    assert strips == ["strip-0.png", "strip-1.png", "strip-2.png"]
    strip = media.read_image(report / "strip-0.png")
    assert strip.shape[0] > 4 * 128
    assert strip.shape[1] > 9 * 128


def test_metrics_say_what_was_measured(report, planar_data):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["settings"]["frames"] == 8
    assert metrics["data"]["digest"] == Manifest.read(planar_data).digest
    assert metrics["data"]["same_as_trained_on"] is True
    assert metrics["pictures"]["all"]["horizons"] == [1, 2, 4, 8]
    assert len(metrics["curve"]["mean"]["psnr"]) == 8
    assert len(metrics["windows"]) == metrics["data"]["windows"] == 8
    assert set(metrics["actions"]["denoising"]["planar_arm"]) >= {"true", "ratio_shuffled", "ratio_shifted"}
    names = {"psnr_gain.f8", "psnr.f8", "psnr_copy.f8", "psnr_bound.f8", "shuffle_ratio.f8", "shuffle_ratio"}
    assert names <= set(metrics["summary"])
    assert all(np.isfinite(value) for value in metrics["summary"].values())


def test_bars_mark_imagined_frames_only(report, untrained_run, planar_data, monkeypatch, tmp_path):
    seen = []
    grid = media.grid
    monkeypatch.setattr(
        media, "grid", lambda videos, *rest, **more: (seen.append(videos), grid(videos, *rest, **more))[1]
    )
    settings = Settings(split="train", context=3, frames=4, windows_per_episode=1, samples=1, clips=1)
    run(load(untrained_run, "cpu"), planar_data, settings, tmp_path)
    recorded, imagined, other = seen[0]
    bar = np.array([245, 158, 11], np.uint8)
    marked = [(video[:, :4] == bar).all((1, 2, 3)).tolist() for video in (recorded, imagined, other)]
    assert marked == [[False] * 7, [False] * 3 + [True] * 4, [False] * 3 + [True] * 4]
    np.testing.assert_array_equal(recorded[:3], imagined[:3])


def flags(out: Path, *more: object) -> list[str]:
    words = ["--out", out, "--context", 2, "--frames", 4, "--samples", 2, "--clips", 1, *more]
    return [str(word) for word in words]


def test_the_command_writes_all_and_prints_a_table(untrained_run, planar_data, tmp_path, capsys):
    out = tmp_path / "reports" / "one"
    assert cli.run(["eval", str(untrained_run), str(planar_data), *flags(out)]) == 0
    printed = capsys.readouterr().out
    assert "gain dB" in printed
    assert str(out / "report.html") in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["world"]["checkpoint"] == "step-00000001"
    assert len(metrics["world"]["weights_sha256"]) == 64
    assert metrics["settings"]["frames"] == 4
    assert "out" not in metrics["settings"]
    assert metrics["versions"]["torch"] == torch.__version__
    assert set(metrics["actions"]["denoising"]["planar_arm"]) >= {"true", "ratio_shuffled", "ratio_shifted"}

    assert cli.run(["eval", str(untrained_run), str(planar_data), *flags(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    again = flags(out, "--overwrite", "--json", "--split", "train", "--episodes", 2)
    assert cli.run(["eval", str(untrained_run), str(planar_data), *again]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["data"]["episodes"] == 2
    assert "trained on" in metrics["warnings"][0]
    assert [path.name for path in out.parent.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "{data}", "--frames", "99"], "too short"),
        (["{run}", "{data}", "--split", "test"], "split"),
        (["{run}", "{data}", "--steps", "0"], "--steps"),
        (["{run}", "{run}"], "manifest.json"),
        (["{data}", "{data}"], "world.json"),
        (["{run}", "{data}", "--frame", "4"], "--frame"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(
    untrained_run, planar_data, tmp_path, capsys, arguments, words
):
    filled = [word.format(run=untrained_run, data=planar_data) for word in arguments]
    assert cli.run(["eval", *filled, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_earlier_report_alone(untrained_run, planar_data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cli.run(["eval", str(untrained_run), str(planar_data), *flags(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(command, "write_report", fail)
    with pytest.raises(OSError, match="disk full"):
        cli.run(["eval", str(untrained_run), str(planar_data), *flags(out, "--overwrite")])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
