"""Solids that a liquid meets: analytic cups, trays, boxes, capsules in rigid motion, over a table at z = 0.

One solid is one row of a float64 array: 0 shape, 1:4 position, 4:13 rotation (row-major, local to world),
13:16 velocity, 16:19 angular velocity, 19:23 size; SI units. Index -1 stands for the table. Imported lazily:
its kernels need Numba.
"""

import math
from enum import IntEnum

import numba
import numpy as np
from numpy.typing import ArrayLike

WIDTH = 23
TABLE = -1


class Shape(IntEnum):
    """What a row is; its size is given in this order."""

    CUP = 0
    """Inner radius, inner height, floor, wall; origin at the inner floor's centre, open along local z."""
    TRAY = 1
    """Inner half length x, inner half length y, inner height, wall; origin at the inner floor's centre."""
    BOX = 2
    """Half lengths x, y, z; origin at the centre."""
    CAPSULE = 3
    """Half length along local z, radius; origin at the centre."""


def solid(
    shape: Shape,
    position: ArrayLike,
    rotation_33: ArrayLike,
    size: ArrayLike,
    before: np.ndarray | None = None,
    dt: float = 0.0,
) -> np.ndarray:
    """One row [23] at a pose; its velocities led here from the row `before`, `dt` seconds ago."""
    sizes = np.asarray(size, dtype=np.float64)
    if sizes.size > 4 or not np.all(sizes > 0):
        raise ValueError(
            f"size of a {shape.name.lower()}: got {sizes.tolist()}, expected up to four positive lengths"
        )
    row = np.zeros(WIDTH)
    row[0] = shape
    row[1:4] = position
    row[4:13] = np.asarray(rotation_33, dtype=np.float64).ravel()
    row[19 : 19 + sizes.size] = sizes
    if before is not None and dt > 0:
        row[13:16] = (row[1:4] - before[1:4]) / dt
        rotation, previous = row[4:13].reshape(3, 3), before[4:13].reshape(3, 3)
        spin = (rotation - previous) / dt @ rotation.T
        row[16:19] = 0.5 * np.array(
            [spin[2, 1] - spin[1, 2], spin[0, 2] - spin[2, 0], spin[1, 0] - spin[0, 1]]
        )
    return row


@numba.njit(cache=True, error_model="numpy")
def _local_distance(row, x, y, z, thickness):
    """Signed distance (negative inside) in the solid's frame; thin walls count as at least `thickness`."""
    a, b, c, d = row[19], row[20], row[21], row[22]
    shape = int(row[0])
    if shape == 0:
        radius = math.sqrt(x * x + y * y)
        cavity = max(radius - a, -z)
        outer = max(radius - a - max(d, thickness), max(-z - max(c, thickness), z - b))
        return max(outer, -cavity)
    if shape == 1:
        wall = max(d, thickness)
        cavity = max(max(abs(x) - a, abs(y) - b), -z)
        outer = max(max(abs(x) - a - wall, abs(y) - b - wall), max(-z - wall, z - c))
        return max(outer, -cavity)
    if shape == 2:
        half = 0.5 * thickness
        qx, qy, qz = abs(x) - max(a, half), abs(y) - max(b, half), abs(z) - max(c, half)
        ox, oy, oz = max(qx, 0.0), max(qy, 0.0), max(qz, 0.0)
        return math.sqrt(ox * ox + oy * oy + oz * oz) + min(max(qx, max(qy, qz)), 0.0)
    along = max(abs(z) - a, 0.0)
    return math.sqrt(x * x + y * y + along * along) - max(b, 0.5 * thickness)


@numba.njit(cache=True, error_model="numpy")
def to_local(row, x, y, z):
    """World point in the solid's frame."""
    dx, dy, dz = x - row[1], y - row[2], z - row[3]
    return (
        row[4] * dx + row[7] * dy + row[10] * dz,
        row[5] * dx + row[8] * dy + row[11] * dz,
        row[6] * dx + row[9] * dy + row[12] * dz,
    )


@numba.njit(cache=True, error_model="numpy")
def nearest(solids, x, y, z, thickness):
    """Distance to the nearest solid, negative inside, and its index (-1 is the table)."""
    best, index = z, -1
    for n in range(solids.shape[0]):
        lx, ly, lz = to_local(solids[n], x, y, z)
        distance = _local_distance(solids[n], lx, ly, lz, thickness)
        if distance < best:
            best, index = distance, n
    return best, index


@numba.njit(cache=True, error_model="numpy")
def distances(solids, points_N3, thickness):
    """Distance of each point to the nearest solid or the table [N]."""
    out = np.empty(points_N3.shape[0])
    for p in range(points_N3.shape[0]):
        out[p], _ = nearest(solids, points_N3[p, 0], points_N3[p, 1], points_N3[p, 2], thickness)
    return out


@numba.njit(cache=True, error_model="numpy")
def velocity_along(solids, n, axis, x, y, z):
    """Component of the rigid velocity of solid n at a world point; 0 for the table."""
    if n < 0:
        return 0.0
    row = solids[n]
    dx, dy, dz = x - row[1], y - row[2], z - row[3]
    if axis == 0:
        return row[13] + row[17] * dz - row[18] * dy
    if axis == 1:
        return row[14] + row[18] * dx - row[16] * dz
    return row[15] + row[16] * dy - row[17] * dx


@numba.njit(cache=True, error_model="numpy")
def _push_vessel(row, round_, lx, ly, lz, px, py, pz, gap):
    """Keep a particle on its side of a thin wall; (px, py, pz) is where it was in the vessel's own frame.

    Returns (hit, local position, local normal).
    """
    a = row[19]
    b = a if round_ else row[20]
    top = row[20] if round_ else row[21]
    wall = row[22]
    floor = row[21] if round_ else row[22]
    if lz >= top + gap:
        return False, lx, ly, lz, 0.0, 0.0, 0.0
    if round_:
        was = math.sqrt(px * px + py * py) - a
        now = math.sqrt(lx * lx + ly * ly) - a
    else:
        was = max(abs(px) - a, abs(py) - b)
        now = max(abs(lx) - a, abs(ly) - b)
    from_above = pz >= top
    within = was < 0.5 * wall and pz > -0.5 * floor and not from_above
    if from_above:
        within = now < 0.5 * wall
    hit, nx, ny, nz = False, 0.0, 0.0, 0.0
    if within:
        if lz < top and now > -gap:
            hit = True
            if round_:
                radius = max(math.sqrt(lx * lx + ly * ly), 1e-9)
                nx, ny = -lx / radius, -ly / radius
                lx, ly = lx * (a - gap) / radius, ly * (a - gap) / radius
            else:
                if abs(lx) > a - gap:
                    nx = -math.copysign(1.0, lx)
                    lx = math.copysign(a - gap, lx)
                if abs(ly) > b - gap:
                    nx, ny = 0.0, -math.copysign(1.0, ly)
                    ly = math.copysign(b - gap, ly)
        if lz < gap:
            hit, lz, nx, ny, nz = True, gap, 0.0, 0.0, 1.0
    elif now < wall + gap and -floor - gap < lz < top:
        hit = True
        if pz <= -floor and not from_above:
            lz, nz = -floor - gap, -1.0
        elif round_:
            radius = max(math.sqrt(lx * lx + ly * ly), 1e-9)
            nx, ny = lx / radius, ly / radius
            lx, ly = nx * (a + wall + gap), ny * (a + wall + gap)
        elif abs(lx) - a > abs(ly) - b:
            nx = math.copysign(1.0, lx)
            lx = nx * (a + wall + gap)
        else:
            ny = math.copysign(1.0, ly)
            ly = ny * (b + wall + gap)
    return hit, lx, ly, lz, nx, ny, nz


@numba.njit(cache=True, error_model="numpy")
def _push_filled(row, lx, ly, lz, gap):
    """Push a particle out of a box or a capsule. Returns (hit, local position, local normal)."""
    a, b, c = row[19], row[20], row[21]
    if int(row[0]) == 2:
        qx, qy, qz = abs(lx) - a - gap, abs(ly) - b - gap, abs(lz) - c - gap
        if qx >= 0 or qy >= 0 or qz >= 0:
            return False, lx, ly, lz, 0.0, 0.0, 0.0
        if qx > qy and qx > qz:
            side = math.copysign(1.0, lx)
            return True, side * (a + gap), ly, lz, side, 0.0, 0.0
        if qy > qz:
            side = math.copysign(1.0, ly)
            return True, lx, side * (b + gap), lz, 0.0, side, 0.0
        side = math.copysign(1.0, lz)
        return True, lx, ly, side * (c + gap), 0.0, 0.0, side
    centre = min(max(lz, -a), a)
    radius = math.sqrt(lx * lx + ly * ly + (lz - centre) ** 2)
    if radius >= b + gap or radius < 1e-9:
        return False, lx, ly, lz, 0.0, 0.0, 0.0
    nx, ny, nz = lx / radius, ly / radius, (lz - centre) / radius
    return True, nx * (b + gap), ny * (b + gap), centre + nz * (b + gap), nx, ny, nz


@numba.njit(cache=True, error_model="numpy")
def collide(x_N3, v_N3, before_N3, solids, solids_before, gap, friction, low_3, high_3, impulse_S6):
    """Project particles out of the solids at their new pose, remove inward velocity, stop at the domain.

    The side of a thin wall is where the particle was relative to that solid one step ago, so nothing
    tunnels. `impulse_S6` gains the velocity taken from the particles (force part) and its moment about each
    solid's position; multiply by the mass of a particle for newton seconds. Its last row is the table's.
    """
    for p in range(x_N3.shape[0]):
        for n in range(solids.shape[0]):
            row = solids[n]
            x, y, z = x_N3[p, 0], x_N3[p, 1], x_N3[p, 2]
            lx, ly, lz = to_local(row, x, y, z)
            reach = row[19] + row[20] + row[21] + row[22] + 0.05
            if lx * lx + ly * ly + lz * lz > reach * reach:
                continue
            shape = int(row[0])
            if shape <= 1:
                px, py, pz = to_local(solids_before[n], before_N3[p, 0], before_N3[p, 1], before_N3[p, 2])
                hit, lx, ly, lz, ax, ay, az = _push_vessel(row, shape == 0, lx, ly, lz, px, py, pz, gap)
            else:
                hit, lx, ly, lz, ax, ay, az = _push_filled(row, lx, ly, lz, gap)
            if not hit:
                continue
            x = row[1] + row[4] * lx + row[5] * ly + row[6] * lz
            y = row[2] + row[7] * lx + row[8] * ly + row[9] * lz
            z = row[3] + row[10] * lx + row[11] * ly + row[12] * lz
            nx = row[4] * ax + row[5] * ay + row[6] * az
            ny = row[7] * ax + row[8] * ay + row[9] * az
            nz = row[10] * ax + row[11] * ay + row[12] * az
            sx = velocity_along(solids, n, 0, x, y, z)
            sy = velocity_along(solids, n, 1, x, y, z)
            sz = velocity_along(solids, n, 2, x, y, z)
            rx, ry, rz = v_N3[p, 0] - sx, v_N3[p, 1] - sy, v_N3[p, 2] - sz
            inward = min(rx * nx + ry * ny + rz * nz, 0.0)
            keep = 1.0 - friction
            rx, ry, rz = keep * (rx - inward * nx), keep * (ry - inward * ny), keep * (rz - inward * nz)
            jx, jy, jz = v_N3[p, 0] - rx - sx, v_N3[p, 1] - ry - sy, v_N3[p, 2] - rz - sz
            dx, dy, dz = x - row[1], y - row[2], z - row[3]
            impulse_S6[n, 0] += jx
            impulse_S6[n, 1] += jy
            impulse_S6[n, 2] += jz
            impulse_S6[n, 3] += dy * jz - dz * jy
            impulse_S6[n, 4] += dz * jx - dx * jz
            impulse_S6[n, 5] += dx * jy - dy * jx
            x_N3[p, 0], x_N3[p, 1], x_N3[p, 2] = x, y, z
            v_N3[p, 0], v_N3[p, 1], v_N3[p, 2] = rx + sx, ry + sy, rz + sz
        if x_N3[p, 2] < gap:
            x_N3[p, 2] = gap
            impulse_S6[-1, 2] += min(v_N3[p, 2], 0.0)
            v_N3[p, 2] = max(v_N3[p, 2], 0.0)
            # A spill on a rough table is thinner than a cell and soon stops.
            v_N3[p, 0] *= max(1.0 - 12.0 * friction, 0.0)
            v_N3[p, 1] *= max(1.0 - 12.0 * friction, 0.0)
        for c in range(3):
            if x_N3[p, c] < low_3[c] or x_N3[p, c] > high_3[c]:
                x_N3[p, c] = min(max(x_N3[p, c], low_3[c]), high_3[c])
                v_N3[p, c] = 0.0
