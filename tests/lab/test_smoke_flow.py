import hashlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("numba", reason="the lab needs numba")

from vidworld.errors import ConfigError
from vidworld.lab.smoke_flow import MAX_DIVERGENCE, FlowConfig, SmokeFlow, Source
from vidworld.lab.smoke_pressure import Capsules, F, Pressure, ProjectionError

DT = 0.04
SMALL = FlowConfig(shape=(20, 20, 24), cell=0.03, origin=(0.2, -0.3, 0.0))


def pot(rate: float = 20.0, speed: float = 0.3) -> Source:
    return Source(np.array([0.5, 0.0, 0.1]), 0.07, rate, np.array([0.0, 0.0, speed]))


def rod(y: float, velocity_y: float = 0.0, radius: float = 0.05, z: float = 0.35) -> Capsules:
    ends = np.array([[[0.35, y, z], [0.65, y, z]]])
    velocity = np.zeros_like(ends)
    velocity[..., 1] = velocity_y
    return Capsules(ends, np.array([radius]), velocity)


def run(steps: int = 30, **settings) -> SmokeFlow:
    flow = SmokeFlow(SMALL)
    for _ in range(steps):
        flow.step(DT, **{"buoyancy": 2.0, "source": pot(), **settings})
    return flow


def dense_matrix(fluid: np.ndarray) -> np.ndarray:
    """Minus the Laplacian on fluid cells of a padded mask, walls where the mask is 0, pressure 0 outside."""
    nx, ny, nz = (n - 2 for n in fluid.shape)
    index = np.arange(nx * ny * nz).reshape(nx, ny, nz)
    matrix = np.zeros((index.size, index.size))
    for i, j, k in np.ndindex(nx, ny, nz):
        row = index[i, j, k]
        if not fluid[i + 1, j + 1, k + 1]:
            matrix[row, row] = 1
            continue
        for a, b, c in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            x, y, z = i + a, j + b, k + c
            if fluid[x + 1, y + 1, z + 1]:
                matrix[row, row] += 1
                if 0 <= x < nx and 0 <= y < ny and 0 <= z < nz:
                    matrix[row, index[x, y, z]] -= 1
    return matrix


def test_poisson_agrees_with_a_dense_solve():
    pressure, rng = Pressure((8, 9, 10)), np.random.default_rng(0)
    b = rng.normal(size=(8, 9, 10)).astype(F)
    expected = np.linalg.solve(dense_matrix(pressure.fluid), b.ravel().astype(float)).reshape(b.shape)
    np.testing.assert_allclose(pressure.solve(b), expected, atol=2e-5 * np.abs(expected).max())


def test_projection_beside_a_solid_agrees_with_a_dense_solve():
    pressure, rng = Pressure((8, 9, 10)), np.random.default_rng(1)
    pressure.set_solids(rod(0.0, radius=0.06, z=0.2), 0.06, np.array([0.3, -0.27, 0.0]))
    fluid = pressure.fluid[1:-1, 1:-1, 1:-1]
    assert 0 < (fluid == 0).sum() < fluid.size / 2
    u, v, w = (rng.normal(size=s).astype(F) for s in ((9, 9, 10), (8, 10, 10), (8, 9, 11)))
    free = [field.copy() for field in (u, v, w)]
    pressure.project(u, v, w, 1e-5)
    # With the solids' velocities on their faces, the dense pressure must give the same field.
    a, b, c = free
    for field, axis in ((a, 0), (b, 1), (c, 2)):
        low = np.take(pressure.fluid, range(pressure.fluid.shape[axis] - 1), axis)
        high = np.take(pressure.fluid, range(1, pressure.fluid.shape[axis]), axis)
        inner = tuple(slice(None) if n == axis else slice(1, -1) for n in range(3))
        field[:] *= (low * high)[inner]
    flux = np.diff(a, axis=0) + np.diff(b, axis=1) + np.diff(c, axis=2)
    p = np.linalg.solve(dense_matrix(pressure.fluid), -(flux * fluid).ravel().astype(float)).reshape(
        fluid.shape
    )
    padded = np.pad(p, 1)
    gradient = np.diff(padded, axis=0)[:, 1:-1, 1:-1]
    open_faces = (pressure.fluid[1:] * pressure.fluid[:-1])[:, 1:-1, 1:-1]
    np.testing.assert_allclose(u, a - gradient * open_faces, atol=1e-4)
    assert np.abs(u - a).max() > 0.1


def test_divergence_is_small_beside_moving_solids():
    flow = SmokeFlow(SMALL)
    for step in range(25):
        y = 0.2 * np.sin(0.2 * step)
        flow.step(DT, buoyancy=2.5, wind_2=(0.2, 0.1), source=pot(), solids=rod(y, np.cos(0.2 * step), z=0.2))
        assert flow.divergence(DT) <= MAX_DIVERGENCE
    assert max(np.abs(flow.v).max(), np.abs(flow.w).max()) > 0.3
    flow.v[10, 10, 12] += 0.1
    assert flow.divergence(DT) > 1e3 * MAX_DIVERGENCE


def test_fluid_faces_have_the_solid_s_velocity():
    flow = run(solids=rod(0.0, 0.4))
    inside = flow.pressure.fluid[1:-1, 1:-1, 1:-1] == 0
    assert inside.sum() > 20
    np.testing.assert_allclose(flow.v[:, :-1][inside], 0.4, rtol=1e-6)
    np.testing.assert_allclose(flow.v[:, 1:][inside], 0.4, rtol=1e-6)
    assert np.all(flow.w[:, :, 0] == 0)


def test_mass_grows_only_by_the_source():
    flow = SmokeFlow(SMALL)
    for step in range(60):
        before, emitted = flow.mass, flow.emitted
        flow.step(
            DT, buoyancy=3.0, wind_2=(0.3, 0), source=pot() if step < 15 else None, solids=rod(0.0, 0.3)
        )
        assert flow.mass <= before + (flow.emitted - emitted) + 1e-9
        assert flow.density.min() >= 0
    assert 0 < flow.mass < flow.emitted


def test_mirrored_causes_have_mirrored_effects():
    flow = SmokeFlow(SMALL)
    mirror = SmokeFlow(SMALL)
    # Emission is noisy on purpose; an even volume of smoke is put in by hand instead.
    for field in (flow, mirror):
        field.density[8:12, 8:12, 3:6] = field.temperature[8:12, 8:12, 3:6] = 1
    for _ in range(15):
        flow.step(DT, buoyancy=2.0, wind_2=(0.0, 0.2), solids=rod(0.09, -0.2, z=0.2))
        mirror.step(DT, buoyancy=2.0, wind_2=(0.0, -0.2), solids=rod(-0.09, 0.2, z=0.2))
    np.testing.assert_allclose(flow.density, mirror.density[:, ::-1], atol=5e-3)
    assert np.abs(flow.density - mirror.density).max() > 0.2


def test_a_lid_keeps_smoke_down():
    ends = np.array([[[0.3, y, 0.32], [0.7, y, 0.32]] for y in np.linspace(-0.16, 0.16, 9)])
    lid = Capsules(ends, np.full(9, 0.03), np.zeros_like(ends))
    above = [flow.density[:, :, 13:].sum() for flow in (run(40), run(40, solids=lid))]
    assert above[0] > 5
    assert above[1] < 0.2 * above[0]


def test_nothing_moves_without_a_cause():
    flow = SmokeFlow(SMALL)
    for _ in range(10):
        flow.step(DT, source=pot(speed=0.0))
    assert flow.mass > 0
    assert not any(np.any(field) for field in (flow.u, flow.v, flow.w))
    assert abs(flow.centroid_3[2] - 0.1) < 0.02


def test_buoyancy_lifts_and_wind_carries():
    still, windy = run(30), run(30, wind_2=(0.0, 0.4))
    assert still.centroid_3[2] > 0.2
    assert windy.centroid_3[1] > still.centroid_3[1] + 0.03
    assert abs(windy.centroid_3[0] - still.centroid_3[0]) < 0.02


def test_a_pocket_between_solids_and_floor_becomes_solid():
    pressure = Pressure((12, 12, 12))
    ring = [[np.cos(a), np.sin(a)] for a in np.linspace(0, 2 * np.pi, 25)]
    ends = np.array([[[3 * x + 6, 3 * y + 6, 0], [6, 6, 5]] for x, y in ring])
    pressure.set_solids(Capsules(ends, np.full(25, 0.9), np.zeros_like(ends)), 1.0, np.zeros(3))
    assert pressure.fluid[6:8, 6:8, 1].sum() == 0
    assert pressure.fluid[1:-1, 1:-1, 1:-1].sum() > 1000
    u, v, w = (
        np.random.default_rng(0).normal(size=s).astype(F) for s in ((13, 12, 12), (12, 13, 12), (12, 12, 13))
    )
    assert pressure.project(u, v, w, 1e-5) <= 1e-5


def test_velocities_that_are_not_finite_are_an_error():
    flow = SmokeFlow(SMALL)
    flow.w[5, 5, 5] = np.nan
    with pytest.raises(ProjectionError):
        flow.step(DT)


@pytest.mark.parametrize("settings", [{"shape": (4, 20, 20)}, {"cell": 0.0}])
def test_impossible_grids_are_refused(settings):
    with pytest.raises(ConfigError):
        FlowConfig(**settings)


def fingerprint() -> str:
    flow = run(12, wind_2=(0.1, 0.2), solids=rod(0.05, 0.3))
    return hashlib.sha256(b"".join(field.tobytes() for field in (flow.density, flow.u, flow.w))).hexdigest()


def test_same_bits_in_another_process():
    code = (
        f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r}); import test_smoke_flow as t; "
    )
    other = subprocess.run(
        [sys.executable, "-c", code + "print(t.fingerprint())"], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == fingerprint()
