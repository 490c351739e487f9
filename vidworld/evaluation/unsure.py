"""How sure the futures of a scene are of themselves: curves, maps over the pictures, and when to stop.

Shapes: N futures, T camera frames, L latent frames (steps), V views, H W pixels, S proprio dims.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld import media, plots
from vidworld.contract import ActionContract
from vidworld.errors import ConfigError
from vidworld.evaluation.grounding import Recording
from vidworld.evaluation.imagining import Imagined
from vidworld.evaluation.rollout_files import side_by_side
from vidworld.world.calibration import PIXELS, PROPRIO, Calibration
from vidworld.world.uncertainty import Rows, Split

OPEN_COLOR, UNKNOWN_COLOR = (245, 158, 11), (217, 70, 239)
"""Of the maps: amber is what the world leaves open, magenta what the model does not know."""
BLUR = 5
"""Maps are means over so many pixels a side: variances from few samples are grainy."""
LEAST_SCALE = 0.02
"""Spread, of a range of 1, that a map shows in full colour at least; less is not worth a colour."""


@dataclass(frozen=True)
class Unsure:
    """Variances of one scene's futures: `open` is A, `unknown` is E and None for one member."""

    samples: int
    """Futures of each member."""
    open_TVHW: np.ndarray
    """Of pixels from 0 to 1, the mean over colours."""
    unknown_TVHW: np.ndarray | None
    proprio: Split
    """[1, L, S] in squared units."""
    readings: Mapping[str, Split]
    """Name -> [1, T] of what was read off the pictures."""

    @property
    def pixels(self) -> dict[str, np.ndarray]:
        """Standard deviations [T]: root means over the picture."""
        parts = {"open": self.open_TVHW, "unknown": self.unknown_TVHW}
        return {name: _root(part.mean((1, 2, 3))) for name, part in parts.items() if part is not None}

    def spread(self, steps: int) -> np.ndarray:
        """Standard deviation of pixels [L], open and unknown together, over the frames of each step."""
        total_T = self.open_TVHW.mean((1, 2, 3))
        if self.unknown_TVHW is not None:
            total_T = total_T + np.maximum(self.unknown_TVHW.mean((1, 2, 3)), 0)
        return np.sqrt(total_T.reshape(steps, -1).mean(1))

    def facts(self, contract: ActionContract) -> dict[str, Any]:
        """Curves of standard deviations for the record, as plain JSON."""
        dims = [(dimension.name, index) for index, dimension in enumerate(contract.proprio)]
        return {
            "samples_of_each_member": self.samples,
            "pixels": {name: _rounded(curve) for name, curve in self.pixels.items()},
            "proprio": {name: _parts(self.proprio.map(lambda x, i=i: x[0, :, i])) for name, i in dims},
            **(
                {"readings": {name: _parts(one.map(lambda x: x[0])) for name, one in self.readings.items()}}
                if self.readings
                else {}
            ),
        }


def measure(found: Imagined, readings: Mapping[str, np.ndarray] | None = None) -> Unsure:
    """Part the spread of the futures of one scene. Raises ConfigError for fewer than 2 of each member."""
    members = sorted(set(found.member_N.tolist()))
    samples = len(found.member_N) // len(members)
    rows = Rows(torch.zeros(len(found.member_N), dtype=torch.int64), torch.from_numpy(found.member_N))
    return Unsure(
        samples,
        *pixel_variances(found.video_NTVHWC, found.member_N),
        rows.split(torch.from_numpy(found.proprio_NTS.astype(np.float64))),
        {
            name: rows.split(torch.from_numpy(np.asarray(v, np.float64)))
            for name, v in (readings or {}).items()
        },
    )


def pixel_variances(video_NTVHWC: np.ndarray, member_N: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """A and E [T, V, H, W] of uint8 pictures from 0 to 1, means over colours; no E for one member."""
    rows = Rows(torch.zeros(len(member_N), dtype=torch.int64), torch.from_numpy(member_N))
    opened, unknown = [], []
    for frame_NVHWC in np.moveaxis(video_NTVHWC, 1, 0):
        parted = rows.split(torch.from_numpy(frame_NVHWC).float() / 255).map(lambda x: x[0].mean(-1))
        opened.append(parted.aleatoric_SX.numpy())
        if parted.epistemic_SX is not None:
            unknown.append(parted.epistemic_SX.numpy())
    return np.stack(opened), np.stack(unknown) if unknown else None


# When to stop


@dataclass(frozen=True)
class Stop:
    """Where a rollout is no longer to be trusted."""

    steps: int
    """Latent frames that are kept."""
    quantity: str
    radius: float
    """Of the first frame that is left out: how far off its mean may be."""
    tolerance: float
    covered: int
    """Steps that the calibration's coverage is stated for."""
    coverage: float

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "steps_kept": self.steps,
            "because": f"{self.quantity}: the truth may be {self.radius:.4g} from the mean, more than the "
            f"tolerance of {self.tolerance:.4g}, at {self.coverage:.0%} coverage",
            "quantity": self.quantity,
            "radius": self.radius,
            "tolerance": self.tolerance,
            "coverage": self.coverage,
            "steps_covered": self.covered,
        }


def parse_tolerances(given: Sequence[str]) -> dict[str, float]:
    """`pixels=0.1`, `proprio NAME=0.02`; raises ConfigError."""
    found: dict[str, float] = {}
    for one in given:
        name, equals, value = one.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        known = name == PIXELS or name.startswith(f"{PROPRIO} ")
        if not equals or not known or not number > 0:
            raise ConfigError("--tolerance", got=one, expected="pixels=0.1 or 'proprio NAME=0.02', above 0")
        found[name] = number
    if not found:
        raise ConfigError("--tolerance", got="nothing", expected="pixels=0.1, for instance")
    return found


def stop(
    unsure: Unsure,
    calibration: Calibration,
    contract: ActionContract,
    tolerances: Mapping[str, float],
) -> Stop | None:
    """Where the conformal radius of a quantity first exceeds its tolerance; None where none does.

    Radii come from `calibration.json`, with the spread over all futures. Raises ConfigError for a quantity
    that was not calibrated.
    """
    steps = unsure.proprio.mean_SX.shape[1]
    names = [dimension.name for dimension in contract.proprio]
    first: Stop | None = None
    for quantity, tolerance in tolerances.items():
        radii = calibration.radii(contract.embodiment, quantity)
        if quantity == PIXELS:
            spread_L = unsure.spread(steps)
        else:
            index = names.index(quantity.removeprefix(f"{PROPRIO} "))
            spread_L = unsure.proprio.total_SX[0, :, index].sqrt().numpy()
        radius_L = radii(spread_L)
        beyond = np.nonzero(radius_L > tolerance)[0]
        if len(beyond) and (first is None or beyond[0] < first.steps):
            conformal = calibration.conformal[contract.embodiment]
            at = int(beyond[0])
            first = Stop(at, quantity, float(radius_L[at]), tolerance, conformal.leads, conformal.coverage)
    return first


# What it looks like


def overlay(unsure: Unsure, video_TVHWC: np.ndarray) -> dict[str, np.ndarray]:
    """The pictures in grey with what is open, and what is unknown, in colour; views side by side.

    Both have one scale: full colour is the largest spread of either, so that they compare. Captions say it.
    """
    maps = {"open": unsure.open_TVHW, "unknown": unsure.unknown_TVHW}
    smooth = {name: _root(_blurred(part)) for name, part in maps.items() if part is not None}
    scale = max(LEAST_SCALE, *(float(np.quantile(part, 0.999)) for part in smooth.values()))
    grey_TVHW1 = video_TVHWC.astype(np.float32).mean(-1, keepdims=True)
    shown = {}
    for name, part in smooth.items():
        color = np.array(OPEN_COLOR if name == "open" else UNKNOWN_COLOR, np.float32)
        weight = np.clip(part / scale, 0, 1)[..., None]
        mixed = (1 - weight) * (0.75 * grey_TVHW1 + 0.25 * 255) + weight * color
        shown[f"{name}, full colour {scale:.2f}"] = side_by_side(mixed.round().astype(np.uint8))
    return shown


def maps_video(unsure: Unsure, context_THWC: np.ndarray, sample_TVHWC: np.ndarray) -> np.ndarray:
    """One future beside its maps, the prompt in front."""
    rows = {"sample 0": side_by_side(sample_TVHWC), **overlay(unsure, sample_TVHWC)}
    faded = (0.75 * context_THWC.astype(np.float32).mean(-1, keepdims=True) + 0.25 * 255).round()
    plain = np.repeat(faded.astype(np.uint8), 3, -1)
    videos = [
        np.concatenate([context_THWC if index == 0 else plain, video])
        for index, video in enumerate(rows.values())
    ]
    return media.grid(videos, len(videos), labels=list(rows), height=192)


def fan(
    name: str, unit: str, time_T: np.ndarray, values_NT: np.ndarray, recorded_T: np.ndarray | None
) -> plots.Panel:
    """A fan chart: median, the middle half and the middle 90 % of the futures, and what was recorded."""
    low, lower, middle, upper, high = np.quantile(values_NT, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    label = "futures: median, middle 50 % and 90 %"
    lines = [
        plots.Line(label, time_T, middle, low, high),
        plots.Line(label, time_T, middle, lower, upper),
    ]
    if recorded_T is not None:
        lines.append(plots.Line("recorded", time_T[: len(recorded_T)], recorded_T))
    shown = "" if unit in ("", "1", "unknown") else f" [{unit}]"
    return plots.Panel(tuple(lines), name, "time [s]", f"value{shown}")


def fans(found: Imagined, contract: ActionContract, fps: float, truth: Recording | None) -> list[plots.Panel]:
    """Fan charts of all proprioception."""
    steps = found.proprio_NTS.shape[1]
    k = found.video_NTVHWC.shape[1] // steps
    time_L = np.arange(1, steps + 1) * k / fps
    recorded_LS = None if truth is None else truth.proprio_TS[k - 1 :: k][:steps]
    return [
        fan(
            dimension.name,
            dimension.unit,
            time_L,
            found.proprio_NTS[:, :, index],
            None if recorded_LS is None else recorded_LS[:, index],
        )
        for index, dimension in enumerate(contract.proprio)
    ]


def spreads(unsure: Unsure, fps: float) -> plots.Panel:
    """What is open and what is unknown in the pictures, over time."""
    names = {"open": "open (aleatoric)", "unknown": "unknown (epistemic)"}
    time_T = np.arange(1, len(unsure.open_TVHW) + 1) / fps
    lines = [plots.Line(names[name], time_T, curve) for name, curve in unsure.pixels.items()]
    return plots.Panel(tuple(lines), "Spread of pixels", "time [s]", "standard deviation, of 1")


def arrays(unsure: Unsure, contract: ActionContract) -> dict[str, np.ndarray]:
    """Variances for a file; nothing is cut at zero."""
    names = np.array([dimension.name for dimension in contract.proprio])
    found = {"names": names, "pixels_open_TVHW": unsure.open_TVHW.astype(np.float32)}
    if unsure.unknown_TVHW is not None:
        found["pixels_unknown_TVHW"] = unsure.unknown_TVHW.astype(np.float32)
    for prefix, one in (("proprio", unsure.proprio), *unsure.readings.items()):
        axes = "TS" if prefix == "proprio" else "T"
        cut = len(names) if prefix == "proprio" else None
        parts = {"open": one.aleatoric_SX, "unknown": one.epistemic_SX}
        for part, values in parts.items():
            if values is not None:
                found[f"{prefix}_{part}_{axes}"] = values[0][..., :cut].numpy().astype(np.float32)
    return found


def _blurred(variance_TVHW: np.ndarray) -> np.ndarray:
    maps = torch.from_numpy(variance_TVHW).float().flatten(0, 1)[:, None]
    mean = F.avg_pool2d(maps, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    return mean[:, 0].unflatten(0, variance_TVHW.shape[:2]).numpy()


def _root(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(variance, 0))


def _parts(one: Split) -> dict[str, list[float]]:
    parts: dict[str, Tensor | None] = {"open": one.aleatoric_SX, "unknown": one.epistemic_SX}
    return {name: _rounded(_root(part.numpy())) for name, part in parts.items() if part is not None}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
