"""Particles to a surface, and the surface to a picture: a ray marcher that composites against a depth buffer.

Surface: Zhu and Bridson, Animating Sand as a Fluid (2005, eq. 3-6). Light: Snell's refraction, Schlick's
Fresnel term, absorption after Beer and Lambert, single scattering by its albedo. Clear cups are drawn here
too, as surfaces of revolution with a rim, because a rasteriser cannot sort them with the liquid. Needs Numba;
deterministic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidworld.errors import require
from vidworld.lab.effect import Camera

require("numba", "lab")

import numba  # noqa: E402

from vidworld.lab.flip_solids import WIDTH, to_local  # noqa: E402

LYING, DISC = 0.9, 1.7
"""Height, in spacings, below which a particle lies on the table, and how much wider it is drawn then."""
FAR = 2.0
"""Level set where no particle is near, in units of the spacing."""
GLASS = 222.0
MOST_LAYERS = 12


@dataclass(frozen=True)
class Liquid:
    """How a liquid looks."""

    absorption_3: tuple[float, float, float]
    """Of red, green, blue, 1/m."""
    scattering: float
    """1/m; above about 100 a cupful is opaque."""
    albedo_3: tuple[float, float, float]
    """Colour of scattered light, 0..1."""


LIQUIDS = {
    "water": Liquid((9.0, 4.0, 2.0), 2.0, (0.72, 0.85, 0.95)),
    "orange juice": Liquid((3.0, 25.0, 90.0), 60.0, (0.98, 0.6, 0.1)),
    "milk": Liquid((0.0, 1.0, 3.0), 320.0, (0.98, 0.96, 0.92)),
    "cola": Liquid((50.0, 95.0, 130.0), 8.0, (0.25, 0.1, 0.04)),
    "blueberry juice": Liquid((110.0, 60.0, 8.0), 14.0, (0.12, 0.22, 0.8)),
    "green tea": Liquid((45.0, 6.0, 60.0), 12.0, (0.35, 0.75, 0.2)),
    "tomato juice": Liquid((6.0, 90.0, 100.0), 90.0, (0.88, 0.16, 0.09)),
}


@dataclass
class Surface:
    """A level set, negative inside, in spacings; node (i, j, k) is at low_3 + spacing * (i, j, k)."""

    phi: np.ndarray
    low_3: np.ndarray
    spacing: float

    def volume(self) -> float:
        """Enclosed volume in m^3, by the share of each node's cell that is inside."""
        return float(np.clip(0.5 - self.phi, 0, 1).sum(dtype=np.float64)) * self.spacing**3


def surface_of(x_N3: np.ndarray, spacing: float) -> Surface:
    """Smoothed surface of particles [N, 3] whose distance from each other is about `spacing` metres."""
    margin = 5 * spacing
    low = np.floor((x_N3.min(0).astype(np.float64) - margin) / spacing) * spacing
    counts = np.ceil((x_N3.max(0) + margin - low) / spacing).astype(int) + 1
    sums = np.zeros((*counts, 4), np.float32)
    phi = np.empty(tuple(counts), np.float32)
    _level_set(x_N3, low, spacing, sums, phi)
    smooth = phi.copy()
    for source, target in ((phi, smooth), (smooth, phi), (phi, smooth)):
        _smooth(source, target)
    return Surface(smooth, low, spacing)


def draw_liquid(
    rgb_HWC: np.ndarray,
    depth_HW: np.ndarray,
    camera: Camera,
    surface: Surface | None,
    liquid: Liquid,
    light_3: np.ndarray,
    glasses: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The picture with liquid and clear cups in it, uint8, and where liquid is seen first [H, W] bool.

    `depth_HW`: metres along the view axis; `light_3`: where the light travels to; `glasses`: rows of
    clear cups. Raises ValueError when picture and depth differ in size.
    """
    if rgb_HWC.shape[:2] != depth_HW.shape:
        raise ValueError(f"picture and depth differ in size: {rgb_HWC.shape[:2]}, {depth_HW.shape}")
    if surface is None:
        surface = Surface(np.full((2, 2, 2), FAR, np.float32), np.zeros(3), 1e-3)
    out = np.empty(rgb_HWC.shape, np.uint8)
    seen = np.zeros(depth_HW.shape, np.bool_)
    rows = np.stack(glasses) if len(glasses) else np.zeros((0, WIDTH))
    _trace(
        np.ascontiguousarray(rgb_HWC), np.ascontiguousarray(depth_HW, dtype=np.float32), surface.phi,
        surface.low_3, surface.spacing, np.asarray(camera.position_3, np.float64),
        np.asarray(camera.rotation_33, np.float64),
        math.tan(math.radians(camera.fovy_deg) / 2), -np.asarray(light_3, np.float64),
        np.array(liquid.absorption_3), liquid.scattering, np.array(liquid.albedo_3), rows, out, seen,
    )  # fmt: skip
    return out, seen


@numba.njit(cache=True, error_model="numpy")
def _level_set(x_N3, low_3, spacing, sums, phi):
    """phi = |x - mean of particle positions near x| - radius, in spacings; kernel (1 - s^2)^3.

    Particles that lie on the table are drawn wide, so that they merge: a spill wets it.
    """
    nx, ny, nz = phi.shape
    inverse = 1.0 / spacing
    scale = 1.0 / (2.4 * 2.4)
    for p in range(x_N3.shape[0]):
        wide = DISC if x_N3[p, 2] < LYING * spacing else 1.0
        reach, thin = 2.4 * wide, 1.0 / wide
        gx = (x_N3[p, 0] - low_3[0]) * inverse
        gy = (x_N3[p, 1] - low_3[1]) * inverse
        gz = (x_N3[p, 2] - low_3[2]) * inverse
        for i in range(int(gx - reach) + 1, int(gx + reach) + 1):
            dx = (i - gx) * thin
            for j in range(int(gy - reach) + 1, int(gy + reach) + 1):
                dy = (j - gy) * thin
                flat = 1.0 - (dx * dx + dy * dy) * scale
                if flat <= 0:
                    continue
                for k in range(int(gz - 2.4) + 1, int(gz + 2.4) + 1):
                    dz = k - gz
                    q = flat - dz * dz * scale
                    if q > 0:
                        w = q * q * q
                        node = sums[np.uint64(i), np.uint64(j), np.uint64(k)]
                        node[0] += w * dx
                        node[1] += w * dy
                        node[2] += w * dz
                        node[3] += w
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                w = sums[i, j, k, 3]
                if w > 1e-5:
                    a, b, c = sums[i, j, k, 0] / w, sums[i, j, k, 1] / w, sums[i, j, k, 2] / w
                    phi[i, j, k] = min(math.sqrt(a * a + b * b + c * c) - 0.9, 2.0)
                else:
                    phi[i, j, k] = 2.0


@numba.njit(cache=True, error_model="numpy")
def _smooth(phi, out):
    nx, ny, nz = phi.shape
    for i in range(1, nx - 1):
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                around = phi[i - 1, j, k] + phi[i + 1, j, k] + phi[i, j - 1, k]
                around += phi[i, j + 1, k] + phi[i, j, k - 1] + phi[i, j, k + 1]
                out[i, j, k] = 0.4 * phi[i, j, k] + 0.1 * around


@numba.njit(cache=True, error_model="numpy", inline="always")
def _value(phi, x, y, z):
    x = min(max(x, 0.0), phi.shape[0] - 1.001)
    y = min(max(y, 0.0), phi.shape[1] - 1.001)
    z = min(max(z, 0.0), phi.shape[2] - 1.001)
    i, j, k = np.uint64(x), np.uint64(y), np.uint64(z)
    a, b, c = x - np.float64(i), y - np.float64(j), z - np.float64(k)
    i1, j1, k1 = i + np.uint64(1), j + np.uint64(1), k + np.uint64(1)
    low = (phi[i, j, k] * (1 - c) + phi[i, j, k1] * c) * (1 - b) + (
        phi[i, j1, k] * (1 - c) + phi[i, j1, k1] * c
    ) * b
    high = (phi[i1, j, k] * (1 - c) + phi[i1, j, k1] * c) * (1 - b) + (
        phi[i1, j1, k] * (1 - c) + phi[i1, j1, k1] * c
    ) * b
    return low * (1 - a) + high * a


@numba.njit(cache=True, error_model="numpy", inline="always")
def _span(phi, x, y, z, dx, dy, dz, most):
    """Part of a ray inside the grid, in spacings."""
    near, far = 0.0, most
    for axis in range(3):
        q = x if axis == 0 else (y if axis == 1 else z)
        d = dx if axis == 0 else (dy if axis == 1 else dz)
        if abs(d) < 1e-7:
            d = 1e-7
        first, last = -q / d, (phi.shape[axis] - 1.0 - q) / d
        near, far = max(near, min(first, last)), min(far, max(first, last))
    return near, far


@numba.njit(cache=True, error_model="numpy", inline="always")
def _inside(phi, x, y, z, dx, dy, dz):
    """Spacings of liquid along a ray, up to 14: for shadows."""
    near, far = _span(phi, x, y, z, dx, dy, dz, 1e6)
    t, total = near + 1.5, 0.0
    while t < far and total < 14.0:
        value = _value(phi, x + dx * t, y + dy * t, z + dz * t)
        if value < 0:
            total += 1.0
            t += 1.0
        else:
            t += max(0.7, 0.8 * value)
    return total


@numba.njit(cache=True, error_model="numpy")
def _layers(row, ox, oy, oz, dx, dy, dz, most, count, distance, alpha):
    """Append where a ray meets the outer wall, the rim and the bottom of a clear cup, with opacities."""
    x, y, z = to_local(row, ox, oy, oz)
    ax, ay, az = to_local(row, ox + dx, oy + dy, oz + dz)
    ax, ay, az = ax - x, ay - y, az - z
    inner, height, floor = row[19], row[20], row[21]
    radius = inner + row[22]
    a, b, c = ax * ax + ay * ay, x * ax + y * ay, x * x + y * y - radius * radius
    root = b * b - a * c
    if root > 0 and a > 1e-9:
        for side in (-1.0, 1.0):
            t = (-b + side * math.sqrt(root)) / a
            h = z + t * az
            if 0 < t < most and -floor < h < height and count < MOST_LAYERS:
                facing = abs(((x + t * ax) * ax + (y + t * ay) * ay) / radius)
                opacity = 0.05 + 0.5 * (1.0 - min(facing, 1.0)) ** 3
                if h > height - 0.0045:
                    opacity = max(opacity, 0.5)
                elif h < 0.001:
                    opacity = max(opacity, 0.28)
                distance[count], alpha[count] = t, min(opacity, 0.8)
                count += 1
    if abs(az) > 1e-6:
        t = -z / az
        px, py = x + t * ax, y + t * ay
        if 0 < t < most and px * px + py * py < radius * radius and count < MOST_LAYERS:
            distance[count], alpha[count] = t, 0.1
            count += 1
    return count


@numba.njit(cache=True, error_model="numpy")
def _trace(
    rgb, depth, phi, low_3, spacing, eye_3, rotation_33, tangent, light_3, absorption_3, scattering, albedo_3,
    glasses, out, seen,
):  # fmt: skip
    height, width = depth.shape
    distance, alpha = np.empty(MOST_LAYERS), np.empty(MOST_LAYERS)
    colour, d = np.empty(3), np.empty(3)
    ox, oy, oz = (
        (eye_3[0] - low_3[0]) / spacing,
        (eye_3[1] - low_3[1]) / spacing,
        (eye_3[2] - low_3[2]) / spacing,
    )
    lx, ly, lz = light_3[0], light_3[1], light_3[2]
    for py in range(height):
        for px in range(width):
            sx = (2.0 * (px + 0.5) / width - 1.0) * tangent * width / height
            sy = (1.0 - 2.0 * (py + 0.5) / height) * tangent
            length = math.sqrt(sx * sx + sy * sy + 1.0)
            for c in range(3):
                d[c] = (rotation_33[c, 0] * sx + rotation_33[c, 1] * sy - rotation_33[c, 2]) / length
                colour[c] = rgb[py, px, c]
            most = depth[py, px] * length
            if most < 3.0:
                t = most / spacing
                shade = _inside(phi, ox + d[0] * t, oy + d[1] * t, oz + d[2] * t, lx, ly, lz) * spacing
                if shade > 0:
                    for c in range(3):
                        colour[c] *= 0.72 + 0.28 * math.exp(-(absorption_3[c] + scattering) * shade)
            # First surface along the ray, by sphere tracing.
            near, far = _span(phi, ox, oy, oz, d[0], d[1], d[2], most / spacing)
            hit, t, before, where = False, near, 1.0, near
            while t < far:
                value = _value(phi, ox + d[0] * t, oy + d[1] * t, oz + d[2] * t)
                if value < 0:
                    hit = True
                    t = where + (t - where) * before / (before - value)
                    break
                before, where = value, t
                t += max(0.35, 0.7 * value)
            layers = 0
            for n in range(glasses.shape[0]):
                layers = _layers(
                    glasses[n], eye_3[0], eye_3[1], eye_3[2], d[0], d[1], d[2], most, layers, distance, alpha
                )
            for a in range(layers):
                for b in range(a + 1, layers):
                    if distance[b] > distance[a]:
                        distance[a], distance[b] = distance[b], distance[a]
                        alpha[a], alpha[b] = alpha[b], alpha[a]
            done = 0
            while hit and done < layers and distance[done] > t * spacing:
                for c in range(3):
                    colour[c] += alpha[done] * (GLASS - colour[c])
                done += 1
            if hit:
                seen[py, px] = True
                _shade(
                    rgb, depth, phi, spacing, low_3, eye_3, rotation_33, tangent, light_3, absorption_3,
                    scattering, albedo_3, ox + d[0] * t, oy + d[1] * t, oz + d[2] * t, d, colour,
                )  # fmt: skip
            while done < layers:
                for c in range(3):
                    colour[c] += alpha[done] * (GLASS - colour[c])
                done += 1
            for c in range(3):
                out[py, px, c] = np.uint8(min(max(colour[c] + 0.5, 0.0), 255.0))


@numba.njit(cache=True, error_model="numpy")
def _shade(
    rgb, depth, phi, spacing, low_3, eye_3, rotation_33, tangent, light_3, absorption_3, scattering, albedo_3,
    x, y, z, d, colour,
):  # fmt: skip
    """Light from the liquid at (x, y, z) to the eye; `colour` holds the background and gets it."""
    height, width = depth.shape
    nx = _value(phi, x + 1, y, z) - _value(phi, x - 1, y, z)
    ny = _value(phi, x, y + 1, z) - _value(phi, x, y - 1, z)
    nz = _value(phi, x, y, z + 1) - _value(phi, x, y, z - 1)
    norm = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9)
    nx, ny, nz = nx * norm, ny * norm, nz * norm
    facing = nx * d[0] + ny * d[1] + nz * d[2]
    if facing > 0:
        nx, ny, nz, facing = -nx, -ny, -nz, -facing
    fresnel = min(0.02 + 0.98 * (1.0 + facing) ** 5, 0.8)
    eta = 1.0 / 1.333
    bend = -(eta * facing + math.sqrt(1.0 - eta * eta * (1.0 - facing * facing)))
    rx, ry, rz = eta * d[0] + bend * nx, eta * d[1] + bend * ny, eta * d[2] + bend * nz
    t, gone, column, line = 0.5, 0.0, -1, -1
    while t < 60.0:
        gone = t
        value = _value(phi, x + rx * t, y + ry * t, z + rz * t)
        # Where the bent ray stands in the picture: a nearer depth there is a wall or a floor that ends it.
        wx = low_3[0] + (x + rx * t) * spacing - eye_3[0]
        wy = low_3[1] + (y + ry * t) * spacing - eye_3[1]
        wz = low_3[2] + (z + rz * t) * spacing - eye_3[2]
        away = -(rotation_33[0, 2] * wx + rotation_33[1, 2] * wy + rotation_33[2, 2] * wz)
        across = rotation_33[0, 0] * wx + rotation_33[1, 0] * wy + rotation_33[2, 0] * wz
        upward = rotation_33[0, 1] * wx + rotation_33[1, 1] * wy + rotation_33[2, 1] * wz
        i = int((1.0 - upward / away / tangent) * 0.5 * height)
        j = int((across / away / tangent * height / width + 1.0) * 0.5 * width)
        if 0 <= i < height and 0 <= j < width:
            line, column = i, j
            if depth[i, j] < away:
                break
        if value > 0:
            break
        t += 1.0
    through = gone * spacing
    if line >= 0:
        for c in range(3):
            colour[c] = 0.25 * colour[c] + 0.75 * rgb[line, column, c]
    lit = 0.5 + 0.5 * max(0.0, nx * light_3[0] + ny * light_3[1] + nz * light_3[2])
    hidden = math.exp(-scattering * through)
    mx, my, mz = d[0] - 2 * facing * nx, d[1] - 2 * facing * ny, d[2] - 2 * facing * nz
    rise = min(max(0.5 + 0.5 * mz, 0.0), 1.0)
    sky = 70.0 + 165.0 * rise * rise
    glint = 190.0 * max(0.0, mx * light_3[0] + my * light_3[1] + mz * light_3[2]) ** 60
    for c in range(3):
        body = colour[c] * math.exp(-absorption_3[c] * through) * hidden
        body += (1.0 - hidden) * 255.0 * albedo_3[c] * lit
        colour[c] = body + fresnel * (sky - body) + glint
