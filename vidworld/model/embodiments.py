"""What a model holds for each embodiment: which tokens are its own, and its rows of the weight tables.

Shapes: E embodiments, V views, h w latent rows and columns, N tokens a frame, D width, n places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.model.inputs import FrameShape

# Weight tables with a row an embodiment: axes that grow with the widest robot, and whether an unknown robot
# starts from the mean of the known ones, or at zero. A new robot is an average one whose commands and
# measurements mean nothing yet; they change nothing until they have learnt to.
_TABLES = {
    "action_embedding.linear.weight_EIO": (("action_dims", None), False),
    "action_embedding.linear.bias_EO": ((None,), True),
    "token_embedding.proprio.weight_EIO": (("proprio_dims", None), False),
    "token_embedding.proprio.bias_EO": ((None,), True),
    "token_embedding.previous_proprio.weight_EIO": (("proprio_dims", None), False),
    "token_embedding.previous_proprio.bias_EO": ((None,), True),
    "proprio_head.weight_EIO": ((None, "proprio_dims"), False),
    "proprio_head.bias_EO": (("proprio_dims",), False),
    "condition_embedding.embodiment.weight": ((None,), True),
}
_VIEWS, _PLACES = "token_embedding.view_VD", "token_embedding.place_nD"


def used_latents(shape: FrameShape) -> Tensor:
    """Which latents belong to each embodiment: bool [E, V, 1, h, w]."""
    grids = torch.tensor([shape.grid(index) for index in range(shape.num_embodiments)])
    views_E, heights_E, widths_E = grids.unbind(1)
    view_EV = torch.arange(shape.views) < views_E[:, None]
    row_Eh = torch.arange(shape.height) < heights_E[:, None]
    column_Ew = torch.arange(shape.width) < widths_E[:, None]
    used_EVhw = view_EV[:, :, None, None] & row_Eh[:, None, :, None] & column_Ew[:, None, None, :]
    return used_EVhw[:, :, None]


def used_tokens(shape: FrameShape, patch_size: int, num_special: int) -> Tensor:
    """Which tokens of a frame belong to each embodiment: bool [E, N]; special tokens belong to all."""
    patches_EVnm = used_latents(shape)[:, :, 0, ::patch_size, ::patch_size]
    return F.pad(patches_EVnm.flatten(1), (0, num_special), value=True)


@dataclass(frozen=True)
class Robots:
    """The embodiments of a model by name, and the shape that holds them."""

    names: tuple[str, ...]
    shape: FrameShape
    patch_size: int


def carry_over(weights: Mapping[str, Tensor], before: Robots, after: Robots) -> dict[str, Tensor]:
    """The state dict of a model of some robots made into one of others: rows go by name, never by place.

    A known robot's rows are copied bit by bit, whatever its new place, and cut or padded to the new widest;
    so are views by their number and places by row and column. What nobody knew starts as the mean of the
    known, or at zero where that means "no effect yet" (`_TABLES`). Weights that are no table are the same
    tensors.
    """
    carried = dict(weights)
    sources = [before.names.index(name) if name in before.names else None for name in after.names]
    for key, (axes, from_mean) in _TABLES.items():
        if key in weights:
            old = weights[key]
            size = [
                old.shape[1 + axis] if name is None else getattr(after.shape, name)
                for axis, name in enumerate(axes)
            ]
            carried[key] = _rows(old, sources, size, from_mean)
    if _VIEWS in weights:
        views: list[int | None] = [v if v < before.shape.views else None for v in range(after.shape.views)]
        carried[_VIEWS] = _rows(weights[_VIEWS], views, weights[_VIEWS].shape[1:], True)
    if _PLACES in weights:
        carried[_PLACES] = _rows(weights[_PLACES], _places(before, after), weights[_PLACES].shape[1:], True)
    return carried


def _places(before: Robots, after: Robots) -> list[int | None]:
    """For each place of the new grid, its index in the old one."""

    def size(robots: Robots) -> tuple[int, int]:
        return robots.shape.height // robots.patch_size, robots.shape.width // robots.patch_size

    (old_rows, old_columns), (rows, columns) = size(before), size(after)
    return [
        i * old_columns + j if i < old_rows and j < old_columns else None
        for i in range(rows)
        for j in range(columns)
    ]


def _rows(old: Tensor, sources: Sequence[int | None], size: Sequence[int], from_mean: bool) -> Tensor:
    """Rows of `old` [E, ...] in a new order, each cut or padded with zeros to `size`."""
    new = old.new_zeros(len(sources), *size)
    inner = tuple(slice(0, min(pair)) for pair in zip(old.shape[1:], size, strict=True))
    unknown = old.mean(0) if from_mean else torch.zeros_like(old[0])
    for row, source in enumerate(sources):
        new[(row, *inner)] = (unknown if source is None else old[source])[inner]
    return new
