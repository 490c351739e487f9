"""Scale actions and proprioception with the numbers of their contracts, per embodiment.

Shapes: B batch, A action dims, S proprio dims (of the widest embodiment), E embodiments.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vidworld.contract import ActionContract
from vidworld.errors import ContractError


class Normalizer(nn.Module):
    """Raw units to about [-1, 1] and back; padded dimensions come out exactly zero, whatever they hold.

    The statistics stay float32 when the module changes dtype: bfloat16 would round a joint angle by 0.4 %.
    They are not in the state dict, because the contract that travels with the checkpoint is their one source.
    """

    def __init__(self, contracts: Sequence[ActionContract]) -> None:
        super().__init__()
        self.action_dims = max(len(contract.action) for contract in contracts)
        self.proprio_dims = max(len(contract.proprio) for contract in contracts)
        self._register("action", [contract.action_scaling for contract in contracts], self.action_dims)
        self._register("proprio", [contract.proprio_scaling for contract in contracts], self.proprio_dims)

    def _register(self, role: str, scalings: list[tuple[np.ndarray, np.ndarray]], width: int) -> None:
        offset = torch.zeros(len(scalings), width)
        scale = torch.ones(len(scalings), width)
        valid = torch.zeros(len(scalings), width, dtype=torch.bool)
        for row, (offset_D, scale_D) in enumerate(scalings):
            offset[row, : len(offset_D)] = torch.from_numpy(offset_D)
            scale[row, : len(scale_D)] = torch.from_numpy(scale_D)
            valid[row, : len(scale_D)] = True
        for name, tensor in (("offset", offset), ("scale", scale), ("valid", valid)):
            self.register_buffer(f"{role}_{name}", tensor, persistent=False)

    def actions(self, actions_BYA: Tensor, embodiment_B: Tensor) -> Tensor:
        """Normalise [B, ..., A]; differentiable."""
        offset, scale, valid = self._rows("action", actions_BYA, embodiment_B)
        return ((actions_BYA - offset) / scale).where(valid, 0)

    def proprio(self, proprio_BYS: Tensor, embodiment_B: Tensor) -> Tensor:
        """Normalise [B, ..., S]; differentiable."""
        offset, scale, valid = self._rows("proprio", proprio_BYS, embodiment_B)
        return ((proprio_BYS - offset) / scale).where(valid, 0)

    def denormalize_proprio(self, proprio_BYS: Tensor, embodiment_B: Tensor) -> Tensor:
        """Back to raw units [B, ..., S]; differentiable."""
        offset, scale, valid = self._rows("proprio", proprio_BYS, embodiment_B)
        return (proprio_BYS * scale + offset).where(valid, 0)

    def _rows(self, role: str, values: Tensor, embodiment_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, scale and validity of each row, shaped to broadcast against `values`."""
        buffers = [self.get_buffer(f"{role}_{name}") for name in ("offset", "scale", "valid")]
        if values.shape[-1] != buffers[0].shape[-1]:
            raise ContractError(
                f"{role} width",
                got=values.shape[-1],
                expected=f"{buffers[0].shape[-1]}, the widest embodiment",
                fix="pad the last axis with zeros",
            )
        ones = [1] * (values.ndim - 2)
        offset, scale, valid = (buffer[embodiment_B].unflatten(0, (-1, *ones)) for buffer in buffers)
        return offset, scale, valid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalizer":
        """Follow moves between devices, not changes of dtype."""
        for name, buffer in self.named_buffers():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self
