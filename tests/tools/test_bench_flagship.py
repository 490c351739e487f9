"""The flagship's measurements: who is compared with whom, pictures that give nothing away, and the key."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.oracle import Foreseen, OracleConfig
from vidworld.world.spec import SamplerConfig

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a script by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", "") and str(BENCH) in str(sys.modules[name].__file__):
            del sys.modules[name]


def clip(value):
    return np.full((12, 16, 16, 3), value, np.uint8)


def drawn(count=10):
    """Cases whose true clips are dark and imagined ones bright, so that the sheet can be held to the key."""
    cases, imagined = {}, {}
    for number, kind in enumerate(("paint", "smoke")):
        cases[kind] = [
            SimpleNamespace(
                key=f"{kind}-{place}",
                last_HWC=clip(0)[0],
                grounding=SimpleNamespace(
                    recording=SimpleNamespace(frames_TVHWC=clip(10 + 50 * number + place)[:, None])
                ),
            )
            for place in range(count)
        ]
        imagined[kind] = [
            SimpleNamespace(video_THWC=clip(130 + 50 * number + place)) for place in range(count)
        ]
    return cases, imagined


def test_a_blind_look_is_half_and_half_and_its_key_fits_the_sheet(bench):
    pictures = bench("flagship_pictures")
    cases, imagined = drawn()
    sheet, key = pictures.blind_look(cases, imagined, seed=3)
    assert [one["number"] for one in key] == list(range(1, 21))
    for kind in cases:
        assert sum(one["imagined"] for one in key if one["kind"] == kind) == 5
    assert len({one["episode"] for one in key}) == 20
    # The order gives nothing away.
    runs = np.diff([one["imagined"] for one in key]).astype(bool).sum()
    assert 5 <= runs <= 15
    for one in key:
        place = int(one["episode"].rpartition("-")[2])
        value = (130 if one["imagined"] else 10) + 50 * (one["kind"] == "smoke") + place
        half = sheet[:, : sheet.shape[1] // 2] if one["number"] <= 10 else sheet[:, sheet.shape[1] // 2 :]
        assert (half == value).all(-1).any(), one
    again, same = pictures.blind_look(cases, imagined, seed=3)
    assert same == key
    assert np.array_equal(again, sheet)
    assert pictures.blind_look(cases, imagined, seed=4)[1] != key


def test_pictures_are_written_and_the_key_lies_apart(bench, tmp_path):
    pictures = bench("flagship_pictures")
    cases, imagined = drawn(4)
    pictures.write(tmp_path, cases, imagined, seed=0, run="runs/lab")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "flagship-paint.jpg", "flagship-smoke.jpg", "flagship-blind.jpg",
    }  # fmt: skip
    assert json.loads((tmp_path / "flagship-blind-key.json").read_text())["run"] == "runs/lab"


def test_a_blind_look_is_scored(bench, tmp_path, capsys):
    blind = bench("blind")
    clips = [{"number": n, "kind": "paint" if n % 2 else "smoke", "imagined": n <= 20} for n in range(1, 41)]
    (tmp_path / "key.json").write_text(json.dumps({"clips": clips}))
    asked = [str(tmp_path / "key.json"), "--out", str(tmp_path / "rows.json"), "--imagined"]
    blind.main([*asked, *map(str, range(1, 11)), *map(str, range(21, 31))], "blind")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["flagship.blind.correct"]["value"] == 0.5
    assert "p 0.56" in rows["flagship.blind.correct"]["unit"]
    assert blind.at_least(40, 40) == 2**-40
    with pytest.raises(ConfigError, match="41"):
        blind.main([*asked, "41"], "blind")


def test_moving_pixels_are_those_that_truth_moves(bench):
    flagship = bench("flagship_measures")
    last = np.full((16, 16, 3), 100, np.uint8)
    truth = np.repeat(last[None], 2, 0)
    truth[1, :4] = 200
    wrong = truth.copy()
    wrong[:, 8:] = 0  # where nothing moves
    found = flagship.moving_psnr(wrong[None], truth, last)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(100)
    held = flagship.moving_psnr(np.repeat(last[None], 2, 0)[None], truth, last)
    assert held[1] == pytest.approx(-20 * np.log10(100 / 255), rel=1e-6)


def test_the_oracle_is_computed_once(bench, tmp_path, monkeypatch):
    oracle = bench("flagship_oracle")
    calls = []

    def foresee(recorded, at, config):
        calls.append(at)
        return Foreseen(b"video", 1, float("inf"))

    monkeypatch.setattr(oracle, "foresee", foresee)
    for _ in range(2):
        found = oracle.kept(None, [1, 2], OracleConfig(), tmp_path / "oracle" / "one")
        assert found == Foreseen(b"video", 1, float("inf"))
    assert calls == [[1, 2]]


def test_another_sampler_is_named_by_its_method_and_steps(bench):
    flagship, own = bench("flagship"), SamplerConfig(steps=1, context_noise=0.05)
    assert flagship.other_sampler(own, "heun.k4") == dataclasses.replace(own, method="heun", steps=4)
    for text in ("k4", "euler", "euler.kx", "ddim.k4", "euler.k0"):
        with pytest.raises(ConfigError):
            flagship.Options(run=Path("r"), data=Path("d"), readout=Path("o"), compare=("euler.k2", text))
    assert set(flagship.SLOWEST_FIRST) == set(flagship.EFFECTS)


def row(name, value, unit="1"):
    return {
        "name": name, "value": value, "unit": unit, "device": "H", "versions": {}, "date": "2026-01-01",
        "command": "python tools/bench/flagship.py",
    }  # fmt: skip


def test_the_page_shows_what_was_measured_last(bench, tmp_path):
    page = bench("flagship_page")
    stale = row("flagship.skill.paint.coverage.h24", 0.77)
    rows = [
        stale,
        row("flagship.psnr.paint.h24", 27.5),
        row("flagship.psnr.held.paint.h24", 21.25),
        row("flagship.shuffle_ratio.paint", 3.5),
        row(
            "flagship.skill.paint.h24", 0.8123, "1, mean of streak_iou_error, 95 % 0.70 to 0.91, 40 episodes"
        ),
        row("flagship.skill.paint.streak_iou_error.h24", 0.5, "1, ruler IoU 0.3: too blunt"),
        row("flagship.error.paint.streak_iou_error.oracle.h24", 0.125),
        row("drift.paint.contrast.end", 0.96, "of the recording's, last quarter, 4 rollouts of 512 frames"),
        row("drift.paint.background.end", 21.64),
        row("peers.ours.k1.psnr.h24", 25.0),
        row("peers.edm.psnr.h24", 20.0),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    page.main(["--directory", str(tmp_path), "--out", str(tmp_path / "flagship.md")], "page")
    text = (tmp_path / "flagship.md").read_text()
    assert "| paint | 0.81 (0.70 to 0.91) |" in text
    assert "| streak_iou_error | 24 | - | - | 0.125 | - | 0.50 | ruler too blunt |" in text
    assert "0.77" not in text
    assert "| paint | imagined | 27.5 |" in text
    assert "| paint | last frame held | 21.2 |" in text
    assert "4 rollouts of 512 frames a kind" in text
    assert "| paint | - | - | 21.6 | 0.96 | - |" in text
    assert "| ours, steps 1 | 25 |" in text
    assert "blind" not in text
    (tmp_path / "rows.json").write_text(json.dumps([stale | {"name": "demo.minutes"}]))
    with pytest.raises(DataError, match="rows of skill"):
        page.main(["--directory", str(tmp_path), "--out", str(tmp_path / "none.md")], "page")
