"""Variational pressure solve on the cells that hold liquid. Imported lazily: needs Numba.

After Batty, Bertails and Bridson, A Fast Variational Framework for Accurate Solid-Fluid Coupling (2007): each
face counts by the open share of its control volume, and pressure on the closed share is the force on the
solid. The free surface is placed inside its cell by a ghost pressure (Enright et al. 2003). The same matrix
serves a density correction after Kugelstadt et al., Implicit Density Projection (2019), which moves positions
and leaves velocities and pressures alone.
"""

import math

import numba
import numpy as np

from vidworld.lab.flip_solids import nearest, velocity_along

AIR, CLOSED = -1, -2


@numba.njit(cache=True, error_model="numpy")
def bounds(x_N3, origin_3, cell, shape_3, low_3, high_3):
    """Index box of cells that hold particles, grown by two cells, into low_3 and high_3 (exclusive)."""
    inverse = 1.0 / cell
    for c in range(3):
        least, most = 1e9, -1e9
        for p in range(x_N3.shape[0]):
            value = x_N3[p, c]
            least, most = min(least, value), max(most, value)
        low_3[c] = max(int((least - origin_3[c]) * inverse) - 2, 0)
        high_3[c] = min(int((most - origin_3[c]) * inverse) + 4, shape_3[c])


@numba.njit(cache=True, error_model="numpy")
def mark(x_N3, origin_3, cell, low_3, high_3, index, cells_M3):
    """Number the cells that hold particles in grid order: `index` gets the number or -1. Returns how many."""
    inverse = 1.0 / cell
    for i in range(low_3[0], high_3[0]):
        for j in range(low_3[1], high_3[1]):
            for k in range(low_3[2], high_3[2]):
                index[i, j, k] = -1
    for p in range(x_N3.shape[0]):
        i = int((x_N3[p, 0] - origin_3[0]) * inverse)
        j = int((x_N3[p, 1] - origin_3[1]) * inverse)
        k = int((x_N3[p, 2] - origin_3[2]) * inverse)
        index[i, j, k] = 0
    count = 0
    for i in range(low_3[0], high_3[0]):
        for j in range(low_3[1], high_3[1]):
            for k in range(low_3[2], high_3[2]):
                if index[i, j, k] == 0:
                    index[i, j, k] = count
                    cells_M3[count, 0], cells_M3[count, 1], cells_M3[count, 2] = i, j, k
                    count += 1
    return count


@numba.njit(cache=True, error_model="numpy")
def _corners(solids, origin_3, cell, thickness, i, j, k, node, owner):
    """Distance and solid at the eight corners of a cell, each computed once a step (`node` starts as nan)."""
    for di in range(2):
        for dj in range(2):
            for dk in range(2):
                a, b, c = i + di, j + dj, k + dk
                if math.isnan(node[a, b, c]):
                    x, y, z = origin_3[0] + a * cell, origin_3[1] + b * cell, origin_3[2] + c * cell
                    node[a, b, c], owner[a, b, c] = nearest(solids, x, y, z, thickness)


@numba.njit(cache=True, error_model="numpy", inline="always")
def _ramp(value):
    return min(max(value, 0.0), 1.0)


@numba.njit(cache=True, error_model="numpy")
def _add_impulse(solids, n, axis, x, y, z, amount, impulse_S6):
    """Impulse along an axis at a point, on solid n: force, then moment about the solid's position."""
    row = n if n >= 0 else impulse_S6.shape[0] - 1
    impulse_S6[row, axis] += amount
    if n < 0:
        return
    dx, dy, dz = x - solids[n, 1], y - solids[n, 2], z - solids[n, 3]
    if axis == 0:
        impulse_S6[row, 4] += dz * amount
        impulse_S6[row, 5] -= dy * amount
    elif axis == 1:
        impulse_S6[row, 3] -= dz * amount
        impulse_S6[row, 5] += dx * amount
    else:
        impulse_S6[row, 3] += dy * amount
        impulse_S6[row, 4] -= dx * amount


@numba.njit(cache=True, error_model="numpy")
def assemble(
    cells_M3, count, index, mass, per_cell, solids, origin_3, cell, thickness, node, owner,
    u, v, w, valid_u, valid_v, valid_w, open_M6, neighbour_M6, owner_M6, theta_M, diagonal_M, source_M,
    excess_M, unit, impulse_S6,
):  # fmt: skip
    """Faces, matrix and right-hand sides of both solves; closed faces take the velocity of their solid.

    The liquid in the open half of a closed face is stopped by the solid: that impulse is added to
    `impulse_S6`, with `unit` the mass of a full cell.
    """
    for q in range(count):
        i, j, k = cells_M3[q, 0], cells_M3[q, 1], cells_M3[q, 2]
        cx, cy, cz = (
            origin_3[0] + (i + 0.5) * cell,
            origin_3[1] + (j + 0.5) * cell,
            origin_3[2] + (k + 0.5) * cell,
        )
        centre, _ = nearest(solids, cx, cy, cz, thickness)
        near = centre < 1.8 * cell
        share = 1.0
        if near:
            _corners(solids, origin_3, cell, thickness, i, j, k, node, owner)
            # Open share of the tent kernel around the centre, to 4 % for a half space.
            total = 0.0
            for di in range(2):
                for dj in range(2):
                    for dk in range(2):
                        total += _ramp(0.5 + node[i + di, j + dj, k + dk] / cell)
            share = max(total / 16.0 + 0.5 * _ramp(0.5 + centre / cell), 0.15)
        density = mass[i, j, k] / (per_cell * share)
        diagonal, source, exposed = 0.0, 0.0, False
        if density >= 1.0:
            theta = 1.0
        elif density > 0.5:
            theta = 1.0 - math.sqrt(2.0 * (1.0 - density))
        else:
            theta = math.sqrt(2.0 * density) - 1.0
        theta = min(max(theta, 0.1), 1.0)
        theta_M[q] = theta
        for f in range(6):
            axis, side = f >> 1, f & 1
            step = 2 * side - 1
            ni = i + (step if axis == 0 else 0)
            nj = j + (step if axis == 1 else 0)
            nk = k + (step if axis == 2 else 0)
            fi = i + (side if axis == 0 else 0)
            fj = j + (side if axis == 1 else 0)
            fk = k + (side if axis == 2 else 0)
            fx = cx + (0.5 * step * cell if axis == 0 else 0.0)
            fy = cy + (0.5 * step * cell if axis == 1 else 0.0)
            fz = cz + (0.5 * step * cell if axis == 2 else 0.0)
            other = index[ni, nj, nk]
            opened, who, stopped = 1.0, -1, 0.0
            if near:
                mean, least = 0.0, 1e9
                for a in range(2):
                    for b in range(2):
                        di = side if axis == 0 else a
                        dj = side if axis == 1 else (a if axis == 0 else b)
                        dk = side if axis == 2 else b
                        value = node[i + di, j + dj, k + dk]
                        mean += 0.25 * value
                        if value < least:
                            least, who = value, owner[i + di, j + dj, k + dk]
                opened = _ramp(0.5 + mean / cell)
                if opened < 0.08:
                    opened = 0.0
                if other < 0 and 0.0 < opened < 1.0:
                    # An empty cell inside a wall is not air: else liquid seeps into walls and collapses.
                    beyond, _ = nearest(
                        solids, cx + 2 * (fx - cx), cy + 2 * (fy - cy), cz + 2 * (fz - cz), thickness
                    )
                    if beyond < 0.1 * cell:
                        stopped, opened = opened, 0.0
            push = 0.0
            if opened < 1.0:
                push = velocity_along(solids, who, axis, fx, fy, fz)
            if axis == 0:
                velocity = u[fi, fj, fk]
            elif axis == 1:
                velocity = v[fi, fj, fk]
            else:
                velocity = w[fi, fj, fk]
            source -= step * (opened * velocity + (1.0 - opened) * push)
            open_M6[q, f], owner_M6[q, f] = opened, who
            if opened == 0.0:
                neighbour_M6[q, f] = CLOSED
                if stopped > 0.0:
                    amount = unit * stopped * (velocity - push)
                    _add_impulse(solids, who, axis, fx, fy, fz, amount, impulse_S6)
                if axis == 0:
                    u[fi, fj, fk], valid_u[fi, fj, fk] = push, 2.0
                elif axis == 1:
                    v[fi, fj, fk], valid_v[fi, fj, fk] = push, 2.0
                else:
                    w[fi, fj, fk], valid_w[fi, fj, fk] = push, 2.0
            elif other < 0:
                neighbour_M6[q, f] = AIR
                diagonal += opened / theta
                exposed = True
            else:
                neighbour_M6[q, f] = other
                diagonal += opened
        surplus = density - 1.0
        if exposed:
            surplus = max(surplus, 0.0)
        excess_M[q] = min(max(surplus, -0.5), 0.5) * min(1.0, 2.0 * share)
        diagonal_M[q] = diagonal
        source_M[q] = source
        if diagonal < 1e-3:
            diagonal_M[q], source_M[q], excess_M[q] = 1.0, 0.0, 0.0


@numba.njit(cache=True, error_model="numpy")
def settle_pockets(count, neighbour_M6, source_M, excess_M, root):
    """Make both systems solvable where liquid is shut in: there, nothing can be gained or lost.

    Cells that no chain of open faces joins to air have a singular matrix; a right-hand side with a mean
    would send conjugate gradients, and with them all the liquid, to infinity. `root` is scratch [M].
    """
    for q in range(count):
        root[q] = q
    for q in range(count):
        for f in range(1, 6, 2):
            n = neighbour_M6[q, f]
            if n >= 0:
                a, b = q, n
                while root[a] != a:
                    root[a] = root[root[a]]
                    a = root[a]
                while root[b] != b:
                    root[b] = root[root[b]]
                    b = root[b]
                root[max(a, b)] = min(a, b)
    airy, total = np.zeros(count, np.bool_), np.zeros((count, 3))
    for q in range(count):
        a = q
        while root[a] != a:
            a = root[a]
        root[q] = a
        total[a, 0] += source_M[q]
        total[a, 1] += excess_M[q]
        total[a, 2] += 1.0
        for f in range(6):
            if neighbour_M6[q, f] == AIR:
                airy[a] = True
    for q in range(count):
        a = root[q]
        if not airy[a]:
            source_M[q] -= total[a, 0] / total[a, 2]
            excess_M[q] -= total[a, 1] / total[a, 2]


@numba.njit(cache=True, error_model="numpy")
def clear(cells_M3, count, index, node):
    """Reset what one step left in the dense scratch grids."""
    for q in range(count):
        i, j, k = cells_M3[q, 0], cells_M3[q, 1], cells_M3[q, 2]
        index[i, j, k] = -1
        for di in range(2):
            for dj in range(2):
                for dk in range(2):
                    node[i + di, j + dj, k + dk] = np.nan


@numba.njit(cache=True, error_model="numpy")
def conjugate_gradient(
    count, open_M6, neighbour_M6, diagonal_M, source_M, p, r, s, product, iterations, tolerance
):
    """Jacobi-preconditioned conjugate gradients from the guess in `p`; returns the iterations used.

    Stops at a residual of `tolerance` times the right-hand side. The order of sums is fixed, so it is
    deterministic.
    """
    norm, rz = 0.0, 0.0
    for q in range(count):
        a = diagonal_M[q] * p[q]
        for f in range(6):
            n = neighbour_M6[q, f]
            if n >= 0:
                a -= open_M6[q, f] * p[n]
        r[q] = source_M[q] - a
        s[q] = r[q] / diagonal_M[q]
        rz += r[q] * s[q]
        norm += source_M[q] * source_M[q]
    target = tolerance * tolerance * norm
    done = 0
    while done < iterations and rz > 1e-30:
        energy = 0.0
        for q in range(count):
            a = diagonal_M[q] * s[q]
            for f in range(6):
                n = neighbour_M6[q, f]
                if n >= 0:
                    a -= open_M6[q, f] * s[n]
            product[q] = a
            energy += a * s[q]
        if energy <= 1e-30:
            break
        alpha, residual, following = rz / energy, 0.0, 0.0
        for q in range(count):
            p[q] += alpha * s[q]
            value = r[q] - alpha * product[q]
            r[q] = value
            residual += value * value
            following += value * value / diagonal_M[q]
        done += 1
        if residual <= target:
            break
        beta = following / rz
        rz = following
        for q in range(count):
            s[q] = r[q] / diagonal_M[q] + beta * s[q]
    return done


@numba.njit(cache=True, error_model="numpy")
def subtract_gradient(
    cells_M3, count, open_M6, neighbour_M6, theta_M, p, scale, u, v, w, valid_u, valid_v, valid_w
):
    """Velocity on open faces minus `scale` times the pressure difference; these faces become valid."""
    for q in range(count):
        i, j, k = cells_M3[q, 0], cells_M3[q, 1], cells_M3[q, 2]
        for f in range(6):
            n = neighbour_M6[q, f]
            side = f & 1
            if n == CLOSED or (n >= 0 and side == 0):
                continue
            difference = p[n] - p[q] if n >= 0 else -p[q] / theta_M[q]
            change = scale * difference * (2 * side - 1)
            axis = f >> 1
            if axis == 0:
                u[i + side, j, k] -= change
                valid_u[i + side, j, k] = 3.0
            elif axis == 1:
                v[i, j + side, k] -= change
                valid_v[i, j + side, k] = 3.0
            else:
                w[i, j, k + side] -= change
                valid_w[i, j, k + side] = 3.0


@numba.njit(cache=True, error_model="numpy")
def add_wrench(cells_M3, count, open_M6, owner_M6, p, unit, solids, origin_3, cell, impulse_S6):
    """Impulse of the pressure on the closed share of each face, force then moment about the solid's position.

    `unit` turns p into newton seconds a face (density * cell^3); the last row of `impulse_S6` is the table's.
    """
    for q in range(count):
        for f in range(6):
            closed = 1.0 - open_M6[q, f]
            if closed <= 0.0:
                continue
            axis, side = f >> 1, f & 1
            amount = unit * p[q] * closed * (2 * side - 1)
            x = origin_3[0] + (cells_M3[q, 0] + (0.5 if axis != 0 else side)) * cell
            y = origin_3[1] + (cells_M3[q, 1] + (0.5 if axis != 1 else side)) * cell
            z = origin_3[2] + (cells_M3[q, 2] + (0.5 if axis != 2 else side)) * cell
            _add_impulse(solids, owner_M6[q, f], axis, x, y, z, amount, impulse_S6)
