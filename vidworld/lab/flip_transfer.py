"""Particles to a staggered grid and back, viscosity, and advection. Imported lazily: needs Numba.

Velocities live on cell faces: the face between cells i-1 and i along an axis has index i there. A face's
`valid` is 1 where only particles nearby reach it, 2 where a solid prescribes its velocity, 3 on an open face
of a cell that holds liquid. Only 2 and 3 are read back: a face inside a wall would otherwise fall freely.
"""

import numba
import numpy as np

CORNER = (np.uint64(0), np.uint64(1))


@numba.njit(cache=True, error_model="numpy")
def scatter(x_N3, v_N3, axis, origin_3, cell, total, weight):
    """Trilinear transfer of velocity component `axis` (or, with axis 3, of mass alone) to the grid."""
    inverse = 1.0 / cell
    sx = 0.0 if axis == 0 else 0.5
    sy = 0.0 if axis == 1 else 0.5
    sz = 0.0 if axis == 2 else 0.5
    for p in range(x_N3.shape[0]):
        gx = (x_N3[p, 0] - origin_3[0]) * inverse - sx
        gy = (x_N3[p, 1] - origin_3[1]) * inverse - sy
        gz = (x_N3[p, 2] - origin_3[2]) * inverse - sz
        i, j, k = np.uint64(gx), np.uint64(gy), np.uint64(gz)
        a, b, c = gx - np.float64(i), gy - np.float64(j), gz - np.float64(k)
        value = v_N3[p, axis] if axis < 3 else 0.0
        for di in CORNER:
            wi = a if di else 1.0 - a
            for dj in CORNER:
                wj = wi * (b if dj else 1.0 - b)
                for dk in CORNER:
                    w = wj * (c if dk else 1.0 - c)
                    weight[i + di, j + dj, k + dk] += w
                    if axis < 3:
                        total[i + di, j + dj, k + dk] += w * value


@numba.njit(cache=True, error_model="numpy")
def normalise(total, weight, old, gain, low_3, high_3):
    """Momentum to velocity where particles reach, kept in `old`; `gain` (gravity times dt) is then added."""
    for i in range(low_3[0], high_3[0]):
        for j in range(low_3[1], high_3[1]):
            for k in range(low_3[2], high_3[2]):
                w = weight[i, j, k]
                if w > 1e-6:
                    velocity = total[i, j, k] / w
                    old[i, j, k] = velocity
                    total[i, j, k] = velocity + gain
                    weight[i, j, k] = 1.0
                else:
                    old[i, j, k], total[i, j, k], weight[i, j, k] = 0.0, 0.0, 0.0


@numba.njit(cache=True, error_model="numpy")
def diffuse(field, valid, rate, sweeps, low_3, high_3):
    """Implicit viscosity by Gauss-Seidel, `rate` = nu dt / cell^2: solid faces hold, free ones slip."""
    nx, ny, nz = field.shape
    source = field.copy()
    for _ in range(sweeps):
        for i in range(max(low_3[0], 1), min(high_3[0], nx - 1)):
            for j in range(max(low_3[1], 1), min(high_3[1], ny - 1)):
                for k in range(max(low_3[2], 1), min(high_3[2], nz - 1)):
                    if valid[i, j, k] != 3.0:
                        continue
                    total, count = 0.0, 0
                    if valid[i - 1, j, k] > 1.5:
                        total += field[i - 1, j, k]
                        count += 1
                    if valid[i + 1, j, k] > 1.5:
                        total += field[i + 1, j, k]
                        count += 1
                    if valid[i, j - 1, k] > 1.5:
                        total += field[i, j - 1, k]
                        count += 1
                    if valid[i, j + 1, k] > 1.5:
                        total += field[i, j + 1, k]
                        count += 1
                    if valid[i, j, k - 1] > 1.5:
                        total += field[i, j, k - 1]
                        count += 1
                    if valid[i, j, k + 1] > 1.5:
                        total += field[i, j, k + 1]
                        count += 1
                    field[i, j, k] = (source[i, j, k] + rate * total) / (1.0 + rate * count)


@numba.njit(cache=True, error_model="numpy", inline="always")
def _sample(field, valid, gx, gy, gz):
    """Trilinear value over the valid faces around a point in grid units."""
    gx = min(max(gx, 0.0), field.shape[0] - 1.001)
    gy = min(max(gy, 0.0), field.shape[1] - 1.001)
    gz = min(max(gz, 0.0), field.shape[2] - 1.001)
    i, j, k = np.uint64(gx), np.uint64(gy), np.uint64(gz)
    a, b, c = gx - np.float64(i), gy - np.float64(j), gz - np.float64(k)
    total, weights = 0.0, 1e-12
    for di in CORNER:
        wi = a if di else 1.0 - a
        for dj in CORNER:
            wj = wi * (b if dj else 1.0 - b)
            for dk in CORNER:
                if valid[i + di, j + dj, k + dk] > 1.5:
                    w = wj * (c if dk else 1.0 - c)
                    total += w * field[i + di, j + dj, k + dk]
                    weights += w
    return total / weights


@numba.njit(cache=True, error_model="numpy")
def gather(x_N3, v_N3, axis, origin_3, cell, new, old, valid, flip, apart, grid_N3):
    """Blend of PIC and FLIP (Zhu and Bridson 2005): v <- flip (v + du) + (1 - flip) u.

    `grid_N3` gets the grid's velocity u at each particle; v stays within `apart` (m/s) of it, or a particle
    that clings to a wall would gather the speed of a free fall.
    """
    inverse = 1.0 / cell
    sx = 0.0 if axis == 0 else 0.5
    sy = 0.0 if axis == 1 else 0.5
    sz = 0.0 if axis == 2 else 0.5
    for p in range(x_N3.shape[0]):
        gx = (x_N3[p, 0] - origin_3[0]) * inverse - sx
        gy = (x_N3[p, 1] - origin_3[1]) * inverse - sy
        gz = (x_N3[p, 2] - origin_3[2]) * inverse - sz
        i, j, k = np.uint64(gx), np.uint64(gy), np.uint64(gz)
        a, b, c = gx - np.float64(i), gy - np.float64(j), gz - np.float64(k)
        fresh, change, weights = 0.0, 0.0, 1e-12
        for di in CORNER:
            wi = a if di else 1.0 - a
            for dj in CORNER:
                wj = wi * (b if dj else 1.0 - b)
                for dk in CORNER:
                    if valid[i + di, j + dj, k + dk] > 1.5:
                        w = wj * (c if dk else 1.0 - c)
                        value = new[i + di, j + dj, k + dk]
                        fresh += w * value
                        change += w * (value - old[i + di, j + dj, k + dk])
                        weights += w
        grid_N3[p, axis] = fresh / weights
        u = fresh / weights
        mixed = flip * (v_N3[p, axis] + change / weights) + (1.0 - flip) * u
        v_N3[p, axis] = min(max(mixed, u - apart), u + apart) if weights > 1e-9 else mixed


@numba.njit(cache=True, error_model="numpy")
def advect(x_N3, grid_N3, origin_3, cell, dt, u, v, w, valid_u, valid_v, valid_w, low_3, high_3):
    """Move particles through the grid's velocity by the midpoint rule, kept inside the domain."""
    inverse = 1.0 / cell
    step = 0.5 * dt * inverse
    for p in range(x_N3.shape[0]):
        gx = (x_N3[p, 0] - origin_3[0]) * inverse + step * grid_N3[p, 0]
        gy = (x_N3[p, 1] - origin_3[1]) * inverse + step * grid_N3[p, 1]
        gz = (x_N3[p, 2] - origin_3[2]) * inverse + step * grid_N3[p, 2]
        a = _sample(u, valid_u, gx, gy - 0.5, gz - 0.5)
        b = _sample(v, valid_v, gx - 0.5, gy, gz - 0.5)
        c = _sample(w, valid_w, gx - 0.5, gy - 0.5, gz)
        # A midpoint that left the liquid finds no velocity: keep that of the start then.
        if a == 0.0 and b == 0.0 and c == 0.0:
            a, b, c = grid_N3[p, 0], grid_N3[p, 1], grid_N3[p, 2]
        x_N3[p, 0] = min(max(x_N3[p, 0] + dt * a, low_3[0]), high_3[0])
        x_N3[p, 1] = min(max(x_N3[p, 1] + dt * b, low_3[1]), high_3[1])
        x_N3[p, 2] = min(max(x_N3[p, 2] + dt * c, low_3[2]), high_3[2])
