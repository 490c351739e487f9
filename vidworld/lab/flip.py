"""A small liquid solver: FLIP particles on a staggered grid among moving analytic solids.

Method: Zhu and Bridson, Animating Sand as a Fluid (2005) with the variational pressure solve of Batty et al.
(2007) and a density projection (Kugelstadt et al. 2019) that holds the volume of shaken and poured liquid. It
needs Numba, not MuJoCo, and is deterministic bit for bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vidworld.errors import ConfigError, require

require("numba", "lab")

from vidworld.lab import flip_pressure as pressure  # noqa: E402
from vidworld.lab import flip_transfer as transfer  # noqa: E402
from vidworld.lab.flip_solids import WIDTH, collide, distances  # noqa: E402

PER_AXIS = 2
PER_CELL = PER_AXIS**3
THICKNESS = 1.6
"""Cells that walls count as thick at least: a cell half in a thinner one sees the air behind it."""


@dataclass(frozen=True)
class FlipConfig:
    """Numbers of the liquid and of the solver; SI units."""

    cell: float = 0.0066
    """Edge of a grid cell, m; eight particles fill one."""
    density: float = 1000.0
    viscosity: float = 1e-6
    """Kinematic, m^2/s: water 1e-6, olive oil 8e-5, syrup 2e-3."""
    gravity: float = 9.81
    flip: float = 0.96
    """Share of FLIP against PIC at the viscosity of water."""
    friction: float = 0.02
    """Share of tangential velocity that a particle loses where it touches a solid, a step."""
    correction: float = 1.0
    """Share of the density error that is removed a step."""
    iterations: int = 80
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("cell", "density", "viscosity"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ConfigError(name, where="FlipConfig", got=value, expected="a positive number")


class Flip:
    """Particles in a box of the world above the table z = 0.

    `low_3`, `high_3`: corners of the domain in metres, z from 0; a particle that reaches a side stops there.
    `x_N3`, `v_N3` float32; `impulse_S6` [solids + 1, 6] float64 in N s of the last step, the table last.
    """

    def __init__(
        self, low_3: ArrayLike, high_3: ArrayLike, x_N3: np.ndarray, config: FlipConfig = FlipConfig()
    ) -> None:
        low, high = np.asarray(low_3, dtype=np.float64), np.asarray(high_3, dtype=np.float64)
        if not np.all(high - low > 4 * config.cell):
            raise ConfigError(
                "domain", where="Flip", got=(high - low).tolist(), expected=f"over {4 * config.cell} m a side"
            )
        if x_N3.ndim != 2 or x_N3.shape[1] != 3 or len(x_N3) == 0 or not np.isfinite(x_N3).all():
            raise ConfigError(
                "particles", where="Flip", got=x_N3.shape, expected="finite positions [N, 3], N > 0"
            )
        self.config = config
        # Two cells below the table and beyond each side keep every stencil inside the arrays.
        self.origin_3 = low - 2 * config.cell
        shape = tuple(int(n) for n in np.ceil((high - low) / config.cell).astype(int) + 4)
        self.shape_3 = np.array(shape, dtype=np.int64)
        self.low_3, self.high_3 = low + 0.05 * config.cell, high - 0.05 * config.cell
        self.x_N3 = np.clip(x_N3, self.low_3, self.high_3).astype(np.float32)
        self.v_N3 = np.zeros_like(self.x_N3)
        self.mass = config.density * (config.cell / PER_AXIS) ** 3
        """Of one particle, kg."""
        faces = [tuple(n + (axis == c) for c, n in enumerate(shape)) for axis in range(3)]
        self._new, self._old, self._valid = ([np.zeros(face, np.float32) for face in faces] for _ in range(3))
        self._density = np.zeros(shape, np.float32)
        self._index = np.full(shape, -1, np.int32)
        self._guess = np.zeros(shape, np.float32)
        self._node = np.full(tuple(n + 1 for n in shape), np.nan, np.float32)
        self._owner = np.zeros(self._node.shape, np.int8)
        most = len(self.x_N3) + 1
        self._cells_M3 = np.zeros((most, 3), np.int32)
        self._open_M6 = np.zeros((most, 6))
        self._neighbour_M6, self._owner_M6 = np.zeros((most, 6), np.int32), np.zeros((most, 6), np.int32)
        self._vectors = [np.zeros(most) for _ in range(8)]
        self._root = np.zeros(most, np.int32)
        self._solids = np.zeros((0, WIDTH))
        self._span = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self.impulse_S6 = np.zeros((1, 6))
        self.count = 0
        """Cells that hold liquid in the last step."""
        self.iterations = 0

    def step(self, dt: float, solids_S23: np.ndarray) -> None:
        """Advance by dt seconds to the new poses of the solids (rows of `flip_solids.solid`)."""
        config, x, v = self.config, self.x_N3, self.v_N3
        solids = np.ascontiguousarray(solids_S23, dtype=np.float64).reshape(-1, WIDTH)
        before = self._solids if self._solids.shape == solids.shape else solids
        grid = (self.origin_3, config.cell)
        low, high = np.zeros(3, np.int64), np.zeros(3, np.int64)
        pressure.bounds(x, *grid, self.shape_3, low, high)
        box = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
        for axis in range(3):
            self._new[axis][box] = 0
            self._valid[axis][box] = 0
            transfer.scatter(x, v, axis, *grid, self._new[axis], self._valid[axis])
            fall = -config.gravity * dt if axis == 2 else 0.0
            ends = np.minimum(high + 1, self._new[axis].shape)
            transfer.normalise(self._new[axis], self._valid[axis], self._old[axis], fall, low, ends)
        self._density[box] = 0
        transfer.scatter(x, v, 3, *grid, self._density, self._density)
        # Where the particles still are the solids were too, a step ago; they move on together.
        moving = before.copy()
        moving[:, 13:19] = solids[:, 13:19]
        self._solve(dt, moving, low, high)
        rate = config.viscosity * dt / config.cell**2
        if rate > 1e-3:
            for field, valid in zip(self._new, self._valid, strict=True):
                transfer.diffuse(field, valid, rate, 6, low, high + 1)
        flip = config.flip / (1 + 4 * rate)
        u = np.zeros_like(x)
        for axis in range(3):
            fields = self._new[axis], self._old[axis], self._valid[axis]
            transfer.gather(x, v, axis, *grid, *fields, flip, config.cell / dt, u)
        self._correct(dt)
        old_x = x.copy()
        transfer.advect(x, u, *grid, dt, *self._faces(), self.low_3, self.high_3)
        taken = np.zeros_like(self.impulse_S6)
        friction = min(config.friction + rate, 0.24)
        gap = 0.1 * config.cell
        collide(x, v, old_x, solids, before, gap, friction, self.low_3, self.high_3, taken)
        self.impulse_S6 += self.mass * taken
        pressure.clear(self._cells_M3, self.count, self._index, self._node)
        self._solids = solids

    def _solve(self, dt: float, solids: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        config = self.config
        grid = (self.origin_3, config.cell)
        self.count = pressure.mark(self.x_N3, *grid, low, high, self._index, self._cells_M3)
        theta, diagonal, source, excess, p, r, s, product = self._vectors
        self.impulse_S6 = np.zeros((len(solids) + 1, 6))
        unit = config.density * config.cell**3
        pressure.assemble(
            self._cells_M3, self.count, self._index, self._density, float(PER_CELL), solids, *grid,
            THICKNESS * config.cell, self._node, self._owner, *self._faces(), self._open_M6,
            self._neighbour_M6, self._owner_M6, theta, diagonal, source, excess,
            unit, self.impulse_S6,
        )  # fmt: skip
        pressure.settle_pockets(self.count, self._neighbour_M6, source, excess, self._root)
        used = self._cells_M3[: self.count]
        where = tuple(used.T)
        p[: self.count] = self._guess[where]
        self.iterations = pressure.conjugate_gradient(
            self.count, self._open_M6, self._neighbour_M6, diagonal, source, p, r, s, product,
            config.iterations, config.tolerance,
        )  # fmt: skip
        self._guess[tuple(slice(a, b) for a, b in zip(self._span[0], self._span[1], strict=True))] = 0
        self._span = low, high
        self._guess[where] = p[: self.count]
        self._project(p, 1.0)
        pressure.add_wrench(
            self._cells_M3, self.count, self._open_M6, self._owner_M6, p, unit, solids, *grid, self.impulse_S6
        )

    def _correct(self, dt: float) -> None:
        """Add to the advecting velocity what moves particles from dense to thin cells within one step."""
        _, diagonal, _, excess, p, r, s, product = self._vectors
        p[: self.count] = 0
        pressure.conjugate_gradient(
            self.count, self._open_M6, self._neighbour_M6, diagonal, excess, p, r, s, product, 12, 0.05
        )
        self._project(p, self.config.correction * self.config.cell / dt)

    def _project(self, p: np.ndarray, scale: float) -> None:
        pressure.subtract_gradient(
            self._cells_M3, self.count, self._open_M6, self._neighbour_M6, self._vectors[0], p, scale,
            *self._faces(),
        )  # fmt: skip

    def _faces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        (u, v, w), (valid_u, valid_v, valid_w) = self._new, self._valid
        return u, v, w, valid_u, valid_v, valid_w

    def pressure_at(self, point_3: ArrayLike, dt: float) -> float:
        """Pressure in Pa of the last step (of dt seconds) in the cell of a point; 0 where no liquid is."""
        i, j, k = ((np.asarray(point_3) - self.origin_3) / self.config.cell).astype(int)
        return float(self._guess[i, j, k]) * self.config.density * self.config.cell / dt

    def distance_to_solids(self, solids_S23: np.ndarray) -> np.ndarray:
        """Signed distance [N] in metres of each particle to the nearest solid, negative inside."""
        return distances(np.ascontiguousarray(solids_S23, dtype=np.float64), self.x_N3, 0.0)


def lattice(low_3: ArrayLike, high_3: ArrayLike, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Particles [N, 3] float64 that fill a box of metres at eight a cell, jittered within their share."""
    spacing = cell / PER_AXIS
    low, high = np.asarray(low_3, dtype=np.float64), np.asarray(high_3, dtype=np.float64)
    counts = np.maximum(np.rint((high - low) / spacing).astype(int), 1)
    axes = [a + (np.arange(n) + 0.5) * (b - a) / n for a, b, n in zip(low, high, counts, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return points + rng.uniform(-0.2, 0.2, points.shape) * spacing
