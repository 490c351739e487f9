"""The measure of what stays of strokes: pixels by age, and of rollouts only what was painted on the way."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("previous_frame")


def test_errors_are_counted_on_strokes_by_their_age(bench: ModuleType) -> None:
    """A column is painted each frame; pictures err by as much as the paint there is old."""
    times, columns = np.arange(bench.HORIZON), np.arange(40)
    painted = bench.CONTEXT + times[:, None] - columns  # the first columns before the horizon begins
    age_BTHW = np.where(painted >= 0, painted, -1)[None, :, None, :]
    truth = np.zeros((1, bench.HORIZON, 1, 40, 3), np.uint8)
    frames = truth + np.maximum(age_BTHW, 0).astype(np.uint8)[..., None]
    found = bench.one_ahead("x.", frames, truth, age_BTHW)
    for age in bench.AGES:
        assert found[f"x.forced.stroke.age{age}"] == pytest.approx((age / 255) ** 2)
    rolled = bench.ahead("", frames, truth, age_BTHW)
    new = np.array([age for t in times for age in range(t + 1)])
    assert rolled["free.stroke"] == pytest.approx(np.square(new / 255).mean())
    old_alone = np.where(age_BTHW > np.arange(bench.HORIZON)[:, None, None], frames[..., 0], 0)
    untouched = bench.ahead("", np.repeat(old_alone[..., None], 3, -1), truth, age_BTHW)
    assert untouched["free.stroke"] == 0, "strokes of before the horizon do not count"
    assert untouched["free.psnr.f8"] < np.inf
