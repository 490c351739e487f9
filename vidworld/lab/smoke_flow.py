"""Smoke: buoyant air on a staggered grid, stirred by moving capsules.

Incompressible Euler equations by operator splitting (Fedkiw, Stam, Jensen, Visual Simulation of Smoke, 2001:
buoyancy eq. 8, vorticity confinement eq. 11), MacCormack advection of the smoke (Selle et al., An
Unconditionally Stable MacCormack Method, 2008), and the projection of `smoke_pressure`. Velocities are m/s on
cell faces, density is dimensionless (the renderer's extinction is per unit of it), temperature is 1 at the
source and 0 outside.
"""

from dataclasses import dataclass

import numpy as np

from vidworld.errors import ConfigError, require
from vidworld.lab.smoke_pressure import Capsules, F, Pressure, ProjectionError

require("numba", "lab")

from numba import njit  # noqa: E402

MAX_DIVERGENCE = 1e-5
"""Bound of |divergence| x time step after projection: the share of a cell's volume made or lost in a step."""


@dataclass(frozen=True)
class FlowConfig:
    """The grid and the constants of the air; SI units."""

    shape: tuple[int, int, int] = (36, 36, 44)
    """Cells along x, y, z."""
    cell: float = 0.0165
    origin: tuple[float, float, float] = (0.2, -0.297, 0.0)
    """World position of the low corner; the floor is at its z."""
    wind_coupling: float = 0.5
    """Rate at which the air takes the wind's velocity, 1/s."""
    confinement: float = 4.0
    """Vorticity confinement, 1/s."""
    cooling: float = 0.5
    """Decay of temperature, 1/s."""
    decay: float = 0.12
    """Decay of density (dispersal below the grid), 1/s."""
    sponge: int = 4
    """Cells before an open boundary in which smoke fades away."""

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ConfigError("smoke grid", got=self.shape, expected="at least 8 cells along each axis")
        if not self.cell > 0:
            raise ConfigError("smoke cell size in metres", got=self.cell, expected="a positive number")


@dataclass(frozen=True)
class Source:
    """A ball that emits warm smoke."""

    position_3: np.ndarray
    radius: float
    rate: float
    """Density added a second at the centre; it falls to 0 at the rim."""
    velocity_3: np.ndarray
    """Velocity of the gas that leaves it, m/s."""
    temperature: float = 1.0


@njit(cache=True, nogil=True, inline="always")
def sample(f, x, y, z):
    """Trilinear value of `f` at fractional indices, clamped to its box."""
    x = min(max(x, F(0)), F(f.shape[0] - 1.001))
    y = min(max(y, F(0)), F(f.shape[1] - 1.001))
    z = min(max(z, F(0)), F(f.shape[2] - 1.001))
    i, j, k = np.uint32(x), np.uint32(y), np.uint32(z)
    a, b, c = x - F(i), y - F(j), z - F(k)
    i1, j1, k1 = i + np.uint32(1), j + np.uint32(1), k + np.uint32(1)
    c00 = f[i, j, k] + c * (f[i, j, k1] - f[i, j, k])
    c01 = f[i, j1, k] + c * (f[i, j1, k1] - f[i, j1, k])
    c10 = f[i1, j, k] + c * (f[i1, j, k1] - f[i1, j, k])
    c11 = f[i1, j1, k] + c * (f[i1, j1, k1] - f[i1, j1, k])
    d0, d1 = c00 + b * (c01 - c00), c10 + b * (c11 - c10)
    return d0 + a * (d1 - d0)


@njit(cache=True, nogil=True)
def bounds(f, threshold):
    """Index box [low, high) x 3 of the cells above a threshold; high <= low when there is none."""
    nx, ny, nz = f.shape
    box = np.array((nx, ny, nz, 0, 0, 0))
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                if f[i, j, k] > threshold:
                    box[0], box[3] = min(box[0], i), max(box[3], i + 1)
                    box[1], box[4] = min(box[1], j), max(box[4], j + 1)
                    box[2], box[5] = min(box[2], k), max(box[5], k + 1)
    return box


@njit(cache=True, nogil=True)
def trace(u, v, w, scale, box, dx, dy, dz):
    """Displacement in cells over a step for cell centres in the box, midpoint rule; returns the largest."""
    half = F(0.5)
    largest = F(0)
    for i in range(box[0], box[3]):
        for j in range(box[1], box[4]):
            for k in range(box[2], box[5]):
                x, y, z = F(i), F(j), F(k)
                a = half * (u[i, j, k] + u[i + 1, j, k])
                b = half * (v[i, j, k] + v[i, j + 1, k])
                c = half * (w[i, j, k] + w[i, j, k + 1])
                if a * a + b * b + c * c > F(1e-4):
                    x, y, z = x - half * scale * a, y - half * scale * b, z - half * scale * c
                    a = sample(u, x + half, y, z)
                    b = sample(v, x, y + half, z)
                    c = sample(w, x, y, z + half)
                dx[i, j, k], dy[i, j, k], dz[i, j, k] = scale * a, scale * b, scale * c
                largest = max(largest, max(abs(dx[i, j, k]), max(abs(dy[i, j, k]), abs(dz[i, j, k]))))
    return largest


@njit(cache=True, nogil=True)
def advect_cells(q, dx, dy, dz, sign, box, out):
    """Semi-Lagrangian step of a cell field in the box, zero where the path comes from outside the domain."""
    nx, ny, nz = q.shape
    edge = F(-0.5)
    for i in range(box[0], box[3]):
        for j in range(box[1], box[4]):
            for k in range(box[2], box[5]):
                x, y, z = F(i) - sign * dx[i, j, k], F(j) - sign * dy[i, j, k], F(k) - sign * dz[i, j, k]
                if x < edge or y < edge or x > nx + edge or y > ny + edge or z > nz + edge:
                    out[i, j, k] = F(0)
                else:
                    out[i, j, k] = sample(q, x, y, z)


@njit(cache=True, nogil=True)
def correct(q, forward, back, dx, dy, dz, box, out):
    """MacCormack correction, clamped to the eight values that the forward step mixed."""
    nx, ny, nz = q.shape
    for i in range(box[0], box[3]):
        for j in range(box[1], box[4]):
            for k in range(box[2], box[5]):
                if forward[i, j, k] == F(0):
                    out[i, j, k] = F(0)
                    continue
                a = np.uint32(min(max(F(i) - dx[i, j, k], F(0)), F(nx - 1.001)))
                b = np.uint32(min(max(F(j) - dy[i, j, k], F(0)), F(ny - 1.001)))
                c = np.uint32(min(max(F(k) - dz[i, j, k], F(0)), F(nz - 1.001)))
                low = high = q[a, b, c]
                for corner in range(1, 8):
                    value = q[
                        a + np.uint32(corner & 1), b + np.uint32(corner >> 1 & 1), c + np.uint32(corner >> 2)
                    ]
                    low, high = min(low, value), max(high, value)
                value = forward[i, j, k] + F(0.5) * (q[i, j, k] - back[i, j, k])
                out[i, j, k] = min(max(value, low), high)


@njit(cache=True, nogil=True)
def advect_faces(u, v, w, scale, u_out, v_out, w_out):
    """Semi-Lagrangian step of the face velocities; air from outside has the velocity at the boundary."""
    nx, ny, nz = u.shape[0] - 1, v.shape[1] - 1, w.shape[2] - 1
    q = F(0.25)
    for i in range(nx + 1):
        m, n = max(i - 1, 0), min(i, nx - 1)
        for j in range(ny):
            for k in range(nz):
                b = q * (v[m, j, k] + v[m, j + 1, k] + v[n, j, k] + v[n, j + 1, k])
                c = q * (w[m, j, k] + w[m, j, k + 1] + w[n, j, k] + w[n, j, k + 1])
                u_out[i, j, k] = sample(u, F(i) - scale * u[i, j, k], F(j) - scale * b, F(k) - scale * c)
    for i in range(nx):
        for j in range(ny + 1):
            m, n = max(j - 1, 0), min(j, ny - 1)
            for k in range(nz):
                a = q * (u[i, m, k] + u[i + 1, m, k] + u[i, n, k] + u[i + 1, n, k])
                c = q * (w[i, m, k] + w[i, m, k + 1] + w[i, n, k] + w[i, n, k + 1])
                v_out[i, j, k] = sample(v, F(i) - scale * a, F(j) - scale * v[i, j, k], F(k) - scale * c)
    for i in range(nx):
        for j in range(ny):
            for k in range(nz + 1):
                m, n = max(k - 1, 0), min(k, nz - 1)
                a = q * (u[i, j, m] + u[i + 1, j, m] + u[i, j, n] + u[i + 1, j, n])
                b = q * (v[i, j, m] + v[i, j + 1, m] + v[i, j, n] + v[i, j + 1, n])
                w_out[i, j, k] = sample(w, F(i) - scale * a, F(j) - scale * b, F(k) - scale * w[i, j, k])


@njit(cache=True, nogil=True)
def push(temperature, lift, u, v, w, wind_x, wind_y, coupling):
    """Buoyancy (`lift` m/s a unit of temperature) on w, and relaxation of u and v to the wind."""
    nx, ny, nz = temperature.shape
    for i in range(nx):
        for j in range(ny):
            for k in range(1, nz):
                w[i, j, k] += lift * F(0.5) * (temperature[i, j, k] + temperature[i, j, k - 1])
    u += coupling * (wind_x - u)
    v += coupling * (wind_y - v)


@njit(cache=True, nogil=True)
def confine(u, v, w, strength, cx, cy, cz, size):
    """Vorticity confinement: push towards where the curl is larger, across it (`strength` has no unit)."""
    nx, ny, nz = size.shape
    q, half = F(0.25), F(0.5)
    for i in range(1, nx - 1):
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                w_y = w[i, j + 1, k] + w[i, j + 1, k + 1] - w[i, j - 1, k] - w[i, j - 1, k + 1]
                v_z = v[i, j, k + 1] + v[i, j + 1, k + 1] - v[i, j, k - 1] - v[i, j + 1, k - 1]
                u_z = u[i, j, k + 1] + u[i + 1, j, k + 1] - u[i, j, k - 1] - u[i + 1, j, k - 1]
                w_x = w[i + 1, j, k] + w[i + 1, j, k + 1] - w[i - 1, j, k] - w[i - 1, j, k + 1]
                v_x = v[i + 1, j, k] + v[i + 1, j + 1, k] - v[i - 1, j, k] - v[i - 1, j + 1, k]
                u_y = u[i, j + 1, k] + u[i + 1, j + 1, k] - u[i, j - 1, k] - u[i + 1, j - 1, k]
                a, b, c = q * (w_y - v_z), q * (u_z - w_x), q * (v_x - u_y)
                cx[i, j, k], cy[i, j, k], cz[i, j, k] = a, b, c
                size[i, j, k] = np.sqrt(a * a + b * b + c * c)
    for i in range(1, nx - 1):
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                gx = size[i + 1, j, k] - size[i - 1, j, k]
                gy = size[i, j + 1, k] - size[i, j - 1, k]
                gz = size[i, j, k + 1] - size[i, j, k - 1]
                scale = strength / (np.sqrt(gx * gx + gy * gy + gz * gz) + F(1e-4))
                fx = half * scale * (gy * cz[i, j, k] - gz * cy[i, j, k])
                fy = half * scale * (gz * cx[i, j, k] - gx * cz[i, j, k])
                fz = half * scale * (gx * cy[i, j, k] - gy * cx[i, j, k])
                u[i, j, k] += fx
                u[i + 1, j, k] += fx
                v[i, j, k] += fy
                v[i, j + 1, k] += fy
                w[i, j, k] += fz
                w[i, j, k + 1] += fz


@njit(cache=True, nogil=True)
def emit(density, temperature, u, v, w, centre, radius, amount, heat, velocity, cell, origin, noise):
    """Add smoke, heat and momentum in a ball; `noise` [8, 8, 8] multiplies the smoke; returns the gain."""
    nx, ny, nz = density.shape
    reach = int(radius / cell) + 2
    middle = ((centre - origin) / cell).astype(np.int64)
    added = 0.0
    for i in range(max(0, middle[0] - reach), min(nx, middle[0] + reach + 1)):
        for j in range(max(0, middle[1] - reach), min(ny, middle[1] + reach + 1)):
            for k in range(max(0, middle[2] - reach), min(nz, middle[2] + reach + 1)):
                x = origin[0] + (F(i) + F(0.5)) * cell - centre[0]
                y = origin[1] + (F(j) + F(0.5)) * cell - centre[1]
                z = origin[2] + (F(k) + F(0.5)) * cell - centre[2]
                share = F(1) - (x * x + y * y + z * z) / (radius * radius)
                if share > 0:
                    gain = amount * share * noise[i % 8, j % 8, k % 8]
                    density[i, j, k] += gain
                    added += gain
                    temperature[i, j, k] = max(temperature[i, j, k], heat * share)
                    blend = F(0.6) * share
                    u[i, j, k] += blend * (velocity[0] - u[i, j, k])
                    v[i, j, k] += blend * (velocity[1] - v[i, j, k])
                    w[i, j, k] += blend * (velocity[2] - w[i, j, k])
    return added


@njit(cache=True, nogil=True)
def settle(density, temperature, fluid, fade, keep, cool):
    """Decay, fade near open walls, remove smoke inside solids and the last traces; returns the sum left."""
    nx, ny, nz = density.shape
    total = 0.0
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                value = density[i, j, k] * fade[i, j, k] * keep * fluid[i + 1, j + 1, k + 1]
                value = value if value > F(1e-4) else F(0)
                density[i, j, k] = value
                temperature[i, j, k] *= cool * fluid[i + 1, j + 1, k + 1]
                total += value
    return total


class SmokeFlow:
    """One volume of air and smoke; `step` advances it. Deterministic: equal calls give equal bits."""

    def __init__(self, config: FlowConfig = FlowConfig(), seed: int = 0) -> None:
        self.config = config
        nx, ny, nz = shape = config.shape
        self.origin_3 = np.asarray(config.origin, F)
        self.pressure = Pressure(shape)
        self.density, self.temperature = np.zeros(shape, F), np.zeros(shape, F)
        self.u, self.v, self.w = (
            np.zeros(s, F) for s in ((nx + 1, ny, nz), (nx, ny + 1, nz), (nx, ny, nz + 1))
        )
        self._faces = [np.zeros_like(field) for field in (self.u, self.v, self.w)]
        self._cells = [np.zeros(shape, F) for _ in range(6)]
        self._rng = np.random.default_rng(seed)
        self.emitted = 0.0
        """Mass that sources have added so far, in density x m^3."""
        fades = [np.minimum((np.arange(n) + 1) / (config.sponge + 1), 1) for n in shape]
        sides = [np.minimum(fade, fade[::-1]) for fade in fades[:2]]
        top = fades[2][::-1]
        distance = sides[0][:, None, None] * sides[1][None, :, None] * top[None, None, :]
        self._fade = (1 - 0.35 * (1 - distance)).astype(F)

    @property
    def mass(self) -> float:
        """Integral of density, in density x m^3."""
        return float(self.density.sum(dtype=np.float64)) * self.config.cell**3

    @property
    def centroid_3(self) -> np.ndarray:
        """Centre of mass in metres, world frame; the middle of the grid's floor when there is no smoke."""
        cell, total = self.config.cell, float(self.density.sum(dtype=np.float64))
        if total <= 0:
            middle = np.array([self.config.shape[0] / 2, self.config.shape[1] / 2, 0.0])
            return np.asarray(self.config.origin) + cell * middle
        sums = [self.density.sum(axis=axes, dtype=np.float64) for axes in ((1, 2), (0, 2), (0, 1))]
        index = [float(line @ (np.arange(len(line)) + 0.5)) / total for line in sums]
        return np.asarray(self.config.origin) + cell * np.asarray(index)

    def divergence(self, dt: float) -> float:
        """Largest |divergence| x dt over the fluid cells (dimensionless)."""
        flux = np.diff(self.u, axis=0) + np.diff(self.v, axis=1) + np.diff(self.w, axis=2)
        return float(np.abs(flux * self.pressure.fluid[1:-1, 1:-1, 1:-1]).max()) * dt / self.config.cell

    def step(
        self,
        dt: float,
        *,
        buoyancy: float = 0.0,
        wind_2: tuple[float, float] = (0.0, 0.0),
        source: Source | None = None,
        solids: Capsules | None = None,
    ) -> None:
        """Advance by dt seconds: carry the velocity, add sources and forces, project, carry the smoke.

        So the velocity left behind is free of divergence.
        `buoyancy` is the upward acceleration of gas at temperature 1, m/s^2; `wind_2` along x and y, m/s.
        Raises ProjectionError when velocities are not finite or the pressure cannot be found.
        """
        if not all(np.isfinite(field.sum()) for field in (self.u, self.v, self.w)):
            raise ProjectionError("smoke velocities are not finite")
        config, scale = self.config, F(dt / self.config.cell)
        advect_faces(self.u, self.v, self.w, scale, *self._faces)
        (self.u, self.v, self.w), self._faces = self._faces, [self.u, self.v, self.w]
        grid = (F(config.cell), self.origin_3)
        if source is not None:
            noise = (1 + 0.5 * self._rng.uniform(-1, 1, (8, 8, 8))).astype(F)
            place, velocity = np.asarray(source.position_3, F), np.asarray(source.velocity_3, F)
            amounts = (place, F(source.radius), F(source.rate * dt), F(source.temperature), velocity)
            fields = (self.density, self.temperature, self.u, self.v, self.w)
            self.emitted += float(emit(*fields, *amounts, *grid, noise)) * config.cell**3
        wind = (F(wind_2[0]), F(wind_2[1]), F(min(config.wind_coupling * dt, 1.0)))
        push(self.temperature, F(buoyancy * dt), self.u, self.v, self.w, *wind)
        if config.confinement:
            confine(self.u, self.v, self.w, F(config.confinement * dt), *self._cells[:4])
        self.pressure.set_solids(solids, config.cell, self.origin_3)
        self.pressure.project(self.u, self.v, self.w, 0.7 * MAX_DIVERGENCE * config.cell / dt)
        self._advect(scale)
        keep, cool = F(np.exp(-config.decay * dt)), F(np.exp(-config.cooling * dt))
        settle(self.density, self.temperature, self.pressure.fluid, self._fade, keep, cool)

    def _advect(self, scale: np.float32) -> None:
        dx, dy, dz, forward, back, out = self._cells
        before = float(self.density.sum(dtype=np.float64))
        box = bounds(np.maximum(self.density, self.temperature), F(1e-4))
        if box[3] > box[0]:
            speed = max(float(np.abs(field).max()) for field in (self.u, self.v, self.w))
            reach = int(np.ceil(speed * float(scale))) + 2
            box = np.concatenate(
                [np.maximum(box[:3] - reach, 0), np.minimum(box[3:] + reach, self.config.shape)]
            )
            trace(self.u, self.v, self.w, scale, box, dx, dy, dz)
            for field in (forward, back, out):
                field[:] = 0
            advect_cells(self.density, dx, dy, dz, F(1), box, forward)
            advect_cells(forward, dx, dy, dz, F(-1), box, back)
            correct(self.density, forward, back, dx, dy, dz, box, out)
            # Advection by interpolation conserves mass only on average; what it would add is taken back.
            after = float(out.sum(dtype=np.float64))
            if after > before:
                out *= F(before / after)
            self.density, self._cells[5] = out, self.density
            forward[:] = 0
            advect_cells(self.temperature, dx, dy, dz, F(1), box, forward)
            self.temperature, self._cells[3] = forward, self.temperature
