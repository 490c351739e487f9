"""Packing a run into the package: measured first, small enough, and nothing replaced by a failure."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import vidworld
from vidworld.errors import DataError
from vidworld.world import shipped

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def ship(monkeypatch, untrained_run, planar_data, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("ship", BENCH / "ship.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ship"] = module
    spec.loader.exec_module(module)

    def run(*arguments):
        horizon = ["--context", "3", "--frames", "4", "--device", "cpu", "--episodes", "1"]
        places = ["--weights", str(tmp_path / "weights"), "--rows", str(tmp_path / "rows.json")]
        given = ["--data", str(planar_data), "--prompts", str(planar_data)]
        module.main([str(untrained_run), *given, *horizon, *places, *arguments], "ship")

    yield run
    del sys.modules["ship"]


def test_a_shipped_world_opens_by_name_and_its_loss_is_a_row(ship, untrained_run, tmp_path, monkeypatch):
    (untrained_run / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1001)))
    (tmp_path / "card.md").write_text("Trained for nothing.\n")
    ship("--most-loss-db", "1", "--card", str(tmp_path / "card.md"))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    world = vidworld.load("lab", "cpu")
    assert world.spec.height == 32
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert 0 < rows["flagship.shipped.weight_error"] < 0.01
    assert abs(rows["flagship.shipped.psnr_loss.data.f4"]) < 1
    folder = tmp_path / "weights" / "lab"
    assert (folder / "README.md").read_text().endswith("Trained for nothing.\n")
    log = [json.loads(line)["step"] for line in (folder / "recipe" / "world.jsonl").read_text().splitlines()]
    assert log[-1] == 1000
    assert len(log) <= 101
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert "recipe/world.jsonl" in listed


def test_what_is_too_large_or_loses_too_much_replaces_nothing(ship, tmp_path):
    ship("--most-loss-db", "1")
    before = (tmp_path / "weights" / "lab" / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="size of what is shipped"):
        ship("--most-mib", "0.01")
    with pytest.raises(DataError, match="PSNR lost to bf16"):
        ship("--most-loss-db", "-5", "--precision", "bf16")
    assert (tmp_path / "weights" / "lab" / "manifest.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["lab"]
