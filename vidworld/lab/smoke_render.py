"""Draw a smoke volume over a rendered picture: absorption, sun light through the smoke, ambient light.

Emission-absorption ray marching (Max, Optical Models for Direct Volume Rendering, 1995, eq. 8): the
transmittance of a segment ds is exp(-extinction density ds), Beer-Lambert. One ray is marched for every 2 x 2
block of the frame, which the box filter later makes one pixel; it stops at the nearest and again at the
farthest surface of the block, so that every pixel gets the smoke before its own depth. Light that reaches the
smoke and the surfaces is swept through the grid once a frame.
"""

from dataclasses import dataclass

import numpy as np

from vidworld.errors import ConfigError, require
from vidworld.lab.effect import Camera
from vidworld.lab.smoke_flow import F, bounds, sample

require("numba", "lab")

from numba import njit  # noqa: E402


@dataclass(frozen=True)
class SmokeLook:
    """How the smoke looks; colours are linear 0-1."""

    albedo_3: tuple[float, float, float] = (0.9, 0.9, 0.92)
    extinction: float = 30.0
    """Extinction at density 1, 1/m."""
    ambient: float = 0.45
    """Light that reaches smoke deep inside the plume, of full light 1."""
    sun: float = 0.75
    """Light of the sun on smoke that nothing shades."""
    shadow: float = 0.55
    """How dark a surface becomes in the full shadow of the smoke; 0: no shadow."""


@njit(cache=True, nogil=True)
def sweep_light(density, slope_x, slope_y, length, out):
    """Light along +z (index order) through density: out = transmittance at cell centres.

    The way to the sun leaves a cell by (-slope_x, -slope_y, -1) cells; `length` is extinction x its length.
    """
    nx, ny, nz = density.shape
    for k in range(nz):
        for i in range(nx):
            for j in range(ny):
                own = F(0.5) * length * density[i, j, k]
                if k == 0:
                    out[i, j, k] = np.exp(-own)
                    continue
                x, y = F(i) - slope_x, F(j) - slope_y
                if x < 0 or y < 0 or x > nx - 1 or y > ny - 1:
                    out[i, j, k] = np.exp(-own)
                    continue
                a, b = min(int(x), nx - 2), min(int(y), ny - 2)
                s, t = x - F(a), y - F(b)
                light, smoke = F(0), F(0)
                for m in range(2):
                    for n in range(2):
                        share = (s if m else F(1) - s) * (t if n else F(1) - t)
                        light += share * out[a + m, b + n, k - 1]
                        smoke += share * density[a + m, b + n, k - 1]
                out[i, j, k] = light * np.exp(-own - F(0.5) * length * smoke)


@njit(cache=True, nogil=True, inline="always")
def clip_ray(start, slope, low, high, near, far):
    """Part [near, far] of a ray on one axis inside [low, high]; far < near when it misses."""
    if abs(slope) < F(1e-7):
        return (near, far) if low <= start <= high else (F(1), F(0))
    a, b = (low - start) / slope, (high - start) / slope
    return max(near, min(a, b)), min(far, max(a, b))


@njit(cache=True, nogil=True)
def march(
    rgb, depth, density, light, box, origin, cell, eye, axes, tangent, colour, extinction, step, opacity
):
    """Composite over `rgb` [2H, 2W, 3] float32 0-255 by planar depth in metres; `opacity` [H, W] a block."""
    rows, columns = opacity.shape
    albedo, sun, ambient = colour
    half = F(0.5)
    ox, oy, oz = (eye[0] - origin[0]) / cell, (eye[1] - origin[1]) / cell, (eye[2] - origin[2]) / cell
    stop = np.empty(2, np.float32)
    through, glow = np.empty(2, np.float32), np.empty((2, 3), np.float32)
    for row in range(rows):
        for column in range(columns):
            opacity[row, column] = F(0)
            sx = (F(2) * (F(column) + half) / F(columns) - F(1)) * tangent * F(columns) / F(rows)
            sy = (F(1) - F(2) * (F(row) + half) / F(rows)) * tangent
            dx = axes[0, 0] * sx + axes[0, 1] * sy - axes[0, 2]
            dy = axes[1, 0] * sx + axes[1, 1] * sy - axes[1, 2]
            dz = axes[2, 0] * sx + axes[2, 1] * sy - axes[2, 2]
            near, far = F(0), F(1e9)
            near, far = clip_ray(ox, dx, F(box[0]), F(box[3]), near, far)
            near, far = clip_ray(oy, dy, F(box[1]), F(box[4]), near, far)
            near, far = clip_ray(oz, dz, F(box[2]), F(box[5]), near, far)
            if far <= near:
                continue
            i, j = 2 * row, 2 * column
            stop[0] = min(min(depth[i, j], depth[i + 1, j]), min(depth[i, j + 1], depth[i + 1, j + 1])) / cell
            stop[1] = max(max(depth[i, j], depth[i + 1, j]), max(depth[i, j + 1], depth[i + 1, j + 1])) / cell
            # The parameter of the ray is planar depth in cells; one unit of it is this long.
            stretch = np.sqrt(dx * dx + dy * dy + dz * dz)
            clear, red, green, blue = F(1), F(0), F(0), F(0)
            for part in range(2):
                end = min(far, stop[part])
                if end > near and clear > F(0.004):
                    count = max(1, int(np.ceil((end - near) * stretch / step)))
                    ds = (end - near) / F(count)
                    for n in range(count):
                        t = near + (F(n) + half) * ds
                        x, y, z = ox + dx * t - half, oy + dy * t - half, oz + dz * t - half
                        q = sample(density, x, y, z)
                        if q > F(1e-4):
                            lost = clear * (F(1) - np.exp(-extinction * cell * q * ds * stretch))
                            bright = ambient + sun * sample(light, x, y, z)
                            red += lost * bright * albedo[0]
                            green += lost * bright * albedo[1]
                            blue += lost * bright * albedo[2]
                            clear -= lost
                            if clear < F(0.004):
                                break
                    near = end
                through[part] = clear
                glow[part, 0], glow[part, 1], glow[part, 2] = red, green, blue
            if through[1] == F(1):
                continue
            span = stop[1] - stop[0]
            for m in range(2):
                for n in range(2):
                    share = (depth[i + m, j + n] / cell - stop[0]) / span if span > F(1e-3) else F(0)
                    kept = through[0] + share * (through[1] - through[0])
                    opacity[row, column] += F(0.25) * (F(1) - kept)
                    for c in range(3):
                        added = glow[0, c] + share * (glow[1, c] - glow[0, c])
                        rgb[i + m, j + n, c] = rgb[i + m, j + n, c] * kept + F(255) * added


@njit(cache=True, nogil=True)
def shade(rgb, depth, light, box, origin, cell, eye, axes, tangent, to_sun, strength):
    """Darken surfaces whose way to the sun crosses the smoke."""
    rows, columns = depth.shape
    half = F(0.5)
    for row in range(rows):
        sy = (F(1) - F(2) * (F(row) + half) / F(rows)) * tangent
        for column in range(columns):
            sx = (F(2) * (F(column) + half) / F(columns) - F(1)) * tangent * F(columns) / F(rows)
            far_away = depth[row, column]
            if far_away > F(6):
                continue
            x = (eye[0] + far_away * (axes[0, 0] * sx + axes[0, 1] * sy - axes[0, 2]) - origin[0]) / cell
            y = (eye[1] + far_away * (axes[1, 0] * sx + axes[1, 1] * sy - axes[1, 2]) - origin[1]) / cell
            z = (eye[2] + far_away * (axes[2, 0] * sx + axes[2, 1] * sy - axes[2, 2]) - origin[2]) / cell
            near, end = F(0), F(1e9)
            near, end = clip_ray(x, to_sun[0], F(box[0]), F(box[3]), near, end)
            near, end = clip_ray(y, to_sun[1], F(box[1]), F(box[4]), near, end)
            near, end = clip_ray(z, to_sun[2], F(box[2]), F(box[5]), near, end)
            if end <= near:
                continue
            x, y, z = x + near * to_sun[0] - half, y + near * to_sun[1] - half, z + near * to_sun[2] - half
            kept = F(1) - strength * (F(1) - sample(light, x, y, z))
            for c in range(3):
                rgb[row, column, c] *= kept


def sun_light(
    density_XYZ: np.ndarray, cell: float, extinction: float, light_direction_3: np.ndarray
) -> np.ndarray:
    """Transmittance [nx, ny, nz] of the smoke from the sun to each cell; light travels in the direction."""
    direction = np.asarray(light_direction_3, np.float64)
    direction = direction / np.linalg.norm(direction)
    main = int(np.argmax(np.abs(direction)))
    order = [axis for axis in range(3) if axis != main] + [main]
    flip = tuple(slice(None, None, -1 if axis == main and direction[main] < 0 else 1) for axis in order)
    aligned = np.ascontiguousarray(density_XYZ.transpose(order)[flip])
    along = abs(direction[main])
    slopes = (F(direction[order[0]] / along), F(direction[order[1]] / along))
    out = np.empty_like(aligned)
    sweep_light(aligned, *slopes, F(extinction * cell / along), out)
    return np.ascontiguousarray(out[flip].transpose(np.argsort(order)))


def draw_smoke(
    rgb_HWC: np.ndarray,
    depth_HW: np.ndarray,
    density_XYZ: np.ndarray,
    *,
    cell: float,
    origin_3: np.ndarray,
    camera: Camera,
    light_direction_3: np.ndarray,
    look: SmokeLook,
    step: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Composite smoke over a frame of even size: (uint8 [2H, 2W, 3], opacity [H, W] float32 in 0-1).

    `depth_HW` is planar depth in metres; `step` the march's step in cells; `light_direction_3` the way the
    light travels. Raises ConfigError when sizes do not fit.
    """
    rows, columns = depth_HW.shape
    if rows % 2 or columns % 2 or rgb_HWC.shape != (rows, columns, 3):
        expected = "rgb [2H, 2W, 3] and depth [2H, 2W]"
        raise ConfigError("frame to draw smoke on", got=(rgb_HWC.shape, depth_HW.shape), expected=expected)
    opacity = np.zeros((rows // 2, columns // 2), F)
    box = bounds(density_XYZ, F(1e-3))
    if box[3] <= box[0]:
        return rgb_HWC.copy(), opacity
    # Trilinear samples reach half a cell beyond the centres of the cells that hold smoke.
    box = np.concatenate([np.maximum(box[:3] - 1, 0), np.minimum(box[3:] + 1, density_XYZ.shape)])
    light = sun_light(density_XYZ, cell, look.extinction, light_direction_3)
    picture, depth = rgb_HWC.astype(F), np.ascontiguousarray(depth_HW, F)
    to_sun = (-np.asarray(light_direction_3) / np.linalg.norm(light_direction_3)).astype(F)
    view = (np.asarray(camera.position_3, F), np.ascontiguousarray(camera.rotation_33, F))
    tangent = F(np.tan(np.radians(camera.fovy_deg) / 2))
    grid = (box, np.asarray(origin_3, F), F(cell), *view, tangent)
    if look.shadow > 0:
        shade(picture, depth, light, *grid, to_sun, F(look.shadow))
    colour = (np.asarray(look.albedo_3, F), F(look.sun), F(look.ambient))
    march(picture, depth, density_XYZ, light, *grid, colour, F(look.extinction), F(step), opacity)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), opacity
