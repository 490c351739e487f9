"""Do a file's tensors fit a module?"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vidworld.errors import CheckpointError

NAMES_SHOWN = 3


def check_architecture(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: Path, *, same_dtype: bool = True
) -> None:
    """Name what is missing, left over, of another shape or dtype, or not finite, with CheckpointError."""

    def form(tensor: Tensor) -> tuple[torch.dtype | None, torch.Size]:
        return tensor.dtype if same_dtype else None, tensor.shape

    shared = sorted(own.keys() & weights.keys())
    differences = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        f"of another shape{' or dtype' if same_dtype else ''}": [
            name for name in shared if form(weights[name]) != form(own[name])
        ],
        "not finite": [name for name in shared if not torch.isfinite(weights[name]).all()],
    }
    listed = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"
        for kind, names in differences.items()
        if names
    )
    if listed:
        raise CheckpointError("weights that do not fit the tokenizer's config", where=where, got=listed)
