"""Weights of latent positions by how much the picture changes there, so that small things that move count."""

import torch
from torch import Tensor

from vidworld.types import Frames


def motion_weights(clean: Frames, motion_weight: float, used_B: Tensor | None = None) -> Tensor:
    """Weights [B, T, V, 1, h, w] of latent positions, of mean 1 over each clip.

    The change of a position x of frame t is the root mean square over the channels of its differences from
    the frame before and from the first frame of the clip: the one sees what moves, the other what has moved
    and now rests elsewhere (there is neither for frame 0, whose change is 0).

        change_t(x) = sqrt( mean_c [ (z_t(x) - z_{t-1}(x))^2 + (z_t(x) - z_0(x))^2 ] / 2 )
        weight_t(x) = (1 + motion_weight change_t(x) / mean(change)) / (1 + motion_weight)

    The mean is over all positions and frames of the clip: with a motion weight of 1, half of the weight is
    shared by change and half evenly. A clip where nothing changes weighs evenly. `used_B`: the share of a
    row's latents that is not padding, where latents are zero; the mean is then over those alone.
    """
    latents_BTVChw = clean.latents_BTVChw.detach()
    latents_BTVChw = latents_BTVChw.to(torch.promote_types(latents_BTVChw.dtype, torch.float32))
    before_BTVChw = torch.cat([latents_BTVChw[:, :1], latents_BTVChw[:, :-1]], 1)
    squared_BTVChw = (latents_BTVChw - before_BTVChw).square()
    squared_BTVChw = squared_BTVChw + (latents_BTVChw - latents_BTVChw[:, :1]).square()
    change_BTV1hw = (squared_BTVChw.mean(3, keepdim=True) / 2).sqrt()
    mean_B = change_BTV1hw.flatten(1).mean(1)
    if used_B is not None:
        mean_B = mean_B / used_B
    mean_B11111 = mean_B.view(-1, *[1] * (change_BTV1hw.ndim - 1))
    relative_BTV1hw = change_BTV1hw / torch.where(mean_B11111 > 0, mean_B11111, 1)
    relative_BTV1hw = torch.where(mean_B11111 > 0, relative_BTV1hw, 1)
    return (1 + motion_weight * relative_BTV1hw) / (1 + motion_weight)
