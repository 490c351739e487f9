"""How long the next variant of `train.py` will take, so that a run fits its time."""

from dataclasses import dataclass, field
from typing import Literal

from train_variants import Variant

Work = Literal["own", "shared", "eager"]

OWN: frozenset[Variant] = frozenset({"zero3", "half_residual", "naive_compiled"})
"""Variants whose graphs no other variant compiles. FSDP2 traces its own, and then finds the usual kernels."""
EAGER: frozenset[Variant] = frozenset({"naive", "naive_full"})
GUESS: dict[Work, float] = {"own": 0.8, "shared": 0.4, "eager": 0.4}
"""Of the first variant's time, until one of the kind was measured."""


def work_of(variant: Variant) -> Work:
    """What a variant compiles: blocks of its own, those that most share, or none."""
    if variant in EAGER:
        return "eager"
    return "own" if variant in OWN else "shared"


@dataclass
class Forecast:
    """Learns from the variants of one size.

    The first pays for what all need once, and if it compiles the usual blocks makes their kernels. Those
    after it find them in the compiler's cache on disk, which `torch.compiler.reset` leaves alone.
    """

    took_s: dict[Variant, float] = field(default_factory=dict)
    """Seconds of what was measured so far, in order."""

    def seconds(self, variant: Variant) -> float:
        """As long as the longest of its kind took, or else a share of the first one; 0 for the first."""
        if not self.took_s:
            return 0.0
        (_, longest), *later = self.took_s.items()
        work = work_of(variant)
        if work == "shared" and not any(work_of(done) == "shared" for done in self.took_s):
            work = "own"  # nobody has made their kernels yet
        alike = [seconds for done, seconds in later if work_of(done) == work]
        return max(alike) if alike else GUESS[work] * longest
