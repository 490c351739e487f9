"""The measure of the weight of motion: what a missing spot costs, and what the truth does."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("motion")


@pytest.mark.parametrize(("shown", "spot", "rest"), [("truth", 0.0, 0.0), ("table", 1.0, 0.2)])
def test_a_missing_spot_costs_one_and_the_truth_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, shown: str, spot: float, rest: float
) -> None:
    def imagined(model, batch, context_noise):
        latents = batch.latents_BTVChw[:, bench.CONTEXT :]
        if shown == "table":
            table = bench.scene(48, bench.CONTEXT + bench.HORIZON, torch.Generator().manual_seed(99))[0]
            latents = table[:, None, None].expand_as(latents)
        return latents.split(1, 1)

    monkeypatch.setattr(bench, "imagined", imagined)
    monkeypatch.setattr(bench, "train", lambda *_, **__: None)
    figures = bench.measure(1.0, 0, 1)
    assert figures["spot.f1"] == pytest.approx(spot, abs=1e-5)
    assert figures["spot.f8"] == pytest.approx(spot, abs=1e-5)
    assert figures["rest.f8"] == pytest.approx(rest, abs=0.15)


def test_the_table_rests_and_the_spot_goes_where_it_is_told(bench: ModuleType) -> None:
    table, places, batch = bench.scene(3, 6, torch.Generator().manual_seed(0))
    moved = (places[:, 1] - places[:, 0]) / bench.REACH
    torch.testing.assert_close(moved, batch.actions_BTA[:, 0], atol=1e-4, rtol=1e-4)
    cover = bench.spots(places)[:, :, None]
    seen = batch.latents_BTVChw[:, :, 0]
    bare = cover < 1e-3
    away = bare.expand_as(seen)
    torch.testing.assert_close(seen[away], table[:, None].expand_as(seen)[away], atol=0.01, rtol=0.01)
    assert (cover.flatten(3).amax(-1) > 0.4).all(), "always somewhere"
