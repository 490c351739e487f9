"""Imagined histories lower drift: measured on a world with one right answer."""

import importlib
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("history")


def test_the_dot_goes_where_it_is_told(bench: ModuleType) -> None:
    batch = bench.clips(2, 5, torch.Generator().manual_seed(0))
    start = torch.tensor([[0.3, 0.6], [0.8, 0.1]])
    moved = start + bench.REACH * batch.actions_BTA[:, 0]
    assert not torch.allclose(bench.dots(start), bench.dots(moved))
    assert torch.allclose(bench.dots(moved), bench.dots(moved + 1.0), atol=1e-5), "a torus"
    assert batch.latents_BTVChw.shape == (2, 5, 1, 2, bench.SIDE, bench.SIDE)


def test_a_world_that_knows_the_truth_has_neither_error_nor_decay(bench: ModuleType, monkeypatch) -> None:
    """The measure's own zero: truth is imagined; and a frame that is no dot at all has decayed."""
    batch = bench.clips(4, bench.CONTEXT + bench.HORIZON, torch.Generator().manual_seed(99))
    truth = iter(batch.latents_BTVChw[:, bench.CONTEXT :].split(1, 1))
    grey = {"on": False}

    def told(model, cache, conditioning, frame, stream, sampler):
        latents = next(truth)
        return bench.Frames(latents * (0.0 if grey["on"] else 1.0), torch.zeros(4, 1, 1)), cache

    monkeypatch.setattr(bench, "imagine", told)
    monkeypatch.setattr(bench, "take_in", lambda *_: (None, None))
    error, decay = bench.roll_out(None, 0.0, rows=4)
    assert max(error) == 0
    assert max(decay) < 0.01, "the nearest of 48 x 48 dots"
    truth, grey["on"] = iter(batch.latents_BTVChw[:, bench.CONTEXT :].split(1, 1)), True
    error, decay = bench.roll_out(None, 0.0, rows=4)
    assert min(decay) > 0.3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_imagined_histories_lower_drift(bench: ModuleType) -> None:
    """With noisy context in training and rollout, as is the default; two seeds, 8 times the clip length."""
    found = {
        arm: [bench.measure(arm, "noisy", seed, 600) for seed in (0, 1)] for arm in ("plain", "imagined")
    }

    def mean(arm: str, name: str) -> float:
        return statistics.fmean(figures[name] for figures in found[arm])

    assert mean("plain", "error.f48") > 10 * mean("plain", "error.f1"), "there is drift to lower"
    assert mean("imagined", "error.f12") < 0.85 * mean("plain", "error.f12")
    assert mean("imagined", "error.f48") < 0.8 * mean("plain", "error.f48")
    assert mean("imagined", "error.f1") < 1.3 * mean("plain", "error.f1"), "at no cost of the first frame"
