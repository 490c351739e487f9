"""Whether what was imagined is finite; nothing after the first frame that is not can be trusted."""

import torch
from torch import Tensor

from vidworld.errors import DivergedError
from vidworld.types import Frames


class RolloutDivergedError(DivergedError):
    """A rollout produced values that are not finite."""


def all_finite(newest: Frames) -> Tensor:
    """One flag: whether nothing in these frames is infinite or NaN."""
    latents, proprio = newest.latents_BTVChw, newest.proprio_BTS
    return latents.isfinite().all() & proprio.isfinite().all()


def require_finite(finite: list[Tensor], first_frame: int) -> None:
    """Look at the flags of consecutive frames and stop at the first that is not finite."""
    flags = torch.stack(finite).tolist() if finite else []
    if False in flags:
        raise RolloutDivergedError(
            f"the rollout is not finite from frame {first_frame + flags.index(False)} on (counted from the "
            "prompt's first frame); nothing after it can be trusted"
        )
