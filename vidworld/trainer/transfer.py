"""Micro-batches on their way to the accelerator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidworld.types import Batch


class Transfer:
    """Copies micro-batches to a device, on a GPU on a stream of its own.

    The loop launches a step long before the GPU has done it. A copy in the same stream would stand behind the
    step before; beside it, it is over by the time that its own step begins. Batches should be pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the device; what the current stream does from now on waits for them."""
        if self._stream is None:
            return [batch.to(self.device) for batch in batches]
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = [batch.to(self.device, non_blocking=True) for batch in batches]
        current.wait_stream(self._stream)
        for batch in moved:
            for tensor in vars(batch).values():
                if isinstance(tensor, Tensor):
                    # Its memory belongs to the other stream, which must not reuse it before this one is done.
                    tensor.record_stream(current)
        return moved
