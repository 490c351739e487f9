"""The moving average of the weights, in float32, with its own counter."""

import copy
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vidworld.trainer.pieces import Held, Piece

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Exponential moving average of a module, kept as a whole module that can be run as it is.

    After n updates, the next is shadow <- d shadow + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)),
    so that the first weights are forgotten early. The shadow is float32 whatever the weights are: in bfloat16
    it would round every change away at d = 0.999. Make it before compiling or wrapping the module.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module: M = copy.deepcopy(module).float().eval().requires_grad_(False)
        self._source: nn.Module | None = None
        self._shadow: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._current: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._pieces: list[Piece] | None = None

    def cut(self, held: Sequence[Held]) -> None:
        """Average these pieces of the weights from now on, and leave `module` to who gathers it.

        The average of a piece is the piece of the average, bit by bit.
        """
        self._pieces = [piece for piece, _ in held]
        self._current = ([values for _, values in held], [])
        self._shadow = ([values.detach().float().clone() for _, values in held], [])

    def held(self) -> list[Held]:
        """The averages of this rank's pieces."""
        assert self._pieces is not None, "of a module that was cut"
        return [Held(piece, values) for piece, values in zip(self._pieces, self._shadow[0], strict=True)]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the current weights of the module that this was made from; buffers are copied."""
        if self._pieces is None and module is not self._source:
            # Once, because walking a deep module takes a millisecond; and not before both are on their
            # device, because a move replaces buffers.
            self._source = module
            self._shadow, self._current = _tensors(self.module), _tensors(module)
        (shadow, shadow_buffers), (current, buffers) = self._shadow, self._current
        torch._foreach_lerp_(shadow, [weight.detach().float() for weight in current], 1 - self.next_decay)
        for mine, buffer in zip(shadow_buffers, buffers, strict=True):
            mine.copy_(buffer)
        self.updates += 1

    @property
    def next_decay(self) -> float:
        """The d that the next update will use."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def state(self) -> dict[str, Any]:
        """The counter; the shadow's weights are saved as weights."""
        return {"updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.updates = int(state["updates"])


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers. Not detached: DeepSpeed may point a parameter at other memory."""
    return list(module.parameters()), list(module.buffers())
