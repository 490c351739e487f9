"""Weights in fewer bytes: rounded to bfloat16, or to int8 with a scale a row, and back to float32.

A matrix or kernel W [rows, ...] in int8 is q [rows, ...] and s [rows], with W about q * s and
s = max |W| / 127 over the row (symmetric, per output channel: Nagel et al. 2021, arXiv 2106.08295, sec.
2.2): an entry is off by about s / 2 at most. Scales have 16 significant bits, so that 127 s is exact: what
was rounded once is rounded to the same bits again. What has one axis (norms, biases), and for int8 few rows
or columns, is kept as it is: it is small, and matters. Changes of members that share a network, stacks of
thin matrices [J, ...], have a scale a member: they are small beside the weights that they change. Restoring
is one float32 product an entry, with the same bits everywhere.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "int8"]
"""`fp32` keeps weights as they are."""
SCALE = ":scale"
"""Ends the name of the scales that belong to an int8 tensor."""
LEVELS = 127
SCALE_BITS = 16
MEMBER_CHANGES = (".in_JrI", ".out_JOr")
"""End the names of what members add to the matrices that they share."""
LEAST = 16
"""Fewer rows than this, or entries in a row, are kept as they are."""


def compress(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Float tensors in another precision, ready for a file; what is not floating point stays as it is.

    Raises ValueError for an int8 tensor among the weights, or an unknown precision.
    """
    compressed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if tensor.dtype == torch.int8 or name.endswith(SCALE):
            raise ValueError(f"{name} is compressed already")
        tensor = tensor.detach().cpu().contiguous()
        match precision:
            case "fp32":
                compressed[name] = tensor.clone()
            case "bf16":
                matrix = tensor.is_floating_point() and tensor.ndim > 1
                compressed[name] = tensor.bfloat16() if matrix else tensor.clone()
            case "int8" if not _worth_it(name, tensor):
                compressed[name] = tensor.clone()
            case "int8":
                compressed[name], compressed[name + SCALE] = _to_int8(tensor.float())
            case _:
                raise ValueError(f"precision {precision!r}")
    return compressed


def restore(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a file as they are used: int8 with its scales as float32, all else as it is.

    Raises ValueError where an int8 tensor and scales do not belong together.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            if name.removesuffix(SCALE) not in stored:
                raise ValueError(f"{name} belongs to no tensor")
            continue
        scale_R = stored.get(name + SCALE)
        if scale_R is None:
            weights[name] = tensor
            continue
        if tensor.dtype != torch.int8 or scale_R.dtype != torch.float32 or scale_R.shape != tensor.shape[:1]:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with {scale_R.dtype} {list(scale_R.shape)}; "
                "expected int8 with one float32 scale a row"
            )
        weights[name] = tensor.float() * scale_R.reshape(-1, *[1] * (tensor.ndim - 1))
    return weights


def rounded(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Weights as they come back from a file of that precision, in their own dtypes."""
    back = restore(compress(weights, precision))
    return {name: back[name].to(tensor.dtype) for name, tensor in weights.items()}


def relative_errors(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, float]:
    """For each float tensor that is not zero, the norm of what rounding changes over its own."""
    back = rounded(weights, precision)
    return {
        name: float((back[name].double() - tensor.double()).norm() / size)
        for name, tensor in weights.items()
        if tensor.is_floating_point() and (size := tensor.double().norm()) > 0
    }


def _worth_it(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return False
    if name.endswith(MEMBER_CHANGES):
        return tensor[0].numel() >= LEAST * LEAST
    return min(len(tensor), math.prod(tensor.shape[1:])) >= LEAST


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 and s float32 [rows]; a row of zeros has scale 1, and one that is not finite stays so."""
    rows_RX = tensor.flatten(1)
    scale_R = rows_RX.abs().amax(1) / LEVELS
    unit = 1 << 24 - SCALE_BITS  # of what is cut off a float32's 24 bits; bits of finite floats are ordered
    scale_R = ((scale_R.view(torch.int32) + unit // 2) & -unit).view(torch.float32)
    scale_R = torch.where(scale_R == 0, torch.ones_like(scale_R), scale_R)
    q_RX = (rows_RX / scale_R[:, None]).nan_to_num().round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return q_RX.unflatten(1, tensor.shape[1:]), scale_R
