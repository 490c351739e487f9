"""What is trained: a module that turns a batch into losses. (tokenizer and world come below)"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidworld.types import Batch


class Task(nn.Module):
    """One forward is one backward, so that DDP and DeepSpeed can wrap it.

    `net` is the module whose weights are trained, averaged and saved.
    """

    net: nn.Module
    tokens_per_frame: float = 1.0
    """Tokens that the network reads for a frame of a clip, for the log."""

    def forward(self, batch: Batch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Losses of one micro-batch: "loss", and parts for the log without gradient, scalars all.

        Every random tensor comes from `generator`; progress in [0, 1] is the share of training done.
        """
        raise NotImplementedError

    def weight(self, batch: Batch) -> Tensor | None:
        """How much the batch's mean loss counts beside other micro-batches; None when all count alike."""
        return None

    def matrices(self) -> Sequence[nn.Parameter]:
        """Weights for Muon: matrices of hidden layers."""
        return ()
