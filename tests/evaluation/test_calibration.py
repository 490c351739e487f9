"""Calibration of worlds whose honesty is known: one whose truth is like one more sample, and worse ones."""

import numpy as np
import pytest

from vidworld.errors import ConfigError
from vidworld.evaluation.calibration import Verified, summarise, verify
from vidworld.evaluation.calibration_page import _drawn, calibration_lines, write_calibration
from vidworld.evaluation.windows import Settings
from vidworld.page import Report
from vidworld.plots import COLORS

SAMPLES, LEADS, SIZE = 24, 3, 12
NAMES = [("reach", "m"), ("turn", "rad")]


def window(rng: np.random.Generator, spread: float, bias: float, floor: float) -> Verified:
    """Pictures whose right half moves, less sure at every lead; samples are `spread` times as wide."""
    scale_T = 6.0 * np.sqrt(np.arange(1, LEADS + 1))
    shape = (LEADS, 1, SIZE, SIZE, 3)
    mean = rng.uniform(90, 160, shape) + rng.normal(0, 1, shape) * scale_T[:, None, None, None, None]
    wide = scale_T[:, None, None, None, None]
    bound = mean + rng.normal(size=shape) * wide
    samples = mean + bias * wide + spread * rng.normal(size=(SAMPLES, *shape)) * wide
    truth = bound + rng.normal(size=shape) * floor
    last = truth[0].copy()
    last[:, :, SIZE // 2 :] -= 80
    last[:, :, : SIZE // 2] = truth[-1, :, :, : SIZE // 2]

    def pixels(values: np.ndarray) -> np.ndarray:
        return values.round().clip(0, 255).astype(np.uint8)

    centre = rng.normal(size=(LEADS, 2)) * scale_T[:, None]
    proprio = (
        centre + bias * scale_T[:, None] + spread * rng.normal(size=(SAMPLES, LEADS, 2)) * scale_T[:, None]
    )
    seen = centre + rng.normal(size=(LEADS, 2)) * scale_T[:, None]
    return verify(
        pixels(samples), pixels(bound), pixels(truth), pixels(last), proprio, seen, NAMES,
        seed=int(rng.integers(1000)),
    )  # fmt: skip


def study(episodes: int = 60, spread: float = 1.0, bias: float = 0.0, floor: float = 0.0) -> dict:
    rng = np.random.default_rng(0)
    return summarise(
        [
            (f"episode-{number}", window(rng, spread, bias, floor))
            for number in range(episodes)
            for _ in range(2)
        ]
    )


def test_an_honest_world_passes_in_every_quantity() -> None:
    found = study()
    for name, one in found["quantities"].items():
        pooled = one["pooled"]
        assert pooled["spread_skill"] == pytest.approx(1, abs=0.12), name
        low, high = pooled["spread_skill_interval"]
        assert low < pooled["spread_skill"] < high
        for level, share in pooled["coverage"].items():
            assert share == pytest.approx(float(level), abs=0.05), name
    assert list(found["quantities"]) == [
        "pixels", "pixels moving", "pixels still", "proprio reach", "proprio turn",
    ]  # fmt: skip
    for name in ("proprio reach", "proprio turn"):
        assert min(found["quantities"][name]["p_flat"]) > 0.001
    assert found["bands"]["held"] > 0.8
    pixels = found["quantities"]["pixels"]
    assert pixels["spread"][2] == pytest.approx(6 * np.sqrt(3) / 255, rel=0.05)
    assert pixels["cases"] == [60 * 2 * SIZE * SIZE * 3] * LEADS


@pytest.mark.parametrize("wrong", [{"spread": 0.4}, {"bias": 1.5}])
def test_a_dishonest_world_fails_in_every_quantity(wrong: dict[str, float]) -> None:
    found = study(**wrong)
    for name, one in found["quantities"].items():
        assert one["pooled"]["spread_skill"] < 0.7, name
        assert one["pooled"]["coverage"]["0.9"] < 0.8, name
    test = found["quantities"]["proprio reach"]
    assert max(test["p_flat"]) < 0.05
    telling = "p_dispersion" if "spread" in wrong else "p_bias"
    assert max(test[telling]) < 1e-3


def test_the_tokenizers_own_error_stays_apart() -> None:
    rough = study(episodes=6, floor=20.0)
    assert np.sqrt(rough["floor"][0]) == pytest.approx(20 / 255, rel=0.1)
    assert rough["quantities"]["pixels"]["pooled"]["spread_skill"] == pytest.approx(1, abs=0.2)
    assert study(episodes=6)["floor"] == [0.0] * LEADS
    assert rough["bands"] is None, "six episodes fit no bands"


def test_moving_and_still_pixels_are_told_apart() -> None:
    quantities = study(episodes=6)["quantities"]
    together = np.array(quantities["pixels moving"]["cases"]) + quantities["pixels still"]["cases"]
    assert together.tolist() == quantities["pixels"]["cases"]
    assert quantities["pixels moving"]["cases"][-1] >= 6 * 2 * SIZE * SIZE * 3 / 2, "the right half moved"


def test_few_samples_and_levels_that_they_cannot_tell() -> None:
    with pytest.raises(ConfigError, match="--samples: got 4, expected 8 or more with --calibration; take 32"):
        Settings(calibration=True, samples=4)
    rng = np.random.default_rng(0)
    few = verify(
        *(np.zeros((*lead, LEADS, 1, 4, 4, 3), np.uint8) for lead in ((9,), (), ())),
        np.zeros((1, 4, 4, 3), np.uint8),
        rng.normal(size=(9, LEADS, 1)),
        rng.normal(size=(LEADS, 1)),
        NAMES[:1],
        seed=0,
    )
    found = summarise([("a", few)])
    assert list(found["quantities"]["proprio reach"]["pooled"]["coverage"]) == ["0.5", "0.8"]
    assert np.isnan(found["quantities"]["pixels"]["pooled"]["spread_skill"]), "no spread and no error"
    assert found["quantities"]["pixels moving"]["pooled"]["coverage"]["0.5"] is None


def test_every_curve_has_a_colour_of_its_own() -> None:
    quantities = study(episodes=6)["quantities"]
    worse = {f"{group} {n}": quantities["proprio reach"] for group in ("read", "proprio") for n in range(9)}
    drawn = _drawn(quantities | worse)
    assert len(drawn) == len(set(drawn)) == len(COLORS)
    assert drawn[:2] == ["pixels", "pixels moving"]
    assert sum(name.startswith("read") for name in drawn) == 2


def test_the_page_and_the_terminal_name_the_worst() -> None:
    found = study(episodes=8, spread=0.4)
    lines = calibration_lines("arm", found)
    assert lines[0].startswith("calibration of arm, 24 samples")
    (turn,) = [line for line in lines if "proprio turn" in line]
    assert 0.2 < float(turn.split()[2]) < 0.6
    assert "90%: " in turn
    report = Report("t")
    write_calibration(report, "arm", found)
    page = report.render()
    assert "Is it honest about what it does not know? (arm)" in page
    assert "Coverage of the 90% interval" in page
