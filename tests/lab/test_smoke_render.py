import numpy as np
import pytest

pytest.importorskip("numba", reason="the lab needs numba")

from vidworld.errors import ConfigError
from vidworld.lab.effect import Camera
from vidworld.lab.smoke_flow import F
from vidworld.lab.smoke_render import SmokeLook, draw_smoke, sun_light

CELL, SHAPE = 0.05, (8, 12, 10)
ORIGIN = np.array([0.0, -0.3, 0.0])
SIZE = 96
LOOK = SmokeLook(extinction=5.0, shadow=0.0)


def camera(fovy_deg: float = 40.0) -> Camera:
    """Looks along -x at the middle of the volume from x = 2."""
    rotation_33 = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    return Camera(np.array([2.0, 0.0, 0.25]), rotation_33, fovy_deg, SIZE // 2)


def draw(density: np.ndarray, depth: float | np.ndarray = 9.0, look: SmokeLook = LOOK, **settings):
    rgb = np.full((SIZE, SIZE, 3), 200, np.uint8)
    depths = np.broadcast_to(np.asarray(depth, F), (SIZE, SIZE))
    grid = {"cell": CELL, "origin_3": ORIGIN, "camera": camera(), "look": look}
    return draw_smoke(
        rgb, depths, density, **{**grid, "light_direction_3": np.array([0, 0, -1.0]), **settings}
    )


def test_a_slab_transmits_as_beer_and_lambert_say():
    _, opacity = draw(np.full(SHAPE, 0.4, F))
    middle = opacity[SIZE // 4, SIZE // 4]
    assert middle == pytest.approx(1 - np.exp(-5.0 * 0.4 * SHAPE[0] * CELL), rel=2e-3)
    _, half = draw(np.full(SHAPE, 0.4, F), depth=2.0 - 0.2)
    assert half[SIZE // 4, SIZE // 4] == pytest.approx(1 - np.exp(-5.0 * 0.4 * 0.2), rel=2e-3)


def test_the_colour_behind_is_attenuated_and_the_smoke_s_added():
    black = SmokeLook(albedo_3=(0, 0, 0), extinction=5.0, shadow=0.0)
    picture, opacity = draw(np.full(SHAPE, 0.4, F), look=black)
    np.testing.assert_allclose(picture[::2, ::2, 0], 200 * (1 - opacity), atol=0.6)
    lit, _ = draw(np.full(SHAPE, 0.4, F), look=SmokeLook((0.8, 0.2, 0.2), 5.0, 1.0, 0.0, 0.0))
    centre = lit[SIZE // 2, SIZE // 2].astype(float)
    share = opacity[SIZE // 4, SIZE // 4]
    np.testing.assert_allclose(centre, 200 * (1 - share) + 255 * share * np.array([0.8, 0.2, 0.2]), atol=1)


def test_a_blob_is_drawn_where_the_pinhole_projects_it():
    density = np.zeros(SHAPE, F)
    density[4, 8, 7] = 8.0
    _, opacity = draw(density)
    rows, columns = np.mgrid[: SIZE // 2, : SIZE // 2] + 0.5
    seen = np.array([(opacity * columns).sum(), (opacity * rows).sum()]) / opacity.sum()
    point = ORIGIN + CELL * (np.array([4, 8, 7]) + 0.5)
    expected, _ = camera().project(point[None])
    np.testing.assert_allclose(seen, expected[0], atol=0.1)


def test_surfaces_hide_what_is_behind_them():
    density = np.full(SHAPE, 0.5, F)
    picture, opacity = draw(density, depth=1.0)
    assert not opacity.any()
    assert (picture == 200).all()
    # Within one block, each pixel sees the smoke before its own surface.
    depths = np.full((SIZE, SIZE), 9.0, F)
    depths[::2, ::2] = 1.0
    mixed, _ = draw(density, depth=depths, look=SmokeLook((0, 0, 0), 5.0, shadow=0.0))
    assert (mixed[::2, ::2] == 200).all()
    assert (mixed[SIZE // 2 + 1, SIZE // 2 + 1] < 120).all()


@pytest.mark.parametrize("direction", [(0, 0, -1.0), (0, 0, 1.0), (-1.0, 0, 0), (0, 1.0, 0)])
def test_light_fades_along_its_way(direction):
    light = sun_light(np.full(SHAPE, 0.5, F), CELL, 4.0, np.array(direction))
    axis = int(np.argmax(np.abs(direction)))
    line = np.moveaxis(light, axis, 0)[:, 4, 4]
    line = line if sum(direction) > 0 else line[::-1]
    np.testing.assert_allclose(line, np.exp(-4.0 * 0.5 * CELL * (np.arange(SHAPE[axis]) + 0.5)), rtol=1e-4)


def test_slanted_light_casts_the_shadow_aside():
    density = np.zeros(SHAPE, F)
    density[2:6, 3:5, 7:9] = 1.0
    light = sun_light(density, CELL, 20.0, np.array([0, 0.5, -1.0]))
    assert light[4, 6, 2] < 0.5 < 0.99 < light[4, 2, 2]


def test_smoke_darkens_the_surface_below_it():
    density = np.zeros(SHAPE, F)
    density[3:5, 4:8, 8:] = 2.0
    above = Camera(np.array([0.2, 0.0, 3.0]), np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]), 20.0, SIZE // 2)
    clear, opacity = draw(density, depth=3.0, camera=above)
    dark, _ = draw(density, depth=3.0, camera=above, look=SmokeLook(extinction=5.0, shadow=0.6))
    assert opacity.max() > 0.1
    low_sun = np.array([0.0, 1.0, -1.5])
    aside, _ = draw(density, depth=3.0, camera=above, look=SmokeLook(shadow=0.6), light_direction_3=low_sun)
    unseen = np.repeat(np.repeat(opacity < 0.01, 2, 0), 2, 1)
    assert dark.astype(int).sum() < clear.astype(int).sum()
    assert aside[unseen].min() < 170
    assert clear[unseen].min() > 195


def test_no_smoke_no_change_and_bad_sizes_are_refused():
    picture, opacity = draw(np.zeros(SHAPE, F), look=SmokeLook())
    assert (picture == 200).all()
    assert not opacity.any()
    with pytest.raises(ConfigError, match="frame to draw smoke on"):
        draw_smoke(
            np.zeros((7, 8, 3), np.uint8),
            np.zeros((7, 8), F),
            np.zeros(SHAPE, F),
            cell=CELL,
            origin_3=ORIGIN,
            camera=camera(),
            light_direction_3=np.array([0, 0, -1.0]),
            look=LOOK,
        )
