"""Factors on the noise that a sampler starts from, a lead at a time: more spread, or less.

A lead counts imagined frames since the last known one, from 1; the last factor holds for all later leads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vidworld.errors import ConfigError

LEAST, MOST = 0.1, 10.0


@dataclass(frozen=True)
class NoiseScale:
    """Factors at leads 1, 2, ...; empty is 1 throughout.

    At 1 samples have the same bits as without.
    """

    latents: tuple[float, ...] = ()
    """On the noise that a frame's latents are denoised from."""
    proprio: tuple[float, ...] = ()
    """On the noise that its proprioception is denoised from."""
    model: tuple[float, ...] = ()
    """On the network's noise input, where it has one (`noise_dims`)."""

    def __post_init__(self) -> None:
        """Refuse factors that no calibration would find with ConfigError."""
        for name in ("latents", "proprio", "model"):
            wrong = [one for one in getattr(self, name) if not (math.isfinite(one) and LEAST <= one <= MOST)]
            if wrong:
                raise ConfigError(
                    f"noise_scale.{name}", got=wrong[0], expected=f"factors from {LEAST:g} to {MOST:g}"
                )

    def at(self, lead: int) -> tuple[float, float, float]:
        """Factors of latents, proprioception and the model's noise at a lead, from 1."""
        assert lead >= 1
        return (_at(self.latents, lead), _at(self.proprio, lead), _at(self.model, lead))

    def __str__(self) -> str:
        """The range of each series that does something."""
        parts = [
            f"{name} x{min(values):.2f} to x{max(values):.2f}"
            for name in ("latents", "proprio", "model")
            if (values := getattr(self, name))
        ]
        return ", ".join(parts) or "x1"


def _at(factors: Sequence[float], lead: int) -> float:
    return factors[min(lead, len(factors)) - 1] if factors else 1.0
