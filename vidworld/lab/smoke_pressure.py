"""Keep a smoke velocity field free of divergence, also beside solids that move through it.

Staggered (MAC) grid of nx x ny x nz cubic cells: u[i] lies between cells i-1 and i along x. Sides and
top are open (pressure 0 one cell outside), the floor is closed. Without solids the Poisson matrix is a sum
of three one-dimensional ones, so it is inverted by their eigenvectors (six matrix products). With solids the
same inverse preconditions conjugate gradients on the fluid cells (fictitious domain): the count of iterations
hardly grows with the grid. Chorin 1968, projection method; Bridson, Fluid Simulation for Computer Graphics,
2015, chapter 5. Everything is float32 with sums in a fixed order, so that a repeat gives the same bits.
"""

from dataclasses import dataclass

import numpy as np

from vidworld.errors import VidworldError, require

require("numba", "lab")

from numba import njit  # noqa: E402

F = np.float32


class ProjectionError(VidworldError):
    """The pressure solve did not reach its tolerance: a velocity is not finite or absurdly large."""


@dataclass(frozen=True)
class Capsules:
    """Moving solids: segments thickened by a radius; N capsules, metres and m/s in the world frame."""

    ends_N23: np.ndarray
    radius_N: np.ndarray
    velocity_N23: np.ndarray
    """Velocity of either end; linear in between."""


@njit(cache=True, nogil=True)
def rasterise(ends, radius, velocity, cell, origin, fluid, solid_velocity):
    """Mark cells whose centre is inside a capsule: 0 in padded `fluid`, velocity in [nx, ny, nz, 3]."""
    nx, ny, nz = fluid.shape[0] - 2, fluid.shape[1] - 2, fluid.shape[2] - 2
    fluid[:, :, :] = F(1)
    fluid[:, :, 0] = F(0)
    solid_velocity[:] = F(0)
    count = np.array((nx, ny, nz))
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for n in range(radius.shape[0]):
        # A capsule thinner than a cell could slip between centres and let smoke through.
        r = max(radius[n], F(0.87) * cell)
        length_squared = F(1e-12)
        for a in range(3):
            p, q = ends[n, 0, a], ends[n, 1, a]
            length_squared += (q - p) * (q - p)
            low[a] = max(0, int(np.floor((min(p, q) - r - origin[a]) / cell)))
            high[a] = min(count[a], int(np.floor((max(p, q) + r - origin[a]) / cell)) + 1)
        for i in range(low[0], high[0]):
            x = origin[0] + (F(i) + F(0.5)) * cell - ends[n, 0, 0]
            for j in range(low[1], high[1]):
                y = origin[1] + (F(j) + F(0.5)) * cell - ends[n, 0, 1]
                for k in range(low[2], high[2]):
                    z = origin[2] + (F(k) + F(0.5)) * cell - ends[n, 0, 2]
                    bx = ends[n, 1, 0] - ends[n, 0, 0]
                    by = ends[n, 1, 1] - ends[n, 0, 1]
                    bz = ends[n, 1, 2] - ends[n, 0, 2]
                    s = min(max((x * bx + y * by + z * bz) / length_squared, F(0)), F(1))
                    dx, dy, dz = x - s * bx, y - s * by, z - s * bz
                    if dx * dx + dy * dy + dz * dz < r * r:
                        fluid[i + 1, j + 1, k + 1] = F(0)
                        for a in range(3):
                            solid_velocity[i, j, k, a] = (F(1) - s) * velocity[n, 0, a] + s * velocity[
                                n, 1, a
                            ]


@njit(cache=True, nogil=True)
def fill_pockets(fluid, reached):
    """Turn fluid cells without a way to the open boundary into solid: their pressure would be undetermined.

    Sweeps back and forth until nothing changes; two or three sweeps do for an arm.
    """
    nx, ny, nz = fluid.shape
    reached[:, :, :] = np.uint8(0)
    reached[0, :, 1:] = reached[nx - 1, :, 1:] = np.uint8(1)
    reached[:, 0, 1:] = reached[:, ny - 1, 1:] = np.uint8(1)
    reached[:, :, nz - 1] = np.uint8(1)
    changed, forward = True, True
    while changed:
        changed = False
        for a in range(1, nx - 1):
            i = a if forward else nx - 1 - a
            for b in range(1, ny - 1):
                j = b if forward else ny - 1 - b
                for c in range(1, nz - 1):
                    k = c if forward else nz - 1 - c
                    if reached[i, j, k] == 0 and fluid[i, j, k] > 0:
                        near = reached[i - 1, j, k] + reached[i + 1, j, k] + reached[i, j - 1, k]
                        near += reached[i, j + 1, k] + reached[i, j, k - 1] + reached[i, j, k + 1]
                        if near > 0:
                            reached[i, j, k] = np.uint8(1)
                            changed = True
        forward = not forward
    for i in range(1, nx - 1):
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                fluid[i, j, k] = F(reached[i, j, k])


@njit(cache=True, nogil=True)
def impose_solids(fluid, solid_velocity, u, v, w):
    """Give faces that touch a solid cell that solid's velocity (mean of two); the floor stands still."""
    nx, ny, nz = fluid.shape[0] - 2, fluid.shape[1] - 2, fluid.shape[2] - 2
    for i in range(nx):
        for j in range(ny):
            w[i, j, 0] = F(0)
            for k in range(nz):
                if fluid[i + 1, j + 1, k + 1] > 0:
                    continue
                u[i, j, k] = solid_velocity[i, j, k, 0]
                u[i + 1, j, k] = solid_velocity[i, j, k, 0]
                v[i, j, k] = solid_velocity[i, j, k, 1]
                v[i, j + 1, k] = solid_velocity[i, j, k, 1]
                if k > 0:
                    w[i, j, k] = solid_velocity[i, j, k, 2]
                w[i, j, k + 1] = solid_velocity[i, j, k, 2]


@njit(cache=True, nogil=True)
def outflow(u, v, w, fluid, out):
    """Minus the divergence times the cell size in every fluid cell, m/s; returns the largest magnitude."""
    nx, ny, nz = out.shape
    largest = F(0)
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                flux = u[i + 1, j, k] - u[i, j, k] + v[i, j + 1, k] - v[i, j, k] + w[i, j, k + 1] - w[i, j, k]
                out[i, j, k] = -flux * fluid[i + 1, j + 1, k + 1]
                # Written so that a value that is not a number is kept, too.
                if not abs(out[i, j, k]) <= largest:
                    largest = abs(out[i, j, k])
                    if not largest < F(np.inf):
                        return F(np.inf)
    return largest


@njit(cache=True, nogil=True)
def subtract_gradient(p, fluid, u, v, w):
    """Subtract the gradient of padded `p` on all faces between two fluid (or open) cells."""
    nx, ny, nz = fluid.shape[0] - 2, fluid.shape[1] - 2, fluid.shape[2] - 2
    for i in range(nx + 1):
        for j in range(ny):
            for k in range(nz):
                a, b, c = i + 1, j + 1, k + 1
                u[i, j, k] -= fluid[a, b, c] * fluid[a - 1, b, c] * (p[a, b, c] - p[a - 1, b, c])
    for i in range(nx):
        for j in range(ny + 1):
            for k in range(nz):
                a, b, c = i + 1, j + 1, k + 1
                v[i, j, k] -= fluid[a, b, c] * fluid[a, b - 1, c] * (p[a, b, c] - p[a, b - 1, c])
    for i in range(nx):
        for j in range(ny):
            for k in range(nz + 1):
                a, b, c = i + 1, j + 1, k + 1
                w[i, j, k] -= fluid[a, b, c] * fluid[a, b, c - 1] * (p[a, b, c] - p[a, b, c - 1])


@njit(cache=True, nogil=True)
def apply_matrix(p, fluid, out):
    """out = A p (minus the Laplacian on fluid cells, solids as walls), p padded; returns p . A p."""
    nx, ny, nz = out.shape
    total = 0.0
    for i in range(1, nx + 1):
        for j in range(1, ny + 1):
            row = F(0)
            for k in range(1, nz + 1):
                x = p[i, j, k]
                value = fluid[i - 1, j, k] * (x - p[i - 1, j, k]) + fluid[i + 1, j, k] * (x - p[i + 1, j, k])
                value += fluid[i, j - 1, k] * (x - p[i, j - 1, k]) + fluid[i, j + 1, k] * (x - p[i, j + 1, k])
                value += fluid[i, j, k - 1] * (x - p[i, j, k - 1]) + fluid[i, j, k + 1] * (x - p[i, j, k + 1])
                value *= fluid[i, j, k]
                out[i - 1, j - 1, k - 1] = value
                row += x * value
            total += row
    return total


@njit(cache=True, nogil=True)
def descend(step, p, matrix_p, x, r):
    """x += step p, r -= step A p (p and x padded); returns the largest |r|."""
    nx, ny, nz = r.shape
    largest = F(0)
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                x[i + 1, j + 1, k + 1] += step * p[i + 1, j + 1, k + 1]
                r[i, j, k] -= step * matrix_p[i, j, k]
                largest = max(largest, abs(r[i, j, k]))
    return largest


@njit(cache=True, nogil=True)
def dot(a, b):
    """Sum of products, float64 across rows, always in the same order."""
    nx, ny, nz = a.shape
    total = 0.0
    for i in range(nx):
        for j in range(ny):
            row = F(0)
            for k in range(nz):
                row += a[i, j, k] * b[i, j, k]
            total += row
    return total


@njit(cache=True, nogil=True)
def turn(z, ratio, fluid, p):
    """p = z + ratio p on fluid cells, zero elsewhere (p padded)."""
    nx, ny, nz = z.shape
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                a, b, c = i + 1, j + 1, k + 1
                p[a, b, c] = fluid[a, b, c] * (z[i, j, k] + ratio * p[a, b, c])


class Pressure:
    """Projects velocities of one grid; holds the eigenvectors and the work arrays.

    `shape` counts cells along x, y, z.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        values, vectors = zip(
            *(_line_eigen(n, closed=axis == 2) for axis, n in enumerate(shape)), strict=True
        )
        self._vectors = [vector.astype(F) for vector in vectors]
        self._transposed = [np.ascontiguousarray(vector.T) for vector in self._vectors]
        total = values[0][:, None, None] + values[1][None, :, None] + values[2][None, None, :]
        self._inverse = (1 / total).astype(F)
        padded = tuple(n + 2 for n in shape)
        self.fluid = np.ones(padded, F)
        self.fluid[:, :, 0] = 0
        self.solid_velocity = np.zeros((*shape, 3), F)
        self._solution, self._direction = np.zeros(padded, F), np.zeros(padded, F)
        self._guess = np.zeros(padded, F)
        self._residual, self._product = np.zeros(shape, F), np.zeros(shape, F)
        self._reached = np.zeros(padded, np.uint8)
        self.iterations = 0
        """Poisson solves of the last projection."""

    def set_solids(self, capsules: Capsules | None, cell: float, origin_3: np.ndarray) -> None:
        """Rasterise the solids; cells cut off from the open boundary become solid."""
        if capsules is None:
            self.fluid[:, :, 1:] = 1
            self.solid_velocity[:] = 0
            return
        columns = (capsules.ends_N23, capsules.radius_N, capsules.velocity_N23)
        ends, radius, velocity = (np.ascontiguousarray(column, F) for column in columns)
        grid = (F(cell), np.asarray(origin_3, F))
        rasterise(ends, radius, velocity, *grid, self.fluid, self.solid_velocity)
        fill_pockets(self.fluid, self._reached)

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solve -Laplacian(p) = b on the box without solids, exactly up to rounding; [nx, ny, nz] each."""
        nx, ny, nz = self.shape
        (x, y, z), (xt, yt, zt) = self._vectors, self._transposed
        a = np.matmul(yt, (b.reshape(-1, nz) @ z).reshape(nx, ny, nz))
        a = (xt @ a.reshape(nx, -1)).reshape(nx, ny, nz)
        a *= self._inverse
        a = np.matmul(y, (x @ a.reshape(nx, -1)).reshape(nx, ny, nz))
        return (a.reshape(-1, nz) @ zt).reshape(nx, ny, nz)

    def project(self, u: np.ndarray, v: np.ndarray, w: np.ndarray, tolerance: float) -> float:
        """Make u, v, w free of divergence in place; returns the largest net flow left in a fluid cell, m/s.

        `tolerance` bounds that net flow (sum over six faces). Raises ProjectionError when it is not reached.
        """
        impose_solids(self.fluid, self.solid_velocity, u, v, w)
        self.iterations = 0
        # Most of the pressure is that of the step before.
        subtract_gradient(self._guess, self.fluid, u, v, w)
        # Each pass starts from the velocities themselves, so that the last one works on small numbers and
        # float32 rounding of a large pressure does not limit the divergence.
        for attempt in range(6):
            worst = outflow(u, v, w, self.fluid, self._residual)
            if worst <= tolerance or not np.isfinite(worst):
                break
            self._descend(0.002 * float(worst) if attempt == 0 else 0.8 * tolerance)
            subtract_gradient(self._solution, self.fluid, u, v, w)
            self._guess += self._solution
        worst = float(outflow(u, v, w, self.fluid, self._residual))
        if not worst <= tolerance:
            raise ProjectionError(
                f"smoke pressure left a net flow of {worst:.2e} m/s, wanted {tolerance:.2e}"
            )
        return worst

    def _descend(self, enough: float) -> None:
        """Preconditioned conjugate gradients from 0 until every |residual| <= enough (at most 40 steps)."""
        self._solution[:] = 0
        self._direction[:] = 0
        before = 1.0
        for step in range(40):
            z = self.solve(self._residual)
            self.iterations += 1
            now = dot(self._residual, z)
            if now <= 0:
                return
            turn(z, F(now / before if step else 0), self.fluid, self._direction)
            curvature = apply_matrix(self._direction, self.fluid, self._product)
            if curvature <= 0:
                return
            largest = descend(
                F(now / curvature), self._direction, self._product, self._solution, self._residual
            )
            before = now
            if largest <= enough:
                return


def _line_eigen(n: int, *, closed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of the negative 1-D Laplacian: open at both ends, or closed at the low one."""
    matrix = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    if closed:
        matrix[0, 0] = 1
    return np.linalg.eigh(matrix)
