"""All that a run needs to go on: taken from the parts of a training, and given back to them.

The files are the same whatever the strategy and the number of ranks: whole weights and averages, and moments
by the names of the parameters, whole or in pieces (see `pieces`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidworld.trainer.checkpoint import Saved, load_weights, require_shapes, shapes_of
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import Engine
from vidworld.trainer.pieces import Gathering, StoredPieces
from vidworld.trainer.tasks import Task

PREFIX = "net."
"""Of a network's parameters among those of its task."""


class TrainingState:
    """Weights, averages and moments of a training, whole or cut across ranks."""

    def __init__(self, task: Task[Any], ema: EMA[Task[Any]], engine: Engine) -> None:
        self.task, self.ema, self.engine = task, ema, engine
        self._gather: Gathering | None = None
        if engine.shards_weights:
            held = engine.weights()
            ema.cut(held)
            self._gather = Gathering(held, engine.rank, engine.world_size)
            # A whole copy of the averages is needed by the first rank alone, and seldom.
            ema.module.to("cpu" if engine.rank == 0 else "meta")
        else:
            ema.module.to(engine.device)

    def model(self) -> dict[str, Tensor]:
        """The network's weights and buffers: whole on the first rank. Collective where they are sharded."""
        if self._gather is None:
            return self.task.net.state_dict()
        return self._named(self._gather(self.engine.weights()))

    def averages(self) -> dict[str, Tensor]:
        """The averaged network's, as `model`."""
        if self._gather is None:
            return self.ema.module.net.state_dict()
        return self._named(self._gather(self.ema.held()))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Task[Any]]:
        """The task with averaged weights, whole and on its device on the first rank. Collective."""
        if self._gather is None:
            yield self.ema.module
            return
        self.gather()
        if self.engine.rank == 0:
            self.ema.module.to(self.engine.device)
        yield self.ema.module
        if self.engine.rank == 0:
            self.ema.module.to("cpu")

    def gather(self) -> None:
        """Fill the averaged module of the first rank. Collective."""
        if self._gather is not None and (whole := self.averages()):
            self.ema.module.net.load_state_dict(whole)
            buffers = dict(self.task.named_buffers())
            for name, buffer in self.ema.module.named_buffers():
                buffer.copy_(buffers[name])

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Take over a checkpoint of any strategy and number of ranks; raises CheckpointError."""
        where = saved.directory
        if self._gather is None:
            load_weights(self.task.net, saved.tensors("model"), where=where)
            load_weights(self.ema.module.net, saved.tensors("ema"), where=where)
        else:
            stored, averages = saved.pieces("model"), saved.pieces("ema")
            expected = shapes_of(self.ema.module.net.state_dict())
            for found in (stored, averages):
                require_shapes(expected, found.shapes(), where)
            for (piece, values), (_, shadow) in zip(self.engine.weights(), self.ema.held(), strict=True):
                for source, target in ((stored, values), (averages, shadow)):
                    target.copy_(source.read(piece.name.removeprefix(PREFIX), piece.start, piece.stop))
            _load_buffers(self.task.net, stored)
        self.engine.refresh()
        self.engine.load_optimizer_state(saved.pieces("optimizer"), where=where)
        self.ema.load(saved.state["ema"])

    def _named(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gathered parameters and this rank's buffers under the names of a network's state."""
        if self.engine.rank > 0:
            return {}
        buffers = dict(self.task.net.named_buffers())
        return {
            name: whole[PREFIX + name] if PREFIX + name in whole else buffers[name]
            for name in self.ema.module.net.state_dict()
        }


def _load_buffers(net: nn.Module, stored: StoredPieces) -> None:
    shapes = stored.shapes()
    for name, buffer in net.named_buffers():
        if name in shapes:  # others are made by the network itself, and not saved
            buffer.copy_(stored.whole(name, buffer.shape))
