"""Histories that the model imagined itself, so that training meets the errors that a rollout makes.

Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099) for clips whose frames are denoised in parallel;
unlike self forcing (Huang et al. 2025, arXiv 2506.08009), the loss is the plain one on recorded targets, and
no gradient goes through the history.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vidworld.diffusion.path import constant_level
from vidworld.diffusion.predict import Predict
from vidworld.types import Frames

LEAST_FRAMES = 3
"""A known frame, an imagined one, and one that sees it."""


def draw_starts(
    num_rows: int, num_frames: int, *, generator: torch.Generator, device: torch.device
) -> Tensor:
    """First imagined frame of each row [B], uniform over 1 to num_frames - 2: the last is seen by nobody."""
    starts_B = torch.randint(1, num_frames - 1, (num_rows,), generator=generator, device=generator.device)
    return starts_B.to(device)


def imagined_history(
    given: Callable[[Frames], Predict],
    known: Frames,
    noise: Frames,
    starts_B: Tensor,
    *,
    passes: int,
    step: float,
) -> Frames:
    """The frames of `known` before `starts_B`, and from there on the model's own one-step samples of them.

    given: closes over a history [B, T] and gives the `Predict` of frames that each see what is before them.
    Every pass predicts all frames at once from `noise` at level 0, told the step size `step`. In the first
    they see the known frames, in every other what the pass before has made of them. Noise and all else stay
    the same, so that frame starts + i is, after i + 1 passes, the frame of a rollout from starts on; later
    frames are what one gets who has been set right that many frames ago. Without gradient.
    """
    frame_T = torch.arange(known.num_frames, device=starts_B.device)
    imagined_BT = frame_T >= starts_B[:, None]

    def choose(known: Tensor, predicted: Tensor) -> Tensor:
        mask = imagined_BT.view(*imagined_BT.shape, *[1] * (known.ndim - 2))
        return torch.where(mask, predicted, known)

    level = constant_level(known, 0.0)
    step_BT = torch.full_like(level.signal, step)
    history = known
    with torch.no_grad():
        for _ in range(passes):
            predicted = given(history)(noise, level, step_BT)
            history = known.map(choose, predicted)
    if torch.is_autocast_enabled(starts_B.device.type):
        # As in `bootstrap_target`: weights that were cast without gradient must not reach the loss.
        torch.clear_autocast_cache()
    return history
