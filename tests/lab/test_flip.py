"""The liquid solver against what physics says, each with a control that must fail or stand still."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("numba", reason='the lab needs: pip install "vidworld[lab]"')

from vidworld.errors import ConfigError
from vidworld.lab import flip as flip_module
from vidworld.lab import flip_pressure as pressure
from vidworld.lab.flip import PER_AXIS, Flip, FlipConfig, lattice
from vidworld.lab.flip_solids import Shape, solid
from vidworld.lab.liquid_render import surface_of

CELL, DT, FLOOR = 0.01, 0.008, 0.01
TRAY = FlipConfig(cell=CELL)


def tray(config: FlipConfig = TRAY, depth: float = 0.035) -> tuple[Flip, np.ndarray]:
    """A calm tray of 0.16 x 0.2 m whose floor lies on a grid plane."""
    x = lattice([-0.08, -0.1, FLOOR], [0.08, 0.1, FLOOR + depth], CELL, np.random.default_rng(0))
    flip = Flip([-0.12, -0.14, 0], [0.12, 0.14, 0.15], x, config)
    return flip, solid(Shape.TRAY, [0, 0, FLOOR], np.eye(3), [0.08, 0.1, 0.07, 0.008])[None]


def level(flip: Flip) -> float:
    """Depth in the tray if the particles fill what their mass says."""
    return len(flip.x_N3) * (CELL / PER_AXIS) ** 3 / (0.16 * 0.2)


def shaken_cup(steps: int) -> tuple[Flip, np.ndarray, list[float]]:
    """A cup that is swung and shaken for `steps` steps, then held; volumes of its surface on the way."""
    radius, cell = 0.04, 0.0066
    x = lattice([-radius, -radius, 0], [radius, radius, 0.06], cell, np.random.default_rng(0))
    x = x[np.hypot(x[:, 0], x[:, 1]) < radius - 0.0005]
    flip = Flip([-0.12, -0.12, 0], [0.12, 0.12, 0.25], x + [0, 0, 0.05], FlipConfig(cell=cell))
    row, volumes = None, []
    for step in range(steps + 70):
        phase = min(step, steps) / steps * 2 * np.pi
        turn = 0.3 * np.sin(2 * phase)
        rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
        place = [0.03 * np.sin(3 * phase), 0, 0.05]
        row = solid(Shape.CUP, place, rotation, [radius, 0.11, 0.004, 0.004], row, DT)
        flip.step(DT, row[None])
        if step % 10 == 0:
            volumes.append(surface_of(flip.x_N3, cell / PER_AXIS).volume())
    assert row is not None
    return flip, row, volumes


def test_a_level_tank_stays_level_and_keeps_its_volume():
    flip, solids = tray()
    for _ in range(80):
        flip.step(DT, solids)
    speed = np.sqrt(np.square(flip.v_N3).sum(1).mean())
    assert speed < 0.005
    assert 2 * (flip.x_N3[:, 2].mean() - FLOOR) == pytest.approx(level(flip), rel=0.02)


def test_without_gravity_nothing_moves_and_nothing_presses():
    flip, solids = tray(dataclasses.replace(TRAY, gravity=1e-12, correction=1e-9))
    start = flip.x_N3.copy()
    for _ in range(20):
        flip.step(DT, solids)
    assert np.abs(flip.x_N3 - start).max() < 1e-6
    assert abs(flip.impulse_S6[0, 2]) < 1e-9


def test_hydrostatic_pressure_and_weight():
    flip, solids = tray()
    for _ in range(10):
        flip.step(DT, solids)
    for z in (0.015, 0.025):
        expected = 1000 * 9.81 * (FLOOR + level(flip) - z)
        assert flip.pressure_at([0.02, 0.01, z], DT) == pytest.approx(expected, rel=0.05)
    weight = flip.mass * len(flip.x_N3) * 9.81
    assert -flip.impulse_S6[0, 2] / DT == pytest.approx(weight, rel=0.03)
    assert np.abs(flip.impulse_S6[0, :2]).max() / DT < 0.02 * weight


def test_free_fall():
    x = lattice([-0.02, -0.02, 0.3], [0.02, 0.02, 0.34], CELL, np.random.default_rng(0))
    flip = Flip([-0.1, -0.1, 0], [0.1, 0.1, 0.4], x, TRAY)
    start, dt, steps = flip.x_N3[:, 2].mean(), 0.004, 50
    for _ in range(steps):
        flip.step(dt, np.zeros((0, 23)))
    fallen = start - flip.x_N3[:, 2].mean()
    # The symplectic step is first order: it falls g t^2 / 2 (1 + 1 / steps).
    assert fallen == pytest.approx(0.5 * 9.81 * (dt * steps) ** 2 * (1 + 1 / steps), rel=0.01)


def test_dam_break_follows_ritter():
    """Ritter (1892), dry bed: depth (2 c - x / t)^2 / 9 g with c^2 = g H; the front is below 2 c t."""
    depth, width, cell, dt, steps = 0.08, 0.032, 0.008, 0.005, 45
    x = lattice([-0.32, -width / 2, 0.008], [0, width / 2, 0.008 + depth], cell, np.random.default_rng(0))
    config = FlipConfig(cell=cell, friction=0.0)
    flip = Flip([-0.34, -0.032, 0], [0.44, 0.032, 0.16], x, config)
    row = solid(Shape.TRAY, [0.04, 0, 0.008], np.eye(3), [0.36, width / 2, 0.14, 0.008])
    for _ in range(steps):
        flip.step(dt, row[None])
    time, wave = steps * dt, np.sqrt(9.81 * depth)
    for ray in (-0.5, 0.0, 0.5):
        place = ray * wave * time
        slab = np.abs(flip.x_N3[:, 0] - place) < 0.012
        found = slab.sum() * (cell / PER_AXIS) ** 3 / (0.024 * width)
        assert found == pytest.approx((2 * wave - ray * wave) ** 2 / (9 * 9.81), rel=0.15)
    # The volume beyond a ray r c is t c^3 (2 - r)^3 / 27 g: where the foremost hundredth should be.
    ray = 2 - (0.01 * 0.32 * depth * 27 * 9.81 / (time * wave**3)) ** (1 / 3)
    assert np.quantile(flip.x_N3[:, 0], 0.99) == pytest.approx(ray * wave * time, rel=0.1)
    assert flip.x_N3[:, 0].max() < 2 * wave * time


def test_a_shaken_cup_keeps_its_volume_and_its_walls():
    flip, row, volumes = shaken_cup(200)
    local = (flip.x_N3 - row[1:4]) @ row[4:13].reshape(3, 3)
    inside = (np.hypot(local[:, 0], local[:, 1]) < 0.04) & (local[:, 2] > 0)
    assert inside.mean() > 0.99
    assert flip.distance_to_solids(row[None]).min() > 0
    filled = len(local) * flip.mass / 1000 / (np.pi * 0.04**2)
    assert 2 * local[inside, 2].mean() == pytest.approx(filled, rel=0.05)
    assert max(volumes) / min(volumes) - 1 < 0.1


def test_the_correction_is_what_holds_the_volume():
    """Negative control: without it, the same shaken cup loses a tenth and more."""
    radius, cell = 0.04, 0.0066
    x = lattice([-radius, -radius, 0], [radius, radius, 0.06], cell, np.random.default_rng(0))
    x = x[np.hypot(x[:, 0], x[:, 1]) < radius - 0.0005]
    off = FlipConfig(cell=cell, correction=1e-9)
    flip, row = Flip([-0.12, -0.12, 0], [0.12, 0.12, 0.25], x + [0, 0, 0.05], off), None
    for step in range(100):
        row = solid(
            Shape.CUP, [0.03 * np.sin(0.2 * step), 0, 0.05], np.eye(3), [radius, 0.11, 0.004, 0.004], row, DT
        )
        flip.step(DT, row[None])
    assert flip.x_N3[:, 2].mean() - 0.05 < 0.9 * x[:, 2].mean()


def volume_at_rest(floor: float, rising: float = 0.0, steps: int = 60) -> float:
    """Apparent volume of a cupful over the true one, after some steps on a floor at that height."""
    radius, cell, depth = 0.03, 0.0066, 0.036
    x = lattice([-radius, -radius, 0], [radius, radius, depth], cell, np.random.default_rng(0))
    x = x[np.hypot(x[:, 0], x[:, 1]) < radius - 0.0004]
    flip = Flip([-0.06, -0.06, 0], [0.06, 0.06, 0.25], x + [0, 0, floor], FlipConfig(cell=cell))
    row, place = None, floor
    for step in range(steps):
        place += rising * 0.016 * min(step / 20, 1)
        row = solid(Shape.CUP, [0.001, 0, place], np.eye(3), [radius, 0.08, 0.004, 0.004], row, 0.016)
        flip.step(0.016, row[None])
    true = len(x) * (cell / PER_AXIS) ** 3 / (np.pi * radius**2)
    return 2 * float(flip.x_N3[:, 2].mean() - place) / true


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.83, 0.95])
def test_a_cup_holds_its_liquid_wherever_its_floor_lies_in_the_grid(share):
    assert volume_at_rest((10 + share) * 0.0066) == pytest.approx(1, abs=0.03)


def test_a_rising_cup_neither_sheds_nor_presses_its_liquid(monkeypatch):
    assert volume_at_rest(0.07, rising=0.15) == pytest.approx(1, abs=0.03)
    # The negative control: a cell half in a thin wall sees the air behind it, and liquid seeps away.
    monkeypatch.setattr(flip_module, "THICKNESS", 1.15)
    assert volume_at_rest((10 + 0.83) * 0.0066) < 0.9


def test_liquid_that_is_shut_in_cannot_blow_up_the_rest():
    # Cells 0 and 1 are shut in together, 2 and 3 meet air: only the first pair has nowhere to go.
    neighbour = np.full((4, 6), pressure.CLOSED, np.int32)
    neighbour[0, 1], neighbour[1, 0], neighbour[2, 1], neighbour[3, 0] = 1, 0, 3, 2
    neighbour[3, 5] = pressure.AIR
    opened = np.where(neighbour == pressure.CLOSED, 0.0, 0.25)
    diagonal, source, excess = (
        opened.sum(1),
        np.array([0.2, 0.1, 0.3, -0.1]),
        np.array([-0.25, -0.25, 0.1, -0.2]),
    )

    def solve(right: np.ndarray) -> np.ndarray:
        p, *scratch = (np.zeros(4) for _ in range(4))
        pressure.conjugate_gradient(4, opened, neighbour, diagonal, right, p, *scratch, 12, 1e-6)
        return p

    assert np.abs(solve(excess.copy())).max() > 1e3, "the negative control: no solution exists"
    pressure.settle_pockets(4, neighbour, source, excess, np.zeros(4, np.int32))
    np.testing.assert_allclose(source, [0.05, -0.05, 0.3, -0.1])
    np.testing.assert_allclose(excess, [0, 0, 0.1, -0.2], atol=1e-12)
    p = solve(source)
    assert p[0] - p[1] == pytest.approx(0.05 / 0.25)
    assert p[3] == pytest.approx(0.2 / 0.25)


def test_the_wrench_balances_the_momentum_of_the_liquid():
    """Accelerate a tray sideways: force on it = gravity less the change of momentum."""
    flip, _ = tray()
    row, total, before = None, np.zeros(3), np.zeros(3)
    steps = 60
    for step in range(steps):
        place = [0.5 * 2.0 * (step * DT) ** 2 if step < 20 else 0.5 * 2.0 * (20 * DT) ** 2, 0, FLOOR]
        row = solid(Shape.TRAY, place, np.eye(3), [0.08, 0.1, 0.07, 0.008], row, DT)
        flip.step(DT, row[None])
        total += flip.impulse_S6[:, :3].sum(0)
        if step == 9:
            total[:], before = 0, flip.mass * flip.v_N3.sum(0, dtype=np.float64)
    change = flip.mass * flip.v_N3.sum(0, dtype=np.float64) - before
    gravity = np.array([0, 0, -9.81 * flip.mass * len(flip.x_N3) * (steps - 10) * DT])
    weight = abs(gravity[2])
    assert np.abs(change - gravity + total).max() < 0.06 * weight


def test_viscosity_calms():
    speeds = []
    for viscosity in (1e-6, 5e-3):
        flip, solids = tray(dataclasses.replace(TRAY, viscosity=viscosity))
        flip.v_N3[:, 0] = 0.3
        for _ in range(40):
            flip.step(DT, solids)
        speeds.append(np.abs(flip.v_N3).mean())
    assert speeds[1] < 0.75 * speeds[0]


DIGEST = """
import hashlib, numpy as np
from vidworld.lab.flip import Flip, FlipConfig, lattice
from vidworld.lab.flip_solids import Shape, solid
x = lattice([-.05, -.05, .01], [.05, .02, .06], .01, np.random.default_rng(0))
flip = Flip([-.1, -.1, 0], [.1, .1, .15], x, FlipConfig(cell=.01))
row = solid(Shape.TRAY, [0, 0, .01], np.eye(3), [.06, .06, .07, .008])
for _ in range(20):
    flip.step(.008, row[None])
print(hashlib.sha256(flip.x_N3.tobytes() + flip.v_N3.tobytes()).hexdigest())
"""


def test_deterministic_across_processes():
    first, second = (
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second
    assert len(first.strip()) == hashlib.sha256().digest_size * 2


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="cell"):
        FlipConfig(cell=-1)
    with pytest.raises(ConfigError, match="particles"):
        Flip([0, 0, 0], [1, 1, 1], np.zeros((0, 3)))
    with pytest.raises(ConfigError, match="domain"):
        Flip([0, 0, 0], [0.001, 1, 1], np.zeros((1, 3)))
    with pytest.raises(ValueError, match="positive lengths"):
        solid(Shape.BOX, [0, 0, 0], np.eye(3), [0.1, 0, 0.1])
