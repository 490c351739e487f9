"""Weights of latent positions by how much the picture has been changing there, so that small things count.

A weight must not depend on what it is to judge. One that is large where the target itself changes makes
things that are missed dear and things that are made up cheap: the mean that a network learns is then no mean
of what happens, and a weighted score is no proper score (the forecaster's dilemma, Lerch et al. 2017). So a
frame is weighted by the frames before it alone, which the network sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.types import Frames

MOST = 8.0
"""Change of a position, over the mean of its frame, beyond which it counts for no more."""
REACH = 1
"""Latents around a change that count as it does: as far as things go until the next frame."""
TINY = 1e-12
"""Change of a frame before which nothing moved."""


def motion_weights(clean: Frames, motion_weight: float, used_B: Tensor | None = None) -> Tensor:
    """Weights [B, T, V, 1, h, w] of latent positions, of mean 1 over each frame.

    The change before frame t is how frame t - 1 differs from the frame before it and from the first frame of
    the clip: the one sees what moves, the other what has moved and now rests elsewhere. A position counts as
    the one around it that changed most.

        c_t(y)        = sqrt( mean over channels of [ (z_{t-1} - z_{t-2})^2 + (z_{t-1} - z_0)^2 ](y) / 2 )
        change_t(x)   = max c_t(y) over y within REACH latents of x
        relative_t(x) = min( change_t(x) / mean(change_t), MOST )
        weight_t(x)   = (1 + motion_weight relative_t(x)) / (1 + motion_weight mean(relative_t))

    Where much moves, a motion weight of 1 shares half of the weight by change and half evenly; where little
    does, no position counts for more than 1 + MOST times one that rests. Frames 0 and 1, before which nothing
    can have moved, weigh evenly. `used_B`: the share of a row's latents that is not padding, where latents
    are zero; means are then over the others alone.
    """
    latents_BTVChw = clean.latents_BTVChw.detach()
    latents_BTVChw = latents_BTVChw.to(torch.promote_types(latents_BTVChw.dtype, torch.float32))
    change_BTV1hw = _dilated(_changes(latents_BTVChw))
    if used_B is not None:
        change_BTV1hw = change_BTV1hw * (latents_BTVChw != 0).any(3, keepdim=True).any(1, keepdim=True)
    relative_BTV1hw = change_BTV1hw / _mean_of_frame(change_BTV1hw, used_B).clamp_min(TINY)
    relative_BTV1hw = relative_BTV1hw.clamp_max(MOST)
    return (1 + motion_weight * relative_BTV1hw) / (
        1 + motion_weight * _mean_of_frame(relative_BTV1hw, used_B)
    )


def _changes(latents_BTVChw: Tensor) -> Tensor:
    """What has changed before each frame [B, T, V, 1, h, w]; 0 for the first two."""
    first, before = latents_BTVChw[:, :1], latents_BTVChw[:, :-2]
    newest = latents_BTVChw[:, 1:-1]
    squared = ((newest - before).square() + (newest - first).square()).mean(3, keepdim=True)
    return F.pad((squared / 2).sqrt(), (0, 0) * 4 + (2, 0))[:, : latents_BTVChw.shape[1]]


def _dilated(change_BTV1hw: Tensor) -> Tensor:
    """The largest change around each position."""
    pooled = F.max_pool2d(change_BTV1hw.flatten(0, 2), 2 * REACH + 1, stride=1, padding=REACH)
    return pooled.view_as(change_BTV1hw)


def _mean_of_frame(change_BTV1hw: Tensor, used_B: Tensor | None) -> Tensor:
    """Over the latents that are not padding, [B, T, 1, 1, 1, 1]."""
    mean_BT = change_BTV1hw.flatten(2).mean(2)
    if used_B is not None:
        mean_BT = mean_BT / used_B[:, None]
    return mean_BT[:, :, None, None, None, None]
