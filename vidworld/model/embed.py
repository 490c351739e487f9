"""From frames, actions and levels to tokens and conditions, and back.

Shapes: B batch, T frames, V views, C channels, h w latent rows and columns, p patch size, N tokens a frame, D
width, A action dims, S proprio dims, k actions per latent frame, E embodiments, I O input and output dims, X
noise dims.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.types import Frames, SignalLevel


class EmbodimentLinear(nn.Module):
    """A linear map of its own for each embodiment: weight_EIO gathered by the row's embodiment.

    `used_in` and `used_out` count the dimensions an embodiment has; what lies beyond is padding: inputs there
    are ignored, whatever they hold, and outputs there are exactly zero. Computed and returned in at least
    float32, autocast or not: half precision would round joint angles, and the maps are small. With `zero`
    it starts at zero.
    """

    valid_in_EI: Tensor
    valid_out_EO: Tensor

    def __init__(
        self,
        num_embodiments: int,
        num_inputs: int,
        num_outputs: int,
        *,
        used_in: tuple[int, ...] = (),
        used_out: tuple[int, ...] = (),
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.weight_EIO = nn.Parameter(torch.empty(num_embodiments, num_inputs, num_outputs))
        self.bias_EO = nn.Parameter(torch.zeros(num_embodiments, num_outputs))
        if zero:
            nn.init.zeros_(self.weight_EIO)
        else:
            nn.init.normal_(self.weight_EIO, std=max(num_inputs, 1) ** -0.5)
        for name, used, total in (("in_EI", used_in, num_inputs), ("out_EO", used_out, num_outputs)):
            counts = torch.tensor(used or [total] * num_embodiments)
            self.register_buffer(f"valid_{name}", torch.arange(total) < counts[:, None], persistent=False)

    def forward(self, x_BYI: Tensor, embodiment_B: Tensor) -> Tensor:
        """[B, Y, I] to [B, Y, O], any Y."""
        wide = torch.promote_types(self.weight_EIO.dtype, torch.float32)
        parts = (self.valid_in_EI, self.weight_EIO, self.bias_EO, self.valid_out_EO)
        if len(self.weight_EIO) == 1 and not torch.is_grad_enabled():  # nothing to gather
            valid_in_BI, weight_BIO, bias_BO, valid_out_BO = (
                part.expand(len(embodiment_B), *part.shape[1:]) for part in parts
            )
        else:
            valid_in_BI, weight_BIO, bias_BO, valid_out_BO = (part[embodiment_B] for part in parts)
        x_BYI = x_BYI.where(valid_in_BI[:, None], 0).to(wide)
        with torch.autocast(x_BYI.device.type, enabled=False):
            x_BYO = torch.baddbmm(bias_BO.to(wide)[:, None], x_BYI, weight_BIO.to(wide))
        return x_BYO.where(valid_out_BO[:, None], 0)


class ActionEmbedding(nn.Module):
    """One token for each action that leads into a frame; a learned vector stands in for an unknown one."""

    def __init__(self, shape: FrameShape, width: int) -> None:
        super().__init__()
        self.num_slots = shape.actions_per_frame
        self.linear = EmbodimentLinear(
            shape.num_embodiments, shape.action_dims, width, used_in=shape.embodiment_action_dims
        )
        self.slot_kD = nn.Parameter(torch.randn(shape.actions_per_frame, width) * 0.02)
        self.no_action_D = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, conditioning: Conditioning) -> Tensor:
        """Action tokens [B, T, k, D]."""
        actions_BYA = conditioning.actions_BTkA.flatten(1, 2)
        tokens_BYD = self.linear(actions_BYA, conditioning.embodiment_B).to(self.no_action_D.dtype)
        tokens_BTkD = tokens_BYD.unflatten(1, (-1, self.num_slots))
        keep_BT11 = conditioning.keep_BT[..., None, None]
        return torch.where(keep_BT11, tokens_BTkD, self.no_action_D) + self.slot_kD


class TokenEmbedding(nn.Module):
    """The tokens of a frame: [V * (h/p) * (w/p) patches][1 proprio][k actions][R registers].

    Patches get a learned embedding of their place: cameras that stand still show the same thing there, and
    relative rotations alone learn that more slowly. With `previous_frame` patches and proprioception of the
    frame before are added, through maps that start at zero.
    """

    def __init__(
        self,
        shape: FrameShape,
        width: int,
        patch_size: int,
        num_registers: int,
        *,
        previous_frame: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch = nn.Linear(shape.channels * patch_size**2, width)
        self.view_VD = nn.Parameter(torch.randn(shape.views, width) * 0.02)
        num_places = (shape.height // patch_size) * (shape.width // patch_size)
        self.place_nD = nn.Parameter(torch.randn(num_places, width) * 0.2)
        self.proprio = EmbodimentLinear(
            shape.num_embodiments, shape.proprio_dims, width, used_in=shape.embodiment_proprio_dims
        )
        self.register_RD = nn.Parameter(torch.randn(num_registers, width) * 0.02)
        nn.init.normal_(self.patch.weight, std=self.patch.in_features**-0.5)
        nn.init.zeros_(self.patch.bias)
        self.previous_patch = self.previous_proprio = None
        if previous_frame:
            self.previous_patch = nn.Linear(self.patch.in_features, width, bias=False)
            nn.init.zeros_(self.previous_patch.weight)
            self.previous_proprio = EmbodimentLinear(
                *(shape.num_embodiments, shape.proprio_dims, width),
                used_in=shape.embodiment_proprio_dims,
                zero=True,
            )

    def forward(
        self, frames: Frames, actions_BTkD: Tensor, embodiment_B: Tensor, previous: Frames | None = None
    ) -> Tensor:
        """Tokens [B, T, N, D]; `previous` [B, T]: the frame before each, of a model that reads it."""
        batch, time = actions_BTkD.shape[:2]
        patches_BTVnD = self.patch(self._patches(frames))
        patches_BTVnD = patches_BTVnD + self.view_VD[:, None] + self.place_nD
        proprio_BTD = self.proprio(frames.proprio_BTS, embodiment_B)
        if self.previous_patch is not None and self.previous_proprio is not None:
            assert previous is not None
            patches_BTVnD = patches_BTVnD + self.previous_patch(self._patches(previous))
            proprio_BTD = proprio_BTD + self.previous_proprio(previous.proprio_BTS, embodiment_B)
        proprio_BTD = proprio_BTD.to(self.register_RD.dtype)
        registers_BTRD = self.register_RD.expand(batch, time, -1, -1)
        return torch.cat(
            [patches_BTVnD.flatten(2, 3), proprio_BTD[:, :, None], actions_BTkD, registers_BTRD], dim=2
        )

    def _patches(self, frames: Frames) -> Tensor:
        return patchify(frames.latents_BTVChw, self.patch_size).to(self.patch.weight.dtype)


class ConditionEmbedding(nn.Module):
    """What modulates a frame: signal level, step size, its actions, embodiment, and noise if any."""

    def __init__(self, shape: FrameShape, width: int, noise_dims: int, num_frequencies: int = 64) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.level_and_step = _mlp(4 * num_frequencies, width)
        self.actions = _mlp(shape.actions_per_frame * width, width)
        self.embodiment = nn.Embedding(shape.num_embodiments, width)
        nn.init.normal_(self.embodiment.weight, std=0.02)
        self.noise = nn.Linear(noise_dims, width, bias=False) if noise_dims else None
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)

    def forward(
        self, level: SignalLevel, step_BT: Tensor, actions_BTkD: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Conditions [B, T, D]."""
        return self.join(self.of_level(level, step_BT), actions_BTkD, conditioning)

    def of_level(self, level: SignalLevel, step_BT: Tensor) -> Tensor:
        """The part of signal level and step size [B, T, D], the same for all that is sampled alike."""
        waves_BTF = torch.cat([waves(value, self.num_frequencies) for value in (level.signal, step_BT)], -1)
        return self.level_and_step(waves_BTF.to(self.embodiment.weight.dtype))

    def join(self, of_level_BTD: Tensor, actions_BTkD: Tensor, conditioning: Conditioning) -> Tensor:
        """Conditions [B, T, D] from all parts."""
        condition_BTD = (
            of_level_BTD
            + self.actions(actions_BTkD.flatten(2))
            + self.embodiment(conditioning.embodiment_B)[:, None]
        )
        if conditioning.noise_BTX is None:
            return condition_BTD
        assert self.noise is not None, "this model has no noise input (noise_dims = 0)"
        return condition_BTD + self.noise(conditioning.noise_BTX.to(self.noise.weight.dtype))


def frames_before(frames: Frames, streams: Streams, newest: Frames | None) -> Frames:
    """The frame before each of `frames`: in all streams that of the context, as it is seen there.

    newest: the last cached frame [B, 1], as it was committed, or None where there is none: the very first one
    has zeros before it, the mean of the data.
    """
    assert (newest is None) == (streams.past == 0), "a cache of frames without the newest one"
    first = frames[:, :1].map(torch.zeros_like) if newest is None else newest
    return Frames.cat([first, frames[:, : streams.context - 1]] * (1 + streams.targets), 1)


def patchify(latents_BTVChw: Tensor, patch_size: int) -> Tensor:
    """[B, T, V, C, h, w] to [B, T, V, (h/p) (w/p), C p p], rows first."""
    return rearrange(latents_BTVChw, "b t v c (i p) (j q) -> b t v (i j) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches_BTVnP: Tensor, shape: FrameShape, patch_size: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(
        patches_BTVnP,
        "b t v (i j) (c p q) -> b t v c (i p) (j q)",
        i=shape.height // patch_size,
        p=patch_size,
        q=patch_size,
    )


def patch_positions(shape: FrameShape, patch_size: int, num_special: int) -> Tensor:
    """Row and column of each token, int64 [N, 2].

    Views share one grid and special tokens sit at its origin. Being unrotated, special tokens see a patch's
    absolute place, and patches see each other's relative one.
    """
    rows, columns = torch.arange(shape.height // patch_size), torch.arange(shape.width // patch_size)
    grid_n2 = torch.cartesian_prod(rows, columns).view(-1, 2)
    return F.pad(grid_n2.repeat(shape.views, 1), (0, 0, 0, num_special))


def waves(values_BT: Tensor, num_frequencies: int) -> Tensor:
    """Sines and cosines [B, T, 2 num_frequencies] of numbers in [0, 1], at 1 to 1000 radians per unit."""
    values_BT = values_BT.to(torch.promote_types(values_BT.dtype, torch.float32))
    exponents = torch.linspace(0, math.log(1000), num_frequencies, device=values_BT.device)
    angles = values_BT[..., None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _mlp(num_inputs: int, width: int) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(num_inputs, width), nn.SiLU(), nn.Linear(width, width))
    for linear in (mlp[0], mlp[2]):
        assert isinstance(linear, nn.Linear)
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    return mlp
