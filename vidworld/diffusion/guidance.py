"""Guidance: lean away from what the model would imagine without the condition."""

from torch import Tensor

from vidworld.diffusion.predict import Predict
from vidworld.types import Frames, SignalLevel


def guide(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + scale) f_c - scale f_u.

    At scale 0 this is `conditional` itself, at no cost. Guided samples follow their actions harder and are
    less spread than the data: leave it off where uncertainty matters.
    """
    if scale == 0:
        return conditional

    def guided(z: Frames, level: SignalLevel, step_BT: Tensor) -> Frames:
        with_condition = conditional(z, level, step_BT)
        without = unconditional(z, level, step_BT)
        return with_condition.map(lambda c, u: c + scale * (c - u), without)

    return guided
