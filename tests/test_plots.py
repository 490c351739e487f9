import io
import re

import numpy as np
import pytest
from PIL import Image

from vidworld.plots import COLORS, FLOOR_COLOR, Line, Panel, draw, to_png, to_svg


@pytest.fixture
def panels() -> tuple[Panel, Panel]:
    x = np.arange(1, 9)
    model = Line("model", x, 30 - x, low=29 - x, high=31 - x)
    floor = Line("copy last frame", x, 20 - x, floor=True)
    return (
        Panel((floor, model), "PSNR", "frame", "dB"),
        Panel((Line("other", x, [None, *x[1:]]), model), "SSIM & <more>", "frame"),
    )


def test_a_label_keeps_its_colour_across_panels(panels):
    left, right = draw(panels).axes
    by_label = [
        {tuple(np.asarray(line.get_ydata(), float)): line.get_color() for line in axes.lines}
        for axes in (left, right)
    ]
    model = tuple((30 - np.arange(1, 9)).astype(float))
    assert by_label[0][model] == by_label[1][model] == COLORS[0]
    assert set(by_label[0].values()) == {COLORS[0], FLOOR_COLOR}
    assert COLORS[1] in by_label[1].values()
    assert left.get_ylabel() == "dB"
    with pytest.raises(ValueError, match="no panels"):
        draw([])


def test_gaps_are_left_open(panels):
    line = draw(panels).axes[1].lines[0]
    assert np.isnan(np.asarray(line.get_ydata(), float)[0])


def test_svg_takes_the_pages_colours_and_keeps_its_ids_apart(panels):
    first, second = to_svg(draw(panels), "a"), to_svg(draw(panels), "b")
    assert first.startswith("<svg")
    assert "currentColor" in first
    assert "#010203" not in first
    assert "SSIM &amp; &lt;more&gt;" in first
    assert first == to_svg(draw(panels), "a"), "equal figures, equal bytes"
    ids = re.findall(r'\bid="([^"]+)"', first + second)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', first)) | set(re.findall(r"url\(#([^)]+)\)", first))
    assert used
    assert used <= set(ids)


def test_png_is_dark_on_white(panels):
    picture = np.asarray(Image.open(io.BytesIO(to_png(draw(panels)))).convert("RGB"))
    assert picture.shape[1] > 1000
    assert (picture[0, 0] == 255).all()
    assert picture.min() < 40


def test_dollar_signs_are_no_formula():
    assert r"$\frac" in to_svg(draw([Panel((Line("a", [1, 2], [1, 2]),), r"cost in $\frac$")]), "a")
