"""Pouring and stirring end to end: nothing leaks early, liquid goes where it is poured, the arm feels it."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl
from vidworld.lab.effect import Camera
from vidworld.lab.episode import LabConfig, LabEpisode, generate, resimulate
from vidworld.lab.flip import PER_AXIS
from vidworld.lab.liquid import CELL, LiquidEffect
from vidworld.lab.liquid_plan import cup_pose, tool_of_lip
from vidworld.lab.liquid_render import LIQUIDS, draw_liquid, surface_of

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")
CONFIG = LabConfig(size=64, exploration=0.0)


def first(task: str, clear: bool, render: bool = True) -> LabEpisode:
    """An episode of a set-up, by its seed."""
    episode = generate(
        "liquid", {("pour", False): 0, ("stir", True): 1}.get((task, clear), 2), CONFIG, render=render
    )
    assert (episode.visible["task"], episode.visible["clear"]) == (task, clear)
    return episode


def test_the_lip_is_where_the_plan_puts_it():
    visible = {"flip": -1, "cup_radius": 0.036, "cup_height": 0.1}
    lip = np.array([0.5, 0.02, 0.2])
    for tilt in (0.0, 1.0, 2.0):
        tool_3, tool_33 = tool_of_lip(lip, tilt, 0.5, 1.0, visible)
        base_3, rotation_33 = cup_pose(tool_3, tool_33, visible)
        assert np.linalg.det(rotation_33) == pytest.approx(1)
        assert rotation_33[2, 2] == pytest.approx(np.cos(tilt))
        local = rotation_33.T @ (lip - base_3)
        assert np.hypot(local[0], local[1]) == pytest.approx(0.036)
        assert local[2] == pytest.approx(0.1)


@needs_gl
def test_an_opaque_cup_tells_nothing_before_it_tilts_and_all_after():
    episode = first("pour", clear=False)
    other = {"fill": 0.6 if episode.hidden["fill"] < 0.45 else 0.32, "log10_viscosity": -3.0}
    twin = resimulate(episode, other)
    assert episode.frames_THWC is not None
    assert twin.frames_THWC is not None
    same_T = (episode.frames_THWC == twin.frames_THWC).all((1, 2, 3))
    same_T &= (episode.proprio_TS == twin.proprio_TS).all(1)
    start = int(np.argmin(same_T))
    assert start >= 5
    assert not episode.masks_THW["liquid"][:start].any()
    assert episode.masks_THW["liquid"][-1].any()
    assert not np.array_equal(episode.proprio_TS[-1], twin.proprio_TS[-1])
    assert abs(episode.outcomes_T["fill"][-1] - twin.outcomes_T["fill"][-1]) > 0.05


@needs_gl
def test_the_same_seed_gives_the_same_bytes():
    episode = first("pour", clear=True)
    again = generate("liquid", episode.seed, CONFIG)
    assert episode.frames_THWC is not None
    assert again.frames_THWC is not None
    assert np.array_equal(episode.frames_THWC, again.frames_THWC)
    assert np.array_equal(episode.proprio_TS, again.proprio_TS)
    assert episode.hidden == {}


def test_poured_liquid_is_all_accounted_for():
    episode = first("pour", clear=True, render=False)
    outcomes = episode.outcomes_T
    total = outcomes["cup_ml"][0]
    assert outcomes["received_ml"][0] == 0
    assert outcomes["cup_ml"][-1] < 0.5 * total
    found = outcomes["cup_ml"] + outcomes["received_ml"] + outcomes["spilled_ml"]
    assert (found <= total + 1e-6).all()
    assert outcomes["received_ml"][-1] + outcomes["spilled_ml"][-1] > 0.4 * total


def test_a_stirred_tray_loses_nothing_it_should_keep():
    episode = first("stir", clear=True, render=False)
    assert episode.outcomes_T["received_ml"][-1] > 0.97 * episode.outcomes_T["received_ml"][0]
    assert episode.outcomes_T["kinetic_mj"][10:].max() > 1


class Watched(LiquidEffect):
    """Keeps, a frame, by what share the liquid's apparent volume is off."""

    def __init__(self) -> None:
        self.tilted, self.off = [], []

    def outcome(self):
        readouts = super().outcome()
        x, held, cell = self._flip.x_N3.astype(float), self._solids[0], CELL[self._visible["task"]]
        if self._visible["task"] == "stir":
            volume = surface_of(self._flip.x_N3, cell / PER_AXIS).volume()
            self.first = getattr(self, "first", volume)
            self.off.append(volume / self.first - 1)
        elif readouts["cup_ml"] > 0.99 * len(x) * 1e6 * (cell / PER_AXIS) ** 3:
            true, rotation = len(x) * (cell / PER_AXIS) ** 3, held[4:13].reshape(3, 3)
            self.off.append(calm_volume(held, x[:, 2] - held[3]) / true - 1)
            self.tilted.append(float(np.arccos(np.clip(rotation[2, 2], -1, 1))))
        return readouts


def calm_volume(cup: np.ndarray, height_N: np.ndarray, points: int = 50) -> float:
    """Volume of calm liquid in a tilted cup, from the mean height of it over the middle of the floor."""
    radius, tall, up = cup[19], cup[20], cup[4:13].reshape(3, 3)[2]
    axis = (np.arange(points) + 0.5) / points
    x, y, z = np.meshgrid((2 * axis - 1) * radius, (2 * axis - 1) * radius, axis * tall, indexing="ij")
    inside = np.hypot(x, y) < radius
    heights = np.sort(np.stack([x[inside], y[inside], z[inside]], axis=1) @ up)
    count = np.arange(len(heights)) + 1
    filled = np.interp(height_N.mean(), np.cumsum(heights) / count, count)
    return float(filled / len(heights) * np.pi * radius**2 * tall)


@pytest.mark.parametrize(("seed", "frames"), [(5, 24), (2, 22), (1, 64)])
def test_the_volume_of_a_carried_cup_and_of_a_stirred_tray_holds(monkeypatch, seed, frames):
    effect = Watched()
    effect.frames = frames
    monkeypatch.setattr("vidworld.lab.episode.effect_of", lambda kind, frames: effect)
    generate("liquid", seed, dataclasses.replace(CONFIG, frames=frames), render=False)
    assert len(effect.off) >= 20
    assert np.abs(effect.off).max() < 0.05
    if effect.tilted:
        assert max(effect.tilted) > 0.7, "carried and tilted, up to where it begins to pour"


def blob(count: int = 14) -> np.ndarray:
    """Particles on a lattice in a cube."""
    axis = (np.arange(count) + 0.5) * 0.003
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def camera() -> Camera:
    """From +x, looking at the cube."""
    rotation = np.stack([[0.0, 1, 0], [0.0, 0, 1], [1.0, 0, 0]], axis=1)
    return Camera(np.array([0.4, 0.021, 0.021]), rotation, 30.0, 32)


def test_the_surface_encloses_the_volume_of_its_particles():
    surface = surface_of(blob(), 0.003)
    assert surface.volume() == pytest.approx((14 * 0.003) ** 3, rel=0.12)


def test_liquid_is_drawn_in_front_and_hidden_behind():
    rgb, light = np.full((64, 64, 3), 200, np.uint8), np.array([0.0, 0.3, -0.95])
    surface, look = surface_of(blob(), 0.003), LIQUIDS["cola"]
    far, near = np.full((64, 64), 2.0, np.float32), np.full((64, 64), 0.1, np.float32)
    picture, seen = draw_liquid(rgb, far, camera(), surface, look, light)
    assert seen[32, 32]
    assert not seen[0, 0]
    assert picture[32, 32].mean() < 120
    assert (picture[0, 0] == 200).all()
    hidden, unseen = draw_liquid(rgb, near, camera(), surface, look, light)
    assert not unseen.any()
    assert np.array_equal(hidden, rgb)
    nothing, _ = draw_liquid(rgb, far, camera(), None, look, light)
    assert np.array_equal(nothing, rgb)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="differ"):
        draw_liquid(
            np.zeros((8, 8, 3), np.uint8),
            np.ones((4, 4), np.float32),
            camera(),
            None,
            LIQUIDS["milk"],
            np.ones(3),
        )
