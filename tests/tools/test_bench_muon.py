"""Muon's curve: when one curve reaches the end of another, and a toy contest from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.errors import ConfigError

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The script, imported by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import muon_curve

    yield muon_curve
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_when_a_curve_reaches_a_loss(bench):
    curve = [(0.0, 8.0), (2.0, 4.0), (4.0, 5.0), (6.0, 1.0)]
    assert bench.reached(curve, 6.0) == pytest.approx(1.0)
    assert bench.reached(curve, 3.0) == pytest.approx(5.0)
    assert bench.reached(curve, 9.0) == 0.0
    assert bench.reached(curve, 0.5) is None


def test_rows_compare_the_best_of_each(bench):
    curves = {
        "adamw_0.001": [(0.0, 8.0), (10.0, 4.0)],
        "adamw_0.003": [(0.0, 8.0), (10.0, 2.0)],
        "muon_0.02": [(0.0, 8.0), (5.0, 2.0), (10.0, 1.0)],
    }
    rows = bench.rows_of("toy", curves, dict.fromkeys(curves, 7), 10.0)
    assert rows["muon.time_ratio.toy"][0] == pytest.approx(0.5)
    assert rows["muon.loss_ratio.toy"][0] == pytest.approx(0.5)
    curves["muon_0.02"][2] = curves["muon_0.02"][1] = (5.0, 3.0)
    rows = bench.rows_of("toy", curves, dict.fromkeys(curves, 7), 10.0)
    assert "muon.time_ratio.toy" not in rows, "it never gets there"


def test_contenders_differ_in_the_optimizer_alone(bench):
    base = bench.OptimConfig(warmup_steps=7, weight_decay=0.3, lr=5e-4)
    found = bench.contenders(bench.Options(adamw_lr=(1e-3,), muon_lr=(0.01,)), base)
    assert list(found) == ["adamw_0.001", "muon_0.01"]
    assert {optim.warmup_steps for optim in found.values()} == {7}
    assert [optim.lr for optim in found.values()] == [1e-3, 5e-4], "Muon leaves the rest to the config's rate"
    with pytest.raises(ConfigError, match="--muon-lr"):
        bench.Options(muon_lr=())


@pytest.mark.slow
def test_a_toy_contest_starts_alike_and_learns(tmp_path):
    out, picture, work = tmp_path / "rows.json", tmp_path / "muon.png", tmp_path / "work"
    flags = ["--size", "2x32", "--episodes", "12", "--batch", "4", "--clip", "8", "--tokenizer-s", "3"]
    flags += ["--seconds", "6", "--validate-s", "2", "--adamw-lr", "1e-3", "--device", "cpu"]
    files = ["--work", str(work), "--picture", str(picture), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCH / "muon_curve.py"), *flags, *files, "--", "--optim.warmup-steps", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((work / "curves.json").read_text())
    assert list(curves) == ["adamw_0.001", "muon_0.02"]
    starts = {curve[0][1] for curve in curves.values()}
    assert len(starts) == 1, "the same weights and clips"
    for curve in curves.values():
        assert curve[-1][0] >= 6
        assert curve[-1][1] < curve[0][1]
    rows = {row["name"]: row["value"] for row in json.loads(out.read_text())}
    assert rows["muon.val_loss.planar_2x32.muon_0.02"] == pytest.approx(curves["muon_0.02"][-1][1])
    assert picture.read_bytes().startswith(b"\x89PNG")
