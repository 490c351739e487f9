"""Drift of several datasets: rows are what `vidworld eval --drift` finds, pictures those of rollouts."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidworld import cli
from vidworld.errors import ConfigError

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("drift")
    sys.modules.pop("drift")


def test_rows_are_those_of_the_evaluation(bench, untrained_run, planar_data, tmp_path, capsys):
    given = ["--split", "train", "--context", "4", "--episodes", "2", "--seed", "5"]
    words = [str(untrained_run), "--data", str(planar_data), *given, "--frames", "70", "--device", "cpu"]
    bench.main([*words, "--docs", str(tmp_path), "--out", str(tmp_path / "rows.json")], "drift.py")
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    name = f"drift.{planar_data.name}"
    report = tmp_path / "report"
    alike = ["--windows-per-episode", "1", "--samples", "1", "--frames", "1", "--drift", "70"]
    asked = ["eval", untrained_run, planar_data, *given, *alike, "--out", report, "--device", "cpu"]
    assert cli.run([*map(str, asked)]) == 0
    (found,) = json.loads((report / "metrics.json").read_text())["drift"].values()
    assert rows[f"{name}.motion.end"] == pytest.approx(found["end"]["motion"], rel=1e-3)
    assert rows[f"{name}.background.end"] == pytest.approx(found["background_end_db"], rel=1e-3)
    assert rows[f"{name}.gain_while_recorded"] == pytest.approx(found["gain_while_recorded_db"], rel=1e-3)
    strip = np.asarray(Image.open(tmp_path / "images" / "drift.jpg"))
    assert strip.shape[0] > 128
    assert strip.shape[1] > 3 * 128  # frames 1, 32 and 64
    assert (tmp_path / "images" / "drift.png").stat().st_size > 10_000


def test_the_rollout_that_is_shown_is_cut_where_it_was_asked(bench, tmp_path):
    shown = {"one": np.zeros((2, 32, 32, 3), np.uint8), "two": np.full((2, 32, 32, 3), 255, np.uint8)}
    curve = {name: [1.0, None, 3.0] for name in ("background_psnr", "sharpness_ratio", "motion_ratio")}
    found = {name: {"frames": 3, "curves": curve} for name in shown}
    bench.picture(found, shown, (1, 3), tmp_path / "drift")
    drawn = np.asarray(Image.open(tmp_path / "drift.jpg")).astype(int)
    upper, lower = np.array_split(drawn[drawn.shape[0] // 8 :, -100:-20], 2)
    assert upper.mean() < 100 < lower.mean()


def test_no_data_is_refused(bench):
    with pytest.raises(ConfigError, match="--data: got nothing"):
        bench.Options(run=Path("run"), data=())
