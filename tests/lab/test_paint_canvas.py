"""Paint: volume is bookkept exactly, brushes run dry, nothing marks without contact, drips obey gravity."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="the lab's kernels need numba")

from vidworld.lab.paint_canvas import PAINTS, Brush, Canvas, PaintConfig, mixed_colour, weave

CONFIG = PaintConfig(texels=144, bristles=48)
WIDTH = 0.4
LIGHT = np.array([0.3, -0.6, 0.74]) / np.linalg.norm([0.3, -0.6, 0.74])


def fresh(paints=("blue", "yellow"), load_ml=2.5, config=CONFIG):
    canvas = Canvas(WIDTH, np.full((144, 144, 3), 0.9), paints, seed=1, config=config)
    brush = Brush(0.025, 0.006, len(paints), CONFIG.bristles, seed=2)
    given = brush.dip(0, load_ml)
    return canvas, brush, given


def drag(canvas, brush, start, end, depth=0.006, depletion=0.3, pieces=40):
    """Volumes in the brush after each piece of a straight stroke."""
    turn = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    places = np.linspace(start, end, pieces + 1)
    tips = [brush.tips(np.array([*place, depth]), turn) for place in places]
    volumes, touched = [brush.volume_P.sum()], False
    for before, after in itertools.pairwise(tips):
        touched |= canvas.stroke(brush, before, after, depletion)
        volumes.append(brush.volume_P.sum())
    return np.array(volumes), touched


def test_every_paint_is_accounted_for_through_dips_strokes_mixing_and_drips():
    canvas, brush, given = fresh(load_ml=5)
    drag(canvas, brush, (0.05, 0.3), (0.35, 0.32))
    given = given + brush.dip(1, 5)
    drag(canvas, brush, (0.2, 0.05), (0.2, 0.38))
    for _ in range(60):
        canvas.drip(0.08, 0.02, 1.0)
    assert canvas.film_NNP.min() >= 0
    assert brush.load_KP.min() >= 0
    assert canvas.lost_P.sum() > 0, "the run reaches the lower edge, so that path is tested too"
    np.testing.assert_allclose(canvas.volume_P + brush.volume_P + canvas.lost_P, given, rtol=0, atol=1e-12)


def test_a_brush_runs_dry_and_never_gains_without_a_dip():
    canvas, brush, _ = fresh()
    volumes, touched = drag(canvas, brush, (0.05, 0.1), (0.35, 0.1))
    assert touched
    assert (np.diff(volumes) <= 1e-15).all()
    columns = canvas.film_NNP.sum((0, 2))[30:115].reshape(5, 17).sum(1)
    assert (np.diff(columns) < 0).all(), "the streak fades along the stroke"
    again, _ = drag(canvas, brush, (0.05, 0.1), (0.35, 0.1))
    assert (np.diff(again) <= 1e-15).all(), "wet paint under it does not refill it"


def test_depletion_is_exponential_where_the_canvas_takes_paint():
    canvas, brush, _ = fresh(load_ml=2.5)
    canvas.grain_NN[:] = 0
    brush.shortness_K[:] = 0
    volumes, _ = drag(canvas, brush, (0.08, 0.2), (0.28, 0.2), depletion=0.4)
    assert volumes[-1] / volumes[0] == pytest.approx(np.exp(-0.2 / 0.4), rel=0.05)


def test_no_mark_without_contact():
    canvas, brush, _ = fresh()
    before = brush.load_KP.copy()
    _, touched = drag(canvas, brush, (0.05, 0.1), (0.35, 0.1), depth=-0.0005)
    canvas.drip(0.08, 0.02, 1.0)
    assert not touched
    assert canvas.film_NNP.sum() == 0
    np.testing.assert_array_equal(brush.load_KP, before)
    np.testing.assert_array_equal(canvas.shade(LIGHT), 230)


def test_a_dry_brush_skips_the_valleys_and_a_light_touch_is_narrow():
    wet, brush, _ = fresh(load_ml=4)
    drag(wet, brush, (0.05, 0.1), (0.2, 0.1))
    dry, brush, _ = fresh(load_ml=0.9)
    drag(dry, brush, (0.05, 0.1), (0.2, 0.1))
    inside = np.s_[30:42, 24:66]
    assert wet.streak()[inside].mean() > 0.95
    assert 0.02 < dry.streak()[inside].mean() < 0.8
    light, brush, _ = fresh(load_ml=4)
    drag(light, brush, (0.05, 0.1), (0.2, 0.1), depth=0.001)
    assert light.streak().any(1).sum() < wet.streak().any(1).sum()


@pytest.mark.parametrize(("mixing", "carries"), [(0.1, True), (0.0, False)])
def test_wet_colours_mix_and_a_rinsed_brush_keeps_a_trace(mixing, carries):
    canvas, brush, _ = fresh(load_ml=3, config=replace(CONFIG, mixing=mixing))
    drag(canvas, brush, (0.05, 0.2), (0.35, 0.2))
    brush.dip(1, 3)
    assert 0 < brush.volume_P[0] < 0.1 * brush.volume_P[1]
    drag(canvas, brush, (0.2, 0.02), (0.2, 0.38))
    above, beyond = (canvas.film_NNP[rows].sum((0, 1)) for rows in (np.s_[20:40], np.s_[90:110]))
    share = beyond[0] / beyond.sum() / (above[0] / above.sum())
    assert share > 1.5 if carries else share == pytest.approx(1, abs=0.1), "blue carried past the crossing"
    picture = canvas.shade(LIGHT).astype(int)
    assert (picture[..., 1] > picture[..., 0] + 25).sum() > 20


def test_blue_and_yellow_make_green_and_a_pure_paint_keeps_its_colour():
    colours = np.array([PAINTS["blue"], PAINTS["yellow"]])
    np.testing.assert_allclose(mixed_colour(np.array([0.0, 2.0]), colours), PAINTS["yellow"], atol=1e-12)
    red, green, blue = mixed_colour(np.array([1.0, 1.0]), colours)
    assert green > 1.5 * red
    assert green > 1.5 * blue


def test_drips_need_a_slope_fall_down_and_are_longer_when_thin():
    lengths = {}
    for viscosity, slope in ((0.02, 1.0), (0.3, 1.0), (0.02, 0.0)):
        canvas, brush, _ = fresh(load_ml=6)
        drag(canvas, brush, (0.05, 0.1), (0.35, 0.1))
        before = canvas.film_NNP.copy()
        rows_before = np.flatnonzero(before.sum((1, 2)))
        for _ in range(50):
            canvas.drip(0.08, viscosity, slope)
        rows = np.flatnonzero(canvas.film_NNP.sum((1, 2)))
        assert rows[0] == rows_before[0], "nothing climbs"
        lengths[viscosity, slope] = rows[-1] - rows_before[-1]
    assert lengths[0.02, 0.0] == 0
    assert lengths[0.02, 1.0] > 3 * max(lengths[0.3, 1.0], 1)


def test_coverage_is_the_streak_by_colour():
    canvas, brush, _ = fresh()
    drag(canvas, brush, (0.05, 0.1), (0.35, 0.1))
    first = canvas.coverage_P()
    assert first[0] > 0.02
    assert first[1] == 0
    brush.dip(1, 2.5)
    drag(canvas, brush, (0.05, 0.3), (0.35, 0.3))
    assert canvas.coverage_P()[1] > 0.02
    assert canvas.coverage_P().sum() == pytest.approx(canvas.streak().mean())


def test_a_stroke_off_the_edge_is_lost_to_nobody():
    canvas, brush, given = fresh()
    drag(canvas, brush, (-0.1, 0.39), (0.5, 0.43))
    np.testing.assert_allclose(canvas.volume_P + brush.volume_P, given, atol=1e-12)
    assert weave(20, np.random.default_rng(0)).shape == (20, 20)


def digest() -> str:
    """Hash of a stroked, mixed and dripped canvas and its picture."""
    canvas, brush, _ = fresh(load_ml=5)
    drag(canvas, brush, (0.05, 0.1), (0.35, 0.12))
    brush.dip(1, 3)
    drag(canvas, brush, (0.2, 0.05), (0.25, 0.35))
    for _ in range(10):
        canvas.drip(0.08, 0.02, 0.9)
    return hashlib.sha256(canvas.film_NNP.tobytes() + canvas.shade(LIGHT).tobytes()).hexdigest()


def test_the_same_strokes_give_the_same_bytes_in_another_process():
    assert digest() == digest()
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_paint_canvas as t; print(t.digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()
