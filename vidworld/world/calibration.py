"""`calibration.json` beside a run: factors on its sampler's noise, and how far off its mean may be.

`vidworld calibrate` writes it and `vidworld.load` applies it. It belongs to one set of weights and one way of
sampling. A lead counts imagined latent frames since the last known one, from 1.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.config import digest, from_mapping, to_mapping
from vidworld.errors import CheckpointError, ConfigError
from vidworld.files import write_atomic
from vidworld.world.noise_scale import NoiseScale
from vidworld.world.spec import SamplerConfig, read_json

FILE_NAME = "calibration.json"
SCHEMA_VERSION = 1
LATENTS, PIXELS, PROPRIO = "latents", "pixels", "proprio"
"""Quantities: root mean squares over a frame's latents and over its pixels (0 to 1), and all proprioception
at once; `proprio NAME` is one dimension."""
SAMPLING = ("steps", "method", "context_noise", "sink", "guidance", "temperature", "start_noise", "window")
"""What a calibration depends on, beside the weights."""


@dataclass(frozen=True)
class Radii:
    """How far the truth is from the samples' mean, at most, with the stated coverage over all leads at once.

    |mean - truth|_t <= multiplier * sqrt(spread_t^2 + floor_t^2), where spread is the samples' standard
    deviation (ddof 1) of a dimension, or the root of the mean variance of latents or pixels: split-conformal
    bands with a normalised score (Lei et al. 2018, section 5.2), its maximum over time, and episodes as unit.
    """

    unit: str
    multiplier: float
    floor: tuple[float, ...]
    """Error at each lead that the spread does not tell; the last one holds for later leads."""

    def __call__(self, spread_T: Sequence[float] | np.ndarray, first_lead: int = 1) -> np.ndarray:
        """Radii [T] of a rollout whose samples spread so much from lead `first_lead` on."""
        spread_T = np.asarray(spread_T, np.float64)
        leads_T = np.arange(first_lead, first_lead + len(spread_T))
        floor_T = np.asarray(self.floor)[np.minimum(leads_T, len(self.floor)) - 1]
        return self.multiplier * np.hypot(spread_T, floor_T)


@dataclass(frozen=True)
class Conformal:
    """Radii of one embodiment."""

    coverage: float
    """Share of episodes that stay inside at all leads of the horizon, for each quantity by itself."""
    episodes: int
    """Episodes that set the multipliers; others set the floors."""
    leads: int
    """Latent frames that the coverage is for; later ones are extrapolated and not covered."""
    quantities: Mapping[str, Radii]
    """`latents`, `pixels` and `proprio NAME` -> radii."""
    proprio_multiplier: float | None = None
    """In place of each `proprio NAME`'s own, for all dimensions at once; None without proprioception."""


@dataclass(frozen=True)
class Calibration:
    """What `vidworld calibrate` found."""

    weights_sha256: str
    """Of the weights file that was calibrated."""
    world: str
    """`WorldSpec.digest`."""
    sampler: Mapping[str, Any]
    """`SAMPLING` settings that it was fitted with."""
    noise_scale: NoiseScale | None = None
    conformal: Mapping[str, Conformal] = field(default_factory=dict)
    """Embodiment -> radii."""
    fit: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: datasets with their digests and calibration episodes, settings, ratios before and
    after, versions."""

    def radii(self, embodiment: str, quantity: str) -> Radii:
        """Radii of a quantity. Raises ConfigError for one that was not calibrated."""
        known = self.conformal.get(embodiment)
        if known is None or quantity not in known.quantities:
            listed = ", ".join(self.conformal) if known is None else ", ".join(known.quantities)
            raise ConfigError(
                f"calibrated {'embodiment' if known is None else 'quantity'}",
                got=repr(embodiment if known is None else quantity),
                expected=listed or "a calibration with conformal radii",
                fix="run vidworld calibrate on its episodes",
            )
        return known.quantities[quantity]

    def fits(self, sampler: SamplerConfig) -> bool:
        """Whether it was made with this way of sampling."""
        own = {"temperature": 1.0, "start_noise": 1.0, **self.sampler}
        return all(own.get(name) == getattr(sampler, name) for name in SAMPLING)

    def write(self, directory: Path | str) -> Path:
        """Write `calibration.json` atomically, with a digest of its content, and return its path."""
        content = {"schema_version": SCHEMA_VERSION, **to_mapping(self)}
        content["digest"] = digest(content)
        path = Path(directory) / FILE_NAME
        try:
            write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise CheckpointError("cannot write the calibration", where=path, got=error.strerror) from None
        return path

    @classmethod
    def read(cls, directory: Path | str) -> "Calibration":
        """Read `calibration.json`; raises CheckpointError when it is missing, damaged or altered."""
        path = Path(directory) / FILE_NAME
        content = read_json(path, fix="make it with vidworld calibrate")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                "schema version", where=path, got=content.get("schema_version"), expected=SCHEMA_VERSION
            )
        if content.pop("digest", None) != digest(content):
            raise CheckpointError(
                "the calibration does not match its digest: it is damaged or was edited",
                where=path,
                fix="make it again with vidworld calibrate, or delete it",
            )
        del content["schema_version"]
        try:
            found = from_mapping(cls, content, where=path)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        numbers = [
            value
            for one in found.conformal.values()
            for radii in one.quantities.values()
            for value in (radii.multiplier, *radii.floor)
        ]
        if not all(math.isfinite(value) and value >= 0 for value in numbers):
            raise CheckpointError("radii that are no lengths", where=path)
        return found

    def for_weights(self, sha256: str, world: str) -> "Calibration":
        """The same for weights that only were rounded or repacked, of a world with another digest."""
        return dataclasses.replace(self, weights_sha256=sha256, world=world)


def sampling_of(sampler: SamplerConfig) -> dict[str, Any]:
    """The settings that a calibration depends on."""
    return {name: getattr(sampler, name) for name in SAMPLING}
