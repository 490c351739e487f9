"""Paint on a canvas: bristles that run dry, grain, wet mixing, drips, and the picture of it.

Pure NumPy and Numba, no renderer. Bristles follow Baxter et al. 2001 (DAB), colours Kubelka and Munk 1931,
drips the thin-film flux of Nusselt 1916. The canvas holds a film of each paint, so a mixture is exact
bookkeeping: what the buckets gave is on the canvas, in the brush or over the edge, to rounding.

Shapes: N texels a side, P paints, K bristles. Canvas coordinates in metres from its top left corner: u to the
right, v down, w into the canvas. Films are in micrometres, volumes in millilitres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numba
import numpy as np

PAINTS = MappingProxyType(
    {
        "red": (0.80, 0.05, 0.05),
        "blue": (0.05, 0.20, 0.72),
        "yellow": (0.97, 0.80, 0.05),
        "green": (0.05, 0.50, 0.18),
        "black": (0.05, 0.05, 0.06),
        "orange": (0.95, 0.42, 0.04),
        "purple": (0.40, 0.07, 0.52),
        "white": (0.96, 0.96, 0.94),
    }
)
"""Reflectance of each paint in RGB when thick."""

DENSITY = 1200.0
"""kg/m3."""
GRAVITY = 9.81
OPAQUE_UM = 22.0
"""Film over which the canvas shows through by a factor of e less."""
THICKEST_UM = 620.0
"""A brush leaves no more than this."""
FULL_ML = 2.5
"""Load of a brush that touches the valleys of the canvas too; a drier one skips them."""
RINSED = 0.94
"""Share of the old paint that a dip takes out of the brush."""
GATHERING = 0.8
"""Of what runs down a texel, how much more moves sideways into a run."""
CONTACT_DEPTH = 0.003
"""Metres that a bristle is pressed in until it wets fully."""


@dataclass(frozen=True)
class PaintConfig:
    """Resolution of the canvas and of the brush."""

    texels: int = 288
    bristles: int = 96
    mixing: float = 0.10
    """Share of the wet paint under a bristle that trades places with the bristle's in a texel of travel."""
    drip_steps: int = 2
    """Drip updates a frame."""


class Brush:
    """Bristles with their loads.

    offsets_K2: rest positions in metres along the brush's width and thickness; load_KP: paint in each, mL.
    """

    def __init__(
        self, half_width: float, half_thickness: float, paints: int, bristles: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        unit_K2 = rng.uniform(-1, 1, (bristles, 2))
        self.offsets_K2 = unit_K2 * (half_width, half_thickness)
        # Outer bristles are a little shorter, so that a light touch draws a narrow line.
        self.shortness_K = 0.004 * np.abs(unit_K2[:, 0]) ** 2 * rng.uniform(0.3, 1, bristles)
        share_K = rng.uniform(0.5, 1.5, bristles)
        self.share_K = share_K / share_K.sum()
        self.load_KP = np.zeros((bristles, paints))

    def dip(self, paint: int, load_ml: float) -> np.ndarray:
        """Fill every bristle to its share of `load_ml` with a paint; most of what was in it is rinsed out.

        Returns what the bucket gave of each paint [P] in mL; negative is what it took.
        """
        before_P = self.volume_P
        self.load_KP *= 1 - RINSED
        self.load_KP[:, paint] += np.maximum(self.share_K * load_ml - self.load_KP.sum(1), 0)
        return self.volume_P - before_P

    @property
    def volume_P(self) -> np.ndarray:
        """Paint in the brush by colour, mL."""
        return self.load_KP.sum(0)

    def tips(self, position_3: np.ndarray, rotation_33: np.ndarray) -> np.ndarray:
        """Tips of the unbent bristles [K, 3] of a brush whose columns are width, thickness and direction."""
        width, thickness, along = rotation_33.T
        offsets = self.offsets_K2[:, :1] * width + self.offsets_K2[:, 1:] * thickness
        return position_3 + offsets - self.shortness_K[:, None] * along


class Canvas:
    """A square canvas and the wet paint on it.

    Args:
        width: Side in metres.
        base_rgb: [N, N, 3] in [0, 1], the bare canvas.
        paints: Names out of `PAINTS`.
        seed: Of the grain and of where the canvas holds paint best.
    """

    def __init__(
        self, width: float, base_rgb: np.ndarray, paints: Sequence[str], seed: int, config: PaintConfig
    ) -> None:
        texels = config.texels
        assert base_rgb.shape == (texels, texels, 3), base_rgb.shape
        self.width, self.config = width, config
        self.texel = width / texels
        self.paints = tuple(paints)
        self.reflectance_P3 = np.array([PAINTS[name] for name in paints])
        rng = np.random.default_rng(seed)
        self.base_rgb = base_rgb.astype(np.float64)
        self.film_NNP = np.zeros((texels, texels, len(paints)))
        self.grain_NN = weave(texels, rng)
        # Columns differ in what they hold, so a heavy film breaks into separate runs as real paint does.
        columns = np.convolve(rng.uniform(-1, 1, texels + 4), np.array([0.1, 0.25, 0.3, 0.25, 0.1]), "valid")
        self.hold_NN = np.clip(
            150 + 130 * columns[None] + 25 * rng.uniform(-1, 1, (texels, texels)), 60, None
        )
        self.lost_P = np.zeros(len(paints))
        self.box_4 = np.array([texels, 0, texels, 0])
        self.shaded_NN3 = np.rint(255 * np.clip(self.base_rgb, 0, 1)).astype(np.uint8)

    @property
    def texel_ml(self) -> float:
        """Millilitres in a film of one micrometre on one texel."""
        return self.texel**2  # m2 * 1e-6 m * 1e6 mL/m3

    @property
    def volume_P(self) -> np.ndarray:
        """Paint on the canvas by colour, mL."""
        return self.film_NNP[self._painted].sum((0, 1)) * self.texel_ml

    @property
    def _painted(self) -> tuple[slice, slice]:
        """The window outside of which there is no paint."""
        top, bottom, left, right = self.box_4
        return slice(top, max(bottom, top)), slice(left, max(right, left))

    def stroke(self, brush: Brush, start_K3: np.ndarray, end_K3: np.ndarray, depletion: float) -> bool:
        """Drag the tips of a brush along straight lines in canvas coordinates; w > 0 is pressed in.

        A bristle gives 1 - exp(-distance / depletion) of its load where it is pressed in fully. `depletion`
        is in metres. Returns whether any bristle touched.
        """
        if max(start_K3[:, 2].max(), end_K3[:, 2].max()) <= 0:
            return False
        return _stroke(
            self.film_NNP,
            self.grain_NN,
            self.box_4,
            brush.load_KP,
            start_K3[:, :2] / self.texel,
            end_K3[:, :2] / self.texel,
            np.maximum(start_K3[:, 2], 0),
            np.maximum(end_K3[:, 2], 0),
            depletion / self.texel,
            self.config.mixing,
            FULL_ML / len(brush.load_KP),
            self.texel_ml,
        )

    def drip(self, seconds: float, viscosity: float, slope: float) -> None:
        """Let what the canvas cannot hold run down.

        Nusselt's film: q = density g slope h^3 / (3 viscosity) per metre of width, with h the film above what
        the canvas holds. viscosity: Pa s; slope: sine of the tilt, 0 lies flat.
        """
        top, bottom, left, right = self.box_4
        if slope <= 0 or bottom <= top:
            return
        rate = DENSITY * GRAVITY * slope / (3 * viscosity) * 1e-12 / self.texel  # um h^-3 s^-1 of um^3
        for _ in range(self.config.drip_steps):
            bottom = _drip(
                self.film_NNP,
                self.hold_NN,
                self.lost_P,
                rate * seconds / self.config.drip_steps,
                self.texel_ml,
                top,
                bottom,
                left,
                right,
            )
        self.box_4[1] = bottom

    def shade(self, light_3: np.ndarray) -> np.ndarray:
        """The picture [N, N, 3] uint8, row 0 at the top; `light_3`: unit vector to the light (u, v, -w)."""
        top, bottom, left, right = self.box_4
        if bottom > top:
            texels = len(self.film_NNP)
            window = (max(top - 1, 0), min(bottom + 1, texels), max(left - 1, 0), min(right + 1, texels))
            _shade(self.film_NNP, self.base_rgb, self.reflectance_P3, light_3, self.shaded_NN3, *window)
        return self.shaded_NN3

    def streak(self, opacity: float = 0.35) -> np.ndarray:
        """Where paint is seen, bool [N, N]: the film hides at least `opacity` of the canvas."""
        seen = np.zeros(self.film_NNP.shape[:2], bool)
        seen[self._painted] = self.film_NNP[self._painted].sum(2) > -OPAQUE_UM * np.log1p(-opacity)
        return seen

    @property
    def lowest(self) -> float:
        """How far down paint is seen: 0 for none, 1 at the lower edge."""
        rows = np.flatnonzero(self.streak().any(1))
        return float(rows[-1] + 1) / len(self.film_NNP) if len(rows) else 0.0

    def coverage_P(self) -> np.ndarray:
        """Share of the canvas that is seen painted, by the paint that is most of the film."""
        most = self.film_NNP[self._painted].argmax(2)[self.streak()[self._painted]]
        return np.bincount(most, minlength=len(self.paints)) / self.film_NNP[..., 0].size


def weave(texels: int, rng: np.random.Generator) -> np.ndarray:
    """Height of a canvas's threads [N, N] in [0, 1]: a plain weave with uneven threads. 0 is a high spot."""
    warp, weft = (0.5 + 0.5 * np.sin(np.arange(texels) * np.pi / 1.5 + rng.uniform(0, 6)) for _ in range(2))
    threads = 0.5 * (warp[None] + weft[:, None])
    noise = rng.uniform(0, 1, (texels, texels))
    blurred = sum(np.roll(noise, (dy, dx), (0, 1)) for dy in range(-1, 2) for dx in range(-1, 2)) / 9
    return np.clip(0.4 * threads + 1.3 * (blurred - 0.5) + 0.25 * noise + 0.175, 0, 1)


def mixed_colour(amounts_P: np.ndarray, reflectance_P3: np.ndarray) -> np.ndarray:
    """Colour [3] of a thick mixture: K/S = (1 - R)^2 / 2R adds in proportion (Kubelka and Munk).

    So blue and yellow make green. An empty mixture counts as one of equal parts.
    """
    total = amounts_P.sum()
    shares = amounts_P / total if total > 0 else np.full(len(amounts_P), 1 / len(amounts_P))
    absorbed = shares @ ((1 - reflectance_P3) ** 2 / (2 * reflectance_P3))
    return 1 + absorbed - np.sqrt(absorbed**2 + 2 * absorbed)


@numba.njit(cache=True)
def _stroke(film, grain, box, load, start, end, depth_start, depth_end, depletion, mixing, full, texel_ml):
    texels, paints = film.shape[0], film.shape[2]
    touched = False
    weight = np.empty((3, 3))
    for k in range(load.shape[0]):
        if depth_start[k] <= 0 and depth_end[k] <= 0:
            continue
        along_u, along_v = end[k, 0] - start[k, 0], end[k, 1] - start[k, 1]
        length = np.sqrt(along_u * along_u + along_v * along_v)
        steps = int(length / 0.7) + 1
        travel = length / steps
        for step in range(steps):
            a = (step + 0.5) / steps
            depth = depth_start[k] + (depth_end[k] - depth_start[k]) * a
            contact = min(1.0, depth / CONTACT_DEPTH)
            u, v = start[k, 0] + along_u * a, start[k, 1] + along_v * a
            iu, iv = int(np.floor(u)), int(np.floor(v))
            if contact <= 0 or iu < 1 or iv < 1 or iu >= texels - 1 or iv >= texels - 1:
                continue
            touched = True
            held = 0.0
            for p in range(paints):
                held += load[k, p]
            total = 0.0
            for dv in range(3):
                for du in range(3):
                    x, y = iu + du - 0.5 - u, iv + dv - 0.5 - v
                    weight[dv, du] = np.exp(-0.9 * (x * x + y * y))
                    total += weight[dv, du]
            gives = held * (1 - np.exp(-travel / depletion)) * contact
            given = 0.0
            for dv in range(3):
                for du in range(3):
                    y, x = iv + dv - 1, iu + du - 1
                    share = weight[dv, du] / total
                    thick = 0.0
                    for p in range(paints):
                        thick += film[y, x, p]
                    if thick > 0 and held > given:
                        swap = mixing * contact * min(travel, 1.0) * weight[dv, du]
                        swap *= min(thick * texel_ml, held - given)
                        keep, left = swap / (thick * texel_ml), swap / (held - given)
                        for p in range(paints):
                            down, up = left * load[k, p], keep * film[y, x, p] * texel_ml
                            load[k, p] += up - down
                            film[y, x, p] += (down - up) / texel_ml
                    amount = gives * share * max(0.0, 1 - thick / THICKEST_UM)
                    if held / full < grain[y, x]:
                        amount *= 0.03  # dry brush: only the high spots take paint
                    if amount > 0:
                        part = amount / (held - given)
                        for p in range(paints):
                            moved = load[k, p] * part
                            load[k, p] -= moved
                            film[y, x, p] += moved / texel_ml
                        given += amount
            box[0], box[1] = min(box[0], iv - 1), max(box[1], iv + 2)
            box[2], box[3] = min(box[2], max(iu - 4, 0)), max(box[3], min(iu + 5, texels))
    return touched


@numba.njit(cache=True)
def _drip(film, hold, lost, rate, texel_ml, top, bottom, left, right):
    texels, paints = film.shape[0], film.shape[2]
    lowest = bottom
    for y in range(bottom - 1, top - 1, -1):
        for x in range(left, right):
            thick = 0.0
            for p in range(paints):
                thick += film[y, x, p]
            excess = thick - hold[y, x]
            if excess <= 0:
                continue
            flows = min(rate * excess * excess * excess, 0.5 * excess)
            part, aside = flows / thick, GATHERING * flows / thick
            lowest = max(lowest, min(y + 2, texels))
            beside = x  # surface tension pulls the film into the runs, where the canvas holds least
            for near in (max(x - 1, left), min(x + 1, right - 1)):
                if hold[y, near] < hold[y, beside]:
                    beside = near
            for p in range(paints):
                moved, gathered = part * film[y, x, p], aside * film[y, x, p]
                film[y, x, p] -= moved + gathered
                film[y, beside, p] += gathered
                if y + 1 < texels:
                    film[y + 1, x, p] += moved
                else:
                    lost[p] += moved * texel_ml
    return lowest


@numba.njit(cache=True)
def _relief(film, y, x):
    """Height of the film for shading, micrometres that level off: thick ridges do not turn into cliffs."""
    thick = 0.0
    for p in range(film.shape[2]):
        thick += film[y, x, p]
    return thick / (1 + thick / 250)


@numba.njit(cache=True)
def _shade(film, base, reflectance, light, out, top, bottom, left, right):
    texels, paints = film.shape[0], film.shape[2]
    absorbing = (1 - reflectance) ** 2 / (2 * reflectance)
    half = np.array([light[0], light[1], light[2] + 1])
    half /= np.sqrt((half * half).sum())
    flat = half[2] ** 24
    for y in range(top, bottom):
        for x in range(left, right):
            thick = 0.0
            for p in range(paints):
                thick += film[y, x, p]
            if thick <= 0:
                continue
            slope_u = _relief(film, y, min(x + 1, texels - 1)) - _relief(film, y, max(x - 1, 0))
            slope_v = _relief(film, min(y + 1, texels - 1), x) - _relief(film, max(y - 1, 0), x)
            nu, nv = -0.004 * slope_u, -0.004 * slope_v
            norm = 1 / np.sqrt(nu * nu + nv * nv + 1)
            lit = (nu * light[0] + nv * light[1] + light[2]) * norm / max(light[2], 0.3)
            lit = min(1.12, max(0.72, 0.35 + 0.65 * lit))
            shine = max(0.0, (nu * half[0] + nv * half[1] + half[2]) * norm) ** 24 - flat
            hidden = 1 - np.exp(-thick / OPAQUE_UM)
            gloss = 0.35 * hidden * max(0.0, shine)
            for c in range(3):
                absorbed = 0.0
                for p in range(paints):
                    absorbed += film[y, x, p] * absorbing[p, c]
                absorbed /= thick
                colour = 1 + absorbed - np.sqrt(absorbed * absorbed + 2 * absorbed)
                value = base[y, x, c] + hidden * (colour * lit - base[y, x, c]) + gloss
                out[y, x, c] = np.uint8(min(255.0, max(0.0, 255 * value + 0.5)))
