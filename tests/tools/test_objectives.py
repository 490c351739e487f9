"""The decision table: its scores are those of the evaluation, and a small one is made from end to end."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidworld.data.convert import ConvertOptions, convert
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.verification import coverage, rank_counts, ranks, spread_and_error, spread_skill
from vidworld.lab.planar import PlanarConfig, PlanarSource

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The script's three files."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = {"main": "objectives", "measure": "objectives_measure", "table": "objectives_table"}
    return SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


def test_scores_are_those_of_the_evaluation(bench: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(5, 7, 3))
    samples = 0.8 * rng.normal(size=(24, 5, 7, 3)) + 0.2
    where = rng.random(truth.shape) < 0.4
    got = bench.measure.ensemble_scores(*map(torch.from_numpy, (samples, truth, where)))
    chosen, seen = samples[:, where], truth[where]
    variance, error = spread_and_error(chosen, seen)
    counts = rank_counts(ranks(chosen, seen, rng), 24)
    assert got["crps"] == pytest.approx(crps(chosen, seen).mean(), rel=1e-9)
    assert got["spread_skill"] == pytest.approx(spread_skill(variance, error), rel=1e-9)
    assert got["coverage"] == pytest.approx(coverage(counts, 0.9), rel=1e-9)
    everywhere = bench.measure.ensemble_scores(torch.from_numpy(samples), torch.from_numpy(truth))
    assert everywhere["crps"] != got["crps"]


def test_samples_of_the_truth_are_calibrated_and_their_mean_is_not(bench: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(40_000, generator=generator)
    samples = torch.randn(24, 40_000, generator=generator)
    honest = bench.measure.ensemble_scores(samples, truth)
    assert honest["coverage"] == pytest.approx(0.9, abs=0.01)
    assert honest["spread_skill"] == pytest.approx(1.0, abs=0.02)
    sure = bench.measure.ensemble_scores(0.05 * samples, truth)
    assert sure["coverage"] < 0.2
    assert sure["crps"] > honest["crps"] + 0.1


def test_blur_lowers_the_gradient_energy_of_what_changed(bench: SimpleNamespace) -> None:
    background = torch.zeros(1, 3, 32, 32)
    moved = background.clone()
    moved[..., 8:20, 8:20] = 0.8
    box = torch.ones(3, 1, 5, 5) / 25
    blurred = torch.nn.functional.conv2d(moved, box, padding=2, groups=3)

    def per_pixel(picture: torch.Tensor) -> float:
        energy, count = bench.measure.gradient_energy(picture[None, None], background)
        return float(energy / count)

    assert per_pixel(blurred) < 0.5 * per_pixel(moved)
    elsewhere = moved.roll(9, -1)
    assert per_pixel(elsewhere) == pytest.approx(per_pixel(moved)), "wherever it went"
    energy, count = bench.measure.gradient_energy(background[None, None], background)
    assert (float(energy), float(count)) == (0, 0)


def test_every_objective_gets_as_many_operations(bench: SimpleNamespace) -> None:
    forwards = bench.main.forwards
    assert forwards(bench.main.FLOW) == 3
    assert forwards(ObjectiveConfig()) == pytest.approx(3 + 2 * 0.25 * 0.8)
    assert forwards(ObjectiveConfig(kind="energy")) == pytest.approx(4.5), "two targets beside the context"
    assert forwards(ObjectiveConfig(kind="regression")) == 3
    means = ObjectiveConfig(**bench.main.MEANS)
    assert forwards(means) == pytest.approx(3 + 0.5 * 2 * 0.8), "and passes of imagined histories"


def test_the_table_is_the_mean_over_seeds(bench: SimpleNamespace, tmp_path: Path) -> None:
    figures = dict.fromkeys(bench.table.UNITS, 1.0)
    found = [
        {
            "seed": seed,
            "device": "a GPU",
            "steps": {"shortcut": 100, "energy": 90},
            "measured": {"shortcut.k1": figures | {"coverage": 0.7 + 0.1 * seed}, "energy.k1": figures},
        }
        for seed in range(3)
    ]
    del found[2]["measured"]["energy.k1"]
    rows = bench.table.rows_of(found)
    assert rows["objectives.shortcut.k1.coverage"] == (
        pytest.approx(0.8),
        "share, mean of 3 seeds, standard deviation 0.1",
    )
    assert rows["objectives.energy.k1.coverage"][1] == "share, mean of 2 seeds, standard deviation 0"
    assert rows["objectives.energy.steps"] == (90, "optimizer steps")
    lines = bench.table.markdown(found).splitlines()
    assert lines[2].startswith("| shortcut | 1 | 100 |")
    assert "0.8 ± 0.1" in lines[2]
    assert {line.count("|") for line in lines[:4]} == {len(bench.table.COLUMNS) + 4}
    bench.table.paint(found, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_the_default_is_the_best_that_is_sharp_and_quick(bench: SimpleNamespace) -> None:
    def seed(number: int, **rows: tuple[float, float]) -> dict:
        measured = {
            key.replace("_", "."): dict.fromkeys(bench.table.UNITS, 1.0)
            | {"sharpness": sharpness, "crps_moving": crps + 0.01 * number}
            for key, (sharpness, crps) in rows.items()
        }
        return {
            "seed": number,
            "device": "a GPU",
            "steps": {"shortcut": 9, "energy": 9, "flow": 9},
            "measured": measured,
        }

    def default(**rows: tuple[float, float]) -> str | None:
        return bench.table.default_of([seed(number, **rows) for number in range(3)])

    shortcuts = {"shortcut_k1": (0.9, 0.5), "shortcut_k4": (1.0, 0.4)}
    assert default(**shortcuts, energy_k1=(0.95, 0.3), flow_k64=(1.0, 0.1)) == "energy.k1", (
        "64 steps are many"
    )
    assert default(**shortcuts, energy_k1=(0.5, 0.3)) == "shortcut.k4", "blurred"
    assert default(shortcut_k1=(1.0, 0.4), shortcut_k4=(1.0, 0.398)) == "shortcut.k1", "as good in fewer"
    assert default(flow_k4=(1.0, 0.3)) is None
    found = [seed(0, **shortcuts)]
    assert "Default: shortcut in 4 steps a frame" in bench.table.markdown(found)


def test_speed_is_told_by_one_seed(bench: SimpleNamespace, tmp_path: Path) -> None:
    figures = dict.fromkeys(bench.table.UNITS, 1.0)
    timeless = {name: value for name, value in figures.items() if not name.startswith("fps")}
    found = [
        {"seed": seed, "device": "a GPU", "steps": {"shortcut": 9}, "measured": {"shortcut.k1": cells}}
        for seed, cells in enumerate((figures, timeless))
    ]
    assert bench.table.rows_of(found)["objectives.shortcut.k1.fps"][1] == "frames/s, mean of 1 seeds"
    assert bench.table.rows_of(found[1:]).keys() == bench.table.rows_of(found).keys() - {
        "objectives.shortcut.k1.fps",
        "objectives.shortcut.k1.fps_alone",
    }
    assert {line.count("|") for line in bench.table.markdown(found[1:]).splitlines()[:3]} == {
        len(bench.table.COLUMNS) + 4
    }
    bench.table.paint(found[1:], tmp_path / "table.png")


@pytest.mark.slow
def test_from_episodes_to_rows(tmp_path: Path) -> None:
    data = tmp_path / "planar"
    convert(
        PlanarSource(10, 0, PlanarConfig(frames=20, size=32)),
        ConvertOptions(out=data, size="32x32", workers=1),
    )
    rows = tmp_path / "objectives.json"
    asked = ["--out", tmp_path / "out", "--size", "4x64", "--steps", 12, "--tokenizer-minutes", 0.02]
    asked += ["--batch", 4, "--clip", 8, "--episodes", 1, "--frames", 3, "--samples", 20, "--rows", rows]

    def run(*more: object) -> str:
        done = subprocess.run(
            [sys.executable, str(BENCH / "objectives.py"), *map(str, (data, *asked, *more))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=570,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "no seed is measured yet" in run("--seeds")
    assert not rows.exists()
    said = run("--seeds", 0)
    assert "| flow | 64 | 12 |" in said
    assert "| regression_energy | 1 | 8 |" in said
    names = {row["name"] for row in json.loads(rows.read_text())}
    for key in ("shortcut.k1", "shortcut.k2", "shortcut.k4", "energy.k1", "flow.k4", "flow.k16", "flow.k64",
                "regression.k1", "regression_energy.k1"):  # fmt: skip
        assert {f"objectives.{key}.{metric}" for metric in ("sharpness", "coverage", "fps")} <= names
        assert (tmp_path / "out" / f"strip-0-{key}.png").exists()
    record = json.loads((tmp_path / "out" / "seed-0.json").read_text())
    assert record["steps"] == {
        "shortcut": 11, "energy": 8 + 2, "flow": 12, "regression": 9, "regression_energy": 7 + 1,
    }  # fmt: skip
    before = (tmp_path / "out" / "seed-0" / "flow" / "metrics.jsonl").stat().st_mtime_ns
    run("--seeds", 0)
    assert (tmp_path / "out" / "seed-0" / "flow" / "metrics.jsonl").stat().st_mtime_ns == before, "kept"
